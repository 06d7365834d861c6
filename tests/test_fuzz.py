"""`make fuzz` finds planted faults, its calls depend on their number alone, and a few of each kind pass."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fuzz
import fuzz_calls
import pytest
from fuzz_calls import carried_out
from fuzz_examples import Call
from fuzz_inputs import KINDS
from fuzz_oddities import oddly, written


def raises(argv: list[str]) -> int:
    raise RecursionError(f"maximum depth in {argv}")


def hangs(argv: list[str]) -> int:
    time.sleep(60)
    return 0


def turns(argv: list[str]) -> int:
    while True:
        pass


def hangs_at_work(argv: list[str]) -> int:
    print("3/9000")
    return hangs(argv)


def accepts(argv: list[str]) -> int:
    return 0


def refuses(code: int, *lines: str) -> Callable[[list[str]], int]:
    def refuse(argv: list[str]) -> int:
        print("\n".join(lines), file=sys.stderr)
        return code

    return refuse


def writes(argv: list[str]) -> int:
    Path("out").mkdir()
    Path("out/0.png").touch()
    return refuses(2, "ldm sample: no")(argv)


def overwrites(argv: list[str]) -> int:
    Path("kept").write_text("other")
    return 0


def writes_where_told(argv: list[str]) -> int:
    Path(argv[2], "unet").mkdir(parents=True)
    Path(argv[2], "unet/config.json").touch()
    return 0


def writes_into_its_input(argv: list[str]) -> int:
    Path("run/new").touch()
    return 0


def eats(argv: list[str]) -> int:
    return len(bytearray(8 << 30)) % 2


def unprintable(argv: list[str]) -> int:
    print("\ud800")
    return 0


@pytest.mark.parametrize(
    ("command", "refused", "fault"),
    [
        (accepts, False, None),
        (refuses(2, "warning: cut", "ldm sample: no such model"), True, None),
        (hangs_at_work, False, None),
        (raises, False, "traceback: "),
        (hangs, False, "hangs: "),
        (turns, False, "hangs: "),
        (eats, False, "traceback: "),
        (unprintable, False, "traceback: "),
        (accepts, True, "accepted, though it is wrong"),
        (refuses(0, "ldm sample: no such model"), False, "exit code 0 with an error line"),
        (refuses(1, "ldm sample: no such model"), False, "exit code 1, none of"),
        (refuses(2), False, "0 lines where one should be"),
        (refuses(2, "ldm sample: no", "ldm sample: such"), False, "2 lines where one should be"),
        (refuses(2, "no such model"), False, "says on stderr: no such model"),
        (writes, False, "written though refused: out/0.png"),
        (overwrites, False, "changes kept"),
        (writes_where_told, False, None),
        (writes_into_its_input, False, "changes run/new"),
    ],
)
def test_planted_faults_are_found(
    command: Callable[[list[str]], int],
    refused: bool,
    fault: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz_calls.command_line, "main", command)
    monkeypatch.setattr(fuzz_calls, "LIMIT", 0.4)
    Path("kept").write_text("as it was")
    Path("run").mkdir()
    Path("run/config.yaml").touch()
    call = Call("", ["sample", "run", "data.size=x"], (2, 3), refused)
    found = fuzz.faults(call, carried_out(call))
    assert found == [] if fault is None else [one for one in found if one.startswith(fault)], found


def test_a_result_that_should_be_the_same_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draws(argv: list[str]) -> int:
        Path("out").mkdir()
        Path("out/0.txt").write_text(Path("seed").read_text())
        return 0

    examples = tmp_path / "examples"
    examples.mkdir()
    (examples / "seed").write_text("1")
    monkeypatch.setattr(fuzz_calls.command_line, "main", draws)
    for text, fault in (("1", []), ("2", ["another result: out/0.txt"])):
        monkeypatch.setitem(
            KINDS,
            "command",
            lambda draw, text=text: Path("seed").write_text(text) and Call("", ["sample"], (), same=True),
        )
        assert fuzz.case(examples, 0, list(KINDS).index("command"))[2] == fault
    assert [place.name for place in tmp_path.iterdir()] == ["examples"]  # what is copied is removed


def test_a_limit_on_files_is_one_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz_calls.command_line, "main", lambda argv: Path("file").write_bytes(bytes(2000)) and 0)
    assert carried_out(Call("", ["x"], ())).code == 0
    assert "File too large" in carried_out(Call("", ["x"], (), disk=1000)).stderr


def test_trees_are_changed_by_the_seed_alone_and_hold_what_no_tree_can() -> None:
    def changed(seed: int) -> tuple[str, bytes]:
        tree = {"a": [1, {"b": "c"}], "d": None, "e": 2.5}
        return oddly(random.Random(seed), tree), written(tree)

    several = [changed(seed) for seed in range(300)]
    assert several == [changed(seed) for seed in range(300)] and len(set(several)) > 150
    assert any(b"9" * 5000 in text for _, text in several) and any(b"[" * 5000 in text for _, text in several)
    assert any(text.count(b'"e"') == 2 for _, text in several)


def test_a_few_calls_are_answered_well(tmp_path: Path) -> None:
    """In a process of its own, since the type checks of the tests would answer before the commands do."""
    command = [sys.executable, "tests/fuzz.py", "--calls", str(len(KINDS)), "--seed", "1", "--jobs", "1"]
    environment = {"PYTHONPATH": ".", "TMPDIR": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0 and "faults of 0 causes" in done.stdout, done.stdout + done.stderr
    assert all(f"{kind:10s}     1 calls" in done.stdout for kind in KINDS)
    assert not list(tmp_path.glob("fuzz-*"))
