"""Speed of the real training loop: `run.py` from its first line to its last, on real RoboSuite.

    python benchmarks/loop.py --preset cpu --steps 6000
    python benchmarks/loop.py --against dd9426c --rounds 3 --preset cpu --steps 6000

Takes run.py's flags. The first half of the metric lines is left out (prefill, pretraining, warm-up). The last line
is one JSON object: env steps and updates a second, and the busy share of the processors and of an NVIDIA GPU. With
`--against`, the present files and those of a commit take turns, and the line after that has the ratio of their medians.
An evaluation counts where it falls into the second half: `--eval_every 3000 --eval_episodes 3 --eval_steps 500` has the
share of evaluations that `--preset cpu` has, within 6,000 steps.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
QUIET = {"wandb": "disabled", "eval_episodes": "1", "eval_steps": "60", "eval_every": "1000000000"}  # unless given
SPEEDS = ("env_steps_per_s", "updates_per_s")


class GPU:
    """The share of time in which the first GPU is busy, looked at once a second."""

    QUERY = ("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0", "--loop=1")

    def __init__(self) -> None:
        self.process = subprocess.Popen(self.QUERY, stdout=subprocess.PIPE, text=True)

    def busy(self) -> float | None:
        """Of the second half of the time up to now; ends the watch."""
        self.process.terminate()
        shares = [float(line) for line in self.process.communicate()[0].splitlines() if line.strip().isdigit()]
        return round(statistics.mean(shares[len(shares) // 2 :]) / 100, 2) if shares else None  # a slice has none


def main() -> None:
    """Run the program, or two of its versions in turns, and print the speeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="measure this commit's files too")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each version")
    args, flags = parser.parse_known_args()
    if not args.against:
        for _ in range(args.rounds):
            print(json.dumps(measure(ROOT, flags)))
        return
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", folder, args.against], check=True)
        try:
            compare(Path(folder), args.against, flags, args.rounds)
        finally:
            subprocess.run([*git, "remove", "--force", folder], check=True)


def compare(other: Path, commit: str, flags: list[str], rounds: int) -> None:
    """Measure the present files and those in the folder `other` in turns, and print each run and the ratio."""
    found: dict[str, list[dict[str, Any]]] = {"here": [], commit: []}
    for _ in range(rounds):
        for name, root in (("here", ROOT), (commit, other)):
            found[name].append(measure(root, flags))
            print(json.dumps({"version": name} | found[name][-1]), flush=True)
    middle = {name: {x: statistics.median(run[x] for run in runs) for x in SPEEDS} for name, runs in found.items()}
    print(json.dumps({x: round(middle["here"][x] / middle[commit][x], 3) for x in SPEEDS}))


def measure(root: Path, flags: list[str]) -> dict[str, Any]:
    """The speed of one run of the files in `root`."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        quiet = [word for name, value in QUIET.items() if f"--{name}" not in flags for word in (f"--{name}", value)]
        command = [sys.executable, str(root / "run.py"), *quiet, *flags, "--run_dir", str(run_dir)]
        gpu = GPU() if shutil.which("nvidia-smi") else None
        started, before = time.perf_counter(), _processor_seconds()
        code = subprocess.run(command, stdout=sys.stderr).returncode
        wall, used = time.perf_counter() - started, _processor_seconds() - before
        if code:
            sys.exit(code)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        config = json.loads((run_dir / "config.json").read_text())
    lines = [line for line in lines if "perf/updates_per_s" in line]
    late = lines[len(lines) // 2 :]  # of equally many steps each: the mean speed of all is their harmonic mean
    return {
        "preset": config["preset"],
        "num_envs": config["num_envs"],
        "train_every": config["train_every"],
        "env_steps_per_s": round(statistics.harmonic_mean(line["perf/env_steps_per_s"] for line in late), 2),
        "updates_per_s": round(statistics.harmonic_mean(line["perf/updates_per_s"] for line in late), 3),
        "cpu_busy": round(used / wall / (os.cpu_count() or 1), 2),
        "cpus": os.cpu_count(),
        "gpu_busy": gpu.busy() if gpu else None,
        "wall_s": round(wall, 1),
    }


def _processor_seconds() -> float:
    """What processes that have ended took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
