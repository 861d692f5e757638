"""SNOpt on models of which not all is a Neural ODE, and what is left when it is gone."""

import copy
import gc
import weakref

import pytest
import torch
from ode.blocks import STEADY, batch, classifier, run, snopt, steady, step, timed, trained
from promises.conformance import assert_weights_close, assert_weights_equal, flat_state, weights
from torch import nn

import ocnopt
from ocnopt.ode import NeuralODE

CE = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def _exact(exact):
    """Float64 and one seed for every test."""


EVERYWHERE = pytest.mark.parametrize("everywhere", [False, True], ids=["ODE", "all layers"])


# what is not trained, or not by the adjoint


def test_a_step_after_a_pass_without_the_ode():
    model = steady()
    optimizer = snopt(model)
    run(model, optimizer, 2)
    block, kept = trained(model[1]), flat_state(optimizer)["state"]
    optimizer.zero_grad()
    x, y = batch(3)
    CE(model[2](model[0](x)), y).backward()
    before = trained(model[0])
    optimizer.step()
    assert_weights_equal(block, trained(model[1]))
    index = [n for n, _ in model.named_parameters()].index("1.func.layers.2.weight")
    for key, value in flat_state(optimizer)["state"][index].items():
        same = value == kept[index][key]
        assert bool(same.all()) if isinstance(same, torch.Tensor) else same
    assert not torch.equal(before["weight"], model[0].weight)
    # The refresh that was due then comes with the next pass.
    step(model, optimizer, *batch(4))
    assert optimizer.state[model[1].func.layers[2].weight]["step"] == 3


def test_zeros_for_gradients_where_new_factors_are_due():
    """A pass without the ODE after zero_grad(set_to_none=False): the factors stay as they were."""
    model = steady()
    optimizer = snopt(model, momentum=0.0)
    run(model, optimizer, 2)
    weight = model[1].func.layers[2].weight
    block, factor = trained(model[1]), optimizer.state[weight]["A"]
    optimizer.zero_grad(set_to_none=False)
    x, y = batch(3)
    nn.functional.cross_entropy(model[2](model[0](x)), y).backward()
    optimizer.step()
    assert_weights_equal(block, trained(model[1]))
    assert torch.equal(optimizer.state[weight]["A"], factor)


def test_an_evaluation_in_between():
    models = [steady(), steady()]
    optimizers = [snopt(m) for m in models]
    for i in range(3):
        x, y = batch(i)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = CE(model(x), y)
            if model is models[0]:
                with torch.no_grad():
                    model(batch(7, 3)[0])
                model(batch(8, 5)[0])  # with a graph, and never differentiated
            loss.backward()
            optimizer.step()
    assert_weights_equal(*models)


def test_a_step_without_gradients_does_nothing():
    model = steady()
    optimizer = snopt(model)
    kept = weights(model)
    optimizer.step()
    assert_weights_equal(kept, model)
    assert not optimizer.state_dict()["state"]


def test_frozen_layers_of_a_field():
    """They stay; the others step as if they were alone."""
    model, other = steady(), steady()
    model[1].func.layers[0].requires_grad_(False)
    kept = trained(model[1].func.layers[0])
    optimizer = snopt(model)
    second = snopt(other, params=[{"params": "1.func.layers.0", "lr": 0.0}])
    run(model, optimizer, 3)
    run(other, second, 3)
    assert_weights_equal(kept, trained(model[1].func.layers[0]))
    # The frozen layer's part of the adjoint is not integrated, but steps are fixed here.
    assert_weights_close(model, other, 1e-12)
    assert not any("layers.0" in row.parameter for row in optimizer.coverage())
    # Unfrozen and named again, it is a layer of the adjoint.
    model[1].func.layers[0].requires_grad_(True)
    optimizer.add_param_group({"params": "1.func.layers.0"})
    run(model, optimizer, 2, start=3)
    rows = {row.parameter: row.treatment for row in optimizer.coverage()}
    assert rows["1.func.layers.0.linear.weight"] == "adjoint"
    assert not torch.equal(kept["linear.weight"], model[1].func.layers[0].linear.weight)


