"""What users of DGNOpt are promised: alignments, bandits, parties that part, plain messages."""

import copy
import gc
import re
from fractions import Fraction

import games
import numpy as np
import pytest
import torch
from control.test_random_paths import CHANCE, Deep
from promises.conformance import (
    assert_state_equal,
    assert_weights_close,
    assert_weights_equal,
    images,
    rule,
    step,
    weights,
)
from promises.test_checkpoint import saved
from torch import nn

import ocnopt
from ocnopt.control.alignment import EpsilonGreedy, Exp3PlusPlus, RandomAlignment
from ocnopt.layers import StackedLinear


def net(name="Residual", seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return games.NETS[name]().to(dtype)


def batch(seed, dtype=torch.float64, size=8):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=make, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (size,), generator=make)


def dgnopt(model, criterion, **options):
    options = {"lr": 0.05, "preconditioner": rule("kfac"), **options}
    return ocnopt.DGNOpt(model, criterion, **options)


def train(model, optimizer, steps, criterion, start=0, dtype=torch.float64):
    for i in range(start, start + steps):
        step(model, optimizer, criterion, *batch(i, dtype))


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize(
    "make", [lambda: EpsilonGreedy(0.5, every=2), lambda: Exp3PlusPlus(every=2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_interrupted_game_goes_on_bit_for_bit(dtype, make, kind):
    """Between two refreshes, in the middle of a round, with cross factors and an arm in play."""
    one, criterion = net(dtype=dtype), nn.CrossEntropyLoss()
    options = {"preconditioner": rule(kind), "momentum": 0.5}
    first = dgnopt(one, criterion, alignment=make(), **options)
    train(one, first, 5, criterion, dtype=dtype)
    model_state, state = saved(one.state_dict()), saved(first.state_dict())
    train(one, first, 6, criterion, 5, dtype)

    two = net(seed=9, dtype=dtype)
    second = dgnopt(two, criterion, alignment=make(), **options)
    two.load_state_dict(model_state)
    second.load_state_dict(state)
    train(two, second, 6, criterion, 5, dtype)
    assert_weights_equal(one, two)
    assert_state_equal(first.state_dict(), second.state_dict())
    assert first.state_dict()["alignment"] == second.state_dict()["alignment"]
    assert len(first.diagnostics.rounds) == 5
    assert len({done.arm for done in first.diagnostics.rounds}) == 2


@pytest.mark.parametrize("alignment", ["late", "random", "epsilon-greedy"])
def test_a_game_of_random_depth_goes_on_bit_for_bit_where_it_was_found_by_other_numbers(alignment):
    def built(seed):
        torch.manual_seed(seed)
        model = Deep(CHANCE["torch"]).double()
        return model, dgnopt(model, nn.CrossEntropyLoss(), alignment=alignment, momentum=0.5)

    for seed in range(1, 5):
        one, first = built(0)
        criterion = first.criterion
        train(one, first, 5, criterion)
        model_state, state = saved(one.state_dict()), saved(first.state_dict())
        drawn = torch.get_rng_state()
        train(one, first, 5, criterion, 5)

        two, second = built(seed)
        two.load_state_dict(model_state)
        second.load_state_dict(state)
        torch.set_rng_state(drawn)
        train(two, second, 5, second.criterion, 5)
        assert_weights_equal(one, two)
        assert_state_equal(first.state_dict(), second.state_dict())
        assert second.game.alignments == 2


def test_switching_alignments_keeps_every_layers_state():
    model, criterion = net(), nn.CrossEntropyLoss()
    bandit = RandomAlignment(every=None)
    optimizer = dgnopt(model, criterion, alignment=bandit, momentum=0.5)
    train(model, optimizer, 3, criterion)
    before = copy.deepcopy(optimizer.state_dict())["state"]
    arm = optimizer.alignment
    while optimizer.alignment == arm:
        optimizer.reward(0.5)
    for key, mine in optimizer.state_dict()["state"].items():
        for name, value in mine.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[key][name])), name
    train(model, optimizer, 2, criterion, 3)
    pairs = [k for s in optimizer.state.values() for k in s if k.startswith("A with")]
    assert pairs == ["A with skip"] * 2  # one pair per alignment, both kept


def test_every_alignment_leaves_the_forward_pass_unchanged():
    x, _ = batch(0)
    for name in games.NETS:
        model = net(name).eval()
        game = ocnopt.control.game.find_game(model)
        for k in range(game.alignments):
            assert torch.equal(game.run(x, alignment=k), model(x))


def test_rounds_end_by_themselves_and_by_the_user():
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = dgnopt(model, criterion, alignment=EpsilonGreedy(0.3, every=3))
    train(model, optimizer, 7, criterion)
    rounds = optimizer.diagnostics.rounds
    assert len(rounds) == 2
    assert all(0 <= done.reward <= 1 for done in rounds)
    assert optimizer.diagnostics.as_dict()["rounds"][0]["arm"] == rounds[0].arm

    model = net()
    optimizer = dgnopt(model, criterion, alignment=EpsilonGreedy(0.3))
    with pytest.raises(ocnopt.OptionError, match=r"\[0, 1\]"):
        optimizer.reward(1.5)
    train(model, optimizer, 7, criterion)
    assert optimizer.diagnostics.rounds == ()
    optimizer.reward(torch.tensor(0.9))
    assert optimizer.diagnostics.rounds[0].reward == pytest.approx(0.9)


def test_a_bandit_finds_the_alignment_that_is_rewarded():
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = dgnopt(model, criterion, alignment=EpsilonGreedy(0.1, seed=3))
    train(model, optimizer, 1, criterion)
    for _ in range(200):
        optimizer.reward(0.9 if optimizer.alignment == 1 else 0.2)
    arms = [done.arm for done in optimizer.diagnostics.rounds]
    assert arms[100:].count(1) > 80


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"information": "all"}, "information='all' is not known"),
        ({"alignment": "middle"}, "alignment='middle' is not known"),
        ({"alignment": 2}, "the network has 2 alignments"),
        ({"fictitious": "evil"}, "fictitious='evil' is not known"),
        ({"fictitious": "adversarial", "penalty": 0.0}, "penalty=0.0"),
        ({"fictitious": "adversarial", "terminal": "gauss-newton"}, "rank one"),
        ({"fictitious": "cooperative", "information": "open-loop"}, "open-loop"),
        ({"alignment": {"skip": 1}}, r"cannot be a dict \(mappings"),
        ({"alignment": [0, 1]}, "cannot be a list; choose one of auto, early"),
        ({"alignment": 1.0}, "cannot be a float; choose one of auto, early"),
        ({"alignment": True}, "cannot be a bool"),
        ({"alignment": EpsilonGreedy}, "cannot be a ABCMeta"),
        ({"game": [["stem"], ["head"]]}, "game: expected a Game, got list"),
        ({"penalty": -1.0}, "penalty=-1.0, but it must be positive and finite"),
        ({"penalty": float("nan")}, "penalty=nan"),
        ({"penalty": float("inf"), "information": "open-loop"}, "penalty=inf"),
        ({"penalty": "1"}, "penalty='1'"),
        ({"penalty": True}, "penalty=True"),
        ({"penalty": np.float32(0)}, "penalty=.*must be positive and finite"),
        ({"bellman": "off", "rollout": "off"}, "use information='open-loop'"),
        (
            {"bellman": "off", "rollout": "off", "information": "feedback"},
            "information='feedback' with bellman='off' and rollout='off' leaves nothing",
        ),
        (
            {"information": "open-loop", "keep_grad": False},
            "keep_grad=False, but with information='open-loop'",
        ),
        (
            {"information": "open-loop", "keep_policy": True},
            "keep_policy=True, but with information='open-loop' there is no policy",
        ),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ocnopt.OptionError, match=message):
        dgnopt(net(), nn.CrossEntropyLoss(), **options)


