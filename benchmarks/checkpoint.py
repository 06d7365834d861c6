"""Wait of training for a checkpoint, beside accelerate's save_state; and the whole write, beside a plain file.

    python benchmarks/checkpoint.py [FOLDER]

The state is a U-Net with its AdamW moments and its EMA, the same for both. Measured are the wait of an
update (the copy, once the last write is done), and the whole write until the checkpoint is valid on disk:
copy, fsync and hashes included. "thinning" follows in the background: the previous checkpoint is verified
and the oldest deleted. The plain write is the same bytes in one file, with fsync. Rounds are interleaved;
medians and ratios are printed.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from ldm.config import ScheduleConfig, UNetConfig
from ldm.models.unet import UNet
from ldm.runs.checkpoints.files import Tensors, optimizer_tensors, tensor_bytes
from ldm.runs.checkpoints.writer import BackgroundWriter, Written
from ldm.training.ema import EMA

ROUNDS = 5
CHANNELS, HEADS = (64, 128, 256), (2, 4, 8)


def trained() -> tuple[nn.Module, torch.optim.AdamW, EMA]:
    """A network, its optimizer with moments, and its EMA."""
    network = UNet(UNetConfig(channels=CHANNELS, heads=HEADS, attention_levels=(1, 2)), 4, 4, 256)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    for p in network.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return network, optimizer, EMA(network, 0.999)


def live(network: nn.Module, optimizer: torch.optim.AdamW, ema: EMA) -> Tensors:
    """The groups of tensors of a checkpoint."""
    return {
        "model_unet": network.state_dict(),
        "optimizer_unet": optimizer_tensors(optimizer, network),
        "ema": ema.state(),
    }


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def plain(file: Path, content: bytes) -> None:
    """Write one file to disk, with fsync."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def accelerator_of(network: nn.Module, optimizer: torch.optim.AdamW, ema: EMA) -> Accelerator:
    """An accelerator that saves the same state, with the EMA as a second model."""
    averaged = UNet(UNetConfig(channels=CHANNELS, heads=HEADS, attention_levels=(1, 2)), 4, 4, 256)
    averaged.load_state_dict(ema.state(), strict=False)
    accelerator = Accelerator(cpu=True)
    for part in (network, averaged):
        accelerator.prepare_model(part)
    accelerator.prepare_optimizer(optimizer)
    return accelerator


def main() -> None:
    """Measure all in interleaved rounds and print medians and ratios."""
    torch.manual_seed(0)
    network, optimizer, ema = trained()
    tensors = live(network, optimizer, ema)
    size = tensor_bytes(tensors)
    accelerator = accelerator_of(network, optimizer, ema)
    content = os.urandom(size)
    waits: dict[str, list[float]] = {"wait": [], "save_state": [], "write": [], "plain": [], "thinning": []}
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder = Path(name)
        writer = BackgroundWriter(folder / "ours")
        for step in range(ROUNDS + 1):  # the first is a warm-up
            seconds = {"wait": timed(lambda step=step: writer.submit(step, tensors, {"step": step}, ScheduleConfig()))}
            written = writer.wait()
            assert isinstance(written, Written)
            seconds["write"], seconds["thinning"] = written.copied + written.written, written.thinned
            shutil.rmtree(folder / "accelerate", ignore_errors=True)
            seconds["save_state"] = timed(lambda: accelerator.save_state(str(folder / "accelerate")))
            seconds["plain"] = timed(lambda: plain(folder / "plain", content))
            (folder / "plain").unlink()
            if step:
                for key, value in seconds.items():
                    waits[key].append(value)
        saved = sum(f.stat().st_size for f in (folder / "accelerate").rglob("*") if f.is_file())
    median = {key: statistics.median(values) for key, values in waits.items()}
    sizes = f"{size / 1e6:.0f} MB (save_state: {saved / 1e6:.0f} MB)"
    print(f"state of {sizes}, medians of {ROUNDS}; single rounds in brackets")
    for key, values in waits.items():
        print(f"  {key:10s} {median[key]:7.3f} s   [{' '.join(f'{v:.3f}' for v in values)}]")
    wait, write = median["wait"] / median["save_state"], median["write"] / median["plain"]
    print(f"an update waits {wait:.3f} times as long as for save_state (which does not fsync)")
    print(f"the whole write takes {write:.2f} times a plain write of the same bytes with fsync")


if __name__ == "__main__":
    main()
