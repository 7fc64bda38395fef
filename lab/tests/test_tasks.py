"""Claims about tasks.py (and lab/rows.py, lab/math_judge.py): the checkers, the data, and what goes wrong with files.

The tables hold answers that fooled other checkers, or that other checkers refused though they were right.
"""
import ast
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction
from itertools import permutations, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import tasks  # noqa: E402
from lab import math_judge, rows, show_task  # noqa: E402

PUZZLE, SOLUTION = "1002020100030310", "1432324141232314"
SUDOKU = {"puzzle": PUZZLE, "solution": SOLUTION}


def tagged(answer):
    return f"<think>thoughts</think><answer>{answer}</answer>"


def grade(task, answer, example):
    return tasks.grade(task, tagged(answer), example)


def countdown(answer, nums, target):
    return grade("countdown", answer, {"nums": nums, "target": target})


# --- Which text is graded ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, answer, thought", [
    ("<think>a</think><answer>b</answer>", "b", True),
    ("<answer>first</answer> <answer>last</answer>", "last", False),
    ("<think>perhaps <answer>1</answer></think><answer>2</answer>", "2", True),
    ("<answer>2</answer><think>or <answer>1</answer></think>", "2", True),
    ("<answer>expression = target</answer> so <answer>2</answer>", "2", False),  # an echo of the template
    ("put it in <answer> tags: <answer>2</answer>", "2", False),
    ("<answer>2</answer> <answer>3", "2", False),
    ("<answer>a <think>b</think> c</answer>", None, True),
    ("<answer><think>x<answer>5</answer>", None, False),
    ("<think><answer>5</answer>", None, False),
    ("<think>a<think>b</think><answer>5</answer>", "5", True),
    ("<answer>5", None, False),
    ("5</answer>", None, False),
    ("</think></answer><answer>\n5\n</answer>", "\n5\n", False),
    ("<ANSWER>5</ANSWER>", None, False),
    ("", None, False),
])
def test_the_last_complete_answer_outside_think_counts(text, answer, thought):
    assert tasks.last_answer(text) == (answer, thought)


@pytest.mark.parametrize("task, example, right", [
    ("countdown", {"nums": [17, 18, 5], "target": 67}, "17 * 5 - 18 = 67"), ("sudoku", SUDOKU, SOLUTION),
    ("gsm8k", {"question": "", "answer": "18"}, r"\boxed{18}"), ("math", {"question": "", "answer": "18"}, r"\boxed{18}"),
    ("commonsense_qa", {"question": "", "choices": ["a", "b"], "answer": "B"}, "B")])
def test_nothing_outside_the_tag_earns_credit(task, example, right):
    for text in (right, f"<think>{right}</think>", f"<think><answer>{right}</answer>", f"<answer>{right}", right + "</answer>"):
        got = tasks.grade(task, text, example)
        assert not got.correct and got.reward <= 0.5, text
    assert grade(task, right, example).reward == 4 and grade(task, right, example).correct
    assert tasks.grade(task, f"<answer>wrong</answer>{tagged(right)}", example).correct
    assert not tasks.grade(task, f"{tagged(right)}<answer>wrong</answer>", example).correct


# --- Countdown --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nums, target, answer", [
    *[([4, 60, 13], 73, answer) for answer in (
        "4; 60 + 13 = 73", "4, 60 + 13 = 73", "not using 4: 60 + 13 = 73", "x4 60+13 = 73", r"\text{4} 60 + 13 = 73",
        r"4 \boxed{60+13} = 73", "4 60 + 13 = 73", "60 + 13 = 73", "60 + 13 + 0 * 4 = 73", "60 + 13 # 4", "[4] 60 + 13",
        "4 \\ 60 + 13", "60 + 13 = 73 (4)", "60 + 13 + (4 = 73", "(4) 60 + 13", "60 + 13 = 4 = 73", "4 = 60 + 13")],
    ([30, 100, 23], 23, "$30 100$ $23$ = 23"), ([30, 100, 23], 23, "30 100 23 = 23"),
    *[([17, 18, 5], 67, answer) for answer in (
        "17 * 5 - 18 = 999", "17 * 5 - 18 = 67 = 5", "17 * 5 - 18 == 67", "17 * 5 - 18 =", "= 67", "67", "",
        "67 = 17 * 5 - 18", "17 * 5 - 18 = 67.0", "17 * 5 - 18 = 60 + 7", "17 * 5 - 18 = +67", "17 * 5 - 18 = 67!",
        "17 x 5 - 18", "17 * 5 - 18 equals 67", "17 * 5 - 18 = $67$", r"\boxed{17 * 5 - 18} = 67",
        r"\boxed{\boxed{17 * 5 - 18}}", r"\frac{17 * 5}{1} - 18", "$17 * 5 - 18", "17 * 5 - 18 = 6 7", "1 7 * 5 - 1 8",
        "１７ * 5 - 18", "17 * 5 - 18\0", "5 * 17 - 18 - 18", "17 * 5 - 18 + 0", "+17 * 5 - 18", "(17) (5) - 18 18",
        "17 *5 - 18,", "{17 * 5} - 18", "[17 * 5] - 18", "17 ** 5 - 18", "17 * 5 -", "17 * 5 - 18)", "(17 * 5 - 18",
        "() 17 * 5 - 18", "17_0 * 5", "0x11 * 5 - 18", "1e1", "17 * (5) 18", "17 5 18")],
    *[([2, 3, 4], 12, answer) for answer in ("2^3 + 4 = 12", "2**3+4", "2^{3} + 4", "2³ + 4")],
    *[([7, 2, 1], 4, answer) for answer in ("7 // 2 + 1", "7 / / 2 + 1", "7 % 2 + 1", "7 / 2 + 1")],
    ([1, 5, 2], 3, "1.5 * 2 = 3"), ([1, 5, 2], 3, "1,5 * 2 = 3"),
    *[([5, 3, 2], 10, answer) for answer in ("5--3+2", "5 - -3 + 2", "5 - (-3) + 2", "5++3+2", "5 - (0 - 3) + 2")],
    ([3, 8], 5, "-3 + 8"), ([3, 8], 24, "3 * +8"), ([3, 3, 4], 10, "3 + 3 + 4 + 4 - 4"), ([3, 0], 3, "3 / 0"),
    ([4, 4, 8], 1, "8 / (4 - 4)"), ([4, 4, 8], 1, "8 / (4 - 4) = 1"), ([7, 9, 4], 35, "(9 - 4)7 = 35"),
    ([93, 30, 100], 23, "93**30**100"), ([93, 30, 100], 23, "93^30^100 = 23"),
])
def test_countdown_refuses(nums, target, answer):
    assert not countdown(answer, nums, target).correct


