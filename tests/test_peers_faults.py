"""Silent faults of published training scripts (docs/faults.md): each test fails if this code has the fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support.cut_runs import Silent
from support.stages import AUTOENCODER, DIFFUSION, TRAIN
from torch import Tensor, nn

from autoencoder.posterior import DiagonalGaussian
from ldm.cli.main import main
from ldm.config import AutoencoderTrainingConfig, DiffusionTrainingConfig, ScheduleConfig, build
from ldm.data.dataset import batches, collate
from ldm.pipeline import Pipeline
from ldm.runs.checkpoints import files as checkpoint
from ldm.runs.checkpoints import folder as shelf
from ldm.training.loop import Loop
from ldm.training.stages.autoencoder import AutoencoderTask
from ldm.training.stages.diffusion import DiffusionTask


def autoencoder(run: Path, **loss: Any) -> AutoencoderTask:
    return AutoencoderTask(
        build(AutoencoderTrainingConfig, {"run": str(run), **AUTOENCODER, "loss": {**AUTOENCODER["loss"], **loss}})
    )


def test_the_perceptual_term_alone_trains_the_whole_autoencoder(tmp_path: Path) -> None:
    """LPIPS evaluated without gradient."""
    task = autoencoder(tmp_path, l1=0.0, kl=0.0, gan=0.0, lpips=1.0, lpips_net="alex", lpips_weights="random")
    metrics = task.micro_step(
        task.networks, collate([task.stream[p] for p in range(2)]), 0, lambda loss: loss.backward()
    )
    assert float(metrics["lpips"]) > 0
    assert [
        name for name, p in task.autoencoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 0
    ] == []


class Wrapper(nn.Module):
    """What DistributedDataParallel is here: the call that all gradients must come through."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, *inputs: Any, **named: Any) -> Any:
        self.calls += 1
        return self.network(*inputs, **named)


def pixels(run: Path) -> DiffusionTask:
    tree = {**DIFFUSION, "autoencoder": "none", "text": "none", "caption_dropout": 0.0}
    return DiffusionTask.from_config(build(DiffusionTrainingConfig, {"run": str(run), **tree}), lambda text: None)


@pytest.mark.parametrize("make", [lambda run: autoencoder(run, l1=1.0), pixels])
def test_every_gradient_comes_through_the_wrapped_network(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    """The bare network called where DistributedDataParallel should be: its gradients are never exchanged."""
    task = make(tmp_path)
    wrapped = {name: Wrapper(network) for name, network in task.networks.items()}
    direct = dict.fromkeys(task.networks, 0)
    for name, network in task.networks.items():

        def count(module: nn.Module, inputs: Any, name: str = name) -> None:
            direct[name] += 1

        network.register_forward_pre_hook(count)
    task.micro_step(wrapped, collate([task.stream[p] for p in range(2)]), 4, lambda loss: loss.backward())
    through = {name: wrapper.calls for name, wrapper in wrapped.items()}
    assert through == {
        name: 2 if name == "discriminator" else 1 for name in task.networks
    }  # of images and of reconstructions
    assert direct == {
        name: 3 if name == "discriminator" else 1 for name in task.networks
    }  # once more, frozen, for the generator


def weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in network.state_dict().items()}


def test_validation_and_pictures_see_the_average_and_training_gets_its_weights_back(tmp_path: Path) -> None:
    """EMA not restored after validation, or not used where images are drawn."""
    task = pixels(tmp_path)
    seen: list[dict[str, Tensor]] = []
    validate, pictures = task.validate, task.previews
    task.validate = lambda *a: seen.append(weights(task.trained.unet)) or validate(*a)  # type: ignore[method-assign]
    task.previews = lambda: seen.append(weights(task.trained.unet)) or pictures()  # type: ignore[method-assign]
    task.export = lambda run: seen.append(weights(task.trained.unet))  # type: ignore[method-assign]
    loop = Loop(task, task.config.train, task.config, str(tmp_path), 0, Silent())
    loop.prepare()
    feed = batches(task.stream, loop.split, 0, 3, 0)
    for _ in range(3):
        loop._update(feed)
        loop.step += 1
    trained, averaged = weights(task.trained.unet), {name: t.clone() for name, t in loop.ema.state().items()}
    assert any(not torch.equal(trained[name], averaged[name]) for name in averaged)

    for look in (loop._validated, lambda: loop.logger.pictures(3, loop._drawn), loop._finish):
        look()
        assert len(seen) == 1 and all(torch.equal(seen[0][name], averaged[name]) for name in averaged)
        assert all(torch.equal(t, trained[name]) for name, t in weights(task.trained.unet).items())
        assert task.trained.unet.training
        seen.clear()
    loop.close()


