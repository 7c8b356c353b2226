"""render.py: how the OpenGL back end is chosen, and what the pictures show."""

from types import SimpleNamespace

import numpy as np
import pytest

import render
from render import gl_backend
from simulated import ARGUMENTS, build, episode_from_seed, plain_reset, play

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

    monkeypatch.setattr(render.importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="eglQueryString.*apt-get install") as caught:
        render._open_context(None, None, 64)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None


# ---- pictures


def test_cameras_are_stacked_in_the_order_given_and_envs_do_not_disturb_each_other(lift):
    """Two living envs with other cameras and seeds each show what they show alone."""
    both = lift.reset(seed=8)[0]
    assert both.shape == (6, 64, 64) and both.dtype == np.uint8
    other = build(cameras=("robot0_eye_in_hand",), seed=4)
    hand = other.reset(seed=8)[0]
    assert hand.shape == (3, 64, 64)
    other.step(other.action_space.sample())
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


def test_standing_cameras_can_be_aimed_at_the_workplace(lift):
    """They look at the place below the hand's first one, upright, and show so many meters of it; the wrist's stays."""
    aimed = build(camera_radius=0.3, cameras=("agentview", "sideview", "birdview", "robot0_eye_in_hand"))
    pictures, _ = aimed.reset(seed=8)
    own, _ = lift.reset(seed=8)
    np.testing.assert_array_equal(pictures[9:], own[3:])
    assert (pictures[:3] != own[:3]).mean() > 0.5
    model, data = aimed._task.sim.model._model, aimed._task.sim.data._data
    workplace = data.site_xpos[aimed._task.robots[0].eef_site_id["right"]] - (0, 0, render.WORKPLACE_DROP)
    for name in ("agentview", "sideview", "birdview"):
        camera = model.camera(name).id
        away = workplace - data.cam_xpos[camera]
        right, up, backward = data.cam_xmat[camera].reshape(3, 3).T
        distance = -away @ backward
        assert abs(away @ right) < 0.05 and abs(away @ up) < 0.05, "a reset moves the hand by a centimeter or two"
        assert distance * np.tan(np.radians(model.cam_fovy[camera]) / 2) == pytest.approx(0.3, abs=0.02)
        assert abs(right[2]) < 0.01 and (up[2] > 0 or name == "birdview")
    aimed.close()


def test_pictures_are_close_to_robosuites_own_look(lift, plain):
    """The cheap look differs by less than 3 of 255 on average."""
    image = lift.reset(seed=11)[0].astype(int)
    stock = plain_reset(plain, 11)
    for k, camera in enumerate(ARGUMENTS["cameras"]):
        picture = stock[f"{camera}_image"][::-1].transpose(2, 0, 1).astype(int)
        assert np.abs(image[3 * k : 3 * k + 3] - picture).mean() < 3


def test_small_pictures_are_averages_of_larger_ones(monkeypatch):
    """A pixel of a picture of 32 is the mean of four of one of 64, if both have the same meshes."""
    monkeypatch.setattr(render, "_coarser", lambda mujoco, model, *rest: model)
    pictures = []
    for size in (32, 64):
        environment = build(image_size=size)
        pictures.append(environment.reset(seed=8)[0])
        environment.close()
    small, large = pictures
    assert small.shape == (6, 32, 32) and small.dtype == np.uint8
    np.testing.assert_allclose(small, large.reshape(6, 32, 2, 32, 2).mean((2, 4)), atol=0.5)


@pytest.mark.parametrize(("task", "size"), [("Lift", 64), ("Door", 64), ("Stack", 64), ("Door", 32)])
def test_coarser_meshes_are_hardly_seen(task, size, monkeypatch):
    """Half of the faces are gone from the agent's pictures, and no picture moves by 3 of 255 on average."""
    coarse = build(task=task, image_size=size)
    monkeypatch.setattr(render, "_coarser", lambda mujoco, model, *rest: model)
    whole = build(task=task, image_size=size)
    for seed in range(3):
        for environment in (coarse, whole):
            environment.np_random = np.random.default_rng(seed)
        pictures, expected = play(coarse, seed)[0].astype(int), play(whole, seed)[0]
        assert (pictures != expected).any()
        assert np.abs(pictures - expected).mean((-2, -1)).reshape(-1, 2, 3).mean(-1).max() < 3
    for environment in (coarse, whole):
        environment.close()


