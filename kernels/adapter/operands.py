"""What the kernels of the bottleneck adapter share: their operands, and the tiles that all of them make.

    z = x + skip (skip_in) or x          v = LN(z) or z          q = v Dᵀ + db, a = act(q)
    w = a Uᵀ + ub                        e = keep · scaling / (1 - p) · w
    u = gate · scale · e                 s = u + x (residual_x) + skip (residual_skip)

x, skip (T, d), rows with any stride; D (m, d), U (d, m) through their strides; vectors contiguous; scale (d,), or
(1,) with stride 0. Every tile is fp32, (BLOCK_T, BLOCK_D) from column ``start``, and 0 outside the rows and columns
that live. The bottleneck stands side by side in a tuple of (BLOCK_T, BLOCK_M) tiles: one, unless m is large.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..common.dropout import keep_mask
from ..common.tiling import cdiv, known_multiple, rank_alignment
from .activation import activate


class Operands(NamedTuple):
    """The arguments that forward and backward have in common; an absent tensor is None and costs nothing."""

    x: Tensor
    skip: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    scale: Tensor | None
    gate: Tensor | None
    pre_weight: Tensor | None
    pre_bias: Tensor | None
    ln_weight: Tensor | None
    ln_bias: Tensor | None
    seed: Tensor | None
    features: int
    bottleneck: int
    stride_xt: int
    stride_st: int
    stride_dm: int
    stride_dd: int
    stride_ud: int
    stride_um: int
    stride_scale: int
    stride_gate: int
    amount: float  # scaling / (1 - p)
    threshold: int  # of dropout, the bits of a uint32

    @classmethod
    def make(
        cls,
        x: Tensor,
        skip: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        scale: Tensor | None,
        gate: Tensor | None,
        pre_weight: Tensor | None,
        pre_bias: Tensor | None,
        ln_weight: Tensor | None,
        ln_bias: Tensor | None,
        seed: Tensor | None,
        amount: float,
        dropout_p: float,
    ) -> Operands:
        """The operands of one call; ``amount`` is scaling / (1 - p)."""
        bits = min(round(dropout_p * 2**32), 2**32 - 1)
        return cls(
            *(x, skip, down, down_bias, up, up_bias, scale, gate),
            *(pre_weight, pre_bias, ln_weight, ln_bias, seed),
            features=x.shape[1],
            bottleneck=down.shape[0],
            stride_xt=x.stride(0),
            stride_st=0 if skip is None else skip.stride(0),
            stride_dm=down.stride(0),
            stride_dd=down.stride(1),
            stride_ud=up.stride(0),
            stride_um=up.stride(1),
            stride_scale=0 if scale is None or scale.numel() == 1 else scale.stride(0),
            stride_gate=0 if gate is None else gate.stride(0),
            amount=amount,
            threshold=bits - 2**32 if bits >= 2**31 else bits,
        )


@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for, beyond which operands there are: one constexpr instead of a dozen."""

    activation: str
    skip_in: bool
    residual_x: bool
    residual_skip: bool
    precision: str
    by_four: bool  # rows of the mask begin on a multiple of four
    align: int  # a power of two that divides the bottleneck
    align_up: int  # and one that divides the stride of U's rows
    block_t: int = 0
    block_d: int = 0
    block_m: int = 0
    tiles: int = 0  # of the bottleneck
    ragged: bool = False  # the last of them has columns beyond it
    lean: bool = False  # loops make again what would stand in registers from chunk to chunk

    @classmethod
    def make(
        cls,
        ops: Operands,
        activation: str,
        skip_in: bool,
        residual_x: bool,
        residual_skip: bool,
        precision: str,
    ) -> Form:
        """The form of one call, for any tiling."""
        return cls(
            *(activation, skip_in, residual_x, residual_skip, precision),
            by_four=ops.features % 4 == 0,
            align=rank_alignment(ops.bottleneck),
            align_up=rank_alignment(ops.stride_ud) if ops.stride_um == 1 and ops.stride_ud else 1,
        )

    def tiled(self, ops: Operands, config: Any) -> Form:
        """The form with the tiles of a configuration."""
        return replace(
            self,
            block_t=config.block_t,
            block_d=config.block_d,
            block_m=config.block_m,
            tiles=cdiv(ops.bottleneck, config.block_m),
            ragged=ops.bottleneck % config.block_m != 0,
            lean=ops.bottleneck > config.block_m,
        )


