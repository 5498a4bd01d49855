"""The claim of tests/fuzz.py, on as many inputs as 20 seconds allow."""
import subprocess
import sys

from conftest import ROOT


def test_damaged_files_and_odd_flags_end_in_one_line_whatever_they_are():
    run = subprocess.run([sys.executable, ROOT / "tests" / "fuzz.py", "--seconds", "20", "--seed", "0"],
                         capture_output=True, text=True)
    assert run.returncode == 0 and "refused" in run.stdout, run.stdout + run.stderr
