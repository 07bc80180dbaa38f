"""How the student learns from private answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe.mechanisms.base import AnswerMechanism, Released
from dp_transcribe.mechanisms.noise import ANSWERS, SAMPLING
from dp_transcribe.queries import Replay, local_part
from dp_transcribe.transcriber.learning import Learner
from dp_transcribe.transcriber.replicas import dense, replica_index
from dp_transcribe.workers import gather_parts, own_replicas

if TYPE_CHECKING:
    from dp_transcribe.transcriber.model import DPTranscriber

# How fast the frequencies of classes follow private answers at last.
ANSWER_RATE = 0.01
# Queries that pass the frozen part of the student together after loading.
RENEWED_AT_ONCE = 500
# Of one piece of a replay that is saved, at most.
PIECE_BYTES = 2**26


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
