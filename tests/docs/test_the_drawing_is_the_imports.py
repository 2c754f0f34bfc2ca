"""The drawing of the packages in docs/architecture.md agrees with the imports.

The lists of modules in the docstrings of packages agree with the files.
"""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "bsjax"
PAGE = ROOT / "docs" / "architecture.md"


def drawn_layers() -> list[list[str]]:
    """The packages of each line of the drawing, from top to bottom."""
    section = PAGE.read_text(encoding="utf-8").split("\n## Packages\n")[1]
    (drawing,) = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    return [re.split(r" {2,}", line)[0].split(", ") for line in drawing.splitlines()]


def imports_between_packages() -> set[tuple[str, str, str]]:
    """(importing package, imported package, file) of every import inside bsjax."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        inner = path.relative_to(PACKAGE)
        if len(inner.parts) == 1 and inner.stem in ("__init__", "__main__"):
            continue  # These list the public names and start the console script.
        importer = inner.parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import, which this test does not read"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                parts = name.split(".")
                if parts[0] == "bsjax" and len(parts) > 1 and parts[1] != importer:
                    found.add((importer, parts[1], str(inner)))
    return found


def test_every_package_and_module_of_bsjax_is_drawn_once():
    drawn = [name for layer in drawn_layers() for name in layer]
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert sorted(drawn) == sorted(modules | packages)


def test_every_import_points_down():
    rank = {name: number for number, layer in enumerate(drawn_layers()) for name in layer}
    edges = imports_between_packages()
    assert len({edge[:2] for edge in edges}) > 20, "the imports were not found"
    # `from bsjax import name` imports public names lazily; those are not packages of the drawing.
    wrong = [edge for edge in edges if edge[1] in rank and rank[edge[0]] >= rank[edge[1]]]
    assert not wrong


def test_every_imported_name_of_bsjax_is_a_drawn_package():
    drawn = {name for layer in drawn_layers() for name in layer}
    assert {edge[1] for edge in imports_between_packages()} <= drawn | {"__version__"}


@pytest.fixture(scope="module")
def contract() -> list[str]:
    """The layers of bsjax that import-linter checks, from top to bottom."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = [
        contract["layers"]
        for contract in settings["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers" and contract["layers"][0].startswith("bsjax.")
    ]
    return layers


def test_make_lint_checks_the_same_layers(contract):
    checked = [re.findall(r"bsjax\.(\w+)", layer) for layer in contract]
    assert [layer for layer in checked if layer != ["__main__"]] == drawn_layers()


def test_every_file_that_the_page_names_exists():
    named = re.findall(r"`(bsjax/[\w/]+(?:\.py|/))`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 10
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def listed_modules(package: Path) -> list[str]:
    """The modules that a package's docstring lists, each on a line with what it does."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    return re.findall(r"^(\w+) {2,}\S", ast.get_docstring(tree) or "", re.MULTILINE)


PACKAGES = [
    path.parent for root in (PACKAGE, ROOT / "examples") for path in root.rglob("__init__.py")
]
WITH_LISTS = [package for package in PACKAGES if listed_modules(package)]


def test_lists_of_modules_are_found():
    assert len(WITH_LISTS) > 5


@pytest.mark.parametrize("package", WITH_LISTS, ids=lambda package: package.name)
def test_a_list_of_modules_names_each_of_them_once(package):
    modules = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    assert sorted(listed_modules(package)) == sorted(modules)
