"""Does it work as claimed? One command per question, on the tiny model; each prints its table.

    bash run.sh lab NAME [flags]     every flag of agrpo.py passes through, as --m 6
    --quick     a minute or less, to see that it works
    --seeds N   how many, counted from --seed [3]        --jobs N   processes of one thread each
    --show      print what is finished so far, compute nothing new
    --figures   put picture and printout into lab/figures too
    --over k=1,2,6      what `sweep` varies: any flag, as unmasking=random,max_prob

An experiment is cut into pieces. Each finished piece is a line of runs/lab/NAME.jsonl, so the
same command goes on where it was stopped; delete the file to start again. runs/lab/NAME.txt is
the printout with command, machine and versions, NAME.png the picture.

Every training here is agrpo.train itself, with one of lab/estimators.py as its gradient; what
only measures gradients is a "gradient" that adds none, so that nothing moves. Compute counts in
forward passes of one row: a denoising step of a rollout is 1, a state of the loss 3, because a
backward pass costs about two forwards.
"""
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import platform
import re
import sys
import textwrap
import time
from dataclasses import asdict, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from statistics import mean

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]
import agrpo
import bench
import estimators
import figures
import models
import run
import tasks
from estimators import ESTIMATORS, NOTHING, SAMPLERS
from tasks import TaskError

EXPERIMENTS = {}                       # name -> (function, time, its flags, those of --quick)
HARD = dict(sudoku=dict(unmasking="random"))         # by max_prob most groups are right: dead


def experiment(time, flags="", quick=""):
    """Register a function under its name."""
    def register(function):
        EXPERIMENTS[function.__name__] = (function, time, flags.split(), quick.split())
        return function
    return register


class Lab:
    """One run of one experiment: flags, pieces, tables, files."""

    def __init__(self, name, argv):
        self.name, self.argv, self.began, self.lines = name, argv, time.time(), []
        function, minutes, flags, quick = EXPERIMENTS[name]
        parser = run.Parser(
            prog=f"bash run.sh lab {name}", description=function.__doc__,
            epilog=f"On 2 idle CPU cores: {minutes}. Further flags are agrpo.py's; here "
                   + " ".join(flags))
        for flag, about in (("quick", "a minute or less"), ("show", "what is finished so far"),
                            ("figures", "keep it in lab/figures too")):
            parser.add_argument(f"--{flag}", action="store_true", help=about)
        parser.add_argument("--seeds", type=int, help="how many, counted from --seed [3]")
        parser.add_argument("--jobs", type=int, help="processes of one thread each [cores]")
        parser.add_argument("--over", default="k=1,2,6", help="what sweep varies [k=1,2,6]")
        mine, rest = parser.parse_known_args(argv)
        self.quick, self.show, self.over = mine.quick, mine.show, mine.over
        # The tiny model on the CPU whatever the machine, so that numbers can be compared.
        self.flags = ["--out", "runs/lab", "--device", "cpu", "--model", "lab/tiny", *flags]
        self.flags += (quick if mine.quick else []) + rest
        cfg = self.config()
        self.folders = [Path(cfg.out)] + [ROOT / "lab" / "figures"] * mine.figures
        self.file = Path(cfg.out) / f"{name}.jsonl"
        self.jobs = mine.jobs or (1 if mine.quick else os.cpu_count())
        self.seeds = [cfg.seed + i for i in range(mine.seeds or (2 if mine.quick else 3))]

    def config(self, **swept):
        """agrpo's Config from the flags and from what this experiment varies."""
        return run.parse(self.flags + [f"--{name}={value}" for name, value in swept.items()])

    def tasks(self):
        """The task that was asked for, or Countdown and Sudoku."""
        asked = any(flag.startswith("--task") for flag in self.flags)
        return [self.config().task] if asked else ["countdown", "sudoku"]

    def pieces(self, function, calls):
        """[function(*call) for call in calls], from NAME.jsonl where that has them; with --show
        None where it has not."""
        done = {line["key"]: line["result"] for line in read_lines(self.file)}
        keys = [key_of(function, call) for call in calls]
        missing = [(function, *at) for at in zip(calls, keys) if at[1] not in done]
        for n, line in enumerate(() if self.show else self.compute(missing), 1):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # It begins a line of its own, also after one that a kill cut short.
            with open(self.file, "ab") as f:
                f.write(b"\n" + run.to_json(line))
            # Through JSON, so that a result just found is what a later run will read.
            done[line["key"]] = json.loads(run.to_json(line["result"]))
            print(f"    piece {n} of {len(missing)}: {line['what']}, {line['seconds']:.0f} s",
                  file=sys.stderr, flush=True)
        return [done.get(key) for key in keys]

    def compute(self, missing):
        """Yields lines as they are finished, by processes of one thread each: for a model so
        small, these are quicker than threads."""
        if self.jobs == 1 or not missing:
            yield from map(piece, missing)
            return
        spawn = multiprocessing.get_context("spawn")
        with spawn.Pool(min(self.jobs, len(missing)), torch.set_num_threads, (1,)) as pool:
            yield from pool.imap_unordered(piece, missing)

    def over_seeds(self, function, variants):
        """{name: (flags, *more)} -> {name: [function(config of flags and seed, *more)]}"""
        # Seed by seed, so that half of it compares all variants too.
        calls = [(self.config(seed=seed, **flags), *more)
                 for seed in self.seeds for flags, *more in variants.values()]
        found = self.pieces(function, calls)
        return {name: found[i::len(variants)] for i, name in enumerate(variants)}

    def say(self, *lines):
        print(*lines, sep="\n", flush=True)
        self.lines += lines

    def note(self, text):
        self.say("", *textwrap.wrap(text, 118, break_on_hyphens=False))

    def table(self, *rows):
        """The first row is the head. Columns as wide as their widest cell, the first one
        left-aligned."""
        wide = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
        for first, *others in rows:
            cells = [str(cell).rjust(w) for cell, w in zip(others, wide[1:])]
            self.say("  ".join([str(first).ljust(wide[0]), *cells]))

    def finish(self, pictures):
        """Write the printout, and the pictures {file name: (draw, height in inches)}."""
        pieces = sum(line["seconds"] for line in read_lines(self.file))
        seconds, info = max(pieces, time.time() - self.began), Path("/proc/cpuinfo")
        cpu = re.search("model name.*: (.+)", info.read_text() if info.exists() else "")
        flags = [flag for flag in self.argv if flag != "--show"]
        head = [" ".join(["$ bash run.sh lab", self.name, *flags]),
                f"{seconds:.0f} s of computing; {cpu[1] if cpu else platform.machine()}, "
                f"{os.cpu_count()} cores; seeds {self.seeds}",
                ", ".join(f"{name} {version}" for name, version in run.versions().items())]
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
            text = "\n".join([*head, *self.lines, ""])
            run.write(folder / f"{self.name}.txt", text.encode())
            for name, (draw, height) in pictures.items():
                figures.save(folder / f"{name}.png", draw, height)
        print(f"\nwritten to {' and '.join(map(str, self.folders))}: {self.name}.txt and "
              "pictures")


