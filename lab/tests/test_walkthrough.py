"""The walkthrough runs as it stands, and the exercises name only what is there."""
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_walkthrough_runs_from_any_folder_and_its_claims_hold(tmp_path):
    """Its cells assert what is exact; here, that it gets to the end and says so."""
    argv, env = [sys.executable, ROOT / "lab" / "walkthrough.py"], {"OMP_NUM_THREADS": "1"}
    out = subprocess.run(argv, cwd=tmp_path, text=True, capture_output=True,
                         env={**os.environ, **env})
    assert out.returncode == 0, out.stderr[-2000:]
    assert "Target: 13" in out.stdout and out.stdout.count("A = ") == 8
    grid = re.findall(r"^t = \d .*", out.stdout, re.M)
    assert len(grid) == 4 and all(len(re.findall(r"\[.+?\]+", line)) == 3 for line in grid)
    assert re.search(r"E\[w\] of \d+ pairs: from 1\.0{9} to 1\.0{9}", out.stdout)
    difference = re.search(r"gradient\| = (\S+)", out.stdout)[1]
    before, after = re.search(r"\{0: ([\d.]+), .* 30: ([\d.]+)\}", out.stdout).groups()
    assert float(difference) < 1e-9 and float(after) > float(before)
    assert not any(tmp_path.iterdir())


def test_the_walkthrough_is_in_percent_format_and_short():
    """What jupytext reads: cells that begin with # %%, texts in comments alone."""
    text = (ROOT / "lab" / "walkthrough.py").read_text()
    lines = text.splitlines()
    assert len(lines) <= 170 and max(map(len, lines)) <= 96
    cells = re.split(r"^# %%", text, flags=re.M)
    assert cells[0] == ""
    for cell in cells[1:]:
        kind, _, body = cell.partition("\n")
        assert kind in ("", " [markdown]")
        assert not kind or all(line.startswith("# ") for line in body.splitlines())


def test_the_exercises_name_only_what_exists():
    """Tests, files, and the functions and constants in which something is to be written."""
    text = (ROOT / "lab" / "EXERCISES.md").read_text()
    files = [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py"), *ROOT.glob("lab/tests/*.py")]
    code = "".join(file.read_text() for file in files)
    tests = set(re.findall(r"\btest_\w+\b(?!\.py)", text))
    assert len(tests) >= 6 and all(f"def {name}(" in code for name in tests)
    for name in set(re.findall(r"`([\w./]+)`", text)) - {"my_task.py", "Near"}:
        found = (ROOT / name).exists() or re.search(rf"\b{re.escape(name)}\b", code)
        assert found, name
