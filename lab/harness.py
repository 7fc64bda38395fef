"""What the experiments share and that is no experiment: flags, processes, tables, files, pictures."""
import multiprocessing
import os
import platform
import shutil
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch

import agrpo
from lab import cli, logbook
from lab.cli import UserError

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = {}                       # name -> (function, time on 2 idle cores, default flags, further flags of --quick)


def experiment(minutes, flags="", quick=""):
    """Register a function under its name (a trailing _ left out)."""
    def register(function):
        EXPERIMENTS[function.__name__.strip("_")] = (function, minutes, flags.split(), quick.split())
        return function
    return register


class Lab:
    """One run of one experiment."""

    def __init__(self, name, argv):
        self.name, self.argv = name, argv
        self.function, minutes, flags, quick = EXPERIMENTS[name]
        parser = cli.Parser(
            prog=f"bash run.sh lab {name}", allow_abbrev=False, usage="%(prog)s [--flag value ...]",
            description=self.function.__doc__,
            epilog=f"On 2 idle CPU cores: {minutes}. Further flags are agrpo.py's; defaults here: {' '.join(flags)}")
        parser.add_argument("--quick", action="store_true", help="a minute or less, to see that it works")
        parser.add_argument("--seeds", type=int, help="how many, counted from --seed [3]")
        parser.add_argument("--jobs", type=int, help="processes of one thread each [one per core]")
        parser.add_argument("--figures", action="store_true", help="copy picture and tables to lab/figures")
        args, rest = parser.parse_known_args(argv)
        self.quick, self.figures = args.quick, args.figures
        # The tiny model on the CPU whatever the machine, so that numbers can be compared.
        self.flags = ["--out", "runs/lab", "--device", "cpu", "--model", agrpo.TINY, "--questions", "20"] + flags + \
            (quick if args.quick else []) + rest
        cfg = self.config()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.jobs = args.jobs or (1 if args.quick or cfg.device != "cpu" else cores)
        self.seeds = [cfg.seed + i for i in range(args.seeds or (2 if args.quick else 3))]
        self.out, self.lines, self.began = Path(cfg.out), [], time.time()

    def config(self, **swept):
        """agrpo's Config from the flags, with what this experiment varies."""
        cfg = cli.parse(agrpo.Config, self.flags)
        for name, value in swept.items():
            setattr(cfg, name, value)
        cli.fill(cfg, agrpo.PRESETS, {})
        cli.check(cfg, agrpo.steps_per_block)
        return cfg

    def map(self, function, calls, fresh=False):
        """[function(*call) for call in calls], on --jobs processes of one thread each: for a model this small that is
        quicker than threads. fresh: a new process, all threads, per call, one at a time, to measure time and memory."""
        if fresh:
            self.jobs = 1
        elif self.jobs == 1:
            return [function(*call) for call in calls]
        with multiprocessing.get_context("spawn").Pool(min(self.jobs, len(calls)), start_worker, (fresh,),
                                                       1 if fresh else None) as pool:
            return [result.get() for result in [pool.apply_async(function, call) for call in calls]]

    def over_seeds(self, function, variants):
        """{label: (flags, *more)} -> {label: [function(config of flags and seed, *more) for every seed]}."""
        done = iter(self.map(function, [(self.config(seed=seed, **flags), *more) for flags, *more in variants.values()
                                        for seed in self.seeds]))
        return {label: [next(done) for _ in self.seeds] for label in variants}

    def say(self, *lines):
        print(*lines, sep="\n", flush=True)
        self.lines += lines

    def note(self, text):
        self.say("", *textwrap.wrap(text, 118, break_on_hyphens=False))

    def table(self, head, *rows):
        """Columns as wide as their widest cell, the first one left-aligned."""
        wide = [max(len(str(x)) for x in column) for column in zip(head, *rows)]
        for row in (head, *rows):
            self.say("  ".join(str(x).rjust(w) if i else str(x).ljust(w) for i, (x, w) in enumerate(zip(row, wide))))

    def finish(self, results, draw):
        """runs/lab/NAME.json and NAME.png, and the tables as text beside a figure that is kept. draw(fig) fills it."""
        command, seconds = "bash run.sh lab " + " ".join([self.name, *self.argv]), time.time() - self.began
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        record = dict(command=command, seeds=self.seeds, seconds=seconds, table=self.lines, results=results,
                      hardware=dict(cpu=cpu_name(), cores=os.cpu_count(), gpu=gpu, processes=self.jobs),
                      config=logbook.describe(self.config()))
        picture(self.out / f"{self.name}.png", draw, self.figures)
        logbook.write_json(self.out / f"{self.name}.json", record)
        if self.figures:
            logbook.write_atomically(ROOT / "lab" / "figures" / f"{self.name}.txt", report(record).encode())
        self.note(f"{command}: {seconds:.0f} s; written: {self.out / self.name}.json and .png")


