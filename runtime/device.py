"""The machine that a run is on: device, precision, memory, other programs, and a check of a device's gradients."""

import contextlib
import ctypes
import importlib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

import fast
from buffer import Batch, ReplayBuffer
from networks import Draws
from runtime.console import Failure, UserError, warn_once
from runtime.envs import own_seed
from train import Config, Dreamer

CHECKED = ("mps",)  # devices whose gradients are compared with the CPU's before the first update
MAX_GRADIENT_DEVIATION = 1e-3  # of a GPU's gradients from the CPU's, relative
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # glibc's names for its settings
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
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
        name = "bfloat16" if native else "float32"
    return torch.bfloat16 if name == "bfloat16" else None


def load_triton() -> None:
    """Load Triton now, if torch comes with it. Torch would load it when the first optimizer is built.

    Triton's LLVM has to be loaded before Mesa's, which draws the pictures, or the process dies.
    """
    importlib.import_module("torch._dynamo")  # takes two seconds, which `--help` need not wait


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
        seed = own_seed(config.seed, 0, 2)
        return ReplayBuffer(
            config.capacity, config.num_envs, image_shape, action_size, seed, config.replay_focus, where
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
        # Bytes; larger blocks, such as the replay's, are mapped one by one. Older releases refuse more than 32 MiB.
        mallopt(M_MMAP_THRESHOLD, 2**28) or mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # bytes free at the heap's end, above which they are given back
        mallopt(M_ARENA_MAX, 1)  # other threads' heaps, such as that of updates beside steps, would not keep it


def lack_of_memory(error: Exception) -> str:
    """What an allocation that failed says of it, on a GPU or not; nothing if the error is another one."""
    sentences = str(error).split(". ")
    if isinstance(error, MemoryError):  # Python's, which may say nothing, or numpy's
        return sentences[0] or "out of memory"
    words = ("out of memory", "can't allocate memory")  # of torch's allocators
    return next((sentence for sentence in sentences if any(word in sentence for word in words)), "")


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
    free = [psutil.virtual_memory().available]
    for controller, *names, cache in CGROUP_MEMORY:
        for group in _cgroups(root, controller):
            limit_and_use = _numbers(group, names)
            if len(limit_and_use) == 2:
                taken_back = re.search(rf"^{cache} (\d+)$", _text(group / "memory.stat"), re.MULTILINE)
                free.append(limit_and_use[0] - limit_and_use[1] + int(taken_back[1] if taken_back else 0))
    return float(max(0, min(free)))


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's control groups, inner ones first: a limit holds for all groups inside its own.

    The controller is empty for version 2, where one tree has all controllers.
    """
    tree = root / "sys/fs/cgroup" / controller
    lines = (line.split(":", 2) for line in _text(root / "proc/self/cgroup").splitlines())
    inner = [tree / path.lstrip("/") for _, names, path in lines if controller in names.split(",")]
    return [folder for group in inner for folder in (group, *group.parents) if folder.is_relative_to(tree)]


def _text(path: Path) -> str:
    """What a file of the system's says; nothing if there is none, as on another system."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _numbers(folder: Path, names: Sequence[str]) -> list[int]:
    """The numbers in these files; "max" and -1, which mean no limit, are none."""
    return [int(word) for name in names for word in _text(folder / name).split() if word.isdecimal()]


class OtherPrograms:
    """Warns once if other programs take cores that this run's threads need.

    Threads of torch wait for each other after each operation, and one that has no core keeps all of them waiting. On
    two cores, one of which another program kept busy, two threads needed nine times as long for an update as one.
    """

    WINDOW = 15  # seconds, at least, over which processor time is measured

    def __init__(self) -> None:
        self.since = processor_seconds()
        self.threads = torch.get_num_threads()  # of an update
        self.beside = 0  # environments that step on cores of their own while threads work

    def look(self) -> None:
        """Warn if they took cores since the last look. To be called after an update, while threads work."""
        if time.monotonic() - self.since[0] < self.WINDOW:
            return
        now, threads, cores = processor_seconds(), self.threads, psutil.cpu_count() or 1
        seconds, busy, own = (new - old for new, old in zip(now, self.since, strict=True))
        self.since, others = now, (busy - own) / seconds
        needed = threads + self.beside + others
        if own >= 0 and threads > 1 and needed > cores + 0.5:  # elsewhere than on Linux, `own` falls when a child ends
            fewer = max(1, min(threads - 1, int(cores - others)))
            taken = f"other programs keep {others:.1f} of {cores} cores busy"
            cure = f"started with OMP_NUM_THREADS={fewer}, it may be several times as fast"
            warn_once("others", f"{taken}, for which this run's {threads} threads wait: {cure}")


def processor_seconds() -> tuple[float, float, float]:
    """The clock, and processor time: that of all programs, and that of this one with its workers."""
    machine, own = psutil.cpu_times(), 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has just ended
            own += sum(process.cpu_times()[:4])  # with that of its children that have ended, which only Linux knows
    return time.monotonic(), machine.user + machine.system + getattr(machine, "nice", 0.0), own


def limit_threads(root: Path = Path("/")) -> None:
    """Let torch use no more threads than its container or job has processors; OMP_NUM_THREADS beats that."""
    if "OMP_NUM_THREADS" not in os.environ and usable_cores(root) < torch.get_num_threads():
        torch.set_num_threads(max(1, math.floor(usable_cores(root))))


def leave_cores(device: torch.device, num_envs: int, root: Path = Path("/")) -> int:
    """Leave cores to environments, so that they step in processes of their own while the agent learns.

    Returns how many threads the other cores have for updates, at least one. The calling thread, which acts meanwhile,
    keeps only itself: torch would give it as many once more. 0 if nothing is left: on a single core, where a GPU
    learns, and if OMP_NUM_THREADS is set.
    """
    cores = math.floor(usable_cores(root))
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ or cores < 2:
        return 0
    threads = max(1, min(torch.get_num_threads(), cores - num_envs))
    torch.set_num_threads(1)
    return threads


def usable_cores(root: Path = Path("/")) -> float:
    """Processors that this process may use: the machine's, or those of its container or job if they are fewer."""
    usable: list[float] = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for group in (*_cgroups(root, ""), *_cgroups(root, "cpu")):
        names = ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")  # of version 2, and two files of version 1
        quota_and_period = _numbers(group, names)  # microseconds
        if len(quota_and_period) == 2:
            usable.append(quota_and_period[0] / quota_and_period[1])
    return min(usable)


class RecordedDraws(Draws):
    """Draws that are kept, or kept ones handed out again: to a second computation, on any device."""

    def __init__(self, generator: torch.Generator | None = None, record: list[Tensor] | None = None):
        super().__init__(generator)
        self.record: list[Tensor] = []
        self.again = None if record is None else iter(record)

    def replay(self) -> "RecordedDraws":
        """The same draws again, from the first on."""
        return RecordedDraws(record=self.record)

    def onehot(self, probs: Tensor) -> Tensor:
        return self._draw(probs.device, super().onehot, probs)

    def normal(self, mean: Tensor) -> Tensor:
        return self._draw(mean.device, super().normal, mean)

    def trunc_normal(self, mean: Tensor, std: Tensor) -> Tensor:
        return self._draw(mean.device, super().trunc_normal, mean, std)

    def subset(self, total: int, count: int, device: torch.device) -> Tensor:
        return self._draw(device, super().subset, total, count, device)

    def _draw(self, device: torch.device, draw: Callable[..., Tensor], *args: Any) -> Tensor:
        if self.again is not None:
            return next(self.again).to(device)
        self.record.append(draw(*args).detach())
        return self.record[-1].clone()


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
    draws = RecordedDraws(torch.Generator().manual_seed(0))
    expected = gradients(_twin(agent, "cpu"), batch.to("cpu"), draws)
    twin = _twin(agent, agent.device)
    if agent.device.type in CHECKED:
        fast.speed_up(twin)  # what trains there is what is checked
    return gradient_deviation(gradients(twin, batch, draws.replay()), expected)


def _twin(agent: Dreamer, device: torch.device | str) -> Dreamer:
    """An agent with equal weights, in float32: what is done to it does not reach the first one."""
    with torch.random.fork_rng(devices=[]):  # to build a Dreamer draws initial weights
        twin = Dreamer(agent.config, agent.image_shape, agent.action_size, device)
    twin.load_state_dict(agent.state_dict())
    return twin


def gradients(agent: Dreamer, batch: Batch, draws: Draws) -> dict[str, Tensor]:
    """What an update on a batch (T, B, ...) would descend, by parameter; it also stays in the agent."""
    agent.draws = draws
    post, _ = agent.model_gradients(batch)
    agent.behavior_gradients(*agent._starts(post, batch.is_terminal))
    networks = nn.ModuleDict({"world_model": agent.world_model, "behavior": agent.behavior})
    return {name: p.grad for name, p in networks.named_parameters() if p.grad is not None}


def gradient_deviation(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference of a gradient from its reference on the CPU, and its parameter's name.

    It is relative to the norm of the parameter's own gradient, or to a millionth of the norm of all of them if that
    is more: rounding alone decides what a gradient is that cancels to almost zero.
    """
    floor = max(1e-30, 1e-6 * float(torch.nn.utils.get_total_norm(list(reference.values()))))
    off = [float((gradients[name].cpu() - x).norm()) / max(float(x.norm()), floor) for name, x in reference.items()]
    return max(zip([math.inf if math.isnan(x) else x for x in off], reference, strict=True))
