"""Hidden states on disk, found again by the key of the tokens that they were computed from.

A store is a directory with two files that only grow: `data`, the rows as they lie in memory, and `index`, records of
one size, each with its own checksum and that of its rows. Rows are written before their record, so that a process
killed anywhere leaves whole entries and at most a tail that no sound record points to, which later entries overwrite.
Nothing is synchronised to the disk: after a loss of power, the checksums tell which rows arrived.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aletheia_tune.errors import UserError
from aletheia_tune.files import is_disk_full

DIGEST_BYTES = 16
# Key, offset of the rows in `data` in bytes, their number, their CRC-32; then the CRC-32 of all that.
_RECORD = struct.Struct("<16sQII")
_CHECKSUM = struct.Struct("<I")
_RECORD_BYTES = _RECORD.size + _CHECKSUM.size


class RowStore:
    """Entries of `width` values of one dtype a row, under keys of `DIGEST_BYTES` bytes, in one process at a time.

    Attributes:
        damaged: entries whose rows or record were found truncated or changed since they were written.

    Args:
        directory: made if absent.
        width, dtype: of every row.
        capacity: bytes that `data` may take at most.

    Raises:
        UserError: the directory cannot be written to, or another process has it open.
    """

    def __init__(self, directory: Path, width: int, dtype: torch.dtype, capacity: int) -> None:
        self.damaged = 0
        self._width, self._dtype, self._capacity = width, dtype, capacity
        self._row_bytes = width * dtype.itemsize
        self._map: mmap.mmap | None = None
        self._entries: dict[bytes, tuple[int, int, int]] = {}
        self._data_end = self._index_end = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._index = os.open(directory / "index", os.O_RDWR | os.O_CREAT, 0o666)
            self._data = os.open(directory / "data", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"cannot keep a prefix cache in {directory}: {error.strerror}: give another directory"
            ) from error
        try:
            fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise UserError(
                f"prefix cache {directory} is in use by another process: give each its own directory"
            ) from error
        self._read_index()

    def close(self) -> None:
        """Give the files back; what was put stays."""
        # Not unmapped by hand: the last tensor that views the map does it.
        self._map = None
        os.close(self._index)
        os.close(self._data)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def get(self, key: bytes) -> Tensor | None:
        """Rows [rows, width] on the CPU, not to be written to; None if there are none or they are damaged."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        offset, rows, checksum = entry
        size = rows * self._row_bytes
        # Asked before the pages are touched: reading mapped pages past the end of a file ends the process.
        present = os.fstat(self._data).st_size >= offset + size
        if present and (self._map is None or len(self._map) < offset + size):
            self._map = mmap.mmap(self._data, 0)
        if not present or zlib.crc32(memoryview(self._map)[offset : offset + size]) != checksum:  # type: ignore[arg-type]
            self.damaged += 1
            del self._entries[key]
            return None
        flat = torch.frombuffer(self._map, dtype=self._dtype, count=rows * self._width, offset=offset)
        return flat.view(rows, self._width)

    def put(self, key: bytes, rows: Tensor) -> bool:
        """Keep rows [rows, width]; False if they do not fit any more.

        Raises:
            OSError: the file cannot be written to; a full disk is no error, but the end of the capacity.
        """
        if key in self._entries:
            return True
        content = bytes_of(rows)
        # Never where damaged rows were: other entries may lie there by now.
        offset = self._data_end
        if offset + len(content) > self._capacity:
            return False
        entry = (offset, len(rows), zlib.crc32(content))
        try:
            _write(self._data, content, offset)
            _write(self._index, _pack(key, *entry), self._index_end)
        except OSError as error:
            if not is_disk_full(error):
                raise
            self._capacity = self._data_end
            return False
        self._entries[key] = entry
        self._data_end = offset + len(content)
        self._index_end += _RECORD_BYTES
        return True

    def _read_index(self) -> None:
        data_size = os.fstat(self._data).st_size
        with open(os.dup(self._index), "rb") as stream:
            stream.seek(0)
            content = stream.read()
        for start in range(0, len(content), _RECORD_BYTES):
            fields = _unpack(content[start : start + _RECORD_BYTES])
            if fields is None:
                # A torn record can only be the last. Entries after a damaged one are whole.
                self.damaged += start + _RECORD_BYTES < len(content)
                continue
            self._index_end = start + _RECORD_BYTES
            key, offset, rows, checksum = fields
            if offset + rows * self._row_bytes > data_size:
                self.damaged += 1
            else:
                self._entries[key] = (offset, rows, checksum)
        self._data_end = max(
            (offset + rows * self._row_bytes for offset, rows, _ in self._entries.values()), default=0
        )


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it lies so on the CPU."""
    values: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(values)


def _pack(key: bytes, offset: int, rows: int, checksum: int) -> bytes:
    record = _RECORD.pack(key, offset, rows, checksum)
    return record + _CHECKSUM.pack(zlib.crc32(record))


def _unpack(content: bytes) -> tuple[bytes, int, int, int] | None:
    """The fields of a record, or None if it is not whole."""
    record, checksum = content[: _RECORD.size], content[_RECORD.size :]
    if len(content) != _RECORD_BYTES or _CHECKSUM.unpack(checksum)[0] != zlib.crc32(record):
        return None
    return _RECORD.unpack(record)


def _write(file: int, content: bytes | memoryview, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
