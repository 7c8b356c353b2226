"""Exploration by held actions."""

import numpy as np

from runtime.collect import HeldActions


def runs(values: np.ndarray) -> np.ndarray:
    """Lengths of the runs of equal values, without the first and the last run."""
    return np.diff(np.flatnonzero(np.diff(values)))


def test_random_actions_hold_the_gripper():
    """Random actions get the gripper's command in runs of one sign, 4 - 13 steps or multiples; the rest is theirs."""
    rng = np.random.default_rng(0)
    hold = HeldActions(0.3, 1, rng, gripper=True, moves=3)
    hold.begin(0)
    actions = rng.uniform(-1, 1, (5000, 1, 4))
    held = np.array([hold(action, True) for action in actions])
    assert np.array_equal(held[..., :-1], actions[..., :-1])
    gripper = held[:, 0, -1]
    assert set(gripper) == {-1.0, 1.0}
    lengths = runs(gripper)
    assert lengths.min() >= 4 and 10 < lengths.mean() < 25


def test_held_actions_disturb_their_share_of_the_policys_episodes():
    """Of the policy's episodes, the share is disturbed now and then; the others not at all, nor with a share of 0."""
    rng, actions = np.random.default_rng(0), np.zeros((100, 2, 4))
    hold, disturbed = HeldActions(0.3, 2, rng, gripper=True, moves=3), []
    for _ in range(300):
        hold.begin(0)
        disturbed.append(np.array([hold(action, False) for action in actions]))
    assert not np.array(disturbed)[:, :, 1].any()  # an environment that began no episode
    share = np.array(disturbed)[:, :, 0, -1].astype(bool).mean(1)
    assert 0.2 < (share > 0).mean() < 0.4
    assert 0.3 < share[share > 0].mean() < 0.6
    before = rng.bit_generator.state
    none = HeldActions(0.0, 2, rng, gripper=True, moves=3)
    none.begin(0)
    assert not none(actions[0], True).any() and rng.bit_generator.state == before


def test_a_held_move_goes_straight_on():
    """For 20 steps, one of the first `moves` actions is at a bound and the arm's others are 0; all directions occur."""
    rng = np.random.default_rng(0)
    hold = HeldActions(1.0, 1, rng, gripper=True, moves=3)
    hold.begin(0)
    actions = rng.uniform(-0.9, 0.9, (20000, 1, 7))
    held = np.array([hold(action, False) for action in actions])[:, 0]
    moved = (held[:, :6] != actions[:, 0, :6]).any(1)
    assert 0.2 < moved.mean() < 0.4  # 20 steps of 20 + 1 / 0.02
    assert (np.count_nonzero(held[moved, :6], axis=1) == 1).all()
    directions = {tuple(row) for row in held[moved, :6].tolist()}
    assert directions == {tuple(side * row) for row in np.eye(6)[:3] for side in (1.0, -1.0)}
    assert (runs(moved.astype(int))[::2] % 20 == 0).all() or (runs(moved.astype(int))[1::2] % 20 == 0).all()


def test_nothing_is_held_after_a_success():
    """From there to the end of the episode the policy's actions are its own, also in the middle of a hold."""
    rng, actions = np.random.default_rng(0), np.full((2, 4), 0.5)
    hold = HeldActions(1.0, 2, rng, gripper=True, moves=3)
    hold.begin(0), hold.begin(1)
    while not (hold.move_left > 1).all():
        hold(actions, False)
    hold.end(0)
    held = np.array([hold(actions, False) for _ in range(200)])
    assert (held[:, 0] == 0.5).all() and (held[0, 1, :3] != 0.5).all()
    hold.begin(0)
    assert not all(np.array_equal(hold(actions, False)[0], actions[0]) for _ in range(200))


def test_without_a_gripper_all_actions_may_be_moves():
    """The last action is held at 0 with the others, or moves itself; nothing is held where there are no moves."""
    rng, actions = np.random.default_rng(0), np.full((3000, 1, 2), 0.5)
    hold = HeldActions(1.0, 1, rng, gripper=False, moves=2)
    hold.begin(0)
    assert {tuple(x[0]) for x in (hold(action, False) for action in actions)} == {
        *((0.5, 0.5), (1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))
    }
    still = HeldActions(1.0, 1, rng, gripper=False, moves=0)
    still.begin(0)
    assert all(np.array_equal(still(action, False), action) for action in actions)
