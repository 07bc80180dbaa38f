"""The teacher: any classifier, asked in inference mode and never changed."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe._files import digest_of
from dp_transcribe._validate import invalid, one_of
from dp_transcribe.privacy.inheritance import check_inheritable, read_statement
from dp_transcribe.privacy.statement import (
    PrivacyStatement,
    split_digest,
    with_digest,
)

Outputs = Literal["logits", "probabilities"]
_PROBE_IMAGES = 32
# Variables that a budget was spent on, by their ids.
_SPENT_ON: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
# Which file a statement beside a teacher belongs to.
_DIGEST = "model_sha256"


class Teacher:
    """A pretrained classifier as the transcriber sees it.

    Wraps a Keras model, a SavedModel or any function of a batch of images. The
    wrapped model is called with `training=False` and never modified; it is not a
    Keras layer, so its variables join nobody's trainable variables, checkpoint or
    export.

    **Privacy**: everything a teacher returns depends on its private training data.
    What leaves the process must go through a mechanism. A teacher with a `statement`
    was itself trained privately; `Inherited` hands its answers on as they are.

    Args:
        model: A Keras model, the path of a `.keras` file or SavedModel, or a callable
            `images [batch, h, w, c] -> [batch, classes]` of TensorFlow operations
            (others in `tf.numpy_function`).
        outputs: `"logits"` or `"probabilities"`. By default found out on a batch of
            random images: rows in 0..1 that sum to 1 are probabilities.
        input_shape: Shape of one input, `(height, width, channels)`. Needed for a
            callable only; read from the model otherwise.
        input_range: Lowest and highest value of a valid input.
        statement: The privacy statement of a teacher that was trained privately, unit
            `RECORD`. That it is true of this teacher is the promise of the caller.

    Attributes:
        model: The Keras model, or `None` for a SavedModel or callable.
        num_classes: Number of classes.

    Raises:
        ValueError: if the shape or meaning of inputs or outputs cannot be told.
        FileNotFoundError: if `model` is a path where nothing is.
    """

    def __init__(
        self,
        model: keras.Model | str | os.PathLike[str] | Callable[[Any], Any],
        *,
        outputs: Outputs | None = None,
        input_shape: Sequence[int] | None = None,
        input_range: Sequence[float] = (0.0, 1.0),
        statement: PrivacyStatement | None = None,
    ) -> None:
        self.statement = None if statement is None else check_inheritable(statement)
        if isinstance(model, (str, os.PathLike)):
            model = _load(model)
        one_of("outputs", outputs, (None, "logits", "probabilities"))
        self.model = model if isinstance(model, keras.Model) else None
        if self.statement is not None and self.model is not None:
            note_spent_on(self.model)
        self.input_range = _check_input_range(input_range)
        self._forward, known_shape, known_outputs = _as_function(
            model, self.input_range
        )
        self.input_shape = _check_input_shape(input_shape, known_shape)
        probe = self._probe()
        self.num_classes = int(probe.shape[-1])
        self.outputs: Outputs = outputs or known_outputs or _detect_outputs(probe)
        self._predict = tf.function(
            self.probabilities,
            input_signature=[tf.TensorSpec((None, *self.input_shape), tf.float32)],
        )

    def logits(self, images: tf.Tensor) -> tf.Tensor:
        """Logits, or log-probabilities if the teacher gives probabilities.

        Differentiable with respect to `images`; only a teacher-guided generator may
        use that, and is then no longer covered by the student's guarantee.

        Args:
            images: `[batch, height, width, channels]` within `input_range`.

        Returns:
            float32 `[batch, classes]`.
        """
        raw = tf.cast(self._forward(images), tf.float32)
        # What went through `tf.numpy_function` has lost its shape.
        raw = tf.ensure_shape(raw, (None, self.num_classes))
        if self.outputs == "logits":
            return raw
        return tf.math.log(tf.clip_by_value(raw, 1e-12, 1.0))

    def probabilities(self, images: tf.Tensor) -> tf.Tensor:
        """The teacher's answers, without gradient.

        Args:
            images: `[batch, height, width, channels]` within `input_range`.

        Returns:
            float32 `[batch, classes]`, rows sum to 1.
        """
        return tf.stop_gradient(tf.nn.softmax(self.logits(images), axis=-1))

    def predict(self, images: np.ndarray, *, batch_size: int = 512) -> np.ndarray:
        """`probabilities` of many images, as NumPy `[n, classes]`."""
        images = np.asarray(images, np.float32)
        starts = range(0, len(images), batch_size)
        rows = [self._predict(images[i : i + batch_size]).numpy() for i in starts]
        return np.concatenate([np.zeros((0, self.num_classes), np.float32), *rows])

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Fraction of `images` whose most probable class is the label."""
        return float(np.mean(self.predict(images).argmax(axis=-1) == labels))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, without the weights.

        Raises:
            ValueError: the teacher is not a Keras model.
        """
        if self.model is None:
            mend = "Use `save_weights`, or wrap the teacher as a Keras model."
            raise invalid("teacher", self._forward, "a Keras model, to be saved", mend)
        return {
            "model": keras.saving.serialize_keras_object(self.model),
            "outputs": self.outputs,
            "input_shape": list(self.input_shape),
            "input_range": list(self.input_range),
            "statement": self.statement and self.statement.to_dict(),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Teacher:
        """The teacher that `get_config` described, with fresh weights."""
        config = dict(config)
        model = keras.saving.deserialize_keras_object(config.pop("model"))
        values = config.pop("statement", None)
        statement = None if values is None else PrivacyStatement.from_dict(values)
        return cls(model, statement=statement, **config)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a Keras teacher, and its statement beside it.

        Args:
            path: Ends in `.keras`. The statement of `teacher.keras` is
                `teacher.statement.json`; it names the SHA-256 of the file it is of.

        Raises:
            ValueError: the teacher is not a Keras model.
        """
        path = Path(path)
        if self.model is None or path.suffix != ".keras":
            expected = "a Keras teacher and a path that ends in .keras"
            raise invalid("path", (self._forward, str(path)), expected)
        beside = _beside(path)
        # In this order a crash leaves a teacher without a statement, never another's.
        beside.unlink(missing_ok=True)
        self.model.save(path)
        if self.statement is None:
            return
        digest = digest_of(path.read_bytes())
        statement = with_digest(self.statement, _DIGEST, digest)
        beside.write_text(statement.to_json() + "\n", encoding="utf-8")

    def read_variables(self) -> list[Any]:
        """Variables that the answers are computed from.

        Those of a function or SavedModel are found in its graph; none are if it works
        on arrays alone.
        """
        if self.model is not None:
            return list(self.model.variables)
        try:
            return list(self._predict.get_concrete_function().graph.variables)
        except Exception:  # `check_in_graph` says what is wrong, where it matters
            return []

    def get_weights(self) -> list[np.ndarray]:
        """The weights of a Keras teacher; none of any other."""
        return [] if self.model is None else self.model.get_weights()

    def set_weights(self, weights: list[np.ndarray]) -> None:
        """Puts back what `get_weights` gave."""
        if self.model is not None:
            self.model.set_weights(weights)

    def _probe(self) -> np.ndarray:
        """The raw answer to a few random images, checked to be class scores."""
        low, high = self.input_range
        shape = (_PROBE_IMAGES, *self.input_shape)
        images = tf.random.stateless_uniform(shape, (0, 0), low, high)
        answer = self._forward(images)
        if isinstance(answer, dict):
            mend = "Wrap it in a function that picks its class scores."
            expected = "a classifier returning one tensor [batch, classes]"
            raise invalid("model", f"a dict of {sorted(answer)}", expected, mend)
        try:
            answer = tf.convert_to_tensor(answer)
        except Exception as error:  # whatever somebody else's function raises
            expected = "a classifier returning one tensor [batch, classes]"
            mend = f"Wrap it in a function that picks its class scores ({error})."
            raise invalid("model", self.model, expected, mend) from error
        rows = answer.shape[0] if answer.shape.rank == 2 else None
        if rows != shape[0] or answer.shape[1] < 2:
            expected = "a classifier returning [batch, classes], two classes or more"
            mend = f"Given {shape[0]} images it returned shape {tuple(answer.shape)}."
            raise invalid("model", self.model, expected, mend)
        scores = answer.numpy().astype(np.float32)
        if not np.all(np.isfinite(scores)):
            mend = "State the range of pixels it was trained on in `input_range`."
            raise invalid("model", self.model, "finite class scores", mend)
        return scores

    def check_in_graph(self) -> None:
        """Refuses a function that works on arrays alone, which no graph can hold.

        Raises:
            ValueError: it is one.
        """
        if self.model is not None:
            return
        try:
            self._predict.get_concrete_function()
        except Exception as error:  # whatever somebody else's function raises
            expected = "a function of TensorFlow operations"
            mend = (
                "Put what is not of TensorFlow in `tf.numpy_function`, or compile with "
                f"`run_eagerly=True` ({error})."
            )
            raise invalid("teacher", self._forward, expected, mend) from error


