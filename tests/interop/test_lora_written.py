"""LoRA files as other programs read them: the scale with or without α, either layout, `ldm convert`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.loras import ALL, TEXT_TARGETS, both, changed, close, networks, pipe, sampled, stir, written  # noqa: F401
from torch import Tensor, nn

from ldm.cli.main import main
from ldm.errors import FolderError
from ldm.interop.bundle import TEXT, UNET
from ldm.interop.diffusers.lora_folder import Reference
from ldm.interop.lora import FILE, METADATA, read_lora, write_lora
from ldm.models.lora import Lora, changeable
from ldm.pipeline import Pipeline
from ldm.pipeline.info import ModelInfo

SCALE = 0.8


def mixed(pipe: Pipeline) -> dict[str, Lora]:
    """A LoRA of all layers, with different ranks and α/r that are not powers of two."""
    loras = {}
    for part, network in networks(pipe).items():
        names = [name for name in changeable(network) if part == UNET or name.endswith(TEXT_TARGETS)]
        loras[part] = Lora(network, {name: (3 + i % 2, 2.5) for i, name in enumerate(names)})
        torch.manual_seed(len(names))
        for parameter in loras[part].parameters():
            parameter.data.normal_(std=0.2)
    return loras


def merged(pipe: Pipeline, loras: dict[str, Lora]) -> dict[str, dict[str, Tensor]]:
    """W + s (α/r) B A of every layer by the formula, in float64."""
    result: dict[str, dict[str, Tensor]] = {}
    for part, network in networks(pipe).items():
        result[part] = {name: layer.weight.double() for name, layer in changeable(network).items()}
        for name, change in loras[part].changes.items() if part in loras else ():
            a, b = (module.weight.detach().double().flatten(1) for module in (change.lora_A, change.lora_B))  # type: ignore[union-attr,operator]
            weight = result[part][name]
            result[part][name] = weight + SCALE * change.alpha / change.rank * (b @ a).view_as(weight)
    return result


def kohya_name(part: str, name: str) -> str:
    return ("lora_te_text_model_" if part == TEXT else "lora_unet_") + name.replace(".", "_")


def by_a_reader_of_kohya(file: Path, pipe: Pipeline) -> dict[str, dict[str, Tensor]]:
    """Merge as kohya's merge_lora.py and ComfyUI do, by flattened names; without alpha it is the rank."""
    tensors, result = load_file(file), {}
    taken = set()
    for part, network in networks(pipe).items():
        result[part] = {}
        for name, layer in changeable(network).items():
            stem, weight = kohya_name(part, name), layer.weight.double()
            if f"{stem}.lora_down.weight" in tensors:
                down, up = (tensors[f"{stem}.lora_{word}.weight"].double().flatten(1) for word in ("down", "up"))
                alpha = float(tensors[f"{stem}.alpha"]) if f"{stem}.alpha" in tensors else len(down)
                weight = weight + SCALE * alpha / len(down) * (up @ down).view_as(weight)
                taken |= {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"}
            result[part][name] = weight
    assert taken == set(tensors)
    return result


def by_a_reader_without_alpha(file: Path, pipe: Pipeline) -> dict[str, dict[str, Tensor]]:
    """As a program reads peft's names that looks neither for α tensors nor at the header."""
    tensors, result = load_file(file), {}
    for part, network in networks(pipe).items():
        prefix = f"{part}.{'text_model.' if part == TEXT else ''}"
        result[part] = {}
        for name, layer in changeable(network).items():
            weight = layer.weight.double()
            if (key := f"{prefix}{name}.lora_A.weight") in tensors:
                a, b = tensors[key].double().flatten(1), tensors[key.replace("lora_A", "lora_B")].double().flatten(1)
                weight = weight + SCALE * (b @ a).view_as(weight)
            result[part][name] = weight
    return result


def by_diffusers(file: Path, written: Path) -> dict[str, dict[str, Tensor]]:
    opened: Any = diffusers.StableDiffusionPipeline.from_pretrained(written)
    opened.load_lora_weights(file, adapter_name="it")
    opened.set_adapters(["it"], [SCALE])
    opened.fuse_lora()
    opened.unload_lora_weights()
    text = getattr(opened.text_encoder, "text_model", opened.text_encoder)
    return {
        part: {n: layer.weight.double() for n, layer in changeable(net).items()}
        for part, net in ((UNET, opened.unet), (TEXT, text))
    }


def equal(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for part, layers in expected.items():
        assert found[part].keys() == layers.keys()
        for name, weight in layers.items():
            close(found[part][name], weight)


def test_the_scale_is_right_for_readers_that_know_no_alpha(written: Path, pipe: Pipeline, tmp_path: Path) -> None:
    """Ours, diffusers and one that multiplies B and A."""
    loras = mixed(pipe)
    write_lora(loras, tmp_path / FILE)
    expected = merged(pipe, loras)
    equal(by_a_reader_without_alpha(tmp_path / FILE, pipe), expected)
    equal(by_diffusers(tmp_path / FILE, written), expected)
    pipe.load_lora(tmp_path, SCALE)
    pipe.merge_lora()
    equal(
        {
            part: {n: layer.weight.double() for n, layer in changeable(net).items()}
            for part, net in networks(pipe).items()
        },
        expected,
    )


def test_the_layout_of_kohya_is_read_by_its_readers_and_by_diffusers(
    written: Path, pipe: Pipeline, tmp_path: Path
) -> None:
    loras = mixed(pipe)
    file = tmp_path / "kohya.safetensors"
    write_lora(loras, file, "kohya")
    expected = merged(pipe, loras)
    equal(by_a_reader_of_kohya(file, pipe), expected)
    equal(by_diffusers(file, written), expected)
    alphas = {float(value) for key, value in load_file(file).items() if key.endswith(".alpha")}
    with safe_open(file, "pt") as opened:
        assert (
            METADATA not in opened.metadata() and len(alphas) == 1
        )  # diffusers gives layers the wrong ones where they differ
    pipe.load_lora(file, SCALE)
    pipe.merge_lora()
    equal(
        {
            part: {n: layer.weight.double() for n, layer in changeable(net).items()}
            for part, net in networks(pipe).items()
        },
        expected,
    )


@pytest.mark.parametrize("stem", ["lora_te_", "lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer."])
def test_keys_of_a_text_encoder_may_lack_its_prefix(pipe: Pipeline, tmp_path: Path, stem: str) -> None:
    """As older merges, and peft on transformers 5, name its layers."""
    lora = both(pipe)[TEXT]
    tensors = {}
    for name, change in lora.changes.items():
        plain = stem + (name if stem.endswith(".") else name.replace(".", "_"))
        tensors |= {f"{plain}.lora_down.weight": change.lora_A.weight, f"{plain}.lora_up.weight": change.lora_B.weight}
        tensors[f"{plain}.alpha"] = torch.tensor(change.alpha)
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, tmp_path / "x.safetensors")  # type: ignore[union-attr,operator]
    found = read_lora(tmp_path / "x.safetensors", networks(pipe))
    assert list(found) == [TEXT] and found[TEXT].changes.keys() == lora.changes.keys()
    assert all(
        torch.equal(found[TEXT].changes[name].matrix(), change.matrix()) for name, change in lora.changes.items()
    )


@pytest.mark.parametrize("stem", ["diffusion_model.", "lora_unet_"])
def test_names_of_a_file_in_the_layout_of_compvis_are_read(
    written: Path, pipe: Pipeline, tmp_path: Path, stem: str
) -> None:
    """As ComfyUI writes them: each layer is known by its weight in the single file that `ldm convert` writes."""
    assert main(["convert", str(written), str(tmp_path / "single.safetensors")]) == 0
    prefix = "model.diffusion_model."
    single = {key: value for key, value in load_file(tmp_path / "single.safetensors").items() if key.startswith(prefix)}
    tensors: dict[str, Tensor] = {}
    for name, layer in changeable(pipe.unet).items():
        (key,) = (
            key
            for key, value in single.items()
            if value.shape == layer.weight.shape and torch.equal(value, layer.weight)
        )
        plain = key.removeprefix(prefix).removesuffix(".weight")
        there = stem + (plain if stem.endswith(".") else plain.replace(".", "_"))
        lora = Lora(pipe.unet, {name: (2, 2.0)})
        lora.changes[name].lora_B.weight.data.normal_()  # type: ignore[union-attr,operator]
        values = {"lora_down": lora.changes[name].lora_A, "lora_up": lora.changes[name].lora_B}
        tensors |= {f"{there}.{word}.weight": part.weight.detach() for word, part in values.items()}  # type: ignore[union-attr,misc]
        tensors[f"expected {name}"] = lora.changes[name].matrix()
    expected = {key.removeprefix("expected "): tensors.pop(key) for key in list(tensors) if key.startswith("expected ")}
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_lora(tmp_path / "x.safetensors", networks(pipe))[UNET].changes
    assert found.keys() == expected.keys() and all(
        torch.equal(found[name].matrix(), value) for name, value in expected.items()
    )


# ---------------------------------------------------------------- ldm convert


def test_a_run_becomes_a_file_of_kohya_and_back(
    written: Path, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = {UNET: changed(pipe.unet, ALL)}
    run, file, back = tmp_path / "run", tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    write_lora(lora, run / "model" / FILE)
    Reference(run / "model", written, ModelInfo.read(written).hash, {}).write()
    assert main(["convert", str(run), str(file), "--lora-layout", "kohya", "--verify"]) == 0
    said = capsys.readouterr().out
    count = len(lora[UNET].changes)
    assert f"layers read back: {count} of unet; largest difference of a change: 0 of its largest weight" in said
    equal(by_a_reader_of_kohya(file, pipe), merged(pipe, lora))
    assert main(["convert", str(file), str(back), "--lora-layout", "diffusers", "--lora-base", str(written)]) == 0
    assert back.read_bytes() == (run / "model" / FILE).read_bytes()


def test_half_precision_is_rounded_and_what_it_cannot_hold_is_refused(
    written: Path, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = {UNET: changed(pipe.unet, ("to_q",))}
    write_lora(lora, tmp_path / "a.safetensors")
    convert = ["--lora-layout", "kohya", "--lora-base", str(written), "--dtype", "fp16", "--verify"]
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), *convert]) == 0
    found = re.search(r"largest difference of a change: (\S+) of", capsys.readouterr().out)
    assert found and 1e-5 < float(found[1]) < 1e-2
    next(iter(lora[UNET].changes.values())).lora_A.weight.data[0, 0] = 1e6  # type: ignore[index]
    write_lora(lora, tmp_path / "c.safetensors")
    assert main(["convert", str(tmp_path / "c.safetensors"), str(tmp_path / "d.safetensors"), *convert]) == 4
    assert (
        "1 of 96 numbers that are not finite" in capsys.readouterr().err and not (tmp_path / "d.safetensors").exists()
    )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["LORA", "x.safetensors"], 2, "is a LoRA, not a model: .*convert it by `ldm convert --lora-layout`"),
        (
            ["LORA", "x.safetensors", "--lora-layout", "kohya"],
            2,
            "does not say which model it changes: give --lora-base",
        ),
        (
            ["LORA", "x", "--lora-layout", "kohya", "--lora-base", "MODEL"],
            2,
            "--lora-layout writes one file: end DST in .safetensors",
        ),
        (["LORA", "x.safetensors", "--lora-layout", "kohya", "--openclip"], 2, "without --shard-size and --openclip"),
        (["LORA", "LORA", "--lora-layout", "kohya", "--lora-base", "MODEL"], 2, "exists already"),
        (["MODEL", "x.safetensors", "--lora-layout", "kohya", "--lora-base", "MODEL"], 4, "holds no LoRA: expected"),
        (["MODEL", "x.safetensors", "--lora-base", "MODEL"], 2, "--lora-base is for a LoRA: give --lora-layout too"),
        (["LORA", "x.safetensors", "--lora-layout", "kohya", "--lora-base", "nowhere"], 4, "nowhere"),
    ],
)
def test_what_is_not_converted_is_one_line(
    written: Path, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_lora({UNET: changed(pipe.unet, ("to_q",))}, tmp_path / "lora.safetensors")
    places = {"LORA": str(tmp_path / "lora.safetensors"), "MODEL": str(written)}
    assert main(["convert", *(places.get(word, word) for word in arguments)]) == code
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1 and not (tmp_path / "x.safetensors").exists()


# ---------------------------------------------------------------- not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["lora_A", "lora_B"])
def test_a_tensor_that_is_not_finite_is_named_and_nothing_is_drawn(
    written: Path, pipe: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: float
) -> None:
    write_lora({UNET: changed(pipe.unet, ("to_q",))}, tmp_path / "a" / FILE)
    tensors = load_file(tmp_path / "a" / FILE)
    name = next(name for name in tensors if key in name)
    tensors[name][0, 0] = value
    save_file(tensors, tmp_path / "a" / FILE)
    assert sampled(written, tmp_path / "a", tmp_path / "o") == 4
    error = capsys.readouterr().err
    assert f"{name} holds 1 of 96 numbers that are not finite" in error and error.count("\n") == 1
    assert not list(tmp_path.glob("o/*.png"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.mul_(1e30), "is not finite: its weights are up to"),
        (lambda t: t.double().mul(1e300), "not finite"),
        (lambda t: t.to(torch.complex64), "is of type 'C64'"),
        (lambda t: t.to(torch.int8), "holds int8, which are not weights"),
    ],
)
def test_changes_that_overflow_and_tensors_of_other_kinds_are_named(
    pipe: Pipeline, tmp_path: Path, change: Any, said: str
) -> None:
    """Each tensor may be finite and the product not."""
    write_lora({UNET: changed(pipe.unet, ("to_q",))}, tmp_path / FILE)
    save_file({name: change(tensor) for name, tensor in load_file(tmp_path / FILE).items()}, tmp_path / FILE)
    with pytest.raises(FolderError, match=said):
        pipe.load_lora(tmp_path)


@pytest.mark.parametrize("alpha", ["Infinity", "NaN", "1e999", "1" + "0" * 400, "9" * 5000, "[" * 2000])
def test_an_alpha_of_the_header_that_is_no_number_is_named(pipe: Pipeline, tmp_path: Path, alpha: str) -> None:
    write_lora({UNET: changed(pipe.unet, ("to_q",))}, tmp_path / FILE)
    header = f'{{"unet.r": 3, "unet.lora_alpha": {alpha}}}'
    save_file(load_file(tmp_path / FILE), tmp_path / FILE, {METADATA: header})
    with pytest.raises(FolderError, match=r"is not a finite number|of its header: ") as caught:
        pipe.load_lora(tmp_path)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_a_model_is_not_taken_for_a_lora(tmp_path: Path, pipe: Pipeline) -> None:
    network = nn.Linear(2, 2)
    stir(network, 0.1)
    save_file(
        {f"model.diffusion_model.{name}": value for name, value in network.state_dict().items()},
        tmp_path / "x.safetensors",
    )
    with pytest.raises(FolderError, match=r"x\.safetensors is not a LoRA: none of its tensors has the name of one"):
        pipe.load_lora(tmp_path / "x.safetensors")
