"""Attention over a prefix, without gradients: floor is attention without one, rival is concatenation."""

from ..contender import BACKENDS
from ..family import Family, Oracle
from . import cases, contenders, oracle

FAMILY = Family(
    name="prefix",
    contenders=contenders.NAMES,
    floor="plain",
    main="ours",
    rivals=dict.fromkeys(("ours", *(f"ours[{backend}]" for backend in BACKENDS)), "eager"),
    unjudged=frozenset({"plain"}),
    may_fail="",
    trained=lambda inputs: (),
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
