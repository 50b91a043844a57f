"""Patterns of low loss under a cost: evolution proposes them, and the Pareto front is what is worth having.

    parents     the best of a population
    mutants     a parent with every layer's mixer drawn anew with some chance
    crossings   every layer's mixer from either of two parents
    population  parents, mutants and crossings

The published search drops candidates that cost too much. That never ends where few patterns are cheap enough, so here
such a candidate gets the cheapest mixer in one layer after another, in random order, until it is.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from isotach.rng import generator
from isotach.search.costs import Costs
from isotach.search.recipe import Pattern, SearchConfig
from isotach.search.supernet import draw

TRIES = 20  # proposals per new pattern: a small space has no more, and then a population is smaller


class Point(NamedTuple):
    """A pattern, its validation loss with the supernet's weights in nats per token, and its cost."""

    pattern: Pattern
    loss: float
    cost: float


def evolve(
    search: SearchConfig, costs: Costs, losses: Mapping[Pattern, float], *, limit: float, seed: int
) -> Iterator[list[Pattern]]:
    """Yield one population after another, all its patterns different and none dearer than `limit`.

    losses  the caller's, who adds those of the population before asking for the next one

    A function of the losses and the seed, so whoever kept the losses can run it again and will be where it was.
    """
    stream = generator(seed, "evolution", str(limit))

    def affordable(propose: Callable[[], Pattern]) -> Callable[[], Pattern]:
        return lambda: cheapened(propose(), costs, limit, stream)

    def pick() -> Pattern:
        return parents[int(torch.randint(len(parents), (), generator=stream))]

    depth = len(costs.layers)
    population = distinct(affordable(lambda: draw(search.choices, depth, stream)), search.population)
    for _ in range(search.generations):
        yield population
        parents = sorted(population, key=lambda pattern: (losses[pattern], pattern))[: search.parents]
        # Parents that are much alike have few crossings; mutants take the places left.
        crossings = distinct(
            affordable(lambda: crossed(pick(), pick(), stream)),
            (search.population - len(parents)) // 2,
            besides=parents,
        )
        mutants = distinct(
            affordable(lambda: mutated(pick(), search.choices, search.mutation, stream)),
            search.population - len(parents) - len(crossings),
            besides=[*parents, *crossings],
        )
        population = [*parents, *crossings, *mutants]


def mutated(pattern: Pattern, choices: Pattern, rate: float, stream: torch.Generator) -> Pattern:
    """Every layer's mixer drawn anew with chance `rate`; it may come out as it was."""
    other = draw(choices, len(pattern), stream)
    return _mixed(pattern, other, rate, stream)


def crossed(a: Pattern, b: Pattern, stream: torch.Generator) -> Pattern:
    """Every layer's mixer from either parent."""
    return _mixed(a, b, 0.5, stream)


def cheapened(pattern: Pattern, costs: Costs, limit: float, stream: torch.Generator) -> Pattern:
    """The pattern with the cheapest mixer in as many layers, taken in random order, as `limit` demands."""
    cheapest, changed = costs.cheapest(), list(pattern)
    for layer in torch.randperm(len(pattern), generator=stream).tolist():
        if costs(tuple(changed)) <= limit:
            break
        changed[layer] = cheapest[layer]
    return tuple(changed)


def distinct(propose: Callable[[], Pattern], count: int, *, besides: Iterable[Pattern] = ()) -> list[Pattern]:
    """`count` different patterns that are not among `besides`, fewer where TRIES proposals for each find no more."""
    taken = set(besides)
    found: list[Pattern] = []
    for _ in range(TRIES * count):
        if len(found) == count:
            break
        pattern = propose()
        if pattern not in taken:
            taken.add(pattern)
            found.append(pattern)
    return found


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in loss or cost without being worse in the other, cheapest first.

    Of equal ones the first in the order of their patterns.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, point.loss, point.pattern)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


def _mixed(a: Pattern, b: Pattern, share: float, stream: torch.Generator) -> Pattern:
    """Every layer of `b` with chance `share`, else of `a`."""
    swaps = (torch.rand(len(a), generator=stream) < share).tolist()
    return tuple(theirs if swap else own for own, theirs, swap in zip(a, b, swaps, strict=True))
