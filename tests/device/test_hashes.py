"""A checkpoint's files against the hashes beside them: what is read, what is refused and in which words."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess

import pytest

from tests.tiny import tiny_checkpoint
from tpqwen import service
from tpqwen.config import Config
from tpqwen.errors import ConfigError
from tpqwen.model import hashes
from tpqwen.model.checkpoint import Checkpoint
from tpqwen.model.hashes import check_hashes
from tpqwen.offline import OfflineEngine


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("original"), max_shard_size="100KB")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoint")


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are read."""
    names, real = [], hashes._sha256
    monkeypatch.setattr(hashes, "_sha256", lambda path: names.append(path.name) or real(path))
    return names


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def write_list(folder, files=None, name="SHA256SUMS", line="{digest}  {name}"):
    files = shards(folder) if files is None else files
    text = "".join(line.format(digest=digest(p), name=p.name) + "\n" for p in files)
    (folder / name).write_text(text)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def check(folder, verify=None, known=None):
    return check_hashes(folder, Checkpoint(folder).files.values(), verify, known)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("SHA256SUMS", "{digest}  {name}"),
        ("sha256sums.txt", "{digest} *./{name}"),
        ("model.sha256", "SHA256 ({name}) = {digest}"),
        ("SHA256SUM", "{digest}  {name} \t"),
        ("SHA256SUMS", "{digest}  m/{name}"),
        ("sha256sum.txt", "{digest}  /data/m/{name}\r"),
    ],
)
def test_every_shard_is_verified_and_a_flipped_bit_names_its_file(folder, hashed, name, line):
    write_list(folder, name=name, line=line)
    assert set(check(folder)) == {p.name for p in shards(folder)} == set(hashed)
    assert len(hashed) == len(shards(folder)) > 2
    flip_a_bit(shards(folder)[1])
    with pytest.raises(ConfigError, match=rf"{shards(folder)[1].name} is damaged"):
        check(folder)


def test_the_list_is_what_sha256sum_writes(folder):
    done = subprocess.run(["sha256sum", *(p.name for p in shards(folder))], cwd=folder, capture_output=True, check=True)
    (folder / "SHA256SUMS").write_bytes(done.stdout)
    assert len(check(folder)) == len(shards(folder))


def test_a_file_of_its_own_may_hold_each_shards_digest_alone(folder):
    for path in shards(folder):
        (folder / f"{path.name}.sha256").write_text(digest(path).upper() + "\n")
    assert len(check(folder)) == len(shards(folder))
    flip_a_bit(shards(folder)[0])
    with pytest.raises(ConfigError, match=shards(folder)[0].name):
        check(folder)


def test_other_files_that_are_read_are_verified_where_they_are_listed_and_no_others(folder, hashed):
    (folder / "README.md").write_text("changed since")
    write_list(folder, [*shards(folder), folder / "config.json", folder / "README.md"])
    with (folder / "SHA256SUMS").open("a") as file:
        file.write(f"# elsewhere\n\n{'0' * 64}  original/consolidated.safetensors\n{'0' * 64}  absent.safetensors\n")
    (folder / "README.md").write_text("changed")
    check(folder)
    assert set(hashed) == {"config.json", *(p.name for p in shards(folder))}
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        check(folder)


def test_without_a_list_nothing_is_read_unless_asked_for(folder, hashed):
    assert check(folder) == {} == check(folder, verify=False)
    with pytest.raises(ConfigError, match=r"no SHA-256 of .*sha256sum \*\.safetensors > SHA256SUMS"):
        check(folder, verify=True)
    write_list(folder)
    assert check(folder, verify=False) == {}
    assert hashed == []


def test_a_list_that_leaves_a_shard_out_is_refused(folder):
    write_list(folder, shards(folder)[:-1])
    with pytest.raises(ConfigError, match=rf"no SHA-256 of {shards(folder)[-1].name}"):
        check(folder)


