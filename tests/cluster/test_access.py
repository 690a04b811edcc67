"""API keys on two replicas behind Ray Serve: closed, limited together, reloaded without a restart."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests.cluster.processes import until
from tests.cluster.replica import SMALL, bound, replicas, start_serve, wait_for_replicas
from tpqwen.exposure import serve_host

pytestmark = pytest.mark.ray

ALICE, BOB = "tpq_alice_0123456789abcdef", "tpq_bob_0123456789abcdefgh"
LIMIT = 20


class Server(NamedTuple):
    url: str
    keys: Path


def ask(server: Server, key: str = ALICE) -> httpx.Response:
    """Over a connection of its own, so that the proxy may choose either replica."""
    body = {"prompt": [5, 6, 7], "max_tokens": 1}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)


def told_of(server: Server, path: str) -> set[str]:
    """The replicas of which an answer to the new key speaks; none where it is refused."""
    text = httpx.get(f"{server.url}{path}", headers={"authorization": f"Bearer {BOB}"}, timeout=20).text
    return {part.split('"', 1)[0] for part in text.split('replica="')[1:]}


@pytest.fixture(scope="module")
def server(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from ray import serve

    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"alice {ALICE} requests_per_minute={LIMIT}\n")
    keys.chmod(0o600)
    options = SMALL | {"api_keys_file": str(keys)}
    url = start_serve()
    serve.run(bound(options, num_replicas=2), name="tpqwen", route_prefix="/")
    yield Server(url, keys)
    serve.shutdown()


def test_every_path_but_health_is_closed_through_serves_proxy(server: Server) -> None:
    for path in ("/v1/models", "/metrics", "/version", "/nothing", "/v1/completions"):
        answer = httpx.get(f"{server.url}{path}", timeout=20)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "missing_api_key"), path
    for host in ("x/?a=", "x/health"):
        assert httpx.get(f"{server.url}/version", headers={"host": host}, timeout=20).status_code in (400, 401)
    assert httpx.get(f"{server.url}/health", timeout=20).status_code == 200
    assert httpx.get(f"{server.url}/ready", timeout=20).status_code == 200
    assert ask(server, "tpq_wrong_0123456789abcdef").status_code == 401
    answer = httpx.get(f"{server.url}/version", headers={"x-api-key": ALICE}, timeout=20)
    assert answer.status_code == 200 and answer.json()["model"] == "tpqwen-demo"


def test_serve_says_where_it_listens(server: Server) -> None:
    assert asyncio.run(serve_host()) == "127.0.0.1"


def test_a_limit_holds_for_both_replicas_together(server: Server) -> None:
    began = time.monotonic()
    answers = [ask(server) for _ in range(2 * LIMIT)]
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    assert answers[0].headers["x-ratelimit-limit-requests"] == str(LIMIT)
    # once both have heard of each other neither takes more than what a minute's share lets in
    until(lambda: ask(server).status_code == 429, "a refusal")
    time.sleep(1.2)  # two rounds of the ledger
    late = [ask(server).status_code for _ in range(10)]
    refilled = (time.monotonic() - began) * LIMIT / 60
    assert late.count(200) <= 2
    assert codes.count(200) + late.count(200) <= LIMIT + refilled + LIMIT / 2


def test_a_new_key_is_in_force_and_an_old_one_is_not_without_a_restart(server: Server) -> None:
    before = wait_for_replicas(2)
    fresh = server.keys.with_name("fresh")
    fresh.write_text(f"bob {BOB}\n")
    fresh.chmod(0o600)
    fresh.replace(server.keys)
    loaded: set[str] = set()
    until(lambda: loaded.update(told_of(server, "/metrics?scope=local")) or len(loaded) == 2, "the new key on both")
    assert [ask(server, BOB).status_code for _ in range(6)] == [200] * 6
    assert [ask(server).status_code for _ in range(6)] == [401] * 6
    assert replicas() == before


def test_metrics_are_those_of_both_replicas_unless_one_is_asked_for_its_own(server: Server) -> None:
    until(lambda: told_of(server, "/metrics") == {"0", "1"}, "the metrics of both replicas")
    assert len(told_of(server, "/metrics?scope=local")) == 1
    text = httpx.get(f"{server.url}/metrics", headers={"authorization": f"Bearer {BOB}"}, timeout=20).text
    assert text.count("# TYPE tpqwen_requests_running gauge") == 1


def test_the_ledger_ends_with_the_application(server: Server) -> None:
    from ray import serve
    from ray.util import list_named_actors

    from tpqwen.ledger import NAME

    def ledgers() -> list[str]:
        return [actor["name"] for actor in list_named_actors(all_namespaces=True) if actor["namespace"] == NAME]

    assert sorted(ledgers()) == [f"{NAME}-tpqwen", "tpqwen-metrics-tpqwen"]
    serve.delete("tpqwen")
    until(lambda: not ledgers(), "the end of the ledger")
