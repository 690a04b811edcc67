"""Batch-invariant operations: every way through the model gives a token the same bits.

"kernels" are the Triton ones: bf16 on a GPU, fp32 in the interpreter. "cpu" are the CPU's, in both types.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tpqwen.kernels import cpu, invariant, reference
from tpqwen.kernels.context import PrefillRows, StepContext
from tpqwen.model.config import ModelConfig
from tpqwen.model.qwen3 import Qwen3, rope_table
from tpqwen.model.weights import random_weights
from tpqwen.parallel.group import TPGroup
from tpqwen.worker.kv_cache import KVCache

pytestmark = pytest.mark.usefixtures("dots_by_row")

EPS = 1e-6
BLOCK = 16
SMALL = {
    "model_type": "qwen3",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rms_norm_eps": EPS,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
QWEN3_06B = SMALL | {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
Chunk = tuple[int, int, int]  # sequence, first position, tokens


@dataclass
class Lab:
    """A random model, its cache, and sequences of random tokens whose passes are put together by hand."""

    model: Qwen3
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    lengths: list[int]
    heads_first: bool
    block_size: int = BLOCK
    ids: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.ids = [torch.randint(0, 128, (n,), generator=generator, dtype=torch.int32) for n in self.lengths]
        width = -(-max(self.lengths) // self.block_size)
        order = torch.randperm(len(self.lengths) * width, generator=generator) + 1
        self.tables = order.view(len(self.lengths), width).int()
        self.table = rope_table(self.config, max(self.lengths), self.device)

    def new_cache(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        c, blocks = self.config, self.tables.numel() + 1
        shape = {"kv_heads": c.num_key_value_heads, "block_size": self.block_size, "head_dim": c.head_dim}
        if self.heads_first:
            like = torch.empty(0, dtype=self.dtype)
            cache = KVCache(num_layers=c.num_hidden_layers, num_blocks=blocks, **shape, like=like)
            cache.data.fill_(torch.nan)
            return cache.k, cache.v
        data = torch.full((c.num_hidden_layers, 2, blocks, *shape.values()), torch.nan)
        data = data.to(self.device, self.dtype)
        return [layer[0] for layer in data], [layer[1] for layer in data]

    def logits(
        self, passes: list[tuple[list[tuple[int, int]], list[Chunk]]], padding: int = 0
    ) -> dict[tuple[int, int], torch.Tensor]:
        """Logits by (sequence, position) of passes, each over decode rows (sequence, position) and chunks. padding:
        rows, tokens and chunks of nobody beside them, as graphs have them."""
        caches = self.new_cache()
        found = {}
        for decode, chunks in passes:
            places = [*decode, *((s, p) for s, start, count in chunks for p in range(start, start + count))]
            ctx, ids = self.context(decode, chunks, caches, padding)
            rows = self.model.logits(self.model(ids.to(self.device), ctx))
            real = [*range(len(decode)), *range(len(decode) + padding, len(places) + padding)]
            found |= {place: rows[i].clone() for place, i in zip(places, real, strict=True)}
        return found

    def context(
        self, decode: list[tuple[int, int]], chunks: list[Chunk], caches: tuple[list[torch.Tensor], ...], padding: int
    ) -> tuple[StepContext, torch.Tensor]:
        size, extra = self.block_size, padding if chunks else 0
        rows: list[tuple[int, int]] = [*decode, *[(-1, 0)] * padding]
        rows += [(s, p) for s, start, count in chunks for p in range(start, start + count)] + [(-1, 0)] * extra

        def tensor(values: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        slots = [int(self.tables[s, p // size]) * size + p % size if s >= 0 else -1 for s, p in rows]
        ids = torch.tensor([int(self.ids[s][p]) if s >= 0 else 0 for s, p in rows])
        counts = [count for _, _, count in chunks] + [0] * extra
        lengths = [start + count for _, start, count in chunks] + [0] * extra
        tables = torch.cat([self.tables, torch.zeros_like(self.tables[:1])]).to(self.device)
        prefill = PrefillRows(
            tables_CM=tables[[s for s, _, _ in chunks] + [0] * extra],
            query_start=tensor([sum(counts[:i]) for i in range(len(counts) + 1)]),
            lengths_C=tensor(lengths),
            num_query=tuple(counts),
            num_context=tuple(lengths),
        )
        context = StepContext(
            positions_T=tensor([p for _, p in rows]),
            cache_slots_T=tensor(slots, torch.int64),
            num_decode=len(decode) + padding,
            tables_SM=tables,
            decode_slots_B=tensor([s for s, _ in decode] + [len(self.ids)] * padding),
            decode_lengths_B=tensor([p + 1 for _, p in decode] + [0] * padding),
            prefill=prefill if chunks else None,
            k_cache=caches[0],
            v_cache=caches[1],
            cos_sin=self.table,
        )
        return context, ids


def make_lab(folder: Path, shape: dict[str, object], lengths: list[int], *, kernels: bool, **options: object) -> Lab:
    device = torch.device("cuda" if kernels and torch.cuda.is_available() else "cpu")
    dtype = options.pop("dtype", torch.bfloat16 if device.type == "cuda" else torch.float32)
    (folder / "config.json").write_text(json.dumps(shape))
    config = ModelConfig.from_folder(folder)
    with torch.device("meta"):
        model = Qwen3(config, TPGroup.single(), invariant=True)
    random_weights(model, device=device, dtype=dtype, seed=0)
    return Lab(model, config, device, dtype, lengths, heads_first=not kernels, **options)


WAYS = ["kernels", "cpu-float32", "cpu-bfloat16"]


@pytest.fixture(params=WAYS)
def lab(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Sequences of 1 to 40 tokens, heads in groups of two; fewer for the interpreter, which is slow."""
    shape, lengths = SMALL, [40, 17, 16, 3, 1, 33]
    if request.param != "kernels":
        dtype = getattr(torch, request.param.removeprefix("cpu-"))
        return make_lab(tmp_path, shape, lengths, kernels=False, dtype=dtype)
    monkeypatch.setattr(invariant, "PART", BLOCK)
    if not torch.cuda.is_available():  # kernels in the interpreter see CPU tensors
        monkeypatch.setattr(cpu, "INVARIANT", invariant.OPERATIONS)
        shape, lengths = shape | {"num_hidden_layers": 1}, [17, 5, 1]
    return make_lab(tmp_path, shape, lengths, kernels=True)


