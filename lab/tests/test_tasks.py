"""Claims about tasks.py, lab/math_task.py and lab/choice_task.py: checkers, prompts, data.

The tables hold answers that fooled other checkers, and right answers that others refused.
"""
import ast
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from itertools import permutations, product
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "lab")]
import tasks  # noqa: E402
import choice_task  # noqa: E402
import math_task  # noqa: E402

PUZZLE, SOLUTION = "1002020100030310", "1432324141232314"
EXAMPLES = {"countdown": {"nums": [17, 18, 5], "target": 67},
            "sudoku": {"puzzle": PUZZLE, "solution": SOLUTION},
            "gsm8k": {"question": "How many?", "answer": "18"},
            "math": {"question": "Why?", "answer": "18"},
            "hellaswag": {"question": "Where?", "choices": ["here", "there"], "answer": "B"}}
RIGHT = {"countdown": "17 * 5 - 18 = 67", "sudoku": SOLUTION, "gsm8k": r"\boxed{18}",
         "math": r"\boxed{9+9}", "hellaswag": "B"}
QUICK = [name for name in EXAMPLES if name != "math"]    # no child process
REGISTERED = dict(tasks.TASKS)


@pytest.fixture(autouse=True)
def the_tasks_of_these_modules(monkeypatch):
    """Another test may have loaded lab/math_task.py again: then `math` is that one's."""
    for name, task in REGISTERED.items():
        monkeypatch.setitem(tasks.TASKS, name, task)


def grade(task, answer, example=None):
    text = f"<think>thoughts</think><answer>{answer}</answer>"
    return tasks.grade(task, text, example or EXAMPLES[task])


def rows(table):
    """(gold, answer) of each answer in lines `gold ~ answer | answer ;; gold ~ answer`."""
    for entry in re.split(r" ;; |\n", table.strip()):
        gold, _, answers = entry.rpartition(" ~ ")
        if not entry.startswith("# "):
            yield from ((gold, answer) for answer in answers.split(" | "))


# --- Which text is the answer -----------------------------------------------------------------

@pytest.mark.parametrize("where, text, content", [
    ("think tag", "<think>a</think><answer>b</answer>", "b"),
    ("tag", "<answer>1</answer> <answer>2</answer>", "2"),
    ("think tag", "<think>maybe <answer>1</answer></think><answer>2</answer>", "2"),
    ("think tag", "<answer>2</answer><think>or <answer>1</answer></think>", "2"),
    ("tag", "<think>open <answer>2</answer>", "2"),               # a think that never closed
    ("think tag", "<think>a<think>b</think><answer>5</answer>", "5"),
    ("tag", "put it in <answer> tags: <answer>2</answer>", "2"),
    ("tag", "<answer>2</answer> <answer>3", "2"),                 # complete before unclosed
    ("think", "<think>a</think><answer>5", "5"),
    ("", "<answer>5</answ", "5"),
    ("think", "<think>x<answer>5</answer></think>", "5"),         # no other answer
    ("tag", "</think></answer><answer>\n5\n</answer>", "\n5\n"),
    # the template before the real answer does not win
    ("", r"write <answer>\boxed{...}</answer>: <answer>2", "2"),
    ("tag", "in <answer></answer>. So <answer>2</answer>", "2"),
    ("tag", "<answer>2</answer> in <answer></answer>", "2"),
    ("", "<answer>expression = target</answer> so <answer>2", "2"),
    ("", r"<answer>your final answer</answer>so \boxed{18}.", "18"),
    # the box comes last
    ("", r"so \boxed{18}.", "18"), ("", r"<think>so \boxed{18}.", "18"),
    ("think", r"<think>so \boxed{18}.</think>", "18"), ("", r"\fbox{18}", "18"),
    ("tag", r"<answer>\boxed{5</answer>", "5"), ("tag", r"<answer>\boxed{}5</answer>", "5"),
    ("think", r"<think>\boxed{1}</think>so \boxed{18}.", "18"),
    ("tag", r"<answer>\boxed{1}, or \boxed{5} pears</answer> \boxed{6}", "5"),
    ("", r"\boxed{1} <answer>2", "2"),
    ("", "5</answer>", None), ("", "", None), ("", "<ANSWER>5</ANSWER>", None),
    ("tag", "<answer></answer>", "")])
def test_where_the_answer_is_found(where, text, content):
    found = tasks.last_answer(text, box=True)
    assert found == (content, "tag" in where, "think" in where)


@pytest.mark.parametrize("task", EXAMPLES)
@pytest.mark.parametrize("text, thought, tagged", [
    ("<think>a</think><answer>{}</answer>", 1, 1), ("<answer>{}</answer>", 0, 1),
    ("<think>a</think><answer>{}", 1, 0), ("<think>a <answer>{}", 0, 0),
    ("<think>open <answer>{}</answer>", 0, 1)])
def test_content_is_correct_and_tags_are_paid_for_separately(task, text, thought, tagged):
    other = 1 if task in ("countdown", "sudoku") else thought    # the half that is no tag
    got = tasks.grade(task, text.format(RIGHT[task]), EXAMPLES[task])
    format = (other + tagged) / 2
    assert (got.correct, got.format, got.reward) == (True, format, 3 + format)
    assert got.metrics["tagged"] == tagged


@pytest.mark.parametrize("task", EXAMPLES)
def test_without_tags_only_a_box_is_an_answer_and_the_last_answer_counts(task):
    outside = tasks.grade(task, RIGHT[task], EXAMPLES[task])
    assert (outside.correct, outside.reward) == (task in ("gsm8k", "math"), 3 * outside.correct)
    assert not grade(task, f"{RIGHT[task]}</answer><answer>7").correct
    wrong = grade(task, "2 + 2")
    assert not wrong.correct and wrong.reward <= 1


@pytest.mark.parametrize("task", EXAMPLES)
def test_bold_marks_braces_a_letter_and_dashes_are_spelling_in_every_task(task):
    number = task in ("gsm8k", "math")
    answer = "18" if number else RIGHT[task]
    spelled = ["**{}**", "{{{}}}", "**{{{}}}**"]
    if task != "hellaswag":
        spelled += ["x = {}", "**x = {}**", "{{x = {}}}", "x = {{{}}}", "x = **{}**"]
    if number:
        spelled += [r"\boxed{{**{}**}}", r"\boxed{{x = {}}}", "€{}", "£{}", "{} €", "$x = {}$",
                    "{}°C", "{} °C", r"{}^\circ\text{{C}}", r"{}^\circ C", r"{}\text{{°C}}",
                    r"\textbf{{{}}}", r"\fbox{{{}}}"]
    for form in spelled:
        assert grade(task, form.format(answer)).reward == 4, form
    for form in ("**{}", "{{{}", "x == {}", "2**{}**", "**{0}****{0}**"):
        assert not grade(task, form.format(answer)).correct or task == "hellaswag", form
    minus = {"nums": [5, 8], "target": -3, "answer": "-3"}
    for three in ("–3", "−3", "-3") + ("-$3", "–€3", "x = –3") * number:
        if number or task == "countdown":
            form = "{}" if number else "5 - 8 = {}"
            assert grade(task, form.format(three), minus).correct, three
            assert not grade(task, form.format("3"), minus).correct


# --- Countdown --------------------------------------------------------------------------------

