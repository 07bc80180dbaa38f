"""Turns an MNIST classifier into a student that may be released, in one command.

    python examples/mnist.py --epsilon=1

trains a teacher (once, it is cached), transcribes it under differential privacy and
writes report.json, statement.txt, student/1 (a SavedModel), samples.png and curve.png.
That protects single answers of the teacher. For a guarantee for the people in its
training data:

    python examples/mnist.py --epsilon=1 --unit=record --route=dp_teacher

or, with teachers on disjoint shards, `--route=votes` and `--route=gradient`.

Ctrl-C leaves the same files for the student so far; `--resume` goes on from there.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # says that there is no GPU

import keras
import numpy as np
from absl import app, flags

import dp_transcribe as dpt
from dp_transcribe import _validate, reporting
from dp_transcribe.auditing import check_fits, load_in_range
from dp_transcribe.data import DATASETS, PRIOR_DOMAINS, ImageDataset, load_dataset
from dp_transcribe.distillation import (
    Distillation,
    kernel_for_domain,
    scattering_features,
)
from dp_transcribe.export import check_target, statements_text
from dp_transcribe.generators.priors import default_prior
from dp_transcribe.privacy.accounting import ACCOUNTANTS
from dp_transcribe.programs import EXIT_INTERRUPTED, parse_flags, refuse
from dp_transcribe.reference_teachers import (
    CONV_RECIPES,
    WAVELET_RECIPES,
    train_conv_teacher,
    train_wavelet_teacher,
)
from dp_transcribe.shards import RidgeFit, linear_member

_LOGGER = logging.getLogger(__name__)

BUILDERS: dict[str, Callable[..., dpt.DPTranscriber]] = {
    "dpdfd": dpt.dpdfd,
    "srr": dpt.srr,
    "dpsd_data": functools.partial(dpt.dpsd, protect="data"),
    "dpsd_label": functools.partial(dpt.dpsd, protect="label"),
}
UNITS = ("response", "record")
# What a teacher trained here may be, and is by default: one of fixed wavelets is
# easier to transcribe, and on clothes better itself than the small network.
RECIPES: dict[str, dict[str, Any]] = {
    "convolutions": CONV_RECIPES,
    "wavelets": WAVELET_RECIPES,
}
NETWORKS = {
    "mnist": "convolutions",
    "fashion_mnist": "wavelets",
    "cifar10": "wavelets",
}
STUDENT = Path("student", "1")  # the SavedModel, by its version
# Up to which epsilon how many teachers; chosen on held-out training images.
SHARDS = ((4.0, 1000), (float("inf"), 500))
LEAST_IN_SHARD = 20
SHARDED = ("votes", "gradient")
FEATURES = 600
# What `dpdfd` does otherwise: where classes differ by detail, more queries and a wider
# head; where a query takes longer, fewer of them.
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "fashion_mnist": {
        "pool_size": 2_000_000,
        "batch_size": 16_384,
        "units": (512,),
        "epochs": 20,
    },
    "cifar10": {"pool_size": 100_000, "epochs": 5},
}
SCHEDULE = ("epochs", "steps_per_epoch")
# What may differ between the command that is resumed and the one that resumes it.
FREE_ON_RESUME = {"resume", "data_dir", "output_dir", "cache_dir", "epochs"}
NOTE = (
    "Accuracies and agreement were measured on test images for this report, the "
    "teacher's own answers included; nothing was chosen by them. The statement covers "
    "the student, not this report."
)


class RefusedError(Exception):
    """The user asked for what cannot be done; no privacy budget was spent."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleConfig:
    """What the flags say.

    Raises:
        ValueError: a value is out of range.
    """

    epsilon: float = 1.0
    delta: float = 1e-5
    accountant: str = "rdp"
    unit: str = "response"
    method: str | None = None
    route: str | None = None
    shards: int | None = None
    dataset: str = "mnist"
    data_dir: str | None = None
    teacher: str | None = None
    teacher_range: str | None = None
    teacher_network: str | None = None
    assistant: bool = False
    output_dir: str | None = None
    seed: int | None = None
    epochs: int | None = None
    steps_per_epoch: int | None = None
    cache_dir: str = ".cache"
    resume: bool = False

    def __post_init__(self) -> None:
        _validate.positive_finite("epsilon", self.epsilon)
        _validate.fraction_open("delta", self.delta)
        _validate.one_of("accountant", self.accountant, ACCOUNTANTS)
        _validate.one_of("unit", self.unit, UNITS)
        _validate.one_of("method", self.method, (None, *BUILDERS))
        _validate.one_of("route", self.route, (None, *ROUTES))
        self._check_way()
        _validate.one_of("dataset", self.dataset, DATASETS)
        _validate.one_of("teacher_network", self.teacher_network, (None, *RECIPES))
        _validate.optional_seed("seed", self.seed)
        if self.assistant and self.unit == "record":
            mend = "It learns from the private images, without privacy."
            raise _validate.invalid("assistant", True, "False for unit record", mend)
        if self.teacher_network and (self.teacher or self.unit == "record"):
            mend = "No teacher is trained that it could be the network of."
            expected = "None with a given teacher or unit record"
            raise _validate.invalid(
                "teacher_network", self.teacher_network, expected, mend
            )
        if self.teacher_range is not None and self.teacher is None:
            mend = "A teacher that is trained here takes pixels from 0 to 1."
            expected = "None without a `--teacher`"
            raise _validate.invalid("teacher_range", self.teacher_range, expected, mend)
        _validate.written_range("teacher_range", self.teacher_range)
        for name, value in self.schedule.items():
            _validate.positive_int(name, value)

    def _check_way(self) -> None:
        """Refuses what the unit has no use for: nobody is to take it for another."""
        if self.unit == "response" and self.route is not None:
            mend = "Add `--unit=record`: a method protects answers, not people."
            raise _validate.invalid("route", self.route, "None for unit response", mend)
        if self.unit == "record" and self.method is not None:
            mend = "Choose a `--route`, or leave `--unit=record` out."
            raise _validate.invalid("method", self.method, "None for unit record", mend)
        if self.way in SHARDED and self.teacher is not None:
            mend = f"Leave `--teacher` out: {self.way} trains one on each shard."
            raise _validate.invalid("teacher", self.teacher, "None", mend)
        if self.way not in SHARDED and self.shards is not None:
            expected = f"None but for the routes {' and '.join(SHARDED)}"
            raise _validate.invalid("shards", self.shards, expected)

    @property
    def folder(self) -> Path:
        """Where the results go."""
        default = f"output/{self.dataset}-{self.way}-epsilon{self.epsilon:g}"
        return Path(self.output_dir or default)

    @property
    def way(self) -> str:
        """The method or, for unit RECORD, the route."""
        if self.unit == "response":
            return self.method or "dpdfd"
        return self.route or "dp_teacher"

    @property
    def input_range(self) -> tuple[float, float]:
        """Lowest and highest pixel that the given teacher takes."""
        return _validate.written_range("teacher_range", self.teacher_range)

    @property
    def schedule(self) -> dict[str, int]:
        """The parts of the schedule that were asked for."""
        values = {name: getattr(self, name) for name in SCHEDULE}
        return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Transcription:
    """A run, new or resumed.

    Attributes:
        transcriber: compiled.
        dataset: with the test images alone.
        recorder: keeps history and checkpoint; its `facts` are `config` and `teacher`.
    """

    transcriber: dpt.DPTranscriber
    dataset: ImageDataset
    recorder: reporting.Recorder


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Turns complaints about what the user gave into `RefusedError`."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise RefusedError(str(error)) from error


