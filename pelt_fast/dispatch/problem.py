"""What a backend is told about an operation before it runs: shapes, dtypes, device; no data."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class LoRAProblem(NamedTuple):
    """One pass of the LoRA linear. ``dtype`` is x's, the one that is computed in."""

    op: str  # "lora_linear_fwd" | "lora_linear_bwd", "gated_lora_linear_fwd" | "gated_lora_linear_bwd"
    device_type: str
    arch: str  # "sm_90", "avx2", ...
    dtype: torch.dtype
    weight_dtype: torch.dtype
    adapter_dtypes: tuple[torch.dtype, ...]
    tokens: int
    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    dropout: bool
    weight_requires_grad: bool
    weight_is_inference: bool  # made in inference mode: its changes leave no trace

    @property
    def family(self) -> str:
        """The module of a backend that has this operation."""
        return "gated_lora" if self.op.startswith("gated") else "lora"

    @property
    def rank(self) -> int:
        """Sum of the ranks of the active adapters."""
        return sum(self.ranks)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        ranks = "+".join(map(str, self.ranks))
        text = f"{self.op} {dtype} T={self.tokens} in={self.in_features} out={self.out_features} r={ranks}"
        text += " dropout" if self.dropout else ""
        return f"{text} on {self.device_type} ({self.arch})"


class AdapterProblem(NamedTuple):
    """One pass of the bottleneck adapter. ``dtype`` is x's, the one that is computed in."""

    op: str  # "bottleneck_adapter_fwd" | "bottleneck_adapter_bwd"
    device_type: str
    arch: str
    dtype: torch.dtype
    param_dtypes: tuple[torch.dtype, ...]
    tokens: int
    features: int
    bottleneck: int
    activation: str
    pre_ln: bool
    post_ln: bool
    skip: bool
    gate: bool
    dropout: bool

    @property
    def family(self) -> str:
        """The module of a backend that has this operation."""
        return "adapter"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{self.op} {dtype} T={self.tokens} d={self.features} m={self.bottleneck} {self.activation}"
        flags = ("pre_ln", "post_ln", "skip", "gate", "dropout")
        text += "".join(f" {flag}" for flag in flags if getattr(self, flag))
        return f"{text} on {self.device_type} ({self.arch})"


class CompacterProblem(NamedTuple):
    """One pass of the Compacter adapter. ``dtype`` is x's, the one that is computed in."""

    op: str  # "compacter_fwd" | "compacter_bwd"
    device_type: str
    arch: str
    dtype: torch.dtype
    param_dtypes: tuple[torch.dtype, ...]
    tokens: int
    features: int
    bottleneck: int
    phm_dim: int
    ranks: tuple[int, int]  # of the down and the up projection
    activation: str
    pre_ln: bool
    post_ln: bool
    skip: bool
    gate: bool
    dropout: bool

    @property
    def family(self) -> str:
        """The module of a backend that has this operation."""
        return "compacter"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{self.op} {dtype} T={self.tokens} d={self.features} m={self.bottleneck} n={self.phm_dim} "
        text += f"r={'+'.join(map(str, self.ranks))} {self.activation}"
        flags = ("pre_ln", "post_ln", "skip", "gate", "dropout")
        text += "".join(f" {flag}" for flag in flags if getattr(self, flag))
        return f"{text} on {self.device_type} ({self.arch})"


class FusionProblem(NamedTuple):
    """One pass of AdapterFusion in the bottleneck space. ``dtype`` is x's, the one that is computed in."""

    op: str  # "adapter_fusion_fwd" | "adapter_fusion_bwd"
    device_type: str
    arch: str
    dtype: torch.dtype
    param_dtypes: tuple[torch.dtype, ...]
    tokens: int
    features: int
    widths: tuple[int, ...]  # the bottlenecks of the adapters
    activation: str
    query: bool  # it comes from elsewhere than the adapters' input
    pre_ln: bool
    post_ln: bool
    skip: bool
    dropout: bool

    @property
    def family(self) -> str:
        """The module of a backend that has this operation."""
        return "fusion"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        widths = "+".join(map(str, self.widths))
        text = f"{self.op} {dtype} T={self.tokens} d={self.features} m={widths} {self.activation}"
        flags = ("query", "pre_ln", "post_ln", "skip", "dropout")
        text += "".join(f" {flag}" for flag in flags if getattr(self, flag))
        return f"{text} on {self.device_type} ({self.arch})"


