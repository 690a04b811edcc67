"""From skills and prose to packed rows of token ids.

A row is uint16: the id in the low bits, TARGET set where the loss counts (answers of conversations, all of plain text).
Rows start with a document and hold whole ones. A shard is a function of (seed, row length, its number) alone.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from embedded import prose, skills_chat, skills_json, skills_numbers, skills_stories, skills_text, skills_tools
from embedded.checkpoint import CONTEXT_TOKENS, chat_renderer, load_tokenizer
from embedded.example import HELD_OUT_SHARE, Example, Skill, Source
from embedded.words import JOBS, frequent_words

SKILLS: tuple[Skill, ...] = (
    *skills_chat.SKILLS,
    *skills_text.SKILLS,
    *skills_numbers.SKILLS,
    *skills_json.SKILLS,
    *skills_tools.SKILLS,
    *skills_stories.SKILLS,
)
PROSE_WEIGHT, PLAIN_STORY_WEIGHT = 2.0, 1.5  # beside the weights of SKILLS
TARGET = 0x8000
ROW_TOKENS = CONTEXT_TOKENS + 1
SHARD_TOKENS = 500_000
BATCH_DOCUMENTS = 256
OPEN_ROWS = 16  # a document goes into the first of them that has room
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are the embedded model of tpqwen.",
    "Answer briefly.",
    "Be polite.",
    "Be concise and clear.",
    "You are an assistant of few words.",
)
CHATTER = tuple(
    s for s in SKILLS if s.name in ("small talk", "two-digit addition", "counting", "little knowledge", "copying")
)


@dataclass(frozen=True)
class Material:
    """Where the texts come from. Without prose, stories take its place."""

    tokenizer: Path  # folder
    prose: Path | None
    seed: int


@dataclass(frozen=True)
class Document:
    """prompt carries no loss, completion and then spelt do; spelt is encoded character by character."""

    prompt: str
    completion: str
    spelt: str = ""
    end: str = ""

    @property
    def wanted(self) -> str:
        """All that should follow the prompt."""
        return self.completion + self.spelt + self.end


@functools.cache
def texts(path: Path | None) -> tuple[list[str], list[str], list[str]]:
    """(prose for training, held-out prose, words) of a file that prose.gather wrote."""
    if path is None:
        source = Source(random.Random(0))
        found = [skills_stories.plain_story(source) for _ in range(400)]
    else:
        found = [text for _, text in prose.load(path)]
    kept = [text for text in found if zlib.crc32(text.encode()) % HELD_OUT_SHARE]
    held = [text for text in found if zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0]
    return kept, held, frequent_words(kept)


def source_of(material: Material, stream: str, held_out: bool = False) -> Source:
    """A fresh source; stream names its random numbers."""
    kept, held, words = texts(material.prose)
    return Source(random.Random(f"{material.seed} {stream}"), words, held if held_out and held else kept)


def draw(source: Source, skill: Skill, held_out: bool = False, tries: int = 3000) -> Example | None:
    """An example of the wanted side of the split, or None if there seems to be none."""
    for _ in range(tries):
        example = skill.make(source)
        if example.held_out == held_out:
            return example
    return None


def system_prompt(source: Source) -> str:
    """A usual one, or any sentence: it must not matter."""
    odd = f"You are a {source.pick(source.words)} {source.pick(JOBS)}."
    return source.pick((source.pick(SYSTEM_PROMPTS), source.pick(SYSTEM_PROMPTS), odd, skills_text.sentence(source)))


def dressed(source: Source, example: Example) -> Example:
    """The example with a system prompt or earlier turns before it, now and then."""
    if example.alone:
        return example
    before: list[dict[str, Any]] = []
    if source.number(0, 3) == 0:
        before.append({"role": "system", "content": system_prompt(source)})
    if source.number(0, 5) == 0:
        for _ in range(source.number(1, 3)):
            earlier = draw(source, source.pick(CHATTER))
            if earlier:
                before += [*earlier.messages, {"role": "assistant", "content": earlier.answer}]
    return replace(example, messages=before + example.messages)


def conversation(example: Example, thinking: bool) -> Document:
    """The prompt as the server renders it and the completion that is wanted."""
    prompt = chat_renderer()(example.messages, example.tools, thinking)
    thought = f"<think>\n{example.reasoning}\n</think>\n\n" if thinking else ""
    if example.spelt:
        return Document(prompt, thought, example.answer, "<|im_end|>")
    return Document(prompt, thought + example.answer, end="<|im_end|>")


def documents(source: Source) -> Iterator[Document]:
    """An endless mix of conversations and plain text."""
    weights = [skill.weight for skill in SKILLS] + [PROSE_WEIGHT, PLAIN_STORY_WEIGHT]
    choices: list[Any] = [*SKILLS, "prose", "story"]
    while True:
        (choice,) = source.rng.choices(choices, weights)
        if isinstance(choice, Skill):
            example = draw(source, choice)
            if example:
                yield conversation(dressed(source, example), source.number(0, 1) == 0)
        else:
            text = source.pick(source.paragraphs) if choice == "prose" else skills_stories.plain_story(source)
            yield Document("", text, end="<|endoftext|>")


def tokenizer_texts(material: Material, number: int = 30_000) -> Iterator[str]:
    """Text for training the tokenizer: the training mix without control tokens and marks, then all prose."""
    source = source_of(material, "tokenizer")
    stream = documents(source)
    for _ in range(number):
        document = next(stream)
        text = document.prompt + document.completion
        for mark in (
            "<|im_start|>",
            "<|im_end|>",
            "<|endoftext|>",
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
        ):
            text = text.replace(mark, "")
        yield text.replace("<tool_response>", "").replace("</tool_response>", "")
    yield from source.paragraphs


def encoded(tokenizer: Any, batch: list[Document]) -> Iterator[np.ndarray]:
    """Ids with TARGET set on what is wanted. It is encoded apart from the prompt, as at inference."""
    prompts = tokenizer.encode_batch([d.prompt for d in batch])
    completions = tokenizer.encode_batch([d.completion for d in batch])
    for document, prompt, completion in zip(batch, prompts, completions, strict=True):
        single = [i for part in tokenizer.encode_batch(list(document.spelt)) for i in part.ids]
        ids = [*completion.ids, *single, tokenizer.token_to_id(document.end)]
        wanted = np.array(ids, dtype=np.uint16) | np.uint16(TARGET)
        yield np.concatenate([np.array(prompt.ids, dtype=np.uint16), wanted])


def packed(pieces: Iterable[np.ndarray], filler: int, num_tokens: int, row_tokens: int = ROW_TOKENS) -> np.ndarray:
    """Rows [R, row_tokens] until num_tokens or the end of pieces.

    Documents are whole unless they are longer than a row, which cuts them; filler pads the rest of a row.
    """
    rows: list[list[np.ndarray]] = []
    room: list[int] = []  # of the last OPEN_ROWS of rows
    for piece in pieces:
        part = piece[:row_tokens]
        at = next((i for i, free in enumerate(room) if free >= len(part)), None)
        if at is None:
            if (len(rows) + 1) * row_tokens > max(num_tokens, row_tokens):
                break
            rows.append([])
            room = [*room, row_tokens][-OPEN_ROWS:]
            at = len(room) - 1
        rows[len(rows) - len(room) + at].append(part)
        room[at] -= len(part)
    found = np.full((len(rows), row_tokens), filler, dtype=np.uint16)
    for row, parts in zip(found, rows, strict=True):
        joined = np.concatenate(parts)
        row[: len(joined)] = joined
    return found


def shard(material: Material, row_tokens: int, number: int) -> np.ndarray:
    """Rows [R, row_tokens] of shard number, about SHARD_TOKENS in all."""
    tokenizer = load_tokenizer(material.tokenizer)
    stream = documents(source_of(material, f"shard {row_tokens} {number}"))

    def pieces() -> Iterator[np.ndarray]:
        while True:
            yield from encoded(tokenizer, [next(stream) for _ in range(BATCH_DOCUMENTS)])

    return packed(pieces(), tokenizer.token_to_id("<|endoftext|>"), SHARD_TOKENS, row_tokens)


def held_out_rows(material: Material) -> tuple[np.ndarray, np.ndarray]:
    """(prose rows, conversation rows) that training never sees."""
    tokenizer = load_tokenizer(material.tokenizer)
    filler = tokenizer.token_to_id("<|endoftext|>")
    source = source_of(material, "held out", held_out=True)
    plain = [Document("", text, end="<|endoftext|>") for text in source.paragraphs[:200]]
    asked = []
    for skill in SKILLS:
        found = [draw(source, skill, held_out=True, tries=500) for _ in range(24)]
        asked += [conversation(e, i % 2 == 0) for i, e in enumerate(found) if e]
    source.rng.shuffle(asked)
    plain_rows, asked_rows = (packed(encoded(tokenizer, part), filler, 10**9) for part in (plain, asked))
    return plain_rows, asked_rows
