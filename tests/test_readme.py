"""What the README says of the file is true of it."""
import ast
import re
import shlex

import train_gpt2
from conftest import ROOT

README = (ROOT / "README.md").read_text()
SOURCE = (ROOT / "train_gpt2.py").read_text()
CHAPTERS = re.findall(r"^\| ([\d:]+) \| .* \| (?:`([\w.]+)`|section (\d)) \| .*\|$", README, re.MULTILINE)


def places():
    """-> {name: its lines} of all that the file defines, methods as method and as Class.method, and its sections."""
    lines, found = SOURCE.splitlines(), dict(re.findall(r"(?ms)^# (\d) (.*?)(?=^# \d |\Z)", SOURCE))
    for node in ast.parse(SOURCE).body:
        for child in [node, *(node.body if isinstance(node, ast.ClassDef) else [])]:
            targets = [target.id for target in getattr(child, "targets", []) if isinstance(target, ast.Name)]
            for name in [child.name] if hasattr(child, "name") else targets:
                text = "\n".join(lines[child.lineno - 1:child.end_lineno])
                found[name] = found[f"{getattr(node, 'name', '')}.{name}"] = text
    return found


def test_the_lecture_map_leads_to_the_code():
    assert len(CHAPTERS) == 30
    for time, name, section in CHAPTERS:
        assert f"[{time}]" in places()[name or section], f"{time} does not stand in {name or section}"


def test_every_chapter_stands_at_the_code_and_in_the_map():
    in_code = set(re.findall(r"\[(\d[\d:]*:\d\d)\]", SOURCE)) - {"0:00"}  # the example in the docstring
    assert in_code == {time for time, _, _ in CHAPTERS}


def test_every_command_in_the_readme_has_flags_that_exist():
    commands = [shlex.split(line.split("train_gpt2.py ", 1)[1]) for line in README.splitlines()
                if line.startswith("    ") and "train_gpt2.py -" in line]
    assert len(commands) >= 8
    for command in commands:
        given = train_gpt2.parse_flags([flag for flag in command if flag != "..."])
        assert given
        train_gpt2.TrainConfig(**{k: v for k, v in given.items() if not hasattr(train_gpt2.GPTConfig, k)})


def test_the_file_stays_small():
    lines = SOURCE.splitlines()
    functions = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)]
    assert max(map(len, lines)) <= 110 and sum(len(line) > 100 for line in lines) <= 0.1 * len(lines)
    assert len(lines) <= 1_317 and len(functions) <= 60
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 70
    assert len(README.splitlines()) <= 230


def test_the_table_of_recipes_is_that_of_the_file():
    rows = {row.split(" | ")[0][2:]: row.replace(",", "") for row in README.splitlines() if row.startswith("| l") or "| finetune" in row}
    for name in "laptop", "lecture", "finetune":
        numbers = vars(train_gpt2.TrainConfig()) | train_gpt2.RECIPES[name]
        for field in "max_steps", "warmup_steps", "total_batch_size", "batch_size", "sequence_length":
            assert re.search(rf"\b{numbers[field]}\b", rows[name]), (name, field)
