"""Environments of a run: built anew after a fault, in worker processes if there are several, checked before use."""

import functools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

from env import make_env as make_robosuite_env
from fake_env import FakeEnv
from runtime import envs
from runtime.cli import env_options
from runtime.console import Failure, UserError
from runtime.envs import RebuildingEnv, check_spaces, close_envs, make_envs, make_vector_env
from train import Config

ROOT = Path(__file__).parent.parent
OPTIONS = {"cameras": ("agentview",), "image_size": 16, "action_repeat": 1, "episode_steps": 20}
NOTHING = np.zeros(4, np.float32)


class Faulty(FakeEnv):
    """Gives a wrong answer, or raises, at some of its steps and resets, counted over all that one plan has built."""

    def __init__(self, *, seed=0, plan, **options):
        super().__init__(seed=seed, **(OPTIONS | options))
        self.plan = plan
        plan["built"] = plan.get("built", 0) + 1

    def reset(self, **kwargs):
        self.plan["resets"] = self.plan.get("resets", 0) + 1
        self.plan["seed"] = kwargs.get("seed")
        answer = super().reset(**kwargs)
        return self._answer(self.plan.get("reset", {}).get(self.plan["resets"]), *answer)

    def step(self, action):
        self.plan["steps"] = self.plan.get("steps", 0) + 1
        answer = super().step(action)
        return self._answer(self.plan.get("step", {}).get(self.plan["steps"]), *answer)

    def close(self):
        if self.plan.get("unclosable"):
            raise OSError("it is broken")

    @staticmethod
    def _answer(fault, image, *rest):
        if isinstance(fault, BaseException):
            raise fault
        return fault(image, *rest) if fault else (image, *rest)


def rebuilding(**plan) -> tuple[RebuildingEnv, dict]:
    return RebuildingEnv(functools.partial(Faulty, plan=plan)), plan


FAULTS = {
    "exception": (RuntimeError("simulation\nunstable"), "RuntimeError: simulation unstable (test_envs.py:"),
    "float image": (lambda x, *rest: (x.astype(float), *rest), "an image of float64 (3, 16, 16), not of uint8"),
    "small image": (lambda x, *rest: (x[:, 1:], *rest), "an image of uint8 (3, 15, 16), not of uint8 (3, 16, 16)"),
    "no image": (lambda x, *rest: (None, *rest), "AttributeError"),
    "no info": (lambda *answer: (*answer[:-1], None), "an info of NoneType, not a dict"),
}
STEP_FAULTS = FAULTS | {
    "NaN": (lambda x, r, *rest: (x, float("nan"), *rest), "a reward of nan"),
    "infinite": (lambda x, r, *rest: (x, np.float64("-inf"), *rest), "a reward of -inf"),
    "no reward": (lambda x, r, *rest: (x, None, *rest), "TypeError"),
    "an answer of two": (lambda *answer: answer[:2], "ValueError: not enough values to unpack"),
}


@pytest.mark.parametrize("name", STEP_FAULTS)
def test_a_fault_of_a_step_ends_the_episode(name):
    """The last image once more, no reward, truncated, and one line that says what and where; then it goes on."""
    fault, words = STEP_FAULTS[name]
    env, plan = rebuilding(step={3: fault})
    env.reset()
    for _ in range(2):
        image, *_ = env.step(NOTHING)
    again, reward, terminated, truncated, info = env.step(NOTHING)
    assert np.array_equal(again, image) and (reward, terminated, truncated) == (0.0, False, True)
    assert info["success"] is False and words in info["env_error"] and "\n" not in info["env_error"]
    assert plan["built"] == 2
    _, info = env.reset()
    assert "env_error" not in info and "env_error" not in env.step(NOTHING)[-1]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_reset_is_followed_by_other_draws(name):
    """In an environment that was built anew, without the seed; the episode's info tells what happened."""
    fault, words = FAULTS[name]
    env, plan = rebuilding(reset={1: fault})
    image, info = env.reset(seed=7)
    assert words in info["env_error"] and "\n" not in info["env_error"]
    assert plan["built"] == 2 and plan["seed"] is None
    assert not np.array_equal(image, rebuilding()[0].reset(seed=7)[0])
    again, _ = rebuilding(reset={1: fault})[0].reset(seed=7)
    assert np.array_equal(image, again)


