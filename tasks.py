r"""Tasks: data, prompts and checkers. Training and evaluation grade with the same functions.

A literal problem of each task, and the text that earns the maximum reward, 4:

    countdown   {"nums": [17, 18, 5], "target": 67}
                <answer>17 * 5 - 18 = 67</answer>
    sudoku      {"puzzle": "1002020100030310", "solution": "1432324141232314"}
                <answer>1432324141232314</answer>
    gsm8k       {"question": "Ann has 3 bags of 6 pears. How many pears?", "answer": "18"}
                <think>3 x 6</think><answer>\boxed{18}</answer>

countdown-3to4 and gsm8k-platinum are the same on other data. A task of one's own is a file that
adds to TASKS, as lab/math_task.py and lab/choice_task.py do: `--task FILE.py` loads it.

`correct` is about content, `format` about tags. Reward = format + 3 x right: a right answer
without tags earns 3, a wrong one with all its tags 1. Nothing a model wrote is ever executed.
"""
import ast
import hashlib
import itertools
import logging
import operator
import random
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

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
    make: Callable | None = None       # seed, index, split, **options -> example, if generated
    read: Callable | None = None       # row, split, options -> example; None leaves the row out
    hub: dict = field(default_factory=dict)        # split -> "data set [configuration] split"
    part: Callable | None = None       # example, split, options -> does a hub row belong here?
    options: dict = field(default_factory=dict)    # name -> default; each is a flag
    limits: dict = field(default_factory=dict)     # name -> smallest, largest
    key: Callable | None = None        # example -> what train and test may not share
    same: Callable | None = None       # example -> what no two test problems share [all of it]
    grade_batch: Callable | None = None            # texts, examples -> grades, where cheaper


class Found(NamedTuple):
    """The answer of a text."""
    content: str | None       # None: there is none
    tagged: bool              # did it stand in a complete tag, outside thoughts?
    thought: bool             # was a <think> opened and closed?
    free: bool = False        # the content is the whole text, and its last box the answer


# Repeating the instructions is not answering: "<answer></answer>", "\boxed{...}".
ECHO = re.compile(r"(?:\\boxed|boxed|\\[()\[\]]|[\s.…,:={}$]|your|the|final|answer|here"
                  r"|expression|target)*")
NESTED = re.compile(r"boxed\s*\{")


def last_answer(text, box=False):
    """The last complete <answer>; else what follows an unclosed one; else, if box, the boxes.

    What a closed <think> holds counts only where nothing else is an answer; a <think> that was
    never closed hides nothing. Returns a Found; linear in the text.
    """
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
                return Found(real[-1], contents is complete and part is spoken, thought)
        if box and boxes(part):
            return Found(part, False, thought, free=True)
    empty = "</answer>" in spoken.partition("<answer>")[2]
    return Found("" if empty else None, empty, thought)


def boxes(text):
    r"""All \boxed{..} of the last 20,000 characters that hold something, but no other box.

    Returns [(the 40 characters before, content, the 40 behind)].
    """
    # Every brace that closes belongs to the last one that opened: no recursion, linear.
    text, found, opened = text[-20_000:], [], []
    for brace in re.finditer(r"(\\?boxed\s*)?\{|\\.|\}", text, re.DOTALL):    # \{ is no brace
        if brace[0][-1] == "{" and brace[0] != r"\{":
            opened.append(brace)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            content = text[start.end():brace.start()].strip()
            if start[1] and not ECHO.fullmatch(content) and not NESTED.search(content):
                before = text[max(0, start.start() - 40):start.start()]
                found.append((before, content, text[brace.end():brace.end() + 40]))
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
            a = values.pop(int(rng.random() * len(values)))
            b = values.pop(int(rng.random() * len(values)))
            operation = operations[int(rng.random() * len(operations))]
            try:
                values.append(operation(a, b))
            except ZeroDivisionError:
                values = [0]                          # 0 is no target
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
    values = [to_number(str(value)) for value in (*nums, target)]
    whole = all(value is not None and value.denominator == 1 for value in values)
    if not whole or min(values[:-1], default=-1) < 0:
        raise ValueError("the numbers must be integers from 0, at least one, and so the target")
    *nums, target = map(int, values)
    return {"nums": nums, "target": target}


