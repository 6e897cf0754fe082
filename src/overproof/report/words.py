"""An evaluation in plain words, for a terminal."""

from __future__ import annotations

from typing import Any

from overproof.report.table import NONE, work
from overproof.report.values import attack_facts, interval, number, sanity_facts


def evaluation_text(summary: dict[str, Any]) -> str:
    """The figures of an evaluation's summary, a line each; brackets hold 95 % intervals."""
    clean, worst = (_share(summary[key], summary.get(f"{key}_interval")) for key in ("clean", "worst_case"))
    lines = [f"{summary['samples']} images, clean accuracy {clean}"]
    for name, raw in summary["attacks"].items():
        lines += _attack(name, attack_facts(raw))
    if summary["worst_case"] is not None:
        lines.append(f"  {'worst case':24} robust accuracy {worst}")
    if summary["curve"]:
        pairs = zip(summary["curve"]["eps"], summary["curve"]["robust"], strict=True)
        lines.append(
            f"  curve of {summary['curve']['attack']}: " + "  ".join(f"{eps:.4g}: {robust:.2%}" for eps, robust in pairs)
        )
    lines += _panel(sanity_facts(summary.get("sanity")))
    if summary["agreement"]:
        lines.append(f"  agreement with the teacher {summary['agreement']['clean']:.2%}")
    lines.append(f"  ECE {summary['ece']:.4f}  NLL {summary['nll']:.4f}  {summary['parameters']:,} parameters")
    return "\n".join(lines + [f"  warning: {text}" for text in summary["warnings"]])


def _share(value: Any, ends: Any) -> str:
    share, span = number(value), interval(ends)
    if share is None:
        return "unknown"
    return f"{share:.2%}" + (f" [{100 * span[0]:.1f}, {100 * span[1]:.1f}]" if span else "")


def _attack(name: str, facts: dict[str, Any]) -> list[str]:
    threat = facts["threat"] + (f"({facts['eps']:.5g})" if facts["eps"] is not None else "")
    sizes, passes = facts["sizes"], work(facts["passes"])
    if sizes:
        span = f", 80 % from {sizes['q10']:.4g} to {sizes['q90']:.4g}" if {"q10", "q90"} <= set(sizes) else ""
        median = f"{sizes['median']:.4g}" if "median" in sizes else "infinite"
        figure = f"median size {median}{span}, {sizes.get('found', 0):g} of {facts['success_denominator'] or 0:g} broken"
    else:
        figure = f"robust accuracy {_share(facts['robust'], facts['interval'])}"
    cost = f"  {passes} passes an image (forward + backward)" if passes != NONE else ""
    blind = "  NO GRADIENT" if facts["no_gradient"] else ""
    lines = [f"  {name:24} {threat}  {figure}{cost}  {facts['seconds'] or 0:.1f} s{blind}"]
    if facts["members"]:
        counts = (f"{member} {member_facts.get('broken', 0):g}" for member, member_facts in facts["members"].items())
        lines.append(f"  {'':24} broken by: {', '.join(counts)}")
    return lines


def _panel(sanity: dict[str, Any]) -> list[str]:
    if not sanity:
        return []
    failed = [check for check in sanity["checks"] if not check["passed"]]
    verdict = (
        "MASKED GRADIENTS SUSPECTED: do not trust the robust figures" if sanity["suspected"] else "no masked gradients seen"
    )
    counts = (
        f"{check['name']} {check['value'] or 0:g}/{check['limit'] or 0:g}" for check in sanity["checks"] if check["passed"]
    )
    lines = [f"  sanity on {sanity['samples'] or 0:g} images: {verdict}"]
    lines += [f"    failed: {check['name']}. {check['text']}" for check in failed]
    return [*lines, f"    passed (images against the model / tolerated): {', '.join(counts) or 'none'}"]
