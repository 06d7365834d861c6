"""Every script, as a file, for two steps on tiny configurations: what people start is what works."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TRAIN = {"steps": 2, "batch_size": 4, "validation_size": 4, "trackers": []}
DATA = {"source": "shapes", "image_size": 32, "size": 12}
TEXTURES = {"source": "textures", "image_size": 32, "size": 12}
AUTOENCODER = {
    "model": {"channels": [8, 8, 8], "layers_per_level": 1, "groups": 4, "mid_attention": False},
    "train": TRAIN,
}
ADVERSARY = {"loss": {"gan": 0.5, "gan_start": 0, "disc_channels": 8, "disc_layers": 2}}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny/autoencoder": {"run": "runs/tiny/autoencoder", "data": DATA, **AUTOENCODER},
    "tiny/clip": {
        "run": "runs/tiny/text", "data": DATA, "train": TRAIN,
        "model": {
            "width": 16, "layers": 1, "heads": 2, "max_length": 32, "merges": 32, "patch_size": 8, "projection": 8,
        },
    },
    "tiny/ldm": {
        "run": "runs/tiny", "data": DATA, "train": TRAIN,
        "autoencoder": "runs/tiny/autoencoder", "text": "runs/tiny/text",
        "unet": {"channels": [16, 16], "layers_per_level": 1, "attention_levels": [1], "heads": [2], "groups": 4},
        "sample": {"steps": 2},
    },
    "classifier": {
        "run": "runs/classifier", "diffusion": "runs/tiny",
        "data": {"source": "digits", "image_size": 32, "image_channels": 3},
        "model": {"channels": [8, 8], "groups": 4}, "train": TRAIN,
    },
    "plain": {"run": "runs/plain", "data": TEXTURES, **AUTOENCODER},
    "gan": {"run": "runs/gan", "data": TEXTURES, **AUTOENCODER, **ADVERSARY},
}  # fmt: skip
CALLS: list[tuple[str, list[str], str]] = [  # script, arguments, a file that it leaves
    ("init", ["photos"], "configs/photos/autoencoder.yaml"),
    ("train_autoencoder", ["tiny/autoencoder.yaml"], "runs/tiny/autoencoder/model/vae/config.json"),
    ("train_clip", ["tiny/clip.yaml"], "runs/tiny/text/model/text_encoder/config.json"),
    ("cache_latents", ["tiny/ldm.yaml"], "runs/tiny/latents/cache.json"),
    ("verify_resume", ["tiny/autoencoder.yaml", "--updates", "4", "--keep", "kept"], "kept/straight/status.json"),
    ("train_ldm", ["tiny/ldm.yaml"], "runs/tiny/model/model_index.json"),
    ("train", ["tiny"], "runs/tiny/status.json"),
    ("train_classifier", ["classifier.yaml"], "runs/classifier/model/classifier/config.json"),
    ("sample", ["runs/tiny", "--prompt", "a small red circle on a white background", "--steps", "2"], "images"),
    ("evaluate", ["runs/tiny", "--images", "2", "--tune", "0"], "runs/tiny/report.json"),
    (
        "sampler_report",
        ["runs/tiny", "--images", "1", "--steps", "2", "--samplers", "euler", "ddpm"],
        "runs/tiny/samplers.json",
    ),
    ("report", ["runs/tiny"], "runs/tiny/report.html"),
    ("convert", ["runs/tiny", "tiny.safetensors", "--verify"], "tiny.safetensors"),
    (
        "plot",
        ["reverse", "runs/tiny", "--prompt", "a small red circle on a white background"],
        "runs/tiny/plots/reverse.png",
    ),
    ("train_autoencoder", ["plain.yaml"], "runs/plain/status.json"),
    ("train_autoencoder", ["gan.yaml"], "runs/gan/status.json"),
    ("compare_autoencoders", ["runs/plain", "runs/gan"], "runs/comparison.png"),
]


def test_every_script_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, tree in CONFIGS.items():
        file = tmp_path / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(tree))
    (tmp_path / "photos").mkdir()
    for i in range(20):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / f"photos/{i}.png")
    for script, arguments, left in CALLS:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
        assert not stop.value.code, (script, capsys.readouterr().err)
        assert (tmp_path / left).exists(), script
    assert {script for script, _, _ in CALLS} == {file.stem for file in SCRIPTS.glob("*.py")}
