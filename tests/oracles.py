"""Brute force for the optimal-control step, in the plainest code to read beside the papers.

Two oracles that share no shortcut with the package, and next to nothing with each other:

* :func:`ddp_step` - a chain of stages, one dense Jacobian per stage and sample, dense matrices for
  ``V_xx``, ``Q_ux`` and ``Q_uu`` (DDPNOpt, ICLR 2021, Alg. 3 with Eq. 12, Eq. 5 and Table 2).
  A graph with branches is a chain whose state holds every tensor alive: see :class:`Part`.
* :func:`graph_step` - any graph, from explicit per-sample gradients of the terminal columns and
  ``torch.func.jvp`` for the change that earlier players have caused (Prop. 3 and its rank-r form).

Conventions. The loss is ``L = (1/B) sum_i phi_i(x_T^(i))``; every per-sample quantity belongs to
``phi_i``, without the ``1/B``. ``u`` of a player is its weight, flattened row by row, followed by
its bias. Everything is meant for float64, widths of 2 to 5 and batches of 2 to 4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp

RowLoss = Callable[[Tensor, int], Tensor]
"""``phi(o, i)``: the cost of sample ``i`` if its output were ``o`` (batch axis included)."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the optimizer is told, by the names of its own options."""

    lr: float
    preconditioner: str = "identity"
    bellman: str = "share"
    rollout: str = "linear"
    terminal: str = "matched"
    feedback_clip: float | None = None
    value_reg: float = 0.0  # eps of V_xx + eps I at every player's input (Alg. 3, line 12)
    dynamics_order: int = 1  # 2: the dynamics' second derivatives are kept (Eq. 26)
    curvature: str = "value"
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay: float = 0.99  # of RMSprop's second moment
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam
    eps: float = 1e-8
    damping: float = 0.05  # of the Kronecker-factored preconditioners
    eigen_decay: float = 0.75  # of EKFAC's second moment in the eigenbasis


# --- the terminal cost ---------------------------------------------------------------------------


def row_losses(
    criterion: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, target: Tensor
) -> RowLoss:
    """phi_i of a criterion that averages: B times the loss as a function of sample i's output.

    The other samples' outputs stay where they are and add a constant; class weights and ignored
    targets are counted as the criterion counts them.
    """
    outputs = outputs.detach()

    def phi(row: Tensor, i: int) -> Tensor:
        return len(outputs) * criterion(torch.cat([outputs[:i], row, outputs[i + 1 :]]), target)

    return phi


