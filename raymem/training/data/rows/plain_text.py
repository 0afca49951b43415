"""Cuts a plain text file into rows: pieces of whole lines, between paragraphs where that can be.

A text file has no rows of its own. A line is too short to be one, since packing keeps rows apart and a model would
never see two lines of prose together; a whole book is too long. Every piece is some thousand tokens long and goes on in
as many packed rows as it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

PIECE_BYTES = 16 << 10
"""Bytes from which on a piece ends at the next empty line."""
LONGEST_BYTES = 64 << 10
"""Bytes from which on it ends with the line, for texts without empty lines."""
_BOM = b"\xef\xbb\xbf"


def pieces(lines: Iterable[tuple[int, bytes]], offset: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """Yield (offset, number of the first line, bytes) of each piece that is not blank.

    Whoever begins at the offset of a piece gets the same pieces from there on.

    Args:
        lines: number and bytes of each line.
        offset: of the first of them.
    """
    piece: list[bytes] = []
    size = first = 0
    for number, line in lines:
        if not piece and not line.strip():
            offset += len(line)
            continue
        first = first if piece else number
        piece.append(line)
        size += len(line)
        if size >= LONGEST_BYTES or (size >= PIECE_BYTES and not line.strip()):
            yield offset, first, b"".join(piece)
            offset += size
            piece, size = [], 0
    if piece:
        yield offset, first, b"".join(piece)


def text_of(piece: bytes) -> str:
    """Return the text of a piece, without the empty lines at its end; its lines end as on Unix.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return piece.removeprefix(_BOM).decode().replace("\r\n", "\n").rstrip("\n") + "\n"
