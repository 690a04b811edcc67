"""Buckets and leases on a clock of our own: what is admitted, what is charged when, and what the headers say."""

from __future__ import annotations

from typing import Any

import pytest

from tpqwen.api.keys import Keyring
from tpqwen.api.limits import Lease, Limiter, Usage
from tpqwen.errors import Overloaded

SECRET = "tpq_0123456789abcdefghij"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def limiter(limits: str) -> tuple[Limiter, Clock, Any]:
    clock, ring = Clock(), Keyring.parse(f"alice {SECRET} {limits}")
    key = ring.find(SECRET)
    assert key is not None
    return Limiter(ring, clock), clock, key


def headers(lease: Lease) -> dict[str, str]:
    return {name.decode().removeprefix("x-ratelimit-"): value.decode() for name, value in lease.headers()}


def refused(lease: Lease, code: str) -> Overloaded:
    with pytest.raises(Overloaded) as error:
        lease.begin()
    assert error.value.code == code and error.value.status == 429
    lease.close()
    return error.value


def test_requests_per_minute_are_a_bucket_that_refills_steadily() -> None:
    many, clock, key = limiter("requests_per_minute=6")
    for left in (5, 4, 3, 2, 1, 0):
        lease = many.lease(key)
        lease.begin()
        assert headers(lease)["remaining-requests"] == str(left)
        lease.close()
    assert refused(many.lease(key), "requests_per_minute").retry_after_s == pytest.approx(10)
    clock.now += 9.9
    refused(many.lease(key), "requests_per_minute")
    clock.now += 0.2
    many.lease(key).begin()
    clock.now += 3600
    assert headers(many.lease(key)) == {
        "limit-requests": "6",
        "remaining-requests": "6",
        "reset-requests": "0.000s",
    }


def test_refused_requests_cost_nothing() -> None:
    many, clock, key = limiter("requests_per_minute=1 concurrency=1")
    many.lease(key).begin()
    for _ in range(50):
        refused(many.lease(key), "requests_per_minute")
    clock.now += 60
    assert refused(many.lease(key), "concurrency")


def test_concurrency_counts_what_has_not_ended_here_and_elsewhere() -> None:
    many, _, key = limiter("concurrency=2")
    first, second = many.lease(key), many.lease(key)
    first.begin()
    second.begin()
    assert headers(second) == {"limit-concurrency": "2", "remaining-concurrency": "0"}
    refused(many.lease(key), "concurrency")
    first.close()
    first.close()
    many.others_took({"alice": Usage(requests=1, running=1)})
    refused(many.lease(key), "concurrency")
    many.others_took({})
    many.lease(key).begin()


def test_prompt_tokens_are_charged_at_once_and_generated_ones_as_they_come() -> None:
    many, clock, key = limiter("tokens_per_minute=600")
    made = 0
    lease = many.lease(key)
    lease.begin()
    lease.charge_prompt(100)
    lease.meter(lambda: made)
    assert headers(lease)["remaining-tokens"] == "500"
    made = 480
    other = many.lease(key)
    other.begin()
    with pytest.raises(Overloaded, match="600 tokens a minute, and the prompt has 50") as error:
        other.charge_prompt(50)
    assert error.value.code == "tokens_per_minute"
    assert error.value.retry_after_s == pytest.approx(3) and error.value.may_retry
    made = 1300
    lease.close()
    made = 5000  # after its end nothing more is charged
    lease.close()
    assert headers(lease)["remaining-tokens"] == "0"
    clock.now += 80  # the debt of 800 is paid off, and the bucket is empty
    with pytest.raises(Overloaded):
        other.charge_prompt(1)
    clock.now += 1
    other.charge_prompt(10)
    assert many.usage()["alice"].tokens == 100 + 1300 + 10


def test_a_prompt_that_never_fits_is_not_to_be_retried() -> None:
    many, _, key = limiter("tokens_per_minute=600")
    lease = many.lease(key)
    lease.begin()
    with pytest.raises(Overloaded) as error:
        lease.charge_prompt(601)
    assert not error.value.may_retry
    lease.charge_prompt(600)


def test_what_other_replicas_served_is_charged_here_too() -> None:
    many, clock, key = limiter("requests_per_minute=10 tokens_per_minute=100")
    many.others_took({"alice": Usage(requests=12, tokens=40), "unknown": Usage(requests=1)})
    assert headers(many.lease(key))["remaining-tokens"] == "60"
    assert refused(many.lease(key), "requests_per_minute").retry_after_s == pytest.approx(18)
    clock.now += 18.1
    many.lease(key).begin()
    assert many.usage()["alice"].requests == 1  # only its own is told to the others


def test_new_limits_hold_at_once_and_running_requests_still_count() -> None:
    many, _, key = limiter("concurrency=3 requests_per_minute=5")
    for _ in range(3):
        many.lease(key).begin()
    changed = Keyring.parse(f"alice {SECRET} concurrency=4").find(SECRET)
    assert changed is not None
    many.lease(changed).begin()
    refused(many.lease(changed), "concurrency")
    assert many.usage()["alice"] == Usage(requests=4, tokens=0, running=4)


def test_idle_accounts_are_forgotten() -> None:
    many, clock, key = limiter("concurrency=3")
    lease = many.lease(key)
    lease.begin()
    clock.now += 1000
    assert many.usage()["alice"].running == 1
    lease.close()
    clock.now += 301
    assert many.usage() == {}
    lease.close()


def test_a_key_without_limits_has_no_headers() -> None:
    many, _, key = limiter("priority=-1")
    lease = many.lease(key)
    lease.begin()
    lease.charge_prompt(10**9)
    assert lease.headers() == []
