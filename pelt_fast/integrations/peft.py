"""PEFT: its LoRA linear layers compute with ``lora_linear``, and mixed batches with ``multi_lora_linear``.

A layer is made fast by giving it another class, a subclass of PEFT's that differs in ``forward``
alone, and restored by giving it PEFT's back. Nothing is stored on the layer, so copies, pickles,
replicas, hooks and wrappers work on it as they did, and no class and no global is touched. The
``LoraModel`` around the layers gets a class of its own too, which lets ``adapter_names`` train, and
the layers of the base model those of ``base_layers``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora import layer as lora
from peft.tuners.prefix_tuning import PrefixEncoder
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..functional import explain, lora_linear, multi_lora_linear
from . import peft_prefix
from .base_layers import FAST_BASE, base_classes
from .fast_class import check_on_top, give_back, library_type, sorts_of
from .obstacles import dtype_name, type_name
from .peft_mixed import forget_layer, mixed_operands, recomputed_names, remembered
from .peft_operands import Operands, kind_obstacle, operands
from .peft_prefix import AcceleratedPrefixEncoder
from .report import Report
from .stacked_lora import forget_trained

_REPORT_TOKENS = 2048  # for how many tokens a report names the backends
_IN_TRAINING = "Cannot pass `adapter_names` when the model is in training mode."  # PEFT's words


class AcceleratedLinear(lora.Linear):
    """PEFT's LoRA linear with a fast ``forward``. ``pelt_fast.accelerate`` makes its instances."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As ``peft.tuners.lora.Linear.forward``, which runs wherever a call is not served."""
        if not torch.compiler.is_compiling():
            names = kwargs.get("adapter_names") if kwargs else recomputed_names(self)
            if names is not None and not args and len(kwargs) < 2:
                return self._mixed_forward(x, names)
            forget_trained(self)
        if args or kwargs:
            return super().forward(x, *args, **kwargs)
        found = operands(self, x)
        if isinstance(found, str):
            return super().forward(x)
        return lora_linear(x, **found, training=True)

    def _mixed_forward(self, x: Tensor, names: Sequence[str]) -> Tensor:
        self._check_forward_args(x, adapter_names=names)
        found = mixed_operands(self, x, names)
        if isinstance(found, str):
            forget_trained(self)
            for name in names:
                if self.training and name in self.lora_variant:
                    raise ValueError(f"{_IN_TRAINING} {found}")
            return super().forward(x, adapter_names=names)
        if found is None:
            return self.base_layer(x)
        y = multi_lora_linear(x, found.weight, found.bias, **found.arguments, training=True)
        if found.lora_biases is not None:
            y = (y + found.lora_biases.view(y.shape)).to(y.dtype)
        return y


class AcceleratedModel(LoraModel):
    """PEFT's LoRA model, whose ``adapter_names`` train too. ``pelt_fast.accelerate`` makes its instances."""

    training: bool

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As PEFT's: the base model is nobody's any more."""
        return _unloaded(super().merge_and_unload(*args, **kwargs))

    def unload(self) -> nn.Module:
        """Likewise."""
        return _unloaded(super().unload())

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names, offsets = kwargs.get("adapter_names"), kwargs.get("alora_offsets")
        if names is None and offsets is None:
            yield
            return
        hooks = super()._enable_peft_forward_hooks(*args, **kwargs)
        if names is None or offsets is not None:
            with hooks:
                yield
            return
        training = self.training
        layers = self._served_layers(training)
        self.training = False  # of which PEFT asks this module alone, and here alone
        try:
            hooks.__enter__()
        finally:
            self.training = training
        try:
            with remembered(self, names, layers):
                yield
        finally:
            hooks.__exit__(None, None, None)  # PEFT itself leaves its hooks behind after an error

    def _served_layers(self, training: bool) -> frozenset[nn.Module]:
        """The LoRA layers that are ours; in training they must be all."""
        layers = []
        for name, module in self.named_modules():
            if isinstance(module, AcceleratedLinear):
                layers.append(module)
            elif training and isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                raise ValueError(
                    f"{_IN_TRAINING} It trains where pelt_fast serves every layer, but {name} is a {type_name(module)}"
                )
        return frozenset(layers)


_FAST = (AcceleratedLinear, AcceleratedModel, AcceleratedPrefixEncoder)


class _Accelerated(list[nn.Module]):
    """Accelerated layers; the models around them and the base model's layers do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.models: list[nn.Module] = []
        self.base: list[nn.Module] = []


def has_layers(model: nn.Module) -> bool:
    """Whether there is any layer of PEFT's in the model."""
    kinds = (BaseTunerLayer, peft_prefix.ENCODERS)
    return any(isinstance(module, kinds) for module in model.modules())


