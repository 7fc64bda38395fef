r"""Tasks: data, prompts and checkers. Training and evaluation grade with the same functions.

    countdown   {"nums": [17, 18, 5], "target": 67}
                <answer>17 * 5 - 18 = 67</answer>
    sudoku      {"puzzle": "1002020100030310", "solution": "1432324141232314"}
                <answer>1432324141232314</answer>
    gsm8k       {"question": "Ann has 3 bags of 6 pears. How many pears?", "answer": "18"}
                <think>3 x 6</think><answer>\boxed{18}</answer>

A problem of each task, and the text that earns the maximum reward, 4. `correct` is about
content, `format` about tags: reward = format + 3 x right, so a right answer without tags earns
3, a wrong one with all its tags 1. Nothing a model wrote is ever executed. A task of one's own
is a file that adds to TASKS, as lab/math_task.py does: `--task FILE.py` loads it.
"""
import ast
import hashlib
import json
import logging
import numbers
import operator
import random
import re
import threading
from collections import Counter, namedtuple
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch


class TaskError(ValueError):
    """A mistake the caller can mend: one sentence that names the flag or the file."""


@dataclass
class Grade:
    reward: float       # format + 3 x right, 0 to 4
    correct: bool       # what evaluation counts
    format: float       # the part that asks for no knowledge, 0 to 1
    reason: str         # why, in a few words: "number 7 unused"
    parsed: str         # what was understood of the text
    metrics: dict       # means reported beside accuracy; "tagged" in every task


@dataclass(frozen=True)
class Task:
    """All that a run knows of a task; TASKS["mine"] = Task(..) adds yours."""
    name: str
    prompt: Callable                   # example -> chat messages
    grade: Callable                    # text, example -> Grade
    make: Callable | None = None       # seed, index, split, **options -> example, if generated
    read: Callable | None = None       # row, split, options -> example; None leaves the row out
    hub: dict = field(default_factory=dict)        # split -> "data set [configuration] split"
    part: Callable | None = None       # example, split, options -> does a hub row belong here?
    options: dict = field(default_factory=dict)    # name -> default; each is a flag
    limits: dict = field(default_factory=dict)     # name -> smallest, largest
    key: Callable | None = None        # example -> what train and test may not share [prompt]
    same: Callable | None = None       # example -> what no two test problems share [the key]
    grade_batch: Callable | None = None            # texts, examples -> grades, where cheaper


Found = namedtuple("Found", "content tagged thought")    # of last_answer
# Repeating the instructions is not answering: "<answer></answer>", "\boxed{...}".
ECHO = re.compile(r"(?:\\?boxed|\\fbox|\\[()\[\]]|[\s.…,:={}$]|your|the|final|answer|here"
                  r"|expression|target)*")
BOX = r"(?:\\?boxed|\\fbox)\s*\{"
BOLD = re.compile(r"(?<![\w)\]}*])\*\*(?!\s)((?:[^*]|\*(?!\*))+)(?<!\s)\*\*(?![\w(\[{*])")
BRACES, NAME = r"^\s*\{([^{}]*)\}\s*$", r"^\s*[A-Za-z]\s*=(?!=)"


def last_answer(text, box=False):
    """(the answer or None, was it in a complete tag, was a <think> opened and closed?)
    The last complete <answer>, else what follows an unclosed one; if box, its last box, else
    that of the text. What a closed <think> holds counts only where nothing else does."""
    # A <think> that is open behind the last </think> was never closed: it stays.
    head, closed, tail = text.rpartition("</think>")
    spoken, thoughts = re.subn("<think>.*?</think>", " ", head + closed, flags=re.DOTALL)
    spoken, thought = spoken + tail, thoughts > 0
    # What was said first, then thoughts too; complete tags first, then unclosed ones.
    for part in dict.fromkeys((spoken, text)):       # one pass where there were no thoughts
        pieces = [piece.split("</answer>") for piece in part.split("<answer>")[1:]]
        complete = [piece[0] for piece in pieces if len(piece) > 1]
        unclosed = [re.split("</|<think>", piece[0])[0] for piece in pieces if len(piece) == 1]
        for contents in (complete, unclosed):
            real = [content for content in contents if not ECHO.fullmatch(content)]
            if real:
                # \boxed{18</answer>: the tag ends the box. \boxed{}18: so it was meant.
                last = real[-1]
                if box:
                    last = last_box(last) or re.sub(BOX + r"\s*\}?", "", last)
                return Found(last, contents is complete and part is spoken, thought)
        if box and last_box(part):
            return Found(last_box(part), False, thought)
    empty = "</answer>" in spoken.partition("<answer>")[2]
    return Found("" if empty else None, empty, thought)