def whole(lab: Lab) -> dict[tuple[int, int], torch.Tensor]:
    """Each sequence alone, its prompt in one pass."""
    return {k: v for s, n in enumerate(lab.lengths) for k, v in lab.logits([([], [(s, 0, n)])]).items()}


def assert_same_bits(found: dict[tuple[int, int], torch.Tensor], expected: dict[tuple[int, int], torch.Tensor]) -> None:
    assert found
    different = [place for place, row in found.items() if not torch.equal(row, expected[place])]
    assert not different, f"{len(different)} of {len(found)} rows differ, the first is {different[0]}"
    assert all(torch.isfinite(row).all() for row in found.values())


@torch.inference_mode()
def test_decode_rows_get_the_bits_of_a_prompt(lab: Lab) -> None:
    """Token by token, alone and among all sequences, with and without rows of padding."""
    expected = whole(lab)
    assert_same_bits(lab.logits([([(0, p)], []) for p in range(lab.lengths[0])]), expected)
    together = [([(s, p) for s, n in enumerate(lab.lengths) if p < n], []) for p in range(max(lab.lengths))]
    assert_same_bits(lab.logits(together), expected)
    if not lab.heads_first:
        assert_same_bits(lab.logits(together, padding=3), expected)


@pytest.mark.parametrize("size", [3, 16])
@torch.inference_mode()
def test_chunks_of_any_size_get_the_bits_of_a_prompt(lab: Lab, size: int) -> None:
    """All sequences' chunks side by side, then one sequence's beside the others' decode rows."""
    expected, longest = whole(lab), max(lab.lengths)
    chunks = [
        ([], [(s, p, min(size, n - p)) for s, n in enumerate(lab.lengths) if p < n]) for p in range(0, longest, size)
    ]
    assert_same_bits(lab.logits(chunks), expected)
    beside = [
        ([(1, i)] if i < lab.lengths[1] else [], [(0, p, min(size, lab.lengths[0] - p))])
        for i, p in enumerate(range(0, lab.lengths[0], size))
    ]
    assert_same_bits(lab.logits(beside), expected)
    if not lab.heads_first:
        assert_same_bits(lab.logits(beside, padding=2), expected)


@torch.inference_mode()
def test_a_prefix_that_another_pass_computed_gives_the_same_bits(lab: Lab) -> None:
    """The first blocks come by decode steps, the rest by a chunk that finds them, as after a prefix hit."""
    first = [([(0, p)], []) for p in range(BLOCK)]
    assert_same_bits(lab.logits([*first, ([], [(0, BLOCK, lab.lengths[0] - BLOCK)])]), whole(lab))


@torch.inference_mode()
def test_the_model_is_still_the_reference(lab: Lab) -> None:
    """The same model by plain torch: what differs is rounding."""
    expected = whole(lab)
    lab.model.invariant = False
    for module in lab.model.modules():
        module.invariant = False
    lab.heads_first = lab.device.type == "cpu"
    for place, row in whole(lab).items():
        torch.testing.assert_close(expected[place], row, atol=0.15 if lab.dtype == torch.bfloat16 else 1e-4, rtol=0.05)


