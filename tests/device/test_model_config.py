"""config.json and generation_config.json: what is read, and what is refused with the field's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tpqwen.config import EMBEDDED_MODEL, Config
from tpqwen.errors import ConfigError
from tpqwen.model import sizing
from tpqwen.model.config import ModelConfig, check_parallel, count_token_ids
from tpqwen.model.sizing import derive

# Qwen3-0.6B as published.
PUBLISHED = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
}


def read(folder, generation=None, drop=(), **changes):
    values = {k: v for k, v in (PUBLISHED | changes).items() if k not in drop}
    (folder / "config.json").write_text(json.dumps(values))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_folder(folder)


def test_published_config_is_read_with_its_sizes(tmp_path):
    config = read(tmp_path)
    assert (config.head_dim, config.rope_theta, config.dtype, config.tie_word_embeddings) == (
        128,
        1e6,
        "bfloat16",
        True,
    )
    assert config.kv_bytes_per_token(2) == 112 * 1024
    assert config.num_parameters == pytest.approx(0.440e9 + 151936 * 1024, rel=2e-3)


def test_transformers_5_spelling_is_accepted(tmp_path):
    rope = {"rope_theta": 5e6, "rope_type": "default"}
    config = read(tmp_path, drop=("rope_theta", "torch_dtype", "rope_scaling"), rope_parameters=rope, dtype="float16")
    assert (config.rope_theta, config.dtype) == (5e6, "float16")


def test_end_tokens_of_both_files_are_joined_in_order(tmp_path):
    assert read(tmp_path, {"eos_token_id": [151645, 151643]}).eos_token_ids == (151645, 151643)
    assert read(tmp_path, {"eos_token_id": 7}, eos_token_id=None).eos_token_ids == (7,)


def test_sampling_defaults_are_those_that_the_checkpoint_states(tmp_path):
    assert read(tmp_path).generation_defaults == {}
    defaults = read(tmp_path, {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True}).generation_defaults
    assert defaults == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen3_moe"}, "qwen3_moe.*not supported yet"),
        ({"model_type": "qwen3_next"}, "model_type 'qwen3_next'"),
        ({"model_type": None}, "model_type None"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "yarn"),
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
            },
            "yarn",
        ),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method 'fp8'"),
        ({"hidden_size": "1024"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"eos_token_id": "end"}, "eos_token_id"),
        ({"torch_dtype": "int8"}, "int8"),
        ({"num_attention_heads": 12}, "12.*8"),
        ({"head_dim": 127}, "head_dim"),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        read(tmp_path, **change)


@pytest.mark.parametrize("field", ["head_dim", "rope_theta", "vocab_size", "max_position_embeddings"])
def test_missing_field_has_no_default(tmp_path, field):
    with pytest.raises(ConfigError, match=field):
        read(tmp_path, drop=(field,))


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_degrees_of_the_published_sizes(tmp_path):
    config = read(tmp_path)
    for tp in (1, 2, 4, 8):
        check_parallel(config, tp)
    wide = read(tmp_path, num_attention_heads=40, num_key_value_heads=8, intermediate_size=17408)
    with pytest.raises(ConfigError, match=r"5.*8 key/value"):
        check_parallel(wide, 5)
    with pytest.raises(ConfigError, match=r"16.*40 query"):
        check_parallel(wide, 16)
    with pytest.raises(ConfigError, match=r"4.*3070"):
        check_parallel(read(tmp_path, intermediate_size=3070), 4)


def test_ids_without_a_tokenizer_are_the_vocabulary(tmp_path):
    assert count_token_ids(tmp_path, 320) == 320


def test_more_rows_than_the_kernels_have_room_for_are_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig.from_folder(Path(EMBEDDED_MODEL))
    config = Config.load({"device": "cpu", "max_num_seqs": 1025}, {})
    assert derive(config, model).max_num_seqs == 1025, "a CPU has no such bound"
    monkeypatch.setattr(sizing, "resolve_device", lambda _: "cuda")
    with pytest.raises(ConfigError, match="max_num_seqs 1025 is above the 1024"):
        derive(config, model)
