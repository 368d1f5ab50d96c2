"""The architecture: imports go one way, each hazard has one home, and the documents show the tree.

The ladder below and the first lines of the modules are the source of the tables in
``CONTRIBUTING.md`` and ``docs/architecture.md``. After a change of either::

    python tests/test_architecture.py       # rewrites the tables
"""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("effadam_hook", "lightning_plugin")


@dataclass(frozen=True)
class Step:
    """A step of the ladder: a description, and modules or packages by their dotted names."""

    description: str
    names: tuple[str, ...]


# A module may import from its own step and from those above it in this list, types included, and
# never in a circle, types excepted. A new module takes its place here; a package stands for all of its
# modules that have no step of their own.
LADDER = (
    Step("exceptions and warnings, versions", ("effadam_hook.errors", "effadam_hook._version")),
    Step("contents of a payload, in integers and strings", ("effadam_hook.wire",)),
    Step(
        "topologies and the calls of collectives: interfaces that options and arithmetic refer to",
        (
            "effadam_hook.exchange.bucket_job",
            "effadam_hook.exchange.collectives",
            "effadam_hook.exchange.node_bound",
            "effadam_hook.exchange.streams",
            "effadam_hook.exchange.timing",
            "effadam_hook.exchange.topology",
            "effadam_hook.exchange.waiting",
        ),
    ),
    Step(
        "options, logs of runs",
        ("effadam_hook.config", "effadam_hook.run_log"),
    ),
    Step(
        "the arithmetic; residuals by parameter, and their checkpoints",
        ("effadam_hook.kernels", "effadam_hook.feedback"),
    ),
    Step("the optimizer of update mode", ("effadam_hook.optim",)),
    Step("the vectors that are exchanged", ("effadam_hook.modes",)),
    Step("who sends what to whom, in which order", ("effadam_hook.exchange",)),
    Step("the exchange of one model, without DDP", ("effadam_hook.session",)),
    Step("the backward passes of DDP", ("effadam_hook.ddp",)),
    Step("the state that a user holds", ("effadam_hook.state",)),
    Step("the hook", ("effadam_hook.hook",)),
    Step("FSDP2 models, their hooks and states", ("effadam_hook.fsdp",)),
    Step("registration of hooks", ("effadam_hook.attach",)),
    Step("the public names", ("effadam_hook",)),
    Step("adapters for training libraries and loggers", ("effadam_hook.integrations",)),
    Step("predictions", ("effadam_hook.planner",)),
    Step("the `effadam` command", ("effadam_hook.cli", "effadam_hook.__main__")),
    Step("strategies for Lightning", ("lightning_plugin",)),
)
OUTSIDE = {"examples", "benchmarks", "tests", "harness", "conftest"}

TRITON_HOME = "effadam_hook.kernels.triton_kernels"
GRAD_BUCKET_HOME = "effadam_hook.hook"
COLLECTIVES_HOME = "effadam_hook.exchange"
INTEGRATIONS = "effadam_hook.integrations"  # each module may import the library of its name
TORCH_FREE = {
    "effadam_hook._version",
    "effadam_hook.errors",
    "effadam_hook.exchange.topology.leg",
    "effadam_hook.planner.method",
    "effadam_hook.planner.predict",
    "effadam_hook.planner.timeline",
    "effadam_hook.planner.traffic",
    "effadam_hook.wire",
}

# Everything that all ranks of a group must call in the same order.
COLLECTIVES = {
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "irecv",
    "isend",
    "monitored_barrier",
    "new_group",
    "new_subgroups",
    "recv",
    "recv_object_list",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
    "send_object_list",
}
# The same as methods of a ProcessGroup, where the name says so whatever it is called on.
GROUP_METHODS = {
    "_allgather_base",
    "_reduce_scatter_base",
    "allgather",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
}


@dataclass(frozen=True)
class Import:
    """One imported name: ``target`` is dotted and complete, ``from a import b`` gives ``a.b``."""

    target: str
    alias: str
    line: int
    at_top: bool
    for_types: bool

    @property
    def root(self) -> str:
        return self.target.partition(".")[0]


@dataclass(frozen=True)
class Module:
    """A source file of the packages under its dotted name."""

    name: str
    is_package: bool
    tree: ast.Module
    imports: tuple[Import, ...]

    def at(self, line: int) -> str:
        return f"{self.name}:{line}"


Modules = dict[str, Module]


def read_modules(root: Path) -> Modules:
    modules = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            tree = ast.parse(path.read_text(), str(path))
            imports = tuple(find_imports(tree, name, is_package))
            modules[name] = Module(name, is_package, tree, imports)
    return modules


