"""Requests that ask about their prompt, and choices that share it, in the scheduler."""

from __future__ import annotations

from tests.control.test_scheduler import ROOMY, Pair, request
from tests.fakes import tiny_capacity
from tpqwen.request import FinishReason, Pooling, SamplingParams
from tpqwen.step import ints

SCORED = SamplingParams(prompt_logprobs=1)


def test_scores_of_all_prompt_tokens_come_once_with_the_first_token() -> None:
    pair = Pair(tiny_capacity(num_blocks=200, max_batched_tokens=5))
    pair.add(request("a", 12, 3, params=SCORED))
    deltas = pair.run()
    prompt = request("a", 12).prompt_ids
    assert [-int(s.logprob) for s in deltas[0].prompt_logprobs or ()] == prompt[1:]
    assert [s.top_ids[0] for s in deltas[0].prompt_logprobs or ()] == list(range(11))
    assert [d.prompt_logprobs for d in deltas[1:]] == [None, None]


def test_scores_are_complete_after_a_prefix_hit_and_after_preemption() -> None:
    pair = Pair(tiny_capacity(num_blocks=9, max_batched_tokens=8))
    pair.add(request("old", list(range(12)), 1))
    pair.run()
    pair.add(request("first", 4, 20, priority=0), request("b", list(range(12)), 12, params=SCORED, priority=1))
    deltas = [d for d in pair.run() if d.id == "b"]
    assert [-int(s.logprob) for s in deltas[0].prompt_logprobs or ()] == list(range(1, 12))
    assert deltas[0].cached_tokens == 0


def test_scoring_that_is_interrupted_in_the_middle_begins_anew() -> None:
    pair = Pair(tiny_capacity(num_blocks=9, max_batched_tokens=4))
    pair.add(request("low", list(range(24)), 2, params=SCORED, priority=1))
    pair.step()
    pair.step()
    pair.scheduler.reset(1, pair.scheduler.capacity)
    pair.executor.restart(1)
    deltas = pair.run()
    assert [-int(s.logprob) for s in deltas[0].prompt_logprobs or ()] == list(range(1, 24))


def test_a_prompt_alone_ends_without_tokens_even_when_it_fills_the_context() -> None:
    pair = Pair()
    full = ROOMY.max_model_len
    pair.add(request("a", full, 0, pooling=Pooling()), request("b", 5, 0, params=SCORED))
    deltas = {d.id: d for d in pair.run()}
    for delta in deltas.values():
        assert (delta.token_ids, delta.finish_reason, delta.index) == ([], FinishReason.LENGTH, 0)
    assert ints(deltas["a"].pooled or b"").tolist() == request("a", full).prompt_ids
    assert len(deltas["b"].prompt_logprobs or ()) == 4
    assert pair.scheduler.step_stats(0.0, 0.0, None, 0.0).output_tokens == 0


def test_a_prompt_alone_that_no_longer_fits_after_a_reset_ends_and_holds_nobody_up() -> None:
    pair = Pair(tiny_capacity(num_blocks=11))
    pair.add(request("long", 40, 0, pooling=Pooling()), request("fits", 36, 0, pooling=Pooling()))
    pair.add(request("short", 5, 3))
    pair.step()
    deltas = pair.scheduler.reset(1, tiny_capacity(num_blocks=10))
    assert [(d.id, d.error_code) for d in deltas] == [("long", "context_length_exceeded")]
    pair.executor.restart(1)
    assert {d.id for d in pair.run() if d.finish_reason is FinishReason.LENGTH} == {"fits", "short"}


def test_choices_of_one_prompt_share_its_blocks_and_compute_it_once() -> None:
    pair = Pair(ROOMY)  # blocks of 4 tokens
    prompt, choices = list(range(100, 141)), 4  # 10 full blocks and one token
    pair.add(*(request(f"c{i}", prompt, 4, choice=i, params=SCORED) for i in range(choices)))
    computed = used = 0
    while pair.scheduler.has_work:
        computed += pair.step().num_chunk_tokens
        used = max(used, pair.scheduler.pool.num_used)
    assert computed == 40 + choices  # the last token is each choice's own: its logits are drawn from
    assert used == 10 + choices  # one of each choice's own: its last prompt token and what it wrote
    firsts = {d.id: d for d in reversed(pair.deltas)}
    assert [firsts[f"c{i}"].prompt_logprobs is not None for i in range(choices)] == [True, False, False, False]
