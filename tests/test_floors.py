"""The house keeps its floors: a file imports only from floors below its own, or from its own room."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "overproof"
FLOORS = [
    {"errors", "types", "registry", "folder", "console", "networks", "folding", "features", "losses", "config"},
    {"attacks", "models", "data"},
    {"evaluation", "methods", "guards", "evolution"},
    {"training", "report", "testing", "probes"},
    {"run"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(p for p in ROOT.rglob("*.py") if p.name not in ("__init__.py", "__main__.py") or p.parent != ROOT)


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("overproof."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "overproof":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("overproof.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    room = room_of(path)
    for other in imports(path):
        assert other in LEVEL, f"{path.name} imports the unknown room {other}"
        same_ground = LEVEL[other] == LEVEL[room] == 0
        assert other == room or LEVEL[other] < LEVEL[room] or same_ground, f"{path.name} ({room}) imports {other}"


SHARED = {
    "nim_entries",
    "objective",
    "robust_distiller",
    "introspective",
    "shared_forward",
    "feature_objective",
    "feature_probe",
    "feature_adapters",
    "robust_objective",
    "feature_parts",
    "feature_bank",
    "data_free",
    "data_free_entries",
    "plain_entries",
    "robust_entries",
    "memory",
    "processes",
    "data_free_parts",
    "data_free_pool",
}


def test_methods_never_import_each_other() -> None:
    """A method stands on the shared base, and on parts of its own whose names begin with its name."""
    for path in (ROOT / "methods").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("overproof.methods."):
                other = node.module.removeprefix("overproof.methods.")
                family = path.stem.partition("_")[0]
                assert other in SHARED or other.startswith(f"{family}_"), f"{path.name} imports {node.module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 250, f"{path} is too long"
    assert "pickle" not in text.replace("allow_pickle=False", "").replace("unpickled", "") or path.name == "weights.py"


def loaded(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(' '.join(m for m in sys.modules if '.' not in m))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_light_imports() -> None:
    heavy = {"torch", "torchvision", "timm", "lightning", "matplotlib", "torchmetrics", "sklearn"}
    assert not heavy & loaded("import overproof")
    assert not (heavy - {"matplotlib"}) & loaded("import overproof.report; overproof.report.write_report")
    listing = "import overproof.cli as c, contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()): c.call(['list', 'methods', '--json'])"
    assert not heavy & loaded(listing)
    assert not heavy & loaded(
        "import overproof.cli as c, contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()): c.call(['--help'])"
    )


def test_public_names() -> None:
    import overproof

    assert all(getattr(overproof, name) is not None for name in overproof.__all__)
    assert {"train", "distill", "evaluate", "load", "resume", "PGD", "Linf", "Tap", "Classifier"} <= set(overproof.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = overproof.nonsense
