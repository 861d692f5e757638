"""Small networks of every shape that a game is found in, each with a batch of inputs."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def mlp():
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    return net, torch.randn(4, 5)


def cnn():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(4 * 4 * 4, 3),
    )
    return net, images()


def images():
    return torch.randn(3, 2, 8, 8)


def norm_of(kind, channels):
    made = {
        "none": nn.Identity,
        "batch": lambda: nn.BatchNorm2d(channels),
        "group": lambda: nn.GroupNorm(2, channels),
    }
    return made[kind]()


class Residual(nn.Module):
    """A post-activation block: the sum is written in place, and so is the activation."""

    def __init__(self, inputs, width, shortcut, norm, depth=2):
        super().__init__()
        stride = 1 if inputs == width else 2
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        for i in range(depth):
            first = i == 0
            self.convs.append(
                nn.Conv2d(inputs if first else width, width, 3, stride if first else 1, padding=1)
            )
            self.norms.append(norm_of(norm, width))
        self.relu = nn.ReLU(inplace=True)
        self.kind = shortcut
        self.extra = width - inputs
        if shortcut == "projection":
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), norm_of(norm, width)
            )

    def aside(self, x):
        if self.kind == "projection":
            return self.shortcut(x)
        if self.kind == "padded" and self.extra:
            return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra))
        return x

    def forward(self, x):
        h = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = norm(conv(h))
            if i + 1 < len(self.convs):
                h = self.relu(h)
        h += self.aside(x)
        return self.relu(h)


class PreActivation(nn.Module):
    """He et al. 2016b: normalization and activation come first, also for the shortcut."""

    def __init__(self, inputs, width, norm):
        super().__init__()
        self.norm1, self.norm2 = norm_of(norm, inputs), norm_of(norm, width)
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, width, 1) if inputs != width else None

    def forward(self, x):
        h = F.relu(self.norm1(x))
        aside = x if self.shortcut is None else self.shortcut(h)
        h = self.conv2(F.relu(self.norm2(self.conv1(h)), inplace=True))
        return h + aside


def residual(shortcut, norm):
    last = 6 if shortcut != "identity" else 4
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        Residual(4, 4, "identity", norm),
        Residual(4, last, shortcut, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(last, 3),
    )
    return net, images()


def pre_activation(norm):
    net = nn.Sequential(
        PreActivation(2, 4, "none"),
        PreActivation(4, 6, norm),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    return net, images()


class InceptionBlock(nn.Module):
    """Branches of 1, 2 and 3 layers and a pooled one, concatenated."""

    def __init__(self, inputs):
        super().__init__()
        self.one = nn.Conv2d(inputs, 2, 1)
        self.two1, self.two2 = nn.Conv2d(inputs, 2, 1), nn.Conv2d(2, 2, 3, padding=1)
        self.three1 = nn.Conv2d(inputs, 2, 1)
        self.three2 = nn.Conv2d(2, 2, 3, padding=1)
        self.three3 = nn.Conv2d(2, 2, 3, padding=1)
        self.pooled = nn.Conv2d(inputs, 2, 1)

    def forward(self, x):
        two = self.two2(F.relu(self.two1(x)))
        three = self.three3(torch.relu_(self.three2(F.relu(self.three1(x)))))
        pooled = self.pooled(F.max_pool2d(x, 3, 1, padding=1))
        return F.relu(torch.cat([self.one(x), two, three, pooled], 1))


def inception():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        InceptionBlock(4),
        InceptionBlock(8),
        nn.Flatten(),
        nn.Linear(512, 3),
    )
    return net, images()


class Dense(nn.Module):
    """DenseNet: every layer reads all before it."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(2 + 3 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(2 + 3 * i, 3, 3, padding=1) for i in range(3))
        self.head = nn.Linear(11, 3)

    def forward(self, x):
        features = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(torch.relu(norm(torch.cat(features, 1)))))
        return self.head(torch.cat(features, 1).mean((2, 3)))


class UNet(nn.Module):
    """Down and up again, with skips across; one skip has a layer of its own."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.middle = nn.Conv2d(6, 6, 3, padding=1)
        self.across = nn.Conv2d(4, 2, 1)
        self.up = nn.Conv2d(12, 4, 3, padding=1)
        self.last = nn.Conv2d(6, 1, 1)

    def forward(self, x):
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(F.max_pool2d(a, 2)))
        m = F.relu(self.middle(F.max_pool2d(b, 2)))
        u = self.up(torch.cat([F.interpolate(m, scale_factor=2.0), b], 1))
        u = F.interpolate(F.relu(u), scale_factor=2.0)
        return self.last(torch.cat([u, self.across(a)], 1))


class Attention(nn.Module):
    """A transformer block with separate maps for queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def heads(self, x):
        return x.view(x.size(0), x.size(1), 2, 4).transpose(1, 2)

    def forward(self, tokens):
        x = self.embed(tokens)
        h = self.norm1(x)
        q, k, v = self.heads(self.q(h)), self.heads(self.k(h)), self.heads(self.v(h))
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)), -1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(h.shape))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


class Shared(nn.Module):
    """One layer three times, another beside it."""

    def __init__(self):
        super().__init__()
        self.stem, self.again, self.aside = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        y = torch.tanh(self.again(torch.tanh(self.again(x))))
        return self.head(self.again(y + self.aside(x)))


class TwoInputs(nn.Module):
    """Two towers of different depth, an optional third input, several outputs."""

    def __init__(self):
        super().__init__()
        self.a1, self.a2, self.a3 = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 3)
        self.unused = nn.Linear(6, 2)

    def forward(self, x, y, mask=None):
        a = self.a3(torch.relu(self.a2(torch.relu(self.a1(x)))))
        b = self.norm(self.b(y))
        self.unused(b)
        if mask is not None:
            a = a * mask
        return {"out": self.head(self.scale * a + b), "features": [a, b]}


class Encoder(nn.Module):
    """torch's own transformer, on embeddings of tokens and positions."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 8), nn.Embedding(6, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(self.encoder(x).mean(1))


def tokens():
    return torch.randint(7, (3, 5))


#: Networks that torch.fx can trace, by name; each returns the network and a batch.
TRACED = {
    "mlp": mlp,
    "cnn": cnn,
    **{
        f"residual {shortcut} {norm}": lambda shortcut=shortcut, norm=norm: residual(shortcut, norm)
        for shortcut in ("identity", "padded", "projection")
        for norm in ("none", "batch", "group")
    },
    **{
        f"pre-activation {norm}": lambda norm=norm: pre_activation(norm)
        for norm in ("none", "batch", "group")
    },
    "inception": inception,
    "dense": lambda: (Dense(), images()),
    "u-net": lambda: (UNet(), images()),
    "attention": lambda: (Attention(), tokens()),
    "shared": lambda: (Shared(), torch.randn(4, 5)),
}
#: Those whose batch statistics make no difference between a batch and its parts.
PER_SAMPLE = [name for name in TRACED if "batch" not in name and name != "dense"]


def made(name):
    torch.manual_seed(0)
    return TRACED[name]()
