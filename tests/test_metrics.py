"""The page of metrics: complete, and drawn where the panels say."""

import fnmatch
import json

import pytest

import run
from fake_env import FakeEnv
from runtime.metrics import SECTIONS, Panel, meaning, meanings

FLAGS = (
    "--preset debug --cameras agentview --cnn_depth 2 --deter 8 --hidden 8 --stoch 4 --classes 4 --batch_size 2 "
    "--batch_length 5 --prefill 40 --steps 60 --episode_steps 60 --horizon 3 --imagine_starts 4 --precision float32 "
    "--wandb disabled --device cpu"
)
PANELS = [panel for panels in SECTIONS.values() for panel in panels]


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
    assert not [name for name in written if not meaning(name)]


def test_every_metric_of_the_page_is_written(written):
    """The page has no leftovers; a run without a GPU leaves out that one's memory."""
    assert {metric for metric in meanings() if not fnmatch.filter(written, metric)} == {"perf/gpu_gb"}


def test_every_metric_has_one_sentence_that_stands_alone():
    """A sentence has a capital or a digit first, a period last, and refers to no neighbor."""
    assert len(meanings()) > 60
    for sentence in meanings().values():
        assert sentence[0].isupper() or sentence[0].isdigit()
        assert sentence.endswith(".") and ". " not in sentence and "the same" not in sentence.lower()


def test_panels_draw_metrics_of_the_page_once():
    """Each metric of a panel is on the page, and no two panels draw the same one."""
    drawn = [metric for panel in PANELS for metric in panel.metrics]
    assert len(drawn) == len(set(drawn)) and set(drawn) <= meanings().keys()
    assert {panel.spread for panel in PANELS} - {""} <= meanings().keys()


def test_a_metric_with_a_star_has_a_curve_for_each_number():
    """Curves come in the order of their numbers, which are their labels; other names stay out."""
    names = {f"openloop/image_mse_{k}" for k in (45, 5, 1, 15)} | {"openloop/reward_error_1", "model/kl"}
    curves = Panel("", {"openloop/image_mse_*": ""}).curves(names)
    assert list(curves.values()) == ["1", "5", "15", "45"]
    assert list(curves) == [f"openloop/image_mse_{k}" for k in (1, 5, 15, 45)]
    assert meaning("openloop/image_mse_7") and not meaning("openloop/other")
