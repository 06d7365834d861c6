"""Several processes do what one does: sampling, evaluation, the latent cache, two launchers, SLURM.

None waits for a dead one.

Where real processes would add nothing, they are threads that exchange results: the commands are the same.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from PIL import Image
from safetensors.torch import load_file
from support.launches import PATIENCE, contents, launch, side_by_side  # noqa: F401
from support.stages import Stages
from torch import Tensor

from ldm.cli import main as cli
from ldm.cli.main import main
from ldm.config import ConfigError
from ldm.data import latent_cache as cache
from ldm.distributed.processes import ALONE, ElsewhereError, Processes
from ldm.errors import DataError
from ldm.pipeline.draw import draw_noise
from ldm.runs.records import read_metrics, read_status
from ldm.training.loop import Interrupted

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs/accelerate"
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


# threads in the place of processes


@pytest.mark.parametrize(("count", "n"), [(1, 5), (2, 5), (3, 6), (4, 1), (3, 0)])
def test_items_come_in_order_and_each_is_made_once(count: int, n: int) -> None:
    made: list[int] = []

    def square(mine: range) -> list[int]:
        assert len(mine) > 0
        made.extend(mine)
        return [i * i for i in mine]

    assert side_by_side(count, lambda processes: processes.over(n, square)) == [[i * i for i in range(n)]] * count
    assert sorted(made) == list(range(n))


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("error", [DataError("row 3"), ZeroDivisionError("division by zero")])
def test_a_failure_on_one_is_a_failure_on_all(failing: int, error: Exception) -> None:
    def work(processes: Processes) -> None:
        def step() -> None:
            if processes.rank == failing:
                raise error

        processes.each(step)

    raised = side_by_side(3, work)
    assert raised[failing] is error and all(caught.everywhere for caught in raised)
    for caught in raised[:failing] + raised[failing + 1 :]:
        assert isinstance(caught, ElsewhereError) and caught.exit_code == getattr(error, "exit_code", None)
        known = f"process {failing}: row 3"
        assert (
            str(caught) == known if isinstance(error, DataError) else "in step" in str(caught)
        )  # the traceback of the other


def test_one_process_alone_raises_what_was_raised() -> None:
    def fail() -> None:
        raise DataError("row 3")

    with pytest.raises(DataError, match=r"^row 3$") as caught:
        ALONE.each(fail)
    assert not caught.value.everywhere


# sampling


def about(file: Path) -> dict[str, Any]:
    """What the picture says, but for how the work was shared out."""
    drawn = json.loads(Image.open(file).text["ldm"])  # type: ignore[attr-defined]
    return {k: v for k, v in drawn.items() if k != "drawn"}


def assert_same_pictures(one: Path, other: Path) -> None:
    """Names, metadata, and pixels within 1 of 255."""
    names = sorted(f.name for f in one.iterdir())
    assert names == sorted(f.name for f in other.iterdir()) and "grid-00000.png" in names
    for name in names:
        a, b = (np.asarray(Image.open(folder / name)).astype(int) for folder in (one, other))
        assert a.shape == b.shape and np.abs(a - b).max() <= 1, name
        assert about(one / name) == about(other / name)


SAMPLING = [
    "--prompt",
    "a red circle",
    "--prompt",
    "a blue star",
    "--count",
    "2",
    "--sampler",
    "ddpm",
    "--steps",
    "3",
    "--seed",
    "5",
]


@pytest.mark.parametrize("count", [2, 3, 6])  # four images
def test_who_draws_an_image_changes_neither_its_noise_nor_its_file(
    stages: Stages, tmp_path: Path, launch: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    noises: list[dict[tuple[str, int], Tensor]] = []
    original = draw_noise

    def recorded(seed: int, name: str, numbers: Any, shape: tuple[int, ...], device: Any) -> Tensor:
        noise = original(seed, name, numbers, shape, device)
        for number, of_one in zip(numbers, noise, strict=True):
            assert (name, number) not in noises[-1]  # each image is drawn once
            noises[-1][name, number] = of_one
        return noise

    monkeypatch.setattr("ldm.pipeline.pipeline.draw_noise", recorded)
    for processes, out in ((1, "one"), (count, "many")):
        noises.append({})
        assert (
            launch(processes, "sample", str(stages.folder / "ldm"), *SAMPLING, "--out", str(tmp_path / out))
            == [0] * processes
        )
    one, many = noises
    assert one.keys() == many.keys() and {n for name, n in one if name == "x_T"} == {0, 1, 2, 3}
    assert all(torch.equal(one[key], many[key]) for key in one)
    assert_same_pictures(tmp_path / "one", tmp_path / "many")


def test_the_numbers_of_the_files_are_agreed(
    stages: Stages, tmp_path: Path, launch: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter((10, 20, 30))  # as if the folder had changed while the processes looked
    monkeypatch.setattr("ldm.cli.sample._first_number", lambda out: next(found))
    assert launch(3, "sample", str(stages.folder / "ldm"), *SAMPLING, "--out", str(tmp_path)) == [0, 0, 0]
    numbers = sorted(int(f.name[:5]) for f in tmp_path.glob("[0-9]*.png"))
    assert len(numbers) == 4 and numbers[3] - numbers[0] == 3


def test_a_device_by_number_is_refused_where_each_process_has_its_own(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sample", str(stages.folder / "ldm"), "--prompt", "x", "--device", "cuda:1"]) == 2
    assert capsys.readouterr().err.startswith("ldm sample: --device cuda:1 with 2 processes: ")


# evaluation


def report(run: Path) -> dict[str, Any]:
    return {k: v for k, v in json.loads((run / "report.json").read_text()).items() if k != "seconds"}


EVALUATION = ["--images", "7", "--tune", "3", "--batch-size", "2"]


def test_a_report_does_not_depend_on_how_many_make_it(
    stages: Stages, launch: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, written, shown, reports, drawn = stages.folder / "ldm", [], [], [], []
    original = draw_noise

    def recorded(seed: int, name: str, numbers: Any, shape: tuple[int, ...], device: Any) -> Tensor:
        drawn.extend((seed, number) for number in numbers if name == "x_T")
        return original(seed, name, numbers, shape, device)

    monkeypatch.setattr("ldm.pipeline.pipeline.draw_noise", recorded)
    monkeypatch.setattr("ldm.evaluation.figures.plots.curves", lambda *arguments: written.append("curves"))
    monkeypatch.setattr(
        "ldm.evaluation.figures.plots.captioned",
        lambda images, captions, *rest, **more: shown.append((images, captions)),
    )
    for count in (1, 3, 8):
        assert launch(count, "evaluate", str(run), *EVALUATION) == [0] * count
        reports.append(report(run))
        assert sorted(drawn) == sorted(
            [*((1000, i) for i in range(14)), *[(1001, i) for i in range(3)] * 5]
        )  # two splits of 7, 5 scales
        drawn.clear()
    assert reports[0] == reports[1] == reports[2] and len(written) == len(shown) == 3
    assert reports[0]["judge"]["single"]["held_out"]["all"]["n"] == 7 and len(reports[0]["tuned_on_seen"]) == 5
    assert reports[0]["autoencoder"]["psnr"] == round(reports[0]["autoencoder"]["psnr"], 2)
    for images, captions in shown:
        assert captions == shown[0][1] and images.shape == (7, 32, 32, 3)
        assert np.abs(images.astype(int) - shown[0][0].astype(int)).max() <= 1


# the latent cache


@pytest.mark.parametrize("count", [2, 3, 9])
def test_a_cache_is_the_same_to_the_last_bit(
    stages: Stages, tmp_path: Path, launch: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(cache, "SHARD", 5)  # 24 images: five shards, the last with four
    for processes, run in ((1, "one"), (count, "many")):
        assert (
            launch(processes, "cache-latents", str(stages.folder / "ldm.yaml"), f"run={tmp_path / run}")
            == [0] * processes
        )
    one = contents(tmp_path / "one/latents")
    assert one == contents(tmp_path / "many/latents") and len(one) == 5 + 2
    assert [f.name for f in (tmp_path / "many").iterdir()] == ["latents"]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_cache_that_one_process_cannot_write_leaves_nothing(
    stages: Stages, tmp_path: Path, launch: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    monkeypatch.setattr(cache, "SHARD", 4)  # six shards: two rounds of three
    original = cache._write_shard

    def fail(folder: Path, number: int, *rest: Any) -> Any:
        if number == 3 + failing:
            raise DataError("image 7")
        return original(folder, number, *rest)

    monkeypatch.setattr(cache, "_write_shard", fail)
    assert launch(3, "cache-latents", str(stages.folder / "ldm.yaml"), f"run={tmp_path / 'run'}") == [3, 3, 3]
    assert list((tmp_path / "run").iterdir()) == []


# what a person reads

GONE = "another process has ended: its own line, if it could write one, says why"
SILENT = "another process has not answered for 5 s: it hangs, or its work takes longer than that"


@pytest.mark.parametrize(
    ("rank", "error", "code", "err", "waits"),
    [
        (0, ConfigError("wrong"), 2, "ldm sample: wrong\n", 0),
        (
            1,
            ConfigError("wrong"),
            2,
            "ldm sample (process 1): wrong\n",
            1,
        ),  # had the main one failed too, this would not be reached
        (1, Interrupted("saved"), 75, "", 0),
        (0, Interrupted("saved"), 75, "ldm sample: saved\n", 0),
        (1, ElsewhereError("process 0: wrong", 3), 3, "", 0),
        (1, ElsewhereError("process 0: Traceback", None), 1, "", 0),
        (0, RuntimeError("Connection closed by peer [::1]"), 1, f"ldm sample: {GONE}\n", 0),
        (
            0,
            RuntimeError("unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete"),
            1,
            f"ldm sample: {SILENT}\n",
            0,
        ),
        (
            1,
            RuntimeError("wait timeout after 5000ms, keys: /default_pg/0//cpu//0/1"),
            1,
            f"ldm sample (process 1): {SILENT}\n",
            1,
        ),
    ],
)
def test_who_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: int,
    error: Exception,
    code: int,
    err: str,
    waits: int,
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    slept: list[float] = []
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr("ldm.pipeline.info.ModelInfo.read", fail)
    assert main(["sample", "run"]) == code
    assert capsys.readouterr().err == err and slept == [cli.GRACE] * waits


def test_usage_and_help_are_said_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    assert capsys.readouterr().out == "" and not slept
    with pytest.raises(SystemExit):
        main(["sample"])
    assert slept == [cli.GRACE]


# real processes


SEVERAL = """
import json, os, sys
from ldm.cli import main as cli
from ldm.data import latent_cache as cache

