"""The bottleneck adapter: floor is the layernorm that stands there anyway, rival is eager PyTorch by hand."""

from pelt_fast.testing import adapter_oracle, adapter_tolerance

from ..contender import BACKENDS
from ..family import Family, Oracle
from . import cases, contenders

FAMILY = Family(
    name="adapter",
    contenders=contenders.NAMES,
    floor="ln",
    main="ours",
    rivals=dict.fromkeys(("ours", *(f"ours[{backend}]" for backend in BACKENDS)), "eager"),
    unjudged=frozenset({"ln"}),
    may_fail="compiled",
    trained=contenders.trained,
    quick=cases.quick_cases,
    full=cases.full_cases,
    draw=contenders.draw,
    build=contenders.build,
    oracle=Oracle(
        masks=adapter_oracle.mask,
        exact=adapter_oracle.exact,
        eager=adapter_oracle.eager,
        deviations=adapter_tolerance.deviations,
    ),
)
