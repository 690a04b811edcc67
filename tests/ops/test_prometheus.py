"""Dashboard and alerts with the real Prometheus, which scrapes a real server with fake ranks. Else skipped."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.http.live import Live, live, until
from tests.ops.test_dashboard import ALERTS, DASHBOARD, PANELS, QUERIES
from tests.ops.test_front_proxy import answers, free_port
from tpqwen.metrics import RECOVERY_STAGES, ServerMetrics
from tpqwen.step import Capacity, RankStats, StepStats

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/prometheus"
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")
RANK_EVERY = 50  # steps

pytestmark = pytest.mark.skipif(
    PROMETHEUS is None or PROMTOOL is None, reason="Prometheus is not installed (Debian: apt-get install prometheus)"
)


def promtool(*words: str) -> str:
    done = subprocess.run([str(PROMTOOL), *words], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_rules_and_the_configuration_are_valid():
    assert f"{len(ALERTS)} rules found" in promtool("check", "rules", str(FOLDER / "rules.yml"))
    assert "SUCCESS" in promtool("check", "config", str(FOLDER / "prometheus.yml"))


def test_each_alert_fires_and_does_not_fire():
    assert "SUCCESS" in promtool("test", "rules", str(FOLDER / "rules_test.yml"))


def test_alerts_with_other_thresholds_fail_their_cases(tmp_path: Path):
    """So each case proves something."""
    rules = yaml.safe_load((FOLDER / "rules.yml").read_text())
    for rule in rules["groups"][0]["rules"]:
        changed = re.sub(r"(?:==|>) ([\d.]+)$", r"> \1 + 100", rule["expr"].strip())
        rule["expr"] = changed if changed != rule["expr"].strip() else f"({changed}) > 100"
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    shutil.copy(FOLDER / "rules_test.yml", tmp_path)
    words = [str(PROMTOOL), "test", "rules", str(tmp_path / "rules_test.yml")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert set(re.findall(r"alertname: ?(\w+)", done.stdout + done.stderr)) == set(ALERTS)


class Feed:
    """What the fake ranks do not have, given to the real registry at the server's steps: GPUs, drafts, recoveries."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self.metrics = metrics
        self.steps = 0

    def __call__(self, stats: StepStats) -> None:
        self.metrics.observe(stats)
        if self.steps % RANK_EVERY == 0:
            self.metrics.observe_ranks([self.rank(0), self.rank(1)], 2)
            self.metrics.recovered(dict.fromkeys(RECOVERY_STAGES, 0.25))
            drafts = {"num_drafts": 3, "draft_tokens": 21, "accepted_tokens": 9, "idle_s": 0.001}
            self.metrics.observe(StepStats(**{f: getattr(stats, f) for f in stats.__struct_fields__} | drafts))
        self.steps += 1

    def rank(self, number: int) -> RankStats:
        gpu = {"index": number, "utilization_ratio": 0.9, "memory_used_bytes": 6e10, "memory_total_bytes": 8e10}
        gpu |= {"power_watts": 500.0, "temperature_celsius": 60.0, "sm_clock_hertz": 1.7e9}
        return RankStats(
            rank=number,
            pid=1,
            host="node",
            device="cuda:0",
            busy_s_total=self.steps * (0.001 + 0.0001 * number),
            memory_allocated_bytes=5 * 10**10,
            gpu=gpu | {"energy_joules_total": 0.5 * self.steps},
            gpu_uuid=f"GPU-{number}",
            throttle_reasons=("power_cap",),
        )


@contextmanager
def asking(url: str) -> Iterator[None]:
    """A client that asks again and again: streams, the same prompt twice, a mistake."""
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=20) as client:
            while not stop.is_set():
                body: dict[str, Any] = {"prompt": "hello " * 20, "max_tokens": 8, "ignore_eos": True}
                for changed in ({"stream": True}, {}, {"max_tokens": -1}):
                    client.post("/v1/completions", json=body | changed)
                client.get("/v1/models")

    thread = threading.Thread(target=ask, name="client")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(20)


