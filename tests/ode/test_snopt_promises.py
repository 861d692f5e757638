"""SNOpt in the ordinary loop: accumulation, scalers, checkpoints, bad batches, and what is left."""

import io

import pytest
import torch
from ode.blocks import batch, classifier, relative, run, snopt, steady, step, trained
from promises.conformance import (
    assert_state_equal,
    assert_updates_close,
    assert_weights_equal,
    flat_state,
    weights,
)
from torch import nn

import ocnopt

CE = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def _exact(exact):
    """Float64 and one seed for every test."""


EVERYWHERE = pytest.mark.parametrize("everywhere", [False, True], ids=["ODE", "all layers"])


# the loop


@EVERYWHERE
def test_trains(everywhere):
    model = classifier()
    optimizer = snopt(model, precondition_all=everywhere)
    x, y = batch()
    losses = [step(model, optimizer, x, y) for _ in range(15)]
    assert losses[-1] < 0.9 * losses[0]


def test_schedulers():
    """The rate is read at every step."""
    one, two = steady(), steady()
    first, second = snopt(one), snopt(two)
    scheduler = torch.optim.lr_scheduler.StepLR(first, 2, 0.5)
    for i in range(4):
        step(one, first, *batch(i))
        scheduler.step()
        second.param_groups[0]["lr"] = 0.05 * 0.5 ** (i // 2)
        step(two, second, *batch(i))
    assert_weights_equal(one, two)


def test_closure():
    one, two = steady(), steady()
    first, second = snopt(one), snopt(two)
    x, y = batch()

    def closure():
        first.zero_grad()
        loss = CE(one(x), y)
        loss.backward()
        return loss

    assert float(first.step(closure).detach()) == step(two, second, x, y)
    assert_weights_equal(one, two)


@EVERYWHERE
@pytest.mark.parametrize("sizes", [[4, 4], [5, 1, 2]], ids=str)
def test_micro_batches_add_up(sizes, everywhere):
    """Weights, and factors too."""
    one, two = steady(), steady()
    first, second = (snopt(m, precondition_all=everywhere) for m in (one, two))
    before = trained(one)
    for i in range(3):
        x, y = batch(i)
        step(one, first, x, y)
        second.zero_grad()
        for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
            # Without the criterion equal micro-batches are assumed outside.
            (CE(two(a), b) * (len(a) / 8)).backward()
        second.step()
        if everywhere and len(set(sizes)) > 1:
            return
    assert_updates_close(before, one, two, 1e-6)
    for p, q in zip(one[1].parameters(), two[1].parameters(), strict=True):
        for key in ("A", "B", "m2") if first.state[p].get("A") is not None else ():
            torch.testing.assert_close(first.state[p][key], second.state[q][key])


def test_the_adjoint_is_looked_at_when_it_is_due():
    model = steady()
    optimizer = snopt(model, update_every=3)
    seen = []
    for i in range(7):
        model[1].reset_evaluations()
        step(model, optimizer, *batch(i))
        seen.append(model[1].evaluations.sampling > 0)
    assert seen == [True, False, False, True, False, False, True]


def test_row_32_rare_refreshes_agree_with_frequent_ones():
    """With the weights at rest, right after a refresh."""
    models = [steady(), steady()]
    optimizers = [snopt(m, lr=0.0, update_every=k) for m, k in zip(models, (1, 3), strict=True)]
    for i in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            step(model, optimizer, *batch(i))
        weight = [m[1].func.layers[2].weight for m in models]
        states = [o.state[p] for o, p in zip(optimizers, weight, strict=True)]
        assert torch.equal(states[0]["m2"], states[1]["m2"]) == (i % 3 == 0)


def test_without_the_adjoint_the_step_is_close():
    """A trapezoidal rule on the solver's steps instead of the grid: the same limit."""
    distances = []
    for n in (10, 40):
        models = [steady(adjoint=on, options={"step_size": 1 / n}) for on in (True, False)]
        before = trained(models[0])
        for model in models:
            # D scales the curvature.
            options = {"sample_step": 1 / n, "damping": 0.05 / n, "eigen_decay": 1.0}
            step(model, snopt(model, **options), *batch())
        moves = [m[1].func.layers[2].weight - before["1.func.layers.2.weight"] for m in models]
        distances.append(relative(*moves))
    assert 0 < distances[1] < 0.4 * distances[0] < 0.1


# clipping, scalers, precision


def test_clipping_shortens_the_step():
    """The curvature is that of the loss: with eigenvalues left alone, steps shrink as gradients."""
    models = [steady() for _ in range(3)]
    before = trained(models[0])
    for model, factor in zip(models, (1.0, 0.3, 7.0), strict=True):
        optimizer = snopt(model, eigen_decay=1.0)
        x, y = batch()
        CE(model(x), y).backward()
        for p in model.parameters():
            p.grad.mul_(factor)
        optimizer.step()
    full, *others = (trained(m) for m in models)
    for other, factor in zip(others, (0.3, 7.0), strict=True):
        expected = {k: before[k] + factor * (v - before[k]) for k, v in full.items()}
        assert_updates_close(before, other, expected, 1e-9)


@EVERYWHERE
@pytest.mark.parametrize("clip", [None, 0.8, 0.05])
def test_grad_scaler(clip, everywhere):
    """As without one; where it was clipped by more than a half, of the same size.

    A scaler's factor and such a clip's cannot be told apart.
    """
    models = steady(torch.float32), steady(torch.float32)
    before = trained(models[0])
    for model, on in zip(models, (True, False), strict=True):
        optimizer = snopt(model, precondition_all=everywhere)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=on)
        for i in range(3):
            x, y = batch(i, dtype=torch.float32)
            optimizer.zero_grad()
            scaler.scale(CE(model(x), y)).backward()
            scaler.unscale_(optimizer)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
    if clip is None or clip > 0.5:
        assert_updates_close(before, *models, 1e-3)
    else:
        one, two = (
            float(sum((p.detach() - before[n]).norm() for n, p in m.named_parameters()))
            for m in models
        )
        assert 0.2 < one / two < 5


