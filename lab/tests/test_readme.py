"""README's commands go through the real parsers, and its names exist."""
import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import add_gradient, policy_of, shelf

import agrpo
import run
import tasks

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def commands():
    """Every shell command of README: those of the bash blocks, and those in its sentences."""
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", README, flags=re.S | re.M))
    lines = blocks.replace("\\\n", " ").splitlines()
    ours = r"(?:bash run\.sh|python \S+\.py|torchrun)"
    lines += [" ".join(found.split()) for found in re.findall(rf"`({ours}[^`]*)`", README)]
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def python_block(beginning):
    """The Python block of README that begins so."""
    return re.search(rf"^```python\n({re.escape(beginning)}.*?)^```", README, re.S | re.M)[1]


# --- what a command runs ----------------------------------------------------------------------

@pytest.fixture(scope="module")
def run_sh(tmp_path_factory):
    """run.sh itself, with a python that prints its arguments: words -> those."""
    folder = tmp_path_factory.mktemp("home")
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    python = folder / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho CALL\nprintf "PYTHON %s\\n" "$@"\n')
    python.chmod(0o755)
    with open(folder / "requirements.txt") as wanted:           # as if it were installed
        stamp = subprocess.run(["cksum"], stdin=wanted, capture_output=True, check=True).stdout
    (folder / ".venv" / ".installed").write_bytes(stamp)

    def call(words):
        argv = ["bash", folder / "run.sh", *words]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.rpartition("CALL\n")[2].splitlines()            # the last one
        return [line[7:] for line in lines if line.startswith("PYTHON ")]
    return call


def python_file(words, run_sh):
    """The Python file that a command runs, and its flags; ("", []) where it is none of ours."""
    for i, word in enumerate(words):
        if word.endswith("run.sh"):
            words, i = run_sh(words[i + 1:]) or [""], 0
        elif word.endswith("torchrun"):                         # by its own parser
            from torch.distributed.run import parse_args
            args = parse_args(words[i + 1:])
            return args.training_script, args.training_script_args
        if words[i].endswith(".py"):
            return words[i], words[i + 1:]
    return "", []


class Parsed(Exception):
    pass


def parse(file, flags, monkeypatch):
    """Flags through the parser of the file that they are for. Raises if that refuses them."""
    module = __import__(Path(file).stem)
    if file == "lab/experiments.py":
        if flags and flags[0] in module.EXPERIMENTS:
            module.Lab(flags[0], flags[1:])
            return
        assert flags == [] or flags[0] == "curves", f"no experiment {flags[0]}"
    elif hasattr(module, "parse"):
        module.parse(flags)
    else:                                                       # main() parses, then works
        real = argparse.ArgumentParser.parse_args

        def parsed(*args):
            real(*args)
            raise Parsed
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        monkeypatch.setattr(sys, "argv", [file, *flags])
        with pytest.raises(Parsed):
            module.main()


@pytest.fixture
def my_task(tmp_path, monkeypatch):
    """README's task of one's own as a file; what it registers is forgotten after the test."""
    monkeypatch.setattr(tasks, "TASKS", tasks.Tasks(tasks.TASKS))
    file = tmp_path / "my_task.py"
    file.write_text(python_block("# my_task.py"))
    return str(file)


@pytest.mark.parametrize("line", commands())
def test_every_command_parses(line, run_sh, my_task, monkeypatch):
    monkeypatch.chdir(ROOT)                                     # for --task lab/math_task.py
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    line = re.sub(r"\$\w+|(?<=--seed )S\b", "2", line)          # the variable of a loop
    found = [python_file(shlex.split(part, comments=True), run_sh)
             for part in re.split(r"&&|;|\|", line)]
    for file, flags in found:
        flags = [my_task if flag == "my_task.py" else flag for flag in flags]
        if file and flags not in (["--help"], ["-h"]):
            assert (ROOT / file).is_file()
            parse(file, flags, monkeypatch)


# --- what a reader copies ---------------------------------------------------------------------

def test_the_task_of_ones_own_makes_problems_and_grades(my_task):
    task = tasks.TASKS[run.find_task(my_task)]
    example = task.make("0", 0, "train")
    first, second, third = example["nums"]
    assert task.prompt(example)[-1]["content"] == f"Numbers: {first} {second} {third}"
    right = task.grade(f"<answer> {third} {second} {first} </answer>", example)
    assert (right.reward, right.correct) == (4.0, True)
    test = tasks.load("reverse", "test")
    train = tasks.load("reverse", "train", held_out=test)
    assert not {str(x["nums"]) for x in train[:2000]} & {str(x["nums"]) for x in test}
    short = task.grade(f"<answer> {third}", example)
    assert (short.reward, short.correct) == (1.0, False)


def test_the_policy_of_ones_own_runs(tmp_path):
    (tmp_path / "my_policy.py").write_text(python_block("# my_policy.py"))
    name = str(tmp_path / "my_policy.py") + ":NoFuture"
    policy = policy_of(shelf["base"], "--policy", name)
    traj, seen = add_gradient(policy)
    assert (seen.ratio - 1).abs().max() < 1e-5
    # What stands behind the block moves nothing in it.
    other = torch.where(torch.arange(8) < 4, traj.o, traj.o.flip(1))
    at, block = torch.arange(4).expand(2, -1), agrpo.enter_block(traj.q, traj.how, 0)
    first, second = (agrpo.logits_at(policy, traj.q, traj.q_mask, o, at, block)
                     for o in (traj.o, other))
    assert torch.equal(first, second)


def test_the_loop_to_lift_runs_and_moves_the_model():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(7, 8), torch.nn.Linear(8, 7)

        def forward(self, ids, attention_mask):
            return argparse.Namespace(logits=self.head(self.embed(ids)))

    torch.manual_seed(0)
    model, before = Model(), Model()
    before.load_state_dict(model.state_dict())
    q = torch.full((16, 3), 2)
    names = dict(
        agrpo=agrpo, torch=torch, model=model, MASK=6, EOS=5, q=q, q_mask=torch.ones_like(q),
        tokenizer=argparse.Namespace(batch_decode=torch.Tensor.tolist),
        my_checker=lambda texts: [float(text.count(1)) for text in texts])
    exec(python_block("class MyPolicy"), names)
    assert (names["seen"].ratio - 1).abs().max() < 1e-5
    # Token 1 is what the checker pays for.
    was, now = (some(q, None).logits.softmax(dim=-1)[0, 0, 1] for some in (before, model))
    assert now > was


def test_no_comment_follows_a_line_continuation():
    assert not re.search(r"\\[ \t]+(#.*)?\n", README)


def test_files_functions_and_tests_that_readme_names_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    for name in re.findall(r"`agrpo\.(\w+)[`(]", README):
        assert name == "py" or hasattr(agrpo, name), name
    files = [ROOT / "test_agrpo.py", *ROOT.glob("lab/tests/*.py")]
    tests = "".join(path.read_text() for path in files)
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name


def test_the_repository_speaks_of_the_project_alone():
    private = "/" + r"work/|/" + r"root/|/home/" + r"\w"
    for path in ROOT.rglob("*"):
        ours = not {".venv", "runs", ".git"} & set(path.relative_to(ROOT).parts)
        if ours and path.suffix in (".py", ".md", ".sh", ".txt"):
            assert not re.search(private, path.read_text()), path
