"""For every test: shapes and types in signatures are checked, one thread, no network."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # sub-processes too
os.environ["MPLBACKEND"] = "Agg"

import jaxtyping

# Before the first import of what is checked. The numeric tower: an int is a float to Python's type checkers.
jaxtyping.install_import_hook(
    ["ldm", "autoencoder"], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)


import pytest
import torch
from support.stages import Stages

from ldm.config import SCHEDULES, ScheduleConfig
from ldm.diffusion.schedule import Schedule

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it

torch.set_num_threads(1)


@pytest.fixture
def seed() -> None:
    """torch's global generator as at every other test that asks for it."""
    torch.manual_seed(0)


@pytest.fixture(params=sorted(SCHEDULES))
def schedule(request: pytest.FixtureRequest) -> Schedule:
    """Each schedule with its defaults."""
    return Schedule.from_config(ScheduleConfig(request.param))


@pytest.fixture(autouse=True)
def _denormals() -> None:
    """Training flushes them to zero for its whole process, which hypothesis refuses to draw numbers under."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    trained = Stages(tmp_path_factory.mktemp("stages"))
    for name in ("autoencoder", "clip", "ldm"):
        assert trained.train(name) == 0
    return trained
