"""Training that starts from given weights, whole or by LoRA: what must fit, what is exported, and exact resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from support.cut_runs import assert_same_end, at_position, power_cut
from support.interrupts import PowerCut
from support.model_folders import forget_hashes
from support.stages import DIFFUSION, STUDENT, TRAIN, Stages

from ldm.cli.main import main
from ldm.config import DistillConfig, UNetConfig, load_run
from ldm.data.dataset import collate
from ldm.diffusion.condition import Condition
from ldm.diffusion.consistency import Distillation
from ldm.diffusion.guidance import Guidance
from ldm.interop.intact import write_hashes
from ldm.interop.lora import FILE
from ldm.pipeline import Pipeline
from ldm.training.ema import EMA
from ldm.training.stages.diffusion import DiffusionTask
from ldm.training.stages.distillation import DistillationTask
from ldm.training.task import AVERAGE

STEPS = 6
SCALE = 4.0 / 2  # α/r of the LoRA


@pytest.fixture(scope="module")
def runs(stages: Stages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each trained once without interruption from `init`.

    A fine-tuned U-Net (`whole`), a LoRA (`lora`), a student of the model (`student`), and one by LoRA (`student-lora`).
    """
    folder = tmp_path_factory.mktemp("initial")
    lora = {"lora": {"rank": 2, "alpha": 4.0, "targets": ["to_q", "to_v", "conv1"]}}
    for name, more in (("whole", {}), ("lora", lora), ("student", {}), ("student-lora", lora)):
        tree = {
            **DIFFUSION,
            "autoencoder": f"{stages.folder}/autoencoder",
            "text": f"{stages.folder}/clip",
            "init": f"{stages.folder}/ldm",
        }
        tree |= STUDENT if name.startswith("student") else {}
        tree["train"] = {**TRAIN, **more, "lr": 5e-3}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"run": str(folder / name), **tree}))
        assert train(folder, name) == 0
    return folder


def train(folder: Path, name: str, *overrides: str) -> int:
    return main(["train-ldm", str(folder / f"{name}.yaml"), *overrides])


class Silent:
    def __call__(self, text: str) -> None:
        """Nothing."""


def out(unet: torch.nn.Module, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, width)))
    with torch.no_grad():
        return unet(x, torch.tensor([10, 800]), Condition(context=context))


# ---------------------------------------------------------------- what is trained


def test_training_starts_at_the_given_weights(stages: Stages, runs: Path, tmp_path: Path) -> None:
    given = Pipeline.from_pretrained(stages.folder / "ldm", "cpu").unet
    for name in ("whole", "lora"):
        settings: Any = load_run(runs / name)
        task = DiffusionTask.from_config(_with(settings, run=str(tmp_path / name)), Silent())
        if name == "whole":
            assert (
                float((out(task.trained.unet) - out(given)).abs().max()) > 1e-3
            )  # random until no checkpoint is found
        task.initialize()
        assert torch.equal(out(task.networks["unet"]), out(given))
        assert all(p.requires_grad for p in task.networks["unet"].parameters())


def test_a_lora_trains_its_own_parameters_alone_and_checkpoints_are_small(stages: Stages, runs: Path) -> None:
    base = Pipeline.from_pretrained(stages.folder / "ldm", "cpu")
    opened = Pipeline.from_pretrained(runs / "lora", "cpu")
    assert all(torch.equal(v, base.unet.state_dict()[name]) for name, v in opened.unet.state_dict().items())
    assert float((out(opened.unet) - out(base.unet)).abs().max()) > 1e-4
    last = runs / f"lora/checkpoints/step-{STEPS:08d}"
    held = {name: load_file(last / f"{name}.safetensors") for name in ("model_unet", "ema", "optimizer_unet")}
    assert held["model_unet"].keys() == held["ema"].keys() and all(".lora_" in name for name in held["model_unet"])
    numbers = sum(v.numel() for v in held["model_unet"].values())
    assert numbers < 0.15 * sum(p.numel() for p in base.unet.parameters())
    assert sum(v.numel() for v in held["optimizer_unet"].values()) == 2 * numbers + len(
        held["model_unet"]
    )  # two moments and the step
    written = load_file(runs / "lora/model" / FILE)
    assert {name.removeprefix("unet."): value for name, value in written.items()}.keys() == held["ema"].keys()
    for name, value in written.items():  # the average, α/r in B
        assert torch.equal(value, held["ema"][name.removeprefix("unet.")] * (SCALE if ".lora_B." in name else 1))
    assert any(not torch.equal(value, held["model_unet"][name]) for name, value in held["ema"].items())
    assert sorted(f.name for f in (runs / "lora/model").iterdir()) == ["lora.json", FILE]


