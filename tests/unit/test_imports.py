"""Directions of imports, read from the source: spar_scale -> parallel, one order of folders, light starts."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ORDER = (
    "ops", "objectives", "models", "phases", "config", "files", "data", "stages", "sharding", "training", "planning",
    "doctor", "cluster", "inference", "evaluation", "runs", "cli",
)  # fmt: skip
"""The folders of spar_scale: each imports from those before it alone."""
BUILDERS = "phases"
"""Its declarations stand low, because the rules of a recipe derive from them; its builders import inside a function."""
LOOSE = 5  # modules at the root of spar_scale, at most
FORBIDDEN = {
    "parallel": ("spar_scale",),
    "spar_scale/models": ("parallel",),
    "spar_scale/objectives": ("parallel",),
    "spar_scale/ops": ("parallel",),
}
LIGHT = [
    path.relative_to(ROOT).as_posix()
    for folder in ("cli", "config", "phases")
    for path in (ROOT / "spar_scale" / folder).glob("*.py")
]
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


def offences(folder: str, forbidden: tuple[str, ...], top_only: bool = False) -> list[str]:
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        for name in sorted(imported(path.read_text(), package, top_only)):
            if within(name, forbidden):
                found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


def later(folder: str) -> tuple[str, ...]:
    return tuple(f"spar_scale.{name}" for name in ORDER[ORDER.index(folder) + 1 :])


def test_every_folder_has_its_place_in_the_order() -> None:
    folders = {path.parent.name for path in (ROOT / "spar_scale").glob("*/__init__.py")}
    assert folders == set(ORDER)
    assert len(list((ROOT / "spar_scale").glob("*.py"))) <= LOOSE


@pytest.mark.parametrize("folder", ORDER)
def test_a_folder_imports_from_those_before_it_alone(folder: str) -> None:
    assert offences(f"spar_scale/{folder}", later(folder), top_only=folder == BUILDERS) == []


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
