"""What a person sees of a run and what survives it: console, metrics, samples, checkpoints, summary, curve.

`agrpo.train` calls, in this order: `start` (resumes, or evaluates the base model; yields the updates still to do),
`check_ratio` and `update_done` in each update, `finish`. Only the first process prints and writes.

A killed run loses at most --save_every updates and repeats them exactly: checkpoint.pt has all that later updates depend
on, and what metrics.jsonl and samples.jsonl hold beyond it is cut off on --resume.
"""
import atexit
import contextlib
import errno
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from dataclasses import asdict, fields
from hashlib import blake2b
from pathlib import Path

import torch

from lab.cli import UserError, first_line, hush, step_list, that_divide

WIDTH = 120                                                                      # columns of the console
COLUMNS = {"update": 9, "reward": 8, "right": 7, "dead": 6, "H": 6, "ratio": 13, "clip": 9, "|g|": 8, "len": 6, "roll": 8,
           "loss": 8, "memory": 8, "left": 9}                                    # of the line per update, and their widths
FREE_ON_RESUME = {"resume", "out", "model", "save_every", "sample_every", "tracker", "device", "eval_batch"}


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
        if cfg.tracker:
            track_in(self.out, accelerator, cfg.tracker)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")                    # a model may write what a terminal cannot
        self.state = dict(update=0, seconds=0.0, rollout_seconds=0.0, loss_seconds=0.0, memory_bytes=0, base=[], evals=[],
                          history=[], samples=[])
        self.asked = self.stop = self.interrupted = self.checked = False
        self.warned, self.summary = {}, None

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
        if not self.main:
            return
        try:
            for line in lines:
                if len(line) > WIDTH:                # words, that is paths, stay whole
                    line = textwrap.fill(line, WIDTH, subsequent_indent="      ", break_long_words=False, break_on_hyphens=False)
                print(line, flush=True)
        except BrokenPipeError:                      # `| tee log` dies of the same Ctrl-C: go on and save, without a voice
            hush()

    # ---- before the first update ------------------------------------------------------------------------------------

    def header(self, policy, data, notes):
        """Versions, device, seed, output folder; the effective flags, non-defaults starred; derived counts."""
        import transformers

        cfg, self.policy, self.data = self.cfg, policy, data
        where = f"cpu, {torch.get_num_threads()} threads" if policy.device.type == "cpu" else \
            f"{policy.device}, {torch.cuda.get_device_name(policy.device)}"
        self.say(f"AGRPO | torch {torch.__version__}, transformers {transformers.__version__} | {where}"
                 + (f" x {self.share[1]} processes" if self.many else "") + f" | seed {cfg.seed} | {cfg.out}")
        line = ""
        for f in fields(cfg):
            value = getattr(cfg, f.name)
            if value is None or f.name in ("out", "seed"):
                continue
            item = f"  {f.name}{'*' if value != f.default else ''} {value}"
            if len(line + item) > WIDTH:
                self.say(line)
                line = ""
            line += item
        self.say(line, "  (* not the plain default: a preset of the task, or yours)")
        if cfg.mode == "train":
            self.say(f"  {cfg.questions} questions x G {cfg.G} = {cfg.questions * cfg.G} rollouts an update, {cfg.C // cfg.m} "
                     f"tokens a step; {cfg.m} forwards write a rollout, at most k = {cfg.k} learn from it",
                     f"  {cfg.mu} optimizer step(s) an update; training data: {data['train'].source}")
        self.say(*("  " + note for note in notes))

    def start(self, optimizer, schedule, measure):
        """Resume, or evaluate the base model; then yield the numbers of the updates to do, until Ctrl-C."""
        cfg, state = self.cfg, self.state
        self.optimizer, self.schedule, self.measure = optimizer, schedule, measure
        self.params = {n: p for n, p in self.policy.model.named_parameters() if p.requires_grad}
        self.fingerprint = fingerprint(self.policy.model)
        resumed = cfg.resume and self.load()
        if len(set(self.gather([resumed]))) > 1:
            raise UserError(f"--resume: {self.out} must be on a disk that all machines share; some see no checkpoint there")
        self.began, self.before = time.time(), state["seconds"]
        if self.main:
            write_json(self.out / "config.json", describe(cfg))
            write_lines(self.out / "metrics.jsonl", state["history"])
            write_lines(self.out / "samples.jsonl", state["samples"])
        if resumed:
            self.say(f"resumed {self.out} after update {state['update']} of {cfg.updates}"
                     + (", it is finished" if self.summary else ""))
        else:
            self.say(f"evaluating the base model: {min(cfg.eval_n, len(self.data['test']))} held-out problems, "
                     f"{self.data['test'].source}")
            state["base"] = self.evaluate_all()
            state["evals"] = [dict(update=0, **self.headline(state["base"]))]
            self.save()
        if cfg.tracker:
            self.accelerator.init_trackers("agrpo", {n: v for n, v in asdict(cfg).items() if v is not None})
        self.first, self.loop_began = state["update"], time.time()
        previous = signal.signal(signal.SIGINT, self.ask_to_stop)
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

    def ask_to_stop(self, signum, frame):
        """The handler of Ctrl-C. No print: one may be under way, and `print` must not be entered twice."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.asked = True
        with contextlib.suppress(OSError):
            os.write(2, b"\nCtrl-C: stopping after this update, to save it (again: stop at once, the last checkpoint stays)\n")

    def clock(self):
        """Seconds that this run has taken, earlier processes included."""
        return self.before + time.time() - self.began

    def check_ratio(self, seen):
        """In the first pass over rollouts pi_theta is pi_old: any other ratio means that rollout and loss disagree.
        Checked in the first update that has a ratio (with dead groups only there is none)."""
        if self.checked:
            return
        mine = [(ratio - 1).abs().max().item() for ratio, *_ in seen if ratio.numel()]
        worst = max(self.gather([max(mine, default=-1.0)]))
        if worst == -1.0:
            return
        self.checked, tolerance = True, 1e-3 if self.policy.dtype == torch.float32 else 0.3
        self.say(f"max|ratio - 1| before the first optimizer step: {worst:.1e}")
        if not worst < tolerance:
            raise UserError(f"max|ratio - 1| is {worst:.3g} before the first optimizer step (tolerance {tolerance:g}): rollout and "
                            "loss disagree about the policy; look for dropout, padding or the model's own code")

    # ---- after each update ------------------------------------------------------------------------------------------

    def update_done(self, update, batches, grades, texts, dead, seen, dropped, **more):
        """Aggregate, print, warn, evaluate, write, save; in the order in which a reader of the log needs them."""
        cfg, state = self.cfg, self.state
        now = dict(update=update + 1, **self.metrics(batches, grades, dead, seen, dropped), **more,
                   memory_bytes=peak_memory(self.policy.device))
        if batches and update % cfg.sample_every == 0:
            self.sample(update + 1, batches[0][1], texts[0], grades[0])
        if update % cfg.sample_every == 0 or update == self.first:
            self.say("".join(f"{name:>{width}}" for name, width in COLUMNS.items()))
        self.line(now)
        history = state["history"]
        finite = [math.isfinite(x["grad_norm"]) for x in (now, *reversed(history))]
        bad = finite.index(True) if True in finite else len(finite)              # in a row, this one included
        if bad:
            self.say(f"    warning: update {update + 1} changed nothing, its gradient is not finite ({bad} in a row)")
        for kind, text in signatures(now, history):
            if update - self.warned.get(kind, -20) >= 20:
                self.warned[kind] = update
                self.say(f"    warning: {text}")
        history.append(now)
        state["update"] = update + 1
        state["rollout_seconds"] += now["rollout_seconds"]
        state["loss_seconds"] += now["loss_seconds"]
        if cfg.eval_every and (update + 1) % cfg.eval_every == 0 and update + 1 < cfg.updates:
            found = self.measure(*self.headline_cell)
            state["evals"].append(dict(update=update + 1, **found))
            now["held_out"] = found["accuracy"]
            self.say(f"    held-out {interval(found)}, n = {found['n']}, {self.headline_name}")
        self.stop = self.total(int(self.asked)) > 0                              # Ctrl-C for one is Ctrl-C for all
        if self.main:
            append_line(self.out / "metrics.jsonl", now)
        if (update + 1) % cfg.save_every == 0 or self.stop or bad >= 3 or update + 1 == cfg.updates:
            self.save()
        if cfg.tracker:
            self.accelerator.log({n: v for n, v in now.items() if n != "update"}, step=update + 1)
        if bad >= 3:
            raise UserError("three updates in a row had a gradient that is not finite: start again with a lower --lr, after a "
                            f"look at the last lines of {self.out / 'metrics.jsonl'} (the weights before them are saved there)")

    def metrics(self, batches, grades, dead, seen, dropped):
        """Averages over every row, token and micro-batch of every process, never those of the last micro-batch."""
        cfg, eos, late = self.cfg, self.policy.eos_id, max(1, self.cfg.m // 4)
        drawn = [traj.entropy[traj.pos >= 0].double() for _, traj in batches]
        ends = [(traj.tok[:, -late:] == eos)[traj.pos[:, -late:] >= 0] for _, traj in batches]
        flat = [(ratio.expand_as(filled)[filled], adv[:, None].expand_as(filled)[filled], kl[filled])
                for ratio, kl, filled, adv in seen]
        ratio, A, kl = (torch.cat(x).double() for x in zip(*flat)) if flat else torch.zeros(3, 0).double()
        part = dict(rows=len(grades), reward=sum(g.reward for g in grades), correct=sum(g.correct for g in grades),
                    format=sum(g.format for g in grades), dead=dead.sum().item(), dropped=dropped,
                    length=sum((traj.o != eos).sum().item() for _, traj in batches),
                    drawn=sum(len(x) for x in drawn), entropy=sum(x.sum().item() for x in drawn),
                    late=sum(len(x) for x in ends), late_eos=sum(x.sum().item() for x in ends),
                    tokens=len(ratio), kl=kl.sum().item(), forwards=len(seen), pairs=sum(len(x[0]) for x in seen),
                    clip_low=((ratio < 1 - cfg.eps) & (A < 0)).sum().item(),
                    clip_high=((ratio > 1 + cfg.eps) & (A > 0)).sum().item(),
                    ratio_min=ratio.min().item() if len(ratio) else 1.0, ratio_max=ratio.max().item() if len(ratio) else 1.0)
        parts = self.gather([part])
        total = {name: sum(x[name] for x in parts) for name in part}
        rows, tokens = max(total["rows"], 1), max(total["tokens"], 1)
        return dict(reward=total["reward"] / rows, correct=total["correct"] / rows, format=total["format"] / rows,
                    dead_groups=total["dead"] / rows, dropped_prompts=total["dropped"], length=total["length"] / rows,
                    entropy=total["entropy"] / max(total["drawn"], 1), late_eos=total["late_eos"] / max(total["late"], 1),
                    ratio_min=min(x["ratio_min"] for x in parts), ratio_max=max(x["ratio_max"] for x in parts),
                    clip_low=total["clip_low"] / tokens, clip_high=total["clip_high"] / tokens, kl=total["kl"] / tokens,
                    pairs=total["pairs"], forwards=total["forwards"])

    def line(self, x):
        """The one line per update; README, "What the log means"."""
        left = (time.time() - self.loop_began) / (x["update"] - self.first) * (self.cfg.updates - x["update"])
        values = (f"{x['update']}/{self.cfg.updates}", f"{x['reward']:.2f}", f"{x['correct']:.0%}", f"{x['dead_groups']:.0%}",
                  f"{x['entropy']:.2f}", f"{short(x['ratio_min'])}-{short(x['ratio_max'])}",
                  f"{x['clip_low']:.0%}/{x['clip_high']:.0%}", short(x["grad_norm"]), f"{x['length']:.0f}",
                  f"{short(x['rollout_seconds'], 1)}s", f"{short(x['loss_seconds'], 1)}s", f"{x['memory_bytes'] / 2**20:.0f}M",
                  f"{left // 60:.0f}:{left % 60:02.0f}")
        self.say("".join(f"{value:>{width}}" for value, width in zip(values, COLUMNS.values())))

    def sample(self, update, traj, text, grade):
        """One rollout half denoised and finished, and what the checker made of it."""
        tokenizer, n = self.policy.tokenizer, int(traj.n[0])
        tokens, glue = token_texts(tokenizer, traj.o[0])
        half = glue.join(token if step < n // 2 else "_" for token, step in zip(tokens, traj.step_of[0].tolist()))
        prompt = tokenizer.decode(traj.q[0][traj.q_mask[0] > 0], skip_special_tokens=True)
        record = dict(update=update, prompt=prompt, half=half, text=text, parsed=grade.parsed, reason=grade.reason,
                      reward=grade.reward)
        self.state["samples"].append(record)
        if self.main:
            append_line(self.out / "samples.jsonl", record)
        self.say(f"    prompt     {cut(prompt, 100)}", f"    step {n // 2}/{n}".ljust(15) + cut(half, 100),
                 f"    answer     {cut(text, 100)}",
                 f"    checker    read {cut(repr(grade.parsed), 40)}: {cut(grade.reason, 36)}, reward {grade.reward:.2f}")

    # ---- evaluation -------------------------------------------------------------------------------------------------

    @property
    def headline_cell(self):
        """(m, greedy) of the number a run is known by: as the rollouts sample, or greedy at the first of --steps."""
        return (self.cfg.m, False) if self.cfg.eval_sampled else (step_list(self.cfg)[0], True)

    @property
    def headline_name(self):
        m, greedy = self.headline_cell
        return f"m = {m}, {'greedy' if greedy else 'sampled as the rollouts'}"

    def headline(self, evals):
        return next(e for e in evals if (e["m"], e["greedy"]) == self.headline_cell)

    def evaluation(self, records, m, greedy):
        """One cell of the table from the records of this process: accuracy, interval, mean reward, further metrics."""
        records = sorted(self.gather(records), key=lambda r: r["index"])
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

    def evaluate_all(self, base=()):
        """Every cell of the table, printed row by row; with the base model's results, those beside it."""
        found = []
        for m, greedy in self.cells():
            found.append(self.measure(m, greedy))
            head, *rows = eval_table(*([base[:len(found)]] if base else []), found)
            self.say(*([head] if len(found) == 1 else []), rows[-1])
        return found

    # ---- the end ----------------------------------------------------------------------------------------------------

    def finish(self):
        """Evaluate, write the weights, the curve and, last, summary.json: with that a run counts as finished."""
        if self.interrupted:
            return 130
        if self.summary is None:
            self.say("")
            final = self.evaluate_all(self.state["base"])
            if self.main:
                self.write_results(final)
        if self.cfg.tracker:
            self.accelerator.end_training()
        if not self.main:
            return 0
        x, weights = self.summary, self.weights.name
        busy = max(x["rollout_seconds"] + x["loss_seconds"], 1e-9) / 100
        self.say("", f"best held-out {x['best_accuracy']:.1%} (update {x['best_update']}), last {x['final_accuracy']:.1%}; "
                 f"{x['seconds']:.0f} s, updates {x['rollout_seconds'] / busy:.0f}% rollout and {x['loss_seconds'] / busy:.0f}% "
                 f"loss; peak {x['peak_memory_bytes'] / 2**20:.0f} MiB",
                 f"written: metrics.jsonl config.json summary.json samples.jsonl curve.png {weights}/",
                 f"held-out accuracy {x['base_accuracy']:.1%} -> {x['final_accuracy']:.1%} ({self.headline_name}, n = "
                 f"{x['eval_n']}); files in {self.out}")
        return 0

    @property
    def weights(self):
        return self.out / ("adapter" if self.cfg.lora_r else "model")

    def write_results(self, final):
        cfg, state = self.cfg, self.state
        base, last = self.headline(state["base"]), self.headline(final)
        state["evals"] = state["evals"] + [dict(update=cfg.updates, **last)]
        best = max(state["evals"], key=lambda e: e["accuracy"])
        save_weights(self.policy, self.weights)
        draw_curve(self.out / "curve.png", state, cfg)
        self.summary = dict(
            task=cfg.task, model=cfg.model, seed=cfg.seed, base_accuracy=base["accuracy"], final_accuracy=last["accuracy"],
            best_accuracy=best["accuracy"], best_update=best["update"], eval_n=last["n"],
            test_data=self.data["test"].source, updates=state["update"],
            skipped_updates=sum(not math.isfinite(x["grad_norm"]) for x in state["history"]),
            seconds=self.clock(), rollout_seconds=state["rollout_seconds"], loss_seconds=state["loss_seconds"],
            peak_memory_bytes=max(state["memory_bytes"], peak_memory(self.policy.device)), base=state["base"], final=final,
            evals=state["evals"])
        write_json(self.out / "summary.json", self.summary)

    # ---- checkpoint -------------------------------------------------------------------------------------------------

    def save(self):
        """Everything a killed run needs in one file, replaced atomically: trained parameters, optimizer, schedule and
        counters. No random states: every draw is seeded by what it is for (agrpo.row_random)."""
        if not self.main:
            return
        self.state["seconds"] = self.clock()
        self.state["memory_bytes"] = max(self.state["memory_bytes"], peak_memory(self.policy.device))
        blob = io.BytesIO()
        torch.save(dict(state=self.state, config=asdict(self.cfg), fingerprint=self.fingerprint, params=self.params,
                        optimizer=self.optimizer.state_dict(), schedule=self.schedule.state_dict()), blob)
        write_atomically(self.out / "checkpoint.pt", blob.getbuffer())

    def load(self):
        """Put back the last checkpoint. False if the run was killed before it wrote one: it starts from the beginning."""
        path = self.out / "checkpoint.pt"
        if not path.exists():
            self.say(f"{self.out} has no checkpoint yet: starting from the beginning")
            return False
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            state, config, params = saved["state"], saved["config"], saved["params"]
            optimizer, schedule, model = saved["optimizer"], saved["schedule"], saved["fingerprint"]
        except Exception as e:                       # whatever the readers of zip and pickle raise on damaged bytes
            raise UserError(f"--resume: {path} cannot be read ({first_line(e)}); start anew with another --out") from e
        for name, value in asdict(self.cfg).items():
            if name not in FREE_ON_RESUME and config.get(name) != value:
                raise UserError(f"--resume: {path} was made with --{name} {config.get(name)}, not {value}; repeat its flags "
                                f"({self.out / 'config.json'} has them), or choose another --out")
        shapes = [{n: p.shape for n, p in some.items()} for some in (params, self.params)]
        if model != self.fingerprint or shapes[0] != shapes[1]:
            raise UserError(f"--resume: {path} is a checkpoint of another model ({config['model']} as it was then) than --model "
                            f"{self.cfg.model}; give that model, or another --out")
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(params[name])
        self.optimizer.load_state_dict(optimizer)
        self.schedule.load_state_dict(schedule)
        self.state.update(state)
        if state["update"] == self.cfg.updates and (self.out / "summary.json").exists():
            self.summary = json.loads((self.out / "summary.json").read_text())
        return True


