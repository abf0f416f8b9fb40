"""Text as it is printed and compared: without what breaks a line."""

import re

# Control characters (Cc, with U+0085), and the separators of lines and paragraphs.
# Joiners, no-break spaces, marks of direction and characters that are newer than
# Python's tables are text.
BREAKING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
MOVING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")  # all but tab and LF


def one_line(text: str) -> str:
    """The text with a space for what would break a line or move a cursor.

    What evaluation compares and what is printed both go through it.
    """
    return BREAKING.sub(" ", text)


def for_terminal(text: str) -> str:
    """The text with a space for what would move a cursor; its lines and tabs stay."""
    return MOVING.sub(" ", text)
