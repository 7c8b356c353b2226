"""Convolutional encoder and decoder of the world model (DreamerV2, appendix, after Ha & Schmidhuber).

Both build themselves for square images of 64 px (the author's layers) or 128 px (one layer more) with any number of
channels. Inside, convolutions run in the channels-last memory format, in which CPUs and GPUs are fastest.
Shapes: image (..., C, H, W) in [-0.5, 0.5], embed (..., E), feat (..., F); leading axes are free.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import UnitNormal, init_weights, low_precision

ENCODER_KERNELS = {64: (4, 4, 4, 4), 128: (4, 4, 4, 4, 4)}
DECODER_KERNELS = {64: (5, 5, 6, 6), 128: (5, 5, 5, 6, 6)}  # sides 1-5-13-30-64 and 1-5-13-29-62-128
IMAGE_SIZES = tuple(ENCODER_KERNELS)


def check_image(size: int, channels: int) -> None:
    if size not in IMAGE_SIZES:
        raise ValueError(f"image_size {size} is not supported: choose one of {', '.join(map(str, IMAGE_SIZES))}")
    if channels < 1:
        raise ValueError(f"an image needs at least one channel, got {channels}")


class Encoder(nn.Module):
    """image (..., C, H, W) -> embed (..., E): stride-2 convolutions without padding, doubling the channels."""

    def __init__(self, size: int, channels: int, depth: int):
        super().__init__()
        check_image(size, channels)
        self.shape = (channels, size, size)
        widths = [channels] + [depth * 2**i for i in range(len(ENCODER_KERNELS[size]))]
        self.conv = nn.ModuleList(
            nn.Conv2d(a, b, k, stride=2) for a, b, k in zip(widths[:-1], widths[1:], ENCODER_KERNELS[size], strict=True)
        )
        self.embed_size = widths[-1] * 2 * 2  # the last map is 2 x 2 for both sizes
        self.apply(init_weights)
        self.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> Tensor:
        assert image.shape[-3:] == self.shape, (image.shape, self.shape)
        x = image.reshape(-1, *self.shape).contiguous(memory_format=torch.channels_last)
        for conv in self.conv:
            x = F.elu(conv(x), inplace=True)
        x = x.permute(0, 2, 3, 1).flatten(1)  # (N, E) in (H, W, C) order, which is the memory order: no copy
        return x.reshape(*image.shape[:-3], self.embed_size)


class Decoder(nn.Module):
    """feat (..., F) -> Normal over images (..., C, H, W) with unit variance."""

    def __init__(self, feat_size: int, size: int, channels: int, depth: int):
        super().__init__()
        check_image(size, channels)
        self.shape = (channels, size, size)
        kernels = DECODER_KERNELS[size]
        self.start = 32 * depth * (size // 64)
        widths = [self.start] + [depth * 2**i for i in reversed(range(len(kernels) - 1))] + [channels]
        self.dense = nn.Linear(feat_size, self.start)
        self.conv = nn.ModuleList(
            nn.ConvTranspose2d(a, b, k, stride=2) for a, b, k in zip(widths[:-1], widths[1:], kernels, strict=True)
        )
        self.apply(init_weights)
        self.to(memory_format=torch.channels_last)

    def forward(self, feat: Tensor) -> UnitNormal:
        x = self.dense(feat.reshape(-1, feat.shape[-1]))  # no activation here, as the author has it
        x = self._first(x)
        for conv in self.conv[1:-1]:
            x = F.elu(_conv_transpose(conv, x), inplace=True)
        mean = _conv_transpose(self.conv[-1], x)
        return UnitNormal(mean.reshape(*feat.shape[:-1], *self.shape), event_dims=3)

    def _first(self, x: Tensor) -> Tensor:
        """On a 1 x 1 map, transposed convolution and ELU are a dense layer: (N, start) -> (N, C, k, k)."""
        conv = self.conv[0]
        k = conv.kernel_size[0]
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # (start, k * k * C), the memory order
        out = F.elu(torch.addmm(conv.bias.repeat(k * k), x, weight), inplace=True)
        return out.unflatten(1, (k, k, -1)).permute(0, 3, 1, 2)


def _conv_transpose(conv: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """`conv(x)`. On a CPU its two parts that torch is slow at are done otherwise, with equal results.

    The bias inside takes five times what it takes outside; and kernels of an even size go as `_Phases`.
    """
    if x.device.type == "cpu" and conv.kernel_size[0] % 2 == 0:
        return _Phases.apply(*map(low_precision, (x, conv.weight, conv.bias)))
    out = F.conv_transpose2d(x, conv.weight, stride=2)
    return out.add_(conv.bias.to(out.dtype)[:, None, None])


class _Phases(torch.autograd.Function):
    """Transposed convolution of stride 2, forward as one ordinary convolution with four times the output channels.

    Output pixels of the same parity in both axes see the same part of the kernel: each of the four phases is a
    stride-1 convolution with a quarter of it, and interleaving them gives the image. That way forward takes a third
    of the time; backward doesn't, and stays that of the transposed convolution.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x (N, C, H, W), weight (C, D, k, k), bias (D,) -> (N, D, 2 H - 2 + k, 2 W - 2 + k)."""
        ctx.save_for_backward(x, weight)
        channels, out_channels, size, _ = weight.shape
        half = size // 2
        quarters = weight.view(channels, out_channels, half, 2, half, 2).permute(3, 5, 1, 0, 2, 4)
        kernel = quarters.reshape(-1, channels, half, half).flip(2, 3).contiguous(memory_format=torch.channels_last)
        phases = F.conv2d(x, kernel, bias.repeat(4), padding=half - 1)
        n, _, rows, columns = phases.shape
        size = n, out_channels, 2 * rows, 2 * columns
        image = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
        pairs = image.permute(0, 2, 3, 1).view(n, rows, 2, columns, 2, out_channels)
        pairs.copy_(phases.permute(0, 2, 3, 1).unflatten(3, (2, 2, out_channels)).permute(0, 1, 3, 2, 4, 5))
        return image

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        strides, none, ones = [2, 2], [0, 0], [1, 1]
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, strides, none, ones, True, none, 1, [True, True, False]
        )
        # Summed over whole rows of pixels first: a sum over few channels at a time takes sixteen times as long.
        grad_bias = grad.permute(0, 2, 3, 1).flatten(2).sum((0, 1)).unflatten(0, (grad.shape[3], -1)).sum(0)
        return grad_x, grad_weight, grad_bias
