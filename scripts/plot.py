"""`ldm plot`, for `accelerate launch`."""

import sys

from ldm.cli.main import main

sys.exit(main(["plot", *sys.argv[1:]]))