class Normed(nn.Module):
    """A field with a layer that has no Kronecker factors and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm = timed(), nn.LayerNorm(3)
        self.speed = nn.Parameter(torch.ones(3))

    def forward(self, t, x):
        return self.speed * self.inner(t, self.norm(x))


def test_coverage_says_which_layer_got_what():
    """Before the first step as after it."""
    model = classifier(ode=NeuralODE(Normed(), **STEADY))
    optimizer = snopt(model)

    def table():
        return {row.parameter: (row.treatment, row.reason) for row in optimizer.coverage()}

    early = table()
    run(model, optimizer, 2)
    assert table() == early
    assert early["1.func.inner.layers.2.weight"] == ("adjoint", "")
    assert early["1.func.norm.weight"] == ("first-order", "no Kronecker factors: M = I")
    assert early["0.weight"] == ("first-order", "outside the Neural ODEs")
    assert early["1.func.speed"][0] == "first-order" and early["1.func.speed"][1]
    assert set(early) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("shared", ["parameter", "module"])
def test_weights_shared_with_a_layer_outside(shared):
    """By parameter they are nobody's; a module used outside as well is the ODE's."""
    torch.manual_seed(0)
    model = steady()
    if shared == "parameter":
        model[2].weight = nn.Parameter(torch.randn(3, 5) * 0.3)
        model.insert(2, nn.Linear(3, 5))
        model[3].weight = model[1].func.layers[2].weight
    else:
        model[1].func.layers.append(model[2])
    optimizer = snopt(model)
    before = trained(model)
    losses = [step(model, optimizer, *batch()) for _ in range(12)]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    rows = {row.parameter: row for row in optimizer.coverage()}
    if shared == "parameter":
        row = rows["1.func.layers.2.weight"]
        assert row.treatment == "first-order" and row.reason
    else:
        assert rows["1.func.layers.3.weight"].treatment == "adjoint"


@pytest.mark.parametrize("name", ["DDPNOpt", "EKFAC", "KFAC"])
def test_other_optimizers_on_a_model_with_a_neural_ode(name):
    """Layers outside are theirs, the field's take gradient steps, and coverage says so."""
    model, other = steady(), steady()
    criterion = nn.CrossEntropyLoss()
    optimizer = getattr(ocnopt, name)(model, criterion, lr=0.05)
    sgd = torch.optim.SGD(other[1].parameters(), lr=0.05)
    x, y = batch()
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    step(other, sgd, x, y)
    assert_weights_close(model[1], other[1], 1e-12)
    for row in optimizer.coverage():
        assert row.treatment == ("first-order" if row.parameter.startswith("1.") else "player")
        assert ("NeuralODE '1' solves it; see SNOpt" in row.reason) == row.parameter.startswith(
            "1."
        )


# refused


def test_a_model_without_a_neural_ode():
    with pytest.raises(ocnopt.errors.OptionError, match=r"no ocnopt.ode.NeuralODE.*EKFAC"):
        ocnopt.SNOpt(nn.Linear(2, 2), lr=0.1)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "0.1"])
def test_sample_steps_that_cannot_be(value):
    with pytest.raises(ocnopt.errors.OptionError, match="sample_step"):
        ocnopt.SNOpt(steady(), lr=0.1, sample_step=value)


# what is left behind


@EVERYWHERE
def test_nothing_follows_once_the_optimizer_is_gone(everywhere):
    model = steady()
    optimizer = snopt(model, precondition_all=everywhere)
    x, y = batch()
    CE(model(x), y).backward()  # a pass that it holds
    gone = weakref.ref(optimizer), weakref.ref(optimizer._solved.statistics)
    del optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert_free(model)
    model[1].reset_evaluations()
    CE(model(x), y).backward()
    assert model[1].evaluations.sampling == 0


def test_detach():
    model = steady()
    optimizer = snopt(model, precondition_all=True)
    run(model, optimizer, 1)
    optimizer.detach()
    assert_free(model)
    optimizer.detach()


def assert_free(model):
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert len(model[1]._listeners) == 0


def test_one_optimizer_after_another():
    model = steady()
    first = snopt(model)
    run(model, first, 2)
    fresh = copy.deepcopy(model)
    run(model, snopt(model), 3)
    run(fresh, snopt(fresh), 3)
    assert_weights_equal(model, fresh)
    del first


def test_nothing_is_kept_of_a_solve():
    """No cycle of references holds the last interval's tensors until they are collected."""
    model = classifier()
    optimizer = snopt(model)
    x, y = batch()
    CE(model(x), y).backward()
    kept = [
        m for m in gc.get_objects() if type(m).__name__ in ("Sampler", "_Watched", "_Augmented")
    ]
    assert not kept
    assert optimizer._solved.statistics.samples == 8


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_field(when):
    """Whichever of compiler and optimizer comes first."""
    torch._dynamo.reset()
    model, plain = steady(), steady()
    if when == "before":
        model[1].func.compile(backend="eager")
    optimizer, other = snopt(model), snopt(plain)
    if when == "after":
        model[1].func.compile(backend="eager")
    run(model, optimizer, 3)
    run(plain, other, 3)
    assert_weights_close(model, plain, 1e-12)
    assert {row.treatment for row in optimizer.coverage()} == {"adjoint", "first-order"}
    torch._dynamo.reset()


def test_a_parameter_shared_with_a_layer_outside_says_so():
    outside = nn.Linear(3, 3)
    inside = nn.Linear(3, 3)
    inside.weight = outside.weight

    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = inside

        def forward(self, t, x):
            return torch.tanh(self.layer(x))

    model = nn.Sequential(outside, NeuralODE(Held()))
    rows = {row.parameter: row for row in ocnopt.SNOpt(model, lr=0.1).coverage()}
    assert "shared with" in rows["0.weight"].reason
    assert rows["0.weight"].treatment == "first-order"
