"""What both ways of learning share: queries, and the classes among them.

Learners run inside `DPTranscriber.train_step`, once per replica.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import keras
import tensorflow as tf

from dp_transcribe.mechanisms.noise import QUERIES
from dp_transcribe.queries import balanced_rows, dequantize, quantize, uncertain_rows
from dp_transcribe.students import split_frozen
from dp_transcribe.transcriber.replicas import all_reduce_sum, as_int32, replica_index

if TYPE_CHECKING:
    from dp_transcribe.transcriber.model import DPTranscriber

# A class is never taken to be rarer than this share of its fair frequency.
RAREST = 0.05


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
