"""DGNOpt against brute force: dense joint matrices, dense solves, one loop over stages.

The oracle knows a network as a list of stages, each a list of players with what went into and came
back to them; everything else is dense algebra on vec([W | b]), columns stacked.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from games import NETS
from torch import nn

import ocnopt

LR, DAMPING = 0.3, 0.2


def batch(samples=5):
    make = torch.Generator().manual_seed(7)
    x = torch.randn(samples, 4, generator=make, dtype=torch.float64)
    return x, torch.randint(3, (samples,), generator=make)


def watched(model, x, y):
    """Rows ``[a; 1]`` (B, L, in) and columns (B, L, out) of every layer, and the loss."""
    kept, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):

            def keep(module, args, out, name=name):
                out.retain_grad()
                kept[name] = (module, args[0].detach(), out)

            handles.append(module.register_forward_hook(keep))
    F.cross_entropy(model(x), y, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    found = {}
    for name, (module, a, out) in kept.items():
        if isinstance(module, nn.Conv2d):
            rows = F.unfold(a, module.kernel_size, module.dilation, module.padding, module.stride)
            rows, cols = rows.mT, out.grad.flatten(2).mT
        else:
            rows, cols = a.reshape(len(x), -1, a.shape[-1]), out.grad
            cols = cols.reshape(len(x), -1, cols.shape[-1])
        if module.bias is not None:
            rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
        found[name] = (rows, cols)
    return found


def levels(a, b):
    pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()
    return pi * DAMPING**0.5, DAMPING**0.5 / pi


class Oracle:
    def __init__(self, model, x, y, kind, joint):
        self.samples = len(x)
        self.seen = watched(copy.deepcopy(model), x, y)
        self.gradients = {
            name: torch.einsum("blo,bli->bio", cols, rows).flatten(1)
            for name, (rows, cols) in self.seen.items()
        }
        self.kind, self.joint = kind, joint

    def factors(self, n, m):
        (rows, cols), (other_rows, other_cols) = self.seen[n], self.seen[m]
        count = rows.shape[0] * rows.shape[1]
        a = torch.einsum("bli,blj->ij", rows, other_rows) / count
        return a, torch.einsum("bli,blj->ij", cols, other_cols) / self.samples

    def own(self, n):
        """``W`` with ``M = W^T W``, and roots of the damped factors in its coordinates."""
        a, b = self.factors(n, n)
        level_a, level_b = levels(a, b)
        u_a, u_b = torch.linalg.eigh(a)[1], torch.linalg.eigh(b)[1]
        s_a, s_b = torch.linalg.eigh(a)[0].clamp(0), torch.linalg.eigh(b)[0].clamp(0)
        turn = torch.kron(u_a, u_b).T
        if self.kind == "kfac":
            scale = torch.kron(s_a + level_a, s_b + level_b)
        else:
            mean = turn @ self.gradients[n].mean(0)
            scale = 0.75 * torch.kron(s_a, s_b) + 0.25 * self.samples * mean**2 + DAMPING
        root_a, root_b = u_a / (s_a + level_a).sqrt(), u_b / (s_b + level_b).sqrt()
        return scale.sqrt()[:, None] * turn, root_a, root_b

    def matrix(self, stage):
        """``P`` of a stage's players."""
        owns = {n: self.own(n) for n in stage}
        rows = []
        for n in stage:
            row = []
            for m in stage:
                w_n, a_n, b_n = owns[n]
                w_m, a_m, b_m = owns[m]
                if n == m:
                    row.append(w_n.T @ w_m)
                elif not self.joint:
                    row.append(torch.zeros(len(w_n), len(w_m), dtype=w_n.dtype))
                else:
                    a, b = self.factors(n, m)
                    row.append(w_n.T @ torch.kron(a_n.T @ a @ a_m, b_n.T @ b @ b_m) @ w_m)
            rows.append(torch.cat(row, 1))
        return torch.cat(rows)

    def step(self, stages, rule="share", fictitious=None):
        """Every player's change, with the outer-product terminal ``v_T = K_T = 1``."""
        one = torch.ones(self.samples, dtype=torch.float64)
        values, v, k, grown = [], one, one, one
        inverses = [torch.linalg.inv(self.matrix(stage)) for stage in stages]
        stacked = [torch.cat([self.gradients[n] for n in stage], 1) for stage in stages]
        for stage, inverse, j in list(zip(stages, inverses, stacked, strict=True))[::-1]:
            if fictitious is not None:
                kind, penalty = fictitious
                squares = sum(self.seen[n][1].square().sum((1, 2)) for n in stage)
                z = k * squares / penalty
                most = 2 / grown  # all stages together at most double a sample
                grow = torch.where(z < 1 - 1 / most, 1 / (1 - z), most)
                if kind == "cooperative":
                    grow = 1 / (1 + z)
                v, k, grown = v * grow, k * grow, grown * grow
            values.append((v, k))
            s = LR * torch.einsum("bi,ij,bj->b", j, inverse, j)
            shrink = 1 + k * s / (self.samples if rule == "share" else 1)
            v, k = v / shrink, k / shrink
        rho = torch.zeros(self.samples, dtype=torch.float64)
        changes = {}
        for stage, inverse, j, (v, k) in zip(stages, inverses, stacked, values[::-1], strict=True):
            delta = -LR * inverse @ (j * (v + k * rho)[:, None]).mean(0)
            rho = rho + j @ delta
            sizes = [self.gradients[n].shape[1] for n in stage]
            changes.update(zip(stage, delta.split(sizes), strict=True))
        return changes


