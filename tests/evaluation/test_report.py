"""The report of a run: true to its files in any state, fetches nothing, and is safe against hostile text."""

import base64
import io
import json
import math
import random
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.axes
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from ldm import config as configuration
from ldm.cli.main import main
from ldm.config import AutoencoderTrainingConfig, ConfigError, DiffusionTrainingConfig, load_run
from ldm.data.sample import BadSample
from ldm.data.sources import open_source
from ldm.evaluation.report import panels
from ldm.evaluation.report import report as reporting
from ldm.evaluation.report.html import element
from ldm.evaluation.report.panels import HINTS, quantity, thin
from ldm.evaluation.report.report import GRIDS, evenly
from ldm.pipeline.codec import load_codec
from ldm.runs import records as record

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=x onerror=alert(1)>"
SIDE = 16
TRAIN = {
    "steps": 6, "batch_size": 4, "lr": 1e-3, "trackers": [], "validation_size": 6,
    "log_every": 1, "validate_every": 2, "sample_every": 3, "checkpoint_every": 6,
}  # fmt: skip
VOID = {"meta", "img"}
KNOWN = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "table", "tr", "td", "th"}
KNOWN |= {"nav", "a", "section", "div", "figure", "figcaption", "img", "p", "ul", "ol", "li", "pre", "b"}