def run(config: ExampleConfig) -> dict[str, Any]:
    """Transcribes as configured and writes the results.

    Returns:
        The report, as it is in report.json.

    Raises:
        RefusedError: something does not fit; no privacy budget was spent.
    """
    with refusing():
        _validate.writable_dir("output_dir", config.folder)
        if (config.folder / STUDENT.parent).exists():
            _validate.writable_dir("output_dir", config.folder / STUDENT.parent)
        check_target(config.folder / STUDENT, overwrite=True)
        run = resume(config) if config.resume else begin(config)
    interrupted = transcribe(run)
    try:
        return write_results(config.folder, run, interrupted=interrupted)
    except KeyboardInterrupt:
        message = "Interrupted while results were written: with --resume they all are."
        raise KeyboardInterrupt(message) from None


def begin(config: ExampleConfig) -> Transcription:
    """A new run, with the teacher given or one trained here."""
    given = (
        load_in_range(config.teacher, config.input_range) if config.teacher else None
    )
    if given is not None and config.unit == "record" and given.statement is None:
        mend = "Put its statement beside it (see `Teacher.save`), or leave it out."
        expected = "a teacher with a privacy statement of unit RECORD"
        raise _validate.invalid("teacher", config.teacher, expected, mend)
    if given is None:
        _validate.writable_dir("cache_dir", config.cache_dir)
    dataset = load_dataset(config.dataset, config.data_dir)
    started = time.monotonic()
    if given is None:
        train = own_teacher if config.unit == "response" else ROUTES[config.way].train
        teacher, source = train(config, dataset)
    else:
        teacher, source = given, str(config.teacher)
        check_fits("teacher", teacher, dataset)
    facts: dict[str, Any] = {"config": dataclasses.asdict(config)}
    facts["teacher"] = {"source": source}
    if config.assistant:
        asked = dataset.in_range(teacher.input_range)
        test = asked.test_images, np.asarray(asked.test_labels)
        facts["teacher"] = {
            "source": f"assistant, {source}",
            "assisted_test_accuracy": teacher.accuracy(*test),
        }
        teacher = assistant_of(teacher, config, dataset)
    trained = time.monotonic()
    transcriber = build(config, teacher)
    facts["teacher"]["seconds"] = trained - started
    seconds = time.monotonic() - trained
    return prepared(config, transcriber, dataset, facts=facts, seconds=seconds)