@contextmanager
def prometheus(folder: Path, server: Live) -> Iterator[str]:
    """Prometheus with the shipped configuration, but for the target and the intervals. Yields its URL."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{server.port}"]
    path, port = folder / "prometheus.yml", free_port("127.0.0.1")
    path.write_text(yaml.safe_dump(config))
    words = [str(PROMETHEUS), f"--config.file={path}", f"--storage.tsdb.path={folder / 'data'}", "--log.level=error"]
    with subprocess.Popen([*words, f"--web.listen-address=127.0.0.1:{port}"], cwd=folder) as process:
        try:
            until(lambda: process.poll() is not None or answers("127.0.0.1", port))
            yield f"http://127.0.0.1:{port}/api/v1"
        finally:
            process.terminate()
            process.wait(timeout=20)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Prometheus' API; it scrapes a server that is being asked."""
    metrics = ServerMetrics("qwen3-test")
    sizes = {"num_blocks": 8000, "block_size": 16, "max_num_seqs": 16, "max_model_len": 512, "max_batched_tokens": 64}
    metrics.capacity(Capacity(**sizes, load_seconds={"weights": 2.5}))
    metrics.build_info("0.1.0", "2.60.0", "2.13.0", "")
    metrics.engine_state("ready")
    folder = tmp_path_factory.mktemp("prometheus")
    with live(hooks=metrics, on_stats=Feed(metrics)) as server, asking(server.url), prometheus(folder, server) as url:
        yield url


def get(url: str, **parameters: str) -> Any:
    answer = httpx.get(url, params=parameters, timeout=20)
    assert answer.status_code == 200, f"{parameters}: {answer.text}"
    return answer.json()["data"]


def filled(expression: str) -> str:
    """A query as Grafana sends it with All chosen."""
    expression = expression.replace("$__rate_interval", "1m")
    return re.sub(r"\$\w+", ".*", expression)


def numbers(url: str, expression: str) -> list[float]:
    """The values that a query answers now, without those that are not numbers."""
    values = [float(series["value"][1]) for series in get(f"{url}/query", query=filled(expression))["result"]]
    return [value for value in values if value == value]


def test_every_panel_shows_numbers_of_a_running_server(api: str):
    recoveries = {("annotation", a["name"]): a["expr"] for a in DASHBOARD["annotations"]["list"]}
    empty = {**QUERIES, **recoveries}
    assert len(empty) > len(PANELS)

    def nothing_is_empty() -> bool:
        for key in [key for key, expression in empty.items() if numbers(api, expression)]:
            del empty[key]
        return not empty

    try:
        until(nothing_is_empty, 60)
    except AssertionError:
        pytest.fail(f"nothing to see in {sorted(empty)}")


def test_the_numbers_are_plausible(api: str):
    def one(title: str) -> float:
        (expression,) = (expression for (panel, _), expression in QUERIES.items() if panel == title)
        until(lambda: bool(numbers(api, expression)))
        return numbers(api, expression)[0]

    assert one("Replicas that are ready") == 1
    assert one("Ranks down") == 0
    assert one("First token within 1 s") == 1
    assert one("Sequences that ended with an error") == 0
    assert 0.3 < one("Prefix cache hits") <= 1
    assert one("Tokens per joule") > 0


def test_the_variables_offer_model_and_replica(api: str):
    until(lambda: bool(numbers(api, "tpqwen_build_info")))
    for variable in DASHBOARD["templating"]["list"][1:]:
        selector, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"]).groups()
        found = get(f"{api}/label/{label}/values", **{"match[]": filled(selector)})
        assert found == {"namespace": [], "model_name": ["qwen3-test"], "replica": ["0"]}[variable["name"]]


def test_prometheus_evaluates_every_rule(api: str):
    def rules() -> list[dict[str, Any]]:
        return [rule for group in get(f"{api}/rules")["groups"] for rule in group["rules"]]

    until(lambda: bool(rules()) and all(rule["health"] != "unknown" for rule in rules()))
    assert {rule["name"]: rule["health"] for rule in rules()} == dict.fromkeys(ALERTS, "ok")
    until(lambda: next(rule for rule in rules() if rule["name"] == "TpqwenNoMetrics")["state"] == "inactive")
