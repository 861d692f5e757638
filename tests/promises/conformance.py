"""What every optimizer is tested with: the list of optimizers, small models, small loops."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import ocnopt

PRECONDITIONERS = ("identity", "rmsprop", "adam", "kfac", "ekfac")

#: Learning rates at which a few steps on the models below are tame and the feedback is visible.
RATES = {"identity": 0.1, "rmsprop": 0.01, "adam": 0.01, "kfac": 0.02, "ekfac": 0.02}


def rule(name, **options):
    """A preconditioner that is refreshed often enough for short tests."""
    if name in ("kfac", "ekfac"):
        options = {"update_every": 2, "damping": 0.1, **options}
        return {"kfac": ocnopt.curvature.KFAC, "ekfac": ocnopt.curvature.EKFAC}[name](**options)
    # A large eps keeps the first steps from dividing rounding noise by itself.
    if name == "rmsprop":
        return ocnopt.curvature.RMSprop(**{"eps": 1e-3, **options})
    if name == "adam":
        return ocnopt.curvature.Adam(**{"eps": 1e-3, **options})
    return ocnopt.curvature.Identity()


def ddpnopt(model, criterion, name, **options):
    options = {"lr": RATES[name], "preconditioner": rule(name), **options}
    return ocnopt.DDPNOpt(model, criterion, **options)


def _kfac(model, criterion, **options):
    return ocnopt.KFAC(
        model, criterion, **{"lr": 0.02, "damping": 0.1, "update_every": 2, **options}
    )


def _ekfac(model, criterion, **options):
    return ocnopt.EKFAC(
        model, criterion, **{"lr": 0.02, "damping": 0.1, "update_every": 2, **options}
    )


def _dgnopt(model, criterion, **options):
    options = {"lr": RATES["kfac"], "preconditioner": rule("kfac"), **options}
    return ocnopt.DGNOpt(model, criterion, **options)


def _ocnopt(model, criterion, **options):
    options = {"lr": RATES["ekfac"], "preconditioner": rule("ekfac"), **options}
    return ocnopt.OCNOpt(model, criterion, **options)


def _ddpnopt_with(name):
    def build(model, criterion, **options):
        return ddpnopt(model, criterion, name, **options)

    return build


#: Every optimizer of the ordinary loop: name -> build(model, criterion, **options).
OPTIMIZERS = {
    **{f"DDPNOpt-{name}": _ddpnopt_with(name) for name in PRECONDITIONERS},
    "DGNOpt": _dgnopt,
    "OCNOpt": _ocnopt,
    "KFAC": _kfac,
    "EKFAC": _ekfac,
}


def mlp(dtype=torch.float64, seed=0, width=7):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 3)
    ).to(dtype)


def batch(size=12, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 5, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (size,), generator=g)


def images(size=8, dtype=torch.float64, seed=1, channels=2, side=8):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, channels, side, side, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (size,), generator=g)


class CNN(nn.Module):
    """Stride, padding and groups."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.second(x))
        return self.last(x.mean((2, 3)))


class ResNet(nn.Module):
    """Two residual blocks with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, stride=2)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + F.relu(norm(conv(x)))
        return self.last(x.mean((2, 3)))


def build(kind, dtype=torch.float64, seed=0):
    """A model and the function that makes its batches."""
    torch.manual_seed(seed)
    if kind == "mlp":
        return mlp(dtype, seed), batch
    return {"cnn": CNN, "resnet": ResNet}[kind]().to(dtype), images


def step(model, optimizer, criterion, x, y):
    """One turn of the ordinary loop; returns the loss."""
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def run(model, optimizer, steps, criterion=None, dtype=torch.float64, make=batch, start=0):
    """Several steps, each with a batch of its own."""
    criterion = criterion if criterion is not None else nn.CrossEntropyLoss()
    losses = []
    for i in range(start, start + steps):
        x, y = make(dtype=dtype, seed=100 + i)
        losses.append(float(step(model, optimizer, criterion, x, y)))
    return losses


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def assert_weights_close(left, right, tolerance):
    """Largest difference of any tensor relative to that tensor's largest entry."""
    left = left if isinstance(left, dict) else weights(left)
    right = right if isinstance(right, dict) else weights(right)
    assert left.keys() == right.keys()
    for name, a in left.items():
        if a.is_floating_point():
            size = max(float(right[name].abs().max()), 1e-30)
            error = float((a - right[name]).abs().max()) / size
            assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.0e}"
        else:
            assert torch.equal(a, right[name]), name


def assert_updates_close(before, left, right, tolerance):
    """As above for what the weights changed by, which is the sharper comparison."""
    left = left if isinstance(left, dict) else weights(left)
    right = right if isinstance(right, dict) else weights(right)
    for name, start in before.items():
        if not start.is_floating_point():
            continue
        a, b = left[name] - start, right[name] - start
        size = float(b.abs().max())
        assert size > 0, f"{name} did not move"
        error = float((a - b).abs().max()) / size
        assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.0e}"


def assert_weights_equal(left, right):
    """Bit for bit."""
    left = left if isinstance(left, dict) else weights(left)
    right = right if isinstance(right, dict) else weights(right)
    assert left.keys() == right.keys()
    for name, a in left.items():
        assert torch.equal(a, right[name]), name


def assert_feedback_active(optimizer, least=1e-4):
    """The configuration under test does differ from the lender's."""
    share = optimizer.diagnostics.total.feedback_share
    assert share > least, f"feedback share {share:.1e}: the test would prove nothing"


def flat_state(optimizer):
    """All of an optimizer's state, copied, in a comparable form."""
    return copy.deepcopy(optimizer.state_dict())


def assert_state_equal(left, right):
    """Bit for bit, on state_dict()s."""
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for key, mine in left["state"].items():
        other = right["state"][key]
        assert mine.keys() == other.keys(), key
        for name, value in mine.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == other[name].dtype, (key, name)
                assert torch.equal(value, other[name]), (key, name)
            else:
                assert value == other[name], (key, name)
