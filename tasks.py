r"""Tasks: data, prompts and checkers. Training and evaluation grade with the same functions.

A literal problem of each task, and the text that earns the maximum reward, 4:

    countdown   {"nums": [17, 18, 5], "target": 67}
                <answer>17 * 5 - 18 = 67</answer>
    sudoku      {"puzzle": "1002020100030310", "solution": "1432324141232314"}
                <answer>1432324141232314</answer>
    gsm8k       {"question": "Ann has 3 bags of 6 pears. How many pears?", "answer": "18"}
                <think>3 x 6</think><answer>\boxed{18}</answer>

countdown-3to4 and gsm8k-platinum are the same tasks on other data. MATH and multiple choice are
files of their own, lab/math_task.py and lab/choice_task.py: `--task FILE.py` loads such a file.

`correct` is about content, `format` about tags. Reward = format + 3 x right: a right answer
without tags earns 3, a wrong one with all its tags 1.

                format                                                  right
    countdown   0.5 complete answer tag + 0.5 an expression             1 or 0
    sudoku      0.5 complete answer tag + 0.25 sixteen digits 1-4       share of the empty cells
                + 0.25 the given digits kept                            that are right
    gsm8k       0.5 complete think tag + 0.5 complete answer tag        1 or 0

Left out on purpose: executing anything a model wrote (no eval, here or in a library), recursion
on its text, credit for reasoning.
"""
import ast
import contextlib
import hashlib
import itertools
import logging
import operator
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Optional

# --- What every task has ----------------------------------------------------------------------


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
    """All that training and evaluation know of a task; TASKS["mine"] = Task(..) adds yours."""
    name: str
    prompt: Callable                   # example -> chat messages
    grade: Callable                    # text, example -> Grade
    make: Optional[Callable] = None    # seed, index, split, **options -> example, if generated
    read: Optional[Callable] = None    # row, split, options -> example; None leaves the row out
    hub: dict = field(default_factory=dict)        # split -> data set, configuration, its split
    part: Optional[Callable] = None    # example, split, options -> does a hub row belong here?
    options: dict = field(default_factory=dict)    # name -> default; each is a flag
    limits: dict = field(default_factory=dict)     # name -> smallest, largest
    key: Optional[Callable] = None     # example -> what train and test may not share
    grade_batch: Optional[Callable] = None         # texts, examples -> grades, where cheaper


class Found(NamedTuple):
    """The answer of a text."""
    content: Optional[str]    # None: there is none
    where: str                # "tag", "open tag", "thought", "box" (somewhere in the content)
    thought: bool             # was a <think> opened and closed?

    @property
    def tagged(self):
        """Did it stand in a complete tag, outside thoughts?"""
        return self.where == "tag"


# Repeating the instructions is not answering: "<answer></answer>", "\boxed{...}".
ECHO = re.compile(r"(?:\\boxed|boxed|\\[()\[\]]|[\s.…,:={}$]|your|the|final|answer|here"
                  r"|expression|target)*")
BRACE = re.compile(r"\\?boxed\s*\{|\\.|[{}]", re.DOTALL)    # \{ is no brace
LONGEST = 20_000              # boxes are looked for in so many characters at the end of a text


def last_answer(text, box=False):
    """The last complete <answer>; else what follows an unclosed one; else, if box, the boxes.

    What a closed <think> holds counts only where nothing else is an answer; a <think> that was
    never closed hides nothing. Returns a Found; linear in the text.
    """
    head, closed, tail = text.rpartition("</think>")
    spoken, thoughts = re.subn("<think>.*?</think>", " ", head + closed, flags=re.DOTALL)
    places = [(spoken + tail, "tag"), (text, "thought")]
    for part, name in places[:1 + (thoughts > 0)]:
        opened = part.split("<answer>")[1:]
        complete = [x.partition("</answer>")[0] for x in opened if "</answer>" in x]
        unclosed = [re.split("</|<think>", x)[0] for x in opened if "</answer>" not in x]
        for where, contents in ((name, complete), ("open tag", unclosed)):
            real = [content for content in contents if not ECHO.fullmatch(content)]
            if real:
                return Found(real[-1], where, thoughts > 0)
        if box and boxes(part):
            return Found(part, "box", thoughts > 0)
    if "</answer>" in (spoken + tail).partition("<answer>")[2]:
        return Found("", "tag", thoughts > 0)                # a complete tag with nothing in it
    return Found(None, "nowhere", thoughts > 0)


