r"""MATH, a task of one's own: `bash run.sh math --preset llada`.

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
PRIMES = re.compile(r"[A-Za-z)](?:'|\^?\{?\\prime)+")
BASE = re.compile(r"(?<![0-9.])([0-9][0-9A-F]*|(?<![A-Za-z\\])[A-F][0-9A-F]+)(\.[0-9A-F]+)?"
                  r"_([0-9]+)")
CLOSED = re.compile(r"\[-\\infty|\\infty\]")        # no interval holds the infinite
TEXT = r"\\text\{([^{}]*)\}"
JOINING = r"\b(?:or|and|not|to|minus|over|mod)\b"
JOINED = re.compile(r",|\\text\{,? ?(?:or|and),? ?\}| (?:or|and) ")
ORDER = re.compile(r"\b(?:ascending|descending|increasing order|decreasing order|in order"
                   r"|ordered|(?:least|smallest|lowest|greatest|largest|highest) to)\b",
                   re.IGNORECASE)
# "Find an equation of the line" asks for one; "find k in the equation" does not.
EQUATION = re.compile(r"\b(?:find|write|give|enter|state|determine|express|what(?:'s| is| are)"
                      r"|as|form of)(?: (?!(?:in|of|to|for|that|if|by|with|from)\b)[^\s.?]+)"
                      r"{0,5} equations?\b", re.IGNORECASE)

# A formula without layout: dollars, spacing, \left, degrees, percent, a full stop. In order:
LAYOUT = ((tasks.BOLD, r"\1"), ("[−–]", "-"), (r"[€£¥₹]|\\pounds", " "),
          ("≤", r"\\le "), ("≥", r"\\ge "), ("∞", r"\\infty "),
          (r"(?:,\s*\\!\s*|\{,\}|(?<=[0-9])\\,)(?=[0-9]{3}(?![0-9]))", ""),    # 10,\!000
          (r"\\[()\[\]](?!.*\\\\)|\\?\$|\\?%|(?<!\\)\\[,;: ]|~", " "),         # not \\\\
          (r"\\text\s*\{\s*\}", " "), (r"(?<![0-9A-Za-z)}])\s*\+\s*(?=\\infty)", ""),
          (r"\s(?:or|and)\s+(?=[-(\\])", ","),                   # 1 or -2
          (r"\\(?:left|right|displaystyle|big|Big)(?![A-Za-z])|\\!", ""),
          (r"\\[dt]frac", r"\\frac"),
          (r"\\(?:mbox|textrm|textbf|mathrm|mathbf|textit)(?![A-Za-z])\s*", r"\\text"),
          ("°", r"^\\circ"), (r"\\text\{ ?(\^\\circ ?[CF]?) ?\}", r"\1"),       # \text{°C}
          (r"\^\{?\\circ\}?(?: ?\\text ?\{ ?[CF] ?\}| ?[CF](?![A-Za-z]))?", ""),
          (r"<=|\\(?:leq|leqslant)(?![A-Za-z])", r"\\le "),
          (r">=|\\(?:geq|geqslant)(?![A-Za-z])", r"\\ge "),
          (r"\\lt(?![A-Za-z])", "<"), (r"\\gt(?![A-Za-z])", ">"),
          (r"(?<=[0-9A-Fa-f])_\{([0-9]+)\}", r"_\1"), (r"\s+", " "), (r"^ | ?\.? ?$", ""),
          (r"(?<![\w)}\]])[({]([0-9A-F.]+)[)}]_(?=[0-9])", r"\1_"),      # (101)_2
          (r"^\\text\{([-0-9.,/]+)\}$", r"\1"),
          # \text{A, B} is two letters
          (r"\\text\{((?:\(?[A-Z]\)?(?:, ?(?:and |or )?| and | or |(?=\})))+)\}",
           lambda text: ",".join(rf"\text{{{a}}}" for a in re.findall("[A-Z]", text[1]))),
          # "1 2" is not 12, "a or b" not aorb; all other white space goes
          (r"(?<![0-9A-Za-z,}]) | (?![0-9A-Za-z])", ""), (r"(?:^|(?<==))\{([^{}]*)\}$", r"\1"))


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
    more = unit and (re.search(rf"{tasks.SCALE}|{JOINING}", unit[0]))
    return tex if unit is None or more else tex[:unit.start()]


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
    if re.search(r"[^\s$]\s*(?<!\\)\$\s*[^\s$.]", answer.lstrip("-−– ")):     # not -$18
        return "more than one formula"
    for pattern, reason in ((HALF_READ, "more than one formula"),
                            (CLOSED, "an interval that holds infinity")):
        if pattern.search(plain(answer)) and not pattern.search(plain(gold)):
            return reason
    return ""


def without_name(gold, question):
    """15 for k = 15, unless the question asks for an equation; y = 2x + 3 stays one."""
    named = re.fullmatch(r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_\w)?=([^=]+)", gold)
    if named is None or EQUATION.search(question):
        return gold
    letters = re.search("[A-Za-z]", re.sub(r"\\(?:frac|sqrt|pi)(?![a-z])", "", named[1]))
    return gold if letters else named[1]


# --- Equality, in the child -------------------------------------------------------------------

def parse(tex):
    """One sympy object. LaTeX only: math-verify's other extractor hands the text to an eval."""
    import math_verify
    import sympy
    from latex2sympy2_extended import NormalizationConfig
    tex = BASE.sub(value_of, tex)
    how = math_verify.LatexExtractionConfig(
        boxed_match_priority=0, normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"))
    parsed = math_verify.parse(rf"\boxed{{{tex}}}", [how], fallback_mode="no_fallback",
                               parsing_timeout=None)[0]
    if parsed.has(sympy.Float):    # a decimal is exactly what it says
        parsed = parsed.replace(lambda part: isinstance(part, sympy.Float),
                                lambda part: sympy.Rational(str(part)))
    # One kind of symbol, whatever the parser took it for; i is the imaginary unit.
    return parsed.subs({symbol: sympy.I if symbol.name == "i" else sympy.Symbol(symbol.name)
                        for symbol in getattr(parsed, "free_symbols", ())})


def value_of(number):
    """The match of 1.1_3 -> 4/3; of 7_3, which has no such digit, as it is."""
    whole, part, base = number[1], (number[2] or "")[1:], int(number[3])
    with contextlib.suppress(ValueError):
        return rf"(\frac{{{int(whole + part, base)}}}{{{base ** len(part)}}})"
    return number[0]


def same_number(a, b):
    """Numbers that agree to 50 digits only are not the same: decided exactly, or no."""
    import sympy
    difference = (a - b).doit()    # 100! in full, not a rounding of it
    if not difference.free_symbols and abs(difference.evalf(50)) > sympy.Float("1e-30", 50):
        return False
    return sympy.simplify(difference) == 0


def same_value(gold, answer):
    """Two formulas without list, bracket or equation."""
    import math_verify
    import sympy
    a, b = parse(gold), parse(answer)
    if isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase):
        return a.shape == b.shape and all(map(same_number, a, b))
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return same_number(a, b)
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
    bases, other_bases = ({base for *_, base in BASE.findall(tex)} for tex in (gold, answer))
    primes, other_primes = (len(PRIMES.findall(tex)) for tex in (gold, answer))
    if bases != other_bases or primes != other_primes:     # -37_8 is not -37, f'(x) not f(x)
        return False
    if words(gold) and (r"\text" in gold or len(words(gold)) > 1 and words(answer)):
        return words(gold) == words(answer)                # but xy is x \cdot y
    gold, answer = (re.sub(rf"^{NAME} ?\\in(?![A-Za-z]) ?", "", tex) for tex in (gold, answer))
    gold, answer = without_units(gold, gold), without_units(answer, gold)
    answer = re.sub(r"^\\text\{[^{}0-9]*\b(?:is|are|be):? ?\} ?", "", answer)    # the answer is

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

    # A point, an interval: the same brackets, the same order
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
    answer = re.sub(r"\\boxed\s+([^\s{$.]+)", r"\\boxed{\1}", answer)
    return tasks.last_box(answer) or ("" if r"\boxed" in answer else answer.strip())


