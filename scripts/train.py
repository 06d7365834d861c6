"""`ldm train`, for `accelerate launch`."""

import sys

from ldm.cli.main import exit_process, main

exit_process(main(["train", *sys.argv[1:]]))
