"""What the README says of the file is true of it."""
import ast
import re
import shlex

import train_gpt2
from conftest import ROOT

README = (ROOT / "README.md").read_text()
SOURCE = (ROOT / "train_gpt2.py").read_text()
CHAPTERS = re.findall(r"^\| ([\d:]+) \| .* \| \[([\w.]+)\]\(train_gpt2\.py#L(\d+)\) \|", README, re.MULTILINE)


def defined():
    """-> name: line of everything that the file defines; methods as Class.method."""
    lines = {"docstring": 1}
    for node in ast.parse(SOURCE).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines[node.name] = node.lineno
        if isinstance(node, ast.ClassDef):
            lines |= {f"{node.name}.{f.name}": f.lineno for f in node.body if isinstance(f, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            lines |= {t.id: node.lineno for t in node.targets if isinstance(t, ast.Name)}
    return lines


def test_the_lecture_map_leads_to_the_code():
    assert len(CHAPTERS) == 31
    lines = defined()
    wrong = [f"{time}: {name} is in line {lines.get(name)}, not {line}" for time, name, line in CHAPTERS
             if lines.get(name) != int(line)]
    assert not wrong, "\n".join([*wrong, "PYTHONPATH=. python tests/test_readme.py mends the numbers"])


def test_every_chapter_stands_at_the_code_and_in_the_map():
    in_code = set(re.findall(r"\[(\d[\d:]*:\d\d)\]", SOURCE))
    assert in_code == {time for time, _, _ in CHAPTERS}


def test_every_command_in_the_readme_has_flags_that_exist():
    commands = [shlex.split(line.split("train_gpt2.py ", 1)[1]) for line in README.splitlines()
                if line.startswith("    ") and "train_gpt2.py -" in line]
    assert len(commands) >= 8
    for command in commands:
        given, shape = train_gpt2.parse_flags(command)
        assert given
        train_gpt2.TrainConfig(**given)


if __name__ == "__main__":  # writes the right line numbers into the README
    LINES = defined()
    (ROOT / "README.md").write_text(re.sub(r"\[([\w.]+)\]\(train_gpt2\.py#L\d+\)",
                                           lambda m: f"[{m[1]}](train_gpt2.py#L{LINES[m[1]]})", README))
