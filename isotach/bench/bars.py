"""The figures of `isotach bench ops`: what is read off its rows, and what it is held against."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from isotach.bench.families import BACKWARD, BOTH, FORWARD
from isotach.bench.report import Figure, Row

OURS = "isotach"


class Pick(NamedTuple):
    """One number of one row; tokens and width where several rows differ in nothing else."""

    operation: str
    which: str
    column: str
    contender: str = OURS
    part: str = "core"
    tokens: int | None = None
    width: int | None = None

    def value(self, rows: Sequence[Row]) -> float | None:
        """None where the row is missing."""
        wanted = {"part": self.part, "tokens": self.tokens, "width": self.width}
        for row in rows:
            named = (row["operation"], row["pass"], row["contender"])
            at = all(row["at"][key] == value for key, value in wanted.items() if value is not None)
            if named == (self.operation, self.which, self.contender) and at and row["at"]["documents"] == 1:
                found: float | None = row.get(self.column)
                return found
        return None

    def __str__(self) -> str:
        sizes = [f"{name} {size:,}" for name, size in (("T", self.tokens), ("D", self.width)) if size is not None]
        what = self.column if self.contender == OURS else f"{self.contender}'s time over ours"
        return ", ".join([self.operation, *sizes, self.which, what])


def figures(rows: Sequence[Row], kind: str) -> list[Figure]:
    """Of a device's grid; without a value where a row is missing."""
    return list((_cpu if kind == "cpu" else _cuda)(rows))


def _figure(rows: Sequence[Row], pick: Pick, *, at_least: float | None = None, at_most: float | None = None) -> Figure:
    return Figure(str(pick), pick.value(rows), at_least, at_most)


def _quotient(rows: Sequence[Row], name: str, over: Pick, under: Pick, *, at_most: float) -> Figure:
    numerator, denominator = over.value(rows), under.value(rows)
    value = None if numerator is None or denominator is None else numerator / denominator
    return Figure(name, value, at_most=at_most)


def _cpu(rows: Sequence[Row]) -> Iterator[Figure]:
    yield _figure(rows, Pick("decay", FORWARD, "of_product", width=128), at_least=0.55)
    yield _figure(rows, Pick("decay", FORWARD, "times", "transformers", width=128), at_least=1.8)
    yield _figure(rows, Pick("decay", BOTH, "times", "transformers", width=128), at_least=1.9)
    yield _figure(rows, Pick("decay", FORWARD, "times", "sdpa", width=128), at_least=6.0)
    yield _figure(rows, Pick("decay", BOTH, "times", "sdpa", width=128))
    yield _figure(rows, Pick("decay, learned", BOTH, "of_least", part="memory", tokens=16384), at_most=1.25)
    for width in (64, 128):
        for operation in ("gated delta", "KDA"):
            yield _figure(rows, Pick(operation, FORWARD, "times", "transformers", width=width), at_least=2.0)
            yield _figure(rows, Pick(operation, BOTH, "times", "transformers", width=width), at_least=3.0)
        yield _figure(rows, Pick("Mamba-2", FORWARD, "times", "transformers", width=width), at_least=2.0)
        for which in (FORWARD, BOTH):
            yield _figure(rows, Pick("HGRN", which, "times", "torch", width=width), at_least=3.0)
            fixed = Pick("decay", which, "ms", width=width)
            for operation, bound in (("GLA", 3.0), ("GLA, strong", 8.0), ("HLA", 4.0)):
                name = f"{operation}, D {width}, {which}, over a fixed decay"
                yield _quotient(rows, name, Pick(operation, which, "ms", width=width), fixed, at_most=bound)
    yield _figure(rows, Pick("TNN", FORWARD, "times", "torch"), at_least=15.0)


def _cuda(rows: Sequence[Row]) -> Iterator[Figure]:
    """Milliseconds are those of an H200, FlashQLA's own among them."""
    for which, most in ((FORWARD, 0.40), (BOTH, 1.5)):
        yield _gpu(_figure(rows, Pick("decay", which, "ms"), at_most=most))
        yield _gpu(_figure(rows, Pick("decay", which, "times", "fla"), at_least=2.0))
        yield _gpu(_figure(rows, Pick("GLA", which, "times", "fla"), at_least=1.5))
        yield _gpu(_figure(rows, Pick("KDA", which, "times", "fla"), at_least=1.5))
        yield _gpu(_figure(rows, Pick("HGRN", which, "of_copy"), at_least=0.8))
    yield _gpu(_figure(rows, Pick("gated delta", FORWARD, "ms"), at_most=0.612))
    yield _gpu(_figure(rows, Pick("gated delta", BOTH, "times", "fla"), at_least=2.0))
    yield _gpu(_figure(rows, Pick("short filter", BACKWARD, "times", "fla"), at_least=3.0))
    short, long = (Pick("decay", BOTH, "ms", part="length", tokens=tokens) for tokens in (4096, 1 << 20))
    yield _gpu(_quotient(rows, "decay, forward + backward, cost of a token at 1M over 4k", long, short, at_most=1.15))
    for tokens in (2048, 8192, 32768):
        pick = Pick("decay", BOTH, "times", "sdpa", part="length", tokens=tokens)
        yield _gpu(_figure(rows, pick, at_least=1.0))


def _gpu(figure: Figure) -> Figure:
    return Figure(f"GPU: {figure.name}", figure.value, figure.at_least, figure.at_most)