COUNTDOWN_WRONG = r"""
4 60 13 = 73 ~ 4; 60 + 13 = 73 | 4, 60 + 13 = 73 | not using 4: 60 + 13 = 73 | x4 60+13 = 73
4 60 13 = 73 ~ \text{4} 60 + 13 = 73 | 4 \boxed{60+13} = 73 | 4 60 + 13 | 60 + 13 = 73
4 60 13 = 73 ~ 60 + 13 + 0 * 4 = 73 | 60 + 13 # 4 | [4] 60 + 13 | 60 + 13 = 73 (4) | 4 = 60 + 13
4 60 13 = 73 ~ (4) 60 + 13 | 60 + 13 + (4 = 73 | 60 + 13 = 4 = 73
30 100 23 = 23 ~ $30 100$ $23$ = 23 | 30 100 23 = 23
17 18 5 = 67 ~ 17 * 5 - 18 = 999 | 17 * 5 - 18 = 67 = 5 | 17 * 5 - 18 == 67 | 17 * 5 - 18 =
17 18 5 = 67 ~ = 67 | 67 |  | 67 = 17 * 5 - 18 | 17 * 5 - 18 = 67.0 | 17 * 5 - 18 = 60 + 7
17 18 5 = 67 ~ 17 x 5 - 18 | 17 * 5 - 18 = +67 | 17 * 5 - 18 = 67! | 17 * 5 - 18 equals 67
17 18 5 = 67 ~ 17 * 5 - 18 = 6 7 | \boxed{\boxed{17 * 5 - 18}} | \frac{17 * 5}{1} - 18
17 18 5 = 67 ~ $17 * 5 - 18 | 1 7 * 5 - 1 8 | １７ * 5 - 18 | 5 * 17 - 18 - 18 | +17 * 5 - 18
17 18 5 = 67 ~ 17 *5 - 18, | {17 * 5} - 18 | [17 * 5] - 18 | 17 ** 5 - 18 | 17 * 5 - | 17 5 18
17 18 5 = 67 ~ 17 * 5 - 18) | () 17 * 5 - 18 | 17_0 * 5 - 18 | 0x11 * 5 - 18 | 1e1 | 17 @ 5 - 18
17 18 5 = 67 ~ (17 * 5, 18) | 17 * 5 - 18 if 1 | -(18 - 17 * 5) | 17 * 5 - 18.0 | ~17 * 5 - 18
17 18 5 = 67 ~ 17 * 5 & 18
2 3 4 = 12 ~ 2^3 + 4 = 12 | 2**3+4 | 2^{3} + 4 | 2³ + 4 ;; 3 0 = 3 ~ 3 / 0 ;; 3 8 = 24 ~ 3 * +8
7 2 1 = 4 ~ 7 // 2 + 1 | 7 / / 2 + 1 | 7 % 2 + 1 | 7 / 2 + 1 ;; 3 8 = 5 ~ -3 + 8
1 5 2 = 3 ~ 1.5 * 2 = 3 | 1,5 * 2 = 3 ;; 4 4 8 = 1 ~ 8 / (4 - 4) | 8 / (4 - 4) = 1
5 3 2 = 10 ~ 5--3+2 | 5 - -3 + 2 | 5 - (-3) + 2 | 5++3+2 | 5 - (0 - 3) + 2
7 9 4 = 35 ~ (9 - 4)7 = 35 ;; 93 30 100 = 23 ~ 93**30**100 | 93^30^100 = 23"""
COUNTDOWN_RIGHT = r"""
7 9 4 = 35 ~ 7(9 - 4) = 35 | 7 (9-4) | (7)(9 - 4) | 7\left(9 - 4\right) = 35
17 18 5 = 67 ~ 17 × 5 - 18 = 67 | 17 \times 5 - 18 = 67 | \boxed{17 * 5 - 18 = 67} | 17 * 5 - 18
17 18 5 = 67 ~ 17\cdot5-18 | 17·5−18=67 | 17 ⋅ 5 – 18 | $17 * 5 - 18 = 67$
17 18 5 = 67 ~ $$17 \times 5 - 18$$ | \boxed{$17*5-18$} | \(17 * 5 - 18\) | 17 * 5 - 18 = 67.
17 18 5 = 67 ~ $17 * 5 - 18 = 67$. | ((17)) * (5) - (18) | (((17 * 5 - 18)))
17 18 5 = 67 ~ 017 * 5 - 18 = 067 | $\boxed{17*5-18=67}$
8 4 2 = 4 ~ 8 ÷ 4 * 2 | 8 \div 4 \cdot 2 | 8/4(2) ;; 8 4 2 = 1 ~ 8 / (4 * 2)
9 2 3 = 4 ~ 9 - 2 - 3 ;; 8 3 3 = 8 ~ 8 / (3 / 3) ;; 3 3 7 7 = 24 ~ 7 * (3 + 3 / 7)
5 8 = -3 ~ 5 - 8 = -3 | 5 - 8 = −3 | 5 − 8 = –3"""


def test_countdown_answers():
    right = [*rows(COUNTDOWN_RIGHT), ("17 18 5 = 67", "17 * 5\n- 18\n= 67"),
             ("17 18 5 = 67", "\t17 *\r\n5 -18 ")]
    wrong = [*rows(COUNTDOWN_WRONG), ("17 18 5 = 67", "17 * 5 - 18\0"),
             ("17 18 5 = 67", "17 * 5 - 18 = " + "0" * 584 + "67" + "9")]
    for problem, answer in [*right, *wrong]:
        *nums, target = map(int, re.findall(r"-?\d+", problem))
        got = grade("countdown", answer, {"nums": nums, "target": target})
        if (problem, answer) in right:
            assert (got.reward, got.correct, got.format) == (4, True, 1), (problem, answer)
            assert got.reason == f"value {target}"
        else:
            assert not got.correct and got.reward <= 1, (problem, answer)


@pytest.mark.parametrize("answer, format, reason", [
    ("17 * 5 = 67", 1.0, "number 18 unused"), ("17 * 5 + 18", 1.0, "value 103"),
    ("17 * 5 - 18 - 5", 1.0, "number 5 not given, or used too often"),
    ("17 / 5 + 18", 1.0, "value 107/5"), ("5 / (17 - 17)", 1.0, "division by zero"),
    ("17 * 5 - 18 = 999", 1.0, "right side 999 is not the target"),
    ("17 * 5 -", 0.5, "not an expression of integers, + - * / ( )")])
def test_countdown_says_why_an_answer_is_wrong(answer, format, reason):
    got = grade("countdown", answer)
    assert (got.reward, got.correct, got.format, got.reason) == (format, False, format, reason)


def trees(items):
    """Every expression over the items in this order, and its value or None."""
    if len(items) == 1:
        yield str(items[0]), Fraction(items[0])
    for cut in range(1, len(items)):
        for (x, a), (y, b) in product(trees(items[:cut]), trees(items[cut:])):
            known = a is not None and b is not None
            yield f"({x}+{y})", a + b if known else None
            yield f"({x}-{y})", a - b if known else None
            yield f"({x}*{y})", a * b if known else None
            yield f"({x}/{y})", a / b if known and b else None


@pytest.mark.parametrize("nums", [(3, 5, 7), (6, 6, 2)])
def test_countdown_agrees_with_all_expressions_of_three_numbers(nums):
    for order in set(permutations(nums)):
        for text, value in trees(order):
            target = int(value) if value is not None and value.denominator == 1 else 1
            example = {"nums": list(nums), "target": target}
            assert grade("countdown", text, example).correct == (value == target), text
            assert not grade("countdown", text, {**example, "target": target + 1}).correct


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text("-+*/() =0157", max_size=16))
@example("**7 + 5 - 1**")
def test_what_needs_no_unwrapping_is_graded_as_if_it_were_unwrapped(answer):
    problem = {"nums": [7, 5, 1], "target": 11}
    plain, in_dollars = (grade("countdown", x, problem) for x in (answer, f"${answer}$"))
    assert plain == in_dollars


# --- Sudoku -----------------------------------------------------------------------------------

# Three of the nine empty cells wrong, all givens kept
THREE_WRONG = "1142424141232314"


@pytest.mark.parametrize("answer, format, share, correct", [
    (SOLUTION, 1.0, 1.0, True), (" ".join(SOLUTION), 1.0, 1.0, True),
    ("\n".join(SOLUTION[i:i + 4] for i in (0, 4, 8, 12)), 1.0, 1.0, True),
    # what a model that was shown no example writes: the zeros copied, or the givens changed
    (PUZZLE, 0.5, 0.0, False), (THREE_WRONG, 1.0, 6 / 9, False), ("1" * 16, 0.75, 1 / 9, False),
    ("2" + THREE_WRONG[1:], 0.75, 6 / 9, False), ("2" + SOLUTION[1:], 0.75, 1.0, False),
    ("4434344441242444", 0.75, 1.0, False),                          # overwritten givens only
    (SOLUTION + "9999", 0.5, 0.0, False), (SOLUTION[:15], 0.5, 0.0, False),
    ("", 0.5, 0.0, False), (SOLUTION[:15] + "0", 0.5, 0.0, False),
    (SOLUTION.replace("1", "１"), 0.5, 0.0, False), (f"Grid: {SOLUTION}", 0.5, 0.0, False),
    ("-".join(SOLUTION), 0.5, 0.0, False)])
def test_sudoku_pays_for_tag_digits_givens_and_cells(answer, format, share, correct):
    got = grade("sudoku", answer)
    assert (got.correct, got.format, got.reward) == (correct, format, format + 3 * share)
    assert got.metrics == {"tagged": 1.0, "cell_accuracy": share}


def solve(puzzle):
    """All solutions of a puzzle by trying."""
    rows = [puzzle[i:i + 4] for i in range(0, 16, 4)]
    columns = [puzzle[i::4] for i in range(4)]
    boxes = [puzzle[i:i + 2] + puzzle[i + 4:i + 6] for i in (0, 2, 8, 10)]
    for unit in [*rows, *columns, *boxes]:
        digits = unit.replace("0", "")
        if len(digits) != len(set(digits)):
            return []
    if "0" not in puzzle:
        return [puzzle]
    return [s for digit in "1234" for s in solve(puzzle.replace("0", digit, 1))]


