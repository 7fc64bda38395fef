"""`--mode eval`: the base model or an adapter, or one beside the other, at several numbers of steps, over several seeds.

    bash run.sh eval --task gsm8k --adapter runs/gsm8k/adapter --beside_base --steps 256,128,64,32,16

Every graded batch is written at once, by each process to a file of its own in eval.partial/; --resume goes on from there,
with any number of processes, and may ask for more steps, seeds or problems. Written at the end: generations.jsonl (every
completion), eval.json (the table, the flags) and eval.png (accuracy against steps).
"""
import contextlib
import json
import math
import shutil
from dataclasses import asdict, replace

from lab.cli import UserError, step_list
from lab.logbook import (FREE_ON_RESUME, append_line, describe, eval_table, read_json, save_figure, wilson, write_json,
                         write_lines)

MORE = FREE_ON_RESUME | {"steps", "seeds", "eval_n", "beside_base"}              # what a resumed evaluation may change
NOT_METRICS = {"who", "seed", "index", "m", "greedy", "text", "correct", "reward", "reason", "parsed"}


class Kept:
    """The records of an evaluation, on disk from the moment they exist."""

    def __init__(self, book):
        self.book, self.folder, self.records = book, book.out / "eval.partial", {}
        if book.cfg.resume:
            self.recover()
        self.folder.mkdir(parents=True, exist_ok=True)           # every process: machines may have disks of their own
        if book.main:
            write_json(self.folder / "config.json", describe(book.cfg))
            write_lines(self.folder / "before.jsonl", self.records.values())
        book.total(0)                                # all have read the old parts, and they are in before.jsonl
        self.part = self.folder / f"part-{book.share[0]}.jsonl"
        self.part.unlink(missing_ok=True)

    def recover(self):
        """Read what an earlier process wrote, if its flags were these; a line cut short by its end is dropped."""
        out, cfg = self.book.out, self.book.cfg
        before = {}
        if (self.folder / "config.json").exists():
            before = read_json(self.folder / "config.json")
        elif (out / "eval.json").exists():
            before = read_json(out / "eval.json").get("config", {})
        for name, value in asdict(cfg).items():
            if before and name not in MORE and before.get(name) != value:
                raise UserError(f"--resume: the evaluation in {out} was made with --{name} {before.get(name)}, not {value}; "
                                "repeat its flags, or choose another --out")
        for path in [*self.folder.glob("*.jsonl"), out / "generations.jsonl"]:
            for line in path.read_text().splitlines() if path.exists() else ():
                with contextlib.suppress(ValueError):
                    self.keep(json.loads(line))

    def keep(self, record):
        self.records[tuple(record[name] for name in ("who", "seed", "m", "greedy", "index"))] = record

    def have(self, *cell):
        return {key[-1] for key in self.records if key[:-1] == cell}

    def add(self, who, seed, records):
        for record in records:
            record = dict(who=who, seed=seed, **record)
            self.keep(record)
            append_line(self.part, record)

    def cell(self, *cell):
        """All processes' records of one cell, by problem."""
        mine = [record for key, record in self.records.items() if key[:-1] == cell]
        found = {record["index"]: record for record in self.book.gather(mine)}
        for record in found.values():
            self.keep(record)
        return [found[i] for i in sorted(found) if i < self.book.cfg.eval_n]


def summarise(runs, m, greedy, spread):
    """One row of the table from the records of each seed. The interval is over problems: seeds repeat the same ones."""
    n, right = len(runs[0]), [sum(r["correct"] for r in records) for records in runs]
    mean = lambda values: sum(values) / len(values)
    accuracy = mean(right) / n
    low, high = wilson(accuracy * n, n)
    everyone = [record for records in runs for record in records]
    more = {name: mean([r[name] for r in everyone]) for name in everyone[0] if name not in NOT_METRICS}
    if spread:                                       # greedy: one is like another
        more["sd over seeds"] = math.sqrt(sum((x / n - accuracy) ** 2 for x in right) / max(1, len(right) - 1))
    reward = mean([r["reward"] for r in everyone])
    return dict(m=m, greedy=greedy, n=n, accuracy=accuracy, low=low, high=high, reward=reward, **more)


def run(cfg, policy, data, book, evaluate):
    """The whole of --mode eval. evaluate: agrpo's, of which every process does its share."""
    kept, columns = Kept(book), []
    whos = ["base", "trained"] if cfg.adapter and cfg.beside_base else ["trained" if cfg.adapter else "base"]
    for who in whos:
        columns.append([])
        plain = policy.model.disable_adapter if who == "base" and cfg.adapter else contextlib.nullcontext
        for m, greedy in book.cells():
            seeds = [cfg.seed] if greedy else range(cfg.seed, cfg.seed + cfg.seeds)
            for seed in seeds:
                with plain():
                    evaluate(policy, data, replace(cfg, seed=seed), m, greedy, book.share,
                             skip=kept.have(who, seed, m, greedy), write=lambda records: kept.add(who, seed, records))
            columns[-1].append(summarise([kept.cell(who, seed, m, greedy) for seed in seeds], m, greedy, cfg.seeds > 1))
            head, *rows = eval_table(*(column[:len(columns[-1])] for column in columns))
            book.say(*([head] if len(columns[-1]) == 1 else []), rows[-1])
    if book.main:
        write_lines(book.out / "generations.jsonl", sorted(kept.records.values(), key=lambda r: (
            r["who"], r["seed"], -r["m"], not r["greedy"], r["index"])))
        results = dict(zip(("base", "results"), columns)) if len(columns) > 1 else dict(results=columns[0])
        write_json(book.out / "eval.json", dict(config=describe(cfg), test_data=data.source, **results))
        draw(book.out / "eval.png", cfg, dict(zip(whos, columns)))
        shutil.rmtree(kept.folder)
    book.say(f"{data.source}, n = {columns[0][0]['n']}; written: {book.out}/eval.json, generations.jsonl and eval.png")
    return 0


def draw(path, cfg, columns):
    """Accuracy against denoising steps: greedy and as the rollouts sample, base dashed, trained solid."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for who, found in columns.items():
        for greedy in sorted({e["greedy"] for e in found}):
            cells = sorted((e for e in found if e["greedy"] == greedy), key=lambda e: e["m"])
            error = [[max(0, e["accuracy"] - e["low"]) for e in cells], [max(0, e["high"] - e["accuracy"]) for e in cells]]
            ax.errorbar([e["m"] for e in cells], [e["accuracy"] for e in cells], error, capsize=2, marker="o",
                        ls="--" if who == "base" else "-", label=f"{who}, {'greedy' if greedy else 'sampled'}")
    steps = step_list(cfg)
    ax.set_xscale("log", base=2)
    ax.set_xticks(steps, steps)
    n = next(iter(columns.values()))[0]["n"]
    ax.set(xlabel="denoising steps m", ylabel="accuracy", ylim=(0, 1), title=f"{cfg.task}, {n} problems")
    ax.legend()
    save_figure(path, fig)