def test_an_environment_gets_a_copy_of_the_action():
    """It may change its own; what the agent chose stays for the replay."""

    class Scales(FakeEnv):
        def step(self, action):
            action *= 0.1
            return super().step(action)

    env, action = RebuildingEnv(lambda: Scales(seed=0, **OPTIONS)), np.ones(4, np.float32)
    env.reset()
    env.step(action)
    assert (action == 1).all()


def test_a_film_is_made_of_copies():
    """Frames may all be drawn into one array."""

    class OneArray(FakeEnv):
        canvas = np.zeros((64, 64, 3), np.uint8)

        def render(self):
            self.canvas += 1
            return self.canvas

    env = RebuildingEnv(lambda: OneArray(seed=0, **OPTIONS))
    env.reset(seed=5)
    assert [int(frame.max()) for frame in [env.frame(5), env.frame(5)]] == [1, 2]


def test_an_environment_that_is_built_anew_with_other_images_is_broken():
    """Not one whose images reach the replay."""
    sizes = iter((16, *[32] * 20))
    env = RebuildingEnv(lambda: Faulty(plan={"step": {1: OSError("gone")}}, image_size=next(sizes)))
    env.reset()
    assert "OSError" in env.step(NOTHING)[-1]["env_error"]
    assert "an image of uint8 (3, 32, 32), not of uint8 (3, 16, 16)" in env.reset()[1]["broken"]


def test_resets_that_keep_failing_break_the_environment():
    """After RESET_TRIES of them; the last one's error is named. One fewer is survived."""
    failing = {n: OSError(f"not now {n}") for n in range(1, envs.RESET_TRIES + 1)}
    env, plan = rebuilding(reset=failing)
    broken = env.reset()[1]["broken"]
    assert re.match(f"{envs.RESET_TRIES} resets failed .* OSError: not now {envs.RESET_TRIES} ", broken)
    del failing[envs.RESET_TRIES]
    assert f"not now {envs.RESET_TRIES - 1}" in rebuilding(reset=failing)[0].reset()[1]["env_error"]


def test_a_rebuilt_environment_goes_on_with_its_generator():
    """Its episodes are neither the first ones again nor those of a new seed."""
    env, _ = rebuilding(step={2: RuntimeError()})
    env.reset(seed=5)
    generator = env.np_random
    env.step(NOTHING)
    expected = np.random.default_rng()
    expected.bit_generator.state = generator.bit_generator.state
    env.step(NOTHING)
    expected.normal(0, 0.01, 2)  # what the step drew before it raised
    assert env.np_random is generator
    image, _ = env.reset()
    twin = Faulty(plan={})
    twin.np_random = expected
    assert np.array_equal(image, twin.reset()[0])


def test_an_environment_that_cannot_be_closed_is_replaced_all_the_same():
    """It is broken: that is why it goes."""
    env, plan = rebuilding(step={1: RuntimeError()}, unclosable=True)
    env.reset()
    assert env.step(NOTHING)[3] and plan["built"] == 2


def test_an_environment_that_cannot_be_built_again_is_broken():
    """The first build is the caller's: what that raises passes through."""
    left = [1]

    def build():
        if not left:
            raise OSError("no more\nlicenses")
        left.pop()
        return Faulty(plan={"step": {1: RuntimeError()}})

    env = RebuildingEnv(build)
    env.reset()
    info = env.step(NOTHING)[-1]
    assert info["broken"].startswith("an environment can't be built anew: OSError: no more licenses")
    with pytest.raises(OSError, match="no more"):
        RebuildingEnv(build)


def test_between_episodes_a_step_does_nothing():
    """An episode can end while others, which step with it, go on."""
    env, plan = rebuilding()
    assert not env.step(NOTHING)[0].any()
    env.reset()
    while not env.step(NOTHING)[3]:
        pass
    steps = plan["steps"]
    assert env.step(NOTHING)[1:] == (0.0, False, True, {}) and plan["steps"] == steps == OPTIONS["episode_steps"]


