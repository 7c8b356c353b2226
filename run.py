"""Train DreamerV2 on RoboSuite, evaluate what it learned, or draw its curves: see `python run.py --help`.

`train` builds the parts (environments, world model, actor, critic, replay) and then alternates three things: it
collects one agent step in each environment, updates the world model on replayed sequences, and updates actor and critic
in rollouts that the world model imagines. Where an episode ends, it looks (metrics, evaluation, videos) and saves.
"""

import contextlib
import dataclasses
import functools
import signal
import sys
import time
from typing import Any, NamedTuple

import torch

import fast
from buffer import ReplayBuffer
from env import make_env as make_robosuite_env
from runtime import cli, ending
from runtime.checkpoint import Checkpointer, GlobalGenerators, ReplayFiles, RunFolder
from runtime.collect import Collector, UpdateRatio
from runtime.console import ProgressBar, Stopped, StopSignals, say
from runtime.device import (
    check_gradients,
    keep_freed_memory,
    leave_cores,
    limit_threads,
    load_triton,
    make_replay,
    pick_device,
    pick_precision,
)
from runtime.envs import EnvFailure, check_spaces, close_envs, make_envs
from runtime.evaluate import Evaluator, MakeEnv, evaluate_policy
from runtime.learn import BesideSteps
from runtime.logger import Logger, Meter, Stopwatch, pick_wandb_mode
from runtime.report import write_report
from train import Config, Dreamer


def main(argv: list[str] | None = None, make_env: MakeEnv = make_robosuite_env) -> int:
    """Train, evaluate or report; returns the exit code. `make_env` builds an environment from Config's fields."""
    with ending.outcome() as outcome:
        command = cli.parse(sys.argv[1:] if argv is None else argv)
        limit_threads()
        if command.eval is not None:
            evaluate_policy(command.eval, command.given, make_env)
        elif command.report:
            say(f"report {write_report(command.report)}")
        else:
            train(command.config, command.given, make_env)
    return outcome.exit_code


def train(config: Config, given: dict[str, Any], make_env: MakeEnv) -> None:
    """Start or continue the run of this configuration; `given` are the constants that were flags."""
    device = pick_device(config.device)
    keep_freed_memory()
    load_triton()  # before the first picture is drawn
    with contextlib.ExitStack() as stack:
        folder = RunFolder(cli.run_dir(config))
        stack.callback(folder.release)
        state = folder.newest()
        if ending.is_over(folder, state, config):
            return
        parts = build(config, given, make_env, device, folder, state, stack)
        stack.enter_context(parts.stop)
        if parts.beside:
            stack.callback(parts.beside.close)  # inside `stop`: a second signal ends the wait for the last update
        try:
            loop(parts)
        except Stopped as stop:
            leave(parts, stop.args[0])
            raise
        except BaseException as error:  # the held state is older than the error, so it is safe to write
            parts.checkpointer.save(env_failed=isinstance(error, EnvFailure))
            raise
        ending.finish(parts.collector, parts.agent, parts.evaluator, parts.checkpointer, parts.logger)


class Parts(NamedTuple):
    """What a run is made of."""

    config: Config
    agent: Dreamer
    replay: ReplayBuffer
    collector: Collector
    ratio: UpdateRatio
    beside: BesideSteps | None
    meter: Meter
    logger: Logger
    evaluator: Evaluator
    checkpointer: Checkpointer
    watch: Stopwatch
    stop: StopSignals
    bar: ProgressBar


