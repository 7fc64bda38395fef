"""Does it work as claimed? One command per question, on the tiny model; each prints its table and draws its figure.

    bash run.sh lab variance      how noisy is the gradient, for every timestep sampler and k? Is it unbiased?
    bash run.sh lab compare       AGRPO against a one-step and an ELBO likelihood: angle to the gradient, learning
    bash run.sh lab k             what does a larger k buy, per update and per forward pass?
    bash run.sh lab steps         how many times fewer denoising steps does training save at equal accuracy?
    bash run.sh lab cost          where do the seconds and the memory of an update go?
    bash run.sh lab order         learning with every order of unmasking, exact and biased scoring
    bash run.sh lab signatures    provoke each failure and see that the run's warning names it
    bash run.sh lab curves runs/countdown runs/countdown-2 ...     finished runs in one picture, seeds shaded

Every flag of agrpo.py passes through (--task sudoku --updates 100 --model FOLDER --m 6 --lr 1e-3 ...). Written:
runs/lab/NAME.json (every number, command, seeds, hardware, versions) and NAME.png; --figures puts picture and tables into
lab/figures too.

Compute is counted in forward passes of one row: a denoising step of a rollout is 1, a (row, timestep) pair of the loss
3, because a backward pass costs about two forwards. Learning rates are constant here after agrpo.py's warm-up, so that
the beginning of a long run is a short run, and one run answers for equal updates and for equal compute.
"""
import itertools
import os
import sys
import tempfile
import textwrap
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

os.environ.setdefault("KINETO_LOG_LEVEL", "9")       # torch's profiler is chatty otherwise
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import agrpo
import tasks
from lab import cli, logbook, models
from lab.cli import UserError
from lab.estimators import ESTIMATORS, SAMPLERS, draw_weights, pair_gradients, timestep_weights
from lab.harness import EXPERIMENTS, Lab, curves, draw_runs, experiment, spread

# ---- the training that all experiments share ------------------------------------------------------------------------


def load(cfg):
    """Policy (with fresh adapters, or those of --adapter) and data."""
    model, tokenizer = models.load_model(cfg)
    policy = agrpo.Policy(model, tokenizer, cfg.device)
    data = {split: agrpo.load_data(cfg, split) for split in ("train", "test")}
    models.preflight(policy, policy.encode(cfg.task, data["test"][0]))
    models.load_adapter(policy, cfg) if cfg.adapter else models.add_adapters(policy, cfg)
    return policy, data


def roll(policy, data, cfg, update):
    """One update's rollouts. -> batches, grades, adv (B,), dead (B,)"""
    batches, grades, _, _ = agrpo.collect_rollouts(policy, data["train"], cfg, update)
    rewards = torch.tensor([g.reward for g in grades], dtype=torch.float64, device=policy.device)
    return batches, grades, *agrpo.group_advantages(rewards, cfg.G, cfg.normalise_std)


def add_gradient(policy, cfg, batches, adv, estimator="agrpo", p=0):
    """One pass over one update's rollouts."""
    seen, row = [], 0
    for keys, traj in batches:
        rand = agrpo.row_random([(*key, "timesteps", p) for key in keys])
        seen += ESTIMATORS[estimator](policy, cfg, traj, adv[row:row + len(keys)], len(adv), rand)
        row += len(keys)
    return seen


def train(policy, data, cfg, estimator="agrpo", passes=0, every=0):
    """agrpo.train without its files: until cfg.updates are done and `passes` forward passes of one row are spent.
    Returns history, the log's numbers of each update, and evals, held-out accuracy each `every` updates."""
    params = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay)
    warm, history, evals, spent, seconds = max(1, round(cfg.warmup * cfg.updates)), [], [], 0, 0.0
    book = SimpleNamespace(cfg=cfg, policy=policy, gather=lambda parts: parts)          # all that `metrics` wants of it
    while True:
        update, done = len(history), len(history) >= cfg.updates and spent >= passes
        if every and (done or update % every == 0):
            evals.append(dict(update=update, passes=spent, seconds=seconds, **accuracy(policy, data, cfg)))
        if done:
            return history, evals
        began, norms, seen = time.time(), [], []
        batches, grades, adv, dead = roll(policy, data, cfg, update)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, (update + 1) / warm)
        for p in range(cfg.mu):
            seen += add_gradient(policy, cfg, batches, adv, estimator, p)
            norms.append(agrpo.optimizer_step(params, optimizer, cfg.max_grad_norm))
        seconds += time.time() - began
        now = dict(update=update + 1, grad_norm=max(norms),
                   **logbook.Logbook.metrics(book, batches, grades, dead, seen, 0))
        spent += sum(traj.n.sum().item() for _, traj in batches) + 3 * now["pairs"]
        history.append(dict(now, passes=spent, warnings=list(logbook.signatures(now, history))))


