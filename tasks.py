r"""Tasks: data, prompts and checkers. Training and evaluation grade with the same functions.

One literal problem of each task, and the answer that earns the maximum reward, 4:
    countdown       {"nums": [17, 18, 5], "target": 67}                    <answer>17 * 5 - 18 = 67</answer>
    sudoku          {"puzzle": "1002020100030310", "solution": "1432324141232314"}   <answer>1432324141232314</answer>
    gsm8k           {"question": "Ann has 3 bags of 6 pears. How many pears?", "answer": "18"}
                                                                <think>3 x 6</think><answer>\boxed{18}</answer>
    math            {"question": "Simplify $\\sqrt{50}$.", "answer": "5\\sqrt{2}"}
                                                              <think>25 x 2</think><answer>\boxed{5\sqrt{2}}</answer>
    commonsense_qa  {"question": "Where do fish live?", "choices": ["water", "sand"], "answer": "A"}
                                                                           <think>gills</think><answer>A</answer>
countdown-3to4 and gsm8k-platinum are the same tasks on other data (the paper's code tests GSM8K on the latter).

Rewards            format                                                           right
    countdown      0.5 complete answer tag + 0.5 its content is in the grammar      3
    sudoku         0.5 complete answer tag + 0.5 it holds sixteen digits 1-4        3 x share of the empty cells
    the others     0.5 complete think tag + 0.5 complete answer tag                 3
As in the paper's code, but for these points. There Countdown's format is 1/3 each for target, characters and numbers,
and any right side may follow a right expression; Sudoku's is 0.25 for the length, 0.25 for four of each digit, 0.5 for
intact givens, and cells count even if givens were changed; GSM8K is judged by math-verify; the first tag counts.

Left out on purpose: executing anything a model wrote (no eval, here or in a library), recursion on its text, credit for
reasoning or for an answer outside the tag. Files and the hub are read in lab/rows.py, MATH's judge is in
lab/math_judge.py. `python tasks.py countdown --n 3` shows problems, prompts and grades (lab/show_task.py).
"""
import hashlib
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache

from lab import math_judge
from lab.rows import TaskError, read_file, read_hub

SIZES = {"train": 100_000, "test": 1_000}  # problems of a generated split; each is made when it is asked for
LONGEST = 10_000  # characters of an answer worth reading: 10 ms of work, and no problem needs as many


@dataclass
class Grade:
    reward: float   # format + 3 x right, 0 to 4
    correct: bool   # what evaluation counts
    format: float   # the part that asks for no knowledge, 0 to 1
    reason: str     # why, in a few words: "number 7 unused"
    parsed: str     # what was understood of the text
    metrics: dict[str, float] = field(default_factory=dict)  # reported beside accuracy


@dataclass(frozen=True)
class Task:
    """All that training and evaluation know of a task. Yours: TASKS["mine"] = Task("mine", ...), see commonsense_qa."""
    name: str
    prompt: Callable  # example -> chat messages
    grade: Callable   # completion text, example -> Grade
    read: Callable    # row of a file or the hub, split, options -> example; None leaves the row out
    hub: dict = field(default_factory=dict)      # split -> (data set, configuration, split of it)
    make: Callable | None = None                 # (seed, index, split, **options) -> example, of a generated task
    options: dict = field(default_factory=dict)  # name -> default
    limits: dict = field(default_factory=dict)   # name -> (smallest, largest) value that can work
    grade_batch: Callable | None = None          # where grading a batch is more than grading each
    overlap: bool = False                        # the hub's train rows contain its test problems: leave those out


def last_answer(text):
    """-> (content of the last complete <answer> outside <think>, or None; was a <think> opened and closed?)

    One pass over the tags: a regular expression for "outside" would backtrack. A second <answer> starts afresh, so an
    echo of the instructions cannot swallow the real answer; an unclosed <think> hides all that follows.
    """
    answer, start, thinking, thought = None, None, False, False
    for tag in re.finditer(r"</?(?:think|answer)>", text):
        if thinking:
            if tag[0] == "</think>":
                thinking, thought = False, True
        elif tag[0] == "<think>":
            thinking, start = True, None
        elif tag[0] == "<answer>":
            start = tag.end()
        elif tag[0] == "</answer>" and start is not None:
            answer, start = text[start:tag.start()], None
    return answer, thought


