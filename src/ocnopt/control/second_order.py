"""The second derivatives of an affine layer: ``Q_ux = g_u^T V_hh g_x + V_h . g_ux`` (Eq. 26).

``(V_h . g_ux) dx`` is the weight gradient of V_h at the input dx, without the bias: with it the
policy answers the *new* input, ``V_h [x + dx; 1]^T``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ocnopt.control.chain import Link
from ocnopt.control.dense import DenseTrace
from ocnopt.control.symmetric import absolute
from ocnopt.control.transport import Transport, unit_columns
from ocnopt.curvature.metric import Metric
from ocnopt.layers.base import Params

__all__ = ["inputs_of", "mixed", "pull_back", "ratio", "shift"]


def inputs_of(link: Link, trace: DenseTrace, dx: Tensor) -> Tensor:
    """A change of the input, (B, n), in the form in which it multiplies the weight."""
    shaped = dx.reshape(link.x.shape).to(link.x.dtype)
    return trace.layer.features((shaped,), trace.a.dtype)


def shift(trace: DenseTrace, inputs: Tensor, signals: Tensor) -> Params:
    """``sum_i (V_h . g_ux) dx`` for changes of the input and signals V_h (B, n)."""
    return _without_bias(trace, trace.layer.gradient(inputs, trace.shape(signals)))


def mixed(link: Link, trace: DenseTrace, v: Tensor) -> Params:
    """``V_h . g_ux``, the shift of every unit input: (B, n, *parameter) each."""
    samples, fold = trace.samples, trace.fold
    n = link.x.numel() // samples
    units = unit_columns(link.x, n, samples).to(trace.a.dtype)
    rows = units.shape[1]
    a = trace.layer.features((units.reshape(n * rows, *link.x.shape[1:]),), trace.a.dtype)
    signal = trace.shape(v)
    signals = signal.expand(n, *signal.shape).reshape(n * rows, *signal.shape[1:])
    found = _without_bias(trace, trace.layer.sample_gradients(a, signals))
    return tuple(p.reshape(n, samples, fold, *p.shape[1:]).sum(2).transpose(0, 1) for p in found)


def pull_back(
    rule: str,
    trace: DenseTrace,
    metric: Metric,
    g: Transport,
    v: Tensor,
    k: Tensor,
    mixed: Params,
    share: Tensor | float,
    step: Params | None,
) -> tuple[Tensor, Tensor]:
    """Eq. 5 with ``Q_ux`` as a matrix.

    V_hh is indefinite here. The own curvature in Q_uu is that of ``|V_hh|``, eigenvalue by
    eigenvalue: so Q_uu stays positive, and a negative eigenvalue at most doubles on its way through
    a player, where without any own curvature it would be squared.

    Args:
        rule: The recursion; "joint" where ``step`` is given.
        trace: The player.
        metric: Its preconditioner.
        g: The Jacobian of its layer.
        v: V_h, (B, n_h).
        k: V_hh, (B, n_h, n_h).
        mixed: ``V_h . g_ux``, (B, n, *parameter) each.
        share: The sample's part of the step, a number or (B,).
        step: The batch's open-loop step, for "joint".

    Returns:
        V_x (B, n) and V_xx (B, n, n).
    """
    q_x, q_xx = g.pull(v), g.pull_matrix(k)
    k_gx = g.pull_columns(k).transpose(1, 2)  # (V_hh g_x)^T, (B, n, n_h)
    if step is not None:
        q_x = q_x + (k_gx @ trace.dots(step).unsqueeze(-1)).squeeze(-1)
        for part, d in zip(mixed, step, strict=True):
            q_x = q_x + (part.flatten(2) @ d.reshape(-1)).to(v.dtype)
        return q_x, q_xx
    units = trace.sample_columns()  # g_u^T, (B, n_h, *parameter)
    rows = []
    for unit, part in zip(units, mixed, strict=True):
        flat = unit.flatten(2)
        q_ux = (k_gx.to(flat.dtype) @ flat).view(part.shape) + part
        q_u = (v.unsqueeze(1).to(flat.dtype) @ flat).view(unit.shape[0], 1, *unit.shape[2:])
        rows.append(torch.cat([q_ux, q_u, unit], 1))
    n = q_x.shape[1]
    # Inner products of [Q_ux, Q_u, g_u^T] in the sample's part of (M / eta)^-1.
    products = metric.sample_gram(tuple(rows)).to(v.dtype)
    products = products * (share if isinstance(share, float) else share[:, None, None])
    a, b = products[:, :n, :n], products[:, :n, n]
    if rule != "literal":
        own = absolute(k, f"V_hh at layer {trace.player.name!r}")
        across, rest, s = products[:, :n, n + 1 :], products[:, n, n + 1 :], products[:, n + 1 :]
        s = s[:, :, n + 1 :]
        eye = torch.eye(s.shape[1], dtype=s.dtype, device=s.device)
        w = torch.linalg.solve(eye + own @ s, own)  # Woodbury
        a = a - across @ w @ across.transpose(1, 2)
        b = b - (across @ w @ rest.unsqueeze(-1)).squeeze(-1)
    return q_x - b, q_xx - a


def ratio(trace: DenseTrace, metric: Metric, inputs: Tensor, v: Tensor, raw: Tensor) -> Tensor:
    """``|Q_ux dx| / |Q_u|`` of every sample in the norm of ``Q_uu^-1``, (B,).

    The shift enters the weights of inputs that the batch itself never had, where an adaptive M is
    smallest: a bound on the gradient's side of M would not bound the step.

    Args:
        trace: The player.
        metric: Its preconditioner.
        inputs: The change of its input, as :func:`inputs_of` gives it.
        v: V_h, (B, n_h).
        raw: ``V_hh g_x dx``, (B, n_h).
    """
    layer, fold = trace.layer, trace.fold
    columns = torch.stack([trace.shape(v), trace.shape(raw)])
    q_u = layer.column_gradients(trace.a, columns, fold)  # (B, 2, *parameter)
    shifted = layer.column_gradients(inputs, columns[:1], fold)
    both = tuple(
        torch.cat([part[:, :1], part[:, 1:] + more], 1)
        for part, more in zip(q_u, _without_bias(trace, shifted), strict=True)
    )
    squares = metric.sample_gram(both).to(trace.dtype)
    open_loop, feedback = squares[:, 0, 0], squares[:, 1, 1]
    return torch.where(feedback == 0, feedback, (feedback / open_loop).sqrt())


def _without_bias(trace: DenseTrace, params: Params) -> Params:
    """Parameters with the bias's part set to zero: ``g_ux`` knows the weight alone."""
    if not trace.layer.has_bias:
        return params
    return (*params[:-1], torch.zeros_like(params[-1]))
