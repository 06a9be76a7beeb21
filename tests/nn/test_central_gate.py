"""``nn.CentralGate``, and a layer whose LoRA, adapter and prefix share it, against its formula written out."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pelt_fast import MultiAdapterPlan
from pelt_fast import functional as PF
from pelt_fast.nn import CentralGate

B, T, D, HEADS, P, R, M = 3, 5, 8, 2, 4, 3, 6
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def layer_of_ours(x, g, p):
    """As docs/unipelt.md has it: (x Wᵀ + gated LoRA, a gated adapter, attention over a gated prefix)."""
    plan = MultiAdapterPlan(torch.zeros(B * T, dtype=torch.int64), 1)
    a, b = p["a"][None], p["b"][None]
    lora = PF.multi_lora(
        *(x, a, b, plan, 2.0), base_out=F.linear(x, p["w"]), row_scale=g[:, :1, None]
    )
    adapter = PF.bottleneck_adapter(
        x, p["down"], None, p["up"], None, gate=g[:, 1:2, None], residual=x
    )
    states = x.view(B, T, HEADS, -1).transpose(1, 2)
    prefix = PF.prefix_attention(states, states, states, p["k"], p["v"], gate=g[:, 2:])
    return lora, adapter, prefix


def layer_as_written(x, g, p):
    one, two, three = (g[:, k].view(B, 1, 1) for k in range(3))
    lora = x @ p["w"].T + one * 2.0 * (x @ p["a"].T @ p["b"].T)
    adapter = x + two * (torch.relu(x @ p["down"].T) @ p["up"].T)
    states = x.view(B, T, HEADS, -1).transpose(1, 2)
    keys, values = (
        torch.cat([three[..., None] * p[n].expand(B, -1, -1, -1), states], 2) for n in "kv"
    )
    scores = states @ keys.mT / (D // HEADS) ** 0.5
    return lora, adapter, torch.softmax(scores, -1) @ values


@pytest.mark.parametrize("compat", ["unipelt", "paper"])
def test_a_layer_with_it(compat):
    torch.manual_seed(0)
    gate = CentralGate(D, compat=compat).double()
    x = normal(B, T, D)
    with torch.no_grad():
        gate.gate.weight.copy_(normal(3, D))
    shapes = {"w": (D, D), "a": (R, D), "b": (D, R), "down": (M, D), "up": (D, M)}
    shapes |= {"k": (1, HEADS, P, D // HEADS), "v": (1, HEADS, P, D // HEADS)}
    parameters = {name: normal(*shape).requires_grad_() for name, shape in shapes.items()}
    trained = [x.requires_grad_(), *gate.parameters(), *parameters.values()]

    weight, bias = gate.gate.weight, gate.gate.bias
    mask = MASK if compat == "paper" else torch.ones_like(MASK)
    scores = torch.relu(x @ weight.T + bias) * mask[..., None]
    expected_gate = torch.softmax(scores.sum(1) / mask.sum(1, keepdim=True), -1)
    torch.testing.assert_close(gate(x, MASK), expected_gate)
    assert torch.allclose(gate(x, MASK).sum(1), torch.ones(B, dtype=torch.float64))

    ours = layer_of_ours(x, gate(x, MASK), parameters)
    theirs = layer_as_written(x, expected_gate, parameters)
    torch.testing.assert_close(ours, theirs)
    dy = [normal(*t.shape) for t in theirs]
    torch.testing.assert_close(
        torch.autograd.grad(ours, trained, dy), torch.autograd.grad(theirs, trained, dy)
    )


def test_errors():
    with pytest.raises(ValueError, match="compat is 'adapters'; expected 'unipelt' or 'paper'"):
        CentralGate(D, compat="adapters")
    with pytest.raises(ValueError, match="attention_mask is None; expected"):
        CentralGate(D, compat="paper")(torch.randn(B, T, D))


def test_the_document_s_snippets_run():
    text = (Path(__file__).parents[2] / "docs" / "unipelt.md").read_text()
    snippets = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert snippets
    for snippet in snippets:
        if "adapters" in snippet:
            pytest.importorskip("adapters")
        exec(compile(snippet, "docs/unipelt.md", "exec"), {})
