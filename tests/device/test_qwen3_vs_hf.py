"""The model alone against transformers on one checkpoint on CPU: chunked prefill and decode over the cache."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from transformers import Qwen3ForCausalLM

from tests.tiny import dequantized, tiny_checkpoint
from tpqwen.kernels.context import PrefillRows, StepContext
from tpqwen.model.config import ModelConfig
from tpqwen.model.qwen3 import Qwen3, rope_table
from tpqwen.model.weights import load_weights
from tpqwen.parallel.group import TPGroup, join_group
from tpqwen.quant.schemes import INT8, NONE, Scheme
from tpqwen.worker.kv_cache import KVCache

CPU = torch.device("cpu")
BLOCK, BLOCKS_PER_ROW = 4, 12
WAIT_S = 120  # four fresh processes that import torch can be slow on a busy machine
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
SHAPES = {
    "tied_group1": {"tie_word_embeddings": True, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 515},
    "untied_group2": {"tie_word_embeddings": False, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
    "tied_group4_3layers": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "hidden_size": 128,
    },
    "untied_group8": {
        "tie_word_embeddings": False,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 128,
    },
}


def prompts(vocab_size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, vocab_size, (n,), generator=generator) for n in (23, 9, 40)]


class Rows:
    """Sequences over one cache, their blocks interleaved, driven by hand-made contexts."""

    def __init__(self, folder: Path, group: TPGroup, dtype: torch.dtype = torch.float32, scheme: Scheme = NONE) -> None:
        c = ModelConfig.from_folder(folder)
        with torch.device("meta"):
            self.model = Qwen3(c, group, scheme=scheme)
        load_weights(self.model, folder, device=CPU, dtype=dtype)
        self.group, self.vocab_size = group, c.vocab_size
        self.tables = torch.arange(1, 1 + 3 * BLOCKS_PER_ROW, dtype=torch.int32).view(BLOCKS_PER_ROW, 3).T.contiguous()
        self.cache = KVCache(
            num_layers=c.num_hidden_layers,
            num_blocks=1 + 3 * BLOCKS_PER_ROW,
            kv_heads=c.local_kv_heads(group.size),
            block_size=BLOCK,
            head_dim=c.head_dim,
            like=torch.empty(0, dtype=dtype),
        )
        self.cache.data.fill_(float("nan"))
        self.cos_sin = rope_table(c, BLOCK * BLOCKS_PER_ROW, CPU)

    def step(self, decode: list[tuple[int, int, int]], chunks: list[tuple[int, int, torch.Tensor]]) -> torch.Tensor:
        """decode: (row, position, id); chunks: (row, start, ids). Returns whole logits [T, vocabulary]."""
        row_T = [r for r, _, _ in decode] + [r for r, _, ids in chunks for _ in ids]
        positions = [p for _, p, _ in decode] + [s + i for _, s, ids in chunks for i in range(len(ids))]
        ids = torch.cat([torch.tensor([i for _, _, i in decode], dtype=torch.long), *(ids for _, _, ids in chunks)])
        slots = [int(self.tables[r, p // BLOCK]) * BLOCK + p % BLOCK for r, p in zip(row_T, positions, strict=True)]
        ctx = StepContext(
            positions_T=torch.tensor(positions, dtype=torch.int32),
            cache_slots_T=torch.tensor(slots),
            num_decode=len(decode),
            tables_SM=self.tables,
            decode_slots_B=torch.tensor([r for r, _, _ in decode], dtype=torch.int32),
            decode_lengths_B=torch.tensor([p + 1 for _, p, _ in decode], dtype=torch.int32),
            prefill=self.prefill_rows(chunks) if chunks else None,
            k_cache=self.cache.k,
            v_cache=self.cache.v,
            cos_sin=self.cos_sin,
        )
        local = self.model.logits(self.model(ids, ctx))
        return self.group.all_gather(local).movedim(0, 1).flatten(1)[:, : self.vocab_size]

    def prefill_rows(self, chunks: list[tuple[int, int, torch.Tensor]]) -> PrefillRows:
        lengths = [len(ids) for _, _, ids in chunks]
        ends = [start + len(ids) for _, start, ids in chunks]
        return PrefillRows(
            tables_CM=self.tables[[r for r, _, _ in chunks]],
            query_start=torch.tensor([0, *lengths]).cumsum(0).int(),
            lengths_C=torch.tensor(ends, dtype=torch.int32),
            num_query=tuple(lengths),
            num_context=tuple(ends),
        )


def in_chunks_then_decode(rows: Rows, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of every position: two fresh chunks, then a mixed step, then decode steps of all rows at once."""
    a, b, c = texts
    got = [torch.empty(len(t), rows.vocab_size) for t in texts]
    first = rows.step([], [(0, 0, a[:10]), (1, 0, b[:5])])
    got[0][:10], got[1][:5] = first[:10], first[10:]
    mixed = rows.step([(1, 5, int(b[5]))], [(0, 10, a[10:21]), (2, 0, c[:1])])
    got[1][5], got[0][10:21], got[2][0] = mixed[0], mixed[1:12], mixed[12]
    got[2][1:38] = rows.step([], [(2, 1, c[1:38])])
    for i in range(2):
        starts = (21 + i, 6 + i, 38 + i)
        out = rows.step([(r, p, int(texts[r][p])) for r, p in enumerate(starts)], [])
        for r, p in enumerate(starts):
            got[r][p] = out[r]
    got[1][8] = rows.step([(1, 8, int(b[8]))], [])[0]
    return got


