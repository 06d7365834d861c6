"""The classifier of noisy latents: network, training and resume, refusals, guidance in the pipeline."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from support.interrupts import PowerCut

from autoencoder.config import AutoencoderConfig
from autoencoder.model import AutoencoderKL
from ldm import config as configuration
from ldm.cli.main import main
from ldm.config import (
    ClassifierConfig,
    ClassifierTrainingConfig,
    ConfigError,
    DataConfig,
    SampleConfig,
    ScheduleConfig,
    UNetConfig,
)
from ldm.data.dataset import Stream, collate, scattered
from ldm.data.digits import caption
from ldm.data.sources import open_source
from ldm.errors import FolderError
from ldm.evaluation.figures.page import EDGE, HEADER
from ldm.evaluation.figures.sweep import REAL
from ldm.evaluation.figures.sweep_panels import BELOW
from ldm.evaluation.judges.digits import DigitJudge
from ldm.evaluation.metrics import pairwise_distance
from ldm.interop.classifier import ClassifierInfo, load_classifier
from ldm.models.classifier import NoisyClassifier
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import LatentCodec
from ldm.runs.records import read_metrics
from ldm.training.stages.classifier import ClassifierTask, find_classes

TRAIN = {
    "steps": 6, "batch_size": 8, "micro_batch": 4, "lr": 1e-3, "ema_decay": 0.9, "log_every": 1, "validate_every": 6,
    "validation_size": 20, "sample_every": 6, "checkpoint_every": 2, "trackers": [],
}  # fmt: skip
DATA = {"source": "digits", "image_size": 16, "image_channels": 1}
TREE: dict[str, Any] = {
    "data": DATA,
    "model": {"channels": [8, 16], "layers_per_level": 1, "groups": 4},
    "train": TRAIN,
}
THREE = caption(3)


def unet(channels: int, stirred: float = 0.3, outputs: int = 1) -> UNet:
    network = UNet(UNetConfig((8, 8), 1, (), (1,), groups=4), channels, outputs * channels, None)
    for parameter in network.parameters():
        parameter.data += stirred * torch.randn_like(parameter)
    return network.eval().requires_grad_(False)


def pipeline(codec: LatentCodec | None, **changes: Any) -> Pipeline:
    given = {"schedule_config": ScheduleConfig("cosine", 20), "target": "v", **changes}
    schedule, target = given["schedule_config"], given["target"]
    return Pipeline(unet(4 if codec else 1), schedule, target, codec, None, 16, SampleConfig("ddpm", 4))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Diffusion models of latents and of pixels (untrained), misfits, and a classifier of each of the first two."""
    folder = tmp_path_factory.mktemp("here")
    torch.manual_seed(0)
    made = [
        LatentCodec(AutoencoderKL(AutoencoderConfig(1, 4, (8, 8), 1, 4, mid_attention=False)).eval()) for _ in range(2)
    ]
    pipeline(made[0]).save_pretrained(folder / "latents")
    codec = Pipeline.from_pretrained(folder / "latents").codec
    pipeline(codec).save_pretrained(folder / "weak")
    pipeline(made[1]).save_pretrained(folder / "elsewhere")
    pipeline(codec, schedule_config=ScheduleConfig("linear", 20)).save_pretrained(folder / "linear")
    pipeline(codec, schedule_config=ScheduleConfig("cosine", 30)).save_pretrained(folder / "longer")
    pipeline(codec, target="eps").save_pretrained(folder / "eps")
    pipeline(None).save_pretrained(folder / "pixels")
    for name in ("latents", "pixels"):
        tree = {"run": str(folder / f"of-{name}"), "diffusion": str(folder / name), **TREE}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        assert main(["train-classifier", str(folder / f"{name}.yaml")]) == 0
    return folder


@pytest.fixture(scope="module")
def pipe(here: Path) -> Pipeline:
    return Pipeline.from_pretrained(here / "latents", "cpu")


# the network


