"""`ldm init`, for `accelerate launch`."""

import sys

from ldm.cli.main import leave, main

leave(main(["init", *sys.argv[1:]]))
