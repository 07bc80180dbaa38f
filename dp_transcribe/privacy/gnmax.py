"""Data-dependent Rényi accounting of GNMax: an epsilon that is itself private.

Where the teachers agree, their noisy majority hardly ever changes, and less is spent
than the worst case says. But whether they agree is a fact about the private records:
**the epsilon computed here depends on the data and must not be published** as it is.
The data-independent figure, which the ledger computes, may be.

It also speaks in **one direction**: how much likelier the labels are on these records
than on a neighbour's. What a neighbour's votes cost is a question to those votes.
"""

import dataclasses
import math

import numpy as np
from dp_accounting.rdp import rdp_privacy_accountant as rdp_lib
from scipy import special

from dp_transcribe import _validate

_ORDERS = np.array(rdp_lib.DEFAULT_RDP_ORDERS, float)
WARNING = (
    "This epsilon was computed from the private votes: it depends on the data, is "
    "itself not private and must not be published without noise of its own (smooth "
    "sensitivity, arXiv:1802.08908, appendix B). It bounds how much likelier the "
    "labels are on these records than on a neighbour's, not the reverse. Unit RECORD, "
    "relation REPLACE_ONE."
)


@dataclasses.dataclass(frozen=True)
class DataDependentEpsilon:
    """What a run of GNMax cost on the records that it was run on.

    Attributes:
        epsilon: data-dependent; never to be published as it is. For labels M of these
            records D and of any neighbour D', P[M(D) in S] is at most
            exp(epsilon) P[M(D') in S] + delta; not the same with D and D' exchanged.
        epsilon_data_independent: of the same releases, whatever the records.
        delta: of both.
        queries: number of queries.

    **Privacy**: unit `RECORD`. `epsilon` is not private: `warning` says so.
    """

    epsilon: float
    epsilon_data_independent: float
    delta: float
    queries: int

    @property
    def warning(self) -> str:
        """What has to stand beside `epsilon` wherever it is shown."""
        return WARNING

    def to_text(self) -> str:
        """Both figures, with the warning."""
        return (
            f"Data-dependent epsilon = {self.epsilon:.4g} per unit RECORD at delta = "
            f"{self.delta:g} for {self.queries} queries (data-independent: "
            f"{self.epsilon_data_independent:.4g}). {self.warning}"
        )


def log_error_probability(counts: np.ndarray, stddev: float) -> np.ndarray:
    """Log of a bound on the probability that another class wins (Proposition 7).

    Args:
        counts: votes `[queries, classes]`.
        stddev: of the noise on every count.

    Returns:
        `[queries]`, at most log((classes - 1) / classes).
    """
    ordered = -np.sort(-np.asarray(counts, float), axis=-1)
    gaps = (ordered[:, :1] - ordered[:, 1:]) / (math.sqrt(2.0) * stddev)
    classes = ordered.shape[-1]
    bound = special.logsumexp(special.log_ndtr(-gaps), axis=-1)
    return np.minimum(bound, math.log1p(-1.0 / classes))


def gnmax_rdp(log_q: float, stddev: float, orders: np.ndarray) -> np.ndarray:
    """Rényi divergences of one answer from a neighbour's (Theorem 6, Proposition 10).

    Args:
        log_q: log of a bound on the probability of an unlikely outcome.
        stddev: of the noise on every count, in votes.
        orders: `[orders]`, above 1.

    Returns:
        `[orders]`, never above the data-independent `order / stddev**2`. Of the answer
        where `log_q` holds from that of a neighbour, not the reverse.
    """
    variance = stddev**2
    independent = orders / variance
    if log_q == -math.inf:
        return np.zeros_like(independent)
    mu2 = math.sqrt(variance * -log_q)
    mu1 = mu2 + 1.0
    usable = orders < mu1
    if mu2 <= 1.0 or not usable.any():
        return independent
    eps1, eps2 = mu1 / variance, mu2 / variance
    limit = (mu2 - 1.0) * eps2 - mu2 * (
        math.log1p(1.0 / (mu1 - 1.0)) + math.log1p(1.0 / (mu2 - 1.0))
    )
    if log_q > limit or -log_q <= eps2:
        return independent
    log_rest = math.log1p(-math.exp(log_q))
    shrunk = (log_q + eps2) * (1.0 - 1.0 / mu2)
    log_a = (orders - 1.0) * (log_rest - math.log(-math.expm1(shrunk)))
    log_b = (orders - 1.0) * (eps1 - log_q / (mu1 - 1.0))
    total = np.logaddexp(log_rest + log_a, log_q + log_b) / (orders - 1.0)
    return np.where(usable, np.clip(total, 0.0, independent), independent)


def data_dependent_epsilon(
    counts: np.ndarray, *, stddev: float, delta: float
) -> DataDependentEpsilon:
    """Epsilon of having released the noisy majority of each row of votes.

    Args:
        counts: the votes `[queries, classes]` of every query answered.
        stddev: of the noise on every count, in votes.
        delta: strictly between 0 and 1.

    Returns:
        Both figures. Only labels count (`released="label"`): noisy counts cost their
        data-independent epsilon.

    Raises:
        ValueError: an argument is out of range.

    References:
        Papernot et al. 2018, arXiv:1802.08908, theorem 6.
    """
    _validate.positive_finite("stddev", stddev)
    _validate.fraction_open("delta", delta)
    counts = np.asarray(counts, float)
    if counts.ndim != 2 or counts.shape[-1] < 2 or not np.all(counts >= 0):
        expected = "votes [queries, classes], 0 or more"
        raise _validate.invalid("counts", counts.shape, expected)
    likely = log_error_probability(counts, stddev)
    spent = np.zeros_like(_ORDERS)
    for log_q in likely:
        spent = spent + gnmax_rdp(float(log_q), stddev, _ORDERS)
    independent = len(counts) * _ORDERS / stddev**2
    return DataDependentEpsilon(
        epsilon=_epsilon(spent, delta),
        epsilon_data_independent=_epsilon(independent, delta),
        delta=float(delta),
        queries=len(counts),
    )


def _epsilon(divergences: np.ndarray, delta: float) -> float:
    if not divergences.any():
        return 0.0
    orders, spent = _ORDERS.tolist(), divergences.tolist()
    return float(rdp_lib.compute_epsilon(orders, spent, delta)[0])
