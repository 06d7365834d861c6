"""`ldm init`, for `accelerate launch`."""

import sys

from ldm.cli.main import exit_process, main

exit_process(main(["init", *sys.argv[1:]]))
