"""Whole-number helpers of launch code, and the program order that keeps tiles in L2."""

from __future__ import annotations

import triton
import triton.language as tl


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int, low: int = 1, high: int = 1 << 30) -> int:
    """The smallest power of two that is at least n, kept within [low, high]."""
    return min(max(1 << max(n - 1, 0).bit_length(), low), high)


def rank_alignment(rank: int) -> int:
    """A power of two up to 16 that divides the total rank: what vector width its rows allow."""
    return min(rank & -rank, 16)


@triton.jit
def grouped_tile(tiles_m, tiles_n, GROUP: tl.constexpr):
    """Program id -> (tile_m, tile_n), GROUP row tiles at a time: neighbours share W's columns in L2."""
    pid = tl.program_id(0)
    width = GROUP * tiles_n
    first = (pid // width) * GROUP
    rows = min(tiles_m - first, GROUP)
    return first + (pid % width) % rows, (pid % width) // rows


@triton.jit
def known_multiple(n, ALIGN: tl.constexpr):
    """n, a multiple of ALIGN, in a form from which the compiler knows that it is one."""
    return n // ALIGN * ALIGN
