"""Watch held-out problems being denoised step by step, in the terminal or as a GIF.

    bash run.sh watch --task sudoku --m 4 --problem 1
    bash run.sh watch --adapter runs/countdown-0/adapter    a trained model
    bash run.sh watch --gif                                 base and trained side by side

The GIF shows base and trained model writing the same six problems with the same draws; trained
is --adapter [runs/TASK-SEED/adapter].
"""
import io
import os
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import agrpo
import tasks

COLOURS = sys.stdout.isatty() and "NO_COLOR" not in os.environ
NEW, PLAIN = ("\033[1;32m", "\033[0m") if COLOURS else ("", "")
MOST_STATES = 24                       # of a long rollout, evenly spaced
PROBLEMS = 6                           # in a GIF


def parse(argv):
    """Flags -> (Config, first problem, path of the GIF or None). agrpo.py's flags, and two."""
    parser = agrpo.Parser(prog="bash run.sh watch", description=__doc__,
                          epilog="further flags: those of python agrpo.py --help")
    parser.add_argument("--problem", type=int, default=0, help="which held-out problem [0]")
    parser.add_argument("--gif", nargs="?", const="", metavar="FILE",
                        help="draw a GIF [runs/TASK-SEED.gif]")
    own, rest = parser.parse_known_args(argv)
    cfg = agrpo.parse([*rest, "--updates", "0"])
    if own.gif is None:
        return cfg, own.problem, None
    cfg.adapter = cfg.adapter or f"{cfg.out}/adapter"
    if not (Path(cfg.adapter).expanduser() / "adapter_config.json").exists():
        raise agrpo.UserError("--gif shows base beside trained, and there is no adapter in "
                              f"{cfg.adapter}: train first (bash run.sh {cfg.task}), or give "
                              "--adapter FOLDER")
    path = Path(own.gif or f"{cfg.out}.gif").expanduser()
    if path.suffix != ".gif":
        raise agrpo.UserError(f"--gif {own.gif} is no name of a GIF: let it end in .gif")
    return cfg, own.problem, path


class Written(NamedTuple):
    """One rollout, to be shown."""
    traj: agrpo.Trajectory             # of one row
    text: str
    grade: tasks.Grade
    words: list                        # each token as safe text, filling as a dot
    glue: str                          # what stands between two tokens
    states: list                       # (t, of each token "masked", "new" or "old") from x_0 on


