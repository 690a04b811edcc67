"""Chat messages as clients send them, checked and brought into the one form that Qwen3's chat template understands.

The template drops or mangles what it does not expect without a word, so everything it can't show is refused here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tpqwen.errors import RequestError

MAX_MESSAGES = 2048
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_KNOWN_KEYS = {
    "system": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "reasoning_content", "reasoning", "tool_calls"},
    "tool": {"role", "content", "name", "tool_call_id"},
}
# What the official client's model_dump() of an answer adds; empty, they ask for nothing.
_EMPTY_ALLOWED = {"refusal", "audio", "annotations", "function_call"}


def normalise(messages: object) -> list[dict[str, Any]]:
    """Messages for the template: text parts joined (nothing put between them), content null -> "", developer -> system,
    `reasoning` -> reasoning_content, arguments parsed, tool results in the order of their calls.

    Raises RequestError naming the message.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise _refused("messages", "messages must be a list", "invalid_type")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        code = "too_many_items" if messages else "invalid_value"
        raise _refused("messages", f"messages must have 1 to {MAX_MESSAGES} entries, not {len(messages)}", code)
    return _ordered_results([_message(message, f"messages[{i}]") for i, message in enumerate(messages)])


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _refused(where, f"{where} must be an object", "invalid_type")
    given = {k: v for k, v in message.items() if v is not None and not (k in _EMPTY_ALLOWED and not v)}
    role = _role(given, where)
    for key in given:
        if key not in _KNOWN_KEYS[role]:
            code = "unsupported_parameter" if key in _EMPTY_ALLOWED else "unknown_parameter"
            raise _refused(f"{where}.{key[:64]}", f"a {role} message has no field {key[:64]!r} here", code)
    if "content" not in message and "tool_calls" not in given:
        raise _refused(f"{where}.content", f"{where}.content is missing", "missing_field")
    out: dict[str, Any] = {"role": role, "content": _content(given.get("content", ""), f"{where}.content")}
    for key in ("name", "tool_call_id"):
        if key in given:
            out[key] = _string(given[key], f"{where}.{key}")
    if role == "assistant":
        _add_assistant_fields(out, given, where)
    if role == "tool" and "tool_call_id" not in out:
        raise _refused(f"{where}.tool_call_id", f"{where} is a tool message without tool_call_id", "missing_field")
    return out


def _role(message: Mapping[str, Any], where: str) -> str:
    if "role" not in message:
        raise _refused(f"{where}.role", f"{where}.role is missing", "missing_field")
    role = _string(message["role"], f"{where}.role")
    if role not in _ROLES:
        known = ", ".join(_ROLES)
        raise _refused(f"{where}.role", f"{where}.role must be one of {known}, not {role[:64]!r}", "invalid_value")
    return _ROLES[role]


def _content(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _refused(where, f"{where} must be a string or a list of text parts", "invalid_type")
    return "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(part: object, where: str) -> str:
    if not isinstance(part, Mapping):
        raise _refused(where, f"{where} must be an object", "invalid_type")
    kind = part.get("type")
    if kind != "text":
        raise _refused(
            where, f"{where} is of type {str(kind)[:64]!r}; this model reads text only", "unsupported_content"
        )
    extra = set(part) - {"type", "text"}
    if extra:
        raise _refused(where, f"{where} has an unknown field {min(extra)[:64]!r}", "unknown_parameter")
    if "text" not in part:
        raise _refused(f"{where}.text", f"{where}.text is missing", "missing_field")
    return _string(part["text"], f"{where}.text")


def _add_assistant_fields(out: dict[str, Any], given: Mapping[str, Any], where: str) -> None:
    texts = [_string(given[k], f"{where}.{k}") for k in ("reasoning_content", "reasoning") if k in given]
    if len(set(texts)) > 1:
        raise _refused(f"{where}.reasoning", f"{where} has two different reasonings", "invalid_value")
    if texts:
        out["reasoning_content"] = texts[0]
    calls = given.get("tool_calls", [])
    if not isinstance(calls, list):
        raise _refused(f"{where}.tool_calls", f"{where}.tool_calls must be a list", "invalid_type")
    if calls:
        out["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise _refused(where, f"{where} must be an object with a function", "invalid_type")
    if call.get("type", "function") != "function":
        raise _refused(f"{where}.type", f"{where}.type must be 'function'", "unsupported_content")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        arguments = _parsed_arguments(arguments, f"{where}.function.arguments")
    if not isinstance(arguments, Mapping):
        raise _refused(f"{where}.function.arguments", f"{where}: arguments must be a JSON object", "invalid_value")
    name = _string(function.get("name"), f"{where}.function.name")
    return {
        "id": _string(call.get("id"), f"{where}.id"),
        "type": "function",
        "function": {"name": name, "arguments": dict(arguments)},
    }


def _parsed_arguments(text: str, where: str) -> Any:
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        raise _refused(where, f"{where} is not JSON", "invalid_value") from None


def _ordered_results(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool results in the order of the calls: the template matches them by order, ids are not shown."""
    out: list[dict[str, Any]] = []
    i = 0
    while i < len(messages):
        message = messages[i]
        if message["role"] == "tool":
            raise _refused(f"messages[{i}]", f"messages[{i}] answers no tool call before it", "invalid_value")
        out.append(message)
        i += 1
        if message.get("tool_calls"):
            end = i
            while end < len(messages) and messages[end]["role"] == "tool":
                end += 1
            out += _results(message["tool_calls"], messages[i:end], i)
            i = end
    return out


def _results(calls: list[dict[str, Any]], results: list[dict[str, Any]], first: int) -> list[dict[str, Any]]:
    by_id: dict[str, dict[str, Any]] = {}
    known = [call["id"] for call in calls]
    for i, result in enumerate(results):
        call_id = result["tool_call_id"]
        if call_id not in known or call_id in by_id:
            why = "is answered twice" if call_id in by_id else "was not made in the message before"
            where = f"messages[{first + i}].tool_call_id"
            raise _refused(where, f"{where}: call {call_id[:64]!r} {why}", "invalid_value")
        by_id[call_id] = result
    missing = [call_id for call_id in known if call_id not in by_id]
    if missing or len(set(known)) < len(known):
        why = f"call {missing[0][:64]!r} has no result" if missing else "two calls have one id"
        raise _refused(f"messages[{first - 1}].tool_calls", f"messages[{first - 1}]: {why}", "invalid_value")
    return [by_id[call_id] for call_id in known]


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _refused(where, f"{where} must be a string", "invalid_type")
    return value


def _refused(param: str, message: str, code: str) -> RequestError:
    return RequestError(message, param=param, code=code)
