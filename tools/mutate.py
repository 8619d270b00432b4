"""Seeds mistakes into the rules and the cut, and counts those that the tests catch: `python tools/mutate.py [-n 100]`.

A mistake is a tie, lock or rectangle that is dropped, an index that is off by one (an axis taken for another), or a
comparison that is turned round. Each is made in a copy of the package, and the tests of the rules run on it until one
fails. Survivors are listed with their place: either a test is missing, or the line doesn't matter.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OTHERS = ("cut", "layers", "lineup", "packed", "integers")
FILES = [
    *sorted((ROOT / "onnxprune" / "labels").glob("*.py")),
    *(next((ROOT / "onnxprune").rglob(f"{name}.py")) for name in OTHERS),
]
TESTS = ["tests/rules", *(f"tests/test_{name}.py" for name in (*OTHERS[1:], "unroll")), "tests/properties"]
CALLS = {"tie", "lock", "lock_all", "rectangle", "inexact"}
TURNED = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.GtE: ast.Lt}
LIMIT = 300.0  # seconds that the tests may take on one mistake


def places(tree: ast.Module) -> list[tuple[str, int]]:
    """What can be mistaken: (kind, number of the node in the walk)."""
    found = []
    for number, node in enumerate(ast.walk(tree)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            name = getattr(node.value.func, "attr", "")
            found += [("dropped", number)] if name in CALLS else []
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in TURNED:
            found.append(("turned round", number))
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and type(node.slice.value) is int:
            found.append(("off by one", number))
    return found


def mistaken(source: str, kind: str, number: int) -> tuple[str, str]:
    """The source with one mistake in it, and where it is."""
    tree = ast.parse(source)
    node: Any = list(ast.walk(tree))[number]
    before = ast.unparse(copy.deepcopy(node))
    if kind == "dropped":
        node.value = ast.Constant(None)
    elif kind == "turned round":
        node.ops[0] = TURNED[type(node.ops[0])]()
    else:
        node.slice.value += 1
    return ast.unparse(tree), f"line {node.lineno}, {kind}: {before}"


def survives(path: Path, kind: str, number: int) -> dict[str, Any]:
    """Runs the tests on a copy of the project with one mistake."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("onnxprune", "tests", "models", "pyproject.toml"):
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / part)
        changed, where = mistaken(path.read_text(), kind, number)
        (folder / path.relative_to(ROOT)).write_text(changed)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=LIMIT)
            caught = done.returncode != 0
        except subprocess.TimeoutExpired:
            caught = True
        return {"file": str(path.relative_to(ROOT)), "where": where, "caught": caught}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=100, help="how many mistakes, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=Path("mutants.json"))
    given = parser.parse_args()
    every = [(path, *place) for path in FILES for place in places(ast.parse(path.read_text()))]
    chosen = random.Random(given.seed).sample(every, min(given.n, len(every)))
    rows: list[dict[str, Any]] = []

    def work(place: tuple[Path, str, int]) -> None:
        rows.append(survives(*place))
        row = rows[-1]
        print(f"{len(rows):4d} {'caught  ' if row['caught'] else 'SURVIVES'} {row['file']} {row['where']}", flush=True)
        given.output.write_text(json.dumps(rows, indent=1) + "\n")

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(work, chosen))
    print(f"{sum(row['caught'] for row in rows)} of {len(rows)} mistakes were caught ({len(every)} are possible)")


if __name__ == "__main__":
    main()