def countdown_key(example):
    """The same numbers in another order are the same problem."""
    return sorted(example["nums"]), example["target"]


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


def one_spelling(text):
    for spelling, symbol in SPELLINGS.items():
        text = text.replace(spelling, symbol)
    return text


def unwrap(text):
    r"""In one spelling, without a full stop, dollars, \( \) and one \boxed{} around it all."""
    text = re.sub(r"\\[()\[\]]", "$", one_spelling(text))
    dollars, box = (r"(\${0,2})", r"\1"), (r"(\\boxed ?\{)?", r"(?(1)\})")
    for start, end in (dollars, box, dollars):
        text = re.fullmatch(rf"{start} ?(.*?) ?\.? ?{end} ?\.? ?", text)[2]
    return text


@lru_cache(maxsize=4096)                             # the rollouts of a problem repeat
def calculate(text):
    """(exact value, the integers in it) of integers, + - * / and parentheses.

    Python only parses. Raises ZeroDivisionError; SyntaxError and the like for any other text.
    """
    text = re.sub(r"(?<=[0-9)])\s*\(", "*(", text)       # 7(9 - 4) is 7 * (9 - 4)
    text = re.sub(r"(?<![0-9])0+(?=[0-9])", "", text)    # Python refuses 017
    if not re.fullmatch(r"[-+*/() 0-9]+", text):
        raise SyntaxError(text)
    integers = []

    # The tree of + - * / is walked here; what else Python can parse ends with an error.
    def value(node):    # a sign, ** and // have no place here: a KeyError, an AttributeError
        if isinstance(node, ast.Constant):
            integers.append(node.value)
            return node.value
        return OPERATIONS[type(node.op)](value(node.left), value(node.right))
    return value(ast.parse(text.strip(), mode="eval").body), tuple(integers)


def grade_countdown(text, example):
    """Format: 0.5 complete answer tag + 0.5 an expression, alone or with "= target"."""
    found, format, right = last_answer(text), 0.5, 0
    answer = " ".join((found.content or "").split())    # a line break is white space
    try:
        if len(answer) > 500:
            raise SyntaxError("too long")
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
    return graded(format + 0.5 * found.tagged, right, reason, answer, found.tagged)


# --- Sudoku, 4x4 ------------------------------------------------------------------------------

