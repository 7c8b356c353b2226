"""env.py against real RoboSuite: what an episode may depend on, what the pictures show, what is refused."""

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
from env import gl_backend, make_env

ROOT = pathlib.Path(env.__file__).parent
ARGUMENTS = {
    "task": "Lift",
    "robot": "Panda",
    "controller": "OSC_POSE",
    "cameras": ("agentview", "robot0_eye_in_hand"),
    "image_size": 64,
    "control_freq": 20,
    "action_repeat": 2,
    "episode_steps": 24,
    "reward_shaping": True,
    "physics_step": 0.002,
    "seed": 3,
}


def build(**changes):
    return make_env(**ARGUMENTS | changes)


def play(environment, actions_seed):
    """One episode of random actions from the state that np_random has: pictures, rewards, successes, ends."""
    rng = np.random.default_rng(actions_seed)
    image, info = environment.reset()
    images, results, ended = [image], [info["success"]], False
    while not ended:
        action = rng.uniform(-1, 1, environment.action_space.shape).astype(np.float32)
        image, reward, terminated, truncated, info = environment.step(action)
        ended = terminated or truncated
        images.append(image)
        results.append((reward, terminated, truncated, info["success"]))
    return np.stack(images), results


def assert_same_episode(first, second):
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]


@pytest.fixture(scope="module")
def lift():
    environment = build()
    yield environment
    environment.close()


@pytest.fixture(scope="module")
def plain(lift):
    """RoboSuite without us (`lift` has set up rendering); soft resets, the only ones that can be seeded."""
    import robosuite

    task = robosuite.make(
        "Lift",
        robots="Panda",
        has_renderer=False,
        renderer="mujoco",
        use_camera_obs=True,
        camera_names=["agentview", "robot0_eye_in_hand"],
        camera_heights=64,
        camera_widths=64,
        control_freq=20,
        reward_shaping=True,
        hard_reset=False,
        seed=ARGUMENTS["seed"],
    )
    yield task
    task.close()


def plain_reset(task, seed):
    task.rng = task.placement_initializer.rng = np.random.default_rng(seed)
    task.sim._render_context_offscreen.gl_ctx.make_current()
    return task.reset()


# ---- the OpenGL back end


