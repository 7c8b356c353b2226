"""Add a run to the tables of this folder.

    python results/add.py runs/Lift_cpu_3 --cores 2 --hardware "AMD EPYC, no GPU" --note "nothing else ran beside it"

A run of the preset `cpu` as it is goes into lift.csv (or the csv of its task) and runs.csv. A run with another preset,
other constants or other code needs a `--name` that tells it apart, and goes into experiments/curves.csv and
experiments/runs.csv. Adding a run again replaces what the tables have of it, for instance once it has gone on.
"""

import argparse
import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from runtime.cli import defaults  # noqa: E402
from runtime.evaluate import episode_length  # noqa: E402
from runtime.logger import read_metrics  # noqa: E402
from train import Config  # noqa: E402

CURVE = "run", "seed", "env_step", "hours", "return", "return_std", "return_share", "success", "episodes", "eval_action"
RUN = (
    *("run", "task", "preset", "seed", "overrides", "eval_steps"),
    *("cores", "hours", "commit", "hardware", "status", "note"),
)
# Constants that a run's row does not list: it has a column for them, or they change nothing of what is learned.
UNLISTED = {"task", "preset", "seed", "run_dir", "device", "wandb", "video_every", "checkpoint_minutes"}
# Constants that are listed, but do not make a run an experiment: they change nothing of what is learned by a step.
STILL_THE_PRESET = {"steps", "log_every", "eval_every", "eval_episodes", "save_replay"}


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a csv file, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, columns: Collection[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a csv file. Every row must have all the columns and no others."""
    text = io.StringIO()  # a row that does not fit must not leave half a file
    writer: csv.DictWriter[str] = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue())


def read_config(run_dir: Path) -> Config:
    """The constants of a run folder. ValueError if they are those of another release."""
    saved = json.loads((run_dir / "config.json").read_text())
    if other := saved.keys() ^ {field.name for field in fields(Config)}:
        raise ValueError(f"{run_dir} is of another release ({', '.join(sorted(other))}): use its own add.py")
    constants: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in saved.items()}
    return Config(**constants)


def overrides(config: Config) -> dict[str, Any]:
    """The constants in which a run differs from its task and preset, those that a row does not list excepted."""
    preset = replace(Config(), **defaults(config.task, config.preset))
    names = [field.name for field in fields(Config) if field.name not in UNLISTED]
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(preset, name)}


def flags(changed: Mapping[str, Any]) -> str:
    """Constants as run.py's flags: `--steps=120000 --cameras=agentview,frontview`."""
    texts = {name: ",".join(value) if isinstance(value, tuple) else value for name, value in changed.items()}
    return " ".join(f"--{name}={text}" for name, text in texts.items())


def curve_of(lines: Iterable[dict[str, float]], config: Config, run: str) -> tuple[list[dict[str, Any]], float]:
    """A row for each evaluation among the lines of metrics.jsonl, and the hours that the run took in all."""
    hours, logged, speed, curve = 0.0, 0, math.inf, []
    for line in lines:
        if "perf/env_steps_per_s" in line:
            speed = line["perf/env_steps_per_s"]
            hours += (line["env_step"] - logged) / speed / 3600
            logged = int(line["env_step"])
        if "eval/return_mean" in line:
            point = {
                "run": run,
                "seed": config.seed,
                "env_step": line["env_step"],
                "hours": round(hours + (line["env_step"] - logged) / speed / 3600, 3),  # since then, at that speed
                "return": line["eval/return_mean"],
                "return_std": line["eval/return_std"],
                "return_share": share(line["eval/return_mean"], episode_length(config)),
                "success": line["eval/success_rate"],
                "episodes": int(line["eval/episodes"]),
                "eval_action": config.eval_action,
            }
            curve.append(point)
    return curve, round(hours, 3)


def share(value: float, episode_steps: int) -> float:
    """A return as a share of the episode's length, which is the most that a reward of 1 a control step can give."""
    return round(value / episode_steps, 4)


def add(run_dir: Path, name: str, **columns: str) -> str:
    """Put a run into the tables, in place of what they have of it, and return its name.

    `columns` are those that the run folder does not know: cores, commit, hardware, note.
    Raises ValueError for a run with changed constants, or of another preset than `cpu`, that has no name of its own.
    """
    config = read_config(run_dir)
    changed = overrides(config)
    lines, _ = read_metrics(run_dir)
    on_gpu = any("perf/gpu_gb" in line for line in lines)
    on_cpu = config.preset == "cpu" and not on_gpu
    is_claim = not name and on_cpu and not changed.keys() - STILL_THE_PRESET
    if not is_claim and not name:
        place = f"is of {config.preset}{' on a GPU' * on_gpu}"
        why = f"has constants of its own ({flags(changed)})" if on_cpu else place
        raise ValueError(f"{run_dir} {why}: give it a --name")
    name = name or f"{config.task.lower()}-{config.preset}-seed{config.seed}"
    curve, hours = curve_of(lines, config, name)
    if is_claim and not curve:
        raise ValueError(f"{run_dir} has no evaluation yet")
    row: dict[str, Any] = columns | {
        "run": name,
        "task": config.task,
        "preset": config.preset,
        "seed": config.seed,
        "overrides": flags(changed),
        "eval_steps": episode_length(config),
        "hours": hours,
        "status": "finished" if curve and curve[-1]["env_step"] >= config.steps else "stopped",
    }
    folder = HERE if is_claim else HERE / "experiments"
    curves = folder / (f"{config.task.lower()}.csv" if is_claim else "curves.csv")
    for path, header, rows in ((curves, CURVE, curve), (folder / "runs.csv", RUN, [row])):
        write_table(path, header, [*(old for old in read_table(path) if old["run"] != name), *rows])
    return name


def main() -> int:
    """Read the command line and add the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, metavar="RUN_FOLDER")
    parser.add_argument("--name", default="", help="by default {task}-{preset}-seed{seed}")
    parser.add_argument("--cores", default="", help="CPU cores that it had")
    parser.add_argument("--hardware", default="", help="machine that it ran on")
    parser.add_argument("--commit", help="commit that it ran with; by default the present one")
    parser.add_argument("--note", default="", help="what else one has to know, such as why it was stopped")
    args = parser.parse_args()
    head = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = args.commit or subprocess.check_output(head, text=True).strip()
    try:
        print(add(args.run_dir, args.name, cores=args.cores, hardware=args.hardware, commit=commit, note=args.note))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
