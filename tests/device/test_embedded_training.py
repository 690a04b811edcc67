"""The script that trains the embedded model: its data, its tokenizer's promises, and a run of a few steps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.device.embedded_tools import MODEL, ROOT, tool


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


def render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


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
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "model", check=True)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)) == 4096


def test_what_is_spelt_is_single_characters_and_the_same_text(tokenizer: Any) -> None:
    corpus, loaded = tool("corpus"), tool("checkpoint").load_tokenizer(MODEL)
    document = corpus.Document("Reverse: stone", "<think>\nx\n</think>\n\n", "enots é", "<|im_end|>")
    (ids,) = corpus.encoded(loaded, [document])
    wanted = [i & ~corpus.TARGET for i in ids.tolist() if i & corpus.TARGET]
    assert tokenizer.decode(wanted) == document.wanted
    assert [tokenizer.decode([i]) for i in wanted[-9:-3]] == list("enots ")


def test_packing_keeps_every_document_whole_and_wastes_little() -> None:
    corpus, rng = tool("corpus"), np.random.default_rng(0)
    pieces = [np.full(rng.integers(5, 200), i, dtype=np.uint16) for i in range(1, 900)]
    rows = corpus.packed(pieces, filler=0, num_tokens=10**9, row_tokens=300)
    assert rows.shape[1] == 300 and (rows == 0).mean() < 0.05
    for piece in pieces:
        at_row, at = (found[0] for found in np.nonzero(rows == piece[0]))
        assert (rows[at_row, at : at + len(piece)] == piece).all() and (rows == piece[0]).sum() == len(piece)
    (cut,) = corpus.packed([np.ones(400, dtype=np.uint16)], filler=0, num_tokens=10**9, row_tokens=300)
    assert (cut == 1).all()
    assert corpus.packed(iter(pieces), filler=0, num_tokens=3000, row_tokens=300).shape == (10, 300)


class SlowPool(Executor):
    """Makes shards of two rows that hold the shard's number, when it is told to."""

    def __init__(self) -> None:
        self.orders: list[tuple[int, Future[np.ndarray]]] = []

    def submit(self, work: Callable[..., Any], /, *given: Any, **options: Any) -> Future[Any]:
        future: Future[np.ndarray] = Future()
        self.orders.append((given[2], future))
        return future

    def finish(self, count: int) -> None:
        for number, future in self.orders[:count]:
            future.set_result(np.full((2, 9), number, dtype=np.uint16))
        del self.orders[:count]


def feed_of(pool: SlowPool, patient: bool) -> Any:
    return tool("feed").Feed(pool, tool("corpus").Material(MODEL, None, 1), 9, ahead=3, patient=patient)


def test_a_feed_gives_the_shards_in_order_and_keeps_some_in_the_making() -> None:
    pool = SlowPool()
    feed = feed_of(pool, patient=True)
    pool.finish(3)
    assert feed.rows(3)[:, 0].tolist() == [0, 0, 1]
    assert feed.rows(3)[:, 0].tolist() == [1, 2, 2]
    assert [number for number, _ in pool.orders] == [3, 4, 5]
    assert feed.new_tokens == 3 * 18


def test_an_impatient_feed_repeats_rows_rather_than_wait() -> None:
    pool = SlowPool()
    feed = feed_of(pool, patient=False)
    pool.finish(2)
    assert feed.rows(4)[:, 0].tolist() == [0, 0, 1, 1]
    assert set(feed.rows(4)[:, 0].tolist()) <= {0, 1}
    pool.finish(1)
    assert feed.rows(2)[:, 0].tolist() == [2, 2]
    assert feed.new_tokens == 3 * 18


def test_training_rows_depend_on_the_seed_and_the_shard_alone() -> None:
    corpus = tool("corpus")
    patch = pytest.MonkeyPatch()
    patch.setattr(corpus, "SHARD_TOKENS", 2000)
    try:
        material = corpus.Material(MODEL, None, 1)
        first = corpus.shard(material, 257, 0)
        assert (corpus.shard(material, 257, 0) == first).all()
        assert corpus.shard(material, 257, 1).tolist() != first.tolist()
        assert corpus.shard(corpus.Material(MODEL, None, 2), 257, 0).tolist() != first.tolist()
    finally:
        patch.undo()
