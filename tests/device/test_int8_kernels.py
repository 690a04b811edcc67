"""Products with int8 weights against float64: kernels, the way to cuBLAS, deterministic mode and the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.device.test_gemm_kernels import (
    CASES,
    DOT,
    EPS,
    GEMV,
    assert_near,
    draw,
    exact_norm,
    poisoned,
    relative_error,
)
from tpqwen.kernels import cpu, dequantize, gemm, invariant, ops, reference
from tpqwen.kernels.gemm_table import TABLE, Config, Numbers, choose, default_config, fit, shared_bytes
from tpqwen.quant.schemes import quantize

LARGE = [(100, 40, 192, DOT), (200, 72, 128, DOT._replace(block_n=64, split=2, fuse_norm=False))]
WRITTEN_OUT = [(7, 50, 192, Config("torch")), (260, 24, 100, Config("torch"))]


def drawn(rows: int, columns: int, *, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An int8 weight, its scales of very different sizes, and the weight that they mean, in float64."""
    rough = torch.randn(rows, columns) * torch.logspace(-2, 0, rows)[torch.randperm(rows), None]
    values, scale = (t.to(device) for t in quantize(rough))
    return values, scale, values.double() * scale.double()[:, None]


@pytest.mark.parametrize(("rows", "columns", "width", "config"), CASES + LARGE + WRITTEN_OUT)
def test_products_match_float64(rows: int, columns: int, width: int, config: Config, device: torch.device) -> None:
    torch.manual_seed(rows + columns)
    x, residual = draw(rows, width, device=device), draw(rows, columns, device=device)
    w, s, exact = drawn(columns, width, device=device)
    norm = draw(width, device=device) + 1
    out = gemm.linear(x, w, s, out_TO=poisoned(rows, columns, x), config=config)
    assert_near(out, x.double() @ exact.T, reference.linear(x, w, s))
    out = gemm.linear_add(x, w, residual, s, out_TH=poisoned(rows, columns, x), config=config)
    assert_near(out, residual.double() + x.double() @ exact.T, reference.linear_add(x, w, residual, s))
    out = gemm.norm_linear(x, norm, EPS, w, s, out_TO=poisoned(rows, columns, x), config=config)
    assert_near(out, exact_norm(x, norm) @ exact.T, reference.norm_linear(x, norm, EPS, w, s))


@pytest.mark.parametrize(("rows", "columns", "width", "config"), CASES + LARGE + WRITTEN_OUT)
def test_norm_gate_up_matches_float64(
    rows: int, columns: int, width: int, config: Config, device: torch.device
) -> None:
    torch.manual_seed(rows + columns)
    h, norm = draw(rows, width, device=device, scale=30), draw(width, device=device) + 1
    w, s, exact = drawn(2 * columns, width, device=device)
    gate, up = (exact_norm(h, norm) @ exact.T).chunk(2, dim=-1)
    out = gemm.norm_gate_up(h, norm, EPS, w, s, out_TI=poisoned(rows, columns, h), config=config)
    assert_near(out, torch.nn.functional.silu(gate) * up, reference.norm_gate_up(h, norm, EPS, w, s))


def test_split_products_repeat_exactly_and_leave_counters_at_zero(device: torch.device) -> None:
    x, (w, s, _) = draw(7, 512, device=device), drawn(64, 512, device=device)
    first, second = (gemm.linear(x, w, s, config=DOT._replace(split=8)) for _ in range(2))
    assert torch.equal(first, second)
    assert not gemm.workspace(x.device).arrived_N.any()


def test_rows_of_a_product_do_not_depend_on_their_neighbours(device: torch.device) -> None:
    x, (w, s, _) = draw(16, 256, device=device), drawn(64, 256, device=device)
    whole = gemm.linear(x, w, s, config=DOT)
    spoiled = x.clone()
    spoiled[1:] = torch.nan
    assert torch.equal(gemm.linear(spoiled, w, s, config=DOT)[0], whole[0])


def test_bf16_rows_go_through_the_gemv_kernel(device: torch.device) -> None:
    """The dot kernel sees bf16 on a GPU only, as in test_gemm_kernels.py."""
    h, (w, s, exact) = draw(2, 256, device=device, dtype=torch.bfloat16), drawn(48, 256, device=device)
    out = gemm.linear(h, w, s, config=GEMV)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, h.double() @ exact.T) < 5e-3


