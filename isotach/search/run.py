"""A search from start to end: train the supernet, let patterns evolve, write down the Pareto front.

    RUN/config.toml      the recipe                       RUN/costs.json    what every mixer costs in every layer
    RUN/log.jsonl        training, and the rankings       RUN/scores.json   every pattern scored so far
    RUN/checkpoints      the supernet                     RUN/front.json    the result; RUN/front/N.toml trains point N

Training draws the pattern of an update from (seed, step), and evolution is a function of the seed and the scores; so
a search that was stopped anywhere goes on to the same front, to the bit. The published search predicts losses by a
regression on the mean of the mixers' codes, which forgets their order; here every candidate is scored by the supernet.

"Neural Architecture Search on Efficient Transformers and Beyond" (2022), and its released code.
"""

import contextlib
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from isotach import config
from isotach.config import Config
from isotach.data.pack import prefetch
from isotach.errors import UserError
from isotach.files import write_atomically
from isotach.rng import generator
from isotach.search import costs as pricing
from isotach.search.costs import Costs
from isotach.search.evolution import Point, distinct, evolve, pareto
from isotach.search.ranking import kendall, settled
from isotach.search.recipe import Pattern, SearchRecipe
from isotach.search.supernet import choose, draw, supernet
from isotach.train import checkpoint
from isotach.train.loop import OPTIMIZER, RECIPE, Interrupt, Sink, Trainer
from isotach.train.metrics import Board, Log, read_log
from isotach.train.optim import Optimizer
from isotach.train.recipe import changed

COSTS, SCORES, FRONT = "costs.json", "scores.json", "front.json"
# What the supernet's weights and the end of its training depend on; the rest of [search] may change on resume.
FIXED = ("choices", "probes", "tau", "patience")

C = TypeVar("C", bound=Config)


class Scores(Config):
    """step: updates of the supernet; losses: of patterns, their mixers' names with spaces between."""

    step: int
    losses: dict[str, float]


@dataclass(frozen=True)
class Generation:
    """One generation of an evolution, just scored. scored: patterns so far; best: its lowest loss."""

    limit: float
    number: int
    scored: int
    best: float


@dataclass(frozen=True)
class Found:
    """How a search ended.

    step: updates of the supernet. stopped: the signal that stopped it, or None. taus: how its rankings agreed.
    scored: patterns. front: what is worth having up to the largest limit, cheapest first. uniform: the patterns of one
    mixer, for comparison. Both are empty where a signal came before.
    """

    step: int
    stopped: str | None
    taus: list[float]
    scored: int
    front: list[Point]
    uniform: list[Point]


def search(
    recipe: SearchRecipe,
    run: Path,
    *,
    resume: bool = False,
    sinks: Sequence[Sink] = (),
    watch: Callable[[Generation], None] = lambda generation: None,
) -> Found:
    """Search until the end, or until SIGINT or SIGTERM; what is done is kept, and a second signal kills.

    Args:
        recipe: the whole configuration; written to RUN/config.toml.
        run: a new or empty folder; with `resume`, one with a checkpoint of the same recipe. Costs, limits and what
            evolution does may differ then.
        resume: continue from the newest checkpoint and the scores.
        sinks: besides RUN/log.jsonl, what else gets the record of every update.
        watch: called after every generation.

    Raises:
        UserError: bad input, a loss that is not finite, or a file that cannot be written.
    """
    start = _start(recipe, run, resume=resume)
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    costs = _costs(recipe, run)
    with contextlib.ExitStack() as closing:
        searching = Search(recipe, run, costs)
        closing.callback(searching.trainer.checkpoints.wait)
        if start is not None:
            searching.load(start)
        write_atomically(run / RECIPE, config.dumps(recipe).encode())
        _write(run / COSTS, costs)
        interrupt = closing.enter_context(Interrupt())
        searching.train(sinks, interrupt)
        searching.evolve(watch, interrupt)
        return searching.found(interrupt)


