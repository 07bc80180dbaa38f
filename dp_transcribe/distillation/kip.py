"""DP-KIP: support images learnt by noisy gradients of kernel ridge regression."""

from __future__ import annotations

import dataclasses
import functools
import math
import secrets

import dp_accounting
import keras
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.distillation.dataset import DistilledDataset, balanced_labels
from dp_transcribe.distillation.jacobians import EmbeddingJacobian
from dp_transcribe.distillation.kernels import (
    KEPT_PER_PIXEL,
    LARGEST,
    Kernel,
    embed_in_batches,
)
from dp_transcribe.distillation.kip_gradients import (
    feature_gradient_sum,
    pixel_gradient_sum,
)
from dp_transcribe.distillation.linear import check_labels
from dp_transcribe.distillation.progress import counted
from dp_transcribe.distillation.provenance import (
    holds_record,
    remember_released,
    were_released,
)
from dp_transcribe.distillation.releases import (
    RELATION,
    RecordSums,
    sampling_rate,
    sum_event,
)
from dp_transcribe.distillation.ridge import centred_one_hot, ridge_solve
from dp_transcribe.mechanisms.clipping.bound import Bound, zero_rows
from dp_transcribe.privacy.calibration import noise_multiplier_for
from dp_transcribe.privacy.ledger import Ledger
from dp_transcribe.privacy.statement import PrivacyStatement
from dp_transcribe.privacy.units import Unit

# Records whose gradients are held at once.
_CHUNK = 64
_LARGEST_FEATURE = 1e6
_LARGEST_FIT = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class KIPTraining:
    """How DP-KIP is run; public, chosen without the private data.

    Attributes:
        steps: number of noisy steps.
        learning_rate: of Adam, in units of the pixels.
        l2_norm: bound of one record's gradient over all support images together.
        bounded: what the gradient that is bounded and noised is taken by:
            `"pixels"`, as published, or `"features"` of the support images, from
            which the noisy sum is carried back to the pixels in one pass. That
            needs no Jacobian and a kernel that is an inner product; the noise is
            spread over as many entries as there are features.
        sampling_probability: probability with which a step takes each record.
        penalty: of the ridge regression, as in `KernelRidgeClassifier`.
        accountant: `"rdp"` or `"pld"`.
    """

    steps: int = 300
    learning_rate: float = 0.1
    l2_norm: float = 1e-2
    bounded: str = "pixels"
    sampling_probability: float = 1 / 30
    penalty: float = 1e-3
    accountant: str = "rdp"

    def __post_init__(self) -> None:
        """Checks the attributes."""
        _validate.positive_int("steps", self.steps)
        for name in ("learning_rate", "l2_norm", "penalty"):
            _validate.positive_finite(name, getattr(self, name))
        _validate.one_of("bounded", self.bounded, ("pixels", "features"))
        sampling_rate(self.sampling_probability)
        _validate.one_of("accountant", self.accountant, ("rdp", "pld"))


