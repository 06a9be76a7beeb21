"""The arithmetic that the proofs rest on is the GPU's: bfloat16 and tf32 under the mended interpreter."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl

from pelt_fast.testing.gpu_free import Trace, Violation, interpreting
from pelt_fast.testing.gpu_free.interpreter import narrow, round_to_tf32, widen


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, c_ptr, sum_ptr, dot_ptr, cast_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(sum_ptr + at, a + b)
    tl.store(dot_ptr + at, tl.dot(a, b))
    tl.store(cast_ptr + at, tl.load(c_ptr + at).to(tl.bfloat16))


def test_bfloat16():
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(16, 16, generator=generator) for _ in range(3))
    c[0, :3] = torch.tensor([float("nan"), float("inf"), 1e-40])
    a, b = a.bfloat16(), b.bfloat16()
    added, cast = torch.empty_like(a), torch.empty_like(a)
    product = torch.empty(16, 16)
    with interpreting():
        _arithmetic_kernel[(1,)](a, b, c, added, product, cast, 16)
    assert torch.equal(added, a + b)
    assert torch.equal(cast[0].isnan(), c[0].isnan())
    assert torch.equal(cast.nan_to_num(), c.bfloat16().nan_to_num())
    torch.testing.assert_close(product, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


def test_bfloat16_rounds_to_nearest_even_on_every_pattern():
    values = np.arange(0, 2**32, 65521, dtype=np.uint64).astype(np.uint32).view(np.float32)
    expected = torch.from_numpy(values.copy()).bfloat16()
    rounded = torch.from_numpy(widen(narrow(values)).copy())
    assert torch.equal(rounded.isnan(), expected.isnan())
    assert torch.equal(rounded.nan_to_num(), expected.float().nan_to_num())


def test_tf32_keeps_ten_bits():
    values = np.float32([1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -1 - 2**-11, np.inf])
    assert round_to_tf32(values).tolist() == [1 + 2**-10, 1 + 2**-10, 1.0, -1 - 2**-10, np.inf]


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, offset, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n if MASKED else at < n + BLOCK
    tl.store(y_ptr + at + offset, tl.load(x_ptr + at, mask=mask, other=0.0), mask=mask)


def _copy(n, grid, offset=0, masked=True, x=None):
    y = torch.zeros(n + 64)[:n]
    x = torch.arange(float(n)) if x is None else x
    trace = Trace()
    with interpreting(trace):
        _copy_kernel[(grid,)](x, y, n, offset, BLOCK=16, MASKED=masked)
    return trace.launches[0]


def test_trace_counts():
    launch = _copy(40, 3)
    assert (launch.programs, launch.loaded, launch.stored) == (3, {"x_ptr": 160}, {"y_ptr": 160})


def test_trace_sees_out_of_bounds():
    with pytest.raises(Exception, match="outside every argument"):
        _copy(40, 3, masked=False)


def test_trace_sees_the_neighbour_of_a_view():
    with pytest.raises(Exception, match="x_ptr that are outside the tensor's view"):
        _copy(40, 3, masked=False, x=torch.zeros(80)[:40])


def test_trace_sees_a_misplaced_store():
    with pytest.raises(Exception, match="y_ptr that are outside the tensor's view"):
        _copy(40, 3, offset=1)


@triton.jit
def _collide_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, KIND: tl.constexpr):
    pid, at = tl.program_id(0), tl.arange(0, BLOCK)
    if KIND == "write-write":
        tl.store(y_ptr + at, tl.load(x_ptr + at))
    elif KIND == "write-read":
        tl.store(y_ptr + pid * BLOCK + at, tl.load(y_ptr + (1 - pid) * BLOCK + at))
    else:
        tl.store(y_ptr + at // 2, tl.load(x_ptr + at))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("write-write", "race"),
        ("write-read", "race"),
        ("lanes", "two lanes store different values"),
    ],
)
def test_trace_sees_collisions(kind, message):
    with interpreting(Trace()), pytest.raises(Exception, match=message) as raised:
        _collide_kernel[(2,)](torch.arange(16.0), torch.zeros(32), BLOCK=16, KIND=kind)
    assert "Violation" in repr(raised.value) or isinstance(raised.value, Violation)
