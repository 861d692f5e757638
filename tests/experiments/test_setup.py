"""Data, networks and optimizers by name, and what users bring along."""

import itertools
import os
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

import ocnopt
from ocnopt.experiments import setup
from ocnopt.experiments.config import TrainConfig
from ocnopt.experiments.errors import InputError
from ocnopt.experiments.own import find, told
from ocnopt.experiments.setup import build_network, load_data, total_steps
from ocnopt.experiments.training import train

_NUMBERS = itertools.count()

GOOD = """
import numpy as np, torch
from torch import nn
from ocnopt.experiments.datasets import Data

rng = np.random.default_rng(0)

def arrays():  # numpy's doubles and small integers
    return (rng.normal(size=(20, 4)), np.arange(20, dtype=np.int8) % 3,
            rng.normal(size=(6, 4)), np.arange(6) % 3)

def lists():
    return [[[0.0, 1.0], [1.0, 0.0]] * 4, [0, 1] * 4, [[0.5, 0.5]], [0]]

def pixels():
    return (torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.arange(8) % 2,
            torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.arange(2))

def data():
    return Data(*map(torch.as_tensor, arrays()), classes=5)

def few():
    return Data(*map(torch.as_tensor, arrays()), classes=2)

def net(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0], classes))

class Fixed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 3))

class Holder:
    net = staticmethod(net)

def one(shape):
    return net(shape, 3)

def nothing(shape, classes):
    return None

class Mine(torch.optim.SGD):
    pass

def not_a_class(params, lr):
    return torch.optim.SGD(params, lr)

five = 5
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A function that writes a module into the working folder and gives its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(source=GOOD):
        name = f"own_of_a_test_{next(_NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def own_run(**settings):
    given = {"optimizer": "sgd", "lr": 0.1, "batch_size": 2, "steps": 2, "widths": (3,)}
    if ":" in settings.get("network", ""):
        del given["widths"]
    return TrainConfig(**{**given, **settings})


@pytest.mark.parametrize(
    ("function", "classes"), [("arrays", 3), ("lists", 2), ("data", 5), ("pixels", 2)]
)
def test_own_data(own, function, classes):
    config = own_run(dataset=f"{own()}:{function}")
    data = load_data(config)
    assert data.classes == classes
    assert data.train_x.dtype == data.test_x.dtype == torch.float32
    assert data.train_y.dtype == data.test_y.dtype == torch.int64
    result = train(config)
    assert result.steps == 2
    assert result.config.batch_size == 2
    assert train(own_run(dataset=config.dataset, validation=0.5, batch_size=1)).steps == 2


def test_whole_numbers_are_left_to_an_own_network(own):
    name = own()
    config = own_run(dataset=f"{name}:pixels", network=f"{name}:net")
    assert load_data(config).train_x.dtype == torch.uint8


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("5", "returned int, not the four tensors"),
        ("(1, 2, 3)", "returned tuple, not the four tensors"),
        ("([[0.0]], ['a'], [[0.0]], [0])", "holds what is no tensor"),
        ("([[0.0]], [0.5], [[0.0]], [0])", r"the training labels must be whole.*float32"),
        ("([[0.0]], [0], [[0.0]], [True])", r"the test labels must be whole.*bool"),
        ("([[0.0]], [0], [[0.0]], [0, 1])", r"the test labels.*shape \(2,\).*for 1 samples"),
        ("([[0.0]], [[0]], [[0.0]], [0])", r"the training labels.*shape \(1, 1\)"),
        ("(0.0, [0], [[0.0]], [0])", "the training labels.*for 0 samples"),
        ("([[0.0]], [0], torch.zeros(0, 1), torch.zeros(0).long())", "the test set is empty"),
        ("([[0.0]], [-1], [[0.0]], [0])", "the training labels must count from 0"),
        ("([[0.0]], [0], [[0.0, 1.0]], [0])", r"shape \(1,\), but test inputs \(2,\)"),
    ],
)
def test_own_data_that_are_none(own, value, says):
    name = own(f"import torch\ndef make():\n    return {value}\n")
    with pytest.raises(InputError, match=f"dataset {name}:make.*{says}"):
        load_data(own_run(dataset=f"{name}:make", batch_size=1))


def test_own_data_with_too_few_classes(own):
    with pytest.raises(InputError, match="says 2 classes, but its labels need 3"):
        load_data(own_run(dataset=f"{own()}:few"))


@pytest.mark.parametrize("attribute", ["net", "Fixed", "Holder.net"])
def test_own_network(own, attribute):
    name = own()
    config = own_run(dataset=f"{name}:arrays", network=f"{name}:{attribute}").resolved()
    model = build_network(config, load_data(config))
    assert model(torch.zeros(1, 4)).shape == (1, 3)
    assert train(config).steps == 2


class _WithoutSignature:
    """As functions that are not written in Python may be."""

    __signature__ = "unknown"

    def __call__(self, *args):
        self.args = args
        return nn.ReLU()


def test_an_own_function_without_a_signature_is_given_everything(monkeypatch):
    build = _WithoutSignature()
    monkeypatch.setattr(setup, "find", lambda name, what: build)
    config = TrainConfig(network="mine:net", dataset="wine")
    build_network(config, load_data(config))
    assert build.args == ((13,), 3)


def test_an_own_network_that_is_a_module_and_builds_none(monkeypatch):
    monkeypatch.setattr(setup, "find", lambda name, what: nn.Sequential(nn.Linear(13, 3)))
    config = TrainConfig(network="mine:net", dataset="wine")
    with pytest.raises(InputError, match=r"mine:net is a module \(Sequential\), not a function"):
        build_network(config, load_data(config))


def test_own_network_that_is_none(own):
    name = own()
    config = own_run(dataset="wine", network=f"{name}:nothing").resolved()
    with pytest.raises(InputError, match=f"network {name}:nothing returned NoneType, not an nn"):
        build_network(config, load_data(config))
    config = own_run(dataset="wine", network=f"{name}:one").resolved()
    with pytest.raises(InputError, match=r"called with \(shape, classes\).*but takes \(shape\)"):
        build_network(config, load_data(config))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere_at_all:f", "module 'nowhere_at_all' cannot be imported"),
        ("MODULE:nobody", "module 'MODULE' has no 'nobody'"),
        ("MODULE:Holder.nobody", "has no 'Holder.nobody'"),
        ("MODULE:five", "'five' cannot be called"),
        (":f", "expected module:name"),
        (".mine:f", "expected module:name"),
        ("MODULE:", "expected module:name"),
    ],
)
def test_what_is_not_found_is_said(own, name, says):
    module = own()
    with pytest.raises(InputError, match=says.replace("MODULE", module)) as caught:
        find(name.replace("MODULE", module), "dataset")
    assert str(caught.value).startswith("dataset ")


BROKEN = """
import torch
from torch import nn

