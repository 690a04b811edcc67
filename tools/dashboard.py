"""Writes deploy/grafana/tpqwen.json, k8s/grafana-dashboard.yaml and k8s/prometheusrule.yaml.

The dashboard is the table ROWS below; the rules are deploy/prometheus/rules.yml, which people edit. Run it after a
change of either: `python tools/dashboard.py`. Expressions are checked against the registry and by a real Prometheus in
tests/ops/test_dashboard.py and tests/ops/test_prometheus.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD, CONFIG_MAP = "deploy/grafana/tpqwen.json", "k8s/grafana-dashboard.yaml"
RULES, PROMETHEUS_RULE = "deploy/prometheus/rules.yml", "k8s/prometheusrule.yaml"

SLO_TTFT = "1.0"  # seconds, a bucket of time_to_first_token_seconds; deploy/prometheus/rules.yml has it too
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
VARIABLES = ("namespace", "model_name", "replica")
CHOSEN = ", ".join(f'{name}=~"${name}"' for name in VARIABLES)
COLUMNS = 24
QUANTILES = (0.5, 0.9, 0.95, 0.99)
REPLICA = "replica {{replica}}"
RANK = "replica {{replica}} rank {{tp_rank}}"
GPU = f"{RANK}: {{{{node}}}} GPU {{{{gpu}}}}"


@dataclass(frozen=True)
class Panel:
    """One panel. queries: legend -> PromQL. kind: timeseries, stat, heatmap, bargauge or table."""

    title: str
    unit: str
    queries: dict[str, str]
    description: str = ""
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    red_from: float | None = None  # stat: what is no longer good
    red_below: float | None = None


def series(name: str, *matchers: str) -> str:
    """A selector of the chosen models and replicas."""
    return f"tpqwen_{name}{{{', '.join((CHOSEN, *matchers))}}}"


def total(expression: str, *by: str) -> str:
    """Its sum, over all labels but `by`."""
    return f"sum by ({', '.join(by)}) ({expression})" if by else f"sum({expression})"


def rate(name: str, *matchers: str, by: tuple[str, ...] = ()) -> str:
    """Growth of a counter per second."""
    return total(f"rate({series(name, *matchers)}[$__rate_interval])", *by)


def quantile(q: float, name: str, by: tuple[str, ...] = ()) -> str:
    """A quantile of a histogram."""
    return f"histogram_quantile({q:g}, {rate(f'{name}_bucket', by=('le', *by))})"


def share(part: str, whole: str) -> str:
    """One by the other."""
    return f"{part} / {whole}"


def mean(name: str, by: tuple[str, ...] = ()) -> str:
    """The mean of a histogram's observations."""
    return share(rate(f"{name}_sum", by=by), rate(f"{name}_count", by=by))


def latency(title: str, name: str, description: str) -> Panel:
    """Quantiles and mean of a histogram of seconds."""
    queries = {f"p{q * 100:g}": quantile(q, name) for q in QUANTILES}
    return Panel(title, "s", {**queries, "mean": mean(name)}, description)


def heatmap(title: str, unit: str, name: str, description: str, width: int = 8) -> Panel:
    """A histogram over time, one row per bucket."""
    grown = total(f"increase({series(f'{name}_bucket')}[$__rate_interval])", "le")
    return Panel(title, unit, {"{{le}}": grown}, description, kind="heatmap", width=width)


def stat(title: str, unit: str, query: str, description: str, **limits: float) -> Panel:
    """One number of the summary."""
    return Panel(title, unit, {title: query}, description, kind="stat", width=4, height=4, **limits)  # type: ignore[arg-type]


def gpu(title: str, unit: str, name: str, description: str = "") -> Panel:
    """A reading of each GPU, named by its rank."""
    return Panel(title, unit, {GPU: series(f"gpu_{name}")}, description)