@pytest.mark.usefixtures("seed")
def test_every_image_is_classified_by_itself_and_by_its_t() -> None:
    network = NoisyClassifier(ClassifierConfig((8, 16, 16), 2, 4), 3, 5).double()
    x, t = torch.randn(2, 3, 12, 12, dtype=torch.float64), torch.tensor([3, 700])
    both = network(x, t)
    assert both.shape == (2, 5)
    torch.testing.assert_close(both[1:], network(x[1:], t[1:]))
    assert not torch.allclose(network(x, t.flip(0)), both) and not torch.allclose(network(x.flip(3), t), both)
    assert network(torch.randn(1, 3, 9, 7).double(), torch.tensor([2.5])).shape == (1, 5)  # any size, fractional t
    assert sum(isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2) for m in network.modules()) == 2


@pytest.mark.usefixtures("seed")
def test_the_classifier_averages_over_the_image() -> None:
    """By hand from the last norm on: SiLU, the mean over all pixels, one linear layer."""
    network, seen = NoisyClassifier(ClassifierConfig((8, 16), 1, 4), 3, 5), []
    network.norm_out.register_forward_hook(lambda *inputs: seen.append(inputs[2]))
    logits = network(torch.randn(2, 3, 8, 8), torch.tensor([3, 700]))
    h = seen[0]
    mean = (h / (1 + torch.exp(-h))).reshape(2, 16, -1).sum(2) / (h.shape[2] * h.shape[3])
    assert h.shape == (2, 16, 4, 4)
    torch.testing.assert_close(logits, mean @ network.linear.weight.T + network.linear.bias)


# training


