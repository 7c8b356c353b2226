"""What each metric means, as docs/metrics.md has it, and in which panel report.html draws it.

A new metric takes one line on the page. report.html draws it under "All other metrics" unless a panel names it.
"""

import functools
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"


@dataclass(frozen=True)
class Panel:
    """A small plot of some metrics."""

    title: str
    metrics: dict[str, str]  # metric: label of its curve; one with `*` has a curve for each number
    spread: str = ""  # metric that is drawn as a band around the curve
    log: bool = False  # logarithmic axis
    share: bool = False  # the axis runs from 0 to 1
    mean_of: int = 1  # if more than 1, the values are faint points, and the curve is their mean over so many

    def curves(self, names: Collection[str]) -> dict[str, str]:
        """The curves of this panel among these names, each with its label."""
        found = {}
        for metric, label in self.metrics.items():
            matching = [name for name in names if _belongs(name, metric)]
            for name in sorted(matching, key=lambda name: (len(name), name)):  # by number
                found[name] = label or name.removeprefix(metric.removesuffix("*"))
        return found


SECTIONS = {
    "Does it learn?": (
        Panel("Evaluation return, mean ± spread", {"eval/return_mean": ""}, spread="eval/return_std"),
        Panel("Evaluation success rate", {"eval/success_rate": ""}, share=True),
        Panel("Return of training episodes", {"episode/return": ""}, mean_of=10),
        Panel("Success of training episodes", {"episode/success": ""}, share=True, mean_of=10),
        Panel("Largest reward of an action, evaluation", {"eval/max_reward_mean": ""}),
        Panel("Control steps to success, evaluation", {"eval/time_to_success_mean": ""}),
    ),
    "Is the model right?": (
        Panel("Open-loop image MSE after k imagined steps", {"openloop/image_mse_*": ""}),
        Panel("Open-loop reward error after k steps", {"openloop/reward_error_*": ""}),
        Panel(
            "Reward error by thirds of the largest reward",
            {
                "reward/error_low": "low",
                "reward/error_middle": "middle",
                "reward/error_high": "high",
                "reward/error": "all",
            },
        ),
        Panel("Image MSE in training", {"model/image_mse": ""}, log=True),
        Panel("KL, nats", {"model/kl": "plain", "model/kl_loss": "loss, after free nats"}),
        Panel("Entropy of the latents, nats", {"model/prior_entropy": "prior", "model/post_entropy": "posterior"}),
        Panel("Reward loss", {"model/reward_loss": ""}),
        Panel("Share of latents in use", {"model/latents_used": ""}, share=True),
        Panel("Gradient norm of the model", {"model/grad_norm": ""}, log=True),
    ),
    "Is the policy healthy?": (
        Panel("Value and λ-return in imagination", {"behavior/value": "value", "behavior/lambda_return": "λ-return"}),
        Panel(
            "Value on evaluation episodes",
            {"behavior/value_predicted": "predicted", "behavior/value_realized": "realized"},
        ),
        Panel("Imagined reward a step", {"behavior/imagined_reward": ""}),
        Panel("Policy entropy, nats", {"behavior/entropy": ""}),
        Panel("Actions in imagination", {"behavior/action_mean": "mean", "behavior/action_std": "spread"}),
        Panel("Actor's outputs before tanh", {"behavior/actor_output": ""}),
        Panel("Actor loss", {"behavior/actor_loss": ""}),
        Panel("Value loss", {"behavior/value_loss": ""}),
        Panel("Gradient norms", {"behavior/actor_grad_norm": "actor", "behavior/value_grad_norm": "value"}, log=True),
    ),
    "How fast is it?": (
        Panel("Per second", {"perf/env_steps_per_s": "env steps", "perf/updates_per_s": "updates"}),
        Panel(
            "Share of time",
            {
                "perf/share_update": "updates",
                "perf/share_env": "env",
                "perf/share_eval": "evaluation",
                "perf/share_save": "saving",
            },
            share=True,
        ),
        Panel("Memory, GB", {"perf/ram_gb": "RAM", "perf/gpu_gb": "GPU", "replay/gb": "replay"}),
        Panel("Share of time spent on videos", {"perf/share_video": ""}),
        Panel("Agent steps in the replay", {"replay/steps": ""}),
        Panel("Updates skipped", {"optim/skipped": ""}),
    ),
}


def _belongs(name: str, metric: str) -> bool:
    return name.startswith(metric[:-1]) if metric.endswith("*") else name == metric


@functools.cache
def meanings() -> dict[str, str]:
    """The sentence that explains each metric; `*` in a name stands for a number of agent steps."""
    return dict(re.findall(r"^\| `(.+?)` \| (.+) \|$", PAGE.read_text(), re.MULTILINE)) if PAGE.exists() else {}


def meaning(name: str) -> str:
    """The sentence that explains a metric, or nothing if the page does not have it."""
    return next((sentence for metric, sentence in meanings().items() if _belongs(name, metric)), "")
