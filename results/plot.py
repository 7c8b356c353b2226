"""The learning curves of this folder.

    python results/plot.py                      draws all runs into results/curves.png
    python results/plot.py --add RUN_FOLDER     first writes a run's curve into this folder

A curve comes from the run's own evaluations: deterministic policy, fixed seeds.
"""

import argparse
import json
import subprocess
import sys
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

# Share of an episode's largest return. The expert is a script that opens, descends, closes and lifts.
ANCHORS = {
    "cpu": {"expert\nscript": 0.88, "hovering at\nthe cube,\nat most": 0.444, "random": 0.0075},
    "standard": {"expert\nscript": 481 / 500, "hovering at\nthe cube,\nat most": 0.444, "random": 0.0075},
}
# RoboSuite's published SAC, which sees the full state: median env steps of five seeds to returns of 500.
SAC = {"env_step": (120_000, 400_000, 438_000, 648_000, 820_000), "return": (217, 217, 300, 400, 450)}
TITLES = {
    "cpu": "cpu preset (4 actions, 10 Hz, 100 steps), up to two cores",
    "standard": "the benchmark's task (7 actions, 20 Hz, 500 steps), one core",
}


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
    """The cpu preset by the clock: in colour as it is with the median in bold, grey where constants were changed.

    The benchmark's task by control steps, each run with the end of its file's name.
    """
    runs = {file.stem: json.loads(file.read_text()) for file in sorted(HERE.glob("*.json"))}
    figure, axes = plt.subplots(2, 2, figsize=(11, 6), sharex="col")
    for (returns, successes), preset in zip(axes.T, TITLES, strict=True):
        chosen = {stem: run for stem, run in runs.items() if run["preset"] == preset}
        for axis, metric in ((returns, "return_mean"), (successes, "success_rate")):
            draw_runs(axis, chosen, metric, by_time=preset == "cpu")
        for name, height in ANCHORS[preset].items():
            returns.axhline(height, color="0.3", linewidth=0.8, linestyle="--")
            returns.annotate(name, (1.01, height), xycoords=("axes fraction", "data"), fontsize=8, va="center")
        if preset == "standard":
            returns.set_xscale("log")
            reached = [value / 500 for value in SAC["return"]]
            sac = returns.plot(SAC["env_step"], reached, color="0.3", linewidth=2, label="SAC from full state, median")
            returns.legend(handles=sac, loc="lower right", fontsize=8)
        returns.set_title(TITLES[preset], fontsize=10)
        returns.set_ylabel("return / episode length")
        successes.set_ylabel("success rate")
        successes.set_xlabel("minutes" if preset == "cpu" else "control steps")
    axes[1][0].legend(loc="lower right", fontsize=8)
    axes[1][1].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_runs(axis: plt.Axes, runs: dict[str, dict], metric: str, by_time: bool) -> None:
    unchanged = []
    for stem, run in runs.items():
        scale = run["episode_steps"] if metric == "return_mean" else 1
        x = [60 * p["hours"] if by_time else p["env_step"] for p in run["curve"]]
        y = [p[metric] / scale for p in run["curve"]]
        if not by_time:
            seed_and_name = stem.partition("_seed")[2].replace("_", ", ", 1)
            axis.plot(x, y, linewidth=1.5, marker=".", label=f"seed {seed_and_name}")
            continue
        tried = bool(run["changed"].keys() - {"eval_action"})  # that changes nothing of what is learnt
        label = "constants changed" if tried else "preset as it is"
        axis.plot(
            x, y, color="0.7" if tried else "#0b6fb8", linewidth=1, zorder=1 if tried else 2, marker=".", markersize=3,
            label=None if label in axis.get_legend_handles_labels()[1] else label,
        )  # fmt: skip
        if not tried:
            unchanged.append((x, y))
    if len(unchanged) > 1:
        grid = np.linspace(max(x[0] for x, _ in unchanged), min(x[-1] for x, _ in unchanged), 200)
        median = np.median([np.interp(grid, x, y) for x, y in unchanged], 0)
        axis.plot(grid, median, color="#0b6fb8", linewidth=3, zorder=3, label="median of the seeds")
    axis.set_ylim(-0.02, 1.02)
    axis.grid(alpha=0.3)


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
