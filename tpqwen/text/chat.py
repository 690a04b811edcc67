"""Chat with a checkpoint: its variant, its rendered prompts as ids, and its sampling defaults.

Control tokens that a client writes inside a message stay plain text; only those of the template become ids.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tpqwen.errors import RequestError
from tpqwen.request import ThinkingBudget
from tpqwen.text.messages import normalise
from tpqwen.text.thinking import State, start_state
from tpqwen.text.tools import detect_format
from tpqwen.text.vocabulary import TURN_START, TextModel

_log = logging.getLogger(__name__)


class Variant(StrEnum):
    """Members of the Qwen3 family, told apart by what the chat template puts after `<|im_start|>assistant`."""

    HYBRID = "hybrid"  # nothing, or a closed thinking block when thinking is switched off
    THINKING = "thinking"  # always an open block
    FORCED = "non-thinking"  # always a closed block
    CODER = "coder"
    INSTRUCT = "instruct"
    BASE = "base"  # no template


_THINKS = {Variant.THINKING: True, Variant.FORCED: False, Variant.CODER: False, Variant.INSTRUCT: False}


@dataclass(frozen=True)
class SamplingDefaults:
    """Values for what a request leaves out. The class's own are "off"."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


_WHEN_THINKING = SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20)
_WHEN_ANSWERING = SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20)


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling values of the checkpoint's generation_config.json; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def over(self, other: SamplingDefaults) -> SamplingDefaults:
        """These values where given, `other`'s elsewhere."""
        given = {k: v for k, v in vars(self).items() if v is not None}
        return SamplingDefaults(**{**vars(other), **given})


CLOSING = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    "</think>\n\n"
)  # Qwen's own words for a thinking budget that is used up


