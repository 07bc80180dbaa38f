"""What an epsilon protects, and between which neighbours.

Privacy:
    The unit is part of every epsilon: nothing in the library returns or prints an
    epsilon without it, and epsilons of different units are never added.
"""

import enum

from dp_accounting import NeighboringRelation as Relation

__all__ = ["Relation", "Unit", "accounting_relation"]


class Unit(enum.Enum):
    """What one neighbouring change touches.

    `RESPONSE` is the teacher's answer to one synthetic query. It is not a person
    in the teacher's training data, since one record can change every answer.

    `RECORD` is one record of the private training set, and so a person.
    """

    RESPONSE = "RESPONSE"
    RECORD = "RECORD"


def accounting_relation(relation: Relation) -> Relation:
    """Returns the relation under which `dp_accounting` is asked.

    Zero-out (`REPLACE_SPECIAL`) is accounted as add-or-remove: a contribution that
    is replaced by zero leaves the same sum as one that is missing, sampled or not,
    and `dp_accounting` 0.4.3 knows Poisson sampling under add-or-remove only.
    `REPLACE_ONE` stays itself, and what is unsupported under it is refused.

    Args:
        relation: the relation a release was recorded under.

    Returns:
        The relation to construct an accountant with.
    """
    if relation is Relation.REPLACE_SPECIAL:
        return Relation.ADD_OR_REMOVE_ONE
    return relation
