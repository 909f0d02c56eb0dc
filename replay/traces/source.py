"""A trace file as bytes: plain or gzip, in blocks of whole lines, and the line that is to blame when a block does not parse.

Blocks keep a million rows of any format far below a gigabyte; parsers see many lines at once, so they are vectorised, and
still an error names its line: the failing block is halved until one line is left, so each rule is written only once.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, cast

import pyarrow as pa

from replay.errors import InputError

BLOCK_BYTES: Final = 1 << 22
MAX_LINE_BYTES: Final = 4 * BLOCK_BYTES
# The first line is whole in it: at 2**24 tokens a Mooncake line has 32,768 hash ids of at most 22 bytes, 0.7 MB.
HEAD_BYTES: Final = 1 << 20
_BOM: Final = b"\xef\xbb\xbf"

Parse = Callable[[bytes], pa.Table]


class Source:
    """A readable trace file; raises InputError where it is missing or no file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            what = "is a folder" if self.path.is_dir() else "no such trace"
            raise InputError(what, where=str(path), fix="check the path, or use the shipped hour azure-code-2023")
        self.zipped = False
        self.zipped = self.head(2) == b"\x1f\x8b"

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The uncompressed bytes as a stream; a damaged or unreadable file is an InputError."""
        try:
            with gzip.open(self.path) if self.zipped else self.path.open("rb") as stream:
                yield cast(BinaryIO, stream)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"cannot be read: {error}", where=str(self.path), fix="copy the file again") from error

    def head(self, size: int = HEAD_BYTES) -> bytes:
        with self.opened() as stream:
            return stream.read(size).removeprefix(_BOM)

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """Blocks of whole lines, each with the number of its first line; the last line may lack its newline."""
        number, rest = 1, b""
        with self.opened() as stream:
            while chunk := stream.read(BLOCK_BYTES):
                lines, newline, tail = chunk.rpartition(b"\n")
                if newline:
                    block = rest + lines + newline
                    yield number, block.removeprefix(_BOM) if number == 1 else block
                    number, rest = number + block.count(b"\n"), tail
                else:
                    rest += chunk
                if len(rest) > MAX_LINE_BYTES:
                    raise InputError("line is too long", where=f"{self.path}:{number}", rule=f"at most {MAX_LINE_BYTES} bytes")
        if rest:
            yield number, rest.removeprefix(_BOM) if number == 1 else rest

    def tables(self, parse: Parse, *, header: bool = False) -> list[pa.Table]:
        """Every block parsed. ``parse`` takes any number of whole lines and raises InputError; here the error gets its line."""
        parsed = []
        for first, block in self.blocks():
            number, lines = (2, block.partition(b"\n")[2]) if header and first == 1 else (first, block)
            try:
                parsed.append(parse(lines))
            except InputError as error:
                raise self._blame(parse, number, lines, error) from error
        return parsed

    def _blame(self, parse: Parse, number: int, text: bytes, error: InputError) -> InputError:
        """The same error with the first line that causes it: halving parses each line about twice in all."""
        lines = text.split(b"\n")
        low, high = 0, len(lines)
        while high - low > 1:
            middle = (low + high) // 2
            if _refused(parse, b"\n".join(lines[low:middle])):
                high = middle
            else:
                low = middle
        culprit = lines[low].rstrip(b"\r")
        reason = _refused(parse, culprit) or error
        shown = culprit[:80].decode("utf-8", "backslashreplace") + ("…" if len(culprit) > 80 else "")
        return InputError(f"{reason.what} in {shown!r}", where=f"{self.path}:{number + low}", rule=reason.rule, fix=reason.fix)


def _refused(parse: Parse, text: bytes) -> InputError | None:
    try:
        parse(text)
    except InputError as error:
        return error
    return None
