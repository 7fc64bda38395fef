"""Watch held-out problems being denoised step by step, in the terminal or as a GIF.

    bash run.sh watch --task sudoku --m 4 --problem 1
    bash run.sh watch --adapter runs/countdown-0/adapter    a trained model
    bash run.sh watch --gif                                 base and trained side by side

The GIF shows base and trained model writing the same two dozen problems, the first from
--problem on, with the same draws; trained is --adapter [runs/TASK-SEED/adapter].
"""
import io
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]
import agrpo
import models
import run
import tasks
from tasks import TaskError

COLOURS = sys.stdout.isatty() and "NO_COLOR" not in os.environ
NEW, PLAIN = ("\033[1;32m", "\033[0m") if COLOURS else ("", "")
MOST_STATES = 24                       # of a long rollout, evenly spaced
PROBLEMS = 24                          # in a GIF


def parse(argv):
    """Flags -> (Run, first problem, path of the GIF or None). The flags of a run, and two."""
    parser = run.Parser(prog="bash run.sh watch", description=__doc__,
                          epilog="further flags: those of python lab/run.py --help")
    parser.add_argument("--problem", type=int, default=0,
                        help="which held-out problem, or the first of a GIF [0]")
    parser.add_argument("--gif", nargs="?", const="", metavar="FILE",
                        help="draw a GIF [runs/TASK-SEED.gif]")
    own, rest = parser.parse_known_args(argv)
    cfg = run.parse([*rest, "--updates", "0"])
    if own.gif is None:
        return cfg, own.problem, None
    if not cfg.adapter:
        cfg = run.parse([*rest, "--updates", "0", "--adapter", f"{cfg.out}/adapter"])
    if not (Path(cfg.adapter).expanduser() / "adapter_config.json").exists():
        raise TaskError("--gif shows base beside trained, and there is no adapter in "
                        f"{cfg.adapter}: train first (bash run.sh {cfg.task}), or give "
                        "--adapter FOLDER")
    path = Path(own.gif or f"{cfg.out}.gif").expanduser()
    if path.suffix != ".gif":
        raise TaskError(f"--gif {own.gif} is no name of a GIF: let it end in .gif")
    return cfg, own.problem, path


class Written(NamedTuple):
    """One rollout, to be shown."""
    traj: agrpo.Trajectory             # of all
    row: int                           # and its place there
    text: str
    grade: tasks.Grade
    words: list                        # each token as safe text, filling as a dot
    glue: str                          # what stands between two tokens


def write_all(policy, data, numbers, cfg):
    """Write an answer to each of these problems, with the draws of agrpo's own evaluation."""
    keys = [(cfg.seed, "evaluation", cfg.m, number) for number in numbers]
    examples = [data[number] for number in numbers]
    traj, texts, grades = agrpo.write_answers(policy, examples, keys, cfg, cfg.how)
    written, options = [], dict(clean_up_tokenization_spaces=False)
    for row, ids in enumerate(traj.o.tolist()):
        # Some tokenizers' tokens bring their spaces, others' are joined by them.
        one_by_one = policy.tokenizer.batch_decode([[i] for i in ids], **options)
        whole = policy.tokenizer.decode(ids, **options)
        words = ["·" if i in policy.fill_ids else tasks.printable(text)
                 for i, text in zip(ids, one_by_one)]
        glue = "" if "".join(one_by_one) == whole else " "
        written.append(Written(traj, row, texts[row], grades[row], words, glue))
    return written