def boxes(text):
    """All \\boxed{..} that hold something, in the order they end: [(start, content, end)]."""
    skipped, found, opened = max(0, len(text) - LONGEST), [], []
    for brace in BRACE.finditer(text, skipped):
        if brace[0].endswith("{") and brace[0] != r"\{":
            opened.append(brace)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            content = text[start.end():brace.start()].strip()
            if "boxed" in start[0] and not ECHO.fullmatch(content):
                found.append((start.start(), content, brace.end()))
    return found


def printable(text):
    """With control characters written out, line breaks too: safe to print on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def graded(format, right, reason, parsed, tagged=True, **metrics):
    """The usual Grade. `right` is a share from 0 to 1, and 1 is correct."""
    metrics = {"tagged": float(tagged), **metrics}
    parsed = printable(parsed[:200])
    return Grade(format + 3.0 * right, right == 1, format, reason, parsed, metrics)


def chat(rules, question):
    """The system turn has all instructions; the user turn is the problem alone."""
    return [{"role": "system", "content": rules}, {"role": "user", "content": question}]


# --- Countdown: reach the target, every number once -------------------------------------------

def in_test(nums, target):
    """One problem in eight is a test problem, whatever the seed, the order and the process."""
    digest = hashlib.blake2b(repr((sorted(nums), target)).encode(), digest_size=1).digest()
    return digest[0] < 32


def make_countdown(seed, index, split, numbers, max_number, max_target, division):
    """Numbers and a random expression over all of them, drawn until it hits a target."""
    rng = random.Random(f"{seed} {index} {split}")    # no global generator, no order of calls
    for _ in range(20_000):
        nums = [rng.randrange(max_number) + 1 for _ in range(numbers)]
        items = [(n, 1) for n in nums]                # numerator, denominator: fast
        while len(items) > 1:
            a, b = items.pop(int(rng.random() * len(items)))
            c, d = items.pop(int(rng.random() * len(items)))
            op = int(rng.random() * (4 if division else 3))
            if op == 3 and c == 0:
                items = [(0, 1)]                      # division by zero: 0 is no target
            else:
                top = (a * d + c * b, a * d - c * b, a * c, a * d)[op]
                items.append((top, b * c if op == 3 else b * d))
        target, rest = divmod(*items[0])
        wanted = rest == 0 and 1 <= target <= max_target
        if wanted and in_test(nums, target) == (split == "test"):
            return {"nums": nums, "target": target}
    raise TaskError(f"--numbers {numbers} --max_number {max_number} --max_target {max_target} "
                    f"leave no {split} problem of countdown: allow larger numbers or targets")


def whole(value):
    """3 out of 3, "3" or 3.0; anything else is refused, not rounded."""
    if not re.fullmatch(r"\s*-?[0-9]{1,18}(\.0*)?\s*", str(value)):
        raise ValueError(f"{str(value)[:40]!r} is not a whole number")
    return int(str(value).partition(".")[0])


def read_countdown(row, split, options):
    """{"nums": [30, 100, 93], "target": 23} or {"input": "30,100,93", "output": "23"}"""
    nums, target = row.get("nums"), row.get("target")
    if row.get("input") is not None:
        nums, target = row["input"], row["output"]
    nums = [whole(n) for n in (nums.strip("[] ").split(",") if isinstance(nums, str) else nums)]
    if not nums or min(nums) < 0:
        raise ValueError("the numbers must be one or more integers from 0")
    return {"nums": nums, "target": whole(target)}


def part_of_3to4(example, split, options):
    """The hub has one split of 3 and 4 numbers: choose the count, part it as the generated."""
    same_count = len(example["nums"]) == options["numbers"]
    return same_count and in_test(**example) == (split == "test")


def countdown_prompt(example):
    numbers, target = " ".join(map(str, example["nums"])), example["target"]
    return chat("Reach the target from the numbers with + - * / and parentheses, using every "
                "number exactly once. Think inside <think></think>, then write only the "
                "equation, expression = target, inside <answer></answer>.\n"
                "Example: for Numbers: 8 3 6 and Target: 30, write "
                "<answer>(8 - 3) * 6 = 30</answer>.",
                f"Numbers: {numbers}\nTarget: {target}")


SPELLINGS = {"×": "*", "·": "*", "⋅": "*", r"\times": "*", r"\cdot": "*", "÷": "/",
             r"\div": "/", "−": "-", "–": "-", r"\left(": "(", r"\right)": ")"}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv}


@lru_cache(maxsize=4096)                                 # the rollouts of a problem repeat
def expression(text):
    """The syntax tree of integers, + - * / and parentheses, or None. Python only parses."""
    for spelling, symbol in SPELLINGS.items():
        text = text.replace(spelling, symbol)
    text = re.sub(r"(?<=[0-9)])\s*\(", "*(", text)       # 7(9 - 4) is 7 * (9 - 4)
    text = re.sub(r"(?<![0-9])0+(?=[0-9])", "", text)    # Python refuses 017
    if not re.fullmatch(r"[-+*/() 0-9]+", text):
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    allowed = (ast.BinOp, ast.Constant, *OPERATORS)      # no signs, no **, no //, no ()
    return tree if all(isinstance(node, allowed) for node in ast.walk(tree)) else None


def value_of(tree):
    """Its exact value; None: a division by zero. As deep as the problem has numbers."""
    if isinstance(tree, ast.Constant):
        return Fraction(tree.value)
    a, b = value_of(tree.left), value_of(tree.right)
    if a is None or b is None or b == 0 and isinstance(tree.op, ast.Div):
        return None
    return OPERATORS[type(tree.op)](a, b)


def unwrap(text):
    """Without a full stop, dollars, \\( \\) and the one \\boxed{} around all of it."""
    dollars = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
    for start, end in (*dollars, (r"\boxed{", "}"), *dollars):
        text = text.removesuffix(".").strip()
        if text.startswith(start) and text.endswith(end) and len(text) >= len(start + end):
            text = text[len(start):-len(end)].strip()
    return text.removesuffix(".").strip()


def grade_countdown(text, example):
    """`expression = target`, or the expression alone."""
    found = last_answer(text)
    answer = unwrap(" ".join((found.content or "").split()))    # a line break is white space
    left, *right = (side.strip() for side in answer.split("="))
    tree, format = None, 0.5 * found.tagged
    if len(answer) <= 500 and (not right or re.fullmatch("-?[0-9]+", "=".join(right))):
        tree = expression(left)
    if tree is None:
        reason = "not an expression of integers, + - * / ( )"
        return graded(format, 0, reason, answer, found.tagged)

    # After this comparison the tree has the problem's numbers only: evaluating it is quick.
    used = Counter(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    unused, extra = Counter(example["nums"]) - used, used - Counter(example["nums"])
    right_side = int(right[0]) if right else example["target"]
    value = None if unused or extra else value_of(tree)
    if unused:
        reason = f"number {min(unused)} unused"
    elif extra:
        reason = f"number {str(min(extra))[:20]} not given, or used too often"
    elif right_side != example["target"]:
        reason, value = f"right side {right[0][:20]} is not the target", None
    else:
        reason = "division by zero" if value is None else f"value {value}"
    return graded(format + 0.5, value == example["target"], reason, answer, found.tagged)


# --- Sudoku, 4x4 ------------------------------------------------------------------------------

@lru_cache
def grids():
    """All 288 full grids: a grid is right if and only if it is one of them."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    halves = [a + b for a in rows for b in rows if len({*a[:2], *b[:2]}) == 4]    # full boxes
    return [top + bottom for top in halves for bottom in halves
            if all(len({*top[i::4], *bottom[i::4]}) == 4 for i in range(4))]      # and columns


