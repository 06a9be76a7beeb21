"""``python -m pelt_fast``."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

import pelt_fast
from pelt_fast.__main__ import main


def test_info_says_what_decides_about_a_kernel(capsys: pytest.CaptureFixture[str]):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"pelt_fast {pelt_fast.__version__}\n")
    assert f"torch {torch.__version__}" in text
    for title in ("versions", "devices", "build", "environment", "backends"):
        assert f"\n{title}:\n  " in text
    for dtype in ("float32", "bfloat16", "float16"):
        assert re.search(rf"lora_linear_fwd {dtype} .* -> \w+", text)
        assert re.search(rf"lora_linear_bwd {dtype} .* -> \w+", text)
    assert "-> none" not in text


def test_info_gives_the_reasons(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("PELT_FAST_TEST_VARIABLE", "7")
    main(["info"])
    text = capsys.readouterr().out
    assert "PELT_FAST_TEST_VARIABLE=7" in text
    assert re.search(r"triton rejected in 12 of 12: .+", text) or torch.cuda.is_available()


def test_info_works_where_nothing_was_built(root: Path, python, tmp_path: Path):
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    shutil.copytree(root / "pelt_fast", tmp_path / "pelt_fast", ignore=ignore)
    program = (
        "sys.argv[1:] = ['info']\nimport runpy\nrunpy.run_module('pelt_fast', run_name='__main__')"
    )
    text = python(program, tmp_path, cwd=tmp_path).stdout
    assert "never built" in text
    assert "extension: not loaded: " in text
    assert re.search(r"cpp rejected in 12 of 12: .+", text)


def test_bench_outside_a_checkout_says_how(root: Path, python, tmp_path: Path):
    shutil.copytree(root / "pelt_fast", tmp_path / "pelt_fast")
    program = (
        "sys.argv[1:] = ['bench']\nimport runpy\nrunpy.run_module('pelt_fast', run_name='__main__')"
    )
    result = python(program, tmp_path, cwd=tmp_path, ok=False)
    assert result.returncode == 2
    assert "make bench" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["infos"], ["info", "--verbose"]])
def test_what_it_does_not_know_is_a_usage_error(arguments: list[str], capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: python -m pelt_fast" in capsys.readouterr().err
