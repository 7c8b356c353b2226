"""Files that survive a crash: checkpoints, the replay on disk, the lock of a run folder."""

import builtins
import errno
import io
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
from buffer import ReplayBuffer, Transition
from checkpoint import CheckpointError, InUse, ReplayFiles, RunLock, load_checkpoint, save_checkpoint
from faults import Fork, flip_bit
from tiny import tiny_config, tiny_dreamer

IMAGE_SHAPE = (3, 2, 2)
OS_CALLS = ("open", "fsync", "replace", "unlink", "rename", "utime", "mkdir")


def some_state(step: int) -> dict:
    return {"progress": {"step": step}, "weights": torch.arange(500.0) + step, "names": ["a", ("b", None)]}


def saved_steps(run_dir: Path) -> list[int]:
    return [int(checkpoint.NAME.fullmatch(path.name)[1]) for path in checkpoint.list_checkpoints(run_dir)]


def add_episode(replay: ReplayBuffer, number: int, rows: int, env: int = 0, finish: bool = True) -> None:
    """Rows that carry the episode's number and their place in it."""
    for i in range(rows):
        image = np.full(IMAGE_SHAPE, (7 * number + i) % 256, np.uint8)
        replay.add(Transition(image, np.float32([number, i]), number + i / 100, i == 0, i == rows - 1), env)
    if finish:
        replay.finish(env, number)


def replay_with_files(run_dir: Path, capacity: int = 50, num_envs: int = 1) -> tuple[ReplayBuffer, ReplayFiles]:
    replay = ReplayBuffer(capacity, num_envs, IMAGE_SHAPE, 2, seed=5)
    return replay, ReplayFiles(run_dir, replay, enabled=True)


def same_batches(one: ReplayBuffer, other: ReplayBuffer, length: int = 4) -> bool:
    """Whether the next batches are equal, bit by bit."""
    other.rng.bit_generator.state = one.rng.bit_generator.state
    pairs = [(one.sample(8, length), other.sample(8, length)) for _ in range(5)]
    return all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


# ------------------------------------------------------------------------------------------ checkpoints


def test_the_last_two_checkpoints_and_the_best_are_kept(tmp_path):
    """A checkpoint at the best evaluation's step stays for as long as that evaluation is the best."""
    for step, best in ((10, -1), (20, 20), (30, 20), (40, 20), (50, 50), (60, 50), (70, 50)):
        save_checkpoint(tmp_path, step, some_state(step), best)
    assert saved_steps(tmp_path) == [70, 60, 50]
    assert load_checkpoint(tmp_path)[0]["progress"]["step"] == 70
    assert not list(tmp_path.glob(".*"))


def test_of_two_checkpoints_of_one_step_the_later_wins(tmp_path):
    """The hash in the name does not decide which is newer."""
    for value in range(6):
        path = save_checkpoint(tmp_path, 10, some_state(10) | {"value": value})
        os.utime(path, ns=(value * 10**9, value * 10**9))
        assert load_checkpoint(tmp_path)[0]["value"] == value


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how.startswith("cut"):
        path.write_bytes(data[: int(len(data) * float(how.split()[1]))])
    elif how == "no zip":
        path.write_bytes(b"x" * len(data))
    elif how == "one byte more":
        path.write_bytes(data + b"\0")
    elif how == "directory":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    "how", ["empty", "cut 0.01", "cut 0.3", "cut 0.7", "cut 0.999", "no zip", "one byte more", "directory"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(how, tmp_path):
    """Whatever happened to the newest file, the state is that of the one before."""
    for step in (10, 20):
        newest = save_checkpoint(tmp_path, step, some_state(step))
    damage(newest, how)
    state, path, damaged = load_checkpoint(tmp_path)
    assert state["progress"]["step"] == 10 and torch.equal(state["weights"], some_state(10)["weights"])
    assert path != newest and len(damaged) == 1 and newest.name in damaged[0]


def test_random_single_bit_flips_are_detected(tmp_path):
    """20 of 20 flips, anywhere in the file, headers and padding included."""
    for step in (10, 20):
        newest = save_checkpoint(tmp_path, step, some_state(step))
    good, bits = newest.read_bytes(), random.Random(0)
    for _ in range(20):
        newest.write_bytes(good)
        flip_bit(newest, bits.randrange(8 * len(good)))
        state, _, damaged = load_checkpoint(tmp_path)
        assert state["progress"]["step"] == 10 and len(damaged) == 1
    newest.write_bytes(good)
    assert load_checkpoint(tmp_path)[0]["progress"]["step"] == 20


def test_all_damaged_is_an_error_that_names_them(tmp_path):
    """Never a silent fresh start."""
    paths = [save_checkpoint(tmp_path, step, some_state(step)) for step in (10, 20)]
    for path in paths:
        flip_bit(path, 99)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path)
    assert all(path.name in str(error.value) for path in paths)