class Search:
    """A supernet in training, and the scores of its sub-models.

    ranking: the probes' losses at the last validation. taus: how every two successive rankings agreed.
    losses: of every pattern scored with the final weights.
    """

    def __init__(self, recipe: SearchRecipe, run: Path, costs: Costs) -> None:
        self.recipe, self.folder, self.costs = recipe, run, costs
        self.trainer = _trainer(recipe, run)
        self.choices, self.depth, self.seed = recipe.search.choices, recipe.model.depth, recipe.train.seed
        stream = generator(self.seed, "probes")
        self.probes = distinct(lambda: draw(self.choices, self.depth, stream), recipe.search.probes)
        self.ranking: list[float] = []
        self.taus: list[float] = []
        self.losses: dict[Pattern, float] = {}

    @property
    def trained(self) -> bool:
        """Whether the supernet's updates are over: all made, or the ranking has settled."""
        enough, patience = self.recipe.search.tau, self.recipe.search.patience
        return self.trainer.step >= self.recipe.train.steps or settled(self.taus, enough=enough, patience=patience)

    def train(self, sinks: Sequence[Sink], interrupt: Interrupt) -> None:
        """Update one random sub-model after another until `trained` or a signal; then there is a checkpoint."""
        settings, trainer = self.recipe.train, self.trainer
        steps = range(trainer.step, trainer.step if self.trained else settings.steps)
        stream = prefetch(trainer.packer, steps, self.recipe.data.workers, micros=settings.accumulate)
        with contextlib.closing(stream), contextlib.ExitStack() as closing:
            log = Log(self.folder, after=trainer.step)
            board = [Board(self.folder, after=trainer.step)] if settings.tensorboard else []
            outputs: list[Sink] = [*board, *sinks]
            for sink in (log, *outputs):
                closing.callback(sink.close)
            for step in steps:
                began = time.perf_counter()
                batches = [next(stream) for _ in range(settings.accumulate)]
                choose(trainer.decoder, draw(self.choices, self.depth, generator(self.seed, "pattern", step)))
                record = trainer.update(batches)
                record["seconds"] = time.perf_counter() - began
                record["tokens_per_second"] = settings.batch_tokens / record["seconds"]
                scores: dict[str, Any] = {}
                if trainer.step == settings.steps or trainer.step % settings.validate_every == 0:
                    self.rank([self.score(pattern) for pattern in self.probes])
                    scores = {"scores": self.ranking}
                    record |= {"valid_loss": statistics.fmean(self.ranking)}
                    record |= {"tau": self.taus[-1]} if self.taus else {}
                log.write(record | scores)
                for sink in outputs:
                    sink.write(record)
                last = self.trained or interrupt.name is not None
                if last or trainer.step % settings.checkpoint_every == 0:
                    trainer.save(valid_loss=record.get("valid_loss"))
                if last:
                    break
        trainer.checkpoints.wait()

    def rank(self, ranking: list[float]) -> None:
        """Take the probes' losses of a validation and compare them with those of the one before."""
        if self.ranking:
            self.taus.append(kendall(self.ranking, ranking))
        self.ranking = ranking

    def score(self, pattern: Pattern) -> float:
        """Validation loss of a sub-model with the supernet's weights, in nats per token."""
        choose(self.trainer.decoder, pattern)
        return self.trainer.validate()["valid_loss"]

    def evolve(self, watch: Callable[[Generation], None], interrupt: Interrupt) -> None:
        """Score the uniform patterns, and under every limit generation after generation; a signal ends it."""
        self.losses = _scores(self.folder, self.trainer.step)
        self._add(self._uniform(), interrupt)
        for limit in self.recipe.search.limits:
            generations = evolve(
                self.recipe.search, self.costs, self.losses, limit=limit * self._most(), seed=self.seed
            )
            for number, population in enumerate(generations, start=1):
                self._add(population, interrupt)
                if interrupt.name is not None:
                    return
                best = min(self.losses[pattern] for pattern in population)
                watch(Generation(limit, number, len(self.losses), best))

    def found(self, interrupt: Interrupt) -> Found:
        """The result, written to RUN/front.json and RUN/front/N.toml unless a signal came before."""
        step, scored, stopped = self.trainer.step, len(self.losses), interrupt.name
        if stopped is not None:
            return Found(step, stopped, self.taus, scored, [], [])
        points = [Point(pattern, loss, self.costs(pattern)) for pattern, loss in self.losses.items()]
        largest = max(self.recipe.search.limits) * self._most()
        front = pareto(point for point in points if point.cost <= largest)
        uniform = sorted((point for point in points if point.pattern in self._uniform()), key=lambda point: point.cost)
        recipes = [self.folder / "front" / f"{number}.toml" for number in range(1, len(front) + 1)]
        for path, point in zip(recipes, front, strict=True):
            write_atomically(path, config.dumps(self.recipe.training(point.pattern)).encode())
        for old in set((self.folder / "front").glob("*.toml")) - set(recipes):
            old.unlink()
        document = {
            "cost": self.costs.cost,
            "context": self.costs.context,
            "limits": self.recipe.search.limits,
            "costliest": self._most(),
            "step": step,
            "taus": self.taus,
            "scored": scored,
            "front": [
                {"recipe": f"front/{path.name}"} | point._asdict() for path, point in zip(recipes, front, strict=True)
            ],
            "uniform": [point._asdict() for point in uniform],
        }
        write_atomically(self.folder / FRONT, json.dumps(document, indent=1).encode() + b"\n")
        return Found(step, None, self.taus, scored, front, uniform)

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint of this recipe. Raises UserError when it is damaged or the text has changed."""
        trainer, training = self.trainer, checkpoint.verify(folder)
        for key, now in (("text", trainer.text.fingerprint), ("tokenizer", trainer.tokenizer.fingerprint)):
            if training[key] != now:
                raise UserError(
                    f"{folder}: expected the {key} of the first start, got a changed one; "
                    f"restore the {key} or start another run"
                )
        trainer.decoder.load_state_dict(load_file(folder / "model.safetensors"))
        trainer.optimizer.load_state_dict(load_file(folder / OPTIMIZER))
        trainer.step, trainer.tokens = training["step"], training["tokens"]
        trainer.recent.extend(training["losses"])
        for record in read_log(self.folder):
            if record["step"] <= trainer.step and "scores" in record:
                self.rank(record["scores"])

    def _add(self, patterns: Sequence[Pattern], interrupt: Interrupt) -> None:
        """Score those that are new, each of them on disk before the next, up to a signal."""
        for pattern in patterns:
            if interrupt.name is not None:
                return
            if pattern not in self.losses:
                self.losses[pattern] = self.score(pattern)
                losses = {" ".join(names): loss for names, loss in self.losses.items()}
                _write(self.folder / SCORES, Scores(step=self.trainer.step, losses=losses))

    def _uniform(self) -> list[Pattern]:
        return [(name,) * self.depth for name in self.choices]

    def _most(self) -> float:
        return self.costs(self.costs.costliest())


def _trainer(recipe: SearchRecipe, run: Path) -> Trainer:
    """A trainer whose decoder is the supernet, and whose optimizer knows all mixers."""
    settings = recipe.train
    trainer = Trainer(recipe.training(recipe.search.choices), run)
    trainer.decoder = supernet(recipe.model, seed=settings.seed).to(trainer.device)
    trainer.shadow = copy.deepcopy(trainer.decoder).cpu()
    trainer.decoder.recompute = settings.activation_checkpointing
    trainer.parameters = list(trainer.decoder.parameters())
    trainer.optimizer = Optimizer(
        trainer.decoder,
        name=settings.optimizer,
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    return trainer


def _start(recipe: SearchRecipe, run: Path, *, resume: bool) -> Path | None:
    """The checkpoint to continue from, or None for a fresh start; refuses folders that fit neither."""
    if not resume:
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise UserError(
                f"{run}: expected a new or empty run folder, got something else; "
                "continue a search with --resume, or choose another folder"
            )
        return None
    folder = checkpoint.latest(run)
    before = config.load(SearchRecipe, run / RECIPE)
    fixed = (f"search.{key}" for key in FIXED if getattr(before.search, key) != getattr(recipe.search, key))
    choices = recipe.search.choices
    if key := next(fixed, None) or changed(before.training(choices), recipe.training(choices)):
        raise UserError(
            f"{run}: {key} is not what this run was started with; "
            f"resume with {run / RECIPE}, or start another run with the new value"
        )
    return folder


def _costs(recipe: SearchRecipe, run: Path) -> Costs:
    """The run's costs, the ones it has where they are of the same kind; UserError where no pattern is in a limit."""
    settings = recipe.search
    costs = _read(Costs, run / COSTS)
    if costs is None or (costs.cost, costs.context) != (settings.cost, settings.context):
        gpu = recipe.train.device != "cpu" and torch.cuda.is_available()
        costs = pricing.costs(recipe.model, settings, torch.device("cuda" if gpu else "cpu"))
    least = costs(costs.cheapest()) / costs(costs.costliest())
    if min(settings.limits) < least:
        raise UserError(
            f"search.limits: the cheapest pattern costs {least:.3g} of the costliest, got a limit of "
            f"{min(settings.limits):.3g}; raise it to {math.ceil(1000 * least) / 1000} or more"
        )
    return costs


def _scores(run: Path, step: int) -> dict[Pattern, float]:
    """What has been scored with the weights of `step`."""
    scores = _read(Scores, run / SCORES)
    if scores is None or scores.step != step:
        return {}
    return {tuple(names.split()): loss for names, loss in scores.losses.items()}


def _read(cls: type[C], path: Path) -> C | None:
    """What `_write` wrote, None where there is no file."""
    try:
        return cls.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise UserError(
            f"{path}: expected what a search wrote, got something else; remove it, to have it made anew"
        ) from None


def _write(path: Path, document: Config) -> None:
    write_atomically(path, document.model_dump_json(indent=1).encode() + b"\n")
