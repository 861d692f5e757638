"""Attention blocks: what cannot be recorded falls back by name, and everything trains."""

import pytest
import torch
from promises.conformance import OPTIMIZERS, assert_feedback_active
from torch import nn

import ocnopt


class Encoder(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.rows_first = batch_first
        self.embed = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x if self.rows_first else x.transpose(0, 1)
        x = self.layer(x)
        return self.head(x.mean(1 if self.rows_first else 0))


class Attention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.rows_first = batch_first
        self.embed = nn.Linear(5, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x if self.rows_first else x.transpose(0, 1)
        x, _ = self.attend(x, x, x)
        return self.head(x.mean(1 if self.rows_first else 0))


def made(kind, batch_first):
    torch.manual_seed(0)
    if kind == "encoder":
        return Encoder(batch_first).double(), torch.randint(11, (6, 4))
    return Attention(batch_first).double(), torch.randn(6, 4, 5, dtype=torch.float64)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["encoder", "attention"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_and_says_what_falls_back(name, kind, batch_first):
    model, x = made(kind, batch_first)
    y = torch.randint(3, (6,))
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    # The bias of the keys has no influence on attention; everything else must have moved.
    for n, p in model.named_parameters():
        assert n.endswith("in_proj_bias") or not torch.equal(p, before[n]), n
    if name.startswith("DDPNOpt"):
        assert_feedback_active(optimizer)
    rows = {row.parameter: row for row in optimizer.coverage()}
    assert set(rows) == set(before)
    inner = "layer.self_attn." if kind == "encoder" else "attend."
    for part in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
        row = rows[inner + part]
        assert row.treatment == "first-order"
        assert "MultiheadAttention" in row.reason, row
    assert rows["head.weight"].treatment == "player"
    assert rows["head.weight"].reason == ""
    assert rows["embed.weight"].treatment == "player" or "EKFAC" in name or "KFAC" in name
    if kind == "encoder":
        outside = rows["layer.linear1.weight"]
        assert outside.treatment == ("player" if batch_first else "first-order")
        assert batch_first or "batch_first" in outside.reason


def test_time_first_rows_are_not_taken_for_samples():
    """As many positions as samples: the shapes alone would not tell them apart."""
    torch.manual_seed(0)
    model = Encoder(False).double()
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    criterion(model(torch.randint(11, (6, 6))), torch.randint(3, (6,))).backward()
    optimizer.step()
    rows = {row.parameter: row for row in optimizer.coverage()}
    assert rows["layer.linear1.weight"].treatment == "first-order"
    assert rows["layer.norm1.weight"].treatment == "first-order"
    assert rows["embed.weight"].treatment == "player"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_evaluation_with_the_fast_path(name):
    model, x = made("encoder", True)
    y = torch.randint(3, (6,))
    criterion = nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[name](model, criterion)
    criterion(model(x), y).backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        fast = model(x)
    slow = model(x)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
    model.train()
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()
    assert {r.treatment for r in optimizer.coverage()} == {"player", "first-order"}


def test_fallback_moves_as_the_lender_does():
    """The first-order parameters take the very step of SGD."""
    model, x = made("attention", True)
    y = torch.randint(3, (6,))
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.1)
    criterion(model(x), y).backward()
    names = [r.parameter for r in optimizer.coverage() if r.treatment == "first-order"]
    assert len(names) == 4
    params = dict(model.named_parameters())
    expected = {n: params[n].detach() - 0.1 * params[n].grad for n in names}
    optimizer.step()
    for n in names:
        torch.testing.assert_close(params[n].detach(), expected[n], rtol=1e-14, atol=0)