def note_spent_on(model: keras.Model) -> None:
    """Remembers that private records have moved a model, and that it was paid for."""
    _SPENT_ON.update({id(variable): variable for variable in model.variables})


def was_spent_on(model: keras.Model) -> bool:
    """Whether a variable of a model was in one that `note_spent_on` knows of."""
    return any(id(variable) in _SPENT_ON for variable in model.variables)


def as_teacher(teacher: Teacher | Any) -> Teacher:
    """The teacher, or one made of what `Teacher` takes."""
    return teacher if isinstance(teacher, Teacher) else Teacher(teacher)


def load_teacher(
    path: str | os.PathLike[str],
    *,
    outputs: Outputs | None = None,
    input_shape: Sequence[int] | None = None,
    input_range: Sequence[float] = (0.0, 1.0),
    statement: PrivacyStatement | str | os.PathLike[str] | None = None,
) -> Teacher:
    """Loads a teacher from a `.keras` (or `.h5`) file or a SavedModel folder.

    Args:
        path: Where the model is.
        outputs: See `Teacher`.
        input_shape: See `Teacher`. Needed for a model that takes images of any size.
        input_range: See `Teacher`.
        statement: The privacy statement of a privately trained teacher, or its JSON
            file. By default the file that `Teacher.save` wrote beside it, if any. One
            that names the SHA-256 of its teacher's file must name this one.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if what is there cannot be read as a classifier, or the statement is
            malformed or of another file.
    """
    return Teacher(
        path,
        outputs=outputs,
        input_shape=input_shape,
        input_range=input_range,
        statement=_statement_of(Path(path), statement),
    )


