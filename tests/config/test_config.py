"""Reading and writing of configurations: a fault is one line that names the key; shipped files are valid."""

import dataclasses
import re
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldm import config
from ldm.config import (
    AutoencoderTrainingConfig,
    ClassifierTrainingConfig,
    ClipTrainingConfig,
    ConfigError,
    DiffusionTrainingConfig,
)

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(
    f for f in (ROOT / "configs").rglob("*.yaml") if f.parent.name != "accelerate"
)  # those: tests/training/test_processes.py

AUTOENCODER = {"run": "r", "data": {"source": "textures", "image_size": 32}, "model": {"channels": [32, 32]}}
CLIP = {"run": "r", "data": {"source": "shapes", "image_size": 32}}
DIFFUSION = {"run": "r", "data": {"source": "shapes", "image_size": 32, "size": 64}, "autoencoder": "a", "text": "t"}
CLASSIFIER = {"run": "r", "data": {"source": "digits", "image_size": 32}, "diffusion": "d"}
TREES: dict[type, dict[str, Any]] = {
    AutoencoderTrainingConfig: AUTOENCODER,
    ClipTrainingConfig: CLIP,
    DiffusionTrainingConfig: DIFFUSION,
    ClassifierTrainingConfig: CLASSIFIER,
}


def read(folder: Path, cls: type, *overrides: str, text: str | None = None) -> Any:
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(TREES[cls]) if text is None else text)
    return config.load(cls, file, list(overrides))


def fault(folder: Path, cls: type, *overrides: str, text: str | None = None) -> str:
    """The message of the ConfigError, which is one line."""
    with pytest.raises(ConfigError) as caught:
        read(folder, cls, *overrides, text=text)
    message = str(caught.value)
    assert message and "\n" not in message and caught.value.exit_code == 2
    return message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stesp=3", "unknown key train.stesp: did you mean train.steps?"),
        ("dta.source=shapes", "unknown key dta: did you mean data?"),
        ("unet.chanels=[8]", "unknown key unet.chanels: did you mean unet.channels?"),
        ("zebra=1", "unknown key zebra: known are run, data, autoencoder, text"),
        ("train.steps=abc", "train.steps must be an integer, got 'abc'"),
        ("train.steps=1.5", "train.steps must be an integer, got 1.5"),
        ("train.steps=true", "train.steps must be an integer, got True"),
        ("train.steps=null", "train.steps must be an integer, got None"),
        ("train.lr=fast", "train.lr must be a number, got 'fast'"),
        ("data.flip=1", "data.flip must be true or false, got 1"),
        ("run=3", "run must be text, got 3"),
        ("train=3", "train must be a mapping of settings, got 3"),
        ("train.steps.x=3", "train.steps must be an integer, got {'x': 3}"),
        ("unet.channels=[8,wide]", "unet.channels[1] must be an integer, got 'wide'"),
        ("train.steps", "override 'train.steps' is not of the form key=value"),
        ("=3", "unknown key "),
    ],
)
def test_unknown_keys_and_wrong_types_are_named(tmp_path: Path, override: str, message: str) -> None:
    assert message in fault(tmp_path, DiffusionTrainingConfig, override)


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("train.steps=0", "train.steps"),
        ("train.batch_size=0", "train.batch_size"),
        ("train.lr=0", "train.lr"),
        ("train.lr=.nan", "train.lr"),
        ("train.lr=.inf", "train.lr"),
        ("train.clip=0", "train.clip"),
        ("train.ema_decay=1.0", "train.ema_decay"),
        ("train.ema_decay=.nan", "train.ema_decay"),
        ("train.betas=[0.9]", "train.betas"),
        ("train.betas=[0.9,1.0]", "train.betas"),
        ("train.seed=-1", "train.seed"),
        (f"train.seed={2**63}", "train.seed"),
        ("train.lr_end=1.5", "train.lr_end"),
        ("train.lr_schedule=linear", "train.lr_schedule"),
        ("train.mixed_precision=fp8", "train.mixed_precision"),
        ("train.keep_checkpoints=1", "train.keep_checkpoints"),
        ("train.trackers=[excel]", "train.trackers"),
        ("train.warmup=-1", "train.warmup"),
        ("data.source=faces", "data.source"),
        ("data.crop=left", "data.crop"),
        ("data.image_size=0", "data.image_size"),
        ("data.workers=-1", "data.workers"),
        ("data.validation_fraction=0.9", "data.validation_fraction"),
        ("caption_dropout=1.1", "caption_dropout"),
        ("cache_captions=-1", "cache_captions"),
        ("unet.layers_per_level=0", "unet.layers_per_level"),
        ("unet.groups=0", "unet.groups"),
        ("unet.channels=[]", "unet.channels"),
        ("schedule.name=square", "schedule.name"),
        ("schedule.num_steps=1", "schedule.num_steps"),
        ("schedule.beta_end=1.0", "schedule.beta_end"),
        ("objective.target=noise", "objective.target"),
        ("objective.weighting=p3", "objective.weighting"),
        ("objective.min_snr_gamma=0", "objective.min_snr_gamma"),
        ("sample.sampler=eulr", "sample.sampler"),
        ("sample.steps=0", "sample.steps"),
        ("sample.guidance_scale=.nan", "sample.guidance_scale"),
        ("sample.eta=2", "sample.eta"),
        ("sample.seed=-1", "sample.seed"),
    ],
)
def test_values_out_of_range_are_named(tmp_path: Path, override: str, name: str) -> None:
    assert fault(tmp_path, DiffusionTrainingConfig, override).startswith(name)


