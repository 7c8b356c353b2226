"""Draw the figures of this folder and print the claim's table.

    python results/plot.py

<task>.png                   `run.py --preset cpu` on a task: each run, their median, SAC and Lift's scripted expert
experiments/experiments.png  the runs with other constants, or on an easier task
"""

import csv
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
SAC_EPISODE = 500  # control steps
EXPERT = {"lift": 0.965}  # share of an episode's length that a scripted expert gets: expert.py
HOVERING = 0.444  # the most that a hand at the cube gets without holding it, by Lift's reward
BLUE, GRAY, RED, GREEN, ORANGE, BLACK = "#0b6fb8", "0.72", "#c0392b", "#2e8b57", "#d9822b", "0.1"
# The experiments that changed the course, drawn in color: run, label.
EASIER = {
    "first-seed0": ("first run: it hovers", RED),
    "entropy-falls-seed0": ("entropy bonus large at first", ORANGE),
    "focus-seed2": ("replay_focus 0.5, seeds 0 to 2", GREEN),
    "focus-seed0": ("", GREEN),
    "focus-seed1": ("", GREEN),
}
BENCHMARK = {
    "rotation-1-seed0": ("hand turns at full speed", RED),
    "rotation-1e-1-long-seed0": ("rotation_scale 0.1", ORANGE),
    "dynamics-seed0": ("the preset until 2026-11-25", GREEN),
    "dynamics-seed1": ("", GREEN),
    "dynamics-seed2": ("", GREEN),
    "half-step-seed0": ("REINFORCE, half the step", BLUE),
    "half-step-seed1": ("", BLUE),
    "half-step-seed2": ("", BLUE),
}

Curves = dict[str, list[dict[str, float]]]  # the evaluations of each run, in the order of the file


def read_curves(path: Path) -> Curves:
    """The evaluations of each run: control steps, hours (nan if unknown) and the return as a share of the episode."""
    curves: Curves = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            point = {name: float(row[name] or "nan") for name in ("env_step", "hours", "return_share")}
            curves.setdefault(row["run"], []).append(point)
    return curves


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a csv file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(points: list[dict[str, float]], name: str) -> list[float]:
    """One value of each evaluation of a run."""
    return [point[name] for point in points]


def median_curve(curves: Curves) -> tuple[list[float], list[float]]:
    """Each 10,000 control steps that two runs reached, and their median there, with lines between evaluations."""
    steps, medians = [], []
    longest = max(points[-1]["env_step"] for points in curves.values())
    for step in range(10_000, int(longest) + 1, 10_000):
        there = [points for points in curves.values() if points[0]["env_step"] <= step <= points[-1]["env_step"]]
        if len(there) >= 2:
            steps.append(float(step))
            lines = [(column(points, "env_step"), column(points, "return_share")) for points in there]
            medians.append(median(float(np.interp(step, *line)) for line in lines))
    return steps, medians


def tasks() -> list[str]:
    """The tasks of which this folder has curves, in the order of runs.csv."""
    return list(dict.fromkeys(row["task"].lower() for row in read_rows(HERE / "runs.csv")))


def draw_claim(task: str) -> None:
    """Return by control steps on the left, by hours on the right."""
    curves = read_curves(HERE / f"{task}.csv")
    stopped = {row["run"] for row in read_rows(HERE / "runs.csv") if row["status"] == "stopped"}
    figure, (by_steps, by_hours) = plt.subplots(1, 2, figsize=(9, 4), sharey=True, width_ratios=(3, 2))
    for run, points in curves.items():
        shares, steps, hours = (column(points, name) for name in ("return_share", "env_step", "hours"))
        for axis, x in ((by_steps, [step / 1000 for step in steps]), (by_hours, hours)):
            axis.plot(x, shares, color=BLUE, alpha=0.5, linewidth=1)
            if run in stopped:
                axis.plot(x[-1], shares[-1], color=BLUE, marker="x", linestyle="none")
    steps, medians = median_curve(curves)
    runs = f"each of {len(curves)} runs" if len(curves) > 1 else "one run"
    by_steps.plot([], [], color=BLUE, alpha=0.5, linewidth=1, label=f"{runs} (x: stopped early)")
    if medians:
        by_steps.plot([step / 1000 for step in steps], medians, color=BLUE, linewidth=3, label="their median")
    last = max(point["env_step"] for points in curves.values() for point in points)
    draw_sac(by_steps, task, last)
    for axis in (by_steps, by_hours) if task in EXPERT else ():
        axis.axhline(EXPERT[task], color="0.3", linewidth=1, linestyle="--")
        axis.text(0.02, EXPERT[task] + 0.015, "scripted expert", transform=axis.get_yaxis_transform(), fontsize=9)
    finish(by_steps, "control steps, in thousands", 1.05 * last / 1000)
    longest = max(point["hours"] for points in curves.values() for point in points)
    finish(by_hours, "hours on one CPU core", 1.05 * longest)
    by_steps.set_ylabel("return / episode length")
    figure.legend(*by_steps.get_legend_handles_labels(), loc="upper center", ncols=3, frameon=False, fontsize=9)
    save(figure, HERE / f"{task}.png", top=0.94)