def test_a_run_cut_off_ends_as_if_nothing_had_happened(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Stream.read

    def cut(self: Stream, position: int) -> Any:
        if not self.validation and position == 8 * 3 + 4:  # the first of two micro-batches is done
            raise PowerCut
        return original(self, position)

    arguments = ["train-classifier", str(here / "latents.yaml"), f"run={tmp_path}"]
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(Stream, "read", cut)
        main(arguments)
    assert main(arguments) == 0
    for name in ("model/classifier/classifier.safetensors", "checkpoints/step-00000006/ema.safetensors"):
        assert (tmp_path / name).read_bytes() == (here / "of-latents" / name).read_bytes()
    one, two = (
        [{k: v for k, v in line.items() if k != "updates_per_second"} for line in read_metrics(run)]
        for run in (tmp_path, here / "of-latents")
    )
    assert one == two and [line["step"] for line in one] == [1, 2, 3, 4, 5, 6]
    last = one[-1]
    assert len(last["validation/accuracy_by_t"]) == 10
    assert last["validation/accuracy"] == pytest.approx(
        np.mean(last["validation/accuracy_by_t"])
    )  # two images in each tenth


def test_what_is_learned_is_the_cross_entropy_of_x_t(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: x_t = a x_0 + s ε at the t of the draw, −log softmax at the digit that is written."""
    task = ClassifierTask.from_config(configuration.load(ClassifierTrainingConfig, here / "pixels.yaml"), print)
    batch = collate([task.stream[i] for i in range(8)])
    seen: list[torch.Tensor] = []
    logged = task.micro_step(task.networks, batch, 0, seen.append)
    expected = []
    for i in range(8):
        t = int(float(batch["t"][i]) * 20)
        a = task.schedule.alphas_cumprod[t].sqrt().float()
        x_t = a * batch["image"][i] + (1 - a.square()).sqrt() * batch["eps"][i]
        logits = task.classifier(x_t[None], torch.tensor([t]))[0]
        digit = [caption(d) for d in range(10)].index(batch["text"][i])
        expected.append(logits.logsumexp(0) - logits[task.info.classes.index(caption(digit))])
    torch.testing.assert_close(seen[0], torch.stack(expected).mean())
    torch.testing.assert_close(logged["loss"], seen[0].detach())


def test_validation_is_the_mean_whole_and_by_tenths(here: Path) -> None:
    """Image by image: t from its part of 1…T, −log softmax at the digit, and whether it is the likeliest."""
    task = ClassifierTask.from_config(
        configuration.load(ClassifierTrainingConfig, here / "pixels.yaml", ["train.validation_size=43"]), print
    )
    schedule, parts, found = task.schedule, scattered(list(range(43)), 43), []
    with torch.no_grad():
        task.classifier.linear.weight *= 20
        figures = task.validate(0, lambda t: t, 0, 1)
        for p in range(43):
            sample, t = collate([task.validation[p]]), (parts[p] * 20).long()[None]
            x_t = schedule.alpha(t).float() * sample["image"] + schedule.sigma(t).float() * sample["eps"]
            logits, label = task.classifier(x_t, t)[0], task.info.label(sample["text"][0])
            found.append((int(t), float(logits.logsumexp(0) - logits[label]), float(int(logits.argmax()) == label)))
    tenths = [[right for t, _, right in found if t // 2 == k] for k in range(10)]
    assert figures["accuracy_by_t"] == pytest.approx([sum(tenth) / len(tenth) for tenth in tenths])
    assert figures["loss"] == pytest.approx(sum(loss for _, loss, _ in found) / 43, rel=1e-4)
    error = np.std([loss for _, loss, _ in found]) / np.sqrt(43)
    assert figures["loss_error"] == pytest.approx(error, rel=1e-4)
    assert figures["accuracy"] == pytest.approx(sum(right for *_, right in found) / 43)
    assert figures["accuracy_by_t"] != figures["accuracy_by_t"][::-1]


def test_the_folder_says_what_it_is_for(here: Path) -> None:
    about = json.loads((here / "of-latents/model/classifier/config.json").read_text())
    assert about["classes"] == sorted(caption(d) for d in range(10)) and about["schedule"]["num_steps"] == 20
    info, network = load_classifier(here / "of-latents")
    assert len(info.autoencoder or "") == 64 and network.in_channels == 4 and not network.training
    assert json.loads((here / "of-pixels/model/classifier/config.json").read_text())["autoencoder_sha256"] is None
    with pytest.raises(FolderError, match=r"no classifier in .*nowhere: train one with `ldm train-classifier`"):
        load_classifier(here / "nowhere")
    with pytest.raises(FolderError, match=r"no classifier in .*latents: let its training finish"):
        load_classifier(here / "latents")


def test_classes_of_a_folder(tmp_path: Path) -> None:
    for name in ("tabby_cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(8):
            Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    data = DataConfig("folder", str(tmp_path), "class", caption_templates=("a photo of a {}", "a {}"), image_size=16)
    names, captions = find_classes(open_source(data, "train"), data)
    assert names == ("dog", "tabby cat")
    assert captions == {"a photo of a dog": 0, "a dog": 0, "a photo of a tabby cat": 1, "a tabby cat": 1}
    shutil.rmtree(tmp_path / "dog")
    with pytest.raises(ConfigError, match="needs 2 to 10000 classes, the training split has 1"):
        find_classes(open_source(data, "train"), data)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.image_size=32", "data.image_size is 32 but the diffusion model's is 16"),
        ("data.image_channels=3", "data.image_channels is 3 but the diffusion model's is 1"),
        ("data={source: shapes, size: 10}", "classes are those of source: digits"),
        ("train.gradient_checkpointing=true", "train.gradient_checkpointing: the classifier does not support it"),
        ("model.groups=3", "model.channels 8 is not a positive multiple of groups 3"),
        ("diffusion=nowhere", "no run or model folder nowhere"),
    ],
)
def test_what_does_not_fit_is_one_line(
    here: Path, override: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["train-classifier", str(here / "latents.yaml"), f"run={tmp_path}/run", override]) in (2, 4)
    assert message in capsys.readouterr().err


# guidance in the pipeline


def draw(pipe: Pipeline, prompt: str = THREE, **settings: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in pipe([prompt] * 2, **settings)]).astype(int)


def test_each_form_moves_the_picture_and_zero_does_not(here: Path, pipe: Pipeline) -> None:
    classifier, plain = str(here / "of-latents"), draw(pipe)
    assert np.array_equal(draw(pipe, classifier=classifier, classifier_scale=0.0), plain)
    pictures = [
        draw(pipe, prompt, classifier=classifier, classifier_scale=300.0, classifier_form=form)
        for form in ("score", "mean")
        for prompt in (THREE, caption(8))
    ]
    assert len({p.tobytes() for p in [plain, *pictures]}) == 5


def test_strong_guidance_makes_the_classifier_sure(here: Path, pipe: Pipeline) -> None:
    """Label, gradient, target and sampler together, by the classifier's own judgement of the latents drawn."""
    info, network = load_classifier(here / "of-latents")
    with torch.no_grad():
        network.linear.weight *= 20  # it has hardly been trained
    pipe = dataclasses.replace(pipe)
    pipe._guides.classifiers["sure"] = info, network
    for form in ("score", "mean"):
        found = {}
        for scale in (0.0, 3.0):
            settings = SampleConfig("ddpm", 20, classifier="sure", classifier_scale=scale, classifier_form=form)
            last: list[torch.Tensor] = []
            list(pipe.sample([THREE] * 8, settings, callback=lambda step, x, x0, last=last: last.append(x)))  # type: ignore[arg-type, func-returns-value]
            found[scale] = float(network(last[-1], torch.zeros(8)).log_softmax(1)[:, info.label(THREE)].mean())
        assert found[3.0] > found[0.0] + 0.5, (form, found)


def test_autoguidance_of_a_model_with_itself_changes_nothing(here: Path, pipe: Pipeline) -> None:
    itself = draw(pipe, autoguidance=str(here / "latents"), autoguidance_scale=3.0)
    assert np.abs(itself - draw(pipe)).max() <= 1
    assert np.abs(draw(pipe, autoguidance=str(here / "weak"), autoguidance_scale=3.0) - itself).max() > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"autoguidance": "elsewhere"}, "autoguidance .*elsewhere: its latents are those of another autoencoder"),
        ({"autoguidance": "pixels"}, r"autoguidance .*pixels: its latents have 1 channels \(pixels\), this model's 4"),
        ({"autoguidance": "linear"}, "autoguidance .*linear: its schedule is another than this model's"),
        ({"autoguidance": "longer"}, "autoguidance .*longer: its schedule has 30 steps, this model's 20"),
        ({"autoguidance": "eps"}, "autoguidance .*eps: its target is eps, this model's is v"),
        ({"classifier": "of-pixels"}, r"classifier .*of-pixels: its latents have 1 channels \(pixels\)"),
        (
            {"classifier": "of-latents", "prompt": "a 3"},
            "the classifier knows no 'a 3', only: a handwritten digit eight, ",
        ),
        (
            {"classifier": "of-latents", "classifier_form": "mean", "sampler": "ddim"},
            "take sampler ddpm, not ddim, or form score",
        ),
        ({"dynamic_threshold": 0.9}, "dynamic_threshold is for models of pixels"),
        ({"classifier_scale": 3.0}, "classifier_scale is for classifier: name one, or leave it out"),
        ({"autoguidance_scale": 3.0}, "autoguidance_scale is for autoguidance: name one, or leave it out"),
        ({"guidance_interval": (2.0, 1.0)}, "guidance_interval must be two numbers 0 ≤ lo < hi"),
        ({"guidance_rescale": 1.5}, "guidance_rescale must lie between 0.0 and 1.0"),
        ({"dynamic_threshold": 1.5}, "dynamic_threshold must lie between"),
        ({"classifier_form": "variance"}, "classifier_form must be one of score, mean"),
    ],
)
def test_what_cannot_guide_says_so(here: Path, pipe: Pipeline, settings: dict[str, Any], message: str) -> None:
    for name in ("autoguidance", "classifier"):
        if name in settings:
            settings = {**settings, name: str(here / settings[name])}
    with pytest.raises(ConfigError, match=message):
        draw(pipe, **settings)


