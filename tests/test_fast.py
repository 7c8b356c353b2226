"""fast.py computes what the plain layers compute, and an update is fit for a CUDA graph, as far as a CPU can tell."""

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fast import (
    BiasedConvTranspose,
    CaptureError,
    DenseConvTranspose,
    Graphed,
    OneHotLinear,
    Overlay,
    PhasedConvTranspose,
    speed_up,
    use_cuda_graphs,
)
from tiny import random_batch, seeded, tiny_config, tiny_dreamer


@pytest.fixture(autouse=True)
def rows_are_looked_up(monkeypatch):
    """Of the few rows of a small test too."""
    monkeypatch.setattr(OneHotLinear, "FEW", 0)


PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]

# overlays


def outputs_and_gradients(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """What a layer computes in that precision: its output, and gradients by its input and its parameters."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x)
    assert y.dtype == dtype
    weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y, *torch.autograd.grad((y.float() * weighting).sum(), (x, *layer.parameters()))]


def assert_equal(
    overlay: Callable[[nn.Module], nn.Module], plain: nn.Module, x: Tensor, dtype: torch.dtype, tolerance: float
) -> None:
    """The overlay of a layer with random parameters has its outputs and gradients."""
    nn.init.normal_(plain.get_parameter("bias"))
    x.requires_grad_()
    for ours, theirs in zip(
        outputs_and_gradients(overlay(plain), x, dtype), outputs_and_gradients(plain, x, dtype), strict=True
    ):
        scale = theirs.float().abs().max().item()
        assert torch.allclose(ours.float(), theirs.float(), atol=tolerance * scale, rtol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("groups, classes, rest", [(4, 5, 7), (4, 5, 0), (3, OneHotLinear.MAX_CLASSES, 7)])
@pytest.mark.parametrize("few", [0, 10_000])
def test_a_one_hot_layer_is_an_ordinary_layer(groups, classes, rest, dtype, tolerance, few, monkeypatch):
    """Looked up instead of multiplied, one-hot groups give the same outputs and gradients; so do groups of zeros."""
    monkeypatch.setattr(OneHotLinear, "FEW", few)  # beside the fixture's: few rows are multiplied
    torch.manual_seed(0)
    onehot = F.one_hot(torch.randint(classes, (40, groups)), classes).float()
    onehot[0], onehot[1, -1] = 0, 0
    x = torch.cat([onehot.flatten(1), torch.randn(40, rest)], 1)
    plain = nn.Linear(x.shape[1], 6)
    assert_equal(lambda plain: OneHotLinear(plain, groups, classes), plain, x, dtype, tolerance)


def test_a_frozen_one_hot_layer_passes_gradients_on():
    """Imagination freezes the world model; the actor's gradients go through it."""
    layer = OneHotLinear(nn.Linear(15, 6), 3, 5).requires_grad_(False)
    x = F.one_hot(torch.arange(12).view(4, 3) % 5, 5).float().flatten(1).requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(4, 15))


def test_a_one_hot_layer_takes_samples_that_are_rounded():
    """A straight-through sample may be a one that misses 1 by a rounding: it still means its class."""
    layer = OneHotLinear(nn.Linear(15, 6), 3, 5)
    x = F.one_hot(torch.arange(12).view(4, 3) % 5, 5).float().flatten(1)
    assert torch.allclose(layer(x * (1 - 2**-23)), layer(x), atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize(
    "overlay, kernel, side",
    [
        (DenseConvTranspose, 5, 1),
        (BiasedConvTranspose, 5, 5),
        (PhasedConvTranspose, 6, 13),
        (PhasedConvTranspose, 2, 3),
    ],
)
def test_a_decoder_layer_is_a_transposed_convolution(overlay, kernel, side, dtype, tolerance):
    """Each overlay of the decoder has the outputs and gradients of nn.ConvTranspose2d."""
    torch.manual_seed(0)
    x = torch.randn(4, 8, side, side).contiguous(memory_format=torch.channels_last)
    plain = nn.ConvTranspose2d(8, 6, kernel, stride=2).to(memory_format=torch.channels_last)
    assert_equal(overlay, plain, x, dtype, tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(image_size=128, batch_size=2, batch_length=3),
        dict(decode_fraction=0.5, imagine_starts=7, discount_head=False),
        dict(actor_grad="both", classes=0),
        dict(stoch=2, classes=300),
        dict(reward_layers=0, discount_layers=0, actor_layers=0, value_layers=0),
    ],
    ids=["standard", "128px", "cpu", "gaussian", "300 classes", "no layers"],
)
def test_a_sped_up_update_is_the_plain_one(changes):
    """Metrics and weights after an update are the same with the overlay, up to rounding, and so are the draws."""
    config, found = tiny_config(**changes), []
    for overlay in (False, True):
        agent = tiny_dreamer(config)
        if overlay:
            speed_up(agent)
        metrics = agent.train_step(random_batch(config))
        weights = torch.cat([p.flatten() for root in (agent.world_model, agent.behavior) for p in root.parameters()])
        found.append((metrics, weights, torch.get_rng_state()))
    (plain, plain_weights, plain_rng), (fast, fast_weights, fast_rng) = found
    assert plain.keys() == fast.keys() and torch.equal(plain_rng, fast_rng)
    for name, value in plain.items():
        assert fast[name].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name
    assert torch.allclose(fast_weights, plain_weights, atol=1e-5)


