"""`ldm sample`, for `accelerate launch`."""

import sys

from ldm.cli.main import exit_process, main

exit_process(main(["sample", *sys.argv[1:]]))
