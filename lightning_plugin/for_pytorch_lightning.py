"""Strategies for programs that import ``pytorch_lightning`` or ``lightning_fabric``."""

from __future__ import annotations

from lightning_fabric.accelerators import Accelerator as FabricAccelerator
from lightning_fabric.strategies import STRATEGY_REGISTRY
from lightning_fabric.strategies import DDPStrategy as FabricDDPStrategy
from pytorch_lightning.accelerators import Accelerator
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry

from lightning_plugin.fabric import FabricStrategyMixin
from lightning_plugin.strategy import StrategyMixin, register_strategies

__all__ = ["EfficientAdamFabricStrategy", "EfficientAdamStrategy"]


class EfficientAdamStrategy(StrategyMixin, DDPStrategy):
    """Strategy for a Trainer of ``pytorch_lightning``; see :class:`StrategyMixin`."""

    family = "pytorch_lightning"
    lightning_base = DDPStrategy
    accelerator_base = Accelerator


class EfficientAdamFabricStrategy(FabricStrategyMixin, FabricDDPStrategy):
    """Strategy for a Fabric of the same package; see :class:`FabricStrategyMixin`."""

    family = "pytorch_lightning"
    lightning_base = FabricDDPStrategy
    accelerator_base = FabricAccelerator


register_strategies(StrategyRegistry, EfficientAdamStrategy)
register_strategies(STRATEGY_REGISTRY, EfficientAdamFabricStrategy)
