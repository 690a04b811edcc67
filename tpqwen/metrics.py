"""Every Prometheus series of a server: one table of families, one registry per replica, nothing global.

ServerMetrics observes the engine's StepStats and RankStats and the HTTP layer's events (api/hooks.py) and alone imports
prometheus_client. The text is always format 0.0.4, in which colons are legal: that carries the `vllm:` aliases, so that
dashboards, autoscalers and routers written for vLLM work. Their bucket bounds are ours, not vLLM's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import Metric

from tpqwen.api.hooks import REJECT_REASONS, FinishedSequence
from tpqwen.step import Capacity, RankStats, StepStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TTFT = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 40, 80)
ITL = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04),
    *(0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5),
)
E2E = (0.1, 0.25, 0.5, 1, 1.5, 2.5, 5, 10, 15, 20, 30, 45, 60, 120, 240, 480, 960)
STEP = (
    *(0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.0125, 0.015, 0.02, 0.025),
    *(0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5),
)
LEN = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 40960)
RECOVERY = (0.01, 0.03, 0.1, 0.3, 0.5, 1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 30, 60, 120, 300, 600)
STEP_TOKENS = tuple(2**i for i in range(15))

ENGINE_STATES = ("loading", "ready", "degraded", "draining", "dead")
RECOVERY_STAGES = ("detect", "part", "start", "load", "rejoin", "replay")
PHASES = ("prefill", "decode", "mixed")
FINISH_REASONS = ("stop", "length", "tool_calls", "abort", "error")
BLOCK_STATES = ("used", "cached", "free")
GPU_LABELS = ("tp_rank", "node", "gpu", "gpu_uuid")


@dataclass(frozen=True)
class Family:
    """One metric family. labels come after model_name and replica, which every family has."""

    name: str
    kind: str  # gauge | counter | histogram
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    values: tuple[str, ...] = ()  # of the only label, when known: such series exist from the start, at 0


def _gpu(name: str, help: str, kind: str = "gauge") -> Family:
    return Family(f"gpu_{name}", kind, help, GPU_LABELS)


FAMILIES = (
    Family("requests_running", "gauge", "Sequences that hold a slot in the running batch."),
    Family("requests_waiting", "gauge", "Sequences admitted and waiting for a slot or for KV blocks."),
    Family("kv_cache_usage_ratio", "gauge", "KV blocks in use by running sequences, as a share of all blocks."),
    Family("kv_cache_blocks", "gauge", "KV blocks by state.", ("state",), values=BLOCK_STATES),
    Family("kv_cache_config_info", "gauge", "Always 1; shape of the KV cache.", ("block_size", "num_blocks", "dtype")),
    Family("build_info", "gauge", "Always 1; versions in use.", ("version", "ray", "torch", "cuda")),
    Family("engine_state", "gauge", "1 for the state the engine is in.", ("state",), values=ENGINE_STATES),
    Family("model_load_seconds", "gauge", "Seconds the start spent in each stage.", ("stage",)),
    Family("prompt_tokens_total", "counter", "Prompt tokens processed, those found in the prefix cache included."),
    Family("generation_tokens_total", "counter", "Tokens generated."),
    Family("prefix_cache_queried_tokens_total", "counter", "Prompt tokens looked up in the prefix cache."),
    Family("prefix_cache_hit_tokens_total", "counter", "Prompt tokens found in the prefix cache."),
    Family("spec_decode_num_drafts_total", "counter", "Rows of speculative steps: each had tokens drafted for it."),
    Family("spec_decode_num_draft_tokens_total", "counter", "Tokens drafted for them."),
    Family("spec_decode_num_accepted_tokens_total", "counter", "Drafted tokens that were the sequence's own."),
    Family("requests_finished_total", "counter", "Ended sequences.", ("finish_reason",), values=FINISH_REASONS),
    Family("requests_rejected_total", "counter", "HTTP requests refused.", ("reason",), values=REJECT_REASONS),
    Family("preemptions_total", "counter", "Sequences put back in the queue for want of KV blocks."),
    Family("engine_restarts_total", "counter", "Recoveries: a rank or the engine core was replaced."),
    Family(
        "recovery_seconds",
        "histogram",
        "Recoveries under living requests, by stage: detect (at most), part, start, load, rejoin, replay.",
        ("stage",),
        RECOVERY,
        RECOVERY_STAGES,
    ),
    Family("time_to_first_token_seconds", "histogram", "Arrival of the request to its first token.", buckets=TTFT),
    Family("inter_token_latency_seconds", "histogram", "Time between tokens of a sequence.", buckets=ITL),
    Family(
        "request_time_per_output_token_seconds",
        "histogram",
        "A sequence's mean time per token after the first.",
        buckets=ITL,
    ),
    Family("e2e_request_latency_seconds", "histogram", "Arrival of the request to the sequence's end.", buckets=E2E),
    Family("request_decode_time_seconds", "histogram", "First token to the last one.", buckets=E2E),
    Family("request_queue_time_seconds", "histogram", "Waiting to be scheduled first.", buckets=TTFT),
    Family("request_prefill_time_seconds", "histogram", "First scheduled until the first token.", buckets=TTFT),
    Family("request_prompt_tokens", "histogram", "Prompt length of ended sequences, tokens.", buckets=LEN),
    Family("request_generation_tokens", "histogram", "Output length of ended sequences, tokens.", buckets=LEN),
    Family("step_duration_seconds", "histogram", "One engine step.", ("phase",), STEP, PHASES),
    Family("step_tokens", "histogram", "Tokens computed in one step.", ("phase",), STEP_TOKENS, PHASES),
    Family("step_host_seconds_total", "counter", "What the engine's thread worked for steps, waiting left out."),
    Family("decode_idle_seconds_total", "counter", "Time between two decode steps in which the GPU did nothing."),
    Family(
        "tp_step_skew_seconds",
        "histogram",
        "Device time per step, slowest minus fastest rank, averaged between two readings of the ranks.",
        buckets=STEP,
    ),
    Family("tp_rank_up", "gauge", "1 while the rank answers.", ("tp_rank",)),
    Family("tp_rank_busy_seconds_total", "counter", "Device time of the rank's steps.", ("tp_rank",)),
    Family("tp_rank_memory_bytes", "gauge", "Memory the rank's tensors hold on its device.", ("tp_rank",)),
    Family(
        "tp_rank_graphs_pending",
        "gauge",
        "CUDA graphs that the rank would still capture while nobody waits; until then it captures them when needed.",
        ("tp_rank",),
    ),
    Family("http_requests_total", "counter", "HTTP exchanges; 499: the client left.", ("route", "method", "code")),
    Family("http_request_duration_seconds", "histogram", "HTTP exchanges, streams to their end.", ("route",), E2E),
    _gpu("utilization_ratio", "Share of the last sample period in which a kernel ran."),
    _gpu("memory_used_bytes", "Memory in use on the GPU, by all processes."),
    _gpu("memory_total_bytes", "Memory of the GPU."),
    _gpu("power_watts", "Power drawn."),
    _gpu("temperature_celsius", "Temperature of the GPU."),
    _gpu("sm_clock_hertz", "Clock of the multiprocessors."),
    _gpu("torch_allocated_bytes", "Memory that torch's tensors hold on the GPU."),
    _gpu("energy_joules_total", "Energy used since this rank was first seen.", "counter"),
    Family("gpu_throttled", "gauge", "1 while the reason slows the GPU down.", (*GPU_LABELS, "reason")),
)


class CountingHistogram(Histogram):
    """A histogram that takes many equal observations at once: under load a delta holds several tokens.

    It finds the bucket by bisection, where the library tries one after the other.
    """

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        """One observation. exemplar: none are kept."""
        self.observe_many(amount, 1)

    def observe_many(self, amount: float, count: int) -> None:
        """The same as `count` times observe(amount), at the price of one."""
        self._sum.inc(amount * count)
        self._buckets[bisect_left(self._upper_bounds, amount)].inc(count)


KINDS: dict[str, Any] = {"gauge": Gauge, "counter": Counter, "histogram": CountingHistogram}

# vLLM's name -> (our family, {our label: vLLM's}).
ALIASES: dict[str, tuple[str, dict[str, str]]] = {
    "num_requests_running": ("requests_running", {}),
    "num_requests_waiting": ("requests_waiting", {}),
    "kv_cache_usage_perc": ("kv_cache_usage_ratio", {}),
    "cache_config_info": ("kv_cache_config_info", {"num_blocks": "num_gpu_blocks", "dtype": "cache_dtype"}),
    "prompt_tokens_total": ("prompt_tokens_total", {}),
    "generation_tokens_total": ("generation_tokens_total", {}),
    "prompt_tokens_cached_total": ("prefix_cache_hit_tokens_total", {}),
    "prefix_cache_hits_total": ("prefix_cache_hit_tokens_total", {}),
    "prefix_cache_queries_total": ("prefix_cache_queried_tokens_total", {}),
    "spec_decode_num_drafts_total": ("spec_decode_num_drafts_total", {}),
    "spec_decode_num_draft_tokens_total": ("spec_decode_num_draft_tokens_total", {}),
    "spec_decode_num_accepted_tokens_total": ("spec_decode_num_accepted_tokens_total", {}),
    "request_success_total": ("requests_finished_total", {"finish_reason": "finished_reason"}),
    "num_preemptions_total": ("preemptions_total", {}),
    "time_to_first_token_seconds": ("time_to_first_token_seconds", {}),
    "inter_token_latency_seconds": ("inter_token_latency_seconds", {}),
    "request_time_per_output_token_seconds": ("request_time_per_output_token_seconds", {}),
    "e2e_request_latency_seconds": ("e2e_request_latency_seconds", {}),
    "request_queue_time_seconds": ("request_queue_time_seconds", {}),
    "request_prefill_time_seconds": ("request_prefill_time_seconds", {}),
    "request_decode_time_seconds": ("request_decode_time_seconds", {}),
    "request_prompt_tokens": ("request_prompt_tokens", {}),
    "request_generation_tokens": ("request_generation_tokens", {}),
}


class ServerMetrics:
    """The series of one replica; implements api.hooks.RequestHooks.

    replica is the Serve replica's rank, as text. vllm_aliases: export the same numbers under vLLM's names too.
    """

    def __init__(self, model_name: str, replica: str = "0", *, vllm_aliases: bool = True) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._constant = (model_name, replica)
        self._families: dict[str, Any] = {}
        self._children: dict[tuple[str, ...], Any] = {}
        self._busy_s: dict[int, float] = {}
        self._energy_j: dict[str, float] = {}
        self._steps = 0
        self._steps_seen = 0
        for family in FAMILIES:
            extra = {"buckets": family.buckets} if family.kind == "histogram" else {}
            labels = ("model_name", "replica", *family.labels)
            self._families[family.name] = KINDS[family.kind](
                f"tpqwen_{family.name}", family.help, labels, registry=self.registry, **extra
            )
            for value in family.values:
                self._child(family.name, value)
            if not family.labels:
                self._child(family.name)
        if vllm_aliases:
            self.registry.register(AliasCollector(self._families))
        self.engine_state("loading")

    def metrics_text(self) -> str:
        """All series of this replica, text format 0.0.4 (CONTENT_TYPE)."""
        return generate_latest(self.registry).decode()

    def observe(self, stats: StepStats) -> None:
        """After each step. Counts in stats are those of this step; the rest is the state after it."""
        self._steps += 1
        total = stats.blocks_used + stats.blocks_cached + stats.blocks_free
        self._child("requests_running").set(stats.num_running)
        self._child("requests_waiting").set(stats.num_waiting)
        self._child("kv_cache_usage_ratio").set(stats.blocks_used / total if total else 0.0)
        for state, count in zip(BLOCK_STATES, (stats.blocks_used, stats.blocks_cached, stats.blocks_free), strict=True):
            self._child("kv_cache_blocks", state).set(count)
        self._child("prompt_tokens_total").inc(stats.prompt_tokens + stats.prefix_hit_tokens)
        self._child("generation_tokens_total").inc(stats.output_tokens)
        self._child("prefix_cache_queried_tokens_total").inc(stats.prefix_queried_tokens)
        self._child("prefix_cache_hit_tokens_total").inc(stats.prefix_hit_tokens)
        self._child("spec_decode_num_drafts_total").inc(stats.num_drafts)
        self._child("spec_decode_num_draft_tokens_total").inc(stats.draft_tokens)
        self._child("spec_decode_num_accepted_tokens_total").inc(stats.accepted_tokens)
        self._child("preemptions_total").inc(stats.preemptions)
        self._child("step_duration_seconds", stats.phase).observe(stats.duration_s)
        self._child("step_tokens", stats.phase).observe(stats.num_tokens)
        self._child("step_host_seconds_total").inc(stats.host_s)
        if stats.idle_s is not None:
            self._child("decode_idle_seconds_total").inc(stats.idle_s)

    def observe_ranks(self, ranks: Iterable[RankStats], tp: int) -> None:
        """Every few seconds: what the ranks answered. A rank of 0..tp-1 that did not answer counts as down."""
        answers = {stats.rank: stats for stats in ranks}
        steps, self._steps_seen = self._steps - self._steps_seen, self._steps
        busy_s = [self.observe_rank(answers[rank]) for rank in range(tp) if rank in answers]
        for rank in range(tp):
            self._child("tp_rank_up", str(rank)).set(rank in answers)
        if steps > 0 and tp > 1 and len(busy_s) == tp:
            self._child("tp_step_skew_seconds").observe((max(busy_s) - min(busy_s)) / steps)

    def observe_rank(self, stats: RankStats) -> float:
        """One rank's slow numbers; returns its busy seconds since the last call."""
        rank = str(stats.rank)
        busy_s = _increase(self._busy_s, stats.rank, stats.busy_s_total, first=stats.busy_s_total)
        self._child("tp_rank_up", rank).set(1)
        self._child("tp_rank_busy_seconds_total", rank).inc(busy_s)
        self._child("tp_rank_memory_bytes", rank).set(stats.memory_allocated_bytes)
        self._child("tp_rank_graphs_pending", rank).set(stats.graphs_pending)
        if stats.gpu:
            self._observe_gpu(stats)
        return busy_s

    def _observe_gpu(self, stats: RankStats) -> None:
        place = (str(stats.rank), stats.host, str(int(stats.gpu.get("index", 0))), stats.gpu_uuid)
        for name, value in stats.gpu.items():
            if name == "energy_joules_total":
                self._child(f"gpu_{name}", *place).inc(_increase(self._energy_j, stats.gpu_uuid, value, first=0.0))
            elif f"gpu_{name}" in self._families:
                self._child(f"gpu_{name}", *place).set(value)
        self._child("gpu_torch_allocated_bytes", *place).set(stats.memory_allocated_bytes)
        seen = {key[-1] for key in self._children if key[:-1] == ("gpu_throttled", *place)}
        for reason in seen | set(stats.throttle_reasons):
            self._child("gpu_throttled", *place, reason).set(reason in stats.throttle_reasons)

    def engine_state(self, name: str) -> None:
        """The engine is now in state `name` (ENGINE_STATES)."""
        for state in ENGINE_STATES:
            self._child("engine_state", state).set(state == name)

    def recovered(self, seconds: Mapping[str, float]) -> None:
        """Ranks or the engine core were replaced under living requests. seconds by stage (RECOVERY_STAGES)."""
        self._child("engine_restarts_total").inc()
        for stage, took in seconds.items():
            self._child("recovery_seconds", stage).observe(took)

    def capacity(self, capacity: Capacity) -> None:
        """After loading: shape of the KV cache, all blocks free, and seconds per stage."""
        self.kv_cache_config_info(capacity.block_size, capacity.num_blocks, capacity.kv_dtype)
        self._child("kv_cache_blocks", "free").set(capacity.num_blocks)
        for stage, seconds in capacity.load_seconds.items():
            self.model_load_seconds(stage, seconds)

    def kv_cache_config_info(self, block_size: int, num_blocks: int, dtype: str) -> None:
        """Shape of the KV cache: tokens per block, blocks, dtype of keys and values."""
        self._child("kv_cache_config_info", str(block_size), str(num_blocks), dtype).set(1)

    def model_load_seconds(self, stage: str, seconds: float) -> None:
        """Seconds that a stage took: `download`, or one of Capacity.load_seconds."""
        self._child("model_load_seconds", stage).set(seconds)

    def build_info(self, version: str, ray: str, torch: str, cuda: str) -> None:
        """Versions in use; empty text where there is none."""
        self._child("build_info", version, ray, torch, cuda).set(1)

    # The methods of api.hooks.RequestHooks, called on the event loop's thread.

    def on_accepted(self, prompt_tokens: int) -> None:
        """Nothing to count: requests_running and prompt_tokens_total come from the engine's steps."""

    def on_first_token(self, ttft_s: float) -> None:
        self._child("time_to_first_token_seconds").observe(ttft_s)

    def on_tokens(self, gap_s: float, num_tokens: int) -> None:
        """A delta of several tokens counts as that many gaps of equal length."""
        self._child("inter_token_latency_seconds").observe_many(gap_s / num_tokens, num_tokens)

    def on_finished(self, sequence: FinishedSequence) -> None:
        self._child("requests_finished_total", sequence.reason).inc()
        self._child("e2e_request_latency_seconds").observe(sequence.total_s)
        self._child("request_prompt_tokens").observe(sequence.prompt_tokens)
        self._child("request_generation_tokens").observe(sequence.output_tokens)
        if sequence.queue_s is not None:
            self._child("request_queue_time_seconds").observe(sequence.queue_s)
        if sequence.prefill_s is not None:
            self._child("request_prefill_time_seconds").observe(sequence.prefill_s)
        if sequence.decode_s is not None and sequence.output_tokens > 1:
            self._child("request_decode_time_seconds").observe(sequence.decode_s)
            mean_s = sequence.decode_s / (sequence.output_tokens - 1)
            self._child("request_time_per_output_token_seconds").observe(mean_s)

    def on_rejected(self, reason: str) -> None:
        self._child("requests_rejected_total", reason).inc()

    def on_http(self, route: str, method: str, code: int, seconds: float) -> None:
        self._child("http_requests_total", route, method, str(code)).inc()
        self._child("http_request_duration_seconds", route).observe(seconds)

    def _child(self, name: str, *values: str) -> Any:
        key = (name, *values)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = self._families[name].labels(*self._constant, *values)
        return child


