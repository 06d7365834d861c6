"""Joining the process group of a launcher (torchrun, accelerate launch, srun)."""

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
    """Join the process group of this launch; returns it and this process's device.

    ``cpu``: use the CPU even where there are GPUs. ``patience``: timeout in seconds of the first
    call, which waits for the other processes, and of every exchange after it.
    """
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE, torch.device("cpu" if cpu else "cuda")
    # The same call as inside Accelerator, which then reuses this state.
    state = PartialState(cpu=cpu, timeout=timedelta(seconds=patience))
    assert state.device is not None
    return Processes(state.process_index, state.num_processes, _gather), state.device


def _gather(value: Any) -> list[Any]:
    """Values of all processes, by rank.

    torch pickles them between the processes of one launch; no pickle reaches a file.
    """
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
