"""What goes in a mixed batch of a model of the `adapters` library; the rest is said before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from adapters.composition import (
    AdapterCompositionBlock,
    Average,
    Fuse,
    Split,
    Stack,
    parse_composition,
    parse_heads_from_composition,
)
from adapters.methods.adapter_layer_base import AdapterLayerBase
from adapters.methods.prefix_tuning import PrefixTuningLayer
from adapters.methods.prompt_tuning import PromptTuningLayer
from torch import nn

from .adapters_mixed import MixedBatch, MixedSetup, blocks
from .adapters_mixed_prefix import BY_COLUMN, MODELS, prefix_length
from .fast_class import Accelerated, is_fast
from .obstacles import type_name

_BLOCKS = (Stack, Fuse, Average, Split)  # whose result of a sample depends on that sample alone
_ATTENTIONS = ("sdpa", "eager")


def mixed_setup(model: nn.Module, setups: Sequence[Any]) -> MixedSetup:
    """The setup of a mixed batch, a context manager; see ``pelt_fast.mixed_batch``."""
    config = getattr(model, "adapters_config", None)
    base: Any = getattr(model, "base_model", None)
    if config is None or not hasattr(base, "adapters_config"):
        raise ValueError(
            f"model ({type_name(model)}) is not one of the adapters library; expected a model after adapters.init, "
            "or an AdapterModel, itself: not a wrapper and not a part of it"
        )
    if not any(isinstance(module, Accelerated) for module in model.modules()):
        raise ValueError(
            f"model ({type_name(model)}) is not accelerated; call pelt_fast.accelerate(model) first"
        )
    if isinstance(setups, (str, AdapterCompositionBlock)) or not isinstance(setups, Sequence):
        raise TypeError(
            f"setups is {setups!r}; expected a list with one setup for each sample: the name of an adapter, a "
            "composition block, or None"
        )
    if not setups:
        raise ValueError("setups is empty; expected one setup for each sample")
    parsed = [_parsed(place, setup, config) for place, setup in enumerate(setups)]
    active = config.active_setup
    if active is not None and active.parallel_channels > 1:
        raise ValueError(
            f"the model's active adapters are {active}, which repeats the samples; call "
            "model.set_active_adapters(None) before mixed_batch"
        )
    attentions = {
        child: module
        for module in base.modules()
        if isinstance(child := module._modules.get("prefix_tuning"), PrefixTuningLayer)
    }
    couplings = {
        name: coupling
        for module in model.modules()
        if type(child := module._modules.get("invertible_adapters")) is nn.ModuleDict
        for name, coupling in child.items()
    }
    batch = MixedBatch(model, parsed, attentions, couplings)
    _check_layers(model, batch)
    _check_couplings(model, batch)
    _check_heads(model, parsed)
    _check_prefixes(base, attentions, batch)
    return MixedSetup(batch)


def _parsed(place: int, setup: Any, config: Any) -> AdapterCompositionBlock | None:
    if setup is None:
        return None
    if not isinstance(setup, (str, AdapterCompositionBlock)) or not setup:
        raise TypeError(
            f"setups[{place}] is {setup!r}; expected the name of an adapter, a composition block, or None"
        )
    for block in blocks(setup):
        if not isinstance(block, _BLOCKS):
            raise ValueError(
                f"setups[{place}] is {setup}: {type_name(block)} acts on a whole batch, not on a sample; expected "
                f"an adapter's name, None, or a block of {', '.join(kind.__name__ for kind in _BLOCKS)}"
            )
    try:
        parsed: AdapterCompositionBlock = parse_composition(setup)
    except ValueError as error:
        raise ValueError(f"setups[{place}] is {setup}: {error}") from error
    known = sorted(config.adapters)
    for name in sorted(parsed.flatten()):
        if name not in config.adapters:
            raise ValueError(
                f"setups[{place}] names the adapter {name!r}; the model's are {', '.join(known) or 'none'}"
            )
    for block in blocks(parsed):
        if isinstance(block, Fuse) and block.name not in config.fusions:
            raise ValueError(
                f"setups[{place}] is {setup}: there is no fusion layer {block.name!r}; the model's are "
                f"{'; '.join(sorted(config.fusions)) or 'none'} (add_adapter_fusion makes one)"
            )
    return parsed


def _check_layers(model: nn.Module, batch: MixedBatch) -> None:
    for name, layer in model.named_modules():
        if not isinstance(layer, AdapterLayerBase) or isinstance(layer, Accelerated):
            if isinstance(layer, Accelerated) and not is_fast(layer):
                raise ValueError(f"{name} is a {type_name(layer)}, of another library; undo that")
            continue
        mine = batch.flatten().intersection(_modules(layer))
        if not mine:
            continue
        where = _where(batch, mine)
        if isinstance(layer, PromptTuningLayer):
            raise ValueError(
                f"{where} has prompt tuning, which changes the length of its sample; not served in a mixed batch"
            )
        raise ValueError(
            f"{where} acts on {name}, a {type_name(layer)} that is left to the adapters library and takes one setup "
            "for all samples; pelt_fast.accelerate(model) says why, or serves it if it came after the last call"
        )


def _check_couplings(model: Any, batch: MixedBatch) -> None:
    """Invertible adapters that no layer holds: models call that of the first adapter of a setup."""
    for child in batch.children:
        name = None if child is None else child.first()
        if name not in batch.couplings:
            continue
        where = f"{_where(batch, [name])} has the invertible adapter {name!r}"
        coupling = batch.couplings[name]
        if not isinstance(coupling, Accelerated):
            raise ValueError(
                f"{where}, a {type_name(coupling)} that is left to the adapters library"
            )
        if getattr(model, "heads", None):
            raise ValueError(f"{where}, and the model has heads, which invert for all samples")


def _check_heads(model: Any, setups: Sequence[AdapterCompositionBlock | None]) -> None:
    """A model that chooses its head by the adapter has one for all samples."""
    heads = getattr(model, "heads", None)
    if not heads:
        return
    active = model.active_head
    for place, setup in enumerate(setups):
        head = None if setup is None else parse_heads_from_composition(setup, list(heads))
        if head is not None and head != active:
            raise ValueError(
                f"setups[{place}] is {setup}, which has a head of its own, {head!r}, while {active!r} is active; a "
                "mixed batch goes through one head: take the base model's output to the heads, row by row"
            )


def _check_prefixes(base: Any, layers: Iterable[PrefixTuningLayer], batch: MixedBatch) -> None:
    kind = base.config.model_type
    seen: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        lengths = tuple(prefix_length(layer, child) for child in batch.children)
        former = seen.setdefault(layer.location_key, lengths)
        if len({*lengths, *former}) == 1:
            continue
        found = f"the batch has prefixes of {_listed(lengths)} tokens"
        if kind not in MODELS:
            raise ValueError(
                f"{found} in one layer of a model of type {kind!r}, whose attention is not known to exclude what is "
                f"in front of the shorter ones; expected equal lengths, or one of {', '.join(MODELS)}"
            )
        if kind in BY_COLUMN and former != lengths:
            raise ValueError(
                f"{found} in layer {layer.layer_idx}, and of {_listed(former)} in another one; layers of "
                f"a model of type {kind!r} share one bias, expected the same in all of them"
            )
        attention = base.config._attn_implementation
        if attention not in _ATTENTIONS:
            raise ValueError(
                f"{found} in one layer, which needs a mask that attention of type {attention!r} does not take; "
                f"expected {' or '.join(_ATTENTIONS)}"
            )


def _listed(lengths: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(lengths))))


def _modules(layer: Any) -> Iterable[str]:
    return getattr(layer, layer.adapter_modules_name, ())


def _where(batch: MixedBatch, names: Iterable[str]) -> str:
    """The first sample with one of the adapters."""
    wanted = set(names)
    for place in range(len(batch.samples)):
        setup = batch.setup_of(place)
        if setup is not None and not wanted.isdisjoint(setup.flatten()):
            return f"setups[{place}] ({setup})"
    raise AssertionError(names)
