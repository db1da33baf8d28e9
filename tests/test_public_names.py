"""What `import srppo` gives, what it costs, and that importing any of it changes nothing of others."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import srppo
from srppo import errors

NAMES = [
    "ConfigError",
    "DataError",
    "Diverged",
    "Interrupted",
    "LocalSampler",
    "ModelError",
    "OtherEnded",
    "OutOfMemory",
    "RecordError",
    "RunError",
    "SrppoError",
    "StorageError",
    "UserError",
    "__version__",
    "coherent_reward",
    "gae",
    "linear_logprob",
    "linear_logprob_diff",
    "load_recipe",
    "logprob_diff",
    "train_ppo",
    "train_sft",
]
ROOT = Path(srppo.__file__).parent


def test_the_public_names_are_these_and_each_is_there() -> None:
    assert sorted(srppo.__all__) == NAMES
    assert all(getattr(srppo, name) is not None for name in NAMES)
    assert set(NAMES) <= set(dir(srppo))
    assert {name for name in vars(errors) if not name.startswith("_")} <= set(NAMES), "every error may be caught"


def test_a_type_checker_sees_the_same_names() -> None:
    tree = ast.parse(Path(srppo.__file__).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    imported = [(node.module, alias.asname) for node in checked.body for alias in node.names]  # type: ignore[attr-defined]
    assert {name for _, name in imported} == {*NAMES} - {"__version__"}
    assert all(getattr(srppo, name) is getattr(sys.modules[module], name) for module, name in imported)


def test_a_name_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute .train_dpo.; it exports .*train_ppo"):
        _ = srppo.train_dpo
    assert not hasattr(srppo, "__path_") and getattr(srppo, "nothing", 3) == 3


def run_alone(program: str) -> str:
    """What a program prints, in a Python of its own."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_else() -> None:
    program = "import sys; before = {*sys.modules}; import srppo; print(*{*sys.modules} - before)"
    loaded = {name.partition(".")[0] for name in run_alone(program).split()}
    assert "srppo" in loaded and loaded <= {"srppo", *sys.stdlib_module_names}
    loaded = run_alone(f"{program}; srppo.UserError, srppo.__version__; print(*sys.modules)").split()
    assert not {"torch", "transformers", "numpy", "pydantic", "typer", "srppo.config"} & {*loaded}


SETTINGS = """
import ast, importlib, locale, logging, os, pathlib, random, signal, sys, warnings
root = pathlib.Path({root!r})
modules = [path.relative_to(root.parent).with_suffix("").parts for path in sorted(root.rglob("*.py"))]
for parts in modules:  # first what is not ours: what that changes when it is imported is its own affair
    tree = ast.parse((root.parent / "/".join(parts)).with_suffix(".py").read_text())
    for node in [each for part in tree.body for each in (part.body if isinstance(part, ast.Try) else [part])]:
        if isinstance(node, ast.Import | ast.ImportFrom) and "srppo" not in ast.unparse(node).split()[1]:
            try:
                exec(ast.unparse(node), {{}})
            except ImportError:
                pass
import accelerate, datasets, huggingface_hub.utils, matplotlib, numpy, torch, transformers

def settings():
    logs = [logging.getLogger(), *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    backends = torch.backends
    return {{
        "environment": dict(os.environ),
        "warnings": [tuple(map(str, each)) for each in warnings.filters],
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "logging": {{log.name: (log.level, log.handlers, log.disabled, log.propagate) for log in logs}},
        "locale": locale.setlocale(locale.LC_ALL),
        "recursion": sys.getrecursionlimit(),
        "hooks": (sys.excepthook, sys.displayhook, sys.path_hooks[:], sys.meta_path[:]),
        "random": (random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()),
        "numpy": (numpy.geterr(), numpy.get_printoptions()),
        "torch": (
            torch.get_num_threads(), torch.get_num_interop_threads(), torch.get_default_dtype(),
            torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.benchmark,
            backends.cudnn.deterministic, backends.cudnn.allow_tf32, backends.mkldnn.enabled,
            str(torch._tensor_str.PRINT_OPTS), str(torch.get_default_device()), torch.is_anomaly_enabled(),
            backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        ),
        "transformers": (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()),
        "hub": huggingface_hub.utils.are_progress_bars_disabled(),
        "datasets": (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()),
        "matplotlib": (dict(matplotlib.rcParams), matplotlib.get_backend(auto_select=False)),
        "directory": os.getcwd(),
    }}

def compare(one, other):
    # What differs, by its path, of what was there before.
    if isinstance(one, dict):
        return [(key, *each) for key in one for each in compare(one[key], other.get(key))]
    return [] if repr(one) == repr(other) else [(repr(one), repr(other))]

before = settings()
missing = 0
for parts in modules:
    name = ".".join(parts).removesuffix(".__init__")
    if not name.endswith("__main__"):
        try:
            importlib.import_module(name)
        except srppo.ConfigError:  # of something that is optional
            missing += 1
print(compare(before, settings()), missing)
"""


def test_importing_any_module_changes_no_setting_of_anything_else() -> None:
    said = run_alone("import srppo\n" + SETTINGS.format(root=str(ROOT)))
    changed, _, missing = said.strip().splitlines()[-1].rpartition(" ")
    assert changed == "[]" and int(missing) <= 1
