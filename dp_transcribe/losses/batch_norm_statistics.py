"""How far a batch's statistics are from those a teacher remembers of its data."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from dp_transcribe._validate import instance_of, invalid


class _Probe(keras.layers.BatchNormalization):
    """Batch normalisation in inference mode that reports how unusual its input is."""

    def call(self, inputs: Any, training: Any = False, mask: Any = None) -> Any:
        axes = [
            i for i in range(len(inputs.shape)) if i != self.axis % len(inputs.shape)
        ]
        mean = keras.ops.mean(inputs, axis=axes)
        variance = keras.ops.var(inputs, axis=axes)
        distance = keras.ops.norm(mean - self.moving_mean)
        self.add_loss(distance + keras.ops.norm(variance - self.moving_variance))
        return super().call(inputs, training=False, mask=mask)


class BatchNormStatistics:
    """The batch-norm term of DeepInversion, for one teacher.

    Sums, over the batch-normalisation layers, the L2 distance of the mean and of the
    variance of the layer's input over the batch from the layer's moving statistics.

    Args:
        model: The teacher, a Functional or Sequential Keras model with batch
            normalisation. It is copied, not changed.

    Raises:
        ValueError: if there is no batch normalisation in it or it cannot be copied.

    **Privacy**: moving statistics are private data. A generator that reads them is not
    covered by the student's guarantee and must not be released.

    References:
        Yin et al. 2020, DeepInversion, arXiv:1912.08795.
    """

    def __init__(self, model: keras.Model) -> None:
        instance_of("model", model, keras.Model)
        self._probes: list[_Probe] = []
        try:
            self._copy = keras.models.clone_model(
                model, clone_function=self._clone, recursive=True
            )
        except ValueError as error:
            expected = "a Functional or Sequential model"
            raise invalid("model", model, expected) from error
        if not self._probes:
            expected = "a teacher with BatchNormalization layers"
            mend = "Set the weight of `batch_norm_statistics` to 0."
            raise invalid("model", model.name, expected, mend)
        self._copy.set_weights(model.get_weights())

    def _clone(self, layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config()
        if not isinstance(layer, keras.layers.BatchNormalization):
            return type(layer).from_config(config)
        probe = _Probe.from_config(
            {**config, "gamma_regularizer": None, "beta_regularizer": None}
        )
        self._probes.append(probe)
        return probe

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """The distance for a batch of images, differentiable in them.

        Args:
            images: float32 `[batch, *input_shape]`.

        Returns:
            Scalar, 0 or more.
        """
        self._copy(images, training=False)
        return tf.add_n([loss for probe in self._probes for loss in probe.losses])
