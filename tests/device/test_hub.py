"""A model's name to a folder, offline, with a cache laid out as huggingface_hub does it."""

from __future__ import annotations

import os

import pytest
from huggingface_hub import constants

from tpqwen.errors import ConfigError
from tpqwen.model.hub import resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A cache that holds org/tiny at COMMIT, named main."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "models--org--tiny"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "blobs" / "aa").write_text("{}")
    os.symlink("../../blobs/aa", snapshot / "config.json")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_folder_is_taken_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        resolve_model(str(tmp_path))


def test_path_that_does_not_exist_is_not_looked_up_in_the_hub(tmp_path):
    with pytest.raises(ConfigError, match="not a folder"):
        resolve_model(str(tmp_path / "absent"))


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_cached_snapshot_is_found_offline(hub_cache, revision):
    assert resolve_model("org/tiny", revision) == hub_cache


def test_unknown_revision_offline_is_refused(hub_cache):
    with pytest.raises(ConfigError, match="org/tiny"):
        resolve_model("org/tiny", "v9")


def test_model_outside_the_cache_is_refused_offline(hub_cache):
    with pytest.raises(ConfigError, match="org/absent"):
        resolve_model("org/absent")


@pytest.mark.parametrize("name", ["a/b/c", "no spaces here", ""])
def test_name_that_cannot_be_a_model_is_refused(hub_cache, name):
    with pytest.raises(ConfigError):
        resolve_model(name)
