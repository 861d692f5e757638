"""The vanishing-gradient regularizer against Eq. 9 and 10 written out, and in the loop."""

from __future__ import annotations

import copy
import doctest
import gc
import itertools
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import ocnopt
from ocnopt.losses import vanishing


def sigmoid_net(widths: tuple[int, ...] = (4, 6, 5, 3), gain: float = 1.5) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Sigmoid()]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(gain)
    return model


def batch(samples: int = 7, inputs: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, inputs), torch.arange(samples) % 3


def penalty(model, loss_of, weight: float = 1.0) -> tuple[float, dict[str, Tensor | None]]:
    """The regularizer's value and its gradient by name."""
    regularizer = ocnopt.VanishingGradientRegularizer(model, weight)
    omega = regularizer(loss_of())
    named = dict(model.named_parameters())
    found = torch.autograd.grad(omega, list(named.values()), allow_unused=True)
    regularizer.remove()
    return float(omega.detach()), dict(zip(named, found, strict=True))


def term(jacobian_transposed: Callable[[Tensor], Tensor], signal: Tensor) -> Tensor:
    """Eq. 9 for one layer, averaged over samples that are looped over."""
    total = torch.zeros(())
    for i, product in enumerate(jacobian_transposed(signal)):
        total = total + (product.norm() / signal[i].norm() - 1) ** 2
    return total / len(signal)


def finite_difference(value: Callable[[Tensor], Tensor], at: Tensor, h: float = 2e-3) -> Tensor:
    """Gradient by a five-point stencil, one entry at a time."""
    gradient = torch.zeros_like(at)
    for index in itertools.product(*map(range, at.shape)):
        step = torch.zeros_like(at)
        step[index] = h
        near = value(at + step) - value(at - step)
        far = value(at + 2 * step) - value(at - 2 * step)
        gradient[index] = (8 * near - far) / (12 * h)
    return gradient


# --- against the formula -------------------------------------------------------------------------


def test_three_sigmoid_layers_by_hand():
    model = sigmoid_net()
    x0, y = batch()
    criterion = nn.CrossEntropyLoss()
    value, gradients = penalty(model, lambda: criterion(model(x0), y), weight=0.7)

    (w1, b1), (w2, b2), (w3, b3) = ((m.weight.detach(), m.bias.detach()) for m in model[::2])
    x1 = torch.sigmoid(x0 @ w1.t() + b1)
    x2 = torch.sigmoid(x1 @ w2.t() + b2)
    x3 = x2 @ w3.t() + b3
    e3 = (x3.softmax(1) - nn.functional.one_hot(y, 3)) / len(y)
    e2 = e3 @ w3

    def first(w: Tensor, b: Tensor) -> Tensor:
        s = torch.sigmoid(x1 @ w.t() + b)  # x1 and e2 stay what they are
        return term(lambda e: (e * s * (1 - s)) @ w, e2)

    def second(w: Tensor) -> Tensor:
        return term(lambda e: e @ w, e3)

    assert value == pytest.approx(0.7 * float(first(w2, b2) + second(w3)), rel=1e-13)
    expected = {
        "2.weight": finite_difference(lambda w: first(w, b2), w2),
        "2.bias": finite_difference(lambda b: first(w2, b), b2),
        "4.weight": finite_difference(second, w3),
    }
    for name, want in expected.items():
        assert float(want.abs().max()) > 1e-3
        torch.testing.assert_close(gradients[name], 0.7 * want, rtol=0, atol=1e-9)
    assert all(gradients[name] is None for name in gradients if name not in expected)


