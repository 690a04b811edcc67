"""Every operation in plain torch: the specification of the Triton kernels and of cpu.py.

T tokens, B decode rows, C chunks, M table width, N query heads, K key/value heads, G = N / K, D head size,
P block size, S context tokens, H hidden, I inner (local), F fused rows, V vocabulary (local), R sampled rows.
Caches are [blocks, K, P, D].
Host reads (boolean masks, .tolist()) are allowed here and in cpu.py, nowhere on the GPU path.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from tpqwen.kernels.context import DecodeInputs, SlotTensors, StepContext

Op = Callable[..., Any]
GREEDY_BELOW = 1e-5  # temperatures under it mean plain argmax, as SamplingParams.greedy
MAX_CANDIDATES = 64  # the largest top_k that is answered from the best candidates alone
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD_MASK = 0xFFFFFFFF
LARGEST_UNIFORM = 1.0 - 2.0**-24


def by_row(op: Op, *places: int, copies: int = 1) -> Op:
    """The operation, with its arguments at `places` taken one row at a time: calls of one shape on storage of its own.

    So a library has no occasion to treat a row otherwise than the next, and a row's bits do not depend on its place or
    its neighbours. Results, a tensor or a tuple of them, are put together again. copies: as how many rows each is given
    to the operation, of whose results the first is kept.
    """

    def run(*args: Any) -> Any:
        results = [
            op(*(torch.cat([a[row : row + 1]] * copies) if i in places else a for i, a in enumerate(args)))
            for row in range(len(args[places[0]]))
        ]
        if isinstance(results[0], tuple):
            return tuple(torch.cat([r[:1] for r in parts]) for parts in zip(*results, strict=True))
        return torch.cat([r[:1] for r in results])

    return run


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) in fp32 over the last axis, cast back to x's dtype, then times the weight."""
    x32 = x_TH.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return normed.to(x_TH.dtype) * weight_H


def add_up(parts: list[torch.Tensor] | tuple[torch.Tensor, ...], residual: torch.Tensor | None = None) -> torch.Tensor:
    """The parts' sum in their order, in fp32, rounded once; then the residual added to that."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    rounded = total.to(parts[0].dtype)
    return rounded if residual is None else residual + rounded


def dequantize(weight_OI: torch.Tensor, scale_O: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 times its row's fp32 scale, rounded once to dtype."""
    return (weight_OI.float() * scale_O[:, None]).to(dtype)


