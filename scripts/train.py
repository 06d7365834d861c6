"""`ldm train`, for `accelerate launch`."""

import sys

from ldm.cli.main import leave, main

leave(main(["train", *sys.argv[1:]]))
