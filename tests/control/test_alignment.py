"""Bandits over alignments: what they find, their formulas, and that they go on where they were."""

import io
import json
import math
import random
from decimal import Decimal
from statistics import fmean

import numpy as np
import pytest
import torch

from ocnopt.control.alignment import (
    Alignment,
    EpsilonGreedy,
    Exp3PlusPlus,
    Fixed,
    RandomAlignment,
    Round,
    loss_reward,
)
from ocnopt.errors import OptionError
from ocnopt.optim.rounds import alignment_named

LEARNING = {
    "epsilon-greedy": lambda seed: EpsilonGreedy(seed=seed),
    "exp3++": lambda seed: Exp3PlusPlus(seed=seed),
}
ALL = {
    **LEARNING,
    "random": lambda seed: RandomAlignment(seed=seed),
    "fixed": lambda seed: Fixed(-1),
}
each_learning = pytest.mark.parametrize("make", LEARNING.values(), ids=LEARNING)
each = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


def play(bandit, means, rounds, seed=0):
    """Bernoulli rewards, drawn for every arm whatever is played."""
    draws = random.Random(f"rewards {seed}")
    for _ in range(rounds):
        rewards = [float(draws.random() < mean) for mean in means]
        bandit.reward(rewards[bandit.arm])
    return [done.arm for done in bandit.history]


# What they find.


@each_learning
@pytest.mark.parametrize("best", [0, 1])
@pytest.mark.parametrize("seed", range(5))
def test_row_34_the_best_of_two_arms_is_played_most(make, best, seed):
    bandit = make(seed)
    bandit.start(2)
    arms = play(bandit, [0.9, 0.5] if best == 0 else [0.5, 0.9], 1000, seed)
    assert arms[500:].count(best) > 0.8 * 500


@each_learning
def test_regret_on_four_arms_is_well_below_that_of_chance(make):
    means = [0.3, 0.5, 0.9, 0.4]
    regrets = []
    for seed in range(5):
        bandit = make(seed)
        bandit.start(4)
        regrets.append(sum(0.9 - means[arm] for arm in play(bandit, means, 2000, seed)))
    chance = 2000 * (0.9 - fmean(means))
    assert fmean(regrets) < 0.3 * chance


def test_a_greedy_bandit_alone_may_stay_with_the_wrong_arm_but_epsilon_leaves_it():
    stuck, free = EpsilonGreedy(0.0, seed=1), EpsilonGreedy(0.2, seed=1)
    for bandit in (stuck, free):
        bandit.start(2)
        rewards = {0: [0.0], 1: [0.1]}  # the first time; then arm 0 is the better one
        for _ in range(400):
            first = rewards[bandit.arm]
            bandit.reward(first.pop() if first else (0.9 if bandit.arm == 0 else 0.1))
    assert [done.arm for done in stuck.history[2:]] == [1] * 398
    assert [done.arm for done in free.history[200:]].count(0) > 150


def test_chance_plays_all_arms_alike():
    bandit = RandomAlignment(seed=3)
    bandit.start(3)
    arms = play(bandit, [0.0, 1.0, 0.5], 3000)
    assert bandit.probabilities == [1 / 3] * 3
    for arm in range(3):
        assert abs(arms.count(arm) - 1000) < 4 * math.sqrt(3000 * 2 / 9)


@each_learning
def test_what_is_played_follows_the_probabilities(make):
    """Expected and actual counts, summed over rounds and seeds: four standard deviations."""
    expected = variance = actual = 0.0
    for seed in range(20):
        bandit = make(seed)
        bandit.start(2)
        for _ in range(100):
            p = bandit.probabilities[0]
            expected += p
            variance += p * (1 - p)
            actual += bandit.arm == 0
            bandit.reward(0.6 if bandit.arm else 0.4)
    assert abs(actual - expected) < 4 * math.sqrt(variance)


def test_importance_weights_make_losses_unbiased():
    """Whatever is played, L_a estimates the losses that arm a would have had in all rounds."""
    losses = [[0.2, 0.9][a] for a in range(2)]
    rounds, estimates = 60, []
    for seed in range(300):
        bandit = Exp3PlusPlus(seed=seed)
        bandit.start(2)
        for _ in range(rounds):
            bandit.reward(1 - losses[bandit.arm])
        estimates.append(list(bandit._weighted))
    for a, loss in enumerate(losses):
        values = [estimate[a] for estimate in estimates]
        error = math.sqrt(fmean((v - fmean(values)) ** 2 for v in values) / len(values))
        # One forced visit of each arm stands for the first two rounds.
        assert abs(fmean(values) - loss * (rounds - 1)) < 4 * error


# Their formulas.


