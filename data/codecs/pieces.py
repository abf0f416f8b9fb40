"""Texts that are too long for a library, in pieces."""


def pieces(value: str, longest: int) -> list[str]:
    """A text in pieces of at most `longest` characters; together they are the text.

    A piece ends before a line end or a space if there is one in its last tenth.
    """
    found, start = [], 0
    while len(value) - start > longest:
        least, most = start + longest - longest // 10, start + longest
        ends = (value.rfind(c, least, most) for c in ("\n", " "))
        end = next((at for at in ends if at > 0), most)
        found.append(value[start:end])
        start = end
    return [*found, value[start:]]
