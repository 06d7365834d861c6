"""Look at a folder of images, report what is found, and write configurations that train a model on it.

  ldm init my/photos
  ldm train configs/photos
  ldm sample runs/photos --prompt "…"

Captions come from metadata.jsonl or metadata.csv (columns file_name and text), from a.txt beside a.png,
or from the names of class folders. The folder itself is only read.
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

COLUMNS = 8  # of the metadata that are named
NAMED = 20  # skipped files named on the terminal; the list has all
CPU_SIZE, GPU_SIZES = 32, (64, 256)
GPU_MEMORY = 12e9  # bytes from which the GPU recipe is offered
STAGES = ("autoencoder", "clip", "ldm")
PROMPTS, LONGEST_PROMPT = 8, 200  # most captions drawn while training, and most characters of each
PROMPT = "a caption like those of your images"  # if none of them can serve as an example
TOKENIZED = 20_000  # most captions whose tokens are counted
RELATED = 0.05  # share of captions with a relation from which the text encoder is made to learn relations


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, and where and what to write."""
    parser.add_argument("folder", metavar="FOLDER", help="a folder of images")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="folder for the configurations (default: configs/ and the name of the images' folder);"
        " its name is also that of the runs in runs/",
    )
    parser.add_argument(
        "--captions", choices=CAPTIONS, help="where the captions are (default: wherever some are found)"
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the training images (default: chosen by the images and this machine)",
    )
    parser.add_argument(
        "--all", action="store_true", help="decode every image of a large set instead of 5,000 spread over it"
    )


def run(arguments: argparse.Namespace) -> None:
    """Survey the images, print the findings, write the configurations."""
    folder = Path(arguments.folder)
    out = Path(arguments.out or f"configs/{_plain(folder)}")
    _check_places(folder, out)
    from ldm.cli import recipe
    from ldm.data.survey import leave_out_small, survey

    console = Console()

    def progress(i: int, n: int) -> None:
        if i % 500 == 0 or i == n > 500:
            console.progress(i, n, {})

    looked = survey(folder, arguments.captions, arguments.all, progress)
    gpu = _gpu()
    size = _size(arguments.image_size, looked, gpu)
    looked = leave_out_small(looked, size)
    tokens, longest = _tokens(looked) if looked.data.captions != "none" else (0, 0)
    for line in _lines(looked, longest):
        console.say(line)
    prompts = tuple(dict.fromkeys(row.text for row in looked.rows if _prompt(row.text)))[:PROMPTS]
    machine, share = "gpu" if gpu else "cpu", _share_with_relation(looked)
    if share >= RELATED:
        console.say(
            f"  relations {share:.0%} of the captions say left of, right of, above or below: swap_relations is set"
        )
    plan = recipe.Plan(_plain(out), str(out), looked.data, looked.split[0], machine, tokens, prompts, share >= RELATED)
    present = [f"{stage}.yaml" for stage in STAGES if (out / f"{stage}.yaml").exists()]
    if not present:
        _write_all({out / file: text for file, text in recipe.write(plan).items()})
    _say_skipped(looked, out, console)
    if present:
        files = f"{', '.join(present)} in {out}/"
        console.say(f"{files} stay as they are: to get new ones, delete them or name another folder by --out")
    else:
        _say_next(plan, looked.short_side, out, console)


def _write_all(files: dict[Path, str]) -> None:
    """Write all files or none: a second call would take those that exist for the user's, and write nothing."""
    try:
        for file, text in files.items():
            replace(file, text.encode())
    except OSError:
        for file in files:
            with suppress(OSError):
                file.unlink(missing_ok=True)
        raise


def _share_with_relation(looked: Survey) -> float:
    """The share of captions with left of, right of, above or below."""
    from ldm.models.contrastive import swap_relation

    return sum(swap_relation(row.text) is not None for row in looked.rows) / len(looked.rows)


def _prompt(text: str) -> bool:
    """True if a caption can serve as an example: short, one line, and without ${, which a configuration refuses."""
    return 0 < len(text) <= LONGEST_PROMPT and text.isprintable() and "${" not in text


def _plain(folder: Path) -> str:
    """The name of a folder, reduced to characters that a run's name may have."""
    return re.sub(r"[^\w.-]+", "-", Path(os.path.abspath(folder)).name).strip("-.") or "images"


def _check_places(folder: Path, out: Path) -> None:
    """Refuse an output folder inside the images: its files would be read as images of the data set."""
    for place in (out, Path("runs")):
        if folder.is_dir() and resolved(place).is_relative_to(resolved(folder)):
            raise ConfigError(
                f"{place} would lie inside {folder}, among the images: run this in another folder"
                + " (or give --out)" * (place == out)
            )
    above = next(p for p in (out, *out.parents) if p.exists())
    if not above.is_dir():
        raise ConfigError(f"--out {out}: {above} is a file")
    if "${" in str(folder):
        raise ConfigError(f"{folder}: a path in a configuration cannot contain ${{: rename the folder")


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= GPU_MEMORY