@triton.jit
def row_tile(ptr, stride, rows, live_t, columns, live_c):
    """(BLOCK_T, BLOCK_D) of rows with this stride, in fp32."""
    return tl.load(
        ptr + rows[:, None] * stride + columns[None, :],
        mask=live_t[:, None] & live_c[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def vector(ptr, columns, live_c):
    """(1, BLOCK_D) in fp32."""
    return tl.load(ptr + columns, mask=live_c, other=0.0).to(tl.float32)[None, :]


@triton.jit
def matrix_tile(ptr, rows, stride_r, live_r, columns, stride_c, live_c, dtype: tl.constexpr):
    """A tile of D, U or a transpose of them; parameters wider than x are cast as they are loaded."""
    return tl.load(
        # one offset of 32 bits: as pointers, those of a whole loop would stand in twice as many registers
        ptr + (rows[:, None] * stride_r + columns[None, :] * stride_c),
        mask=live_r[:, None] & live_c[None, :],
        other=0.0,
    ).to(dtype)


@triton.jit
def load_pair(ptr, rows, live_t):
    """Two numbers a row, of (T, 2) fp32."""
    first = tl.load(ptr + rows * 2, mask=live_t, other=0.0)
    return first, tl.load(ptr + rows * 2 + 1, mask=live_t, other=0.0)


@triton.jit
def store_pair(ptr, rows, live_t, first, second):
    """Two numbers a row, into (T, 2) fp32."""
    tl.store(ptr + rows * 2, first, mask=live_t)
    tl.store(ptr + rows * 2 + 1, second, mask=live_t)


@triton.jit
def chunk_columns(ops, chunk, FORM: tl.constexpr):
    """First column, columns (BLOCK_D,) and which of them live."""
    start = chunk * FORM.block_d
    columns = start + tl.arange(0, FORM.block_d)
    return start, columns, columns < ops.features


@triton.jit
def bottleneck_columns(ops, tile, FORM: tl.constexpr):
    """Columns (BLOCK_M,) of a tile of the bottleneck, and which of them live."""
    inner = tile * FORM.block_m + tl.arange(0, FORM.block_m)
    return inner, inner < known_multiple(ops.bottleneck, FORM.align)


@triton.jit
def row_of_up(ops, FORM: tl.constexpr):
    """U's stride from row to row: what divides it decides how many elements a load may have."""
    return known_multiple(ops.stride_ud, FORM.align_up)


@triton.jit
def bottleneck_tile(ptr, ops, tile, rows, live_t, FORM: tl.constexpr):
    """A tile of q or dq (T, m), contiguous, in its own dtype."""
    inner, live_m = bottleneck_columns(ops, tile, FORM)
    return tl.load(
        ptr + rows[:, None] * known_multiple(ops.bottleneck, FORM.align) + inner[None, :],
        mask=live_t[:, None] & live_m[None, :],
        other=0.0,
    )


@triton.jit
def store_bottleneck_tile(ptr, ops, tile, value, rows, live_t, FORM: tl.constexpr):
    """A tile of q or dq."""
    inner, live_m = bottleneck_columns(ops, tile, FORM)
    tl.store(
        ptr + rows[:, None] * known_multiple(ops.bottleneck, FORM.align) + inner[None, :],
        value,
        mask=live_t[:, None] & live_m[None, :],
    )


@triton.jit
def activated_tile(q, FORM: tl.constexpr):
    """act(q) of a tile of q, rounded as q is."""
    return activate(q.to(tl.float32), FORM.activation).to(q.dtype)


@triton.jit
def bottleneck_tiles(ptr, ops, rows, live_t, FORM: tl.constexpr):
    """All tiles of a, q or dq (T, m)."""
    out = ()
    TILES: tl.constexpr = FORM.tiles
    for i in tl.static_range(TILES):
        out = out + (bottleneck_tile(ptr, ops, i, rows, live_t, FORM),)
    return out


@triton.jit
def input_tile(ops, rows, live_t, columns, live_c, FORM: tl.constexpr):
    """Z, what the adapter (or its layernorm) sees."""
    z = row_tile(ops.x, ops.stride_xt, rows, live_t, columns, live_c)
    if FORM.skip_in:
        z += row_tile(ops.skip, ops.stride_st, rows, live_t, columns, live_c)
    return z


@triton.jit
def normalised_input(ops, z, mean, rstd, columns, live_c):
    """LN(z), or z where there is no layernorm before the adapter."""
    if ops.pre_weight is not None:
        v = (z - mean[:, None]) * rstd[:, None] * vector(ops.pre_weight, columns, live_c)
        if ops.pre_bias is not None:
            v += vector(ops.pre_bias, columns, live_c)
        return v
    else:
        return z


@triton.jit
def gate_of_rows(ops, rows, live_t):
    """(BLOCK_T, 1), or 1."""
    if ops.gate is not None:
        gate = tl.load(ops.gate + rows * ops.stride_gate, mask=live_t, other=0.0)
        return gate.to(tl.float32)[:, None]
    else:
        return 1.0


@triton.jit
def scale_of_columns(ops, columns, live_c):
    """(1, BLOCK_D), or 1."""
    if ops.scale is not None:
        scale = tl.load(ops.scale + columns * ops.stride_scale, mask=live_c, other=0.0)
        return scale.to(tl.float32)[None, :]
    else:
        return 1.0


@triton.jit
def dropped(ops, tile, rows, start, FORM: tl.constexpr):
    """The tile, 0 where dropout drops; the mask is made here, and again wherever it is needed again."""
    if ops.seed is not None:
        keep = keep_mask(
            *(tl.load(ops.seed), rows, start, ops.features, 0, ops.threshold),
            BLOCK_T=FORM.block_t,
            BLOCK_K=FORM.block_d,
            BY_FOUR=FORM.by_four,
        )
        return tl.where(keep, tile, 0.0)
    else:
        return tile


@triton.jit
def expanded_tile(ops, a, rows, start, columns, live_c, FORM: tl.constexpr):
    """E = keep · scaling / (1 - p) · (a Uᵀ + ub)."""
    w = tl.zeros([FORM.block_t, FORM.block_d], tl.float32)
    TILES: tl.constexpr = FORM.tiles
    for i in tl.static_range(TILES):
        inner, live_m = bottleneck_columns(ops, i, FORM)
        u = matrix_tile(
            *(ops.up, inner, ops.stride_um, live_m, columns, row_of_up(ops, FORM), live_c),
            dtype=a[i].dtype,
        )
        w = tl.dot(a[i], u, w, input_precision=FORM.precision)
    if ops.up_bias is not None:
        w += vector(ops.up_bias, columns, live_c)
    return dropped(ops, w * ops.amount, rows, start, FORM)


@triton.jit
def sum_tile(ops, e, rows, live_t, columns, live_c, gate, FORM: tl.constexpr):
    """S = gate · scale · e and the residuals."""
    s = e * gate * scale_of_columns(ops, columns, live_c)
    if FORM.residual_x:
        s += row_tile(ops.x, ops.stride_xt, rows, live_t, columns, live_c)
    if FORM.residual_skip:
        s += row_tile(ops.skip, ops.stride_st, rows, live_t, columns, live_c)
    return s
