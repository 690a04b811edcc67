"""A step's deltas: arrays for rows that got one token and nothing else, objects for the others."""

from __future__ import annotations

from random import Random

from tests.fakes import FakeExecutor, expected_tokens, tiny_capacity
from tpqwen.config import ScheduleOptions
from tpqwen.engine.core import EngineCore
from tpqwen.engine.messages import Batch, decode_report, encode
from tpqwen.request import Delta, Deltas, FinishReason, GenerateRequest, SamplingParams
from tpqwen.step import packed


def request(name: str, max_tokens: int = 12, **params: object) -> GenerateRequest:
    ids = list(range(1, 8))
    return GenerateRequest(id=name, prompt_ids=ids, params=SamplingParams(**params), max_tokens=max_tokens, seed=3)


def test_the_arrays_read_as_deltas_before_the_others_on_both_sides_of_the_wire() -> None:
    end = Delta(id="b", index=8, token_ids=[], finish_reason=FinishReason.ABORT)
    batch = Batch(Deltas(["a", "b"], packed([4, 7]), packed([11, -1]), [end]))
    expected = [Delta(id="a", index=4, token_ids=[11]), Delta(id="b", index=7, token_ids=[-1]), end]
    assert list(batch.deltas) == expected and len(batch.deltas) == 3
    sent = decode_report(encode(batch))
    assert isinstance(sent, Batch) and list(sent.deltas) == expected
    assert not Deltas() and list(decode_report(encode(Batch(Deltas()))).deltas) == []  # type: ignore[union-attr]


def test_a_row_gets_an_object_only_when_there_is_more_to_say_than_its_token() -> None:
    capacity = tiny_capacity(max_batched_tokens=64)
    core = EngineCore(FakeExecutor(capacity, depth=1), capacity, prefix_cache=False)
    for r in (request("plain"), request("scored", logprobs=0), request("short", max_tokens=3)):
        core.add(r)
    steps = [core.step().deltas for _ in range(12)]
    assert not core.has_work
    assert [sorted(d.ids) for d in steps[:4]] == [[], ["plain", "short"], ["plain"], ["plain"]]
    assert [d.id for d in steps[2].others] == ["scored", "short"]
    assert steps[2].others[1].finish_reason is FinishReason.LENGTH
    assert steps[-1].ids == [] and {d.id for d in steps[-1].others} == {"plain", "scored"}
    scored = [d for step in steps for d in step if d.id == "scored"]
    assert all(d.logprobs is not None and len(d.logprobs) == 1 for d in scored) and len(scored) == 12


def test_tokens_of_a_crowd_that_changes_all_the_time_arrive_in_order() -> None:
    """Rows leave in the middle of steps in flight, so arrays are cut while others' tokens go on."""
    random = Random(5)
    capacity = tiny_capacity(num_blocks=129, max_batched_tokens=128, max_num_seqs=16)
    core = EngineCore(FakeExecutor(capacity, depth=3), capacity, ScheduleOptions(depth=3))
    requests = {f"r{i}": request(f"r{i}", random.randint(1, 40)) for i in range(60)}
    outputs: dict[str, list[int]] = {name: [] for name in requests}
    waiting = list(requests.values())
    arrays = 0
    while waiting or core.has_work:
        for r in waiting[:2]:
            core.add(r)
        del waiting[:2]
        deltas = core.step().deltas
        arrays += len(deltas.ids)
        for d in deltas:
            assert d.index == len(outputs[d.id])
            outputs[d.id] += d.token_ids
        core.scheduler.check()
    assert outputs == {name: expected_tokens(r, r.max_tokens) for name, r in requests.items()}
    assert arrays > 700