def piece(call):
    """Compute one piece: its line of NAME.jsonl."""
    function, arguments, key = call
    cfg, *more = arguments
    words = [function.__name__, cfg.task, f"m={cfg.m} k={cfg.k} lr={cfg.lr} seed={cfg.seed}"]
    words += [str(x) for x in more if isinstance(x, (str, int))]
    began = time.time()
    with contextlib.redirect_stdout(io.StringIO()):             # agrpo.train prints a line
        result = function(*arguments)
    return dict(key=key, what=" ".join(words), seconds=time.time() - began, result=result)


def key_of(function, call):
    """Names a piece: what is computed, with which flags other than the default. Not where it is
    written, and nothing of when it is saved."""
    plain = asdict(run.Run())
    beside = {"out", "steps", "preset", "eval_every", "save_every"}
    told = [{name: value for name, value in asdict(x).items() if value != plain[name]
             and name not in beside} if isinstance(x, run.Run) else x for x in call]
    return blake2b(repr([function.__name__, *told]).encode(), digest_size=8).hexdigest()


def read_lines(path):
    """The JSON lines of a file; one may be cut, by a kill."""
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def spread(values, form=".1%"):
    """mean [lowest, highest]; what is not there yet is said."""
    there = [v for v in values if v is not None]
    if not there:
        return "not run"
    few = f" ({len(there)} of {len(values)})" if len(there) < len(values) else ""
    return f"{np.mean(there):{form}} [{min(there):{form}}, {max(there):{form}}]{few}"


# --- The training that all experiments share --------------------------------------------------

HELD_OUT = {}                          # problems once made, of a process


def load(cfg):
    """policy, training data, held-out data, trained parameters, their optimizer"""
    asked = cfg.task, cfg.test_file, repr(cfg.options)
    test = HELD_OUT[asked] = HELD_OUT.get(asked) or run.load_test(cfg)
    data, policy = run.load_training(cfg, test), models.load_policy(cfg, test)
    params = [p for p in policy.model.parameters() if p.requires_grad]
    return policy, data, test, params, run.make_optimizer(cfg, params)


def gradient_of(name, policy, data, cfg):
    """The estimator of that name; "last step" grades answers of its own."""
    if name != "last step":
        return ESTIMATORS[name]
    updates, now = itertools.count(), [None, None]              # a batch and what it asks

    def rewards(traj, o):
        if traj is not now[0]:
            places = agrpo.questions(len(data), cfg.questions, next(updates), cfg.seed)
            now[:] = traj, [data[i] for i in places]
        copies = len(o) // cfg.questions
        asked = [example for example in now[1] for _ in range(copies)]
        grades = tasks.grade_batch(cfg.task, policy.decode(o), asked)
        return torch.tensor([g.reward for g in grades], dtype=torch.float64)
    return partial(estimators.last_step, rewards=rewards)


