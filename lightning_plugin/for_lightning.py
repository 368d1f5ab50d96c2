"""Strategies for programs that import ``lightning.pytorch`` or ``lightning.fabric``."""

from __future__ import annotations

from lightning.fabric.accelerators import Accelerator as FabricAccelerator
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.fabric.strategies import DDPStrategy as FabricDDPStrategy
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from lightning_plugin.fabric import FabricStrategyMixin
from lightning_plugin.strategy import StrategyMixin, register_strategies

__all__ = ["EfficientAdamFabricStrategy", "EfficientAdamStrategy"]


class EfficientAdamStrategy(StrategyMixin, DDPStrategy):
    """Strategy for a Trainer of ``lightning``; see :class:`StrategyMixin`."""

    family = "lightning"
    lightning_base = DDPStrategy
    accelerator_base = Accelerator


class EfficientAdamFabricStrategy(FabricStrategyMixin, FabricDDPStrategy):
    """Strategy for a Fabric of the same package; see :class:`FabricStrategyMixin`."""

    family = "lightning"
    lightning_base = FabricDDPStrategy
    accelerator_base = FabricAccelerator


register_strategies(StrategyRegistry, EfficientAdamStrategy)
register_strategies(STRATEGY_REGISTRY, EfficientAdamFabricStrategy)
