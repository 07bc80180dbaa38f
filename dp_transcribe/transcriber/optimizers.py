"""The optimizers of student, second student and generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras

from dp_transcribe import _validate

if TYPE_CHECKING:
    from dp_transcribe.transcriber.model import DPTranscriber


def check_optimizers(owner: DPTranscriber, student: Any, generator: Any) -> None:
    """Refuses optimizers that would fail, or not descend, when a step is paid for.

    Args:
        owner: whose student and generator they are for.
        student: the student's optimizer.
        generator: the generator's; may be None if it does not learn.

    Raises:
        ValueError: one is no optimizer, divides gradients by the scale of a loss that
            nobody scaled, or was built for other variables; or both are one.
    """
    variables = owner.student.trainable_variables
    _check_optimizer("student_optimizer", student, variables)
    if generator is None and not owner.trains_generator:
        return
    variables = owner.generator.trainable_variables if owner.trains_generator else []
    _check_optimizer("generator_optimizer", generator, variables)
    _check_own_optimizer(generator, student)


def build_optimizers(owner: DPTranscriber) -> None:
    """Builds the optimizers of a compiled transcriber; the second one is alike."""
    owner.optimizer.build(owner.student.trainable_variables)
    if owner.second_student is not None:
        alike = keras.saving.serialize_keras_object(owner.optimizer)
        owner.second_optimizer = keras.saving.deserialize_keras_object(alike)
        owner.second_optimizer.build(owner.second_student.trainable_variables)
    if isinstance(owner.generator, keras.Model) and owner.generator_optimizer:
        owner.generator_optimizer.build(owner.generator.trainable_variables)


def _check_optimizer(name: str, optimizer: Any, variables: Sequence[Any]) -> None:
    mend = "Give an optimizer or its name, such as 'adam'."
    _validate.instance_of(name, optimizer, keras.optimizers.Optimizer, mend)
    scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if scales or getattr(optimizer, "loss_scale_factor", None):
        mend = "Losses are not scaled here: take the optimizer itself."
        expected = "an optimizer without loss scaling"
        raise _validate.invalid(name, optimizer, expected, mend)
    # Keras says for which variables it was built nowhere else.
    known = {id(variable) for variable in optimizer._trainable_variables}
    if optimizer.built and any(id(variable) not in known for variable in variables):
        mend = (
            "Call `compile` with a new one: it keeps slots for what it was built for."
        )
        expected = "an optimizer that was not built for other variables"
        raise _validate.invalid(name, optimizer, expected, mend)


def _check_own_optimizer(generator_optimizer: Any, student_optimizer: Any) -> None:
    """Refuses one optimizer for two models: it keeps slots for one of them."""
    if generator_optimizer is student_optimizer:
        expected = "another optimizer than the student's"
        raise _validate.invalid("generator_optimizer", generator_optimizer, expected)