def test_the_derivative_is_the_immediate_one():
    """The derivative with x_k and e_k+1 free is another: it reaches the first layer, too."""
    model = sigmoid_net()
    x0, y = batch()
    _, gradients = penalty(model, lambda: nn.functional.cross_entropy(model(x0), y))
    x1 = model[:2](x0)
    x2 = model[2:4](x1)
    x3 = model[4:](x2)
    loss = nn.functional.cross_entropy(x3, y)
    e1, e2, e3 = torch.autograd.grad(loss, [x1, x2, x3], create_graph=True)
    omega = sum(((a.norm(dim=1) / b.norm(dim=1) - 1) ** 2).mean() for a, b in ((e1, e2), (e2, e3)))
    full = torch.autograd.grad(omega, [model[0].weight, model[2].weight])
    assert gradients["0.weight"] is None
    assert float(full[0].abs().max()) > 1e-4
    assert float((full[1] - gradients["2.weight"]).abs().max()) > 1e-3


def dense_omega(
    stages: list[Callable[[dict[str, Tensor], Tensor], Tensor]],
    states: list[Tensor],
    signals: list[Tensor],
    params: list[dict[str, Tensor]],
) -> Tensor:
    """Omega from one dense Jacobian per sample and stage; differentiable in the parameters."""
    total = torch.zeros(())
    for stage, x, e, p in zip(stages, states, signals, params, strict=True):
        for i in range(len(x)):
            point = x[i : i + 1].detach()
            jacobian = torch.func.jacrev(lambda v, s=stage, q=p: s(q, v).flatten())(point)
            signal = e[i].flatten()
            product = signal @ jacobian.reshape(len(signal), -1)
            total = total + (product.norm() / signal.norm() - 1) ** 2 / len(x)
    return total


def against_dense(model: nn.Module, parts: list[nn.Sequential], loss_of, x: Tensor) -> None:
    """Compare with dense Jacobians of the model's parts; the first ends in the first state."""
    value, gradients = penalty(model, lambda: loss_of(model(x)))
    states = [parts[0](x)]
    for part in parts[1:]:
        states.append(part(states[-1]))
    signals = torch.autograd.grad(loss_of(states[-1]), states)
    params = [dict(part.named_parameters()) for part in parts[1:]]
    stages = [lambda p, v, m=part: functional_call(m, p, (v,)) for part in parts[1:]]
    expected = dense_omega(stages, states[:-1], signals[1:], params)
    assert value == pytest.approx(expected.item(), rel=1e-12)
    flat = [p for table in params for p in table.values()]
    wanted = torch.autograd.grad(expected, flat, allow_unused=True)
    names = {p: name for name, p in model.named_parameters()}
    for p, want in zip(flat, wanted, strict=True):
        got = gradients[names[p]]
        want = torch.zeros_like(p) if want is None else want
        got = torch.zeros_like(p) if got is None else got
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    assert max(float(w.abs().max()) for w in wanted if w is not None) > 1e-3


def test_convolutions():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.Tanh(),
        nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False),
        nn.Sigmoid(),
        nn.MaxPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(8, 3),
        nn.ReLU(),
        nn.Linear(3, 3),
    )
    x, y = torch.randn(4, 1, 7, 7), torch.arange(4) % 3
    against_dense(
        model,
        [model[:2], model[2:6], model[6:8], model[8:]],
        lambda out: nn.functional.cross_entropy(out, y),
        x,
    )


class Shortcut(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_shortcuts_and_other_losses():
    """A shortcut around a layer is part of the Jacobian."""
    block = Shortcut(nn.Sequential(nn.Linear(5, 5), nn.Tanh()))
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), block, nn.Linear(5, 3))
    x, y = batch()
    criterion = ocnopt.MMCLoss(3, radius=2.0)
    against_dense(model, [model[:2], model[2:3], model[3:]], lambda out: criterion(out, y), x)


