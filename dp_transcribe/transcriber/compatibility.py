"""Do the parts of a transcriber fit each other: refused before anything is spent."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from dp_transcribe import _validate
from dp_transcribe._files import digest_of
from dp_transcribe.generators.trial import check_draws
from dp_transcribe.losses.objective import GeneratorObjective
from dp_transcribe.mechanisms.base import AnswerMechanism, GradientMechanism, Mechanism
from dp_transcribe.mechanisms.clipping import check_sampled
from dp_transcribe.mechanisms.clipping.validate import (
    check_student as check_clippable,
)
from dp_transcribe.mechanisms.inherited import Inherited
from dp_transcribe.privacy.inheritance import fingerprint
from dp_transcribe.privacy.units import Unit
from dp_transcribe.queries import FreshQueries, Queries, QueryPool
from dp_transcribe.students import check_student
from dp_transcribe.teachers import Teacher

if TYPE_CHECKING:
    from dp_transcribe.transcriber.model import DPTranscriber


def check_parts(owner: DPTranscriber) -> None:
    """Refuses a transcriber of which one part does not go with another.

    Raises:
        ValueError: so it is; nothing was spent.
    """
    teacher, student, mechanism = owner.teacher, owner.student, owner.mechanism
    generator, trained = owner.generator, owner.trains_generator
    check_can_learn(student, teacher)
    check_dtype(owner.dtype_policy)
    mechanism.check(teacher.num_classes)
    mechanism.check_teacher(teacher)
    check_guidance(mechanism, owner.generator_covered)
    if owner.second_student is not None:
        check_second_student(owner.second_student, student, teacher, mechanism)
    if trained:
        check_objective(owner.objective, mechanism, owner.second_student)
    check_source("generator", generator, teacher, trained=trained)
    check_source("public_prior", owner.public_prior, teacher)
    inherits = isinstance(mechanism, Inherited)
    check_unguided("generator", generator, owner.generator_covered and not inherits)
    if inherits:
        check_inherited(generator, teacher)
    check_unguided("public_prior", owner.public_prior, True)
    replicas = owner.distribute_strategy.num_replicas_in_sync
    check_queries(owner.queries, mechanism, replicas, student)
    classes = getattr(generator, "num_classes", None)
    if classes not in (None, teacher.num_classes):
        expected = f"{teacher.num_classes} classes, as the teacher has"
        raise _validate.invalid("generator", classes, expected)


def check_can_learn(student: keras.Model, teacher: Teacher) -> None:
    """Refuses a student that cannot learn privately what this teacher says."""
    check_student(student, teacher)
    check_clippable(student)
    check_learns(student)


def check_source(
    name: str, source: Any, teacher: Teacher, *, trained: bool = False
) -> None:
    """Refuses a generator that cannot be asked, or whose images the teacher cannot."""
    if source is None and name == "public_prior":
        return
    for method in ("sample", "draw_inputs") if trained else ("sample",):
        if not callable(getattr(source, method, None)):
            mend = "Derive it from `TrainableGenerator` or `ProceduralGenerator`."
            expected = f"a generator with the method `{method}`"
            raise _validate.invalid(name, source, expected, mend)
    for own, of_teacher in (
        ("image_shape", "input_shape"),
        ("output_range", "input_range"),
    ):
        wanted = tuple(getattr(teacher, of_teacher))
        if tuple(getattr(source, own, ())) != wanted:
            expected = f"a generator with {own}={wanted}, the teacher's {of_teacher}"
            raise _validate.invalid(name, source, expected)
    check_draws(name, source, trained=trained)


def check_dtype(policy: Any) -> None:
    """Refuses float16, whose loss scaling would be undone by clipping."""
    if policy.compute_dtype == "float16":
        mend = "Use `keras.config.set_dtype_policy` with 'float32' or 'mixed_bfloat16'."
        raise _validate.invalid("dtype", policy.name, "no float16 policy", mend)


def check_compile(
    loss: Any, metrics: Any, options: dict[str, Any], *, own: Iterable[str]
) -> None:
    """Refuses what a transcriber cannot be compiled with.

    Args:
        loss: of `evaluate`, for one output.
        metrics: of `evaluate`, as Keras takes them, under names that are not taken.
        options: further arguments of Keras' `compile`.
        own: the names under which a run reports itself.
    """
    if "optimizer" in options:
        expected = "`student_optimizer`, and `generator_optimizer` if it learns"
        raise _validate.invalid("optimizer", options["optimizer"], expected)
    _validate.positive_int("steps_per_execution", options.get("steps_per_execution", 1))
    if isinstance(loss, (dict, list, tuple)):
        raise _validate.invalid("loss", loss, "one loss: the student has one output")
    for metric in keras.tree.flatten((metrics, options.get("weighted_metrics"))):
        name = getattr(metric, "name", None) or getattr(metric, "__name__", metric)
        if name in own:
            mend = "It is what a run reports of itself; give the metric another name."
            expected = f"no metric of the name {name!r}"
            raise _validate.invalid("metrics", metric, expected, mend)


def check_learns(student: keras.Model) -> None:
    """Refuses a student that would be paid for and learn nothing."""
    if not student.trainable_variables:
        mend = "Set `trainable` of the layers that are to learn."
        expected = "a student with weights that learn"
        raise _validate.invalid("student", student.name, expected, mend)


def check_ledger(owner: DPTranscriber) -> None:
    """Refuses weights that the ledger is not of.

    Raises:
        RuntimeError: they are another transcriber's, came without its ledger, or a
            load of a file left some of them as they were.
    """
    expected = owner._run.loaded_digest
    if expected is not None and expected != digest_of_parts(owner):
        raise RuntimeError(
            "The weights and the ledger do not belong together: a file was loaded only "
            "in part, or a part was changed after it was loaded. Load a whole file "
            "that `save_checkpoint` or `save_weights` wrote, or make a new transcriber."
        )
    owner._run.loaded_digest = None
    known = owner.ledger.releases(owner.mechanism.unit)
    made = int(owner.releases.numpy())
    if made > known:
        raise RuntimeError(
            f"These weights have gone through {made} releases and the ledger knows "
            f"of {known}: they were taken from another transcriber, without its "
            "ledger. Load what `save_checkpoint` or `save_weights` wrote."
        )


def digest_of_parts(owner: DPTranscriber) -> str:
    """SHA-256 of the weights that releases went into."""
    parts = owner.student, owner.second_student, owner.generator
    models = [part for part in parts if isinstance(part, keras.Model)]
    weights = [weight for model in models for weight in model.get_weights()]
    return digest_of(b"".join(np.asarray(weight).tobytes() for weight in weights))


def check_unguided(name: str, source: Any, covered: bool) -> None:
    """Refuses a generator called covered that an ordinary teacher guided."""
    if covered and getattr(source, "guided_by_teacher", False):
        mend = "Take a new generator, or set `generator_covered=False`."
        expected = "a source of queries that no teacher guided"
        raise _validate.invalid(name, source, expected, mend)


def guided_by_another(source: Any, teacher: Any) -> bool:
    """Whether another teacher than this, or an unknown one, guided a generator.

    Its images carry what that teacher remembers, whatever this one's guarantee is.
    """
    own = fingerprint(getattr(teacher, "statement", None))
    guided = getattr(source, "guided_by_teacher", False)
    return bool(guided) and set(getattr(source, "guides", ())) != {own}


def check_inherited(source: Any, teacher: Any) -> None:
    """Refuses to hand on a guarantee past which a generator carries another teacher."""
    if guided_by_another(source, teacher):
        mend = "Take a new generator; this teacher may guide it."
        expected = "a source of queries that no other teacher guided"
        raise _validate.invalid("generator", source, expected, mend)


def check_guidance(mechanism: Mechanism, generator_covered: bool) -> None:
    """Refuses queries that carry records past a mechanism of unit `RECORD`."""
    releases = mechanism.unit is Unit.RECORD and not isinstance(mechanism, Inherited)
    if releases and not generator_covered:
        mend = "Let the student guide the generator."
        expected = f"True with {mechanism.name}: no generator that the teacher guided"
        raise _validate.invalid("generator_covered", generator_covered, expected, mend)


def check_rests(rests: Any, mechanism: Mechanism) -> tuple[tuple[int, int], ...]:
    """Refuses rests that are no increasing pairs, or of a mechanism without answers."""
    expected = "pairs of numbers of answered queries, each larger than the one before"
    try:
        pairs = tuple((int(first), int(last)) for first, last in rests)
    except (TypeError, ValueError):
        raise _validate.invalid("rests", rests, expected) from None
    turns = [-1, *(turn for pair in pairs for turn in pair)]
    if any(later <= turn for turn, later in itertools.pairwise(turns)):
        raise _validate.invalid("rests", rests, expected)
    if pairs and not isinstance(mechanism, AnswerMechanism):
        expected = f"() with {mechanism.name}, which releases no answers"
        raise _validate.invalid("rests", rests, expected)
    return pairs


def check_second_student(
    second: keras.Model, student: keras.Model, teacher: Teacher, mechanism: Mechanism
) -> None:
    """Refuses a second student that cannot learn beside the first."""
    if not isinstance(mechanism, AnswerMechanism):
        mend = "The noise of a gradient is for one student."
        expected = f"None with {mechanism.name}, which releases no answers"
        raise _validate.invalid("second_student", second, expected, mend)
    own = {id(variable) for variable in student.variables}
    if any(id(variable) in own for variable in second.variables):
        expected = "a student that shares no weights with the first"
        raise _validate.invalid("second_student", second, expected)
    check_student(second, teacher)


def check_objective(
    objective: GeneratorObjective,
    mechanism: Mechanism,
    second_student: keras.Model | None,
) -> None:
    """Refuses terms that need more than the students' features and logits.

    A teacher that is itself private may be read, too.
    """
    refused = ["batch_norm_statistics"]
    if second_student is None:
        refused.append("student_disagreement")
    if not isinstance(mechanism, Inherited):
        refused.append("adversarial")
    for name in refused:
        if getattr(objective, name) != 0:
            expected = f"an objective of what the student sees alone, with {name}=0"
            raise _validate.invalid("objective", objective, expected)


def check_queries(
    queries: Queries,
    mechanism: Mechanism,
    replicas: int,
    student: keras.Model,
) -> None:
    """Refuses a sampler that the mechanism's cost is not stated for.

    Nor may a student whose random layers show which queries were sampled have a pool.
    """
    _validate.instance_of("queries", queries, (FreshQueries, QueryPool))
    if isinstance(queries, QueryPool) and mechanism.unit is Unit.RECORD:
        mend = "Sampling queries hides no record: each can change every answer."
        expected = f"FreshQueries with {mechanism.name}, of unit RECORD"
        raise _validate.invalid("queries", queries, expected, mend)
    reusable = isinstance(mechanism, GradientMechanism) and mechanism.reusable
    if isinstance(queries, QueryPool) and not reusable:
        mend = "It noises every answer by itself; use FreshQueries."
        expected = f"FreshQueries with {mechanism.name}"
        raise _validate.invalid("queries", queries, expected, mend)
    if isinstance(queries, QueryPool):
        mend = "Use FreshQueries, or a student without random layers."
        check_sampled(student, mend)
    for name in ("batch_size", "size"):
        if getattr(queries, name, replicas) % replicas:
            expected = f"a multiple of the {replicas} replicas"
            raise _validate.invalid(name, getattr(queries, name), expected)
