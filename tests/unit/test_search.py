"""A supernet is every decoder of its patterns; a search stops, goes on, and ends with recipes that train."""

import itertools
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotach import cli
from isotach.config import dumps, load, parse
from isotach.errors import UserError
from isotach.models.decoder import Decoder, ModelConfig
from isotach.ops.engine import Span
from isotach.rng import generator
from isotach.search.costs import Costs, costs, trimmed_mean
from isotach.search.evolution import Point, cheapened, crossed, distinct, evolve, mutated, pareto
from isotach.search.ranking import kendall, settled
from isotach.search.recipe import Pattern, SearchConfig, SearchRecipe, patterned
from isotach.search.run import Found, Generation, search
from isotach.search.supernet import choose, draw, supernet
from isotach.train import checkpoint
from isotach.train.metrics import read_log
from isotach.train.recipe import Recipe

CHOICES = ("softmax", "lightning", "hgrn")  # layers of hgrn share a module
SHAPE = {"vocab": 257, "width": 16, "depth": 3, "heads": 2, "hidden": 16}
MODEL = parse(ModelConfig, SHAPE | {"pattern": CHOICES, "lightning": {"lrpe": "all"}}, who="test")
PATTERNS = [
    ("softmax", "softmax", "softmax"),
    ("lightning", "softmax", "lightning"),
    ("hgrn", "lightning", "softmax"),
    ("softmax", "hgrn", "hgrn"),
]
EVERY = list(itertools.product(CHOICES, repeat=3))


def tokens(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(257, (rows, length), generator=generator(0, "tokens"))


def trained(seed: int = 0) -> Decoder:
    """A supernet whose weights are no longer those of any seed."""
    net = supernet(MODEL, seed=seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator(0, name))
    return net


def copied(net: Decoder, pattern: Pattern) -> Decoder:
    """An ordinary decoder with the weights that a supernet has for this pattern."""
    weights, decoder = net.state_dict(), Decoder(patterned(net.config, pattern), seed=1)

    def theirs(key: str) -> str:
        return re.sub(r"^blocks\.(\d+)\.mixer\.", lambda layer: f"{layer[0]}{pattern[int(layer[1])]}.", key)

    decoder.load_state_dict({key: weights[theirs(key)] for key in decoder.state_dict()})
    return decoder


# ---- the supernet


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_before_training_a_sub_model_is_the_decoder_of_its_seed(pattern: Pattern) -> None:
    net = supernet(MODEL, seed=3)
    choose(net, pattern)
    assert torch.equal(net(tokens())[0], Decoder(patterned(MODEL, pattern), seed=3)(tokens())[0])


@torch.no_grad()
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_sub_model_is_the_decoder_with_its_weights(pattern: Pattern) -> None:
    """At once, in packed documents, and token by token."""
    net = trained()
    choose(net, pattern)
    decoder = copied(net, pattern)
    assert torch.equal(net(tokens())[0], decoder(tokens())[0])
    packed = Span(torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]]), torch.tensor([0, 3, 9]))
    assert torch.equal(net(tokens(1), span=packed)[0], decoder(tokens(1), span=packed)[0])
    ours = theirs = None
    for token in tokens().split(1, 1):
        (x, ours), (y, theirs) = net(token, ours), decoder(token, theirs)
        assert torch.equal(x, y)


def test_only_the_chosen_mixers_learn() -> None:
    net, pattern = trained(), ("lightning", "softmax", "softmax")
    choose(net, pattern)
    net(tokens())[0].square().sum().backward()
    learning = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    mixers = {name for name in learning if ".mixer." in name}
    chosen = tuple(f"blocks.{layer}.mixer.{name}." for layer, name in enumerate(pattern))
    assert mixers == {name for name, _ in net.named_parameters() if name.startswith(chosen)}
    assert not any(name.startswith("shared.") for name in learning)
    assert "embed.weight" in learning


