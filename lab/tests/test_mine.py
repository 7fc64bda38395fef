"""What is the user's stays the user's, and the same command goes on only with the same run."""
import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import main, outcome, read, shelf

import agrpo
import models
import run as lab_run
import tasks
from tasks import TaskError

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ("--device cpu --C 8 --m 2 --k 1 --questions 2 --G 4 --updates 2 --lr 0.01 --eval_n 4 "
         "--steps 2 --eval_every 5 --save_every 1").split()

# The reward grows with the number of different words, so no group is dead.
TASK = '''
import tasks

def make(seed, index, split):
    return dict(nums=[1 + index % 16, 2, 3], split=split)

def prompt(example):
    return tasks.chat("", f"Numbers: {example['nums'][0]} 2 3")

def grade(text, example):
    different = len(set(text.split()))
    return tasks.Grade(different / 8, different > 5, 0.0, "words", text, {})

def read(row, split, options):
    return dict(nums=row["nums"], split=split)

tasks.TASKS["words"] = tasks.Task("words", prompt, grade, make, read)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a user works: a task of their own, a model, rows to train and to test on."""
    (tmp_path / "words.py").write_text(TASK)
    shutil.copytree(shelf["base"], tmp_path / "model")
    for name, first in (("train", 1), ("test", 9)):
        rows = [json.dumps(dict(nums=[first + i, 2, 3])) for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    tasks.TASKS.pop("words", None)
    models.USERS_FILES.clear()


def run(*more, **acts):
    flags = "--task words.py --model model --train_file train.jsonl --test_file test.jsonl"
    return main([*SMALL, *flags.split(), "--out", "run", *map(str, more)], **acts)


def stopped_after_one(*more):
    done = run(*more, act=lambda half: signal.raise_signal(signal.SIGTERM),
               at=("optimizer_step", 1))
    assert done.code == 130, done.err


# --- only what the run made -------------------------------------------------------------------

@pytest.mark.parametrize("files", [
    {"notes.txt": "mine"}, {"adapter/adapter_config.json": "{}"},
    {"config.json": '{"model_type": "bert"}'}, {"metrics.jsonl": "{}"}], ids=str)
def test_a_folder_that_is_no_run_is_refused_and_left_as_it_is(folder, files):
    for name, text in files.items():
        (folder / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "run" / name).write_text(text)
    refused = run()
    assert refused.code == 2 and "--out run holds" in refused.err
    assert len(refused.err.splitlines()) == 1
    there = [path for path in (folder / "run").rglob("*") if path.is_file()]
    assert {str(path.relative_to(folder / "run")): path.read_text() for path in there} == files


def test_the_models_own_folder_is_no_place_for_its_run(folder):
    before = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    refused = run("--out", "model")
    assert refused.code == 2 and "--out model holds" in refused.err
    assert {path.name: path.read_bytes() for path in (folder / "model").iterdir()} == before


def test_what_somebody_put_beside_the_weights_stays(folder):
    assert run().code == 0
    for name in ("run/adapter/notes.txt", "run/plan.txt"):
        (folder / name).write_text("mine")
    assert run().code == 0
    assert (folder / "run/adapter/notes.txt").read_text() == "mine"
    assert (folder / "run/plan.txt").exists()


# --- the same run -----------------------------------------------------------------------------

def other_rows(name):
    def change(folder):
        file = folder / f"{name}.jsonl"
        file.write_text(file.read_text().replace("[2, 2, 3]", "[2, 2, 4]").replace("[9,", "[8,"))
    return change


def other_grader(folder):
    (folder / "words.py").write_text(TASK.replace("> 5", "> 1"))


def other_mask(folder):
    config = json.loads((folder / "model/config.json").read_text())
    config["mask_token_id"] = 7
    (folder / "model/config.json").write_text(json.dumps(config))


def other_weights(folder):
    """One number, far from the beginning of its tensor."""
    from safetensors.torch import load_file, save_file

    file = folder / "model/model.safetensors"
    weights = load_file(file)
    name = max(weights, key=lambda name: weights[name].numel())
    weights[name].view(-1)[-7] += 0.5
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("change, names", [
    (other_rows("train"), "the training problems"), (other_rows("test"), "the held-out problems"),
    (other_grader, "the code of words.py"), (other_mask, "--mask_id"),
    (other_weights, "--model (its weights)")],
    ids=["training rows", "test rows", "grader", "mask", "weights"])
def test_the_same_command_on_other_things_is_another_run(folder, change, names):
    """Each went on in silence once, and put two different things into one table."""
    stopped_after_one()
    before = (folder / "run/checkpoint.pt").read_bytes()
    change(folder)
    refused = run()
    assert refused.code == 2 and f"{names} " in refused.err, refused.err
    assert "changed since this run began" in refused.err
    assert (folder / "run/checkpoint.pt").read_bytes() == before


def test_another_policys_code_is_another_run(folder):
    code = ("import agrpo\n\nclass Same(agrpo.Policy):\n"
            "    def __call__(self, *all):\n        return super().__call__(*all)\n")
    (folder / "same.py").write_text(code)
    stopped_after_one("--policy", "same.py:Same")
    (folder / "same.py").write_text(code + "# edited\n")
    refused = run("--policy", "same.py:Same")
    assert refused.code == 2 and "the code of same.py" in refused.err


def test_advice_about_memory_can_be_followed_on_resume(folder):
    assert run().code == 0
    undisturbed = outcome(folder / "run")
    shutil.rmtree(folder / "run")
    stopped_after_one()
    done = run("--micro_batch", 3, "--rollout_batch", 5, "--recompute", "--eval_every", 9)
    assert done.code == 0, done.err
    rewards = [[x["reward"] for x in read(folder / "run/metrics.jsonl")],
               [x["reward"] for x in undisturbed["metrics"]]]
    assert rewards[0] == rewards[1]


def test_a_resumed_run_goes_on_in_its_own_wandb_record(folder, monkeypatch):
    calls, logged = [], []
    fake = SimpleNamespace(init=lambda **more: calls.append(more),
                           log=lambda now, step: logged.append(step))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    stopped_after_one("--wandb", "mine")
    assert run("--wandb", "mine").code == 0 and run("--wandb", "mine").code == 0
    ids = {call["id"] for call in calls}
    assert len(calls) == 3 and len(ids) == 1 and None not in ids
    assert {call["resume"] for call in calls} == {"allow"} and logged == [1, 2]


# --- wrong causes -----------------------------------------------------------------------------

def adapter_of(folder):
    assert run("--updates", 1, "--lora_r", 4, "--lora_alpha", 12).code == 0
    return str(folder / "run" / "adapter")


def test_rank_and_alpha_are_those_of_the_adapter(folder):
    adapter = adapter_of(folder)
    for typed, says in (("--lora_r 9", "--lora_r 9|has 4"), ("--lora_alpha 9", "has 12")):
        refused = run("--adapter", adapter, "--out", "again", *typed.split())
        assert refused.code == 2, refused.out
        assert all(word in refused.err for word in says.split("|"))
    done = run("--adapter", adapter, "--out", "again")
    assert done.code == 0, done.err
    config = read(folder / "again/config.json")
    assert (config["lora_r"], config["lora_alpha"]) == (4, 12)
    # And what it started from is not called the base model.
    assert "start" in done.out and "base " not in done.out.split("steps sampling")[1]


def test_what_the_users_code_raises_keeps_its_traceback(folder):
    (folder / "words.py").write_text(TASK.replace("different / 8", "different / 0"))
    done = run()
    lines = done.err.splitlines()
    assert done.code == 2 and "Traceback" in done.err and "ZeroDivisionError" in done.err
    assert lines[-1].startswith("agrpo: words.py raised ZeroDivisionError in grade, line 12")
    (folder / "words.py").write_text("import tasks\n1 / 0\n")
    assert "words.py raised ZeroDivisionError in <module>, line 2" in run().err


@pytest.mark.parametrize("task, says", [
    ("import tasks\ntasks.TASKS['countdown'] = tasks.TASKS['countdown'].__class__("
     "'countdown', None, None, None)", "--preset"),
    (TASK.replace("make, read)", "make, read, options={'lr': 3})"), "lr is a flag already"),
], ids=["a known name", "a flag's name"])
def test_a_task_that_takes_a_known_name(folder, task, says, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "countdown", tasks.TASKS["countdown"])
    (folder / "words.py").write_text(task)
    refused = main([*SMALL, "--task", "words.py", "--out", "run"])
    assert refused.code == 2 and says in refused.err, refused.err


def test_flags_without_effect_and_half_an_environment_are_named(folder, monkeypatch):
    for typed, says in (
            ("--revision abc", "--revision is for a name of the hub"),
            ("--task countdown --max_number 9", "--max_number has no effect beside")):
        refused = run(*typed.split())
        assert refused.code == 2 and says in refused.err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    refused = run()
    assert refused.code == 2 and "WORLD_SIZE is set" in refused.err and "torchrun" in refused.err


def test_an_encoder_decoder_and_a_lost_tokenizer_are_refused(folder):
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        os.rename(folder / "model" / file, folder / file)
    assert "--model model could not be loaded" in run().err
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        os.rename(folder / file, folder / "model" / file)
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps(dict(config, is_encoder_decoder=True)))
    assert "an encoder and a decoder" in run().err


# --- the check of rho -------------------------------------------------------------------------

def test_the_ratio_is_looked_at_when_there_first_are_pairs(folder, monkeypatch, capsys):
    """With every group dead there is nothing to look at: that is not a ratio of 1."""
    task, alive = "import tasks\n" + TASK, []
    monkeypatch.setattr(lab_run, "check_ratio", lambda policy, ratio: alive.append(len(ratio)))
    (folder / "words.py").write_text(task)
    grades = agrpo.group_advantages

    def dead_at_first(rewards, *more):
        dead_at_first.calls += 1
        return grades(rewards, *more) * (dead_at_first.calls > 1)
    dead_at_first.calls = 0
    monkeypatch.setattr(agrpo, "group_advantages", dead_at_first)
    assert run("--updates", 3).code == 0
    assert len(alive) == 1 and alive[0] > 0
    assert read(folder / "run/metrics.jsonl")[0]["pairs"] == 0


def test_without_data_of_its_own_a_digest_still_tells(folder):
    """`identity` by hand: made problems are told by their first hundred."""
    cfg = lab_run.parse([*SMALL, "--task", "words.py", "--model", "model"])
    policy = SimpleNamespace(model=torch.nn.Linear(2, 2), mask_id=1, shift=0)
    data, test = tasks.load("words", "train", seed=0), tasks.load("words", "test")
    one, same = (lab_run.identity(cfg, policy, data, test) for _ in range(2))
    other = lab_run.identity(replace(cfg, seed=1), policy, test, test)
    assert one == same and {k for k in one if one[k] != other[k]} == {"the training problems"}
    with pytest.raises(TaskError, match="two processes have the training problems"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lab_run, "gather", lambda what: [what, other])
            lab_run.must_agree(one)
