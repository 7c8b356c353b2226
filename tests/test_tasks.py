"""Every single-arm task of RoboSuite: it builds, steps, begins again as it began, and its images can be trained on."""

import dataclasses

import numpy as np
import pytest

from buffer import ReplayBuffer, Transition
from runtime.cli import defaults
from simulated import build, episode_from_seed
from tiny import tiny_config
from train import Config, Dreamer

TASKS = [
    "Door",
    "Lift",
    "NutAssembly",
    "NutAssemblyRound",
    "NutAssemblySingle",
    "NutAssemblySquare",
    "PickPlace",
    "PickPlaceBread",
    "PickPlaceCan",
    "PickPlaceCereal",
    "PickPlaceMilk",
    "PickPlaceSingle",
    "Stack",
    "ToolHang",
    "Wipe",
]


@pytest.mark.slow
def test_no_task_is_forgotten():
    """The list has what RoboSuite registers for one arm."""
    build().close()  # imports RoboSuite so that it can draw
    from robosuite.environments.base import REGISTERED_ENVS
    from robosuite.environments.manipulation.manipulation_env import ManipulationEnv
    from robosuite.environments.manipulation.two_arm_env import TwoArmEnv

    own = {name: task for name, task in REGISTERED_ENVS.items() if task.__module__.startswith("robosuite.")}
    single = {n for n, t in own.items() if issubclass(t, ManipulationEnv) and not issubclass(t, TwoArmEnv)}
    assert single - {"ManipulationEnv"} == set(TASKS)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_task_can_be_trained(task):
    """Seen by the preset's cameras, an episode from a seed is the same again; rewards and ten updates are finite."""
    cameras = dataclasses.replace(Config(), **defaults(task, "cpu")).cameras
    env = build(task=task, cameras=cameras)
    images, results = episode_from_seed(env, 7, 1)
    again, same = episode_from_seed(env, 7, 1)
    np.testing.assert_array_equal(images, again)
    assert results == same and np.isfinite([reward for reward, *_ in results[1:]]).all()
    assert images.std() > 5
    env.close()

    config = tiny_config(cameras=cameras)
    size = env.action_space.shape[0]
    replay = ReplayBuffer(100, 1, images.shape[1:], size, seed=0)
    replay.add(Transition(images[0], np.zeros(size), 0.0, True, False))
    for image, (reward, terminated, *_) in zip(images[1:], results[1:], strict=True):
        replay.add(Transition(image, env.action_space.sample(), reward, False, terminated))
    agent = Dreamer(config, images.shape[1:], size)
    for _ in range(10):
        metrics = agent.train_step(replay.sample(config.batch_size, config.batch_length))
    assert all(value.isfinite() for value in metrics.values())