def test_coarser_meshes_are_a_copy_and_all_there(lift):
    """The simulation's own model stays whole, no mesh vanishes, and what carries the camera keeps most of its faces."""
    model, cameras = lift._task.sim.model._model, lift._renderer._camera_ids
    before = [array.copy() for array in (model.mesh_vert, model.mesh_face, model.mesh_facenum)]
    coarse = render._coarser(lift._renderer._mujoco, model, cameras, 64)
    for array, expected in zip((model.mesh_vert, model.mesh_face, model.mesh_facenum), before, strict=True):
        np.testing.assert_array_equal(array, expected)
    assert coarse.mesh_facenum.sum() < 0.6 * model.mesh_facenum.sum()
    assert coarse.mesh_facenum.min() > 0
    hand, pedestal = model.mesh("gripper0_right_hand_vis").id, model.mesh("fixed_mount0_pedestal").id
    assert coarse.mesh_facenum[hand] > 0.8 * model.mesh_facenum[hand]
    assert coarse.mesh_facenum[pedestal] < 0.2 * model.mesh_facenum[pedestal]
    small, large = (render._coarser(lift._renderer._mujoco, model, cameras, size) for size in (32, 128))
    assert small.mesh_facenum.sum() < coarse.mesh_facenum.sum() < large.mesh_facenum.sum()


def test_vertices_of_a_cell_become_one():
    """Near vertices meet in their middle; faces that are then flat or double go, but not a face's other side."""
    vertices = [[0, 0, 0], [0.01, 0, 0], [2, 0, 0], [2, 1.9, 0]]
    faces = [[0, 1, 2], [0, 2, 3], [1, 2, 3], [3, 1, 2], [3, 2, 1]]
    mesh = SimpleNamespace(
        mesh_vert=np.array(vertices, np.float32),
        mesh_face=np.array(faces),
        mesh_facenormal=10 + np.array(faces),
        mesh_facetexcoord=20 + np.array(faces),
        **{name: np.array([0]) for name in ("mesh_vertadr", "mesh_faceadr")},
        mesh_vertnum=np.array([4]),
        mesh_facenum=np.array([5]),
    )
    render._merge_vertices(mesh, 0, cells=100)
    np.testing.assert_allclose(mesh.mesh_vert, [[0.005, 0, 0], [0.005, 0, 0], [2, 0, 0], [2, 1.9, 0]])
    assert mesh.mesh_facenum[0] == 2
    kept = mesh.mesh_face[:2].tolist()
    assert sorted(kept) == [[0, 2, 3], [3, 2, 1]]
    np.testing.assert_array_equal(mesh.mesh_facenormal[:2], 10 + np.array(kept))
    np.testing.assert_array_equal(mesh.mesh_facetexcoord[:2], 20 + np.array(kept))


def test_hidden_sites_are_left_out_and_shown_ones_drawn(lift):
    """RoboSuite hides sites by a negative opacity: no pixel changes without them. A site that is shown is drawn."""
    hidden = lift.reset(seed=8)[0]
    renderer, opacity = lift._renderer, lift._task.sim.model._model.site_rgba[:, 3]
    kinds = {geom.objtype for geom in renderer._scene.geoms[: renderer._scene.ngeom]}
    assert (opacity < 0).any() and renderer._mujoco.mjtObj.mjOBJ_SITE not in kinds
    before = opacity.copy()
    opacity[np.argmin(opacity)] = 1e-6  # MuJoCo draws them all, the others behind a negative opacity
    np.testing.assert_array_equal(renderer.observation(), hidden)
    opacity[:] = np.abs(before)
    assert (renderer.observation() != hidden).any()
    opacity[:] = before


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