def take_gradient(params):
    """Their .grad as one float64 vector; none is left."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    for p in params:
        p.grad = None
    return torch.cat([g.flatten() for g in grads]).double()


def rollout_passes(name, cfg):
    """Of an update. To draw a last step again costs one here, and none in a rollout."""
    return cfg.questions * cfg.G * (cfg.m + (name == "last step"))


def accuracy(policy, test, cfg, how):
    return mean(g.correct for g in agrpo.evaluate(policy, test, cfg, how, cfg.eval_n))


def learn(cfg, estimator, how=None):
    """One training: held-out accuracy at five points of it, decoded as `how` [the rollouts],
    and greedily at the end."""
    policy, data, test, params, optimizer = load(cfg)
    # Before the first update, then after each quarter of them.
    how, every = how or cfg.how, max(1, cfg.updates // 4)
    evals, passes, seconds = [], 0, [0.0, 0.0]                  # of rollouts, of the loss
    right = []                                                  # shares of the rollouts

    def evaluate(update):
        evals.append(dict(update=update, passes=passes, seconds=sum(seconds), parts=seconds,
                          right=mean(right[-every:] or [0.0]),
                          accuracy=accuracy(policy, test, cfg, how)))

    evaluate(0)
    gradient = gradient_of(estimator, policy, data, cfg)
    for now in agrpo.train(policy, data, cfg, params, optimizer, gradient=gradient):
        right.append(mean(grade.correct for grade in now.grades))
        pairs = sum(len(seen.ratio) for seen in now.seen)
        passes += rollout_passes(estimator, cfg) + 3 * pairs
        seconds = [a + b for a, b in zip(seconds, now.seconds)]
        if now.number % every == 0 or now.number == cfg.updates:
            evaluate(now.number)
    greedy = replace(how, unmasking="max_prob", temperature=0.0)
    return dict(evals=evals, greedy=accuracy(policy, test, cfg, greedy))


def last(trained):
    return trained and trained["evals"][-1]["accuracy"]


def before(runs):
    """Mean accuracy before training: each seed has draws of its own, so a base of its own."""
    return np.mean([one["evals"][0]["accuracy"] for one in runs if one])


LEARNING = ("base", "trained", "then greedily", "updates", "passes", "s/update")


def learning_row(runs):
    there = [one["evals"] for one in runs if one]
    if not there:
        return ["not run"] * len(LEARNING)
    updates, passes, seconds = (np.mean([evals[-1][x] for evals in there])
                                for x in ("update", "passes", "seconds"))
    return (f"{before(runs):.1%}", spread([last(one) for one in runs]),
            spread([one and one["greedy"] for one in runs]), f"{updates:.0f}",
            f"{passes:,.0f}", f"{seconds / updates:.2f}")


def accuracy_lines(panels, x, **more):
    """{title: {name: [evals of a run, for each seed]}} -> accuracy against update or passes"""
    def numbers(runs, key):
        points = min(map(len, runs))                            # one run may be the longer
        return np.array([[e[key] for e in evals[:points]] for evals in runs])
    drawn = {title: {name: (numbers(runs, x).mean(axis=0), numbers(runs, "accuracy"))
                     for name, runs in named.items()} for title, named in panels.items()}
    return figures.lines(drawn, x, "held-out accuracy", **more), 3.0


@experiment("10 minutes a value", "--m 12 --k 2 --updates 60 --questions 10 --eval_n 400",
            "--m 6 --updates 2 --questions 3 --eval_n 20")
def sweep(lab):
    """Learning with each value of a flag, as --over k=1,2,6: what do more timesteps buy?"""
    flag, _, values = lab.over.partition("=")
    # Every value with every seed; AGRPO's own gradient.
    runs = lab.over_seeds(learn, {f"{flag} = {value}": ({flag: value}, "AGRPO")
                                  for value in values.split(",")})
    cfg = lab.config()
    lab.note(f"held-out accuracy, sampled as the rollouts are; {cfg.task}, m = {cfg.m}, "
             f"n = {cfg.eval_n}, {cfg.questions} x {cfg.G} rollouts an update, seeds "
             f"{lab.seeds}: mean [lowest, highest]")
    lab.table(("", *LEARNING), *((name, *learning_row(found)) for name, found in runs.items()))
    evals = {name: [one["evals"] for one in found if one]
             for name, found in runs.items() if any(found)}
    lab.finish(dict(sweep=accuracy_lines({cfg.task: evals}, "passes")) if evals else {})


# --- How noisy is one update, its rollouts' own noise included? -------------------------------

ALL = 100                              # so many timesteps a row that every pair is drawn


def fresh(cfg, cells):
    """{cell: [E |e|^2, variance of e, passes a row]} of estimates e on fresh rollouts of one
    policy, a batch an update; cells (estimator, k)."""
    cfg, batches = replace(cfg, lora_r=0), cfg.updates
    policy, data, _, params, optimizer = load(cfg)
    gradients = [gradient_of(name, policy, data, cfg) for name, _ in cells]
    total, square, passes = [0.0] * len(cells), [0.0] * len(cells), [0.0] * len(cells)

    def measure(policy, traj, A, cfg, rand):
        for i, (gradient, (name, k)) in enumerate(zip(gradients, cells)):
            seen = gradient(policy, traj, A, replace(cfg, k=k), rand)
            e = take_gradient(params)
            total[i], square[i] = total[i] + e, square[i] + (e @ e).item()
            passes[i] += (rollout_passes(name, cfg) + 3 * len(seen.ratio)) / len(A)
        return NOTHING
    list(agrpo.train(policy, data, cfg, params, optimizer, gradient=measure))
    n = batches
    return {f"{name}, k = {k}": [sq / n, (sq - (e @ e).item() / n) / (n - 1), c / n]
            for (name, k), e, sq, c in zip(cells, total, square, passes)}


def over_rollouts(lab, cells, **flags):
    """The table of `fresh`, in units of the first cell's variance."""
    batches = 3 if lab.quick else 24
    cfg = lab.config(**flags)
    found = [x for x in lab.pieces(fresh, [
        (lab.config(**flags, seed=seed, updates=batches), cells) for seed in lab.seeds]) if x]
    lab.note(f"{cfg.task}, m = {cfg.m}, all parameters of the base model: variance over fresh "
             f"rollouts, {len(lab.seeds)} seeds x {batches} batches of {cfg.questions * cfg.G}, "
             "in units of the first: mean [lowest, highest]; passes a row, those of drawing "
             "again among them")
    names = [f"{name}, k = {k}" for name, k in cells]
    lab.table(("", "variance", "passes"), *(
        (name.replace(f", k = {ALL}", ", all steps"),
         spread([x[name][1] / x[names[0]][1] for x in found], ".2f"),
         f"{np.mean([x[name][2] for x in found]):.2f}") for name in names if found))


# --- learn_by_sampler: what does less noise of the timesteps buy? -----------------------------

# (sampler, k) at few steps, as the task's own preset has them, and at many. With every step the
# timesteps bring no noise.
FEW = [("by row", 1), ("AGRPO", 1), ("AGRPO", 0.5), ("every step", 2)]
MANY = [("by row", 4), ("AGRPO", 4), ("by row", 1), ("AGRPO", 1)]


@experiment("3 hours, in pieces", "",
            "--task countdown --updates 2 --questions 3 --eval_n 20")
