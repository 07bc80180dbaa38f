"""Where queries come from, and what that makes an answer cost.

The sampler that draws the batch also says how the events of an answer compose: no
other code decides it, so a batch that is not Poisson-sampled cannot be accounted as
one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import dp_accounting
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.mechanisms.base import Mechanism
from dp_transcribe.privacy.events import Event
from dp_transcribe.privacy.ledger import Spend
from dp_transcribe.privacy.units import Unit
from dp_transcribe.workers import local_devices, outside_scopes

CHUNK = 1000
# Chunks after which a pool that is filled says how far it is.
SHOWN_EVERY = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreshQueries:
    """New queries for every update; each answer is used by one release.

    Args:
        batch_size: queries per update, over all replicas.

    **Privacy**: releases touch disjoint answers and compose in parallel: the cost
    for an answer (unit `RESPONSE`) is that of one release, whatever the number of
    updates. For a record (unit `RECORD`) all releases compose.
    """

    batch_size: int = 1024

    def __post_init__(self) -> None:
        """Checks the batch size."""
        _validate.positive_int("batch_size", self.batch_size)

    def schedule(
        self, event: Event, *, unit: Unit = Unit.RESPONSE, releases: int = 1
    ) -> Event:
        """What a unit bears over the whole run.

        Args:
            event: cost of one release.
            unit: an answer bears one release, a record all of them.
            releases: number of releases in the run.

        Returns:
            The event of the run.
        """
        if unit is Unit.RESPONSE:
            return event
        return dp_accounting.SelfComposedDpEvent(event, releases)

    def spend(self, mechanism: Mechanism, number: int) -> Spend:
        """What one release costs a unit that it touches."""
        return Spend(
            unit=mechanism.unit,
            relation=mechanism.relation,
            event=mechanism.event(),
            mechanism=mechanism.name,
            group="fresh queries",
            disjoint=mechanism.unit is Unit.RESPONSE,
        )

    def assumption(self, unit: Unit = Unit.RESPONSE) -> str | None:
        """The sampling assumption, for the statement; None: what the ledger implies."""
        if unit is Unit.RECORD:
            return None
        return (
            "fresh queries: every answer of the teacher enters one release; releases "
            "compose in parallel"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryPool:
    """A fixed pool of queries, Poisson-sampled by a number of updates, then renewed.

    Every update takes each member of the pool independently with probability
    `batch_size / size`, so the number of rows varies. After `updates` updates a new
    pool of new queries, made by the generator as it then is, takes its place.

    Args:
        size: queries in a pool, over all replicas.
        batch_size: expected number of queries per update.
        updates: updates that one pool serves.

    **Privacy**: within a pool a Poisson-sampled release per update; different pools
    hold different answers and compose in parallel. A pool whose answers are seldom
    used buys its epsilon from answers that are never asked for, so `size` may not
    exceed `batch_size * updates`.
    """

    size: int = 100_000
    batch_size: int = 1024
    updates: int = 300

    def __post_init__(self) -> None:
        """Checks the numbers against each other."""
        for name in ("size", "batch_size", "updates"):
            _validate.positive_int(name, getattr(self, name))
        if self.batch_size > self.size:
            expected = f"at most the pool's size {self.size}"
            raise _validate.invalid("batch_size", self.batch_size, expected)
        if self.size > self.batch_size * self.updates:
            used = self.batch_size * self.updates
            expected = f"at most batch_size * updates = {used}"
            mend = "A larger pool would be mostly unused: its epsilon would mislead."
            raise _validate.invalid("size", self.size, expected, mend)

    @property
    def sampling_probability(self) -> float:
        """Probability with which an update takes each member of the pool."""
        return self.batch_size / self.size

    def schedule(
        self, event: Event, *, unit: Unit = Unit.RESPONSE, releases: int = 1
    ) -> Event:
        """What an answer bears over the life of its pool, whatever the run's length."""
        return dp_accounting.SelfComposedDpEvent(self._sampled(event), self.updates)

    def spend(self, mechanism: Mechanism, number: int) -> Spend:
        """What one update from pool `number` costs an answer in the pool."""
        return Spend(
            unit=mechanism.unit,
            relation=mechanism.relation,
            event=self._sampled(mechanism.event()),
            mechanism=mechanism.name,
            group=f"pool {number}",
        )

    def _sampled(self, event: Event) -> Event:
        if isinstance(event, dp_accounting.NonPrivateDpEvent):
            return event
        return dp_accounting.PoissonSampledDpEvent(self.sampling_probability, event)

    def assumption(self, unit: Unit = Unit.RESPONSE) -> str | None:
        """The sampling assumption, for the statement."""
        return (
            f"Poisson sampling with probability {self.sampling_probability:.6g} from "
            f"pools of {self.size} queries, {self.updates} updates each; the sample "
            "is secret; pools compose in parallel"
        )