@pytest.mark.parametrize("nums, target, answer", [
    *[([7, 9, 4], 35, answer) for answer in ("7(9 - 4) = 35", "7 (9-4)", "(7)(9 - 4)", r"7\left(9 - 4\right) = 35")],
    *[([17, 18, 5], 67, answer) for answer in (
        "17 × 5 - 18 = 67", r"17 \times 5 - 18 = 67", r"\boxed{17 * 5 - 18 = 67}", "17 * 5\n- 18\n= 67", "17 * 5 - 18",
        r"17\cdot5-18", "17·5−18=67", "$17 * 5 - 18 = 67$", r"$$17 \times 5 - 18$$", r"$\boxed{17*5-18=67}$",
        r"\boxed{$17*5-18$}", "((17)) * (5) - (18)", "(((17 * 5 - 18)))", "\t17 *\r\n5 -18 ", "017 * 5 - 18")],
    ([8, 4, 2], 4, "8 ÷ 4 * 2"), ([8, 4, 2], 4, r"8 \div 4 \cdot 2"), ([8, 4, 2], 1, "8 / (4 * 2)"), ([9, 2, 3], 4, "9 - 2 - 3"),
    ([8, 3, 3], 8, "8 / (3 / 3)"), ([3, 3, 7, 7], 24, "7 * (3 + 3 / 7)"), ([5, 8], -3, "5 - 8 = -3"), ([8, 4, 2], 4, "8/4(2)"),
])
def test_countdown_accepts(nums, target, answer):
    assert countdown(answer, nums, target) == tasks.Grade(4.0, True, 1.0, f"value {target}",
                                                         countdown(answer, nums, target).parsed)


def test_countdown_says_why_an_answer_is_wrong():
    nums = [17, 18, 5]
    for answer, format, reason in (
            ("17 * 5 = 67", 1.0, "number 18 unused"), ("17 * 5 - 18 - 5", 1.0, "number 5 not given, or used too often"),
            ("17 * 5 + 18", 1.0, "value 103"), ("17 / 5 + 18", 1.0, "value 107/5"),
            ("17 * 5 - 18 = 999", 1.0, "right side 999 is not the target"), ("5 / (17 - 17)", 1.0, "number 18 unused"),
            ("17 * 5 -", 0.5, "not an expression of integers, + - * / ( )"),
            ("1 = 2 = 3", 0.5, "neither an expression nor expression = number")):
        got = countdown(answer, nums, 67)
        assert (got.reward, got.correct, got.format, got.reason) == (format, False, format, reason)
    assert countdown("4 / (4 - 4)", [4, 4, 4], 1).reason == "division by zero"
    assert tasks.grade("countdown", "17 * 5 - 18", {"nums": nums, "target": 67}).reason == "no complete <answer>"


def trees(items):
    """Every binary tree over the items in every order, as (fully parenthesised text, exact value or None)."""
    if len(items) == 1:
        yield str(items[0]), Fraction(items[0])
    for order in set(permutations(items)):
        for cut in range(1, len(items)):
            # the halves keep the order drawn here, so that each tree comes once
            for (x, a), (y, b) in product(ordered_trees(order[:cut]), ordered_trees(order[cut:])):
                yield from joined(x, a, y, b)


def ordered_trees(items):
    if len(items) == 1:
        yield str(items[0]), Fraction(items[0])
    for cut in range(1, len(items)):
        for (x, a), (y, b) in product(ordered_trees(items[:cut]), ordered_trees(items[cut:])):
            yield from joined(x, a, y, b)


def joined(x, a, y, b):
    for op in "+-*/":
        value = None
        if a is not None and b is not None and (op != "/" or b != 0):
            value = {"+": a + b, "-": a - b, "*": a * b}[op] if op != "/" else a / b
        yield f"({x}{op}{y})", value


def python_value(text):
    """Python's own idea of an expression over + - * / and parentheses; ValueError outside it, None for x / 0."""
    text = re.sub(r"([0-9)]) ?\(", r"\1*(", text)  # the implicit product

    def value(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value)
        if not isinstance(node, ast.BinOp):
            raise ValueError
        a, b = value(node.left), value(node.right)
        if a is None or b is None:
            return None
        if isinstance(node.op, ast.Div):
            return a / b if b else None
        return {ast.Add: lambda: a + b, ast.Sub: lambda: a - b, ast.Mult: lambda: a * b}[type(node.op)]()
    try:
        return value(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError, MemoryError) as error:
        raise ValueError from error


@pytest.mark.parametrize("nums", [(3, 5, 7), (6, 6, 2), (1, 10, 4)])
def test_countdown_agrees_with_brute_force_over_all_expressions_of_three_numbers(nums):
    checked, by_target = 0, {}
    for text, value in trees(nums):
        target = value if value is not None and value.denominator == 1 else 1
        assert countdown(text, list(nums), int(target)).correct == (value == target), text
        assert not countdown(text, list(nums), int(target) + 1).correct
        if value == target:
            by_target.setdefault(int(target), []).append(text)
        checked += 1
    assert checked == 2 * 16 * len(set(permutations(nums)))
    for target in range(-50, 400):
        found = tasks.countdown_solutions(nums, target)
        assert bool(found) == (target in by_target) and found == sorted(set(found))
        spelled = {minimal(text) for text in by_target.get(target, [])}
        assert spelled == {text.replace(" ", "") for text in found}
        assert all(re.fullmatch(r"(?:[0-9]+|[-+*/()])(?: (?:[0-9]+|[-+*/()]))*", text) for text in found)


def minimal(text):
    """Take off pairs of parentheses, outermost first, where Python sees the same value whatever the numbers are."""
    def generic(text):
        primes = iter((101, 10_007, 1_000_003))
        return python_value(re.sub("[0-9]+", lambda number: str(next(primes)), text))
    for start in range(len(text)):
        if text[start:start + 1] == "(":
            depth = 0
            for end in range(start, len(text)):
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                if depth == 0:
                    break
            without = text[:start] + text[start + 1:end] + text[end + 1:]
            if generic(without) == generic(text):
                return minimal(without)
    return text


@pytest.mark.parametrize("length", range(1, 7))
def test_the_grammar_is_python_s_without_signs(length):
    for tokens in product(("2", "12", "-", "/", "(", ")"), repeat=length):
        text = " ".join(tokens)
        try:
            value = python_value(text)
        except ValueError:
            assert tasks.to_postfix(text) is None, text
        else:
            assert tasks.evaluate(tasks.to_postfix(text)) == value, text


@st.composite
def right_countdown(draw):
    """A problem and a right answer as a list of tokens."""
    numbers = draw(st.integers(2, 4))
    example = tasks.load("countdown", "train", seed=draw(st.integers(0, 10**9)), numbers=numbers)[draw(st.integers(0, 999))]
    return example, draw(st.sampled_from(tasks.countdown_solutions(**example))).split()


@settings(max_examples=150, deadline=None)
@given(right_countdown(), st.randoms(use_true_random=False))
def test_a_right_expression_stays_right_when_it_is_rewritten(problem, rng):
    example, tokens = problem
    spellings = {"*": ["*", "×", "·", r"\times ", r"\cdot "], "/": ["/", "÷", r"\div "], "-": ["-", "−"],
                 "(": ["(", r"\left("], ")": [")", r"\right)"], "+": ["+"]}
    text = ""
    for token, following in zip(tokens, [*tokens[1:], ""]):
        ways = spellings.get(token, [token, f"({token})", f"( ({token}))"])
        text += rng.choice(["", " ", "\n", " \t "]) + rng.choice([*ways, ""] if (token, following) == ("*", "(") else ways)
    text = rng.choice(["{}", "({})", "(({}))"]).format(text)
    text += rng.choice(["", " = {}", "={}"]).format(example["target"])
    text = rng.choice(["{}", "${}$", "$${}$$", r"\boxed{{{}}}", r"$\boxed{{{}}}$", " {}\n"]).format(text)
    assert countdown(text, **example).reward == 4, text


