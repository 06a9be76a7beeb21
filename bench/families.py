"""The families whose kernels are measured, in the order in which they are shown."""

from .adapter import FAMILY as ADAPTER
from .case import Case
from .compacter import FAMILY as COMPACTER
from .delta import FAMILY as DELTA
from .family import Family
from .fusion import FAMILY as FUSION
from .lora import FAMILY as LORA
from .multi_bottleneck import FAMILY as MULTI_BOTTLENECK
from .multi_lora import FAMILY as MULTI_LORA
from .prefix import FAMILY as PREFIX

FAMILIES = {
    family.name: family
    for family in (LORA, ADAPTER, COMPACTER, MULTI_LORA, MULTI_BOTTLENECK, DELTA, PREFIX, FUSION)
}


def family_of(case: Case) -> Family:
    return FAMILIES[case.family]