def test_sequences():
    """Rows of one sample, side by side or along a dimension of their own, make one norm."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor, flat: bool) -> Tensor:
            x = torch.tanh(self.first(x))
            x = torch.sigmoid(self.second(x.flatten(0, 1) if flat else x))
            return self.third(x.reshape(6, 2, 5))

    model, x = Model(), torch.randn(6, 2, 4)
    one, same = (
        penalty(model, lambda flat=flat: model(x, flat).square().sum()) for flat in (False, True)
    )
    assert one[0] == pytest.approx(same[0], rel=1e-13)
    torch.testing.assert_close(one[1]["second.weight"], same[1]["second.weight"])


# --- scales and zeros ----------------------------------------------------------------------------


def test_scale_of_the_loss_does_not_matter():
    """Not even where squares of the error signal underflow: vanished is what it is meant for."""
    model = sigmoid_net()
    x, y = batch()
    criterion = nn.CrossEntropyLoss()
    value, gradients = penalty(model, lambda: criterion(model(x), y))
    tiny, same = penalty(model, lambda: criterion(model(x), y) * 1e-250)
    assert tiny == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(same["2.weight"], gradients["2.weight"], rtol=1e-10, atol=0)


def test_samples_without_an_error_signal_take_no_part():
    model = sigmoid_net()
    x, y = batch()
    y[[1, 4]] = -100
    criterion = nn.CrossEntropyLoss(reduction="sum")
    kept = y >= 0
    value, gradients = penalty(model, lambda: criterion(model(x), y))
    alone, expected = penalty(model, lambda: criterion(model(x[kept]), y[kept]))
    assert value == pytest.approx(alone, rel=1e-13)
    torch.testing.assert_close(gradients["2.weight"], expected["2.weight"], rtol=0, atol=1e-12)
    nothing, zero = penalty(model, lambda: criterion(model(x), torch.full_like(y, -100)))
    assert nothing == 0
    assert not zero["2.weight"].any()


def test_dead_units_pass_nothing_on_and_are_no_nan():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    nn.init.constant_(model[2].bias, -100.0)
    x, y = batch()
    regularizer = ocnopt.VanishingGradientRegularizer(model)
    loss = nn.functional.cross_entropy(model(x), y)
    (loss + regularizer(loss)).backward()
    assert torch.equal(regularizer.ratios["2"], torch.zeros(7))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert float(model[4].weight.grad.abs().max()) > 0


# --- in the loop ---------------------------------------------------------------------------------


def test_gradients_add_up_and_ratios_are_told():
    model = sigmoid_net()
    x, y = batch()
    criterion = nn.CrossEntropyLoss()
    value, gradients = penalty(model, lambda: criterion(model(x), y), weight=0.3)
    criterion(model(x), y).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    regularizer = ocnopt.VanishingGradientRegularizer(model, weight=0.3)
    loss = criterion(model(x), y)
    total = loss + regularizer(loss)
    total.backward()
    assert total.item() == pytest.approx(loss.item() + value, rel=1e-14)
    for name, p in model.named_parameters():
        extra = 0 if gradients[name] is None else gradients[name]
        torch.testing.assert_close(p.grad, plain[name] + extra, rtol=0, atol=1e-14)
    assert list(regularizer.ratios) == ["2", "4"]
    again = sum(float((r - 1).square().mean()) for r in regularizer.ratios.values())
    assert value == pytest.approx(0.3 * again, rel=1e-13)


def test_it_keeps_the_error_signal_alive():
    """On a deep sigmoid network, where the signal falls by far more than half at every layer."""
    x, y = batch(32)
    means = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(1)
        model = sigmoid_net((4, 8, 8, 8, 8, 3), gain=1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        regularizer = ocnopt.VanishingGradientRegularizer(model, weight=weight)
        values = []
        for _ in range(300):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            omega = regularizer(loss)
            (loss + omega).backward()
            optimizer.step()
            ratios = torch.stack(list(regularizer.ratios.values()))
            values.append((float(omega.detach()), float(ratios[:-1].mean())))
        means[weight] = (values[0], values[-1])
    (_, start), (_, without) = means[0.0]
    (omega, same), (omega_after, end) = means[1.0]
    assert start == same and start < 0.2
    assert without < 0.25
    assert end > 0.7
    assert omega_after < 0.2 * omega


def test_weight_may_change():
    model = sigmoid_net()
    x, y = batch()
    regularizer = ocnopt.VanishingGradientRegularizer(model)
    values = []
    for weight in (1.0, 0.25):
        regularizer.weight = weight
        values.append(regularizer(nn.functional.cross_entropy(model(x), y)).item())
    assert values[1] == pytest.approx(values[0] / 4, rel=1e-14)


def test_under_ddpnopt_it_moves_as_a_gradient():
    """Without feedback DDPNOpt is SGD, regularized or not."""
    x, y = batch()
    trained = []
    for feedback in (False, True):
        torch.manual_seed(1)
        model, criterion = sigmoid_net(), nn.CrossEntropyLoss()
        if feedback:
            optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, bellman="off", rollout="off")
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        regularizer = ocnopt.VanishingGradientRegularizer(model, weight=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            (loss + regularizer(loss)).backward()
            optimizer.step()
        trained.append(list(model.parameters()))
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_parametrized_weights():
    """What a weight is made of gets the weight's gradient."""
    model = sigmoid_net()
    x, y = batch()
    _, plain = penalty(model, lambda: nn.functional.cross_entropy(model(x), y))
    parametrizations.weight_norm(model[2])
    _, gradients = penalty(model, lambda: nn.functional.cross_entropy(model(x), y))
    parts = dict(model[2].parametrizations.named_parameters(prefix="2.parametrizations"))
    expected = torch.autograd.grad(model[2].weight, list(parts.values()), plain["2.weight"])
    assert len(parts) == 2
    for name, want in zip(parts, expected, strict=True):
        assert float(want.abs().max()) > 1e-3
        torch.testing.assert_close(gradients[name], want, rtol=0, atol=1e-13)