def learn_by_sampler(lab):
    """Learning with k timesteps of every row, and with as many spread over the batch (AGRPO):
    each task as `bash run.sh` trains it, at two learning rates; then at many steps. And how
    noisy an update is with each."""
    pictures = {}
    for task in lab.tasks():
        over_rollouts(lab, [("every step", ALL), *FEW[:3], ("AGRPO", 0.25)], task=task)
    for many, task in itertools.product((False, True), lab.tasks()):
        flags, cells = dict(task=task), FEW
        if many:                       # by max_prob Sudoku's groups are all right there: dead
            flags.update(HARD.get(task, {}), m=dict(sudoku=10).get(task, 12),
                         updates=min(100, lab.config(task=task).updates))
            cells = MANY
        cfg = lab.config(**flags)
        rates = [cfg.lr, cfg.lr / 2][:1 if lab.quick else 2 - many]
        runs = lab.over_seeds(learn, {
            (name, k, lr): (dict(flags, k=k, lr=lr), name)
            for (name, k), lr in itertools.product(cells, rates)
            if name != "every step" or lr == cfg.lr})
        lab.note(f"{task}, m = {cfg.m}, {cfg.unmasking} order: held-out accuracy sampled as "
                 f"the rollouts are, n = {cfg.eval_n}, {cfg.questions} x {cfg.G} rollouts an "
                 f"update, seeds {lab.seeds}: mean [lowest, highest]; share right of the "
                 "rollouts in the last quarter; seconds of rollouts and of the loss")
        rows, best = [], {}
        for (name, k, lr), found in runs.items():
            there = [one["evals"][-1] for one in found if one]
            parts = np.mean([end["parts"] for end in there], axis=0) if there else ("-", "-")
            each = " ".join("-" if one is None else f"{last(one):.1%}" for one in found)
            right = spread([one and one["evals"][-1].get("right") for one in found])
            rows.append((f"{name}, k = {k}", f"{lr:.2g}", *learning_row(found)[:-1], each, right,
                         " + ".join(f"{x:.0f}" if there else x for x in parts)))
            # The better learning rate, for each alike, is drawn.
            if there and mean(end["accuracy"] for end in there) > best.get((name, k), (-1,))[0]:
                best[name, k] = (mean(end["accuracy"] for end in there),
                                 [one["evals"] for one in found if one])
        lab.table(("", "lr", *LEARNING[:-1], "each seed", "rollouts", "seconds"), *rows)
        if best:
            panels = pictures.setdefault("learn_by_sampler" + "_many" * many, {})
            panels[f"{task}, m = {cfg.m}"] = {f"{name}, k = {k}": evals
                                              for (name, k), (_, evals) in best.items()}
    lab.finish({name: accuracy_lines(panels, "passes") for name, panels in pictures.items()})


# --- last_step: the rollouts' own noise -------------------------------------------------------

@experiment("an hour, in pieces", "--k 1",
            "--task countdown --updates 2 --questions 3 --eval_n 20")
def last_step(lab):
    """Each row's last step drawn K = 8 times from its own state: the variance over fresh
    rollouts beside AGRPO's; learning with it at equal forward passes and at equal seconds."""
    cells = [("every step", ALL), ("last step", ALL), ("AGRPO", 1), ("last step", 1)]
    panels = {}
    for task, m in (("countdown", 2), ("countdown", 4), ("sudoku", 2)):
        if task in lab.tasks() and not (lab.quick and m > 2):
            over_rollouts(lab, cells, task=task, m=m)
    for task in lab.tasks():
        cfg = lab.config(task=task)
        # As many updates as the same passes are; and as the same seconds are, for an update with
        # it takes 1.75 times as long here: K = 8 times the texts are graded too.
        rows = cfg.questions * cfg.G
        passes, variants = cfg.m + 3 * cfg.k, {"AGRPO": (dict(task=task), "AGRPO")}
        for what, price in ("passes", (passes + 1) / passes), ("seconds", 1.75):
            fewer = max(1, round(cfg.updates / price))
            variants[f"last step, equal {what}"] = dict(task=task, updates=fewer), "last step"
        runs = lab.over_seeds(learn, variants)
        lab.note(f"{task}, m = {cfg.m}, k = {cfg.k:g}: held-out accuracy sampled as the "
                 f"rollouts are, n = {cfg.eval_n}, {rows} rollouts an update, seeds "
                 f"{lab.seeds}; passes of drawing again among them")
        lab.table(("", *LEARNING, "each seed"), *(
            (name, *learning_row(found),
             " ".join("-" if one is None else f"{last(one):.1%}" for one in found))
            for name, found in runs.items()))
        if all(any(found) for found in runs.values()):
            panels[f"{task}, m = {cfg.m}"] = {name: [one["evals"] for one in found if one]
                                              for name, found in runs.items()}
    lab.finish(dict(last_step=accuracy_lines(panels, "passes")) if panels else {})


# --- variance: how noisy is the estimate, for every timestep sampler and k? Is it unbiased? ---

KS = (0.125, 0.25, 0.5, 1, 2, 4, 8)    # timesteps a live row

def sampler_numbers(policy, traj, A, cfg, ks, draws):
    """Of one batch of rollouts a record for every sampler and k.

    With weights c of the pairs the estimate is sum_i c_i g_i, and c = 1 is exact:
    |g_hat - g|^2 / |g|^2 = (c - 1)' G (c - 1) / 1' G 1. Once the Gram matrix G is known, a draw
    costs nothing.
    """
    if not A.any():
        raise TaskError("every group is dead: give another --seed, more --questions")
    pairs, gram = estimators.pair_gradients(policy, traj, A)
    norms = torch.zeros(len(A) * cfg.m, dtype=torch.float64)
    norms[pairs] = gram.diagonal().sqrt()
    probs = estimators.sampler_probs(traj, A, cfg.G, norms.view(-1, cfg.m))
    toward, size, found = gram.sum(dim=1), gram.sum(), []       # g_i . g and |g|^2
    for (follow, points), k in itertools.product(SAMPLERS, ks):
        if k > cfg.m or k % 1 and points in estimators.BY_ROW:
            continue                   # each row has one point at least
        c = estimators.draw_weights(probs[follow, points], k, points, draws)[:, pairs]
        square = (((c - 1) @ gram) * (c - 1)).sum(dim=1) / size
        along = (c - 1) @ toward / size
        states = (c > 0).sum(dim=1).double().mean() / (A != 0).sum()
        found.append(dict(m=cfg.m, k=k, sampler=f"{follow}, {points}", states=states.item(),
                          variance=square.mean().item(), bias=along.mean().item(),
                          error=along.std().item() / draws ** 0.5))
    return found


def variance_cell(cfg, ms, draws):
    """Every sampler, m and k on one batch of rollouts each."""
    policy, data, _, params, optimizer = load(cfg)
    if cfg.lora_r:                     # fresh LoRA has B = 0, and A no gradient
        list(agrpo.train(policy, data, cfg, params, optimizer))
    found = []

    def measure(policy, traj, A, cfg, rand):
        ks = sorted({*KS, cfg.m})
        found.extend(sampler_numbers(policy, traj, A, cfg, ks, draws))
        return NOTHING

    for m in ms:
        torch.manual_seed(cfg.seed)
        one = replace(cfg, m=m, updates=cfg.updates + 1)
        list(agrpo.train(policy, data, one, params, optimizer, cfg.updates, measure))
    return found


