"""Make a captioned folder from an installed icon theme: document-open-recent.png is "document open recent".

python examples/folder_of_icons.py my/icons --size 48
ldm init my/icons

Themes are those of the freedesktop specification: folders with an index.theme in ~/.local/share/icons,
/usr/share/icons and the like. Symbolic (one-colour) icons and second copies of a picture are left out.
SVG files are used too if cairosvg is installed.
"""

import argparse
import configparser
import hashlib
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.data.writing import check_new, write_folder
from ldm.errors import DataError, UserError


@dataclass(frozen=True)
class Directory:
    """A folder of a theme's icons: nominal size, and the sizes to which its SVG files may be scaled, in pixels."""

    path: Path
    context: str  # such as Actions, Devices, Places
    size: int
    scalable: range


def roots() -> list[Path]:
    """The folders in which themes are installed."""
    home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    return [Path("~/.icons").expanduser(), *(Path(p).expanduser() / "icons" for p in (home, *shared.split(":")))]


def directories(theme: Path) -> list[Directory]:
    """The directories that index.theme lists, without those for screens of double density. Raises DataError."""
    file = theme / "index.theme"
    index = configparser.RawConfigParser(strict=False)
    found = []
    try:
        index.read_string(file.read_text(encoding="utf-8"))
        for name in map(str.strip, index.get("Icon Theme", "Directories", fallback="").split(",")):
            if index.has_section(name) and index.getint(name, "Scale", fallback=1) == 1:
                size = index.getint(name, "Size")
                low, high = (index.getint(name, key, fallback=size) for key in ("MinSize", "MaxSize"))
                scalable = range(low, high + 1) if index.get(name, "Type", fallback="") == "Scalable" else range(0)
                found.append(Directory(theme / name, index.get(name, "Context", fallback=""), size, scalable))
    except (OSError, ValueError, configparser.Error) as error:
        raise DataError(
            f"{file} cannot be read as the index of an icon theme: {' '.join(str(error).split())}"
        ) from None
    return found


def svg_renderer() -> Callable[[Path, int], bytes] | None:
    """PNG of an SVG file at a size, or None without a library for it."""
    try:
        import cairosvg
    except (ImportError, OSError):  # OSError: the library cairo itself is missing
        return None
    return lambda file, size: cairosvg.svg2png(url=str(file), output_width=size, output_height=size)


def files(listed: list[Directory], size: int, suffixes: tuple[str, ...]) -> dict[str, tuple[Path, str]]:
    """Name → file and context of all icons of a size that are not symbolic; a PNG comes before an SVG."""
    found: dict[str, tuple[Path, str]] = {}
    for suffix in suffixes:
        for directory in listed:
            if size == directory.size or (suffix == ".svg" and size in directory.scalable):
                for file in sorted(directory.path.glob(f"*{suffix}")):
                    if "symbolic" not in re.split(r"[-.]", file.stem):
                        found.setdefault(file.stem, (file, directory.context))
    return found


def find_theme(name: str | None, size: int, suffixes: tuple[str, ...]) -> Path:
    """The theme of a name or path, or else the installed one with most icons of the size. Raises DataError."""
    installed = [theme for root in roots() if root.is_dir() for theme in sorted(root.iterdir())]
    installed = [theme for theme in installed if (theme / "index.theme").is_file()]
    if name is not None and (Path(name) / "index.theme").is_file():
        return Path(name)
    if name is not None:
        named = [theme for theme in installed if theme.name == name]
        if not named:
            there = ", ".join(theme.name for theme in installed) or "none"
            raise DataError(
                f"no icon theme {name!r}: give a folder with an index.theme, or one of those installed: {there}"
            )
        return named[0]
    if not installed:
        raise DataError(
            f"no icon theme in {', '.join(map(str, roots()))}: install one (adwaita-icon-theme, oxygen-icon-theme …)"
            " or name its folder by --theme"
        )
    return max(installed, key=lambda theme: len(files(directories(theme), size, suffixes)))


def caption(name: str) -> str:
    """The words of an icon's name."""
    return " ".join(re.split(r"[\W_]+", name)).strip()


def read_icon(file: Path, size: int, render: Callable[[Path, int], bytes] | None) -> Image.Image | None:
    """The icon, RGBA, or None if it cannot be read or has another size."""
    try:
        content = file.read_bytes() if file.suffix == ".png" or render is None else render(file, size)
        icon = Image.open(io.BytesIO(content)).convert("RGBA")
    except Exception:  # cairosvg raises errors of many kinds for a damaged file
        return None
    return icon if icon.size == (size, size) else None


def icons(
    found: dict[str, tuple[Path, str]], size: int, render: Callable[[Path, int], bytes] | None, left_out: Counter[str]
) -> Iterator[tuple[Image.Image, dict[str, Any]]]:
    """Yield distinct icons with their rows for metadata.jsonl; the others are counted in ``left_out``.

    Of equal pictures the one under its own name is kept, not a link to it.
    """
    seen = set()
    for name, (file, context) in sorted(found.items(), key=lambda item: (item[1][0].is_symlink(), item[0])):
        icon = read_icon(file, size, render)
        if icon is None or not caption(name):
            left_out["that cannot be read, or have another size"] += 1
            continue
        visible = Image.alpha_composite(Image.new("RGBA", icon.size, "white"), icon)
        digest = hashlib.sha256(visible.tobytes()).digest()
        if digest in seen:
            left_out["that look like another one"] += 1
            continue
        seen.add(digest)
        yield icon, {"file_name": f"{name}.png", "text": caption(name), "context": context}


def main(folder: str, theme: str | None, size: int) -> int:
    check_new(Path(folder))
    render = svg_renderer()
    suffixes = (".png", ".svg") if render else (".png",)
    chosen = find_theme(theme, size, suffixes)
    listed = directories(chosen)
    found = files(listed, size, suffixes)
    if not found:
        raise DataError(f"{chosen} has no icon of {size} pixels: {_advice(listed, size, render is not None)}")
    left_out: Counter[str] = Counter()
    written = write_folder(Path(folder), icons(found, size, render, left_out))
    counts = ", ".join(f"{n} {what}" for what, n in left_out.items()) or "none"
    print(f"{folder}: {written} icons of {size} px from {chosen}; left out: {counts}")
    return written


def _advice(listed: list[Directory], size: int, svg: bool) -> str:
    """Sizes for which there are icons, or the library that would render them."""
    if not svg and files(listed, size, (".svg",)):
        return "its icons are SVG files, so install cairosvg"
    sizes = [s for s in sorted({d.size for d in listed}) if files(listed, s, (".png", ".svg") if svg else (".png",))]
    return f"give --size {', '.join(map(str, sizes))}" if sizes else "name another theme by --theme"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--theme", metavar="NAME_OR_FOLDER", help="default: the installed one with most icons")
    parser.add_argument("--size", type=int, default=48, help="pixels (default: 48)")
    arguments = parser.parse_args()
    try:
        main(arguments.folder, arguments.theme, arguments.size)
    except (UserError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
