"""The house rules: imports go down only, heavy and unsafe things stay in their room, packages import lightly."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest

from ldm.training.trackers import Trackers

ROOT = Path(__file__).resolve().parent.parent

ORDER = (  # top to bottom: a room imports from itself and from rows below; rooms of one row do not know each other
    ("scripts",),
    ("ldm.cli",),
    ("ldm.training", "ldm.evaluation"),
    ("ldm.runs",),
    ("ldm.pipeline",),
    ("ldm.interop",),
    ("ldm.models", "ldm.data"),
    ("ldm.diffusion",),
    ("ldm.distributed", "ldm.config"),
    ("ldm.files", "autoencoder"),
    ("ldm.errors",),
)
ROW = {room: i for i, row in enumerate(ORDER) for room in row}
PACKAGES = ("autoencoder", "ldm", "scripts")
ONLY_IN = {  # a foreign package, and the paths that may import it
    "accelerate": ("ldm/training/", "ldm/distributed/", "ldm/cli/"),
    "transformers": ("ldm/models/text.py", "ldm/models/clip.py"),
    "tokenizers": ("ldm/models/clip.py",),
    "lpips": ("autoencoder/perceptual.py",),
    **dict.fromkeys(("diffusers", "peft"), ()),
    **dict.fromkeys(("pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"), ()),
}
MAY_TORCH_LOAD = "autoencoder/perceptual.py"  # the published LPIPS backbone is such a file; read with weights_only
DIFFUSION_MAY = {"torch", "jaxtyping", "ldm.config", "ldm.diffusion", *sys.stdlib_module_names}
SHAPELESS = {"utils", "util", "common", "helpers", "helper", "misc"}


def room(module: str) -> str | None:
    """The room of ORDER that a module belongs to; None for what is not ours, and for `ldm` itself."""
    return next((r for r in ROW if module == r or module.startswith(r + ".")), None)


def imported(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (
                (node.lineno, str(argument.value)) for argument in node.args[:1] if isinstance(argument, ast.Constant)
            )


def unsafe_loads(tree: ast.Module) -> Iterator[int]:
    """Lines that call torch.load, by whatever route, or let numpy unpickle."""
    for node in ast.walk(tree):
        is_attribute = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"
        is_name = (
            isinstance(node, ast.ImportFrom) and node.module == "torch" and any(a.name == "load" for a in node.names)
        )
        is_numpy = isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
        if is_attribute or is_name or is_numpy:
            yield node.lineno


TEXT_CALLS = ("read_text", "write_text", "open")  # without `encoding` they use the locale's


def locale_bound(tree: ast.Module) -> Iterator[int]:
    """Lines that read or write text in an encoding that depends on the machine."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in node.keywords):
            continue
        of, _, name = ast.unparse(node.func).rpartition(".")
        ours = of in ("os", "Image") or (name == "read_text" and not of)  # these say the encoding
        if name not in TEXT_CALLS or ours:
            continue
        given = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        modes = [a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if name != "open" or not any("b" in mode for mode in modes):
            yield node.lineno


def violations(root: Path) -> list[str]:
    """Every breach of the rules in the product under ``root``, as `file:line: what`."""
    found = []
    for file in sorted(f for package in PACKAGES for f in (root / package).rglob("*.py")):
        path = file.relative_to(root).as_posix()
        parts = file.relative_to(root).with_suffix("").parts
        package = ".".join(parts[:-1])
        module = package if parts[-1] == "__init__" else ".".join(parts)
        tree = ast.parse(file.read_text(encoding="utf-8"), path)
        if bad := SHAPELESS & set(parts):
            found.append(f"{path}:1: {bad.pop()} says nothing of what is inside")
        found += [
            f"{path}:{line}: {fault}" for line, name in imported(tree, package) for fault in faults(path, module, name)
        ]
        if path != MAY_TORCH_LOAD:
            found += [f"{path}:{line}: unpickles" for line in unsafe_loads(tree)]
        found += [f"{path}:{line}: text in the locale's encoding" for line in locale_bound(tree)]
    return found


def faults(path: str, module: str, name: str) -> Iterator[str]:
    """What is wrong with ``module`` importing ``name``."""
    if name == "ldm.Pipeline":
        name = "ldm.pipeline.Pipeline"
    here = "ldm.cli" if module == "ldm.__main__" else room(module)  # None for `ldm`, which offers names of all rooms
    there = room(name)
    if module == "ldm" and there == "ldm.cli":
        yield f"{module} may not import upward from {there}"
    if here and there and ROW[there] < ROW[here]:
        yield f"{module} may not import upward from {there}"
    if here and there and here != there and ROW[there] == ROW[here]:
        yield f"{module} may not know {there}, its neighbour"
    top = name.split(".")[0]
    if top in ONLY_IN and not path.startswith(ONLY_IN[top] or "-"):
        yield f"{top} may be imported only in {', '.join(ONLY_IN[top]) or 'tests'}"
    if here == "ldm.diffusion" and not {top, there} & DIFFUSION_MAY:
        yield f"the mathematics may not import {name}"


def test_the_house_is_in_order() -> None:
    assert violations(ROOT) == []


def circles(root: Path) -> list[set[str]]:
    """Modules under ``root`` that import each other in a circle, imports inside functions and for types alone included.

    `ldm` itself offers names of all rooms to type checkers, and rooms take the version from it: its own imports
    are left out.
    """
    trees = {}
    for file in (f for package in PACKAGES for f in (root / package).rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        trees[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(file.read_text(encoding="utf-8"))
    found = {
        module: {
            _module(name, trees) for _, name in imported(_without_types(tree) if module == "ldm" else tree, module)
        }
        - {module, None}
        for module, tree in trees.items()
    }
    reach: dict[str, set[str]] = {}
    for module in found:
        seen, todo = set(), list(found[module])
        while todo:
            if (other := todo.pop()) not in seen:
                seen.add(other)
                todo += found[other]
        reach[module] = seen
    return [{m, *(o for o in reach[m] if m in reach[o])} for m in reach if m in reach[m]]


def _module(name: str, modules: dict[str, ast.Module]) -> str | None:
    """The module of ours that an imported name is, or is in."""
    return name if name in modules else name.rpartition(".")[0] if name.rpartition(".")[0] in modules else None


def _without_types(tree: ast.Module) -> ast.Module:
    """The tree without `if TYPE_CHECKING:`."""
    return ast.Module(
        [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")], []
    )


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(ROOT) == []


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    for name, code in {
        "a": "from ldm.data.b import x",
        "b": "def f():\n    from ldm.data import c\nif TYPE_CHECKING:\n    from ldm.data import d",
        "c": "import ldm.data.a",
        "d": "from ldm.data.b import f",
    }.items():
        (tmp_path / "ldm/data").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"ldm/data/{name}.py").write_text(code, encoding="utf-8")
    assert circles(tmp_path)[0] == {"ldm.data.a", "ldm.data.b", "ldm.data.c", "ldm.data.d"}


def test_every_module_has_a_room() -> None:
    files = [f.relative_to(ROOT).with_suffix("") for f in (ROOT / "ldm").rglob("*.py")]
    modules = {".".join(f.parts[:-1] if f.name == "__init__" else f.parts) for f in files} - {"ldm", "ldm.__main__"}
    assert len(modules) > 10 and [m for m in sorted(modules) if room(m) is None] == []


@pytest.mark.parametrize(
    ("path", "code", "expected"),
    [
        (
            "ldm/data/x.py",
            "def f():\n    from ldm.training import loop",
            "x.py:2: ldm.data.x may not import upward from ldm.training",
        ),
        ("ldm/data/x.py", "from ..training.loop import train", "upward from ldm.training"),
        ("ldm/data/x.py", "from .. import training", "upward from ldm.training"),
        (
            "ldm/data/x.py",
            "from importlib import import_module\nimport_module('ldm.cli.main')",
            "x.py:2: ldm.data.x may not import upward",
        ),
        ("ldm/models/__init__.py", "from ldm import Pipeline", "upward from ldm.pipeline"),
        ("ldm/evaluation/x.py", "from ldm.training.loop import Loop", "may not know ldm.training, its neighbour"),
        ("ldm/training/x.py", "import ldm.evaluation.evaluate", "may not know ldm.evaluation, its neighbour"),
        ("ldm/runs/x.py", "from ldm.training import loop", "upward from ldm.training"),
        ("ldm/config.py", "import ldm.diffusion.schedule as s", "upward from ldm.diffusion"),
        ("ldm/__init__.py", "import ldm.cli", "upward from ldm.cli"),
        ("ldm/cli/x.py", "import scripts.train", "upward from scripts"),
        ("autoencoder/x.py", "import ldm.config", "upward from ldm.config"),
        ("ldm/diffusion/x.py", "import numpy", "the mathematics may not import numpy"),
        (
            "ldm/diffusion/x.py",
            "from autoencoder.config import ConfigError",
            "the mathematics may not import autoencoder",
        ),
        ("ldm/data/x.py", "import accelerate", "accelerate may be imported only in"),
        (
            "ldm/cli/x.py",
            "from transformers import CLIPTextModel",
            "transformers may be imported only in ldm/models/text.py, ldm/models/clip.py",
        ),
        ("ldm/evaluation/x.py", "import lpips", "lpips may be imported only in autoencoder/perceptual.py"),
        ("ldm/interop/x.py", "from diffusers import UNet2DConditionModel", "diffusers may be imported only in tests"),
        ("ldm/utils/x.py", "", "utils says nothing"),
        ("ldm/data/x.py", "import pickle", "pickle may be imported only in tests"),
        ("ldm/data/x.py", "import torch\ntorch.load('f')", "x.py:2: unpickles"),
        ("ldm/data/x.py", "from torch import load", "unpickles"),
        ("ldm/data/x.py", "import numpy as np\nnp.load('f', allow_pickle=True)", "unpickles"),
        ("ldm/data/x.py", "from pathlib import Path\nPath('f').read_text()", "x.py:2: text in the locale's encoding"),
        ("ldm/data/x.py", "file.write_text('a', errors='replace')", "text in the locale's encoding"),
        ("ldm/data/x.py", "open('f')", "text in the locale's encoding"),
        ("ldm/data/x.py", "path.open('a')", "text in the locale's encoding"),
    ],
)
def test_a_planted_breach_is_found(tmp_path: Path, path: str, code: str, expected: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(code + "\n")
    assert any(expected in found for found in violations(tmp_path)), violations(tmp_path)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (
            "ldm/training/x.py",
            "import accelerate\nfrom ldm import __version__, config\nfrom . import ema\nfrom ldm.data import sources",
        ),
        (
            "ldm/diffusion/x.py",
            "import math\nimport torch.nn.functional as F\nfrom jaxtyping import Float\n"
            "from ldm.config import X\nfrom . import y",
        ),
        ("ldm/interop/diffusers/index.py", "from ldm.interop import diffusers"),
        ("autoencoder/perceptual.py", "import lpips, torch\ntorch.load('f', weights_only=True)"),
        (
            "ldm/data/x.py",
            "p.read_text(encoding='utf-8')\np.open('rb')\nopen('f', mode='wb')\n"
            "Image.open(f)\nos.open(f, 0)\nread_text(f)",
        ),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, path: str, code: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(code + "\n")
    assert violations(tmp_path) == []


@pytest.mark.parametrize("module", ["ldm", "ldm.config", "autoencoder", "autoencoder.config"])
def test_light_imports_bring_no_torch(module: str) -> None:
    heavy = "{'torch', 'transformers', 'accelerate', 'torchvision', 'matplotlib', 'numpy'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


def test_annotations_are_enforced_in_the_tests() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        Trackers({}).image(0, "grid", np.zeros((2, 2), dtype=np.uint8))
    with pytest.raises(jaxtyping.TypeCheckError):
        Trackers({}).image(0, "grid", np.zeros((2, 2, 3), dtype=np.float32))
    Trackers({}).image(0, "grid", np.zeros((2, 2, 3), dtype=np.uint8))


TURNS = re.compile(  # word for word from another language; CONTRIBUTING.md has the plain ones
    r"\bgoes on\b|\bgo on\b|\bgoing on\b|(?<![Tt]here )\bis no (?!longer|more)|\bsomebody\b|\bby itself\b"
    r"|\bmend\b|\bof before\b|behind training"
)
OPENINGS = re.compile(r"(What|Whether|Where|Of) ")


def turns(root: Path) -> list[str]:
    """Docstrings and messages of the product with a turn of phrase that CONTRIBUTING.md replaces."""
    found = []
    for file in sorted(f for package in PACKAGES for f in (root / package).rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        documented = (
            n
            for n in ast.walk(tree)
            if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(n)
        )
        openings = [(n.body[0].lineno, text) for n in documented if OPENINGS.match(text := ast.get_docstring(n) or "")]
        texts = [
            (n.lineno, n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        ]
        found += [f"{file.relative_to(root).as_posix()}:{line}: {text[:60]!r}" for line, text in openings]
        found += [
            f"{file.relative_to(root).as_posix()}:{line}: {hit[0]!r}"
            for line, text in texts
            if (hit := TURNS.search(text))
        ]
    return found


def test_words_are_plain() -> None:
    assert turns(ROOT) == []


def test_a_planted_turn_is_found(tmp_path: Path) -> None:
    (tmp_path / "ldm").mkdir()
    (tmp_path / "ldm/x.py").write_text(
        '"""What it is."""\nraise ValueError(f"{1} is no run: it goes on")\n', encoding="utf-8"
    )
    assert len(turns(tmp_path)) == 2
