"""The three stages, trained for a few updates on tiny networks.

Exact resume, gradients, faults, and what is exported.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from support.cut_runs import assert_same_end, at_position, lines, make_loop, power_cut, state_of  # noqa: F401
from support.interrupts import PowerCut, end_writes
from support.stages import Stages
from torch import Tensor

from autoencoder.config import LossConfig
from autoencoder.loss import gan_factor
from autoencoder.model import AutoencoderKL
from ldm import config as configuration
from ldm.cli.main import main
from ldm.config import TrainConfig
from ldm.data import rng as streams
from ldm.data.dataset import batches, collate, scattered
from ldm.data.sources import open_source
from ldm.data.transforms import prepare
from ldm.diffusion.condition import Condition
from ldm.errors import FolderError
from ldm.interop.bundle import TEXT, VAE
from ldm.interop.diffusers.folder import FILES
from ldm.interop.text import read_text
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import LatentCodec, load_codec
from ldm.runs.records import read_metrics, read_status
from ldm.training import logger as recorder
from ldm.training.finite import MAX_NONFINITE
from ldm.training.loop import Loop
from ldm.training.optimizers import Optimizers, learning_rate
from ldm.training.stages.autoencoder import AutoencoderTask
from ldm.training.stages.diffusion import DiffusionTask

ROOT = Path(__file__).resolve().parents[2]


# whole runs


def test_stages_write_their_hashes(stages: Stages, tmp_path: Path) -> None:
    for stage, part, opened in (("autoencoder", VAE, load_codec), ("clip", TEXT, read_text)):
        run = Path(shutil.copytree(stages.folder / stage, tmp_path / stage))
        file = run / "model" / part / FILES[part]
        assert json.loads((run / "model/ldm.json").read_text())["sha256"] == {
            f"{part}/{FILES[part]}": hashlib.sha256(file.read_bytes()).hexdigest()
        }
        opened(run)
        content = bytearray(file.read_bytes())
        content[-4] ^= 1
        file.write_bytes(content)
        with pytest.raises(FolderError, match="has changed"):
            opened(run)


def test_the_exported_folders_open_elsewhere(stages: Stages) -> None:
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

    text, loading = CLIPTextModel.from_pretrained(stages.folder / "clip/model/text_encoder", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and text.config.hidden_size == 16
    assert len(CLIPTokenizer.from_pretrained(stages.folder / "clip/model/tokenizer")) == text.config.vocab_size
    assert CLIPModel.from_pretrained(stages.folder / "clip/model/clip").config.projection_dim == 8
    pipe = Pipeline.from_pretrained(stages.folder / "ldm", "cpu")
    (picture,) = pipe("a red circle", seed=1)
    assert picture.size == (32, 32) and pipe.caption_dropout == 0.3
    for name, steps in (("autoencoder", 6), ("clip", 3), ("ldm", 6)):
        status = read_status(stages.folder / name)
        assert status is not None and status["state"] == "done" and status["step"] == steps
        assert list((stages.folder / name / "samples").glob("*.png"))


@pytest.mark.parametrize(
    ("name", "update", "resumed"),
    [("autoencoder", 1, 0), ("autoencoder", 2, 2), ("autoencoder", 5, 4), ("ldm", 3, 2), ("ldm", 5, 4), ("clip", 2, 2)],
    # the adversary joins at update 2; LoRA: tests/training/test_initial.py; the classifier:
    # tests/models/test_classifier.py
)
def test_a_run_cut_off_within_an_update_ends_as_if_nothing_had_happened(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, update: int, resumed: int
) -> None:
    opened: list[int] = []
    trackers = recorder.open_trackers
    monkeypatch.setattr(
        recorder, "open_trackers", lambda names, folder, step: opened.append(step) or trackers(names, folder, step)
    )
    with monkeypatch.context() as patch:
        at_position(patch, lambda p: p == 4 * update + 2, power_cut)  # the first of two micro-batches is done
        with pytest.raises(PowerCut):
            stages.train(name, f"run={tmp_path}/run")
    assert (read_status(tmp_path / "run") or {})["state"] == "failed" and not (tmp_path / "run/model").exists()
    assert stages.train(name, f"run={tmp_path}/run", f"data.workers={update % 2}") == 0
    assert opened == [0, resumed]
    assert_same_end(tmp_path / "run", stages.folder / name)


@pytest.mark.parametrize("name", ["autoencoder", "ldm"])
def test_a_signal_saves_within_one_update_and_the_same_command_goes_on(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with monkeypatch.context() as patch:
        at_position(patch, lambda p: p == 4 * 2 + 1, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert stages.train(name, f"run={tmp_path}/run") == 75
    assert (
        capsys.readouterr().err == f"ldm train-{name}: stopped and saved at update 3 of 6: the same command continues\n"
    )
    assert (read_status(tmp_path / "run") or {})["state"] == "interrupted" and (
        tmp_path / "run/checkpoints/step-00000003"
    ).is_dir()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert stages.train(name, f"run={tmp_path}/run") == 0
    assert_same_end(tmp_path / "run", stages.folder / name)


def test_the_first_latents_are_white_and_only_a_fresh_run_makes_them_so(
    stages: Stages, tmp_path: Path, make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = stages.settings("autoencoder")
    loop = make_loop(AutoencoderTask(settings), settings)
    network = loop.task.networks["autoencoder"]
    assert isinstance(network, AutoencoderKL)
    source = open_source(settings.data, "train")
    with torch.no_grad():
        latent = (
            network.encode(torch.stack([prepare(source[i].image, 32) for i in range(24)]))
            .mean.transpose(0, 1)
            .flatten(1)
        )
    torch.testing.assert_close(torch.cov(latent), torch.eye(4), rtol=0, atol=1e-3)
    assert all(torch.equal(averaged, network.state_dict()[name]) for name, averaged in loop.ema.state().items())

    at_position(monkeypatch, lambda p: p == 4 * 3, power_cut)
    with pytest.raises(PowerCut):
        stages.train("autoencoder", f"run={tmp_path}/run")
    monkeypatch.undo()
    begun: list[int] = []
    monkeypatch.setattr(AutoencoderTask, "initialize", lambda _: begun.append(1))
    assert stages.train("autoencoder", f"run={tmp_path}/run") == 0 and not begun


def test_a_second_signal_stops_at_once(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[int] = []
    monkeypatch.setattr("ldm.training.stopping.TOGETHER", 0.0)

    def twice(sample: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(1)

    at_position(monkeypatch, lambda p: p == 4 * 3 + 1, twice)
    assert stages.train("autoencoder", f"run={tmp_path}/run") == 130
    end_writes()  # of update 2; a process would end without
    assert not reached and [f.name for f in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]
    assert (read_status(tmp_path / "run") or {})["state"] == "interrupted"


def test_a_process_group_told_to_stop_exits_75_with_its_state_on_the_disk(stages: Stages, tmp_path: Path) -> None:
    """As Ctrl-C and a scheduler do it: the signal reaches the data workers too."""
    command = [
        sys.executable,
        "-m",
        "ldm.cli.main",
        "train-autoencoder",
        str(stages.folder / "autoencoder.yaml"),
        f"run={tmp_path}/run",
    ]
    process = subprocess.Popen(
        [*command, "data.workers=2", "train.steps=100000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and len(read_metrics(tmp_path / "run")) < 3:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert (
        err.count("\n") == 1 and "stopped and saved at update" in err and out.count("stopping after this update") == 1
    )
    step = int(err.split("update ")[1].split()[0])
    assert (tmp_path / f"run/checkpoints/step-{step:08d}/manifest.json").is_file() and read_metrics(tmp_path / "run")[
        -1
    ]["step"] == step


def test_a_finished_run_says_so_and_mends_a_lost_export(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    vae = stages.folder / "autoencoder/model/vae"
    before = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in vae.iterdir()}
    assert stages.train("autoencoder") == 0 and "already trained to update 6 of 6" in capsys.readouterr().out
    assert {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in vae.iterdir()} == before
    (vae / ".config.json.12ab.tmp").write_text("{")
    (vae / "config.json").unlink()  # killed between the last update and the end of the export
    (vae / ".diffusion_pytorch_model.safetensors.7e7dd3b0.tmp").write_bytes(b"half")
    status = stages.folder / "autoencoder/status.json"
    status.write_text(status.read_text().replace("done", "running"))
    assert stages.train("autoencoder") == 0
    assert {f.name: f.read_bytes() for f in vae.iterdir()} == {name: content for name, (content, _) in before.items()}


def test_what_a_killed_cache_writer_left_is_cleared_away(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    half = stages.folder / "ldm/.tmp-latents-99999999"  # no process has so large a number
    half.mkdir()
    (half / "moments-00000.safetensors").write_bytes(b"half")
    status = stages.folder / "ldm/status.json"
    status.write_text(status.read_text().replace("done", "running"))  # a finished run is not opened again
    assert stages.train("ldm") == 0 and not half.exists()
    assert "half-written" in capsys.readouterr().out


def test_another_configuration_is_refused_and_the_run_left_free(
    stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the second time it is not "in use"
        assert stages.train("autoencoder", "train.lr=2e-3") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "train.lr 0.001 → 0.002" in error


@pytest.mark.parametrize("command", ["train-clip", "train-ldm", "verify-resume", "replay"])
def test_fp16_without_a_gpu_is_one_line_before_anything_slow(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    from accelerate.state import AcceleratorState

    def slow(*arguments: Any) -> Any:
        raise AssertionError("the task is made, with a latent cache and more")

    monkeypatch.setattr("ldm.training.start.make_task", slow)
    arguments = [
        command,
        str(stages.folder / ("ldm.yaml" if "clip" not in command else "clip.yaml")),
        f"run={tmp_path}/run",
    ]
    if command == "replay":
        at = tmp_path / "run/incidents/update-00000000"
        at.mkdir(parents=True)
        incident = {
            "update": 0,
            "batch_size": 4,
            "micro_batch": 2,
            "processes": 1,
            "task": {},
            "weights": at.name,
            "positions": [0, 3],
        }
        (at / "incident.json").write_text(json.dumps(incident))
        save_file({"w": torch.zeros(1)}, at / "unet.safetensors")
        settings = stages.settings("ldm", "train.mixed_precision=fp16")
        configuration.save(settings, tmp_path / "run/config.yaml")
        arguments = [command, str(at)]
    AcceleratorState._reset_state()
    try:
        assert main([*arguments, *(["train.mixed_precision=fp16"] if command != "replay" else [])]) == 2
    finally:
        AcceleratorState._reset_state()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "train.mixed_precision fp16 is not supported on cpu: use no or bf16" in error


# conditions


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_captions_are_dropped_where_their_draw_says(stages: Stages, share: float) -> None:
    """The U-Net gets the state of the sample's own caption, or of the null caption for the dropped share."""
    task, seen = DiffusionTask.from_config(stages.settings("ldm", f"caption_dropout={share}"), lambda _: None), []
    task.to(torch.device("cpu"))
    task.trained.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2].context))
    positions, seed = range(40), task.config.train.seed
    batch = collate([task.stream[p] for p in positions])
    task.micro_step(task.networks, batch, 0, lambda loss: None)
    dropped = [streams.uniform(seed, "drop", p) < share for p in positions]
    own = [task.source.text(task.stream.order[p]) for p in positions]
    expected = task.text.encode(["" if drop else text for text, drop in zip(own, dropped, strict=True)])
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)
    assert (
        len(set(own)) > 20
        and sum(dropped) == {0.0: 0, 1.0: 40}.get(share, sum(dropped))
        and (share != 0.3 or 4 <= sum(dropped) <= 20)
    )