@settings(max_examples=150, deadline=None)
@given(right_countdown(), st.data())
def test_changing_one_number_makes_a_right_answer_wrong(problem, data):
    example, tokens = problem
    place = data.draw(st.sampled_from([i for i, token in enumerate(tokens) if token.isdigit()]))
    other = data.draw(st.integers(0, 200).filter(lambda n: n != int(tokens[place])))
    changed = " ".join([*tokens[:place], str(other), *tokens[place + 1:]])
    assert not countdown(changed, **example).correct
    assert not countdown(" ".join(tokens) + f" = {example['target'] + 1}", **example).correct


# --- Sudoku -----------------------------------------------------------------------------------------------------------


def units(grid):
    """Rows, columns and boxes of a 4x4 grid, written out."""
    return [[grid[i] for i in cells] for cells in (
        (0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15), (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14),
        (3, 7, 11, 15), (0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15))]


def solve(puzzle):
    """All solutions of a puzzle by trying."""
    if "0" not in puzzle:
        return [puzzle] if all(sorted(unit) == list("1234") for unit in units(puzzle)) else []
    if any(len([d for d in unit if d != "0"]) != len({d for d in unit if d != "0"}) for unit in units(puzzle)):
        return []
    return [s for digit in "1234" for s in solve(puzzle.replace("0", digit, 1))]


@pytest.mark.parametrize("answer, format", [
    ("4434344441242444", 1.0), (SOLUTION + "9999", 0.5), (SOLUTION[:15], 0.5), (SOLUTION.replace("1", "１"), 0.5),
    (SOLUTION[:15] + "0", 0.5), ("", 0.5), (SOLUTION + "1", 0.5), (f"Grid: {SOLUTION}", 0.5), ("-".join(SOLUTION), 0.5)])
def test_sudoku_gives_no_cells_for(answer, format):
    got = grade("sudoku", answer, SUDOKU)
    assert (got.reward, got.correct, got.format, got.metrics) == (format, False, format, {"cell_accuracy": 0.0})


@pytest.mark.parametrize("text", [SOLUTION, f"<think><answer>{SOLUTION}</answer>", f"<think>{SOLUTION}", f"<answer>{SOLUTION}"])
def test_a_sudoku_grid_without_its_tags_is_worth_nothing(text):
    assert tasks.grade("sudoku", text, SUDOKU).reward == 0


@pytest.mark.parametrize("answer", [SOLUTION, " ".join(SOLUTION), "\n".join(SOLUTION[i:i + 4] for i in (0, 4, 8, 12)),
                                    f"\n{SOLUTION}\t", "\n".join(" ".join(SOLUTION[i:i + 4]) for i in (0, 4, 8, 12))])
def test_sudoku_accepts_any_white_space(answer):
    got = grade("sudoku", answer, SUDOKU)
    assert (got.reward, got.correct, got.metrics) == (4.0, True, {"cell_accuracy": 1.0})


def test_sudoku_pays_for_each_right_empty_cell():
    empty = [i for i in range(16) if PUZZLE[i] == "0"]
    for wrong in range(1, len(empty) + 1):
        grid = list(SOLUTION)
        for i in empty[:wrong]:
            grid[i] = str(int(grid[i]) % 4 + 1)
        got, share = grade("sudoku", "".join(grid), SUDOKU), (len(empty) - wrong) / len(empty)
        assert not got.correct and got.reward == 1 + 3 * share and got.metrics == {"cell_accuracy": share}


def test_any_valid_grid_is_right_and_a_full_puzzle_divides_by_nothing():
    several = "1200340000000000"
    grids = [grid for grid in solve(several)]
    assert len(grids) > 1
    for grid in grids:
        assert grade("sudoku", grid, {"puzzle": several, "solution": grids[0]}).reward == 4
    full = {"puzzle": SOLUTION, "solution": SOLUTION}
    assert grade("sudoku", SOLUTION, full).reward == 4
    assert grade("sudoku", SOLUTION[::-1], full).reward == 1
    broken = {"puzzle": "1" * 16, "solution": "1" * 16}  # not from our readers, which refuse it
    assert not grade("sudoku", "1" * 16, broken).correct
    assert not grade("sudoku", "1" * 16, {"puzzle": "0" * 16, "solution": "1" * 16}).correct


def test_one_digit_in_every_empty_cell_scores_a_quarter():
    data = tasks.load("sudoku", "test")
    shares = [grade("sudoku", data[i]["puzzle"].replace("0", d), data[i]).metrics["cell_accuracy"]
              for i in range(200) for d in "1234"]
    assert sum(shares) / len(shares) == pytest.approx(0.25)


# --- GSM8K ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gold, answer", [pair for group in [[("18", a) for a in (
    "18.75", "-18", "18/7", "18, 19", "18^2", "1800", "0.18", "9+9", "18 or 17", "18=17", "17=18", "18 19", "x = 18", "1 8",
    "18 dollars per day", "18 thousand", "18k", "18 dozen", "18!", "18e0", "18-0", "18*1", "--18", "eighteen", "", "1,8",
    "18,", "(18)", "18 + 0", r"\sqrt{324}", r"\frac{36}{0}", r"\frac{36}{2}1", "18 1/2", "18/", "0x12", "١٨", "about 18",
    "36/2/1", "18..", r"9 \times 2", "18 17 dollars", r"18 \text{or} 17", "nan", "inf", "$", ".", r"-\boxed{18}",
    r"17 \boxed{18}", r"\boxed{17}\boxed{18}", r"9 + \boxed{18}", r"\boxed{18", r"\boxed{18}^2", r"\sqrt\boxed{18}", "9" * 5000)],
    [("1000", a) for a in ("1,00", "1.000", "10,00", "1 000", "1, 000")], [("1819", "18,19")]] for pair in group])
def test_gsm8k_refuses(gold, answer):
    assert not grade("gsm8k", answer, {"question": "", "answer": gold}).correct
    if "boxed" not in answer:
        assert not grade("gsm8k", rf"\boxed{{{answer}}}", {"question": "", "answer": gold}).correct


