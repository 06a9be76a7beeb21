"""The LoRA linear: floor is the frozen linear, rival is PEFT in the same form."""

from pelt_fast.testing import oracle, tolerance

from ..contender import BACKENDS
from ..family import Family, Oracle
from . import cases, contenders

FAMILY = Family(
    name="lora",
    contenders=contenders.NAMES,
    floor="frozen",
    main="ours_base",
    rivals={f"ours_{form}": f"peft_{form}" for form in contenders.FORMS}
    | {f"ours[{backend}]": "peft_base" for backend in BACKENDS},
    unjudged=frozenset({"frozen", "peft_dropout"}),
    may_fail="peft_compiled",
    trained=contenders.trained,
    quick=cases.quick_cases,
    full=cases.full_cases,
    draw=contenders.draw,
    build=contenders.build,
    oracle=Oracle(
        masks=oracle.masks,
        exact=oracle.exact,
        eager=oracle.eager,
        deviations=tolerance.deviations,
        exact_key=lambda inputs: inputs.dropout_p,
    ),
)
