"""`ldm cache-latents`, for `accelerate launch`."""

import sys

from ldm.cli.main import main

sys.exit(main(["cache-latents", *sys.argv[1:]]))
