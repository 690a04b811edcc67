"""Serve itself ends the application: running streams go on, and what outlives Serve's patience ends with one error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from tests.cluster.clients import streams
from tests.cluster.processes import children_of, title
from tests.cluster.replica import bound, start_serve
from tpqwen.ending import MARGIN_S, patience

pytestmark = pytest.mark.ray

OPTIONS = {
    "device": "cpu",
    "dtype": "float32",
    "threads": "1",
    "max_num_seqs": "32",
    "max_batched_tokens": "128",
}


@pytest.fixture(scope="module")
def url(ray_cluster: None) -> Iterator[str]:
    from ray import serve

    yield start_serve()
    serve.shutdown()


@contextmanager
def application(timeout_s: float) -> Iterator[None]:
    """Served with this graceful_shutdown_timeout_s; gone with all its processes at the end."""
    from ray import serve

    serve.run(bound(OPTIONS, graceful_shutdown_timeout_s=timeout_s), name="tpqwen", route_prefix="/")
    try:
        yield
    finally:
        serve.delete("tpqwen")
        ours = [title(pid) for pid in children_of({os.getpid()})]
        assert not [name for name in ours if name.startswith("tpqwen")]
        assert not [name for name in os.listdir("/dev/shm") if name.startswith("tpqwen")]


def delete_under_streams(url: str, count: int, max_tokens: int) -> list[list[Any]]:
    """Begin the streams, have Serve delete the application, read on; the events of each."""
    from ray import serve

    with streams(url, count, max_tokens) as begun, ThreadPoolExecutor(1) as pool:
        deleted = pool.submit(serve.delete, "tpqwen")
        events = [stream.result() for stream in begun]
        deleted.result()
    return events


@pytest.mark.slow
def test_running_streams_end_by_themselves_when_the_application_is_deleted(url):
    with application(60):
        for events in delete_under_streams(url, 2, 400):
            assert events[-1] == "[DONE]"
            assert [c["finish_reason"] for c in events[-2]["choices"]] == ["length"]


def test_what_outlives_serves_patience_ends_with_one_error_event(url):
    with application(6):
        for events in delete_under_streams(url, 24, 1900):  # enough of them for seconds on any machine
            assert [e["error"]["code"] for e in events if "error" in e] == ["draining"]
            assert "error" in events[-1], "nothing follows it"
            assert "had not ended after 3 s" in events[-1]["error"]["message"]


def test_serve_is_left_time_to_see_the_end():
    assert patience(90) == 90 - MARGIN_S
    assert patience(6) == 3