@pytest.mark.parametrize("where", ["step", "reset"])
def test_a_stop_is_no_fault(where):
    """Ctrl-C inside the simulator reaches the program."""
    env, plan = rebuilding(**{where: {1: KeyboardInterrupt()}})
    with pytest.raises(KeyboardInterrupt):
        env.reset()
        env.step(NOTHING)
    assert plan["built"] == 1


# ------------------------------------------------------------------------------------------ several


def test_one_environment_lives_here_and_several_in_workers():
    """Each with a seed of its own; a fault in one is told for that one, and the other's episode goes on."""
    one = make_envs(OPTIONS, 1, 3, FakeEnv)
    assert isinstance(one, SyncVectorEnv)
    first = one.reset()[0]
    one.close()
    plan = {"step": {2: RuntimeError("only here")}}
    vector = make_vector_env([functools.partial(Faulty, seed=3, plan=plan), functools.partial(Faulty, seed=4, plan={})])
    try:
        assert isinstance(vector, AsyncVectorEnv)
        image, _ = vector.reset()
        assert np.array_equal(image[0], first[0]) and not np.array_equal(image[0], image[1])
        actions = np.stack([NOTHING, NOTHING])
        vector.step(actions)
        image, reward, terminated, truncated, info = vector.step(actions)
        assert truncated.tolist() == [True, False] and not terminated.any()
        assert info["_env_error"].tolist() == [True, False] and "only here" in info["env_error"][0]
        vector.reset(options={"reset_mask": truncated})
        assert vector.get_attr("steps") == (0, 2)
    finally:
        vector.close()


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs the signals of Unix")
def test_signals_that_reach_workers_are_the_parents_to_judge():
    """A terminal and a scheduler send them to the whole group; a worker that ended would end the run's last episode."""
    vector = make_envs(OPTIONS, 2, 0, FakeEnv)
    try:
        vector.reset()
        for process in vector.processes:
            for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
                os.kill(process.pid, getattr(signal, name))
        for _ in range(3):
            vector.step(np.stack([NOTHING, NOTHING]))
        assert all(process.is_alive() for process in vector.processes)
    finally:
        vector.close()
    assert not multiprocessing.active_children()


def build_one_and_tell(connection):
    """In a child process: whether an environment of its own leaves signals to it."""
    vector = make_envs(OPTIONS, 1, 0, FakeEnv)
    connection.send(signal.getsignal(signal.SIGINT) is not signal.SIG_IGN)
    vector.close()


