"""`ldm train-autoencoder`, for `accelerate launch`."""

import sys

from ldm.cli.main import leave, main

leave(main(["train-autoencoder", *sys.argv[1:]]))
