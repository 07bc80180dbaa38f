"""How the student learns: from noisy gradients, or from private answers.

Both learners run inside `DPTranscriber.train_step`, once per replica.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe.mechanisms.base import (
    AnswerMechanism,
    Batch,
    GradientMechanism,
    Release,
    Released,
)
from dp_transcribe.mechanisms.noise import (
    ANSWERS,
    NOISE,
    QUERIES,
    SAMPLING,
    standard_normal,
)
from dp_transcribe.queries import (
    PoolStore,
    QueryPool,
    Replay,
    balanced_rows,
    dequantize,
    local_part,
    quantize,
    uncertain_rows,
)
from dp_transcribe.students import split_frozen
from dp_transcribe.workers import gather_parts, own_replicas

# A class is never taken to be rarer than this share of its fair frequency.
RAREST = 0.05
# How fast the frequencies follow the student's predictions, and how many queries are
# looked at for them per `train_step`; how fast they follow private answers at last.
PREDICTION_RATE, LOOKED_AT = 0.05, 256
ANSWER_RATE = 0.01
# Queries that pass the frozen part of the student together after loading.
RENEWED_AT_ONCE = 500
# Of one piece of a replay that is saved, at most.
PIECE_BYTES = 2**26

if TYPE_CHECKING:
    from dp_transcribe.transcriber import DPTranscriber


class Learner:
    """What both ways of learning share.

    Args:
        owner: the transcriber whose teacher, student and queries are used.
    """

    def __init__(self, owner: DPTranscriber) -> None:
        self.owner = owner
        self.replicas = owner.distribute_strategy.num_replicas_in_sync
        self.output_range = owner.teacher.input_range
        # What is frozen is computed once for each query, not once for each update.
        self.front: keras.Model | None = None
        self.learns: keras.Model = owner.student
        split = split_frozen(owner.student)
        if split is not None and owner.second_student is None:
            self.front, self.learns = split

    @property
    def feature_shape(self) -> tuple[int, ...] | None:
        """Of what the student's frozen part makes of a query; None if there is none."""
        return None if self.front is None else self.front.output_shape[1:]

    def embed(self, codes: tf.Tensor) -> tf.Tensor:
        """What the part of the student that learns takes: features, or the queries."""
        queries = dequantize(codes, self.output_range)
        if self.front is None:
            return queries
        return tf.cast(self.front(queries, training=False), tf.float32)

    def inputs(self, kept: tf.Tensor) -> tf.Tensor:
        """The same from what a pool or a replay kept: features, or codes."""
        if self.front is None:
            return dequantize(kept, self.output_range)
        return tf.cast(kept, tf.float32)

    def prepare(self) -> None:
        """Makes ready for a run, when all weights are those to go on with."""

    def begin_steps(self, steps: int) -> bool:
        """Called before the next steps; returns whether the student rests in them."""
        del steps
        return False

    def ask(
        self, count: tf.Tensor | int, number: tf.Tensor, chunk: tf.Tensor | int
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """New queries of this replica and the teacher's answers to them.

        Args:
            count: how many.
            number: of the noise source; with `chunk` and the replica's index it
                decides the queries.
            chunk: part of a larger set that is asked under one number.

        Returns:
            uint8 codes `[count, *image_shape]` and protected answers
            `[count, classes]`.
        """
        part = replica_index() + self.replicas * tf.cast(chunk, tf.int64)
        seed = self.owner.noise.stream(number, QUERIES, part=part)
        images = self._draw(count, as_int32(seed))
        codes = quantize(images, self.output_range)
        queries = dequantize(codes, self.output_range)
        return codes, self.owner.mechanism.ask(self.owner.teacher, queries)

    def _draw(self, count: tf.Tensor | int, seed: tf.Tensor) -> tf.Tensor:
        """Images to ask about, chosen by the student where there is a choice."""
        factor = self.owner.candidates_per_query
        images = self.owner.draw_queries(count * factor, seed)
        if factor == 1:
            return images
        logits = tf.cast(self.owner.student(images, training=False), tf.float32)
        choose = balanced_rows if self.owner.balance_classes else uncertain_rows
        return tf.gather(images, choose(logits, count))

    @property
    def log_frequencies(self) -> tf.Tensor:
        """Of the classes among the queries, as the student sees them, `[classes]`."""
        if not self.owner.balance_classes:
            return tf.zeros([])
        return tf.math.log(tf.convert_to_tensor(self.owner.class_frequencies))

    def follow_frequencies(
        self, seen: tf.Tensor, weights: tf.Tensor, rate: tf.Tensor | float
    ) -> None:
        """Moves the running mean of the class frequencies among the queries.

        Args:
            seen: `[batch, classes]`, one estimate of a query's class per row, made
                without protected answers.
            weights: `[batch]`, 0 for rows that say nothing.
            rate: share of the new mean.
        """
        total = tf.reduce_sum(seen * weights[:, None], 0)
        total, count = all_reduce_sum([total, tf.reduce_sum(weights)])
        frequencies = self.owner.class_frequencies
        mean = frequencies + rate * (total / tf.maximum(count, 1.0) - frequencies)
        mean = tf.where(count > 0, mean, tf.convert_to_tensor(frequencies))
        mean = tf.maximum(mean, RAREST / float(seen.shape[-1]))
        frequencies.assign(mean / tf.reduce_sum(mean))


class GradientLearner(Learner):
    """The student descends along noisy sums of bounded per-answer gradients."""

    def __init__(self, owner: DPTranscriber) -> None:
        super().__init__(owner)
        queries = owner.queries
        self.batch_size = queries.batch_size
        self.pool: PoolStore | None = None
        self.sampling_probability = 1.0
        if isinstance(queries, QueryPool):
            shape, classes = owner.teacher.input_shape, owner.teacher.num_classes
            size = queries.size // self.replicas
            self.pool = PoolStore(size, shape, classes, self.feature_shape)
            self.sampling_probability = queries.sampling_probability
            self._fill = tf.function(self._fill_pool)

    @property
    def mechanism(self) -> GradientMechanism:
        """The transcriber's mechanism."""
        return cast(GradientMechanism, self.owner.mechanism)

    def renew_pool(self, *, show: bool = False) -> None:
        """Replaces the pool by new queries, on every replica.

        Args:
            show: print how far it is, since a large pool takes minutes.
        """
        self.owner.distribute_strategy.run(self._fill, args=(show,))

    def _fill_pool(self, show: bool) -> None:
        number = self.owner.noise.advance()
        pool = cast(PoolStore, self.pool)

        def make(count: tf.Tensor, chunk: tf.Tensor) -> tuple[tf.Tensor, ...]:
            codes, answers = self.ask(count, number, chunk)
            return codes, answers, self.embed(codes)

        pool.fill(make, show=show)

    def step(self) -> dict[str, Any]:
        """The student updates of one `train_step`.

        Returns:
            `student_loss` and `agreement`, from the noisy statistics alone.
        """
        if self.owner.balance_classes:
            self._count_classes(self.owner.noise.advance())
        progress = [self.update() for _ in range(self.owner.student_updates)]
        agreement, loss = zip(*progress, strict=True)
        count = float(len(progress))
        return {
            "student_loss": tf.add_n(loss) / count,
            "agreement": tf.add_n(agreement) / count,
        }

    def _count_classes(self, number: tf.Tensor) -> None:
        seed = as_int32(self.owner.noise.stream(number, QUERIES, part=replica_index()))
        if self.pool is None:
            inputs = self.embed(
                quantize(self._draw(LOOKED_AT, seed), self.output_range)
            )
        else:
            inputs = self.inputs(self.pool.some_inputs(LOOKED_AT, seed))
        logits = self.learns(inputs, training=False)
        seen = tf.nn.softmax(tf.cast(logits, tf.float32) + self.log_frequencies)
        self.follow_frequencies(seen, tf.ones([LOOKED_AT]), PREDICTION_RATE)

    def update(self) -> tuple[tf.Tensor, tf.Tensor]:
        """One noisy update: sample, bound, sum over replicas, noise, descend."""
        owner, mechanism = self.owner, self.mechanism
        number = owner.noise.advance()
        batch = dataclasses.replace(
            self._batch(number), log_frequencies=self.log_frequencies
        )
        release = mechanism.summed(self.learns, batch, self._row_noise(number))
        release = self._noisy(all_reduce_sum(release.tensors()), number)
        # Keras' optimizers sum over replicas what is the same on all of them here.
        scale = 1.0 / (mechanism.divisor(self.batch_size) * self.replicas)
        gradients = [gradient * scale for gradient in release.gradients]
        owner.student_optimizer.apply(gradients, self.learns.trainable_variables)
        return mechanism.progress(release, self.batch_size)

    def _batch(self, number: tf.Tensor) -> Batch:
        if self.pool is not None:
            seed = self.owner.noise.stream(number, SAMPLING, part=replica_index())
            kept, answers, mask = self.pool.sample(self.sampling_probability, seed)
            return Batch(self.inputs(kept), answers, mask)
        count = self.batch_size // self.replicas
        codes, answers = self.ask(count, number, 0)
        return Batch(self.embed(codes), answers, tf.ones([count]))

    def _row_noise(self, number: tf.Tensor) -> Any:
        """Standard noise of this replica's own rows."""
        seed = self.owner.noise.stream(number, NOISE, part=replica_index() + 1)
        return lambda shape: standard_normal(shape, seed)

    def _noisy(self, tensors: list[tf.Tensor], number: tf.Tensor) -> Release:
        """Adds the one draw that is the same on all replicas."""
        *gradients, statistics = self.owner.noise.normal_like(tensors, number=number)
        on_gradients, on_statistics = self.mechanism.shared_stddevs
        noise = [draw * on_gradients for draw in gradients]
        noise.append(statistics * on_statistics)
        return Release.of([t + n for t, n in zip(tensors, noise, strict=True)])


class AnswerLearner(Learner):
    """Queries are answered privately, once; the student learns from the replay."""

    def __init__(self, owner: DPTranscriber) -> None:
        super().__init__(owner)
        self.batch_size = owner.replay_batch_size
        shape, classes = owner.teacher.input_shape, owner.teacher.num_classes
        size = owner.replay_size // self.replicas
        self.replay = Replay(size, shape, classes, self.feature_shape)
        self._features_missing = 0
        self._answered = 0
        self._resting = False

    @property
    def mechanism(self) -> AnswerMechanism:
        """The transcriber's mechanism."""
        return cast(AnswerMechanism, self.owner.mechanism)

    def replay_pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The replay of all replicas in pieces of bounded size, in the order of rows.

        A whole copy may be a gigabyte, and whoever saves one holds it several times.
        Rows are gathered, since a slice of a variable copies all of it first, and
        TensorFlow does not give back what that took.
        With several workers all of them take every piece at once.

        Yields:
            Codes and released answers, `[replicas, rows, ...]`; at least one piece,
            which has no rows where nothing was answered.
        """
        strategy = self.owner.distribute_strategy
        *kept, written = self._replay_parts()
        filled = self.replay.filled(int(written[0].numpy()))
        row_bytes = sum(math.prod(v.shape[1:]) * v.dtype.size for v, *_ in kept)
        rows = max(1, PIECE_BYTES // (self.replicas * row_bytes))
        for start in range(0, max(1, filled), rows):
            piece = tf.range(start, min(start + rows, filled))
            codes, released = (
                gather_parts(strategy, [tf.gather(p, piece).numpy() for p in parts])
                for parts in kept
            )
            yield codes, released

    def get_replay(self) -> tuple[np.ndarray, np.ndarray]:
        """All of `replay_pieces` in one: `[replicas, filled, ...]` each."""
        codes, released = zip(*self.replay_pieces(), strict=True)
        return np.concatenate(codes, 1), np.concatenate(released, 1)

    def replay_written(self) -> np.ndarray:
        """How many queries each replica has written, `[replicas]`.

        With several workers all of them call it at once.
        """
        *_, written = self._replay_parts()
        parts = [part.numpy() for part in written]
        return gather_parts(self.owner.distribute_strategy, parts)

    def set_replay(
        self,
        written: np.ndarray,
        pieces: Iterable[tuple[np.ndarray, np.ndarray]],
    ) -> None:
        """Puts back what `replay_written` and `replay_pieces` gave.

        Raises:
            ValueError: the replay was saved for other sizes or numbers of replicas.
        """
        own = own_replicas(self.owner.distribute_strategy)
        *kept, counts = self._replay_parts()
        filled = self.replay.filled(int(np.max(written)))
        restored = 0
        for piece in pieces:
            replicas, count = piece[0].shape[:2]
            rows = tf.range(restored, restored + count)
            restored += count
            if replicas != self.replicas or restored > filled:
                break
            for parts, values in zip(kept, piece, strict=True):
                for part, replica in zip(parts, own, strict=True):
                    part.scatter_update(tf.IndexedSlices(values[replica], rows))
        if len(written) != self.replicas or restored != filled:
            raise ValueError(
                f"The checkpoint's replay has not the {filled} rows on each of "
                f"{self.replicas} replicas that are expected. Load it with the same "
                "`replay_size` and number of replicas."
            )
        for part, replica in zip(counts, own, strict=True):
            part.assign(written[replica])
        self._features_missing = filled

    def answered(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the replay of all replicas, the codes that were answered and the answers.

        With several workers all of them call it at once.
        """
        codes, rows = self.get_replay()
        released = Released(rows[:, :, 0], rows[:, :, 1])
        answered = released.answered.numpy()
        return codes[answered], released.answers[answered]

    def prepare(self) -> None:
        """Computes the features of a replay that was loaded, before a run."""
        strategy = self.owner.distribute_strategy
        written = strategy.experimental_local_results(self.replay.written)[0]
        self._answered = int(written.numpy()) * self.replicas
        filled, self._features_missing = self._features_missing, 0
        if self.front is None or filled == 0:
            return
        parts = map(
            strategy.experimental_local_results,
            (self.replay.codes, self.replay.features),
        )
        for codes, features in zip(*parts, strict=True):
            for start in range(0, filled, RENEWED_AT_ONCE):
                rows = tf.range(start, min(start + RENEWED_AT_ONCE, filled))
                new = tf.saturate_cast(self.embed(tf.gather(codes, rows)), tf.float16)
                features.scatter_update(tf.IndexedSlices(new, rows))

    def begin_steps(self, steps: int) -> bool:
        """Counts the answers to come; whether the student rests is known before them.

        A condition inside of the step would not do: replicas may not reduce in one.
        """
        answered = self._answered
        self._answered += steps * self.owner.queries.batch_size
        rests = self.owner.rests
        self._resting = any(first <= answered < last for first, last in rests)
        return self._resting

    def _replay_parts(self) -> list[tuple[tf.Variable, ...]]:
        """The replay's variables, for each the copies in this process."""
        strategy = self.owner.distribute_strategy
        variables = self.replay.variables()
        return [strategy.experimental_local_results(v) for v in variables]

    def step(self) -> dict[str, Any]:
        """Asks one batch of new queries, then learns from the replay or rests.

        Returns:
            `student_loss` on the replay and `agreement` with the new answers (0 if no
            query was answered), both from released answers alone.
        """
        agreement = self._release(self.owner.noise.advance())
        if self._resting:
            loss, _ = self._loss(self.learns, *self._some_answers())
            return {"student_loss": loss, "agreement": agreement}
        losses = [self.update() for _ in range(self.owner.student_updates)]
        return {
            "student_loss": tf.add_n(losses) / float(len(losses)),
            "agreement": agreement,
        }

    def _release(self, number: tf.Tensor) -> tf.Tensor:
        owner, mechanism = self.owner, self.mechanism
        count = owner.queries.batch_size // self.replicas
        codes, answers = self.ask(count, number, 0)
        inputs = self.embed(codes)
        logits = tf.cast(self.learns(inputs, training=False), tf.float32)
        adjusted = logits + self.log_frequencies
        seed = owner.noise.stream(number, ANSWERS, part=replica_index())
        released = mechanism.release(answers, self._prior(adjusted), seed)
        if owner.balance_classes:
            self._count_classes(released)
        rows = tf.stack([released.answers, released.candidates], 1)
        self.replay.add(codes, rows, inputs)
        answered = tf.cast(released.answered, tf.float32)
        agree = tf.argmax(adjusted, -1) == mechanism.labels(released)
        hits = tf.reduce_sum(tf.cast(agree, tf.float32) * answered)
        return tf.math.divide_no_nan(hits, tf.reduce_sum(answered))

    def _count_classes(self, released: Released) -> None:
        """Unbiased, where the student's prediction would confirm itself."""
        count = self.owner.queries.batch_size // self.replicas
        steps = tf.cast(local_part(self.replay.written), tf.float32) / float(count)
        complete = tf.reduce_all(released.candidates > 0, -1)
        self.follow_frequencies(
            self.mechanism.estimates(released),
            tf.cast(complete, tf.float32),
            tf.maximum(1.0 / (steps + 10.0), ANSWER_RATE),
        )

    def _prior(self, logits: tf.Tensor) -> tf.Tensor:
        """The student's prediction, uniform while it has learnt too little."""
        prior = tf.nn.softmax(tf.cast(logits, tf.float32))
        written = local_part(self.replay.written) * self.replicas
        learnt = written >= self.owner.uniform_prior_queries
        return tf.where(learnt, prior, tf.ones_like(prior) / prior.shape[-1])

    def update(self) -> tf.Tensor:
        """One plain update on a batch of the replay; costs nothing."""
        owner, batch = self.owner, self._some_answers()
        loss = self._learn(self.learns, owner.student_optimizer, *batch)
        if owner.second_student is not None:
            self._learn(owner.second_student, owner.second_optimizer, *batch)
        return loss

    def _some_answers(self) -> tuple[tf.Tensor, Released]:
        """Rows of the replay: what the student takes, and what was released."""
        number = self.owner.noise.advance()
        seed = self.owner.noise.stream(number, SAMPLING, part=replica_index())
        kept, rows = self.replay.sample(self.batch_size // self.replicas, seed)
        return self.inputs(kept), Released(rows[:, 0], rows[:, 1])

    def _learn(
        self,
        student: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        inputs: tf.Tensor,
        released: Released,
    ) -> tf.Tensor:
        loss, tape = self._loss(student, inputs, released)
        variables = student.trainable_variables
        gradients = tape.gradient(loss, variables)
        scale = 1.0 / self.replicas
        optimizer.apply([g * scale for g in dense(gradients, variables)], variables)
        return loss

    def _loss(
        self, student: keras.Model, inputs: tf.Tensor, released: Released
    ) -> tuple[tf.Tensor, tf.GradientTape]:
        """The mean loss, and the tape that saw it come about."""
        with tf.GradientTape() as tape:
            logits = tf.cast(student(inputs, training=True), tf.float32)
            logits += self.log_frequencies
            loss = tf.reduce_mean(self.mechanism.loss(released, logits))
        return loss, tape


def make_learner(owner: DPTranscriber) -> GradientLearner | AnswerLearner:
    """The learner that fits the transcriber's mechanism."""
    if isinstance(owner.mechanism, AnswerMechanism):
        return AnswerLearner(owner)
    if isinstance(owner.mechanism, GradientMechanism):
        return GradientLearner(owner)
    raise TypeError(f"No way to learn from {owner.mechanism!r} is known.")


def dense(gradients: list[Any], variables: list[Any]) -> list[tf.Tensor]:
    """Gradients as tensors: an embedding's come as slices, and none is zero."""
    return [
        tf.zeros(variable.shape) if gradient is None else tf.convert_to_tensor(gradient)
        for gradient, variable in zip(gradients, variables, strict=True)
    ]


def replica_index() -> tf.Tensor:
    """Index of the current replica, a scalar int64."""
    context = tf.distribute.get_replica_context()
    return tf.cast(context.replica_id_in_sync_group, tf.int64)


def all_reduce_sum(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
    """Sums over the replicas."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return tensors
    return list(context.all_reduce(tf.distribute.ReduceOp.SUM, tensors))


def as_int32(seed: tf.Tensor) -> tf.Tensor:
    """A seed int64 `[2]` as int32 `[2]`, for generators."""
    return tf.random.stateless_uniform([2], seed, None, None, tf.int32)