def test_a_trainer_that_is_a_child_process_hears_signals():
    """A script may start its runs as processes; only workers leave signals to their parent."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=build_one_and_tell, args=(theirs,))
    child.start()
    assert ours.poll(60) and ours.recv()
    child.join()


class Slow(FakeEnv):
    """The second of several environments never answers a step, nor a close if `cameras` says so."""

    def __init__(self, *, seed, **options):
        super().__init__(seed=seed, **options)
        self.second, self.closing = seed != 0, options["cameras"] == ("closing",)

    def step(self, action):
        time.sleep(1000 * self.second)
        return super().step(action)

    def close(self):
        time.sleep(1000 * (self.second and self.closing))


@pytest.mark.parametrize("how", ["idle", "owes an answer", "killed", "closed", "hangs"])
def test_closing_waits_for_no_worker(how, monkeypatch):
    """Not for one that is dead, owes an answer or hangs; all are gone, and closing again is nothing."""
    monkeypatch.setattr(envs, "CLOSE_PATIENCE", 9.0 if how == "idle" else 2.0)
    vector = make_envs(OPTIONS | ({"cameras": ("closing",)} if how == "hangs" else {}), 2, 0, Slow)
    vector.reset()
    if how == "owes an answer":
        vector.step_async(np.stack([NOTHING, NOTHING]))
    elif how == "killed":
        vector.processes[1].kill()
        vector.processes[1].join()
    elif how == "closed":
        close_envs(vector)
    started = time.monotonic()
    close_envs(vector)
    assert how != "idle" or [process.exitcode for process in vector.processes] == [0, 0]  # they closed by themselves
    assert time.monotonic() - started < 10 and vector.closed and not multiprocessing.active_children()


def test_a_worker_that_was_killed_at_its_start_is_told_as_that():
    """Not as a fault of its generator."""
    vector = make_envs(OPTIONS, 2, 0, FakeEnv)
    vector.processes[1].kill()
    with pytest.raises(Failure, match="a worker process ended at its start"):
        check_spaces(vector, "Mine", 1, 16)
    close_envs(vector)


@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (ValueError("no such task"), UserError, r"^ValueError: no such task \(test_envs.py:\d+\)$"),
        (TypeError("an unknown keyword"), UserError, r"^TypeError: an unknown keyword \(test_envs.py:\d+\)$"),
        (RuntimeError("no OpenGL"), Failure, r"^RuntimeError: no OpenGL \(test_envs.py:\d+\)$"),
        (NotImplementedError(), Failure, r"^NotImplementedError: .*\(test_envs.py:\d+\)$"),
        (OSError(24, "Too many open files"), Failure, "^the environment can't be built: OSError: .*Too many open"),
    ],
)
def test_what_an_environment_refuses_when_it_is_built_is_told_in_one_line(raised, expected, words, num_envs):
    """A wrong value is the user's to mend, a machine that can't render is a failure."""

    def refuse(**_):
        raise raised

    with pytest.raises(expected, match=words):
        make_envs(OPTIONS, num_envs, 0, refuse)


def test_what_env_py_refuses_is_told_in_its_own_words():
    """They name the field, the value and what is valid: where that was found is of no use."""
    with pytest.raises(UserError, match=r"^control_freq=15: must divide the physics rate of 500 Hz: use one of 1, 2"):
        make_envs(env_options(Config()) | {"control_freq": 15}, 1, 0, make_robosuite_env)


def test_environments_of_neighboring_seeds_differ():
    """The first has the run's seed; no other has one of another run's."""

    def seeds_of(seed):
        vector, seeds = make_envs(OPTIONS, 3, seed, FakeEnv), []
        seeds = [rng.integers(2**32) for rng in vector.get_attr("np_random")]
        close_envs(vector)
        return seeds

    found = seeds_of(0) + seeds_of(1)
    assert len(set(found)) == 6 and found[3] == np.random.default_rng(1).integers(2**32)


def test_spaces_that_the_agent_can_use_give_its_sizes():
    """(C, H, W) of all cameras, and the number of actions."""
    vector = make_envs(OPTIONS | {"cameras": ("a", "b")}, 1, 0, FakeEnv)
    assert check_spaces(vector, "Mine", 2, 16) == ((6, 16, 16), 4)
    vector.close()


@pytest.mark.parametrize(
    ("images", "actions", "words"),
    [
        ((0, 1, (3, 16, 16), np.float32), (-1, 1), "its images float32 (3, 16, 16) are not uint8 (3, 16, 16)"),
        ((0, 255, (16, 16, 3), np.uint8), (-1, 1), "its images uint8 (16, 16, 3) are not uint8 (3, 16, 16)"),
        ((0, 255, (3, 16, 16), np.uint8), (-2, 1), "its action space Box(-2.0, 1.0, (4,), float32) is not a Box"),
        ((0, 255, (3, 16, 16), np.uint8), (-1, 1, ()), "its action space Box(-1.0, 1.0, (), float32) is not a Box"),
        ((0, 255, (3, 16, 16), np.uint8), (-1, 1, (2, 3)), "(2, 3), float32) is not a Box in [-1, 1] of one axis"),
        ((0, 255, (3, 16, 16), np.uint8), None, "its action space Discrete(3) is not a Box in [-1, 1]"),
    ],
)
def test_spaces_that_the_agent_cannot_use_are_refused(images, actions, words):
    """One line names the task and what is wrong."""

    class Other(FakeEnv):
        def __init__(self, **options):
            super().__init__(**options)
            low, high, shape, dtype = images
            self.observation_space = gymnasium.spaces.Box(low, high, shape, dtype)
            box = gymnasium.spaces.Box
            low, high, *shape = actions or (0, 0)
            self.action_space = (
                box(low, high, *shape or [(4,)], np.float32) if actions else gymnasium.spaces.Discrete(3)
            )

    vector = make_envs(OPTIONS, 1, 0, Other)
    with pytest.raises(UserError) as error:
        check_spaces(vector, "Mine", 1, 16)
    assert str(error.value).startswith("task Mine: ") and words in str(error.value)
    vector.close()


@pytest.mark.parametrize(
    ("metadata", "generator", "words"),
    [
        ({"gripper": True, "moves": 4}, np.random.Generator, "metadata moves 4 must be 0 to 3"),
        ({"gripper": False, "moves": 5}, np.random.Generator, "metadata moves 5 must be 0 to 4"),
        ({"gripper": True, "moves": "all"}, np.random.Generator, "metadata moves 'all' must be 0 to 3"),
        ({}, lambda _: np.random.RandomState(0), "its np_random is no np.random.Generator"),
        ({}, lambda _: np.random, "its np_random is no np.random.Generator"),
    ],
)
def test_metadata_and_generators_that_the_collector_cannot_use_are_refused(metadata, generator, words):
    """Before training: held commands would move an action that is not there, and no state could be saved."""

    class Other(FakeEnv):
        def __init__(self, **options):
            super().__init__(**options)
            self.metadata = FakeEnv.metadata | metadata
            self.np_random = generator(np.random.PCG64(0))

    vector = make_envs(OPTIONS, 1, 0, Other)
    with pytest.raises(UserError, match=words):
        check_spaces(vector, "Mine", 1, 16)
    vector.close()


def test_workers_need_no_torch():
    """What they import to build environments costs neither its memory nor its seconds."""
    code = "import sys, runtime.envs, env; print({'torch', 'train', 'buffer', 'robosuite', 'wandb'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stderr


# ------------------------------------------------------------------------------------------ workers and main scripts

HEAD = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
"""
UNGUARDED = """
import run
from faults import TINY
from fake_env import FakeEnv

sys.exit(run.main([*TINY.split(), "--num_envs", "2", "--run_dir", "there", "--wandb", "disabled"], FakeEnv))
"""
LIGHT = """
import functools, pathlib, psutil, torch
from fake_env import FakeEnv
import runtime.envs

if __name__ == "__main__":
    runtime.envs.RUN = pathlib.Path(sys.argv[1]).resolve()
    build = functools.partial(FakeEnv, cameras=("a",), image_size=64, action_repeat=1, episode_steps=5, seed=0)
    envs = runtime.envs.make_vector_env([build, build])
    for process in envs.processes:
        maps = pathlib.Path(f"/proc/{process.pid}/maps").read_text()
        print("libtorch" in maps, psutil.Process(process.pid).memory_info().rss / 1e6)
    assert __file__ and sys.modules["__main__"].__file__ == __file__
    envs.close()
"""


def script(folder, text: str, *argv: str) -> subprocess.CompletedProcess:
    """A user's script, run in a folder of its own."""
    path = folder / "script.py"
    path.write_text(HEAD + text)
    command = [sys.executable, str(path), *argv]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_script_without_its_guard_ends_in_one_line_that_names_it(tmp_path):
    """Workers import the script again, which would start workers of its own."""
    done = script(tmp_path, UNGUARDED)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and 'if __name__ == "__main__":' in done.stderr
    assert not (tmp_path / "there").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("is_run", [True, False])
def test_workers_of_the_program_import_no_torch(is_run, tmp_path):
    """Those of a user's script import it again, and what it imports: it may register a task."""
    done = script(tmp_path, LIGHT, str(tmp_path / ("script.py" if is_run else "other.py")))
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [str(not is_run)] * 2
    assert is_run == all(float(row[1]) < 150 for row in rows), rows


def test_only_a_worker_that_ended_is_told_of_the_main_guard():
    """An environment in this process may well use connections of its own: what it raises is told."""

    def no_server(**_):
        raise ConnectionRefusedError("the simulator does not answer")

    with pytest.raises(Failure, match="ConnectionRefusedError: the simulator does not answer"):
        make_envs({}, 1, 0, no_server)
