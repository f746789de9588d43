"""The code that kept results depend on: what their makers import of this repository, also through others."""

from __future__ import annotations

import ast
from pathlib import Path

from attribution.files import content_key

ROOT = Path(__file__).resolve().parents[1]
# How work is shared, files are written and settings are read changes no result; values of settings count by
# themselves. So these may be edited while a run of days is under way.
BESIDE = (
    "attribution/files.py",
    "attribution/memory.py",
    "attribution/params.py",
    "attribution/training_settings.py",
    "stages/imports.py",
    "stages/incremental.py",
    "stages/processes.py",
    "stages/workers.py",
)


def code_behind(module: str) -> tuple[str, ...]:
    """The .py files that results made by the file `module` may depend on: it, and all it imports but BESIDE.

    What it comes to import cannot be forgotten, as it would be in a list.
    """
    beside = {ROOT / name for name in BESIDE}
    return tuple(str(path) for path in sorted(imported_files(Path(module).resolve(), ROOT) - beside))


def code_key(*modules: str) -> str:
    """Equal while the modules (paths of .py files) hold equal code: comments and docstrings do not count."""
    return content_key([_code(Path(module)) for module in modules])


def imported_files(module: Path, root: Path) -> set[Path]:
    """The module and every module of this repository that it imports, itself or through others."""
    found, todo = {module}, [module]
    while todo:
        for node in ast.walk(ast.parse(todo.pop().read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for path in (root / Path(*name.split(".")).with_suffix(".py") for name in names):
                if path.is_file() and path not in found:
                    found.add(path)
                    todo.append(path)
    return found


def _code(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node, clean=False) is not None
            node.body = node.body[has_docstring:]
    return ast.dump(tree)
