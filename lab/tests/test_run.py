"""A run can be trusted: repeated, killed at any moment, stopped, mistreated, and read after.

The model is one that nobody trained, so nothing depends on lab/tiny. Its head likes the answer
tags: some rollouts earn the reward of the format, and groups differ. Runs that die do so in
processes of their own, forked from a server that has everything imported. Models that are
damaged, or of an unknown kind, are in test_models.py.
"""
import contextlib
import io
import json
import multiprocessing
import os
import random
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import agrpo
import tasks
from lab import make_tiny

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--device cpu --m 3 --k 2 --questions 3 --G 4 --updates 4 --lr 0.01 --eval_n 8 "
         "--steps 3 --eval_every 2 --save_every 2").split()
TIMES = ("rollout_seconds", "loss_seconds", "seconds", "memory_bytes", "peak_memory_bytes")
MODEL = {}                                       # name -> folder, made once


def save_model(folder, seed=0, layers=2):
    torch.manual_seed(seed)
    tokenizer = make_tiny.make_tokenizer()
    model = make_tiny.make_model(tokenizer)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    tags = tokenizer.convert_tokens_to_ids(["<answer>", "</answer>"])
    model.decoder.bias.data[tags] = 3.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", autouse=True)
def models_and_one_thread(tmp_path_factory):
    """One thread, as in the processes below: another order of sums has other last bits.

    And Ctrl-C is heard, also where these tests run in the background of a script.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, threads = tmp_path_factory.mktemp("models"), torch.get_num_threads()
    torch.set_num_threads(1)
    MODEL["base"] = save_model(folder / "base")
    MODEL["other"] = save_model(folder / "other", seed=1)
    MODEL["shallow"] = save_model(folder / "shallow", layers=1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, before)


def flags(out, *more):
    return [*SMALL, "--model", MODEL["base"], "--out", str(out), *map(str, more)]


def run(out, *more, act=None, at=0):
    """agrpo.main in this process; act at one of its moments, see each_moment."""
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        with pytest.MonkeyPatch.context() as patch:
            names = each_moment(act, at, patch)
            code = agrpo.main(flags(out, *more))
    return SimpleNamespace(code=code, out=said.getvalue(), err=errors.getvalue(), moments=names)


def read(path):
    """JSON as it is defined: no NaN, no Infinity."""
    def refuse(constant):
        raise AssertionError(f"{path}: {constant} is not JSON")
    if path.suffix == ".json":
        return json.loads(path.read_text(), parse_constant=refuse)
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def timeless(record):
    return {name: value for name, value in record.items() if name not in TIMES}


def outcome(folder):
    """All that a run found out and learnt, the weights bit by bit, and what it left lying."""
    return dict(metrics=[timeless(x) for x in read(folder / "metrics.jsonl")],
                samples=read(folder / "samples.jsonl"),
                summary=timeless(read(folder / "summary.json")),
                adapter=(folder / "adapter" / "adapter_model.safetensors").read_bytes(),
                partial=[path.name for path in folder.rglob("*.partial")])


def snapshot(*folders):
    """Every file of the folders, byte by byte."""
    files = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The run that nothing disturbed: the others are compared with it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    done = run(folder)
    assert done.code == 0, done.err
    step_one = done.moments.index("optimizer_step") + 1
    return SimpleNamespace(folder=folder, outcome=outcome(folder), console=done.out,
                           moments=done.moments, step_one=step_one)


# --- the same numbers again -------------------------------------------------------------------

def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, tmp_path):
    torch.manual_seed(99)                        # nothing may depend on the global generator
    run(tmp_path / "again")
    run(tmp_path / "other", "--seed", 1, "--updates", 1)
    assert outcome(tmp_path / "again") == finished.outcome
    assert outcome(tmp_path / "other")["metrics"] != finished.outcome["metrics"]
    # Else all comparisons here compare nothing with nothing.
    norms = [x["grad_norm"] for x in finished.outcome["metrics"]]
    assert max(norms[:2]) > 0 and max(norms[2:]) > 0


# --- killed, stopped, out of space: at the n-th moment that matters ---------------------------

def each_moment(act, n, patch):
    """Call act(half) at the n-th of the moments at which files or weights are about to change.

    half() leaves what a death in the middle would: a file half written. Returns a list that
    fills with the names of the moments.
    """
    names = []

    def watch(owner, name, half=lambda *args: None):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            names.append(name)
            if len(names) == n:
                act(lambda: half(*args))
            return function(*args, **kwargs)
        patch.setattr(owner, name, call)

    for name in ("measure", "rollout", "optimizer_step", "to_json"):
        watch(agrpo, name)
    watch(os, "fsync", lambda fd: os.ftruncate(fd, os.fstat(fd).st_size // 2))
    watch(os, "replace")
    watch(Path, "rename")
    return names


def die(half):
    half()
    os.kill(os.getpid(), signal.SIGKILL)


def lose_the_terminal(half):
    """Nobody reads what is printed from now on."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(writer, 2)


