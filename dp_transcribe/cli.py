"""Commands: `python -m dp_transcribe audit`.

    python -m dp_transcribe audit --teacher=teacher.keras --student=served/1
    python -m dp_transcribe audit --teacher=output/checkpoint.keras --student=served/1

attacks teacher and student as an outsider would, audits with canaries what the
student's statement claims, and writes audit.json, audit.png and the pictures of model
inversion. What is written was computed with private data: it is not covered by the
statement.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dp_transcribe import _validate, mechanisms, methods
from dp_transcribe.data import DATASETS, PRIOR_DOMAINS, ImageDataset, load_dataset
from dp_transcribe.ensembles import TeacherEnsemble
from dp_transcribe.evaluation.canaries import AuditResult
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
    strongest_attack,
)
from dp_transcribe.evaluation.records import (
    audit_class_means,
    audit_dpkip,
    audit_linear_model,
    audit_private_teacher,
)
from dp_transcribe.evaluation.report import audit_report, draw_audit
from dp_transcribe.evaluation.responses import audit_responses
from dp_transcribe.evaluation.shards import audit_ensemble_gradient, audit_votes
from dp_transcribe.export import EXTRA_ASSETS
from dp_transcribe.generators.priors import default_prior
from dp_transcribe.mechanisms.base import Mechanism
from dp_transcribe.privacy.statement import PrivacyStatement
from dp_transcribe.privacy.units import Unit
from dp_transcribe.programs import EXIT_FLAGGED, EXIT_REFUSED
from dp_transcribe.queries import FreshQueries, Queries, QueryPool
from dp_transcribe.reporting import write_json
from dp_transcribe.teachers import Teacher, load_teacher
from dp_transcribe.transcriber import DPTranscriber

_LOGGER = logging.getLogger(__name__)

BUILDERS: dict[str, Callable[..., DPTranscriber]] = {
    "dpdfd": methods.dpdfd,
    "srr": methods.srr,
    "dpsd_data": functools.partial(methods.dpsd, protect="data"),
    "dpsd_label": functools.partial(methods.dpsd, protect="label"),
}
# Audits of the unit RECORD by the mechanism that a statement names.
RECORD_AUDITS: dict[str, Callable[..., AuditResult]] = {
    "ClassMeans": audit_class_means,
    "ClippedGradient": audit_private_teacher,
    "DPKIP": audit_dpkip,
    "EnsembleGradient": audit_ensemble_gradient,
    "NoisyVotes": audit_votes,
    "PrivateLinearModel": audit_linear_model,
}
# What a bound in audit.json says something about.
AUDITED = {
    Unit.RESPONSE: "the statement's mechanism and noise, in a run of the audit's own",
    Unit.RECORD: (
        "the code of the statement's mechanism, calibrated to the statement's epsilon, "
        "in a run of the audit's own: not the noise that the release had"
    ),
}


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
        method: one of `BUILDERS`.
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
        _validate.one_of("method", self.method, BUILDERS)
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
    audited = audit_claim(statement, config)
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
    transcriber = BUILDERS[config.method](teacher, prior, seed=config.seed)
    transcriber.fit(
        target_epsilon=config.epsilon, delta=config.delta, epochs=config.epochs
    )
    student = Teacher(
        transcriber.student, outputs="logits", input_range=teacher.input_range
    )
    return student, transcriber.privacy_statement()


def audit_claim(statement: PrivacyStatement, config: AuditConfig) -> AuditResult:
    """Audits with canaries what a statement claims.

    Args:
        statement: of unit `RESPONSE`: its mechanism is audited with its noise, on its
            queries. Of unit `RECORD`: what made the release is audited in the size and
            with the settings of its own audit, calibrated to the statement's epsilon.
        config: number of canaries, seed, and the delta for a statement without one.

    Returns:
        The result, whose claim is the statement's.

    Raises:
        ValueError: there is no audit of what the statement describes.
    """
    terms: dict[str, Any] = {"canaries": config.canaries, "seed": config.seed}
    if statement.unit is Unit.RESPONSE:
        # A statement of pure epsilon has none, but a run asks for one.
        terms.update(target_epsilon=None, delta=statement.delta or config.delta)
        result = audit_responses(*released_by(statement), **terms)
        return dataclasses.replace(result, claimed_epsilon=statement.epsilon)
    last = statement.mechanism.rpartition(" + ")[2].removesuffix(" (votes)")
    if last not in RECORD_AUDITS:
        expected = f"a statement of one of {sorted(RECORD_AUDITS)} for the unit RECORD"
        raise _validate.invalid("student", statement.mechanism, expected)
    terms.update(target_epsilon=statement.epsilon, delta=statement.delta)
    return RECORD_AUDITS[last](**terms)


def released_by(statement: PrivacyStatement) -> tuple[Mechanism, Queries]:
    """Mechanism and queries as a statement of unit `RESPONSE` describes them.

    Args:
        statement: of a transcription.

    Returns:
        The mechanism, with its noise, and the queries.

    Raises:
        ValueError: the statement does not describe them.
    """
    kind = getattr(mechanisms, statement.mechanism, None)
    details = statement.details
    if kind is None or not {"mechanism", "queries"} <= details.keys():
        expected = "a student with a statement of its mechanism and queries"
        mend = "Transcribe again with this version, or audit a `--method`."
        raise _validate.invalid("student", statement.mechanism, expected, mend)
    settings = dict(details["queries"])
    pooled = "updates" in settings
    if pooled:
        # A pool that was not used up has cost less, and fewer fill no pool.
        fewest = -(-settings["size"] // settings["batch_size"])
        made = max(details["releases"], fewest)
        settings["updates"] = min(settings["updates"], made)
    queries = (QueryPool if pooled else FreshQueries)(**settings)
    return kind(**details["mechanism"]), queries


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


def never_seen(
    dataset: ImageDataset, trained: int, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images that no model was trained on, and their labels, for membership attacks.

    Training images where some are left, since they are drawn as the others were, if the
    teacher's were drawn at random. Test images may differ by themselves (half of
    MNIST's were written by other people), and so may the first training images from
    the last; an attack takes either for membership.

    Args:
        dataset: the data set.
        trained: how many of its first training images were used.
        most: how many are wanted.

    Returns:
        The last training images beyond the first `trained`, or else test images; at
        most `most`.
    """
    left = slice(max(trained, len(dataset.train_images) - most), None)
    if len(dataset.train_images[left]):
        return dataset.train_images[left], dataset.train_labels[left]
    return dataset.test_images[:most], dataset.test_labels[:most]


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


