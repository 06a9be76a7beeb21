"""Batched multi-LoRA as a function of tensors. Arguments are checked here, once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..autograd import MultiLoRAFunction, MultiLoRALinearFunction
from ..autograd.multi_lora import MultiLoRASettings
from ..dispatch import ORDINARY, Explanation, explain_problem
from ..ops import multi_lora_add_, multi_lora_fwd
from ..ops.multi_lora import problem_of
from ..random import new_seed
from ..segments import MultiAdapterPlan
from .checks import (
    autocast_dtype,
    backend_name,
    check_dtype,
    check_factor,
    check_input,
    check_input_dtype,
    check_plan,
    check_probability,
    check_tensor,
    check_there,
    number,
    served,
    shape_of,
    tensors,
)
from .frozen import frozen_linear
from .lora import MAX_RANK, check_base, compute_input
from .ordinary import short_way


def multi_lora(
    x: Tensor,
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    plan: MultiAdapterPlan,
    scaling: float | Tensor | Sequence[float | Tensor],
    *,
    ranks: Tensor | Sequence[Any] | None = None,
    base_out: Tensor | Sequence[Tensor] | None = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Any:
    r"""LoRA in which every token names its own adapter: ``y_t = base_t + c_t · drop(x_t) A_gᵀ B_gᵀ``, g the plan's.

    ``c_t = scaling_g · row_scale_t``, applied in fp32. A token without an adapter gets ``base_t``, or 0. Row by row it
    is ``peft.tuners.lora.Linear`` with that row's adapter active; it also trains: an adapter's gradients are bitwise
    those of a batch that holds its tokens alone, and adapters without a token get zeros (``plan.active`` names them).

    Several projections that share x (QKV; gate and up) go in one call: sequences for ``lora_a`` and ``lora_b``.

    Args:
        x: (..., in); float32, bfloat16, float16 or float64: the dtype that is computed in. Under ``torch.autocast`` x
            is cast to the autocast dtype first (float64 is not).
        lora_a: (L, R, in), L adapters of rank at most R <= 256, any strides; x's dtype, or float32 over a half.
        lora_b: (L, out, R), likewise. Kernels like the strides (R·out, 1, out) best.
        plan: of as many tokens as x has rows, in x's row order, on x's device.
        scaling: a finite number; or (L,) of any floating dtype. One for all projections, or a sequence of them. It has
            no gradient; ``row_scale`` has.
        ranks: (L,) integers, the rank of each adapter, 0 to R (in a tensor others are clamped); or a sequence of them,
            one for each projection. Beyond it A and B are not used, whatever they hold, and their gradients are
            zeros. None: R.
        base_out: (..., out) in x's dtype, added. Where gradients are off (``torch.no_grad``) it is changed in place and
            returned; else it stays as it is.
        row_scale: a factor for each token, floating, broadcastable to (..., 1); it may require a gradient.
        dropout_p: probability in [0, 1] that an element of x is dropped on its way into A. The mask of a token
            depends on its row, not on its neighbours' adapters.
        training: dropout acts only when True.
        backend: "auto", "torch", "cpp", "triton", "cuda" or "reference"; None: what ``use_backend`` or
            ``PELT_FAST_BACKEND`` says. Naming one that cannot run raises ``BackendUnavailable`` with its reasons.

    Returns:
        y of shape (..., out) in the dtype that was computed in; a tuple of them where ``lora_a`` is a sequence.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value, or outputs that are changed in place overlap.
        BackendUnavailable: the named backend cannot run this call.
        RuntimeError: in a backward of the backward, which has no formula here.
    """
    extension = short_way(backend)
    dual = forward_ad._current_level >= 0  # it raises in the Function, and would be lost in place
    if extension is not None and type(plan) is MultiAdapterPlan and not dual:
        plan_arrays = plan._arrays
        found = extension.ordinary_multi_lora(
            *(x, None, None, lora_a, lora_b, plan_arrays, plan.tokens, plan.num_adapters),
            *(scaling, ranks, base_out, row_scale, dropout_p, training),
        )
        if found is not None:
            done, out = found
            if done:
                return out
            rate, per_row, operands = out
            settings = MultiLoRASettings(len(operands) // 5, len(plan_arrays), rate, ORDINARY)
            seed = new_seed(x.device) if rate else None
            y = MultiLoRAFunction.apply(settings, seed, x, per_row, *operands, *plan_arrays)
            return y[0] if isinstance(lora_a, Tensor) else y
    call = _check(
        *(x, lora_a, lora_b, plan, scaling, ranks, base_out),
        *(row_scale, dropout_p, training, backend),
    )
    seed = new_seed(call.x.device) if call.dropout_p else None
    if base_out is not None and not torch.is_grad_enabled() and not dual:
        y = _add_in_place(call, tensors("base_out", base_out), plan, seed)
    else:
        arrays = plan.arrays
        settings = MultiLoRASettings(len(call.lora_a), len(arrays), call.dropout_p, call.backend)
        y = MultiLoRAFunction.apply(
            *(settings, seed, call.x, call.row_scale, *call.lora_a, *call.lora_b, *call.base),
            *(*call.ranks, *call.scaling, *arrays),
        )
        y = tuple(
            t if wide is None else wide + t for t, wide in zip(y, call.wider_base, strict=True)
        )
    return y[0] if isinstance(lora_a, Tensor) else y


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    plan: MultiAdapterPlan,
    scaling: float | Tensor,
    *,
    ranks: Tensor | Sequence[int] | None = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""``multi_lora`` of one projection over its linear: ``y = x Wᵀ + b``, and each token's own adapter added.

    The same as ``multi_lora(..., base_out=frozen_linear(x, weight, bias))``, up to the order of sums. On a CPU, where
    ``frozen_linear`` packs the weight, it is one pass: from 128 tokens on rows are multiplied in the order of their
    adapters, which are added to a block of the product while that is in cache, forward and in dX. An adapter's
    gradients have the same bits in batches of fewer and of more tokens; y and dX have in float32 alone, since a half is
    rounded twice below 128 tokens, and once from there on.

    Args:
        x: (..., in), as in ``multi_lora``.
        weight: (out, in), as in ``frozen_linear``; it and the bias may require gradients.
        bias: (out,) or None.
        lora_a: (L, R, in).
        lora_b: (L, out, R).
        plan: as in ``multi_lora``, like the rest.
        scaling: a finite number or (L,).
        ranks: (L,) integers or None.
        row_scale: a factor for each token, broadcastable to (..., 1), of what the adapters add.
        dropout_p: probability in [0, 1] that an element of x is dropped on its way into A.
        training: dropout acts only when True.
        backend: of the adapters.

    Returns:
        (..., out).

    Raises:
        TypeError, ValueError, BackendUnavailable: as ``multi_lora``, of weight and bias as ``lora_linear``.
        RuntimeError: in a backward of the backward, which has no formula here.
    """
    given: tuple[tuple[str, Any, str], ...] = (
        ("weight", weight, "(out, in)"),
        ("lora_a", lora_a, "(L, R, in): one projection"),
        ("lora_b", lora_b, "(L, out, R): one projection"),
    )
    for name, value, shape in given:
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"{name} is a {kind}; expected a torch.Tensor of shape {shape}")
    extension = short_way(backend)
    dual = forward_ad._current_level >= 0
    if extension is not None and type(plan) is MultiAdapterPlan and not dual:
        plan_arrays = plan._arrays
        found = extension.ordinary_multi_lora(
            *(x, weight, bias, lora_a, lora_b, plan_arrays, plan.tokens, plan.num_adapters),
            *(scaling, ranks, None, row_scale, dropout_p, training),
        )
        if found is not None:
            done, out = found
            if not done:
                rate, per_row, (a, b, _, each_rank, each_scaling) = out
                out = MultiLoRALinearFunction.apply(
                    MultiLoRASettings(1, len(plan_arrays), rate, ORDINARY),
                    new_seed(x.device) if rate else None,
                    *(x, per_row, weight, bias, a, b, each_rank, each_scaling, *plan_arrays),
                )
            y: Tensor = out
            return y
    _check_base(x, weight, bias)
    if lora_b.dim() == 3 and lora_b.shape[1] != weight.shape[0]:
        raise ValueError(
            f"lora_b has shape {shape_of(lora_b)}; expected (L, out, R), out = {weight.shape[0]} from weight"
        )
    base = (F.linear if extension is None else frozen_linear)(x, weight, bias)
    added: Tensor = multi_lora(
        *(x, lora_a, lora_b, plan, scaling),
        ranks=ranks,
        base_out=base,
        row_scale=row_scale,
        dropout_p=dropout_p,
        training=training,
        backend=backend,
    )
    return added


