"""A run can be trusted: repeated, killed at any moment, stopped, mistreated, and read after.

Nothing depends on lab/tiny: the model is one that nobody trained. Models that are damaged, or
of an unknown kind, are in test_models.py.
"""
import json
import os
import resource
import shlex
import shutil
import signal
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from conftest import PROBLEMS, ROOT, act_at, main, outcome, read, shelf

import agrpo
import models
import run as lab_run
import tasks

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ("--device cpu --m 3 --k 2 --questions 3 --G 4 --updates 4 --lr 0.01 "
         "--eval_n 8 --steps 3 --eval_every 2 --save_every 2").split()
# Its rollouts: 1 and 2 evaluate the base, 3 to 7 are the updates' and one evaluation's,
# 8 and 9 evaluate at the end.


def flags(out, *more):
    return [*SMALL, "--model", shelf["base"], "--out", str(out), *map(str, more)]


def run(out, *more, act=None, at=None):
    return main(flags(out, *more), act, at)


def change(patch, name="countdown", **parts):
    """Another grader, say, for a task."""
    patch.setitem(tasks.TASKS, name, replace(tasks.TASKS[name], **parts))


@pytest.fixture(scope="module", autouse=True)
def problems_are_made_once():
    with pytest.MonkeyPatch.context() as patch:
        change(patch, make=lru_cache(maxsize=None)(tasks.TASKS["countdown"].make))
        yield


@pytest.fixture(autouse=True)
def one_picture_is_enough(monkeypatch):
    """That of `finished`, which is older than this fixture."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **more: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_thread, problems_are_made_once):
    """The run that nothing disturbed: the others are compared with it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    done = run(folder)
    assert done.code == 0, done.err
    return SimpleNamespace(folder=folder, outcome=outcome(folder), console=done.out)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, tmp_path):
    torch.manual_seed(99)                        # nothing may depend on the global generator
    run(tmp_path / "again")
    run(tmp_path / "other", "--seed", 1, "--updates", 1)
    assert outcome(tmp_path / "again") == finished.outcome
    assert outcome(tmp_path / "other")["metrics"] != finished.outcome["metrics"]
    # Else all comparisons here compare nothing with nothing.
    norms = [x["grad_norm"] for x in finished.outcome["metrics"]]
    assert max(norms[:2]) > 0 and max(norms[2:]) > 0


# --- killed, stopped, out of space ------------------------------------------------------------

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


def stop(half):
    signal.raise_signal(signal.SIGTERM)


def stop_at_once(half):
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def disturbed(argv, act, at):
    """A run in a process of its own."""
    act_at(act, at, pytest.MonkeyPatch())
    os._exit(lab_run.main(argv))


@pytest.mark.parametrize("moment", [
    ("rollout", 2), ("fsync", 1), ("fsync", 6), ("optimizer_step", 2), ("optimizer_step", 4),
    ("replace", 4), ("rollout", 9), ("rename", 1), ("rename", 2)], ids=str)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_end(moment, forked, finished, tmp_path):
    argv = flags(tmp_path / "run")
    assert forked(disturbed, (argv, die, moment))[0].code == -signal.SIGKILL
    assert main(argv).code == 0
    assert outcome(tmp_path / "run") == finished.outcome


def test_a_terminal_that_is_gone_stops_nothing(forked, finished, tmp_path):
    argv = flags(tmp_path / "run")
    hung_up = forked(disturbed, (argv, lose_it_and_hang_up, ("optimizer_step", 1)))
    assert hung_up[0].code == 130 and len(read(tmp_path / "run" / "metrics.jsonl")) == 1
    assert forked(disturbed, (argv, lose_the_terminal, ("rollout", 1)))[0].code == 0
    assert outcome(tmp_path / "run") == finished.outcome


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])         # SIGHUP: above
def test_a_signal_lets_the_update_end_saves_and_says_so(name, finished, tmp_path, capfd):
    number, before = getattr(signal, name), signal.getsignal(signal.SIGTERM)
    stopped = run(tmp_path / "run", act=lambda half: signal.raise_signal(number),
                  at=("optimizer_step", 1))
    assert stopped.code == 130 and "stopping after this update" in capfd.readouterr().err
    assert "stopped after update 1" in stopped.out and "same command" in stopped.out
    assert len(read(tmp_path / "run" / "metrics.jsonl")) == 1
    assert signal.getsignal(signal.SIGTERM) == before, "the caller's handlers are back"
    assert "going on after update 1 of 4" in run(tmp_path / "run").out
    assert outcome(tmp_path / "run") == finished.outcome


def test_a_second_signal_stops_at_once_and_nothing_is_lost(finished, tmp_path):
    stopped = run(tmp_path / "run", act=stop_at_once, at=("optimizer_step", 4))
    assert stopped.code == 130 and "stopped at once" in stopped.err
    assert "going on after update 2" in run(tmp_path / "run").out
    assert outcome(tmp_path / "run") == finished.outcome