@pytest.mark.parametrize("how", ["optimizer", "model", "by hand"])
def test_step_skipped_on_overflow(how):
    """Weights and state stay, and the pass does not count later."""
    models = steady(torch.float32), steady(torch.float32)
    optimizers = [snopt(m) for m in models]
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in models]
    x, y = batch(dtype=torch.float32)

    def turn(which, factor=1.0):
        model, optimizer, scaler = models[which], optimizers[which], scalers[which]
        if how == "optimizer":
            optimizer.zero_grad()
        elif how == "model":
            model.zero_grad()
        else:
            for p in model.parameters():
                p.grad = None
        scaler.scale(CE(model(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update(1024.0)

    turn(0)
    turn(1)
    kept, state = weights(models[0]), flat_state(optimizers[0])
    turn(0, factor=1e38)
    assert_weights_equal(kept, models[0])
    assert_state_equal(state, optimizers[0].state_dict())
    for _ in range(2):  # of which the second is due for new factors
        turn(0)
        turn(1)
    assert_weights_equal(*models)


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_models_of_other_precision_train(dtype, everywhere):
    model = steady(dtype)
    optimizer = snopt(model, precondition_all=everywhere)
    x, y = batch(dtype=dtype)
    losses = [step(model, optimizer, x, y) for _ in range(15)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.dtype == dtype and torch.isfinite(p).all() for p in model.parameters())
    state = optimizer.state[model[1].func.layers[2].weight]
    assert all(state[key].dtype == torch.float32 for key in ("A", "B", "U_A", "U_B", "m2"))
    assert state["failures"] == 0


@EVERYWHERE
def test_autocast_trains(everywhere):
    model = steady(torch.float32)
    optimizer = snopt(model, precondition_all=everywhere)
    x, y = batch(dtype=torch.float32)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = CE(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


# checkpoints


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_continues_bit_for_bit(dtype, everywhere):
    """Interrupted between two refreshes, and run across the next; loaded without unpickling."""

    def build(seed):
        model = classifier(dtype, seed) if dtype == torch.float32 else steady(dtype, seed)
        adam = [{"params": "2", "preconditioner": "adam", "lr": 0.01}]
        return model, snopt(model, update_every=4, precondition_all=everywhere, params=adam)

    def loaded(thing):
        file = io.BytesIO()
        torch.save(thing, file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    one, first = build(0)
    run(one, first, 3, dtype=dtype)
    model_state, state = loaded(one.state_dict()), loaded(first.state_dict())
    run(one, first, 4, start=3, dtype=dtype)
    two, second = build(5)
    two.load_state_dict(model_state)
    second.load_state_dict(state)
    run(two, second, 4, start=3, dtype=dtype)
    assert_weights_equal(one, two)
    assert_state_equal(first.state_dict(), second.state_dict())


# bad batches


@EVERYWHERE
@pytest.mark.parametrize("adjoint", [True, False])
@pytest.mark.parametrize("kind", ["nan input", "inf loss", "nan loss"])
def test_bad_batch(kind, adjoint, everywhere):
    """A named error, in the forward pass or at the step; weights and state as if there was none."""
    models = [steady(adjoint=adjoint) for _ in range(2)]
    optimizers = [snopt(m, precondition_all=everywhere) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        run(model, optimizer, 2)
    kept, state = weights(models[0]), flat_state(optimizers[0])
    x, y = batch(9)
    if kind == "nan input":
        x[0, 0] = float("nan")
    spoil = {"inf loss": float("inf"), "nan loss": float("nan")}.get(kind, 1.0)
    with pytest.raises(ocnopt.NonFiniteError) as caught:
        models[0].zero_grad()
        (CE(models[0](x), y) * spoil).backward()
        optimizers[0].step()
    assert "NeuralODE" in str(caught.value) or "'2.bias'" in str(caught.value)
    assert_weights_equal(kept, models[0])
    assert_state_equal(state, optimizers[0].state_dict())
    for model, optimizer in zip(models, optimizers, strict=True):
        model.zero_grad(set_to_none=False)  # of which the optimizer is not told
        for i in range(3):
            CE(model(batch(i)[0]), batch(i)[1]).backward()
            optimizer.step()
            model.zero_grad()
    assert_weights_equal(*models)
    assert_state_equal(*(o.state_dict() for o in optimizers))
