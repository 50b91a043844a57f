"""A recipe for a search: that of a training run, and the table [search]."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from isotach import config as configuration
from isotach import mixers
from isotach.config import Config
from isotach.data.stream import DataConfig
from isotach.models.decoder import ModelConfig
from isotach.train.recipe import Count, Fraction, Recipe, TrainConfig

Pattern = tuple[str, ...]
Cost = Literal["flops", "state_bytes", "step_ms", "read_ms"]
Share = Annotated[float, Field(gt=0, le=1)]


class SearchConfig(Config):
    """The `[search]` table.

    choices: mixers that any layer may have; options of each are its [model.NAME], as always.
    cost: flops of the next token (forward), state_bytes, step_ms (measured time of the next token) or read_ms
        (measured time of reading), all after or of `context` tokens. Counted costs are the same everywhere; measured
        ones are this machine's, taken once per run.
    context: tokens.
    limits: one evolution each: the largest cost, as a share of the costliest pattern's.
    probes: fixed random patterns, scored at every validation to tell whether their ranking has settled.
    tau: the supernet's training ends once Kendall's τ of two successive rankings reaches this,
    patience: or once so many validations have brought no larger τ, or with train.steps.
    population, generations: of an evolution; parents: how many of the best stay and have children, half of which are
        mutants and half crossings.
    mutation: chance that a mutant draws a layer's mixer anew.
    """

    choices: Pattern
    cost: Cost = "flops"
    context: Count = 4096
    limits: Annotated[tuple[Share, ...], Field(min_length=1)] = (1.0,)
    probes: Annotated[int, Field(ge=2)] = 100
    tau: Annotated[float, Field(gt=0, le=1)] = 0.9
    patience: Count = 10
    generations: Count = 30
    population: Annotated[int, Field(ge=2)] = 125
    parents: Count = 25
    mutation: Fraction = 0.3

    @field_validator("choices")
    @classmethod
    def _choices(cls, value: Pattern) -> Pattern:
        for name in value:
            mixers.find(name)
        if len(value) < 2 or len(set(value)) < len(value):
            raise ValueError(f'expected two mixers or more, each once, such as ["softmax", "lightning"]; got {value}')
        return value

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.parents >= self.population:
            raise ValueError(
                f"expected fewer parents than population = {self.population}, got {self.parents}; lower parents"
            )
        return self


class SearchRecipe(Config):
    """Tables `[model]`, `[data]`, `[train]` and `[search]`; model.pattern is what is searched, so it is left out.

    The supernet trains as `[train]` says, and train.valid_tokens of the validation text score a pattern.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig = TrainConfig()
    search: SearchConfig

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        choices = self.search.choices
        if "pattern" in self.model.model_fields_set:
            raise ValueError("model.pattern is what the search finds; leave it out, and name mixers in search.choices")
        if self.data.valid is None and self.data.valid_fraction == 0:
            raise ValueError(
                "expected validation text to score patterns on, got none; set data.valid or data.valid_fraction"
            )
        return self.model_copy(update={"model": patterned(self.model, choices)})

    @model_serializer(mode="wrap")
    def _without_pattern(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = serialize(self)
        del data["model"]["pattern"]
        return data

    def training(self, pattern: Pattern) -> Recipe:
        """The recipe that trains the model with this pattern."""
        return Recipe(model=patterned(self.model, pattern), data=self.data, train=self.train)


def patterned(model: ModelConfig, pattern: Pattern) -> ModelConfig:
    """The same model with this pattern, and without options of mixers that it no longer has."""
    table = model.model_dump(mode="json", exclude_none=True) | {"pattern": list(pattern)}
    unused = set(model.pattern) - set(pattern)
    return configuration.parse(ModelConfig, {k: v for k, v in table.items() if k not in unused}, who="model")