def write_one(policy, data, number, cfg):
    """Write one answer, with the draws of agrpo's own evaluation."""
    keys = [(cfg.seed, "evaluation", cfg.m, number)]
    traj, texts, grades = agrpo.write_answers(policy, [data[number]], keys, cfg, cfg.how)
    ids, step_of = traj.o[0].tolist(), traj.step_of[0].tolist()

    # Some tokenizers' tokens bring their spaces, others' are joined by them.
    options = dict(clean_up_tokenization_spaces=False)
    one_by_one = policy.tokenizer.batch_decode([[i] for i in ids], **options)
    glue = "" if "".join(one_by_one) == policy.tokenizer.decode(ids, **options) else " "
    words = ["·" if i in policy.fill_ids else tasks.printable(text)
             for i, text in zip(ids, one_by_one)]

    # A row that ended early has tokens that no step drew: they come with the finished text.
    last = max((step for step in step_of if step < cfg.m), default=0) + 1
    shown = [*range(0, last, -(-last // MOST_STATES)), last]
    states = [(t, ["masked" if step >= t and t < last else
                   "new" if before <= step < t else "old" for step in step_of])
              for before, t in zip([0, *shown], shown)]
    return Written(traj, texts[0], grades[0], words, glue, states)


def show(policy, data, number, cfg):
    """Print one rollout and what the checker made of it."""
    it = write_one(policy, data, number, cfg)
    prompt = it.traj.q[0][it.traj.q_mask[0] > 0]
    print(f"{cfg.task}, problem {number} of {data.source} | {cfg.model} "
          f"{cfg.adapter or '(base model)'}\nm = {cfg.m} steps of {cfg.how.W} tokens, "
          f"{cfg.unmasking} unmasking, temperature {cfg.temperature:g}\n")
    print(tasks.printable(policy.decode(prompt[None])[0]), "\n")
    for t, kinds in it.states:
        drawn = it.traj.entropy[0][it.traj.step_of[0] == t - 1].sum().item()
        words = ["_" if kind == "masked" else NEW + word + PLAIN if kind == "new" else word
                 for word, kind in zip(it.words, kinds)]
        print(f"x_{t:<3} {f'H {drawn:5.2f}' if t else '':8} {it.glue.join(words)}")
    print("     _ masked, · filling; H: entropy of what the step before drew, in nats\n")
    print(f"answer   {agrpo.cut(it.text, 110)}")
    read, why = agrpo.cut(repr(it.grade.parsed), 60), agrpo.cut(it.grade.reason, 40)
    print(f"checker  read {read}: {why}")
    print(f"         {'right' if it.grade.correct else 'wrong'}, reward {it.grade.reward:.2f}")


# --- As a GIF ---------------------------------------------------------------------------------

WIDTH, MARGIN, LINE = 400, 15, 30      # pixels: of one panel, around it, from line to line
TEXT, PALE, RIGHT, WRONG = "#1f2328", "#656d76", "#1a7f37", "#cf222e"
BOX = {"masked": "#d0d7de", "new": "#aceebb", "old": "#ffffff"}


def font(size=15, name="DejaVu Sans Mono"):
    from matplotlib import font_manager
    from PIL import ImageFont

    return ImageFont.truetype(font_manager.findfont(name), size)    # comes with matplotlib


def place(it):
    """(x, y, width) of each token in its panel; a masked one takes the room of what comes."""
    x, y, places = 0, 0, []
    for word in it.words:
        width = font().getlength(word or " ") + 4
        if x and x + width > WIDTH:
            x, y = 0, y + LINE
        places.append((x, y, width))
        x += width + 4 * len(it.glue)
    return places


def draw_panel(draw, left, title, it, i):
    """One model's half of a frame: its state i and, once it is the last, the verdict."""
    draw.text((left, 50), title, fill=TEXT, font=font(16, "DejaVu Sans:bold"))
    ended = i >= len(it.states) - 1
    _, kinds = it.states[-1 if ended else i]
    for word, kind, (x, y, width) in zip(it.words, kinds, place(it)):
        draw.rounded_rectangle((left + x, 80 + y, left + x + width, 104 + y), 4, fill=BOX[kind])
        if kind != "masked":
            draw.text((left + x + 2, 83 + y), word, fill=TEXT, font=font())
    if ended:
        verdict = "right" if it.grade.correct else f"wrong: {agrpo.cut(it.grade.reason, 34)}"
        ink = RIGHT if it.grade.correct else WRONG
        draw.text((left, 114 + y), verdict, fill=ink, font=font())


def gif(policy, data, first, cfg, path):
    """Base and trained model on the same problems, with the same draws: a frame a step."""
    from PIL import Image, ImageDraw

    pairs = {}
    for number in range(first, min(first + PROBLEMS, len(data))):
        with policy.reference():
            base = write_one(policy, data, number, cfg)
        pairs[number] = base, write_one(policy, data, number, cfg)
    lowest = max(y for pair in pairs.values() for it in pair for _, y, _ in place(it))
    size = (2 * WIDTH + 3 * MARGIN, lowest + 114 + LINE + MARGIN)

    frames, times = [], []                                      # times in milliseconds
    for number, pair in pairs.items():
        question = tasks.TASKS[cfg.task].prompt(data[number])[-1]["content"]
        count = max(len(it.states) for it in pair)
        times += [800] * (count - 1) + [2000]
        for i in range(count):
            frames.append(Image.new("RGB", size, "white"))
            draw = ImageDraw.Draw(frames[-1])
            draw.text((MARGIN, 16), agrpo.cut(question, 84), fill=PALE, font=font())
            for it, who, left in zip(pair, ("base", "trained"), (MARGIN, 2 * MARGIN + WIDTH)):
                draw_panel(draw, left, f"{who}, m = {cfg.m}", it, i)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    agrpo.write(path, file.getvalue())
    base, trained = (sum(it.grade.correct for it in side) for side in zip(*pairs.values()))
    print(f"of {len(pairs)} problems right: base {base}, trained {trained}; wrote {path}")


def run(cfg, number, path):
    data = agrpo.load_test(cfg)
    if not 0 <= number < len(data):
        raise agrpo.UserError(f"--problem {number} is not there: choose 0 to {len(data) - 1}")
    policy = agrpo.load_policy(cfg)
    if path:
        gif(policy, data, number, cfg, path)
    else:
        show(policy, data, number, cfg)
    return 0


if __name__ == "__main__":
    sys.exit(agrpo.in_one_sentence(lambda: run(*parse(sys.argv[1:]))))
