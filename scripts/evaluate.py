"""`ldm evaluate`, for `accelerate launch`."""

import sys

from ldm.cli.main import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
