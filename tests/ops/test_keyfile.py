"""API keys from a file or the environment, reloaded while requests run; limits over several replicas."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tpqwen.api.keys import Keyring
from tpqwen.api.limits import Limiter, Usage
from tpqwen.errors import ConfigError
from tpqwen.keyfile import KeyFile, find_keys
from tpqwen.ledger import Pages, Reader

ALICE, BOB = "tpq_alice_0123456789abcdef", "tpq_bob_0123456789abcdefgh"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_the_file_goes_before_the_environment_and_neither_means_no_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice {ALICE}\n")
    file.chmod(0o600)
    from_file, followed = find_keys(str(file), f"bob {BOB}")
    assert from_file is not None and from_file.ids == ["alice"] and followed is not None
    from_list, followed = find_keys(None, f"bob {BOB}")
    assert from_list is not None and from_list.ids == ["bob"] and followed is None
    assert find_keys(None, " \n") == (None, None)


def test_a_file_that_is_missing_binary_or_empty_is_refused_with_its_name(tmp_path: Path) -> None:
    for content in (None, b"\xff\xfe\x00", b""):
        file = tmp_path / "keys"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"api_keys_file .*keys|no key in the list"):
            KeyFile(str(file)).load()


def test_a_file_that_all_may_read_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice {ALICE}\n")
    for mode, warnings in ((0o600, 0), (0o440, 0), (0o644, 1)):
        file.chmod(mode)
        caplog.clear()
        KeyFile(str(file)).load()
        assert len(caplog.records) == warnings


def test_a_changed_file_is_in_force_without_a_restart_and_a_bad_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text(f"alice {ALICE}\n")
    second.write_text(f"bob {BOB}\n")
    mounted = tmp_path / "keys"
    mounted.symlink_to(first)

    def exchange_link(target: Path) -> None:  # as the kubelet does
        link = tmp_path / "new"
        link.symlink_to(target)
        os.replace(link, mounted)

    async def run() -> None:
        file = KeyFile(str(mounted))
        ring = file.load()
        task = asyncio.create_task(file.follow(ring, every_s=0.02))
        exchange_link(second)
        await until(lambda: ring.ids == ["bob"])
        assert ring.find(ALICE) is None
        second.write_text("bob short\n")
        await until(lambda: "stay in force" in caplog.text)
        mounted.unlink()
        await until(lambda: caplog.text.count("stay in force") == 2)
        assert ring.find(BOB) is not None
        exchange_link(first)
        await until(lambda: ring.find(ALICE) is not None)
        task.cancel()

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    assert "ids=alice" in caplog.text
    assert ALICE not in caplog.text and BOB not in caplog.text and "short" not in caplog.text


def test_replicas_share_a_limit_over_the_ledger() -> None:
    now = [0.0]
    ring = Keyring.parse(f"alice {ALICE} requests_per_minute=60 concurrency=4")
    key = ring.find(ALICE)
    assert key is not None
    ledger, limiters, readers = (
        Pages(),
        [Limiter(ring, lambda: now[0]) for _ in range(3)],
        [Reader() for _ in range(3)],
    )

    def rounds() -> None:
        for _ in range(2):  # in the first one the last to write is not yet seen by all
            for i, limiter in enumerate(limiters):
                totals = {name: (u.requests, u.tokens, u.running) for name, u in limiter.usage().items()}
                limiter.others_took(readers[i].grown(ledger.exchange(str(i), totals)))

    def served(limiter: Limiter) -> int:
        """Requests that come to an end at once, until one is refused."""
        count = 0
        while True:
            lease = limiter.lease(key)
            try:
                lease.begin()
            except Exception:
                return count
            finally:
                lease.close()
            count += 1

    assert served(limiters[0]) == 60
    rounds()
    assert [served(limiter) for limiter in limiters] == [0, 0, 0]
    total = 0
    for second in range(120):
        now[0] = second + 1.0
        total += served(limiters[second % 3])
        rounds()
    assert 115 <= total <= 121
    leases = [limiter.lease(key) for limiter in limiters]
    now[0] += 60
    for lease in leases:
        lease.begin()
    rounds()
    assert limiters[0].lease(key).headers()[-1] == (b"x-ratelimit-remaining-concurrency", b"1")


def test_a_ledger_that_was_lost_charges_nothing_twice() -> None:
    reader = Reader()
    page = {"b": {"alice": (10, 100, 1)}}
    assert reader.grown(page) == {"alice": Usage(10, 100, 1)}
    assert reader.grown(page) == {"alice": Usage(0, 0, 1)}
    assert reader.grown({"b": {"alice": (12, 130, 0)}, "c": {"alice": (1, 1, 2)}}) == {"alice": Usage(3, 31, 2)}
    assert reader.grown({"b": {"alice": (2, 5, 0)}}) == {"alice": Usage(2, 5, 0)}  # the replica forgot an idle key
