"""`ldm convert`, for `accelerate launch`."""

import sys

from ldm.cli.main import main

sys.exit(main(["convert", *sys.argv[1:]]))
