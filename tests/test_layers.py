"""The architecture: imports go one way, private JAX stays in one place, importing the package starts nothing."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "adjoint_jax"
ROOMS = (
    "tree",
    "lanes",
    "ends",
    "forward_only",
    "reverse_only",
    "hoisting",
    "halves",
    "derivation",
    "kernels",
    "scalars",
    "stacks",
    "problem",
    "interpolation",
    "quadrature",
    "linear",
    "tolerance",
    "solvers",
    "controllers",
    "saveat",
    "recorders",
    "solution",
    "errors",
    "integrate",
    "adjoints",
    "solve",
    "diagnostics",
    "__init__",
)
"""Modules and sub-packages, from the top: each imports from its own sub-package and from what stands above it."""
PRIVATE = {
    "equinox.internal": {"forward_only"},
    "jax.extend": {"kernels", "reverse_only"},
    "jax.interpreters": {"kernels", "reverse_only"},
    "jax._src": set(),
    "jaxlib": set(),
}
"""What is not public, or seldom needed, and the modules that may use it."""


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def is_module(name):
    return name in SOURCES


def imported_names(source):
    """Dotted names of everything that is imported, anywhere in a module, functions included."""
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "Relative imports hide what is imported from where."
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def internal_imports(name):
    """Modules of the package that a module imports."""
    for imported in imported_names(SOURCES[name]):
        head, _, rest = imported.partition(".")
        if head != "adjoint_jax":
            continue
        while rest and not is_module(rest):
            rest = rest.rpartition(".")[0]
        yield rest or "__init__"


def room(name):
    return name.partition(".")[0]


def attribute_chains(source):
    """Dotted attribute accesses such as `jax.extend.core`, aliases of `jax` and `equinox` spelled out."""
    aliases = {"eqx": "equinox"}
    for node in ast.walk(source):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name):
            yield ".".join([aliases.get(node.id, node.id), *reversed(parts)])


def test_every_module_has_a_place_in_the_order():
    assert {room(name) for name in SOURCES} == set(ROOMS)


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_imports_only_from_above(name):
    for imported in internal_imports(name):
        if room(imported) != room(name):
            assert ROOMS.index(room(imported)) < ROOMS.index(room(name)), f"{name} imports {imported}"


def test_no_import_cycle_within_a_room():
    settled, remaining = set(), dict.fromkeys(SOURCES)
    while remaining:
        free = [name for name in remaining if not (set(internal_imports(name)) & remaining.keys()) - {name}]
        assert free, f"Import cycle among {list(remaining)}"
        settled.update(free)
        for name in free:
            del remaining[name]
    assert settled == set(SOURCES)


def test_the_loops_know_nothing_of_adjoints_and_adjoints_touch_no_loop():
    assert not any(room(imported) in ("adjoints", "solve") for imported in internal_imports("integrate"))
    for name in SOURCES:
        if room(name) == "adjoints":
            private = [i for i in imported_names(SOURCES[name]) if i.rpartition(".")[2].startswith("_")]
            assert not private, f"{name} reaches into another file's private parts: {private}"


@pytest.mark.parametrize("private", PRIVATE)
def test_private_jax_is_confined_to_few_files(private):
    users = {
        name
        for name, source in SOURCES.items()
        for used in (*imported_names(source), *attribute_chains(source))
        if used.startswith(private)
    }
    assert users <= PRIVATE[private]


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_public_name_is_there_and_its_module_is_imported_when_it_is_asked_for():
    code = """
import sys
import adjoint_jax
late = {"adjoint_jax." + module for module in adjoint_jax._LATER} | {"adjoint_jax.diagnostics"}
assert not late & set(sys.modules), late & set(sys.modules)
assert set(adjoint_jax.__all__) <= set(dir(adjoint_jax))
from adjoint_jax import *
from adjoint_jax import Rodas5P
assert Rodas5P is adjoint_jax.Rodas5P is sys.modules["adjoint_jax.solvers.rosenbrock_methods"].Rodas5P
assert late <= set(sys.modules)
try:
    adjoint_jax.Rodas6P
except AttributeError as error:
    print(error)
"""
    outcome = run_python(code)
    assert outcome.stdout.strip() == "module 'adjoint_jax' has no attribute 'Rodas6P'", outcome.stderr


def test_type_checkers_see_what_is_imported_later():
    import adjoint_jax

    block = next(node for node in SOURCES["__init__"].body if isinstance(node, ast.If))
    seen = set(imported_names(block))
    later = {f"adjoint_jax.{module}.{name}" for module, names in adjoint_jax._LATER.items() for name in names}
    assert seen == later | {"adjoint_jax.diagnostics"}


def test_importing_starts_no_backend_and_flips_no_flag():
    """With a platform that does not exist, everything that would start a backend fails."""
    code = """
import jax
before = {name: getattr(jax.config, name) for name in ("jax_enable_x64", "jax_debug_nans", "jax_numpy_dtype_promotion")}
import adjoint_jax
adjoint_jax.PIDController(rtol=1e-6), adjoint_jax.Tsit5(), adjoint_jax.SaveAt(t1=True), adjoint_jax.DiscreteAdjoint()
assert before == {name: getattr(jax.config, name) for name in before}
print("imported")
try:
    jax.numpy.zeros(1)
except Exception:
    print("a backend cannot start here")
"""
    outcome = run_python(code, JAX_PLATFORMS="no_such_platform", JAX_ENABLE_X64="0")
    assert outcome.stdout.splitlines() == ["imported", "a backend cannot start here"], outcome.stderr
