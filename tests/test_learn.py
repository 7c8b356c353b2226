"""Updates beside the steps of environments: what acts meanwhile, and that timing decides nothing."""

import itertools
import multiprocessing
import random
import threading
import time
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv

import faults
import run
from faults import NoisyEnv, copies_at_each_checkpoint, difference, fingerprint
from runtime import collect, evaluate
from runtime.console import Stopped, StopSignals
from runtime.learn import THREAD, BesideSteps
from runtime.logger import Meter, Stopwatch
from tiny import random_batch, tiny_config, tiny_dreamer
from train import Dreamer


@pytest.fixture
def two_cores(monkeypatch):
    """Runs of this test learn beside the steps."""
    monkeypatch.setattr(run, "leave_cores", lambda device, num_envs: 1)


def beside_steps(agent: Dreamer, stop: StopSignals | None = None, threads: int = 1) -> BesideSteps:
    """Its replay hands out one batch after the other: `random_batch` with the seeds 0, 1, 2 and so on."""
    batches, watch = (random_batch(agent.config, seed) for seed in itertools.count()), Stopwatch()
    replay = SimpleNamespace(sample=lambda *_: next(batches))
    return BesideSteps(agent, replay, Meter(agent, replay, watch), watch, stop or StopSignals(), threads)


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_what_acts_changes_only_when_updates_were_waited_for(monkeypatch):
    """The copy stays as it was while updates are made, and then has what they made, whitening included."""
    agent = tiny_dreamer(tiny_config(image_norm="white"))
    beside, gate, step = beside_steps(agent), threading.Event(), Dreamer.train_step
    beside.wait()
    first = weights(agent.policy)
    monkeypatch.setattr(Dreamer, "train_step", lambda self, batch: (step(self, batch), gate.wait(20))[0])
    beside.learn(2)
    until = time.monotonic() + 20
    while agent.updates == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert agent.updates == 1 and beside.updates == 0
    assert difference(weights(beside.policy), first) == "" != difference(weights(agent.policy), first)
    gate.set()
    beside.wait()
    assert agent.updates == beside.updates == beside.meter.updates == 2 and beside.watch.seconds["update"] > 0
    assert difference(weights(beside.policy), weights(agent.policy)) == ""
    assert torch.equal(beside.policy.encoder.mix, agent.policy.encoder.mix) and not torch.equal(
        beside.policy.encoder.mix, first["encoder.mix"]
    )
    beside.close()


def test_updates_are_those_of_an_agent_that_learns_at_once():
    """In the order of their batches, with equal draws."""
    one, other = tiny_dreamer(tiny_config()), tiny_dreamer(tiny_config())
    batches = [random_batch(one.config, seed) for seed in range(5)]
    torch.manual_seed(3)
    for batch in batches:
        one.train_step(batch)
    beside = beside_steps(other)
    torch.manual_seed(3)
    beside.learn(4)
    assert len(beside.queue) <= BesideSteps.QUEUED + 1
    beside.learn(1)
    assert beside.updates == 4
    beside.wait()
    assert difference(one.state_dict(), other.state_dict()) == ""
    beside.close()


def test_what_an_update_raises_is_raised_where_it_is_waited_for(monkeypatch):
    """So the loop ends as it does where it learns at once."""
    beside = beside_steps(tiny_dreamer(tiny_config()))
    monkeypatch.setattr(Dreamer, "train_step", lambda *_: 1 / 0)
    beside.learn(1)
    with pytest.raises(ZeroDivisionError):
        beside.wait()
    beside.close()


@pytest.mark.parametrize("beside", [True, False])
def test_what_acts_leaves_an_updates_casts_alone(beside):
    """All threads share autocast's cache: without care, an update's sums would depend on when an action was chosen."""
    agent = tiny_dreamer(tiny_config(), autocast_dtype=torch.bfloat16)
    acting = collect.Acting(agent, gymnasium.spaces.Box(-1, 1, (4,)), 0, beside_steps(agent) if beside else None)
    if beside:
        acting.beside.wait()
    agent.updates = acting.newest.updates = 1
    weight, x, image = (
        agent.world_model.rssm.img_out.weight,
        torch.ones(1, 16),
        np.zeros((1, *agent.image_shape), np.uint8),
    )

    def cast() -> object:
        """The step of autograd in which autocast has cast the weight."""
        return torch.nn.functional.linear(x, weight).grad_fn.next_functions[1][0].next_functions[0][0]

    with agent.autocast():
        first = cast()
        assert cast() is first
        chooser = threading.Thread(target=acting.choose, args=(image, np.array([True]), np.array([False])))
        chooser.start(), chooser.join()
        assert acting.state is not None
        assert (cast() is first) == beside


