"""A batch whose samples have setups of their own, in a model of the `adapters` library.

Within ``pelt_fast.mixed_batch`` a ``MixedBatch`` is the model's active setup, where ``AdapterSetup`` of the library
puts it: for this thread, and for nothing that is stored. An accelerated layer that finds it computes each sample with
the sample's own setup: rows go apart by setup, through the layer as if they were alone, and together again in their
order (``by_setup``); or in one call where a kernel takes them all (``adapters_mixed_lora``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from adapters.composition import AdapterCompositionBlock
from adapters.context import AdapterSetup, ForwardContext
from torch import Tensor, nn

from .adapters_paper import tokens_of

# whose last call was of a mixed batch, and may be in a checkpoint that we do not know of
_mixed: WeakSet[nn.Module] = WeakSet()


class Groups(NamedTuple):
    """The samples of a batch by what acts on them in one layer."""

    setups: tuple[AdapterCompositionBlock | None, ...]
    sizes: tuple[int, ...]
    samples: tuple[tuple[int, ...], ...]  # of each group
    of_sample: tuple[int, ...]  # the group of each sample
    order: Tensor | None  # samples, group by group; None: as they are
    inverse: Tensor | None

    def apart(self, tensor: Tensor | None) -> Sequence[Tensor | None]:
        """A tensor whose first dimension is the samples, for each group."""
        if tensor is None:
            return [None] * len(self.sizes)
        if self.order is not None:
            tensor = _reordered(tensor, self.order, self.inverse)
        return tensor.split(self.sizes)

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """What ``apart`` took apart."""
        tensor = torch.cat(list(parts))
        if self.order is not None:
            tensor = _reordered(tensor, self.inverse, self.order)
        return tensor


class MixedBatch(AdapterCompositionBlock):
    """The setup of each sample.

    Attributes:
        children: the setups, each once; None: no adapter.
        samples: for each sample the number of its setup.
        attentions: of the layers for prefixes, the attention that each stands in.
        couplings: the invertible adapters of a model that has no layer for them, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        setups: Sequence[AdapterCompositionBlock | None],
        attentions: dict[nn.Module, nn.Module],
        couplings: dict[str, nn.Module],
    ) -> None:
        keys: dict[Any, int] = {}
        self.samples = tuple(keys.setdefault(_key(setup), len(keys)) for setup in setups)
        self.children = [setups[self.samples.index(i)] for i in range(len(keys))]
        self.attentions, self.couplings = attentions, couplings
        base: Any = model.base_model
        self.adapters_config = base.adapters_config
        self._names = frozenset().union(*(child.flatten() for child in self.children if child))
        self._shared = base.shared_parameters
        self._groups: dict[Any, Groups] = {}

    def flatten(self) -> frozenset[str]:
        """The names of all adapters in the batch."""
        return self._names

    def first(self) -> str:
        """What a model calls for its invertible adapter: one of the batch's, which knows of the others."""
        names = (child.first() for child in self.children if child)
        return next((name for name in names if name in self.couplings), "")

    def setup_of(self, sample: int) -> AdapterCompositionBlock | None:
        """Of one sample."""
        setup: AdapterCompositionBlock | None = self.children[self.samples[sample]]
        return setup

    def groups(self, layer: Any, x: Tensor) -> Groups:
        """The samples by what acts on them in this layer, whose input is x (B, ...)."""
        if len(x) != len(self.samples):
            raise ValueError(
                f"the mixed batch has {len(self.samples)} setups, but a {type(layer).__name__} was given {len(x)} "
                "samples; expected one setup for each sample that the model computes (a search with beams or several "
                "returned sequences computes each sample several times)"
            )
        present = set(layer.adapter_modules)
        acts = tuple(
            child is not None and not present.isdisjoint(child.flatten()) for child in self.children
        )
        key = acts, x.device
        found = self._groups.get(key)
        if found is None:
            found = self._groups[key] = self._grouped(*key)
        return found

    def _grouped(self, acts: tuple[bool, ...], device: torch.device) -> Groups:
        # whatever does not act is as good as nothing
        effective = [i if acts[i] else -1 for i in self.samples]
        present = list(dict.fromkeys(effective))
        of_sample = [present.index(i) for i in effective]
        order = sorted(range(len(of_sample)), key=of_sample.__getitem__)
        samples = [tuple(s for s in order if of_sample[s] == g) for g in range(len(present))]
        setups = [None if i < 0 else self.children[i] for i in present]
        there = back = None
        if order != list(range(len(order))):
            with torch.inference_mode(False):
                there = torch.tensor(order)
                back = there.argsort().to(device)
                there = there.to(device)
        return Groups(
            *(tuple(setups), tuple(map(len, samples)), tuple(samples), tuple(of_sample)),
            *(there, back),
        )

    def remember(self) -> None:
        """Lets the running forward know the batch: what a checkpoint runs again has nothing else to ask."""
        context = ForwardContext.get_context()
        if context is None or isinstance(context, _MixedContext):
            return
        for wanted in ("output_adapter_gating_scores", "output_adapter_fusion_attentions"):
            if getattr(context, wanted):
                raise ValueError(f"{wanted} is set; it is not served in a mixed batch")
        gone = sorted(self._names - self.adapters_config.adapters.keys())
        if gone:
            raise ValueError(
                f"the mixed batch has {', '.join(map(repr, gone))}, deleted from the model since; expected its "
                "adapters to stay within the block"
            )
        context.__class__ = _MixedContext
        context.mixed_setup = MixedSetup(self)
        # the library's are of the adapters that are active outside the block
        context.shared_parameters = {
            name: shared for name, shared in self._shared.items() if name in self._names
        }


