"""AdapterFusion: floor is layernorm(o + x), which every model has; rival is the library's order by hand in PyTorch."""

from pelt_fast.testing import fusion_oracle

from ..contender import BACKENDS
from ..family import Family, Oracle
from . import cases, contenders

FAMILY = Family(
    name="fusion",
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
        masks=fusion_oracle.mask,
        exact=fusion_oracle.exact,
        eager=fusion_oracle.eager,
        deviations=contenders.deviations,
    ),
)
