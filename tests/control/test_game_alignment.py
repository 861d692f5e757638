"""Alignments: how many there are, that each keeps the order, and what is refused."""

import dataclasses
import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from control.game_networks import made
from hypothesis import given, settings
from torch import nn

from ocnopt import GraphError, OptionError
from ocnopt.control.game import Game, find_game


@dataclasses.dataclass(frozen=True)
class Plan:
    """A graph: sources of every layer (0 is the input), and which results are activated in place.

    What no layer reads is read by the head.
    """

    sources: tuple[tuple[int, ...], ...]
    inplace: tuple[bool, ...]
    norms: tuple[bool, ...]

    @property
    def ends(self):
        read = {s for sources in self.sources for s in sources}
        return [k for k in range(1, len(self.sources) + 1) if k not in read]


class Dag(nn.Module):
    """Linear layers with additive merges, some normalized, some activated in place."""

    def __init__(self, plan):
        super().__init__()
        self.plan = plan
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in plan.sources)
        self.norms = nn.ModuleList(
            nn.LayerNorm(3) if norm else nn.Identity() for norm in plan.norms
        )
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        values = [x]
        for sources, inplace, layer, norm in zip(
            self.plan.sources, self.plan.inplace, self.layers, self.norms, strict=True
        ):
            total = sum(values[s] for s in sources)
            if inplace:
                # With one source this writes into what others read, before or after.
                total = total.relu_()
            values.append(norm(layer(total)))
        return self.head(sum(values[k] for k in self.plan.ends))


@st.composite
def plans(draw, inplace=True):
    count = draw(st.integers(1, 6))
    flags = st.lists(st.booleans(), min_size=count, max_size=count).map(tuple)
    sources = tuple(
        tuple(sorted(draw(st.sets(st.integers(0, k), min_size=1, max_size=3))))
        for k in range(count)
    )
    return Plan(sources, draw(flags) if inplace else (False,) * count, draw(flags))


def enumerated(plan):
    """All ways to place the layers, by brute force over the plan and nothing else."""
    depth = []
    for sources in plan.sources:
        depth.append(1 + max(depth[s - 1] if s else 0 for s in sources))
    last = max(depth)  # the head comes right behind
    valid = 0
    for places in itertools.product(range(last), repeat=len(depth)):
        valid += all(
            places[s - 1] < place
            for place, sources in zip(places, plan.sources, strict=True)
            for s in sources
            if s
        )
    return valid


@given(plan=plans(inplace=False))
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_placements_are_counted_right(plan):
    game = find_game(Dag(plan))
    assert game.placements == enumerated(plan)
    assert game.placements == math.prod(branch.placements for branch in game.branches)
    listed = [player for branch in game.branches for player in branch.players]
    assert len(listed) == len(set(listed))
    slack = [
        late - early
        for b in game.branches
        for early, late in zip(b.earliest, b.latest, strict=True)
    ]
    assert all(s > 0 for s in slack)
    assert game.alignments == 1 + max(slack, default=0)


@given(plan=plans(), data=st.data())
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
def test_every_alignment_computes_the_same(plan, data):
    """Writes in place included: an alignment never lets a reader see what it must not."""
    torch.manual_seed(0)
    model, x = Dag(plan), torch.randn(2, 3)
    with torch.no_grad():
        expected = model(x.clone())
        game = find_game(model)
        for k in range(game.alignments):
            assert torch.equal(game.run(x.clone(), alignment=k), expected)
        wished = {
            player.name: data.draw(st.integers(early, late))
            for branch in game.branches
            for player, early, late in zip(
                branch.players, branch.earliest, branch.latest, strict=True
            )
        }
        try:
            places = game.places(wished)
        except OptionError:
            return
        assert {name: places[name] for name in wished} == wished
        assert torch.equal(game.run(x.clone(), alignment=wished), expected)


@given(plan=plans())
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_earliest_and_latest(plan):
    """Index 0 is the earliest place of every player, the last index the latest."""
    game = find_game(Dag(plan))
    first, last = game.places(0), game.places(game.alignments - 1)
    for branch in game.branches:
        for player, early, late in zip(branch.players, branch.earliest, branch.latest, strict=True):
            assert (first[player.name], last[player.name]) == (early, late)
    fixed = first.keys() - {p.name for branch in game.branches for p in branch.players}
    for name in fixed:
        if name.startswith("layers"):
            assert first[name] == last[name]


