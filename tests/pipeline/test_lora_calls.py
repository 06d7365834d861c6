"""LoRAs of a call hold for that call alone: with other threads, between a generator's batches, in compiled networks."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.loras import PROMPTS, both, changed, close, inputs, out, pictures, text, write_model
from torch import Tensor, nn

from ldm.config import ConfigError, SampleConfig
from ldm.diffusion.condition import Condition
from ldm.interop import lora as files
from ldm.interop.bundle import TEXT, UNET
from ldm.interop.lora import FILE, write_lora
from ldm.models.lora import changeable, shared_copy
from ldm.pipeline import Pipeline


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two LoRAs of it: `one` of U-Net and text encoder, `two` of the U-Net."""
    folder = tmp_path_factory.mktemp("calls")
    pipe = Pipeline.from_pretrained(write_model(folder / "model"), "cpu")
    write_lora(both(pipe), folder / "one" / FILE)
    write_lora({UNET: changed(pipe.unet, ("to_v", "conv2"), rank=2, seed=5)}, folder / "two" / FILE)
    return folder


@pytest.fixture
def pipe(here: Path) -> Pipeline:
    return Pipeline.from_pretrained(here / "model", "cpu")


def calls(here: Path) -> list[tuple[str, ...]]:
    one, two = here / "one", here / "two"
    return [(), (f"{one}:0.8",), (f"{two}:0.5", f"{one}:-0.3"), (f"{one}:0.8", f"{two}")]


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """What each gives, all started together in threads of their own."""
    barrier = threading.Barrier(len(works))

    def begin(work: Callable[[], Any]) -> Any:
        barrier.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(begin, work) for work in works]]


def test_threads_with_and_without_loras_draw_what_sequential_calls_draw(here: Path, pipe: Pipeline) -> None:
    """Bit for bit, while the LoRAs are read for the first time and after that."""
    expected = [pictures(Pipeline.from_pretrained(here / "model", "cpu"), lora=loras) for loras in calls(here)]
    assert all(np.abs(a - b).max() > 5 for i, a in enumerate(expected) for b in expected[:i])
    for _ in range(2):
        found = at_once(*(lambda loras=loras: pictures(pipe, lora=loras) for loras in calls(here)))
        assert all((a == b).all() for a, b in zip(found, expected, strict=True))


