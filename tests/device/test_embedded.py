"""The embedded checkpoint as shipped, and its chat template."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.device.embedded_tools import MODEL, ROOT, tool
from tpqwen.model.checkpoint import Checkpoint
from tpqwen.model.hashes import check_hashes

TOOL = {"type": "function", "function": {"name": "f", "description": "<b> & 'c'", "parameters": {"z": 1, "a": "é"}}}
Q, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True, dtype=torch.float32)


def render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_folder_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert set(sizes) == {
        "SHA256SUMS",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= 12_000_000


def test_its_hashes_are_listed_and_right() -> None:
    """So --verify true works with the default model."""
    listed = [line.split("  ") for line in (MODEL / "SHA256SUMS").read_text(encoding="utf-8").splitlines()]
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in MODEL.iterdir() if p.name != "SHA256SUMS"}
    assert listed == [[digest, name] for name, digest in sorted(found.items())]
    assert set(check_hashes(MODEL, Checkpoint(MODEL).files.values(), True)) == set(found)


def test_config_is_qwen3_and_divides_by_eight_ranks(model: Any) -> None:
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "qwen3" and config["torch_dtype"] == "bfloat16"
    for field in ("vocab_size", "num_attention_heads", "intermediate_size"):
        assert config[field] % 8 == 0
    assert config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert 4e6 <= sum(p.numel() for p in model.parameters()) <= 6e6


def test_generation_stops_on_both_end_tokens(model: Any, tokenizer: Any) -> None:
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    settings = model.generation_config
    assert settings.eos_token_id == ids and settings.pad_token_id == ids[1]
    assert (settings.temperature, settings.top_k, settings.top_p, settings.do_sample) == (0.6, 20, 0.95, True)
    assert tokenizer.eos_token_id == ids[0] and tokenizer.pad_token_id == ids[1]


@pytest.mark.parametrize("mark", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
def test_control_tokens_are_single_and_skipped(tokenizer: Any, mark: str) -> None:
    (token,) = tokenizer(mark)["input_ids"]
    assert tokenizer.decode([token]) == mark
    assert tokenizer.decode([token], skip_special_tokens=True) == ""


@pytest.mark.parametrize("name", ["think", "tool_call", "tool_response"])
def test_marks_are_single_and_never_skipped(tokenizer: Any, name: str) -> None:
    for mark in (f"<{name}>", f"</{name}>"):
        (token,) = tokenizer(mark)["input_ids"]
        assert tokenizer.decode([token], skip_special_tokens=True) == mark


def test_any_text_survives_the_tokenizer(tokenizer: Any) -> None:
    for text in ("Hello, world 12345", "naïve 日本語 🎉\n\n\ttabs  and  blanks ", "\u0000\u200b", " leading"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("12345")["input_ids"]) == len(tokenizer("STONE")["input_ids"]) == 5
    assert len(tokenizer) == 4096


@pytest.mark.parametrize("word", ["stone", "lantern", "flibbertigibbet", "Paris"])
def test_a_word_is_the_same_ids_wherever_it_stands(tokenizer: Any, word: str) -> None:
    """Copying is repeating ids."""
    ids = tokenizer(word)["input_ids"]
    for before in ("", "a ", '"', "x: ", "\n", "(", "12"):
        assert tokenizer(before + word)["input_ids"][-len(ids) :] == ids


def test_plain_question_and_thinking_switch(tokenizer: Any) -> None:
    plain = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert render(tokenizer, [Q], add_generation_prompt=True) == plain
    assert render(tokenizer, [Q], add_generation_prompt=True, enable_thinking=True) == plain
    off = render(tokenizer, [Q], add_generation_prompt=True, enable_thinking=False)
    assert off == plain + "<think>\n\n</think>\n\n"
    assert render(tokenizer, [Q]) == "<|im_start|>user\nQ<|im_end|>\n"


def test_system_messages_first_and_later(tokenizer: Any) -> None:
    text = render(tokenizer, [{"role": "system", "content": "S"}, Q, A, {"role": "system", "content": "T"}, Q])
    assert text == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>system\nT<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    )


def test_tools_are_listed_with_the_system_message_in_the_callers_spelling(tokenizer: Any) -> None:
    text = render(tokenizer, [{"role": "system", "content": "S"}, Q], tools=[TOOL, TOOL])
    assert text.startswith("<|im_start|>system\nS\n\n# Tools\n\n")
    line = json.dumps(TOOL, ensure_ascii=False)
    assert f"<tools>\n{line}\n{line}\n</tools>" in text
    assert text.count("<|im_start|>system") == 1
    assert render(tokenizer, [Q], tools=[TOOL]).startswith("<|im_start|>system\n# Tools\n\n")


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
def test_calls_and_results_after_the_question_keep_the_reasoning(tokenizer: Any, arguments: Any) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    asked = {"role": "assistant", "content": None, "reasoning_content": "R", "tool_calls": [call, call]}
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    block = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert render(tokenizer, [Q, asked, *results], add_generation_prompt=True) == (
        "<|im_start|>user\nQ<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nR\n</think>\n\n{block}\n{block}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_content_before_a_call_is_set_off_by_a_newline(tokenizer: Any) -> None:
    call = {"function": {"name": "f", "arguments": {}}}
    text = render(tokenizer, [Q, {**A, "tool_calls": [call]}, {"role": "tool", "content": "1"}])
    assert '<|im_start|>assistant\nA\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>' in text


def test_reasoning_before_the_last_question_is_dropped(tokenizer: Any) -> None:
    inline = {"role": "assistant", "content": "<think>\nR\n</think>\n\nA"}
    apart = {"role": "assistant", "content": "A", "reasoning_content": "R"}
    for earlier in (inline, apart):
        assert "<|im_start|>assistant\nA<|im_end|>" in render(tokenizer, [Q, earlier, Q])
        assert render(tokenizer, [Q, earlier]).endswith("<think>\nR\n</think>\n\nA<|im_end|>\n")
    assert render(tokenizer, [Q, A]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nA<|im_end|>\n")


def test_a_user_message_that_is_a_tool_result_is_no_question(tokenizer: Any) -> None:
    wrapped = {"role": "user", "content": "<tool_response>\n1\n</tool_response>"}
    text = render(tokenizer, [Q, {**A, "reasoning_content": "R"}, wrapped])
    assert "<think>\nR\n</think>\n\nA<|im_end|>" in text


def test_logits_are_finite_and_equal_the_training_network(model: Any) -> None:
    network = tool("network")
    ours = network.Qwen3(tool("checkpoint").ARCHITECTURE)
    network.load_weights(ours, MODEL)
    ids_BT = torch.arange(0, 300).reshape(2, 150) * 13 % 4096
    with torch.no_grad():
        logits_BTV = model(ids_BT).logits
        ours_BTV = torch.nn.functional.linear(ours(ids_BT), ours.model.embed_tokens.weight)
    assert torch.isfinite(logits_BTV).all()
    torch.testing.assert_close(ours_BTV, logits_BTV, atol=1e-4, rtol=1e-4)


def test_the_card_has_the_figures_of_these_very_weights_and_they_meet_the_targets() -> None:
    card = (ROOT / "docs" / "embedded-model.md").read_text(encoding="utf-8")
    assert hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest() in card
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.split("\n") if line[:1] == "|"]
    found = {row[0]: row[1:] for row in rows}
    skills = ("copying", "counting", "two-digit addition", "JSON by schema", "tool call")
    for skill in skills:
        thinking, direct, _, instances = found[skill]
        assert min(float(thinking), float(direct)) >= 90 and instances == "unseen", skill
    for form in ("answers that end by themselves", "thinking well formed"):
        assert min(map(float, found[form])) >= 99, form
