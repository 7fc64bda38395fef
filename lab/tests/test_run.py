"""A run can be trusted: repeated, killed at any moment and resumed, interrupted, mistreated, and read afterwards.

The model here is one nobody trained, so nothing depends on the weights in lab/tiny; its head likes the answer tags, so
that some rollouts earn the format's reward and groups differ. Runs that die do so in processes of their own, forked from
a server that has everything imported.
"""
import contextlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import agrpo
from lab import logbook, make_tiny, models, watch

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--device", "cpu", "--m", "3", "--k", "2", "--questions", "3", "--G", "4", "--updates", "4", "--eval_n", "8",
         "--steps", "3", "--save_every", "2", "--eval_every", "2"]
TIMES = ("rollout_seconds", "loss_seconds", "memory_bytes", "seconds", "peak_memory_bytes")


def save_model(folder, seed=0, layers=4):
    torch.manual_seed(seed)
    tokenizer = make_tiny.make_tokenizer()
    model = make_tiny.make_model(tokenizer)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.decoder.bias.data[tokenizer.convert_tokens_to_ids(["<answer>", "</answer>"])] = 3.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """The same shapes, other weights."""
    return save_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def shallow(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "shallow", layers=2)


def run(*flags):
    """agrpo.main in this process. No line of its console is ever wider than 120 columns."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = agrpo.main([*SMALL, *map(str, flags)])
    assert max(map(len, out.getvalue().splitlines() or [""])) <= 120
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def read(path):
    """Valid JSON only: no NaN, no Infinity."""
    def refuse(constant):
        raise AssertionError(f"{path}: {constant} is not JSON")
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()] \
        if path.suffix == ".jsonl" else json.loads(path.read_text(), parse_constant=refuse)


def timeless(record):
    return {name: value for name, value in record.items() if name not in TIMES}


def outcome(folder):
    """All that a run found out and learnt; the weights bit by bit."""
    folder = Path(folder)
    return dict(metrics=[timeless(x) for x in read(folder / "metrics.jsonl")], samples=read(folder / "samples.jsonl"),
                summary=timeless(read(folder / "summary.json")),
                adapter=(folder / "adapter" / "adapter_model.safetensors").read_bytes())


# --- The same numbers again -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished(base, tmp_path_factory):
    """A run that nothing disturbed, for tests that only read it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    result = run("--model", base, "--out", folder)
    assert result.code == 0, result.err
    return SimpleNamespace(folder=folder, console=result.out)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(base, finished, tmp_path):
    torch.manual_seed(99)                              # nothing may depend on the global generator
    run("--model", base, "--out", tmp_path / "again")
    run("--model", base, "--out", tmp_path / "other", "--seed", 1)
    assert outcome(tmp_path / "again") == outcome(finished.folder)
    assert outcome(tmp_path / "other")["metrics"] != outcome(finished.folder)["metrics"]


def test_the_run_here_does_learn_something(base, finished):
    """Else all comparisons below compare nothing with nothing."""
    assert all(x["grad_norm"] > 0 and x["dead_groups"] < 1 for x in read(finished.folder / "metrics.jsonl"))


# --- Killed, interrupted, out of space: at the n-th moment that matters -----------------------------------------------


