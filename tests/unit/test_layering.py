"""Ray stays at the edges: only the actors and the four entry modules import it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "rayrl"
MAY_IMPORT_RAY = {"grpo.py", "xe.py", "evaluate.py", "prepare.py"}


def imported_modules(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_only_the_actors_and_entry_modules_import_ray():
    users = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if "ray" in imported_modules(file)
    }
    entries = {user for user in users if not user.startswith("actors/")}
    assert entries <= MAY_IMPORT_RAY
    # The walk sees something: the fleet does import ray.
    assert "actors/fleet.py" in users


def light_import(*modules: str) -> set[str]:
    """Which of torch, ray, vllm and transformers a fresh interpreter loads with ``modules``."""
    code = (
        f"import sys; import {', '.join(modules)}; "
        "print(*[m for m in ('torch', 'ray', 'vllm', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_importing_the_package_and_its_command_lines_is_light():
    modules = ("rayrl", "rayrl.types", "rayrl.config", "rayrl.commands", "rayrl.eval_cli")
    assert light_import(*modules) == set()


def test_the_driver_brings_no_transformers():
    # Its workers do; to wait for that here would delay their start.
    assert light_import("rayrl.grpo", "rayrl.evaluate") == {"torch", "ray"}


def test_rewards_need_neither_torch_nor_ray():
    assert light_import("rayrl.rewards.cider", "rayrl.rewards.ptb") == set()


def test_the_learner_runs_without_ray_and_vllm():
    assert light_import("rayrl.learner.learner", "rayrl.engine.hf") <= {"torch", "transformers"}
