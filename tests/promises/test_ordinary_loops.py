"""Things that ordinary loops do, and that must not make a step silently wrong."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import ocnopt


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(seed=0, size=12):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator)


def step(model, optimizer, loss):
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


def same(left, right, tolerance=1e-5):
    for a, b in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_penalty_on_weights_is_kept_without_autograds_gradients(set_to_none):
    criterion = nn.CrossEntropyLoss()
    x, y = batch()
    models = []
    for keep in (True, False):
        model = mlp()
        optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.2, keep_grad=keep)
        for _ in range(5):
            optimizer.zero_grad(set_to_none)
            penalty = 1e-2 * sum(p.square().sum() for p in model.parameters())
            (criterion(model(x), y) + penalty).backward()
            optimizer.step()
        models.append(model)
    same(*models)


def none(model):
    for p in model.parameters():
        p.grad = None


def zero(model):
    for p in model.parameters():
        p.grad.zero_()


AWAY = {
    "model.zero_grad": lambda model: model.zero_grad(),
    "model.zero_grad in place": lambda model: model.zero_grad(set_to_none=False),
    "p.grad = None": none,
    "p.grad.zero_": zero,
}


@pytest.mark.parametrize("optimizer_of", [ocnopt.DDPNOpt, ocnopt.DGNOpt])
@pytest.mark.parametrize("when", ["before the forward pass", "after it"])
@pytest.mark.parametrize("how", AWAY)
def test_a_batch_that_is_thrown_away_has_no_part_in_the_next_step(how, when, optimizer_of):
    criterion = nn.CrossEntropyLoss()
    models = []
    for skipped in (True, False):
        model = mlp()
        optimizer = optimizer_of(model, criterion, lr=0.1)
        if skipped:
            criterion(model(5 * batch(1)[0]), batch(1)[1]).backward()
        if skipped and when == "before the forward pass":
            AWAY[how](model)
        x, y = batch(0)
        loss = criterion(model(x), y)
        if skipped and when == "after it":
            AWAY[how](model)
        loss.backward()
        optimizer.step()
        models.append(model)
    same(*models, tolerance=0)


def test_accumulated_gradients_of_zero_are_not_thrown_away():
    """A pass counts though its gradient is zero: its samples are among those of the mean."""
    criterion = ocnopt.Criterion(lambda out, y: (out * y.any()).square().mean())
    models = []
    for order in (1, -1):
        model = mlp()
        optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1, preconditioner="ekfac")
        for y in (torch.zeros(12), torch.ones(12))[::order]:
            criterion(model(batch(int(y[0]))[0]), y).backward()
        assert len(optimizer.recorder.passes) == 2
        optimizer.step()
        models.append(model)
    same(*models)


def test_one_cycle_moves_adams_betas():
    x, y = batch()
    criterion = nn.CrossEntropyLoss()
    models = []
    for ours in (True, False):
        model = mlp()
        optimizer = (
            ocnopt.DDPNOpt(
                model, criterion, lr=0.01, preconditioner="adam", bellman="off", rollout="off"
            )
            if ours
            else torch.optim.Adam(model.parameters(), lr=0.01)
        )
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20)
        for _ in range(20):
            step(model, optimizer, lambda m: criterion(m(x), y))
            scheduler.step()
        models.append(model)
    same(*models)


def test_layers_unfrozen_later_are_trained():
    model, criterion = mlp(), nn.CrossEntropyLoss()
    x, y = batch()
    model[0].requires_grad_(False)
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    step(model, optimizer, lambda m: criterion(m(x), y))
    assert all(row.module != "0" for row in optimizer.coverage())
    model[0].requires_grad_(True)
    start = model[0].weight.detach().clone()
    step(model, optimizer, lambda m: criterion(m(x), y))
    assert not torch.equal(start, model[0].weight)
    rows = [row for row in optimizer.coverage() if row.module == "0"]
    assert rows and all("unfrozen" in row.reason for row in rows)


def test_a_pass_beside_the_criterion_is_first_order_by_name():
    model, criterion = mlp(), nn.CrossEntropyLoss()
    plain = copy.deepcopy(model)
    (x, y), (u, _) = batch(0), batch(1)

    def loss(m):
        first = criterion(m(x), y)
        return first + F.mse_loss(m(u), torch.zeros(12, 3))

    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    step(model, optimizer, loss)
    assert {row.treatment for row in optimizer.coverage()} == {"first-order"}
    assert all("criterion" in row.reason for row in optimizer.coverage())
    step(plain, torch.optim.SGD(plain.parameters(), lr=0.1), loss)
    same(model, plain)


def test_curvature_is_never_negative():
    """A sample's own policy shrinks its share, also where the cost curves downwards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1].weight.fill_(2.0)
    plain = copy.deepcopy(model)
    criterion = ocnopt.Criterion(lambda out, y: (out.sigmoid() - y).square().mean())
    x, y = torch.ones(1, 1), torch.zeros(1, 1)
    step(model, ocnopt.DDPNOpt(model, criterion, lr=8.0), lambda m: criterion(m(x), y))
    step(plain, torch.optim.SGD(plain.parameters(), lr=8.0), lambda m: criterion(m(x), y))
    assert (model[0].weight - 1).abs() <= (plain[0].weight - 1).abs() + 1e-6


def test_maximizing_is_plain_ascent():
    model, criterion = mlp(), nn.CrossEntropyLoss()
    plain = copy.deepcopy(model)
    x, y = batch()
    step(model, ocnopt.DDPNOpt(model, criterion, lr=0.1), lambda m: -criterion(m(x), y))
    step(plain, torch.optim.SGD(plain.parameters(), lr=0.1), lambda m: -criterion(m(x), y))
    same(model, plain)


