"""What only an NVIDIA GPU can show; without pytest: PYTHONPATH=.:tests python -m unittest tests/test_cuda.py"""

import contextlib
import unittest
from dataclasses import replace

import numpy as np
import torch

from buffer import ReplayBuffer, Transition
from fake_env import FakeEnv
from fast import speed_up
from runtime.cli import env_options
from runtime.collect import Collector
from runtime.console import StopSignals
from runtime.device import compare_with_cpu, make_replay
from runtime.envs import check_spaces, close_envs, make_envs
from runtime.logger import Stopwatch
from tiny import ACTION_SIZE, random_batch, tiny_config, tiny_dreamer
from train import Config, Dreamer

UPDATES = 8


def train(config: Config, **kwargs) -> tuple[Dreamer, list[dict[str, torch.Tensor]]]:
    """An agent after some updates on the GPU, and their metrics."""
    agent = tiny_dreamer(config, device="cuda", **kwargs)
    speed_up(agent)
    metrics = [agent.train_step(random_batch(config, seed).to("cuda")) for seed in range(UPDATES)]
    return agent, metrics


def weights(agent: Dreamer) -> torch.Tensor:
    modules = agent.world_model, agent.behavior
    return torch.cat([x.flatten() for module in modules for x in module.state_dict().values()])


@unittest.skipUnless(torch.cuda.is_available(), "there is no NVIDIA GPU")
class TestCUDA(unittest.TestCase):
    configs = (
        tiny_config(target_every=3),
        tiny_config(decode_fraction=0.5, imagine_starts=7, return_norm=True, reward_norm=True, discount_head=False),
        tiny_config(actor_grad="both", classes=0),
    )

    def test_gradients_equal_those_of_the_cpu(self):
        """In float32, no parameter's gradient differs from the CPU's by more than 0.1 % of its norm."""
        for config in self.configs:
            with self.subTest(config=config):
                agent = tiny_dreamer(config, device="cuda")
                deviation, name = compare_with_cpu(agent, random_batch(config).to("cuda"))
                print(f"largest deviation of a gradient from the CPU's: {deviation:.1e}, {name}")
                self.assertLess(deviation, 1e-3)

    def test_graphs_equal_ordinary_updates(self):
        """Updates replayed as graphs leave the weights that ordinary ones do, but for the order of sums."""
        for config in self.configs:
            with self.subTest(config=config):
                plain, _ = train(replace(config, cuda_graphs=False))
                start = weights(tiny_dreamer(config))
                graphed, _ = train(config)
                change = (weights(plain).cpu() - start).norm()
                difference = (weights(graphed) - weights(plain)).norm().cpu()
                print(f"difference between graphed and ordinary updates: {difference / change:.1e} of the change")
                self.assertGreater(float(change), 0)
                self.assertLess(float(difference / change), 0.02)

    def test_bfloat16_updates_are_finite(self):
        """Graphed updates with lowered precision learn: finite metrics, no skipped step."""
        agent, metrics = train(self.configs[0], autocast_dtype=torch.bfloat16)
        self.assertTrue(all(torch.isfinite(value) for value in metrics[-1].values()))
        self.assertEqual(sum(float(optimizer.skipped) for optimizer in agent.optimizers), 0)

    def test_adding_and_sampling_do_not_wait(self):
        """While the GPU is busy, rows are added and a batch is on its way to it, wherever the rows lie."""
        row = Transition(np.zeros((3, 64, 64), np.uint8), np.zeros(ACTION_SIZE), 0.0, True, False)
        for device in ("cpu", "cuda"):
            with self.subTest(device=device):
                replay = ReplayBuffer(100, 1, (3, 64, 64), ACTION_SIZE, seed=0, focus=0.5, device=device)
                for warm in (False, True):  # the first time, memory is allocated: as much as a busy GPU holds back
                    torch.cuda.synchronize()
                    torch.cuda._sleep(4_000_000_000)  # cycles: about two seconds
                    done = torch.cuda.Event()
                    done.record()
                    replay.add(row)
                    replay.sample(5, 3).to("cuda")
                    if warm:
                        self.assertFalse(done.query())

    def test_only_the_choice_of_an_action_waits(self):
        """While the GPU is busy, two rounds' rows are taken in, batches are drawn and updates are queued.

        As graphs: the kernels of ordinary updates are more than a GPU queues, so that the host has to wait.
        """
        with contextlib.ExitStack() as stack:
            config = tiny_config(num_envs=2, episode_steps=20)
            envs = make_envs(env_options(config), config.num_envs, config.seed, FakeEnv)
            stack.callback(close_envs, envs)
            image_shape, action_size = check_spaces(envs, config.task, len(config.cameras), config.image_size)
            agent = Dreamer(config, image_shape, action_size, "cuda")
            speed_up(agent)
            replay = make_replay(config, image_shape, action_size, agent.device)
            collector = Collector(config, envs, agent, replay, Stopwatch(), StopSignals())
            for round_ in range(16):
                collector.act()  # the one wait: the environments need the action itself
                warm = round_ >= 10  # before that, memory is allocated and graphs are captured
                if round_ >= 6:
                    torch.cuda._sleep(1_000_000_000)  # cycles: about half a second
                done = torch.cuda.Event()
                done.record()
                agent.train_step(replay.sample(config.batch_size, config.batch_length).to(agent.device))
                collector.observe()
                collector.finish_episodes()
                if warm:
                    self.assertFalse(done.query())

    def test_replay_on_the_gpu_hands_out_what_the_cpu_does(self):
        """Equal rows and seeds give equal batches wherever the rows lie."""
        config = tiny_config()
        batches = []
        for device in ("cpu", "cuda"):
            replay = ReplayBuffer(100, 1, (3, 64, 64), ACTION_SIZE, seed=0, device=device)
            rows = random_batch(config, seed=1)
            for t in range(config.batch_length):
                image, action = rows.image[t, 0].numpy(), rows.action[t, 0].numpy()
                replay.add(Transition(image, action, float(rows.reward[t, 0]), t == 0, False))
            batches.append(replay.sample(5, 3).to("cpu"))
        for ours, theirs in zip(*batches, strict=True):
            self.assertTrue(torch.equal(ours, theirs))


if __name__ == "__main__":
    unittest.main()
