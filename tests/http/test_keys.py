"""The list of API keys: what is read, what is refused, and that no key is kept or told."""

from __future__ import annotations

import gc
from hashlib import sha256

import pytest

from tpqwen.api.keys import KeyLimits, Keyring
from tpqwen.errors import ConfigError

ALICE, BOB = "tpq_alice_0123456789abcdef", "tpq_bob_0123456789abcdefgh"


def test_keys_are_found_by_themselves_or_by_their_digest() -> None:
    digest = sha256(BOB.encode()).hexdigest()
    ring = Keyring.parse(
        f"# comment\n\nalice {ALICE} requests_per_minute=5 # more\nbob sha256:{digest.upper()} priority=-3\n"
    )
    alice, bob = ring.find(ALICE), ring.find(BOB)
    assert alice is not None and alice.id == "alice" and alice.limits == KeyLimits(requests_per_minute=5)
    assert bob is not None and bob.limits.priority == -3
    assert ring.ids == ["alice", "bob"]
    for wrong in ("", ALICE[:-1], ALICE + "x", digest, "sha256:" + digest, "\udcff", "ä" * 30):
        assert ring.find(wrong) is None


def test_one_id_may_have_two_keys_and_defaults_hold_for_all_that_state_nothing() -> None:
    ring = Keyring.parse(f"* concurrency=4 tokens_per_minute=100\na {ALICE}\na {BOB} tokens_per_minute=7\n")
    old, new = ring.find(ALICE), ring.find(BOB)
    assert old == new and old is not None
    assert old.limits == KeyLimits(concurrency=4, tokens_per_minute=7)
    assert ring.ids == ["a"]


def test_only_digests_are_kept() -> None:
    key = "tpq_" + "z".join("0123456789abcdef")
    ring = Keyring.parse(f"alice {key}")
    held = [x for x in gc.get_referents(ring._entries[0]) if isinstance(x, bytes)]
    assert held == [sha256(key.encode()).digest()]
    assert key not in repr(vars(ring))


def test_replacing_the_ring_ends_the_old_keys() -> None:
    ring = Keyring.parse(f"alice {ALICE}")
    ring.replace(Keyring.parse(f"bob {BOB}"))
    assert ring.find(ALICE) is None
    assert ring.find(BOB) is not None


def test_every_digest_is_compared_wherever_the_match_is(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("tpqwen.api.keys.compare_digest", lambda a, b: compared.append(a) or a == b)
    ring = Keyring.parse("".join(f"k{i} tpq_{i:020d}\n" for i in range(10)))
    for token in (f"tpq_{0:020d}", f"tpq_{9:020d}", "unknown"):
        compared.clear()
        ring.find(token)
        assert len(compared) == 10


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no key"),
        ("# only a comment", "no key"),
        ("* concurrency=4", "no key"),
        ("alice", "line 1: after the id alice"),
        ("alice concurrency=4", "line 1: after the id alice"),
        ("alice short", "at least 20"),
        ("alice sha256:abcd", "64 hexadecimal"),
        (f"al/ice {ALICE}", "an id has"),
        (f"\nalice {ALICE} rpm=4", "line 2: limits are"),
        (f"alice {ALICE} concurrency=x", "limits are"),
        (f"alice {ALICE} concurrency=0", "concurrency must be at least 1"),
        (f"alice {ALICE} concurrency=1 concurrency=2", "limits are"),
        (f"alice {ALICE}\nbob {ALICE}", "listed twice"),
        (f"alice {ALICE} concurrency=1\nalice {BOB} concurrency=2", "line 2: other limits for alice"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused_without_telling_a_key(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        Keyring.parse(text)
    assert ALICE not in str(refused.value) and "short" not in str(refused.value)
