"""Several processes learn what one would, and end together.

Most groups here are forked from a server that has everything imported: a launcher's processes
import it all again. One run goes through torchrun.
"""
import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import agrpo
import tasks
from test_run import outcome, read, save_model, timeless

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("--device cpu --questions 2 --G 6 --C 8 --m 4 --k 2 --updates 4 --eval_n 7 --steps 4 "
         "--lr 0.01 --save_every 1 --rollout_batch 6").split()

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
    folder = tmp_path_factory.mktemp("given")
    (folder / "half.py").write_text(HALF_DEAD)
    yield [*FLAGS, "--model", save_model(folder / "model"), "--task", str(folder / "half.py")]
    tasks.TASKS.pop("half", None)


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["agrpo", "matplotlib.pyplot", "peft", "test_processes",
                                    "transformers.models.modernbert.modeling_modernbert"])
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths)                       # for the server's imports
        yield context


def at_step(number, signum):
    """Send this process a signal before its number-th optimizer step."""
    step, count = agrpo.optimizer_step, []

    def watched(*args):
        count.append(1)
        if len(count) == number:
            os.kill(os.getpid(), signum)
        return step(*args)
    agrpo.optimizer_step = watched


def blind():
    """As on a machine whose disk is not the others'."""
    agrpo.load_checkpoint = lambda *args: None


def member(rank, size, port, argv, log, before):
    """One process of a group: agrpo.main in the environment that a launcher makes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with open(f"{log}.{rank}", "w") as out, open(f"{log}.{rank}.err", "w") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            torch.set_num_threads(1)
            signal.signal(signal.SIGINT, signal.default_int_handler)    # heard in scripts, too
            before()
            sys.exit(agrpo.main(argv))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def group(server, size, argv, log, before={}, more={}, seconds=120):
    """Run agrpo.main in `size` processes -> (exit codes, stdout of each, stderr of each).

    before, more: rank -> a function to call first, further flags. A hang fails.
    """
    port, end = free_port(), time.time() + seconds
    members = []
    for rank in range(size):
        own = [str(flag) for flag in [*argv, *more.get(rank, ())]]
        args = (rank, size, port, own, str(log), before.get(rank, int))
        members.append(server.Process(target=member, args=args))
        members[-1].start()
    for process in members:
        process.join(max(0, end - time.time()))
    hang = [process for process in members if process.is_alive()]
    for process in hang:
        process.kill()
    said = [Path(f"{log}.{rank}").read_text() for rank in range(size)]
    errors = [Path(f"{log}.{rank}.err").read_text() for rank in range(size)]
    assert not hang, (said, errors)
    return [process.exitcode for process in members], said, errors


def weights(folder):
    from safetensors.torch import load_file
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def apart(one, two):
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def runs(server, flags, tmp_path_factory):
    """The same four updates by one process and by two."""
    where = tmp_path_factory.mktemp("runs")
    for size in (1, 2):
        argv = [*flags, "--out", where / str(size)]
        codes, said, errors = group(server, size, argv, where / "log")
        assert codes == [0] * size, errors
    return where, said


# --- the same as one process ------------------------------------------------------------------

def test_two_processes_with_half_the_questions_each_learn_what_one_learns(runs):
    one, two = runs[0] / "1", runs[0] / "2"
    assert apart(one, two) < 1e-5
    moved = [p.abs().max() for name, p in weights(one).items() if "lora_B" in name]
    assert max(moved) > 1e-3
    metrics = [[timeless(x) for x in read(folder / "metrics.jsonl")] for folder in (one, two)]
    for a, b in zip(*metrics, strict=True):
        assert a.pop("forwards") <= b.pop("forwards")           # none mixes processes
        assert a == pytest.approx(b, abs=1e-5)
    final = [outcome(x)["summary"]["final"] for x in (one, two)]
    assert final[0] == final[1] and final[0][0]["n"] == 7       # 4 problems and 3


def test_also_where_one_of_them_has_only_dead_groups(runs, flags):
    agrpo.find_task(flags[-1])
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

def test_processes_that_differ_are_refused_before_they_learn(server, flags, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    for more, says in ((["--lr", "0.5"], "--lr 0.5"), (["--model", other], "--model")):
        argv = [*flags, "--out", tmp_path / "run"]
        codes, _, errors = group(server, 2, argv, tmp_path / "log", more={1: more})
        assert codes == [2, 2] and f"two processes have {says}" in errors[1] + errors[0], errors
        assert not (tmp_path / "run").exists()


def test_questions_that_cannot_be_shared_equally_are_refused(server, flags, tmp_path):
    argv = [*flags, "--questions", "3", "--out", tmp_path / "run"]
    codes, _, errors = group(server, 2, argv, tmp_path / "log")
    assert codes == [2, 2] and "--questions 3 cannot be shared equally by 2" in errors[0]


def test_ctrl_c_on_one_process_stops_all_and_any_number_goes_on(runs, server, flags, tmp_path):
    argv = [*flags, "--out", tmp_path / "run"]
    before = {1: partial(at_step, 2, signal.SIGINT)}
    codes, said, _ = group(server, 2, argv, tmp_path / "log", before)
    assert codes == [130, 130] and "stopped after update 2" in said[0]
    codes, _, errors = group(server, 2, argv, tmp_path / "log", {1: blind})
    assert codes == [2, 2] and "on a disk" in errors[0]
    codes, said, _ = group(server, 1, argv, tmp_path / "log")
    assert codes == [0] and "going on after update 2 of 4" in said[0]
    assert apart(tmp_path / "run", runs[0] / "2") < 1e-5


def test_a_process_that_dies_ends_the_others_with_a_sentence(runs, server, flags, tmp_path):
    argv = [*flags, "--out", tmp_path / "run"]
    before = {1: partial(at_step, 3, signal.SIGKILL)}
    codes, _, errors = group(server, 2, argv, tmp_path / "log", before, seconds=60)
    assert codes == [2, -signal.SIGKILL] and "another process of this run has died" in errors[0]
    assert "Traceback" not in errors[0]
    codes, said, _ = group(server, 2, argv, tmp_path / "log")
    assert codes == [0, 0] and "going on after update 2 of 4" in said[0]
    assert apart(tmp_path / "run", runs[0] / "2") < 1e-5


def test_torchrun_starts_it(runs, flags, tmp_path):
    """`--` before the file: else torchrun takes --m for the beginning of a flag of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    argv = [*launcher, "--master_port", str(free_port()), "--", "agrpo.py", *flags]
    done = subprocess.run([*argv, "--out", str(tmp_path / "run"), "--updates", "1"], cwd=ROOT,
                          env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True,
                          text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es)" in done.stdout and done.stdout.count("held-out accuracy") == 1
    first = [read(folder / "metrics.jsonl")[0] for folder in (tmp_path / "run", runs[0] / "2")]
    assert first[0]["reward"] == pytest.approx(first[1]["reward"])
