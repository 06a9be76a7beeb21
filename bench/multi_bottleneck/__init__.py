"""Batched bottleneck adapters: floor is the layernorm that stands there anyway, rival a loop over adapters."""

from ..contender import BACKENDS
from ..family import Family, Oracle
from . import cases, contenders, oracle

FAMILY = Family(
    name="multi_bottleneck",
    contenders=contenders.NAMES,
    floor="ln",
    main="ours",
    rivals=dict.fromkeys(("ours", *(f"ours[{backend}]" for backend in BACKENDS)), "loop"),
    unjudged=frozenset({"ln"}),
    may_fail="",
    trained=contenders.trained,
    quick=cases.quick_cases,
    full=cases.full_cases,
    draw=contenders.draw,
    build=contenders.build,
    oracle=Oracle(
        masks=lambda inputs, seed: None,
        exact=oracle.exact,
        eager=oracle.eager,
        deviations=oracle.deviations,
    ),
)
