"""The environment variables of the C++ backend, in a process of its own: they are read at import."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import torch, pelt_fast
from pelt_fast.backends import cpp
weight = torch.ones(6, 8)
x, a, b = torch.ones(3, 8), torch.ones(2, 8), torch.ones(6, 2)
y = pelt_fast.functional.lora_linear(x, weight, None, a, b, 1.0, backend="cpp")
print(cpp.isa(), cpp.packed_bytes() > 0, (y == 8 + 16).all().item())
"""


@pytest.mark.parametrize(
    ("isa", "limit", "expected"),
    [
        ("default", "0", "default False True"),
        ("", "1", "{best} True True"),
        ("amx", "1", "{best} True True"),
    ],
)
def test_instruction_set_and_limit(isa, limit, expected, cpp, interpreters):
    environ = {**os.environ, "PELT_FAST_CPU_ISA": isa, "PELT_FAST_PACK_LIMIT_MB": limit}
    done = interpreters(CODE, ROOT, cwd=ROOT, env=environ)
    assert done.stdout.strip() == expected.format(best=cpp.available_isas()[-1]), done.stderr
