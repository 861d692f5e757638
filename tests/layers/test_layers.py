"""Every layer kind against autograd: gradients, per sample and summed, application, Gram."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import ocnopt.curvature.metric as metrics
from ocnopt.curvature.eigen import Eigen
from ocnopt.layers import conv as conv_layer
from ocnopt.layers import kind_of

torch.manual_seed(0)
F64 = torch.float64


def randn(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=F64)


def tokens(*shape, high=7, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def linear(**options):
    return lambda: nn.Linear(4, 3, **options)


def conv(dims, *args, **options):
    return lambda: (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](*args, **options)


B = 5
CASES = {
    "linear": (linear(), randn(B, 4)),
    "linear-nobias": (linear(bias=False), randn(B, 4)),
    "linear-3d": (linear(), randn(B, 6, 4)),
    "linear-3d-nobias": (linear(bias=False), randn(B, 2, 4)),
    "linear-4d": (linear(), randn(B, 2, 3, 4)),
    "linear-one-location": (linear(), randn(B, 1, 4)),
    "linear-wide": (lambda: nn.Linear(30, 40), randn(B, 2, 30)),
    "conv1d": (conv(1, 4, 6, 3), randn(B, 4, 9)),
    "conv1d-groups": (
        conv(1, 4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        randn(B, 4, 11),
    ),
    # An even kernel pads unevenly.
    "conv1d-same": (conv(1, 3, 4, 4, padding="same"), randn(B, 3, 8)),
    "conv1d-circular": (
        conv(1, 3, 4, 3, padding=1, padding_mode="circular", bias=False),
        randn(B, 3, 8),
    ),
    "conv2d": (conv(2, 3, 4, 3), randn(B, 3, 6, 7)),
    "conv2d-1x1": (conv(2, 3, 4, 1), randn(B, 3, 5, 5)),
    "conv2d-nobias": (conv(2, 3, 4, 3, bias=False), randn(B, 3, 6, 7)),
    "conv2d-stride": (conv(2, 3, 4, (3, 2), stride=(2, 3), padding=(1, 2)), randn(B, 3, 7, 8)),
    "conv2d-uneven": (conv(2, 2, 4, 3, stride=2), randn(B, 2, 8, 6)),
    "conv2d-dilation": (conv(2, 3, 4, 3, dilation=(2, 1), padding=2), randn(B, 3, 6, 7)),
    "conv2d-groups": (conv(2, 4, 6, 3, groups=2, padding=1), randn(B, 4, 5, 5)),
    "conv2d-depthwise": (conv(2, 4, 8, 3, groups=4, bias=False), randn(B, 4, 5, 5)),
    "conv2d-same": (conv(2, 3, 4, (4, 3), padding="same", dilation=(1, 2)), randn(B, 3, 6, 7)),
    "conv2d-valid": (conv(2, 3, 4, 3, padding="valid"), randn(B, 3, 6, 7)),
    "conv2d-same-reflect": (
        conv(2, 3, 4, 4, padding="same", padding_mode="reflect"),
        randn(B, 3, 6, 7),
    ),
    "conv2d-reflect": (
        conv(2, 3, 4, 3, padding=(2, 1), padding_mode="reflect", stride=2),
        randn(B, 3, 6, 7),
    ),
    "conv2d-circular": (
        conv(2, 4, 4, 3, padding=1, padding_mode="circular", groups=2),
        randn(B, 4, 6, 7),
    ),
    "conv2d-replicate": (
        conv(2, 3, 4, 3, padding=(0, 2), padding_mode="replicate"),
        randn(B, 3, 6, 7),
    ),
    "conv3d": (conv(3, 2, 3, 2), randn(B, 2, 3, 4, 3)),
    "conv3d-all": (
        conv(3, 4, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 1), dilation=(2, 1, 1), groups=2),
        randn(B, 4, 3, 5, 3),
    ),
    "conv3d-replicate": (
        conv(3, 2, 3, 3, padding=1, padding_mode="replicate"),
        randn(B, 2, 3, 4, 3),
    ),
    "embedding": (lambda: nn.Embedding(7, 3), tokens(B, 6)),
    "embedding-1d": (lambda: nn.Embedding(7, 3), tokens(B)),
    "embedding-repeated": (lambda: nn.Embedding(7, 3), tokens(B, 9, high=2)),
    "embedding-4d": (lambda: nn.Embedding(7, 3), tokens(B, 2, 3)),
    "embedding-padding": (lambda: nn.Embedding(7, 3, padding_idx=1), tokens(B, 6, high=3)),
    "layernorm": (lambda: nn.LayerNorm(4), randn(B, 4)),
    "layernorm-3d": (lambda: nn.LayerNorm(4), randn(B, 6, 4)),
    "layernorm-two-dims": (lambda: nn.LayerNorm((6, 4)), randn(B, 2, 6, 4)),
    "layernorm-nobias": (lambda: nn.LayerNorm(4, bias=False, eps=0.1), randn(B, 3, 4)),
    "rmsnorm": (lambda: nn.RMSNorm(4), randn(B, 4)),
    "rmsnorm-3d": (lambda: nn.RMSNorm(4, eps=0.1), randn(B, 6, 4)),
    "groupnorm": (lambda: nn.GroupNorm(2, 4), randn(B, 4, 5)),
    "groupnorm-2d": (lambda: nn.GroupNorm(4, 4, eps=0.1), randn(B, 4, 5, 3)),
    "groupnorm-flat": (lambda: nn.GroupNorm(2, 4), randn(B, 4)),
}
NORMS = {
    "batchnorm1d": (lambda: nn.BatchNorm1d(4), randn(B, 4)),
    "batchnorm1d-3d": (lambda: nn.BatchNorm1d(4), randn(B, 4, 6)),
    "batchnorm2d": (lambda: nn.BatchNorm2d(4, eps=0.1), randn(B, 4, 3, 5)),
    "batchnorm3d": (lambda: nn.BatchNorm3d(2), randn(B, 2, 2, 3, 2)),
    "batchnorm-nostats": (lambda: nn.BatchNorm1d(4, track_running_stats=False), randn(B, 4)),
}


class Case:
    """A module, its layer, and everything autograd says about it."""

    def __init__(self, name, only=None, mode="train"):
        build, self.x = (CASES | NORMS)[name]
        torch.manual_seed(1)
        self.module = build().double()
        for p in self.module.parameters():
            nn.init.normal_(p)
        for b in self.module.buffers():
            if b.is_floating_point():
                b.copy_(torch.rand_like(b) + 0.5)
        self.module.train(mode == "train")
        self.names = tuple(
            n
            for n in ("weight", "bias")
            if getattr(self.module, n, None) is not None and only in (None, n)
        )
        self.layer = kind_of(self.module)(self.module, self.names)
        self.params = tuple(getattr(self.module, n).detach() for n in self.names)
        capture = self.layer.capture(self.module, (self.x,), {})
        self.a = self.layer.features(capture, F64)
        buffers = {n: b.clone() for n, b in self.module.named_buffers()}
        self.h = self.module(self.x).detach()
        self.module.load_state_dict(buffers, strict=False)
        self.columns = randn(3, *self.h.shape, seed=5)

    def rest(self):
        return {n: p.detach() for n, p in self.module.named_parameters() if n not in self.names} | {
            n: b.clone() for n, b in self.module.named_buffers()
        }

    def call(self, params, x):
        return functional_call(
            self.module, (dict(zip(self.names, params, strict=True)) | self.rest()), (x,)
        )

    def gradient(self, g):
        leaves = tuple(p.clone().requires_grad_() for p in self.params)
        return torch.autograd.grad((self.call(leaves, self.x) * g).sum(), leaves)

    def sample_gradients(self, g):
        """By vmap where a sample stands alone; for batch statistics, of the affine part."""
        if isinstance(self.module, nn.modules.batchnorm._BatchNorm):
            out = []
            for i in range(B):
                only = torch.zeros_like(g)
                only[i] = g[i]
                out.append(self.gradient(only))
            return tuple(torch.stack(parts) for parts in zip(*out, strict=True))

        def loss(params, x, signal):
            return (self.call(params, x[None])[0] * signal).sum()

        return vmap(grad(loss), (None, 0, 0))(self.params, self.x, g)


def cases():
    for name in CASES:
        yield name, None, "train"
    for name in NORMS:
        yield name, None, "train"
        yield name, None, "eval"
    for name in (
        "linear",
        "linear-3d",
        "conv2d-groups",
        "conv2d-reflect",
        "conv1d-groups",
        "conv3d-all",
        "layernorm-3d",
        "groupnorm",
        "batchnorm2d",
    ):
        yield name, "weight", "train"
        yield name, "bias", "train"


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
ALL = pytest.mark.parametrize("case", list(cases()), ids=lambda c: "-".join(map(str, c)))


def close(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@ALL
def test_gradient(case):
    c = Case(*case)
    g = c.columns[0]
    close(c.layer.gradient(c.a, g), c.gradient(g))
    base = tuple(randn(*p.shape, seed=8) for p in c.params)
    expected = tuple(b - 0.5 * d for b, d in zip(base, c.gradient(g), strict=True))
    close(c.layer.add_gradient(base, c.a, g, -0.5), expected)


@ALL
def test_sample_gradients(case):
    c = Case(*case)
    g = c.columns[0]
    close(c.layer.sample_gradients(c.a, g), c.sample_gradients(g))


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("conv")])
def test_sample_gradients_from_patches_and_from_convolutions(name, monkeypatch):
    """Which of the two it is depends on sizes; both are right."""
    c = Case(name)
    g = c.columns[0]
    expected = c.sample_gradients(g)
    for many in (0, math.inf):
        monkeypatch.setattr(conv_layer, "MANY", many)
        close(c.layer.sample_gradients(c.a, g), expected)


@ALL
def test_apply(case):
    """``g(x; delta)`` is how the output moves if the parameters move by delta."""
    c = Case(*case)
    delta = tuple(randn(*p.shape, seed=9) for p in c.params)
    moved = tuple(p + d for p, d in zip(c.params, delta, strict=True))
    expected = c.call(moved, c.x).detach() - c.call(c.params, c.x).detach()
    found = c.layer.apply(c.a, delta)
    if isinstance(c.module, nn.Embedding) and c.module.padding_idx is not None:
        # The padding row never moves: its gradient is zero.
        keep = (c.x != c.module.padding_idx).unsqueeze(-1)
        found, expected = found * keep, expected * keep
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def dense_metrics(c):
    """Every metric the layer admits, with its dense M^-1 / its rates, as flat matrices."""
    sizes = [p.numel() for p in c.params]
    rates = tuple(0.3 if i == 0 else 0.7 for i in range(len(sizes)))
    rate_vector = torch.cat(
        [torch.full((n,), r, dtype=F64) for n, r in zip(sizes, rates, strict=True)]
    )
    yield "identity", metrics.Metric(rates), torch.diag(rate_vector)
    equal = (0.4,) * len(sizes)
    yield "identity-equal", metrics.Metric(equal), 0.4 * torch.eye(sum(sizes), dtype=F64)
    scales = tuple(randn(*p.shape, seed=3).abs() + 0.1 for p in c.params)
    flat = torch.cat([s.flatten() for s in scales])
    yield "diagonal", metrics.Diagonal(rates, scales), torch.diag(rate_vector / flat)
    if not c.layer.kronecker:
        return
    groups, out, inner = c.layer.to_matrix(c.params).shape
    a = torch.stack([_spd(inner, i) for i in range(groups)])
    b = torch.stack([_spd(out, 10 + i) for i in range(groups)])
    # The linear map from flat parameters to the flat blocks, by unit vectors.
    unit = torch.eye(sum(sizes), dtype=F64)
    stacked = tuple(
        part.reshape(-1, *p.shape) for part, p in zip(unit.split(sizes, 1), c.params, strict=True)
    )
    to = c.layer.to_matrix(stacked).flatten(1).t()
    blocks = torch.block_diag(
        *(torch.kron(torch.linalg.inv(y), torch.linalg.inv(x)) for x, y in zip(a, b, strict=True))
    )
    metric = metrics.Kronecker(equal, c.layer, torch.linalg.inv(a), torch.linalg.inv(b))
    yield "kronecker", metric, 0.4 * to.t() @ blocks @ to
    ua, ub = torch.linalg.eigh(a)[1], torch.linalg.eigh(b)[1]
    scales = randn(groups, out, inner, seed=4).abs() + 0.2
    blocks = torch.block_diag(
        *(
            torch.kron(y, x) @ torch.diag(1 / s.flatten()) @ torch.kron(y, x).t()
            for x, y, s in zip(ua, ub, scales, strict=True)
        )
    )
    yield "eigen", Eigen(equal, c.layer, ua, ub, scales), 0.4 * to.t() @ blocks @ to


def _spd(n, seed):
    x = randn(n, n + 2, seed=seed)
    return x @ x.t() / n + 0.2 * torch.eye(n, dtype=F64)


def flat_columns(c, fold=1):
    """Per-sample gradients of all columns, (B / fold, parameters, r)."""
    out = []
    for g in c.columns:
        parts = [p.flatten(1) for p in c.sample_gradients(g)]
        out.append(torch.cat(parts, 1))
    stacked = torch.stack(out, -1)
    return stacked.reshape(-1, fold, *stacked.shape[1:]).sum(1)


@ALL
def test_gram_matrices(case):
    """``P_u^T Q_uu^-1 P_u`` under every metric, one column and several."""
    c = Case(*case)
    p = flat_columns(c)
    for name, metric, dense in dense_metrics(c):
        expected = p.transpose(1, 2) @ dense @ p
        found = c.layer.gram(c.a, c.columns, metric)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10, msg=name)
        one = c.layer.gram(c.a, c.columns[:1], metric)
        torch.testing.assert_close(one, expected[:, :1, :1], rtol=1e-9, atol=1e-10, msg=name)


@ALL
def test_solve(case):
    c = Case(*case)
    d = tuple(randn(*p.shape, seed=6) for p in c.params)
    flat = torch.cat([x.flatten() for x in d])
    many = tuple(randn(2, 3, *p.shape, seed=6) for p in c.params)
    for name, metric, dense in dense_metrics(c):
        rates = torch.cat(
            [
                torch.full((p.numel(),), r, dtype=F64)
                for p, r in zip(c.params, metric.rates, strict=True)
            ]
        )
        found = torch.cat([x.flatten() for x in metric.solve(d)])
        torch.testing.assert_close(found * rates, dense @ flat, rtol=1e-9, atol=1e-10, msg=name)
        batched = metric.solve(many)
        for i in range(2):
            single = metric.solve(tuple(x[i, 1] for x in many))
            close(tuple(x[i, 1] for x in batched), single)


@pytest.mark.parametrize("name", ["linear", "linear-3d", "conv2d-groups", "embedding", "layernorm"])
def test_gram_of_folded_rows(name):
    """Consecutive rows that belong to one sample are added up before products are taken."""
    c = Case(name)
    c.x, c.a, c.columns = c.x[:4], c.a[:4], c.columns[:, :4]
    p = flat_columns(c, fold=2)
    for label, metric, dense in dense_metrics(c):
        found = c.layer.gram(c.a, c.columns, metric, fold=2)
        expected = p.transpose(1, 2) @ dense @ p
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10, msg=label)


def test_gram_in_chunks(monkeypatch):
    """Per-sample gradients formed a few samples at a time give the same."""
    import ocnopt.layers.base as base

    c = Case("conv2d-groups")
    metric = metrics.Metric((0.3, 0.7))
    whole = c.layer.gram(c.a, c.columns, metric)
    monkeypatch.setattr(base, "CHUNK", 1)
    torch.testing.assert_close(c.layer.gram(c.a, c.columns, metric), whole)


MATRIX = pytest.mark.parametrize(
    "name,only",
    [
        (name, only)
        for name, (build, _) in CASES.items()
        for only in (None, "weight", "bias")
        if name.startswith(("linear", "conv")) and (only != "bias" or build().bias is not None)
    ],
)


@pytest.mark.parametrize("fold", [1, 2])
@MATRIX
def test_gram_from_inputs_and_signals(name, only, fold):
    """At many locations, of several groups, as if per-sample gradients had been formed."""
    c = Case(name, only)
    if fold == 2:
        c.x, c.a, c.columns = c.x[:4], c.a[:4], c.columns[:, :4]
    p = flat_columns(c, fold)
    rows, cols = c.layer.factors(c.a, c.columns, fold)
    seen = set()
    for label, metric, dense in dense_metrics(c):
        if metric.factored:
            expected = p.transpose(1, 2) @ dense @ p
            found = metric.factor_gram(rows, cols)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10, msg=label)
            seen.add(label)
    assert {"identity-equal", "kronecker", "eigen"} <= seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk", [1 << 24, 1])
def test_gram_of_a_wide_convolution_on_a_small_image(monkeypatch, chunk, dtype):
    """Without per-sample gradients, all samples at once or in chunks."""
    import ocnopt.layers.base as base

    module = nn.Conv2d(24, 32, 3, padding=1, groups=2).to(dtype)
    layer = kind_of(module)(module, ("weight", "bias"))
    x, columns = randn(5, 24, 2, 2).to(dtype), randn(2, 5, 32, 2, 2, seed=1).to(dtype)
    gradients = layer.column_gradients(x, columns)
    monkeypatch.setattr(base, "CHUNK", chunk)
    a = torch.stack([torch.linalg.inv(_spd(109, i)) for i in range(2)]).to(dtype)
    b = torch.stack([torch.linalg.inv(_spd(16, 5 + i)) for i in range(2)]).to(dtype)
    bases = torch.linalg.eigh(a)[1], torch.linalg.eigh(b)[1]
    # Most directions are hardly curved: Gram numbers come from the salient ones and from norms.
    scales = 0.1 + torch.where(torch.arange(109) > 99, 5.0, 1e-6).expand(2, 16, 109).to(dtype)
    for metric in (
        metrics.Metric((0.3, 0.3)),
        metrics.Kronecker((0.3, 0.3), layer, a, b),
        Eigen((0.3, 0.3), layer, *bases, scales),
        Eigen((0.3, 0.3), layer, *bases, scales, 0.01),
    ):
        expected = metric.sample_gram(gradients)
        with monkeypatch.context() as patch:
            patch.setattr(type(metric), "sample_gram", None)
            found = layer.gram(x, columns, metric)
        rough = 1e-3 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(found, expected, rtol=rough, atol=rough)


@MATRIX
def test_matrix_round_trip(name, only):
    c = Case(name, only)
    many = tuple(randn(2, 3, *p.shape, seed=6) for p in c.params)
    close(c.layer.from_matrix(c.layer.to_matrix(c.params)), c.params)
    close(c.layer.from_matrix(c.layer.to_matrix(many)), many)
    assert c.layer.to_matrix(many).shape[:2] == (2, 3)


@MATRIX
def test_rows_and_cols_make_the_gradient(name, only):
    """The sum over samples and locations of ``cols rows^T`` is the gradient as a matrix."""
    c = Case(name, only)
    g = c.columns[0]
    rows, cols = c.layer.rows(c.a), c.layer.cols(g)
    assert rows.shape[:3] == cols.shape[:3]
    found = torch.einsum("blgo,blgi->goi", cols, rows)
    torch.testing.assert_close(found, c.layer.to_matrix(c.gradient(g)), rtol=1e-10, atol=1e-11)


def test_registry_covers_what_is_tested():
    from ocnopt.layers import KINDS, StackedLinear

    tested = {type(build()) for build, _ in (CASES | NORMS).values()}
    assert set(KINDS) == tested | {StackedLinear}  # which test_stacked.py holds to nn.Linear


@pytest.mark.parametrize(
    "module", [nn.Bilinear(2, 2, 2), nn.ConvTranspose2d(2, 2, 3), nn.LSTM(2, 2), nn.PReLU()]
)
def test_unknown_kinds_say_so(module):
    reason = kind_of(module)
    assert isinstance(reason, str) and type(module).__name__ in reason
