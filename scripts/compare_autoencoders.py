"""`ldm compare-autoencoders`."""

import sys

from ldm.cli.main import exit_process, main

exit_process(main(["compare-autoencoders", *sys.argv[1:]]))
