"""The table of all metrics: what each one is, and in which panel report.html draws it.

A new metric takes one line in `METRICS`, beside the code that computes it. report.html draws it under "All other
metrics" unless a panel names it. `python -m runtime.metrics > docs/metrics.md` renews the page for readers.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby

METRICS = {  # name: one sentence that makes sense alone; `*` stands for a number of agent steps
    "episode/return": "Sum of the rewards of a training episode.",
    "episode/length": "Control steps of a training episode.",
    "episode/success": "1 if the training episode solved the task at any step, else 0.",
    "episode/time_to_success": "Control steps until the training episode first solved the task, if it did.",
    "episode/max_reward": "Largest reward per control step of an action in a training episode.",
    "eval/return_mean": "Mean return of the evaluation episodes; a return is the sum of an episode's rewards.",
    "eval/return_std": "Standard deviation of the evaluation episodes' returns.",
    "eval/success_rate": "Share of the evaluation episodes that solved the task at any step.",
    "eval/episodes": "Number of episodes in the evaluation.",
    "eval/length_mean": "Mean length of the evaluation episodes in control steps.",
    "eval/length_std": "Standard deviation of the evaluation episodes' lengths in control steps.",
    "eval/time_to_success_mean": "Mean of the control steps to success over the evaluation episodes that succeeded.",
    "eval/time_to_success_std": "Standard deviation of the control steps to success over the evaluation "
    "episodes that succeeded.",
    "eval/max_reward_mean": "Largest reward per control step of an evaluation episode, as a mean over the episodes.",
    "eval/max_reward_std": "Standard deviation of the evaluation episodes' largest rewards per control step.",
    "model/loss": "Loss of the world model: the weighted sum of its image, reward, discount and KL losses.",
    "model/image_loss": "Negative log-likelihood of an image; ½ ln 2π = 0.919 of it per value is constant, which is "
    "22,584 for two cameras of 64 × 64 pixels.",
    "model/reward_loss": "Negative log-likelihood of an agent step's reward; ½ ln 2π = 0.919 of it is constant.",
    "model/discount_loss": "Negative log-likelihood of whether the episode goes on after a step.",
    "model/kl": "KL divergence of the posterior from the prior in nats, without free nats.",
    "model/kl_loss": "KL divergence of the posterior from the prior in nats as the loss has it, after free nats.",
    "model/image_mse": "Squared error of a reconstructed image value in [0, 1] on training sequences.",
    "model/prior_entropy": "Entropy of all latents in nats before the model sees the image: how unsure it is then.",
    "model/post_entropy": "Entropy of all latents in nats after the model has seen the image: how unsure it still is.",
    "model/latents_used": "Share of the latents that tell the frames of a batch apart, by more than 0.01 nats.",
    "model/grad_norm": "Norm of the world model's gradient before clipping.",
    "openloop/image_mse_*": "Squared error of an image value in [0, 1] on evaluation episodes, after the model has "
    "imagined `*` agent steps from the true actions alone.",
    "openloop/reward_error_*": "Absolute error of the predicted reward on evaluation episodes, after the model has "
    "imagined `*` agent steps from the true actions alone.",
    "reward/error": "Absolute error of the reward that the model predicts for the images of evaluation episodes.",
    "reward/error_hovering": "Absolute error of the predicted reward on evaluation episodes where Lift's true dense "
    "reward per control step is below 0.45: the hand is at most near the cube.",
    "reward/error_holding": "Absolute error of the predicted reward on evaluation episodes where Lift's true dense "
    "reward per control step is from 0.45 to 0.6: both fingers touch the cube.",
    "reward/error_lifted": "Absolute error of the predicted reward on evaluation episodes where Lift's true dense "
    "reward per control step is 0.6 or more: the cube is in the air.",
    "behavior/actor_loss": "Loss of the actor on imagined rollouts.",
    "behavior/value_loss": "Negative log-likelihood of the λ-returns under the critic, on imagined rollouts.",
    "behavior/actor_grad_norm": "Norm of the actor's gradient before clipping.",
    "behavior/value_grad_norm": "Norm of the critic's gradient before clipping.",
    "behavior/entropy": "Entropy of the policy in imagined states, in nats.",
    "behavior/action_mean": "Mean of all components of the imagined actions, which lie in [-1, 1].",
    "behavior/action_std": "Standard deviation of all components of the imagined actions.",
    "behavior/action_saturated": "Share of the imagined actions' components that lie beyond ±0.95.",
    "behavior/value": "Mean value that the critic gives to imagined states.",
    "behavior/target_value": "Mean value that the slow copy of the critic gives to imagined states.",
    "behavior/lambda_return": "Mean λ-return of imagined states, which the critic learns to predict.",
    "behavior/imagined_reward": "Mean reward of an agent step that the model predicts in imagination.",
    "behavior/imagined_reward_std": "Standard deviation of the rewards that the model predicts in imagination.",
    "behavior/value_predicted": "Mean value that the critic gives to the states of evaluation episodes.",
    "behavior/value_realised": "Mean discounted return that followed the states of evaluation episodes; the critic's "
    "value stands for what the time limit cut off.",
    "behavior/value_error": "Mean distance between the critic's value and the discounted return that followed, on "
    "evaluation episodes.",
    "replay/steps": "Agent steps that the replay holds.",
    "replay/episodes": "Episodes that the replay holds.",
    "replay/gb": "Memory that the replay's steps take, in GB.",
    "perf/env_steps_per_s": "Control steps per second of wall time, evaluations included.",
    "perf/updates_per_s": "Gradient updates per second of wall time, evaluations included.",
    "perf/updates": "Gradient updates since the start of the run.",
    "perf/share_env": "Share of wall time that goes into stepping the training environments.",
    "perf/share_update": "Share of wall time that goes into acting and gradient updates.",
    "perf/share_eval": "Share of wall time that goes into evaluations, videos included.",
    "perf/share_video": "Share of wall time that goes into rendering and writing videos.",
    "perf/ram_gb": "RAM that the process holds, in GB.",
    "perf/gpu_gb": "GPU memory of the process in GB: the largest amount so far on CUDA, the present one on MPS.",
    "optim/skipped": "Updates that the optimizers have skipped since the start because a gradient was not finite.",
}


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
        """Return those of the names that are curves of this panel, each with its label."""
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
        Panel("Largest reward of a control step, evaluation", {"eval/max_reward_mean": ""}),
        Panel("Control steps to success, evaluation", {"eval/time_to_success_mean": ""}),
    ),
    "Is the model right?": (
        Panel("Open-loop image MSE after k imagined steps", {"openloop/image_mse_*": ""}),
        Panel("Open-loop reward error after k steps", {"openloop/reward_error_*": ""}),
        Panel(
            "Reward error by class of the true reward",
            {
                "reward/error_hovering": "hovering",
                "reward/error_holding": "holding",
                "reward/error_lifted": "lifted",
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
            {"behavior/value_predicted": "predicted", "behavior/value_realised": "realized"},
        ),
        Panel("Imagined reward a step", {"behavior/imagined_reward": ""}),
        Panel("Policy entropy, nats", {"behavior/entropy": ""}),
        Panel("Actions in imagination", {"behavior/action_mean": "mean", "behavior/action_std": "spread"}),
        Panel("Share of saturated actions", {"behavior/action_saturated": ""}, share=True),
        Panel("Actor loss", {"behavior/actor_loss": ""}),
        Panel("Value loss", {"behavior/value_loss": ""}),
        Panel("Gradient norms", {"behavior/actor_grad_norm": "actor", "behavior/value_grad_norm": "value"}, log=True),
    ),
    "How fast is it?": (
        Panel("Per second", {"perf/env_steps_per_s": "env steps", "perf/updates_per_s": "updates"}),
        Panel(
            "Share of time",
            {"perf/share_update": "updates", "perf/share_env": "env", "perf/share_eval": "evaluation"},
            share=True,
        ),
        Panel("Memory, GB", {"perf/ram_gb": "RAM", "perf/gpu_gb": "GPU", "replay/gb": "replay"}),
        Panel("Share of time spent on videos", {"perf/share_video": ""}),
        Panel("Agent steps in the replay", {"replay/steps": ""}),
        Panel("Updates skipped", {"optim/skipped": ""}),
    ),
}
INTRODUCTION = """\
# Metrics