def test_a_drawn_pattern_is_a_function_of_seed_and_step() -> None:
    def at(seed: int, step: int) -> Pattern:
        return draw(CHOICES, 8, generator(seed, "pattern", step))

    forwards = [at(0, step) for step in range(50)]
    torch.manual_seed(1)
    assert [at(0, step) for step in reversed(range(50))] == forwards[::-1]
    assert forwards != [at(1, step) for step in range(50)]
    assert len(set(forwards)) == 50
    counts = Counter((layer, name) for step in range(600) for layer, name in enumerate(at(0, step)))
    assert len(counts) == 24
    assert all(150 < count < 250 for count in counts.values())


# ---- rankings


@pytest.mark.parametrize(
    ("a", "b", "tau"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 4 / 6),
        ([1, 1, 2], [1, 2, 3], 2 / 6**0.5),
        ([1, 2, 3], [5, 5, 5], 0.0),
    ],
)
def test_kendall_by_hand(a: list[float], b: list[float], tau: float) -> None:
    assert kendall(a, b) == pytest.approx(tau, abs=1e-12)


def test_kendall_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for seed in range(20):
        a, b = torch.randint(12, (2, 30), generator=generator(seed, "scores")).double().tolist()
        assert kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-12)


@pytest.mark.parametrize(
    ("taus", "over"),
    [
        ([], False),
        ([0.3], False),
        ([0.95], True),
        ([0.95, 0.5], False),
        ([0.3, 0.4, 0.5, 0.6], False),
        ([0.5, 0.4], False),
        ([0.5, 0.4, 0.5], True),
        ([0.5, 0.4, 0.6], False),
        ([-0.2, -0.3, -0.4], True),
    ],
)
def test_a_ranking_has_settled_at_the_threshold_or_on_a_plateau(taus: list[float], over: bool) -> None:
    assert settled(taus, enough=0.9, patience=2) == over


# ---- costs


@pytest.mark.parametrize("cost", ["flops", "state_bytes"])
def test_counted_costs_are_those_of_the_decoders(cost: str) -> None:
    counted = costs(MODEL, parse(SearchConfig, {"choices": CHOICES, "cost": cost, "context": 100}, who="test"), CPU)
    for pattern in EVERY:
        decoder = Decoder(patterned(MODEL, pattern))
        assert counted(pattern) == (decoder.flops_per_token(100) if cost == "flops" else decoder.state_bytes(100))
    assert counted(counted.cheapest()) == min(map(counted, EVERY))
    assert counted(counted.costliest()) == max(map(counted, EVERY))


@pytest.mark.parametrize("cost", ["step_ms", "read_ms"])
def test_measured_costs_are_sums_over_layers(cost: str) -> None:
    found = costs(MODEL, parse(SearchConfig, {"choices": CHOICES, "cost": cost, "context": 8}, who="test"), CPU)
    alone = {name: found((name,) * 3) for name in CHOICES}
    assert min(alone.values()) > 0
    assert found(CHOICES) == pytest.approx(sum(alone.values()) / 3)


def test_a_trimmed_mean_leaves_the_tails_out() -> None:
    assert trimmed_mean([1e9, -1e9, *[2.0] * 9, *[4.0] * 9]) == pytest.approx(3.0, abs=1e6)
    assert trimmed_mean([1e9, 1e9, -1e9, -1e9, *[2.0] * 8, *[4.0] * 8]) == 3.0
    assert trimmed_mean([1.0, 5.0]) == 3.0


# ---- evolution

CPU = torch.device("cpu")
DEAR = Costs(cost="flops", context=1, rest=5.0, layers=({"a": 3.0, "b": 1.0},) * 10)
points = st.lists(st.builds(Point, st.tuples(st.sampled_from("ab")), st.integers(0, 6), st.integers(0, 6)), max_size=12)


@given(points)
def test_the_front_is_what_nothing_dominates(found: list[Point]) -> None:
    def dominated(point: Point) -> bool:
        return any(
            other.loss <= point.loss and other.cost <= point.cost and (other.loss, other.cost) != point[1:]
            for other in found
        )

    front = pareto(found)
    assert {point[1:] for point in front} == {point[1:] for point in found if not dominated(point)}
    assert set(front) <= set(found)
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(front))
    assert pareto(found[::-1]) == front


def distance(pattern: Pattern) -> float:
    return sum(map(str.__ne__, pattern, "aabbaabbaa"))