def test_a_classifier_of_other_latents_or_schedule_is_refused(here: Path) -> None:
    for name, message in (
        ("elsewhere", "latents are those of another autoencoder"),
        ("linear", "its schedule is another than this model's"),
    ):
        with pytest.raises(ConfigError, match=message):
            draw(Pipeline.from_pretrained(here / name), classifier=str(here / "of-latents"))


def test_pixel_models_are_thresholded(here: Path) -> None:
    pixels = Pipeline.from_pretrained(here / "pixels", "cpu")
    sizes = []
    for threshold in (None, 0.5):
        sizes.append([])
        settings = SampleConfig("ddpm", 4, dynamic_threshold=threshold)
        list(pixels.sample([""], settings, callback=lambda step, x, x0: sizes[-1].append(float(x0.abs().max()))))  # type: ignore[arg-type, func-returns-value]
    assert max(sizes[0]) > 1.5 and max(sizes[1]) <= 1 + 1e-5


def test_the_command_line_draws_and_the_picture_says_how(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guided = ["--classifier", str(here / "of-latents"), "--classifier-scale", "4", "--classifier-form", "mean"]
    more = [
        "--guidance-interval",
        "0.1",
        "50",
        "--guidance-rescale",
        "0.3",
        "--autoguidance",
        str(here / "weak"),
        "--autoguidance-scale",
        "1.5",
    ]
    arguments = ["sample", str(here / "latents"), "--out", str(tmp_path), "--device", "cpu", *guided, *more]
    assert main([*arguments, "--prompt", THREE]) == 0, capsys.readouterr().err
    about = json.loads(Image.open(tmp_path / "00000-a-handwritten-digit-three.png").text["ldm"])  # type: ignore[attr-defined]
    expected = {
        "classifier": str(here / "of-latents"), "classifier_scale": 4.0, "classifier_form": "mean",
        "guidance_interval": [0.1, 50.0], "guidance_rescale": 0.3,
        "autoguidance": str(here / "weak"), "autoguidance_scale": 1.5, "sampler": "ddpm",
    }  # fmt: skip
    assert {name: about[name] for name in expected} == expected
    assert main([*arguments, "--prompt", "a handwritten digit eleven"]) == 2
    assert "knows no 'a handwritten digit eleven'" in capsys.readouterr().err
    assert main(arguments) == 2 and "--prompt or --prompts-file is needed" in capsys.readouterr().err


def test_captions_of_several_templates_are_one_class() -> None:
    info = ClassifierInfo(
        ClassifierConfig(), ("cat", "dog"), {"a cat": 0, "a dog": 1, "one dog": 1}, 4, ScheduleConfig(), None
    )
    assert [info.label(c) for c in ("a cat", "a dog", "one dog")] == [0, 1, 1]


# the sweep


def test_the_sweep_measures_what_the_pipeline_draws(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture and its figures from the command line; the figures again from images that the pipeline draws here."""
    drawn: list[SampleConfig] = []
    original = Pipeline.sample

    def counted(self: Pipeline, prompts: Any, settings: SampleConfig, **further: Any) -> Any:
        drawn.append(settings)
        return original(self, prompts, settings, **further)

    monkeypatch.setattr(Pipeline, "sample", counted)
    classifier = str(here / "of-latents")
    arguments = [
        "plot",
        "classifier",
        str(here / "latents"),
        "--classifier",
        classifier,
        "--out",
        str(tmp_path / "p.png"),
    ]
    assert main([*arguments, "--images", "29", "--steps", "2", "--scales", "40", "0", "80"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert sum(" right " in line and line.endswith("n = 20") for line in said) == 9
    assert any(line.startswith("140/140") for line in said)
    assert [s.classifier_scale for s in drawn] == [0, 40, 80, 40, 80, 40, 80]  # 0 is drawn once for all three
    picture = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"))
    assert picture.shape[1] <= 1250 and (picture[:8] == 255).all()
    report = json.loads((tmp_path / "p.json").read_text())
    assert (report["captions"], report["images_of_each"], report["split"]) == (10, 2, "validation")
    assert {"classifier_scale", "classifier_form", "guidance_interval"}.isdisjoint(report["sampling"])
    monkeypatch.undo()
    source = open_source(DataConfig(**DATA), "validation")
    everything = [source[i] for i in range(source.length or 0)]
    captions = list(dict.fromkeys(sample.text for sample in everything))
    real = np.mean([pairwise_distance(np.stack([s.image for s in everything if s.text == c][:REAL])) for c in captions])
    pipe, judge = Pipeline.from_pretrained(here / "latents"), DigitJudge(16)
    twice = [c for c in captions for _ in range(2)]
    asked: tuple[dict[str, Any], ...] = ({}, {"guidance_interval": (0.0, 10.0)}, {"classifier_form": "mean"})
    found = set()
    for v, ((name, of), settings) in enumerate(zip(report["variants"].items(), asked, strict=True)):
        assert [row["scale"] for row in of["scales"]] == [40, 0, 80], name
        for k, row in enumerate(of["scales"]):
            guided = {"classifier": classifier, "classifier_scale": row["scale"], **settings} if row["scale"] else {}
            images = [
                np.asarray(i)
                for i in pipe(twice, sampler="ddpm", steps=2, guidance_scale=0.0, seed=0, batch_size=20, **guided)
            ]
            grey = np.stack(images).reshape(20, 16, 16, -1)[..., :1]
            right = sum(caption(d) == c for d, c in zip(judge.read(grey), twice, strict=True))
            varied = np.mean([pairwise_distance(pair) for pair in grey.reshape(10, 2, 16, 16, 1)]) / real
            assert row["judged"]["all"]["accuracy"] == pytest.approx(right / 20) and row["diversity"] == pytest.approx(
                varied, rel=1e-6
            )
            found.add(row["diversity"])
            for c in range(5):  # 64 pixels each, the first of its caption, 2 apart
                y, x = BELOW + 2 * HEADER + 66 * k, EDGE + 66 + v * (5 * 66 - 2 + 24) + 66 * c
                np.testing.assert_array_equal(picture[y : y + 64 : 4, x : x + 64 : 4, :1], grey[2 * c])
    assert len(found) == 7  # each variant moves the images, and each differently


def test_a_sweep_without_zero_and_one_of_zero_alone(here: Path, tmp_path: Path) -> None:
    arguments = [
        "plot",
        "classifier",
        str(here / "latents"),
        "--classifier",
        str(here / "of-latents"),
        "--out",
        str(tmp_path / "p.png"),
    ]
    for scale in ("0", "2"):
        assert main([*arguments, "--images", "20", "--steps", "1", "--scales", scale]) == 0
        report = json.loads((tmp_path / "p.json").read_text())
        assert [[row["scale"] for row in of["scales"]] for of in report["variants"].values()] == [[float(scale)]] * 3


def test_what_cannot_be_swept_is_said(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["plot", "classifier", str(here / "latents"), "--out", str(tmp_path / "p.png"), "--classifier"]
    for more, message in (
        ([str(here / "of-latents"), "--images", "19"], "images must be at least 20, two of each caption, got 19"),
        ([str(here / "of-latents"), "--scales", "-1"], "classifier_scale must"),
        ([str(here / "of-latents"), "--steps", "21"], "steps must lie between 1 and 20"),
        ([str(here / "of-pixels"), "--steps", "2"], "its latents have 1 channels (pixels)"),
        ([str(here / "latents")], "no classifier in"),
        ([str(here / "of-latents/model/classifier")], "is not a run: it has no config.yaml"),
    ):
        assert main([*start, *more]) in (2, 3, 4)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "p.json").exists()