def build(
    config: Config,
    given: dict[str, Any],
    make_env: MakeEnv,
    device: torch.device,
    folder: RunFolder,
    state: dict[str, Any] | None,
    stack: contextlib.ExitStack,
) -> Parts:
    """Build the parts of a run, in the state of a checkpoint if there is one; `stack` closes them."""
    generators = GlobalGenerators(device)
    generators.seed(config.seed)
    threads = leave_cores(device, config.num_envs)  # of updates that are made beside the steps, if they are
    envs = make_envs(cli.training_options(config), config.num_envs, config.seed, make_env, apart=threads > 0)
    stack.callback(close_envs, envs)
    image_shape, action_size = check_spaces(envs, config.task, len(config.cameras), config.image_size)
    dtype, gripper = pick_precision(config.precision, device), bool(envs.metadata.get("gripper"))
    agent = Dreamer(config, image_shape, action_size, device, dtype, gripper)
    fast.speed_up(agent)
    replay = make_replay(config, image_shape, action_size, device)
    watch, stop = Stopwatch(), StopSignals()
    ratio, meter = UpdateRatio(config, replay), Meter(agent, replay, watch)
    beside = BesideSteps(agent, replay, meter, watch, stop, threads) if threads else None
    collector = Collector(config, envs, agent, replay, watch, stop, beside)

    wandb_mode = pick_wandb_mode(config.wandb)
    cli.preflight(config, given, folder.path, agent, envs, replay, wandb_mode, threads)
    folder.claim(config)
    logger = Logger(folder.path, dataclasses.asdict(config), wandb_mode[0], state["logger"] if state else None)
    stack.push(lambda error, *_: logger.close(failed=error is not None))
    bar = ProgressBar(config.steps, state["step"] if state else 0)
    stack.callback(bar.close)
    evaluator = Evaluator(config, agent, make_env, logger, watch, stop, bar, apart=threads > 0)
    stack.callback(evaluator.close)
    saved: dict[str, Any] = {"collector": collector, "ratio": ratio, "meter": meter, "evaluator": evaluator}
    files = ReplayFiles(folder.path, replay, config.save_replay)
    checkpointer = Checkpointer(config, agent, files, logger, generators, threads, **saved)
    if state is not None:
        checkpointer.restore(state)
    else:
        checkpointer.hold(0, -1, last=False)  # for a stop or an error before the first episode has ended
    if beside:
        beside.wait()  # so that a restored policy acts
    p = Parts(config, agent, replay, collector, ratio, beside, meter, logger, evaluator, checkpointer, watch, stop, bar)
    stop.leave = functools.partial(leave, p)
    return p


def loop(p: Parts) -> None:
    """Collect, learn, look and save until `steps`."""
    config, collector = p.config, p.collector
    overlap = overlaps(config.num_envs, p.agent.device)
    p.bar.show("train" if p.agent.updates and p.ratio.prefilled else "prefill")
    p.meter.start(collector.step)
    while collector.step < config.steps:
        # collect one agent step in each environment
        collector.act()
        if not overlap:
            collector.observe()
        p.bar.move(collector.step)

        # learn; where there are cores for it, or a GPU, workers step meanwhile
        pretraining, updates = not p.ratio.pretrained, p.ratio.due()
        p.bar.show_learning(updates, first=pretraining)
        if p.beside:
            p.beside.learn(updates)
        else:
            for _ in range(updates):
                with p.watch("update"):
                    batch = p.replay.sample(config.batch_size, config.batch_length).to(p.agent.device)
                    if p.meter.is_new:
                        check_gradients(p.agent, batch)  # MPS has had wrong ones: there, compare them with a CPU's
                    p.meter.add(p.agent.train_step(batch))
                p.stop.check()
        if overlap:
            collector.observe()
        p.stop.check()

        # look and save, where an episode has ended
        ended = collector.finish_episodes()
        for figures in ended:
            p.logger.scalars(collector.step, {f"episode/{name}": value for name, value in figures.items()})
        if ended or collector.step >= config.steps:
            if p.beside:
                p.beside.wait()
            p.bar.show_episodes(collector.describe_recent())
            look(p)
            save(p)
            collector.check_faults()


def overlaps(num_envs: int, device: torch.device) -> bool:
    """Whether workers make their step while a GPU makes the updates that are due. On a CPU, see `BesideSteps`."""
    return num_envs > 1 and device.type == "cuda"


def look(p: Parts) -> None:
    """Log metrics and evaluate, each if it is due. Nothing here changes what training does."""
    step, over = p.collector.step, p.collector.step >= p.config.steps
    if p.meter.due(step, 0 if over else p.config.log_every):
        p.logger.scalars(step, p.meter.line(step))
    if p.evaluator.due(step, solved=p.collector.solved == 1.0):
        p.evaluator.evaluate(step)


def save(p: Parts) -> None:
    """Hold the state in memory, for a stop at any moment, and write it if that is due."""
    step, over = p.collector.step, p.collector.step >= p.config.steps
    with p.watch("save"):
        p.evaluator.write_policy()
        p.checkpointer.hold(step, p.evaluator.best_step, over)
        waited = time.monotonic() - p.checkpointer.saved_at >= 60 * p.config.checkpoint_minutes
        if over or waited or p.evaluator.best_step == step:  # the checkpoint of the best evaluation stays on the disk
            p.checkpointer.save()


def leave(p: Parts, number: int) -> None:
    """Save, and say what stopped the run and from where it continues."""
    p.checkpointer.save()
    saved = p.checkpointer.saved_step
    where = f"from step {saved}" if saved >= 0 else "from its beginning"
    say(f"stopped by {signal.Signals(number).name}; the same command continues {where}")


if __name__ == "__main__":
    sys.exit(main())
