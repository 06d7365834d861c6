"""`ldm plot`: figures against closed forms and the pipeline; every sub-command; its errors."""

import dataclasses
import json
import re
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from autoencoder.config import AutoencoderConfig
from autoencoder.model import AutoencoderKL
from ldm import config as configuration
from ldm.cli.main import main
from ldm.config import SCHEDULES, ClipConfig, DataConfig, DiffusionTrainingConfig, SampleConfig, ScheduleConfig, to_dict
from ldm.data.sources import open_source
from ldm.data.transforms import prepare
from ldm.diffusion.schedule import Schedule
from ldm.distributed.processes import ALONE, Processes
from ldm.evaluation.evaluate import JUDGES
from ldm.evaluation.figures import chains, page, schedules, sweep
from ldm.models.clip import build_clip, from_clip, train_tokenizer
from ldm.models.unet import UNet
from ldm.pipeline import Pipeline
from ldm.pipeline.codec import LatentCodec

PROMPTS = ["a small red circle on a white background", "a large blue star on a black background"]
RUN: dict[str, Any] = {
    "data": {"source": "shapes", "image_size": 32, "size": 6},
    "unet": {"channels": [16, 16], "layers_per_level": 1, "attention_levels": [1], "heads": [2], "groups": 4},
    "sample": {"steps": 3, "guidance_scale": 2.0},
}
VALIDATION = open_source(DataConfig(source="shapes", image_size=32), "validation")


@cache
def all_captions() -> list[str]:
    return [VALIDATION.text(i) for i in range(5_000)]


def where(text: str) -> list[int]:
    """Samples of the validation set with this caption."""
    return [i for i, other in enumerate(all_captions()) if other == text]


@pytest.fixture(autouse=True)
def few_real_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less of the validation set is searched."""
    monkeypatch.setattr(sweep, "REAL", 4)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained models as finished runs: two-stage with text on shapes, pixel models without text."""
    folder = tmp_path_factory.mktemp("plots")
    torch.manual_seed(0)
    clip = ClipConfig(width=16, layers=1, heads=2, max_length=16, merges=8, patch_size=8, projection=8)
    tokenizer = train_tokenizer(PROMPTS, clip.merges, clip.max_length)
    text = from_clip(build_clip(clip, tokenizer, 32, 3), tokenizer)
    codec = LatentCodec(
        AutoencoderKL(AutoencoderConfig(channels=(8, 8, 8), layers_per_level=1, groups=4, mid_attention=False)).eval()
    )
    settings = configuration.build(DiffusionTrainingConfig, {"run": "run", "autoencoder": "run", "text": "run", **RUN})
    unet = UNet(settings.unet, 4, 4, 16)
    for parameter in unet.parameters():  # its last layer begins at 0
        parameter.data += 0.05 * torch.randn_like(parameter)
    Pipeline(
        unet, ScheduleConfig("cosine"), "v", codec, text, 32, settings.sample, caption_dropout=0.1
    ).save_pretrained(folder / "run/model")
    configuration.save(settings, folder / "run/config.yaml")
    pixels = Pipeline(
        UNet(settings.unet, 3, 3, None), ScheduleConfig(num_steps=20), "eps", None, None, 32, settings.sample
    )
    for name, source in (("pixels", "textures"), ("silent", "shapes")):
        pixels.save_pretrained(folder / name / "model")
        tree = {"run": name, "autoencoder": "none", "text": "none", **RUN, "data": {**RUN["data"], "source": source}}
        configuration.save(configuration.build(DiffusionTrainingConfig, tree), folder / name / "config.yaml")
    return folder


@pytest.fixture(scope="module")
def pipe(here: Path) -> Pipeline:
    return Pipeline.from_pretrained(here / "run", "cpu")


# ---------------------------------------------------------------- schedules


def lines(shown: Sequence[schedules.Entry]) -> list[tuple[np.ndarray, np.ndarray]]:
    """What the page draws: ᾱ and log SNR of each line."""
    signal, ratio = schedules.schedules_page(shown, schedules.drawn_shape()).figure.axes[:2]
    pairs = list(zip(signal.lines, ratio.lines, strict=True))
    assert all(np.array_equal(x := np.asarray(line.get_xdata()), np.arange(len(x))) for pair in pairs for line in pair)
    return [(np.asarray(a.get_ydata()), np.asarray(b.get_ydata())) for a, b in pairs]


