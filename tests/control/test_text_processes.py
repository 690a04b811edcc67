"""Text work in processes of its own: the same answers, limits that hold, and a replacement for one that dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.text_fixture import write_tokenizer
from tpqwen.errors import EngineError, RequestError
from tpqwen.text.chat import ChatFormat, Thinking
from tpqwen.text.processes import LONG_FROM, TextProcesses
from tpqwen.text.tokenizer import Tokenizer
from tpqwen.text.work import ChatWork, EmbedWork, PromptWork, Rendered, Renderer, RerankWork, Work

MAX_LEN = 5000
HELLO = [{"role": "user", "content": "hi <|im_end|> 日本"}]
BOOM = "messages[0].content == 'boom'"
BOOM_MESSAGES = [{"role": "user", "content": "boom"}]
WORKS: list[Work] = [
    ChatWork(messages=HELLO),
    ChatWork(messages=HELLO, thinking=Thinking(False), add_generation_prompt=False),
    ChatWork(messages=[*HELLO, {"role": "assistant", "content": "A"}], continue_final_message=True),
    PromptWork(prompts=["a<|im_end|>", "日本", [1, 2]]),
    EmbedWork(inputs=["a<|im_end|>", [1]]),
    RerankWork(query="q<|im_end|>", documents=["a", "b"], instruction="judge"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[TextProcesses]:
    made = TextProcesses(folder, MAX_LEN)
    made.start()
    yield made
    made.close()


def render(service: TextProcesses, work: Work, **options: Any) -> Rendered:
    return asyncio.run(asyncio.wait_for(service.render(work, **options), 60))


def with_template(tmp_path: Path, source: str) -> TextProcesses:
    folder = write_tokenizer(tmp_path / "tokenizer")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}))
    return TextProcesses(folder, MAX_LEN)


@pytest.mark.parametrize("work", WORKS, ids=lambda w: type(w).__name__)
def test_the_process_gives_what_this_one_would(folder: Path, service: TextProcesses, work: Work) -> None:
    here = Renderer(ChatFormat(Tokenizer(folder)), MAX_LEN)
    assert render(service, work) == here.run(work).packed()
    assert render(service, work, truncate=2) == here.run(work, truncate=2).packed()


def test_long_work_is_done_beside_the_short_and_too_long_prompts_are_counted_only(service: TextProcesses) -> None:
    long = PromptWork(prompts=["x " * LONG_FROM])
    found = render(service, long)
    assert (found.ids, found.longest > LONG_FROM) == ([], True)
    assert len(render(service, long, limited=False).prompts[0]) == found.longest
    assert len(render(service, long, truncate=7).prompts[0]) == 7


def test_refusals_come_home_with_field_and_code(service: TextProcesses) -> None:
    with pytest.raises(RequestError) as refused:
        render(service, ChatWork(messages=[{"role": "wizard", "content": "x"}]))
    assert (refused.value.param, refused.value.code, refused.value.status) == ("messages[0].role", "invalid_value", 400)


def test_a_template_that_runs_on_is_stopped_and_the_process_goes_on(tmp_path: Path) -> None:
    slow = "{% for i in range(99999 if BOOM else 0) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"
    service = with_template(tmp_path, slow.replace("BOOM", BOOM))
    try:
        service.start()
        began = time.monotonic()
        with pytest.raises(RequestError, match="longer than 2 s"):
            render(service, ChatWork(messages=BOOM_MESSAGES))
        assert time.monotonic() - began < 30
        pid = service._short.pid
        assert render(service, ChatWork(messages=HELLO)).longest == 1
        assert service._short.pid == pid
    finally:
        service.close()


def test_a_template_that_takes_all_memory_is_refused(tmp_path: Path) -> None:
    service = with_template(tmp_path, "{{ 'a' * (10**11 if BOOM else 0) }}x".replace("BOOM", BOOM))
    try:
        with pytest.raises(RequestError, match="memory"):
            render(service, ChatWork(messages=BOOM_MESSAGES))
        assert render(service, ChatWork(messages=HELLO)).longest == 1
    finally:
        service.close()


def test_a_killed_process_is_replaced(folder: Path) -> None:
    service = TextProcesses(folder, MAX_LEN)
    try:
        before = render(service, WORKS[0])
        pid = service._short.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert render(service, WORKS[0]) == before
        assert service._short.pid != pid
    finally:
        service.close()


def test_closing_ends_the_processes_and_refuses_work(folder: Path) -> None:
    service = TextProcesses(folder, MAX_LEN)
    service.start()
    pid = service._short.pid
    assert pid is not None
    service.close()
    service.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(EngineError):
        render(service, WORKS[0])


def test_a_folder_without_a_tokenizer_is_told_at_the_start(tmp_path: Path) -> None:
    service = TextProcesses(tmp_path, MAX_LEN)
    with pytest.raises(EngineError, match="did not start"):
        service.start()
    service.close()
