"""The references are the specification: they have the public functions' names, arguments and defaults."""

import ast
import inspect
from pathlib import Path

import pytest

import unlearn_fast
from unlearn_fast import reference

KEEPS = "undo"  # changes no result; dampen_record and dampen_undo_ are the specification of what it keeps


@pytest.mark.parametrize("name", reference.__all__)
def test_signatures_are_the_public_ones(name):
    ours, specified = (inspect.signature(getattr(module, name)) for module in (unlearn_fast, reference))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values() if p.name != KEEPS] == [
        (p.name, p.kind, p.default) for p in specified.parameters.values()
    ]


def test_it_imports_nothing_that_it_specifies():
    imported = set()
    for file in Path(reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("unlearn_fast"):
                imported.add(node.module)
    own = {module for module in imported if module.startswith("unlearn_fast.reference")}
    assert imported - own == {"unlearn_fast._report"}  # the result type
