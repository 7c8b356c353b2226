import numpy as np

from runtime.collect import GripperHold


def test_gripper_hold_holds_random_commands():
    """Random actions get the gripper's command in runs of one sign, 4 - 13 steps or multiples; the rest is theirs."""
    rng = np.random.default_rng(0)
    hold = GripperHold(0.3, 1, rng)
    hold.begin(0)
    actions = rng.uniform(-1, 1, (5000, 1, 4))
    held = np.array([hold(action, True) for action in actions])
    assert np.array_equal(held[..., :-1], actions[..., :-1])
    gripper = held[:, 0, -1]
    assert set(gripper) == {-1.0, 1.0}
    lengths = np.diff(np.flatnonzero(np.diff(gripper)))
    assert lengths.min() >= 4 and 10 < lengths.mean() < 25


def test_gripper_hold_disturbs_its_share_of_the_policys_episodes():
    """Of the policy's episodes, the share is disturbed now and then; the others not at all, nor with a share of 0."""
    rng, actions = np.random.default_rng(0), np.zeros((100, 2, 4))
    hold, disturbed = GripperHold(0.3, 2, rng), []
    for _ in range(300):
        hold.begin(0)
        disturbed.append(np.array([hold(action, False) for action in actions]))
    assert not np.array(disturbed)[:, :, 1].any()  # an environment that began no episode
    share = np.array(disturbed)[:, :, 0, -1].astype(bool).mean(1)
    assert 0.2 < (share > 0).mean() < 0.4
    assert 0.3 < share[share > 0].mean() < 0.6
    before = rng.bit_generator.state
    none = GripperHold(0.0, 2, rng)
    none.begin(0)
    assert not none(actions[0], True).any() and rng.bit_generator.state == before
