"""Matrix products of a decode step with their neighbours fused: RMSNorm before; residual add or SwiGLU after.

T tokens (batch rows), H hidden, I inputs or inner width, O outputs, F = 2I, K the summed width. The kernels stream each
weight once; each asks for the next kernel's launch, starts its own weight loads, and only then waits for the previous
one (programmatic dependent launch): weights never depend on an earlier kernel. Two products may share the norm between
them (gemm_norm.py). With 65 rows or more, products of 16-bit weights run in larger tiles (gemm_tiles.py) or by cuBLAS,
whichever was faster; above 256 rows that is cuBLAS, but for the gates of small models.

int8 weights become the activations' type in registers, which is exact, and their rows' scales multiply the fp32 sums.
Above 256 rows, where tensor cores and not memory set the pace, the weight is written out for cuBLAS (dequantize.py).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated"

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from tpqwen.kernels.context import NormedProduct, Scaled
from tpqwen.kernels.dequantize import dequantize
from tpqwen.kernels.gemm_norm import NO_NORM, NormUse, load_squares, next_scales, store_scaled, sum_squares
from tpqwen.kernels.gemm_table import ADD, MAX_ROWS, PLAIN, SILU, Config, Numbers, choose, fit, padded_rows, spares_norm
from tpqwen.kernels.gemm_tiles import tile_product
from tpqwen.kernels.launch import launch_options, pdl_supported, prefetch_weights, release_next, wait_previous
from tpqwen.kernels.norm import rms_norm, silu_mul


class Workspace:
    """Scratch of the split products, at a fixed address so that CUDA graphs may keep it. Used by one stream at a time.

    partial_V fp32 holds unreduced tiles and needs no initial value; arrived_N int32 counts programs per tile, is zero
    between kernels, and is set back to zero by the last program of each tile.
    """

    def __init__(self, device: torch.device, partial_floats: int = 8 << 20, counters: int = 4096) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the GEMM workspace must exist before a CUDA graph is captured")
        self.partial_V = torch.empty(partial_floats, dtype=torch.float32, device=device)
        self.arrived_N = torch.zeros(counters, dtype=torch.int32, device=device)

    def fits(self, tiles: int, split: int, tile_floats: int) -> bool:
        """Whether `tiles` tiles of `tile_floats` fp32 each, split `split` ways, have room."""
        return tiles <= len(self.arrived_N) and tiles * split * tile_floats <= len(self.partial_V)


@functools.cache
def workspace(device: torch.device) -> Workspace:
    """The device's workspace; made on the first call, which must come before any graph capture."""
    return Workspace(device)