def draw_sac(axis: Axes, task: str, last: float) -> None:
    """The median of RoboSuite's published SAC runs on a task, as far as the other curves go."""
    rows = [
        row for row in read_rows(HERE / "sac.csv") if row["task"].lower() == task and float(row["env_step"]) <= last
    ]
    steps = [float(row["env_step"]) / 1000 for row in rows]
    shares = [float(row["return_median"]) / SAC_EPISODE for row in rows]
    axis.plot(steps, shares, color="0.25", linewidth=2, linestyle="-.", label="SAC from the full state, median")


def draw_experiments(path: Path) -> None:
    """The easier task on the left, the benchmark's on the right, there with the runs of the claim."""
    curves = read_curves(HERE / "experiments" / "curves.csv")
    claim = read_curves(HERE / "lift.csv")
    rows = [row for row in read_rows(HERE / "experiments" / "runs.csv") if row["task"] == "Lift"]
    lift = {row["run"] for row in rows}
    easier = {row["run"] for row in rows if "--controller=OSC_POSITION" in row["overrides"]}
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for axis, chosen, end in ((axes[0], EASIER, 60), (axes[1], BENCHMARK, 120)):
        mine = {run: points for run, points in curves.items() if run in lift and (run in easier) == (chosen is EASIER)}
        for run in sorted(mine, key=lambda run: run in chosen):  # the chosen ones last, on top
            label, color = chosen.get(run, ("", GRAY))
            steps = [step / 1000 for step in column(mine[run], "env_step")]
            width = 2 if run in chosen else 1
            axis.plot(steps, column(mine[run], "return_share"), color=color, linewidth=width, label=label or None)
        for i, points in enumerate(claim.values() if chosen is BENCHMARK else ()):
            steps = [step / 1000 for step in column(points, "env_step")]
            label = "" if i else f"runs of results/README.md, {len(claim)} seeds"
            axis.plot(steps, column(points, "return_share"), color=BLACK, linewidth=1.5, label=label or None)
        axis.plot([], [], color=GRAY, linewidth=1, label="other constants")
        axis.axhline(HOVERING, color="0.3", linewidth=1, linestyle="--")
        axis.text(0.98, HOVERING + 0.015, "hovering", transform=axis.get_yaxis_transform(), fontsize=9, ha="right")
        finish(axis, "control steps, in thousands", end)
        axis.legend(loc="lower right", fontsize=9)
    axes[0].set_title("an easier task: 4 actions", fontsize=11)
    axes[1].set_title("the benchmark's task: 7 actions", fontsize=11)
    axes[0].set_ylabel("return / episode length")
    save(figure, path)


def finish(axis: Axes, label: str, end: float) -> None:
    """Limits, grid and the name of the x axis."""
    axis.set_xlim(0, end)
    axis.set_ylim(0, 1.05)
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)


def table() -> list[str]:
    """The lines of README.md's table: each run at its last evaluation."""
    points: dict[str, list[dict[str, str]]] = {}
    for task in tasks():
        for point in read_rows(HERE / f"{task}.csv"):
            points.setdefault(point["run"], []).append(point)
    lines = []
    for run in read_rows(HERE / "runs.csv"):
        curve = points[run["run"]]
        last, first = curve[-1], next((point for point in curve if float(point["success"]) == 1), None)
        spread = float(last["return_std"])
        cells = [
            f"`{run['run']}`",
            run["task"],
            run["preset"],
            run["seed"],
            f"{int(last['env_step']):,}",
            f"{float(last['return']):.0f} ± {spread:.{0 if spread >= 1 else 1}f}",
            f"{100 * float(last['success']):.0f} % of {last['episodes']}",
            f"{float(last['hours']):.1f}",
            run["cores"],
            f"{int(first['env_step']):,}, {60 * float(first['hours']):.0f} min" if first else "not yet",
            run["commit"].split(";")[-1].split()[0],
            f"`{command(run)}`",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def command(run: dict[str, str]) -> str:
    """The command that makes a run."""
    task = [] if run["task"] == "Lift" else ["--task", run["task"]]
    return " ".join(["python run.py --preset cpu", *task, "--seed", run["seed"], run["overrides"]]).strip()


def save(figure: Figure, path: Path, top: float = 1) -> None:
    """Write a figure, sharp at twice the width that a README shows; the axes leave free what is above `top`."""
    figure.tight_layout(rect=(0, 0, 1, top))
    figure.savefig(path, dpi=180)
    plt.close(figure)
    print(path)


def main() -> None:
    """Draw all figures."""
    for task in tasks():
        draw_claim(task)
    draw_experiments(HERE / "experiments" / "experiments.png")
    print("\n".join(table()))


if __name__ == "__main__":
    main()