@pytest.mark.parametrize(
    ("cls", "overrides", "message"),
    [
        (DiffusionTrainingConfig, ["data.source=folder"], "data.folder goes with source: folder"),
        (DiffusionTrainingConfig, ["data.folder=x"], "data.folder goes with source: folder"),
        (DiffusionTrainingConfig, ["data.source=digits"], "data.size is for procedural sources"),
        (
            DiffusionTrainingConfig,
            ["data.source=shapes-two", "data.flip=true"],
            "data.flip must be false for shapes-two",
        ),
        (DiffusionTrainingConfig, ["data.crop=random"], "cache_latents cannot keep random crops"),
        (
            DiffusionTrainingConfig,
            ["schedule.zero_terminal_snr=true", "objective.target=eps"],
            "objective.target eps does not determine the image",
        ),
        (DiffusionTrainingConfig, ["data.size=null"], "cache_latents needs a finite set"),
        (
            DiffusionTrainingConfig,
            ["train.batch_size=6", "train.micro_batch=4"],
            "train.batch_size 6 is not a multiple of micro_batch 4",
        ),
        (
            DiffusionTrainingConfig,
            ["unet.channels=[30,60,60,60]"],
            "unet.channels 30 is not a positive multiple of groups 32",
        ),
        (DiffusionTrainingConfig, ["unet.attention_levels=[4]"], "unet.attention_levels: 4 is not a level of 4"),
        (DiffusionTrainingConfig, ["unet.heads=[2,2]"], "unet.heads must be one number or one per level (4)"),
        (DiffusionTrainingConfig, ["unet.heads=[3]"], "unet.heads: 3 does not divide channels 320"),
        (
            DiffusionTrainingConfig,
            ["schedule.name=cosine", "schedule.beta_end=0.01"],
            "schedule.beta_start and beta_end have no meaning",
        ),
        (AutoencoderTrainingConfig, ["data.image_size=33"], "data.image_size 33 is not a multiple of 2"),
        (
            AutoencoderTrainingConfig,
            ["data.image_channels=1"],
            "data.image_channels is 1 but model.image_channels is 3",
        ),
        (AutoencoderTrainingConfig, ["train.mixed_precision=fp16"], "use bf16"),
        (AutoencoderTrainingConfig, ["loss.l1=0"], "loss.l1, mse and lpips are all 0"),
        (AutoencoderTrainingConfig, ["loss.lpips_net=resnet"], "loss.lpips_net must be one of alex, vgg"),
        (AutoencoderTrainingConfig, ["loss.gan=-1"], "loss.gan must be at least 0"),
        (AutoencoderTrainingConfig, ["model.channels=[32]"], "levels"),
        (DiffusionTrainingConfig, ["unet.vector_dim=4"], "unet.vector_dim is set where conditions or inpaint need it"),
        (DiffusionTrainingConfig, ["unet.num_labels=9"], "unet.num_labels is set where conditions or inpaint need it"),
        (
            DiffusionTrainingConfig,
            ["unet.sinusoidal_labels=true"],
            "unet.sinusoidal_labels is set where conditions or inpaint need it",
        ),
        (DiffusionTrainingConfig, ["unet.vector_map=linear"], "unet.vector_map is for vector_dim"),
        (
            DiffusionTrainingConfig,
            ["unet.concat_channels=1"],
            "unet.concat_channels is set where conditions or inpaint need it",
        ),
        (ClipTrainingConfig, ["model.patch_size=5"], "data.image_size 32 is not a multiple of 5"),
        (ClipTrainingConfig, ["train.micro_batch=8"], "train.micro_batch must be null"),
        (ClipTrainingConfig, ["model.heads=3"], "model.width 128 is not a multiple of heads 3"),
        (ClipTrainingConfig, ["model.max_length=78"], "model.max_length must lie between 4 and 77"),
    ],
)
def test_settings_at_odds_with_each_other_are_named(
    tmp_path: Path, cls: type, overrides: list[str], message: str
) -> None:
    assert message in fault(tmp_path, cls, *overrides)


