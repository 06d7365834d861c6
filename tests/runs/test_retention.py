"""Which checkpoints stay, which are newest, and which one a start continues from; on all processes alike."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import checkpoints
from support.checkpoints import updates

from ldm.config import ConfigError, ScheduleConfig, TrainConfig
from ldm.distributed.processes import ElsewhereError, Processes
from ldm.errors import CheckpointError
from ldm.runs.checkpoints import folder as shelf
from ldm.runs.checkpoints import resume
from ldm.runs.checkpoints.files import require_fit, save
from ldm.runs.checkpoints.folder import newest_valid, step_of
from ldm.runs.checkpoints.resume import agreed, choose, set_aside

CONFIG = ScheduleConfig()


def written(folder: Path, *updates: int, **retention: Any) -> list[Path]:
    return [
        save(folder, step, {"model": {"w": torch.full((4,), float(step))}}, {"step": step}, CONFIG, **retention)
        for step in updates
    ]


def flip(checkpoint: Path) -> None:
    checkpoints.flip(checkpoint / "model.safetensors")


# retention


def test_multiples_of_keep_every_stay_for_good_and_do_not_count(tmp_path: Path) -> None:
    written(tmp_path, *range(10, 130, 10), keep=2, keep_every=40)
    assert updates(tmp_path) == [40, 80, 100, 110, 120]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sets(st.integers(1, 60), min_size=1),
    st.integers(2, 4),
    st.none() | st.integers(2, 9),
    st.sets(st.integers(1, 60)),
)
def test_retention_in_general(
    tmp_path_factory: pytest.TempPathFactory, there: set[int], keep: int, every: int | None, broken: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("shelf")
    for step in there:
        (folder / f"step-{step:08d}").mkdir()
    stay = {step_of(p) for p in shelf.retained(folder, keep, every, lambda p: step_of(p) not in broken)}
    for_good = {s for s in there if every is not None and s % every == 0}
    counted = sorted(there - for_good - broken)
    assert for_good <= stay and set(counted[-keep:]) <= stay and not set(counted[:-keep]) & stay
    if len(counted) <= keep:  # a damaged one goes with those that are older than what is kept, and no sooner
        assert not broken & there - for_good - stay or len(counted) == keep


def test_damaged_ones_do_not_count(tmp_path: Path) -> None:
    flip(written(tmp_path, 1, 2, 3, keep=3)[-1])
    written(tmp_path, 4, keep=2)
    assert updates(tmp_path) == [2, 3, 4]


def test_the_settings_are_checked() -> None:
    assert TrainConfig(checkpoint_every=10, keep_every=40).keep_every == 40
    for wrong, message in (
        ({"checkpoint_every": 10, "keep_every": 45}, "keep_every 45 is not a multiple of checkpoint_every 10"),
        ({"keep_every": 0}, "keep_every must lie between 1"),
        ({"save_errors": "ignore"}, "save_errors must be one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            TrainConfig(**wrong)  # type: ignore[arg-type]


# the newest, and the one that was asked for


def test_the_newest_is_the_highest_valid_number_and_no_other_name(tmp_path: Path) -> None:
    small, large = written(tmp_path, 9, 10)
    (tmp_path / "step-99999999").mkdir()  # cut off by another tool
    for name in ("step-00000010.bak", "last", "step-11", "best"):
        shutil.copytree(large, tmp_path / name)
    (large / "extra").write_bytes(b"")
    shutil.copystat(large, small)
    path, problems = choose(tmp_path)
    assert path == large and len(problems) == 1 and "step-99999999" in problems[0]
    assert choose(tmp_path / "none") == (None, [])


def test_more_digits_are_more(tmp_path: Path) -> None:
    written(tmp_path, 99_999_999, 100_000_000)
    assert newest_valid(tmp_path)[0] == tmp_path / "step-100000000"


def test_where_none_is_intact_a_run_does_not_start_over(tmp_path: Path) -> None:
    for path in written(tmp_path, 1, 2):
        flip(path)
    with pytest.raises(
        CheckpointError,
        match=r"none of its 2 checkpoints is intact: .*step-00000002.*sha256.*step-00000001.*restore a copy",
    ):
        choose(tmp_path)


def test_the_one_that_was_asked_for_or_none(tmp_path: Path) -> None:
    folder, other = tmp_path / "run/checkpoints", tmp_path / "other/checkpoints"
    one, two, _ = written(folder, 1, 2, 3, keep=3)
    (foreign,) = written(other, 2)
    assert (
        choose(folder, "2") == (two, [])
        and choose(folder, str(one)) == (one, [])
        and choose(folder, f"{two}/") == (two, [])
    )
    flip(two)
    for asked, message in (
        ("2", r"asked for is damaged: .*sha256"),
        ("7", r"no checkpoint of update 7 in .*: there are 1, 2, 3"),
        (str(folder / "step-00000009"), "no checkpoint .*step-00000009"),
        (str(foreign), r"is not a checkpoint of this run .*init:"),
        (str(folder), r"is not a checkpoint of this run"),
    ):
        with pytest.raises(CheckpointError, match=message):
            choose(folder, asked)
    with pytest.raises(CheckpointError, match="there is none"):
        choose(tmp_path / "none", "1")


def test_later_ones_are_set_aside(tmp_path: Path) -> None:
    one, *_ = written(tmp_path, 1, 2, 3, keep=3)
    assert set_aside(one) == f"set aside in {tmp_path}/set-aside-1: the checkpoints of updates 2, 3"
    assert choose(tmp_path) == (one, []) and updates(tmp_path / "set-aside-1") == [2, 3]
    assert set_aside(one) is None
    written(tmp_path, 4)
    assert set_aside(one) == f"set aside in {tmp_path}/set-aside-2: the checkpoints of update 4"
    with pytest.raises(CheckpointError, match="has been set aside: move it back"):
        choose(tmp_path, str(tmp_path / "set-aside-1/step-00000003"))


# several processes, here threads


here = threading.local()  # .rank


def side_by_side(count: int, folder: Path, asked: str | None) -> list[Any]:
    """What ``agreed`` returns, or raises, on each of ``count`` threads that exchange results as processes do."""
    barrier, slots = threading.Barrier(count, timeout=60), [None] * count

    def run(rank: int) -> Any:
        here.rank = rank

        def gather(value: Any) -> list[Any]:
            slots[rank] = value
            barrier.wait()
            values = list(slots)
            barrier.wait()
            return values

        try:
            return agreed(Processes(rank, count, gather), folder, asked, lambda _: None)
        except (CheckpointError, ElsewhereError) as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_all_take_what_the_main_one_chooses(tmp_path: Path) -> None:
    one, two = written(tmp_path, 1, 2)
    assert side_by_side(3, tmp_path, None) == [two] * 3
    assert side_by_side(3, tmp_path, "1") == [one] * 3
    assert side_by_side(2, tmp_path / "none", None) == [None] * 2
    for error in side_by_side(2, tmp_path, "5"):
        assert error.exit_code == 4 and error.everywhere and "no checkpoint of update 5" in str(error)


@pytest.mark.parametrize(
    ("function", "seen", "message"),
    [
        (
            "check",
            ["manifest.json: cannot be read"],
            "manifest.json: cannot be read: every process must see the run directory",
        ),
        ("file_hash", "another", "is another checkpoint than on the main process"),
    ],
)
def test_one_that_does_not_see_it_is_an_error_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, seen: Any, message: str
) -> None:
    written(tmp_path, 1)
    original = getattr(resume, function)
    monkeypatch.setattr(resume, function, lambda *args, **more: seen if here.rank == 1 else original(*args, **more))
    for error in side_by_side(3, tmp_path, None):
        assert error.exit_code == 4 and error.everywhere and message in str(error)


def test_a_network_that_does_not_fit_is_named_from_the_headers(tmp_path: Path) -> None:
    (path,) = written(tmp_path, 1)
    require_fit(path, {"model": {"w": torch.empty(4)}})
    for named, message in (
        ({"w": torch.empty(5)}, "w is of shape 4 there and of shape 5 in this model"),
        ({"w": torch.empty(4), "x": torch.empty(1)}, "x is missing there and of shape 1"),
        ({}, "w is of shape 4 there and missing in this model"),
    ):
        with pytest.raises(CheckpointError, match=message):
            require_fit(path, {"model": named})
    with pytest.raises(CheckpointError, match=r"other\.safetensors: cannot be read"):
        require_fit(path, {"other": {}})