Queries = FreshQueries | QueryPool


def quantize(images: tf.Tensor, output_range: tuple[float, float]) -> tf.Tensor:
    """Images as uint8, the form in which queries are asked and kept."""
    low, high = output_range
    unit = (images - low) / (high - low)
    return tf.cast(tf.round(tf.clip_by_value(unit, 0.0, 1.0) * 255.0), tf.uint8)


def dequantize(codes: tf.Tensor, output_range: tuple[float, float]) -> tf.Tensor:
    """The opposite of `quantize`, float32 within `output_range`."""
    low, high = output_range
    return low + tf.cast(codes, tf.float32) * ((high - low) / 255.0)


def uncertain_rows(logits: tf.Tensor, count: tf.Tensor | int) -> tf.Tensor:
    """Which candidates to ask about: half by the student's doubt, half as they come.

    Args:
        logits: `[candidates, classes]` of the student; never of the teacher.
        count: how many to keep.

    Returns:
        Rows, int32 `[count]`, none twice. The first half are those whose two likeliest
        classes are closest; the other half keeps the queries as diverse as the source.

    **Privacy**: post-processing of what the student was trained on.
    """
    top = tf.math.top_k(tf.nn.softmax(logits), 2).values
    doubtful = tf.argsort(top[:, 0] - top[:, 1], stable=True)
    half = count // 2
    chosen = tf.zeros(tf.shape(doubtful), tf.bool)
    chosen = tf.tensor_scatter_nd_update(
        chosen, doubtful[:half, None], tf.ones([half], tf.bool)
    )
    others = tf.cast(tf.where(~chosen)[:, 0], tf.int32)
    return tf.concat([doubtful[:half], others[: count - half]], 0)


def balanced_rows(logits: tf.Tensor, count: tf.Tensor | int) -> tf.Tensor:
    """Which candidates to ask about: as many as there are of every predicted class.

    Args:
        logits: `[candidates, classes]` of the student; never of the teacher.
        count: how many to keep.

    Returns:
        Rows, int32 `[count]`, none twice: first one of every class, then another of
        every class that has more, and so on.

    **Privacy**: post-processing of what the student was trained on.
    """
    predicted = tf.one_hot(tf.argmax(logits, -1), logits.shape[-1])
    earlier = tf.cumsum(predicted, axis=0, exclusive=True)
    rank = tf.reduce_sum(earlier * predicted, -1)
    return tf.argsort(rank, stable=True)[:count]


def local_variable(shape: tuple[int, ...], dtype: Any) -> Any:
    """A buffer that every replica has for itself: a variable, or one per replica.

    The variables are none of the strategy's: it would send the values of one worker
    to the others.
    """
    strategy = tf.distribute.get_strategy()
    devices = local_devices(strategy)

    def make(context: Any) -> tf.Variable:
        device = devices[context.replica_id_in_sync_group % len(devices)]
        with tf.device(device):
            return tf.Variable(tf.zeros(shape, dtype), trainable=False)

    return strategy.experimental_distribute_values_from_function(
        lambda context: outside_scopes(lambda: make(context))
    )


def local_part(variable: Any) -> tf.Variable:
    """The current replica's own copy of a `local_variable`."""
    copies = tf.distribute.get_strategy().experimental_local_results(variable)
    context = tf.distribute.get_replica_context()
    index = int(tf.get_static_value(context.replica_id_in_sync_group))
    return copies[index % len(copies)]


class QueryStore:
    """Room of one replica for queries, and for their features where there are any.

    Args:
        size: number of queries.
        image_shape: shape of one query.
        feature_shape: shape of what the frozen part of the student makes of a query,
            which is then kept in half precision, cut off at its largest values; None
            keeps queries alone.
        keep_codes: keep the queries where their features are kept, too.
    """

    def __init__(
        self,
        size: int,
        image_shape: tuple[int, ...],
        feature_shape: tuple[int, ...] | None = None,
        *,
        keep_codes: bool = True,
    ) -> None:
        self.size = size
        self.codes: Any = None
        self.features: Any = None
        if feature_shape is not None:
            self.features = local_variable((size, *feature_shape), tf.float16)
        if keep_codes or feature_shape is None:
            self.codes = local_variable((size, *image_shape), tf.uint8)

    def put(
        self, rows: tf.Tensor, codes: tf.Tensor, features: tf.Tensor | None
    ) -> None:
        """Writes queries.

        Args:
            rows: where, `[n]`.
            codes: uint8 `[n, *image_shape]`.
            features: `[n, *feature_shape]`; not read where only queries are kept.
        """
        if self.codes is not None:
            _write(self.codes, codes, rows)
        if self.features is not None:
            _write(self.features, tf.saturate_cast(features, tf.float16), rows)

    def inputs(self, rows: tf.Tensor) -> tf.Tensor:
        """What the student learns from: features where they are kept, else codes."""
        kept = self.codes if self.features is None else self.features
        return tf.gather(local_part(kept), rows)


