"""The pictures: one style, and the two that explain rather than measure.

Opaque white paper with dark ink, so that a picture reads the same on light and on dark pages;
8.3 inches wide, so that ten points are still ten points at the 830 pixels that GitHub shows.
Each of the functions below returns draw(fig), which `save` wants.
"""
import io
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")                  # no screen needed
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]
import run
import tasks

INK, FAINT, PAPER, RED = "#1f2328", "#8b949e", "#ffffff", "#d1242f"
VISIBLE, HIDDEN, LATER, BAR = "#e3eaf4", "#b6bec9", "#f6f7f9", "#c5cede"
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
        png = io.BytesIO()
        fig.savefig(png, dpi=200)
        plt.close(fig)
    path.parent.mkdir(parents=True, exist_ok=True)
    run.write(path, png.getvalue())


# --- What was measured ------------------------------------------------------------------------

def lines(panels, xlabel, ylabel, log="", dashed=""):
    """{title: {name: (x (points,), y (seeds, points))}}, a panel each: a line through the
    means, its band from lowest to highest, its name at its end.

    log: the axes of log scale, "", "x" or "xy". dashed: what a line at the first point's
    height is.
    """
    def draw(fig):
        axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for ax, (title, named) in zip(axes, panels.items()):
            for (x, y), color in zip(named.values(), COLORS):
                ax.plot(x, y.mean(axis=0), "o-", ms=3.5, color=color)
                ax.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.15, lw=0)
                if dashed:
                    ax.axhline(y[:, 0].mean(), ls="--", lw=1, color=FAINT)
            ax.set(title=title, xlabel=xlabel + f"   (dashed: {dashed})" * bool(dashed))
            if "x" in log:
                ax.set_xscale("log")
                ax.set_xticks(x, [f"1/{1 / v:.0f}" if v < 1 else v for v in x])
                ax.minorticks_off()
            else:
                ax.locator_params(axis="x", nbins=4)            # long numbers need room
        axes[0].set(ylabel=ylabel, yscale="log" if "y" in log else "linear")
        fig.canvas.draw()                                       # axis limits as they will be
        # Beside the last panel is room for the names.
        name_ends(ax, [(y[:, -1].mean(), name, color)
                       for (name, (_, y)), color in zip(named.items(), COLORS)])
    return draw


def name_ends(ax, ends, gap=0.08):
    """Write each line's name at its end: ends [(y, name, color)], y in the axis' own scale.

    gap: the least distance of two names, as a share of the axis' height.
    """
    below = -1.0
    for y, name, color in sorted(ends):
        share = ax.transAxes.inverted().transform(ax.transData.transform((1, y)))[1]
        below = max(share, below + gap)
        ax.annotate(name, (1.0, below), xycoords="axes fraction", xytext=(6, 0),
                    textcoords="offset points", color=color, va="center", weight="bold")


def dots(panels, xlabel, full, hollow, dashed=None):
    """{title: {name: (values, value)}}, a panel each, a row a name: full dots at the values, a
    hollow one at the value. full, hollow: what they are; dashed {title: x}: a line there."""
    def draw(fig):
        alike = len({tuple(rows) for rows in panels.values()}) == 1         # then named once
        axes = fig.subplots(1, len(panels), sharey=alike, squeeze=False)[0]
        for ax, (title, rows) in zip(axes, panels.items()):
            for y, (values, value) in enumerate(rows.values()):
                ax.hlines(y, min(*values, value), max(*values, value), color=FAINT, lw=1)
                ax.plot(value, y, "o", ms=6.5, mfc=PAPER, color=COLORS[0], label=hollow)
                ax.plot(values, [y] * len(values), "o", ms=4.5, color=COLORS[1], label=full)
            if dashed:
                ax.axvline(dashed[title], ls="--", lw=1, color=FAINT)
            ax.set(title=title, xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))
            ax.set_yticks(range(len(rows)), list(rows))
        marks, names = axes[0].get_legend_handles_labels()
        fig.legend(marks[:2], names[:2], loc="outside upper center", ncols=2)
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
    """Steps x positions of one rollout: what each step drew, how likely it was; beside it p.

    p (m,); drawn {step: w}: the steps that are scored. Darker: the token was less likely.
    """
    m, C = traj.how.m, traj.how.C
    surprise, step_of = 1 - traj.logp_old[row].exp(), traj.step_of[row].tolist()

    def draw(fig):
        grid, bars = fig.subplots(1, 2, width_ratios=[4, 1.3], sharey=True)
        bare(grid, C, m)
        bars.grid(False)
        for t in range(m):
            edge = RED if t in drawn else None
            bars.barh(t + 0.5, p[t], height=0.8, color=edge or BAR)
            for c in range(C):
                if step_of[c] == t:
                    shade = plt.cm.Oranges(0.12 + 0.6 * surprise[c].item())
                    cell(grid, c, t, shade, names[c], True, edge)
                elif step_of[c] < t:
                    cell(grid, c, t, VISIBLE, names[c])
                else:
                    cell(grid, c, t, LATER)
        for t, w in drawn.items():
            bars.text(p[t] + 0.005, t + 0.5, f"w = {w:.2f}", va="center", color=RED)
        grid.set_yticks([t + 0.5 for t in range(m)], range(m))
        grid.set(title=title, ylabel="denoising step t",
                 xlabel="position in the completion   (bold: drawn now, darker: less likely)")
        bars.set(xlabel="p   (of this rollout alone)", xlim=(0, max(p) * 1.5),
                 title="scored steps in red")
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
            for k, c in np.ndindex(K, C):
                if w[k, c] > 0:
                    shade = plt.cm.Oranges(0.2 + 0.5 * w[k, c].item() / heaviest)
                    cell(ax, c, k, shade, names[c], True)
                elif hidden[k, c]:
                    cell(ax, c, k, HIDDEN)
                else:
                    cell(ax, c, k, VISIBLE, names[c])
    return draw
