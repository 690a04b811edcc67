"""docs/python.md: its snippets are one program that prints what stands under them, and its tables are complete."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tpqwen import RequestOutput, SamplingParams

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """Cells of the table under this heading."""
    table = PAGE.split(f"| {heading} |")[1].split("\n\n")[0]
    return [line.strip("|").split("|") for line in table.splitlines()[2:]]


def test_every_snippet_prints_what_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPQWEN_DEVICE", "cpu")
    monkeypatch.setenv("TPQWEN_THREADS", "1")
    snippets = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(snippets) == PAGE.count("```python") == 7
    names: dict[str, Any] = {"__name__": "page"}
    try:
        for code, expected in snippets:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(code, "docs/python.md", "exec"), names)
            assert printed.getvalue() == expected, code
    finally:
        if "llm" in names:
            names["llm"].close()


def test_every_sampling_field_stands_there_with_its_default() -> None:
    expected = {
        f.name: f.default_factory() if f.default is msgspec.NODEFAULT else f.default
        for f in msgspec.structs.fields(SamplingParams)
    }
    found = {name.strip(" `"): default.strip(" `") for name, default, _ in rows("field of `SamplingParams` | default")}
    assert found == {name: repr(value) for name, value in expected.items()}


def test_every_field_of_an_output_stands_there() -> None:
    assert [name.strip(" `") for name, _ in rows("field of `RequestOutput`")] == [f.name for f in fields(RequestOutput)]
