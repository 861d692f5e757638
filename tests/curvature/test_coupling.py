"""The cooperative solve against dense matrices: pairs, more players, Gram matrices."""

import itertools

import pytest
import torch

from ocnopt.curvature.correlation import Correlation
from ocnopt.curvature.coupling import MOST, Many, Pair, couple
from ocnopt.curvature.frames import KroneckerFrame
from ocnopt.curvature.metric import Kronecker

SIZES = ((5, 3), (4, 2), (3, 4), (2, 2))  # (in, out) of each player


def seen(players, samples=12, alike=0.7, seed=0):
    """Inputs and output gradients of players, correlated; their damped factors."""
    make = torch.Generator().manual_seed(seed)

    def draw(width):
        own = torch.randn(samples, width, generator=make, dtype=torch.float64)
        return alike * common @ torch.randn(4, width, generator=make, dtype=torch.float64) + own

    common = torch.randn(samples, 4, generator=make, dtype=torch.float64)
    return [(draw(n), draw(m)) for n, m in SIZES[:players]]


class Dense:
    """``P`` of some players, built entry by entry; vec stacks columns."""

    def __init__(self, data, damping=0.1):
        self.data = data
        samples = len(data[0][0])
        self.a = {}
        self.b = {}
        for (n, one), (m, other) in itertools.product(enumerate(data), repeat=2):
            self.a[n, m] = one[0].T @ other[0] / samples
            self.b[n, m] = one[1].T @ other[1] / samples
            if n == m:
                self.a[n, m] += damping * torch.eye(one[0].shape[1], dtype=torch.float64)
                self.b[n, m] += 2 * damping * torch.eye(one[1].shape[1], dtype=torch.float64)
        players = range(len(data))
        self.joint = torch.cat(
            [
                torch.cat([torch.kron(self.a[n, m], self.b[n, m]) for m in players], 1)
                for n in players
            ]
        )

    def frames(self):
        return [
            KroneckerFrame(
                Kronecker(
                    (1.0,),
                    None,
                    torch.linalg.inv(self.a[n, n])[None],
                    torch.linalg.inv(self.b[n, n])[None],
                )
            )
            for n in range(len(self.data))
        ]

    def coupling(self, kind=couple):
        frames = self.frames()
        pairs = itertools.combinations(range(len(frames)), 2)
        correlations = {
            (n, m): frames[n].correlate(self.a[n, m][None], self.b[n, m][None], frames[m])
            for n, m in pairs
        }
        return frames, kind(correlations, len(frames))

    def solve(self, directions):
        stacked = torch.cat([d.T.reshape(-1) for d in directions])
        return self.unstack(torch.linalg.solve(self.joint, stacked))

    def unstack(self, vector):
        out, start = [], 0
        for a, g in self.data:
            n, m = a.shape[1], g.shape[1]
            out.append(vector[start : start + n * m].reshape(n, m).T)
            start += n * m
        return out


def directions(players, seed=3):
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(m, n, generator=make, dtype=torch.float64) for n, m in SIZES[:players]]


def jointly(frames, coupling, ds):
    solved = coupling.solve([f.enter(d[None]) for f, d in zip(frames, ds, strict=True)])
    return [f.leave(y)[0] for f, y in zip(frames, solved, strict=True)]


@pytest.mark.parametrize("players", [2, 3, 4])
@pytest.mark.parametrize("damping", [1e-3, 0.1, 10.0])
def test_row_31_kronecker_cooperative_solve_equals_a_dense_joint_solve(players, damping):
    dense = Dense(seen(players), damping)
    frames, coupling = dense.coupling()
    ds = directions(players)
    for mine, theirs in zip(jointly(frames, coupling, ds), dense.solve(ds), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8 * float(theirs.abs().max()))


