"""`ldm train-classifier`, for `accelerate launch`."""

import sys

from ldm.cli.main import main

sys.exit(main(["train-classifier", *sys.argv[1:]]))
