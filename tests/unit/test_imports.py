"""Directions of imports, read from the source: spar_scale -> parallel, one order of folders, light starts."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ORDER = (
    "ops", "objectives", "models", "phases", "config", "files", "data", "stages", "training", "planning",
    "doctor", "cluster", "inference", "evaluation", "runs", "cli",
)  # fmt: skip
"""The folders of spar_scale: each imports from those before it alone."""
BUILDERS = "phases"
"""Its declarations stand low, because the rules of a recipe derive from them; its builders import inside a function."""
LOOSE = 5  # modules at the root of spar_scale, at most
FORBIDDEN = {
    "parallel": ("spar_scale",),
    "spar_scale/objectives": ("parallel",),
    "spar_scale/ops": ("parallel",),
}
MODELS = ROOT / "spar_scale/models"
FAMILIES = sorted(path.parent for path in MODELS.glob("*/__init__.py"))
FILES = {"__init__.py", "shapes.py", "model.py", "layers.py", "sharding.py", "weights.py"}
"""What every family of models has: its face, shapes, mathematics, layers, cuts, published layouts."""
OF_PARALLEL = {
    "__init__.py": ("errors", "program", "tensor"),
    "layers.py": ("program",),
    "sharding.py": ("errors", "tensor", "topology"),
    "weights.py": ("errors", "files"),
    "presets.py": ("errors",),
    "published.py": ("errors",),
    "roles.py": ("program", "tensor"),
}
"""File of models -> the modules of `parallel` that it may import; others, which hold mathematics, may import none."""
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


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_has_the_same_files_as_the_others_and_is_known_by_its_face_alone(family: Path):
    assert {path.name for path in family.glob("*.py")} >= FILES
    inside = tuple(f"spar_scale.models.{family.name}.{path.stem}" for path in family.glob("*.py"))
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / "spar_scale").rglob("*.py"))
        if path.parent != family
        for name in sorted(imported(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts)))
        if within(name, inside)
    ]
    assert found == []


def test_a_model_s_mathematics_knows_nothing_of_how_it_is_spread():
    found = []
    for path in sorted(MODELS.rglob("*.py")):
        allowed = tuple(f"parallel.{module}" for module in OF_PARALLEL.get(path.name, ()))
        for name in sorted(imported(path.read_text(), ".".join(path.relative_to(ROOT).parent.parts))):
            if within(name, ("parallel",)) and not within(name, allowed):
                found.append(f"{path.relative_to(ROOT)} imports {name}")
    assert found == []


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
