"""Attacks an overfit teacher and two students, and audits every method with canaries.

    python examples/audit.py --epsilon=1

trains a teacher that knows 2,000 images by heart and transcribes it: its student's
epsilon is per answer, which is no guarantee for the people in the 2,000 images. The
record student learns from a teacher that was trained on the same images under
differential privacy, and has one. Writes audit.json and audit.png: membership inference
against all three, model inversion of them, and for every method a lower bound on its
epsilon beside the epsilon that it claims.
"""

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # says that there is no GPU

import keras
import numpy as np
from absl import app, flags

import dp_transcribe as dpt
from dp_transcribe import _validate
from dp_transcribe.auditing import invert_models
from dp_transcribe.data import DATASETS, PRIOR_DOMAINS, ImageDataset, load_dataset
from dp_transcribe.distillation import Distillation, kernel_for_domain
from dp_transcribe.evaluation import (
    AuditResult,
    Inversion,
    ask,
    audit_class_means,
    audit_dpkip,
    audit_ensemble_gradient,
    audit_linear_model,
    audit_private_teacher,
    audit_responses,
    audit_votes,
    strongest_attack,
)
from dp_transcribe.evaluation.membership import never_seen
from dp_transcribe.evaluation.report import (
    audit_report,
    draw_audit,
    summary,
    table,
)
from dp_transcribe.generators import MLPGenerator
from dp_transcribe.generators.priors import default_prior
from dp_transcribe.mechanisms import (
    ClippedGradient,
    NormalizedGradient,
    NormalizedOutputGradient,
    RandomizedResponse,
    SelectiveRandomizedResponse,
)
from dp_transcribe.programs import parse_flags, refuse
from dp_transcribe.queries import FreshQueries
from dp_transcribe.reporting import write_json

TINY = (8, 8, 1)
# Images that no model was trained on, for the membership attacks.
STRANGERS = 5000
# Mechanisms as no method of its own has them.
OTHERS = {
    "NormalizedGradient, fresh": NormalizedGradient(),
    "ClippedGradient, fresh": ClippedGradient(),
    "NormalizedOutputGradient": NormalizedOutputGradient(),
    "RandomizedResponse": RandomizedResponse(),
}

FLAGS = flags.FLAGS
flags.DEFINE_float("epsilon", 1.0, "Target of transcription and audits.")
flags.DEFINE_float("delta", 1e-5, "Target, strictly between 0 and 1.")
flags.DEFINE_enum("method", "dpsd_data", list(dpt.METHODS), "Of the transcription.")
flags.DEFINE_enum("dataset", "mnist", list(DATASETS), "Data set.")
flags.DEFINE_string("data_dir", None, "Folder prepared by tensorflow-datasets.")
flags.DEFINE_string("output_dir", "output/audit", "Where the results go.")
flags.DEFINE_integer("train_images", 2000, "The teacher learns by heart.", 10)
flags.DEFINE_integer("teacher_epochs", 60, "Of the teacher.", 1)
flags.DEFINE_integer("shadows", 0, "Shadow models for LiRA; 2 or more, or none.", 0)
flags.DEFINE_integer("epochs", 2, "Of the transcription.", 1)
flags.DEFINE_integer("steps_per_epoch", 10, "Of the transcription.", 1)
flags.DEFINE_integer("canaries", 4000, "Of every canary audit.", 100)
flags.DEFINE_integer("inversion_steps", 200, "Of model inversion.", 1)
flags.DEFINE_integer("seed", None, "For tests; secret without it.")


def overfit(images: np.ndarray, labels: np.ndarray, classes: int) -> keras.Model:
    """A network that knows its training images by heart."""
    model = dense_network(images.shape[1:], classes, units=256)
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    epochs = FLAGS.teacher_epochs
    model.fit(images, labels, batch_size=64, epochs=epochs, verbose=0)
    return model


