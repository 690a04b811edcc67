"""Matrix-product and norm kernels against float64, with fresh random inputs and poisoned outputs."""

from __future__ import annotations

import pytest
import torch

from tpqwen.kernels import gemm, norm, reference
from tpqwen.kernels.gemm_table import TABLE, Config, Numbers, choose, default_config, fit, shared_bytes

EPS = 1e-6
GEMV = Config("gemv", 4, 128, warps=4, stages=2)
DOT = Config("dot", 32, 64, warps=4, stages=2)
TILE = Config("tile", 32, 64, warps=4, stages=3, fuse_norm=False, block_m=32)


def draw(*shape: int, device: torch.device, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
    """bf16 on a GPU. fp32 in the interpreter, which cuts to bf16 where the GPU rounds: every error would be biased."""
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return (torch.randn(*shape) * scale).to(device=device, dtype=dtype)


def poisoned(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    return torch.full((rows, columns), torch.nan, dtype=like.dtype, device=like.device)


def relative_error(out: torch.Tensor, exact: torch.Tensor) -> float:
    return float((out.double() - exact).norm() / exact.norm())


def exact_norm(h_TH: torch.Tensor, norm_H: torch.Tensor) -> torch.Tensor:
    wide = h_TH.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * norm_H.double()


def assert_near(out: torch.Tensor, exact: torch.Tensor, unfused: torch.Tensor) -> None:
    """The kernel may be no further from float64 than the plain path in the same dtype, give or take a little."""
    assert relative_error(out, exact) <= 1.1 * relative_error(unfused, exact) + 1e-6


CASES = [
    (1, 96, 256, GEMV),
    (1, 50, 192, GEMV),
    (1, 8, 320, GEMV._replace(block_n=2, stages=1)),
    (3, 24, 128, GEMV),
    (1, 40, 256, DOT),
    (5, 96, 256, DOT._replace(split=2)),
    (16, 72, 320, DOT),
    (33, 64, 384, DOT._replace(block_n=64, split=3, fuse_norm=False)),
    (64, 50, 256, DOT._replace(block_k=128, split=4)),
    (65, 96, 256, TILE),
    (70, 50, 320, TILE._replace(block_n=48)),  # nothing divides anything
    (33, 72, 192, TILE._replace(block_n=96)),
    (100, 40, 384, TILE._replace(block_n=64, block_k=128, block_m=128)),  # a tile holds more than all of it
    (128, 24, 64, TILE._replace(block_n=48, block_m=64, warps=8)),
    (300, 40, 64, TILE._replace(block_n=64, block_m=128)),  # more than other kernels take
]


@pytest.mark.parametrize(("rows", "columns", "width", "config"), CASES)
def test_products_match_float64(rows: int, columns: int, width: int, config: Config, device: torch.device) -> None:
    torch.manual_seed(rows + columns)
    x, w = draw(rows, width, device=device), draw(columns, width, device=device, scale=0.1)
    residual, scale = draw(rows, columns, device=device), draw(width, device=device) + 1
    out = gemm.linear(x, w, out_TO=poisoned(rows, columns, x), config=config)
    assert_near(out, x.double() @ w.double().T, reference.linear(x, w))
    out = gemm.linear_add(x, w, residual, out_TH=poisoned(rows, columns, x), config=config)
    assert_near(out, residual.double() + x.double() @ w.double().T, reference.linear_add(x, w, residual))
    out = gemm.norm_linear(x, scale, EPS, w, out_TO=poisoned(rows, columns, x), config=config)
    assert_near(out, exact_norm(x, scale) @ w.double().T, reference.norm_linear(x, scale, EPS, w))


@pytest.mark.parametrize(("rows", "columns", "width", "config"), CASES)
def test_norm_gate_up_matches_float64(
    rows: int, columns: int, width: int, config: Config, device: torch.device
) -> None:
    torch.manual_seed(rows + columns)
    h, scale = draw(rows, width, device=device, scale=30), draw(width, device=device) + 1
    w = draw(2 * columns, width, device=device, scale=0.1)
    gate, up = (exact_norm(h, scale) @ w.double().T).chunk(2, dim=-1)
    out = gemm.norm_gate_up(h, scale, EPS, w, out_TI=poisoned(rows, columns, h), config=config)
    assert_near(out, torch.nn.functional.silu(gate) * up, reference.norm_gate_up(h, scale, EPS, w))


def test_split_products_leave_counters_at_zero_and_repeat_exactly(device: torch.device) -> None:
    x, w = draw(7, 512, device=device), draw(64, 512, device=device)
    config = DOT._replace(split=8)
    first, second = (gemm.linear(x, w, config=config) for _ in range(2))
    assert torch.equal(first, second)
    assert not gemm.workspace(x.device).arrived_N.any()


def test_linear_add_may_write_its_residual(device: torch.device) -> None:
    x, w = draw(4, 256, device=device), draw(48, 256, device=device)
    residual = draw(4, 48, device=device)
    for config in (GEMV, DOT, DOT._replace(split=2), Config("torch")):
        expected = gemm.linear_add(x, w, residual, config=config)
        in_place = residual.clone()
        assert gemm.linear_add(x, w, in_place, out_TH=in_place, config=config) is in_place
        assert torch.equal(in_place, expected)


def test_rows_of_a_product_do_not_depend_on_their_neighbours(device: torch.device) -> None:
    x, w, scale = draw(16, 256, device=device), draw(64, 256, device=device), draw(256, device=device)
    whole = gemm.norm_linear(x, scale, EPS, w, config=DOT)
    spoiled = x.clone()
    spoiled[1:] = torch.nan
    assert torch.equal(gemm.norm_linear(spoiled, scale, EPS, w, config=DOT)[0], whole[0])


def test_many_rows_and_odd_widths_go_to_torch(device: torch.device) -> None:
    assert choose("norm", 257, 4096, 1024).path == "torch"
    assert fit(DOT, 8, 100).path == "torch"
    h, scale, w = draw(130, 100, device=device), draw(100, device=device), draw(40, 100, device=device)
    assert_near(
        gemm.norm_linear(h, scale, EPS, w), exact_norm(h, scale) @ w.double().T, reference.norm_linear(h, scale, EPS, w)
    )
    gate_up = gemm.norm_gate_up(h, scale, EPS, w)
    assert relative_error(gate_up, reference.norm_gate_up(h.double(), scale.double(), EPS, w.double())) < 1e-2
    assert gemm.norm_linear(h[:0], scale, EPS, w).shape == (0, 40)
    assert gemm.linear_add(h[:0], w, h.new_empty(0, 40)).shape == (0, 40)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32, 64, 128, 192, 256])
