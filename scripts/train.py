"""`ldm train`, for `accelerate launch`."""

import sys

from ldm.cli.main import main

sys.exit(main(["train", *sys.argv[1:]]))