@pytest.mark.parametrize("number", [np.float32(0.5), np.float16(0.5), Fraction(1, 2)], ids=repr)
def test_a_penalty_may_be_any_real_number(number):
    models = []
    for penalty in (number, 0.5):
        criterion, model = nn.CrossEntropyLoss(), net()
        optimizer = dgnopt(model, criterion, fictitious="adversarial", penalty=penalty)
        train(model, optimizer, 2, criterion)
        models.append(model)
    assert_weights_equal(*models)


class Unequal(nn.Module):
    """A shortcut that has other locations than the first layer beside it."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(1, 2, 3, padding=1)
        self.two = nn.Conv2d(2, 2, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(1, 2, 1, stride=2)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        x = x.reshape(-1, 1, 2, 2).repeat(1, 1, 2, 2)
        return self.head((self.two(torch.tanh(self.one(x))) + self.skip(x)).mean((2, 3)))


def test_unequal_locations_act_alone_and_say_so():
    torch.manual_seed(0)
    mine, criterion = Unequal().double(), nn.CrossEntropyLoss()
    theirs = copy.deepcopy(mine)
    first = dgnopt(mine, criterion, alignment="early")
    second = dgnopt(theirs, criterion, alignment="early", information="feedback")
    train(mine, first, 4, criterion)
    train(theirs, second, 4, criterion)
    assert_weights_equal(mine, theirs)
    reasons = {row.module: row.reason for row in first.coverage()}
    assert "4 locations against 16" in reasons["skip"]
    assert "16 locations against 4" in reasons["one"]
    assert reasons["two"] == ""

    late = dgnopt(net("Convolutional"), criterion, alignment="late")
    train(late.model, late, 1, criterion)
    assert all(row.reason == "" for row in late.coverage())


def test_without_blocks_between_players_group_rational_is_feedback_and_says_so():
    for kind in ("identity", "rmsprop", "adam"):
        mine, criterion = net(), nn.CrossEntropyLoss()
        theirs = copy.deepcopy(mine)
        options = {"preconditioner": rule(kind), "lr": 0.01}
        first = dgnopt(mine, criterion, **options)
        train(mine, first, 4, criterion)
        second = dgnopt(theirs, criterion, information="feedback", **options)
        train(theirs, second, 4, criterion)
        assert_weights_equal(mine, theirs)
        assert any("Kronecker" in row.reason for row in first.coverage())


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", ["Residual", "Branching"])
def test_row_30_without_cross_blocks_group_rational_is_feedback(name, kind, monkeypatch):
    """Players whose gradients share no sample have nothing to answer each other."""
    from ocnopt.control.sweep import Sweep

    plain = Sweep._moments

    def apart(self, pairs):
        return [
            found if one is other else tuple(torch.zeros_like(part) for part in found)
            for (one, other), found in zip(pairs, plain(self, pairs), strict=True)
        ]

    monkeypatch.setattr(Sweep, "_moments", apart)
    mine, criterion = net(name), nn.CrossEntropyLoss()
    theirs = copy.deepcopy(mine)
    train(mine, dgnopt(mine, criterion, preconditioner=rule(kind)), 5, criterion)
    other = dgnopt(theirs, criterion, preconditioner=rule(kind), information="feedback")
    train(theirs, other, 5, criterion)
    assert_weights_close(mine, theirs, 1e-10)


class Erratic(nn.Module):
    """No tracer can follow it: its path depends on values."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        z = torch.tanh(self.one(x))
        return self.head(self.two(z if float(z.detach().sum()) > 1e9 else -z) + x)


