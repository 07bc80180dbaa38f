"""What Keras finds wrong only when an epoch has been paid for, tried before.

`fit` looks at its validation data and at most callbacks when the first epoch is over.
Here they are tried on the student as it is.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.teachers import Teacher

if TYPE_CHECKING:
    from dp_transcribe.transcriber.model import DPTranscriber

# Images of which pixels are compared together.
_ROWS = 1000
_LABELS = (
    "Labels are whole numbers [rows] with the default loss; one-hot rows need "
    "`compile(loss=keras.losses.CategoricalCrossentropy(from_logits=True))`."
)


# What Keras' `fit` takes and a transcriber's makes itself.
_DATA = {
    "x",
    "y",
    "batch_size",
    "class_weight",
    "sample_weight",
    "shuffle",
    "validation_split",
}


def check_no_data(by_place: tuple[Any, ...], by_name: dict[str, Any]) -> None:
    """Refuses data, and what else `fit` does not take.

    Args:
        by_place: positional arguments.
        by_name: further named arguments.

    Raises:
        ValueError: there are data, or arguments that go with them.
        TypeError: there is an argument that `fit` does not know.
    """
    if unknown := sorted(by_name.keys() - _DATA):
        raise TypeError(f"`fit` got an unexpected keyword argument `{unknown[0]}`.")
    named = {**dict(zip(("x", "y"), by_place, strict=False)), **by_name}
    if given := dict(sorted(named.items())):
        found = " and ".join(type(value).__name__ for value in given.values())
        mend = "Write the names of its arguments: `fit(epochs=10, target_epsilon=1.0)`."
        expected = "none: `fit` makes its own queries"
        raise _validate.invalid(", ".join(given), found, expected, mend)


def rehearse(
    owner: DPTranscriber,
    *,
    callbacks: Any,
    data: Any,
    batch_size: int | None,
    steps: int | None,
    frequency: Any,
) -> dict[str, Any]:
    """Tries validation and checks callbacks, before anything is spent.

    Args:
        owner: the compiled transcriber.
        callbacks: as `fit` takes them.
        data: see `fit`, as all of the following.
        batch_size: rows of a batch of arrays.
        steps: batches to validate on.
        frequency: epochs to validate after.

    Returns:
        The arguments of Keras' `fit` for validation.

    Raises:
        ValueError: one of them would have failed after an epoch, or done nothing.
    """
    arguments = {
        "validation_data": data,
        "validation_batch_size": batch_size,
        "validation_steps": steps,
        "validation_freq": _as_frequency(frequency),
    }
    measured = _try_validation(owner, data, batch_size=batch_size, steps=steps)
    _check_callbacks(owner, callbacks, measured | owner.reported)
    return arguments


def _try_validation(
    owner: DPTranscriber, data: Any, *, batch_size: int | None, steps: int | None
) -> set[str]:
    """Measures validation data as `fit` will: of arrays one batch, of others all.

    Args:
        owner: the compiled transcriber.
        data: None, or `(images, labels)`, the same with weights, or a
            `tf.data.Dataset` or `keras.utils.PyDataset` of batches of that.
        batch_size: rows of a batch of arrays, or None for Keras' default.
        steps: batches that `fit` will measure, or None for all.

    Returns:
        The names under which `fit` will report what was measured; none without data.

    Raises:
        ValueError: an argument is out of range or the data cannot be measured.
    """
    for name, value in (
        ("validation_batch_size", batch_size),
        ("validation_steps", steps),
    ):
        if value is not None:
            _validate.positive_int(name, value)
    if data is None:
        return set()
    _check_shapes(data, owner.teacher, steps)
    _check_pixels(_some_images(data), owner.teacher.input_range)
    measured = _Batches()
    images, labels, weights = keras.utils.unpack_x_y_sample_weight(data)
    try:
        results = owner.evaluate(
            x=images,
            y=labels,
            sample_weight=weights,
            batch_size=batch_size,
            steps=1 if isinstance(data, (tuple, list)) else steps,
            callbacks=[measured],
            verbose=0,
            return_dict=True,
        )
    except Exception as error:  # whatever Keras, a loss or a metric raises
        found = f"{_described(data)}, on which `evaluate` fails: {_first_line(error)}"
        raise _refused(found) from error
    if not measured.count or np.isnan(results["loss"]):
        raise _refused(f"{_described(data)}, {measured.count} batches, {results}")
    return {f"val_{name}" for name in results}


def _as_frequency(value: Any) -> int | list[int]:
    """The epochs after which Keras validates, in the types that it takes."""
    if isinstance(value, (list, tuple, set, range)):
        return [_validate.positive_int("validation_freq", epoch) for epoch in value]
    return _validate.positive_int("validation_freq", value)


def build_measures(owner: DPTranscriber) -> None:
    """Builds loss and metrics for labels as the loss takes them: numbers first."""
    classes = owner.teacher.num_classes
    # One row more than classes: no label passes for a row of logits.
    logits = tf.zeros([classes + 1, classes])
    numbers = tf.zeros([classes + 1], tf.int32)
    forms = [numbers, tf.one_hot(numbers, classes)]
    done = _first_form(forms, lambda y: owner.compute_loss(y=y, y_pred=logits))
    forms.sort(key=lambda labels: labels is not done)
    _first_form(forms, lambda y: owner.compute_metrics(None, y, logits))


def _first_form(forms: list[tf.Tensor], call: Callable[[tf.Tensor], Any]) -> tf.Tensor:
    """Calls with the first form of labels and, where it does not do, with the last."""
    try:
        call(forms[0])
    except (ValueError, TypeError, tf.errors.InvalidArgumentError):
        call(forms[-1])
        return forms[-1]
    return forms[0]


def _check_callbacks(owner: DPTranscriber, callbacks: Any, reported: set[str]) -> None:
    """Refuses callbacks that would fail when an epoch has been paid for, or do nothing.

    Args:
        owner: the transcriber they are for, with its metrics built.
        callbacks: as `fit` takes them.
        reported: the names that `fit` will report after an epoch.

    Raises:
        ValueError: one of them watches what is not reported, or would write where
            nothing can be written, or needs another optimizer.
    """
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    known = True
    for callback in keras.tree.flatten(callbacks):
        if callback is None:
            continue
        mend = "Pass an object, not its class."
        _validate.instance_of("callbacks", callback, keras.callbacks.Callback, mend)
        if isinstance(callback, _WATCHERS):
            _check_watched(owner, callback, reported if known else None)
        if isinstance(callback, keras.callbacks.ModelCheckpoint):
            _check_checkpoint(owner, callback, reported if known else None)
        _check_written(callback, validates=bool(reported - owner.reported))
        _check_optimizer_of(owner.optimizer, callback)
        # One of the user's own may report more to those that come after it.
        known = known and _is_of_keras(callback)


class _Batches(keras.callbacks.Callback):
    """Counts the batches that were measured."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        """One more."""
        del batch, logs
        self.count += 1


def _check_shapes(data: Any, teacher: Teacher, steps: int | None) -> None:
    """Refuses data that are no rows of images and labels, as far as shapes tell."""
    if isinstance(data, Iterator):
        mend = "The trial would take its first batch."
        raise _refused("an iterator, which gives its batches once", mend)
    batches = isinstance(data, tf.data.Dataset)
    parts = data.element_spec if batches else data
    if not isinstance(parts, (tuple, list)):
        return
    shapes = _shapes(parts)
    wanted = (None, *teacher.input_shape)
    fits = len(parts) in (2, 3) and shapes[0].is_compatible_with(wanted)
    if not fits or any(
        not shape[:1].is_compatible_with(shapes[0][:1]) for shape in shapes[1:]
    ):
        expected = f"(images, labels), as many of each, with images of shape {wanted}"
        raise _validate.invalid("validation_data", _described(data), expected)
    count = len(parts[1]) if not batches else int(data.cardinality())
    if count == 0:
        raise _refused(f"{_described(data)}, no rows")
    if count == tf.data.INFINITE_CARDINALITY and steps is None:
        raise _refused("a dataset without end", "Pass `validation_steps`, too.")
    if not batches:
        _check_labels(np.asarray(parts[1]), teacher.num_classes)


def _some_images(data: Any) -> Any:
    """All images of arrays, the first batch's of anything else."""
    try:
        if isinstance(data, tf.data.Dataset):
            data = next(iter(data))
        elif isinstance(data, keras.utils.PyDataset):
            data = data[0]
        images = keras.utils.unpack_x_y_sample_weight(data)[0]
        return images if hasattr(images, "shape") else ()
    except Exception:  # whatever a data set of the user's raises, `evaluate` meets too
        return ()


