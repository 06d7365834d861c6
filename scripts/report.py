"""`ldm report`."""

import sys

from ldm.cli.main import exit_process, main

exit_process(main(["report", *sys.argv[1:]]))
