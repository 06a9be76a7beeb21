"""What a PEFT ``adapter_config.json`` says of an adapter, checked: ranks, scalings, and which modules it adapts."""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import patterns

# Where an adapter comes from, how it was trained, how its weights began: none of it changes what it computes.
_SILENT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
}
_READ = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    "init_lora_weights",
}
_REASONS = {
    "use_dora": "DoRA scales by norms of the merged weights",
    "modules_to_save": "modules of the base model would have to be replaced",
    "lora_bias": "the pool adds no biases",
    "trainable_token_indices": "embeddings would have to be replaced",
    "target_parameters": "the pool serves linear modules alone",
    "layer_replication": "the base model would have other layers",
}
# The others (pissa, olora, corda, loftq, lora_ga) change the base weights that all adapters share.
_INITS = (True, False, "gaussian", "eva", "orthogonal", None)
_ENTRIES, _EXPRESSIONS = 10_000, 200
_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


@dataclass(frozen=True)
class AdapterConfig:
    """The part of a config that matters; ``parse`` makes it."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rank_stabilized: bool
    targets: str | frozenset[str]
    excluded: str | frozenset[str]
    layers: frozenset[int] | None
    layers_patterns: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """r of the module's adapter."""
        return _by_pattern(self.ranks, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """alpha / r, or alpha / √r.

        Raises:
            ValueError: it is no finite number in float32.
        """
        rank, alpha = self.rank_of(module), _by_pattern(self.alphas, module, self.alpha)
        scaling = alpha / (math.sqrt(rank) if self.rank_stabilized else rank)
        if not abs(scaling) <= torch.finfo(torch.float32).max:
            raise ValueError(f"the scaling of {module} is {scaling}, which float32 does not hold")
        return scaling

    def is_target(self, module: str, all_linear: Collection[str]) -> bool:
        """Whether PEFT would give this module an adapter; ``all_linear`` is what that keyword means."""
        if self.excluded and matches(self.excluded, module):
            return False
        if isinstance(self.targets, str):
            if self.targets.lower() == "all-linear":
                return module in all_linear
            return patterns.fullmatch(self.targets, module)
        return matches(self.targets, module) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        if self.layers is None:
            return True
        found = None
        if not self.layers_patterns:
            found = _LAYER.match(module)
        for pattern in self.layers_patterns:
            found = re.match(rf"(?:.*?\.)?(?:{pattern})\.(\d+)\.", module)
            if found is not None:
                break
        return found is not None and int(found[1]) in self.layers


def matches(targets: str | Collection[str], module: str) -> bool:
    """PEFT's rule: a string is a pattern of whole names; others are names, or what follows one of their dots."""
    if isinstance(targets, str):
        return patterns.fullmatch(targets, module)
    parts = module.split(".")
    return any(".".join(parts[i:]) in targets for i in range(len(parts)))


def parse(config: Any) -> AdapterConfig:
    """Checks a config: a mapping, or a ``peft.LoraConfig``.

    Raises:
        TypeError: ``config`` is neither.
        ValueError: it is not LoRA, needs what a pool does not have, or makes no sense.
    """
    if not isinstance(config, Mapping) and callable(getattr(config, "to_dict", None)):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(f"config is a {type(config).__name__}; expected a mapping or a LoraConfig")
    kind = config.get("peft_type")
    kind = kind.value if isinstance(kind, enum.Enum) else kind
    if kind != "LORA":
        raise ValueError(f"peft_type is {_short(kind)}; expected 'LORA'")
    for name, value in config.items():
        if name in _SILENT or name in _READ or not _says_something(value):
            continue
        reason = _REASONS.get(str(name), "the pool does not know what it does")
        raise ValueError(f"{name} is {_short(value)}: {reason}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"bias is {_short(config['bias'])}; expected 'none': the pool has none")
    start = config.get("init_lora_weights", True)
    if not any(start is init or start == init for init in _INITS):
        raise ValueError(
            f"init_lora_weights is {_short(start)}, which changes base weights: convert the adapter to plain LoRA"
        )
    ranks = _pattern_table("rank_pattern", config.get("rank_pattern"))
    alphas = _pattern_table("alpha_pattern", config.get("alpha_pattern"))
    stabilized = config.get("use_rslora", False)
    if not isinstance(stabilized, bool):
        raise ValueError(f"use_rslora is {_short(stabilized)}; expected true or false")
    parsed = AdapterConfig(
        _rank("r", config.get("r", 8)),
        _number("lora_alpha", config.get("lora_alpha", 8)),
        {key: _rank(f"rank_pattern[{_short(key)}]", value) for key, value in ranks.items()},
        {key: _number(f"alpha_pattern[{_short(key)}]", value) for key, value in alphas.items()},
        stabilized,
        _names("target_modules", config.get("target_modules")),
        _names("exclude_modules", config.get("exclude_modules") or []),
        _layers(config.get("layers_to_transform")),
        _layer_patterns(config.get("layers_pattern")),
    )
    if not parsed.targets:
        raise ValueError("target_modules is empty; expected names")
    if isinstance(parsed.targets, str) and parsed.layers is not None:
        raise ValueError(
            "layers_to_transform stands beside a pattern; PEFT takes it with names alone"
        )
    return parsed


def _by_pattern(table: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches, as in PEFT."""
    for pattern, value in table.items():
        if patterns.ends_with(pattern, module):
            return value
    return default


def _pattern_table(name: str, table: Any) -> Mapping[str, Any]:
    if table is None:
        return {}
    if not isinstance(table, Mapping) or not all(isinstance(key, str) for key in table):
        raise ValueError(f"{name} is {_short(table)}; expected numbers by pattern")
    if len(table) > _ENTRIES or sum(not patterns.is_plain(key) for key in table) > _EXPRESSIONS:
        raise ValueError(
            f"{name} has {len(table)} entries; expected at most {_ENTRIES}, and {_EXPRESSIONS} with operators"
        )
    for key in table:
        patterns.ends_with(key, "")  # raises here, not when it is needed
    return table


def _names(name: str, value: Any) -> str | frozenset[str]:
    if isinstance(value, str):
        if value.lower() != "all-linear":
            patterns.fullmatch(value, "")
        return value
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(
        isinstance(entry, str) for entry in value
    ):
        raise ValueError(f"{name} is {_short(value)}; expected names of modules or a pattern")
    return frozenset(value)


def _layers(value: Any) -> frozenset[int] | None:
    if value is None or value == []:
        return None
    entries = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in entries):
        raise ValueError(f"layers_to_transform is {_short(value)}; expected integers")
    return frozenset(entries)


def _layer_patterns(value: Any) -> tuple[str, ...]:
    entries = [value] if isinstance(value, str) else value or []
    if not isinstance(entries, (list, tuple)) or len(entries) > _EXPRESSIONS:
        raise ValueError(f"layers_pattern is {_short(value)}; expected a name or a list of them")
    for entry in entries:
        if not isinstance(entry, str) or not patterns.is_plain(entry):
            raise ValueError(f"layers_pattern has {_short(entry)}; expected a plain name")
    return tuple(entry for entry in entries if entry)


def _rank(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ValueError(f"{name} is {_short(value)}; expected an integer of at least 1")
    return value


def _number(name: str, value: Any) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        number = float(value) if good else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is {_short(value)}; expected a finite number")
    return number


def _says_something(value: Any) -> bool:
    try:
        return bool(value)
    except Exception:  # a tensor or an array of several elements, in a mapping of the caller's
        return True


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
