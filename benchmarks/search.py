"""Compare settings of the demo at equal training time, by the strict judge: what each change is worth.

python benchmarks/search.py benchmarks/search.yaml                   every row, two at a time on two cores
python benchmarks/search.py benchmarks/search.yaml --only eps x0     these rows

A row names the settings of the autoencoder, the text encoder and the diffusion model in which it differs from the
file's configurations, and from the file's `base`, which holds settings of every row. First every row is timed by short
runs, with as many rows at a time as will train, and one thread each; nothing else may run meanwhile ("timed" is printed
when that is over). A diffusion model then gets as many updates as fit into --seconds, an autoencoder that differs as
many as fit into the time of the unchanged one. Rows share stages that are equal. Finished rows are not repeated:
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
INPUTS = {"autoencoder": (), "text": (), "ldm": ("autoencoder", "text")}
TRIAL = 60  # updates of a run that is timed, of which the second half counts
NEVER = 10**6

Changes = Mapping[str, Any]
Row = Mapping[str, Changes]  # by stage


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

    def run(self, kind: str, row: Row) -> Path:
        """Where a stage of this row is, named by all that it is made from."""
        made = {each: [self.configs[each], self.changes(each, row)] for each in (*INPUTS[kind], kind)}
        return self.root / f"{kind}-{hashlib.sha256(json.dumps(made).encode()).hexdigest()[:8]}"

    def changes(self, kind: str, row: Row) -> Changes:
        return {**self.base.get(kind, {}), **row.get(kind, {})}

    def timed(self, kind: str, row: Row) -> bool:
        """Whether this stage is trained for a time: not the text encoder, nor the autoencoder that rows share."""
        return kind == "ldm" or (kind == "autoencoder" and self.run(kind, row) != self.run(kind, {}))

    def stage(self, kind: str, row: Row, trial: bool = False) -> Path:
        """The finished run of a stage of this row; with ``trial`` a short run of it that tells its rate."""
        run = self.run(kind, row)
        target = run.with_name(f"{run.name}-timed") if trial else run
        with self.guard:
            lock = self.locks.setdefault(target, Lock())
        with lock:
            if not (target / "model").exists():
                settings = [f"{name}={json.dumps(value)}" for name, value in self.changes(kind, row).items()]
                inputs = (f"{each}={self.stage(each, row, trial and self.timed(each, row))}" for each in INPUTS[kind])
                if trial or self.timed(kind, row):
                    updates = TRIAL if trial else self.updates(kind, row)
                    quiet = (f"train.{name}={NEVER}" for name in ("validate_every", "sample_every", "checkpoint_every"))
                    settings += [f"train.steps={updates}", *quiet]
                if trial:
                    settings += [f"train.log_every={TRIAL // 2}", "train.validation_size=1"]
                ldm(COMMANDS[kind], self.configs[kind], f"run={target}", *inputs, *settings)
        return target

    def rate(self, kind: str, row: Row) -> float:
        """Updates a second."""
        return logged(self.stage(kind, row, trial=True))[-1]["updates_per_second"]

    def updates(self, kind: str, row: Row) -> int:
        """As many as fit into the time of this stage."""
        seconds = self.seconds
        if kind == "autoencoder":
            seconds = logged(self.stage(kind, {}))[-1]["step"] / self.rate(kind, {})
        return max(TRIAL, round(self.rate(kind, row) * seconds))

    def time(self, row: Row) -> None:
        """Make the short runs that this row needs."""
        for kind in COMMANDS:
            if self.timed(kind, row):
                self.rate(kind, row)
        if self.timed("autoencoder", row):
            self.rate("autoencoder", {})

    def judged(self, name: str, row: Row, images: int) -> dict[str, Any]:
        """Train and evaluate one row."""
        run = self.stage("ldm", row)
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
    parser.add_argument(
        "--only-time", action="store_true", help="stop when every row is timed; the same command goes on"
    )
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
    rows = {name: plan["rows"][name] or {} for name in options.only or plan["rows"] if name not in done}

    def work(name: str) -> None:
        result = bench.judged(name, rows[name], options.images)
        results.append(result)
        with file.open("a") as lines:
            lines.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        if rows:  # the stages that rows share, at once; then the times, with nothing beside them but another row's
            list(pool.map(lambda kind: bench.stage(kind, {}), ("autoencoder", "text")))
            list(pool.map(bench.time, [{}, *rows.values()]))
            print("timed", flush=True)
        if options.only_time:
            return
        list(pool.map(work, rows))
    print(table(results))


if __name__ == "__main__":
    main()
