r"""MATH, a task of one's own: `python agrpo.py --task lab/math_task.py --preset llada`.

    {"question": "Simplify $\\sqrt{50}$.", "answer": "5\\sqrt{2}"}
    <think>25 x 2</think><answer>\boxed{5\sqrt{2}}</answer>

Are two formulas equal? math-verify reads LaTeX, sympy computes, and what they forgive and a
grader must not is decided here: lists, brackets, equations, bases, numbers that agree to 15
digits only. Whatever cannot be decided exactly is unequal.

sympy never ends on \boxed{9^{9^{9^{9}}}}, and math-verify's own timeout works in the main
thread only. So a child process computes, and the kernel ends it where an answer takes too much
processor time. It is started by exec (a fork of a process with torch's threads can hang), it is
this file run as a script, and it ends when its input does, so it never outlives its parent.
POSIX only.
"""
import atexit
import contextlib
import json
import logging
import math
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from itertools import accumulate, chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tasks

ANSWER_SECONDS = 2      # of processor time for one answer, whatever else the machine does
SILENCE = 60            # seconds of the clock after which a child that says nothing is given up

# --- From LaTeX to pieces: what needs no algebra ----------------------------------------------

# Of this a parser reads a part only ("3 \approx 4" as 3): not in an answer unless in the gold
HALF_READ = re.compile(r"\\approx|\\equiv|\\[lc]?dots|\.\.\.|"
                       r"(?<!frac)(?<!frac )[0-9](?:\s|\\q?quad|~|'|\")+[0-9]")
COMPARED = re.compile(r"<|>|\\[lg]e(?![A-Za-z])")
NAME = r"\\?[A-Za-z]+(?:_\w|_\{\w+\})?(?:\([A-Za-z]\))?"
NAMES = re.compile(rf"{NAME}|\({NAME}(?:,{NAME})+\)")
BASE = re.compile(r"[0-9A-Fa-f]+_[0-9]+")
TEXT = r"\\text\{([^{}]*)\}"
JOINED = re.compile(r",|\\text\{,? ?(?:or|and),? ?\}| (?:or|and) ")
ORDER = re.compile(r"\b(?:ascending|descending|increasing order|decreasing order|in order"
                   r"|ordered|(?:least|smallest|lowest|greatest|largest|highest) to)\b",
                   re.IGNORECASE)

# A formula without layout: dollars, spacing, \left, degrees, percent, a full stop. In order:
LAYOUT = (("−", "-"), ("≤", r"\\le "), ("≥", r"\\ge "), ("∞", r"\\infty "),
          (r",\s*\\!\s*(?=[0-9]{3})|\{,\}(?=[0-9]{3})", ""),                   # 10,\!000
          (r"\\[()\[\]](?!.*\\\\)|\\?\$|\\?%|(?<!\\)\\[,;: ]|~", " "),         # not \\\\
          (r"\\text\s*\{\s*\}", " "), (r"(?<![0-9A-Za-z)}])\s*\+\s*(?=\\infty)", ""),
          (r"\s(?:or|and)\s+(?=[-(\\])", ","),                   # 1 or -2
          (r"\\(?:left|right|displaystyle|big|Big)(?![A-Za-z])|\\!|\^\{?\\circ\}?|°", ""),
          (r"\\[dt]frac", r"\\frac"),
          (r"\\(?:mbox|textrm|textbf|mathrm|mathbf|textit)(?![A-Za-z])\s*", r"\\text"),
          (r"<=|\\(?:leq|leqslant)(?![A-Za-z])", r"\\le "),
          (r">=|\\(?:geq|geqslant)(?![A-Za-z])", r"\\ge "),
          (r"\\lt(?![A-Za-z])", "<"), (r"\\gt(?![A-Za-z])", ">"),
          (r"(?<=[0-9A-Fa-f])_\{([0-9]+)\}", r"_\1"), (r"\s+", " "), (r"^ | ?\.? ?$", ""),
          (r"^\\text\{([-0-9.,/]+)\}$", r"\1"),
          # "1 2" is not 12, "a or b" not aorb; all other white space goes
          (r"(?<![0-9A-Za-z,}]) | (?![0-9A-Za-z])", ""))


def plain(tex):
    for pattern, replacement in LAYOUT:
        tex = re.sub(pattern, replacement, tex)
    return tex


def depths(tex):
    """How many brackets are open behind each character."""
    return list(accumulate((c in "([{") - (c in ")]}") for c in tex))


