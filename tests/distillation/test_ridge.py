"""Kernels and ridge regression, against independent implementations."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dp_transcribe.distillation import KernelRidgeClassifier, NTKKernel, RBFKernel
from dp_transcribe.distillation.ridge import centred_one_hot

RNG = np.random.default_rng(0)


def test_equals_scikit_learn():
    inputs = RNG.normal(size=(40, 5)).astype(np.float32)
    labels = np.arange(40) % 3
    queries = RNG.normal(size=(7, 5)).astype(np.float32)
    ours = KernelRidgeClassifier(RBFKernel(0.2), penalty=0.1).fit(inputs, labels)
    # The diagonal of this kernel is one, so the penalties are the same.
    theirs = KernelRidge(kernel="rbf", gamma=0.2, alpha=0.1)
    theirs.fit(inputs, centred_one_hot(labels, 3))
    np.testing.assert_allclose(
        ours.decision_function(queries), theirs.predict(queries), atol=1e-4
    )


def test_labels_come_back_as_they_were_given():
    inputs = np.array([[0.0], [0.1], [5.0], [5.1]], np.float32)
    model = KernelRidgeClassifier(RBFKernel(1.0)).fit(inputs, np.array([3, 3, 7, 7]))
    np.testing.assert_array_equal(model.predict(inputs), [3, 3, 7, 7])
    assert model.score(inputs, [3, 3, 7, 7]) == 1.0
    assert model.decision_function(inputs[:0]).shape == (0, 2)


def test_one_label_per_input_is_asked_for():
    with pytest.raises(ValueError, match="labels"):
        KernelRidgeClassifier(RBFKernel()).fit(np.zeros((3, 2)), [0, 1])


@pytest.mark.parametrize(
    ("inputs", "labels"),
    [(np.zeros((0, 2)), []), (np.array([[0.0, np.nan], [1.0, 0.0]]), [0, 1])],
)
def test_what_cannot_be_solved_for_is_refused(inputs, labels):
    with pytest.raises(ValueError, match="`inputs`"):
        KernelRidgeClassifier(RBFKernel()).fit(inputs, labels)


def test_inputs_of_another_shape_are_not_answered():
    model = KernelRidgeClassifier(RBFKernel()).fit(np.eye(4), np.arange(4) % 2)
    for other in (np.zeros((3, 1)), np.zeros((3, 2, 2))):
        with pytest.raises(ValueError, match=r"`inputs`.*\(4,\)"):
            model.predict(other)


def test_before_fit_there_is_no_prediction():
    with pytest.raises(NotFittedError, match="fit"):
        KernelRidgeClassifier(RBFKernel()).predict(np.zeros((1, 2)))


def test_is_an_estimator_of_scikit_learn():
    labels = np.arange(60) % 2
    inputs = (RNG.normal(size=(60, 3)) + 3.0 * labels[:, None]).astype(np.float32)
    fitted = KernelRidgeClassifier(RBFKernel(0.2), penalty=1).fit(inputs, labels)
    with pytest.raises(NotFittedError):
        clone(fitted).predict(inputs)
    pipeline = make_pipeline(StandardScaler(), clone(fitted))
    search = GridSearchCV(
        pipeline,
        {
            "kernelridgeclassifier__penalty": [0.1, 1.0],
            "kernelridgeclassifier__kernel": [RBFKernel(0.1), NTKKernel(1)],
        },
        cv=2,
    )
    assert search.fit(inputs, labels).best_score_ > 0.9


@pytest.mark.parametrize(("hidden_layers", "width"), [(1, 8192), (2, 800)])
def test_tangent_kernel_is_the_limit_of_wide_networks(hidden_layers, width):
    kernel = NTKKernel(hidden_layers, weight_std=1.3, bias_std=0.2)
    inputs = tf.constant(np.random.default_rng(3).normal(size=(3, 6)), tf.float32)
    measured = np.mean(
        [_empirical_kernel(kernel, inputs, seed, width) for seed in range(6)], axis=0
    )
    limit = kernel(inputs, inputs).numpy()
    lengths = np.sqrt(np.diag(limit))
    error = np.abs(measured - limit) / np.outer(lengths, lengths)
    assert error.max() < 0.07


@pytest.mark.parametrize("hidden_layers", [1, 2, 6])
def test_tangent_kernel_of_an_input_with_itself_is_exact(hidden_layers):
    kernel = NTKKernel(hidden_layers, weight_std=1.3, bias_std=0.2)
    inputs = RNG.normal(size=(5, 12)).astype(np.float32)
    # The two pre-activations are one, so that their angle is zero.
    variance = 1.3**2 * np.mean(inputs.astype(float) ** 2, axis=1) + 0.2**2
    expected = variance
    for _ in range(hidden_layers):
        variance = 1.3**2 * variance / 2.0 + 0.2**2
        expected = variance + 1.3**2 * expected / 2.0
    found = kernel(tf.constant(inputs), tf.constant(inputs)).numpy()
    np.testing.assert_allclose(np.diag(found), expected, rtol=3e-6)


def test_tangent_kernel_of_equal_inputs_has_a_finite_gradient():
    inputs = tf.ones([2, 12])
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        total = tf.reduce_sum(NTKKernel(2)(inputs, inputs))
    assert np.isfinite(tape.gradient(total, inputs)).all()


def _empirical_kernel(kernel, inputs, seed, width):
    """Products of the gradients of a finite network in tangent parametrisation."""
    keras.utils.set_random_seed(seed)
    sizes = [inputs.shape[1]] + [width] * kernel.hidden_layers + [1]
    weights = [
        tf.Variable(tf.random.normal(shape))
        for fan_in, fan_out in zip(sizes, sizes[1:], strict=False)
        for shape in ((fan_in, fan_out), (fan_out,))
    ]
    rows = []
    for example in inputs:
        with tf.GradientTape() as tape:
            signal = example[None]
            for layer in range(0, len(weights), 2):
                signal = tf.nn.relu(signal) if layer else signal
                scale = kernel.weight_std / np.sqrt(signal.shape[1])
                signal = scale * signal @ weights[layer]
                signal += kernel.bias_std * weights[layer + 1]
        gradients = tape.gradient(signal, weights)
        rows.append(np.concatenate([g.numpy().ravel() for g in gradients]))
    rows = np.stack(rows)
    return rows @ rows.T


def test_only_an_inner_product_is_linear_in_its_embeddings():
    model = KernelRidgeClassifier(RBFKernel())
    with pytest.raises(NotFittedError, match="not fitted"):
        model.linear_weights()
    with pytest.raises(ValueError, match="`kernel`.*inner product"):
        model.fit(np.eye(2), [0, 1]).linear_weights()
