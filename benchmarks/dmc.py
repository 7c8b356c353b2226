"""Trains on tasks of the DeepMind Control Suite, the author's own benchmark.

    pip install dm_control==1.0.34
    python benchmarks/dmc.py walker_walk --seed 1

The flags after the task are those of run.py; the preset is `paper` unless they say otherwise.
Returns are to be compared with the author's, scores/dmc-vision-dreamerv2.json of github.com/danijar/dreamerv2: means of
the training episodes of each 30,000 control steps. It wants a GPU: an update of `paper` takes 29 ms on an H100.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("MUJOCO_GL", "egl")  # read when dm_control is imported; its first choice needs a display
import gymnasium
import numpy as np
from dm_control import suite

sys.path.insert(0, str(Path(__file__).parent.parent))
import run

CAMERAS = {"quadruped": 2}  # of each domain, the author's; others have 0


class ControlSuite(gymnasium.Env[np.ndarray, np.ndarray]):
    """A task by its name, such as `walker_walk`: images (3, size, size), rewards in [0, 1] a control step."""

    metadata = {"render_modes": ["rgb_array"], "gripper": False, "moves": 0}

    def __init__(self, name: str, *, image_size: int, action_repeat: int, episode_steps: int, seed: int, **_: Any):
        domain, task = name.split("_", 1) if not name.startswith("ball_in_cup") else ("ball_in_cup", "catch")
        self.render_mode = "rgb_array"
        self.environment = suite.load(domain, task, task_kwargs={"random": seed})
        self.camera, self.size = CAMERAS.get(domain, 0), image_size
        self.repeat, self.length, self.steps = action_repeat, episode_steps, 0
        spec = self.environment.action_spec()
        if not (np.all(spec.minimum == -1) and np.all(spec.maximum == 1)):
            raise ValueError(f"{name}: actions are not in [-1, 1]")
        self.action_space = gymnasium.spaces.Box(-1, 1, spec.shape, np.float32)
        self.observation_space = gymnasium.spaces.Box(0, 255, (3, image_size, image_size), np.uint8)
        self.np_random = np.random.default_rng(seed)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """A new episode, drawn from `np_random` alone."""
        super().reset(seed=seed, options=options)
        self.environment.task.random.seed(int(self.np_random.integers(2**32)))
        self.environment.reset()
        self.steps = 0
        return self._image(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Apply an action `action_repeat` times; the reward is the sum."""
        reward = 0.0
        for _ in range(self.repeat):
            reward += self.environment.step(action).reward or 0.0
            self.steps += 1
        return self._image(), reward, False, self.steps >= self.length, {}

    def render(self) -> np.ndarray:
        """The picture for videos, uint8 (256, 256, 3)."""
        return self.environment.physics.render(256, 256, camera_id=self.camera)

    def _image(self) -> np.ndarray:
        return np.moveaxis(self.environment.physics.render(self.size, self.size, camera_id=self.camera), -1, 0).copy()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python benchmarks/dmc.py DOMAIN_TASK [flags of run.py], for example walker_walk --seed 1")
    name, *flags = sys.argv[1:]
    argv = ["--preset", "paper", "--task", name, "--episode_steps", "1000", "--eval_every", "100000", *flags]
    sys.exit(run.main(argv, make_env=functools.partial(ControlSuite, name)))
