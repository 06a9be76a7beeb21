"""PELT_FAST_* is read once, and a value that means nothing is an error, not a default."""

import os
from pathlib import Path

import pytest

from pelt_fast.env import Env


def test_defaults():
    assert Env.parse({}) == Env(
        backend="auto", strict=False, triton_cpu=False, cpu_isa=None, pack_limit_mb=4096
    )


def test_values():
    parsed = Env.parse(
        {
            "PELT_FAST_BACKEND": " Torch ",
            "PELT_FAST_STRICT": "1",
            "PELT_FAST_TRITON_CPU": "yes",
            "PELT_FAST_CPU_ISA": "AVX2",
            "PELT_FAST_PACK_LIMIT_MB": "0",
            "PELT_FAST_POOL_LIMIT_MB": "7",
        }
    )
    assert parsed == Env("torch", True, True, "avx2", 0, 7)


def test_empty_means_unset():
    names = ("BACKEND", "STRICT", "TRITON_CPU", "CPU_ISA", "PACK_LIMIT_MB", "POOL_LIMIT_MB")
    assert Env.parse({f"PELT_FAST_{name}": "" for name in names}) == Env()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("PELT_FAST_BACKEND", "cudnn", "auto, reference, torch, cpp, triton, cuda"),
        ("PELT_FAST_STRICT", "maybe", "0 or 1"),
        ("PELT_FAST_TRITON_CPU", "2", "0 or 1"),
        ("PELT_FAST_CPU_ISA", "sse9", "default, avx2, avx512, amx"),
        ("PELT_FAST_PACK_LIMIT_MB", "-1", "a whole number"),
        ("PELT_FAST_PACK_LIMIT_MB", "1.5", "a whole number"),
        ("PELT_FAST_PACK_LIMIT_MB", "lots", "a whole number"),
        ("PELT_FAST_PACK_LIMIT_MB", str(2**43), f"0 to {2**43 - 1}"),
        ("PELT_FAST_POOL_LIMIT_MB", "some", "a whole number"),
    ],
)
def test_nonsense_names_the_variable_the_value_and_what_is_allowed(name, value, expected):
    with pytest.raises(ValueError, match=name) as raised:
        Env.parse({name: value})
    assert value in str(raised.value)
    assert expected in str(raised.value)


def test_variable_reaches_a_call(interpreters):
    code = (
        "import torch, pelt_fast; t = torch.ones;"
        "print(pelt_fast.explain('lora_linear', t(3, 8), t(6, 8), None, t(2, 8), t(6, 2), 1.0).backends)"
    )
    environ = {**os.environ, "PELT_FAST_BACKEND": "reference"}
    root = Path(__file__).resolve().parents[2]
    done = interpreters(code, root, cwd=root, env=environ)
    assert done.stdout.strip() == "('reference', 'reference')", done.stderr
