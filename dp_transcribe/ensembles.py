"""Ensembles of teachers on disjoint shards of the private records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.teachers import Teacher


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """Which record belongs to which shard, decided by its index alone.

    Attributes:
        records: number of private records; public.
        shards: number of shards, K.
        seed: of the public permutation that is cut into shards.

    **Privacy**: the split reads no record, so replacing one record changes one shard
    and leaves every other shard as it is. Every index is in exactly one shard: a
    permutation is cut, and there is no way to state shards that overlap.

    Raises:
        ValueError: fewer than two shards, or more shards than records.
    """

    records: int
    shards: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        _validate.positive_int("records", self.records)
        _validate.in_range("shards", self.shards, 2, self.records)
        _validate.non_negative_int("seed", self.seed)

    def indices(self, shard: int) -> np.ndarray:
        """Sorted indices of a shard's records, int64; sizes differ by one at most."""
        _validate.in_range("shard", shard, 0, self.shards - 1)
        order = np.random.default_rng(self.seed).permutation(self.records)
        size, longer = divmod(self.records, self.shards)
        start = shard * size + min(shard, longer)
        return np.sort(order[start : start + size + (shard < longer)])

    def shards_of_records(self) -> np.ndarray:
        """In how many shards each record is, int64 `[records]`: 1, or it is a defect.

        Counted from all `indices`, which are public. A record in m shards has m votes,
        so it moves their counts by m·√2 and wants m times the noise.
        """
        counts = np.zeros(self.records, np.int64)
        for shard in range(self.shards):
            counts[np.unique(self.indices(shard))] += 1
        return counts


class TeacherEnsemble(Teacher):
    """K teachers of one architecture, asked together.

    As a `Teacher` its answer is the share of its members that vote for each class.

    **Privacy**: if the members were trained on disjoint shards, one record decides
    about one member, so about one vote. An ensemble never guides a generator: its
    `logits`, which have gradients, are refused.

    Args:
        member: a Keras model of the members' architecture, features (or images) to
            logits `[batch, classes]`.
        weights: the members' weights, stacked: one array `[teachers, ...]` for each
            of `member.variables`.
        features: a public Keras model, images to features, which all members share.
            It must not depend on the private records.
        input_range: lowest and highest value of a valid input.

    Attributes:
        num_teachers: K.

    Raises:
        ValueError: the weights do not fit the member.
    """

    def __init__(
        self,
        member: keras.Model,
        weights: Sequence[np.ndarray],
        *,
        features: keras.Model | None = None,
        input_range: Sequence[float] = (0.0, 1.0),
    ) -> None:
        self.member = _validate.instance_of("member", member, keras.Model)
        self.features = features
        self.num_teachers = _check_stack(member, weights)
        self._stacked = [tf.Variable(w, trainable=False) for w in weights]
        first = member if features is None else features
        super().__init__(
            self.vote_shares,
            outputs="probabilities",
            input_shape=first.input_shape[1:],
            input_range=input_range,
        )

    def member_logits(self, images: tf.Tensor) -> tf.Tensor:
        """Logits of every member, in one batched forward pass.

        Args:
            images: `[batch, height, width, channels]` within `input_range`.

        Returns:
            float32 `[batch, teachers, classes]`.
        """
        inputs = images
        if self.features is not None:
            inputs = self.features(images, training=False)
        split = len(self.member.trainable_variables)

        def one(weights: list[tf.Tensor]) -> tf.Tensor:
            outputs, _ = self.member.stateless_call(
                weights[:split], weights[split:], inputs, training=False
            )
            return tf.cast(outputs, tf.float32)

        stacked = [tf.convert_to_tensor(variable) for variable in self._stacked]
        answers = tf.transpose(tf.vectorized_map(one, stacked), [1, 0, 2])
        return tf.stop_gradient(answers)

    def member_probabilities(self, images: tf.Tensor) -> tf.Tensor:
        """Probabilities by every member, float32 `[batch, teachers, classes]`."""
        return tf.nn.softmax(self.member_logits(images))

    def votes(self, images: tf.Tensor) -> tf.Tensor:
        """How many members vote for each class, float32 `[batch, classes]`."""
        logits = self.member_logits(images)
        classes = logits.shape[-1]
        return tf.reduce_sum(tf.one_hot(tf.argmax(logits, -1), classes), 1)

    def vote_shares(self, images: tf.Tensor) -> tf.Tensor:
        """`votes` over the number of teachers, float32 `[batch, classes]`."""
        return self.votes(images) / float(self.num_teachers)

    def probabilities(self, images: tf.Tensor) -> tf.Tensor:
        """The ensemble's answers: `vote_shares`, without gradient."""
        return self.vote_shares(images)

    def logits(self, images: tf.Tensor) -> tf.Tensor:
        """Refused: logits are what a generator would be guided by.

        Raises:
            ValueError: always.
        """
        raise _validate.invalid(
            "teacher",
            self,
            "one teacher; an ensemble answers through a mechanism of unit RECORD alone",
            "Let the student guide the generator: it has learnt from released answers.",
        )

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, without the weights."""
        serialize = keras.saving.serialize_keras_object
        return {
            "member": serialize(self.member),
            "features": serialize(self.features),
            "num_teachers": self.num_teachers,
            "input_range": list(self.input_range),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TeacherEnsemble:
        """The ensemble that `get_config` described, with all weights zero."""
        deserialize = keras.saving.deserialize_keras_object
        member = deserialize(config["member"])
        shapes = [(config["num_teachers"], *v.shape) for v in _variables(member)]
        weights = [np.zeros(shape, np.float32) for shape in shapes]
        return cls(
            member,
            weights,
            features=deserialize(config["features"]),
            input_range=config["input_range"],
        )

    def get_weights(self) -> list[np.ndarray]:
        """The stacked weights of the members, then those of the features."""
        shared = [] if self.features is None else self.features.get_weights()
        return [*(variable.numpy() for variable in self._stacked), *shared]

    def set_weights(self, weights: list[np.ndarray]) -> None:
        """Puts back what `get_weights` gave."""
        count = len(self._stacked)
        for variable, value in zip(self._stacked, weights[:count], strict=True):
            variable.assign(value)
        if self.features is not None:
            self.features.set_weights(weights[count:])


def _variables(member: keras.Model) -> list[Any]:
    """In the order in which `stateless_call` takes them."""
    return [*member.trainable_variables, *member.non_trainable_variables]


def _check_stack(member: keras.Model, weights: Sequence[np.ndarray]) -> int:
    """The number of teachers that stacked weights hold."""
    wanted = [tuple(variable.shape) for variable in _variables(member)]
    counts = {len(array) for array in weights if np.ndim(array)}
    received = [tuple(np.shape(array)[1:]) for array in weights]
    if received != wanted or len(counts) != 1:
        shapes = [np.shape(array) for array in weights]
        expected = f"arrays [teachers, ...] for variables of shapes {wanted}"
        raise _validate.invalid("weights", shapes, expected)
    return _validate.in_range("teachers", counts.pop(), 2, 10**6)
