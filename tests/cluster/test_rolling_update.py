"""Two replicas are exchanged one after the other under load: no request fails and no stream is torn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.cluster.background import Background
from tests.cluster.processes import until
from tests.cluster.replica import SMALL, bound, start_serve

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

CLIENTS = 4


def application(name: str) -> Any:
    """Two replicas; another name is another version."""
    return bound(SMALL | {"served_model_name": name}, num_replicas=2)


@pytest.fixture
def url(ray_cluster: None) -> Iterator[str]:
    from ray import serve

    url = start_serve()
    serve.run(application("old"), name="tpqwen", route_prefix="/")
    yield url
    serve.shutdown()


class Load(Background):
    """Clients that ask one request after the other, each over a connection of its own, until told to stop."""

    def __init__(self, url: str) -> None:
        super().__init__(*[self._ask] * CLIENTS)
        self._url = url
        self.answers = 0
        self.failures: list[str] = []

    def _ask(self) -> None:
        body = {"prompt": [5, 6, 7], "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True}
        while not self.over.is_set():
            try:
                answer = httpx.post(f"{self._url}/v1/completions", json=body, timeout=120)
                ok = answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
                self.answers += ok
                if not ok:
                    self.failures.append(f"{answer.status_code} {answer.text[-200:]}")
            except httpx.HTTPError as error:
                self.failures.append(repr(error))


def test_an_update_fails_no_request(url: str) -> None:
    from ray import serve

    def served() -> str:
        answer = httpx.get(f"{url}/v1/models", timeout=30)
        assert answer.status_code == 200
        name: str = answer.json()["data"][0]["id"]
        return name

    assert served() == "old"
    with Load(url) as load:
        serve.run(application("new"), name="tpqwen", route_prefix="/")  # returns when both are new
        until(lambda: [served() for _ in range(8)] == ["new"] * 8, "the new version alone", 60)
    assert load.failures == []
    assert load.answers > 2 * CLIENTS
