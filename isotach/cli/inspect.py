"""isotach inspect: what a model is and what it costs, before anything is trained."""

from pathlib import Path
from typing import Annotated

import typer

CONTEXTS = (1_024, 4_096, 16_384, 65_536, 262_144, 1_048_576)


def inspect(
    model: Annotated[str, typer.Argument(help="A preset, a recipe, a run or a checkpoint folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of [model], such as width=256.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Print parameters, FLOPs per token, and memory per sequence beside a softmax model of the same shape."""
    import collections
    import json

    import torch
    from rich.console import Console
    from rich.table import Table

    from isotach.models.decoder import Decoder

    config = _config(model, overrides or [])
    with torch.device("meta"):
        decoder = Decoder(config)
        twin = Decoder(config.model_copy(update={"pattern": ("softmax",), "mixers": _softmax(config)}))
    rows = [
        {
            "context": context,
            "flops_per_token": decoder.flops_per_token(context),
            "state_bytes": decoder.state_bytes(context),
            "softmax_flops_per_token": twin.flops_per_token(context),
            "softmax_cache_bytes": twin.state_bytes(context),
        }
        for context in CONTEXTS
    ]
    if as_json:
        print(json.dumps({"parameters": decoder.parameter_count(), "contexts": rows}, indent=1))
        return
    console = Console()
    mixers = collections.Counter(config.mixer_of(i) for i in range(config.depth))
    layers = ", ".join(f"{count} × {name}" for name, count in mixers.items())
    console.print(f"{decoder.parameter_count():,} parameters: width {config.width}, {config.heads} heads, {layers}")
    table = Table("context", "MFLOP / token", "state", "softmax: MFLOP / token", "softmax: cache")
    for row in rows:
        table.add_row(
            f"{row['context']:,}",
            f"{row['flops_per_token'] / 1e6:,.1f}",
            _bytes(row["state_bytes"]),
            f"{row['softmax_flops_per_token'] / 1e6:,.1f}",
            _bytes(row["softmax_cache_bytes"]),
        )
    console.print(table)
    console.print("Bytes per sequence, float32; the softmax model has the same width, depth and heads.")


def _config(model: str, overrides: list[str]):  # type: ignore[no-untyped-def]
    from isotach import config as configuration
    from isotach.config import nearest
    from isotach.errors import UserError
    from isotach.models.decoder import ModelConfig
    from isotach.models.presets import PRESETS

    path = Path(model)
    if model in PRESETS:
        table = {"preset": model}
    elif path.exists():
        table = configuration.read(path / "config.toml" if path.is_dir() else path).get("model", {})
    else:
        raise UserError(
            f"inspect: {model} is neither a preset nor a recipe, run or checkpoint; {nearest(model, PRESETS)}"
        )
    if not isinstance(table, dict):
        raise UserError(f"{model}: model: expected a table, got {table!r}; write its keys below [model]")
    for override in overrides:
        configuration.set_dotted(table, override)
    return configuration.parse(ModelConfig, table, who=model)


def _softmax(config):  # type: ignore[no-untyped-def]
    from isotach import mixers
    from isotach.config import parse

    shape = {"width": config.width, "heads": config.heads}
    options = parse(mixers.find("softmax").Config, shape, who="inspect: the softmax model beside it")
    return {**config.mixers, "softmax": config.mixers.get("softmax", options)}


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