def each_moment(act, n):
    """Call act(half) at the n-th of the moments at which files or weights are about to change; 0: never, count them.

    half() does half of what was about to be done: half a file written, a folder half renamed.
    """
    count = 0

    def watched(function, half):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == n:
                act(lambda: half(*args))
            return function(*args, **kwargs)
        return call

    nothing = lambda *args: None
    os.fsync = watched(os.fsync, lambda fd: os.ftruncate(fd, os.fstat(fd).st_size // 2))
    os.replace = watched(os.replace, nothing)
    Path.rename = watched(Path.rename, nothing)
    half_line = lambda path, record: open(path, "a").write(logbook.to_json(record)[:40])
    logbook.append_line = watched(logbook.append_line, half_line)
    agrpo.optimizer_step = watched(agrpo.optimizer_step, nothing)
    agrpo.evaluate = watched(agrpo.evaluate, nothing)
    return lambda: count


def die(half):
    half()
    os.kill(os.getpid(), signal.SIGKILL)


def ctrl_c(half):
    os.kill(os.getpid(), signal.SIGINT)


def ctrl_c_and_the_reader_dies(half):
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    os.kill(os.getpid(), signal.SIGINT)


def fill_disk(half):
    """Every file over 100 kB fails to be written: the checkpoint and the adapter."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def child(argv, log, act, n):
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 1), os.dup2(fd, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    count = each_moment(act, n)
    code = agrpo.main(argv)
    print("moments", count(), flush=True)
    os._exit(code)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Start a run in a process of its own. The server imports agrpo once but never runs a backward pass, so that forks
    of it may."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["agrpo", "accelerate", "matplotlib.pyplot", "peft",
                                    "transformers.models.modernbert.modeling_modernbert"])
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)              # for the server's imports
    log = tmp_path_factory.mktemp("log") / "console"

    def process(*flags, act=None, at=0):
        process = context.Process(target=child, args=([*SMALL, *map(str, flags)], str(log), act, at))
        process.start()
        return process

    def finish(*flags, **more):
        p = process(*flags, **more)
        p.join(60)
        return SimpleNamespace(code=p.exitcode, console=log.read_text())

    yield SimpleNamespace(process=process, finish=finish)
    monkeypatch.undo()


@pytest.fixture(scope="session")
def whole(start, base, tmp_path_factory):
    """The undisturbed run that all others are compared with."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = start.finish("--model", base, "--out", folder)
    assert done.code == 0, done.console
    return SimpleNamespace(outcome=outcome(folder), moments=int(done.console.split()[-1]))


def test_a_run_killed_at_any_moment_resumes_to_the_very_same_end(start, whole, base, tmp_path):
    resumed_after = set()
    for n in range(1, whole.moments + 1, 1 if os.environ.get("EVERY_MOMENT") else 5):
        flags = ("--model", base, "--out", tmp_path / str(n))
        assert start.finish(*flags, act=die, at=n).code == -signal.SIGKILL
        resumed = start.finish(*flags, "--resume")
        assert resumed.code == 0, resumed.console
        assert outcome(tmp_path / str(n)) == whole.outcome, f"killed at moment {n} of {whole.moments}"
        assert not [p for p in (tmp_path / str(n)).rglob("*.partial")], "what a killed write left behind is gone"
        resumed_after.update(re.findall("resumed .* after update ([0-9])|no checkpoint", resumed.console))
    assert resumed_after >= {"", "0", "2", "4"}, "killed before, at and between checkpoints, and after the last"


def test_a_run_killed_again_and_again_at_random_times_gets_there(start, whole, base, tmp_path):
    rng, flags = random.Random(1), ("--model", base, "--out", tmp_path / "run", "--save_every", "1")
    resume = ()
    for _ in range(4):
        process = start.process(*flags, *resume)
        time.sleep(rng.uniform(0.3, 1.5))
        process.kill()
        process.join(60)
        resume = ("--resume",) * (tmp_path / "run").exists()
    resumed = start.finish(*flags, *resume)
    assert resumed.code == 0, resumed.console
    assert outcome(tmp_path / "run") == whole.outcome


def test_ctrl_c_saves_says_so_and_the_run_resumes(start, whole, base, tmp_path):
    for n, act in ((11, ctrl_c), (11, ctrl_c_and_the_reader_dies), (3, ctrl_c)):    # in update 1, before the first
        flags = ("--model", base, "--out", tmp_path / f"{n} {act.__name__}")
        stopped = start.finish(*flags, act=act, at=n)
        assert stopped.code == 130, stopped.console
        if act is ctrl_c:
            assert "--resume" in stopped.console
        if n == 11:
            assert "Ctrl-C: stopping after this update" in stopped.console
            saved = torch.load(tmp_path / f"{n} {act.__name__}" / "checkpoint.pt", weights_only=True)
            assert saved["state"]["update"] == 1
        assert "Traceback" not in stopped.console
        assert start.finish(*flags, "--resume").code == 0
        assert outcome(tmp_path / f"{n} {act.__name__}") == whole.outcome


def test_a_full_disk_ends_in_one_sentence_and_loses_nothing(start, whole, base, tmp_path):
    for n in (1, whole.moments - 6):                   # before the first checkpoint; before the adapter
        flags = ("--model", base, "--out", tmp_path / str(n))
        stopped = start.finish(*flags, act=fill_disk, at=n)
        assert stopped.code == 2 and "Traceback" not in stopped.console, stopped.console
        assert f"agrpo: cannot write {tmp_path / str(n)}" in stopped.console and "make room" in stopped.console
        assert not list((tmp_path / str(n)).glob("*.partial")), "the unfinished file gives its space back"
        assert start.finish(*flags, "--resume").code == 0
        assert outcome(tmp_path / str(n)) == whole.outcome


def test_a_finished_run_resumed_says_so_and_changes_nothing(finished, base):
    before = snapshot(finished.folder)
    again = run("--model", base, "--out", finished.folder, "--resume", "--sample_every", 5)
    assert again.code == 0 and "it is finished" in again.out
    assert again.out.splitlines()[-1] == finished.console.splitlines()[-1]
    assert {**snapshot(finished.folder), "config.json": None} == {**before, "config.json": None}


def test_resume_without_out_takes_the_newest_run_of_this_very_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(["countdown-3to4", "countdown-2", "countdown"]):
        config = tmp_path / "runs" / name / "config.json"
        config.parent.mkdir(parents=True)
        config.touch()
        os.utime(config, (10 ** 9 - age, 10 ** 9 - age))
    assert logbook.choose_out(SimpleNamespace(task="countdown", mode="train", resume=True, out=None)) == "runs/countdown-2"


def test_memory_and_time_of_the_part_before_a_resume_count(start, base, tmp_path):
    flags = ("--model", base, "--out", tmp_path / "run")
    start.finish(*flags, act=ctrl_c, at=12)
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    saved["state"].update(seconds=1000.0, memory_bytes=2 ** 50)
    torch.save(saved, tmp_path / "run" / "checkpoint.pt")
    start.finish(*flags, "--resume")
    summary = read(tmp_path / "run" / "summary.json")
    assert summary["peak_memory_bytes"] == 2 ** 50 and 1000 < summary["seconds"] < 1060


# --- A gradient that is not finite ------------------------------------------------------------------------------------


def poison(monkeypatch, calls):
    """Multiply the loss of the given calls by NaN; record for every optimizer step whether it moved the weights."""
    loss, step, moved, count = agrpo.clipped_loss, agrpo.optimizer_step, [], iter(range(10 ** 9))

    def clipped_loss(*args, **kwargs):
        value, *rest = loss(*args, **kwargs)
        return value * (float("nan") if next(count) in calls else 1.0), *rest

    def optimizer_step(params, *args):
        before = [p.detach().clone() for p in params]
        norm = step(params, *args)
        moved.append(any(not torch.equal(p, q) for p, q in zip(params, before)))
        return norm

    monkeypatch.setattr(agrpo, "clipped_loss", clipped_loss)
    monkeypatch.setattr(agrpo, "optimizer_step", optimizer_step)
    return moved


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_said(base, tmp_path, monkeypatch):
    moved = poison(monkeypatch, {3})                   # the second pass of the second update; that of the first is fine
    result = run("--model", base, "--out", tmp_path / "run", "--mu", 2)
    assert result.code == 0 and "update 2 changed nothing" in result.out
    assert moved[:-1] == [True, True, True, False, True, True, True]
    assert [x["grad_norm"] is None for x in read(tmp_path / "run" / "metrics.jsonl")] == [False, True, False, False]
    assert read(tmp_path / "run" / "summary.json")["skipped_updates"] == 1


def test_three_in_a_row_stop_the_run(base, tmp_path, monkeypatch):
    moved = poison(monkeypatch, {1, 2, 3})
    result = run("--model", base, "--out", tmp_path / "run", "--updates", 9)
    assert result.code == 2 and "three updates in a row" in result.err and "--lr" in result.err
    assert moved == [True, False, False, False], "and saved are the weights before them"
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert saved["state"]["update"] == 4 and len(read(tmp_path / "run" / "metrics.jsonl")) == 4


def test_weights_that_diverge_end_in_one_sentence(base, tmp_path):
    result = run("--model", base, "--out", tmp_path / "run", "--lr", 1e30)
    assert result.code == 2 and "--lr" in result.err and result.err.splitlines()[-1].startswith("agrpo: ")


# --- Bad input --------------------------------------------------------------------------------------------------------


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


BAD = {                                                # flags -> what the sentence must name
    "--task chess": ["--task chess", "countdown"],
    "--lorar 3": ["--lorar", "--help"],
    "--updates three": ["--updates", "'three'"],
    "--lr fast": ["--lr", "'fast'"],
    "--lr nan": ["--lr nan", "positive"],
    "--updates 0": ["--updates 0", "at least 1"],
    "--eval_sampled maybe": ["--eval_sampled", "'maybe'"],
    "--mode test": ["--mode test", "eval"],
    "--unmasking best": ["--unmasking best", "low_confidence"],
    "--m 5": ["--m 5", "3"],
    "--block_length 5": ["--block_length 5", "4"],
    "--steps 5": ["--steps 5", "4"],
    "--steps few": ["--steps", "12,6,3"],
    "--temperature 0": ["--temperature 0", "--mode eval"],
    "--k 0": ["--k 0", "at least 1"],
    "--k 4": ["--k 4", "--m 3"],
    "--G 0": ["--G 0", "at least 2"],
    "--G 1": ["--G 1", "at least 2"],
    "--top_p 0": ["--top_p 0"],
    "--seed 99999999999999999999": ["--seed"],
    "--beta 0.1 --lora_r 0": ["--beta", "--lora_r"],
    "--device tpu": ["--device tpu", "cpu"],
    "--device cuda:99": ["--device cuda:99", "cpu"],
    "--tracker paper": ["--tracker paper"],
    "--numbers 99": ["numbers 99"],
    "--train-file {tmp}/none.jsonl": ["--train-file", "none.jsonl"],
    "--test_file {tmp}/none.jsonl": ["--test-file", "none.jsonl"],
    "--test_file {tmp}/rubbish.jsonl": ["rubbish.jsonl", "line 1"],
    "--model {tmp}/nowhere": ["--model", "nowhere", "config.json"],
    "--model lab/tny --m 4 --C 8": ["--model lab/tny", "config.json"],
    "--model {tmp}/no_weights": ["--model", "no_weights"],
    "--model {tmp}/half_weights": ["--model", "half_weights"],
    "--model nobody/nothing --m 128 --steps 128": ["--model nobody/nothing", "network"],
    "--adapter {run}/adapter": ["--adapter", "--mode eval"],
    "--mode eval --adapter {tmp}/nowhere": ["--adapter", "nowhere"],
    "--mode eval --adapter {run}/adapter --model {shallow}": ["--adapter", "--model"],
    "--mode eval --resume": ["--resume"],
    "--out {tmp}/rubbish.jsonl": ["--out", "rubbish.jsonl"],
    "--out {tmp}/rubbish.jsonl/run": ["--out", "rubbish.jsonl"],
    "--out /proc/run": ["--out /proc/run"],
    "--out {run}": ["--out", "--resume"],
    "--out {base}": ["--out", "choose another folder"],
    "--resume --out {base}": ["--out", "choose another folder"],
    "--resume --out {tmp}/nowhere": ["--resume", "nowhere"],
    "--resume --out {run} --lr 0.5": ["--lr", "0.5", "repeat its flags"],
    "--resume --out {run} --model {other}": ["--model", "another model"],
    "--resume --out {run} --model {shallow}": ["--model", "another model"],
    "--resume --out {tmp}/corrupt": ["checkpoint.pt", "--out"],
}


@pytest.fixture(scope="session")
def mess(base, finished, tmp_path_factory):
    """A folder of things that a run trips over."""
    folder = tmp_path_factory.mktemp("mess")
    (folder / "rubbish.jsonl").write_text('{"nums": "none"}\n')
    for name in ("no_weights", "half_weights"):
        shutil.copytree(base, folder / name)
    (folder / "no_weights" / "model.safetensors").unlink()
    os.truncate(folder / "half_weights" / "model.safetensors", 10_000)
    shutil.copytree(finished.folder, folder / "corrupt")
    os.truncate(folder / "corrupt" / "checkpoint.pt", 10_000)
    return folder


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_sentence_with_a_way_out(flags, base, other, shallow, finished, mess, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "hub_answers", lambda hub: False)                # as on a machine without a network
    monkeypatch.chdir(ROOT)
    argv = flags.format(tmp=mess, run=finished.folder, base=base, other=other, shallow=shallow).split()
    if "--model" not in argv:
        argv += ["--model", base]
    if "--out" not in argv:
        argv += ["--out", tmp_path / "run"]
    before = [snapshot(folder) for folder in (finished.folder, mess, base)]
    began = time.time()
    result = run(*argv)
    assert result.code == 2 and time.time() - began < 15, "no waiting for retries"
    sentences = [line for line in result.err.splitlines() if not line.startswith("kernels.py:")]
    assert len(sentences) == 1 and sentences[0].startswith("agrpo: "), result.err
    for part in BAD[flags]:
        assert part in sentences[0]
    assert [snapshot(folder) for folder in (finished.folder, mess, base)] == before, "nothing is lost"


def test_the_exit_code_reaches_the_shell_and_a_run_that_failed_early_leaves_no_folder(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "agrpo.py", "--device", "cpu", "--test_file", "none.jsonl"], cwd=tmp_path,
                          text=True, capture_output=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert (tmp_path / "runs").is_dir() and not list((tmp_path / "runs").iterdir())


# --- What a run leaves behind -----------------------------------------------------------------------------------------


def test_the_folder_holds_what_was_promised(finished, base):
    assert {p.name for p in finished.folder.iterdir()} == {
        "config.json", "metrics.jsonl", "summary.json", "samples.jsonl", "curve.png", "adapter", "checkpoint.pt"}
    summary, config = read(finished.folder / "summary.json"), read(finished.folder / "config.json")
    assert {"task", "model", "seed", "base_accuracy", "final_accuracy", "eval_n", "updates", "seconds", "rollout_seconds",
            "loss_seconds", "peak_memory_bytes"} <= set(summary)
    assert (summary["task"], summary["model"], summary["updates"], summary["eval_n"]) == ("countdown", base, 4, 8)
    assert (config["m"], config["questions"], config["G"]) == (3, 3, 4) and config["versions"]["torch"] == torch.__version__
    assert [x["update"] for x in read(finished.folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert {"prompt", "half", "text", "parsed", "reason", "reward"} <= set(read(finished.folder / "samples.jsonl")[0])
    assert (finished.folder / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_last_line_says_what_was_reached_and_where_it_is(finished):
    end = " ".join(finished.console.split("held-out accuracy")[-1].split())
    summary = read(finished.folder / "summary.json")
    assert end.startswith(f"{summary['base_accuracy']:.1%} -> {summary['final_accuracy']:.1%}")
    assert end.endswith(f"files in {finished.folder}")


def test_plain_peft_loads_the_adapter_to_the_same_logits(base, tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForMaskedLM

    trained, save = [], logbook.save_weights
    monkeypatch.setattr(logbook, "save_weights", lambda policy, folder: (trained.append(policy), save(policy, folder)))
    run("--model", base, "--out", tmp_path / "run")
    ids = torch.arange(10, 26)[None]
    ours = trained[0](ids, torch.ones_like(ids), torch.arange(16))
    model = AutoModelForMaskedLM.from_pretrained(base, dtype=torch.float32).eval()
    before = model(ids).logits[0]
    plain = PeftModel.from_pretrained(model, tmp_path / "run" / "adapter")(ids, attention_mask=torch.ones_like(ids)).logits[0]
    assert torch.equal(ours, plain) and not torch.allclose(plain, before)


def update(**change):
    return dict(grad_norm=1.0, entropy=2.0, late_eos=0.2, dead_groups=0.2, clip_low=0.1, clip_high=0.1) | change


@pytest.mark.parametrize("kind,over,at_most,past", [
    ("spike", dict(grad_norm=10.1), dict(grad_norm=10.0), [update()] * 10),
    ("spike", dict(grad_norm=21), dict(grad_norm=19), [update(grad_norm=2)] * 10 + [update(grad_norm=0)] * 15),  # 0: all dead
    ("spike", dict(grad_norm=31), dict(grad_norm=29), [update(grad_norm=9)] * 30 + [update(grad_norm=3)] * 20),  # last 20
    ("entropy", dict(entropy=0.09), dict(entropy=0.1), [update(), update(entropy=0.2)]),
    ("eos", dict(late_eos=0.91), dict(late_eos=0.9), []),
    ("dead", dict(dead_groups=0.81), dict(dead_groups=0.8), []),
    ("clip", dict(clip_low=0.21), dict(clip_low=0.19), [])])
def test_a_warning_names_what_left_its_range_and_nothing_else(kind, over, at_most, past):
    assert [name for name, text in logbook.signatures(update(**over), past)] == [kind]
    assert not list(logbook.signatures(update(**at_most), past))


def test_nine_norms_are_too_few_for_a_median():
    assert not list(logbook.signatures(update(grad_norm=1e9), [update()] * 9 + [update(grad_norm=float("inf"))] * 5))


def test_json_stays_json_and_lines_stay_narrow():
    assert json.loads(logbook.to_json({"x": [float("nan"), float("inf"), 1.5]})) == {"x": [None, None, 1.5]}
    cell = dict(m=128, greedy=True, n=10000, accuracy=1.0, low=1.0, high=1.0, reward=4.0, cell_accuracy=1.0, string_match=1.0)
    assert max(map(len, logbook.eval_table([cell], [cell]))) <= 120
    assert logbook.cut("a\x1b[2Jb\n" + "c" * 200, 60).isprintable()


# --- Every variant runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    "--mu 2 --beta 0.1", "--unmasking low_confidence", "--unmasking low_confidence --score_discarded false",
    "--unmasking entropy --ratio step", "--top_k 60 --top_p 0.9 --length_norm official", "--task sudoku --m 4 --micro_batch 3",
    "--points iid --timesteps uniform --normalise_std --block-length=6 --m 4 --eval_every 1"])
def test_variants_run_end_to_end(flags, base, tmp_path):
    result = run("--model", base, "--out", tmp_path / "run", "--updates", 2, "--steps", 4 if "--m 4" in flags else 1,
                 *flags.split())
    assert result.code == 0, result.err
    metrics = read(tmp_path / "run" / "metrics.jsonl")
    assert all(x["grad_norm"] >= 0 for x in metrics) and metrics[0]["pairs"] > 0
    if "--mu 2" in flags:
        assert metrics[-1]["kl"] > 0 and metrics[-1]["ratio_max"] > 1
    if "--eval_every 1" in flags:
        assert "held_out" in metrics[0]
    if "sudoku" in flags:
        assert "cell_accuracy" in result.out


def test_without_lora_the_whole_model_is_trained_saved_and_can_be_used(base, tmp_path):
    result = run("--model", base, "--out", tmp_path / "run", "--lora_r", 0, "--lr", 1e-3)
    assert result.code == 0 and not (tmp_path / "run" / "adapter").exists()
    result = run("--mode", "eval", "--model", tmp_path / "run" / "model", "--out", tmp_path / "eval")
    assert result.code == 0, result.err
    assert same_results(tmp_path / "eval", tmp_path / "run")


def same_results(evaluation, training):
    """The cells of eval.json are those of the end of training: rewards too, for accuracy may be 0 everywhere."""
    found = {(x["m"], x["greedy"]): x for x in read(evaluation / "eval.json")["results"]}
    known = {(x["m"], x["greedy"]): x for x in read(training / "summary.json")["final"]}
    return found and all(found[cell] == known[cell] for cell in known)


def test_a_trained_adapter_evaluates_to_the_numbers_of_its_run_and_harms_nothing(base, finished, tmp_path):
    copy = shutil.copytree(finished.folder, tmp_path / "run")
    before = snapshot(copy)
    flags = ("--mode", "eval", "--model", base, "--adapter", copy / "adapter", "--out", copy)
    result = run(*flags, "--steps", "12,3")
    assert result.code == 0, result.err
    assert same_results(copy, finished.folder)
    assert {(x["m"], x["greedy"]) for x in read(copy / "eval.json")["results"]} == {
        (12, True), (3, True), (12, False), (3, False)}
    assert len(read(copy / "generations.jsonl")) == 4 * 8
    after = snapshot(copy)
    assert {name: after[name] for name in before} == before
    assert run(*flags).code == 2 and snapshot(copy) == after, "an evaluation is not overwritten either"


def test_watch_shows_every_step_of_one_problem(base, finished, capsys):
    flags = ["--device", "cpu", "--mode", "eval", "--model", base, "--m", "4", "--seed", "1"]
    for more in ([], ["--adapter", f"{finished.folder}/adapter", "--temperature", "0", "--unmasking", "low_confidence"]):
        assert watch.watch(agrpo.configure([*flags, *more])) == 0
        lines = capsys.readouterr().out.splitlines()
        states = [line.split() for line in lines if line.startswith("x_")]
        assert [sum(token == "_" for token in state) for state in states] == [12, 9, 6, 3, 0]
        assert any(line.startswith("Numbers:") for line in lines) and "reward" in lines[-1] and "\x1b" not in "".join(lines)


def test_watch_highlights_each_token_once_in_the_step_that_revealed_it(base, capsys, monkeypatch):
    monkeypatch.setattr(watch, "NEW", "{"), monkeypatch.setattr(watch, "PLAIN", "}")
    watch.watch(agrpo.configure(["--device", "cpu", "--mode", "eval", "--model", base, "--m", "4"]))
    states = [line for line in capsys.readouterr().out.splitlines() if line.startswith("x_")]
    assert [state.count("{") for state in states] == [0, 3, 3, 3, 3]


def test_the_shipped_model_runs(tmp_path):
    assert run("--out", tmp_path / "run", "--updates", 1).code == 0
