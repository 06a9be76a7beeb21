"""The Compacter adapter: floor is the layernorm that stands there anyway, rival is the library's composition."""

from pelt_fast.testing import compacter_oracle

from ..contender import BACKENDS
from ..family import Family, Oracle
from . import cases, contenders

FAMILY = Family(
    name="compacter",
    contenders=contenders.NAMES,
    floor="ln",
    main="ours",
    rivals=dict.fromkeys(("ours", *(f"ours[{backend}]" for backend in BACKENDS)), "eager"),
    unjudged=frozenset({"ln"}),
    may_fail="",
    trained=contenders.trained,
    quick=cases.quick_cases,
    full=cases.full_cases,
    draw=contenders.draw,
    build=contenders.build,
    oracle=Oracle(
        masks=compacter_oracle.mask,
        exact=compacter_oracle.exact,
        eager=compacter_oracle.eager,
        deviations=compacter_oracle.deviations,
    ),
)
