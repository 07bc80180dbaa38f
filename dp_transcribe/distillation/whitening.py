"""Whitening of features by public images, so that noise falls where it hurts least."""

from __future__ import annotations

import dataclasses

import numpy as np

from dp_transcribe import _validate
from dp_transcribe._principal import principal_directions
from dp_transcribe.distillation.linear import PrivateLinearModel

_ROWS = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class PublicWhitening:
    """A symmetric linear map that shortens the directions in which features vary most.

    Noisy gradient descent adds the same noise in every direction, while features of
    images vary a hundred times more in some directions than in others. Dividing by
    the root of the covariance of *public* images evens that out without cost.

    Attributes:
        basis: float32 `[rank, features]`, orthonormal principal directions.
        factors: float32 `[rank]`, above 0 and at most 1; other directions keep 1.

    **Privacy**: made from public images alone. It never lengthens a vector.
    """

    basis: np.ndarray
    factors: np.ndarray

    @classmethod
    def from_public(
        cls, features: np.ndarray, *, damping_rank: int = 100, rank: int = 600
    ) -> PublicWhitening:
        """Computes the map.

        Args:
            features: float `[images, features]` of public images.
            damping_rank: directions from this rank on are hardly shortened: their
                variance is what is added to all variances.
            rank: number of directions that are treated at all.

        Returns:
            The map.

        Raises:
            ValueError: `damping_rank` is not below the number of images.
        """
        count = len(features)
        _validate.in_range("damping_rank", damping_rank, 1, count - 1)
        most = min(max(rank, damping_rank + 1), count)
        _, variances, directions = principal_directions(features, most)
        damping = float(variances[damping_rank])
        used = variances > 1e-3 * damping
        factors = np.sqrt(damping / (variances[used] + damping))
        basis = directions[:, used].T
        return cls(basis.astype(np.float32), factors.astype(np.float32))

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Whitens features `[n, features]`, not in place; float32."""
        out = np.empty(features.shape, np.float32)
        for start in range(0, len(features), _ROWS):
            rows = np.asarray(features[start : start + _ROWS], np.float32)
            out[start : start + _ROWS] = self._scale(rows, self.factors)
        return out

    def plain_weights(self, model: PrivateLinearModel) -> tuple[np.ndarray, np.ndarray]:
        """A linear model of the plain features from one of the whitened features.

        Its scores are the model's logits up to a factor of each example, which is
        above 0: the most likely class is always the same.

        Args:
            model: fitted on whitened features.

        Returns:
            Weights, float32 `[features, classes]`, and the offset that the model's
            centre makes, float32 `[classes]`.

        Raises:
            RuntimeError: the model was not fitted.

        **Privacy**: post-processing of the model.
        """
        weights, centre = model.weights, model.centre
        if weights is None or centre is None:
            raise RuntimeError("The model has no weights yet. Call `fit` first.")
        return self._scale(weights.T, self.factors).T, -(centre @ weights)

    def _scale(self, rows: np.ndarray, factors: np.ndarray) -> np.ndarray:
        """Multiplies the coordinates along the basis by factors."""
        return rows + (rows @ self.basis.T * (factors - 1.0)) @ self.basis
