"""A reward that varies whatever a model says, for both sides."""
from collections.abc import Sequence


def digit_share(text: str) -> float:
    "Share of digits in a completion."
    return sum(c.isdigit() for c in text) / max(1, len(text))


class DigitShare:
    "`digit_share` as a reward of copd_nb, whose engine gives 0 to completions without an end token."
    def __call__(self, completions: Sequence[str], examples: Sequence) -> list[float]:
        return [digit_share(c) for c in completions]

    def __repr__(self) -> str: return "DigitShare()"
