"""`ldm convert`, for `accelerate launch`."""

import sys

from ldm.cli.main import exit_process, main

exit_process(main(["convert", *sys.argv[1:]]))
