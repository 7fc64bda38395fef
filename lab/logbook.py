"""What a person sees of a run and what survives it: console, metrics, samples, checkpoints, summary, curve.

`agrpo.train` calls, in this order: `start` (resumes, or evaluates the base model; yields the updates still to do),
`check_ratio` once, `update_done` after each update, `finish`. Only the first process prints and writes.
"""
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch

from lab.cli import UserError, first_line, step_list, that_divide

FREE_ON_RESUME = {"resume", "out", "save_every", "sample_every", "tracker", "device", "eval_batch"}


class Logbook:
    def __init__(self, cfg, accelerator):
        self.cfg, self.accelerator = cfg, accelerator
        self.share = (accelerator.process_index, accelerator.num_processes)
        self.main, self.many = accelerator.is_main_process, accelerator.num_processes > 1
        if cfg.mode == "train" and cfg.questions % accelerator.num_processes:
            raise UserError(f"--questions {cfg.questions} cannot be shared equally by {accelerator.num_processes} "
                            "processes: choose a multiple")
        cfg.out = self.same_everywhere(choose_out(cfg) if self.main else None)
        self.out = Path(cfg.out)
        self.out.mkdir(parents=True, exist_ok=True)
        if not os.access(self.out, os.W_OK):
            raise UserError(f"--out {cfg.out} cannot be written to: choose another folder")
        self.state = dict(update=0, seconds=0.0, rollout_seconds=0.0, loss_seconds=0.0, skipped=0, base=[], evals=[],
                          history=[])
        self.stop, self.bad, self.warned, self.interrupted = False, 0, {}, False

    # ---- several processes ------------------------------------------------------------------------------------------

    def gather(self, items):
        """The lists of all processes, joined; every process gets the whole."""
        if not self.many:
            return items
        from accelerate.utils import gather_object
        return gather_object(items)

    def same_everywhere(self, value):
        return next((v for v in self.gather([value]) if v is not None), None)

    def total(self, number):
        return sum(self.gather([number]))

    @property
    def all_reduce(self):
        """Sums a tensor over the processes in place; None where there is one."""
        return torch.distributed.all_reduce if self.many else None

    def say(self, *lines):
        if self.main:
            print(*lines, sep="\n", flush=True)

    # ---- before the first update ------------------------------------------------------------------------------------

    def header(self, policy, data, notes):
        """Versions, device, seed, output folder; the effective flags, non-defaults starred; derived counts."""
        import transformers

        cfg, self.policy, self.data = self.cfg, policy, data
        where = f"cpu, {torch.get_num_threads()} threads" if policy.device.type == "cpu" else \
            f"{policy.device}, {torch.cuda.get_device_name(policy.device)}"
        self.say(f"AGRPO | torch {torch.__version__}, transformers {transformers.__version__} | {where}"
                 + (f" x {self.share[1]} processes" if self.many else "") + f" | seed {cfg.seed} | {cfg.out}")
        line = " "
        for f in fields(cfg):
            value = getattr(cfg, f.name)
            if value is None or f.name in ("out", "seed"):
                continue
            item = f"{f.name}{'*' if value != f.default else ''} {value}  "
            if len(line) + len(item) > 118:
                self.say(line)
                line = " "
            line += item
        self.say(line, "  (* not the plain default: a preset of the task, or yours)")
        if cfg.mode == "train":
            self.say(f"  {cfg.questions} questions x G {cfg.G} = {cfg.questions * cfg.G} rollouts an update; {cfg.C // cfg.m} "
                     f"tokens a step; {cfg.m} forwards write a rollout, at most k = {cfg.k} learn from it;",
                     f"  {cfg.mu} optimizer step(s) an update; training data: {data['train'].source}")
        self.say(*("  " + note for note in notes))

    def start(self, optimizer, schedule, measure):
        """Resume, or evaluate the base model; then yield the numbers of the updates to do, until Ctrl-C."""
        cfg, state = self.cfg, self.state
        self.optimizer, self.schedule, self.measure = optimizer, schedule, measure
        self.params = {n: p for n, p in self.policy.model.named_parameters() if p.requires_grad}
        self.began = time.time()
        if cfg.resume:
            state.update(self.load())
            self.say(f"resumed {self.out} after update {state['update']} of {cfg.updates}")
        else:
            self.say(f"evaluating the base model: {min(cfg.eval_n, len(self.data['test']))} held-out problems, "
                     f"{self.data['test'].source}")
            state["base"] = self.evaluate_all()
            self.say(*eval_table(state["base"]))
            state["evals"] = [dict(update=0, **self.headline(state["base"]))]
        if self.main:
            write_json(self.out / "config.json", describe(cfg))
            write_lines(self.out / "metrics.jsonl", state["history"])
            if not cfg.resume:
                self.save()
        self.before, self.first = state["seconds"], state["update"]
        previous = signal.signal(signal.SIGINT, self.interrupt)
        try:
            for update in range(self.first, cfg.updates):
                yield update
                if self.stop:
                    self.interrupted = True
                    self.say(f"interrupted after update {update + 1}, which is saved; to go on, give the same command with "
                             f"--resume --out {self.out}")
                    return
        finally:
            signal.signal(signal.SIGINT, previous)

    def interrupt(self, signum, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.stop = True
        self.say("\nCtrl-C: stopping after this update, to save it (again: stop at once, the last checkpoint stays)")

    def check_ratio(self, seen):
        """Before the first update pi_theta is pi_old: any other ratio means that rollout and loss disagree."""
        worst = max(self.gather([max(((ratio - 1).abs().max().item() for ratio, *_ in seen if ratio.numel()), default=0.0)]))
        tolerance = 1e-3 if self.policy.dtype == torch.float32 else 0.3
        self.say(f"max|ratio - 1| before the first update: {worst:.1e}")
        if not worst < tolerance:
            raise UserError(f"max|ratio - 1| is {worst:.3g} before the first update (tolerance {tolerance:g}): rollout and "
                            "loss disagree about the policy; look for dropout, padding or the model's own code")

    # ---- after each update ------------------------------------------------------------------------------------------

    def update_done(self, update, batches, grades, texts, dead, seen, dropped, **more):
        """Aggregate, print, warn, evaluate, write, save; in the order in which a reader of the log needs them."""
        cfg, state = self.cfg, self.state
        now = dict(update=update + 1, **self.metrics(batches, grades, dead, seen, dropped), **more,
                   memory_bytes=peak_memory(self.policy.device))
        if batches and update % cfg.sample_every == 0:
            self.sample(update + 1, batches[0][1], texts[0], grades[0])
        self.line(now)
        finite = math.isfinite(now["grad_norm"])
        self.bad = 0 if finite else self.bad + 1
        if not finite:
            state["skipped"] += 1
            self.say(f"    warning: update {update + 1} changed nothing, its gradient is not finite ({self.bad} in a row)")
        for kind, text in signatures(now, state["history"]):
            if update - self.warned.get(kind, -20) >= 20:
                self.warned[kind] = update
                self.say(f"    warning: {text}")
        state["history"].append(now)
        state["update"] = update + 1
        state["rollout_seconds"] += now["rollout_seconds"]
        state["loss_seconds"] += now["loss_seconds"]
        if cfg.eval_every and (update + 1) % cfg.eval_every == 0 and update + 1 < cfg.updates:
            found = self.measure(*self.headline_cell)
            state["evals"].append(dict(update=update + 1, **found))
            now["held_out"] = found["accuracy"]
            self.say(f"    held-out {interval(found)}, n = {found['n']}, m = {found['m']}, "
                     f"{'greedy' if found['greedy'] else 'sampled as the rollouts'}")
        state["seconds"] = self.before + time.time() - self.began
        if self.main:
            with open(self.out / "metrics.jsonl", "a") as f:
                f.write(json.dumps(now) + "\n")
            if (update + 1) % cfg.save_every == 0 or self.stop or update + 1 == cfg.updates:
                self.save()
        if cfg.tracker:
            if not self.accelerator.trackers:
                self.accelerator.init_trackers("agrpo", config=asdict(cfg))
            self.accelerator.log({n: v for n, v in now.items() if n != "update"}, step=update + 1)
        if self.bad == 3:
            raise UserError("three updates in a row had a gradient that is not finite: lower --lr, or look at the last lines "
                            f"of {self.out / 'metrics.jsonl'}; the weights are as they were before, in {self.out}")

    def metrics(self, batches, grades, dead, seen, dropped):
        """Averages over every row, token and micro-batch of every process, never those of the last micro-batch."""
        cfg, eos, late = self.cfg, self.policy.eos_id, max(1, self.cfg.m // 4)
        drawn = [traj.entropy[traj.pos >= 0].double() for _, traj in batches]
        ends = [(traj.tok[:, -late:] == eos)[traj.pos[:, -late:] >= 0] for _, traj in batches]
        flat = [(ratio.expand_as(filled)[filled], adv[:, None].expand_as(filled)[filled], kl[filled])
                for ratio, kl, filled, adv in seen]
        ratio, A, kl = (torch.cat(x).double() for x in zip(*flat)) if flat else (torch.ones(1).double() * 1,) * 2 + (torch.zeros(1),)
        part = dict(rows=len(grades), reward=sum(g.reward for g in grades), correct=sum(g.correct for g in grades),
                    format=sum(g.format for g in grades), dead=dead.sum().item(), dropped=dropped,
                    length=sum((traj.o != eos).sum().item() for _, traj in batches),
                    drawn=sum(len(x) for x in drawn), entropy=sum(x.sum().item() for x in drawn),
                    late=sum(len(x) for x in ends), late_eos=sum(x.sum().item() for x in ends),
                    tokens=len(ratio), kl=kl.sum().item(), forwards=len(seen), pairs=sum(len(x[0]) for x in seen),
                    clip_low=((ratio < 1 - cfg.eps) & (A < 0)).sum().item(),
                    clip_high=((ratio > 1 + cfg.eps) & (A > 0)).sum().item(),
                    ratio_min=ratio.min().item(), ratio_max=ratio.max().item(), stop=int(self.stop))
        parts = self.gather([part])
        total = {name: sum(x[name] for x in parts) for name in part}
        self.stop = total["stop"] > 0                                            # Ctrl-C for one is Ctrl-C for all
        rows, tokens = max(total["rows"], 1), total["tokens"]
        return dict(reward=total["reward"] / rows, correct=total["correct"] / rows, format=total["format"] / rows,
                    dead_groups=total["dead"] / rows, dropped_prompts=total["dropped"], length=total["length"] / rows,
                    entropy=total["entropy"] / max(total["drawn"], 1), late_eos=total["late_eos"] / max(total["late"], 1),
                    ratio_min=min(x["ratio_min"] for x in parts), ratio_max=max(x["ratio_max"] for x in parts),
                    clip_low=total["clip_low"] / tokens, clip_high=total["clip_high"] / tokens, kl=total["kl"] / tokens,
                    pairs=total["pairs"], forwards=total["forwards"])

    def line(self, x):
        """The one line per update; README, "What the log means"."""
        left = (time.time() - self.began) / (x["update"] - self.first) * (self.cfg.updates - x["update"])
        self.say(f"{x['update']:4d}/{self.cfg.updates} reward {x['reward']:.2f} right {x['correct']:3.0%} dead "
                 f"{x['dead_groups']:3.0%} H {x['entropy']:.2f} ratio {x['ratio_min']:.2f}-{x['ratio_max']:.2f} clip "
                 f"{x['clip_low']:.0%}/{x['clip_high']:.0%} |g| {x['grad_norm']:.2f} len {x['length']:.0f} "
                 f"roll {x['rollout_seconds']:.1f}s loss {x['loss_seconds']:.1f}s {x['memory_bytes'] / 2**20:.0f}M "
                 f"left {left // 60:.0f}:{left % 60:02.0f}")

    def sample(self, update, traj, text, grade):
        """One rollout half denoised and finished, and what the checker made of it."""
        show, n = self.policy.tokenizer.decode, int(traj.n[0])
        half = torch.where(traj.step_of[0] < n // 2, traj.o[0], self.policy.mask_id).tolist()
        half = " ".join("_" if i == self.policy.mask_id else show([i]).strip() for i in half)
        prompt = " ".join(show(traj.q[0][traj.q_mask[0] > 0], skip_special_tokens=True).split())
        if self.main:
            with open(self.out / "samples.jsonl", "a") as f:
                f.write(json.dumps(dict(update=update, prompt=prompt, half=half, text=text, parsed=grade.parsed,
                                        reason=grade.reason, reward=grade.reward)) + "\n")
        self.say(f"    prompt     {cut(prompt, 100)}", f"    step {n // 2}/{n}".ljust(15) + cut(half, 100),
                 f"    answer     {cut(' '.join(text.split()), 100)}",
                 f"    checker    read {cut(repr(grade.parsed), 40)}: {cut(grade.reason, 36)}, reward {grade.reward:.2f}")

    # ---- evaluation -------------------------------------------------------------------------------------------------

    @property
    def headline_cell(self):
        """(m, greedy) of the number a run is known by: as the rollouts sample, or greedy at the first of --steps."""
        return (self.cfg.m, False) if self.cfg.eval_sampled else (step_list(self.cfg)[0], True)

    def headline(self, evals):
        return next(e for e in evals if (e["m"], e["greedy"]) == self.headline_cell)

    def evaluation(self, records, m, greedy, keep=None):
        """One cell of the table from the records of this process: accuracy, interval, mean reward, further metrics."""
        records = sorted(self.gather(records), key=lambda r: r["index"])
        if keep is not None:
            keep.extend(records)
        n, right = len(records), sum(r["correct"] for r in records)
        low, high = wilson(right, n)
        known = ("index", "m", "greedy", "text", "correct", "reward", "reason", "parsed")
        more = {name: sum(r[name] for r in records) / n for name in records[0] if name not in known}
        return dict(m=m, greedy=greedy, n=n, accuracy=right / n, low=low, high=high,
                    reward=sum(r["reward"] for r in records) / n, **more)

    def cells(self):
        """Greedy at every one of --steps; as the rollouts sample at those that fit the training shape, and at m."""
        from agrpo import steps_per_block

        cfg = self.cfg
        cells = [(m, True) for m in step_list(cfg)]
        if cfg.eval_sampled and cfg.temperature > 0:
            sampled = {cfg.m, *that_divide(step_list(cfg), cfg.C, cfg.block_length, steps_per_block)}
            cells += [(m, False) for m in sorted(sampled, reverse=True)]
        return cells

    def evaluate_all(self):
        return [self.measure(m, greedy) for m, greedy in self.cells()]

    def finish_evaluation(self, measure):
        """--mode eval: the table, eval.json and every generation."""
        records, found = [], []
        for m, greedy in self.cells():
            found.append(self.evaluation(measure(m, greedy), m, greedy, records))
            if self.main and len(found) == 1:
                self.say(next(eval_table(found)))
            self.say(list(eval_table(found))[-1])
        if self.main:
            write_json(self.out / "eval.json", dict(config=describe(self.cfg), test_data=self.data["test"].source,
                                                    results=found))
            write_lines(self.out / "generations.jsonl", records)
        self.say(f"{self.data['test'].source}, n = {found[0]['n']}; written: {self.out}/eval.json and generations.jsonl")
        return 0

    # ---- the end ----------------------------------------------------------------------------------------------------

    def finish(self):
        if self.interrupted:
            return 130
        cfg, state = self.cfg, self.state
        final = self.evaluate_all()
        base, last = self.headline(state["base"]), self.headline(final)
        state["evals"] = [e for e in state["evals"] if e["update"] < cfg.updates] + [dict(update=cfg.updates, **last)]
        seconds = self.before + time.time() - self.began
        if not self.main:
            return 0
        weights = self.out / ("adapter" if cfg.lora_r else "model")
        save_weights(self.policy.model, weights)
        best = max(state["evals"], key=lambda e: e["accuracy"])
        memory = peak_memory(self.policy.device)
        write_json(self.out / "summary.json", dict(
            task=cfg.task, model=cfg.model, seed=cfg.seed, base_accuracy=base["accuracy"], final_accuracy=last["accuracy"],
            best_accuracy=best["accuracy"], best_update=best["update"], eval_n=last["n"],
            test_data=self.data["test"].source, updates=state["update"], skipped_updates=state["skipped"],
            seconds=seconds, rollout_seconds=state["rollout_seconds"], loss_seconds=state["loss_seconds"],
            peak_memory_bytes=memory, base=state["base"], final=final, evals=state["evals"]))
        draw_curve(self.out / "curve.png", state, cfg)
        busy = max(state["rollout_seconds"] + state["loss_seconds"], 1e-9) / 100
        self.say("", *eval_table(state["base"], final), "",
                 f"best held-out {best['accuracy']:.1%} (update {best['update']}), last {last['accuracy']:.1%}; {seconds:.0f} s, "
                 f"updates {state['rollout_seconds'] / busy:.0f}% rollout and {state['loss_seconds'] / busy:.0f}% loss; peak "
                 f"{memory / 2**20:.0f} MiB",
                 f"written: metrics.jsonl config.json summary.json samples.jsonl curve.png {weights.name}/",
                 f"held-out accuracy {base['accuracy']:.1%} -> {last['accuracy']:.1%} (n = {last['n']}); files in {self.out}")
        return 0

    # ---- checkpoint -------------------------------------------------------------------------------------------------

    def save(self):
        """Everything a killed run needs in one file, replaced atomically: trained parameters, optimizer, schedule and
        counters. No random states: every draw is seeded by what it is for (agrpo.row_random)."""
        blob = io.BytesIO()
        torch.save(dict(state=self.state, config=asdict(self.cfg), params=self.params,
                        optimizer=self.optimizer.state_dict(), schedule=self.schedule.state_dict()), blob)
        write_atomically(self.out / "checkpoint.pt", blob.getvalue())

    def load(self):
        path = self.out / "checkpoint.pt"
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"--resume: {path} does not exist; start the run without --resume") from None
        except Exception as e:
            raise UserError(f"--resume: {path} cannot be read ({first_line(e)}); start anew with another --out") from e
        shapes = {n: p.shape for n, p in saved["params"].items()}
        if saved["config"]["model"] != self.cfg.model or shapes != {n: p.shape for n, p in self.params.items()}:
            raise UserError(f"--resume: {path} is a checkpoint of another model ({saved['config']['model']}) than --model "
                            f"{self.cfg.model} with these adapters; give that model, or another --out")
        for name, value in asdict(self.cfg).items():
            if name not in FREE_ON_RESUME and saved["config"].get(name) != value:
                raise UserError(f"--resume: {path} was made with --{name} {saved['config'].get(name)}, not {value}; repeat "
                                "its flags (config.json beside it has them), or choose another --out")
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(saved["params"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        return saved["state"]


def choose_out(cfg):
    """runs/TASK, or the next free name; never into a folder that holds a run, unless it is to be resumed."""
    kind = cfg.task if cfg.mode == "train" else f"eval-{cfg.task}"
    if cfg.resume and cfg.out is None and cfg.mode == "train":
        runs = [p.parent for p in Path("runs").glob(f"{cfg.task}*/checkpoint.pt")]
        if not runs:
            raise UserError(f"--resume: no run of {cfg.task} under runs/; start one without --resume, or name it with --out")
        return str(max(runs, key=lambda p: (p / "checkpoint.pt").stat().st_mtime))
    if cfg.out is None:
        names = [f"runs/{kind}"] + [f"runs/{kind}-{i}" for i in range(2, 10_000)]
        return next(name for name in names if not Path(name).exists())
    if not cfg.resume and (Path(cfg.out) / "metrics.jsonl").exists() and cfg.mode == "train":
        raise UserError(f"--out {cfg.out} already holds a run: add --resume to go on with it, or choose another folder")
    return cfg.out


def cut(text, width):
    return text if len(text) <= width else text[:width // 2 - 2] + " .. " + text[-width // 2 + 2:]


def wilson(correct, n, z=1.96):
    """95 % interval of a proportion (Wilson score): sensible at 0 and n too. Returns (low, high)."""
    p, d = correct / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    middle = (p + z * z / (2 * n)) / d
    return max(0.0, middle - half), min(1.0, middle + half)


def signatures(now, past):
    """The paper's failure signatures: (kind, one line with the likely cause). now: this update; past: those before."""
    norms = sorted(x["grad_norm"] for x in past[-20:] if math.isfinite(x["grad_norm"]))
    if len(norms) >= 10 and now["grad_norm"] > 10 * norms[len(norms) // 2]:
        yield "spike", (f"gradient norm {now['grad_norm']:.3g} is over 10 times its median: k too small, or a timestep sampler "
                        "with unbounded weights")
    if past and now["entropy"] < 0.05 * past[0]["entropy"]:
        yield "entropy", (f"entropy {now['entropy']:.3g} fell from {past[0]['entropy']:.3g}: the policy has stopped exploring; "
                          "lower --lr, or stop here")
    if now["late_eos"] > 0.9:
        yield "eos", f"{now['late_eos']:.0%} of the last steps' tokens are EOS: shorten --C, or --block_length"
    if now["dead_groups"] > 0.8:
        yield "dead", (f"{now['dead_groups']:.0%} of the groups are dead (all rewards equal): problems too easy or too hard, or "
                       "--G too small")
    if now["clip_low"] + now["clip_high"] > 0.3:
        yield "clip", f"{now['clip_low'] + now['clip_high']:.0%} of the tokens are clipped: lower --lr or --mu"


def interval(e):
    return f"{e['accuracy']:.1%} [{e['low']:.1%}, {e['high']:.1%}]"


def eval_table(*columns):
    """Accuracy against steps, base beside trained. columns: lists of results of the same cells."""
    names = ["base", "trained"] if len(columns) > 1 else ["accuracy"]
    more = [k for k in columns[0][0] if k not in ("m", "greedy", "n", "accuracy", "low", "high", "reward")]
    yield f"{'steps':>6} {'sampling':<10}" + "".join(f"{name + ' [95 % interval]':>28}" for name in names) + \
        "".join(f"{name + ' ' + k:>24}" for k in more for name in names) + f"{'n':>7}"
    for cells in zip(*columns):
        yield f"{cells[0]['m']:6d} {'greedy' if cells[0]['greedy'] else 'rollout':<10}" + "".join(f"{interval(e):>28}" for e in cells) + \
            "".join(f"{e[k]:>24.3f}" for k in more for e in cells) + f"{cells[0]['n']:7d}"


def draw_curve(path, state, cfg):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    x, evals = [h["update"] for h in state["history"]], state["evals"]
    ax.plot(x, [h["correct"] for h in state["history"]], lw=0.8, alpha=0.5, label="training rollouts")
    ax.plot([e["update"] for e in evals], [e["accuracy"] for e in evals], "o-", label="held-out")
    ax.fill_between([e["update"] for e in evals], [e["low"] for e in evals], [e["high"] for e in evals], alpha=0.2)
    ax.axhline(evals[0]["accuracy"], ls="--", c="gray", label="base model")
    ax.set(xlabel="update", ylabel="accuracy", ylim=(0, 1), title=f"{cfg.task}, m = {cfg.m}, k = {cfg.k}, seed {cfg.seed}")
    ax.legend()
    blob = io.BytesIO()
    fig.savefig(blob, dpi=120)
    plt.close(fig)
    write_atomically(path, blob.getvalue())


def peak_memory(device):
    """Bytes: allocated on the GPU at the peak, or resident on the CPU at the peak."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe(cfg):
    import accelerate, peft, transformers
    return dict(asdict(cfg), versions=dict(torch=torch.__version__, transformers=transformers.__version__,
                                           peft=peft.__version__, accelerate=accelerate.__version__,
                                           python=sys.version.split()[0]))


def write_atomically(path, data):
    """Write bytes so that the file is either the old one or the new one, whenever the process dies."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(partial, path)


def write_lines(path, records):
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def write_json(path, value):
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def save_weights(model, folder):
    """The adapter, as plain peft loads it (or the whole model with --lora_r 0); the old folder goes last."""
    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    for path in (partial, old):
        shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(partial)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