def test_a_network_that_cannot_be_traced_is_played_layer_by_layer():
    torch.manual_seed(0)
    mine, criterion = Erratic().double(), nn.CrossEntropyLoss()
    theirs, described = copy.deepcopy(mine), copy.deepcopy(mine)
    optimizer = dgnopt(mine, criterion)
    with pytest.warns(UserWarning, match="game could not be found"):
        train(mine, optimizer, 1, criterion)
    train(mine, optimizer, 3, criterion, 1)
    ddp = ocnopt.DDPNOpt(theirs, criterion, lr=0.05, preconditioner=rule("kfac"))
    train(theirs, ddp, 4, criterion)
    assert_weights_equal(mine, theirs)
    assert optimizer.alignment is None

    game = ocnopt.control.game.Game.described(described, [["one"], ["two"], ["head"]])
    optimizer = dgnopt(described, criterion, game=game)
    train(described, optimizer, 4, criterion)
    assert_weights_equal(described, theirs)
    assert optimizer.alignment == 0


class Projected(nn.Module):
    """A block whose shortcut is called before or after the path that it skips."""

    def __init__(self, first, norm):
        super().__init__()
        self.first = first
        layers = [nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)]
        down = [nn.Conv2d(2, 4, 1)]
        if norm:
            layers = [part for layer in layers for part in (layer, nn.BatchNorm2d(4))]
            down.append(nn.BatchNorm2d(4))
        self.main, self.down = nn.Sequential(*layers), nn.Sequential(*down)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        if self.first:
            aside = self.down(x)
            h = self.main(x)
        else:
            h = self.main(x)
            aside = self.down(x)
        return self.last(torch.relu(h + aside).mean((2, 3)))


