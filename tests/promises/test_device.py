"""A step on an accelerator equals the step on the CPU."""

import copy

import pytest
import torch
from torch import nn

import ocnopt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.fc1 = nn.Linear(36, 8)
        self.fc2 = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 3)

    def forward(self, x):
        h = torch.relu(self.norm(self.conv(x))).flatten(1)
        h = torch.tanh(self.fc1(h))
        return self.fc3(h + torch.tanh(self.fc2(h)))


@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
@pytest.mark.parametrize("terminal", ["bounded", "matched", "gauss-newton"])
@pytest.mark.parametrize("bellman", ["share", "joint", "literal"])
@pytest.mark.parametrize("preconditioner", ["identity", "rmsprop", "adam", "kfac", "ekfac"])
def test_same_steps(preconditioner, bellman, terminal, rollout):
    torch.manual_seed(0)
    here = Net().double()
    there = copy.deepcopy(here).cuda()
    criterion = nn.CrossEntropyLoss()
    x, y = torch.randn(6, 1, 8, 8).double(), torch.randint(3, (6,))
    for model, inputs, labels in ((here, x, y), (there, x.cuda(), y.cuda())):
        optimizer = ocnopt.DDPNOpt(
            model,
            criterion,
            lr=0.01,
            preconditioner=preconditioner,
            bellman=bellman,
            terminal=terminal,
            rollout=rollout,
            momentum=0.9,
        )
        for _ in range(3):
            optimizer.zero_grad()
            criterion(model(inputs), labels).backward()
            optimizer.step()
        assert optimizer.diagnostics.total.feedback_share > 0
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("preconditioner", ["identity", "rmsprop", "adam", "kfac", "ekfac"])
def test_half_precision_with_a_scaler(preconditioner):
    torch.manual_seed(0)
    model = Net().cuda()
    criterion = nn.CrossEntropyLoss()
    optimizer = ocnopt.DDPNOpt(model, criterion, lr=0.003, preconditioner=preconditioner)
    scaler = torch.amp.GradScaler("cuda")
    x, y = torch.randn(32, 1, 8, 8).cuda(), torch.randint(3, (32,)).cuda()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = criterion(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