def dense_network(shape: tuple[int, ...], classes: int, *, units: int) -> keras.Model:
    """One hidden layer, ending in logits."""
    return keras.Sequential(
        [
            keras.layers.Input(shape),
            keras.layers.Flatten(),
            keras.layers.Dense(units, activation="relu"),
            keras.layers.Dense(classes),
        ]
    )


def transcribed(teacher: dpt.Teacher, dataset: ImageDataset) -> dpt.DPTranscriber:
    """The teacher's student, by the method and in the schedule that the flags say."""
    prior = default_prior(teacher.input_shape, domain=PRIOR_DOMAINS[dataset.name])
    transcriber = dpt.METHODS[FLAGS.method](
        teacher,
        prior,
        student=dense_network(teacher.input_shape, teacher.num_classes, units=128),
        generator=MLPGenerator(teacher.input_shape),
        epochs=FLAGS.epochs,
        steps_per_epoch=FLAGS.steps_per_epoch,
        seed=FLAGS.seed,
    )
    transcriber.fit(target_epsilon=FLAGS.epsilon, delta=FLAGS.delta, verbose=2)
    return transcriber


def transcribed_for_records(dataset: ImageDataset) -> dpt.DPTranscriber:
    """The student of a private teacher of the same images, in the same schedule."""
    domain, count = PRIOR_DOMAINS[dataset.name], FLAGS.train_images
    prior = default_prior(dataset.image_shape, domain=domain)
    teacher = dpt.fit_scattering_teacher(
        dataset.train_images[:count],
        dataset.train_labels[:count],
        num_classes=dataset.num_classes,
        source=prior,
        target_epsilon=FLAGS.epsilon,
        delta=FLAGS.delta,
        kernel=kernel_for_domain(domain, dataset.image_shape),
        settings=Distillation.for_domain(domain),
        seed=FLAGS.seed,
    )
    transcriber = dpt.transcribe_private_teacher(
        teacher,
        prior,
        epochs=FLAGS.epochs,
        steps_per_epoch=FLAGS.steps_per_epoch,
        seed=FLAGS.seed,
    )
    transcriber.fit(verbose=2)
    return transcriber


def shuffled(dataset: ImageDataset) -> ImageDataset:
    """The data set with its training images in another order, always the same one.

    The first of them may differ from the last: of MNIST's, models that saw neither
    tell them apart (AUC 0.52), which an attack would take for membership.
    """
    order = np.random.default_rng(0).permutation(len(dataset.train_images))
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[order],
        train_labels=dataset.train_labels[order],
    )


def check_shadows(dataset: ImageDataset) -> None:
    """Refuses shadow models that are too few, or whose images are not there."""
    most = len(dataset.train_images) // FLAGS.train_images - 1
    if FLAGS.shadows == 1 or FLAGS.shadows > most:
        expected = f"0, or from 2 to {most}, each with {FLAGS.train_images} images"
        mend = "Fewer `--train_images` leave more for others."
        raise _validate.invalid("shadows", FLAGS.shadows, expected, mend)


def membership(models: dict[str, dpt.Teacher], dataset: ImageDataset) -> dict[str, Any]:
    """The strongest membership attack on each model."""
    count = FLAGS.train_images
    seen = dataset.train_images[:count], dataset.train_labels[:count]
    unseen = never_seen(dataset, (FLAGS.shadows + 1) * count, STRANGERS)
    shadows = []
    for number in range(1, FLAGS.shadows + 1):
        own = slice(number * count, (number + 1) * count)
        shadow = overfit(
            dataset.train_images[own],
            dataset.train_labels[own],
            dataset.num_classes,
        )
        predict = dpt.Teacher(shadow, outputs="logits").predict
        shadows.append(ask(predict, seen, unseen))
    return {
        name: strongest_attack(ask(model.predict, seen, unseen), shadows)
        for name, model in models.items()
    }