def test_a_lora_that_two_threads_name_is_read_once(here: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, original = [], files.open_archive
    monkeypatch.setattr(files, "open_archive", lambda file: opened.append(file) or original(file))
    first, second = at_once(*[lambda: pictures(pipe, lora=(str(here / "one"),))] * 2)
    assert (first == second).all() and len(opened) == 1


def test_a_file_that_was_written_anew_is_read_anew(here: Path, pipe: Pipeline, tmp_path: Path) -> None:
    settings = {"lora": (str(tmp_path),)}
    write_lora({UNET: changed(pipe.unet, ("to_q",))}, tmp_path / FILE)
    first = pictures(pipe, **settings)
    write_lora({UNET: changed(pipe.unet, ("to_q",), seed=9)}, tmp_path / FILE)
    second = pictures(pipe, **settings)
    assert np.abs(second - first).max() > 5
    assert (second == pictures(Pipeline.from_pretrained(here / "model", "cpu"), **settings)).all()


def test_a_generator_keeps_its_loras_and_gives_them_to_no_other_call(here: Path, pipe: Pipeline) -> None:
    """Two are drawn from in turn, one of them in another thread, with calls in between."""
    plain = pictures(pipe)
    settings = [SampleConfig(steps=5, guidance_scale=3.0, seed=3, lora=loras) for loras in calls(here)[1:3]]
    expected = [torch.cat(list(pipe.sample(PROMPTS, each, batch_size=1))) for each in settings]
    one, two = (pipe.sample(PROMPTS, each, batch_size=1) for each in settings)
    with ThreadPoolExecutor(1) as pool:
        first, second = [], []
        for _ in PROMPTS:
            first.append(next(one))
            assert (pictures(pipe) == plain).all()
            second.append(pool.submit(next, two).result())
    assert torch.equal(torch.cat(first), expected[0]) and torch.equal(torch.cat(second), expected[1])


def test_what_a_callback_draws_is_a_call_of_its_own(here: Path, pipe: Pipeline) -> None:
    plain, drawn = pictures(pipe), []
    settings = SampleConfig(steps=2, guidance_scale=3.0, lora=(str(here / "one"),))
    for _ in pipe.sample(PROMPTS, settings, callback=lambda step, x, x0: drawn.append(pictures(pipe))):
        pass
    assert len(drawn) == 2 and all((each == plain).all() for each in drawn)


def test_a_call_leaves_the_networks_as_they_were(here: Path, pipe: Pipeline) -> None:
    def hooks() -> list[dict[int, Any]]:
        return [dict(module._forward_hooks) for network in networks for module in network.modules()]

    networks = (pipe.unet, text(pipe).model)
    before = hooks()
    pictures(pipe, lora=(str(here / "one"),))
    assert hooks() == before
    copied = shared_copy(pipe.unet)
    assert not set(map(id, copied.modules())) & set(map(id, pipe.unet.modules()))
    pairs = zip(copied.state_dict(keep_vars=True).values(), pipe.unet.state_dict(keep_vars=True).values(), strict=True)
    assert all(a is b for a, b in pairs)


def test_a_denoiser_has_the_loras_of_its_settings(here: Path, pipe: Pipeline) -> None:
    """Such as that of the likelihood, which samples nothing."""
    loras = calls(here)[2]
    x, t = inputs(2)[0], torch.tensor(500)
    found = pipe.denoiser(PROMPTS[:2], SampleConfig(lora=loras))(x, t).x0
    for path, scale in SampleConfig(lora=loras).loras():
        pipe.load_lora(path, scale)
    assert torch.equal(pipe.denoiser(PROMPTS[:2], SampleConfig())(x, t).x0, found)


@pytest.mark.parametrize("how", ["wrapped", "in place", "one layer"])
def test_a_compiled_network_computes_with_loras(how: str) -> None:
    """Compiled code does not look at hooks that come or go after its first call."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)).requires_grad_(False)
    network: Any = copy.deepcopy(plain)
    if how == "wrapped":
        network = torch.compile(network, backend="eager")
    elif how == "in place":
        network.compile(backend="eager")
    else:
        network[0] = torch.compile(network[0], backend="eager")
    x, lora = torch.randn(2, 8), changed(network, ("0", "2"))
    assert torch.equal(network(x), plain(x))  # compiled here
    expected = plain[2](nn.SiLU()(plain[0](x) + 0.5 * lora.changes["0"](x)))
    expected = expected + 0.5 * lora.changes["2"](nn.SiLU()(plain[0](x) + 0.5 * lora.changes["0"](x)))
    copied = shared_copy(network)
    lora.attach(0.5, copied)
    close(copied(x), expected)
    assert torch.equal(network(x), plain(x))
    detach = lora.attach(0.5)
    close(network(x), expected)
    detach()
    assert torch.equal(network(x), plain(x))
    torch.compiler.reset()


def test_loras_are_read_for_a_model_that_is_compiled(here: Path, pipe: Pipeline) -> None:
    loras = calls(here)[1]
    expected = pictures(pipe, lora=loras)
    pipe.unet.down_blocks[0] = torch.compile(pipe.unet.down_blocks[0], backend="eager")  # type: ignore[assignment]
    pipe.unet = torch.compile(pipe.unet, backend="eager")  # type: ignore[assignment]
    assert (pictures(pipe, lora=loras) == expected).all()
    torch.compiler.reset()


def test_gradients_under_loras_are_the_same_with_gradient_checkpointing(here: Path, pipe: Pipeline) -> None:
    """What is computed again in the backward pass has the changes too, though the call is over by then."""
    gradients: list[Tensor] = []
    for checkpointing in (False, True):
        x, t, context = inputs()
        model = pipe.with_loras(SampleConfig(lora=(str(here / "one"),)))
        model.unet.gradient_checkpointing = checkpointing
        loss = model.unet(x.requires_grad_(), t, Condition(context=context)).square().sum()
        loss.backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1]) and not pipe.unet.gradient_checkpointing


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e9, -101, True])
def test_a_scale_that_is_not_one_is_refused_and_changes_nothing(here: Path, pipe: Pipeline, scale: Any) -> None:
    plain = out(pipe.unet)
    with pytest.raises(ConfigError, match="its scale must be a number from -100 to 100, got"):
        pipe.load_lora(here / "one", scale)
    assert torch.equal(out(pipe.unet), plain) and not pipe._loras.live
    with pytest.raises(ConfigError, match="lora must be PATH or PATH:SCALE with a scale from -100 to 100"):
        SampleConfig(lora=(f"{here}/one:nan",))


def test_both_networks_are_changed(here: Path, pipe: Pipeline) -> None:
    """By a LoRA of both: every layer that it names, and no other."""
    model = pipe.with_loras(SampleConfig(lora=(str(here / "one"),)))
    for part, network in model.networks.items():
        hooked = {name for name, layer in changeable(network).items() if layer._forward_hooks}
        assert hooked == set(pipe._loras.read(str(here / "one"), pipe.networks)[part].changes) and part in (UNET, TEXT)
