"""Several processes learn what one would, and end together."""
import os
import signal
import socket
import subprocess
import sys
from functools import partial

import pytest
from conftest import ROOT, act_at, main, outcome, read, shelf, timeless

import agrpo
import run
import tasks

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = ("--device cpu --questions 2 --G 6 --C 8 --m 4 --k 2 --updates 4 --eval_n 7 --steps 4 "
         "--lr 0.003 --save_every 1 --rollout_batch 6").split()

# Even numbers pay. Where the prompt starts with an odd one nothing does: such groups are dead.
HALF_DEAD = '''
import tasks

def make(seed, index, split):
    return dict(start=index % 4000 if split == "train" else 5000 + index)

def prompt(example):
    return tasks.chat("", f"{example['start'] % 100} Numbers: {example['start'] // 100}")

def grade(text, example):
    numbers = [int(word) for word in text.split() if word.isdigit()]
    share = sum(n % 2 == 0 for n in numbers) / max(len(numbers), 1)
    pays = example["start"] % 2 == 0
    return tasks.Grade(share * pays, share > 0.5, 1.0, "even numbers", "", {})

tasks.TASKS["half"] = tasks.Task("half", prompt, grade, make)
'''


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """What all runs here have in common: a model that nobody trained, and the task above."""
    file = tmp_path_factory.mktemp("given") / "half.py"
    file.write_text(HALF_DEAD)
    yield [*FLAGS, "--model", shelf["base"], "--task", str(file)]
    tasks.TASKS.pop("half", None)


def signalled(number, signum):
    """This process gets a signal before its number-th optimizer step."""
    send = lambda half: os.kill(os.getpid(), signum)
    act_at(send, ("optimizer_step", number), pytest.MonkeyPatch())


def blind():
    """As on a machine whose disk is not the others'."""
    run.load_checkpoint = lambda *args: None


def member(argv, before):
    before()
    os._exit(run.main(argv))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope="module")
def two(forked, flags):
    """Two processes of a run -> code, out, err of each. before, more: of the second alone."""
    def call(out, *common, before=int, more=()):
        argv = [*flags, "--out", str(out), *common]
        port = free_port()
        env = [dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=port) for rank in "01"]
        return forked(member, (argv, int), ([*argv, *more], before), env=env)
    return call


def weights(folder):
    from safetensors.torch import load_file
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def apart(one, two):
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def runs(two, flags, one_thread, tmp_path_factory):
    """The same four updates by one process and by two. -> folder, and what the two printed"""
    where = tmp_path_factory.mktemp("runs")
    assert main([*flags, "--out", where / "1"]).code == 0
    done = two(where / "2")
    assert [x.code for x in done] == [0, 0], done
    return where, [x.out for x in done]


# --- the same as one process ------------------------------------------------------------------

def test_two_processes_with_half_the_questions_each_learn_what_one_learns(runs):
    one, two = runs[0] / "1", runs[0] / "2"
    assert apart(one, two) < 1e-5
    moved = [p.abs().max() for name, p in weights(one).items() if "lora_B" in name]
    assert max(moved) > 1e-3
    metrics = [[timeless(x) for x in read(folder / "metrics.jsonl")] for folder in (one, two)]
    for a, b in zip(*metrics, strict=True):
        assert a.pop("forwards") <= b.pop("forwards")           # none mixes processes
        assert a.pop("warnings") == b.pop("warnings")
        assert a == pytest.approx(b, abs=1e-5)
    final = [outcome(x)["summary"]["final"] for x in (one, two)]
    assert final[0] == final[1] and final[0][0]["n"] == 7       # 4 problems and 3


def test_also_where_one_of_them_has_only_dead_groups(runs, flags):
    run.find_task(flags[-1])
    data = tasks.load("half", "train", seed=0)
    dead = [[data[i]["start"] % 2 for i in agrpo.questions(len(data), 2, update, 0)]
            for update in range(4)]
    assert [1, 0] in dead or [0, 1] in dead                     # there were such updates
    shares = [x["dead_groups"] for x in read(runs[0] / "2" / "metrics.jsonl")]
    assert all(share >= sum(d) / 2 for share, d in zip(shares, dead)) and 0.5 in shares


def test_one_process_prints_and_writes(runs):
    where, (first, second) = runs
    assert "2 process(es)" in first and "held-out accuracy" in first and second == ""
    assert len(read(where / "2" / "metrics.jsonl")) == 4


# --- refused, ended, resumed ------------------------------------------------------------------

@pytest.mark.parametrize("common, more, says", [
    ("", "--lr 0.5", "two processes have --lr 0.5"),
    ("", "--model {other}", "two processes have --model"),
    ("--questions 3", "", "--questions 3 cannot be shared equally by 2")])
def test_processes_that_cannot_work_together_learn_nothing(common, more, says, two, tmp_path):
    more = more.format(other=shelf["other"])
    done = two(tmp_path / "run", *common.split(), more=more.split())
    assert [x.code for x in done] == [2, 2] and says in done[0].err + done[1].err
    assert not (tmp_path / "run").exists()


def test_ctrl_c_on_one_process_stops_all_and_any_number_goes_on(runs, two, flags, tmp_path):
    stopped = two(tmp_path / "run", before=partial(signalled, 2, signal.SIGINT))
    assert [x.code for x in stopped] == [130, 130]
    assert "stopped after update 2" in stopped[0].out
    refused = two(tmp_path / "run", before=blind)
    assert [x.code for x in refused] == [2, 2] and "on a disk" in refused[0].err
    alone = main([*flags, "--out", tmp_path / "run"])
    assert alone.code == 0 and "going on after update 2 of 4" in alone.out
    assert apart(tmp_path / "run", runs[0] / "2") < 1e-5


def test_a_process_that_dies_ends_the_others_with_a_sentence(runs, two, tmp_path):
    died = two(tmp_path / "run", before=partial(signalled, 3, signal.SIGKILL))
    assert [x.code for x in died] == [2, -signal.SIGKILL]
    assert "another process of this run has died" in died[0].err
    assert "Traceback" not in died[0].err
    again = two(tmp_path / "run")
    assert [x.code for x in again] == [0, 0] and "going on after update 2 of 4" in again[0].out
    assert apart(tmp_path / "run", runs[0] / "2") < 1e-5


def test_torchrun_starts_it(runs, flags, tmp_path):
    """`--` before the file: else torchrun takes --m for the beginning of a flag of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    argv = [*launcher, "--master_port", free_port(), "--", "lab/run.py", *flags]
    done = subprocess.run([*argv, "--out", str(tmp_path / "run"), "--updates", "1"], cwd=ROOT,
                          env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True,
                          text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stdout and done.stdout.count("held-out accuracy") == 1
    first = [read(folder / "metrics.jsonl")[0] for folder in (tmp_path / "run", runs[0] / "2")]
    assert first[0]["reward"] == pytest.approx(first[1]["reward"])
