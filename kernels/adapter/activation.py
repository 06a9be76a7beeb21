"""The activations of `pelt_fast.activations`, values and derivatives, on fp32 registers.

Bound: nothing of their own; they run between two products. NaN in, NaN out: comparisons are written so that a NaN
takes the branch that keeps it, as in torch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(q, KIND: tl.constexpr):
    """act(q) of fp32 q."""
    if KIND == "relu":
        out = tl.where(q <= 0, 0.0, q)
    elif KIND == "gelu":
        out = q * _normal_cdf(q)
    elif KIND == "gelu_tanh":
        out = q * _sigmoid(2 * _gelu_inner(q))
    elif KIND == "silu":
        out = q * _sigmoid(q)
    elif KIND == "tanh":
        out = _tanh(q)
    elif KIND == "sigmoid":
        out = _sigmoid(q)
    elif KIND == "leaky_relu":
        out = tl.where(q > 0, q, 0.01 * q)
    elif KIND == "quick_gelu":
        out = q * _sigmoid(1.702 * q)
    elif KIND == "relu2":
        out = tl.where(q <= 0, 0.0, q * q)
    elif KIND == "relu6":
        out = tl.where(q <= 0, 0.0, tl.where(q >= 6, 6.0, q))
    elif KIND == "mish":
        out = q * _tanh_of_softplus(q)
    else:
        tl.static_assert(KIND == "linear")
        out = q
    return out


@triton.jit
def derivative(q, KIND: tl.constexpr):
    """act'(q) of fp32 q."""
    if KIND == "relu":
        out = tl.where(q <= 0, 0.0, 1.0)
    elif KIND == "gelu":
        out = _normal_cdf(q) + q * 0.3989422804014327 * tl.exp(-0.5 * q * q)
    elif KIND == "gelu_tanh":
        s = _sigmoid(2 * _gelu_inner(q))
        slope = 1.5957691216057308 * (1 + 0.134145 * q * q)
        out = s + q * s * (1 - s) * slope
    elif KIND == "silu":
        s = _sigmoid(q)
        out = s * (1 + q * (1 - s))
    elif KIND == "tanh":
        t = _tanh(q)
        out = 1 - t * t
    elif KIND == "sigmoid":
        s = _sigmoid(q)
        out = s * (1 - s)
    elif KIND == "leaky_relu":
        out = tl.where(q > 0, 1.0, 0.01)
    elif KIND == "quick_gelu":
        s = _sigmoid(1.702 * q)
        out = s * (1 + 1.702 * q * (1 - s))
    elif KIND == "relu2":
        out = tl.where(q <= 0, 0.0, 2 * q)
    elif KIND == "relu6":
        out = tl.where((q <= 0) | (q >= 6), 0.0, 1.0)
    elif KIND == "mish":
        t = _tanh_of_softplus(q)
        out = t + q * _sigmoid(q) * (1 - t * t)
    else:
        tl.static_assert(KIND == "linear")
        out = tl.full(q.shape, 1.0, tl.float32)
    return out


@triton.jit
def activate_backward(da, q, KIND: tl.constexpr):
    """da · act'(q); where torch selects instead of multiplying, nothing of an infinite da passes."""
    slope = derivative(q, KIND)
    through = da * slope
    if KIND == "relu" or KIND == "relu2" or KIND == "relu6":
        through = tl.where(slope == 0, 0.0, through)
    return through


@triton.jit
def _sigmoid(q):
    return 1 / (1 + tl.exp(-q))


@triton.jit
def _normal_cdf(q):
    return 0.5 * (1 + tl.erf(q * 0.7071067811865476))


@triton.jit
def _gelu_inner(q):
    """√(2/π) · (q + 0.044715 q³); gelu_tanh is q · (1 + tanh of it) / 2, which is q · sigmoid of twice it."""
    return 0.7978845608028654 * q * (1 + 0.044715 * q * q)


@triton.jit
def _tanh(q):
    """Near zero 1 - 2 / (e²ᵠ + 1) cancels: there it is the polynomial of Cephes' `tanhf`."""
    z = q * q
    poly = -5.70498872745e-3 * z + 2.06390887954e-2
    poly = poly * z - 5.37397155531e-2
    poly = poly * z + 1.33314422036e-1
    poly = poly * z - 3.33332819422e-1
    return tl.where(tl.abs(q) < 0.625, q + q * z * poly, 1 - 2 / (tl.exp(2 * q) + 1))


@triton.jit
def _tanh_of_softplus(q):
    """((1 + eᵠ)² - 1) / ((1 + eᵠ)² + 1), from which the ones are taken out; past 20 it is 1 in fp32."""
    e = tl.exp(tl.where(q > 20, 20.0, q))
    n = e * (e + 2)
    return n / (n + 2)
