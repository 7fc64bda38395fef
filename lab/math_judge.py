r"""Are two formulas equal? math-verify behind a deadline, for MATH's grader in tasks.py.

math-verify computes with sympy, which \boxed{9^{9^{9^{9}}}} stops for good, and its own timeout is an alarm, which only
works in the main thread. So child processes compute, and a child that is late is killed and replaced. They are started
by exec: a fork of a process with torch's threads can hang, and multiprocessing's spawn would import the caller's script
again, torch included. This file is the child's program too; POSIX only.

    judge([("5\\sqrt{2}", "\\sqrt{50}"), ("18", "9^{9^{9^{9}}}")])  ->  {(.., ..): True, (.., ..): None}
"""
import atexit
import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from itertools import accumulate
from multiprocessing.connection import wait

BATCH_SECONDS = 6.0   # deadline of one call of judge, however many answers it has
ANSWER_SECONDS = 2.0  # and of one answer in it, so that one bad answer does not use up its neighbours' time


# --- before math-verify: what it forgives and a grader must not -------------------------------------------------------


def plain(tex):
    """A formula as text without layout: spaces, dollars, degrees, \\left, a full stop; \\frac for \\dfrac."""
    tex = re.sub(r"(\\\\)|\\[,;: ]|~|\\?\$", lambda space: space[1] or " ", tex)  # a double one starts a matrix row
    tex = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\!|\^(?:\\circ|\{\\circ\})", "", tex)
    tex = re.sub(r"(?<![0-9]) | (?![0-9])", "", " ".join(tex.split()))  # "1 2" is not 12
    return re.sub(r"\\[dt]frac", r"\\frac", tex).rstrip(".")


# Notation of which it reads a part only ("3 \approx 4" as 3, "3 4" as 7): not in an answer unless in the gold.
HALF_READ = re.compile(r"\\approx|\\equiv|\\[lc]?dots|\.\.\.|[0-9]\s*_|"
                       r"(?<!frac)(?<!frac )[0-9](?:\s|\\[ ,;:]|\\q?quad|~|'|\"|\^\\circ|\^\{\\circ\})+[0-9]")
RUNAWAY = re.compile(r"\^|!|\\(?:frac|int|sum|prod|lim)")
# What may stand before "=": a name. "5 = 3" would be taken for 3.
NAME = re.compile(r"\\?[A-Za-z]+(_\w|_\{\w+\})?(\([A-Za-z]\))?")


def objection(gold, answer):
    """Why `answer` is wrong whatever math-verify says, or "". Every test is linear in a text of at most 1,000."""
    if not answer or len(answer) > 1000:
        return "empty or too long"
    depth = list(accumulate((c in "([{") - (c in ")]}") for c in answer))
    if min(depth) < 0 or depth[-1] or max(depth) > 30:
        return "brackets unbalanced or nested too deep"  # its parser needs 3 s for 200, and recursion
    if "$" in answer.replace(r"\$", "") or HALF_READ.search(answer) and not HALF_READ.search(gold):
        return "more than one formula"
    *names, value = plain(answer).split("=")
    if names and "=" not in gold and not NAME.fullmatch("=".join(names)):
        return "an equation that is not name = value"

    def brackets(tex):  # the point (3, 4) and the interval [3, 4] are not the set 3, 4
        return tex[0] + tex[-1] if tex[:1] in ("(", "[") and tex[-1] in ")]" and "," in tex else ""
    return "" if brackets(plain(gold).split("=")[-1]) == brackets(value) else "other brackets"


# --- the child --------------------------------------------------------------------------------------------------------


def same_formula(gold, answer):
    """Equal by math-verify, with decimals taken for exactly what they say?"""
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Float, Rational
    # LaTeX only: math-verify's other extractor hands the text to sympy's parse_expr, which is an eval
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    sides = []
    for tex in (gold, answer):
        parsed = parse(rf"\boxed{{{tex.rstrip('.')}}}", config, fallback_mode="no_fallback", parsing_timeout=None)
        # 7.0710678 is not 5 sqrt 2; as a Float it would be, because verify rounds those to six places
        sides.append([side.replace(lambda e: isinstance(e, Float), lambda e: Rational(str(e)))
                      if side.has(Float) else side for side in parsed])
    return verify(*sides, timeout_seconds=None)


