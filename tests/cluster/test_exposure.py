"""Nobody is let in by oversight: where Serve listens beyond loopback, a replica without keys does not start."""

from __future__ import annotations

import pytest

from tests.cluster.clients import free_ports
from tests.cluster.replica import SMALL, bound

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_strangers_find_no_replica_without_keys_unless_that_is_wanted(ray_cluster: None) -> None:
    from ray import serve

    (port,) = free_ports(1)
    serve.start(http_options={"host": "0.0.0.0", "port": port})
    try:
        with pytest.raises(RuntimeError):
            serve.run(bound(SMALL), name="closed", route_prefix="/")
        assert "listening on 0.0.0.0 needs API keys" in str(serve.status().applications["closed"])
        serve.run(bound(SMALL | {"insecure": "true"}), name="open", route_prefix="/open")
        assert serve.status().applications["open"].status == "RUNNING"
    finally:
        serve.shutdown()
