"""`isotach tokenize`: learn a byte-level BPE vocabulary from text."""

from pathlib import Path
from typing import Annotated

import typer


def tokenize(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Files, folders, stdlib, hf:NAME[:CONFIG] or - for standard input."),
    ],
    vocab: Annotated[int, typer.Option(help="Size of the vocabulary, with 256 bytes and <|endoftext|>.")] = 8192,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("tokenizer.json"),
    text_field: Annotated[str, typer.Option(help="Field of JSON lines, Parquet and datasets.")] = "text",
    separator: Annotated[str | None, typer.Option(help="What divides a text file into documents.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if there is one.")] = False,
) -> None:
    """Learn a BPE vocabulary and say how well it shortens text that it has not seen."""
    from isotach.config import parse
    from isotach.data.stream import DataConfig, read_text
    from isotach.data.tokenizer import train_bpe
    from isotach.errors import UserError
    from isotach.files import check_writable, replacing

    if out.is_dir():
        raise UserError(f"{out}: expected a file to write, got a folder; use --out {out / 'tokenizer.json'}")
    if out.exists() and not force:
        raise UserError(f"{out}: expected a new file, got one that exists; choose another name or add --force")
    check_writable(out)
    data = {"train": sources, "text_field": text_field, "document_separator": separator}
    config = parse(DataConfig, data, who="tokenize")
    tokenizer = train_bpe(read_text(config, "train"), vocab)
    text_bytes = tokens = 0
    for text in read_text(config, "valid"):
        text_bytes += len(text.encode())
        tokens += len(tokenizer.encode(text))
    with replacing(out) as file:
        file.write(tokenizer.file_bytes())
    rate = f"{text_bytes / tokens:.2f} bytes per token on held-out text" if tokens else "no text held out to measure on"
    print(f"{out}: {tokenizer.vocab_size} tokens, {rate}")
