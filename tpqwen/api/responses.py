"""/v1/responses: the stateless core, translated into the chat call."""

from __future__ import annotations

from typing import Any

from tpqwen.api.calls import Call
from tpqwen.api.fields import RESPONSES, validate
from tpqwen.api.info import ModelInfo
from tpqwen.api.shapes import clipped, refuse
from tpqwen.api.translation import Assistant, object_of, string_of, text_of, translated

# What a chat field is called here, for errors.
NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "chat_template_kwargs.enable_thinking": "reasoning.effort",
}
_SAME = ("model", "temperature", "top_p", "stream", "user", "metadata", "service_tier")
_PARTS = ("input_text", "output_text", "text")
_GIVEN_BACK = {"id", "status", "phase"}  # what an item of an answer carries besides what it says
_LOGPROBS = "message.output_text.logprobs"


def read_responses(body: dict[str, Any], info: ModelInfo) -> Call:
    """One response. Raises RequestError."""
    values = validate(RESPONSES, body)
    chat: dict[str, Any] = {name: values[name] for name in _SAME if name in values}
    chat["messages"] = messages_of(values["input"], values.get("instructions"))
    if "max_output_tokens" in values:
        chat["max_completion_tokens"] = values["max_output_tokens"]
    if _LOGPROBS in values.get("include", ()):
        chat["logprobs"] = True
        chat["top_logprobs"] = values.get("top_logprobs", 0)
    elif "top_logprobs" in values:
        refuse("top_logprobs", f"needs include: [{_LOGPROBS!r}]", "invalid_value")
    chat |= _thinking(values.get("reasoning", {})) | _tools(values) | _format(values.get("text", {}))
    return translated(chat, info, NAMES, values)


def messages_of(given: str | list[Any], instructions: str | None) -> list[dict[str, Any]]:
    """Chat messages of the input. A reasoning item, a message and function calls in a row are one assistant's turn."""
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    turn = Assistant(messages)
    for i, item in enumerate(given):
        _take(object_of(item, f"input[{i}]"), f"input[{i}]", messages, turn)
    turn.end()
    return messages


def _take(item: dict[str, Any], where: str, messages: list[dict[str, Any]], turn: Assistant) -> None:
    kind = item.get("type", "message" if "role" in item else None)
    known = {
        "message": {"role", "content"},
        "function_call": {"call_id", "name", "arguments"},
        "function_call_output": {"call_id", "output"},
        "reasoning": {"summary", "content", "encrypted_content"},
    }.get(str(kind))
    if known is None:
        refuse(f"{where}.type", f"items of type {clipped(kind)} are not supported here", "unsupported_content")
    for key, value in item.items():
        if key not in known | _GIVEN_BACK | {"type"} and value is not None:
            refuse(f"{where}.{key[:64]}", f"not known in an item of type {kind}", "unknown_parameter")
    if kind == "function_call":
        call_id = string_of(item.get("call_id"), f"{where}.call_id")
        turn.call(call_id, string_of(item.get("name"), f"{where}.name"), item.get("arguments", "{}"))
    elif kind == "reasoning":
        turn.think(_reasoning(item, where))
    elif kind == "function_call_output":
        turn.end()
        call_id = string_of(item.get("call_id"), f"{where}.call_id")
        content = text_of(item.get("output"), f"{where}.output", _PARTS)
        messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
    elif item.get("role") == "assistant":
        turn.say(text_of(item.get("content"), f"{where}.content", _PARTS))
    else:
        turn.end()
        role = string_of(item.get("role"), f"{where}.role")
        messages.append({"role": role, "content": text_of(item.get("content"), f"{where}.content", _PARTS)})


def _reasoning(item: dict[str, Any], where: str) -> str:
    if item.get("encrypted_content"):
        refuse(f"{where}.encrypted_content", "encrypted reasoning is not made here", "unsupported_content")
    key = "content" if item.get("content") else "summary"
    return text_of(item.get(key) or [], f"{where}.{key}", ("reasoning_text", "summary_text"))


def _thinking(reasoning: dict[str, Any]) -> dict[str, Any]:
    effort = reasoning.get("effort")
    if effort is None:
        return {}
    return {"chat_template_kwargs": {"enable_thinking": False}} if effort == "none" else {"reasoning_effort": effort}


def _tools(values: dict[str, Any]) -> dict[str, Any]:
    """Chat's tools: the function's fields stand one level deeper there."""
    out: dict[str, Any] = {}
    if values.get("tools"):
        out["tools"] = [_tool(object_of(t, f"tools[{i}]"), f"tools[{i}]") for i, t in enumerate(values["tools"])]
    choice = values.get("tool_choice")
    if isinstance(choice, dict):
        if choice.get("type") != "function":
            kind = clipped(choice.get("type"))
            refuse("tool_choice.type", f"only function is supported, not {kind}", "unsupported_value")
        name = string_of(choice.get("name"), "tool_choice.name")
        out["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif choice is not None and (choice not in ("auto", "none") or "tools" in out):
        out["tool_choice"] = choice
    if "tools" in out and "parallel_tool_calls" in values:
        out["parallel_tool_calls"] = values["parallel_tool_calls"]
    return out


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        refuse(f"{where}.type", f"only function is supported, not {clipped(tool.get('type'))}", "unsupported_value")
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type" and v is not None}}


def _format(text: dict[str, Any]) -> dict[str, Any]:
    form = text.get("format") or {"type": "text"}
    kind = form.get("type")
    if kind == "json_schema":
        return {"response_format": {"type": kind, kind: {k: v for k, v in form.items() if k != "type"}}}
    return {} if kind == "text" else {"response_format": form}
