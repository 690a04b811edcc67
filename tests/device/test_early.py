"""Kernels compiled ahead: the parts launch what the passes launch, and never disturb the loading of weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_checkpoint
from tpqwen.config import Config
from tpqwen.kernels import cpu, ops, reference
from tpqwen.kernels.context import Scaled
from tpqwen.model.config import ModelConfig
from tpqwen.model.qwen3 import Qwen3
from tpqwen.model.sizing import derive
from tpqwen.model.weights import allocate
from tpqwen.offline import OfflineEngine
from tpqwen.parallel.group import TPGroup
from tpqwen.quant.schemes import NONE, SCHEMES, Scheme
from tpqwen.request import SamplingParams
from tpqwen.worker import drafts, early, graphs, mixed
from tpqwen.worker.ahead import Pass, Prompt, place
from tpqwen.worker.drafts import DraftGraphs
from tpqwen.worker.early import Alone, Part, Parts, compiled_beside
from tpqwen.worker.graphs import DecodeGraphs
from tpqwen.worker.load import _Build
from tpqwen.worker.mixed import MixedGraphs

Launch = tuple[str, tuple[tuple[tuple[int, ...], torch.dtype], ...]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> set[Launch]:
    """Every operation that is called, with its matrices' shapes and types: what kernels depend on, the batch apart.

    As on a GPU, a product prepares the next one's norm where it is asked to: kernels of their own on either side.
    """
    seen: set[Launch] = set()
    pick = ops._pick

    def watched(name: str, x: torch.Tensor, *how: Any) -> Any:
        op = pick(name, x, *how)

        def call(*args: Any, **options: Any) -> Any:
            weights = [a for a in args if isinstance(a, torch.nn.Parameter) and a.dim() == 2]
            prepared = options.pop("scaled", None) is not None
            seen.add((name + " of scaled rows" * prepared, tuple((tuple(w.shape), w.dtype) for w in weights)))
            return op(*args, **options)

        return call

    def linear_add_scaled(x: torch.Tensor, *args: Any, invariant: bool) -> tuple[torch.Tensor, Scaled]:
        h = watched("linear_add", x)(x, *args[:-1])
        seen.add((f"linear_add before {args[-1].operation}", ((tuple(args[0].shape), args[0].dtype),)))
        return h, Scaled(h, h)

    monkeypatch.setattr(ops, "_pick", watched)
    monkeypatch.setattr(ops, "linear_add_scaled", linear_add_scaled)
    return seen


@pytest.fixture(autouse=True)
def reference_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where padded passes are known; the CPU's attention knows only what a CPU is given."""
    drafting = {name: op for name, op in cpu.OPERATIONS.items() if not hasattr(reference, name)}
    monkeypatch.setattr(cpu, "OPERATIONS", drafting)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))


def build(folder: Path, group: TPGroup, scheme: Scheme = NONE, drafts: int = 0) -> _Build:
    config = Config.load({"model": str(folder), "device": "cpu", "max_num_seqs": 4, "max_model_len": 256}, {})
    model_config = ModelConfig.from_folder(folder)
    with torch.device("meta"):
        model = Qwen3(model_config, group, model_config.vocab_size, scheme=scheme)
    sizes = derive(config, model_config)
    device = torch.device("cpu")
    return _Build(model, model_config.vocab_size, model_config, sizes, group, device, torch.float32, drafts)


