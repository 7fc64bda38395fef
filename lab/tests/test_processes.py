"""Several processes learn what one would: shared prompts, one update, metrics over all, one writer; and they end together.

Most groups here are forked from a server that has everything imported (a launcher's processes import it all again, 10 s);
one run each goes through accelerate's launcher and torchrun's.
"""
import contextlib
import json
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
from lab import logbook, make_tiny

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--task", "half", "--device", "cpu", "--questions", "2", "--G", "6", "--C", "8", "--m", "4", "--k", "2", "--updates", "4",
         "--eval_n", "7", "--steps", "4", "--save_every", "1", "--rollout_batch", "6"]
TIMES = ("rollout_seconds", "loss_seconds", "memory_bytes")


def half_dead():
    """Even numbers pay, but where the prompt starts with an odd one nothing does: all such groups are dead."""
    def grade(text, example):
        numbers = [int(word) for word in text.split() if word.isdigit()]
        share = sum(n % 2 == 0 for n in numbers) / max(len(numbers), 1)
        return tasks.Grade(share * (example["start"] % 2 == 0), share > 0.5, 1.0, "even numbers", "")

    prompt = lambda example: [dict(role="user", content=f"{example['start'] % 100} Numbers: {example['start'] // 100 % 100}")]
    make = lambda seed, index, split, **options: dict(start=index if split == "train" else 5000 + index)
    tasks.TASKS["half"] = tasks.Task("half", prompt, grade, None, make=make)


@pytest.fixture(scope="module", autouse=True)
def the_task_is_forgotten_afterwards():
    yield
    tasks.TASKS.pop("half", None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("model"), make_tiny.make_tokenizer()
    torch.manual_seed(0)
    make_tiny.make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["agrpo", "matplotlib.pyplot", "peft", "accelerate", "lab.tests.test_processes",
                                    "transformers.models.modernbert.modeling_modernbert", "torch._dynamo"])
    return context


def at_step(number, act):
    """Call act() before the number-th optimizer step of this process."""
    step, count = agrpo.optimizer_step, 0

    def watched(*args):
        nonlocal count
        count += 1
        if count == number:
            act()
        return step(*args)
    agrpo.optimizer_step = watched


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def blind():
    """As on a machine with a disk of its own."""
    logbook.Logbook.load = lambda self: False


