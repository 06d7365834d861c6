"""Compare settings of the demo at equal training time, by the strict judge: what each change is worth.

python benchmarks/search.py benchmarks/search.yaml                   every row, two at a time on two cores
python benchmarks/search.py benchmarks/search.yaml --only eps x0     these rows

A row names the settings of the autoencoder, the text encoder and the diffusion model in which it differs from the
file's configurations, and from the file's `base`, which holds settings of every row. A diffusion model is timed by a
short run and then given as many updates as fit into --seconds; an autoencoder that differs likewise, with the seconds
that the unchanged one took. Rows share stages that are equal. Every command has one thread, so two rows train side by
side without disturbing each other; beside other work the table means nothing. Finished rows are not repeated:
results.jsonl of --out keeps them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import yaml

COMMANDS = {"autoencoder": "train-autoencoder", "text": "train-clip", "ldm": "train-ldm"}
TRIAL = 40  # updates of the run that is timed
NEVER = 10**6

Changes = Mapping[str, Any]


def ldm(*arguments: str) -> None:
    """Run a command of ldm with one thread. Raises RuntimeError with its words if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "ldm", *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ldm {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")


@dataclass
class Bench:
    """Trains each stage once, under ``root``, whatever number of rows needs it.

    ``seconds``: the training time of a diffusion model. ``base``: changes of every row, by stage.
    """

    configs: Mapping[str, str]
    root: Path
    seconds: float
    base: Mapping[str, Changes] = field(default_factory=dict)
    locks: dict[Path, Lock] = field(default_factory=dict)
    guard: Lock = field(default_factory=Lock)

    def stage(self, kind: str, changes: Changes, *inputs: str) -> Path:
        """The finished run of a stage with these changes."""
        every = {**self.base.get(kind, {}), **changes}
        settings = [*inputs, *(f"{name}={json.dumps(value)}" for name, value in every.items())]
        digest = hashlib.sha256("\n".join([self.configs[kind], *settings]).encode()).hexdigest()[:8]
        run = self.root / f"{kind}-{digest}"
        with self.guard:
            lock = self.locks.setdefault(run, Lock())
        with lock:
            if not (run / "model").exists():
                if kind == "ldm":
                    settings += self.steps(kind, settings, run, self.seconds)
                elif kind == "autoencoder" and changes:
                    status = self.stage(kind, {}) / "status.json"
                    settings += self.steps(kind, settings, run, json.loads(status.read_text())["seconds"])
                ldm(COMMANDS[kind], self.configs[kind], f"run={run}", *settings)
        return run

    def steps(self, kind: str, settings: list[str], run: Path, seconds: float) -> list[str]:
        """The updates that fit into the seconds, as settings."""
        trial = run.with_name(f"{run.name}-timed")
        quiet = [f"train.{name}={NEVER}" for name in ("validate_every", "sample_every", "checkpoint_every")]
        short = [f"train.steps={TRIAL}", f"train.log_every={TRIAL // 2}", "train.validation_size=1", *quiet]
        ldm(COMMANDS[kind], self.configs[kind], f"run={trial}", *settings, *short)
        rate = logged(trial)[-1]["updates_per_second"]
        return [f"train.steps={max(TRIAL, round(rate * seconds))}", *quiet]

    def row(self, name: str, row: Mapping[str, Changes], images: int) -> dict[str, Any]:
        """Train and evaluate one row."""
        autoencoder = self.stage("autoencoder", row.get("autoencoder", {}))
        text = self.stage("text", row.get("text", {}))
        run = self.stage("ldm", row.get("ldm", {}), f"autoencoder={autoencoder}", f"text={text}")
        ldm("evaluate", str(run), "--images", str(images))
        report, last = json.loads((run / "report.json").read_text()), logged(run)[-1]
        (scores,) = report["judge"].values()
        split = list(scores)[-1]  # held out, where there is such a split
        right = {attribute: share["accuracy"] for attribute, share in scores[split].items()}
        read = {asked: seen.get(asked, 0) / sum(seen.values()) for asked, seen in report["confusion"][split].items()}
        return {
            "name": name, "updates": last["step"], "validation loss": last["validation/loss"], "right": right,
            "guidance": report["settings"]["guidance_scale"], "read": read,
        }  # fmt: skip


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, the best row first."""
    attributes = ["all", *(name for name in results[0]["right"] if name != "all")]
    titles = ["change", "updates", "validation loss", *attributes]
    lines = [f"| {' | '.join(titles)} |", f"| {' | '.join('---' for _ in titles)} |"]
    for result in sorted(results, key=lambda result: -result["right"]["all"]):
        shares = (f"{result['right'][name]:.3f}" for name in attributes)
        values = (result["name"], f"{result['updates']:,}", f"{result['validation loss']:.3f}", *shares)
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of rows")
    parser.add_argument("--seconds", type=float, default=200, help="training of the diffusion model (default 200)")
    parser.add_argument("--images", type=int, default=800, help="judged for each set of captions (default 800)")
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time (default 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/search"))
    options = parser.parse_args()
    plan = yaml.safe_load(options.file.read_text())
    if unknown := set(options.only or ()) - plan["rows"].keys():
        parser.error(f"no row {', '.join(sorted(unknown))}: there are {', '.join(plan['rows'])}")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    bench = Bench(plan["configs"], options.out, options.seconds, base=plan.get("base", {}))
    done = {result["name"] for result in results}

    def work(name: str) -> None:
        result = bench.row(name, plan["rows"][name] or {}, options.images)
        results.append(result)
        with file.open("a") as lines:
            lines.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)

    wanted = [name for name in options.only or plan["rows"] if name not in done]
    with ThreadPoolExecutor(options.jobs) as pool:
        if wanted:  # both at once, since every row waits for them
            list(pool.map(lambda kind: bench.stage(kind, {}), ("autoencoder", "text")))
        list(pool.map(work, wanted))
    print(table(results))


if __name__ == "__main__":
    main()
