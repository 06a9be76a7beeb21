"""Triton's interpreter, inside a process that did not ask for it, with its arithmetic mended.

As shipped, the interpreter keeps bfloat16 as its bits: `tl.dot` multiplies the bits, sums of two are garbage, and a
conversion from fp32 truncates. It also computes tf32 products in full fp32. Here bfloat16 is widened, computed in fp32
and rounded to nearest even, and tf32 operands are rounded as `mma.sync` sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import FunctionType
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
)
from triton.runtime.jit import JITFunction

from .driver import stand_in
from .trace import Trace

# It keeps references to triton.language: first imported by an interpreted launch, it would keep patched ones for ever.
import_module("triton.compiler.code_generator")

_FLOATS = (tl.float16, tl.float32, tl.float64)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray, truncate: bool = False) -> np.ndarray:
    """Numbers -> bfloat16 bits, rounded to nearest even."""
    single = np.ascontiguousarray(values, np.float32)
    bits = single.view(np.uint32)
    if not truncate:
        bits = np.where(np.isnan(single), bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1))
    return (bits >> 16).astype(np.uint16).reshape(np.shape(values))


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """fp32 with ten bits of mantissa, ties away from zero."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(np.isfinite(values), ((bits + 0x1000) & 0xFFFFE000).view(np.float32), values)


def _is_bf16(handle: TensorHandle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


class MendedBuilder(InterpreterBuilder):
    """The interpreter's operations; an optional trace sees every access to memory."""

    def __init__(self, trace: Trace | None) -> None:
        super().__init__()
        self.trace = trace

    # Conversions

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            wide = TensorHandle(widen(src.data), tl.float32)
            return wide if target == tl.float32 else super().cast_impl(wide, dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return TensorHandle(narrow(src.data), target)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16 and source in _FLOATS:
            truncate = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
            return TensorHandle(narrow(src.data, truncate), target)
        if source == tl.bfloat16 and target in _FLOATS:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    # Arithmetic

    def binary_op(
        self, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., Any]
    ) -> TensorHandle:
        if not (_is_bf16(lhs) and _is_bf16(rhs)):
            return super().binary_op(lhs, rhs, op)
        out = op(widen(lhs.data), widen(rhs.data))
        return (
            TensorHandle(out, tl.int1)
            if out.dtype == np.bool_
            else TensorHandle(narrow(out), tl.bfloat16)
        )

    def unary_op(self, arg: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        if not _is_bf16(arg):
            return super().unary_op(arg, op)
        return TensorHandle(narrow(op(widen(arg.data))), tl.bfloat16)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if not _is_bf16(z):
            return super().create_fma(x, y, z)
        return TensorHandle(narrow(widen(x.data) * widen(y.data) + widen(z.data)), tl.bfloat16)

    def create_dot(
        self,
        a: TensorHandle,
        b: TensorHandle,
        d: TensorHandle,
        input_precision: Any,
        max_imprecise: Any,
    ) -> TensorHandle:
        if _is_bf16(a):
            a, b = (TensorHandle(widen(h.data), tl.float32) for h in (a, b))
        elif (
            a.dtype.scalar == tl.float32 and input_precision == interpreter._ir.INPUT_PRECISION.TF32
        ):
            a, b = (TensorHandle(round_to_tf32(h.data), tl.float32) for h in (a, b))
        if self.trace is not None:
            self.trace.dot(2 * a.data.size * b.data.shape[-1])
        return super().create_dot(a, b, d, input_precision, max_imprecise)

    # Memory and order

    def create_masked_load(
        self, ptrs: TensorHandle, mask: TensorHandle, *args: Any, **kwargs: Any
    ) -> Any:
        self._access("load", ptrs, mask, None)
        return super().create_masked_load(ptrs, mask, *args, **kwargs)

    def create_masked_store(
        self, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *args: Any, **kwargs: Any
    ) -> Any:
        self._access("store", ptrs, mask, value)
        return super().create_masked_store(ptrs, value, mask, *args, **kwargs)

    def create_atomic_rmw(
        self, op: Any, ptr: TensorHandle, val: Any, mask: TensorHandle, *args: Any
    ) -> Any:
        self._access("atomic", ptr, mask, None)
        return super().create_atomic_rmw(op, ptr, val, mask, *args)

    def _access(
        self, kind: str, ptrs: TensorHandle, mask: TensorHandle, value: TensorHandle | None
    ) -> None:
        if self.trace is not None:
            size = interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
            self.trace.access(
                kind, ptrs.data, mask.data, size, None if value is None else value.data
            )

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        if self.trace is not None:
            x, y, z = self.trace.next_program((x, y, z), self.grid_dim)
        super().set_grid_idx(x, y, z)


def _tensors(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the arguments of a launch by name, those in tuples as "ops.x" or "outs.0"."""
    for name, value in arguments.items():
        if isinstance(value, tuple):
            fields = getattr(value, "_fields", range(len(value)))
            names = [f"{name}.{field}" for field in fields]
            yield from _tensors(dict(zip(names, value, strict=True)))
        elif isinstance(value, Tensor):
            yield name, value


def _sees_triton_language() -> FunctionType:
    """A function in whose globals the interpreter finds every module that it has to patch."""
    return FunctionType(_sees_triton_language.__code__, {"tl": tl, "core": tl.core})


@contextmanager
def interpreting(trace: Trace | None = None, capability: int = 80) -> Iterator[None]:
    """Within the block every Triton launch on CPU tensors is interpreted.

    Args:
        trace: checks and counts every access, and says in which order programs run.
        capability: of the GPU that launch code believes in, e.g. 90.
    """
    builder = MendedBuilder(trace)
    functions: dict[Any, InterpretedFunction] = {}

    def interpreted(function: Any) -> InterpretedFunction:
        if function.fn not in functions:
            functions[function.fn] = InterpretedFunction(function.fn)
        return functions[function.fn]

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if trace is not None:
            named = dict(zip(self.arg_names, args, strict=False)) | kwargs
            trace.begin(self.__name__, dict(_tensors(named)))
        interpreted(self).run(*args, grid=grid, warmup=warmup, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(stand_in(capability))
        stack.enter_context(mock.patch.object(interpreter, "interpreter_builder", builder))
        stack.enter_context(mock.patch.object(interpreter.interpreter_semantic, "builder", builder))
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        # Functions called by kernels; the interpreter would patch triton.language for each call and leave it so.
        call = lambda self, *args, **kwargs: interpreted(self).rewrite()(*args, **kwargs)
        stack.enter_context(mock.patch.object(JITFunction, "__call__", call))
        stack.callback(interpreter._patch_lang(_sees_triton_language()).restore)
        # Tensors are on the CPU already: without this every launch copies every storage onto itself.
        keep = lambda self, args, kwargs: (args, kwargs)
        stack.enter_context(mock.patch.object(GridExecutor, "_init_args_hst", keep))
        stack.enter_context(mock.patch.object(GridExecutor, "_restore_args_dev"))
        # uint32 arithmetic wraps on purpose
        stack.enter_context(np.errstate(over="ignore"))
        yield
