"""`ldm compare-autoencoders`."""

import sys

from ldm.cli.main import main

sys.exit(main(["compare-autoencoders", *sys.argv[1:]]))
