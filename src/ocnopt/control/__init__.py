"""The optimal-control core: players, recording, Bellman pass, rollouts, games."""

from ocnopt.control import alignment, game

__all__ = ["alignment", "game"]
