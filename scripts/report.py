"""`ldm report`."""

import sys

from ldm.cli.main import main

sys.exit(main(["report", *sys.argv[1:]]))