def test_frozen_layers_still_count():
    model = sigmoid_net()
    x, y = batch()
    value, gradients = penalty(model, lambda: nn.functional.cross_entropy(model(x), y))
    model[4].requires_grad_(False)
    regularizer = ocnopt.VanishingGradientRegularizer(model)
    omega = regularizer(nn.functional.cross_entropy(model(x), y))
    omega.backward()
    assert float(omega) == pytest.approx(value, rel=1e-14)
    torch.testing.assert_close(model[2].weight.grad, gradients["2.weight"], rtol=0, atol=1e-14)
    assert model[4].weight.grad is None


# --- hooks ---------------------------------------------------------------------------------------


def hooks_on(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("how", ["remove", "forget"])
def test_hooks_go_with_the_regularizer(how):
    model = sigmoid_net()
    regularizer = ocnopt.VanishingGradientRegularizer(model)
    assert hooks_on(model) == 5
    if how == "remove":
        regularizer.remove()
        regularizer.remove()
        x, y = batch()
        with pytest.raises(ocnopt.RecordingError, match="removed"):
            regularizer(nn.functional.cross_entropy(model(x), y))
    else:
        del regularizer
        gc.collect()
    assert hooks_on(model) == 0


@pytest.mark.parametrize("end", ["call", "next pass", "remove"])
def test_a_pass_is_not_kept(end):
    model = sigmoid_net()
    x, y = batch()
    regularizer = ocnopt.VanishingGradientRegularizer(model)
    output = model(x)
    seen = weakref.ref(output)
    if end == "call":
        regularizer(nn.functional.cross_entropy(output, y))
    elif end == "next pass":
        del output
        assert seen() is not None
        model(x)
    else:
        regularizer.remove()
    output = None
    gc.collect()
    assert seen() is None


def test_a_copy_of_the_model_is_not_watched():
    model = sigmoid_net()
    x, y = batch()
    regularizer = ocnopt.VanishingGradientRegularizer(model)
    loss = nn.functional.cross_entropy(model(x), y)
    copy.deepcopy(model)(x)  # would be another pass
    with torch.no_grad():
        model(x + 1)  # as would this
    expected, _ = penalty(model, lambda: nn.functional.cross_entropy(model(x), y))
    loss = nn.functional.cross_entropy(model(x), y)
    copy.deepcopy(model)(x)
    with torch.no_grad():
        model(x + 1)
    assert float(regularizer(loss)) == pytest.approx(expected, rel=1e-14)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "1"])
