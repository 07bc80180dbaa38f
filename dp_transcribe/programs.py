"""What programs for the command line share: exit statuses, flags and refusals."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import flags
from absl import logging as absl_logging

EXIT_FLAGGED = 1
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130


def refuse(message: object) -> NoReturn:
    """Ends the program for what the user can mend, with a message and status 2."""
    sys.stderr.write(f"{message}\n")
    sys.exit(EXIT_REFUSED)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """As absl does, but refuses what is no flag, and says less by the way.

    Args:
        argv: the program and its arguments.

    Returns:
        The program alone.

    Raises:
        SystemExit: a flag is unknown or out of range; the status is 2.
    """
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        refuse(f"{error}\nPass --helpshort to see the flags.")
    if len(rest) > 1:
        refuse(f"Unknown arguments: {rest[1:]}. Flags begin with --.")
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = absl_logging.WARNING
    return rest
