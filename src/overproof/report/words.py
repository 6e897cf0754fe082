"""An evaluation in plain words, for a terminal."""

from __future__ import annotations

from typing import Any


def evaluation_text(summary: dict[str, Any]) -> str:
    """The figures of an evaluation's summary, a line each."""
    lines = [f"{summary['samples']} images, clean accuracy {summary['clean']:.2%}"]
    for name, facts in summary["attacks"].items():
        lines.append(
            f"  {name:24} {facts['threat']}({facts['eps']:.5g})  robust accuracy {facts['robust']:.2%}  {facts['seconds']:.1f} s"
        )
    if summary["worst_case"] is not None:
        lines.append(f"  {'worst case':24} robust accuracy {summary['worst_case']:.2%}")
    if summary["curve"]:
        pairs = zip(summary["curve"]["eps"], summary["curve"]["robust"], strict=True)
        lines.append("  curve: " + "  ".join(f"{eps:.4g}: {robust:.2%}" for eps, robust in pairs))
    if summary["agreement"]:
        lines.append(f"  agreement with the teacher {summary['agreement']['clean']:.2%}")
    lines.append(f"  ECE {summary['ece']:.4f}  NLL {summary['nll']:.4f}  {summary['parameters']:,} parameters")
    return "\n".join(lines + [f"  warning: {text}" for text in summary["warnings"]])
