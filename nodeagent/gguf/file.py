"""The GGUF file format: the metadata as a mapping, and whether the file contains all of its tensors.

GgufError(NodeAgentError)    the file can't be used as a model: `path`, `reason`

The format is that of "GGUF", docs/gguf.md in the ggml repository; versions 2 and 3 are equal in all that is read here.
Own code, since the `gguf` package needs numpy and builds every value in the file, also the hundreds of thousands of
texts of a vocabulary. Here they are skipped: one small model takes 0.04 s instead of 2 s, and a file that has not
changed since it was read is not read again.

Files are read and never mapped: if a file shrinks under a mapping, the process is killed (SIGBUS).
"""

import os
import stat
import struct
from collections.abc import Mapping
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Final

import msgspec

from nodeagent.errors import NodeAgentError

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_DEFAULT_ALIGNMENT: Final = 32
TOKEN_ROWS: Final = "token_embd.weight"
LAYER_ROWS: Final = "per_layer_token_embd.weight"
OUTPUT_ROWS: Final = "output.weight"
NAMED_TENSORS: Final = frozenset({TOKEN_ROWS, LAYER_ROWS, OUTPUT_ROWS})
_MAX_DIMENSIONS: Final = 4  # GGML_MAX_DIMS
# Metadata and tensor table together. The largest vocabularies need about 20 MB; reading this limit takes seconds.
_MAX_HEADER_BYTES: Final = 128 << 20
_MAX_KEY_BYTES: Final = 1 << 16
# What is kept of a file is some KB, most of it the chat template.
_PARTS_KEPT: Final = 256

# Value types by number, without text and arrays.
_TEXT: Final = 8
_ARRAY: Final = 9
_SCALARS: Final[Mapping[int, struct.Struct]] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<B"),  # bool
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32: Final = _SCALARS[4]
_U64: Final = _SCALARS[10]
# Longer arrays of numbers are skipped; an array with one number for each layer is shorter.
_MAX_NUMBERS: Final = 4096

# Tensor types by number: (elements, bytes) of a block, from ggml.h and ggml-common.h. A type that is not in this table
# (a newer one) counts as 0 bytes, so that the file is not refused because of it.
_BLOCKS: Final[Mapping[int, tuple[int, int]]] = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    16: (256, 66),  # IQ2_XXS
    17: (256, 74),  # IQ2_XS
    18: (256, 98),  # IQ3_XXS
    19: (256, 50),  # IQ1_S
    20: (32, 18),  # IQ4_NL
    21: (256, 110),  # IQ3_S
    22: (256, 82),  # IQ2_S
    23: (256, 136),  # IQ4_XS
    24: (1, 1),  # I8
    25: (1, 2),  # I16
    26: (1, 4),  # I32
    27: (1, 8),  # I64
    28: (1, 8),  # F64
    29: (256, 56),  # IQ1_M
    30: (1, 2),  # BF16
    34: (256, 54),  # TQ1_0
    35: (256, 66),  # TQ2_0
    39: (32, 17),  # MXFP4
}


class Skipped(Enum):
    """Stands for a value that is not kept: an array of texts, or a long one of numbers."""

    ARRAY = "array"


Value = str | int | float | tuple[int | float, ...] | Skipped | None