def lose_it_and_hang_up(half):
    lose_the_terminal(half)
    signal.raise_signal(signal.SIGHUP)


def child(argv, log, act, at):
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)        # where the tests run under nohup, too
    torch.set_num_threads(1)
    each_moment(act, at, pytest.MonkeyPatch())
    os._exit(agrpo.main(argv))


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """Call a function in a process of its own. -> exit code, and what it printed.

    The server imports everything but never runs a backward pass, so that forks of it may.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["agrpo", "matplotlib.pyplot", "peft", "test_run",
                                    "transformers.models.modernbert.modeling_modernbert"])
    log = tmp_path_factory.mktemp("log") / "console"

    def call(argv, act=None, at=0, target=child):
        process = context.Process(target=target, args=(argv, str(log), act, at))
        process.start()
        process.join(60)
        process.kill()
        process.join()
        return SimpleNamespace(code=process.exitcode, console=log.read_text())

    with pytest.MonkeyPatch.context() as patch:
        paths = [str(ROOT), str(Path(__file__).parent)]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))      # for the server's imports
        yield call


def one_of_each_kind(moments):
    """The first fsync, a later optimizer step, ..., the last to_json: all over the run."""
    if os.environ.get("EVERY_MOMENT"):
        return range(1, len(moments) + 1)
    kinds, chosen = sorted({*moments} - {"measure", "replace"}), []
    for i, kind in enumerate(kinds):
        at = [n for n, name in enumerate(moments, 1) if name == kind]
        chosen.append(at[i * (len(at) - 1) // (len(kinds) - 1)])
    return chosen


def test_a_run_killed_at_any_moment_goes_on_to_the_very_same_end(forked, finished, tmp_path):
    moments = finished.moments
    in_base_evaluation = moments.index("rollout") + 3
    for n in {in_base_evaluation, *one_of_each_kind(moments)}:
        argv = flags(tmp_path / str(n))
        assert forked(argv, die, n).code == -signal.SIGKILL
        resumed = forked(argv)
        assert resumed.code == 0, resumed.console
        same = outcome(tmp_path / str(n)) == finished.outcome
        assert same, f"killed at moment {n} of {len(moments)}, {moments[n - 1]}"


def test_a_terminal_that_is_gone_stops_nothing(forked, finished, tmp_path):
    argv = flags(tmp_path / "run")
    assert forked(argv, lose_it_and_hang_up, finished.step_one).code == 130
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["state"]["update"] == 1
    assert forked(argv, lose_the_terminal, 1).code == 0
    assert outcome(tmp_path / "run") == finished.outcome


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])         # SIGHUP: above
def test_a_signal_lets_the_update_end_saves_and_says_so(name, finished, tmp_path, capfd):
    number, before = getattr(signal, name), signal.getsignal(signal.SIGTERM)
    stopped = run(tmp_path / "run", act=lambda half: signal.raise_signal(number),
                  at=finished.step_one)
    assert stopped.code == 130 and "stopping after this update" in capfd.readouterr().err
    assert "stopped after update 1" in stopped.out and "same command" in stopped.out
    assert stopped.moments.count("optimizer_step") == 1
    assert signal.getsignal(signal.SIGTERM) == before, "the caller's handlers are back"
    assert "going on after update 1 of 4" in run(tmp_path / "run").out
    assert outcome(tmp_path / "run") == finished.outcome


def test_a_second_signal_stops_at_once_and_nothing_is_lost(finished, tmp_path):
    def twice(half):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    last_step = len(finished.moments) - finished.moments[::-1].index("optimizer_step")
    stopped = run(tmp_path / "run", act=twice, at=last_step)
    assert stopped.code == 130 and "stopped at once" in stopped.err
    assert "going on after update 2" in run(tmp_path / "run").out
    assert outcome(tmp_path / "run") == finished.outcome


@pytest.mark.parametrize("when", ["measure", "rename"])
def test_a_full_disk_ends_in_one_sentence_and_loses_nothing(when, finished, tmp_path):
    """From before the first checkpoint; from the last evaluation, before the adapter."""
    def fill(half):                              # no file over 100 kB: checkpoint, adapter
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    n = finished.moments.index(when) + (1 if when != "rename" else -1)
    try:
        full = run(tmp_path / "run", act=fill, at=n)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert full.code == 2 and full.err.startswith(f"agrpo: cannot write {tmp_path / 'run'}")
    assert "make room" in full.err and len(full.err.splitlines()) == 1
    assert not list((tmp_path / "run").glob("*.pt.partial")), "it gives its room back"
    assert run(tmp_path / "run").code == 0
    assert outcome(tmp_path / "run") == finished.outcome


def test_a_folder_that_was_deleted_ends_in_one_sentence(finished, tmp_path):
    gone = run(tmp_path / "run", act=lambda half: shutil.rmtree(tmp_path / "run"),
               at=finished.step_one)
    assert gone.code == 2 and gone.err.startswith(f"agrpo: cannot write {tmp_path / 'run'}")
    assert len(gone.err.splitlines()) == 1


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    """Also where the other run has written nothing yet."""
    with agrpo.folder_of_my_own(tmp_path / "run"):
        second = run(tmp_path / "run")
        assert second.code == 2 and f"--out {tmp_path / 'run'} is in use" in second.err
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists(), "nothing was written"


def test_a_damaged_checkpoint_is_refused_wherever_the_damage_is(finished, tmp_path):
    copy = shutil.copytree(finished.folder, tmp_path / "run")
    load, given = agrpo.load_checkpoint, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agrpo, "load_checkpoint", lambda *args: given.append(args) or load(*args))
        assert run(copy).code == 0
    path, draw = copy / "checkpoint.pt", random.Random(0)
    good = path.read_bytes()
    # Anywhere, and at both ends, where a format keeps what no checksum of the contents covers.
    places = [draw.randrange(len(good)) for _ in range(10)] + [4, 10, 40, 80, 200]
    places += [len(good) - n for n in (1, 15, 30, 300, 1500)]
    for at in places:
        damaged = bytearray(good)
        damaged[at] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(agrpo.UserError, match="checkpoint.pt cannot be read"):
            load(*given[0])
    for damaged in (good[:10_000], good[:-1], b""):
        path.write_bytes(damaged)
        refused = run(copy)
        assert refused.code == 2 and "checkpoint.pt cannot be read" in refused.err
        assert path.read_bytes() == damaged


def test_a_finished_run_called_again_says_the_same_and_changes_nothing(finished, tmp_path):
    copy = shutil.copytree(finished.folder, tmp_path / "run")
    again = run(copy)
    assert again.code == 0 and "going on after update 4 of 4" in again.out
    assert again.out.splitlines()[-1] == finished.console.splitlines()[-1]
    assert outcome(copy) == finished.outcome


# --- three files, and nothing else of ours ----------------------------------------------------

def alone(argv, log, act, at):
    """python agrpo.py in the folder `at`, with nothing else of this repository in reach."""
    for name in ("agrpo", "kernels", "tasks", "lab", "lab.make_tiny", "test_run"):
        sys.modules.pop(name, None)
    ours = {str(ROOT), str(ROOT / "lab"), str(ROOT / "lab" / "tests")}
    sys.path[:] = [at, *(path for path in sys.path if path not in ours)]
    os.chdir(at)
    sys.argv = ["agrpo.py", *argv]
    torch.set_num_threads(1)
    with open(log, "w") as console, contextlib.redirect_stdout(console):
        with contextlib.redirect_stderr(console):
            runpy.run_path("agrpo.py", run_name="__main__")


def test_three_files_in_an_empty_folder_train_resume_and_evaluate(forked, finished, tmp_path):
    for name in ("agrpo.py", "kernels.py", "tasks.py"):
        shutil.copy(ROOT / name, tmp_path)
    stopped = run(tmp_path / "half", act=lambda half: signal.raise_signal(signal.SIGTERM),
                  at=finished.step_one)
    assert stopped.code == 130
    evaluate = flags("last", "--updates", 0, "--adapter", "new/adapter")
    for argv, says in ((flags("new"), "max|ratio - 1|"), (flags("half"), "going on after"),
                       (evaluate, "held-out")):
        done = forked(argv, target=alone, at=str(tmp_path))
        assert done.code == 0 and says in done.console, done.console
    assert outcome(tmp_path / "new") == outcome(tmp_path / "half") == finished.outcome
    evaluated = read(tmp_path / "last" / "summary.json")
    assert evaluated["base"] == finished.outcome["summary"]["final"]


def test_the_exit_code_reaches_the_shell_and_no_folder_is_left(tmp_path):
    argv = [sys.executable, ROOT / "agrpo.py", "--device", "cpu", "--test_file", "none.jsonl"]
    done = subprocess.run(argv, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 2 and done.stdout == "" and "none.jsonl" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list((tmp_path / "runs").iterdir())


# --- nothing wrong in silence -----------------------------------------------------------------

def poison(monkeypatch, calls):
    """NaN in the loss of the given passes. -> of every optimizer step: did it move a weight?"""
    objective, step = agrpo.clipped_objective, agrpo.optimizer_step
    moved, passes = [], []

    def clipped_objective(*args):
        passes.append(1)
        J, ratio = objective(*args)
        return (J * float("nan") if len(passes) - 1 in calls else J), ratio

    def optimizer_step(params, *args):
        before = [p.detach().clone() for p in params]
        norm = step(params, *args)
        moved.append(any(not torch.equal(p, q) for p, q in zip(params, before)))
        return norm

    monkeypatch.setattr(agrpo, "clipped_objective", clipped_objective)
    monkeypatch.setattr(agrpo, "optimizer_step", optimizer_step)
    return moved


def change(monkeypatch, name="countdown", **parts):
    """Another grader for a task."""
    monkeypatch.setitem(tasks.TASKS, name, replace(tasks.TASKS[name], **parts))


@pytest.fixture
def lively(monkeypatch):
    """Rewards of which no two are often alike, so that no update has dead groups only."""
    def grade(text, example):
        different = len(set(text.split()))
        return tasks.graded(different / 12, 0, "different words", text)
    for name in ("countdown", "sudoku"):
        change(monkeypatch, name, grade=grade)


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_said(lively, tmp_path, monkeypatch):
    moved = poison(monkeypatch, {3})             # second pass of the second update
    done = run(tmp_path / "run", "--mu", 2)
    assert done.code == 0 and "changed nothing" in done.out
    assert moved[:-1] == [True, True, True, False, True, True, True]
    norms = [x["grad_norm"] for x in read(tmp_path / "run" / "metrics.jsonl")]
    assert [norm is None for norm in norms] == [False, True, False, False]
    assert read(tmp_path / "run" / "summary.json")["skipped_updates"] == 1


def test_three_in_a_row_end_the_run_with_the_weights_before_them(lively, tmp_path, monkeypatch):
    moved = poison(monkeypatch, {1, 2, 3})
    done = run(tmp_path / "run", "--updates", 9)
    assert done.code == 2 and "in a row" in done.err and "--lr" in done.err
    assert moved == [True, False, False, False]
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["state"]["update"] == 4 and len(read(tmp_path / "run" / "metrics.jsonl")) == 4


def test_weights_that_diverge_end_in_one_sentence(lively, tmp_path):
    done = run(tmp_path / "run", "--lr", 1e30)
    assert done.code == 2 and "not finite" in done.err and "--lr" in done.err
    assert len(done.err.splitlines()) == 1


def test_a_run_that_learnt_from_no_rollout_says_so(tmp_path, monkeypatch):
    grade = lambda text, example: tasks.graded(0.0, 0, "never right", "")
    change(monkeypatch, grade=grade)
    done = run(tmp_path / "run", "--updates", 1)
    assert done.code == 0 and "no rollout was learnt from" in done.out


def test_a_batch_grader_must_return_a_grade_for_each_text(tmp_path, monkeypatch):
    task = tasks.TASKS["countdown"]
    one = lambda texts, examples: [task.grade(texts[0], examples[0])]
    change(monkeypatch, grade_batch=one)
    done = run(tmp_path / "run")
    assert done.code == 2 and "1 grades for 8 texts" in done.err


def update(**change):
    return dict(grad_norm=1.0, entropy=2.0, late_eos=0.2, dead_groups=0.2, clip_low=0.1,
                clip_high=0.1) | change


@pytest.mark.parametrize("kind,over,at_most,past", [
    ("spike", dict(grad_norm=10.1), dict(grad_norm=10.0), [update()] * 10),
    # Norms of 0, from dead groups only, do not count; nor do those before the last 20.
    ("spike", dict(grad_norm=21), dict(grad_norm=19),
     [update(grad_norm=2)] * 10 + [update(grad_norm=0)] * 15),
    ("spike", dict(grad_norm=31), dict(grad_norm=29),
     [update(grad_norm=9)] * 30 + [update(grad_norm=3)] * 20),
    ("entropy", dict(entropy=0.09), dict(entropy=0.1), [update(), update(entropy=0.2)]),
    ("eos", dict(late_eos=0.91), dict(late_eos=0.9), []),
    ("dead", dict(dead_groups=0.81), dict(dead_groups=0.8), []),
    ("clip", dict(clip_low=0.21), dict(clip_low=0.19), [])])
def test_a_warning_names_what_left_its_range_and_nothing_else(kind, over, at_most, past):
    assert [name for name, text in agrpo.warnings(update(**over), past)] == [kind]
    assert not list(agrpo.warnings(update(**at_most), past))


# --- bad input --------------------------------------------------------------------------------

BAD = {                                          # flags -> what the sentence must hold
    "--task chess": "--task chess|countdown",
    "--task {mess}/none.py": "--task|none.py",
    "--task {mess}/nothing.py": "--task|nothing.py|registers no task",
    "--task {mess}/broken.py": "--task|broken.py|ZeroDivisionError",
    "--policy {mess}/nothing.py:Mine": "--policy|nothing.py:Mine",
    "--lorar 3": "--lorar|--help",
    "--updates three": "--updates|'three'",
    "--updates -1": "--updates -1",
    "--lr nan": "--lr nan",
    "--temperature nan": "--temperature nan",
    "--temperature 0": "--temperature 0|1.0",
    "--eval_sampled maybe": "--eval_sampled|'maybe'",
    "--unmasking low_confidence": "--unmasking|max_prob",
    "--m 5": "--m 5|12, 6, 4, 3, 2, 1",
    "--block_length 5": "--block_length 5|6, 12",
    "--steps 5": "--steps 5|12, 6, 4, 3, 2, 1",
    "--steps few": "--steps few|12,6,3",
    "--eval_block 5": "--eval_block 5|6, 12",
    "--k 4": "--k 4|--m 3",
    "--G 1": "--G 1",
    "--top_p 0": "--top_p 0",
    "--top_p 0.9": "--top_p 0.9|--top_k",
    "--seed 99999999999": "--seed 99999999999",
    "--beta 0.1 --lora_r 0": "--beta|--lora_r",
    "--adapter {run}/adapter --lora_r 0": "--adapter|--lora_r",
    "--lora_r 0 --dtype bfloat16": "--lora_r 0|--dtype float32",
    "--device cuda:99": "--device cuda:99|cpu",
    "--numbers 99": "numbers 99",
    "--empties 3": "--empties",
    "--max_prompt 2": "--max_prompt|over 2 tokens",
    "--max_number 200": "--model|vocabulary",
    "--mask_id 5000": "--mask_id|5000",
    "--train-file {mess}/none.jsonl": "none.jsonl|no such",
    "--test_file ~/no/such.jsonl": "such.jsonl",
    "--test_file {mess}/rubbish.jsonl": "rubbish.jsonl|row 1",
    "--test_file {mess}/noise.parquet": "noise.parquet",
    "--test_file {mess}/empty.jsonl": "empty.jsonl",
    "--test_file ''": "--test_file is empty",
    "--out ''": "--out is empty",
    "--model ''": "--model is empty",
    "--model {mess}/nowhere": "--model|nowhere|config.json",
    "--model lab/tny": "--model lab/tny|network",
    "--adapter {mess}/nowhere": "--adapter|nowhere",
    "--adapter {run}/adapter --model {shallow}": "--adapter|--model",
    "--adapter {mess}/nan": "--adapter|not finite",
    "--out {mess}/rubbish.jsonl": "--out|rubbish.jsonl",
    "--out /proc/run": "--out /proc/run",
    "--out {run} --lr 0.5": "--lr 0.01|0.5|repeat its flags",
    "--out {run} --max_number 9": "--max_number 16|9|repeat its flags",
    "--out {run} --model {other}": "--model|choose another --out",
    "--out {run} --model {shallow}": "--model|choose another --out",
}


@pytest.fixture(scope="module")
def mess(finished, tmp_path_factory):
    """A folder of things that a run trips over."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("mess")
    (folder / "rubbish.jsonl").write_text('{"nums": "none"}\n')
    (folder / "noise.parquet").write_bytes(bytes(range(256)))
    (folder / "empty.jsonl").touch()
    (folder / "nothing.py").touch()
    (folder / "broken.py").write_text("1 / 0\n")
    shutil.copytree(finished.folder / "adapter", folder / "nan")
    weights = load_file(folder / "nan" / "adapter_model.safetensors")
    next(iter(weights.values()))[0] = float("nan")
    save_file(weights, folder / "nan" / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("typed", BAD)
def test_bad_input_is_one_sentence_with_a_way_out(typed, finished, mess, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "hub_answers", lambda hub: False)        # no network
    monkeypatch.chdir(tmp_path)
    argv = shlex.split(typed.format(mess=mess, run=finished.folder, **MODEL))
    precious = (finished.folder, mess, MODEL["base"])
    before, began = snapshot(*precious), time.time()
    done = run(tmp_path / "run", *argv)
    assert done.code == 2 and time.time() - began < 15
    lines = [line for line in done.err.splitlines() if not line.startswith("kernels.py:")]
    assert len(lines) == 1 and lines[0].startswith("agrpo: "), done.err
    assert [word for word in BAD[typed].split("|") if word not in lines[0]] == [], lines[0]
    assert snapshot(*precious) == before and not list(tmp_path.iterdir())


def test_flags_as_people_spell_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = agrpo.parse(["--eval-n=7", "--recompute", "--eval_sampled", "no", "--out", "~/here"])
    assert (cfg.eval_n, cfg.recompute, cfg.eval_sampled) == (7, True, False)
    assert cfg.out == str(tmp_path / "here")


# --- what a run leaves behind -----------------------------------------------------------------

def test_the_folder_holds_what_was_promised(finished):
    assert {path.name for path in finished.folder.iterdir()} == {
        "config.json", "metrics.jsonl", "summary.json", "samples.jsonl", "curve.png", "adapter",
        "checkpoint.pt"}
    assert (finished.folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    config, summary = (read(finished.folder / name) for name in ("config.json", "summary.json"))
    assert (config["m"], config["G"], config["versions"]["torch"]) == (3, 4, torch.__version__)
    promised = ("task model seed base_accuracy final_accuracy best_accuracy best_update eval_n "
                "test_data updates skipped_updates seconds rollout_seconds loss_seconds "
                "peak_memory_bytes base final evals")
    assert set(promised.split()) <= set(summary)
    assert (summary["task"], summary["model"]) == ("countdown", MODEL["base"])
    assert (summary["seed"], summary["updates"], summary["eval_n"]) == (0, 4, 8)
    assert [x["update"] for x in summary["evals"]] == [0, 2, 4]
    # The last line says what was reached.
    reached = f"{summary['base_accuracy']:.1%} -> {summary['final_accuracy']:.1%}"
    assert finished.console.splitlines()[-1].startswith(f"held-out accuracy {reached}")
    lines = [line for line in finished.console.splitlines() if "/" not in line]
    assert max(map(len, lines)) <= 120


def test_every_update_has_its_numbers_and_a_sample_shows_what_the_checker_saw(finished):
    metrics = read(finished.folder / "metrics.jsonl")
    assert [x["update"] for x in metrics] == [1, 2, 3, 4] and "held_out" in metrics[1]
    names = ("update reward correct format dead_groups length entropy late_eos kl clip_low "
             "clip_high ratio_min ratio_max pairs forwards lr grad_norm rollout_seconds "
             "loss_seconds memory_bytes")
    assert [set(x) - {"held_out", "warnings"} for x in metrics] == [set(names.split())] * 4
    sample = read(finished.folder / "samples.jsonl")[0]
    assert set(sample) == {"update", "prompt", "half", "text", "parsed", "reason", "reward"}
    assert sample["prompt"].startswith("Numbers:") and sample["half"].count("_") == 8


def test_json_stays_json_and_printed_text_harmless():
    nested = dict(x=float("nan"), y=dict(z=1.5))
    assert json.loads(agrpo.to_json(nested)) == dict(x=None, y=dict(z=1.5))
    text = agrpo.cut("a\x1b[2Jb\n" + "c" * 200, 60)
    assert text.isprintable() and len(text) <= 60


def test_plain_peft_loads_the_adapter_to_the_same_logits(finished):
    from peft import PeftModel
    from transformers import AutoModelForMaskedLM

    adapter = str(finished.folder / "adapter")
    ids, shown = torch.arange(10, 26)[None], torch.ones(1, 16, dtype=torch.long)
    policy = agrpo.load_policy(agrpo.parse(flags("none", "--adapter", adapter)))
    model = AutoModelForMaskedLM.from_pretrained(MODEL["base"], dtype=torch.float32).eval()
    with torch.no_grad():
        ours = policy(ids, shown, torch.arange(16)[None])
        before = model(ids).logits
        plain = PeftModel.from_pretrained(model, adapter)(ids, attention_mask=shown).logits
    assert torch.allclose(ours, plain, atol=1e-6)
    assert not torch.allclose(plain, before, atol=1e-3)


# --- every variant runs -----------------------------------------------------------------------

@pytest.mark.parametrize("variant", [
    "--mu 2 --beta 0.1", "--unmasking max_prob --recompute",
    "--unmasking entropy --ratio_per step", "--top_k 60 --top_p 0.9 --follow entropy",
    "--task sudoku --C 20 --m 4 --steps 4 --micro_batch 3",
    "--follow uniform --divide_by_std --block-length=6 --m 4 --eval_every 1 --steps 4,2"])
def test_variants_run_end_to_end(variant, lively, tmp_path):
    done = run(tmp_path / "run", "--updates", 2, *variant.split())
    assert done.code == 0, done.err
    metrics = read(tmp_path / "run" / "metrics.jsonl")
    assert all(x["grad_norm"] > 0 and x["pairs"] > 0 for x in metrics)
    if "--mu 2" in variant:
        assert metrics[-1]["kl"] > 0 and metrics[-1]["ratio_max"] > 1
    if "--eval_every 1" in variant:
        assert "held_out" in metrics[0]


def test_without_lora_the_whole_model_is_trained_saved_and_used(lively, tmp_path):
    done = run(tmp_path / "run", "--lora_r", 0)
    assert done.code == 0 and not (tmp_path / "run" / "adapter").exists(), done.err
    model = tmp_path / "run" / "model"
    done = run(tmp_path / "eval", "--updates", 0, "--model", model)
    assert done.code == 0, done.err
    trained = read(tmp_path / "run" / "summary.json")
    assert trained["final"] != trained["base"]
    assert read(tmp_path / "eval" / "summary.json")["final"] == trained["final"]


def test_the_shipped_model_runs_by_default(tmp_path):
    few = ["--device", "cpu", "--updates", "1", "--eval_n", "20", "--steps", "2"]
    with contextlib.redirect_stdout(io.StringIO()) as console:
        code = agrpo.main([*few, "--out", str(tmp_path / "run")])
    assert code == 0, console.getvalue()
    assert read(tmp_path / "run" / "summary.json")["base_accuracy"] > 0.2
