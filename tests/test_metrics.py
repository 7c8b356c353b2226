"""The page of metrics: complete, and drawn as it says."""

import fnmatch
import json

import pytest

import run
from fake_env import FakeEnv
from runtime.report import RunData, _sections, described

FLAGS = (
    "--preset debug --cameras agentview --cnn_depth 2 --deter 8 --hidden 8 --stoch 4 --classes 4 --batch_size 2 "
    "--batch_length 5 --prefill 40 --steps 60 --episode_steps 60 --horizon 3 --imagine_starts 4 --precision float32 "
    "--wandb disabled --device cpu"
)
METRICS = {metric.name: metric for metric in described()}


class KindEnv(FakeEnv):
    """Every step succeeds, and the rewards are those of all stages of Lift."""

    def step(self, action):
        image, _, terminated, truncated, _ = super().step(action)
        return image, (0.1, 0.5, 0.9)[self.steps % 3], terminated, truncated, {"success": True}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> set[str]:
    """The names of all metrics of a small run."""
    run_dir = tmp_path_factory.mktemp("metrics") / "run"
    assert run.main([*FLAGS.split(), "--run_dir", str(run_dir)], KindEnv) == 0
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {name for line in lines for name in line} - {"env_step"}


def test_every_metric_of_a_run_is_on_the_page(written):
    """A metric that a run writes has a sentence."""
    assert not [name for name in written if not any(fnmatch.fnmatch(name, metric) for metric in METRICS)]


def test_every_metric_of_the_page_is_written(written):
    """The page has no leftovers; a run without a GPU leaves out that one's memory."""
    assert {metric for metric in METRICS if not fnmatch.filter(written, metric)} == {"perf/gpu_gb"}


def test_every_metric_has_one_sentence_that_stands_alone():
    """A sentence has a capital or a digit first, a period last, and refers to no neighbor."""
    assert len(described()) == len(METRICS) > 60
    for sentence in (metric.meaning for metric in described()):
        assert sentence[0].isupper() or sentence[0].isdigit()
        assert sentence.endswith(".") and ". " not in sentence and "the same" not in sentence.lower()


def test_metrics_with_the_same_title_share_a_plot_in_the_order_of_the_page(tmp_path):
    """A metric with a star has a curve for each number, in their order; what the page does not have is drawn last."""
    logged = {f"openloop/image_mse_{k}" for k in (45, 5, 1, 15)} | {"model/kl_loss", "model/kl", "model/loss", "my/own"}
    lines = [{"env_step": step} | {name: float(step) for name in logged} for step in (1, 2)]
    sections = _sections([RunData(tmp_path, "run", "red", lines, 0, {})], logged)
    drawn = {name: [picture["title"] for picture in pictures] for name, pictures in sections.items()}
    shared = ["Open-loop image MSE after k imagined steps", "KL, nats"]
    assert drawn == {"Is the model right?": shared, "All other metrics": ["model/loss", "my/own"]}
    steps = METRICS["openloop/image_mse_*"].meaning
    about = sections["Is the model right?"][0]["about"].splitlines()
    assert about == [f"openloop/image_mse_{k}: {steps}" for k in (1, 5, 15, 45)]