def chat(problem, answer, question):
    """The system turn has all instructions; the user turn is the problem alone, short for a small model."""
    rules = f"{problem} Think inside <think></think>, then write only {answer} inside <answer></answer>."
    return [{"role": "system", "content": rules}, {"role": "user", "content": question}]


def graded(format, right, reason, parsed, **metrics):
    return Grade(format + 3.0 * right, right == 1, format, reason, parsed[:200], metrics)


# --- Countdown --------------------------------------------------------------------------------------------------------


def in_test(nums, target):
    """One problem in eight is a test problem whatever the seed. (Python's hash() differs from process to process.)"""
    return hashlib.blake2b(repr((sorted(nums), target)).encode(), digest_size=1).digest()[0] < 32


def make_countdown(seed, index, split, numbers, max_number, max_target, division):
    """Numbers and a random expression over all of them, drawn until its value is a target of this split."""
    rng = random.Random(f"{seed} {index} {split}")  # of its own: no global generator, no order of calls
    for _ in range(20_000):
        nums = [rng.randrange(max_number) + 1 for _ in range(numbers)]
        items = [(n, 1) for n in nums]  # numerator, denominator: Fraction is ten times slower
        while len(items) > 1:
            a, b = items.pop(int(rng.random() * len(items)))
            c, d = items.pop(int(rng.random() * len(items)))
            op = int(rng.random() * (4 if division else 3))
            if op == 3 and c == 0:
                items = [(0, 1)]  # division by zero: 0 is no target
            else:
                items.append(((a * d + c * b, b * d), (a * d - c * b, b * d), (a * c, b * d), (a * d, b * c))[op])
        value, rest = divmod(*items[0])
        if rest == 0 and 1 <= value <= max_target and in_test(nums, value) == (split == "test"):
            return {"nums": nums, "target": value}
    raise TaskError(f"--numbers {numbers} --max-number {max_number} --max-target {max_target} leave no {split} problem "
                    "of countdown: allow larger numbers or targets")


def expressions(items, target):
    """Yield the right expressions over all items (numerator, denominator, text, 0: number, 1: a + or -, 2: a * or /).
    The depth is how many numbers a task has, at most 6."""
    for i, (a, b, x, kind_x) in enumerate(items):
        for j, (c, d, y, kind_y) in enumerate(items):
            others = [item for k, item in enumerate(items) if k != i and k != j]
            for op, n, m in (("+", a * d + c * b, b * d), ("-", a * d - c * b, b * d),
                             ("*", a * c, b * d), ("/", a * d, b * c)):
                if i != j and m != 0 and (others or n == target * m):
                    # parentheses only where the value would change without them
                    left = f"( {x} )" if kind_x == 1 and op in "*/" else x
                    right = f"( {y} )" if kind_y == 1 and op != "+" or kind_y == 2 and op == "/" else y
                    text, kind = f"{left} {op} {right}", 1 if op in "+-" else 2
                    yield from expressions([(n, m, text, kind), *others], target) if others else [text]


def countdown_solutions(nums, target):
    """Every right expression over all of nums: ([3, 5, 7], 56) -> ["( 3 + 5 ) * 7", "( 5 + 3 ) * 7", ...], sorted."""
    return sorted(set(expressions([(n, 1, str(n), 0) for n in nums], target)))


def countdown_prompt(example):
    numbers, target = " ".join(map(str, example["nums"])), example["target"]
    return chat("Reach the target from the numbers with + - * / and parentheses, using every number exactly once.",
                "the equation, expression = target,", f"Numbers: {numbers}\nTarget: {target}")


# The grammar: integers, + - * / ( ), these spellings of them, and "7(" or ")(" as a product. Any other character, LaTeX
# command or sign ends the parse.
SPELLINGS = {"×": "*", "·": "*", r"\times": "*", r"\cdot": "*", "÷": "/", r"\div": "/", "−": "-", r"\left(": "(",
             r"\right)": ")"}
TOKEN = re.compile(r" ?([0-9]+|[-+*/()]|" + "|".join(map(re.escape, SPELLINGS)) + ")")
RANK = {"+": 1, "-": 1, "*": 2, "/": 2}


