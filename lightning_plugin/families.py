"""Lightning comes twice, and a strategy belongs to one of the two.

``lightning`` and ``pytorch_lightning`` hold the same code under two names, with class objects and
registries of their own. A program uses either, both may be installed, and a strategy is made before
any Trainer has seen it. So ours is made for one family, and is a virtual subclass of the other's
base class too. The first thing a Trainer does with it is to hand over its accelerator, which tells
the Trainer's family: if it is the other one, the strategy starts over as its *sibling*, the class
of the same name in that family.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, ClassVar

__all__ = ["FAMILIES", "Adaptable", "installed", "make_siblings"]

FAMILIES = ("pytorch_lightning", "lightning")
"""The packages, in the order in which they are taken where the choice does not matter."""


def installed() -> tuple[str, ...]:
    """The installed families.

    Raises:
        ImportError: If there is none.
    """
    found = tuple(name for name in FAMILIES if find_spec(name) is not None)
    if not found:
        raise ImportError(
            "lightning_plugin needs PyTorch Lightning, which is not installed. Install it with "
            "pip install 'effadam-hook[lightning]', or pip install lightning."
        )
    return found


class Adaptable:
    """A strategy that becomes its sibling when a Trainer or Fabric of the other family takes it.

    Attributes:
        family: Name of the family's package.
        lightning_base: Lightning's class that ours derives from.
        accelerator_base: The family's class of accelerators, by which its Trainer is recognised.
        sibling: The class of the same name in the other family; None while only one is installed.
    """

    family: ClassVar[str]
    lightning_base: ClassVar[Any]
    accelerator_base: ClassVar[type]
    sibling: ClassVar[type[Adaptable] | None] = None

    _arguments: dict[str, Any]

    @property
    def accelerator(self) -> Any:
        """The Trainer's accelerator."""
        return super().accelerator  # type: ignore[misc]

    @accelerator.setter
    def accelerator(self, accelerator: Any) -> None:
        self._adapt(accelerator)
        super(Adaptable, type(self)).accelerator.fset(self, accelerator)  # type: ignore[misc]

    def _adapt(self, accelerator: Any) -> None:
        if accelerator is None or isinstance(accelerator, self.accelerator_base):
            return
        kind = type(self)
        sibling = kind.sibling
        if sibling is None or not isinstance(accelerator, sibling.accelerator_base):
            raise TypeError(
                f"{kind.__name__} belongs to {kind.family} and was handed to the Trainer or Fabric "
                f"of another package: its accelerator is a {type(accelerator).__module__}."
                f"{type(accelerator).__name__}. Import both from the same package."
            )
        if "sibling" not in vars(kind):
            raise TypeError(
                f"{kind.__module__}.{kind.__name__} derives from the strategy for {kind.family} "
                f"and was handed to a Trainer or Fabric of {sibling.family}. "
                f"Derive it from {sibling.__module__}.{sibling.__name__}."
            )
        arguments = self._arguments
        self.__dict__.clear()
        self.__class__ = sibling
        self.__init__(**arguments)  # type: ignore[misc]


def make_siblings(first: type[Adaptable], second: type[Adaptable]) -> None:
    """Make the classes of two families each other's siblings.

    Args:
        first: One family's class.
        second: The other's.
    """
    first.sibling, second.sibling = second, first
    # A Trainer takes nothing but instances of its own family's classes.
    first.lightning_base.register(second)
    second.lightning_base.register(first)
