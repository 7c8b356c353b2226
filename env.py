"""RoboSuite tasks as Gymnasium environments that show the agent pixels only.

    env = make_env(task="Lift", robot="Panda", controller="OSC_POSE", cameras=("agentview",), image_size=64,
                   control_freq=20, action_repeat=2, episode_steps=500, reward_shaping=True,
                   physics_step=0.002, seed=0)
    image, info = env.reset()                                     # (3 * len(cameras), 64, 64) uint8, upright
    image, reward, terminated, truncated, info = env.step(env.action_space.sample())

Importing this file does no work and needs neither RoboSuite nor MuJoCo: both are imported when an
environment is built, after the OpenGL back end has been chosen. Physics, controllers and rewards are
RoboSuite's own, bit for bit. What differs from `robosuite.make` is how pictures are drawn, that seeding is
real, and that a reset forgets the past.
"""

import atexit
import contextlib
import ctypes
import functools
import importlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

# The agent's pictures. In software rendering they cost vertices (a Panda has 168,000 faces) and samples,
# hardly pixels. Lift, agentview and robot0_eye_in_hand, 64 x 64: 100 ms in RoboSuite's look, 11 ms in this.
AGENT_MSAA_SAMPLES = 0  # 4 in RoboSuite: 100 -> 38 ms; moves a pixel by 2 of 255 on average
AGENT_REFLECTIONS = False  # on in RoboSuite, draws the scene twice: 38 -> 17 ms; by 0.3 in Lift, 3 in Door
SKIP_UNSEEN_GEOMS = True  # out of the camera's view, such as half of the arm: 17 -> 11 ms; changes no pixel
# Hiding the pedestal, a fifth of the faces, would save 4 ms more, but the distance of agentview from
# RoboSuite's own picture grows from 2 to 7 of 255 with it.

# render(), for people: reflections on, smoothed by drawing larger and averaging.
RENDER_SIZE = 256  # pixels, height and width
RENDER_SUPERSAMPLING = 2
RENDER_VIEW = {"lookat": (-0.2, 0.03, 1.05), "distance": 1.5, "azimuth": 225.0, "elevation": -22.0}  # m, deg

STOCK_PHYSICS_STEP = 0.002  # seconds, RoboSuite's own
CHEAP_PHYSICS_STEP = 0.005  # 2.5 times fewer controller and physics steps; not the standard physics

# RoboSuite 1.5.2 has two more: its JOINT_VELOCITY can't be built (it assigns to a property), and a
# Panda under its IK_POSE moves by 30 cm in half a second where it is told to stand still.
CONTROLLERS = ("OSC_POSE", "OSC_POSITION", "JOINT_POSITION", "JOINT_TORQUE")

VISUAL_GEOMS, MARKER_GEOMS, HIDDEN_GEOMS = 1, 2, 5  # MuJoCo's geom groups in RoboSuite; 0: collision shapes
RESTORED_BYTES = 1 << 20  # a reset restores the model's arrays below this size; above are meshes and textures

GL_BACKENDS = {"linux": ("egl", "osmesa", "glfw", "glx"), "darwin": ("cgl", "glfw"), "win32": ("wgl", "glfw")}
GL_INSTALL_HINT = "on Debian or Ubuntu: apt-get install libegl1 libgl1 libgl1-mesa-dri (or libosmesa6)"
GL_FAILURE = re.compile(r"lib\w+\.so|egl|EGL|OSMesa|OpenGL|'gl[A-Z]")  # what an import error then names


