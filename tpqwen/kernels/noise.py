"""Gumbel noise on the device: Philox4x32-10 words of (seed, output index, id // 4, choice), as in reference.py.

Lanes are the four ids of a group. The logarithms may differ from the reference's in the last bits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

LN2 = tl.constexpr(math.log(2))
ASSEMBLY = tl.constexpr(torch.version.hip is None and not triton.knobs.runtime.interpret)


@triton.jit
def random_words(seed, out_index, choice, group):
    """The four Philox4x32-10 words of each group of four ids, uint32; int32 arguments and an int64 seed broadcast."""
    zero = ((group + out_index + choice) * 0).to(tl.uint32)
    c0, c1, c2, c3 = zero + out_index.to(tl.uint32), zero + group.to(tl.uint32), zero + choice.to(tl.uint32), zero
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in range(10):  # left to the compiler: unrolled it is most of a large kernel's code and compile time
        p0 = tl.mul(c0.to(tl.uint64), 0xD2511F53, sanitize_overflow=False)  # one instruction for both halves
        p1 = tl.mul(c2.to(tl.uint64), 0xCD9E8D57, sanitize_overflow=False)
        high0, high1 = (p0 >> 32).to(tl.uint32), (p1 >> 32).to(tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1.to(tl.uint32), high0 ^ c3 ^ k1, p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _log(x):
    """Natural logarithm of normal numbers, on NVIDIA's GPUs by the special function unit: off by 2**-22 * log(2), times
    the result where that is above log(2)."""
    if ASSEMBLY:
        asm: tl.constexpr = "lg2.approx.ftz.f32 $0, $1;"
        result = tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1) * LN2
    else:
        result = tl.log(x)
    return result


@triton.jit
def gumbel(word):
    """Standard Gumbel noise of uniform words, fp32: -log(-log1p(-u)), precise where u is small."""
    u = tl.minimum(word.to(tl.float32) * 2.0**-32 + 2.0**-33, 1.0 - 2.0**-24)
    tail = u * (1 / 4 + u * (1 / 5 + u * (1 / 6 + u * (1 / 7))))
    series = u * (1.0 + u * (1 / 2 + u * (1 / 3 + tail)))
    return -_log(tl.where(u < 1 / 8, series, -_log(1.0 - u)))


@triton.jit
def group_noise(seed, out_index, choice, group):
    """Noise of the four ids of each group [A, G] for one row, [A, 4 G]: a thread keeps the four that it draws."""
    w0, w1, w2, w3 = random_words(seed, out_index, choice, group)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return gumbel(tl.reshape(words, [group.shape[0], 4 * group.shape[1]]))


@triton.jit
def tile_noise(seed, out_index, choice, first_group, IDS: tl.constexpr, ROWS: tl.constexpr):
    """Noise of IDS consecutive ids for ROWS rows, [IDS, ROWS]; seed, out_index and choice are [ROWS]."""
    group = first_group + tl.arange(0, IDS // 4)[:, None]
    w0, w1, w2, w3 = random_words(seed[None, :], out_index[None, :], choice[None, :], group)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [IDS / 4, ROWS, 2, 2]
    return gumbel(tl.reshape(tl.permute(words, (0, 2, 3, 1)), [IDS, ROWS]))


@triton.jit
def id_noise(seed, out_index, choice, ids):
    """Noise of any ids int64 for one row, in their order."""
    w0, w1, w2, w3 = random_words(seed, out_index, choice, (ids // 4).to(tl.int32))
    lane = ids % 4
    return gumbel(tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3))))