@pytest.mark.parametrize("moment", [("rollout", 1), ("rollout", 9)], ids=str)
def test_a_full_disk_ends_in_one_sentence_and_loses_nothing(moment, finished, tmp_path):
    """Full before the first checkpoint; full in the last evaluation, before the adapter."""
    def fill(half):                              # no file over 100 kB: checkpoint, adapter
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        full = run(tmp_path / "run", act=fill, at=moment)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert full.code == 2 and full.err.startswith(f"agrpo: cannot write {tmp_path / 'run'}")
    assert "make room" in full.err and len(full.err.splitlines()) == 1
    assert not list((tmp_path / "run").glob("*.pt.partial")), "it gives its room back"
    assert run(tmp_path / "run").code == 0
    assert outcome(tmp_path / "run") == finished.outcome


def test_a_folder_that_was_deleted_ends_in_one_sentence(tmp_path):
    gone = run(tmp_path / "run", act=lambda half: shutil.rmtree(tmp_path / "run"),
               at=("optimizer_step", 1))
    assert gone.code == 2 and gone.err.startswith(f"agrpo: cannot write {tmp_path / 'run'}")
    assert len(gone.err.splitlines()) == 1 and "start again" in gone.err


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    """Also where the other run has written nothing yet."""
    said = []

    def second(half):
        said.append(run(tmp_path / "run"))
        said.append([*(tmp_path / "run").iterdir()])
        stop_at_once(half)
    assert run(tmp_path / "run", act=second, at=("rollout", 1)).code == 130
    refused, files = said
    assert refused.code == 2 and f"--out {tmp_path / 'run'} is in use" in refused.err
    assert files == [] and not (tmp_path / "run").exists(), "nothing was written"