def resume(config: ExampleConfig) -> Transcription:
    """The run whose checkpoint lies in the output folder."""
    transcriber, progress = reporting.load_checkpoint(config.folder)
    facts = progress["facts"]
    for name, value in dataclasses.asdict(config).items():
        former = facts["config"].get(name)
        if name not in FREE_ON_RESUME and value != former:
            mend = "Repeat the command that is resumed, with `--resume` added."
            raise _validate.invalid(name, value, f"{former!r}, as before", mend)
    if config.epochs is not None:
        transcriber.schedule = (config.epochs, transcriber.schedule[1])
    dataset = load_dataset(config.dataset, config.data_dir)
    return prepared(config, transcriber, dataset, **progress)


def prepared(
    config: ExampleConfig,
    transcriber: dpt.DPTranscriber,
    dataset: ImageDataset,
    **progress: Any,
) -> Transcription:
    """The run with what records it, on images as the teacher takes them."""
    teacher = transcriber.teacher
    dataset = dataset.without_training().in_range(teacher.input_range)
    can_be_saved = teacher.model is not None or isinstance(teacher, dpt.TeacherEnsemble)
    if not can_be_saved:
        _LOGGER.warning("Only a Keras teacher can be saved: there is no checkpoint.")
    folder = config.folder if can_be_saved else None
    recorder = reporting.Recorder(
        dataset.test_images, dataset.test_labels, folder=folder, **progress
    )
    return Transcription(transcriber, dataset, recorder)


def own_teacher(
    config: ExampleConfig, dataset: ImageDataset
) -> tuple[dpt.Teacher, str]:
    """The cached teacher of this data and recipe, or a new one; and which it is."""
    network = config.teacher_network or NETWORKS[dataset.name]
    recipe = RECIPES[network][dataset.name]
    path = cached_path(config, dataset, recipe)
    cached = cached_teacher(path)
    if cached is not None:
        return cached, "cached"
    print(
        f"Training a teacher of {network} on {dataset.name} ({dataset.source}), "
        "without privacy."
    )
    images, labels = dataset.train_images, np.asarray(dataset.train_labels)
    settings: dict[str, Any] = {
        "num_classes": dataset.num_classes,
        "recipe": recipe,
        "verbose": "auto",
    }
    if network == "wavelets":
        prior = public_prior(config, dataset.image_shape)
        model = train_wavelet_teacher(images, labels, prior=prior, **settings)
    else:
        model = train_conv_teacher(images, labels, **settings)
    teacher = dpt.Teacher(model)
    keep_teacher(teacher, path)
    return teacher, "trained"


def assistant_of(
    teacher: dpt.Teacher, config: ExampleConfig, dataset: ImageDataset
) -> dpt.Teacher:
    """A teacher of wavelets that learnt what the teacher says of its images."""
    print(f"Training an assistant on {dataset.name}, without privacy.")
    images = dataset.train_images
    model = train_wavelet_teacher(
        images,
        teacher.predict(dataset.in_range(teacher.input_range).train_images),
        num_classes=dataset.num_classes,
        prior=public_prior(config, dataset.image_shape),
        recipe=WAVELET_RECIPES[dataset.name],
        verbose="auto",
    )
    return dpt.Teacher(model)


