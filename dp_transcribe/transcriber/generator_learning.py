"""How a trainable generator learns while a transcription runs: from the student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tensorflow as tf

from dp_transcribe.mechanisms.inherited import Inherited
from dp_transcribe.mechanisms.noise import QUERIES
from dp_transcribe.students import last_features
from dp_transcribe.transcriber.replicas import as_int32, dense, replica_index

if TYPE_CHECKING:
    from dp_transcribe.transcriber.model import DPTranscriber


class GeneratorLearner:
    """Updates the generator with the student as a fixed discriminator.

    The teacher is read only where it is itself private (`Inherited`).

    Args:
        owner: the transcriber whose generator learns.
    """

    def __init__(self, owner: DPTranscriber) -> None:
        self.owner = owner
        self.replicas = owner.distribute_strategy.num_replicas_in_sync
        self.batch_size = max(owner.generator_batch_size // self.replicas, 1)
        # Features beside the logits, where the objective wants them.
        wanted = owner.trains_generator and owner.objective.activation > 0
        self.looks = last_features(owner.student) if wanted else None

    def update(self) -> tf.Tensor:
        """One update on latents of this replica's own; returns the loss, a scalar."""
        owner = self.owner
        number = owner.noise.advance()
        seed = owner.noise.stream(number, QUERIES, part=replica_index())
        inputs = owner.generator.draw_inputs(self.batch_size, as_int32(seed))
        variables = owner.generator.trainable_variables
        with tf.GradientTape() as tape:
            loss = self._loss(owner.generator(*inputs))
        gradients = tape.gradient(loss, variables)
        scale = 1.0 / self.replicas
        owner.generator_optimizer.apply(
            [g * scale for g in dense(gradients, variables)], variables
        )
        return loss

    def _loss(self, images: tf.Tensor) -> tf.Tensor:
        """The objective of a batch of images."""
        owner, seen = self.owner, {}
        if owner.second_student is not None:
            seen["second_logits"] = owner.second_student(images, training=False)
        if self.looks is None:
            logits = owner.student(images, training=False)
        else:
            seen["features"], logits = self.looks(images, training=False)
        return owner.objective(logits, **seen, **self._read_teacher(images))

    def _read_teacher(self, images: tf.Tensor) -> dict[str, Any]:
        """What the objective reads of a private teacher; nothing of any other."""
        owner = self.owner
        if (
            not isinstance(owner.mechanism, Inherited)
            or not owner.objective.adversarial
        ):
            return {}
        return {"released": owner.teacher.probabilities(images)}
