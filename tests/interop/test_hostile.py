"""Model folders with damaged or hostile JSON: one line and its exit code from every command, at once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.model_folders import folder, written  # noqa: F401
from support.pipelines import make

from ldm.cli.main import main
from ldm.config import ClassifierConfig, ConfigError
from ldm.errors import FolderError
from ldm.files.json import read_json
from ldm.interop.bundle import TEXT, UNET, VAE
from ldm.interop.classifier import ClassifierInfo, read_classifier
from ldm.interop.diffusers.folder import FILES
from ldm.interop.diffusers.lora_folder import Reference
from ldm.interop.open import read_any
from ldm.interop.sizes import check_sizes
from ldm.models.text import padded_with
from ldm.pipeline.info import ModelInfo


def refused(folder: Path, capsys: pytest.CaptureFixture[str], command: str = "inspect") -> str:
    """The one line that a command says of a folder."""
    options = {
        "inspect": ["--no-hashes"],
        "sample": ["--prompt", "a", "--steps", "1", "--out", str(folder.parent / "o")],
    }[command]
    assert main([command, str(folder), *options]) in (2, 4)
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and not list((folder.parent / "o").glob("*.png"))
    return said.err


JSON_FILES = [
    "model_index.json",
    "ldm.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
]
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, "nested too deeply"),
    "long number": (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5,000 digits"),
    "twice": (b'{"a": 1, "a": 2}', "names 'a' twice"),
    "list": (b"[1, 2]", "should hold a JSON object"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "is UTF-16: save it as UTF-8"),
    "latin-1": (b'{"a": "\xe9"}', "is not UTF-8"),
}


@pytest.mark.parametrize("file", JSON_FILES)
@pytest.mark.parametrize("fault", BROKEN)
def test_json_that_cannot_be_read_is_named(
    folder: Path, file: str, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, words = BROKEN[fault]
    (folder / file).write_bytes(content)
    said = refused(folder, capsys)
    assert words in said and str(folder / file) in said


@pytest.mark.parametrize("file", JSON_FILES[1:])
def test_a_folder_where_a_file_belongs(folder: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / file).unlink()
    (folder / file).mkdir()
    assert file in refused(folder, capsys)


def test_a_byte_order_mark_is_no_part_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": -Infinity}')
    assert read_json(tmp_path / "a.json") == {"a": float("-inf")}


WRONG: list[tuple[str, str, Any, str]] = [
    ("vae/config.json", "block_out_channels", None, "block_out_channels is None"),
    ("vae/config.json", "block_out_channels", ["16", 32], "block_out_channels is"),
    ("vae/config.json", "block_out_channels", [16, 10**9], "block_out_channels is 1000000000"),
    ("vae/config.json", "block_out_channels", [], "block_out_channels is []"),
    ("vae/config.json", "down_block_types", "DownEncoderBlock2D", "down_block_types is 'DownEncoderBlock2D'"),
    ("vae/config.json", "up_block_types", [["UpDecoderBlock2D"], {}], "up_block_types is"),
    ("vae/config.json", "layers_per_block", 10**30, "layers, and there are"),
    ("vae/config.json", "layers_per_block", 1.0, "layers_per_block is 1.0"),
    ("vae/config.json", "mid_block_add_attention", "yes", "mid_block_add_attention is 'yes'"),
    ("vae/config.json", "scaling_factor", 10**90, "scaling_factor is 1"),
    ("vae/config.json", "scaling_factor", float("nan"), "scaling_factor is nan"),
    ("vae/config.json", "norm_num_groups", 0, "norm_num_groups is 0"),
    ("unet/config.json", "layers_per_block", 10**30, "layers, and there are"),
    ("unet/config.json", "layers_per_block", True, "layers_per_level must be an integer"),
    ("unet/config.json", "transformer_layers_per_block", 10**9, "layers, and there are"),
    ("unet/config.json", "block_out_channels", [10**30, 64], "000: no network is that wide"),
    ("unet/config.json", "block_out_channels", [8] * 5000, "layers, and there are"),
    ("unet/config.json", "cross_attention_dim", 10**9, "cross_attention_dim is 1000000000: no network is that wide"),
    ("unet/config.json", "sample_size", [[8], [8, 8]], "sample_size"),
    ("unet/config.json", "num_class_embeds", 10**12, "num_class_embeds is"),
    ("text_encoder/config.json", "num_hidden_layers", 10**6, "1000000 layers, and there are"),
    ("text_encoder/config.json", "num_hidden_layers", [1], "num_hidden_layers is [1]"),
    ("text_encoder/config.json", "vocab_size", 10**30, "vocab_size is 1"),
    ("text_encoder/config.json", "hidden_size", 32.0, "hidden_size is 32.0"),
    ("text_encoder/config.json", "hidden_size", 0, "hidden_size is 0"),
    ("text_encoder/config.json", "max_position_embeddings", None, "max_position_embeddings is None"),
    ("model_index.json", "_class_name", ["StableDiffusionPipeline"], "cannot be opened"),
    ("model_index.json", "vae", "AutoencoderKL",
     "vae should be a library and a class, or two nulls, and is 'AutoencoderKL'"),
    ("model_index.json", "vae", ["diffusers"], "vae should be a library and a class"),
    ("model_index.json", "text_encoder", [1, 2], "text_encoder should be a library and a class"),
    ("model_index.json", "unet", None, "unet should be a library and a class"),
    ("ldm.json", "sample_size", "16", "sample_size should be a whole number from 1"),
    ("ldm.json", "sample_size", 10**12, "sample_size should be a whole number from 1"),
    ("ldm.json", "null_caption", 3, "null_caption should be text, and is 3"),
    ("ldm.json", "caption_dropout", "x", "caption_dropout should be a number from 0 to 1, or null"),
    ("ldm.json", "caption_dropout", 3, "caption_dropout should be a number"),
    ("ldm.json", "defaults", [], "defaults should be a mapping"),
    ("ldm.json", "format", 2, "format should be 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "key", "value", "words"),
    WRONG,
    ids=lambda value: value if isinstance(value, str) and len(value) < 30 else "",
)
def test_a_value_of_another_type_or_size_is_named(
    folder: Path, file: str, key: str, value: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    about = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**about, key: value}))
    assert words in refused(folder, capsys)


DEFAULTS: list[tuple[dict[str, Any], str]] = [
    ({"steps": 2.5}, "defaults.steps must be an integer, got 2.5"),
    ({"seed": "a"}, "defaults.seed must be an integer"),
    ({"guidance_interval": [1, 2, 3]}, "defaults.guidance_interval must be 2 values"),
    ({"lora": {"a": 1}}, "defaults.lora[0] must be text"),
]


@pytest.mark.parametrize(("defaults", "words"), DEFAULTS)
def test_sampling_defaults_are_settings(
    folder: Path, defaults: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    about = json.loads((folder / "ldm.json").read_text())
    (folder / "ldm.json").write_text(json.dumps({**about, "defaults": {**about["defaults"], **defaults}}))
    assert words in refused(folder, capsys, "sample")


def test_sizes_of_real_networks_pass(written: Path) -> None:
    """The widest published ones, beside as many tensors as they have."""
    for part in read_any(written).parts.values():
        assert part.tensors
    tensors = dict.fromkeys(map(str, range(686)), torch.zeros(0))
    unet = {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "transformer_layers_per_block": 1}
    check_sizes(UNET, {**unet, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]}, tensors, "")
    check_sizes(TEXT, {"num_hidden_layers": 23, "vocab_size": 49408}, dict(list(tensors.items())[:372]), "")
    check_sizes(
        VAE, {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}, dict(list(tensors.items())[:248]), ""
    )


# ---------------------------------------------------------------- tokenizers


TOKENIZERS: list[tuple[str, dict[str, Any] | str, str]] = [
    ("tokenizer_config.json", {"model_max_length": "77"}, "model_max_length is '77'"),
    ("tokenizer_config.json", {"model_max_length": -1}, "model_max_length is -1"),
    ("tokenizer_config.json", {"pad_token": ["a"]}, "tokenizer"),
    ("tokenizer_config.json", "[1]", "tokenizer"),
    ("tokenizer_config.json", "[" * 100_000, "tokenizer"),
    ("tokenizer.json", "{", "tokenizer"),
    ("tokenizer.json", "[]", "tokenizer"),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "tokenizer"),
    ("tokenizer.json", {"model": None}, "tokenizer"),
]


@pytest.mark.parametrize(("file", "change", "words"), TOKENIZERS)
def test_a_tokenizer_that_makes_no_tokens_is_named(
    folder: Path, file: str, change: dict[str, Any] | str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "tokenizer" / file
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    assert words in refused(folder, capsys, "sample")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_settings_of_a_tokenizer_that_cannot_be_read(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        padded_with({"tokenizer_config.json": content}, "!")


# ---------------------------------------------------------------- shards, LoRAs, classifiers, single files


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": 3}}, "weight_map should name"),
        ({"weight_map": {"a": "../x.safetensors"}}, "not the name of a file beside it"),
        ({"weight_map": {"a": "a\0b.safetensors"}}, "missing"),
        ({"weight_map": {"a": "x" * 5000 + ".safetensors"}}, ""),
        ({"weight_map": []}, "weight_map should name"),
        ({}, "weight_map should name"),
    ],
)
def test_an_index_of_shards(
    folder: Path, index: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / UNET / FILES[UNET]).unlink()
    (folder / UNET / f"{FILES[UNET]}.index.json").write_text(json.dumps(index))
    assert words in refused(folder, capsys)


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"base": "/", "base_sha256": "0"}, "base and base_sha256 are missing or damaged"),
        ({"base": [3], "base_sha256": "0"}, "base and base_sha256 are missing or damaged"),
        ({"base": ["a"], "base_sha256": None}, "base and base_sha256 are missing or damaged"),
        ({"base": [], "base_sha256": "0"}, "base and base_sha256 are missing or damaged"),
        ({"base": ["a\0b", "x" * 5000], "base_sha256": "0"}, "which is not there"),
        ({"base": ["."], "base_sha256": "0"}, "itself a LoRA"),
        ({"base": ["../model"], "base_sha256": "0", "sample_size": "x"}, "sample_size should be a whole number"),
        ({"base": ["../model"], "base_sha256": "0"}, "whose weights have changed since it was trained"),
    ],
)
def test_a_loras_folder(
    folder: Path, tmp_path: Path, about: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/lora.json").write_text(json.dumps(about))
    assert words in refused(tmp_path / "lora", capsys, "sample")
    if "itself" in words:
        Reference(tmp_path / "other", tmp_path / "lora", "0", {}).write()
        with pytest.raises(FolderError, match="itself a LoRA"):
            ModelInfo.read(tmp_path / "other")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("classes", "ab", "classes should be a list of names"),
        ("classes", [1, 2], "classes should be a list of names"),
        ("captions", {"a": 2}, "captions should give each caption the number of a class"),
        ("captions", [], "captions should give"),
        ("in_channels", "4", "in_channels should be a whole number"),
        ("in_channels", 10**30, "in_channels should be a whole number"),
        ("autoencoder_sha256", 3, "autoencoder_sha256 should be text or null"),
        ("model", {"channels": "x"}, "model.channels"),
        ("schedule", [], "schedule must be a mapping"),
    ],
)
def test_a_classifiers_folder(tmp_path: Path, key: str, value: Any, words: str) -> None:
    info = ClassifierInfo(
        ClassifierConfig(channels=(8, 8), groups=4), ("a", "b"), {"a": 0, "b": 1}, 4, make().schedule_config, None
    )
    info.save(info.make(), tmp_path / "classifier")
    file = tmp_path / "classifier/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises((FolderError, ConfigError), match=words):
        read_classifier(tmp_path)


def test_the_header_of_a_single_file_is_read_as_strictly(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    from ldm.files.tensors.archive import open_archive
    from ldm.interop.convert import write_model

    write_model(read_any(written), tmp_path / "x.safetensors")
    header = json.loads(open_archive(tmp_path / "x.safetensors").metadata["ldm"])
    tensors = load_file(tmp_path / "x.safetensors")
    for keys, value, words in (
        (("parts", "unet", "layers_per_block"), 10**30, "layers, and there are"),
        (("parts", "vae", "block_out_channels"), None, "block_out_channels is None"),
        (("parts", "text_encoder", "num_hidden_layers"), 10**6, "layers, and there are"),
        (("extra", "sample_size"), "x", "sample_size should be a whole number"),
    ):
        changed = json.loads(json.dumps(header))
        place = changed
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        save_file(tensors, tmp_path / "y.safetensors", {"format": "pt", "ldm": json.dumps(changed)})
        assert words in refused(tmp_path / "y.safetensors", capsys)
    save_file(tensors, tmp_path / "y.safetensors", {"format": "pt", "ldm": "[" * 100_000})
    assert "nested too deeply" in refused(tmp_path / "y.safetensors", capsys)
