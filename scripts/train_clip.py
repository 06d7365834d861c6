"""`ldm train-clip`, for `accelerate launch`."""

import sys

from ldm.cli.main import exit_process, main

exit_process(main(["train-clip", *sys.argv[1:]]))