class AliasCollector:
    """The families of ALIASES again under `vllm:` names, read from the same children, so nothing is counted twice.

    vLLM labels a server `engine` where we say `replica`, and has no finish reason tool_calls: it counts those as stop.
    """

    def __init__(self, families: Mapping[str, Any]) -> None:
        self._families = families

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        for alias, (name, renamed) in ALIASES.items():
            labels = {"replica": "engine", **renamed}
            for source in self._families[name].collect():
                target = Metric(f"vllm:{alias.removesuffix('_total')}", f"Same as tpqwen_{name}.", source.type)
                sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
                for sample in source.samples:
                    suffix = sample.name.removeprefix(source.name)
                    key = tuple((labels.get(k, k), _vllm_value(k, v)) for k, v in sample.labels.items())
                    sums[suffix, key] = sums.get((suffix, key), 0.0) + sample.value
                for (suffix, key), value in sums.items():
                    target.add_sample(target.name + suffix, dict(key), value)
                yield target


def merge_texts(texts: Mapping[str, str]) -> str:
    """One exposition text from several replicas' texts (replica -> text), HELP and TYPE once per family.

    A sample that names neither `replica` nor `engine` gets the label replica. Families keep the order of first sight.
    """
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                header = headers.setdefault(family, [])
                if line not in header and len(header) < 2:
                    header.append(line)
            elif line:
                samples.setdefault(family, []).append(_with_replica(line, replica))
    return "".join(f"{line}\n" for name in headers for line in (*headers[name], *samples.get(name, ())))


def _with_replica(line: str, replica: str) -> str:
    name, brace, rest = line.partition("{")
    if not brace:
        name, _, value = line.partition(" ")
        return f'{name}{{replica="{replica}"}} {value}'
    labels = rest[: rest.rindex("}")]
    if any(f'{mark}="' in f",{labels}" for mark in (",replica", ",engine")):
        return line
    return f'{name}{{replica="{replica}",{rest}'


def _vllm_value(label: str, value: str) -> str:
    return "stop" if label == "finish_reason" and value == "tool_calls" else value


def _increase(last: dict[Any, float], key: object, total: float, *, first: float) -> float:
    """Growth of a total since the last call; a total that fell started anew. `first` is the answer for a new key."""
    before = last.get(key)
    last[key] = total
    if before is None:
        return first
    return total - before if total >= before else total
