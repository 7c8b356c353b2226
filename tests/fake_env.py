"""A small pixel environment with the keywords of `env.make_env`, fast enough for tests of the loops."""

import gymnasium
import numpy as np


class FakeEnv(gymnasium.Env):
    """A bright square that the first two actions push; the reward is its nearness to the middle.

    Everything random comes from `np_random`, so that its state decides all later episodes.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20, "gripper": True}

    def __init__(self, *, cameras, image_size, action_repeat, episode_steps, seed, action_size=4, **_):
        self.render_mode = "rgb_array"
        self.channels, self.size = 3 * len(cameras), image_size
        self.length = episode_steps // action_repeat
        self.observation_space = gymnasium.spaces.Box(0, 255, (self.channels, image_size, image_size), np.uint8)
        self.action_space = gymnasium.spaces.Box(-1, 1, (action_size,), np.float32)
        self.np_random = np.random.default_rng(seed)
        self.position, self.steps = np.zeros(2), 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.steps = self.np_random.uniform(-1, 1, 2), 0
        return self._image(), {"success": False}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, np.float32)), action
        noise = self.np_random.normal(0, 0.01, 2)
        self.position = np.clip(self.position + 0.2 * np.asarray(action[:2]) + noise, -1, 1)
        self.steps += 1
        distance = float(np.abs(self.position).max())
        return self._image(), 1 - distance, False, self.steps >= self.length, {"success": distance < 0.1}

    def render(self):
        return np.moveaxis(self._image()[:3], 0, -1).repeat(4, 0).repeat(4, 1)

    def _image(self):
        image = np.full(self.observation_space.shape, 40, np.uint8)
        row, column = ((self.position + 1) / 2 * (self.size - 9)).astype(int)
        image[:, row : row + 8, column : column + 8] = 220
        return image
