"""Small networks that branch, with their stages by hand under the first and last alignment."""

import torch
from torch import nn


class Residual(nn.Module):
    """Two blocks of two layers; the first with a projection, the second with an identity."""

    stages = (("stem",), ("one", "skip"), ("two",), ("three",), ("four",), ("head",))
    late = (("stem",), ("one",), ("two", "skip"), ("three",), ("four",), ("head",))

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.one, self.two, self.skip = (
            nn.Linear(5, 4),
            nn.Linear(4, 3),
            nn.Linear(5, 3, bias=False),
        )
        self.three, self.four = nn.Linear(3, 4), nn.Linear(4, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        z = torch.tanh(self.stem(x))
        z = torch.tanh(self.two(torch.tanh(self.one(z))) + self.skip(z))
        return self.head(torch.tanh(self.four(torch.tanh(self.three(z))) + z))


class Branching(nn.Module):
    """Three branches of depths 1, 1 and 2, concatenated."""

    stages = (("stem",), ("a", "b", "c"), ("d",), ("head",))
    late = (("stem",), ("c",), ("a", "b", "d"), ("head",))

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 3, bias=False)
        self.c, self.d = nn.Linear(4, 2), nn.Linear(2, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        z = torch.tanh(self.stem(x))
        parts = [self.a(z), self.b(z), self.d(torch.tanh(self.c(z)))]
        return self.head(torch.tanh(torch.cat(parts, 1)))


class Convolutional(nn.Module):
    """A residual block of convolutions with a strided 1x1 shortcut."""

    stages = (("stem",), ("one", "skip"), ("two",), ("head",))
    late = (("stem",), ("one",), ("two", "skip"), ("head",))

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.one = nn.Conv2d(2, 2, 3, stride=2, padding=1)
        self.two = nn.Conv2d(2, 3, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(2, 3, 1, stride=2)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        z = torch.tanh(self.stem(x.reshape(-1, 1, 2, 2).repeat(1, 1, 2, 2)))
        z = torch.tanh(self.two(torch.tanh(self.one(z))) + self.skip(z))
        return self.head(z.mean((2, 3)))


class Attention(nn.Module):
    """Query, key and value act at one stage, over several locations."""

    stages = (("stem",), ("k", "q", "v"), ("out",), ("head",))
    late = stages

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(2, 3)
        self.q, self.k = nn.Linear(3, 2), nn.Linear(3, 2, bias=False)
        self.v, self.out = nn.Linear(3, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 3)
        with torch.no_grad():
            for layer in (self.q, self.k, self.v, self.out):
                layer.weight *= 3  # so that query and key have gradients to speak of

    def forward(self, x):
        z = torch.tanh(self.stem(x.reshape(-1, 2, 2)))
        weights = (self.q(z) @ self.k(z).mT).softmax(-1)
        return self.head((z + self.out(weights @ self.v(z))).mean(1))


NETS = {net.__name__: net for net in (Residual, Branching, Convolutional, Attention)}
