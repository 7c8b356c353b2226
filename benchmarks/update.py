"""Time full updates of `Dreamer.train_step` on random data: no environment, no replay.

    python benchmarks/update.py --preset paper --cnn_depth 32
    python benchmarks/update.py --preset cpu --profile

Takes run.py's flags for sizes, precision and device. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import fast
from buffer import Batch
from runtime import cli
from runtime.console import UserError
from runtime.device import keep_freed_memory, pick_device, pick_precision
from train import Config, Dreamer


def random_batch(config: Config, channels: int, action_size: int, device: torch.device) -> Batch:
    """Noise of the shapes that the replay hands out."""
    size = (config.batch_length, config.batch_size)
    is_first = torch.zeros(size, dtype=torch.bool)
    is_first[0] = True
    shape = (*size, channels, config.image_size, config.image_size)
    return Batch(
        torch.randint(0, 256, shape, dtype=torch.uint8),
        2 * torch.rand(*size, action_size) - 1,
        torch.rand(size),
        is_first,
        torch.zeros(size, dtype=torch.bool),
    ).to(device)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Profile:
    """Seconds an update spends in parts of the agent, by wrapping their methods."""

    def __init__(self, agent: Dreamer):
        self.seconds: dict[str, float] = {}
        self.device = agent.device
        model, behavior = agent.world_model, agent.behavior
        parts = [
            ("encoder", model.encoder, "forward"),
            ("observe", model.rssm, "observe"),
            ("decoder", model.decoder, "forward"),
            ("reward head (both uses)", model.reward, "forward"),
            ("imagination", model.rssm, "imagine"),
            ("actor in imagination", behavior.actor, "raw"),
            ("actor and value losses", behavior, "loss"),
        ]
        if model.discount is not None:
            parts.append(("discount head (both uses)", model.discount, "forward"))
        for name in ("model", "actor", "value"):
            optimizer = getattr(agent, f"{name}_optimizer")
            parts.append((f"{name} backward", optimizer, "backward"))
            parts.append((f"{name} optimizer", optimizer, "step"))
        for name, owner, method in parts:
            setattr(owner, method, self._timed(name, getattr(owner, method)))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronize(self.device)
            started = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            return result

        return timed


def main() -> None:
    """Time updates and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=10, help="timed updates, after five to warm up")
    parser.add_argument("--action_size", type=int, default=0, help="by default that of the controller")
    parser.add_argument("--plain", action="store_true", help="without fast.py's overlay")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    args, flags = parser.parse_known_args()
    try:
        config = cli.parse(flags).config
    except UserError as error:
        sys.exit(f"error: {error}")
    if args.profile:  # a graph would replay what was captured, and not call the methods that are timed
        config = dataclasses.replace(config, cuda_graphs=False)
    keep_freed_memory()
    device = pick_device(config.device)
    dtype = pick_precision(config.precision, device)
    channels = 3 * len(config.cameras)
    action_size = args.action_size or (4 if config.controller == "OSC_POSITION" else 7)
    torch.manual_seed(0)
    agent = Dreamer(config, (channels, config.image_size, config.image_size), action_size, device, dtype)
    if not args.plain:
        fast.speed_up(agent)
    batch = random_batch(config, channels, action_size, device)
    with FlopCounterMode(display=False) as counter:
        agent.train_step(batch)
    flops = counter.get_total_flops()
    for _ in range(4):  # on CUDA the fourth is captured as graphs
        agent.train_step(batch)
    profile = Profile(agent) if args.profile else None
    seconds = []
    for _ in range(args.updates):
        synchronize(device)
        started = time.perf_counter()
        agent.train_step(batch)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    if profile:
        print(f"{'part':<32}{'ms an update':>14}{'share':>8}")
        for name, total in sorted(profile.seconds.items(), key=lambda item: -item[1]):
            mean = total / args.updates
            print(f"{name:<32}{1000 * mean:>14.1f}{mean / median:>8.0%}")
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else _peak_rss()
    print(
        json.dumps(
            {
                "preset": config.preset,
                "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
                "precision": "bfloat16" if dtype else "float32",
                "cuda_graphs": device.type == "cuda" and config.cuda_graphs,
                "threads": torch.get_num_threads(),
                "batch": [config.batch_length, config.batch_size],
                "cnn_depth": config.cnn_depth,
                "median_s": round(median, 4),
                "min_s": round(min(seconds), 4),
                "max_s": round(max(seconds), 4),
                "updates_per_s": round(1 / median, 3),
                "gflop": round(flops / 1e9, 1),
                "gflop_per_s": round(flops / 1e9 / median, 1),
                "peak_memory_gb": round(memory / 1e9, 3),
            }
        )
    )


def _peak_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main()
