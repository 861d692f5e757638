import pytest
import torch
from torch import nn

from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.data.sets import SETS
from ocnopt.experiments.datasets import Data
from ocnopt.experiments.networks import InceptionBlock, ResidualBlock
from ocnopt.experiments.recipes import RECIPES
from ocnopt.experiments.setup import build_network


def data_like(name):
    """Two zeros of a data set's shape."""
    facts = SETS[name]
    x, y = torch.zeros(2, *facts.shape), torch.zeros(2, dtype=torch.int64)
    return Data(x, y, x, y, facts.classes)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_run_whose_network_fits_the_data(name):
    config = TrainConfig(**RECIPES[name]).resolved()
    data = data_like(config.dataset)
    model = build_network(config, data)
    assert model(data.train_x).shape == (2, data.classes)
    assert config.epochs is None  # its length is the recipe's
    for setting, value in RECIPES[name].items():
        assert getattr(config, setting) == value


def test_recipes_are_what_the_paper_says():
    """Section 5.1: FCNs of 5 linear layers; CNNs of 4 convolutions and 2 linear layers."""
    for name, recipe in RECIPES.items():
        config = TrainConfig(**recipe).resolved()
        kinds = [type(m) for m in build_network(config, data_like(config.dataset)).children()]
        if name.endswith("-fcn"):
            assert kinds.count(nn.Linear) == 5
            assert all(10 <= width <= 32 for width in config.widths)
            assert 8 <= config.batch_size <= 32
        if name.endswith("-cnn"):
            assert (kinds.count(nn.Conv2d), kinds.count(nn.Linear)) == (4, 2)
            assert config.batch_size == 128
        if name.endswith("-residual"):
            assert _blocks(config, ResidualBlock) == len(config.widths) >= 3
        if name.endswith("-inception"):
            assert _blocks(config, InceptionBlock) == len(config.widths)
    wine = TrainConfig(**RECIPES["wine-fcn"]).resolved()
    assert isinstance(build_network(wine, data_like("wine"))[-1], nn.Sigmoid)


def _blocks(config, kind):
    model = build_network(config, data_like(config.dataset))
    return sum(isinstance(m, kind) for m in model.modules())


def test_resnet18_is_of_the_usual_size():
    """In the form for 32x32 images and ten classes: 11,173,962 parameters, 17 convolutions."""
    config = TrainConfig(**RECIPES["cifar-10-resnet18"]).resolved()
    model = build_network(config, data_like("cifar-10"))
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.kernel_size == (3, 3) for m in convs) == 17
    assert sum(m.kernel_size == (1, 1) for m in convs) == 3
    assert model[:-3](torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)
