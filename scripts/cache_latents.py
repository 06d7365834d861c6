"""`ldm cache-latents`, for `accelerate launch`."""

import sys

from ldm.cli.main import exit_process, main

exit_process(main(["cache-latents", *sys.argv[1:]]))
