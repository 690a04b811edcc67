"""A GPU's rank leaves a group whose collective hangs: the abort frees the step that is stuck behind it, the weights
stay, and nothing that was computed after it is answered. Everything but the device and NCCL is as in service."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.tiny import tiny_checkpoint
from tpqwen.config import Config
from tpqwen.executor import rank_process
from tpqwen.executor.rank import serve_steps
from tpqwen.executor.rank_process import RankProcess
from tpqwen.offline import OfflineEngine
from tpqwen.parallel import group as group_module
from tpqwen.parallel.group import TPGroup
from tpqwen.request import SamplingParams
from tpqwen.step import Admit, Chunk, RowParams, StepInput, encode, packed
from tpqwen.transport.channel import QueueChannel
from tpqwen.worker.worker import Worker

PATIENCE_S = 30.0
PARAMS = RowParams(0.0, 0, 1.0, 0.0, 0, 0, logprobs=2)
CHUNK = Chunk(0, 0, packed([1, 2, 3]), True)
STEP = encode(StepInput(0, 0, (Admit(0, PARAMS, 0, 3),), packed([[0, 0, 1]]), (CHUNK,), packed([])))


class Nccl:
    """Stands for the library and the device: a step that begins to wait goes on once the abort begins, and the abort
    ends once the graphs are gone."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.stuck, self.released, self.graphs_gone = (threading.Event() for _ in range(3))

    def abort(self) -> None:
        self.order.append("abort begins")
        self.released.set()
        assert self.graphs_gone.wait(PATIENCE_S)
        self.order.append("abort ends")

    def launch(self) -> None:
        """There is no room in the queue."""
        self.stuck.set()
        assert self.released.wait(PATIENCE_S)


