r"""MATH, a task of one's own: `python agrpo.py --task lab/math_task.py --preset llada`.

    {"question": "Simplify $\\sqrt{50}$.", "answer": "5\\sqrt{2}"}
    <think>25 x 2</think><answer>\boxed{5\sqrt{2}}</answer>

Are two formulas equal? math-verify reads LaTeX, sympy computes, and what they forgive and a
grader must not is decided here: lists, brackets, equations, bases, numbers that agree to 15
digits only. Whatever cannot be decided exactly is unequal.

sympy never ends on \boxed{9^{9^{9^{9}}}}, and math-verify's own timeout works in the main
thread only. So a child process computes, with a limit of processor time for each answer. It is
started by exec (a fork of a process with torch's threads can hang), it is this file run as a
script, and it ends when its input does, so it never outlives its parent. POSIX only.
"""
import atexit
import contextlib
import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
import threading
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tasks

ANSWER_SECONDS = 2      # of processor time for one answer, whatever else the machine does
SILENCE = 60            # seconds of the clock after which a child that says nothing is given up

# --- From LaTeX to pieces: what needs no algebra ----------------------------------------------

# Of this a parser reads a part only ("3 \approx 4" as 3): not in an answer unless in the gold
HALF_READ = re.compile(r"\\approx|\\equiv|\\[lc]?dots|\.\.\.|"
                       r"(?<!frac)(?<!frac )[0-9](?:\s|\\q?quad|~|'|\")+[0-9]")
NAME = r"\\?[A-Za-z]+(?:_\w|_\{\w+\})?(?:\([A-Za-z]\))?"
NAMES = re.compile(rf"{NAME}|\({NAME}(?:,{NAME})+\)")
BASE = re.compile(r"([0-9A-Fa-f]+)_\{?([0-9]+)\}?")
TEXT = r"\\text\{([^{}]*)\}"
JOINED = re.compile(r",|\\text\{,? ?(?:or|and),? ?\}| (?:or|and) ")
ORDER = re.compile(r"\b(?:ascending|descending|increasing order|decreasing order|in order"
                   r"|ordered|(?:least|smallest|lowest|greatest|largest|highest) to)\b",
                   re.IGNORECASE)


def plain(tex):
    """A formula without layout: dollars, spacing, \\left, degrees, percent, a full stop."""
    for symbol, command in {"−": "-", "≤": r"\le ", "≥": r"\ge ", "∞": r"\infty "}.items():
        tex = tex.replace(symbol, command)
    tex = re.sub(r",\s*\\!\s*(?=[0-9]{3})|\{,\}(?=[0-9]{3})", "", tex)      # 10,\!000
    tex = re.sub(r"\\[()\[\]](?!.*\\\\)|\\?\$|\\?%", " ", tex)
    tex = re.sub(r"(\\\\)|\\[,;: ]|~", lambda space: space[1] or " ", tex)    # not \\\\
    tex = re.sub(r"\\(?:left|right|displaystyle|big|Big)(?![A-Za-z])", "", tex)
    tex = re.sub(r"\\!|\^\{?\\circ\}?", "", tex)
    tex = re.sub(r"\\[dt]frac", r"\\frac", tex)
    tex = re.sub(r"\\(?:mbox|textrm|textbf|mathrm|textit)(?![A-Za-z])\s*", r"\\text", tex)
    tex = tex.replace("<=", r"\le ").replace(">=", r"\ge ").strip().removesuffix(".").strip()
    tex = re.sub(r"\\(?:leq|leqslant)(?![A-Za-z])", r"\\le ", tex)
    tex = re.sub(r"\\(?:geq|geqslant)(?![A-Za-z])", r"\\ge ", tex)
    tex = re.sub(r"\\lt(?![A-Za-z])", "<", re.sub(r"\\gt(?![A-Za-z])", ">", tex))
    # "1 2" is not 12, "a or b" not aorb; all other white space goes
    tex = re.sub(r"\s+", " ", tex)
    return re.sub(r"(?<![0-9A-Za-z,}]) | (?![0-9A-Za-z])", "", tex)


def without_units(tex, gold):
    r"""5\text{ cm}^2 and, for a gold without letters, 5 cm -> 5. But 5m is a product."""
    unit = re.search(rf"(?<=[0-9}}A-Za-z)]) ?{TEXT}(?:\^\{{?[23]\}}?)?$", tex)
    if unit is None and not re.search("[A-Za-z]", re.sub(rf"{TEXT}|\\[A-Za-z]+", "", gold)):
        unit = re.search(r"(?<=[0-9}]) ?([A-Za-z]{2,}(?: [A-Za-z]+){0,3})"
                         r"(?:\^\{?[23]\}?)?$", tex)
    if unit is None or tasks.changes_value(unit[1]):
        return tex
    return tex[:unit.start()]


