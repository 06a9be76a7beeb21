"""Diff pruning and masking: floor is a linear whose own weight trains, rival is eager PyTorch by hand."""

from ..contender import BACKENDS
from ..family import Family, Oracle
from . import cases, contenders, oracle

FAMILY = Family(
    name="delta",
    contenders=contenders.NAMES,
    floor="full",
    main="ours",
    rivals=dict.fromkeys(("ours", *(f"ours[{backend}]" for backend in BACKENDS)), "eager"),
    unjudged=frozenset({"full", "eager"}),
    may_fail="",
    trained=contenders.trained,
    quick=cases.quick_cases,
    full=cases.full_cases,
    draw=contenders.draw,
    build=contenders.build,
    oracle=Oracle(
        masks=oracle.noise,
        exact=oracle.exact,
        eager=oracle.eager,
        deviations=oracle.deviations,
    ),
)