@pytest.mark.parametrize(("rows", "columns"), [(3, 64), (5, 100), (2, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_weight_is_written_out_as_the_reference_does(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> None:
    w, s, _ = drawn(rows, columns, device=device)
    out = torch.full((rows, columns), torch.nan, dtype=dtype, device=device)
    assert dequantize.dequantize(w, s, dtype, out_OI=out) is out
    torch.testing.assert_close(out, reference.dequantize(w, s, dtype), atol=0, rtol=1e-3)


@pytest.mark.usefixtures("dots_by_row")
@pytest.mark.parametrize(("columns", "width"), [(64, 128), (50, 96), (8, 200)])
def test_deterministic_products_do_not_depend_on_their_rows(columns: int, width: int, device: torch.device) -> None:
    torch.manual_seed(columns)
    x, before = draw(140, width, device=device), draw(140, columns, device=device)
    w, s, exact = drawn(columns, width, device=device)
    out, added = invariant.linear(x, w, s), invariant.linear_add(x, w, before.clone(), s)
    assert relative_error(out, x.double() @ exact.T) < 5e-3
    assert relative_error(added, before.double() + x.double() @ exact.T) < 5e-3
    for rows in (slice(0, 1), slice(130, 132), slice(5, 134)):
        assert torch.equal(invariant.linear(x[rows].clone(), w, s), out[rows])
        assert torch.equal(invariant.linear_add(x[rows].clone(), w, before[rows].clone(), s), added[rows])
    norm = draw(width, device=device) + 1
    gate_up = invariant.norm_gate_up(x[:9].clone(), norm, EPS, w, s)
    assert relative_error(gate_up, reference.norm_gate_up(x[:9].double(), norm.double(), EPS, exact)) < 1e-2


def double(op: Callable[..., torch.Tensor], *args: torch.Tensor | float) -> torch.Tensor:
    return op(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))


@pytest.mark.parametrize("converted", [100, 1 << 20])
@pytest.mark.parametrize(("rows", "width"), [(1, 96), (3, 96), (2, cpu.ONEDNN_FROM // 128)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_cpus_products_are_those_of_the_dequantized_weight(
    rows: int, width: int, converted: int, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "CONVERTED_ELEMENTS", converted * width // 96)
    torch.manual_seed(rows)
    h, norm, residual = torch.randn(rows, width), torch.rand(width) + 0.5, torch.randn(rows, 128)
    w, s, exact = drawn(128, width, device=torch.device("cpu"))
    mode = {"invariant": deterministic}
    tolerance = {"atol": 1e-4, "rtol": 1e-4}
    out = ops.linear(h, w, s, **mode).double()
    torch.testing.assert_close(out, double(reference.linear, h, exact), **tolerance)
    out = ops.linear_add(h, w, residual.clone(), s, **mode).double()
    torch.testing.assert_close(out, double(reference.linear_add, h, exact, residual), **tolerance)
    out = ops.norm_linear(h, norm, EPS, w, s, **mode).double()
    torch.testing.assert_close(out, double(reference.norm_linear, h, norm, EPS, exact), **tolerance)
    out = ops.norm_gate_up(h, norm, EPS, w, s, **mode).double()
    torch.testing.assert_close(out, double(reference.norm_gate_up, h, norm, EPS, exact), **tolerance)


@pytest.mark.parametrize("activations", [2, 4])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32, 64, 128, 200, 256])
def test_every_choice_covers_its_width_and_fits_workspace_and_shared_memory(rows: int, activations: int) -> None:
    numbers, scratch = Numbers(activations, 1), gemm.Workspace(torch.device("cpu"))
    shapes = [(2560, 9728), (5120, 25600), (1536, 5120), (64, 64), (5120, 8 * 192)]
    chosen = [(n, k, fit(default_config(rows, n, k, numbers), rows, k, numbers)) for n, k in shapes]
    assert all(config.path != "torch" for _, _, config in chosen), "what tensor cores can do is not written out"
    chosen += [(n, k, choose(op, rows, n, k, numbers)) for op, n, k, size in TABLE if size == 1]
    for weights, width, found in chosen:
        if found.path == "torch":
            continue
        assert width % (found.split * found.block_k) == 0 and found.block_k >= 64
        assert found.prefetch <= width // found.split
        assert found.path == "gemv" or 0 < shared_bytes(found, rows, numbers) <= 227 * 1024
        tiles = -(-weights // found.block_n)
        batch = max(16, 1 << (rows - 1).bit_length())
        assert found.split == 1 or scratch.fits(tiles, found.split, (found.block_n + 1) * batch)


def test_more_rows_stay_with_our_kernels_than_of_other_weights() -> None:
    int8 = Numbers(2, 1)
    assert choose("norm", 200, 6144, 4096).path == "torch"
    assert choose("norm", 256, 6144, 4096, int8).path == "dot"
    assert choose("norm", 257, 6144, 4096, int8).path == "torch"
    assert choose("silu", 1, 6144, 1024, int8).path == "gemv"