def gl_backend(platform: str, environ: Mapping[str, str], libraries: Callable[[str], bool]) -> dict[str, str]:
    """The environment variables that let MuJoCo render without a screen. Pure: it changes nothing.

    `platform` is sys.platform's value; `libraries("EGL")` tells whether that shared library can be loaded.
    The user's own MUJOCO_GL is kept: ValueError where it is invalid. RuntimeError where nothing can render.
    """
    valid = GL_BACKENDS.get(platform, ("glfw",))
    chosen = environ.get("MUJOCO_GL", "").strip().lower()
    if chosen and chosen not in valid:
        raise ValueError(f"MUJOCO_GL={environ['MUJOCO_GL']!r} can't render here: use {' or '.join(valid)}")
    if not chosen and platform != "linux":
        return {}  # MuJoCo takes the system's own
    if not chosen:
        chosen = next((name for name, lib in (("egl", "EGL"), ("osmesa", "OSMesa")) if libraries(lib)), "")
    if not chosen:
        raise RuntimeError(f"no OpenGL library that renders without a screen; {GL_INSTALL_HINT}")
    # PyOpenGL has a variable of its own, and MuJoCo refuses to start where the two differ.
    for_pyopengl = {"PYOPENGL_PLATFORM": chosen} if chosen in ("egl", "osmesa") else {}
    return {"MUJOCO_GL": chosen, **for_pyopengl}