def test_every_choice_covers_its_width_and_fits_workspace_and_shared_memory(rows: int, itemsize: int) -> None:
    shapes = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (4096, 1024), (1024, 2048), (6144, 1024)]
    shapes += [(1024, 3072), (151936, 1024), (2560, 9728), (5120, 25600), (1536, 5120), (5120, 8 * 192), (64, 64)]
    scratch, numbers = gemm.Workspace(torch.device("cpu")), Numbers(itemsize, itemsize)
    chosen = [(k, fit(default_config(rows, n, k), rows, k, numbers), n) for n, k in shapes]
    chosen += [
        (k, fit(config, rows, k, numbers), n)
        for (_, n, k, size), row in TABLE.items()
        for largest, config in row
        if rows <= largest and size == 2
    ]
    for width, config, weights in chosen:
        if config.path == "torch":
            continue
        assert width % (config.split * config.block_k) == 0
        assert config.block_k >= 64
        assert config.prefetch <= width // config.split
        assert config.path == "gemv" or 0 < shared_bytes(config, rows, numbers) <= 227 * 1024
        tiles = -(-weights // config.block_n)
        assert config.split == 1 or scratch.fits(tiles, config.split, (config.block_n + 1) * max(16, rows))


@pytest.mark.parametrize("hidden", [64, 100, 1024])
def test_norm_kernels_match_the_reference(hidden: int, device: torch.device) -> None:
    torch.manual_seed(hidden)
    x, scale = (draw(*shape, device=device) for shape in ((5, hidden), (hidden,)))
    expected = reference.rms_norm(x, scale, EPS)
    torch.testing.assert_close(norm.rms_norm(x, scale, EPS, out_TH=poisoned(5, hidden, x)), expected)
    in_place = x.clone()
    norm.rms_norm(in_place, scale, EPS, out_TH=in_place)
    torch.testing.assert_close(in_place, expected)


def test_silu_mul_matches_float64(device: torch.device) -> None:
    gate_up = draw(3, 2 * 1100, device=device, scale=4)
    gate, up = gate_up.double().chunk(2, dim=-1)
    out = norm.silu_mul(gate_up, out_TI=poisoned(3, 1100, gate_up))
    assert relative_error(out, torch.nn.functional.silu(gate) * up) < 5e-3


def test_bf16_rows_go_through_the_gemv_kernel(device: torch.device) -> None:
    """The dot kernel sees bf16 on a GPU only: the interpreter multiplies bf16 operands as if they were integers."""
    bf16 = {"device": device, "dtype": torch.bfloat16}
    h, scale, w = draw(4, 256, **bf16), draw(256, **bf16) + 1, draw(64, 256, **bf16, scale=0.1)
    out = gemm.norm_gate_up(h, scale, EPS, w, config=GEMV)
    gate, up = (exact_norm(h, scale) @ w.double().T).chunk(2, dim=-1)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, torch.nn.functional.silu(gate) * up) < 1e-2