def member(rank, size, port, argv, log, before):
    """One process of a group: agrpo.main under the environment that a launcher sets, after before[rank](), if given."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with open(f"{log}.{rank}", "w") as out, open(f"{log}.{rank}.err", "w") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            torch.set_num_threads(1)
            half_dead()
            before.get(rank, int)()
            sys.exit(agrpo.main(argv))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def group(server, size, argv, log, before={}, seconds=120):
    """Run agrpo.main in `size` processes. -> (exit codes, stdout of each, stderr of each). A hang fails."""
    port, end = free_port(), time.time() + seconds
    members = [server.Process(target=member, args=(rank, size, port, [*map(str, argv)], str(log), before)) for rank in range(size)]
    for process in members:
        process.start()
    for process in members:
        process.join(max(0, end - time.time()))
    hang = [process for process in members if process.is_alive()]
    for process in hang:
        process.kill()
    said, errors = ([Path(f"{log}.{rank}{end}").read_text() for rank in range(size)] for end in ("", ".err"))
    assert not hang, (said, errors)
    return [process.exitcode for process in members], said, errors


def weights(folder):
    from safetensors.torch import load_file
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def metrics(folder):
    return [{k: v for k, v in x.items() if k not in TIMES} for x in lines(Path(folder) / "metrics.jsonl")]


def apart(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def runs(server, model, tmp_path_factory):
    """The same four updates by one process and by two."""
    where = tmp_path_factory.mktemp("runs")
    for size in (1, 2):
        codes, said, errors = group(server, size, [*FLAGS, "--model", model, "--out", where / str(size)], where / f"log{size}")
        assert codes == [0] * size, errors
    return where, said


# --- The same as one process ------------------------------------------------------------------------------------------


def test_two_processes_with_half_the_prompts_each_learn_what_one_learns(runs, model):
    where, _ = runs
    assert apart(weights(where / "1"), weights(where / "2")) < 1e-5
    assert max(p.abs().max() for name, p in weights(where / "1").items() if "lora_B" in name) > 1e-4     # it did move


def test_also_where_one_of_them_has_only_dead_groups(runs, model):
    half_dead()
    data, dead = tasks.load("half", "train", seed=0), []
    for update in range(4):
        dead.append([data[i]["start"] % 2 == 1 for i in agrpo.questions(len(data), 2, update, 0)])
    assert [True, False] in dead or [False, True] in dead            # the runs above had such updates
    shares = [x["dead_groups"] for x in metrics(runs[0] / "2")]
    assert [x >= sum(d) / 2 for x, d in zip(shares, dead)] == [True] * 4 and any(0 < x < 1 for x in shares)


def test_metrics_are_over_all_processes(runs):
    one, two = (metrics(runs[0] / size) for size in "12")
    for a, b in zip(one, two, strict=True):
        assert a.pop("forwards") <= b.pop("forwards")                # micro-batches do not cross processes
        assert a == pytest.approx(b, abs=1e-5)


def test_evaluation_is_shared_and_each_problem_graded_once(runs, server, model, tmp_path):
    one, two = (json.loads((runs[0] / size / "summary.json").read_text()) for size in "12")
    assert one["final"] == two["final"] and one["final"][0]["n"] == 7
    flags = ["--mode", "eval", *FLAGS, "--model", model, "--out", tmp_path / "eval", "--adapter", runs[0] / "2" / "adapter"]
    codes, _, errors = group(server, 2, flags, tmp_path / "log")
    assert codes == [0, 0], errors
    greedy = [x["index"] for x in lines(tmp_path / "eval" / "generations.jsonl") if x["greedy"]]
    assert greedy == list(range(7))
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["results"] == one["final"]


def test_one_process_prints_and_writes(runs):
    where, (first, second) = runs
    assert "x 2 processes" in first and "held-out accuracy" in first
    assert second == ""
    assert len(lines(where / "2" / "metrics.jsonl")) == 4


def test_prompts_that_cannot_be_shared_equally_are_refused(server, model, tmp_path):
    argv = [*FLAGS, "--questions", "3", "--model", model, "--out", tmp_path / "run"]
    codes, _, errors = group(server, 2, argv, tmp_path / "log")
    assert codes == [2, 2] and "cannot be shared equally by 2 processes: choose a multiple" in errors[0]


# --- Ending and resuming ----------------------------------------------------------------------------------------------


def test_ctrl_c_on_one_process_stops_all_and_any_number_resumes(runs, server, model, tmp_path):
    argv = [*FLAGS, "--model", model, "--out", tmp_path / "run"]
    codes, said, _ = group(server, 2, argv, tmp_path / "log", before={1: partial(at_step, 2, ctrl_c)})
    assert codes == [130, 130] and "interrupted after update 2, which is saved" in said[0]
    _, _, errors = group(server, 2, [*argv, "--resume"], tmp_path / "log", before={1: blind})
    assert "must be on a disk that all machines share" in errors[0]
    codes, said, _ = group(server, 1, [*argv, "--resume"], tmp_path / "log")
    assert codes == [0] and "after update 2 of 4" in said[0]
    assert apart(weights(tmp_path / "run"), weights(runs[0] / "2")) < 1e-5
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 4


def test_a_killed_process_ends_the_others_with_a_sentence_and_the_run_resumes(runs, server, model, tmp_path):
    argv = [*FLAGS, "--model", model, "--out", tmp_path / "run"]
    codes, _, errors = group(server, 2, argv, tmp_path / "log", before={1: partial(at_step, 3, die)}, seconds=60)
    assert codes == [2, -signal.SIGKILL]
    assert "another process of this run has died" in errors[0] and "Traceback" not in errors[0]
    codes, said, _ = group(server, 2, [*argv, "--resume"], tmp_path / "log")
    assert codes == [0, 0] and "after update 2 of 4" in said[0]
    assert apart(weights(tmp_path / "run"), weights(runs[0] / "2")) < 1e-5


# --- Launchers --------------------------------------------------------------------------------------------------------


def launch(launcher, script, model, out, *flags):
    """-> finished process. Both launchers are modules: no script of theirs need be on the PATH."""
    argv = [sys.executable, "-m", *launcher, str(script), *FLAGS, "--model", model, "--out", str(out), *flags]
    env = dict(os.environ, OMP_NUM_THREADS="1", MASTER_PORT=str(free_port()), PYTHONPATH=str(ROOT))
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=150)


def test_accelerate_launches_it(model, tmp_path):
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    done = launch(launcher, "agrpo.py", model, tmp_path / "run", "--task", "countdown", "--updates", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "x 2 processes" in done.stdout and done.stdout.count("held-out accuracy") == 1


def test_torchrun_ends_when_a_process_is_killed(model, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text("import os, sys, agrpo\nfrom lab.tests import test_processes as t\nt.half_dead()\n"
                      "if os.environ['RANK'] == '1': t.at_step(2, t.die)\nsys.exit(agrpo.main())\n")
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), "--"]
    done = launch(launcher, script, model, tmp_path / "run")
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr and "rank      : 1" in done.stderr
