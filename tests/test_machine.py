"""The machine that a run is on: devices and precision that exist, memory and processors of its container or job."""

import ctypes
import mmap
import multiprocessing
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

import run
from buffer import Transition
from runtime import device
from runtime.console import UserError
from runtime.device import (
    M_ARENA_MAX,
    M_MMAP_THRESHOLD,
    M_TRIM_THRESHOLD,
    OtherPrograms,
    free_memory,
    keep_freed_memory,
    leave_cores,
    limit_threads,
    make_replay,
    pick_device,
    pick_precision,
    processor_seconds,
)
from tiny import tiny_config

GB = 10**9
CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
NO_LIMIT_V1 = 9223372036854771712  # what version 1 says without a limit


def exists(monkeypatch, *names: str) -> None:
    """This machine has these devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in names)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in names)


@pytest.mark.parametrize(
    ("there", "name", "found"),
    [
        (("cuda", "mps"), "auto", "cuda"),
        (("mps",), "auto", "mps"),
        ((), "auto", "cpu"),
        (("cuda",), "cpu", "cpu"),
        (("cuda", "mps"), "mps", "mps"),
    ],
)
def test_the_device_is_the_one_asked_for_or_the_fastest_there_is(there, name, found, monkeypatch):
    """Cuda before mps before the CPU."""
    exists(monkeypatch, *there)
    assert pick_device(name) == torch.device(found)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    """The line names those that are."""
    exists(monkeypatch, "mps")
    with pytest.raises(UserError, match="device cuda is not available here; valid: mps, cpu"):
        pick_device("cuda")


@pytest.mark.parametrize("native", [False, True])
def test_precision_is_low_where_the_hardware_has_it(native, monkeypatch):
    """Natively, on a GPU and on a CPU; MPS computes in float32; what is asked for is taken."""
    asked = {}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: asked.update(options) or native)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    expected = torch.bfloat16 if native else None
    assert pick_precision("auto", CUDA) == expected and asked == {"including_emulation": False}
    assert pick_precision("auto", CPU) == expected
    assert pick_precision("auto", MPS) is None
    for where in (CPU, CUDA, MPS):
        assert pick_precision("bfloat16", where) == torch.bfloat16 and pick_precision("float32", where) is None


def test_a_cpu_that_tells_nothing_computes_in_float32(monkeypatch):
    """Other processors than x86 have no such entry."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert pick_precision("auto", CPU) is None


# ------------------------------------------------------------------------------------------ memory


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that writes files below a root; this machine has 100 GB free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GB))

    def write(cgroup: str, files: dict[str, object]) -> Path:
        for name, content in {"proc/self/cgroup": cgroup, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n" if content != "" else "")
        return tmp_path

    return write


def memory_v2(group: str, limit: object, used: object) -> dict[str, object]:
    return {f"sys/fs/cgroup/{group}memory.max": limit, f"sys/fs/cgroup/{group}memory.current": used}


def memory_v1(group: str, limit: object, used: object) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory/{group}"
    return {f"{folder}memory.limit_in_bytes": limit, f"{folder}memory.usage_in_bytes": used}


V1 = "4:memory:/docker/7\n3:cpu,cpuacct:/docker/7\n1:name=systemd:/docker/7\n0::/docker/7"


@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        ("0::/", {}, 100),  # no such controller
        ("0::/", memory_v2("", 8 * GB, 3 * GB), 5),  # a container
        ("0::/", memory_v2("", "max", 3 * GB), 100),
        ("0::/", memory_v2("", 500 * GB, 3 * GB), 100),  # a limit beyond what the machine has
        ("0::/", memory_v2("", 2 * GB, 3 * GB), 0),
        ("0::/job/step", memory_v2("job/step/", "max", GB) | memory_v2("job/", 8 * GB, 2 * GB), 6),
        ("0::/job/step", memory_v2("job/step/", 4 * GB, GB) | memory_v2("job/", 8 * GB, 2 * GB), 3),
        ("0::/job/step", memory_v2("job/step/", 8 * GB, GB) | memory_v2("job/", 8 * GB, 6 * GB), 2),
        ("0::/a/b", memory_v2("a/b/", 4 * GB, GB) | memory_v2("other/", 0, 0), 3),
        (V1, memory_v1("docker/7/", 8 * GB, 3 * GB) | memory_v1("", NO_LIMIT_V1, 50 * GB), 5),
        (V1, memory_v1("", 8 * GB, 3 * GB), 5),  # a container that sees only its own groups
        (V1, memory_v1("docker/7/", NO_LIMIT_V1, 3 * GB) | memory_v1("docker/", 9 * GB, 8 * GB), 1),
        ("2:cpu:/x", memory_v1("x/", 1, 1), 100),  # not a group of this process
        ("0::/", memory_v2("", "nonsense", ""), 100),
        ("", memory_v2("", 8 * GB, 3 * GB), 100),
    ],
)
def test_free_memory_is_that_of_the_tightest_group(cgroup, files, free, machine):
    """Of both versions, nested ones included; without limits it is the machine's."""
    assert free_memory(machine(cgroup, files)) == free * GB


