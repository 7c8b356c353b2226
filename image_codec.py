"""Convolutional encoder and decoder of the world model (DreamerV2, appendix, after Ha & Schmidhuber).

Both build themselves for square images of 64 px (the author's layers), 32 px (one layer less) or 128 px (one more) with
three channels for each camera. Inside, convolutions run in the channels-last memory format, in which CPUs and GPUs are
fastest. Shapes: the legend is in train.py. Networks see images as `Encoder.preprocess` makes them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import UnitNormal, init_weights

ENCODER_KERNELS = {32: (4, 4, 4), 64: (4, 4, 4, 4), 128: (4, 4, 4, 4, 4)}
DECODER_KERNELS = {
    32: (5, 6, 6),  # sides 1-5-14-32
    64: (5, 5, 6, 6),  # 1-5-13-30-64
    128: (5, 5, 5, 6, 6),  # 1-5-13-29-62-128
}
COLOR_FLOOR = 0.01  # added to a color's variance, of pixels in [0, 1], before whitening: much less is noise


class Encoder(nn.Module):
    """image (..., C, H, W) -> embed (..., E): stride-2 convolutions without padding, doubling the channels."""

    mean: Tensor  # (C, H, W), what is subtracted from pixels in [0, 1]: the author's 0.5 until `normalize`
    mix: Tensor  # (C, C), what the channels are then multiplied by if they are whitened: the identity until `normalize`

    def __init__(self, size: int, channels: int, depth: int, whiten: bool = False):
        super().__init__()
        self.shape, self.whiten = (channels, size, size), whiten
        widths = [channels] + [depth * 2**i for i in range(len(ENCODER_KERNELS[size]))]
        self.conv = nn.ModuleList(
            nn.Conv2d(a, b, k, stride=2) for a, b, k in zip(widths[:-1], widths[1:], ENCODER_KERNELS[size], strict=True)
        )
        self.embed_size = widths[-1] * 2 * 2  # the last map is 2 x 2 for all sizes
        middle = torch.full((1, *self.shape), 0.5).contiguous(memory_format=torch.channels_last)[0]
        self.register_buffer("mean", middle)
        if whiten:
            self.register_buffer("mix", torch.eye(channels))
        self.apply(init_weights)
        nn.utils.convert_conv2d_weight_memory_format(self, torch.channels_last)

    @torch.no_grad()
    def normalize(self, image: Tensor) -> None:
        """From now on, subtract the mean picture of these uint8 images (T, B, C, H, W), and whiten if asked to.

        In robots' scenes nearly all variance is that of brightness: what tells a red cube from a green one is a
        hundredth of it. Whitened, colors vary about as much. The total variance stays, so that the image loss keeps its
        weight among the losses.
        """
        pixels = image.float() / 255
        self.mean.copy_(pixels.mean((0, 1)))
        if self.whiten:
            colors = (pixels - self.mean).unflatten(2, (-1, 3)).movedim(3, -1).reshape(-1, 3)
            variance, axes = torch.linalg.eigh((colors.T @ colors / len(colors)).cpu())
            gain = (variance + COLOR_FLOOR).rsqrt()
            # Where all is one color, the variance is 0, and the channels stay as they are.
            total, whitened = variance.sum(), (variance * gain.square()).sum()
            gain = gain * (total.clamp(min=1e-8 * COLOR_FLOOR) / whitened.clamp(min=1e-8)).sqrt()
            self.mix.copy_(torch.block_diag(*[axes * gain @ axes.T] * (self.shape[0] // 3)))

    def preprocess(self, image: Tensor) -> Tensor:
        """uint8 images (..., C, H, W) -> float32, normalized; the one place where pixels become floats.

        Here they also take the channels-last order in memory, while a pixel is still a byte: no later step copies them.
        """
        flat = image.reshape(-1, *self.shape).contiguous(memory_format=torch.channels_last)
        floats = flat.float().div_(255).sub_(self.mean)
        return (self._mixed(floats, self.mix) if self.whiten else floats).reshape(image.shape)

    def picture(self, image: Tensor) -> Tensor:
        """Preprocessed images (..., C, H, W) as pixels in [0, 1]."""
        if self.whiten:
            image = self._mixed(image, torch.linalg.inv(self.mix.cpu()).to(image.device))
        return image + self.mean

    def _mixed(self, image: Tensor, mix: Tensor) -> Tensor:
        """Channels of (..., C, H, W) multiplied by (C, C), in float32."""
        with torch.autocast(image.device.type, enabled=False):
            return F.conv2d(image.reshape(-1, *self.shape), mix[:, :, None, None]).reshape(image.shape)

    def forward(self, image: Tensor) -> Tensor:
        """Preprocessed images (..., C, H, W) -> (..., E)."""
        assert image.shape[-3:] == self.shape, (image.shape, self.shape)
        x = image.reshape(-1, *self.shape).contiguous(memory_format=torch.channels_last)
        for conv in self.conv:
            x = F.elu(conv(x), inplace=True)
        x = x.permute(0, 2, 3, 1).flatten(1)  # (N, E) in (H, W, C) order, which is the memory order: no copy
        return x.reshape(*image.shape[:-3], self.embed_size)


class Decoder(nn.Module):
    """feat (..., F) -> Normal over preprocessed images (..., C, H, W) with unit variance."""

    def __init__(self, feat_size: int, size: int, channels: int, depth: int):
        super().__init__()
        self.shape = (channels, size, size)
        kernels = DECODER_KERNELS[size]
        start = 32 * depth * max(size // 64, 1)
        widths = [start] + [depth * 2**i for i in reversed(range(len(kernels) - 1))] + [channels]
        self.dense = nn.Linear(feat_size, start)
        self.conv = nn.ModuleList(
            nn.ConvTranspose2d(a, b, k, stride=2) for a, b, k in zip(widths[:-1], widths[1:], kernels, strict=True)
        )
        self.apply(init_weights)
        nn.utils.convert_conv2d_weight_memory_format(self, torch.channels_last)

    def forward(self, feat: Tensor) -> UnitNormal:
        """(..., F) -> distribution over preprocessed images (..., C, H, W)."""
        x = self.dense(feat.reshape(-1, feat.shape[-1]))[:, :, None, None]  # no activation here, as the author has it
        for conv in self.conv[:-1]:
            x = F.elu(conv(x), inplace=True)
        mean = self.conv[-1](x)
        return UnitNormal(mean.reshape(*feat.shape[:-1], *self.shape), event_dims=3)
