"""Ranks as Ray actors on the CPU with gloo: equal tokens at every degree, names, deaths, refusals, nothing left."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from tests.cluster.processes import title, until
from tpqwen.bench import compare
from tpqwen.config import Config
from tpqwen.engine.core import EngineCore
from tpqwen.errors import ConfigError, EngineError, RankDied
from tpqwen.executor import ray as ray_executor
from tpqwen.executor.local import LocalExecutor
from tpqwen.executor.protocol import Executor
from tpqwen.executor.rank_group import RankGroup
from tpqwen.executor.ray import RayExecutor
from tpqwen.offline import OfflineEngine
from tpqwen.request import GenerateRequest, SamplingParams

pytestmark = pytest.mark.ray


def config_for(folder: Path, tp: int) -> Config:
    return Config.load(
        {
            "model": str(folder),
            "tp": tp,
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
            "block_size": 16,
            "num_kv_blocks": 65,
            "max_num_seqs": 8,
            "max_batched_tokens": 64,
            "max_model_len": 256,
        },
        {},
    )


def request(index: int, prompt: int, max_tokens: int, temperature: float) -> GenerateRequest:
    ids = [(7 * index + 3 * i) % 300 + 3 for i in range(prompt)]
    params = SamplingParams(temperature=temperature)
    return GenerateRequest(id=f"r{index}", prompt_ids=ids, params=params, max_tokens=max_tokens, seed=index)


REQUESTS = [request(0, 5, 30, 0.0), request(1, 150, 20, 0.0), request(2, 17, 40, 0.9), request(3, 1, 10, 0.0)]


@contextmanager
def started(executor: Executor) -> Iterator[EngineCore]:
    try:
        capacity = executor.start()
        yield EngineCore(executor, capacity, epoch=getattr(executor, "epoch", 0))
    finally:
        executor.stop()


def run_all(core: EngineCore) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {r.id: [] for r in REQUESTS}
    for one in REQUESTS:
        core.add(one)
    while core.has_work:
        for delta in core.step().deltas:
            assert delta.error is None
            tokens[delta.id] += delta.token_ids
    return tokens


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, list[int]]:
    with started(LocalExecutor(config_for(checkpoint, 1), checkpoint)) as core:
        return run_all(core)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_degree_gives_the_tokens_of_one_process(ray_cluster, checkpoint, expected, tp):
    executor = RayExecutor(config_for(checkpoint, tp), checkpoint)
    with started(executor) as core:
        found = executor.ranks.pids()
        for rank, pid in enumerate(found):
            until(lambda pid=pid, rank=rank: title(pid) == f"tpqwen rank {rank}/{tp}", "the rank's title")
        assert run_all(core) == expected
        stats = executor.stats()
        assert [(s.rank, s.pid, s.device) for s in stats] == [(r, pid, "cpu") for r, pid in enumerate(found)]
        peaks = executor.peak_memory()
        assert len(peaks) == tp and min(peaks) > 50 << 20, "each rank's own, which has imported torch"
    for pid in found:
        until(lambda pid=pid: not title(pid).startswith("tpqwen"), "the rank's end")


@pytest.mark.parametrize("given", ["10.0.0.1:6379", None])
def test_ray_is_started_for_this_process_alone_unless_an_address_is_given(monkeypatch, checkpoint, given):
    """Without one, Ray's own default joins whatever `ray start` has left on this machine."""
    asked: dict[str, object] = {}
    monkeypatch.setenv("RAY_ADDRESS", given or "")
    if given is None:
        monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr(ray_executor.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray_executor.ray, "init", lambda **options: asked.update(options))
    monkeypatch.setattr(ray_executor, "RankGroup", lambda *_: None)
    RayExecutor(config_for(checkpoint, 2), checkpoint)
    assert asked["address"] == (given or "local")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_step_within_a_second_and_is_named(ray_cluster, checkpoint, victim):
    executor = RayExecutor(config_for(checkpoint, 2), checkpoint)
    with started(executor) as core:
        core.add(request(0, 5, 200, 0.0))
        core.step()
        os.kill(executor.ranks.pids()[victim], signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(RankDied, match=f"rank {victim} died") as caught:
            step_on(core)
        assert caught.value.rank == victim
        assert time.monotonic() - begin < 1.0
        reason = asyncio.run(asyncio.wait_for(executor.ranks.wait_for_end(victim), 5))
        assert reason is not None and reason.startswith(f"rank {victim} died")
        core.fail(caught.value)
        assert [d.error_code for d in core.take_deltas()] == ["rank_dead"]


@pytest.mark.parametrize("victim", [0, 1])
def test_the_offline_engine_replaces_a_killed_rank_and_goes_on(ray_cluster, checkpoint, expected, victim):
    engine = OfflineEngine(config_for(checkpoint, 2))
    try:
        tokens: dict[str, list[int]] = {r.id: [] for r in REQUESTS}
        for number, deltas in enumerate(engine.run(REQUESTS)):
            for delta in deltas:
                assert (delta.error, delta.index) == (None, len(tokens[delta.id]))
                tokens[delta.id] += delta.token_ids
            if number == 9:
                os.kill(engine.executor.ranks.pids()[victim], signal.SIGKILL)
        assert tokens == expected
        assert engine.executor.epoch == 2
    finally:
        engine.close()


def step_on(core: EngineCore) -> None:
    while core.has_work:
        core.step()


def test_a_rank_that_refuses_ends_the_start_at_once_in_its_own_words(ray_cluster, checkpoint, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    begin = time.monotonic()
    executor = RayExecutor(config_for(broken, 2), broken)
    with pytest.raises(ConfigError):
        executor.start()
    assert time.monotonic() - begin < 60
    assert executor.stats() == []
    executor.stop()


def test_a_rank_that_dies_while_loading_ends_the_start(ray_cluster, checkpoint):
    group = RankGroup(config_for(checkpoint, 2), checkpoint)
    found = [where.pid for where in ray.get([actor.where.remote() for actor in group.actors])]
    os.kill(found[1], signal.SIGKILL)
    with pytest.raises(EngineError, match="rank 1"):
        group.load()
    group.stop()
    until(lambda: not title(found[0]).startswith("tpqwen"), "the survivor's end")


def test_compare_runs_its_methods_on_several_ranks_and_counts_the_memory_of_all(ray_cluster, checkpoint, capfd):
    """Naive passes go to the ranks past the scheduler."""
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    args = parser.parse_args(["--requests", "3", "--tokens", "4", "--naive-requests", "2", "--lengths", ""])
    assert compare.run(args, config_for(checkpoint, 2)) == 0
    rows = [line.split("│") for line in capfd.readouterr().out.splitlines() if line.count("│") > 5]
    assert [row[1].strip() for row in rows] == ["naive", "cached", "batched"]
    assert all(int(row[5]) > 100 for row in rows), "two processes that have imported torch"
