"""The pictures: one style, and the two that explain rather than measure.

Opaque white paper with dark ink, so that a picture reads the same on light and on dark pages;
8.3 inches wide, so that ten points are still ten points at the 830 pixels that GitHub shows.
"""
import io
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")                  # no screen needed
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import agrpo
import tasks

INK, FAINT, PAPER, RED, VISIBLE = "#1f2328", "#8b949e", "#ffffff", "#d1242f", "#e3eaf4"
# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")
STYLE = {
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT,
    "xtick.color": INK, "ytick.color": INK, "font.size": 9, "axes.titlesize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.grid": True, "grid.color": "#e6e9ed", "grid.linewidth": 0.6, "lines.linewidth": 1.6}


def save(path, draw, height=3.2):
    """draw(fig) on a new figure of full width, written to `path` as PNG."""
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(8.3, height), layout="constrained")
        draw(fig)
        blob = io.BytesIO()
        fig.savefig(blob, dpi=200)
        plt.close(fig)
    path.parent.mkdir(parents=True, exist_ok=True)
    agrpo.write(path, blob.getvalue())


def band(ax, x, y, color, label=None):
    """A line through the means of y (seeds, points), its band from lowest to highest."""
    ax.plot(x, y.mean(axis=0), "o-", ms=3.5, color=color, label=label)
    ax.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.15, lw=0)


def name_ends(ax, ends, gap):
    """Write each line's name at its end: ends [(x, y, name, color)], y in the axis' own scale.

    gap: the least distance of two names, as a share of the axis' height.
    """
    to_share = ax.transScale.transform
    low, high = (to_share((1, y))[1] for y in ax.get_ylim())
    below = -1.0
    for x, y, name, color in sorted(ends, key=lambda end: end[1]):
        share = (to_share((1, y))[1] - low) / (high - low)
        below = share = max(share, below + gap)
        ax.annotate(name, (1.0, share), xycoords="axes fraction", xytext=(6, 0),
                    textcoords="offset points", color=color, va="center", weight="bold")


# --- What was measured: each returns draw(fig) for `save` -------------------------------------

def log_lines(panels, xlabel, ylabel, log_y=True):
    """{title: (x, {name: y (seeds, points)})}, a panel each, lines named at their ends."""
    def draw(fig):
        axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (title, (x, lines)) in zip(axes, panels.items()):
            ends = []
            ax.set(xscale="log", xlabel=xlabel, title=title)
            ax.set_yscale("log" if log_y else "linear")
            for (name, y), color in zip(lines.items(), COLORS):
                band(ax, x, y, color)
                ends.append((x[-1], y[:, -1].mean(), name, color))
            ax.set_xticks(x, x)
            ax.minorticks_off()
        axes[0].set_ylabel(ylabel)
        fig.canvas.draw()                                       # axis limits as they will be
        name_ends(axes[-1], ends, 0.08)
    return draw


def learning_lines(runs, x):
    """Held-out accuracy of {name: [run per seed]} against x, one of "update" and "passes"."""
    def draw(fig):
        ax, ends = fig.subplots(), []
        for (name, seeds), color in zip(runs.items(), COLORS):
            evals = [run["evals"] for run in seeds if run]
            if evals:
                at = np.mean([[e[x] for e in run] for run in evals], axis=0)
                y = np.array([[e["accuracy"] for e in run] for run in evals])
                band(ax, at, y, color)
                ends.append((at[-1], y[:, -1].mean(), name, color))
        passes = "forward passes of a row (a state of the loss: 3)"
        ax.set(ylabel="held-out accuracy", xlabel=passes if x == "passes" else x)
        name_ends(ax, ends, 0.07)
    return draw


def angle_dots(found):
    """{title: {name: numbers}}: the cosine of an estimator's mean (hollow: what it lacks of 1
    is bias) and of one estimate (full: bias and noise)."""
    def draw(fig):
        axes = fig.subplots(1, len(found), squeeze=False)[0]
        for ax, (title, rows) in zip(axes, found.items()):
            y = range(len(rows))
            one, mean = ([min(x[key], 1.0) for x in rows.values()] for key in ("one", "mean"))
            ax.hlines(y, one, mean, color=FAINT, lw=1)
            hollow = dict(ms=6.5, mfc=PAPER, color=COLORS[0])
            ax.plot(mean, y, "o", label="mean: bias is left", **hollow)
            ax.plot(one, y, "o", ms=5, color=COLORS[1], label="one estimate: bias and noise")
            ax.set(title=title, xlim=(0, 1.04), xlabel="cosine to the exact gradient")
            ax.set_yticks(y, list(rows) if ax is axes[0] else [""] * len(rows))
            ax.invert_yaxis()
        handles = axes[0].get_legend_handles_labels()
        fig.legend(*handles, loc="outside upper center", ncols=2)
    return draw