@pytest.mark.parametrize(
    ("cgroup", "files", "stat"),
    [
        ("0::/", memory_v2("", 8 * GB, 7 * GB), "sys/fs/cgroup/memory.stat"),
        (V1, memory_v1("docker/7/", 8 * GB, 7 * GB), "sys/fs/cgroup/memory/docker/7/memory.stat"),
    ],
)
def test_what_was_read_from_files_is_free(cgroup, files, stat, machine):
    """A group's use includes the files that the system keeps in memory for as long as nobody needs it."""
    lines = f"anon {GB}\ninactive_file {4 * GB}\ntotal_inactive_file {4 * GB}\nactive_file {2 * GB}"
    assert free_memory(machine(cgroup, files | {stat: lines})) == 5 * GB
    assert free_memory(machine(cgroup, files | {stat: "something else"})) == GB


def test_free_memory_of_this_machine_is_plausible(tmp_path):
    """More than nothing, at most what there is; where there is no /proc, the machine's."""
    assert 0 < free_memory() <= psutil.virtual_memory().total
    assert 0 < free_memory(tmp_path) <= psutil.virtual_memory().total


def test_a_replay_lies_on_the_gpu_if_it_takes_at_most_half_of_it(monkeypatch):
    """Else in the machine's memory; what cannot be had is the user's to mend."""
    config, asked = tiny_config(capacity=100), []
    nbytes = 100 * 3 * 8 * 8
    monkeypatch.setattr(device, "ReplayBuffer", lambda *args: asked.append(args[-1].type))
    for free in (2 * nbytes, 2 * nbytes - 1):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10 * free))
        make_replay(config, (3, 8, 8), 2, CUDA)
    make_replay(config, (3, 8, 8), 2, CPU)
    assert asked == ["cuda", "cpu", "cpu"]

    def refuse(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(device, "ReplayBuffer", refuse)
    with pytest.raises(UserError, match="capacity 100 needs 0 GB, which can't be had"):
        make_replay(config, (3, 8, 8), 2, CPU)


def test_the_replay_draws_by_the_runs_seed_and_focus():
    """Equal seeds draw equal batches, another one another; the constants of the configuration are those used."""
    batches = []
    for seed, focus in ((3, 1.0), (3, 1.0), (4, 1.0), (3, 0.0)):
        config = tiny_config(capacity=200, num_envs=1, seed=seed, replay_focus=focus)
        replay = make_replay(config, (3, 8, 8), 2, CPU)
        for row in range(150):
            replay.add(Transition(np.zeros((3, 8, 8), np.uint8), np.zeros(2, np.float32), row, row % 10 == 0, False))
            if row % 10 == 9:
                replay.finish(0, row // 10)
        batches.append(replay.sample(16, 5).reward)
    assert torch.equal(batches[0], batches[1])
    assert not any(torch.equal(batches[0], other) for other in batches[2:])
    assert batches[0].min() >= 130 > batches[3].min()  # the newest and the best two of fifteen episodes


def test_memory_metrics_are_plausible():
    """GB of RAM of this process; nothing of a GPU that is not used."""
    before = device.memory(CPU)
    assert before.keys() == {"perf/ram_gb"} and 0.05 < before["perf/ram_gb"] < 100
    held = np.frombuffer(mmap.mmap(-1, 56 * 10**7))  # the system's own: malloc may hand out what was freed before
    held[:] = 1.0
    assert device.memory(CPU)["perf/ram_gb"] - before["perf/ram_gb"] == pytest.approx(held.nbytes / GB, abs=0.05)


# ------------------------------------------------------------------------------------------ processors


@pytest.mark.parametrize(
    ("cgroup", "files", "threads"),
    [
        ("0::/", {}, 8),
        ("0::/", {"sys/fs/cgroup/cpu.max": "max 100000"}, 8),
        ("0::/", {"sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ("0::/", {"sys/fs/cgroup/cpu.max": "350000 100000"}, 3),
        ("0::/", {"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ("0::/", {"sys/fs/cgroup/cpu.max": "900000 100000"}, 8),  # more than there are
        ("0::/a/b/c", {"sys/fs/cgroup/a/b/c/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "200000 50000"}, 4),
        ("0::/a/b/c", {"sys/fs/cgroup/a/b/cpu.max": "200000 100000", "sys/fs/cgroup/a/cpu.max": "400000 100000"}, 2),
        ("0::/", {"sys/fs/cgroup/cpu.max": ""}, 8),
        (V1, {"sys/fs/cgroup/cpu/docker/7/cpu.cfs_quota_us": -1, "sys/fs/cgroup/cpu/docker/7/cpu.cfs_period_us": 1}, 8),
        (V1, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": 300000, "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000}, 3),
        (V1, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": 300000}, 8),
    ],
)
def test_threads_are_no_more_than_the_tightest_group_has_processors(cgroup, files, threads, machine, monkeypatch):
    """Of both versions, nested ones included; half a processor is one thread."""
    assert threads_after(machine(cgroup, files), monkeypatch) == threads


def test_threads_follow_the_affinity(machine, monkeypatch):
    """As schedulers and `taskset` set it."""
    assert threads_after(machine("0::/", {}), monkeypatch, affinity=3) == 3


def test_a_number_of_threads_that_was_asked_for_stays(machine, monkeypatch):
    """OMP_NUM_THREADS beats the container."""
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    root = machine("0::/", {"sys/fs/cgroup/cpu.max": "200000 100000"})
    assert threads_after(root, monkeypatch, keep=True) == 8


@pytest.mark.parametrize(
    ("device", "cores", "num_envs", "threads"),
    [("cpu", 8, 1, 7), ("cpu", 8, 6, 2), ("cpu", 2, 1, 1), ("cpu", 2, 6, 1), ("cpu", 1, 1, 0), ("cuda", 8, 1, 0)],
)
def test_environments_step_on_cores_of_their_own(device, cores, num_envs, threads, machine, monkeypatch):
    """Updates have the others, at least one; not on a GPU, and not if a number of threads was asked for."""
    root = machine("0::/", {"sys/fs/cgroup/cpu.max": "150000 100000"} if cores == 1 else {})
    before = threads_after(root, monkeypatch, affinity=max(2, cores))
    assert leave_cores(torch.device(device), num_envs, root) == threads
    assert torch.get_num_threads() == (1 if threads else before)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert leave_cores(torch.device(device), num_envs, root) == 0


def threads_after(root: Path, monkeypatch, affinity: int = 8, keep: bool = False) -> int:
    """torch's threads after `limit_threads`, on a machine with eight processors."""
    threads = [8]
    if not keep:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: threads.__setitem__(0, number))
    limit_threads(root)
    return threads[0]


def test_evaluations_have_no_more_threads_than_training(monkeypatch, capsys):
    """`--eval` in a container asks for its processors too."""
    asked = []
    monkeypatch.setattr(run, "limit_threads", lambda: asked.append(True))
    assert run.main(["--eval", "/no/such/run"]) == 2 and asked == [True]
    assert "there is no /no/such/run" in capsys.readouterr().err


def test_memory_is_kept_as_far_as_the_c_library_allows(monkeypatch):
    """Of all threads. Older ones refuse a threshold above 32 MiB, and then would keep less than without any setting."""
    told = []

    def mallopt(name, value):
        told.append((name, value))
        return int(name != M_MMAP_THRESHOLD or value <= 2**25)

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    monkeypatch.setattr(sys, "platform", "linux")
    keep_freed_memory()
    thresholds = [(M_MMAP_THRESHOLD, 2**28), (M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**31 - 1)]
    assert told == [*thresholds, (M_ARENA_MAX, 1)]


def told_of_others(monkeypatch, capsys, *, others: float, threads: int, seconds: float = 20.0, beside: int = 0) -> str:
    """What is said after so many seconds in which other programs kept so many of four cores busy."""
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    times = iter([(t, 1000 + 3 * t + others * t, 3 * t) for t in (100.0, 100.0 + seconds)])
    monkeypatch.setattr(device, "processor_seconds", lambda: next(times))
    programs = OtherPrograms()
    programs.beside = beside
    monkeypatch.setattr(device.time, "monotonic", lambda: 100.0 + seconds)
    programs.look()
    return capsys.readouterr().out


def test_programs_that_take_cores_of_its_threads_are_told(monkeypatch, capsys):
    """Once, with the number of threads that leaves them their cores."""
    words = "warning: other programs keep 1.2 of 4 cores busy, for which this run's 4 threads wait"
    said = told_of_others(monkeypatch, capsys, others=1.2, threads=4)
    assert said == f"{words}: started with OMP_NUM_THREADS=2, it may be several times as fast\n"
    assert told_of_others(monkeypatch, capsys, others=1.2, threads=4) == ""


def test_environments_that_step_meanwhile_need_a_core_too(monkeypatch, capsys):
    """Three threads and an environment have none to spare of four."""
    assert "this run's 3 threads wait" in told_of_others(monkeypatch, capsys, others=1.2, threads=3, beside=1)


@pytest.mark.parametrize(
    "case",
    [
        dict(others=0.3, threads=4),
        dict(others=1.2, threads=2),
        dict(others=0.3, threads=3, beside=1),
        dict(others=4.0, threads=1),
        dict(others=1.2, threads=4, seconds=1.0),
    ],
    ids=["hardly any", "cores to spare", "hardly any beside", "one thread", "too soon"],
)
def test_programs_that_do_no_harm_are_not_told(monkeypatch, capsys, case):
    """Where every thread has a core, or no thread waits for another one."""
    assert told_of_others(monkeypatch, capsys, **case) == ""


def test_processor_time_of_workers_is_the_runs_own():
    """Real counters: what a child of this process takes is part of its own."""
    _, machine, own = processor_seconds()
    child = multiprocessing.get_context("spawn").Process(target=sum, args=(range(10**8),))
    child.start()
    try:
        while psutil.Process(child.pid).cpu_times().user < 1:
            time.sleep(0.05)
        _, machine_later, own_later = processor_seconds()
    finally:
        child.kill()
        child.join()
    assert own_later - own >= 1 and machine_later - machine >= 0.9
    if sys.platform == "linux":  # it stays when the child has ended, but for how a sum is rounded: half a clock tick
        assert processor_seconds()[2] > own_later - 0.005
