"""`ldm evaluate`, for `accelerate launch`."""

import sys

from ldm.cli.main import leave, main

leave(main(["evaluate", *sys.argv[1:]]))
