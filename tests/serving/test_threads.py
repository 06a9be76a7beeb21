"""Several threads at once."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from pelt_fast.serving.layer import ServedLinear
from pelt_fast.serving.slots import Slots

from .exact import Adapter, Net, inputs, pool_of
from .soak import Soak


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("requests", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_soak(requests: int):
    soak = Soak(requests)
    soak.run()
    assert soak.failures == []
    assert soak.counts["forward: right"] > requests / 20
    assert sum(soak.counts.values()) == requests
    assert soak.growth < 2**25


def test_a_batch_waits_for_a_load_over_the_same_slot(monkeypatch):
    """The name is there before and after; half of it is never seen."""
    net = Net()
    pool = pool_of(net, slots=1)
    old, new = Adapter(0), Adapter(1)
    pool.load("a", old.state, old.config)
    half, go_on = threading.Event(), threading.Event()
    write = ServedLinear.write

    def slow(layer, *args):
        write(layer, *args)
        if layer is net.block.up:
            half.set()
            assert go_on.wait(60)

    monkeypatch.setattr(ServedLinear, "write", slow)
    x, seen = inputs(1, 2, 0), []

    def read() -> None:
        with torch.inference_mode(), pool.batch(["a"]):
            seen.append(net(x)[0])

    loader = threading.Thread(target=pool.load, args=("a", new.state, new.config))
    loader.start()
    assert half.wait(60)
    reader = threading.Thread(target=read)
    reader.start()
    reader.join(0.05)
    assert seen == []
    with pool.batch([None]):  # others go on
        net(x)
    go_on.set()
    loader.join()
    reader.join()
    assert torch.equal(seen[0], new(net, x[0]))


def test_no_slot_has_two_owners():
    """Bookkeeping alone, as fast as it goes: who reserves or holds a slot has it for himself."""
    slots, owners, wrong = Slots(3), [0] * 3, []

    def work(worker: int) -> None:
        for i in range(400):
            name = "abcde"[(worker + i) % 5]
            try:
                if i % 3:
                    held = slots.hold([name])
                    before = [owners[slot] for slot in held.values()]
                    if before != [owners[slot] for slot in held.values()]:
                        wrong.append("a slot changed under a hold")
                    slots.release(held.values())
                else:
                    reservation = slots.reserve(name, 0.01)
                    owners[reservation.slot] = me = worker * 1000 + i
                    if i % 2:
                        slots.commit(reservation, False)
                    elif owners[reservation.slot] != me:
                        wrong.append("a slot has two writers")
                    else:
                        slots.abandon(reservation)
            except (KeyError, RuntimeError):
                pass

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert all(found.in_use == 0 for found in slots.residents().values())
    slots.close()
