"""Call the commands with damaged and odd input, and judge exit code, error line and files of each.

  python tests/fuzz.py --calls 2000        (`make fuzz`)
  python tests/fuzz.py --case 0:137        call 137 of seed 0 again, with all that it says

Call i of a seed depends on both alone: its kind, a fresh copy of small examples with one of them damaged
(`fuzz_inputs.py`), and a command that reads it. It runs in a process of its own, with limits on time and memory.
Faults are a traceback, a hang, an end by a signal, an exit code that is not documented for the kind, more or less than
one line for refused input, files written although the input is refused, and files changed by a command that only
reads. Where a change does not alter the meaning of the input, the result must be that for the original input.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}

from fuzz_calls import Outcome, carried_out, command_line
from fuzz_examples import DRAW, Call, build_examples
from fuzz_inputs import KINDS, pipeline
from PIL import Image

import ldm

ANSWERS = {
    "status": {1, 3, 4, 5, 75, 130},
    "reproduce": {1},
    "replay": {1},
    "checkpoints": {4},
}  # exit codes that are no refusals
READ_ONLY = {"init", "sample", "reproduce", "inspect", "convert", "status", "diff", "checkpoints", "python"}
AT_WORK = re.compile(r"^(\d+/\d+|global batch)", re.MULTILINE)  # training and drawing may take their time


def result(outcome: Outcome) -> dict[str, str]:
    """What a call gave: pixels of pictures, bytes of other files, logged figures, and what it printed but times."""
    found = (
        {"stdout": re.sub(r"[\d.]+ s\b|updates_per_second\W+[\d.e+]+", "", outcome.stdout)}
        if not outcome.changed
        else {}
    )
    for name in outcome.left:
        picture = name.endswith(".png")
        found[name] = hashlib.sha256(Image.open(name).tobytes() if picture else Path(name).read_bytes()).hexdigest()
    for name in outcome.changed:
        if name.endswith("metrics.jsonl"):
            last = json.loads(Path(name).read_text().splitlines()[-1])
            found |= {key: str(value) for key, value in last.items() if key != "updates_per_second"}
    return found


def faults(call: Call, outcome: Outcome, other: Sequence[str] = ()) -> list[str]:
    """Faults of an answer. ``other``: unexpected differences from the result for the original input."""
    name, code, lines = call.argv[0] if call.argv else "", outcome.code, outcome.lines
    if code is None:
        return [] if AT_WORK.search(outcome.stdout) else [f"hangs: {innermost(outcome.stderr)}"]
    if "Traceback" in outcome.stderr:
        return [f"traceback: {innermost(outcome.stderr)}"]
    if code < 0:
        return [f"ended by signal {-code}"]
    found = [
        f"says on stderr: {line[:200]}" for line in lines if not re.match(rf"ldm( {re.escape(name)})?( .*)?: ", line)
    ][:1]
    if code == 0:
        found += [f"exit code 0 with an error line: {line[:200]}" for line in lines if not found]
        found += ["accepted, though it is wrong"] if call.refused else []
        found += [f"another result: {', '.join(other)}"] if other else []
    elif code not in ANSWERS.get(name, ()):
        found += [f"exit code {code}, none of {call.codes}"] if code not in call.codes else []
        found += [f"{len(lines)} lines where one should be: {lines[:3]}"] if len(lines) != 1 else []
        found += [f"written though refused: {outcome.left[0]}"] if outcome.left else []
        found += [f"{call.names} is not named: {line[:200]}" for line in lines[:1] if call.names not in line.lower()]
    return found + ([f"changes {outcome.changed[0]}"] if outcome.changed and name in READ_ONLY else [])


def innermost(stderr: str) -> str:
    """The last place of ours in a traceback, or in faulthandler's, and the error."""
    places = re.findall(r'File "[^"]*?/((?:ldm|autoencoder)/[^"]+)", line (\d+),? in (\w+)', stderr)
    errors = [line for line in stderr.splitlines() if re.match(r"\w[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    if not places:
        return stderr[-200:].strip()
    file, line, function = places[0 if "most recent call first" in stderr else -1]
    return f"{file}:{line} {function}: {errors[-1][:160] if errors else ''}"


@contextmanager
def fresh(examples: Path, keep: bool = False) -> Iterator[None]:
    """A copy of the examples as the current folder."""
    place = Path(tempfile.mkdtemp(prefix="call-", dir=examples.parent)) / "here"
    shutil.copytree(examples, place)
    os.chdir(place)
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    try:
        yield
    finally:
        os.chdir("/")
        if not keep:
            shutil.rmtree(place.parent, ignore_errors=True)


@cache
def expected(examples: Path, argv: tuple[str, ...]) -> dict[str, str]:
    """The result of a command on the examples as they are."""
    with fresh(examples):
        outcome = carried_out(Call("", list(argv), ()))
        if outcome.code:
            raise RuntimeError(f"{argv} fails on good input: {outcome.stderr}")
        return result(outcome)


def kind_of(number: int) -> str:
    return list(KINDS)[number % len(KINDS)]


def case(examples: Path, seed: int, number: int, keep: bool = False) -> tuple[Call, Outcome, list[str]]:
    """Call ``number`` of a seed, and what is wrong with its answer."""
    with fresh(examples, keep):
        call = KINDS[kind_of(number)](random.Random(f"{seed} {number}"))
        outcome = carried_out(call)
        compared = call.same and outcome.code == 0
        given = result(outcome) if compared else {}
    wanted = expected(examples, tuple(call.argv)) if compared else {}
    other = [key for key in {**given, **wanted} if given.get(key) != wanted.get(key)]
    return dataclasses.replace(call, python=None), outcome, faults(call, outcome, other)  # a function passes no pipe


def warm_up(examples: Path) -> None:
    """In a worker: import what the commands import when they run, and open the pipeline, once for all its calls."""
    for module in pkgutil.walk_packages(ldm.__path__, "ldm."):
        importlib.import_module(module.name)
    with fresh(examples), redirect_stdout(io.StringIO()):
        pipeline()
        for argv in (["sample", "run", *DRAW], ["init", "images", "--out", "init"], ["report", "run", "--images", "0"]):
            command_line.main(argv)


def built(folder: Path) -> Path:
    """The examples, made by a process of its own: one that has trained should not be forked."""
    (examples := folder / "examples").mkdir()
    maker = multiprocessing.get_context("fork").Process(target=build, args=(examples,))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise RuntimeError("the examples cannot be built")
    return examples


def build(examples: Path) -> None:
    """Make the examples in a folder, silently."""
    os.chdir(examples)
    with redirect_stdout(io.StringIO()):
        build_examples()


def cause(fault: str) -> str:
    """A fault without details: of a traceback the place and the error's type, else the first words."""
    place = re.match(r"(traceback|hangs): \S+ \w+: [\w.]*", fault)
    return place[0] if place else " ".join(fault.split()[:7])[:100]


def _case(task: tuple[Path, int, int]) -> tuple[int, Call, Outcome, list[str]]:
    return task[2], *case(*task)


def fuzz(examples: Path, arguments: argparse.Namespace) -> int:
    """Make all calls, and print the faults as they come and, by cause, at the end."""
    begun, seed = time.monotonic(), arguments.seed
    calls, refused, causes = Counter[str](), Counter[str](), dict[str, list[str]]()
    numbers = [number for number in range(arguments.calls) if not arguments.only or kind_of(number) in arguments.only]
    with multiprocessing.get_context("fork").Pool(arguments.jobs, warm_up, (examples,)) as pool:
        for number, call, outcome, found in pool.imap(_case, [(examples, seed, number) for number in numbers]):
            kind = kind_of(number)
            calls[kind] += 1
            refused[kind] += bool(outcome.code)
            for fault in found:
                causes.setdefault(cause(fault), []).append(f"{seed}:{number}")
                print(
                    f"{seed}:{number}  {kind}: {call.what}\n    ldm {' '.join(call.argv)[:300]}\n    {fault}",
                    flush=True,
                )
            if time.monotonic() - begun > arguments.seconds:
                print(f"stopped after {arguments.seconds:g} s (--seconds)")
                break
    for kind in calls:
        print(f"{kind:10s}{calls[kind]:6d} calls, {refused[kind]} refused")
    print(f"seed {seed}: {calls.total()} calls in {time.monotonic() - begun:.0f} s, faults of {len(causes)} causes")
    for fault, where in sorted(causes.items(), key=lambda item: -len(item[1])):
        print(f"{len(where):5d}  {fault}  ({' '.join(where[:3])})")
    return int(bool(causes))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="(default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    parser.add_argument(
        "--seconds", type=float, default=3600, help="after which no further call is made (default 3600)"
    )
    parser.add_argument("--only", choices=KINDS, nargs="+", default=[], metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--jobs", type=int, default=2, help="calls at the same time (default 2)")
    parser.add_argument("--case", metavar="SEED:NUMBER", help="this call alone; its folder is kept")
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        examples = built(folder)
        return (
            fuzz(examples, arguments)
            if arguments.case is None
            else show(examples, *map(int, arguments.case.split(":")))
        )
    finally:
        if arguments.case is None:
            shutil.rmtree(folder, ignore_errors=True)


def show(examples: Path, seed: int, number: int) -> int:
    """One call, all that it says, and what is wrong with it."""
    warm_up(examples)
    call, outcome, found = case(examples, seed, number, keep=True)
    command = shlex.join(["ldm", *call.argv])
    print(f"{kind_of(number)}: {call.what}\n{command}\nexit code {outcome.code}\n{outcome.stdout}{outcome.stderr}")
    print("\n".join(found) or "as it should be", f"in {examples.parent}", sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