cache.SHARD = 5
leave, cli._leave_process_group = cli._leave_process_group, lambda together: None  # one meeting for all commands
assert [cli.main(command) for command in json.loads(sys.argv[1])] == [0, 0, 0]
leave(False)
cli.exit_process(0)
"""


def test_two_processes_sample_evaluate_and_cache_as_one_does(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SHARD", 5)
    run, reports = str(stages.folder / "ldm"), []

    def commands(out: Path) -> list[list[str]]:
        caching = ["cache-latents", str(stages.folder / "ldm.yaml"), f"run={out}/run"]
        return [["sample", run, *SAMPLING, "--out", f"{out}/images"], ["evaluate", run, *EVALUATION], caching]

    assert [main(command) for command in commands(tmp_path / "one")] == [0, 0, 0]
    reports.append(report(stages.folder / "ldm"))
    (stages.folder / "ldm/report.json").unlink()
    (tmp_path / "several.py").write_text(SEVERAL)
    done = subprocess.run(
        [*TORCHRUN, str(tmp_path / "several.py"), json.dumps(commands(tmp_path / "two"))],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same_pictures(tmp_path / "one/images", tmp_path / "two/images")
    assert report(stages.folder / "ldm") == reports[0]
    assert contents(tmp_path / "one/run/latents") == contents(tmp_path / "two/run/latents")
    said = ("images/ from 00000", "encoding 24 images", "judge.single.seen.all")
    assert [done.stdout.count(words) for words in said] == [1, 1, 1]
    assert done.stdout.startswith("2/2\n")  # the main process's share of four images


FAULT = """
import os, sys
from ldm.data import latent_cache as cache
from ldm.errors import DataError

