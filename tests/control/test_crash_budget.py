"""Requests that may be what crashes the ranks: alone after two crashes, ended with the third."""

from __future__ import annotations

from tests.control.test_scheduler import Pair, request
from tests.fakes import expected_tokens, tiny_capacity
from tpqwen.request import Delta, FinishReason


def crash(pair: Pair, epoch: int) -> list[Delta]:
    pair.executor.restart(epoch)
    deltas = pair.scheduler.reset(epoch, pair.scheduler.capacity)
    pair.deltas += deltas
    pair.scheduler.check()
    return deltas


def test_who_ran_in_two_crashes_runs_alone_and_a_third_ends_it_in_words() -> None:
    pair = Pair(tiny_capacity(max_num_seqs=4, num_blocks=60, max_batched_tokens=64))
    pair.add(request("a", 6, 9), request("b", 6, 9))
    pair.step()
    assert crash(pair, 1) == []
    pair.step()
    assert crash(pair, 2) == []
    pair.add(request("new", 6, 9), request("newer", 6, 9))
    step = pair.step()
    assert [a.slot for a in step.admits] == [0]  # a; b, and what came after b, wait until it has ended
    assert [d.id for d in crash(pair, 3)] == ["a"]
    ended = pair.deltas[-1]
    assert (ended.finish_reason, ended.error_code) == (FinishReason.ERROR, "crash_budget")
    assert "3 crashes" in (ended.error or "")
    step = pair.step()
    assert [a.num_prompt + a.out_index for a in step.admits] == [len(request("b", 6).prompt_ids) + 2]
    while "b" not in {d.id for d in pair.deltas if d.finish_reason}:
        assert pair.step().admits in ((), step.admits)
    assert len(pair.step().admits) == 2
    pair.run()
    for name in ("b", "new", "newer"):
        assert pair.tokens(name) == expected_tokens(request(name, 6, 9), 9)


def test_a_resubmitted_request_brings_its_crashes_along() -> None:
    pair = Pair()
    pair.add(request("a", 6, 9), request("b", 6, 9, crashes=2))
    assert len(pair.step().admits) == 1
    delta = pair.scheduler.add(request("c", 6, 9, crashes=3, output_ids=[5]), 0.0)
    assert delta is not None
    assert (delta.index, delta.error_code) == (1, "crash_budget")
    pair.run()
    assert [d.id for d in pair.deltas if d.finish_reason] == ["a", "b"]
