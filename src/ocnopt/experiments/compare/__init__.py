"""Compare optimizers: a learning-rate sweep, fresh seeds at the best rate, the time of a step."""

from ocnopt.experiments.cache import Cache
from ocnopt.experiments.compare.comparison import Comparison, Entry, compare
from ocnopt.experiments.compare.contender import Contender, parse_contender, parse_rates
from ocnopt.experiments.compare.folder import require_folder, save
from ocnopt.experiments.compare.rates import Workable

__all__ = [
    "Cache",
    "Comparison",
    "Contender",
    "Entry",
    "Workable",
    "compare",
    "parse_contender",
    "parse_rates",
    "require_folder",
    "save",
]