def damaged(*arguments):
    raise DataError("images/7.png is damaged")

cache.SHARD = 5
if os.environ["RANK"] == "1":
    cache.prepare = damaged
from ldm.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_fault_of_one_process_is_one_line_and_the_end_of_both(stages: Stages, tmp_path: Path) -> None:
    (tmp_path / "fault.py").write_text(FAULT)
    config = ["--config_file", str(CONFIGS / "one-node.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    command = [*ACCELERATE, *config, str(tmp_path / "fault.py"), "cache-latents", str(stages.folder / "ldm.yaml")]
    done = subprocess.run(
        [*command, f"run={tmp_path}/run"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1
    assert re.findall("^.*ldm cache-latents.*$", done.stderr, re.MULTILINE) == [
        "ldm cache-latents: process 1: images/7.png is damaged"
    ]
    assert "cache.py" not in done.stderr  # no traceback of ours
    assert list((tmp_path / "run").iterdir()) == []


def free_port() -> int:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def assert_same_weights(run: Path, other: Path) -> None:
    one, two = (load_file(folder / "model/unet/diffusion_pytorch_model.safetensors") for folder in (run, other))
    assert one.keys() == two.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=0, atol=1e-4, msg=name)


def test_two_machines_train_as_one_process_does(stages: Stages, tmp_path: Path) -> None:
    config = [
        "--config_file",
        str(CONFIGS / "two-nodes.yaml"),
        "--num_processes",
        "2",
        "--main_process_ip",
        "127.0.0.1",
    ]
    config += ["--main_process_port", str(free_port())]
    training = [str(ROOT / "scripts/train_ldm.py"), str(stages.folder / "ldm.yaml"), f"run={tmp_path}/run"]
    machines = [
        subprocess.Popen(
            [*ACCELERATE, *config, "--machine_rank", str(n), *training],
            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for n in (0, 1)
    ]  # fmt: skip
    try:
        (out, err), (out1, err1) = (machine.communicate(timeout=PATIENCE) for machine in machines)
    finally:
        for machine in machines:
            machine.terminate()  # handed on to what it started
    assert [machine.returncode for machine in machines] == [0, 0], err + err1
    assert "global batch 4 = 2 processes × 2 × 1 accumulation" in out and out1 == ""
    assert_same_weights(stages.folder / "ldm", tmp_path / "run")


# what srun and scontrol do for slurm.sh: start the tasks and hand the signal on; name the nodes and note what is
# requeued
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
echo $$ > srun.pid
worst=0
for task in "${tasks[@]}"; do
    wait "$task"; code=$?
    while kill -0 "$task" 2> /dev/null; do wait "$task"; code=$?; done  # a signal ends a wait
    ((code > worst)) && worst=$code
done
exit $worst
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$*" > requeued; fi
"""


def test_a_preempted_slurm_job_saves_and_is_queued_again(stages: Stages, tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": str(free_port() % 10000),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "PYTHON": sys.executable,
    }
    training = [
        str(ROOT / "scripts/train_ldm.py"),
        str(stages.folder / "ldm.yaml"),
        f"run={tmp_path}/run",
        "train.steps=100000",
    ]
    job = subprocess.Popen(
        ["bash", str(CONFIGS / "slurm.sh"), *training],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**ENVIRONMENT, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, start_new_session=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + PATIENCE
        while job.poll() is None and len(read_metrics(tmp_path / "run")) < 3 and time.monotonic() < end:
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)  # the script, and the step
        os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
        out, err = job.communicate(timeout=PATIENCE)
    finally:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 75, err
    assert "2 processes × 2" in out and err.count("stopped and saved at update") == 1 and "(process" not in err
    assert (read_status(tmp_path / "run") or {})["state"] == "interrupted"
    assert (tmp_path / "requeued").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"


# accelerate's configuration files


@pytest.mark.parametrize(
    ("name", "machines", "processes"), [("one-gpu", 1, 1), ("one-node", 1, 8), ("two-nodes", 2, 16)]
)
def test_accelerate_reads_its_configurations(name: str, machines: int, processes: int) -> None:
    settings = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert isinstance(settings, ClusterConfig) and (settings.num_machines, settings.num_processes) == (
        machines,
        processes,
    )
    assert settings.mixed_precision == "no" and not settings.use_cpu  # train.mixed_precision decides
    assert settings.distributed_type == ("NO" if processes == 1 else "MULTI_GPU")
    assert (settings.main_process_ip is not None) == (machines > 1)


def test_every_accelerate_configuration_is_tested() -> None:
    assert sorted(file.stem for file in CONFIGS.glob("*.yaml")) == ["one-gpu", "one-node", "two-nodes"]