A run writes these metrics to `metrics.jsonl`, one JSON object a line, and under the same names to W&B. Each line has
the control step as `env_step`. Lines come from three places:

- the end of each training episode: `episode/`.
- an evaluation, whose episodes are never trained on: `eval/`, `openloop/`, `reward/` and the three
  `behavior/value_predicted`, `behavior/value_realised` and `behavior/value_error`.
- training, every `log_every` control steps: all others. `model/` and `behavior/` are means over the updates since the
  line before, and speeds and shares of time are those since then.

Rewards in `episode/` and `eval/` are those of the environment. The model learns the reward of an agent step, which is
the sum over the control steps of one action; `model/`, `openloop/`, `reward/` and `behavior/` speak of that one. A
metric that can't be measured is left out, such as the time to success if there was none.

This page is written by `python -m runtime.metrics > docs/metrics.md`.
"""


def _belongs(name: str, metric: str) -> bool:
    return name.startswith(metric[:-1]) if metric.endswith("*") else name == metric


def meaning(name: str) -> str:
    """Return the sentence that explains a metric, or nothing if the table does not have it."""
    return next((sentence for metric, sentence in METRICS.items() if _belongs(name, metric)), "")


def markdown() -> str:
    """Return docs/metrics.md."""
    page = INTRODUCTION
    for prefix, names in groupby(METRICS, lambda name: name.partition("/")[0]):
        rows = [f"| `{name}` | {METRICS[name]} |" for name in names]
        page += "\n".join([f"\n## {prefix}\n", "| metric | what it is |", "|---|---|", *rows, ""])
    return page


if __name__ == "__main__":
    print(markdown(), end="")
