"""More elements than 32 bits count: the mask of row 4096 of a (4097, 2²⁰) input."""

import pytest
import torch

from pelt_fast import functional as PF
from pelt_fast.random import keep_threshold, new_seed, philox_words


@pytest.mark.slow
def test_mask_beyond_element_2_to_the_32(cpp):
    tokens, features, p = 4097, 1 << 20, 0.5
    torch.manual_seed(0)
    x = torch.ones(features).expand(tokens, features)  # one row of memory
    a = torch.randn(1, features, requires_grad=True)
    torch.manual_seed(1)
    seed = new_seed(x.device)
    torch.manual_seed(1)
    y = PF.lora_linear(
        x,
        torch.zeros(1, features),
        None,
        a,
        torch.ones(1, 1),
        1.0,
        dropout_p=p,
        training=True,
        backend="cpp",
    )
    first = (tokens - 1) * features
    assert first == 1 << 32
    words = philox_words(torch.arange(first // 4, (first + features) // 4), 0, seed).flatten()
    keep = words >= keep_threshold(p)
    expected = 2 * a.detach()[0].double()[keep].sum().item()
    # the sum of a million numbers, in fp32, is good to a thousandth; another mask is off by a thousand
    assert y[-1].item() == pytest.approx(expected, abs=0.05)
    dy = torch.zeros(tokens, 1)
    dy[-1] = 1
    (da,) = torch.autograd.grad(y, a, dy)
    assert torch.equal(da[0], 2.0 * keep)
