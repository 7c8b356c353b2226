"""Speed laid over a built agent: kernels for the CPU, CUDA graphs for a GPU. train.py knows nothing of this file.

`speed_up` replaces layers by ones that compute the same in less time. They hold the very parameters of the layers that
they replace, so that optimizers and state dicts don't notice. Shapes: the legend is in train.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actor import Actor
from image_codec import Decoder
from networks import Head, low_precision
from rssm import RSSM
from train import Dreamer, Policy


def speed_up(agent: Dreamer | Policy) -> None:
    """Replace the agent's slow parts by fast ones for the device that it is on. Call this once, when it is built.

    On CUDA, a Dreamer's updates are replayed as graphs if `config.cuda_graphs` says so.
    """
    if isinstance(agent, Policy):
        swap_layers(agent.rssm, agent)
        return
    swap_layers(agent.world_model.rssm, agent.world_model, agent.behavior)
    swap_layers(agent.averaged.rssm, agent.averaged)
    if agent.device.type == "cuda" and agent.config.cuda_graphs:
        use_cuda_graphs(agent)


def swap_layers(rssm: RSSM, *roots: nn.Module) -> None:
    """Replace layers below `roots`: those that read the features of `rssm`, and the decoder's."""
    on_cpu = rssm.img_in.weight.device.type == "cpu"
    for module in [module for root in roots for module in root.modules()]:
        if isinstance(module, Decoder):
            swap_decoder_layers(module, on_cpu)
        elif on_cpu and 0 < rssm.classes <= OneHotLinear.MAX_CLASSES:
            swap_feature_layer(module, rssm.stoch, rssm.classes)


def swap_decoder_layers(decoder: Decoder, on_cpu: bool) -> None:
    """Replace the first transposed convolution; on a CPU, also the others."""
    decoder.conv[0] = DenseConvTranspose(decoder.conv[0])
    if on_cpu:
        for i, conv in enumerate(decoder.conv[1:], start=1):
            even = conv.get_parameter("weight").shape[-1] % 2 == 0
            decoder.conv[i] = PhasedConvTranspose(conv) if even else BiasedConvTranspose(conv)


def swap_feature_layer(module: nn.Module, groups: int, classes: int) -> None:
    """Replace the layer with which `module` reads features, if it does."""
    if isinstance(module, RSSM):
        module.add_module("img_in", OneHotLinear(module.img_in, groups, classes))
    elif isinstance(module, Head | Actor) and len(module.mlp.dense):
        module.mlp.dense[0] = OneHotLinear(module.mlp.dense[0], groups, classes)


class Overlay(nn.Module):
    """A layer in place of a plain one, whose very parameters it holds."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.register_parameter("weight", plain.get_parameter("weight"))
        self.register_parameter("bias", plain.get_parameter("bias"))


class OneHotLinear(Overlay):
    """Dense layer (N, inputs) -> (N, units) for a CPU, whose inputs begin with `groups` one-hot groups of `classes`.

    The RSSM's features do. A group may also be all zeros, as in the RSSM's initial state.
    """

    MAX_CLASSES = 255  # bfloat16 counts no further
    FEW = 10_000  # rows times classes, below which the product takes less time

    def __init__(self, plain: nn.Module, groups: int, classes: int):
        super().__init__(plain)
        self.groups, self.classes = groups, classes

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs) -> (N, units)."""
        if len(x) * self.classes < self.FEW:
            return F.linear(x, self.weight, self.bias)
        return _OneHotProduct.apply(*map(low_precision, (x, self.weight, self.bias)), self.groups, self.classes)


class _OneHotProduct(torch.autograd.Function):
    """`F.linear`. In forward, the product with a one-hot group is a row of the weight.

    To look these rows up and to sum them takes a quarter of the time of the product. Backward is that of any layer,
    as every class of a group gets a gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, classes: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        size = groups * classes
        number = torch.arange(1.0, classes + 1).unsqueeze(1)
        number = torch.kron(torch.eye(groups), number).to(x.dtype)  # (size, groups): one product for all groups
        index = (x[:, :size] @ number).round().long()  # 1 .. classes; 0: all zeros
        row = (index + classes * torch.arange(groups)) * (index > 0)
        table = torch.cat([weight.new_zeros(1, len(weight)), weight[:, :size].t()])
        return F.linear(x[:, size:], weight[:, size:], bias).add_(F.embedding_bag(row, table, mode="sum"))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x = grad @ weight if need_x else None
        grad_weight = grad.t() @ x if need_weight else None
        return grad_x, grad_weight, grad.sum(0) if need_bias else None, None, None


class DenseConvTranspose(Overlay):
    """On a 1 x 1 map, a transposed convolution is a dense layer: (N, C, 1, 1) -> (N, D, k, k)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, 1, 1) -> (N, D, k, k)."""
        k = self.weight.shape[-1]
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (C, k * k * D), the memory order
        out = torch.addmm(self.bias.repeat(k * k), x.flatten(1), weight)
        return out.unflatten(1, (k, k, -1)).permute(0, 3, 1, 2)


class BiasedConvTranspose(Overlay):
    """Transposed convolution of stride 2 that adds its bias afterwards: inside, that takes five times as long."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D, 2 H - 2 + k, 2 W - 2 + k)."""
        out = F.conv_transpose2d(x, self.weight, stride=2)
        return out.add_(self.bias.to(out.dtype)[:, None, None])