@lru_cache
def split_grids(split):
    """58 of the 288 grids, by hash and not by seed, are the solutions of all test problems."""
    order = sorted(grids(), key=lambda grid: hashlib.blake2b(grid.encode()).digest())
    return order[:58] if split == "test" else order[58:]


def solutions(puzzle):
    """With dots for its empty cells, a puzzle is the regular expression of its solutions."""
    return re.findall(puzzle.replace("0", "."), "\n".join(grids()))


def make_sudoku(seed, index, split, empties):
    """Empty cells of a grid in random order, but for those that keep its solution the only one.

    Drawn again where that ends too early. 4 givens can suffice, 3 never do: at most 12 empty.
    """
    rng = random.Random(f"{seed} {index} {split}")
    while True:
        solution, cells = rng.choice(split_grids(split)), rng.sample(range(16), 16)
        puzzle = solution
        for cell in cells:
            emptied = puzzle[:cell] + "0" + puzzle[cell + 1:]
            if puzzle.count("0") < empties and len(solutions(emptied)) == 1:
                puzzle = emptied
        if puzzle.count("0") == empties:
            return {"puzzle": puzzle, "solution": solution}


def kept(puzzle, grid):
    """Does the grid keep the given digits?"""
    return all(given in ("0", digit) for given, digit in zip(puzzle, grid))


