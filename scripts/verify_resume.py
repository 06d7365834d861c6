"""`ldm verify-resume`, for `accelerate launch`."""

import sys

from ldm.cli.main import exit_process, main

exit_process(main(["verify-resume", *sys.argv[1:]]))
