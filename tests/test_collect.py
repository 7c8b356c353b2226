"""Exploration by held actions."""

from collections import Counter

import numpy as np
import pytest

from runtime.collect import HeldActions


def runs(values: np.ndarray) -> np.ndarray:
    """Lengths of the runs of equal values, without the first and the last run."""
    return np.diff(np.flatnonzero(np.diff(values)))


def play(hold: HeldActions, actions: np.ndarray, rewards=0.0) -> np.ndarray:
    """The actions (T, A) as held in an episode with these rewards (T,)."""
    steps = zip(actions, np.broadcast_to(rewards, len(actions)), strict=True)
    return np.array([(hold(action, False), hold.see(reward))[0] for action, reward in steps])


def begin_a_move(hold: HeldActions, level: float) -> None:
    """Begin the first episode that is to have a move."""
    hold.begin(level=level)
    while not hold.waits:
        hold.begin(level=level)


def test_random_actions_hold_the_gripper():
    """Random actions get the gripper's command in runs of one sign, 4 - 13 steps or multiples; the rest is theirs."""
    rng = np.random.default_rng(0)
    hold = HeldActions(0.3, rng, gripper=True, moves=3, steps=100)
    hold.begin()
    actions = rng.uniform(-1, 1, (5000, 4))
    held = np.array([hold(action, True) for action in actions])
    assert np.array_equal(held[:, :-1], actions[:, :-1])
    assert set(held[:, -1]) == {-1.0, 1.0}
    lengths = runs(held[:, -1])
    assert lengths.min() >= 4 and 10 < lengths.mean() < 25


def test_held_actions_disturb_their_share_of_the_policys_episodes():
    """A third of the share has the gripper held now and then, the rest has a move; other episodes have neither."""
    rng, actions = np.random.default_rng(0), np.zeros((100, 4))
    hold, episodes = HeldActions(0.45, rng, gripper=True, moves=3, steps=100), []
    assert not play(hold, actions).any()  # no episode has begun
    for _ in range(400):
        hold.begin()
        episodes.append(play(hold, actions))
    held = np.array(episodes) != 0
    grips, moves = held[..., -1].mean(1), held[..., :-1].any((1, 2))  # the first as a share of the episode's steps
    assert 0.1 < (grips > 0).mean() < 0.2 and 0.24 < moves.mean() < 0.36
    assert not (grips > 0)[moves].any()
    assert 0.3 < grips[grips > 0].mean() < 0.6
    before = rng.bit_generator.state
    none = HeldActions(0.0, rng, gripper=True, moves=3, steps=100)
    none.begin()
    assert not none(actions[0], True).any() and rng.bit_generator.state == before


def test_a_move_is_straight():
    """For 30 steps from the middle half on, one of the first `moves` actions is at a bound, the arm's others 0."""
    rng = np.random.default_rng(0)
    hold = HeldActions(1.0, rng, gripper=True, moves=3, steps=100)
    actions, begun, directions = rng.uniform(-0.9, 0.9, (100, 7)), set(), Counter()
    for _ in range(600):
        hold.begin()
        held = play(hold, actions)[:, :6]
        moved = np.flatnonzero((held != actions[:, :6]).any(1))
        if not len(moved):
            continue
        assert moved.tolist() == list(range(moved[0], min(moved[0] + 30, 100)))
        assert (held[moved] == held[moved[0]]).all()
        begun.add(moved[0])
        directions[tuple(held[moved[0]].tolist())] += 1
    assert (min(begun), max(begun)) == (25, 75)
    assert directions.keys() == {tuple(side * row) for row in np.eye(6)[:3] for side in (1.0, -1.0)}
    assert min(directions.values()) > 40  # of 400 / 6 each
    hold.begin()
    assert not any((hold(action, True)[:6] == 0).any() for action in actions)  # none before training


@pytest.mark.parametrize(("level", "enough"), [(1.0, 0.7), (0.0, 0.0), (-1.0, -1.3)])
def test_a_move_waits_for_a_reward_near_the_best(level, enough):
    """It begins with the step after the first such reward, or never; rewards may be costs."""
    actions, begun = np.full((100, 4), 0.5), Counter()
    for seed in range(60):
        hold = HeldActions(1.0, np.random.default_rng(seed), gripper=False, moves=3, steps=100)
        begin_a_move(hold, level)
        rewards = np.full(100, enough - 0.01)
        rewards[[10, 80]] = enough + 1e-9  # the first is too early in the episode
        begun[int(np.flatnonzero((play(hold, actions, rewards) != 0.5).any(1))[0])] += 1
        begin_a_move(hold, level)
        assert (play(hold, actions, enough - 0.01) == 0.5).all()
    assert begun == {81: 60}


def test_after_a_success_the_hand_rests_and_then_nothing_is_held():
    """It rests for 20 steps where a move has solved the task; without a success, all goes on."""
    action, rng = np.full(4, 0.5), np.random.default_rng(0)
    solving, going_on, waiting = holds = [HeldActions(1.0, rng, gripper=True, moves=3, steps=100) for _ in range(3)]
    for hold, start in zip(holds, (30, 30, 60), strict=True):
        hold.begin()
        hold.move_at, hold.move_to, hold.side, hold.grips, hold.waits = start, start + 30, 1, True, False
    moved = np.array([[hold(action, False) for hold in holds] for _ in range(35)])[-1, :, :3]
    assert (moved[:2] != 0.5).all() and (moved[:2].sum(1) == 1).all() and (moved[2] == 0.5).all()
    solving.end(), waiting.end()
    held = np.array([[[hold(action, False) for hold in holds], solving.end()][0] for _ in range(100)])
    assert (held[:20, 0, :3] == 0).all() and (held[20:, 0, :3] == 0.5).all() and (held[:, 0, 3] == 0.5).all()
    assert (held[:, 2] == 0.5).all()
    assert (held[:25, 1, :3] == held[0, 1, :3]).all() and (held[25:, 1, :3] == 0.5).all()
    assert (held[:, 1, 3] != 0.5).any() and going_on.disturbed


def test_without_a_gripper_all_actions_may_be_moves():
    """The last action is held at 0 with the others, or moves itself; nothing is held where there are no moves."""
    rng, actions, seen = np.random.default_rng(0), np.full((100, 2), 0.5), set()
    hold = HeldActions(1.0, rng, gripper=False, moves=2, steps=100)
    for _ in range(50):
        hold.begin()
        seen |= set(map(tuple, play(hold, actions).tolist()))
    assert seen == {(0.5, 0.5), (1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)}
    still = HeldActions(1.0, rng, gripper=False, moves=0, steps=100)
    still.begin()
    assert np.array_equal(play(still, actions), actions)