@lru_cache
def grids():
    """All 288 full grids, in order of a hash; the first 58 solve all test problems."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    halves = [a + b for a in rows for b in rows if len({*a[:2], *b[:2]}) == 4]    # full boxes
    full = [top + bottom for top in halves for bottom in halves
            if all(len({*top[i::4], *bottom[i::4]}) == 4 for i in range(4))]      # and columns
    return sorted(full, key=lambda grid: hashlib.blake2b(grid.encode()).digest())


def solutions(puzzle, among=None):
    """With dots for its empty cells, a puzzle is the regular expression of its solutions."""
    return re.findall(puzzle.replace("0", "."), among or "\n".join(grids()))


def make_sudoku(seed, index, split, empties):
    """Empty cells of a grid in random order, but for those that keep its solution the only one.

    Drawn again where that ends too early. 4 givens can suffice, 3 never do: at most 12 empty.
    """
    rng = random.Random(f"{seed} {index} {split}")
    mine = grids()[:58] if split == "test" else grids()[58:]
    while True:
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
    if not re.fullmatch("[0-4]{16}", puzzle) or solution not in grids():
        raise ValueError("the puzzle must be 16 digits 0-4 and the solution a full valid grid")
    if not solutions(puzzle, among=solution):
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
    """Format: 0.5 complete answer tag + 0.25 sixteen digits 1-4 + 0.25 the given digits kept.

    Right is the share of the empty cells; one digit in all of them has 25 %, so report
    `correct` first: any grid that solves the puzzle.
    """
    found = last_answer(text)
    grid, format = "".join((found.content or "").split()), 0.5 * found.tagged
    if not re.fullmatch("[1-4]{16}", grid):
        reason = "not sixteen digits 1-4"
        return graded(format, 0, reason, grid, found.tagged, cell_accuracy=0.0)
    # Any grid that solves the puzzle is right; else each empty cell counts by itself.
    kept = bool(solutions(example["puzzle"], among=grid))
    correct = kept and grid in grids()
    cells = zip(example["puzzle"], example["solution"], grid)
    right = [digit == solution for given, solution, digit in cells if given == "0"]
    share = 1.0 if correct else sum(right) / max(1, len(right))
    reason = ("a valid grid" if correct else "a row, column or box repeats a digit" if kept
              else "a given digit was changed")
    format += 0.25 + 0.25 * kept
    grade = graded(format, share, reason, grid, found.tagged, cell_accuracy=share)
    return replace(grade, correct=correct)


# --- GSM8K: one number ------------------------------------------------------------------------
# How much of a text is the answer, and which number is it? The patterns below decide cases that
# real answers have; a first reading may skip them.

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


def plain(text):
    """Its letters, digits and + * / = < > ^: another spelling of a question is no new question.

    Spaces, quotes, dashes, braces, accents written as two characters, LaTeX's layout: all gone.
    Two questions that differ in nothing else count as one, which costs a training row.
    """
    layout = r"\\(?:left|right|displaystyle|text|mathrm|[dt](?=frac))"
    text = re.sub(layout, "", one_spelling(text))
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(c for c in text if c.isalnum() or c in "+*/=<>^")


def question_key(example):
    return plain(example["question"])


# What a box may not touch, or it is a part only: -\boxed{18}, \boxed{9}^2, \boxed{9},000
COMMAND = r"\\(?:times|cdot|div|frac|sqrt|pm)"
BEFORE = re.compile(rf"(?:[-+−*/^×÷·0-9]|{COMMAND}\{{?)(?:\\?\$|\\[(\[]|[ \t])*\Z"
                    r"|[0-9](?:[.,]|\{,\}|\))\Z|frac\{[^{}]*\}\{\Z")
AFTER = re.compile(rf"(?:\\?\$|\\[)\]]|[ \t}})\]])*"
                   rf"(?:[-+−*/×÷·]\s*[\\({{0-9]|[!^_0-9]|{COMMAND})|(?:[.,]|\{{,\}})[0-9]"
                   r"|\([0-9]")
# In a tag: not \boxed{18}; twice \boxed{9}; \boxed{18}, 19
FIRST = re.compile(r"\b(?:not|or|n?either|minus|plus|negative|twice|double|triple|half|third"
                   r"|quarter)(?: of)?[ $]*\Z", re.IGNORECASE)
SECOND = re.compile(r"[\s$)\]}]*[,;:]\s*[-+$\\]*[0-9]")


def boxed_answer(found):
    r"""The content of the last box of an answer, or all of the answer where it has none.

    None where the box is only a part of the answer, or where a tag says more than the box.
    """
    found_boxes = boxes(found.content or "")
    if not found_boxes:
        # \boxed{18</answer>: the tag ends the box. \boxed{}18: so it was meant.
        return re.sub(r"\\?boxed\s*\{\s*\}?", "", found.content or "").strip()
    before, content, after = found_boxes[-1]
    word = re.match(r"[\s$)\\]*(?:text\{)?\s*([A-Za-z]*)", after)[1]
    part = BEFORE.search(before) or AFTER.match(after) or changes_value(word, not found.free)
    # A tag holds the answer alone. Outside of one a box may stand in any sentence.
    several = len({content for _, content, _ in found_boxes}) > 1
    hedged = several or FIRST.search(before) or SECOND.match(after)
    return None if part or hedged and not found.free else content


# Words that change a number, plurals too: other letters than these units and words, scales and
# their short forms, parts. And words that join two numbers.
SCALE = re.compile(r"""[^mgshlLaI] | (?i: (?:
    k | thou | ten | hundred | lakh | crore | mil | mln | mn | bil | bn | tril | trn | myriad
    | grand | doz | dozen | score | gross | \w*thousand | \w*illion
    | half | halve | third | quarter | squared | cubed | factorial | double | twice | triple
    | negative
    | (?: four | fif | six | seven | eigh | nin | ten | eleven | twelf | hundred
        | \w*teen | \w*tie | \w*thousand | \w*illion ) th) s* )""", re.VERBOSE)
JOINS = set("or and not to plus minus over mod".split())


def changes_value(words, joins=True):
    """Is one of these words more than a unit?"""
    return any(SCALE.fullmatch(word) or joins and word.lower() in JOINS
               for word in re.findall("[A-Za-z]+", words))


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
    # LaTeX to plain text: separators of thousands, fractions, words, dollars and spaces.
    text = text.replace("{,}", ",").replace("−", "-")
    text = re.sub(r"(?<=[0-9]),?\\[,!](?=[0-9]{3})", ",", text)       # 385\,000 and 10,\!080
    text = re.sub(r"(?<=[0-9}])~", " ", text)                         # 18~\text{cm}; not ~18
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}", r" \1/\2 ", text)
    text = re.sub(r"\\(?:text|mathrm)\s*\{([A-Za-z0-9/.,\s]*)\}", r" \1", text)
    text = re.sub(r"\\[,;:! ]|\\?[$%]|\\[()\[\]]|\^\{?\\circ\}?", " ", text)
    match = NUMBER.fullmatch(" ".join(text.split()).removesuffix(".").strip())
    with suppress(TypeError, ValueError, ZeroDivisionError):
        if not changes_value(match[2]):
            return Fraction(re.sub("[ ,]", "", match[1]))


def grade_gsm8k(text, example):
    """Format: 0.5 complete think tag + 0.5 complete answer tag."""
    found = last_answer(text, box=True)
    content = boxed_answer(found)
    value = to_number(content or "")
    gold = to_number(str(example["answer"]).rpartition("####")[2])
    reason = ("no answer" if found.content is None else "not one number" if value is None
              else f"number {value}")
    format = 0.5 * found.thought + 0.5 * found.tagged
    right = value is not None and value == gold
    return graded(format, right, reason, content or found.content or "", found.tagged)


# --- The table --------------------------------------------------------------------------------

class Tasks(dict):
    def __missing__(self, name):
        raise TaskError(f"--task {name} is unknown: choose one of {', '.join(self)}, or a "
                        "file that registers a task, as lab/math_task.py does")


TASKS = Tasks({task.name: task for task in (
    Task("countdown", countdown_prompt, grade_countdown, make_countdown, read_countdown,
         options={"numbers": 3, "max_number": 100, "max_target": 100, "division": True},
         limits={"numbers": (2, 6), "max_number": (1, 10**6), "max_target": (1, 10**6)},
         key=countdown_key, same=countdown_key),
    Task("sudoku", sudoku_prompt, grade_sudoku, make_sudoku, read_sudoku,
         options={"empties": 8}, limits={"empties": (0, 12)},
         key=lambda example: example["solution"]),
    Task("gsm8k", question_prompt, grade_gsm8k, read=read_gsm8k, key=question_key,
         hub={"train": "openai/gsm8k main train", "test": "openai/gsm8k main test"}))})
TASKS["countdown-3to4"] = replace(
    TASKS["countdown"], name="countdown-3to4", make=None, part=part_of_3to4,
    hub=dict.fromkeys(("train", "test"), "Jiayi-Pan/Countdown-Tasks-3to4 train"),
    options={"numbers": 3}, limits={"numbers": (3, 4)})
TASKS["gsm8k-platinum"] = replace(
    TASKS["gsm8k"], name="gsm8k-platinum",
    hub={"train": "openai/gsm8k main train", "test": "madrylab/gsm8k-platinum main test"})


def grade(name, text, example):
    return TASKS[name].grade(text, example)


def grade_batch(name, texts, examples):
    """A Grade for every text, the same as one by one."""
    task = TASKS[name]
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
    # What cannot be is refused before anything is read.
    task = TASKS[name]
    options = checked(task, options)
    if file and not task.read:
        raise TaskError(f"task {name} makes its problems and reads no --{split}_file")
    if split not in SIZES or not (file or task.make or split in task.hub):
        raise TaskError(f"task {name} has no {split} data of its own: give --{split}_file")
    # Training never sees a test problem, wherever the two come from.
    if split == "train" and not held_out and not file and "test" in task.hub:
        held_out = load(name, "test", **options)
    known = {key(task, example) for example in held_out if split == "train"}
    if task.make and not file:
        return generated(task, split, seed, size or SIZES[split], known, options)

    # A file or the hub: row by row, so that a bad one is named.
    rows, source = rows_of(split, file, task.hub.get(split))
    examples = []
    for number, row in enumerate(rows, 1):
        with one_sentence(f"{source}, row {number} is no row of task {name}, a field is wrong "
                          "or missing"):
            example = task.read(row, split, options)
        elsewhere = task.part and not file and not task.part(example, split, options)
        if example is not None and not elsewhere:
            examples.append(example)
    kept = [example for example in examples if key(task, example) not in known]

    # The source says what was left out; it stands beside every result.
    unwanted, shared = len(rows) - len(examples), len(examples) - len(kept)
    if not kept:
        raise TaskError(f"{source} has no {split} rows for task {name}: {unwanted} left out by "
                        f"its options, {shared} because they are test problems")
    if unwanted:
        source += f", {unwanted} rows left out by the task's options"
    if split == "train":
        source += (f", {shared} rows left out because they are test problems" if known
                   else ", test problems not looked for")
    return Examples(kept.__getitem__, len(kept[:size]), source)


def checked(task, options):
    """With the defaults of those not given."""
    for name, value in options.items():
        if name not in task.options:
            flags = ", ".join(f"--{option}" for option in task.options) or "none"
            raise TaskError(f"--{name} is no option of task {task.name}; its options: {flags}")
        kind = type(task.options[name])
        low, high = task.limits.get(name, (value, value))
        if type(value) is not kind or not low <= value <= high:
            raise TaskError(f"--{name} {value!r} cannot work: {task.name} takes {low} to "
                            f"{high}, of type {kind.__name__}")
    return {**task.options, **options}


def generated(task, split, seed, size, known, options):
    # The i-th example, drawn again while it is a test problem.
    def make(i):
        for again in range(1000):
            another = f"{seed} again {again}" if again else f"{seed}"
            example = task.make(another, i, split, **options)
            if key(task, example) not in known:
                return example
        raise TaskError(f"the test problems leave no training problem of {task.name}: give "
                        "fewer test problems, or --train_file")

    make(0)    # options that leave no problem are refused here, not in the first step
    if split == "train":
        beside = ", no test problem among them" if known else ""
        return Examples(make, size, f"generated, seed {seed}{beside}")

    # A test problem twice would make its accuracy look surer than it is. There are fewer where
    # the options leave fewer.
    different = {}
    for example in map(make, range(5 * size)):
        different.setdefault(repr(task.same(example) if task.same else example), example)
        if len(different) == size:
            break
    examples = list(different.values())
    return Examples(examples.__getitem__, len(examples),
                    f"generated, seed {seed}, {len(examples)} different problems")


def rows_of(split, file, hub):
    """(rows, where they are from): of a JSONL, CSV or parquet file, or of the hub."""
    import datasets
    import huggingface_hub
    import pyarrow
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
    with one_sentence(f"{source} cannot be read as .jsonl, .csv or .parquet"):
        kind = file.suffix[1:].lower().replace("jsonl", "json")
        if kind not in ("json", "csv", "parquet"):
            raise ValueError(f"its name ends in {file.suffix or 'nothing'}")
        with open(file, "rb") as f:
            first = f.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if not first or kind == "json" and first == b"[":
            raise ValueError("line 1 is an array, write one object a line" if first
                             else "it is empty")
        # All columns of a CSV stay text, or 0302 would become 302.
        text = {"keep_default_na": False, "converters": dict.fromkeys(range(100), str)}
        read = getattr(datasets.Dataset, f"from_{kind}")
        try:
            rows = read(str(file), streaming=True, **(text if kind == "csv" else {}))
            return list(rows), source
        except pyarrow.ArrowInvalid as error:    # it counts rows from 0
            count = lambda row: f"in row {int(row[1]) + 1}"
            raise ValueError(re.sub("in row ([0-9]+)$", count, str(error))) from error


def hub_answers(huggingface_hub):
    """Asked in a thread, because looking up a host name has no timeout of its own."""
    answers = []

    def ask():
        with suppress(Exception):    # whatever it is, the hub did not answer
            url = huggingface_hub.constants.ENDPOINT
            answers.append(huggingface_hub.get_session().head(url, timeout=HUB_SECONDS))
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return bool(answers)
