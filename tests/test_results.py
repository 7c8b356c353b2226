"""What is published in results/: every curve is whole, and the shipped policy does what the README says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import run
from checkpoint import load_policy
from env import make_env

RESULTS = Path(__file__).parent.parent / "results"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_result_is_whole(path):
    """A run's file says how it was made, and its curve goes on in steps and hours."""
    result = json.loads(path.read_text())
    assert {"task", "preset", "changed", "seed", "commit", "hardware", "hours", "episode_steps", "notes"} <= set(result)
    for name in ("env_step", "hours"):
        values = [point[name] for point in result["curve"]]
        assert values == sorted(values)
    for point in result["curve"]:
        assert 0 <= point["success_rate"] <= 1 and point["episodes"] >= 10
        assert 0 <= point["return_mean"] <= result["episode_steps"]


def test_the_shipped_policy_acts():
    """It loads without running code, and gives actions for the images of its own configuration."""
    policy, config = load_policy(RESULTS / "lift_cpu_policy.pt")
    image = np.zeros((3 * len(config.cameras), config.image_size, config.image_size), np.uint8)
    action, state = policy.step(image)
    again, _ = policy.step(image, state)
    assert config.task == "Lift" and action.shape == again.shape == (7,)
    assert (np.abs(action) <= 1).all()


@pytest.mark.slow
def test_the_shipped_policy_lifts():
    """On RoboSuite, 20 episodes: success of at least 80 %, a return of at least 0.8 a step (the README has more)."""
    policy, config = load_policy(RESULTS / "lift_cpu_policy.pt")
    options = run.eval_options(config)
    env = make_env(**options)
    summary = run.evaluate(policy, env, 20, config.action_repeat, torch.device("cpu"), film=False).summary()
    env.close()
    print(f"\n{run.describe(summary)}")
    assert summary["eval/success_rate"] >= 0.8 and summary["eval/return_mean"] >= 0.8 * options["episode_steps"]
