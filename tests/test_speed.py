"""What keeps an update fast on a GPU, checked as far as a CPU can: no wait for the device, no shape that varies."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiny import random_batch, tiny_config, tiny_dreamer

# Operations whose result the host must know before it can go on.
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")


class Operations(TorchDispatchMode):
    """Records each operation with the shapes of its results."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = result if isinstance(result, tuple | list) else [result]
        self.seen.append((str(function), [tuple(x.shape) for x in tensors if isinstance(x, torch.Tensor)]))
        return result


@pytest.fixture(
    params=[
        dict(),
        dict(decode_fraction=0.5, imagine_starts=7, return_norm=True, discount_head=False),
        dict(actor_grad="both", actor_dist="tanh_normal", classes=0),
    ],
    ids=["standard", "cpu", "gaussian"],
)
def updates(request) -> list[Operations]:
    """The operations of two later updates on different data."""
    config = tiny_config(target_every=1, **request.param)
    agent = tiny_dreamer(config)
    recorded = []
    for seed in range(4):
        batch = random_batch(config, seed)
        with Operations() as operations:
            agent.train_step(batch)
        recorded.append(operations)
    return recorded[2:]


def test_an_update_never_waits_for_the_device(updates):
    """No operation of an update hands a number to the host."""
    for operations in updates:
        assert len(operations.seen) > 500
        assert [name for name, _ in operations.seen if any(word in name for word in SYNCHRONISING)] == []


def test_an_update_allocates_nothing_whose_shape_varies(updates):
    """Two updates on different data are the same operations on the same shapes, as a CUDA graph needs it."""
    first, second = (operations.seen for operations in updates)
    assert first == second


def test_the_recorder_notices_a_wait():
    """Reading a number off a tensor is seen: the check above can fail."""
    with Operations() as operations:
        torch.ones(3).sum().item()
    assert any("_local_scalar_dense" in name for name, _ in operations.seen)


class Kernels(TorchDispatchMode):
    """Stands in for a CUDA graph: keeps the operations of a capture with their tensors, and runs them again.

    Unlike a real capture it also computes while it records, as a CPU knows no other way.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def fake_graphs(monkeypatch):
    """CUDA's graphs played by `Kernels`, whose captures leave the random numbers as they were."""

    @contextlib.contextmanager
    def capture(kernels: Kernels):
        generator = torch.get_rng_state()
        with kernels:
            yield
        torch.set_rng_state(generator)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Kernels)
    monkeypatch.setattr(torch.cuda, "graph", capture)


@pytest.mark.parametrize(
    "changes",
    [
        dict(target_every=2),
        dict(decode_fraction=0.5, imagine_starts=7, discount_head=False),
        dict(actor_grad="both", actor_dist="tanh_normal", classes=0),
        dict(actor_grad="reinforce"),
    ],
    ids=["standard", "cpu", "gaussian", "reinforce"],
)
def test_replaying_an_updates_kernels_equals_the_update(changes, fake_graphs):
    """Six updates as graphs leave the same weights, metrics and random numbers as six ordinary ones."""
    config = tiny_config(**changes)
    found = []
    for graphs in (False, True):
        agent = tiny_dreamer(config)
        if graphs:
            agent.use_graphs()
        metrics = [
            {name: value.clone() for name, value in agent.train_step(random_batch(config, seed)).items()}
            for seed in range(6)
        ]
        found.append((agent.world_model.state_dict(), agent.behavior.state_dict(), metrics, torch.get_rng_state()))
    assert isinstance(agent._learn_model.graph, Kernels) and len(agent._learn_model.graph.calls) > 500
    for plain, graphed in zip(tree_leaves(found[0]), tree_leaves(found[1]), strict=True):
        assert torch.equal(plain, graphed)
