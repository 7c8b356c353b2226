import math

import pytest
import torch
from torch.nn import functional as F

from image_codec import Decoder, Encoder

FEAT_SIZE = 11


@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_shapes_and_leading_axes(size, channels):
    """All sizes and numbers of cameras work, and leading axes only arrange independent images."""
    torch.manual_seed(0)
    encoder, decoder = Encoder(size, channels, 4), Decoder(FEAT_SIZE, size, channels, 4)
    image, feat = torch.rand(2, 3, channels, size, size) - 0.5, torch.randn(2, 3, FEAT_SIZE)
    embed, dist = encoder(image), decoder(feat)
    assert embed.shape == (2, 3, encoder.embed_size)
    assert dist.mean.shape == image.shape and dist.log_prob(image).shape == (2, 3)
    assert torch.allclose(embed[1, 2], encoder(image[1, 2]), atol=1e-5)
    assert torch.allclose(dist.mean[1, 2], decoder(feat[1, 2]).mean, atol=1e-5)


def test_preprocess():
    """At first, pixels become floats from -0.5 to 0.5, as the author's."""
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).repeat(2, 5, 3, 32, 11)[..., :32]
    floats = Encoder(32, 3, 4).preprocess(image)
    assert floats.shape == image.shape and floats.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert floats[1, 4, 2, 0, :3].tolist() == pytest.approx([-0.5, -0.3, 0.5])


def test_whitening():
    """After it, images have no mean picture, the variance that they had, and colors that vary alike in each camera."""
    torch.manual_seed(0)
    gray = torch.randint(0, 200, (4, 8, 2, 1, 32, 32))
    image = (gray + torch.randint(0, 40, (4, 8, 2, 3, 32, 32))).flatten(2, 3).to(torch.uint8)
    encoder = Encoder(32, 6, 4, whiten=True)
    before = encoder.preprocess(image).sub(image.float().mean((0, 1)) / 255 - 0.5)
    encoder.normalize(image)
    after = encoder.preprocess(image)
    assert after.mean((0, 1)).abs().max() < 1e-5
    assert float(after.square().mean()) == pytest.approx(float(before.square().mean()), rel=1e-3)

    def spread(x: torch.Tensor) -> float:
        colors = x.unflatten(2, (2, 3)).movedim(3, -1).reshape(-1, 3)
        variance = torch.linalg.eigvalsh(colors.T @ colors)
        return float(variance[-1] / variance[0])

    assert spread(after) < 6 and spread(before) > 50, "these colors vary less than COLOR_FLOOR and stay the fainter"
    assert torch.allclose(encoder.picture(after), image / 255, atol=1e-5)


def test_mean_picture_alone():
    """Without whitening, the mean picture is subtracted and colors stay as they are."""
    torch.manual_seed(0)
    image = torch.randint(0, 256, (4, 8, 6, 32, 32), dtype=torch.uint8)
    encoder = Encoder(32, 6, 4)
    encoder.normalize(image)
    assert torch.allclose(encoder.preprocess(image), image / 255 - (image / 255).mean((0, 1)), atol=1e-6)


def test_whitening_of_a_still_picture():
    """Images that are all the same have nothing to whiten, and no NaN comes of it."""
    encoder = Encoder(32, 3, 4, whiten=True)
    image = torch.full((2, 2, 3, 32, 32), 7, dtype=torch.uint8)
    encoder.normalize(image)
    assert encoder.preprocess(image).abs().max() < 1e-6
    assert torch.allclose(encoder.mix, torch.eye(3))  # later pictures are neither enlarged nor mixed
    assert torch.allclose(encoder.picture(torch.zeros(1, 3, 32, 32)), torch.full((1, 3, 32, 32), 7 / 255))


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