def test_the_adversarial_weight_is_that_of_the_global_batch(tmp_path: Path) -> None:
    """Weights from each process's own gradients would differ, and so would training with another number of them."""
    whole, first, second = (autoencoder(tmp_path) for _ in range(3))
    samples = [whole.stream[p] for p in range(4)]
    for task, part in ((whole, samples), (first, samples[:2]), (second, samples[2:])):
        task.micro_step(task.networks, collate(part), 4, lambda loss: None)
    theirs: list[Tensor] = []
    second.after_update(4, lambda mine: theirs.append(mine) or mine, torch.tensor(True))
    alone = float(second._adaptive)
    first.after_update(4, lambda mine: (mine + theirs.pop(0)) / 2, torch.tensor(True))
    whole.after_update(4, lambda mine: mine, torch.tensor(True))
    assert float(first._adaptive) == pytest.approx(float(whole._adaptive), rel=1e-5)
    assert abs(alone / float(whole._adaptive) - 1) > 1e-3  # the halves do differ


def test_the_newest_checkpoint_is_neither_the_largest_nor_one_that_is_only_called_so(tmp_path: Path) -> None:
    """The latest checkpoint chosen by size, or by the name of a folder that was never finished."""
    config = ScheduleConfig()
    for step, size in ((9, 1000), (10, 10), (100, 1)):
        checkpoint.save(tmp_path, step, {"model": {"a": torch.zeros(size)}}, {}, config, keep=9)
    assert shelf.newest_valid(tmp_path)[0] == tmp_path / "step-00000100"
    (tmp_path / "step-00000100").rename(tmp_path / "step-00000100.bak")
    (tmp_path / "step-latest").mkdir()
    (tmp_path / ".tmp-step-00000200-1").mkdir()
    (tmp_path / "step-00000300").mkdir()  # of another program's save, cut in half
    (tmp_path / "step-00000300/model.safetensors").write_bytes(b"\0" * 100_000)
    newest, problems = shelf.newest_valid(tmp_path)
    assert newest == tmp_path / "step-00000010" and len(problems) == 1 and "step-00000300" in problems[0]


def test_grey_images_are_one_channel_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three channels built in somewhere between the images, both losses, the latents and the picture."""
    monkeypatch.setattr("ldm.training.stages.autoencoder.STATISTICS_SIZE", 16)
    monkeypatch.setattr("ldm.training.stages.autoencoder.FIRST_IMAGES", 16)
    data = {"source": "digits", "image_size": 32, "image_channels": 1}
    train = {**TRAIN, "steps": 1, "batch_size": 2, "validation_size": 2, "warmup": 0}
    stage1 = {**AUTOENCODER, "data": data, "model": {**AUTOENCODER["model"], "image_channels": 1}, "train": train}
    stage1["loss"] = {
        **AUTOENCODER["loss"],
        "gan_start": 0,
        "lpips": 1.0,
        "lpips_net": "alex",
        "lpips_weights": "random",
    }
    folder = str(tmp_path / "autoencoder")
    stage2 = {
        **DIFFUSION,
        "data": data,
        "autoencoder": folder,
        "text": "none",
        "caption_dropout": 0.0,
        "train": train,
        "cache_latents": False,
    }
    for command, tree in (("autoencoder", stage1), ("ldm", stage2)):
        file = tmp_path / f"{command}.yaml"
        file.write_text(yaml.safe_dump({"run": str(tmp_path / command), **tree}))
        assert main([f"train-{command}", str(file)]) == 0
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "autoencoder/model/vae")
    assert theirs.config.in_channels == theirs.config.out_channels == 1  # type: ignore[attr-defined]
    pipe = Pipeline.from_pretrained(tmp_path / "ldm", "cpu")
    assert pipe.codec is not None
    posterior = pipe.codec.autoencoder.encode(torch.zeros(1, 1, 32, 32))
    assert isinstance(posterior, DiagonalGaussian) and posterior.mean.shape[1] == 4
    (picture,) = pipe("", steps=1)
    assert picture.size == (32, 32)
    channels = np.asarray(picture if picture.mode == "L" else picture.convert("RGB")).reshape(32, 32, -1)
    assert (channels == channels[..., :1]).all() and np.ptp(channels) > 0  # no colour
    assert Image.open(next((tmp_path / "autoencoder/samples").iterdir())).mode in ("L", "RGB")
