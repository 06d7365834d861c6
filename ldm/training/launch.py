"""Which processes a launcher (torchrun, accelerate launch, srun) started together with this one."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from ldm.data.processes import ALONE, Processes


def launched(cpu: bool = False) -> tuple[Processes, torch.device]:
    """All processes of this launch, and this one's device. ``cpu``: although there are GPUs.

    The first call meets the others and waits for them.
    """
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE, torch.device("cpu" if cpu else "cuda")
    state = PartialState(cpu=cpu)  # as Accelerator makes it, which then takes this one over
    assert state.device is not None
    return Processes(state.process_index, state.num_processes, _gather), state.device


def _gather(value: Any) -> list[Any]:
    """The values of all processes, by rank; torch pickles them between processes of one launch, nothing reaches a file."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
