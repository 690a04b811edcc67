"""Every kind of request through the loss of its ranks and then of its engine: complete, right, and ended once."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from tests.control.test_engine_client import deltas_of, request, run, tokens_of, until
from tests.control.test_engine_repair import Engine, Owner
from tests.control.test_thinking_budget import budget, expected
from tests.fakes import expected_tokens, hashed_token, tiny_capacity
from tpqwen.engine.messages import Dead, Resume
from tpqwen.errors import RankDied
from tpqwen.request import Delta, FinishReason, GenerateRequest, Guide, Pooling, SamplingParams
from tpqwen.step import ints


def mixture(random: Random) -> list[GenerateRequest]:
    """Some of each kind, in random order and sizes; long prompts take several steps."""
    made: list[GenerateRequest] = []
    for i in range(3):
        prompt, tokens = random.randrange(2, 60), random.randrange(1, 25)
        scored = SamplingParams(prompt_logprobs=1, logprobs=0)
        made += [
            request(f"plain{i}", prompt, tokens),
            GenerateRequest(
                id=f"scored{i}", prompt_ids=list(range(3, 3 + prompt)), params=scored, max_tokens=tokens, seed=i
            ),
            request(f"embedded{i}", prompt, 0, pooling=Pooling()),
            GenerateRequest(
                id=f"thinks{i}",
                prompt_ids=list(range(5, 5 + prompt)),
                params=SamplingParams(logprobs=0),
                max_tokens=tokens,
                seed=i,
                thinking=budget(random.randrange(1, 9), inside=True),
            ),
            request(f"guided{i}", prompt, tokens, guide=Guide(calls=0)),
        ]
    random.shuffle(made)
    return made


def check(one: GenerateRequest, deltas: list[Delta]) -> None:
    tokens, prompt = tokens_of(deltas), list(one.prompt_ids)
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    scores = [d.prompt_logprobs for d in deltas if d.prompt_logprobs]
    assert all(len(d.logprobs) == len(d.token_ids) for d in deltas if d.logprobs)
    if one.thinking is not None:
        assert tokens == expected(one, hashed_token)
    elif one.max_tokens:
        assert tokens == expected_tokens(one, one.max_tokens)
    else:
        assert [ints(d.pooled).tolist() for d in deltas if d.pooled] == [prompt]
    if one.params.prompt_logprobs is not None:
        assert [[-int(s.logprob) for s in told] for told in scores] == [prompt[1:]]
        assert sum(len(d.logprobs or ()) for d in deltas) == len(tokens)


@pytest.mark.parametrize("seed", range(12))
def test_every_kind_survives_its_ranks_and_then_its_engine(seed: int) -> None:
    async def main() -> None:
        random = Random(seed)
        first = Engine({random.randrange(1, 15): RankDied("rank 1 died", rank=1)})
        owner = Owner(first)
        requests = mixture(random)
        tasks = [asyncio.create_task(deltas_of(owner.client, r)) for r in requests]
        leaver = asyncio.create_task(deltas_of(owner.client, request("leaves", 50, 40)))
        await owner.fault()
        first.executor.faults[first.executor.num_collected + random.randrange(1, 15)] = ZeroDivisionError("a bug")
        owner.client.send(Resume(1, tiny_capacity(), []))
        if random.random() < 0.5:
            leaver.cancel()
        assert isinstance(await owner.fault(), Dead)
        owner.client.degrade("the engine restarting")
        owner.client.detach()
        leaver.cancel()
        await asyncio.wait([leaver])
        second = Engine(epoch=2)
        owner.client.reattach(second.commands, second.reports, tiny_capacity())
        owner.client.send(Resume(2, tiny_capacity(), []))
        for one, deltas in zip(requests, await asyncio.gather(*tasks), strict=True):
            check(one, deltas)
        await until(lambda: any(r.epoch == 2 for r in owner.resumed))
        await until(lambda: not second.loop._core.has_work)
        second.loop._core.scheduler.check()
        for admit in (a for engine in (first, second) for step in engine.executor.steps for a in step.admits):
            assert len(ints(admit.output)) == (admit.out_index if admit.guide is not None else 0)
        assert owner.client.num_open == 0
        gate = owner.client._gate
        assert (gate._all.requests, gate._all.tokens, gate._tenants) == (0, 0, {})
        await owner.client.close()
        for engine in (first, second):
            engine.commands.close()
            await asyncio.to_thread(engine.thread.join, 10)

    run(main)
