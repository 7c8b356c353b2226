"""What the tests of env.py and render.py share: one small Lift, and how its episodes are played and compared."""

import numpy as np

from env import make_env

ARGUMENTS = {
    "task": "Lift",
    "robot": "Panda",
    "controller": "OSC_POSE",
    "cameras": ("agentview", "robot0_eye_in_hand"),
    "image_size": 64,
    "control_freq": 20,
    "action_repeat": 2,
    "episode_steps": 24,
    "reward_shaping": True,
    "seed": 3,
}


def build(**changes):
    return make_env(**ARGUMENTS | changes)


def play(environment, actions_seed):
    """One episode of random actions from the state that np_random has: pictures, rewards, successes, ends."""
    rng = np.random.default_rng(actions_seed)
    image, info = environment.reset()
    images, results, ended = [image], [info["success"]], False
    while not ended:
        action = rng.uniform(-1, 1, environment.action_space.shape).astype(np.float32)
        image, reward, terminated, truncated, info = environment.step(action)
        ended = terminated or truncated
        images.append(image)
        results.append((reward, terminated, truncated, info["success"]))
    return np.stack(images), results


def assert_same_episode(first, second):
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]


def plain_reset(task, seed):
    task.rng = task.placement_initializer.rng = np.random.default_rng(seed)
    task.sim._render_context_offscreen.gl_ctx.make_current()
    return task.reset()


def episode_from_seed(environment, seed, actions_seed):
    environment.np_random = np.random.default_rng(seed)
    return play(environment, actions_seed)
