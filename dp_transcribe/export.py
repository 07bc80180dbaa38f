"""Students, and generators that are covered, as SavedModels beside their statement.

What is written is the released model and nothing else: its weights, one inference
function and the privacy statement. Nothing of the teacher, of an optimizer or of the
ledger is inside, so the folder can be copied to wherever the model is served.
"""

import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import keras
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.privacy.statement import PrivacyStatement

_logger = logging.getLogger(__name__)

SIGNATURE = "serving_default"
# TensorFlow Serving leaves this folder of a SavedModel alone.
EXTRA_ASSETS = "assets.extra"
_BESIDE = (
    "\n----\n\nBeside it, a guarantee of another unit. Each holds by itself; their "
    "epsilons\nare never added.\n\n"
)


class GeneratorNotPrivateError(ValueError):
    """The statement does not cover the generator, so it must not be released."""


def export_student(
    transcriber_or_student: Any,
    path: str | os.PathLike[str],
    *,
    statement: PrivacyStatement | Sequence[PrivacyStatement] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a student as a SavedModel that TensorFlow Serving loads.

    The signature `serving_default` takes `image`, float32 `[batch, height, width,
    channels]` in the student's input range with any batch size, and returns `logits`
    and `probabilities`, float32 `[batch, classes]`, and `class`, int64 `[batch]`. The
    statement lies in `assets.extra/` as `statement.txt` and `statement.json`; where
    there are two, of two units, the text has both and the second one's file is
    `statement.record.json`.

    The folder appears whole or not at all: it is written beside `path` and renamed.

    Args:
        transcriber_or_student: A `DPTranscriber`, or a Keras model that maps images to
            logits `[batch, classes]`.
        path: The folder to write, for TensorFlow Serving `<model name>/<version>`.
        statement: The privacy statement to put beside the student, or several of
            different units. Needed for a bare student; a transcriber brings its own
            (`privacy_statements`).
        overwrite: Whether an exported model at `path` may be replaced.

    Returns:
        The folder written.

    Raises:
        ValueError: If there is no statement, the student does not map images to
            logits, or `path` cannot be written or holds something already.

    **Privacy**: reads the student's weights and the statement. Both are covered by the
    statement's guarantee; nothing else that the transcriber holds is read.
    """
    student = getattr(transcriber_or_student, "student", transcriber_or_student)
    _check_student(student)
    statements = _statements_of(transcriber_or_student, statement)
    signature = tf.TensorSpec((None, *student.input_shape[1:]), tf.float32, "image")

    def serve(image: tf.Tensor) -> dict[str, tf.Tensor]:
        logits = tf.cast(student(image, training=False), tf.float32)
        return {
            "logits": logits,
            "probabilities": tf.nn.softmax(logits),
            "class": tf.argmax(logits, axis=-1, output_type=tf.int64),
        }

    return _export(student, serve, [signature], path, statements, overwrite)


def export_generator(
    transcriber: Any,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Path:
    """Writes a trainable generator as a SavedModel, if the statement covers it.

    The signature `serving_default` takes `latent`, float32 `[batch, latent_dim]`, and
    for a conditional generator `label`, int64 `[batch]`. It returns `image`, float32
    `[batch, height, width, channels]` in the generator's output range.

    Args:
        transcriber: A `DPTranscriber`.
        path: The folder to write.
        overwrite: Whether an exported model at `path` may be replaced.

    Returns:
        The folder written.

    Raises:
        GeneratorNotPrivateError: If the teacher guided the generator.
        ValueError: If the generator has no weights, or `path` cannot be written or
            holds something already.

    **Privacy**: a generator guided by the student alone is post-processing and as
    private as the student. One guided by the teacher (its gradients or its batch-norm
    statistics) carries what it read there, and is refused.
    """
    generator = transcriber.generator
    if not transcriber.generator_covered:
        raise GeneratorNotPrivateError(
            "Invalid value for argument `transcriber`. Expected a generator that the "
            "privacy statement covers. Received: a generator guided by the teacher "
            "itself, with no mechanism in between. Release the student alone with "
            "`export_student`, or let the student guide the generator."
        )
    if not getattr(generator, "latent_dim", None):
        mend = "A random process has no weights: release its `get_config()` instead."
        expected = "a transcriber with a generator that maps latents to images"
        raise _validate.invalid("transcriber", generator, expected, mend)
    signature = [tf.TensorSpec((None, generator.latent_dim), tf.float32, "latent")]
    if getattr(generator, "num_classes", None):
        signature.append(tf.TensorSpec((None,), tf.int64, "label"))

    def serve(*inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"image": tf.cast(generator(*inputs), tf.float32)}

    statements = transcriber.privacy_statements()
    return _export(generator, serve, signature, path, statements, overwrite)


def _export(
    model: keras.Model,
    serve: Callable[..., dict[str, tf.Tensor]],
    signature: list[tf.TensorSpec],
    path: str | os.PathLike[str],
    statements: tuple[PrivacyStatement, ...],
    overwrite: bool,
) -> Path:
    """Writes weights, inference function and statements, whole or not at all."""
    module = tf.Module()
    # Only what inference reads: no seeds, metrics or optimizer hang on `weights`.
    module.parameters = [weight.value for weight in model.weights]
    function = tf.function(serve, input_signature=signature, autograph=False)
    target = Path(path).absolute()
    with _replacing(target, overwrite) as folder:
        tf.saved_model.save(
            module,
            os.fspath(folder),
            signatures={SIGNATURE: function},
            options=tf.saved_model.SaveOptions(experimental_custom_gradients=False),
        )
        extra = folder / EXTRA_ASSETS
        extra.mkdir()
        text = statements_text(statements)
        (extra / "statement.txt").write_text(text, encoding="utf-8")
        first, *others = statements
        (extra / "statement.json").write_text(first.to_json(), encoding="utf-8")
        for other in others:
            name = f"statement.{other.unit.value.lower()}.json"
            (extra / name).write_text(other.to_json(), encoding="utf-8")
    if not all(statement.is_private for statement in statements):
        _logger.warning("%s has no privacy guarantee: its epsilon is infinite.", target)
    return target


def _check_student(student: Any) -> None:
    """Refuses what does not map one image to logits."""
    name = "transcriber_or_student"
    images, logits = (getattr(student, f"{s}_shape", None) for s in ("input", "output"))
    if not (_is_shape(images) and _is_shape(logits) and len(logits) == 2):
        expected = (
            "a DPTranscriber or a built Functional or Sequential model that maps "
            "images [batch, height, width, channels] to logits [batch, classes]"
        )
        raise _validate.invalid(name, student, expected)
    last = student.layers[-1]
    softmax = keras.activations.softmax
    if isinstance(last, keras.layers.Softmax) or _activation(last) is softmax:
        mend = f"Leave the softmax of its last layer `{last.name}` out."
        raise _validate.invalid(name, student, "a model that ends in logits", mend)


def _is_shape(shape: Any) -> TypeGuard[tuple[int | None, ...]]:
    """Whether `shape` is the shape of one tensor, not several shapes in a nest."""
    return isinstance(shape, tuple) and not any(
        isinstance(size, tuple) for size in shape
    )


def _activation(layer: keras.layers.Layer) -> Any:
    """The layer's activation function, or None."""
    return getattr(layer, "activation", None)


def statements_text(statements: Sequence[PrivacyStatement]) -> str:
    """Statements of several units as one text, in which each stands by itself."""
    return _BESIDE.join(statement.to_text() for statement in statements)


def _statements_of(
    source: Any, statement: PrivacyStatement | Sequence[PrivacyStatement] | None
) -> tuple[PrivacyStatement, ...]:
    """The statements given, or the transcriber's own."""
    if statement is None and hasattr(source, "privacy_statements"):
        return source.privacy_statements()
    mend = "Pass the transcriber, or `statement=transcriber.privacy_statements()`."
    given = tuple(statement) if isinstance(statement, list | tuple) else (statement,)
    for each in given or (None,):
        _validate.instance_of("statement", each, PrivacyStatement, mend)
    units = [each.unit for each in given]
    if len(set(units)) < len(units):
        expected = "one statement for each unit"
        raise _validate.invalid("statement", [unit.value for unit in units], expected)
    return given


@contextmanager
def _replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a folder beside `path` that takes its place when the block succeeds."""
    check_target(path, overwrite=overwrite)
    _validate.writable_dir("path", path.parent)
    # The names are no integers, so TensorFlow Serving never takes one for a version.
    stem = f".{path.name}.{secrets.token_hex(4)}"
    draft, former = path.with_name(f"{stem}.new"), path.with_name(f"{stem}.old")
    draft.mkdir()
    try:
        yield draft
        _swap(draft, path, former)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _swap(draft: Path, path: Path, former: Path) -> None:
    """Puts `draft` at `path`; what was there is removed last, or put back."""
    if not path.exists():
        draft.rename(path)
        return
    path.rename(former)
    try:
        draft.rename(path)
    except OSError:
        former.rename(path)
        raise
    shutil.rmtree(former)


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuses to replace anything but an empty folder or, if asked to, an export.

    Args:
        path: where an export is to go.
        overwrite: whether a former one may be replaced.

    Raises:
        ValueError: something else is there, or may not be written.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    expected = "a new or empty folder"
    if not (path / "saved_model.pb").is_file():
        mend = "What lies there is no SavedModel and is never overwritten."
        raise _validate.invalid("path", str(path), expected, mend)
    if not overwrite:
        mend = "Choose the next version number, or pass `overwrite=True`."
        raise _validate.invalid("path", str(path), expected, mend)