def to_postfix(text):
    """Tokens in postfix order, or None if the text is not in the grammar. Shunting-yard: a parenthesis costs an entry
    of a list, not a level of recursion, and nothing is computed yet."""
    output, stack, position, after_operand = [], [], 0, False
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            return None
        position, token = match.end(), SPELLINGS.get(match[1], match[1])
        for token in ("*(" if token == "(" and after_operand else [token]):  # 7(9 - 4) is 7 * (9 - 4)
            if token == "(" or token not in ")+-*/":
                if after_operand:
                    return None  # two numbers in a row
                (stack if token == "(" else output).append(token.lstrip("0") or "0")
                after_operand = token != "("
            elif not after_operand:
                return None  # an operator or ")" where a number belongs: 5--3, ()
            else:
                while stack and stack[-1] != "(" and RANK[stack[-1]] >= RANK.get(token, 0):
                    output.append(stack.pop())
                if token != ")":
                    stack.append(token)
                elif not stack or stack.pop() != "(":
                    return None
                after_operand = token == ")"
    return output + stack[::-1] if after_operand and "(" not in stack else None


def evaluate(postfix):
    """The exact value, or None for a division by zero."""
    stack = []
    for token in postfix:
        if token not in RANK:
            stack.append(Fraction(token))
            continue
        b, a = stack.pop(), stack.pop()
        if token == "/" and b == 0:
            return None
        stack.append(a + b if token == "+" else a - b if token == "-" else a * b if token == "*" else a / b)
    return stack[0]


def unwrap(text):
    """Without the dollars and the one \\boxed{} that surround all of it."""
    for start, end in (("$$", "$$"), ("$", "$"), (r"\boxed{", "}"), ("$", "$")):
        if text.startswith(start) and text.endswith(end) and len(text) >= len(start + end):
            text = text[len(start):-len(end)].strip()
    return text


def grade_countdown(text, example):
    """`expression = target`, or the expression alone."""
    answer, _ = last_answer(text)
    if answer is None:
        return graded(0.0, 0, "no complete <answer>", "")
    answer = unwrap(" ".join(answer.split()))  # a line break is white space
    left, *right = (side.strip() for side in answer.split("="))
    if len(answer) > LONGEST or len(right) > 1 or right and not re.fullmatch("-?[0-9]+", right[0]):
        return graded(0.5, 0, "neither an expression nor expression = number", answer)
    postfix = to_postfix(left)
    if postfix is None:
        return graded(0.5, 0, "not an expression of integers, + - * / ( )", answer)
    # Numbers are compared as text: Python refuses to make an int of 4,301 digits. After this test the expression has
    # only the problem's numbers, so that evaluating it is quick.
    used, given = Counter(token for token in postfix if token not in RANK), Counter(map(str, example["nums"]))
    if used != given:
        unused, extra = list((given - used).elements()), list((used - given).elements())
        reason = f"number {unused[0]} unused" if unused else f"number {extra[0][:20]} not given, or used too often"
        return graded(1.0, 0, reason, answer)
    value, target = evaluate(postfix), example["target"]
    if value is None:
        return graded(1.0, 0, "division by zero", answer)
    if right and right[0] != str(target):
        return graded(1.0, 0, f"right side {right[0][:20]} is not the target", answer)
    return graded(1.0, value == target, f"value {value}", answer)


def whole(value):
    """3 out of 3, "3" or 3.0; 3.7 is refused, not rounded."""
    if Fraction(value).denominator != 1:
        raise ValueError(f"{value} is not a whole number")
    return int(Fraction(value))


def read_countdown(row, split, options):
    """{"nums": [30, 100, 93], "target": 23}, or as in published test files {"input": "30,100,93", "output": "23"}"""
    nums, target = (row["input"], row["output"]) if "input" in row else (row["nums"], row["target"])
    nums = [whole(n) for n in (nums.strip("[] ").split(",") if isinstance(nums, str) else nums)]
    if not nums or min(nums) < 0:
        raise ValueError("the numbers must be one or more integers from 0")
    return {"nums": nums, "target": whole(target)}


def read_countdown_3to4(row, split, options):
    """The hub has one split of 3 and 4 numbers: choose the count, and part it as the generated problems are."""
    example = read_countdown(row, split, options)
    keep = len(example["nums"]) == options["numbers"] and in_test(**example) == (split == "test")
    return example if keep else None


# --- Sudoku, 4x4 ------------------------------------------------------------------------------------------------------