@pytest.mark.parametrize(("depth", "length"), [(3, 1), (3, 2), (5, 2), (5, 3), (4, 4)])
def test_a_chain_beside_a_chain(depth, length):
    """p layers beside d: C(d, p) placements, as in a block of an inception network."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.main = nn.Sequential(*(nn.Linear(2, 2) for _ in range(depth)))
            self.side = nn.Sequential(*(nn.Linear(2, 2) for _ in range(length)))

        def forward(self, x):
            return self.main(x) + self.side(x)

    game = find_game(nn.Sequential(Block(), Block()))
    assert game.placements == math.comb(depth, length) ** 2
    assert game.alignments == 1 + depth - length
    assert len(game.branches) == (0 if depth == length else 2)


@pytest.mark.parametrize("work", [0, 10, 100, 300])
def test_counting_that_takes_too_long_ends_with_fewer(work, monkeypatch):
    """Never more than there are, and said to be no exact number."""
    monkeypatch.setattr("ocnopt.control.placement._WORK", work)
    game = find_game(Fused(4, 5))
    (branch,) = game.branches
    assert not game.exact
    assert not branch.exact
    assert 1 <= game.placements == branch.placements < fused_in(5)


class Fused(nn.Module):
    """Layers side by side whose results are merged in pairs, beside a chain."""

    def __init__(self, count, depth):
        super().__init__()
        self.chain = nn.Sequential(*(nn.Linear(2, 2) for _ in range(depth)))
        self.first = nn.ModuleList(nn.Linear(2, 2) for _ in range(count))
        self.merging = nn.ModuleList(nn.Linear(2, 2) for _ in range(count - 1))

    def forward(self, x):
        results = [layer(x) for layer in self.first]
        for layer in self.merging:
            results.append(layer(results.pop(0) + results.pop(0)))
        return self.chain(x) + results[0]


def test_counting_ends():
    """The states to count by multiply with every layer that is side by side with others."""
    game = find_game(Fused(8, 24))
    assert not game.exact
    assert game.placements > 1_000_000
    small = find_game(Fused(4, 5))
    assert small.exact
    assert small.placements == fused_in(5)


def fused_in(depth):
    """Ways to place four layers, two behind pairs of them and one behind both, by brute force."""
    return sum(
        max(a, b) < e < g and max(c, d) < f < g
        for a, b, c, d, e, f, g in itertools.product(range(depth), repeat=7)
    )


def test_an_alignment_by_name():
    game = find_game(made("residual projection batch")[0])
    assert game.places({"2.shortcut.0": 4})["2.shortcut.1"] == 4
    assert game.stages({"2.shortcut.0": 4}) == game.stages(1)
    assert game.stages({}) == game.stages(0)
    assert game.stages(game.places(1)) == game.stages(1)


def test_others_make_way():
    """Players that are not named go as early as the named ones allow."""
    game = find_game(made("inception")[0])
    places = game.places({"1.two1": 2})
    assert (places["1.two1"], places["1.two2"]) == (2, 3)


@pytest.mark.parametrize(
    ("alignment", "says"),
    [
        (3, "give 0 to 2"),
        (-1, "give 0 to 2"),
        (True, "coarse stages"),
        (1.0, "coarse stages"),
        ({"1.tow1": 1}, "did you mean '1.two1'"),
        ({"1.two1": 0}, "it acts at 1 to 2"),
        ({"1.two1": 3}, "it acts at 1 to 2"),
        ({"1.three2": 3}, "only at 2"),
        ({"1.two1": 2, "1.two2": 2}, "at 3 at the earliest"),
        ({"1.two1": 1.5}, "'1.two1' at 1.5; give a coarse stage, a whole number"),
        ({"1.two1": 1.0}, "a whole number"),
        ({"1.two1": True}, "a whole number"),
        ({"1.two1": "a"}, "'1.two1' at 'a'; give a coarse stage"),
        ({"1.two1": None}, "a whole number"),
        ({5: 1}, "alignment names 5: players are '0'"),
    ],
)
def test_what_is_no_alignment_is_refused(alignment, says):
    game = find_game(made("inception")[0])
    for ask in (game.stages, game.places, lambda a: game.run(torch.zeros(1), alignment=a)):
        with pytest.raises(OptionError, match=says):
            ask(alignment)


def test_places_of_numpy_are_places():
    game = find_game(made("inception")[0])
    assert game.stages({"1.two1": np.int64(2)}) == game.stages({"1.two1": 2})


def test_a_normalization_has_no_place_of_its_own():
    game = find_game(made("residual projection batch")[0])
    with pytest.raises(OptionError, match="follows the layer before it and acts at 3"):
        game.places({"2.shortcut.1": 4})


# described by hand


def described(stages):
    return Game.described(made("residual projection batch")[0], stages)


STAGES = [
    ["0"],
    ["1.convs.0", "1.norms.0"],
    ["1.convs.1", "1.norms.1"],
    ["2.convs.0", "2.norms.0", "2.shortcut.0", "2.shortcut.1"],
    ["2.convs.1", "2.norms.1"],
    ["5"],
]


def test_a_described_game():
    game = described(STAGES)
    assert [[p.name for p in stage.players] for stage in game.stages()] == [
        sorted(stage, key=lambda name: [p.name for p in game.players].index(name))
        for stage in STAGES
    ]
    assert (game.alignments, game.placements, game.branches) == (1, 1, ())
    assert all(stage.alive == () for stage in game.stages())
    assert game.places()["5"] == 5
    with pytest.raises(GraphError, match="described"):
        game.run(torch.zeros(1))
    with pytest.raises(OptionError):
        game.stages(1)


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        ([["0"], ["1.conv.0"]], "did you mean '1.convs"),
        ([["0"], ["nothing like it"]], "players are '0'"),
        ([["0"], ["0"]], "'0' 2 times"),
        (STAGES[:-1], "leave out the players '5'"),
        ([["1.relu"], *STAGES], "'1.relu'"),
        (["0", "5"], r"stage 0 is '0', not a list; give stages as lists of names, such as \[\["),
        ("05", "stages='05'; give stages as lists of names"),
        (None, "stages=None; give stages as lists of names"),
        ([["0"], None], "stage 1 is None, not a list"),
        (nn.Sequential(nn.Linear(2, 2)), "stage 0 is a Linear module, not a list"),
        ([nn.Sequential(nn.Linear(2, 2))], "stage 0 is a Sequential module, not a list"),
        ([["0"], [nn.Linear(2, 2)]], "stage 1 holds a Linear module, not a name"),
        ([[["0"]]], r"stage 0 holds \['0'\], not a name"),
    ],
)
def test_a_wrong_description_is_refused(stages, says):
    with pytest.raises(OptionError, match=says):
        described(stages)


def test_a_description_says_why_a_module_is_no_player():
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2))
    with pytest.raises(OptionError, match="PReLU is not a layer kind"):
        Game.described(model, [["0"], ["1"], ["2"]])
