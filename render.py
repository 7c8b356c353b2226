"""Pictures of one MuJoCo simulation, drawn without a screen: the agent's small ones and large ones for people.

    mujoco, robosuite = import_simulator()
    renderer = Renderer(mujoco, model, data, camera_ids, image_size=64)
    image, picture = renderer.observation(), renderer.overview()

Importing this file imports neither MuJoCo nor OpenGL and does no work.
"""

import atexit
import contextlib
import copy
import ctypes
import importlib
import math
import os
import re
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# The agent's pictures. In software rendering they cost vertices (a Panda has 168,000 faces) and samples,
# hardly pixels. Lift, agentview and robot0_eye_in_hand, 64 x 64: 100 ms in RoboSuite's look, 7 ms in this.
AGENT_MSAA_SAMPLES = 0  # RoboSuite has 4. This saves 62 of 100 ms and moves a pixel by 2 of 255 on average.
REFLECTIONS = False  # For people neither. They draw the scene twice: 38 -> 17 ms. A pixel moves by 0.3, in Door by 3.
AGENT_DRAWN_SIZE = 64  # Smaller pictures are averages of drawn ones at least this large: pixels cost next to nothing.
SKIP_UNSEEN_GEOMS = True  # Half of the arm is usually out of the camera's view: 17 -> 12.5 ms. No pixel changes.
# Meshes are coarser: the vertices in a cell of a grid are one, and a mesh's surface has about so many cells in a
# picture of 64 x 64. 12.5 -> 7.7 ms. On average a pixel moves by 0.3 of 255 in Lift and by 1.3 in Door, whose
# agentview has the whole arm; twice the cells would cost 1 ms more in Lift. Without a pedestal it would be by 7.
# Smaller pictures need fewer cells: at 32 x 32, Lift's three pictures take 0.72 of the time (benchmarks/README.md).
AGENT_MESH_CELLS = 4_000
AGENT_CLOSE = 4  # What moves with a camera may be so many times closer, as Sawyer's hand is: 16 times the cells.
AGENT_ROUND_SIDES = 16  # of a cylinder, instead of MuJoCo's 28: 6.6 -> 6 ms, after sites; 0.06 of 255 in Door

# Pictures for people are smoothed by drawing larger and averaging.
OVERVIEW_SIZE = 256  # pixels, height and width
OVERVIEW_SUPERSAMPLING = 2
OVERVIEW_VIEW = {"lookat": (-0.2, 0.03, 1.05), "distance": 1.5, "azimuth": 225.0, "elevation": -22.0}  # m, degrees

WORKPLACE_DROP = 0.1  # meters from the hand's first place down to where aimed cameras look

# MuJoCo's geom groups as RoboSuite uses them; group 0 has the collision shapes.
VISUAL_GEOMS, MARKER_GEOMS, HIDDEN_GEOMS = 1, 2, 5
MAX_GEOMS = 10_000  # in a scene, as mujoco.Renderer has it

GL_BACKENDS = {"linux": ("egl", "osmesa", "glfw", "glx"), "darwin": ("cgl", "glfw"), "win32": ("wgl", "glfw")}
GL_INSTALL_HINT = "on Debian or Ubuntu: apt-get install libegl1 libgl1 libgl1-mesa-dri (or libosmesa6)"
GL_FAILURE = re.compile(r"lib\w+\.so|egl|EGL|OSMesa|OpenGL|'gl[A-Z]")  # what an import error then names


def gl_backend(platform: str, environ: Mapping[str, str], libraries: Callable[[str], bool]) -> dict[str, str]:
    """The environment variables that let MuJoCo render without a screen. Pure: it changes nothing.

    `platform` is sys.platform's value; `libraries("EGL")` tells whether that shared library can be loaded.
    The user's own MUJOCO_GL is kept; it is a ValueError if it is invalid. RuntimeError if nothing can render.
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
    # PyOpenGL has a variable of its own, and MuJoCo refuses to start if the two differ.
    for_pyopengl = {"PYOPENGL_PLATFORM": chosen} if chosen in ("egl", "osmesa") else {}
    return {"MUJOCO_GL": chosen, **for_pyopengl}


def has_library(name: str) -> bool:
    """Whether the shared library `name`, such as "EGL", can be loaded."""
    for version in ("", ".1", ".8", ".6"):  # of libEGL and libOSMesa
        with contextlib.suppress(OSError):
            ctypes.CDLL(f"lib{name}.so{version}")
            return True
    return False


def import_simulator() -> tuple[Any, Any]:
    """Returns (mujoco, robosuite), imported without a word, with os.environ set up for rendering."""
    os.environ.update(gl_backend(sys.platform, os.environ, has_library))
    # RoboSuite refuses a MUJOCO_EGL_DEVICE_ID that isn't in CUDA_VISIBLE_DEVICES, and overwrites MUJOCO_GL.
    before = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "MUJOCO_GL")}
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    try:
        return _import_rendering("mujoco"), _import_rendering("robosuite")
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _import_rendering(name: str) -> Any:
    """Imports a module that uses OpenGL. RuntimeError, in one line, if a library of OpenGL's is missing."""
    try:
        return importlib.import_module(name)
    except (ImportError, AttributeError) as error:  # PyOpenGL raises the latter if a library is missing
        reason = _one_line(error)
        if not GL_FAILURE.search(reason):
            raise
    raise RuntimeError(f"can't import {name} ({reason}); {GL_INSTALL_HINT}")


