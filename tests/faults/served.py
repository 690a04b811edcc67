"""A supervised engine on Ray without HTTP, streams of every kind through it, and faults planned by event."""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpqwen.budget import Budget
from tpqwen.config import EMBEDDED_MODEL, Config
from tpqwen.engine.client import EngineClient
from tpqwen.gpu import count_gpus
from tpqwen.recovery import Supervisor
from tpqwen.request import Delta, FinishReason, GenerateRequest, SamplingParams, TokenLogprob
from tpqwen.step import StepStats
from tpqwen.text.pipeline import OutputText
from tpqwen.text.sequences import Limits, expand
from tpqwen.text.tokenizer import Tokenizer

DEVICE = os.environ.get("TPQWEN_FAULTS_DEVICE", "cpu")
PATIENCE = 5 if DEVICE == "cuda" else 1  # kernels are compiled and graphs captured when first used
SIZES = {"block_size": 16, "num_kv_blocks": 400, "max_num_seqs": 16, "max_batched_tokens": 64, "max_model_len": 512}
PROMPTS = ["Once upon a time", "one two three four", "Count to ten:", "The quick brown fox jumps over"]


def gpu_share(tp: int) -> float:
    """For each rank: one GPU where there are enough; else as little as leaves room for a second group."""
    return 1.0 if count_gpus() >= tp else count_gpus() / (2 * tp)


class Faults:
    """Writes plans and knows which have come true."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._planned: list[str] = []

    def plan(self, *faults: tuple[str, str, int, str]) -> None:
        """(who, event, at, how) each; they replace what was planned before. See injection/sitecustomize.py."""
        entries = []
        self._planned = []
        for who, event, at, how in faults:
            self._number += 1
            self._planned.append(f"fault-{self._number}")
            entries.append({"id": self._planned[-1], "who": who, "event": event, "at": at, "how": how})
        new = self._folder / "new.json"
        new.write_text(json.dumps(entries))
        new.rename(self._folder / "plan.json")

    @property
    def pending(self) -> list[str]:
        """Planned and not fired."""
        return [name for name in self._planned if not (self._folder / f"{name}.fired").exists()]


@dataclass
class Stream:
    """All that a client saw of one request."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    error_code: str | None = None
    resumed: int = 0
    times: list[float] = field(default_factory=list)

    @property
    def longest_gap_s(self) -> float:
        """Of silence between two deltas."""
        return max((b - a for a, b in zip(self.times, self.times[1:], strict=False)), default=0.0)

    def assert_equals(self, other: Stream) -> None:
        """The same tokens, text, end and (but for rounding) log-probabilities."""
        assert self.error is None and other.error is None
        assert (self.tokens, self.text, self.finish_reason) == (other.tokens, other.text, other.finish_reason), (
            self,
            other,
        )
        assert len(self.logprobs) == len(other.logprobs)
        for mine, theirs in zip(self.logprobs, other.logprobs, strict=True):
            assert mine.top_ids == theirs.top_ids
            assert math.isclose(mine.logprob, theirs.logprob, abs_tol=1e-3)


class Recorder:
    """The metrics' side: recoveries with their stages, and the last step's numbers."""

    def __init__(self) -> None:
        self.recoveries: list[dict[str, float]] = []
        self.states: list[str] = []
        self.last: StepStats | None = None

    def observe(self, stats: StepStats) -> None:
        self.last = stats

    def recovered(self, seconds: dict[str, float]) -> None:
        self.recoveries.append(dict(seconds))

    def engine_state(self, name: str) -> None:
        self.states.append(name)


