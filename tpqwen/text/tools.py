"""Tools of a request, and how a checkpoint's template writes calls to them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from tpqwen.errors import RequestError
from tpqwen.text.call_pieces import CallParser
from tpqwen.text.coder_xml import CoderCall
from tpqwen.text.hermes import HermesCall
from tpqwen.text.vocabulary import CALL_CLOSE, CALL_OPEN, TextModel, Vocabulary

_log = logging.getLogger(__name__)


class CallFormat(StrEnum):
    """What stands between the call marks."""

    JSON = "json"  # {"name": ..., "arguments": {...}}
    XML = "xml"  # <function=...><parameter=...>, as Qwen3-Coder writes


class Choice(StrEnum):
    """OpenAI's tool_choice; NAMED goes with a function's name."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True)
class Tools:
    """The tools of one request. definitions: the client's own objects, shown to the template as they are."""

    definitions: Sequence[Mapping[str, Any]] = ()
    choice: Choice = Choice.NONE
    name: str = ""
    parallel: bool = True

    @property
    def shown(self) -> list[Mapping[str, Any]]:
        """What the template gets: nothing when no call is wanted."""
        return [] if self.choice is Choice.NONE else list(self.definitions)

    @property
    def parameters(self) -> dict[str, Mapping[str, Any]]:
        """JSON schema of each function's arguments, by name."""
        functions = [d["function"] for d in self.definitions]
        return {f["name"]: f.get("parameters") or {} for f in functions}


@dataclass(frozen=True)
class CallSyntax:
    """How calls are found in the output of one request. parallel: more than one may follow."""

    open_id: int
    close_id: int
    format: CallFormat
    parallel: bool = True
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    begun: Sequence[int] | None = None  # ids of a call that the prompt leaves open, its mark excluded

    def after(self, vocabulary: Vocabulary, prompt_ids: Sequence[int]) -> CallSyntax:
        """The same for an answer to this prompt, whose last turn may end inside a call (an assistant's prefill)."""
        for i in range(len(prompt_ids) - 1, -1, -1):
            if prompt_ids[i] == self.open_id:
                return replace(self, begun=list(prompt_ids[i + 1 :]))
            if prompt_ids[i] in (self.close_id, vocabulary.turn_start, vocabulary.think_open, vocabulary.think_close):
                break
        return self

    def parser(self) -> CallParser:
        """A parser for one call."""
        return CoderCall(self.parameters) if self.format is CallFormat.XML else HermesCall()


def call_syntax(vocabulary: Vocabulary, form: CallFormat | None, tools: Tools) -> CallSyntax | None:
    """None when no calls are wanted: the marks are then text. Raises RequestError where the model has no calls."""
    if not tools.shown:
        return None
    opening, closing = vocabulary.control.get(CALL_OPEN), vocabulary.control.get(CALL_CLOSE)
    if form is None or opening is None or closing is None:
        message = "this model's chat template shows no tools"
        raise RequestError(message, param="tools", code="unsupported_parameter")
    return CallSyntax(opening, closing, form, tools.parallel, tools.parameters)


def detect_format(model: TextModel) -> CallFormat | None:
    """The form of calls, read off a rendered conversation; None when the template does not show tools at all."""
    if not model.chat_template:
        return None
    function = {"name": "probe_function", "description": "d", "parameters": {"type": "object", "properties": {}}}
    call = {"id": "c", "type": "function", "function": {"name": "probe_function", "arguments": {"probe_key": "v"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "y"},
    ]
    try:
        text = model.render(messages, tools=[{"type": "function", "function": function}])
    except RequestError as error:
        _log.warning("the chat template refuses tools: %s", error)
        return None
    before, mark, after = text.rpartition(CALL_OPEN + "\n")
    if not mark or "probe_function" not in before:  # the call itself comes after the mark
        return None
    return CallFormat.XML if after.lstrip().startswith("<function=") else CallFormat.JSON
