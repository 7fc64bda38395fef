"""Rows for tasks.py from a file, a folder or the Hugging Face hub; every failure is one sentence that says what to do.

    read_file("test", "countdown.jsonl")  ->  pairs ("line 1", {"input": "30,100,93", "output": "23"}), ...
    read_hub("test", ("openai/gsm8k", "main", "test"))  ->  pairs ("row 1", {"question": .., "answer": ..}), ...
"""
import contextlib
import csv
import json
import threading
from pathlib import Path

HUB_SECONDS = 3.0  # to find out whether the hub is there; its own retries give up after 23 s


class TaskError(ValueError):
    """A mistake the caller can mend, in one sentence that names the flag or the file and says what to do."""


def read_file(split, file, hub=None):
    """JSONL, CSV (all text, so leading zeros stay), or a folder."""
    path, name = Path(file), f"--{split}-file {file}"
    if path.is_dir():
        return folder_rows(path, name, split, *(hub or (None, None, None))[1:])
    if not path.exists():
        raise TaskError(f"{name} does not exist: give a .jsonl or .csv file or a folder saved by datasets")
    if path.suffix not in (".jsonl", ".json", ".csv"):
        raise TaskError(f"{name} is of an unknown kind: give a .jsonl or .csv file or a folder saved by datasets")
    return csv_rows(path, name) if path.suffix == ".csv" else json_rows(path, name)


def json_rows(path, name):
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TaskError(f"{name}, line {number}: not JSON, one object a line: {error}") from error
            yield f"line {number}", row


def csv_rows(path, name):
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        while True:
            try:
                row = next(reader, None)
            except (csv.Error, ValueError) as error:
                raise TaskError(f"{name}, line {reader.line_num + 1}: not CSV in UTF-8: {error}") from error
            if row is None:
                return
            yield f"line {reader.line_num}", row


def folder_rows(path, name, split, configuration, hub_split):
    """A folder of save_to_disk, or a copy of the hub's: data files, perhaps in a folder for each configuration."""
    import datasets
    if configuration and (path / configuration).is_dir():
        path = path / configuration
    try:
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        data = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as error:  # datasets raises what its readers of a dozen formats raise
        raise TaskError(f"{name} cannot be read by datasets: {first_line(error)}") from error
    if isinstance(data, dict):
        splits = [key for key in (hub_split, split) if key in data] or (list(data) if len(data) == 1 else [])
        if not splits:
            raise TaskError(f"{name} has no split {hub_split or split}, only {', '.join(data)}: give a folder that has")
        data = data[splits[0]]
    return [(f"row {number}", row) for number, row in enumerate(data.to_list(), 1)]


def read_hub(split, hub):
    import datasets
    import huggingface_hub
    name, configuration, hub_split = hub
    switches = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in switches]
    try:
        if not hub_answers(huggingface_hub):
            for module in switches:  # what is in the cache still loads; the rest fails without retries
                module.HF_HUB_OFFLINE = True
        data = datasets.load_dataset(name, configuration, split=hub_split)
    except Exception as error:  # no network, no such id, a changed configuration, a full disk: the same way out
        raise TaskError(f"{name} ({hub_split} split) did not load from the hub ({first_line(error)}): give "
                        f"--{split}-file, a .jsonl or .csv file or a folder saved by datasets") from error
    finally:
        for module, value in zip(switches, before):
            module.HF_HUB_OFFLINE = value
    return [(f"row {number}", row) for number, row in enumerate(data.to_list(), 1)]


def hub_answers(huggingface_hub):
    """Asked in a thread, because looking up a host name has no timeout of its own."""
    answers = []

    def ask():
        with contextlib.suppress(Exception):
            answers.append(huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_SECONDS))
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return bool(answers)


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
