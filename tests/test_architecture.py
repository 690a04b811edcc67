"""The limits that keep the code base readable. A number here is raised in a visible diff or not at all."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tpqwen"

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_SELF_ATTRIBUTES = 20

CONTROL = ("cache", "scheduler", "engine", "api", "text")
DEVICE = ("kernels", "quant", "parallel", "model", "worker")
PURE = ("tpqwen.model.checkpoint", "tpqwen.model.config", "tpqwen.model.hub", "tpqwen.model.sizing")
WIRE = ("tpqwen.step", "tpqwen.request", "tpqwen.errors", "tpqwen.config")

# module or package -> roots of what it must not import; the longest matching prefix decides.
FORBIDDEN = {
    **{f"tpqwen.{name}": {"torch", "ray", "transformers", "triton"} for name in CONTROL},
    "tpqwen.engine.process": {"torch", "transformers", "triton"},
    "tpqwen.text.tokenizer": {"torch", "ray", "triton"},
    **{f"tpqwen.{name}": {"ray", "starlette", "fastapi", "pydantic", "tpqwen.scheduler"} for name in DEVICE},
    **{name: {"torch", "ray", "transformers", "triton", "starlette"} for name in (*PURE, *WIRE)},
}
# Each package may import only these packages of ours, besides itself and the base modules.
LAYERS = {
    "cache": set(),
    "scheduler": {"cache"},
    "engine": {"scheduler", "cache", "executor", "transport"},
    "text": set(),
    "api": {"text", "engine"},
    "kernels": set(),
    "quant": set(),
    "parallel": {"kernels", "quant"},
    "model": {"kernels", "quant", "parallel"},
    "worker": {"model", "kernels", "quant", "parallel"},
    "executor": {"worker", "model", "parallel", "transport"},
    "transport": set(),
}
WORDS = {
    r"\bpickle\b": "pickle",
    r"\btorch\.load\b": "torch.load",
    r"(?<![\w.])eval\(": "eval(",
    r"(?<![\w.])exec\(": "exec(",
    r"\btrust_remote_code\b(?!=False)": "trust_remote_code",
}
BAD_MODULE_NAME = re.compile(r"(^|_)(utils?|common|helpers?|misc|manager)(_|$)|^base_|_v\d+$")


def sources() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sources()}


def type_checking_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path: Path) -> set[str]:
    """Modules a file imports anywhere, TYPE_CHECKING blocks apart, as full names; `from a import b` counts as a.b
    where that is a module of ours."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if type_checking_only(node):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{shown(path)}:{node.lineno} imports relatively"
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in MODULES else base)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree(path))
    return found


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def functions(path: Path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def complain(problems: list[str]) -> None:
    assert not problems, "\n  " + "\n  ".join(problems)


def test_files_are_short():
    files = [*sources(), *sorted((ROOT / "tests").rglob("*.py"))]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    complain(
        [f"{shown(p)} has {n} lines, {MAX_FILE_LINES} are allowed" for p, n in lengths.items() if n > MAX_FILE_LINES]
    )


def test_functions_are_short_triton_kernels_apart():
    limit = f"{MAX_FUNCTION_LINES} are allowed"
    complain(
        [
            f"{shown(path)}:{f.lineno} {f.name} has {f.end_lineno - f.lineno + 1} lines, {limit}"
            for path in sources()
            for f in functions(path)
            if f.end_lineno - f.lineno + 1 > MAX_FUNCTION_LINES and not is_kernel(f)
        ]
    )


def test_classes_have_few_attributes():
    problems = []
    for path in sources():
        for cls in (n for n in ast.walk(tree(path)) if isinstance(n, ast.ClassDef)):
            names = {
                n.attr
                for n in ast.walk(cls)
                if isinstance(n, ast.Attribute)
                and isinstance(n.ctx, ast.Store)
                and isinstance(n.value, ast.Name)
                and n.value.id == "self"
            }
            if len(names) > MAX_SELF_ATTRIBUTES:
                problems.append(
                    f"{shown(path)} {cls.name} sets {len(names)} attributes, {MAX_SELF_ATTRIBUTES} are allowed"
                )
    complain(problems)


def test_no_import_cycle():
    graph = {
        name: {m for m in imports(path) if m in MODULES and m not in ("tpqwen", name)} for name, path in MODULES.items()
    }
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail("import cycle: " + " -> ".join(error.args[1]))


def test_columns_keep_to_their_side():
    problems = []
    for name, path in MODULES.items():
        rules = [prefix for prefix in FORBIDDEN if within(name, prefix)]
        if not rules:
            continue
        forbidden = FORBIDDEN[max(rules, key=len)]
        problems += [f"{shown(path)} imports {m}" for m in sorted(imports(path)) for f in forbidden if within(m, f)]
    complain(problems)


def test_packages_import_only_lower_ones():
    problems = []
    for name, path in MODULES.items():
        package = name.split(".")[1] if name.count(".") >= 1 and path.parent != PACKAGE else ""
        if package not in LAYERS:
            continue
        allowed = LAYERS[package] | {package}
        for m in sorted(imports(path)):
            parts = m.split(".")
            target = parts[1] if parts[0] == "tpqwen" and len(parts) > 1 else ""
            if target in LAYERS and target not in allowed and m not in PURE and not m.endswith(".protocol"):
                problems.append(f"{shown(path)} imports {m}; {package} may import {sorted(LAYERS[package]) or 'none'}")
    complain(problems)


def test_only_metrics_imports_prometheus_client():
    complain(
        [shown(p) for n, p in MODULES.items() if n != "tpqwen.metrics" and "prometheus_client" in imports(p)],
    )


def test_init_files_are_empty_but_the_public_one():
    complain([shown(p) for p in sources() if p.name == "__init__.py" and p.parent != PACKAGE and p.stat().st_size])


def test_every_module_says_what_it_is():
    complain([shown(p) for p in sources() if p.stat().st_size and not ast.get_docstring(tree(p))])


def test_module_names_mean_something():
    complain([shown(p) for p in sources() if BAD_MODULE_NAME.search(p.stem)])


def test_forbidden_words_are_absent():
    complain(
        [
            f"{shown(path)}:{number} {word}: {line.strip()}"
            for path in sources()
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            for pattern, word in WORDS.items()
            if re.search(pattern, line) and "never pickle" not in line
        ]
    )


def test_no_file_names_the_machine_it_was_written_on():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    places = re.compile(r"(?<![\w.])/" + r"(work|root|home/(?!tpqwen\b)\w+)/")
    problems = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if not path.is_file() or path.stat().st_size > 1_000_000 or path.suffix in (".safetensors", ".png"):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        problems += [f"{name}: {m.group()}" for m in places.finditer(text)]
    complain(problems)


def test_dependencies_are_bounded():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[\[<>=!; ]", d, maxsplit=1)[0]: d for d in project["dependencies"]}
    assert "<" in needed["torch"], "torch needs an upper bound: without it pip fetches the newest CUDA build"
    assert re.search(r"==\d", needed["ray"]), "ray is pinned exactly: its cluster must run the same version"


def test_cheap_modules_stay_cheap():
    probe = (
        "import sys, tpqwen, tpqwen.step, tpqwen.config, tpqwen.engine.protocol, tpqwen.logs\n"
        "print(sorted({'torch', 'ray', 'transformers', 'starlette'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["tpqwen.console.serve", "tpqwen.service", "serve_app", "tpqwen.llm"])
def test_only_ranks_import_torch(module: str):
    """Its import takes seconds, in the command and in the replica before any rank begins; and a rank has its process
    that compiles kernels started before."""
    probe = f"import sys, {module}\nprint(sorted({{'torch', 'triton', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_readme_map_names_every_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    expected = {shown(p).removeprefix("tpqwen/") for p in sources() if p.name != "__init__.py"} | {"__init__.py"}
    mapped = set(re.findall(r"^\| `([\w/]+\.py)` \|", text, re.MULTILINE)) - {"serve_app.py"}
    complain(
        [f"README's map lacks {name}: run make map" for name in sorted(expected - mapped)]
        + [f"README's map names {name}, which does not exist: run make map" for name in sorted(mapped - expected)]
    )
