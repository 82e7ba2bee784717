"""The rooms of the package and which of them each may import, as docs/contributing/architecture.md has them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import ear_ops

PACKAGE = Path(ear_ops.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "contributing" / "architecture.md"


def rules() -> dict[str, set[str]]:
    """The rooms that each room may import, from the page's table: ``| `room` | what it holds | `room`, `room` |``."""
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", PAGE.read_text(encoding="utf-8"), re.M)
    return {room: set(re.findall(r"`(\w+)`", allowed)) for room, allowed in rows}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "_build_info.py"]  # which a build may write
    paths = {path: path.relative_to(PACKAGE.parent).with_suffix("") for path in files}
    return {".".join(name.parts).removesuffix(".__init__"): path for path, name in paths.items()}


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of this package that a file imports, also inside its functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports inside the package are written absolutely"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in known or node.module in known:
                    yield submodule if submodule in known else str(node.module)


def room(module: str) -> str:
    return module.split(".")[1]


def may_import(module: str, imported: str, allowed: dict[str, set[str]]) -> bool:
    if imported == "ear_ops":  # the public names
        return room(module) == "recipes"
    return room(imported) in {room(module), *allowed[room(module)]}


def test_each_room_imports_what_the_page_allows() -> None:
    known, allowed = modules(), rules()
    inside = [name for name in known if name != "ear_ops"]  # which gathers the public names
    assert {room(name) for name in inside} == allowed.keys(), "the page's table has other rooms than the package"
    wrong = [
        f"{name} imports {imported}"
        for name in inside
        for imported in imports(known[name], known)
        if not may_import(name, imported, allowed)
    ]
    assert not wrong, f"not allowed by {PAGE.name}: {wrong}"


def test_no_imports_in_a_circle() -> None:
    known = modules()
    try:
        TopologicalSorter({name: set(imports(path, known)) for name, path in known.items()}).prepare()
    except CycleError as error:
        raise AssertionError(f"modules import each other: {' -> '.join(error.args[1])}") from None


def test_the_page_lets_no_room_import_in_a_circle() -> None:
    TopologicalSorter(rules()).prepare()


def test_the_library_needs_torch_alone() -> None:
    """On a module of one's own nothing else is imported; transformers belongs to models of its and to the mixin."""
    program = """
import sys
for name in ("transformers", "accelerate", "datasets", "tokenizers", "typer", "rich", "sklearn", "scipy", "matplotlib"):
    sys.modules[name] = None
import torch, ear_ops

class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, hidden):
        return torch.softmax(self.q(hidden) @ self.k(hidden).transpose(-1, -2), -1) @ hidden

model = Attention()
with ear_ops.attach(model, [ear_ops.AttentionPull(query="q", key="k", num_heads=2)]) as ear:
    model(torch.randn(4, 5, 8))
    ear.loss().backward()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_private_names_of_torch_are_listed() -> None:
    """A release of torch may take them away, so the page for releases lists them all."""
    used = set()
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Attribute):
                names = [ast.unparse(node)]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                private = any(part.startswith("_") for part in node.module.split("."))
                names = [node.module if private else f"{node.module}.{alias.name}" for alias in node.names]
            used |= {name for name in names if re.fullmatch(r"torch(\.\w+)*\._[a-zA-Z]\w*", name)}
    used -= {other for other in used for name in used if name.startswith(f"{other}.")}  # torch._C of torch._C._name
    page = (PAGE.parent / "release.md").read_text(encoding="utf-8")
    assert used == set(re.findall(r"^\| `(torch\.[\w.]+)` \|", page, re.M))
