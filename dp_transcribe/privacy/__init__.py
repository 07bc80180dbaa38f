"""Units, events, ledger, accounting, calibration and statement.

Pure Python on `dp_accounting`; imports no TensorFlow.
"""

from dp_transcribe.privacy.accounting import epsilon_of
from dp_transcribe.privacy.calibration import (
    gaussian_noise_multiplier,
    noise_multiplier_for,
    poisson_noise_multiplier,
)
from dp_transcribe.privacy.events import PureDpEvent
from dp_transcribe.privacy.gnmax import DataDependentEpsilon
from dp_transcribe.privacy.ledger import Entry, Ledger, Spend
from dp_transcribe.privacy.statement import PrivacyStatement, statement_from_ledger
from dp_transcribe.privacy.units import Relation, Unit

__all__ = [
    "DataDependentEpsilon",
    "Entry",
    "Ledger",
    "PrivacyStatement",
    "PureDpEvent",
    "Relation",
    "Spend",
    "Unit",
    "epsilon_of",
    "gaussian_noise_multiplier",
    "noise_multiplier_for",
    "poisson_noise_multiplier",
    "statement_from_ledger",
]
