"""Write sac.csv from the runs of RoboSuite's benchmark.

    git clone https://github.com/ARISE-Initiative/robosuite-benchmark
    python results/sac.py robosuite-benchmark

For each task and each 10,000 steps, it takes the mean of a seed's evaluations in them, then median, least and largest
of the seeds.
"""

import csv
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

TASKS = ("Lift", "Door", "Stack", "PickPlaceCan", "NutAssemblyRound")
STEPS = range(10_000, 1_000_001, 10_000)


def returns(progress: Path) -> dict[int, float]:
    """The mean return of one seed's evaluations in each 10,000 steps, by the last of them."""
    found = defaultdict(list)
    with open(progress, newline="") as file:
        for row in csv.DictReader(file):
            last = math.ceil(float(row["exploration/num steps total"]) / 10_000) * 10_000
            found[last].append(float(row["evaluation/Returns Mean"]))
    return {step: statistics.mean(values) for step, values in found.items()}


def main(benchmark: Path) -> None:
    """Write the table beside this file."""
    rows: list[tuple] = [("task", "env_step", "return_median", "return_min", "return_max")]
    for task in TASKS:
        seeds = [returns(x) for x in benchmark.glob(f"runs/{task}-Panda-OSC-POSE-SEED*/**/progress.csv")]
        for step in STEPS:
            values = [seed[step] for seed in seeds if step in seed]
            rows.append((task, step, *(round(f(values), 1) for f in (statistics.median, min, max))))
    with open(Path(__file__).parent / "sac.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
