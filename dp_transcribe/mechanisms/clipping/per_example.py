"""Per-example gradients of one variable, in forms that avoid writing them out.

Every form knows three things: the squared norm of each example's gradient, the
weighted sum over the batch, and how to write itself out when forms must be added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import tensorflow as tf

_ROUNDING = 2.0**-24  # of a float32


class PerExampleGradient(Protocol):
    """The gradients of one variable, one for each example of the batch."""

    def squared_norms(self) -> tf.Tensor:
        """Returns `[batch]` float32."""

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns the sum over the batch, with `weights` `[batch]`, float32."""

    def explicit(self) -> Explicit:
        """Returns the same gradients written out."""

    def map(self, fn: Callable[[tf.Tensor], tf.Tensor]) -> PerExampleGradient:
        """Returns a copy with `fn` applied to every `[batch, ...]` tensor."""


@dataclasses.dataclass(frozen=True)
class Explicit:
    """Gradients written out.

    Attributes:
        values: `[batch, n]` float32; a row holds one gradient, flat.
        shape: the variable's shape.
        layout: the axes that a row is flattened from; the variable's if empty.
        order: the order of those axes that gives the variable's.
    """

    values: tf.Tensor
    shape: tuple[int, ...]
    layout: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    def squared_norms(self) -> tf.Tensor:
        """Returns `[batch]` float32."""
        return tf.reduce_sum(tf.square(self.values), axis=1)

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns the sum over the batch, in the variable's shape."""
        total = tf.tensordot(weights, self.values, 1)
        if self.layout:
            total = tf.transpose(tf.reshape(total, self.layout), self.order)
        return tf.reshape(total, self.shape)

    def explicit(self) -> Explicit:
        """Returns the same gradients with rows in the variable's own order."""
        if not self.layout:
            return self
        values = tf.reshape(self.values, [-1, *self.layout])
        values = tf.transpose(values, [0, *(axis + 1 for axis in self.order)])
        size = self.values.shape[1]
        return Explicit(tf.reshape(values, [-1, size]), self.shape)

    def map(self, fn: Callable[[tf.Tensor], tf.Tensor]) -> Explicit:
        """Returns a copy with `fn` applied to the values."""
        return dataclasses.replace(self, values=fn(self.values))


@dataclasses.dataclass(frozen=True)
class Factored:
    """Gradients of a matrix as sums over positions of outer products.

    Attributes:
        inputs: `[batch, positions, rows]` float32.
        deltas: `[batch, positions, columns]` float32.
        shape: the variable's shape, of rows times columns elements.

    References:
        Goodfellow 2015, arXiv:1510.01799 (one position); Li et al. 2021,
        arXiv:2110.05679 (the Gram form); Bu et al. 2022, arXiv:2210.00038
        (book-keeping).
    """

    inputs: tf.Tensor
    deltas: tf.Tensor
    shape: tuple[int, ...]

    def squared_norms(self) -> tf.Tensor:
        """Returns `[batch]` float32, from the Gram matrices over positions."""
        if self.inputs.shape[1] == 1:
            inputs = tf.reduce_sum(tf.square(self.inputs), axis=(1, 2))
            return inputs * tf.reduce_sum(tf.square(self.deltas), axis=(1, 2))
        inputs = tf.matmul(self.inputs, self.inputs, transpose_b=True)
        deltas = tf.matmul(self.deltas, self.deltas, transpose_b=True)
        lengths = tf.linalg.diag_part(inputs) * tf.linalg.diag_part(deltas)
        return _rounded_up(inputs * deltas, _pairs(lengths))

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns the sum over the batch, in the variable's shape."""
        deltas = tf.math.multiply_no_nan(self.deltas, weights[:, None, None])
        inputs = tf.reshape(self.inputs, [-1, self.inputs.shape[2]])
        deltas = tf.reshape(deltas, [-1, self.deltas.shape[2]])
        return tf.reshape(tf.matmul(inputs, deltas, transpose_a=True), self.shape)

    def explicit(self) -> Explicit:
        """Returns the same gradients written out."""
        values = tf.matmul(self.inputs, self.deltas, transpose_a=True)
        size = self.inputs.shape[2] * self.deltas.shape[2]
        return Explicit(tf.reshape(values, [-1, size]), self.shape)

    def map(self, fn: Callable[[tf.Tensor], tf.Tensor]) -> Factored:
        """Returns a copy with `fn` applied to inputs and deltas."""
        return dataclasses.replace(self, inputs=fn(self.inputs), deltas=fn(self.deltas))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Gradients of a table of which each example looks up a few rows.

    Attributes:
        rows: `[batch, positions]` int32, the rows looked up.
        deltas: `[batch, positions, columns]` float32.
        shape: rows and columns of the table.
    """

    rows: tf.Tensor
    deltas: tf.Tensor
    shape: tuple[int, ...]

    def squared_norms(self) -> tf.Tensor:
        """Returns `[batch]` float32; a row that is looked up twice counts once."""
        same = to_float32(self.rows[:, :, None] == self.rows[:, None, :])
        gram = tf.matmul(self.deltas, self.deltas, transpose_b=True)
        return _rounded_up(same * gram, same * _pairs(tf.linalg.diag_part(gram)))

    def weighted_sum(self, weights: tf.Tensor) -> tf.Tensor:
        """Returns the sum over the batch, in the table's shape."""
        deltas = tf.math.multiply_no_nan(self.deltas, weights[:, None, None])
        deltas = tf.reshape(deltas, [-1, self.shape[1]])
        rows = tf.reshape(self.rows, [-1])
        return tf.math.unsorted_segment_sum(deltas, rows, self.shape[0])

    def explicit(self) -> Explicit:
        """Returns the same gradients written out."""
        chosen = tf.one_hot(self.rows, self.shape[0])
        return Factored(chosen, self.deltas, self.shape).explicit()

    def map(self, fn: Callable[[tf.Tensor], tf.Tensor]) -> Rows:
        """Returns a copy with `fn` applied to rows and deltas."""
        return dataclasses.replace(self, rows=fn(self.rows), deltas=fn(self.deltas))


