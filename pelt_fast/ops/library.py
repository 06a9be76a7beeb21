"""The one ``torch.library`` namespace, ``pelt_fast``.

``define`` + ``impl`` is the cheap way in (3 µs a call where ``custom_op`` takes 10): a small LoRA is bound by that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch import ORDINARY, cpp_extension

library = torch.library.Library("pelt_fast", "DEF")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers an operator for every device and returns what calls it.

    That is its ``default`` overload, or, where nothing would see the call on its way (no dispatch mode, no transform,
    no subclass, no profiler), what the overload would end up in: the dispatcher takes 10 to 30 µs to return to Python.
    """
    name = schema.partition("(")[0]

    def impl(first: Tensor | list[Tensor], *rest: Any) -> Any:
        # dtypes were settled above: a backend's own operators must not be cast once more
        device_type = (first if isinstance(first, Tensor) else first[0]).device.type
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return run(first, *rest)
        return run(first, *rest)

    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    library.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pelt_fast::{name}", fake, lib=library)
    overload = getattr(torch.ops.pelt_fast, name).default

    def call(*arguments: Any) -> Any:
        ordinary = arguments[-1] == ORDINARY
        if not torch.compiler.is_compiling():
            extension = cpp_extension()
            if extension is not None and extension.is_direct(*arguments):
                if ordinary:
                    return getattr(extension, name)(*arguments[:-1])
                return run(*arguments)
        return overload(*arguments[:-1], "auto") if ordinary else overload(*arguments)

    call.overload = overload  # type: ignore[attr-defined]  # for torch.library.opcheck
    return call