def accuracy_dots(found, base):
    """{task: {name: accuracy per seed}}: a dot per seed, best on top; dashed: the base."""
    def draw(fig):
        axes = fig.subplots(1, len(found), squeeze=False)[0]
        for ax, (task, runs) in zip(axes, found.items()):
            order = sorted(runs, key=lambda name: np.mean(runs[name]))
            for y, name in enumerate(order):
                color = COLORS[1 if name == "AGRPO" else 0]
                ax.plot(runs[name], [y] * len(runs[name]), "o", ms=4.5, color=color, alpha=0.5)
                ax.plot(np.mean(runs[name]), y, "|", ms=14, mew=2, color=color)
            ax.axvline(base[task], ls="--", lw=1, color=FAINT)
            ax.set(title=f"{task}   (bar: mean of the seeds; dashed: before training)",
                   xlabel="held-out accuracy")
            ax.set_yticks(range(len(order)), order)
    return draw


def run_curves(panels):
    """{title: [evals per seed]} of finished runs: held-out accuracy against updates."""
    def draw(fig):
        axes = fig.subplots(1, len(panels), squeeze=False)[0]
        for ax, (title, runs) in zip(axes, panels.items()):
            x = [e["update"] for e in min(runs, key=len)]
            y = np.array([np.interp(x, [e["update"] for e in run], [e["accuracy"] for e in run])
                          for run in runs])
            band(ax, x, y, COLORS[1])
            ax.axhline(y[:, 0].mean(), ls="--", lw=1, color=FAINT)
            ax.set(title=f"{title}, {len(runs)} seed(s); dashed: the base model", ylim=(0, 1),
                   xlabel="update", ylabel="held-out accuracy")
    return draw


# --- What explains ----------------------------------------------------------------------------

def token_names(policy, o):
    """What to write into a cell for each token of o (C,)."""
    names = policy.tokenizer.batch_decode([[i] for i in o.tolist()])
    return [tasks.printable(n).strip("<>[]") or "·" for n in names]


def cell(ax, x, y, face, text="", bold=False, edge=None):
    """One square of a grid, with a token in it."""
    style = dict(ec=edge, lw=2, zorder=3, clip_on=False) if edge else dict(ec="white", lw=1)
    ax.add_patch(plt.Rectangle((x, y), 1, 1, fc=face, **style))
    ax.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7.5, zorder=4,
            weight="bold" if bold else None, color=INK if bold else "#57606a")


def bare(ax, width, height):
    """Axes of a grid: nothing but the cells."""
    ax.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)


def rollout_grid(traj, row, names, p, drawn, title):
    """Steps x positions of one rollout: what each step drew, how likely it was; beside it p_t.

    p (m,); drawn {step: w}: the steps that are scored. Darker: the token was less likely.
    """
    m, C = traj.how.m, traj.how.C
    surprise, step_of = 1 - traj.logp_old[row].exp(), traj.step_of[row].tolist()

    def draw(fig):
        grid, bars = fig.subplots(1, 2, width_ratios=[4, 1.3], sharey=True)
        bare(grid, C, m)
        bars.grid(False)
        for t in range(m):
            color = RED if t in drawn else "#c5cede"
            bars.barh(t + 0.5, p[t], height=0.8, color=color)
            for c in range(C):
                if step_of[c] == t:
                    shade = plt.cm.Oranges(0.12 + 0.6 * surprise[c].item())
                    cell(grid, c, t, shade, names[c], True, RED if t in drawn else None)
                elif step_of[c] < t:
                    cell(grid, c, t, VISIBLE, names[c])
                else:
                    cell(grid, c, t, "#f6f7f9")
        for t, w in drawn.items():
            bars.text(p[t] + 0.005, t + 0.5, f"w = {w:.2f}", va="center", color=RED)
        grid.set_yticks([t + 0.5 for t in range(m)], range(m))
        grid.set(title=title, ylabel="denoising step t",
                 xlabel="position in the completion   (bold: drawn now, darker: less likely)")
        bars.set(xlabel="$p_t$", xlim=(0, max(p) * 1.5), title="scored steps in red")
        for ax in (grid, bars):
            ax.tick_params(length=0)
    return draw


def mask_strips(strips, names):
    """Which states a method scores: strips [(title, hidden (K, C), w (K, C))], one row a state.

    Orange: masked and scored, darker with its weight; grey: masked only; pale blue: visible.
    """
    heaviest = max(w.max().item() for _, _, w in strips)

    def draw(fig):
        heights = [len(hidden) for _, hidden, _ in strips]
        axes = fig.subplots(len(strips), 1, height_ratios=heights, squeeze=False)[:, 0]
        for ax, (title, hidden, w) in zip(axes, strips):
            K, C = hidden.shape
            bare(ax, C, K)
            ax.set_title(title, loc="left")
            for k in range(K):
                for c in range(C):
                    if w[k, c] > 0:
                        shade = plt.cm.Oranges(0.2 + 0.5 * w[k, c].item() / heaviest)
                        cell(ax, c, k, shade, names[c], True)
                    elif hidden[k, c]:
                        cell(ax, c, k, "#b6bec9")
                    else:
                        cell(ax, c, k, VISIBLE, names[c])
    return draw
