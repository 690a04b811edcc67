"""Every operation in plain torch: the specification of the Triton kernels, and the CPU path.

T tokens, B decode rows, C chunks, M table width, N query heads, K key/value heads, G = N / K, D head size,
P block size, S context tokens, H hidden, I inner (local), F fused rows, V vocabulary (local).
Caches are [blocks, K, P, D].
Host reads (boolean masks, .tolist()) are allowed here and nowhere on the GPU path.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tpqwen.kernels.context import StepContext

GATHER_ELEMENTS = 1 << 20  # 4 MiB of fp32: keys of one attention call on the CPU
GREEDY_BELOW = 1e-5  # temperatures under it mean plain argmax, as SamplingParams.greedy
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD_MASK = 0xFFFFFFFF
LARGEST_UNIFORM = 1.0 - 2.0**-24


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) in fp32 over the last axis, cast back to x's dtype, then times the weight."""
    x32 = x_TH.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return normed.to(x_TH.dtype) * weight_H


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x W^T, [T, O]."""
    return F.linear(x_TI, weight_OI)


def norm_linear(h_TH: torch.Tensor, norm_H: torch.Tensor, eps: float, weight_OH: torch.Tensor) -> torch.Tensor:
    """RMSNorm, then x W^T: [T, O]."""
    return F.linear(rms_norm(h_TH, norm_H, eps), weight_OH)


def norm_gate_up(h_TH: torch.Tensor, norm_H: torch.Tensor, eps: float, weight_FH: torch.Tensor) -> torch.Tensor:
    """RMSNorm, then silu(gate) * up, [T, I]. The weight's 2I rows are I gate rows, then I up rows."""
    gate_TI, up_TI = F.linear(rms_norm(h_TH, norm_H, eps), weight_FH).chunk(2, dim=-1)
    return F.silu(gate_TI) * up_TI


def linear_add(x_TI: torch.Tensor, weight_HI: torch.Tensor, residual_TH: torch.Tensor) -> torch.Tensor:
    """residual + x W^T, [T, H], a new tensor."""
    return residual_TH + F.linear(x_TI, weight_HI)


def rotate(x_TND: torch.Tensor, cos_sin_TD: torch.Tensor) -> torch.Tensor:
    """RoPE in the "rotate half" layout, in fp32, rounded once to x's dtype. cos_sin: D/2 cosines, then D/2 sines."""
    cos, sin = cos_sin_TD.unsqueeze(1).chunk(2, dim=-1)
    first, second = x_TND.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_TND.dtype)


