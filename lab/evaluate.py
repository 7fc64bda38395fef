"""Evaluate a model, or an adapter beside its base model, at several numbers of denoising steps.

    bash run.sh eval --adapter runs/countdown-0/adapter --steps 12,6,2
    bash run.sh eval --preset llada --task gsm8k --steps 256,128,64 --seeds 3

Each number of steps is decoded greedily and as the rollouts sample; sampled cells are repeated
with --seeds seeds over the same problems. Every graded batch is written at once, so the same
command goes on after a kill, and may then ask for more steps, seeds or problems. Into --out
[runs/eval-TASK-SEED] go generations.jsonl (every answer and its grade) and eval.json (the
table).
"""
import contextlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]
import agrpo
import models
import run
from tasks import TaskError

# What may change from one call to the next: it changes no answer that was graded before.
FREE = {"out", "steps", "eval_n", "eval_sampled", "device", "preset", "rollout_batch",
        "micro_batch", "recompute"}


def parse(argv):
    """Flags -> (Run, number of seeds). All flags of a run, and --seeds."""
    parser = run.Parser(prog="bash run.sh eval", description=__doc__,
                        epilog="further flags: those of python lab/run.py --help")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the sampled cells [1]")
    parser.add_argument("--out", default="", help="folder [runs/eval-TASK-SEED]")
    own, rest = parser.parse_known_args(argv)
    if own.seeds < 1:
        raise TaskError(f"--seeds {own.seeds} cannot work: it starts at 1")
    cfg = run.parse([*rest, "--updates", "0"])
    cfg.out = str(Path(own.out or f"runs/eval-{cfg.task}-{cfg.seed}").expanduser())
    return cfg, own.seeds


def decodings(cfg):
    """Greedily at each of --steps, then as sampled: there and at --m, where that many fit."""
    greedy = cfg.cells()[cfg.eval_sampled:]
    steps = {cfg.m, *(how.m for how in greedy)} & {*agrpo.step_counts(cfg.C, cfg.block_length)}
    sampled = [replace(cfg.how, m=m) for m in sorted(steps, reverse=True)]
    return greedy + sampled * cfg.eval_sampled


def place(record):
    """What tells one answer of an evaluation from the others."""
    return tuple(record[name] for name in ("who", "seed", "m", "greedy", "index"))


def read_back(path):
    """{place: record} of earlier calls. A last line that a kill cut short is dropped."""
    if not path.exists():
        return {}
    whole, newline, cut = path.read_bytes().rpartition(b"\n")
    if cut:
        run.write(path, whole + newline)
    try:
        records = [json.loads(line) for line in whole.split(b"\n") if line]
        return {place(record): record for record in records}
    except (ValueError, KeyError, TypeError) as e:
        raise TaskError(f"{path} is damaged ({e}): choose another --out") from e


def refuse_other_flags(path, flags):
    """Answers of two settings must not end up in one table."""
    before = json.loads(path.read_bytes()) if path.exists() else {}
    # An adapter brings its rank along: of two differences it is the cause.
    for name in sorted(before, key=lambda name: name not in ("model", "adapter")):
        if name not in FREE and before[name] != flags.get(name):
            was = ("with other weights of the same name" if name == "weights" else
                   f"with --{name} {before[name]}, not {flags.get(name)}")
            raise TaskError(f"--out {path.parent} was evaluated {was}: repeat its flags, or "
                            "choose another --out")
    run.write(path, run.to_json(flags, indent=2))


def grade_missing(policy, data, cfg, how, cell, kept, path):
    """Write and grade the answers of one cell (who, seed, m, greedy) that `kept` lacks.

    Returns the cell's records, those of the first --eval_n problems.
    """
    who, seed, m, greedy = cell
    asked = range(min(cfg.eval_n, len(data)))
    missing = [i for i in asked if (*cell, i) not in kept]
    for start in range(0, len(missing), cfg.rollout_batch):
        batch = missing[start:start + cfg.rollout_batch]
        if sys.stderr.isatty():
            print(f"{who}, m = {m}: {start} of {len(missing)} ", end="\r", file=sys.stderr)
        # The keys of training's own evaluation: the same draws, the same numbers as its table.
        keys = [(seed, "evaluation", m, i) for i in batch]
        _, *found = agrpo.write_answers(policy, [data[i] for i in batch], keys, cfg, how)
        new = [dict(who=who, seed=seed, m=m, greedy=greedy, index=i, text=text, **asdict(grade))
               for i, text, grade in zip(batch, *found)]
        with open(path, "ab") as f:
            f.write(b"".join(map(run.to_json, new)))
        kept.update((place(record), record) for record in new)
    return [kept[(*cell, i)] for i in asked]


def summarise(seeds, how):
    """One row of the table; seeds: a list of records for each seed, over the same problems.

    Seeds repeat the problems, so the interval is the one that n problems allow.
    """
    answers = [SimpleNamespace(**record) for records in seeds for record in records]
    row = run.summarise(answers, how, n=len(seeds[0]))
    if len(seeds) > 1:
        row["sd over seeds"] = stdev(mean(r["correct"] for r in records) for records in seeds)
    return row


def main(cfg, seeds):
    """The whole evaluation -> exit code 0. Raises TaskError."""
    out = Path(cfg.out)
    with run.folder_of_my_own(out):
        data = run.load_test(cfg)
        source, policy = data.source, models.load_policy(cfg, data)
        flags = dict(asdict(cfg), weights=run.fingerprint(policy.model, adapters=True))
        refuse_other_flags(out / "config.json", flags)
        what = f"{cfg.model}, beside it --adapter {cfg.adapter}" if cfg.adapter else cfg.model
        run.say("\n".join([f"{cfg.task} by {what} | {out}", *policy.notes,
                           f"held out: {source}"]))
        data = run.short_enough(policy, data, cfg, "held-out")
        answers = out / "generations.jsonl"
        kept = read_back(answers)
        there = len(kept)
        columns = {"base": [], "trained": []} if cfg.adapter else {"base": []}
        # Without an adapter beside it a model may be base or trained: it is called model.
        run.say(run.table_head("base" if cfg.adapter else "model", trained=bool(cfg.adapter)))
        for how in decodings(cfg):
            greedy = how.temperature == 0
            for who, rows in columns.items():
                adapter_off = who == "base" and cfg.adapter
                # A greedy decoding draws nothing: one seed is like another.
                repeats = 1 if greedy else seeds
                cells = [(who, cfg.seed + i, how.m, greedy) for i in range(repeats)]
                with policy.reference() if adapter_off else contextlib.nullcontext():
                    found = [grade_missing(policy, data, cfg, how, cell, kept, answers)
                             for cell in cells]
                rows.append(summarise(found, how))
            run.say(run.table_row(*(rows[-1] for rows in columns.values())))
        table = dict(config=flags, seeds=seeds, test_data=source, **columns)
        run.write(out / "eval.json", run.to_json(table, indent=2))
        n = columns["base"][0]["n"]
        run.say(f"n = {n} problems, {seeds} seed(s) of the sampled rows; {len(kept) - there} "
                f"answers were written, {there} were there\nwritten to {out}: "
                "generations.jsonl eval.json")
    return 0


if __name__ == "__main__":
    sys.exit(run.in_one_sentence(lambda: main(*parse(sys.argv[1:]))))