def probabilities_by_formula(history, arms, alpha=3.0, beta=256.0):
    """EXP3++ from the rounds alone, in the plainest code; and whether any gap was certain."""
    t = len(history) + 1
    n = [sum(1 for r in history if r.arm == a) for a in range(arms)]
    total = [sum(1 - r.reward for r in history if r.arm == a) for a in range(arms)]
    weighted = []
    for a in range(arms):
        own = [r for r in history if r.arm == a]
        weighted.append(
            sum((1 - r.reward) / (1.0 if i == 0 else r.probability) for i, r in enumerate(own))
        )
    eta = 0.5 * (math.log(arms) / (t * arms)) ** 0.5
    rho = [1 / sum(math.exp(-eta * (other - own)) for other in weighted) for own in weighted]
    upper, lower = [], []
    for a in range(arms):
        power = Decimal(arms) ** (1 / Decimal(alpha))  # far beyond a float where alpha is small
        rad = (alpha * float((t * power).ln()) / (2 * n[a])) ** 0.5
        upper.append(min(1, total[a] / n[a] + rad))
        lower.append(max(0, total[a] / n[a] - rad))
    eps = []
    for a in range(arms):
        gap = max(0, lower[a] - min(upper))
        xi = math.inf if gap == 0 else beta * math.log(t) / (t * gap**2)
        eps.append(min(1 / (2 * arms), eta, xi))
    gap_decides = min(eps) < min(1 / (2 * arms), eta)
    return [(1 - sum(eps)) * rho[a] + eps[a] for a in range(arms)], gap_decides


@pytest.mark.parametrize("arms", [2, 3, 5])
@pytest.mark.parametrize(("alpha", "beta"), [(3.0, 256.0), (0.5, 1e-3), (1e-3, 1e-3)])
def test_exp3_plus_plus_has_its_formulas(arms, alpha, beta):
    bandit = Exp3PlusPlus(alpha, beta, seed=arms)
    bandit.start(arms)
    draws, by_gap = random.Random(arms), 0
    for t in range(300):
        if t < arms:  # every arm once
            assert bandit.arm not in [done.arm for done in bandit.history]
        else:
            expected, gap_decides = probabilities_by_formula(bandit.history, arms, alpha, beta)
            assert bandit.probabilities == pytest.approx(expected, rel=1e-9)
            by_gap += gap_decides
        bandit.reward(draws.random() * (0.1 if bandit.arm else 1.0))
    # The exploration rate is seen both as eta and as what the gap asks for.
    assert by_gap < 300 - arms
    assert (by_gap > 0) == (beta < 1)


def test_epsilon_greedy_has_its_formulas():
    bandit = EpsilonGreedy(0.3, seed=2)
    bandit.start(3)
    draws = random.Random(0)
    assert bandit.probabilities == pytest.approx([1 / 3] * 3)
    for _ in range(100):
        bandit.reward(round(draws.random(), 1))
        own = [[r.reward for r in bandit.history if r.arm == a] for a in range(3)]
        means = [fmean(rewards) if rewards else math.inf for rewards in own]
        best = [a for a in range(3) if means[a] == pytest.approx(max(means), rel=1e-12)]
        expected = [0.1 + 0.7 * (a in best) / len(best) for a in range(3)]
        assert bandit.probabilities == pytest.approx(expected)


@each
@pytest.mark.parametrize("arms", [1, 2, 7])
def test_probabilities_are_probabilities(make, arms):
    bandit = make(0)
    bandit.start(arms)
    draws = random.Random(0)
    for t in range(200):
        p = bandit.probabilities
        assert sum(p) == pytest.approx(1, abs=1e-12)
        assert min(p) >= 0 and p[bandit.arm] > 0
        if isinstance(bandit, EpsilonGreedy):
            assert min(p) >= 0.1 / arms
        if isinstance(bandit, Exp3PlusPlus) and t >= arms > 1:
            assert min(p) >= min(1 / (2 * arms), 0.5 * math.sqrt(math.log(arms) / ((t + 1) * arms)))
        bandit.reward(draws.random())


# Rounds.


@each
def test_the_history_says_what_was_played_with_which_probability_and_what_came_of_it(make):
    bandit = make(4)
    bandit.start(3)
    expected = []
    for value in (0.0, 1.0, 0.25, 0.5):
        expected.append(Round(bandit.arm, bandit.probabilities[bandit.arm], value))
        bandit.reward(value)
    assert bandit.history == expected
    assert 0 <= bandit.arm < 3


@each
def test_one_arm_is_no_choice(make):
    bandit = make(0)
    bandit.start(1)
    for value in (0.0, 1.0, 0.5, 0.5):
        assert (bandit.arm, bandit.probabilities) == (0, [1.0])
        bandit.reward(value)