@pytest.mark.parametrize(
    "platform, environ, libraries, expected",
    [
        ("linux", {}, {"EGL", "OSMesa"}, {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl"}),
        ("linux", {}, {"OSMesa"}, {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa"}),
        ("linux", {"PYOPENGL_PLATFORM": "glx"}, {"EGL"}, {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl"}),
        ("linux", {"MUJOCO_GL": "osmesa"}, {"EGL"}, {"MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": "osmesa"}),
        ("linux", {"MUJOCO_GL": " EGL"}, set(), {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl"}),
        ("linux", {"MUJOCO_GL": "glfw"}, {"EGL"}, {"MUJOCO_GL": "glfw"}),
        ("darwin", {}, set(), {}),
        ("darwin", {"MUJOCO_GL": "cgl"}, set(), {"MUJOCO_GL": "cgl"}),
        ("win32", {}, set(), {}),
    ],
)
def test_back_end_is_egl_then_osmesa_on_linux_and_the_systems_elsewhere(platform, environ, libraries, expected):
    """Headless Linux takes what is installed, other systems their own, and the user's choice comes first."""
    before = dict(environ)
    assert gl_backend(platform, environ, libraries.__contains__) == expected
    assert environ == before


def test_back_end_names_the_packages_where_nothing_can_render():
    """Without EGL and OSMesa the error is one line that says what to install."""
    with pytest.raises(RuntimeError, match="apt-get install libegl1 libgl1 libgl1-mesa-dri") as caught:
        gl_backend("linux", {}, lambda name: False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("platform, value", [("linux", "cgl"), ("darwin", "egl"), ("linux", "disable")])
def test_back_end_refuses_a_mujoco_gl_that_cannot_work(platform, value):
    """An invalid MUJOCO_GL is refused by name, not replaced."""
    with pytest.raises(ValueError, match=f"MUJOCO_GL='{value}'"):
        gl_backend(platform, {"MUJOCO_GL": value}, lambda name: True)


def test_a_machine_that_cannot_render_gets_one_line(lift, monkeypatch):
    """A driver's failure becomes a RuntimeError with an install hint and without the driver's traceback."""

    def broken(name):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(env.importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="eglQueryString.*apt-get install") as caught:
        env._open_context(None, None, 64)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None


# ---- importing and building


def python(code, **variables):
    """Runs `code` in a fresh interpreter at the repository's root."""
    ours = ("MUJOCO_GL", "PYOPENGL_PLATFORM")
    environ = {name: value for name, value in os.environ.items() if name not in ours} | variables
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


def test_importing_env_imports_no_simulator():
    """`import env` needs neither RoboSuite nor MuJoCo and leaves the environment variables alone."""
    result = python(
        "import os, sys; before = dict(os.environ); import env; assert dict(os.environ) == before;"
        "assert not {'robosuite', 'mujoco', 'OpenGL'} & set(sys.modules)"
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
        ({"controller": "OSC"}, "controller='OSC'.*OSC_POSE"),
        ({"rotation_scale": 0.0}, "rotation_scale=0.0: .*above 0"),
        ({"rotation_scale": 1.5}, "rotation_scale=1.5: .*at most 1"),
        ({"cameras": ()}, r"cameras=\(\)"),
        ({"cameras": "agentview"}, "cameras='agentview'"),
        ({"cameras": ("agentview", "agentview")}, "cameras=.*twice"),
        ({"cameras": ("agentview", "sidevew")}, "cameras: unknown 'sidevew'.*frontview.*sideview"),
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": 64.0}, "image_size=64.0"),
        ({"action_repeat": 0}, "action_repeat=0"),
        ({"episode_steps": 0}, "episode_steps=0"),
        ({"episode_steps": 25}, "episode_steps=25.*action_repeat=2"),
        ({"control_freq": 15}, "control_freq=15.*500 Hz.*12.5, 20, 25"),
        ({"control_freq": 40}, "control_freq=40.*500 Hz"),
        ({"control_freq": 0}, "control_freq=0"),
        ({"control_freq": 30, "physics_step": 0.005}, "control_freq=30.*200 Hz.*20, 25, 40"),
        ({"physics_step": 0.01}, "physics_step=0.01.*0.002 or 0.005"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_input_is_refused_in_one_line(lift, changes, words):
    """The error names the argument, its value and what is valid."""
    with pytest.raises(ValueError, match=words) as caught:
        build(**changes)
    assert "\n" not in str(caught.value)


def test_a_task_that_the_user_registered_works_and_a_reset_undoes_what_it_wrote(lift):
    """Defining a subclass registers it with RoboSuite; what it writes into the model is undone."""
    from robosuite.environments.manipulation.lift import Lift

    class PaintedLift(Lift):
        def reward(self, action=None):
            self.sim.model.mat_rgba[:] = self.sim.model.geom_rgba[:] = (0, 0, 1, 1)
            return 7.0

    environment = build(task="PaintedLift", cameras=("agentview",))
    image, _ = environment.reset(seed=8)
    painted, reward, *_ = environment.step(np.zeros(7, np.float32))
    assert reward == 14.0
    assert (painted != image).mean() > 0.5
    np.testing.assert_array_equal(environment.reset(seed=8)[0], image)
    environment.close()


# ---- the Gymnasium interface


@pytest.mark.filterwarnings("error")
def test_check_env(lift):
    """Gymnasium's own checker has no complaint, not even a warning."""
    check_env(lift, skip_render_check=True)  # its check of render() needs a registered environment
    assert lift.metadata["gripper"]


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
    assert not wipe.metadata["gripper"]
    wipe.reset()
    ends, action = (False, False), np.array([0, 1, -1, 0, 0, 0])
    while not any(ends):
        _, _, *ends, _ = wipe.step(action)
    assert ends == [True, False]
    wipe.close()


@pytest.mark.parametrize("task", ["Door", "Stack"])
def test_other_tasks_step_and_forget_the_past(task):
    """Door writes its place into the model: its episodes, too, depend only on np_random and the actions."""
    environment = build(task=task, cameras=("agentview",), episode_steps=12)
    state = environment.np_random.bit_generator.state
    first, between = play(environment, 0), play(environment, 1)
    environment.np_random.bit_generator.state = state
    assert_same_episode(play(environment, 0), first)
    assert (between[0][0] != first[0][0]).any()
    environment.close()


def test_close_may_be_repeated_and_ends_all_use():
    """close() works twice, and the closed environment says so."""
    environment = build(cameras=("agentview",), physics_step=0.005, controller="OSC_POSITION")
    environment.reset()
    assert environment.action_space.shape == (4,)
    environment.close()
    environment.close()
    for use in (environment.reset, environment.render, lambda: environment.step(np.zeros(4))):
        with pytest.raises(RuntimeError, match="closed"):
            use()


# ---- seeds


def episode_from_seed(environment, seed, actions_seed):
    environment.np_random = np.random.default_rng(seed)
    return play(environment, actions_seed)


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


# ---- pictures


def test_cameras_are_stacked_in_the_order_given_and_envs_do_not_disturb_each_other(lift):
    """Two living envs with other cameras and another physics step each show what they show alone."""
    both = lift.reset(seed=8)[0]
    assert both.shape == (6, 64, 64) and both.dtype == np.uint8
    other = build(cameras=("robot0_eye_in_hand",), physics_step=0.005, seed=4)
    hand = other.reset(seed=8)[0]
    assert hand.shape == (3, 64, 64)
    other.step(other.action_space.sample())
    for environment, seconds in ((lift, 0.002), (other, 0.005)):
        assert environment._task.sim.model.opt.timestep == seconds
        assert environment._task.robots[0].part_controllers["right"].model_timestep == seconds
    np.testing.assert_array_equal(lift.reset(seed=8)[0], both)
    np.testing.assert_array_equal(other.reset(seed=8)[0], hand)
    other.close()
    np.testing.assert_array_equal(lift.reset(seed=8)[0], both)


def test_pictures_are_upright_and_not_mirrored(lift):
    """In agentview, which faces the robot, the cube is lower when nearer (+x) and further right for +y."""
    seen, true = [], []
    for seed in range(12):
        red, green, blue = lift.reset(seed=seed)[0][:3].astype(int)
        rows, columns = np.nonzero((red > green + 40) & (red > blue + 40))
        assert len(rows) > 5
        seen.append((rows.mean(), columns.mean()))
        true.append(lift._task.sim.data.body_xpos[lift._task.cube_body_id][:2].copy())
    for axis in range(2):
        assert np.corrcoef(np.array(seen)[:, axis], np.array(true)[:, axis])[0, 1] > 0.9


def test_pictures_are_close_to_robosuites_own_look(lift, plain):
    """The cheap look differs by less than 3 of 255 on average."""
    image = lift.reset(seed=11)[0].astype(int)
    stock = plain_reset(plain, 11)
    for k, camera in enumerate(ARGUMENTS["cameras"]):
        picture = stock[f"{camera}_image"][::-1].transpose(2, 0, 1).astype(int)
        assert np.abs(image[3 * k : 3 * k + 3] - picture).mean() < 3


def test_skipping_unseen_geoms_changes_no_pixel(lift):
    """What is not drawn because it is out of view would not have been seen, in any camera."""
    lift.reset(seed=8)
    lift.step(lift.action_space.sample())
    renderer = lift._renderer
    for camera in range(lift._task.sim.model.ncam):
        quick = renderer._agent_picture(camera)
        renderer._skip_unseen = False
        np.testing.assert_array_equal(renderer._agent_picture(camera), quick)
        renderer._skip_unseen = True


def test_render_shows_the_scene_and_leaves_the_agents_pictures_alone(lift):
    """render() shows cube, arm and foot in a large frame; the agent's next pictures don't change."""
    expected = episode_from_seed(lift, 8, 6)
    lift.np_random = np.random.default_rng(8)
    rng = np.random.default_rng(6)
    images = [lift.reset()[0]]
    for _ in range(12):
        frame = lift.render()
        images.append(lift.step(rng.uniform(-1, 1, 7).astype(np.float32))[0])
    np.testing.assert_array_equal(np.stack(images), expected[0])
    assert frame.shape == (256, 256, 3) and frame.dtype == np.uint8
    red, green, blue = frame.astype(int).transpose(2, 0, 1)
    assert ((red > green + 40) & (red > blue + 40)).sum() > 50  # the cube
    assert (frame.min(-1) > 230).sum() > 5000  # table and arm
    assert (frame.max(-1) < 60).sum() > 2000  # the pedestal


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
