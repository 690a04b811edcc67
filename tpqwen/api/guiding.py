"""From what a call says about the form of its output to sequences that are guided to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from tpqwen.api.calls import Call, Prepared
from tpqwen.api.info import ModelInfo
from tpqwen.errors import RequestError
from tpqwen.request import Guide
from tpqwen.structure import Compiler
from tpqwen.text.thinking import State
from tpqwen.text.tools import Choice
from tpqwen.text.vocabulary import Vocabulary


async def guided(
    call: Call, prepared: Prepared, info: ModelInfo, vocabulary: Vocabulary, compiler: Compiler | None
) -> Prepared:
    """The same sequences, with a guide where the call asks for a form. Raises RequestError, Overloaded."""
    must_call = call.tools.choice in (Choice.REQUIRED, Choice.NAMED)
    if call.answer is None and prepared.body is None:
        return prepared
    param = call.answer.param if call.answer is not None else "tools"
    if compiler is None:
        raise RequestError(f"{param}: this server compiles no grammars", param=param, code="unsupported_parameter")
    _check(call, prepared, must_call, param)
    answer = await compiler.compile(call.answer.structure, call.answer.param) if call.answer is not None else b""
    body = await compiler.compile(prepared.body, "tools") if prepared.body is not None else b""
    common: dict[str, Any] = {}
    if prepared.calls is not None:
        syntax = prepared.calls
        common = {"call_open": syntax.open_id, "call_close": syntax.close_id, "parallel": syntax.parallel}
        common["calls"] = 1 if must_call else 0
    guide = Guide(
        answer=answer,
        call=body,
        inside=prepared.start is State.REASONING,
        may_think=prepared.start is State.UNDECIDED and prepared.thinking,
        end_ids=info.limits.end_ids,
        forbidden_ids=prepared.sequences[0].end_ids,
        min_tokens=prepared.params.min_tokens,
        think_open=_or_none(vocabulary.think_open),
        think_close=_or_none(vocabulary.think_close),
        blank_ids=vocabulary.blank_ids,
        newline_id=_or_none(vocabulary.newline_id),
        **common,
    )
    return replace(prepared, sequences=[msgspec.structs.replace(s, guide=guide) for s in prepared.sequences])


def _check(call: Call, prepared: Prepared, must_call: bool, param: str) -> None:
    if prepared.params.ignore_eos:
        message = f"{param}: an output of a given form ends when it is complete, so ignore_eos cannot be kept"
        raise RequestError(message, param="ignore_eos", code="invalid_value")
    if call.answer is not None and must_call:
        message = f"{param}: tool_choice demands calls, so there is no content that it could bind"
        raise RequestError(message, param="tool_choice", code="invalid_value")


def _or_none(token_id: int | None) -> int:
    return -1 if token_id is None else token_id