def test_validation_sees_the_lora(runs: Path) -> None:
    """Its figures differ from those of the base, which training left as it was."""
    settings: Any = load_run(runs / "lora")
    task = DiffusionTask.from_config(settings, Silent())
    task.to(torch.device("cpu"))
    with torch.no_grad():
        base = task.validate(0, lambda x: x, 0, 1)["loss"]
        lora = task.networks["unet"]
        lora.load_state_dict(load_file(runs / f"lora/checkpoints/step-{STEPS:08d}/ema.safetensors"))
        trained = task.validate(0, lambda x: x, 0, 1)["loss"]
    logged = [json.loads(line) for line in (runs / "lora/metrics.jsonl").read_text().splitlines()][-1][
        "validation/loss"
    ]
    assert trained == pytest.approx(logged, rel=1e-6) and abs(base - trained) > 1e-6


@pytest.mark.parametrize("name", ["student", "student-lora"])
def test_a_student_begins_as_its_teacher_which_stays(stages: Stages, runs: Path, name: str) -> None:
    """The loss of an update is that of the formula: by the student as it began, the teacher, and the average given."""
    given = Pipeline.from_pretrained(stages.folder / "ldm", "cpu")
    settings: Any = load_run(runs / name)
    task = DistillationTask.from_config(settings, Silent())
    task.to(torch.device("cpu"))
    task.initialize()
    assert torch.equal(out(task.networks["unet"]), out(given.unet))
    batch = collate([task.stream[position] for position in range(4)])
    losses: list[torch.Tensor] = []

    def average(x: torch.Tensor, t: torch.Tensor, cond: Condition) -> torch.Tensor:
        return 0.5 * given.predict(x, t, cond)

    metrics = task.micro_step({**task.networks, AVERAGE: average}, batch, 0, losses.append)
    noising = task._noising(batch)
    guided = Guidance(
        given.predict, given.condition(batch["text"]), given.condition([""] * 4), given.schedule, "eps", scale=2.0
    )
    expected = Distillation(DistillConfig(2.0, 10), given.schedule, "eps").losses(
        given.predict, average, guided, noising.x0, noising.eps, noising.t, given.condition(batch["text"])
    )
    assert float(metrics["loss"]) == pytest.approx(float(expected.mean()), rel=1e-5)
    losses[0].backward()
    assert all(p.grad is not None for p in task.networks["unet"].parameters())
    assert not any(p.requires_grad for p in task.teacher.parameters())


