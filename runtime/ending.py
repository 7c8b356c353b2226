"""How a command ends: its exit code, and what is said of a run that is over."""

import contextlib
import multiprocessing
import shlex
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fast
from runtime import cli
from runtime.checkpoint import Checkpointer, RunFolder
from runtime.collect import Collector
from runtime.console import Failure, Stopped, UserError, say, tolerant_output
from runtime.device import lack_of_memory
from runtime.evaluate import Evaluator, check_complete, write_left_policy
from runtime.logger import Logger
from train import Config, Dreamer


@contextlib.contextmanager
def outcome() -> Iterator[SimpleNamespace]:
    """Say in one line what ends the command inside, and note its exit code."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)  # a spawned worker has imported an unguarded script, which calls `main` again: the parent says so
    outcome = SimpleNamespace(exit_code=0)
    with tolerant_output():
        try:
            yield outcome
        except (UserError, Failure, fast.CaptureError) as error:
            print(f"error: {error}", file=sys.stderr)
            outcome.exit_code = 2 if isinstance(error, UserError) else 1
        except (RuntimeError, MemoryError) as error:
            if not (reason := lack_of_memory(error)):
                raise
            print(f"error: {reason}: a smaller --batch_size or --imagine_starts takes less", file=sys.stderr)
            outcome.exit_code = 1
        except Stopped as stop:
            outcome.exit_code = 128 + stop.args[0]
        except KeyboardInterrupt:  # before or after training, which has its own handler
            say("stopped by SIGINT")
            outcome.exit_code = 130


def is_over(folder: RunFolder, state: dict[str, Any] | None, config: Config) -> bool:
    """Whether the run of a checkpoint has all its steps; says from where it goes on, or that it is finished.

    Raises UserError if it can't go on with this configuration, and Failure if part of a finished one is missing.
    """
    if state is None:
        return False
    over = state["step"] >= config.steps
    changes = cli.check_same_run(folder.path, state["config"], config)
    if not over:
        say(f"resumed {folder.loaded} at step {state['step']}")
        for change in changes:
            say(f"changed since the checkpoint: {change}")
        return False
    say(f"finished: {folder.path} has its {state['step']} steps; --steps extends it")
    _check_learned(state["agent"]["updates"], state["step"])
    write_left_policy(folder.path, state["evaluator"])
    check_complete(state["evaluator"]["incomplete"])
    return True


def finish(
    collector: Collector, agent: Dreamer, evaluator: Evaluator, checkpointer: Checkpointer, logger: Logger
) -> None:
    """Say what a run gave, and where it is. Failure if part of that is missing."""
    _check_learned(agent.updates, collector.step)
    if checkpointer.saved_step < collector.step or evaluator.unwritten:
        raise Failure(f"the last checkpoint or policy.pt of {logger.run_dir} was not written: see the warnings above")
    say(f"done: {collector.step} steps, {collector.episode} episodes, {agent.updates} updates")
    folder, evaluated = shlex.quote(str(logger.run_dir)), evaluator.best_step >= 0
    if evaluated:
        say(f"best evaluation return {evaluator.best:.1f}, best success rate {evaluator.best_success:.0%}")
    say(f"  numbers  {folder}/metrics.jsonl")
    say(f"  videos   {folder}/videos")
    say(f"  curves   python run.py --report {folder}")
    if evaluated:
        say(f"  policy   python {shlex.quote(sys.argv[0])} --eval {folder}")  # a script of the user's knows its tasks
    if logger.wandb:
        say(f"  W&B      {f'wandb leet {folder}/wandb' if logger.wandb.offline else logger.wandb.url}")
    check_complete(evaluator.incomplete)


def _check_learned(updates: int, step: int) -> None:
    """Failure if a run has ended before its first update."""
    if not updates:
        raise Failure(f"no update was made: {step} steps are hardly more than the prefill; give more --steps")