def test_a_subclass_with_its_own_forward_has_its_own_curvature():
    class Focal(nn.CrossEntropyLoss):
        def forward(self, out, y):
            p = out.softmax(-1).gather(1, y[:, None])[:, 0]
            return (-((1 - p) ** 2) * p.log()).mean()

    def function(out, y):
        return Focal.forward(None, out, y)

    models = []
    x, y = batch()
    for criterion in (Focal(), ocnopt.Criterion(function)):
        model = mlp()
        optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.5)
        for _ in range(3):
            step(model, optimizer, lambda m, criterion=criterion: criterion(m(x), y))
        assert optimizer.diagnostics.total.feedback_share > 0
        models.append(model)
    same(*models)


def test_a_patched_forward_is_no_player():
    model = mlp()
    original = model[0].forward
    model[0].forward = lambda x: 2 * original(x)
    optimizer = ocnopt.DDPNOpt(model, nn.CrossEntropyLoss(), lr=0.1)
    rows = {row.module: row.treatment for row in optimizer.coverage()}
    assert rows["0"] == "first-order"
    assert rows["2"] == "player"


def test_rows_picked_by_mask_are_first_order_by_name():
    model, criterion = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9)), nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    x = torch.randint(9, (4, 6))
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0] = mask[1, :2] = True  # eight rows: twice the samples, by chance
    optimizer.zero_grad()
    criterion(model(x)[mask], x[mask]).backward()
    with pytest.warns(UserWarning, match="ignore_index"):
        optimizer.step()
    assert all("ignore_index" in row.reason for row in optimizer.coverage())


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(9, 6), nn.Embedding(8, 6)
        self.head = nn.Linear(6, 9)

    def forward(self, x):
        return self.head(self.tokens(x) + self.places(torch.arange(x.shape[1]))).transpose(1, 2)


@pytest.mark.parametrize("size", [4, 8])
def test_positions_are_no_samples(size):
    model, criterion = Positions(), nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    x = torch.randint(9, (size, 8))
    step(model, optimizer, lambda m: criterion(m(x), x))
    rows = {row.module: row for row in optimizer.coverage()}
    assert rows["places"].treatment == "first-order" and "positions" in rows["places"].reason
    assert rows["tokens"].treatment == rows["head"].treatment == "player"


def test_several_rows_of_the_layers_make_one_sample():
    """Multiple choice: layers see B * C rows, the criterion B."""
    model, criterion = (
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)),
        (nn.CrossEntropyLoss()),
    )
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.5)
    x, y = torch.randn(5, 3, 4), torch.randint(3, (5,))
    step(model, optimizer, lambda m: criterion(m(x.flatten(0, 1)).view(5, 3), y))
    assert {row.treatment for row in optimizer.coverage()} == {"player"}
    assert optimizer.diagnostics.total.feedback_share > 0


def test_arguments_in_the_wrong_order_are_named():
    model, criterion = mlp(), nn.MSELoss()
    ocnopt_optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    x, _ = batch()
    with pytest.raises(ocnopt.RecordingError, match="first argument"):
        criterion(torch.zeros(12, 3), model(x))
    ocnopt_optimizer.detach()


def test_a_criterion_that_returns_a_dict_is_named():
    criterion = ocnopt.Criterion(lambda out, y: {"loss": F.cross_entropy(out, y)})
    model = mlp()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    x, y = batch()
    criterion(model(x), y)["loss"].backward()
    with pytest.raises(ocnopt.RecordingError, match="dict"):
        optimizer.step()


def test_buffers_of_the_criterion_are_its_own():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, out, y):
            self.calls += 1
            return F.cross_entropy(out, y)

    criterion, model = Counting(), mlp()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    x, y = batch()
    for _ in range(3):
        step(model, optimizer, lambda m: criterion(m(x), y))
    assert float(criterion.calls) == 3


def test_a_hook_that_changes_a_layers_output_is_part_of_the_dynamics():
    x, y = batch()
    criterion = nn.CrossEntropyLoss()

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            h = 3 * self.net[0](x)
            return self.net[1:](h)

    hooked, written = mlp(), Scaled()
    hooked[0].register_forward_hook(lambda module, args, out: 3 * out)
    for model in (hooked, written):
        optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.3)
        for _ in range(3):
            step(model, optimizer, lambda m: criterion(m(x), y))
    same(hooked, written)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.reentrant = reentrant

    def forward(self, x):
        h = torch.tanh(self.first(x))
        if self.reentrant is None:
            return self.last(self.inner(h))
        h = checkpoint(self.inner, h, use_reentrant=self.reentrant)
        return self.last(h)


def test_activation_checkpointing_changes_nothing():
    x, y = batch()
    models = []
    for reentrant in (None, False):
        torch.manual_seed(0)
        model, criterion = Checkpointed(reentrant), nn.CrossEntropyLoss()
        optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.3)
        for _ in range(3):
            step(model, optimizer, lambda m, criterion=criterion: criterion(m(x), y))
        assert {row.treatment for row in optimizer.coverage()} == {"player"}
        models.append(model)
    same(*models)


def test_reentrant_checkpoints_are_first_order_by_name():
    torch.manual_seed(0)
    model, criterion = Checkpointed(True), nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.3)
    x, y = batch()
    before = model.inner[0].weight.detach().clone()
    step(model, optimizer, lambda m: criterion(m(x), y))
    rows = {row.module: row for row in optimizer.coverage()}
    assert rows["inner.0"].treatment == "first-order" and "criterion" in rows["inner.0"].reason
    torch.testing.assert_close(model.inner[0].weight, before - 0.3 * model.inner[0].weight.grad)