def test_a_damaged_checkpoint_is_refused_wherever_the_damage_is(finished, tmp_path):
    """Also at both ends, where a format keeps what no checksum of the contents covers."""
    path = shutil.copytree(finished.folder, tmp_path / "run") / "checkpoint.pt"
    good = path.read_bytes()
    flipped = [bytearray(good) for _ in range(5)]
    for damaged, at in zip(flipped, (10, 200, len(good) // 2, len(good) - 300, len(good) - 1)):
        damaged[at] ^= 4
    for damaged in (*flipped, good[:10_000], good[:-1], b""):
        path.write_bytes(damaged)
        refused = run(path.parent)
        assert refused.code == 2 and "checkpoint.pt cannot be read" in refused.err
        assert path.read_bytes() == damaged


def test_a_finished_run_called_again_says_the_same_and_changes_nothing(
        finished, tmp_path, monkeypatch):
    copy = shutil.copytree(finished.folder, tmp_path / "run")
    monkeypatch.setattr(agrpo, "write_answers", None)           # its table is in the checkpoint
    again = run(copy)
    assert again.code == 0 and "going on after update 4 of 4" in again.out
    assert again.out.splitlines()[-1] == finished.console.splitlines()[-1]
    assert outcome(copy) == finished.outcome


def test_what_was_ignored_stays_ignored_and_handlers_are_put_back():
    """Under nohup SIGHUP is ignored, so that a run outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with lab_run.heard_signals() as heard:
        signal.raise_signal(signal.SIGHUP)
        assert heard == []
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


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
    never = lambda text, example: tasks.graded(0.0, 0, "never right", "")
    change(monkeypatch, grade=never)
    done = run(tmp_path / "run", "--updates", 3)
    assert done.code == 0 and "no rollout was learnt from" in done.out
    assert done.out.count("groups are dead") == 1               # said once, not each update


def test_a_batch_grader_must_return_a_grade_for_each_text(tmp_path, monkeypatch):
    grade = tasks.TASKS["countdown"].grade
    one = lambda texts, examples: [grade(texts[0], examples[0])]
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
    assert [name for name, text in lab_run.warnings(update(**over), past)] == [kind]
    assert not list(lab_run.warnings(update(**at_most), past))


# --- bad input --------------------------------------------------------------------------------

BAD = {                                          # flags -> what the sentence must hold
    "--task chess": "--task chess|countdown",
    "--task {mess}/none.py": "--task|none.py",
    "--task {mess}/nothing.py": "--task|nothing.py|registers no task",
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
    "--G 1": "--G 1|from 2",
    "--C 0": "--C 0|from 1",
    "--top_p 0": "--top_p 0",
    "--top_p 0.9": "--top_p 0.9|--top_k",
    "--seed 99999999999": "--seed 99999999999",
    "--micro_batch 99999999999999999999": "--micro_batch|1e+15",
    "--shift 2": "--shift 2|1 for a model",
    "--mask_id -2": "--mask_id -2|from -1",
    "--beta 0.1 --lora_r 0": "--beta|--lora_r",
    "--adapter {run}/adapter --lora_r 0": "--adapter|--lora_r",
    "--lora_r 0 --dtype bfloat16": "--lora_r 0|--dtype float32",
    "--device cuda:99": "--device cuda:99|cpu",
    "--numbers 99": "numbers 99",
    "--empties 3": "--empties",
    "--max_prompt 2": "--max_prompt|over 2 tokens",
    "--C 252 --m 21": "--C|over 4 tokens|256",
    "--max_number 200": "--model|vocabulary",
    "--mask_id 5000": "--mask_id|5000",
    "--train-file {mess}/none.jsonl": "none.jsonl|No such",
    "--test_file ~/no/such.jsonl": "such.jsonl",
    "--test_file {mess}/rubbish.jsonl": "rubbish.jsonl|row 1",
    "--test_file {mess}/noise.parquet": "noise.parquet",
    "--test_file {mess}/empty.jsonl": "empty.jsonl|no test rows",
    "--test_file {mess}/third.jsonl": "third.jsonl|line 3",
    "--test_file ''": "--test_file is empty",
    "--out ''": "--out is empty",
    "--model ''": "--model is empty",
    "--model {mess}/nowhere": "--model|nowhere|config.json",
    "--model lab/tny": "--model lab/tny|network",
    "--adapter {mess}/nowhere": "--adapter|nowhere|adapter_config.json",
    "--policy {policies}": "--policy|FILE.py:Class",
    "--policy {policies}:torch": "--policy|FILE.py:Class",
    "--adapter nowhere": "--adapter nowhere|adapter_config.json",
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
    (folder / "third.jsonl").write_text(2 * '{"nums": [1, 2, 3], "target": 6}\n' + "{")
    (folder / "empty.jsonl").touch()
    (folder / "nothing.py").touch()
    adapter = shutil.copytree(finished.folder / "adapter", folder / "nan")
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0] = float("nan")
    save_file(weights, adapter / "adapter_model.safetensors")
    return folder


def snapshot(*folders):
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("typed", BAD)
def test_bad_input_is_one_sentence_with_a_way_out(typed, finished, mess, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "hub_answers", lambda hub: False)        # no network
    monkeypatch.chdir(tmp_path)
    others = {name: shelf[name] for name in ("shallow", "other")}
    argv = shlex.split(typed.format(mess=mess, run=finished.folder, **others,
                                    policies=ROOT / "lab" / "policies.py"))
    before = snapshot(finished.folder, mess)
    done = run(tmp_path / "run", *argv)
    assert done.code == 2
    lines = done.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("agrpo: "), done.err
    assert [word for word in BAD[typed].split("|") if word not in lines[0]] == [], lines[0]
    assert snapshot(finished.folder, mess) == before and not list(tmp_path.iterdir())


def test_flags_as_people_spell_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = lab_run.parse(["--eval-n=7", "--recompute", "--eval_sampled", "no", "--out", "~/here"])
    assert (cfg.eval_n, cfg.recompute, cfg.eval_sampled) == (7, True, False)
    assert cfg.out == str(tmp_path / "here")


# --- what a run leaves behind -----------------------------------------------------------------

def test_the_folder_holds_what_was_promised(finished):
    assert {path.name for path in finished.folder.iterdir()} == {
        "config.json", "metrics.jsonl", "summary.json", "samples.jsonl", "curve.png", "adapter",
        "checkpoint.pt"}
    assert (finished.folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    config, summary = (read(finished.folder / name) for name in ("config.json", "summary.json"))
    # torch may say "+cu130" where its package does not.
    recorded, said = (version.partition("+")[0]
                      for version in (config["versions"]["torch"], torch.__version__))
    assert (config["m"], config["G"], recorded) == (3, 4, said)
    promised = ("task model seed base_accuracy final_accuracy best_accuracy best_update eval_n "
                "test_data updates skipped_updates seconds rollout_seconds loss_seconds "
                "peak_memory_bytes base final evals")
    assert set(promised.split()) <= set(summary)
    assert (summary["task"], summary["model"]) == ("countdown", shelf["base"])
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
    assert json.loads(lab_run.to_json(nested)) == dict(x=None, y=dict(z=1.5))
    text = lab_run.cut("a\x1b[2Jb\n" + "c" * 200, 60)
    assert text.isprintable() and len(text) <= 60


def test_plain_peft_loads_the_adapter_to_the_same_logits(finished):
    from peft import PeftModel
    from transformers import AutoModelForMaskedLM

    adapter = str(finished.folder / "adapter")
    ids, shown = torch.arange(10, 26)[None], torch.ones(1, 16, dtype=torch.long)
    policy = models.load_policy(lab_run.parse(flags("none", "--adapter", adapter)), PROBLEMS)
    model = AutoModelForMaskedLM.from_pretrained(shelf["base"], dtype=torch.float32).eval()
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
    done = run(tmp_path / "run", "--lora_r", 0, "--updates", 2)
    assert done.code == 0 and not (tmp_path / "run" / "adapter").exists(), done.err
    done = run(tmp_path / "eval", "--updates", 0, "--model", tmp_path / "run" / "model")
    assert done.code == 0, done.err
    trained = read(tmp_path / "run" / "summary.json")
    assert trained["final"] != trained["base"]
    assert read(tmp_path / "eval" / "summary.json")["final"] == trained["final"]


def test_the_shipped_model_runs_by_default(tmp_path):
    few = "--device cpu --updates 1 --eval_n 20 --steps 2 --questions 4".split()
    done = main([*few, "--out", tmp_path / "run"])
    assert done.code == 0, done.err
    assert read(tmp_path / "run" / "summary.json")["base_accuracy"] > 0.2