ENDED, DRAFTS = "requests_finished_total", "spec_decode_num_"
BY_PHASE, EACH = ("phase",), ("replica",)
ROWS: dict[str, tuple[Panel, ...]] = {
    "SLO summary": (
        stat(
            "Replicas that are ready",
            "short",
            total(series("engine_state", 'state="ready"')),
            "Replicas whose engine takes requests.",
            red_below=1,
        ),
        stat("Ranks down", "short", total(f"1 - {series('tp_rank_up')}"), "Ranks that do not answer.", red_from=1),
        stat(
            f"First token within {float(SLO_TTFT):g} s",
            "percentunit",
            share(
                rate("time_to_first_token_seconds_bucket", f'le="{SLO_TTFT}"'),
                rate("time_to_first_token_seconds_count"),
            ),
            "Share of requests whose first token came in time.",
            red_below=0.95,
        ),
        stat(
            "Sequences that ended with an error",
            "percentunit",
            share(rate(ENDED, 'finish_reason="error"'), rate(ENDED)),
            "Share of ended sequences.",
            red_from=0.02,
        ),
        stat("Generated tokens", "suffix:tokens/s", rate("generation_tokens_total"), "All replicas together."),
        stat(
            "Refused requests",
            "reqps",
            rate("requests_rejected_total", 'reason=~"queue_full|unavailable"'),
            "For want of room or of a working engine; mistakes of clients are not in it.",
            red_from=0.1,
        ),
    ),
    "Latency": (
        latency("End to end (E2E)", "e2e_request_latency_seconds", "Arrival of the request to the sequence's end."),
        latency("Time to first token (TTFT)", "time_to_first_token_seconds", "Arrival to the first token."),
        latency(
            "Time per output token (TPOT)",
            "request_time_per_output_token_seconds",
            "A sequence's mean time per token after the first.",
        ),
        latency("Between tokens (ITL)", "inter_token_latency_seconds", "Every single gap between tokens."),
        Panel(
            "Where the time goes",
            "s",
            {s: mean(f"request_{s}_time_seconds") for s in ("queue", "prefill", "decode")},
            "Means: waiting to be scheduled, then until the first token, then until the last.",
            stacked=True,
        ),
        heatmap("First tokens by their time", "s", "time_to_first_token_seconds", "Requests by TTFT."),
    ),
    "Throughput and batches": (
        Panel(
            "Tokens",
            "suffix:tokens/s",
            {"prompt": rate("prompt_tokens_total"), "generated": rate("generation_tokens_total")},
            "Prompt tokens include those found in the prefix cache.",
        ),
        Panel("Running", "short", {REPLICA: series("requests_running")}, "Sequences in the running batch."),
        Panel("Waiting", "short", {REPLICA: series("requests_waiting")}, "Sequences without a slot or KV blocks."),
        Panel("Ended sequences", "reqps", {"{{finish_reason}}": rate(ENDED, by=("finish_reason",))}, stacked=True),
        heatmap("Prompt lengths", "short", "request_prompt_tokens", "Tokens of ended sequences."),
        heatmap("Output lengths", "short", "request_generation_tokens", "Tokens of ended sequences."),
        Panel("Tokens per step", "short", {"{{phase}}": mean("step_tokens", BY_PHASE)}, "Mean by kind of step."),
        Panel(
            "Time of a step",
            "s",
            {f"{{{{phase}}}} p{q * 100:g}": quantile(q, "step_duration_seconds", BY_PHASE) for q in (0.5, 0.99)},
        ),
        Panel(
            "Host and idle time",
            "percentunit",
            {
                f"host works, {REPLICA}": rate("step_host_seconds_total", by=EACH),
                f"GPU idle between decode steps, {REPLICA}": rate("decode_idle_seconds_total", by=EACH),
            },
            "Share of the time. The host's work runs beside the GPU's.",
        ),
        Panel(
            "Speculation: tokens out of a row",
            "short",
            {
                "all": "1 + " + share(rate(f"{DRAFTS}accepted_tokens_total"), rate(f"{DRAFTS}drafts_total")),
                "drafted": share(rate(f"{DRAFTS}draft_tokens_total"), rate(f"{DRAFTS}drafts_total")),
            },
            "Of the steps that drafted; empty without --speculation.",
            width=12,
        ),
        Panel("Steps", "ops", {"{{phase}}": rate("step_duration_seconds_count", by=BY_PHASE)}, width=12, stacked=True),
    ),
    "KV cache and scheduler": (
        Panel("KV cache in use", "percentunit", {REPLICA: series("kv_cache_usage_ratio")}, "By running sequences."),
        Panel("KV blocks", "short", {"{{state}}": total(series("kv_cache_blocks"), "state")}, stacked=True),
        Panel(
            "Prefix cache hits",
            "percentunit",
            {"hits": share(rate("prefix_cache_hit_tokens_total"), rate("prefix_cache_queried_tokens_total"))},
            "Share of the prompt tokens that were looked up.",
        ),
        latency("Time in the queue", "request_queue_time_seconds", "Waiting to be scheduled first."),
        Panel("Preemptions", "ops", {REPLICA: rate("preemptions_total", by=EACH)}, "For want of KV blocks."),
        Panel("Shape", "short", {"KV cache": series("kv_cache_config_info")}, kind="table"),
    ),
    "Tensor parallel": (
        Panel("Ranks up", "short", {RANK: series("tp_rank_up")}, "1 while the rank answers."),
        Panel(
            "Ranks at work",
            "percentunit",
            {RANK: rate("tp_rank_busy_seconds_total", by=("replica", "tp_rank"))},
            "Device time of the rank's steps, as a share of the time.",
        ),
        Panel(
            "Slowest minus fastest rank",
            "s",
            {f"p{q * 100:g}": quantile(q, "tp_step_skew_seconds") for q in (0.5, 0.95)},
            "Device time per step, averaged between two readings. Empty with one rank.",
        ),
        Panel("Memory of the ranks' tensors", "bytes", {RANK: series("tp_rank_memory_bytes")}),
        Panel("CUDA graphs still to capture", "short", {RANK: series("tp_rank_graphs_pending")}),
        Panel(
            "Recoveries",
            "short",
            {REPLICA: total(f"increase({series('engine_restarts_total')}[$__rate_interval])", "replica")},
            "Ranks or engine processes that were replaced.",
        ),
        Panel("Recoveries by stage", "s", {"{{stage}}": mean("recovery_seconds", ("stage",))}, "Mean time.", width=8),
        Panel(
            "Start by stage",
            "s",
            {"{{stage}}": f"max by (stage) ({series('model_load_seconds')})"},
            "Of the slowest replica.",
            kind="bargauge",
        ),
        Panel("Versions", "short", {"versions": series("build_info")}, kind="table"),
    ),
    "GPU": (
        gpu("Utilization", "percentunit", "utilization_ratio", "Share of the time in which a kernel ran."),
        Panel(
            "Memory",
            "bytes",
            {
                f"used, {GPU}": series("gpu_memory_used_bytes"),
                f"tensors, {GPU}": series("gpu_torch_allocated_bytes"),
                f"in all, {GPU}": series("gpu_memory_total_bytes"),
            },
        ),
        gpu("Power", "watt", "power_watts"),
        gpu("Temperature", "celsius", "temperature_celsius"),
        gpu("Clock of the multiprocessors", "hertz", "sm_clock_hertz"),
        Panel(
            "Slowed down",
            "short",
            {f"{{{{reason}}}}, {GPU}": series("gpu_throttled")},
            "1 while the reason holds; power_cap is usual under full load.",
        ),
        Panel(
            "Tokens per joule",
            "short",
            {REPLICA: share(rate("generation_tokens_total", by=EACH), rate("gpu_energy_joules_total", by=EACH))},
            "Generated tokens by the energy of the replica's GPUs.",
            width=12,
        ),
        Panel(
            "Work and utilization of each rank",
            "percentunit",
            {
                f"GPU, {RANK}": f"max by (replica, tp_rank) ({series('gpu_utilization_ratio')})",
                f"steps, {RANK}": rate("tp_rank_busy_seconds_total", by=("replica", "tp_rank")),
            },
            "A GPU that is busy without steps of ours works for somebody else.",
            width=12,
        ),
    ),
    "HTTP and errors": (
        Panel(
            "Exchanges by route", "reqps", {"{{method}} {{route}}": rate("http_requests_total", by=("method", "route"))}
        ),
        Panel(
            "Exchanges by status",
            "reqps",
            {"{{code}}": rate("http_requests_total", by=("code",))},
            "499: the client left.",
        ),
        Panel(
            "Time of exchanges, p95",
            "s",
            {"{{route}}": quantile(0.95, "http_request_duration_seconds", ("route",))},
            "Streams to their end.",
        ),
        Panel("Refusals", "reqps", {"{{reason}}": rate("requests_rejected_total", by=("reason",))}, stacked=True),
        Panel(
            "Errors",
            "reqps",
            {
                "answers 5xx": rate("http_requests_total", 'code=~"5.."') + " or vector(0)",
                "sequences with an error": rate(ENDED, 'finish_reason="error"'),
            },
        ),
        Panel("State of the engines", "short", {"{{state}}": total(series("engine_state"), "state")}, stacked=True),
    ),
}


