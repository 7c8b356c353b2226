"""Env steps per second of `make_env` against plain `robosuite.make`.

    python benchmarks/env.py --steps 200 --cameras agentview robot0_eye_in_hand

A step is a control step of the robot with a picture from each camera; resets are included. Both play random
actions at the same cameras, resolution, rate and episode length, in turns. The plain one has RoboSuite's
defaults: hard resets and its renderer. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # else `import env` would find this file
from env import make_env  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="env steps of each of the two in a round")
    parser.add_argument("--rounds", type=int, default=3, help="the medians are taken over these")
    parser.add_argument("--task", default="Lift")
    parser.add_argument("--robot", default="Panda")
    parser.add_argument("--controller", default="OSC_POSE")
    parser.add_argument("--cameras", nargs="+", default=["agentview", "robot0_eye_in_hand"])
    parser.add_argument("--image_size", type=int, default=64, help="pixels")
    parser.add_argument("--control_freq", type=float, default=20, help="Hz")
    parser.add_argument("--episode_steps", type=int, default=200)
    return parser.parse_args()


def main() -> None:
    """Play both in turns and print their rates."""
    arguments = parse_arguments()
    (ours, close_ours), (plain, close_plain) = build_ours(arguments), build_plain(arguments)
    for play in (ours, plain):
        play(5)  # compiles the controllers' numba code
    rates: dict[str, list[float]] = {"make_env": [], "robosuite.make": []}
    for round_number in range(1, arguments.rounds + 1):
        for name, play in (("make_env", ours), ("robosuite.make", plain)):
            start = time.perf_counter()
            play(arguments.steps)
            rates[name].append(arguments.steps / (time.perf_counter() - start))
        latest = ", ".join(f"{name} {values[-1]:.1f}/s" for name, values in rates.items())
        print(f"round {round_number}: {latest}", flush=True)
    close_plain()
    close_ours()
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    ratio = round(medians["make_env"] / medians["robosuite.make"], 2)
    result = {"env_steps_per_second": medians, "ratio": ratio, "cpus": os.cpu_count()}
    print(json.dumps(result | vars(arguments)))


def build_ours(arguments: argparse.Namespace) -> tuple[Callable[[int], None], Callable[[], None]]:
    """A function that plays so many steps, each episode begun by a reset, and one that closes the environment."""
    environment = make_env(
        task=arguments.task,
        robot=arguments.robot,
        controller=arguments.controller,
        cameras=tuple(arguments.cameras),
        image_size=arguments.image_size,
        control_freq=arguments.control_freq,
        action_repeat=1,
        episode_steps=arguments.episode_steps,
        reward_shaping=True,
        seed=0,
    )
    size = len(environment.action_space.sample())
    return player(environment, size, arguments.episode_steps), environment.close


def build_plain(arguments: argparse.Namespace) -> tuple[Callable[[int], None], Callable[[], None]]:
    """The same with RoboSuite alone; after `make_env`, which sets up rendering before importing it."""
    import robosuite
    from robosuite.controllers import load_composite_controller_config, load_part_controller_config

    config = load_composite_controller_config(robot=arguments.robot)
    if config["body_parts"]["right"]["type"] != arguments.controller:
        part = load_part_controller_config(default_controller=arguments.controller)
        config["body_parts"]["right"] = part | {"gripper": {"type": "GRIP"}}
    environment = robosuite.make(
        arguments.task,
        robots=arguments.robot,
        controller_configs=config,
        has_renderer=False,
        has_offscreen_renderer=True,
        use_camera_obs=True,
        camera_names=list(arguments.cameras),
        camera_heights=arguments.image_size,
        camera_widths=arguments.image_size,
        control_freq=arguments.control_freq,
        horizon=arguments.episode_steps,
        reward_shaping=True,
    )
    return player(environment, environment.action_dim, arguments.episode_steps), environment.close


def player(environment: Any, action_size: int, episode_steps: int) -> Callable[[int], None]:
    """A function that plays so many steps of random actions."""
    rng = np.random.default_rng(0)

    def play(steps: int) -> None:
        for step in range(steps):
            if step % episode_steps == 0:
                environment.reset()  # makes plain RoboSuite's new OpenGL context the current one
            environment.step(rng.uniform(-1, 1, action_size))

    return play


if __name__ == "__main__":
    main()