def choose_out(cfg):
    """Make the output folder: --out, or the next free name under runs/. Never one with a run in it but to resume that."""
    if cfg.resume and cfg.out is None:
        kind, mark = (cfg.task, "config.json") if cfg.mode == "train" else (f"eval-{cfg.task}", "eval.[jp]*")
        runs = [p for p in Path("runs").glob(f"{kind}*/{mark}") if re.fullmatch(rf"{kind}(-\d+)?", p.parent.name)]
        if not runs:
            raise UserError(f"--resume: no run of {kind} under runs/; start one without --resume, or name it with --out")
        return str(max(runs, key=lambda p: p.stat().st_mtime).parent)
    if cfg.out is None:
        kind = cfg.task if cfg.mode == "train" else f"eval-{cfg.task}"
        return next(name for i in range(1, 10_000) if make_folder(name := f"runs/{kind}" + f"-{i}" * (i > 1), new=True))
    out = Path(cfg.out)
    if cfg.resume and not out.is_dir():
        raise UserError(f"--resume: --out {out} is not there; start the run without --resume")
    holds = [name for name in ("config.json", "checkpoint.pt", "eval.json", "eval.partial") if (out / name).exists()]
    if cfg.resume and holds == ["config.json"] and "versions" not in read_json(out / "config.json"):
        raise UserError(f"--resume: --out {out} holds something else than a run; choose another folder")
    if not cfg.resume and (holds if cfg.mode == "train" else {"eval.json", "eval.partial"} & {*holds}):
        raise UserError(f"--out {out} already holds a run: add --resume to go on with it, or choose another folder")
    make_folder(out)
    return cfg.out


