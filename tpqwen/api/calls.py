"""From a JSON body to a Call (what the client asks), and from a Call to sequences for the engine."""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tpqwen.api.fields import CHAT, COMPLETIONS, EFFORTS, sampling_values, validate
from tpqwen.api.formats import Answer, answer_of
from tpqwen.api.info import ModelInfo
from tpqwen.api.tool_shapes import tools_of
from tpqwen.errors import RequestError
from tpqwen.request import GenerateRequest, Pooling, SamplingParams
from tpqwen.structure import Structure
from tpqwen.text.chat import ChatFormat, Thinking
from tpqwen.text.sequences import checked_max_tokens, expand
from tpqwen.text.structures import call_structure
from tpqwen.text.thinking import State
from tpqwen.text.tools import CallSyntax, Tools, call_syntax
from tpqwen.text.work import ChatWork, PromptWork, Rendered, Work

_log = logging.getLogger(__name__)
_run = secrets.token_hex(4)
_numbers = itertools.count()


@dataclass(frozen=True)
class Call:
    """One valid HTTP request, free of the endpoint's spelling.

    work is what must be rendered; param is the name that errors give to it. sampling holds the attributes of
    SamplingParams that the client named; the others get their defaults when the mode is known, that is after rendering.
    options: what only the endpoint's own answer needs.
    """

    work: Work
    sampling: dict[str, Any]
    param: str = "messages"
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
    pooling: Pooling | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)  # what the client calls fields that errors name


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
        raise clash("top_logprobs", "top_logprobs needs logprobs: true")
    limit, other = values.get("max_completion_tokens"), values.get("max_tokens")
    if limit is not None and other is not None and limit != other:
        raise clash("max_completion_tokens", "max_tokens and max_completion_tokens are given and differ")
    sampling = _sampling(values, sampling_values(CHAT, values))
    sampling["max_tokens"] = other if limit is None else limit
    if values.get("logprobs"):
        sampling["logprobs"] = values.get("top_logprobs", 0)
    tools = tools_of(values)
    return Call(work=chat_work(values, tools), sampling=sampling, tools=tools, **_common(values, info))


def _thinking(values: dict[str, Any]) -> Thinking:
    """The switch and the budget. Raises RequestError when the fields contradict each other."""
    switch = values.get("chat_template_kwargs", {}).get("enable_thinking")
    effort = values.get("reasoning_effort")
    budget = values.get("thinking_token_budget")
    if effort is None:
        asked = Thinking(switch, budget)
    else:
        if switch is not None and switch != (effort != "none"):
            raise clash("reasoning_effort", f"reasoning_effort {effort} and enable_thinking contradict each other")
        asked = Thinking(effort != "none", EFFORTS[effort] or None if budget is None else budget, "reasoning_effort")
    if asked.on is False and budget is not None:
        raise clash("thinking_token_budget", "thinking_token_budget needs thinking, which is switched off")
    return asked


def read_completion(body: dict[str, Any], info: ModelInfo) -> Call:
    """A text completion. Raises RequestError."""
    values = validate(COMPLETIONS, body)
    sampling = _sampling(values, sampling_values(COMPLETIONS, values))
    limit, echo, logprobs = values.get("max_tokens"), values.get("echo", False), values.get("logprobs")
    if limit == 0 and not echo:
        raise RequestError("max_tokens: must be at least 1 without echo", param="max_tokens", code="out_of_range")
    choices, best_of = values.get("n", 1), values.get("best_of")
    if best_of is not None and best_of != choices:
        code = "unsupported_parameter" if best_of > choices else "invalid_value"
        raise RequestError(f"best_of: only the value of n, {choices}, is supported", param="best_of", code=code)
    sampling["max_tokens"] = limit
    sampling["logprobs"] = logprobs
    if echo and logprobs is not None:
        sampling["prompt_logprobs"] = max(logprobs, sampling.get("prompt_logprobs", 0))
    return Call(
        work=PromptWork(prompts=values["prompt"]),
        param="prompt",
        sampling=sampling,
        options={"echo": echo, "prompt_logprobs": values.get("prompt_logprobs")},
        **_common(values, info),
    )


