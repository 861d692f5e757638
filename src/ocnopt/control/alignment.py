"""Which alignment of shortcuts and branches is played: a choice, fixed or learned by a bandit.

Where a shortcut's layer meets the layers of the main path decides which players share a stage, not
what the network computes. An alignment is an arm; a round is a number of steps with one arm, and
its reward says how well they went. Sources: Liu, Chen & Theodorou, "Dynamic Game Theoretic Neural
Optimizer", ICML 2021, which plays alignments by bandits; the bandits are epsilon-greedy and EXP3++
of Seldin & Slivkins, ICML 2014, as parametrized by Seldin & Lugosi, COLT 2017.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from ocnopt.errors import OptionError
from ocnopt.real import is_real, is_scalar

__all__ = [
    "Alignment",
    "EpsilonGreedy",
    "Exp3PlusPlus",
    "Fixed",
    "RandomAlignment",
    "Round",
    "loss_reward",
]

#: Of the relative decrease in a round's reward: losses change by a few per cent in a round, which
#: has to fill a good part of [0, 1] for a bandit to see it.
_SLOPE = 10.0


@dataclass(frozen=True)
class Round:
    """A round that has ended.

    Attributes:
        arm: What was played.
        probability: With which it was chosen.
        reward: What it came to, in [0, 1].
    """

    arm: int
    probability: float
    reward: float


class Alignment(ABC):
    """Chooses an arm per round.

    All it knows is its history, so that its state is plain values; round t's draw depends on the
    seed and t alone, so that a run that is taken up chooses as if it had not been interrupted.

    One optimizer at a time plays it. Once that is gone another one may, and goes on with the
    history; for a fresh start build a new object.

    Args:
        every: Steps of a round; None: it ends when ``optimizer.reward(value)`` is called. At least
            2 where rewards count: the second half of a round is held against the first.
        seed: Seed of all draws.

    Attributes:
        learns: Whether rewards make a difference to what is chosen.
        every: As given.
        history: The rounds that have ended, first to last.

    Raises:
        OptionError: An option that is out of range.
    """

    learns = True

    def __init__(self, every: int | None = None, seed: int = 0) -> None:
        if every is not None:
            least = 2 if self.learns else 1
            more = ", or None to end rounds by optimizer.reward(value)"
            _require_whole("every", every, least, more)
        _require_whole("seed", seed, 0)
        self.every = every
        self.history: list[Round] = []
        self._seed = seed
        self._arms = 0
        self._arm = -1
        self._played: list[int] = []
        self._probabilities: list[float] = []

    def start(self, arms: int) -> None:
        """Choose the first arm, or go on where a loaded state left off.

        Args:
            arms: How many there are.

        Raises:
            OptionError: There are none, or another number than in the loaded state.
        """
        _require_whole("arms", arms, 1)
        if not self._arms:
            self._setup(arms)
            self._choose()
        elif arms != self._arms:
            raise OptionError(
                f"the state of {type(self).__name__} is of {self._arms} alignments, but the "
                f"network has {arms}; load a state of the same network, or start afresh with a new "
                f"{type(self).__name__}"
            )

    @property
    def arm(self) -> int:
        """The arm being played.

        Raises:
            OptionError: It has not been started.
        """
        self._require_started()
        return self._arm

    @property
    def probabilities(self) -> list[float]:
        """Of every arm in a choice made now, which is how the arm being played was chosen.

        Raises:
            OptionError: It has not been started.
        """
        self._require_started()
        return list(self._probabilities)

    def reward(self, value: float) -> None:
        """End the round: learn from its reward and choose the next arm.

        Args:
            value: In [0, 1], more is better.

        Raises:
            OptionError: The value is no number in [0, 1], or it has not been started.
        """
        self._require_started()
        if not (is_scalar(value) and 0 <= value <= 1):
            raise OptionError(
                f"reward={value!r} must be a number in [0, 1], such as a validation accuracy; "
                "ocnopt.control.alignment.loss_reward turns two losses into one"
            )
        self._learn(Round(self._arm, self._probabilities[self._arm], float(value)))
        self._choose()

    def state_dict(self) -> dict[str, Any]:
        """Return its state as plain numbers, texts, lists and one dict of them."""
        return {
            "kind": type(self).__name__,
            "seed": self._seed,
            "arms": self._arms,
            "arm": self._arm,
            "probabilities": list(self._probabilities),
            "history": [list(astuple(done)) for done in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; options other than the seed stay as they are.

        Args:
            state: What `state_dict` gave.

        Raises:
            OptionError: It is of another kind.
        """
        own = type(self).__name__
        if state.get("kind") != own:
            raise OptionError(
                f"a state of {state.get('kind')} cannot be loaded into {own}; give the optimizer "
                "the alignment that it was saved with"
            )
        self._seed = state["seed"]
        self._arms = 0
        if state["arms"]:
            self._setup(state["arms"])
        for done in state["history"]:
            self._learn(Round(*done))
        self._arm = state["arm"]
        self._probabilities = list(state["probabilities"])

    def _choose(self) -> None:
        self._probabilities = self._distribution()
        self._arm = _draw(self._probabilities, self._seed, len(self.history))

    def _require_started(self) -> None:
        if not self._arms:
            raise OptionError(
                f"{type(self).__name__} has no arms yet: how many alignments there are is known "
                "when the optimizer has seen a batch; take a step first"
            )

    def _setup(self, arms: int) -> None:
        """Know the number of arms and nothing else."""
        self._arms = arms
        self._played = [0] * arms
        self.history = []

    def _learn(self, done: Round) -> None:
        """Take a round into account."""
        self._played[done.arm] += 1
        self.history.append(done)

    @abstractmethod
    def _distribution(self) -> list[float]:
        """Probabilities of the next choice."""