LLADA = dict(C=384, m=128, block_length=12, temperature=0.6, top_k=150, top_p=0.99, k=24,
             questions=2, G=4, lora_r=8)


def variance_of_random(cfg, draws, scale):
    """The same on a model of random weights that decodes as LLaDA does; of each group one, by
    chance, is right. Its head times `scale`: as it is, all tokens are about as likely."""
    model, words = bench.build("64,192,2,4,4,1000", torch.float32, "cpu")
    model.get_output_embeddings().weight.data *= scale
    policy = agrpo.Policy(model, words, bench.MASK)
    models.add_adapters(policy, cfg)
    policy.eos_id, policy.fill_ids = -1, {-1}                   # nothing ends early
    torch.manual_seed(cfg.seed)
    B = cfg.questions * cfg.G
    q = torch.randint(3, 1000, (cfg.questions, 32)).repeat_interleave(cfg.G, dim=0)
    traj = agrpo.rollout(policy, q, torch.ones_like(q), cfg.how)
    right = torch.rand(B).view(-1, cfg.G).argsort(dim=1) == 0
    A = agrpo.group_advantages(right.double().flatten(), cfg.G)
    ks = [cfg.k / i for i in (16, 8, 4, 2, 1)]
    return sampler_numbers(policy, traj, A, cfg, ks, draws)


def reaches(points, least):
    """The k at which a sampler's variance falls to `least`, between measured points (k, v),
    straight lines on log scales. Below the first: the first; nan: at none of them."""
    points = sorted(points)
    if points and points[0][1] <= least:
        return points[0][0]
    for (k, v), (k_next, v_next) in itertools.pairwise(points):
        if v_next <= least:
            share = np.log(v / least) / np.log(v / max(v_next, 1e-12))
            return k * (k_next / k) ** share
    return np.nan


OFFICIAL = "entropy, batch-strata"
SHOWN = {"uniform, iid": "uniform, iid", "official": OFFICIAL,
         "by row": "surprise, systematic", "AGRPO": "surprise, batch"}      # in the picture


@experiment("20 minutes", "--questions 8 --updates 20 --k 1",
            "--task countdown --questions 3 --G 4 --updates 2")
def variance(lab):
    """Relative variance of the estimate against the exact gradient of all steps, for every
    timestep sampler, k and m; of all parameters of the base model, and LoRA after --updates."""
    ms, draws = dict(countdown=(4, 6, 12), sudoku=(4, 5, 10)), 20 if lab.quick else 300
    kinds = {"base model": dict(lora_r=0), f"after {lab.config().updates} updates": {}}
    results = lab.over_seeds(variance_cell, {
        f"{task}, {kind}": (dict(HARD.get(task, {}), task=task, **flags),
                            ms.get(task, (4,))[:1 if lab.quick else 3], draws)
        for task in lab.tasks() for kind, flags in kinds.items()})
    llada = dict(LLADA, **dict(C=24, m=8, k=4) if lab.quick else {})
    random = lab.over_seeds(variance_of_random, {
        f"random weights, {nats} nats a token": (llada, draws, scale)
        for nats, scale in ((0.6, 60), (0.2, 150))[:1 if lab.quick else 2]})
    # One record for each sampler, m and k, with the batch of rollouts that it is of.
    everything = [dict(x, cell=cell, batch=(cell, seed, x["m"]))
                  for cell, seeds in (results | random).items()
                  for seed, found in enumerate(seeds) for x in found or ()]
    trained = [x for x in everything if x["cell"] in results]
    names, panels = [", ".join(sampler) for sampler in SAMPLERS], {}

    def get(field, **which):
        return np.array([x[field] for x in everything if which.items() <= x.items()])

    for cell in dict.fromkeys(x["cell"] for x in everything):
        at = {(x["m"], x["k"]) for x in everything if x["cell"] == cell and x["k"] < x["m"]}
        at = sorted((m, k) for m, k in at if k in ((2, 4) if cell in results else [llada["k"]]))
        rows = []
        for name in names:
            values = [get("variance", cell=cell, sampler=name, m=m, k=k) for m, k in at]
            m, k = at[-1]
            passes = get("states", cell=cell, sampler=name, m=m, k=k).mean()
            rows.append((name, *(f"{v.mean():.3f}+-{v.std():.2f}" for v in values),
                         f"{passes:.2f}"))
        lab.note(f"{cell}: relative variance |g_hat - g|^2 / |g|^2, mean over {len(lab.seeds)} "
                 "batches +- their spread; last column: forward passes a row in the one before "
                 "it, equal draws merged")
        lab.table(("p, points", *(f"m={m} k={k:g}" for m, k in at), "passes"), *rows)
        if cell in results:
            panels[f"{cell}\nm = {m}".replace(", ", "\n")] = {
                title: (ks, np.stack([get("variance", cell=cell, sampler=name, m=m, k=k)
                                      for k in ks], axis=1)) for title, name in SHOWN.items()
                for ks in [[k for k in KS if k < m and (k >= 1 or title == "AGRPO")]]}

    # Batches differ by more than samplers do: so a ratio within each batch, then their mean.
    def ratio(name, some, price):
        logs = [[np.mean([np.log(x["variance"] * x["states"] ** price) for x in some
                          if (x["batch"], x["sampler"]) == (batch, who)])
                 for batch in sorted({x["batch"] for x in some})] for who in (name, OFFICIAL)]
        return geometric(np.exp(np.subtract(*logs)))

    def equal_k(name, some, k):
        """k at which a sampler is as good as the official one at k."""
        found = []
        for batch in sorted({x["batch"] for x in some}):
            mine = [x for x in everything if x["batch"] == batch]
            least, = [x["variance"] for x in mine if (x["sampler"], x["k"]) == (OFFICIAL, k)]
            found.append(reaches([(x["k"], x["variance"]) for x in mine
                                  if x["sampler"] == name], least))
        return geometric(np.array(found))

    tables = [("k = 1, 2, 4", [x for x in trained if x["k"] in (1, 2, 4) and x["k"] < x["m"]],
               4)]
    tables += [(f"{cell}, decoded as LLaDA, k = {llada['k']} of {llada['m']}",
                [x for x in everything if x["cell"] == cell and x["k"] == llada["k"]],
                llada["k"]) for cell in random]
    for what, some, k in tables:
        if some:
            lab.note(f"{what}, {len({x['batch'] for x in some})} batches: geometric mean of "
                     f"the variance in units of the official sampler's ({OFFICIAL}) [lowest, "
                     "highest batch]; per pass: variance x forward passes, which merged draws "
                     f"save; and the k at which the official one's variance at k = {k} is "
                     "reached, over batches of m > k")
            deep = [x for x in some if x["m"] > k]
            lab.table(("p, points", "variance", "per pass", f"as official, k = {k}"), *(
                (name, ratio(name, some, 0), ratio(name, some, 1), equal_k(name, deep, k))
                for name in names))
    z = [abs(x["bias"] / x["error"]) for x in everything if x["error"] > 1e-9]
    if z:
        lab.note(f"bias along g in standard errors, {len(z)} estimates: median "
                 f"{np.median(z):.2f} (0.67 expected of none), beyond 2: "
                 f"{np.mean(np.array(z) > 2):.1%} (5 %)")
    picture = figures.lines(panels, "k", "relative variance", "xy"), 3.2
    lab.finish(dict(variance=picture) if panels else {})


