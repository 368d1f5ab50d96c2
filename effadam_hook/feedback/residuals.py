"""What the quantizers have not sent yet, kept by parameter.

DDP changes its buckets while it runs: the first iterations may see one bucket with everything, later
ones see several, and every resume starts over. A residual that belongs to a bucket is lost or
misread each time. Here it belongs to a parameter, and a bucket only borrows: :meth:`adopt` lays the
parameters' residuals out in one flat tensor, as the kernels want it, brings along what each of them
held, and from then on the parameter's residual *is* its view of that tensor. The old flat tensor goes
away with the last parameter that leaves it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from effadam_hook.errors import StateMismatchError

__all__ = ["Place", "Residuals"]


@dataclass(frozen=True)
class Place:
    """Where a parameter's residual lies in a flat tensor.

    Attributes:
        name: The parameter's name.
        start: First element in the flat tensor.
        numel: Number of elements.
    """

    name: str
    start: int
    numel: int


class Residuals:
    """Per-parameter residuals of one side, worker's or server's.

    A server's residual of a parameter covers that server's share of it only.
    """

    def __init__(self) -> None:
        self._views: dict[str, Tensor] = {}

    def adopt(
        self, places: Iterable[Place], numel: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Lay residuals out for a bucket and bring along what they hold.

        Args:
            places: Where each parameter goes.
            numel: Elements of the flat tensor.
            dtype: Its dtype.
            device: Its device.

        Returns:
            The flat tensor ``[numel]``, zero where a parameter had no residual yet.

        Raises:
            StateMismatchError: If a parameter's residual has another number of elements than its place.
        """
        flat = torch.zeros(numel, dtype=dtype, device=device)
        for place in places:
            view = flat[place.start : place.start + place.numel]
            held = self._views.get(place.name)
            if held is not None:
                if held.numel() != place.numel:
                    raise StateMismatchError(
                        f"The residual of {place.name!r} has {held.numel()} elements. Must be "
                        f"{place.numel}: it was saved for another model or another topology."
                    )
                view.copy_(held)
            self._views[place.name] = view
        return flat

    def load(self, values: Mapping[str, Tensor], device: torch.device) -> None:
        """Replace all residuals, in place where a bucket has adopted them.

        Args:
            values: One-dimensional tensors by parameter name; parameters not named become zero.
            device: Where residuals go that no bucket has adopted yet.
        """
        for name, view in self._views.items():
            if name not in values:
                view.zero_()
        for name, value in values.items():
            held = self._views.get(name)
            if held is None:
                self._views[name] = value.detach().to(device, copy=True)
            else:
                held.copy_(value)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._views.items())

    def __len__(self) -> int:
        return len(self._views)

    def get(self, name: str) -> Tensor | None:
        """The residual of a parameter, ``[numel]``, or None if it has none yet."""
        return self._views.get(name)

    def norm(self) -> float:
        """The 2-norm over all parameters. Waits for the device."""
        if not self._views:
            return 0.0
        squares = [view.double().square().sum() for view in self._views.values()]
        # A loaded residual that no bucket has adopted yet may be on another device.
        device = squares[-1].device
        return float(torch.stack([square.to(device) for square in squares]).sum().sqrt())
