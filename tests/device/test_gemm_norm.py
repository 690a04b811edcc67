"""A norm shared by the products before and after it: against float64, with poisoned memory, and in a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.device.test_gemm_kernels import EPS, GEMV, assert_near, draw, exact_norm
from tests.tiny import tiny_checkpoint
from tpqwen.kernels import cuda, gemm, norm, ops, reference
from tpqwen.kernels.context import NormedProduct, PrefillRows, StepContext
from tpqwen.kernels.gemm_table import TABLE, Config, choose, spares_norm
from tpqwen.model.config import ModelConfig
from tpqwen.model.qwen3 import Qwen3, rope_table
from tpqwen.model.weights import load_weights
from tpqwen.parallel.group import TPGroup
from tpqwen.worker.kv_cache import KVCache

DOT = Config("dot", 32, 64, warps=4, stages=2, fuse_norm=False)
TILE = Config("tile", 32, 64, warps=4, stages=3, fuse_norm=False, block_m=32)
CASES = [
    (9, 128, 256, DOT, DOT),
    (16, 192, 256, DOT._replace(split=4), DOT._replace(split=3)),
    (5, 320, 192, DOT._replace(block_n=64), DOT._replace(split=5)),  # the last piece is half a tile
    (40, 192, 256, TILE._replace(block_n=48), DOT),
    (33, 128, 256, DOT._replace(split=2), TILE._replace(block_n=96)),
    (70, 320, 128, TILE._replace(block_n=96), TILE._replace(block_n=48)),
    (128, 64, 64, TILE._replace(block_n=48, block_m=64, warps=8), TILE._replace(block_m=64)),
]


class Poisoned(TorchFunctionMode):
    """Memory is NaN until somebody writes it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        unwritten = func in (torch.empty, torch.empty_like, torch.Tensor.new_empty)
        return result.fill_(torch.nan) if unwritten and result.is_floating_point() else result


@pytest.mark.parametrize(("rows", "hidden", "width", "config", "after"), CASES)
def test_products_that_share_a_norm_match_float64(
    rows: int, hidden: int, width: int, config: Config, after: Config, device: torch.device
) -> None:
    torch.manual_seed(rows + hidden)
    x, w = draw(rows, width, device=device), draw(hidden, width, device=device, scale=0.1)
    residual, scale = draw(rows, hidden, device=device, scale=30), draw(hidden, device=device) + 1
    w_after = draw(80, hidden, device=device, scale=0.1)
    gemm.workspace(x.device)
    with Poisoned():
        following = NormedProduct("norm", scale, w_after)
        h, scaled = gemm.linear_add_scaled(x, w, residual, None, following, configs=(config, after))
        assert scaled is not None
        out = gemm.norm_linear(h, scale, EPS, w_after, scaled=scaled, config=after)
        gated = gemm.norm_gate_up(h, scale, EPS, w_after, scaled=scaled, config=after)
    assert torch.equal(h, gemm.linear_add(x, w, residual, config=config))
    torch.testing.assert_close(scaled.values_TH, h * scale)
    torch.testing.assert_close(scaled.squares_PT.sum(0), h.float().square().sum(-1))
    exact = exact_norm(h, scale) @ w_after.double().T
    assert_near(out, exact, reference.norm_linear(h, scale, EPS, w_after))
    gate, up = exact.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    assert_near(gated, expected, reference.norm_gate_up(h, scale, EPS, w_after))
    in_place = residual.clone()
    h_too, again = gemm.linear_add_scaled(x, w, in_place, None, following, out_TH=in_place, configs=(config, after))
    assert again is not None and h_too is in_place and torch.equal(in_place, h)
    assert torch.equal(again.values_TH, scaled.values_TH) and torch.equal(again.squares_PT, scaled.squares_PT)


def test_rows_do_not_depend_on_their_neighbours(device: torch.device) -> None:
    x, w, residual = draw(16, 256, device=device), draw(128, 256, device=device), draw(16, 128, device=device)
    following = NormedProduct("norm", draw(128, device=device), draw(64, 128, device=device))

    def run(x: torch.Tensor) -> torch.Tensor:
        h, scaled = gemm.linear_add_scaled(x, w, residual, None, following, configs=(DOT, DOT))
        return gemm.norm_linear(h, following.norm_H, EPS, following.weight_OH, scaled=scaled, config=DOT)

    spoiled = x.clone()
    spoiled[1:] = torch.nan
    assert torch.equal(run(spoiled)[0], run(x)[0])


