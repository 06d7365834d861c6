"""`ldm train-ldm`, for `accelerate launch`."""

import sys

from ldm.cli.main import main

sys.exit(main(["train-ldm", *sys.argv[1:]]))
