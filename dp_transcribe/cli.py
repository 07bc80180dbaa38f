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
import logging
import sys
from collections.abc import Sequence
from typing import Any

from dp_transcribe.auditing import AuditConfig, audit
from dp_transcribe.data import DATASETS
from dp_transcribe.evaluation.report import summary
from dp_transcribe.methods import METHODS
from dp_transcribe.programs import EXIT_FLAGGED, EXIT_REFUSED


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
    usual("method", choices=list(METHODS), help="transcribes where there is no student")
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