@pytest.mark.parametrize("alignment", ["early", "late"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_the_nonlinear_rollout_names_who_is_called_too_early_and_what_fits(first, norm, alignment):
    torch.manual_seed(0)
    model, criterion = Projected(first, norm).double(), nn.CrossEntropyLoss()
    optimizer = dgnopt(model, criterion, rollout="nonlinear", alignment=alignment)
    before = weights(model)
    x, y = images()
    if not norm and first == (alignment == "early"):
        step(model, optimizer, criterion, x, y)
        return
    with pytest.raises(ocnopt.GraphError) as said:
        step(model, optimizer, criterion, x, y)
    found = re.search(r"calls layer '([\w.]+)' before '([\w.]+)', which acts", str(said.value))
    main, down = [f"main.{i}" for i in range(4)], ["down.0", "down.1"]
    calls = [*down, *main] if first else [*main, *down]
    called, late = found.groups()
    assert calls.index(called) < calls.index(late)
    place = {p.name: s.index for s in optimizer.game.stages(optimizer.alignment) for p in s.players}
    assert place[late] < place[called]
    fits = "no alignment of its game" if norm else f"choose alignment={0 if first else 1},"
    assert fits in str(said.value)
    learnt = {name for name, _ in model.named_parameters()}  # the passes move statistics
    assert all(torch.equal(before[n], p) for n, p in weights(model).items() if n in learnt)


def test_the_nonlinear_rollout_asks_for_an_alignment_in_the_order_of_calls():
    """In `Residual` the shortcut is called after the layers that it skips: "late" fits."""
    criterion = nn.CrossEntropyLoss()
    early = dgnopt(net(), criterion, rollout="nonlinear", alignment="early")
    before = weights(early.model)
    with pytest.raises(
        ocnopt.GraphError, match=r"choose alignment=\d+, or rollout='linear'"
    ) as said:
        train(early.model, early, 1, criterion)
    assert_weights_equal(early.model, before)
    named = int(re.search(r"alignment=(\d+)", str(said.value))[1])
    assert named == early.game.alignments - 1

    changes = []
    for lr in (1e-3, 5e-4):  # where steps are small, both rollouts are the same to first order
        steps = []
        for rollout in ("nonlinear", "linear", "off"):
            model = net()
            start = weights(model)
            late = dgnopt(model, criterion, lr=lr, rollout=rollout, alignment="late")
            train(model, late, 1, criterion)
            steps.append({k: v - start[k] for k, v in weights(model).items()})
        nonlinear, linear, off = steps
        gap = max(float((nonlinear[k] - linear[k]).abs().max()) for k in linear)
        share = max(float((nonlinear[k] - off[k]).abs().max()) for k in linear)
        changes.append((gap, share))
    (gap, share), (half_gap, half_share) = changes
    assert half_share == pytest.approx(share / 4, rel=0.1)  # lr times rho, both halved
    assert half_gap == pytest.approx(gap / 8, rel=0.2)


def test_stacked_networks_play_the_game_that_each_plays_alone():
    """Three residual networks at once; the blocks between players are of one network each."""

    class Block(nn.Module):
        def __init__(self, networks=None):
            super().__init__()

            def linear(n, m):
                return nn.Linear(n, m) if networks is None else StackedLinear(networks, n, m)

            self.one, self.two, self.skip = linear(4, 5), linear(5, 3), linear(4, 3)

        def forward(self, x):
            return self.two(torch.tanh(self.one(x))) + self.skip(x)

    criterion, total = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
    for kind, information in (("kfac", "group-rational"), ("ekfac", "group-rational")):
        torch.manual_seed(0)
        alone = [Block().double() for _ in range(3)]
        together = Block(3).double()
        with torch.no_grad():
            for name, param in together.named_parameters():
                param.copy_(torch.stack([dict(m.named_parameters())[name] for m in alone]))
        options = {"information": information, "preconditioner": rule(kind), "alignment": "early"}
        first = dgnopt(together, total, **options)
        own = [dgnopt(m, criterion, **options) for m in alone]
        for i in range(5):
            parts = [batch(10 * i + n) for n in range(3)]
            first.zero_grad()
            out = together(torch.cat([x for x, _ in parts]))
            (total(out, torch.cat([y for _, y in parts])) / 8).backward()
            first.step()
            for m, o, (x, y) in zip(alone, own, parts, strict=True):
                step(m, o, criterion, x, y)
        for name, param in together.named_parameters():
            for n, m in enumerate(alone):
                theirs = dict(m.named_parameters())[name]
                torch.testing.assert_close(param[n], theirs, rtol=1e-9, atol=1e-9)


def test_a_failing_coupling_is_survived_and_counted(monkeypatch):
    from ocnopt.control import cooperation

    def broken(*_):
        raise ValueError("a correlation is not finite")

    monkeypatch.setattr(cooperation, "couple", broken)
    mine, criterion = net(), nn.CrossEntropyLoss()
    theirs = copy.deepcopy(mine)
    first = dgnopt(mine, criterion)
    train(mine, first, 3, criterion)
    train(theirs, dgnopt(theirs, criterion, information="feedback"), 3, criterion)
    assert_weights_close(mine, theirs, 1e-10)
    assert first.diagnostics.total.failures == 3


class Gated(nn.Module):
    """A layer that is called once a switch is on."""

    def __init__(self):
        super().__init__()
        self.on = False
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        z = torch.tanh(self.one(x))
        return self.head(torch.tanh(self.two(z)) if self.on else z)


def test_a_layer_that_joins_later_is_a_player_too():
    torch.manual_seed(0)
    model, criterion = Gated().double(), nn.CrossEntropyLoss()
    optimizer = dgnopt(model, criterion)
    train(model, optimizer, 2, criterion)
    assert "two" not in optimizer.diagnostics.players
    model.on = True
    train(model, optimizer, 2, criterion, 2)
    assert optimizer.diagnostics.players["two"].predicted_decrease > 0
    assert {row.module: row.treatment for row in optimizer.coverage()}["two"] == "player"


# The adversary.


def test_an_adversary_doubles_a_sample_at_most_over_all_stages(monkeypatch):
    from ocnopt.control.sweep import Sweep

    torch.manual_seed(0)
    layers = [part for _ in range(11) for part in (nn.Linear(4, 4), nn.Tanh())]
    chain = nn.Sequential(*layers, nn.Linear(4, 3)).double()
    found, criterion = [], nn.CrossEntropyLoss()
    plain = Sweep.forward

    def watched(self):
        found.append([turn.values[0][0] for turn in self.turns])
        plain(self)

    monkeypatch.setattr(Sweep, "forward", watched)
    for options in ({}, {"fictitious": "adversarial", "penalty": 1e-6}):
        model = copy.deepcopy(chain)
        train(model, dgnopt(model, criterion, lr=1e-6, rollout="off", **options), 1, criterion)
    without, ratios = found[0], [v / own for v, own in zip(found[1], found[0], strict=True)]
    assert len(without) == 12
    assert all(float(ratio.max()) <= 2 + 1e-9 for ratio in ratios)
    torch.testing.assert_close(ratios[-1], torch.full_like(ratios[-1], 2.0))
    assert float(ratios[0].min()) > 1.9  # so slow that what is doubled stays so


# Autocast.


class Encoder(nn.Module):
    """Its game takes a batch to be found; under autocast its encoder sees bfloat16."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        z = self.embed(x.reshape(-1, 2, 2))
        return self.head(self.encoder(z).mean(1))


OPTIMIZERS = {
    "KFAC": lambda m, c: ocnopt.KFAC(m, c, lr=0.05),
    "EKFAC": lambda m, c: ocnopt.EKFAC(m, c, lr=0.05),
    "DGNOpt-kfac": lambda m, c: dgnopt(m, c, alignment="early"),
    "DGNOpt-ekfac": lambda m, c: dgnopt(m, c, preconditioner=rule("ekfac")),
    "nonlinear": lambda m, c: dgnopt(m, c, rollout="nonlinear", measure_every=1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_inside_autocast_is_the_one_outside(kind):
    inside, criterion = net(dtype=torch.float32), nn.CrossEntropyLoss()
    outside = copy.deepcopy(inside)
    steppers = [OPTIMIZERS[kind](model, criterion) for model in (inside, outside)]
    for i in range(3):
        x, y = batch(i, torch.float32)
        for model, optimizer in zip((inside, outside), steppers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                criterion(model(x), y).backward()
                if model is inside:
                    optimizer.step()
                    assert torch.is_autocast_enabled("cpu")
                    assert model(x).dtype == torch.bfloat16
            if model is outside:
                optimizer.step()
    assert_weights_equal(inside, outside)
    assert_state_equal(steppers[0].state_dict(), steppers[1].state_dict())
    for state in steppers[0].state.values():
        tensors = [v for v in state.values() if isinstance(v, torch.Tensor)]
        assert all(v.dtype == torch.float32 for v in tensors if v.is_floating_point())


def test_after_a_step_inside_autocast_the_model_runs_with_its_new_weights():
    model, criterion = net(dtype=torch.float32), nn.CrossEntropyLoss()
    optimizer = dgnopt(model, criterion)
    x, y = batch(0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        criterion(model(x), y).backward()
        optimizer.step()
        within = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(within, model(x))


def test_the_nonlinear_rollout_solves_in_full_precision(monkeypatch):
    """Its moves are made in the middle of a forward pass that is under autocast again."""
    from ocnopt.control.sweep import Sweep

    plain, seen = Sweep.act, []

    def watched(self, group, rho):
        seen.append(torch.is_autocast_enabled("cpu"))
        plain(self, group, rho)

    monkeypatch.setattr(Sweep, "act", watched)
    model, criterion = net(dtype=torch.float32), nn.CrossEntropyLoss()
    optimizer = dgnopt(model, criterion, rollout="nonlinear")
    x, y = batch(0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        criterion(model(x), y).backward()
    optimizer.step()
    assert seen == [False] * 6


def test_a_game_that_is_found_late_is_found_under_the_passs_autocast(recwarn):
    torch.manual_seed(0)
    model, criterion = Encoder(), nn.CrossEntropyLoss()
    optimizer = dgnopt(model, criterion)
    assert optimizer.game is None
    x, y = batch(0, torch.bfloat16)
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    assert optimizer.game is not None
    assert not [w for w in recwarn if "game could not be found" in str(w.message)]


# Bandits and their rounds.


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_round_is_worth_the_same_however_large_its_batches_are(reduction, rows):
    """The loss per sample counts: a smaller batch has a smaller sum, and has won nothing."""
    model, criterion = net(), nn.CrossEntropyLoss(reduction=reduction)
    optimizer = dgnopt(model, criterion, alignment=EpsilonGreedy(every=2), lr=0.0)
    x, y = batch(0)
    for copies in (4, 1):
        optimizer.zero_grad()
        out = model(x.repeat(copies, 1)).repeat_interleave(rows, 0)
        criterion(out, y.repeat(copies).repeat_interleave(rows)).sum().backward()
        optimizer.step()
    (done,) = optimizer.diagnostics.rounds
    assert done.reward == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("alignment", ["epsilon-greedy", "exp3++", EpsilonGreedy(every=2)])
def test_a_bandit_that_learns_from_losses_asks_for_the_criterion(alignment):
    with pytest.raises(ocnopt.OptionError, match="give the criterion, or every=None"):
        dgnopt(net(), None, alignment=alignment)
    dgnopt(net(), None, alignment=alignment, information="open-loop")  # nothing to choose


def test_without_a_criterion_rounds_end_by_count_or_by_the_user():
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = dgnopt(model, None, alignment=RandomAlignment(every=1))
    train(model, optimizer, 20, criterion)
    rounds = optimizer.diagnostics.rounds
    assert len(rounds) == 20
    assert {done.arm for done in rounds} == {0, 1}

    optimizer = dgnopt(model, None, alignment=Exp3PlusPlus())
    train(model, optimizer, 2, criterion)
    optimizer.reward(0.7)
    assert [done.reward for done in optimizer.diagnostics.rounds] == [0.7]


def test_an_alignment_is_of_one_optimizer_at_a_time():
    model, criterion = net(), nn.CrossEntropyLoss()
    bandit = EpsilonGreedy()
    first = dgnopt(model, criterion, alignment=bandit)
    train(model, first, 1, criterion)
    first.reward(0.5)
    with pytest.raises(ocnopt.OptionError, match="is played by another optimizer"):
        dgnopt(net(), criterion, alignment=bandit)
    dgnopt(net(), criterion, alignment=copy.deepcopy(bandit))
    del first
    gc.collect()
    second = dgnopt(net(), criterion, alignment=bandit)
    assert [done.reward for done in second.diagnostics.rounds] == [0.5]  # it goes on


def test_a_state_of_another_alignment_or_network_leaves_everything_as_it_was():
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = dgnopt(model, criterion, alignment=EpsilonGreedy(every=2), momentum=0.5)
    train(model, optimizer, 3, criterion)
    before = saved(optimizer.state_dict())
    fixed, exp3 = (
        dgnopt(net(), criterion, alignment=a, lr=0.7) for a in ("late", Exp3PlusPlus(every=2))
    )
    for other in (fixed, exp3):
        train(other.model, other, 2, criterion, 5)
        with pytest.raises(ocnopt.OptionError, match="cannot be loaded into EpsilonGreedy"):
            optimizer.load_state_dict(saved(other.state_dict()))
    arms = saved(optimizer.state_dict())
    arms["alignment"]["alignment"].update(arms=3, probabilities=[1 / 3] * 3, history=[])
    arms["param_groups"][0]["lr"] = 0.7
    with pytest.raises(ocnopt.OptionError, match="is of 3 alignments, but the network has 2"):
        optimizer.load_state_dict(arms)
    assert_state_equal(before, optimizer.state_dict())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert optimizer.state_dict()["alignment"] == before["alignment"]


def test_where_rounds_have_another_length_the_open_one_begins_anew():
    model, criterion = net(), nn.CrossEntropyLoss()
    first = dgnopt(model, criterion, alignment=EpsilonGreedy(every=4))
    train(model, first, 7, criterion)
    state = saved(first.state_dict())
    second = dgnopt(model, criterion, alignment=EpsilonGreedy(every=2))
    second.load_state_dict(state)
    assert second.rounds.steps == 0
    assert second.alignment == first.alignment
    train(model, second, 1, criterion, 7)
    assert len(second.diagnostics.rounds) == 1
    train(model, second, 1, criterion, 8)
    assert len(second.diagnostics.rounds) == 2
    again = dgnopt(model, criterion, alignment=EpsilonGreedy(every=4))
    again.load_state_dict(state)
    assert again.rounds.steps == 3


@pytest.mark.parametrize(
    "value", ["0.5", None, True, [0.5], 1j, float("nan"), torch.tensor(True), torch.rand(2)]
)
def test_a_reward_that_is_no_number_is_refused(value):
    optimizer = dgnopt(net(), nn.CrossEntropyLoss(), alignment=EpsilonGreedy())
    with pytest.raises(ocnopt.OptionError, match=r"must be a number in \[0, 1\]"):
        optimizer.reward(value)
    assert optimizer.diagnostics.rounds == ()


def test_a_reward_where_there_is_no_alignment_is_refused():
    criterion = nn.CrossEntropyLoss()
    optimizer = dgnopt(net(), criterion, information="open-loop", alignment=EpsilonGreedy())
    with pytest.raises(ocnopt.OptionError, match=r"no alignment to choose.*open-loop"):
        optimizer.reward(0.5)

    torch.manual_seed(0)
    erratic = Erratic().double()
    optimizer = dgnopt(erratic, criterion, alignment=EpsilonGreedy())
    with pytest.raises(ocnopt.OptionError, match="take a step first"):
        optimizer.reward(0.5)
    with pytest.warns(UserWarning, match="game could not be found"):
        train(erratic, optimizer, 1, criterion)
    with pytest.raises(ocnopt.OptionError, match="no alignment to choose"):
        optimizer.reward(0.5)


# What is kept.


def test_players_who_solve_jointly_have_no_policies_of_their_own():
    model, criterion = net(), nn.CrossEntropyLoss()
    before = weights(model)
    optimizer = dgnopt(model, criterion, keep_policy=True, alignment="early")
    with pytest.raises(ocnopt.OptionError, match=r"'one' and 'skip' solve.*information='feedback'"):
        train(model, optimizer, 1, criterion)
    assert_weights_equal(before, model)
    assert not optimizer.state

    optimizer = dgnopt(model, criterion, keep_policy=True, information="feedback")
    train(model, optimizer, 1, criterion)
    assert "skip" in optimizer.policy


def test_on_a_chain_policies_are_kept_whatever_the_information():
    torch.manual_seed(0)
    mine, criterion = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), None
    theirs, criterion = copy.deepcopy(mine), nn.CrossEntropyLoss()
    first = dgnopt(mine, criterion, keep_policy=True)
    second = ocnopt.DDPNOpt(
        theirs, criterion, lr=0.05, preconditioner=rule("kfac"), keep_policy=True
    )
    train(mine, first, 2, criterion)
    train(theirs, second, 2, criterion)
    for name in ("0", "2"):
        torch.testing.assert_close(first.policy[name].k, second.policy[name].k)
        one, other = (o.policy[name].K.materialize() for o in (first, second))
        torch.testing.assert_close(one, other)


def test_couplings_are_kept_of_the_players_in_play_alone():
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = dgnopt(model, criterion, alignment=RandomAlignment(every=None))
    seen = set()
    for i in range(20):
        train(model, optimizer, 1, criterion, i)
        assert len(optimizer._grouping.known) <= 1
        seen.update(optimizer._grouping.known)
        optimizer.reward(0.5)
    assert {frozenset(names) for names in seen} == {
        frozenset({"one", "skip"}),
        frozenset({"two", "skip"}),
    }
