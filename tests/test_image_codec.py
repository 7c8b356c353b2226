import math

import pytest
import torch
from torch.nn import functional as F

from image_codec import Decoder, Encoder

FEAT_SIZE = 11


@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_shapes_and_leading_axes(size, channels):
    """All sizes and any channels work, and leading axes only arrange independent images."""
    torch.manual_seed(0)
    encoder, decoder = Encoder(size, channels, 4), Decoder(FEAT_SIZE, size, channels, 4)
    image, feat = torch.rand(2, 3, channels, size, size) - 0.5, torch.randn(2, 3, FEAT_SIZE)
    embed, dist = encoder(image), decoder(feat)
    assert embed.shape == (2, 3, encoder.embed_size)
    assert dist.mean.shape == image.shape and dist.log_prob(image).shape == (2, 3)
    assert torch.allclose(embed[1, 2], encoder(image[1, 2]), atol=1e-5)
    assert torch.allclose(dist.mean[1, 2], decoder(feat[1, 2]).mean, atol=1e-5)


@pytest.mark.parametrize("size", [0, 16, 37, 63, 96, 256])
def test_other_sizes_refused(size):
    """A size without layers is refused in a line that names it and the sizes that work."""
    for build in (lambda: Encoder(size, 3, 4), lambda: Decoder(FEAT_SIZE, size, 3, 4)):
        with pytest.raises(ValueError, match=rf"image_size {size} .*32, 64, 128"):
            build()


def test_no_channels_refused():
    """An image without channels is refused."""
    with pytest.raises(ValueError, match="channel"):
        Encoder(64, 0, 4)


def test_preprocess():
    """Pixels become floats from -0.5 to 0.5, or differences from a mean picture."""
    encoder = Encoder(32, 1, 4)
    image = torch.zeros(2, 5, 1, 32, 32, dtype=torch.uint8)
    image[..., 3], image[..., 4] = 51, 255
    assert encoder.preprocess(image)[1, 4, 0, 0, 2:5].tolist() == pytest.approx([-0.5, -0.3, 0.5])
    image[0, ..., 3] = 153
    encoder.center(image)
    assert encoder.preprocess(image)[:, 4, 0, 0, 2:5].flatten().tolist() == pytest.approx([0, 0.2, 0, 0, -0.2, 0])


def test_encoder_refuses_images_of_another_shape():
    """An image of another shape is refused, also where its number of pixels would fit."""
    with pytest.raises(AssertionError):
        Encoder(64, 3, 4)(torch.zeros(2, 64, 64, 3))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_decoder_layer_by_layer(size):
    """The decoder is a dense layer without activation, and transposed convolutions with ELU between them."""
    torch.manual_seed(0)
    decoder, feat = Decoder(FEAT_SIZE, size, 3, 4), torch.randn(5, FEAT_SIZE)
    for p in decoder.parameters():
        torch.nn.init.normal_(p, std=0.1)  # biases too
    x = decoder.dense(feat)[:, :, None, None]
    for i, conv in enumerate(decoder.conv):
        x = F.conv_transpose2d(F.elu(x) if i else x, conv.weight, conv.bias, stride=2)
    assert torch.allclose(decoder(feat).mean, x, atol=1e-5)


def test_image_loss_floor():
    """A perfect 64 x 64 RGB reconstruction still costs the normal's constant, 11291.9 nats."""
    dist = Decoder(FEAT_SIZE, 64, 3, 4)(torch.randn(2, FEAT_SIZE))
    assert torch.allclose(-dist.log_prob(dist.mean), torch.full((2,), 0.5 * math.log(2 * math.pi) * 12288))
