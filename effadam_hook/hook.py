"""The DDP communication hook.

The only file that uses ``GradBucket``. It has no ``from __future__ import annotations``: DDP compares
the annotations of a hook as objects.
"""

import torch
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future

from effadam_hook.errors import EffAdamError
from effadam_hook.state import EfficientAdamState

__all__ = ["efficient_adam_hook"]


def efficient_adam_hook(state: EfficientAdamState, bucket: GradBucket) -> Future[torch.Tensor]:
    """Exchange one gradient bucket, quantized both ways with error feedback on both sides.

    With worker i of N, its gradients g_i, residual e_i, server residual ẽ, quantizers Q_w and Q_s:

    1. worker: ``c_i = g_i + e_i``, ``δ_i = Q_w(c_i)``, ``e_i ← c_i - δ_i``; send the codes of ``δ_i``;
    2. server: ``s = (1/N) Σ_i δ_i + ẽ``, ``δ̃ = Q_s(s)``, ``ẽ ← s - δ̃``; send the codes of ``δ̃``;
    3. all ranks, the server included: the bucket becomes the decoded ``δ̃``.

    Parameters selected by ``exact`` are averaged uncompressed in the same messages. While the state is
    disabled or in its warm-up, the bucket is averaged by a dense all-reduce.

    Args:
        state: The state, registered with this hook.
        bucket: The bucket of DDP.

    Returns:
        A future of the bucket's buffer, which completes after decoding.

    Raises:
        EffAdamError: If DDP passes another object than a bucket, or the exchange has failed.

    Examples:
        >>> ddp_model.register_comm_hook(EfficientAdamState(), efficient_adam_hook)

    Source:
        Efficient-Adam, arXiv 2205.14473; gradient mode exchanges g_i in place of the Adam update.
    """
    if not isinstance(bucket, GradBucket):
        raise EffAdamError(
            f"DDP passed the hook a {type(bucket).__name__} instead of a GradBucket, as its "
            '"python_reducer" does under torch.compile. Set '
            'torch._dynamo.config.optimize_ddp = "ddp_optimizer", the default.'
        )
    return state.run_bucket(bucket.index(), bucket.buffer(), bucket.parameters(), bucket.is_last())