def _beside(path: Path) -> Path:
    """Where the statement of the teacher at `path` is."""
    return path.with_name(f"{path.stem}.statement.json")


def _statement_of(
    path: Path, given: PrivacyStatement | str | os.PathLike[str] | None
) -> PrivacyStatement | None:
    """The statement given or found beside, refused if it is of another teacher."""
    if given is None and not _beside(path).exists():
        return None
    found = _beside(path) if given is None else given
    if not isinstance(found, PrivacyStatement):
        found = read_statement(found)
    statement, digest = split_digest(found, _DIGEST)
    # Only who gives a statement can promise that it is true of a file it does not name.
    if digest is None and given is not None:
        return statement
    if not path.is_file() or digest != digest_of(path.read_bytes()):
        mend = "The teacher was overwritten: take the statement that belongs to it."
        if digest is None:
            mend = "If it belongs to this teacher, pass the file as `statement`."
        expected = f"a statement of {path}"
        received = str(_beside(path)) if given is None else given
        raise invalid("statement", received, expected, mend)
    return statement


def _load(path: str | os.PathLike[str]) -> Any:
    """The model at `path`, or an error that names the path."""
    name = os.fspath(path)
    expected = "a .keras file or a SavedModel folder with a teacher"
    if not os.path.exists(name):
        raise FileNotFoundError(
            str(invalid("path", name, expected, "Nothing is there."))
        )
    reader = tf.saved_model.load if os.path.isdir(name) else keras.models.load_model
    try:
        return reader(name)
    except Exception as error:  # the readers raise a dozen unrelated types
        mend = (
            "It is damaged, of another kind or needs custom objects to be registered "
            f"first ({error})."
        )
        raise invalid("path", name, expected, mend) from error


