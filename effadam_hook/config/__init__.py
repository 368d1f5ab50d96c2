"""The options: what users write, with types, defaults and descriptions, and what ranks agree on."""

from effadam_hook.config.config import TOPOLOGY_NAMES, Config

__all__ = ["TOPOLOGY_NAMES", "Config"]
