"""`ldm train-classifier`, for `accelerate launch`."""

import sys

from ldm.cli.main import exit_process, main

exit_process(main(["train-classifier", *sys.argv[1:]]))