def aim(mujoco: Any, task: Any, camera_ids: Sequence[int], radius: float) -> None:
    """Turns the standing cameras to the place below the hand's first one, and narrows them to `radius` around it."""
    if not 0 < radius < math.inf:  # the pictures would be black, or of anything
        raise ValueError(f"camera_radius={radius!r}: use 0 or more")
    model, robot = task.sim.model._model, task.robots[0]
    data = mujoco.MjData(model)  # the arm's own first pose: a reset has moved it a little, at random
    data.qpos[:] = task.sim.data.qpos
    data.qpos[robot._ref_joint_pos_indexes] = robot.init_qpos
    mujoco.mj_forward(model, data)
    workplace = data.site_xpos[robot.eef_site_id["right"]] - (0, 0, WORKPLACE_DROP)
    for camera in camera_ids:
        body = model.cam_bodyid[camera]
        if model.body_weldid[body] != 0:
            continue
        backward = data.cam_xpos[camera] - workplace  # a camera looks along its negative z axis
        distance = np.linalg.norm(backward)
        backward /= distance
        right = np.cross((0, 0, 1), backward)
        if np.linalg.norm(right) < 0.1:  # straight down, where that is any direction
            right = data.cam_xmat[camera].reshape(3, 3)[:, 0]
            right = right - backward * (right @ backward)
        right /= np.linalg.norm(right)
        turn = np.stack([right, np.cross(backward, right), backward], axis=1)
        mujoco.mju_mat2Quat(model.cam_quat[camera], (data.xmat[body].reshape(3, 3).T @ turn).flatten())
        model.cam_fovy[camera] = np.degrees(2 * np.arctan(radius / distance))