def test_the_curves_are_the_schedules() -> None:
    drawn = lines(schedules.entries(SCHEDULES, 50))
    assert len(drawn) == len(SCHEDULES)
    for name, (bar, log_snr) in zip(SCHEDULES, drawn, strict=True):
        expected = np.cumprod(1 - Schedule.from_config(ScheduleConfig(name, 50)).betas.numpy())
        np.testing.assert_allclose(bar, expected, rtol=1e-9)
        np.testing.assert_allclose(log_snr, np.log(expected / (1 - expected)), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        drawn[SCHEDULES.index("linear")][0], np.cumprod(1 - np.linspace(1e-4, 0.02, 50)), rtol=1e-9
    )


def test_variants_stand_beside_their_schedule() -> None:
    shown = schedules.entries(["scaled_linear"], 1000, zero_terminal_snr=True, shift=2.0)
    assert len({entry.colour for entry in shown}) == 1 and len({entry.dash for entry in shown}) == 3
    (_, plain_ratio), (zero, zero_ratio), (_, shifted_ratio) = lines(shown)
    assert plain_ratio[-1] == pytest.approx(np.log(4.682e-3), abs=1e-4)
    assert zero[-1] == 0 and np.isnan(zero_ratio[-1]) and np.isfinite(zero_ratio[:-1]).all()
    np.testing.assert_allclose(plain_ratio - shifted_ratio, 2 * np.log(2), rtol=1e-6)  # log SNR is 2λ


def test_equal_schedules_are_one_line_with_both_names() -> None:
    pair = ("linear", "linear_rescaled")
    ((entry, _),) = schedules.merged(schedules.entries(pair, 1000))
    assert entry.label == "linear,\nlinear_rescaled"
    assert [entry.label for entry, _ in schedules.merged(schedules.entries(pair, 500))] == list(pair)


def test_a_strip_shows_one_noise_at_every_level() -> None:
    image, t = schedules.drawn_shape(), schedules.times(1000)
    assert t.tolist() == [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999]
    assert schedules.times(4).tolist() == [0, 1, 2, 3]
    noises = []
    for name in ("linear", "cosine"):
        bar = np.cumprod(1 - Schedule.from_config(ScheduleConfig(name)).betas.numpy())[t.numpy()][:, None, None, None]
        noises.append(
            (
                schedules.strip(Schedule.from_config(ScheduleConfig(name)), image, t).numpy()
                - np.sqrt(bar) * image.numpy()
            )
            / np.sqrt(1 - bar)
        )
    together = np.concatenate(noises)
    np.testing.assert_allclose(together, np.broadcast_to(together[5], together.shape), atol=1e-3)
    assert together[5].std() == pytest.approx(1, abs=0.04)


# ---------------------------------------------------------------- chains


def test_the_forward_chain_is_a_draw_of_the_joint() -> None:
    schedule, n = Schedule.from_config(ScheduleConfig("cosine", 100)), 4000
    x0 = torch.full((n, 1), 0.8, dtype=torch.float64)
    early, late = (x[:, 0].numpy() for x in chains.noised(schedule, x0, [20, 60], seed=0))
    bars = np.cumprod(1 - schedule.betas.numpy())[[20, 60]]
    for x, bar in zip((early, late), bars, strict=True):
        assert x.mean() == pytest.approx(0.8 * np.sqrt(bar), abs=0.06) and x.var() == pytest.approx(1 - bar, rel=0.08)
    assert np.cov(early, late)[0, 1] == pytest.approx(np.sqrt(bars[1] / bars[0]) * (1 - bars[0]), rel=0.15)


