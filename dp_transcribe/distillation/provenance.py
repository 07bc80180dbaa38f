"""What support images must not come from: private records and earlier releases."""

from __future__ import annotations

import numpy as np

from dp_transcribe._files import digest_of

# Correlation from which on two examples are one; rounding to 256 levels keeps more.
_ALIKE = 0.9999
# Of fewer values, different examples may be that much alike.
_FEWEST = 16
_ROWS = 1000

_released: set[str] = set()


def remember_released(images: np.ndarray) -> None:
    """Notes images that private records had a part in, while the process lives.

    Args:
        images: float `[n, ...]`.
    """
    _released.update(_digests(images))


def were_released(images: np.ndarray) -> bool:
    """Whether one of these images was noted, value for value.

    Args:
        images: float `[n, ...]`; constant ones are never known.
    """
    return not _released.isdisjoint(_digests(images))


def holds_record(examples: np.ndarray, records: np.ndarray) -> bool:
    """Whether one of a few examples is a record.

    It is recognised as it is and, if it has 16 values or more, with all of its values
    multiplied by one number (a negative one inverts it) and moved by another one, such
    as bytes for fractions. Images are recognised when mirrored or turned by right
    angles, too. Crops, shifts, other turns, noise, mixtures of records and factors
    that differ between values, such as those of columns, are not seen.

    Args:
        examples: float `[n, ...]`, images if they have two axes or more each.
        records: of the same shape, but for their number.

    **Privacy**: the answer depends on every record and must end the program.
    """
    views = _flat(_views(np.asarray(examples, np.float32)))
    exact = {row.tobytes() for row in views}
    wanted = _standardised(views)
    for start in range(0, len(records), _ROWS):
        rows = _flat(np.asarray(records[start : start + _ROWS], np.float32))
        if any(row.tobytes() in exact for row in rows):
            return True
        if rows.shape[1] < _FEWEST:
            continue
        if np.any(np.abs(_standardised(rows) @ wanted.T) > _ALIKE):
            return True
    return False


def _views(examples: np.ndarray) -> np.ndarray:
    """Examples, and images `[n, height, width, ...]` mirrored and turned as well."""
    views = [examples]
    if examples.ndim > 2:
        views += [np.flip(view, 1) for view in views]
        views += [np.flip(view, 2) for view in views]
        if examples.shape[1] == examples.shape[2]:
            views += [np.swapaxes(view, 1, 2) for view in views]
    return np.concatenate(views)


def _flat(rows: np.ndarray) -> np.ndarray:
    """Rows `[n, values]` in which zero has one sign."""
    return np.ascontiguousarray(rows.reshape(len(rows), -1)) + np.float32(0.0)


def _standardised(rows: np.ndarray) -> np.ndarray:
    """Rows of mean zero and norm one, float32; zero where all values are the same."""
    rows = np.where(np.isfinite(rows), rows, 0.0).astype(np.float64)
    offsets = rows - rows.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(offsets, axis=1, keepdims=True)
    varied = lengths > 1e-5 * np.linalg.norm(rows, axis=1, keepdims=True)
    standard = np.divide(offsets, lengths, out=np.zeros_like(rows), where=varied)
    return standard.astype(np.float32)


def _digests(images: np.ndarray) -> set[str]:
    rows = _flat(np.asarray(images, np.float32))
    return {digest_of(row) for row in rows[np.any(rows != rows[:, :1], axis=1)]}