class Served:
    """One supervisor and its event loop. The budgets are lifted unless given: a module's tests repair many times."""

    def __init__(
        self,
        faults: Faults,
        tp: int,
        budgets: dict[str, Budget] | None = None,
        placement: Any = None,
        silence_s: float = 240.0,
        **options: Any,
    ) -> None:
        basic = {"tp": tp, "device": DEVICE, "dtype": "float32", "threads": 1, "model": EMBEDDED_MODEL, **SIZES}
        if DEVICE == "cuda":  # where rounding depends on the batch, and so on when a fault comes, unless told otherwise
            basic |= {"gpus_per_rank": gpu_share(tp), "deterministic": True}
        self.faults = faults
        self.config = Config.load(basic | options, {})
        self.hooks = Recorder()
        self.tokenizer = Tokenizer(Path(EMBEDDED_MODEL))
        self._budgets: dict[str, Any] = {"repairs": Budget(10_000), "engines": Budget(10_000)} | (budgets or {})
        self._placement = placement
        self._silence_s = silence_s
        self._runner = asyncio.Runner()
        self._expected: dict[str, Stream] = {}
        self._runs = 0

    def __enter__(self) -> Served:
        try:
            self.client: EngineClient = self._runner.run(self._start())
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self.supervisor.stop())
        self._runner.close()

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float = 240 * PATIENCE) -> Any:
        """Run this and everything else on the engine's event loop."""
        return self._runner.run(asyncio.wait_for(work, timeout_s))

    async def _start(self) -> EngineClient:
        folder, options = Path(self.config.model.model), self._budgets | {"silence_s": self._silence_s}
        self.supervisor = Supervisor(self.config, folder, self.hooks, self._placement, **options)
        return await self.supervisor.start()

    def requests(self, count: int = 12, max_tokens: int = 48) -> list[GenerateRequest]:
        """Greedy and seeded, with penalties, stop strings, min_tokens and log-probabilities, in turn."""
        kinds: list[dict[str, Any]] = [
            {"temperature": 0.0},
            {"temperature": 0.9, "seed": 11, "top_k": 20},
            {"temperature": 1.0, "seed": 12, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
            {"temperature": 0.8, "seed": 13, "top_p": 0.9, "stop": ("e t", "zzz")},
            {"temperature": 0.7, "seed": 14, "min_tokens": 30, "ignore_eos": False},
            {"temperature": 0.0, "logprobs": 3, "presence_penalty": 0.5},
        ]
        limits = Limits(SIZES["max_model_len"], 4087, (4089,))
        self._runs += 1
        made = []
        for i in range(count):
            params = SamplingParams(**({"max_tokens": max_tokens, "ignore_eos": True} | kinds[i % len(kinds)]))
            prompt = self.tokenizer.encode(" ".join([PROMPTS[i % len(PROMPTS)]] * (1 + 4 * (i % 3))))
            made += expand(f"{i}-run{self._runs}", prompt, params, limits)
        return made

    def question(self, text: str) -> GenerateRequest:
        """A conversation's first turn, with thinking, answered greedily until the model ends it."""
        self._runs += 1
        prompt = self.tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
        limits = Limits(SIZES["max_model_len"], 4087, (4089,))
        (made,) = expand(f"question-run{self._runs}", prompt, SamplingParams(temperature=0.0), limits)
        return made

    async def stream(self, request: GenerateRequest) -> Stream:
        """One request to its end, as the HTTP layer would take it."""
        seen, text = Stream(), OutputText(self.tokenizer.vocabulary, request.params)
        async with aclosing(self.client.generate(request)) as deltas:
            async for delta in deltas:
                self._take(seen, text, delta)
                if seen.finish_reason is not None:
                    break
        return seen

    def _take(self, seen: Stream, text: OutputText, delta: Delta) -> None:
        seen.times.append(time.monotonic())
        seen.resumed = max(seen.resumed, delta.resumed)
        if delta.finish_reason is FinishReason.ERROR:
            seen.finish_reason, seen.error, seen.error_code = delta.finish_reason, delta.error, delta.error_code
            return
        assert not delta.token_ids or delta.index == len(seen.tokens), "a token was lost or repeated"
        added = text.feed(delta)
        seen.tokens += delta.token_ids
        seen.text += added.content
        seen.logprobs += delta.logprobs or []
        seen.finish_reason = added.finish_reason

    def streams(self, requests: Sequence[GenerateRequest]) -> list[Stream]:
        """All at once, to their ends."""

        async def main() -> list[Stream]:
            return list(await asyncio.gather(*(self.stream(r) for r in requests)))

        return self.run(main())

    def expected(self, count: int = 12) -> list[Stream]:
        """What the undisturbed run of `requests(count)` gives; computed once, before any fault."""
        if len(self._expected) < count:
            self.faults.plan()
            found = self.streams(self.requests(count))
            assert all(s.error is None and s.resumed == 0 for s in found)
            self._expected = {str(i): s for i, s in enumerate(found)}
        return [self._expected[str(i)] for i in range(count)]

    def survive(self, *faults: tuple[str, str, int, str], count: int = 12) -> list[Stream]:
        """The same streams with these faults under them: each equal to the undisturbed run, nothing left behind."""
        expected = self.expected(count)
        before, pids = len(self.hooks.recoveries), self.pids()
        self.faults.plan(*faults)
        found = self.streams(self.requests(count))
        assert not self.faults.pending, "a planned fault did not come"
        self.faults.plan()
        for mine, theirs in zip(found, expected, strict=True):
            mine.assert_equals(theirs)
        self.run(self.until_idle())
        assert len(self.hooks.recoveries) > before
        assert self.hooks.states[-2:] == ["degraded", "ready"]
        self.report(faults, found, self.hooks.recoveries[before:], [pids, self.pids()])
        return found

    async def until_idle(self) -> None:
        """Until the engine is ready again and holds no block."""
        deadline = time.monotonic() + 30 * PATIENCE
        while self.client.state.name != "ready" or self.client.num_open:
            assert time.monotonic() < deadline, self.client.state
            await asyncio.sleep(0.01)
        await self.stream(self.requests(1, max_tokens=2)[0])  # its last step's numbers say what is left
        while self.hooks.last is None or self.hooks.last.num_running:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert (self.hooks.last.blocks_used, self.hooks.last.num_waiting) == (0, 0)

    def pids(self) -> list[int]:
        """The ranks' processes."""
        assert self.supervisor.group is not None
        return self.supervisor.group.pids()

    def report(
        self,
        faults: Sequence[tuple[Any, ...]],
        found: list[Stream],
        recoveries: list[dict[str, float]],
        pids: list[list[int]],
    ) -> None:
        """A line per run for docs/reliability.md, where a file is named for it."""
        if name := os.environ.get("TPQWEN_FAULTS_REPORT"):
            line = {
                "faults": [" ".join(map(str, f)) for f in faults],
                "tp": self.config.parallel.tp,
                "device": self.config.parallel.device,
                "pids": pids,  # before and after
                "streams": len(found),
                "longest_gap_s": round(max(s.longest_gap_s for s in found), 3),
                "recoveries": [{k: round(v, 3) for k, v in r.items()} for r in recoveries],
            }
            with open(name, "a") as file:
                file.write(json.dumps(line) + "\n")