def read_sudoku(row, split, options):
    """{"Puzzle": "0302...", "Solution": "1342..."}; an int gets its leading zeros back."""
    row = {name.lower(): str(value).strip().zfill(16) for name, value in row.items()}
    puzzle, solution = row["puzzle"], row["solution"]
    if not re.fullmatch("[0-4]{16}", puzzle) or solution not in grids():
        raise ValueError("the puzzle must be 16 digits 0-4 and the solution a full valid grid")
    if not kept(puzzle, solution):
        raise ValueError("the solution changes a given digit of the puzzle")
    return {"puzzle": puzzle, "solution": solution}


# Of the training grids. Without examples LLaDA copies the zeros in most of its grids, and
# almost no rollout earns anything for cells: nothing to learn from.
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
                f"\n\n{worked}",
                sudoku_question(example["puzzle"]))


def grade_sudoku(text, example):
    """Report `correct` first: one digit in all empty cells has a cell accuracy of 25 %."""
    puzzle, solution = example["puzzle"], example["solution"]
    found = last_answer(text)
    grid, format = "".join((found.content or "").split()), 0.5 * found.tagged
    if not re.fullmatch("[1-4]{16}", grid):
        reason = "not sixteen digits 1-4"
        return graded(format, 0, reason, grid, found.tagged, cell_accuracy=0.0)
    format += 0.25 + 0.25 * kept(puzzle, grid)
    correct = kept(puzzle, grid) and grid in grids()    # any, if a puzzle of a file has several
    empty = [cell for cell in range(16) if puzzle[cell] == "0"]
    share = sum(grid[cell] == solution[cell] for cell in empty) / max(1, len(empty))
    share = 1.0 if correct else share
    reason = ("a valid grid" if correct else "a row, column or box repeats a digit"
              if kept(puzzle, grid) else "a given digit was changed")
    grade = graded(format, share, reason, grid, found.tagged, cell_accuracy=share)
    return replace(grade, correct=correct)


# --- GSM8K: one number ------------------------------------------------------------------------

def gsm8k_gold(answer):
    """"... #### 18" -> "18". A number, 18 or 27.0, is fine too."""
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return str(answer).rsplit("####", 1)[-1].strip()


def read_gsm8k(row, split, options):
    """{"question": .., "answer": ".. #### 18"}"""
    gold = gsm8k_gold(row["answer"])
    if to_number(gold) is None:
        raise ValueError(f"the answer {gold[:40]!r} is not a number")
    return {"question": row["question"].strip(), "answer": gold}


def question_prompt(example):
    return chat("Solve the mathematics problem. Think step by step inside <think></think>, "
                r"then write only the final answer, in \boxed{}, inside <answer></answer>.",
                example["question"])


# What a box may not touch, or it is a part only: -\boxed{18}, \boxed{9}^2, 9 + \boxed{9}
COMMAND = r"\\(?:times|cdot|div|frac|sqrt|pm)"
BEFORE = re.compile(rf"(?:[-+−*/^×÷·0-9]|{COMMAND}\{{?)(?:\\?\$|\\[(\[]|[ \t])*\Z")
AFTER = re.compile(rf"(?:\\?\$|\\[)\]]|[ \t}})\]])*"
                   rf"(?:[-+−*/×÷·]\s*[\\({{0-9]|[!^_0-9]|{COMMAND})")


