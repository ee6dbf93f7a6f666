"""The package's folders depend on each other in one direction: read from all imports, those inside functions and those
for type checkers included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from transformers import GenerationMixin

PACKAGE = Path(__file__).parent.parent / "confu_hf"
FILES = sorted(PACKAGE.rglob("*.py"))

# What each folder, and each file beside them, may import of the package. Bottom up; every folder may import itself.
BASE = {"errors", "compat", "metrics", "host"}  # and `versions`, which is for `__init__` alone
DATA = {"configuration_confu", "options", "experts", "tree"}
MODELS = {"modeling_confu", "target"}
MAY_IMPORT = {
    "versions": {"errors"},
    "errors": set(),
    "compat": {"errors"},
    "metrics": {"errors"},
    "host": set(),
    "gated": set(),
    "evaluate_metrics": BASE,
    "configuration_confu": BASE,
    "experts": BASE,
    "tree": BASE,
    "options": BASE | {"configuration_confu"},
    "modeling_confu": BASE | DATA,
    "target": BASE | DATA,
    "adapter": BASE | DATA | MODELS | {"gated"},
    "acceleration": BASE | DATA | MODELS | {"gated"},
    "decoding": BASE | DATA | MODELS | {"adapter", "acceleration"},
    "hub": BASE | DATA | MODELS | {"adapter"},
    "assistant": BASE | DATA | MODELS | {"adapter", "acceleration", "decoding", "hub"},
    "training": BASE | DATA | MODELS | {"adapter", "hub"},
    "__init__": BASE | DATA | {"adapter", "assistant", "decoding", "versions"},
}


def module_name(file: Path) -> str:
    """`confu_hf/tree/growing.py` -> `tree.growing`, `confu_hf/tree/__init__.py` -> `tree`, `confu_hf/__init__.py` ->
    `__init__`."""
    parts = list(file.relative_to(PACKAGE).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports_of(tree: ast.AST, package: list[str], known: set[str]) -> set[str]:
    """Modules of the package that a tree imports, anywhere. `package` holds the folders that its file lies in."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name.split(".")[1:] for alias in node.names if alias.name.split(".")[0] == PACKAGE.name]
        elif isinstance(node, ast.ImportFrom):
            absolute = (node.module or "").split(".") if node.module else []
            if node.level:
                base = package[: len(package) - (node.level - 1)] + absolute
            elif absolute[0] == PACKAGE.name:
                base = absolute[1:]
            else:
                continue
            # `from ..tree import layout` names a module of the folder, `from ..tree.layout import VerifyLayout` a class.
            paths = [[*base, alias.name] if ".".join([*base, alias.name]) in known else base for alias in node.names]
        else:
            continue
        found |= {".".join(path) or "__init__" for path in paths}
    return found


KNOWN = {module_name(file) for file in FILES}
IMPORTS = {
    module_name(file): imports_of(parse(file), list(file.relative_to(PACKAGE).parts[:-1]), KNOWN) for file in FILES
}


def folder(module: str) -> str:
    return module.split(".")[0]


def violations(imports: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in sorted(others)
        if folder(other) != folder(module) and folder(other) not in MAY_IMPORT[folder(module)]
    ]


def cycles(imports: dict[str, set[str]]) -> set[str]:
    """Modules that lead back to themselves."""

    def reachable(module: str) -> set[str]:
        found, waiting = set(), [module]
        while waiting:
            new = imports.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    return {module for module in imports if module in reachable(module)}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from ..tree.layout import x", {"tree.layout"}),
        ("from ..tree import layout, ends", {"tree.layout", "tree.ends"}),
        ("from .. import compat", {"compat"}),
        ("from .state import x", {"decoding.state"}),
        ("from . import state", {"decoding.state"}),
        ("def f():\n    from ..tree.layout import x", {"tree.layout"}),
        ("class A:\n    def f(self):\n        import confu_hf.tree.layout", {"tree.layout"}),
        ("from confu_hf.tree.layout import x", {"tree.layout"}),
        ("from confu_hf import compat", {"compat"}),
        ("if TYPE_CHECKING:\n    from ..tree.layout import x", {"tree.layout"}),
        ("import torch\nfrom transformers import Cache", set()),
    ],
)
def test_imports_are_found_wherever_they_are(code, expected):
    known = {"tree", "tree.layout", "tree.ends", "decoding", "decoding.state", "compat"}
    assert imports_of(ast.parse(code), ["decoding"], known) == expected


def test_every_folder_has_its_place():
    assert {folder(module) for module in KNOWN} <= set(MAY_IMPORT), "give the new one its place in MAY_IMPORT"


def test_imports_run_one_way():
    assert not violations(IMPORTS)
    assert not cycles(IMPORTS)
    assert not cycles({name: others - {name} for name, others in MAY_IMPORT.items()})


@pytest.mark.parametrize(
    ("module", "other"),
    [("tree.layout", "decoding.loop"), ("target.passes", "adapter.layer"), ("decoding.loop", "training.losses")],
)
def test_an_import_turned_round_is_seen(module, other):
    turned = {**IMPORTS, module: IMPORTS[module] | {other}}
    assert violations(turned) == [f"{module} imports {other}"]


def test_a_cycle_within_a_folder_is_seen():
    assert "adapter.config" in IMPORTS["adapter.files"]
    turned = {**IMPORTS, "adapter.config": IMPORTS["adapter.config"] | {"adapter.files"}}
    assert {"adapter.config", "adapter.files"} <= cycles(turned)


def test_the_package_does_not_load_training_on_import():
    """Decoding needs no `datasets`: nothing but training itself imports training."""
    assert not [name for name, others in MAY_IMPORT.items() if "training" in others]


def names_in(tree: ast.AST) -> set[str]:
    """Attributes, definitions and strings: all the ways to reach a method by name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def test_private_names_of_generate_are_in_one_file():
    private = {name for name in vars(GenerationMixin) if name.startswith("_") and not name.startswith("__")}
    assert "_assisted_decoding" in private
    users = {module_name(file) for file in FILES if names_in(parse(file)) & private}
    assert users == {"compat"}


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_files_and_functions_say_what_they_do_and_stay_short(file):
    tree = parse(file)
    assert len(file.read_text(encoding="utf-8").splitlines()) < 400
    assert ast.get_docstring(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno - node.lineno >= 60}
    assert not long
