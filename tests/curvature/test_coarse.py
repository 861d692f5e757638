"""Correlations that are diagonal or of low rank: the same numbers, from less."""

import itertools

import pytest
import torch

from ocnopt.curvature.coarse import coarse
from ocnopt.curvature.correlation import Correlation, dense
from ocnopt.curvature.coupling import Solved, couple
from ocnopt.curvature.eigen import Eigen
from ocnopt.curvature.factorize import eigenbasis
from ocnopt.curvature.frames import EigenFrame, Frame

GROUPS, SIZES = 2, ((6, 4), (5, 3), (6, 5), (7, 3))  # (in, out) of each player


def decaying(make, n, m, least):
    """(groups, n, m) with singular values from 0.7 down to ``least``."""
    u, v = (
        torch.linalg.qr(torch.randn(GROUPS, size, size, generator=make, dtype=torch.float64))[0]
        for size in (n, m)
    )
    k = min(n, m)
    return u[:, :, :k] * torch.logspace(-0.15, least, k, dtype=torch.float64) @ v[:, :, :k].mT


def correlations(players, diagonal=False, least=-4):
    """Between players; diagonal: of inputs, between the first and the third as well."""
    make = torch.Generator().manual_seed(0)
    found = {}
    for n, m in itertools.combinations(range(players), 2):
        (i, o), (j, p) = SIZES[n], SIZES[m]
        a = decaying(make, i, j, least)
        if diagonal and i == j:
            a = torch.logspace(-0.15, least, i, dtype=torch.float64).expand(GROUPS, i)
        found[n, m] = Correlation(a, decaying(make, o, p, least) / players)
    return found


def matrix(found, players):
    """C beside the identity, (groups, n, n), of all players' entries row by row."""
    rows = []
    for n in range(players):
        row = []
        for m in range(players):
            size = [i * o for i, o in (SIZES[n], SIZES[m])]
            between = found.get((min(n, m), max(n, m)))
            block = torch.zeros(GROUPS, *size, dtype=torch.float64)
            if between is not None:
                parts = [
                    torch.kron(b, a)
                    for a, b in zip(dense(between.a), dense(between.b), strict=True)
                ]
                block = torch.stack(parts)
                block = block if n < m else block.mT
            row.append(block)
        rows.append(torch.cat(row, -1))
    return torch.cat(rows, -2)


@pytest.mark.parametrize("players", [2, 3, 4])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("tolerance", [0.2, 0.03, 1e-3, 0.0])
def test_what_is_left_out_is_within_the_tolerance(players, diagonal, tolerance):
    found = correlations(players, diagonal)
    rough = coarse(couple(found, players), tolerance)
    exact = matrix(found, players)
    blocks = [torch.stack([torch.kron(o, i) for o, i in zip(*b, strict=True)]) for b in rough.bases]
    for outputs, inputs in rough.bases:
        for columns in (outputs, inputs):
            eye = torch.eye(columns.shape[-1], dtype=torch.float64).expand(GROUPS, -1, -1)
            torch.testing.assert_close(columns.mT @ columns, eye, rtol=0, atol=1e-12)
    left = torch.stack([torch.block_diag(*[b[g] for b in blocks]) for g in range(GROUPS)])
    kept = left @ left.mT @ exact @ left @ left.mT
    assert float(torch.linalg.matrix_norm(exact - kept, 2).max()) <= tolerance + 1e-12
    fewer = left.shape[-1] < exact.shape[-1]
    assert fewer or tolerance < 0.1, "nothing was left out: the test would prove nothing"
    # And Gram numbers are those of what is kept.
    make = torch.Generator().manual_seed(1)
    ys = [
        torch.randn(6, 2, GROUPS, out, into, generator=make, dtype=torch.float64)
        for into, out in SIZES[:players]
    ]
    seen = [o.mT @ y @ i for (o, i), y in zip(rough.bases, ys, strict=True)]
    flat = torch.cat([y.flatten(-2) for y in ys], -1).transpose(1, 2)
    eye = torch.eye(exact.shape[-1], dtype=torch.float64)
    theirs = flat @ (torch.linalg.inv(eye + kept) - eye) @ flat.mT
    scale = float((flat @ flat.mT).abs().max())
    assert float((rough.coupling.added(seen) - theirs).abs().max()) <= 1e-9 * scale


