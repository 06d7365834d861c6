"""Conditions beside the caption, from columns of the data to drawn pictures: trained, dropped, saved and resumed."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support.cut_runs import assert_same_end, at_position, power_cut
from support.interrupts import PowerCut
from support.stages import DIFFUSION, TRAIN, Stages

from ldm import config
from ldm.cli.main import main
from ldm.config import ConfigError, DataConfig, DiffusionTrainingConfig
from ldm.data import rng
from ldm.data.dataset import collate
from ldm.data.sources import open_source
from ldm.diffusion.denoiser import Denoiser
from ldm.errors import FolderError
from ldm.pipeline import Pipeline
from ldm.pipeline.info import ModelInfo
from ldm.pipeline.prompts import Prompt
from ldm.pipeline.provenance import read_provenance
from ldm.training.stages.diffusion import DiffusionTask

CONDITIONS = [
    {"name": "kind", "kind": "class", "dropout": 0.3},
    {"name": "height", "kind": "scalar", "column": "metres", "dropout": 0.4},
    {"name": "place", "kind": "vector", "dropout": 0.0},
]
KINDS = ("cat", "dog", "fox")


def columns(i: int) -> dict[str, Any]:
    """Of image ``i``; the fourth has no height."""
    return {"kind": KINDS[i % 3], "metres": None if i == 4 else 1.0 + i / 8, "place": [i % 5 / 2, -float(i % 3)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned pictures with three further columns."""
    place = tmp_path_factory.mktemp("animals")
    for i in range(24):
        grey = np.full((32, 32, 3), 10 * i, dtype=np.uint8)
        Image.fromarray(grey).save(place / f"{i:02d}.png")
    rows = [{"file_name": f"{i:02d}.png", "text": f"animal {i}", **columns(i)} for i in range(24)]
    (place / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


def tree(folder: Path, run: Path, text: str = "none", **changes: Any) -> dict[str, Any]:
    settings = {**DIFFUSION, "run": str(run), "autoencoder": "none", "text": text, "conditions": CONDITIONS}
    settings["data"] = {"folder": str(folder), "image_size": 32, "validation_fraction": 0.2}
    return {**settings, "train": {**TRAIN, "lr": 5e-3}, **changes}


def written(file: Path, settings: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def runs(stages: Stages, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of pixels given three conditions (`plain`), and one of latents given the caption too (`captioned`)."""
    here = tmp_path_factory.mktemp("conditioned")
    latents = {"autoencoder": f"{stages.folder}/autoencoder", "text": f"{stages.folder}/clip", "joint_dropout": 0.2}
    for name, changes in (("plain", {}), ("captioned", latents)):
        assert main(["train-ldm", str(written(here / f"{name}.yaml", tree(folder, here / name, **changes)))]) == 0
    return here


@pytest.fixture
def task(runs: Path, tmp_path: Path) -> DiffusionTask:
    settings = yaml.safe_load((runs / "captioned.yaml").read_text())
    file = written(tmp_path / "task.yaml", {**settings, "run": str(tmp_path / "task")})
    return DiffusionTask.from_config(config.load(DiffusionTrainingConfig, file), lambda text: None)


# ---------------------------------------------------------------- training


def test_samples_carry_the_values_of_their_own_row(task: DiffusionTask, folder: Path) -> None:
    """Latents come from the cache; the caption says which image it is."""
    assert task.conditioner is not None and task.conditioner.slices[0].classes == KINDS  # type: ignore[union-attr]
    for stream in (task.stream, task.validation):
        for position in range(7):
            sample = stream[position]
            row = columns(int(sample["text"].split()[1]))
            values = {"kind": row["kind"], "height": row["metres"], "place": row["place"]}
            assert torch.equal(sample["vector"], task.conditioner(values, 1).vector[0])  # type: ignore[index]
    assert "moments" in task.stream[0] and "image" in task.validation[0]


def test_statistics_are_those_of_the_training_split(task: DiffusionTask) -> None:
    source = task.source
    heights = [h for i in range(source.length or 0) if (h := source.columns(i)["metres"]) is not None]
    assert task.conditioner is not None
    _, height, _ = task.conditioner.slices
    assert (height.mean, height.std) == pytest.approx((np.mean(heights), np.std(heights)))  # type: ignore[union-attr]


def test_each_condition_is_dropped_by_draws_of_its_own(task: DiffusionTask) -> None:
    task.to(torch.device("cpu"))
    assert task.conditioner is not None and task.text is not None
    batch = collate([task.stream[position] for position in range(40)])
    noising, seed = task._noising(batch), task.config.train.seed
    widths = [part.width for part in task.conditioner.slices]
    found = dict(zip(task.conditioner.names, noising.cond.vector.split(widths, 1), strict=True))  # type: ignore[union-attr]
    whole = dict(zip(task.conditioner.names, batch["vector"].split(widths, 1), strict=True))
    empty = task.text.encode([""])[0]
    counts = dict.fromkeys((*found, "caption"), 0)
    for p in range(40):
        draw = lambda name: rng.uniform(seed, name, p)  # noqa: E731, B023
        joint = draw("drop/all") < 0.2
        for condition in CONDITIONS:
            name = str(condition["name"])
            dropped = joint or draw(f"drop/{name}") < condition["dropout"]  # type: ignore[operator]
            counts[name] += dropped
            expected = torch.zeros_like(whole[name][p]) if dropped else whole[name][p]
            assert torch.equal(found[name][p], expected)
        dropped = joint or draw("drop") < task.config.caption_dropout
        counts["caption"] += dropped
        assert torch.equal(noising.cond.context[p], empty) == dropped  # type: ignore[index]
    assert len(set(counts.values())) > 2 and 0 < counts["place"] < 40  # by the joint draw alone


def test_values_move_the_prediction_and_learn(runs: Path) -> None:
    """The map of each slice has moved from its initial weights, and the prediction depends on each value."""
    pipe = Pipeline.from_pretrained(runs / "plain", "cpu")
    x, t = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    values = {"kind": "cat", "height": 1.5, "place": [0.5, -1.0]}
    with torch.no_grad():
        reference = pipe.predict(x, t, pipe.condition([Prompt("", values)]))
        for other in ({"kind": "fox"}, {"height": 3.0}, {"place": [2.0, -2.0]}):
            changed = pipe.predict(x, t, pipe.condition([Prompt("", {**values, **other})]))
            assert not torch.allclose(changed, reference, atol=1e-6)
    first = yaml.safe_load((runs / "plain.yaml").read_text())
    spec = ModelInfo.read(runs / "plain").unet
    from ldm.training.task import seeded

    initial = seeded(first["train"].get("seed", 0), spec.make)
    moved = pipe.unet.class_embedding.linear_1.weight - initial.class_embedding.linear_1.weight  # type: ignore[union-attr]
    assert all(bool(part.abs().max() > 1e-4) for part in moved.split([3, 33, 3], 1))


def test_a_cut_run_with_conditions_ends_as_the_whole_one(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train-ldm", str(runs / "captioned.yaml"), f"run={tmp_path / 'cut'}"]
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        at_position(patch, lambda p: p == 14, power_cut)
        main(arguments)
    assert main(arguments) == 0
    assert_same_end(runs / "captioned", tmp_path / "cut")


def test_a_run_goes_on_with_what_values_meant_when_it_began(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Other data do not move the statistics under a network that has learned with them; a new class is named."""
    animals = shutil.copytree(folder, tmp_path / "animals")
    arguments = ["train-ldm", str(written(tmp_path / "a.yaml", tree(animals, tmp_path / "a")))]
    assert main([*arguments, "train.steps=2"]) == 0
    began = Pipeline.from_pretrained(tmp_path / "a", "cpu").conditioner
    table = animals / "metadata.jsonl"
    table.write_text(table.read_text().replace('"metres": 1.', '"metres": 31.'))
    capsys.readouterr()
    assert main([*arguments, "train.steps=4"]) == 2 and "data.accept_changes=true" in capsys.readouterr().err
    more = [*arguments, "data.accept_changes=true"]
    assert main([*more, "train.steps=4"]) == 0
    assert Pipeline.from_pretrained(tmp_path / "a", "cpu").conditioner == began
    table.write_text(table.read_text().replace("fox", "yak"))
    assert main([*more, "train.steps=6"]) == 2
    assert "new in the data since this run began: kind: 'yak' is not one of its 3 classes" in capsys.readouterr().err


def test_previews_and_validation_know_the_values(task: DiffusionTask, monkeypatch: pytest.MonkeyPatch) -> None:
    task.to(torch.device("cpu"))
    asked: list[Any] = []
    monkeypatch.setattr(
        Pipeline,
        "sample",
        lambda self, prompts, settings, values: (asked.append(values), iter([torch.zeros(1, 3, 8, 8)]))[1],
    )
    task.previews()
    source = task.validation.source
    wanted = [columns(int(source.text(i).split()[1])) for i in range(len(task.prompts))]
    assert asked == [[{"kind": w["kind"], "height": w["metres"], "place": w["place"]} for w in wanted]]
    seen: list[torch.Tensor | None] = []
    plain = task._terms
    monkeypatch.setattr(
        task, "_terms", lambda unet, noising: (seen.append(noising.cond.vector), plain(unet, noising))[1]
    )
    task.validate(0, lambda tensor: tensor, 0, 1)
    positions = range(min(6, source.length or 0))
    assert torch.equal(torch.cat(seen), torch.stack([task.validation[p]["vector"] for p in positions]))  # type: ignore[arg-type]


# ---------------------------------------------------------------- sources


def test_a_table_in_csv_gives_the_same_as_one_in_json(folder: Path, tmp_path: Path) -> None:
    animals = shutil.copytree(folder, tmp_path / "animals")
    rows = [json.loads(line) for line in (animals / "metadata.jsonl").read_text().splitlines()]
    (animals / "metadata.jsonl").unlink()
    with (animals / "metadata.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    made = []
    for place in (folder, animals):
        settings = config.load(DiffusionTrainingConfig, written(tmp_path / "a.yaml", tree(place, tmp_path / "none")))
        made.append(DiffusionTask.from_config(settings, lambda text: None))
    json_made, csv_made = (one.conditioner for one in made)
    assert json_made == csv_made
    assert torch.equal(made[0].stream[7]["vector"], made[1].stream[7]["vector"])


@pytest.mark.parametrize(
    ("source", "split", "expected"),
    [
        ("digits", "train", {"digit"}),
        ("shapes", "train", {"background", "size", "colour", "shape", "x", "y", "striped"}),
        ("shapes-two", "held_out", {"background", "relation", "colour", "colour2", "shape2", "x2", "striped2"}),
        ("textures", "validation", {"kind", "first", "second", "period", "angle", "phase"}),
    ],
)
def test_drawn_sets_have_columns_that_agree_with_their_captions(source: str, split: str, expected: set[str]) -> None:
    channels = 1 if source == "digits" else 3
    opened = open_source(DataConfig(source=source, image_size=48, image_channels=channels), split)
    for i in range(20):
        found = opened.columns(i)
        assert expected <= found.keys()
        words = [value for value in found.values() if isinstance(value, str)]
        assert all(word in opened.text(i) for word in words) and (words or opened[i].truth == found["digit"])


def test_a_class_folder_has_its_class(tmp_path: Path) -> None:
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / kind / "a.png")
    source = open_source(DataConfig(folder=str(tmp_path), captions="class", validation_fraction=0.0), "train")
    assert sorted(source.columns(i)["class"] for i in range(3)) == list(KINDS)


# ---------------------------------------------------------------- drawing


@pytest.fixture(scope="module")
def pipe(runs: Path) -> Pipeline:
    return Pipeline.from_pretrained(runs / "plain", "cpu")


def test_the_folder_keeps_what_the_values_mean(runs: Path, pipe: Pipeline, tmp_path: Path) -> None:
    trained = yaml.safe_load((runs / "plain.yaml").read_text())
    task = DiffusionTask.from_config(
        config.load(DiffusionTrainingConfig, written(tmp_path / "a.yaml", {**trained, "run": str(tmp_path / "a")})),
        print,
    )
    assert pipe.conditioner == task.conditioner
    pipe.save_pretrained(tmp_path / "again")
    again = Pipeline.from_pretrained(tmp_path / "again", "cpu")
    values = {"kind": ["cat", "fox"], "height": 2.0}
    a, b = (one(values=values, steps=2, output_type="pt").images for one in (pipe, again))  # type: ignore[attr-defined]
    assert torch.equal(a, b) and not torch.equal(a[0], a[1])


def test_a_single_file_keeps_them_too(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    assert main(["convert", str(runs / "captioned"), str(file)]) == 0
    one, folder = (Pipeline.from_pretrained(path, "cpu") for path in (file, runs / "captioned"))
    assert one.conditioner == folder.conditioner is not None
    call = {"values": {"kind": "fox", "place": [1.0, 2.0]}, "steps": 2, "output_type": "pt"}
    assert torch.equal(one("animal 2", **call)[0], folder("animal 2", **call)[0])
    with pytest.raises(ConfigError, match="with a vector, label or concatenated condition cannot be expressed"):
        folder.save_pretrained(tmp_path / "theirs", for_diffusers=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": {"name": "learned"}},
        {"init": "plain", "train": {**TRAIN, "steps": 2, "lora": {"rank": 2}}},
        {
            "init": "plain", "distill": {"guidance_scale": 2.0, "intervals": 10}, "joint_dropout": 0.0,
            "conditions": [{**condition, "dropout": 0.0} for condition in CONDITIONS],
            "sample": {"sampler": "lcm", "grid": "lcm", "steps": 2, "guidance_scale": 1.0},
        },
    ],
    ids=["learned schedule", "lora", "student"],
)  # fmt: skip
def test_every_way_of_training_takes_them(runs: Path, folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    start = {"init": str(runs / changes["init"])} if "init" in changes else {}
    settings = tree(folder, tmp_path / "run", **{**changes, **start})
    settings["train"] = {**settings["train"], "steps": 2, "sample_every": 2, "validate_every": 2}
    assert main(["train-ldm", str(written(tmp_path / "a.yaml", settings))]) == 0
    pipe = Pipeline.from_pretrained(tmp_path / "run", "cpu")
    a, b = pipe(values={"kind": ["cat", "dog"]}, steps=2, guidance_scale=1.0, seed=1, output_type="pt")
    again = pipe(values={"kind": ["cat", "cat"]}, steps=2, guidance_scale=1.0, seed=1, output_type="pt")
    assert torch.equal(a, again[0]) and not torch.equal(b, again[1])


def test_a_call_is_one_for_each_value(pipe: Pipeline) -> None:
    every = {"steps": 2, "output_type": "pt"}
    whole = pipe(values={"kind": ["cat", "dog", "fox"], "height": 1.5, "place": [1.0, 2.0]}, **every)
    rows = [{"kind": kind, "height": 1.5, "place": [1.0, 2.0]} for kind in KINDS]
    same = pipe(values=rows, batch_size=2, **every)
    assert len(whole) == 3 and torch.allclose(torch.stack(list(whole)), torch.stack(list(same)), atol=1 / 255)
    assert len(pipe(["", ""], values={"kind": "cat"}, **every)) == 2
    copies = pipe(values={"kind": ["cat", "dog"]}, num_images_per_prompt=2, **every)
    first = pipe(values=[{"kind": kind} for kind in ("cat", "cat", "dog", "dog")], **every)
    assert torch.equal(torch.stack(list(copies)), torch.stack(list(first)))


def test_guidance_leans_on_no_condition_at_all(pipe: Pipeline) -> None:
    """γ cond + (1 − γ) null, with the slices of a null condition zero."""
    prompts = [Prompt("", {"kind": "dog", "height": 2.5, "place": [0.0, 1.0]})]
    x, t = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor([700])
    settings = replace(pipe.defaults, guidance_scale=3.0)
    denoiser: Denoiser = pipe.denoiser(prompts, settings)
    with torch.no_grad():
        guided = denoiser(x, t).raw
        cond, null = (pipe.predict(x, t, pipe.condition(each)) for each in (prompts, [""]))
    assert not pipe.condition([""]).vector.any()  # type: ignore[union-attr]
    torch.testing.assert_close(guided, 3.0 * cond - 2.0 * null, atol=1e-5, rtol=1e-4)


def test_one_condition_is_guided_alone(runs: Path) -> None:
    """It steers away from the same condition without that one: the caption or a value."""
    pipe = Pipeline.from_pretrained(runs / "captioned", "cpu")
    values = {"kind": "dog", "height": 2.5, "place": [0.0, 1.0]}
    prompts = [Prompt("animal 3", values)]
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([700])
    settings = replace(pipe.defaults, guidance_scale=1.5, guidance_alone=("height:3", "caption:0.5", "kind:1"))
    with torch.no_grad():
        guided = pipe.denoiser(prompts, settings)(x, t).raw
        lacking = [Prompt("animal 3", {k: v for k, v in values.items() if k != "height"}), Prompt("", values)]
        whole, none, no_height, no_caption = (
            pipe.predict(x, t, pipe.condition([prompt])) for prompt in (prompts[0], "", *lacking)
        )
    expected = whole + 0.5 * (whole - none) + 2.0 * (whole - no_height) - 0.5 * (whole - no_caption)
    torch.testing.assert_close(guided, expected, atol=1e-5, rtol=1e-4)
    drawn = pipe("animal 3", values=values, guidance_alone="height:3", steps=2, output_type="pt")
    assert not torch.equal(drawn[0], pipe("animal 3", values=values, steps=2, output_type="pt")[0])


def test_guidance_of_a_condition_that_was_never_dropped_warns(pipe: Pipeline) -> None:
    call = {"values": {"place": [1.0, 2.0]}, "steps": 1}
    with pytest.warns(UserWarning, match="guidance_alone place: this model was trained without dropping it alone"):
        pipe(guidance_alone="place:2", **call)
    for name in ("caption", "size"):
        with pytest.raises(
            ConfigError, match=f"guidance_alone {name}: this model's conditions are: kind, height, place"
        ):
            pipe(guidance_alone=f"{name}:2", **call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"values": {"kind": "cow"}}, "kind: 'cow' is not one of its 3 classes: cat, dog, fox"),
        ({"values": {"size": 3}}, "no condition size, the conditions are: kind, height, place"),
        ({"values": {"height": "tall"}}, "height: a finite number is needed, got 'tall'"),
        ({"values": {"place": [1.0]}}, "place: it has 2 components, got 1"),
        ({"prompts": ["", ""], "values": {"kind": ["cat"] * 3}}, "kind: 3 values for 2 samples"),
        ({"prompts": ["", ""], "values": [{"kind": "cat"}]}, "values of 1 samples for 2: give them for each"),
        ({"values": {"kind": ["cat", "dog"], "height": [1.0, 2.0, 3.0]}}, "kind: 2 values for 3 samples"),
        ({"values": 3}, "values must be a mapping of conditions, or one for each prompt, got 3"),
        ({"values": [3]}, "values must be a mapping of conditions, or one for each prompt, got [3]"),
        ({}, "prompts must be a text or several, got None"),
    ],
)
def test_values_that_cannot_be_drawn(pipe: Pipeline, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        pipe(**call)
    assert str(raised.value).startswith(message)


def test_a_model_of_captions_needs_one_beside_values(runs: Path) -> None:
    with pytest.raises(ConfigError, match="prompts must be a text or several, got None"):
        Pipeline.from_pretrained(runs / "captioned", "cpu")(values={"kind": "cat"})


def test_a_model_without_conditions_takes_no_values(stages: Stages) -> None:
    with pytest.raises(ConfigError, match="this model has no conditions beside its caption"):
        Pipeline.from_pretrained(stages.folder / "ldm", "cpu")("a", values={"kind": "cat"})


def test_pictures_say_their_values_and_are_drawn_again(
    runs: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    run = str(runs / "captioned")
    call = ["sample", run, "--prompt", "animal 3", "--value", "kind=dog", "--value", "place=[0.5,1]", "--count", "2"]
    assert main(call) == 0
    assert main([*call, "--value", "kind=cat"]) == 2 and "--value kind is given twice" in capsys.readouterr().err
    files = sorted((tmp_path / "images").glob("*.png"))
    names = [file.name for file in files]
    assert names == [
        "00000-animal-3-kind-dog-place-0-5-1.png",
        "00001-animal-3-kind-dog-place-0-5-1.png",
        "grid-00000.png",
    ]
    assert read_provenance(files[0])[0].values == ({"kind": "dog", "place": [0.5, 1]},)
    assert len(read_provenance(files[2])[0].values) == 2
    for file in files:
        assert main(["reproduce", str(file)]) == 0 and "identical" in capsys.readouterr().out
    moved = shutil.copytree(runs / "captioned", tmp_path / "moved")
    about = json.loads((moved / "model/ldm.json").read_text())
    about["conditions"]["parts"][1]["mean"] += 0.5
    (moved / "model/ldm.json").write_text(json.dumps(about))
    assert main(["reproduce", str(files[0]), "--model", str(moved)]) == 4
    assert "has changed since: conditions" in capsys.readouterr().err


def test_values_alone_are_drawn_by_a_model_without_text(
    runs: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    run = str(runs / "plain")
    assert main(["sample", run, "--value", "kind=[cat,dog,fox]", "--value", "height=2"]) == 0
    assert len(list((tmp_path / "images").glob("0*.png"))) == 3
    assert main(["sample", run, "--prompt", "a cat"]) == 2
    assert "this model has conditions for --value and draws without captions" in capsys.readouterr().err
    assert main(["inspect", run]) == 0
    assert "height               kind scalar, dropout 0.4, mean " in capsys.readouterr().out


def test_bits_are_given_the_values_without_guidance(runs: Path, tmp_path: Path) -> None:
    """Whatever the model's own settings of sampling are."""
    measured = []
    for name, alone in (("plain", []), ("guided", ["height:4"])):
        run = shutil.copytree(runs / "captioned", tmp_path / name)
        about = json.loads((run / "model/ldm.json").read_text())
        about["defaults"]["guidance_alone"] = alone
        (run / "model/ldm.json").write_text(json.dumps(about))
        assert main(["evaluate", str(run), "--likelihood", "--images", "3", "--timesteps", "2"]) == 0
        measured.append(json.loads((run / "report.json").read_text())["likelihood"]["bits_per_dim"])
    assert measured[0] == measured[1]


def test_an_inversion_is_not_guided(runs: Path) -> None:
    pipe, image = Pipeline.from_pretrained(runs / "captioned", "cpu"), np.full((32, 32, 3), 90, np.uint8)
    seen: list[tuple[int, ...]] = []
    plain = pipe.unet.forward

    def forward(x_t: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        seen.append(tuple(x_t.shape))
        return plain(x_t, t, cond)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.unet, "forward", forward)
        call = {"image": image, "invert": True, "sampler": "ddim", "steps": 3, "guidance_scale": 1.0}
        pipe("animal 3", values={"height": 2.0}, guidance_alone="height:3", **call)
    assert [shape[0] for shape in seen] == [1, 1, 1, 2, 2, 2]  # up to noise alone, and back with a term for height


def test_bits_are_given_the_values(runs: Path) -> None:
    assert main(["evaluate", str(runs / "captioned"), "--likelihood", "--images", "3", "--timesteps", "2"]) == 0
    assert (
        json.loads((runs / "captioned/report.json").read_text())["likelihood"]["given"]
        == "caption, kind, height, place"
    )


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditions": [{"name": "a", "kind": "class"}]}, "a: there is no column a, the columns are: kind, metres"),
        ({"conditions": [{"name": "kind", "kind": "colour"}]}, "conditions[0].kind must be one of class, scalar"),
        ({"conditions": [{"kind": "class"}]}, "missing key conditions[0].name"),
        ({"conditions": {"name": "kind"}}, "conditions must be a list"),
        ({"conditions": [CONDITIONS[0], CONDITIONS[0]]}, "conditions: two are called kind"),
        ({"sample": {"guidance_alone": ["caption:2"]}}, "sample.guidance_alone caption: the conditions are: kind"),
        ({"sample": {"guidance_alone": ["kind"]}}, "sample.guidance_alone must be NAME:SCALE, each name once"),
        ({"joint_dropout": 1.5}, "joint_dropout must lie between 0.0 and 1.0"),
        ({"unet": {"vector_dim": 7}}, "unet.vector_dim is set where conditions or inpaint need it: leave it out"),
    ],
)  # fmt: skip
def test_configurations_that_cannot_be(folder: Path, tmp_path: Path, capsys: Any, changes: Any, message: str) -> None:
    file = written(tmp_path / "a.yaml", tree(folder, tmp_path / "a", **changes))
    assert main(["train-ldm", str(file)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_class_of_the_validation_split_alone(folder: Path, tmp_path: Path, capsys: Any) -> None:
    animals = shutil.copytree(folder, tmp_path / "animals")
    source = open_source(DataConfig(folder=str(animals), validation_fraction=0.2), "validation")
    number = source.text(1).split()[1]
    rows = [json.loads(line) for line in (animals / "metadata.jsonl").read_text().splitlines()]
    rows[int(number)]["kind"] = "yak"
    (animals / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["train-ldm", str(written(tmp_path / "a.yaml", tree(animals, tmp_path / "a")))]) == 2
    assert (
        "in the validation split, not among the training images: kind: 'yak' is not one of" in capsys.readouterr().err
    )


def test_a_start_must_have_the_same_conditions(runs: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    for conditions, message in (
        ([], "conditions: kind (class), height (scalar), place (vector) in init"),
        (CONDITIONS[::-1], "place (vector), height (scalar), kind (class) in this configuration"),
    ):
        file = written(
            tmp_path / "a.yaml", tree(folder, tmp_path / "a", init=str(runs / "plain"), conditions=conditions)
        )
        assert main(["train-ldm", str(file)]) == 2 and message in capsys.readouterr().err


def test_a_start_keeps_what_values_meant(runs: Path, folder: Path, tmp_path: Path) -> None:
    """The new data have other numbers; the statistics are those of the model that training starts from."""
    animals = shutil.copytree(folder, tmp_path / "animals")
    table = animals / "metadata.jsonl"
    table.write_text(table.read_text().replace('"metres": 1.', '"metres": 31.'))
    settings = tree(animals, tmp_path / "more", init=str(runs / "plain"), joint_dropout=0.5)
    assert main(["train-ldm", str(written(tmp_path / "more.yaml", settings))]) == 0
    before, after = (Pipeline.from_pretrained(run, "cpu").conditioner for run in (runs / "plain", tmp_path / "more"))
    assert before is not None and after is not None
    assert after.slices == before.slices and (before.joint_dropout, after.joint_dropout) == (0.05, 0.5)


def test_damaged_conditions_of_a_folder(runs: Path, tmp_path: Path) -> None:
    def edited(change: Any) -> Path:
        copy = shutil.copytree(runs / "plain/model", tmp_path / "model", dirs_exist_ok=True)
        about = json.loads((copy / "ldm.json").read_text())
        change(about["conditions"])
        (copy / "ldm.json").write_text(json.dumps(about))
        return copy

    for change, message in (
        (lambda c: c["parts"][0].pop("classes"), "conditions are damaged"),
        (lambda c: c["parts"].pop(), "its conditions are a vector of 36, and the U-Net takes 39"),
        (lambda c: c["parts"][0].update(kind="colour"), "kind must be one of class"),
        (lambda c: c.clear(), "conditions should be a mapping whose parts have a name each"),
        (lambda c: c.update(parts=3), "conditions should be a mapping whose parts have a name each"),
        (lambda c: c.pop("joint_dropout"), "conditions are damaged: 'joint_dropout'"),
    ):
        with pytest.raises(FolderError, match=message):
            Pipeline.from_pretrained(edited(change), "cpu")
