"""Captions of classes: each example gets one of several phrasings."""

from collections.abc import Sequence

DIGITS = (
    *("zero", "one", "two", "three", "four"),
    *("five", "six", "seven", "eight", "nine"),
)
HANDWRITTEN = (
    "a handwritten {}",
    "the digit {}",
    "a picture of the number {}",
    "{}, written by hand",
    "somebody wrote a {}",
    "{}",
)


def caption(number: int, label: int, phrasings: Sequence[str] = HANDWRITTEN) -> str:
    """The caption of example `number`: 'a handwritten seven'.

    Which phrasing is a hash of the number: labels often follow one another in turn.
    """
    which = (number * 2_654_435_761 >> 16) % len(phrasings)
    return phrasings[which].format(DIGITS[label])
