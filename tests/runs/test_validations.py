"""The rule of the best validation: which it is, when a rise is noticed, and the same read back from metrics.jsonl."""

import json
import math
from pathlib import Path

import pytest

from ldm import config as configuration
from ldm.cli.main import main
from ldm.config import ConfigError, DiffusionTrainingConfig, Figure
from ldm.runs.best import BestValidation, best_logged, forget_best

LOSS, PSNR = Figure("loss"), Figure("psnr", higher=True)


def follow(figure: Figure, values: list[float | None], error: float | None = 0.5) -> tuple[BestValidation, list[int]]:
    """The best of validations after updates 10, 20, …, and the updates at which a rise began."""
    best, rises = BestValidation(), []
    for step, value in enumerate(values, start=1):
        had_risen = best.risen
        assert best.add(figure, 10 * step, value, error) == (best.step == 10 * step)
        rises += [10 * step] * (best.risen and not had_risen)
    return best, rises


@pytest.mark.parametrize(
    ("values", "step", "waited", "rises"),
    [
        ([3.0], 10, 0, []),
        ([3.0, 2.0, 1.0], 30, 0, []),
        ([3.0, 1.0, 1.0, 1.0], 20, 2, []),  # equal is neither better nor worse
        ([1.0, 1.5, 1.5, 1.5, 1.5], 10, 4, []),  # by one standard error: noise
        ([1.0, 1.6, 1.6], 10, 2, []),
        ([1.0, 1.6, 1.6, 1.6], 10, 3, [40]),
        ([1.0, 1.6, 1.6, 1.2, 1.6, 1.6], 10, 5, []),  # not in a row
        ([1.0, 1.6, 1.6, 1.6, 1.2, 1.6, 1.6, 1.6, 1.6], 10, 8, [40]),  # once
        ([1.0, 1.6, 1.6, 1.6, 0.9, 1.5, 1.5, 1.5], 50, 3, [40, 80]),  # a rise from another best is another
        ([math.nan, 1.0, None, math.inf, 1.1], 20, 1, []),  # what is not finite counts for nothing
    ],
)
def test_a_rise_is_noticed_once_and_noise_is_none(
    values: list[float | None], step: int, waited: int, rises: list[int]
) -> None:
    best, found = follow(LOSS, values)
    assert (best.step, best.value, best.waited, found) == (step, values[step // 10 - 1], waited, rises)
    turned = [None if value is None else -value for value in values]
    best, found = follow(PSNR, turned)  # where higher is better
    assert (best.step, best.value, best.waited, found) == (step, turned[step // 10 - 1], waited, rises)


def test_the_state_goes_through_json_at_every_moment() -> None:
    values, best = [3.0, 1.0, 1.6, 1.6, 1.6, 1.2, 1.6, 0.5, 2.0], BestValidation()
    for step, value in enumerate(values, start=1):
        best = BestValidation.of(json.loads(json.dumps(best.state())))
        best.add(LOSS, step, value, 0.5)
        assert best == best_logged(
            LOSS,
            [{"step": i, "validation/loss": v, "validation/loss_error": 0.5} for i, v in enumerate(values[:step], 1)],
        )
    assert best == BestValidation(8, 0.5, 0.5, waited=1, worse=1)
    with pytest.raises(KeyError):
        BestValidation.of({"step": 1})


def test_lines_without_the_figure_or_its_error_are_read_too() -> None:
    logged = [
        {"step": 1, "loss": 0.1}, {"step": 2, "validation/loss": 4.0}, {"step": 3, "validation/loss": None},
        {"step": 4, "validation/loss": 4.1, "validation/loss_error": None},
    ]  # fmt: skip
    assert best_logged(LOSS, logged) == BestValidation(2, 4.0, 0.0, waited=1, worse=1)
    assert best_logged(PSNR, logged) == BestValidation()


def test_a_kept_model_of_a_later_update_is_forgotten(tmp_path: Path) -> None:
    forget_best(tmp_path / "best", 0)  # there is none
    (tmp_path / "best").mkdir()
    (tmp_path / "best/best.json").write_text('{"step": 30}')
    forget_best(tmp_path / "best", 30)
    assert (tmp_path / "best").is_dir()
    forget_best(tmp_path / "best", 29)
    assert list(tmp_path.iterdir()) == []


AUTOENCODER = {"run": "r", "data": {"source": "shapes"}}
DIFFUSION = {**AUTOENCODER, "autoencoder": "none", "text": "none"}


@pytest.mark.parametrize(
    ("kind", "tree", "figure"),
    [
        ("AutoencoderTrainingConfig", {}, PSNR),
        ("AutoencoderTrainingConfig", {"loss": {"lpips": 1.0}}, Figure("lpips")),
        ("AutoencoderTrainingConfig", {"loss": {"lpips": 1.0, "lpips_weights": "random"}}, PSNR),
        ("AutoencoderTrainingConfig", {"loss": {"lpips": 1.0, "gan": 0.5}}, Figure("lpips")),
        ("AutoencoderTrainingConfig", {"loss": {"gan": 0.5}}, None),
        ("ClipTrainingConfig", {}, Figure("retrieval_top1", higher=True)),
        ("DiffusionTrainingConfig", {}, LOSS),
        ("DiffusionTrainingConfig", {"schedule": {"name": "learned"}}, None),
        ("ClassifierTrainingConfig", {"data": {"source": "digits"}, "diffusion": "d"}, LOSS),
    ],
)
def test_each_stage_has_its_figure_or_refuses_to_choose_by_one(kind: str, tree: dict, figure: Figure | None) -> None:
    cls = getattr(configuration, kind)
    tree = {**(DIFFUSION if kind.startswith("Diffusion") else AUTOENCODER), **tree}
    assert configuration.build(cls, tree).figure == figure
    for name, value in (("keep_best", True), ("patience", 3)):
        wanted = {**tree, "train": {name: value}}
        if figure is None:
            with pytest.raises(ConfigError, match=f"^train.{name}: .*: leave it out$"):
                configuration.build(cls, wanted)
        else:
            configuration.build(cls, wanted)


def test_status_and_report_tell_the_best_of_the_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    configuration.save(
        configuration.build(DiffusionTrainingConfig, {**DIFFUSION, "run": str(run)}), run / "config.yaml"
    )
    losses = {10: 2.0, 20: 1.0, 30: 1.6, 40: 1.6, 50: 1.7}
    lines = [{"step": k, "validation/loss": v, "validation/loss_error": 0.5} for k, v in losses.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reason = "ended by train.patience: none of the last 3 validations was better than loss 1 ± 0.5 at update 20"
    status = {"state": "done", "step": 50, "steps": 100, "seconds": 7.0, "waited": 3, "reason": reason}
    (run / "status.json").write_text(json.dumps(status))
    told = "loss 1 ± 0.5 at update 20 (worse in 3 validations since)"
    assert main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    assert said == (f"{run}: done, update 50 of 100 (50 %), 7 s, best validation {told}, no checkpoint; {reason}\n")
    assert main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"] == told
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert told in page and reason in page and "kept in best/" not in page
    (run / "config.yaml").write_text("damaged: [")
    assert main(["status", str(run)]) == 0 and "best validation" not in capsys.readouterr().out