def boxed_answer(found):
    """The content of the last box of an answer, or all of the answer where it has none.

    None where a tag has two different boxes, or where the box is only a part of the answer.
    """
    text = found.content
    closed = boxes(text)
    if not closed:
        # \boxed{18</answer>: the tag says where the box ends. \boxed{}18: so it was meant.
        opened = re.match(r"(?:\\[(\[]|[\s$])*\\?boxed\s*\{([^{}]*)$", text)
        if opened and found.tagged:
            return opened[1].strip()
        return re.sub(r"\\?boxed\s*\{\s*\}", "", text).strip()
    start, content, end = closed[-1]
    if found.where != "box" and len({content for _, content, _ in closed}) > 1:
        return None
    after = text[end:end + 40]
    word = re.match(r"[\s$)\\]*(?:text\{)?\s*([A-Za-z]*)", after)[1]
    part = BEFORE.search(text[max(0, start - 40):start]) or AFTER.match(after)
    return None if part or changes_value(word, joins=found.where != "box") else content


# Words that change a number, plurals and short forms included; and words that join two.
SCALES = set("""k thou thousand mil mln mn million bil bn billion tril tn trillion grand hundred
    dozen score gross half halve third quarter fourth fifth sixth eighth tenth hundredth
    thousandth millionth squared cubed factorial double twice triple negative""".split())
JOINS = set("or and not to plus minus over".split())


def changes_value(words, joins=True):
    """Is one of these words more than a unit? Of single letters, m, g, s, h and l are units."""
    for word in re.findall("[A-Za-z]+", words):
        if {word.lower(), word.lower().rstrip("s")} & SCALES or joins and word.lower() in JOINS:
            return True
        if len(word) == 1 and word not in "mgshlLaI":
            return True
    return False


INTEGER = r"([0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
PER = r"(?:(?:\s*/\s*|\sper\s)[A-Za-z]+)?"
NUMBER = re.compile(rf"""([+-]?) \s* (?:
    \\[dt]?frac \s* \{{ \s*{INTEGER}\s* \}} \s* \{{ \s*{INTEGER}\s* \}}       # \frac{{36}}{{2}}
    | {INTEGER} \s*/\s* {INTEGER}                                             # 36/2
    | {INTEGER}? (\.[0-9]+)? )                                                # 18, 1,000.5, .5
    (?: \s* \\(?:text|mathrm)\s*\{{ ([A-Za-z\s/]*) \}}                        # \text{{ hours}}
    | \s+ ((?:(?:square|cubic)\s)? [A-Za-z]+ {PER}) | ([A-Za-z]{{2,}} {PER}) )?  # kg/week, km
    """, re.VERBOSE)


def to_number(text):
    """The one number that a text is, as a Fraction. None: a second one, or work not done."""
    if len(text) > 200:
        return None
    text = text.replace("{,}", ",").replace("−", "-")
    text = re.sub(r"\\[,;:! ]|\\?[$%]|\\[()\[\]]|\^\{?\\circ\}?", " ", text).strip()
    match = NUMBER.fullmatch(text.removesuffix(".").strip())
    if match is None or changes_value(" ".join(filter(None, match.groups()[-3:]))):
        return None
    sign, *parts = ((part or "").replace(",", "") for part in match.groups()[:7])
    top, bottom, top2, bottom2, integer, decimals = parts
    top, bottom = top or top2 or integer + decimals, bottom or bottom2 or "1"
    return Fraction(sign + top) / int(bottom) if top and int(bottom) else None


def grade_gsm8k(text, example):
    found = last_answer(text, box=True)
    format = 0.5 * found.thought + 0.5 * found.tagged
    if found.content is None:
        return graded(format, 0, "no answer", "", found.tagged)
    content = boxed_answer(found)
    value = None if content is None else to_number(content)
    if value is None:
        shown = found.content[-200:] if content is None else content
        return graded(format, 0, "not one number", shown, found.tagged)
    right = value == to_number(gsm8k_gold(example["answer"]))
    return graded(format, right, f"number {value}", content, found.tagged)


# --- The table --------------------------------------------------------------------------------

