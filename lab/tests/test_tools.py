"""Evaluate, watch, plan and make_tiny: every number again, and nothing lost when killed."""
import gc
import json
import random
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import PROBLEMS, ROOT, captured, main, policy_of
from conftest import shelf as folders

import agrpo
import bench
import evaluate
import make_tiny
import models
import plan
import run
import tasks
import watch

FLAGS = "--device cpu --eval_n 6 --rollout_batch 3 --steps 6,3 --C 12 --m 3".split()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A model that nobody trained but that likes the tags, and an adapter that is not 0."""
    adapter, policy = str(tmp_path_factory.mktemp("adapter")), policy_of(folders["base"])
    policy.model.save_pretrained(adapter)
    return SimpleNamespace(model=folders["base"], adapter=adapter)


def started(program, *argv):
    """What a lab program printed and returned."""
    def program_itself():
        found = program.parse([str(word) for word in argv])
        return program.main(*found if isinstance(found, tuple) else (found,))
    return captured(lambda: run.in_one_sentence(program_itself))


# --- as many rows as fit ----------------------------------------------------------------------

@pytest.mark.parametrize("name", ["", "FrozenContext"])
def test_batches_are_halved_until_a_step_and_a_pass_have_memory(name, monkeypatch):
    """Rows of the greatest length, no two alike: a policy reads equal ones once."""
    flags = ["--policy", f"{ROOT}/lab/policies.py:{name}"] * bool(name)
    flags += ("--rollout_batch 0 --micro_batch 0 --questions 6 --G 4 --C 8 --m 4 --k 2.5 "
              "--block_length 4 --top_k 5 --max_prompt 30 --steps 4").split()
    policy = policy_of(folders["llada"], *flags)
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    cfg = run.parse(["--model", folders["llada"], "--device", "cpu", *flags])
    # From here on it is a GPU, with memory for 13 rows of a rollout and 3 of the loss.
    monkeypatch.setattr(models, "FIXED", {})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 640))
    monkeypatch.setattr(agrpo, "gather", None)                  # no process waits for another
    tried = {True: [], False: []}

    def full(model, args, kwargs):
        ids, learns = kwargs["input_ids"], torch.is_grad_enabled()
        tried[learns].append(len(ids))
        assert ids.shape[1] == 30 + 8
        if len(ids) > (3 if learns else 13):
            raise torch.OutOfMemoryError("CUDA out of memory")
    if not name:
        policy.model.register_forward_pre_hook(full, with_kwargs=True)
    else:
        read = policy.read
        policy.read = lambda ids, *a: (ids.shape[1] < 30 or full(0, 0, dict(input_ids=ids)),
                                       read(ids, *a))[1]
    notes = models.fit_batches(policy, cfg, torch.arange(20, 60))
    assert notes == ["as many as fit: --rollout_batch 12, --micro_batch 3"]
    assert (cfg.rollout_batch, cfg.micro_batch) == (12, 3)
    # An update has 24 rows and 60 pairs. Steps of rollouts and evaluations are tried, then
    # a step and its loss.
    assert tried == {False: [24, 12, 12, 60, 30, 15, 7, 3], True: [7, 3]}
    assert all(p.grad is None and torch.equal(p, before[name])
               for name, p in policy.model.named_parameters())
    assert models.as_many_as_fit(1, lambda n: pytest.fail("there is no less than one")) == 1

    def fail(n, error="CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"):
        raise RuntimeError(error)
    assert models.as_many_as_fit(9, fail) == 1
    with pytest.raises(RuntimeError, match="a shape"):
        models.as_many_as_fit(9, lambda n: fail(n, "a shape is wrong"))


def test_batches_are_free_when_a_run_goes_on(shelf, tmp_path):
    argv = (f"--model {shelf.model} --device cpu --C 12 --m 2 --questions 2 --eval_n 4 "
            f"--lora_r 4 --updates 1 --steps 2 --out {tmp_path} --micro_batch").split()
    open_ones = main([*argv, "0", "--rollout_batch", "0"])
    assert open_ones.code == 0, open_ones.err
    assert "as many as fit: --rollout_batch 256, --micro_batch 320\n" in open_ones.out
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["micro_batch"], config["rollout_batch"]) == (320, 256)
    again = main([*argv, "3"])
    assert again.code == 0 and "going on after update 1" in again.out


# --- evaluate ---------------------------------------------------------------------------------

def evaluated(shelf, out, *flags):
    result = started(evaluate, *FLAGS, "--model", shelf.model, "--out", out, *flags)
    if result.code == 0:
        lines = (out / "generations.jsonl").read_text().splitlines()
        result.answers = {evaluate.place(r): r for r in map(json.loads, lines)}
        assert len(result.answers) == len(lines)                # none written twice
        result.table = json.loads((out / "eval.json").read_text())
    return result


@pytest.fixture(scope="module")
def whole(shelf, tmp_path_factory):
    return evaluated(shelf, tmp_path_factory.mktemp("whole"), "--adapter", shelf.adapter)


def cell(result, who, row):
    """The answers that a row of the table is made of."""
    return [r for r in result.answers.values()
            if (r["who"], r["m"], r["greedy"]) == (who, row["m"], row["greedy"])]


def test_every_number_of_the_table_follows_from_the_answers(whole, shelf):
    assert whole.code == 0, whole.err
    for who, row in [(who, row) for who in ("base", "trained") for row in whole.table[who]]:
        records = cell(whole, who, row)
        assert row["n"] == len(records) == 6
        assert row["accuracy"] == sum(r["correct"] for r in records) / 6
        assert row["tagged"] == pytest.approx(sum(r["metrics"]["tagged"] for r in records) / 6)
        assert row["reward"] == pytest.approx(sum(r["reward"] for r in records) / 6)
    assert [(row["m"], row["greedy"]) for row in whole.table["base"]] == [
        (6, True), (3, True), (6, False), (3, False)]
    for part in ("tagged", "base ", "trained", f"beside it --adapter {shelf.adapter}",
                 "n = 6 problems", "48 answers were written, 0 were there"):
        assert part in whole.out
    base, trained = ([r["text"] for r in whole.answers.values() if r["who"] == who]
                     for who in ("base", "trained"))
    assert base != trained
    # And agrpo's own evaluation agrees.
    cfg = run.parse([*FLAGS, "--model", shelf.model, "--adapter", shelf.adapter])
    data = tasks.load("countdown", "test", **cfg.options)
    policy = models.load_policy(cfg, data)
    for how in cfg.cells():
        row = next(row for row in whole.table["trained"]
                   if (row["greedy"], row["m"]) == (how.temperature == 0, how.m))
        grades = agrpo.evaluate(policy, data, cfg, how, 6)
        assert row["reward"] == pytest.approx(sum(g.reward for g in grades) / 6)


@pytest.mark.parametrize("batches", [1, 9])
def test_a_killed_evaluation_goes_on_and_repeats_nothing(batches, shelf, whole, tmp_path):
    write_answers, rows = agrpo.write_answers, []

    def counted(policy, examples, *args):
        if len(rows) == batches:
            raise KeyboardInterrupt
        rows.append(len(examples))
        return write_answers(policy, examples, *args)

    flags = ("--adapter", shelf.adapter)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agrpo, "write_answers", counted)
        assert evaluated(shelf, tmp_path, *flags).code == 130
        with open(tmp_path / "generations.jsonl", "a") as f:
            f.write('{"who": "base", "seed": 0, "ind')          # killed in the middle of a line
        batches = -1
        again = evaluated(shelf, tmp_path, *flags)
    assert sum(rows) == 8 * 6 and "0 answers were written" not in again.out
    assert again.answers == whole.answers and again.table["trained"] == whole.table["trained"]


def test_more_problems_and_seeds_may_be_asked_for_and_other_flags_may_not(shelf, tmp_path):
    first = evaluated(shelf, tmp_path, "--eval_n", "3")
    more = evaluated(shelf, tmp_path, "--seeds", "3")
    head, = (line for line in more.out.splitlines() if line.startswith(" steps sampling"))
    assert " model " in head and "base" not in head and "12 were there" in more.out
    assert first.code == more.code == 0 and first.answers.items() <= more.answers.items()
    for row in more.table["base"]:
        records = cell(more, "base", row)
        assert len(records) == (6 if row["greedy"] else 18) and row["n"] == 6
        assert row["reward"] == pytest.approx(sum(r["reward"] for r in records) / len(records))
    seeds = [[r["text"] for r in more.answers.values() if r["seed"] == s and not r["greedy"]]
             for s in range(3)]
    assert seeds[0] != seeds[1] != seeds[2]
    for flags, says in ((("--temperature", "0.5"), "--temperature 1.0, not 0.5"),
                        (("--adapter", shelf.adapter), "with --adapter")):
        other = evaluated(shelf, tmp_path, *flags)
        assert other.code == 2 and says in other.err
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(dict(config, weights="another")))
    assert "with other weights" in evaluated(shelf, tmp_path, "--seeds", "3").err


def test_the_interval_is_over_problems_and_the_spread_over_seeds():
    def records(*right):
        return [dict(correct=bool(x), reward=float(x), metrics={"cells": x / 2}) for x in right]
    how = agrpo.Decoding(C=4, m=2, block_length=4)
    row = evaluate.summarise([records(1, 0, 0, 1), records(1, 0, 0, 0)], how)
    assert row["accuracy"] == 0.375 and row["n"] == 4 and row["cells"] == 0.1875
    assert row["sd over seeds"] == pytest.approx(0.25 / 2 ** 0.5)
    assert (row["low"], row["high"]) == pytest.approx((0.0919, 0.7806), abs=1e-3)    # Wilson


@pytest.mark.parametrize("flags, says", [
    (("--seeds", "0"), "--seeds 0"), (("--steps", "5"), "--steps 5"),
    (("--nothing", "1"), "--nothing"), (("--adapter", "/nowhere"), "--adapter /nowhere")])
def test_bad_flags_get_one_sentence(flags, says, shelf, tmp_path):
    result = evaluated(shelf, tmp_path / "out", *flags)
    assert result.code == 2 and says in result.err and result.err.count("\n") <= 2


# --- watch ------------------------------------------------------------------------------------

def test_watch_shows_each_token_once_as_new_in_the_step_that_drew_it(shelf, monkeypatch):
    monkeypatch.setattr(watch, "NEW", "{")
    monkeypatch.setattr(watch, "PLAIN", "}")
    shown = started(watch, *f"--model {shelf.model} --device cpu --m 4 --problem 2".split())
    assert shown.code == 0, shown.err
    states = [line[15:] for line in shown.out.splitlines() if line.startswith("x_")]
    assert [state.count("_") for state in states] == [12, 9, 6, 3, 0]
    assert [state.count("{") for state in states] == [0, 3, 3, 3, 3]
    assert "checker" in shown.out
    refused = started(watch, "--model", shelf.model, "--problem", "100000")
    assert refused.code == 2 and "--problem 100000" in refused.err


def test_a_token_cannot_write_to_the_terminal(shelf):
    cfg = run.parse(["--model", shelf.model, "--device", "cpu"])
    data = tasks.load("countdown", "test", **cfg.options)
    policy = models.load_policy(cfg, data)
    decode = policy.tokenizer.batch_decode
    policy.tokenizer.batch_decode = lambda *a, **k: [t + "\033[2J\n" for t in decode(*a, **k)]
    said = captured(lambda: watch.show(policy, data, 0, replace(cfg, m=2))).out
    assert "\\x1b[2J" in said and "\033" not in said


def test_the_gif_has_a_frame_for_every_state_of_24_problems_and_one_of_verdicts(
        shelf, tmp_path, monkeypatch):
    from PIL import Image

    # Random weights solve nothing: here an answer is right if its length is even.
    even = lambda text: tasks.Grade(0.0, len(text) % 2 == 0, 0.0, "", "", {})
    monkeypatch.setattr(tasks, "grade_batch", lambda name, texts, more: [*map(even, texts)])
    path, shown, draw = tmp_path / "new" / "watch.gif", [], watch.draw_answer
    monkeypatch.setattr(watch, "draw_answer", lambda *a: (shown.append(a[3:]), draw(*a)))
    flags = ("--model", shelf.model, "--device", "cpu", "--m", "2")
    drawn = started(watch, *flags, "--adapter", shelf.adapter, "--gif", path, "--problem", "3")
    assert drawn.code == 0, drawn.err
    with Image.open(path) as image:
        assert image.n_frames == 3 + 1 and 700 < image.width < 1100
        assert path.stat().st_size < 4e5
        # x_0 has grey boxes only, the finished text has none.
        grey = []
        for i in (0, 2):
            image.seek(i)
            grey.append(sum(n for n, c in image.convert("RGB").getcolors(1 << 20)
                            if max(abs(x - y) for x, y in zip(c, (208, 215, 222))) < 8))
        assert grey[0] > 50_000 > 500 > grey[1]
    # Base, then trained: the very answers that an evaluation gives these problems.
    assert len(shown) == 4 * 48
    cfg = run.parse([*flags, "--adapter", shelf.adapter])
    data = tasks.load("countdown", "test", **cfg.options)
    policy, examples = models.load_policy(cfg, data), [data[i] for i in range(3, 27)]
    keys = [(cfg.seed, "evaluation", 2, i) for i in range(3, 27)]
    with policy.reference():
        _, base, _ = agrpo.write_answers(policy, examples, keys, cfg, cfg.how)
    _, trained, _ = agrpo.write_answers(policy, examples, keys, cfg, cfg.how)
    assert [it.text for it, _ in shown[-48:]] == base + trained and base != trained
    kinds = [kinds[0] for _, kinds in shown[-48:]]
    assert kinds == ["right" if len(text) % 2 == 0 else "wrong" for text in base + trained]
    for who, side in (("base", kinds[:24]), ("trained", kinds[24:])):
        assert f"{who}: {side.count('right')} of 24 right" in drawn.out
    # An answer too long for a line: boxes, 64 a line.
    long = watch.boxes(shown[0][0]._replace(words=["a word"] * 130))
    assert {box[4] for box in long} == {""} and max(box[1] for box in long) == 2 * 9
    for more, says in ((("--gif",), "no adapter in"), (("--gif", "--lora_r", "0"), "--lora_r"),
                       (("--adapter", shelf.adapter, "--gif", "a.png"), "a.png")):
        refused = started(watch, *flags, "--out", tmp_path / "none", *more)
        assert refused.code == 2 and says in refused.err


# --- plan -------------------------------------------------------------------------------------

SIZE = dict(vocab_size=600, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
            pad_token_id=0, eos_token_id=2, bos_token_id=4)
# Blocks of those that we train, small and random: of LLaDA's, Dream's and LLaDA-MoE's kind too.
KINDS = {
    "ModernBert": dict(intermediate_size=384, global_attn_every_n_layers=1, cls_token_id=4,
                       sep_token_id=4, reference_compile=False),
    "Llama": dict(intermediate_size=384),
    "Qwen2": dict(intermediate_size=384, num_key_value_heads=2),
    "Qwen3": dict(intermediate_size=384, num_key_value_heads=2, head_dim=64,
                  tie_word_embeddings=True),
    "Olmoe": dict(intermediate_size=64, num_experts=8, num_experts_per_tok=2)}


def peak_of(program):
    """Bytes at the peak of what the allocator gave while the program ran."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()                       # what earlier tests left must not be freed in between
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as log:
        program()
    found = [(e.start_ns(), e.nbytes()) for e in log.profiler.kineto_results.events()
             if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(found):
        now += change
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("kind, flags", [
    ("ModernBert", ""), ("ModernBert", "--recompute"), ("Llama", "--dtype bfloat16"),
    ("Llama", "--dtype bfloat16 --recompute"), ("Qwen2", "--dtype bfloat16"), ("Qwen3", ""),
    ("Qwen3", "--dtype bfloat16"), ("Olmoe", "--dtype bfloat16"), ("Olmoe", "--recompute")])
def test_the_plan_s_memory_is_within_15_percent_of_what_a_pass_takes(kind, flags):
    cfg = run.parse(("--device cpu --lora_r 4 --C 48 --m 8 --k 1 --block_length 48 "
                     f"--micro_batch 8 --rollout_batch 8 {flags}").split())
    torch.manual_seed(0)
    task = "ForMaskedLM" if kind == "ModernBert" else "ForCausalLM"
    config = getattr(transformers, f"{kind}Config")(**SIZE, **KINDS[kind])
    model = getattr(transformers, kind + task)(config).to(getattr(torch, cfg.dtype)).train()
    model.config.use_cache = False
    policy = agrpo.Policy(model, make_tiny.make_tokenizer(), 1, "cpu")
    models.add_adapters(policy, cfg)
    config = json.loads(model.config.to_json_string())
    if kind == "Olmoe":                                         # as LLaDA-MoE's calls it
        config["expert_intermediate_size"] = config.pop("intermediate_size")
    shape = plan.shape_of(config)
    sizes = [(p.numel(), p.requires_grad) for p in policy.model.parameters()]
    lora, total = sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)
    copied = shape.V * shape.d * (cfg.dtype != "float32" and shape.tied)     # the float32 head
    assert plan.lora_size(cfg, shape) == lora
    assert shape.parameters == pytest.approx(total - lora - copied, rel=0.01)

    q = torch.randint(5, 100, (8, 80))
    traj = agrpo.rollout(policy, q, torch.ones_like(q), cfg.how)
    pairs = (torch.arange(8), torch.arange(8), torch.ones(8).double())
    wrote = peak_of(lambda: agrpo.rollout(policy, q, torch.ones_like(q), cfg.how))
    learnt = peak_of(lambda: agrpo.add_gradient(policy, traj, torch.ones(8).double(), pairs))
    planned = plan.phases(cfg, shape, 80)
    assert planned["write"] == pytest.approx(wrote, rel=0.15)
    assert planned["learn"] + 4 * lora == pytest.approx(learnt, rel=0.15)       # and gradients