def test_what_stands_beside_the_refused_is_accepted(tmp_path: Path) -> None:
    assert read(tmp_path, DiffusionTrainingConfig, "data.crop=random", "cache_latents=false").data.crop == "random"
    assert read(tmp_path, DiffusionTrainingConfig, "data.crop=random", "autoencoder=none").data.crop == "random"
    assert read(tmp_path, DiffusionTrainingConfig, "data.size=null", "cache_latents=false").data.size is None
    assert read(tmp_path, DiffusionTrainingConfig, "train.mixed_precision=fp16").train.mixed_precision == "fp16"
    assert read(tmp_path, AutoencoderTrainingConfig, "train.mixed_precision=bf16").train.mixed_precision == "bf16"
    assert read(tmp_path, ClipTrainingConfig, "train.batch_size=8", "train.micro_batch=8").train.micro_batch == 8


def test_overrides_and_numbers(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        DiffusionTrainingConfig,
        "train.lr=1e-4",
        "train.clip=null",
        "prompts=[a b,'1e5']",
        "unet.heads=4",
        "train.weight_decay=1",
        "data.flip=yes",
    )
    assert settings.train.lr == 1e-4 and settings.train.clip is None and settings.data.flip is True
    assert settings.prompts == ("a b", "1e5") and settings.unet.heads == (4,)
    assert settings.train.weight_decay == 1.0 and isinstance(settings.train.weight_decay, float)
    assert (
        read(tmp_path, ClipTrainingConfig, text=yaml.safe_dump(CLIP) + "train: {lr: 1e-4}\n").train.lr == 1e-4
    )  # in the file as well
    assert read(tmp_path, ClipTrainingConfig, "train.steps=3", "train.steps=5").train.steps == 5  # the last one counts


@pytest.mark.parametrize("cls", list(TREES))
def test_save_and_load_give_the_same_object(tmp_path: Path, cls: type) -> None:
    awkward = {
        "run": "true",
        "train": {"lr": 1e-10, "adam_eps": 1e-20, "clip": None, "betas": [0.5, 1e-7], "trackers": []},
    }
    if cls is DiffusionTrainingConfig:
        awkward["prompts"] = ["1e-4", "null", "é ≤ 'q' \"d\": #", "", "-1", "a\nb"]
    settings = config.build(cls, {**TREES[cls], **awkward})
    config.save(settings, tmp_path / "saved.yaml")
    assert config.load(cls, tmp_path / "saved.yaml") == settings
    assert config.build(cls, config.to_dict(settings)) == settings