class Page(HTMLParser):
    """A page read back: elements with their attributes, and per section its text, tables and pictures."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = file.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: dict[str, str] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.sources: dict[str, list[str]] = {}
        self._open: list[str] = []
        self._section = "head"
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {k: v or "" for k, v in attrs}
        self.elements.append((tag, given))
        if tag == "section":
            self._section = given["id"]
        if tag == "tr":
            self.tables.setdefault(self._section, []).append([])
        if tag in ("td", "th"):
            self.tables[self._section][-1].append("")
        if tag == "img":
            self.sources.setdefault(self._section, []).append(given["src"])
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text[self._section] = self.text.get(self._section, "") + data + "\n"
        if {"td", "th"} & set(self._open):
            self.tables[self._section][-1][-1] += data

    def rows(self, section: str) -> dict[str, list[str]]:
        return {row[0]: row[1:] for row in self.tables.get(section, [])}

    def pictures(self, section: str) -> list[np.ndarray]:
        """The embedded pixels of a section, drawings left out."""
        found = (s.partition(",") for s in self.sources.get(section, []))
        return [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for kind, _, data in found if "svg" not in kind
        ]


def write(folder: Path, *arguments: str) -> Page:
    file = folder / "report.html"
    assert main(["report", str(folder), *arguments]) == 0
    return Page(file)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the three stages on a folder of pictures from smooth to noisy, whose captions are hostile."""
    here = tmp_path_factory.mktemp("report")
    (here / "images").mkdir()
    random_ = np.random.default_rng(0)
    rows = []
    for i in range(40):
        ramp = np.linspace(0, 255, SIDE)[:, None, None] * np.ones((1, SIDE, 3))
        image = np.clip(ramp + random_.normal(0, 4 * i, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(image).save(here / f"images/{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"{HOSTILE} number {i}"}))
    (here / "images/metadata.jsonl").write_text("\n".join(rows))
    data = {"source": "folder", "folder": str(here / "images"), "image_size": SIDE, "validation_fraction": 0.5}
    loss = {"gan": 0.5, "gan_start": 2, "disc_channels": 8, "disc_layers": 1}
    model = {"channels": [8, 8, 8], "layers_per_level": 1, "groups": 4, "mid_attention": False}
    unet = {"channels": [8, 8], "layers_per_level": 1, "attention_levels": [], "heads": [1], "groups": 4}
    clip = {"width": 16, "layers": 1, "heads": 2, "max_length": 32, "merges": 8, "patch_size": 8, "projection": 8}
    trees: dict[str, dict[str, Any]] = {
        "autoencoder": {"model": model, "loss": loss},
        "clip": {
            "model": clip,
            "data": {"source": "shapes-two", "image_size": 32, "size": 24},
            "train": {**TRAIN, "steps": 2},
        },
        "ldm": {
            "autoencoder": str(here / "autoencoder"),
            "text": "none",
            "unet": unet,
            "sample": {"steps": 2},
            "prompts": [HOSTILE, "b"],
        },
    }
    for name, tree in trees.items():
        (here / f"{name}.yaml").write_text(
            yaml.safe_dump({"run": str(here / name), "data": data, "train": TRAIN, **tree})
        )
        assert main([f"train-{name}", str(here / f"{name}.yaml")]) == 0
    return here


@pytest.fixture(scope="module")
def pages(trained: Path) -> dict[str, Page]:
    return {name: write(trained / name) for name in ("autoencoder", "clip", "ldm")}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A run directory written by hand: its configuration, and whatever lines and status are given."""

    def make(logged: list[dict[str, Any]] | None = None, status: dict[str, Any] | None = None, **settings: Any) -> Path:
        run = tmp_path / "run"
        (run / "samples").mkdir(parents=True)
        tree = {
            "run": "x",
            "data": {"source": "shapes", "image_size": 32, "size": 8},
            "autoencoder": "none",
            "text": "none",
            **settings,
        }
        configuration.save(configuration.build(DiffusionTrainingConfig, tree), run / "config.yaml")
        if logged is not None:
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
        if status is not None:
            (run / "status.json").write_text(json.dumps(status))
        return run

    return make


@pytest.fixture
def exported(trained: Path, tmp_path: Path) -> Path:
    """A run of the autoencoder with its model and nothing else."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "model"):
        (run / name).symlink_to(trained / "autoencoder" / name)
    return run


@pytest.fixture
def plotted(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[list[float], list[float]]]:
    """What is drawn, by label."""
    drawn: dict[str, tuple[list[float], list[float]]] = {}
    original = matplotlib.axes.Axes.plot

    def plot(self: Any, x: Any, y: Any, **options: Any) -> Any:
        drawn[options["label"]] = (list(x), list(y))
        return original(self, x, y, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", plot)
    return drawn


# what stands in it


def test_every_section_is_there(pages: dict[str, Page]) -> None:
    everything = ["curves", "pictures-over-time", "reconstructions", "metrics"]
    everything += ["throughput", "skipped-files", "configuration"]
    for name, expected in {
        "autoencoder": everything,
        "ldm": everything,
        "clip": [s for s in everything if s != "reconstructions"],
    }.items():
        page = pages[name]
        assert [a["id"] for tag, a in page.elements if tag == "section"] == expected
        assert [a["href"] for tag, a in page.elements if tag == "a"] == [f"#{s}" for s in expected]
        assert page.sources["curves"] and page.sources["pictures-over-time"]


def test_the_head_says_what_run_this_is(pages: dict[str, Page], trained: Path) -> None:
    status = json.loads((trained / "autoencoder/status.json").read_text())
    rows = pages["autoencoder"].rows("head")
    assert "autoencoder" in pages["autoencoder"].text["head"] and rows["command"] == ["ldm train-autoencoder"]
    assert rows["state"] == ["done"] and rows["updates"] == ["6 of 6"] and rows["global batch"] == ["4 images"]
    assert rows["wall time"] == [f"{status['seconds']:.1f} s, resumes included"] and rows["model"] == ["exported"]
    weights = trained / "autoencoder/checkpoints/step-00000006"
    counts = {
        n: sum(t.numel() for t in load_file(weights / f"model_{n}.safetensors").values())
        for n in ("autoencoder", "discriminator")
    }
    assert rows["parameters"] == [", ".join(f"{name} {count:,}" for name, count in counts.items())]
    assert [pages[n].rows("head")["command"][0] for n in ("clip", "ldm")] == ["ldm train-clip", "ldm train-ldm"]
    assert all(pages[n].rows("head")["model"] == ["exported"] for n in ("clip", "ldm"))


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(7.26, "7.3 s"), (59.96, "1 min 0 s"), (410.6, "6 min 51 s"), (3599.7, "1 h 0 min"), (9059, "2 h 30 min")],
)
def test_wall_time_is_readable(make_run: Callable[..., Path], seconds: float, told: str) -> None:
    run = make_run(status={"state": "done", "step": 1, "steps": 1, "seconds": seconds})
    assert write(run).rows("head")["wall time"] == [f"{told}, resumes included"]


@pytest.mark.parametrize("name", ["autoencoder", "clip", "ldm"])
def test_the_latest_metrics_are_those_of_metrics_jsonl(pages: dict[str, Page], trained: Path, name: str) -> None:
    newest = {k: (v, line["step"]) for line in lines(trained / name) for k, v in line.items() if k != "step"}
    rows = pages[name].rows("metrics")
    for figure, (value, step) in newest.items():
        told, update = rows[figure]
        assert int(update) == step
        if value is None:
            assert told == "null"
        elif isinstance(value, list):
            assert [math.nan if t == "null" else float(t) for t in told.split(", ")] == pytest.approx(
                [math.nan if v is None else v for v in value], rel=1e-5, nan_ok=True
            )
        else:
            assert float(told) == pytest.approx(value, rel=1e-5)
    assert len(newest) > 5


@pytest.mark.parametrize("name", ["autoencoder", "clip", "ldm"])
def test_whatever_training_logs_has_a_hint(pages: dict[str, Page], trained: Path, name: str) -> None:
    logged = {quantity(k) for line in lines(trained / name) for k in line if k != "step" and not k.endswith("_error")}
    assert logged <= HINTS.keys()
    assert all(HINTS[q] in pages[name].text["curves"] for q in logged - {"lpips", "loss_by_t"})


def test_the_curves_are_the_lines_of_metrics_jsonl(
    trained: Path, plotted: dict[str, tuple[list[float], list[float]]]
) -> None:
    write(trained / "ldm", "--images", "0")
    logged = lines(trained / "ldm")
    for name in ("loss", "validation/loss", "lr", "grad_norm_unet", "updates_per_second"):
        assert plotted[name] == (
            [line["step"] for line in logged if name in line],
            [line[name] for line in logged if name in line],
        )
    assert plotted["validation/loss"][0] == [2, 4, 6] and "validation/loss_error" not in plotted
    by_t = {line["step"]: line["validation/loss_by_t"] for line in logged if "validation/loss_by_t" in line}
    for step in (2, 4, 6):
        tenths, values = plotted[f"update {step}"]
        assert tenths == list(range(1, 11))
        assert values == pytest.approx([math.nan if v is None else v for v in by_t[step]], nan_ok=True)


def test_the_first_the_middle_and_the_last_list_are_drawn(
    make_run: Callable[..., Path], plotted: dict[str, tuple[list[float], list[float]]]
) -> None:
    write(make_run([{"step": k, "validation/loss_by_t": [k / 10] * 10} for k in range(1, 8)]))
    assert {label: y[0] for label, (_, y) in plotted.items()} == {"update 1": 0.1, "update 4": 0.4, "update 7": 0.7}


def test_training_and_validation_share_a_panel(trained: Path) -> None:
    found = {panel.quantity: panel for panel in panels.panels(record.scalar_series(lines(trained / "ldm")))}
    assert list(found["loss"].lines) == ["loss", "validation/loss"]
    assert list(found["loss"].errors) == ["validation/loss"]
    assert "loss_error" not in found
    found = {panel.quantity: panel for panel in panels.panels(record.scalar_series(lines(trained / "autoencoder")))}
    assert set(found["logits"].lines) == {"logits_real", "logits_fake"}
    assert set(found["l1"].lines) == {"l1", "validation/l1"}
    assert set(found["grad_norm"].lines) == {"grad_norm_autoencoder", "grad_norm_discriminator"}
    assert len(found["psnr_noise"].lines) == 3 and list(found["psnr"].lines) == ["validation/psnr"]


@pytest.mark.parametrize("count", [5, 100])
def test_the_standard_error_is_drawn_around_the_loss(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    bars: list[list[float]] = []
    bands: list[tuple[list[float], list[float]]] = []
    monkeypatch.setattr(matplotlib.axes.Axes, "errorbar", lambda self, x, y, yerr, **_: bars.append(yerr))
    monkeypatch.setattr(matplotlib.axes.Axes, "fill_between", lambda self, x, low, high, **_: bands.append((low, high)))
    loss, error = [1 / k for k in range(1, count + 1)], [0.01 * k for k in range(1, count + 1)]
    write(
        make_run([{"step": k + 1, "validation/loss": loss[k], "validation/loss_error": error[k]} for k in range(count)])
    )
    if count == 5:
        assert bars == [error] and bands == []
    else:
        ((low, high),) = bands
        assert low == pytest.approx([a - b for a, b in zip(loss, error, strict=True)])
        assert high == pytest.approx([a + b for a, b in zip(loss, error, strict=True)]) and bars == []


def test_grids_come_in_order_of_updates(pages: dict[str, Page], trained: Path) -> None:
    text = pages["autoencoder"].text["pictures-over-time"]
    assert re.findall(r"update (\d+) \(", text) == ["3", "6"]
    for step, shown in zip((3, 6), pages["autoencoder"].pictures("pictures-over-time"), strict=True):
        np.testing.assert_array_equal(
            shown, np.asarray(Image.open(trained / f"autoencoder/samples/reconstructions-{step:08d}.png"))
        )


def test_many_grids_are_thinned_evenly_first_and_last_kept(make_run: Callable[..., Path]) -> None:
    run = make_run()
    for step in (*range(1, 31), 100):
        for name in ("a-b", "c"):
            Image.new("RGB", (8, 8)).save(run / f"samples/{name}-{step}.png")  # 9 before 10, though not as text
    (run / "samples/notes.png").write_text("")
    text = write(run).text["pictures-over-time"]
    for name in ("a-b", "c"):
        steps = [int(s) for s in re.findall(rf"\({name}-(\d+)\.png\)", text)]
        assert len(steps) == GRIDS and steps == sorted(steps) and steps[0] == 1 and steps[-1] == 100
        assert f"{name} ({GRIDS} of 31, evenly chosen)" in text
    assert max(b - a for a, b in pairwise(steps[:-1])) <= 3
    assert evenly([1, 2, 3], 12) == [1, 2, 3]


def test_a_picture_that_is_being_written_is_named(make_run: Callable[..., Path]) -> None:
    run = make_run()
    Image.effect_noise((64, 64), 50).save(run / "samples/samples-00000001.png")
    whole = (run / "samples/samples-00000001.png").read_bytes()
    (run / "samples/samples-00000002.png").write_bytes(whole[: len(whole) // 2])
    (run / "samples/samples-00000003.png").write_bytes(b"")
    page = write(run)
    assert len(page.pictures("pictures-over-time")) == 1
    assert all(f"samples-0000000{k}.png cannot be read" in page.text["pictures-over-time"] for k in (2, 3))


# reconstructions


def measured(trained: Path) -> tuple[list[float], list[np.ndarray], list[str]]:
    """PSNR of every validation image by another route, the images and their captions."""
    settings = configuration.load(AutoencoderTrainingConfig, trained / "autoencoder/config.yaml")
    source, codec = open_source(settings.data, "validation"), load_codec(trained / "autoencoder")
    samples = [source[i] for i in range(source.length or 0)]
    decibels = []
    with torch.no_grad():
        for sample in samples:  # of SIDE pixels already
            x = torch.from_numpy(sample.image.astype(np.float32)).movedim(-1, 0)[None] / 127.5 - 1
            decoded = codec.autoencoder.decode(codec.autoencoder.encode(x).mean).clamp(-1, 1)
            error = (decoded.numpy().astype(np.float64) - x.numpy()) ** 2
            decibels.append(20 * math.log10(2.0) - 10 * math.log10(error.mean()))
    return decibels, [s.image for s in samples], [s.text for s in samples]


@pytest.mark.parametrize("name", ["autoencoder", "ldm"])
def test_best_median_and_worst_are_what_they_are_called(pages: dict[str, Page], trained: Path, name: str) -> None:
    decibels, images, captions = measured(trained)
    n = len(decibels)
    order = sorted(range(n), key=lambda i: -decibels[i])
    text = pages[name].text["reconstructions"]
    summary = re.search(
        r"of (\d+) validation images .* best (.+) dB, median (.+) dB, worst (.+) dB, mean (.+) dB\.", text
    )
    assert summary is not None and int(summary[1]) == n and n > 18
    expected = [decibels[order[0]], float(np.median(decibels)), decibels[order[-1]], float(np.mean(decibels))]
    assert [float(v) for v in summary.groups()[1:]] == pytest.approx(expected, abs=0.0051)
    assert expected[0] > expected[1] > expected[2]

    groups = dict(zip(("best", "median", "worst"), re.split(r"\n(?:best|median|worst)\n", text)[1:], strict=True))
    shown = {group: [float(v) for v in re.findall(r"^(\d+\.\d\d) dB$", part, re.M)] for group, part in groups.items()}
    middle = (n - 6) // 2
    wanted = {"best": order[:6], "median": order[middle : middle + 6], "worst": order[-6:]}
    pictures = pages[name].pictures("reconstructions")
    for k, (group, indices) in enumerate(wanted.items()):
        assert shown[group] == pytest.approx([decibels[i] for i in indices], abs=0.0051)
        for j, i in enumerate(indices):
            np.testing.assert_array_equal(pictures[6 * k + j][:SIDE], images[i])  # the original is above
            below = pictures[6 * k + j][-SIDE:].astype(float)
            error = ((below - images[i]) ** 2).mean()  # of 8 bits, so nearly
            assert 20 * math.log10(255) - 10 * math.log10(error) == pytest.approx(decibels[i], abs=0.1)
            assert captions[i][:60] in groups[group]


@pytest.mark.parametrize(("images", "shown"), [(1, 1), (2, 1), (4, 2)])
def test_few_images_are_enough(exported: Path, images: int, shown: int) -> None:
    page = write(exported, "--images", str(images))
    assert len(page.pictures("reconstructions")) == 3 * shown
    assert f"of {images} validation image{'s' * (images > 1)} ranked" in page.text["reconstructions"]
    assert "reconstructions" not in write(exported, "--images", "0").text


@pytest.mark.parametrize(
    ("damaged", "told"), [({1}, "of 3 validation images ranked"), ({0, 1, 2, 3}, "none of 4 validation images can")]
)
def test_images_that_cannot_be_read_are_passed_over(
    exported: Path, monkeypatch: pytest.MonkeyPatch, damaged: set[int], told: str
) -> None:
    whole = open_source(load_run(exported).data, "validation")

    class Damaged(type(whole)):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            if index in damaged:
                raise BadSample(f"{index}.png", "cannot be decoded")
            return super().__getitem__(index)

    whole.__class__ = Damaged
    monkeypatch.setattr(reporting, "open_source", lambda data, split: whole)
    page = write(exported, "--images", "4")
    assert told in page.text["reconstructions"]
    assert len(page.pictures("reconstructions")) == (3 if len(damaged) == 1 else 0)


def test_reconstructions_that_are_not_there_are_one_sentence(
    trained: Path, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = make_run()
    assert "diffuses the pixels themselves" in write(run).text["reconstructions"]
    tree = configuration.to_dict(load_run(trained / "ldm"))
    configuration.save(
        configuration.build(DiffusionTrainingConfig, {**tree, "autoencoder": "gone"}), run / "config.yaml"
    )
    assert "None: no autoencoder gone" in write(run).text["reconstructions"]
    data = {**tree["data"], "folder": str(tmp_path / "moved")}
    configuration.save(configuration.build(DiffusionTrainingConfig, {**tree, "data": data}), run / "config.yaml")
    assert "None: no folder" in write(run).text["reconstructions"]
    (run / "config.yaml").write_text((trained / "autoencoder/config.yaml").read_text())
    page = write(run)
    assert "let its training finish" in page.text["reconstructions"]
    assert page.rows("head")["model"][0].startswith("not exported yet")


# tables


def test_report_json_is_shown_with_its_intervals(make_run: Callable[..., Path]) -> None:
    run = make_run()
    assert "Not evaluated yet" in write(run).text["metrics"]
    share = {"accuracy": 0.875, "low": 0.75, "high": 0.9375, "n": 64}
    told = {
        "judge": {"single": {"held_out": {"all": share}}},
        "images": 64,
        "tuned_on_seen": [{"guidance_scale": 2.0, "all": 0.5}],
    }
    (run / "report.json").write_text(json.dumps({**told, "autoencoder": {"psnr": 27.5}}))
    Image.new("RGB", (40, 30), "red").save(run / "samples.png")
    page = write(run)
    rows = page.rows("metrics")
    assert rows["judge.single.held_out.all"] == ["0.875", "0.75\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}0.9375", "64"]
    assert rows["autoencoder.psnr"][0] == "27.5" and rows["tuned_on_seen"][0] == "guidance_scale 2, all 0.5"
    assert "Not evaluated yet" not in page.text["metrics"] and page.pictures("metrics")[0].shape == (30, 40, 3)
    (run / "report.json").write_text("{")
    assert "report.json: cannot be read" in write(run).text["metrics"]


def test_throughput_is_the_median(make_run: Callable[..., Path]) -> None:
    rates = [1.0, 30.0, 2.5, None, 2.0, 40.0]
    logged = [{"step": k + 1, "updates_per_second": rate} for k, rate in enumerate(rates)]
    run = make_run(logged, {"state": "running", "step": 6, "steps": 9, "seconds": 12.345}, train={"batch_size": 16})
    rows = write(run).rows("throughput")
    assert rows["updates per second, median"] == ["2.5"] and rows["images per second, median"] == ["40"]
    assert rows["seconds in status.json"] == ["12.345"]


def test_what_was_skipped_is_counted_grouped_and_listed(make_run: Callable[..., Path]) -> None:
    run = make_run()
    assert "Nothing was skipped" in write(run).text["skipped-files"]
    (run / "skipped.jsonl").write_text("")
    assert "Nothing was skipped" in write(run).text["skipped-files"]
    rows = [{"file": f"f{i}.png", "reason": "truncated" if i % 5 else f"odd {HOSTILE}"} for i in range(250)]
    broken = ["{torn", "", '"text"', "  ", '{"file": "x"}']
    (run / "skipped.jsonl").write_text("\n".join([*map(json.dumps, rows), *broken]))
    page = write(run)
    text, listed = page.text["skipped-files"], page.tables["skipped-files"]
    assert "250 files were skipped" in text and "cannot be read: 3." in text and "50 more files are not shown" in text
    assert (
        listed[1:3] == [["200", "truncated"], ["50", f"odd {HOSTILE}".replace("'x'", "'…'")]]
        and "more reasons" not in text
    )
    assert listed[4:] == [[row["file"], row["reason"]] for row in rows[:200]]
    (run / "skipped.jsonl").write_text("\n".join(json.dumps({"file": "a", "reason": f"no {i}"}) for i in range(25)))
    assert "5 more reasons are not shown" in write(run).text["skipped-files"]


def test_a_file_name_that_is_no_text_can_be_written(make_run: Callable[..., Path]) -> None:
    run = make_run()
    (run / "skipped.jsonl").write_text(json.dumps({"file": "caf\udce9.png", "reason": "r"}))
    assert write(run).rows("skipped-files")["caf?.png"] == ["r"]


def test_the_configuration_is_there_word_for_word(pages: dict[str, Page], trained: Path) -> None:
    for name, page in pages.items():
        assert (
            page.text["configuration"].strip()
            == "Configuration\n" + (trained / name / "config.yaml").read_text().strip()
        )


# what is null


def test_nulls_are_gaps_counted_and_named(
    make_run: Callable[..., Path], plotted: dict[str, tuple[list[float], list[float]]]
) -> None:
    logged = [{"step": k, "loss": None if k in (3, 4, 7) else k / 10, "validation/lpips": None} for k in range(1, 9)]
    logged[-1]["validation/loss_by_t"] = [None, *[0.5] * 9]
    text = write(make_run(logged)).text["curves"]
    assert "loss: 3 of 8 values not finite (update 3, 4, 7), left as gaps." in text
    assert "validation/lpips: null in all 8 lines" in text and "validation/lpips" not in plotted
    assert "validation/loss_by_t: 1 of 10 values null" in text
    x, y = plotted["loss"]
    assert x == list(range(1, 9)) and [k for k, v in zip(x, y, strict=True) if math.isnan(v)] == [3, 4, 7]
    assert math.isnan(plotted["update 8"][1][0]) and plotted["update 8"][1][1:] == [0.5] * 9


def test_a_run_of_nulls_alone_and_values_of_other_kinds(
    make_run: Callable[..., Path], plotted: dict[str, tuple[list[float], list[float]]]
) -> None:
    page = write(
        make_run([{"step": 1, "loss": None, "note": "text", "flag": True, "validation/loss_by_t": [None] * 10}])
    )
    assert "loss: null in all 1 lines" in page.text["curves"] and page.rows("metrics")["flag"] == ["true", "1"]
    assert plotted.keys() == {"update 1"}


@pytest.mark.parametrize("seed", range(3))
def test_thinning_keeps_ends_extremes_and_gaps(seed: int) -> None:
    random_ = random.Random(seed)
    points = [(k, math.nan if random_.random() < 0.001 else random_.gauss(0, 1)) for k in range(20_000)]
    points[7777], points[12_345], points[15_000] = (7777, 1e6), (12_345, -1e6), (15_000, math.nan)
    thinned = thin(points, 600)
    assert len(thinned) <= 900 and thinned[0] == points[0] and thinned[-1] == points[-1]
    assert {points[7777], points[12_345]} <= set(thinned) and [p[0] for p in thinned] == sorted(p[0] for p in thinned)
    assert all(
        any(a <= k < a + 67 and math.isnan(v) for k, v in thinned)
        for a in range(0, 20_000, 67)
        if _gap(points[a : a + 67])
    )
    assert thin(points[:600], 600) == points[:600]


def _gap(points: list[tuple[int, float]]) -> bool:
    return any(math.isnan(v) for _, v in points)


# one file, safe


def svgs(page: Page) -> list[str]:
    heads = (s.partition(",") for sources in page.sources.values() for s in sources)
    return [base64.b64decode(data).decode() for kind, _, data in heads if "svg" in kind]


@pytest.mark.parametrize("name", ["autoencoder", "clip", "ldm"])
def test_nothing_outside_the_file_is_needed(pages: dict[str, Page], name: str) -> None:
    page = pages[name]
    outside = re.compile(r"https?:|//[a-z]|url\(|@import")
    assert not outside.search(re.sub(r"data:image/[a-z+]+;base64,[\w+/=]+", "", page.source))
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        assert not any(key.startswith("on") for key in attributes)
        assert attributes.get("src", "data:").startswith("data:") and attributes.get("href", "#").startswith("#")
    policy = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert svgs(page) and all(not re.search(r"href=\"(?!#)|<script|<image", svg) for svg in svgs(page))


def test_whatever_comes_from_files_is_text(make_run: Callable[..., Path], pages: dict[str, Page]) -> None:
    run = make_run(
        [{"step": 1, HOSTILE: 1.0, f"validation/{HOSTILE}_by_t": [1.0], "loss": HOSTILE}],
        {"state": HOSTILE, "step": HOSTILE, "steps": 2, "seconds": HOSTILE},
        prompts=[HOSTILE],
    )
    Image.new("RGB", (8, 8)).save(run / "samples/<script>-00000001.png")
    Image.new("RGB", (8, 8)).save(run / 'samples/" onerror="alert(1)-00000002.png')
    (run / "report.json").write_text(json.dumps({HOSTILE: {"accuracy": HOSTILE, "low": 0, "high": 1, "n": HOSTILE}}))
    (run / "skipped.jsonl").write_text(json.dumps({"file": HOSTILE, "reason": f"because {HOSTILE}"}))
    hostile = run.with_name("<b>run&")
    run.rename(hostile)
    page = write(hostile)
    assert "<b>run&" in page.text["head"] and page.rows("head")["state"] == [HOSTILE]
    assert page.rows("metrics")[HOSTILE][0] == HOSTILE and page.rows("skipped-files")[HOSTILE] == [f"because {HOSTILE}"]
    assert (
        page.text["pictures-over-time"].count(HOSTILE) == 1
        and "<script>-00000001.png" in page.text["pictures-over-time"]
    )
    for one in (page, *pages.values()):  # the captions of the trained runs are hostile too
        assert {tag for tag, _ in one.elements} <= KNOWN and one.text["configuration"].startswith("Configuration")
        assert all(
            set(a) <= {"class", "id", "href", "src", "alt", "width", "charset", "name", "content", "http-equiv", "lang"}
            for _, a in one.elements
        )
    assert (
        HOSTILE[:40] in pages["autoencoder"].text["reconstructions"]
        and HOSTILE in pages["ldm"].text["pictures-over-time"]
    )


def test_text_is_escaped_and_markup_is_not() -> None:
    inner = element("b", "<&>", 3)
    assert inner == "<b>&lt;&amp;&gt;3</b>"
    assert element("p", inner, "\"'", class_='a"b') == '<p class="a&quot;b"><b>&lt;&amp;&gt;3</b>&quot;&#x27;</p>'


def test_a_long_run_with_large_pictures_stays_small(make_run: Callable[..., Path]) -> None:
    random_ = np.random.default_rng(0)
    names = ["loss", "l1", "kl", "grad_norm_a", "grad_norm_b", "lr", *"abcdef", "validation/loss", "validation/kl"]
    values = np.abs(random_.normal(1, 0.2, (3000, len(names))))
    run = make_run([{"step": k + 1, **dict(zip(names, map(float, row), strict=True))} for k, row in enumerate(values)])
    noise = Image.fromarray(random_.integers(0, 256, (512, 2048, 3), dtype=np.uint8))
    for step in range(13):
        noise.save(run / f"samples/samples-{step:08d}.png", compress_level=0)
    noise.save(run / "samples.png", compress_level=0)
    page = write(run)
    assert len(page.pictures("pictures-over-time")) == GRIDS and (run / "report.html").stat().st_size < 5_000_000


def test_the_same_run_gives_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a/deep/r.html", tmp_path / "b.html"]
    for file in files:
        assert main(["report", str(trained / "ldm"), "--images", "3", "--out", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes() and [f.name for f in files[0].parent.iterdir()] == ["r.html"]


# runs in any state, and what is not a run


def test_a_run_that_has_only_begun(make_run: Callable[..., Path]) -> None:
    page = write(make_run(train={"steps": 40}))
    head = page.rows("head")
    assert head["state"] == ["no status yet: nothing has been logged"] and head["updates"] == ["0 of 40"]
    assert "No metrics yet: the first come after update 40." in page.text["curves"]
    assert "None yet: the first come after update 40." in page.text["pictures-over-time"]
    assert (
        "No metrics yet." in page.text["metrics"]
        and "throughput" not in page.text
        and "Nothing was skipped" in page.text["skipped-files"]
    )
    assert page.rows("head")["model"] == [
        "not exported yet: this follows the last update"
    ] and "parameters" not in page.rows("head")


@pytest.mark.parametrize(
    ("state", "told"),
    [("running", "running (or killed"), ("interrupted", "interrupted and saved"), ("failed", "failed: ")],
)
def test_a_run_that_is_not_done(make_run: Callable[..., Path], state: str, told: str) -> None:
    run = make_run(
        [{"step": 5, "loss": 0.5}], {"state": state, "step": 7, "steps": 40, "seconds": 3.0}, train={"steps": 40}
    )
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 10, "lo')  # torn by a kill
    page = write(run)
    assert page.rows("head")["state"][0].startswith(told) and page.rows("head")["updates"] == ["7 of 40"]
    assert page.rows("metrics")["loss"] == ["0.5", "5"]
    assert ("bad" in [a.get("class") for tag, a in page.elements if tag == "b"]) == (state == "failed")


def test_an_older_export_is_called_one(exported: Path) -> None:
    run = exported
    (run / "status.json").write_text('{"state": "running", "step": 1, "steps": 6, "seconds": 1}')
    assert "Training has not ended" in write(run, "--images", "3").text["reconstructions"]
    (run / "status.json").write_text('{"state": "done", "step": 6, "steps": 6, "seconds": 1}')
    assert "Training has not ended" not in write(run, "--images", "3").text["reconstructions"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a run: it has no config.yaml"),
        (["empty"], "empty is not a run: it has no config.yaml"),
        (["run", "--images", "-1"], "images must be at least 0, got -1"),
        (["run", "--out", "empty"], "--out empty is a folder"),
        (["run", "--out", ""], "is a folder"),
        (["run", "--out", "run/config.yaml/r.html"], "--out run/config.yaml/r.html cannot be written"),
        (["broken"], "broken/config.yaml: unknown key train.stepz: did you mean train.steps?"),
        (["torn"], "torn/config.yaml: cannot be read"),
        (["damaged"], "damaged/status.json cannot be read"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_left(
    make_run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    run = make_run()
    monkeypatch.chdir(run.parent)
    for name in ("empty", "broken", "torn", "damaged"):
        Path(name).mkdir()
    Path("broken/config.yaml").write_text((run / "config.yaml").read_text().replace("steps: 100000", "stepz: 100000"))
    Path("torn/config.yaml").write_text("run: [1\n")
    Path("damaged/config.yaml").write_text((run / "config.yaml").read_text())
    Path("damaged/status.json").write_text("{")
    before = sorted(Path().rglob("*"))
    assert main(["report", *arguments]) == 2
    captured = capsys.readouterr()
    assert (
        captured.out == ""
        and captured.err.startswith("ldm report: ")
        and captured.err.count("\n") == 1
        and message in captured.err
    )
    assert sorted(Path().rglob("*")) == before


# whose configuration


@pytest.mark.parametrize(
    "file",
    sorted(f for f in (ROOT / "configs").rglob("*.yaml") if f.parent.name != "accelerate"),
    ids=lambda f: f"{f.parent.name}/{f.stem}",
)
def test_a_saved_configuration_is_recognised(file: Path, tmp_path: Path) -> None:
    kinds = configuration.RUNS.values()
    (settings,) = [s for kind in kinds if (s := _loaded(kind, file)) is not None]
    configuration.save(settings, tmp_path / "config.yaml")
    found = load_run(tmp_path)
    assert type(found) is type(settings) and found == settings


def _loaded(kind: type, file: Path) -> Any:
    try:
        return configuration.load(kind, file)
    except ConfigError:
        return None


def test_the_commands_are_those_that_train() -> None:
    assert set(configuration.RUNS) == {name for name in _commands() if name.startswith("train-")}


def _commands() -> dict[str, Any]:
    from ldm.cli.main import COMMANDS

    return COMMANDS