class MultiLoRAProblem(NamedTuple):
    """One pass of batched multi-LoRA over projections that share x. ``dtype`` is x's, the one that is computed in."""

    op: str  # "multi_lora_fwd" | "multi_lora_bwd"
    device_type: str
    arch: str
    dtype: torch.dtype
    adapter_dtypes: tuple[torch.dtype, ...]
    tokens: int
    adapters: int
    in_features: int
    out_features: tuple[int, ...]  # of each projection
    rank: int  # the largest
    row_scale: bool
    dropout: bool

    @property
    def family(self) -> str:
        """The module of a backend that has this operation."""
        return "multi_lora"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        out = "+".join(map(str, self.out_features))
        text = f"{self.op} {dtype} T={self.tokens} L={self.adapters} in={self.in_features} out={out} r<={self.rank}"
        text += "".join(f" {flag}" for flag in ("row_scale", "dropout") if getattr(self, flag))
        return f"{text} on {self.device_type} ({self.arch})"


class MultiBottleneckProblem(NamedTuple):
    """One pass of batched bottleneck adapters. ``dtype`` is x's, the one that is computed in."""

    op: str  # "multi_bottleneck_fwd" | "multi_bottleneck_bwd"
    device_type: str
    arch: str
    dtype: torch.dtype
    adapter_dtypes: tuple[torch.dtype, ...]
    tokens: int
    adapters: int
    features: int
    bottleneck: int  # the largest
    activation: str
    post_ln: bool
    residual: bool
    gate: bool
    dropout: bool

    @property
    def family(self) -> str:
        """The module of a backend that has this operation."""
        return "multi_bottleneck"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{self.op} {dtype} T={self.tokens} L={self.adapters} d={self.features} m<={self.bottleneck}"
        text += f" {self.activation}"
        flags = ("post_ln", "residual", "gate", "dropout")
        text += "".join(f" {flag}" for flag in flags if getattr(self, flag))
        return f"{text} on {self.device_type} ({self.arch})"


class MultiElementwiseProblem(NamedTuple):
    """One pass of products and sums by element of which every token names its own. ``dtype`` is x's."""

    op: str  # "multi_elementwise_fwd" | "multi_elementwise_bwd"
    device_type: str
    arch: str
    dtype: torch.dtype
    tokens: int
    adapters: int
    features: int
    scaled: bool

    @property
    def family(self) -> str:
        """The module of a backend that has this operation."""
        return "multi_elementwise"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{self.op} {dtype} T={self.tokens} L={self.adapters} features={self.features}"
        text += " scaled" if self.scaled else ""
        return f"{text} on {self.device_type} ({self.arch})"


class DeltaProblem(NamedTuple):
    """One pass over the elements of a weight that is made of a frozen one. ``dtype`` is the frozen weight's."""

    op: str  # "diff_pruning_fwd" | "diff_pruning_bwd" | "masking_fwd" | "masking_bwd"
    device_type: str
    arch: str
    dtype: torch.dtype
    out_dtype: torch.dtype
    elements: int

    @property
    def family(self) -> str:
        """The module of a backend that has this operation."""
        return "delta"

    def __str__(self) -> str:
        dtype, out = (str(d).removeprefix("torch.") for d in (self.dtype, self.out_dtype))
        text = f"{self.op} {dtype} of {self.elements} elements"
        text += "" if dtype == out else f" as {out}"
        return f"{text} on {self.device_type} ({self.arch})"


FEW_KEYS = 1 << 17
"""Elements of the keys: csrc/README.md says how it was measured."""


class PrefixProblem(NamedTuple):
    """Attention over a prefix and a sequence. ``dtype`` is the query's, the one that is computed in."""

    op: str  # "prefix_attention"
    device_type: str
    arch: str
    dtype: torch.dtype
    batch: int
    heads: int
    queries: int
    keys: int
    prefix: int
    head_dim: int
    mask: bool
    is_causal: bool

    @property
    def family(self) -> str:
        """The module of a backend that has this operation."""
        return "prefix"

    @property
    def few_keys(self) -> bool:
        """Whether concatenating keys and values costs less than folding the prefix into the result."""
        return self.batch * self.heads * self.keys * self.head_dim < FEW_KEYS

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{self.op} {dtype} B={self.batch} H={self.heads} L={self.queries} S={self.keys} P={self.prefix}"
        text += f" D={self.head_dim}"
        text += "".join(f" {flag}" for flag in ("mask", "is_causal") if getattr(self, flag))
        return f"{text} on {self.device_type} ({self.arch})"


@lru_cache(maxsize=64)
def arch_of(device_type: str, index: int | None) -> str:
    """The architecture of a device: "sm_90" for a GPU, torch's CPU capability in lower case for a CPU."""
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability(index)
        return f"sm_{major}{minor}"
    if device_type == "cpu":
        return torch.backends.cpu.get_cpu_capability().lower()
    return device_type
