"""`ldm sampler-report`."""

import sys

from ldm.cli.main import exit_process, main

exit_process(main(["sampler-report", *sys.argv[1:]]))