def test_damaged_newer_checkpoints_do_not_count_among_the_last_two(tmp_path):
    """They are set aside when a run goes on from an older one, so that two good ones stay."""
    for step in (10, 20, 30):
        newest = save_checkpoint(tmp_path, step, some_state(step))
    flip_bit(newest, 999)
    _, path, _ = load_checkpoint(tmp_path)
    checkpoint.cut_back(tmp_path, path)
    for step in (24, 28):
        save_checkpoint(tmp_path, step, some_state(step))
    assert saved_steps(tmp_path) == [28, 24]
    assert (tmp_path / f"{newest.name}.damaged").exists()


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_an_older_policy_acts_as_it_did(tmp_path):
    """A file that doesn't name a newer constant gets what was done before there was one, not today's default."""
    config = tiny_config()
    saved = torch.load(io.BytesIO(checkpoint.policy_file(tiny_dreamer(config).policy, config)), weights_only=True)
    for name in checkpoint.OLDER_CONSTANTS:
        del saved["config"][name]
    torch.save(saved, tmp_path / "policy.pt")
    policy, loaded = checkpoint.load_policy(tmp_path / "policy.pt")
    assert (loaded.rotation_scale, loaded.eval_steps, loaded.eval_action) == (1.0, 0, "mode")
    assert policy.eval_action == "mode"


def test_no_file_can_run_code(tmp_path):
    """A pickle with a payload, rightly named, is refused as a checkpoint, as a policy and as an episode."""
    owned = tmp_path / "owned"
    save_checkpoint(tmp_path, 10, {"progress": Payload(owned)})
    with pytest.raises(CheckpointError, match="refused"):
        load_checkpoint(tmp_path)
    torch.save({"config": Payload(owned)}, tmp_path / "policy.pt")
    with pytest.raises(CheckpointError, match="no policy"):
        checkpoint.load_policy(tmp_path / "policy.pt")

    replay, files = replay_with_files(tmp_path)
    files.folder.mkdir()
    np.savez(tmp_path / "evil.npz", reward=np.array([Payload(owned)], object))
    data = (tmp_path / "evil.npz").read_bytes()
    name = f"episode_0000000_{checkpoint._digest(data)}.npz"
    (files.folder / name).write_bytes(data)
    assert "refused" in files.restore([(name, 0, 5)], 1)[0]
    assert not owned.exists() and len(replay) == 0


def test_a_snapshot_shares_no_memory():
    """Updates after it was taken change nothing in it."""
    live = {"a": [torch.zeros(3), (torch.ones(2), 5)], "b": None}
    copy = checkpoint.snapshot(live)
    live["a"][0] += 1
    live["a"][1][0].zero_()
    assert torch.equal(copy["a"][0], torch.zeros(3)) and torch.equal(copy["a"][1][0], torch.ones(2))
    assert copy["a"][1][1] == 5 and copy["b"] is None


# ------------------------------------------------------------------------------------------ replay on disk


@pytest.mark.parametrize("episodes", [1, 3, 6, 14])
def test_a_restored_replay_samples_what_the_first_would_have(episodes, tmp_path):
    """Bit for bit, also after the ring has wrapped around into the middle of an episode, and while it goes on."""
    replay, files = replay_with_files(tmp_path)
    for number in range(episodes):
        add_episode(replay, number, 7 + number % 4)
        files.write()
    restored, again = replay_with_files(tmp_path)
    assert again.restore(files.index(), episodes) == []
    assert len(restored) == len(replay) and again.index() == files.index()
    assert same_batches(replay, restored)
    for number in range(episodes, episodes + 9):
        for one in (replay, restored):
            add_episode(one, number, 8, finish=False)
        assert same_batches(replay, restored) and len(restored) == len(replay)
        for one in (replay, restored):
            one.finish(0, number)