@dataclass(frozen=True)
class Thinking:
    """What a request asks of the thinking. on None: the model's own way. field: the name for errors about `on`."""

    on: bool | None = None
    budget: int | None = None  # tokens
    field: str = "chat_template_kwargs.enable_thinking"


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation. start: where the output parser begins. thinking: the mode that the prompt asks for."""

    ids: list[int]
    start: State
    thinking: bool
    budget: ThinkingBudget | None = None


class ChatFormat:
    """Renders conversations for one checkpoint. Thread-safe after construction.

    variant None: detected by rendering a probe with thinking on and off (QWEN3's table of generation prompts).
    """

    def __init__(
        self,
        model: TextModel,
        generation: GenerationDefaults | None = None,
        variant: Variant | None = None,
    ) -> None:
        self.variant = variant or detect_variant(model)
        self.vocabulary = model.vocabulary
        self.model = model
        self.call_format = detect_format(model)
        generation = generation or GenerationDefaults()
        # A hybrid's generation_config.json holds the values of its thinking mode only, so they do not count without it.
        is_hybrid = self.variant is Variant.HYBRID
        self._defaults = {
            None: generation.over(SamplingDefaults()),
            True: generation.over(_WHEN_THINKING),
            False: _WHEN_ANSWERING if is_hybrid else generation.over(_WHEN_ANSWERING),
        }
        controls = sorted(self.vocabulary.control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, controls))) if controls else None
        special = {t for t, i in self.vocabulary.control.items() if i in self.vocabulary.special_ids}
        self._special = re.compile("|".join(map(re.escape, sorted(special)))) if special else None

    def prompt(
        self,
        messages: object,
        thinking: Thinking | bool | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> ChatPrompt:
        """Ids of the conversation with the generation prompt at its end.

        messages and tools as an OpenAI client sends them, the tools checked already. thinking None: the model's own
        way. continue_final_message: instead of a generation prompt, the assistant's last message stays open. Costs
        about as long as tokenizing: run it off the event loop. Raises RequestError naming the field.
        """
        if self.variant is Variant.BASE:
            raise RequestError(
                "this model has no chat template; use /v1/completions", param="messages", code="unsupported_parameter"
            )
        asked = thinking if isinstance(thinking, Thinking) else Thinking(thinking)
        fixed = _THINKS.get(self.variant)
        if fixed is not None and asked.on is not None and asked.on != fixed:
            raise RequestError(
                f"{asked.field}: this {self.variant} model {'always' if fixed else 'never'} thinks",
                param=asked.field,
                code="unsupported_value",
            )
        checked = normalise(messages)
        if continue_final_message:
            _check_continued(checked)
        ids = self._render(
            checked,
            list(tools),
            enable_thinking=True if asked.on is None else asked.on,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        start = start_state(self.vocabulary, ids)
        thinks = start is not State.CONTENT if fixed is None else fixed
        return ChatPrompt(ids, start, thinks, self._budget(asked.budget, start, thinks))

    def _budget(self, tokens: int | None, start: State, thinks: bool) -> ThinkingBudget | None:
        opening, closing = self.vocabulary.think_open, self.vocabulary.think_close
        if tokens is None:
            return None
        if not thinks or opening is None or closing is None:
            message = "thinking_token_budget: there is no thinking in this answer"
            raise RequestError(message, param="thinking_token_budget", code="unsupported_value")
        inside = start is State.REASONING
        return ThinkingBudget(tokens, inside, opening, closing, tuple(self.model.encode(CLOSING)))

    def defaults(self, thinking: bool | None = None) -> SamplingDefaults:
        """Sampling defaults by mode; thinking None is plain completion."""
        return self._defaults[thinking]

    def _render(self, messages: list[dict[str, Any]], tools: list[Mapping[str, Any]], **options: Any) -> list[int]:
        fence = self._fence_for([messages, tools])
        if tools:
            options["tools"] = tools
        if fence is None:
            return self.model.encode(self.model.render(messages, **options))
        fenced = [{k: _fenced(v, self._typed(m, k), fence) for k, v in m.items()} for m in messages]
        if tools:
            options["tools"] = _fenced(tools, self._control, fence)
        return self._encode_fenced(self.model.render(fenced, **options), fence)

    def _typed(self, message: dict[str, Any], key: str) -> re.Pattern[str] | None:
        """Control tokens that must stay text in this field. In an assistant's content the marks that are not special
        (<think>, <tool_call>, ...) are the model's own words given back: the template and the model read them."""
        if key == "content" and message["role"] == "assistant":
            return self._special
        return self._control

    def _fence_for(self, shown: list[Any]) -> tuple[str, str] | None:
        """Two characters that occur nowhere in messages and tools, or None when these hold no control token.

        They are noncharacters of Unicode. A text that uses all sixteen pairs is refused.
        """
        text = json.dumps(shown, ensure_ascii=False)
        if self._control is None or not self._control.search(text):
            return None
        for code in range(0xFDD0, 0xFDF0, 2):
            if chr(code) not in text and chr(code + 1) not in text:
                return chr(code), chr(code + 1)
        raise RequestError("the messages mix control tokens with noncharacters", param="messages", code="invalid_value")

    def _encode_fenced(self, text: str, fence: tuple[str, str]) -> list[int]:
        """Ids of rendered text in which a control token next to a fence is plain text.

        A tokenizer cuts its input at control tokens before anything else, so encoding the stretches between the real
        ones by themselves gives what encoding the whole would.
        """
        assert self._control is not None
        before, after = fence
        ids: list[int] = []
        start = 0
        for match in self._control.finditer(text):
            if text[match.start() - 1 : match.start()] == before or text[match.end() : match.end() + 1] == after:
                continue
            ids += self._plain(text[start : match.start()], fence)
            ids.append(self.vocabulary.control[match.group()])
            start = match.end()
        return ids + self._plain(text[start:], fence)

    def _plain(self, text: str, fence: tuple[str, str]) -> list[int]:
        return self.model.encode_plain(text.replace(fence[0], "").replace(fence[1], "")) if text else []


def _check_continued(messages: list[dict[str, Any]]) -> None:
    last = messages[-1]
    if last["role"] != "assistant" or not last["content"] or last.get("tool_calls"):
        raise RequestError(
            "continue_final_message needs an assistant message with content, and without tool calls, at the end",
            param="continue_final_message",
            code="invalid_value",
        )


def _fenced(value: Any, typed: re.Pattern[str] | None, fence: tuple[str, str]) -> Any:
    """A copy of value in which every control token in a string carries a fence.

    It stands behind an opening token and before a closing one, so that a template's startswith and endswith tests
    (`<tool_response>`) still hold.
    """
    if typed is None:
        return value
    if isinstance(value, str):
        before, after = fence
        return typed.sub(lambda m: before + m.group() if m.group().startswith("</") else m.group() + after, value)
    if isinstance(value, dict):
        return {_fenced(k, typed, fence): _fenced(v, typed, fence) for k, v in value.items()}
    if isinstance(value, list):
        return [_fenced(v, typed, fence) for v in value]
    return value


def detect_variant(model: TextModel) -> Variant:
    """Which Qwen3 this is, from the generation prompts of its template. Unknown forms count as instruct."""
    if not model.chat_template:
        return Variant.BASE
    probe = [{"role": "user", "content": "x"}]
    tails = [
        model.render(probe, enable_thinking=on).rpartition(f"{TURN_START}assistant\n")[2].strip()
        for on in (True, False)
    ]
    closed = "<think>\n\n</think>"
    if tails == ["<think>", "<think>"]:
        return Variant.THINKING
    if tails == [closed, closed]:
        return Variant.FORCED
    if tails == ["", closed]:
        return Variant.HYBRID
    if tails != ["", ""]:
        _log.warning("chat template ends in an unknown way, taken for an instruct model: %r", tails)
    return Variant.CODER if "<function=" in model.chat_template else Variant.INSTRUCT