def make_folder(folder, new=False):
    """mkdir, and the proof that files can be written there. False if it should be new and is not.

    A folder made here goes again if the run ends before it has written anything, on a --model that is not there, say.
    """
    folder = Path(folder)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=not new)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        if new and isinstance(e, FileExistsError):
            return False
        why = "it is no folder" if isinstance(e, FileExistsError) else e.strerror
        raise UserError(f"--out {folder} cannot be written to ({why}): choose another folder") from e
    if made:
        atexit.register(remove_if_empty, folder)
    return True


def remove_if_empty(folder):
    with contextlib.suppress(OSError):
        folder.rmdir()


def track_in(out, accelerator, tracker):
    """Trackers that write files write them into the run's folder."""
    from accelerate.tracking import filter_trackers

    accelerator.project_configuration.set_directories(str(out))
    accelerator.log_with = filter_trackers(tracker, str(out))


def fingerprint(model):
    """The first numbers of every tensor of the base model, hashed: another model, or the same one trained further, has
    another. (A hash of all numbers of 8 B parameters would take minutes.)"""
    first = [p.detach().flatten()[:8].double().cpu() for name, p in model.named_parameters() if "lora_" not in name]
    return blake2b(torch.cat(first).numpy().tobytes(), digest_size=8).hexdigest()


