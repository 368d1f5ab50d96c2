"""The last bytes of every chunk: do all workers mean the same bucket of the same model?

Configuration and model are compared when training starts, and who waits in vain is found out by the
watchdog. What remains is silent: replicas that have drifted apart, because one rank skipped a
backward but not the optimizer step, has another learning rate, or loaded another checkpoint. They
would average gradients of different models. So every worker writes behind its codes what the bucket
is made of and one of its weights, another one each time, and the server compares before it reduces::

    chunk     | raw elements | scales | codes | padding | digest 8 | weight 8 |

Reading one weight costs microseconds on the CPU. On other devices it would stop the host, so that the
weight is left out there, and nothing is compared.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from effadam_hook.errors import DisagreementError
from effadam_hook.layout import SEAL_BYTES

__all__ = ["Seal"]

_FORMAT = struct.Struct("<qd")
_UNKNOWN = math.inf
"""Stands for a weight that was not looked at."""
_OTHERS_EVERY = 8
_STRIDE = 7919


class Seal:
    """Writes and compares one bucket's seals.

    Args:
        digest: What the bucket is made of, as a number; the same on every rank.
        names: Its parameters' names.
        parameters: Its parameters.
        sent: ``[servers, stride_bytes]`` uint8, this worker's payload.
        received: ``[world_size, stride_bytes]`` uint8, what arrives here as a server.
        often: Whether to look at a weight every time, and not only every eighth.
    """

    def __init__(
        self,
        digest: int,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        sent: Tensor,
        received: Tensor,
        often: bool,
    ) -> None:
        self._digest = digest
        self._names = list(names)
        self._parameters = [p.detach() for p in parameters]
        self._sent = [memoryview(row[-SEAL_BYTES:].numpy()) for row in sent]
        self._received = [memoryview(row[-SEAL_BYTES:].numpy()) for row in received]
        self._every = 1 if often else _OTHERS_EVERY
        self._stamped = 0
        self._looked_at = (0, 0)

    def stamp(self, look: bool) -> None:
        """Seal this worker's chunks.

        Args:
            look: Whether to include a weight.
        """
        self._stamped += 1
        weight = _UNKNOWN
        if look and self._stamped % self._every == 0:
            which = self._stamped // self._every
            index = which % len(self._parameters)
            parameter = self._parameters[index]
            if parameter.numel():
                element = which * _STRIDE % parameter.numel()
                self._looked_at = (index, element)
                weight = float(parameter[_unravel(element, parameter.shape)])
        for row in self._sent:
            _FORMAT.pack_into(row, 0, self._digest, weight)

    def check(self) -> None:
        """Compare all workers' seals.

        Raises:
            DisagreementError: If they differ, naming which rank differs from rank 0 in what.
        """
        rows = [bytes(row) for row in self._received]
        if all(row == rows[0] for row in rows):
            return
        digest, weight = _FORMAT.unpack(rows[0])
        differences = []
        for rank, row in enumerate(rows):
            other_digest, other_weight = _FORMAT.unpack(row)
            if other_digest != digest:
                differences.append(f"rank {rank} has a bucket of other parameters than rank 0")
            elif _differ(weight, other_weight):
                index, element = self._looked_at
                differences.append(
                    f"element {element} of parameter {self._names[index]!r} is {other_weight!r} on "
                    f"rank {rank} and {weight!r} on rank 0"
                )
        if differences:
            raise DisagreementError(
                f"The replicas have drifted apart: {'; '.join(differences)}. All ranks must start "
                "from the same weights and make the same optimizer steps. If their processors round "
                "differently, and you can accept that, set state.check_replicas = False."
            )


def _differ(here: float, there: float) -> bool:
    if _UNKNOWN in (here, there) or (math.isnan(here) and math.isnan(there)):
        return False
    return here != there


def _unravel(element: int, shape: torch.Size) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        element, position = divmod(element, size)
        index.append(position)
    return tuple(reversed(index))