def test_any_valid_grid_is_right_and_a_full_puzzle_divides_by_nothing():
    several = "1200340000000000"
    found = solve(several)
    assert len(found) > 1 and sorted(found) == sorted(tasks.solutions(several))
    for grid in found:
        assert grade("sudoku", grid, {"puzzle": several, "solution": found[0]}).reward == 4
    full = {"puzzle": SOLUTION, "solution": SOLUTION}
    assert grade("sudoku", SOLUTION, full).reward == 4
    assert grade("sudoku", SOLUTION[::-1], full).reward == 0.75
    assert not grade("sudoku", "1" * 16, {"puzzle": "0" * 16, "solution": "1" * 16}).correct


def test_one_digit_in_every_empty_cell_scores_a_quarter():
    data = tasks.load("sudoku", "test", size=100)
    shares = [grade("sudoku", e["puzzle"].replace("0", d), e).metrics["cell_accuracy"]
              for e in data for d in "1234"]
    assert sum(shares) / len(shares) == pytest.approx(0.25)


# --- GSM8K ------------------------------------------------------------------------------------

GSM8K_WRONG = r"""
18 ~ 18.75 | -18 | 18/7 | 18, 19 | 18^2 | 1800 | 0.18 | 9+9 | 18 or 17 | 18=17 | 18 19 | 1 8
18 ~ 18k | 18! | 18e0 | 18-0 | 18*1 | --18 | eighteen |  | 1,8 | 18, | \sqrt{324} | \frac{36}{0}
18 ~ \frac{36}{2}1 | 18 1/2 | 0x12 | １٨ | ١٨ | 36/2/1 | 18.. | 9 \times 2 | 18 17 dollars | nan
18 ~ 18 \text{or} 17 | $ | . | 18 per | ~18 | 18 M | 18 mod 5 | 18 : 2 | 3–21 | 18–0
18 ~ \boxed{18}\boxed{17} | \boxed{9} + 9 | \boxed{18 + 1} | \boxed{18, 19} | {1}{8} | 18{5}
1000 ~ 1,00 | 1.000 | 10,00 | 1 000 | 1, 000 ;; 1819 ~ 18,19 ;; 5 ~ 5m | 5K | 5 x | 5°C2
23 ~ 2**3 | 2 **3** | **2****3** | 2**3** ;; 18 ~ xy = 18 | x = y = 18 | x == 18 | 2x = 18"""
SCALED = ("thousand thousands k K M bn mln trn million quadrillion dozen dozens doz tens lakhs "
          "crore halves thirds sevenths twelfths twentieths hundredths score plus squared"
          ).split() + ["or so", "and a half"]
GSM8K_RIGHT = r"""
18 ~ 18 | 18. | $18 | 18 dollars | \frac{36}{2} | 18.0 | 18.00 | +18 | 18% | 18\% | $18.00 | 018
18 ~ 18 dollars. | 36 / 2 | \dfrac{36}{2} | \$18 | $18$ | 18km | 18 \text{ dollars} | 18 kg/week
18 ~ 18 per hour | $18/hour | 18 \text{ per hour}
18 ~ 18\text{ hours} | \(18\) | 18 miles per hour | 18 square feet | 18^\circ | 18 m
18 ~ 18~\text{cm} | 18 months | 18 paths | 18 tents | 18 ms
18 ~ 18 halfpennies ;; 0 ~ -0 ;; 0.5 ~ 1/2 | .5 ;; 12.5 ~ \frac{25}{2} ;; 1,234,567 ~ 1234567
1000 ~ 1,000 | 1{,}000 | 1\,000 | 1,\!000 | \$1,000 | 1000 | $1,000.00 | 1,000 dollars | 2,000/2
-18 ~ -18 | −18 | -$18 | $-18 | -\frac{36}{2} ;; 3 x 6 = <<3*6=18>>18 #### 18 ~ 18"""


def test_gsm8k_answers():
    five = [("5", form.format(word)) for word in SCALED for form in ("5 {}", r"5 \text{{ {}}}")]
    for gold, answer in [*rows(GSM8K_WRONG), *five, ("18", "9" * 5000),
                         ("18", "18" + " " * 300 + "or 17")]:
        example = {"question": "", "answer": gold}
        assert not grade("gsm8k", answer, example).correct, (gold, answer)
        if "boxed" not in answer:
            assert not grade("gsm8k", rf"\boxed{{{answer}}}", example).correct, (gold, answer)
    for gold, answer in [*rows(GSM8K_RIGHT), (18, "18"), (27.0, "27"), ("18", " 18\n")]:
        example = {"question": "", "answer": gold}
        assert grade("gsm8k", answer, example).reward == 4, answer
        for form in (r"\boxed{%s}", r"The answer is \boxed{%s}."):
            assert grade("gsm8k", form % answer, example).correct, answer


@pytest.mark.parametrize("text", [
    r"<answer>\boxed{18} more cupcakes</answer>", r"<answer>\boxed{18}\) kg/week.</answer>",
    r"<answer>9 + 9 = \boxed{18} \text{ hours}</answer>", r"<answer>\boxed{18</answer>",
    r"<answer>\boxed{}18</answer>", "<answer>boxed{18}</answer>", r"<answer>\boxed{18}",
    r"<think>so \boxed{17}</think> It is {\boxed{18}} of them.",
    "<answer>1. 6 + 3 = 9\n2. Double: \\[ \\boxed{18} \\]</answer>",
    r"First \boxed{9}, then \boxed{18} and that is it.", r"\boxed{x = \boxed{18}}",
    r"<answer>That is why \fbox{18}</answer>", r"\boxed{17} \boxed{...} \fbox{18} \boxed{}",
    r"<answer>It comes to \boxed{18}, all in all.</answer>", r"Not 9 or \boxed{18}, 2 each."])
def test_gsm8k_reads_what_models_write_around_a_box(text):
    assert tasks.grade("gsm8k", text, EXAMPLES["gsm8k"]).correct


@settings(max_examples=100, deadline=None)
@given(*[st.fractions(-10**6, 10**6, max_denominator=1000)] * 2)
def test_gsm8k_compares_exactly(a, b):
    example = {"question": "", "answer": str(a)}
    assert grade("gsm8k", str(a), example).correct
    assert grade("gsm8k", str(b), example).correct == (a == b)
    assert not grade("gsm8k", str(a + Fraction(1, 10**9)), example).correct
    assert grade("gsm8k", f"{int(a):,}", {"question": "", "answer": str(int(a))}).correct


# --- MATH -------------------------------------------------------------------------------------

