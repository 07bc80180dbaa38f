"""What a transcription of votes cost on the very records that it was made of."""

from __future__ import annotations

from typing import cast

import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.ensembles import TeacherEnsemble
from dp_transcribe.mechanisms.noisy_votes import NoisyVotes
from dp_transcribe.privacy import gnmax
from dp_transcribe.queries import dequantize
from dp_transcribe.transcriber import DPTranscriber

_ROWS = 500  # of which the votes are counted at once


def data_dependent_cost(
    transcriber: DPTranscriber, *, delta: float | None = None
) -> gnmax.DataDependentEpsilon:
    """The epsilon of a run of GNMax by the analysis that looks at the votes.

    Where the teachers agree, a noisy majority tells less than the ledger has to assume.
    The queries are asked again, in private, to see how far they agree.

    Args:
        transcriber: of `dpt.pate(..., release="label")`, after `fit`, with its ensemble
            and the replay of all queries, as a checkpoint keeps them.
        delta: by default that of `fit`.

    Returns:
        The data-dependent epsilon beside the one of the ledger's accounting by RDP.

    Raises:
        ValueError: more than the label of the largest noisy count was released, some
            queries followed from earlier labels, or not all of them are there.

    **Privacy**: unit `RECORD`. The result depends on the records and is itself **not
    private**: it is for the owner of the data, and its text says so. Nothing is spent;
    the ledger and the statement stay with the data-independent epsilon. It bounds how
    much likelier the labels are on these records than on a neighbour's, not the
    reverse. It holds for queries that were fixed beforehand, so a generator that
    learns, candidate classes and candidate queries by the student are refused: the cost
    of each query would be a random variable that earlier labels have a hand in.

    References:
        Papernot et al. 2018, arXiv:1802.08908, theorem 6 and proposition 7.
    """
    mechanism = _labels_alone(transcriber)
    codes, _ = transcriber.answered_queries()
    asked = transcriber.ledger.releases(mechanism.unit)
    if len(codes) != asked:
        mend = "`replay_size` has too few places, or a step was interrupted."
        expected = f"a replay of all {asked} queries that the ledger knows"
        raise _validate.invalid("transcriber", len(codes), expected, mend)
    return gnmax.data_dependent_epsilon(
        _votes(cast(TeacherEnsemble, transcriber.teacher), codes),
        stddev=mechanism.stddev,
        delta=transcriber.budget.terms["delta"] if delta is None else delta,
    )


def _labels_alone(transcriber: DPTranscriber) -> NoisyVotes:
    """The mechanism of a run whose only releases are noisy majorities, fixed queries'.

    Raises:
        ValueError: there is more to it.
    """
    mechanism = transcriber.mechanism
    if not isinstance(mechanism, NoisyVotes) or mechanism.released != "label":
        mend = "Noisy counts cost what the ledger says."
        expected = 'a transcriber with `NoisyVotes(released="label")`'
        raise _validate.invalid("transcriber", mechanism, expected, mend)
    updates = transcriber.generator_updates if transcriber.trains_generator else 0
    for name, value, allowed in (
        ("mechanism.threshold", mechanism.threshold, None),
        ("mechanism.top_k", mechanism.top_k, None),
        ("candidates_per_query", transcriber.candidates_per_query, 1),
        ("generator_updates", updates, 0),
    ):
        if value != allowed:
            mend = "Only of a run with fixed queries and classes is this the cost."
            raise _validate.invalid(name, value, f"{allowed}", mend)
    return mechanism


def _votes(ensemble: TeacherEnsemble, codes: np.ndarray) -> np.ndarray:
    """Votes `[queries, classes]`, float32, of the queries as they were asked."""
    votes = [np.zeros((0, ensemble.num_classes), np.float32)]
    for start in range(0, len(codes), _ROWS):
        part = tf.constant(codes[start : start + _ROWS])
        queries = dequantize(part, ensemble.input_range)
        votes.append(ensemble.votes(queries).numpy())
    return np.concatenate(votes)