def _check_pixels(images: Any, bounds: tuple[float, float]) -> None:
    """Refuses images of other pixels than the student learns from.

    Of 0 to 255 where the teacher takes 0 to 1, a student measures little better than
    chance and nothing says why. What is no number is passed over.
    """
    low, high = bounds
    slack = 1e-3 * (high - low)
    for start in range(0, len(images), _ROWS):
        pixels = np.asarray(images[start : start + _ROWS])
        if pixels.dtype.kind not in "buif":
            return
        if np.any(pixels < low - slack) or np.any(pixels > high + slack):
            expected = f"images with pixels from {low:g} to {high:g}, as the teacher's"
            found = f"pixels from {np.nanmin(pixels):g} to {np.nanmax(pixels):g}"
            mend = (
                "Scale them, or state the range it takes: `Teacher(input_range=...)`."
            )
            raise _validate.invalid("validation_data", found, expected, mend)


def _check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Refuses labels `[rows]` or `[rows, 1]` that number no class."""
    numbers = labels.dtype.kind in "iuf" and labels.size == len(labels)
    if not numbers or np.isin(labels, np.arange(num_classes)).all():
        return
    expected = f"whole labels 0..{num_classes - 1}"
    found = f"labels {labels.min()}..{labels.max()} of type {labels.dtype}"
    raise _validate.invalid("validation_data", found, expected)


def _shapes(parts: Any) -> list[tf.TensorShape]:
    return [
        part.shape if isinstance(part, tf.TypeSpec) else tf.TensorShape(np.shape(part))
        for part in parts
    ]


def _described(data: Any) -> str:
    """The shapes of data, or their kind."""
    parts = data.element_spec if isinstance(data, tf.data.Dataset) else data
    if isinstance(parts, (tuple, list)):
        return f"shapes {[str(shape) for shape in _shapes(parts)]}"
    return type(data).__name__


def _refused(found: str, mend: str = _LABELS) -> ValueError:
    expected = (
        "(images, labels), or a `tf.data.Dataset` or `keras.utils.PyDataset` of "
        "batches of them, that `evaluate` can measure"
    )
    return _validate.invalid("validation_data", found, expected, mend)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


# What looks at a reported number by its name.
_WATCHERS = (
    keras.callbacks.EarlyStopping,
    keras.callbacks.ReduceLROnPlateau,
    keras.callbacks.ModelCheckpoint,
)


def _is_of_keras(callback: keras.callbacks.Callback) -> bool:
    """Whether it is known to report nothing more."""
    of_keras = type(callback).__module__.partition(".")[0] == "keras"
    return of_keras and not isinstance(callback, keras.callbacks.LambdaCallback)


def _check_watched(
    owner: DPTranscriber, callback: Any, reported: set[str] | None
) -> None:
    """Refuses a watcher of what is not reported, or with no direction.

    A `ModelCheckpoint` that keeps every epoch watches nothing, but wants a direction.
    """
    keeps_all = not getattr(callback, "save_best_only", True)
    if reported is not None and callback.monitor not in reported and not keeps_all:
        mend = "Names with `val_` need `validation_data`."
        expected = f"one of {', '.join(sorted(reported))}"
        raise _validate.invalid("monitor", callback.monitor, expected, mend)
    trial = copy.copy(callback)
    trial.set_model(owner)
    try:
        # Keras asks for it at the end of the first epoch.
        trial._set_monitor_op()
    except ValueError as error:
        expected = f"'min' or 'max' with monitor={callback.monitor!r}"
        raise _validate.invalid("mode", callback.mode, expected) from error


def _check_checkpoint(
    owner: DPTranscriber, callback: Any, reported: set[str] | None
) -> None:
    """Refuses a path at which nothing could be saved, or what cannot be saved whole."""
    path = callback.filepath
    if not callback.save_weights_only:
        check_checkpoint_path("filepath", path)
        owner.get_config()
    if reported is not None:
        try:
            path.format(epoch=1, batch=1, **dict.fromkeys(reported, 0.0))
        except (LookupError, ValueError) as error:
            names = ", ".join(sorted({"epoch", *reported}))
            expected = f"a path in which names in braces are among {names}"
            raise _validate.invalid("filepath", path, expected) from error
    if not _is_local(path):
        return
    # What follows in braces is known only later.
    fixed, braces, _ = path.partition("{")
    if braces:
        _validate.writable_dir("filepath", Path(f"{fixed}_").parent)
    else:
        _validate.writable_file("filepath", path)


def _check_written(callback: keras.callbacks.Callback, *, validates: bool) -> None:
    """Refuses logs and backups where nothing can be written."""
    if isinstance(callback, keras.callbacks.BackupAndRestore):
        _validate.writable_dir("backup_dir", callback.backup_dir)
    if isinstance(callback, keras.callbacks.CSVLogger) and _is_local(callback.filename):
        _validate.writable_file("filename", callback.filename)
    if isinstance(callback, keras.callbacks.TensorBoard):
        _check_board(callback.log_dir, validates=validates)


def _check_board(log_dir: str, *, validates: bool) -> None:
    """Refuses a `TensorBoard` that cannot write, or whose package is not there."""
    if not _is_installed("tensorboard"):
        mend = "Install it with `pip install tensorboard`, or take a `CSVLogger`."
        expected = "callbacks whose packages are installed"
        raise _validate.invalid("callbacks", "TensorBoard", expected, mend)
    if _is_local(log_dir):
        for part in ("train", "validation")[: 1 + validates]:
            _validate.writable_dir("log_dir", Path(log_dir) / part)


def _is_installed(package: str) -> bool:
    """Whether a package that Keras imports only when it writes is there."""
    return importlib.util.find_spec(package) is not None


def _is_local(path: str) -> bool:
    """Whether a path is one of this machine's file system, not of a remote store."""
    return "://" not in path


def check_checkpoint_path(name: str, path: str) -> None:
    """Refuses formats that hold neither ledger nor noise key."""
    if not path.endswith(".keras"):
        mend = "Other formats hold neither ledger nor noise key."
        raise _validate.invalid(name, path, "a path that ends in .keras", mend)


def _check_optimizer_of(
    optimizer: keras.optimizers.Optimizer, callback: keras.callbacks.Callback
) -> None:
    """Refuses callbacks that need another optimizer than there is."""
    name = type(callback).__name__
    scheduled = isinstance(optimizer.get_config().get("learning_rate"), dict)
    if isinstance(callback, keras.callbacks.ReduceLROnPlateau) and scheduled:
        mend = "Its learning rate follows a schedule, which nothing else can change."
        expected = "an optimizer whose learning rate is a number"
        raise _validate.invalid("callbacks", name, expected, mend)
    if isinstance(callback, keras.callbacks.SwapEMAWeights) and not optimizer.use_ema:
        raise _validate.invalid("callbacks", name, "an optimizer with `use_ema=True`")