def geometric(values):
    """Geometric mean [lowest, highest]; of those that are there."""
    there = values[np.isfinite(values)]
    if len(there) == 0:
        return "-"
    more = f" ({len(there)} of {len(values)})" * (len(there) < len(values))
    mean = np.exp(np.log(there).mean())
    return f"{mean:.2g} [{there.min():.2g}, {there.max():.2g}]{more}"


# --- compare: the estimators of the field against the exact gradient, and learning with each --

CERTAIN = ("every step", "step-merge", "EGSPO", "TraceRL")      # no draws: one says all
WARM = 0.6                             # the other T of "scored at T = 1"


def directions(cfg, names, batches, draws):
    """{name: sums over the batches}, from which `angles` makes cosines, bias and variance.

    Per batch of rollouts: g its exact gradient, e the mean of `draws` estimates on the same
    rollouts. Products of two different draws, or batches, have no noise in their mean.
    """
    cfg = replace(cfg, updates=batches, lora_r=0)
    policy, data, _, params, optimizer = load(cfg)
    # Sums, not cosines: those of several seeds add up to the numbers of all their batches.
    zero = dict.fromkeys(("dot", "gg", "ee", "square", "mean_square", "states"), 0.0)
    sums, total = {name: dict(zero, cosine=[]) for name in names}, dict.fromkeys(names, 0.0)
    total["g"] = 0.0

    def take(name, *batch):
        seen = ESTIMATORS[name](policy, *batch)
        return take_gradient(params), len(seen.ratio)

    def measure(policy, *batch):
        g, _ = take("every step", *batch)
        total["g"] += g
        for name, s in sums.items():
            n = 1 if name in CERTAIN else draws
            es, states = zip(*(take(name, *batch) for _ in range(n)))
            e, square = sum(es) / n, sum((x @ x).item() for x in es) / n
            mean_square = (e @ e).item()
            total[name] += e
            s["dot"] += (e @ g).item()
            s["gg"] += (g @ g).item()
            # |E e|^2 without the noise: the products of two different draws.
            s["ee"] += (n * mean_square - square) / (n - 1) if n > 1 else square
            s["square"] += square
            s["mean_square"] += mean_square
            s["states"] += sum(states) / (n * cfg.questions * cfg.G * batches)
            s["cosine"] += [torch.cosine_similarity(x, g, dim=0).item() for x in es]
        return NOTHING

    list(agrpo.train(policy, data, cfg, params, optimizer, gradient=measure))
    # Of the product of two totals, what is left without its terms of one batch.
    g = total["g"]
    for name, s in sums.items():
        e = total[name]
        s.update(batches=batches, across=(e @ g).item() - s["dot"],
                 across_gg=(g @ g).item() - s["gg"],
                 across_ee=(e @ e).item() - s.pop("mean_square"))
    return sums


def angles(parts):
    """One estimator's numbers from the sums of one or several seeds.

    one       cosine of one estimate to the exact gradient of the same rollouts
    mean      the same for the mean of the estimates: what stays when their noise averages out
    bias      sine of that angle: |c E e - g| / |g| at the best c (the step size absorbs it)
    variance  E |e - E e|^2 in units of |g|^2, at the length of e where its part along g is g
    expected  cosine of the estimates' mean over rollouts to the policy gradient
    reach     cosine of one estimate to the policy gradient: bias and both noises together
    """
    s = {key: np.sum([part[key] for part in parts]) for key in parts[0] if key != "cosine"}
    mean = s["dot"] / np.sqrt(s["ee"] * s["gg"])
    gain = s["dot"] / s["gg"]
    pairs = s["batches"] * (parts[0]["batches"] - 1)            # of two different batches
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = s["across"] / np.sqrt(s["across_ee"] * s["across_gg"])
        lengths = np.sqrt(s["square"] / s["batches"] * s["across_gg"] / pairs)
    return dict(one=np.mean([c for part in parts for c in part["cosine"]]), mean=mean,
                bias=np.sqrt(max(0.0, 1 - min(mean, 1.0) ** 2)),
                variance=max(0.0, s["square"] - s["ee"]) / s["gg"] / gain ** 2,
                expected=expected, reach=s["across"] / pairs / lengths,
                states=s["states"] / len(parts))


