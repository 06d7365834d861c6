"""`ldm verify-resume`, for `accelerate launch`."""

import sys

from ldm.cli.main import leave, main

leave(main(["verify-resume", *sys.argv[1:]]))