def fails():
    part = "first"
    raise RuntimeError(f"no {part} part\\n  and no second")

def net(shape, classes):
    return nn.Linear("three", classes)

def silent():
    assert False
"""


@pytest.mark.parametrize(
    ("attribute", "says"),
    [
        ("fails", r"raised RuntimeError: no first part and no second \(NAME\.py, line 7\)"),
        ("net", r"raised TypeError: .*\(NAME\.py, line 10\)"),
        ("silent", r"raised AssertionError \(NAME\.py, line 13\)"),
    ],
)
def test_what_an_own_function_raises_is_said_with_the_place(own, attribute, says):
    name = own(BROKEN)
    says = says.replace("NAME", name)
    data = load_data(own_run(dataset="wine"))
    with pytest.raises(InputError, match=f"^network {name}:{attribute} {says}$") as caught:
        build_network(own_run(dataset="wine", network=f"{name}:{attribute}").resolved(), data)
    assert caught.value.__cause__ is not None
    if attribute != "net":
        with pytest.raises(InputError, match=f"^dataset {name}:{attribute} {says}$"):
            load_data(own_run(dataset=f"{name}:{attribute}", batch_size=1))


@pytest.mark.parametrize(
    "folder", [Path(ocnopt.__file__).parent, *map(sysconfig.get_path, ("stdlib", "purelib"))]
)
def test_a_folder_whose_name_begins_like_a_librarys_is_the_users(folder):
    for place, theirs in ((f"{folder}-of-mine", True), (str(folder), False)):
        code = compile("import json\njson.loads('{')\n", f"{place}{os.sep}x.py", "exec")
        try:
            exec(code)
        except ValueError as error:
            line = told(error)
        assert ("(x.py, line 2)" in line) == theirs
        assert (Path(__file__).name in line) != theirs


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import math\nmath.nobody\n", r"AttributeError: .*nobody.* \(NAME\.py, line 2\)$"),
        ("def f(:\n", r"SyntaxError: [^(]*\(NAME\.py, line 1\)$"),
    ],
)
def test_a_module_that_cannot_be_run_is_bad_input_to_a_run(own, source, says):
    name = own(source)
    with pytest.raises(InputError, match=f"dataset {name}:f raised " + says.replace("NAME", name)):
        load_data(own_run(dataset=f"{name}:f"))


def test_an_error_inside_the_users_module_is_theirs(own):
    with pytest.raises(AttributeError, match="nobody"):
        find(own("import math\nmath.nobody\n") + ":f", "dataset")
    with pytest.raises(InputError, match="cannot be imported: No module named 'nowhere_at_all'"):
        find(own("import nowhere_at_all") + ":f", "dataset")


def test_the_working_folder_is_searched_last(own, tmp_path):
    (tmp_path / "json.py").write_text("def load(): pass")
    import json

    assert find("json:load", "dataset") is json.load
    find(f"{own()}:net", "network")
    assert sys.path[-1] == str(tmp_path)
    assert sys.path.count(str(tmp_path)) == 1


def test_own_optimizer(own):
    name = own()
    config = own_run(dataset="wine", optimizer=f"{name}:Mine", options={"momentum": 0.9})
    plain = own_run(dataset="wine", options={"momentum": 0.9})
    assert torch.equal(train(config).history, train(plain).history)
    config = own_run(dataset="wine", optimizer="torch.optim:Adagrad")
    assert train(config).steps == 2
    with pytest.raises(InputError, match=r"is no torch\.optim\.Optimizer"):
        train(own_run(dataset="wine", optimizer=f"{name}:not_a_class"))
    with pytest.raises(InputError, match="no option 'speed'"):
        train(own_run(dataset="wine", optimizer=f"{name}:Mine", options={"speed": 1}))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("dataset", ["wine", "digits"])
def test_validation_split(dataset, share):
    whole = load_data(TrainConfig(dataset=dataset))
    split = load_data(TrainConfig(dataset=dataset, validation=share, seed=0))
    assert split.classes == whole.classes
    # Stratified: of every class its share.
    every = torch.bincount(whole.train_y)
    held = torch.bincount(split.test_y, minlength=whole.classes)
    assert held.tolist() == [round(share * int(n)) for n in every]
    # Disjoint, and nothing is lost: every training row is on one side, by its place.
    assert len(split.train_y) + len(split.test_y) == len(whole.train_y)
    rows = [x.flatten(1).numpy().tobytes() for x in whole.train_x.split(1)]
    sides = [
        [x.flatten(1).numpy().tobytes() for x in part.split(1)]
        for part in (split.train_x, split.test_x)
    ]
    assert sorted(sides[0] + sides[1]) == sorted(rows)
    labels = dict(zip(rows, whole.train_y.tolist(), strict=True))
    assert [labels[row] for row in sides[1]] == split.test_y.tolist()
    # Fixed: the same whatever the seed.
    again = load_data(TrainConfig(dataset=dataset, validation=share, seed=7))
    assert torch.equal(again.test_x, split.test_x)
    assert torch.equal(again.train_y, split.train_y)


def test_validation_takes_the_place_of_the_test_set():
    config = TrainConfig(dataset="wine", optimizer="sgd", validation=0.25, steps=5)
    held = load_data(config)
    result = train(config)
    with torch.no_grad():
        right = (result.model(held.test_x).argmax(1) == held.test_y).double().mean()
    assert result.test_accuracy == float(right)
    assert result.steps_per_epoch == len(held.train_y) // 8


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(InputError, match="leaves no sample on one of the two sides"):
        load_data(TrainConfig(dataset="wine", validation=share))


def test_batches_have_to_fit_what_is_left():
    assert len(load_data(TrainConfig(dataset="wine", batch_size=142)).train_y) == 142
    with pytest.raises(InputError, match="batch-size 142 is more than the 106"):
        load_data(TrainConfig(dataset="wine", batch_size=142, validation=0.25))


def test_a_run_ends_at_whichever_comes_first():
    assert total_steps(TrainConfig(steps=5), 3) == 5
    assert total_steps(TrainConfig(epochs=5), 3) == 15
    assert total_steps(TrainConfig(epochs=5, steps=7), 3) == 7
    assert total_steps(TrainConfig(epochs=2, steps=7), 3) == 6


def test_what_counts_as_right():
    outputs = torch.tensor([[1.0, 2.0], [2.0, 1.0], [float("inf"), 0.0], [float("nan"), 0.0]])
    y = torch.tensor([1, 1, 0, 0])
    assert setup.correct(outputs, y).tolist() == [True, False, False, False]
