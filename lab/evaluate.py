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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import agrpo

# What may change from one call to the next: it changes no answer that was graded before.
FREE = {"out", "steps", "eval_n", "eval_sampled", "device", "rollout_batch", "preset"}


def parse(argv):
    """Flags -> (Config, number of seeds). All of agrpo.py's flags, and --seeds."""
    parser = agrpo.Parser(prog="bash run.sh eval", description=__doc__,
                          epilog="further flags: those of python agrpo.py --help")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the sampled cells [1]")
    parser.add_argument("--out", default="", help="folder [runs/eval-TASK-SEED]")
    own, rest = parser.parse_known_args(argv)
    if own.seeds < 1:
        raise agrpo.UserError(f"--seeds {own.seeds} cannot work: it starts at 1")
    cfg = agrpo.parse([*rest, "--updates", "0"])
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
        agrpo.write(path, whole + newline)
    try:
        records = [json.loads(line) for line in whole.split(b"\n") if line]
        return {place(record): record for record in records}
    except (ValueError, KeyError, TypeError) as e:
        raise agrpo.UserError(f"{path} is damaged ({e}): choose another --out") from e


def refuse_other_flags(path, flags):
    """Answers of two settings must not end up in one table."""
    before = json.loads(path.read_bytes()) if path.exists() else {}
    for name in before:
        if name not in FREE and before[name] != flags.get(name):
            was = ("with other weights of the same name" if name == "weights" else
                   f"with --{name} {before[name]}, not {flags.get(name)}")
            raise agrpo.UserError(f"--out {path.parent} was evaluated {was}: repeat its flags, "
                                  "or choose another --out")
    agrpo.write(path, agrpo.to_json(flags, indent=2))


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
            f.write(b"".join(map(agrpo.to_json, new)))
        kept.update((place(record), record) for record in new)
    return [kept[(*cell, i)] for i in asked]


def summarise(seeds, how):
    """One row of the table; seeds: a list of records for each seed, over the same problems.

    Seeds repeat the problems, so the interval is the one that n problems allow.
    """
    answers = [SimpleNamespace(**record) for records in seeds for record in records]
    row = agrpo.summarise(answers, how, n=len(seeds[0]))
    if len(seeds) > 1:
        row["sd over seeds"] = stdev(mean(r["correct"] for r in records) for records in seeds)
    return row


def run(cfg, seeds):
    """The whole evaluation -> exit code 0. Raises UserError."""
    out = Path(cfg.out)
    with agrpo.folder_of_my_own(out):
        data = agrpo.load_test(cfg)
        source, policy = data.source, agrpo.load_policy(cfg)
        flags = dict(asdict(cfg), weights=agrpo.fingerprint(policy.model, adapters=True))
        refuse_other_flags(out / "config.json", flags)
        for line in (*policy.notes, f"held out: {source} | {out}"):
            agrpo.say(line)
        data = agrpo.short_enough(policy, data, cfg, "held-out")
        answers = out / "generations.jsonl"
        kept = read_back(answers)
        columns = {"base": [], "trained": []} if cfg.adapter else {"base": []}
        agrpo.say(agrpo.table_head(trained=bool(cfg.adapter)))
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
            agrpo.say(agrpo.table_row(*(rows[-1] for rows in columns.values())))
        table = dict(config=flags, seeds=seeds, test_data=source, **columns)
        agrpo.write(out / "eval.json", agrpo.to_json(table, indent=2))
        n = columns["base"][0]["n"]
        agrpo.say(f"n = {n}; written to {out}: generations.jsonl eval.json")
    return 0


if __name__ == "__main__":
    sys.exit(agrpo.in_one_sentence(lambda: run(*parse(sys.argv[1:]))))
