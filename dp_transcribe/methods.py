"""The methods, one call each, with defaults that work.

The published ones, and the routes to a guarantee for the records of the teacher.

Each returns a compiled `DPTranscriber`; call its `fit` with a target epsilon.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

from dp_transcribe import _validate
from dp_transcribe.ensembles import TeacherEnsemble
from dp_transcribe.generators.base import ProceduralGenerator
from dp_transcribe.generators.conv_generator import ConvGenerator
from dp_transcribe.generators.pretraining import pretrain
from dp_transcribe.generators.trainable import TrainableGenerator
from dp_transcribe.guidance import pretrain_by_teacher
from dp_transcribe.losses.objective import GeneratorObjective
from dp_transcribe.mechanisms.base import Mechanism
from dp_transcribe.mechanisms.ensemble_gradient import EnsembleGradient
from dp_transcribe.mechanisms.inherited import Inherited
from dp_transcribe.mechanisms.noisy_answer import NoisyAnswer
from dp_transcribe.mechanisms.noisy_votes import NoisyVotes
from dp_transcribe.mechanisms.randomized_response import SelectiveRandomizedResponse
from dp_transcribe.mechanisms.weight_gradient import NormalizedGradient
from dp_transcribe.privacy.inheritance import check_inheritable
from dp_transcribe.queries import FreshQueries, Queries, QueryPool
from dp_transcribe.teachers import Teacher, as_teacher
from dp_transcribe.transcriber import DPTranscriber
from dp_transcribe.transcriber.compatibility import (
    check_can_learn,
    check_queries,
    check_source,
)
from dp_transcribe.wavelets import wavelet_student, whitening_images

# A generator is pretrained on the prior by so many updates.
PRETRAINING_STEPS = 300
REPLAY_SIZE = 2**21
SMOOTHING, NOISY_SMOOTHING = 0.5, 0.3
# Keeps the head from learning noise by heart.
WEIGHT_DECAY = 0.5
# The head of a wavelet student.
HIDDEN: dict[str, Any] = {"units": (512,)}
LINEAR: dict[str, Any] = {"units": ()}


@dataclasses.dataclass(frozen=True)
class Pace:
    """When the student of released answers rests and is asked, in shares of a run.

    Attributes:
        rests: begin and end of each rest. A student that learns from few noisy answers
            learns their noise by heart.
        uniform: until then queries are answered among all classes: candidates of a
            student that knows little leave the truth out.
    """

    rests: tuple[tuple[float, float], ...]
    uniform: float


# The student learns for a while in between, to choose candidates from then on.
TWO_RESTS = Pace(rests=((0.0, 0.4), (0.45, 0.8)), uniform=0.45)
ONE_REST = Pace(rests=((0.0, 0.8),), uniform=0.9)
NO_REST = Pace(rests=(), uniform=0.9)


def dpdfd(
    teacher: Teacher | Any,
    prior: ProceduralGenerator,
    *,
    student: keras.Model | None = None,
    generator: TrainableGenerator | None = None,
    pool_size: int = 500_000,
    batch_size: int = 4096,
    units: Sequence[int] = (128,),
    epochs: int = 10,
    steps_per_epoch: int = 30,
    seed: int | None = None,
) -> DPTranscriber:
    """DPDFD: normalised, noised weight gradients; the student guides the generator.

    Args:
        teacher: a `Teacher`, or what `Teacher` takes.
        prior: public source of most queries; a new generator is pretrained on it.
        student: logits `[batch, classes]`; a `wavelet_student` by default. Noise grows
            with the number of weights that learn: a student of your own does best
            with few, and its classes are balanced (see `DPTranscriber`).
        generator: a trainable generator; by default a pretrained `ConvGenerator`.
        pool_size: queries, all asked before the first update. Twice as many let the
            batch be twice as large at the same cost.
        batch_size: expected number of queries per update.
        units: hidden layers of the default student's head. A wider one learns more
            where noise is small: from large pools, in large batches.
        epochs: of the default schedule.
        steps_per_epoch: of the default schedule, each of five updates.
        seed: None for secret noise.

    Returns:
        A compiled transcriber; `fit(target_epsilon=...)` does the rest.

    **Privacy**: unit `RESPONSE`. Student and generator are covered.

    References:
        arXiv:2304.12528. The pool of queries, the public prior and the averaged
        iterates are this library's.
    """
    teacher = _checked(teacher, prior, student, epochs, steps_per_epoch)
    _validate.positive_int("pool_size", pool_size)
    _validate.positive_int("batch_size", batch_size)
    balance_classes = student is not None
    updates = 5
    total = epochs * steps_per_epoch * updates
    least = -(-pool_size // batch_size)
    pool = QueryPool(size=pool_size, batch_size=batch_size, updates=max(total, least))
    if student is None:
        student = _wavelet_student(teacher, prior, {"units": units})
    else:
        check_queries(pool, NormalizedGradient(), 1, student)
    rate = keras.optimizers.schedules.CosineDecay(1.0, total, alpha=0.05)
    return _transcriber(
        teacher,
        prior,
        student,
        generator or _pretrained(teacher, prior, seed),
        NormalizedGradient(),
        pool,
        keras.optimizers.SGD(rate, momentum=0.9, use_ema=True, ema_momentum=0.98),
        schedule=(epochs, steps_per_epoch),
        student_updates=updates,
        balance_classes=balance_classes,
        seed=seed,
    )


def srr(
    teacher: Teacher | Any,
    prior: ProceduralGenerator,
    *,
    student: keras.Model | None = None,
    generator: TrainableGenerator | None = None,
    epochs: int = 10,
    steps_per_epoch: int = 50,
    seed: int | None = None,
) -> DPTranscriber:
    """Selective randomised response with a teacher-guided, then frozen generator.

    Args:
        teacher: a `Teacher`, or what `Teacher` takes.
        prior: public source of most queries; a new generator is pretrained on it.
        student: logits `[batch, classes]`; a `wavelet_student` by default.
        generator: a trainable generator; it is guided by the teacher here.
        epochs: of the default schedule.
        steps_per_epoch: of the default schedule.
        seed: None for secret noise.

    Returns:
        A compiled transcriber; `fit(target_epsilon=...)` does the rest.

    **Privacy**: unit `RESPONSE`, pure epsilon. The student is covered. The generator
    was trained with the teacher's gradients: it is **not** covered, the statement
    says so and `export_generator` refuses it.

    References:
        arXiv:2409.12384; randomised response of arXiv:2102.06062.
    """
    teacher = _checked(teacher, prior, student, epochs, steps_per_epoch)
    generator = generator or _pretrained(teacher, prior, seed)
    check_source("generator", generator, teacher, trained=True)
    pretrain_by_teacher(generator, teacher, steps=PRETRAINING_STEPS, seed=seed or 0)
    return _by_answers(
        teacher,
        prior,
        student,
        generator,
        SelectiveRandomizedResponse(smoothing=SMOOTHING),
        schedule=(epochs, steps_per_epoch),
        generator_updates=0,
        generator_covered=False,
        weight_decay=WEIGHT_DECAY,
        pace=TWO_RESTS,
        head=HIDDEN,
        seed=seed,
    )


def dpsd(
    teacher: Teacher | Any,
    prior: ProceduralGenerator,
    *,
    protect: str = "data",
    student: keras.Model | None = None,
    generator: TrainableGenerator | None = None,
    epochs: int = 10,
    steps_per_epoch: int = 50,
    seed: int | None = None,
) -> DPTranscriber:
    """DPSD: noisy answers or labels; the student guides the generator.

    Args:
        teacher: a `Teacher`, or what `Teacher` takes.
        prior: public source of most queries; a new generator is pretrained on it.
        protect: "data" adds Gaussian noise to the answer, "label" is randomised
            response among the student's likeliest classes.
        student: logits `[batch, classes]`; a `wavelet_student` by default.
        generator: a trainable generator; by default a pretrained `ConvGenerator`.
        epochs: of the default schedule.
        steps_per_epoch: of the default schedule.
        seed: None for secret noise.

    Returns:
        A compiled transcriber; `fit(target_epsilon=...)` does the rest.

    **Privacy**: unit `RESPONSE`, with "label" pure epsilon. Student and generator are
    covered.

    References:
        arXiv:2601.19090.
    """
    mechanisms: dict[str, Mechanism] = {
        "data": NoisyAnswer(smoothing=NOISY_SMOOTHING),
        "label": SelectiveRandomizedResponse(smoothing=SMOOTHING),
    }
    mechanism = mechanisms[_validate.one_of("protect", protect, mechanisms)]
    teacher = _checked(teacher, prior, student, epochs, steps_per_epoch)
    return _by_answers(
        teacher,
        prior,
        student,
        generator or _pretrained(teacher, prior, seed),
        mechanism,
        schedule=(epochs, steps_per_epoch),
        weight_decay=WEIGHT_DECAY,
        # Fewer candidates make a label far clearer, a noisy answer hardly.
        pace=TWO_RESTS if protect == "label" else ONE_REST,
        head=HIDDEN,
        seed=seed,
    )


# The published ones, by name.
METHODS: dict[str, Callable[..., DPTranscriber]] = {
    "dpdfd": dpdfd,
    "srr": srr,
    "dpsd_data": functools.partial(dpsd, protect="data"),
    "dpsd_label": functools.partial(dpsd, protect="label"),
}


def transcribe_private_teacher(
    teacher: Teacher | Any,
    prior: ProceduralGenerator,
    *,
    student: keras.Model | None = None,
    generator: Any = None,
    temperature: float = 1.0,
    epochs: int = 10,
    steps_per_epoch: int = 50,
    seed: int | None = None,
) -> DPTranscriber:
    """A guarantee for people: the student inherits that of a private teacher.

    Args:
        teacher: a `Teacher` with a statement, as `fit_private_teacher` and
            `fit_scattering_teacher` return it and `load_teacher` reads it.
        prior: public source of the queries.
        student: logits `[batch, classes]`; a `wavelet_student` by default.
        generator: a trainable generator of a tenth of the queries, which may be guided
            by the teacher; by default the prior makes them all.
        temperature: see `Inherited`.
        epochs: of the default schedule.
        steps_per_epoch: of the default schedule.
        seed: None for fresh queries in every run.

    Returns:
        A compiled transcriber; call its `fit`, with a target epsilon or without.

    **Privacy**: unit `RECORD`; the teacher's own statement. Nothing is spent. Student
    and generator are covered.

    Raises:
        ValueError: the teacher has no statement.
    """
    teacher = _checked(teacher, prior, student, epochs, steps_per_epoch)
    statement = check_inheritable(teacher.statement, "teacher.statement")
    return _by_answers(
        teacher,
        prior,
        student,
        generator or prior,
        Inherited(statement, temperature),
        # No noise is there to be learnt by heart, however many the weights.
        head={"directions": 1000, "units": (256,)},
        schedule=(epochs, steps_per_epoch),
        batch_size=512,
        learning_rate=2e-3,
        updates=8,
        pace=NO_REST,
        seed=seed,
    )


def pate(
    ensemble: TeacherEnsemble,
    prior: ProceduralGenerator,
    *,
    release: str = "votes",
    threshold: float | None = None,
    threshold_ratio: float = 2.0,
    student: keras.Model | None = None,
    generator: Any = None,
    epochs: int = 10,
    steps_per_epoch: int = 4,
    seed: int | None = None,
) -> DPTranscriber:
    """A guarantee for people: the noisy votes of teachers on disjoint shards.

    Args:
        ensemble: from `train_shard_teachers`.
        prior: public source of the queries.
        release: "votes" keeps the noisy counts, "label" only the class that leads
            (GNMax as published). The cost is the same.
        threshold: votes that the leading class needs, noise added, for an answer
            (Confident-GNMax); None answers every query. See `NoisyVotes`.
        threshold_ratio: noise of that check over the votes' noise, both in multiples
            of their sensitivities; the larger, the cheaper and the vaguer the check.
        student: logits `[batch, classes]`; a `wavelet_student` by default.
        generator: a trainable generator of a tenth of the queries, guided by the
            student; by default the prior makes them all.
        epochs: of the default schedule.
        steps_per_epoch: of the default schedule; each answers 512 queries.
        seed: None for secret noise.

    Returns:
        A compiled transcriber; `fit(target_epsilon=...)` does the rest.

    **Privacy**: unit `RECORD`, replace-one. Every query answered is a release and all
    of them compose; an answer is replayed as often as wanted at no cost. With a
    threshold every query asked counts as answered, and its check is one more release:
    the same epsilon has more noise. Student and generator are covered.

    References:
        arXiv:1610.05755, arXiv:1802.08908, with random processes in place of the real
        images that PATE asks about.
    """
    num_teachers = _num_teachers(ensemble)
    _checked(ensemble, prior, student, epochs, steps_per_epoch)
    return _by_answers(
        ensemble,
        prior,
        student,
        generator or prior,
        NoisyVotes(
            num_teachers=num_teachers,
            released=release,
            threshold=threshold,
            threshold_ratio=threshold_ratio,
        ),
        head=LINEAR,
        schedule=(epochs, steps_per_epoch),
        batch_size=512,
        updates=64,
        seed=seed,
    )


def pate_gradient(
    ensemble: TeacherEnsemble,
    prior: ProceduralGenerator,
    *,
    student: keras.Model | None = None,
    generator: Any = None,
    epochs: int = 10,
    steps_per_epoch: int = 20,
    seed: int | None = None,
) -> DPTranscriber:
    """As `pate`, but each teacher hands over one bounded gradient per update.

    Args:
        ensemble: from `train_shard_teachers`.
        prior: public source of the queries.
        student: logits `[batch, classes]`; a `wavelet_student` by default.
        generator: a trainable generator of a tenth of the queries, guided by the
            student; by default the prior makes them all.
        epochs: of the default schedule.
        steps_per_epoch: of the default schedule, each one update.
        seed: None for secret noise.

    Returns:
        A compiled transcriber; `fit(target_epsilon=...)` does the rest.

    **Privacy**: unit `RECORD`, replace-one; every update is a release and all of them
    compose. Student and generator are covered.
    """
    num_teachers = _num_teachers(ensemble)
    _checked(ensemble, prior, student, epochs, steps_per_epoch)
    if student is None:
        student = _wavelet_student(ensemble, prior, LINEAR)
    rate = keras.optimizers.schedules.CosineDecay(
        1e-2, epochs * steps_per_epoch, alpha=0.05
    )
    return _transcriber(
        ensemble,
        prior,
        student,
        generator or prior,
        EnsembleGradient(num_teachers=num_teachers),
        FreshQueries(batch_size=256),
        keras.optimizers.Adam(rate, use_ema=True, ema_momentum=0.95),
        schedule=(epochs, steps_per_epoch),
        seed=seed,
    )


def _checked(
    teacher: Any, prior: Any, student: Any, epochs: int, steps_per_epoch: int
) -> Teacher:
    """The teacher that prior and student fit; before minutes of pretraining."""
    teacher = as_teacher(teacher)
    check_source("prior", prior, teacher)
    if student is not None:
        check_can_learn(student, teacher)
    _validate.positive_int("epochs", epochs)
    _validate.positive_int("steps_per_epoch", steps_per_epoch)
    return teacher


def _num_teachers(ensemble: TeacherEnsemble) -> int:
    mend = "Train one with `train_shard_teachers`."
    return _validate.instance_of(
        "ensemble", ensemble, TeacherEnsemble, mend
    ).num_teachers


def _by_answers(
    teacher: Any,
    prior: ProceduralGenerator,
    student: keras.Model | None,
    generator: Any,
    mechanism: Mechanism,
    *,
    schedule: tuple[int, int],
    batch_size: int = 2048,
    learning_rate: float = 4e-3,
    weight_decay: float = 0.0,
    updates: int = 16,
    pace: Pace = ONE_REST,
    head: dict[str, Any],
    seed: int | None,
    **kwargs: Any,
) -> DPTranscriber:
    """What the methods share that release every answer by itself."""
    if student is None:
        student = _wavelet_student(teacher, prior, head)
    epochs, steps_per_epoch = schedule
    steps = epochs * steps_per_epoch
    turns = _turns(pace, steps)
    rate = _decay_between(learning_rate, turns, steps, updates)
    return _transcriber(
        teacher,
        prior,
        student,
        generator,
        mechanism,
        FreshQueries(batch_size=batch_size),
        keras.optimizers.Adam(
            rate, weight_decay=weight_decay or None, use_ema=True, ema_momentum=0.99
        ),
        schedule=schedule,
        student_updates=updates,
        replay_size=min(REPLAY_SIZE, steps * batch_size),
        replay_batch_size=batch_size,
        uniform_prior_queries=int(pace.uniform * steps) * batch_size,
        rests=[(a * batch_size, b * batch_size) for a, b in turns],
        seed=seed,
        **kwargs,
    )


def _turns(pace: Pace, steps: int) -> list[tuple[int, int]]:
    """First step of each rest and the first one after it; in short runs rests meet."""
    turns: list[tuple[int, int]] = []
    for share, end in pace.rests:
        first, last = int(share * steps), int(end * steps)
        if turns and first <= turns[-1][1]:
            first, _ = turns.pop()
        if first < last:
            turns.append((first, last))
    return turns


def _decay_between(
    learning_rate: float, rests: list[tuple[int, int]], steps: int, updates: int
) -> keras.optimizers.schedules.LearningRateSchedule:
    """A cosine decay in the time before, between and after the rests, each anew.

    Args:
        learning_rate: where each decay begins.
        rests: first step of each, and the first one after it.
        steps: of the run.
        updates: of the student in every step that is no rest.
    """
    ends = [0, *(last for _, last in rests)]
    begins = [*(first for first, _ in rests), steps]
    pieces = [(b - a) * updates for a, b in zip(ends, begins, strict=True) if b > a]
    if len(pieces) == 1:
        return keras.optimizers.schedules.CosineDecay(
            learning_rate, pieces[0], alpha=0.02
        )
    first, second = pieces
    return keras.optimizers.schedules.CosineDecayRestarts(
        learning_rate, first, t_mul=second / first, alpha=0.02
    )


def _transcriber(
    teacher: Any,
    prior: ProceduralGenerator,
    student: keras.Model | None,
    generator: Any,
    mechanism: Mechanism,
    queries: Queries,
    optimizer: keras.optimizers.Optimizer,
    *,
    schedule: tuple[int, int],
    **kwargs: Any,
) -> DPTranscriber:
    transcriber = DPTranscriber(
        teacher,
        student,
        generator,
        mechanism=mechanism,
        queries=queries,
        public_prior=prior,
        public_share=0.9,
        schedule=schedule,
        objective=GeneratorObjective(one_hot=1.0, information_entropy=5.0),
        **kwargs,
    )
    transcriber.compile(
        student_optimizer=optimizer,
        generator_optimizer=keras.optimizers.Adam(2e-4),
        metrics=["accuracy"],
    )
    return transcriber


def _wavelet_student(
    teacher: Teacher,
    prior: ProceduralGenerator,
    head: dict[str, Any],
) -> keras.Model:
    """A `wavelet_student` whitened by the prior."""
    return wavelet_student(
        teacher.input_shape,
        teacher.num_classes,
        public_images=whitening_images(prior),
        **head,
    )


def _pretrained(
    teacher: Any, prior: ProceduralGenerator, seed: int | None
) -> TrainableGenerator:
    """A generator whose images look like the prior's; public."""
    generator = ConvGenerator(prior.image_shape, output_range=prior.output_range)
    pretrain(generator, prior, steps=PRETRAINING_STEPS, seed=seed or 0)
    return generator