def linear(x_TI: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T, [T, O]. With a scale the weight is int8, here and in the products below, and means its rows times it."""
    return F.linear(x_TI, weight_OI if scale_O is None else dequantize(weight_OI, scale_O, x_TI.dtype))


def silu_mul(gate_up_TF: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [T, I], of I columns of gate and then I of up."""
    gate_TI, up_TI = gate_up_TF.chunk(2, dim=-1)
    return F.silu(gate_TI) * up_TI


def normed(rms_norm: Op, linear: Op, after: Op = lambda x: x) -> Op:
    """A product of normed rows made of these operations: norm_linear, or norm_gate_up with a silu_mul after it."""

    def product(
        h_TH: torch.Tensor,
        norm_H: torch.Tensor,
        eps: float,
        weight_OH: torch.Tensor,
        scale_O: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """RMSNorm, then x W^T: [T, O]; then what comes after."""
        result: torch.Tensor = after(linear(rms_norm(h_TH, norm_H, eps), weight_OH, scale_O))
        return result

    return product


norm_linear = normed(rms_norm, linear)
norm_gate_up = normed(rms_norm, linear, silu_mul)  # the weight's 2I rows are I gate rows, then I up rows


def linear_add(
    x_TI: torch.Tensor, weight_HI: torch.Tensor, residual_TH: torch.Tensor, scale_H: torch.Tensor | None = None
) -> torch.Tensor:
    """residual + x W^T, [T, H], a new tensor."""
    return residual_TH + linear(x_TI, weight_HI, scale_H)


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
    """The tokens that block tables name, [B, K, S, D] with S = longest; zeros beyond a row's length.

    What lies there may be stale, even NaN of another sequence, which no mask would keep out of a sum.
    """
    block_size = cache.shape[2]
    blocks = cache[tables_BM[:, : -(-longest // block_size)].long()]  # [B, M, K, P, D]
    context = blocks.transpose(1, 2).flatten(2, 3)[:, :, :longest]
    beyond_BS = torch.arange(longest, device=cache.device) >= lengths_B[:, None]
    return context.masked_fill(beyond_BS[:, None, :, None], 0)


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
    longest = int(lengths_B.max()) if len(q_BND) else 0
    if not longest:
        return torch.zeros_like(q_BND)
    k_BKSD, v_BKSD = (gather_context(c, tables_BM, lengths_B, longest).to(q_BND.dtype) for c in (k_cache, v_cache))
    # The G queries that share a KV head are its query rows, so no key is copied per query head.
    q_BKGD = q_BND.reshape(len(q_BND), k_cache.shape[1], -1, q_BND.shape[-1])
    seen_BS = torch.arange(longest, device=q_BND.device) < lengths_B[:, None]
    out = F.scaled_dot_product_attention(q_BKGD, k_BKSD, v_BKSD, attn_mask=seen_BS[:, None, None], scale=scale)
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
        rows = (ctx.tables_SM[ctx.decode_slots_B], ctx.decode_lengths_B)
        parts.append(paged_decode(q_TND[:count], k_cache, v_cache, *rows, scale))
    if ctx.prefill is not None:
        p = ctx.prefill
        chunks = (p.tables_CM, p.query_start, p.lengths_C, p.max_query)
        parts.append(paged_prefill(q_TND[count:], k_cache, v_cache, *chunks, scale))
    return torch.cat(parts).flatten(1)


def log_sum_exp(logits_RV: torch.Tensor) -> torch.Tensor:
    """The logarithm of each row's sum of exponentials, [R]."""
    return torch.logsumexp(logits_RV, -1)


def top_candidates(logits_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row, best first: values and ids int64 [B, count]."""
    values, ids = torch.topk(logits_BV, count)
    return values, ids


def ranked_candidates(logits_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """top_candidates with the lowest id first among equals, which torch.topk orders as it likes."""
    values, ids = logits_BV.sort(dim=-1, descending=True, stable=True)
    return values[:, :count], ids[:, :count]


def begin_step(state: SlotTensors, slots_B: torch.Tensor, block_size: int) -> DecodeInputs:
    """Start a pass: count it, and advance the decode rows' slots by the token that this pass runs.

    slots_B int32; rows of the padding slot get token 0, length 0 and no place in the cache.
    """
    state.turn.add_(1)
    slots = slots_B.long()
    active = slots != state.padding_slot
    positions = torch.where(active, state.length[slots], 0)
    blocks = state.tables_SM[slots, (positions // block_size).long()].long()
    cache_slots = torch.where(active, blocks * block_size + positions % block_size, -1)
    lengths = torch.where(active, positions + 1, 0)
    state.length[slots] = lengths
    ids = torch.where(active, state.last_token[slots], 0)
    return DecodeInputs(ids, positions, cache_slots, lengths)


def noisy_slices(
    logits_RV: torch.Tensor, state: SlotTensors, slots_R: torch.Tensor, first_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """noisy_argmax of rows that draw as their slots say: [R, slices] each, values fp32 and global ids int64.

    The best of a row's slices (ties: lowest id) is its token; here there is one slice. A row with NaN or +inf has a NaN
    or +inf among its values. Rows with a small top_k get the plain arg-max: finish_step draws from their candidates.
    """
    slots = slots_R.long()
    temperature = torch.where(has_small_top_k(state, slots), 0.0, state.temperature[slots])
    draw = (state.seed[slots], state.choice[slots], state.out_index[slots])
    value, token = noisy_argmax(logits_RV, temperature, *draw, first_id)
    return value[:, None], token[:, None]


def has_small_top_k(state: SlotTensors, slots: torch.Tensor) -> torch.Tensor:
    """Rows whose answer lies among their MAX_CANDIDATES best logits, bool [R]."""
    top_k = state.top_k[slots]
    return (top_k > 0) & (top_k <= MAX_CANDIDATES) & (state.temperature[slots] >= GREEDY_BELOW)


def head_of(norm_linear: Op, noisy_slices: Op) -> Op:
    """head_slices by way of logits in memory, made and drawn from by these two operations."""

    def head_slices(
        h_RH: torch.Tensor,
        norm_H: torch.Tensor,
        eps: float,
        weight_VH: torch.Tensor,
        state: SlotTensors,
        slots_R: torch.Tensor,
        first_id: int,
        num_valid: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Final norm, LM head and noisy_slices over its first num_valid ids."""
        logits_RV = norm_linear(h_RH, norm_H, eps, weight_VH)
        logits_RV[:, num_valid:] = float("-inf")
        value_RS, token_RS = noisy_slices(logits_RV, state, slots_R, first_id)
        return value_RS, token_RS

    return head_slices


head_slices = head_of(norm_linear, noisy_slices)


def best_slice(value_RS: torch.Tensor, id_RS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's best slice, the lowest id of equal ones: value fp32 and id int64 [R]. NaN counts as +inf."""
    value_RS = torch.where(torch.isnan(value_RS), float("inf"), value_RS)
    best_R = value_RS.amax(-1)
    ids = torch.where(value_RS == best_R[:, None], id_RS.long(), torch.iinfo(torch.int64).max)
    return best_R, ids.amin(-1)


def choose_by(
    gumbel_noise: Op,
    values_RC: torch.Tensor,
    ids_RC: torch.Tensor,
    state: SlotTensors,
    slots_R: torch.Tensor,
) -> torch.Tensor:
    """Top-k, top-p over what is left, min-p, then the arg-max of value / T + noise: ids int64 [R].

    Values are logits, best first. Temperatures are at least GREEDY_BELOW where the answer is used.
    """
    slots = slots_R.long()
    temperature = state.temperature[slots].clamp_min(GREEDY_BELOW)[:, None]
    scaled = values_RC.float() / temperature
    rank = torch.arange(values_RC.shape[1], device=values_RC.device)
    top_k = state.top_k[slots]
    top_k = torch.where(top_k > 0, top_k, values_RC.shape[1])
    scaled = scaled.masked_fill(rank >= top_k[:, None], float("-inf"))
    probs = torch.softmax(scaled, -1)
    before = probs.cumsum(-1) - probs
    keep = (before < state.top_p[slots][:, None]) & (probs >= state.min_p[slots][:, None] * probs[:, :1])
    keep[:, 0] = True
    noise = gumbel_noise(state.seed[slots], state.choice[slots], state.out_index[slots], ids_RC)
    noisy = (scaled + noise).masked_fill(~keep, float("-inf"))
    return ids_RC.gather(1, noisy.argmax(-1, keepdim=True))[:, 0]


choose = partial(choose_by, gumbel_noise)


def finish_step(
    state: SlotTensors,
    slots_R: torch.Tensor,
    value_RS: torch.Tensor,
    id_RS: torch.Tensor,
    candidates: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Settle each row's token, make it its slot's last one, and write it into the ring: int32 [R].

    The token is the best slice's; where the slot draws with a small top_k, the one chosen of its candidates (values
    and ids [R, C], best first, at least MAX_CANDIDATES or all ids). -1, and 0 as the slot's last token, where the best
    value is not finite: NaN or infinity in the logits, or nothing allowed. Slots are distinct but for the padding slot.
    Where history is kept, it stands behind what is in the cache.
    """
    value_R, token_R = best_slice(value_RS, id_RS)
    slots = slots_R.long()
    if candidates is not None:
        token_R = torch.where(has_small_top_k(state, slots), choose(*candidates, state, slots_R), token_R)
    tokens = torch.where(torch.isfinite(value_R), token_R, -1).to(torch.int32)
    state.last_token[slots] = tokens.clamp(min=0)
    state.out_index[slots] += 1
    if state.history.shape[1]:
        state.history[slots, state.length[slots].long()] = state.last_token[slots]
    state.ring[(state.turn - 1) % len(state.ring), : len(tokens)] = tokens
    return tokens


def edit_slots(tables_SM: torch.Tensor, edits_E3: torch.Tensor) -> None:
    """tables[slot, index] = block for each edit int32 (slot, index, block)."""
    e = edits_E3.long()
    tables_SM[e[:, 0], e[:, 1]] = edits_E3[:, 2]


def set_rows(rows: torch.Tensor, slots_B: torch.Tensor, padding: int) -> None:
    """rows int32 becomes slots_B, then padding up to its end."""
    rows[: len(slots_B)] = slots_B
    rows[len(slots_B) :] = padding