def terminal_derivatives(phi: RowLoss, output: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """Gradient (n) and dense Hessian (n, n) of phi_i at `output` (1, ...), flattened."""

    def flat(o: Tensor) -> Tensor:
        return phi(o.reshape(output.shape), i)

    point = output.detach().reshape(-1)
    gradient = torch.autograd.functional.jacobian(flat, point)
    hessian = torch.autograd.functional.hessian(flat, point)
    return gradient, hessian


def matched_curvature(gradient: Tensor, hessian: Tensor) -> Tensor:
    """kappa of the `matched` terminal: phi_i's curvature along its gradient, over |phi_x|^4."""
    norm = gradient.norm()
    return gradient @ hessian @ gradient / norm**4 if norm > 0 else torch.zeros_like(norm)


def positive_part(matrix: Tensor) -> Tensor:
    """The symmetric part with its negative eigenvalues set to zero."""
    eigenvalues, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return vectors @ torch.diag(eigenvalues.clamp_min(0)) @ vectors.T


def absolute_value(matrix: Tensor) -> Tensor:
    """The symmetric part with the absolute values of its eigenvalues."""
    return positive_part(matrix) + positive_part(-matrix)


def terminal_value(kind: str, gradient: Tensor, hessian: Tensor) -> Tensor:
    """V_xx at the last stage."""
    if kind == "outer-product":
        return torch.outer(gradient, gradient)
    if kind == "matched":
        return matched_curvature(gradient, hessian) * torch.outer(gradient, gradient)
    if kind == "gauss-newton":
        return hessian
    if kind == "full":
        return positive_part(hessian)
    raise ValueError(kind)


# --- stages --------------------------------------------------------------------------------------


class Part(nn.Module):
    """A stage of a graph: `module` acts on entries [start, stop) of a flat state, others pass."""

    def __init__(self, module: nn.Module, start: int, stop: int) -> None:
        super().__init__()
        self.module, self.start, self.stop = module, start, stop

    def forward(self, state: Tensor) -> Tensor:
        new = self.module(state[:, self.start : self.stop])
        return torch.cat([state[:, : self.start], new, state[:, self.stop :]], dim=1)


class Plain(nn.Module):
    """A stage without parameters, from a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, state: Tensor) -> Tensor:
        return self.function(state)


def player_of(stage: nn.Module) -> nn.Module | None:
    """The module whose parameters the stage applies, None where it has none."""
    module = stage.module if isinstance(stage, Part) else stage
    return module if controls(module) else None


def controls(module: nn.Module) -> dict[str, nn.Parameter]:
    """What of a player is trained, by name; frozen parameters belong to the dynamics."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def parameter_vector(module: nn.Module) -> Tensor:
    """u: all trained parameters of a player behind each other."""
    return torch.cat([p.detach().reshape(-1) for p in controls(module).values()])


def split_vector(module: nn.Module, u: Tensor) -> dict[str, Tensor]:
    """The inverse of :func:`parameter_vector`, by name."""
    named = controls(module)
    pieces = u.split([p.numel() for p in named.values()])
    return {
        name: piece.reshape(p.shape) for (name, p), piece in zip(named.items(), pieces, strict=True)
    }


def run_stage(stage: nn.Module, state: Tensor, u: Tensor | None) -> Tensor:
    """The stage's output where its player's parameters are `u`."""
    player = player_of(stage)
    if player is None or u is None:
        return stage(state)
    prefix = "module." if isinstance(stage, Part) else ""
    return functional_call(
        stage, {prefix + k: v for k, v in split_vector(player, u).items()}, (state,)
    )


@dataclasses.dataclass
class Linearised:
    """One stage at one sample: f(x, u) with dense f_x (n', n), f_u (n', m) at the nominal point."""

    state: Tensor
    output: Tensor
    f_x: Tensor
    f_u: Tensor | None


def linearise(stages: Sequence[nn.Module], x: Tensor) -> list[list[Linearised]]:
    """Per stage, per sample. Each sample walks through the chain alone."""
    table: list[list[Linearised]] = [[] for _ in stages]
    for i in range(len(x)):
        state = x[i : i + 1]
        for k, stage in enumerate(stages):
            player = player_of(stage)
            u = None if player is None else parameter_vector(player)
            output = run_stage(stage, state, u).detach()
            n = state.numel()

            def of_state(s: Tensor, stage=stage, state=state, u=u) -> Tensor:
                return run_stage(stage, s.reshape(state.shape), u).reshape(-1)

            def of_control(v: Tensor, stage=stage, state=state) -> Tensor:
                return run_stage(stage, state, v).reshape(-1)

            f_x = jacrev(of_state)(state.reshape(-1)).detach().reshape(-1, n)
            f_u = None if u is None else jacrev(of_control)(u).detach()
            table[k].append(Linearised(state, output, f_x, f_u))
            state = output
    return table


def second_derivatives(
    stage: nn.Module, state: Tensor, V_x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """V_x . f_xx (n, n) and V_x . f_ux (m, n) of one sample: the Hessian of V_x^T f(x, u)."""
    player, n = player_of(stage), state.numel()
    point = state.reshape(-1)
    if player is not None:
        point = torch.cat([point, parameter_vector(player)])

    def weighted(p: Tensor) -> Tensor:
        u = None if player is None else p[n:]
        return V_x @ run_stage(stage, p[:n].reshape(state.shape), u).reshape(-1)

    hessian = torch.autograd.functional.hessian(weighted, point)
    return hessian[:n, :n], None if player is None else hessian[n:, :n]


# --- M -------------------------------------------------------------------------------------------


def input_rows(module: nn.Module, value: Tensor) -> Tensor:
    """a = [x; 1] of one sample, a row per location: positions of a Linear, patches of a Conv2d."""
    if isinstance(module, nn.Conv2d):
        patches = F.unfold(
            value, module.kernel_size, module.dilation, module.padding, module.stride
        )
        rows = patches[0].T
    else:
        rows = value.reshape(-1, value.shape[-1])
    return (
        rows if module.bias is None else torch.cat([rows, torch.ones(len(rows), 1).to(rows)], dim=1)
    )


def output_rows(module: nn.Module, shape: torch.Size, vector: Tensor) -> Tensor:
    """V_h of one sample, a row per location, from its flattened form."""
    if isinstance(module, nn.Conv2d):
        return vector.reshape(shape[1], -1).T
    return vector.reshape(-1, shape[-1])


def kronecker_factors(rows_in: list[Tensor], rows_out: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A = E[a a^T] and B = locations * E[V_h V_h^T], each over samples and locations."""
    locations = len(rows_in[0])
    a, v = torch.cat(rows_in), torch.cat(rows_out)
    return a.T @ a / len(a), locations * (v.T @ v) / len(v)


def row_major_order(module: nn.Module) -> Tensor:
    """Where the entries of u lie in the row-major vector of G = [W | b]."""
    out = module.weight.shape[0]
    table = torch.arange(sum(p.numel() for p in module.parameters())).reshape(out, -1)
    if module.bias is None:
        return table.reshape(-1)
    return torch.cat([table[:, :-1].reshape(-1), table[:, -1]])


class Curvature:
    """M of one player as a dense (m, m) matrix; `memory` carries what lives from step to step."""

    def __init__(self, options: Options, memory: dict) -> None:
        self.options, self.memory = options, memory

    def matrix(
        self,
        module: nn.Module,
        q_bar: Tensor,
        batch: int,
        rows_in: list[Tensor] | None = None,
        rows_out: list[Tensor] | None = None,
    ) -> Tensor:
        o, memory = self.options, self.memory
        memory["step"] = memory.get("step", 0) + 1
        memory["seen"] = q_bar
        if o.preconditioner == "identity":
            return torch.eye(len(q_bar), dtype=q_bar.dtype)
        if o.preconditioner == "rmsprop":
            square = memory.get("square", torch.zeros_like(q_bar))
            memory["square"] = o.decay * square + (1 - o.decay) * q_bar**2
            return torch.diag(memory["square"].sqrt() + o.eps)
        if o.preconditioner == "adam":
            square = memory.get("square", torch.zeros_like(q_bar))
            memory["square"] = o.betas[1] * square + (1 - o.betas[1]) * q_bar**2
            corrected = memory["square"] / (1 - o.betas[1] ** memory["step"])
            return torch.diag(corrected.sqrt() + o.eps)
        assert rows_in is not None and rows_out is not None
        a, b = kronecker_factors(rows_in, rows_out)
        order = row_major_order(module)
        if o.preconditioner == "kfac":
            pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()
            a = a + pi * math.sqrt(o.damping) * torch.eye(len(a), dtype=a.dtype)
            b = b + math.sqrt(o.damping) / pi * torch.eye(len(b), dtype=b.dtype)
            return torch.kron(b, a)[order][:, order]
        if o.preconditioner == "ekfac":
            eig_a, u_a = torch.linalg.eigh(a)
            eig_b, u_b = torch.linalg.eigh(b)
            basis = torch.kron(u_b, u_a)[order]
            moment = torch.kron(eig_b, eig_a)
            moment = o.eigen_decay * moment + (1 - o.eigen_decay) * batch * (basis.T @ q_bar) ** 2
            return basis @ torch.diag(moment + o.damping) @ basis.T
        raise ValueError(o.preconditioner)

    def new_control(self, u: Tensor, m: Tensor, d: Tensor) -> Tensor:
        """u after a step along `d`: decay and momentum where the lender of M has them."""
        o, memory = self.options, self.memory
        kronecker = o.preconditioner in ("kfac", "ekfac")
        if not kronecker:
            d = d + o.weight_decay * u
        if o.preconditioner in ("rmsprop", "adam") and o.feedback_clip is not None:
            # no entry beyond 1 + bound times the one that M was built from
            limit = (1 + o.feedback_clip) * memory["seen"].abs()
            d = torch.minimum(torch.maximum(d, -limit), limit)
        if o.preconditioner == "adam":
            average = memory.get("average", torch.zeros_like(d))
            memory["average"] = o.betas[0] * average + (1 - o.betas[0]) * d
            d = memory["average"] / (1 - o.betas[0] ** memory["step"])
        step = torch.linalg.solve(m, d)
        if kronecker:
            step = step + o.weight_decay * u
        if o.momentum:
            memory["buffer"] = o.momentum * memory["buffer"] + step if "buffer" in memory else step
            step = memory["buffer"]
        return u - o.lr * step


# --- the chain -----------------------------------------------------------------------------------


@dataclasses.dataclass
class StageRecord:
    """Per-sample derivatives of one stage; V_x and V_xx are the value's at the stage's input."""

    V_x: list[Tensor]
    V_xx: list[Tensor]
    Q_u: list[Tensor] = dataclasses.field(default_factory=list)
    Q_ux: list[Tensor] = dataclasses.field(default_factory=list)
    dx: list[Tensor] = dataclasses.field(default_factory=list)
    scale: list[float] = dataclasses.field(default_factory=list)
    M: Tensor | None = None


@dataclasses.dataclass
class Result:
    """The parameters after the step, and everything that led there."""

    new: dict[nn.Parameter, Tensor]
    stages: list[StageRecord]

    def scales(self) -> list[float]:
        """The factors s_i that bounded the feedback, over all players and samples."""
        return [s for stage in self.stages for s in stage.scale]


def feedback_scale(bound: float | None, y: Tensor, z: Tensor) -> float:
    """s_i = min(1, bound |y| / |z|)."""
    if bound is None or z.norm() == 0:
        return 1.0
    return min(1.0, float(bound * y.norm() / z.norm()))


def ddp_step(
    stages: Sequence[nn.Module],
    x: Tensor,
    phi: RowLoss,
    options: Options,
    memory: dict[int, dict] | None = None,
    table: list[list[Linearised]] | None = None,
) -> Result:
    """One DDPNOpt step on a chain; the modules are left as they are.

    `memory` (one dict per stage) carries the state of M and of the momentum to the next call;
    `table` is :func:`linearise` of the same stages and batch, where it has been computed already.

    With ``dynamics_order=2`` every stage is expanded to second order ("DDPNOpt2nd", Eq. 26): V_xx
    can be indefinite then, and what Q_uu takes of it is its positive part.
    """
    o, lr = options, options.lr
    assert o.dynamics_order in (1, 2)
    memory = {} if memory is None else memory
    table = linearise(stages, x) if table is None else table
    batch = len(x)

    # Backward: V_T, then the Q's of each stage, M from the batch, and the value one stage down.
    V_x, V_xx = [], []
    for i in range(batch):
        gradient, hessian = terminal_derivatives(phi, table[-1][i].output, i)
        V_x.append(gradient)
        V_xx.append(terminal_value(o.terminal, gradient, hessian))
    J_x = V_x  # the ordinary gradient
    after: list[tuple[list[Tensor], list[Tensor]]] = []  # the value at each stage's output
    records: list[StageRecord] = []
    for k in reversed(range(len(stages))):
        stage, rows = stages[k], table[k]
        player = player_of(stage)
        Q_x = [r.f_x.T @ v for r, v in zip(rows, V_x, strict=True)]
        J_out, J_x = J_x, [r.f_x.T @ j for r, j in zip(rows, J_x, strict=True)]
        Q_xx = [r.f_x.T @ v @ r.f_x for r, v in zip(rows, V_xx, strict=True)]
        bend = []
        if o.dynamics_order == 2:
            bend = [second_derivatives(stage, r.state, v) for r, v in zip(rows, V_x, strict=True)]
            Q_xx = [q + f_xx for q, (f_xx, _) in zip(Q_xx, bend, strict=True)]
        after.insert(0, (V_x, V_xx))
        if player is None:
            V_x, V_xx = Q_x, Q_xx
            records.insert(0, StageRecord(V_x, V_xx))
            continue
        Q_u = [r.f_u.T @ v for r, v in zip(rows, V_x, strict=True)]
        Q_ux = [r.f_u.T @ v @ r.f_x for r, v in zip(rows, V_xx, strict=True)]
        if o.dynamics_order == 2:
            Q_ux = [q + f_ux for q, (_, f_ux) in zip(Q_ux, bend, strict=True)]
        Q_bar = sum(Q_u) / batch
        source, S_bar = V_x, Q_bar  # what M is built from
        if o.curvature == "gradient":
            source = J_out
            S_bar = sum(r.f_u.T @ j for r, j in zip(rows, source, strict=True)) / batch
        if o.preconditioner in (
            "rmsprop",
            "adam",
        ):  # the lender's second moment sees the decayed gradient
            q_moment = S_bar + o.weight_decay * parameter_vector(player)
        else:
            q_moment = S_bar
        kronecker = o.preconditioner in ("kfac", "ekfac")
        M = Curvature(o, memory.setdefault(k, {})).matrix(
            player,
            q_moment,
            batch,
            [input_rows(player, part_in(stage, r.state)) for r in rows] if kronecker else None,
            [player_rows(stage, r, v) for r, v in zip(rows, source, strict=True)]
            if kronecker
            else None,
        )
        M_inv = torch.linalg.inv(M)
        new_x, new_xx = [], []
        for i in range(batch):
            V_hh = V_xx[i] if o.dynamics_order == 1 else absolute_value(V_xx[i])
            own = rows[i].f_u.T @ V_hh @ rows[i].f_u
            if o.bellman == "off":
                new_x.append(Q_x[i])
                new_xx.append(Q_xx[i])
                continue
            if o.bellman == "joint":
                new_x.append(Q_x[i] + Q_ux[i].T @ (-lr * M_inv @ Q_bar))
                new_xx.append(Q_xx[i])
                continue
            if o.bellman == "literal":
                Q_uu_inv = lr * M_inv
            elif o.bellman == "sample":
                Q_uu_inv = torch.linalg.inv(M / lr + own)
            elif o.bellman == "share":
                Q_uu_inv = torch.linalg.inv(batch * M / lr + own)
            else:
                raise ValueError(o.bellman)
            new_x.append(Q_x[i] - Q_ux[i].T @ Q_uu_inv @ Q_u[i])
            new_xx.append(Q_xx[i] - Q_ux[i].T @ Q_uu_inv @ Q_ux[i])
        unit = torch.eye(len(new_xx[0])).to(new_xx[0])
        V_x, V_xx = new_x, [(v + v.T) / 2 + o.value_reg * unit for v in new_xx]
        records.insert(0, StageRecord(V_x, V_xx, Q_u, Q_ux, M=M))

    # Forward: the policies, first player to last.
    new: dict[nn.Parameter, Tensor] = {}
    dx = [torch.zeros_like(r.state).reshape(-1) for r in table[0]]
    xhat = [r.state for r in table[0]]
    for k, stage in enumerate(stages):
        rows, record, player = table[k], records[k], player_of(stage)
        if o.rollout == "nonlinear":
            dx = [(h - r.state).reshape(-1) for h, r in zip(xhat, rows, strict=True)]
        elif o.rollout == "off":
            dx = [torch.zeros_like(r.state).reshape(-1) for r in rows]
        record.dx = dx
        u_new = None
        du = None
        if player is not None:
            value_x, value_xx = after[k]
            d = torch.zeros_like(record.Q_u[0])
            for i in range(batch):
                inside = player_entries(stage, rows[i])
                if o.dynamics_order == 1:  # at the player's output
                    y = value_x[i][inside]
                    z = (value_xx[i] @ rows[i].f_x @ dx[i])[inside]
                else:  # among its parameters, in the norm of M^-1
                    root = torch.linalg.cholesky(torch.linalg.inv(record.M)).T
                    y, z = root @ record.Q_u[i], root @ record.Q_ux[i] @ dx[i]
                s = feedback_scale(o.feedback_clip, y, z)
                record.scale.append(s)
                d = d + (record.Q_u[i] + s * record.Q_ux[i] @ dx[i]) / batch
            u = parameter_vector(player)
            u_new = Curvature(o, memory[k]).new_control(u, record.M, d)
            du = u_new - u
            for name, value in split_vector(player, u_new).items():
                new[controls(player)[name]] = value
        if o.rollout == "linear":
            dx = [
                r.f_x @ e + (r.f_u @ du if du is not None else 0.0)
                for r, e in zip(rows, dx, strict=True)
            ]
        elif o.rollout == "nonlinear":
            xhat = [run_stage(stage, h, u_new).detach() for h in xhat]
    return Result(new, records)


def part_in(stage: nn.Module, state: Tensor) -> Tensor:
    """What of the state the stage's player reads."""
    return state[:, stage.start : stage.stop] if isinstance(stage, Part) else state


def player_entries(stage: nn.Module, row: Linearised) -> slice:
    """Which entries of the stage's flat output its player writes."""
    if not isinstance(stage, Part):
        return slice(None)
    passed = row.state.numel() - (stage.stop - stage.start)
    return slice(stage.start, stage.start + row.output.numel() - passed)


def player_rows(stage: nn.Module, row: Linearised, value_x: Tensor) -> Tensor:
    """V_h of the stage's player, a row per location."""
    vector = value_x[player_entries(stage, row)]
    shape = torch.Size([1, len(vector)]) if isinstance(stage, Part) else row.output.shape
    return output_rows(player_of(stage), shape, vector)


# --- any graph -----------------------------------------------------------------------------------


def directional_loss_change(
    model: nn.Module,
    phi: RowLoss,
    x: Tensor,
    delta: Mapping[str, Tensor],
) -> Tensor:
    """(B,): the directional derivative of each phi_i along the change `delta` (by name)."""
    nominal = {name: p.detach() for name, p in model.named_parameters()}
    tangent = {name: delta.get(name, torch.zeros_like(p)).detach() for name, p in nominal.items()}
    changes = []
    for i in range(len(x)):

        def loss(parameters: dict[str, Tensor], i: int = i) -> Tensor:
            return phi(functional_call(model, parameters, (x[i : i + 1],)), i)

        changes.append(jvp(loss, (nominal,), (tangent,))[1])
    return torch.stack(changes)


def output_change(model: nn.Module, x: Tensor, delta: Mapping[str, Tensor]) -> list[Tensor]:
    """Per sample: the directional derivative of the model's flat output along `delta`."""
    nominal = {name: p.detach() for name, p in model.named_parameters()}
    tangent = {name: delta.get(name, torch.zeros_like(p)).detach() for name, p in nominal.items()}

    def outputs(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (x,)).flatten(1)

    return list(jvp(outputs, (nominal,), (tangent,))[1])


@dataclasses.dataclass
class Columns:
    """Per sample: the terminal cost's columns and what they are back-propagated to each player."""

    terminal: list[Tensor]  # (n, r)
    v: list[Tensor]  # (r,), V_x = terminal @ v
    K: list[Tensor]  # (r, r), V_xx = terminal @ K @ terminal^T
    P_u: list[list[Tensor]]  # per player, per sample: (m, r)
    P_h: list[list[Tensor]]  # the same at the player's outputs, over all of its uses
    inputs: list[list[Tensor]]  # what the player read, at its first use
    shapes: list[list[torch.Size]]  # of its first output
    uses: list[int]


def back_propagate(
    model: nn.Module, players: Sequence[nn.Module], x: Tensor, phi: RowLoss, terminal: str
) -> Columns:
    """One pass per sample and column, by autograd alone."""
    table = Columns([], [], [], *([[] for _ in players] for _ in range(4)), [0 for _ in players])
    for i in range(len(x)):
        seen: list[list[Tensor]] = [[] for _ in players]
        reads: list[list[Tensor]] = [[] for _ in players]
        handles = []
        for t, player in enumerate(players):

            def watch(_module, args, out, seen_here=seen[t], reads_here=reads[t]) -> None:
                reads_here.append(args[0].detach())
                seen_here.append(out)

            handles.append(player.register_forward_hook(watch))
        output = model(x[i : i + 1])
        for handle in handles:
            handle.remove()
        gradient, hessian = terminal_derivatives(phi, output, i)
        columns, curvature = gradient[:, None], torch.ones_like(gradient[:1, None])
        if terminal == "matched":
            curvature = curvature * matched_curvature(gradient, hessian)
        elif terminal == "gauss-newton":
            eigenvalues, vectors = torch.linalg.eigh(hessian)
            columns = torch.cat([columns, vectors * eigenvalues.clamp_min(0).sqrt()], dim=1)
            curvature = torch.eye(columns.shape[1]).to(gradient)
            curvature[0, 0] = 0
        table.terminal.append(columns)
        table.K.append(curvature)
        table.v.append(torch.eye(columns.shape[1]).to(gradient)[0])
        for t, player in enumerate(players):
            own = list(controls(player).values())
            pulled_u, pulled_h = [], []
            for column in columns.T:
                gs = torch.autograd.grad(
                    output.reshape(-1), [*own, *seen[t]], column, retain_graph=True
                )
                pulled_u.append(torch.cat([g.reshape(-1) for g in gs[: len(own)]]))
                pulled_h.append(torch.cat([g.reshape(-1) for g in gs[len(own) :]]))
            table.P_u[t].append(torch.stack(pulled_u, dim=1))
            table.P_h[t].append(torch.stack(pulled_h, dim=1))
            table.inputs[t].append(reads[t][0])
            table.shapes[t].append(seen[t][0].shape)
            table.uses[t] = len(seen[t])
    return table


@dataclasses.dataclass
class GraphResult:
    """The step of :func:`graph_step`: by parameter, with the coefficients that led there."""

    new: dict[nn.Parameter, Tensor]
    delta: dict[str, Tensor]
    v: list[list[Tensor]]  # per player, per sample: at the player's output
    K: list[list[Tensor]]
    rho: list[list[Tensor]]
    scale: list[float]


def graph_step(
    model: nn.Module,
    players: Sequence[nn.Module],
    x: Tensor,
    phi: RowLoss,
    options: Options,
    memory: dict[int, dict] | None = None,
    table: Columns | None = None,
) -> GraphResult:
    """One DDPNOpt step on any graph with the linear rollout, from per-sample back-propagations.

    `players` stand in the order of their first call. With c the columns of the terminal cost
    (phi_x, and a factor of its Hessian where that is exact), P_u^(i) = [d(c^T x_T)/du] and the
    value is V_x = P_x v, V_xx = P_x K P_x^T throughout (rank-r form of Prop. 3). `memory` is that
    of :func:`ddp_step`; `table` is :func:`back_propagate` for the same batch and terminal.
    """
    o, lr, batch = options, options.lr, len(x)
    assert o.terminal != "full" and o.value_reg == 0 and o.dynamics_order == 1, "chains alone"
    memory = {} if memory is None else memory
    names = {p: name for name, p in model.named_parameters()}
    table = back_propagate(model, players, x, phi, o.terminal) if table is None else table
    P_u, P_h, v, K = table.P_u, table.P_h, table.v, table.K

    # Backward over the players, last to first, on r-vectors and (r, r) matrices.
    v_after: list[list[Tensor]] = [[] for _ in players]
    K_after: list[list[Tensor]] = [[] for _ in players]
    M: list[Tensor] = [torch.empty(0) for _ in players]
    for t in reversed(range(len(players))):
        v_after[t], K_after[t] = v, K
        Q_bar = sum(P @ c for P, c in zip(P_u[t], v, strict=True)) / batch
        source = table.v if o.curvature == "gradient" else v  # what M is built from
        q_moment = sum(P @ c for P, c in zip(P_u[t], source, strict=True)) / batch
        if o.preconditioner in ("rmsprop", "adam"):
            q_moment = q_moment + o.weight_decay * parameter_vector(players[t])
        rows_in = rows_out = None
        if o.preconditioner in ("kfac", "ekfac"):
            assert table.uses[t] == 1, "no oracle for the factors of several uses"
            rows_in = [input_rows(players[t], value) for value in table.inputs[t]]
            rows_out = [
                output_rows(players[t], shape, P @ c)
                for shape, P, c in zip(table.shapes[t], P_h[t], source, strict=True)
            ]
        M[t] = Curvature(o, memory.setdefault(t, {})).matrix(
            players[t], q_moment, batch, rows_in, rows_out
        )
        k_batch = -lr * torch.linalg.solve(M[t], Q_bar)
        new_v, new_K = [], []
        for i in range(batch):
            S = lr * P_u[t][i].T @ torch.linalg.solve(M[t], P_u[t][i])
            unit = torch.eye(len(S), dtype=S.dtype)
            if o.bellman == "off":
                new_v.append(v[i])
                new_K.append(K[i])
            elif o.bellman == "joint":
                new_v.append(v[i] + K[i] @ P_u[t][i].T @ k_batch)
                new_K.append(K[i])
            elif o.bellman == "literal":
                new_v.append(v[i] - K[i] @ S @ v[i])
                new_K.append(K[i] - K[i] @ S @ K[i])
            else:
                share = batch if o.bellman == "share" else 1
                back = torch.linalg.inv(unit + K[i] @ S / share)
                new_v.append(back @ v[i])
                new_K.append(back @ K[i])
        v, K = new_v, new_K

    # Forward over the players: rho from the updates made so far.
    new: dict[nn.Parameter, Tensor] = {}
    delta: dict[str, Tensor] = {}
    rho: list[list[Tensor]] = [[] for _ in players]
    scale: list[float] = []
    for t, player in enumerate(players):
        if o.rollout == "linear":
            change = output_change(model, x, delta)
            rho[t] = [c.T @ e for c, e in zip(table.terminal, change, strict=True)]
        elif o.rollout == "off":
            rho[t] = [torch.zeros_like(c[0]) for c in table.terminal]
        else:
            raise ValueError("the graph oracle has no nonlinear rollout")
        d = torch.zeros(len(P_u[t][0]), dtype=P_u[t][0].dtype)
        for i in range(batch):
            y = P_h[t][i] @ v_after[t][i]
            feedback = K_after[t][i] @ rho[t][i]
            s = feedback_scale(o.feedback_clip, y, P_h[t][i] @ feedback)
            scale.append(s)
            d = d + P_u[t][i] @ (v_after[t][i] + s * feedback) / batch
        u = parameter_vector(player)
        u_new = Curvature(o, memory[t]).new_control(u, M[t], d)
        for name, value in split_vector(player, u_new).items():
            parameter = controls(player)[name]
            new[parameter] = value
            delta[names[parameter]] = value - parameter.detach()
    return GraphResult(new, delta, v_after, K_after, rho, scale)


# --- full second-order DDP, for Proposition 2 ----------------------------------------------------


@dataclasses.dataclass
class SecondOrder:
    """Exact second-order expansion of one stage's Q for one sample (Eq. 3, every term kept)."""

    Q_x: Tensor
    Q_u: Tensor | None
    Q_xx: Tensor
    Q_ux: Tensor | None
    Q_uu: Tensor | None


def second_order_backward(
    stages: Sequence[nn.Module], x: Tensor, phi: RowLoss, i: int, drop_q_ux: bool
) -> list[SecondOrder]:
    """DDP's backward pass for sample `i`, second derivatives of f included (DDPNOpt Eq. 3 to 5).

    Q(x, u) = V(f(x, u)) is expanded from a quadratic model of V; where `drop_q_ux`, Q_ux counts as
    zero in the value (the premise of Prop. 2), otherwise Q_uu must be invertible.
    """
    states, state = [], x[i : i + 1]
    for stage in stages:
        states.append(state)
        state = stage(state).detach()
    V_x, V_xx = terminal_derivatives(phi, state, i)
    end = state.reshape(-1)
    out: list[SecondOrder] = []
    for stage, here in zip(reversed(stages), reversed(states), strict=True):
        player = player_of(stage)
        u = None if player is None else parameter_vector(player)
        n = here.numel()
        joint = here.reshape(-1) if u is None else torch.cat([here.reshape(-1), u])

        def Q(
            point: Tensor, stage=stage, here=here, n=n, u=u, V_x=V_x, V_xx=V_xx, end=end
        ) -> Tensor:
            control = None if u is None else point[n:]
            e = run_stage(stage, point[:n].reshape(here.shape), control).reshape(-1) - end
            return V_x @ e + 0.5 * e @ V_xx @ e

        first = torch.autograd.functional.jacobian(Q, joint)
        second = torch.autograd.functional.hessian(Q, joint)
        terms = SecondOrder(
            first[:n],
            None if u is None else first[n:],
            second[:n, :n],
            None if u is None else second[n:, :n],
            None if u is None else second[n:, n:],
        )
        out.insert(0, terms)
        V_x, V_xx = terms.Q_x, terms.Q_xx
        if u is not None and not drop_q_ux:
            V_x = V_x - terms.Q_ux.T @ torch.linalg.solve(terms.Q_uu, terms.Q_u)
            V_xx = V_xx - terms.Q_ux.T @ torch.linalg.solve(terms.Q_uu, terms.Q_ux)
        end = here.reshape(-1)
    return out


# --- comparing -----------------------------------------------------------------------------------


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| over max |expected|."""
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def distance(a: Mapping[nn.Parameter, Tensor], b: Mapping[nn.Parameter, Tensor]) -> float:
    """How far two steps from the same parameters lie apart, relative to the second one's length."""
    apart = torch.cat([(a[p] - b[p]).reshape(-1) for p in b]).norm()
    length = torch.cat([(b[p] - p.detach()).reshape(-1) for p in b]).norm()
    return float(apart / length)
