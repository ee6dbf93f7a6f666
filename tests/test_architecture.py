"""The files depend on each other in one direction: read from their imports, those inside functions included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from transformers import GenerationMixin

PACKAGE = Path(__file__).parent.parent / "confu_hf"
FILES = sorted(PACKAGE.glob("*.py"))
MODULES = {file.stem for file in FILES} - {"__init__"}

# What each file may import of the package. A new file takes a place here; a new arrow wants a reason.
ALLOWED = {
    # Leaves: tensors, numbers, words.
    "errors": set(),
    "compat": {"errors"},
    "configuration_confu": {"errors"},
    "contemplate": {"errors"},
    "tree": {"errors"},
    "cache": {"compat", "errors"},
    "packing": {"errors"},
    "stats": {"errors"},
    "losses": {"errors"},
    "feature_store": {"errors"},
    "data": {"errors"},
    # The models: adapter, draft, target.
    "adapter_weights": {"errors"},
    "adapter": {"adapter_weights", "compat", "configuration_confu", "contemplate", "errors"},
    "modeling_confu": {"configuration_confu", "contemplate", "errors"},
    "target": {"cache", "compat", "contemplate", "errors", "tree"},
    # Decoding: config -> adapter -> draft -> tree -> verify -> accept -> cache -> next round.
    "drafting": {"cache", "errors", "modeling_confu", "tree"},
    "verification": {"errors", "tree"},
    "generation": {
        "cache",
        "compat",
        "drafting",
        "errors",
        "modeling_confu",
        "packing",
        "stats",
        "target",
        "tree",
        "verification",
    },
    # What meets the user.
    "hub": {"adapter_weights", "compat", "errors"},
    "attachment": {"adapter", "adapter_weights", "compat", "errors"},
    "validation": {"adapter", "adapter_weights", "configuration_confu", "errors", "generation"},
    "assisted": {
        "adapter",
        "adapter_weights",
        "attachment",
        "compat",
        "configuration_confu",
        "errors",
        "generation",
        "hub",
        "modeling_confu",
        "target",
        "validation",
    },
    # Training, beside it.
    "draft_rows": {"data", "errors"},
    "training": {
        "cache",
        "compat",
        "data",
        "draft_rows",
        "errors",
        "feature_store",
        "losses",
        "modeling_confu",
        "target",
    },
    "optimization": {"errors"},
    "trainer": {"adapter_weights", "errors", "optimization", "training"},
    "warm_start": {"errors", "modeling_confu"},
}
TRAINING = {"data", "draft_rows", "feature_store", "losses", "optimization", "trainer", "training", "warm_start"}
DECODING = {
    "assisted",
    "attachment",
    "drafting",
    "generation",
    "hub",
    "packing",
    "stats",
    "validation",
    "verification",
}


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(tree: ast.AST) -> set[str]:
    """Modules of the package that a tree imports, anywhere; not those it only names for type checkers."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
            found |= {path[1] for path in paths if path[0] == PACKAGE.name and len(path) > 1}
        found |= imports_of(node)
    return found


IMPORTS = {file.stem: imports_of(parse(file)) for file in FILES if file.stem != "__init__"}


def reachable(module: str) -> set[str]:
    found, waiting = set(), [module]
    while waiting:
        new = IMPORTS[waiting.pop()] - found
        found |= new
        waiting += new
    return found


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from .tree import x", {"tree"}),
        ("from . import tree, cache", {"tree", "cache"}),
        ("def f():\n    from .tree import x", {"tree"}),
        ("class A:\n    def f(self):\n        import confu_hf.tree", {"tree"}),
        ("from confu_hf.tree import x", {"tree"}),
        ("from confu_hf import tree", {"tree"}),
        ("try:\n    from .tree import x\nexcept ImportError:\n    pass", {"tree"}),
        ("if TYPE_CHECKING:\n    from .tree import x", set()),
        ("import torch\nfrom transformers import Cache", set()),
    ],
)
def test_imports_are_found_wherever_they_are(code, expected):
    assert imports_of(ast.parse(code)) == expected


def test_every_file_has_its_place():
    assert not MODULES - set(ALLOWED), "give the new file its place in ALLOWED"
    assert not set(ALLOWED) - MODULES, "a file is gone: take it out of ALLOWED"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_file_imports_only_what_it_may(module):
    assert IMPORTS[module] <= ALLOWED[module]


def test_there_is_no_cycle():
    assert not {module for module in MODULES if module in reachable(module)}
    assert not {module for module, others in ALLOWED.items() if any(module in ALLOWED[other] for other in others)}


def test_training_and_decoding_do_not_know_each_other():
    assert MODULES >= TRAINING | DECODING
    for module in TRAINING:
        assert not reachable(module) & DECODING, module
    for module in DECODING:
        assert not reachable(module) & TRAINING, module


def test_the_package_does_not_load_training_on_import():
    """Decoding needs no `datasets`."""
    public = imports_of(parse(PACKAGE / "__init__.py"))
    assert public and not set().union(public, *(reachable(module) for module in public)) & TRAINING


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
    users = {file.stem for file in FILES if names_in(parse(file)) & private}
    assert users == {"compat"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_say_what_they_do_and_stay_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) < 400
    assert ast.get_docstring(parse(file))
