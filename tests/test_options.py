"""The options of the hook: one definition, equal to the signatures and documented."""

from __future__ import annotations

import inspect
from typing import get_type_hints

from effadam_hook import EfficientAdamState, attach
from effadam_hook.options import HookOptions, StateOptions, describe_options, document_options

# Objects of the running program, which no configuration file can hold.
OBJECTS = {"ddp_model", "optimizer", "grad_scaler", "process_group", "options"}


def defaults() -> dict[str, object]:
    """The default of every option, from the signatures that accept it."""
    parameters = {
        **inspect.signature(EfficientAdamState).parameters,
        **inspect.signature(attach).parameters,
    }
    return {name: one.default for name, one in parameters.items() if name not in OBJECTS}


def test_the_options_of_the_state_have_the_types_of_its_signature() -> None:
    hints = get_type_hints(EfficientAdamState.__init__)
    options = get_type_hints(StateOptions)
    names = inspect.signature(EfficientAdamState).parameters.keys() - OBJECTS
    assert options == {name: hints[name] for name in names}


def test_the_options_of_the_hook_are_those_of_state_and_attach() -> None:
    assert defaults().keys() == get_type_hints(HookOptions).keys()


def test_every_option_is_documented_with_its_default() -> None:
    described = describe_options()
    assert described.keys() == get_type_hints(HookOptions).keys()
    assert describe_options(StateOptions).keys() == get_type_hints(StateOptions).keys()
    for name, default in defaults().items():
        shown = str(default) if not isinstance(default, str) else f'"{default}"'
        text = " ".join(described[name].split())
        assert text.endswith(f"Default: ``{shown}``.".replace("'", '"')), name


def test_descriptions_replace_the_placeholder_with_its_indentation() -> None:
    @document_options
    def configure() -> None:
        """Do it.

        Args:
            {options}
            last: Not an option.
        """

    lines = inspect.cleandoc(configure.__doc__ or "").splitlines()
    assert lines[3].startswith("    quantizer: Name of the quantizer")
    assert lines[4].startswith("        :data:`effadam_hook")
    assert lines[-1] == "    last: Not an option."
    assert not any("{options}" in line for line in lines)


def test_a_docstring_without_the_placeholder_remains() -> None:
    def undocumented() -> None:
        pass

    assert document_options(undocumented).__doc__ is None
    assert document_options(test_a_docstring_without_the_placeholder_remains) is not None
