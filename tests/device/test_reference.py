"""The reference operations against formulas written out again, and against published vectors."""

from __future__ import annotations

import pytest
import torch

from tpqwen.kernels import reference

BLOCK = 4
KV_HEADS, HEAD_DIM, GROUP = 2, 8, 3


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([v]) for v in values)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    assert tuple(int(w) for w in reference.philox(words(*counter), words(*key))) == expected


def test_noise_follows_its_definition():
    seed, choice, index, token = -3, 2, 7, 4 * 11 + 3  # a seed above 2**63 arrives as a negative int64
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    word = float(reference.philox(words(index, token // 4, choice, 0), words(low, high))[3])
    uniform = torch.tensor((word + 0.5) * 2.0**-32, dtype=torch.float64)
    expected = -torch.log(-torch.log1p(-uniform))
    noise = reference.gumbel_noise(*words(seed, choice, index), torch.tensor([token]))
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise[0, 0].double(), expected, atol=1e-5, rtol=1e-5)


def test_noise_has_the_gumbel_mean_and_variance_and_is_finite():
    noise = reference.gumbel_noise(*words(1, 0, 0), torch.arange(200_000))
    assert torch.isfinite(noise).all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(1.6449, abs=0.03)


def test_noise_of_an_id_does_not_depend_on_the_ids_or_rows_beside_it():
    seeds, choices, index = torch.tensor([5, 2**62, -1]), torch.tensor([0, 1, 0]), torch.tensor([0, 9, 3])
    whole = reference.gumbel_noise(seeds, choices, index, torch.arange(50))
    per_row_ids = torch.tensor([[3, 1], [49, 0], [17, 18]])
    assert torch.equal(reference.gumbel_noise(seeds, choices, index, per_row_ids), whole.gather(1, per_row_ids))
    assert torch.equal(reference.gumbel_noise(seeds[1:2], choices[1:2], index[1:2], torch.arange(50)), whole[1:2])


def draw(logits, temperature, first_id=0, seed=11):
    rows = len(logits)
    seeds = torch.arange(rows) * 1000 + seed
    return reference.noisy_argmax(
        logits, torch.full((rows,), temperature), seeds, torch.zeros(rows).int(), torch.arange(rows), first_id
    )


@pytest.mark.parametrize("cut", [1, 30, 50, 98])
def test_argmax_of_vocabulary_shards_is_the_argmax_of_the_whole(cut):
    logits = torch.randn(40, 99, generator=torch.Generator().manual_seed(0))
    value, token = draw(logits, 0.8)
    (left, left_id), (right, right_id) = draw(logits[:, :cut], 0.8), draw(logits[:, cut:], 0.8, first_id=cut)
    assert torch.equal(torch.where(left >= right, left_id, right_id), token)
    assert torch.equal(torch.maximum(left, right), value)


def test_greedy_rows_give_the_largest_logit_and_ties_the_lowest_id():
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0], [float("-inf"), 2.0, 1.0, 2.0]])
    value, token = draw(logits, 0.0, first_id=100)
    assert token.tolist() == [101, 101] and value.tolist() == [5.0, 2.0]


def test_argmax_leaves_the_logits_as_they_were():
    logits = torch.randn(3, 20)
    before = logits.clone()
    draw(logits, 1.0)
    assert torch.equal(logits, before)


def test_draws_follow_the_softmax_at_the_temperature():
    logits, temperature = torch.tensor([0.0, 1.0, 2.0, -1.0]), 0.7
    _, token = draw(logits.expand(20_000, -1), temperature)
    share = torch.bincount(token, minlength=4) / 20_000
    torch.testing.assert_close(share, (logits / temperature).softmax(0), atol=0.015, rtol=0)


