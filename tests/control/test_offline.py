"""The engine in this process: what it makes of its options, without a model."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from tests.fakes import FakeExecutor, expected_tokens, tiny_capacity
from tpqwen import offline
from tpqwen.config import Config
from tpqwen.engine.deadlines import FIRST_COMPILED_STEP_S, FIRST_STEP_S
from tpqwen.offline import OfflineEngine
from tpqwen.request import GenerateRequest, SamplingParams


@pytest.mark.parametrize(("device", "allowed_s"), [("cpu", FIRST_STEP_S), ("cuda", FIRST_COMPILED_STEP_S)])
def test_ranks_on_gpus_get_the_time_to_compile(monkeypatch: pytest.MonkeyPatch, device: str, allowed_s: float) -> None:
    executor = FakeExecutor(tiny_capacity())
    monkeypatch.setattr(offline, "resolve_device", lambda _: device)
    monkeypatch.setattr(OfflineEngine, "_make_executor", lambda _: executor)
    engine = OfflineEngine(Config.load({}, {}))
    request = GenerateRequest(id="a", prompt_ids=[1, 2, 3], params=SamplingParams(), max_tokens=4, seed=1)
    found = [t for deltas in engine.run([request]) for delta in deltas for t in delta.token_ids]
    assert found == expected_tokens(request, 4)
    assert executor.timeouts[0] == allowed_s


@pytest.mark.parametrize(
    ("given", "mode", "has_token"),
    [
        ({}, "token", True),
        ({"RAY_AUTH_MODE": "disabled"}, "disabled", False),
        ({"RAY_AUTH_TOKEN_PATH": "/a/token"}, "token", False),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, None, False),
    ],
)
def test_a_ray_of_ones_own_is_guarded_by_a_token_before_ray_is_imported(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], mode: str | None, has_token: bool
) -> None:
    seen: dict[str, str] = {}

    def imported(name: str) -> SimpleNamespace:
        assert name == "tpqwen.executor.ray"
        seen.update(os.environ)
        return SimpleNamespace(RayExecutor=lambda *_: FakeExecutor(tiny_capacity()))

    for name in [n for n in os.environ if n.startswith("RAY_")]:
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # so that it is taken back afterwards
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", given.get("RAY_AUTH_MODE", ""))
    if "RAY_AUTH_MODE" not in given:
        monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    monkeypatch.setattr(offline, "import_module", imported)
    OfflineEngine(Config.load({"tp": 2, "device": "cpu"}, {}))
    assert seen.get("RAY_AUTH_MODE") == mode
    assert ("RAY_AUTH_TOKEN" in seen) == has_token
    assert not has_token or len(seen["RAY_AUTH_TOKEN"]) == 64
