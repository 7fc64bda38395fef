"""Does it work as claimed? One command per question, on the tiny model; each prints its table.

    bash run.sh lab NAME [flags]     every flag of agrpo.py passes through: --task sudoku --m 6 ...
    --quick     a minute or less, to see that it works
    --seeds N   how many, counted from --seed [3]        --jobs N   processes of one thread each
    --show      print what is finished so far, compute nothing new
    --figures   put picture and printout into lab/figures too

An experiment is cut into pieces. Each finished piece is a line of runs/lab/NAME.jsonl, so that the
same command goes on where it was stopped; delete the file to start again. runs/lab/NAME.txt is the
printout with command, machine and versions, NAME.png the picture.

Every training here is agrpo.train itself, with the estimator of lab/estimators.py as its gradient;
what only measures gradients is a "gradient" that adds none, so that nothing moves. Compute is
counted in forward passes of one row: a denoising step of a rollout is 1, a state of the loss 3,
because a backward pass costs about two forwards.
"""
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import platform
import sys
import textwrap
import time
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]
import agrpo
import estimators
import figures
import tasks

NOTHING = agrpo.Seen(torch.zeros(0), torch.zeros(0), torch.zeros(0), 0)
EXPERIMENTS = {}                       # name -> (function, time, default flags, those of --quick)


def experiment(time, flags="", quick=""):
    """Register a function under its name."""
    def register(function):
        EXPERIMENTS[function.__name__] = (function, time, flags.split(), quick.split())
        return function
    return register


# ==============================================================================================
# One run of one experiment: flags, pieces, tables, files
# ==============================================================================================

class Lab:
    def __init__(self, name, argv):
        self.name, self.argv, self.began, self.lines = name, argv, time.time(), []
        function, minutes, flags, quick = EXPERIMENTS[name]
        parser = agrpo.Parser(prog=f"bash run.sh lab {name}", allow_abbrev=False,
                              usage="%(prog)s [--flag value ...]", description=function.__doc__,
                              epilog=f"On 2 idle CPU cores: {minutes}. Further flags are agrpo.py's; "
                                     f"defaults here: {' '.join(flags)}")
        parser.add_argument("--quick", action="store_true", help="a minute or less")
        parser.add_argument("--show", action="store_true", help="what is finished so far")
        parser.add_argument("--figures", action="store_true", help="keep it in lab/figures too")
        parser.add_argument("--seeds", type=int, help="how many, counted from --seed [3]")
        parser.add_argument("--jobs", type=int, help="processes of one thread each [one per core]")
        mine, rest = parser.parse_known_args(argv)
        self.quick, self.show, self.keep = mine.quick, mine.show, mine.figures
        # The tiny model on the CPU whatever the machine, so that numbers can be compared.
        self.flags = ["--out", "runs/lab", "--device", "cpu", "--model", "lab/tiny", *flags]
        self.flags += (quick if mine.quick else []) + rest
        cfg = self.config()
        self.out, self.jobs = Path(cfg.out), mine.jobs or (1 if mine.quick else os.cpu_count())
        seeds = mine.seeds or (2 if mine.quick else 3)
        self.seeds = [cfg.seed + i for i in range(seeds)]

    def config(self, **swept):
        """agrpo's Config from the flags and from what this experiment varies."""
        return agrpo.parse(self.flags + [f"--{name}={value}" for name, value in swept.items()])

    def tasks(self):
        """Countdown and Sudoku, unless a task was asked for or it should be quick."""
        given = self.quick or any(flag.startswith("--task") for flag in self.argv)
        return [self.config().task] if given else ["countdown", "sudoku"]

    def pieces(self, function, calls):
        """[function(*call) for call in calls], from NAME.jsonl where that has them; with --show
        None where it has not."""
        path = self.out / f"{self.name}.jsonl"
        done, keys = finished(path), [key_of(function, call) for call in calls]
        missing = [i for i, key in enumerate(keys) if key not in done]
        if missing and not self.show:
            path.parent.mkdir(parents=True, exist_ok=True)
            for n, (i, seconds, result) in enumerate(self.compute(function, calls, missing), 1):
                # Through JSON, so that a result just found is what a later run will read.
                line = json.loads(agrpo.to_json(dict(key=keys[i], what=label(function, calls[i]),
                                                     seconds=seconds, result=result)))
                with open(path, "a") as f:
                    f.write(json.dumps(line) + "\n")
                done[keys[i]] = line["result"]
                print(f"    piece {n} of {len(missing)}: {line['what']}, {seconds:.0f} s",
                      file=sys.stderr, flush=True)
        return [done.get(key) for key in keys]

    def compute(self, function, calls, missing):
        """Yields (index, seconds, result) as they are finished. One thread each: for a model this
        small, processes are quicker than threads."""
        todo = [(function, calls[i], i) for i in missing]
        if self.jobs == 1:
            yield from map(timed, todo)
            return
        with multiprocessing.get_context("spawn").Pool(min(self.jobs, len(todo)), one_thread) as pool:
            yield from pool.imap_unordered(timed, todo)

    def say(self, *lines):
        print(*lines, sep="\n", flush=True)
        self.lines += lines

    def note(self, text):
        self.say("", *textwrap.wrap(text, 118, break_on_hyphens=False))

    def table(self, head, *rows):
        """Columns as wide as their widest cell, the first one left-aligned."""
        wide = [max(len(str(cell)) for cell in column) for column in zip(head, *rows)]
        for row in (head, *rows):
            first, *others = (str(cell) for cell in row)
            cells = [cell.rjust(w) for cell, w in zip(others, wide[1:])]
            self.say("  ".join([first.ljust(wide[0]), *cells]))

    def finish(self, **pictures):
        """Write the printout and the pictures: suffix = (draw, height in inches)."""
        command = " ".join(["bash run.sh lab", self.name, *self.argv])
        folders = [self.out] + [ROOT / "lab" / "figures"] * self.keep
        seconds = sum(line["seconds"] for line in read_lines(self.out / f"{self.name}.jsonl"))
        head = [f"$ {command}", f"{max(seconds, time.time() - self.began):.0f} s of computing; "
                f"{cpu_name()}, {os.cpu_count()} cores; seeds {self.seeds}",
                ", ".join(f"{name} {version}" for name, version in agrpo.versions().items())]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            agrpo.write(folder / f"{self.name}.txt", "\n".join([*head, *self.lines, ""]).encode())
            for suffix, (draw, height) in pictures.items():
                name = f"{self.name}_{suffix}" if suffix != "plain" else self.name
                figures.save(folder / f"{name}.png", draw, height)
        print(f"\nwritten to {' and '.join(map(str, folders))}: {self.name}.txt", *pictures)