def token_texts(tokenizer, ids):
    """Every token as text, and what to put between them: nothing, where the tokens bring their own spaces."""
    ids = ids.tolist()
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    whole = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return texts, "" if "".join(texts) == whole else " "


def cut(text, width):
    """One line of at most `width` columns: the middle left out."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= width else text[:width // 2 - 2] + " .. " + text[-width // 2 + 2:]


def printable(text):
    """Safe on a terminal: a model may write escape sequences too."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def short(x, digits=2):
    """0.29, 12.34, 1e+03: never wide."""
    return f"{x:.{digits}f}" if abs(x) < 100 else f"{x:.0f}" if abs(x) < 1000 else f"{x:.0e}"


def wilson(correct, n, z=1.96):
    """95 % interval of a proportion (Wilson score): sensible at 0 and n too. Returns (low, high)."""
    p, d = correct / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    middle = (p + z * z / (2 * n)) / d
    return max(0.0, middle - half), min(1.0, middle + half)


WARNINGS = dict(spike=10, entropy=0.05, eos=0.9, dead=0.8, clip=0.3)            # where each signature speaks up


def signatures(now, past):
    """The paper's failure signatures: (kind, one line with the likely cause). now: this update; past: those before."""
    norms = sorted([x["grad_norm"] for x in past if 0 < x["grad_norm"] < math.inf][-20:])    # 0: dead groups only
    if len(norms) >= 10 and now["grad_norm"] > WARNINGS["spike"] * norms[len(norms) // 2]:
        yield "spike", (f"gradient norm {now['grad_norm']:.3g} is over {WARNINGS['spike']} times its median: k too small, or a "
                        "timestep sampler with unbounded weights")
    if past and now["entropy"] < WARNINGS["entropy"] * past[0]["entropy"]:
        yield "entropy", (f"entropy {now['entropy']:.3g} fell from {past[0]['entropy']:.3g}: the policy has stopped exploring; "
                          "lower --lr, or stop here")
    if now["late_eos"] > WARNINGS["eos"]:
        yield "eos", f"{now['late_eos']:.0%} of the last steps' tokens are EOS: shorten --C, or --block_length"
    if now["dead_groups"] > WARNINGS["dead"]:
        yield "dead", (f"{now['dead_groups']:.0%} of the groups are dead (all rewards equal): problems too easy or too hard, or "
                       "--G too small")
    if now["clip_low"] + now["clip_high"] > WARNINGS["clip"]:
        yield "clip", f"{now['clip_low'] + now['clip_high']:.0%} of the tokens are clipped: lower --lr or --mu"


def interval(e):
    return f"{e['accuracy']:.1%} [{e['low']:.1%}, {e['high']:.1%}]"


def eval_table(*columns):
    """Accuracy against steps, base beside trained; then each further metric. columns: results of the same cells."""
    names = ["base", "trained"] if len(columns) > 1 else ["accuracy"]
    more = [k for k in columns[0][0] if k not in ("m", "greedy", "n", "accuracy", "low", "high", "reward")]
    yield f"{'steps':>6} {'sampling':<9}" + "".join(f"{name + ' [95 % interval]':>26}" for name in names) + f"{'n':>7}" + \
        "".join(f"{k:>20}" for k in more)
    for cells in zip(*columns):
        yield f"{cells[0]['m']:6d} {'greedy' if cells[0]['greedy'] else 'rollout':<9}" + \
            "".join(f"{interval(e):>26}" for e in cells) + f"{cells[0]['n']:7d}" + \
            "".join(f"{' -> '.join(format(e[k], '.3f') for e in cells):>20}" for k in more)


def save_figure(path, fig):
    """A pyplot figure as PNG, written atomically, and closed."""
    import matplotlib.pyplot as plt

    blob = io.BytesIO()
    fig.savefig(blob, dpi=120)
    plt.close(fig)
    write_atomically(path, blob.getvalue())


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
    save_figure(path, fig)


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


@contextlib.contextmanager
def naming(path):
    """A failed write does not say of which file; this does."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e


def write_atomically(path, data):
    """Write bytes so that the file is either the old one or the new one, whenever the process dies."""
    partial = path.with_name(path.name + ".partial")
    with naming(path):
        try:
            with open(partial, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)          # a full disk gets its space back
            raise


def to_json(value, **more):
    """Valid JSON: a number that is not finite becomes null (json.dumps would write NaN, which other readers refuse)."""
    def finite(x):
        if isinstance(x, dict):
            return {name: finite(v) for name, v in x.items()}
        if isinstance(x, (list, tuple)):
            return [finite(v) for v in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x
    return json.dumps(finite(value), allow_nan=False, **more) + "\n"


def append_line(path, record):
    with naming(path), open(path, "a") as f:
        f.write(to_json(record))


def write_lines(path, records):
    write_atomically(path, "".join(map(to_json, records)).encode())


def write_json(path, value):
    write_atomically(path, to_json(value, indent=2).encode())


def read_json(path):
    try:
        return json.loads(path.read_text())
    except ValueError:
        return {}


def save_weights(policy, folder):
    """The adapter, as plain peft loads it, or the whole model with --lora_r 0; the old folder goes last."""
    from safetensors import SafetensorError

    partial, old = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".old")
    for path in (partial, old):
        shutil.rmtree(path, ignore_errors=True)
    try:
        policy.model.save_pretrained(partial)
        if folder.name == "model":                   # then --model can name the folder
            policy.tokenizer.save_pretrained(partial)
    except SafetensorError as e:                     # its way to report a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(errno.ENOSPC, first_line(e), str(folder)) from e
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