class RoboSuiteEnv(gymnasium.Env):
    """One single-arm RoboSuite task, built in seconds. ValueError for bad input, RuntimeError without OpenGL.

    task            a single-arm task of RoboSuite's, or one of yours: defining its class registers it
    robot           a robot with one arm, such as "Panda"
    controller      one of CONTROLLERS: "OSC_POSE" has 7 actions with the gripper, "OSC_POSITION" 4
    rotation_scale  of how far OSC_POSE turns the hand; at 1, RoboSuite's half a radian a control step at most
    cameras         names of the model's cameras, whose pictures are stacked as channels in this order
    image_size      height and width in pixels
    control_freq    control steps in a simulated second; must divide the physics rate (500 Hz or 200 Hz)
    action_repeat   control steps for which an action holds
    episode_steps   control steps until an episode is truncated, a multiple of action_repeat
    reward_shaping  a dense reward where the task has one, else one for success only
    physics_step    seconds: 0.002 is RoboSuite's; 0.005 is faster, but not the standard physics
    seed            of what is drawn at construction (in Lift the cube's size), and of np_random

    Observation: uint8 (3 * len(cameras), image_size, image_size), upright, cameras in the order given.
    Action: float32 (A,) in [-1, 1]. A gripper comes last, and only its sign counts: -1 opens.
    `truncated` at the episode's length; `terminated` only where the task ends itself, as Wipe does.
    info["success"]: whether the task is solved at this moment.
    metadata["gripper"]: whether the last action is a gripper's; Wipe's robots have none.

    After construction `np_random` is the only source of randomness: an episode depends on the constructor's
    arguments, np_random's state at the reset and the actions, and on nothing that happened before. Setting
    np_random (or its bit_generator.state) to a saved one therefore continues a run exactly at a reset. In
    PickPlaceSingle and NutAssemblySingle this needs a fixed PYTHONHASHSEED: they draw from a Python set.
    """

    def __init__(
        self,
        *,
        task: str,
        robot: str,
        controller: str,
        rotation_scale: float = 1.0,
        cameras: Sequence[str],
        image_size: int,
        control_freq: float,
        action_repeat: int,
        episode_steps: int,
        reward_shaping: bool,
        physics_step: float,
        seed: int,
    ) -> None:
        self._renderer: _Renderer | None = None  # before all that can fail: close() reads them
        self._task: Any = None
        _check_counts(image_size, action_repeat, episode_steps)
        _check_rates(control_freq, physics_step)
        _check_seed(seed)
        _check_controller(controller, rotation_scale)
        _check_cameras(cameras)
        mujoco, robosuite = _import_simulator()
        _check_names(task, robot)
        super().reset(seed=int(seed))

        self._action_repeat, self._episode_steps = action_repeat, episode_steps
        self._physics_step = physics_step
        self._steps: int | None = None  # control steps since the reset; None: no episode is running
        with _simulation_timestep(physics_step):
            self._task = robosuite.make(
                task,
                robots=robot,
                controller_configs=_controller_config(robot, controller, rotation_scale),
                has_renderer=False,
                has_offscreen_renderer=False,  # _Renderer says why
                use_camera_obs=False,
                use_object_obs=False,
                reward_shaping=reward_shaping,
                reward_scale=1.0,
                control_freq=control_freq,
                ignore_done=True,  # the time limit is ours: what is left of `done` is a task that ends itself
                hard_reset=False,  # milliseconds instead of seconds, and no leak
                renderer="mujoco",
                seed=int(seed),
            )
        self._pristine = _snapshot(self._task.sim.model._model)
        camera_ids = _camera_ids(self._task.sim.model, cameras)
        self._renderer = _Renderer(mujoco, self._task.sim, camera_ids, image_size)

        shape = (3 * len(camera_ids), image_size, image_size)
        self.observation_space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (self._task.action_dim,), np.float32)
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": control_freq / action_repeat,
            "gripper": any(gripper.dof > 0 for gripper in self._task.robots[0].gripper.values()),
        }
        self.render_mode = "rgb_array"

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode drawn from `np_random`, which `seed` sets anew. There are no options."""
        if options:
            raise ValueError(f"options={options!r}: this environment has none")
        renderer = self._open_renderer()
        super().reset(seed=seed)
        # Door and Wipe place things by writing to the model, which MuJoCo's own reset leaves as it is.
        for array, built in self._pristine:
            array[...] = built
        self._hand_over_generator()
        with _simulation_timestep(self._physics_step):  # a reset builds new controllers, which read it
            self._task.reset()
        self._steps = 0
        return renderer.observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Holds `action` (A,) for action_repeat control steps.

        The reward is their sum, the picture the last; `info["success"]` is whether any of them solved the task.
        Raises ValueError for an action of another shape or with a NaN, ResetNeeded where no episode runs.
        """
        renderer = self._open_renderer()
        if self._steps is None:
            raise gymnasium.error.ResetNeeded("step() needs a running episode: call reset() first")
        command = np.asarray(action, dtype=np.float64)
        if command.shape != self.action_space.shape or not np.isfinite(command).all():
            raise ValueError(f"action={action!r}: give {self.action_space.shape[0]} numbers in [-1, 1]")
        total, terminated, success = 0.0, False, False
        for _ in range(self._action_repeat):
            _, reward, terminated, _ = self._task.step(command)
            total += float(reward)
            self._steps += 1
            success = success or self._info()["success"]
            if terminated:
                break
        truncated = self._steps >= self._episode_steps
        if terminated or truncated:
            self._steps = None
        return renderer.observation(), total, bool(terminated), truncated, {"success": success}

    def render(self) -> np.ndarray:
        """The whole scene in its full look, for people: uint8 (256, 256, 3)."""
        return self._open_renderer().overview()

    def close(self) -> None:
        """Frees the simulation and its OpenGL context; may be called again."""
        self._steps, self._pristine = None, []  # the latter are views of the model that goes
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        if self._task is not None:
            self._task.close()
            self._task = None

    def _info(self) -> dict[str, Any]:
        return {"success": bool(self._task._check_success())}

    def _open_renderer(self) -> "_Renderer":
        if self._renderer is None:
            raise RuntimeError("this environment is closed")
        return self._renderer

    def _hand_over_generator(self) -> None:
        """Makes `np_random` the generator of all in the task that draws at a reset."""
        from robosuite.utils.placement_samplers import ObjectPositionSampler

        self._task.rng = self.np_random
        samplers = [value for value in vars(self._task).values() if isinstance(value, ObjectPositionSampler)]
        while samplers:
            sampler = samplers.pop()
            sampler.rng = self.np_random
            samplers.extend(getattr(sampler, "samplers", {}).values())  # a composite's parts
        if hasattr(self._task.model.mujoco_arena, "rng"):  # Wipe's draws its dirt
            self._task.model.mujoco_arena.rng = self.np_random


make_env = RoboSuiteEnv


class BrokenEnv(RuntimeError):
    """An environment that fails again right after it was built anew; the message is for the user."""