def _pairs(squares: tf.Tensor) -> tf.Tensor:
    """Products of the lengths of positions, `[batch, positions, positions]`.

    Args:
        squares: `[batch, positions]`, squared lengths.
    """
    lengths = tf.sqrt(tf.maximum(squares, 0.0))
    return lengths[:, :, None] * lengths[:, None, :]


def _rounded_up(products: tf.Tensor, largest: tf.Tensor) -> tf.Tensor:
    """Sums of products that may cancel, with what rounding may have taken away.

    Where positions cancel, the digits that are left are rounding's. A squared norm that
    is too small would let an example contribute more than the bound, one that is too
    large only less.

    Args:
        products: `[batch, positions, positions]`.
        largest: alike, what a product can be at most.

    Returns:
        `[batch]`, 0 only where nothing was added.
    """
    total = tf.reduce_sum(products, axis=(1, 2))
    slack = 4.0 * tf.abs(products) + largest
    # A sum that should be zero can come out below it.
    return tf.maximum(total, 0.0) + _ROUNDING * tf.reduce_sum(slack, axis=(1, 2))


def outer(
    inputs: tf.Tensor, deltas: tf.Tensor, shape: tuple[int, ...]
) -> PerExampleGradient:
    """Returns the cheaper form of a sum over positions of outer products.

    Args:
        inputs: `[batch, positions, rows]`.
        deltas: `[batch, positions, columns]`.
        shape: the variable's shape.
    """
    factored = Factored(to_float32(inputs), to_float32(deltas), shape)
    positions, rows = inputs.shape[1], inputs.shape[2]
    columns = deltas.shape[2]
    gram = positions is None or positions == 1
    if gram or positions * (rows + columns) <= rows * columns:
        return factored
    return factored.explicit()


def add(gradients: Sequence[PerExampleGradient]) -> PerExampleGradient:
    """Returns the sum of several gradients of one variable: it was used repeatedly."""
    if len(gradients) == 1:
        return gradients[0]
    factored = [g for g in gradients if isinstance(g, Factored)]
    if len(factored) == len(gradients):
        inputs = tf.concat([g.inputs for g in factored], axis=1)
        deltas = tf.concat([g.deltas for g in factored], axis=1)
        return outer(inputs, deltas, factored[0].shape)
    parts = [g.explicit() for g in gradients]
    return Explicit(tf.add_n([p.values for p in parts]), parts[0].shape)


def to_float32(tensor: tf.Tensor) -> tf.Tensor:
    """Casts to float32, in which norms and sums are always computed."""
    return tf.cast(tensor, tf.float32)


def after(done: Sequence[tf.Tensor], value: tf.Tensor) -> tf.Tensor:
    """Gives `value` only when `done` is computed.

    TensorFlow begins a loop with whatever its inputs already allow, long before all of
    them are there, and holds what that takes.
    """
    with tf.control_dependencies(done):
        return tf.identity(value)
