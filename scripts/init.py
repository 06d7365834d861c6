"""`ldm init`, for `accelerate launch`."""

import sys

from ldm.cli.main import main

sys.exit(main(["init", *sys.argv[1:]]))
