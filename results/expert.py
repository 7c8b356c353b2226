"""A scripted expert for RoboSuite's Lift: the return that a policy can hope for.

    python results/expert.py                     20 episodes of 500 control steps: mean return, spread and success
    python results/expert.py --action_repeat 1   the same with a decision in every control step

The script reads the true positions of hand and cube from the simulator, so it is a yardstick and no competitor. It
acts through `make_env` with OSC_POSE at 20 Hz, whole steps of the hand and rotation_scale 0.02.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from env import make_env  # noqa: E402

STEPS = 500  # control steps an episode, as in RoboSuite's benchmark
REACH = 0.05  # meters that a command of 1 moves the hand's goal in a control step
ABOVE = 0.05  # meters over the cube, where the hand waits until it is aligned
ALIGNED = 0.02  # meters beside the cube's center at which the hand may go down
CLOSE_ENOUGH = 0.012  # meters from the cube's center at which the fingers close
CLOSING = 6  # control steps until the fingers hold the cube
LIFT = 0.15  # meters from the grasp up to where the hand stops
OPEN, CLOSED = -1.0, 1.0

Vector = NDArray[np.float64]


class Expert:
    """Open, above, down, close, up. One object plays one episode."""

    def __init__(self, action_repeat: int) -> None:
        """`action_repeat` is the number of control steps for which an action holds."""
        self.action_repeat = action_repeat
        self.closing = 0  # control steps since the fingers began to close; 0 while they are open
        self.top = np.zeros(3)  # where the hand goes once it holds the cube

    def action(self, hand: Vector, cube: Vector) -> Vector:
        """The action (7,) for the positions (3,) of the point between the fingers and of the cube, in meters."""
        if self.closing == 0 and np.linalg.norm(hand - cube) < CLOSE_ENOUGH:
            self.top = cube + np.array([0, 0, LIFT])
            self.closing = 1
        if self.closing == 0:
            aligned = np.linalg.norm((hand - cube)[:2]) < ALIGNED
            goal = cube if aligned else cube + np.array([0, 0, ABOVE])
        else:
            goal = cube if self.closing < CLOSING else self.top
            self.closing += self.action_repeat
        move = np.clip((goal - hand) / REACH, -1, 1)
        return np.array([*move, 0, 0, 0, CLOSED if self.closing else OPEN])


def positions(env: Any) -> tuple[Vector, Vector]:
    """The positions (3,) of the point between the fingers and of the cube, which no agent gets to see."""
    task = env.unwrapped._task  # private, since a policy must not look behind the pictures
    hand = task.sim.data.site_xpos[task.robots[0].eef_site_id["right"]]
    return hand.copy(), task.sim.data.body_xpos[task.cube_body_id].copy()


def play(env: Any, action_repeat: int) -> tuple[float, int | None]:
    """The return of one episode, and the control steps until it first succeeded (None if it never did)."""
    env.reset()
    expert, total, steps, solved_after, done = Expert(action_repeat), 0.0, 0, None, False
    while not done:
        _, reward, terminated, truncated, info = env.step(expert.action(*positions(env)))
        total, steps, done = total + reward, steps + action_repeat, terminated or truncated
        if info["success"] and solved_after is None:
            solved_after = steps
    return total, solved_after


def main() -> None:
    """Play the episodes and print what they gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--action_repeat", type=int, default=2, help="control steps for which an action holds")
    parser.add_argument("--rotation_scale", type=float, default=0.02, help="1 is RoboSuite's own")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    env = make_env(
        task="Lift",
        robot="Panda",
        controller="OSC_POSE",
        rotation_scale=args.rotation_scale,
        cameras=("agentview",),
        image_size=64,
        control_freq=20,
        action_repeat=args.action_repeat,
        episode_steps=STEPS,
        reward_shaping=True,
        seed=args.seed,
    )
    episodes = [play(env, args.action_repeat) for _ in range(args.episodes)]
    env.close()
    returns = [total for total, _ in episodes]
    solved = [steps for _, steps in episodes if steps is not None]
    print(f"return {np.mean(returns):.1f} +- {np.std(returns):.1f} of {STEPS} (from {min(returns):.1f} to ", end="")
    print(f"{max(returns):.1f}), success in {len(solved)} of {len(returns)} episodes", end="")
    print(f", first after {np.mean(solved):.1f} control steps" if solved else "")


if __name__ == "__main__":
    main()
