"""Memory that the ranks of a node share, so that gradients inside it are read instead of sent.

A rank packs its gradients into anonymous memory of the kernel (a memfd) and sends a *ticket*; the other
ranks of the node map the same memory. It has no name in a file system, counts against no limit of
``/dev/shm``, and vanishes with its last process. Where it cannot be mapped, as between containers or on
systems other than Linux, gradients travel over Gloo. Files are open only until all ranks have mapped
them, so that a model may have more buckets than a process may have files.
"""

from __future__ import annotations

import errno
import os
import secrets
import struct
import weakref

import torch
from torch import Tensor

__all__ = ["TICKET_BYTES", "SharedMemory", "open_ticket", "share"]

_TICKET = struct.Struct("<QQQ16s")
TICKET_BYTES = _TICKET.size
_HEADER_BYTES, _TOKEN_BYTES = 64, 16
_NAME = "effadam"
_MOST_FILES = 256
"""File descriptors that may be open at once, of memory that the other ranks have not mapped yet."""
_open_files: set[int] = set()


class SharedMemory:
    """Memory of this rank, open for the other ranks of its node until :meth:`seal`.

    Args:
        numel: Number of bytes.

    Attributes:
        bytes: ``[numel]`` uint8, zeros at first.
        ticket: What another process needs to map the memory.
    """

    def __init__(self, numel: int) -> None:
        file = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        _open_files.add(file)
        self.seal = weakref.finalize(self, _close, file)
        length = _HEADER_BYTES + numel
        os.ftruncate(file, length)
        mapped = _map(f"/proc/self/fd/{file}", length)
        token = secrets.token_bytes(_TOKEN_BYTES)
        mapped[:_TOKEN_BYTES] = torch.tensor(list(token), dtype=torch.uint8, device="cpu")
        self.bytes = mapped[_HEADER_BYTES:]
        self.ticket = _TICKET.pack(os.getpid(), file, length, token)


def share(numel: int) -> SharedMemory:
    """Make memory for the other ranks of this node.

    Args:
        numel: Number of bytes.

    Raises:
        OSError: If this system has no such memory; with the number ``EMFILE`` if too many files are
            open, which ends when other memory has been mapped.
    """
    if not hasattr(os, "memfd_create"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if len(_open_files) >= _MOST_FILES:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return SharedMemory(numel)


def open_ticket(ticket: bytes) -> Tensor | None:
    """Map the memory of another rank.

    Args:
        ticket: The ticket of the memory; zeros if that rank has none.

    Returns:
        ``[numel]`` uint8; None if the memory cannot be mapped, or the ticket names something else,
        such as a process of the same number in another container.
    """
    process, number, length, token = _TICKET.unpack(ticket)
    path = f"/proc/{process}/fd/{number}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):  # noqa: PTH115
            return None
        if os.stat(path).st_size != length:  # noqa: PTH116
            return None
        mapped = _map(path, length)
    except OSError:
        return None
    if bytes(mapped[:_TOKEN_BYTES].tolist()) != token:
        return None
    return mapped[_HEADER_BYTES:]


def _map(path: str, length: int) -> Tensor:
    """Map a file, which need not remain open; ``mmap.mmap`` would keep a descriptor of it open."""
    os.close(os.open(path, os.O_RDWR))  # raises the OSError of which torch makes a text
    try:
        return torch.from_file(path, shared=True, size=length, dtype=torch.uint8, device="cpu")
    except RuntimeError as error:
        raise OSError(errno.ENOMEM, str(error)) from error


def _close(file: int) -> None:
    _open_files.discard(file)
    os.close(file)