def run(parts: list[Any]) -> None:
    with torch.inference_mode():
        for part in parts:
            part()


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
def test_the_parts_launch_all_that_the_first_request_launches(
    tmp_path: Path, launches: set[Launch], scheme: Scheme
) -> None:
    folder = tiny_checkpoint(tmp_path)
    run(build(folder, TPGroup.single(), scheme).early_parts().first)
    early = set(launches)
    launches.clear()
    options = {"model": str(folder), "device": "cpu", "prefix_cache": False, "quantization": scheme.name}
    engine = OfflineEngine(Config.load(options, {}))
    for sampling in ({"temperature": 0.0}, {"temperature": 0.6, "top_k": 20}, {"temperature": 0.6, "top_p": 0.9}):
        request = engine.request(list(range(20)), SamplingParams(**sampling, max_tokens=3, ignore_eos=True))
        assert sum(len(deltas) for deltas in engine.run([request])) == 3
    engine.close()
    assert launches <= early
    assert {name for name, _ in early} >= {"begin_step", "norm_linear", "attend", "linear_add", "edit_slots"}
    assert {"linear_add before silu", "norm_gate_up of scaled rows", "norm_linear of scaled rows"} <= {
        n for n, _ in early
    }


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_of_several_runs_its_parts_without_the_others(tmp_path: Path, rank: int) -> None:
    folder = tiny_checkpoint(tmp_path, tie_word_embeddings=False)
    parts = build(folder, TPGroup(rank, 2, None)).early_parts()
    run([*parts.first, *parts.others, *parts.later])


def test_a_rank_of_several_compiles_what_it_would_exchange_with_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    def compiled(size: int, x: torch.Tensor, residual: torch.Tensor | None = None, *, summed: bool = True) -> None:
        seen.add((size, x.dtype, residual is not None, summed))

    monkeypatch.setattr(early, "compile_exchange", compiled)
    run(build(tiny_checkpoint(tmp_path), TPGroup(0, 2, None)).early_parts().first)
    assert {
        (2, torch.float32, True, True),  # layers
        (2, torch.float32, False, True),  # the embedding
        (2, torch.float64, False, False),  # the sampler
    } <= seen


def test_nothing_is_made_where_the_weights_leave_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path)
    made, quantized = (build(folder, TPGroup.single(), scheme) for scheme in SCHEMES.values())
    weights = sum(p.numel() for p in made.model.parameters()) * 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * weights // 2, 1 << 40))
    assert made.early_parts() == ([], [], [])
    assert quantized.early_parts() != ([], [], []), "a smaller model leaves room"


class Ungraphed:
    """Captures as they are on a GPU, but that nothing is kept of the pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (graphs, mixed, drafts):
            monkeypatch.setattr(module, "capture", self)

    def __call__(self, decode: DecodeGraphs, width: int, run: Callable[[torch.Tensor], Any]) -> tuple[None, Any]:
        return None, run(decode.slots[:width])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_later_part_launches_just_what_its_pass_launches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """On a model with more layers, in the passes' order."""
    seen: list[tuple[Any, ...]] = []
    pick = ops._pick

    def watched(name: str, x: torch.Tensor, *how: Any) -> Any:
        op = pick(name, x, *how)

        def call(*args: Any, **options: Any) -> Any:
            seen.append((name, *((tuple(a.shape), a.dtype) for a in args if isinstance(a, torch.Tensor))))
            return op(*args, **options)

        return call

    monkeypatch.setattr(ops, "_pick", watched)
    made = build(tiny_checkpoint(tmp_path, num_hidden_layers=5), TPGroup(0, ranks, None), drafts=3)
    parts = made.early_parts().later
    whole = replace(made, group=Alone(made.group)).with_layers(5)
    allocate(whole.model, made.device, made.dtype)
    runner = whole.runner(2)
    Ungraphed(monkeypatch)
    decode = DecodeGraphs(runner, whole.group, 4, enabled=False)
    given = (
        decode,
        MixedGraphs(runner, decode, 4, made.sizes.block_size, enabled=False),
        DraftGraphs(runner, decode, enabled=False),
    )
    passes = made.passes(runner)
    assert len(parts) == len(passes) > 20 and any(p.drafts for p in passes if isinstance(p, Pass))
    for part, p in zip(parts, passes, strict=True):
        if isinstance(p, Prompt):
            continue
        seen.clear()
        run([part])
        early = {*seen}
        seen.clear()
        holder, key = place(p, *given)
        assert holder.prepare(*key)
        assert {*seen} == early, p


