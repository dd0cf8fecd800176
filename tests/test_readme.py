"""What the README says of the file is true of it."""
import ast
import re
import shlex

import pytest
import tyro

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


COMMANDS = [line.split("train_gpt2.py ", 1)[1] for line in README.splitlines() if line.startswith("    ") and "train_gpt2.py --" in line]


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_readme_has_flags_that_exist(command):
    flags = shlex.split(command)
    cfg = tyro.cli(train_gpt2.TrainConfig, args=flags, use_underscores=True)
    names = [flag[2:].split("=")[0] for flag in flags if flag.startswith("--") and not flag.startswith("--no-")]
    changed = [name for name in names if getattr(cfg, name) != getattr(train_gpt2.TrainConfig(), name)]
    assert changed, "a command that changes nothing"


def test_the_file_stays_small():
    lines = SOURCE.splitlines()
    functions = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)]
    assert max(map(len, lines)) <= 110 and sum(len(line) > 100 for line in lines) <= 0.1 * len(lines)
    assert len(lines) <= 1265 and len(functions) <= 58
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 70
    assert len(README.splitlines()) <= 228


@pytest.mark.parametrize("name, numbers", [
    ("nano", vars(train_gpt2.TrainConfig())), ("gpt2", train_gpt2.LECTURE), ("finetuning", vars(train_gpt2.TrainConfig()) | train_gpt2.FINETUNE)])
def test_the_table_of_numbers_is_that_of_the_file(name, numbers):
    (row,) = [line.replace(",", "") for line in README.splitlines() if line.startswith(f"| {name}")]
    for field in "max_steps", "warmup_steps", "total_batch_size", "batch_size", "sequence_length":
        assert re.search(rf"\b{numbers[field]}\b", row), (name, field)
