"""`ldm train-ldm`, for `accelerate launch`."""

import sys

from ldm.cli.main import leave, main

leave(main(["train-ldm", *sys.argv[1:]]))
