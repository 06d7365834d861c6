"""`ldm sample`, for `accelerate launch`."""

import sys

from ldm.cli.main import leave, main

leave(main(["sample", *sys.argv[1:]]))