def one_thread():
    torch.set_num_threads(1)


def timed(call):
    function, arguments, i = call
    began = time.time()
    with contextlib.redirect_stdout(io.StringIO()):             # agrpo.train prints a line
        result = function(*arguments)
    return i, time.time() - began, result


def key_of(function, call):
    """Names a piece: what is computed, with which flags other than the default. Not where it is
    written, and nothing of when it is saved."""
    plain, beside = asdict(agrpo.Config()), {"out", "steps", "preset", "eval_every", "save_every"}
    told = [{name: value for name, value in asdict(x).items() if value != plain[name]
             and name not in beside} if isinstance(x, agrpo.Config) else x for x in call]
    return blake2b(repr([function.__name__, *told]).encode(), digest_size=8).hexdigest()


def label(function, call):
    cfg, *more = call
    more = [str(x) for x in more if isinstance(x, (str, int))]
    return " ".join([function.__name__, cfg.task, f"m={cfg.m} k={cfg.k} lr={cfg.lr} seed={cfg.seed}", *more])


def read_lines(path):
    """The JSON lines of a file; the last may be cut, by a kill."""
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def finished(path):
    return {line["key"]: line["result"] for line in read_lines(path)}


def cpu_name():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return [*names, platform.machine()][0]


def spread(values, form=".1%"):
    """mean [lowest, highest]; what is not there yet is said."""
    there = [v for v in values if v is not None]
    if not there:
        return "not run"
    few = f" ({len(there)} of {len(values)})" if len(there) < len(values) else ""
    return f"{np.mean(there):{form}} [{min(there):{form}}, {max(there):{form}}]{few}"


# ==============================================================================================
# The training that all experiments share
# ==============================================================================================

def load(cfg):
    """policy, training data, held-out data, trained parameters, their optimizer"""
    test = tasks.load(cfg.task, "test", file=cfg.test_file or None, **cfg.options)
    data = tasks.load(cfg.task, "train", seed=cfg.seed, file=cfg.train_file or None,
                      held_out=test, **cfg.options)
    policy = agrpo.load_policy(cfg)
    params = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=cfg.lr, betas=(0.9, 0.99), weight_decay=cfg.weight_decay)
    return policy, data, test, params, optimizer