MATH_RIGHT = r"""
# intervals, named or not on either side; unions in any order
[0,5) ~ x \in [0, 5) ;; x \in [0, 5) ~ [0,5) ;; (-3,4) ~ -3<x<4 ;; -3<x<4 ~ (-3,4) | 4>x>-3
[2,\infty) ~ [2,+\infty) | x \in [2, +\infty) ;; \infty ~ +\infty ;; 1,-2 ~ 1 or -2 | 1 and -2
120^\circ ~ 120° ;; 5 ~ \mathbf{5}
[2,\infty) ~ x\ge 2 ;; x \geq 2 ~ [2,\infty) ;; [2,5) ~ \left[2, 5\right)
(3,4] ~ 3 < x \leq 4 ;; (-\infty,1)\cup(2,3] ~ (2,3] \cup (-\infty, 1)
x \in (-\infty,1)\cup(2,\infty) ~ x<1 \text{ or } x > 2
# dollars, solutions joined by "or" or commas, names
\frac{2}{5} ~ $\frac{2}{5}$ ;; 4,7 ~ x=4, x=7 | x = 4 \text{ or } x = 7 | x = 4 or x = 7
4,7 ~ x = 7, 4 ;; 1,-2 ~ -2 \text{ and } 1 ;; (1,2) ~ (a,b) = (1,2)
\{1,2,3\} ~ 3,2,1 ;; 18 ~ 9+9=18 | 9+9
(3,4) ~ (3, 4) ;; \{1\pm\sqrt{5},-2\} ~ -2, 1+\sqrt5, 1-\sqrt5
# percents, units, words, layout
12.5 ~ 12.5\% ;; 12.5\% ~ 12.5 ;; \text{Evelyn} ~ Evelyn ;; \text{(B)} ~ B
15\mbox{ cm}^2 ~ 15 ;; 5 ~ x=5 | 5 \text{ cm} | 5 cm | 5.
\$32,\!348 ~ 32348 ;; 1000 ~ 1,000 | 1{,}000
120^\circ ~ 120 ;; \frac{270}7\text{ degrees} ~ \frac{270}{7} ;; \text{even} ~ even
9 ~ \text{The answer is } 9 ;; 5 ~ \text{5} ;; -0.5 ~ \text{-1/2}
# equations, bases, values
x+y=9 ~ 9 = x + y | 2x+2y=18 ;; y = 2x + 3 ~ 2x - y + 3 = 0 ;; x=5 ~ x = 5 ;; 101_{2} ~ 101_2
5\sqrt{2} ~ \sqrt{50} ;; \frac{1}{2} ~ 0.5 ;; 0.5 ~ \frac12 ;; 1\frac{4}{5} ~ 1.8
p - q ~ -q+p ;; 6 - 5i ~ -5i+6 ;; \cot x ~ \frac{1}{\tan x} ;; x^2+2x+1 ~ (x+1)^2
(3, 6/4) ~ (3,\frac{3}{2})
# a constant by itself, letters, complex numbers, any size, products, thousands
k = 15 ~ 15 ;; x=5 ~ 5 ;; x=\frac{1}{2} ~ 0.5 ;; xy ~ x \cdot y | x\cdot y ;; x\cdot y ~ xy
\text{A,B} ~ A, B | \text{A}, \text{B} | A and B | \text{A and B} | B, A | (A), (B)
3+4i ~ (2+i)^2 | 3+4\mathrm{i} | 4i+3 ;; -1 ~ i^2 | e^{i\pi} ;; i ~ \sqrt{-1}
10^{60}(\sqrt{2}+\sqrt{3}) ~ 10^{60}\sqrt{5+2\sqrt{6}} ;; 2^{1000} ~ 4^{500} ;; 100! ~ 100 \cdot 99! ;; 10^{100} ~ 10^{50}\cdot 10^{50}
1000 ~ 1\,000 ;; 1\,000 ~ 1000 | 1{,}000 ;; 12000000 ~ 12\,000\,000
-37_8 ~ -37_{8} ;; 101_2 ~ 11_2+10_2 ;; 2 \cdot 101_3 ~ 202_3 | 2\cdot101_3 ;; 101_2 ~ (101)_2 ;; 1.1_3 ~ 1.1_{3}
f'(x) = 2x ~ f'(x)=2x ;; \frac{\sin x}{\cos x} ~ \tan x
\sqrt{2}+\sqrt{3} ~ \sqrt{5+2\sqrt{6}} ;; Hence \boxed{1}, then $\boxed{\frac{3}{4}}$. ~ 3/4
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{bmatrix} 1 \\ 2 \end{bmatrix}"""
MATH_WRONG = r"""
18 ~ \text{1}18 | \text{17 or }18 | \text{negative }18 | \text{half of }18 | \text{not }18
11 ~ 1\text{ }1 ;; \infty ~ -\infty ;; 1,-2 ~ 1 or 2
(3,4) ~ 3,4 | (4,3) | [3,4] ;; 3,4 ~ (3,4) ;; [0,5) ~ [0,5] ;; (15,-29) ~ (8,-2) ;; 1,2,2 ~ 1,2
-3<x<4 ~ -3<x<5 ;; x \ge 2 ~ x>2 ;; 4,7 ~ x=4,y=7 ;; (-\infty,1)\cup(2,3] ~ (2,3]
# equations and bases
x+y=9 ~ 9 ;; y=2x+3 ~ 2x+3 ;; 3 ~ 5=3 | 3=5 ;; 5 ~ 101_2 ;; 101_3 ~ 101_2 | 10 | 101
xy=9 ~ 9 ;; x=1,y=2 ~ 2,1 | 1,2 ;; k=15 ~ m=15 | 16 ;; f'(x) ~ f(x) ;; f'(x)=2x ~ f(x)=2x
-37_8 ~ -37_9 | -37 ;; 1.1_3 ~ 1.1_2 ;; 2 \cdot 101_3 ~ 2 \cdot 101_2 ;; (101)_3 ~ (101)_2
x = 101_3 ~ x = 101_2 | 101_2 ;; 5, 101_2 ~ 101, 11_2 ;; (101_3,2) ~ (101_2,2) ;; 31 ~ 37_8
101_2 ~ 5 ;; 1=3 ~ 1=2 ;; (x+1)^2=x^2+2x+1 ~ y=1
\begin{pmatrix}1\\2\end{pmatrix} ~ \begin{pmatrix}1&2\end{pmatrix}
# beyond double precision
\frac{1}{2^{61}} ~ \frac{1}{2^{60}} ;; (\frac{1}{2^{61}},3) ~ (\frac{1}{2^{60}},3)
5\sqrt{2} ~ 7.0710678 | 7.07106781186547524400 ;; \frac13 ~ 0.333333 ;; \pi ~ 3.14159265
\sqrt3 ~ \sqrt3+e^{-50} | \sqrt3+10^{-400} ;; 2^{1000} ~ 4^{500}+1 ;; 100! ~ 100\cdot 98!
3+4i ~ 3-4i | 7 ;; i ~ 1 | j ;; \text{A,B} ~ A, C | A | AB ;; xy ~ x+y | x ;; no ~ on
# no interval holds infinity
(-\infty,1)\cup(2,3] ~ [-\infty,1)\cup(2,3] ;; x<1 ~ [-\infty,1)
(-\infty,1) ~ [-\infty,1) ;; [2,\infty) ~ [2,\infty] | \left[2, +\infty\right]
# a variable is no unit, a scale is none
5m ~ 5 ;; 5 ~ 5m | 5 thousand | 5 \text{ thousand} ;; x ~ y ;; \text{even} ~ \text{odd}
# read in part by a parser
3 ~ 3,4 | 3 \text{ or } 4 | 3 \approx 4 | \pm 3 | 3 \ldots | 3$ or $4 | 3 \equiv 4 | -3
7 ~ 4 3 | 4 \quad 3 ;; 12 ~ 1 2 ;; 10 ~ 1"""


def test_math_rows_of_the_table():
    nested = "(" * 200 + "5" + ")" * 200
    wrong = [*rows(MATH_WRONG), ("3", ""), ("5", "5" * 1001), ("5", nested)]
    table = [(*row, True) for row in rows(MATH_RIGHT)] + [(*row, False) for row in wrong]
    texts = [rf"<think>a</think><answer>\boxed{{{answer}}}</answer>" for _, answer, _ in table]
    grades = tasks.grade_batch("math", texts, [{"answer": gold} for gold, _, _ in table])
    assert [] == [row for row, got in zip(table, grades) if got.correct != row[2]]
    assert all(g.reward == (4 if g.correct else 1) for g in grades)
    assert grade("math", nested, {"answer": "5"}).reason.endswith("nested too deep")
    bare = grade("math", r"$\frac{2}{5}$", {"answer": "0.4"})
    assert bare.correct and bare.metrics == {"tagged": 1.0, "string_match": 0.0}
    assert grade("math", "]0,5[", {"answer": "]0,5["}).correct        # equal as text
    same = tasks.grade("math", r"so \boxed{\dfrac{1}{2}}", {"answer": r"\frac{1}{2}"})
    assert same.reward == 3 and same.metrics == {"tagged": 0.0, "string_match": 1.0}


def test_math_lists_keep_their_order_where_the_question_asks_for_one():
    for question, correct in (("List them in increasing order.", False), ("List them.", True)):
        example = {"question": question, "answer": "1,2,3"}
        assert grade("math", "3,1,2", example).correct == correct
        assert grade("math", "1, 2, 3", example).correct


@pytest.mark.parametrize("question, asked", [
    ("What is $k$?", False), ("Solve the equation $2x = 10$.", False), ("", False),
    ("Find $x$ in the equation below.", False), ("What solution has the equation?", False),
    ("What is the equation of the line?", True), ("Find an equation for the line.", True),
    ("Enter your answer as an equation.", True), ("Write the line's equations.", True)])
def test_a_constant_alone_is_right_unless_an_equation_is_asked_for(question, asked):
    for gold in ("x = 5", r"\theta=5", "x_1 = 5"):
        example = {"question": question, "answer": gold}
        assert grade("math", "5", example).correct != asked
        assert grade("math", gold, example).correct and not grade("math", "6", example).correct