@pytest.mark.parametrize("config, published", [
    (plan.LLADA, 8.016e9), (plan.DREAM, 7.616e9), (plan.LLADA_MOE, 7.36e9),
    (plan.QWEN3, 0.596e9)])
def test_known_models_have_the_size_that_is_published(config, published):
    shape = plan.shape_of(config)
    assert shape.parameters == pytest.approx(published, rel=0.002)
    if config is plan.LLADA_MOE:       # of a mixture a token meets its own experts only
        assert shape.active + shape.V * shape.d == pytest.approx(1.4e9, rel=0.02)       # "A1B"
        assert len(shape.adapted) == 4
        shared = plan.shape_of({**config, "num_shared_experts": 2})      # as LLaDA2 has one
        assert shared.adapted[4:] == [(2048, 2048), (2048, 2048), (2048, 2048)]
        assert shared.active - shape.active == 16 * 3 * 2048 * 2048


def test_the_work_of_a_rollout_and_of_recomputing_by_hand():
    shape = plan.Shape(layers=2, d=8, q=8, V=100, tied=False, adapted=[(8, 8)], blocks=1000,
                       active=1000, kept=0, kept32=0, alive=0)
    cfg = run.parse("--questions 2 --G 2 --C 12 --m 4 --k 2 --lora_r 1 --device cpu".split())
    lora, L = 2 * (8 + 8), 5 + 12
    token = 2 * (1000 + lora) + 4 * L * 8 * 2
    write, learn = plan.work(cfg, shape, 5)
    assert write == 4 * (4 * L * (token - 2 * lora) + 12 * 2 * 100 * 8)      # W + s B A
    half, _ = plan.work(replace(cfg, dtype="bfloat16"), shape, 5)
    assert half == 4 * (4 * L * token + 12 * 2 * 100 * 8)
    large, _ = plan.work(cfg, shape._replace(adapted=[(512, 512)]), 5)         # no such sum
    assert large == half + 4 * 4 * L * 2 * 2 * (2 * 512 - 2 * 8)
    assert learn == 4 * 2 * (L * token + 3 * 2 * 100 * 8) * 2
    assert plan.work(replace(cfg, recompute=True), shape, 5) == (write, 1.5 * learn)
    assert plan.work(replace(cfg, mu=2), shape, 5) == (write, 2 * learn)
    # Ordered by what the head says of all that are masked: 12, 9, 6, 3 of them.
    more, _ = plan.work(replace(cfg, unmasking="max_prob"), shape, 5)
    assert more - write == 4 * (30 - 12) * 2 * 100 * 8
    # All weights: their gradient is a third product.
    _, learn = plan.work(replace(cfg, lora_r=0), shape, 5)
    assert learn == 4 * 2 * (L * (token - 2 * lora) + 3 * 2 * 100 * 8) * 3


