"""From skills and prose to packed rows of token ids.

A row is 2,049 uint16: the id in the low bits, TARGET set where the loss counts (answers of conversations, all of plain
text). Rows start with a document and hold whole ones. A shard is a function of (seed, its number) alone.
"""

from __future__ import annotations

import functools
import multiprocessing
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
PROSE_WEIGHT, PLAIN_STORY_WEIGHT = 2.5, 2.5  # beside the weights of SKILLS
TARGET = 0x8000
ROW_TOKENS = CONTEXT_TOKENS + 1
SHARD_TOKENS = 500_000
BATCH_DOCUMENTS = 256
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
    """prompt carries no loss, completion does."""

    prompt: str
    completion: str


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
    return Document(prompt, f"{thought}{example.answer}<|im_end|>")


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
            yield Document("", text + "<|endoftext|>")


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
    """Ids with TARGET set on completions. Prompt and completion are encoded apart, as at inference."""
    prompts = tokenizer.encode_batch([d.prompt for d in batch])
    completions = tokenizer.encode_batch([d.completion for d in batch])
    for prompt, completion in zip(prompts, completions, strict=True):
        wanted = np.array(completion.ids, dtype=np.uint16) | np.uint16(TARGET)
        yield np.concatenate([np.array(prompt.ids, dtype=np.uint16), wanted])[:ROW_TOKENS]


def packed(pieces: Iterable[np.ndarray], filler: int, num_tokens: int) -> np.ndarray:
    """Rows [R, ROW_TOKENS] of whole documents until num_tokens or the end of pieces; filler pads the rest of a row."""
    rows: list[np.ndarray] = []
    row, used = np.full(ROW_TOKENS, filler, dtype=np.uint16), 0
    for piece in pieces:
        if used + len(piece) > ROW_TOKENS:
            rows.append(row)
            row, used = np.full(ROW_TOKENS, filler, dtype=np.uint16), 0
            if len(rows) * ROW_TOKENS >= num_tokens:
                break
        row[used : used + len(piece)] = piece
        used += len(piece)
    return np.stack([*rows, row] if used else rows)


def shard(material: Material, number: int, num_tokens: int) -> np.ndarray:
    """Rows of one shard."""
    tokenizer = load_tokenizer(material.tokenizer)
    stream = documents(source_of(material, f"shard {number}"))

    def pieces() -> Iterator[np.ndarray]:
        while True:
            yield from encoded(tokenizer, [next(stream) for _ in range(min(BATCH_DOCUMENTS, 8 + num_tokens // 500))])

    return packed(pieces(), tokenizer.token_to_id("<|endoftext|>"), num_tokens)


def held_out_rows(material: Material) -> tuple[np.ndarray, np.ndarray]:
    """(prose rows, conversation rows) that training never sees."""
    tokenizer = load_tokenizer(material.tokenizer)
    filler = tokenizer.token_to_id("<|endoftext|>")
    source = source_of(material, "held out", held_out=True)
    plain = [Document("", text + "<|endoftext|>") for text in source.paragraphs[:120]]
    asked = []
    for skill in SKILLS:
        found = [draw(source, skill, held_out=True, tries=500) for _ in range(12)]
        asked += [conversation(e, i % 2 == 0) for i, e in enumerate(found) if e]
    source.rng.shuffle(asked)
    plain_rows, asked_rows = (packed(encoded(tokenizer, part), filler, 10**9) for part in (plain, asked))
    return plain_rows, asked_rows


def _shard_job(job: tuple[Material, int, int]) -> np.ndarray:
    return shard(*job)


def build(material: Material, num_tokens: int, workers: int) -> np.ndarray:
    """All training rows, about num_tokens, in an order that depends on the seed only."""
    number = max(1, round(num_tokens / SHARD_TOKENS))
    jobs = [(material, i, min(num_tokens, SHARD_TOKENS)) for i in range(number)]
    if workers <= 1:
        return np.concatenate([_shard_job(job) for job in jobs])
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return np.concatenate(list(pool.imap(_shard_job, jobs)))
