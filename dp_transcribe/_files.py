"""Files that are never seen half written, and digests of what belongs to them."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def replacing(path: Path, *, secret: bool = False) -> Iterator[Path]:
    """Yields a file beside `path` that takes its place when the block succeeds.

    Args:
        path: what is written, or written anew.
        secret: only the owner may read it, from before anything is in it.
    """
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    partial.unlink(missing_ok=True)
    if secret:
        partial.touch(mode=0o600)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def discard(folder: Path, names: Iterable[str]) -> None:
    """Removes files of a folder, as far as they are there."""
    for name in names:
        (folder / name).unlink(missing_ok=True)


def digest_of(values: np.ndarray | bytes) -> str:
    """SHA-256 of an array's numbers, in their order, or of a file's bytes."""
    held = values if isinstance(values, bytes) else np.ascontiguousarray(values).data
    return hashlib.sha256(held).hexdigest()