@pytest.mark.parametrize("players", [3, 4])
@pytest.mark.parametrize("tolerance", [3e-3, 0.0])
def test_who_has_nothing_in_common_with_the_others_leaves_them_as_they_are(players, tolerance):
    found = correlations(players)
    last = players - 1
    apart = {
        (n, m): Correlation(0 * x.a, x.b) if last in (n, m) else x for (n, m), x in found.items()
    }
    without = {pair: x for pair, x in apart.items() if last not in pair}
    rough, fewer = (
        coarse(couple(apart, players), tolerance),
        coarse(couple(without, players - 1), tolerance),
    )
    assert rough.bases[last] is None
    assert all(bases is not None for bases in rough.bases[:last])
    make = torch.Generator().manual_seed(1)
    ys = [
        torch.randn(6, 1, GROUPS, out, into, generator=make, dtype=torch.float64)
        for into, out in SIZES[:last]
    ]
    results = [
        c.coupling.added([o.mT @ y @ i for (o, i), y in zip(c.bases, ys, strict=False)])
        for c in (rough, fewer)
    ]
    allowed = max(tolerance, 1e-8) * float(sum(y.square().sum((-2, -1)) for y in ys).max())
    assert float(results[1].abs().max()) > 1.5 * allowed
    torch.testing.assert_close(*results, rtol=0, atol=allowed)


@pytest.mark.parametrize("players", [3, 4])
@pytest.mark.parametrize("rank", [1, 3])
def test_an_inverse_at_hand_equals_conjugate_gradients(players, rank):
    many = couple(correlations(players, diagonal=True), players)
    make = torch.Generator().manual_seed(1)
    ys = [
        torch.randn(5, rank, GROUPS, out, into, generator=make, dtype=torch.float64)
        for into, out in SIZES[:players]
    ]
    solved = Solved(many, [y[0, 0] for y in ys])
    for mine, theirs in zip(solved.solve(ys), many.solve(ys), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(solved.gram(ys), many.gram(ys), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(solved.added(ys), many.added(ys), rtol=1e-8, atol=1e-7)


def test_nothing_in_common_leaves_no_directions():
    for players in (2, 3):
        weak = {k: Correlation(x.a, 1e-3 * x.b) for k, x in correlations(players).items()}
        assert coarse(couple(weak, players), 0.01) is None


@pytest.mark.parametrize("players", [2, 3])
@pytest.mark.parametrize("wrong", [1.0, 3.0, float("nan")])
def test_diagonal_sides_are_matrices_that_are_known_to_be_diagonal(players, wrong):
    make = torch.Generator().manual_seed(0)
    pairs = list(itertools.combinations(range(players), 2))
    short, long = {}, {}
    for pair in pairs:
        a, b = (0.9 * torch.rand(GROUPS, n, generator=make, dtype=torch.float64) for n in (6, 4))
        a[0] *= wrong
        short[pair] = Correlation(a, b)
        long[pair] = Correlation(a.diag_embed(), b.diag_embed())
    one, other = couple(short, players), couple(long, players)
    assert one.failures == other.failures
    ys = [torch.randn(GROUPS, 4, 6, generator=make, dtype=torch.float64) for _ in range(players)]
    for mine, theirs in zip(one.solve(ys), other.solve(ys), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
    stacked = [y[None, None] for y in ys]
    torch.testing.assert_close(one.gram(stacked), other.gram(stacked), rtol=1e-8, atol=1e-10)


def test_players_who_read_the_same_input_are_correlated_entry_by_entry():
    make = torch.Generator().manual_seed(0)
    rows = torch.randn(GROUPS, 20, 6, generator=make, dtype=torch.float64)
    cols = [torch.randn(GROUPS, 20, n, generator=make, dtype=torch.float64) for n in (3, 4)]
    a = rows.mT @ rows / 20
    bs = [c.mT @ c / 20 for c in cols]
    basis = eigenbasis(a).values
    frames = [
        EigenFrame(
            Eigen((1.0,), None, basis.clone(), eigenbasis(b).values, torch.ones(GROUPS, n, 6)),
            a.clone(),
            b,
            0.1,
        )
        for b, n in zip(bs, (3, 4), strict=True)
    ]
    cross = cols[0].mT @ cols[1] / 20
    mine = frames[0].correlate(a.clone(), cross, frames[1])
    theirs = Frame.correlate(frames[0], a, cross, frames[1])
    assert mine.a.dim() == 2
    torch.testing.assert_close(dense(mine.a), theirs.a, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mine.b, theirs.b)
    # Another history, and the correlation is a matrix.
    assert frames[0].correlate(0.9 * a, cross, frames[1]).a.dim() == 3
