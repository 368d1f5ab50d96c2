"""Base of the strategies for Trainer and Fabric: the options of the hook and their checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from effadam_hook.options import HookOptions, document_options
from lightning_plugin.families import Adaptable
from lightning_plugin.options import check_ddp_options, check_hook_options

if TYPE_CHECKING:
    from lightning.fabric.strategies import DDPStrategy as Base
else:
    Base = object  # the DDPStrategy of either family follows in the order of resolution

__all__ = ["ExchangeStrategy"]


@document_options
class ExchangeStrategy(Adaptable, Base):
    """DDP with the two-way quantized exchange instead of the all-reduce.

    Accepts all options of :func:`effadam_hook.attach`, and every argument of Lightning's
    ``DDPStrategy`` and of torch's ``DistributedDataParallel``.

    Args:
        {options}
        **ddp_options: Arguments of Lightning's ``DDPStrategy`` and ``DistributedDataParallel``, such as
            ``find_unused_parameters``, ``process_group_backend`` or ``start_method``.

    Raises:
        ValueError: If the value of an option is invalid, or cannot be combined with compression.
        TypeError: If an option is unknown or has the wrong type.
    """

    # Explicit keywords instead of HookOptions, as LightningCLI lists them with their defaults.
    def __init__(
        self,
        *,
        quantizer: str = "lloyd4",
        worker_quantizer: str | None = None,
        server_quantizer: str | None = None,
        block_size: int = 256,
        topology: str = "rank0",
        error_feedback: bool = True,
        exact: tuple[str, ...] | list[str] = ("1d",),
        warmup_steps: int = 0,
        enabled: bool = True,
        scale_rule: str = "least_squares",
        wait_timeout_s: float | None = None,
        auto: bool = False,
        precondition: bool = False,
        quantize_weights: bool = False,
        **ddp_options: Any,
    ) -> None:
        options = HookOptions(
            quantizer=quantizer,
            worker_quantizer=worker_quantizer,
            server_quantizer=server_quantizer,
            block_size=block_size,
            topology=topology,
            error_feedback=error_feedback,
            exact=exact,
            warmup_steps=warmup_steps,
            enabled=enabled,
            scale_rule=scale_rule,
            wait_timeout_s=wait_timeout_s,
            auto=auto,
            precondition=precondition,
            quantize_weights=quantize_weights,
        )
        check_hook_options(options)
        check_ddp_options(ddp_options, self.lightning_base)
        self._arguments = {**options, **ddp_options}
        self._hook_options = options
        self._prepare()
        super().__init__(**ddp_options)

    def _prepare(self) -> None:
        """Create the attributes of a strategy that has not run yet."""
