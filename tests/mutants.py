"""Plant errors in the code one at a time; the tests named beside each must find it: `make mutants`.

    python tests/mutants.py [--jobs 2] [WORD …]     those whose file or description has one of the words

The table is `tests/planted.py`. Nothing is changed in place: each process works on its own copy of the tree. The
named tests must first pass on the unchanged copy; an error then counts as caught if one of its tests fails. Exit code 1
if an error survives, or if tests could not be run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("autoencoder", "ldm", "tests", "configs", "docs", "scripts", "pyproject.toml", "README.md", "Makefile")
LIBRARIES = (  # loaded once, before any fork: they take most of a short test
    "accelerate", "diffusers.schedulers", "diffusers.models",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "hypothesis", "matplotlib.figure", "pytest", "scipy.stats", "torch", "transformers.models.clip.modeling_clip",
)  # fmt: skip
LONGEST = 600  # seconds; a loop without end is an error that was found
CAUGHT, SURVIVED, NOT_RUN = "caught", "SURVIVED", "NOT RUN"
_tree: Path  # of this process, where it is one of several


def _place(name: str) -> str:
    """The test file of that name, in whichever room it stands."""
    found = next((ROOT / "tests").rglob(f"test_{name}.py"), ROOT / f"tests/test_{name}.py")
    return found.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Mutant:
    """One planted error.

    Attributes:
        error: what is wrong then, for a reader.
        file: in which, from the root of the tree.
        text, planted: what stands there, exactly once, and what is put in its place.
        tests: one or several that should fail, as `objective` or `objective::test_name` of tests/.
    """

    error: str
    file: str
    text: str
    planted: str
    tests: str

    def wrong(self, root: Path) -> str | None:
        """Why it cannot be planted in the tree at ``root``; None: it can."""
        if not (root / self.file).is_file():
            return f"{self.file} is not there"
        content = (root / self.file).read_text(encoding="utf-8")
        if (count := content.count(self.text)) != 1:
            return f"{self.file}: {self.text!r} is there {count} times"
        if self.text == self.planted:
            return f"{self.file}: {self.text!r} is not changed"
        compile(content.replace(self.text, self.planted), self.file, "exec")
        for test in self.paths:
            file, _, name = test.partition("::")
            there = (root / file).read_text(encoding="utf-8") if (root / file).is_file() else ""
            if not there or (name and f"def {name.split('[')[0]}(" not in there):
                return f"{test} is not there"
        return None

    @property
    def paths(self) -> list[str]:
        """The tests as pytest takes them."""
        pairs = (test.partition("::") for test in self.tests.split())
        return [_place(file) + (f"::{name}" if name else "") for file, _, name in pairs]


def table() -> list[Mutant]:
    """All of `tests/planted.py`."""
    from planted import PLANTED

    return [
        Mutant(error, file, text, planted, tests)
        for file, rows in PLANTED.items()
        for error, text, planted, tests in rows
    ]


def copied(root: Path, folder: Path) -> Path:
    """A copy of what the tests need of the tree at ``root``."""
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (root / name).is_file():
            shutil.copy2(root / name, folder / name)
    return folder


def tested(tree: Path, tests: Iterable[str], first: bool = True) -> tuple[int, str]:
    """pytest's exit code on the tests in ``tree``, in a fork, and which failed; ``first``: it stops at the first."""
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *(["-x"] if first else []), *tests]
    with NamedTemporaryFile() as output:
        process = get_context("fork").Process(target=_pytest, args=(tree, arguments, output.name))
        process.start()
        process.join(LONGEST)
        if process.exitcode is None:
            process.kill()
            return 1, f"longer than {LONGEST} s"
        said = Path(output.name).read_text(encoding="utf-8", errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", said, re.MULTILINE)
    return process.exitcode, " ".join(failed) or " ".join(said.split()[-12:])


def _pytest(tree: Path, arguments: list[str], output: str) -> None:
    """Be pytest, started in ``tree``; of this project nothing is imported before."""
    import pytest

    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)  # of what tests start
    sys.path[:] = [str(tree), *(place for place in sys.path if place not in ("", str(ROOT), str(ROOT / "tests")))]
    sys.modules.pop("planted", None)
    os._exit(int(pytest.main(arguments)))


def _put(file: Path, content: bytes) -> None:
    """Write a module, and drop its bytecode, which Python tells apart by second and size alone."""
    file.write_bytes(content)
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
        compiled.unlink()


def judged(mutant: Mutant, tree: Path) -> tuple[str, str]:
    """What the tests made of the error, planted in ``tree`` for as long as they run; and which failed."""
    file = tree / mutant.file
    before = file.read_bytes()
    _put(file, before.decode().replace(mutant.text, mutant.planted).encode())
    try:
        code, said = tested(tree, mutant.paths)
    finally:
        _put(file, before)
    return {0: SURVIVED, 1: CAUGHT}.get(code, NOT_RUN), said


def run(mutants: list[Mutant], root: Path, jobs: int) -> Iterator[tuple[Mutant, str, str, float]]:
    """Plant every one: with the verdict, what the tests said, and the seconds that it took."""
    fork, trees = get_context("fork"), get_context("fork").SimpleQueue()
    with TemporaryDirectory(prefix="mutants-") as folder:
        for i in range(jobs):
            trees.put(copied(root, Path(folder) / str(i)))
        with ProcessPoolExecutor(jobs, fork, _take_tree, (trees,)) as pool:
            yield from pool.map(_judged_there, mutants)


def _take_tree(trees: SimpleQueue[Path]) -> None:
    global _tree
    _tree = trees.get()


def _judged_there(mutant: Mutant) -> tuple[Mutant, str, str, float]:
    started = time.monotonic()
    return mutant, *judged(mutant, _tree), time.monotonic() - started


def sound(mutants: list[Mutant], root: Path) -> str | None:
    """Why the mutants cannot be judged (one cannot be planted, or a test fails without any), or None."""
    if problems := [wrong for mutant in mutants if (wrong := mutant.wrong(root))]:
        return "\n".join(problems)
    tests = {test for mutant in mutants for test in mutant.paths}
    wanted = sorted(test for test in tests if "::" not in test or test.split("::")[0] not in tests)
    with TemporaryDirectory(prefix="mutants-") as folder:
        code, said = tested(copied(root, Path(folder)), wanted, first=False)
    return None if code == 0 else f"without any error planted: {said}"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("words", nargs="*", help="plant only what has one of these in its file or description")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    given = parser.parse_args(arguments)
    mutants = [m for m in table() if not given.words or any(word in f"{m.file} {m.error}" for word in given.words)]
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}  # as tests/conftest.py has them
    for library in LIBRARIES:
        importlib.import_module(library)
    if (problem := sound(mutants, ROOT)) is not None:
        print(problem)
        return 1
    print(f"{len(mutants)} errors; without one, all of their tests pass", flush=True)
    verdicts: list[str] = []
    for mutant, verdict, said, seconds in run(mutants, ROOT, given.jobs):
        verdicts.append(verdict)
        print(f"{verdict:8}  {seconds:4.0f} s  {mutant.file}: {mutant.error}  [{said}]", flush=True)
    print(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in (CAUGHT, SURVIVED, NOT_RUN)))
    return int(verdicts.count(CAUGHT) < len(verdicts))


if __name__ == "__main__":
    sys.exit(main())
