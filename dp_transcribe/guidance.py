"""Training a generator against the teacher itself: not covered by any guarantee."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe._validate import invalid, positive_finite, positive_int
from dp_transcribe.generators.trainable import TrainableGenerator
from dp_transcribe.losses.batch_norm_statistics import BatchNormStatistics
from dp_transcribe.losses.objective import GeneratorObjective
from dp_transcribe.privacy.inheritance import fingerprint
from dp_transcribe.students import last_features


def pretrain_by_teacher(
    generator: TrainableGenerator,
    teacher: Any,
    *,
    objective: GeneratorObjective | None = None,
    steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> np.ndarray:
    """Trains a generator with the teacher as fixed discriminator, in place.

    Args:
        generator: what to train.
        teacher: a `Teacher`; its gradients with respect to the images are used.
        objective: by default one-hot and information entropy, and batch-norm
            statistics if the teacher is a Keras model that has them.
        steps: updates.
        batch_size: images per update.
        learning_rate: of Adam.
        seed: for the latents.

    Returns:
        The loss at each step, float32 `[steps]`.

    **Privacy**: reads the teacher's gradients and statistics without noise. The
    generator and its samples must not be released; set `generator_covered=False`.

    Raises:
        ValueError: the teacher is an ensemble, whose guarantee this would break, or
            has no gradient, or the objective asks for what it does not have.

    References:
        DAFL, arXiv:1904.01186; DeepInversion, arXiv:1912.08795; as pretraining:
        arXiv:2409.12384.
    """
    positive_int("steps", steps)
    positive_int("batch_size", batch_size)
    positive_finite("learning_rate", learning_rate)
    _refuse_ensemble(teacher)
    teacher.check_in_graph()
    _refuse_steps(teacher, generator)
    has_statistics = _has_batch_norm(teacher.model)
    if objective is None:
        weight = 1.0 if has_statistics else 0.0
        objective = GeneratorObjective(batch_norm_statistics=weight)
    reads = objective.reads_teacher
    statistics = BatchNormStatistics(teacher.model) if reads else None
    looks = last_features(teacher.model) if objective.activation > 0 else None
    optimizer = keras.optimizers.Adam(learning_rate)
    optimizer.build(generator.trainable_variables)

    @tf.function
    def update(step: tf.Tensor) -> tf.Tensor:
        inputs = generator.draw_inputs(batch_size, tf.stack([seed, step]))
        with tf.GradientTape() as tape:
            images = generator(*inputs)
            term = None if statistics is None else statistics(images)
            features = None if looks is None else looks(images, training=False)[0]
            loss = objective(teacher.logits(images), features=features, statistics=term)
        gradients = tape.gradient(loss, generator.trainable_variables)
        optimizer.apply(gradients, generator.trainable_variables)
        return loss

    generator.guided_by_teacher = True
    guide = fingerprint(getattr(teacher, "statement", None))
    generator.guides = tuple(sorted({*getattr(generator, "guides", ()), guide}))
    losses = [update(tf.constant(step)).numpy() for step in range(steps)]
    return np.asarray(losses, np.float32)


def _refuse_ensemble(teacher: Any) -> None:
    """A generator guided by an ensemble would carry its records past the noise."""
    if hasattr(teacher, "num_teachers"):
        mend = "Let the student guide the generator: it has learnt released answers."
        expected = "one teacher; an ensemble guides no generator"
        raise invalid("teacher", teacher, expected, mend)


def _refuse_steps(teacher: Any, generator: Any) -> None:
    """A teacher that gives classes, or leaves TensorFlow, says not where to go."""
    images = generator(*generator.draw_inputs(2, tf.constant([0, 0])))
    with tf.GradientTape() as tape:
        tape.watch(images)
        logits = teacher.logits(images)
    try:
        gradient = tape.gradient(logits, images)
    except LookupError:  # an operation without a gradient
        gradient = None
    if gradient is None:
        mend = "Let the student guide the generator, as `dpsd` and `dpdfd` do."
        expected = "a teacher whose answers have a gradient"
        raise invalid("teacher", teacher, expected, mend)


def _has_batch_norm(model: keras.Model | None) -> bool:
    if model is None:
        return False
    layers = model._flatten_layers(include_self=False, recursive=True)
    return any(isinstance(layer, keras.layers.BatchNormalization) for layer in layers)