def moved(net, options, x, y):
    model = net.double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DGNOpt(
        model, criterion, lr=LR, terminal="outer-product", feedback_clip=None, **options
    )
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    changes = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            parts = [(module.weight - before[f"{name}.weight"]).flatten(1)]
            if module.bias is not None:
                parts.append((module.bias - before[f"{name}.bias"])[:, None])
            changes[name] = torch.cat(parts, 1).T.flatten().detach()
    return changes, optimizer


def rule(kind):
    kinds = {"kfac": ocnopt.curvature.KFAC, "ekfac": ocnopt.curvature.EKFAC}
    return kinds[kind](damping=DAMPING, gram_tolerance=0)


def build(name):
    torch.manual_seed(3)
    return NETS[name]()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("information", ["feedback", "group-rational"])
@pytest.mark.parametrize("alignment", ["early", "late"])
@pytest.mark.parametrize("bellman", ["share", "sample"])
def test_a_step_equals_brute_force(name, kind, information, alignment, bellman):
    x, y = batch()
    net = build(name)
    oracle = Oracle(net.double(), x, y, kind, information == "group-rational")
    stages = net.late if alignment == "late" else net.stages
    if name == "Convolutional" and alignment == "early":
        assert oracle.seen["one"][0].shape[1] == oracle.seen["skip"][0].shape[1]
    expected = oracle.step(stages, bellman)
    options = {"information": information, "alignment": alignment, "bellman": bellman}
    changes, _ = moved(net, {**options, "preconditioner": rule(kind)}, x, y)
    for layer, change in expected.items():
        scale = float(change.abs().max())
        torch.testing.assert_close(changes[layer], change, rtol=0, atol=1e-8 * scale, msg=layer)


@pytest.mark.parametrize("name", NETS)
def test_the_information_matters_in_these_networks(name):
    x, y = batch()
    options = [
        {"information": "feedback", "alignment": "early"},
        {"information": "group-rational", "alignment": "early"},
        {"information": "open-loop"},
    ]
    if NETS[name].late != NETS[name].stages:
        options.append({"information": "group-rational", "alignment": "late"})
    steps = [moved(build(name), {**o, "preconditioner": rule("kfac")}, x, y)[0] for o in options]
    for one, other in itertools.combinations(steps, 2):
        distance = max(float((one[k] - other[k]).abs().max()) for k in one)
        assert distance > 1e-3 * max(float(v.abs().max()) for v in one.values())


@pytest.mark.parametrize("penalty", [3.0, 0.3, 0.01])
@pytest.mark.parametrize("kind", ["cooperative", "adversarial"])
@pytest.mark.parametrize("name", ["Residual", "Convolutional"])
def test_a_fictitious_player_equals_brute_force(name, kind, penalty):
    x, y = batch()
    net = build(name)
    oracle = Oracle(net.double(), x, y, "kfac", True)
    expected = oracle.step(net.stages, fictitious=(kind, penalty))
    without = oracle.step(net.stages)
    options = {"alignment": "early", "fictitious": kind, "penalty": penalty}
    changes, _ = moved(net, {**options, "preconditioner": rule("kfac")}, x, y)
    for layer, change in expected.items():
        scale = float(change.abs().max())
        torch.testing.assert_close(changes[layer], change, rtol=0, atol=1e-8 * scale, msg=layer)
        assert float((without[layer] - change).abs().max()) > 1e-3 * scale


@pytest.mark.parametrize("kind", ["cooperative", "adversarial"])
def test_row_35_a_fictitious_player_that_pays_much_changes_nothing(kind):
    x, y = batch()
    plain, _ = moved(build("Residual"), {"preconditioner": rule("kfac")}, x, y)
    options = {"preconditioner": rule("kfac"), "fictitious": kind, "penalty": 1e15}
    robust, _ = moved(build("Residual"), options, x, y)
    for layer, change in plain.items():
        torch.testing.assert_close(robust[layer], change, rtol=1e-10, atol=1e-12)
