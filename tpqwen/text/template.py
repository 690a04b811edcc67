"""The chat template in a sandbox, rendered as transformers does; it comes from the folder of the model alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tpqwen.errors import ConfigError, RequestError

MARK = "\ufffe"  # a noncharacter of Unicode: where the last message ends, when it is to be continued
_REFUSED = (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)


class ChatTemplate:
    """variables: what the template may name besides its arguments, that is the tokenizer's special tokens."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self.source = source
        self._variables = variables

    @staticmethod
    def from_folder(folder: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
        """chat_template.jinja, else tokenizer_config.json's chat_template; None where there is neither."""
        path = folder / "chat_template.jinja"
        source = path.read_text(encoding="utf-8") if path.is_file() else tokenizer_config.get("chat_template")
        if isinstance(source, list):  # several named ones
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            source = named.get("default")
        variables = {}
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = tokenizer_config.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                variables[key] = token
        return ChatTemplate(source, variables) if isinstance(source, str) else None

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **options: Any,
    ) -> str:
        """The prompt as text. continue_final_message: it ends within the last message, whose text goes on.

        Raises RequestError when the template refuses the messages, ConfigError when it is no template.
        """
        if continue_final_message:
            if any(MARK in str(m.get("content")) for m in messages):
                raise _refused("a message holds the noncharacter U+FFFE")
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + MARK}]
            add_generation_prompt = False
        try:
            text = self._template.render(
                **{"tools": None, "documents": None, **self._variables, **options},
                messages=messages,
                add_generation_prompt=add_generation_prompt,
            )
        except _REFUSED as error:
            raise _refused(str(error)[:200]) from None
        if not continue_final_message:
            return text
        head, mark, _ = text.rpartition(MARK)
        if not mark:
            raise _refused("the last message is not shown, so it cannot be continued")
        return head

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template is no template: line {error.lineno}: {error.message}") from None


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks the assistant's words for training; here it does nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: Jinja's own filter sorts keys and escapes HTML, which is not what models were trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _refused(why: str) -> RequestError:
    text = f"the model's chat template refuses these messages: {why}"
    return RequestError(text, param="messages", code="invalid_value")
