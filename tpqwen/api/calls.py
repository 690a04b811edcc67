"""From a JSON body to a Call (what the client asks), and from a Call to sequences for the engine."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field
from typing import Any

from tpqwen.api.fields import CHAT, COMPLETIONS, EFFORTS, sampling_values, validate
from tpqwen.api.formats import Answer, answer_of
from tpqwen.api.info import ModelInfo
from tpqwen.api.tool_shapes import tools_of
from tpqwen.errors import RequestError
from tpqwen.request import GenerateRequest, SamplingParams, ThinkingBudget
from tpqwen.structure import Structure
from tpqwen.text.chat import ChatFormat, Thinking
from tpqwen.text.sequences import expand
from tpqwen.text.structures import call_structure
from tpqwen.text.thinking import State
from tpqwen.text.tools import CallSyntax, Tools, call_syntax

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Call:
    """One valid HTTP request, free of the endpoint's spelling.

    Either messages (chat) or prompts are set. sampling holds the attributes of SamplingParams that the client named;
    the others get their defaults when the mode is known, that is after rendering.
    """

    messages: list[Any] | None
    prompts: list[str | list[int]]
    sampling: dict[str, Any]
    thinking: Thinking = field(default_factory=Thinking)
    tools: Tools = field(default_factory=Tools)
    answer: Answer | None = None  # the form of the content, where it is bound to one
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    truncate: int | None = None
    priority: int = 0
    cache_salt: str = ""
    timeout_s: float | None = None

    @property
    def prompt_size(self) -> int:
        """Characters or ids to be read, roughly; decides whether a thread is worth its while."""
        return sum(map(len, self.prompts))


@dataclass(frozen=True)
class Prepared:
    """Sequences in the order of their choice index, and what the answer needs to know about them."""

    sequences: list[GenerateRequest]
    prompt_ids: list[list[int]]  # one per prompt; choice i belongs to prompt i // n
    params: SamplingParams
    start: State | None  # of the output parser; None: plain text
    calls: CallSyntax | None = None  # how tool calls are found; None: they are not looked for
    thinking: bool = False  # the mode that the prompt asks for
    body: Structure | None = None  # what stands between the marks of a call, where that is bound

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompt_ids))


def read_chat(body: dict[str, Any], info: ModelInfo) -> Call:
    """A chat completion. Raises RequestError."""
    values = validate(CHAT, body)
    if "top_logprobs" in values and not values.get("logprobs"):
        raise _clash("top_logprobs", "top_logprobs needs logprobs: true")
    limit, other = values.get("max_completion_tokens"), values.get("max_tokens")
    if limit is not None and other is not None and limit != other:
        raise _clash("max_completion_tokens", "max_tokens and max_completion_tokens are given and differ")
    sampling = _sampling(values, sampling_values(CHAT, values))
    sampling["max_tokens"] = other if limit is None else limit
    if values.get("logprobs"):
        sampling["logprobs"] = values.get("top_logprobs", 0)
    return Call(
        messages=values["messages"],
        prompts=[],
        sampling=sampling,
        thinking=_thinking(values),
        tools=tools_of(values),
        **_common(values, info),
    )


def _thinking(values: dict[str, Any]) -> Thinking:
    """The switch and the budget. Raises RequestError when the fields contradict each other."""
    switch = values.get("chat_template_kwargs", {}).get("enable_thinking")
    effort = values.get("reasoning_effort")
    budget = values.get("thinking_token_budget")
    if effort is None:
        asked = Thinking(switch, budget)
    else:
        if switch is not None and switch != (effort != "none"):
            raise _clash("reasoning_effort", f"reasoning_effort {effort} and enable_thinking contradict each other")
        asked = Thinking(effort != "none", EFFORTS[effort] or None if budget is None else budget, "reasoning_effort")
    if asked.on is False and budget is not None:
        raise _clash("thinking_token_budget", "thinking_token_budget needs thinking, which is switched off")
    return asked


def read_completion(body: dict[str, Any], info: ModelInfo) -> Call:
    """A text completion. Raises RequestError."""
    values = validate(COMPLETIONS, body)
    sampling = _sampling(values, sampling_values(COMPLETIONS, values))
    sampling["max_tokens"] = values.get("max_tokens")
    sampling["logprobs"] = values.get("logprobs")
    return Call(messages=None, prompts=values["prompt"], sampling=sampling, **_common(values, info))


def prepare(call: Call, chat: ChatFormat, info: ModelInfo) -> Prepared:
    """Render, tokenize, resolve defaults and check against the context. Blocks: run it in a thread if long."""
    start: State | None = None
    thinking: bool | None = None
    calls: CallSyntax | None = None
    budget: ThinkingBudget | None = None
    if call.messages is not None:
        calls = call_syntax(chat.vocabulary, chat.call_format, call.tools)
        prompt = chat.prompt(call.messages, call.thinking, call.tools.shown)
        calls = calls.after(chat.vocabulary, prompt.ids) if calls is not None else None
        all_ids, start, thinking, budget = [prompt.ids], prompt.start, prompt.thinking, prompt.budget
    else:
        all_ids = [chat.model.encode(p) if isinstance(p, str) else p for p in call.prompts]
    params = SamplingParams(**{**vars(chat.defaults(thinking)), **call.sampling})
    if thinking and params.greedy:
        _log.warning("temperature 0 in thinking mode tends to repeat itself endlessly (Qwen's advice: 0.6)")
    _check_ids(all_ids, params, info)
    if call.truncate is not None:
        all_ids = [ids[-call.truncate :] for ids in all_ids]
    # The client's request id is no key: two requests may carry the same one.
    key = secrets.token_hex(8)
    common: dict[str, Any] = {
        "priority": call.priority,
        "cache_salt": call.cache_salt,
        "thinking": budget,
        "field": "prompt" if call.messages is None else "messages",
    }
    sequences = [s for i, ids in enumerate(all_ids) for s in expand(f"{key}-{i}", ids, params, info.limits, **common)]
    body = call_structure(call.tools, calls.format) if calls is not None else None
    return Prepared(sequences, all_ids, params, start, calls, bool(thinking), body)


def _sampling(values: dict[str, Any], sampling: dict[str, Any]) -> dict[str, Any]:
    """Attributes of SamplingParams whose spelling differs from the field's."""
    if "top_k" in values:
        sampling["top_k"] = max(values["top_k"], 0)
    sampling["stop"] = tuple(values.get("stop", ()))
    sampling["stop_token_ids"] = tuple(values.get("stop_token_ids", ()))
    return sampling