@pytest.mark.parametrize(
    "override",
    ["run=${oc.env:HOME}", "run=${train.seed}", "train.steps=${train.seed}", "prompts=['${x}']", "prompts=${x"],
)
def test_interpolation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str) -> None:
    monkeypatch.setenv("HOME", "/secret")
    message = fault(tmp_path, DiffusionTrainingConfig, override)
    assert "secret" not in message and "$" in message
    key, _, value = override.partition("=")
    if not key.startswith(("train", "prompts")):
        assert "interpolation" in fault(
            tmp_path, DiffusionTrainingConfig, text=yaml.safe_dump({**DIFFUSION, key: value})
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [1\n", "cannot be read"),
        ("run: a\n\tdata: b\n", "cannot be read"),
        ("run: a\nrun: b\n", "duplicate key run"),
        ("run: !!python/object/apply:os.system [ls]\n", "cannot be read"),
        ("- a\n- b\n", "must be a mapping of settings, not a list"),
        ("3", "cannot be read"),
        ("hello", "unknown key hello"),
        ("", "missing key run"),
        ("run: a\n", "missing key data"),
        ("run: a\ndata: [1]\n", "data must be a mapping of settings"),
        ("run: ???\ndata: {}\n", "run"),
        ("1: 2\n", "unknown key 1"),
        ("run: a\n---\nrun: b\n", "cannot be read"),
        ("run: \x00\n", "cannot be read"),
        ("run: " + "[" * 50_000, "nested more than 20 deep"),
        (
            "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
            "with its aliases",
        ),
        ("run: *nothing\n", "cannot be read"),
        ("run: &a [*a]\n", "recursive aliases"),
        ("run: a\ndata: {source: shapes}\ntrain: {steps: 1" + "0" * 5000 + "}\n", "cannot be read: Exceeds the limit"),
        (
            "run: a\ndata: {source: shapes}\ntrain: {lr: 1" + "0" * 4000 + "}\n",
            "train.lr must be a number of at most 256 bits",
        ),
        ("run: a\ndata: {source: shapes}\ntrain: {steps: !!int x}\n", "cannot be read"),
        (
            "run: a\ndata: {source: shapes}\ntrain: {steps: 2020-01-01}\n",
            "train.steps must be an integer, got '2020-01-01'",
        ),
        ("run: a\ndata: {source: shapes}\ntrain: {lr: '1e-4'}\n", "train.lr must be a number, got '1e-4'"),
        ("run: a\n? [b]\n: c\n", "cannot be read"),
        ("x" * 900 + ": a\n", "unknown key xxx"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, message: str) -> None:
    said = fault(tmp_path, ClipTrainingConfig, text=text)
    assert message in said and len(said) < 700


def test_a_mark_of_the_byte_order_aliases_merge_keys_and_numbers_with_an_exponent_are_read(tmp_path: Path) -> None:
    text = "\ufeffrun: &r a\ndata: &d {source: shapes, size: 9}\ntrain: {lr: 1e-4}\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    settings = config.load(ClipTrainingConfig, tmp_path / "a.yaml")
    assert (settings.run, settings.data.size, settings.train.lr) == ("a", 9, 1e-4)
    (tmp_path / "a.yaml").write_text("run: &r a\ndata:\n  <<: {source: shapes, size: 9}\n  size: 8\nmodel: {}\n")
    assert config.load(ClipTrainingConfig, tmp_path / "a.yaml").data.size == 8
    with pytest.raises(ConfigError, match="is not UTF-8"):
        (tmp_path / "a.yaml").write_bytes(b"run: caf\xe9\n")
        config.load(ClipTrainingConfig, tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "override",
    ["run=" + "[" * 5000, "train.steps=1" + "0" * 5000, "train.steps=!!int x", "train.lr=!!int", "=" * 50, "a.b.c.d=1"],
)
def test_odd_overrides_are_one_line(tmp_path: Path, override: str) -> None:
    assert len(fault(tmp_path, DiffusionTrainingConfig, override)) < 700


@pytest.mark.parametrize("value", [10**30, 10**4000, -(10**30), 10**10])
def test_every_size_and_count_has_an_upper_limit(value: int) -> None:
    """Every integer of every configuration, in lists too: one line, before anything of its size is made."""

    def integers(cls: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], bool]]:
        for name, hint in typing.get_type_hints(cls).items():
            kinds = [
                kind
                for kind in (typing.get_args(hint) if isinstance(hint, types.UnionType) else [hint])
                if kind is not type(None)
            ]
            if dataclasses.is_dataclass(kinds[0]):
                yield from integers(typing.cast(type, kinds[0]), (*path, name))
            elif kinds[0] is int or (typing.get_origin(kinds[0]) is tuple and typing.get_args(kinds[0])[0] is int):
                yield (*path, name), kinds[0] is not int

    for cls, tree in TREES.items():
        for path, several in integers(cls):
            if path[-1] == "seed" and value == 10**10:
                continue
            changed: Any = [value] * (3 if path[-1] == "background" else 1) if several else value
            for name in reversed(path):
                changed = {name: changed}
            with pytest.raises(ConfigError, match=re.escape(path[-1])) as caught:
                config.build(cls, merged(tree, changed))
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def merged(tree: Any, change: Any) -> Any:
    if not isinstance(tree, dict) or not isinstance(change, dict):
        return change
    return {**tree, **{key: merged(tree.get(key, {}), value) for key, value in change.items()}}