def test_honest_answers_beside_runaways_are_judged(caplog):
    math_task.judge([("1", "2-1", False)])                           # the child has started
    honest = [f"{i}+{18 - i}" for i in range(500)]
    answers = ["9^{9^{9^{9}}}", "99999999!", "9^{9^9}+1", *honest]
    grades = tasks.grade_batch("math", [rf"\boxed{{{answer}}}" for answer in answers],
                               [EXAMPLES["math"]] * len(answers))
    assert [g.correct for g in grades] == [False] * 3 + [True] * 500
    assert "3 of 503 answers took more than 2 s and count as wrong" in caplog.text
    children = ["ps", "--ppid", str(os.getpid()), "-o", "stat="]
    assert "Z" not in subprocess.run(children, capture_output=True, text=True).stdout


def test_a_warning_cannot_write_escape_sequences_or_forge_a_line(caplog, monkeypatch):
    monkeypatch.setattr(math_task, "judge", lambda questions: dict.fromkeys(questions))
    got = grade("math", "9\x1b2J\n\u202eCORRECT")
    assert not got.correct and got.reason == "not judged in time" and got.parsed.isprintable()
    assert caplog.records[0].getMessage().isprintable()


def test_a_killed_child_is_replaced():
    for _ in range(2):
        assert math_task.judge([("18", "9+9", False)]) == {("18", "9+9", False): True}
        os.kill(math_task.judge.process.pid, signal.SIGKILL)


ORPHAN = f"""
import os, sys, threading
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "lab")!r}]
import math_task, tasks
def ask():
    print(tasks.grade("math", r"\\boxed{{9+9}}", {{"answer": "18"}}).correct, end=" ")
thread = threading.Thread(target=ask)
thread.start(); thread.join()
pid = math_task.judge.process.pid
print("libtorch" in open(f"/proc/{{pid}}/maps").read(), pid, flush=True)
os.kill(os.getpid(), 9)     # no atexit, no finally
"""


def test_the_child_dies_with_its_parent_and_has_no_torch():
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True)
    correct, torch_there, pid = done.stdout.split()
    assert (correct, torch_there, done.returncode) == ("True", "False", -9), done.stderr
    status = Path(f"/proc/{pid}/status")
    for _ in range(600):    # it takes a tenth of a second
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    raise AssertionError("the child outlived its parent")


def test_a_missing_math_verify_is_an_error_and_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(tasks.TaskError, match="math-verify"):
        math_task.Judge()([("18", "9+9", False)])


# --- Multiple choice --------------------------------------------------------------------------

def test_multiple_choice_takes_one_letter():
    right = ["B", "b", "(B)", "B.", " B\n", r"\boxed{B}", r"$\boxed{(b)}$", "B. there",
             "B) there", "B: word", r"\boxed{\text{B}}", "B. there, a place", "[B]", "**B**",
             r"\textbf{B}", "Answer: **B**", "Answer: B", "B - word", "B - there", "B – there",
             "**B.** there", "**B** - there", "{B}", r"\fbox{B}", r"\textbf{Answer: B}",
             "The answer is (B)."]
    wrong = ["A", "A or B", "there", "BB", "", "B. here", "B. or A", "C", "E", "1",
             "B. A", "B: (a)", "B. A.", "B. there or here", "B. there, A. here", "B. there (A)",
             "B. or here", "B. either A", "B. not", "B - A", "B - here", "A - B", "**A** B",
             "[A] B", "Answer: A or B", "Answer:", "**A**", "[A]", "B and A", "B -", "not B"]
    for answer in (*right, *wrong):
        got = grade("hellaswag", answer)
        assert (got.correct, got.reward) == ((True, 4) if answer in right else (False, 1))
    letters = {"question": "Which?", "choices": ["b", "a"], "answer": "B"}
    assert [grade("hellaswag", a, letters).correct for a in ("B. a", "B. b")] == [True, False]


# --- Any text at all --------------------------------------------------------------------------

