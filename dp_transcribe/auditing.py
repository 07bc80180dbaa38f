"""A whole audit: loads teacher and student, attacks both, audits the claim, writes.

What is written was computed with private data: it is not covered by the statement.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from dp_transcribe import _validate
from dp_transcribe.data import DATASETS, PRIOR_DOMAINS, ImageDataset, load_dataset
from dp_transcribe.ensembles import TeacherEnsemble
from dp_transcribe.evaluation.claims import AUDITED, audit_claim
from dp_transcribe.evaluation.inversion import (
    Inversion,
    invert,
    linear_classifier,
    recognised,
    save_grid,
)
from dp_transcribe.evaluation.membership import (
    MembershipResult,
    ask,
    never_seen,
    strongest_attack,
)
from dp_transcribe.evaluation.report import audit_report, draw_audit
from dp_transcribe.export import EXTRA_ASSETS
from dp_transcribe.generators.priors import default_prior
from dp_transcribe.methods import METHODS
from dp_transcribe.privacy.statement import PrivacyStatement
from dp_transcribe.reporting import write_json
from dp_transcribe.teachers import Teacher, load_teacher
from dp_transcribe.transcriber import DPTranscriber

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """What the flags of `audit` say.

    Attributes:
        teacher: `.keras` file or SavedModel; or a transcriber's checkpoint, whose
            teacher is taken: teachers on shards are in no other single file.
        teacher_range: `low,high`, the pixels that teacher, student and shadows take;
            None is 0 to 1. A checkpoint brings its own.
        student: what `export_student` wrote; its statement is what is audited. None
            transcribes the teacher by `method` first.
        method: one of `METHODS`.
        dataset: data set whose training images the teacher was trained on.
        data_dir: where tensorflow-datasets has prepared it.
        train_images: the teacher was trained on the first so many; None is all.
        output_dir: where the results go.
        epsilon: target of the transcription.
        delta: target of the transcription.
        canaries: number of canaries.
        epochs: of the transcription, if not the method's own.
        images: most images of each side that membership is tested on.
        shadows: models trained like the teacher, but on none of the images that
            membership is tested on, for `offline_lira`; two or more, or none.
        seed: for tests; noise and coins are secret without it.

    Raises:
        ValueError: a value is out of range.
    """

    teacher: str
    teacher_range: str | None = None
    student: str | None = None
    method: str = "dpdfd"
    dataset: str = "mnist"
    data_dir: str | None = None
    train_images: int | None = None
    output_dir: str = "output/audit"
    epsilon: float = 1.0
    delta: float = 1e-5
    canaries: int = 4000
    epochs: int | None = None
    images: int = 5000
    shadows: Sequence[str] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        """Checks the values."""
        _validate.one_of("method", self.method, METHODS)
        _validate.one_of("dataset", self.dataset, DATASETS)
        _validate.positive_finite("epsilon", self.epsilon)
        _validate.fraction_open("delta", self.delta)
        for name in ("canaries", "images", "train_images", "epochs"):
            if getattr(self, name) is not None:
                _validate.positive_int(name, getattr(self, name))
        _validate.written_range("teacher_range", self.teacher_range)
        if len(self.shadows) == 1:
            expected = "two shadow models or more, or none"
            raise _validate.invalid("shadows", self.shadows, expected)
        _validate.optional_seed("seed", self.seed)

    @property
    def input_range(self) -> tuple[float, float]:
        """Lowest and highest pixel that the given teacher takes."""
        return _validate.written_range("teacher_range", self.teacher_range)


def audit(config: AuditConfig) -> dict[str, Any]:
    """Attacks teacher and student, audits the claim and writes the results.

    Args:
        config: what the flags say.

    Returns:
        The report, as it is in audit.json.

    Raises:
        ValueError: something does not fit.
        FileNotFoundError: a model or data set is not there.
    """
    folder = _validate.writable_dir("output_dir", config.output_dir)
    teacher = _teacher(config)
    dataset = load_dataset(config.dataset, config.data_dir)
    check_fits("teacher", teacher, dataset)
    dataset = dataset.in_range(teacher.input_range)
    shadows = _shadows(config, teacher, dataset)
    student, statement = _student(config, teacher)
    check_fits("student", student, dataset)
    audited = audit_claim(
        statement,
        canaries=config.canaries,
        delta=config.delta,
        seed=config.seed,
    )
    models = {"teacher": teacher, "student": student}
    membership = membership_of(models, dataset, config, shadows)
    inversion = invert_models(models, dataset, folder)
    draw_audit(folder / "audit.png", [(statement.mechanism, audited)], membership)
    report = audit_report(
        audited,
        membership,
        audited_run=AUDITED[statement.unit],
        inversion=inversion,
        shadows=len(shadows),
        dataset_source=dataset.source,
    )
    write_json(folder / "audit.json", report)
    return report


def load_in_range(path: str, input_range: tuple[float, float]) -> Teacher:
    """The teacher that is given on the command line.

    Args:
        path: of `--teacher`, see `load_teacher`.
        input_range: lowest and highest pixel that it takes, of `--teacher_range`.

    Returns:
        The teacher.

    Raises:
        ValueError: what is there is no teacher, or none of such pixels.
        FileNotFoundError: nothing is there.
    """
    try:
        return load_teacher(path, input_range=input_range)
    except ValueError as error:
        low, high = input_range
        expected = f"a teacher of pixels from {low:g} to {high:g} (`--teacher_range`)"
        raise _validate.invalid("teacher", path, expected, str(error)) from error


def check_fits(name: str, model: Teacher, dataset: ImageDataset) -> None:
    """Refuses a model of other images or classes than a data set's.

    Args:
        name: of the argument, for the error.
        model: teacher or student.
        dataset: the data set.

    Raises:
        ValueError: it does not fit.
    """
    wanted = (dataset.image_shape, dataset.num_classes)
    if (model.input_shape, model.num_classes) != wanted:
        received = f"input {model.input_shape}, {model.num_classes} classes"
        expected = f"input {wanted[0]} and {wanted[1]} classes, as {dataset.name} has"
        raise _validate.invalid(name, received, expected)


def _teacher(config: AuditConfig) -> Teacher:
    """The teacher, or the one that a transcriber's checkpoint holds."""
    if not _is_checkpoint(config.teacher):
        return load_in_range(config.teacher, config.input_range)
    try:
        teacher = keras.saving.load_model(config.teacher).teacher
    except Exception as error:  # Keras raises a dozen unrelated types
        expected = "an unharmed checkpoint of a transcriber"
        raise _validate.invalid(
            "teacher", config.teacher, expected, str(error)
        ) from error
    if config.teacher_range is not None and config.input_range != teacher.input_range:
        expected = f"{teacher.input_range}, that of the checkpoint's teacher, or None"
        raise _validate.invalid("teacher_range", config.teacher_range, expected)
    return teacher


