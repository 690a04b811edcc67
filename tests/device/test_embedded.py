"""The embedded checkpoint as shipped, its chat template, and its training script on a few steps."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "tpqwen" / "embedded" / "model"
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
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(sizes.values()) <= 12_000_000


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
    assert len(tokenizer("12345")["input_ids"]) == 5
    assert len(tokenizer) == 4096


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


def tool(name: str) -> Any:
    """A module of the training script, which is no part of the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        return importlib.import_module(f"embedded.{name}")


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


def test_training_conversations_equal_what_transformers_renders(tokenizer: Any) -> None:
    corpus = tool("corpus")
    assert tool("checkpoint").TEMPLATE_FILE.read_bytes() == (MODEL / "chat_template.jinja").read_bytes()
    source = corpus.source_of(corpus.Material(MODEL, None, 1), "test")
    for skill in corpus.SKILLS:
        for thinking in (True, False):
            example = corpus.dressed(source, corpus.draw(source, skill))
            document = corpus.conversation(example, thinking)
            options = {"tools": example.tools, "enable_thinking": thinking}
            assert document.prompt == render(tokenizer, example.messages, add_generation_prompt=True, **options)
            reply = {"role": "assistant", "content": example.answer}
            if thinking:
                reply["reasoning_content"] = example.reasoning
            whole = render(tokenizer, [*example.messages, reply], **options)
            assert document.prompt + document.wanted + "\n" == whole


def test_held_out_instances_never_reach_the_training_data() -> None:
    corpus = tool("corpus")
    source = corpus.source_of(corpus.Material(MODEL, None, 1), "test")
    addition = next(skill for skill in corpus.SKILLS if skill.name == "two-digit addition")
    seen = {corpus.draw(source, addition).key for _ in range(3000)}
    unseen = {corpus.draw(source, addition, held_out=True).key for _ in range(100)}
    assert not seen & unseen


def test_training_script_learns_and_writes_a_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "train_embedded.py"), "train", "--out", str(tmp_path)]
    sizes = ["--steps", "8", "--step-tokens", "256", "--pass-tokens", "128", "--longest-row", "128"]
    limits = ["--tokenizer-documents", "3000", "--cases", "0", "--workers", "1", "--device", "cpu"]
    done = subprocess.run(
        command + sizes + limits, capture_output=True, text=True, timeout=240, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    losses = [loss for _, loss in report["run"]["losses"]]
    assert losses[-1] < losses[0] - 0.5
    assert report["run"]["steps"] == 8 and report["held_out_loss"]["answers"] < losses[0]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    assert written.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)) == 4096
