"""optimizer.policy == the dense oracle's Q's, gains and values of every player."""

from __future__ import annotations

import copy
import functools

import cases
import comparison
import pytest
import torch
from oracles import player_of
from torch import nn

import ocnopt
from ocnopt.errors import GraphError, OptionError, RecordingError

fc_case = functools.cache(cases.fc_chain)
conv_case = functools.cache(cases.conv_chain)
CASES = {"fc": fc_case, "conv": conv_case}


def close(actual: torch.Tensor, expected: list[torch.Tensor], where: str) -> None:
    expected = torch.stack(expected)
    error = float((actual.reshape(expected.shape) - expected).abs().max())
    assert error <= 1e-9 * float(expected.abs().max()), f"{where}: off by {error:.1e}"


def policies(case, options, **others):
    model, criterion = copy.deepcopy(case.model), copy.deepcopy(case.criterion)
    optimizer = comparison.optimizer_for(model, criterion, options, keep_policy=True, **others)
    comparison.train_step(optimizer, model, criterion, case.x, case.y)
    return optimizer.policy


@pytest.mark.parametrize("preconditioner", ["identity", "rmsprop", "kfac", "ekfac"])
@pytest.mark.parametrize("bellman", ["share", "joint", "off"])
@pytest.mark.parametrize(
    ("terminal", "others"),
    [
        ("outer-product", {}),
        ("matched", {}),
        ("gauss-newton", {}),
        ("full", {}),
        ("full", {"value_reg": 0.05}),
        ("full", {"dynamics_order": 2}),
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_policy(name, terminal, others, bellman, preconditioner):
    case = CASES[name]()
    options = cases.options_for(preconditioner, terminal=terminal, bellman=bellman, **others)
    expected = case.chain_step(options).stages
    seen = policies(case, options, **others)
    records = [r for r, s in zip(expected, case.stages, strict=True) if player_of(s) is not None]
    assert len(seen) == len(records)
    for policy, record in zip(seen.values(), records, strict=True):
        gain = -options.lr * torch.linalg.inv(record.M)
        close(policy.Q_u, record.Q_u, "Q_u")
        close(policy.Q_ux.materialize(), record.Q_ux, "Q_ux")
        close(policy.k, [gain @ q for q in record.Q_u], "k")
        close(policy.K.materialize(), [gain @ q for q in record.Q_ux], "K")
        close(policy.V_x, record.V_x, "V_x")
        close(policy.V_xx.materialize(), record.V_xx, "V_xx")
        mean = sum(gain @ q for q in record.Q_ux) / len(record.Q_ux)
        close(policy.K.mean().unsqueeze(0), [mean], "mean K")
        dx = torch.randn(len(case.x), policy.K.shape[2], dtype=torch.float64)
        products = [gain @ q @ d for q, d in zip(record.Q_ux, dx, strict=True)]
        close(policy.K.apply(dx), products, "K dx")
        named = policy.as_dict(policy.k)
        assert {n: t.shape[1:] for n, t in named.items()} == {
            n: dict(case.model.get_submodule(policy.name).named_parameters())[n].shape
            for n in policy.parameters
        }


def test_the_policy_is_of_the_weights_before_the_step():
    """Accumulated halves give the same policy, sample by sample, as the whole batch."""
    case = fc_case()
    options = cases.options_for("identity", terminal="gauss-newton")
    whole = policies(case, options)
    model, criterion = copy.deepcopy(case.model), copy.deepcopy(case.criterion)
    optimizer = comparison.optimizer_for(model, criterion, options, keep_policy=True)
    for part in (slice(0, 1), slice(1, 3)):
        x, y = case.x[part], case.y[part]
        (criterion(model(x), y) * (len(x) / len(case.x))).backward()
    optimizer.step()
    for name in whole:
        a, b = whole[name], optimizer.policy[name]
        torch.testing.assert_close(a.Q_u, b.Q_u, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(a.V_x, b.V_x, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(a.K.materialize(), b.K.materialize(), rtol=1e-9, atol=1e-12)


def test_leading_singular_vector_of_a_rank_one_policy_is_the_gradient():
    """Methods row 19: K's leading right-singular vector is parallel to J_x."""
    case = fc_case()
    seen = policies(case, cases.options_for("identity", terminal="matched"))
    x = case.x.clone().requires_grad_()
    (j_x,) = torch.autograd.grad(case.criterion(case.model(x), case.y), x)
    first = next(iter(seen.values()))
    for matrix, gradient in zip(first.K.materialize(), j_x, strict=True):
        _, _, right = torch.linalg.svd(matrix)
        cosine = float((right[0] @ gradient).abs() / gradient.norm())
        assert cosine == pytest.approx(1, abs=1e-12)


def test_what_has_no_policy_says_so():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))
    criterion = nn.CrossEntropyLoss()
    x, y = torch.randint(5, (6, 2)), torch.randint(3, (6,))
    plain = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    with pytest.raises(OptionError, match="keep_policy=True"):
        _ = plain.policy
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, keep_policy=True)
    with pytest.raises(RecordingError, match="before the first step"):
        _ = optimizer.policy
    criterion(model(x), y).backward()
    optimizer.step()
    assert optimizer.policy["2"].V_x.shape == (6, 8)
    assert optimizer.policy["0"].Q_u.shape == (6, 20)
    with pytest.raises(GraphError, match=r"layer '0' is not differentiable"):
        _ = optimizer.policy["0"].V_x
    with pytest.raises(OptionError, match="no policy"):
        ocnopt.DDPNOpt(model, criterion, lr=0.1, bellman="off", rollout="off", keep_policy=True)