def evolved(limit: float, *, seed: int = 0, losses: dict[Pattern, float] | None = None) -> list[list[Pattern]]:
    """Populations where a pattern's loss is its distance from aabbaabbaa."""
    options = SearchConfig.model_construct(
        choices=("a", "b"), population=12, parents=4, generations=15, mutation=0.3
    )  # not validated: there are no mixers of these names
    losses, found = {} if losses is None else losses, []
    for population in evolve(options, DEAR, losses, limit=limit, seed=seed):
        losses |= {pattern: distance(pattern) for pattern in population}
        found.append(population)
    return found


def test_evolution_finds_the_best_pattern() -> None:
    populations = evolved(limit=35.0)
    assert tuple("aabbaabbaa") in populations[-1]
    assert len(populations) == 15
    assert all(len(set(population)) == len(population) == 12 for population in populations)


def test_evolution_stays_within_its_limit() -> None:
    populations = evolved(limit=5 + 10 + 2 * 3)
    assert max(DEAR(pattern) for population in populations for pattern in population) <= 21.0
    best = min(populations[-1], key=distance)
    assert best.count("a") == 3
    assert all(wanted == "a" for name, wanted in zip(best, "aabbaabbaa", strict=True) if name == "a")
    assert evolved(limit=15.0) == [[("b",) * 10]] * 15


def test_evolution_is_a_function_of_its_seed() -> None:
    losses: dict[Pattern, float] = {}
    first = evolved(30.0, losses=losses)
    torch.manual_seed(1)
    assert evolved(30.0) == first == evolved(30.0, losses=losses)
    assert evolved(30.0, seed=1) != first


def test_the_best_stay() -> None:
    for before, after in itertools.pairwise(evolved(35.0)):
        assert sorted(before, key=lambda pattern: (distance(pattern), pattern))[:4] == after[:4]


@given(st.integers(0, 1000), st.text("ab", min_size=10, max_size=10), st.text("ab", min_size=10, max_size=10))
def test_children_have_their_parents_mixers(seed: int, a: str, b: str) -> None:
    child = crossed(tuple(a), tuple(b), generator(seed))
    assert all(name in pair for name, pair in zip(child, zip(a, b, strict=True), strict=True))
    assert mutated(tuple(a), ("a", "b"), 0.0, generator(seed)) == tuple(a)
    cheaper = cheapened(tuple(a), DEAR, 22.0, generator(seed))
    assert DEAR(cheaper) == min(DEAR(tuple(a)), 21.0)
    assert all(name in ("b", old) for name, old in zip(cheaper, a, strict=True))


def test_mutation_draws_every_layer_anew_with_its_chance() -> None:
    stream = generator(0, "mutation")
    changed = sum(mutated(("a",) * 10, ("a", "b", "c"), 0.3, stream).count("a") for _ in range(500))
    assert changed / 5000 == pytest.approx(1 - 0.3 * 2 / 3, abs=0.02)


def test_distinct_patterns_of_a_small_space_are_all_of_it() -> None:
    stream = generator(0, "distinct")
    found = distinct(lambda: draw(("a", "b"), 3, stream), 100)
    assert sorted(found) == sorted(itertools.product("ab", repeat=3))
    assert distinct(lambda: draw(("a", "b"), 3, stream), 100, besides=found) == []


# ---- a whole search


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text("To be, or not to be, that is the question. " * 300)
    return folder


def tables(text: Path, **settings: Any) -> dict[str, Any]:
    return {
        "model": {**SHAPE, "depth": 2, "lightning": {"lrpe": "all"}},
        "data": {"train": str(text / "text.txt"), "valid_fraction": 0.1, "cache": str(text / "cache")},
        "train": {
            "steps": 6, "batch_tokens": 64, "seq_len": 32, "decay": 0.0, "validate_every": 2, "valid_tokens": 64,
            "checkpoint_every": 3, "threads": 1, "lr": 1e-2,
        },
        "search": {
            "choices": CHOICES, "context": 1024, "limits": [0.7, 1.0], "probes": 4, "tau": 1.0, "generations": 2,
            "population": 4, "parents": 2, **settings,
        },
    }  # fmt: skip


