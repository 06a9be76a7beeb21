"""Batched multi-LoRA over a frozen linear: floor is that linear, rival is a loop over the adapters of a batch."""

from ..family import Family, Oracle
from . import cases, contenders, oracle

FAMILY = Family(
    name="multi_lora",
    contenders=contenders.NAMES,
    floor="frozen",
    main="ours",
    rivals=dict.fromkeys((name for name in contenders.NAMES if name.startswith("ours")), "loop"),
    unjudged=frozenset({"frozen", "plan"}),
    may_fail="",
    trained=contenders.trained,
    quick=cases.quick_cases,
    full=cases.full_cases,
    draw=contenders.draw,
    build=contenders.build,
    oracle=Oracle(
        masks=oracle.masks, exact=oracle.exact, eager=oracle.eager, deviations=oracle.deviations
    ),
)
