"""`ldm compare-autoencoders` on a folder of few images: what there is, or one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from support.stages import AUTOENCODER, TRAIN

from ldm.cli.main import main
from ldm.evaluation.compare_autoencoders import compare


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one name, without and with a discriminator, on ten flat images, fewer than eight for validation."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "photos").mkdir()
    for i in range(10):
        Image.new("RGB", (32, 32), (20 * i, 0, 99)).save(folder / f"photos/{i}.png")
    data = {
        "folder": str(folder / "photos"),
        "captions": "none",
        "image_size": 32,
        "validation_fraction": 0.3,
        "max_skipped": 0.5,
    }
    train = {**TRAIN, "steps": 1, "validate_every": 1, "checkpoint_every": 1}
    for kind, loss in (("plain", {}), ("gan", {**AUTOENCODER["loss"], "gan_start": 0})):
        tree = {
            "run": str(folder / kind / "run"),
            "data": data,
            "model": AUTOENCODER["model"],
            "loss": loss,
            "train": train,
        }
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(tree))
        assert main(["train-autoencoder", str(folder / f"{kind}.yaml")]) == 0
    return folder


def test_few_images_and_two_runs_of_one_name_are_compared(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    assert main(["compare-autoencoders", "plain/run", "gan/run", "--out", "both.png"]) == 0
    metrics = json.loads((runs / "both.json").read_text())
    assert list(metrics) == ["original", "plain/run", "gan/run"]  # of equal names the second would replace the first
    assert metrics["plain/run"]["high_frequency"] is None and np.isfinite(metrics["plain/run"]["psnr"])  # flat images
    assert Image.open(runs / "both.png").width > 100
    for name in ("plain/run", "gan/run"):  # training measured the same model on the same images, before folding
        *_, last = map(json.loads, (runs / name / "metrics.jsonl").read_text().splitlines())
        for metric in ("psnr", "ssim"):
            assert metrics[name][metric] == pytest.approx(last[f"validation/{metric}"], rel=1e-4)


def test_ssim_is_null_below_its_window(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    monkeypatch.setattr("ldm.evaluation.compare_autoencoders.SSIM_WINDOW", 33)
    rows = compare(Path("plain/run"), Path("gan/run"), Path("small.png"))
    assert rows["plain/run"]["ssim"] is None and np.isfinite(rows["plain/run"]["psnr"])


@pytest.mark.parametrize(
    ("out", "message"),
    [("both.yaml", "must end in .png"), ("taken.png", "taken.json, which is written with it, exists already")],
)
def test_what_is_there_is_not_overwritten(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str, message: str
) -> None:
    monkeypatch.chdir(runs)
    Path("taken.json").write_text("{}")
    assert main(["compare-autoencoders", "plain/run", "gan/run", "--out", out]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and Path("taken.json").read_text() == "{}"


def test_where_no_validation_image_can_be_read_there_is_one_line(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    for file in Path("photos").iterdir():
        file.write_bytes(b"")
    assert main(["compare-autoencoders", "plain/run", "gan/run"]) == 3
    err = capsys.readouterr().err
    assert "none of the validation images can be read" in err and err.count("\n") == 1