TASKS = {task.name: task for task in (
    Task("countdown", countdown_prompt, grade_countdown, make_countdown, read_countdown,
         options={"numbers": 3, "max_number": 100, "max_target": 100, "division": True},
         limits={"numbers": (2, 6), "max_number": (1, 10**6), "max_target": (1, 10**6)},
         key=lambda example: (sorted(example["nums"]), example["target"])),
    Task("sudoku", sudoku_prompt, grade_sudoku, make_sudoku, read_sudoku,
         options={"empties": 8}, limits={"empties": (0, 12)},
         key=lambda example: example["solution"]),
    Task("gsm8k", question_prompt, grade_gsm8k, read=read_gsm8k, hub={
        "train": ("openai/gsm8k", "main", "train"), "test": ("openai/gsm8k", "main", "test")}),
)}
TASKS["countdown-3to4"] = replace(
    TASKS["countdown"], name="countdown-3to4", make=None, part=part_of_3to4,
    hub=dict.fromkeys(("train", "test"), ("Jiayi-Pan/Countdown-Tasks-3to4", None, "train")),
    options={"numbers": 3}, limits={"numbers": (3, 4)})
TASKS["gsm8k-platinum"] = replace(TASKS["gsm8k"], name="gsm8k-platinum", hub={
    **TASKS["gsm8k"].hub, "test": ("madrylab/gsm8k-platinum", "main", "test")})


def find_task(name):
    if name not in TASKS:
        raise TaskError(f"--task {name} is unknown: choose one of {', '.join(TASKS)}, or a "
                        "file that registers a task, as lab/math_task.py does")
    return TASKS[name]


def grade(name, text, example):
    return find_task(name).grade(text, example)


def grade_batch(name, texts, examples):
    """A Grade for every text, the same as one by one."""
    task = find_task(name)
    if task.grade_batch is None:
        return [task.grade(text, example) for text, example in zip(texts, examples)]
    grades = list(task.grade_batch(texts, examples))
    if len(grades) != len(texts):
        raise TaskError(f"grade_batch of task {name} returned {len(grades)} grades for "
                        f"{len(texts)} texts: it must return one for each, in their order")
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
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(self.size))]
        if not -self.size <= i < self.size:
            raise IndexError(f"example {i} of {self.size}")
        return self.get(i % self.size)


def key(task, example):
    """What a training problem may not share with a test problem."""
    if task.key is not None:
        return repr(task.key(example))
    return "".join(task.prompt(example)[-1]["content"].split()).casefold()


def load(name, split, seed=0, file=None, size=None, held_out=(), **options):
    """The examples of split "train" or "test": a sequence of dicts with a `source`.

    Example i of a generated task is a function of (seed, i, options); a file or the hub keeps
    its order. held_out: the test examples; training examples that share a problem with them are
    left out, or drawn again. Raises TaskError.
    """
    task, known = find_task(name), set()
    options = checked_options(task, options)
    if split not in SIZES:
        raise TaskError(f"split {split} is unknown: choose train or test")
    if file is None and task.make is None and split not in task.hub:
        raise TaskError(f"task {name} has no {split} data of its own: give --{split}_file")
    if file is not None and task.read is None:
        raise TaskError(f"task {name} makes its problems and reads no --{split}_file")
    if split == "train":
        if not held_out and file is None and "test" in task.hub:
            held_out = load(name, "test", **options)
        known = {key(task, example) for example in held_out}
    if file is None and task.make is not None:
        return generated(task, split, seed, size or SIZES[split], known, options)

    rows, source = read_file(split, file) if file else read_hub(split, *task.hub[split])
    examples, unwanted, shared = [], 0, 0
    for number, row in enumerate(rows, 1):
        try:
            example = task.read(row, split, options)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            why = "" if isinstance(error, ValueError) else "a field is wrong or missing: "
            raise TaskError(f"{source}, row {number} is no row of task {name}: "
                            f"{why}{first_line(error)}") from error
        if example is None or not file and task.part and not task.part(example, split, options):
            unwanted += 1
        elif known and key(task, example) in known:
            shared += 1
        else:
            examples.append(example)
    if not examples:
        raise TaskError(f"{source} has no {split} rows for task {name}: {unwanted} left out by "
                        f"its options, {shared} because they are test problems")
    source += f", {unwanted} rows left out by the task's options" if unwanted else ""
    if split == "train":
        source += (f", {shared} rows left out because they are test problems" if known
                   else ", test problems not looked for")
    return Examples(examples.__getitem__, min(size or len(examples), len(examples)), source)