class Renderer:
    """Draws one simulation with an OpenGL context of its own.

    model, data   MuJoCo's own, of the simulation
    camera_ids    the cameras of an observation, in order
    image_size    height and width of an observation, in pixels

    RoboSuite's renderer never makes its context current (of two environments in a process, one shows the other's
    textures), can't be freed on request, and takes CUDA_VISIBLE_DEVICES for the number of an EGL device.

    mujoco.Renderer has none of these faults, and is as fast with the same settings. But it would need two OpenGL
    contexts, takes all meshes as they are, and prints a traceback at exit if it was not closed.
    """

    def __init__(self, mujoco: Any, model: Any, data: Any, camera_ids: Sequence[int], image_size: int) -> None:
        self._mujoco, self._model, self._data = mujoco, model, data
        self._camera_ids, self._image_size = tuple(camera_ids), image_size
        self._supersampling = math.ceil(AGENT_DRAWN_SIZE / image_size)
        casts_shadows = bool(model.light_castshadow.any())
        model.vis.quality.offsamples = AGENT_MSAA_SAMPLES
        if not casts_shadows:  # no light of RoboSuite's own does, and the shadows' buffer takes 70 MB
            model.vis.quality.shadowsize = 0
        # A geom out of view may still be seen in a mirror, or by its shadow.
        self._skip_unseen = SKIP_UNSEEN_GEOMS and not REFLECTIONS and not casts_shadows
        drawn = image_size * self._supersampling
        self._gl, self._context = _open_context(mujoco, _coarser(mujoco, model, camera_ids, image_size), drawn)
        self._contexts = [self._context]
        # For an environment dropped without close(), and for the end of the program, before EGL itself ends.
        self._free = weakref.finalize(self, _free_contexts, self._gl, self._contexts)
        self._free.atexit = False
        atexit.register(self._free)

        self._scene = mujoco.MjvScene(model, maxgeom=MAX_GEOMS)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = REFLECTIONS
        self._options = mujoco.MjvOption()
        self._options.geomgroup[:] = 0
        self._options.geomgroup[[VISUAL_GEOMS, MARKER_GEOMS]] = 1
        self._agent_camera, self._overview_camera = mujoco.MjvCamera(), mujoco.MjvCamera()
        self._agent_camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._overview_camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        for name, value in OVERVIEW_VIEW.items():
            setattr(self._overview_camera, name, value)

    def observation(self) -> np.ndarray:
        """What the agent sees: uint8 (3 * cameras, image_size, image_size)."""
        self._gl.make_current()
        pictures = [self._agent_picture(camera_id) for camera_id in self._camera_ids]
        return np.concatenate([picture.transpose(2, 0, 1) for picture in pictures])

    def overview(self) -> np.ndarray:
        """The scene for people: uint8 (OVERVIEW_SIZE, OVERVIEW_SIZE, 3)."""
        self._gl.make_current()
        if len(self._contexts) == 1:  # only now: most environments never need these 130 MB
            size = OVERVIEW_SIZE * OVERVIEW_SUPERSAMPLING
            self._contexts.append(_resources(self._mujoco, self._model, size))
        return self._picture(self._overview_camera, OVERVIEW_SIZE, OVERVIEW_SUPERSAMPLING, self._contexts[-1])

    def close(self) -> None:
        """Frees the OpenGL context; may be called again."""
        atexit.unregister(self._free)
        self._free()

    def _agent_picture(self, camera_id: int) -> np.ndarray:
        self._agent_camera.fixedcamid = camera_id
        if not self._skip_unseen:
            return self._agent_pixels()
        groups = self._model.geom_group.copy()
        self._mujoco.mjv_updateCamera(self._model, self._data, self._agent_camera, self._scene)
        self._model.geom_group[self._unseen_geoms()] = HIDDEN_GEOMS
        picture = self._agent_pixels()
        self._model.geom_group[:] = groups
        return picture

    def _agent_pixels(self) -> np.ndarray:
        return self._picture(self._agent_camera, self._image_size, self._supersampling, self._context)

    def _picture(self, camera: Any, size: int, supersampling: int, context: Any) -> np.ndarray:
        """Returns uint8 (size, size, 3), upright, averaged from a picture that is larger by a factor."""
        large = self._drawn(camera, size * supersampling, context)
        if supersampling == 1:
            return large
        rows = large.reshape(size, supersampling, -1, 3).mean(1)  # first, as both at once takes three times as long
        return rows.reshape(size, size, supersampling, 3).mean(2).round().astype(np.uint8)

    def _drawn(self, camera: Any, size: int, context: Any) -> np.ndarray:
        mujoco, scene = self._mujoco, self._scene
        everything = mujoco.mjtCatBit.mjCAT_ALL
        # RoboSuite hides sites, which mark places, by a negative opacity. MuJoCo would still draw them: 1 ms.
        self._options.sitegroup[:3] = (self._model.site_rgba[:, 3] > 0).any()
        mujoco.mjv_updateScene(self._model, self._data, self._options, None, camera, everything, scene)
        viewport = mujoco.MjrRect(0, 0, size, size)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
        mujoco.mjr_render(viewport, scene, context)
        pixels = np.empty((size, size, 3), np.uint8)
        mujoco.mjr_readPixels(pixels, None, viewport, context)
        return pixels[::-1]  # OpenGL's first row is the lowest

    def _unseen_geoms(self) -> np.ndarray:
        """Returns bool (geoms,): those whose bounding box lies beyond a plane that bounds the picture."""
        model, data = self._model, self._data
        eyes = self._scene.camera  # a stereo pair; a plain picture is taken from the middle
        position, normals = (eyes[0].pos + eyes[1].pos) / 2, _frustum_normals(eyes[0])
        rotation = data.geom_xmat.reshape(-1, 3, 3)
        middle, half_sides = model.geom_aabb[:, :3], model.geom_aabb[:, None, 3:]
        center = data.geom_xpos + np.einsum("gij,gj->gi", rotation, middle) - position
        reach = (np.abs(np.einsum("pi,gij->gpj", normals, rotation)) * half_sides).sum(-1)
        outside = center @ normals.T + reach < 0  # (geoms, planes)
        return outside.any(-1) & (model.geom_rbound > 0)  # a floor has no bound


