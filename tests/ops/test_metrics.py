"""ServerMetrics: names, numbers, aliases and the merging of several replicas' texts."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tpqwen.api.hooks import FinishedSequence, RequestHooks
from tpqwen.errors import ConfigError
from tpqwen.exporter import Exporter
from tpqwen.metrics import ALIASES, FAMILIES, ServerMetrics, merge_texts
from tpqwen.step import Capacity, RankStats, StepStats

OPERATIONS_PAGE = """
    requests_running requests_waiting kv_cache_usage_ratio kv_cache_blocks kv_cache_config_info build_info
    engine_state model_load_seconds prompt_tokens_total generation_tokens_total prefix_cache_queried_tokens_total
    prefix_cache_hit_tokens_total requests_finished_total requests_rejected_total preemptions_total
    engine_restarts_total recovery_seconds time_to_first_token_seconds inter_token_latency_seconds
    request_time_per_output_token_seconds e2e_request_latency_seconds request_decode_time_seconds
    request_queue_time_seconds request_prefill_time_seconds request_prompt_tokens request_generation_tokens
    spec_decode_num_drafts_total spec_decode_num_draft_tokens_total spec_decode_num_accepted_tokens_total
    step_duration_seconds step_tokens step_host_seconds_total decode_idle_seconds_total
    tp_step_skew_seconds tp_rank_up tp_rank_busy_seconds_total tp_rank_graphs_pending http_requests_total
    http_request_duration_seconds gpu_utilization_ratio gpu_memory_used_bytes gpu_memory_total_bytes gpu_power_watts
    gpu_temperature_celsius gpu_sm_clock_hertz gpu_torch_allocated_bytes gpu_energy_joules_total gpu_throttled