def qk_norm_rope_write(
    qkv_TF: torch.Tensor,
    q_norm_D: torch.Tensor,
    k_norm_D: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    positions_T: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_slots_T: torch.Tensor,
) -> torch.Tensor:
    """Per-head RMSNorm of q and k, RoPE on both, k and v written into the cache; returns the queries [T, N, D].

    qkv rows hold N query heads, K key heads, K value heads. cos_sin fp32 [positions, D]. cache_slots int64: block * P
    + offset, -1 writes nothing. The norm's result is rounded to qkv's dtype before RoPE, RoPE itself is in fp32.
    """
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    num_heads = qkv_TF.shape[1] // head_dim - 2 * num_kv_heads
    heads_TXD = qkv_TF.view(len(qkv_TF), -1, head_dim)
    q_TND, k_TKD, v_TKD = torch.split(heads_TXD, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos_sin_TD = cos_sin.index_select(0, positions_T)
    q_TND = rotate(rms_norm(q_TND, q_norm_D, eps), cos_sin_TD)
    k_TKD = rotate(rms_norm(k_TKD, k_norm_D, eps), cos_sin_TD)
    written = cache_slots_T >= 0
    slots = cache_slots_T[written].long()
    blocks, offsets = slots // block_size, slots % block_size
    k_cache[blocks, :, offsets] = k_TKD[written].to(k_cache.dtype)
    v_cache[blocks, :, offsets] = v_TKD[written].to(v_cache.dtype)
    return q_TND


def gather_context(cache: torch.Tensor, tables_BM: torch.Tensor, lengths_B: torch.Tensor, longest: int) -> torch.Tensor:
    """The tokens that block tables name, [B, K, S, D] with S = longest; what lies beyond a row's length is finite.

    A finished sequence may leave NaN in its blocks, which no mask would keep out of a sum. So table entries beyond the
    length, which may be stale, are replaced by the row's first block, and the rest of its last block is zeroed.
    """
    num_kv_heads, block_size, head_dim = cache.shape[1:]
    tables_BM = tables_BM[:, : -(-longest // block_size)].long()
    (num_rows, width), device = tables_BM.shape, cache.device
    owned_BM = torch.arange(width, device=device) * block_size < lengths_B[:, None]
    tables_BM = torch.where(owned_BM, tables_BM, tables_BM[:, :1])
    # One row of [blocks * K, P * D] per (sequence, head, block): a single copy already in the order of the result.
    rows = tables_BM[:, None] * num_kv_heads + torch.arange(num_kv_heads, device=device)[:, None]
    context = cache.reshape(-1, block_size * head_dim).index_select(0, rows.flatten())
    context = context.view(num_rows, num_kv_heads, width * block_size, head_dim)
    last_BP = (lengths_B.long() - 1).clamp(min=0)[:, None] // block_size * block_size
    last_BP = last_BP + torch.arange(block_size, device=device)
    index = last_BP[:, None, :, None].expand(-1, num_kv_heads, -1, head_dim)
    tail = context.gather(2, index).masked_fill_((last_BP >= lengths_B[:, None])[:, None, :, None], 0)
    return context.scatter_(2, index, tail)[:, :, :longest]


def paged_decode(
    q_BND: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables_BM: torch.Tensor,
    lengths_B: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Attention of one query per row over its cached tokens, [B, N, D]. Rows of length 0 give zeros.

    Table entries and cache positions beyond a row's length do not matter, whatever they hold.
    """
    out = torch.zeros_like(q_BND)
    longest = int(lengths_B.max()) if len(q_BND) else 0
    if not longest:
        return out
    # In groups of rows: gathers larger than the processor's cache cost more than the extra calls.
    step = max(1, GATHER_ELEMENTS // (longest * k_cache.shape[1] * k_cache.shape[3]))
    for first in range(0, len(q_BND), step):
        rows = slice(first, first + step)
        out[rows] = _decode_rows(q_BND[rows], k_cache, v_cache, tables_BM[rows], lengths_B[rows], scale)
    return out


def _decode_rows(
    q_BND: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables_BM: torch.Tensor,
    lengths_B: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """paged_decode of a few rows in one attention call."""
    longest = int(lengths_B.max())
    if not longest:
        return torch.zeros_like(q_BND)
    k_BKSD, v_BKSD = (gather_context(c, tables_BM, lengths_B, longest).to(q_BND.dtype) for c in (k_cache, v_cache))
    # The G queries that share a KV head are its query rows, so no key is copied per query head.
    q_BKGD = q_BND.reshape(len(q_BND), k_cache.shape[1], -1, q_BND.shape[-1])
    seen_BS = torch.arange(longest, device=q_BND.device) < lengths_B[:, None]
    mask = None if len(q_BND) == 1 else seen_BS[:, None, None]
    out = F.scaled_dot_product_attention(q_BKGD, k_BKSD, v_BKSD, attn_mask=mask, scale=scale)
    return out.reshape(q_BND.shape).masked_fill((lengths_B == 0)[:, None, None], 0)


def paged_prefill(
    q_TND: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tables_CM: torch.Tensor,
    query_start: torch.Tensor,
    lengths_C: torch.Tensor,
    max_query: int,
    scale: float,
) -> torch.Tensor:
    """Causal attention of chunks over the cache, which already holds their own keys and values, [T, N, D].

    Chunk c is the tokens query_start[c] .. query_start[c + 1] of q and ends at position lengths[c] - 1. Rows of no
    chunk give zeros. max_query is the longest chunk (the Triton version sizes its grid by it).
    """
    out = torch.zeros_like(q_TND)
    starts = query_start.tolist()
    for chunk, length in enumerate(lengths_C.tolist()):
        tokens, rows = slice(starts[chunk], starts[chunk + 1]), slice(chunk, chunk + 1)
        num_query = tokens.stop - tokens.start
        if not num_query:
            continue
        assert num_query <= min(max_query, length), "a chunk is longer than max_query or than its context"
        k_1KSD, v_1KSD = (
            gather_context(c, tables_CM[rows], lengths_C[rows], length).to(q_TND.dtype) for c in (k_cache, v_cache)
        )
        whole = num_query == length
        mask = None if whole else _causal(num_query, length, q_TND.device)
        q_1NTD = q_TND[tokens].transpose(0, 1)[None]
        attended = F.scaled_dot_product_attention(
            q_1NTD, k_1KSD, v_1KSD, attn_mask=mask, is_causal=whole, scale=scale, enable_gqa=True
        )
        out[tokens] = attended[0].transpose(0, 1)
    return out


def _causal(num_query: int, length: int, device: torch.device) -> torch.Tensor:
    """[num_query, length]: which keys each of the last num_query positions sees."""
    return torch.ones(num_query, length, dtype=torch.bool, device=device).tril(length - num_query)


def philox(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four counter words and two key words, each 32 bits in an int64 tensor, to four random words.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap modulo 2**64; the mask removes the sign that the shift drags along.
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & WORD_MASK, (product1 >> 32) & WORD_MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & WORD_MASK, high0 ^ c3 ^ k1, product0 & WORD_MASK
        k0, k1 = (k0 + PHILOX_KEY_STEPS[0]) & WORD_MASK, (k1 + PHILOX_KEY_STEPS[1]) & WORD_MASK
    return c0, c1, c2, c3


def _gumbel_groups(
    seeds_B: torch.Tensor, choices_B: torch.Tensor, out_index_B: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """Gumbel noise of the four token ids of each group (id // 4): groups [..., g] to [B, g, 4], fp32."""
    seeds, choices, out_index = (x.long()[:, None] for x in (seeds_B, choices_B, out_index_B))
    key = (seeds & WORD_MASK, (seeds >> 32) & WORD_MASK)
    words = philox((out_index, groups, choices, torch.zeros_like(choices)), key)
    uniform = torch.stack(words, dim=-1).float().add_(0.5).mul_(2.0**-32).clamp_(max=LARGEST_UNIFORM)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def gumbel_noise(
    seeds_B: torch.Tensor, choices_B: torch.Tensor, out_index_B: torch.Tensor, ids_V: torch.Tensor
) -> torch.Tensor:
    """Standard Gumbel noise of each (row, token id), fp32 [B, V]: a function of seed, choice, output index and id.

    seeds int64 (the unsigned seed's bits), ids int64 [V], or [B, V] where rows ask for different ids. Philox4x32-10
    with key = (seed's low word, high word), counter = (output index, id // 4, choice, 0), lane = id % 4;
    u = (word + 0.5) / 2**32 in fp32, at most 1 - 2**-24; noise = -log(-log1p(-u)), so that the upper tail
    (small u) keeps its precision.
    """
    groups_V4 = _gumbel_groups(seeds_B, choices_B, out_index_B, ids_V // 4)
    lanes = (ids_V % 4).expand(groups_V4.shape[:-1])
    return groups_V4.gather(-1, lanes[..., None])[..., 0]


def noisy_argmax(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    seeds_B: torch.Tensor,
    choices_B: torch.Tensor,
    out_index_B: torch.Tensor,
    first_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample by the Gumbel maximum: argmax over v of logits / T + noise(first_id + v).

    Returns (value_B fp32, id_B int64); ids are global, values compare across vocabulary shards. Rows with a temperature
    below 1e-5 take the plain argmax of the logits and its logit. Ties go to the lowest id.
    """
    scores_BV = logits_BV.float()
    drawn = (temperature_B >= GREEDY_BELOW).nonzero()[:, 0]
    if len(drawn):
        scores_BV = scores_BV.clone() if scores_BV is logits_BV else scores_BV
        groups = torch.arange(first_id // 4, (first_id + scores_BV.shape[1] - 1) // 4 + 1, device=logits_BV.device)
        noise = _gumbel_groups(seeds_B[drawn], choices_B[drawn], out_index_B[drawn], groups).flatten(1)
        noise = noise[:, first_id % 4 :][:, : scores_BV.shape[1]]
        scores_BV[drawn] = scores_BV[drawn] / temperature_B[drawn, None].float() + noise
    value_B, index_B = scores_BV.max(dim=-1)
    return value_B, index_B + first_id


def attend(
    qkv_TF: torch.Tensor,
    q_norm_D: torch.Tensor,
    k_norm_D: torch.Tensor,
    eps: float,
    layer: int,
    ctx: StepContext,
    scale: float,
) -> torch.Tensor:
    """The attention of one layer: norm, rotate and write all tokens, then decode rows and chunks, [T, N * D]."""
    k_cache, v_cache = ctx.k_cache[layer], ctx.v_cache[layer]
    q_TND = qk_norm_rope_write(
        qkv_TF, q_norm_D, k_norm_D, eps, ctx.cos_sin, ctx.positions_T, k_cache, v_cache, ctx.cache_slots_T
    )
    count, parts = ctx.num_decode, []
    if count:
        rows = (ctx.decode_tables_BM, ctx.decode_lengths_B)
        parts.append(paged_decode(q_TND[:count], k_cache, v_cache, *rows, scale))
    if ctx.prefill is not None:
        p = ctx.prefill
        chunks = (p.tables_CM, p.query_start, p.lengths_C, p.max_query)
        parts.append(paged_prefill(q_TND[count:], k_cache, v_cache, *chunks, scale))
    return torch.cat(parts).flatten(1)


def top_candidates(logits_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row, best first: values and ids int64 [B, count]."""
    values, ids = torch.topk(logits_BV, count)
    return values, ids