def generated(task, split, seed, size, known, options):
    def make(i):
        for again in range(1000):
            other = f" again {again}" if again else ""
            example = task.make(f"{seed}{other}", i, split, **options)
            if not known or key(task, example) not in known:
                return example
        raise TaskError(f"the test problems leave no training problem of {task.name}: give "
                        "fewer test problems, or --train_file")

    make(0)    # options that leave no problem are refused here, not in the first step
    if split == "train":
        beside = ", no test problem among them" if known else ""
        return Examples(make, size, f"generated, seed {seed}{beside}")

    # A test problem twice would make its accuracy look surer than it is.
    make, first = lru_cache(maxsize=None)(make), {}
    for i in range(5 * size):
        example = make(i)
        first.setdefault(key(task, example) if "nums" in example else repr(example), i)
        if len(first) == size:
            break
    once = list(first.values())
    return Examples(lambda i: make(once[i]), len(once),
                    f"generated, seed {seed}, {len(once)} different problems")


def checked_options(task, options):
    for name, value in options.items():
        if name not in task.options:
            flags = ", ".join(f"--{option}" for option in task.options) or "none"
            raise TaskError(f"--{name} is no option of task {task.name}; its options: {flags}")
        kind = type(task.options[name])
        low, high = task.limits.get(name, (value, value))
        if type(value) is not kind or not low <= value <= high:
            raise TaskError(f"--{name} {value!r} cannot work: {task.name} takes a "
                            f"{kind.__name__} from {low} to {high}")
    return {**task.options, **options}


def first_line(error):
    return printable(" ".join((str(error) or type(error).__name__).split())[:200])


@contextlib.contextmanager
def offline(wanted):
    """Where no hub answers, its client retries for half a minute; offline it uses the cache."""
    import datasets
    import huggingface_hub
    switches = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in switches]
    try:
        for module in switches:
            module.HF_HUB_OFFLINE = wanted or module.HF_HUB_OFFLINE
        yield datasets
    finally:
        for module, value in zip(switches, before):
            module.HF_HUB_OFFLINE = value


def read_file(split, file):
    """The rows of a JSONL, CSV or parquet file, read by `datasets` without its cache."""
    path, source = Path(file), f"--{split}_file {file}"
    kind = path.suffix[1:].replace("jsonl", "json")
    if kind not in ("json", "csv", "parquet") or not path.is_file():
        raise TaskError(f"{source} is no such file: give a .jsonl, .csv or .parquet file")
    # All columns of a CSV stay text, or 0302 would become 302.
    text = {"keep_default_na": False, "converters": dict.fromkeys(range(100), str)}
    logging.getLogger("datasets").setLevel(logging.CRITICAL)    # our sentence says it
    try:
        if kind == "json" and path.open("rb").read(100).lstrip()[:1] == b"[":
            raise ValueError("line 1 is an array, write one object a line")
        with offline(True) as datasets:    # it would count the use of its readers at the hub
            rows = datasets.load_dataset(kind, data_files=str(path), split="train",
                                         streaming=True, **(text if kind == "csv" else {}))
            return list(rows), source
    except Exception as error:    # datasets raises what a dozen readers raise
        raise TaskError(f"{source} cannot be read: {first_line(error)}") from error


def read_hub(split, name, configuration, hub_split):
    """The rows of a data set of the hub, or of its copy in the cache."""
    import huggingface_hub
    try:
        with offline(not hub_answers(huggingface_hub)) as datasets:
            data = datasets.load_dataset(name, configuration, split=hub_split)
    except Exception as error:    # no network, no such id, a full disk: the same way out
        raise TaskError(f"{name} ({hub_split} split) did not load from the hub, "
                        f"{first_line(error)}: give --{split}_file") from error
    return data.to_list(), " ".join(filter(None, (name, configuration, hub_split)))


def hub_answers(huggingface_hub):
    """Asked in a thread, because looking up a host name has no timeout of its own."""
    answers = []

    def ask():
        with contextlib.suppress(Exception):    # whatever it is, the hub did not answer
            url = huggingface_hub.constants.ENDPOINT
            answers.append(huggingface_hub.get_session().head(url, timeout=HUB_SECONDS))
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return bool(answers)