def states_of(written):
    """Yield (t, of each answer whether each token is "masked", "new" or "old") from x_0 on."""
    m = written[0].traj.how.m
    rows = [it.traj.step_of[it.row].tolist() for it in written]
    # A row that ended early has tokens that no step drew: they come with the finished text.
    last = 1 + max((step for row in rows for step in row if step < m), default=0)
    shown = [*range(0, last, -(-last // MOST_STATES)), last]
    for before, t in zip([0, *shown], shown):
        yield t, [["masked" if step >= t and t < last else
                   "new" if before <= step < t else "old" for step in row] for row in rows]


def show(policy, data, number, cfg):
    """Print one rollout and what the checker made of it."""
    it, = write_all(policy, data, [number], cfg)
    prompt, step_of = it.traj.q[0][it.traj.q_mask[0] > 0], it.traj.step_of[0]
    print(f"{cfg.task}, problem {number} of {data.source} | {cfg.model} "
          f"{cfg.adapter or '(no adapter)'}\nm = {cfg.m} steps of {cfg.how.W} tokens, "
          f"{cfg.unmasking} unmasking, temperature {cfg.temperature:g}\n")
    print(tasks.printable(policy.decode(prompt[None])[0]), "\n")
    for t, (kinds,) in states_of([it]):
        drawn = it.traj.entropy[0][step_of == t - 1].sum().item()
        words = ["_" if kind == "masked" else NEW + word + PLAIN if kind == "new" else word
                 for word, kind in zip(it.words, kinds)]
        print(f"x_{t:<3} {f'H {drawn:5.2f}' if t else '':8} {it.glue.join(words)}")
    print("     _ masked, · filling; H: entropy of what the step before drew, in nats\n")
    print(f"answer   {run.cut(it.text, 110)}")
    read, why = run.cut(repr(it.grade.parsed), 60), run.cut(it.grade.reason, 40)
    print(f"checker  read {read}: {why}")
    print(f"         {'right' if it.grade.correct else 'wrong'}, reward {it.grade.reward:.2f}")


# --- As a GIF ---------------------------------------------------------------------------------

SIDES = "base", "trained"
LINE, GAP, WIDEST = 21, 14, 420        # pixels: from row to row, between columns, of an answer
TEXT, PALE = "#1f2328", "#656d76"
INK = {"right": "#116329", "wrong": "#cf222e"}
BOX = {"masked": "#d0d7de", "new": "#aceebb", "old": "#ffffff", "right": "#dafbe1",
       "wrong": "#ffebe9"}


@lru_cache
def font(size=11, name="DejaVu Sans Mono"):
    from matplotlib import font_manager
    from PIL import ImageFont

    return ImageFont.truetype(font_manager.findfont(name), size)    # comes with matplotlib


def boxes(it):
    """(x, y, width, height, word) of each token of an answer; a masked one has the room of what
    comes. Answers too long for a line are boxes without words, 64 a line."""
    found, x = [], 0
    for word in it.words:
        width = int(font().getlength(word or " ")) + 4
        found.append((x, 0, width, LINE - 5, word))
        x += width + 1 + 2 * len(it.glue)
    if x < WIDEST:
        return found
    return [(i % 64 * 6, i // 64 * 9, 5, 8, "") for i in range(len(it.words))]


def draw_answer(draw, left, top, it, kinds):
    """One answer in one state, each token on a box of its kind."""
    for (x, y, width, height, word), kind in zip(boxes(it), kinds):
        x, y = left + x, top + y
        rim = PALE if kind == "old" and not word else None      # a box without a word is seen
        draw.rectangle((x, y, x + width, y + height), fill=BOX[kind], outline=rim)
        if kind != "masked":
            draw.text((x + 2, y + 1), word, fill=INK.get(kind, TEXT), font=font())


def gif(policy, data, first, cfg, path):
    """Base and trained model on the same problems, with the same draws: a frame a step."""
    from PIL import Image

    numbers = range(first, min(first + PROBLEMS, len(data)))
    with policy.reference():
        written = write_all(policy, data, numbers, cfg)
    written += write_all(policy, data, numbers, cfg)
    questions = [run.cut(tasks.TASKS[cfg.task].prompt(data[number])[-1]["content"], 40)
                 for number in numbers]

    frames = [draw_frame(cfg, questions, written, kinds, [f"{who}, step {t}" for who in SIDES])
              for t, kinds in states_of(written)]
    # After the last one the verdicts.
    verdicts = ["right" if it.grade.correct else "wrong" for it in written]
    n, kinds = len(numbers), [[v] * len(it.words) for v, it in zip(verdicts, written)]
    titles = [f"{who}: {side.count('right')} of {n} right"
              for who, side in zip(SIDES, (verdicts[:n], verdicts[n:]))]
    frames.append(draw_frame(cfg, questions, written, kinds, titles))

    # Few colours, the same ones in all frames: a small file.
    wide, high = frames[0].size
    film = Image.new("RGB", (wide, high * len(frames)))
    for i, frame in enumerate(frames):
        film.paste(frame, (0, i * high))
    film = film.quantize(48)
    frames = [film.crop((0, i * high, wide, (i + 1) * high)) for i in range(len(frames))]
    path.parent.mkdir(parents=True, exist_ok=True)
    file, times = io.BytesIO(), [1200] * (len(frames) - 1) + [5000]         # milliseconds
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    run.write(path, file.getvalue())
    print(f"{', '.join(titles)}; wrote {path}")


def draw_frame(cfg, questions, written, kinds, titles):
    """Three columns, as wide as what stands in them: problems, answers of base, of trained."""
    from PIL import Image, ImageDraw

    n, places = len(questions), [box for it in written for box in boxes(it)]
    wide, high = (max(box[i] + box[i + 2] for box in places) + GAP for i in (0, 1))
    first = int(max(map(font().getlength, questions))) + 2 * GAP
    image = Image.new("RGB", (first + 2 * (wide + GAP), 56 + n * (high - 9) + GAP), "white")
    draw = ImageDraw.Draw(image)
    draw.text((GAP, 12), f"{cfg.task}: {n} held-out problems, m = {cfg.m} steps of {cfg.how.W} "
              "tokens; grey: masked, green: new", fill=PALE, font=font(12))
    for i, title in enumerate(titles):
        draw.text((first + i * (wide + GAP), 32), title, fill=TEXT,
                  font=font(14, "DejaVu Sans:bold"))
    for i, question in enumerate(questions):
        draw.text((GAP, 57 + i * (high - 9)), question, fill=PALE, font=font())
    for i, it in enumerate(written):
        left, top = first + i // n * (wide + GAP), 56 + i % n * (high - 9)
        draw_answer(draw, left, top, it, kinds[i])
    return image


def main(cfg, number, path):
    data = run.load_test(cfg)
    if not 0 <= number < len(data):
        raise TaskError(f"--problem {number} is not there: choose 0 to {len(data) - 1}")
    policy = models.load_policy(cfg, data)
    if path:
        gif(policy, data, number, cfg, path)
    else:
        show(policy, data, number, cfg)
    return 0


if __name__ == "__main__":
    sys.exit(run.in_one_sentence(lambda: main(*parse(sys.argv[1:]))))
