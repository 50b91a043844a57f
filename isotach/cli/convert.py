"""isotach convert RUN OUT: the tnn layers of a model get a constant state, or its weights fewer bits."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

if TYPE_CHECKING:
    from isotach.data.tokenizer import Tokenizer
    from isotach.models.decoder import Decoder

REACH = 4  # what happens behind the exact lags is told up to so many times as far


class To(StrEnum):
    etsc = "etsc"
    published = "published"
    ring = "ring"
    int8 = "int8"
    bfloat16 = "bfloat16"


def convert(
    run: Annotated[Path, typer.Argument(help="Run folder (its newest checkpoint), RUN/best, or a checkpoint folder.")],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to write; it must not exist yet.")],
    lags: Annotated[
        int | None, typer.Option(min=1, help="Distances that stay exact; left out, the tokens of a training row.")
    ] = None,
    to: Annotated[
        To,
        typer.Option(
            help="tnn: a diagonal state; the same as its paper closes it; or a ring buffer of inputs. Any model: int8, "
            "and bfloat16 for a GPU."
        ),
    ] = To.etsc,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Give the tnn layers of a model a state of constant size; print how exact all forms are and what they cost.

    Or round the matrices of any model for inference; print the bytes, and the loss where it validates.
    """
    from isotach import config
    from isotach.errors import UserError
    from isotach.infer.open import open_checkpoint
    from isotach.models.convert import Form, converted
    from isotach.models.quantize import is_int8
    from isotach.train.checkpoint import resolve

    if out.exists():
        raise UserError(f"{out}: expected the name of a new folder, got one that is taken; choose another")
    source = resolve(run)
    before, tokenizer = open_checkpoint(source, device="cpu")
    if is_int8(before):
        raise UserError(f"{source}: expected weights in floating point, got int8; convert the model they are made of")
    if to in (To.int8, To.bfloat16):
        if lags is not None:
            raise UserError(f"convert: --lags is for tnn layers; leave it out with --to {to.value}")
        _round(source, out, to, before, tokenizer, as_json=as_json)
        return
    lags = lags or config.read(source / "config.toml").get("train", {}).get("seq_len")
    if lags is None:
        raise UserError(f"{source}: expected train.seq_len in config.toml, found none; give --lags")
    forms = {form: converted(before, form, lags=lags) for form in get_args(Form)}
    _write(source, out, forms[to], {"from": str(source), "to": to.value, "lags": lags})
    report = _measured(before, forms, lags)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        _show(report)
        print(f"{out}: {to.value}, exact for {lags} lags")


def _round(source: Path, out: Path, to: To, before: "Decoder", tokenizer: "Tokenizer", *, as_json: bool) -> None:
    """Write the model in fewer bits, and print what that saves and costs."""
    import math

    from isotach import config
    from isotach.models.quantize import bfloat16, int8
    from isotach.train.recipe import Recipe

    after = int8(before) if to == To.int8 else bfloat16(before)
    _write(source, out, after, {"from": str(source), "to": to.value})
    before_bytes, after_bytes = (sum(x.nbytes for x in model.state_dict().values()) for model in (before, after))
    report: dict[str, Any] = {"form": to.value, "bytes": {"before": before_bytes, "after": after_bytes}}
    if "data" in config.read(source / "config.toml"):
        report |= _losses(config.load(Recipe, source / "config.toml"), tokenizer, before, after)
    if as_json:
        print(json.dumps(report, indent=1))
        return
    print(f"{out}: {after_bytes / 2**20:,.1f} MiB instead of {before_bytes / 2**20:,.1f}")
    if "nats" not in report:
        print("Loss not measured: config.toml names no text to validate on.")
    else:
        nats = report["nats"]
        (was, now), share = map(math.exp, nats.values()), math.expm1(nats["after"] - nats["before"])
        print(f"Perplexity {now:.4f} instead of {was:.4f} over {report['tokens']:,} tokens ({share:+.2%})")


def _losses(recipe: Any, tokenizer: "Tokenizer", before: "Decoder", after: "Decoder") -> dict[str, Any]:
    """Nats per token of both models on what the recipe validates on; empty where it sets no text aside."""
    from isotach.eval.perplexity import mean_nats
    from isotach.train.loop import valid_batches

    if not (batches := valid_batches(recipe, tokenizer)):
        return {}
    tokens = sum(batch.targets.numel() for batch in batches)
    return {"tokens": tokens, "nats": {"before": mean_nats(before, batches), "after": mean_nats(after, batches)}}