def test_the_bytes_of_weights_and_logits_by_hand():
    shape = plan.Shape(layers=2, d=8, q=8, V=100, tied=False, adapted=[(8, 8)], blocks=1000,
                       active=1000, kept=0, kept32=0, alive=0)
    cfg = run.parse(("--C 12 --m 4 --k 2 --lora_r 1 --micro_batch 3 --rollout_batch 7 "
                     "--eval_C 24 --eval_block 6 --steps 8 --dtype bfloat16 "
                     "--device cpu").split())
    lora, head = 2 * (8 + 8), 100 * 8
    assert plan.weight_bytes(cfg, shape) == (2 * (1000 + 8 + head), 4 * head, 16 * lora)
    exact = replace(cfg, dtype="float32")
    assert plan.weight_bytes(exact, shape) == (4 * shape.parameters, 0, 16 * lora)
    assert plan.weight_bytes(replace(exact, lora_r=0), shape) == (0, 0, 16 * shape.parameters)
    # On the CPU five copies of 100 logits in float32, of a step's 3 tokens or a block's 6.
    assert plan.phases(cfg, shape, 5) == dict(
        learn=3 * 3 * 5 * 400, write=7 * 3 * 5 * 400, evaluate=7 * 6 * 5 * 400)
    # Batches that are 0: a row of learning takes 6,000 bytes, one of an evaluation 12,000. So
    # 16 pairs and 8 rows would fit; an update's 80 and 40 are halved until they do.
    free = replace(cfg, questions=2, G=20, micro_batch=0, rollout_batch=0)
    fits = plan.with_batches(free, shape, 5, 1e5)
    assert (fits.micro_batch, fits.rollout_batch) == (10, 5)
    one = plan.with_batches(replace(free, rollout_batch=7), shape, 5, -1e5)
    assert (one.micro_batch, one.rollout_batch) == (1, 7)


