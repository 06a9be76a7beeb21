"""``ServedLinear``: what a pool puts in the place of a linear module."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from ..nn import MultiLoRALinear
from ..segments import MultiAdapterPlan
from .batch import Owner, batch_of


class ServedLinear(MultiLoRALinear):
    """A ``MultiLoRALinear`` with the parameters of the module whose place it takes, and no others.

    The slots are buffers that no ``state_dict`` has. So parameters, their names and checkpoints stay the base model's.
    """

    owner: Owner
    transposed: bool
    weight: nn.Parameter
    bias: nn.Parameter | None

    @classmethod
    def around(
        cls, base: Any, slots: int, max_rank: int, dtype: torch.dtype | None, owner: Owner
    ) -> ServedLinear:
        """For an ``nn.Linear`` or a Conv1D, with empty slots."""
        transposed = not isinstance(base, nn.Linear)
        weight = base.weight.detach()
        with torch.inference_mode(False):
            linear = nn.Linear(1, 1, bias=False, device="meta")
            linear.weight = nn.Parameter(weight.t() if transposed else weight, requires_grad=False)
            linear.out_features, linear.in_features = linear.weight.shape
            layer = cls.__new__(cls)
            nn.Module.__init__(layer)
            layer._init(linear, slots, max_rank, [0] * slots, 0.0, None, 0.0, dtype)
            for name in ("lora_a", "lora_b", "ranks", "scaling"):
                value = getattr(layer, name).detach()
                delattr(layer, name)
                layer.register_buffer(name, value, persistent=False)
        del layer.base_layer
        layer.weight = base.weight
        layer.register_parameter("bias", base.bias)
        layer.owner, layer.transposed = owner, transposed
        return layer.train(base.training)

    def _reset(self, adapter: int, rank: int) -> None:
        """Slots begin with zeros."""

    def write(self, slot: int, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
        """A slot that nobody uses gets an adapter; what it held is gone, beyond the rank too."""
        rank = lora_a.shape[0]
        with torch.no_grad():
            self.lora_a[slot, rank:].zero_()
            self.lora_b[slot, :, rank:].zero_()
            self.lora_a[slot, :rank].copy_(lora_a)
            self.lora_b[slot, :, :rank].copy_(lora_b)
            self.ranks[slot] = rank
            self.scaling[slot] = scaling

    def clear(self, slot: int) -> None:
        """A slot that nobody uses gets nothing."""
        self.write(slot, self.lora_a[slot, :0], self.lora_b[slot, :, :0], 0.0)

    @property
    def nbytes(self) -> int:
        """What the slots take."""
        return sum(t.nbytes for t in (self.lora_a, self.lora_b, self.ranks, self.scaling))

    def forward(self, x: Tensor, plan: MultiAdapterPlan | None = None) -> Tensor:
        """What the base module computes and, within ``AdapterPool.batch``, what the adapters add."""
        if self.transposed:  # as transformers' Conv1D, bit for bit
            flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)  # type: ignore[arg-type]
            y = flat.view(*x.shape[:-1], self.out_features)
        else:
            y = F.linear(x, self.weight, self.bias)
        if plan is None:
            batch = batch_of(self.owner)
            if batch is None:
                return y
            plan = batch.plan(x.shape[:-1], x.device)
        out: Tensor = functional.multi_lora(
            *(x, self.lora_a, self.lora_b, plan, self.scaling), ranks=self.ranks, base_out=y
        )
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise TypeError("a model that a pool serves cannot be copied; restore() it first")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a model that a pool serves cannot be pickled; restore() it first")

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        nn.Module._load_from_state_dict(self, *args, **kwargs)
