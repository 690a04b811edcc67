"""Grafana's dashboard and the alerts: names and labels that exist, a sound layout, generated files up to date."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import yaml

from tests.http.live import completion, live, until
from tests.ops.manifest_rules import schema_errors
from tests.ops.test_manifests import SCHEMAS, documents
from tpqwen.gpu import THROTTLE_REASONS
from tpqwen.metrics import ENGINE_STATES, FAMILIES, TTFT, ServerMetrics

ROOT = Path(__file__).resolve().parents[2]
TOOL = runpy.run_path(str(ROOT / "tools/dashboard.py"))
DASHBOARD = json.loads((ROOT / TOOL["DASHBOARD"]).read_text())
RULES = yaml.safe_load((ROOT / TOOL["RULES"]).read_text())["groups"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = {(p["title"], t["legendFormat"]): t["expr"] for p in PANELS for t in p["targets"]}
ALERTS = {rule["alert"]: rule for group in RULES for rule in group["rules"]}
EXPRESSIONS = [*QUERIES.values(), *(a["expr"] for a in DASHBOARD["annotations"]["list"])]
EXPRESSIONS += [rule["expr"] for rule in ALERTS.values()]
FROM_PROMETHEUS = {"namespace"}  # added to what is scraped on Kubernetes
UNITS = {"short", "percentunit", "s", "reqps", "ops", "bytes", "watt", "celsius", "hertz", "suffix:tokens/s"}


def known_series():
    """Every name that a scrape brings, with its labels."""
    found = {}
    for family in FAMILIES:
        labels = {"model_name", "replica", *family.labels} | FROM_PROMETHEUS
        name = f"tpqwen_{family.name}"
        if family.kind == "histogram":
            found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            found[name] = labels
    return found


KNOWN = known_series()


def selectors(expression):
    """(name, labels of its matchers) of every selector."""
    for name, _, matchers in re.findall(r"\b(tpqwen_\w+)(\{([^}]*)\})?", expression):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))


def inside(expression, start):
    """What stands between the parenthesis at `start` and the one that closes it."""
    depth = 0
    for end in range(start, len(expression)):
        depth += {"(": 1, ")": -1}.get(expression[end], 0)
        if depth == 0:
            return expression[start:end]
    raise AssertionError(f"unbalanced: {expression}")


def groupings(expression):
    """(labels, what is aggregated) of every `by (...) (...)`."""
    for match in re.finditer(r"\bby \(([\w, ]+)\) (?=\()", expression):
        yield set(match[1].split(", ")), inside(expression, match.end())


def unknown(expression):
    """Names and labels of an expression that no series of ours has."""
    wrong = []
    for name, labels in selectors(expression):
        wrong += [name] if name not in KNOWN else [f"{name}: {label}" for label in labels - KNOWN[name]]
    for labels, body in groupings(expression):
        for name, _ in selectors(body):
            wrong += [f"{name} by {label}" for label in labels - KNOWN.get(name, labels)]
    return wrong


@pytest.mark.parametrize(
    ("sentence", "expression"),
    [
        ("tpqwen_ttft_seconds", "sum(rate(tpqwen_ttft_seconds_sum[1m]))"),
        ("tpqwen_e2e_request_latency_seconds", "tpqwen_e2e_request_latency_seconds"),
        ("tp_rank_up: rank", 'tpqwen_tp_rank_up{rank="0"}'),
        ("preemptions_total by tp_rank", "sum by (replica, tp_rank) (rate(tpqwen_preemptions_total[1m]))"),
    ],
)
def test_the_check_finds_planted_mistakes(sentence, expression):
    assert [found for found in unknown(expression) if sentence in found]


def test_every_name_and_label_of_dashboard_and_alerts_is_the_registrys():
    assert [found for expression in EXPRESSIONS for found in unknown(expression)] == []
    assert len(EXPRESSIONS) > 60


def test_the_dashboard_shows_every_metric():
    shown = {name for expression in QUERIES.values() for name, _ in selectors(expression)}
    assert [f.name for f in FAMILIES if not any(name.startswith(f"tpqwen_{f.name}") for name in shown)] == []


def test_legends_name_labels_that_the_answer_has():
    for (title, legend), expression in QUERIES.items():
        grouped = [labels - {"le"} for labels, _ in groupings(expression)]
        whole = next((KNOWN[n] for n, _ in selectors(expression) if expression.startswith(n)), set())
        has = grouped[0] if grouped else whole
        if "(le)" not in expression:
            assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= has, (title, legend)


def test_every_query_follows_the_variables():
    names = [v["name"] for v in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "namespace", "model_name", "replica"]
    for key, expression in QUERIES.items():
        for name, labels in selectors(expression):
            assert {"model_name", "replica"} <= labels, (key, name)
        assert set(re.findall(r"\$(\w+)", expression)) <= {*names, "__rate_interval"}, key
    for panel in PANELS:
        assert [t["datasource"]["uid"] for t in panel["targets"]] == ["${datasource}"] * len(panel["targets"])


def test_panels_have_ids_of_their_own_units_and_do_not_overlap():
    panels = DASHBOARD["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    taken = {}
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] >= 0 and at["x"] + at["w"] <= 24
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert cell not in taken, (panel["title"], taken[cell])
            taken[cell] = panel["title"]
    for panel in PANELS:
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"]) > 0


def test_the_rows_are_those_that_an_operator_looks_for():
    assert [p["title"] for p in DASHBOARD["panels"] if p["type"] == "row"] == [
        *("SLO summary", "Latency", "Throughput and batches", "KV cache and scheduler"),
        *("Tensor parallel", "GPU", "HTTP and errors"),
    ]


def test_the_generated_files_are_up_to_date():
    for name, text in TOOL["files"]().items():
        assert (ROOT / name).read_text() == text, f"run python tools/dashboard.py: {name}"


def test_the_config_map_holds_the_dashboard_and_can_be_applied():
    """kubectl apply keeps the whole object in an annotation, which may have 256 KiB."""
    path = ROOT / TOOL["CONFIG_MAP"]
    (document,) = yaml.safe_load_all(path.read_text())
    assert document["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert json.loads(document["data"]["tpqwen.json"]) == DASHBOARD
    assert path.stat().st_size < 200 * 1024


def test_the_prometheus_rule_has_the_same_rules():
    (document,) = documents("prometheusrule.yaml")
    assert document["spec"]["groups"] == RULES
    assert document["metadata"]["labels"] == documents("podmonitor.yaml")[0]["metadata"]["labels"]


def test_the_prometheus_rule_satisfies_its_schema():
    if not SCHEMAS.is_dir():
        pytest.skip("the CRD schemas are not beside this checkout")
    schema = json.loads((SCHEMAS / "monitoring.coreos.com_v1_PrometheusRule.json").read_text())
    (document,) = documents("prometheusrule.yaml")
    assert schema_errors(schema, document) == []
    document["spec"]["groups"][0]["rules"][0]["annotation"] = {}
    assert schema_errors(schema, document)


def test_alerts_have_names_a_severity_and_labels_that_their_texts_use():
    for name, rule in ALERTS.items():
        assert name.startswith("Tpqwen") and rule["labels"]["severity"] in ("critical", "warning")
        text = " ".join(rule["annotations"].values())
        grouped = [labels for labels, _ in groupings(rule["expr"])]
        for label in re.findall(r"\$labels\.(\w+)", text):
            assert all(label in labels for labels in grouped), (name, label)


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not():
    tests = yaml.safe_load((ROOT / "deploy/prometheus/rules_test.yml").read_text())["tests"]
    cases = {(case["alertname"], bool(case.get("exp_alerts"))) for test in tests for case in test["alert_rule_test"]}
    assert cases == {(name, fires) for name in ALERTS for fires in (True, False)}


def test_the_numbers_and_values_in_rules_and_dashboard_are_those_of_the_code():
    slo = float(TOOL["SLO_TTFT"])
    assert slo in TTFT
    text = ServerMetrics("qwen").metrics_text()
    assert f'tpqwen_time_to_first_token_seconds_bucket{{le="{TOOL["SLO_TTFT"]}"' in text
    assert ALERTS["TpqwenSlowFirstToken"]["expr"].endswith(f"> {slo:g}")
    values = {
        "TpqwenEngineDown": set(ENGINE_STATES),
        "TpqwenGPUThrottled": set(THROTTLE_REASONS),
        "TpqwenRefusals": {r for f in FAMILIES if f.name == "requests_rejected_total" for r in f.values},
        "TpqwenErrors": {r for f in FAMILIES if f.name == "requests_finished_total" for r in f.values},
    }
    for name, known in values.items():
        for listed in re.findall(r'=~?"([\w|]+)"', ALERTS[name]["expr"]):
            assert set(listed.split("|")) <= known, name


def test_nothing_runs_any_more_after_a_client_has_left():
    """Else TpqwenTokenStall would fire for a server without work."""
    metrics = ServerMetrics("qwen3-test")

    def running():
        return float(re.search(r"^tpqwen_requests_running\{.*\} (.+)$", metrics.metrics_text(), re.MULTILINE)[1])

    with live(step_s=0.005, hooks=metrics, on_stats=metrics.observe) as server:
        client = server.connect()
        client.sendall(completion(stream=True, max_tokens=30_000))
        until(lambda: running() == 1)
        client.close()
        until(lambda: running() == 0)
