"""What a run reports: loss in three units, speed against the machine's peak, memory, and the log that keeps it."""

import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from isotach.errors import UserError
from isotach.files import replacing
from isotach.train.checkpoint import explained

LOG = "log.jsonl"

# Dense peak FLOPs/s in (bf16 with fp32 accumulation, fp32 without TF32), from NVIDIA's data sheets. The first name
# that the device's name contains counts, so a variant stands before its family.
PEAK_FLOPS = {
    "B200": (2250e12, 80e12),
    "GH200": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A10G": (70e12, 35e12),
    "A10": (125e12, 31.2e12),
    "A6000": (154.8e12, 38.7e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "4090": (165.2e12, 82.6e12),
    "3090": (71e12, 35.6e12),
}


def losses(nats: float, *, tokens: int, text_bytes: int) -> dict[str, float]:
    """Loss of `tokens` targets that cost `nats` in sum and stand for `text_bytes` bytes of UTF-8 text.

    Returns `loss` (nats per token), `bpb` (bits per byte of text; an end-of-document token costs bits but stands for
    no byte) and `ppl` (perplexity per token; infinity is left out, as JSON has none).
    """
    result = {"loss": nats / tokens}
    if text_bytes:
        result["bpb"] = nats / math.log(2) / text_bytes
    if result["loss"] < 700:  # exp overflows float64 just above
        result["ppl"] = math.exp(result["loss"])
    return result


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs/s that model FLOPs are compared with: the data sheet's for a known GPU, else the measured rate."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float32):
        name = torch.cuda.get_device_name(device)
        for known, (bf16, fp32) in PEAK_FLOPS.items():
            if known in name:
                return bf16 if dtype == torch.bfloat16 else fp32
    return matmul_rate(device, dtype)


def matmul_rate(device: torch.device, dtype: torch.dtype, *, size: int = 1024, repeats: int = 5) -> float:
    """FLOPs/s of a size-cubed matrix product with the threads in use now, median of `repeats`."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for a GPU
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[1:])


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: resident set of this process on CPU, allocated by torch on GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB on Linux


class Log:
    """RUN/log.jsonl: one JSON object per finished step, each with its `step`, none twice.

    Opening it drops what a crashed run wrote after step `after`, where training starts again, and a torn last line.
    """

    def __init__(self, run: Path, *, after: int) -> None:
        path = run / LOG
        if path.exists():
            kept = [record for record in read_log(run) if record["step"] <= after]
            with replacing(path) as file:
                file.writelines(f"{json.dumps(record)}\n".encode() for record in kept)
        with explained(path):
            self._file = path.open("a", encoding="utf-8", buffering=1)
        self.path = path

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; it has reached the operating system on return."""
        with explained(self.path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file; every line has been written already."""
        self._file.close()


def read_log(run: Path) -> list[dict[str, Any]]:
    """The records of RUN/log.jsonl in order; a torn last line, the trace of a crash, is left out.

    Raises UserError when there is no log or another line is not a record.
    """
    path = run / LOG
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{run}: expected a run folder with a {LOG}, found none; check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: expected JSON lines, got bytes that are not UTF-8; restore or remove it") from None
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # a whole file ends in a newline: the last piece is empty
        try:
            record = json.loads(line)
            record["step"] + 0
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}: line {number} is not a log record; remove that line") from None
        records.append(record)
    return records


class Board:
    """The same records as TensorBoard curves, in RUN/tensorboard."""

    def __init__(self, run: Path, *, after: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "train.tensorboard: expected the tensorboard extra, which is not installed; "
                "run pip install 'isotach[tensorboard]', or leave train.tensorboard out"
            ) from None
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=after + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Add every number of the record at its step."""
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