def _write(source: Path, out: Path, model: "Decoder", conversion: dict[str, Any]) -> None:
    """A complete checkpoint folder, or none."""
    import os
    import secrets
    import shutil

    import tomli_w

    from isotach import config
    from isotach.train.checkpoint import TRAINING, explained, seal, verify

    recipe = config.read(source / "config.toml")
    recipe["model"] = model.config.model_dump(mode="json", exclude_none=True)
    training = {"step": verify(source)["step"], "converted": conversion}
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    with explained(out):
        try:
            temporary.mkdir(parents=True)
            (temporary / "config.toml").write_text(tomli_w.dumps(recipe), encoding="utf-8")
            (temporary / TRAINING).write_text(json.dumps(training, indent=2) + "\n", encoding="utf-8")
            shutil.copy(source / "tokenizer.json", temporary)
            model.save(temporary)
            seal(temporary)
            os.rename(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _measured(before: "Decoder", forms: dict[str, "Decoder"], lags: int) -> dict[str, Any]:
    """What every form answers and costs: errors of each kernel, of the whole model, bytes and seconds per token."""
    import torch

    from isotach.models.convert import costs, kernel_errors, log_probability_differences, tnn_layers

    reach, layers = REACH * lags, tnn_layers(before)
    measured = [("tnn", lags, before), ("tnn", reach, before), *((name, reach, forms[name]) for name in forms)]
    first: list[Any] = [model.blocks[min(layers)].mixer for _, _, model in measured]  # layers of a model cost the same
    rows: list[dict[str, Any]] = []
    for (name, context, _), cost in zip(measured, costs(first, [context for _, context, _ in measured]), strict=True):
        whole = {"state_bytes": len(layers) * cost.state_bytes, "seconds": len(layers) * cost.seconds}
        rows.append({"form": name, "tokens": context} | whole)
    tokens = torch.randint(before.config.vocab, (1, reach), generator=torch.Generator().manual_seed(0))
    nats = log_probability_differences(before, list(forms.values()), tokens)
    for row, own, model in zip(rows[2:], nats, forms.values(), strict=True):
        row |= {"nats_within": float(own[:lags].max()), "nats_beyond": float(own[lags:].max()), "layers": []}
        for i, layer in layers.items():
            other: Any = model.blocks[i].mixer
            within, beyond = kernel_errors(layer, other, lags=lags, reach=reach)
            row["layers"].append({"layer": i, "within": within._asdict(), "beyond": beyond._asdict()})
    return {"lags": lags, "reach": reach, "forms": rows}


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    lags, reach, rows = report["lags"], report["reach"], report["forms"]
    near, far = f"lags 0..{lags - 1}", f"lags {lags}..{reach - 1}"
    errors = Table("form", "layer", f"kernel error, {near}", far, f"nats, tokens 0..{lags - 1}", f"{lags}..{reach - 1}")
    costs = Table("form", "tokens", "state", "ms / token")
    for row in rows:
        costs.add_row(
            row["form"], f"{row['tokens']:,}", f"{row['state_bytes'] / 2**20:,.3f} MiB", f"{row['seconds'] * 1e3:.3f}"
        )
        for layer in row.get("layers", ()):
            parts = (f"{part['largest']:.1e} ({part['relative']:.1e})" for part in (layer["within"], layer["beyond"]))
            first = layer is row["layers"][0]
            whole = (f"{row[key]:.1e}" if first else "" for key in ("nats_within", "nats_beyond"))
            errors.add_row(row["form"] if first else "", str(layer["layer"]), *parts, *whole)
    console = Console()
    console = Console(width=max(console.width, 110))
    console.print(errors)
    console.print(
        "Kernel errors: the largest (the norm of all, over the kernel's), in float32, near ones step by step."
    )
    console.print("Nats: the largest difference from tnn of any log-probability, over random tokens.")
    console.print(costs)
    console.print("Of one sequence in all tnn layers together, projections left out.")
    rotated, ring = (next(row for row in rows if row["form"] == name) for name in ("etsc", "ring"))
    ratio = rotated["seconds"] / ring["seconds"]
    console.print(
        f"Per token etsc takes {ratio:.2f} times as long as the ring buffer here, in "
        f"{rotated['state_bytes'] / ring['state_bytes']:.2f} times the memory."
    )