# the learning rate


def test_learning_rate_in_closed_form() -> None:
    config = TrainConfig(steps=110, lr=2e-3, warmup=10, lr_schedule="cosine", lr_end=0.1)
    for k in range(10):
        assert learning_rate(config, k) == pytest.approx(2e-3 * (k + 1) / 10, rel=1e-12)
    for k in range(10, 110):
        assert learning_rate(config, k) == pytest.approx(
            2e-4 + 1.8e-3 * math.cos(math.pi * (k - 10) / 200) ** 2, rel=1e-12
        )
    assert learning_rate(config, 10) == 2e-3 and learning_rate(config, 60) == pytest.approx(1.1e-3)
    constant = TrainConfig(steps=10, lr=2e-3, warmup=4)
    assert [learning_rate(constant, k) for k in range(6)] == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3, 2e-3])
    assert learning_rate(TrainConfig(lr=1e-3), 0) == 1e-3


def test_each_update_uses_its_rate(stages: Stages, make_loop: Callable[..., Loop]) -> None:
    settings = stages.settings("autoencoder")
    loop = make_loop(AutoencoderTask(settings), settings)
    feed = batches(loop.task.stream, loop.split, 0, 4, 0)
    for k in range(4):
        loop._update(feed)
        loop.step += 1
        rates = [loop.optimizers.each[name].param_groups[0]["lr"] for name in ("autoencoder", "discriminator")]
        assert rates == pytest.approx([1e-3 * min(1, (k + 1) / 2), 5e-4 * min(1, (k + 1) / 2)])
    assert [line["lr"] for line in lines(stages.folder / "autoencoder")] == pytest.approx([5e-4, *[1e-3] * 5])


