"""The arrows of the house, read from the source: recipes -> spar_scale -> parallel, and mathematics alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {
    "parallel": ("spar_scale",),
    "spar_scale/models": (
        "parallel",
        "spar_scale.training",
        "spar_scale.data",
        "spar_scale.stages",
        "spar_scale.phases",
    ),
    "spar_scale/objectives": (
        "parallel",
        "spar_scale.training",
        "spar_scale.data",
        "spar_scale.stages",
        "spar_scale.phases",
    ),
    "spar_scale/ops": ("parallel", "spar_scale.training", "spar_scale.data", "spar_scale.stages", "spar_scale.phases"),
}
LIGHT = {f"spar_scale/{name}.py" for name in ("cli", "arguments", "commands", "recipe", "rules", "settings")}
LIGHT |= {str(path.relative_to(ROOT)) for path in (ROOT / "spar_scale" / "phases").glob("*.py")}
HEAVY = ("torch", "numpy", "deepspeed", "transformers", "diffusers", "webdataset", "rich", "PIL")


def imported(source: str, package: str, top_only: bool = False) -> set[str]:
    """Modules that a file imports, absolute; `package` is the dotted package it stands in."""
    tree = ast.parse(source)
    names: set[str] = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offences(folder: str, forbidden: tuple[str, ...]) -> list[str]:
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        for name in sorted(imported(path.read_text(), package)):
            if within(name, forbidden):
                found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_no_arrow_points_the_other_way(folder: str):
    assert list((ROOT / folder).rglob("*.py")), f"{folder} is empty"
    assert offences(folder, FORBIDDEN[folder]) == []


@pytest.mark.parametrize("path", sorted(LIGHT))
def test_what_every_command_loads_imports_nothing_heavy(path: str):
    source = (ROOT / path).read_text()
    assert not {name for name in imported(source, "spar_scale", top_only=True) if within(name, HEAVY)}


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import spar_scale.data", "parallel", "spar_scale.data"),
        ("from spar_scale import data", "parallel", "spar_scale.data"),
        ("def f():\n    from ..training import trainer", "spar_scale.models", "spar_scale.training"),
        ("from . import data", "spar_scale", "spar_scale.data"),
    ],
)
def test_the_reader_of_imports_sees_every_form(source: str, package: str, expected: str):
    assert expected in imported(source, package)
