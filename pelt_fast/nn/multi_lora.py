"""``MultiLoRALinear``: a frozen linear with stacked LoRA adapters, of which every token names its own."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..segments import MultiAdapterPlan, current_plan

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class AdapterState(NamedTuple):
    """One adapter, as ``load_adapter`` takes it: lora_a (r, in), lora_b (out, r), scaling."""

    lora_a: Tensor
    lora_b: Tensor
    scaling: float


class MultiLoRALinear(nn.Module):
    """A linear layer with a frozen weight and ``num_adapters`` low-rank adapters in stacked parameters.

    ``lora_a`` is (L, R, in), ``lora_b`` (L, out, R), R being ``max_rank``; ``ranks`` (L,) and ``scaling`` (L,) are
    buffers. What lies beyond an adapter's rank is zero, gets zeros as its gradient, and is read by nobody. A batch
    says by its ``MultiAdapterPlan`` which token goes to which adapter.

    An adapter without a token gets a gradient of zeros, which moves it under Adam's moments and under weight decay:
    ``plan.active`` says which to put back or to leave out.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        num_adapters: L, at least 1.
        max_rank: R, the most that an adapter's rank can be, 1 to 256.
        bias: whether the frozen layer has a bias.
        ranks: L ranks, 0 to R; None: R each. 0 is an adapter that adds nothing.
        lora_alpha: one number or L of them: an adapter's scaling is ``lora_alpha / rank``.
        scaling: one number or L of them, in place of ``lora_alpha``.
        dropout: probability in [0, 1] that an input element is dropped on its way into A, in training.
        device: where the parameters live.
        dtype: dtype of the frozen weight.
        adapter_dtype: dtype of the adapters; None: as ``dtype``. ``torch.float32`` over a half-precision weight is
            allowed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_adapters: int,
        max_rank: int = 8,
        *,
        bias: bool = True,
        ranks: Sequence[int] | None = None,
        lora_alpha: float | Sequence[float] = 8.0,
        scaling: float | Sequence[float] | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        linear = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._init(
            linear, num_adapters, max_rank, ranks, lora_alpha, scaling, dropout, adapter_dtype
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        num_adapters: int,
        max_rank: int = 8,
        *,
        ranks: Sequence[int] | None = None,
        lora_alpha: float | Sequence[float] = 8.0,
        scaling: float | Sequence[float] | None = None,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> MultiLoRALinear:
        """Wraps an existing linear, sharing and freezing its parameters; the rest as the class's arguments."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}; expected a torch.nn.Linear")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._init(
            linear, num_adapters, max_rank, ranks, lora_alpha, scaling, dropout, adapter_dtype
        )
        return layer

    ranks: Tensor
    scaling: Tensor

    def _init(
        self,
        linear: nn.Linear,
        num_adapters: int,
        max_rank: int,
        ranks: Sequence[int] | None,
        lora_alpha: float | Sequence[float],
        scaling: float | Sequence[float] | None,
        dropout: float,
        dtype: torch.dtype | None,
    ) -> None:
        adapters = _integer("num_adapters", num_adapters, 1, None)
        most = _integer("max_rank", max_rank, 1, functional.MAX_RANK)
        numbers = [most] * adapters if ranks is None else _each("ranks", ranks, adapters)
        numbers = [_integer(f"ranks[{i}]", r, 0, most) for i, r in enumerate(numbers)]
        name, given = ("lora_alpha", lora_alpha) if scaling is None else ("scaling", scaling)
        several = isinstance(given, (list, tuple))
        factors = [
            _finite(f"{name}[{i}]" if several else name, value)
            for i, value in enumerate(
                _each(name, given, adapters) if several else [given] * adapters
            )
        ]
        if scaling is None:
            factors = [alpha / max(rank, 1) for alpha, rank in zip(factors, numbers, strict=True)]
        if not 0.0 <= _finite("dropout", dropout) <= 1.0:
            raise ValueError(f"dropout is {dropout}; expected a probability between 0 and 1")
        weight = linear.weight
        dtype = weight.dtype if dtype is None else dtype
        self.base_layer = linear.requires_grad_(False)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.num_adapters, self.max_rank, self.dropout = adapters, most, float(dropout)
        zeros = functools.partial(torch.zeros, device=weight.device, dtype=dtype)
        self.lora_a = nn.Parameter(zeros(adapters, most, self.in_features))
        # rank by rank, as kernels like to read it
        self.lora_b = nn.Parameter(zeros(adapters, most, self.out_features).transpose(1, 2))
        self.register_buffer(
            "ranks", torch.tensor(numbers, dtype=torch.int32, device=weight.device)
        )
        wide = torch.promote_types(weight.dtype, torch.float32)
        factors = [_factor(f"{name}[{i}]", factor, wide) for i, factor in enumerate(factors)]
        self.register_buffer("scaling", torch.tensor(factors, dtype=wide, device=weight.device))
        self._planned = False
        for adapter, rank in enumerate(numbers):
            self._reset(adapter, rank)

    def reset_adapter(self, adapter: int) -> None:
        """Draws A of this adapter again as PEFT does (Kaiming uniform, a = √5) and sets its B to zero."""
        self._reset(self._index(adapter), int(self.ranks[adapter]))

    def _reset(self, adapter: int, rank: int) -> None:
        with torch.no_grad():
            self.lora_a[adapter].zero_()
            self.lora_b[adapter].zero_()
        if rank:
            nn.init.kaiming_uniform_(self.lora_a[adapter, :rank], a=math.sqrt(5))

    def state_of(self, adapter: int) -> AdapterState:
        """A copy of one adapter, at its own rank."""
        rank = int(self.ranks[self._index(adapter)])
        return AdapterState(
            self.lora_a.detach()[adapter, :rank].clone(),
            self.lora_b.detach()[adapter, :, :rank].clone(memory_format=torch.contiguous_format),
            float(self.scaling[adapter]),
        )

    def load_adapter(self, adapter: int, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
        """Copies an adapter of rank r <= R into this place, which has its rank and scaling from then on.

        What an optimizer keeps of the place (moments) is not touched. Nothing is changed where an error is raised.

        Args:
            adapter: number of the place, 0 to L - 1.
            lora_a: (r, in), of a floating dtype; it is cast.
            lora_b: (out, r), likewise.
            scaling: a finite number.

        Raises:
            TypeError: an argument has a wrong type or dtype.
            ValueError: an argument has a wrong shape or value, or something in it is not finite in the layer's dtype.
        """
        adapter = self._index(adapter)
        factor = _factor("scaling", scaling, self.scaling.dtype)
        for name, value in (("lora_a", lora_a), ("lora_b", lora_b)):
            if not isinstance(value, Tensor) or value.layout is not torch.strided:
                raise TypeError(
                    f"{name} is a {type(value).__name__}; expected a dense torch.Tensor"
                )
            if value.dtype not in _DTYPES:
                raise TypeError(
                    f"{name} has dtype {value.dtype}; expected float32, bfloat16, float16 or float64"
                )
        if lora_a.dim() != 2 or lora_a.shape[1] != self.in_features:
            raise ValueError(
                f"lora_a has shape {tuple(lora_a.shape)}; expected (r, in) with in = {self.in_features}"
            )
        rank = lora_a.shape[0]
        if rank > self.max_rank:
            raise ValueError(f"lora_a has rank {rank}; expected at most max_rank = {self.max_rank}")
        if tuple(lora_b.shape) != (self.out_features, rank):
            raise ValueError(
                f"lora_b has shape {tuple(lora_b.shape)}; expected (out, r) = {(self.out_features, rank)}"
            )
        with torch.no_grad():
            # copies: they may be parts of what is overwritten
            a = lora_a.to(self.lora_a.device, self.lora_a.dtype, copy=True)
            b = lora_b.to(self.lora_b.device, self.lora_b.dtype, copy=True)
            for name, value in (("lora_a", a), ("lora_b", b)):
                if not value.isfinite().all():
                    raise ValueError(
                        f"{name} holds NaN or infinity in {value.dtype}; expected finite numbers"
                    )
            self.lora_a[adapter, rank:].zero_()
            self.lora_b[adapter, :, rank:].zero_()
            self.lora_a[adapter, :rank].copy_(a)
            self.lora_b[adapter, :, :rank].copy_(b)
            self.ranks[adapter] = rank
            self.scaling[adapter] = factor

    def forward(self, x: Tensor, plan: MultiAdapterPlan | None = None) -> Tensor:
        """x (..., in_features) -> (..., out_features); the plan is of x's rows, in their order.

        Without a plan that of the surrounding ``pelt_fast.use_plan``; outside of one the frozen layer alone.
        """
        if plan is None:
            plan = current_plan()
        if not torch.compiler.is_compiling():
            self._check_recomputation(plan)
        base = self.base_layer
        if plan is None:
            return functional.frozen_linear(x, base.weight, base.bias)
        return functional.multi_lora_linear(
            *(x, base.weight, base.bias, self.lora_a, self.lora_b, plan, self.scaling),
            ranks=self.ranks,
            dropout_p=self.dropout,
            training=self.training,
        )

    def _check_recomputation(self, plan: MultiAdapterPlan | None) -> None:
        """A checkpoint that runs a forward again outside of ``use_plan`` would lose the adapters' gradients."""
        if torch._C._current_graph_task_id() == -1:  # no backward is running
            self._planned = plan is not None
        elif plan is None and self._planned:
            raise RuntimeError(
                "a checkpoint runs this layer again without the plan that it had; run the backward within "
                "pelt_fast.use_plan, or give the layer its plan as an argument"
            )

    def _index(self, adapter: Any) -> int:
        return _integer("adapter", adapter, 0, self.num_adapters - 1)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        # an ordinary tensor: safetensors writes no other
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            destination[f"{prefix}lora_b"] = destination[f"{prefix}lora_b"].contiguous()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        b = self.lora_b
        if b.dim() == 3 and not b.transpose(1, 2).is_contiguous():  # with assign=True
            b.data = b.data.transpose(1, 2).contiguous().transpose(1, 2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiLoRALinear:
        # the scalings stay in fp32, whatever the layer is cast to
        before = self.scaling
        super()._apply(fn, recurse)
        if self.scaling.dtype != before.dtype:
            self.scaling = before.to(self.scaling.device)
        return self

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"num_adapters={self.num_adapters}, max_rank={self.max_rank}, dropout={self.dropout}"
        )


def _integer(name: str, value: Any, least: int, most: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}; expected an integer")
    if value < least or (most is not None and value > most):
        limit = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name} is {value}; expected {limit}")
    return value


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a number")
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError(f"{name} is too large for a float; expected a finite number")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; expected a finite number")
    return float(value)


def _factor(name: str, value: Any, dtype: torch.dtype) -> float:
    factor = _finite(name, value)
    if abs(factor) > torch.finfo(dtype).max:
        raise ValueError(f"{name} is {factor}; expected a number that {dtype} holds")
    return factor


def _each(name: str, values: Any, n: int) -> list[Any]:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} is a {type(values).__name__}; expected a list or tuple")
    if len(values) != n:
        raise ValueError(f"{name} has {len(values)} entries; expected {n}, one for each adapter")
    return list(values)