@pytest.mark.parametrize(("index", "arm"), [(0, 0), (2, 2), (-1, 2), (-3, 0)])
def test_fixed_stays_where_it_is(index, arm):
    bandit = Fixed(index)
    assert bandit.every is None
    bandit.start(3)
    assert play(bandit, [0.0, 1.0, 0.5], 5) == [arm] * 5


@each
def test_another_seed_chooses_otherwise_and_the_same_one_alike(make):
    def arms(seed):
        bandit = make(seed)
        bandit.start(4)
        return play(bandit, [0.5] * 4, 60)

    assert arms(0) == arms(0)
    assert (arms(0) == arms(1)) is isinstance(make(0), Fixed)


# Taking up.


def through_json(state):
    return json.loads(json.dumps(state))


def through_torch(state):
    file = io.BytesIO()
    torch.save({"alignment": state}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["alignment"]


@each
@pytest.mark.parametrize("way", [through_json, through_torch])
@pytest.mark.parametrize("after", [0, 2, 40])
def test_a_run_that_is_taken_up_chooses_the_same(make, way, after):
    means = [0.2, 0.7, 0.4]
    whole = make(5)
    whole.start(3)
    play(whole, means, after)
    again = make(6)  # another seed: the state's is what counts
    again.load_state_dict(way(whole.state_dict()))
    again.start(3)
    assert (again.arm, again.probabilities) == (whole.arm, whole.probabilities)
    assert again.history == whole.history
    for bandit in (whole, again):
        play(bandit, means, 60, seed="rest")
    assert again.history == whole.history  # probabilities bit for bit
    assert again.state_dict() == whole.state_dict()


def test_a_state_from_before_the_start_is_a_start():
    loaded, fresh = Exp3PlusPlus(seed=0), Exp3PlusPlus(seed=7)
    loaded.load_state_dict(Exp3PlusPlus(seed=7).state_dict())
    for bandit in (loaded, fresh):
        bandit.start(3)
    assert play(loaded, [0.5] * 3, 30) == play(fresh, [0.5] * 3, 30)


def test_the_arm_of_an_open_round_stays_though_options_change():
    first = EpsilonGreedy(0.0, seed=0)
    first.start(3)
    play(first, [0.2, 0.9, 0.4], 20)
    second = EpsilonGreedy(1.0, seed=0)
    second.load_state_dict(first.state_dict())
    second.start(3)
    assert (second.arm, second.probabilities) == (first.arm, first.probabilities)
    second.reward(0.5)
    assert second.history[-1].probability == 1.0  # with which the first one chose it
    assert second.probabilities == pytest.approx([1 / 3] * 3)


def test_another_index_is_not_undone_by_a_checkpoint():
    first, second = Fixed(0), Fixed(1)
    first.start(2)
    second.load_state_dict(first.state_dict())
    second.start(2)
    assert second.arm == 1


@each
def test_loading_replaces_what_was(make):
    old, new = make(1), make(2)
    for bandit in (old, new):
        bandit.start(3)
        play(bandit, [0.1, 0.5, 0.9], 20, seed=bandit._seed)
    new.load_state_dict(old.state_dict())
    assert new.state_dict() == old.state_dict()


# Errors.


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: EpsilonGreedy(1.5), r"epsilon=1.5 must be a probability in \[0, 1\], such as 0.1"),
        (lambda: EpsilonGreedy(math.nan), "epsilon"),
        (lambda: EpsilonGreedy(None), "epsilon=None must be a probability"),
        (lambda: EpsilonGreedy("0.1"), "epsilon='0.1' must be a probability"),
        (lambda: EpsilonGreedy(True), "epsilon=True must be a probability"),
        (lambda: Exp3PlusPlus(alpha="3"), "alpha='3' must be above 0, such as 3"),
        (lambda: Exp3PlusPlus(beta=None), "beta=None must be above 0, such as 256"),
        (lambda: EpsilonGreedy(every=1), "every=1 must be a whole number of at least 2, or None"),
        (lambda: Exp3PlusPlus(every=1), "every=1 must be a whole number of at least 2, or None"),
        (lambda: RandomAlignment(every=0), "every=0 must be a whole number of at least 1, or None"),
        (lambda: EpsilonGreedy(every=2.5), "every=2.5"),
        (lambda: EpsilonGreedy(seed=-1), "seed=-1 must be a whole number of at least 0"),
        (lambda: Exp3PlusPlus(0.0), "alpha=0.0 must be above 0, such as 3"),
        (lambda: Exp3PlusPlus(beta=math.inf), "beta=inf must be above 0, such as 256"),
        (lambda: Exp3PlusPlus(every=True), "every=True"),
        (lambda: RandomAlignment(seed="0"), "seed='0'"),
        (lambda: Fixed(0.5), "index=0.5 must be a whole number"),
        (
            lambda: Fixed(3).start(3),
            "index=3 is out of range: the network has 3 alignments; choose",
        ),
        (
            lambda: alignment_named(5).start(2),
            "alignment=5 is out of range: the network has 2.*of -2 to -1, which count from the",
        ),
        (lambda: Fixed(-2).start(1), "index=-2 is out of range: the network has 1 alignment;"),
        (lambda: RandomAlignment().start(0), "arms=0"),
        (lambda: Exp3PlusPlus().reward(0.5), "has no arms yet.*take a step first"),
        (lambda: Exp3PlusPlus().arm, "take a step first"),
        (lambda: Exp3PlusPlus().probabilities, "take a step first"),
    ],
)
def test_bad_options_are_named_with_a_remedy(make, says):
    with pytest.raises(OptionError, match=says):
        make()


