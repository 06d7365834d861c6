"""Print docs/settings.md: every setting of the configuration classes, with its type, default and comment.

python docs/settings.py > docs/settings.md
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    "ldm/config/runs.py", "ldm/config/data.py", "autoencoder/config.py", "ldm/config/networks.py",
    "ldm/config/process.py",
    "ldm/config/train.py", "ldm/config/sample.py",
)  # fmt: skip
TITLE = """# Settings

Every setting of a configuration file, generated from the classes that check it
(`python docs/settings.py > docs/settings.md`). A section such as `train:` of a file holds the settings of the class
named as its type; `train.lr=2e-4` on the command line replaces one.
"""


def rows(node: ast.ClassDef, lines: list[str]) -> list[str]:
    """A table row for each field of a class: name, type, default, and the comment on its line."""
    found = []
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            default = "required" if field.value is None else f"`{_default(field.value)}`"
            comment = lines[(field.end_lineno or field.lineno) - 1].partition("  # ")[2]
            cells = [f"`{field.target.id}`", f"`{ast.unparse(field.annotation)}`", default, comment]
            found.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return found


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
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and node.decorator_list:
                head = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
                table = [
                    "| setting | type | default | |",
                    "| --- | --- | --- | --- |",
                    *rows(node, source.splitlines()),
                ]
                parts.append("\n".join([f"## {node.name}", "", head, "", *table, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    print(settings(), end="")