PIECES = st.sampled_from([
    "<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "{", "\\", "$", "(", ")",
    "17", "18", "5", " ", "\n", "*", "-", "=", "/", ",", ".", "\\left(", "\\frac{", "\\text{",
    "\ud800", "\0", "１", "a", "the", "final"])


@lru_cache
def reading():
    """Processor time to look at all of 100 kB twenty times: a second of this machine's own."""
    times = []
    for _ in range(3):
        start = time.process_time()
        [re.sub("[a-z]", "", "a1" * 50_000) for _ in range(20)]
        times.append(time.process_time() - start)
    return min(times)


def quick(work, *about):
    """In less than ten times `reading`, once of three times, as the machine may be busy.

    That is a hundred times the usual; what grows as a square would take thousands.
    """
    for _ in range(3):
        start = time.process_time()
        result = work()
        if time.process_time() - start < 10 * reading():
            return result
    raise AssertionError(f"slow: {about}")


def quickly_graded(text):
    for task in QUICK:
        got = quick(lambda: tasks.grade(task, text, EXAMPLES[task]), task, text[:80])
        assert 0 <= got.format <= 1 and got.format <= got.reward <= 4
        assert got.correct <= (got.reward == got.format + 3) and got.parsed.isprintable()


@settings(max_examples=60, deadline=None)
@given(st.lists(PIECES | st.text(max_size=20), max_size=30), st.lists(PIECES, max_size=4),
       st.lists(PIECES, max_size=10))
def test_any_text_up_to_100_kb_gets_a_grade_soon(before, repeated, after):
    repeated = "".join(repeated)
    text = "".join(before) + repeated * (100_000 // max(1, len(repeated))) + "".join(after)
    quickly_graded(text[:100_000])
    quickly_graded(f"<think>a</think><answer>{text[:99_900]}</answer>")


@pytest.mark.parametrize("core", [
    "(" * 50_000 + "1" + ")" * 50_000, "(" * 490, "1+" * 49_000 + "1", "9" * 100_000,
    "1+" * 249, "17*5-18=" + "9" * 99_000, "17*5-18=" + "9" * 490, " " * 99_000 + "1",
    "1 " * 50_000, "1(1" * 30_000, "\\boxed{" * 14_000, "\\boxed{" + "{" * 99_000,
    "\\boxed" + " " * 99_000, "\\boxed{" + "{}" * 49_000 + "}", "\\boxed{1}" * 11_000,
    "1" + ",000" * 24_000, "$" * 99_000, "$" * 500, "\\(" * 250, "=" * 99_000,
    "18" + " " * 99_000 + "dollars", "18" + " a" * 40_000, "<answer>" * 12_000,
    "<think><answer></think></answer>" * 3000, "<think>" * 14_000, "<" * 99_000, "the" * 33_000,
    "</answer>" * 11_000, "93" + "**30" * 20_000, "\\" * 99_000, "7" * 4301, "9*" * 249 + "9",
    "0" * 9000 + "17*5-18", "\\boxedboxed" * 9_000 + "!", "your final answer" * 6000 + "!",
    "1/3+" * 120 + "1/7", "**a" * 33_000, "**a** " * 16_000, "{" * 99_000, "x = " * 24_000,
    "A, " * 33_000, "\\text{" + "A, " * 300 + "A", "\\fbox{" * 14_000, "f'" * 40_000,
    "1_1" * 33_000], ids=lambda core: f"{core[:12]}-{len(core)}")
def test_the_worst_texts_we_could_think_of_are_quick(core):
    for text in (core, f"<answer>{core}</answer>", f"<think>{core}</think><answer>{core}"):
        quickly_graded(text)
    quick(lambda: math_task.plain(core[:1000]), core[:80])           # before a child is asked
    quick(lambda: math_task.objection("18", core), core[:80])


def test_nothing_the_model_wrote_is_executed(tmp_path):
    for module in (tasks, math_task, choice_task):
        tree = ast.parse(Path(module.__file__).read_text())
        names = {node.func.id for node in ast.walk(tree)
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert not names & {"eval", "exec", "compile", "__import__", "sympify", "parse_expr"}
    for task in EXAMPLES:
        bomb = f"__import__('os').system('touch {tmp_path}/executed')"
        assert not grade(task, rf"\boxed{{{bomb}}}").correct
    assert not list(tmp_path.iterdir())


# --- Generated data ---------------------------------------------------------------------------

@pytest.mark.parametrize("task, split, n, digest", [
    ("countdown", "train", 200, "14fd62bac7ae"), ("countdown", "test", 1000, "31c1fdbd50b8"),
    ("sudoku", "train", 50, "1508fcc202ea"), ("sudoku", "test", 200, "039319295610")])
def test_generated_problems_are_those_of_earlier_releases(task, split, n, digest):
    """So that earlier numbers stay comparable, on any machine and in any process."""
    data = tasks.load(task, split, seed=3 if split == "train" else 0)[:n]
    assert hashlib.md5(json.dumps(data).encode()).hexdigest()[:12] == digest


@pytest.mark.parametrize("task", ["countdown", "sudoku"])
def test_examples_are_a_sequence(task):
    data = tasks.load(task, "train", seed=3)
    assert len(data) == 100_000 and len(tasks.load(task, "test", size=7)) == 7
    assert data[0] != data[1] and data[0] != tasks.load(task, "train", seed=4)[0]
    assert data[2:5] == [data[i] for i in (2, 3, 4)] and data[-1] == data[99_999]
    with pytest.raises(IndexError):
        data[100_000]


@pytest.mark.parametrize("options", [{}, {"numbers": 2}, {"numbers": 4, "max_number": 10}])
def test_countdown_problems_are_in_range_and_train_is_disjoint_from_test(options):
    keys = {"train": set(), "test": set()}
    for split, seed in (("train", 0), ("train", 1), ("test", 0)):
        for example in tasks.load("countdown", split, seed=seed, **options)[:150]:
            nums, target = example["nums"], example["target"]
            assert len(nums) == options.get("numbers", 3) and 1 <= target <= 100
            assert all(1 <= n <= options.get("max_number", 100) for n in nums)
            keys[split].add((*sorted(nums), target))
            if len(nums) == 3:
                values = {value for order in permutations(nums) for _, value in trees(order)}
                assert target in values
    assert not keys["train"] & keys["test"]


@pytest.mark.parametrize("empties", [0, 8, 12])
def test_sudoku_puzzles_have_one_solution_and_splits_share_no_grid(empties):
    assert sorted(tasks.grids()) == sorted(solve("0" * 16)) and len(tasks.grids()) == 288
    grids = {split: set() for split in ("train", "test")}
    for split in grids:
        for example in tasks.load("sudoku", split, empties=empties)[:40]:
            assert example["puzzle"].count("0") == empties
            assert solve(example["puzzle"]) == [example["solution"]]
            grids[split].add(example["solution"])
    assert not grids["train"] & grids["test"]


@pytest.mark.parametrize("name, user", [
    ("countdown", "Numbers: 17 18 5\nTarget: 67"), ("gsm8k", "How many?"), ("math", "Why?"),
    ("sudoku", "Sudoku:\n1 0 0 2\n0 2 0 1\n0 0 0 3\n0 3 1 0"),
    ("hellaswag", "Where?\nA. here\nB. there")])
def test_prompts_have_the_rules_and_a_short_user_turn(name, user):
    system, turn = tasks.TASKS[name].prompt(EXAMPLES[name])
    assert system["role"] == "system" and turn == {"role": "user", "content": user}
    assert all(tag in system["content"] for tag in ("<think>", "</think>", "<answer>"))
    assert ("boxed" in system["content"]) == (name in ("gsm8k", "math"))


def test_worked_examples_of_the_prompts_are_right_and_no_test_problems():
    rules = tasks.TASKS["countdown"].prompt(EXAMPLES["countdown"])[0]["content"]
    pattern = r"Numbers: ([\d ]+) and Target: (\d+), write (<answer>.*</answer>)"
    nums, target, answer = re.search(pattern, rules).groups()
    example = {"nums": [int(n) for n in nums.split()], "target": int(target)}
    assert tasks.grade("countdown", answer, example).reward == 4
    assert not tasks.in_test(**example)
    rules = tasks.TASKS["sudoku"].prompt(EXAMPLES["sudoku"])[0]["content"]
    assert len(set(tasks.SUDOKU_EXAMPLES)) == 3 == rules.count("<answer>") - 1
    for puzzle, solution in tasks.SUDOKU_EXAMPLES:
        assert solve(puzzle) == [solution] and solution in tasks.grids()[58:]
        assert f"{tasks.sudoku_question(puzzle)}\n<answer>{solution}</answer>" in rules


def test_the_examples_of_the_docstrings_earn_4():
    for module in (tasks, choice_task, math_task):
        examples = re.findall(r"(\{\"\w+\": .*\})\s+(<\w+>.*</answer>)", module.__doc__)
        assert examples
        for problem, text in examples:
            example = ast.literal_eval(problem)
            (name,) = [name for name in EXAMPLES if EXAMPLES[name].keys() == example.keys()
                       and (name == "math") == (module is math_task)]
            assert tasks.grade(name, text, example).reward == 4


# --- Training never sees a test problem -------------------------------------------------------

def write(path, *lines):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def hub(monkeypatch):
    """Rows for the two splits of any data set: {"train": [..], "test": [..]}."""
    rows, real = {}, tasks.rows_of
    monkeypatch.setattr(tasks, "rows_of", lambda split, file, name: (
        real(split, file, name) if file else (rows[split], "the hub")))
    return rows


NUMBERS = [{"nums": [a, 7, 9], "target": a + 16} for a in range(1, 41)]
ROWS = {
    "countdown": NUMBERS, "countdown-3to4": NUMBERS,
    "sudoku": [{"Puzzle": "0" + grid[1:], "Solution": grid} for grid in sorted(tasks.grids())],
    "gsm8k": [{"question": f"How many is {n}?", "answer": f"#### {n}"} for n in range(40)],
    "math": [{"problem": f"What is ${n}$?", "level": "Level 1", "solution": rf"\boxed{{{n}}}"}
             for n in range(40)],
    "commonsense_qa": [{"question": f"Is it {n}?", "choices": {"text": ["yes", "no"]},
                        "answerKey": "A"} for n in range(40)],
    "hellaswag": [{"ctx": f"{n}.", "endings": ["a", "b"], "label": "1"} for n in range(40)]}
LEFT_OUT = "10 rows left out because they are test problems"


@pytest.mark.parametrize("train_from", ["hub", "file"])
@pytest.mark.parametrize("test_from", ["hub", "file"])
@pytest.mark.parametrize("task", ROWS)
def test_training_never_sees_a_test_problem(tmp_path, hub, task, train_from, test_from):
    """Rows 0-29 are for training, 20-39 for testing; both splits may be generated as well."""
    hub.update(train=ROWS[task][:30], test=ROWS[task][20:40])
    files = {split: write(tmp_path / f"{split}.jsonl", *hub[split]) for split in hub}
    test_file, train_file = (files[split] if origin == "file" else None
                             for split, origin in (("test", test_from), ("train", train_from)))
    test = tasks.load(task, "test", file=test_file)
    train = tasks.load(task, "train", file=train_file, held_out=test)
    known = {tasks.key(tasks.TASKS[task], example) for example in test}
    assert not [e for e in train[:300] if tasks.key(tasks.TASKS[task], e) in known]
    assert len(test) == 20 or not test_file         # nothing of a file is parted away
    if task not in ("countdown", "sudoku", "countdown-3to4"):
        assert len(train) == 20 and LEFT_OUT in train.source


def test_another_spacing_or_case_is_no_new_problem(tmp_path):
    test = write(tmp_path / "test.jsonl", {"question": "How  many\n", "answer": "1"})
    train = write(tmp_path / "train.jsonl", {"question": "how many", "answer": "1"},
                  {"question": "How many?", "answer": "1"})
    held_out = tasks.load("gsm8k", "test", file=test)
    kept = tasks.load("gsm8k", "train", file=train, held_out=held_out)
    assert [e["question"] for e in kept] == ["How many?"]


def test_another_order_of_choices_is_the_same_problem():
    key = tasks.TASKS["commonsense_qa"].key
    example = {"question": "Where?", "choices": ["here", "there"], "answer": "A"}
    turned = {"question": "where ?", "choices": ["There", "here"], "answer": "B"}
    assert key(example) == key(turned)
    assert key(example) != key(dict(turned, choices=["there", "nowhere"]))


@pytest.mark.parametrize("task", ROWS)
def test_the_same_problem_several_times_in_a_test_file_counts_once(tmp_path, task):
    rows = ROWS[task][:20]
    again = write(tmp_path / "t.jsonl", *rows, *rows[::-1], rows[3])
    test = tasks.load(task, "test", file=again)
    once = tasks.load(task, "test", file=write(tmp_path / "once.jsonl", *rows))
    assert list(test) == list(once) and len(test) == 20 and "repeat" not in once.source
    assert "21 rows left out because they repeat a problem" in test.source
    train = tasks.load(task, "train", file=write(tmp_path / "t.jsonl", *rows, *rows))
    assert len(train) == 40                                          # of training rows all stay


def test_another_order_or_another_spelling_of_its_gold_is_no_other_test_problem(tmp_path):
    for task, rows in (("gsm8k", [{"question": "q", "answer": a} for a in ("1,000", "1000")]),
                       ("countdown", [{"nums": n, "target": 5} for n in ([2, 3], [3, 2])])):
        assert len(tasks.load(task, "test", file=write(tmp_path / "t.jsonl", *rows))) == 1
    two = [{"Puzzle": puzzle, "Solution": SOLUTION} for puzzle in (PUZZLE, "0" + SOLUTION[1:])]
    assert len(tasks.load("sudoku", "test", file=write(tmp_path / "s.jsonl", *two))) == 2


def test_generated_problems_that_a_test_file_holds_are_drawn_again(tmp_path):
    options = {"seed": 1, "numbers": 2, "max_number": 9}
    plain = tasks.load("countdown", "train", **options)
    held_out = [{"nums": e["nums"][::-1], "target": e["target"]} for e in plain[:50]]
    test = tasks.load("countdown", "test", file=write(tmp_path / "t.jsonl", *held_out))
    train = tasks.load("countdown", "train", held_out=test, **options)
    key = tasks.TASKS["countdown"].key
    assert not [e for e in train[:300] if key(e) in map(key, held_out)]
    assert train[:300] == train[:300] and "no test problem" in train.source
    kept = [i for i in range(300) if key(plain[i]) not in map(key, held_out)]
    assert kept and all(train[i] == plain[i] for i in kept)          # the others are untouched
    test = tasks.load("sudoku", "test", file=write(tmp_path / "s.jsonl", *ROWS["sudoku"]))
    with pytest.raises(tasks.TaskError, match="no training problem"):
        tasks.load("sudoku", "train", held_out=test)


def test_without_held_out_the_hub_s_test_problems_are_left_out_all_the_same(tmp_path, hub):
    hub.update(train=ROWS["math"][:30], test=ROWS["math"][20:])
    train = tasks.load("math", "train")
    assert len(train) == 20 and LEFT_OUT in train.source
    train = tasks.load("math", "train", file=write(tmp_path / "t.jsonl", *hub["train"]))
    assert len(train) == 30 and "test problems not looked for" in train.source


def test_the_hub_s_one_split_of_3to4_is_parted_by_problem(hub):
    pool = [{"nums": [a, b, 7] + [9] * (a % 2), "target": a + b}
            for a in range(1, 30) for b in range(1, 20)]
    pool = [row for row in pool if row["nums"] == sorted(row["nums"])]       # each problem once
    hub.update(train=pool, test=pool)
    train, test = (list(tasks.load("countdown-3to4", split)) for split in ("train", "test"))
    assert sorted(map(str, train + test)) == sorted(str(r) for r in pool if len(r["nums"]) == 3)
    assert test and all(tasks.in_test(**e) for e in test)
    assert all(len(e["nums"]) == 4 for e in tasks.load("countdown-3to4", "train", numbers=4))


def test_math_trains_on_levels_1_to_4(tmp_path):
    levels = [("1", r"\boxed{1}, then \boxed{\frac{1}{2}}."), ("5", r"\boxed{5}"),
              ("?", r"\boxed{7}"), ("4", r"is $\boxed 4$."), ("2", "none"), ("3", r"\fbox{3}"),
              ("2", r"\boxed{\{2\}}")]
    file = write(tmp_path / "train.jsonl", *(
        {"problem": solution, "level": f"Level {level}", "solution": solution}
        for level, solution in levels))
    train = tasks.load("math", "train", file=file)
    assert [e["answer"] for e in train] == [r"\frac{1}{2}", "4", "3", r"\{2\}"]
    assert "3 rows left out" in train.source
    assert len(tasks.load("math", "train", file=file, max_level=5)) == 5
    zero = write(tmp_path / "zero.jsonl", {"question": "1 - 1", "answer": 0})
    assert list(tasks.load("math", "test", file=zero)) == [{"question": "1 - 1", "answer": "0"}]


# --- Files and the hub ------------------------------------------------------------------------

ZEROS = "00" + SOLUTION[2:6] + "0000" + SOLUTION[10:]


@pytest.mark.parametrize("task, name, lines, examples", [
    ("countdown", "t.jsonl", [{"input": "30,100,93", "output": "23"}, "",
                              {"nums": [4, 60, 13, 2], "target": 73}],
     [{"nums": [30, 100, 93], "target": 23}, {"nums": [4, 60, 13, 2], "target": 73}]),
    ("sudoku", "s.csv", ["\ufeffPuzzle,Solution", f"{ZEROS},{SOLUTION}"],
     [{"puzzle": ZEROS, "solution": SOLUTION}]),
    ("sudoku", "s.jsonl", [{"Puzzle": int(ZEROS), "Solution": int(SOLUTION)}],
     [{"puzzle": ZEROS, "solution": SOLUTION}]),
    ("gsm8k", "G.CSV", ["question,answer", "007,1"], [{"question": "007", "answer": "1"}]),
    ("gsm8k", "g.jsonl", [{"question": "a", "answer": 18}, {"question": "b", "answer": 27.0},
                          {"question": "c", "answer": "1 #### 1,000"}],
     [{"question": "a", "answer": "18"}, {"question": "b", "answer": "27"},
      {"question": "c", "answer": "1,000"}])])
def test_files_of_every_kind_are_read_by_datasets(tmp_path, task, name, lines, examples):
    file = write(tmp_path / name, *lines)
    data = tasks.load(task, "test", file=file)
    assert list(data) == examples and data.source == f"--test_file {file}"
    assert len(tasks.load(task, "test", file=file, size=1)) == 1
    datasets.Dataset.from_list(examples).to_parquet(tmp_path / "p.parquet")
    assert list(tasks.load(task, "test", file=tmp_path / "p.parquet")) == examples


@pytest.mark.parametrize("task, name, lines, where", [
    ("countdown", "b.jsonl", [*NUMBERS[:1], {"nums": ["1", "x", "3"], "target": 6}], 2),
    ("countdown", "b.jsonl", ['{"input": "1,2", "output": "3"}',
                              '{"input": "1,x", "output": "3"}'], 2),
    *[("countdown", "b.jsonl", [row], 1) for row in (
        {"nums": [1, 2.5], "target": 3}, {"nums": [], "target": 3}, {"nums": [1, 2]},
        {"nums": [1, -2], "target": 3}, {"nums": 7, "target": 3},
        {"nums": [1, None], "target": 3}, '{"nums": [1, ' + "9" * 5000 + '], "target": 3}',
        '{"nums": [1, 2], "target": "1e999999999"}')],
    ("countdown", "b.csv", ["input,output", '"1,2,3",6', '"1,2,3"'], 2),
    ("sudoku", "b.csv", ["Puzzle,Solution", f"{PUZZLE},{SOLUTION}",
                         f"9{PUZZLE[1:]},{SOLUTION}"], 2),
    ("sudoku", "b.csv", ["Puzzle,Solution", f"{PUZZLE},{SOLUTION[::-1]}"], 1),
    ("sudoku", "b.csv", ["a,b", "1,2"], 1),
    ("gsm8k", "b.jsonl", [*ROWS["gsm8k"][:1], {"question": "q", "answer": "three"}], 2),
    *[("gsm8k", "b.jsonl", [row], 1) for row in (
        {"question": "q"}, {"question": None, "answer": "3"}, {"question": "q", "answer": None},
        {"question": "q", "answer": "1e999999999"}, {"question": "q", "answer": ["3"]})],
    ("math", "b.jsonl", [{"problem": 3, "solution": r"\boxed{3}"}], 1),
    ("commonsense_qa", "b.jsonl", [{**ROWS["commonsense_qa"][0], "answerKey": "C"}], 1),
    ("hellaswag", "b.jsonl", [{"ctx": "c", "endings": ["a"], "label": "4"}], 1)])
def test_a_bad_row_is_named_by_file_and_row(tmp_path, task, name, lines, where):
    file = write(tmp_path / name, *lines)
    with pytest.raises(tasks.TaskError) as error:
        tasks.load(task, "train", file=file)
    message = str(error.value)
    assert f"--train_file {file}" in message and re.search(f"(row|line) {where}\\b", message)
    assert "\n" not in message


@pytest.mark.parametrize("name, content", [
    ("binary.csv", b"Puzzle,Solution\n\xff\xfe,1\n"), ("binary.jsonl", b"\xff\xfe{}\n"),
    ("mark.json", b'\xef\xbb\xbf[{"question": "q", "answer": 1}]'),    # an array as well
    ("empty.jsonl", b""), ("empty.csv", b""), ("notes.txt", b"hello"), ("bad.parquet", b"no"),
    ("array.json", b'[{"a": 1}]'), ("rows.jsonl", b"[1, 2]\n"), ("text.jsonl", b'"abc"\n'),
    ("broken.jsonl", b'{"a": 1}\n{\n'), ("deep.jsonl", b"[" * 100_000), ("no.jsonl", b"{}\n"),
    ("null.jsonl", b'null\n{"question": "q", "answer": "3"}\n'), ("nulls.jsonl", b"null\n" * 9),
    ("huge.jsonl", b'{"question": "q", "answer": 1e999999999}'), ("blank.jsonl", b"\n\n"),
    ("head.csv", b"Puzzle,Solution\n"), ("none.jsonl", None), (".", None)])
def test_files_that_cannot_be_read_are_one_sentence(tmp_path, capfd, name, content):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(tasks.TaskError) as error:
        tasks.load("gsm8k", "test", file=str(file))
    assert f"--test_file {file}" in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("row", ["null", "3", '"q"', "[1]", "true", " null "])
def test_a_row_that_is_no_object_is_named_by_file_and_line(tmp_path, row):
    for line, lines in ((1, [row, ROWS["gsm8k"][0]]), (3, [ROWS["gsm8k"][0], "", row])):
        file = write(tmp_path / "rows.jsonl", *lines)
        with pytest.raises(tasks.TaskError, match=f"_file {file} .*line {line}: it is no"):
            tasks.load("gsm8k", "test", file=file)


@pytest.mark.parametrize("answers", ["refuses", "is silent", "is looked up for ever"])
def test_an_unreachable_hub_is_one_sentence_and_asked_once(monkeypatch, answers):
    monkeypatch.setattr(tasks, "HUB_SECONDS", 0.5)
    task = replace(tasks.TASKS["gsm8k"], hub={"test": "nobody/none-such main test"})
    monkeypatch.setitem(tasks.TASKS, "gsm8k", task)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers == "is silent":
            server.listen()
        if answers == "is looked up for ever":
            monkeypatch.setattr(huggingface_hub, "get_session", threading.Event().wait)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        # The client's own retries, half a minute of them, are spared: it is told to be offline.
        asked, real = [], datasets.load_dataset
        monkeypatch.setattr(datasets, "load_dataset", lambda *names, **split: (
            asked.append(datasets.config.HF_HUB_OFFLINE), real(*names, **split)))
        with pytest.raises(tasks.TaskError) as error:
            tasks.load("gsm8k", "test")
    assert asked == [True] and "\n" not in str(error.value)
    assert "nobody/none-such" in str(error.value) and "--test_file" in str(error.value)
    assert not datasets.config.HF_HUB_OFFLINE                        # and the switch is back


def test_without_a_hub_the_cache_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(tasks, "hub_answers", lambda huggingface_hub: False)
    data = datasets.Dataset.from_list([{"question": "q", "answer": "#### 3"}])
    data.to_parquet(tmp_path / "p")
    datasets.load_dataset("parquet", data_files={"test": str(tmp_path / "p")})
    (made,) = tmp_path.glob("parquet/*/*/*/")
    cached = tmp_path / "openai___gsm8k/main/0.0.0/0123abcd"        # as a download leaves it
    cached.mkdir(parents=True)
    for file in made.iterdir():
        (cached / file.name.replace("parquet-", "gsm8k-")).write_bytes(file.read_bytes())
    info = json.loads((cached / "dataset_info.json").read_text())
    info.update(dataset_name="gsm8k", config_name="main")
    (cached / "dataset_info.json").write_text(json.dumps(info))
    assert list(tasks.load("gsm8k", "test")) == [{"question": "q", "answer": "3"}]
    with pytest.raises(tasks.TaskError, match="gsm8k-platinum .*give --test_file"):
        tasks.load("gsm8k-platinum", "test")


def test_the_hub_ids_are_those_of_the_paper():
    ids = {name: [task.hub[split] for split in ("train", "test")]
           for name, task in tasks.TASKS.items() if task.hub}
    assert ids["gsm8k"] == ["openai/gsm8k main train", "openai/gsm8k main test"]
    assert ids["gsm8k-platinum"][1] == "madrylab/gsm8k-platinum main test"
    assert ids["math"] == ["qwedsacf/competition_math train", "HuggingFaceH4/MATH-500 test"]


# --- Options, and a task of one's own ---------------------------------------------------------

@pytest.mark.parametrize("task, options, said", [
    ("countdown", {"numbers": 1}, ["--numbers 1", "takes 2 to 6"]),
    ("countdown", {"max_target": 0}, ["--max_target 0"]),
    ("sudoku", {"empties": 13}, ["--empties 13"]),
    ("countdown", {"empties": 3}, ["--empties", "--max_number"]),
    ("gsm8k", {"a": 3}, ["--a", "none"]),
    ("countdown", {"numbers": "3"}, ["--numbers '3'", "int"]),
    ("countdown", {"numbers": True}, []),
    ("math", {"max_level": 9}, ["--max_level 9", "1 to 5"]),
    ("chess", {}, ["--task chess", "gsm8k"]),
    ("countdown", {"numbers": 2, "max_number": 1, "max_target": 1}, [])])
def test_what_cannot_work_is_one_sentence_naming_the_flag(task, options, said):
    with pytest.raises(tasks.TaskError) as error:
        for split in ("train", "test"):
            tasks.load(task, split, **options)
    assert all(words in str(error.value) for words in said) and "\n" not in str(error.value)


def test_an_option_without_effect_on_a_file_is_said(tmp_path):
    file = write(tmp_path / "t.jsonl", *NUMBERS[:3])
    levels, said = write(tmp_path / "m.jsonl", *ROWS["math"]), " without effect on a file"
    for task, options, effect in (
            ("countdown", dict(file=file, max_number=50, division=False),
             f"--max_number and --division{said}"),
            ("countdown-3to4", dict(file=file, numbers=4), f"--numbers{said}"),
            ("countdown", dict(file=file, numbers=3), ""), ("countdown", dict(numbers=4), ""),
            ("math", dict(file=levels, max_level=2), "")):
        source = tasks.load(task, "train", **options).source
        assert source.endswith(effect) and (effect or said not in source)


def own_grader(text, example):
    return example["returned"]


FINE = tasks.graded(1.0, 1, "right", "18")


@pytest.mark.parametrize("returned", [
    None, 3.0, (4.0, True), {"reward": 4}, *(replace(FINE, reward=reward) for reward in (
        float("nan"), float("inf"), None, "4", [4.0], 4 + 0j))])
def test_what_is_no_grade_or_no_number_names_the_grader_and_the_problem(monkeypatch, returned):
    example = {"question": "How many\x1b?", "returned": returned}
    task = replace(tasks.TASKS["gsm8k"], grade=own_grader)
    for own in (task, replace(task, grade_batch=lambda texts, examples: [returned])):
        monkeypatch.setitem(tasks.TASKS, "gsm8k", own)
        with pytest.raises(tasks.TaskError) as error:
            tasks.grade("gsm8k", "18", example)
        grader = "<lambda>" if own.grade_batch else "own_grader"
        for word in (f"{grader} of task gsm8k returned", repr(returned), "problem", "How many"):
            assert word in str(error.value) and str(error.value).isprintable()
    monkeypatch.setitem(tasks.TASKS, "gsm8k", task)
    for reward in (0, 4.0, True, Fraction(1, 2)):
        example = {"returned": replace(FINE, reward=reward)}
        assert tasks.grade("gsm8k", "18", example).reward == reward
    with pytest.raises(KeyError, match="returned"):        # its own error is its own
        tasks.grade("gsm8k", "18", {})


@pytest.mark.parametrize("thing", [None, tasks.grade_gsm8k, tasks.Task, "gsm8k", {}])
def test_only_a_task_can_be_registered(thing):
    for register in (tasks.TASKS.__setitem__, lambda *item: tasks.TASKS.update([item])):
        with pytest.raises(tasks.TaskError, match=r"TASKS\['mine'\] .*must be a tasks.Task"):
            register("mine", thing)
    assert "mine" not in tasks.TASKS


def test_a_batch_grader_returns_a_grade_for_each_text(monkeypatch):
    for returned, count in (([], 0), ([FINE, FINE], 2), (iter(()), 0)):
        task = replace(tasks.TASKS["gsm8k"], grade_batch=lambda texts, examples: returned)
        monkeypatch.setitem(tasks.TASKS, "gsm8k", task)
        with pytest.raises(tasks.TaskError, match=f"gsm8k returned {count} grades for 1 texts"):
            tasks.grade_batch("gsm8k", ["18"], [EXAMPLES["gsm8k"]])
    grades = tasks.grade_batch("gsm8k-platinum", [RIGHT["gsm8k"], "7"], [EXAMPLES["gsm8k"]] * 2)
    assert [g.correct for g in grades] == [True, False]
