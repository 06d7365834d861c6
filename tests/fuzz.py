"""Call the commands with damaged and odd input, and judge each answer: its exit code, its one line, what it leaves behind.

  python tests/fuzz.py --calls 2000        (`make fuzz`)
  python tests/fuzz.py --case 0:137        call 137 of seed 0 again, with all that it says

Call i of a seed is a function of both alone: its kind, a fresh copy of small examples with one of them damaged (`fuzz_inputs.py`),
and a command that reads it. It runs in a process of its own, with limits on time and memory. A fault is a traceback, a
hang, an end by a signal, an exit code that is not documented for the kind, more or less than one line where the input is
refused, and files that are written though it is or that are changed by a command that only reads. Where a change of the
input alters nothing that it says, the answer must be that to the input as it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}

from fuzz_inputs import DRAW, KINDS, Call, build_examples, pipeline
from PIL import Image

import ldm
from ldm.cli import main as command_line

LIMIT = 15.0  # seconds of a processor for a call, which may have to wait for it four times as long
MEMORY = 3 << 30  # bytes of address space beyond those of the process that calls
ANSWERS = {
    "status": {1, 3, 4, 5, 75, 130},
    "reproduce": {1},
    "replay": {1},
    "checkpoints": {4},
}  # exit codes that are no refusals
READ_ONLY = {"init", "sample", "reproduce", "inspect", "convert", "status", "diff", "checkpoints", "python"}
AT_WORK = re.compile(r"^(\d+/\d+|global batch)", re.MULTILINE)  # training and drawing may take their time


@dataclass(frozen=True)
class Outcome:
    """What became of a call."""

    code: int | None  # None: ended for its time; negative: by a signal
    stdout: str
    stderr: str
    left: tuple[str, ...] = ()  # files where there should be none after a refusal
    changed: tuple[str, ...] = ()  # files of the input that are not as they were

    @property
    def lines(self) -> list[str]:
        """What was said on stderr, without warnings."""
        return [line for line in self.stderr.splitlines() if line.strip() and not line.startswith("warning: ")]


def limited(call: Call, output: tuple[int, int]) -> None:
    """In the process that is there for one call: make it, and end with its exit code."""
    os.setsid()
    for descriptor, target in enumerate((os.open("/dev/null", os.O_RDONLY), *output)):
        os.dup2(target, descriptor)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), call.encoding, write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), call.encoding, "backslashreplace", write_through=True)
    faulthandler.register(signal.SIGUSR2)
    signal.alarm(int(8 * LIMIT))  # where nobody is left to end it
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    sys.dont_write_bytecode = True  # a full disk would leave half of it
    if call.disk is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (call.disk, call.disk))
    code = 1
    try:
        code = answer(call)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def answer(call: Call) -> int:
    """The exit code of a command; of a call of the library that of its error, or 0 and its pictures under out/."""
    try:
        if call.python is None:
            return command_line.main(call.argv)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pictures = call.python()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if (code := getattr(error, "exit_code", None)) is None:
            raise
        print(f"ldm python: {error}", file=sys.stderr)
        return code
    Path("out").mkdir()
    for i, picture in enumerate(pictures):
        picture.save(f"out/{i}.png")
    return 0


def carried_out(call: Call) -> Outcome:
    """Make a call in the current folder, in a process of its own, and end it when its time is over."""
    before, pipes = stamps(), (os.pipe(), os.pipe())
    pid = os.fork()
    if pid == 0:
        limited(call, (pipes[0][1], pipes[1][1]))
    said = [Said(*pipe) for pipe in pipes]
    limit, status = time.monotonic() + 4 * LIMIT, None
    while status is None and time.monotonic() < limit and spent(pid) < LIMIT:
        done, found = os.waitpid(pid, os.WNOHANG)
        status = found if done else None
        for one in said:
            one.read()
        time.sleep(0.005)
    if status is None:
        os.kill(pid, signal.SIGUSR2)  # says where it is
        time.sleep(0.2)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # its data workers as well
    code = os.waitstatus_to_exitcode(status) if status is not None else os.waitpid(pid, 0) and None
    stdout, stderr = (one.end() for one in said)
    after = stamps()
    left = tuple(name for name in after if any(Path(name).is_relative_to(place) for place in call.out))
    changed = tuple(
        n for n in {**before, **after} if not n.startswith("out") and before.get(n) != after.get(n) and (n in before or n not in call.argv)
    )
    return Outcome(code, stdout, stderr, left, changed)


def spent(pid: int) -> float:
    """Seconds of a processor that a process has used."""
    user, system = Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Said:
    """What comes out of a pipe."""

    def __init__(self, reader: int, writer: int) -> None:
        os.close(writer)
        os.set_blocking(reader, False)
        self.reader, self.content = reader, b""

    def read(self) -> None:
        with suppress(BlockingIOError):
            while part := os.read(self.reader, 1 << 16):
                self.content += part

    def end(self) -> str:
        self.read()
        os.close(self.reader)
        return self.content.decode("utf-8", "replace")


def stamps() -> dict[str, tuple[int, int]]:
    """Size and time of each file below the current folder."""
    found = {}
    for folder, _, names in os.walk("."):
        for path in (os.path.normpath(os.path.join(folder, name)) for name in names if name != ".lock"):
            about = os.lstat(path)
            found[path] = about.st_size, about.st_mtime_ns
    return found


def result(outcome: Outcome) -> dict[str, str]:
    """What a call gave: pixels of pictures, bytes of other files, logged figures, and what it printed but times."""
    found = {"stdout": re.sub(r"[\d.]+ s\b|updates_per_second\W+[\d.e+]+", "", outcome.stdout)} if not outcome.changed else {}
    for name in outcome.left:
        picture = name.endswith(".png")
        found[name] = hashlib.sha256(Image.open(name).tobytes() if picture else Path(name).read_bytes()).hexdigest()
    for name in outcome.changed:
        if name.endswith("metrics.jsonl"):
            last = json.loads(Path(name).read_text().splitlines()[-1])
            found |= {key: str(value) for key, value in last.items() if key != "updates_per_second"}
    return found


def faults(call: Call, outcome: Outcome, other: Sequence[str] = ()) -> list[str]:
    """What is wrong with an answer. ``other``: what differs from the result for the input as it was, though it should not."""
    name, code, lines = call.argv[0] if call.argv else "", outcome.code, outcome.lines
    if code is None:
        return [] if AT_WORK.search(outcome.stdout) else [f"hangs: {innermost(outcome.stderr)}"]
    if "Traceback" in outcome.stderr:
        return [f"traceback: {innermost(outcome.stderr)}"]
    if code < 0:
        return [f"ended by signal {-code}"]
    found = [f"says on stderr: {line[:200]}" for line in lines if not re.match(rf"ldm( {re.escape(name)})?( .*)?: ", line)][:1]
    if code == 0:
        found += [f"exit code 0 with an error line: {line[:200]}" for line in lines if not found]
        found += ["accepted, though it is wrong"] if call.refused else []
        found += [f"another result: {', '.join(other)}"] if other else []
    elif code not in ANSWERS.get(name, ()):
        found += [f"exit code {code}, none of {call.codes}"] if code not in call.codes else []
        found += [f"{len(lines)} lines where one should be: {lines[:3]}"] if len(lines) != 1 else []
        found += [f"written though refused: {outcome.left[0]}"] if outcome.left else []
        found += [f"{call.names} is not named: {line[:200]}" for line in lines[:1] if call.names not in line]
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
    """A fault without what may differ from call to call: of a traceback the place and the error's type, else the first words."""
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
    parser.add_argument("--seconds", type=float, default=3600, help="after which no further call is made (default 3600)")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=[], metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--jobs", type=int, default=2, help="calls at the same time (default 2)")
    parser.add_argument("--case", metavar="SEED:NUMBER", help="this call alone; its folder is kept")
    arguments = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        examples = built(folder)
        return fuzz(examples, arguments) if arguments.case is None else show(examples, *map(int, arguments.case.split(":")))
    finally:
        if arguments.case is None:
            shutil.rmtree(folder, ignore_errors=True)


def show(examples: Path, seed: int, number: int) -> int:
    """One call, all that it says, and what is wrong with it."""
    warm_up(examples)
    call, outcome, found = case(examples, seed, number, keep=True)
    print(f"{kind_of(number)}: {call.what}\n{shlex.join(['ldm', *call.argv])}\nexit code {outcome.code}\n{outcome.stdout}{outcome.stderr}")
    print("\n".join(found) or "as it should be", f"in {examples.parent}", sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