def without_units(tex, gold):
    r"""5\text{ cm}^2 and, for a gold without letters, 5 cm -> 5. But 5m is a product."""
    unit = rf"(?<=[0-9}}A-Za-z)]) ?{TEXT}"
    if not re.search("[A-Za-z]", re.sub(rf"{TEXT}|\\[A-Za-z]+", "", gold)):
        unit += r"|(?<=[0-9}]) ?([A-Za-z]{2,}(?: [A-Za-z]+){0,3})"
    unit = re.search(rf"(?:{unit})(?:\^\{{?[23]\}}?)?$", tex)
    return tex if unit is None or tasks.changes_value(unit[0]) else tex[:unit.start()]


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
    depth, pieces, start = depths(tex), [], 0
    for joint in JOINED.finditer(tex):
        if depth[joint.start()] == 0:
            pieces.append(tex[start:joint.start()])
            start = joint.end()
    pieces = [piece.strip() for piece in (*pieces, tex[start:])]
    return [piece for piece in pieces if piece]


def listed(tex):
    r"""\{1 \pm \sqrt5, -2\} -> three formulas; most answers are one."""
    if tex.startswith(r"\{") and tex.endswith(r"\}"):
        tex = tex[2:-2]
    both = [[piece.replace(r"\pm", sign) for sign in "+-"] if piece.count(r"\pm") == 1
            else [piece] for piece in split(tex)]
    return list(chain(*both))


def objection(gold, answer):
    """Why `answer` is wrong whatever algebra says, or ""."""
    if not answer or len(answer) > 1000:
        return "empty or too long"
    depth = depths(answer)
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
    for piece in chain(*(part.split(r"\cup") for part in split(tex))):
        ends = split(piece[1:-1]) if piece[:1] in "([" and piece[-1:] in ")]" else []
        relation = parse(piece) if COMPARED.search(piece) else None
        if relation is not None and len(relation.free_symbols) == 1:
            whole |= relation.as_set()
        elif relation is None and len(ends) == 2:
            whole |= sympy.Interval(*map(parse, ends), piece[0] == "(", piece[-1] == ")")
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


def same_list(golds, answers, ordered):
    """One gold for each answer; in any order, but where the question asks for one."""
    names = {tex.split("=")[0] for tex in answers if "=" in tex}
    if names and not any("=" in tex for tex in golds):        # x = 4, x = 7, or x = 4, 7
        if len(names) > 1:
            return False
        answers = [tex.split("=")[-1] for tex in answers]
    if ordered:
        return len(golds) == len(answers) and all(map(equal, golds, answers))
    for gold in golds:
        match = next((answer for answer in answers if equal(gold, answer)), None)
        if match is None:
            return False
        answers.remove(match)
    return not answers


def equal(gold, answer, ordered=False):
    """Both already plain. Recursion is as deep as brackets are nested, 30 at most."""
    if gold == answer:
        return True
    if words(gold) and (len(words(gold)) > 1 or r"\text" in gold):
        return words(gold) == words(answer)
    gold, answer = (re.sub(rf"^{NAME} ?\\in(?![A-Za-z]) ?", "", tex) for tex in (gold, answer))
    gold, answer = without_units(gold, gold), without_units(answer, gold)
    said = re.match(rf"{TEXT} ?(?=[0-9\\(\[])", answer)    # \text{The answer is } 9
    if said and not re.search("[0-9]", said[1]) and not tasks.changes_value(said[1]):
        answer = answer[said.end():]

    # Inequalities and unions of intervals
    if any(COMPARED.search(tex) or r"\cup" in tex for tex in (gold, answer)):
        name, _, value = answer.rpartition("=")
        if "=" not in gold and NAMES.fullmatch(name):
            answer = value
        a, b = as_set(gold), as_set(answer)
        return same_value(gold, answer) if a is None or b is None else a == b
    if len(listed(gold)) > 1 or len(listed(answer)) > 1:
        return same_list(listed(gold), listed(answer), ordered)
    (gold,), (answer,) = listed(gold), listed(answer)

    # Equations: an equation is no number; a name in front of a value is only a name
    if "=" in gold:
        sides = gold.split("="), answer.split("=")
        return [len(s) for s in sides] == [2, 2] and same_equation(*sides)
    *before, answer = answer.split("=")
    if not all(NAMES.fullmatch(side) or equal(side, answer) for side in before):
        return False

    # Another base is another number; a point, an interval: the same brackets, the same order
    if BASE.fullmatch(gold) or BASE.fullmatch(answer):
        return gold == answer
    a, b = (split(tex[1:-1]) if tex[0] + tex[-1] in ("()", "[]", "(]", "[)") else [tex]
            for tex in (gold, answer))
    if len(a) > 1 or len(b) > 1:
        ends = [tex[0] + tex[-1] for tex in (gold, answer)]
        return ends[0] == ends[1] and len(a) == len(b) and all(map(equal, a, b))
    return same_value(gold, answer)