@pytest.mark.parametrize("gold, answer", [
    *[("18", answer) for answer in (
        "18", "18.", "$18", "18 dollars", r"\frac{36}{2}", "18.0", "18.00", "+18", " 18\n", "18%", "18 %", r"18\%", "$18.00",
        "18 dollars.", "018", "36/2", "36 / 2", r"\dfrac{36}{2}", r"\$18", "$18$", "18km", r"18 \text{ dollars}")],
    *[("1000", answer) for answer in ("1,000", "1{,}000", r"\$1,000", "1000", "$1,000.00", "1,000 dollars", "2,000/2")],
    ("-18", "-18"), ("-18", "−18"), ("-18", "-$18"), ("-18", "$-18"), ("-18", r"-\frac{36}{2}"), ("0.5", "1/2"), ("0.5", ".5"),
    ("1,234,567", "1234567"), ("Reasoning 3 x 6 = <<3*6=18>>18 #### 18", "18"), ("0", "-0"), ("12.5", r"\frac{25}{2}"),
])
def test_gsm8k_accepts(gold, answer):
    example = {"question": "", "answer": gold}
    assert grade("gsm8k", answer, example).reward == 4
    assert grade("gsm8k", rf"\boxed{{{answer}}}", example).correct
    assert grade("gsm8k", rf"The answer is \boxed{{{answer}}}.", example).correct
    assert tasks.grade("gsm8k", f"<answer>{answer}</answer>", example).reward == 3.5  # no think tag


@settings(max_examples=200, deadline=None)
@given(st.fractions(-10**6, 10**6, max_denominator=1000), st.fractions(-10**6, 10**6, max_denominator=1000))
def test_gsm8k_compares_exactly(a, b):
    example = {"question": "", "answer": str(a)}
    assert grade("gsm8k", str(a), example).correct and grade("gsm8k", str(b), example).correct == (a == b)
    assert grade("gsm8k", f"{int(a):,}", {"question": "", "answer": str(int(a))}).correct
    assert not grade("gsm8k", str(a + Fraction(1, 10**9)), example).correct


# --- MATH -------------------------------------------------------------------------------------------------------------


def math(gold, answer):
    return tasks.grade("math", tagged(rf"\boxed{{{answer}}}"), {"question": "", "answer": gold})


@pytest.mark.parametrize("gold, answer", [
    ("(3,4)", "3,4"), ("3,4", "(3,4)"), ("(3,4)", "(4,3)"), ("(3,4)", "[3,4]"), ("(3,4)", r"\{3,4\}"), ("(3,4]", "(3,4)"),
    (r"5\sqrt{2}", "7.0710678"), (r"5\sqrt{2}", "7.07106781186547524400"), (r"\frac{1}{3}", "0.333333"), (r"\pi", "3.14159265"),
    ("3", "5=3"), ("3", "3=5"), ("3", r"3 \approx 4"), ("3", r"3 \text{ or } 4"), ("3", "3,4"), ("3", r"\pm 3"), ("7", "4 3"),
    ("7", r"4 \quad 3"), ("3", "3_4"), ("3", r"3 \ldots"), ("3", "-3"), ("3", "3$ or $4"), ("3", ""), ("3", "}{3"), ("x", "y"),
    (r"\text{even}", r"\text{odd}"), ("x^2+1", "x^2-1"), ("10", "1"), ("3", r"3 \equiv 4"), ("12", "1 2"), ("34", "3$4"), ("3", "3}{4"), ("1", "1}"), ("3", r"\boxed{"),
    ("5", "(" * 200 + "5" + ")" * 200)])
def test_math_refuses(gold, answer):
    for text in (tagged(rf"\boxed{{{answer}}}"), tagged(answer)):
        got = tasks.grade("math", text, {"question": "", "answer": gold})
        assert not got.correct and got.metrics == {"string_match": 0.0}
    assert math_judge.objection("5", "5" * 1001) == "empty or too long"


@pytest.mark.parametrize("gold, answer, string_match", [
    (r"5\sqrt{2}", r"5\sqrt{2}", 1), (r"5\sqrt{2}", r"\sqrt{50}", 0), (r"\frac{1}{2}", r"\dfrac{1}{2}", 1), ("0.5", r"\frac12", 0),
    (r"\frac{1}{2}", "0.5", 0), ("(3,4)", "(3, 4)", 1), (r"\left(3,4\right)", "(3,4)", 1), ("3,4", "4,3", 0), ("12", "x=12", 0),
    ("x^2+2x+1", "(x+1)^2", 0), (r"\text{Evelyn}", r"\text{Evelyn}", 1), (r"120^\circ", "120", 1), ("1000", "1,000", 0),
    (r"10,\!000", "10000", 0), (r"\text{(B)}", "B", 0), ("5", "5.", 1), ("x=3", "3", 0), (r"[2,5)", r"\left[2, 5\right)", 1),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", 1), ("(3, 6/4)", r"(3,\frac{3}{2})", 0),
    (r"Hence \boxed{1} and then $\boxed{\frac{3}{4}}$.", "3/4", 0)])
def test_math_accepts(gold, answer, string_match):
    got = math(gold, answer)
    assert got.correct and got.reward == 4 and got.metrics == {"string_match": string_match}


ADVERSARIAL = ["9^{9^{9^{9}}}", "99999999!", r"\frac{1}{" * 25 + "2" + "}" * 25, "9^{9^9}", "(x+y+z)^{500}"]


def test_a_batch_of_64_adversarial_boxes_takes_one_deadline_and_says_so(caplog):
    assert math("18", "9+9").correct  # the children have started
    boxes = [box.replace("9", str(9 - i // len(ADVERSARIAL) % 3)) + f"+{i}" for i, box in enumerate(ADVERSARIAL * 13)][:64]
    start = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="tasks"):
        grades = tasks.grade_batch("math", [tagged(rf"\boxed{{{box}}}") for box in boxes], [{"answer": "18"}] * 64)
    assert time.monotonic() - start < math_judge.BATCH_SECONDS + 1
    assert not any(g.correct for g in grades) and "counted wrong" in caplog.text
    assert {g.reason for g in grades} <= {"not judged in time", "not equal"}
    assert math("18", "9+9").correct  # and the next batch is served


def test_honest_answers_beside_a_bad_one_are_judged():
    bad = [f"9^{{9^{{9^{{{9 - i}}}}}}}" for i in range(6)]  # more than there are children
    answers = [*bad, *[f"{i}+{18 - i}" for i in range(30)], "99999999!"]
    grades = tasks.grade_batch("math", [tagged(rf"\boxed{{{a}}}") for a in answers], [{"answer": "18"}] * len(answers))
    assert [g.correct for g in grades] == [*[False] * 6, *[True] * 30, False]
    assert [math("18", a).correct for a in answers[6:9]] == [True] * 3
    start = time.monotonic()
    assert not math("18", bad[0]).correct and time.monotonic() - start < math_judge.ANSWER_SECONDS + 1


def test_the_pool_survives_killed_children():
    math("18", "9+9")
    for when in ("idle", "busy"):
        children = math_judge.pool.children()
        if when == "busy":
            threading.Timer(0.05, lambda: [os.kill(child.pid, signal.SIGKILL) for child in children]).start()
        else:
            for child in children:
                os.kill(child.pid, signal.SIGKILL)
        answers = [f"{i}+{18 - i}" for i in range(40)]
        grades = tasks.grade_batch("math", [tagged(rf"\boxed{{{a}}}") for a in answers], [{"answer": "18"}] * 40)
        assert all(g.correct for g in grades), when
    assert len(math_judge.pool.children()) == min(4, os.cpu_count())
    assert all(os.getsid(child.pid) == child.pid for child in math_judge.pool.children())  # Ctrl-C does not reach them


def test_math_works_beside_torch_off_the_main_thread_in_a_script_without_a_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys, threading
sys.path.insert(0, {str(ROOT)!r})
import torch
torch.ones(512, 512) @ torch.ones(512, 512)
import tasks
from lab import math_judge
out = []
thread = threading.Thread(target=lambda: out.append(tasks.grade("math", r"<answer>\\boxed{{9+9}}</answer>", {{"answer": "18"}})))
thread.start(); thread.join()
children = [child.pid for child in math_judge.pool.children()]
libraries = "".join(open(f"/proc/{{pid}}/maps").read() for pid in children) if sys.platform == "linux" else ""
print("started", out[0].correct, "libtorch" in libraries, *children)
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    started, correct, torch_there, *children = done.stdout.split()
    assert (done.returncode, done.stdout.count("started"), correct, torch_there) == (0, 1, "True", "False"), done.stderr
    for pid in children:  # they end with the script
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_a_missing_math_verify_is_an_error_and_not_a_wrong_answer(monkeypatch, capfd):
    pool = math_judge.Pool()
    monkeypatch.setattr(math_judge, "pool", pool)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(tasks.TaskError, match="math-verify"):
        math("18", "9+9")
    assert pool.children() == []


# --- Any text at all --------------------------------------------------------------------------------------------------

EXAMPLES = {"countdown": {"nums": [17, 18, 5], "target": 67}, "sudoku": SUDOKU, "gsm8k": {"question": "", "answer": "18"},
            "commonsense_qa": {"question": "", "choices": ["a", "b"], "answer": "B"}}
PIECES = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "{", "\\", "$", "(", ")", "17", "18",
                          "5", " ", "\n", "*", "-", "=", "/", ",", ".", "\\left(", "\\frac{", "\\text{", "\ud800", "\0", "１", "a"])


