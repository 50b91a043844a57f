"""Named random streams: the same (seed, names) gives the same numbers on every machine, in any order of use."""

import hashlib

import torch


def seed_of(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names` under `seed`; different names give unrelated streams."""
    text = "\0".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for the stream called `names`: layers, ranks and requests never shift each other's numbers."""
    return torch.Generator(device).manual_seed(seed_of(seed, *names))
