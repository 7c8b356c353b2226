"""Sizes at which an update takes milliseconds, and random data and generators for them."""

import torch
from torch import Tensor

from buffer import Batch
from networks import Draws
from train import PRESETS, Config, Dreamer, Optimizer

ACTION_SIZE = 3

torch.set_num_threads(1)  # threads don't speed up tiny tensors, and wait for each other where cores are shared


def tiny_config(**changes) -> Config:
    """The author's settings but for a discount head, no action repeat, tiny networks and batches, and `changes`."""
    sizes = dict(
        action_repeat=1,
        discount_head=True,
        grad_heads=("decoder", "reward", "discount"),
        batch_size=4,
        batch_length=6,
        cnn_depth=4,
        deter=16,
        hidden=16,
        stoch=4,
        classes=4,
        reward_layers=1,
        reward_units=16,
        discount_layers=1,
        discount_units=16,
        horizon=4,
        actor_layers=1,
        actor_units=16,
        value_layers=1,
        value_units=16,
    )
    return Config(**(PRESETS["paper"] | sizes | changes))


def image_shape(config: Config) -> tuple[int, int, int]:
    return 3 * len(config.cameras), config.image_size, config.image_size


def random_batch(config: Config, seed: int = 0, action_size: int = ACTION_SIZE) -> Batch:
    """Noise of the shapes that the replay hands out, without terminal states."""
    g = torch.Generator().manual_seed(seed)
    size = (config.batch_length, config.batch_size)
    is_first = torch.zeros(size, dtype=torch.bool)
    is_first[0] = True
    return Batch(
        image=torch.randint(0, 256, (*size, *image_shape(config)), dtype=torch.uint8, generator=g),
        action=2 * torch.rand(*size, action_size, generator=g) - 1,
        reward=torch.rand(size, generator=g),
        is_first=is_first,
        is_terminal=torch.zeros(size, dtype=torch.bool),
    )


def tiny_dreamer(config: Config, seed: int = 0, **kwargs) -> Dreamer:
    """An agent for `random_batch` whose weights, and with them the global draws, follow from `seed`."""
    torch.manual_seed(seed)
    return Dreamer(config, image_shape(config), ACTION_SIZE, **kwargs)


def seeded(seed: int = 0) -> Draws:
    """Draws of a generator of their own."""
    return Draws(torch.Generator().manual_seed(seed))


def descend(optimizer: Optimizer, loss: Tensor) -> Tensor:
    """One step down `loss`; returns the gradient's norm."""
    optimizer.backward(loss)
    return optimizer.step()
