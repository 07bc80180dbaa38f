"""What a transcription leaves beside its student: record, report and pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe._files import replacing
from dp_transcribe.mechanisms.base import AnswerMechanism, Released
from dp_transcribe.privacy.units import Unit
from dp_transcribe.queries import Replay, dequantize
from dp_transcribe.transcriber import DPTranscriber
from dp_transcribe.transcriber.answer_learning import AnswerLearner

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHECKPOINT = "checkpoint.keras"
PROGRESS = "checkpoint.json"
# A checkpoint with a large replay takes long; between two there is so many times that.
SAVING_INTERVAL = 10
MEASURED = ("test_accuracy", "agreement", "epsilon", "student_loss")

_CURVES = {
    "test_accuracy": "student, test images",
    "agreement": "agreement with released answers",
}
_CURVE_CAPTION = (
    "Test images are measured for this picture only: nothing is chosen by them.\n"
    "Agreement is that with the released answers."
)


def predict_classes(
    student: keras.Model, images: np.ndarray, *, batch_size: int = 512
) -> np.ndarray:
    """The most probable class of each image, int64 `[n]`."""
    starts = range(0, len(images), batch_size)
    rows = [
        np.argmax(student(images[i : i + batch_size], training=False), axis=-1)
        for i in starts
    ]
    return np.concatenate([np.zeros(0, np.int64), *rows])


@contextlib.contextmanager
def released_weights(transcriber: DPTranscriber) -> Iterator[None]:
    """Gives the student, for a while, the weights that it would be released with.

    They differ from those in training where the optimizer averages its iterates.
    """
    student = transcriber.student
    in_training = student.get_weights()
    try:
        finalize(transcriber)
        yield
    finally:
        student.set_weights(in_training)


def finalize(transcriber: DPTranscriber) -> None:
    """Gives the student the averaged iterates, as the end of `fit` does."""
    variables = transcriber.student.trainable_variables
    transcriber.student_optimizer.finalize_variable_values(variables)


class Recorder(keras.callbacks.Callback):
    """Notes after each epoch how the student does and keeps a checkpoint.

    An epoch that is shorter than ten times the last saving is not saved, unless it is
    the last one.

    Args:
        images: float32 `[n, height, width, channels]`, only to be measured on: the
            run does not depend on them.
        labels: int `[n]`.
        folder: where the checkpoint goes, or None for none.
        facts: JSON values kept beside the checkpoint, to be found on resuming.
        history: what an earlier part of the run recorded.
        seconds: what an earlier part of the run took.

    Attributes:
        history: one list for `epoch` and one for each of `MEASURED`, all of one
            length.

    **Privacy**: accuracies are computed from the student and the given images, the
    rest from released answers. The checkpoint holds the noise key and the teacher.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        folder: Path | None = None,
        facts: Mapping[str, Any] | None = None,
        history: Mapping[str, list[Any]] | None = None,
        seconds: float = 0.0,
    ) -> None:
        super().__init__()
        self.images = images
        self.labels = labels
        self.folder = folder
        self.facts = dict(facts or {})
        empty: dict[str, list[Any]] = {name: [] for name in ("epoch", *MEASURED)}
        self.history = {**empty, **{k: list(v) for k, v in (history or {}).items()}}
        self._started = time.monotonic() - seconds
        self._saved_at = -math.inf
        self._saving_took = 0.0

    @property
    def seconds(self) -> float:
        """What the run took so far, earlier parts included."""
        return time.monotonic() - self._started

    @property
    def epochs_done(self) -> int:
        """Number of whole epochs recorded."""
        return len(self.history["epoch"])

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measures, notes and saves; adds `test_accuracy` to the progress bar."""
        logs = {} if logs is None else logs
        logs["test_accuracy"] = self._test_accuracy()
        self.history["epoch"].append(epoch + 1)
        for name in MEASURED:
            self.history[name].append(_plain(logs.get(name)))
        planned = (self.params or {}).get("epochs", math.inf)
        last = epoch + 1 >= planned or self.model.stop_training
        due = self._saved_at + SAVING_INTERVAL * self._saving_took
        if last or time.monotonic() >= due:
            self.save()

    def save(self) -> None:
        """Writes the checkpoint, then what belongs to it."""
        if self.folder is None:
            return
        started = time.monotonic()
        self.model.save_checkpoint(self.folder / CHECKPOINT)
        progress = {
            "facts": self.facts,
            "history": self.history,
            "seconds": self.seconds,
        }
        write_json(self.folder / PROGRESS, progress)
        self._saved_at = time.monotonic()
        self._saving_took = self._saved_at - started

    def _test_accuracy(self) -> float:
        with released_weights(self.model):
            classes = predict_classes(self.model.student, self.images)
        return float(np.mean(classes == self.labels))


def load_checkpoint(folder: Path) -> tuple[DPTranscriber, dict[str, Any]]:
    """Reads what a `Recorder` wrote.

    Args:
        folder: its folder.

    Returns:
        The transcriber, and the recorder's `facts`, `history` and `seconds`.

    Raises:
        ValueError: there is no checkpoint, or it cannot be read.
    """
    expected = f"a folder with an unharmed {CHECKPOINT} and {PROGRESS}"
    if not (folder / CHECKPOINT).is_file() or not (folder / PROGRESS).is_file():
        mend = "They are written at the end of the first epoch; start anew."
        raise _validate.invalid("folder", str(folder), expected, mend)
    try:
        progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        if {*progress} != {"facts", "history", "seconds"}:
            raise ValueError(f"{PROGRESS} is not a recorder's")
        transcriber = keras.saving.load_model(folder / CHECKPOINT)
        return _validate.instance_of(CHECKPOINT, transcriber, DPTranscriber), progress
    except Exception as error:  # the readers raise a dozen unrelated types
        mend = f"Start anew ({error})."
        raise _validate.invalid("folder", str(folder), expected, mend) from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON that is never seen half written."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is never seen half written."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Queries as a picture shows them.

    Attributes:
        images: float32 `[n, height, width, channels]` in 0..1.
        labels: int `[n]`.
        caption: what images and labels are, and whether they may be released.
    """

    images: np.ndarray
    labels: np.ndarray
    caption: str