def grade_math_batch(texts, examples):
    """Equal as text is right; else the child decides, with a deadline for each answer."""
    drafts = []
    for text, example in zip(texts, examples):
        content, tagged, thought = tasks.last_answer(text, box=True)
        gold, said = math_gold(str(example["answer"])), content or ""
        asked, tex, answer = example.get("question") or "", plain(gold), plain(said[:1001])
        reason = ("no answer" if content is None else SAME if tex == answer
                  else objection(gold, said))
        if "=" not in answer:
            tex = without_name(tex, asked)
        format = 0.5 * thought + 0.5 * tagged
        drafts.append((format, tagged, said, reason, (tex, answer, bool(ORDER.search(asked)))))
    verdicts = judge([question for *_, reason, question in drafts if not reason])

    late = [question[1] for question, verdict in verdicts.items() if verdict is None]
    if late:
        logging.getLogger("tasks").warning(
            "math-verify: %d of %d answers took more than %d s and count as wrong, e.g. %s",
            len(late), len(verdicts), ANSWER_SECONDS, tasks.printable(late[0][:60]))
    why = {True: "equal by math-verify", False: "not equal", None: "not judged in time"}
    grades = []
    for format, tagged, said, reason, question in drafts:
        verdict = reason == SAME or not reason and verdicts[question]
        grades.append(tasks.graded(format, int(verdict or 0), reason or why[verdict], said,
                                   tagged, string_match=float(reason == SAME)))
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
    hub={"train": "qwedsacf/competition_math train",
         "test": "HuggingFaceH4/MATH-500 test"},
    options={"max_level": 4}, limits={"max_level": (1, 5)})    # the paper trains on 1 to 4


if __name__ == "__main__":
    child()