_Unwrapped = tuple[Callable[[Any], Any], tuple | None, Outputs | None]


def _as_function(model: Any, input_range: tuple[float, float]) -> _Unwrapped:
    """The forward function of `model`, its input shape and outputs where known."""
    if isinstance(model, keras.Model):
        shape = getattr(model, "input_shape", None)
        known = tuple(shape[1:]) if isinstance(shape, tuple) else None
        for tensor in (getattr(model, "inputs", None) or [])[:1]:
            _check_pixels(tf.as_dtype(tensor.dtype), input_range)
        return (lambda images: model(images, training=False)), known, None
    signatures = getattr(model, "signatures", None)
    if signatures is not None:
        return _as_signature(model, signatures, input_range)
    if callable(model):
        return model, None, None
    raise invalid("model", model, "a Keras model, the path of one or a callable")


def _as_signature(
    model: Any, signatures: Any, input_range: tuple[float, float]
) -> _Unwrapped:
    """A SavedModel's serving function, by its only input and its class scores."""
    if "serving_default" not in signatures:
        expected = "a SavedModel with the signature 'serving_default'"
        raise invalid("model", list(signatures), expected)
    function = signatures["serving_default"]
    inputs = function.structured_input_signature[1]
    names = list(function.structured_outputs)
    chosen = [name for name in ("logits", "probabilities") if name in names] or names
    if len(inputs) != 1 or (len(names) > 1 and chosen == names):
        expected = "a SavedModel with one input, and one output or one named 'logits'"
        mend = "Wrap it in a function of the images that returns the class scores."
        raise invalid("model", f"{list(inputs)} -> {names}", expected, mend)
    (key, spec), output = next(iter(inputs.items())), chosen[0]
    _check_pixels(spec.dtype, input_range)
    stated: dict[str, Outputs] = {"logits": "logits", "probabilities": "probabilities"}

    def forward(images: Any) -> tf.Tensor:
        # Through `model`, to keep it alive: a signature alone lets go of its variables.
        serve = model.signatures["serving_default"]
        if spec.dtype.is_integer:
            images = tf.round(images)
        return serve(**{key: tf.cast(images, spec.dtype)})[output]

    return forward, tuple(spec.shape[1:]), stated.get(output)


def _check_pixels(dtype: tf.DType, input_range: tuple[float, float]) -> None:
    """Refuses a range that whole-number pixels cannot be of, or hardly use."""
    if not dtype.is_integer:
        return
    low, high = input_range
    if high <= 1.0 or low < dtype.min or high > dtype.max:
        expected = f"the range of pixels of type {dtype.name}, e.g. (0, 255)"
        raise invalid("input_range", input_range, expected)


def _check_input_shape(stated: Any, known: tuple | None) -> tuple[int, ...]:
    """The shape of one input from what was stated and what the model says."""
    shape = tuple(stated) if stated is not None else known
    if not shape or any(side is None for side in shape):
        mend = "The teacher does not fix it; pass e.g. `input_shape=(28, 28, 1)`."
        raise invalid("input_shape", shape, "the shape of one image", mend)
    agrees = known is None or (
        len(known) == len(shape)
        and all(k in (None, s) for k, s in zip(known, shape, strict=True))
    )
    if not agrees:
        raise invalid("input_shape", shape, f"the teacher's own input shape {known}")
    return tuple(int(side) for side in shape)


def _check_input_range(bounds: Sequence[float]) -> tuple[float, float]:
    if len(bounds) != 2 or not -np.inf < float(bounds[0]) < float(bounds[1]) < np.inf:
        raise invalid(
            "input_range", bounds, "a finite pair (low, high) with low < high"
        )
    return float(bounds[0]), float(bounds[1])


def _detect_outputs(scores: np.ndarray) -> Outputs:
    """Whether rows of `scores` are probabilities or logits."""
    within = np.all((scores >= 0.0) & (scores <= 1.0))
    sums_to_one = np.all(np.abs(scores.sum(axis=-1) - 1.0) < 1e-2)
    return "probabilities" if within and sums_to_one else "logits"