def test_row_29_two_player_schur_policy_equals_brute_force():
    """du, dv of the cooperative policy with feedback, by Schur complements of dense matrices."""
    dense = Dense(seen(2))
    p_u, p_v = (torch.randn(m, n, dtype=torch.float64) for n, m in SIZES[:2])
    p_ux, p_vx = (torch.randn(m * n, 6, dtype=torch.float64) for n, m in SIZES[:2])
    dx = torch.randn(6, dtype=torch.float64)
    uu, uv, vu, vv = (
        torch.kron(dense.a[n, m], dense.b[n, m]) for n, m in ((0, 0), (0, 1), (1, 0), (1, 1))
    )
    vec_u, vec_v = p_u.T.reshape(-1), p_v.T.reshape(-1)
    back = uv @ torch.linalg.inv(vv)
    schur = uu - back @ vu
    du = -torch.linalg.solve(schur, (vec_u - back @ vec_v) + (p_ux - back @ p_vx) @ dx)
    dv = -torch.linalg.solve(vv, vec_v + p_vx @ dx + vu @ du)
    frames, coupling = dense.coupling()
    moved = [
        -d
        for d in jointly(
            frames,
            coupling,
            [p + (px @ dx).reshape(p.T.shape).T for p, px in ((p_u, p_ux), (p_v, p_vx))],
        )
    ]
    for mine, theirs in zip(moved, dense.unstack(torch.cat([du, dv])), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_pair_equals_simultaneous_diagonalization():
    """The formula by two small eigenproblems, with a Schur complement on one player's side."""
    dense = Dense(seen(2))
    g_u, g_v = directions(2)
    a, b = dense.a, dense.b
    inverse = torch.linalg.inv
    rest = g_u - b[0, 1] @ inverse(b[1, 1]) @ g_v @ inverse(a[1, 1]) @ a[0, 1].T
    root_a, root_b = torch.linalg.cholesky(a[0, 0]), torch.linalg.cholesky(b[0, 0])
    less_a = inverse(root_a) @ a[0, 1] @ inverse(a[1, 1]) @ a[0, 1].T @ inverse(root_a).T
    less_b = inverse(root_b) @ b[0, 1] @ inverse(b[1, 1]) @ b[0, 1].T @ inverse(root_b).T
    s, turn_s = torch.linalg.eigh(less_a)
    t, turn_t = torch.linalg.eigh(less_b)
    assert float(s.max()) < 1
    assert float(t.max()) < 1
    inner = (turn_t.T @ inverse(root_b) @ rest @ inverse(root_a).T @ turn_s) / (
        1 - t[:, None] * s[None]
    )
    u = inverse(root_b).T @ turn_t @ inner @ turn_s.T @ inverse(root_a)
    v = inverse(b[1, 1]) @ (g_v - b[0, 1].T @ u @ a[0, 1]) @ inverse(a[1, 1])
    frames, coupling = dense.coupling()
    assert isinstance(coupling, Pair)
    mine = jointly(frames, coupling, [g_u, g_v])
    torch.testing.assert_close(mine[0], u, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mine[1], v, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("players", [2, 3])
def test_gram_equals_a_dense_quadratic_form(players):
    dense = Dense(seen(players))
    frames, coupling = dense.coupling()
    make = torch.Generator().manual_seed(1)
    gradients = [
        torch.randn(5, 2, m, n, generator=make, dtype=torch.float64) for n, m in SIZES[:players]
    ]
    ys = [f.enter(g[:, :, None]) for f, g in zip(frames, gradients, strict=True)]
    mine = coupling.gram(ys).sum(1)
    flat = torch.cat([g.mT.reshape(5, 2, -1) for g in gradients], -1)
    theirs = flat @ torch.linalg.inv(dense.joint) @ flat.mT
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_conjugate_gradients_equal_the_pair_that_has_a_closed_form():
    dense = Dense(seen(2, alike=3.0), 1e-4)
    frames, pair = dense.coupling()
    _, many = dense.coupling(Many)
    ds = directions(2)
    for one, other in zip(jointly(frames, pair, ds), jointly(frames, many, ds), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7 * float(one.abs().max()))


@pytest.mark.parametrize("players", [2, 3])
def test_no_correlation_leaves_every_player_by_itself(players):
    dense = Dense(seen(players))
    for pair in itertools.permutations(range(players), 2):
        dense.a[pair] = torch.zeros_like(dense.a[pair])
    frames, coupling = dense.coupling()
    ds = directions(players)
    for frame, mine, d in zip(frames, jointly(frames, coupling, ds), ds, strict=True):
        torch.testing.assert_close(mine, frame.leave(frame.enter(d[None]))[0], rtol=0, atol=0)


def test_impossible_correlations_are_scaled_down_and_counted():
    a = torch.eye(3, dtype=torch.float64)[None] * 1.5
    b = torch.eye(2, dtype=torch.float64)[None]
    pair = couple({(0, 1): Correlation(a, b)}, 2)
    assert pair.failures == 2
    assert float((1 - 1 / (1 + pair.own)).max()) == pytest.approx(MOST**4)
    signs = {(0, 1): 1.0, (0, 2): 1.0, (1, 2): -1.0}
    many = couple({key: Correlation(a * s / 1.7, b * 0.9) for key, s in signs.items()}, 3)
    assert many.failures > 0
    ys = [torch.randn(1, 2, 3, dtype=torch.float64) for _ in range(3)]
    back = many.times(many.solve(ys))
    for mine, y in zip(back, ys, strict=True):
        torch.testing.assert_close(mine, y, rtol=1e-8, atol=1e-8)


def test_correlations_too_weak_to_do_harm_are_left_as_they_are():
    """No data have these inputs, but with such outputs C is positive definite all the same."""
    a, b = (torch.eye(n, dtype=torch.float64)[None] for n in (3, 2))
    signs = {(0, 1): 1.0, (0, 2): 1.0, (1, 2): -1.0}
    many = couple({key: Correlation(a * s / 1.7, b * 0.5) for key, s in signs.items()}, 3)
    assert many.failures == 0
    assert many.strength < 1
    columns = torch.eye(18, dtype=torch.float64).view(18, 3, 1, 2, 3).unbind(1)
    dense = torch.stack(many.times(list(columns)), 1).view(18, 18)
    values = torch.linalg.eigvalsh(dense)
    assert float(values[0]) > 1 - many.strength - 1e-12
    assert float(values[-1]) < 1 + many.strength + 1e-12


@pytest.mark.parametrize("players", [2, 3])
@pytest.mark.parametrize("what", [torch.nan, torch.inf, 1.5])
def test_a_group_that_goes_wrong_leaves_the_others_as_they_are(what, players):
    """Groups are networks of their own where networks are stacked."""
    dense = Dense(seen(players))
    frames = dense.frames()
    pairs = list(itertools.combinations(range(players), 2))
    one = {
        (n, m): frames[n].correlate(dense.a[n, m][None], dense.b[n, m][None], frames[m])
        for n, m in pairs
    }
    both = {}
    for pair, between in one.items():
        a, b = between.a, between.b
        wrong = torch.full_like(a, what) if what > 2 or what != what else a / a.norm() * what
        first = b / b.norm() if what == 1.5 else b
        both[pair] = Correlation(torch.cat([wrong, a]), torch.cat([first, b]))
    alone, together = couple(one, players), couple(both, players)
    assert alone.failures == 0
    assert together.failures > 0
    ys = [f.enter(d[None]) for f, d in zip(frames, directions(players), strict=True)]
    doubled = together.solve([torch.cat([y, y]) for y in ys])
    for mine, theirs, y in zip(doubled, alone.solve(ys), ys, strict=True):
        torch.testing.assert_close(mine[1], theirs[0], rtol=1e-8, atol=1e-10)
        assert bool(torch.isfinite(mine[0]).all())
        if what != 1.5:  # there every player is by itself
            torch.testing.assert_close(mine[0], y[0], rtol=0, atol=0)


@pytest.mark.parametrize("tolerance", [0.1, 0.01, 1e-3])
@pytest.mark.parametrize("alike", [0.7, 3.0])
def test_gram_numbers_of_many_players_are_known_to_the_tolerance(alike, tolerance):
    dense = Dense(seen(4, alike=alike), 1e-2)
    frames, _ = dense.coupling()
    correlations = {
        (n, m): frames[n].correlate(dense.a[n, m][None], dense.b[n, m][None], frames[m])
        for n, m in itertools.combinations(range(4), 2)
    }
    make = torch.Generator().manual_seed(1)
    ys = [torch.randn(50, 1, 1, m, n, generator=make, dtype=torch.float64) for n, m in SIZES]
    exact = Many(correlations, 4).gram(ys)
    rough = Many(correlations, 4, tolerance).gram(ys)
    assert float(((rough - exact).abs() / exact).max()) <= tolerance


@pytest.mark.parametrize("size", [1e-19, 1e-21, 1e-22, 1e-23, 0.0])
def test_vectors_whose_squares_vanish_make_no_nan(size):
    dense = Dense(seen(3))
    frames, many = dense.coupling()
    ys = [f.enter(d[None]).float() * size for f, d in zip(frames, directions(3), strict=True)]
    small = Many(
        {k: Correlation(x.a.float(), x.b.float()) for k, x in many.correlations.items()}, 3
    )
    for x in small.solve(ys):
        assert bool(torch.isfinite(x).all())
    assert bool(torch.isfinite(small.gram([y[None, None] for y in ys])).all())


def test_what_is_not_finite_is_seen():
    dense = Dense(seen(3))
    frames, many = dense.coupling()
    ys = [f.enter(d[None]) for f, d in zip(frames, directions(3), strict=True)]
    ys[1][0, 0, 0] = torch.nan
    assert not all(bool(torch.isfinite(x).all()) for x in many.solve(ys))
