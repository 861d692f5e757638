"""KFAC and EKFAC: three ways to the same step, one of them with explicit Kronecker products."""

import copy

import pytest
import torch
import torch.nn.functional as F
from promises.conformance import assert_weights_close, build, run
from torch import nn

import ocnopt

KINDS = {
    "kfac": (ocnopt.KFAC, ocnopt.curvature.KFAC),
    "ekfac": (ocnopt.EKFAC, ocnopt.curvature.EKFAC),
}


@pytest.mark.parametrize("kind", ["mlp", "cnn", "resnet"])
@pytest.mark.parametrize("name", KINDS)
def test_optimizer_equals_ddpnopt_without_feedback(name, kind):
    optimizer_class, rule_class = KINDS[name]
    options = {"damping": 0.05, "decay": 0.7, "update_every": 3}
    common = {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.01}
    mine, make = build(kind)
    theirs = copy.deepcopy(mine)
    criterion = nn.CrossEntropyLoss()
    run(mine, optimizer_class(mine, criterion, **common, **options), 8, criterion, make=make)
    other = ocnopt.DDPNOpt(
        theirs,
        criterion,
        preconditioner=rule_class(**options),
        bellman="off",
        rollout="off",
        **common,
    )
    run(theirs, other, 8, criterion, make=make)
    assert_weights_close(mine, theirs, 1e-13)


