"""`python tasks.py countdown --n 3`: problems, their prompts, and how a right and a wrong answer are graded."""
import argparse
import sys

import tasks


def countdown_answers(nums, target):
    right = next(tasks.expressions([(n, 1, str(n), 0) for n in nums], target), "no solution")
    return f"{right} = {target}", f"{' + '.join(map(str, nums[:-1]))} = {target}"  # one number unused


def sudoku_answers(puzzle, solution):
    cell = puzzle.find("0") % 16  # the first empty cell, or the last of all
    return solution, solution[:cell] + str(int(solution[cell]) % 4 + 1) + solution[cell + 1:]


def gsm8k_answers(question, answer):
    return rf"\boxed{{{answer}}}", rf"\boxed{{{answer}.75}}"


def math_answers(question, answer):
    return rf"\boxed{{{answer}}}", rf"\boxed{{{answer} + 1}}"


def choice_answers(question, choices, answer):
    return answer, "B" if answer == "A" else "A"


# by grader: a right and a wrong answer to an example, and the example of the docstring of tasks.py
SAMPLES = {
    tasks.grade_countdown: (countdown_answers, {"nums": [17, 18, 5], "target": 67}),
    tasks.grade_sudoku: (sudoku_answers, {"puzzle": "1002020100030310", "solution": "1432324141232314"}),
    tasks.grade_gsm8k: (gsm8k_answers, {"question": "Ann has 3 bags of 6 pears. How many pears?", "answer": "18"}),
    tasks.grade_math: (math_answers, {"question": r"Simplify $\sqrt{50}$.", "answer": r"5\sqrt{2}"}),
    tasks.grade_choice: (choice_answers,
                         {"question": "Where do fish live?", "choices": ["water", "sand"], "answer": "A"}),
}


def show(name, n, split, seed, file, options):
    task = tasks.find_task(name)
    answers, literal = SAMPLES.get(task.grade, (lambda **example: (), None))
    try:
        examples = tasks.load(name, split, seed=seed, file=file, size=n, **options)
    except tasks.TaskError as error:
        if file or task.make or not task.hub or literal is None:
            raise
        print(f"{error}\nThe example of the docstring instead:")
        examples = tasks.Examples([literal].__getitem__, 1, "the docstring of tasks.py")
    print(f"{name}, {split} split: {examples.source}")
    for example in examples:
        print("\n" + "\n".join(f"[{turn['role']}] {turn['content']}" for turn in task.prompt(example)))
        for answer in answers(**example):
            completion = f"<think>...</think><answer>{answer}</answer>"
            print(f"{completion}\n    {task.grade(completion, example)}")


def main():
    parser = argparse.ArgumentParser(description="Show problems of a task, their prompts, and how answers are graded.")
    parser.add_argument("task", help=", ".join(tasks.TASKS))
    parser.add_argument("--n", type=int, default=3, help="how many problems")
    parser.add_argument("--split", choices=tasks.SIZES, help="default: train, or test if only --test-file is given")
    parser.add_argument("--seed", type=int, default=0)
    for name in ("--train-file", "--test-file"):
        parser.add_argument(name, help="a .jsonl or .csv file, or a folder saved by datasets")
    for name, default in {name: value for task in tasks.TASKS.values() for name, value in task.options.items()}.items():
        parser.add_argument(tasks.flag(name), type=type(default))
    args = parser.parse_args()
    split = args.split or ("test" if args.test_file and not args.train_file else "train")
    given = {name: value for name, value in vars(args).items() if value is not None and any(
        name in task.options for task in tasks.TASKS.values())}
    try:
        show(args.task, args.n, split, args.seed, args.train_file if split == "train" else args.test_file, given)
    except tasks.TaskError as error:
        sys.exit(str(error))