@pytest.mark.parametrize("seconds", [0.5, 0.02])
def test_a_signal_ends_the_wait(seconds, monkeypatch):
    """Within the update under way, a slow one too; those that have not begun are dropped."""
    stop, made = StopSignals(), []
    beside = beside_steps(tiny_dreamer(tiny_config()), stop)

    def train_step(_, batch):
        made.append(batch)
        stop.number = 15
        time.sleep(seconds)
        return {}

    monkeypatch.setattr(Dreamer, "train_step", train_step)
    with pytest.raises(Stopped):
        beside.learn(99)
    beside.close()
    assert len(made) <= 1 + (seconds < 0.5) * BesideSteps.QUEUED


def test_no_update_follows_one_that_failed(monkeypatch):
    """Those behind it in the queue would go on with half of it, while the run saves."""
    made, beside = [], beside_steps(tiny_dreamer(tiny_config()))

    def train_step(_, batch):
        made.append(batch)
        time.sleep(0.2)
        raise MemoryError

    monkeypatch.setattr(Dreamer, "train_step", train_step)
    with pytest.raises(MemoryError):
        beside.learn(9)
    time.sleep(0.5)
    assert len(made) <= 2  # the second may have begun by then


def test_only_updates_have_several_threads(monkeypatch):
    """Torch gives each thread of a program as many as it was told there: acting would have as many once more."""
    monkeypatch.setattr(Dreamer, "train_step", lambda *_: {"threads": torch.tensor(float(torch.get_num_threads()))})
    here, beside = torch.get_num_threads(), beside_steps(tiny_dreamer(tiny_config()), threads=3)
    beside.learn(1)
    beside.wait()
    beside.close()
    assert beside.meter.totals == {"threads": 3} and torch.get_num_threads() == here != 3


@pytest.mark.parametrize("num_envs", [1, 2])
def test_a_run_learns_beside_its_steps(num_envs, two_cores, tmp_path):
    """At the exact ratio of updates to steps; its environments live in workers that end with it."""
    assert faults.train(tmp_path / "run", f"--num_envs {num_envs} --prefill 40 --steps 160 --eval_episodes 2") == 0
    state = faults.newest(tmp_path / "run")
    assert state["agent"]["updates"] == 8 + (160 - 40) // 4 and state["collector"]["step"] == 160
    assert state["versions"]["updates"] == "beside steps"
    assert not multiprocessing.active_children()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_neither_timing_nor_a_stop_changes_a_run(precision, two_cores, tmp_path, monkeypatch):
    """R1 beside steps: with slow updates, and from three checkpoints on, a run ends bit for bit as the straight one.

    So also with an environment that draws from the global generators of its process.
    """
    flags = f"--precision {precision}"
    with pytest.MonkeyPatch.context() as patch:
        copies = copies_at_each_checkpoint(patch, tmp_path)
        assert faults.train(tmp_path / "run", flags, NoisyEnv) == 0
    end = fingerprint(tmp_path / "run")
    assert end["state"]["agent"]["updates"] >= 40 and len(copies) == 8
    for copied in copies[0], copies[3], copies[6]:  # in the prefill, and before and after the replay has wrapped around
        assert faults.train(copied, flags, NoisyEnv) == 0
        assert difference(fingerprint(copied), end) == "", copied.name
    step, wait = Dreamer.train_step, random.Random(0)
    monkeypatch.setattr(Dreamer, "train_step", lambda *args: (time.sleep(0.05 * wait.random()), step(*args))[1])
    assert faults.train(tmp_path / "slow", flags, NoisyEnv) == 0
    assert difference(fingerprint(tmp_path / "slow"), end) == ""


def test_evaluations_play_two_episodes_at_once(two_cores, tmp_path, monkeypatch):
    """But never more than there are, and always in workers."""
    opened, make = [], evaluate.make_vector_env
    monkeypatch.setattr(evaluate, "make_vector_env", lambda *args: opened.append(make(*args)) or opened[-1])
    for episodes in (1, 3):
        assert faults.train(tmp_path / str(episodes), f"--eval_episodes {episodes}") == 0
    assert [envs.num_envs for envs in opened] == [1, 2]
    assert all(isinstance(envs, AsyncVectorEnv) for envs in opened)