def cache_of(length: int, blocks: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random caches and a table of `length` tokens in shuffled blocks; every other position holds NaN."""
    generator = torch.Generator().manual_seed(length)
    table = torch.randperm(blocks, generator=generator)[: -(-length // BLOCK)].int()
    caches = []
    for _ in range(2):
        cache = torch.full((blocks, KV_HEADS, BLOCK, HEAD_DIM), float("nan"))
        for i in range(length):
            cache[table[i // BLOCK], :, i % BLOCK] = torch.randn(KV_HEADS, HEAD_DIM, generator=generator)
        caches.append(cache)
    return *caches, table


def plain_attention(q_TND, k_SKD, v_SKD, scale):
    """Causal attention where the last query sees all keys, in float64, one head at a time."""
    num_query, num_heads, _ = q_TND.shape
    out = torch.empty_like(q_TND, dtype=torch.float64)
    for t in range(num_query):
        seen = len(k_SKD) - num_query + t + 1
        for n in range(num_heads):
            k, v = k_SKD[:seen, n // GROUP].double(), v_SKD[:seen, n // GROUP].double()
            out[t, n] = (k @ q_TND[t, n].double() * scale).softmax(0) @ v
    return out.float()


def tokens_of(cache, table, length):
    return torch.stack([cache[table[i // BLOCK], :, i % BLOCK] for i in range(length)])


@pytest.mark.parametrize("length", [1, 3, 4, 5, 17])
def test_decode_attends_to_its_own_tokens_whatever_lies_beyond_them(length):
    k_cache, v_cache, table = cache_of(length)
    q = torch.randn(1, KV_HEADS * GROUP, HEAD_DIM)
    wide = torch.cat((table, torch.zeros(3, dtype=torch.int32)))[None]
    out = reference.paged_decode(q, k_cache, v_cache, wide, torch.tensor([length]).int(), 0.3)
    expected = plain_attention(q, tokens_of(k_cache, table, length), tokens_of(v_cache, table, length), 0.3)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_decode_of_a_batch_equals_decode_of_each_row():
    generator = torch.Generator().manual_seed(1)
    k_cache, v_cache = torch.randn(2, 20, KV_HEADS, BLOCK, HEAD_DIM, generator=generator)
    lengths = torch.tensor([5, 0, 16, 1, 9], dtype=torch.int32)
    tables = torch.randint(0, 20, (5, 4), generator=generator).int()
    q = torch.randn(5, KV_HEADS * GROUP, HEAD_DIM, generator=generator)
    batch = reference.paged_decode(q, k_cache, v_cache, tables, lengths, 0.3)
    for i in range(5):
        row = slice(i, i + 1)
        alone = reference.paged_decode(q[row], k_cache, v_cache, tables[row], lengths[row], 0.3)
        torch.testing.assert_close(batch[row], alone, atol=1e-6, rtol=1e-6)
    assert not batch[1].any()


def test_a_nan_in_one_rows_blocks_stays_in_that_row():
    k_cache, v_cache = torch.randn(2, 4, KV_HEADS, BLOCK, HEAD_DIM)
    k_cache[0] = v_cache[0] = float("nan")
    tables = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)
    q = torch.randn(2, KV_HEADS * GROUP, HEAD_DIM)
    k_cache[2, :, 3:] = float("nan")  # left of another sequence, beyond the second row's end
    out = reference.paged_decode(q, k_cache, v_cache, tables, torch.tensor([8, 3]).int(), 0.3)
    assert out[0].isnan().any() and torch.isfinite(out[1]).all()


def test_prefill_of_chunks_equals_plain_causal_attention():
    k_cache, v_cache, table = cache_of(19)
    k, v = tokens_of(k_cache, table, 19), tokens_of(v_cache, table, 19)
    q = torch.randn(19, KV_HEADS * GROUP, HEAD_DIM)
    # One sequence cut in chunks that end at 7, 8 and 19, an empty chunk between them, one unused row at the end.
    padded = torch.cat((q, torch.randn(1, KV_HEADS * GROUP, HEAD_DIM)))
    out = reference.paged_prefill(
        padded,
        k_cache,
        v_cache,
        table.expand(4, -1),
        torch.tensor([0, 7, 7, 8, 19]).int(),
        torch.tensor([7, 7, 8, 19]).int(),
        11,
        0.3,
    )
    torch.testing.assert_close(out[:19], plain_attention(q, k, v, 0.3), atol=1e-5, rtol=1e-5)
    assert not out[19:].any()


def test_write_puts_rotated_keys_at_their_slots_and_skips_padding():
    generator = torch.Generator().manual_seed(2)
    rows, heads = 4, KV_HEADS * GROUP
    qkv = torch.randn(rows, (heads + 2 * KV_HEADS) * HEAD_DIM, generator=generator)
    q_norm, k_norm = torch.rand(2, HEAD_DIM, generator=generator) + 0.5
    angles = torch.randn(32, HEAD_DIM // 2, generator=generator)
    table = torch.cat((angles.cos(), angles.sin()), -1)
    positions, slots = torch.tensor([3, 0, 31, 8]).int(), torch.tensor([6, -1, 0, 11])
    k_cache, v_cache = torch.full((2, 3, KV_HEADS, BLOCK, HEAD_DIM), 7.0)
    q = reference.qk_norm_rope_write(qkv, q_norm, k_norm, 1e-6, table, positions, k_cache, v_cache, slots)
    half = HEAD_DIM // 2
    for t in range(rows):
        turn = torch.complex(table[positions[t], :half], table[positions[t], half:])
        parts = qkv[t].view(-1, HEAD_DIM)
        for n in range(heads + KV_HEADS):
            norm = q_norm if n < heads else k_norm
            x = parts[n] / (parts[n].square().mean() + 1e-6).sqrt() * norm
            turned = torch.complex(x[:half], x[half:]) * turn
            expected = torch.cat((turned.real, turned.imag))
            slot = int(slots[t])
            if n < heads:
                torch.testing.assert_close(q[t, n], expected)
            elif slot >= 0:
                torch.testing.assert_close(k_cache[slot // BLOCK, n - heads, slot % BLOCK], expected)
        if slots[t] >= 0:
            assert torch.equal(v_cache[slots[t] // BLOCK, :, slots[t] % BLOCK], parts[heads + KV_HEADS :])
    untouched = [s for s in range(3 * BLOCK) if s not in slots.tolist()]
    for cache in (k_cache, v_cache):
        assert all((cache[s // BLOCK, :, s % BLOCK] == 7.0).all() for s in untouched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_operations_are_their_parts_in_order(dtype):
    generator = torch.Generator().manual_seed(3)
    h, norm = torch.randn(5, 16, generator=generator).to(dtype), torch.rand(16, generator=generator).to(dtype)
    gate_up, weight = (
        torch.randn(24, 16, generator=generator).to(dtype),
        torch.randn(9, 16, generator=generator).to(dtype),
    )
    normed = reference.rms_norm(h, norm, 1e-6)
    gate, up = normed @ gate_up[:12].T, normed @ gate_up[12:].T
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.02}
    assert normed.dtype == dtype
    torch.testing.assert_close(reference.norm_linear(h, norm, 1e-6, weight), normed @ weight.T, **tolerance)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(reference.norm_gate_up(h, norm, 1e-6, gate_up), expected, **tolerance)
    residual = torch.randn(5, 9, generator=generator).to(dtype)
    torch.testing.assert_close(reference.linear_add(h, weight, residual), residual + h @ weight.T, **tolerance)