class PhasedConvTranspose(Overlay):
    """Transposed convolution of stride 2 with a kernel of an even size: (N, C, H, W) -> (N, D, 2 H - 2 + k, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, D, 2 H - 2 + k, 2 W - 2 + k)."""
        return _Phases.apply(*map(low_precision, (x, self.weight, self.bias)))


class _Phases(torch.autograd.Function):
    """Transposed convolution of stride 2, forward as one ordinary convolution with four times the output channels.

    Output pixels of the same parity in both axes see the same part of the kernel: each of the four phases is a
    stride-1 convolution with a quarter of it, and interleaving them gives the image. That way forward takes a third
    of the time; backward doesn't, and stays that of the transposed convolution.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x (N, C, H, W), weight (C, D, k, k), bias (D,) -> (N, D, 2 H - 2 + k, 2 W - 2 + k)."""
        ctx.save_for_backward(x, weight)
        channels, out_channels, size, _ = weight.shape
        half = size // 2
        quarters = weight.view(channels, out_channels, half, 2, half, 2).permute(3, 5, 1, 0, 2, 4)
        kernel = quarters.reshape(-1, channels, half, half).flip(2, 3).contiguous(memory_format=torch.channels_last)
        phases = F.conv2d(x, kernel, bias.repeat(4), padding=half - 1)
        n, _, rows, columns = phases.shape
        shape = n, out_channels, 2 * rows, 2 * columns
        image = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        pairs = image.permute(0, 2, 3, 1).view(n, rows, 2, columns, 2, out_channels)
        pairs.copy_(phases.permute(0, 2, 3, 1).unflatten(3, (2, 2, out_channels)).permute(0, 1, 3, 2, 4, 5))
        return image

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        strides, none, ones = [2, 2], [0, 0], [1, 1]
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, strides, none, ones, True, none, 1, [True, True, False]
        )
        # Summed over whole rows of pixels first: a sum over few channels at a time takes sixteen times as long.
        grad_bias = grad.permute(0, 2, 3, 1).flatten(2).sum((0, 1)).unflatten(0, (grad.shape[3], -1)).sum(0)
        return grad_x, grad_weight, grad_bias


class CaptureError(RuntimeError):
    """Why an update could not be captured as CUDA graphs, in one line."""


def use_cuda_graphs(agent: Dreamer) -> None:
    """Replay the two halves of an update as CUDA graphs from now on."""
    behavior_params = agent.actor_optimizer.params + agent.value_optimizer.params
    halves = {"model_gradients": agent.model_optimizer.params, "behavior_gradients": behavior_params}
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    for name, params in halves.items():
        setattr(agent, name, Graphed(getattr(agent, name), params, stream, pool))


class Graphed:
    """A function that leaves gradients, replayed as one CUDA graph after a few ordinary calls.

    An update is thousands of kernels that take longer to launch than to run; a graph launches them together. The
    function takes tensors and named tuples of tensors. It must do the same on the same shapes at every call and never
    wait for the device. What a call returns, and the gradients it leaves, are overwritten by the next one.

    Args:
        function, params: what is replayed, and the parameters that it leaves gradients in.
        stream: on which warm-up and capture run, as torch asks for: a side stream.
        pool: memory that is shared by graphs which are replayed in turn.
    """

    WARMUP = 3  # calls, in which libraries choose their algorithms and allocate their workspaces

    def __init__(self, function: Callable[..., Any], params: list[nn.Parameter], stream: Any = None, pool: Any = None):
        self.function, self.params, self.stream, self.pool = function, params, stream, pool
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor | tuple[Tensor, ...]) -> Any:
        """What the function returns for these inputs."""
        self.calls += 1
        if self.calls <= self.WARMUP:
            return self._warm_up(inputs)
        if self.graph is None:
            self.graph = self._capture(inputs)
        for ours, given in zip(_tensors(self.inputs), _tensors(inputs), strict=True):
            ours.copy_(given)
        self.graph.replay()
        for param, gradient in zip(self.params, self.gradients, strict=True):
            param.grad = gradient
        return self.outputs

    def _warm_up(self, inputs: tuple[Any, ...]) -> Any:
        """An ordinary call on the side stream."""
        if self.stream is None:
            return self.function(*inputs)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            outputs = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def _capture(self, inputs: tuple[Any, ...]) -> torch.cuda.CUDAGraph:
        """Record the function's kernels, none of which runs yet. The parameters must have no gradients."""
        self.inputs = tuple(type(x)(*(y.clone() for y in x)) if isinstance(x, tuple) else x.clone() for x in inputs)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                self.outputs = self.function(*self.inputs)
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a capture that has failed raises an error of its own
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None  # without graphs, an update takes as much
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            raise CaptureError(f"CUDA graphs can't be captured here ({reason}): --cuda_graphs false goes on") from error
        self.gradients = [param.grad for param in self.params]
        return graph


def _tensors(inputs: tuple) -> list[Tensor]:
    return [y for x in inputs for y in (x if isinstance(x, tuple) else (x,))]
