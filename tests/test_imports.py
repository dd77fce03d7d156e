"""What may import what, and how large files and folders may become.

Imports are read from the sources, those inside functions included.
"""

import ast
import functools
import graphlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def sources(*folders):
    """Module name -> path, of all Python files in these folders."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {module_name(path): path for path in paths}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(path, top_level=False):
    """Names that a file imports; `from a import b` counts as a.b if that is a module.

    Args:
        path: the file.
        top_level: leave out imports inside functions.
    """
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if is_module(whole) else node.module)
    return frozenset(found)


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def outermost(names):
    return {name.partition(".")[0] for name in names}


def reached(start, files):
    """The modules that `start` imports, and those that these import, and so on."""
    found, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name not in found and name in files:
            found.add(name)
            waiting += imports(files[name])
    return found


def within(name, *folders):
    return any(name == folder or name.startswith(f"{folder}.") for folder in folders)


@pytest.mark.parametrize("folder", ["ehi", "experiments"])
def test_no_circle(folder):
    files = sources(folder)
    graph = {name: imports(path) & files.keys() for name, path in files.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_nothing_in_ehi_imports_the_experiments():
    files = sources("ehi")
    assert [n for n in files if "experiments" in outermost(imports(files[n]))] == []


def test_the_index_stands_alone():
    files = sources("ehi/index")
    at_once = {"numpy", "threadpoolctl", "ehi"} | sys.stdlib_module_names
    when_needed = {"faiss", "huggingface_hub", "ray", "safetensors", "tokenizers"}
    for name, path in files.items():
        ours = [n for n in imports(path) if within(n, "ehi")]
        assert [n for n in ours if not within(n, "ehi.index", "ehi.files")] == [], name
        assert outermost(imports(path, top_level=True)) <= at_once, name
        assert outermost(imports(path)) <= at_once | when_needed, name


def test_files_need_the_standard_library_and_numpy():
    found = outermost(imports(ROOT / "ehi/files.py"))
    assert found <= {"numpy"} | sys.stdlib_module_names


@pytest.mark.parametrize("part", ["index", "index.sharded", "index.faiss_from"])
def test_importing_the_index_loads_numpy_and_threadpoolctl_only(part):
    """In a process of its own: what this one has loaded does not count."""
    script = (
        f"import sys, numpy; before = set(sys.modules); import ehi.{part}\n"
        "print(*{n.partition('.')[0] for n in set(sys.modules) - before}\n"
        "      - sys.stdlib_module_names)\n"
        "print(*(n for n in sys.modules if n.startswith('ehi.')\n"
        "        and not n.startswith(('ehi.index', 'ehi.files'))))"
    )
    run = [sys.executable, "-c", script]
    out = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    loaded, ours = out.stdout.split("\n")[:2]
    assert set(loaded.split()) == {"ehi", "threadpoolctl"}
    assert ours == ""


@pytest.mark.parametrize("part", ["ehi.data", "ehi.serve"])
def test_data_and_service_need_no_jax(part):
    files = sources("ehi")
    for name in [name for name in files if within(name, part)]:
        for module in reached(name, files):
            jax = outermost(imports(files[module])) & {"jax", "flax", "optax", "orbax"}
            assert not jax, f"{name} reaches {module}, which imports {jax}"


def test_only_checkpoints_know_orbax():
    files = sources("ehi", "experiments")
    known = [name for name in files if "orbax" in outermost(imports(files[name]))]
    assert known == ["ehi.train.checkpoint"]


def test_models_and_losses_take_no_config():
    files = sources("ehi")
    bare = [n for n in files if within(n, "ehi.model") or n.endswith("losses")]
    assert bare
    for name in bare:
        assert "ml_collections" not in outermost(imports(files[name])), name


def test_no_file_is_over_500_lines():
    files = sources("ehi", "experiments", "tests")
    lines = {name: len(path.read_text().splitlines()) for name, path in files.items()}
    assert {name: num for name, num in lines.items() if num > 500} == {}


@pytest.mark.parametrize(
    ("folder", "pattern", "most"),
    [
        ("ehi/index", "**/*.py", 36),
        ("ehi/train", "[!_]*.py", 18),
        ("experiments", "[!_]*.py", 10),
    ],
)
def test_folders_stay_small(folder, pattern, most):
    assert len(list((ROOT / folder).glob(pattern))) <= most


def test_the_wheel_holds_all_of_ehi_and_nothing_else():
    setuptools = pytest.importorskip("setuptools")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    find = settings["tool"]["setuptools"]["packages"]["find"]
    found = set(setuptools.find_packages(ROOT, **find))
    folders = {path.parent for path in (ROOT / "ehi").rglob("*.py")}
    assert found == {".".join(path.relative_to(ROOT).parts) for path in folders}
    assert "ehi.index.search" in found


def test_names_of_test_files_are_unique():
    """pytest imports test files by their base name: two of one name stop the suite."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert {name for name in names if names.count(name) > 1} == set()
