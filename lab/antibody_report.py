"""What steering did to AntiBERTy, on genes that training never saw: right, natural, different.

    python lab/antibody_report.py runs/antibody-0 runs/antibody-1 runs/antibody-2

For each run 100 answers by the base model at one residue a step, by the base model in the run's
two steps, and by the trained model in two steps. Prints a table and draws
lab/figures/antibody.png. Six minutes of one core a run; what was measured stays in the run's
folder as report.json.

    right      share of the 100 answers that pass every check
    natural    mean over an answer's residues of log p(residue | all the rest of the chain), by
               the base model, each residue masked in turn: its pseudo log-likelihood (of the
               first 40 answers)
    different  how many different loops the 100 answers have
    greedy     how many of the two genes' likeliest answers are right (a gene has only one)
"""
import contextlib
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from statistics import mean

import matplotlib
import torch

matplotlib.use("Agg")                  # no screen needed
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]
import agrpo
import models
import run
import tasks

TASK = str(ROOT / "lab" / "antibody_task.py")
WHO = {"base, 22 steps": "#8b949e", "base, 2 steps": "#d55e00", "trained, 2 steps": "#0072b2"}


@torch.no_grad()
def naturalness(policy, q, o):
    """The base model's pseudo log-likelihood per residue of one answer o (C,) to q (P,)."""
    # A copy of the chain for each residue of the answer, with [MASK] in its place.
    chain = torch.cat([q, o])
    place = torch.arange(len(q), len(chain), device=o.device)[:, None]
    copies = chain.repeat(len(o), 1).scatter(1, place, policy.mask_id)
    with policy.reference():
        logits = policy(copies, torch.ones_like(copies), place)[:, 0]           # (C, V)
    return logits.log_softmax(dim=-1).gather(1, o[:, None]).mean().item()


def measure(policy, cfg, data, m):
    """The numbers of the four columns, and the answers, of whoever `policy` is now."""
    keys = [(cfg.seed, "report", i) for i in range(len(data))]
    how = replace(cfg.how, m=m)
    traj, texts, grades = agrpo.write_answers(policy, data, keys, cfg, how)
    # The first two problems are the two genes.
    greedy = replace(how, temperature=0.0)
    _, _, best = agrpo.write_answers(policy, data[:2], keys[:2], cfg, greedy)
    texts = ["".join(text.split()) for text in texts]
    chains = list(zip(traj.q, traj.q_mask.bool(), traj.o))[:40]
    return dict(right=100 * mean(grade.correct for grade in grades),
                natural=mean(naturalness(policy, q[seen], o) for q, seen, o in chains),
                different=len({text[:11] for text in texts}),
                greedy=sum(grade.correct for grade in best), texts=texts)


def numbers(folder):
    """{who: what was measured} of a finished run."""
    path = folder / "report.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    if found.keys() >= WHO.keys():
        return found
    run.find_task(TASK)
    known = {field.name for field in fields(run.Run)}
    flags = json.loads((folder / "config.json").read_text())
    cfg = run.Run(**{name: value for name, value in flags.items() if name in known})
    data = list(tasks.load(cfg.task, "test", size=100))
    policy = models.load_policy(replace(cfg, adapter=str(folder / "adapter")), data)
    for who, m in zip(WHO, (cfg.C, cfg.m, cfg.m)):
        with policy.reference() if "base" in who else contextlib.nullcontext():
            found[who] = found.get(who) or measure(policy, cfg, data, m)
        run.write(path, run.to_json(found, indent=1))
    return found


def draw(runs, path):
    """A panel a measure: a point a run, a bar at their mean."""
    titles = dict(right="right, % of 100 answers", different="different loops among 100",
                  natural="natural, log-probability a residue")
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False,
                         "axes.spines.right": False})
    fig, axes = plt.subplots(1, 3, figsize=(8.3, 2.6), layout="constrained")
    for ax, (name, title) in zip(axes, titles.items()):
        for x, (who, color) in enumerate(WHO.items()):
            values = [found[who][name] for found in runs]
            ax.bar(x, mean(values), width=0.7, color=color, alpha=0.3)
            ax.plot([x] * len(values), values, "o", ms=4, color=color)
        ax.set(title=title, xticks=range(len(WHO)))
        ax.set_xticklabels([who.replace(", ", "\n") for who in WHO])
    fig.savefig(path, dpi=120)


def main(folders):
    runs = [numbers(Path(folder)) for folder in folders]
    print(f"{'':16}  right  natural  different  greedy")
    for who in WHO:
        for found in runs:
            right, natural, different, greedy, _ = found[who].values()
            print(f"{who:16}  {right:4.0f}%  {natural:7.2f}  {different:9}  {greedy} of 2")
    draw(runs, ROOT / "lab" / "figures" / "antibody.png")


if __name__ == "__main__":
    main(sys.argv[1:])