# for each cell the earlier ones in its row, its column or its 2x2 box
SEEN = [[p for p in range(c) if p // 4 == c // 4 or p % 4 == c % 4 or (p // 8, p % 4 // 2) == (c // 8, c % 4 // 2)]
        for c in range(16)]


@lru_cache
def grids():
    """All 288 full grids: rows, columns and boxes of a grid are right if and only if it is one of these."""
    found = [""]
    for cell in range(16):
        found = [grid + digit for grid in found for digit in "1234" if all(grid[p] != digit for p in SEEN[cell])]
    return found


@lru_cache
def split_grids(split):
    """58 of the 288 grids, chosen by hash and not by seed, are the solutions of all test problems."""
    order = sorted(grids(), key=lambda grid: hashlib.blake2b(grid.encode()).digest())
    return order[:58] if split == "test" else order[58:]


@lru_cache
def grids_with(cell, digit):
    """The grids with this digit in this cell, as the bits of an integer."""
    return sum(1 << i for i, grid in enumerate(grids()) if grid[cell] == digit)


def count_solutions(puzzle):
    fits = (1 << len(grids())) - 1
    for cell, digit in enumerate(puzzle):
        if digit != "0":
            fits &= grids_with(cell, digit)
    return fits.bit_count()


def make_sudoku(seed, index, split, empties):
    """Empty the cells of a grid in random order, keeping those without which there would be a second solution; draw
    another grid and order if that ends too early. (4 givens can suffice, 3 never do: hence at most 12 empty cells.)"""
    rng = random.Random(f"{seed} {index} {split}")
    while True:
        solution, cells = rng.choice(split_grids(split)), rng.sample(range(16), 16)
        puzzle = list(solution)
        for cell in cells:
            if puzzle.count("0") < empties:
                puzzle[cell] = "0"
                if count_solutions(puzzle) > 1:
                    puzzle[cell] = solution[cell]
        if puzzle.count("0") == empties:
            return {"puzzle": "".join(puzzle), "solution": solution}


def sudoku_prompt(example):
    rows = [" ".join(example["puzzle"][i:i + 4]) for i in range(0, 16, 4)]
    return chat("Complete the 4x4 Sudoku: every row, column and 2x2 box holds 1, 2, 3 and 4; 0 marks an empty cell.",
                "the 16 digits of the full grid, row by row,", "\n".join(["Sudoku:", *rows]))


def grade_sudoku(text, example):
    """Report `correct` first. The metric beside it has a floor: one digit in all empty cells scores 25 % on average."""
    puzzle, solution = example["puzzle"], example["solution"]
    answer, _ = last_answer(text)
    if answer is None:
        return graded(0.0, 0, "no complete <answer>", "", cell_accuracy=0.0)
    grid = "".join(answer.split())
    if not re.fullmatch("[1-4]{16}", grid):
        return graded(0.5, 0, "not sixteen digits 1-4", grid, cell_accuracy=0.0)
    if any(given not in ("0", digit) for given, digit in zip(puzzle, grid)):
        return graded(1.0, 0, "a given digit was changed", grid, cell_accuracy=0.0)
    if grid in grids():  # any valid grid is right, should a puzzle from a file have several
        return graded(1.0, 1, "a valid grid", grid, cell_accuracy=1.0)
    empty = [cell for cell in range(16) if puzzle[cell] == "0"]
    share = sum(grid[cell] == solution[cell] for cell in empty) / max(1, len(empty))
    result = graded(1.0, share, "a row, column or box repeats a digit", grid, cell_accuracy=share)
    return replace(result, correct=False)  # even if a bad row's "solution" agrees


def read_sudoku(row, split, options):
    """{"Puzzle": "0302...", "Solution": "1342..."}; where a reader made the puzzle an int, its leading zeros return."""
    row = {name.lower(): value for name, value in row.items()}
    puzzle, solution = (f"{row[name]:016d}" if isinstance(row[name], int) else row[name].strip()
                        for name in ("puzzle", "solution"))
    if not re.fullmatch("[0-4]{16}", puzzle) or solution not in grids():
        raise ValueError("the puzzle must be 16 digits 0-4 and the solution a valid grid of 16 digits 1-4")
    if any(given not in ("0", digit) for given, digit in zip(puzzle, solution)):
        raise ValueError("the solution changes a given digit of the puzzle")
    return {"puzzle": puzzle, "solution": solution}


# --- GSM8K ------------------------------------------------------------------------------------------------------------


def box_at(text, start):
    """-> (content, end) of the \\boxed{..} or "\\boxed 5" that starts here; None if it does not end."""
    start = re.compile(r"\\\w+\s*").match(text, start).end()
    if text[start:start + 1] != "{":
        word = re.compile(r"[^\s$.]*").match(text, start)
        return word[0], word.end()
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):  # \{ is not a brace
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1:brace.start()].strip(), brace.end()
    return None