def test_the_other_parts_sample_as_steps_do_in_which_the_host_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operations, types of logits and numbers of candidates of any request with a bias or log-probabilities."""
    folder, seen = tiny_checkpoint(tmp_path), set()
    pick = ops._pick

    def watched(name: str, x: torch.Tensor, *how: Any) -> Any:
        op = pick(name, x, *how)

        def call(*args: Any, **options: Any) -> Any:
            if name in ("noisy_slices", "top_candidates", "log_sum_exp"):
                seen.add(
                    (name, args[0].dtype, *(a for a in args[1:] if isinstance(a, int) and name == "top_candidates"))
                )
            return op(*args, **options)

        return call

    monkeypatch.setattr(ops, "_pick", watched)
    run(build(folder, TPGroup.single()).early_parts().others)
    early = set(seen)
    seen.clear()
    engine = OfflineEngine(Config.load({"model": str(folder), "device": "cpu", "prefix_cache": False}, {}))
    for more in ({"logit_bias": {5: 1.0}}, {"presence_penalty": 0.5, "top_k": 20}, {"logprobs": 0}, {"logprobs": 2}):
        request = engine.request(list(range(20)), SamplingParams(max_tokens=3, ignore_eos=True, **more))
        assert sum(len(deltas) for deltas in engine.run([request])) == 3
    engine.close()
    assert early >= seen and len(seen) > 4


def unbuilt(*_: Sequence[Part]) -> None:
    """Nothing is built ahead."""


def test_parts_run_beside_the_body_one_after_another_and_are_waited_for() -> None:
    body, running = threading.Event(), threading.Lock()
    done = []

    def part() -> None:
        with_others = not running.acquire(blocking=False)
        body.wait(30)
        done.append((with_others, torch.is_inference_mode_enabled()))
        running.release()

    with compiled_beside(lambda: Parts([part, part, part], [part], [part]), unbuilt):
        assert not done
        body.set()
    assert done == [(False, True)] * 3


def test_all_parts_are_built_before_any_is_run_and_later_ones_never_are() -> None:
    done: list[object] = []

    def build(*parts: Sequence[Part]) -> None:
        done.append((*map(len, parts), torch.is_inference_mode_enabled()))

    never = [lambda: done.append("later")]
    with compiled_beside(lambda: Parts([lambda: done.append("run")] * 2, never, never * 3), build):
        pass
    assert done == [(2, 1, 3, True), "run", "run"]


def test_what_fails_early_is_no_error_and_a_failing_body_is_one() -> None:
    done = []

    def fails(*_: object) -> None:
        raise RuntimeError("PassManager::run failed")

    with compiled_beside(lambda: Parts([fails, lambda: done.append(1)], [], []), unbuilt):
        pass
    with compiled_beside(lambda: fails(), unbuilt):  # type: ignore[arg-type,return-value,func-returns-value]
        done.append(2)
    with compiled_beside(lambda: Parts([lambda: done.append(3)], [], []), fails):
        pass
    with pytest.raises(KeyError), compiled_beside(lambda: Parts([lambda: done.append(4)], [], []), unbuilt):
        raise KeyError("a tensor is missing")
    assert done == [1, 2, 3, 4]


def test_who_builds_is_told_when_there_is_nothing_to_build() -> None:
    told: list[tuple[Sequence[Part], ...]] = []

    def fails() -> Parts:
        raise RuntimeError("no memory")

    with compiled_beside(fails, lambda *parts: told.append(parts)):
        pass
    assert told == [([], [], [])]


def test_alone_keeps_shapes() -> None:
    alone = Alone(TPGroup(1, 4, None))
    x = torch.arange(6.0).view(2, 3)
    assert alone.all_reduce(x) is x
    assert torch.equal(alone.add_reduced(x, x), 2 * x)
    assert alone.all_gather(x).shape == (4, 2, 3)
