"""/v1/messages: Anthropic's shape, translated into the chat call."""

from __future__ import annotations

from typing import Any

from tpqwen.api.calls import Call
from tpqwen.api.fields import COUNT_TOKENS, MESSAGES, validate
from tpqwen.api.info import ModelInfo
from tpqwen.api.shapes import clipped, refuse
from tpqwen.api.translation import Assistant, object_of, part_of, string_of, text_of, translated

# What a chat field is called here, for errors.
NAMES = {
    "stop": "stop_sequences",
    "chat_template_kwargs.enable_thinking": "thinking.type",
    "thinking_token_budget": "thinking.budget_tokens",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "continue_final_message": "messages",
}
_SAME = ("model", "max_tokens", "temperature", "top_p", "stream")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def read_message(body: dict[str, Any], info: ModelInfo) -> Call:
    """One message. Raises RequestError."""
    return _read(validate(MESSAGES, body), info)


def read_count(body: dict[str, Any], info: ModelInfo) -> Call:
    """The same without what only generating needs. Raises RequestError."""
    return _read(validate(COUNT_TOKENS, body), info)


def _read(values: dict[str, Any], info: ModelInfo) -> Call:
    chat: dict[str, Any] = {name: values[name] for name in _SAME if name in values}
    if "top_k" in values:
        chat["top_k"] = values["top_k"]
    if "stop_sequences" in values:
        chat["stop"] = values["stop_sequences"]
    messages = messages_of(values["messages"], values.get("system"))
    chat["messages"] = messages
    if messages and messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
        chat["continue_final_message"] = True
    chat |= _thinking(values.get("thinking"), values.get("output_config", {}))
    chat |= _tools(values.get("tools", []), values.get("tool_choice"))
    return translated(chat, info, NAMES, values)


def messages_of(given: list[Any], system: str | list[Any] | None) -> list[dict[str, Any]]:
    """Chat messages. Tool results are messages of their own there, before the rest of the user's turn."""
    messages: list[dict[str, Any]] = []
    if system is not None:
        messages.append({"role": "system", "content": text_of(system, "system", ("text",))})
    turn = Assistant(messages)
    for i, item in enumerate(given):
        where = f"messages[{i}]"
        message = object_of(item, where)
        for key in message.keys() - {"role", "content"}:
            refuse(f"{where}.{key[:64]}", "is not known here", "unknown_parameter")
        role, content = message.get("role"), message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list):
            refuse(f"{where}.content", f"must be a string or a list, not {clipped(content)}", "invalid_type")
        if role == "user":
            messages += _user(blocks, where)
        elif role == "assistant":
            _assistant(blocks, where, turn)
        else:
            refuse(f"{where}.role", f"must be user or assistant, not {clipped(role)}", "invalid_value")
    return messages


def _user(blocks: list[Any], where: str) -> list[dict[str, Any]]:
    results, texts = [], []
    for i, given in enumerate(blocks):
        at = f"{where}.content[{i}]"
        block = object_of(given, at)
        if block.get("type") != "tool_result":
            texts.append(part_of(block, at, ("text",)))
            continue
        if texts:
            refuse(at, "tool results come before the text of a message", "invalid_value")
        results.append(_tool_result(block, at))
    return [*results, {"role": "user", "content": "".join(texts)}] if texts or not results else results


def _tool_result(block: dict[str, Any], where: str) -> dict[str, Any]:
    for key in block.keys() - {"type", "tool_use_id", "content", "is_error", "cache_control"}:
        refuse(f"{where}.{key[:64]}", "is not known here", "unknown_parameter")
    content = block.get("content")
    text = "" if content is None else text_of(content, f"{where}.content", ("text",))
    failed = block.get("is_error") or False
    if not isinstance(failed, bool):
        refuse(f"{where}.is_error", f"must be true or false, not {clipped(failed)}", "invalid_type")
    call_id = string_of(block.get("tool_use_id"), f"{where}.tool_use_id")
    return {"role": "tool", "tool_call_id": call_id, "content": f"Error: {text}" if failed else text}


def _assistant(blocks: list[Any], where: str, turn: Assistant) -> None:
    thoughts, texts, calls = [], [], []
    for i, given in enumerate(blocks):
        at = f"{where}.content[{i}]"
        block = object_of(given, at)
        if block.get("type") == "thinking":
            thoughts.append(string_of(block.get("thinking"), f"{at}.thinking"))
        elif block.get("type") == "tool_use":
            name = string_of(block.get("name"), f"{at}.name")
            arguments = object_of(block.get("input"), f"{at}.input")
            calls.append((string_of(block.get("id"), f"{at}.id"), name, arguments))
        else:
            texts.append(part_of(block, at, ("text",)))
    if thoughts:
        turn.think("\n".join(thoughts))
    turn.say("".join(texts))
    for call in calls:
        turn.call(*call)
    turn.end()


def _thinking(thinking: dict[str, Any] | None, output: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    kind = None if thinking is None else thinking["type"]
    if kind in ("enabled", "disabled"):
        out["chat_template_kwargs"] = {"enable_thinking": kind == "enabled"}
    if thinking is not None and kind == "enabled":
        if "budget_tokens" not in thinking:
            refuse("thinking.budget_tokens", "is missing", "missing_field")
        out["thinking_token_budget"] = thinking["budget_tokens"]
    elif thinking is not None and "budget_tokens" in thinking:
        refuse("thinking.budget_tokens", "goes with type enabled", "invalid_value")
    if "effort" in output:
        out["reasoning_effort"] = output["effort"]
    if "format" in output:
        schema = object_of(output["format"].get("schema"), "output_config.format.schema")
        json_schema = {"name": "output", "schema": schema, "strict": True}
        out["response_format"] = {"type": "json_schema", "json_schema": json_schema}
    return out


def _tools(tools: list[Any], choice: dict[str, Any] | None) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if tools:
        out["tools"] = [_tool(object_of(t, f"tools[{i}]"), f"tools[{i}]") for i, t in enumerate(tools)]
    if choice is None:
        return out
    kind = choice["type"]
    if kind == "tool":
        name = string_of(choice.get("name"), "tool_choice.name")
        out["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif tools or kind == "any":
        out["tool_choice"] = _CHOICES[kind]
    if tools and choice.get("disable_parallel_tool_use"):
        out["parallel_tool_calls"] = False
    return out


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        refuse(f"{where}.type", f"only custom tools are supported, not {clipped(tool['type'])}", "unsupported_value")
    for key in tool.keys() - {"type", "name", "description", "input_schema", "strict", "cache_control"}:
        refuse(f"{where}.{key[:64]}", "is not known here", "unknown_parameter")
    function = {k: tool[k] for k in ("name", "description", "strict") if tool.get(k) is not None}
    function["parameters"] = object_of(tool.get("input_schema"), f"{where}.input_schema")
    return {"type": "function", "function": function}