def angle_row(parts):
    x, each = angles(parts), [angles([part]) for part in parts]

    def seeds(key):
        values = [e[key] for e in each]
        text = f"{x[key]:.2f} [{min(values):.2f}, {max(values):.2f}]"
        return "-" if "nan" in text else text                   # too few batches to tell
    return (f"{x['states']:.2f}", seeds("one"), f"{x['mean']:.3f}", f"{x['bias']:.2f}",
            f"{x['variance']:.3f}", f"{x['variance'] * x['states']:.3f}", seeds("expected"),
            seeds("reach"))


def compare_gradients(lab):
    """The tables of angles, one for each m. Returns what `figures.dots` draws of them."""
    names = ["every step", "AGRPO", "official", *estimators.RECIPES]
    batches, draws, panels = 2 if lab.quick else 12, 2, {}
    cfg = lab.config()
    # From few steps to one token a step, which is m = 12 for Countdown and 20 for Sudoku.
    ms = {4: 2} if lab.quick else {2: 1, 4: 2, cfg.C: 4}
    for m in sorted({*ms} & {*agrpo.step_counts(cfg.C, cfg.block_length)}):
        rows, flags = {}, dict(HARD.get(cfg.task, {}), m=m, k=ms[m])
        for T, who in (("", names), (f", T = {WARM}", ["AGRPO", "scored at T = 1"])):
            at = dict(flags, temperature=WARM) if T else flags
            calls = [(lab.config(seed=seed, **at), who, batches, draws) for seed in lab.seeds]
            parts = [part for part in lab.pieces(directions, calls) if part]
            rows |= {name + T: [part[name] for part in parts] for name in who if parts}
        if not rows:
            continue
        lab.note(f"m = {m}, k = {ms[m]}; {cfg.task}, all parameters of the base model, "
                 f"{len(lab.seeds)} seeds x {batches} batches of {cfg.questions * cfg.G} "
                 f"rollouts, {draws} draws on each")
        lab.table(("estimator", "states", "one", "mean", "bias", "variance", "x states",
                   "expected", "reach"), *((name, *angle_row(rows[name])) for name in rows))
        found = {name: angles(parts) for name, parts in rows.items()}
        panels[f"m = {m}"] = {name: ([x["one"]], min(1.0, x["mean"]))
                              for name, x in found.items()}
    lab.note("states: forward passes of the loss a row. Cosines to the exact gradient of the "
             "same rollouts: one, of a single estimate; mean, of the estimates' mean, known to "
             "about 0.02 (drawn as 1 where above), so that a bias (its sine) under 0.2 may be "
             "none. variance: noise of "
             "the estimate's own draws in units of |g|^2; x states: per forward. Cosines to "
             "the policy gradient over other rollouts: expected, of the mean; reach, of one "
             "estimate on one batch. [lowest, highest] of the seeds")
    return panels


ORDER = ["AGRPO", "ELBO", "one-step", "step-merge", "EGSPO", "coupled", "ESPO", "SPG", "RLDF",
         "GDPO", "wd1", "GDSD", "TraceRL", "official", "JustGRPO", "every step"]


def compare_learning(lab, task):
    """Learning at equal forward passes: all learning rates with the first seed, the best one
    with every seed. Returns {name: [run per seed]} of what has been run."""
    hard = HARD.get(task, {})
    cfg = lab.config(task=task, **hard)
    names = ["AGRPO", "ELBO", "JustGRPO"] if lab.quick else ORDER
    rows = cfg.questions * cfg.G
    rates = [cfg.lr] if lab.quick else [cfg.lr / 2, cfg.lr, cfg.lr * 2]
    budget = cfg.updates * rows * (cfg.m + 3 * cfg.k)

    def call(name, lr, seed):
        how, flags = [], dict(task=task, lr=lr, seed=seed)
        if name == "JustGRPO":         # a way of its own to write; evaluated as the others
            flags.update(block_length=1, m=cfg.C, k=1, divide_by_std=True)
            name, how = "every step", [cfg.how]
        # What an update costs decides how many there are.
        own = lab.config(**hard | flags)
        passes = rows * (own.m + 3 * estimators.forwards(name, own))
        own.updates = max(1, round(budget / passes))
        return own, name, *how

    runs, table = {}, []
    for name in names:
        first = lab.pieces(learn, [call(name, lr, lab.seeds[0]) for lr in rates])
        # Picked on the first seed's accuracy, for each estimator alike.
        best = max(range(len(rates)), key=lambda i: last(first[i]) or -1.0)
        others = [call(name, rates[best], seed) for seed in lab.seeds[1:]]
        found = [first[best], *lab.pieces(learn, others)]
        tried = ["not run" if one is None else f"{last(one):.1%}" for one in first]
        table.append((name, f"{rates[best]:.2g}", *learning_row(found), *tried))
        if any(found):
            runs[name] = [one for one in found if one]
    lab.note(f"{task}: held-out accuracy after about {budget:,} forward passes (dead groups "
             f"and merged steps save some), m = {cfg.m}, n = {cfg.eval_n}, {rows} rollouts an "
             f"update, LoRA, seeds {lab.seeds}: mean [lowest, highest]. lr: the best for the "
             "first seed, whose accuracies at all rates stand behind")
    lab.table(("estimator", "lr", *LEARNING, *(f"at {lr:.2g}" for lr in rates)), *table)
    return runs


@experiment("3 hours, in pieces",
            "--m 4 --k 2 --questions 10 --updates 60 --eval_n 400 --lr 1e-3",
            "--task countdown --updates 2 --questions 3 --eval_n 20")
def compare(lab):
    """Every estimator of lab/estimators.py: cosine to the exact gradient, bias and variance
    apart; then learning at equal forward passes, each at the best of three learning rates."""
    lab.say("Recipes and their sources: lab/estimators.py. JustGRPO: block_length 1, every "
            "step, std; its gradient is AGRPO's.")
    pictures, panels = {}, compare_gradients(lab)
    if panels:
        draw = figures.dots(panels, "cosine to the exact gradient",
                            "one estimate: bias and noise", "the estimates' mean: bias is left")
        pictures["compare"] = draw, 4.6
    panels, base = {}, {}
    for task in lab.tasks():
        runs = compare_learning(lab, task)
        ends = {name: [last(one) for one in seeds] for name, seeds in runs.items()}
        for name in sorted(ends, key=lambda name: -np.mean(ends[name])):
            panels.setdefault(task, {})[name] = ends[name], np.mean(ends[name])
            base[task] = before(runs[name])
    if panels:
        draw = figures.dots(panels, "held-out accuracy   (dashed: before training)", "a seed",
                            "their mean", base)
        pictures["compare_learning"] = draw, 3.8
    lab.finish(pictures)