class RebuildingEnv(gymnasium.Wrapper):
    """Builds its environment anew where that raises, and goes on with its generator.

    `build` makes the environment. A failed step ends the episode: the last image once more, no reward, truncated.
    A failed reset is tried once more in the new environment. Either says so: info["env_error"] is then one line
    about the exception. An image of another type or shape than the space's is an exception too. BrokenEnv where
    that doesn't help; what the first `build` raises passes through.
    """

    def __init__(self, build: Callable[[], gymnasium.Env]) -> None:
        super().__init__(build())
        self._build = build
        self._image: np.ndarray | None = None

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        try:
            image, info = self._reset(**kwargs)
        except Exception as error:  # a simulator may raise anything
            self._rebuild()
            try:
                image, info = self._reset(**kwargs)
            except Exception as again:
                raise BrokenEnv(f"a reset failed in a new environment too: {_describe(again)}") from again
            info = {**info, "env_error": _describe(error)}
        self._image = image
        return image, info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        try:
            image, reward, terminated, truncated, info = self.env.step(action)
            self._check(image)
        except Exception as error:  # a simulator may raise anything
            self._rebuild()
            return self._image, 0.0, False, True, {"success": False, "env_error": _describe(error)}
        self._image = image
        return image, reward, terminated, truncated, info

    def _reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        image, info = self.env.reset(**kwargs)
        self._check(image)
        return image, info

    def _check(self, image: np.ndarray) -> None:
        """Here, because on its way to the replay an image is cast to the space's type, NaNs included."""
        space = self.env.observation_space
        if image.dtype != space.dtype or image.shape != space.shape:
            raise ValueError(f"an image of {image.dtype} {image.shape}, not of {space.dtype} {space.shape}")

    def _rebuild(self) -> None:
        generator = self.env.np_random
        with contextlib.suppress(Exception):  # it is broken: it may not even close
            self.env.close()
        try:
            self.env = self._build()
        except Exception as error:
            raise BrokenEnv(f"an environment can't be built anew: {_describe(error)}") from error
        self.env.np_random = generator


def make_vector_env(builders: Sequence[Callable[[], gymnasium.Env]]) -> VectorEnv:
    """Environments that step together and are built anew where they raise (`RebuildingEnv`).

    One lives in this process, several in spawned workers that end with it.
    """
    makers = [functools.partial(_rebuilding, build) for build in builders]
    if len(makers) == 1:
        return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED)
    return AsyncVectorEnv(makers, context="spawn", autoreset_mode=AutoresetMode.DISABLED)


def _rebuilding(build: Callable[[], gymnasium.Env]) -> RebuildingEnv:
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers too, but the parent decides
        threading.Thread(target=_end_with_parent, daemon=True).start()
    return RebuildingEnv(build)


def _end_with_parent() -> None:
    """End this worker when the parent has ended, by kill -9 too, and also where the simulator hangs."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def close_vector_env(envs: VectorEnv, terminate: bool) -> None:
    """Close the environments, or `terminate` workers one of which has died: the answer to a call may never come."""
    if not terminate:
        with contextlib.suppress(OSError, EOFError):  # of a worker that was killed after its last call
            envs.close()
            return
    envs.closed = True
    for process in getattr(envs, "processes", ()):
        process.terminate()
        process.join()


def _describe(error: Exception) -> str:
    """One line: type, message, and the file and line that raised."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(place.filename)}:{place.lineno})".replace("\n", " ")