def final_answer(text):
    """The content of the one \\boxed{}, or all of the text. None if it has two boxes, or beside its box a digit, an
    operator or a command, of which the box might be a part: -\\boxed{18}, 9 + \\boxed{9}."""
    if r"\boxed" not in text:
        return text.strip()
    start = text.index(r"\boxed")
    box = box_at(text, start) if len(text) <= LONGEST else None
    if box is None:
        return None
    beside = re.sub(r"\\[()\[\]]", "", text[:start] + text[box[1]:])
    return None if re.search(r"[0-9+\-*/^{}\\]", beside) else box[0]


INTEGER = r"((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+))"
NUMBER = re.compile(rf"""\${{0,2}} ([+-]?) \$? \s* (?:
    \\[dt]?frac \s* \{{ \s*{INTEGER}\s* \}} \s* \{{ \s*{INTEGER}\s* \}}                     # \frac{{36}}{{2}}
    | {INTEGER} \s* / \s* {INTEGER}                                                         # 36/2
    | {INTEGER}? (\.[0-9]+)? )                                                              # 18, 1,000.5, .5
    \s* %? (?: \s*\\text\{{\s*([A-Za-z]+)\s*\}} | \s+([A-Za-z]+) | ([A-Za-z]{{2,}}) )?      # one unit: dollars, km
    (?: \.? \${{0,2}} | \${{1,2}} \.)""", re.VERBOSE)
NOT_UNITS = set("k dozen hundred thousand million billion trillion squared cubed factorial or and not to".split())


def to_number(text):
    """The one number that a text is, as a Fraction, or None: no second number, no arithmetic left to do."""
    text = text.strip().replace("{,}", ",").replace(r"\$", "$").replace(r"\%", "%").replace("−", "-")
    match = NUMBER.fullmatch(text) if len(text) <= 100 else None
    if match is None or any(word and word.lower() in NOT_UNITS for word in match.groups()[-3:]):
        return None
    sign, top, bottom, top2, bottom2, integer, decimals = ((part or "").replace(",", "") for part in match.groups()[:7])
    top, bottom = (top or top2, bottom or bottom2) if top or top2 else (integer + decimals, "1")
    return Fraction(sign + top) / int(bottom) if top and int(bottom) else None


def gsm8k_gold(answer):
    return answer.rsplit("####", 1)[-1].strip()


def grade_gsm8k(text, example):
    answer, thought = last_answer(text)
    format = 0.5 * thought + 0.5 * (answer is not None)
    if answer is None:
        return graded(format, 0, "no complete <answer>", "")
    content = final_answer(answer)
    value = None if content is None else to_number(content)
    if value is None:
        return graded(format, 0, "not one number", content or answer)
    return graded(format, value == to_number(gsm8k_gold(example["answer"])), f"number {value}", content)


def question_prompt(example):
    return chat("Solve the mathematics problem.", r"the final answer, in \boxed{},", example["question"])


def read_gsm8k(row, split, options):
    """{"question": .., "answer": ".. #### 18"}"""
    gold = gsm8k_gold(row["answer"])
    if to_number(gold) is None:
        raise ValueError(f"the answer {gold[:40]!r} is not a number")
    return {"question": row["question"].strip(), "answer": gold}


# --- MATH -------------------------------------------------------------------------------------------------------------


def math_gold(answer):
    """The last box of a written solution, or the whole answer where it has none."""
    start = max(answer.rfind(r"\boxed"), answer.rfind(r"\fbox"))
    return (box_at(answer, start) or ("",))[0] if start >= 0 else answer.strip()


