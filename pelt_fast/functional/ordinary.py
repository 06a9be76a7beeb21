"""The short way of an ordinary call: ``csrc/ordinary.cpp`` checks its arguments and runs it in one step.

A small call is bound by what Python does around the kernel. Where every argument is an ordinary one, and the C++
backend is what would be chosen anyway, nothing of that is needed. For any other call the extension's functions return
None: then the checks in Python name what is wrong, or the call goes its way through autograd, operator and dispatch.
"""

from __future__ import annotations

from typing import Any

import torch

from ..dispatch import asked_for, cpp_extension

_OURS = ("auto", "cpp")


def short_way(asked: str | None) -> Any:
    """The C++ extension; None where another backend is asked for, or the call is being compiled."""
    if torch.compiler.is_compiling():
        return None
    return cpp_extension() if (asked_for() if asked is None else asked) in _OURS else None