def words(tex):
    """The letters of \\text{(B)} or of Evelyn; "" for a formula, as p-q is."""
    bare = re.sub(TEXT, r"\1", tex).strip("() .")
    between = "[ '-]+" if r"\text" in tex else " "
    spelled = f"[A-Za-z]+(?:{between}[A-Za-z]+)*"
    return bare.casefold() if re.fullmatch(spelled, bare) else ""


def split(tex):
    """At commas, "or" and "and" outside all brackets. 32,348 is one number."""
    if re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", tex):
        return [tex.replace(",", "")]
    depth = list(accumulate((c in "([{") - (c in ")]}") for c in tex))
    pieces, start = [], 0
    for joint in JOINED.finditer(tex):
        if depth[joint.start()] == 0:
            pieces.append(tex[start:joint.start()].strip())
            start = joint.end()
    pieces.append(tex[start:].strip())
    return [piece for piece in pieces if piece]


def listed(tex):
    r"""\{1 \pm \sqrt5, -2\} -> three formulas; most answers are one."""
    if tex.startswith(r"\{") and tex.endswith(r"\}"):
        tex = tex[2:-2]
    pieces = []
    for piece in split(tex):
        if piece.count(r"\pm") == 1:
            pieces += [piece.replace(r"\pm", "+"), piece.replace(r"\pm", "-")]
        else:
            pieces.append(piece)
    return pieces


def objection(gold, answer):
    """Why `answer` is wrong whatever algebra says, or "". Linear in a text of at most 1,000."""
    if not answer or len(answer) > 1000:
        return "empty or too long"
    depth = list(accumulate((c in "([{") - (c in ")]}") for c in answer))
    if min(depth) < 0 or depth[-1] or max(depth) > 30:
        return "brackets unbalanced or nested too deep"    # the parser needs 3 s for 200
    if re.search(r"[^\s$]\s*(?<!\\)\$\s*[^\s$.]", answer) or \
            HALF_READ.search(plain(answer)) and not HALF_READ.search(plain(gold)):
        return "more than one formula"
    return ""


# --- Equality, in the child -------------------------------------------------------------------