def assert_equal_to(
    expected: list[torch.Tensor], rows: Rows, texts: list[torch.Tensor], tolerance: dict[str, float] = TOLERANCE
) -> None:
    for found, wanted in zip(in_chunks_then_decode(rows, texts), expected, strict=True):
        torch.testing.assert_close(found, wanted, **tolerance)


@pytest.fixture(scope="module", params=SHAPES)
def reference(request, tmp_path_factory) -> tuple[Path, list[torch.Tensor], list[torch.Tensor]]:
    folder = tiny_checkpoint(tmp_path_factory.mktemp(request.param), **SHAPES[request.param])
    return folder, *transformers_logits(folder)


@torch.inference_mode()
def transformers_logits(folder: Path) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    texts = prompts(model.config.vocab_size)
    return texts, [model(t[None]).logits[0] for t in texts]


@torch.inference_mode()
def test_logits_equal_transformers_in_chunks_and_in_decode(reference):
    folder, texts, expected = reference
    assert_equal_to(expected, Rows(folder, TPGroup.single()), texts)


@torch.inference_mode()
def test_logits_in_float16_are_those_of_float32_but_for_rounding(reference):
    """Logits reach 10, a step of float16 is 0.008 there: measured 0.01 to 0.05, and 0.13 to 0.31 in bfloat16."""
    folder, texts, expected = reference
    rows = Rows(folder, TPGroup.single(), torch.float16)
    assert {p.dtype for p in rows.model.parameters()} == {torch.float16}
    assert_equal_to(expected, rows, texts, {"atol": 0.1, "rtol": 0.0})


@torch.inference_mode()
def test_int8_logits_are_those_of_the_dequantized_weights(reference, tmp_path):
    folder, texts, _ = reference
    expected = in_chunks_then_decode(Rows(dequantized(folder, tmp_path / "wide"), TPGroup.single()), texts)
    rows = Rows(folder, TPGroup.single(), scheme=INT8)
    assert {p.dtype for p in rows.model.parameters()} == {torch.float32, torch.int8}
    assert_equal_to(expected, rows, texts)


def run_rank(rank: int, port: int, cases: list[tuple[str, list[torch.Tensor], list[torch.Tensor]]]) -> None:
    """One gloo rank over all checkpoints, at TP 2 and then at TP 4; a difference raises, and with it the test."""
    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=WAIT_S))
    for epoch, size in enumerate((2, 4)):
        if rank >= size:
            continue
        group = join_group(rank, size, store, epoch=epoch, device_type="cpu", timeout_s=WAIT_S)
        with torch.inference_mode():
            for folder, texts, expected in cases:
                assert_equal_to(expected, Rows(Path(folder), group), texts)
        group.barrier()
        group.leave()


def test_real_ranks_equal_transformers_also_above_the_kv_heads(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cases = []
    for name, shape in SHAPES.items():
        folder = tiny_checkpoint(tmp_path / name, **shape)
        cases.append((str(folder), *transformers_logits(folder)))
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = multiprocessing.start_processes(run_rank, (store.port, cases), 4, join=False, start_method="spawn")
    try:
        while not ranks.join(timeout=WAIT_S):
            pass
    finally:
        for process in ranks.processes:
            if process.is_alive():
                process.kill()
