"""`ldm evaluate`, for `accelerate launch`."""

import sys

from ldm.cli.main import exit_process, main

exit_process(main(["evaluate", *sys.argv[1:]]))