def accelerate(model: nn.Module, compat: str | None = None) -> Report:
    """Gives every LoRA linear that can be served the fast class; see ``pelt_fast.accelerate``. PEFT has no gates."""
    report = Report(library="PEFT")
    for module, fast in base_classes(_base_modules(model)).items():
        module.__class__ = fast
    inside_attention: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, lora.MultiheadAttention):
            inside_attention.update(module.modules())
        if type(module) is LoraModel:
            module.__class__ = AcceleratedModel
        if isinstance(module, peft_prefix.ENCODERS):
            _accelerate_encoder(name, module, report)
            continue
        already = isinstance(module, AcceleratedLinear)
        if not already:
            if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                continue
            reason = _why_left(module, module in inside_attention)
            if reason is not None:
                report.left[name] = reason
                continue
            module.__class__ = AcceleratedLinear
            _rebind_forward(module, lora.Linear.forward, AcceleratedLinear.forward)
        found = operands(module)
        state = found if isinstance(found, str) else [_describe(found)]
        report.add(name, "LoRA linear", state, already)
    below = {m.base_layer for m in model.modules() if isinstance(m, AcceleratedLinear)}
    report.base.update(sorts_of(m for m in _base_modules(model) if m not in below))
    return report


def _accelerate_encoder(name: str, module: nn.Module, report: Report) -> None:
    """Of the prefix, or of what else PEFT puts in front of a sequence."""
    already = isinstance(module, AcceleratedPrefixEncoder)
    if not already:
        reason = peft_prefix.why_left(module)
        if reason is not None:
            report.left[name] = reason
            return
        module.__class__ = AcceleratedPrefixEncoder
    state = peft_prefix.obstacle(module) or [peft_prefix.describe(module)]
    report.add(name, "prefix encoder", state, already)


def accelerated_layers(model: nn.Module) -> _Accelerated:
    """What ``restore`` will restore.

    Raises:
        RuntimeError: another library has put its own class over one of them.
    """
    found = _Accelerated()
    for name, module in model.named_modules():
        if isinstance(module, _FAST):
            if type(module) not in _FAST:
                raise RuntimeError(
                    f"cannot restore {name!r}: another library has since made it a "
                    f"{type(module).__name__}; undo that first"
                )
            (found.models if isinstance(module, AcceleratedModel) else found).append(module)
        elif isinstance(module, FAST_BASE):
            check_on_top(name, module)
            found.base.append(module)
    return found


def restore(layers: _Accelerated) -> None:
    """Gives accelerated layers PEFT's class back; see ``pelt_fast.restore``."""
    give_back(layers.base)
    for module in layers.models:
        module.__class__ = LoraModel
    for module in layers:
        if isinstance(module, AcceleratedPrefixEncoder):
            module.__class__ = PrefixEncoder
            continue
        forget_layer(module)
        module.__class__ = lora.Linear
        _rebind_forward(module, AcceleratedLinear.forward, lora.Linear.forward)


def _base_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The modules that are the base model's: all but what PEFT has put on them or made of them."""
    yield module
    inner: Iterable[nn.Module] = module.children()
    if isinstance(module, BaseTunerLayer):
        base = module._modules.get("base_layer")
        inner = () if base is None else (base,)
    elif isinstance(module, (AuxiliaryTrainingWrapper, peft_prefix.ENCODERS)):
        inner = ()
    for child in inner:
        # the other library's adapters are its affair
        if not library_type(child).__module__.startswith("adapters.methods."):
            yield from _base_modules(child)


def _unloaded(model: nn.Module) -> nn.Module:
    give_back(module for module in model.modules() if isinstance(module, FAST_BASE))
    return model


def _why_left(module: nn.Module, inside_attention: bool) -> str | None:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return f"it is a {type(module).__name__}, which has no LoRA"
    if type(module) is not lora.Linear:
        found = f"{type(module).__module__}.{type(module).__name__}"
        return f"it is a {found}, not a {lora.Linear.__module__}.Linear"
    if inside_attention:
        return "it is part of a MultiheadAttention, which never calls it"
    # Hugging Face accelerate's hooks put a forward on the instance and keep the old one beside it
    forward = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    if forward is not None and not _is_bound(forward, module, lora.Linear.forward):
        return "its forward was replaced on the instance"
    return kind_obstacle(module)


def _is_bound(method: Any, module: nn.Module, function: Callable[..., Any]) -> bool:
    if not isinstance(method, MethodType):
        return False
    return method.__self__ is module and method.__func__ is function


def _rebind_forward(module: nn.Module, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Lets a bound forward that Hugging Face accelerate's hooks keep follow the class."""
    for key in ("forward", "_old_forward"):
        if _is_bound(module.__dict__.get(key), module, old):
            module.__dict__[key] = MethodType(new, module)


def _describe(found: Operands) -> str:
    """Shape, dtypes and the chosen backends, in words."""
    weight, lora_a = found["weight"], found["lora_a"]
    x = weight.detach()[:1, :1].expand(_REPORT_TOKENS, weight.shape[1])
    forward, backward = explain("lora_linear", x, **found, training=True).backends
    ranks = "+".join(str(a.shape[0]) for a in lora_a)
    adapters = " and ".join(sorted({dtype_name(a.dtype) for a in lora_a}))
    return (
        f"{weight.shape[1]} -> {weight.shape[0]}, r = {ranks}, "
        f"{adapters} over {dtype_name(weight.dtype)}, T = {_REPORT_TOKENS}: "
        f"{forward or 'no backend'} forward, {backward or 'no backend'} backward"
    )
