"""The machine that a run is on: its device, precision and memory, and a check of a device's gradients."""

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from buffer import Batch, ReplayBuffer
from networks import Draws
from runtime.console import Failure, UserError
from train import Config, Dreamer

CHECKED = ("mps",)  # devices whose gradients are compared with the CPU's before the first update
MAX_GRADIENT_DEVIATION = 1e-3  # of a GPU's gradients from the CPU's, relative
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's names for its settings
# Controller, files and statistic of control groups, versions 2 and 1: the limit, what is used, and how much of that the
# system takes back when memory gets short, such as what was read from files.
CGROUP_MEMORY = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def pick_device(name: str) -> torch.device:
    """The device that was asked for, or the first there is of cuda, mps and cpu. UserError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, found in there.items() if found))
    if not there[name]:
        raise UserError(f"device {name} is not available here; valid: {', '.join(k for k, v in there.items() if v)}")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type: bfloat16 if the hardware multiplies it natively, else None for plain float32."""
    if name == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
        name = "bfloat16" if fast else "float32"
    return torch.bfloat16 if name == "bfloat16" else None


def make_replay(
    config: Config, image_shape: tuple[int, int, int], action_size: int, device: torch.device
) -> ReplayBuffer:
    """The replay, on the GPU if it takes at most half of the memory that is free there.

    UserError if the machine does not have that much memory.
    """
    nbytes = config.capacity * math.prod(image_shape)
    where = torch.device("cpu")
    if device.type == "cuda" and nbytes <= torch.cuda.mem_get_info(device)[0] / 2:
        where = device
    try:
        return ReplayBuffer(
            config.capacity, config.num_envs, image_shape, action_size, config.seed, config.replay_focus, where
        )
    except RuntimeError as error:  # torch's, if the system refuses that much
        raise UserError(f"capacity {config.capacity} needs {nbytes / 1e9:,.0f} GB, which can't be had") from error


