"""`ldm cache-latents`, for `accelerate launch`."""

import sys

from ldm.cli.main import leave, main

leave(main(["cache-latents", *sys.argv[1:]]))