"""


def step(**changes):
    fields = {
        "duration_s": 0.004,
        "phase": "decode",
        "num_tokens": 3,
        "num_running": 3,
        "num_waiting": 1,
        "blocks_used": 30,
        "blocks_cached": 20,
        "blocks_free": 50,
        "preemptions": 0,
        "prefix_queried_tokens": 0,
        "prefix_hit_tokens": 0,
        "prompt_tokens": 0,
        "output_tokens": 3,
    }
    return StepStats(**(fields | changes))


def samples(text):
    return {
        (sample.name, tuple(sorted((k, v) for k, v in sample.labels.items() if k not in ("model_name", "replica")))): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(metrics, name, **labels):
    return samples(metrics.metrics_text())[f"tpqwen_{name}", tuple(sorted(labels.items()))]


def test_every_family_of_the_operations_page_is_declared():
    names = {family.name for family in FAMILIES}
    assert len(names) == len(FAMILIES)
    assert names >= set(OPERATIONS_PAGE.split())


def test_histogram_buckets_rise():
    for family in FAMILIES:
        assert list(family.buckets) == sorted(set(family.buckets)), family.name
        assert bool(family.buckets) == (family.kind == "histogram"), family.name


def test_the_text_parses_and_each_sample_names_model_and_replica():
    text = ServerMetrics("qwen", "3").metrics_text()
    assert "_created" not in text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "qwen"
            assert sample.labels.get("replica", sample.labels.get("engine")) == "3"


def test_unlabelled_series_exist_before_the_first_event():
    metrics = ServerMetrics("qwen")
    assert value(metrics, "requests_running") == 0
    assert value(metrics, "requests_finished_total", finish_reason="error") == 0
    assert value(metrics, "engine_state", state="loading") == 1


def test_steps_set_gauges_and_add_to_counters():
    metrics = ServerMetrics("qwen")
    metrics.observe(
        step(phase="prefill", prompt_tokens=100, prefix_queried_tokens=160, prefix_hit_tokens=60, preemptions=2)
    )
    metrics.observe(step(host_s=0.25, idle_s=0.125))
    assert value(metrics, "step_host_seconds_total") == 0.25
    assert value(metrics, "decode_idle_seconds_total") == 0.125
    assert value(metrics, "requests_running") == 3
    assert value(metrics, "requests_waiting") == 1
    assert value(metrics, "kv_cache_usage_ratio") == pytest.approx(0.3)
    assert value(metrics, "kv_cache_blocks", state="cached") == 20
    assert value(metrics, "prompt_tokens_total") == 160
    assert value(metrics, "prefix_cache_queried_tokens_total") == 160
    assert value(metrics, "prefix_cache_hit_tokens_total") == 60
    assert value(metrics, "generation_tokens_total") == 6
    assert value(metrics, "preemptions_total") == 2
    assert value(metrics, "step_duration_seconds_count", phase="decode") == 1
    assert value(metrics, "step_tokens_sum", phase="prefill") == 3


def test_drafts_are_counted_under_vllms_names_too():
    metrics = ServerMetrics("qwen")
    for accepted in (9, 0):
        metrics.observe(step(num_tokens=24, num_drafts=3, draft_tokens=21, accepted_tokens=accepted))
    metrics.observe(step())
    found = samples(metrics.metrics_text())
    for name, number in (("drafts", 6), ("draft_tokens", 42), ("accepted_tokens", 9)):
        assert value(metrics, f"spec_decode_num_{name}_total") == number
        assert found[f"vllm:spec_decode_num_{name}_total", (("engine", "0"),)] == number


def test_a_server_without_blocks_has_usage_zero():
    metrics = ServerMetrics("qwen")
    metrics.observe(step(blocks_used=0, blocks_cached=0, blocks_free=0))
    assert value(metrics, "kv_cache_usage_ratio") == 0


def test_request_hooks_feed_the_latency_histograms():
    hooks: RequestHooks = ServerMetrics("qwen")
    hooks.on_accepted(7)
    hooks.on_first_token(0.03)
    hooks.on_tokens(0.02, 2)
    hooks.on_finished(FinishedSequence("stop", 7, 3, 4, total_s=0.06, queue_s=0.01, prefill_s=0.02, decode_s=0.02))
    hooks.on_rejected("queue_full")
    hooks.on_http("/v1/completions", "POST", 200, 0.07)
    found = samples(hooks.metrics_text())
    assert found["tpqwen_time_to_first_token_seconds_sum", ()] == pytest.approx(0.03)
    assert found["tpqwen_inter_token_latency_seconds_count", ()] == 2
    assert found["tpqwen_inter_token_latency_seconds_sum", ()] == pytest.approx(0.02)
    assert found["tpqwen_request_time_per_output_token_seconds_sum", ()] == pytest.approx(0.01)
    assert found["tpqwen_request_queue_time_seconds_sum", ()] == pytest.approx(0.01)
    assert found["tpqwen_request_prefill_time_seconds_sum", ()] == pytest.approx(0.02)
    assert found["tpqwen_request_prompt_tokens_sum", ()] == 7
    assert found["tpqwen_request_generation_tokens_sum", ()] == 3
    assert found["tpqwen_requests_finished_total", (("finish_reason", "stop"),)] == 1
    assert found["tpqwen_requests_rejected_total", (("reason", "queue_full"),)] == 1
    labels = (("code", "200"), ("method", "POST"), ("route", "/v1/completions"))
    assert found["tpqwen_http_requests_total", labels] == 1


@pytest.mark.parametrize("gap_s", [0.0001, 0.001, 0.0031, 2.5, 9.0])
def test_a_delta_of_many_tokens_is_the_same_as_many_deltas(gap_s):
    together, apart = ServerMetrics("qwen"), ServerMetrics("qwen")
    together.on_tokens(gap_s * 7, 7)
    for _ in range(7):
        apart.on_tokens(gap_s, 1)
    name = "tpqwen_inter_token_latency_seconds"
    found, expected = samples(together.metrics_text()), samples(apart.metrics_text())
    assert {k: v for k, v in found.items() if k[0].startswith(name)} == pytest.approx(
        {k: v for k, v in expected.items() if k[0].startswith(name)}
    )


def test_an_aborted_request_leaves_times_it_never_had_unobserved():
    metrics = ServerMetrics("qwen")
    metrics.on_finished(FinishedSequence("abort", 7, 0, 0, total_s=0.5))
    assert value(metrics, "requests_finished_total", finish_reason="abort") == 1
    assert value(metrics, "request_queue_time_seconds_count") == 0
    assert value(metrics, "request_time_per_output_token_seconds_count") == 0


def rank(number, busy_s, **fields):
    return RankStats(rank=number, pid=1, host="a", device="cpu", busy_s_total=busy_s, **fields)


def test_rank_readings_count_growth_and_survive_a_restarted_rank():
    metrics = ServerMetrics("qwen")
    metrics.observe(step())
    metrics.observe_ranks([rank(0, 1.0), rank(1, 1.0, memory_allocated_bytes=5)], tp=2)
    metrics.observe(step())
    metrics.observe(step())
    metrics.observe_ranks([rank(0, 1.5), rank(1, 0.1, graphs_pending=7)], tp=2)
    assert value(metrics, "tp_rank_busy_seconds_total", tp_rank="0") == pytest.approx(1.5)
    assert value(metrics, "tp_rank_busy_seconds_total", tp_rank="1") == pytest.approx(1.1)
    assert value(metrics, "tp_rank_memory_bytes", tp_rank="1") == 0
    assert [value(metrics, "tp_rank_graphs_pending", tp_rank=r) for r in "01"] == [0, 7]
    assert value(metrics, "tp_step_skew_seconds_count") == 2
    assert value(metrics, "tp_step_skew_seconds_sum") == pytest.approx((0.5 - 0.1) / 2)


def test_a_rank_that_does_not_answer_is_down():
    metrics = ServerMetrics("qwen")
    metrics.observe_ranks([rank(0, 1.0), rank(1, 1.0)], tp=2)
    metrics.observe_ranks([rank(0, 1.0)], tp=2)
    assert value(metrics, "tp_rank_up", tp_rank="0") == 1
    assert value(metrics, "tp_rank_up", tp_rank="1") == 0


def test_gpu_readings_carry_rank_and_uuid_and_throttling_ends():
    metrics = ServerMetrics("qwen")
    gpu = {"index": 2.0, "power_watts": 300.0, "energy_joules_total": 1000.0}
    labels = {"tp_rank": "0", "node": "a", "gpu": "2", "gpu_uuid": "GPU-1"}
    seen = rank(0, 1.0, gpu=gpu, gpu_uuid="GPU-1", memory_allocated_bytes=9, throttle_reasons=("power_cap",))
    metrics.observe_rank(seen)
    assert value(metrics, "gpu_throttled", reason="power_cap", **labels) == 1
    metrics.observe_rank(rank(0, 1.0, gpu=gpu | {"energy_joules_total": 1600.0}, gpu_uuid="GPU-1"))
    assert value(metrics, "gpu_power_watts", **labels) == 300
    assert value(metrics, "gpu_energy_joules_total", **labels) == 600
    assert value(metrics, "gpu_throttled", reason="power_cap", **labels) == 0


def test_without_a_gpu_no_gpu_series_exists():
    metrics = ServerMetrics("qwen")
    metrics.observe_rank(rank(0, 1.0))
    assert not any(name.startswith("tpqwen_gpu_") for name, _ in samples(metrics.metrics_text()))


def test_capacity_build_and_state_are_exported():
    metrics = ServerMetrics("qwen")
    sizes = {"num_blocks": 64, "block_size": 16, "max_num_seqs": 4, "max_model_len": 128, "max_batched_tokens": 64}
    metrics.capacity(Capacity(**sizes, kv_dtype="float32", load_seconds={"weights": 1.5}))
    metrics.build_info("0.1.0", "2.60.0", "2.13.0", "")
    metrics.engine_state("ready")
    metrics.recovered({"detect": 0.02, "load": 1.25})
    assert value(metrics, "kv_cache_config_info", block_size="16", num_blocks="64", dtype="float32") == 1
    assert value(metrics, "kv_cache_blocks", state="free") == 64
    assert value(metrics, "model_load_seconds", stage="weights") == 1.5
    assert value(metrics, "build_info", version="0.1.0", ray="2.60.0", torch="2.13.0", cuda="") == 1
    assert value(metrics, "engine_state", state="ready") == 1
    assert value(metrics, "engine_state", state="loading") == 0
    assert value(metrics, "engine_restarts_total") == 1
    assert value(metrics, "recovery_seconds_sum", stage="load") == 1.25
    assert value(metrics, "recovery_seconds_count", stage="replay") == 0


def test_vllm_aliases_show_the_same_numbers_under_vllms_labels():
    metrics = ServerMetrics("qwen", "1")
    metrics.observe(step())
    metrics.on_first_token(0.03)
    for reason in ("stop", "tool_calls"):
        metrics.on_finished(FinishedSequence(reason, 1, 1, 0, total_s=1.0))
    metrics.kv_cache_config_info(16, 64, "float32")
    found = samples(metrics.metrics_text())
    engine = ("engine", "1")
    assert found["vllm:num_requests_running", (engine,)] == 3
    assert found["vllm:request_success_total", (engine, ("finished_reason", "stop"))] == 2
    assert found["vllm:time_to_first_token_seconds_bucket", (engine, ("le", "0.04"))] == 1
    info = (("block_size", "16"), ("cache_dtype", "float32"), engine, ("num_gpu_blocks", "64"))
    assert found["vllm:cache_config_info", info] == 1
    families = {family.name for family in text_string_to_metric_families(metrics.metrics_text())}
    assert {f"vllm:{name.removesuffix('_total')}" for name in ALIASES} <= families
    for name in ("prompt_tokens", "generation_tokens", "prefill_time_seconds", "decode_time_seconds"):
        assert found[f"vllm:request_{name}_count", (engine,)] == found[f"tpqwen_request_{name}_count", ()]


def test_aliases_can_be_left_out():
    assert "vllm:" not in ServerMetrics("qwen", vllm_aliases=False).metrics_text()


def test_merged_texts_have_each_family_once_and_lose_no_sample():
    metrics = {replica: ServerMetrics("qwen", replica) for replica in ("0", "1")}
    metrics["1"].on_http("/health", "GET", 200, 0.001)
    texts = {replica: one.metrics_text() for replica, one in metrics.items()}
    merged = merge_texts(texts)
    lines = [line for line in merged.splitlines() if line]
    assert sorted(line for line in lines if line[0] != "#") == sorted(
        line for text in texts.values() for line in text.splitlines() if line and line[0] != "#"
    )
    headers = [line for line in lines if line.startswith("# TYPE")]
    assert len(headers) == len(set(headers))
    assert merge_texts({"0": texts["0"]}) == texts["0"]
    list(text_string_to_metric_families(merged))


def test_merging_labels_samples_that_name_no_replica():
    texts = {"0": '# HELP a b\n# TYPE a gauge\na 1\na{x="{}"} 2\n', "1": "# HELP a b\n# TYPE a gauge\na 3.0\n"}
    assert merge_texts(texts) == (
        '# HELP a b\n# TYPE a gauge\na{replica="0"} 1\na{replica="0",x="{}"} 2\na{replica="1"} 3.0\n'
    )


def test_the_exporter_serves_the_text_and_nothing_else():
    metrics = ServerMetrics("qwen")
    exporter = Exporter(metrics.metrics_text, 0, "127.0.0.1")
    try:
        url = f"http://127.0.0.1:{exporter.port}"
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert answer.read().decode() == metrics.metrics_text()
        with pytest.raises(urllib.error.HTTPError, match="404") as refused:
            urllib.request.urlopen(f"{url}/other", timeout=5)
        refused.value.close()
        with pytest.raises(ConfigError, match="metrics_port"):
            Exporter(metrics.metrics_text, exporter.port, "127.0.0.1")
    finally:
        exporter.close()
