"""`ldm train-autoencoder`, for `accelerate launch`."""

import sys

from ldm.cli.main import main

sys.exit(main(["train-autoencoder", *sys.argv[1:]]))