class Net(nn.Module):
    """A convolution, a grouped one without bias, and two linear layers, one without bias."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=1)
        self.grouped = nn.Conv2d(4, 4, (2, 3), padding=(0, 1), groups=2, bias=False)
        self.middle = nn.Linear(4, 5, bias=False)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        self.seen = {}
        for name in ("conv", "grouped"):
            self.seen[name] = [x]
            x = getattr(self, name)(x)
            self.seen[name].append(x)
            x = torch.tanh(x)
        x = x.mean((2, 3))
        for name in ("middle", "last"):
            self.seen[name] = [x]
            x = getattr(self, name)(x)
            self.seen[name].append(x)
            x = x if name == "last" else torch.tanh(x)
        return x


def rows_and_cols(module, x, g):
    """Per group: inputs [a; 1] and output gradients, one row per sample and location."""
    groups = getattr(module, "groups", 1)
    if isinstance(module, nn.Conv2d):
        patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
        cols = g.flatten(2).transpose(1, 2).reshape(-1, g.shape[1])
    else:
        rows, cols = x, g
    out = []
    for a, b in zip(rows.chunk(groups, 1), cols.chunk(groups, 1), strict=True):
        if module.bias is not None:
            a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
        out.append((a, b))
    return out


class Dense:
    """The formulas on the full curvature matrix of every layer, vec() stacking columns."""

    def __init__(self, model, name, lr, damping, decay, update_every, eigen_decay):
        self.model, self.name, self.lr = model, name, lr
        self.damping, self.decay, self.every = damping, decay, update_every
        self.eigen_decay = eigen_decay
        self.count = 0
        self.factors, self.kept = {}, {}

    def step(self, x, y):
        loss = F.cross_entropy(self.model(x), y)
        seen = self.model.seen
        signals = torch.autograd.grad(
            loss, [h for _, h in seen.values()] + list(self.model.parameters())
        )
        grads = dict(
            zip((n for n, _ in self.model.named_parameters()), signals[len(seen) :], strict=True)
        )
        samples = len(x)
        with torch.no_grad():
            for (layer, (a, _)), g in zip(seen.items(), signals[: len(seen)], strict=True):
                module = getattr(self.model, layer)
                pairs = rows_and_cols(module, a, g * samples)
                self._move(layer, module, pairs, grads, samples)
        self.count += 1

    def _move(self, layer, module, pairs, grads, samples):
        n = len(pairs)
        weight = grads[f"{layer}.weight"]
        parts = []
        for i, (a, b) in enumerate(pairs):
            d = weight.chunk(n)[i].flatten(1)
            if module.bias is not None:
                d = torch.cat([d, grads[f"{layer}.bias"].chunk(n)[i][:, None]], 1)
            key = (layer, i)
            if self.count % self.every == 0:
                new = (a.t() @ a / len(a), b.t() @ b / samples)
                old = self.factors.get(key, new)
                self.factors[key] = tuple(
                    self.decay * o + (1 - self.decay) * m for o, m in zip(old, new, strict=True)
                )
                self._refresh(key)
            vec = d.t().flatten()
            solved = getattr(self, f"_{self.name}")(key, vec, samples)
            parts.append(solved.view(d.shape[1], d.shape[0]).t())
        for i, part in enumerate(parts):
            if module.bias is not None:
                module.bias.chunk(n)[i].sub_(self.lr * part[:, -1])
                part = part[:, :-1]
            chunk = module.weight.chunk(n)[i]
            chunk.sub_(self.lr * part.reshape(chunk.shape))

    def _refresh(self, key):
        a, b = self.factors[key]
        if self.name == "kfac":
            pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()
            root = self.damping**0.5
            self.kept[key] = torch.kron(
                a + pi * root * torch.eye(len(a)).to(a), b + root / pi * torch.eye(len(b)).to(b)
            )
        else:
            (la, ua), (lb, ub) = torch.linalg.eigh(a), torch.linalg.eigh(b)
            spectrum = torch.kron(la.clamp_min(0), lb.clamp_min(0))
            self.kept[key] = [torch.kron(ua, ub), spectrum]

    def _kfac(self, key, vec, samples):
        return torch.linalg.solve(self.kept[key], vec)

    def _ekfac(self, key, vec, samples):
        basis, m2 = self.kept[key]
        turned = basis.t() @ vec
        m2 = self.eigen_decay * m2 + (1 - self.eigen_decay) * samples * turned**2
        self.kept[key][1] = m2
        return basis @ (turned / (m2 + self.damping))


@pytest.mark.parametrize("decay,update_every", [(0.0, 1), (0.6, 1), (0.8, 3)])
@pytest.mark.parametrize("name", KINDS)
def test_equals_dense_kronecker_algebra(name, decay, update_every):
    torch.manual_seed(0)
    mine = Net().double()
    theirs = copy.deepcopy(mine)
    criterion = nn.CrossEntropyLoss()
    options = {"damping": 0.03, "decay": decay, "update_every": update_every}
    if name == "ekfac":
        options["eigen_decay"] = 0.7
    optimizer = KINDS[name][0](mine, criterion, lr=0.05, **options)
    dense = Dense(theirs, name, 0.05, 0.03, decay, update_every, 0.7)
    g = torch.Generator().manual_seed(3)
    for _ in range(7):
        x = torch.randn(16, 2, 7, 7, generator=g, dtype=torch.float64)
        y = torch.randint(3, (16,), generator=g)
        optimizer.zero_grad()
        criterion(mine(x), y).backward()
        optimizer.step()
        dense.step(x, y)
    assert_weights_close(mine, theirs, 1e-9)


def test_ekfac_without_correction_is_kfac_in_the_eigenbasis():
    """With the eigenvalues left alone, M is A (x) B + damping."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    x = torch.randn(20, 4, dtype=torch.float64)
    y = torch.randint(3, (20,))
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.EKFAC(model, criterion, lr=1.0, damping=0.1, eigen_decay=1.0)
    before = model[0].weight.detach().clone()
    out = model(x)
    (g,) = torch.autograd.grad(criterion(out, y), out)
    g = g * 20
    a, b = x.t() @ x / 20, g.t() @ g / 20
    criterion(model(x), y).backward()
    grad = model[0].weight.grad.clone()
    optimizer.step()
    m = torch.kron(a, b) + 0.1 * torch.eye(12, dtype=torch.float64)
    expected = torch.linalg.solve(m, grad.t().flatten()).view(4, 3).t()
    torch.testing.assert_close(before - model[0].weight, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_layers_without_kronecker_structure_take_a_gradient_step(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    criterion = nn.CrossEntropyLoss()
    optimizer = KINDS[name][0](model, criterion, lr=0.05)
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))
    before = model[1].weight.detach().clone()
    criterion(model(x), y).backward()
    grad = model[1].weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), before - 0.05 * grad)