def private_teacher(
    config: ExampleConfig, dataset: ImageDataset
) -> tuple[dpt.Teacher, str]:
    """As `own_teacher`, but trained under differential privacy.

    It is kept for the same privacy target: training it again would spend again.
    """
    domain = PRIOR_DOMAINS[dataset.name]
    settings = Distillation.for_domain(domain)
    kernel = kernel_for_domain(domain, dataset.image_shape)
    facts = (config.epsilon, config.delta, config.seed, settings, kernel)
    path = cached_path(config, dataset, facts)
    cached = cached_teacher(path, private=True)
    if cached is not None:
        return cached, "cached"
    print(
        f"Training a teacher on {dataset.name} ({dataset.source}) under differential "
        f"privacy, unit RECORD, epsilon {config.epsilon:g}."
    )
    teacher = dpt.fit_scattering_teacher(
        dataset.train_images,
        dataset.train_labels,
        num_classes=dataset.num_classes,
        source=public_prior(config, dataset.image_shape),
        target_epsilon=config.epsilon,
        delta=config.delta,
        kernel=kernel,
        settings=settings,
        seed=config.seed,
    )
    keep_teacher(teacher, path)
    return teacher, "trained"


def cached_path(config: ExampleConfig, dataset: ImageDataset, recipe: Any) -> Path:
    """Where the teacher of this data and recipe is kept."""
    digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]
    name = f"{dataset.name}-{dataset.source}-{digest}.keras"
    return Path(config.cache_dir) / "teachers" / name


def cached_teacher(path: Path, *, private: bool = False) -> dpt.Teacher | None:
    """The teacher kept there, or None.

    Raises:
        ValueError: a private teacher is damaged, or without its statement.
    """
    if not path.exists():
        return None
    try:
        teacher = dpt.load_teacher(path)
        if private and teacher.statement is None:
            raise ValueError("The statement beside it is gone.")
        return teacher
    except ValueError as error:
        if private:
            mend = (
                "Training another spends a second budget on the same records: remove "
                f"the file if that is meant. ({error})"
            )
            expected = "a private teacher with its statement"
            raise _validate.invalid("cache_dir", str(path), expected, mend) from error
        _LOGGER.warning("The cached teacher %s is damaged: training anew.", path)
        return None


def keep_teacher(teacher: dpt.Teacher, path: Path) -> None:
    """Writes a teacher, never seen half written, and its statement beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        teacher.save(Path(folder) / path.name)
        for written in sorted(Path(folder).iterdir(), reverse=True):
            os.replace(written, path.parent / written.name)


def public_prior(
    config: ExampleConfig,
    image_shape: tuple[int, ...],
    output_range: tuple[float, float] = (0.0, 1.0),
) -> Any:
    """Random images of the kind that the data set has."""
    domain = PRIOR_DOMAINS[config.dataset]
    return default_prior(image_shape, domain=domain, output_range=output_range)


@dataclasses.dataclass(frozen=True)
class Route:
    """A way to a guarantee for the records of the private data.

    Attributes:
        train: makes the teacher and says whether it was `"trained"` or `"cached"`.
        build: makes the transcriber of a teacher and a prior.
    """

    train: Callable[[ExampleConfig, ImageDataset], tuple[dpt.Teacher, str]]
    build: Callable[..., dpt.DPTranscriber]


def shard_teachers(
    config: ExampleConfig, dataset: ImageDataset
) -> tuple[dpt.Teacher, str]:
    """One teacher for each of many disjoint shards, kept one by one as they are made.

    Each is ridge regression on public scattering features. More teachers carry their
    votes over more noise and know less: their number follows from epsilon, which is
    public.
    """
    most = len(dataset.train_images) // LEAST_IN_SHARD
    usual = next(k for limit, k in SHARDS if config.epsilon <= limit)
    shards = min(usual, most) if config.shards is None else config.shards
    _validate.in_range("shards", shards, 2, most)
    fit = RidgeFit()
    facts = (shards, fit, FEATURES)
    folder = cached_path(config, dataset, facts).with_suffix("")
    source = "cached" if folder.exists() else "trained"
    print(f"Preparing {shards} teachers on disjoint shards of {dataset.name}.")
    prior = public_prior(config, dataset.image_shape)
    ensemble = dpt.train_shard_teachers(
        functools.partial(linear_member, FEATURES, dataset.num_classes),
        (dataset.train_images, np.asarray(dataset.train_labels)),
        shards=shards,
        features=scattering_features(prior, dataset.image_shape, rank=FEATURES),
        fit=fit,
        folder=folder,
    )
    return ensemble, source


ROUTES = {
    "dp_teacher": Route(private_teacher, dpt.transcribe_private_teacher),
    "votes": Route(shard_teachers, dpt.pate),
    "gradient": Route(shard_teachers, dpt.pate_gradient),
}


def build(config: ExampleConfig, teacher: dpt.Teacher) -> dpt.DPTranscriber:
    """The method's transcriber, with a prior that suits the kind of images."""
    if config.seed is not None:
        keras.utils.set_random_seed(config.seed % 2**32)  # of the initial weights
    prior = public_prior(config, teacher.input_shape, teacher.input_range)
    print(f"Preparing {config.way}: queries come from public processes.")
    settings: dict[str, Any] = {"seed": config.seed, **config.schedule}
    if config.unit == "record":
        return ROUTES[config.way].build(teacher, prior, **settings)
    if config.way == "dpdfd":
        settings = OWN_SETTINGS.get(config.dataset, {}) | settings
    return BUILDERS[config.way](teacher, prior, **settings)


