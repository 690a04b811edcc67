"""Any process may die in mid stream and nobody's answer is lost: fp32, equal token for token to an undisturbed run.

A part of the matrix runs with every `make test`; all of it is slow, and what it found is in docs/reliability.md.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

import msgspec
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from tests.cluster.processes import title, until
from tests.faults.served import DEVICE, Served, gpu_share
from tpqwen.budget import Budget
from tpqwen.config import EMBEDDED_MODEL
from tpqwen.executor import processes
from tpqwen.executor.rank_group import RankGroup
from tpqwen.grammar import Vocabulary
from tpqwen.model.config import ModelConfig
from tpqwen.request import FinishReason, Guide, SamplingParams, ThinkingBudget
from tpqwen.structure import Schema
from tpqwen.text.schema import checked_schema

pytestmark = pytest.mark.ray

QUICK = [
    [("rank 1", "decode", 9, "kill")],
    [("rank 0", "decode", 20, "stop")],
    [("engine", "step", 15, "kill")],
    [("rank 1", "prefill", 2, "raise"), ("rank 0", "rejoin", 1, "kill")],
]
RANK_FAULTS = [
    ("prefill", 1, "kill"),
    ("prefill", 2, "kill"),
    ("decode", 1, "kill"),
    ("decode", 2, "kill"),
    ("decode", 20, "kill"),
    ("decode", 38, "kill"),
    ("prefill", 2, "stop"),
    ("decode", 10, "stop"),
    ("prefill", 2, "raise"),
    ("decode", 10, "raise"),
    ("decode", 12, "hang"),
]
ENGINE_FAULTS = [(1, "kill"), (2, "kill"), (6, "kill"), (40, "kill"), (12, "stop"), (12, "raise"), (1, "raise")]
NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99999}, "minItems": 30}
BEGIN = ("rank 1", "decode", 8, "kill")
WHOLE = [
    *([(rank, *fault)] for rank in ("rank 0", "rank 1") for fault in RANK_FAULTS),
    *([("rank 0", *fault), ("rank 1", *fault)] for fault in RANK_FAULTS if fault[0] == "decode"),
    *([("engine", "step", *fault)] for fault in ENGINE_FAULTS),
    # during the repair: the successor as it loads or joins, the survivor as it leaves or joins, the new engine
    *([BEGIN, (rank, "rejoin", 1, how)] for rank in ("rank 0", "rank 1") for how in ("kill", "stop", "raise")),
    *([BEGIN, ("rank 1", "load", 1, how)] for how in ("kill", "stop", "raise")),
    *([BEGIN, ("rank 0", "leave", 1, how)] for how in ("kill", "stop", "raise", "hang")),
    [BEGIN, ("rank 1", "load", 1, "kill"), ("rank 0", "rejoin", 1, "kill")],
    [("engine", "step", 4, "kill"), ("engine", "step", 4, "kill")],
    [("engine", "step", 20, "kill"), ("rank 0", "leave", 1, "kill")],
    [("engine", "step", 20, "kill"), ("rank 1", "rejoin", 1, "kill")],
    [("engine", "step", 20, "kill"), ("rank 0", "decode", 12, "kill"), ("rank 1", "decode", 12, "kill")],
]


def named(kills):
    return "+".join("-".join(map(str, kill)) for kill in kills)


@pytest.mark.parametrize("kills", QUICK, ids=named)
def test_no_answer_is_lost(served, kills):
    found = served.survive(*kills)
    assert any(s.resumed for s in found)


def test_a_hang_costs_the_rank_that_hangs_and_no_other(served):
    served.expected()
    before = served.pids()
    served.survive(("rank 1", "decode", 12, "hang"))
    assert [a == b for a, b in zip(before, served.pids(), strict=True)] == [True, False]


def rows_that_need_the_host(served):
    """Guided, cut off over whole rows, penalized, with log-probabilities, with a thinking budget; among plain ones."""
    vocabulary = Vocabulary(Path(EMBEDDED_MODEL), ModelConfig.from_folder(Path(EMBEDDED_MODEL)).vocab_size)
    guide = Guide(answer=vocabulary.compile(Schema(checked_schema(NUMBERS, "schema"))), end_ids=(4089,))
    marks = served.tokenizer.vocabulary.control
    think, thought = marks["<think>"], marks["</think>"]
    question = served.question("What is 17 + 25?")
    budget = ThinkingBudget(tokens=8, inside=False, open_id=think, close_id=thought, closing=(thought,))
    changes = [
        {"guide": guide},
        {"params": SamplingParams(temperature=0.8, top_p=0.9)},
        {"guide": guide, "params": SamplingParams(temperature=1.0, logprobs=2)},
        {"params": SamplingParams(temperature=0.9, min_p=0.02, frequency_penalty=0.5)},
        {"thinking": budget},
        {},
    ]
    requests = [msgspec.structs.replace(question, max_tokens=40, seed=i, **c) for i, c in enumerate(changes)]
    return [msgspec.structs.replace(r, id=f"{r.id}-{i}") for i, r in enumerate(requests)]


def test_rows_that_need_the_host_outlive_a_rank_which_alone_is_replaced(served):
    served.faults.plan()
    expected, before = served.streams(rows_that_need_the_host(served)), served.pids()
    served.faults.plan(("rank 1", "decode", 15, "kill"))
    found = served.streams(rows_that_need_the_host(served))
    assert not served.faults.pending
    served.faults.plan()
    for mine, theirs in zip(found, expected, strict=True):
        mine.assert_equals(theirs)
    assert all(s.resumed for s in found) and [len(s.tokens) for s in found[:3]] == [40, 40, 40]
    assert [a == b for a, b in zip(before, served.pids(), strict=True)] == [True, False]
    served.run(served.until_idle())


def test_an_answer_is_thought_out_to_its_right_end_over_a_kill(served):
    served.faults.plan(("rank 1", "decode", 25, "kill"))
    (found,) = served.streams([served.question("What is 17 + 25?")])
    assert not served.faults.pending
    served.faults.plan()
    assert found.resumed and found.finish_reason is FinishReason.STOP
    thought, _, answer = found.text.partition("\n</think>\n\n")
    assert thought.startswith("<think>\n") and "7 + 5 = 12" in thought
    assert answer == "17 + 25 = 42"


@pytest.mark.slow
@pytest.mark.parametrize("kills", WHOLE, ids=named)
def test_no_answer_is_lost_in_the_whole_matrix(served, kills):
    served.survive(*kills)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["rank 0", "rank 2", "rank 3"])
@pytest.mark.parametrize("fault", [("prefill", 2, "kill"), ("decode", 20, "kill"), ("decode", 10, "stop")], ids=str)
def test_no_answer_is_lost_with_four_ranks(served_by_four, rank, fault):
    served_by_four.survive((rank, *fault))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "raise", "stop"])
def test_a_start_whose_rank_dies_while_loading_is_tried_again(faults, served, how):
    expected = served.expected()
    faults.plan(("rank 1", "load", 1, how))
    with Served(faults, tp=2) as other:
        assert not faults.pending
        for mine, theirs in zip(other.streams(other.requests()), expected, strict=True):
            mine.assert_equals(theirs)


def test_a_request_in_three_crashes_ends_in_words_and_its_neighbours_finish(served):
    expected = served.expected()
    served.faults.plan(*[("rank 1", "prefill", 1, "raise")] * 3)
    requests = served.requests(3)
    found = served.streams(requests)
    assert not served.faults.pending
    served.faults.plan()
    assert [s.error_code for s in found] == ["crash_budget", None, None]
    assert "3 crashes" in (found[0].error or "")
    for mine, theirs in zip(found[1:], expected[1:], strict=False):
        mine.assert_equals(theirs)
    served.run(served.until_idle())


def test_when_repair_fails_every_stream_ends_with_the_cause_and_the_replica_is_unhealthy(faults, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED_MODEL, folder)
    with Served(faults, tp=2, model=str(folder)) as other:
        (folder / "model.safetensors").write_bytes(b"no weights")
        faults.plan(("rank 1", "decode", 8, "kill"))
        streams = other.streams(other.requests(6, max_tokens=300))
        for seen in streams:
            assert seen.error_code == "rank_dead"
            assert "rank 1 died" in (seen.error or "") and "cannot be repaired" in (seen.error or "")
        assert max(s.times[-1] for s in streams) - min(s.times[-1] for s in streams) < 0.5
        assert other.client.state.name == other.hooks.states[-1] == "dead"
        assert other.client.num_open == 0


@pytest.fixture
def placement(faults):
    """Bundles for a replica, its engine and two ranks."""
    rank = {"CPU": 0.1} | ({"GPU": gpu_share(2)} if DEVICE == "cuda" else {})
    group = placement_group([{"CPU": 0.1}, {"CPU": 0.1}, rank, rank], strategy="STRICT_PACK")
    ray.get(group.ready(), timeout=60)
    yield group
    remove_placement_group(group)


def test_a_warm_spare_takes_the_place_of_a_rank_and_is_replaced(faults, placement):
    with Served(faults, tp=2, warm_spare=True, placement=placement) as other:
        other.expected()
        group = other.supervisor.group
        actors = []
        for rank in (1, 0):
            other.run(has_spare(group))
            actors.append(group._spare[0])
            spare = ray.get(group._spare[1]).pid
            until(lambda pid=spare: title(pid) == "tpqwen spare rank", "the spare's name")
            other.survive((f"rank {rank}", "decode", 9, "kill"))
            assert group.actors[rank] is actors[-1] and group.pids()[rank] == spare
            until(lambda pid=spare, r=rank: title(pid) == f"tpqwen rank {r}/2", "its new name")
            assert other.hooks.recoveries[-1]["start"] < 1.0, "nothing had to be imported"
        other.run(has_spare(group))
        pids = [ray.get(group._spare[1]).pid, *group.pids()]
    until(lambda: all(processes.is_gone(pid) for pid in pids), "the end of all ranks and of the spare")


async def has_spare(group: RankGroup) -> None:
    """Wait until a spare process has started."""
    while not ray.wait([group._spare[1]], timeout=0)[0]:
        await asyncio.sleep(0.05)


@pytest.mark.slow
def test_an_engine_that_lives_and_says_nothing_is_replaced(faults):
    with Served(faults, tp=2, silence_s=5.0) as other:
        other.survive(("engine", "step", 12, "hang"))
        other.survive(("rank 1", "decode", 8, "kill"), ("engine", "resume", 1, "hang"))  # while it is degraded


@pytest.mark.slow
def test_too_many_repairs_are_the_end(faults):
    with Served(faults, tp=2, budgets={"repairs": Budget(2)}) as other:
        faults.plan(*[("rank 1", "decode", 5, "kill")] * 3)
        begin = time.monotonic()
        for seen in other.streams(other.requests(6, max_tokens=300)):
            assert seen.error_code == "rank_dead" and "too often" in (seen.error or "")
        assert other.client.state.name == "dead"
        assert time.monotonic() - begin < 60


def test_a_budget_counts_within_its_window():
    budget = Budget(2, window_s=10)
    assert [budget.take(now) for now in (0, 1, 2, 9.9, 10.5, 10.6, 11.5)] == [
        True,
        True,
        False,
        False,
        True,
        False,
        True,
    ]
