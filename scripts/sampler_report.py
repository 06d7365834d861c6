"""`ldm sampler-report`."""

import sys

from ldm.cli.main import main

sys.exit(main(["sampler-report", *sys.argv[1:]]))
