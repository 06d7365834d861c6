"""`ldm report`."""

import sys

from ldm.cli.main import leave, main

leave(main(["report", *sys.argv[1:]]))