def parse(tex):
    """One sympy object. LaTeX only: math-verify's other extractor hands the text to an eval."""
    import math_verify
    import sympy
    from latex2sympy2_extended import NormalizationConfig
    how = math_verify.LatexExtractionConfig(
        boxed_match_priority=0, normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"))
    parsed = math_verify.parse(rf"\boxed{{{tex}}}", [how], fallback_mode="no_fallback",
                               parsing_timeout=None)[0]
    if parsed.has(sympy.Float):    # a decimal is exactly what it says
        parsed = parsed.replace(lambda part: isinstance(part, sympy.Float),
                                lambda part: sympy.Rational(str(part)))
    return parsed.subs(sympy.Symbol("i"), sympy.I) if isinstance(parsed, sympy.Expr) else parsed


def zero(difference):
    """Is it 0? Numbers that agree to 50 digits only are not equal: decided exactly, or no."""
    import sympy
    if difference == 0:
        return True
    if not difference.free_symbols and abs(difference.evalf(50)) > sympy.Float("1e-30", 50):
        return False
    return sympy.simplify(difference) == 0


def same_value(gold, answer):
    """Two formulas without list, bracket or equation."""
    import math_verify
    import sympy
    a, b = parse(gold), parse(answer)
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(zero(x - y) for x, y in zip(a, b))
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return zero(a - b)
    return type(a) is type(b) and math_verify.verify([a], [b], timeout_seconds=None)


def as_set(tex):
    """An inequality, an interval or a union of both, as a sympy set; None for anything else."""
    import sympy
    whole = sympy.EmptySet
    for piece in [part for piece in split(tex) for part in piece.split(r"\cup")]:
        ends = split(piece[1:-1]) if piece[:1] in "([" and piece[-1:] in ")]" else []
        if re.search(r"<|>|\\[lg]e(?![A-Za-z])", piece):
            relation = parse(piece)
            if len(relation.free_symbols) != 1:
                return None
            whole |= relation.as_set()
        elif len(ends) == 2:
            open_ends = piece[0] == "(", piece[-1] == ")"
            whole |= sympy.Interval(*map(parse, ends), *open_ends)
        else:
            return None
    return whole


def same_equation(gold, answer):
    """The same sides, or the same line: left - right agree up to a constant factor."""
    import sympy
    (a, b), (c, d) = gold, answer
    if equal(a, c) and equal(b, d):
        return True
    left, right = parse(a) - parse(b), parse(c) - parse(d)
    factor = sympy.simplify(left / right)
    return bool(left.free_symbols) and factor.is_number and factor.is_finite and factor != 0


def equal(gold, answer, ordered=False):
    """Both already plain. Recursion is as deep as brackets are nested, 30 at most."""
    if gold == answer:
        return True
    if words(gold) and (len(words(gold)) > 1 or r"\text" in gold):
        return words(gold) == words(answer)
    gold = re.sub(rf"^{NAME} ?\\in(?![A-Za-z])", "", gold).strip()
    answer = re.sub(rf"^{NAME} ?\\in(?![A-Za-z])", "", answer).strip()
    gold, answer = without_units(gold, gold), without_units(answer, gold)
    answer = re.sub(rf"^{TEXT} ?(?=[0-9\\(\[])", "", answer)    # \text{The answer is } 9

    # Inequalities and unions of intervals
    if any(re.search(r"<|>|\\[lg]e(?![A-Za-z])|\\cup", tex) for tex in (gold, answer)):
        name, equals, value = answer.partition("=")
        if equals and "=" not in gold + value and NAMES.fullmatch(name):
            answer = value
        a, b = as_set(gold), as_set(answer)
        return a == b if a is not None and b is not None else same_value(gold, answer)

    # Lists: 4,7 in any order, unless the question asks for one
    golds, answers = listed(gold), listed(answer)
    if len(golds) != len(answers):
        return False
    if len(golds) > 1:
        names = {tex.split("=")[0] for tex in answers if "=" in tex}
        if "=" not in gold and names:                       # x = 4, x = 7, or x = 4, 7
            if len(names) > 1:
                return False
            answers = [tex.split("=")[-1] for tex in answers]
        if ordered:
            return all(equal(a, b) for a, b in zip(golds, answers))
        for a in golds:
            match = next((b for b in answers if equal(a, b)), None)
            if match is None:
                return False
            answers.remove(match)
        return True
    gold, answer = golds[0], answers[0]

    # Equations: an equation is no number; a name in front of a value is only a name
    if "=" in gold:
        sides = gold.split("="), answer.split("=")
        return [len(s) for s in sides] == [2, 2] and same_equation(*sides)
    *before, answer = answer.split("=")
    if not all(NAMES.fullmatch(side) or equal(side, answer) for side in before):
        return False

    # Another base is another number; a point, an interval: the same brackets, the same order
    if BASE.fullmatch(gold) or BASE.fullmatch(answer):
        a, b = BASE.fullmatch(gold), BASE.fullmatch(answer)
        return bool(a and b) and a.groups() == b.groups()
    ends = [tex[:1] + tex[-1:] for tex in (gold, answer)]
    inside = [split(tex[1:-1]) if end in ("()", "[]", "(]", "[)") else [tex]
              for tex, end in zip((gold, answer), ends)]
    if any(len(pieces) > 1 for pieces in inside):
        return (ends[0] == ends[1] and len(inside[0]) == len(inside[1])
                and all(equal(a, b) for a, b in zip(*inside)))
    return same_value(gold, answer)


class OutOfTime(BaseException):    # or a broad except of sympy would swallow it
    pass


def out_of_time(signum, frame):
    raise OutOfTime


def child():
    """Read lines [gold, answer, ordered], write a byte for each: 1 equal, 0 not, t too late.

    Python code is interrupted after ANSWER_SECONDS of processor time. One long multiplication
    is not, and there the kernel ends the process soon after.
    """
    import resource
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)            # a library's print is no reply
    logging.disable(logging.CRITICAL)
    equal(r"\frac{1}{2}", "0.5")                            # imports, before the clock runs
    with contextlib.suppress(ValueError, OSError):          # macOS refuses this limit
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGVTALRM, out_of_time)
    os.write(replies, b"r")
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + ANSWER_SECONDS + 2
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, ANSWER_SECONDS)
            verdict = b"1" if equal(*json.loads(line)) else b"0"
        except OutOfTime:
            verdict = b"t"
        except Exception:    # sympy raises anything: then it is not shown to be equal
            verdict = b"0"
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        os.write(replies, verdict)


# --- The parent's side ------------------------------------------------------------------------

