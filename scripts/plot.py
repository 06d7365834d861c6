"""`ldm plot`, for `accelerate launch`."""

import sys

from ldm.cli.main import leave, main

leave(main(["plot", *sys.argv[1:]]))