def transcribe(run: Transcription) -> bool:
    """Runs what is left of the schedule; returns whether Ctrl-C ended it."""
    transcriber, config = run.transcriber, run.recorder.facts["config"]
    if run.recorder.epochs_done >= transcriber.schedule[0]:
        return False
    try:
        transcriber.fit(
            target_epsilon=config["epsilon"],
            delta=config["delta"],
            accountant=config["accountant"],
            initial_epoch=run.recorder.epochs_done,
            callbacks=[run.recorder],
        )
    except ValueError as error:
        if transcriber.ledger.entries and not isinstance(
            error, dpt.BudgetExceededError
        ):
            raise
        raise RefusedError(str(error)) from error
    except KeyboardInterrupt:
        if not transcriber.ledger.entries:
            raise
        # Before anything is written from it: noise that was used is never used again.
        run.recorder.save()
        return True
    return False


def write_results(folder: Path, run: Transcription, *, interrupted: bool) -> dict:
    """Writes everything that belongs to the student as it is now."""
    transcriber, recorder = run.transcriber, run.recorder
    seconds = recorder.seconds
    reporting.finalize(transcriber)
    statements = transcriber.privacy_statements()
    dpt.export_student(transcriber, folder / STUDENT, overwrite=True)
    reporting.write_text(folder / "statement.txt", statements_text(statements))
    report = make_report(run, statements, seconds=seconds, interrupted=interrupted)
    samples = reporting.draw_samples(transcriber)
    reporting.plot_samples(folder / "samples.png", samples)
    reporting.plot_curve(
        folder / "curve.png",
        recorder.history,
        teacher_accuracy=report["teacher"]["test_accuracy"],
        unit=statements[0].unit,
    )
    reporting.write_json(folder / "report.json", report)
    return report


def make_report(
    run: Transcription,
    statements: tuple[dpt.PrivacyStatement, ...],
    *,
    seconds: float,
    interrupted: bool,
) -> dict[str, Any]:
    """What report.json holds; accuracies and agreement are fractions."""
    statement, *others = statements
    facts, dataset = run.recorder.facts, run.dataset
    config = ExampleConfig(**facts["config"])
    images, labels = dataset.test_images, dataset.test_labels
    by_teacher = run.transcriber.teacher.predict(images).argmax(axis=-1)
    by_student = reporting.predict_classes(run.transcriber.student, images)
    of_teacher = dict(facts["teacher"])
    seconds_of_teacher = of_teacher.pop("seconds")
    return {
        "dataset": dataset.name,
        "dataset_source": dataset.source,
        "unit": statement.unit.value,
        "method": config.way,
        "seed": run.transcriber.seed,
        "interrupted": interrupted,
        "teacher": {
            **of_teacher,
            "test_accuracy": fraction(by_teacher == labels),
        },
        "student": {
            "test_accuracy": fraction(by_student == labels),
            "agreement": fraction(by_student == by_teacher),
        },
        "statement": statement.to_dict(),
        "statements_beside": [other.to_dict() for other in others],
        "releases": run.transcriber.ledger.releases(statement.unit),
        "seconds": {
            "teacher": seconds_of_teacher,
            "transcribe": seconds,
            "total": seconds_of_teacher + seconds,
        },
        "schedule": dict(zip(SCHEDULE, run.transcriber.schedule, strict=True)),
        "history": run.recorder.history,
        "versions": statement.versions,
        "note": NOTE,
    }


def fraction(hits: np.ndarray) -> float:
    """Part of `hits` that is true."""
    return float(np.mean(hits))


