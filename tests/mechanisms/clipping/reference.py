"""The definition, written as slowly and plainly as possible: one example at a time."""

import keras
import numpy as np
import tensorflow as tf

LAYERS = keras.layers


def squared_error(targets, outputs):
    difference = tf.cast(targets, tf.float32) - tf.cast(outputs, tf.float32)
    return tf.reduce_sum(tf.reshape(difference**2, [tf.shape(targets)[0], -1]), axis=1)


def one_by_one(
    model, inputs, targets, loss_fn=squared_error, *, l2_norm, normalize=False
):
    """Gradient of each example alone, bounded, summed in float64; and the norms."""
    variables = [v.value for v in model.trainable_variables]
    total = [np.zeros(v.shape) for v in variables]
    norms = []
    for i in range(len(inputs)):
        with tf.GradientTape() as tape:
            outputs = model(inputs[i : i + 1], training=True)
            loss = loss_fn(targets[i : i + 1], outputs)[0]
        gradients = tape.gradient(loss, variables, unconnected_gradients="zero")
        gradients = [np.float64(tf.convert_to_tensor(g)) for g in gradients]
        norm = np.sqrt(sum((g**2).sum() for g in gradients))
        factor = l2_norm / norm if normalize else min(1.0, l2_norm / norm)
        total = [t + factor * g for t, g in zip(total, gradients, strict=True)]
        norms.append(norm)
    return total, np.array(norms)


def make_data(model, count=5, seed=0):
    """Random inputs and targets; small weights, so that biases matter as well."""
    random = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign(variable.numpy() + 0.1 * random.normal(size=variable.shape))
    shape = (count, *model.input_shape[1:])
    if model.inputs[0].dtype.startswith("int"):
        inputs = random.integers(0, 4, shape).astype("int32")
    else:
        inputs = random.normal(size=shape).astype("float32")
    targets = random.normal(size=(count, *model.output_shape[1:])).astype("float32")
    return tf.constant(inputs), tf.constant(targets)


def compiled(fn, inputs, targets):
    """`fn(inputs, targets)` in a `tf.function` with a batch of unknown size."""
    signature = [
        tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in (inputs, targets)
    ]
    return tf.function(fn, input_signature=signature)


def distance(gradients, expected):
    """Largest difference relative to the norm over all variables."""
    norm = np.sqrt(sum((np.asarray(e) ** 2).sum() for e in expected))
    pairs = zip(gradients, expected, strict=True)
    return max(np.abs(np.asarray(g) - e).max() for g, e in pairs) / max(norm, 1e-12)


def total_norm(gradients):
    return float(
        np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in gradients))
    )
