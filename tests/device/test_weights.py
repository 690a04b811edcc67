"""Loading ends empty or not at all, and each rank holds exactly its slices."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import tiny_checkpoint
from tpqwen.errors import ConfigError
from tpqwen.model.checkpoint import INDEX, check_folder, tensor_shapes
from tpqwen.model.config import ModelConfig
from tpqwen.model.qwen3 import Qwen3
from tpqwen.model.weights import load_weights, random_weights
from tpqwen.parallel.group import TPGroup
from tpqwen.parallel.layers import ShardedWeight

CPU = torch.device("cpu")
SHARDED = {"vocab_size": 323, "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("original"), **SHARDED)


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoint")


def meta_model(folder, group=None):
    with torch.device("meta"):
        return Qwen3(ModelConfig.from_folder(folder), group or TPGroup.single())


def loaded(folder, group=None, dtype=torch.float32):
    model = meta_model(folder, group)
    load_weights(model, folder, device=CPU, dtype=dtype)
    return model


def tensors(folder):
    return load_file(folder / "model.safetensors")


def rewrite(folder, change):
    values = tensors(folder)
    change(values)
    save_file(values, folder / "model.safetensors")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_rank_holds_its_slices(folder, size):
    full = tensors(folder)
    at = "model.layers.1."
    models = [loaded(folder, TPGroup(rank, size, None)) for rank in range(size)]
    attention, mlp = [m.attention[1] for m in models], [m.mlp[1] for m in models]
    kv_rows = max(1, 2 // size) * 16
    q_rows = 8 // size * 16
    for rank in range(size):
        q, k, v = attention[rank].qkv.weight.split([q_rows, kv_rows, kv_rows])
        kv_head = rank * 2 // size * 16
        assert torch.equal(q, full[at + "self_attn.q_proj.weight"][rank * q_rows : (rank + 1) * q_rows])
        assert torch.equal(k, full[at + "self_attn.k_proj.weight"][kv_head : kv_head + kv_rows])
        assert torch.equal(v, full[at + "self_attn.v_proj.weight"][kv_head : kv_head + kv_rows])
    for name, parts, axis in (
        ("self_attn.o_proj", [a.o.weight for a in attention], 1),
        ("mlp.gate_proj", [m.gate_up.weight.chunk(2)[0] for m in mlp], 0),
        ("mlp.up_proj", [m.gate_up.weight.chunk(2)[1] for m in mlp], 0),
        ("mlp.down_proj", [m.down.weight for m in mlp], 1),
    ):
        assert torch.equal(torch.cat(parts, axis), full[f"{at}{name}.weight"]), name
    for name, rows in (
        ("model.embed_tokens", torch.cat([m.embed.weight for m in models])),
        ("lm_head", torch.cat([m.lm_head.weight for m in models])),
    ):
        assert torch.equal(rows[:323], full[f"{name}.weight"]), name
        assert not rows[323:].any()


def test_nothing_stays_on_meta_and_the_dtype_is_the_one_asked_for(folder):
    model = loaded(folder, dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.bfloat16)}


def test_sharded_index_gives_the_same_weights_as_a_single_file(folder, tmp_path):
    split = tiny_checkpoint(tmp_path / "split", max_shard_size="100KB", **SHARDED)
    assert len(list(split.glob("*.safetensors"))) > 2
    pairs = zip(loaded(folder).parameters(), loaded(split).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_names_without_the_model_prefix_are_accepted(folder):
    expected = [p.clone() for p in loaded(folder).parameters()]
    stripped = {n.removeprefix("model."): t for n, t in tensors(folder).items()}
    save_file(stripped, folder / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(loaded(folder).parameters(), expected, strict=True))


def test_tied_head_is_the_embedding_and_a_stored_head_is_ignored(tmp_path):
    folder = tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    rewrite(folder, lambda t: t.update({"lm_head.weight": torch.ones(320, 64)}))
    model = loaded(folder)
    assert model.lm_head.weight.data_ptr() == model.embed.weight.data_ptr()
    assert torch.equal(model.embed.weight, tensors(folder)["model.embed_tokens.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_the_tensors_of_a_checkpoint_are_those_that_the_model_reads(tmp_path, tied):
    folder = tiny_checkpoint(tmp_path, tie_word_embeddings=tied)
    parts = [p for m in meta_model(folder).modules() if isinstance(m, ShardedWeight) for p in m.parts]
    assert tensor_shapes(ModelConfig.from_folder(folder)) == {part.name: part.spec.shape for part in parts}


def refused(folder, words):
    """Refused from headers alone, and by the loading itself."""
    with pytest.raises(ConfigError, match=words):
        check_folder(folder, tensor_shapes(ModelConfig.from_folder(folder)))
    model = meta_model(folder)
    with pytest.raises(ConfigError, match=words):
        load_weights(model, folder, device=CPU, dtype=torch.float32)
    assert all(p.device.type == "meta" for p in model.parameters()), "half-loaded"


def test_missing_tensor_is_named(folder):
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, r"model\.layers\.1\.mlp\.up_proj\.weight is missing")


def test_missing_head_of_an_untied_model_is_named(folder):
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    refused(folder, r"lm_head\.weight")


def test_unexpected_tensor_is_named(folder):
    rewrite(folder, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}))
    refused(folder, r"model\.layers\.2\.mlp\.up_proj\.weight")


def test_tensor_stored_with_and_without_prefix_is_refused(folder):
    rewrite(folder, lambda t: t.update({"norm.weight": torch.ones(64)}))
    refused(folder, r"norm\.weight")


def test_wrong_shape_is_named_with_both_shapes(folder):
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(65)}))
    refused(folder, r"model\.norm\.weight.*\[65\].*\[64\]")


def test_integer_tensor_is_refused_by_name(folder):
    rewrite(folder, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    refused(folder, r"model\.norm\.weight")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file_is_refused_by_name(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, r"model\.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": "xy"}}',
        b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}',
        b"[" * 100_000,
    ],
)
def test_damaged_header_is_refused(folder, header):
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(folder, r"model\.safetensors")


def test_header_whose_offsets_do_not_fit_the_shape_is_refused(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.embed_tokens.weight"]["data_offsets"][1] -= 4
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(folder, r"model\.embed_tokens\.weight")


def test_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, r"model\.safetensors is missing")


@pytest.mark.parametrize("target", ["../elsewhere.safetensors", "/etc/hostname", "sub/model.safetensors", ".."])
def test_index_that_points_outside_the_folder_is_refused(folder, target):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": target}}))
    refused(folder, "outside")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_damaged_index_is_refused(folder, text):
    (folder / INDEX).write_text(text)
    refused(folder, r"index\.json")


def test_index_that_names_the_wrong_file_is_refused(folder, tmp_path):
    split = tiny_checkpoint(tmp_path / "split", max_shard_size="100KB", **SHARDED)
    index = json.loads((split / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"] = {n: files[(files.index(f) + 1) % len(files)] for n, f in index["weight_map"].items()}
    (split / INDEX).write_text(json.dumps(index))
    refused(split, r"index\.json")


def test_link_out_of_the_folder_is_refused(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    shutil.move(folder / "model.safetensors", outside)
    os.symlink(outside, folder / "model.safetensors")
    refused(folder, "outside")


def test_links_of_a_hub_cache_are_followed(folder, tmp_path):
    repo = tmp_path / "models--org--tiny"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for path in folder.iterdir():
        shutil.copy(path, repo / "blobs" / path.name)
        os.symlink(f"../../blobs/{path.name}", snapshot / path.name)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded(snapshot).parameters(), loaded(folder).parameters(), strict=True)
    )


def test_links_from_one_cached_model_into_another_are_refused(folder, tmp_path):
    snapshot, other = tmp_path / "models--a" / "snapshots" / "x", tmp_path / "models--b" / "blobs"
    shutil.copytree(folder, snapshot)
    other.mkdir(parents=True)
    shutil.move(snapshot / "model.safetensors", other / "f")
    os.symlink("../../../models--b/blobs/f", snapshot / "model.safetensors")
    refused(snapshot, "outside")


def test_random_weights_repeat_by_seed_and_keep_the_tie(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    models = []
    for seed in (3, 3, 4):
        models.append(meta_model(folder))
        random_weights(models[-1], device=CPU, dtype=torch.float32, seed=seed)
    first, again, other = (m.embed.weight for m in models)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.std().item() == pytest.approx(0.02, rel=0.05)
    assert (models[0].norm.weight == 1).all()
    assert models[0].lm_head.weight.data_ptr() == first.data_ptr()


def test_random_weights_are_one_model_at_every_degree(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    models = [meta_model(folder), *(meta_model(folder, TPGroup(rank, 2, None)) for rank in range(2))]
    for model in models:
        random_weights(model, device=CPU, dtype=torch.float32, seed=0)
    whole, *halves = (m.mlp[0].down.weight for m in models)
    assert torch.equal(torch.cat(halves, 1), whole)
    assert not torch.equal(*halves)