@triton.jit
def weight_rows(tile, N: tl.constexpr, BLOCK_N: tl.constexpr, EPILOGUE: tl.constexpr):
    """The weight rows of a tile, [BLOCK_N]; for SwiGLU gate row, up row in turn. Rows past N repeat N - 1."""
    r = tl.arange(0, BLOCK_N)
    if EPILOGUE == 2:
        n = tile * (BLOCK_N // 2) + r // 2
        if N % (BLOCK_N // 2) != 0:
            n = tl.minimum(n, N - 1)
        return n + (r % 2) * N
    n = tile * BLOCK_N + r
    if N % BLOCK_N != 0:
        n = tl.minimum(n, N - 1)
    return n


@triton.jit
def _int8_by_bytes(weights):
    """int8 as fp32, exactly, four at a time, without conversions, of which a GPU does a quarter as many in a cycle.

    xor 128 makes w the unsigned byte w + 128; as the lowest byte of the float 2**23 it adds just that, so less
    2**23 + 128 it is w. Not available in the interpreter.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 bytes;
        xor.b32 bytes, $4, 0x80808080;
        prmt.b32 $0, bytes, 0x4B000000, 0x7440;
        prmt.b32 $1, bytes, 0x4B000000, 0x7441;
        prmt.b32 $2, bytes, 0x4B000000, 0x7442;
        prmt.b32 $3, bytes, 0x4B000000, 0x7443;
        sub.f32 $0, $0, 0f4B000080;
        sub.f32 $1, $1, 0f4B000080;
        sub.f32 $2, $2, 0f4B000080;
        sub.f32 $3, $3, 0f4B000080;
        }""",
        "=&r,=&r,=&r,=&r,r",
        [weights],
        dtype=tl.float32,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _gemv_kernel(
    x,
    w,
    w_scale,
    norm,
    residual,
    out,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
    PREFETCH: tl.constexpr,
    SCALED: tl.constexpr,
    BY_BYTES: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    release_next(PDL)
    tile = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)[None, :]
    n = weight_rows(tile, N, BLOCK_N, EPILOGUE)
    rows, row_scale = n[:, None], _row_scale(w_scale, n, SCALED)
    # As many int8 weights to a thread as numbers of x; otherwise one of them changes threads through shared memory.
    w_tile = w + rows * K + (tl.max_contiguous(k, [1, 8]) if SCALED else k)
    held = ()
    scales = ()
    for t in tl.static_range(EARLY):
        held = held + (tl.load(w_tile + t * BLOCK_K, eviction_policy="evict_first"),)  # noqa: RUF005
        if NORM:
            scales = scales + (tl.load(norm + t * BLOCK_K + k),)  # noqa: RUF005
    if PDL and PREFETCH > 0:
        prefetch_weights(w, rows, K, EARLY * BLOCK_K, BLOCK_N, PREFETCH, WARPS)
    wait_previous(PDL)
    sums = ()
    squares = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),)  # noqa: RUF005
        squares = squares + (tl.zeros([1, BLOCK_K], tl.float32),)  # noqa: RUF005
    for t in tl.static_range(K // BLOCK_K):
        weights = held[t] if t < EARLY else tl.load(w_tile + t * BLOCK_K, eviction_policy="evict_first")
        weights = _int8_by_bytes(weights) if BY_BYTES else weights.to(tl.float32)
        more_sums = ()
        more_squares = ()
        for m in tl.static_range(ROWS):
            value = tl.load(x + m * K + t * BLOCK_K + k, eviction_policy="evict_last").to(tl.float32)
            if NORM:
                more_squares = more_squares + (squares[m] + value * value,)  # noqa: RUF005
                scale = scales[t] if t < EARLY else tl.load(norm + t * BLOCK_K + k)
                value = value * scale.to(tl.float32)
            more_sums = more_sums + (sums[m] + weights * value,)  # noqa: RUF005
        sums = more_sums
        if NORM:
            squares = more_squares
    for m in tl.static_range(ROWS):
        _store_row(sums[m], squares[m], row_scale, residual, out, eps, tile, m, N, K, BLOCK_N, NORM, EPILOGUE)


@triton.jit
def _row_scale(w_scale, rows, SCALED: tl.constexpr):
    """What the sums of the weight's rows [BLOCK_N] are multiplied by: their scales, settled like the weights, or 1."""
    return tl.load(w_scale + rows) if SCALED else tl.full([1], 1.0, tl.float32)


@triton.jit
def _store_row(
    acc,
    square,
    row_scale,
    residual,
    out,
    eps,
    tile,
    m,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """Finish row m of a gemv tile: acc [BLOCK_N, BLOCK_K] and square [1, BLOCK_K] are sums still spread over K."""
    OUT: tl.constexpr = BLOCK_N // 2 if EPILOGUE == 2 else BLOCK_N
    n = tile * OUT + tl.arange(0, OUT)
    inside = n < N
    if EPILOGUE == 1:
        before = tl.load(residual + m * N + n, mask=inside, other=0.0).to(tl.float32)
    y = tl.sum(acc, axis=1) * row_scale
    if NORM:
        y = y * tl.rsqrt(tl.sum(tl.sum(square, axis=1), axis=0) / K + eps)
    if EPILOGUE == 1:
        y = y + before
    if EPILOGUE == 2:
        gate, up = tl.split(tl.reshape(y, [OUT, 2]))
        y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + m * N + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _dot_kernel(
    x,
    w,
    w_scale,
    norm,
    residual,
    out,
    scaled,
    squares,
    partial,
    arrived,
    M,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr,
    SCALED: tl.constexpr,
    NORM: tl.constexpr,
    PIECES: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """acc = W tile @ x^T: weight rows are the long side of the tensor-core tile, the batch its short side."""
    release_next(PDL)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    first = split * (K // SPLIT)
    n = weight_rows(tile, N, BLOCK_N, EPILOGUE)
    rows, row_scale = n[:, None], _row_scale(w_scale, n, SCALED)
    if PDL and PREFETCH > 0:
        prefetch_weights(w, rows, K, first, BLOCK_N, PREFETCH, WARPS)
    next_scale = next_scales(norm, n, NORM)
    wait_previous(PDL)
    m = tl.arange(0, BLOCK_M)
    pieces = load_squares(squares, m, M, NORM, PIECES)
    k = first + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    square = tl.zeros([BLOCK_M], tl.float32)
    for step in range(0, K // SPLIT, BLOCK_K):
        weights = tl.load(w + rows * K + (step + k), eviction_policy="evict_first")
        values = tl.load(x + m[:, None] * K + (step + k), mask=m[:, None] < M, other=0.0)
        if NORM == 1:
            wide = values.to(tl.float32)
            square += tl.sum(wide * wide, axis=1)
            values = (wide * tl.load(norm + step + k).to(tl.float32)).to(values.dtype)
        acc = tl.dot(weights.to(values.dtype), tl.trans(values), acc, input_precision="ieee")
    if SPLIT == 1:
        square = sum_squares(pieces, square, NORM)
        made = _store_tile(acc, square, row_scale, residual, out, M, eps, tile, N, K, BLOCK_M, BLOCK_N, NORM, EPILOGUE)
        store_scaled(made, next_scale, scaled, squares, M, tile, N, BLOCK_M, BLOCK_N, NORM)
    else:
        place = m[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]  # as the tile is stored at last
        own_squares = partial + tl.num_programs(0) * SPLIT * BLOCK_N * BLOCK_M
        tl.store(partial + (tile * SPLIT + split) * BLOCK_N * BLOCK_M + place, acc)
        if NORM == 1:
            tl.store(own_squares + (tile * SPLIT + split) * BLOCK_M + m, square)
        # All of this program's stores come before the one thread's count; the last to count sees every partial sum.
        tl.debug_barrier()
        count = tl.atomic_add(arrived + tile, 1, sem="acq_rel")
        if count == SPLIT - 1:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            square = tl.zeros([BLOCK_M], tl.float32)
            for s in tl.static_range(SPLIT):
                acc += tl.load(partial + (tile * SPLIT + s) * BLOCK_N * BLOCK_M + place, cache_modifier=".cg")
                if NORM == 1:
                    square += tl.load(own_squares + (tile * SPLIT + s) * BLOCK_M + m, cache_modifier=".cg")
            square = sum_squares(pieces, square, NORM)
            made = _store_tile(
                acc, square, row_scale, residual, out, M, eps, tile, N, K, BLOCK_M, BLOCK_N, NORM, EPILOGUE
            )
            store_scaled(made, next_scale, scaled, squares, M, tile, N, BLOCK_M, BLOCK_N, NORM)
            tl.store(arrived + tile, 0)


@triton.jit
def _store_tile(
    acc,
    square,
    row_scale,
    residual,
    out,
    M,
    eps,
    tile,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """Finish a dot tile: acc [BLOCK_N, BLOCK_M] complete sums, square [BLOCK_M] the rows' sums of squares. The result:
    what is stored, in out's type."""
    OUT: tl.constexpr = BLOCK_N // 2 if EPILOGUE == 2 else BLOCK_N
    n = (tile * OUT + tl.arange(0, OUT))[:, None]
    m = tl.arange(0, BLOCK_M)[None, :]
    place = m * N + n
    inside = (n < N) & (m < M)
    acc = acc * row_scale[:, None]
    if NORM == 1 or NORM == 2:
        acc = acc * tl.rsqrt(square / K + eps)[None, :]
    if EPILOGUE == 1:
        acc = acc + tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if EPILOGUE == 2:
        gate, up = tl.split(tl.permute(tl.reshape(acc, [OUT, 2, BLOCK_M]), (0, 2, 1)))
        acc = gate / (1.0 + tl.exp(-gate)) * up
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out + place, rounded, mask=inside)
    return rounded


def _launch(
    config: Config,
    epilogue: int,
    x_TK: torch.Tensor,
    weight: tuple[torch.Tensor, torch.Tensor | None],
    out_TN: torch.Tensor,
    *,
    norm: NormUse = NO_NORM,
    residual_TN: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the kernel that `config` names; rows are contiguous, shapes agree, and config has been through fit."""
    matrix, w_scale = weight
    assert x_TK.is_contiguous() and matrix.is_contiguous() and out_TN.is_contiguous(), "gemm takes contiguous tensors"
    (rows, width), columns = x_TK.shape, out_TN.shape[1]
    assert matrix.shape == (columns * (2 if epilogue == SILU else 1), width), "weight and output do not agree"
    before_TN = out_TN if residual_TN is None else residual_TN
    assert before_TN.is_contiguous() and before_TN.shape == out_TN.shape, "residual and output do not agree"
    assert config.path in ("dot", "tile") or norm.scaled is None, "norms are shared by kernels of several rows"
    tiles = triton.cdiv(columns * (2 if epilogue == SILU else 1), config.block_n)
    if config.path == "tile":
        assert w_scale is None, "tiles have no scales"
        return tile_product(config, epilogue, x_TK, matrix, out_TN, before_TN, norm)
    options = {"num_warps": config.warps, **launch_options(x_TK.device)}
    shared = {"PREFETCH": config.prefetch, "NORM": norm.mode, "EPILOGUE": epilogue}
    shared |= {"N": columns, "K": width, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "WARPS": config.warps}
    shared["SCALED"] = w_scale is not None
    scale_K, *scaled = norm.tensors(out_TN)
    tensors = (x_TK, matrix, x_TK if w_scale is None else w_scale, scale_K, before_TN, out_TN)
    if config.path == "gemv":
        by_bytes = w_scale is not None and x_TK.device.type == "cuda"
        gemv = {"ROWS": rows, "EARLY": config.stages, "BY_BYTES": by_bytes}
        _gemv_kernel[(tiles,)](*tensors, norm.eps, **gemv, **shared, **options)
        return out_TN
    block_m = max(16, triton.next_power_of_2(rows))
    scratch = workspace(x_TK.device)
    tile_floats = (config.block_n + 1) * block_m
    assert config.split == 1 or scratch.fits(tiles, config.split, tile_floats), "the product needs a larger workspace"
    _dot_kernel[(tiles, config.split)](
        *tensors,
        *scaled,
        scratch.partial_V,
        scratch.arrived_N,
        rows,
        norm.eps,
        BLOCK_M=block_m,
        SPLIT=config.split,
        PIECES=norm.pieces,
        num_stages=config.stages,
        **shared,
        **options,
    )
    return out_TN


def linear(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    scale_O: torch.Tensor | None = None,
    *,
    out_TO: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """x W^T, [T, O]. A scale, here and below, makes the weight int8: its row's scale multiplies each row."""
    config = _config(config, "plain", x_TI, weight_OI)
    if config.path == "torch" or not len(x_TI):
        weight_OI = _wide(weight_OI, scale_O, x_TI)
        return F.linear(x_TI, weight_OI) if out_TO is None else torch.matmul(x_TI, weight_OI.t(), out=out_TO)
    out_TO = x_TI.new_empty(len(x_TI), len(weight_OI)) if out_TO is None else out_TO
    return _launch(config, PLAIN, x_TI, (weight_OI, scale_O), out_TO)


def norm_linear(
    h_TH: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    weight_OH: torch.Tensor,
    scale_O: torch.Tensor | None = None,
    *,
    scaled: Scaled | None = None,
    out_TO: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """RMSNorm, then x W^T: [T, O]. Fused, 1 / rms multiplies the fp32 sums, so it is never rounded to h's dtype.

    scaled: what linear_add_scaled made of these rows for this product.
    """
    config = _config(config, "norm", h_TH, weight_OH)
    if scaled is not None:
        out_TO = h_TH.new_empty(len(h_TH), len(weight_OH)) if out_TO is None else out_TO
        return _launch(config, PLAIN, scaled.values_TH, (weight_OH, scale_O), out_TO, norm=NormUse.before(scaled, eps))
    if config.path == "torch" or not config.fuse_norm or not len(h_TH):
        x_TH = rms_norm(h_TH, norm_H, eps, out_TH=_room(h_TH, h_TH.shape[1], config))
        return linear(x_TH, weight_OH, scale_O, out_TO=out_TO, config=config)
    out_TO = h_TH.new_empty(len(h_TH), len(weight_OH)) if out_TO is None else out_TO
    return _launch(config, PLAIN, h_TH, (weight_OH, scale_O), out_TO, norm=NormUse.inside(norm_H, eps))


def norm_gate_up(
    h_TH: torch.Tensor,
    norm_H: torch.Tensor,
    eps: float,
    weight_FH: torch.Tensor,
    scale_F: torch.Tensor | None = None,
    *,
    scaled: Scaled | None = None,
    out_TI: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """RMSNorm, then silu(gate) * up, [T, I]. The weight's 2I rows are I gate rows, then I up rows. scaled: as above."""
    config = _config(config, "silu", h_TH, weight_FH)
    if config.path == "torch" or not len(h_TH):
        return silu_mul(F.linear(rms_norm(h_TH, norm_H, eps), _wide(weight_FH, scale_F, h_TH)), out_TI=out_TI)
    out_TI = _room(h_TH, len(weight_FH) // 2, config) if out_TI is None else out_TI
    if scaled is not None:
        return _launch(config, SILU, scaled.values_TH, (weight_FH, scale_F), out_TI, norm=NormUse.before(scaled, eps))
    if not config.fuse_norm:
        x_TH = rms_norm(h_TH, norm_H, eps, out_TH=_room(h_TH, h_TH.shape[1], config))
        return _launch(config, SILU, x_TH, (weight_FH, scale_F), out_TI)
    return _launch(config, SILU, h_TH, (weight_FH, scale_F), out_TI, norm=NormUse.inside(norm_H, eps))


def linear_add(
    x_TI: torch.Tensor,
    weight_HI: torch.Tensor,
    residual_TH: torch.Tensor,
    scale_H: torch.Tensor | None = None,
    *,
    out_TH: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """residual + x W^T, [T, H], rounded once. A new tensor unless out_TH is given, which may be the residual itself."""
    config = _config(config, "add", x_TI, weight_HI)
    if config.path == "torch" or not len(x_TI):
        return torch.addmm(residual_TH, x_TI, _wide(weight_HI, scale_H, x_TI).t(), out=out_TH)
    out_TH = torch.empty_like(residual_TH) if out_TH is None else out_TH
    return _launch(config, ADD, x_TI, (weight_HI, scale_H), out_TH, residual_TN=residual_TH)


def linear_add_scaled(
    x_TI: torch.Tensor,
    weight_HI: torch.Tensor,
    residual_TH: torch.Tensor,
    scale_H: torch.Tensor | None,
    following: NormedProduct,
    *,
    out_TH: torch.Tensor | None = None,
    configs: tuple[Config | None, Config | None] = (None, None),
) -> tuple[torch.Tensor, Scaled | None]:
    """linear_add, and what spares the following product its norm, where that is faster. configs: of either product."""
    config = _config(configs[0], "add", x_TI, weight_HI)
    # float16 may be too narrow for rows that no norm has made small; int8 was not measured.
    suits = 0 < len(x_TI) <= MAX_ROWS and x_TI.dtype != torch.float16 and scale_H is None
    after = _config(configs[1], following.operation, residual_TH, following.weight_OH) if suits else None
    if after is None or not spares_norm(config, after, len(weight_HI)):
        return linear_add(x_TI, weight_HI, residual_TH, scale_H, out_TH=out_TH, config=config), None
    out_TH = torch.empty_like(residual_TH) if out_TH is None else out_TH
    pieces, values_TH = triton.cdiv(len(weight_HI), config.block_n), _room(residual_TH, len(weight_HI), after)
    scaled = Scaled(values_TH, x_TI.new_empty(pieces, len(x_TI), dtype=torch.float32))
    norm = NormUse.after(scaled, following.norm_H)
    return _launch(config, ADD, x_TI, (weight_HI, scale_H), out_TH, norm=norm, residual_TN=residual_TH), scaled


def _room(like_TK: torch.Tensor, columns: int, config: Config) -> torch.Tensor:
    """Room for activations, [T, columns], in memory that goes on to whole tiles."""
    rows = len(like_TK)
    return like_TK.new_empty(padded_rows(config, rows), columns)[:rows]


def _wide(weight: torch.Tensor, scale: torch.Tensor | None, x_TK: torch.Tensor) -> torch.Tensor:
    """The weight as cuBLAS takes it. Its memory is PyTorch's: one piece for all layers, in graphs one of their pool."""
    return weight if scale is None else dequantize(weight, scale, x_TK.dtype)


def _config(given: Config | None, operation: str, x_TK: torch.Tensor, weight: torch.Tensor) -> Config:
    numbers = Numbers(x_TK.itemsize, weight.itemsize)
    if given is not None:
        return fit(given, len(x_TK), weight.shape[1], numbers)
    config = choose(operation, len(x_TK), *weight.shape, numbers)
    has_tma = not x_TK.is_cuda or pdl_supported(x_TK.device)
    return config if has_tma or config.path != "tile" else Config("torch")
