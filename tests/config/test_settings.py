"""docs/settings.md is what docs/settings.py prints of the classes as they are."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_settings_is_current() -> None:
    printed = runpy.run_path(str(ROOT / "docs/settings.py"))["settings"]()
    assert printed == (ROOT / "docs/settings.md").read_text(encoding="utf-8"), (
        "run: python docs/settings.py > docs/settings.md"
    )
