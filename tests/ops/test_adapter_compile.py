"""`torch.compile(fullgraph=True)`, forward and backward, any number of tokens without a new compilation."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from pelt_fast import functional as PF
from pelt_fast.testing import oracle
from pelt_fast.testing.adapter_workloads import EVERYTHING, HOULSBY, PFEIFFER, AdapterCase

# Dynamo makes an instance of every autograd function that it traces, and torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

BLOCKS = {
    "pfeiffer": PFEIFFER,
    "everything": {**EVERYTHING, "gate": "sample"},
    "learned": {**HOULSBY, "scale": "one"},
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def case(block, *shape):
    return AdapterCase("", shape, 24, 8, **BLOCKS[block])


def compiled_layer(backend, compiler):
    """The layer between operations that a compiler may fuse, plain and compiled."""

    def plain(inputs):
        inputs = replace(inputs, x=inputs.x * 2)  # a residual that is x is the same tensor still
        y = PF.bottleneck_adapter(*inputs.args, **inputs.kwargs, backend=backend.name)
        return torch.relu(y)

    return plain, torch.compile(plain, fullgraph=True, dynamic=True, backend=compiler)


@pytest.mark.parametrize(
    "block", [pytest.param(b, marks=[] if b == "everything" else pytest.mark.slow) for b in BLOCKS]
)
def test_same_results_for_every_number_of_tokens_from_one_graph(block, backend, device):
    backend.require(case(block, 2, 3).make(torch.float32, device))
    counter = CompileCounterWithBackend("aot_eager")
    plain, compiled = compiled_layer(backend, counter)
    compilations = []
    for tokens in (5, 9, 20):  # no size twice: the compiler takes equal sizes for one and the same
        inputs = case(block, 2, tokens).make(torch.float32, device)
        results = []
        for function in (plain, compiled):
            torch.manual_seed(0)
            results.append(oracle.run(function, inputs))
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), name
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


@pytest.mark.slow
def test_changed_numbers_are_obeyed(backend, device):
    """Numbers in an operator's arguments are constants to the compiler: a new one compiles anew."""
    inputs = case("pfeiffer", 6).make(torch.float32, device)
    backend.require(inputs)

    def plain(scaling, activation):
        more = {**inputs.kwargs, "scaling": scaling, "activation": activation}
        return PF.bottleneck_adapter(*inputs.args, **more, backend=backend.name)

    compiled = torch.compile(plain, fullgraph=True, dynamic=True, backend="aot_eager")
    for numbers in ((0.5, "relu"), (0.25, "relu"), (3.0, "gelu")):
        assert torch.equal(compiled(*numbers), plain(*numbers))


@pytest.mark.slow
def test_a_callable_activation_compiles(device):
    inputs = case("everything", 2, 5).make(torch.float32, device)

    def plain(leaves):
        more = {**leaves.kwargs, "activation": torch.nn.functional.elu}
        return PF.bottleneck_adapter(*leaves.args, **more)

    compiled = torch.compile(plain, fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    for function in (plain, compiled):
        torch.manual_seed(0)
        results.append(oracle.run(function, inputs))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name])


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_inductor(block, backend, device):
    backend.require(case(block, 2, 3).make(torch.float32, device))
    plain, compiled = compiled_layer(backend, "inductor")
    with torch._inductor.config.patch(fallback_random=True):  # torch's own draws, not inductor's
        for tokens in (6, 11):
            inputs = case(block, 2, tokens).make(torch.float32, device)
            results = []
            for function in (plain, compiled):
                torch.manual_seed(0)
                results.append(oracle.run(function, inputs))
            for name, value in results[0].items():
                torch.testing.assert_close(value, results[1][name])
