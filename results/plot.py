"""The learning curves of this folder.

    python results/plot.py                      draws all runs into results/curves.png
    python results/plot.py --add RUN_FOLDER     first writes a run's curve into this folder

A curve comes from the run's own evaluations: deterministic policy, fixed seeds.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from checkpoint import OLDER_CONSTANTS  # noqa: E402
from logger import read_metrics  # noqa: E402
from run import eval_options  # noqa: E402
from train import PRESETS, Config  # noqa: E402

# Share of an episode's largest return. The expert is a script that opens, descends, closes and lifts; 0.88 is what it
# gets on the easier task.
ANCHORS = {"expert\nscript": 481 / 500, "hovering at\nthe cube,\nat most": 0.444, "random": 0.0075}
# RoboSuite's published SAC, which sees the full state: median env steps of five seeds to returns of 500.
SAC = {"env_step": (120_000, 400_000, 438_000, 648_000, 820_000), "return": (217, 217, 300, 400, 450)}
AS_IT_IS, CHANGED, EASIER = "cpu preset as it is", "constants changed", "an easier task (4 actions)"
OTHER = "another preset"
COLOURS = {EASIER: "#e3bd74", CHANGED: "0.65", OTHER: "#c0392b", AS_IT_IS: "#0b6fb8"}  # from the bottom to the top


def add(run_dir: Path, name: str, hardware: str, commit: str, notes: str) -> Path:
    """Write a run folder's evaluations as results/{task}_{preset}_seed{seed}_{name}.json."""
    saved = OLDER_CONSTANTS | json.loads((run_dir / "config.json").read_text())
    names = set(Config.__dataclass_fields__)
    config = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in names})
    preset = replace(Config(), **PRESETS[config.preset])
    apart = {"preset", "seed", "run_dir", "wandb", "device", "video_every", "checkpoint_minutes"}
    changed = {name: getattr(config, name) for name in names - apart if getattr(config, name) != getattr(preset, name)}
    hours, logged, curve = 0.0, 0, []
    for row in read_metrics(run_dir)[0]:
        if "perf/env_steps_per_s" in row:
            hours += (row["env_step"] - logged) / row["perf/env_steps_per_s"] / 3600
            logged = row["env_step"]
        if "eval/return_mean" in row:
            point = {name: row[f"eval/{name}"] for name in ("return_mean", "return_std", "success_rate", "episodes")}
            curve.append({"env_step": row["env_step"], "hours": round(hours, 3)} | point)
    result = {
        "task": config.task, "preset": config.preset, "changed": dict(sorted(changed.items())), "seed": config.seed,
        "commit": commit, "hardware": hardware, "hours": round(hours, 3),
        "episode_steps": eval_options(config)["episode_steps"], "curve": curve, "notes": notes,
    }  # fmt: skip
    path = HERE / f"{config.task.lower()}_{config.preset}_seed{config.seed}_{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def draw(path: Path) -> None:
    """Left the benchmark's task by control steps, in bold the median of finished seeds; right all runs by the clock."""
    runs = [json.loads(file.read_text()) for file in sorted(HERE.glob("lift_*.json"))]
    figure, axes = plt.subplots(2, 2, figsize=(11, 6), sharex="col", sharey=True)
    for (by_step, by_time), metric in zip(axes, ("return_mean", "success_rate"), strict=True):
        draw_runs(by_step, [run for run in runs if kind(run) != EASIER], metric, lambda point: point["env_step"])
        draw_median(by_step, [run for run in runs if kind(run) == AS_IT_IS], metric)
        draw_runs(by_time, [run for run in runs if kind(run) != OTHER], metric, lambda point: 60 * point["hours"])
    returns, returns_by_time = axes[0]
    reached = [value / 500 for value in SAC["return"]]
    returns.plot(SAC["env_step"], reached, color="0.2", linewidth=2, label="SAC from full state, median")
    returns.set_xscale("log")
    for name, height in ANCHORS.items():
        for axis in axes[0]:
            axis.axhline(height, color="0.3", linewidth=0.8, linestyle="--")
        returns_by_time.annotate(name, (1.01, height), xycoords=("axes fraction", "data"), fontsize=8, va="center")
    returns.set_title("the benchmark's task (7 actions, 20 Hz, 500 steps)", fontsize=10)
    returns_by_time.set_title("by the clock, on one or two CPU cores", fontsize=10)
    returns.set_ylabel("return / episode length")
    axes[1][0].set_ylabel("success rate")
    axes[1][0].set_xlabel("control steps")
    axes[1][1].set_xlabel("minutes")
    returns.legend(loc="lower right", fontsize=8)
    axes[1][1].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def kind(run: dict) -> str:
    """One of COLOURS."""
    if run["preset"] != "cpu":
        return OTHER
    if run["changed"].get("controller", "OSC_POSE") != "OSC_POSE":
        return EASIER
    # These change nothing of what is learnt by a step.
    return CHANGED if run["changed"].keys() - {"steps", "eval_action"} else AS_IT_IS


def heights(run: dict, metric: str) -> list[float]:
    scale = run["episode_steps"] if metric == "return_mean" else 1
    return [point[metric] / scale for point in run["curve"]]


def draw_runs(axis: plt.Axes, runs: list[dict], metric: str, x: Callable[[dict], float]) -> None:
    for name, colour in COLOURS.items():
        for i, run in enumerate(run for run in runs if kind(run) == name):
            axis.plot(
                [x(point) for point in run["curve"]], heights(run, metric),
                color=colour, linewidth=1, marker=".", markersize=4, label=None if i else name,
            )  # fmt: skip
    axis.set_ylim(-0.02, 1.02)
    axis.grid(alpha=0.3)


def draw_median(axis: plt.Axes, runs: list[dict], metric: str) -> None:
    """Of the runs that reached the preset's `steps`."""
    finished = [run for run in runs if run["curve"][-1]["env_step"] >= PRESETS["cpu"]["steps"]]
    if len(finished) < 2:
        return
    curves = [{p["env_step"]: y for p, y in zip(run["curve"], heights(run, metric), strict=True)} for run in finished]
    steps = sorted(set.intersection(*map(set, curves)))  # at which all of them were evaluated
    median = [np.median([curve[step] for curve in curves]) for step in steps]
    axis.plot(steps, median, color=COLOURS[AS_IT_IS], linewidth=3, label=f"their median ({len(finished)} runs)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, metavar="RUN_FOLDER", help="write this run's curve first")
    parser.add_argument("--name", help="ends the file's name; by default the commit")
    parser.add_argument("--hardware", default="unknown", help="where it ran")
    parser.add_argument("--commit", help="that it ran with; by default the present one")
    parser.add_argument("--notes", default="", help="what to know of it, such as its command and why it ended")
    args = parser.parse_args()
    if args.add:
        commit = args.commit or subprocess.check_output(
            ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], text=True
        ).strip()  # fmt: skip
        print(add(args.add, args.name or commit, args.hardware, commit, args.notes))
    draw(HERE / "curves.png")
    print(HERE / "curves.png")


if __name__ == "__main__":
    main()
