"""`ldm sample`, for `accelerate launch`."""

import sys

from ldm.cli.main import main

sys.exit(main(["sample", *sys.argv[1:]]))
