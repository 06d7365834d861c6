"""Look at a folder of images, say what is found, and write the configurations that train a model on it.

  ldm init my/photos
  ldm train configs/photos
  ldm sample runs/photos --prompt "…"

Captions are found in metadata.jsonl or metadata.csv (columns file_name and text), in a.txt beside a.png, or made from the
names of class folders. The folder is only read.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.console import Console
from ldm.config import CAPTIONS, ConfigError
from ldm.files.disk import replace, resolved

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ldm.cli.recipe import Plan
    from ldm.data.survey import Survey

NAMED = 20  # skipped files named on the terminal; the list has all
CPU_SIZE, GPU_SIZES = 32, (64, 256)
GPU_MEMORY = 12e9  # bytes from which the GPU recipe is offered
STAGES = ("autoencoder", "clip", "ldm")
PROMPTS, LONGEST_PROMPT = 8, 200  # captions drawn while training, and their length in characters at most
PROMPT = "a caption like those of your images"  # where none of them will do as an example
TOKENIZED = 20_000  # captions at most that are counted in tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, and where to write."""
    parser.add_argument("folder", metavar="FOLDER", help="a folder of images")
    parser.add_argument(
        "--out",
        help="folder for the configurations (default configs/NAME of the images' folder); runs go to runs/ under its name",
    )
    parser.add_argument("--captions", choices=CAPTIONS, help="where captions are (default: what is found)")
    parser.add_argument(
        "--image-size", type=int, help="side in pixels to train at (default: by the images and this machine)"
    )
    parser.add_argument(
        "--all", action="store_true", help="decode every image of a large set, not 5,000 spread over it"
    )


def run(arguments: argparse.Namespace) -> None:
    """Look, tell, write."""
    folder = Path(arguments.folder)
    out = Path(arguments.out or f"configs/{_plain(folder)}")
    _check_places(folder, out)
    from ldm.cli import recipe
    from ldm.data.survey import leave_out_small, survey

    console = Console()
    looked = survey(
        folder,
        arguments.captions,
        arguments.all,
        lambda i, n: console.progress(i, n, {}) if i % 500 == 0 or i == n > 500 else None,
    )
    gpu = _gpu()
    size = _size(arguments.image_size, looked, gpu)
    looked = leave_out_small(looked, size)
    tokens, longest = _tokens(looked) if looked.data.captions != "none" else (0, 0)
    for line in _lines(looked, longest):
        console.say(line)
    prompts = tuple(dict.fromkeys(row.text for row in looked.rows if _prompt(row.text)))[:PROMPTS]
    plan = recipe.Plan(_plain(out), str(out), looked.data, looked.split[0], "gpu" if gpu else "cpu", tokens, prompts)
    present = [f"{stage}.yaml" for stage in STAGES if (out / f"{stage}.yaml").exists()]
    if not present:
        _write_all({out / file: text for file, text in recipe.write(plan).items()})
    _say_skipped(looked, out, console)
    if present:
        console.say(
            f"{', '.join(present)} in {out}/ stay as they are: delete them, or give another folder with --out, to have new ones"
        )
    else:
        _say_next(plan, out, console)


def _write_all(files: dict[Path, str]) -> None:
    """All files or none: those that are there would keep a second call from writing the others."""
    try:
        for file, text in files.items():
            replace(file, text.encode())
    except OSError:
        for file in files:
            with suppress(OSError):
                file.unlink(missing_ok=True)
        raise


def _prompt(text: str) -> bool:
    """True if a caption can serve as an example: short, one line, and nothing that a configuration refuses."""
    return 0 < len(text) <= LONGEST_PROMPT and text.isprintable() and "${" not in text


def _plain(folder: Path) -> str:
    """A folder's name as a run can have it."""
    return re.sub(r"[^\w.-]+", "-", Path(os.path.abspath(folder)).name).strip("-.") or "images"


def _check_places(folder: Path, out: Path) -> None:
    """Refuse an output folder inside the images: its files would be read as further images."""
    for place in (out, Path("runs")):
        if folder.is_dir() and resolved(place).is_relative_to(resolved(folder)):
            raise ConfigError(
                f"{place} would lie inside {folder}, among the images: start from another folder"
                + " (or see --out)" * (place == out)
            )
    above = next(p for p in (out, *out.parents) if p.exists())
    if not above.is_dir():
        raise ConfigError(f"--out {out}: {above} is a file")
    if "${" in str(folder):
        raise ConfigError(f"{folder}: a configuration cannot hold ${{: rename the folder")


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= GPU_MEMORY


