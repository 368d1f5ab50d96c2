"""Options of the hook: one definition, which all signatures have, and which is documented."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, get_args, get_type_hints

import pytest

from effadam_hook import EfficientAdamState, attach
from effadam_hook.config import TOPOLOGY_NAMES, Config
from effadam_hook.config.options import (
    DEFAULTS,
    HookOptions,
    QuantizerName,
    ScaleRuleName,
    StateOptions,
    TopologyName,
    accepts_options,
    complete_options,
    describe_options,
    state_options,
)
from effadam_hook.wire.quantizers import QUANTIZERS, SCALE_RULES

# Objects of the running program, which no configuration file can hold.
OBJECTS = {
    *("ddp_model", "optimizer", "grad_scaler", "process_group", "options"),
    *("intra_node_group", "device_mesh"),
}


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


def test_names_are_those_of_the_registries() -> None:
    assert get_args(QuantizerName) == tuple(QUANTIZERS)
    assert get_args(TopologyName) == TOPOLOGY_NAMES
    assert get_args(ScaleRuleName) == SCALE_RULES


def test_defaults_are_complete_and_valid() -> None:
    assert DEFAULTS.keys() == get_type_hints(HookOptions).keys()
    assert Config.from_options(state_options(DEFAULTS)) == Config()


@pytest.mark.parametrize("accepting", [EfficientAdamState, partial(attach, None)])
def test_an_unknown_option_is_an_error_with_a_suggestion(accepting: Any) -> None:
    with pytest.raises(
        TypeError, match=r"^Unknown option 'quantiser'\. Did you mean 'quantizer'\?$"
    ):
        accepting(quantiser="lloyd4")
    with pytest.raises(TypeError, match=r"^Unknown option 'zzz'\. Must be one of quantizer, .*, "):
        accepting(zzz=1)


@pytest.mark.parametrize(
    "name", ["auto", "precondition", "quantize_weights", "enabled", "error_feedback"]
)
@pytest.mark.parametrize("value", ["no", 1, None])
def test_a_switch_is_true_or_false(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"Invalid {name}: {value!r}. Must be True or False."):
        complete_options({name: value}, HookOptions)


def test_signature_and_docstring_list_the_options() -> None:
    @accepts_options(HookOptions)
    def configure(first: int, *, second: int = 2, **ddp_options: int) -> None:
        """Do it.

        Args:
            first: Not an option.
            **options: Options of :class:`effadam_hook.config.options.HookOptions`.
            last: Not an option.
        """

    names = list(inspect.signature(configure).parameters)
    assert names == ["first", "second", *get_type_hints(HookOptions), "ddp_options"]
    assert get_type_hints(configure)["topology"] == TopologyName
    lines = inspect.cleandoc(configure.__doc__ or "").splitlines()
    assert lines[4].startswith("    quantizer: Name of the quantizer")
    assert lines[5].startswith("        :data:`effadam_hook")
    assert lines[-1] == "    last: Not an option."
    assert not any("**options" in line for line in lines)


def test_a_docstring_without_the_placeholder_remains() -> None:
    def undocumented(**options: int) -> None:
        pass

    assert accepts_options(StateOptions)(undocumented).__doc__ is None