def _write(store: Any, values: tf.Tensor, rows: tf.Tensor) -> None:
    """Puts values into rows of the current replica's part."""
    local_part(store).scatter_update(tf.IndexedSlices(values, rows))


class PoolStore(QueryStore):
    """One replica's part of the current pool: queries and the teacher's answers.

    Of a query with features only those are kept.

    **Privacy**: holds raw answers. It is never saved and never leaves the process.

    Args:
        size: number of queries in this replica's part.
        image_shape: shape of one query.
        num_classes: length of an answer.
        feature_shape: see `QueryStore`.
    """

    def __init__(
        self,
        size: int,
        image_shape: tuple[int, ...],
        num_classes: int,
        feature_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(size, image_shape, feature_shape, keep_codes=False)
        self.answers = local_variable((size, num_classes), tf.float32)

    def fill(
        self,
        make: Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, ...]],
        *,
        show: bool = False,
    ) -> None:
        """Renews the whole pool.

        Args:
            make: `make(n, chunk)` gives `n` new queries as uint8 codes, the teacher's
                answers to them, and their features; see `put`.
            show: print now and then how far it is.
        """
        start, chunk = tf.constant(0), tf.constant(0)
        while start < self.size:
            count = tf.minimum(CHUNK, self.size - start)
            codes, answers, features = make(count, chunk)
            rows = tf.range(start, start + count)
            self.put(rows, codes, features)
            _write(self.answers, answers, rows)
            start += count
            chunk += 1
            if show:
                if chunk % SHOWN_EVERY == 0:
                    tf.print("Queries asked for the pool:", start, "of", self.size)

    def sample(
        self, probability: float, seed: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """A Poisson sample of the pool.

        Args:
            probability: with which each member is taken, independently.
            seed: int64 `[2]`, secret.

        Returns:
            The members taken and one masked row, so that no batch is empty: what the
            student learns from, see `inputs`, answers, and the mask.
        """
        # 24 random bits in float32 would round the probability; float64 has 53.
        draws = tf.random.stateless_uniform([self.size], seed, dtype=tf.float64)
        taken = tf.where(draws < probability)[:, 0]
        rows = tf.concat([taken, tf.zeros([1], taken.dtype)], 0)
        mask = tf.concat([tf.ones_like(taken, tf.float32), tf.zeros([1])], 0)
        return self.inputs(rows), tf.gather(local_part(self.answers), rows), mask

    def some_inputs(self, count: int, seed: tf.Tensor) -> tf.Tensor:
        """Features or codes of members, chosen apart from every secret sample."""
        rows = tf.random.stateless_uniform([count], seed, 0, self.size, tf.int32)
        return self.inputs(rows)


class Replay(QueryStore):
    """Queries with their released answers, kept to be learnt from again.

    A query is answered once; using the released answer again is post-processing and
    free. When it is full, the oldest are overwritten.

    Args:
        size: number of queries kept by this replica.
        image_shape: shape of one query.
        num_classes: length of an answer.
        feature_shape: see `QueryStore`.
    """

    def __init__(
        self,
        size: int,
        image_shape: tuple[int, ...],
        num_classes: int,
        feature_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(size, image_shape, feature_shape)
        self.released = local_variable((size, 2, num_classes), tf.float32)
        self.written = local_variable((), tf.int64)

    def add(
        self, codes: tf.Tensor, released: tf.Tensor, features: tf.Tensor | None = None
    ) -> None:
        """Appends rows.

        Args:
            codes: uint8 `[n, *image_shape]`.
            released: answers `[n, 2, classes]`.
            features: see `put`.
        """
        count, written = tf.shape(codes, tf.int64)[0], local_part(self.written)
        rows = (written + tf.range(count)) % self.size
        self.put(rows, codes, features)
        _write(self.released, released, rows)
        written.assign_add(count)

    def sample(self, count: int, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Draws rows; may repeat.

        Returns:
            What the student learns from, see `inputs`, and answers
            `[count, 2, classes]`.
        """
        filled = tf.minimum(local_part(self.written).value(), self.size)
        rows = tf.random.stateless_uniform([count], seed, 0, filled, tf.int64)
        return self.inputs(rows), tf.gather(local_part(self.released), rows)

    def filled(self, written: int) -> int:
        """How many queries are kept after so many were written."""
        return min(written, self.size)

    def variables(self) -> list[Any]:
        """What a checkpoint keeps: not the features, which follow from the codes."""
        return [self.codes, self.released, self.written]
