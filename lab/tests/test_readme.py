"""README's commands go through the real argument parser, its code runs, its links and names exist."""
import ast
import re
import shlex
from pathlib import Path

import pytest
import torch

import agrpo
import tasks
from lab import cli, experiments, harness           # experiments: registers them in harness

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SCRIPT = (ROOT / "run.sh").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)


def commands():
    """Every shell command of README: the bash blocks, and `bash run.sh ...` within the text."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(found.split()) for found in re.findall(r"`(bash run\.sh [^`]*)`", README)]
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def test_no_comment_follows_a_line_continuation():
    assert not re.search(r"\\[ \t]*#", "".join(blocks("bash"))) and not re.search(r"\\[ \t]+\n", "".join(blocks("bash")))


@pytest.mark.parametrize("line", commands())
def test_every_command_parses(line):
    line = re.sub(r"\$\w", "2", line.replace("--seed S", "--seed 0"))      # the variable of a loop
    words = shlex.split(line, comments=True)
    starts = [i for i, word in enumerate(words) if word.endswith(("run.sh", "agrpo.py"))]
    if not starts:
        pytest.skip("not one of ours: " + line)
    words = words[starts[0]:]
    end = next((i for i, word in enumerate(words) if word.endswith(";")), None)
    words = [word.rstrip(";") for word in (words if end is None else words[:end + 1])]
    flags = words[1:]
    if words[0].endswith("run.sh"):
        command, flags = (flags or ["menu"])[0], flags[1:]
        own = re.search(rf"^    (?:\S+\|)*{re.escape(command)}(?:\|\S+)*\)", SCRIPT, flags=re.M)
        assert own or command in tasks.TASKS, f"run.sh has no command {command}"
        if command == "lab" and flags and flags[0] != "curves":
            harness.Lab(flags[0], flags[1:])               # an unknown experiment or flag raises
            return
        if command in ("test", "kernels", "tiny", "lab", "menu"):
            return
        flags += ["--mode", "eval"] * (command in ("eval", "watch")) + ["--task", command] * (command in tasks.TASKS)
    if flags == ["--help"]:
        return
    cfg = cli.parse(agrpo.Config, flags)                   # an unknown flag or a value of the wrong kind raises
    if cfg.model is None and f"tiny/{cfg.task}" not in agrpo.PRESETS:
        cfg.model = agrpo.LLADA
    cli.fill(cfg, agrpo.PRESETS, {"large": agrpo.LLADA, "small": agrpo.TINY})
    cli.check(cfg, agrpo.steps_per_block)


def test_the_code_to_lift_runs_as_printed():
    """All of README's Python, in order, with a small random model in the place of a large one."""
    code = [block for block in blocks("python") if "agrpo.rollout" in block]
    assert len(code) == 1
    code = code[0].replace("C=256", "C=8").replace("m=128", "m=4").replace("block_length=32", "block_length=8")
    code = code.replace("k=24", "k=2").replace("128 *", "4 *")
    ast.parse(code)
    torch.manual_seed(0)
    table = torch.nn.Embedding(20, 20)

    def model(ids, attention_mask):
        assert attention_mask.shape == ids.shape
        return type("Out", (), {"logits": table(ids).cumsum(1).flip(1)})
    params = list(table.parameters())
    before = params[0].detach().clone()
    names = dict(agrpo=agrpo, model=model, q=torch.randint(2, 20, (16, 3)), q_mask=torch.ones(16, 3, dtype=torch.long),
                 mask_id=0, eos_id=1, rewards=torch.randn(16), params=params, optimizer=torch.optim.SGD(params, lr=1.0))
    exec(code, names)
    assert not torch.equal(before, params[0])


def test_files_sections_and_functions_named_in_the_readme_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
    sections = re.findall(r"^# § (.+)$", (ROOT / "agrpo.py").read_text(), flags=re.M)
    assert sections == ["Config", "The denoising MDP", "Rollout", "Advantages", "Timestep sampler",
                        "Per-step log-probabilities", "Clipped loss", "Update", "Evaluation", "Plumbing", "Train and CLI"]
    tests = (ROOT / "test_agrpo.py").read_text()
    for row in re.findall(r"^\|.*`test_\w+` \|$", README, flags=re.M):
        _, _, section, functions, test, _ = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)]
        assert section in sections and f"def {test.strip('`')}(" in tests
        for function in re.findall(r"`(\w+)`", functions):
            assert hasattr(agrpo, function), function


def test_the_repository_speaks_of_the_project_alone():
    for path in ROOT.rglob("*"):
        inside = path.relative_to(ROOT).parts
        if path.suffix in (".py", ".md", ".sh", ".txt") and not {".venv", "runs", ".git"} & set(inside):
            text = path.read_text()
            assert not re.search(r"/" + "work/|/" + "root/|/home/" + r"\w", text), path
