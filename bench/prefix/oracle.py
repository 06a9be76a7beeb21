"""What judges a row: `pelt_fast.testing.prefix_oracle`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pelt_fast.testing import prefix_oracle
from pelt_fast.testing.prefix_workloads import PrefixInputs
from pelt_fast.testing.tolerance import Deviation

from .contenders import AttentionInputs, concatenated


def exact(inputs: AttentionInputs, masks: Any, wanted: Iterable[str]) -> dict[str, Tensor]:
    """In fp64."""
    return {"y": concatenated(inputs.map(lambda _, t: t.detach().to(torch.float64)))}


def eager(inputs: AttentionInputs, masks: Any, wanted: Iterable[str]) -> dict[str, Tensor]:
    """Concatenated, in the dtype of the inputs."""
    return {"y": concatenated(inputs)}


def deviations(results: dict[str, Tensor], inputs: AttentionInputs, masks: Any) -> list[Deviation]:
    """The one result."""
    i, options = inputs, {} if inputs.mask is None else {"attn_mask": inputs.mask}
    call = PrefixInputs(i.x, i.key, i.value, i.prefix_key, i.prefix_value, options)
    return [prefix_oracle.deviation(results["y"], call)]