def test_a_restored_replay_of_several_envs_samples_the_same(tmp_path):
    """Each ring gets its own episodes back."""
    replay, files = replay_with_files(tmp_path, capacity=60, num_envs=3)
    for number in range(15):
        add_episode(replay, number, 6 + number % 5, env=number % 3)
    files.write()
    restored, again = replay_with_files(tmp_path, capacity=60, num_envs=3)
    assert again.restore(files.index(), 15) == [] and same_batches(replay, restored)


def test_running_episodes_are_left_out(tmp_path):
    """Only finished episodes are listed; those of other envs that still run are not."""
    replay, files = replay_with_files(tmp_path, num_envs=2)
    add_episode(replay, 0, 6, env=0)
    add_episode(replay, 0, 9, env=1, finish=False)
    files.write()
    assert [(env, rows) for _, env, rows in files.index()] == [(0, 6)]
    assert len(list(files.folder.iterdir())) == 1


def test_other_capacities_and_numbers_of_envs_keep_what_fits(tmp_path):
    """A smaller replay keeps the newest rows; episodes of environments that are gone go to those that are left."""
    replay, files = replay_with_files(tmp_path, num_envs=2)
    for number in range(4):
        add_episode(replay, number, 10, env=number % 2)
    files.write()
    small, again = replay_with_files(tmp_path, capacity=14)
    assert again.restore(files.index(), 4) == []
    assert len(small) == 14 and [(e.number, e.length) for e in small.episodes[0]] == [(1, 4), (3, 10)]


def test_a_file_is_deleted_only_when_the_last_two_checkpoints_need_it_no_more(tmp_path):
    """A full replay's disk is bounded, and each of the last two checkpoints finds all of its episodes."""
    replay, files = replay_with_files(tmp_path)
    indices = []
    for number in range(30):
        add_episode(replay, number, 10)
        files.write()
        indices.append((files.index(), number + 1))
        files.prune(*indices[-1])
        there = {path.name for path in files.folder.iterdir()}
        assert all(name in there for index, _ in indices[-2:] for name, _, _ in index)
        assert len(there) <= 50 // 10 + 1
    restored, again = replay_with_files(tmp_path)
    assert again.restore(*indices[-2]) == []
    assert len(restored) == 50 and {path.name for path in files.folder.iterdir()} >= {x[0] for x in indices[-2][0]}


def test_a_resume_deletes_episodes_that_came_after_the_checkpoint(tmp_path):
    """The replay never runs ahead of its checkpoint."""
    replay, files = replay_with_files(tmp_path)
    for number in range(4):
        add_episode(replay, number, 6)
        files.write()
        if number == 1:
            index = files.index()
    restored, again = replay_with_files(tmp_path)
    again.restore(index, 2)
    assert sorted(int(path.name.split("_")[1]) for path in files.folder.iterdir()) == [0, 1]
    assert [e.number for e in restored.episodes[0]] == [0, 1]


@pytest.mark.parametrize("how", ["empty", "cut 0.5", "no zip", "bit", "missing", "directory", "other shape"])
def test_a_damaged_or_missing_episode_is_skipped_and_named(how, tmp_path):
    """The others are loaded, and sampling works."""
    replay, files = replay_with_files(tmp_path)
    for number in range(4):
        add_episode(replay, number, 6)
    files.write()
    index = files.index()
    path = files.folder / index[1][0]
    if how == "missing":
        path.unlink()
    elif how == "bit":
        flip_bit(path, 4321)
    elif how == "other shape":
        np.savez(tmp_path / "other.npz", reward=np.zeros(6, np.float32), image=np.zeros((6, 3, 4, 4), np.uint8))
        data = (tmp_path / "other.npz").read_bytes()
        index[1] = (f"episode_0000001_{checkpoint._digest(data)}.npz", 0, 6)
        (files.folder / index[1][0]).write_bytes(data)
    else:
        damage(path, how)
    restored, again = replay_with_files(tmp_path)
    lost = again.restore(index, 4)
    assert len(lost) == 1 and index[1][0] in lost[0]
    assert len(restored) == 18 and [e.number for e in restored.episodes[0]] == [0, 2, 3]
    restored.sample(4, 4)


