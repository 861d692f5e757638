"""Race optimizers: accuracy against time, at equal epochs, and the time to common targets."""

from ocnopt.experiments.race.contender import Contender
from ocnopt.experiments.race.plan import Paper, Race
from ocnopt.experiments.race.result import Entry, Result
from ocnopt.experiments.race.run import run_race

__all__ = ["Contender", "Entry", "Paper", "Race", "Result", "run_race"]
