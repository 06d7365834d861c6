"""What tests/test_ranks.py starts, alone or under torchrun: training from a checkpoint, with gradients and draws written down.

ranks.py train OUT COMMAND CONFIG FROM MICRO_BATCH…   for each micro-batch, go on from a copy of the run FROM
ranks.py sabotage OUT COMMAND CONFIG                  wrong set-ups, each of which must be refused
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import nn

from ldm import config as configuration
from ldm.cli import train_autoencoder, train_clip, train_ldm
from ldm.cli.console import Console
from ldm.config import AutoencoderRun, ClipRun, DiffusionRun
from ldm.training.launch import launched
from ldm.training.loop import Loop

COMMANDS = {"autoencoder": (train_autoencoder, AutoencoderRun), "clip": (train_clip, ClipRun), "ldm": (train_ldm, DiffusionRun)}


def made(command: str, config: str, run: Path, *overrides: str) -> Loop:
    """The loop of a training command, before its first update."""
    module, cls = COMMANDS[command]
    settings = configuration.load(cls, config, [f"run={run}", *overrides])
    return Loop(module._task(settings, Console()), settings.train, settings, settings.run, 0, Console())


def watch(loop: Loop) -> tuple[dict[str, torch.Tensor], dict[int, str]]:
    """The gradients of the loop's first update, by network and parameter, and a digest of each position's sample: filled as it trains."""
    gradients: dict[str, torch.Tensor] = {}
    draws: dict[int, str] = {}
    first, step, micro_step = loop.step, loop._step, loop.task.micro_step
    names = {id(p): f"{n}.{key}" for n, network in loop.task.networks.items() for key, p in network.named_parameters()}

    def record(batch: Any, update: int, backward: Any) -> Any:
        for i, position in enumerate(batch["position"].tolist()):
            row = [v[i].numpy().tobytes().hex() if isinstance(v, torch.Tensor) else v[i] for _, v in sorted(batch.items())]
            draws[position] = hashlib.sha256(json.dumps(row).encode()).hexdigest()
        return micro_step(batch, update, backward)

    def keep(optimizer: Any, parameters: list[nn.Parameter]) -> Any:
        if loop.step == first:
            gradients.update({names[id(p)]: p.grad.clone() for p in parameters if p.grad is not None})
        return step(optimizer, parameters)

    loop._step, loop.task.micro_step = keep, record  # type: ignore[method-assign]
    return gradients, draws


def train(out: Path, command: str, config: str, base: str, micro_batches: list[str]) -> None:
    """Train each variant to its end; OUT/N.safetensors has the gradients of its first update, OUT/N.json the draws of all."""
    for number, micro_batch in enumerate(micro_batches):
        run = out / f"run{number}"
        launched()[0].each(lambda run=run: None if run.exists() or int(os.environ.get("RANK", 0)) else shutil.copytree(base, run))
        loop = made(command, config, run, f"train.micro_batch={micro_batch}")
        gradients, draws = watch(loop)
        loop.train()
        everyone = gather_object([draws])
        if loop.accelerator.is_main_process:
            save_file(gradients, out / f"{number}.safetensors")
            assert sum(map(len, everyone)) == len({p for part in everyone for p in part})  # no position is read twice
            (out / f"{number}.json").write_text(json.dumps({str(p): d for part in everyone for p, d in part.items()}))


def sabotage(out: Path, command: str, config: str) -> None:
    """Break one thing after the other; print what is said about it."""
    from accelerate import Accelerator

    from ldm.data import streams
    from ldm.data.stream import Split

    rank = int(os.environ["RANK"])
    whole = {"prepare_model": Accelerator.prepare_model, "positions": Split.positions, "normal": streams.normal}

    def unwrapped(self: Any, network: nn.Module) -> nn.Module:
        return network

    def all_as_first(self: Split, update: int) -> Any:
        return whole["positions"](Split(self.batch_size, self.micro_batch, self.processes, 0), update)

    def same_noise(seed: int, stream: str, position: int, shape: Any) -> Any:
        return whole["normal"](seed, stream, position - position % 4, shape)

    def own_weights(self: Any, network: nn.Module) -> nn.Module:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.01 * rank
        return network

    plans = {
        "gradients": (Accelerator, "prepare_model", unwrapped),
        "weights": (Accelerator, "prepare_model", own_weights),
        "positions": (Split, "positions", all_as_first),
        "noise": (streams, "normal", same_noise),
    }
    for name, (where, attribute, broken) in plans.items():
        intact = getattr(where, attribute)
        setattr(where, attribute, broken)
        try:
            made(command, config, out / name).train()
            said = "nothing"
        except configuration.ConfigError as error:
            said = str(error)
        setattr(where, attribute, intact)
        everyone = gather_object([said])
        if rank == 0:
            print(json.dumps({name: everyone}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, out, *rest = sys.argv[1:]
    if what == "train":
        train(Path(out), rest[0], rest[1], rest[2], rest[3:])
    else:
        sabotage(Path(out), *rest)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