def child():
    """Read lines [gold, answer, ordered], write a byte for each: 1 equal, 0 not.

    The kernel ends it ANSWER_SECONDS of processor time after a line, whatever it is doing.
    """
    import resource
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)            # a library's print is no reply
    logging.disable(logging.CRITICAL)
    equal(r"\frac{1}{2}", "0.5")                            # imports, before the clock runs
    with contextlib.suppress(ValueError, OSError):          # macOS refuses this limit
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for line in sys.stdin:
        used = math.ceil(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + ANSWER_SECONDS, resource.RLIM_INFINITY))
        try:
            verdict = equal(*json.loads(line))
        except Exception:    # sympy raises anything: then it is not shown to be equal
            verdict = False
        os.write(replies, b"1" if verdict else b"0")


# --- The parent's side ------------------------------------------------------------------------

class Judge:
    """The child: started with the first question, and again after it ended."""

    def __init__(self):
        self.process, self.lock = None, threading.Lock()
        atexit.register(self.close)

    def close(self):
        """-> the exit status of the child, or None where there was none."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.communicate()    # closes the pipes and waits: no zombie
            return process.returncode

    def ask(self, question):
        """True or False; None: no verdict in time."""
        for _ in range(2):    # a child killed from outside is no answer's fault: ask once more
            self.process = self.process or subprocess.Popen(
                [sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, bufsize=0, start_new_session=True)    # spared by Ctrl-C
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps(question).encode() + b"\n")
            ready, _, _ = select.select([self.process.stdout], [], [], SILENCE)
            verdict = self.process.stdout.read(1) if ready else b""
            if verdict:
                return verdict == b"1"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)    # for its own status, before close kills it
            status = self.close()
            if status > 0:
                raise tasks.TaskError("the math-verify process does not start, its message is "
                                      "above: pip install math-verify")
            if status == -signal.SIGXCPU:
                break
        return None

    def __call__(self, questions):
        """{(gold, answer, ordered): True, False or None} for each different question."""
        with self.lock:
            return {question: self.ask(question) for question in dict.fromkeys(questions)}


judge = Judge()


# --- The task ---------------------------------------------------------------------------------

SAME = "equal as text"


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
        content = tasks.boxed_answer(found)
        ordered = bool(ORDER.search(example.get("question") or ""))
        question = plain(gold), plain((content or "")[:1001]), ordered
        reason = ("no answer" if found.content is None else "not one answer" if content is None
                  else SAME if question[0] == question[1] else objection(gold, content))
        drafts.append((found, content or "", reason, question))
    verdicts = judge([question for *_, reason, question in drafts if not reason])

    late = [question[1] for question, verdict in verdicts.items() if verdict is None]
    if late:
        logging.getLogger("tasks").warning(
            "math-verify: %d of %d answers took more than %d s and count as wrong, e.g. %s",
            len(late), len(verdicts), ANSWER_SECONDS, tasks.printable(late[0][:60]))
    said = {True: "equal by math-verify", False: "not equal", None: "not judged in time"}
    grades = []
    for found, content, reason, question in drafts:
        verdict = reason == SAME or not reason and verdicts[question]
        format = 0.5 * found.thought + 0.5 * found.tagged
        grades.append(tasks.graded(format, int(verdict or 0), reason or said[verdict], content,
                                   found.tagged, string_match=float(reason == SAME)))
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
    answer = "" if row.get("answer") is None else str(row["answer"])      # 0 is an answer
    gold = math_gold(solution if boxed else answer)
    return {"question": question.strip(), "answer": gold} if gold else None


tasks.TASKS["math"] = tasks.Task(
    "math", tasks.question_prompt, grade_math, read=read_math, grade_batch=grade_math_batch,
    key=tasks.question_key,
    hub={"train": "qwedsacf/competition_math train",
         "test": "HuggingFaceH4/MATH-500 test"},
    options={"max_level": 4}, limits={"max_level": (1, 5)})    # the paper trains on 1 to 4


if __name__ == "__main__":
    child()