def test_the_forward_chain_of_a_two_stage_model(pipe: Pipeline) -> None:
    images, captions = chains.validation_images(DataConfig(source="shapes", image_size=32), 2)
    assert captions == [VALIDATION[0].text, VALIDATION[1].text]
    rows = chains.forward_chain(pipe, images, [100, 999], seed=0)
    assert list(rows) == [chains.LATENT, chains.DECODED, chains.PIXELS] and {row.shape for row in rows.values()} == {
        (2, 3, 32, 32, 3)
    }
    assert np.array_equal(rows[chains.PIXELS][:, 0], np.stack([VALIDATION[0].image, VALIDATION[1].image]))
    assert pipe.codec is not None
    with torch.no_grad():
        there_and_back = pipe.codec.autoencoder(images)[0]
    assert (
        abs(
            (there_and_back.clamp(-1, 1) + 1) * 127.5 - torch.from_numpy(rows[chains.DECODED][:, 0]).permute(0, 3, 1, 2)
        ).max()
        <= 0.51
    )
    blocks = rows[chains.LATENT].reshape(2, 3, 8, 4, 8, 4, 3)
    assert (blocks == blocks[:, :, :, :1, :, :1]).all()  # one colour for each latent position


def test_a_pixel_model_has_one_row(here: Path) -> None:
    rows = chains.forward_chain(
        Pipeline.from_pretrained(here / "pixels", "cpu"), torch.zeros(1, 3, 32, 32), [0, 19], seed=0
    )
    assert [row.shape for row in rows.values()] == [(1, 3, 32, 32, 3)]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_the_reverse_chain_is_the_samplers(pipe: Pipeline, sampler: str) -> None:
    settings = SampleConfig(sampler, 6, 2.0, seed=5)
    chain = chains.reverse_chain(pipe, PROMPTS, settings, columns=3)
    images = torch.cat(list(pipe.sample(PROMPTS, settings, batch_size=2)))
    assert torch.equal(chain.images, images) and chain.t == [999, 666, 166]
    assert pipe.codec is not None and torch.equal(pipe.codec.decode(chain.end), images)
    denoiser = pipe.denoiser(PROMPTS, settings)
    with torch.no_grad():
        for t, x, x0 in zip(
            chain.t, chain.x, chain.x0, strict=True
        ):  # the prediction stands under what it was made from
            torch.testing.assert_close(denoiser(x, torch.tensor(t, dtype=torch.float64)).x0, x0, rtol=1e-4, atol=1e-4)


def test_the_first_picture_is_the_noise_that_sampling_starts_from(pipe: Pipeline) -> None:
    seen: list[Tensor] = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    chain = chains.reverse_chain(pipe, PROMPTS, SampleConfig("ddim", 2, 1.0, seed=3))
    handle.remove()
    assert torch.equal(chain.x[0], seen[0]) and torch.equal(chain.x[1], seen[1]) and len(chain.t) == 2


# ---------------------------------------------------------------- guidance


@pytest.mark.parametrize(("source", "wanted", "captions"), [("shapes", 3, 3), ("digits", 30, 10)])
def test_real_pictures_have_the_caption(source: str, wanted: int, captions: int) -> None:
    opened = open_source(DataConfig(source=source, image_size=32), "validation")
    real = sweep.real_pictures(opened, 32, wanted)
    assert len(real) == captions and next(iter(real)) == opened.text(0)
    texts = all_captions() if source == "shapes" else [opened.text(i) for i in range(opened.length or 0)]
    for text, pictures in real.items():
        expected = [opened[i].image for i, other in enumerate(texts) if other == text][:4]
        assert np.array_equal(pictures, np.stack(expected)) and len(np.unique(pictures, axis=0)) > 1


def redrawn(scale: float, captions: Sequence[str], numbers: Sequence[int]) -> Iterator[Tensor]:
    """In place of a model: real pictures of the captions, others for each number; above scale 1 always the same one."""
    for text, number in zip(captions, numbers, strict=True):
        yield prepare(VALIDATION[where(text)[number % 4 if scale <= 1 else 0]].image, 32)[None]


def swept(processes: Processes) -> tuple[list[sweep.Setting], np.ndarray]:
    real = {
        text: np.stack([VALIDATION[i].image for i in where(text)[:4]])
        for text in (VALIDATION.text(i) for i in range(3))
    }
    return sweep.sweep(redrawn, [1.0, 2.0], real, 4, JUDGES["shapes"](32), processes)