def accuracy(policy, data, cfg, m=None, greedy=False):
    """Held-out accuracy with its 95 % interval, sampled as the rollouts unless greedy."""
    records = agrpo.evaluate(policy, data["test"], cfg, m or cfg.m, greedy)
    right = sum(r["correct"] for r in records)
    low, high = logbook.wilson(right, len(records))
    return dict(accuracy=right / len(records), low=low, high=high, n=len(records))


def training_run(cfg, estimator="agrpo", passes=0, every=0):
    """One training in a process of its own; evaluated at its end greedily too."""
    policy, data = load(cfg)
    history, evals = train(policy, data, cfg, estimator, passes, every or max(1, cfg.updates // 6))
    return dict(history=history, evals=evals, greedy=accuracy(policy, data, cfg, greedy=True))


def nominal_passes(cfg):
    """Forward passes of cfg.updates updates, were no group dead and no timestep drawn twice."""
    return cfg.updates * cfg.questions * cfg.G * (cfg.m + 3 * cfg.k)


def at(evals, x, value):
    """Held-out accuracy when `value` updates or passes were spent, between two evaluations on the straight line."""
    return float(np.interp(value, [e[x] for e in evals], [e["accuracy"] for e in evals]))


def learning(lab, title, variants, passes):
    """Train every variant, {label: (flags, estimator)}, on every seed; tabulate at equal updates, at equal compute and at
    a quarter of it (passes = 0: decoded greedily in their place). Returns {label: [run per seed]}."""
    cfg = lab.config(**next(iter(variants.values()))[0])
    runs = lab.over_seeds(training_run, {label: (*variant, passes) for label, variant in variants.items()})
    lab.note(f"held-out accuracy, sampled as the rollouts are; {cfg.task}, m = {cfg.m}, n = {cfg.eval_n}, seeds {lab.seeds}: "
             "mean [lowest, highest]")
    reached = {f"after {cfg.updates} updates": lambda r: at(r["evals"], "update", cfg.updates)}
    reached |= {f"after {x:,} passes": lambda r, x=x: at(r["evals"], "passes", x) for x in (passes // 4, passes)} if passes \
        else {"then greedily": lambda r: r["greedy"]["accuracy"]}
    lab.table((title, "base", *reached, "passes/update", "s/update"), *(
        (label, f"{np.mean([r['evals'][0]['accuracy'] for r in seeds]):.1%}",
         *(spread([accuracy_of(r) for r in seeds]) for accuracy_of in reached.values()),
         *(format(np.mean([r["evals"][-1][x] / r["evals"][-1]["update"] for r in seeds]), form)
           for x, form in (("passes", ".0f"), ("seconds", ".2f")))) for label, seeds in runs.items()))
    return runs


def draw_learning(runs, compute=True):
    def draw(fig):
        for ax, x in zip(fig.subplots(1, 1 + compute, squeeze=False, sharey=True)[0], ("update", "passes")):
            draw_runs(ax, {label: [r["evals"] for r in seeds] for label, seeds in runs.items()}, x)
    return draw


# ---- variance -------------------------------------------------------------------------------------------------------


def variance_cell(cfg, ms, draws):
    """Every sampler, k and m on one batch of rollouts. With weights c the estimate is sum_i c_i g_i, and c = 1 is exact:
    |g_hat - g|^2 / |g|^2 = (c - 1)' G (c - 1) / 1' G 1.  Once the Gram matrix G is known, a draw costs nothing."""
    policy, data = load(cfg)
    if cfg.lora_r:                                   # at its start B = 0, and so is A's gradient
        train(policy, data, cfg)
    found = []
    for m in ms:
        cfg.m, cfg.rollout_batch = m, cfg.questions * cfg.G      # one batch: batch-strata and pooled see all of it
        ((_, traj),), _, adv, _ = roll(policy, data, cfg, cfg.updates)
        if not adv.any():
            raise UserError("every group is dead: no gradient to measure; give another --seed or more --questions")
        pairs, gram = pair_gradients(policy, cfg, traj, adv)
        toward = gram.sum(1)                                     # G 1: g_i . g
        size = toward.sum()                                      # |g|^2
        add_gradient(policy, replace(cfg, k=m), [([()] * len(adv), traj)], adv)
        whole = sum(p.grad.double().square().sum() for p in policy.model.parameters() if p.grad is not None)
        policy.model.zero_grad()
        assert abs(whole * (m * len(adv)) ** 2 / size - 1) < 1e-3, "sum over pairs != accumulate_gradient, every step"
        norms = torch.zeros(len(adv) * m, dtype=torch.float64)
        norms[pairs] = gram.diagonal().sqrt()
        weights = timestep_weights(policy, cfg, traj, norms.view(-1, m))
        torch.manual_seed(cfg.seed)
        for (weight, points), k in itertools.product(SAMPLERS, sorted({1, 2, 4, 8, m})):
            c = draw_weights(agrpo.timestep_probs(traj.n, m, weights[weight]), adv, cfg.G, k, points, draws)[:, pairs]
            square, along = (((c - 1) @ gram) * (c - 1)).sum(1) / size, (c - 1) @ toward / size
            found.append(dict(m=m, weight=weight, points=points, k=k, variance=square.mean().item(),
                              error=square.std().item() / draws ** 0.5, bias=along.mean().item(),
                              bias_error=along.std().item() / draws ** 0.5,
                              pairs=((c > 0).sum(1).double().mean() / (adv != 0).sum()).item()))
    return found


@experiment("about 5 minutes", "--questions 8 --updates 20", "--questions 3 --G 4 --updates 2")
def variance(lab):
    """How noisy is the gradient estimate against the exact one of all steps, for every timestep sampler, k and m? Cells:
    task x (all parameters of the base model | LoRA after --updates updates) x seed, each with its own rollouts."""
    names = [lab.config().task] if lab.quick or "--task" in lab.argv else ["countdown", "sudoku"]
    ms, draws = {"countdown": (4, 6, 12), "sudoku": (4, 5, 10)}, 50 if lab.quick else 1000
    hard = {"sudoku": dict(unmasking="random")}      # by max_prob it is right in nearly every rollout, all groups are dead
    results = lab.over_seeds(variance_cell, {
        f"{task}, {state}": (dict(task=task, **hard.get(task, {}), **more), ms[task][:1 if lab.quick else 3], draws)
        for task in names for state, more in (("base model, all parameters", dict(lora_r=0)),
                                              (f"LoRA after {lab.config().updates} updates", {}))})

    def get(seeds, field, sampler, k, m):
        return np.array([x[field] for found in seeds for x in found
                         if (x["weight"], x["points"], x["k"], x["m"]) == (*sampler, k, m)])

    for cell, seeds in results.items():
        columns = sorted({(x["m"], x["k"]) for x in seeds[0] if x["k"] in (2, 4) and x["k"] < x["m"]})
        lab.note(f"{cell}: relative variance |g_hat - g|^2 / |g|^2, mean over {len(seeds)} batches +- their spread; pairs: "
                 "forward passes per row in the last column")
        lab.table(("p_t, points", *(f"m={m} k={k}" for m, k in columns), "pairs"), *(
            (", ".join(sampler), *(f"{v.mean():.3f}+-{v.std():.2f}" for v in (
                get(seeds, "variance", sampler, k, m) for m, k in columns)),
             f"{get(seeds, 'pairs', sampler, *columns[-1][::-1]).mean():.2f}") for sampler in SAMPLERS))

    everything = [x for seeds in results.values() for found in seeds for x in found]

    def against_official(sampler, price):
        logs = [np.array([np.log(x["variance"] * x["pairs"] ** price) for x in everything if x["k"] in (1, 2, 4)
                          and x["k"] < x["m"] and (x["weight"], x["points"]) == s])
                for s in (sampler, ("entropy", "batch-strata"))]
        return f"{np.exp((logs[0] - logs[1]).mean()):.2f}"
    lab.note("all of it, k in 1, 2, 4: geometric mean of the variance in units of the official sampler's (entropy, batch-strata); "
             "per pass: variance x forward passes, which merged draws save")
    lab.table(("p_t, points", "variance", "per pass"),
              *((", ".join(s), against_official(s, 0), against_official(s, 1)) for s in SAMPLERS))
    z = np.array([abs(x["bias"] / x["bias_error"]) for x in everything if x["bias_error"] > 1e-9])
    lab.note(f"bias along g in standard errors, {len(z)} estimates: median {np.median(z):.2f} (0.67 expected of none), beyond "
             f"2: {np.mean(z > 2):.1%} (5 %)")

    def draw(fig):
        for ax, (cell, seeds) in zip(fig.subplots(1, len(results), sharey=True, squeeze=False)[0], results.items()):
            m = seeds[0][-1]["m"]
            ks = sorted({x["k"] for x in seeds[0] if x["m"] == m})
            for sampler in [("uniform", "iid"), ("uniform", "low-discrepancy"), ("entropy", "batch-strata"),
                            ("entropy", "low-discrepancy"), ("surprise", "low-discrepancy")]:
                y = np.stack([get(seeds, "variance", sampler, k, m) for k in ks]) + 1e-4   # 0 at k = m, uniform
                line, = ax.loglog(ks, y.mean(1), "o-", ms=3, label=", ".join(sampler))
                ax.fill_between(ks, y.min(1), y.max(1), alpha=0.15, color=line.get_color())
            ax.set_title(f"{cell}, m = {m}".replace(", ", "\n", 1), fontsize=7)
            ax.set(xlabel="k", ylim=(1e-3, None), xticks=ks, xticklabels=ks)
            ax.minorticks_off()
        fig.axes[0].set_ylabel("relative variance")
        fig.axes[0].legend(fontsize=6)
    lab.finish(results, draw)


# ---- compare, k, order ----------------------------------------------------------------------------------------------


def gradients(cfg, names, batches):
    """{name: [gradient of batch b, flat]} and {name: pairs per row} over the same rollouts; "exact" takes every step."""
    policy, data = load(cfg)
    params, grads, pairs = list(policy.model.parameters()), {name: [] for name in names}, dict.fromkeys(names, 0)
    for b in range(batches):
        rolled, _, adv, _ = roll(policy, data, cfg, b)
        for name in names:
            how = (replace(cfg, k=cfg.m), "agrpo") if name == "exact" else (cfg, name)
            seen = add_gradient(policy, how[0], rolled, adv, how[1])
            grads[name].append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params]))
            pairs[name] += sum(len(x[0]) for x in seen) / len(adv) / batches
            policy.model.zero_grad()
    return grads, pairs


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def cosine_cell(cfg, batches):
    """Per estimator, over batches b of rollouts: cos(e_b, g_b), g_b the exact gradient of the same rollouts;
    cos(sum e_b, sum g_b), what is left of the angle as noise averages out; cos(e_b, sum of the other batches' g)."""
    grads, pairs = gradients(cfg, ("exact", "agrpo", "one-step", "ELBO"), batches)
    g, everything = grads["exact"], sum(grads["exact"])
    return {name: dict(same=[cosine(e, x) for e, x in zip(es, g)], summed=cosine(sum(es), everything),
                       others=[cosine(e, everything - x) for e, x in zip(es, g)], pairs=pairs[name])
            for name, es in grads.items()}


@experiment("about 18 minutes", "--m 4 --k 2 --updates 40 --eval_n 400", "--updates 2 --questions 3 --eval_n 20")
def compare(lab):
    """AGRPO, diffu-GRPO's one-step likelihood and an ELBO: the angle to the exact gradient on the same rollouts (all
    parameters of the base model), then learning (LoRA) at equal updates and at equal compute, for three learning rates:
    a third of --lr, --lr and three times --lr."""
    batches, cfg = 3 if lab.quick else 12, lab.config()
    cells = lab.map(cosine_cell, [(lab.config(seed=seed, lora_r=0), batches) for seed in lab.seeds])
    join = lambda name, kind: [x for cell in cells for x in cell[name][kind]]
    lab.note(f"cosine to the exact gradient (every step; m = {cfg.m}, k = {cfg.k}), {len(cells)} seeds x {batches} batches of "
             f"{cfg.questions * cfg.G} rollouts: mean [lowest, highest]. sum: what remains of the angle as noise averages out; "
             "other: to the gradient of the other batches, where `exact` is the most that a batch can reach")
    lab.table(("estimator", "same rollouts", "sum over batches", "other batches", "pairs/row"), *(
        (name, spread(join(name, "same"), ".3f"), spread([cell[name]["summed"] for cell in cells], ".3f"),
         spread(join(name, "others"), ".3f"), f"{np.mean([cell[name]['pairs'] for cell in cells]):.2f}")
        for name in cells[0]))
    variants = {f"{name}, lr {cfg.lr * x:.2g}": (dict(lr=cfg.lr * x), name) for name in ("agrpo", "one-step", "ELBO")
                for x in ((1,) if lab.quick else (1 / 3, 1, 3))}
    runs = learning(lab, "estimator", variants, nominal_passes(cfg))

    def draw(fig):
        ahead = lambda label: np.mean([at(r["evals"], "update", cfg.updates) for r in runs[label]])
        best = {name: max((label for label in runs if label.startswith(name)), key=ahead) for name in list(cells[0])[1:]}
        draw_learning({label: runs[label] for label in best.values()})(fig)
    lab.finish(dict(cosines=cells, runs=runs), draw)


@experiment("about 15 minutes", "--m 12 --updates 60 --questions 10 --eval_n 400",
            "--m 4 --updates 2 --questions 3 --eval_n 20")
def k_(lab):
    """What does a larger k buy, at equal updates and at equal compute?"""
    m = lab.config(k=1).m
    variants = {f"all ({m})" if k == m else f"{k}": (dict(k=k), "agrpo") for k in sorted({1, 2, m // 2, m})}
    runs = learning(lab, "k", variants, nominal_passes(lab.config(k=2)))
    lab.finish(runs, draw_learning(runs))


def agreement(cfg, batches):
    """Mean cosine between the exact gradients of two batches of rollouts: |signal|^2 / (|signal|^2 + |noise|^2), nearly."""
    g = gradients(cfg, ["exact"], batches)[0]["exact"]
    return float(np.mean([cosine(a, b) for a, b in itertools.combinations(g, 2)]))


@experiment("about 12 minutes", "--m 4 --k 2 --updates 60 --eval_n 400", "--updates 2 --questions 3 --eval_n 20")
def order(lab):
    """Learning with every order of unmasking: evaluated as it samples, and greedily by low confidence. And how noisy the
    gradient of each is: the cosine between those of two batches of rollouts (every step, all parameters, base model)."""
    variants = {rule: (dict(unmasking=rule), "agrpo") for rule in ("random", "entropy", "max_prob")}
    variants |= {f"low_confidence, {what} scored": (dict(unmasking="low_confidence", score_discarded=all_of_it), "agrpo")
                 for what, all_of_it in (("all", True), ("kept only", False))}
    batches = 2 if lab.quick else 12
    cosines = lab.over_seeds(agreement, {label: (dict(flags, lora_r=0), batches) for label, (flags, _) in variants.items()})
    lab.note(f"cosine between the gradients of two batches of {lab.config().questions * lab.config().G} rollouts, mean over the "
             f"pairs of {batches} batches; over {len(lab.seeds)} seeds: mean [lowest, highest]")
    lab.table(("order of unmasking", "agreement"), *((label, spread(x, ".3f")) for label, x in cosines.items()))
    runs = learning(lab, "order of unmasking", variants, 0)
    lab.finish(dict(agreement=cosines, runs=runs), draw_learning(runs, compute=False))


# ---- steps ----------------------------------------------------------------------------------------------------------


def accuracy_at_every_m(cfg, updates):
    """{(m, greedy): accuracy} of --adapter, of the base model (no update), or of adapters trained here."""
    policy, data = load(cfg)
    if updates:
        train(policy, data, cfg)
    return {(m, greedy): accuracy(policy, data, cfg, m, greedy) for greedy in (True, False)
            for m in cli.that_divide(range(cfg.C, 0, -1), cfg.C, cfg.block_length, agrpo.steps_per_block)}


@experiment("about 4 minutes", "--mode eval --updates 150 --eval_n 500", "--updates 2 --questions 3 --eval_n 20")
def steps(lab):
    """Accuracy against denoising steps, base and trained: how many times fewer steps at equal accuracy?
    --adapter A,B,... takes adapters of finished runs; without it one is trained per seed."""
    cfg, given = lab.config(), (lab.config().adapter or "").split(",")
    calls = [(lab.config(adapter=None), 0)] + ([(lab.config(adapter=folder), 0) for folder in given] if given[0] else
                                               [(lab.config(seed=seed), 1) for seed in lab.seeds])
    base, *trained = lab.map(accuracy_at_every_m, calls)
    lab.note(f"held-out accuracy against denoising steps; {cfg.task}, C = {cfg.C}, n = {cfg.eval_n}; base: 95 % interval; trained "
             f"at m = {cfg.m}, {len(trained)} adapters: mean [lowest, highest]. faster: the fewest steps at which the base is as "
             "accurate, over these steps; surely: the same for the upper end of the base's interval and the lowest adapter")
    for greedy in (True, False):
        rows, ms = [], sorted(m for m, g in base if g == greedy)
        for m in ms[::-1]:
            mine = [t[m, greedy]["accuracy"] for t in trained]
            fewest = [next((b for b in ms if base[b, greedy][bound] >= goal), None)
                      for bound, goal in (("accuracy", np.mean(mine)), ("high", min(mine)))]
            b = base[m, greedy]
            rows.append((m, f"{b['accuracy']:.1%} [{b['low']:.1%}, {b['high']:.1%}]", spread(mine),
                         *(f"{f / m:.1f}x" if f else f"never, > {ms[-1] / m:.1f}x" for f in fewest)))
        lab.table(("steps, " + ("greedy" if greedy else "sampled"), "base", "trained", "faster", "surely"), *rows)

    def draw(fig):
        for ax, greedy in zip(fig.subplots(1, 2, sharey=True), (True, False)):
            ms = sorted(m for m, g in base if g == greedy)
            y, low, high = (np.array([base[m, greedy][key] for m in ms]) for key in ("accuracy", "low", "high"))
            ax.errorbar(ms, y, [y - low, high - y], fmt="o--", c="gray", ms=3, capsize=2, label="base")
            y = np.array([[t[m, greedy]["accuracy"] for t in trained] for m in ms])
            ax.plot(ms, y.mean(1), "o-", ms=3, label=f"trained at m = {cfg.m}")
            ax.fill_between(ms, y.min(1), y.max(1), alpha=0.2)
            ax.set(xscale="log", xlabel=f"denoising steps, {'greedy' if greedy else 'sampled'}", xticks=ms, xticklabels=ms)
            ax.minorticks_off()
        fig.axes[0].set_ylabel("held-out accuracy")
        fig.axes[0].legend(fontsize=7)
    name = lambda cells: {f"{m} {'greedy' if g else 'sampled'}": x for (m, g), x in cells.items()}
    lab.finish(dict(base=name(base), trained=[name(t) for t in trained]), draw)


# ---- cost -----------------------------------------------------------------------------------------------------------


PARTS = {"rollout": (agrpo, "collect_rollouts"), "reward": (tasks, "grade_batch"),       # the inner one counts:
         "forward": (agrpo, "accumulate_gradient"), "backward": (torch.Tensor, "backward"),      # reward, backward
         "optimizer": (agrpo, "optimizer_step")}


@contextmanager
def parts_timed():
    """Yields {part: seconds} that fills while the parts of an update run; the profiler sees them by the same names."""
    seconds, running, originals = dict.fromkeys(PARTS, 0.0), [], {}

    def timed(part, function):
        def wrapped(*args, **more):
            start = time.time()
            running.append(0.0)
            with torch.profiler.record_function(part):
                result = function(*args, **more)
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            spent, inner = time.time() - start, running.pop()
            seconds[part] += spent - inner
            if running:
                running[-1] += spent
            return result
        return wrapped
    for part, (owner, attribute) in PARTS.items():
        originals[part] = getattr(owner, attribute)
        setattr(owner, attribute, timed(part, originals[part]))
    try:
        yield seconds
    finally:
        for part, (owner, attribute) in PARTS.items():
            setattr(owner, attribute, originals[part])


def tensor_peaks(function, device):
    """{part: MiB of tensors at its peak, beyond those alive before}: the allocator's own records, under `parts_timed`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = logbook.read_json(Path(folder) / "trace.json")["traceEvents"]
    ranges = [(e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if e.get("cat") == "user_annotation"]
    peaks, start = dict.fromkeys(PARTS, 0.0), None
    for e in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        if e["args"]["Device Type"] != (torch.device(device).type == "cuda"):
            continue
        start = e["args"]["Total Allocated"] - e["args"]["Bytes"] if start is None else start
        inside = [(a, name) for a, b, name in ranges if a <= e["ts"] <= b and name in PARTS]
        if inside:
            part = max(inside)[1]                    # the one that began last
            peaks[part] = max(peaks[part], (e["args"]["Total Allocated"] - start) / 2**20)
    return peaks


def cost_cell(cfg, updates):
    """Mean seconds per update of each part, after one update to warm up; then its memory, in two updates of their own."""
    policy, data = load(cfg)
    cfg.updates = 1
    train(policy, data, cfg)
    cfg.updates, cfg.seed = updates, cfg.seed + 1
    with parts_timed() as seconds:
        history, _ = train(policy, data, cfg)
        seconds = {part: x / updates for part, x in seconds.items()}
        peaks = tensor_peaks(lambda: train(policy, data, replace(cfg, updates=min(2, updates))), policy.device)
    mean = lambda name: float(np.mean([h[name] for h in history]))
    live = cfg.questions * cfg.G * (1 - mean("dead_groups"))
    return dict(seconds=seconds, mebibytes=peaks, pairs=mean("pairs"), dead=mean("dead_groups"),
                passes=history[-1]["passes"] / updates, merged=max(0, 1 - mean("pairs") / max(live * cfg.k, 1)))


@experiment("about 3 minutes", "", "--questions 3")
def cost(lab):
    """Where do the seconds and the memory of an update go? One configuration per fresh process, one after the other: let
    nothing else run on the machine."""
    varied = [{}] + [dict(C=C) for C in (24, 48)] + [dict(m=m) for m in (4, 12)] + [dict(m=12, k=k) for k in (4, 12)]
    varied += [dict(G=G) for G in (4, 16)]
    varied = varied[:2] if lab.quick else varied
    cfgs = [lab.config(**swept) for swept in varied]
    cells = lab.map(cost_cell, [(cfg, 1 if lab.quick else 6) for cfg in cfgs], fresh=not lab.quick)
    label = lambda cfg: f"{cfg.C} {cfg.m} {'all' if cfg.k == cfg.m else cfg.k} {cfg.G}"
    lab.note(f"seconds per update of {cfgs[0].questions} questions; forward, backward: of the loss; passes: forward passes (a "
             "backward counts 2); pairs: (row, step) pairs of the loss; dead: groups skipped; merged: timesteps drawn twice, "
             "paid once")
    lab.table(("C m k G", *PARTS, "total", "passes", "pairs", "dead", "merged"), *(
        (label(cfg), *(f"{x['seconds'][part]:.3f}" for part in PARTS), f"{sum(x['seconds'].values()):.2f}",
         f"{x['passes']:.0f}", f"{x['pairs']:.0f}", f"{x['dead']:.0%}", f"{x['merged']:.0%}") for cfg, x in zip(cfgs, cells)))
    lab.note(f"peak memory per update, MiB of tensors beyond the model; micro-batches of {cfgs[0].micro_batch} pairs, rollouts of "
             f"{cfgs[0].rollout_batch} rows at a time")
    lab.table(("C m k G", *PARTS, "peak"), *(
        (label(cfg), *(f"{x['mebibytes'][part]:.1f}" for part in PARTS), f"{max(x['mebibytes'].values()):.1f}")
        for cfg, x in zip(cfgs, cells)))
    lab.note(f"at the defaults the rollout is {cells[0]['seconds']['rollout'] / sum(cells[0]['seconds'].values()):.0%} of an update")

    def draw(fig):
        left, right = fig.subplots(1, 2, sharey=True)
        y, start = np.arange(len(cells)), np.zeros(len(cells))
        for part in PARTS:
            x = np.array([cell["seconds"][part] for cell in cells])
            left.barh(y, x, left=start, label=part)
            start += x
        for shift, label, part in ((-0.2, "rollout", "rollout"), (0.2, "loss", "backward")):
            right.barh(y + shift, [cell["mebibytes"][part] for cell in cells], 0.4, label=label)
        left.set(xlabel="seconds per update", yticks=y, yticklabels=[f"C {c.C}, m {c.m}, k {c.k}, G {c.G}" for c in cfgs])
        right.set(xlabel="peak MiB of tensors beyond the model")
        left.invert_yaxis()
        for ax in (left, right):
            ax.legend(fontsize=7)
    lab.finish([dict(cell, C=cfg.C, m=cfg.m, k=cfg.k, G=cfg.G) for cfg, cell in zip(cfgs, cells)], draw)


# ---- signatures -----------------------------------------------------------------------------------------------------

ONE_PROBLEM = {"nums": [3, 5, 7], "target": 56}
NOISY = dict(task="sudoku", unmasking="random", m=20, questions=2, updates=100)
PROVOCATIONS = [                                     # signature, what is done to the run, flags, how
    (None, "nothing: the defaults", {}, "agrpo"),
    ("spike", "k = 1 of m = 20, uniform iid", NOISY | dict(k=1, timesteps="uniform", points="iid"), "agrpo"),
    (None, "the same with k = m", NOISY | dict(k=20), "agrpo"),
    ("spike", "weights unbounded: p_t falls with the entropy", dict(m=12, k=2, questions=2), "inverse entropy"),
    ("entropy", "one training problem, --m 1 --G 80", dict(train_file="one-problem.jsonl", m=1, questions=1, G=80, lr=1e-3),
     "agrpo"),
    ("eos", "a head in love with EOS: its bias + 30", {}, "EOS head"),
    ("dead", "rollouts alike: --m 12 --G 2 --temperature 0.1", dict(m=12, G=2, temperature=0.1), "agrpo"),
    ("clip", "--mu 8 --lr 2e-2", dict(mu=8, lr=2e-2), "agrpo"),
]


def provoke(cfg, how):
    policy, data = load(cfg)
    if how == "EOS head":                            # as LLaDA is by itself with one block for the whole completion
        policy.model.get_output_embeddings().bias.data[policy.eos_id] += 30
        how = "agrpo"
    return train(policy, data, cfg, how)[0]


@experiment("about 8 minutes", "--updates 40 --questions 10", "--updates 3 --questions 3")
def signatures(lab):
    """Provoke each failure: does the warning of agrpo.py's log (logbook.signatures) name it, and when?"""
    lab.out.mkdir(parents=True, exist_ok=True)
    logbook.write_lines(lab.out / "one-problem.jsonl", [ONE_PROBLEM])

    def adapted(flags):                              # --quick keeps sizes of its own; the file is in --out
        kept = {name: x for name, x in flags.items() if not (lab.quick and name in ("updates", "questions", "G"))}
        return kept | ({"train_file": str(lab.out / flags["train_file"])} if "train_file" in flags else {})
    provoked = lab.over_seeds(provoke, {cause: (adapted(flags), how) for _, cause, flags, how in PROVOCATIONS})
    rows, results = [], []
    for wanted, cause, flags, how in PROVOCATIONS:
        runs = provoked[cause]
        named = [next((h["update"] for h in run for kind, _ in h["warnings"] if kind == wanted), None) for run in runs]
        others = sorted({kind for run in runs for h in run for kind, _ in h["warnings"]} - {wanted})
        rows.append((wanted or "none", cause, " ".join(str(n or "-") for n in named), len(runs[0]), ", ".join(others) or "-"))
        results.append(dict(wanted=wanted, cause=cause, flags=flags, how=how, named=named, runs=runs))
    lab.note(f"the update at which the warning first came (-: never), for each of the seeds {lab.seeds}; and how many there were")
    lab.table(("signature", "provoked by", "named at update", "of", "other warnings"), *rows)
    texts = {kind: text for x in results for run in x["runs"] for h in run for kind, text in h["warnings"]}
    lab.say("", *(f"warning: {text}"[:118] for _, text in sorted(texts.items())))

    show = dict(                                     # what each warning looks at
        spike=("gradient norm / median", lambda run: [h["grad_norm"] / np.median([x["grad_norm"] for x in run]) for h in run]),
        entropy=("entropy / first", lambda run: [h["entropy"] / run[0]["entropy"] for h in run]),
        eos=("EOS in late steps", lambda run: [h["late_eos"] for h in run]),
        dead=("dead groups", lambda run: [h["dead_groups"] for h in run]),
        clip=("clipped tokens", lambda run: [h["clip_low"] + h["clip_high"] for h in run]))

    def draw(fig):
        shown = [x for x in results if x["wanted"]]
        for ax, x in zip(fig.subplots(2, -(-len(shown) // 2)).flat, shown):
            name, value = show[x["wanted"]]
            for runs, color in ((results[0]["runs"], "gray"), (x["runs"], "C0")):
                for i, run in enumerate(runs):
                    ax.plot(range(1, len(run) + 1), value(run), c=color, lw=0.8,
                            label=None if i else {"gray": "the defaults", "C0": "provoked"}[color])
            ax.axhline(logbook.WARNINGS[x["wanted"]], ls="--", lw=0.8, c="C3", label="warning")
            ax.set_title(textwrap.shorten(x["cause"], 44, placeholder=" ..."), fontsize=6)
            ax.set_ylabel(name, fontsize=7)
            ax.tick_params(labelsize=6)
            if x["wanted"] in ("spike", "entropy"):
                ax.set_yscale("log")
                ax.set_ylim(*((0.05, 100) if x["wanted"] == "spike" else (1e-3, 3)))
        fig.axes[0].legend(fontsize=5)
        fig.supxlabel("update", fontsize=7)
    lab.finish(results, draw)


# ---- command line ---------------------------------------------------------------------------------------------------


def main(argv=None):
    name, *argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name == "curves":
        return curves(argv)
    if name not in EXPERIMENTS:
        print(__doc__)
        print("On 2 idle CPU cores:", ", ".join(f"{n} {x[1]}" for n, x in EXPERIMENTS.items()))
        return 0 if name in ("-h", "--help") else 2
    lab = Lab(name, argv)
    lab.function(lab)
    return 0


if __name__ == "__main__":
    sys.exit(cli.in_one_sentence(main))
