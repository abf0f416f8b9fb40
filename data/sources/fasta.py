"""FASTA: sequences under headers, as the databases of proteins write them."""

import re
from collections.abc import Iterator
from typing import Any

from triform.data.sources.streams import Lines
from triform.runtime.errors import DataError

# KEY=VALUE in a header, the value up to the next key: "OS=Homo sapiens OX=9606".
ATTRIBUTE = re.compile(r"(\w+)=(.*?)(?=\s+\w+=|\s*$)")
RESIDUES = re.compile(r"[A-Za-z.\-]*\*?")  # * ends what a gene is translated to


def records(lines: Lines) -> Iterator[tuple[int, str, str]]:
    """(line of the header, header without '>', what stands under it, without spaces).

    DataError with file and line for what is no record, or one that is empty or has the
    id of another.
    """
    seen: dict[str, int] = {}
    for line in lines:
        if line.isspace():
            continue
        number, header = lines.number, line[1:].strip()
        if line[0] != ">" or not header:
            raise DataError(
                f"{lines.path}, line {number}: {line.strip()!r:.40} is no header: a "
                "FASTA record begins with >ID; correct the file"
            )
        parts = []
        while lines.peek() not in (b">", b""):
            parts += next(lines).split()
        name = header.split()[0]
        if not parts:
            raise DataError(
                f"{lines.path}, line {number}: {name!r} has no sequence; add it or "
                "remove the record"
            )
        if name in seen:
            raise DataError(
                f"{lines.path}, line {number}: the id {name!r} comes twice, first in "
                f"line {seen[name]}; rename or remove one"
            )
        seen[name] = number
        yield number, header, "".join(parts)


def sequences(lines: Lines) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of every record: id, description, sequence, KEY=VALUE of the header.

    Lower case, which marks masked regions, becomes upper case; a * at the end goes.
    """
    for number, header, text in records(lines):
        if not RESIDUES.fullmatch(text):
            bad = next(c for c in text if not re.match(r"[A-Za-z.\-]", c))
            raise DataError(
                f"{lines.path}, line {number}: {header.split()[0]!r} holds {bad!r}, "
                "which is no residue; correct the sequence"
            )
        name, _, rest = header.partition(" ")
        yield (
            number,
            dict(ATTRIBUTE.findall(rest))
            | {"id": name, "description": rest.strip()}
            | {"sequence": text.removesuffix("*").upper()},
        )