def _common(values: dict[str, Any], info: ModelInfo) -> dict[str, Any]:
    """Arguments of Call that both endpoints share."""
    model = values.get("model", info.name)
    if model not in info.names:
        message = f"the model {model[:64]!r} is not served here; {info.name!r} is"
        raise RequestError(message, param="model", code="model_not_found", status=404)
    stream = values.get("stream", False)
    if "stream_options" in values and not stream:
        raise _clash("stream_options", "stream_options needs stream: true")
    options = values.get("stream_options", {})
    return {
        "stream": stream,
        "include_usage": options.get("include_usage", False),
        "continuous_usage": options.get("continuous_usage_stats", False),
        "answer": answer_of(values),
        "return_token_ids": values.get("return_token_ids", False),
        "truncate": values.get("truncate_prompt_tokens"),
        "priority": values.get("priority", 0),
        "cache_salt": values.get("cache_salt", ""),
        "timeout_s": values.get("timeout"),
    }


def _check_ids(prompts: list[list[int]], params: SamplingParams, info: ModelInfo) -> None:
    """Every id that the client named must be a token."""
    size = info.limits.vocab_size
    named = (
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
        *(("prompt", ids) for ids in prompts),
    )
    for name, ids in named:
        if ids and max(ids) >= size:
            message = f"{name} names token {max(ids)}; the vocabulary has {size}"
            raise RequestError(message, param=name, code="invalid_value")


def _clash(param: str, message: str) -> RequestError:
    return RequestError(message, param=param, code="invalid_value")
