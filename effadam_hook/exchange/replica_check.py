"""The replica check: the last bytes of every chunk, compared before reducing and decoding.

Options and models are compared when training starts, and the watchdog finds ranks that wait in
vain. Replicas that have drifted apart show neither: one rank has skipped a backward but not the
optimizer step, has another learning rate, or has loaded another checkpoint, and gradients of
different models would be averaged. Every worker therefore appends to its codes a digest of the
bucket's layout and one weight of the bucket, a different weight each time, and the server compares
them::

    chunk     | raw elements | scales | codes | padding | digest 3, optimizer 2, step 3 | weight 8 |

The digest covers the run id, so that a chunk of another model differs whatever its layout. The
steps find ranks that continue from different states.

To read one weight takes microseconds on the CPU. From a GPU it is copied in the order of a stream,
and arrives with the payload. On NCCL the host would have to wait for the device to read a payload, so
there is no replica check.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from effadam_hook.errors import DisagreementError
from effadam_hook.exchange.agreement import differing_steps
from effadam_hook.exchange.staging import Staging
from effadam_hook.wire.layout import REPLICA_CHECK_BYTES

__all__ = ["ReplicaCheck"]

_FORMAT = struct.Struct("<Qd")
_DIGEST_BITS, _OPTIMIZER_BITS, _STEP_BITS = 24, 16, 24
_UNKNOWN = math.inf
"""Stands for a weight that was not read."""
_OTHERS_EVERY = 7
"""Odd, so that steps that alternate with dense ones are not all left out."""
_STRIDE = 7919


class ReplicaCheck:
    """The last bytes of one bucket's chunks: written by workers, compared by servers.

    Args:
        digest: Digest of the layout and the run id, the same on every rank.
        names: Names of the bucket's parameters.
        parameters: The bucket's parameters.
        sent: ``[servers, stride_bytes]`` uint8, the payload of this worker.
        received: ``[workers, stride_bytes]`` uint8, the chunks that arrive at this server.
        staging: The memory of the payloads.
        check_every_step: Whether to include a weight in every step, rather than in every seventh.
        ranks: The ranks whose chunks are received, for messages; None for all ranks.
    """

    def __init__(
        self,
        digest: int,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        sent: Tensor,
        received: Tensor,
        staging: Staging,
        check_every_step: bool,
        ranks: Sequence[int] | None = None,
    ) -> None:
        self._digest = digest % (1 << _DIGEST_BITS)
        self._names = list(names)
        self._parameters = [p.detach() for p in parameters]
        self._sent = [memoryview(row[-REPLICA_CHECK_BYTES:].numpy()) for row in sent]
        self.receive_in(received)
        self._ranks = range(len(self._received)) if ranks is None else ranks
        self._every = 1 if check_every_step else _OTHERS_EVERY
        self._staging = staging
        self._weight = staging.zeros((1,), torch.float64, torch.device("cpu"))
        self._has_weight = False
        self._number = 0
        self._read = (0, 0)

    def receive_in(self, received: Tensor) -> None:
        """Compare the chunks of another buffer from now on.

        Args:
            received: ``[workers, stride_bytes]`` uint8.
        """
        self._received = [memoryview(row[-REPLICA_CHECK_BYTES:].numpy()) for row in received]

    def stamp(self, reads_weight: bool, steps: int, optimizer_steps: int = 0) -> None:
        """Read what :meth:`write` writes, at the beginning of a step.

        Args:
            reads_weight: Whether to include a weight.
            steps: Number of steps of the exchange.
            optimizer_steps: Digest of the optimizer's step counts, where the exchange depends on
                them.
        """
        self._has_weight = False
        # By the steps and not by a count of its own: a rank may have new buffers, and others not.
        which, rest = divmod(steps + 1, self._every)
        if reads_weight and rest == 0:
            index = which % len(self._parameters)
            parameter = self._parameters[index]
            if parameter.numel():
                element = which * _STRIDE % parameter.numel()
                self._read = (index, element)
                self._staging.read(parameter[_unravel(element, parameter.shape)], self._weight)
                self._has_weight = True
        number = self._digest << (_OPTIMIZER_BITS + _STEP_BITS)
        number |= optimizer_steps % (1 << _OPTIMIZER_BITS) << _STEP_BITS
        number |= steps % (1 << _STEP_BITS)
        self._number = number

    def write(self) -> None:
        """Write the last bytes of this worker's chunks, once these have reached the host."""
        weight = float(self._weight) if self._has_weight else _UNKNOWN
        for row in self._sent:
            _FORMAT.pack_into(row, 0, self._number, weight)

    def check(self) -> None:
        """Compare the last bytes of all workers' chunks.

        Raises:
            DisagreementError: If they differ; the message names the rank and its difference from
                the first one.
        """
        ranks = self._ranks
        rows = [bytes(row) for row in self._received]
        if all(row == rows[0] for row in rows):
            return
        numbers, weights = zip(*map(_FORMAT.unpack, rows), strict=True)
        differences = [
            f"rank {rank} has a bucket of other parameters, or of another model, than rank {ranks[0]}"
            for rank, number in zip(ranks, numbers, strict=True)
            if (number ^ numbers[0]) >> (_OPTIMIZER_BITS + _STEP_BITS)
        ]
        if differences:
            raise DisagreementError(
                f"The ranks have exchanged different buckets: {'; '.join(differences)}. Run the same "
                "backward passes in the same order on all ranks."
            )
        steps = [number % (1 << _STEP_BITS) for number in numbers]
        optimizer_steps = [number >> _STEP_BITS & (1 << _OPTIMIZER_BITS) - 1 for number in numbers]
        if message := differing_steps(steps, optimizer_steps, ranks):
            raise DisagreementError(message)
        weight = weights[0]
        for rank, other_weight in zip(ranks, weights, strict=True):
            if _differ(weight, other_weight):
                index, element = self._read
                differences.append(
                    f"element {element} of parameter {self._names[index]!r} is {other_weight!r} on "
                    f"rank {rank} and {weight!r} on rank {ranks[0]}"
                )
        if differences:
            raise DisagreementError(
                f"The replicas have drifted apart: {'; '.join(differences)}. All ranks must start "
                "from the same weights and make the same optimizer steps. If weights are changed on "
                "purpose between forward and backward (a sharpness-aware step, an embedding with "
                "max_norm), or processors round differently, and you can accept that, set "
                "state.check_replicas = False on all ranks."
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