def find_imports(tree: ast.Module, name: str, is_package: bool) -> Iterator[Import]:
    package = name.split(".") if is_package else name.split(".")[:-1]

    def visit(node: ast.AST, at_top: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound = alias.asname or alias.name.partition(".")[0]
                yield Import(alias.name, bound, node.lineno, at_top, for_types)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                bound = alias.asname or alias.name
                yield Import(f"{origin}.{alias.name}", bound, node.lineno, at_top, for_types)
        at_top = at_top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for_types = True
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_top, for_types)

    return visit(tree, at_top=True, for_types=False)


def own_target(target: str, modules: Modules) -> str | None:
    """The module of these packages that an imported name lives in; its file may be missing."""
    if target.partition(".")[0] not in PACKAGES:
        return None
    parts = target.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in modules:
            return name
    return target


def is_within(name: str, entries: Iterable[str]) -> bool:
    """The module of these packages that an imported name lives in, even where its file is missing."""
    return any(
        name == entry or (name.startswith(f"{entry}.") and entry != "effadam_hook")
        for entry in entries
    )


def step(name: str) -> int | None:
    """The place of a module on the ladder, counted from the ground."""
    return next((i for i, rung in enumerate(LADDER) if is_within(name, rung.names)), None)


def imports_go_one_way(modules: Modules) -> Iterator[str]:
    graph: dict[str, set[str]] = {}
    for module in modules.values():
        mine = step(module.name)
        if mine is None:
            yield f"{module.name} has no place on the ladder: give it one in {Path(__file__).name}"
            continue
        for imported in module.imports:
            if imported.root in OUTSIDE:
                yield f"{module.at(imported.line)} imports {imported.root}, which is outside"
            target = own_target(imported.target, modules)
            if target is None or target == module.name:
                continue
            theirs = step(target)
            if theirs is None or theirs > mine:
                yield f"{module.at(imported.line)} imports {target}, which is higher on the ladder"
            if not imported.for_types:
                graph.setdefault(module.name, set()).add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield "imports in a circle: " + " -> ".join(reversed(error.args[1]))


def core_needs_only_torch(modules: Modules) -> Iterator[str]:
    # torch requires typing_extensions.
    allowed = {"effadam_hook", "torch", "typing_extensions", *sys.stdlib_module_names}
    for module in modules.values():
        if not module.name.startswith("effadam_hook"):
            continue
        for imported in module.imports:
            triton_at_home = imported.root == "triton" and is_within(module.name, {TRITON_HOME})
            adapts = module.name == f"{INTEGRATIONS}.{imported.root}"
            if imported.at_top and imported.root not in allowed and not triton_at_home | adapts:
                yield f"{module.at(imported.line)} imports {imported.root} at top level"
            elif imported.root in {"accelerate", "transformers"} and not adapts:
                yield f"{module.at(imported.line)} knows {imported.root}"
            if imported.root in {"lightning", "pytorch_lightning"}:
                yield f"{module.at(imported.line)} knows {imported.root}"
            if imported.root == "torch" and is_within(module.name, TORCH_FREE):
                yield f"{module.at(imported.line)} imports torch, in a module of plain integers"


def only_one_folder_imports_triton(modules: Modules) -> Iterator[str]:
    for module in modules.values():
        if is_within(module.name, {TRITON_HOME}):
            continue
        for imported in module.imports:
            if imported.root == "triton":
                yield f"{module.at(imported.line)} imports triton"
            target = own_target(imported.target, modules)
            if imported.at_top and target and is_within(target, {TRITON_HOME}):
                yield f"{module.at(imported.line)} imports {TRITON_HOME} at top level"


def only_the_exchange_calls_collectives(modules: Modules) -> Iterator[str]:
    for module in modules.values():
        if module.name.startswith(COLLECTIVES_HOME):
            continue
        for imported in module.imports:
            if is_collective(imported.target):
                yield f"{module.at(imported.line)} imports {imported.target}"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute):
                name = dotted(node, module)
                if is_collective(name) or node.attr in GROUP_METHODS:
                    yield f"{module.at(node.lineno)} uses {name or node.attr}"


def warnings_name_the_line_of_the_user(modules: Modules) -> Iterator[str]:
    for module in modules.values():
        for node in ast.walk(module.tree):
            is_call = isinstance(node, ast.Attribute) and dotted(node, module) == "warnings.warn"
            if is_call and module.name != "effadam_hook.errors":
                yield f"{module.at(node.lineno)} uses warnings.warn: take errors.warn_caller"


def is_collective(name: str) -> bool:
    return name.startswith("torch.distributed.") and name.rpartition(".")[2] in COLLECTIVES


