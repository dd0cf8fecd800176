"""HellaSwag against an answer worked out by hand and against a scorer that knows no batches."""
import json
import math
import random

import pytest
import torch

from conftest import ROOT, TINY_RUN, exit_code
from train_gpt2 import GPT, GPTConfig, UserError, evaluate_hellaswag, get_tokenizer, read_hellaswag


def write(path, examples):
    path.write_text("".join(json.dumps(dict(ctx=c, endings=e, label=label)) + "\n" for c, e, label in examples))
    return path


class Uniformish(torch.nn.Module):
    """A model with the same logits everywhere: " good" has the probability 1/2, the other tokens share the rest."""

    def __init__(self):
        super().__init__()
        self.config, self.lm_head = GPTConfig(), torch.nn.Linear(1, 1)
        self.logits = torch.zeros(50257)
        self.logits[get_tokenizer().encode_single_token(b" good")] = math.log(50256)

    def forward(self, idx):
        return self.logits.expand(*idx.shape, -1), None


def test_acc_and_acc_norm_by_hand(tmp_path):
    # Losses in nats: " good" ln 2 = 0.7, any other token ln 100512 = 11.5. Sum and mean of the endings:
    #   "good"            0.7 / 1 = 0.7        "bad"                     11.5 / 1 = 11.5
    #   "good good good"  2.1 / 3 = 0.7        "good bad good good"      13.6 / 4 = 3.4
    endings = ["bad", "good bad good good", "very bad", "bad bad bad"]
    examples = [
        ("It is", endings, 0),  # the lowest sum, 11.5, is ending 0's
        ("It is", endings, 1),  # the lowest mean, 3.4, is ending 1's
        ("It is", ["bad", "good", "very bad", "not"], 1),  # both are ending 1's
        ("It is", ["good", "bad"], 1),  # neither
    ]
    def score(*examples):
        return evaluate_hellaswag(Uniformish(), write(tmp_path / "h.jsonl", examples))

    assert score(*examples) == (2 / 4, 2 / 4)
    assert score(("It is good", ["bad", "good bad bad bad"], 1)) == (0, 1)  # the context's last token does not count
    assert score(("", ["bad", "good"], 1)) == (1, 1)  # after <|endoftext|>
    assert read_hellaswag(tmp_path / "h.jsonl")[0][0] == [50256]
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "h.jsonl").read_bytes())
    assert evaluate_hellaswag(Uniformish(), tmp_path / "bom.jsonl") == (1, 1)
    assert score(examples[0], examples[2]) == (1, 0.5)
    assert score(examples[1], examples[2]) == (0.5, 1)


def made_examples(n):
    words = (ROOT / "input.txt").read_text().split()
    rng = random.Random(0)

    def some(low, high):
        start = rng.randrange(len(words) - high)
        return " ".join(words[start:start + rng.randint(low, high)])

    return [(some(1, 40), [some(1, 12) for _ in range(4)], rng.randrange(4)) for _ in range(n)]


@torch.no_grad()
def score_one_by_one(model, context, endings):
    enc, losses = get_tokenizer(), []
    for ending in endings:
        ending = enc.encode(" " + ending)
        tokens = (enc.encode(context) + ending)[-model.config.block_size:]
        log_probs = model(torch.tensor([tokens]))[0][0].log_softmax(-1)
        new = range(max(1, len(tokens) - len(ending)), len(tokens))
        losses.append((sum(-log_probs[t - 1, tokens[t]].item() for t in new), len(new)))
    return losses


def test_against_a_scorer_without_batches(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=24))  # shorter than many of the contexts
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    examples = made_examples(30)
    right = right_norm = 0
    for context, endings, label in examples:
        losses = score_one_by_one(model, context, endings)
        right += min(range(4), key=lambda i: losses[i][0]) == label
        right_norm += min(range(4), key=lambda i: losses[i][0] / losses[i][1]) == label
    assert evaluate_hellaswag(model, write(tmp_path / "h.jsonl", examples)) == (right / 30, right_norm / 30)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"h\.jsonl is empty"):
        evaluate_hellaswag(Uniformish(), write(tmp_path / "h.jsonl", []))


@pytest.mark.parametrize("line", [
    "{", "[]", '{"ctx": "a", "endings": ["b"]}', '{"ctx": "a", "endings": ["b"], "label": 1}',
    '{"ctx": "a", "endings": ["b"], "label": -1}', '{"ctx": "a", "endings": 3, "label": 0}',
    '{"ctx": "a", "endings": ["b"], "label": ""}', '{"ctx": 5, "endings": ["b"], "label": 0}',
    '{"ctx": "a", "endings": [null], "label": 0}'])
def test_a_broken_line_is_refused(tmp_path, line):
    path = write(tmp_path / "h.jsonl", made_examples(2))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"h\.jsonl:3 has no ctx, endings and label"):
        evaluate_hellaswag(Uniformish(), path)


def test_through_the_command_line(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "h.jsonl", made_examples(6))
    assert exit_code(*TINY_RUN, "--data", text, "--hellaswag", path) == 0
    hella = [line.split() for line in (tmp_path / "log" / "log.txt").read_text().splitlines() if " hella " in line]
    assert [step for step, _, _ in hella] == ["0", "2", "4"]
    capsys.readouterr()
    assert exit_code("--init_from=resume", "--max_steps=0", "--num_samples=0", "--hellaswag", path) == 0
    alone = capsys.readouterr().out
    assert f"HellaSwag acc_norm {float(hella[-1][2]):.4f} | acc" in alone and "| 6 examples" in alone
    assert exit_code(*TINY_RUN, "--data", text, "--hellaswag=nowhere.jsonl", "--out_dir=other") == 1
    assert "nowhere.jsonl" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_blank_lines_are_no_examples(tmp_path):
    path = write(tmp_path / "h.jsonl", made_examples(2))
    path.write_text("\n" + path.read_text() + "\n\n")
    assert len(read_hellaswag(path)) == 2