def keep_freed_memory() -> None:
    """Let glibc reuse the memory that one update frees in the next one, as CUDA's allocator does.

    By default it hands large blocks back to the kernel, and fetching their pages anew takes a tenth of an update on a
    CPU. Other C libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**28)  # bytes; larger blocks, such as the replay's, are mapped one by one
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # bytes free at the heap's end, above which they are given back


def memory(device: torch.device) -> dict[str, float]:
    """GB that this process takes: of RAM, and of the GPU's memory (CUDA: the most so far)."""
    figures = {"perf/ram_gb": psutil.Process().memory_info().rss / 1e9}
    if device.type == "cuda":
        figures["perf/gpu_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    elif device.type == "mps":
        figures["perf/gpu_gb"] = torch.mps.current_allocated_memory() / 1e9
    return figures


def free_memory(root: Path = Path("/")) -> float:
    """Bytes of memory that this process can still take: what the machine has, or its container or job if that is less.

    `root` is where /proc and /sys are looked for.
    """
    return float(max(0, min([psutil.virtual_memory().available, *_free_in_cgroups(root)])))


def _free_in_cgroups(root: Path) -> Iterator[int]:
    """Bytes that are free in each control group of this process that has a limit."""
    for controller, *names, cache in CGROUP_MEMORY:
        for group in _cgroups(root, controller):
            limit_and_use = [*_numbers(group / names[0]), *_numbers(group / names[1])]
            if len(limit_and_use) == 2:
                yield limit_and_use[0] - limit_and_use[1] + _statistic(group / "memory.stat", cache)


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's control groups, inner ones first: a limit holds for all groups inside its own.

    The controller is empty for version 2, where one tree has all controllers.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    tree = root / "sys/fs/cgroup" / controller
    paths = [path for _, names, path in (line.split(":", 2) for line in lines) if controller in names.split(",")]
    inner = [tree / path.lstrip("/") for path in paths]
    return [folder for group in inner for folder in (group, *group.parents) if folder.is_relative_to(tree)]


def _numbers(path: Path) -> list[int]:
    """The numbers in a file; none if there is no such file or if it says "max"."""
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []


def _statistic(path: Path, name: str) -> int:
    """The number behind a name in a file of names and numbers, 0 without it."""
    try:
        return int(dict(line.split(maxsplit=1) for line in path.read_text().splitlines()).get(name, 0))
    except (OSError, ValueError):
        return 0


def limit_threads(root: Path = Path("/")) -> None:
    """Let torch use no more threads than its container or job has processors; OMP_NUM_THREADS beats that."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else math.inf
    usable = min([here, *_cgroup_processors(root)])
    if usable < torch.get_num_threads():
        torch.set_num_threads(max(1, math.floor(usable)))


def _cgroup_processors(root: Path) -> Iterator[float]:
    """Processors that each control group of this process may use at a time, if it has a limit."""
    for group in (*_cgroups(root, ""), *_cgroups(root, "cpu")):
        share = _numbers(group / "cpu.max")  # version 2: microseconds in each period, and the period's length
        share = share or [*_numbers(group / "cpu.cfs_quota_us"), *_numbers(group / "cpu.cfs_period_us")]
        if len(share) == 2 and min(share) > 0:  # -1: no limit
            yield share[0] / share[1]


# ------------------------------------------------------------------------------ gradients compared with the CPU's


class RecordedDraws(Draws):
    """Draws that are kept, so that a second computation, on any device, can be given the same."""

    def __init__(self, generator: torch.Generator | None = None):
        super().__init__(generator)
        self.record: list[Tensor] = []

    def replay(self) -> "ReplayedDraws":
        """The same draws again, from the first on."""
        return ReplayedDraws(self.record)

    def onehot(self, probs: Tensor) -> Tensor:
        """See `Draws`; kept."""
        return self._keep(super().onehot(probs))

    def normal(self, mean: Tensor) -> Tensor:
        """See `Draws`; kept."""
        return self._keep(super().normal(mean))

    def trunc_normal(self, mean: Tensor, std: Tensor) -> Tensor:
        """See `Draws`; kept."""
        return self._keep(super().trunc_normal(mean, std))

    def subset(self, total: int, count: int, device: torch.device) -> Tensor:
        """See `Draws`; kept."""
        return self._keep(super().subset(total, count, device))

    def _keep(self, draw: Tensor) -> Tensor:
        self.record.append(draw.detach().clone())
        return draw


class ReplayedDraws(Draws):
    """Hands out recorded draws in their order."""

    def __init__(self, record: list[Tensor]):
        super().__init__()
        self.record = iter(record)

    def onehot(self, probs: Tensor) -> Tensor:
        """The next recorded draw."""
        return next(self.record).to(probs.device)

    def normal(self, mean: Tensor) -> Tensor:
        """The next recorded draw."""
        return next(self.record).to(mean.device)

    def trunc_normal(self, mean: Tensor, std: Tensor) -> Tensor:  # noqa: ARG002
        """The next recorded draw."""
        return next(self.record).to(mean.device)

    def subset(self, total: int, count: int, device: torch.device) -> Tensor:  # noqa: ARG002
        """The next recorded draw."""
        return next(self.record).to(device)


def check_gradients(agent: Dreamer, batch: Batch) -> None:
    """Failure if the agent's device is one of CHECKED, and its gradients on a batch (T, B, ...) are not the CPU's."""
    if agent.device.type not in CHECKED:
        return
    deviation, name = compare_with_cpu(agent, batch)
    if deviation > MAX_GRADIENT_DEVIATION:
        raise Failure(
            f"device {agent.device} computes wrong gradients ({name} is off by {deviation:.1g} from the CPU's): "
            "use another release of torch, or --device cpu"
        )


def compare_with_cpu(agent: Dreamer, batch: Batch) -> tuple[float, str]:
    """`gradient_deviation` of the agent's device from the CPU on a batch (T, B, ...), with equal weights and draws.

    MPS has had wrong gradients without an error (pytorch issues 153957, 175188, 177116).
    """
    with torch.random.fork_rng(devices=[]):  # to build a Dreamer draws initial weights
        reference = Dreamer(agent.config, agent.image_shape, agent.action_size)
    reference.world_model.load_state_dict(agent.world_model.state_dict())
    reference.behavior.load_state_dict(agent.behavior.state_dict())
    draws = RecordedDraws(torch.Generator().manual_seed(0))
    expected = gradients(reference, batch.to("cpu"), draws)
    return gradient_deviation(gradients(agent, batch, draws.replay()), expected)


def gradients(agent: Dreamer, batch: Batch, draws: Draws) -> dict[str, Tensor]:
    """What an update on a batch (T, B, ...) would descend: parameter name -> gradient, in float32.

    Neither a parameter nor the running range of the returns changes.
    """
    model, behavior = agent.world_model, agent.behavior
    model_loss, post, _ = model.loss(batch, draws)
    found = _gradients("world_model", model, model_loss)
    start, is_terminal = post.detach().map(lambda x: x.flatten(0, 1)), batch.is_terminal.flatten()
    range_before = behavior.return_range.clone()
    actor_loss, value_loss, _ = agent.behavior_loss(start, is_terminal, draws)
    behavior.return_range.copy_(range_before)
    return found | _gradients("actor", behavior.actor, actor_loss) | _gradients("value", behavior.value, value_loss)


def _gradients(prefix: str, module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {f"{prefix}.{name}": p for name, p in module.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
    return dict(zip(named, found, strict=True))


def gradient_deviation(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference of a gradient from its reference on the CPU, and its parameter's name.

    It is relative to the norm of the parameter's own gradient, or to a millionth of the norm of all of them if that
    is more: rounding alone decides what a gradient is that cancels to almost zero.
    """
    floor = 1e-6 * float(torch.nn.utils.get_total_norm(list(reference.values())))
    worst, where = 0.0, ""
    for name, expected in reference.items():
        difference = float((gradients[name].cpu() - expected).norm())
        deviation = difference / max(float(expected.norm()), floor, 1e-30)
        if math.isnan(deviation):
            deviation = math.inf
        if deviation > worst:
            worst, where = deviation, name
    return worst, where