def recipe(text: Path, **settings: Any) -> SearchRecipe:
    return parse(SearchRecipe, tables(text, **settings), who="test")


class At:
    """A sink that stops the search after an update."""

    def __init__(self, step: int) -> None:
        self.step = step

    def write(self, record: Mapping[str, Any]) -> None:
        if record["step"] == self.step:
            terminate()

    def close(self) -> None: ...


def terminate(generation: Generation | None = None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def contents(run: Path, found: Found) -> list[bytes]:
    weights = checkpoint.step_folder(run, found.step) / "model.safetensors"
    return [path.read_bytes() for path in (weights, run / "front.json", run / "scores.json", run / "costs.json")]


def test_a_search_that_was_stopped_goes_on_to_the_same_front(text: Path, tmp_path: Path) -> None:
    whole = search(recipe(text), tmp_path / "whole")
    assert (whole.step, whole.stopped, len(whole.taus)) == (6, None, 2)
    parts = tmp_path / "parts"
    in_training = search(recipe(text), parts, sinks=[At(3)])
    assert (in_training.step, in_training.stopped, in_training.front) == (3, "SIGTERM", [])
    in_evolution = search(recipe(text), parts, resume=True, watch=terminate)
    assert (in_evolution.step, in_evolution.stopped, in_evolution.front) == (6, "SIGTERM", [])
    assert 0 < in_evolution.scored < whole.scored
    assert not (parts / "front.json").exists()
    assert search(recipe(text), parts, resume=True) == whole
    assert contents(parts, whole) == contents(tmp_path / "whole", whole)
    assert [record.get("scores") for record in read_log(parts)] == [
        record.get("scores") for record in read_log(tmp_path / "whole")
    ]
    again = search(recipe(text), parts, resume=True)
    assert again == whole


def test_the_front_is_made_of_what_was_scored(text: Path, tmp_path: Path) -> None:
    seen: list[Generation] = []
    found = search(recipe(text), tmp_path / "run", watch=seen.append)
    assert [(generation.limit, generation.number) for generation in seen] == [(0.7, 1), (0.7, 2), (1.0, 1), (1.0, 2)]
    scored = json.loads((tmp_path / "run" / "scores.json").read_text())["losses"]
    assert found.scored == len(scored) == seen[-1].scored
    assert {" ".join(point.pattern): point.loss for point in [*found.front, *found.uniform]}.items() <= scored.items()
    assert {point.pattern for point in found.uniform} == {(name, name) for name in CHOICES}
    assert found.front[-1].loss == min(scored.values())
    net = supernet(recipe(text).model, seed=0)
    for point in found.front:
        choose(net, point.pattern)
        assert point.cost == Decoder(patterned(net.config, point.pattern)).flops_per_token(1024)


def test_scores_are_kept_while_the_weights_are_the_same(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, options = tmp_path / "run", recipe(text)
    found = search(options, run)
    chosen: list[Pattern] = []

    def noted(net: Decoder, pattern: Pattern) -> None:
        chosen.append(pattern)
        choose(net, pattern)

    monkeypatch.setattr("isotach.search.run.choose", noted)
    search(options, run, resume=True)
    assert chosen == []
    longer = search(
        options.model_copy(update={"train": options.train.model_copy(update={"steps": 7})}), run, resume=True
    )
    assert chosen[0] == draw(CHOICES, 2, generator(0, "pattern", 6))
    assert len(chosen) == 1 + options.search.probes + longer.scored
    assert {point.pattern: point.loss for point in longer.uniform} != {
        point.pattern: point.loss for point in found.uniform
    }


def test_training_ends_when_the_ranking_settles(text: Path, tmp_path: Path) -> None:
    options = recipe(text, patience=1)
    options = options.model_copy(update={"train": options.train.model_copy(update={"steps": 40})})
    found = search(options, tmp_path / "run")
    over = [settled(found.taus[:n], enough=1.0, patience=1) for n in range(1, len(found.taus) + 1)]
    assert over == [False] * (len(over) - 1) + [True]
    assert found.step == 2 * (len(found.taus) + 1) < 40
    assert checkpoint.latest(tmp_path / "run") == checkpoint.step_folder(tmp_path / "run", found.step)
    assert search(options, tmp_path / "run", resume=True) == found


def test_measured_costs_stay_as_they_were(text: Path, tmp_path: Path) -> None:
    options = recipe(text, cost="step_ms", limits=[1.0])
    search(options, tmp_path / "run", sinks=[At(2)])
    before = (tmp_path / "run" / "costs.json").read_bytes()
    search(options, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "costs.json").read_bytes() == before


def test_limits_may_change_on_resume_and_what_the_supernet_learned_may_not(text: Path, tmp_path: Path) -> None:
    search(recipe(text), tmp_path / "run")
    narrow = search(recipe(text, limits=[0.7]), tmp_path / "run", resume=True)
    most = json.loads((tmp_path / "run" / "front.json").read_text())["costliest"]
    assert max(point.cost for point in narrow.front) <= 0.7 * most
    names = sorted(path.name for path in (tmp_path / "run" / "front").iterdir())
    assert names == sorted(f"{number}.toml" for number in range(1, len(narrow.front) + 1))
    with pytest.raises(UserError, match=r"search\.choices is not what this run was started with"):
        search(recipe(text, choices=["softmax", "gla"]), tmp_path / "run", resume=True)
    with pytest.raises(UserError, match=r"search\.probes is not what this run was started with"):
        search(recipe(text, probes=5), tmp_path / "run", resume=True)


# ---- the command


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def written(text: Path, folder: Path) -> str:
    path = folder / "search.toml"
    path.write_text(dumps(recipe(text)))
    return str(path)


def test_the_front_is_printed_and_its_recipes_train(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    code, out, err = said(capsys, "search", written(text, tmp_path), "--run", str(run))
    assert code == 0, err
    front = json.loads((run / "front.json").read_text())["front"]
    assert out.count("\n") == len(front) + len(CHOICES) + 5
    assert all(f"{point['loss']:.4f}" in out for point in front)
    for point in front:
        resolved = load(Recipe, run / point["recipe"])
        assert resolved.model.pattern == tuple(point["pattern"])
        assert set(resolved.model.mixers) == set(point["pattern"])
    code, _, err = said(capsys, "train", str(run / "front" / "1.toml"), "train.steps=2", "--run", str(tmp_path / "two"))
    assert code == 0, err
    assert checkpoint.latest(tmp_path / "two").name == "step-00000002"
    assert said(capsys, "search", str(run / "config.toml"), "--run", str(run), "--resume")[0] == 0


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (['search.choices=["softmax","lightening"]'], "search.choices: mixer 'lightening' is not known; did you mean"),
        (["search.choices=[]"], "search.choices: expected two mixers or more"),
        (['search.choices=["softmax","softmax"]'], "search.choices: expected two mixers or more, each once"),
        (['search.choices=["softmax","vicinity"]'], "vicinity: its tokens read later ones"),
        (['model.pattern=["softmax"]'], "model.pattern is what the search finds; leave it out"),
        (["data.valid_fraction=0"], "expected validation text to score patterns on, got none; set data.valid"),
        (["search.limits=[0.01]"], "search.limits: the cheapest pattern costs 0."),
        (["search.limits=[1.5]"], "search.limits.0: input should be less than or equal to 1"),
        (["search.parents=4"], "expected fewer parents than population = 4, got 4"),
        (["search.genrations=3"], "unknown key search.genrations; did you mean generations?"),
        (["model.heads=3"], "does not divide width"),
        (["--resume"], "expected a run folder with a checkpoint, found none"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(
    overrides: Sequence[str], sentence: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    code, out, err = said(capsys, "search", written(text, tmp_path), *overrides, "--run", str(run))
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1
    assert not run.exists()


def test_a_folder_that_holds_something_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = said(capsys, "search", written(text, tmp_path), "--run", str(tmp_path))
    assert code == 2
    assert "expected a new or empty run folder" in err
    search(recipe(text), tmp_path / "run", sinks=[At(1)])
    (tmp_path / "run" / "costs.json").write_text("{}")
    code, _, err = said(capsys, "search", written(text, tmp_path), "--run", str(tmp_path / "run"), "--resume")
    assert code == 2
    assert "costs.json: expected what a search wrote" in err