def _frustum_normals(eye: Any) -> np.ndarray:
    """Returns (planes, 3): inward normals, in the world, of the planes that bound a square picture."""
    if eye.orthographic:
        return np.zeros((0, 3))  # its planes don't meet in the eye: nothing is skipped
    forward, up = np.array(eye.forward), np.array(eye.up)
    right, near = np.cross(forward, up), eye.frustum_near
    half_width = eye.frustum_width or (eye.frustum_top - eye.frustum_bottom) / 2
    return np.stack(
        [
            forward,
            (eye.frustum_center + half_width) * forward - near * right,
            near * right - (eye.frustum_center - half_width) * forward,
            eye.frustum_top * forward - near * up,
            near * up - eye.frustum_bottom * forward,
        ]
    )


def _coarser(mujoco: Any, model: Any, camera_ids: Sequence[int], size: int) -> Any:
    """Returns a copy of the model whose shapes have fewer faces, for pictures of size x size pixels."""
    coarse = copy.copy(model)
    coarse.vis.quality.numslices, coarse.vis.quality.numstacks = AGENT_ROUND_SIDES, AGENT_ROUND_SIDES // 2
    carriers = model.body_weldid[model.cam_bodyid[list(camera_ids)]]
    close = np.isin(model.body_weldid[model.geom_bodyid], carriers[carriers > 0])  # 0 is the world
    close_meshes = model.geom_dataid[close & (model.geom_type == mujoco.mjtGeom.mjGEOM_MESH)]
    cells = AGENT_MESH_CELLS * (size / 64) ** 2
    for mesh in range(model.nmesh):
        _merge_vertices(coarse, mesh, cells * AGENT_CLOSE**2 if mesh in close_meshes else cells)
    return coarse


def _merge_vertices(model: Any, mesh: int, cells: float) -> None:
    """Moves the vertices in a cell of a grid to their middle, and drops faces that are then flat or there twice.

    Such a cell is as wide as a square of 1/cells of the mesh's surface. So long thin meshes keep their shape.
    """
    first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
    vertices = model.mesh_vert[first : first + count]
    first, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
    arrays = [a[first : first + count] for a in (model.mesh_face, model.mesh_facenormal, model.mesh_facetexcoord)]
    corners = vertices[arrays[0]]  # (faces, corners, axes)
    surface = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum() / 2
    grid = np.floor((vertices - vertices.min(0)) / math.sqrt(surface / cells)).astype(int)
    _, cell, sizes = np.unique(np.ravel_multi_index(grid.T, grid.max(0) + 1), return_inverse=True, return_counts=True)
    faces = cell[arrays[0]]
    # Faces are equal if they turn the same way through the same cells: the lowest comes first.
    faces = np.take_along_axis(faces, (faces.argmin(1)[:, None] + np.arange(3)) % 3, axis=1)
    _, different = np.unique(np.ravel_multi_index(tuple(faces.T), (len(sizes),) * 3), return_index=True)
    kept = different[(faces[different] != np.roll(faces[different], 1, axis=1)).all(1)]
    vertices[:] = np.stack([np.bincount(cell, axis) / sizes for axis in vertices.T], axis=1)[cell]
    for array in arrays:
        array[: len(kept)] = array[kept]
    model.mesh_facenum[mesh] = len(kept)


def _open_context(mujoco: Any, model: Any, size: int) -> tuple[Any, Any]:
    """Returns (OpenGL context, MuJoCo's resources in it), for pictures up to size x size. RuntimeError without."""
    backend = os.environ.get("MUJOCO_GL", "").strip().lower()
    module = backend if backend in ("egl", "osmesa", "cgl") else "cgl" if sys.platform == "darwin" else "glfw"
    try:
        gl = importlib.import_module(f"mujoco.{module}").GLContext(size, size)
        gl.make_current()
        return gl, _resources(mujoco, model, size)
    except Exception as error:  # drivers fail in many ways, most of which don't mention OpenGL
        reason = _one_line(error)
    raise RuntimeError(f"can't render with MUJOCO_GL={module} ({reason}); {GL_INSTALL_HINT}")


def _resources(mujoco: Any, model: Any, size: int) -> Any:
    """MuJoCo's resources in the current OpenGL context: the model's meshes, and a buffer of size x size pixels."""
    model.vis.global_.offwidth = model.vis.global_.offheight = size
    return mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)


def _free_contexts(gl: Any, contexts: Sequence[Any]) -> None:
    gl.make_current()
    for context in contexts:
        context.free()
    gl.free()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
