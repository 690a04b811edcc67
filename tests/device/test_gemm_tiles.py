"""Products in tiles by TMA: what is theirs alone. test_gemm_kernels.py compares them with float64."""

from __future__ import annotations

import pytest
import torch

from tests.device.test_gemm_kernels import EPS, TILE, assert_near, draw, exact_norm
from tpqwen.kernels import gemm, reference
from tpqwen.kernels.gemm_table import TABLE, Config, Numbers, choose, fit, padded_rows, shared_bytes
from tpqwen.kernels.gemm_tiles import whole_tiles


def test_linear_add_may_write_its_residual(device: torch.device) -> None:
    x, w, residual = draw(40, 256, device=device), draw(48, 256, device=device), draw(40, 48, device=device)
    expected = gemm.linear_add(x, w, residual, config=TILE)
    in_place = residual.clone()
    assert gemm.linear_add(x, w, in_place, out_TH=in_place, config=TILE) is in_place
    assert torch.equal(in_place, expected)


@pytest.mark.usefixtures("dots_by_row")
def test_rows_of_a_product_do_not_depend_on_their_neighbours(device: torch.device) -> None:
    x, w = draw(70, 256, device=device), draw(64, 256, device=device)
    whole = gemm.linear(x, w, config=TILE)
    spoiled = x.clone()
    spoiled[:40], spoiled[41:] = torch.nan, torch.nan
    assert torch.equal(gemm.linear(spoiled, w, config=TILE)[40], whole[40])
    assert torch.equal(gemm.linear(x[40:66], w, config=TILE)[0], whole[40]), "nor on how many there are"


def test_tiles_are_for_16_bits_only() -> None:
    tiled = [(*product[:3], rows) for product, lines in TABLE.items() for rows, c in lines if c.path == "tile"]
    assert tiled, "some products are"
    for operation, weights, width, rows in tiled:
        assert choose(operation, rows, weights, width).path == "tile"
        assert choose(operation, rows, weights, width, Numbers(4, 4)).path == "torch"
    assert fit(TILE, 100, 256, Numbers(2, 1)).path == "torch"


def test_large_tiles_get_what_fits() -> None:
    config = fit(TILE._replace(block_n=256, block_m=128, block_k=128, stages=9, prefetch=512), 128, 4096 + 64)
    assert config.block_k == 64 and config.stages == 4 and shared_bytes(config, 128) <= 227 * 1024
    assert config.prefetch == 0, "fewer threads than rows of the weight"
    assert fit(config._replace(warps=8, prefetch=512), 128, 4096).prefetch == 512
    assert fit(config._replace(warps=8, prefetch=512), 128, 256).prefetch == 256


def test_tiles_end_within_memory_that_is_there() -> None:
    """On a GPU, whether or not there is some: neither may touch what follows the activations' memory."""
    memory = torch.arange(100.0 * 64).view(100, 64)
    assert padded_rows(TILE, 40) == 64 and padded_rows(Config("torch"), 40) == 40
    assert torch.equal(whole_tiles(memory[:40], TILE), memory[:64])
    assert torch.equal(whole_tiles(memory[10:50], TILE), memory[10:74])
    assert torch.equal(whole_tiles(memory[30:], TILE), memory[30:]), "there is no more of it"


def test_passes_with_prompts_take_tiles_for_the_gates_of_small_models() -> None:
    for rows in (257, 320, 576, 1088, 2304):
        assert choose("silu", rows, 6144, 1024).path == "tile"
    assert choose("silu", 1088, 12288, 2048).path == "torch", "measured: not faster"
    for operation, rows, weights, width in (
        ("silu", 2305, 6144, 1024),
        ("silu", 300, 24576, 4096),
        ("add", 300, 64, 64),
    ):
        assert choose(operation, rows, weights, width).path == "torch", "not measured"
    assert choose("silu", 576, 6144, 1024, Numbers(4, 4)).path == "torch"


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [80, 128, 144, 250, 300, 1088, 2304])
def test_the_tables_tiles_match_float64(rows: int, device: torch.device) -> None:
    """One layer of 0.6B and 8B, by the table's choices; activations with and without memory after them."""
    for hidden, inner in ((1024, 3072), (4096, 12288)):
        torch.manual_seed(rows)
        h, scale = draw(rows, hidden, device=device), draw(hidden, device=device) + 1
        gate_up = draw(2 * inner, hidden, device=device, scale=0.02)
        exact = (exact_norm(h, scale) @ gate_up.double().T).chunk(2, dim=-1)
        out = gemm.norm_gate_up(h, scale, EPS, gate_up)
        expected = reference.norm_gate_up(h, scale, EPS, gate_up)
        assert_near(out, torch.nn.functional.silu(exact[0]) * exact[1], expected)
        down = draw(hidden, inner, device=device, scale=0.02)
        sums = h.double() + out.double() @ down.double().T
        for x in (out, out.clone()):
            assert_near(gemm.linear_add(x, down, h), sums, reference.linear_add(x, down, h))