def test_a_path_in_a_folder_of_the_models_is_not_the_models_file(folder):
    (folder / "onnx").mkdir()
    shutil.copy(folder / "config.json", folder / "onnx" / "config.json")
    write_list(folder)
    with (folder / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  onnx/config.json\n{'0' * 64}  original/{shards(folder)[0].name}\n")
    assert set(check(folder)) == {p.name for p in shards(folder)}


@pytest.mark.parametrize("name", ["SHA256SUMS", "SHA256SUM", "sha256sums.txt"])
@pytest.mark.parametrize("text", ["", f"{'0' * 64}  absent.safetensors\n"])
def test_a_list_that_names_no_shard_is_refused(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=f"no SHA-256 of {shards(folder)[0].name}"):
        check(folder)


@pytest.mark.parametrize("text", ["0" * 64, f"{'0' * 64}  other.gguf"])
def test_a_list_about_files_that_are_not_here_is_said_once_and_does_not_count(folder, hashed, caplog, text):
    (folder / "other.gguf.sha256").write_text(text + "\n")
    assert check(folder) == {} and hashed == []
    assert [r.getMessage() for r in caplog.records] == [
        f"{folder}: no file of this folder is named in other.gguf.sha256"
    ]


@pytest.mark.parametrize(
    "text", ["what is this\n", "abc  model.safetensors\n", f"{'0' * 64} model.safetensors\n", "0" * 64, "\xff"]
)
def test_a_damaged_list_is_refused_by_name(folder, text):
    (folder / "SHA256SUMS").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match="SHA256SUMS"):
        check(folder)


def test_lists_that_contradict_each_other_are_refused(folder):
    write_list(folder)
    (folder / "x.sha256").write_text(f"{'0' * 64}  {shards(folder)[0].name}\n")
    with pytest.raises(ConfigError, match="another SHA-256"):
        check(folder)


def test_the_hubs_cache_says_by_its_names_what_its_blobs_hold(folder, tmp_path, hashed):
    repo = tmp_path / "models--org--tiny"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for path in folder.iterdir():
        blob = digest(path) if path.suffix == ".safetensors" else f"{len(path.name):040x}"
        shutil.copy(path, repo / "blobs" / blob)
        os.symlink(f"../../blobs/{blob}", snapshot / path.name)
    assert check(snapshot) == {} and hashed == []
    assert len(check(snapshot, verify=True)) == len(shards(folder)) == len(hashed)
    flip_a_bit(shards(snapshot)[0].resolve())
    with pytest.raises(ConfigError, match=rf"{shards(snapshot)[0].name} is damaged"):
        check(snapshot, verify=True)


def test_what_was_verified_is_read_again_only_when_it_has_changed(folder, hashed):
    write_list(folder)
    known = check(folder)
    hashed.clear()
    assert check(folder, known=known) == known
    assert hashed == []
    flip_a_bit(shards(folder)[0])
    os.utime(shards(folder)[0], ns=(1, 1))
    with pytest.raises(ConfigError, match=shards(folder)[0].name):
        check(folder, known=known)
    assert hashed == [shards(folder)[0].name]


def test_the_server_verifies_once_before_it_starts_and_a_replica_only_what_is_not_the_same(folder, hashed):
    write_list(folder)
    config = Config.load({"model": str(folder), "device": "cpu", "tp": 2}, {})
    _, found = service.build_app(config)._bound_deployment.init_args
    assert sorted(hashed) == [p.name for p in shards(folder)]
    hashed.clear()
    service.check(config, found)
    assert hashed == []
    flip_a_bit(shards(folder)[0])
    with pytest.raises(ConfigError, match=rf"{shards(folder)[0].name} is damaged"):
        service.check(config, found)


def test_the_offline_engine_refuses_a_damaged_shard_before_it_loads(folder):
    write_list(folder)
    flip_a_bit(shards(folder)[-1])
    with pytest.raises(ConfigError, match=rf"{shards(folder)[-1].name} is damaged"):
        OfflineEngine(Config.load({"model": str(folder), "device": "cpu"}, {}))