# gradients


def gradients(loop: Loop, monkeypatch: pytest.MonkeyPatch, update: int) -> dict[str, list[Tensor]]:
    """What reaches the optimizers in one update, before clipping."""
    found: dict[str, list[Tensor]] = {}

    def record(name: str) -> Tensor:
        found[name] = [
            torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in loop.task.networks[name].parameters()
        ]
        return torch.zeros(())

    monkeypatch.setattr(loop.optimizers, "norm", record)
    monkeypatch.setattr(loop.optimizers, "step", lambda finite: None)
    loop.step = update
    loop._update(batches(loop.task.stream, loop.split, update, update + 1, 0))
    return found


def assert_close_to_the_largest(a: list[Tensor], b: list[Tensor], share: float = 1e-5) -> None:
    largest = max(float(x.abs().max()) for x in b)
    assert largest > 0 and all(float((x - y).abs().max()) <= share * largest for x, y in zip(a, b, strict=True))


def test_an_update_clips_and_logs_means_over_its_micro_batches(stages: Stages, make_loop: Callable[..., Loop]) -> None:
    settings, found = stages.settings("ldm"), []
    for clip in (None, 0.01):
        loop = make_loop(
            DiffusionTask.from_config(settings, lambda _: None), settings, batch_size=6, micro_batch=2, clip=clip
        )
        parts = [
            loop.task.micro_step(
                loop.task.networks, collate([loop.task.stream[p] for p in range(i, i + 2)]), 0, lambda loss: None
            )
            for i in (0, 2, 4)
        ]
        logged = loop._update(batches(loop.task.stream, loop.split, 0, 1, 0))
        assert len({float(part["loss"]) for part in parts}) == 3
        torch.testing.assert_close(logged["loss"], torch.stack([part["loss"] for part in parts]).mean())
        found.append([p.grad for p in loop.task.networks["unet"].parameters() if p.grad is not None])
        found.append(logged["grad_norm_unet"])
    plain, norm, clipped, before = found
    torch.testing.assert_close(before, norm)
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in plain]).norm())
    assert norm > 0.02
    for a, b in zip(clipped, plain, strict=True):
        torch.testing.assert_close(a, b * (0.01 / norm), rtol=1e-3, atol=1e-9)


