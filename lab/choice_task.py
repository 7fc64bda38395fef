"""Multiple choice, tasks of one's own: `lab/run.py --task lab/choice_task.py --preset llada`.

    {"question": "Where do fish live?", "choices": ["sand", "water"], "answer": "B"}
    <think>gills</think><answer>B</answer>

CommonsenseQA (`commonsense_qa`) and HellaSwag (`hellaswag`): a prompt, a grader, a reader of
rows each, and an entry in tasks.TASKS.
"""
import re
import string
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tasks


def prompt(example):
    lettered = zip(string.ascii_uppercase, example["choices"])
    lines = [f"{letter}. {choice}" for letter, choice in lettered]
    return tasks.chat("Choose the best answer. Think inside <think></think>, then write only "
                      "its letter inside <answer></answer>.",
                      "\n".join([example["question"], *lines]))


# How the letter is written, and what may stand around it, which says nothing more
BRACES = r"\\(?:boxed|fbox|textbf|mathbf|text)\s*\{([^{}]*)\}"
LAYOUT = ((BRACES, r"\1"), (BRACES, r"\1"),             # \boxed{\text{B}}
          (r"\*\*|^[\s$]+|[\s$]+$", ""), (r"^\{([^{}]*)\}$", r"\1"),
          (r"^(?:the |final |correct |best )*answer(?: is)?\s*:?\s+(?=[\W]?[A-Za-z]\b)", ""))
LETTER = re.compile(r"[(\[]?([A-Za-z])"
                    r"(?:\s*[-–—]\s+(\S.*)|[).:\]]+(?:\s+(?:[-–—]\s+)?(\S.*))?)?")


def letter_of(answer, choices):
    """B, b, [B], \\boxed{B}, "Answer: **B**", "B. water", "B - water": the letter, or None."""
    for pattern, replacement in LAYOUT:
        answer = re.sub(pattern, replacement, answer, flags=re.IGNORECASE)
    match = LETTER.fullmatch(answer)
    if match is None or match[1].upper() not in string.ascii_uppercase[:len(choices)]:
        return None
    letter, words = match[1].upper(), (match[2] or match[3] or "").strip(" .").casefold()
    stated = [choice.strip(" .").casefold() for choice in choices]
    own = stated.pop(string.ascii_uppercase.index(letter))
    # "B. or A", "B. A", "B. here", "B. water (A)" say two things, unless choice B says so.
    others = "|".join(map(re.escape, filter(None, stated)))
    another = re.search(r"^(?:or|not|n?either)\b"
                        r"|(?:^|\b(?:or|and|not) |[,/(])\s*\(?(?:[a-z]\)?(?=[).,:]|$)"
                        rf"|(?:the )?(?:{others})(?!\w))", words)
    return None if words != own and another else letter


def grade(text, example):
    content, tagged, thought = tasks.last_answer(text)
    format = 0.5 * thought + 0.5 * tagged
    letter = letter_of((content or "")[:1000], example["choices"])
    if letter is None:
        reason = "no <answer>" if content is None else "not the letter of one choice"
        return tasks.graded(format, 0, reason, content or "", tagged)
    return tasks.graded(format, letter == example["answer"], f"chose {letter}", letter, tagged)


def key(example):
    """The same choices in another order are the same problem."""
    question, *choices = ("".join(text.split()).casefold()
                          for text in (example["question"], *example["choices"]))
    return question, sorted(choices)


def checked(question, choices, letter):
    if letter not in tuple(string.ascii_uppercase[:len(choices)]):
        raise ValueError(f"{letter!r} is not the letter of one of {len(choices)} choices")
    return {"question": question.strip(), "choices": choices, "answer": letter}


def read_commonsense_qa(row, split, options):
    """{"question": .., "choices": {"label": ["A", ..], "text": [..]}, "answerKey": "A"}"""
    return checked(row["question"], list(row["choices"]["text"]), row["answerKey"])


def read_hellaswag(row, split, options):
    """{"ctx": "A man sits down. He", "endings": [.., .., .., ..], "label": "3"}"""
    label = int(row["label"])
    letter = string.ascii_uppercase[label] if 0 <= label < len(row["endings"]) else str(label)
    return checked("Which sentence goes on best? " + row["ctx"], list(row["endings"]), letter)


# The test splits of both are published without answers: the validation splits stand for them.
tasks.TASKS["commonsense_qa"] = tasks.Task(
    "commonsense_qa", prompt, grade, read=read_commonsense_qa, key=key,
    hub={"train": "tau/commonsense_qa train",
         "test": "tau/commonsense_qa validation"})
tasks.TASKS["hellaswag"] = replace(
    tasks.TASKS["commonsense_qa"], name="hellaswag", read=read_hellaswag,
    hub={"train": "Rowan/hellaswag train",
         "test": "Rowan/hellaswag validation"})