def released_by(method: str) -> tuple[Any, Any]:
    """Mechanism and queries of a method, which needs a tiny teacher to be built."""
    prior = default_prior(TINY, domain="strokes")
    parts = {"student": dense_network(TINY, 10, units=4)}
    parts["generator"] = MLPGenerator(TINY, units=(8,))
    teacher = dpt.Teacher(dense_network(TINY, 10, units=4), outputs="logits")
    if method == "srr":  # it would train the generator by the teacher
        return SelectiveRandomizedResponse(smoothing=0.5), FreshQueries()
    built = dpt.METHODS[method](teacher, prior, **parts)
    return built.mechanism, built.queries


def canary_audits() -> list[tuple[str, AuditResult]]:
    """Audits of every method and mechanism of the library."""
    terms = {
        "target_epsilon": FLAGS.epsilon,
        "delta": FLAGS.delta,
        "canaries": FLAGS.canaries,
        "seed": FLAGS.seed,
    }
    audits = []
    for name in dpt.METHODS:
        audits.append((name, audit_responses(*released_by(name), **terms)))
    for name, mechanism in OTHERS.items():
        audits.append((name, audit_responses(mechanism, **terms)))
    few = {**terms, "canaries": min(FLAGS.canaries, 2000)}
    audits.append(("distillation, linear", audit_linear_model(**few)))
    audits.append(("distillation, class means", audit_class_means(**few)))
    audits.append(("distillation, DP-KIP", audit_dpkip(**{**few, "canaries": 400})))
    audits.append(("private teacher", audit_private_teacher(**few)))
    audits.append(("votes", audit_votes(**terms)))
    audits.append(("gradients of teachers", audit_ensemble_gradient(**terms)))
    return audits


def run() -> dict[str, Any]:
    """Runs everything and writes the results.

    Returns:
        The report, as it is in audit.json.
    """
    _validate.positive_finite("epsilon", FLAGS.epsilon)
    _validate.fraction_open("delta", FLAGS.delta)
    folder = _validate.writable_dir("output_dir", FLAGS.output_dir)
    dataset = shuffled(load_dataset(FLAGS.dataset, FLAGS.data_dir))
    check_shadows(dataset)
    if FLAGS.seed is not None:
        keras.utils.set_random_seed(FLAGS.seed % 2**32)
    count = FLAGS.train_images
    model = overfit(
        dataset.train_images[:count], dataset.train_labels[:count], dataset.num_classes
    )
    teacher = dpt.Teacher(model, outputs="logits")
    transcribers = {
        "student": transcribed(teacher, dataset),
        "record_student": transcribed_for_records(dataset),
    }
    models = {"teacher": teacher} | {
        name: dpt.Teacher(transcriber.student, outputs="logits")
        for name, transcriber in transcribers.items()
    }
    found = membership(models, dataset)
    audits = canary_audits()
    steps = FLAGS.inversion_steps
    inversion = invert_models(models, dataset, folder, Inversion(steps=steps))
    print(table(audits))
    return write_results(folder, dataset, models, found, audits, inversion)


def write_results(
    folder: Path,
    dataset: ImageDataset,
    models: dict[str, dpt.Teacher],
    found: dict[str, Any],
    audits: list[tuple[str, AuditResult]],
    inversion: dict[str, Any],
) -> dict[str, Any]:
    """Writes audit.json and audit.png; the first keys are of the method transcribed."""
    test = dataset.test_images, dataset.test_labels
    report = audit_report(
        dict(audits)[FLAGS.method],
        found,
        inversion=inversion,
        test_accuracy={name: m.accuracy(*test) for name, m in models.items()},
        audits={name: result.to_dict() for name, result in audits},
        dataset_source=dataset.source,
    )
    draw_audit(folder / "audit.png", audits, found)
    write_json(folder / "audit.json", report)
    print(summary(report, str(folder)))
    return report


def main(argv: list[str]) -> None:
    """Runs the example; complaints about what was given are one line."""
    del argv
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        report = run()
    except (ValueError, OSError) as error:
        refuse(error)
    if any(audit["flagged"] for audit in report["audits"].values()):
        sys.exit("A lower bound is above its claim, or shards overlap: do not release.")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
