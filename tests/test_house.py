"""Claims about the code itself: that it is small, in one style, and that its rooms stand alone."""
import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize

import pytest

import repsae
from conftest import ROOT

# at most so many lines, and at least this share of them comments and docstrings
ROOMS = {"repsae.py": (3400, .1), "data.py": (2150, .2), "eval.py": (2200, .2),
         "ssm.py": (1500, .28), "sae.py": (1200, .28)}
MAY_IMPORT = {"sae": {"torch"}, "ssm": {"torch"}, "eval": {"torch", "numpy", "scipy", "PIL"},
              "data": {"torch", "torchvision", "numpy", "scipy", "PIL", "openslide"}}


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]


def length(node):
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("name", ROOMS)
def test_a_module_is_as_short_and_as_well_commented_as_was_agreed(name):
    text = (ROOT / name).read_text()
    lines, tree = text.splitlines(), ast.parse(text)
    most, share = ROOMS[name]
    assert len(lines) <= most
    assert [line for line in lines if len(line) > 100] == []
    assert [f.name for f in functions(tree) if length(f) > 50] == []
    assert statistics.median(map(length, functions(tree))) <= 12
    told = sum(length(n.body[0]) for n in ast.walk(tree)
               if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(n))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    told += sum(token.type == tokenize.COMMENT for token in tokens)
    assert told >= share * len(lines)
    bare = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
            and not n.name.startswith("_") and not ast.get_docstring(n) and length(n) > 6]
    assert bare == []


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_copied_alone_into_an_empty_folder_works(room, tmp_path):
    (tmp_path / f"{room}.py").write_text((ROOT / f"{room}.py").read_text())
    tree, found = ast.parse((ROOT / f"{room}.py").read_text()), set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            found |= {alias.name.split(".")[0] for alias in n.names}
        if isinstance(n, ast.ImportFrom):
            found.add(n.module.split(".")[0])
    assert found - set(sys.stdlib_module_names) <= MAY_IMPORT[room]
    subprocess.run([sys.executable, "-c", f"import {room}"], cwd=tmp_path, check=True)


def test_there_are_five_modules_and_a_readme_that_is_read_in_one_go():
    assert {path.name for path in ROOT.glob("*.py")} == set(ROOMS)
    assert len((ROOT / "README.md").read_text().splitlines()) <= 330
    others = [ROOT / "tests" / name for name in ("thesis.py", "bench.py")]
    assert sum(len(path.read_text().splitlines()) for path in others) <= 750


def test_a_flag_is_defined_once_and_every_flag_has_a_command_and_a_user():
    tables = [*repsae.GROUPS.values(), repsae.SETTINGS]
    assert sum(map(len, tables)) == len(repsae.FLAGS)
    assert sum(map(len, repsae.GROUPS.values())) <= 110 and len(repsae.COMMANDS) <= 22
    taken = {flag for each in repsae.COMMANDS.values() for flag in each.flags}
    assert set(repsae.FLAGS) - taken == {"set"}
    files = [ROOT / "README.md", *ROOT.glob("tests/*.py"), ROOT / "assets" / "results.md"]
    text = "\n".join(path.read_text() for path in files if path.name != "test_house.py")
    unused = [flag for flag in repsae.FLAGS if not re.search(
        rf"""--(no-)?{flag}\b|["' ]{flag}=|["']{flag.replace("-", "_")}["']|\b{
        flag.replace("-", "_")}=""", text)]
    assert unused == []
