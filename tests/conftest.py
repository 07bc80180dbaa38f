"""Fixtures shared by all tests."""

import os
import warnings
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@pytest.fixture(scope="session")
def data_dir() -> Path | None:
    """Where real data sets are prepared, or None where they are not.

    Set DP_TRANSCRIBE_DATA_DIR, or put them into `shared/tfds` beside the repository.
    """
    root = Path(__file__).resolve().parents[1]
    beside = root.parent / "shared" / "tfds"
    folder = Path(os.environ.get("DP_TRANSCRIBE_DATA_DIR", beside))
    return folder if (folder / "mnist").is_dir() else None


@pytest.fixture(scope="session")
def mnist_small():
    """The 5,000 real MNIST images that need no download, as an `ImageDataset`."""
    from dp_transcribe import data

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return data._embedded_mnist(reason=ConnectionError("not asked for"))
