"""benchmarks/search.py with commands that only write their records: shared stages, equal seconds, finished rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from support.scripts import benchmark

ROOT = Path(__file__).resolve().parents[1]
RATE = {"train-autoencoder": 20.0, "train-clip": 10.0, "train-ldm": 4.0}  # updates per second


@pytest.fixture
def search() -> ModuleType:
    return benchmark("search")


def test_rows_share_stages_and_get_equal_seconds(
    search: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[list[str]] = []

    def ldm(command: str, *arguments: str) -> None:
        called.append([command, *arguments])
        if command == "evaluate":
            found = {name: {"accuracy": 0.5} for name in ("all", "size", "colour", "shape")}
            report = {"judge": {"single": {"held_out": found}}, "settings": {"guidance_scale": 2.0}}
            report["confusion"] = {"held_out": {"star": {"star": 3, "circle": 1}}}
            (Path(arguments[0]) / "report.json").write_text(json.dumps(report))
            return
        settings = dict(argument.split("=", 1) for argument in arguments[1:])
        run, steps = Path(settings["run"]), int(settings.get("train.steps", 3000))
        (run / "model").mkdir(parents=True)
        rate = RATE[command] / (2 if "loss.kl=0.01" in arguments else 1)
        last = {"step": steps, "updates_per_second": rate, "validation/loss": 0.25}
        (run / "metrics.jsonl").write_text(json.dumps(last) + "\n")

    monkeypatch.setattr(search, "ldm", ldm)
    rows = {"as it is": {}, "AdamW": {"ldm": {"train.optimizer": "adamw"}}, "KL": {"autoencoder": {"loss.kl": 0.01}}}
    configs = {kind: f"{kind}.yaml" for kind in ("autoencoder", "text", "ldm")}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"configs": configs, "rows": rows}))
    monkeypatch.setattr(sys, "argv", ["search.py", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")])
    search.main()

    short = ["train.log_every=30" in call for call in called]
    begin, end = short.index(True), len(short) - 1 - short[::-1].index(True)
    assert all(short[begin : end + 1]) and sum(short) == 5  # 3 of the diffusion model, 2 autoencoders; nothing beside
    trained = [call for call, brief in zip(called, short, strict=True) if not brief]
    of = {command: [call for call in trained if call[0] == command] for command in (*RATE, "evaluate")}
    assert {command: len(calls) for command, calls in of.items()} == dict(zip(of, (2, 1, 3, 3), strict=True))
    steps = lambda call: [part for part in call if part.startswith("train.steps=")]  # noqa: E731
    assert sorted(map(steps, of["train-autoencoder"])) == [[], ["train.steps=1500"]]  # half as fast
    assert [steps(call) for call in of["train-ldm"]] == [["train.steps=800"]] * 3  # 200 s at 4
    assert sum('train.optimizer="adamw"' in call for call in of["train-ldm"]) == 1
    assert "| KL | 800 | 0.250 | 0.500 |" in capsys.readouterr().out
    first = (tmp_path / "out/results.jsonl").read_text()
    assert json.loads(first.splitlines()[0])["read"] == {"star": 0.75}

    called.clear()
    search.main()
    assert called == [] and (tmp_path / "out/results.jsonl").read_text() == first


def test_the_rows_of_the_project_change_settings_that_exist(search: ModuleType) -> None:
    from ldm import config

    kinds = {"autoencoder": config.AutoencoderTrainingConfig, "text": config.ClipTrainingConfig}
    kinds["ldm"] = config.DiffusionTrainingConfig
    plan = yaml.safe_load((ROOT / "benchmarks/search.yaml").read_text())
    for name, row in plan["rows"].items():
        for kind, changes in row.items():
            file = ROOT / plan["configs"][kind]
            plain = config.load(kinds[kind], file)
            changed = config.load(kinds[kind], file, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
            assert changed != plain, name


def test_an_unknown_row_is_refused(
    search: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["search.py", str(ROOT / "benchmarks/search.yaml"), "--only", "flow"])
    with pytest.raises(SystemExit):
        search.main()
    assert "no row flow: there are as it is, another seed" in capsys.readouterr().err
