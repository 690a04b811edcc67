"""Every request parameter, once: validation, translation, documentation and the schema all read these tables.

A field that is in the table of its endpoint acts; any other is refused with a 400 that names it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tpqwen.api.formats import ResponseFormat, StructuredOutputs
from tpqwen.api.shapes import (
    AnyObject,
    Boolean,
    Either,
    Integer,
    Items,
    Mapping,
    Messages,
    Number,
    Objects,
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
from tpqwen.text.sequences import RANGES

MAX_PROMPTS = 64
MAX_INPUTS = 256  # of one embeddings or rerank request
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

    null is the same as leaving the field out, unless it is required. says: type and range in words, where the schema's
    own words would be too many.
    """

    name: str
    shape: Shape
    default: str
    doc: str
    maps_to: str = ""
    required: bool = False
    says: str = ""


class Table(tuple[Field, ...]):
    """The fields of one endpoint, in the order in which they are shown; what every request asks of it is found once."""

    def __new__(cls, *fields: Field) -> Table:
        return super().__new__(cls, fields)

    @cached_property
    def by_name(self) -> dict[str, Field]:
        return {f.name: f for f in self}

    @cached_property
    def required(self) -> list[str]:
        return [f.name for f in self if f.required]

    @cached_property
    def mapped(self) -> list[tuple[str, str]]:
        """(field, attribute of SamplingParams) where one becomes the other as it is."""
        return [(f.name, f.maps_to) for f in self if f.maps_to]


