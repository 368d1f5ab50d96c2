"""The backward passes of a model that FSDP2 shards, dense or compressed as a whole.

On NCCL the hook returns at once, and the stream in which FSDP runs it waits for the exchange. On Gloo,
FSDP makes gradients that are views of the reduced tensor, and the hook returns at once as well:
groups travel one behind the other while the backward continues, and the backward waits at its end. If
FSDP reads the tensor after the hook, to add it to earlier gradients or to cast it, the hook waits.
There is no last bucket: a backward ends with the callbacks of autograd::

    hook, first group   [1] decide: dense or compressed; connect, if not done
    hook, each group    [2] exchange or average, [3] wait if the result is read at once
    end of backward     [4] wait for the other groups, [5] count the step

``backward()`` raises an error of the hook or of the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from effadam_hook.config import Config
from effadam_hook.ddp.backward import at_end_of_backward
from effadam_hook.ddp.engine import Engine
from effadam_hook.errors import EffAdamError

__all__ = ["ShardEngine"]

_NONE = -1
"""Identity of no backward."""


class ShardEngine(Engine):
    """The exchange of the shards of one rank with the same shards of other replicas.

    Args:
        config: The options, the same on all ranks.
        group: The process group of the replicas.

    Attributes:
        position: Rank and size of the shard mesh by module, equal on all replicas of a shard.
        check_hooks: Raises an error if a parameter group has no hook of this engine.
        release: Removes the check before a forward from the model.
    """

    def __init__(self, config: Config, group: dist.ProcessGroup | None) -> None:
        super().__init__(config, group)
        self.is_joining = lambda: False
        self.position: dict[str, list[int]] = {}
        self.check_hooks: Callable[[], None] = lambda: None
        self.release: Callable[[], None] = lambda: None
        self._backward = _NONE
        self._last: Future[Tensor] | None = None
        # Exchanges of groups that nobody has waited for, and what follows each of them.
        self._pending: dict[int, tuple[Future[Tensor], Callable[[], None]]] = {}

    def agree(self, device: torch.device) -> None:
        """Compare options, versions, model and position in the shard mesh with the other replicas.

        Args:
            device: Device of the shards.

        Raises:
            DisagreementError: On every replica of the shard, if any two differ.
        """
        self.session.agree(device, {**self.describe(), "shard": self.position})

    def describe(self) -> dict[str, Any]:
        """Return the switches that must be equal on all ranks."""
        return {"enabled": self.enabled, "auto": self.auto_compress is not None}

    def reduce(
        self,
        index: int,
        device: torch.device,
        owners: Sequence[Tensor],
        pack: Callable[[], Tensor],
        then: Callable[[], None],
        *,
        defers: bool,
    ) -> None:
        """Replace the gradients of a parameter group by those of all replicas.

        Args:
            index: Index of the group in the model.
            device: The device of the gradients.
            owners: The shards.
            pack: Returns ``[numel]``, the gradients of this rank's shards, which are overwritten with
                the result; called after earlier exchanges of the group, so that a buffer can be used
                again.
            then: Called after the exchange.
            defers: Whether nothing reads the result before the end of the backward, which waits for
                the exchange then.

        Raises:
            EffAdamError: If the exchange has stopped, the replicas disagree, or an error occurs here.
        """
        session = self.session
        connection = session.connection
        if connection.is_closed:
            raise EffAdamError(
                "The state of this model was closed, and its gradients would not be averaged over the "
                "replicas. Close it after the last backward, or attach the model again."
            )
        try:
            if connection.is_stopped:
                connection.watchdog.check()
            # An identity rather than a flag: an error elsewhere may have ended the last backward.
            backward = torch._C._current_graph_task_id()
            if backward != self._backward:
                self._wait()
                self.check_hooks()
                self._begin(device, owners)  # [1]
                if not at_end_of_backward(self._end_step):
                    raise EffAdamError("FSDP has called the hook outside of a backward pass.")
                self._backward = backward
            exchange = connection.exchange
            # On NCCL a wait only orders FSDP's stream.
            defers = defers and (exchange is None or exchange.staging.sends_from_host)
            if not defers or index in self._pending:
                self._wait()  # FSDP adds to gradients that may be in flight
            connection.phase = "preparing the bucket"
            flat = pack()
            if self._compressing:  # [2]
                check_weights = self.check_replicas
                future = session.exchange(index, flat, owners, check_weights=check_weights)
            else:
                future = session.average(index, flat, owners)
            self._last = future
            self._pending[index] = future, then
            if not defers:
                self._wait()  # [3]
        except BaseException as error:
            self.fail(f"bucket {index}", error)

    def check_before_forward(self, *_: object) -> None:
        """Check the hooks before a forward, as those of all groups may have been replaced.

        Raises:
            EffAdamError: On all replicas, if a parameter group has no hook of this engine.
        """
        if (
            torch.compiler.is_compiling()
            or not torch.is_grad_enabled()
            or self.session.connection.is_closed
        ):
            return
        self.session.connection.phase = "checking the hooks"
        try:
            self.check_hooks()
        except (EffAdamError, ValueError) as error:
            self.fail("forward", error)

    def _wait(self) -> None:
        """Wait for all exchanges in flight, where Ctrl-C is received; on NCCL none is."""
        if not self._pending:
            return
        self.session.connection.watchdog.join()
        for future, then in self._pending.values():
            future.wait()
            then()
        self._pending.clear()

    def fail(self, where: str, error: BaseException) -> NoReturn:
        """Stop the exchange on all replicas, and raise its error.

        Args:
            where: What failed, in words.
            error: The error.
        """
        self._backward, self._last = _NONE, None
        self._pending.clear()
        failure = self.session.connection.stop(where, error)
        if not isinstance(error, Exception):
            raise error
        raise self.with_global_ranks(failure) from failure.__cause__

    def with_global_ranks(self, error: EffAdamError) -> EffAdamError:
        """Return an error that says which ranks of the job its ranks are, the replicas of a shard."""
        ranks = dist.get_process_group_ranks(self.session.group)
        if ranks == list(range(len(ranks))):
            return error
        legend = f"Ranks 0 to {len(ranks) - 1} are the global ranks {', '.join(map(str, ranks))}."
        return error if legend in str(error) else type(error)(f"{error} {legend}")

    def describe_topology(self) -> str:
        """Describe who exchanges with whom: the replicas of this rank's shards."""
        group = self.session.group
        ranks = ", ".join(map(str, dist.get_process_group_ranks(group)))
        sizes = sorted({size for _, size in self.position.values()})
        return (
            f"{self.session.config.topology}; replica {group.rank()} of {group.size()} (global ranks "
            f"{ranks}), each of {' and '.join(map(str, sizes))} shards"
        )

    def _end_step(self) -> None:
        """Wait for the exchange and count the step, after FSDP has made the gradients."""
        if self._last is None:
            return  # an error has ended the backward
        self.clock.stop_after(self._last)
        try:
            self._wait()  # [4]
        except BaseException as error:
            self.fail("the end of backward", error)
        self._backward, self._last = _NONE, None
        self.session.counters.steps += 1  # [5]
        self.session.mode.end_backward()