def _is_checkpoint(path: str) -> bool:
    """Whether a transcriber was saved there, and not a model."""
    try:
        with zipfile.ZipFile(path) as file:
            saved = json.loads(file.read("config.json"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False
    return saved.get("registered_name") == keras.saving.get_registered_name(
        DPTranscriber
    )


def _shadows(
    config: AuditConfig, teacher: Teacher, dataset: ImageDataset
) -> list[Teacher]:
    """The shadow models, which take the same pixels as the teacher."""
    shadows = []
    for path in config.shadows:
        shadow = load_teacher(path, input_range=teacher.input_range)
        check_fits("shadows", shadow, dataset)
        shadows.append(shadow)
    return shadows


def _student(config: AuditConfig, teacher: Teacher) -> tuple[Teacher, PrivacyStatement]:
    """The student and its statement."""
    if config.student is not None:
        student = load_teacher(config.student, input_range=teacher.input_range)
        path = Path(config.student) / EXTRA_ASSETS / "statement.json"
        return student, PrivacyStatement.from_json(path.read_text(encoding="utf-8"))
    if isinstance(teacher, TeacherEnsemble):
        expected = "an exported student, where the teacher is an ensemble"
        mend = "A `--method` transcribes a single teacher."
        raise _validate.invalid("student", None, expected, mend)
    if config.seed is not None:
        keras.utils.set_random_seed(config.seed % 2**32)
    prior = default_prior(
        teacher.input_shape,
        domain=PRIOR_DOMAINS[config.dataset],
        output_range=teacher.input_range,
    )
    transcriber = METHODS[config.method](teacher, prior, seed=config.seed)
    transcriber.fit(
        target_epsilon=config.epsilon, delta=config.delta, epochs=config.epochs
    )
    student = Teacher(
        transcriber.student, outputs="logits", input_range=teacher.input_range
    )
    return student, transcriber.privacy_statement()


def membership_of(
    models: dict[str, Teacher],
    dataset: ImageDataset,
    config: AuditConfig,
    shadows: Sequence[Teacher] = (),
) -> dict[str, MembershipResult]:
    """The strongest membership attack on each model.

    Args:
        models: by name.
        dataset: of whose training images the teacher saw the first.
        config: how many it saw, and how many are tested.
        shadows: models that saw none of those that are tested; none leaves
            `offline_lira` out.

    Returns:
        The results, by the models' names.
    """
    trained = config.train_images or len(dataset.train_images)
    seen = slice(min(trained, config.images))
    members = dataset.train_images[seen], dataset.train_labels[seen]
    others = never_seen(dataset, trained, config.images)
    told = [ask(shadow.predict, members, others) for shadow in shadows]
    return {
        name: strongest_attack(ask(model.predict, members, others), told)
        for name, model in models.items()
    }


def invert_models(
    models: dict[str, Teacher],
    dataset: ImageDataset,
    folder: Path,
    settings: Inversion | None = None,
) -> dict[str, dict[str, float]]:
    """Inverts each model, draws what is found, and says how much is recognised.

    Args:
        models: by name.
        dataset: of whose test images the independent classifier learns.
        folder: where inversion_<name>.png goes.
        settings: of the inversion.

    Returns:
        By name, the share of reconstructions that the classifier recognises. Ensembles
        have no gradients to follow and are left out.
    """
    count = min(len(dataset.test_images), 5000)
    classifier = linear_classifier(
        dataset.test_images[:count], dataset.test_labels[:count]
    )
    found = {}
    for name, model in models.items():
        if isinstance(model, TeacherEnsemble):
            _LOGGER.info("The %s is an ensemble, which is not inverted.", name)
            continue
        images, labels = invert(model, settings)
        save_grid(folder / f"inversion_{name}.png", images, labels)
        found[name] = {"recognised": recognised(classifier, images, labels)}
    return found
