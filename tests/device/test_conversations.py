"""The whole HTTP path on the embedded model, greedy, equal to transformers' apply_chat_template and generate."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.device.local_app import with_app
from tpqwen.config import EMBEDDED_MODEL

NUM_CONVERSATIONS = 50
MAX_TOKENS = 40
QUESTIONS = [
    "Hello!",
    "What can you do?",
    "What is 17 + 25?",
    "Count from 3 to 12.",
    "Say the word 'lantern' twice.",
    "Who are you?",
    "Write one sentence about rain.",
    "Repeat: naïve café 日本 🎉",
    "Give me JSON with name Ada and age 36.",
    "   spaces   and\n\nlines\t",
]
SYSTEMS = [None, "You are brief.", "Answer in one word.\nNothing else."]


def conversations() -> list[tuple[list[dict[str, Any]], bool]]:
    """Varied in length, roles, thinking and what earlier turns hold."""
    random = Random(0)
    out = []
    for i in range(NUM_CONVERSATIONS):
        messages: list[dict[str, Any]] = []
        if system := SYSTEMS[i % 3]:
            messages.append({"role": "system", "content": system})
        for _ in range(random.randrange(3)):
            messages.append({"role": "user", "content": random.choice(QUESTIONS)})
            reply = {"role": "assistant", "content": random.choice(["Yes.", "42", "I see.\nGo on."])}
            if random.random() < 0.3:
                reply["reasoning_content"] = "Let me think."
            messages.append(reply)
        messages.append({"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]})
        out.append((messages, i % 2 == 0))
    return out


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    """All fifty at once through /v1/chat/completions."""

    async def ask(client: httpx.AsyncClient) -> list[dict[str, Any]]:
        async def one(messages: list[dict[str, Any]], thinking: bool) -> dict[str, Any]:
            body = {
                "messages": messages,
                "temperature": 0,
                "max_tokens": MAX_TOKENS,
                "return_token_ids": True,
                "chat_template_kwargs": {"enable_thinking": thinking},
            }
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        return list(await asyncio.gather(*(one(*c) for c in conversations())))

    return with_app(Path(EMBEDDED_MODEL), ask, dtype="float32", max_model_len=1024)


def test_fifty_conversations_equal_transformers(answers: list[dict[str, Any]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, local_files_only=True, dtype=torch.float32)
    kinds = set()
    for (messages, thinking), answer in zip(conversations(), answers, strict=True):
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=thinking, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            out = model.generate(
                **prompt,
                max_new_tokens=MAX_TOKENS,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,
            )
        length = prompt["input_ids"].shape[1]
        assert answer["prompt_token_ids"] == out[0, :length].tolist()
        choice = answer["choices"][0]
        assert choice["token_ids"] == out[0, length:].tolist(), messages
        assert_same_text(choice["message"], tokenizer.decode(out[0, length:], skip_special_tokens=True))
        kinds.add((thinking, choice["finish_reason"], "reasoning" in choice["message"]))
    assert {True, False} == {thinks for thinks, _, _ in kinds} == {reasons for _, _, reasons in kinds}
    assert {"stop", "length"} >= {reason for _, reason, _ in kinds}


def assert_same_text(message: dict[str, Any], text: str) -> None:
    """Reasoning and content are the decoded text, cut at the marks."""
    reasoning, mark, content = text.rpartition("</think>")
    if not mark and "<think>" in text:
        reasoning, content = text, ""
    assert (message.get("reasoning") or "") == reasoning.partition("<think>")[2].strip("\n")
    assert message["content"] == (content.lstrip("\n") if reasoning else content)
