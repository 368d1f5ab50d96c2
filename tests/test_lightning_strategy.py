"""The strategy before training: which Trainer it belongs to, its names, and its options."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from typing import Any, get_type_hints

import pytest
import torch

from effadam_hook import EfficientAdamState, attach
from effadam_hook.config.options import HookOptions, describe_options
from lightning_training import FAMILIES, load_family

pytest.importorskip("lightning")
pytest.importorskip("pytorch_lightning")

from lightning_plugin import (
    CompressionMonitor,
    EfficientAdamFabricStrategy,
    EfficientAdamStrategy,
    for_lightning,
    for_pytorch_lightning,
)
from lightning_plugin.base import ExchangeStrategy

CLASSES = {"lightning.pytorch": for_lightning, "pytorch_lightning": for_pytorch_lightning}
FABRICS = {"lightning.fabric": for_lightning, "lightning_fabric": for_pytorch_lightning}


def make_trainer(name: str, strategy: Any, **options: Any) -> Any:
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return load_family(name).Trainer(
        accelerator="cpu", devices=2, strategy=strategy, **silent, **options
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_strategy_is_of_the_family_of_its_trainer(name: str) -> None:
    strategy = EfficientAdamStrategy(
        quantizer="lloyd2", find_unused_parameters=True, start_method="spawn"
    )
    assert isinstance(strategy, load_family(name).strategies.DDPStrategy)
    trainer = make_trainer(name, strategy)
    assert trainer.strategy is strategy
    assert type(strategy) is CLASSES[name].EfficientAdamStrategy
    assert strategy._hook_options["quantizer"] == "lloyd2"
    assert strategy._ddp_kwargs == {"find_unused_parameters": True}
    assert strategy._start_method == "spawn"
    assert strategy.hook_state is None


@pytest.mark.parametrize("name", FABRICS)
def test_a_fabric_strategy_is_of_the_family_of_its_fabric(name: str) -> None:
    for strategy in (EfficientAdamFabricStrategy(), "effadam_find_unused_parameters_true"):
        fabric = load_family(name).Fabric(accelerator="cpu", devices=2, strategy=strategy)
        assert type(fabric.strategy) is FABRICS[name].EfficientAdamFabricStrategy


@pytest.mark.parametrize("name", FAMILIES)
def test_the_names_in_the_registry(name: str) -> None:
    methods = {"effadam": "popen", "effadam_spawn": "spawn", "effadam_notebook": "fork"}
    for strategy, method in methods.items():
        for suffix, options in (
            ("", {}),
            ("_find_unused_parameters_true", {"find_unused_parameters": True}),
        ):
            made = make_trainer(name, strategy + suffix).strategy
            assert type(made) is CLASSES[name].EfficientAdamStrategy
            assert (made._start_method, made._ddp_kwargs) == (method, options)


def test_mixing_families_is_an_error_that_says_so() -> None:
    class Mine(for_lightning.EfficientAdamStrategy):
        pass

    make_trainer("lightning.pytorch", Mine())
    with pytest.raises(TypeError, match=r"Derive it from lightning_plugin\.for_pytorch_lightning"):
        make_trainer("pytorch_lightning", Mine())
    with pytest.raises(TypeError, match="passed to the Trainer or Fabric of another package"):
        EfficientAdamStrategy().accelerator = torch.device("cpu")
    with pytest.raises((TypeError, ValueError), match="strategy"):
        make_trainer("lightning.pytorch", EfficientAdamFabricStrategy())


@pytest.mark.parametrize("kind", [EfficientAdamStrategy, EfficientAdamFabricStrategy])
def test_wrong_options_are_errors_at_once(kind: Any) -> None:
    for options, error, message in (
        ({"quantizer": "lloyd5"}, ValueError, "Invalid quantizer: 'lloyd5'"),
        ({"topology": "ring"}, ValueError, "Must be one of rank0, sharded"),
        ({"exact": 3}, TypeError, "Invalid exact: 3"),
        ({"enabled": "yes"}, TypeError, "Invalid enabled"),
        ({"device_mesh": (2, 0)}, ValueError, "Invalid device_mesh: (2, 0)"),
        ({"device_mesh": (2, 2), "topology": "sharded"}, ValueError, "Invalid device_mesh with"),
        ({"precondition": 1}, TypeError, "Invalid precondition: 1"),
        ({"precondition": True, "quantize_weights": True}, ValueError, "At most one"),
        (
            {"quantiser": "lloyd4"},
            TypeError,
            "Unknown option 'quantiser'. Did you mean 'quantizer'?",
        ),
        ({"bucket_cap": 3}, TypeError, "Did you mean 'bucket_cap_mb'?"),
    ):
        with pytest.raises(error) as raised:
            kind(**options)
        assert message in str(raised.value)
    for name in ("ddp_comm_hook", "ddp_comm_state", "ddp_comm_wrapper", "model_averaging_period"):
        with pytest.raises(ValueError, match=f"Invalid {name}: .*Must be left out"):
            EfficientAdamStrategy(**{name: 1})
    EfficientAdamStrategy(ddp_comm_hook=None, exact=["1d", "<64"], bucket_cap_mb=1)


def test_no_option_of_the_hook_is_missing() -> None:
    strategy = inspect.signature(EfficientAdamStrategy).parameters
    assert inspect.signature(EfficientAdamFabricStrategy).parameters == strategy
    keywords = {name for name, one in strategy.items() if one.kind is one.KEYWORD_ONLY}
    assert keywords == get_type_hints(HookOptions).keys()
    hints = get_type_hints(ExchangeStrategy.__init__)
    assert get_type_hints(HookOptions).items() <= hints.items()
    automatic = {"ddp_model", "optimizer", "grad_scaler", "process_group", "options"}
    for source in (EfficientAdamState, attach):
        for name, parameter in inspect.signature(source).parameters.items():
            if name not in automatic:
                assert strategy[name].default == parameter.default
                assert f"{name}: " in (ExchangeStrategy.__doc__ or "")


def test_the_command_line_of_lightning_lists_the_options_with_their_descriptions() -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(EfficientAdamStrategy)
    text = " ".join(parser.format_help().split())
    for name, description in describe_options().items():
        assert f"--{name} " in text
        assert " ".join(description.split()) in text
    assert "--device_mesh " in text
    assert "--find_unused_parameters" in text and "--start_method" in text
    read = parser.parse_args(["--quantizer=lloyd2", '--exact=["1d", "<64"]', "--auto=true"])
    assert (read.quantizer, list(read.exact), read.auto) == ("lloyd2", ["1d", "<64"], True)


@pytest.mark.parametrize("kind", [EfficientAdamStrategy, EfficientAdamFabricStrategy])
def test_an_unused_strategy_can_be_pickled(kind: Any) -> None:
    options = {"device_mesh": (2, 4), "static_graph": True}
    again = pickle.loads(pickle.dumps(kind(quantizer="sign", **options)))
    assert type(again) is kind
    assert again._hook_options["quantizer"] == "sign"
    assert again._ddp_kwargs == {"static_graph": True}
    assert again._node_options == {"intra_node_group": None, "device_mesh": (2, 4)}


def test_the_monitor_is_a_callback_of_both_families() -> None:
    for name in FAMILIES:
        assert issubclass(CompressionMonitor, load_family(name).Callback)


ALONE = """
import sys
for name in {hidden}:
    sys.modules[name] = None
try:
    import lightning_plugin
    strategy = lightning_plugin.EfficientAdamStrategy
    print(strategy.__module__, strategy.sibling)
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("hidden", "printed"),
    [
        (("pytorch_lightning",), "lightning_plugin.for_lightning None"),
        (("lightning", "pytorch_lightning"), "Run pip install pytorch-lightning"),
    ],
)
def test_one_family_is_enough_and_none_is_too_few(hidden: tuple[str, ...], printed: str) -> None:
    command = [sys.executable, "-c", ALONE.format(hidden=hidden)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert printed in done.stdout