def table(audits: Sequence[tuple[str, AuditResult]]) -> str:
    """Canary audits as lines of text.

    Args:
        audits: each with its name.

    Returns:
        A heading and a line for each audit.
    """
    lines = [
        f"{'audited':28} {'unit':9} {'claimed':>8} {'lower bound':>12} "
        f"{'Gaussian':>9} {'canaries':>9}"
    ]
    for name, result in audits:
        gaussian = result.gaussian_lower_bound
        lines.append(
            f"{name:28} {result.unit.value:9} {result.claimed_epsilon:8.3f} "
            f"{result.epsilon_lower_bound:12.3f} "
            f"{'-' if gaussian is None else f'{gaussian:.3f}':>9} "
            f"{result.canaries:9}{'  FLAGGED' if result.flagged else ''}"
        )
    return "\n".join(lines)


def summary(report: dict[str, Any], folder: str) -> str:
    """What the user sees at the end."""
    lines = [
        f"Unit {report['unit']}: claimed epsilon {report['claimed_epsilon']}, lower "
        f"bound {report['epsilon_lower_bound']:.3f} at confidence "
        f"{report['confidence']}.",
    ]
    for name, result in report["membership"].items():
        lines.append(
            f"Membership in the teacher's training data, by the {name}: AUC "
            f"{result['auc']:.3f}, {result['tpr_at_1e-3']:.2%} found at 0.1 % and "
            f"{result['tpr_at_1e-2']:.2%} at 1 % false alarms."
        )
    if report["flagged"]:
        overlap = (report.get("shards_of_a_record") or 1) > 1
        why = "shards overlap" if overlap else "the lower bound is above the claim"
        lines.append(f"FLAGGED: {why}. Do not release.")
    lines.append(f"Results: {folder}/ (audit.json, audit.png). {report['note']}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The flags of all commands."""
    top = argparse.ArgumentParser(prog="python -m dp_transcribe")
    commands = top.add_subparsers(dest="command", required=True)
    add = commands.add_parser(
        "audit",
        help="attack teacher and student, and bound epsilon from below",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what has no default shows none
    ).add_argument

    def usual(name: str, **settings: Any) -> None:
        add(f"--{name}", default=getattr(AuditConfig, name), **settings)

    checkpoint = "or the checkpoint.keras of a transcription, which holds its teacher"
    add("--teacher", required=True, help=f".keras file or SavedModel, {checkpoint}")
    add("--teacher_range", help="low,high: pixels that it takes; by default 0,1")
    add("--student", help="exported student; without it --method transcribes one")
    usual(
        "method", choices=list(BUILDERS), help="transcribes where there is no student"
    )
    usual("dataset", choices=list(DATASETS), help="the teacher's")
    add("--data_dir", help="folder in which tensorflow-datasets has prepared it")
    add("--train_images", type=int, help="the teacher saw the first so many; or all")
    usual("output_dir", help="where the results go")
    usual("epsilon", type=float, help="target of the transcription")
    usual("delta", type=float, help="target of the transcription")
    usual("canaries", type=int, help="of the canary audit")
    add("--epochs", type=int, help="of the transcription; by default the method's")
    usual("images", type=int, help="most of each side that membership is tested on")
    add(
        "--shadows",
        nargs="+",
        metavar="MODEL",
        help="two or more models like the teacher that saw none of the images that "
        "membership is tested on: adds the attack LiRA",
    )
    add("--seed", type=int, help="for tests; secret without it")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: of the command line.

    Returns:
        0, or 1 if a claim was flagged, or 2 if something does not fit.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given = vars(parser().parse_args(arguments))
    del given["command"]
    try:
        report = audit(AuditConfig(**given))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_REFUSED
    sys.stdout.write(summary(report, given["output_dir"]) + "\n")
    return EXIT_FLAGGED if report["flagged"] else 0