# --- Pictures that explain, and finished runs in one picture ----------------------------------

def some_rollout(cfg, which=22):
    """policy, trajectory of one problem, the row to show, its title"""
    policy, _, test, *_ = load(cfg)
    keys = [(cfg.seed, "picture", i) for i in range(cfg.G)]
    traj, _, grades = agrpo.write_answers(policy, [test[which]], keys, cfg, cfg.how)
    # Of its G answers a right one, and of those the one with the most to decide.
    row = max(range(len(keys)), key=lambda i: (grades[i].correct, traj.entropy[i].sum().item()))
    about = ", ".join(f"{name} {value}" for name, value in test[which].items()
                      if len(str(value)) < 30)
    return policy, traj, row, f"one rollout   ({about}; reward {grades[row].reward:.0f})"


@experiment("seconds", "--m 12 --k 4 --questions 1")
def rollout(lab):
    """One rollout as a grid: step x position, what each step drew and how likely it was, p as
    if it were the whole batch, the drawn steps with their weights."""
    cfg = lab.config()
    policy, traj, row, title = some_rollout(cfg)
    # As if this rollout were the whole batch.
    size = torch.arange(len(traj.o)) == row
    p = agrpo.timestep_probs(traj, size.double(), cfg.follow)
    offset = agrpo.row_random([(cfg.seed, "picture")])(1, 1).item()
    _, steps, w = agrpo.sample_timesteps(p, round(cfg.k), offset)
    names = figures.token_names(policy, traj.o[row])
    drawn, step_of = dict(zip(steps.tolist(), w.tolist())), traj.step_of[row].tolist()
    p, logp = p[row].tolist(), agrpo.per_step(traj, traj.logp_old)[row].tolist()
    lab.say(title, " ".join(names))
    lab.table(("step", "drew", "log pi", "p", "w"), *(
        (t, " ".join(name for name, step in zip(names, step_of) if step == t),
         f"{logp[t]:.2f}", f"{p[t]:.3f}", f"{drawn.get(t, 0):.2f}") for t in range(cfg.m)))
    lab.finish(dict(rollout=(figures.rollout_grid(traj, row, names, p, drawn, title), 4.2)))


@experiment("seconds", "--m 4 --k 2 --questions 1")
def masks(lab):
    """Which states one-step, ELBO and AGRPO score, of one rollout: strips of masks."""
    cfg = lab.config()
    policy, traj, row, _ = some_rollout(cfg)
    A = torch.ones(len(traj.o), dtype=torch.float64)
    rand = agrpo.row_random([(cfg.seed, "masks", i) for i in range(len(A))])
    strips = []
    for recipe, k, about in (
            (estimators.one_step, 1, "one-step: everything masked, everything scored"),
            (estimators.elbo, cfg.k, f"ELBO, k = {cfg.k:g}: random tokens masked and scored, "
                                     "weighed by L / l"),
            (estimators.step_merge, cfg.m, f"AGRPO, its m = {cfg.m} steps: the states that "
                                           "were there, the tokens that each drew")):
        states = recipe(policy, traj, A, replace(cfg, k=k), rand)
        strips.append((about, states.hidden[row], states.w[row]))
        lab.say(about)
        for hidden, w in zip(*strips[-1][1:]):
            cells = [f"{x:4.1f}" if x else " [M]" if h else "   ." for h, x in zip(hidden, w)]
            lab.say("    " + " ".join(cells))
    names = figures.token_names(policy, traj.o[row])
    lab.finish(dict(masks=(figures.mask_strips(strips, names), 3.6)))


def curves(argv):
    """bash run.sh lab curves runs/countdown-0 runs/countdown-1 ...: the finished runs of each
    task in one panel, seeds shaded."""
    parser = run.Parser(prog="bash run.sh lab curves", description=curves.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="of finished runs, seeds pooled")
    parser.add_argument("--figures", action="store_true", help="keep it in lab/figures too")
    parser.add_argument("--out", type=Path, default=Path("runs/lab"))
    args, panels = parser.parse_args(argv), {}
    for folder in args.folders:
        if not (folder / "summary.json").is_file():
            raise TaskError(f"{folder} has no summary.json: curves wants folders of "
                                  "finished runs, as runs/countdown-0")
        done = json.loads((folder / "summary.json").read_text())
        title = f"{done['task']}, m = {done['evals'][0]['m']}"
        panels.setdefault(title, {}).setdefault("trained", []).append(done["evals"])
    picture = accuracy_lines(panels, "update", dashed="the base model")
    for folder in [args.out] + [ROOT / "lab" / "figures"] * args.figures:
        figures.save(folder / "curves.png", *picture)
    for title, named in panels.items():
        first, end = ([evals[i]["accuracy"] for evals in named["trained"]] for i in (0, -1))
        print(f"{title}: {spread(first)} -> {spread(end)}, {len(first)} seed(s): mean [lowest, "
              "highest]")
    print(f"written: {args.out}/curves.png")
    return 0


def main(argv=None):
    name, *argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name == "curves":
        return curves(argv)
    if name not in EXPERIMENTS:
        print(__doc__)
        for each, (function, minutes, *_) in EXPERIMENTS.items():
            about = textwrap.shorten(function.__doc__, 82, placeholder=" ...")
            print(f"  {each:<9} {minutes:<19} {about}")
        print("  curves    seconds             finished runs in one picture: lab curves RUNS")
        print("\nTimes on 2 idle CPU cores.")
        return 0 if name in ("-h", "--help") else 2
    EXPERIMENTS[name][0](Lab(name, argv))
    return 0


if __name__ == "__main__":
    sys.exit(run.in_one_sentence(main))
