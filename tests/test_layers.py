"""A module imports only from strictly lower layers (design section 2), read from the syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "srppo"
# Finer than the design's table where modules of one of its layers build on each other; later rows import earlier ones.
LAYERS = [
    ["errors"],
    ["config"],
    [
        "types",
        "edits",
        "checkpoint",
        "records",
        "hub",
        "masked",
        "console",
        "trackers",
        "world",
        "style",
    ],
    ["stats", "significance", "identity"],
    ["lease", "place", "verdicts", "association", "optimum"],
    ["store"],
    ["arms"],
    ["results"],
    ["matching"],
    ["choice"],
    ["compare"],
    ["kernels.types", "kernels.precision", "kernels.checks", "kernels.reference", "kernels.cpu", "kernels.triton_*"],
    ["kernels", "advantage", "losses"],
    ["environment"],
    ["sources", "overlap", "chat", "models", "settings"],
    ["formats", "memo"],
    ["rows"],
    ["noise", "mixing"],
    ["account"],
    ["data"],
    ["reward", "rollout", "loop"],
    ["base_answers", "sft", "ppo"],
    ["baselines", "evaluate", "export"],
    ["pair", "pieces", "extrapolation"],
    ["questions", "ppo_arms"],
    ["draws"],
    ["resampling"],
    ["world.build", "pipeline", "harness", "score", "forecast"],
    ["methods"],
    ["ablations"],
    ["bench"],
    ["report"],
    ["cli_measure", "cli_ablate"],
    ["cli"],
    ["__main__"],
]
NO_TORCH = [
    *["ablations.__init__", "ablations.spec", "ablations.sweeps", "ablations.options", "ablations.plan"],
    *["ablations.ledger", "ablations.progress", "ablations.live", "ablations.analysis", "ablations.estimate"],
    *["ablations.local", "ablations.trends", "ablations.scale"],
    *["arms", "results", "matching", "choice", "verdicts", "compare", "significance", "environment", "identity"],
    *["config", "store", "lease", "place", "records", "checkpoint", "stats", "console", "report"],
]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}


def layer_of(module: str) -> int:
    """The layer of the longest listed name that covers a module."""
    parts = module.removesuffix(".__init__").split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for layer, names in enumerate(LAYERS):
            if name in names or (length == 2 and any(n.endswith("*") and name.startswith(n[:-1]) for n in names)):
                return layer
    raise AssertionError(f"srppo.{module} is in no layer: add it to the design's table and to LAYERS")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(imported module, whether at module level) for every import outside TYPE_CHECKING blocks."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inside if name.removeprefix("srppo.") in MODULES]
            found += [(name, id(node) in top) for name in modules or [node.module or ""]]
    return found


def target(name: str) -> str:
    """The module of this package that an import names: `srppo.world.items` as it is, a package as its __init__."""
    name = name.removeprefix("srppo").removeprefix(".")
    return name if name in MODULES else f"{name}.__init__".removeprefix(".")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    if module == "__init__":
        return
    package = module.split(".")[0] if "." in module else None
    for name, _ in imports(MODULES[module]):
        if name != "srppo" and not name.startswith("srppo."):
            continue
        imported = target(name)
        same_package = package is not None and imported.split(".")[0] == package
        if same_package:
            continue
        assert layer_of(imported) < layer_of(module), f"srppo.{module} imports srppo.{imported}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_light_modules_import_no_torch(module: str) -> None:
    if not any(module == name or module.startswith(f"{name}.") for name in NO_TORCH):
        return
    heavy = [name for name, _ in imports(MODULES[module]) if name.split(".")[0] in ("torch", "transformers")]
    assert not heavy, f"srppo.{module} imports {heavy}"


def test_no_import_cycles() -> None:
    graph = {
        module: {target(name) for name, _ in imports(path) if name.startswith("srppo.")} & MODULES.keys()
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import cycle: {' -> '.join((*trail, module))}"
        if module not in done:
            for imported in graph[module]:
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())
