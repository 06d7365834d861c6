"""The examples run as they stand, and the library's face offers what docs/library.md names."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.scripts import example
from support.stages import Stages

import ldm

ROOT = Path(__file__).resolve().parent.parent


def test_all_stages_train_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    example("train_from_python").main(str(tmp_path / "run"), 2)
    assert np.asarray(Image.open(tmp_path / "run/image-1.png")).shape == (32, 32, 3)


def test_an_own_training_step_learns(tmp_path: Path) -> None:
    step = example("own_training_step").main
    assert step(8, str(tmp_path / "a.png")) < step(1, str(tmp_path / "b.png"))
    assert Image.open(tmp_path / "a.png").width == 8 * 64


def test_labels_and_numbers_are_drawn(tmp_path: Path) -> None:
    correlation = example("labels_and_numbers").main(2, str(tmp_path / "a.png"))
    assert -1 <= correlation <= 1 and Image.open(tmp_path / "a.png").size == (8 * 48, 480)


def test_previews_end_at_the_picture(stages: Stages, tmp_path: Path) -> None:
    run, prompt = str(stages.folder / "ldm"), "a small red circle on a white background"
    example("sample_with_previews").main(run, prompt, 3, str(tmp_path / "p.png"))
    strip = np.asarray(Image.open(tmp_path / "p.png"))
    assert strip.shape == (32, 4 * 34 - 2, 3)
    assert np.array_equal(strip[:, -66:-34], strip[:, -32:])  # the last step's clean image is the sample


def test_an_image_is_encoded_and_decoded(stages: Stages, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.jpg")
    run, file = str(stages.folder / "ldm"), str(tmp_path / "red.jpg")
    quality = example("encode_and_decode").main(run, file, 32, str(tmp_path / "r.png"))
    assert np.isfinite(quality) and Image.open(tmp_path / "r.png").size == (2 * 32 + 2, 32)


def test_every_example_is_in_the_docs_and_has_help() -> None:
    names = sorted(file.name for file in (ROOT / "examples").glob("*.py"))
    page = (ROOT / "docs/library.md").read_text(encoding="utf-8")
    assert names == sorted(set(re.findall(r"examples/(\w+\.py)", page)))
    for name in names:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", [name, "--help"])
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        assert ended.value.code == 0


@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_the_code_of_the_docs_runs(page: str, stages: Stages) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    for name, small in (
        ("(64, 128)", "(32, 64)"),
        ("32, 32)", "8, 8)"),
        ("steps=20", "steps=2"),
        ("runs/demo", str(stages.folder / "ldm")),
    ):
        code = code.replace(name, small)
    exec(compile(code, page, "exec"), {})


def test_the_face_of_the_library() -> None:
    table, *_ = (ROOT / "docs/library.md").read_text(encoding="utf-8").partition("\n## ")
    cells = re.findall(r"^\| (.*?) \|", table, re.M)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert named | {"ObjectiveConfig", "__version__"} == set(ldm.__all__)
    assert all(getattr(ldm, name) is not None for name in ldm.__all__) and set(ldm.__all__) <= set(dir(ldm))
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        ldm.sampel  # noqa: B018


def test_the_module_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "ldm", "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("usage: ldm") and "draw:\n  sample " in done.stdout


def test_samples_do_not_depend_on_the_batch_and_guidance_is_that_of_the_formula() -> None:
    schedule = ldm.Schedule.named("cosine", 50)

    def model(x: torch.Tensor, t: torch.Tensor, cond: ldm.Condition) -> torch.Tensor:
        return x * 0.1 + (0 if cond.vector is None else cond.vector[:, :, None, None])

    def drawn(n: int, **options: object) -> torch.Tensor:
        return ldm.sample(model, schedule, "x0", (n, 1, 4, 4), steps=4, sampler="ddpm", **options)  # type: ignore[arg-type]

    assert torch.equal(drawn(3)[:2], drawn(2))
    one, two = ldm.Condition(vector=torch.ones(2, 1)), ldm.Condition(vector=torch.full((2, 1), 3.0))
    # ∅ + γ (c − ∅) of a model that is linear in its condition
    guided = ldm.Condition(vector=torch.full((2, 1), 1 + 2.5 * 2.0))
    assert torch.allclose(drawn(2, cond=two, null_cond=one, guidance_scale=2.5), drawn(2, cond=guided), atol=1e-6)
    with pytest.raises(ldm.ConfigError, match="needs null_cond"):
        drawn(2, cond=two, guidance_scale=2.0)
    with pytest.raises(ldm.ConfigError, match="sampler must be one of"):
        ldm.sample(model, schedule, "x0", (1, 1, 4, 4), sampler="dmp")
    with pytest.raises(ldm.ConfigError, match="overrides are for a configuration file"):
        ldm.train(object(), "train.steps=1")