class GgufError(NodeAgentError):
    """The file can't be used as a model, and why. Of a split model, `path` may be another part."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{path}: {reason}")


class Part(msgspec.Struct, frozen=True):
    """One file: its size, its metadata by key, and the sizes in bytes of those of NAMED_TENSORS that it has."""

    size_bytes: int
    values: Mapping[str, Value]
    tensors: Mapping[str, int]


def read_part(path: Path) -> Part:
    """The metadata of the file at `path`. Blocks on the disk; raises GgufError, whatever the file contains.

    A file that has not changed is read once: with each switch of models this stands before the load, and a vocabulary
    takes longer than a small server needs to start.
    """
    try:
        status = path.stat()
        # Checked before it is opened: opening a pipe would wait for its writer.
        if not stat.S_ISREG(status.st_mode):
            raise GgufError(path, "not a regular file")
        return _read(path, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    except FileNotFoundError:
        raise GgufError(path, "no such file") from None
    except PermissionError:
        raise GgufError(path, "permission denied") from None
    except OSError as error:
        raise GgufError(path, f"can't be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the path
        raise GgufError(path, f"can't be read: {error}") from error


@lru_cache(maxsize=_PARTS_KEPT)
def _read(path: Path, _version: tuple[int, ...]) -> Part:
    """Read the file. `_version` differs after any change, since nobody can set back the time of the change (ctime)."""
    with path.open("rb") as file:
        cursor = _Cursor(path, file, os.fstat(file.fileno()).st_size)
        return Part(cursor.size, *_parse(cursor))


class _Cursor:
    """A position in the file, never beyond its end. Every length that is read from the file is checked here.

    What changes: `position`, in `take` and `skip`.
    """

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.size = size
        self.position = 0
        self._file = file

    def take(self, length: int) -> bytes:
        self._require(length)
        data = self._file.read(length)
        if len(data) != length:  # truncated since its size was read
            raise self.error("truncated: the file ends in its header")
        self.position += length
        return data

    def skip(self, length: int) -> None:
        self._require(length)
        self._file.seek(length, os.SEEK_CUR)
        self.position += length

    def number(self, form: struct.Struct) -> int:
        return int(form.unpack(self.take(form.size))[0])

    def count(self, least_bytes: int) -> int:
        """A number of items that follow, each of `least_bytes` or more."""
        count = self.number(_U64)
        self._require(count * least_bytes)
        return count

    def text(self, max_bytes: int = _MAX_HEADER_BYTES) -> str:
        length = self.number(_U64)
        if length > max_bytes:
            raise self.error(f"damaged: a text of {length} bytes in the header")
        return self.take(length).decode(errors="replace")

    def error(self, reason: str) -> GgufError:
        return GgufError(self.path, reason)

    def _require(self, length: int) -> None:
        if self.position + length > self.size:
            raise self.error("truncated: the file ends in its header")
        if self.position + length > _MAX_HEADER_BYTES:
            raise self.error(f"damaged: a header of over {_MAX_HEADER_BYTES >> 20} MiB")


def _parse(cursor: _Cursor) -> tuple[Mapping[str, Value], Mapping[str, int]]:
    """The metadata, and the sizes of some tensors. Of the others it is only checked that they lie inside the file."""
    magic = cursor.take(4) if cursor.size >= 4 else b""
    if magic != _MAGIC:
        raise cursor.error("not a GGUF file" if cursor.size else "empty")
    version = cursor.number(_U32)
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        raise cursor.error(
            "a big-endian GGUF file" if swapped in _VERSIONS else f"GGUF version {version} is not supported"
        )
    tensors = cursor.count(least_bytes=24)
    values: dict[str, Value] = {}
    for _ in range(cursor.count(least_bytes=13)):
        key = cursor.text(_MAX_KEY_BYTES)
        values[key] = _value(cursor, cursor.number(_U32), key)
    return values, _tensors(cursor, tensors, values.get("general.alignment", _DEFAULT_ALIGNMENT))


def _value(cursor: _Cursor, kind: int, key: str) -> Value:
    if kind == _TEXT:
        return cursor.text()
    if kind == _ARRAY:
        return _array(cursor, key)
    form = _SCALARS.get(kind)
    if form is None:
        raise cursor.error(f"damaged: {key!r} has a value of unknown type {kind}")
    value: int | float = form.unpack(cursor.take(form.size))[0]
    return value


def _array(cursor: _Cursor, key: str) -> Value:
    kind = cursor.number(_U32)
    if kind == _TEXT:
        count = cursor.count(least_bytes=_U64.size)
        for _ in range(count):
            cursor.skip(cursor.number(_U64))
        return Skipped.ARRAY
    form = _SCALARS.get(kind)
    if form is None:
        raise cursor.error(f"damaged: {key!r} has an array of unknown type {kind}")
    count = cursor.count(least_bytes=form.size)
    if count > _MAX_NUMBERS:
        cursor.skip(count * form.size)
        return Skipped.ARRAY
    return tuple(item for (item,) in form.iter_unpack(cursor.take(count * form.size)))


def _tensors(cursor: _Cursor, tensors: int, alignment: Value) -> Mapping[str, int]:
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.error(f"damaged: invalid alignment {alignment}")
    end = 0
    sizes: dict[str, int] = {}
    for _ in range(tensors):
        name = cursor.text(_MAX_KEY_BYTES)
        dimensions = cursor.number(_U32)
        if dimensions > _MAX_DIMENSIONS:
            raise cursor.error(f"damaged: tensor {name!r} has {dimensions} dimensions")
        elements = 1
        for _ in range(dimensions):
            elements *= cursor.number(_U64)
        block_elements, block_bytes = _BLOCKS.get(cursor.number(_U32), (1, 0))
        size = elements // block_elements * block_bytes
        if name in NAMED_TENSORS:
            sizes[name] = size
        end = max(end, cursor.number(_U64) + size)
    start = -(-cursor.position // alignment) * alignment
    if tensors and start + end > cursor.size:
        raise cursor.error(f"truncated: the file has {cursor.size} of {start + end} bytes")
    return sizes
