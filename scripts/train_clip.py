"""`ldm train-clip`, for `accelerate launch`."""

import sys

from ldm.cli.main import leave, main

leave(main(["train-clip", *sys.argv[1:]]))
