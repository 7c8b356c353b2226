import subprocess
import sys
from pathlib import Path

import pytest
import torch

from faults import difference
from runtime.checkpoint import snapshot
from runtime.device import compare_with_cpu, gradient_deviation
from tiny import random_batch, tiny_config, tiny_dreamer


def test_comparing_gradients_changes_nothing():
    """R31: equal devices deviate by nothing; the agent's state and the global draws stay."""
    config = tiny_config(return_norm=True, decode_fraction=0.5)
    agent = tiny_dreamer(config)
    before, draws = snapshot(agent.state_dict()), torch.get_rng_state()
    deviation, _ = compare_with_cpu(agent, random_batch(config))
    assert deviation == 0.0
    assert difference(snapshot(agent.state_dict()), before) == ""
    assert torch.equal(torch.get_rng_state(), draws)


def test_a_deviation_is_relative_to_the_gradient_and_found_with_its_name():
    """R31: one per mille is the limit; rounding in gradients that cancel is none; a NaN is."""
    reference = {"a": torch.full((4,), 2.0), "b": torch.full((4,), 1e-9)}
    same = gradient_deviation({"a": torch.full((4,), 2.001), "b": torch.full((4,), 1.1e-9)}, reference)
    assert same == (pytest.approx(5e-4, rel=0.01), "a")
    off = gradient_deviation(reference | {"b": torch.full((4,), 0.1)}, reference)
    assert off[0] > 1 and off[1] == "b"
    assert gradient_deviation(reference | {"a": torch.full((4,), float("nan"))}, reference)[0] == float("inf")


def test_triton_is_loaded_before_a_picture_is_drawn(tmp_path):
    """With the torch of PyPI for Linux, an optimizer's first import of Triton crashed once Mesa had drawn."""
    code = """
import sys
import run

def make_env(**options):
    assert "torch._dynamo" in sys.modules
    sys.exit("loaded before")

run.main(["--preset", "debug", "--wandb", "disabled", "--run_dir", sys.argv[1]], make_env)
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "run"], cwd=root, capture_output=True, text=True)
    assert done.stderr == "error: the environment called sys.exit('loaded before') while it was built\n"
