"""`ldm plot`, for `accelerate launch`."""

import sys

from ldm.cli.main import exit_process, main

exit_process(main(["plot", *sys.argv[1:]]))
