"""int8 weights: the error of quantizing, loading at every degree, memory, and the tokens of the whole engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.device.test_generation import Engine, prompts, reference, request
from tests.tiny import dequantized, tiny_checkpoint
from tpqwen.config import QUANTIZATIONS, Config
from tpqwen.errors import ConfigError
from tpqwen.model import weights
from tpqwen.model.config import ModelConfig
from tpqwen.model.qwen3 import Qwen3
from tpqwen.model.weights import load_weights, random_weights, weight_bytes
from tpqwen.parallel.group import TPGroup
from tpqwen.quant.schemes import INT8, NONE, SCHEMES, quantize

CPU = torch.device("cpu")
SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False}


def on_meta(folder: Path, group: TPGroup | None = None) -> Qwen3:
    with torch.device("meta"):
        return Qwen3(ModelConfig.from_folder(folder), group or TPGroup.single(), scheme=INT8)


def loaded(folder: Path, group: TPGroup | None = None, dtype: torch.dtype = torch.float32) -> Qwen3:
    model = on_meta(folder, group)
    load_weights(model, folder, device=CPU, dtype=dtype)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("original"), **SHAPE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_is_off_by_more_than_half_a_step_and_the_largest_is_exact(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight = (torch.randn(64, 200) * torch.logspace(-4, 2, 64)[:, None]).to(dtype)
    values, scale = quantize(weight)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (64,))
    error = (weight.double() - values.double() * scale.double()[:, None]).abs()
    assert (error <= 0.5001 * scale.double()[:, None]).all()
    assert (values.abs().amax(1) == 127).all()
    torch.testing.assert_close(scale * 127, weight.float().abs().amax(1))
    again, same = quantize(values.float() * scale[:, None])
    assert torch.equal(again, values) and torch.allclose(same, scale)


def test_a_row_of_zeros_stays_zero_and_one_that_is_not_finite_shows_it() -> None:
    weight = torch.ones(4, 8)
    weight[0], weight[1, 3], weight[2, 5] = 0, torch.nan, torch.inf
    values, scale = quantize(weight)
    products = (values * scale[:, None]).sum(1)
    assert products[0] == 0 and products[3] == pytest.approx(8)
    assert not products[1:3].isfinite().any()


@pytest.mark.parametrize("piece", [1, 300, 1 << 24])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_rank_holds_its_slices_of_one_quantized_model(
    folder: Path, size: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a weight comes in pieces of some rows, one row at the least."""
    monkeypatch.setattr(weights, "QUANTIZED_ELEMENTS", piece)
    full = {n: quantize(t) for n, t in load_file(folder / "model.safetensors").items() if "_proj" in n}
    for rank in range(size):
        model = loaded(folder, TPGroup(rank, size, None))
        for module in model.modules():
            for part in getattr(module, "parts", ()):
                if part.name not in full:
                    assert module.scale is None
                    continue
                (rows, columns), (values, scale) = part.spec.index(rank, size), full[part.name]
                place = slice(part.offset, part.offset + rows.stop - rows.start)
                assert torch.equal(module.weight[place], values[rows, columns]), part.name
                assert torch.equal(module.scale[place], scale[rows]), part.name


def test_the_quantized_weights_do_not_depend_on_the_dtype_that_is_computed_in(folder: Path) -> None:
    wide, narrow = (loaded(folder, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for one, other in zip(wide.attention, narrow.attention, strict=True):
        assert torch.equal(one.qkv.weight, other.qkv.weight) and torch.equal(one.qkv.scale, other.qkv.scale)
    assert narrow.embed.weight.dtype == narrow.norm.weight.dtype == torch.bfloat16


def test_random_weights_are_quantized_too_and_one_model_at_every_degree(folder: Path) -> None:
    models = [on_meta(folder), *(on_meta(folder, TPGroup(rank, 2, None)) for rank in range(2))]
    for model in models:
        random_weights(model, device=CPU, dtype=torch.float32, seed=0)
    whole, *halves = (m.mlp[0].down for m in models)
    assert torch.equal(torch.cat([h.weight for h in halves], 1), whole.weight)
    assert all(torch.equal(h.scale, whole.scale) for h in halves)
    assert (whole.weight.abs().amax(1) == 127).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_the_weights_is_foretold_and_what_int8_promises(folder: Path, dtype: torch.dtype) -> None:
    model = loaded(folder, dtype=dtype)
    projections = [m for m in model.modules() if getattr(m, "scale", None) is not None and hasattr(m, "parts")]
    kept = sum(p.numel() for m in projections for p in [m.weight])
    rows = sum(m.scale.numel() for m in projections)
    others = ModelConfig.from_folder(folder).num_parameters - kept
    assert len(projections) == 2 * 4
    assert sum(p.nbytes for p in model.parameters()) == kept + 4 * rows + others * dtype.itemsize
    assert weight_bytes(on_meta(folder), dtype) == kept + 4 * rows + others * dtype.itemsize


def test_unknown_schemes_are_refused_by_name_and_known_ones_exist() -> None:
    with pytest.raises(ConfigError, match="quantization must be one of none, int8, not 'int4'"):
        Config.load({"quantization": "int4"}, {})
    assert Config.load({}, {}).model.quantization == NONE.name
    assert Config.load({}, {"TPQWEN_QUANTIZATION": "int8"}).model.quantization == "int8"
    assert tuple(SCHEMES) == QUANTIZATIONS


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_greedy_tokens_are_transformers_with_the_dequantized_weights_at_every_degree(
    folder: Path, tmp_path: Path, tp: int
) -> None:
    engine = Engine(folder, tp=tp, quantization="int8", block_size=8, max_batched_tokens=16, max_model_len=256)
    inputs = prompts(4, 30, 300, seed=5)
    outputs = engine.generate([request(str(i), p, 60) for i, p in enumerate(inputs)])
    engine.close()
    wide = dequantized(folder, tmp_path / "wide")
    for i in (0, 3):
        assert outputs[str(i)] == reference(wide, inputs[i], len(outputs[str(i)])), i
