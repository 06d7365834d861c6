"""Print docs/settings.md: every setting of the configuration classes, with type, default, allowed values and comment.

python docs/settings.py > docs/settings.md
"""

import ast
import importlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    "ldm/config/runs.py", "ldm/config/conditions.py", "ldm/config/data.py", "autoencoder/config.py",
    "ldm/config/networks.py", "ldm/config/process.py", "ldm/config/train.py", "ldm/config/sample.py",
)  # fmt: skip
TITLE = """# Settings

Every setting of a configuration file, generated from the classes that check it
(`python docs/settings.py > docs/settings.md`). A section such as `train:` of a file holds the settings of the class
named as its type; `train.lr=2e-4` on the command line replaces one.
"""


def rows(node: ast.ClassDef, lines: list[str], names: dict[str, Any]) -> list[str]:
    """A table row for each field of a class: name, type, default, allowed values, and the comment on its line."""
    found, allowed = [], _allowed(node, names)
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            default = "required" if field.value is None else f"`{_default(field.value)}`"
            comment = lines[(field.end_lineno or field.lineno) - 1].partition("  # ")[2]
            kind, values = f"`{ast.unparse(field.annotation)}`", allowed.get(field.target.id, "")
            cells = [f"`{field.target.id}`", kind, default, values, comment]
            found.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return found


def _allowed(node: ast.ClassDef, names: dict[str, Any]) -> dict[str, str]:
    """Allowed values of fields, from the calls of ``one_of`` and ``between`` that check them."""
    found = {}
    for call in (part for part in ast.walk(node) if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)):
        if call.func.id not in ("one_of", "between"):  # type: ignore[attr-defined]
            continue
        values = [eval(ast.unparse(argument), dict(names)) for argument in call.args[1:]]
        if call.func.id == "one_of":  # type: ignore[attr-defined]
            choices, *fields = values
            text = ", ".join(f"`{choice}`" for choice in choices)
        else:
            low, high, *fields = values
            text = f"{_number(low)} to {_number(high)}"
        found |= dict.fromkeys(fields, text)
    return found


def _number(value: float) -> str:
    if value == 2**63 - 1:
        return "2⁶³ − 1"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if value < 0.99 else str(value)


def _default(value: ast.expr) -> str:
    """A default as a configuration file writes it."""
    text = ast.unparse(value)
    if text.startswith("field(default_factory="):
        return text.removeprefix("field(default_factory=").removesuffix(")") + "()"
    return {"None": "null", "True": "true", "False": "false"}.get(text, text)


def settings() -> str:
    """The whole page."""
    parts = [TITLE]
    for file in FILES:
        source = (ROOT / file).read_text(encoding="utf-8")
        names = vars(importlib.import_module(file.removesuffix(".py").replace("/", ".")))
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and node.decorator_list:
                head = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
                table = [
                    "| setting | type | default | values | |",
                    "| --- | --- | --- | --- | --- |",
                    *rows(node, source.splitlines(), names),
                ]
                parts.append("\n".join([f"## {node.name}", "", head, "", *table, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    print(settings(), end="")