def summary(report: dict[str, Any], folder: Path) -> str:
    """What the user sees at the end."""
    statement = (folder / "statement.txt").read_text(encoding="utf-8")
    headline, protection = statement.split("\n\n")[:2]
    teacher, student = report["teacher"], report["student"]
    lines = [
        f"{headline}\n\n{protection}\n",
        f"{report['dataset']} ({report['dataset_source']}), {report['method']}, "
        f"{report['seconds']['total']:.0f} s",
        f"  teacher  {teacher['test_accuracy']:7.2%} of the test images"
        + (
            f", assistant of one with {teacher['assisted_test_accuracy']:.2%}"
            if "assisted_test_accuracy" in teacher
            else ""
        ),
        f"  student  {student['test_accuracy']:7.2%}, and {student['agreement']:.2%} "
        "agreement with the teacher",
        f"Results: {folder}/ (report.json, statement.txt, samples.png, curve.png)",
        f"Release: {folder / STUDENT} and nothing else; checkpoint.keras, if there is "
        "one, holds the teacher.",
    ]
    for other in report["statements_beside"]:
        lines.append(
            f"Beside it, by the teacher's own guarantee: epsilon "
            f"{other['epsilon']:.4g} per unit {other['unit']} at delta "
            f"{other['delta']:g}."
        )
    if report["seed"] is not None:
        lines.append(f"NOT for release: the noise follows from seed {report['seed']}.")
    if report["interrupted"]:
        lines.append("Interrupted; the same command with --resume goes on from here.")
    return "\n".join(lines)


def define_flags() -> None:
    """Declares the flags, one for each field of `ExampleConfig`."""
    default = ExampleConfig()
    flags.DEFINE_float(
        "epsilon", default.epsilon, "Target, for an answer or for a record."
    )
    flags.DEFINE_float("delta", default.delta, "Target, strictly between 0 and 1.")
    flags.DEFINE_enum(
        "accountant", default.accountant, list(ACCOUNTANTS), "pld is tighter."
    )
    flags.DEFINE_enum("unit", default.unit, list(UNITS), "What epsilon protects.")
    flags.DEFINE_enum(
        "method",
        None,
        list(BUILDERS),
        "Published method, unit response; by default dpdfd.",
    )
    flags.DEFINE_enum(
        "route",
        None,
        list(ROUTES),
        "Where unit record comes from; by default dp_teacher.",
    )
    flags.DEFINE_integer(
        "shards", None, "Teachers of the routes votes and gradient; by epsilon else."
    )
    flags.DEFINE_enum("dataset", default.dataset, list(DATASETS), "Data set.")
    flags.DEFINE_string(
        "data_dir", None, "Folder in which tensorflow-datasets has prepared it."
    )
    flags.DEFINE_string(
        "teacher",
        None,
        ".keras file or SavedModel; skips training. For unit record its statement lies "
        "beside it.",
    )
    flags.DEFINE_string(
        "teacher_range",
        None,
        "low,high: pixels that the given teacher takes, and so will the student; by "
        "default 0,1.",
    )
    flags.DEFINE_enum(
        "teacher_network",
        None,
        list(RECIPES),
        "Of the teacher trained here, unit response; by default what suits the data.",
    )
    flags.DEFINE_bool(
        "assistant",
        default.assistant,
        "Transcribe, in the teacher's place, a network of wavelets that learnt its "
        "answers to the training images: much of the way if it is a ConvNet.",
    )
    flags.DEFINE_string("output_dir", None, "By default output/<what is run>.")
    flags.DEFINE_integer("seed", None, "For tests; the noise is secret without it.")
    flags.DEFINE_integer("epochs", None, "By default the method's.")
    flags.DEFINE_integer("steps_per_epoch", None, "By default the method's.")
    flags.DEFINE_string("cache_dir", default.cache_dir, "Where teachers are kept.")
    flags.DEFINE_bool("resume", False, "Go on from the output folder's checkpoint.")


def main(argv: list[str]) -> None:
    """Runs the example from the command line."""
    del argv
    names = [field.name for field in dataclasses.fields(ExampleConfig)]
    try:
        with refusing():
            config = ExampleConfig(**{name: flags.FLAGS[name].value for name in names})
        report = run(config)
    except RefusedError as error:
        refuse(error)
    except KeyboardInterrupt as error:
        message = str(error) or "Interrupted: nothing was released."
        print(f"\n{message}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    print(f"\n{summary(report, config.folder)}")
    if report["interrupted"]:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