def quick(task, text):
    """Grade three times at most, as the machine may be busy: the best must be under 50 ms."""
    times, grades = [], []
    while len(times) < 3 and (not times or min(times) >= 0.05):
        start = time.process_time()
        grades.append(tasks.grade(task, text, EXAMPLES[task]))
        times.append(time.process_time() - start)
    assert min(times) < 0.05, (task, text[:80], times)
    assert all(g == grades[0] for g in grades)
    return grades[0]


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES | st.text(max_size=20), max_size=30), st.lists(PIECES, max_size=4), st.lists(PIECES, max_size=10))
def test_any_text_up_to_100_kb_gets_a_grade_in_50_ms(before, repeated, after):
    repeated = "".join(repeated)
    text = "".join(before) + repeated * (100_000 // max(1, len(repeated))) + "".join(after)
    for wrapped in (text[:100_000], f"<think>a</think><answer>{text[:99_900]}</answer>"):
        for task in EXAMPLES:
            got = quick(task, wrapped)
            assert isinstance(got, tasks.Grade) and 0 <= got.format <= 1 and got.format <= got.reward <= 4
            assert got.correct == (got.reward == got.format + 3) and isinstance(got.reason, str)
            assert len(got.parsed) <= 200


@pytest.mark.parametrize("core", [
    "(" * 50_000 + "1" + ")" * 50_000, "(" * 100_000, "1+" * 49_000 + "1", "9" * 100_000, "17*5-18=" + "9" * 99_000,
    " " * 99_000 + "1", "1 " * 50_000, "1(1" * 30_000, "\\boxed{" * 14_000, "\\boxed{" + "{" * 99_000, "\\boxed{" + "{}" * 49_000 + "}",
    "\\boxed" + " " * 99_000, "\\boxed" + "a" * 99_000, "\\left" + " " * 99_000 + "(", "1" + ",000" * 24_000, "$" * 99_000,
    "=" * 99_000, "18" + " " * 99_000 + "dollars", "18" + " a" * 40_000, "<answer>" * 12_000, "<think><answer></think></answer>" * 3000,
    "<" * 99_000, "</answer>" * 11_000, "93" + "**30" * 20_000, "\\" * 99_000, "7" * 4301, "\\frac{" + "1" * 5000 + "}{2}",
    "17*5-18=" + "0" * 5000 + "67", "0" * 9000 + "17*5-18"], ids=lambda core: f"{core[:12]}-{len(core)}")
def test_the_worst_texts_we_could_think_of_are_quick(core):
    for task in EXAMPLES:
        for text in (core, f"<answer>{core}</answer>", f"<think>{core}</think><answer>{core}</answer>"):
            quick(task, text)
    for gold in (core[:1000], "18"):  # what MATH does before it asks a child
        start = time.process_time()
        content = tasks.final_answer(core)
        reason = content is not None and (math_judge.plain(content), math_judge.objection(gold, content))
        assert time.process_time() - start < 0.1, reason


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=r"0123456789abxyz+-*/^_(),.= \{}$", max_size=60))
def test_math_gives_a_grade_to_any_formula_and_accepts_the_gold_itself(tex):
    tasks.math_gold(tex)
    math_judge.objection("18", tex)
    balanced = re.sub(r"[\\{}]", "", tex).strip()
    if balanced:
        assert math(balanced, balanced).correct


# --- Generated data ---------------------------------------------------------------------------------------------------


def test_generated_problems_are_a_function_of_seed_index_and_options():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import tasks, random; random.seed(5);"
            "print([tasks.load(t, s, seed=3)[i] for t in ('countdown', 'sudoku') for s in ('train', 'test') for i in (7, 0, 999)])")
    outputs = {subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True,
                              env={**os.environ, "PYTHONHASHSEED": hash_seed}).stdout for hash_seed in ("1", "2")}
    random.seed(1)
    state = random.getstate()
    here = [tasks.load(t, s, seed=3)[i] for t in ("countdown", "sudoku") for s in ("train", "test") for i in (7, 0, 999)]
    assert outputs == {f"{here}\n"} and random.getstate() == state
    for task in ("countdown", "sudoku"):
        data = tasks.load(task, "train", seed=3)
        assert len(data) == 100_000 and len(tasks.load(task, "test")) == 1_000 and len(tasks.load(task, "test", size=7)) == 7
        assert data[0] != data[1] and data[0] != tasks.load(task, "train", seed=4)[0] and data[-1] == data[99_999]
        assert data[2:5] == [data[i] for i in (2, 3, 4)] and data.source == "generated, seed 3"
        with pytest.raises(IndexError):
            data[100_000]
        assert len(list(tasks.load(task, "test", size=5))) == 5


@pytest.mark.parametrize("options", [{}, {"numbers": 2}, {"numbers": 4, "max_number": 10, "max_target": 1000},
                                     {"max_number": 9, "max_target": 30}, {"numbers": 6}])