class Rank:
    """A rank's process around a loaded worker, with the engine's end of its channels."""

    def __init__(self, engine: OfflineEngine, nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
        self.worker: Worker = engine.executor._worker  # type: ignore[attr-defined]
        self.group: TPGroup = self.worker._group
        self.process = RankProcess({"model": str(engine.folder), "device": "cuda"}, 0)
        self.process._worker, self.process._group = self.worker, self.group
        self.inbox, self.outbox = QueueChannel(), QueueChannel()
        self.process._inbox = self.inbox
        self.group._group = object()  # type: ignore[assignment]
        monkeypatch.setattr(dist, "get_backend", lambda _: "nccl")
        monkeypatch.setattr(group_module, "_abort_process_group", nccl.abort)
        monkeypatch.setattr(self.worker, "_device", torch.device("cuda"))  # on a CPU nobody is called off
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        drop = self.worker._drop_graphs

        def dropped() -> None:
            nccl.order.append("graphs")
            drop()
            nccl.graphs_gone.set()

        monkeypatch.setattr(self.worker, "_drop_graphs", dropped)

    def serve(self) -> None:
        """Run steps in a thread, as in service."""

        def steps() -> None:
            serve_steps(self.worker, self.inbox, self.outbox, epoch=0, answers=True)

        self.process._steps = threading.Thread(target=steps, daemon=True)
        self.process._steps.start()

    def answers(self) -> list[bytes]:
        """All that was sent before the end."""
        found = []
        try:
            while (data := self.outbox.recv(0.0)) is not None:
                found.append(data)
        except ConnectionError:
            pass
        return found


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[OfflineEngine]:
    made = OfflineEngine(Config.load({"model": str(tiny_checkpoint(tmp_path)), "device": "cpu", "max_num_seqs": 4}, {}))
    yield made
    made.close()


@pytest.fixture
def nccl() -> Iterator[Nccl]:
    made = Nccl()
    yield made
    made.released.set()
    made.graphs_gone.set()


@pytest.fixture
def rank(engine: OfflineEngine, nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    made = Rank(engine, nccl, monkeypatch)
    yield made
    made.group._group = None


def tokens_of(engine: OfflineEngine) -> list[int]:
    request = engine.request([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
    return [t for deltas in engine.run([request]) for d in deltas for t in d.token_ids]


def stuck_in_sampling(rank: Rank, nccl: Nccl, after: Callable[[], object]) -> None:
    """The next pass is stuck in its sampling and does `after` when it has come out."""
    sample = rank.worker.runner.sampler.sample

    def wrapped(*given: Any) -> Any:
        nccl.launch()
        after()
        return sample(*given)

    rank.worker.runner.sampler.sample = wrapped  # type: ignore[method-assign]


@pytest.mark.parametrize("hung", [False, True])
@pytest.mark.parametrize("ends", ["at a collective", "at its answer"])
def test_a_step_that_is_stuck_is_freed_and_the_weights_stay(
    engine: OfflineEngine,
    nccl: Nccl,
    hung: bool,
    ends: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    expected = tokens_of(engine)
    rank = Rank(engine, nccl, monkeypatch)
    weight = rank.worker.runner.model.lm_head.weight.data_ptr()
    x = torch.ones(2)
    stuck_in_sampling(rank, nccl, (lambda: rank.group.all_reduce(x)) if ends == "at a collective" else lambda: None)
    rank.serve()
    rank.inbox.send(STEP, 1.0)
    assert nccl.stuck.wait(PATIENCE_S)
    assert rank.process.leave(PATIENCE_S, hung)
    assert nccl.order == ["abort begins", "graphs", "abort ends"], "graphs go while the abort waits for them"
    assert "NCCL is aborted under this rank's step, which is in wait" in capfd.readouterr().err
    assert rank.answers() == [], "what comes after an abort means nothing"
    assert rank.group._group is None
    monkeypatch.undo()
    del rank.worker.runner.sampler.sample  # type: ignore[method-assign]
    rank.worker.rejoined()
    engine.core.restart(0, engine.core.capacity)
    assert rank.worker.runner.model.lm_head.weight.data_ptr() == weight
    assert tokens_of(engine) == expected


def test_an_answer_that_was_there_before_is_sent(rank: Rank, nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_process, "ABORT_AFTER_S", PATIENCE_S)  # a step ends in time on the busiest machine
    rank.serve()
    rank.inbox.send(STEP, 1.0)
    assert rank.outbox.recv(PATIENCE_S) is not None
    assert rank.process.leave(PATIENCE_S, hung=False)
    assert nccl.order == ["graphs", "abort begins", "abort ends"], "nothing was stuck, so nothing is aborted under it"


def test_an_abort_that_does_not_come_back_costs_the_rank_in_time(
    rank: Rank, nccl: Nccl, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nccl.graphs_gone, "set", lambda: None)  # it waits for something else
    stuck_in_sampling(rank, nccl, lambda: None)
    rank.serve()
    rank.inbox.send(STEP, 1.0)
    assert nccl.stuck.wait(PATIENCE_S)
    begin = time.monotonic()
    assert not rank.process.leave(5.0, hung=False)
    assert time.monotonic() - begin < 20
    assert "cannot leave its group, for it is in release (group.py" in caplog.text
    assert rank.answers() == []
    monkeypatch.undo()


def test_the_rank_that_hangs_is_not_kept_for_being_aborted(
    rank: Rank, nccl: Nccl, caplog: pytest.LogCaptureFixture
) -> None:
    end = threading.Event()

    def hangs() -> None:
        end.wait(PATIENCE_S)

    stuck_in_sampling(rank, nccl, hangs)
    nccl.released.set()
    rank.serve()
    rank.inbox.send(STEP, 1.0)
    assert nccl.stuck.wait(PATIENCE_S)
    begin = time.monotonic()
    assert not rank.process.leave(PATIENCE_S, hung=True)
    assert time.monotonic() - begin < 10, "that is known at once"
    assert nccl.order == ["abort begins"]
    assert "in hangs (test_leave.py" in caplog.text
    end.set()


def test_what_an_abort_lets_through_ends_when_called_off(monkeypatch: pytest.MonkeyPatch) -> None:
    group = TPGroup(0, 2, object())  # type: ignore[arg-type]

    def aborted(*_: object, group: object) -> None:
        raise RuntimeError("NCCL communicator was aborted on rank 0")

    monkeypatch.setattr(dist, "all_reduce", aborted)
    with pytest.raises(RuntimeError, match="aborted"):
        group.all_reduce(torch.ones(1))

    def called_off(*_: object, group: TPGroup = group) -> bool:
        group.called_off = True
        return True

    with pytest.raises(ConnectionError):
        group.wait_until(called_off)
    group.called_off = False
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: called_off() and aborted(group=None))
    with pytest.raises(ConnectionError, match="rank 0 of 2 leaves its group"):
        group.all_reduce(torch.ones(1))
    assert not group.in_collective


GPU_KINDS = (
    SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=12, ignore_eos=True),
    SamplingParams(
        temperature=0.9, seed=2, frequency_penalty=0.5, repetition_penalty=1.2, max_tokens=12, ignore_eos=True
    ),
    SamplingParams(temperature=0.0, logprobs=3, prompt_logprobs=2, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=3, min_tokens=6, logit_bias={5: 2.0, 70: -9.0}, max_tokens=12),
    SamplingParams(temperature=0.7, top_k=20, seed=4, max_tokens=12, ignore_eos=True),
)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # which torch calls a prototype
@pytest.mark.parametrize("deterministic", [False, True])
def test_no_launch_of_a_step_waits_for_the_device(deterministic: bool) -> None:
    """torch raises where a copy from or to memory that is not pinned, or a look at a value, makes the host wait."""
    options = {"device": "cuda", "max_num_seqs": 8, "max_batched_tokens": 64, "prefix_cache": False}
    engine = OfflineEngine(Config.load({**options, "deterministic": deterministic}, {}))
    worker: Worker = engine.executor._worker  # type: ignore[attr-defined]

    def answer() -> None:
        requests = [engine.request(list(range(3, 23 + i)), p) for i, p in enumerate(GPU_KINDS * 2)]
        assert all(d.error is None for deltas in engine.run(requests) for d in deltas)

    answer()  # compiles, captures and makes buffers, which may wait
    submit = worker.submit

    def strictly(step: StepInput) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            submit(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    worker.submit = strictly  # type: ignore[method-assign]
    answer()
    engine.close()