def test_a_norm_is_shared_only_where_both_products_can(device: torch.device) -> None:
    assert spares_norm(DOT, TILE, 1024) and spares_norm(TILE, DOT, 2048)
    assert not spares_norm(DOT, DOT, 4096), "measured: not faster"
    for other in (GEMV, Config("torch")):
        assert not spares_norm(DOT, other, 1024) and not spares_norm(other, DOT, 1024)
    assert spares_norm(DOT._replace(fuse_norm=True), DOT, 1024)
    assert not spares_norm(DOT, DOT._replace(fuse_norm=True), 1024), "it norms its rows itself"
    x, w, residual = draw(9, 256, device=device), draw(128, 256, device=device), draw(9, 128, device=device)
    following = NormedProduct("norm", draw(128, device=device), draw(64, 128, device=device))
    for pair in ((Config("torch"), DOT), (DOT, Config("torch"))):
        h, scaled = gemm.linear_add_scaled(x, w, residual, None, following, configs=pair)
        assert scaled is None and torch.equal(h, gemm.linear_add(x, w, residual, config=pair[0]))
    assert gemm.linear_add_scaled(x[:0], w, residual[:0], None, following)[1] is None
    int8 = torch.ones(128, 256, dtype=torch.int8, device=device)
    assert gemm.linear_add_scaled(x, int8, residual, torch.ones(128, device=device), following)[1] is None
    half, narrow = [t.half() for t in (x, w, residual)], NormedProduct("norm", *(t.half() for t in following[1:]))
    assert gemm.linear_add_scaled(*half, None, narrow, configs=(Config("torch"), DOT))[1] is None


def test_decode_steps_of_small_models_share_norms() -> None:
    for rows in (8, 16, 32, 64, 128, 192, 256):
        for pair in ((("add", 1024, 2048), ("silu", 6144, 1024)), (("add", 1024, 3072), ("norm", 4096, 1024))):
            first, second = (choose(operation, rows, *shape) for operation, *shape in pair)
            assert spares_norm(first, second, 1024)
    assert ("add", 1024, 2048, 2) in TABLE


@pytest.fixture
def triton_products(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU as well, in the interpreter; attention is the CPU's there."""
    if device.type == "cuda":
        return
    for name in ("norm_linear", "norm_gate_up", "linear_add", "linear_add_scaled"):
        op = cuda.OPERATIONS[name]
        monkeypatch.setattr(ops, name, lambda *args, op=op, invariant, **more: op(*args, **more))


class Pass:
    """One pass of a model over a prompt of 40 tokens."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        c = ModelConfig.from_folder(folder)
        with torch.device("meta"):
            self.model = Qwen3(c, TPGroup.single())
        load_weights(self.model, folder, device=device, dtype=dtype)
        shape = {"num_layers": c.num_hidden_layers, "num_blocks": 4, "block_size": 16}
        like = torch.empty(0, dtype=dtype, device=device)
        self.cache = KVCache(**shape, kv_heads=c.num_key_value_heads, head_dim=c.head_dim, like=like)
        ints = {"dtype": torch.int32, "device": device}
        none, table = torch.empty(0, **ints), torch.arange(1, 4, **ints)[None]
        starts, lengths = torch.tensor([0, 40], **ints), torch.tensor([40], **ints)
        self.ids = torch.arange(40, device=device) * 7 % c.vocab_size
        self.context = StepContext(
            positions_T=torch.arange(40, **ints),
            cache_slots_T=torch.arange(16, 56, device=device),
            num_decode=0,
            tables_SM=table,
            decode_slots_B=none,
            decode_lengths_B=none,
            prefill=PrefillRows(table, starts, lengths, (40,), (40,)),
            k_cache=self.cache.k,
            v_cache=self.cache.v,
            cos_sin=rope_table(c, 64, device),
        )

    def logits(self) -> torch.Tensor:
        with torch.inference_mode():
            return self.model.logits(self.model(self.ids, self.context)).double().cpu()


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each norm that is launched."""
    launched: list[int] = []

    def rms_norm(x_TH: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        launched.append(len(x_TH))
        return norm.rms_norm(x_TH, *args, **more)

    monkeypatch.setattr(gemm, "rms_norm", rms_norm)
    return launched


@pytest.mark.usefixtures("triton_products")
def test_a_model_norms_its_first_and_last_rows_only_and_is_as_exact_as_with_all_norms(
    tmp_path: Path, device: torch.device, norms: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(tmp_path, num_hidden_layers=3, hidden_size=128, intermediate_size=192, head_dim=64)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tried = Pass(folder, device, dtype)
    shared = tried.logits()
    assert norms == [40, 40], "before the first layer and before the head"
    norms.clear()
    monkeypatch.setattr(gemm, "spares_norm", lambda *args: False)
    apart = tried.logits()
    assert norms == [40] * 7
    monkeypatch.undo()
    exact = Pass(folder, torch.device("cpu"), torch.float32).logits()
    assert (shared - exact).norm() <= 1.1 * (apart - exact).norm() + 1e-5 * exact.norm()