class _Setup(AdapterSetup):
    """A setup as it is: the library's own class checks compositions, and knows neither of ours."""

    def __init__(self, setup: AdapterCompositionBlock | None) -> None:
        self.adapter_setup = setup
        self.head_setup = None
        self._empty = False


class MixedSetup(_Setup):
    """Within the block the batch is active."""


class Alone(_Setup):
    """Within the block one setup is active, or none: what a group of samples is computed with."""


class _MixedContext(ForwardContext):
    """The context of a forward with a mixed batch. A checkpoint enters it again, within a backward."""

    mixed_setup: MixedSetup

    def __enter__(self) -> Any:
        self.mixed_setup.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.mixed_setup.__exit__(*error)


def mixed_batch_at(layer: Any) -> MixedBatch | None:
    """The batch that is active on the layer; None: one setup is, or none.

    Raises:
        ValueError: the batch is another model's.
    """
    setup = layer.get_active_setup()
    if type(setup) is not MixedBatch:
        return None
    if layer.adapters_config is not setup.adapters_config:
        raise ValueError(
            "within mixed_batch another model was called; expected the one that it was made for"
        )
    setup.remember()
    _mixed.add(layer)
    return setup


def check_recomputed(layer: nn.Module) -> None:
    """Of a layer that is called without a mixed batch.

    Raises:
        RuntimeError: a checkpoint that is not the model's own runs the layer again, without the batch that it had.
    """
    if torch.compiler.is_compiling() or not _mixed or ForwardContext.get_context() is not None:
        return
    within = isinstance(AdapterSetup.get_context(), _Setup)
    if not within and torch._C._current_graph_task_id() != -1 and layer in _mixed:
        raise RuntimeError(
            "a checkpoint runs a layer again without the mixed batch that it had; use the model's own "
            "gradient_checkpointing_enable()"
        )


def mixed_batch_now() -> MixedBatch | None:
    """The batch that is active in this thread."""
    setup = AdapterSetup.get_context_adapter_setup()
    if type(setup) is not MixedBatch:
        return None
    setup.remember()
    return setup


def by_setup(
    layer: Any, batch: MixedBatch, compute: Callable[..., Tensor], *tensors: Tensor | None
) -> Tensor:
    """``compute(*tensors)`` of each group's samples, with the group's setup active.

    Args:
        layer: the layer that is computed.
        batch: the mixed batch that is active on it.
        compute: of the group's parts; row by row, so that it does not matter who else is in the batch.
        tensors: (B, ...) or None.

    Returns:
        What ``compute`` gave, (B, ...).
    """
    like = next(t for t in tensors if t is not None)
    groups = batch.groups(layer, like)
    if len(groups.setups) == 1:
        with Alone(groups.setups[0]):
            return compute(*tensors)
    parts = []
    own = zip(*map(groups.apart, tensors), strict=True)
    for setup, samples, part in zip(groups.setups, groups.samples, own, strict=True):
        with Alone(setup), tokens_of(samples):
            parts.append(compute(*part))
    return groups.together(parts)


class _Reordered(torch.autograd.Function):
    """Rows in another order. That of an index knows nothing of a way back, and adds into zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        order, inverse = ctx.saved_tensors
        return _Reordered.apply(grad, inverse, order), None, None


def _reordered(x: Tensor, order: Any, inverse: Any) -> Tensor:
    y: Tensor = _Reordered.apply(x, order, inverse)
    return y


def _key(setup: Any) -> Any:
    """Equal for equal setups: the library's own comparison stops at the shorter one's end."""
    if not isinstance(setup, AdapterCompositionBlock):
        return setup
    settings = [repr(getattr(setup, name, None)) for name in ("name", "weights", "splits")]
    return (type(setup), *settings, *map(_key, setup.children))


def blocks(setup: Any) -> list[AdapterCompositionBlock]:
    """The composition blocks of a setup, itself and those inside."""
    if not isinstance(setup, AdapterCompositionBlock):
        return []
    return [setup, *itertools.chain.from_iterable(map(blocks, setup.children))]
