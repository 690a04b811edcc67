"""The engine in this process: what it makes of its options, without a model."""

from __future__ import annotations

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
