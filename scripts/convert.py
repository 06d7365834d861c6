"""`ldm convert`, for `accelerate launch`."""

import sys

from ldm.cli.main import leave, main

leave(main(["convert", *sys.argv[1:]]))
