"""Noisy gradient descent of any Keras classifier on private records (DP-SGD)."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dp_accounting
import keras
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe._files import digest_of, replacing
from dp_transcribe.distillation.linear import check_labels
from dp_transcribe.distillation.releases import RELATION, RecordSums, sum_event
from dp_transcribe.mechanisms.clipping import clipped_gradient_sum
from dp_transcribe.mechanisms.clipping.validate import check_sampled, every_layer
from dp_transcribe.privacy.accounting import ACCOUNTANTS
from dp_transcribe.privacy.calibration import noise_multiplier_for
from dp_transcribe.privacy.ledger import Ledger
from dp_transcribe.privacy.units import Unit
from dp_transcribe.students import check_ends_in_logits, check_not_adapted
from dp_transcribe.teachers import Teacher, note_spent_on, was_spent_on

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivateTraining:
    """How a private teacher is trained; public, chosen without the private records.

    Attributes:
        epochs: how often a record is taken on average.
        batch_size: expected number of records in a step.
        learning_rate: at the start; it falls to a twentieth by a cosine.
        momentum: of gradient descent.
        ema_momentum: of the average of the noisy iterates, which the teacher ends with.
        l2_norm: the clip norm C of a record's gradient.
        normalize: scale every gradient to C instead of clipping it down to C.
        clipping: "ghost", "vectorized" or "tf_privacy".
        rows: records whose gradients are computed at once; memory only.
        accountant: `"pld"`, which needs less noise, or `"rdp"`.
    """

    epochs: int = 20
    batch_size: int = 1024
    learning_rate: float = 0.5
    momentum: float = 0.9
    ema_momentum: float = 0.98
    l2_norm: float = 1.0
    normalize: bool = False
    clipping: str = "ghost"
    rows: int = 256
    accountant: str = "pld"

    def __post_init__(self) -> None:
        """Checks the attributes."""
        for name in ("epochs", "batch_size", "rows"):
            _validate.positive_int(name, getattr(self, name))
        for name in ("learning_rate", "l2_norm"):
            _validate.positive_finite(name, getattr(self, name))
        _validate.probability("momentum", self.momentum)
        _validate.fraction_open("ema_momentum", self.ema_momentum)
        _validate.one_of("accountant", self.accountant, ACCOUNTANTS)

    def steps_per_epoch(self, num_records: int) -> int:
        """Steps in which a record is taken once on average."""
        return max(1, round(num_records / self.batch_size))

    def event(self, multiplier: float, num_records: int) -> dp_accounting.DpEvent:
        """Everything that a training with this noise multiplier releases."""
        step = sum_event(multiplier, self.batch_size / num_records)
        steps = self.epochs * self.steps_per_epoch(num_records)
        return dp_accounting.SelfComposedDpEvent(step, steps)

    def rates(self, steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
        """The learning rates of a training of so many steps."""
        return keras.optimizers.schedules.CosineDecay(
            self.learning_rate, steps, alpha=0.05
        )

    def optimizer(self, steps: int) -> keras.optimizers.Optimizer:
        """The optimizer of a training of so many steps."""
        return keras.optimizers.SGD(
            self.rates(steps),
            momentum=self.momentum,
            use_ema=True,
            ema_momentum=self.ema_momentum,
        )


def fit_private_teacher(
    model: keras.Model,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    target_epsilon: float,
    delta: float,
    training: PrivateTraining | None = None,
    input_range: Sequence[float] = (0.0, 1.0),
    checkpoint: str | os.PathLike[str] | None = None,
    on_step: Callable[[int, list[np.ndarray]], None] | None = None,
    seed: int | None = None,
    verbose: int = 1,
) -> Teacher:
    """Trains a classifier in place by DP-SGD and spends the whole budget.

    Every step takes each record independently with the same probability (Poisson
    sampling), however many that makes, bounds each record's gradient, sums, and adds
    Gaussian noise once. An empty sample is a step like any other.

    Args:
        model: built Functional or Sequential model that ends in logits
            `[batch, classes]`, without BatchNormalization, layers that are random in
            training, such as Dropout, and layers with statistics of `adapt`. It must
            not have seen the private records before.
        images: private, float `[records, ...]`.
        labels: private, int `[records]`.
        target_epsilon: the epsilon per record that is not passed.
        delta: strictly between 0 and 1.
        training: further settings.
        input_range: lowest and highest value of a pixel.
        checkpoint: a file that is written after every epoch and gone on from if it is
            there, for the same records. A resumed training equals the uninterrupted
            one.
        on_step: called with each step's number and the noisy weights after it, not
            averaged; they are covered as the teacher is.
        seed: None for secret noise; an int makes runs repeatable, for tests.
        verbose: 1 shows a bar with the epsilon so far, 0 nothing. Loss and accuracy
            are not shown: on private records they are private.

    Returns:
        The teacher, which carries its statement.

    Raises:
        ValueError: an argument is out of range, the labels do not fit, or the
            checkpoint is of another training or other records. Nothing was spent.
        RuntimeError: the model was trained here before, if only in part, or is that of
            a teacher with a statement, and there is no checkpoint to go on from.
            Nothing was spent.
        UnsupportedStudentError: gradients of the model cannot be bounded per record.

    **Privacy**: unit `RECORD`, zero-out, the number of records being public. A
    record's gradient has norm at most C in the sum of a step that takes it. Averaging
    and momentum are post-processing. The checkpoint holds the noise key and a digest
    of the records: it is as private as they are.

    References:
        Abadi et al. 2016, arXiv:1607.00133; Papernot et al. 2021, arXiv:2007.14191;
        averaging: De et al. 2022, arXiv:2204.13650.
    """
    plan = training or PrivateTraining()
    _check_model(model, images)
    labels = check_labels(labels, len(images), int(model.output_shape[-1]))
    if plan.batch_size > len(images):
        expected = f"at most the number of records {len(images)}"
        raise _validate.invalid("batch_size", plan.batch_size, expected)
    path = None if checkpoint is None else Path(checkpoint)
    resumed = path if path is not None and path.exists() else None
    if resumed is None:
        _refuse_trained(model)
    descent = _Descent(
        model,
        plan,
        len(images),
        noise_multiplier=noise_multiplier_for(
            target_epsilon,
            delta,
            lambda multiplier: plan.event(multiplier, len(images)),
            RELATION,
            plan.accountant,
        ),
        delta=delta,
        on_step=on_step,
        seed=seed,
        digest="" if path is None else _digest(images, labels),
    )
    if resumed is not None:
        descent.load(resumed)
    bar = keras.utils.Progbar(
        plan.epochs, verbose=verbose, stateful_metrics=["epsilon"]
    )
    note_spent_on(model)
    for epoch in range(descent.epochs_done, plan.epochs):
        descent.run_epoch(images, labels)
        if path is not None:
            descent.save(path)
        bar.update(epoch + 1, [("epsilon", descent.epsilon())])
    return descent.teacher(input_range)


class _Descent:
    """State of one training: model, optimizer, releases."""

    def __init__(
        self,
        model: keras.Model,
        plan: PrivateTraining,
        num_records: int,
        *,
        noise_multiplier: float,
        delta: float,
        on_step: Callable[[int, list[np.ndarray]], None] | None = None,
        seed: int | None,
        digest: str = "",
    ) -> None:
        self.digest = digest
        self.model, self.plan, self.delta = model, plan, delta
        self.on_step = on_step
        self.num_records = num_records
        self.steps_per_epoch = plan.steps_per_epoch(num_records)
        self.releases = RecordSums(
            mechanism="ClippedGradient",
            l2_norm=plan.l2_norm,
            noise_multiplier=noise_multiplier,
            sampling_probability=plan.batch_size / num_records,
            seed=seed,
        )
        self.optimizer = plan.optimizer(plan.epochs * self.steps_per_epoch)
        self.optimizer.build(model.trainable_variables)
        self._clipped = tf.function(self._clipped_sum)
        self._apply = tf.function(self._descend)

    @property
    def steps_done(self) -> int:
        """Steps released so far."""
        return self.releases.ledger.releases(Unit.RECORD)

    @property
    def epochs_done(self) -> int:
        """Whole epochs released so far."""
        return self.steps_done // self.steps_per_epoch

    def epsilon(self) -> float:
        """Epsilon so far."""
        return self.releases.epsilon(delta=self.delta, accountant=self.plan.accountant)

    def run_epoch(self, images: np.ndarray, labels: np.ndarray) -> None:
        """The noisy steps of one epoch."""
        for _ in range(self.steps_per_epoch):
            self.releases.begin()
            chosen = self.releases.sample(self.num_records).numpy()
            totals = self._sum(images, labels, chosen)
            self._apply(self.releases.add_joint_noise(totals))
            if self.on_step is not None:
                weights = [v.numpy() for v in self.model.trainable_variables]
                self.on_step(self.steps_done - 1, weights)

    def _sum(
        self, images: np.ndarray, labels: np.ndarray, chosen: np.ndarray
    ) -> list[tf.Tensor]:
        """Sum of the bounded gradients of the chosen records, in blocks of `rows`."""
        rows = self.plan.rows
        blocks = max(1, -(-len(chosen) // rows))
        padded = np.zeros(blocks * rows, np.int64)
        padded[: len(chosen)] = chosen
        mask = (np.arange(blocks * rows) < len(chosen)).astype(np.float32)
        totals = [tf.zeros(v.shape) for v in self.model.trainable_variables]
        for start in range(0, blocks * rows, rows):
            block = padded[start : start + rows]
            part = self._clipped(
                tf.cast(images[block], tf.float32),
                tf.constant(labels[block]),
                tf.constant(mask[start : start + rows]),
            )
            totals = [total + new for total, new in zip(totals, part, strict=True)]
        return totals

    def _clipped_sum(
        self, images: tf.Tensor, labels: tf.Tensor, mask: tf.Tensor
    ) -> list[tf.Tensor]:
        return clipped_gradient_sum(
            self.model,
            images,
            labels,
            _cross_entropy,
            l2_norm=self.plan.l2_norm,
            normalize=self.plan.normalize,
            mask=mask,
            clipping=self.plan.clipping,
        ).gradients

    def _descend(self, noisy: list[tf.Tensor]) -> None:
        scaled = [gradient / self.plan.batch_size for gradient in noisy]
        self.optimizer.apply(scaled, self.model.trainable_variables)

    def teacher(self, input_range: Sequence[float]) -> Teacher:
        """The teacher with averaged iterates and its statement."""
        self.optimizer.finalize_variable_values(self.model.trainable_variables)
        statement = self.releases.statement(
            delta=self.delta,
            accountant=self.plan.accountant,
            covered=("teacher",),
            training=dataclasses.asdict(self.plan),
        )
        return Teacher(
            self.model, outputs="logits", input_range=input_range, statement=statement
        )

    # How it is kept.

    def _variables(self) -> list[Any]:
        source = self.releases.source
        return [
            *self.model.variables,
            *self.optimizer.variables,
            source.key,
            source.counter,
        ]

    def _facts(self) -> str:
        """What must be the same for a training to go on."""
        facts = {
            "training": dataclasses.asdict(self.plan),
            "records": self.num_records,
            "noise_multiplier": self.releases.noise_multiplier,
            "delta": self.delta,
            "seed": self.releases.source.seed,
            "shapes": [list(v.shape) for v in self._variables()],
            "layers": [_kind(layer) for layer in every_layer(self.model)],
        }
        return json.dumps(facts, sort_keys=True)

    def save(self, path: Path) -> None:
        """Writes everything to one file that is never seen half written."""
        values = {f"v{i}": np.asarray(v) for i, v in enumerate(self._variables())}
        facts = {"facts": self._facts(), "records": self.digest}
        ledger = self.releases.ledger.to_json()
        # Opened here, since NumPy adds an ending to a name of another one.
        with replacing(path, secret=True) as partial, partial.open("wb") as file:
            np.savez(file, ledger=ledger, **facts, **values)

    def load(self, path: Path) -> None:
        """Goes on from what `save` wrote, if it is of this training."""
        expected = "the checkpoint of a training with these settings"
        mend = "Repeat the call that is resumed, or remove the file to start anew."
        try:
            with np.load(path) as stored:
                facts, digest = str(stored["facts"]), str(stored["records"])
                ledger = Ledger.from_json(str(stored["ledger"]))
                values = [stored[f"v{i}"] for i in range(len(self._variables()))]
        except Exception as error:  # the readers raise several unrelated types
            raise _validate.invalid("checkpoint", str(path), expected, mend) from error
        if facts != self._facts():
            raise _validate.invalid("checkpoint", facts, self._facts(), mend)
        if digest != self.digest:
            # The same noise on the sums of other records would cancel between the two.
            expected = "the checkpoint of a training on these images and labels"
            raise _validate.invalid("checkpoint", str(path), expected, mend)
        for variable, value in zip(self._variables(), values, strict=True):
            variable.assign(value)
        self.releases.ledger = ledger
        _LOGGER.info("Goes on after %d epochs.", self.epochs_done)


def _refuse_trained(model: keras.Model) -> None:
    """Refuses a model whose weights private records have moved before.

    Raises:
        RuntimeError: a variable of it was in such a training, or is that of a teacher
            with a statement.
    """
    if was_spent_on(model):
        raise RuntimeError(
            "This model was trained privately before, if only in part. A second "
            "training would start from weights that the records have moved, and its "
            "statement would leave out what that cost. Make a new model, or pass the "
            "`checkpoint` of the first training to go on with it."
        )


def _kind(layer: keras.layers.Layer) -> str:
    """What tells layers of equal shapes apart, whatever their names."""
    activation = getattr(layer, "activation", None)
    name = getattr(activation, "__name__", type(activation).__name__)
    return f"{type(layer).__name__} {name}"


def _digest(*records: np.ndarray) -> str:
    """SHA-256 of the records in their order, their types included."""
    parts = [f"{part.dtype} {part.shape} {digest_of(part)}" for part in records]
    return digest_of(" ".join(parts).encode())


def _cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    logits = tf.cast(logits, tf.float32)
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def _check_model(model: Any, images: np.ndarray) -> None:
    """Refuses a model that does not map the images to logits."""
    _validate.instance_of("model", model, keras.Model)
    shape = getattr(model, "input_shape", None)
    if not isinstance(shape, tuple) or tuple(shape[1:]) != images.shape[1:]:
        expected = f"a built model of inputs {images.shape[1:]}, as `images` has"
        raise _validate.invalid("model", shape, expected)
    check_ends_in_logits("model", model)
    check_not_adapted("model", model)
    mend = "Leave out Dropout and random augmentation: records are sampled in a step."
    check_sampled(model, mend)
