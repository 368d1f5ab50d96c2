"""Residuals of the quantizers, stored by parameter.

DDP changes its buckets while it runs: the first iterations may have one bucket with all parameters,
later ones have several, and a resumed run starts again with one. Residuals that belonged to buckets
would be lost or misread at each change. They therefore belong to parameters.
:meth:`Residuals.adopt` lays out the residuals of a bucket's parameters in one flat tensor, as the
kernels require, and copies their values. From then on the residual of a parameter *is* its view of
that tensor. The previous flat tensor is freed when no parameter has a view of it.
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
    """Place of a parameter's residual in a flat tensor.

    Attributes:
        name: Name of the parameter.
        start: First element in the flat tensor.
        numel: Number of elements.
        offset: First element in the parameter, if the residual covers a part of it.
    """

    name: str
    start: int
    numel: int
    offset: int = 0


class Residuals:
    """Residuals of the worker, or of the server, by parameter.

    The residual of a server covers the server's share of the parameter; that of a worker does, if
    the worker is a node.
    """

    def __init__(self) -> None:
        self._views: dict[str, Tensor] = {}
        self._flats: dict[str, Tensor] = {}  # of which they are views
        self._offsets: dict[str, int] = {}

    def adopt(
        self, places: Iterable[Place], numel: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Lay out residuals for a bucket, with their values.

        Args:
            places: Place of each parameter.
            numel: Number of elements of the flat tensor.
            dtype: Dtype of the flat tensor.
            device: Device of the flat tensor.

        Returns:
            The flat tensor ``[numel]``, zero for parameters without a residual.

        Raises:
            StateMismatchError: If a residual is not that of the elements of its place, and not zero.
        """
        flat = torch.zeros(numel, dtype=dtype, device=device)
        for place in places:
            view = flat[place.start : place.start + place.numel]
            held = self._views.get(place.name)
            if held is not None:
                first = self._offsets.get(place.name, 0)
                if (first, held.numel()) == (place.offset, place.numel):
                    view.copy_(held)
                elif bool(held.any()):
                    raise StateMismatchError(
                        f"The residual of {place.name!r} is that of {held.numel()} elements from "
                        f"element {first} on. Must be that of {place.numel} from {place.offset} on: it "
                        "was saved for another model or topology, or without names. Load it into a "
                        "state of attach(ddp_model, ...), which deals saved residuals anew."
                    )
            self._views[place.name], self._flats[place.name] = view, flat
            self._offsets[place.name] = place.offset
        return flat

    def load(
        self,
        values: Mapping[str, Tensor],
        device: torch.device,
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        """Replace all residuals, in place if a bucket has adopted them.

        Args:
            values: One-dimensional tensors by parameter name; all other residuals become zero.
            device: Device for residuals that no bucket has adopted yet.
            offsets: First element in the parameter by name; 0 by default.
        """
        for name, view in self._views.items():
            if name not in values:
                view.zero_()
        for name, value in values.items():
            self._offsets[name] = (offsets or {}).get(name, 0)
            held = self._views.get(name)
            if held is None:
                own = value.detach().to(device, copy=True)
                self._views[name] = self._flats[name] = own
            else:
                held.copy_(value)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._views.items())

    def __len__(self) -> int:
        return len(self._views)

    def get(self, name: str) -> Tensor | None:
        """Return the residual of a parameter, ``[numel]``; None if it has none."""
        return self._views.get(name)

    def offset(self, name: str) -> int:
        """Return the first element of a parameter that its residual covers."""
        return self._offsets.get(name, 0)

    def multiply(self, factor: Tensor) -> None:
        """Multiply all residuals by a number; the largest finite values take the place of overflows.

        Args:
            factor: A tensor without dimensions, on the device of the residuals.
        """
        for flat in {id(flat): flat for flat in self._flats.values()}.values():
            flat.mul_(factor).nan_to_num_()

    def norm(self) -> float:
        """Return the 2-norm over all parameters. Waits for the device."""
        if not self._views:
            return 0.0
        squares = [view.double().square().sum() for view in self._views.values()]
        # A loaded residual that no bucket has adopted yet may be on another device.
        device = squares[-1].device
        return float(torch.stack([square.to(device) for square in squares]).sum().sqrt())
