"""``AdapterPool``: LoRA adapters in fixed slots over a frozen model, for batches in which every sample has its own."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..segments import MultiAdapterPlan
from . import targets
from .batch import Batch, Owner, running
from .checked import Piece, check
from .files import find
from .layer import ServedLinear
from .slots import Resident, Slots

_BASE = "__base__"


class AdapterPool:
    """Serves PEFT LoRA adapters over one frozen model, each sample of a batch with its own.

    Every target module is replaced by one that shares its weights and has ``slots`` places for adapters; an adapter has
    the same place in all of them. The model's parameters, their names and its ``state_dict`` stay the base model's:
    adapters are a cache of files here, and ``save_pretrained`` writes what it wrote before. ``restore`` puts the
    modules back. While a pool serves a model, the model can be neither copied nor pickled.

    All methods may be called from several threads at once. A load writes only into a slot that no running batch uses,
    and a batch sees an adapter as a whole, as it was before a load or as it is after it. Batches and loads of a name
    whose slot is just being written wait for that moment, nothing else waits.

    Args:
        model: a Hugging Face model or any ``nn.Module``, on its device already; it may be moved or cast while no batch
            runs. A module without PEFT's layers: adapters are named as after ``get_peft_model(model)``.
        target_modules: as PEFT's: names or last parts of names; a string is a pattern of whole names, or "all-linear".
            ``nn.Linear`` and transformers' ``Conv1D`` themselves are served, no subclasses.
        slots: how many adapters there is room for, at least 1.
        max_rank: the most that an adapter's rank can be, 1 to 256. Memory is taken for it: see ``bytes``.
        dtype: of the adapters in the pool; None: each module's own. ``torch.float32`` over a half is allowed.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument has a wrong value, or a target cannot be served. The model is unchanged then.
    """

    def __init__(
        self,
        model: nn.Module,
        target_modules: str | Collection[str],
        *,
        slots: int,
        max_rank: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.max_rank = _integer("max_rank", max_rank, functional.MAX_RANK)
        self._slots = Slots(_integer("slots", slots, 2**31 - 2))
        self._owner = Owner()
        self._model = model
        self._replaced = targets.find(model, target_modules)
        layers = {}
        for name, module in self._replaced.items():
            _check_dtype(name, dtype, module.weight.dtype)  # type: ignore[arg-type]
            layers[name] = ServedLinear.around(module, slots, max_rank, dtype, self._owner)
        self._targets = targets.Targets(
            layers, targets.others(model, layers), targets.all_linear(model)
        )
        self._events: list[dict[Any, Any]] = [{} for _ in range(slots)]
        targets.swap(model, layers)

    @property
    def slots(self) -> int:
        """How many adapters there is room for."""
        return self._slots.count

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Names of the modules that are served."""
        return tuple(self._targets.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are loaded, the least recently used first."""
        return tuple(self._slots.residents())

    @property
    def resident(self) -> dict[str, Resident]:
        """The same with each one's slot, whether it is pinned, and how many running batches use it."""
        return self._slots.residents()

    def __contains__(self, name: object) -> bool:
        return name in self._slots.residents()

    def __len__(self) -> int:
        return len(self._slots.residents())

    def bytes(self) -> int:
        """Memory that the slots take, whether they are filled or not."""
        return sum(layer.nbytes for layer in self._targets.layers.values())

    def load(
        self,
        name: str,
        source: str | os.PathLike[str] | Mapping[str, Tensor],
        config: Any = None,
        *,
        pin: bool = False,
        timeout: float | None = None,
    ) -> None:
        """Loads an adapter that ``peft.PeftModel.save_pretrained`` wrote.

        All of it is checked before anything is changed: an adapter that does not fit is refused, and the pool is as it
        was. It fits if each of its weights is for a served module, every served module that its config names has
        weights, shapes are those of the base model and of the config's ranks, ranks are at most ``max_rank``, and
        numbers are finite. A module that its config does not name has no LoRA with this adapter. ``rank_pattern``,
        ``alpha_pattern`` and ``use_rslora`` are honoured; DoRA, biases, ``modules_to_save``, and initialisations that
        change base weights (PiSSA, OLoRA, ...) are refused.

        If no slot is free, the adapter that was used least recently is evicted, but none that is pinned or in use. A
        name that is loaded already is replaced, and stays pinned if it was; batches that run go on with the former one.

        Args:
            name: what batches call it; not "__base__".
            source: the folder of ``save_pretrained``, or its ``.safetensors`` file; pickles are refused, because they
                run code. Or tensors by name, as ``peft.get_peft_model_state_dict`` gives them.
            config: a mapping or a ``peft.LoraConfig``; None: ``adapter_config.json`` beside the weights.
            pin: it is never evicted for another one, from then on.
            timeout: how many seconds to wait for a slot if all are pinned or in use; None: not at all.

        Raises:
            TypeError: an argument has a wrong type.
            FileNotFoundError: a file is missing.
            OSError: a file cannot be read.
            ValueError: the adapter does not fit, or an argument has a wrong value.
            PoolFull: every slot is pinned or in use.
        """
        _check_name(name)
        if timeout is not None and not _is_time(timeout):
            raise ValueError(f"timeout is {timeout!r}; expected seconds of at least 0, or None")
        self._slots.check_open()
        pieces = check(find(source, config), self._targets, self.max_rank)
        reservation = self._slots.reserve(name, timeout)
        try:
            self._write(reservation.slot, pieces)
        except BaseException:
            self._slots.abandon(reservation)
            raise
        self._slots.commit(reservation, bool(pin))

    def evict(self, name: str) -> None:
        """Takes an adapter out: new batches do not find it, running ones keep it until they end.

        Raises:
            UnknownAdapter: it is not there.
            ValueError: it is pinned.
        """
        self._slots.evict(name)

    def pin(self, name: str) -> None:
        """Keeps an adapter from being evicted; UnknownAdapter, a KeyError, if it is not there."""
        self._slots.pin(name, True)

    def unpin(self, name: str) -> None:
        """Undoes ``pin``; UnknownAdapter, a KeyError, if it is not there."""
        self._slots.pin(name, False)

    @contextmanager
    def batch(
        self, adapter_names: Sequence[str | None], tokens: int | Sequence[int] | None = None
    ) -> Iterator[MultiAdapterPlan | None]:
        """Within the block, in this thread, the model runs with these adapters; none of them is changed meanwhile.

        Nothing is loaded. Use ``torch.inference_mode()`` or ``torch.no_grad()`` around the forward. On a GPU, what the
        block starts on other streams than the current one must be joined to it before the block ends.

        Args:
            adapter_names: for each sample its adapter; None or "__base__": none.
            tokens: how many rows each sample has in every layer: a number for all, or one for each, as packed batches
                have. None: each layer's rows are divided evenly, so that ``generate``, beams, and encoders beside
                decoders need no more than the names.

        Yields:
            The plan, on the first target's device; None where ``tokens`` is.

        Raises:
            UnknownAdapter: a name is not in the pool; it is a KeyError.
            TypeError: an argument has a wrong type.
            ValueError: ``tokens`` does not go with the names.
        """
        if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
            kind = type(adapter_names).__name__
            raise TypeError(f"adapter_names is a {kind}; expected a list of names")
        wanted = [None if name == _BASE else name for name in adapter_names]
        for name in wanted:
            if name is not None and not isinstance(name, str):
                raise TypeError(f"adapter_names has a {type(name).__name__}; expected str or None")
        counts = _counts(tokens, len(wanted))
        held = self._slots.hold(name for name in wanted if name is not None)
        try:
            slots = [-1 if name is None else held[name] for name in wanted]
            batch = Batch(self._owner, slots, counts, self._slots.count)
            plan = None
            if counts is not None:
                first = next(iter(self._targets.layers.values()))
                plan = batch.plan((batch.rows,), first.weight.device)
            with running(batch):
                yield plan
        finally:
            try:
                self._note_use(held.values())
            finally:
                self._slots.release(held.values())

    def restore(self) -> None:
        """Puts the replaced modules back, with the parameters that the model has now; the pool is of no use then.

        Calling it again is harmless.

        Raises:
            RuntimeError: a batch or a load is running, or somebody has replaced a module since. Nothing is changed.
        """
        if not self._replaced:
            return
        for name, layer in self._targets.layers.items():
            if self._model.get_submodule(name) is not layer:
                raise RuntimeError(f"cannot restore {name}: another module is in its place")
        self._slots.close()
        for name, module in self._replaced.items():
            layer = self._targets.layers[name]
            module.weight, module.bias = layer.weight, layer.bias  # type: ignore[assignment]
            module.train(layer.training)
        targets.swap(self._model, self._replaced)
        self._replaced = {}
        self._targets = targets.Targets({}, {}, frozenset())

    def _write(self, slot: int, pieces: Mapping[str, Piece]) -> None:
        for event in self._events[slot].values():
            event.synchronize()
        self._events[slot] = {}
        for name, layer in self._targets.layers.items():
            if name in pieces:
                layer.write(slot, *pieces[name])
            else:
                layer.clear(slot)
        for device in self._gpus():
            torch.cuda.current_stream(device).synchronize()

    def _note_use(self, slots: Collection[int]) -> None:
        """A GPU may still be at what the block started."""
        for device in self._gpus():
            stream = torch.cuda.current_stream(device)
            event = stream.record_event()
            for slot in slots:
                self._events[slot][device, stream.cuda_stream] = event

    def _gpus(self) -> set[torch.device]:
        devices = {layer.lora_a.device for layer in self._targets.layers.values()}
        return {device for device in devices if device.type == "cuda"}


def _integer(name: str, value: Any, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a {type(value).__name__}; expected an integer")
    if not 1 <= value <= most:
        raise ValueError(f"{name} is {value}; expected 1 to {most}")
    return value


def _check_dtype(name: str, dtype: torch.dtype | None, base: torch.dtype) -> None:
    half = base in (torch.bfloat16, torch.float16)
    if dtype is not None and dtype != base and not (half and dtype == torch.float32):
        raise ValueError(
            f"dtype is {dtype}; expected {base}, as {name} has, or float32 over a half"
        )


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}; expected a str")
    if not name or name == _BASE:
        raise ValueError(f"name is {name!r}; expected another one: it stands for no adapter")


def _is_time(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _counts(tokens: Any, samples: int) -> list[int] | None:
    if tokens is None:
        return None
    counts = [tokens] * samples if isinstance(tokens, int) else tokens
    if isinstance(counts, Tensor):
        counts = counts.tolist()
    if isinstance(tokens, bool) or not isinstance(counts, Sequence):
        raise TypeError(
            f"tokens is a {type(tokens).__name__}; expected an integer or a list of them"
        )
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"tokens has a {type(count).__name__}; expected integers")
        if count < 0:
            raise ValueError(f"tokens has {count}; expected at least 0")
    if len(counts) != samples:
        raise ValueError(f"tokens has {len(counts)} entries; expected {samples}, one for each name")
    return list(counts)
