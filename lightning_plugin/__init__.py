"""Strategies for PyTorch Lightning and Lightning Fabric: DDP with a quantized two-way exchange.

Importing this package registers ``Trainer(strategy="effadam")`` and ``Fabric(strategy="effadam")``,
and their variants, for the installed packages ``lightning`` and ``pytorch_lightning``.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from lightning_plugin.callback import CompressionMonitor
from lightning_plugin.families import installed as _installed
from lightning_plugin.families import make_siblings as _make_siblings

_families = [_import_module(f"lightning_plugin.for_{name}") for name in _installed()]

if TYPE_CHECKING:
    from lightning_plugin.for_lightning import EfficientAdamFabricStrategy, EfficientAdamStrategy
else:
    EfficientAdamStrategy = _families[0].EfficientAdamStrategy
    EfficientAdamFabricStrategy = _families[0].EfficientAdamFabricStrategy

if len(_families) > 1:
    for _name in ("EfficientAdamStrategy", "EfficientAdamFabricStrategy"):
        _make_siblings(*(getattr(_family, _name) for _family in _families))

__all__ = ["CompressionMonitor", "EfficientAdamFabricStrategy", "EfficientAdamStrategy"]
