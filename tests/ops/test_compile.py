"""`torch.compile(fullgraph=True)`, forward and backward, any number of tokens without a new compilation."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pelt_fast import functional as PF
from pelt_fast.testing import oracle
from pelt_fast.testing.workloads import Adapter, Case, LoRAInputs

# Dynamo makes an instance of every autograd function that it traces, and torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

ADAPTERS = {
    "plain": (Adapter(3),),
    "dropout": (Adapter(3, 0.5, 0.3, bias=True), Adapter(8, -1.0)),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_layer(backend, compiler):
    """The layer between operations that a compiler may fuse, plain and compiled."""

    def plain(inputs: LoRAInputs):
        y = PF.lora_linear(
            inputs.x * 2,
            *inputs.args[1:],
            **{**inputs.kwargs, "training": True},
            backend=backend.name,
        )
        return torch.relu(y)

    return plain, torch.compile(plain, fullgraph=True, dynamic=True, backend=compiler)


@pytest.mark.parametrize("adapters", [pytest.param("plain", marks=pytest.mark.slow), "dropout"])
def test_same_results_for_every_number_of_tokens_from_one_graph(adapters, backend, device):
    backend.require(Case("", (2, 3), 24, 40, ADAPTERS[adapters]).make(torch.float32, device))
    counter = CompileCounterWithBackend("aot_eager")
    plain, compiled = compiled_layer(backend, counter)
    compilations = []
    for tokens in (5, 9, 20):  # no size twice: the compiler takes equal sizes for one and the same
        inputs = Case("", (2, tokens), 24, 40, ADAPTERS[adapters]).make(torch.float32, device)
        results = []
        for function in (plain, compiled):
            torch.manual_seed(0)
            results.append(oracle.run(function, inputs))
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), name
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


def test_changed_scaling_is_obeyed(backend, device):
    """Numbers in an operator's arguments are constants to the compiler: a new one compiles anew."""
    inputs = Case("", (6,), 24, 40).make(torch.float32, device)
    backend.require(inputs)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def function(scaling):
        return PF.lora_linear(*inputs.args[:5], scaling, backend=backend.name)

    for scaling in (0.5, 3.0):
        expected = PF.lora_linear(*inputs.args[:5], scaling, backend=backend.name)
        assert torch.equal(function(scaling), expected)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_inductor(adapters, backend, device):
    backend.require(Case("", (6,), 24, 40, ADAPTERS[adapters]).make(torch.float32, device))
    plain, compiled = compiled_layer(backend, "inductor")
    with torch._inductor.config.patch(fallback_random=True):  # torch's own draws, not inductor's
        for tokens in (6, 11):
            inputs = Case("", (tokens,), 24, 40, ADAPTERS[adapters]).make(torch.float32, device)
            results = []
            for function in (plain, compiled):
                torch.manual_seed(0)
                results.append(oracle.run(function, inputs))
            for name, value in results[0].items():
                torch.testing.assert_close(value, results[1][name])
