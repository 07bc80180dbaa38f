"""What an audit leaves: its values as JSON, as text, and one picture."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dp_transcribe.evaluation.canaries import AuditResult
from dp_transcribe.evaluation.membership import MembershipResult

NOTE = (
    "epsilon_lower_bound is a lower bound, found by the attacks that were tried. A "
    "bound above the claim shows that the claim is wrong; a bound below it does not "
    "show that the claim is right."
)


def audit_report(
    audited: AuditResult,
    membership: Mapping[str, MembershipResult],
    **facts: Any,
) -> dict[str, Any]:
    """The values of audit.json.

    Args:
        audited: the canary audit.
        membership: by the model's name, `"teacher"` and `"student"`.
        **facts: further JSON values.

    Returns:
        A dictionary of JSON values.
    """
    return {
        **audited.to_dict(),
        "membership": {name: result.to_dict() for name, result in membership.items()},
        **facts,
        "note": NOTE,
    }


def draw_audit(
    path: str | os.PathLike[str],
    audits: Sequence[tuple[str, AuditResult]],
    membership: Mapping[str, MembershipResult],
) -> None:
    """Draws ROC curves of membership inference, and bounds beside claims.

    Args:
        path: of the PNG.
        audits: canary audits, each with its name.
        membership: by the model's name.
    """
    # Slow to import, and only needed here.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.5), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    _draw_curves(curves, membership)
    _draw_bounds(bars, audits)
    FigureCanvasAgg(figure).print_png(path)


def _draw_curves(axes: Any, membership: Mapping[str, MembershipResult]) -> None:
    for name, result in membership.items():
        label = f"{name}: AUC {result.auc:.3f} ({result.attack})"
        axes.plot(*result.roc, label=label)
    axes.plot([1e-4, 1.0], [1e-4, 1.0], "k:", label="a coin")
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(1e-4, 1.0),
        ylim=(1e-4, 1.0),
        xlabel="others taken for members",
        ylabel="members found",
        title="Membership inference",
    )
    axes.legend(loc="lower right", fontsize=8)


def _draw_bounds(axes: Any, audits: Sequence[tuple[str, AuditResult]]) -> None:
    rows = range(len(audits))
    claims = [a.claimed_epsilon for _, a in audits]
    shown = [claim if math.isfinite(claim) else float("nan") for claim in claims]
    found = [max(a.epsilon_lower_bound, a.gaussian_lower_bound or 0) for _, a in audits]
    axes.barh(rows, shown, height=0.7, color="lightgray", label="claimed")
    axes.barh(rows, found, height=0.35, label="lower bound")
    axes.set_yticks(list(rows), [f"{name} ({a.unit.value})" for name, a in audits])
    axes.invert_yaxis()
    axes.set(xlabel="epsilon", title="Lower bounds by canaries")
    axes.legend(fontsize=8)


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
    """A report as lines of text.

    Args:
        report: of `audit_report`.
        folder: where the results are.

    Returns:
        What the user sees at the end.
    """
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
