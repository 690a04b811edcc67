"""Writes the tables of docs/api.md from the tables that validate requests."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- tables: python tools/api_tables.py writes this -->\n", "<!-- end of tables -->"


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tpqwen.api.openapi import markdown

    page = ROOT / "docs" / "api.md"
    text = page.read_text(encoding="utf-8")
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(text[:begin] + "\n" + markdown() + "\n" + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