def dotted(node: ast.expr, module: Module) -> str:
    """The full name behind an expression such as ``dist.nn.all_reduce``; empty if it is no name."""
    attributes: list[str] = []
    while isinstance(node, ast.Attribute):
        attributes.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    root = node.id
    for imported in module.imports:
        if imported.alias == root:
            is_alias = "." not in imported.target or root != imported.root
            root = imported.target if is_alias else imported.root
            break
    return ".".join([root, *attributes])


def only_the_hook_knows_grad_bucket(modules: Modules) -> Iterator[str]:
    for module in modules.values():
        if module.name == GRAD_BUCKET_HOME:
            continue
        for imported in module.imports:
            if imported.target.endswith(".GradBucket"):
                yield f"{module.at(imported.line)} imports GradBucket"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and node.attr == "GradBucket":
                yield f"{module.at(node.lineno)} names GradBucket"
            if isinstance(node, ast.Name) and node.id == "GradBucket":
                yield f"{module.at(node.lineno)} names GradBucket"


Rule = Callable[[Modules], Iterator[str]]
RULES: tuple[Rule, ...] = (
    imports_go_one_way,
    core_needs_only_torch,
    only_one_folder_imports_triton,
    only_the_exchange_calls_collectives,
    warnings_name_the_line_of_the_user,
    only_the_hook_knows_grad_bucket,
)
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)


@each_rule
def test_the_packages_keep_the_rule(rule: Rule) -> None:
    found = list(rule(read_modules(ROOT)))
    assert not found, "\n".join(found)


CLEAN = {
    "effadam_hook/__init__.py": "from effadam_hook.hook import hook",
    "effadam_hook/errors.py": "import enum",
    "effadam_hook/config.py": "from .errors import EffAdamError\nfrom .wire import quantizers",
    "effadam_hook/wire/quantizers.py": (
        "import math\nif TYPE_CHECKING:\n    from effadam_hook.wire.layout import Wire"
    ),
    "effadam_hook/wire/layout.py": "from effadam_hook.wire import quantizers",
    "effadam_hook/kernels/__init__.py": "",
    "effadam_hook/kernels/choose.py": "def best():\n    from . import triton_kernels",
    "effadam_hook/kernels/triton_kernels.py": "import triton.language as tl",
    "effadam_hook/exchange/__init__.py": "",
    "effadam_hook/exchange/topology/rank0.py": "import torch.distributed as dist\ndist.all_reduce(x)",
    "effadam_hook/hook.py": (
        "import torch.distributed as dist\n"
        "from ..effadam_hook.exchange.topology import rank0\n"
        "def hook(state, bucket: dist.GradBucket): return dist.get_rank(), torch.gather(x, 0, i)"
    ),
    "effadam_hook/cli.py": "import effadam_hook\ndef plot():\n    import matplotlib",
    "lightning_plugin/__init__.py": "import lightning\nfrom effadam_hook import hook",
}


def plant(root: Path, files: dict[str, str]) -> Modules:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return read_modules(root)


@each_rule
def test_the_rule_passes_clean_packages(rule: Rule, tmp_path: Path) -> None:
    assert list(rule(plant(tmp_path, CLEAN))) == []


@each_rule
def test_the_rule_passes_any_part_of_the_packages(rule: Rule, tmp_path: Path) -> None:
    assert list(rule(read_modules(tmp_path))) == []
    part = ["effadam_hook/hook.py", "effadam_hook/cli.py"]
    assert list(rule(plant(tmp_path, {name: CLEAN[name] for name in part}))) == []