def start_worker(all_threads):
    sys.stdout = open(os.devnull, "w")               # the parent prints
    if not all_threads:
        torch.set_num_threads(1)


def cpu_name():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(record):
    """What a run printed, under its command, machine and versions: lab/figures/NAME.txt."""
    machine = "{cpu}, {cores} cores, processes: {processes}".format(**record["hardware"])
    versions = ", ".join(f"{name} {version}" for name, version in record["config"]["versions"].items())
    return "\n".join([f"$ {record['command']}", f"{record['seconds']:.0f} s, {machine}; {versions}", *record["table"], ""])


def picture(path, draw, keep=False):
    """draw(fig) on a new figure, saved; keep: also into lab/figures, which README shows."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig = plt.figure(figsize=(8, 3.4), layout="constrained")
    draw(fig)
    path.parent.mkdir(parents=True, exist_ok=True)
    logbook.save_figure(path, fig)
    if keep:
        (ROOT / "lab" / "figures").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, ROOT / "lab" / "figures")


def spread(values, form=".1%"):
    """mean [lowest, highest]"""
    return f"{np.mean(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def draw_runs(ax, runs, x="update"):
    """Held-out accuracy of {label: [one list of evaluations per seed]}: mean, band from the lowest to the highest seed, as
    far as every seed got; the model before training dashed."""
    for label, seeds in runs.items():
        end = min(evals[-1][x] for evals in seeds)
        grid = np.unique(np.clip([e[x] for evals in seeds for e in evals], 0, end))
        y = np.stack([np.interp(grid, [e[x] for e in evals], [e["accuracy"] for e in evals]) for evals in seeds])
        line, = ax.plot(grid, y.mean(0), "o-", ms=3, label=label)
        ax.fill_between(grid, y.min(0), y.max(0), alpha=0.15, color=line.get_color())
        ax.axhline(y[:, 0].mean(), ls="--", lw=0.8, color=line.get_color())
    ax.set(xlabel={"update": "update (dashed: before training)", "passes": "forward passes (a backward counts 2)"}[x],
           ylabel="held-out accuracy")
    ax.locator_params(axis="x", nbins=5)
    ax.legend(fontsize=7)


def curves(argv):
    """bash run.sh lab curves runs/countdown runs/countdown-2 ...: the finished runs of each task in one panel."""
    parser = cli.Parser(prog="bash run.sh lab curves", allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, help="of finished runs; seeds of one task are pooled")
    parser.add_argument("--figures", action="store_true", help="copy the picture to lab/figures")
    parser.add_argument("--out", type=Path, default=Path("runs/lab"))
    args, panels = parser.parse_args(argv), {}
    for folder in args.folders:
        if not (folder / "summary.json").is_file():
            raise UserError(f"{folder} has no summary.json: curves wants folders of finished runs, e.g. runs/countdown")
        run = logbook.read_json(folder / "summary.json")
        panels.setdefault(f"{run['task']}, m = {run['evals'][0]['m']}, n = {run['eval_n']}", []).append(run["evals"])
    args.out.mkdir(parents=True, exist_ok=True)

    def draw(fig):
        for ax, (title, seeds) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items()):
            draw_runs(ax, {f"AGRPO, {len(seeds)} seed(s)": seeds})
            ax.set(title=title, ylim=(0, 1))
    picture(args.out / "curves.png", draw, args.figures)
    for title, seeds in panels.items():
        print(f"{title}: {spread([e[0]['accuracy'] for e in seeds])} -> {spread([e[-1]['accuracy'] for e in seeds])}, "
              f"{len(seeds)} seeds, mean [lowest, highest]")
    print(f"written: {args.out}/curves.png")
    return 0
