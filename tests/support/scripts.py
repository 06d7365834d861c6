"""The scripts of examples/ and benchmarks/, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def example(name: str) -> ModuleType:
    """The example of a name, run up to its functions."""
    return _module(name, ROOT / "examples")


def benchmark(name: str) -> ModuleType:
    """The benchmark of a name, run up to its functions."""
    return _module(name, ROOT / "benchmarks")


def _module(name: str, folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
