"""The program as a user meets it: runs, files, bad input."""
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt2
from conftest import ROOT, TINY_RUN, exit_code, load_checkpoint
from train_gpt2 import GPT, TrainConfig, UserError, parse_flags

STEP_LINE = re.compile(
    r" +(\d+)/(\d+) \| loss \d+\.\d+ \| lr \S+ \| norm \d+\.\d+ \| \d+\.\d+ ms \| \d+ tok/s \| \d+m\d\ds left")


def test_a_run_from_start_to_samples(cli, text, tmp_path):
    done = cli(*TINY_RUN, "--data", text)
    assert done.returncode == 0, done.stderr
    assert [re.search(r"\w+", line)[0] for line in done.stdout.splitlines()[:4]] == ["device", "model", "reading", "0"]
    assert done.stdout.startswith("device: cpu (as asked), processes: 1\n")
    lines = [m for line in done.stdout.splitlines() if (m := STEP_LINE.fullmatch(line))]
    assert [(m[1], m[2]) for m in lines] == [(str(k), "4") for k in (1, 2, 3, 4)]
    records = [line.split() for line in (tmp_path / "log" / "log.txt").read_text().splitlines()]
    assert [(step, stream) for step, stream, _ in records] == [
        ("0", "val"), ("1", "train"), ("2", "train"), ("2", "val"), ("3", "train"), ("4", "train"), ("4", "val")]
    assert all(5 < float(value) < 12 for _, _, value in records)
    assert done.stdout.count("--- sample 1 of 2\nROMEO:\n") == 1 and "--- sample 2 of 2\nROMEO:\n" in done.stdout
    assert (tmp_path / "log" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert torch.load(tmp_path / "log" / "ckpt.pt", weights_only=True)["step"] == 4
    assert GPT.from_pretrained(tmp_path / "log" / "model").config.n_embd == 32
    assert sorted(p.name for p in (tmp_path / "log").iterdir()) == ["ckpt.pt", "log.txt", "loss.png", "model"]

    again = cli(*TINY_RUN, "--data", text)
    assert again.returncode == 1 and "--init_from resume" in again.stderr and "--overwrite" in again.stderr
    assert cli(*TINY_RUN, "--data", text, "--overwrite").stdout.count(" val loss ") == 3

    quiet = cli(*TINY_RUN, "--data", text, "--eval_every=0", "--log_every=3", "--out_dir=quiet").stdout
    assert [m[1] for line in quiet.splitlines() if (m := STEP_LINE.fullmatch(line))] == ["1", "3", "4"]
    records = (tmp_path / "quiet" / "log.txt").read_text().splitlines()
    assert [record[:7] for record in records] == ["3 train", "4 train"]  # the first line is only to be seen
    assert (tmp_path / "quiet" / "loss.png").exists()

    only_samples = cli("--init_from=resume", "--max_steps=0", "--num_samples=1", "--prompt=", "--temperature=0")
    assert only_samples.returncode == 0 and "--- sample\n<|endoftext|>" in only_samples.stdout


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_equals_uninterrupted_bit_for_bit(text, tmp_path, monkeypatch, optimizer):
    monkeypatch.chdir(tmp_path)
    # 2 micro-steps each, and more steps than an epoch has batches: 40,000 characters are about 12,000 tokens
    flags = [*TINY_RUN, "--data", str(text), "--optimizer", optimizer, "--batch_size=32", "--total_batch_size=1024",
             "--max_steps=24", "--save_every=5", "--eval_every=6", "--num_samples=0"]
    assert exit_code(*flags, "--out_dir=whole") == 0
    save_checkpoint = train_gpt2.save_checkpoint

    def killed_after_step_15(path, step, *rest):
        save_checkpoint(path, step, *rest)
        if step == 15:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_gpt2, "save_checkpoint", killed_after_step_15)
    assert exit_code(*flags, "--out_dir=parts") == 130
    with open("parts/log.txt", "a") as f:
        f.write("16 train 1.0\n")  # as if the run had got further than its checkpoint
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert exit_code("--init_from=resume", "--out_dir=parts") == 0
    assert Path("parts/log.txt").read_text() == Path("whole/log.txt").read_text()
    whole, parts = (load_checkpoint(Path(name) / "ckpt.pt") for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 24 and whole["position"] == parts["position"]
    for key in ("model", "optimizer"):
        torch.testing.assert_close(whole[key], parts[key], atol=0, rtol=0)

    with pytest.raises(UserError, match="--n_layer contradicts the model, a GPTConfig.*n_layer=2"):
        train_gpt2.run(parse_flags(["--init_from=resume", "--out_dir=parts", "--n_layer=3"]))
    with pytest.raises(UserError, match="--seed 2 contradicts parts/ckpt.pt, made with 1337"):
        train_gpt2.run(parse_flags(["--init_from=resume", "--out_dir=parts", "--seed=2"]))
    with pytest.raises(UserError, match="--max_steps 23 in all, but parts/ckpt.pt has 24"):
        train_gpt2.run(parse_flags(["--init_from=resume", "--out_dir=parts", "--max_steps=23"]))
    assert exit_code("--init_from=resume", "--out_dir=parts", "--max_steps=0") == 0  # only samples
    assert exit_code("--init_from=resume", "--out_dir=parts", "--max_steps=26", "--max_lr=1e-4", "--min_lr=1e-5") == 0
    assert load_checkpoint(Path("parts/ckpt.pt"))["step"] == 26


def test_an_update_that_becomes_the_last_by_resuming_is_evaluated(cli, text, tmp_path):
    assert cli(*TINY_RUN, "--data", text, "--max_steps=3", "--eval_every=0", "--num_samples=0").returncode == 0
    assert cli("--init_from=resume", "--eval_every=2").stdout.count("3/3 | val loss") == 1
    assert (tmp_path / "log" / "log.txt").read_text().count(" val ") == 1


def test_errors_without_a_text_are_sentences_too(monkeypatch, capsys):
    for error, said in (OSError(), "OSError()"), (MemoryError(), "smaller --model: MemoryError()"):
        def run(given, error=error):
            raise error

        monkeypatch.setattr(train_gpt2, "run", run)
        assert exit_code("--seed=1") == 1 and said in capsys.readouterr().err


def test_a_vocabulary_that_is_not_gpt2s_trains_on_its_own_tokens(tmp_path, cli):
    np.save(tmp_path / "train.npy", np.random.default_rng(0).integers(300, size=2000).astype(np.uint16))
    done = cli(*TINY_RUN, "--data=train.npy", "--vocab_size=300", "--num_samples=0")
    assert done.returncode == 0 and done.stdout.count("val loss") == 3 and "--- sample" not in done.stdout, done.stderr
    assert GPT.from_pretrained(tmp_path / "log" / "model").config.vocab_size == 300
    done = cli("--init_from=resume", "--max_steps=0", "--num_samples=1")
    assert done.returncode == 1 and "a text needs vocab_size 50257, not 300" in done.stderr


BAD_INPUT = [
    (["--batchsize=3"], "no flag --batchsize=3; did you mean --batch_size"),
    (["--lr=3"], "no flag --lr=3; did you mean --min_lr or --max_lr"),
    (["--compile", "False"], "there is no flag False"),
    (["--batch=3"], "no flag --batch=3; did you mean --batch_size"),
    (["--max_steps=many"], "invalid int value: 'many'"),
    (["--optimizer=sgd"], "invalid choice: 'sgd'"),
    (["--n_embd=100", "--n_head=3"], "--n_embd 100 is not a multiple of --n_head 3"),
    (["--n_layer=0"], "--n_layer must be a number of at least 1, not 0"),
    (["--n_embd=2000000", "--n_head=1"], "error: halve --batch_size, or take a smaller --model: "),
    (["--n_embd=4000000000000000000", "--n_head=1"], "error: halve --batch_size, or take a smaller --model: "),
    (["--temperature=-1"], "--temperature must be a number of at least 0, not -1.0"),
    (["--top_k=0"], "--top_k must be a number of at least 1, not 0"),
    (["--model=gpt3"], "--model gpt3 is not one of nano, "),
    (["--device=cuda:99"], "--device cuda:99 cannot be used"),
    (["--device=abacus"], "--device abacus cannot be used"),
    (["--data=nowhere.txt"], "--data nowhere.txt does not exist"),
    (["--data=."], "no token shards for train"),
    (["--data=empty.txt"], "--data too short, with 0 tokens"),
    (["--data=short.txt"], "--data too short, with"),
    (["--data=latin1.txt"], "--data latin1.txt cannot be read: 'utf-8' codec"),
    (["--total_batch_size=1000"], "1000 is not a multiple of --batch_size 4 x --sequence_length 16 x 1 processes"),
    (["--sequence_length=64", "--total_batch_size=256"], "--sequence_length 64 is over the block_size 32"),
    (["--vocab_size=300"], "a text needs vocab_size 50257, not 300"),
    (["--vocab_size=300", "--num_samples=0"], "--data has token"),
    (["--out_dir=empty.txt"], "empty.txt"),
    (["--init_from=pretrained"], "cannot load 'nano' as a GPT-2 model"),
    (["--init_from=pretrained", "--model=folder", "--data=no.txt"], "no.txt does not exist"),  # before any model
    (["--init_from=pretrained", "--model=folder"], "config.json"),
    (["--init_from=pretrained", "--model=nobody/nothing"], "nobody/nothing"),
    (["--init_from=pretrained", "--model=./nofolder"], "./nofolder"),
    (["--init_from=resume"], "cannot resume from log/ckpt.pt with this version: [Errno 2] No such file"),
]


@pytest.mark.parametrize("flags, message", BAD_INPUT, ids=[" ".join(flags) for flags, _ in BAD_INPUT])
def test_bad_input_gets_one_sentence(text, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("To be, or not to be.")
    (tmp_path / "latin1.txt").write_bytes("Zoë".encode("latin1") * 100)
    (tmp_path / "folder").mkdir()
    run = ["--device=cpu"] if flags[0] == "--init_from=pretrained" else TINY_RUN
    code = exit_code(*run, "--data", text, *flags)  # any other exception would be a stack trace
    err = capsys.readouterr().err
    assert code in (1, 2) and message in err, err
    assert len(err.strip().splitlines()) <= 2 and not (tmp_path / "log").exists()


def test_the_sentence_is_all_that_the_shell_shows(cli):
    done = cli("--data=nowhere.txt")
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (1, 1, "")
    assert done.stderr.startswith("train_gpt2.py: error: --data nowhere.txt does not exist")


@pytest.mark.parametrize("compile", ["--compile", "--no-compile"])
def test_a_bug_in_edited_code_shows_its_stack_trace(tmp_path, text, compile):
    source = (ROOT / "train_gpt2.py").read_text()
    assert source.count("contiguous().view(B, T, C)") == 1
    (tmp_path / "edited.py").write_text(source.replace("contiguous().view(B, T, C)", "contiguous().view(B, T, C + 1)"))
    done = subprocess.run([sys.executable, "edited.py", *TINY_RUN, "--data", text, compile], cwd=tmp_path, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 1 and "Traceback" in done.stderr and "view(B, T, C + 1)" in done.stderr, done.stderr


def test_a_bug_in_edited_code_shows_its_stack_trace_also_where_weights_are_loaded(tmp_path, hf_model):
    hf_model(vocab_size=50257).save_pretrained(tmp_path / "model")
    source = (ROOT / "train_gpt2.py").read_text()
    (tmp_path / "edited.py").write_text(source.replace("self.n_head = config.n_head", "self.n_head = config.nhead"))
    done = subprocess.run([sys.executable, "edited.py", "--init_from=pretrained", "--model=model", "--max_steps=0"],
                          cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert done.returncode == 1 and "Traceback" in done.stderr and "config.nhead" in done.stderr, done.stderr


def test_a_hellaswag_file_is_looked_for_before_anything_is_lost(cli, text, tmp_path):
    assert cli(*TINY_RUN, "--data", text).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "log").iterdir() if path.is_file()}
    done = cli(*TINY_RUN, "--data", text, "--overwrite", "--hellaswag=nowhere.jsonl")
    assert done.returncode == 1 and "--hellaswag nowhere.jsonl does not exist" in done.stderr
    assert before == {path: path.read_bytes() for path in (tmp_path / "log").iterdir() if path.is_file()}


def test_an_overflow_before_a_sample_is_a_sentence(cli, text):
    done = cli(*TINY_RUN, "--data", text, "--max_lr=1e6", "--min_lr=1e6", "--warmup_steps=0", "--eval_every=1", "--dtype=float32")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "not finite" in done.stderr, done.stderr


def test_without_section_8_everything_works(tmp_path, text):
    source = (ROOT / "train_gpt2.py").read_text()
    start, end = source.index("# 8 Faster on a CPU"), source.index('if __name__ == "__main__"')
    source = source[:start] + source[end:]
    call = '    if device.type == "cpu":\n        faster_on_a_cpu(model)\n'
    assert source.count(call) == 1
    (tmp_path / "plain.py").write_text(source.replace(call, ""))
    done = subprocess.run([sys.executable, "plain.py", *TINY_RUN, "--data", text], cwd=tmp_path, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0 and "4/4 | val loss" in done.stdout, done.stderr


def test_without_a_compiler_training_goes_on(cli, text, tmp_path):
    done = cli(*TINY_RUN, "--data", text, "--compile", env={"CXX": str(tmp_path / "no_compiler"), "PATH": "",
                                                            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert done.returncode == 0 and "4/4 | val loss" in done.stdout, done.stderr
    assert "warning: torch.compile does not work, going on without: " in done.stdout


def test_output_in_a_narrow_encoding(tmp_path):
    """Into a file on Windows goes cp1252, which lacks most characters."""
    flags = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--max_steps=0", "--num_samples=1", "--max_new_tokens=30"]
    done = subprocess.run([sys.executable, ROOT / "train_gpt2.py", *flags, "--prompt", "你好 🙂"], cwd=tmp_path,
                          capture_output=True, timeout=120, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and b"--- sample\n?? ?" in done.stdout, done.stderr


def test_a_gpu_that_torch_cannot_use_is_named(monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    assert train_gpt2.start_process("auto").type == "cpu"
    out = capsys.readouterr().out
    assert re.search(r"no GPU found; torch's CUDA: (None|[\d.]+); install the torch for the CUDA of the NVIDIA driver", out)


def test_help_explains_every_knob(cli):
    out = " ".join(cli("--help").stdout.split())
    for flag in ("--model", "--n_embd", "--temperature", "--compile, --no-compile", "--top_k"):
        assert flag in out
    assert "sequences in one micro-step of one process (default:" in out
    assert "attention heads in a block" in out


def test_flags_are_the_fields():
    given = parse_flags(["--max_steps", "7", "--no-compile", "--max_lr=0.5", "--n_layer=3", "--optimizer=adamw"])
    assert given == dict(max_steps=7, compile=False, max_lr=0.5, optimizer="adamw", n_layer=3)
    assert given.pop("n_layer") == 3 and TrainConfig(**given).max_steps == 7


def test_importing_runs_nothing():
    code = "import sys, train_gpt2; assert not {'transformers', 'tiktoken', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