def test_weight_that_cannot_be(weight):
    with pytest.raises(ocnopt.OptionError, match="weight="):
        ocnopt.VanishingGradientRegularizer(sigmoid_net(), weight)


def test_too_few_layers():
    with pytest.raises(ocnopt.OptionError, match="1 linear"):
        ocnopt.VanishingGradientRegularizer(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)))


def test_calls_out_of_turn():
    model = sigmoid_net()
    x, y = batch()
    regularizer = ocnopt.VanishingGradientRegularizer(model)
    loss = nn.functional.cross_entropy(model(x), y)
    with pytest.raises(ocnopt.RecordingError, match="backward"):
        regularizer(loss.detach())
    with pytest.raises(ocnopt.RecordingError, match="single number"):
        regularizer(loss.expand(2))
    regularizer(loss)
    with pytest.raises(ocnopt.RecordingError, match="no forward pass"):
        regularizer(loss)
    model(x)
    with pytest.raises(ocnopt.RecordingError, match="last forward pass"):
        regularizer(loss)


class Odd(nn.Module):
    """Networks that are no chain, one way or another."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.way == "twice":
            return self.third(torch.tanh(self.second(torch.tanh(self.second(x)))))
        if self.way == "tied":
            return self.third(torch.tanh(x[:, :3] @ self.third.weight))
        if self.way == "branches":
            return self.third(torch.tanh(x)) + torch.tanh(self.second(x.clone()))[:, :3]
        out = self.third(torch.tanh(self.second(x)))
        if self.way == "overwritten":
            x.add_(1)
        return (out, x) if self.way == "pair" else out


@pytest.mark.parametrize(
    ("way", "error", "words"),
    [
        ("twice", ocnopt.GraphError, "input of layer 'second'.*more than once"),
        ("tied", ocnopt.GraphError, "input of layer 'third'.*more than once"),
        ("branches", ocnopt.GraphError, "no chain"),
        ("pair", ocnopt.RecordingError, "returned a tuple"),
        ("overwritten", ocnopt.RecordingError, "input of layer 'second' was changed in place"),
    ],
)
def test_networks_that_are_no_chain(way, error, words):
    model = Odd(way)
    x, y = batch()
    regularizer = ocnopt.VanishingGradientRegularizer(model)
    with pytest.raises(error, match=words):
        regularizer(nn.functional.cross_entropy(model(x), y))


def test_a_weight_shared_with_the_embedding_is_noticed():
    """The embedding is no layer with a hook; its table is found in the graph."""
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 6))
    model[3].weight = model[0].weight
    regularizer = ocnopt.VanishingGradientRegularizer(model)
    y = torch.arange(5)
    with pytest.raises(ocnopt.GraphError, match=r"'3'.*more than once"):
        regularizer(nn.functional.cross_entropy(model(y), y))


def test_samples_come_first():
    model = sigmoid_net()
    regularizer = ocnopt.VanishingGradientRegularizer(model)
    with pytest.raises(ocnopt.GraphError, match="first dimension"):
        regularizer(model(torch.randn(4)).sum())
    with pytest.raises(ocnopt.GraphError, match=r"input of layer '2' \(0, 6\)"):
        regularizer(model(torch.randn(0, 4)).sum())

    class Inside(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum()

    inside = Inside(*model)
    regularizer = ocnopt.VanishingGradientRegularizer(inside)
    with pytest.raises(ocnopt.GraphError, match="outside the model"):
        regularizer(inside(torch.randn(3, 4)))


def test_data_has_no_term():
    """Not even where the loop differentiates in it."""
    model = sigmoid_net()
    x, y = batch()
    value, _ = penalty(model, lambda: nn.functional.cross_entropy(model(x), y))
    x.requires_grad_()
    same, _ = penalty(model, lambda: nn.functional.cross_entropy(model(x), y))
    assert same == value


def test_docstring():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    assert doctest.testmod(vanishing).failed == 0
    torch.set_default_dtype(before)