_ROOM = "what the context leaves"
_SAMPLING = (
    Field("temperature", Number(*RANGES["temperature"]), "by mode", "0 (or below 1e-5) is greedy", "temperature"),
    Field("top_p", Number(*RANGES["top_p"]), "by mode", "smallest set of tokens with this much probability", "top_p"),
    Field("top_k", Integer(-1, 1 << 30), "by mode", "the k likeliest tokens; 0 and -1 are off"),
    Field("min_p", Number(*RANGES["min_p"]), "0", "tokens at least this fraction as likely as the likeliest", "min_p"),
    Field("presence_penalty", Number(*RANGES["presence_penalty"]), "0", "counts output tokens", "presence_penalty"),
    Field("frequency_penalty", Number(*RANGES["frequency_penalty"]), "0", "counts output tokens", "frequency_penalty"),
    Field(
        "repetition_penalty",
        Number(*RANGES["repetition_penalty"]),
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

_MODEL = Field("model", Text(1, 512), "the served model", "its served name; another: 404 model_not_found")

_COMMON = (
    _MODEL,
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
    Field(
        "prompt_logprobs",
        Integer(0, 20),
        "none",
        "log-probability of each prompt token but the first, and of so many likeliest ones; not in a stream",
        "prompt_logprobs",
    ),
    Field("truncate_prompt_tokens", Integer(1), "none", "keep only the last so many tokens of the prompt"),
    Field("return_token_ids", Boolean(), "false", "ids of prompt and output in the answer"),
    Field("timeout", Number(0, 86400, open_low=True), "none", "seconds; then 504, or an error event in a stream"),
    Field("user", Text(), "none", "accepted, asks for nothing"),
    Field("metadata", Mapping(Text(0, 512), 16), "none", "accepted, asks for nothing"),
    Field("store", Only((False,), "unsupported_parameter"), "false", "nothing is stored"),
    Field("service_tier", Only(("auto",)), "auto", "there is one tier"),
)

CHAT = Table(
    Field(
        "messages",
        Messages(MAX_MESSAGES),
        "",
        "the conversation; see below",
        required=True,
        says=f"1..{MAX_MESSAGES} messages",
    ),
    *_COMMON,
    Field("max_tokens", Integer(1), _ROOM, "prompt and max_tokens must fit into the context"),
    Field("max_completion_tokens", Integer(1), _ROOM, "the same as max_tokens; not both, if different"),
    Field("logprobs", Boolean(), "false", "log-probability of each token of the answer (not of the reasoning)"),
    Field("top_logprobs", Integer(0, 20), "0", "so many likeliest tokens at each place; needs logprobs"),
    Field(
        "chat_template_kwargs",
        Record((("enable_thinking", Boolean()),), code="unsupported_parameter"),
        "none",
        "enable_thinking: switches a hybrid model's thinking; 400 where the model can't do what is asked",
    ),
    Field(
        "add_generation_prompt",
        Boolean(),
        "true",
        "false: the prompt ends with the last message, and no assistant turn is opened",
    ),
    Field(
        "continue_final_message",
        Boolean(),
        "false",
        "the answer goes on where the last message, the assistant's, ends; not with add_generation_prompt: true",
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

COMPLETIONS = Table(
    Field(
        "prompt",
        Prompts(MAX_PROMPTS),
        "",
        "control tokens written in a string count as such",
        required=True,
        says="string, or list of strings, of ids or of lists of ids; at most 64 prompts",
    ),
    *_COMMON,
    Field(
        "max_tokens",
        Integer(0),
        _ROOM,
        "prompt and max_tokens must fit into the context; 0 with echo only",
    ),
    Field("best_of", Integer(1, 16), "n", "the same as n; candidates beyond n are not drawn"),
    Field(
        "echo",
        Boolean(),
        "false",
        "the text begins with the prompt; with logprobs its tokens are scored as well",
    ),
    Field("logprobs", Integer(0, 5), "none", "log-probability of each token, and of so many likeliest ones"),
)


_STREAM = next(f for f in _COMMON if f.name == "stream")
_SILENT = tuple(f for f in _COMMON if f.name in ("user", "metadata", "store", "service_tier"))
_EITHER = {name: next(f for f in _SAMPLING if f.name == name) for name in ("temperature", "top_p", "top_k")}
_ITEMS = ("message", "function_call", "function_call_output", "reasoning")
_FORMAT = (
    ("type", OneOf(("text", "json_object", "json_schema"))),
    ("name", Text()),
    ("description", Text()),
    ("schema", AnyObject()),
    ("strict", Boolean()),
)

RESPONSES = Table(
    Field(
        "input",
        Either(Objects(MAX_MESSAGES, _ITEMS, 1)),
        "",
        "a user's text, or items: messages, function calls and their outputs, reasoning",
        required=True,
        says=f"string, or 1..{MAX_MESSAGES} items",
    ),
    _MODEL,
    Field("instructions", Text(), "none", "a system message before the input"),
    Field("max_output_tokens", Integer(1), _ROOM, "input and output must fit into the context; reasoning counts"),
    _EITHER["temperature"],
    _EITHER["top_p"],
    _STREAM,
    Field("tools", Objects(128), "none", "functions that the model may call", says="up to 128 functions"),
    Field(
        "tool_choice",
        Either(AnyObject()),
        "auto",
        "none, auto, required, or a function",
        says='word, or `{"type": "function", "name"}`',
    ),
    Field("parallel_tool_calls", Boolean(), "true", "false: at most one call"),
    Field(
        "text",
        Record((("format", Record(_FORMAT, required=("type",))),)),
        "text",
        "format: as chat's response_format, with name, schema and strict beside type",
        says="object: `format`",
    ),
    Field(
        "reasoning",
        Record((("effort", Text(1, 16)), ("summary", Only(("auto",))))),
        "the model's way",
        "effort none switches a hybrid model's thinking off; else as chat's reasoning_effort",
    ),
    Field(
        "include",
        Items(Only(("message.output_text.logprobs",)), 1),
        "none",
        "message.output_text.logprobs: log-probability of each token of the text",
    ),
    Field("top_logprobs", Integer(0, 20), "0", "so many likeliest tokens at each place; needs include"),
    Field("truncation", Only(("disabled",)), "disabled", "an input that is too long is refused"),
    *_SILENT,
)

_OUTPUT = Record((("type", Only(("json_schema",))), ("schema", AnyObject())), required=("type", "schema"))

COUNT_TOKENS = Table(
    Field(
        "messages",
        Objects(MAX_MESSAGES, (), 1),
        "",
        "user and assistant turns: text, thinking, tool_use, tool_result. A last assistant turn is continued",
        required=True,
        says=f"1..{MAX_MESSAGES} messages",
    ),
    _MODEL,
    Field("system", Either(Objects(64, ("text",))), "none", "a system message", says="string, or text blocks"),
    Field("tools", Objects(128), "none", "custom tools that the model may use", says="up to 128 tools"),
    Field(
        "tool_choice",
        Record(
            (
                ("type", OneOf(("auto", "any", "tool", "none"))),
                ("name", Text(1, 64)),
                ("disable_parallel_tool_use", Boolean()),
            ),
            required=("type",),
        ),
        "auto",
        "whether a tool must be used, and which",
    ),
    Field(
        "thinking",
        Record((("type", OneOf(("enabled", "disabled", "adaptive"))), ("budget_tokens", Integer(1))), ("type",)),
        "the model's way",
        "enabled needs budget_tokens; 400 where the model can't do what is asked",
    ),
    Field(
        "output_config",
        Record((("effort", Text(1, 16)), ("format", _OUTPUT))),
        "none",
        "effort: as chat's reasoning_effort; format: the answer is JSON of this schema",
        says="object: `effort`, `format`",
    ),
)

MESSAGES = Table(
    *COUNT_TOKENS,
    Field("max_tokens", Integer(1), "", "prompt and max_tokens must fit into the context", required=True),
    _EITHER["temperature"],
    _EITHER["top_p"],
    _EITHER["top_k"],
    Field("stop_sequences", Items(Text(1, 256), 4), "none", "matched on the answer's text, never shown"),
    _STREAM,
    Field("metadata", Record((("user_id", Text()),)), "none", "accepted, asks for nothing"),
    Field("service_tier", Only(("auto", "standard_only")), "auto", "there is one tier"),
)

_POOLED = tuple(f for f in _COMMON if f.name in ("priority", "cache_salt", "timeout", "user"))

EMBEDDINGS = Table(
    Field(
        "input",
        Prompts(MAX_INPUTS),
        "",
        "control tokens written in a string stay text; the end token is added",
        required=True,
        says=f"string, or list of strings, of ids or of lists of ids; at most {MAX_INPUTS} inputs",
    ),
    _MODEL,
    Field("encoding_format", OneOf(("float", "base64")), "float", "base64: little-endian float32"),
    Field("dimensions", Integer(1, 1 << 16), "all", "keep so many numbers, then normalise"),
    *(f for f in _COMMON if f.name == "truncate_prompt_tokens"),
    *_POOLED,
)

RERANK = Table(
    Field("query", Text(1), "", "what is asked for", required=True),
    Field(
        "documents",
        Items(Either(Record((("text", Text()),), required=("text",))), MAX_INPUTS, 1),
        "",
        "what may answer it; one that is too long is cut at its end",
        required=True,
        says=f"1..{MAX_INPUTS} strings, or objects with `text`",
    ),
    _MODEL,
    Field("instruction", Text(), "web search", "how the model is told to judge"),
    Field("top_n", Integer(1), "all", "only the best so many"),
    Field("return_documents", Boolean(), "true", "the documents' text in the results"),
    *_POOLED,
)

TOKENIZE_CHAT = tuple(
    f
    for f in CHAT
    if f.name
    in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "reasoning_effort", "tools")
)

TOKENIZE = Table(
    _MODEL,
    Field("prompt", Text(), "none", "text; control tokens in it count as such. Either this or messages"),
    Field(
        "messages",
        Messages(MAX_MESSAGES),
        "none",
        "a conversation, as in chat completions",
        says=f"1..{MAX_MESSAGES} messages",
    ),
    *TOKENIZE_CHAT,
    Field("return_token_strs", Boolean(), "false", "the tokens as text too"),
)

DETOKENIZE = Table(
    _MODEL,
    Field("tokens", Items(Integer(0), 1 << 20), "", "token ids", required=True),
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
    "web_search_options", "background", "container", "context_management", "conversation", "max_tool_calls",
    "mcp_servers", "previous_response_id",
})
# fmt: on


def validate(table: Table, body: dict[str, Any]) -> dict[str, Any]:
    """Checked values by field name, only those that the client gave. Raises RequestError naming the first bad field."""
    by_name = table.by_name
    values: dict[str, Any] = {}
    for name, value in body.items():
        field = by_name.get(name)
        if field is None:
            if value is None and name in UNSUPPORTED:
                continue
            raise _not_taken(name)
        if value is not None:
            values[name] = field.shape.check(value, name)
    for name in table.required:
        if name not in values:
            raise RequestError(f"{name} is missing", param=name, code="missing_field")
    return values


def sampling_values(table: Table, values: dict[str, Any]) -> dict[str, Any]:
    """Attributes of SamplingParams that the given fields set directly."""
    return {attribute: values[name] for name, attribute in table.mapped if name in values}


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
