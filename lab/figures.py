"""The pictures: one style, and the two that explain rather than measure.

Opaque white paper with dark ink, so that a picture reads the same on a light and on a dark page;
8.3 inches wide, so that ten points are still ten points at the 830 pixels that GitHub shows.
"""
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import agrpo
import tasks

INK, FAINT, PAPER = "#1f2328", "#8b949e", "#ffffff"
# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#000000")
STYLE = {
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT,
    "xtick.color": INK, "ytick.color": INK, "font.size": 9, "axes.titlesize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.grid": True, "grid.color": "#e6e9ed", "grid.linewidth": 0.6, "lines.linewidth": 1.6}


def save(path, draw, height=3.2):
    """draw(fig) on a new figure of full width, written to `path` as PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(8.3, height), layout="constrained")
        draw(fig)
        blob = io.BytesIO()
        fig.savefig(blob, dpi=200)
        plt.close(fig)
    path.parent.mkdir(parents=True, exist_ok=True)
    agrpo.write(path, blob.getvalue())


def band(ax, x, y, color, label=None):
    """A line through the means of y (seeds, points), its band from the lowest to the highest."""
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


# --- One rollout ------------------------------------------------------------------------------

def token_names(policy, o):
    """What to write into a cell for each token of o (C,)."""
    names = policy.tokenizer.batch_decode([[i] for i in o.tolist()])
    return [tasks.printable(n).strip("<>[]") or "·" for n in names]


def rollout_grid(fig, traj, row, names, p, drawn, title):
    """Steps x positions of one rollout: what each step drew and how likely it was; beside it p_t.

    p (m,); drawn {step: w} are the steps that are scored. Darker: the token was less likely.
    """
    import matplotlib.pyplot as plt

    m, C = traj.how.m, traj.how.C
    grid, bars = fig.subplots(1, 2, width_ratios=[4, 1.3], sharey=True)
    surprise = 1 - traj.logp_old[row].exp()
    step_of = traj.step_of[row].tolist()
    for t in range(m):
        for c in range(C):
            now, scored = step_of[c] == t, step_of[c] == t and t in drawn
            color = "#e3eaf4" if step_of[c] < t else "#f6f7f9"
            color = plt.cm.Oranges(0.12 + 0.6 * surprise[c].item()) if now else color
            edge = dict(ec="#d1242f", lw=2, zorder=3, clip_on=False) if scored else dict(ec="white", lw=1)
            grid.add_patch(plt.Rectangle((c, t), 1, 1, fc=color, **edge))
            text = names[c] if step_of[c] <= t else ""
            grid.text(c + 0.5, t + 0.5, text, ha="center", va="center", zorder=4, fontsize=7.5,
                      weight="bold" if now else None, color=INK if now else "#57606a")
    grid.set(xlim=(0, C), ylim=(m, 0), xticks=[], yticks=[t + 0.5 for t in range(m)],
             yticklabels=range(m), ylabel="denoising step t", title=title,
             xlabel="position in the completion   (bold: drawn now, darker: less likely)")
    colors = ["#d1242f" if t in drawn else "#c5cede" for t in range(m)]
    bars.barh([t + 0.5 for t in range(m)], p, height=0.8, color=colors)
    for t, w in drawn.items():
        bars.text(p[t] + 0.005, t + 0.5, f"w = {w:.2f}", va="center", color="#d1242f", fontsize=8)
    bars.set(xlabel="$p_t$", xlim=(0, max(p) * 1.5), title="scored steps in red")
    for ax in (grid, bars):
        ax.grid(False)
        ax.tick_params(length=0)


# --- Strips of masks --------------------------------------------------------------------------

def mask_strips(fig, strips, names):
    """Which states a method scores: strips [(title, hidden (K, C), w (K, C))], one row a state.

    Orange: masked and scored, darker with its weight; grey: masked only; pale blue: visible.
    """
    import matplotlib.pyplot as plt

    heights = [len(hidden) for _, hidden, _ in strips]
    axes = fig.subplots(len(strips), 1, height_ratios=heights, squeeze=False)[:, 0]
    heaviest = max(w.max().item() for _, _, w in strips)
    for ax, (title, hidden, w) in zip(axes, strips):
        K, C = hidden.shape
        for k in range(K):
            for c in range(C):
                weight = w[k, c].item()
                orange = plt.cm.Oranges(0.2 + 0.5 * weight / heaviest)
                plain = "#b6bec9" if hidden[k, c] else "#e3eaf4"
                ax.add_patch(plt.Rectangle((c, k), 1, 1, ec="white", fc=orange if weight else plain))
                seen = "" if hidden[k, c] and not weight else names[c]
                ax.text(c + 0.5, k + 0.5, seen, ha="center", va="center", fontsize=8,
                        weight="bold" if weight else None, color=INK if weight else "#57606a")
        ax.set(xlim=(0, C), ylim=(K, 0), xticks=[], yticks=[])
        ax.set_title(title, loc="left")
        ax.grid(False)
        for side in ax.spines.values():
            side.set_visible(False)
