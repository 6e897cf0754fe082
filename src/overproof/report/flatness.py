"""What an evaluation says of flatness, in plain sentences."""

from __future__ import annotations

from typing import Any

from overproof.report.values import number, numbers, table


def flatness_lines(raw: Any) -> list[str]:
    """A sentence on the Fisher information at the images, and one on the attacks that would see through a saturated softmax."""
    found = table(raw)
    if not found:
        return []
    parts = (("trace", "trace"), ("lambda_max", "largest eigenvalue"), ("max_probability", "largest probability"))
    lines = [
        f"Fisher information at {number(found.get('samples')) or 0:g} images: "
        + "; ".join(f"{name} {_middle(found.get(key))}" for key, name in parts)
    ]
    both = {name: numbers(pair) for name, pair in table(found.get("pairs")).items()}
    pairs = [
        f"{name} {pair['ce']:.1%} and {pair['margin']:.1%}" for name, pair in both.items() if {"ce", "margin"} <= set(pair)
    ]
    lines += [f"robust under cross-entropy and margin: {', '.join(pairs)}"] if pairs else []
    crafted = {name: numbers(facts).get("robust") for name, facts in table(found.get("transfer")).items()}
    known = [f"{name} {share:.1%}" for name, share in crafted.items() if share is not None]
    return lines + ([f"robust against images crafted elsewhere: {', '.join(known)}"] if known else [])


def _middle(raw: Any) -> str:
    values = numbers(raw)
    return f"mean {values['mean']:.3g}, median {values['median']:.3g}" if {"mean", "median"} <= set(values) else "not measured"