def test_missing_binary_and_odd_files(tmp_path: Path) -> None:
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    for file, message in (
        (tmp_path / "none.yaml", "no configuration file"),
        (tmp_path, "is a folder, not a configuration file: name .*b.yaml"),
        (binary, "is UTF-16: save it as UTF-8"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            config.load(ClipTrainingConfig, file)
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_frozen_and_every_field_has_a_type_that_is_checked() -> None:
    settings = config.build(DiffusionTrainingConfig, DIFFUSION)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.run = "other"  # type: ignore[misc]

    def leaves(tree: Any, path: tuple[str, ...] = ()) -> Any:
        for field in dataclasses.fields(tree):
            value = getattr(tree, field.name)
            yield from leaves(value, (*path, field.name)) if dataclasses.is_dataclass(value) else [(*path, field.name)]

    for cls, tree in TREES.items():
        for path in leaves(config.build(cls, tree)):
            wrong = {path[-1]: {"nested": 1}}
            for name in reversed(path[:-1]):
                wrong = {name: wrong}
            merged = {**tree, **{k: {**tree.get(k, {}), **v} if len(path) > 1 else v for k, v in wrong.items()}}
            with pytest.raises(ConfigError, match=re.escape(".".join(path))):
                config.build(cls, merged)


def test_no_torch_is_imported() -> None:
    code = "import ldm.config, autoencoder.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def kind(file: Path) -> type:
    keys = yaml.safe_load(file.read_text()).keys()
    if "diffusion" in keys:
        return ClassifierTrainingConfig
    return (
        DiffusionTrainingConfig
        if "unet" in keys
        else AutoencoderTrainingConfig
        if "loss" in keys
        else ClipTrainingConfig
    )


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: str(f.relative_to(ROOT / "configs")))
def test_shipped_file_is_sound(file: Path) -> None:
    """It parses, and its networks can be built (on the meta device) and run on one sample's shape."""
    from autoencoder.discriminator import PatchDiscriminator
    from autoencoder.model import AutoencoderKL
    from ldm.models.unet import UNet

    settings = config.load(kind(file), file)
    with torch.device("meta"):
        if isinstance(settings, AutoencoderTrainingConfig):
            image = torch.zeros(1, settings.data.image_channels, settings.data.image_size, settings.data.image_size)
            assert AutoencoderKL(settings.model)(image)[0].shape == image.shape
            if settings.loss.gan > 0:
                PatchDiscriminator(
                    settings.model.image_channels, settings.loss.disc_channels, settings.loss.disc_layers
                )(image)
        elif isinstance(settings, DiffusionTrainingConfig):
            from ldm.diffusion.condition import Condition

            context = None if settings.text == config.NONE else torch.zeros(1, 7, 48)
            pixels = settings.autoencoder == config.NONE
            channels, side = (settings.data.image_channels, settings.data.image_size) if pixels else (4, 8)
            x = torch.zeros(1, channels, side, side)
            unet = UNet(settings.unet, channels, channels, 48 if context is not None else None)
            assert unet(x, torch.zeros(1, dtype=torch.long), Condition(context=context)).shape == x.shape
        elif isinstance(settings, ClassifierTrainingConfig):
            from ldm.models.classifier import NoisyClassifier

            assert NoisyClassifier(settings.model, 4, 10)(
                torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.long)
            ).shape == (1, 10)
        else:
            from ldm.models.clip import build_clip, train_tokenizer

            tokenizer = train_tokenizer(["a red circle"], settings.model.merges, settings.model.max_length)
            build_clip(settings.model, tokenizer, settings.data.image_size, settings.data.image_channels)


def test_there_are_shipped_files_of_every_command() -> None:
    assert {kind(file) for file in SHIPPED} == set(TREES)
