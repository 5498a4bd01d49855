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
ROOMS = {"repsae.py": (2593, .14), "data.py": (1849, .2), "eval.py": (2151, .21),
         "ssm.py": (1393, .28), "sae.py": (1174, .28)}
ALL_LINES, ALL_LETTERS = 9_160, 514_100
MAY_IMPORT = {"sae": {"torch"}, "ssm": {"torch"}, "eval": {"torch", "numpy", "scipy", "PIL"},
              "data": {"torch", "torchvision", "numpy", "scipy", "PIL", "openslide"}}
FRONT_DOOR = {"torch", "torchvision", "numpy", "scipy", "PIL", *MAY_IMPORT}


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]


def length(node):
    return node.end_lineno - node.lineno + 1


def imported(name):
    """The modules beyond the standard library that ROOT/`name`.py imports."""
    found = set()
    for n in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(n, ast.Import):
            found |= {alias.name.split(".")[0] for alias in n.names}
        if isinstance(n, ast.ImportFrom):
            found.add(n.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


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
    assert bare == [] and ast.get_docstring(tree)


def test_a_room_copied_alone_into_an_empty_folder_works(tmp_path):
    for room in MAY_IMPORT:
        (tmp_path / room).mkdir()
        (tmp_path / room / f"{room}.py").write_text((ROOT / f"{room}.py").read_text())
        assert imported(room) <= MAY_IMPORT[room] and imported("repsae") <= FRONT_DOOR
    program = "import sys\nfor room in sys.argv[1:]: sys.path[0] = room; __import__(room); del sys.modules[room]"
    subprocess.run([sys.executable, "-c", program, *MAY_IMPORT], cwd=tmp_path, check=True)


def test_there_are_five_modules_a_short_script_and_a_readme_that_is_read_in_one_go():
    assert {path.name for path in ROOT.glob("*.py")} == set(ROOMS)
    texts = [(ROOT / name).read_text() for name in ROOMS]
    assert sum(len(text.splitlines()) for text in texts) <= ALL_LINES
    assert sum(map(len, texts)) <= ALL_LETTERS
    readme = (ROOT / "README.md").read_text().splitlines()
    assert len(readme) <= 330 and any(line.startswith("![") for line in readme[:30])
    script = (ROOT / "assets" / "explorer.js").read_text().splitlines()
    assert len(script) <= 450 and max(map(len, script)) <= 100
    others = "".join((ROOT / "tests" / name).read_text() for name in ("thesis.py", "bench.py"))
    assert len(others.splitlines()) <= 750 and max(map(len, others.splitlines())) <= 100


def test_six_packages_are_enough():
    required = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.M)
    assert set(required) <= {"torch", "torchvision", "numpy", "pillow", "scipy", "pytest"}


def test_no_file_names_a_machine_or_a_host_of_packages():
    kinds = ("*.py", "*.md", "*.txt", "tests/**/*.py", "tests/**/*.h", "csrc/*", "assets/*", ".ci/*")
    for path in (path for kind in kinds for path in ROOT.glob(kind)):
        told = re.search(rb"/(?:wor[k]|far[m]|roo[t])/|py[p]i\.", path.read_bytes())
        assert told is None or path.suffix in (".jpg", ".png"), path


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