def test_a_student_aims_at_its_average(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an update; in validation, where the average is in place, at itself."""
    used: list[Any] = []
    terms = DistillationTask._terms

    def seen(self: Any, unet: Any, noising: Any, average: Any = None) -> Any:
        used.append(average)
        return terms(self, unet, noising, average)

    monkeypatch.setattr(DistillationTask, "_terms", seen)
    assert train(runs, "student", f"run={tmp_path}/run", "train.steps=1") == 0
    assert [isinstance(average, EMA) for average in used] == [True, True, False, False]  # of 2, then 4 samples
    assert used[-1] is None


def test_a_student_is_exported_for_few_steps_without_guidance(runs: Path) -> None:
    written = json.loads((runs / "student/model/scheduler/scheduler_config.json").read_text())
    assert (written["_class_name"], written["original_inference_steps"]) == ("LCMScheduler", 50)
    for name in ("student", "student-lora"):
        opened = Pipeline.from_pretrained(runs / name, "cpu")
        assert (opened.defaults.sampler, opened.defaults.steps, opened.defaults.guidance_scale) == ("lcm", 2, 1.0)
        assert len(opened("a small red circle")) == 1
        with pytest.warns(UserWarning, match="trained without caption dropout"):
            opened("a small red circle", guidance_scale=3.0)
        logged = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        assert logged[-1]["validation/loss"] > 0 and (runs / name / "samples").is_dir()


def test_gradient_checkpointing_changes_nothing(runs: Path, tmp_path: Path) -> None:
    assert train(runs, "lora", f"run={tmp_path}/run", "train.gradient_checkpointing=true", "train.steps=2") == 0
    assert train(runs, "lora", f"run={tmp_path}/plain", "train.steps=2") == 0
    a, b = (load_file(tmp_path / name / "model" / FILE) for name in ("run", "plain"))
    assert all(torch.allclose(a[name], b[name], rtol=0, atol=1e-7) for name in b)


def test_half_a_base_stays_half_where_autocast_computes(stages: Stages, runs: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(stages.folder / "ldm", tmp_path / "half"))
    forget_hashes(half / "model")
    file = half / "model/unet/diffusion_pytorch_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        task = DiffusionTask.from_config(
            _with(load_run(runs / "lora"), init=str(half), mixed_precision=precision), Silent()
        )
        assert {p.dtype for p in task.trained.unet.parameters()} == {dtype} and {
            p.dtype for p in task.networks["unet"].parameters()
        } == {torch.float32}
    AcceleratorState._reset_state(True)  # one precision for each process
    try:
        assert (
            train(runs, "lora", f"run={tmp_path}/run", f"init={half}", "train.mixed_precision=bf16", "train.steps=2")
            == 0
        )
    finally:
        AcceleratorState._reset_state(True)
    assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "run/model" / FILE).values())


def _with(settings: Any, mixed_precision: str | None = None, **changes: Any) -> Any:
    from dataclasses import replace

    train = replace(settings.train, mixed_precision=mixed_precision) if mixed_precision else settings.train
    return replace(settings, train=train, **changes)


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize(("name", "update"), [("whole", 3), ("lora", 1), ("lora", 5), ("student", 3)])
def test_a_run_cut_off_ends_as_if_nothing_had_happened(
    runs: Path, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, update: int
) -> None:
    base = Path(shutil.copytree(stages.folder / "ldm", tmp_path / "base"))
    with monkeypatch.context() as patch:
        at_position(patch, lambda p: p == 4 * update + 2, power_cut)
        with pytest.raises(PowerCut):
            train(runs, name, f"run={tmp_path}/run", f"init={base}")
    if name == "whole":
        shutil.rmtree(base)  # the checkpoint has all
    assert train(runs, name, f"run={tmp_path}/run", f"init={base}") == 0
    assert_same_end(tmp_path / "run", runs / name)


@pytest.mark.parametrize("name", ["lora", "student"])
def test_a_lora_or_student_does_not_go_on_upon_another_base(
    runs: Path,
    stages: Stages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    base = Path(shutil.copytree(stages.folder / "ldm", tmp_path / "base"))
    with monkeypatch.context() as patch:
        at_position(patch, lambda p: p == 4 * 3, power_cut)
        with pytest.raises(PowerCut):
            train(runs, name, f"run={tmp_path}/run", f"init={base}")
    file = base / "model/unet/diffusion_pytorch_model.safetensors"
    save_file({key: value + 1e-3 for key, value in load_file(file).items()}, file)
    forget_hashes(base / "model")
    capsys.readouterr()
    assert train(runs, name, f"run={tmp_path}/run", f"init={base}") == 4
    assert "its weights have changed since this run began" in capsys.readouterr().err


# ---------------------------------------------------------------- what does not fit


def refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, *overrides: str) -> str:
    capsys.readouterr()
    assert train(runs, name, f"run={tmp_path}/refused", *overrides) in (2, 4)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "refused/checkpoints").exists()
    return error


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("unet.channels=[16,32]",),
            "unet.channels: [16, 16] in init {init}, [16, 32] in this configuration: they must be equal",
        ),
        (("unet.heads=[4]",), "unet.heads: [2, 2] in init"),
        (("unet.attention_levels=[0,1]",), "unet.attention_levels: [1] in init"),
        (("unet.linear_projection=true",), "unet.linear_projection: False in init"),
        (("objective.target=v",), "objective.target: eps in init {init}, v in this configuration"),
        (("objective.learned_variance=true",), "objective.learned_variance: output channels: 4 in init"),
        (("schedule.name=cosine",), "schedule: that of init {init} has other ᾱ_t"),
        (("schedule.num_steps=500",), "schedule: that of init"),
        (("autoencoder=none",), "autoencoder: channels of the latent: 4 in init {init}, 3 in this configuration"),
        (("text=none",), "text: width of the context: 16 in init {init}, None in this configuration"),
        (("init=nowhere",), "no run or model folder nowhere"),
        (
            ("schedule.name=learned",),
            "schedule.name learned needs a network that is trained from scratch: leave init out",
        ),
    ],
)
@pytest.mark.parametrize("name", ["whole", "lora"])
def test_what_differs_from_the_given_model_is_named(
    runs: Path,
    stages: Stages,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    overrides: tuple[str, ...],
    said: str,
) -> None:
    assert said.format(init=f"{stages.folder}/ldm") in refused(runs, tmp_path, capsys, name, *overrides)


def retrained(folder: Path, name: str) -> None:
    """Other weights, with the hash that their training would have written."""
    file = folder / name
    save_file({key: value * 1.01 for key, value in load_file(file).items()}, file)
    write_hashes(folder, [file])


def test_another_autoencoder_is_refused(
    runs: Path, stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(stages.folder / "autoencoder", tmp_path / "other"))
    retrained(other / "model", "vae/diffusion_pytorch_model.safetensors")
    assert "autoencoder: sha256: " in refused(runs, tmp_path, capsys, "whole", f"autoencoder={other}")


def test_another_text_encoder_is_refused_to_a_lora_and_a_student_alone(
    runs: Path, stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(stages.folder / "clip", tmp_path / "other"))
    retrained(other / "model", "text_encoder/model.safetensors")
    for name in ("lora", "student"):
        said = refused(runs, tmp_path, capsys, name, f"text={other}")
        assert "text: a LoRA needs the text encoder of its base, and a student that of its teacher" in said
    assert train(runs, "whole", f"run={tmp_path}/run", f"text={other}", "train.steps=1") == 0


def test_a_rescaled_schedule_is_for_whole_training(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(runs, "whole", f"run={tmp_path}/run", "schedule.shift=2", "train.steps=1") == 0
    for name in ("lora", "student"):
        assert "has other ᾱ_t" in refused(runs, tmp_path, capsys, name, "schedule.shift=2")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("init=null",), "train.lora needs init"),
        (("train.lora.rank=0",), "train.lora.rank must lie between 1"),
        (("train.lora.alpha=0",), "train.lora.alpha must be"),
        (("train.lora.targets=[]",), "train.lora.targets must name at least one layer"),
        (
            ("train.lora.targets=[to_w]",),
            "train.lora.targets: no linear or convolutional layer of the U-Net is called to_w",
        ),
        (("train.lora.rnk=2",), "unknown key train.lora.rnk: did you mean train.lora.rank?"),
        (("sample.lora=[x]",), "sample.lora is for drawing"),
    ],
)
def test_settings_of_a_lora_are_checked(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], said: str
) -> None:
    assert said in refused(runs, tmp_path, capsys, "lora", *overrides)


@pytest.mark.parametrize("name", ["autoencoder", "clip"])
def test_other_commands_train_no_lora(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert stages.train(name, f"run={tmp_path}/run", "train.lora.rank=2") == 2
    assert "train.lora is for train-ldm: leave it out" in capsys.readouterr().err


def test_a_lora_is_no_initial_model(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a LoRA, which is not a U-Net: name the model that it changes" in refused(
        runs, tmp_path, capsys, "whole", f"init={runs}/lora"
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("init=null",), "distill needs init: the run or folder whose model is the teacher"),
        (("caption_dropout=0.1",), "caption_dropout must be 0 with distill"),
        (("sample.sampler=ddim",), "sample.sampler must be lcm with distill"),
        (("sample.guidance_scale=3",), "sample.guidance_scale must be 1 with distill"),
        (("objective.weighting=min_snr",), "distill has a loss of its own: leave objective.weighting"),
        (("objective.learned_variance=true",), "distill has a loss of its own"),
        (("text=none",), "distill.guidance_scale: a model without captions is not guided: set it to 1"),
        (("distill.intervals=0",), "distill.intervals must lie between 1"),
        (("distill.huber=0",), "distill.huber must be at least"),
        (("distill.guidance_scale=-1",), "distill.guidance_scale must lie between 0"),
        (("distill.interval=3",), "unknown key distill.interval: did you mean distill.intervals?"),
    ],
)
def test_settings_of_a_distillation_are_checked(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], said: str
) -> None:
    assert said in refused(runs, tmp_path, capsys, "student", *overrides)


def test_a_student_is_no_teacher_of_guidance(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(runs, tmp_path, capsys, "student", f"init={runs}/student")
    assert "was trained without caption dropout, so it cannot be guided: set it to 1" in said
    once_more = ("train.steps=1", "distill.guidance_scale=1", f"init={runs}/student")
    assert train(runs, "student", f"run={tmp_path}/run", *once_more) == 0


# ---------------------------------------------------------------- other commands on such a run


def test_the_run_is_sampled_reported_and_bounded(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(runs / "lora", tmp_path / "copy/lora"))  # the base is found where it was
    assert (
        main(["sample", str(run), "--prompt", "a small red circle on a white background", "--out", str(tmp_path / "o")])
        == 0
    )
    assert main(["report", str(run), "--images", "2"]) == 0
    page = (run / "report.html").read_text()
    assert "exported" in page and "not exported yet" not in page
    assert main(["evaluate", str(run), "--images", "2", "--tune", "0"]) == 0
    assert main(["evaluate", str(run), "--likelihood", "--images", "2", "--timesteps", "2"]) == 0
    assert json.loads((run / "report.json").read_text())["likelihood"]["model"] == Pipeline.from_pretrained(run).hash


def test_every_field_of_the_u_net_is_compared() -> None:
    from dataclasses import fields

    from ldm.training.stages.finetune import _spread

    config = UNetConfig(channels=(32, 64), attention_levels=(1, 0), heads=(2,))
    assert {f.name: _spread(config, f.name) for f in fields(config)}["heads"] == [2, 2]
    assert _spread(config, "attention_levels") == [0, 1] and _spread(config, "channels") == [32, 64]