def draw(*shape: int, device: torch.device) -> torch.Tensor:
    """bf16 on a GPU, fp32 in the interpreter, as in test_gemm_kernels.py."""
    return torch.randn(*shape).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


@pytest.mark.parametrize(("columns", "width"), [(64, 128), (50, 96), (200, 64), (8, 200)])
def test_products_do_not_depend_on_their_rows(columns: int, width: int, device: torch.device) -> None:
    """Fewer rows, other neighbours, NaN beside: the same bits; and the product is right."""
    torch.manual_seed(columns)
    x, w, before = (draw(*shape, device=device) for shape in ((300, width), (columns, width), (300, columns)))
    out = invariant.linear(x, w)
    added = invariant.linear_add(x, w, before.clone())
    exact = x.double() @ w.double().T
    scale = exact.norm()
    assert (out.double() - exact).norm() / scale < 5e-3
    assert (added.double() - exact - before.double()).norm() / scale < 5e-3
    for start, count in ((0, 1), (5, 1), (130, 2), (17, 64), (100, 129), (255, 45)):
        rows = slice(start, start + count)
        assert torch.equal(invariant.linear(x[rows].clone(), w), out[rows])
        assert torch.equal(invariant.linear_add(x[rows].clone(), w, before[rows].clone()), added[rows])
    spoiled = x.clone()
    spoiled[torch.arange(300) != 7] = torch.nan
    assert torch.equal(invariant.linear(spoiled, w)[7], out[7])


def test_norms_and_gates_are_the_references(device: torch.device) -> None:
    torch.manual_seed(3)
    h, norm, w = (draw(*shape, device=device) for shape in ((9, 128), (128,), (96, 128)))
    for op, name in ((invariant.norm_linear, "norm_linear"), (invariant.norm_gate_up, "norm_gate_up")):
        out, expected = op(h, norm, EPS, w), getattr(reference, name)(h, norm, EPS, w)
        torch.testing.assert_close(out, expected, atol=0.1 if h.dtype == torch.bfloat16 else 1e-4, rtol=0.02)
        assert torch.equal(op(h[4:5].clone(), norm, EPS, w), out[4:5])


@pytest.mark.parametrize("columns", [3, 320, 1001])
def test_rows_of_a_sum_of_exponentials_are_taken_one_by_one(columns: int, device: torch.device) -> None:
    logits = torch.randn(33, columns, device=device) * 5
    found = invariant.OPERATIONS["log_sum_exp"](logits)
    torch.testing.assert_close(found, reference.log_sum_exp(logits))
    for row in range(33):
        assert torch.equal(invariant.OPERATIONS["log_sum_exp"](logits[row : row + 1]), found[row : row + 1])


@pytest.mark.parametrize("copies", [1, 2])
def test_rows_taken_one_by_one_get_storage_and_calls_of_their_own(copies: int) -> None:
    seen: list[torch.Size] = []

    def op(x: torch.Tensor, factor: float, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(x.shape)
        x += 1.0
        return x * factor, y

    x, y = torch.arange(6.0).view(3, 2), torch.arange(3)
    product, same = reference.by_row(op, 0, 2, copies=copies)(x, 2.0, y)
    assert seen == [(copies, 2)] * 3
    assert torch.equal(product, (torch.arange(6.0).view(3, 2) + 1) * 2) and torch.equal(same, y)
    assert torch.equal(x, torch.arange(6.0).view(3, 2)), "the rows given to the operation are copies"


@pytest.mark.gpu
@pytest.mark.parametrize("part", [256, invariant.PART])
@torch.inference_mode()
def test_bf16_logits_of_a_06b_shape_over_batch_compositions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """Two layers of Qwen3-0.6B's shape: prompts whole, chunked and decoded; 1, 7 and 64 sequences side by side."""
    monkeypatch.setattr(invariant, "PART", part)
    longest = 1500
    lengths = [longest, 129, 64, 1, *range(40, 100)]
    lab = make_lab(tmp_path, QWEN3_06B, lengths, kernels=True, block_size=64)
    expected = whole(lab)
    for count in (7, 64):
        together = [(s, 0, n) for s, n in enumerate(lengths[:count])]
        assert_same_bits(lab.logits([([], together)], padding=2), expected)
    for size in (50, 100, 512):
        starts = enumerate(range(0, longest, size))
        chunks = [([(1, i)] if i < 129 else [], [(0, p, min(size, longest - p))]) for i, p in starts]
        assert_same_bits(lab.logits(chunks), expected)
    decode = [([(s, p) for s, n in enumerate(lengths) if p < n], []) for p in range(99)]
    assert_same_bits(lab.logits(decode), expected)
    assert_same_bits(lab.logits(decode, padding=5), expected)
    late = [([(0, p)], []) for p in range(1000, 1060)]
    assert_same_bits(lab.logits([([], [(0, 0, 1000)]), *late]), expected)