def test_a_plan_needs_no_more_than_a_config(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "speed", lambda cfg, shape: 1e12)
    big = started(plan, "--preset", "llada", "--task", "gsm8k", "--device", "cpu")
    assert big.code == 0, big.err
    for part in ("4 rows of 512 + 384", " 8 rows at a time", "a GPU of 24.0 GB",
                 "8,015.6 M parameters: 15.0 GB in bfloat16", "in float32 2.1 GB",
                 "167.8 M on 224 layers", "activations recomputed",
                 "on an H200  13.4 minutes an update",
                 "2.0 GB for a checkpoint, 16.0 GB for the model"):
        assert part in big.out
    (tmp_path / "config.json").write_text((Path(shelf.model) / "config.json").read_text())
    bare = started(plan, "--model", tmp_path, "--device", "cpu")
    assert bare.code == 0 and "0.5 M parameters" in bare.out and "a token" in bare.out
    for text, says in (("{}", "lacks dimensions"), ("{", "JSON")):
        (tmp_path / "config.json").write_text(text)
        assert says in started(plan, "--model", tmp_path, "--device", "cpu").err
    assert "a folder with its config.json" in started(plan, "--model", "nobody/nothing").err


def test_the_speed_of_a_cpu_is_that_of_few_small_products_in_float32(monkeypatch):
    """Some processors have no bfloat16: a large product in it takes minutes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        seen = []

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.aten.mm.default:
                self.seen.append((args[0].dtype, args[0].shape[0] * args[1].numel()))
            return op(*args, **(kwargs or {}))

    # A clock on which every product takes three seconds.
    monkeypatch.setattr(plan.time, "perf_counter", lambda: 3.0 * len(Products.seen))
    cfg = run.parse("--preset llada --task gsm8k --device cpu".split())
    with Products():
        speed = plan.speed(cfg, plan.shape_of(plan.LLADA))
    (dtype, size), = Products.seen                              # half a second is over: one
    assert dtype == torch.float32 and size <= 2 ** 30 and speed == 2 * size / 3


# --- bench ------------------------------------------------------------------------------------

def test_all_policies_are_timed_on_the_same_weights_and_compared_with_the_first(capsys):
    cfg = run.parse("--device cpu --lora_r 4".split())
    made = bench.policies(SimpleNamespace(model="", shape="tiny", policies=""), cfg)
    for policy in made.values():
        assert policy.eos_id == -1 and policy.fill_ids == {-1}              # nothing ends early
    heads = [policy.model.get_output_embeddings().weight for policy in made.values()]
    assert list(made) == ["official way", "Policy"] and heads[0] is heads[1]
    # Seconds of rollout and loss, max |rho - 1|, GiB; the median of three rounds counts.
    rounds = [(4.0, 2.0, 0, 0), (9.0, 2.0, 0, 0), (1.0, 2.0, 0, 0)]
    bench.print_updates({"official way": rounds, "Policy": [(1.0, 2.0, 1e-7, 0)]})
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[-5:] == ["4.00", "1.00", "2.00", "1e-07", "0.0"]            # 6 s against 3 s


def test_an_update_of_each_policy_is_timed_as_typed(capsys):
    argv = ("--shape tiny --device cpu --dtype float32 --B 2 --P 5 --C 4 --m 4 --rounds 1 "
            "--block_length 4").split()
    bench.main(["update", *argv, "--k", "2", "--micro_batch", "0"])
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[-5:]]
    assert names == ["official", "Policy", "BlockCausal", "FrozenBlockCausal", "FrozenContext"]
    with pytest.raises(tasks.TaskError, match="--k 1.5"):
        bench.main(["update", *argv, "--k", "1.5"])


# --- make_tiny, and all of them ---------------------------------------------------------------

def test_make_tiny_starts_and_leaves_the_shipped_model_alone(tmp_path, monkeypatch):
    shipped = {p: p.stat().st_mtime_ns for p in (ROOT / "lab" / "tiny").iterdir()}
    monkeypatch.setattr(make_tiny, "MANY", 200)
    out = str(tmp_path / "tiny")
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", "--steps", "2", "--out", out])
    make_tiny.main()
    assert shipped == {p: p.stat().st_mtime_ns for p in (ROOT / "lab" / "tiny").iterdir()}
    cfg = run.parse(["--model", out, "--device", "cpu"])
    assert models.load_policy(cfg, PROBLEMS).mask_id == 1
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert [config[name] for name in make_tiny.DROPOUT] == [0.0] * 3    # only in pretraining


@pytest.mark.parametrize("task, options", [
    ("countdown", make_tiny.COUNTDOWN), ("sudoku", make_tiny.SUDOKU)])
def test_what_the_tiny_model_was_taught_is_right(task, options, monkeypatch):
    monkeypatch.setattr(make_tiny, "MANY", 200)
    rng = random.Random(0)
    examples = make_tiny.examples_of(task, 0, options, rng)
    for _ in range(50):
        example = next(examples)
        assert tasks.grade(task, make_tiny.answer(task, example, rng), example).correct
    # No negative value between: ( 1 - 2 ) + 9 is none of the answers.
    assert make_tiny.answers((1, 2, 9), 8) == [
        "( 1 + 9 ) - 2", "( 9 + 1 ) - 2", "( 9 - 2 ) + 1"]


@pytest.mark.parametrize("name", ["evaluate", "watch", "plan", "make_tiny"])
def test_help_has_an_example(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "lab" / f"{name}.py"), run_name="__main__")
    assert not stopped.value.code and "bash run.sh" in capsys.readouterr().out