def test_an_episode_that_could_not_be_written_is_written_later(tmp_path, monkeypatch):
    """An error of the disk reaches the caller, leaves nothing half-written, and loses nothing."""
    replay, files = replay_with_files(tmp_path)
    add_episode(replay, 0, 6)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            files.write()
    assert list(files.folder.iterdir()) == []
    add_episode(replay, 1, 6)
    files.write()
    assert [int(name.split("_")[1]) for name, _, _ in files.index()] == [0, 1]


# ------------------------------------------------------------------------------------------ crashes


class CrashingFile:
    """Writes half of its data at one crash point, all of it at the next."""

    def __init__(self, file, point):
        self.file, self.point = file, point

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.point()
        self.file.write(data[len(data) // 2 :])
        self.point()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)


def crash_at(last: int, monkeypatch) -> None:
    """End this process at the `last` point before or after an open, a write or a call to the system."""
    count = 0

    def point():
        nonlocal count
        count += 1
        if count == last:
            os._exit(77)

    def around(call):
        def wrapped(*args, **kwargs):
            point()
            result = call(*args, **kwargs)
            point()
            return result

        return wrapped

    for name in OS_CALLS:
        monkeypatch.setattr(os, name, around(getattr(os, name)))
    opened = around(builtins.open)
    monkeypatch.setattr(checkpoint, "open", lambda *args: CrashingFile(opened(*args), point), raising=False)


def test_a_crash_at_any_point_of_a_save_leaves_the_old_or_the_new_state(tmp_path, monkeypatch):
    """Before and after each open, write, fsync, rename and unlink: what is found next is whole, replay included."""
    capacity = 30

    def save(step: int, run_dir: Path, replay: ReplayBuffer, files: ReplayFiles) -> None:
        add_episode(replay, step, 10)
        files.write()
        state = some_state(step) | {"replay": files.index()}
        save_checkpoint(run_dir, step, state, best_step=1)
        files.prune(state["replay"], step + 1)

    seen, point = set(), 0
    while True:
        point += 1
        run_dir = tmp_path / str(point)
        run_dir.mkdir()
        replay, files = replay_with_files(run_dir, capacity)
        for step in range(6):
            save(step, run_dir, replay, files)

        def crashing(last=point, run_dir=run_dir, replay=replay, files=files) -> int:
            crash_at(last, monkeypatch)
            save(6, run_dir, replay, files)
            return 0

        code, output = Fork(crashing).finish(20)
        assert code in (0, 77), output
        checkpoint.remove_leftovers(run_dir)
        state, _, damaged = load_checkpoint(run_dir)
        step = state["progress"]["step"]
        assert not damaged and step in (5, 6) and torch.equal(state["weights"], some_state(step)["weights"])
        restored, again = replay_with_files(run_dir, capacity)
        assert again.restore(state["replay"], step + 1) == [] and len(restored) == capacity
        seen.add(step)
        shutil.rmtree(run_dir)
        if code == 0:
            break
    print(f"\n{point - 1} points")
    assert seen == {5, 6} and point > 20


# ------------------------------------------------------------------------------------------ the lock


def test_a_run_folder_is_one_processs_until_it_ends(tmp_path):
    """A second process is refused with the first one's number; the lock goes with its process, kill -9 included."""
    ready, go = os.pipe()

    def hold():
        held = RunLock(tmp_path)
        held.acquire()
        os.write(go, b"x")
        os.read(os.pipe()[0], 1)  # waits for ever

    holder = Fork(hold)
    os.read(ready, 1)
    lock = RunLock(tmp_path)
    with pytest.raises(InUse, match=f"process {holder.pid}"):
        lock.acquire()
    os.kill(holder.pid, 9)
    assert holder.finish(5)[0] == -9
    lock.acquire()
    lock.acquire()
    lock.release()
    other = RunLock(tmp_path)
    other.acquire()
    other.release()
