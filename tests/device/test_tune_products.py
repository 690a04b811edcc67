"""The tool that measures launch parameters, as far as it goes without a GPU; and the table that it writes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import tpqwen.kernels.gemm_table as tables
from tpqwen.kernels.gemm_table import BF16, TABLE, Numbers, choose, fit, read_measured, shared_bytes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tune_products", ROOT / "tools" / "tune_products.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def copy(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the table: the one that the tool changes."""
    path = tmp_path / "measured.csv"
    path.write_bytes(tool.CSV.read_bytes())
    monkeypatch.setattr(tool, "CSV", path)
    return path


def test_products_are_those_of_a_layer(tool: ModuleType) -> None:
    assert list(tool.products("8b", 1)) == [
        ("norm", 6144, 4096),
        ("add", 4096, 4096),
        ("silu", 24576, 4096),
        ("add", 4096, 12288),
    ]
    assert [p[1:] for p in tool.products("8b", 4)] == [(1536, 4096), (4096, 1024), (6144, 4096), (4096, 3072)]
    assert next(tool.products("0.6b", 16))[1] == 3 * 128, "no rank has less than one head of keys"


@pytest.mark.parametrize("numbers", [BF16, Numbers(2, 1)])
@pytest.mark.parametrize("rows", [1, 4, 64, 128, 256])
def test_candidates_are_valid_and_begin_with_the_present_choice(tool: ModuleType, rows: int, numbers: Numbers) -> None:
    for operation, weights, width in tool.products("8b", 2):
        now = choose(operation, rows, weights, width, numbers)
        found = tool.candidates(tool.Task(operation, weights, width, rows, numbers, now), 10)
        assert found[0] == now and len(found) > 2
        for config in found:
            assert config == fit(config, rows, width, numbers)
            assert config.path in ("gemv", "torch") or shared_bytes(config, rows, numbers) <= 227 * 1024
        assert rows <= 64 or any(c.path == "tile" for c in found) == (numbers == BF16)


def test_the_first_tiles_leave_few_multiprocessors_without_one(tool: ModuleType) -> None:
    first = tool._tiles(tool.Task("silu", 24576, 4096, 256, BF16, choose("silu", 256, 24576, 4096)))[0]
    assert (first.block_m, first.block_n) == (256, 192), "128 tiles, of so many rows and columns as can be"
    assert not tool._tiles(tool.Task("silu", 24576, 4096, 64, BF16, choose("silu", 64, 24576, 4096)))


def test_lines_replace_their_products_and_leave_the_others(
    tool: ModuleType, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool.merge([])
    assert read_measured(copy.read_text()) == TABLE
    before = {rows: choose("silu", rows, 24576, 4096) for rows in range(1, 257)}
    config = choose("silu", 8, 24576, 4096)._replace(block_n=32)
    task = tool.Task("silu", 24576, 4096, 4, BF16, config)
    tool.merge([tool._line(task), tool._line(task._replace(rows=8))])
    changed = read_measured(copy.read_text())
    entries = changed["silu", 24576, 4096, 2]
    assert (8, config) in entries and 4 not in dict(entries), "what says the same is said once"
    monkeypatch.setattr(tables, "TABLE", changed)
    choose.cache_clear()
    after = {rows: choose("silu", rows, 24576, 4096) for rows in range(1, 257)}
    choose.cache_clear()
    assert {rows for rows in before if after[rows] != before[rows]} == {3, 4, 5, 6, 7, 8}, "the others stay"
    assert {p: e for p, e in changed.items() if p[1] != 24576} == {p: e for p, e in TABLE.items() if p[1] != 24576}


def test_lines_of_many_rows_stay_when_others_of_their_product_are_replaced(tool: ModuleType, copy: Path) -> None:
    config = choose("silu", 8, 6144, 1024)._replace(block_n=32)
    tool.merge([tool._line(tool.Task("silu", 6144, 1024, 8, BF16, config))])
    product = "silu", 6144, 1024, 2
    many = [entry for entry in TABLE[product] if entry[0] > 256]
    assert many and [e for e in read_measured(copy.read_text())[product] if e[0] > 256] == many


def test_no_product_takes_tiles_for_rows_at_which_they_were_not_measured() -> None:
    for product, entries in TABLE.items():
        first = next((i for i, (_, config) in enumerate(entries) if config.path == "tile"), 0)
        assert not first or entries[first - 1][0] >= 64, product