def learn(cfg, estimator, how=None):
    """One training; held-out accuracy at five points of it, decoded as `how` [the rollouts].

    Returns evals, greedy (max_prob at the end), and means of the log's numbers over the updates.
    """
    policy, data, test, params, optimizer = load(cfg)
    how, every = how or cfg.how, max(1, cfg.updates // 4)
    history, evals, passes, seconds = [], [], 0, 0.0

    def evaluate():
        accuracy = agrpo.evaluate(policy, test, cfg, how, cfg.eval_n)
        evals.append(dict(update=len(history), passes=passes, seconds=seconds, accuracy=accuracy))

    evaluate()
    gradient = estimators.ESTIMATORS[estimator]
    for now in agrpo.train(policy, data, cfg, params, optimizer, gradient=gradient):
        history.append(now)
        passes += cfg.questions * cfg.G * cfg.m + 3 * now["pairs"]
        seconds += now["rollout_seconds"] + now["loss_seconds"]
        if now["update"] % every == 0 or now["update"] == cfg.updates:
            evaluate()
    greedy = replace(how, unmasking="max_prob", temperature=0.0)
    means = {name: float(np.mean([x[name] for x in history]))
             for name in ("pairs", "dead_groups", "rollout_seconds", "loss_seconds")}
    return dict(evals=evals, greedy=agrpo.evaluate(policy, test, cfg, greedy, cfg.eval_n),
                **means)


def last(run):
    return run and run["evals"][-1]["accuracy"]


def learning(lab, title, variants):
    """Train each of {label: (flags, estimator)} on every seed and tabulate. -> {label: [runs]}"""
    calls = [(lab.config(seed=seed, **flags), estimator)
             for flags, estimator in variants.values() for seed in lab.seeds]
    found = iter(lab.pieces(learn, calls))
    runs = {name: [next(found) for _ in lab.seeds] for name in variants}
    cfg = calls[0][0]
    lab.note(f"held-out accuracy, sampled as the rollouts are; {cfg.task}, m = {cfg.m}, n = {cfg.eval_n}, "
             f"{cfg.questions} x {cfg.G} rollouts an update, seeds {lab.seeds}: mean [lowest, highest]")
    lab.table((title, "base", "trained", "then greedily", "updates", "passes", "s/update"),
              *(learning_row(name, runs[name]) for name in variants))
    return runs


def learning_row(name, runs):
    there = [run for run in runs if run]
    if not there:
        return name, *["not run"] * 6
    ends = [run["evals"][-1] for run in there]
    updates = ends[0]["update"]
    return (name, f"{np.mean([run['evals'][0]['accuracy'] for run in there]):.1%}",
            spread([last(run) for run in runs]), spread([run and run["greedy"] for run in runs]),
            updates, f"{np.mean([end['passes'] for end in ends]):,.0f}",
            f"{np.mean([end['seconds'] for end in ends]) / updates:.2f}")


def draw_learning(runs, x="passes"):
    """Held-out accuracy of {label: [run per seed]}, lines named at their ends."""
    def draw(fig):
        ax, ends = fig.subplots(), []
        for (name, seeds), color in zip(runs.items(), itertools.cycle(figures.COLORS)):
            evals = [run["evals"] for run in seeds if run]
            if evals:
                at = np.mean([[e[x] for e in run] for run in evals], axis=0)
                y = np.array([[e["accuracy"] for e in run] for run in evals])
                figures.band(ax, at, y, color)
                ends.append((at[-1], y[:, -1].mean(), name, color))
        ax.set(ylabel="held-out accuracy",
               xlabel=dict(passes="forward passes of a row (a state of the loss: 3)").get(x, x))
        figures.name_ends(ax, ends, 0.06)
    return draw


# ==============================================================================================
# variance: how noisy is the estimate, for every timestep sampler and k? Is it unbiased?
# ==============================================================================================

def variance_cell(cfg, ms, draws):
    """Every sampler, m and k on one batch of rollouts each.

    With weights c of the pairs the estimate is sum_i c_i g_i, and c = 1 is exact:
    |g_hat - g|^2 / |g|^2 = (c - 1)' G (c - 1) / 1' G 1. Once the Gram matrix G is known, a draw
    costs nothing.
    """
    policy, data, _, params, optimizer = load(cfg)
    if cfg.lora_r:                                              # fresh LoRA has B = 0: A gets no gradient
        for _ in agrpo.train(policy, data, cfg, params, optimizer):
            pass
    found = []

    def measure(policy, traj, A, cfg, rand):
        if not A.any():
            raise agrpo.UserError("every group is dead: give another --seed or more --questions")
        pairs, gram = estimators.pair_gradients(policy, traj, A)
        norms = torch.zeros(len(A) * cfg.m, dtype=torch.float64)
        norms[pairs] = gram.diagonal().sqrt()
        toward, size = gram.sum(dim=1), gram.sum()              # g_i . g and |g|^2
        for (follow, points), k in itertools.product(estimators.SAMPLERS, sorted({1, 2, 4, 8, cfg.m})):
            if follow == "true norm":
                p = norms.view(-1, cfg.m) / norms.view(-1, cfg.m).sum(1, keepdim=True).clamp(min=1e-100)
            else:
                p = agrpo.timestep_probs(traj, follow)
            off = estimators.draw_weights(p, A, k, points, draws)[:, pairs] - 1
            square, along = ((off @ gram) * off).sum(dim=1) / size, off @ toward / size
            states = (off > -1).sum(dim=1).double().mean() / (A != 0).sum()
            found.append(dict(m=cfg.m, follow=follow, points=points, k=k, variance=square.mean().item(),
                              bias=along.mean().item(), error=along.std().item() / draws ** 0.5,
                              states=states.item()))
        return NOTHING

    for m in ms:
        torch.manual_seed(cfg.seed)
        one = replace(cfg, m=m, updates=cfg.updates + 1)
        for _ in agrpo.train(policy, data, one, params, optimizer, cfg.updates, gradient=measure):
            pass
    return found


@experiment("6 minutes", "--questions 8 --updates 20 --k 1", "--questions 3 --G 4 --updates 2")
def variance(lab):
    """Relative variance of the estimate against the exact gradient of all steps, for every timestep
    sampler, k and m. Cells: task x (all parameters of the base model | LoRA after --updates)."""
    ms, draws = dict(countdown=(4, 6, 12), sudoku=(4, 5, 10)), 50 if lab.quick else 1000
    hard = dict(sudoku=dict(unmasking="random"))                # by max_prob most groups are all right: dead
    kinds = {"base model": dict(lora_r=0), f"after {lab.config().updates} updates": {}}
    cells = {f"{task}, {kind}": dict(task=task, **hard.get(task, {}), **flags)
             for task in lab.tasks() for kind, flags in kinds.items()}
    calls = [(lab.config(seed=seed, **flags), ms.get(flags["task"], (4,))[:1 if lab.quick else 3], draws)
             for flags in cells.values() for seed in lab.seeds]
    found = iter(lab.pieces(variance_cell, calls))
    results = {cell: [next(found) or [] for _ in lab.seeds] for cell in cells}

    def get(seeds, field, sampler, m, k):
        return np.array([x[field] for found in seeds for x in found
                         if (x["follow"], x["points"], x["m"], x["k"]) == (*sampler, m, k)])

    for cell, seeds in results.items():
        at = sorted({(x["m"], x["k"]) for found in seeds for x in found if x["k"] in (2, 4) and x["k"] < x["m"]})
        lab.note(f"{cell}: relative variance |g_hat - g|^2 / |g|^2, mean over {len(seeds)} batches +- their "
                 "spread; last column: forward passes a row in the column before it, equal draws merged")
        rows = [(", ".join(sampler), *(f"{v.mean():.3f}+-{v.std():.2f}" for v in (
            get(seeds, "variance", sampler, *mk) for mk in at)),
            f"{get(seeds, 'states', sampler, *at[-1]).mean():.2f}") for sampler in estimators.SAMPLERS if at]
        lab.table(("p_t, points", *(f"m={m} k={k}" for m, k in at), "passes"), *rows)

    everything = [x for seeds in results.values() for found in seeds for x in found]
    few = [x for x in everything if x["k"] in (1, 2, 4) and x["k"] < x["m"]]

    def log_mean(sampler, price):
        return np.mean([np.log(x["variance"] * x["states"] ** price) for x in few
                        if (x["follow"], x["points"]) == sampler])
    lab.note("all of it, k in 1, 2, 4: geometric mean of the variance in units of the official sampler's (entropy, "
             "batch-strata); per pass: variance x forward passes, which merged draws save")
    base = [log_mean(("entropy", "batch-strata"), price) for price in (0, 1)]
    lab.table(("p_t, points", "variance", "per pass"), *(
        (", ".join(s), *(f"{np.exp(log_mean(s, price) - base[price]):.2f}" for price in (0, 1)))
        for s in estimators.SAMPLERS))
    z = np.array([abs(x["bias"] / x["error"]) for x in everything if x["error"] > 1e-9])
    lab.note(f"bias along g in standard errors, {len(z)} estimates: median {np.median(z):.2f} (0.67 expected of "
             f"none), beyond 2: {np.mean(z > 2):.1%} (5 %)")

    def draw(fig):
        lines = {("uniform", "iid"): "uniform, iid", ("entropy", "batch-strata"): "official",
                 ("surprise", "systematic"): "ours"}
        axes = fig.subplots(1, len(results), sharey=True, squeeze=False)[0]
        for ax, (cell, seeds) in zip(axes, results.items()):
            m, ends = max(x["m"] for x in seeds[0]), []
            ks = [k for k in (1, 2, 4, 8) if k < m]
            ax.set(xscale="log", yscale="log", xlabel="k", title=f"{cell}\nm = {m}".replace(", ", "\n"))
            for (sampler, name), color in zip(lines.items(), figures.COLORS):
                y = np.stack([get(seeds, "variance", sampler, m, k) for k in ks], axis=1)
                figures.band(ax, ks, y, color)
                ends.append((ks[-1], y[:, -1].mean(), name, color))
            ax.set_xticks(ks, ks)
            ax.minorticks_off()
        axes[0].set_ylabel("relative variance")
        fig.canvas.draw()                                       # axis limits as they will be
        figures.name_ends(axes[-1], ends, 0.07)
    lab.finish(plain=(draw, 3.2))


# ==============================================================================================
# compare: the estimators of the field against the exact gradient, and learning with each
# ==============================================================================================

CERTAIN = ("every step", "step-merge", "EGSPO", "TraceRL")      # no draws: one says all
WARM = 0.6                                                      # "another T" of the row T != 1


def directions(cfg, names, batches, draws):
    """{name: sums over the batches}, from which `angles` makes cosines, bias and variance.

    Per batch b of rollouts: g its exact gradient, e the mean of `draws` estimates on the same
    rollouts. Products of two different draws, or batches, have no noise of their own in the mean.
    """
    policy, data, _, params, optimizer = load(replace(cfg, lora_r=0))
    sums = {name: dict(dot=0.0, gg=0.0, ee=0.0, square=0.0, states=0.0, cosine=[]) for name in names}
    total = {}

    def take(name, traj, A, cfg, rand):
        seen = estimators.ESTIMATORS[name](policy, traj, A, cfg, rand)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        for p in params:
            p.grad = None
        return torch.cat([g.flatten() for g in grads]).double(), len(seen.ratio)

    def measure(policy, traj, A, cfg, rand):
        g, _ = take("every step", traj, A, cfg, rand)
        total["g"] = total.get("g", 0) + g
        for name in names:
            n = 1 if name in CERTAIN else draws
            es, states = zip(*(take(name, traj, A, cfg, rand) for _ in range(n)))
            e, square = sum(es) / n, sum(x.square().sum() for x in es).item() / n
            total[name] = total.get(name, 0) + e
            s = sums[name]
            s["dot"] += (e @ g).item()
            s["gg"] += (g @ g).item()
            # |E e|^2 without the noise: products of two different draws.
            s["ee"] += ((n * n * (e @ e).item() - n * square) / (n * n - n)) if n > 1 else square
            s["square"] += square
            s["mean_square"] = s.get("mean_square", 0.0) + (e @ e).item()
            s["states"] += sum(states) / n / len(A) / batches
            s["cosine"] += [cosine(x, g) for x in es]
        return NOTHING

    cfg = replace(cfg, updates=batches, lora_r=0)
    for _ in agrpo.train(policy, data, cfg, params, optimizer, gradient=measure):
        pass
    for name, s in sums.items():
        e, g = total[name], total["g"]
        s.update(batches=batches, across=(e @ g).item() - s["dot"], across_gg=(g @ g).item() - s["gg"],
                 across_ee=(e @ e).item() - s.pop("mean_square"))
    return sums


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


def angles(parts):
    """One estimator's numbers from the sums of one or several seeds.

    one       cosine of one estimate to the exact gradient of the same rollouts
    mean      the same for the mean of the estimates: what stays when their noise averages out
    bias      sine of that angle: |c E e - g| / |g| at the best factor c (the step size absorbs it)
    variance  E |e - E e|^2 in units of |g|^2, at the length of e where its part along g is g
    expected  cosine of the estimates' mean over rollouts to the policy gradient
    reach     cosine of one estimate to the policy gradient: bias and both noises together
    """
    s = {key: np.sum([part[key] for part in parts]) for key in parts[0] if key != "cosine"}
    mean = s["dot"] / np.sqrt(s["ee"] * s["gg"])
    gain = s["dot"] / s["gg"]
    pairs = len(parts) * parts[0]["batches"] * (parts[0]["batches"] - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = s["across"] / np.sqrt(s["across_ee"] * s["across_gg"])
        reach = s["across"] / pairs / np.sqrt(s["square"] / s["batches"] * s["across_gg"] / pairs)
    return dict(one=np.mean([c for part in parts for c in part["cosine"]]), mean=mean,
                bias=np.sqrt(max(0.0, 1 - min(mean, 1.0) ** 2)), expected=expected, reach=reach,
                variance=max(0.0, s["square"] - s["ee"]) / s["gg"] / gain ** 2,
                states=s["states"] / len(parts))


def compare_gradients(lab):
    """The tables of angles. Returns {m: {name: [part per seed]}}."""
    names = ["every step", "AGRPO", "official", *estimators.RECIPES]
    batches, draws = (2, 2) if lab.quick else (12, 2)
    ms = {4: 2} if lab.quick else {2: 1, 4: 2, 12: 4}
    found = {}
    for (m, k), warm in itertools.product(ms.items(), (False, True)):
        flags, who = dict(m=m, k=k), names
        if warm:
            flags, who = dict(flags, temperature=WARM), ["AGRPO", "scored at T = 1"]
        calls = [(lab.config(seed=seed, **flags), who, batches, draws) for seed in lab.seeds]
        parts = [part for part in lab.pieces(directions, calls) if part]
        for name in who if parts else ():
            shown = f"{name}, T = {WARM}" if warm else name
            found.setdefault(m, {})[shown] = [part[name] for part in parts]
    for m, rows in found.items():
        cfg = lab.config(m=m, k=ms[m])
        lab.note(f"m = {m}, k = {ms[m]}; {cfg.task}, all parameters of the base model, "
                 f"{len(rows['every step'])} seeds x {batches} batches of {cfg.questions * cfg.G} rollouts, {draws} draws")
        lab.table(("estimator", "states/row", "one", "mean", "bias", "variance", "var x states",
                   "expected", "reach"), *(angle_row(name, parts) for name, parts in rows.items()))
    lab.note("states/row: forward passes of the loss. Cosines to the exact gradient of the same rollouts: one, of "
             "a single estimate; mean, of the estimates' mean, so what is missing to 1 is bias (its sine). variance: "
             "noise of the estimate's own draws in units of |g|^2. Cosines to the policy gradient over other "
             "rollouts: expected, of the mean; reach, of one estimate on one batch. [lowest, highest] of the seeds")
    return found


def angle_row(name, parts):
    x, each = angles(parts), [angles([part]) for part in parts]

    def seeds(key):
        values = [e[key] for e in each]
        text = f"{x[key]:.2f} [{min(values):.2f}, {max(values):.2f}]"
        return "-" if "nan" in text else text                   # too few batches to tell
    return (name, f"{x['states']:.2f}", seeds("one"), f"{x['mean']:.3f}", f"{x['bias']:.2f}",
            f"{x['variance']:.3f}", f"{x['variance'] * x['states']:.3f}", seeds("expected"), seeds("reach"))


def draw_angles(found):
    """Dots per estimator: the mean's cosine (hollow: bias) and one estimate's (full: and noise)."""
    def draw(fig):
        names = list(next(iter(found.values())))
        axes = fig.subplots(1, len(found), sharey=True, squeeze=False)[0]
        y = np.arange(len(names))
        for ax, (m, rows) in zip(axes, found.items()):
            x = [angles(rows[name]) for name in names]
            one, mean = (np.clip([v[key] for v in x], None, 1) for key in ("one", "mean"))
            ax.hlines(y, one, mean, color=figures.FAINT, lw=1)
            ax.plot(mean, y, "o", ms=6, mfc=figures.PAPER, color=figures.COLORS[0], label="mean: its bias is left")
            ax.plot(one, y, "o", ms=6, color=figures.COLORS[1], label="one estimate: bias and noise")
            ax.set(title=f"m = {m}", xlim=(0, 1.04), yticks=y, yticklabels=names)
            ax.set_xlabel("cosine to the exact gradient")
        axes[0].invert_yaxis()
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return draw


ORDER = ["AGRPO", "ELBO", "one-step", "step-merge", "EGSPO", "coupled", "ESPO", "SPG", "RLDF", "GDPO", "wd1",
         "GDSD", "TraceRL", "official", "JustGRPO", "every step"]


def compare_learning(lab, task):
    """Learning at equal forward passes: learning rates with the first seed, the best with all."""
    names = ORDER[:2] if lab.quick else ORDER
    hard = dict(unmasking="random") if task == "sudoku" else {}
    cfg = lab.config(task=task, **hard)
    rows = cfg.questions * cfg.G
    budget = cfg.updates * rows * (cfg.m + 3 * cfg.k)
    rates = [cfg.lr] if lab.quick else [cfg.lr / 2, cfg.lr, cfg.lr * 2]

    def call(name, lr, seed):
        if name == "JustGRPO":                                  # its own way to write; evaluated as the others
            own = lab.config(task=task, lr=lr, seed=seed, block_length=1, m=cfg.C, k=1, divide_by_std=True)
            own.updates = max(1, round(budget / (rows * 4 * cfg.C)))
            return own, "every step", cfg.how
        own = lab.config(task=task, lr=lr, seed=seed, **hard)
        own.updates = max(1, round(budget / (rows * (cfg.m + 3 * estimators.forwards(name, cfg)))))
        return own, name

    first = dict(zip(itertools.product(names, rates), lab.pieces(
        learn, [call(name, lr, lab.seeds[0]) for name in names for lr in rates])))
    best = {name: max(rates, key=lambda lr: last(first[name, lr]) or -1.0) for name in names}
    others = iter(lab.pieces(learn, [call(name, best[name], seed) for name in names for seed in lab.seeds[1:]]))
    runs = {name: [first[name, best[name]]] + [next(others) for _ in lab.seeds[1:]] for name in names}
    lab.note(f"{task}: held-out accuracy after about {budget:,} forward passes (dead groups and merged steps save "
             f"some), m = {cfg.m}, n = {cfg.eval_n}, {rows} rollouts an update, LoRA, seeds {lab.seeds}: mean [lowest, "
             "highest]. lr: the best for the first seed, whose accuracies at all rates stand behind")
    lab.table(("estimator", "lr", "base", "trained", "then greedily", "updates", "passes", "s/update",
               *(f"at {lr:.2g}" for lr in rates)), *(
        (name, f"{best[name]:.2g}" if first[name, best[name]] else "-", *learning_row(name, runs[name])[1:],
         *(spread([last(first[name, lr])]).split(" [")[0] for lr in rates)) for name in names))
    return {name: seeds for name, seeds in runs.items() if any(seeds)}


def draw_final(found):
    """Accuracy at the end, a dot per seed; dashed: before training."""
    def draw(fig):
        axes = fig.subplots(1, len(found), squeeze=False)[0]
        for ax, (task, runs) in zip(axes, found.items()):
            order = sorted(runs, key=lambda name: np.mean([last(run) for run in runs[name] if run]))
            for y, name in enumerate(order):
                values = [last(run) for run in runs[name] if run]
                color = figures.COLORS[1 if name == "AGRPO" else 0]
                ax.plot(values, [y] * len(values), "o", ms=4, color=color, alpha=0.5)
                ax.plot(np.mean(values), y, "|", ms=14, mew=2, color=color)
            base = np.mean([run["evals"][0]["accuracy"] for seeds in runs.values() for run in seeds if run])
            ax.axvline(base, ls="--", lw=1, color=figures.FAINT)
            ax.set(yticks=range(len(order)), yticklabels=order, title=task, xlabel="held-out accuracy")
    return draw


@experiment("3 hours, in pieces", "--m 4 --k 2 --questions 10 --updates 60 --eval_n 400 --lr 1e-3",
            "--updates 2 --questions 3 --eval_n 20")
def compare(lab):
    """Every estimator of lab/estimators.py: cosine to the exact gradient, bias and variance apart;
    then learning at equal forward passes, each at the best of three learning rates."""
    lab.say(*textwrap.wrap("Recipes and their sources: lab/estimators.py. JustGRPO: block_length 1, every step, "
                           "divided by the group's std; its gradient is AGRPO's, exact.", 118))
    gradients = compare_gradients(lab)
    runs = {task: compare_learning(lab, task) for task in lab.tasks()}
    runs = {task: found for task, found in runs.items() if found}
    pictures = {}
    if gradients:
        pictures["plain"] = (draw_angles(gradients), 4.6)
    if runs:
        pictures["learning"] = (draw_final(runs), 3.8)
    lab.finish(**pictures)


# ==============================================================================================
# k, order, steps, cost
# ==============================================================================================

@experiment("25 minutes", "--m 12 --k 2 --updates 60 --questions 10 --eval_n 400",
            "--m 4 --updates 2 --questions 3 --eval_n 20")
def k(lab):
    """What does a larger k buy, at equal updates and at equal forward passes? The largest is every
    step: k = m points through a uniform p_t hit each step once, with weight 1."""
    cfg = lab.config()
    m, passes = cfg.m, cfg.updates * (cfg.m + 3 * cfg.k)
    all_steps = dict(k=m, follow="uniform")
    chosen = {f"{n}": dict(k=n) for n in sorted({1, 2, m // 2})} | {f"all ({m})": all_steps}
    runs = learning(lab, "k, equal updates", {name: (flags, "AGRPO") for name, flags in chosen.items()})
    equal = {name: (dict(flags, updates=max(1, round(passes / (m + 3 * flags["k"])))), "AGRPO")
             for name, flags in chosen.items()}
    runs = learning(lab, "k, equal passes", equal)
    lab.finish(plain=(draw_learning({f"k = {name}": seeds for name, seeds in runs.items()}), 3.2))


@experiment("15 minutes", "--m 4 --k 2 --updates 150 --eval_n 400", "--updates 2 --questions 3 --eval_n 20")
def order(lab):
    """Learning with every order of unmasking, evaluated as it samples, and greedily by max_prob."""
    variants = {rule: (dict(unmasking=rule), "AGRPO") for rule in agrpo.UNMASKING}
    runs = learning(lab, "order of unmasking", variants)
    lab.finish(plain=(draw_learning(runs, "update"), 3.0))


def accuracy_at_every_m(cfg, train):
    """[(m, greedy, share right)] of the model of cfg, after training it if asked to."""
    policy, data, test, params, optimizer = load(cfg)
    for _ in agrpo.train(policy, data, cfg, params, optimizer) if train else ():
        pass
    return [(how.m, name == "greedy", agrpo.evaluate(policy, test, cfg, how, cfg.eval_n))
            for name, how in cfg.cells()]


@experiment("5 minutes", "--updates 150 --eval_n 500", "--updates 2 --questions 3 --eval_n 20")
def steps(lab):
    """Accuracy against denoising steps, base and trained: how many times fewer at equal accuracy?
    --adapter A,B,... takes adapters of finished runs; without it one is trained per seed."""
    cfg = lab.config()
    folders = [folder for folder in cfg.adapter.split(",") if folder]
    calls = [(replace(cfg, adapter=""), False)]
    calls += [(replace(cfg, adapter=folder), False) for folder in folders]
    calls += [] if folders else [(lab.config(seed=seed), True) for seed in lab.seeds]
    base, *trained = ({(m, greedy): share for m, greedy, share in found or []}
                      for found in lab.pieces(accuracy_at_every_m, calls))
    n = cfg.eval_n
    lab.note(f"held-out accuracy against denoising steps; {cfg.task}, C = {cfg.C}, n = {n}; base: 95 % interval; trained "
             f"at m = {cfg.m}, {len(trained)} adapters: mean [lowest, highest]. faster: how many times more steps the base "
             "needs to be as accurate; surely: the same for the upper end of its interval and the lowest adapter")
    for greedy in (True, False):
        rows, ms = [], sorted(m for m, g in base if g == greedy)
        high = {m: agrpo.wilson(base[m, greedy] * n, n)[1] for m in ms}
        for m in reversed(ms):
            mine, low = [t.get((m, greedy)) for t in trained], agrpo.wilson(base[m, greedy] * n, n)[0]
            goals = [x for x in mine if x is not None]
            if goals:
                fast = next((b for b in ms if base[b, greedy] >= np.mean(goals)), None)
                sure = next((b for b in ms if high[b] >= min(goals)), None)
                times = [f"{b / m:.1f}x" if b else f"never, > {ms[-1] / m:.1f}x" for b in (fast, sure)]
                rows.append((m, f"{base[m, greedy]:.1%} [{low:.1%}, {high[m]:.1%}]", spread(mine), *times))
        lab.table(("steps, " + ("greedy" if greedy else "sampled"), "base", "trained", "faster", "surely"), *rows)

    def draw(fig):
        for ax, greedy in zip(fig.subplots(1, 2, sharey=True), (True, False)):
            ms = sorted(m for m, g in base if g == greedy)
            y = np.array([[t[m, greedy] for m in ms] for t in trained if t])
            ax.set(xscale="log", xlabel="denoising steps", title="greedy" if greedy else "as the rollouts sample")
            ax.plot(ms, [base[m, greedy] for m in ms], "o--", ms=3.5, color=figures.COLORS[6], label="base")
            figures.band(ax, ms, y, figures.COLORS[1], f"trained at m = {cfg.m}")
            ax.set_xticks(ms, ms)
            ax.minorticks_off()
        fig.axes[0].set_ylabel("held-out accuracy")
        fig.axes[0].legend()
    lab.finish(plain=(draw, 3.0))


@experiment("3 minutes", "--updates 6 --eval_n 1", "--updates 2 --questions 3")
def cost(lab):
    """Where do the seconds of an update go? One configuration after the other: let nothing else run
    on the machine."""
    lab.jobs = 1
    varied = [{}, *(dict(C=C) for C in (24, 48)), *(dict(m=m) for m in (4, 12)), dict(m=12, k=4),
              dict(m=12, k=12, follow="uniform"), dict(G=4), dict(G=16)]
    cfgs = [lab.config(**flags) for flags in varied[:2 if lab.quick else None]]
    lab.note(f"seconds per update of {cfgs[0].questions} questions, {torch.get_num_threads()} thread(s); passes: forward "
             "passes (a state of the loss: 3); states: (row, step) pairs of the loss; dead: groups skipped; merged: "
             "timesteps drawn twice, paid once")
    rows = []
    for cfg, run in zip(cfgs, lab.pieces(learn, [(cfg, "AGRPO") for cfg in cfgs])):
        if run:
            alive = cfg.questions * cfg.G * (1 - run["dead_groups"])
            roll, loss = run["rollout_seconds"], run["loss_seconds"]
            rows.append((f"{cfg.C} {cfg.m} {cfg.k} {cfg.G}", f"{roll:.3f}", f"{loss:.3f}", f"{roll / (roll + loss):.0%}",
                         f"{run['evals'][-1]['passes'] / cfg.updates:.0f}", f"{run['pairs']:.0f}",
                         f"{run['dead_groups']:.0%}", f"{max(0, 1 - run['pairs'] / max(1, alive * cfg.k)):.0%}"))
    lab.table(("C m k G", "rollout", "loss", "rollout's share", "passes", "states", "dead", "merged"), *rows)
    lab.finish()


# ==============================================================================================
# Pictures that explain, and finished runs in one picture
# ==============================================================================================

def some_rollout(cfg, which=3):
    """policy, trajectory of one problem, the row to show, its title"""
    policy, _, test, *_ = load(cfg)
    example = test[which]
    keys = [(cfg.seed, "picture", i) for i in range(cfg.G)]
    traj, texts, grades = agrpo.write_answers(policy, [example], keys, cfg, cfg.how)
    # A right one, and of those the one with the most to decide.
    row = max(range(len(keys)), key=lambda i: (grades[i].correct, traj.entropy[i].sum().item()))
    about = ", ".join(f"{name} {value}" for name, value in example.items() if len(str(value)) < 30)
    return policy, traj, row, f"one rollout   ({about}; reward {grades[row].reward:.0f})"


@experiment("seconds", "--m 12 --k 4 --questions 1")
def rollout(lab):
    """One rollout as a grid: step x position, what each step drew and how likely it was, p_t, the
    drawn steps with their weights."""
    cfg = lab.config()
    policy, traj, row, title = some_rollout(cfg)
    p = agrpo.timestep_probs(traj, cfg.follow)[row:row + 1]
    offset = agrpo.row_random([(cfg.seed, "picture")])(1, 1)
    _, steps, w = agrpo.sample_timesteps(p, cfg.k, offset)
    names = figures.token_names(policy, traj.o[row])
    drawn = dict(zip(steps.tolist(), w.tolist()))
    lab.say(title, " ".join(names))
    lab.table(("step", "drew", "log p", "p_t", "w"), *(
        (t, " ".join(names[c] for c in range(cfg.C) if traj.step_of[row, c] == t),
         f"{agrpo.per_step(traj, traj.logp_old)[row, t]:.2f}", f"{p[0, t]:.3f}", f"{drawn.get(t, 0):.2f}")
        for t in range(cfg.m)))
    lab.finish(plain=(lambda fig: figures.rollout_grid(fig, traj, row, names, p[0].tolist(), drawn, title), 4.2))


@experiment("seconds", "--m 4 --k 2 --questions 1")
def masks(lab):
    """Which states one-step, ELBO and AGRPO score, of one rollout: strips of masks."""
    cfg = lab.config()
    policy, traj, row, title = some_rollout(cfg)
    A = torch.ones(len(traj.o), dtype=torch.float64)
    rand = agrpo.row_random([(cfg.seed, "masks", i) for i in range(len(A))])
    recipes = {"one-step: everything masked, everything scored": (estimators.one_step, cfg),
               f"ELBO, k = {cfg.k}: random tokens masked and scored, weighed by L / l": (estimators.elbo, cfg),
               f"AGRPO, all m = {cfg.m} steps: the states that were there, what each drew":
                   (estimators.step_merge, replace(cfg, k=cfg.m))}
    strips = []
    for name, (recipe, its) in recipes.items():
        states = recipe(policy, traj, A, its, rand)
        strips.append((name, states.hidden[row], states.w[row] / estimators.unit(traj)))
        lab.say(name)
        for hidden, w in zip(*strips[-1][1:]):
            lab.say("    " + " ".join(f"{x:4.1f}" if x else " [M]" if h else "   ." for h, x in zip(hidden, w)))
    names = figures.token_names(policy, traj.o[row])
    lab.finish(plain=(lambda fig: figures.mask_strips(fig, strips, names), 3.6))


def curves(argv):
    """bash run.sh lab curves runs/countdown-0 runs/countdown-1 ...: the finished runs of each task
    in one panel, seeds shaded."""
    parser = agrpo.Parser(prog="bash run.sh lab curves", allow_abbrev=False, description=curves.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="of finished runs; seeds are pooled")
    parser.add_argument("--figures", action="store_true", help="keep it in lab/figures too")
    parser.add_argument("--out", type=Path, default=Path("runs/lab"))
    args, panels = parser.parse_args(argv), {}
    for folder in args.folders:
        if not (folder / "summary.json").is_file():
            raise agrpo.UserError(f"{folder} has no summary.json: curves wants folders of finished runs, "
                                  "as runs/countdown-0")
        run = json.loads((folder / "summary.json").read_text())
        panels.setdefault(f"{run['task']}, m = {run['evals'][0]['m']}", []).append(run["evals"])

    def draw(fig):
        for ax, (title, runs) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items()):
            x = [e["update"] for e in min(runs, key=len)]
            y = np.array([np.interp(x, [e["update"] for e in run], [e["accuracy"] for e in run]) for run in runs])
            figures.band(ax, x, y, figures.COLORS[1])
            ax.axhline(y[:, 0].mean(), ls="--", lw=1, color=figures.FAINT)
            ax.set(title=f"{title}, {len(runs)} seed(s); dashed: the base model", ylim=(0, 1),
                   xlabel="update", ylabel="held-out accuracy")
    for folder in [args.out] + [ROOT / "lab" / "figures"] * args.figures:
        figures.save(folder / "curves.png", draw, 3.0)
    for title, runs in panels.items():
        print(f"{title}: {spread([run[0]['accuracy'] for run in runs])} -> "
              f"{spread([run[-1]['accuracy'] for run in runs])}, {len(runs)} seed(s): mean [lowest, highest]")
    print(f"written: {args.out}/curves.png")
    return 0


def main(argv=None):
    name, *argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name == "curves":
        return curves(argv)
    if name not in EXPERIMENTS:
        print(__doc__)
        for each, (function, minutes, *_) in EXPERIMENTS.items():
            print(f"  {each:<11} {minutes:<19} {' '.join(function.__doc__.split())[:84]}")
        print("  curves      seconds             finished runs in one picture: lab curves runs/countdown-0 ...")
        print("\nTimes on 2 idle CPU cores.")
        return 0 if name in ("-h", "--help") else 2
    lab = Lab(name, argv)
    EXPERIMENTS[name][0](lab)
    return 0


if __name__ == "__main__":
    sys.exit(agrpo.in_one_sentence(main))