class DPKIP(keras.Model):
    """Support images as weights, moved by private gradients.

    Args:
        kernel: the kernel; it decides what an embedding is.
        initial: where the support images start, float `[n, ...]`: noise or public
            images, in the order of the classes, as many of each. Never distilled ones:
            the statement would not know what was spent on them.
        num_classes: number of classes.
        training: how it is run.
        seed: None for secret noise; an int makes runs repeatable, for tests.

    Raises:
        ValueError: the support does not divide by the classes, holds images of a
            `DistilledDataset` or of an earlier fit, or one chunk of gradients would not
            fit into memory.

    **Privacy**: unit `RECORD`, zero-out. The gradient of each record's loss with
    respect to all support images is clipped jointly to `l2_norm`; their sum over a
    true Poisson sample is released once per step. Records are embedded one by one;
    no statistic of them is used. `initial` must not come from private data: `fit`
    refuses it if it finds one of its records in there, even rescaled, mirrored or
    turned by right angles; that a run is refused tells that the record is there, and is
    not accounted. What else was made of records (crops, shifts, mixtures) is *not*
    recognised, nor is what was distilled in another process and read without
    `DistilledDataset.load`, or changed since. Weights know which fit they are of:
    loaded into another model they are refused by `fit` and by the statement.

    References:
        Vinaroz, Park: Differentially Private Kernel Inducing Points using features
        from ScatterNets (DP-KIP-ScatterNet), arXiv:2301.13389.
    """

    def __init__(
        self,
        kernel: Kernel,
        initial: np.ndarray,
        num_classes: int,
        training: KIPTraining | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        super().__init__(name="dpkip")
        self.kernel = _validate.instance_of("kernel", kernel, Kernel)
        self.num_classes = _validate.num_classes("num_classes", num_classes)
        self.training_plan = training or KIPTraining()
        self.seed = _validate.optional_seed("seed", seed)
        initial = np.asarray(initial, np.float32)
        if len(initial) == 0 or len(initial) % num_classes:
            expected = f"as many images for each of {num_classes} classes"
            raise _validate.invalid("initial", initial.shape, expected)
        if were_released(initial):
            expected = "noise or public images"
            mend = (
                "They were distilled from private records, and what that cost would be "
                "missing from the statement of this model."
            )
            raise _validate.invalid("initial", initial.shape, expected, mend)
        self.support = self.add_weight(
            name="support",
            shape=initial.shape,
            initializer=lambda *_, **__: tf.constant(initial),
        )
        # Of which fit the support is, 0 before any: it goes where the support goes.
        self.fitted_by = self.add_weight(
            name="fitted_by",
            shape=(),
            dtype="int64",
            initializer="zeros",
            trainable=False,
        )
        self.labels = balanced_labels(len(initial) // num_classes, num_classes)
        self.built = True
        if not (kernel.is_inner_product or kernel.embeds_identically):
            expected = "a kernel that is an inner product or embeds nothing"
            raise _validate.invalid("kernel", kernel, expected)
        if self.training_plan.bounded == "features" and not kernel.is_inner_product:
            expected = "'pixels' for a kernel that is no inner product"
            raise _validate.invalid("bounded", self.training_plan.bounded, expected)
        self._check_memory()
        self._releases: RecordSums | None = None
        self._own_fit = 0
        self._delta = 0.0

    def call(self, embedded: tf.Tensor) -> tf.Tensor:
        """Predicts embedded records `[batch, features]`, float32 `[batch, classes]`."""
        support = self.kernel.embed(self.support.value)
        return self.kernel.between(embedded, support) @ self._coefficients(support)

    def fit(  # type: ignore[override]
        self,
        x: np.ndarray,
        y: np.ndarray,
        *,
        target_epsilon: float,
        delta: float,
        embedded: np.ndarray | None = None,
        verbose: int = 1,
    ) -> DPKIP:
        """Learns the support images and spends the whole budget.

        Args:
            x: private records, float `[records, ...]`.
            y: their labels, int `[records]`.
            target_epsilon: the epsilon per record that is not passed.
            delta: strictly between 0 and 1.
            embedded: the embeddings of `x`, if they are there already.
            verbose: 1 shows a bar with the epsilon so far, 0 nothing.

        Returns:
            The model.

        Raises:
            ValueError: an argument is out of range.
            RuntimeError: the model was fitted before.
        """
        if self._releases is not None:
            raise RuntimeError(
                "This model was fitted before, and a second fit would spend a second "
                "budget on the same records. Make a new model."
            )
        self._check_weights()
        plan = self.training_plan
        labels = check_labels(y, len(x), self.num_classes)
        if np.shape(x)[1:] != self.support.shape[1:]:
            expected = f"records of shape {self.support.shape[1:]}, as the support has"
            raise _validate.invalid("x", np.shape(x), expected)
        if embedded is None:
            embedded = embed_in_batches(self.kernel, x, verbose=verbose)
        if np.shape(embedded) != (len(x), self._width):
            shape = len(x), self._width
            expected = f"None or the kernel's embeddings, of shape {shape}"
            raise _validate.invalid("embedded", np.shape(embedded), expected)
        self._refuse_records(x, embedded)
        multiplier = noise_multiplier_for(
            target_epsilon,
            delta,
            lambda noise: _all_steps(plan, noise),
            RELATION,
            plan.accountant,
        )
        self._delta = delta
        self._releases = RecordSums(
            mechanism="DPKIP",
            l2_norm=plan.l2_norm,
            noise_multiplier=multiplier,
            sampling_probability=plan.sampling_probability,
            seed=self.seed,
        )
        self._own_fit = secrets.randbelow(_LARGEST_FIT) + 1
        self.fitted_by.assign(self._own_fit)
        self.optimizer = keras.optimizers.Adam(plan.learning_rate)
        self.optimizer.build([self.support])
        start = self.support.numpy()
        try:
            spent = functools.partial(
                self._releases.epsilon, delta=delta, accountant=plan.accountant
            )
            for _ in counted(plan.steps, verbose=verbose, epsilon=spent):
                self.train_step((embedded, labels))
        finally:
            support = self.support.numpy()
            if not np.array_equal(support, start):
                remember_released(support)
        return self

    def train_step(self, data: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        """One private step.

        Args:
            data: embedded records `[records, features]` and labels `[records]`, all
                of them; the sample is drawn here.

        Returns:
            Nothing that was measured on private records.

        Raises:
            RuntimeError: the model was not fitted, or all steps of its plan are done.

        **Privacy**: one release, which `fit` has paid for. A further one would pass the
        target and is refused before it begins.
        """
        if self._releases is None:
            raise RuntimeError("The noise is not calibrated. Call `fit`.")
        self._check_weights()
        done, planned = self.ledger.releases(Unit.RECORD), self.training_plan.steps
        if done >= planned:
            raise RuntimeError(
                f"The budget is spent: all {planned} steps of the plan are done, and "
                "one more would pass the target epsilon. Make a new model."
            )
        embedded, labels = data
        self._releases.begin()
        chosen = self._releases.sample(len(embedded)).numpy()
        total = self.clipped_gradient_sum(embedded[chosen], labels[chosen])
        expected = self._releases.sampling_probability * len(embedded)
        gradient = self._to_pixels(self._releases.add_noise(total) / expected)
        self.optimizer.apply_gradients([(gradient, self.support)])
        return {}

    def clipped_gradient_sum(
        self, embedded: np.ndarray, labels: np.ndarray
    ) -> tf.Tensor:
        """Sum of the clipped gradients of embedded records.

        Args:
            embedded: float32 `[n, features]`, perhaps none.
            labels: int `[n]`.

        Returns:
            float32 `[support, pixels]`, or `[support, features]` where the features'
            gradient is bounded.

        **Privacy**: moves by at most `l2_norm` if one record is left out; a record
        with a feature that is not finite, or above 1e6 in size, counts as zero, and
        so does one whose gradient is not finite.
        """
        plan, support = self.training_plan, self.kernel.embed(self.support.value)
        # Left in, a NaN would spread to the records that are differentiated with it.
        usable = np.all(np.abs(embedded) <= _LARGEST_FEATURE, axis=1)
        embedded, labels = embedded[usable], labels[usable]
        by_features = plan.bounded == "features"
        width = support.shape[1] if by_features else math.prod(self.support.shape[1:])
        total = tf.zeros([support.shape[0], width])
        if not len(embedded):
            return total
        jacobians = []
        if not by_features and self.kernel.is_inner_product:
            jacobians = [self.kernel.jacobian(image) for image in self.support.value]
        targets = centred_one_hot(labels, self.num_classes)
        for start in range(0, len(embedded), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            pairs = tf.constant(embedded[chunk]), tf.constant(targets[chunk])
            if by_features or jacobians:
                total += self._closed_form(support, jacobians, *pairs)
            else:
                gradients = self._gradients(support, *pairs)
                total += _sum_clipped(gradients, plan.l2_norm)
        return total

    def distilled(self) -> DistilledDataset:
        """The support images with their guarantee."""
        return DistilledDataset(
            images=self.support.numpy(),
            labels=self.labels,
            num_classes=self.num_classes,
            statement=self.privacy_statement(),
        )

    @property
    def ledger(self) -> Ledger:
        """What was released."""
        return Ledger() if self._releases is None else self._releases.ledger

    def privacy_statement(self) -> PrivacyStatement:
        """The guarantee of the support images.

        Raises:
            RuntimeError: the model was not fitted, or its weights are those of another.
        """
        if self._releases is None:
            raise RuntimeError("Nothing was released yet. Call `fit` first.")
        self._check_weights()
        return self._releases.statement(
            delta=self._delta,
            accountant=self.training_plan.accountant,
            covered=("distilled data set",),
            planned_steps=self.training_plan.steps,
        )

    def _check_weights(self) -> None:
        """Refuses a support that another model's fit has moved.

        Raises:
            RuntimeError: it was loaded or set, without the ledger that belongs to it.
        """
        if int(self.fitted_by.numpy()) != self._own_fit:
            raise RuntimeError(
                "These support images are another model's, and this one's ledger does "
                "not know what was released for them. Make a new model, or take the "
                "statement of the model that was fitted."
            )

    def _refuse_records(self, records: np.ndarray, embedded: np.ndarray) -> None:
        """Refuses a support that holds private records, by pixels and by embeddings.

        Raises:
            ValueError: a support image is a record.
        """
        support = self.support.numpy()
        pairs = (support, records), (embed_in_batches(self.kernel, support), embedded)
        if any(holds_record(*pair) for pair in pairs):
            expected = "noise or public images"
            mend = "It holds private records, which would be released as they are."
            raise _validate.invalid("initial", "(withheld: private)", expected, mend)

    def _coefficients(self, support: tf.Tensor) -> tf.Tensor:
        targets = tf.constant(centred_one_hot(self.labels, self.num_classes))
        gram = self.kernel.between(support, support)
        return ridge_solve(gram, targets, self.training_plan.penalty)

    @tf.function(reduce_retracing=True)
    def _closed_form(
        self,
        support: tf.Tensor,
        jacobians: list[EmbeddingJacobian],
        embedded: tf.Tensor,
        targets: tf.Tensor,
    ) -> tf.Tensor:
        """Clipped sum for a kernel that is an inner product."""
        support_targets = tf.constant(centred_one_hot(self.labels, self.num_classes))
        plan = self.training_plan
        bounds = {"penalty": plan.penalty, "l2_norm": plan.l2_norm}
        if not jacobians:
            return feature_gradient_sum(
                support, embedded, support_targets, targets, **bounds
            )
        return pixel_gradient_sum(
            support, jacobians, embedded, support_targets, targets, **bounds
        )

    @tf.function(reduce_retracing=True)
    def _gradients(
        self, support: tf.Tensor, embedded: tf.Tensor, targets: tf.Tensor
    ) -> tf.Tensor:
        """Each record's gradient with respect to the embedded support.

        The loss is half the mean square over the classes. Each record is differentiated
        by itself: a kernel may overflow for one, and a Jacobian of all losses would
        multiply that by zero in the rows of the others, which is NaN.

        Returns:
            float32 `[records, support, features]`.
        """

        def alone(record: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
            features, target = record
            with tf.GradientTape() as tape:
                tape.watch(support)
                gram = self.kernel.between(features[None], support)
                residuals = gram @ self._coefficients(support) - target
                loss = 0.5 * tf.reduce_mean(residuals**2)
            return tape.gradient(loss, support)

        made = tf.TensorSpec(support.shape, support.dtype)
        return tf.map_fn(alone, (embedded, targets), fn_output_signature=made)

    def _to_pixels(self, noisy: tf.Tensor) -> tf.Tensor:
        """Carries a released gradient back to the pixels, of the support's shape."""
        support = self.support.value
        if self.training_plan.bounded == "pixels":
            return tf.reshape(noisy, support.shape)
        with tf.GradientTape() as tape:
            tape.watch(support)
            product = tf.reduce_sum(self.kernel.embed(support) * noisy)
        return tape.gradient(product, support)

    @property
    def _width(self) -> int:
        """Length of an embedding."""
        return int(self.kernel.embed(self.support.value[:1]).shape[1])

    def _check_memory(self) -> None:
        """Refuses a support whose gradients would not fit, naming the size that fits.

        Raises:
            ValueError: it would take more than 4 GiB.
        """
        count, pixels = self.support.shape[0], math.prod(self.support.shape[1:])
        width = self._width
        per_image = _CHUNK * (width + pixels)
        if self.training_plan.bounded == "features":
            per_image = KEPT_PER_PIXEL * pixels + width
        elif not self.kernel.embeds_identically:
            per_image += width * pixels
        largest = LARGEST // per_image
        if count > largest:
            expected = f"at most {largest} support images in all, which take 4 GiB"
            mend = "Ask for fewer images per class, bound features, or use `distill`."
            raise _validate.invalid("initial", self.support.shape, expected, mend)


def _all_steps(plan: KIPTraining, multiplier: float) -> dp_accounting.DpEvent:
    step = sum_event(multiplier, plan.sampling_probability)
    return dp_accounting.SelfComposedDpEvent(step, plan.steps)


def _sum_clipped(gradients: tf.Tensor, l2_norm: float) -> tf.Tensor:
    """Clips each record's gradient `[records, support, pixels]` and adds them up.

    A gradient whose norm is not finite counts as zero.
    """
    squares = tf.reduce_sum(tf.square(gradients), axis=[1, 2])
    usable = zero_rows(tf.math.is_finite(squares), gradients)
    return tf.tensordot(Bound(l2_norm).factors(squares), usable, 1)