def test_speeding_up_keeps_parameters_and_names():
    """Optimizers and saved states don't notice: the same parameters under the same names, and no random draw."""
    agent = tiny_dreamer(tiny_config())
    modules = agent.world_model, agent.behavior, agent.policy, agent.averaged
    before, draws = [dict(module.named_parameters()) for module in modules], torch.get_rng_state()
    keys = [list(module.state_dict()) for module in modules]
    speed_up(agent)
    assert torch.equal(torch.get_rng_state(), draws)
    for module, named, names in zip(modules, before, keys, strict=True):
        assert list(module.state_dict()) == names
        assert [(name, id(p)) for name, p in module.named_parameters()] == [(n, id(p)) for n, p in named.items()]


@pytest.mark.parametrize("classes, one_hot", [(4, 6), (255, 6), (0, 0), (256, 0)])
def test_layers_that_are_swapped(classes, one_hot):
    """All decoder layers, and the layers that read one-hot features: RSSM, reward, discount, actor and two values."""
    agent = tiny_dreamer(tiny_config(stoch=2, classes=classes))
    speed_up(agent)
    layers = [layer for root in (agent.world_model, agent.behavior) for layer in root.modules()]
    assert sum(isinstance(layer, OneHotLinear) for layer in layers) == one_hot
    assert all(isinstance(conv, Overlay) for conv in agent.world_model.decoder.conv)
    assert isinstance(agent.averaged.actor.mlp.dense[0], OneHotLinear) == (one_hot > 0)
    assert (agent.policy.actor.mlp.dense[0] in layers) and not isinstance(agent.model_gradients, Graphed)


def test_a_sped_up_policy_acts_as_the_plain_one():
    """A policy without its Dreamer can be sped up too: same names, and actions equal up to rounding."""
    config = tiny_config()
    plain = tiny_dreamer(config).policy
    fast = copy.deepcopy(plain)
    speed_up(fast)
    assert isinstance(fast.actor.mlp.dense[0], OneHotLinear) and [*fast.state_dict()] == [*plain.state_dict()]
    images, state, other = random_batch(config).image, None, None
    for t in range(4):
        is_first = torch.full((4,), t == 0)
        action, state = plain(images[t], state, is_first, seeded(t), deterministic=True)
        same, other = fast(images[t], other, is_first, seeded(t), deterministic=True)
        assert torch.allclose(action, same, atol=1e-5)


# an update as a CUDA graph

# Operations whose result the host must know before it can go on.
SYNCHRONIZING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")


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
        dict(actor_grad="both", classes=0),
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
        assert [name for name, _ in operations.seen if any(word in name for word in SYNCHRONIZING)] == []


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
        self.overwritten: list[tuple[torch.Tensor, torch.Tensor]] = []  # with what was there before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info and argument.alias_info.is_write:
                self.overwritten.append((value, value.clone()))
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
    """CUDA's graphs played by `Kernels`, whose captures leave random numbers and buffers as they were."""

    @contextlib.contextmanager
    def capture(kernels: Kernels, pool: str, stream: None):
        assert pool == "the one pool" and stream is None
        generator = torch.get_rng_state()
        with kernels:
            yield
        for value, before in reversed(kernels.overwritten):
            value.data.copy_(before)
        torch.set_rng_state(generator)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Kernels)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the one pool")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)


@pytest.mark.parametrize(
    "changes",
    [
        dict(target_every=2),
        dict(decode_fraction=0.5, imagine_starts=7, discount_head=False),
        dict(actor_grad="both", classes=0),
        dict(actor_grad="reinforce", reward_norm=True),
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
            use_cuda_graphs(agent)
        metrics = [
            {name: value.clone() for name, value in agent.train_step(random_batch(config, seed)).items()}
            for seed in range(6)
        ]
        found.append((agent.world_model.state_dict(), agent.behavior.state_dict(), metrics, torch.get_rng_state()))
    assert isinstance(agent.model_gradients.graph, Kernels) and len(agent.model_gradients.graph.calls) > 500
    for plain, graphed in zip(tree_leaves(found[0]), tree_leaves(found[1]), strict=True):
        assert torch.equal(plain, graphed)


def refused(monkeypatch, error: Exception, ends_badly: bool) -> Exception:
    """What training raises if CUDA answers to the first capture with this error, and maybe to its end with another."""

    @contextlib.contextmanager
    def refuse(*_, **__):
        try:
            raise error
        finally:
            if ends_badly:
                raise RuntimeError("operation failed due to a previous error during capture")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    config = tiny_config()
    agent = tiny_dreamer(config)
    use_cuda_graphs(agent)
    with pytest.raises(RuntimeError) as raised:
        for seed in range(5):
            agent.train_step(random_batch(config, seed))
    assert agent.updates == Graphed.WARMUP
    return raised.value


@pytest.mark.parametrize("ends_badly", [False, True])
def test_a_capture_that_fails_ends_in_one_line_that_names_the_way_out(ends_badly, fake_graphs, monkeypatch):
    """Whatever CUDA says about it."""
    error = refused(monkeypatch, RuntimeError("operation not permitted when stream is capturing\nmore"), ends_badly)
    assert isinstance(error, CaptureError)
    assert "not permitted" in str(error) and "--cuda_graphs false" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("ends_badly", [False, True])
def test_graphs_are_not_blamed_for_a_full_gpu(ends_badly, fake_graphs, monkeypatch):
    """Without them an update takes as much memory."""
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    assert refused(monkeypatch, full, ends_badly) is full
