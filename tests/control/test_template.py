"""The chat template in its sandbox: equal to transformers' apply_chat_template, and nothing escapes or runs on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.text_fixture import GENERATION_PROMPTS, write_tokenizer
from tpqwen.config import EMBEDDED_MODEL
from tpqwen.errors import ConfigError, RequestError
from tpqwen.text.template import ChatTemplate
from tpqwen.text.tokenizer import Tokenizer

TOOL = {"type": "function", "function": {"name": "f", "description": "<b> & 'é'", "parameters": {"z": 1, "a": 2}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"z": 1, "a": "é<>"}}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Q"}],
    [{"role": "system", "content": "S"}, {"role": "user", "content": "Q\n\n<b>&"}],
    [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "reasoning_content": "R", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "1", "tool_call_id": "1"},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ],
    [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>\nR\n</think>\n\nHello, "}],
]


@pytest.fixture(scope="module", params=["embedded", *GENERATION_PROMPTS])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "embedded":
        return Path(EMBEDDED_MODEL)
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)


def test_equals_transformers(folder: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(folder, local_files_only=True), Tokenizer(folder)
    for messages in CONVERSATIONS:
        for options in ({}, {"enable_thinking": False}, {"tools": [TOOL]}, {"add_generation_prompt": False}):
            text = ours.render(messages, **options)
            expected = {"add_generation_prompt": True, **options}
            assert text == theirs.apply_chat_template(messages, tokenize=False, **expected)
            assert ours.encode(text) == theirs.apply_chat_template(messages, return_dict=False, **expected)
    continued = ours.render(CONVERSATIONS[-1], continue_final_message=True)
    assert continued == theirs.apply_chat_template(CONVERSATIONS[-1], tokenize=False, continue_final_message=True)
    assert continued.endswith("Hello, ")


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"eos_token": "<end>"})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{{ messages[7].content.x }}",
    ],
)
def test_what_the_template_may_not_do_refuses_the_messages(source: str) -> None:
    with pytest.raises(RequestError, match="refuses these messages"):
        template(source).render([{"role": "user", "content": "x"}])


def test_extras_of_transformers_are_there() -> None:
    source = "{% generation %}{{ eos_token }}{% endgeneration %}{{ strftime_now('%Y')|length }}"
    source += "{% for m in messages %}{% break %}{% endfor %}"
    assert template(source).render([{"role": "user", "content": "x"}]) == "<end>4"
    with pytest.raises(ConfigError, match="line 1"):
        template("{% if %}").render([])


def test_folder_decides_the_template(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    found = ChatTemplate.from_folder(tmp_path, {"chat_template": named, "eos_token": {"content": "<e>"}})
    assert found is not None and found.render([]) == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    found = ChatTemplate.from_folder(tmp_path, {"chat_template": "D"})
    assert found is not None and found.render([]) == "J"


def test_a_last_message_that_is_not_shown_cannot_be_continued() -> None:
    with pytest.raises(RequestError, match="not shown"):
        template("nothing").render([{"role": "assistant", "content": "x"}], continue_final_message=True)
    with pytest.raises(RequestError, match="FFFE"):
        template("x").render([{"role": "assistant", "content": "a\ufffe"}], continue_final_message=True)


def test_code_that_a_folder_names_is_not_run(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "model")
    marker = tmp_path / "marker"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass T: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer(folder).encode("x")
    assert not marker.exists()
