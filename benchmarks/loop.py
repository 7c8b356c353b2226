"""Speed of the real training loop: `run.py` from its first line to its last, on real RoboSuite.

    python benchmarks/loop.py --preset cpu --steps 6000

Takes run.py's flags. The first half of the metric lines is left out (prefill, pretraining, warm-up). The last line
is one JSON object: env steps and updates a second, and the busy share of the processors and of an NVIDIA GPU.
"""

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

RUN = Path(__file__).resolve().parent.parent / "run.py"


class GPU:
    """The share of time in which the first GPU is busy, looked at once a second."""

    QUERY = ("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0", "--loop=1")

    def __init__(self) -> None:
        self.process = subprocess.Popen(self.QUERY, stdout=subprocess.PIPE, text=True)

    def busy(self) -> float:
        """Of the second half of the time up to now; ends the watch."""
        self.process.terminate()
        shares = [float(line) for line in self.process.communicate()[0].splitlines()]
        return round(statistics.mean(shares[len(shares) // 2 :]) / 100, 2)


def main() -> None:
    """Run the program and print its speed."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        quiet = ["--wandb", "disabled", "--eval_episodes", "1", "--eval_steps", "60", "--eval_every", "1000000000"]
        command = [sys.executable, str(RUN), *quiet, *sys.argv[1:], "--run_dir", str(run_dir)]
        gpu = GPU() if shutil.which("nvidia-smi") else None
        started = time.perf_counter()
        code = subprocess.run(command, stdout=sys.stderr).returncode
        wall = time.perf_counter() - started
        if code:
            sys.exit(code)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        config = json.loads((run_dir / "config.json").read_text())
    lines = [line for line in lines if "perf/updates_per_s" in line]
    late = lines[len(lines) // 2 :]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {
        "preset": config["preset"],
        "num_envs": config["num_envs"],
        "train_every": config["train_every"],
        "env_steps_per_s": round(statistics.median(line["perf/env_steps_per_s"] for line in late), 2),
        "updates_per_s": round(statistics.median(line["perf/updates_per_s"] for line in late), 3),
        "cpu_busy": round((used.ru_utime + used.ru_stime) / wall / (os.cpu_count() or 1), 2),
        "cpus": os.cpu_count(),
        "gpu_busy": gpu.busy() if gpu else None,
        "wall_s": round(wall, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
