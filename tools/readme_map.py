"""Writes the README's map of files: one line per module, the first sentence of its docstring."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- map: make map writes this -->\n", "<!-- end of map -->"


def sentence(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    text = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s(?=[A-Z])", text, maxsplit=1)[0].rstrip(".").replace("|", "\\|")


def file_map() -> str:
    package = ROOT / "tpqwen"
    files = [p for p in package.rglob("*.py") if p.name != "__init__.py" or p.parent == package]
    files.sort(key=lambda p: (len(p.relative_to(package).parts), p))
    rows = [f"| `{p.relative_to(package).as_posix()}` | {sentence(p)} |" for p in files]
    head = ["| file in `tpqwen/` | what lives in it |", "|---|---|"]
    return (
        "\n".join([*head, f"| `serve_app.py` | {sentence(ROOT / 'serve_app.py')} (beside `tpqwen/`) |", *rows]) + "\n"
    )


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    readme.write_text(text[:begin] + file_map() + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