@pytest.mark.parametrize(
    ("make", "same"),
    [
        (lambda: EpsilonGreedy(np.float32(0.25)), lambda: EpsilonGreedy(0.25)),
        (lambda: Exp3PlusPlus(np.float32(2), np.int64(8)), lambda: Exp3PlusPlus(2.0, 8.0)),
    ],
)
def test_options_may_be_numpys_numbers_and_states_stay_plain(make, same):
    bandit, other = make(), same()
    for one in (bandit, other):
        one.start(2)
        for _ in range(8):
            one.reward(0.5)
    assert bandit.state_dict() == other.state_dict()
    assert {type(p) for p in bandit.state_dict()["probabilities"]} == {float}


@each
@pytest.mark.parametrize(
    "value", [-0.1, 1.1, math.nan, math.inf, "a", "0.5", None, [0.5], 1j, True, torch.rand(2)]
)
def test_a_reward_that_is_no_number_from_0_to_1_is_refused_and_changes_nothing(make, value):
    bandit = make(0)
    bandit.start(2)
    before = bandit.state_dict()
    with pytest.raises(OptionError, match=r"must be a number in \[0, 1\]"):
        bandit.reward(value)
    assert bandit.state_dict() == before


@each
def test_a_reward_may_be_of_numpy_or_a_tensor_and_is_kept_as_a_plain_number(make):
    bandit = make(0)
    bandit.start(2)
    for value in (np.float32(0.5), torch.tensor(0.5), 1):
        bandit.reward(value)
    assert [done.reward for done in bandit.history] == [0.5, 0.5, 1.0]
    assert {type(done.reward) for done in bandit.history} == {float}


@each
def test_a_state_of_another_network_or_kind_is_refused(make):
    saved = make(0)
    saved.start(3)
    loaded = make(0)
    loaded.load_state_dict(saved.state_dict())
    with pytest.raises(OptionError, match="is of 3 alignments, but the network has 2; load"):
        loaded.start(2)
    other = next(kind(0) for kind in ALL.values() if type(kind(0)) is not type(saved))
    with pytest.raises(OptionError, match=f"a state of {type(saved).__name__} cannot be loaded"):
        other.load_state_dict(saved.state_dict())


def test_alignment_itself_chooses_nothing():
    with pytest.raises(TypeError, match="abstract"):
        Alignment()


# Rewards from losses.


def test_loss_reward_at_known_places():
    assert loss_reward(2.0, 2.0) == 0.5
    assert loss_reward(0.0, 0.0) == 0.5
    assert loss_reward(1.0, 0.95) == pytest.approx(0.5 + 0.5 * math.tanh(10 * 0.05 / 1.95))
    assert loss_reward(1.0, 0.95) == pytest.approx(0.62, abs=0.01)
    assert loss_reward(1.0, 0.5) == pytest.approx(0.999, abs=1e-3)
    assert loss_reward(1.0, 1.05) == pytest.approx(1 - loss_reward(1.05, 1.0))
    for after in (math.nan, math.inf, -math.inf):
        assert loss_reward(1.0, after) == 0.0
    for before in (math.nan, math.inf, -math.inf):
        assert loss_reward(before, 1.0) == 0.5
        assert loss_reward(before, math.nan) == 0.0


EXTREME = [-1.7e308, -1e3, -1.0, -5e-324, 0.0, 5e-324, 1e-3, 1.0, 1.01, 2.0, 1e3, 1.7e308]


@pytest.mark.parametrize("fixed", EXTREME)
def test_loss_reward_is_monotone_and_within_bounds(fixed):
    by_after = [loss_reward(fixed, after) for after in EXTREME]
    by_before = [loss_reward(before, fixed) for before in EXTREME]
    assert all(0 <= value <= 1 for value in by_after + by_before)
    assert by_after == sorted(by_after, reverse=True)
    assert by_before == sorted(by_before)
    assert loss_reward(fixed, fixed) == 0.5


def test_loss_reward_does_not_depend_on_the_unit_of_the_loss():
    assert loss_reward(3.0, 2.0) == pytest.approx(loss_reward(3e-200, 2e-200), rel=1e-12)
