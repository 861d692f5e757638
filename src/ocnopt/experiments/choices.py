"""Settings given one by one, on top of those of a recipe; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ocnopt.experiments.errors import InputError
from ocnopt.experiments.problems import NETWORK_SETTINGS
from ocnopt.experiments.recipes import RECIPES

__all__ = ["with_recipe"]


def with_recipe(recipe: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return keyword arguments of `TrainConfig`: a recipe's, and what is given in their place.

    A length that is given replaces the recipe's, whether it counts steps or epochs; of another
    network than the recipe's, nothing is known.

    Args:
        recipe: Its name; None for none.
        given: Settings by name; None stands for what is not given.

    Raises:
        InputError: There is no such recipe.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if recipe is None:
        return chosen
    if recipe not in RECIPES:
        raise InputError(f"there is no recipe {recipe!r}; choose one of {', '.join(RECIPES)}")
    settings = dict(RECIPES[recipe])
    if "steps" in chosen or "epochs" in chosen:
        settings.pop("steps", None)
        settings.pop("epochs", None)
    if chosen.get("network", settings.get("network", "fcn")) != settings.get("network", "fcn"):
        for name in NETWORK_SETTINGS:
            settings.pop(name, None)
    return {**settings, **chosen}
