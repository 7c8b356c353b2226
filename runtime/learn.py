"""Updates beside the steps of environments: in a thread, while a copy of the policy acts."""

import concurrent.futures
import contextlib
import copy
import time
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from buffer import Batch, ReplayBuffer
from runtime.console import StopSignals
from runtime.logger import Meter, Stopwatch
from train import Dreamer

THREAD = "updates"  # begins the name of the thread that makes them


class BesideSteps:
    """Makes an agent's updates in a thread, while the environments step in processes of their own.

    `policy`, which acts meanwhile, is a copy of the agent's as of the last `wait`. So a run depends on no timing, and
    goes on from the end of an episode, where all updates are waited for, bit for bit. Nothing else may read the agent
    between `learn` and `wait`.
    """

    QUEUED = 2  # updates that may wait for their turn; a run's first hundred batches need not lie in memory at once

    def __init__(
        self, agent: Dreamer, replay: ReplayBuffer, meter: Meter, watch: Stopwatch, stop: StopSignals, threads: int
    ):
        self.agent, self.replay, self.meter, self.watch, self.stop = agent, replay, meter, watch, stop
        meter.others.threads, meter.others.beside = threads, agent.config.num_envs
        self.policy = copy.deepcopy(agent.policy).requires_grad_(False)
        self.updates = 0  # that have made `policy`
        self.queue: deque[concurrent.futures.Future[tuple[dict[str, Tensor], float]]] = deque()
        self.thread = concurrent.futures.ThreadPoolExecutor(1, THREAD)
        self.thread.submit(torch.set_num_threads, threads).result()  # which holds for the calling thread

    def learn(self, updates: int) -> None:
        """Let the newest policy act, and begin so many updates on batches of what the replay holds now."""
        if updates:
            self.wait()
        for _ in range(updates):
            while len(self.queue) > self.QUEUED:
                self._take()
            batch = self.replay.sample(self.agent.config.batch_size, self.agent.config.batch_length)
            self.queue.append(self.thread.submit(self._update, batch))

    @torch.no_grad()
    def wait(self) -> None:
        """Wait until all updates are made, raise what one of them has raised, and let the newest policy act."""
        while self.queue:
            self._take()
        newest = self.agent.policy.state_dict()
        for name, value in self.policy.state_dict().items():
            value.copy_(newest[name])
        self.updates = self.agent.updates

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """To be around each use of `policy` while updates are made.

        All threads share torch's cache of what autocast has cast, and the end of an outermost autocast empties it. Then
        an update would cast a weight once more, and round the sum of its gradients in another way, at a random moment.
        Nothing of `policy` is in that cache, as it needs no gradients.
        """
        torch.autocast_increment_nesting()
        try:
            yield
        finally:
            torch.autocast_decrement_nesting()

    def close(self) -> None:
        """Drop the updates that have not begun, and wait for the one under way."""
        self.thread.shutdown(cancel_futures=True)

    def _take(self) -> None:
        """Wait for the oldest update; Stopped if a signal comes meanwhile."""
        self.stop.check()
        while not concurrent.futures.wait([self.queue[0]], timeout=0.1).done:
            self.stop.check()
        update = self.queue.popleft()
        if update.exception():
            self.close()  # the next ones would go on with half of an update
        metrics, seconds = update.result()
        self.watch.seconds["update"] += seconds
        self.meter.add(metrics)

    def _update(self, batch: Batch) -> tuple[dict[str, Tensor], float]:
        started = time.perf_counter()
        return self.agent.train_step(batch), time.perf_counter() - started
