"""``ocnopt inspect``: a network as a game, in words, as JSON and as a picture."""

from ocnopt.experiments.inspection.folder import save
from ocnopt.experiments.inspection.look import Inspection, inspect_network

__all__ = ["Inspection", "inspect_network", "save"]
