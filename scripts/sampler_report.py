"""`ldm sampler-report`."""

import sys

from ldm.cli.main import leave, main

leave(main(["sampler-report", *sys.argv[1:]]))