class _Renderer:
    """Draws one simulation with an OpenGL context of its own.

    It replaces RoboSuite's, which never makes its context current (of two environments in a process one
    shows the other's textures and settings), can't be freed on request, and takes CUDA_VISIBLE_DEVICES for
    the number of an EGL device.
    """

    def __init__(self, mujoco: Any, sim: Any, camera_ids: Sequence[int], image_size: int) -> None:
        self._mujoco, self._model, self._data = mujoco, sim.model._model, sim.data._data
        self._camera_ids, self._image_size = tuple(camera_ids), image_size
        largest = max(image_size, RENDER_SIZE * RENDER_SUPERSAMPLING)
        casts_shadows = bool(self._model.light_castshadow.any())
        self._model.vis.quality.offsamples = AGENT_MSAA_SAMPLES
        self._model.vis.global_.offwidth = self._model.vis.global_.offheight = largest
        if not casts_shadows:  # no light of RoboSuite's own does, and the shadows' buffer takes 70 MB
            self._model.vis.quality.shadowsize = 0
        # What is out of view may still be seen in a mirror, or by its shadow.
        self._skip_unseen = SKIP_UNSEEN_GEOMS and not AGENT_REFLECTIONS and not casts_shadows
        self._gl, self._context = _open_context(mujoco, self._model, largest)
        # For an environment dropped without close(), and for the end of the program, before EGL itself ends.
        self._free = weakref.finalize(self, _free_context, self._gl, self._context)
        self._free.atexit = False
        atexit.register(self._free)

        self._scene = mujoco.MjvScene(self._model, maxgeom=10_000)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[:] = 0
        self._options.geomgroup[[VISUAL_GEOMS, MARKER_GEOMS]] = 1
        self._perturbation = mujoco.MjvPerturb()
        self._agent_camera, self._overview_camera = mujoco.MjvCamera(), mujoco.MjvCamera()
        self._agent_camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._overview_camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        for name, value in RENDER_VIEW.items():
            setattr(self._overview_camera, name, value)

    def observation(self) -> np.ndarray:
        """What the agent sees: uint8 (3 * cameras, image_size, image_size)."""
        self._gl.make_current()
        self._scene.flags[self._mujoco.mjtRndFlag.mjRND_REFLECTION] = AGENT_REFLECTIONS
        pictures = [self._agent_picture(camera_id) for camera_id in self._camera_ids]
        return np.concatenate([picture.transpose(2, 0, 1) for picture in pictures])

    def overview(self) -> np.ndarray:
        """The scene for people: uint8 (RENDER_SIZE, RENDER_SIZE, 3)."""
        self._gl.make_current()
        self._scene.flags[self._mujoco.mjtRndFlag.mjRND_REFLECTION] = True
        n = RENDER_SUPERSAMPLING
        large = self._picture(self._overview_camera, RENDER_SIZE * n)
        return large.reshape(RENDER_SIZE, n, RENDER_SIZE, n, 3).mean(axis=(1, 3)).round().astype(np.uint8)

    def close(self) -> None:
        atexit.unregister(self._free)
        self._free()

    def _agent_picture(self, camera_id: int) -> np.ndarray:
        self._agent_camera.fixedcamid = camera_id
        if not self._skip_unseen:
            return self._picture(self._agent_camera, self._image_size)
        groups = self._model.geom_group.copy()
        self._mujoco.mjv_updateCamera(self._model, self._data, self._agent_camera, self._scene)
        self._model.geom_group[self._unseen_geoms()] = HIDDEN_GEOMS
        picture = self._picture(self._agent_camera, self._image_size)
        self._model.geom_group[:] = groups
        return picture

    def _picture(self, camera: Any, size: int) -> np.ndarray:
        """uint8 (size, size, 3), upright."""
        mujoco, scene = self._mujoco, self._scene
        everything = mujoco.mjtCatBit.mjCAT_ALL
        model, data, options = self._model, self._data, self._options
        mujoco.mjv_updateScene(model, data, options, self._perturbation, camera, everything, scene)
        viewport = mujoco.MjrRect(0, 0, size, size)
        mujoco.mjr_render(viewport, scene, self._context)
        pixels = np.empty((size, size, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, viewport, self._context)
        return pixels[::-1]  # OpenGL's first row is the lowest

    def _unseen_geoms(self) -> np.ndarray:
        """bool (geoms,): those whose bounding box lies beyond a plane that bounds the picture."""
        model, data = self._model, self._data
        eyes = self._scene.camera  # a stereo pair; a plain picture is taken from the middle
        position, normals = (eyes[0].pos + eyes[1].pos) / 2, _frustum_normals(eyes[0])
        rotation = data.geom_xmat.reshape(-1, 3, 3)
        middle, half_sides = model.geom_aabb[:, :3], model.geom_aabb[:, None, 3:]
        centre = data.geom_xpos + np.einsum("gij,gj->gi", rotation, middle) - position
        reach = (np.abs(np.einsum("pi,gij->gpj", normals, rotation)) * half_sides).sum(-1)
        outside = centre @ normals.T + reach < 0  # (geoms, planes)
        return outside.any(-1) & (model.geom_rbound > 0)  # a floor has no bound


def _frustum_normals(eye: Any) -> np.ndarray:
    """(planes, 3): inward normals, in the world, of the planes that bound a square picture."""
    if eye.orthographic:
        return np.zeros((0, 3))  # its planes don't meet in the eye: nothing is skipped
    forward, up = np.array(eye.forward), np.array(eye.up)
    right = np.cross(forward, up)
    half_width = eye.frustum_width or (eye.frustum_top - eye.frustum_bottom) / 2
    return np.stack(
        [
            forward,
            (eye.frustum_center + half_width) * forward - eye.frustum_near * right,
            eye.frustum_near * right - (eye.frustum_center - half_width) * forward,
            eye.frustum_top * forward - eye.frustum_near * up,
            eye.frustum_near * up - eye.frustum_bottom * forward,
        ]
    )


def _open_context(mujoco: Any, model: Any, size: int) -> tuple[Any, Any]:
    """(OpenGL context, MuJoCo's resources in it), for pictures up to size x size. RuntimeError without."""
    backend = os.environ.get("MUJOCO_GL", "").strip().lower()
    module = backend if backend in ("egl", "osmesa", "cgl") else "cgl" if sys.platform == "darwin" else "glfw"
    try:
        gl = importlib.import_module(f"mujoco.{module}").GLContext(size, size)
        gl.make_current()
        context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
    except Exception as error:  # drivers fail in many ways, most of which don't mention OpenGL
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        return gl, context
    raise RuntimeError(f"can't render with MUJOCO_GL={module} ({reason}); {GL_INSTALL_HINT}")


def _free_context(gl: Any, context: Any) -> None:
    gl.make_current()
    context.free()
    gl.free()


def _import_simulator() -> tuple[Any, Any]:
    """(mujoco, robosuite), imported without a word, os.environ set up for rendering."""
    os.environ.update(gl_backend(sys.platform, os.environ, _has_library))
    logging.getLogger("robosuite_logs").disabled = True  # before the import, during which it talks
    # RoboSuite refuses a MUJOCO_EGL_DEVICE_ID that isn't in CUDA_VISIBLE_DEVICES, and overwrites MUJOCO_GL.
    with _restored_variables("CUDA_VISIBLE_DEVICES", "MUJOCO_GL"):
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        return _import_rendering("mujoco"), _import_rendering("robosuite")


def _import_rendering(name: str) -> Any:
    """Imports a module; RuntimeError, one line, where that fails for a library of OpenGL's."""
    try:
        return importlib.import_module(name)
    except (ImportError, AttributeError) as error:  # PyOpenGL raises the latter where a library is missing
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if not GL_FAILURE.search(reason):
            raise
    raise RuntimeError(f"can't import {name} ({reason}); {GL_INSTALL_HINT}")


@contextlib.contextmanager
def _restored_variables(*names: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _simulation_timestep(seconds: float) -> Iterator[None]:
    """RoboSuite's physics step is a global: set while it is read, so that two values can coexist."""
    from robosuite import macros

    before = macros.SIMULATION_TIMESTEP
    macros.SIMULATION_TIMESTEP = seconds
    try:
        yield
    finally:
        macros.SIMULATION_TIMESTEP = before


def _has_library(name: str) -> bool:
    for version in ("", ".1", ".8", ".6"):  # of libEGL and libOSMesa
        with contextlib.suppress(OSError):
            ctypes.CDLL(f"lib{name}.so{version}")
            return True
    return False


def _snapshot(model: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """(view, copy) of each of the model's arrays, without its meshes and textures."""
    arrays = [getattr(model, name) for name in dir(model) if not name.startswith("_")]
    arrays = [array for array in arrays if isinstance(array, np.ndarray) and array.flags.writeable]
    return [(array, array.copy()) for array in arrays if 0 < array.nbytes < RESTORED_BYTES]


def _controller_config(robot: str, controller: str, rotation_scale: float) -> dict[str, Any]:
    """The robot's own configuration, but for the arm's controller and how far that turns the hand."""
    from robosuite.controllers import load_composite_controller_config, load_part_controller_config

    config = load_composite_controller_config(robot=robot)
    arm = config["body_parts"]["right"]
    if arm["type"] != controller:
        part = load_part_controller_config(default_controller=controller)
        arm = config["body_parts"]["right"] = part | {"gripper": arm["gripper"]}
    if controller == "OSC_POSE" and rotation_scale != 1:
        for limit in ("output_max", "output_min"):  # metres in x, y, z, then radians about them
            arm[limit] = [*arm[limit][:3], *(rotation_scale * radians for radians in arm[limit][3:])]
    return config


def _camera_ids(model: Any, cameras: Sequence[str]) -> list[int]:
    for camera in cameras:
        if camera not in model.camera_names:
            raise ValueError(f"cameras: unknown {camera!r}: use some of {', '.join(model.camera_names)}")
    return [model.camera_name2id(camera) for camera in cameras]


def _check_counts(image_size: int, action_repeat: int, episode_steps: int) -> None:
    counts = {"image_size": image_size, "action_repeat": action_repeat, "episode_steps": episode_steps}
    for name, value in counts.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r}: use a whole number, 1 or more")
    if episode_steps % action_repeat:
        raise ValueError(f"episode_steps={episode_steps}: use a multiple of action_repeat={action_repeat}")


def _check_rates(control_freq: float, physics_step: float) -> None:
    if physics_step not in (STOCK_PHYSICS_STEP, CHEAP_PHYSICS_STEP):
        raise ValueError(f"physics_step={physics_step!r}: use {STOCK_PHYSICS_STEP} or {CHEAP_PHYSICS_STEP}")

    def divides(frequency: float) -> bool:
        steps = 1 / (frequency * physics_step)
        # RoboSuite rounds the second expression down: at 15 Hz a control step would be 66 ms instead of 66.7.
        return abs(steps - round(steps)) < 1e-6 and int((1 / frequency) / physics_step) == round(steps)

    if not isinstance(control_freq, int | float) or control_freq <= 0 or not divides(control_freq):
        valid = ", ".join(f"{f:g}" for f in (1, 2, 4, 5, 8, 10, 12.5, 20, 25, 40, 50, 100) if divides(f))
        rate = f"the physics rate of {1 / physics_step:g} Hz"
        raise ValueError(f"control_freq={control_freq!r}: must divide {rate}: use one of {valid}")


def _check_seed(seed: int) -> None:
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed={seed!r}: use a whole number, 0 or more")


def _check_cameras(cameras: Sequence[str]) -> None:
    if isinstance(cameras, str) or not cameras or not all(isinstance(camera, str) for camera in cameras):
        raise ValueError(f"cameras={cameras!r}: give one or more names, such as ('agentview',)")
    if len(set(cameras)) < len(cameras):
        raise ValueError(f"cameras={tuple(cameras)}: one is named twice")


def _check_controller(controller: str, rotation_scale: float) -> None:
    if controller not in CONTROLLERS:
        raise ValueError(f"controller={controller!r}: use one of {', '.join(CONTROLLERS)}")
    if not isinstance(rotation_scale, int | float) or not 0 < rotation_scale <= 1:
        raise ValueError(f"rotation_scale={rotation_scale!r}: use a number above 0 and at most 1")


def _check_names(task: str, robot: str) -> None:
    from robosuite.environments.base import REGISTERED_ENVS
    from robosuite.environments.manipulation.two_arm_env import TwoArmEnv
    from robosuite.models.robots.robot_model import REGISTERED_ROBOTS
    from robosuite.robots import ROBOT_CLASS_MAPPING

    tasks = [name for name, env_class in REGISTERED_ENVS.items() if not issubclass(env_class, TwoArmEnv)]
    robots = [name for name in ROBOT_CLASS_MAPPING if len(REGISTERED_ROBOTS[name].arms) == 1]
    for field, name, valid in (("task", task, tasks), ("robot", robot, robots)):
        if name not in valid:
            two_arms = name in REGISTERED_ENVS or name in ROBOT_CLASS_MAPPING
            reason = "has two arms, which is not supported" if two_arms else "unknown"
            raise ValueError(f"{field}={name!r}: {reason}: use one of {', '.join(valid)}")
