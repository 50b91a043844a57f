"""What every test runs under: poisoned memory, one thread, no network, the same random examples each time."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when the library is imported; nothing downloads at run time

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined: then it runs on the CPU, if slowly

hypothesis.settings.register_profile("isotach", deadline=None, derandomize=True)
hypothesis.settings.load_profile("isotach")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small tensors gain nothing from a second thread, and sums then come out the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill every fresh allocation with NaN (integers: their largest value), so that reading it shows.

    PyTorch does this itself, for `torch.empty` and its kin and for what the operators written in terms of them
    allocate inside, but only in its deterministic mode. On a GPU that mode would also swap kernels, so tests
    marked `gpu` run without it.
    """
    if request.node.get_closest_marker("gpu"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real text named by ISOTACH_DATA; tests that need it are skipped where there is none."""
    folder = Path(os.environ.get("ISOTACH_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; name one with ISOTACH_DATA")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
