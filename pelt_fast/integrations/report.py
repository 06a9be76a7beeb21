"""What ``accelerate`` did to a model."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """What was replaced, what was not, and why.

    Layers go by their names in ``model.named_modules()``.

    Attributes:
        library: whose layers they are.
        replaced: the layers that this call made fast.
        already: the layers that an earlier call made fast.
        left: layer to reason: not replaced, the library's own forward runs there.
        waiting: layer to reason, among ``replaced`` and ``already``: as the model stands, the
            library's own forward still runs there, and the layer is fast as soon as the reason is
            gone (after ``unmerge_adapter``, say). Other reasons can arise later: ``accelerate``,
            called again, tells the state of that moment.
        kinds: how many of the other layers there are of each shape, dtype and choice of backends; of
            a layer in which several adapters act at once, each adapter counts.
        compat: whose semantics the gates of the `adapters` library's layers have; None: there are no such layers.
    """

    library: str
    replaced: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    compat: str | None = None

    def __or__(self, other: Report) -> Report:
        """Of one model with the layers of two libraries."""
        return Report(
            f"{self.library} and {other.library}",
            self.replaced + other.replaced,
            self.already + other.already,
            self.left | other.left,
            self.waiting | other.waiting,
            self.kinds | other.kinds,
            self.compat or other.compat,
        )

    def __str__(self) -> str:
        total = len(self.replaced) + len(self.already) + len(self.left)
        lines = [f"pelt_fast: {len(self.replaced)} of {total} {self.library} layers replaced"]
        if self.already:
            lines[0] += f", {len(self.already)} had been already"
        if self.compat == "paper":
            lines[0] += (
                ", compat='paper': gates are means over real tokens, gated LoRA keeps alpha / r"
            )
        elif self.compat is not None:
            lines[0] += f", compat={self.compat!r}"
        lines += [f"  {count} x {kind}" for kind, count in self.kinds.items()]
        lines += _by_reason(
            f"replaced, but as the layers stand {self.library} computes", self.waiting
        )
        lines += _by_reason(f"left to {self.library}", self.left)
        return "\n".join(lines)


def _by_reason(title: str, reasons: dict[str, str]) -> list[str]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    lines = [f"{title} {len(reasons)}:"] if names else []
    for reason, group in names.items():
        more = f" and {len(group) - 3} more" if len(group) > 3 else ""
        lines.append(f"  {reason}: {', '.join(group[:3])}{more}")
    return lines