def test_countdown_problems_are_solvable_and_train_is_disjoint_from_test_for_any_seeds(options):
    keys = {}
    for split, seeds in (("train", (0, 1)), ("test", (0, 2))):
        for seed in seeds:
            for example in tasks.load("countdown", split, seed=seed, **options)[:150]:
                nums, target = example["nums"], example["target"]
                assert len(nums) == options.get("numbers", 3) and 1 <= target <= options.get("max_target", 100)
                assert all(1 <= n <= options.get("max_number", 100) for n in nums) and type(target) is int
                keys.setdefault(split, set()).add((*sorted(nums), target))
                if len(nums) <= 4:
                    text = next(tasks.expressions([(n, 1, str(n), 0) for n in nums], target))
                    assert countdown(text, nums, target).correct and python_value(text) == target
    assert not keys["train"] & keys["test"]
    plain = [tasks.in_test([a, b, c], t) for a in range(1, 12) for b in range(a, 12) for c in range(b, 12) for t in range(1, 40)]
    assert 0.11 < sum(plain) / len(plain) < 0.14


@pytest.mark.parametrize("empties", [0, 1, 8, 10, 12])
def test_sudoku_puzzles_have_one_solution_and_splits_share_no_grid(empties):
    solutions = {}
    for split in ("train", "test"):
        for seed in (0, 1):
            for example in tasks.load("sudoku", split, seed=seed, empties=empties)[:40]:
                assert example["puzzle"].count("0") == empties and solve(example["puzzle"]) == [example["solution"]]
                solutions.setdefault(split, set()).add(example["solution"])
    assert not solutions["train"] & solutions["test"]


def test_there_are_288_grids_and_the_splits_part_them():
    assert len(set(tasks.grids())) == 288 and sorted(tasks.grids()) == sorted(solve("0" * 16))
    train, test = (set(tasks.split_grids(split)) for split in ("train", "test"))
    assert len(test) == 58 and not train & test and train | test == set(tasks.grids())


def test_generating_is_fast_enough_to_pretrain_on():
    for task, limit in (("countdown", 100e-6), ("sudoku", 1e-3)):
        data, best = tasks.load(task, "train", seed=9), 1.0
        for start_index in (0, 1000, 2000):
            start = time.process_time()
            data[start_index:start_index + 500]
            best = min(best, (time.process_time() - start) / 500)
        assert best < limit


@pytest.mark.parametrize("task, options, words", [
    ("countdown", {"numbers": 1}, ["--numbers 1", "2 to 6"]), ("countdown", {"max_target": 0}, ["--max-target 0"]),
    ("countdown", {"empties": 3}, ["--empties", "countdown", "--max-number"]), ("countdown", {"numbers": "3"}, ["--numbers '3'", "int"]),
    ("countdown", {"numbers": True}, ["--numbers"]), ("sudoku", {"empties": 17}, ["--empties 17", "0 to 12"]),
    ("sudoku", {"empties": 13}, ["--empties 13"]), ("sudoku", {"empties": -1}, ["--empties -1"]), ("gsm8k", {"empties": 3}, ["--empties", "none"]),
    ("math", {"max_level": 9}, ["--max-level 9", "1 to 5"]), ("chess", {}, ["--task chess", "countdown", "gsm8k"])])
def test_what_cannot_work_is_one_sentence_naming_the_flag(task, options, words):
    with pytest.raises(tasks.TaskError) as error:
        tasks.load(task, "train", **options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_options_that_leave_no_problem_are_refused_when_loading():
    splits = []
    for split in ("train", "test"):  # 1 + 1 = 2, 1 * 1 = 1 and 1 / 1 = 1: two problems in all
        try:
            splits.append(len(tasks.load("countdown", split, numbers=2, max_number=1)))
        except tasks.TaskError as error:
            assert "--max-number 1" in str(error) and split in str(error)
    assert len(splits) < 2
    with pytest.raises(tasks.TaskError, match="split"):
        tasks.load("countdown", "validation")
    for call in (lambda: tasks.grade("chess", "", {}), lambda: tasks.grade_batch("chess", [], [])):
        with pytest.raises(tasks.TaskError, match="chess"):
            call()


def test_prompts_are_a_system_turn_with_the_rules_and_a_short_user_turn():
    for name, example, user in (
            ("countdown", {"nums": [3, 5, 7], "target": 36}, "Numbers: 3 5 7\nTarget: 36"),
            ("sudoku", SUDOKU, "Sudoku:\n1 0 0 2\n0 2 0 1\n0 0 0 3\n0 3 1 0"),
            ("gsm8k", {"question": "How many?", "answer": "3"}, "How many?"), ("math", {"question": "Why?", "answer": "3"}, "Why?"),
            ("commonsense_qa", {"question": "Where?", "choices": ["here", "there"], "answer": "B"}, "Where?\nA. here\nB. there")):
        system, turn = tasks.TASKS[name].prompt(example)
        assert system["role"] == "system" and turn == {"role": "user", "content": user}
        assert all(tag in system["content"] for tag in ("<think>", "</think>", "<answer>", "</answer>"))
        assert str(example.get("target", "no")) not in system["content"] and ("boxed" in system["content"]) == (name in ("gsm8k", "math"))


# --- Files, folders and the hub ---------------------------------------------------------------------------------------


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def test_countdown_files_in_the_published_format(tmp_path):
    file = write(tmp_path / "t.jsonl", {"input": "30,100,93", "output": "23"}, "", {"nums": [4, 60, 13, 2], "target": 73})
    data = tasks.load("countdown", "test", file=file)
    assert list(data) == [{"nums": [30, 100, 93], "target": 23}, {"nums": [4, 60, 13, 2], "target": 73}]
    assert data.source == f"--test-file {file}" and len(tasks.load("countdown", "test", file=file, size=1)) == 1
    assert countdown("100 - 93 + 30 = 37", [30, 100, 93], 37).correct
    csv = write(tmp_path / "t.csv", "input,output", '"30,100,93",23')
    assert list(tasks.load("countdown", "train", file=csv)) == [{"nums": [30, 100, 93], "target": 23}]


def test_sudoku_csv_keeps_leading_zeros(tmp_path):
    puzzle, solution = "00" + SOLUTION[2:6] + "0" * 4 + SOLUTION[10:], SOLUTION
    file = write(tmp_path / "s.csv", "\ufeffPuzzle,Solution", f"{puzzle},{solution}")
    assert list(tasks.load("sudoku", "test", file=file)) == [{"puzzle": puzzle, "solution": solution}]
    as_numbers = write(tmp_path / "s.jsonl", {"Puzzle": int(puzzle), "Solution": int(solution)})
    assert tasks.load("sudoku", "test", file=as_numbers)[0]["puzzle"] == puzzle


@pytest.mark.parametrize("task, name, lines, line", [
    ("countdown", "b.jsonl", [{"input": "1,2,3", "output": "6"}, {"input": "1,x,3", "output": "6"}], 2),
    ("countdown", "b.jsonl", [{"nums": [1, 2.5], "target": 3}], 1), ("countdown", "b.jsonl", [{"nums": [], "target": 3}], 1),
    ("countdown", "b.jsonl", [{"nums": [1, -2], "target": 3}], 1), ("countdown", "b.jsonl", [{"nums": [1, 2]}], 1),
    ("countdown", "b.jsonl", [{"nums": 7, "target": 3}], 1), ("countdown", "b.jsonl", [{"nums": [1, None], "target": 3}], 1),
    ("countdown", "b.jsonl", [{"nums": [1, 2], "target": float("inf")}], 1), ("countdown", "b.jsonl", ["", "", "{"], 3),
    ("countdown", "b.jsonl", ["[1, 2]"], 1), ("countdown", "b.jsonl", ["[" * 100_000], 1), ("countdown", "b.jsonl", ["{}"], 1),
    ("countdown", "b.jsonl", ['{"nums": [1, ' + "9" * 5000 + '], "target": 3}'], 1),
    ("countdown", "b.csv", ["input,output", '"1,2,3",6', '"1,2,3"'], 3),
    ("sudoku", "b.csv", ["Puzzle,Solution", f"{PUZZLE},{SOLUTION}", f"{PUZZLE[1:]},{SOLUTION}"], 3),
    ("sudoku", "b.csv", ["Puzzle,Solution", f"{PUZZLE},{SOLUTION[::-1]}"], 2), ("sudoku", "b.csv", ["Puzzle,Solution", f"{PUZZLE},{'1' * 16}"], 2),
    ("sudoku", "b.csv", ["a,b", "1,2"], 2), ("sudoku", "b.jsonl", [{"puzzle": None, "solution": SOLUTION}], 1),
    ("gsm8k", "b.jsonl", [{"question": "q", "answer": "#### 3"}, {"question": "q", "answer": "#### three"}], 2),
    ("gsm8k", "b.jsonl", [{"question": "q"}], 1), ("gsm8k", "b.jsonl", [{"question": None, "answer": "3"}], 1),
    ("math", "b.jsonl", [{"problem": 3, "solution": r"\boxed{3}"}], 1), ("math", "b.jsonl", [{"solution": r"\boxed{3}"}], 1),
    ("commonsense_qa", "b.jsonl", [{"question": "q", "choices": {"text": ["a"]}, "answerKey": "B"}], 1),
    ("commonsense_qa", "b.jsonl", [{"question": "q", "choices": ["a"], "answerKey": "A"}], 1)])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, task, name, lines, line):
    file = write(tmp_path / name, *lines)
    with pytest.raises(tasks.TaskError) as error:
        tasks.load(task, "train", file=file)
    message = str(error.value)
    assert f"--train-file {file}" in message and f"line {line} " in message.replace(":", " ") and "\n" not in message