def test_a_sweep_of_real_pictures() -> None:
    (all_of_them, always_one), first = swept(ALONE)
    assert (all_of_them.scale, always_one.scale) == (1.0, 2.0)
    assert all_of_them.diversity == pytest.approx(1) and always_one.diversity == always_one.diversity_high == 0
    for setting in (all_of_them, always_one):
        assert setting.judged["all"]["accuracy"] == 1 and setting.judged["all"]["n"] == 12
    assert first.shape == (3, 2, 32, 32, 3) and np.array_equal(first[:, 0], first[:, 1])


def test_two_processes_find_what_one_does() -> None:
    meet, values, found = threading.Barrier(2), [None, None], [None, None]

    def process(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            meet.wait(60)
            everyone = list(values)
            meet.wait(60)
            return everyone

        found[rank] = swept(Processes(rank, 2, gather))  # type: ignore[call-overload]

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    settings, first = swept(ALONE)
    for result in found:
        assert result is not None and result[0] == settings and np.array_equal(result[1], first)


# ---------------------------------------------------------------- the page


def test_pictures_are_enlarged_by_a_whole_factor_or_reduced() -> None:
    image = np.arange(2 * 20 * 20 * 1, dtype=np.uint8).reshape(2, 20, 20, 1)
    large = page.fitted(image, 64)
    assert large.shape == (2, 64, 64, 3) and np.array_equal(large[:, 2:62:3, 2:62:3], image.repeat(3, axis=-1))
    assert (large[:, :2] == 255).all() and (large[:, 62:] == 255).all()
    assert page.fitted(np.zeros((1, 200, 200, 4), dtype=np.uint8), 64).shape == (1, 64, 64, 3)


def test_pictures_reach_the_file_unchanged(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32, 3), dtype=np.uint8)
    made = page.table([("a caption with $ and $", images)], ["one", "two"], ["x", "y", "z"], title="a table")
    made.save(tmp_path / "table.png", {"seed": 1})
    opened = Image.open(tmp_path / "table.png")
    assert json.loads(opened.text["ldm"]) == {"seed": 1}  # type: ignore[attr-defined]
    pixels, enlarged = np.asarray(opened.convert("RGB")), images.repeat(3, axis=2).repeat(3, axis=3)
    y, x = page.EDGE + 30 + page.HEADER, page.EDGE + 250
    step = page.CELL + page.GAP
    for i, j in np.ndindex(2, 3):
        top, left = y + i * step, x + j * step
        assert np.array_equal(pixels[top : top + page.CELL, left : left + page.CELL], enlarged[i, j])


# ---------------------------------------------------------------- commands


def plot(*arguments: str | Path) -> int:
    return main(["plot", *map(str, arguments)])