def chat_work(values: dict[str, Any], tools: Tools) -> ChatWork:
    """The conversation and how it is to be rendered. Raises RequestError."""
    continues, opens = values.get("continue_final_message", False), values.get("add_generation_prompt")
    if continues and opens:
        raise clash("continue_final_message", "continue_final_message and add_generation_prompt exclude each other")
    return ChatWork(
        messages=values["messages"],
        thinking=_thinking(values),
        tools=tools.shown,
        add_generation_prompt=not continues and opens is not False,
        continue_final_message=continues,
    )


def check_tools(call: Call, chat: ChatFormat) -> None:
    """Raises RequestError when the model cannot call the tools: told before anything is rendered."""
    call_syntax(chat.vocabulary, chat.call_format, call.tools)


def prepare(call: Call, rendered: Rendered, chat: ChatFormat, info: ModelInfo) -> Prepared:
    """Resolve defaults by the mode of the rendered prompt and check against the model. Raises RequestError."""
    params = SamplingParams(**{**vars(chat.defaults(rendered.thinking)), **call.sampling})
    if rendered.thinking and params.greedy:
        _log.warning("temperature 0 in thinking mode tends to repeat itself endlessly (Qwen's advice: 0.6)")
    if rendered.longest > info.limits.max_model_len:
        checked_max_tokens(rendered.longest, params, info.limits, call.param)
    all_ids = rendered.prompts
    _check_ids(all_ids, params, info)
    key = f"{_run}{next(_numbers):08x}"  # the client's request id is none: two requests may carry the same one
    common: dict[str, Any] = {
        "priority": call.priority,
        "cache_salt": call.cache_salt,
        "thinking": rendered.budget,
        "field": call.param,
    }
    sequences = [s for i, ids in enumerate(all_ids) for s in expand(f"{key}-{i}", ids, params, info.limits, **common)]
    if call.pooling is not None:
        sequences = [msgspec.structs.replace(s, pooling=call.pooling) for s in sequences]
    calls = call_syntax(chat.vocabulary, chat.call_format, call.tools)
    calls = calls.after(chat.vocabulary, all_ids[0]) if calls is not None else None
    body = call_structure(call.tools, calls.format) if calls is not None else None
    return Prepared(sequences, all_ids, params, rendered.start, calls, bool(rendered.thinking), body)


def check_model(values: dict[str, Any], info: ModelInfo) -> None:
    """Raises RequestError 404 when another model is asked for."""
    model = values.get("model", info.name)
    if model != info.name:
        message = f"the model {model[:64]!r} is not served here; {info.name!r} is"
        raise RequestError(message, param="model", code="model_not_found", status=404)


def clash(param: str, message: str) -> RequestError:
    """Fields that do not go together."""
    return RequestError(message, param=param, code="invalid_value")


def _sampling(values: dict[str, Any], sampling: dict[str, Any]) -> dict[str, Any]:
    """Attributes of SamplingParams whose spelling differs from the field's."""
    if "top_k" in values:
        sampling["top_k"] = max(values["top_k"], 0)
    sampling["stop"] = tuple(values.get("stop", ()))
    sampling["stop_token_ids"] = tuple(values.get("stop_token_ids", ()))
    return sampling


def _common(values: dict[str, Any], info: ModelInfo) -> dict[str, Any]:
    """Arguments of Call that chat and completions share."""
    check_model(values, info)
    stream = values.get("stream", False)
    if "stream_options" in values and not stream:
        raise clash("stream_options", "stream_options needs stream: true")
    if "prompt_logprobs" in values and stream:
        raise clash("prompt_logprobs", "prompt_logprobs are not given in a stream")
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