class Judge:
    """The child: started with the first question, and again after it was killed."""

    def __init__(self):
        self.process, self.lock = None, threading.Lock()
        atexit.register(self.close)

    def close(self):
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()

    def reply(self):
        """A byte; b"" if the child is dead or silent."""
        ready, _, _ = select.select([self.process.stdout], [], [], SILENCE)
        return os.read(self.process.stdout.fileno(), 1) if ready else b""

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, bufsize=0, start_new_session=True)    # spared by Ctrl-C
        if self.reply() != b"r":
            self.close()
            raise tasks.TaskError("the math-verify process does not start, its message is "
                                  "above: pip install math-verify")

    def ask(self, question):
        """True or False; None: no verdict in time."""
        for _ in range(2):    # a child killed from outside is no answer's fault: ask once more
            if self.process is None:
                self.start()
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps(question).encode() + b"\n")
            verdict = self.reply()
            if verdict in (b"0", b"1"):
                return verdict == b"1"
            if verdict == b"t":
                return None
            status = self.process.poll() if verdict else self.process.wait(1)
            self.close()
            if status == -signal.SIGXCPU:
                return None
        return None

    def __call__(self, questions):
        """{(gold, answer, ordered): True, False or None} for each different question."""
        with self.lock:
            return {question: self.ask(question) for question in dict.fromkeys(questions)}


judge = Judge()


# --- The task ---------------------------------------------------------------------------------

def math_gold(answer):
    """The last box of a solution ("\\boxed 4" and \\fbox too), or all of a short answer."""
    answer = re.sub(r"\\fbox\s*\{", r"\\boxed{", answer)
    answer = re.sub(r"\\boxed\s+([^\s{$.]+)", r"\\boxed{\1}", answer)
    found = tasks.boxes(answer)
    return found[-1][1] if found else "" if r"\boxed" in answer else answer.strip()


def grade_math_batch(texts, examples):
    """Equal as text is right; else the child decides, with a deadline for each answer."""
    drafts = []
    for text, example in zip(texts, examples):
        found, gold = tasks.last_answer(text, box=True), math_gold(str(example["answer"]))
        content = tasks.boxed_answer(found) if found.content is not None else None
        ordered = bool(ORDER.search(example.get("question") or ""))
        match = content is not None and plain(content) == plain(gold)
        reason = ("no answer" if found.content is None else "not one answer" if content is None
                  else "equal as text" if match else objection(gold, content))
        question = None if reason else (plain(gold), plain(content), ordered)
        drafts.append((found, content, match, reason, question))
    verdicts = judge([question for *_, question in drafts if question])

    late = [question[1] for question, verdict in verdicts.items() if verdict is None]
    if late:
        logging.getLogger("tasks").warning(
            "math-verify: %d of %d answers took more than %d s and count as wrong, e.g. %s",
            len(late), len(verdicts), ANSWER_SECONDS, tasks.printable(late[0][:60]))
    said = {True: "equal by math-verify", False: "not equal", None: "not judged in time"}
    grades = []
    for found, content, match, reason, question in drafts:
        verdict = verdicts[question] if question else match
        format = 0.5 * found.thought + 0.5 * found.tagged
        reason = reason or said[verdict]
        grades.append(tasks.graded(format, int(bool(verdict)), reason, content or "",
                                   found.tagged, string_match=float(match)))
    return grades


def grade_math(text, example):
    return grade_math_batch([text], [example])[0]


def read_math(row, split, options):
    """{"problem": .., "level": "Level 3", "solution": ".. \\boxed{..}"} or question, answer.

    Left out: training rows above max_level, and rows without a box or an answer.
    """
    level = re.search("[0-9]|$", str(row.get("level") or 1))[0]
    if split == "train" and not (level and int(level) <= options["max_level"]):
        return None
    question = row["problem"] if row.get("problem") is not None else row["question"]
    solution = row.get("solution") or ""
    boxed = re.search(r"\\(boxed|fbox)", solution)
    gold = math_gold(solution if boxed else str(row.get("answer") or ""))
    return {"question": question.strip(), "answer": gold} if gold else None


tasks.TASKS["math"] = tasks.Task(
    "math", tasks.question_prompt, grade_math, read=read_math, grade_batch=grade_math_batch,
    hub={"train": ("qwedsacf/competition_math", None, "train"),
         "test": ("HuggingFaceH4/MATH-500", None, "test")},
    options={"max_level": 4}, limits={"max_level": (1, 5)})    # the paper trains on 1 to 4


if __name__ == "__main__":
    child()
