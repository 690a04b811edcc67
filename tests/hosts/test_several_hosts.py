"""Ranks on two Ray nodes in two network namespaces over real TCP; a lost node's rank moves to a third."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.faults.served import Faults, Served, Stream
from tests.hosts.namespaces import LINK, Host, hosts, possible

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def placement():
    """The replica's bundle and the engine's on the head, one bundle for each rank on a host of its own."""
    import ray
    from ray.util.placement_group import placement_group

    group = placement_group([{"CPU": 0.1, "head": 0.1}] * 2 + [{"rank": 1}] * 2, strategy="PACK")
    ray.get(group.ready(), timeout=60)
    return group


@pytest.mark.parametrize("loss", ["power", "network"])
def test_a_lost_node_is_noticed_and_its_rank_moves_to_another(loss: str, tmp_path: Path) -> None:
    assert possible(), "needs root and iproute2"
    with (
        hosts(3) as made,
        Served(Faults(tmp_path), tp=2, interface=LINK, threads=1, placement=placement()) as served,
    ):
        expected = served.expected()
        group = served.supervisor.group
        assert group is not None
        used = group.nodes()
        assert len(set(used)) == 2
        victim: Host = next(host for host in made if host.node == used[1])

        async def main() -> list[Stream]:
            tasks = [asyncio.create_task(served.stream(r)) for r in served.requests()]
            while served.hooks.last is None or served.hooks.last.phase != "decode" or not served.hooks.last.num_running:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(victim.kill if loss == "power" else victim.cut)
            return list(await asyncio.gather(*tasks))

        found = served.run(main())
        for mine, theirs in zip(found, expected, strict=True):
            mine.assert_equals(theirs)
        assert any(s.resumed for s in found)
        assert used[1] not in group.nodes() and len(set(group.nodes())) == 2
        served.report([(f"node of rank 1: {loss} lost",)], found, served.hooks.recoveries)
