"""A package imports only from rows above its own (docs/architecture.md), read from the syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "srppo"
LAYERS = [
    "root",
    "statistics",
    "record",
    "kernels",
    "world",
    "instructions",
    "data",
    "models",
    "training",
    "evaluation",
    "analysis",
    "stages",
    "ablations",
    "report",
    "bench",
    "cli",
]
"""One row a package; later rows import earlier ones, never the other way."""
AT_THE_ROOT = {"__init__", "__main__", "config", "console", "environment", "errors", "reward_kinds"}
NO_TORCH = ["config", "console", "environment", "errors", "statistics", "record", "report", "reward_kinds"]
NO_TORCH += ["ablations.spec", "ablations.sweeps", "ablations.options", "ablations.plan", "ablations.ledger"]
NO_TORCH += ["ablations.progress"]
NO_TORCH += ["ablations.analysis", "ablations.local", "evaluation.items", "evaluation.results", "evaluation.pairing"]
NO_TORCH += ["evaluation.comparison", "stages.kinds"]
HEAVY = ("torch", "transformers")
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}


def row_of(module: str) -> int:
    """The row of a module's package; `__main__` is the command line's."""
    if module == "__main__":
        return len(LAYERS)
    package = module.split(".")[0] if "." in module else "root"
    assert package in LAYERS, f"srppo/{package} is in no row: add it to docs/architecture.md and to LAYERS"
    return LAYERS.index(package)


def imports(path: Path) -> list[tuple[str, bool]]:
    """(imported module, whether at module level) for every import, those under TYPE_CHECKING included."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inside if name.removeprefix("srppo.") in MODULES]
            found += [(name, id(node) in top) for name in modules or [node.module or ""]]
    return found


def ours(module: str) -> set[str]:
    """The modules of this package that a module imports, a package as its `__init__`."""
    names = [name.removeprefix("srppo").removeprefix(".") for name, _ in imports(MODULES[module]) if is_ours(name)]
    return {name if name in MODULES else f"{name}.__init__".removeprefix(".") for name in names}


def is_ours(name: str) -> bool:
    return name == "srppo" or name.startswith("srppo.")


def test_the_root_holds_what_every_package_needs_and_no_more() -> None:
    assert {module for module in MODULES if "." not in module} == AT_THE_ROOT


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    if module == "__init__":  # the public names, each imported when it is asked for
        return
    public = "__init__" in ours(module)  # the command line is above all that these names come from
    assert not public or module.startswith("cli."), f"srppo.{module} imports a public name: take it from where it is"
    package = module.split(".")[0] if "." in module else "root"
    for imported in ours(module):
        same = imported.split(".")[0] == package or (package == "root" and "." not in imported)
        assert same or row_of(imported) < row_of(module), f"srppo.{module} imports srppo.{imported}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_light_modules_import_no_torch(module: str) -> None:
    if not any(module == name or module.startswith(f"{name}.") for name in NO_TORCH):
        return
    heavy = [name for name, _ in imports(MODULES[module]) if name.split(".")[0] in HEAVY]
    assert not heavy, f"srppo.{module} imports {heavy}"


def test_no_import_cycles() -> None:
    graph = {module: ours(module) & MODULES.keys() - {"__init__"} for module in MODULES if module != "__init__"}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' -> '.join((*trail, module))}"
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())