def test_every_plot_is_drawn(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = here / "run"
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(photo)
    assert plot("schedules") == 0 and (tmp_path / "schedules.png").exists()
    assert plot("schedules", run, "--names", "cosine", "--zero-terminal-snr", "--shift", "2", "--image", photo) == 0
    assert plot("forward", run, "--images", "2", "--times", "100", "0", "999") == 0
    assert plot("forward", here / "pixels", "--out", tmp_path / "forward.pdf") == 0
    assert (
        plot(
            "reverse",
            run,
            *(word for prompt in PROMPTS for word in ("--prompt", prompt)),
            "--sampler",
            "ddim",
            "--steps",
            "9",
        )
        == 0
    )
    assert plot("reverse", here / "pixels", "--columns", "2", "--out", tmp_path / "new/reverse.png") == 0
    assert plot("guidance", run, "--scales", "0", "1", "3", "--images", "9", "--steps", "1", "--seed", "4") == 0
    assert sorted(file.name for file in (run / "plots").iterdir()) == [
        "forward.png",
        "guidance.json",
        "guidance.png",
        "reverse.png",
        "schedules.png",
    ]
    said = capsys.readouterr().out
    for file in (tmp_path / "schedules.png", *(run / "plots").glob("*.png"), tmp_path / "new/reverse.png"):
        assert file.name in said
        pixels = np.asarray(Image.open(file).convert("RGB"))
        assert pixels.shape[1] <= 1250 and (pixels[:8] == 255).all() and len(np.unique(pixels)) > 50
    about = json.loads(Image.open(run / "plots/reverse.png").text["ldm"])  # type: ignore[attr-defined]
    assert about["prompts"] == PROMPTS and about["steps"] == 9 and about["sampler"] == "ddim"


def test_the_figures_of_a_sweep_are_those_of_the_pictures(here: Path, pipe: Pipeline, tmp_path: Path) -> None:
    assert (
        plot("guidance", here / "run", "--scales", "2", "--images", "9", "--steps", "1", "--out", tmp_path / "g.png")
        == 0
    )
    report = json.loads((tmp_path / "g.json").read_text())
    assert (report["captions"], report["images_of_each"], report["images"]) == (
        2,
        4,
        8,
    ) and "root-mean-square" in report["diversity"]
    texts = [VALIDATION.text(0), VALIDATION.text(1)]
    captions = [text for text in texts for _ in range(4)]
    settings = dataclasses.replace(pipe.defaults, steps=1, guidance_scale=2.0)
    images = (
        np.stack([np.asarray(picture) for picture in pipe(captions, steps=1, guidance_scale=2.0)]).astype(float) / 255
    )
    assert report["sampling"] == {k: v for k, v in to_dict(settings).items() if k != "guidance_scale"}

    def spread(group: np.ndarray) -> float:
        return float(np.mean([np.sqrt(((a - b) ** 2).mean()) for i, a in enumerate(group) for b in group[:i]]))

    real = [spread(np.stack([VALIDATION[i].image for i in where(text)[: sweep.REAL]]) / 255) for text in texts]
    (row,) = report["scales"]
    assert row["diversity"] == pytest.approx((spread(images[:4]) + spread(images[4:])) / sum(real), rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["schedules", "--names", "cosinus"], r"--names cosinus: no such schedule, there are linear, "),
        (["schedules", "--shift", "0"], r"shift must"),
        (["schedules", "--num-steps", "1"], r"num_steps must lie between 2"),
        (["schedules", "RUN", "--shift", "2"], r"change the schedules of --names"),
        (["schedules", "--image", "no.png"], r"no\.png: no such file"),
        (["schedules", "nowhere"], r"no run or model folder nowhere"),
        (["schedules", "--out", "a.gif"], r"--out a\.gif must end in \.png"),
        (["schedules", "--out", "."], r"is a folder"),
        (["forward", "nowhere"], r"nowhere is not a run"),
        (["forward", "RUN", "--times", "5", "1000"], r"--times must lie between 0 and 999 .* got 5, 1000"),
        (["forward", "RUN", "--times", "-1"], r"--times must lie"),
        (["forward", "RUN", "--images", "0"], r"images must be at least 1"),
        (["forward", "RUN", "--seed", "-1"], r"seed must"),
        (["reverse", "nowhere", "--prompt", "x"], r"no run or model folder nowhere"),
        (["reverse", "RUN"], r"--prompt is needed"),
        (["reverse", "PIXELS", "--prompt", "x"], r"unconditional: leave --prompt out"),
        (["reverse", "RUN", "--prompt", "x", "--steps", "1001"], r"steps must lie between 1 and 1000"),
        (["reverse", "RUN", "--prompt", "x", "--sampler", "eulr"], r"sampler must be one of"),
        (["reverse", "RUN", "--prompt", "x", "--columns", "0"], r"columns must be at least 1"),
        (["guidance", "nowhere"], r"nowhere is not a run"),
        (["guidance", "PIXELS"], r"there is a judge for shapes, shapes-two, shapes-striped, digits, not for textures"),
        (["guidance", "SILENT"], r"unconditional, there is nothing to guide"),
        (["guidance", "RUN", "--scales", "1", "-2"], r"guidance_scale must .*-2"),
        (["guidance", "RUN", "--images", "1"], r"images must be at least 2"),
        (["guidance", "RUN", "--steps", "2000"], r"steps must lie between 1 and 1000"),
        (["gudance", "RUN"], r"invalid choice: 'gudance'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    here: Path,
    tmp_path: Path,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"RUN": here / "run", "PIXELS": here / "pixels", "SILENT": here / "silent"}
    try:
        code = plot(*(places.get(word, word) for word in arguments))
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code in (2, 3, 4) and error.count("\n") == 1 and re.search(said, error), error