def _size(asked: int | None, looked: Survey, gpu: bool) -> int:
    """Side of the training images: one that the networks of the recipe can halve often enough."""
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
    from ldm.models.clip import train_tokenizer
    from ldm.models.text import tokenize

    texts = list(dict.fromkeys(row.text for row in looked.rows))[:TOKENIZED]
    tokenizer = train_tokenizer(texts, 512, 77)
    ids = tokenize(tokenizer, texts, 4096)[0]
    lengths = (ids.numpy() != tokenizer.pad_token_id).sum(1) + 1  # the end token is also that of padding
    longest = int(lengths.max())
    return min(77, max(12, longest + longest // 2)), longest  # room for prompts longer than any caption


def _lines(looked: Survey, longest: int) -> list[str]:
    """The findings, to be printed."""
    data, headers = looked.data, looked.headers
    where = {
        "metadata": f"captions in metadata ({data.text_column})",
        "sidecar": "captions in .txt files",
        "class": "captions from folder names",
        "none": "no captions",
    }[data.captions]
    sides = sorted((min(h.width, h.height), h.width, h.height) for h in headers)
    (_, w, h), (_, widest, highest) = sides[0], sides[-1]
    lines = [
        f"{data.folder}: {len(looked.rows)} images, {where}",
        f"  sizes     {w}×{h} to {widest}×{highest}, median short side {looked.short_side}",
        f"  formats   {_counts(h.format for h in headers)}; modes {_counts(h.mode for h in headers)}",
    ]
    special = {
        "rotated by EXIF": sum(h.turned for h in headers),
        "with EXIF that cannot be read (taken as upright)": sum(h.odd_exif for h in headers),
        "with several frames or pages (the first is read)": sum(h.animated for h in headers),
        "with a colour profile other than sRGB (read as sRGB)": sum(h.profile for h in headers),
    }
    if any(special.values()):
        lines.append("  also      " + ", ".join(f"{n} {what}" for what, n in special.items() if n))
    if data.captions != "none":
        lines.append(f"  captions  {_caption_facts([row.text for row in looked.rows], longest)}")
    if columns := list(dict.fromkeys(name for row in looked.rows for name in row.columns if data.captions != "class")):
        named = ", ".join(columns[:COLUMNS]) + (", …" if len(columns) > COLUMNS else "")
        lines.append(
            f"  columns   {named}: a model can be given these too, by conditions: in ldm.yaml (docs/conditions.md)"
        )
    train, validation = looked.split
    by_name = "by a hash of the name, so adding files moves none"
    lines.append(f"  split     {train} for training, {validation} for validation ({by_name})")
    if looked.unlisted:
        lines.append(f"  unlisted  {looked.unlisted} images have no row in the metadata and are not used")
    if looked.others:
        others = ", ".join(f"{n} {suffix}" for suffix, n in looked.others.items())
        lines.append(f"  others    {others} are not read")
    if looked.decoded < len(headers):
        lines.append(
            f"  decoded   {looked.decoded} of them; of the others only the header was read (--all decodes all)"
        )
    return lines + [f"  note      {remark}" for remark in looked.remarks]


def _caption_facts(texts: list[str], longest: int) -> str:
    """How many captions there are, and what is cut off the long ones; ``longest``: in tokens."""
    from ldm.models.text import LONGEST_CAPTION

    facts = f"{len(set(texts))} distinct, {sum(not text.strip() for text in texts)} empty, "
    facts += (
        f"longer than 77 tokens are cut (longest: {longest})" if longest > 77 else f"the longest has {longest} tokens"
    )
    if cut := sum(len(text) > LONGEST_CAPTION for text in texts):
        facts += f"; of {cut} with more than {LONGEST_CAPTION} characters the rest is ignored"
    return facts


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
        console.say(f"  stop      training stops if more than {allowed:.0%} are left out, and here it is {share:.1%}:")
        console.say(f"            fix or remove them, or set max_skipped to {share + 0.005:.2f} in the configurations")


def _say_next(plan: Plan, short_side: int, out: Path, console: Console) -> None:
    from ldm.cli.expectations import expectations

    written = ", ".join(f"{stage}.yaml" for stage in plan.stages)
    console.say(f"wrote {written} into {out}/ ({plan.data.image_size} px, for a {plan.machine.upper()})")
    for line in expectations(plan, short_side):
        console.say(line)
    prompt = ""
    if plan.data.captions != "none":
        prompt = f" --prompt {shlex.quote(plan.prompts[0] if plan.prompts else PROMPT)}"
    console.say(f"next:  ldm train {shlex.quote(str(out))}\n       ldm sample runs/{plan.name}{prompt} --count 8")