def grade_math_batch(texts, examples):
    """Equal as text is right; else lab/math_judge.py decides, for the whole batch under one deadline (what it cannot
    decide in that time is wrong). Equal means equal: 9 + 9 is right for 18 here, as math-verify has it."""
    drafts = []
    for text, example in zip(texts, examples):
        (answer, thought), gold = last_answer(text), math_gold(example["answer"])
        content = None if answer is None else final_answer(answer)
        match = content is not None and math_judge.plain(content) == math_judge.plain(gold)
        reason = ("no complete <answer>" if answer is None else "not one answer" if content is None else
                  "equal as text" if match else math_judge.objection(gold, content))
        drafts.append((0.5 * thought + 0.5 * (answer is not None), match, reason, content or "", gold))
    try:
        verdicts = math_judge.judge([(gold, content) for _, _, reason, content, gold in drafts if not reason])
    except RuntimeError as error:  # math-verify is not installed: say so, do not count everything wrong
        raise TaskError(str(error)) from error
    words = {True: "equal by math-verify", False: "not equal", None: "not judged in time"}
    grades = []
    for format, match, reason, content, gold in drafts:
        verdict = match if reason else verdicts[gold, content]
        grades.append(graded(format, bool(verdict), reason or words[verdict], content, string_match=float(match)))
    return grades


def grade_math(text, example):
    return grade_math_batch([text], [example])[0]


def read_math(row, split, options):
    """{"problem": .., "level": "Level 3", "solution": ".. \\boxed{..} .."} or {"question": .., "answer": ..}. Left out:
    training rows above max_level (the paper's code trains on 1 to 4), and rows without a box or an answer."""
    level = re.search("[0-9]|$", str(row.get("level", 1)))[0]
    if split == "train" and not (level and int(level) <= options["max_level"]):
        return None
    question, solution = row["problem"] if "problem" in row else row["question"], row.get("solution") or ""
    gold = math_gold(solution if re.search(r"\\(boxed|fbox)", solution) else row.get("answer") or "")
    return {"question": question.strip(), "answer": gold} if gold else None


# --- Multiple choice: a task of your own takes a prompt, a grader, a reader of rows, and an entry in TASKS ------------


def choice_prompt(example):
    choices = [f"{letter}. {choice}" for letter, choice in zip(string.ascii_uppercase, example["choices"])]
    return chat("Choose the best answer.", "its letter", "\n".join([example["question"], *choices]))


def grade_choice(text, example):
    answer, thought = last_answer(text)
    format = 0.5 * thought + 0.5 * (answer is not None)
    letter = re.fullmatch(r"\(?([A-Z])\)?\.?", (answer or "").strip())
    if letter is None:
        return graded(format, 0, "not one letter", answer or "")
    return graded(format, letter[1] == example["answer"], f"chose {letter[1]}", letter[1])


def read_choice(row, split, options):
    """{"question": .., "choices": {"label": ["A", ..], "text": [..]}, "answerKey": "A"}"""
    choices, letter = row["choices"]["text"], row["answerKey"]
    if letter not in tuple(string.ascii_uppercase[:len(choices)]):
        raise ValueError(f"answerKey {letter!r} is not the letter of one of the {len(choices)} choices")
    return {"question": row["question"].strip(), "choices": choices, "answer": letter}


# --- The table --------------------------------------------------------------------------------------------------------

TASKS = {task.name: task for task in (
    Task("countdown", countdown_prompt, grade_countdown, read_countdown, make=make_countdown,
         options={"numbers": 3, "max_number": 100, "max_target": 100, "division": True},
         limits={"numbers": (2, 6), "max_number": (1, 10**6), "max_target": (1, 10**6)}),
    Task("sudoku", sudoku_prompt, grade_sudoku, read_sudoku, make=make_sudoku,
         options={"empties": 8}, limits={"empties": (0, 12)}),
    Task("gsm8k", question_prompt, grade_gsm8k, read_gsm8k,
         hub={"train": ("openai/gsm8k", "main", "train"), "test": ("openai/gsm8k", "main", "test")}),
    Task("math", question_prompt, grade_math, read_math, grade_batch=grade_math_batch, overlap=True,
         hub={"train": ("qwedsacf/competition_math", None, "train"), "test": ("HuggingFaceH4/MATH-500", None, "test")},
         options={"max_level": 4}, limits={"max_level": (1, 5)}),
    Task("commonsense_qa", choice_prompt, grade_choice, read_choice,
         hub={"train": ("tau/commonsense_qa", None, "train"), "test": ("tau/commonsense_qa", None, "validation")}),
)}
TASKS["countdown-3to4"] = replace(
    TASKS["countdown"], name="countdown-3to4", make=None, read=read_countdown_3to4, options={"numbers": 3},
    hub=dict.fromkeys(SIZES, ("Jiayi-Pan/Countdown-Tasks-3to4", None, "train")), limits={"numbers": (3, 4)})