def child():
    """Read a line of JSON [gold, answer], write a byte: r ready, 1 equal, 0 not. It ends with its input; the kernel
    ends it when an answer takes too much memory or processor time, should the parent be gone."""
    import resource
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a library's print is no reply
    logging.disable(logging.CRITICAL)
    same_formula(r"\frac{1}{2}", "0.5")  # imports and first use, before the clock runs; a failure shows on stderr
    with contextlib.suppress(ValueError, OSError):  # macOS refuses this limit
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    os.dup2(1, 2)
    os.write(replies, b"r")
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime + 2 * ANSWER_SECONDS) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        try:
            same = same_formula(*json.loads(line))
        except Exception:  # sympy raises anything, RecursionError and MemoryError too: then it is not shown to be equal
            same = False
        os.write(replies, b"1" if same else b"0")


# --- the pool ---------------------------------------------------------------------------------------------------------


class Pool:
    """Children that start with the first question and are replaced when they are killed or die."""

    def __init__(self):
        self.starting, self.idle, self.busy = set(), set(), {}  # busy: child -> (pair, since when)
        self.started, self.lock = False, threading.Lock()

    def children(self):
        return [*self.starting, *self.idle, *self.busy]

    def start_missing(self):
        for _ in range(min(4, os.cpu_count() or 1) - len(self.children())):
            self.starting.add(subprocess.Popen([sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE,
                                               stdout=subprocess.PIPE, bufsize=0,
                                               start_new_session=True))  # a session of its own: spared by Ctrl-C

    def remove(self, child):
        """-> the pair it was judging, or None"""
        self.starting.discard(child)
        self.idle.discard(child)
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
        return self.busy.pop(child, (None,))[0]

    def close(self):
        for child in self.children():
            self.remove(child)

    def start(self):
        """Wait for the first child, once: starting up is no answer's fault and no part of its deadline."""
        atexit.register(self.close)
        self.start_missing()
        ready = wait([child.stdout for child in self.starting], 60)
        if not ready or os.read(ready[0].fileno(), 1) != b"r":
            self.close()
            raise RuntimeError("the math-verify process does not start, its message is above: pip install math-verify")
        first = next(child for child in self.starting if child.stdout is ready[0])
        self.starting.remove(first)
        self.idle.add(first)
        self.started = True

    def judge(self, pairs, seconds):
        with self.lock:  # one batch at a time
            if not self.started:
                self.start()
            verdicts, died = dict.fromkeys(pairs), set()
            # popped from the end: what can run away waits until the plain answers have their verdicts
            todo = sorted(verdicts, key=lambda pair: len(RUNAWAY.findall(pair[1])), reverse=True)
            end = time.monotonic() + seconds
            while (todo or self.busy) and (now := time.monotonic()) < end:
                self.start_missing()
                while todo and self.idle:
                    child = self.idle.pop()
                    self.busy[child] = (todo.pop(), now)
                    with contextlib.suppress(BrokenPipeError):  # it died while idle: seen below as its end of file
                        child.stdin.write(json.dumps(self.busy[child][0]).encode() + b"\n")
                by_pipe = {child.stdout: child for child in self.children()}
                soonest = min([end, *(since + ANSWER_SECONDS for _, since in self.busy.values())])
                for pipe in wait(list(by_pipe), max(0.0, soonest - now)):
                    child, reply = by_pipe[pipe], os.read(pipe.fileno(), 1)
                    if reply == b"":  # killed from outside, or crashed: ask once more
                        pair = self.remove(child)
                        if pair is not None and pair not in died:
                            died.add(pair)
                            todo.append(pair)
                    elif reply == b"r":
                        self.starting.remove(child)
                        self.idle.add(child)
                    else:
                        verdicts[self.busy.pop(child)[0]] = reply == b"1"
                        self.idle.add(child)
                for child, (_, since) in list(self.busy.items()):
                    if time.monotonic() >= since + ANSWER_SECONDS:
                        self.remove(child)
            for child in list(self.busy):
                self.remove(child)
            self.start_missing()  # so that the next batch finds them ready
            return verdicts


pool = Pool()


def judge(pairs, seconds=BATCH_SECONDS):
    """{(gold, answer): equal?} for each pair; None where there was no verdict in time."""
    verdicts = pool.judge(pairs, seconds) if pairs else {}
    late = [answer for (_, answer), verdict in verdicts.items() if verdict is None]
    if late:
        log = logging.getLogger("tasks")
        log.warning("math-verify: %d of %d answers not judged in time, counted wrong, e.g. %.60s",
                    len(late), len(verdicts), late[0])
    return verdicts


if __name__ == "__main__":
    child()
