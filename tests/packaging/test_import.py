"""``import pelt_fast`` needs torch alone, and loads nothing that costs time."""

from __future__ import annotations

from pathlib import Path

OPTIONAL = ("triton", "transformers", "peft", "adapters", "pelt_fast._C")
BLOCK = f"""
import importlib.abc
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {OPTIONAL!r} or name.startswith({tuple(n + "." for n in OPTIONAL)!r}):
            raise ModuleNotFoundError(f'{{name}} is blocked', name=name)
sys.meta_path.insert(0, Blocker())
"""
USE = """
import torch, pelt_fast
x, w = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8)
a, b = torch.randn(2, 8, requires_grad=True), torch.randn(4, 2, requires_grad=True)
y = pelt_fast.functional.lora_linear(x, w, None, a, b, 2.0, dropout_p=0.5, training=True)
y.sum().backward()
assert x.grad is not None and a.grad is not None and b.grad is not None
report = str(pelt_fast.explain('lora_linear', x, w, None, a, b, 2.0))
assert '-> torch' in report, report
assert 'cpp rejected: ' in report and 'triton rejected: ' in report, report
pelt_fast.nn.LoRALinear(8, 4, r=2)(x)
"""
LOADED = """
import torch
before = set(sys.modules)
import pelt_fast
print(*sorted(set(sys.modules) - before))
"""


def test_works_without_anything_optional(root: Path, python, tmp_path: Path):
    python(BLOCK + USE, root, cwd=tmp_path, fresh=True)


def test_accelerate_without_peft_says_what_is_missing(root: Path, python, tmp_path: Path):
    program = "import torch, pelt_fast\npelt_fast.accelerate(torch.nn.Linear(2, 2))\n"
    result = python(BLOCK + program, root, cwd=tmp_path, ok=False)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode != 0
    assert "peft" in last.lower(), result.stderr


def test_import_loads_itself_and_little_more(root: Path, python, tmp_path: Path):
    """Speed of the import, without a clock: 0.02 s is what the package's own modules take."""
    new = python(LOADED, root, cwd=tmp_path).stdout.split()
    heavy = {"triton", "transformers", "peft", "adapters", "scipy", "matplotlib", "rich", "pytest"}
    assert "pelt_fast" in new
    assert not heavy & {name.split(".")[0] for name in new}
    lazy = ("integrations", "testing", "kernels", "_C", "backends.triton_", "reference")
    assert not [name for name in new if name.startswith(tuple(f"pelt_fast.{n}" for n in lazy))]
    assert len(new) < 120, new
