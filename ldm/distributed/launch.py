"""The processes that a launcher (torchrun, accelerate launch, srun) started together with this one."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ldm.distributed.processes import ALONE, Processes

PATIENCE = 1800  # seconds; a training has its own limit in train.rank_timeout


def launched(cpu: bool = False, patience: float = PATIENCE) -> tuple[Processes, torch.device]:
    """All processes of this launch, and this one's device. ``cpu``: although there are GPUs.

    The first call meets the others; ``patience``, in seconds, is how long it and every exchange after it wait for them.
    """
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE, torch.device("cpu" if cpu else "cuda")
    state = PartialState(
        cpu=cpu, timeout=timedelta(seconds=patience)
    )  # as Accelerator makes it, which then takes this one over
    assert state.device is not None
    return Processes(state.process_index, state.num_processes, _gather), state.device


def _gather(value: Any) -> list[Any]:
    """The values of all processes, by rank; torch pickles them between processes of one launch, nothing reaches a file."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