def test_the_optimizer_is_adamw_as_configured() -> None:
    """Three updates by hand.

    M and v with their own decays, both corrected for their start, and weights that decay beside them.
    """
    config = TrainConfig(lr=0.1, betas=(0.8, 0.95), adam_eps=0.01, weight_decay=0.5)
    layer = torch.nn.Linear(3, 1, bias=False)
    w, m, v = layer.weight.detach().double().clone(), torch.zeros(1, 3).double(), torch.zeros(1, 3).double()
    optimizers = Optimizers({"layer": layer}, config, None)
    for k in range(3):
        g = torch.tensor([[0.3, -0.02 * (k + 1), 0.0]])
        optimizers.begin(k, lambda _: 1.0)
        layer.weight.grad = g.clone()
        optimizers.step(torch.tensor(True))
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g.square()
        w = w * (1 - 0.1 * 0.5) - 0.1 * (m / (1 - 0.8 ** (k + 1))) / ((v / (1 - 0.95 ** (k + 1))).sqrt() + 0.01)
    torch.testing.assert_close(layer.weight.detach().double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["autoencoder", "ldm"])
def test_accumulation_gives_the_gradient_of_the_whole_batch(
    stages: Stages, make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    settings, found, weights = stages.settings(name), [], []
    for micro in (8, 4, 2):
        task = (
            AutoencoderTask(settings) if name == "autoencoder" else DiffusionTask.from_config(settings, lambda _: None)
        )
        if isinstance(task, AutoencoderTask):
            task._adaptive = torch.tensor(0.7)
        found.append(gradients(make_loop(task, settings, batch_size=8, micro_batch=micro), monkeypatch, 4))
        weights.append(task._adaptive if isinstance(task, AutoencoderTask) else torch.ones(()))
    for other, weight in zip(found[1:], weights[1:], strict=True):
        for network, expected in found[0].items():
            assert_close_to_the_largest(other[network], expected)
        torch.testing.assert_close(weight, weights[0], rtol=1e-4, atol=0)
    assert name == "ldm" or float(weights[0]) != 0.7


def test_the_autoencoders_gradient_is_that_of_the_scalar_loss(
    stages: Stages, make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, update = stages.settings("autoencoder", "loss.l1=0.8", "loss.kl=0.05"), 4
    task = AutoencoderTask(settings)
    task._adaptive = torch.tensor(0.7)
    found = gradients(make_loop(task, settings), monkeypatch, update)

    network, discriminator = task.networks["autoencoder"], task.networks["discriminator"]
    assert isinstance(network, AutoencoderKL)
    batch = collate([task.stream[p] for p in range(4 * update, 4 * update + 4)])
    posterior = network.encode(batch["image"])
    decoded = network.decode(posterior.mean + (0.5 * posterior.logvar).exp() * batch["posterior"])
    l1 = (decoded - batch["image"]).abs().mean()
    gaussian = torch.distributions.Normal(posterior.mean, posterior.std)
    kl = torch.distributions.kl_divergence(gaussian, torch.distributions.Normal(0.0, 1.0)).mean()
    gan = -discriminator(decoded).mean()
    factor = 0.5 * 2 / 3  # two updates into a ramp of three
    assert gan_factor(update, settings.loss) == pytest.approx(factor)
    expected = torch.autograd.grad(
        0.8 * l1 + 0.05 * kl + factor * 0.7 * gan, list(network.parameters()), retain_graph=True
    )
    assert_close_to_the_largest(found["autoencoder"], list(expected))

    hinge = 0.5 * (
        (1 - discriminator(batch["image"])).clamp(min=0).mean()
        + (1 + discriminator(decoded.detach())).clamp(min=0).mean()
    )
    assert_close_to_the_largest(
        found["discriminator"], list(torch.autograd.grad(hinge, list(discriminator.parameters())))
    )
    assert not found["discriminator"][
        -1
    ].any()  # its last bias, while every hinge is open: AdamW would make whole steps of rounding

    last = network.decoder.conv_out.weight
    (rec,), (adv,) = (torch.autograd.grad(term, last, retain_graph=True) for term in (0.8 * l1, gan))
    torch.testing.assert_close(task._adaptive, rec.norm() / (adv.norm() + 1e-4), rtol=1e-4, atol=0)


def test_the_adversary_waits_and_then_grows(stages: Stages) -> None:
    ramp = LossConfig(gan=0.5, gan_start=2, gan_ramp=3)
    assert [gan_factor(k, ramp) for k in range(7)] == pytest.approx([0, 0, 0, 0.5 / 3, 1 / 3, 0.5, 0.5])
    logged = lines(stages.folder / "autoencoder")
    assert ["generator" in line for line in logged] == [False, False, True, True, True, True]
    assert logged[1]["grad_norm_discriminator"] == 0 and logged[2]["grad_norm_discriminator"] > 0


# what is not finite


def test_an_update_that_is_not_finite_changes_nothing(
    stages: Stages, make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_position(monkeypatch, lambda p: p == 4 * 4 + 3, lambda sample: sample["image"].fill_(math.nan))
    settings = stages.settings("autoencoder")
    loop = make_loop(AutoencoderTask(settings), settings)
    feed, states = batches(loop.task.stream, loop.split, 0, 6, 0), []
    for _ in range(6):
        loop._update(feed)
        loop.step += 1
        states.append(state_of(loop))
    assert all(
        torch.equal(a, b) for a, b in zip(states[3], states[4], strict=True)
    )  # weights, average, moments and step
    assert all(torch.isfinite(t).all() for t in states[5]) and loop.guard.skipped == 1
    loop.guard.look_back(loop.step)
    assert loop.guard.skipped == 0
    assert all(
        not torch.equal(a, b) for a, b in zip(states[4], states[5], strict=True) if a.ndim == 0
    )  # the steps count on
    assert sum(not torch.equal(a, b) for a, b in zip(states[4], states[5], strict=True)) > 0.9 * len(states[5])


def test_one_such_update_is_survived_and_checkpointed(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_position(monkeypatch, lambda p: p == 4 * 3, lambda sample: sample["image"].fill_(math.nan))
    assert stages.train("autoencoder", f"run={tmp_path}/run") == 0  # a checkpoint follows update 3 at once
    logged = lines(tmp_path / "run")
    assert logged[3]["l1"] is None and logged[3]["grad_norm_autoencoder"] is None and math.isfinite(logged[5]["l1"])
    weight = json.loads((tmp_path / "run/checkpoints/step-00000004/state.json").read_text())["task"]["adaptive_weight"]
    assert weight == pytest.approx(logged[3]["adaptive_weight"]) and weight > 0  # of the update before


def test_many_in_a_row_end_the_training(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_position(monkeypatch, lambda p: p >= 4 * 3, lambda sample: sample["image"].fill_(math.nan))
    assert stages.train("autoencoder", f"run={tmp_path}/run", "train.steps=40") == 5
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and f"the last {MAX_NONFINITE} updates were not finite, so the weights are those after update 3" in error
    )
    status = read_status(tmp_path / "run")
    assert (
        status is not None
        and status["state"] == "failed"
        and lines(tmp_path / "run")[-1]["step"] == 3 + MAX_NONFINITE - 1
    )


# data that changes


def photos(folder: Path, n: int, caption: str = "picture") -> None:
    folder.mkdir(exist_ok=True)
    for i in range(n):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{caption} {i}")


@pytest.mark.parametrize("name", ["autoencoder", "clip", "ldm"])
def test_a_run_goes_on_with_other_images_only_when_told_to(
    stages: Stages, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos(tmp_path / "photos", 30)
    settings = yaml.safe_load((stages.folder / f"{name}.yaml").read_text())
    settings["data"] = {"folder": str(tmp_path / "photos"), "captions": "sidecar", "image_size": 32}
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump({**settings, "run": f"{tmp_path}/run", "train": {**settings["train"], "checkpoint_every": 1}})
    )
    with monkeypatch.context() as cut:
        at_position(cut, lambda p: p == 4 * 2, power_cut)
        with pytest.raises(PowerCut):
            main([f"train-{name}", str(config)])
    photos(tmp_path / "photos", 34, "another")
    capsys.readouterr()
    assert main([f"train-{name}", str(config)]) == (3 if name == "ldm" else 2)
    said = capsys.readouterr().err
    if name == "ldm":
        assert (
            "this latent cache was made with another data (images, captions or other columns have changed): delete"
            " the folder" in said
        )
        shutil.rmtree(tmp_path / "run/latents")
        assert main([f"train-{name}", str(config)]) == 2
        said = capsys.readouterr().err
    assert (
        "have changed since this run began (" in said and "data.accept_changes=true" in said and said.count("\n") == 1
    )
    code = main([f"train-{name}", str(config), "data.accept_changes=true"])
    if name == "clip":  # its vocabulary is another
        assert code == 2 and "and with them the vocabulary that this run learned" in capsys.readouterr().err
    else:
        assert code == 0 and "resuming from update 2" in capsys.readouterr().out
        before = (tmp_path / "run/status.json").read_text()
        assert main([f"train-{name}", str(config), "data.accept_changes=true"]) == 0
        assert "images added since are for another run" in capsys.readouterr().out
        assert (tmp_path / "run/status.json").read_text() == before  # a repeat adds no seconds


# validation and export


def test_validation_is_deterministic_and_shared_out_over_processes(stages: Stages) -> None:
    task = DiffusionTask.from_config(stages.settings("ldm"), lambda _: None)
    parts: list[Tensor] = []

    def gather(tensor: Tensor) -> Tensor:
        parts.append(tensor)
        return tensor

    with torch.no_grad():
        first = task.validate(0, gather, 0, 1)
        torch.manual_seed(1)
        assert repr(task.validate(5, gather, 0, 1)) == repr(first)  # equal, and NaN where a tenth has no sample
        assert first["loss"] > 0 and len(first["loss_by_t"]) == 10
        parts.clear()
        for processes, ranks in ((1, (0,)), (2, (0, 1)), (3, (0, 1, 2))):
            for rank in ranks:
                task.validate(0, gather, rank, processes)
    totals = [parts[0].sum(0), torch.cat(parts[1:3]).sum(0), torch.cat(parts[3:]).sum(0)]
    assert totals[0][0].sum() == 6
    for total in totals[1:]:
        torch.testing.assert_close(total, totals[0], rtol=1e-5, atol=1e-6)

    stage1 = AutoencoderTask(stages.settings("autoencoder"))
    with torch.no_grad():
        figures = stage1.validate(0, lambda t: t, 0, 1)
        assert figures == stage1.validate(9, lambda t: t, 0, 1)


def test_validation_is_the_mean_error_whole_and_by_tenths(stages: Stages) -> None:
    """Image by image: t from its part of 1…T, ‖ε − ε̂‖² without the weighting, means of all and of each tenth.

    The last batch is smaller.
    """
    task, total = (
        DiffusionTask.from_config(
            stages.settings("ldm", "train.validation_size=23", "objective.weighting=min_snr"), lambda _: None
        ),
        23,
    )
    assert isinstance(task.codec, LatentCodec)
    schedule, errors, steps = task.schedule, [], []
    parts = scattered(list(range(total)), total)
    with torch.no_grad():
        found = task.validate(0, lambda t: t, 0, 1)
        for p in range(total):
            sample, t = collate([task.validation[p]]), (parts[p] * 1000).long()[None]
            x0 = task.codec.autoencoder.encode(sample["image"]).sample(sample["posterior"])
            x_t = schedule.alpha(t).float() * x0 + schedule.sigma(t).float() * sample["eps"]
            said = task.trained.unet(x_t, t, Condition(context=task.text.encode(sample["text"])))
            errors.append(float((said - sample["eps"]).square().mean()))
            steps.append(int(t))
    tenths = [[e for e, t in zip(errors, steps, strict=True) if 100 * k <= t < 100 * (k + 1)] for k in range(10)]
    assert found["loss_by_t"] == pytest.approx([sum(tenth) / len(tenth) for tenth in tenths], rel=1e-4)
    assert found["loss"] == pytest.approx(sum(errors) / total, rel=1e-4)
    assert found["loss_error"] == pytest.approx(
        torch.tensor(errors).std(correction=0).item() / math.sqrt(total), rel=1e-3
    )
    assert max(errors) > 1.2 * min(errors) and len(set(found["loss_by_t"])) == 10


def test_figures_of_the_autoencoder_are_those_of_its_pictures(stages: Stages) -> None:
    """Image by image, by hand; decoded louder than pixels can be, so that it matters where they are clipped."""
    task = AutoencoderTask(stages.settings("autoencoder", "train.validation_size=6"))
    network = task.autoencoder
    with torch.no_grad():
        network.decoder.conv_out.weight *= 40
        network.quant_conv.weight[:4] *= 3
        found = task.validate(0, lambda t: t, 0, 1)
        samples = [task.validation[p] for p in range(6)]
        posteriors = [network.encode(sample["image"][None]) for sample in samples]
        means, variances = torch.cat([q.mean for q in posteriors]), torch.cat([q.logvar.exp() for q in posteriors])
        mean = means.mean((0, 2, 3), keepdim=True)
        std = ((means - mean).square() + variances).mean((0, 2, 3), keepdim=True).sqrt()
        sums: dict[str, list[float]] = {}
        for sample, q in zip(samples, posteriors, strict=True):
            decoded = network.decode(q.mean)
            sums.setdefault("l1", []).append(float((decoded - sample["image"]).abs().mean()))
            sums.setdefault("kl", []).append(float((q.mean.square() + q.logvar.exp() - 1 - q.logvar).mean() / 2))
            noisy = {
                f"psnr_noise_{level:g}": network.decode(q.mean + level * std * sample["noise"])
                for level in (0.1, 0.3, 1.0)
            }
            for name, picture in {"psnr": decoded, **noisy}.items():
                error = (picture.clamp(-1, 1) - sample["image"]).square().mean()
                sums.setdefault(name, []).append(10 * math.log10(4 / float(error)))
    assert float(decoded.abs().max()) > 1.5 and float((std - 1).abs().min()) > 0.05
    for name, values in sums.items():
        assert found[name] == pytest.approx(sum(values) / 6, rel=1e-4), name
    assert found["psnr_error"] == pytest.approx(np.std(sums["psnr"]) / math.sqrt(6), rel=1e-4)


def test_more_processes_than_validation_images(stages: Stages) -> None:
    """Those without a share exchange the same figures in the same order, or all would wait for ever."""
    for name in ("autoencoder", "ldm"):
        exchanged: dict[int, list[tuple[int, ...]]] = {0: [], 7: []}
        for rank, shapes in exchanged.items():
            settings = stages.settings(name)
            task = (
                AutoencoderTask(settings)
                if name == "autoencoder"
                else DiffusionTask.from_config(settings, lambda _: None)
            )

            def gather(tensor: Tensor, shapes: list[tuple[int, ...]] = shapes) -> Tensor:
                shapes.append(tuple(tensor.shape))
                return tensor + 1  # as if the others had something

            with torch.no_grad():
                task.validate(0, gather, rank, 8)  # six images
        assert exchanged[0] == exchanged[7] and len(exchanged[0]) > 0


def test_active_channels_are_those_whose_mean_varies_over_the_images(stages: Stages) -> None:
    task = AutoencoderTask(stages.settings("autoencoder", "train.validation_size=24"))
    task.initialize()
    scale = torch.tensor([1.0, 0.5, 0.3, 0.02])
    network, convolution = task.autoencoder, task.autoencoder.quant_conv
    assert convolution.bias is not None
    with torch.no_grad():
        convolution.weight[:4] *= scale.view(4, 1, 1, 1)
        convolution.bias[:4] = torch.tensor([0.0, 0.0, 0.0, 7.0])  # the same for all images: carries nothing
        assert task.validate(0, lambda t: t, 0, 1)["active_channels"] == 3
        images = [prepare(task.validation.source[i].image, 32) for i in range(24)]
        variance = network.encode(torch.stack(images)).mean.var(0).mean((1, 2))
    assert [bool(v > 0.01) for v in variance] == [True, True, True, False]


def test_the_averaged_weights_are_validated_and_drawn_from(stages: Stages) -> None:
    """Metrics and samples of the last update, from the average and from the weights as trained, which differ."""
    task, run = DiffusionTask.from_config(stages.settings("ldm"), lambda _: None), stages.folder / "ldm"
    found = []
    for name in ("ema", "model_unet"):
        task.trained.unet.load_state_dict(load_file(run / f"checkpoints/step-00000006/{name}.safetensors"))
        with torch.no_grad():
            found.append((task.validate(6, lambda t: t, 0, 1)["loss"], task.previews()["samples"].tolist()))
    (picture,) = (run / "samples").glob("*6*.png")
    assert found[0] == (
        pytest.approx(lines(run)[-1]["validation/loss"], rel=1e-6),
        np.asarray(Image.open(picture)).tolist(),
    )
    assert found[1][0] != pytest.approx(found[0][0], rel=1e-6) and found[1][1] != found[0][1]


def test_the_averaged_weights_are_what_is_exported(stages: Stages) -> None:
    last = stages.folder / "ldm/checkpoints/step-00000006"
    exported = load_file(stages.folder / "ldm/model/unet/diffusion_pytorch_model.safetensors")
    averaged, trained = load_file(last / "ema.safetensors"), load_file(last / "model_unet.safetensors")
    assert exported.keys() == averaged.keys() and all(torch.equal(exported[k], averaged[k]) for k in exported)
    assert any(not torch.equal(exported[k], trained[k]) for k in exported)

    settings, network = stages.settings("autoencoder"), load_codec(stages.folder / "autoencoder").autoencoder
    plain = AutoencoderKL(settings.model)
    plain.load_state_dict(load_file(stages.folder / "autoencoder/checkpoints/step-00000006/ema.safetensors"))
    image = open_source(settings.data, "validation")[0].image
    with torch.no_grad():
        x = prepare(image, 32)[None]
        torch.testing.assert_close(
            network(x)[0], plain(x)[0], rtol=1e-4, atol=1e-5
        )  # decode(encode(x)) is as before the folding
        assert not torch.allclose(network.encode(x).mean, plain.encode(x).mean, atol=1e-3)


def test_exported_latents_have_zero_mean_and_unit_variance(stages: Stages) -> None:
    settings, codec = stages.settings("autoencoder"), load_codec(stages.folder / "autoencoder")
    assert (codec.scale, codec.shift) == (1.0, 0.0)
    source = open_source(settings.data, "train")
    images = torch.stack([prepare(source[i].image, 32) for i in range(24)])
    with torch.no_grad():
        posterior = codec.autoencoder.encode(images)
    draws = posterior.sample(
        torch.randn(50, *posterior.mean.shape, generator=torch.Generator().manual_seed(0)).mean(0) * math.sqrt(50)
    ).double()
    mean, deviation = posterior.mean.double(), posterior.std.double()
    dims = (0, 2, 3)
    torch.testing.assert_close(mean.mean(dims), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-4)
    variance = mean.var(dims, correction=0) + deviation.square().mean(dims)
    torch.testing.assert_close(variance, torch.ones(4, dtype=torch.float64), rtol=1e-4, atol=0)
    torch.testing.assert_close(draws.var(dims), torch.ones(4, dtype=torch.float64), rtol=0.15, atol=0)
