"""``nn.AdapterFusion`` against the adapters library's own modules: keys, initial weights, values, gradients."""

import pytest
import torch
from torch import nn

from pelt_fast.nn import AdapterFusion, BottleneckAdapter

D, N = 24, 3


def adapters_of(**flags):
    torch.manual_seed(0)
    flags = {"activation": "gelu", "original_ln_before": True, **flags}
    found = nn.ModuleList(BottleneckAdapter(D, m, **flags) for m in (8, 3, 5))
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.3)
    return found.double()


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"value": False},
        {"query_before_ln": True},
        {"residual_before": True},
        {"temperature": True},
        {"query": False, "key": False},
    ],
    ids=str,
)
def test_is_the_librarys(flags):
    pytest.importorskip("adapters")
    from adapters import DynamicAdapterFusionConfig
    from adapters.methods.modeling import BertFusion

    torch.manual_seed(1)
    library = BertFusion(DynamicAdapterFusionConfig(**flags), D, 0.0)
    torch.manual_seed(1)
    fusion = AdapterFusion(D, **flags)
    assert {k for k in library.state_dict() if not k.startswith("dense")} == set(
        fusion.state_dict()
    )
    if "value.weight" in fusion.state_dict():
        assert torch.equal(library.value.weight, fusion.value.weight)
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.3)
    library.load_state_dict(fusion.state_dict())
    fusion, library = fusion.double(), library.double()

    adapters, norm = adapters_of(), nn.LayerNorm(D).double()
    o, x = torch.randn(2, 4, 9, D, dtype=torch.float64).requires_grad_()
    for _ in range(3):  # the temperature falls
        y, p = fusion(adapters, o, x, norm, output_attentions=True)
        h = norm(o + x)
        ups = [a.adapter_up(a.non_linearity(a.adapter_down[0](h))) for a in adapters]
        values = torch.stack(ups).permute(1, 2, 0, 3)
        query = o if flags.get("query_before_ln") else h
        wanted, attention = library(query, values, values.clone(), o, output_attentions=True)
        if flags.get("residual_before"):
            # the library adds in place to what are its keys too
            torch.testing.assert_close(p.sum(-1), torch.ones_like(p[..., 0]))
            continue
        torch.testing.assert_close(y, norm(wanted + x))
        torch.testing.assert_close(p, torch.tensor(attention))
    assert fusion.T == library.T


def test_gradients_go_where_they_are_wanted():
    adapters, fusion = adapters_of(), AdapterFusion(D, dropout=0.3).double()
    adapters.requires_grad_(False)
    o, x = torch.randn(2, 4, 9, D, dtype=torch.float64)
    fusion(adapters, o, x, nn.LayerNorm(D).double()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fusion.parameters())
    assert all(p.grad is None for p in adapters.parameters())
    fusion.eval()
    y = fusion(list(adapters), o, x, nn.LayerNorm(D).double())
    assert torch.equal(y, fusion(list(adapters), o, x, nn.LayerNorm(D).double()))


@pytest.mark.parametrize(
    ("adapters", "error", "message"),
    [
        ([], ValueError, "adapters is"),
        ([nn.Linear(D, D)], TypeError, r"adapters\[0\] is a Linear"),
        ([BottleneckAdapter(D, 3, ln_before=True)], ValueError, "has ln_before"),
        (
            [BottleneckAdapter(D, 3), BottleneckAdapter(D, 3, activation="tanh")],
            ValueError,
            r"adapters\[1\] has the activation 'tanh'",
        ),
    ],
)
def test_adapters_that_do_not_go_together(adapters, error, message):
    with pytest.raises(error, match=message):
        AdapterFusion(D)(adapters, torch.randn(2, D), torch.randn(2, D))
    with pytest.raises(ValueError, match="input_size is 0"):
        AdapterFusion(0)
