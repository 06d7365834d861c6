"""`ldm train-clip`, for `accelerate launch`."""

import sys

from ldm.cli.main import main

sys.exit(main(["train-clip", *sys.argv[1:]]))