@pytest.mark.parametrize(
    ("rule", "file", "source", "said"),
    [
        (imports_go_one_way, "wire/layout", "from effadam_hook.state import S", "layout:1 imports"),
        (
            imports_go_one_way,
            "wire/layout",
            "def f():\n    from .. import hook",
            "layout:2 imports",
        ),
        (
            imports_go_one_way,
            "wire/layout",
            "if TYPE_CHECKING:\n    from .. import hook",
            "layout:2 imp",
        ),
        (imports_go_one_way, "exchange/flat", "from ..hook import attach", "exchange.flat:1 impor"),
        (
            imports_go_one_way,
            "feedback/residuals",
            "import effadam_hook",
            "residuals:1 imports effadam_",
        ),
        (imports_go_one_way, "cli", "import lightning_plugin", "cli:1 imports lightning_plugin"),
        (imports_go_one_way, "cli", "from benchmarks import kernels", "cli:1 imports benchmarks"),
        (
            imports_go_one_way,
            "wire/quantizers",
            "from . import layout",
            "in a circle: effadam_hook.",
        ),
        (imports_go_one_way, "gadget", "", "effadam_hook.gadget has no place on the ladder"),
        (core_needs_only_torch, "wire/layout", "import torch", "layout:1 imports torch"),
        (core_needs_only_torch, "config", "import numpy as np", "config:1 imports numpy"),
        (core_needs_only_torch, "config", "try:\n    import rich\nexcept E: pass", "imports rich"),
        (core_needs_only_torch, "hook", "def f():\n    import lightning", "hook:2 knows lightning"),
        (core_needs_only_torch, "hook", "def f():\n    import accelerate", "hook:2 knows accel"),
        (
            core_needs_only_torch,
            "integrations/transformers",
            "import transformers\nimport accelerate",
            "transformers:2 imports accelerate at top",
        ),
        (
            only_one_folder_imports_triton,
            "kernels/cpu",
            "def f():\n    import triton",
            "cpu:2 import",
        ),
        (
            only_one_folder_imports_triton,
            "kernels/cpu",
            "from . import triton_kernels",
            "cpu:1 imp",
        ),
        (
            only_the_exchange_calls_collectives,
            "state",
            "import torch\ntorch.distributed.reduce",
            ":2",
        ),
        (
            only_the_exchange_calls_collectives,
            "state",
            "import torch.distributed as d\nd.send",
            ":2",
        ),
        (
            only_the_exchange_calls_collectives,
            "state",
            "from torch import distributed as d\nd.send",
            ":2",
        ),
        (only_the_exchange_calls_collectives, "hook", "from torch.distributed import gather", ":1"),
        (only_the_exchange_calls_collectives, "hook", "state.group.allreduce(x)", "hook:1 uses st"),
        (
            warnings_name_the_line_of_the_user,
            "hook",
            "import warnings; warnings.warn('x')",
            "hook:1 uses warnings.warn",
        ),
        (
            only_the_hook_knows_grad_bucket,
            "state",
            "from torch.distributed import GradBucket",
            ":1",
        ),
        (only_the_hook_knows_grad_bucket, "state", "def f(b: dist.GradBucket): ...", "names GradB"),
    ],
)
def test_the_rule_catches_a_violation(
    rule: Rule, file: str, source: str, said: str, tmp_path: Path
) -> None:
    found = list(rule(plant(tmp_path, {**CLEAN, f"effadam_hook/{file}.py": source})))
    assert len(found) == 1, found
    assert said in found[0]


# The documents


def ladder_table() -> str:
    """The ladder as a Markdown table, of the modules that exist."""
    rows = ["| step | modules | contents |", "|---:|---|---|"]
    number = 0
    for rung in LADDER:
        shown = [f"`{path}`" for name in rung.names if (path := path_of(name))]
        if shown:
            number += 1
            rows.append(f"| {number} | {', '.join(shown)} | {rung.description} |")
    rows.append(f"| {number + 1} | `examples/`, `benchmarks/`, `tests/` | programs |")
    return "\n".join(rows)


def path_of(name: str) -> str:
    """A module's path below its package, with a slash at the end of a folder's; empty without one."""
    path = ROOT.joinpath(*name.split("."))
    shown = "/".join(name.split(".")[1:]) or f"{name}/"
    if name == "effadam_hook":
        return "__init__.py"
    if path.is_dir():
        return shown.rstrip("/") + "/"
    return f"{shown}.py" if path.with_suffix(".py").is_file() else ""


def file_table() -> str:
    """Every file with the first line of its docstring, folder by folder."""
    rows = ["| file | contents |", "|---|---|"]
    for package in PACKAGES:
        paths = (ROOT / package).rglob("*.py")
        for path in sorted(paths, key=lambda path: (path.parent, path.name != "__init__.py", path)):
            text = path.relative_to(ROOT).as_posix()
            summary = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
            summary = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", summary.replace("``", "`")).rstrip(".")
            name = f"**`{path.parent.relative_to(ROOT).as_posix()}/`**"
            rows.append(f"| {name if path.name == '__init__.py' else f'`{text}`'} | {summary} |")
    return "\n".join(rows)


TABLES = (
    ("CONTRIBUTING.md", "ladder", ladder_table),
    ("docs/architecture.md", "ladder", ladder_table),
    ("docs/architecture.md", "files", file_table),
)


def with_table(text: str, name: str, table: str) -> str:
    """A document with a table between its markers."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"the document has no {begin} ... {end}"
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


@pytest.mark.parametrize(
    ("document", "name", "table"), TABLES, ids=[f"{where}:{name}" for where, name, _ in TABLES]
)
def test_the_documents_show_the_tree(document: str, name: str, table: Callable[[], str]) -> None:
    text = (ROOT / document).read_text()
    assert text == with_table(text, name, table()), "run: python tests/test_architecture.py"


def test_every_package_of_the_ladder_has_one_step() -> None:
    names = [name for rung in LADDER for name in rung.names]
    assert len(names) == len(set(names))


if __name__ == "__main__":
    for document, name, table in TABLES:
        path = ROOT / document
        path.write_text(with_table(path.read_text(), name, table()))