class Fixed(Alignment):
    """Always the same alignment.

    Args:
        index: Which; negative ones count from the last, as in a list.
        option: What it is called where it was given, for messages.

    Raises:
        OptionError: It is no whole number.
    """

    learns = False

    def __init__(self, index: int, *, option: str = "index") -> None:
        super().__init__()
        if not isinstance(index, int) or isinstance(index, bool):
            raise OptionError(f"{option}={index!r} must be a whole number, such as 0 or -1")
        self.index = index
        self._option = option

    def _setup(self, arms: int) -> None:
        if not -arms <= self.index < arms:
            raise OptionError(
                f"{self._option}={self.index} is out of range: the network has {arms} alignment"
                f"{'s' if arms > 1 else ''}; choose one of 0 to {arms - 1}, or of -{arms} to -1, "
                "which count from the last"
            )
        super()._setup(arms)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As :meth:`Alignment.load_state_dict`; it is its own index that goes on."""
        super().load_state_dict(state)
        if self._arms:
            self._choose()

    def _distribution(self) -> list[float]:
        return [float(a == self.index % self._arms) for a in range(self._arms)]


class RandomAlignment(Alignment):
    """Every alignment with the same probability, whatever came of it.

    Args:
        every: As in :class:`Alignment`.
        seed: Likewise.

    Raises:
        OptionError: An option that is out of range.
    """

    learns = False

    def __init__(self, *, every: int | None = 100, seed: int = 0) -> None:
        super().__init__(every, seed)

    def _distribution(self) -> list[float]:
        return [1 / self._arms] * self._arms


class EpsilonGreedy(Alignment):
    """The alignment with the best mean reward, and any at all with probability epsilon.

    Arms that have not been played count as the best there are; of equals every one is as likely.

    Args:
        epsilon: Probability of a choice by chance, in [0, 1].
        every: As in :class:`Alignment`.
        seed: Likewise.

    Raises:
        OptionError: An option that is out of range.
    """

    def __init__(self, epsilon: float = 0.1, *, every: int | None = None, seed: int = 0) -> None:
        super().__init__(every, seed)
        if not (is_real(epsilon) and 0 <= epsilon <= 1):
            raise OptionError(f"epsilon={epsilon!r} must be a probability in [0, 1], such as 0.1")
        self.epsilon = float(epsilon)

    def _setup(self, arms: int) -> None:
        super()._setup(arms)
        self._mean = [math.inf] * arms

    def _learn(self, done: Round) -> None:
        super()._learn(done)
        a, played = done.arm, self._played[done.arm]
        before = self._mean[a] if played > 1 else 0.0
        self._mean[a] = before + (done.reward - before) / played

    def _distribution(self) -> list[float]:
        best = max(self._mean)
        greedy = (1 - self.epsilon) / self._mean.count(best)
        chance = self.epsilon / self._arms
        return [chance + greedy * (mean == best) for mean in self._mean]


class Exp3PlusPlus(Alignment):
    """EXP3++: near the best regret there is, whether rewards are stochastic or adversarial.

    In round t, with K arms and the loss ``l = 1 - reward``: every arm is played once; from then on

        p_a   = (1 - sum_b eps_b) rho_a + eps_a,    rho_a ~ exp(-eta L_a),
        eta   = 1/2 sqrt(ln K / (t K)),             L_a = sum of l / p_a over a's rounds,
        eps_a = min(1 / (2K), eta, beta ln t / (t D_a^2)),
        D_a   = max(0, max(0, m_a - r_a) - min_b min(1, m_b + r_b)),
        r_a   = sqrt(alpha ln(t K^(1/alpha)) / (2 N_a))

    with m_a the mean loss of the arm's N_a rounds and D_a a lower bound on its gap to the best arm.

    Args:
        alpha: Of the confidence radius r, above 0.
        beta: Of the exploration rate, above 0.
        every: As in :class:`Alignment`.
        seed: Likewise.

    Raises:
        OptionError: An option that is out of range.
    """

    def __init__(
        self, alpha: float = 3.0, beta: float = 256.0, *, every: int | None = None, seed: int = 0
    ) -> None:
        super().__init__(every, seed)
        for name, value, usual in (("alpha", alpha, 3), ("beta", beta, 256)):
            if not (is_real(value) and 0 < value < math.inf):
                raise OptionError(f"{name}={value!r} must be above 0, such as {usual}")
        self.alpha = float(alpha)
        self.beta = float(beta)

    def _setup(self, arms: int) -> None:
        super()._setup(arms)
        self._loss = [0.0] * arms
        self._weighted = [0.0] * arms

    def _learn(self, done: Round) -> None:
        super()._learn(done)
        a, loss = done.arm, 1 - done.reward
        # The first visit is certain, whatever the order of visits.
        self._weighted[a] += loss / (done.probability if self._played[a] > 1 else 1.0)
        self._loss[a] += loss

    def _distribution(self) -> list[float]:
        unseen = self._played.count(0)
        if unseen:
            return [float(not played) / unseen for played in self._played]
        arms, t = self._arms, len(self.history) + 1
        eta = 0.5 * math.sqrt(math.log(arms) / (t * arms))
        least = min(self._weighted)  # taken off, so that not every weight underflows
        weights = [math.exp(-eta * (loss - least)) for loss in self._weighted]
        explored = [min(1 / (2 * arms), eta, rate) for rate in self._rates(t)]
        rest = (1 - sum(explored)) / sum(weights)
        return [rest * w + eps for w, eps in zip(weights, explored, strict=True)]

    def _rates(self, t: int) -> list[float]:
        """Exploration rates ``beta ln t / (t D_a^2)``; infinite where no gap is certain."""
        means = [loss / n for loss, n in zip(self._loss, self._played, strict=True)]
        # alpha ln(t K^(1/alpha)), without a power that overflows where alpha is small.
        width = (self.alpha * math.log(t) + math.log(self._arms)) / 2
        radii = [math.sqrt(width / n) for n in self._played]
        both = list(zip(means, radii, strict=True))
        best = min(min(1.0, mean + radius) for mean, radius in both)
        gaps = [max(0.0, max(0.0, mean - radius) - best) for mean, radius in both]
        most = self.beta * math.log(t) / t
        return [most / gap**2 if gap > 0 else math.inf for gap in gaps]


def loss_reward(before: float, after: float) -> float:
    """Turn the mean training losses before and over a round into its reward.

    The map is ``1/2 + 1/2 tanh(10 d)`` of the relative decrease ``d = (before - after) / (|before|
    + |after|)``: 0.5 where nothing changed, 0.62 where the loss fell by 5 %, 0.99 where it halved.
    It never falls as the decrease grows.

    Args:
        before: Mean loss before the round; one that is not finite says nothing and gives 0.5.
        after: Mean loss over the round; one that is not finite gives 0.

    Returns:
        A number in [0, 1].
    """
    if not math.isfinite(after):
        return 0.0
    size = max(abs(before), abs(after))
    if size == 0 or not math.isfinite(before):
        return 0.5
    before, after = before / size, after / size  # their sum may not be a number else
    decrease = (before - after) / (abs(before) + abs(after))
    return 0.5 + 0.5 * math.tanh(_SLOPE * decrease)


def _draw(probabilities: list[float], seed: int, number: int) -> int:
    """Draw an arm; the draw depends on the seed and the round's number alone."""
    at = np.random.default_rng([seed, number]).random()
    for arm, probability in enumerate(probabilities):
        at -= probability
        if at < 0:
            return arm
    # Rounding: the sum fell short of what was drawn.
    return max(a for a, probability in enumerate(probabilities) if probability > 0)


def _require_whole(name: str, value: Any, least: int, more: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{name}={value!r} must be a whole number of at least {least}{more}")
