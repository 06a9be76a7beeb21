"""What ``accelerate`` did to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


class Idle(str):
    """Why a fast layer has nothing to do: no adapter acts on it."""


@dataclass(frozen=True)
class Report:
    """What was made fast, what was not, and why.

    Layers go by their names in ``model.named_modules()``.

    Attributes:
        library: whose layers they are.
        replaced: the layers that this call made fast.
        already: the layers that an earlier call made fast.
        left: layer to reason: not replaced, the library's own forward runs there.
        idle: layer to reason: ready, but no adapter acts there as the model stands; in neither of the first two.
        waiting: layer to reason, among ``replaced`` and ``already``: as the model stands, the
            library's own forward still runs there, and the layer is fast as soon as the reason is
            gone (after ``unmerge_adapter``, say). Other reasons can arise later: ``accelerate``,
            called again, tells the state of that moment.
        fast: how many of the other layers there are of each sort ("LoRA linear", "bottleneck layer", ...).
        kinds: the same by shape, dtype and choice of backends; of a layer in which several adapters act at once, each
            adapter counts.
        base: how many layers of the base model are fast, of each sort ("frozen linear", "dropout", ...).
        compat: whose semantics the gates of the `adapters` library's layers have; None: there are no such layers.
    """

    library: str
    replaced: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    idle: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    fast: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    base: dict[str, int] = field(default_factory=dict)
    compat: str | None = None

    def add(self, name: str, sort: str, state: Sequence[str], already: bool) -> None:
        """Enters a layer that has its fast class.

        Args:
            name: of the layer.
            sort: of all layers like this one, in the singular.
            state: what is computed there, one entry of ``kinds`` for each adapter; or, a str, why the library computes.
            already: since an earlier call.
        """
        if isinstance(state, Idle):
            self.idle[name] = state
            return
        (self.already if already else self.replaced).append(name)
        if isinstance(state, str):
            self.waiting[name] = state
            return
        self.fast[sort] = self.fast.get(sort, 0) + 1
        for kind in state:
            self.kinds[kind] = self.kinds.get(kind, 0) + 1

    def __or__(self, other: Report) -> Report:
        """Of one model with the layers of two libraries, who may both have seen a layer of the base model."""
        sorts = {**self.fast, **other.fast}
        return Report(
            f"{self.library} and {other.library}",
            self.replaced + other.replaced,
            self.already + other.already,
            self.left | other.left,
            self.idle | other.idle,
            self.waiting | other.waiting,
            {sort: self.fast.get(sort, 0) + other.fast.get(sort, 0) for sort in sorts},
            self.kinds | other.kinds,
            {
                sort: max(self.base.get(sort, 0), other.base.get(sort, 0))
                for sort in {**self.base, **other.base}
            },
            self.compat or other.compat,
        )

    def __str__(self) -> str:
        lines = [f"pelt_fast: fast are {_counted(self.fast) or 'no layers'} of {self.library}"]
        if self.base:
            lines[0] += f", and of the base model {_counted(self.base)}"
        if self.already:
            lines[0] += f"; {len(self.already)} layers had been replaced already"
        if self.compat == "paper":
            lines[0] += (
                "; compat='paper': gates are means over real tokens, gated LoRA keeps alpha / r"
            )
        elif self.compat is not None:
            lines[0] += f"; compat={self.compat!r}"
        lines += [f"  {count} x {kind}" for kind, count in self.kinds.items()]
        lines += _by_reason(
            f"replaced, but as the layers stand {self.library} computes", self.waiting
        )
        lines += _by_reason("replaced, and idle as the model stands", self.idle)
        lines += _by_reason(f"left to {self.library}", self.left)
        return "\n".join(lines)


def _counted(sorts: dict[str, int]) -> str:
    return ", ".join(f"{count} {sort}{'s' * (count != 1)}" for sort, count in sorts.items())


def _by_reason(title: str, reasons: dict[str, str]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    lines = [f"{title} {len(reasons)}:"] if names else []
    for reason, group in names.items():
        more = f" and {len(group) - 3} more" if len(group) > 3 else ""
        lines.append(f"  {reason}: {', '.join(group[:3])}{more}")
    return lines
