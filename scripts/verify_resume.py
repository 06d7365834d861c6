"""`ldm verify-resume`, for `accelerate launch`."""

import sys

from ldm.cli.main import main

sys.exit(main(["verify-resume", *sys.argv[1:]]))
