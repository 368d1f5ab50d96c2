"""Support for both packages of Lightning, ``lightning`` and ``pytorch_lightning``.

The two packages contain the same code under two names, with separate classes and registries. A program
uses one of them, both may be installed, and a strategy is constructed before a Trainer uses it. A
strategy is therefore created for one family, and registered as a virtual subclass of the base class of
the other family. A Trainer first assigns its accelerator, which identifies the Trainer's family. If it
is the other family, the strategy is initialized again as its *sibling*, the class of the same name in
that family.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, ClassVar

__all__ = ["FAMILIES", "Adaptable", "installed", "make_siblings"]

FAMILIES = ("pytorch_lightning", "lightning")
"""Names of the packages, in order of preference."""


def installed() -> tuple[str, ...]:
    """List the installed families.

    Raises:
        ImportError: If neither is installed.
    """
    families = tuple(name for name in FAMILIES if find_spec(name) is not None)
    if not families:
        raise ImportError(
            "lightning_plugin needs PyTorch Lightning, which is not installed. Run "
            "pip install pytorch-lightning, or pip install lightning."
        )
    return families


class Adaptable:
    """Strategy that becomes its sibling when a Trainer or Fabric of the other family uses it.

    Attributes:
        family: Name of the family's package.
        lightning_base: Lightning's class from which the strategy derives.
        accelerator_base: The family's class of accelerators, which identifies its Trainer.
        sibling: The class of the same name in the other family; None if only one family is installed.
    """

    family: ClassVar[str]
    lightning_base: ClassVar[Any]
    accelerator_base: ClassVar[type]
    sibling: ClassVar[type[Adaptable] | None] = None

    _arguments: dict[str, Any]

    @property
    def accelerator(self) -> Any:
        """Return the accelerator of the Trainer."""
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
                f"{kind.__name__} belongs to {kind.family} and was passed to the Trainer or Fabric "
                f"of another package: its accelerator is a {type(accelerator).__module__}."
                f"{type(accelerator).__name__}. Import both from the same package."
            )
        if "sibling" not in vars(kind):
            raise TypeError(
                f"{kind.__module__}.{kind.__name__} derives from the strategy for {kind.family} "
                f"and was passed to a Trainer or Fabric of {sibling.family}. "
                f"Derive it from {sibling.__module__}.{sibling.__name__}."
            )
        arguments = self._arguments
        self.__dict__.clear()
        self.__class__ = sibling
        self.__init__(**arguments)  # type: ignore[misc]


def make_siblings(first: type[Adaptable], second: type[Adaptable]) -> None:
    """Make classes of two families siblings of each other.

    Args:
        first: Class of one family.
        second: Class of the other family.
    """
    first.sibling, second.sibling = second, first
    # A Trainer accepts only instances of its own family's classes.
    first.lightning_base.register(second)
    second.lightning_base.register(first)