def _size(asked: int | None, looked: Survey, gpu: bool) -> int:
    """A side that the networks of the recipe can halve often enough."""
    multiple = 64 if gpu else 16
    if asked is not None:
        if asked < multiple or asked % multiple:
            raise ConfigError(
                f"--image-size must be a multiple of {multiple} for the networks that fit this machine, got {asked}"
            )
        return asked
    if not gpu:
        return CPU_SIZE
    low, high = GPU_SIZES
    return max(low, min(high, looked.short_side // multiple * multiple))


def _tokens(looked: Survey) -> tuple[int, int]:
    """Room for captions in tokens, and the longest caption's length, counted with a vocabulary learned from them."""
    from ldm.models.text import tokenize, train_tokenizer

    texts = list(dict.fromkeys(row.text for row in looked.rows))[:TOKENIZED]
    tokenizer = train_tokenizer(texts, 512, 77)
    ids = tokenize(tokenizer, texts, 4096)[0]
    lengths = (ids.numpy() != tokenizer.pad_token_id).sum(1) + 1  # the end is padding's token too
    longest = int(lengths.max())
    return min(77, max(12, longest + longest // 2)), longest  # prompts may be longer than what was trained on


def _lines(looked: Survey, longest: int) -> list[str]:
    """Print the findings."""
    data, headers = looked.data, looked.headers
    where = {
        "metadata": f"captions in metadata ({data.text_column})",
        "sidecar": "captions in .txt files",
        "class": "captions from folder names",
        "none": "no captions",
    }[data.captions]
    sides = sorted((min(h.width, h.height), h.width, h.height) for h in headers)
    lines = [
        f"{data.folder}: {len(looked.rows)} images, {where}",
        f"  sizes     {sides[0][1]}×{sides[0][2]} to {sides[-1][1]}×{sides[-1][2]}, median short side {looked.short_side}",
        f"  formats   {_counts(h.format for h in headers)}; modes {_counts(h.mode for h in headers)}",
    ]
    special = {
        "turned by EXIF": sum(h.turned for h in headers),
        "with EXIF that cannot be read (taken as upright)": sum(h.odd_exif for h in headers),
        "with several frames or pages (the first is read)": sum(h.animated for h in headers),
        "with colours of another profile than sRGB (taken for sRGB)": sum(h.profile for h in headers),
    }
    if any(special.values()):
        lines.append("  also      " + ", ".join(f"{n} {what}" for what, n in special.items() if n))
    if data.captions != "none":
        texts = [row.text for row in looked.rows]
        empty = sum(not text.strip() for text in texts)
        cut = (
            f", longer than 77 tokens are cut (longest: {longest})"
            if longest > 77
            else f", the longest of {longest} tokens"
        )
        from ldm.models.text import LONGEST_CAPTION

        if long := sum(len(text) > LONGEST_CAPTION for text in texts):
            cut += f"; of {long} with more than {LONGEST_CAPTION} characters the rest is not looked at"
        lines.append(f"  captions  {len(set(texts))} distinct, {empty} empty{cut}")
    train, validation = looked.split
    lines.append(
        f"  split     {train} for training, {validation} for validation (by a hash of the name: adding files moves none)"
    )
    if looked.unlisted:
        lines.append(f"  unlisted  {looked.unlisted} images have no row in the metadata and are not used")
    if looked.others:
        lines.append(
            "  others    " + ", ".join(f"{n} {suffix}" for suffix, n in looked.others.items()) + " are not read"
        )
    if looked.decoded < len(headers):
        lines.append(f"  decoded   {looked.decoded} of them, of the others the header alone (--all decodes all)")
    return lines + [f"  note      {remark}" for remark in looked.remarks]


def _counts(values: Iterable[str]) -> str:
    return ", ".join(f"{name} {n}" for name, n in Counter(values).most_common())


def _say_skipped(looked: Survey, out: Path, console: Console) -> None:
    skipped, file = looked.skipped, out / "skipped.jsonl"
    if not skipped:
        return
    replace(file, "".join(json.dumps(vars(s), ensure_ascii=False) + "\n" for s in skipped).encode(errors="replace"))
    console.say(f"  left out  {len(skipped)} of {looked.total} images and rows, all listed in {file}")
    for one in skipped[:NAMED]:
        console.say(f"            {one.file}: {one.reason}")
    share, allowed = len(skipped) / looked.total, looked.data.max_skipped
    if share > allowed:
        console.say(
            f"  stop      training stops where more than {allowed:.0%} is left out, and this is {share:.1%}: fix or remove them,"
        )
        console.say(f"            or set max_skipped to {share + 0.005:.2f} in the configurations")


def _say_next(plan: Plan, out: Path, console: Console) -> None:
    minutes = sum(plan.seconds(stage) for stage in plan.stages) / 60
    machine = f"a CPU, about {minutes:.0f} minutes on two cores" if plan.machine == "cpu" else "a GPU"
    console.say(
        f"wrote {', '.join(f'{stage}.yaml' for stage in plan.stages)} into {out}/ ({plan.data.image_size} px, for {machine})"
    )
    prompt = (
        f" --prompt {shlex.quote(plan.prompts[0] if plan.prompts else PROMPT)}" if plan.data.captions != "none" else ""
    )
    console.say(f"next:  ldm train {shlex.quote(str(out))}\n       ldm sample runs/{plan.name}{prompt} --count 8")