def last_box(text):
    r"""What the last \boxed{..} or \fbox{..} of 20,000 characters holds, or nothing: ""."""
    # Every brace that closes belongs to the last one that opened: no recursion, linear.
    text, last, opened = text[-20_000:], "", []
    for brace in re.finditer(BOX + r"|\\.|[{}]", text, re.DOTALL):    # \{ is no brace
        if brace[0].endswith("{") and brace[0] != r"\{":
            opened.append(brace)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            content = text[start.end():brace.start()].strip()
            if start[0] != "{" and not ECHO.fullmatch(content) and not re.search(BOX, content):
                last = content
    return last


def bare(text):
    """Without what is spelling in every task: **18**, –18, {18} and x = 18."""
    text = re.sub("[−–]", "-", BOLD.sub(r"\1", text))
    text = re.sub(NAME, "", re.sub(BRACES, r"\1", text))      # {x = 18}
    return re.sub(BRACES, r"\1", text)                        # x = {18}


def printable(text):
    """With control characters written out, line breaks too: safe to print on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def graded(format, right, reason, parsed, tagged=True, **metrics):
    """The usual Grade. `right` is a share from 0 to 1, and 1 is correct."""
    return Grade(format + 3.0 * right, right == 1, format, reason, printable(parsed[:200]),
                 {"tagged": float(tagged), **metrics})


def chat(rules, question):
    """The system turn has all instructions; the user turn is the problem alone."""
    return [{"role": "system", "content": rules}, {"role": "user", "content": question}]


# --- Countdown: reach the target, every number once -------------------------------------------
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
              ast.Div: Fraction}    # all are exact


def in_test(nums, target):
    """One problem in eight is a test problem, whatever the seed, the order and the process."""
    digest = hashlib.blake2b(repr((sorted(nums), target)).encode(), digest_size=1).digest()
    return digest[0] < 32


def make_countdown(seed, index, split, numbers, max_number, max_target, division):
    """Numbers and a random expression over all of them, drawn until it hits a target."""
    rng = random.Random(f"{seed} {index} {split}")    # no global generator, no order of calls
    operations = list(OPERATIONS.values())[:4 if division else 3]
    for _ in range(20_000):
        nums = [rng.randrange(max_number) + 1 for _ in range(numbers)]
        # Two of the values, an operation, one value in their place; until one is left.
        values = list(nums)
        while len(values) > 1:
            a, b = (values.pop(int(rng.random() * len(values))) for _ in range(2))
            operation = operations[int(rng.random() * len(operations))]
            if b == 0 and operation is Fraction:
                values = [0]                          # no target
            else:
                values.append(operation(a, b))
        target = int(values[0])
        wanted = target == values[0] and 1 <= target <= max_target
        if wanted and in_test(nums, target) == (split == "test"):
            return {"nums": nums, "target": target}
    raise TaskError(f"--numbers {numbers} --max_number {max_number} --max_target {max_target} "
                    f"leave no {split} problem of countdown: allow larger numbers or targets")


def read_countdown(row, split, options):
    """{"nums": [30, 100, 93], "target": 23} or {"input": "30,100,93", "output": "23"}"""
    nums, target = row.get("nums"), row.get("target")
    if row.get("input") is not None:
        nums, target = row["input"].strip("[] ").split(","), row["output"]
    *nums, target = [to_number(str(value)) for value in (*nums, target)]
    whole = all(value is not None and value.denominator == 1 for value in (*nums, target))
    if not whole or min(nums, default=-1) < 0:
        raise ValueError("the numbers must be integers from 0, at least one, and so the target")
    return {"nums": [int(n) for n in nums], "target": int(target)}


def part_of_3to4(example, split, options):
    """The hub has one split of 3 and 4 numbers: choose the count, part it as the generated."""
    same_count = len(example["nums"]) == options["numbers"]
    return same_count and in_test(**example) == (split == "test")


def countdown_prompt(example):
    numbers, target = " ".join(map(str, example["nums"])), example["target"]
    return chat("Reach the target from the numbers with + - * / and parentheses, using every "
                "number exactly once. Think inside <think></think>, then write only the "
                "equation, expression = target, inside <answer></answer>.\n"
                "Example: for Numbers: 8 3 6 and Target: 30, write <answer>(8 - 3) * 6 = 30"
                "</answer>.", f"Numbers: {numbers}\nTarget: {target}")


def unwrap(text):
    r"""In one spelling, without a full stop, dollars, \( \) and one \boxed{} around it all."""
    for spellings, symbol in ((r"×|·|⋅|\\times|\\cdot", "*"), (r"÷|\\div", "/"),
                              (r"\\left\(", "("), (r"\\right\)", ")"), (r"\\[()\[\]]", "$")):
        text = re.sub(spellings, symbol, text)
    dollars, box = (r"(\${0,2})", r"\1"), (rf"({BOX} ?)?", r"(?(1)\})")
    for start, end in (dollars, box, dollars):
        text = re.fullmatch(rf"{start} ?(.*?) ?\.? ?{end} ?\.? ?", bare(text))[2]
    return bare(text)


def calculate(text):
    """(exact value, the integers in it); Python only parses. Any other text is an error."""
    text = re.sub(r"(?<=[0-9)])\s*\(", "*(", text)       # 7(9 - 4) is 7 * (9 - 4)
    text = re.sub(r"(?<![0-9])0+(?=[0-9])", "", text)    # Python refuses 017
    if not re.fullmatch(r"[-+*/() 0-9]+", text):
        raise SyntaxError(text)
    integers = []
    # A sign, ** and // have no place in this tree: a KeyError, an AttributeError.
    def value(node):
        if isinstance(node, ast.Constant):
            integers.append(node.value)
            return node.value
        return OPERATIONS[type(node.op)](value(node.left), value(node.right))
    return value(ast.parse(text.strip(), mode="eval").body), tuple(integers)


def grade_countdown(text, example):
    """Format: 0.5 complete answer tag + 0.5 an expression, alone or with "= target"."""
    (content, tagged, _), format, right = last_answer(text), 0.5, 0
    answer = " ".join((content or "").split())    # a line break is white space
    try:
        if len(answer) > 500:
            raise SyntaxError("too long")
        if re.search(r"[^-+*/() 0-9=]|\*\*", answer):    # most need no unwrapping
            answer = unwrap(answer)
        left, stated = re.fullmatch("([^=]*)(?:= ?(-?[0-9]+))?", answer).groups()
        value, used = calculate(left)
        # Every number exactly once: compared as multisets.
        unused = Counter(example["nums"]) - Counter(used)
        extra = Counter(used) - Counter(example["nums"])
        if unused:
            reason = f"number {min(unused)} unused"
        elif extra:
            reason = f"number {str(min(extra))[:20]} not given, or used too often"
        elif stated and int(stated) != example["target"]:
            reason = f"right side {stated[:20]} is not the target"
        else:
            reason, right = f"value {value}", value == example["target"]
    except ZeroDivisionError:
        reason = "division by zero"
    except (AttributeError, KeyError, MemoryError, RecursionError, SyntaxError):
        reason, format = "not an expression of integers, + - * / ( )", 0.0
    return graded(format + 0.5 * tagged, right, reason, answer, tagged)


# --- Sudoku, 4x4 ------------------------------------------------------------------------------
@lru_cache
def grids():
    """All 288 full grids, in order of a hash; the first 58 solve all test problems."""
    rows = [str(row) for row in range(1234, 4322) if sorted(str(row)) == [*"1234"]]
    halves = [a + b for a in rows for b in rows if len({*a[:2], *b[:2]}) == 4]    # full boxes
    full = [top + bottom for top in halves for bottom in halves
            if all(len({*top[i::4], *bottom[i::4]}) == 4 for i in range(4))]      # and columns
    return sorted(full, key=lambda grid: hashlib.blake2b(grid.encode()).digest())


def solutions(puzzle, among=None):
    """With dots for its empty cells, a puzzle is the regular expression of its solutions."""
    return re.findall(puzzle.replace("0", "."), among or "\n".join(grids()))


def make_sudoku(seed, index, split, empties):
    """Cells of a grid are emptied in random order, while its solution stays the only one."""
    rng = random.Random(f"{seed} {index} {split}")
    mine = grids()[:58] if split == "test" else grids()[58:]
    while True:    # again where that ends too early
        puzzle = solution = rng.choice(mine)
        for cell in rng.sample(range(16), 16):
            emptied = puzzle[:cell] + "0" + puzzle[cell + 1:]
            if puzzle.count("0") < empties and len(solutions(emptied)) == 1:
                puzzle = emptied
        if puzzle.count("0") == empties:
            return {"puzzle": puzzle, "solution": solution}


def read_sudoku(row, split, options):
    """{"Puzzle": "0302...", "Solution": "1342..."}; an int gets its leading zeros back."""
    row = {name.lower(): str(value).strip().zfill(16) for name, value in row.items()}
    puzzle, solution = row["puzzle"], row["solution"]
    digits = re.fullmatch("[0-4]{16}", puzzle) and solution in grids()
    if not digits or not solutions(puzzle, among=solution):
        raise ValueError("the puzzle must be 16 digits 0-4, and the solution a grid with them")
    return {"puzzle": puzzle, "solution": solution}


# Of the training grids. Without them LLaDA copies the zeros: nothing to learn from.
SUDOKU_EXAMPLES = (("0400000212344020", "2413314212344321"),
                   ("3042400010200403", "3142423113242413"),
                   ("2001013032100003", "2341413232141423"))


def sudoku_question(puzzle):
    return "\n".join(["Sudoku:", *(" ".join(puzzle[i:i + 4]) for i in range(0, 16, 4))])


def sudoku_prompt(example):
    worked = "\n\n".join(f"{sudoku_question(puzzle)}\n<answer>{solution}</answer>"
                         for puzzle, solution in SUDOKU_EXAMPLES)
    return chat("Complete the 4x4 Sudoku: every row, column and 2x2 box holds 1, 2, 3 and 4; 0 "
                "marks an empty cell. Think inside <think></think>, then write only the 16 "
                "digits of the full grid, row by row, inside <answer></answer>. Three examples:"
                f"\n\n{worked}", sudoku_question(example["puzzle"]))


def grade_sudoku(text, example):
    """Format: 0.5 complete answer tag + 0.25 sixteen digits 1-4 + 0.25 the given digits kept.
    Right: the share of the empty cells, of which one digit in all of them has 25 %."""
    content, tagged, _ = last_answer(text)
    grid, format = "".join(bare(content or "").split()), 0.5 * tagged
    if not re.fullmatch("[1-4]{16}", grid):
        return graded(format, 0, "not sixteen digits 1-4", grid, tagged, cell_accuracy=0.0)
    # Any grid that solves the puzzle is right; else each empty cell counts by itself.
    kept = bool(solutions(example["puzzle"], among=grid))
    correct = kept and grid in grids()
    right = [digit == solution for given, solution, digit
             in zip(example["puzzle"], example["solution"], grid) if given == "0"]
    share = 1.0 if correct else sum(right) / max(1, len(right))
    reason = ("a valid grid" if correct else "a row, column or box repeats a digit" if kept
              else "a given digit was changed")
    grade = graded(format + 0.25 * (1 + kept), share, reason, grid, tagged, cell_accuracy=share)
    return replace(grade, correct=correct)


# --- GSM8K: one number ------------------------------------------------------------------------
def read_gsm8k(row, split, options):
    """{"question": .., "answer": ".. #### 18"}; a number, 18 or 18.0, is fine too."""
    gold = str(row["answer"]).rpartition("####")[2].strip().removesuffix(".0")
    if to_number(gold) is None:
        raise ValueError(f"the answer {gold[:40]!r} is not a number")
    return {"question": row["question"].strip(), "answer": gold}


def question_prompt(example):
    return chat("Solve the mathematics problem. Think step by step inside <think></think>, "
                r"then write only the final answer, in \boxed{}, inside <answer></answer>.",
                example["question"])


# Words that change the number before them are no units: 5 bn, 2 dozens, 3 halves, 5 plus; nor
# are single letters, but for m, g, s, h and l.
SCALE = (r"\b(?![mgshlLaI]\b)[A-Za-z]\b|\b(?i:(?:thou|mn|mln|bn|trn|doz|dozen|score|ten|hundred"
         r"|[a-z]*thousand|[a-z]*illion|lakh|crore|plus|squared|cubed|half|halve|third|quarter"
         r"|(?:four|fif|six|seven|eigh|nin|ten|twelf|[a-z]*tie|hundred|thousand)th)s?)\b")
INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
NUMBER = re.compile(rf"""
    ([+-]?\ ? (?: {INTEGER}\ ?/\ ?{INTEGER} | {INTEGER}?(?:\.[0-9]+)? ))    # 36/2, 1,000.5, .5
    ((?: \ (?!per\b)(?:(?:square|cubic)\ )?[A-Za-z]+ | [A-Za-z]{{2,}} )?  # " cubic feet", "km"
     (?: (?:\ ?/\ ?|\ per\ )[A-Za-z]+ )? )                               # "/week", " per hour"
    """, re.VERBOSE)


def to_number(text):
    """The one number that a text is, as a Fraction. None: a second one, or work not done."""
    if len(text) > 200:
        return None
    # LaTeX to plain text: separators of thousands, fractions, words
    text = re.sub(r"(?<=[0-9])(?:\{,\}|,?\\[,!])(?=[0-9]{3})", ",", text)    # 385\,000
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}", r" \1/\2 ", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r" \1", text)
    # and what stands beside a number: degrees, 18~\text{cm}, currencies, percents, spaces
    text = re.sub(r"(?:\^\{?\\circ\}?|°)\s*(?:[CF]\b)?|(?<=[0-9}])~|\\[,;:! ]|\\?[$%]"
                  r"|[€£¥₹]|\\[()\[\]]", " ", text)
    match = NUMBER.fullmatch(" ".join(bare(text).split()).removesuffix(".").strip())
    if match and not re.search(SCALE, match[2]):
        with suppress(ValueError, ZeroDivisionError):
            return Fraction(re.sub("[ ,]", "", match[1]))


def grade_gsm8k(text, example):
    """Format: 0.5 complete think tag + 0.5 complete answer tag."""
    content, tagged, thought = last_answer(text, box=True)
    value, gold = to_number(content or ""), to_number(str(example["answer"]).split("####")[-1])
    reason = ("no answer" if content is None else "not one number" if value is None
              else f"number {value}")
    right = value is not None and value == gold
    return graded(0.5 * thought + 0.5 * tagged, right, reason, content or "", tagged)


class Tasks(dict):
    update = MutableMapping.update    # by __setitem__, unlike dict's own
    def __missing__(self, name):
        raise TaskError(f"--task {name} is unknown: choose {', '.join(self)}, or a FILE.py")

    def __setitem__(self, name, task):
        if not isinstance(task, Task):
            raise TaskError(f"TASKS[{name!r}] is {type(task).__name__}, must be a tasks.Task")
        super().__setitem__(name, task)


TASKS = Tasks({task.name: task for task in (
    Task("countdown", countdown_prompt, grade_countdown, make_countdown, read_countdown,
         options={"numbers": 3, "max_number": 100, "max_target": 100, "division": True},
         limits={"numbers": (2, 6), "max_number": (1, 10**6), "max_target": (1, 10**6)},
         key=lambda example: (sorted(example["nums"]), example["target"])),
    Task("sudoku", sudoku_prompt, grade_sudoku, make_sudoku, read_sudoku,
         options={"empties": 8}, limits={"empties": (0, 12)},    # 3 givens never suffice
         key=lambda example: example["solution"], same=lambda example: example["puzzle"]),
    Task("gsm8k", question_prompt, grade_gsm8k, read=read_gsm8k,
         hub={"train": "openai/gsm8k main train", "test": "openai/gsm8k main test"}))})
TASKS["countdown-3to4"] = replace(
    TASKS["countdown"], name="countdown-3to4", make=None, part=part_of_3to4,
    hub=dict.fromkeys(("train", "test"), "Jiayi-Pan/Countdown-Tasks-3to4 train"),
    options={"numbers": 3}, limits={"numbers": (3, 4)})
TASKS["gsm8k-platinum"] = replace(TASKS["gsm8k"], name="gsm8k-platinum", hub={
    "train": "openai/gsm8k main train", "test": "madrylab/gsm8k-platinum main test"})


def grade(name, text, example):
    return grade_batch(name, [text], [example])[0]


def grade_batch(name, texts, examples):
    """A Grade for every text, the same as one by one; TaskError for what is none."""
    task = TASKS[name]
    grader = task.grade_batch or task.grade
    grades = (task.grade_batch(texts, examples) if task.grade_batch else
              [task.grade(text, example) for text, example in zip(texts, examples)])
    grades = list(grades) if isinstance(grades, Iterable) else [grades]
    who = f"{getattr(grader, '__name__', grader)} of task {name} returned"
    if len(grades) != len(texts):
        raise TaskError(f"{who} {len(grades)} grades for {len(texts)} texts, one each is due")
    for grade, example in zip(grades, examples):    # one NaN would reach every weight
        real = isinstance(grade, Grade) and isinstance(grade.reward, numbers.Real)
        if not (real and abs(grade.reward) < float("inf")):
            raise TaskError(f"{who} {printable(repr(grade)[:200])}, no Grade with a finite "
                            f"reward, for the problem {printable(repr(example)[:200])}")
    return grades


# --- Data -------------------------------------------------------------------------------------
SIZES = {"train": 100_000, "test": 1_000}   # of a generated split; each is made when asked for
HUB_SECONDS = 3.0                           # to find out whether the hub is there


class Examples(Sequence):
    """A sequence of dicts; `source` says where they are from, beside every result."""
    def __init__(self, get, size, source):
        self.get, self.size, self.source = get, size, source

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        place = range(self.size)[i]    # negative numbers, slices and errors as of a list
        return [self.get(j) for j in place] if isinstance(i, slice) else self.get(place)


@contextmanager
def one_sentence(beginning):
    """Whatever is raised inside becomes a TaskError of one line."""
    try:
        yield
    except Exception as error:    # data sets raise what a dozen readers raise
        told = " ".join((str(error) or type(error).__name__).split())
        raise TaskError(f"{beginning}: {printable(told[:200])}") from error


def key(task, example, test=False):
    """What a training problem may not share with a test problem; test: two of those neither."""
    own = test and task.same or task.key
    if own:
        return repr(own(example))
    return "".join(task.prompt(example)[-1]["content"].split()).casefold()


def load(name, split, seed=0, file=None, size=None, held_out=(), **options):
    """The examples of split "train" or "test": a sequence of dicts with a `source`. Example i
    of a generated task follows from (seed, i, options); files keep their order. No training
    example shares a problem with held_out, the test examples."""
    task = TASKS[name]
    options = checked(task, options)
    if split not in SIZES or not (task.read if file else task.make or split in task.hub):
        raise TaskError(f"task {name} reads no --{split}_file" if file else
                        f"task {name} has no {split} data of its own: give --{split}_file")
    # Training never sees a test problem, wherever the two come from.
    if split == "train" and not held_out and not file and "test" in task.hub:
        held_out = load(name, "test", **options)
    known = {key(task, example) for example in held_out if split == "train"}
    if task.make and not file:
        return generated(task, split, seed, size or SIZES[split], known, options)

    # A file or the hub: row by row, so that a bad one is named. Files are not parted.
    rows, source = rows_of(split, file, task.hub.get(split))
    kept, seen, out = [], set(), Counter()
    for number, row in enumerate(rows, 1):
        with one_sentence(f"{source}, row {number}, a field is wrong or missing for {name}"):
            example = task.read(row, split, options)
        if example is None or task.part and not file and not task.part(example, split, options):
            out["left out by the task's options"] += 1
        elif key(task, example) in known:
            out["left out because they are test problems"] += 1
        elif split == "test" and key(task, example, test=True) in seen:
            out["left out because they repeat a problem"] += 1
        else:
            kept.append(example)
            seen.add(key(task, example, test=True))
    # The source says what was left out; it stands beside every result.
    said = ", ".join(["", *(f"{count} rows {why}" for why, count in out.items())])
    if not kept:
        raise TaskError(f"{source} has no {split} rows for task {name}{said}")
    if split == "train" and not known:
        said += ", test problems not looked for"
    # What a task makes or parts itself has these options; a file is taken as it is.
    idle = [name for name, value in options.items() if value != task.options[name]]
    if file and idle and (task.make or task.part):
        said += f", --{' and --'.join(idle)} without effect on a file"
    return Examples(kept.__getitem__, len(kept[:size]), source + said)


def checked(task, options):
    """With the defaults of those not given."""
    for name, value in options.items():
        if name not in task.options:
            flags = ", ".join(f"--{option}" for option in task.options) or "none"
            raise TaskError(f"--{name} is no option of task {task.name}; its options: {flags}")
        kind, (low, high) = type(task.options[name]), task.limits.get(name, (value, value))
        if type(value) is not kind or not low <= value <= high:
            raise TaskError(f"--{name} {value!r} cannot work: {task.name} takes {low} to "
                            f"{high}, of type {kind.__name__}")
    return {**task.options, **options}


def generated(task, split, seed, size, known, options):
    def make(i):
        """The i-th example, drawn again while it is a test problem."""
        for again in range(1000):
            another = f"{seed} again {again}" if again else f"{seed}"
            example = task.make(another, i, split, **options)
            if key(task, example) not in known:
                return example
        raise TaskError(f"the test problems leave no training problem of {task.name}")
    make(0)    # options that leave no problem are refused here, not in the first step
    if split == "train":
        beside = ", no test problem" if known else ""
        return Examples(make, size, f"generated, seed {seed}{beside}")
    different = {}
    for example in map(make, range(5 * size)):    # fewer where the options leave fewer
        different.setdefault(key(task, example, test=True), example)
        if len(different) == size:
            break
    return Examples(list(different.values()).__getitem__, len(different),
                    f"generated, seed {seed}, {len(different)} different problems")


def rows_of(split, file, hub):
    """(rows, where they are from): of a JSONL, CSV or parquet file, or of the hub."""
    import datasets
    import huggingface_hub
    if not file:
        # Where no hub answers its client retries for half a minute; offline: the cache only.
        name, *configuration, hub_split = hub.split()
        offline = datasets.config.HF_HUB_OFFLINE or not hub_answers(huggingface_hub)
        with (one_sentence(f"{hub} did not load from the hub, give --{split}_file"),
              patch.object(datasets.config, "HF_HUB_OFFLINE", offline),
              patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)):
            return datasets.load_dataset(name, *configuration, split=hub_split).to_list(), hub
    source, file = f"--{split}_file {file}", Path(file).expanduser()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)    # our sentence says it
    # All columns of a CSV stay text, or 0302 would become 302.
    text = {"keep_default_na": False, "converters": dict.fromkeys(range(100), str)}
    readers = {".jsonl": json_rows, ".json": json_rows,
               ".csv": lambda name: datasets.Dataset.from_csv(name, streaming=True, **text),
               ".parquet": lambda name: datasets.Dataset.from_parquet(name, streaming=True)}
    with one_sentence(f"{source} cannot be read as {', '.join(readers)}"):
        return list(readers[file.suffix.lower()](str(file))), source


def json_rows(file):
    """One object a line. pyarrow counts rows from 0, and a null in front ends the process."""
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                with one_sentence(f"line {number}"):
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("it is no object, write one object a line")
                yield row


def hub_answers(huggingface_hub):
    """Asked in a thread, because looking up a host name has no timeout of its own."""
    answers, url = [], huggingface_hub.constants.ENDPOINT

    def ask():
        with suppress(Exception):    # whatever it is, the hub did not answer
            answers.append(huggingface_hub.get_session().head(url, timeout=HUB_SECONDS))
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return bool(answers)
