"""Settings for every test: the interpreter where there is no GPU, poisoned memory, where the data
lies."""

import os
from pathlib import Path

import pytest
import torch

if (
    not torch.cuda.is_available()
):  # before any kernel is imported: triton.jit reads it when it decorates
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def data() -> Path:
    """Real data (FASTSSL_DATA). Under CI a missing folder is an error; elsewhere its tests are
    skipped."""
    root = Path(__file__).parents[1]
    folder = Path(os.environ.get("FASTSSL_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        message = f"no data at {folder}; set FASTSSL_DATA to the folder of real data sets"
        if os.environ.get("CI"):
            raise FileNotFoundError(message)
        pytest.skip(message)
    return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU the `gpu` tests are deselected: they are for another machine, not left out
    here."""
    if torch.cuda.is_available():
        return
    wanted = [item for item in items if not item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted
