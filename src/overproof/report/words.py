"""An evaluation in plain words, for a terminal."""

from __future__ import annotations

from typing import Any

from overproof.report.flatness import flatness_lines
from overproof.report.table import NONE, work
from overproof.report.values import attack_facts, interval, items, number, sanity_facts, table


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
    lines += [f"  {line}" for line in flatness_lines(summary.get("fisher"))]
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
    rate = facts["success_rate"]
    broken = f"  broken {rate:.1%} of {facts['success_denominator'] or 0:g}" if rate is not None and not sizes else ""
    blind = "  NO GRADIENT" if facts["no_gradient"] else ""
    lines = [f"  {name:24} {threat}  {figure}{cost}{broken}  {facts['seconds'] or 0:.1f} s{blind}"]
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


def comparison_text(summary: dict[str, Any]) -> str:
    """Two models side by side, a line for each figure; brackets hold 95 % intervals."""
    first, second = summary["names"]
    low, high = summary["difference_interval"]
    shares = zip(summary["clean"], summary["clean_intervals"], strict=True)
    lines = [f"{summary['samples']} images, A: {first}, B: {second}"]
    lines += [f"  {f'clean accuracy of {name}':24} {_share(*share)}" for name, share in zip("AB", shares, strict=True)]
    lines.append(
        f"  {'A minus B, in points':24} {100 * summary['difference']:+.2f} [{100 * low:+.1f}, {100 * high:+.1f}], paired"
    )
    lines.append(f"  {'right alone':24} A {summary['only'][0]}, B {summary['only'][1]}")
    lines.append(f"  {'same prediction':24} {_share(summary['agreement'], summary['agreement_interval'])}")
    return "\n".join(lines + _boundaries(summary["boundary"]))


def _boundaries(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    lines = []
    for key, name in (("mag_sim", "MagSim (distance)"), ("ang_sim", "AngSim (direction)")):
        low, high = found[f"{key}_interval"]
        lines.append(f"  {name:24} {found[key]:.4f} [{low:.3f}, {high:.3f}]")
    end = f"from {found['images']} images; {found['pairs']} pairs of walks crossed, {found['kept']:.1%} of all"
    return [*lines, f"  {'':24} boundaries seen {end}"]


def sample_rows(samples: dict[str, Any]) -> list[tuple[str, str]]:
    """What a generator's samples show, as names and texts."""
    figures, selected = table(samples.get("figures")), table(samples.get("selected"))
    rows = [(str(key), f"{value:.3g}") for key, raw in figures.items() if (value := number(raw)) is not None]
    rows += [(f"selected {key}", f"{value:.1%}") for key, raw in selected.items() if (value := number(raw)) is not None]
    if shares := [value for raw in items(samples.get("histogram")) if (value := number(raw)) is not None]:
        rows.append(("classes by the judge", " ".join(f"{share:.1%}" for share in shares)))
    return rows + [("warning", str(text)) for text in items(samples.get("warnings"))]


def samples_text(samples: dict[str, Any]) -> str:
    """The same for a terminal; an empty text if there is nothing to tell."""
    rows = sample_rows(samples)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"  {name:{width}}  {text}" for name, text in rows)