def explain_multi_lora(
    x: Tensor,
    lora_a: Any,
    lora_b: Any,
    plan: MultiAdapterPlan,
    scaling: Any,
    *,
    ranks: Any = None,
    base_out: Any = None,
    row_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Explanation:
    """Which backend a call of ``multi_lora`` would run on; same arguments."""
    call = _check(
        *(x, lora_a, lora_b, plan, scaling, ranks, base_out),
        *(row_scale, dropout_p, training, backend),
    )
    return Explanation(
        tuple(
            explain_problem(
                problem_of(
                    *(name, call.x, plan.tokens, call.lora_a, call.lora_b),
                    row_scale=row_scale is not None,
                    dropout=call.dropout_p > 0,
                ),
                call.backend,
            )
            for name in ("multi_lora_fwd", "multi_lora_bwd")
        )
    )


def explain_multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    plan: MultiAdapterPlan,
    scaling: float | Tensor,
    **more: Any,
) -> Explanation:
    """Which backend the adapters of a call of ``multi_lora_linear`` would run on; same arguments."""
    _check_base(x, weight, bias)
    return explain_multi_lora(x, lora_a, lora_b, plan, scaling, **more)


def _check_base(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    x, autocast = compute_input(x)
    check_base(x, weight, bias, autocast)


class _Call(NamedTuple):
    """The arguments of ``multi_lora``, checked; lists have one entry for each projection."""

    x: Tensor
    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    base: Sequence[Tensor | None]  # of x's dtype
    wider_base: Sequence[Tensor | None]  # of a wider one, under autocast: added outside
    ranks: Sequence[Tensor]
    scaling: Sequence[Tensor]
    row_scale: Tensor | None  # (T,)
    dropout_p: float
    backend: str


def _check(
    x: Tensor,
    lora_a: Any,
    lora_b: Any,
    plan: MultiAdapterPlan,
    scaling: Any,
    ranks: Any,
    base_out: Any,
    row_scale: Tensor | None,
    dropout_p: float,
    training: bool,
    backend: str | None,
) -> _Call:
    check_input(x, "in")
    cast = autocast_dtype(x)
    autocast = cast is not None
    if cast is not None:
        x = x.to(cast)
    else:
        check_input_dtype(x)
    several = not isinstance(lora_a, Tensor)
    lora_a, lora_b = tensors("lora_a", lora_a), tensors("lora_b", lora_b)
    n = len(lora_a)
    if n == 0:
        raise ValueError("lora_a is empty; expected at least one projection")
    if len(lora_b) != n:
        raise ValueError(f"lora_b has {len(lora_b)} entries; expected {n}, one for each lora_a")
    names = [f"[{i}]" for i in range(n)] if several else [""]
    for i, name in enumerate(names):
        _check_adapters(name, x, lora_a[i], lora_b[i], autocast)
    if autocast:
        lora_a, lora_b = ([served(p, x) for p in parameters] for parameters in (lora_a, lora_b))
    adapters = lora_a[0].shape[0]
    for i, name in enumerate(names):
        if lora_a[i].shape[0] != adapters:
            raise ValueError(
                f"lora_a{name} has {lora_a[i].shape[0]} adapters; expected {adapters}, as lora_a[0] has"
            )
    check_plan(plan, x, adapters)
    shape = x.shape[:-1]
    base: list[Tensor | None] = [None] * n
    wider: list[Tensor | None] = [None] * n
    if base_out is not None:
        given = tensors("base_out", base_out)
        if len(given) != n:
            raise ValueError(
                f"base_out has {len(given)} entries; expected {n}, one for each lora_a"
            )
        for i, name in enumerate(names):
            base[i], wider[i] = _base(
                f"base_out{name}", given[i], x, (*shape, lora_b[i].shape[1]), autocast
            )
    rate = number("dropout_p", dropout_p)
    check_probability("dropout_p", rate)
    shared = not several or not isinstance(scaling, (list, tuple))
    scales = [
        _scaling(f"scaling{'' if shared else name}", scaling if shared else value, x, adapters)
        for name, value in zip(names, _each("scaling", scaling, n, shared), strict=True)
    ]
    one_rank = ranks is None or not several or not _of_projections(ranks)
    rank_list = [
        _ranks(f"ranks{'' if one_rank else name}", value, x, adapters, a.shape[1])
        for name, value, a in zip(names, _each("ranks", ranks, n, one_rank), lora_a, strict=True)
    ]
    return _Call(
        *(x, lora_a, lora_b, base, wider, rank_list, scales),
        None if row_scale is None else _row_scale(row_scale, x),
        rate if training else 0.0,
        backend_name(backend),
    )


def _check_adapters(name: str, x: Tensor, a: Any, b: Any, autocast: bool) -> None:
    features = x.shape[-1]
    check_tensor(f"lora_a{name}", a, x, "(L, R, in)")
    if a.dim() != 3 or a.shape[2] != features or a.shape[0] == 0:
        raise ValueError(
            f"lora_a{name} has shape {shape_of(a)}; expected (L, R, in) with in = {features}, x's last size, and L >= 1"
        )
    if not 1 <= a.shape[1] <= MAX_RANK:
        raise ValueError(f"lora_a{name} has rank {a.shape[1]}; expected 1 to {MAX_RANK}")
    if features == 0:
        raise ValueError(f"lora_a{name} has shape {shape_of(a)}; expected in >= 1")
    check_tensor(f"lora_b{name}", b, x, "(L, out, R)")
    if b.dim() != 3 or b.shape[0] != a.shape[0] or b.shape[2] != a.shape[1] or b.shape[1] == 0:
        raise ValueError(
            f"lora_b{name} has shape {shape_of(b)}; expected (L, out, R) = ({a.shape[0]}, out, {a.shape[1]}), "
            "L and R from lora_a, and out >= 1"
        )
    check_dtype(f"lora_a{name}", a, x, autocast, wider=True)
    check_dtype(f"lora_b{name}", b, x, autocast, wider=True)


def _base(
    name: str, base: Any, x: Tensor, shape: tuple[int, ...], autocast: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The base where a kernel adds it, else where it is added outside: its dtype is wider."""
    check_tensor(name, base, x, "(..., out)")
    if tuple(base.shape) != shape:
        raise ValueError(f"{name} has shape {shape_of(base)}; expected {shape}")
    check_dtype(name, base, x, autocast, wider=False)
    if torch.promote_types(base.dtype, x.dtype) != x.dtype:
        return None, base
    if base.dtype != x.dtype:
        check_there(name, base)
    return base.to(x.dtype).resolve_neg(), None


def _of_projections(ranks: Any) -> bool:
    """A sequence of ranks of each projection, not one of numbers."""
    return (
        isinstance(ranks, (list, tuple))
        and len(ranks) > 0
        and (any(r is None or isinstance(r, (Tensor, list, tuple)) for r in ranks))
    )


def _each(name: str, value: Any, n: int, shared: bool) -> Sequence[Any]:
    if shared:
        return [value] * n
    if len(value) != n:
        raise ValueError(f"{name} has {len(value)} entries; expected {n}, one for each lora_a")
    return value


def _scaling(name: str, scaling: Any, x: Tensor, adapters: int) -> Tensor:
    """(L,) in the dtype that is accumulated in."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(scaling, Tensor):
        if isinstance(scaling, (list, tuple)):
            raise TypeError(f"{name} is a {type(scaling).__name__}; expected a number or a tensor")
        factor = number(name, scaling, "a number or a torch.Tensor of shape (L,)")
        check_factor(name, factor, wide)
        return torch.full((adapters,), factor, dtype=wide, device=x.device)
    check_tensor(name, scaling, x, "(L,)")
    if scaling.shape != (adapters,):
        raise ValueError(f"{name} has shape {shape_of(scaling)}; expected (L,) = ({adapters},)")
    if not scaling.is_floating_point():
        raise TypeError(f"{name} has dtype {scaling.dtype}; expected a floating one")
    if scaling.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, which it does not get; expected a factor that is trained as row_scale"
        )
    if scaling.dtype != wide:
        check_there(name, scaling)
    return scaling.to(wide)


def _ranks(name: str, ranks: Any, x: Tensor, adapters: int, most: int) -> Tensor:
    """(L,) int32 on x's device."""
    if ranks is None:
        return torch.full((adapters,), most, dtype=torch.int32, device=x.device)
    if not isinstance(ranks, Tensor):
        if not isinstance(ranks, (list, tuple)) or not all(
            isinstance(r, int) and not isinstance(r, bool) for r in ranks
        ):
            raise TypeError(f"{name} is {ranks!r}; expected (L,) integers")
        for r in ranks:
            if not 0 <= r <= most:
                raise ValueError(f"{name} has {r}; expected 0 to {most}, lora_a's")
        ranks = torch.tensor(ranks, dtype=torch.int32, device=x.device)
    check_tensor(name, ranks, x, "(L,)")
    if ranks.dtype not in (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{name} has dtype {ranks.dtype}; expected integers")
    if ranks.shape != (adapters,):
        raise ValueError(f"{name} has shape {shape_of(ranks)}; expected (L,) = ({adapters},)")
    # int32 is clamped where it is used
    if ranks.dtype == torch.int32:
        return ranks
    check_there(name, ranks)
    return ranks.long().clamp(0, most).to(torch.int32)


def _row_scale(row_scale: Any, x: Tensor) -> Tensor:
    """(..., 1), broadcastable, to (T,)."""
    check_tensor("row_scale", row_scale, x, "(..., 1)")
    if row_scale.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(
            f"row_scale has dtype {row_scale.dtype}; expected float32, bfloat16, float16 or float64"
        )
    shape = (*x.shape[:-1], 1)
    fits = row_scale.dim() <= len(shape) and all(
        size in (1, wanted)
        for size, wanted in zip(reversed(row_scale.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"row_scale has shape {shape_of(row_scale)}; expected one that broadcasts to {tuple(shape)}"
        )
    check_there("row_scale", row_scale)
    return row_scale.expand(shape).reshape(-1)


def _add_in_place(
    call: _Call, bases: Sequence[Tensor], plan: MultiAdapterPlan, seed: Tensor | None
) -> tuple[Tensor, ...]:
    """Adds into the bases, and returns them."""
    x = call.x
    scales = [] if call.row_scale is None else [call.row_scale]
    compiling = torch.compiler.is_compiling()
    if not compiling and not _all_apart(bases, ()):
        raise ValueError("base_out overlaps; expected outputs that share no memory")
    for b in bases:
        if _overlaps_itself(b):
            raise ValueError(
                "base_out has elements that are one place in memory (it was expanded, or strided by hand); expected "
                "one of its own for each, since it is changed in place"
            )
    rest = (plan.arrays, call.ranks, call.scaling, call.row_scale, call.dropout_p, seed)
    may_change = not compiling and all(_can_change(b, x) for b in bases)
    if may_change and _all_apart(bases, (x, *call.lora_a, *call.lora_b, *scales)):
        multi_lora_add_(x, call.lora_a, call.lora_b, bases, *rest, call.backend)
        for b in bases:
            if not b.is_inference():
                torch.autograd.graph.increment_version(b)
    else:
        y, _ = multi_lora_fwd(x, call.lora_a, call.lora_b, call.base, *rest, call.backend)
        for b, same, t in zip(bases, call.base, y, strict=True):
            b.add_(t) if same is None else b.copy_(t)
    return tuple(bases)


def _can_change(base: Tensor, x: Tensor) -> bool:
    """A kernel can write into it: rows of x's dtype, each element once."""
    if base.dtype != x.dtype or (base.is_inference() and not torch.is_inference_mode_enabled()):
        return False
    strides = list(zip(base.shape, base.stride(), strict=True))
    if base.is_neg() or base.stride(-1) != 1:
        return False
    # outer dimensions that no single stride describes are no view as rows
    return all(
        outer == size * inner for (_, outer), (size, inner) in itertools.pairwise(strides[:-1])
    )


def _overlaps_itself(t: Tensor) -> bool:
    """Whether two elements may be one place in memory: a stride is less than what lies within it."""
    end = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride < end:
                return t.numel() > 0
            end += (size - 1) * stride
    return False


def _all_apart(written: Sequence[Tensor], read: Sequence[Tensor]) -> bool:
    """What is written shares no memory with what is read, or, where nothing is, with each other."""
    places = {t.untyped_storage().data_ptr() for t in written}
    if read:
        if places.isdisjoint([t.untyped_storage().data_ptr() for t in read]):
            return True
        return all(_apart(one, other) for one in written for other in read)
    if len(places) == len(written):
        return True
    return all(_apart(one, other) for one, other in itertools.combinations(written, 2))


def _apart(one: Tensor, other: Tensor) -> bool:
    """One ends before the other begins, or their rows lie side by side; False where it is not that simple."""
    if one.device.type == "meta" or not one.numel() or not other.numel():
        return True
    (start, end, width, step), (start_2, end_2, width_2, step_2) = _extent(one), _extent(other)
    if end <= start_2 or end_2 <= start:
        return True
    every = math.gcd(step, step_2)  # all rows begin at multiples of it
    between = (start_2 - start) % every if every else 0
    return width <= between and between + width_2 <= every


def _extent(t: Tensor) -> tuple[int, int, int, int]:
    """In bytes: first and last address, size of the elements that stand together, divisor of all other strides."""
    size, start = t.element_size(), t.data_ptr()
    outer = [(n, stride) for n, stride in zip(t.shape, t.stride(), strict=True) if n > 1]
    end = start + size * (1 + sum((n - 1) * stride for n, stride in outer))
    together = outer.pop()[0] if outer and outer[-1][1] == 1 else 1
    return start, end, size * together, size * math.gcd(*(stride for _, stride in outer))
