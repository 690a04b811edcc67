"""Shapes of tools and tool_choice, and the Tools that they mean."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from tpqwen.api.shapes import Boolean, Items, Only, Record, Schema, Text, clipped, refuse
from tpqwen.errors import RequestError
from tpqwen.text.tools import Choice, Tools

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_WORDS = {"none": Choice.NONE, "auto": Choice.AUTO, "required": Choice.REQUIRED}


@dataclass(frozen=True)
class FunctionName:
    """1 to 64 letters, digits, `_`, `.`, `-`."""

    def check(self, value: Any, where: str) -> str:
        name = Text().check(value, where)
        if not _NAME.fullmatch(name):
            refuse(where, f"must have 1 to 64 of A-Z a-z 0-9 _ . -, not {clipped(name)}", "invalid_value")
        return name

    def schema(self) -> Schema:
        return {"type": "string", "pattern": f"^{_NAME.pattern}$"}


@dataclass(frozen=True)
class JsonSchema:
    """A JSON schema; what it may hold is checked where it is compiled."""

    def check(self, value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            refuse(where, f"must be an object, not {clipped(value)}", "invalid_type")
        return value

    def schema(self) -> Schema:
        return {"type": "object"}


_FUNCTION = Record(
    (("name", FunctionName()), ("description", Text()), ("parameters", JsonSchema()), ("strict", Boolean())),
    required=("name",),
)
_TOOL = Record((("type", Only(("function",), "unsupported_value")), ("function", _FUNCTION)), ("type", "function"))
_TOOLS = Items(_TOOL, MAX_TOOLS, min_items=1)
_NAMED = Record(
    (("type", Only(("function",))), ("function", Record((("name", FunctionName()),), ("name",)))), ("type", "function")
)


@dataclass(frozen=True)
class ToolList:
    """Function definitions. The client's own objects come out: the template must see them as they were written."""

    def check(self, value: Any, where: str) -> list[Any]:
        names = [tool["function"]["name"] for tool in _TOOLS.check(value, where)]
        for i, name in enumerate(names):
            if name in names[:i]:
                refuse(f"{where}[{i}].function.name", f"{clipped(name)} is defined twice", "invalid_value")
        assert isinstance(value, list)
        return value

    def schema(self) -> Schema:
        return _TOOLS.schema()


@dataclass(frozen=True)
class ToolChoice:
    """A word or one function; afterwards (Choice, name)."""

    def check(self, value: Any, where: str) -> tuple[Choice, str]:
        if isinstance(value, str):
            if value not in _WORDS:
                refuse(where, f"must be none, auto, required or a function, not {clipped(value)}", "invalid_value")
            return _WORDS[value], ""
        return Choice.NAMED, _NAMED.check(value, where)["function"]["name"]

    def schema(self) -> Schema:
        return {"oneOf": [{"enum": list(_WORDS)}, _NAMED.schema()]}


def tools_of(values: dict[str, Any]) -> Tools:
    """The Tools that the checked fields ask for. Raises RequestError when they do not fit together."""
    definitions = values.get("tools")
    if definitions is None:
        for name in ("tool_choice", "parallel_tool_calls"):
            if name in values and values[name] != (Choice.NONE, ""):
                raise RequestError(f"{name} needs tools", param=name, code="invalid_value")
        return Tools()
    choice, name = values.get("tool_choice", (Choice.AUTO, ""))
    if name and name not in [d["function"]["name"] for d in definitions]:
        message = f"tool_choice names {name!r}, which is not among the tools"
        raise RequestError(message, param="tool_choice.function.name", code="invalid_value")
    parallel = values.get("parallel_tool_calls", True) and choice is not Choice.NAMED
    return Tools(definitions, choice, name, parallel)
