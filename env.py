"""RoboSuite tasks as Gymnasium environments that show the agent pixels only.

    env = make_env(task="Lift", robot="Panda", controller="OSC_POSE", cameras=("agentview",), image_size=64,
                   control_freq=20, action_repeat=2, episode_steps=500, reward_shaping=True, seed=0)
    image, info = env.reset()                                     # (3 * len(cameras), 64, 64) uint8, upright
    image, reward, terminated, truncated, info = env.step(env.action_space.sample())

Importing this file does no work and needs neither RoboSuite nor MuJoCo: both are imported when an environment is built,
after the OpenGL back end has been chosen. With `rotation_scale` 1 and `camera_radius` 0, physics, controllers and
rewards are RoboSuite's own, bit for bit. Four things differ from `robosuite.make`: pictures are drawn more cheaply
(render.py), a seed decides everything that is drawn at random, a reset forgets the past, and what is drawn when the
model is built, such as the size of Lift's cube, stays as long as the environment.
"""

import logging
import operator
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from render import Renderer, aim, import_simulator

logging.getLogger("robosuite_logs").disabled = True  # RoboSuite logs when it is imported

PHYSICS_STEP = 0.002  # seconds, RoboSuite's own

# RoboSuite 1.5.2 has two more: its JOINT_VELOCITY can't be built (it assigns to a property), and a
# Panda under its IK_POSE moves by 30 cm in half a second although it is told to stand still.
CONTROLLERS = ("OSC_POSE", "OSC_POSITION", "JOINT_POSITION", "JOINT_TORQUE")

MAKE_OPTIONS = {  # of robosuite.make
    "has_renderer": False,
    "has_offscreen_renderer": False,  # render.Renderer says why
    "renderer": "mujoco",
    "use_camera_obs": False,
    "reward_scale": 1.0,
    "ignore_done": True,  # the time limit is ours: what is left of `done` is a task that ends itself
    "hard_reset": False,  # milliseconds instead of seconds, and no leak
}
UNSTABLE = slice(4, 7)  # among MuJoCo's warnings: mjWARN_BADQPOS, mjWARN_BADQVEL, mjWARN_BADQACC
RESTORED_BYTES = 1 << 20  # a reset restores the model's arrays below this size; above are meshes and textures


class RoboSuiteEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """One single-arm RoboSuite task, built in seconds. RuntimeError without OpenGL, ValueError for bad input.

    The keywords are constants of train.Config, which says what they mean. run.py refuses more of their values; here,
    unknown names are refused, and what would go wrong without an error. What Config does not say:

    task            defining the class of a task of your own registers it
    controller      "OSC_POSE" has 7 actions with the gripper, "OSC_POSITION" 4
    rotation_scale  at 1, OSC_POSE turns the hand by at most half a radian a control step
    cameras         their pictures are stacked as channels in this order
    episode_steps   a multiple of action_repeat
    seed            decides what is drawn at construction (in Lift the cube's size), and starts np_random

    Observation: uint8 (3 * len(cameras), image_size, image_size), upright.
    Action: float32 (A,) in [-1, 1]. A gripper comes last, and only its sign counts: -1 opens. A hand with fingers of
    their own, such as PandaDexRH's, has several actions there, and is no gripper.
    `truncated` at the episode's length; `terminated` only if the task ends itself, as Wipe does.
    info["success"]: whether the task was solved after any control step of this step (or is, at a reset).
    metadata["gripper"]: whether the last action is a gripper's; Wipe's robots have none.
    metadata["moves"]: how many of the first actions move the hand: three with OSC, and all joints without.

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
        camera_radius: float = 0.0,
        image_size: int,
        control_freq: float,
        action_repeat: int,
        episode_steps: int,
        reward_shaping: bool,
        seed: int,
    ) -> None:
        self._renderer: Renderer | None = None
        self._task: Any = None
        if action_repeat < 1 or episode_steps < 1 or episode_steps % action_repeat:  # it would end late, or never
            multiple = f"use a multiple of action_repeat={action_repeat}, both 1 or more"
            raise ValueError(f"episode_steps={episode_steps}: {multiple}")
        _check_rate(control_freq)
        mujoco, robosuite = import_simulator()
        robosuite.macros.SIMULATION_TIMESTEP = PHYSICS_STEP  # in a user's macros_private.py it may be another
        _check_names(task, robot, controller)
        seed = operator.index(seed)
        super().reset(seed=seed)

        self._action_repeat, self._episode_steps = action_repeat, episode_steps
        self._steps: int | None = None  # control steps since the reset; None: no episode is running
        self._task = robosuite.make(
            task,
            robots=robot,
            controller_configs=_controller_config(robot, controller, rotation_scale),
            control_freq=control_freq,
            use_object_obs=not _is_robosuites(robosuite.environments.base.REGISTERED_ENVS[task]),
            reward_shaping=reward_shaping,
            seed=seed,
            **MAKE_OPTIONS,
        )
        sim = self._task.sim
        _skip_observables(self._task)
        if _HeldGoal.fits(self._task):
            self._task._pre_action = _HeldGoal(mujoco, self._task)
        camera_ids = _camera_ids(sim.model, cameras)
        if camera_radius:
            aim(mujoco, self._task, camera_ids, camera_radius)
        self._pristine = _snapshot(sim.model._model)
        self._renderer = Renderer(mujoco, sim.model._model, sim.data._data, camera_ids, image_size)

        self._image_shape, self._action_shape = (3 * len(camera_ids), image_size, image_size), (self._task.action_dim,)
        self.observation_space = gymnasium.spaces.Box(0, 255, self._image_shape, np.uint8)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, self._action_shape, np.float32)
        fingers = sum(part.dof for part in self._task.robots[0].gripper.values())  # a hand has several actions
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": control_freq / action_repeat,
            "gripper": fingers == 1,
            "moves": 3 if controller.startswith("OSC") else self._task.action_dim - fingers,
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
        _hand_over_generator(self._task, self.np_random)
        self._task.reset()
        self._steps = 0
        return renderer.observation(), {"success": bool(self._task._check_success())}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Holds `action` (A,) for action_repeat control steps.

        The reward is their sum, the picture the last; `info["success"]` is whether any of them solved the task.
        Raises ValueError for an action of another shape or with a NaN, ResetNeeded if no episode runs, and RuntimeError
        if the simulation becomes unstable, of which MuJoCo only warns.
        """
        renderer = self._open_renderer()
        if self._steps is None:
            raise gymnasium.error.ResetNeeded("step() needs a running episode: call reset() first")
        command = np.asarray(action, dtype=np.float64)
        if command.shape != self._action_shape or not np.isfinite(command).all():
            raise ValueError(f"action={action!r}: give {self._action_shape[0]} numbers in [-1, 1]")
        total, terminated, success = 0.0, False, False
        for _ in range(self._action_repeat):
            _, reward, terminated, _ = self._task.step(command)
            if self._task.sim.data._data.warning[UNSTABLE].number.any():  # MuJoCo has put it back into its first pose
                raise RuntimeError("the simulation became unstable")
            total += float(reward)
            self._steps += 1
            success = success or bool(self._task._check_success())
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
        self._steps, self._pristine = None, []  # the latter has views of the model
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        if self._task is not None:
            self._task.close()
            self._task = None

    def _open_renderer(self) -> Renderer:
        if self._renderer is None:
            raise RuntimeError("this environment is closed")
        return self._renderer


make_env = RoboSuiteEnv


def _hand_over_generator(task: Any, rng: np.random.Generator) -> None:
    """Makes `rng` the generator of all in the task that draws at a reset."""
    from robosuite.utils.placement_samplers import ObjectPositionSampler

    task.rng = rng
    found, seen = list(vars(task).values()), set()
    while found:
        value = found.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, ObjectPositionSampler):
            value.rng = rng
            found.append(getattr(value, "samplers", {}))  # a composite's parts
        elif isinstance(value, dict | list | tuple):
            found.extend(value.values() if isinstance(value, dict) else value)
    if hasattr(task.model.mujoco_arena, "rng"):  # Wipe's draws its dirt
        task.model.mujoco_arena.rng = rng


def _is_robosuites(task: type) -> bool:
    """Whether a task's class comes with RoboSuite."""
    return task.__module__.startswith("robosuite.")


def _skip_observables(task: Any) -> None:
    """Leaves out the observations that nobody reads; a user's own task may read them."""
    if _is_robosuites(type(task)):
        task._update_observables = lambda *_args, **_kwargs: None
        task._get_observations = lambda *_args, **_kwargs: {}


