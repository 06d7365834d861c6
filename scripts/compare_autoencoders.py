"""`ldm compare-autoencoders`."""

import sys

from ldm.cli.main import leave, main

leave(main(["compare-autoencoders", *sys.argv[1:]]))
