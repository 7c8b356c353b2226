"""env.py against real RoboSuite: what an episode may depend on, and what is refused."""

import functools
import os
import pathlib
import pickle
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import env
from env import make_env
from runtime.console import UserError
from runtime.envs import make_envs
from simulated import ARGUMENTS, assert_same_episode, build, episode_from_seed, plain_reset, play

ROOT = pathlib.Path(env.__file__).parent
# ---- importing and building


def python(code, **variables):
    """Runs `code` in a fresh interpreter at the repository's root."""
    ours = ("MUJOCO_GL", "PYOPENGL_PLATFORM")
    environ = {name: value for name, value in os.environ.items() if name not in ours} | variables
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


def test_importing_env_imports_no_simulator():
    """`import env` needs no simulator, nor PyTorch in a worker, and leaves the environment variables alone."""
    result = python(
        "import os, sys; before = dict(os.environ); import env; assert dict(os.environ) == before;"
        "assert not {'robosuite', 'mujoco', 'OpenGL', 'torch', 'run', 'train'} & set(sys.modules)"
    )
    assert result.returncode == 0, result.stderr


def test_building_is_silent_and_leaves_cuda_devices_to_torch():
    """Not a word from build to exit without close(), even where CUDA_VISIBLE_DEVICES would stop RoboSuite."""
    code = (
        f"import os; from env import make_env; e = make_env(**{ARGUMENTS!r}); e.reset(); "
        "e.step(e.action_space.sample()); assert os.environ['CUDA_VISIBLE_DEVICES'] == 'GPU-1a2b'"
    )
    result = python(code, CUDA_VISIBLE_DEVICES="GPU-1a2b", MUJOCO_EGL_DEVICE_ID="0")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_make_env_can_be_pickled():
    """Spawned workers of a vector environment receive it through pickle."""
    maker = pickle.loads(pickle.dumps(functools.partial(make_env, **ARGUMENTS)))
    assert maker.func is make_env and maker.keywords == ARGUMENTS


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"task": "Lft"}, "task='Lft': unknown.*Lift.*Door"),
        ({"task": "TwoArmLift"}, "task='TwoArmLift': has two arms"),
        ({"robot": "Pandas"}, "robot='Pandas': unknown.*Panda.*Sawyer"),
        ({"robot": "Baxter"}, "robot='Baxter': has two arms"),
        ({"robot": "PandaOmron"}, "robot='PandaOmron': has a moving base"),
        ({"controller": "OSC"}, "controller='OSC'.*OSC_POSE"),
        ({"rotation_scale": -0.1}, "rotation_scale=-0.1: .*above 0"),
        ({"rotation_scale": float("nan")}, "rotation_scale=nan: .*at most 1"),
        ({"cameras": "agentview"}, "cameras: unknown 'a': use some of frontview"),
        ({"cameras": ("agentview", "sidevew")}, "cameras: unknown 'sidevew'.*frontview.*sideview"),
        ({"camera_radius": -0.1}, "camera_radius=-0.1: use 0 or more"),
        ({"camera_radius": float("nan")}, "camera_radius=nan"),
        ({"camera_radius": float("inf")}, "camera_radius=inf"),
        ({"action_repeat": 0}, "action_repeat=0, both 1 or more"),
        ({"action_repeat": -1}, "action_repeat=-1, both 1 or more"),
        ({"episode_steps": 0}, "episode_steps=0"),
        ({"episode_steps": 25}, "episode_steps=25.*action_repeat=2"),
        ({"control_freq": 15}, "control_freq=15.*500 Hz.*12.5, 20, 25"),
        ({"control_freq": 40}, "control_freq=40.*500 Hz"),
        ({"control_freq": 0}, "control_freq=0"),
        ({"control_freq": 1e10}, "control_freq=10000000000"),
        ({"control_freq": 0.02}, "control_freq=0.02"),
        ({"control_freq": 30}, "control_freq=30.*500 Hz"),
        ({"control_freq": float("nan")}, "control_freq=nan"),
    ],
)
def test_bad_input_is_refused_in_one_line(lift, changes, words):
    """The error names the argument, its value and what is valid."""
    with pytest.raises(ValueError, match=words) as caught:
        build(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed, error", [(-1, gymnasium.error.Error), (1.5, TypeError), (None, TypeError)])
def test_a_seed_is_a_whole_number(lift, seed, error):
    """It is neither rounded nor drawn anew; NumPy's integers are taken."""
    with pytest.raises(error):
        build(seed=seed)
    build(seed=np.int64(3), cameras=("agentview",)).close()


def test_a_task_that_the_user_registered_works_and_a_reset_undoes_what_it_wrote(lift):
    """Defining a subclass registers it with RoboSuite; it sees observations, and what it writes is undone."""
    from robosuite.environments.manipulation.lift import Lift

    class PaintedLift(Lift):
        hands = []

        def reward(self, action=None):
            seen = self._get_observations()
            self.hands.append(seen["robot0_eef_pos"] + 0 * seen["cube_pos"])  # of the robot and of the task's objects
            self.sim.model.mat_rgba[:] = self.sim.model.geom_rgba[:] = (0, 0, 1, 1)
            return 7.0

    environment = build(task="PaintedLift", cameras=("agentview",))
    image, _ = environment.reset(seed=8)
    painted, reward, *_ = environment.step(np.zeros(7, np.float32))
    assert reward == 14.0
    assert (PaintedLift.hands[0] != PaintedLift.hands[1]).any()
    assert (painted != image).mean() > 0.5
    np.testing.assert_array_equal(environment.reset(seed=8)[0], image)
    environment.close()


@pytest.mark.parametrize("steps", [0, 1])
def test_a_simulation_that_mujoco_began_anew_is_a_fault(steps, tmp_path, monkeypatch):
    """It does so when the state is not finite, with no more than a warning; the next episode is sound."""
    monkeypatch.chdir(tmp_path)  # it also writes a log file
    environment = build(cameras=("agentview",))
    environment.reset(seed=0)
    for _ in range(steps):
        environment.step(np.zeros(7, np.float32))
    environment._task.sim.data.qvel[0] = np.nan
    with pytest.raises(RuntimeError, match="the simulation became unstable"):
        environment.step(np.zeros(7, np.float32))
    environment.reset()
    environment.step(np.zeros(7, np.float32))
    environment.close()


def test_the_warnings_of_an_unstable_simulation_are_those_that_mujoco_has(lift):
    """Three numbers in a row, by which env.py finds them without MuJoCo's names."""
    from mujoco import mjtWarning

    kinds = mjtWarning.mjWARN_BADQPOS, mjtWarning.mjWARN_BADQVEL, mjtWarning.mjWARN_BADQACC
    assert [int(kind) for kind in kinds] == list(range(8))[env.UNSTABLE]
    assert len(lift._task.sim.data._data.warning) == 8


def test_the_physics_step_is_robosuites_own(lift, monkeypatch):
    """Also for one whose macros have another: in the model, and in the controllers that a reset builds."""
    from robosuite import macros

    monkeypatch.setattr(macros, "SIMULATION_TIMESTEP", 0.005)
    environment = build(cameras=("agentview",))
    environment.reset()
    assert environment._task.sim.model.opt.timestep == env.PHYSICS_STEP == 0.002
    assert environment._task.robots[0].part_controllers["right"].model_timestep == 0.002
    environment.close()


def test_the_reward_does_not_depend_on_the_length_of_an_episode():
    """Wipe's is scaled by RoboSuite's horizon: training and evaluations have the same."""
    factors = set()
    for steps in (100, 500):
        environment = build(task="Wipe", cameras=("agentview",), episode_steps=steps)
        factors.add(environment._task.reward_normalization_factor)
        environment.close()
    assert len(factors) == 1


def test_a_task_that_does_not_take_robosuites_keywords_is_named(lift):
    """The user reads one line with class, keyword and place, whether the class refuses the keyword or passes it on."""
    from robosuite.environments.manipulation.lift import Lift

    class Narrow(Lift):
        def __init__(self, robots, control_freq):
            super().__init__(robots=robots, control_freq=control_freq)

    class Wide(Lift):
        def __init__(self, **options):
            super().__init__(wide=True, **options)

    options = {name: value for name, value in ARGUMENTS.items() if name not in ("task", "seed")}
    for task, words in (
        ("Narrow", r"Narrow.__init__\(\) got an unexpected keyword argument 'controller_configs' \(base.py:\d+\)$"),
        ("Wide", r"Lift.__init__\(\) got an unexpected keyword argument 'wide' \(test_env.py:\d+\)$"),
    ):
        with pytest.raises(UserError, match=f"^TypeError: .*{words}"):
            make_envs(options | {"task": task}, 1, 0, make_env)


def test_a_sampler_is_found_where_a_task_keeps_it(lift):
    """Also within lists and dicts of the task: the seed decides what it draws."""
    from robosuite.environments.manipulation.lift import Lift

    class Tidy(Lift):
        def _load_model(self):
            super()._load_model()
            self.kept, self.placement_initializer = [{"cube": self.placement_initializer}], None

        def _reset_internal(self):
            self.placement_initializer = self.kept[0]["cube"]
            super()._reset_internal()
            self.placement_initializer = None

    environment = build(task="Tidy")
    first, other, again = (environment.reset(seed=seed)[0] for seed in (5, 6, 5))
    assert (first != other).any()
    np.testing.assert_array_equal(first, again)
    environment.close()


# ---- the Gymnasium interface


@pytest.mark.filterwarnings("error")
def test_check_env(lift):
    """Gymnasium's own checker has no complaint, not even a warning."""
    check_env(lift, skip_render_check=True)  # its check of render() needs a registered environment
    assert lift.metadata["gripper"] and lift.metadata["moves"] == 3


def test_a_gripper_obeys_only_the_sign_of_its_command(lift):
    """Commands of 0.05 and 1 close the fingers alike, -0.05 opens them: the model need not see more than the sign."""
    pictures = []
    for command in (1, 0.05, -0.05):
        lift.reset(seed=3)
        pictures.append([lift.step(np.array([0, 0, 0, 0, 0, 0, command]))[0] for _ in range(5)])
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert (pictures[0][-1] != pictures[2][-1]).any()


def test_a_hand_with_fingers_of_their_own_is_no_gripper():
    """Its several actions are neither seen as signs nor held for long; the arm's seven joints come before them."""
    environment = build(robot="PandaDexRH", controller="JOINT_POSITION")
    assert environment.action_space.shape == (13,)
    assert not environment.metadata["gripper"] and environment.metadata["moves"] == 7
    environment.close()


def test_step_needs_a_running_episode_and_a_sound_action(lift):
    """Steps before a reset or after the end, wrong shapes, NaN and unknown options are refused."""
    play(lift, 0)
    with pytest.raises(gymnasium.error.ResetNeeded):
        lift.step(np.zeros(7))
    with pytest.raises(ValueError, match="options"):
        lift.reset(options={"cube": "red"})
    lift.reset()
    with pytest.raises(ValueError, match="7 numbers"):
        lift.step(np.zeros(4))
    with pytest.raises(ValueError, match="7 numbers"):
        lift.step(np.full(7, np.nan))


def test_length_reward_and_success_are_those_of_plain_robosuite(lift, plain):
    """Rewards are RoboSuite's bit for bit; a step sums action_repeat of them; only the length truncates."""
    _, results = episode_from_seed(lift, 11, 5)
    plain_reset(plain, 11)
    rng, expected = np.random.default_rng(5), [bool(plain._check_success())]
    for step in range(12):
        action = rng.uniform(-1, 1, 7).astype(np.float32)
        rewards, solved = zip(*((plain.step(action)[1], plain._check_success()) for _ in range(2)), strict=True)
        expected.append((sum(rewards), False, step == 11, any(map(bool, solved))))
    assert results == expected


def state_of(task, reward):
    return [*task.sim.data.qpos, *task.sim.data.qvel, reward, task._check_success()]


@pytest.mark.parametrize("episodes, steps", [(3, 20), pytest.param(10, 200, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "task, robot, controller",
    [
        ("Lift", "Panda", "OSC_POSE"),
        ("Door", "Panda", "OSC_POSE"),
        ("Stack", "Panda", "OSC_POSE"),
        ("Lift", "Sawyer", "OSC_POSITION"),
        ("Lift", "Panda", "JOINT_POSITION"),
    ],
)
def test_trajectories_are_those_of_plain_robosuite_bit_for_bit(lift, task, robot, controller, episodes, steps):
    """Positions, velocities, rewards and successes over random episodes, with our own control loop or RoboSuite's."""
    import robosuite

    names = {"task": task, "robot": robot, "controller": controller, "cameras": ("robot0_eye_in_hand",)}
    ours = build(**names, action_repeat=1, episode_steps=steps)
    assert isinstance(ours._task._pre_action, env._HeldGoal) == controller.startswith("OSC")
    plain = robosuite.make(
        task,
        robots=robot,
        controller_configs=env._controller_config(robot, controller, 1.0),
        has_renderer=False,
        has_offscreen_renderer=False,
        renderer="mujoco",
        use_camera_obs=False,
        control_freq=20,
        reward_shaping=True,
        hard_reset=False,
        seed=ARGUMENTS["seed"],
    )
    for episode in range(episodes):
        ours.np_random = np.random.default_rng(episode)
        ours.reset()
        plain.rng = plain.placement_initializer.rng = np.random.default_rng(episode)
        plain.reset()
        for action in np.random.default_rng(episode).uniform(-1, 1, (steps, *ours.action_space.shape)):
            expected = state_of(plain, plain.step(action)[1])
            assert state_of(ours._task, ours.step(action)[1]) == expected
    ours.close(), plain.close()


@pytest.mark.parametrize("robot", ["Panda", "Sawyer"])
def test_scaled_rotations_are_smaller_commands_of_the_unscaled_ones(robot):
    """What `rotation_scale` does is something that the benchmark's own action space can do."""
    scaled, plain = build(robot=robot, rotation_scale=0.1), build(robot=robot)
    same = np.array([1, 1, 1, 0.1, 0.1, 0.1, 1])
    first, second = scaled.reset(seed=5)[0], plain.reset(seed=5)[0]
    for action in np.random.default_rng(6).uniform(-1, 1, (10, 7)):
        np.testing.assert_array_equal(first, second)
        (first, reward, *_), (second, expected, *_) = scaled.step(action), plain.step(action * same)
        assert reward == pytest.approx(expected, abs=1e-9)
    assert (plain.step(action)[0] != scaled.step(action)[0]).any()
    scaled.close(), plain.close()


def test_terminated_is_the_tasks_own_end():
    """Wipe ends itself when the arm touches the table: terminated, and the last repeats are not played."""
    wipe = build(task="Wipe", cameras=("agentview",), episode_steps=400)
    assert not wipe.metadata["gripper"] and wipe.metadata["moves"] == 3
    wipe.reset()
    ends, action = (False, False), np.array([0, 1, -1, 0, 0, 0])
    while not any(ends):
        _, _, *ends, _ = wipe.step(action)
    assert ends == [True, False]
    wipe.close()


@pytest.mark.parametrize("task", ["Door", "Stack", "PickPlaceCan"])
def test_other_tasks_step_and_forget_the_past(task):
    """Door writes its place into the model, PickPlaceCan has a sampler of samplers: np_random and actions decide."""
    environment = build(task=task, cameras=("agentview",), episode_steps=12)
    state = environment.np_random.bit_generator.state
    first, between = play(environment, 0), play(environment, 1)
    environment.np_random.bit_generator.state = state
    assert_same_episode(play(environment, 0), first)
    assert (between[0][0] != first[0][0]).any()
    environment.close()


def test_close_may_be_repeated_and_ends_all_use():
    """close() works twice, and the closed environment says so."""
    environment = build(cameras=("agentview",), controller="OSC_POSITION")
    environment.reset()
    assert environment.action_space.shape == (4,)
    environment.close()
    environment.close()
    for use in (environment.reset, environment.render, lambda: environment.step(np.zeros(4))):
        with pytest.raises(RuntimeError, match="closed"):
            use()


# ---- seeds


def test_seeds_decide_the_episodes(lift):
    """The same seed gives the same pixels, another seed or none gives others."""
    first, again = lift.reset(seed=8)[0], lift.reset(seed=8)[0]
    np.testing.assert_array_equal(first, again)
    assert (lift.reset(seed=9)[0] != first).any()
    lift.reset(seed=8)
    assert (lift.reset()[0] != first).any()


def test_a_fresh_env_continues_exactly_from_a_saved_np_random(lift):
    """An episode depends on np_random's state, not on what ran before: a fresh env repeats it bit for bit."""
    play(lift, 1), play(lift, 2)
    state = lift.np_random.bit_generator.state
    uninterrupted = [play(lift, 3), play(lift, 4)]
    fresh = build()
    assert fresh.np_random.bit_generator.state == np.random.default_rng(ARGUMENTS["seed"]).bit_generator.state
    generator = np.random.default_rng()
    generator.bit_generator.state = state
    fresh.np_random = generator
    for actions_seed, episode in zip((3, 4), uninterrupted, strict=True):
        assert_same_episode(play(fresh, actions_seed), episode)
    fresh.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resets_with_rendering_leak_nothing(lift):
    """200 resets with pictures: memory grows by less than 50 MB, no file descriptor stays open."""

    def usage():
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))

    def cycle(count):
        for _ in range(count):
            lift.reset()
            lift.step(lift.action_space.sample())
        lift.render()

    cycle(10)
    memory, files = usage()
    cycle(200)
    memory_after, files_after = usage()
    assert memory_after - memory < 50e6
    assert files_after == files
