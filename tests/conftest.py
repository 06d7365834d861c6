"""For every test: shapes and types in signatures are checked, one thread, no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # sub-processes too
os.environ["MPLBACKEND"] = "Agg"

import jaxtyping

# Before the first import of what is checked. The numeric tower: an int is a float to Python's type checkers.
jaxtyping.install_import_hook(["ldm", "autoencoder"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import torch

torch.set_num_threads(1)