def draw_samples(transcriber: DPTranscriber, count: int = 40) -> Samples:
    """Queries with the labels that were released for them; asks the teacher nothing.

    A mechanism that answers queries shows the last ones in the replay, with the
    answers released. One that releases gradients has no labels to show: new images of
    the generator are labelled by the student.

    Args:
        transcriber: after `fit`.
        count: how many.

    Returns:
        At most `count` samples; a query that was not answered has no label to show.

    **Privacy**: post-processing of what was released. Where the statement does not
    cover the generator, the caption says that the picture is not covered either.
    """
    learner = transcriber._run.learner
    if isinstance(learner, AnswerLearner):
        images, labels = _answered(transcriber, learner.replay, count)
        origin = "The last queries, each with the label released for it."
    else:
        images = transcriber.generator.sample(count, tf.constant([0, 0])).numpy()
        labels = predict_classes(transcriber.student, images)
        origin = "New samples of the generator, labelled by the student."
    low, high = transcriber.teacher.input_range
    unit = np.clip((images - low) / (high - low), 0.0, 1.0)
    return Samples(unit, labels, f"{origin}\n{_coverage(transcriber)}")


def _answered(
    transcriber: DPTranscriber, replay: Replay, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of the newest rows of the replay, the answered ones: images and labels."""
    strategy = transcriber.distribute_strategy
    codes, released, written = (
        strategy.experimental_local_results(v)[0] for v in replay.variables()
    )
    end = int(written)
    newest = tf.range(max(end - min(count, replay.size), 0), end) % replay.size
    rows = tf.gather(released, newest)
    mechanism = cast(AnswerMechanism, transcriber.mechanism)
    answers = Released(rows[:, 0], rows[:, 1])
    images = dequantize(tf.gather(codes, newest), transcriber.teacher.input_range)
    answered = answers.answered.numpy()
    return images.numpy()[answered], mechanism.labels(answers).numpy()[answered]


def _coverage(transcriber: DPTranscriber) -> str:
    if transcriber.generator_covered:
        return "Covered by the student's privacy statement."
    return (
        "NOT covered by the privacy statement (the teacher guided the generator): "
        "do not release."
    )


def plot_samples(path: Path, samples: Samples, *, columns: int = 10) -> None:
    """Draws a grid of samples, each below its label.

    Args:
        path: of the PNG file.
        samples: what to draw.
        columns: images in a row.
    """
    rows = max(-(-len(samples.images) // columns), 1)
    figure = _figure(0.8 * columns, 1.0 * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, label in zip(grid, samples.images, samples.labels, strict=False):
        axes.imshow(image.squeeze(), cmap="gray", vmin=0.0, vmax=1.0)
        axes.set_title(str(label), fontsize=9, pad=2)
    _finish(figure, path, samples.caption)


def plot_curve(
    path: Path,
    history: Mapping[str, Sequence[Any]],
    *,
    teacher_accuracy: float,
    unit: Unit = Unit.RESPONSE,
) -> None:
    """Draws accuracy, agreement and epsilon over the epochs.

    Args:
        path: of the PNG file.
        history: of a `Recorder`.
        teacher_accuracy: on the same test images, a fraction.
        unit: what the epsilon protects.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(7.0, 4.4)
    axes = figure.subplots()
    axes.axhline(teacher_accuracy, color="gray", ls=":", label="teacher, test images")
    for name, label in _CURVES.items():
        axes.plot(history["epoch"], _numbers(history[name]), marker=".", label=label)
    axes.set(xlabel="epoch", ylabel="fraction", ylim=(0.0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    right = axes.twinx()
    epsilon = _numbers(history["epsilon"])
    right.plot(history["epoch"], epsilon, "k--", label="epsilon")
    right.set_ylabel(f"epsilon (unit {unit.value})")
    right.set_ylim(bottom=0.0)
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="lower right")
    _finish(figure, path, _CURVE_CAPTION)


def _figure(width: float, height: float) -> Figure:
    """A figure in inches that needs no display and touches no global state."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    return Figure(figsize=(width, height), layout="constrained")


def _finish(figure: Figure, path: Path, caption: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.supxlabel(caption, fontsize=8)
    FigureCanvasAgg(figure).print_png(path)


def _plain(value: Any) -> float | str | None:
    """A logged number as JSON takes it."""
    if value is None:
        return None
    number = float(value)
    return number if np.isfinite(number) else str(number)


def _numbers(values: Sequence[Any]) -> list[float]:
    """The opposite of `_plain`; what was not logged leaves a gap."""
    return [float("nan") if value is None else float(value) for value in values]
