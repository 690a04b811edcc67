"""Every request parameter, once: validation, translation, documentation and the schema all read these tables.

A field that is in the table of its endpoint acts; any other is refused with a 400 that names it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tpqwen.api.formats import ResponseFormat, StructuredOutputs
from tpqwen.api.shapes import (
    Boolean,
    Integer,
    Items,
    Mapping,
    Messages,
    Number,
    OneOf,
    OneOrMany,
    Only,
    Prompts,
    Record,
    Shape,
    Text,
    TokenBias,
)
from tpqwen.api.tool_shapes import ToolChoice, ToolList
from tpqwen.errors import RequestError
from tpqwen.text.messages import MAX_MESSAGES

MAX_PROMPTS = 64
EFFORTS = {
    "none": 0,
    "minimal": 1024,
    "low": 2048,
    "medium": 8192,
    "high": None,
    "xhigh": None,
}  # tokens; 0: no thinking
INT64 = 1 << 63


@dataclass(frozen=True)
class Field:
    """One parameter. maps_to: the attribute of request.SamplingParams that takes its value as it is, if one does.

    null is the same as leaving the field out, unless it is required.
    """

    name: str
    shape: Shape
    default: str
    doc: str
    maps_to: str = ""
    required: bool = False


_SAMPLING = (
    Field("temperature", Number(0, 2), "by mode", "0 (or below 1e-5) is greedy", "temperature"),
    Field(
        "top_p", Number(0, 1, open_low=True), "by mode", "smallest set of tokens with this much probability", "top_p"
    ),
    Field("top_k", Integer(-1, 1 << 30), "by mode", "the k likeliest tokens; 0 and -1 are off"),
    Field("min_p", Number(0, 1), "0", "tokens at least this fraction as likely as the likeliest", "min_p"),
    Field("presence_penalty", Number(-2, 2), "0", "counts output tokens", "presence_penalty"),
    Field("frequency_penalty", Number(-2, 2), "0", "counts output tokens", "frequency_penalty"),
    Field(
        "repetition_penalty",
        Number(0, 100, open_low=True),
        "the model's, or 1",
        "counts prompt and output tokens",
        "repetition_penalty",
    ),
    Field("logit_bias", TokenBias(Number(-100, 100), 300), "none", "token id -> added to its logit", "logit_bias"),
    Field(
        "seed", Integer(-INT64, INT64 - 1), "random", "same request and seed: same noise, whatever the batch", "seed"
    ),
    Field("n", Integer(1, 16), "1", "choices for each prompt, which is computed once", "n"),
    Field("min_tokens", Integer(0), "0", "no end token and no stop string before so many tokens", "min_tokens"),
    Field("ignore_eos", Boolean(), "false", "the model's end tokens do not end the output", "ignore_eos"),
    Field(
        "include_stop_str_in_output",
        Boolean(),
        "false",
        "keep the stop string, or the end token's text, in the output",
        "include_stop_str_in_output",
    ),
    Field("skip_special_tokens", Boolean(), "true", "leave special tokens out of the text", "skip_special_tokens"),
)

_COMMON = (
    Field("model", Text(1, 512), "the served model", "served name or alias; unknown: 404 model_not_found"),
    Field("max_tokens", Integer(1), "what the context leaves", "prompt and max_tokens must fit into the context"),
    *_SAMPLING,
    Field(
        "stop", OneOrMany(Items(Text(1, 256), 4)), "none", "up to 4 strings; matched on the answer's text, never shown"
    ),
    Field("stop_token_ids", Items(Integer(0), 64), "none", "tokens that end the output"),
    Field("stream", Boolean(), "false", "answer as server-sent events"),
    Field(
        "stream_options",
        Record((("include_usage", Boolean()), ("continuous_usage_stats", Boolean()))),
        "none",
        "usage in a last event, or (continuous_usage_stats too) in every event; needs stream",
    ),
    Field("response_format", ResponseFormat(), "text", "json_object, or json_schema: the content is bound to it"),
    Field(
        "structured_outputs",
        StructuredOutputs(),
        "none",
        "one of json (a schema), regex, choice (strings), grammar (EBNF): the content is bound to it",
    ),
    Field("priority", Integer(-(1 << 31), (1 << 31) - 1), "0", "lower runs first"),
    Field("cache_salt", Text(1, 128), "none", "requests share cached prompts only under the same salt"),
    Field("truncate_prompt_tokens", Integer(1), "none", "keep only the last so many tokens of the prompt"),
    Field("return_token_ids", Boolean(), "false", "ids of prompt and output in the answer"),
    Field("timeout", Number(0, 86400, open_low=True), "none", "seconds; then 504, or an error event in a stream"),
    Field("user", Text(), "none", "accepted, asks for nothing"),
    Field("metadata", Mapping(Text(0, 512), 16), "none", "accepted, asks for nothing"),
    Field("store", Only((False,), "unsupported_parameter"), "false", "nothing is stored"),
    Field("service_tier", Only(("auto",)), "auto", "there is one tier"),
)

CHAT = (
    Field("messages", Messages(MAX_MESSAGES), "", "the conversation; see below", required=True),
    *_COMMON,
    Field(
        "max_completion_tokens", Integer(1), "what the context leaves", "the same as max_tokens; not both, if different"
    ),
    Field("logprobs", Boolean(), "false", "log-probability of each token of the answer (not of the reasoning)"),
    Field("top_logprobs", Integer(0, 20), "0", "so many likeliest tokens at each place; needs logprobs"),
    Field(
        "chat_template_kwargs",
        Record((("enable_thinking", Boolean()),), code="unsupported_parameter"),
        "none",
        "enable_thinking: switches a hybrid model's thinking; 400 where the model can't do what is asked",
    ),
    Field(
        "reasoning_effort",
        OneOf(tuple(EFFORTS)),
        "the model's way",
        "none switches thinking off; minimal, low and medium are thinking budgets of 1024, 2048 and 8192 tokens",
    ),
    Field(
        "thinking_token_budget",
        Integer(1),
        "none",
        "reasoning that reaches so many tokens is closed with Qwen's own sentence, which counts as output",
    ),
    Field("tools", ToolList(), "none", "functions that the model may call, at most 128; shown by its own template"),
    Field("tool_choice", ToolChoice(), "auto", "none shows no tools; required or a function: the output is calls"),
    Field("parallel_tool_calls", Boolean(), "true", "false: the answer ends after its first call; needs tools"),
)

COMPLETIONS = (
    Field(
        "prompt",
        Prompts(MAX_PROMPTS),
        "",
        "a string, a list of strings, token ids or a list of lists of them; control tokens in a string count as such",
        required=True,
    ),
    *_COMMON,
    Field("logprobs", Integer(0, 5), "none", "log-probability of each token, and of so many likeliest ones"),
)

# Fields that OpenAI, vLLM or SGLang define and this server does not do.
# fmt: off
UNSUPPORTED = frozenset({
    "add_generation_prompt", "add_special_tokens", "allowed_token_ids", "audio", "bad_words", "best_of",
    "chat_template", "chat_template_kwargs", "continue_final_message", "documents", "early_stopping", "echo",
    "extra_body", "function_call", "functions", "guided_choice", "guided_grammar", "guided_json", "guided_regex",
    "include_reasoning", "kv_transfer_params", "length_penalty", "logits_processors", "max_completion_tokens",
    "mm_processor_kwargs", "modalities", "moderation", "parallel_tool_calls", "prediction", "prompt_cache_key",
    "prompt_cache_retention", "prompt_embeds", "prompt_logprobs", "reasoning", "reasoning_effort", "regex",
    "response_format", "safety_identifier", "spaces_between_special_tokens", "structured_outputs", "suffix",
    "thinking", "thinking_token_budget", "tool_choice", "tools", "top_logprobs", "use_beam_search", "verbosity",
    "web_search_options",
})
# fmt: on


def validate(fields: Iterable[Field], body: dict[str, Any]) -> dict[str, Any]:
    """Checked values by field name, only those that the client gave. Raises RequestError naming the first bad field."""
    by_name = {f.name: f for f in fields}
    values: dict[str, Any] = {}
    for name, value in body.items():
        field = by_name.get(name)
        if field is None:
            if value is None and name in UNSUPPORTED:
                continue
            raise _not_taken(name)
        if value is not None:
            values[name] = field.shape.check(value, name)
    for field in by_name.values():
        if field.required and field.name not in values:
            raise RequestError(f"{field.name} is missing", param=field.name, code="missing_field")
    return values


def sampling_values(fields: Iterable[Field], values: dict[str, Any]) -> dict[str, Any]:
    """Attributes of SamplingParams that the given fields set directly."""
    return {f.maps_to: values[f.name] for f in fields if f.maps_to and f.name in values}


def schema(fields: Iterable[Field]) -> dict[str, Any]:
    """The request body as JSON schema."""
    fields = tuple(fields)
    properties = {}
    for field in fields:
        described = {"description": field.doc, **field.shape.schema()}
        properties[field.name] = described if field.required else {"anyOf": [described, {"type": "null"}]}
    required = [f.name for f in fields if f.required]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _not_taken(name: str) -> RequestError:
    if name in UNSUPPORTED:
        message = f"{name} is not supported by this server"
        return RequestError(message, param=name, code="unsupported_parameter")
    return RequestError(f"unknown parameter {name[:64]!r}", param=name[:64], code="unknown_parameter")
