"""`ldm train-classifier`, for `accelerate launch`."""

import sys

from ldm.cli.main import leave, main

leave(main(["train-classifier", *sys.argv[1:]]))