class _HeldGoal:
    """Controls an arm by OSC as RoboSuite does, bit for bit: 3.1 ms a control step instead of 6.6.

    It takes the place of a task's `_pre_action`, which RoboSuite calls in each physics step: 25 times in a control
    step at 20 Hz. The first call of a control step is RoboSuite's own. In the others the goal is held: limits,
    indices, the pose of the base and the gripper's command stay the same, and only the arm's torques are computed
    anew, with RoboSuite's arithmetic in its order (Khatib 1987, "A unified approach for motion and force control").
    What remains of the 3.1 ms: MuJoCo 1.0, this 1.3 (0.5 in RoboSuite's compiled `opspace_matrices`), that first
    call 0.35.
    """

    def __init__(self, mujoco: Any, task: Any) -> None:
        from robosuite.utils import control_utils

        self._mujoco, self._math, self._robot = mujoco, control_utils, task.robots[0]
        self._model, self._data = task.sim.model._model, task.sim.data._data
        self._robosuites_own = task._pre_action
        self._all_masses = np.zeros((self._model.nv, self._model.nv))
        # Jacobians of position and rotation: two arrays, as a BLAS may add in another order if a matrix doesn't
        # start at a multiple of 16 bytes.
        self._shift, self._turn = np.zeros((3, self._model.nv)), np.zeros((3, self._model.nv))

    @staticmethod
    def fits(task: Any) -> bool:
        """Whether all of the task's control is what this class does: one arm on a fixed base, and a gripper."""
        from robosuite.controllers.composite.composite_controller import CompositeController
        from robosuite.controllers.parts.arm.osc import OperationalSpaceController
        from robosuite.controllers.parts.gripper.simple_grip import SimpleGripController
        from robosuite.environments.robot_env import RobotEnv
        from robosuite.robots.fixed_base_robot import FixedBaseRobot

        robot, model = task.robots[0], task.sim.model
        parts = dict(robot.part_controllers)
        arm = parts.pop("right", None)
        if type(arm) is not OperationalSpaceController or type(robot) is not FixedBaseRobot:
            return False
        base = model.site_name2id(f"{arm.naming_prefix}{arm.part_name}_center")
        return (
            type(task)._pre_action is RobotEnv._pre_action
            and type(robot.composite_controller) is CompositeController
            and all(type(part) is SimpleGripController and part.interpolator is None for part in parts.values())
            and task.lite_physics
            and arm.lite_physics
            and arm.num_ref_sites == 1
            and arm.impedance_mode == "fixed"
            and arm.input_ref_frame == "base"
            and arm.interpolator_pos is arm.interpolator_ori is None
            and arm.uncoupling
            and model.body_weldid[model.site_bodyid[base]] == 0
        )

    def __call__(self, action: np.ndarray, policy_step: bool = False) -> None:
        """Sets the simulation's controls; `policy_step` is true in the first physics step of a control step."""
        if policy_step:
            self._robosuites_own(action, policy_step)
            self._hold()
        else:
            self._move_arm()

    def _hold(self) -> None:
        arm = self._arm = self._robot.part_controllers["right"]
        self._site = self._model.site(arm.ref_name).id
        self._dofs, self._joints = np.array(arm.qvel_index), np.array(arm.qpos_index)
        self._actuators = np.array(self._robot._ref_actuators_indexes_dict["right"])
        self._lowest, self._highest = self._model.actuator_ctrlrange[self._actuators].T
        self._goal_position = arm.origin_pos + np.dot(arm.origin_ori, arm.goal_pos)
        self._goal_turn = np.dot(arm.origin_ori, arm.goal_ori)

    def _move_arm(self) -> None:
        mujoco, model, data, arm, dofs = self._mujoco, self._model, self._data, self._arm, self._dofs
        mujoco.mj_jacSite(model, data, self._shift, self._turn, self._site)
        mujoco.mj_fullM(model, self._all_masses, data.qM)
        qvel, mass = data.qvel, self._all_masses[dofs, :][:, dofs]
        arm.J_full[:3] = arm.J_pos[:] = self._shift[:, dofs]
        arm.J_full[3:] = arm.J_ori[:] = self._turn[:, dofs]
        position_error = self._goal_position - data.site_xpos[self._site]
        turn_error = self._math.orientation_error(self._goal_turn, data.site_xmat[self._site].reshape(3, 3))
        force = position_error * arm.kp[:3] - np.dot(self._shift, qvel) * arm.kd[:3]
        torque = turn_error * arm.kp[3:] - np.dot(self._turn, qvel) * arm.kd[3:]
        _, lambda_pos, lambda_ori, nullspace = self._math.opspace_matrices(mass, arm.J_full, arm.J_pos, arm.J_ori)
        wrench = np.concatenate([np.dot(lambda_pos, force), np.dot(lambda_ori, torque)])
        torques = np.dot(arm.J_full.T, wrench) + data.qfrc_bias[dofs]
        rest, joints = arm.initial_joint, data.qpos[self._joints]
        torques += self._math.nullspace_torques(mass, nullspace, rest, joints, qvel[dofs])
        data.ctrl[self._actuators] = np.clip(torques, self._lowest, self._highest)


