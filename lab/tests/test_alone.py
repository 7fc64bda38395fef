"""The three files by themselves: agrpo.py's § 7 and § 9, as somebody starts them who took them.

And the rule of imports that makes it possible.
"""
import ast
import itertools
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, captured, checkpoint, each, modernbert, trained
from torch import tensor

import agrpo
import tasks

TINY = str(ROOT / "lab" / "tiny")
FILES = "agrpo.py", "kernels.py", "tasks.py"
SMALL = "--updates 2 --eval_n 4 --questions 4".split()


# --- the rule of imports ----------------------------------------------------------------------

def imports(path):
    """The modules that a file imports anywhere in it, also inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield "lab" if node.level else node.module.split(".")[0]


def test_each_floor_of_the_house_stands_on_those_below_it():
    top = {path.stem for path in map(ROOT.joinpath, FILES)}
    lab = {path.stem for path in (ROOT / "lab").glob("*.py")}
    may = dict(kernels=set(), tasks=set(), agrpo={"kernels", "tasks"}, models=top,
               run=top | {"models"}, experiments=top | lab)
    for path in [*map(ROOT.joinpath, FILES), *(ROOT / "lab").glob("*.py")]:
        ours = set(imports(path)) & (top | lab | {"lab", "tests", "conftest"})
        assert ours <= may.get(path.stem, top | {"run", "models"}), path.name


# --- § 7 A transformers model as the policy ---------------------------------------------------

@pytest.fixture(scope="module")
def tiny():
    return agrpo.load_policy(agrpo.Config())


def encode(policy, *texts):
    return policy.encode([[dict(role="user", content=text)] for text in texts])


def near(a, b):
    return torch.allclose(a, b, atol=1e-5)


def test_a_policy_gives_the_models_own_logits_at_the_asked_positions(tiny, monkeypatch):
    """Padding is hidden, whatever stands in it; the head runs on the asked positions alone."""
    q, q_mask = encode(tiny, "Numbers: 1 2 3", "Target: 5", "Numbers: 1 2")
    at = tensor([[q.shape[1] - 1, q.shape[1] - 3]] * 3)
    got = tiny(q, q_mask, at)
    alone = q[1:2, q_mask[1] > 0]
    assert q_mask[1, 0] == 0                                    # padded, on the left
    every = tiny.model(input_ids=alone).logits                  # (1, L, V), asked directly
    assert got.shape == (3, 2, every.shape[2]) and near(got[1], every[0, [-1, -3]])

    junk = q.masked_fill(q_mask == 0, 7)
    for ignores_mask, order in itertools.product((False, True), ([0, 1, 2], [2, 1, 0])):
        monkeypatch.setattr(tiny, "ignores_mask", ignores_mask)     # then one length at a time
        assert near(tiny(junk[order], q_mask[order], at), got[order])
    monkeypatch.setattr(tiny, "shift", 1)                       # Dream predicts i at i - 1
    assert near(tiny(q, q_mask, at + 1), got)


def test_rows_in_the_same_state_share_one_forward_pass(tiny, monkeypatch):
    """Same logits and gradient as one by one; the model sees each state once."""
    one, other = "Numbers: 1 2 3", "Numbers: 4 2 3"
    q, q_mask = encode(tiny, one, other, one, one)
    at = tensor([[0, 3], [2, 1], [4, 3], [0, 3]])
    weights = list(trained(tiny).values())
    states, forward = [], tiny.model.forward
    monkeypatch.setattr(tiny.model, "forward",
                        lambda **x: states.append(len(x["input_ids"])) or forward(**x))

    def logits_and_gradient(*batches):
        logits = torch.cat([tiny(q[rows], q_mask[rows], at[rows]) for rows in batches])
        loss = (logits.square() * torch.arange(1, 5)[:, None, None]).mean()
        return logits, *torch.autograd.grad(loss, weights)
    together = logits_and_gradient(slice(4))
    one_by_one = logits_and_gradient([0], [1], [2], [3])
    assert states == [2, 1, 1, 1, 1] and all(map(near, together, one_by_one))
    # Another mask is another state.
    masks = torch.stack([q_mask[0], torch.arange(q.shape[1]) > 0])
    first, second = tiny(q[[0, 0]], masks, at[[0, 0]])
    assert not near(first, second)


def test_lora_trains_the_blocks_and_its_reference_is_the_base_model(tiny):
    q, q_mask = encode(tiny, "Numbers: 1 2 3")
    logits = lambda: tiny(q, q_mask, tensor([[3, 4]]))
    base, weights = logits(), trained(tiny)
    assert all("lora_" in n and ".layers." in n for n in weights) and len(weights) == 2 * 16
    for name, p in weights.items():
        p.data += 0.1 * ("lora_B" in name)
    with tiny.reference():
        assert torch.equal(logits(), base)
    assert not torch.allclose(logits(), base, atol=1e-2)
    for name, p in weights.items():
        p.data -= 0.1 * ("lora_B" in name)


def test_a_word_that_the_tokenizer_lacks_is_not_quietly_another(tiny):
    with pytest.raises(ValueError, match="lacks a token for a part of .*Zahlen"):
        encode(tiny, "Numbers: 1 2 3", "Zahlen: 1 2 3")


def test_a_model_in_16_bits_has_adapters_and_logits_in_32(tmp_path):
    """And without dropout, whatever its config says."""
    folder = modernbert(tmp_path, attention_dropout=0.5, mlp_dropout=0.5)
    policy = agrpo.load_policy(agrpo.Config(model=folder, dtype="bfloat16"))
    q, q_mask = encode(policy, "Numbers: 1 2 3")
    first, again = (policy(q, q_mask, tensor([[1, 2]])) for _ in range(2))
    assert first.dtype == torch.float32 and torch.equal(first, again)
    assert {p.dtype for p in trained(policy).values()} == {torch.float32}
    assert policy.dtype == torch.bfloat16


# --- § 9 The smallest whole run ---------------------------------------------------------------

@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """An empty folder with the three files."""
    folder = tmp_path_factory.mktemp("alone")
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


def test_every_field_is_a_flag_and_every_option_of_the_task():
    options = tasks.TASKS["countdown"].options
    assert agrpo.parse([]).options == {**options, "max_number": 16, "division": False}
    cfg = agrpo.parse("--task sudoku --empties 9 --k 0.5 --trust_remote_code true".split())
    options = {**tasks.TASKS["sudoku"].options, "empties": 9}
    assert cfg == agrpo.Config("sudoku", options, k=0.5, trust_remote_code=True)


@pytest.fixture(scope="module")
def finished(alone):
    """`python agrpo.py --model FOLDER`, in a process that knows of nothing else."""
    argv = [sys.executable, "agrpo.py", "--model", TINY, *SMALL, "--out", "one"]
    env = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(argv, cwd=alone, capture_output=True, text=True, timeout=600,
                          env=dict(env, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"))
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights(folder):
    from safetensors.torch import load_file
    return load_file(folder / "adapter_model.safetensors")


def test_it_trains_says_both_accuracies_and_plain_peft_loads_the_weights(alone, finished):
    from peft import PeftModel
    from transformers import AutoModelForMaskedLM

    share = r"(\d+\.\d)%"
    base, trained = re.search(f"held out: {share} -> {share} right; weights in one",
                              finished).groups()
    assert f"held out: {base}% right in 2 steps" in finished
    assert float(re.search(r"max \|rho - 1\| .*: (.*)", finished)[1]) < 1e-5
    # The weights moved, and the model they make is the one that was evaluated.
    moved = [p for name, p in weights(alone / "one").items() if "lora_B" in name]
    assert max(p.abs().max() for p in moved) > 0
    cfg = agrpo.parse(["--model", TINY, *SMALL])
    policy, test = agrpo.load_policy(cfg), tasks.load(cfg.task, "test", **cfg.options)
    plain = AutoModelForMaskedLM.from_pretrained(TINY)
    policy.model = PeftModel.from_pretrained(plain, alone / "one")
    policy = agrpo.Policy(policy.model, policy.tokenizer, policy.mask_id)
    grades = agrpo.evaluate(policy, test, cfg, cfg.how, cfg.eval_n)
    assert f"{sum(g.correct for g in grades) / 4:.1%}" == f"{trained}%"


def member(folder, argv):
    """One of several processes, as torchrun starts them: agrpo.py of that folder."""
    os.chdir(folder)
    ours = {str(ROOT), str(ROOT / "lab"), str(ROOT / "lab" / "tests")}
    sys.path[:] = [str(folder), *(path for path in sys.path if path not in ours)]
    for name in ("agrpo", "kernels", "tasks"):
        del sys.modules[name]
    sys.argv = ["agrpo.py", *argv]
    runpy.run_path("agrpo.py", run_name="__main__")


@pytest.fixture
def two(alone, forked):
    """Two processes of a run -> code, out, err of each."""
    def call(*argv):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        env = [dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=port) for rank in "01"]
        return forked(member, (alone, argv), (alone, argv), env=env)
    return call


@pytest.fixture
def program(alone, monkeypatch):
    """agrpo.py of that folder in this process -> code, out, err"""
    def call(*argv):
        monkeypatch.chdir(alone)
        monkeypatch.setattr(sys, "argv", ["agrpo.py", *map(str, argv)])

        def start():
            try:
                runpy.run_path("agrpo.py", run_name="__main__")
            except SystemExit as e:
                return e.code
            return 0
        return captured(start)
    return call


def test_two_processes_learn_what_one_learns_and_one_of_them_speaks(alone, program, two):
    """In float64: in float32 Adam makes of the last digit of a tiny gradient a step of 1e-5."""
    flags = ["--model", TINY, *SMALL, "--dtype", "float64", "--out"]
    whole, (first, second) = program(*flags, "1"), two(*flags, "2")
    assert (whole.code, first.code, second.code) == (0, 0, 0), (first.err, second.err)
    (*_, said), (*_, by_two) = whole.out.splitlines(), first.out.splitlines()
    assert by_two[:-1] == said[:-1] and second.out == ""        # "... weights in 1", "... in 2"
    one, same = weights(alone / "1"), weights(alone / "2")
    assert one.keys() == same.keys()
    assert max((one[name] - same[name]).abs().max() for name in one) < 1e-9
    for done in two("--model", TINY, "--questions", "3"):
        assert done.code == 2 and "--questions 3 is no multiple of 2 processes" in done.err


OWN = dict(llada=("LLaDAConfig", "LLaDAModelLM"), dream=("DreamConfig", "DreamModel"))


@each(*OWN)
def test_code_that_comes_with_a_model_trains_if_it_is_trusted(kind, program, tmp_path):
    own = {auto: f"modeling.{name}" for auto, name in zip(("AutoConfig", "AutoModel"),
                                                          OWN[kind])}
    (tmp_path / "model").mkdir()
    model = checkpoint(tmp_path / "model", kind, auto_map=own)
    # So long that some of its random texts have the tags that earn a reward.
    flags = ["--model", model, *SMALL, "--C", 48, "--m", 4, "--temperature", 3,
             "--out", tmp_path / "out"]
    done = program(*flags, "--trust_remote_code", "true")
    assert done.code == 0 and "right; weights in" in done.out, done.err
    assert float(re.search(r"max \|rho - 1\| .*: (.*)", done.out)[1]) < 1e-4
    moved = [p for name, p in weights(tmp_path / "out").items() if "lora_B" in name]
    assert max(p.abs().max() for p in moved) > 0
    refused = program(*flags)
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert f"agrpo: --model {model}" in refused.err and "--trust_remote_code" in refused.err


@pytest.mark.parametrize("flags, says", [
    ("", "--model lab/tiny: no config.json there; give the folder of a masked language model"),
    ("--model GSAI-ML/LLaDA-8B-Instruct", "Instruct: no config.json there; give the folder of"),
    ("--model {tiny} --m 5", "m 5 does not fit C 12"),
    ("--model {tiny} --temperature nan", "temperature nan cannot work"),
    ("--model {tiny} --dtype float3", "--model {tiny} could not be loaded: .*float3"),
    ("--k 0", "--k 0.0: give a number above 0"),
    ("--beta 1 --lora_r 0", "--beta needs adapters"),
    ("--eval_every 0", "--eval_every 0: give a number above 0"),
    ("--model {tiny} --follow luck", "follow luck is unknown"),
    ("--task chess", "--task chess is unknown"),
    ("--task countdown --max_number 0", "max_number"),
    ("--learning_rate 1", "unrecognized arguments: --learning_rate"),
    ("--k many", "argument --k: invalid float value: 'many'")])
def test_bad_input_ends_with_a_sentence_and_code_2(flags, says, program):
    done = program(*flags.format(tiny=TINY).split(), *SMALL)
    assert done.code == 2 and re.search(says.format(tiny=TINY), done.err), done.err
    assert done.err.startswith(("agrpo: ", "agrpo.py: error: ")) and "Traceback" not in done.err
