"""Principal directions of public features, where there are fewer rows than columns."""

from __future__ import annotations

import numpy as np


def principal_directions(
    features: np.ndarray, rank: int, *, least: float = 1e-12
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, largest variances and their directions, by the rows' inner products.

    Args:
        features: float `[n, features]`.
        rank: number of directions, at most n.
        least: what smaller variances are raised to.

    Returns:
        The mean `[features]`, variances `[rank]` from the largest on, and orthonormal
        directions `[features, rank]`.

    **Privacy**: for public features alone.
    """
    mean = features.mean(axis=0)
    centred = features - mean
    variances, mixtures = np.linalg.eigh(centred @ centred.T / len(features))
    variances = np.maximum(variances[::-1][:rank], least)
    directions = centred.T @ mixtures[:, ::-1][:, :rank]
    return mean, variances, directions / np.sqrt(variances * len(features))