def _snapshot(model: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (view, copy) of each of the model's arrays, without its meshes and textures."""
    arrays = [getattr(model, name) for name in dir(model) if not name.startswith("_")]
    arrays = [array for array in arrays if isinstance(array, np.ndarray) and array.flags.writeable]
    return [(array, array.copy()) for array in arrays if 0 < array.nbytes < RESTORED_BYTES]


def _controller_config(robot: str, controller: str, rotation_scale: float) -> dict[str, Any]:
    """The robot's own configuration, but for the arm's controller and how far that turns the hand."""
    from robosuite.controllers import load_composite_controller_config, load_part_controller_config

    if not 0 < rotation_scale <= 1:  # with a number below 0 it would turn as with one above, with NaN not move at all
        raise ValueError(f"rotation_scale={rotation_scale!r}: use a number above 0 and at most 1")
    config = load_composite_controller_config(robot=robot)
    arm = config["body_parts"]["right"]
    if arm["type"] != controller:
        part = load_part_controller_config(default_controller=controller)
        arm = config["body_parts"]["right"] = part | {"gripper": arm["gripper"]}
    if controller == "OSC_POSE" and rotation_scale != 1:
        for limit in ("output_max", "output_min"):  # meters in x, y, z, then in radians about them
            arm[limit] = [*arm[limit][:3], *(rotation_scale * radians for radians in arm[limit][3:])]
    return config


def _camera_ids(model: Any, cameras: Sequence[str]) -> list[int]:
    for camera in cameras:
        if camera not in model.camera_names:
            raise ValueError(f"cameras: unknown {camera!r}: use some of {', '.join(model.camera_names)}")
    return [model.camera_name2id(camera) for camera in cameras]


def _check_rate(control_freq: float) -> None:
    # RoboSuite rounds the number of physics steps down: at 15 Hz a control step would be 66 ms instead of 66.7.
    if not 1 <= control_freq <= 500 or 1 / control_freq / PHYSICS_STEP % 1 >= 1e-6:
        rates = f"the physics rate of {1 / PHYSICS_STEP:g} Hz: use one of 1, 2, 4, 5, 10, 12.5, 20, 25, 50, 100"
        raise ValueError(f"control_freq={control_freq!r}: must divide {rates}")


def _check_names(task: str, robot: str, controller: str) -> None:
    from robosuite.environments.base import REGISTERED_ENVS
    from robosuite.environments.manipulation.two_arm_env import TwoArmEnv
    from robosuite.models.robots.robot_model import REGISTERED_ROBOTS
    from robosuite.robots import ROBOT_CLASS_MAPPING, FixedBaseRobot

    tasks = [name for name, env_class in REGISTERED_ENVS.items() if not issubclass(env_class, TwoArmEnv)]
    fixed = [name for name, kind in ROBOT_CLASS_MAPPING.items() if kind is FixedBaseRobot]
    robots = [name for name in fixed if len(REGISTERED_ROBOTS[name].arms) == 1]
    names = {"task": (task, tasks), "robot": (robot, robots), "controller": (controller, CONTROLLERS)}
    for field, (name, valid) in names.items():
        if name not in valid:
            known = name in REGISTERED_ENVS or name in ROBOT_CLASS_MAPPING
            has = "a moving base" if field == "robot" and name not in fixed else "two arms"
            reason = f"has {has}, which is not supported" if known else "unknown"
            raise ValueError(f"{field}={name!r}: {reason}: use one of {', '.join(valid)}")