TASKS["gsm8k-platinum"] = replace(TASKS["gsm8k"], name="gsm8k-platinum", hub={
    "train": ("openai/gsm8k", "main", "train"), "test": ("madrylab/gsm8k-platinum", "main", "test")})


def find_task(name):
    if name not in TASKS:
        raise TaskError(f"--task {name} is unknown: choose one of {', '.join(TASKS)}")
    return TASKS[name]


def grade(task_name, completion_text, example):
    return find_task(task_name).grade(completion_text, example)


def grade_batch(task_name, texts, examples):
    """The same grades as one by one; a batch of MATH has one deadline."""
    task = find_task(task_name)
    if task.grade_batch:
        return task.grade_batch(texts, examples)
    return [task.grade(text, example) for text, example in zip(texts, examples)]


# --- Data -------------------------------------------------------------------------------------------------------------


class Examples(Sequence):
    """A sequence of plain dicts; `source` says where they are from and is printed with every result."""

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


def load(task_name, split, *, seed=0, file=None, size=None, held_out=(), **options):
    """The examples of a split: example i of a generated task is a function of (seed, i, options); rows of a file or the
    hub keep their order, at most `size` of them, without those whose question is in `held_out`."""
    task = find_task(task_name)
    options = checked_options(task, options)
    if split not in SIZES:
        raise TaskError(f"split {split} is unknown: choose train or test")
    if task.make and file is None:
        task.make(seed, 0, split, **options)  # options without problems are refused here, not in the first step
        size = SIZES[split] if size is None else size
        make = lru_cache(maxsize=None if split == "test" else 0)(lambda i: task.make(seed, i, split, **options))
        if split == "train":
            return Examples(make, size, f"generated, seed {seed}")
        once = first_of_each(make, size)  # a test problem twice would make its accuracy look surer than it is
        return Examples(lambda i: make(once[i]), len(once), f"generated, seed {seed}, {len(once)} different problems")
    hub = task.hub.get(split)
    if hub is None and file is None:
        raise TaskError(f"task {task_name} has no {split} data of its own: give --{split}-file")
    if task.overlap and split == "train" and file is None and not held_out:
        held_out = load(task_name, "test")
    rows = read_file(split, file, hub) if file else read_hub(split, hub)
    source = f"--{split}-file {file}" if file else " ".join(filter(None, hub))
    known, examples, left_out = {question_key(task, example) for example in held_out}, [], 0
    for where, row in rows:
        try:
            example = task.read(row, split, options)
            if example is None or known and question_key(task, example) in known:
                left_out += 1
            else:
                examples.append(example)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            reason = str(error) if isinstance(error, ValueError) else f"a field is missing or of a wrong kind: {error}"
            raise TaskError(f"{source}, {where} is not a row of task {task_name}: {reason}") from error
    if not examples:
        raise TaskError(f"{source} has no rows for task {task_name} ({left_out} left out by its options)")
    source += f", {left_out} rows left out" if left_out else ""
    source += ", test problems not looked for" if task.overlap and split == "train" and not held_out else ""
    return Examples(examples.__getitem__, len(examples) if size is None else min(size, len(examples)), source)


def first_of_each(make, size):
    """Indices of the first `size` different problems among 5 x `size`; another order of Countdown's numbers is no difference."""
    found = {}
    for i in range(5 * size):
        example = make(i)
        key = (tuple(sorted(example["nums"])), example["target"]) if "nums" in example else tuple(example.values())
        found.setdefault(key, i)
        if len(found) == size:
            break
    return list(found.values())


def checked_options(task, options):
    for name, value in options.items():
        if name not in task.options:
            flags = ", ".join(flag(option) for option in task.options) or "none"
            raise TaskError(f"{flag(name)} is not an option of task {task.name}; its options: {flags}")
        kind = type(task.options[name])
        low, high = task.limits.get(name, (value, value))
        if type(value) is not kind or not low <= value <= high:
            raise TaskError(f"{flag(name)} {value!r} cannot work: {task.name} takes {kind.__name__}s {low} to {high}")
    return {**task.options, **options}


def flag(option):
    return "--" + option.replace("_", "-")


def question_key(task, example):
    return " ".join(task.prompt(example)[-1]["content"].split())


if __name__ == "__main__":
    from lab.show_task import main
    main()