def test_files_that_cannot_be_read_are_one_sentence(tmp_path):
    (tmp_path / "binary.csv").write_bytes(b"Puzzle,Solution\n\xff\xfe,1\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe{}\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "folder").mkdir()
    for name in ("none.jsonl", "binary.csv", "binary.jsonl", "empty.jsonl", "notes.txt", "folder"):
        with pytest.raises(tasks.TaskError) as error:
            tasks.load("sudoku", "test", file=str(tmp_path / name))
        assert f"--test-file {tmp_path / name}" in str(error.value) and "\n" not in str(error.value)


GSM8K = [{"question": f"How many is {n}?", "answer": f"It is {n}.\n#### {n:,}"} for n in (3, 1000, -5)]
MATH = [{"problem": f"Problem {i}", "level": level, "type": "Algebra", "solution": solution} for i, (level, solution) in enumerate(
    [("Level 1", r"so \boxed{1}, then \boxed{\frac{1}{2}}."), ("Level 5", r"\boxed{5}"), ("Level ?", r"\boxed{7}"),
     ("Level 4", r"is $\boxed 4$."), ("Level 2", "no box"), ("Level 3", r"\fbox{3}"), ("Level 2", r"\boxed{\{2\}}")])]
MATH_500 = [{"problem": "Problem  6 ", "solution": r"\boxed{2}", "answer": "2", "subject": "Algebra", "level": 5, "unique_id": "a"}]
QA = [{"id": "1", "question": "Where?", "question_concept": "c", "choices": {"label": ["A", "B"], "text": ["here", "there"]},
       "answerKey": "B"}]


def test_hub_layouts_as_jsonl_saved_folder_and_copied_folder(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    expected = [{"question": f"How many is {n}?", "answer": f"{n:,}"} for n in (3, 1000, -5)]
    file = write(tmp_path / "gsm8k.jsonl", *GSM8K)
    assert list(tasks.load("gsm8k", "test", file=file)) == expected
    data = datasets.Dataset.from_list(GSM8K)
    data.save_to_disk(str(tmp_path / "one"))  # a single split, whatever its name
    assert list(tasks.load("gsm8k", "test", file=str(tmp_path / "one"))) == expected
    datasets.DatasetDict(train=data.select([0]), test=data.select([1, 2])).save_to_disk(str(tmp_path / "both"))
    assert list(tasks.load("gsm8k", "train", file=str(tmp_path / "both"))) == expected[:1]
    assert list(tasks.load("gsm8k", "test", file=str(tmp_path / "both"))) == expected[1:]
    datasets.DatasetDict(train=data).save_to_disk(str(tmp_path / "only"))  # the only split is the one that is meant
    assert list(tasks.load("gsm8k", "test", file=str(tmp_path / "only"))) == expected
    copied = tmp_path / "copied" / "main"  # as huggingface_hub's snapshot_download leaves it
    copied.mkdir(parents=True)
    data.select([0]).to_parquet(str(copied / "train-00000-of-00001.parquet"))
    data.select([1]).to_parquet(str(copied / "test-00000-of-00001.parquet"))
    (tmp_path / "copied" / "socratic").mkdir()  # another configuration
    data.select([2]).to_parquet(str(tmp_path / "copied" / "socratic" / "test-00000-of-00001.parquet"))
    loaded = tasks.load("gsm8k", "test", file=str(tmp_path / "copied"))
    assert list(loaded) == expected[1:2] and loaded.source == f"--test-file {tmp_path / 'copied'}"
    qa = datasets.Dataset.from_list(QA)
    datasets.DatasetDict(train=qa, validation=qa, test=qa).save_to_disk(str(tmp_path / "qa"))
    assert list(tasks.load("commonsense_qa", "test", file=str(tmp_path / "qa"))) == [
        {"question": "Where?", "choices": ["here", "there"], "answer": "B"}]
    datasets.DatasetDict(a=qa, b=qa).save_to_disk(str(tmp_path / "ab"))
    with pytest.raises(tasks.TaskError, match="no split validation.*only a, b"):
        tasks.load("commonsense_qa", "test", file=str(tmp_path / "ab"))


def test_math_trains_on_levels_1_to_4_without_the_test_problems(tmp_path, monkeypatch):
    file = write(tmp_path / "train.jsonl", *MATH)
    train = tasks.load("math", "train", file=file)
    assert [e["answer"] for e in train] == [r"\frac{1}{2}", "4", "3", r"\{2\}"]
    assert "3 rows left out" in train.source and "test problems not looked for" in train.source
    assert len(tasks.load("math", "train", file=file, max_level=5)) == 5
    test_file = write(tmp_path / "test.jsonl", *MATH_500)
    test = tasks.load("math", "test", file=test_file)
    assert list(test) == [{"question": "Problem  6", "answer": "2"}]
    without = tasks.load("math", "train", file=file, held_out=test)
    assert [e["answer"] for e in without] == [r"\frac{1}{2}", "4", "3"] and "not looked for" not in without.source
    hub = {"qwedsacf/competition_math": MATH, "HuggingFaceH4/MATH-500": MATH_500}
    monkeypatch.setattr(tasks, "read_hub", lambda split, where: [(f"row {i}", row) for i, row in enumerate(hub[where[0]], 1)])
    assert [e["answer"] for e in tasks.load("math", "train")] == [r"\frac{1}{2}", "4", "3"]
    assert tasks.load("math", "train").source == "qwedsacf/competition_math train, 4 rows left out"
    assert tasks.load("math", "test").source == "HuggingFaceH4/MATH-500 test"


def test_countdown_rows_of_the_hub_are_chosen_by_count_and_parted_as_the_generated_ones(monkeypatch):
    pool = [{"nums": [a, b, 7][: 2 + (a % 3 > 0)] + [9] * (a % 2), "target": a + b} for a in range(1, 40) for b in range(1, 20)]
    monkeypatch.setattr(tasks, "read_hub", lambda split, where: [(f"row {i}", row) for i, row in enumerate(pool, 1)])
    train, test = (list(tasks.load("countdown-3to4", split)) for split in ("train", "test"))
    assert sorted(map(str, train + test)) == sorted(str(row) for row in pool if len(row["nums"]) == 3)
    assert test and all(tasks.in_test(**e) for e in test) and not any(tasks.in_test(**e) for e in train)
    assert all(len(e["nums"]) == 4 for e in tasks.load("countdown-3to4", "train", numbers=4))


def test_the_hub_ids_are_those_of_the_paper():
    ids = {name: {split: " ".join(filter(None, hub)) for split, hub in task.hub.items()} for name, task in tasks.TASKS.items()}
    assert ids["gsm8k"] == {"train": "openai/gsm8k main train", "test": "openai/gsm8k main test"}
    assert ids["gsm8k-platinum"]["test"] == "madrylab/gsm8k-platinum main test"
    assert ids["math"] == {"train": "qwedsacf/competition_math train", "test": "HuggingFaceH4/MATH-500 test"}


@pytest.mark.parametrize("hub", ["refuses", "is silent", "is looked up for ever"])
def test_an_unreachable_hub_is_one_sentence_within_seconds(monkeypatch, hub):
    huggingface_hub, datasets = pytest.importorskip("huggingface_hub"), pytest.importorskip("datasets")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if hub == "is silent":
            server.listen()
        if hub == "is looked up for ever":
            monkeypatch.setattr(huggingface_hub, "get_session", lambda: time.sleep(30))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setitem(tasks.TASKS, "gsm8k", replace(tasks.TASKS["gsm8k"], hub={"test": ("nobody/none-such", "main", "test")}))
        start = time.monotonic()
        with pytest.raises(tasks.TaskError) as error:
            tasks.load("gsm8k", "test")
    assert time.monotonic() - start < rows.HUB_SECONDS + 3
    assert all(word in str(error.value) for word in ("nobody/none-such", "--test-file", "saved by datasets"))
    assert "\n" not in str(error.value) and not datasets.config.HF_HUB_OFFLINE  # and the switch is back


# --- Seeing a task, and adding one ------------------------------------------------------------------------------------


def test_every_task_shows_problems_prompts_and_grades(monkeypatch, capsys, tmp_path):
    def unreachable(split, hub):
        raise tasks.TaskError("no hub in this test")
    monkeypatch.setattr(tasks, "read_hub", unreachable)
    for name in tasks.TASKS:
        monkeypatch.setattr(sys, "argv", ["tasks.py", name, "--n", "2"])
        show_task.main()
        shown = capsys.readouterr().out
        problems = 2 if tasks.TASKS[name].make else 1
        assert shown.count("[system]") == shown.count("[user]") == shown.count("correct=True") == problems
        assert shown.count("reward=4.0") == shown.count("correct=False") == problems, shown
    for arguments, words in ((["chess"], "chess"), (["countdown", "--empties", "3"], "--empties"), (["gsm8k", "--train-file", "none.csv"], "none.csv")):
        monkeypatch.setattr(sys, "argv", ["tasks.py", *arguments])
        with pytest.raises(SystemExit, match=words):
            show_task.main()
    file = write(tmp_path / "x.jsonl", {"input": "30,100,93", "output": "37"})
    done = subprocess.run([sys.executable, "tasks.py", "countdown", "--test-file", file], cwd=ROOT, capture_output=True, text=True)
    assert "Numbers: 30 100 93" in done.stdout and "correct=True" in done.stdout and done.returncode == 0


def test_the_examples_of_the_docstring_earn_what_it_says():
    for grader, (answers, example) in show_task.SAMPLES.items():
        right, wrong = (grader(tagged(answer), example) for answer in answers(**example))
        assert right.reward == 4 and right.correct and not wrong.correct and wrong.reward < 4
        for value in example.values():
            assert str(value).replace("'", '"').replace("\\", "") in tasks.__doc__.replace("\\", "")


def test_a_task_of_your_own_is_registered_from_outside(tmp_path, monkeypatch):
    def prompt(example):
        return tasks.chat("Reverse the word.", "the reversed word", example["word"])

    def grade(text, example):
        answer, thought = tasks.last_answer(text)
        return tasks.graded(float(answer is not None), (answer or "").strip() == example["word"][::-1], "compared", answer or "")

    def read(row, split, options):
        return {"word": row["word"]} if len(row["word"]) >= options["shortest"] else None
    monkeypatch.setitem(tasks.TASKS, "reverse", tasks.Task("reverse", prompt, grade, read, options={"shortest": 2}))
    data = tasks.load("reverse", "train", file=write(tmp_path / "words.jsonl", {"word": "abc"}, {"word": "x"}))
    assert list(data) == [{"word": "abc"}]
    assert tasks.grade("reverse", tagged("cba"), data[0]).reward == 4 and not tasks.grade("reverse", tagged("abc"), data[0]).correct
    assert [g.correct for g in tasks.grade_batch("reverse", [tagged("cba"), "cba"], [data[0]] * 2)] == [True, False]
    with pytest.raises(tasks.TaskError, match="--test-file"):
        tasks.load("reverse", "test")


@pytest.mark.parametrize("answer, correct", [("B", True), ("(B)", True), ("B.", True), (" B\n", True), ("A", False), ("b", False),
                                             ("A or B", False), ("there", False), ("BB", False), ("", False), ("B. there", False)])
def test_multiple_choice_takes_one_letter(answer, correct):
    example = {"question": "Where?", "choices": ["here", "there"], "answer": "B"}
    assert grade("commonsense_qa", answer, example).correct == correct


def test_nothing_the_model_wrote_is_executed():
    for file in ("tasks.py", "lab/math_judge.py", "lab/rows.py"):
        names = {node.func.id for node in ast.walk(ast.parse((ROOT / file).read_text()))
                 if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        assert not names & {"eval", "exec", "compile", "__import__", "sympify", "parse_expr"}
    bomb = "__import__('os').system('touch /tmp/executed_by_a_grader')"
    for task, example in {**EXAMPLES, "math": {"answer": "18"}}.items():
        assert not tasks.grade(task, tagged(rf"\boxed{{{bomb}}}"), example).correct
    assert not Path("/tmp/executed_by_a_grader").exists()
