"""A checkpoint folder, ready to read and write."""

from pathlib import Path

import torch

from isotach.data.tokenizer import Tokenizer, load_tokenizer
from isotach.errors import UserError
from isotach.infer.generate import check_vocabulary
from isotach.models.decoder import Decoder


def open_checkpoint(folder: Path, *, device: str = "auto") -> tuple[Decoder, Tokenizer]:
    """The model and the tokenizer of a checkpoint folder, on "cpu", "cuda", or with "auto" a GPU where there is one.

    Raises UserError when one of the two is missing or damaged, when they do not match, and for a device that is absent.
    """
    gpu = torch.cuda.is_available()
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not gpu):
        raise UserError(f"device: expected auto or cpu{', or cuda' if gpu else ' (there is no GPU)'}, got {device}")
    decoder = Decoder.load(folder, "cuda" if gpu and device != "cpu" else "cpu")
    tokenizer = load_tokenizer(folder)
    check_vocabulary(decoder, tokenizer)
    return decoder, tokenizer