def thresholds(panel: Panel) -> dict[str, Any]:
    """Green, and red where the panel says."""
    if panel.red_below is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": panel.red_below}]
    else:
        steps = [{"color": "green", "value": None}]
        steps += [] if panel.red_from is None else [{"color": "red", "value": panel.red_from}]
    return {"mode": "absolute", "steps": steps}


def options(panel: Panel) -> dict[str, Any]:
    """What the kind of panel needs."""
    last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    if panel.kind == "stat":
        return {"reduceOptions": last, "colorMode": "value", "graphMode": "area", "textMode": "value"}
    if panel.kind == "bargauge":
        return {"reduceOptions": last, "orientation": "horizontal", "displayMode": "basic"}
    if panel.kind == "heatmap":
        return {"calculate": False, "yAxis": {"unit": panel.unit}, "color": {"mode": "scheme", "scheme": "Blues"}}
    if panel.kind == "table":
        return {"showHeader": True}
    return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}


def panel_json(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    """A panel as Grafana wants it."""
    instant = panel.kind in ("table", "bargauge")
    style = {"heatmap": "heatmap", "table": "table"}.get(panel.kind, "time_series")
    targets = [
        {
            "datasource": SOURCE,
            "refId": chr(ord("A") + i),
            "expr": expression,
            "legendFormat": legend,
            "format": style,
            "instant": instant,
            "range": not instant,
        }
        for i, (legend, expression) in enumerate(panel.queries.items())
    ]
    none = {"type": "special", "options": {"match": "nan", "result": {"text": "no requests"}}}
    defaults = {"unit": panel.unit, "thresholds": thresholds(panel), "mappings": [none] if panel.kind == "stat" else []}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        defaults["custom"] = {"stacking": stacking, "fillOpacity": 20 if panel.stacked else 0, "showPoints": "never"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options(panel),
    }


def panels() -> list[dict[str, Any]]:
    """All rows one below the other, their panels from left to right."""
    out: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        head = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        out.append(
            {"id": len(out) + 1, "type": "row", "title": title, "collapsed": False, "gridPos": head, "panels": []}
        )
        x, y, height = 0, y + 1, 0
        for panel in row:
            if x + panel.width > COLUMNS:
                x, y, height = 0, y + height, 0
            out.append(panel_json(panel, len(out) + 1, x, y))
            x, height = x + panel.width, max(height, panel.height)
        y += height
    return out


def variable(name: str, above: tuple[str, ...]) -> dict[str, Any]:
    """A choice among the values of a label, as far as the variables above allow; at first all of them."""
    matchers = ", ".join(f'{other}=~"${other}"' for other in above)
    query = f"label_values(tpqwen_build_info{{{matchers}}}, {name})"
    return {
        "name": name,
        "label": name.removesuffix("_name"),
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def dashboard() -> dict[str, Any]:
    """The whole dashboard."""
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "current": {}}
    chosen = [variable(name, VARIABLES[:i]) for i, name in enumerate(VARIABLES)]
    recoveries = {
        "name": "Recoveries",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "orange",
        "expr": f"increase({series('engine_restarts_total')}[$__rate_interval]) > 0",
        "titleFormat": "recovery of replica {{replica}}",
    }
    return {
        "uid": "tpqwen",
        "title": "tpqwen",
        "description": "Written by tools/dashboard.py.",
        "tags": ["tpqwen", "llm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "templating": {"list": [source, *chosen]},
        "annotations": {"list": [recoveries]},
        "panels": panels(),
    }


def indented(text: str, spaces: int) -> str:
    """The text further right; empty lines stay empty."""
    return "".join(" " * spaces + line if line.strip() else line for line in text.splitlines(keepends=True))


def config_map(text: str) -> str:
    """The dashboard for Grafana's sidecar."""
    return f"""\
# The Grafana dashboard for the sidecar that kube-prometheus-stack brings: it looks for the label in all namespaces.
# Written by tools/dashboard.py from its table; the same as {DASHBOARD}.
apiVersion: v1
kind: ConfigMap
metadata: {{name: tpqwen-dashboard, labels: {{grafana_dashboard: "1"}}}}
data:
  tpqwen.json: |
{indented(text, 4)}"""


def prometheus_rule(rules: str) -> str:
    """The rules for the Prometheus operator. rules: the text of rules.yml, whose comments go along."""
    return f"""\
# The alerts for the Prometheus operator; `release: prometheus` is the label that kube-prometheus-stack looks for.
# Written by tools/dashboard.py from {RULES}: edit that one.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata: {{name: tpqwen, labels: {{release: prometheus}}}}
spec:
{indented(rules[rules.index("groups:") :], 2)}"""


def files() -> dict[str, str]:
    """Every generated file's text by its path in the repository."""
    text = json.dumps(dashboard(), indent=1) + "\n"
    rules = (ROOT / RULES).read_text(encoding="utf-8")
    return {DASHBOARD: text, CONFIG_MAP: config_map(text), PROMETHEUS_RULE: prometheus_rule(rules)}


def main() -> None:
    for name, text in files().items():
        (ROOT / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
