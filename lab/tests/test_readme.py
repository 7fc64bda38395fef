"""README's commands go through the real parsers, its links and names exist; imports run one way."""
import ast
import re
import shlex
import sys
from pathlib import Path

import pytest

import agrpo

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SCRIPT = (ROOT / "run.sh").read_text()
sys.path.insert(0, str(ROOT / "lab"))


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


def commands():
    """Every shell command of README: those of the bash blocks, and those within its sentences."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    starts = r"(?:bash run\.sh|python \S+\.py|torchrun)"
    lines += [" ".join(found.split()) for found in re.findall(rf"`({starts} [^`]*)`", README)]
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


def run_sh(command, flags):
    """What run.sh makes of its first word: words that begin with a Python file. [] for its own."""
    if command in ("menu", "help", "test"):
        return []
    cases = re.findall(r"^ +(\S+)\) +setup; exec \$python (.*) ;;$", SCRIPT, flags=re.M)
    found = dict(cases).get(command) or dict(cases)["*"]
    words = shlex.split(found.replace('"$command"', command).replace('"$@"', ""))
    return [*words, *flags]


def python_call(line):
    """The words of a command from its Python file on; [] where it calls none of ours."""
    line = re.sub(r"\$\w+|(?<=--seed )S\b", "2", line)         # the variable of a loop
    words = re.split(r" (?:;|&&|\||>) ?|;", line)[-1] if "run.sh" not in line.split(";")[0] else line
    words = [word.rstrip(";") for word in shlex.split(words, comments=True)]
    words = words[:words.index("done")] if "done" in words else words
    for i, word in enumerate(words):
        if word.endswith("run.sh"):
            return run_sh((words[i + 1:] or ["menu"])[0], words[i + 2:])
        if word.endswith(".py"):
            return words[i:]
    return []


def parse(file, flags):
    """Flags through the parser of the file that they are for. Raises if it would refuse them."""
    if flags in (["--help"], ["-h"]):
        return
    if file == "agrpo.py":
        agrpo.parse(flags)
    elif file == "lab/experiments.py":
        import experiments
        name, rest = (flags or ["menu"])[0], flags[1:]
        if flags and name not in ("curves", "menu"):
            experiments.Lab(name, rest)
    elif file != "lab/make_tiny.py":
        __import__(Path(file).stem).parse(flags)


@pytest.mark.parametrize("line", commands())
def test_every_command_parses(line, monkeypatch):
    monkeypatch.chdir(ROOT)                                     # lab/math_task.py and the like
    monkeypatch.setattr(agrpo.torch.cuda, "device_count", lambda: 8)
    file, *flags = python_call(line) or [""]
    if not file:
        pytest.skip("none of ours: " + line)
    assert (ROOT / file).is_file() or file.startswith("my_"), file
    if "my_task.py" in flags:                                   # the reader's own file
        flags[flags.index("my_task.py")] = "lab/choice_task.py"
    parse(file, flags)


def test_no_comment_follows_a_line_continuation():
    assert not re.search(r"\\[ \t]*#|\\[ \t]+\n", "".join(blocks("bash")))


def test_links_functions_and_tests_that_readme_names_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for name in re.findall(r"`agrpo\.(\w+)[`(]", README):
        assert name == "py" or hasattr(agrpo, name), name
    tests = "".join(path.read_text() for path in [ROOT / "test_agrpo.py", *ROOT.glob("lab/tests/*.py")])
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name


# --- imports run one way ------------------------------------------------------------------------

def imported(path):
    """Names of the top-level modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= set(node.module.split(".")) | {alias.name for alias in node.names}
    return names


def test_imports_run_one_way():
    lab = {path.stem for path in ROOT.glob("lab/*.py")} | {"lab"}
    ours = lab | {"agrpo", "kernels", "tasks"}
    assert imported(ROOT / "kernels.py") & ours == set()
    assert imported(ROOT / "tasks.py") & ours == set()
    assert imported(ROOT / "agrpo.py") & ours == {"kernels", "tasks"}
    for path in ROOT.glob("lab/*.py"):
        if path.stem != "experiments":
            assert imported(path) & lab == set(), path


def test_the_repository_speaks_of_the_project_alone():
    private = "/" + r"work/|/" + r"root/|/home/" + r"\w"
    for path in ROOT.rglob("*"):
        folders = set(path.relative_to(ROOT).parts)
        if path.suffix in (".py", ".md", ".sh", ".txt") and not {".venv", "runs", ".git"} & folders:
            assert not re.search(private, path.read_text()), path
