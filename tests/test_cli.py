"""The program as a user meets it: runs, files, bad input."""
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt2
from conftest import NANO, ROOT, TINY_RUN, exit_code, load_checkpoint
from test_hellaswag import made_examples, write
from train_gpt2 import GPT, MODELS, GPTConfig, TrainConfig, UserError, read_flags

STEP_LINE = re.compile(
    r" +(\d+)/(\d+) \| loss \d+\.\d+ \| lr \S+ \| norm \d+\.\d+ \| \d+\.\d+ ms \| \d+ tok/s \| \d+m\d\ds left")


def test_a_run_from_start_to_samples(cli, text, tmp_path, monkeypatch, capsys):
    done = cli(*TINY_RUN, "--data", text)
    assert done.returncode == 0, done.stderr
    heads = [line.split(":")[0] for line in done.stdout.splitlines() if not line.startswith("warning: ")]
    assert heads[:5] == ["device", "model", "training", "tokens per step", "reading " + str(text)]
    assert "device: cpu, processes: 1\n" in done.stdout
    assert "vocab_size=50304" in done.stdout and "max_lr 0.015" in done.stdout and "tokens per step: 64 = " in done.stdout
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
    assert sorted(p.name for p in (tmp_path / "log").glob("[!.]*")) == ["ckpt.pt", "log.txt", "loss.png", "model"]
    last = records[-1]
    assert f"log/ holds ckpt.pt, log.txt, loss.png, model; model is step 4's, validation loss {float(last[2]):.4f}" in done.stdout

    monkeypatch.chdir(tmp_path)
    assert exit_code(*TINY_RUN, "--data", text) == 1
    err = capsys.readouterr().err
    assert "--init_from resume" in err and "--overwrite" in err
    assert exit_code(*TINY_RUN, "--data", text, "--overwrite") == 0 and capsys.readouterr().out.count(" val loss ") == 3
    assert exit_code("--init_from=resume", "--overwrite") == 1 and "cannot change --overwrite from False to True" in capsys.readouterr().err

    assert exit_code(*TINY_RUN, "--data", text, "--eval_every=0", "--log_every=3", "--out_dir=quiet") == 0
    assert [m[1] for line in capsys.readouterr().out.splitlines() if (m := STEP_LINE.fullmatch(line))] == ["1", "3", "4"]
    records = (tmp_path / "quiet" / "log.txt").read_text().splitlines()
    assert [record[:7] for record in records] == ["3 train", "4 train"]  # the first line is only to be seen
    assert (tmp_path / "quiet" / "loss.png").exists()

    assert exit_code("--init_from=resume", "--max_steps=0", "--num_samples=1", "--prompt=", "--temperature=0") == 0
    assert "--- sample 1 of 1\n<|endoftext|>" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_equals_uninterrupted_bit_for_bit(text, tmp_path, monkeypatch, optimizer):
    monkeypatch.chdir(tmp_path)
    # 2 micro-steps each, and more steps than an epoch has batches: 10,000 characters are about 3,000 tokens
    text.write_text(text.read_text()[:10_000])
    flags = [*TINY_RUN, "--data", str(text), "--optimizer", optimizer, "--batch_size=8", "--total_batch_size=256",
             "--max_steps=24", "--save_every=5", "--eval_every=6", "--num_samples=0"]
    assert exit_code(*flags, "--out_dir=whole") == 0
    save_run = train_gpt2.save_run

    def killed_after_step_15(step, *rest):
        save_run(step, *rest)
        if step == 15:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_gpt2, "save_run", killed_after_step_15)
    assert exit_code(*flags, "--out_dir=parts") == 130
    with open("parts/log.txt", "a") as f:
        f.write("16 train 1.0\n")  # as if the run had got further than its checkpoint
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert exit_code("--init_from=resume", "--out_dir=parts") == 0
    assert Path("parts/log.txt").read_text() == Path("whole/log.txt").read_text()
    whole, parts = (load_checkpoint(Path(name) / "ckpt.pt") for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 24 and whole["position"] == parts["position"]
    for key in ("model", "optimizers"):
        torch.testing.assert_close(whole[key], parts[key], atol=0, rtol=0)

    changes = {"--n_layer=3": "cannot change --n_layer from 2 to 3: .*weights",
               "--max_steps=23": "--max_steps 23 in all, but the checkpoint is at step 24",
               "--model=gpt2": "cannot change --model from nano to gpt2: .*weights",
               f"--optimizer={'muon' if optimizer == 'adamw' else 'adamw'}": f"cannot change --optimizer from {optimizer} to .*: .*state",
               "--seed=2": "cannot change --seed from 1337 to 2: ", "--no-shuffle": "--shuffle from True to False: ",
               "--sequence_length=8": "cannot change --sequence_length from 16 to 8: ",
               "--overwrite": "cannot change --overwrite from False to True: it starts a new run"}
    for flag, message in changes.items():
        with pytest.raises(UserError, match=message):
            train_gpt2.run(read_flags(["--init_from=resume", "--out_dir=parts", flag]))
    assert Path("parts/log.txt").read_text() == Path("whole/log.txt").read_text()
    with open("parts/log.txt", "a") as f:
        f.write("99 train 1.0\n")  # as if the run had got further than its checkpoint
    assert exit_code("--init_from=resume", "--out_dir=parts", "--num_samples=0") == 0  # no step is left
    assert Path("parts/log.txt").read_text() == Path("whole/log.txt").read_text()
    assert exit_code("--init_from=resume", "--out_dir=parts", "--max_steps=0") == 0  # only samples
    assert exit_code("--init_from=resume", "--out_dir=parts", "--max_steps=26", "--max_lr=1e-4", "--min_lr=1e-5") == 0
    assert load_checkpoint(Path("parts/ckpt.pt"))["step"] == 26


def test_an_update_that_becomes_the_last_by_resuming_is_evaluated(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*TINY_RUN, "--data", text, "--max_steps=3", "--eval_every=0", "--num_samples=0") == 0
    assert exit_code("--init_from=resume", "--eval_every=2") == 0 and capsys.readouterr().out.count("3/3 | val loss") == 1
    assert (tmp_path / "log" / "log.txt").read_text().count(" val ") == 1


def test_errors_without_a_text_are_sentences_too(monkeypatch, capsys):
    for error, said in (OSError(), "OSError()"), (MemoryError(), "smaller --model: MemoryError()"):
        def run(cfg, error=error):
            raise error

        monkeypatch.setattr(train_gpt2, "run", run)
        assert exit_code("--seed=1") == 1 and said in capsys.readouterr().err


def test_a_vocabulary_that_is_not_gpt2s_trains_on_its_own_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "train.npy", np.random.default_rng(0).integers(300, size=2000).astype(np.uint16))
    assert exit_code(*TINY_RUN, "--data=train.npy", "--vocab_size=300", "--num_samples=0") == 0
    out = capsys.readouterr().out
    assert out.count("val loss") == 3 and "--- sample" not in out
    assert GPT.from_pretrained(tmp_path / "log" / "model").config.vocab_size == 300
    assert exit_code("--init_from=resume", "--max_steps=0", "--num_samples=1") == 1
    assert "need GPT-2's 50257 tokens, but the model has 300: add --num_samples 0" in capsys.readouterr().err
    assert exit_code(*TINY_RUN, "--data=train.npy", "--num_samples=0", "--vocab_size=60000", "--out_dir=more", "--max_steps=1") == 0
    assert GPT.from_pretrained(tmp_path / "more" / "model").config.vocab_size == 60000  # all of its rows are exported


BAD_FLAGS = [
    ("--batchsize=3", ["Unrecognized options: --batchsize=3", "--batch_size INT"]),
    ("--lr=3", ["Unrecognized options: --lr=3"]),
    ("--batch=3", ["Unrecognized options: --batch=3"]),
    ("--compile False", ["Unrecognized options: False"]),
    ("stray", ["Unrecognized options: stray"]),
    ("--max_steps", ["Missing value for argument '--max_steps'"]),
    ("--max_steps=many", ["Error parsing --max_steps", "'many'"]),
    ("--max_steps=1.5", ["Error parsing --max_steps", "'1.5'"]),
    ("--optimizer=sgd", ["invalid choice 'sgd' for argument '--optimizer'", "'adamw'", "'muon'"]),
]


@pytest.mark.parametrize("flags, said", BAD_FLAGS, ids=[flags for flags, _ in BAD_FLAGS])
def test_what_no_flag_takes_is_said_with_exit_code_2(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*TINY_RUN, *flags.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and all(words in err for words in said) and not list(tmp_path.iterdir()), err


BAD_INPUT = [
    (["--min_lr=1", "--max_lr=0.5"], "--min_lr 1.0 is over --max_lr 0.5"),
    (["--n_embd=100", "--n_head=3"], "--n_embd 100 is not a multiple of --n_head 3"),
    (["--n_layer=0"], "--n_layer must be a whole number of at least 1, not 0"),
    (["--n_embd=2000000", "--n_head=1"], "error: halve --batch_size, or take a smaller --model: "),
    (["--n_embd=4000000000000000000", "--n_head=1"], "error: halve --batch_size, or take a smaller --model: "),
    (["--temperature=-1"], "--temperature must be a finite number of at least 0, not -1.0"),
    (["--top_k=-1"], "--top_k must be a whole number of at least 0, not -1"),
    (["--model=gpt3"], "--model gpt3 is not one of nano, "),
    (["--device=cuda:99"], "--device cuda:99 cannot be used"),
    (["--device=abacus"], "--device abacus cannot be used"),
    (["--data=nowhere.txt"], "--data nowhere.txt does not exist"),
    (["--data=folder"], "--data folder holds no .npy, .bin, .jsonl or .txt"),
    (["--data=allocated.txt"], "error: --data allocated.txt does not exist"),
    (["--data=empty.txt"], "its train split has 0 tokens, and a window of --sequence_length 16 takes 17"),
    (["--data=short.txt"], "its train split has "),
    (["--data=latin1.txt"], "cannot read latin1.txt as UTF-8: 'utf-8' codec can't decode byte 0xeb"),
    (["--data=char"], "char/train.bin: the meta.pkl beside it says that its tokens are characters; give the text itself"),
    (["--data=char/train.bin"], "char/train.bin: the meta.pkl beside it says that its tokens are characters; give the text itself"),
    (["--hellaswag=short.txt"], "--hellaswag short.txt:1 has no ctx, endings and label"),
    (["--total_batch_size=1000"], "--total_batch_size 1000 is not a multiple of --sequence_length 16 x 1 processes"),
    (["--sequence_length=64", "--total_batch_size=256"], "--sequence_length 64 is over --block_size 32"),
    (["--vocab_size=300"], "samples and HellaSwag need GPT-2's 50257 tokens, but the model has 300: add --num_samples 0"),
    (["--vocab_size=300", "--num_samples=0"], "but the model has only 300 tokens (--vocab_size)"),
    (["--vocab_size=60", "--num_samples=0", "--data=tokens/val.bin"], "val.bin has token 64, but the model has only 60 tokens (--vocab_size)"),
    (["--out_dir=empty.txt"], "empty.txt"),
    (["--init_from=pretrained"], "cannot load gpt2 as a GPT-2 model id or a local folder"),
    (["--init_from=pretrained", "--model=folder"], "cannot load folder: no config.json in "),
    (["--init_from=pretrained", "--model=nobody/nothing"], "nobody/nothing"),
    (["--init_from=pretrained", "--model=./nofolder"], "./nofolder"),
    (["--init_from=resume", "--out_dir=log3"], "no run to resume in log3: there is no log3/ckpt.pt"),
    (["--write_shards=char"], "--write_shards char is not empty"),
    (["--write_shards=new", "--data=tokens/val.bin"], "--data tokens/val.bin holds tokens already"),
]


@pytest.mark.parametrize("flags, message", BAD_INPUT, ids=[" ".join(flags) for flags, _ in BAD_INPUT])
def test_bad_input_gets_one_sentence(text, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("To be, or not to be.")
    (tmp_path / "latin1.txt").write_bytes("Zoë".encode("latin1") * 100)
    (tmp_path / "folder").mkdir()
    (tmp_path / "char").mkdir()
    for name in "train.bin", "val.bin":
        (np.arange(1000) % 65).astype("<u2").tofile(tmp_path / "char" / name)
    (tmp_path / "char" / "meta.pkl").write_bytes(b"not to be unpickled")
    (tmp_path / "char" / "input.txt").write_text("nanoGPT's folders hold the text beside its tokens")
    (tmp_path / "tokens").mkdir()
    shutil.copy(tmp_path / "char" / "val.bin", tmp_path / "tokens")
    run = ["--device=cpu"] if flags[0] == "--init_from=pretrained" else TINY_RUN
    code = exit_code(*run, "--data", text, *flags)  # any other exception would be a stack trace
    err = capsys.readouterr().err
    assert code == 1 and message in err and err.startswith("train_gpt2.py: error: "), err
    assert len(err.splitlines()) == 1 and not list(tmp_path.glob("log*/[!.]*"))


def test_only_what_a_run_made_stays_in_out_dir(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*TINY_RUN, "--data", text, "--device=abacus") == 1 and not Path("log").exists()
    assert exit_code(*TINY_RUN, "--data", text, "--max_steps=1", "--num_samples=0") == 0
    assert sorted(path.name for path in Path("log").iterdir()) == [".lock", "ckpt.pt", "log.txt", "loss.png", "model"]


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


def test_a_hellaswag_file_is_looked_for_before_anything_is_lost(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*TINY_RUN, "--data", text) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "log").iterdir() if path.is_file()}
    assert exit_code(*TINY_RUN, "--data", text, "--overwrite", "--hellaswag=nowhere.jsonl") == 1
    assert "cannot read --hellaswag nowhere.jsonl: [Errno 2]" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "log").iterdir() if path.is_file()}


def test_a_text_that_speaks_of_memory_is_no_lack_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin1.txt").write_bytes("Zoë could not allocate the river that overflowed, out of memory".encode("latin1"))
    assert exit_code(*TINY_RUN, "--data=latin1.txt") == 1
    err = capsys.readouterr().err
    assert "cannot read latin1.txt as UTF-8" in err and "halve" not in err


def test_an_overflow_before_a_sample_is_a_sentence(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--max_lr=1e6", "--min_lr=1e6", "--warmup_steps=0", "--eval_every=1", "--dtype=float32"]
    assert exit_code(*TINY_RUN, "--data", text, *flags) == 1 and "not finite" in capsys.readouterr().err


def test_without_section_8_everything_works(tmp_path, text):
    source = (ROOT / "train_gpt2.py").read_text()
    start, end = source.index("# 8 Faster on a CPU"), source.rindex('if __name__ == "__main__"')
    source = source[:start] + source[end:]
    source, n = re.subn(r' +if device.type == "cpu":\n +faster_on_a_cpu\(model\)\n', "", source)
    assert n == 1
    (tmp_path / "plain.py").write_text(source)
    done = subprocess.run([sys.executable, "plain.py", *TINY_RUN, "--data", text], cwd=tmp_path, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0 and "4/4 | val loss" in done.stdout, done.stderr


def test_without_a_compiler_training_goes_on(cli, text, tmp_path):
    done = cli(*TINY_RUN, "--data", text, "--compile", env={"CXX": str(tmp_path / "no_compiler"), "PATH": "",
                                                            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert done.returncode == 0 and "4/4 | val loss" in done.stdout, done.stderr
    assert "warning: torch.compile does not work, continuing without it: " in done.stdout


def test_output_in_a_narrow_encoding(tmp_path):
    """Into a file on Windows goes cp1252, which lacks most characters."""
    flags = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--max_steps=0", "--num_samples=1", "--max_new_tokens=30"]
    done = subprocess.run([sys.executable, ROOT / "train_gpt2.py", *flags, "--prompt", "你好 🙂"], cwd=tmp_path,
                          capture_output=True, timeout=120, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and b"--- sample 1 of 1\n?? ?" in done.stdout, done.stderr


def test_a_gpu_that_torch_cannot_use_is_named(monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    assert train_gpt2.start_process("auto").type == "cpu"
    out = capsys.readouterr().out
    assert re.search(r"device: cpu, processes: 1\nwarning: this torch.* CUDA (None|[\d.]+).* cannot use the NVIDIA driver here\n", out)


def test_several_processes_without_cuda_run_on_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("mps"))
    monkeypatch.setattr(train_gpt2, "WORLD_SIZE", 2)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, device_id: backends.append(backend))
    backends = []
    assert train_gpt2.start_process("auto").type == "cpu" and backends == ["gloo"]
    with pytest.raises(UserError, match="--device meta cannot be used: several processes need CUDA or the CPU"):
        train_gpt2.start_process("meta")


def test_help_explains_every_knob(cli):
    out = " ".join(cli("--help").stdout.replace("│", " ").split())
    for flag in ("--model", "--n_embd", "--temperature", "--compile, --no_compile", "--top_k"):
        assert flag in out
    assert "sequences that a process takes at once, at most (default: 16)" in out
    assert "attention heads per block" in out


def test_flags_are_the_fields():
    flags = "--max_steps 70 --no-compile --no_shuffle --max_lr=0.5 --n_layer=3 --optimizer=adamw --min_lr None --prompt=a=b"
    given = dict(max_steps=70, compile=False, shuffle=False, max_lr=0.5, n_layer=3, optimizer="adamw", prompt="a=b")
    assert read_flags(flags.split()) == replace(TrainConfig(), model="nano", warmup_steps=60, **given)


@pytest.mark.parametrize("model", ["nano", "gpt2"])
def test_a_flag_wins_also_where_its_value_is_a_default(model):
    numbers = dict(max_steps=600, warmup_steps=20, total_batch_size=1024, sequence_length=64, max_lr=1.5e-2, n_layer=6, eval_every=200)
    for optimizer in "adamw", "muon":
        given = numbers | dict(optimizer=optimizer)
        cfg = read_flags([f"--model={model}", *(f"--{name}={value}" for name, value in given.items())])
        assert vars(cfg) == vars(TrainConfig()) | MODELS[model] | given | dict(model=model)


@pytest.mark.parametrize("flags, numbers", [
    ([], (2e-3, 60)), (["--optimizer=muon"], (1.5e-2, 20)), (["--optimizer=muon", "--warmup_steps=7"], (1.5e-2, 7)), (["--max_lr=1"], (1, 60))])
def test_the_optimizer_that_wins_decides_the_rate(monkeypatch, flags, numbers):
    monkeypatch.setitem(MODELS, "mine", dict(optimizer="adamw"))
    cfg = read_flags(["--model=mine", *flags])
    assert (cfg.max_lr, cfg.warmup_steps) == numbers


def test_help_shows_the_numbers_of_what_is_trained(capsys):
    for flags, max_steps, max_lr in (["--help"], 600, 0.015), (["--model=gpt2", "--help"], 19073, 0.0006), (["-h", "--max_steps=7"], 600, 0.015):
        assert exit_code(*flags) == 0
        out = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert f"optimizer steps in total; 0: none, only sample (default: {max_steps})" in out and f"with Muon (default: {max_lr})" in out


WARNINGS = [
    ("--model=gpt2 --max_steps=0 --prompt=Hello", "these weights are random; --init_from pretrained loads GPT-2's"),
    ("--max_steps=0 --num_samples=0 --hellaswag=h.jsonl", "these weights are random; --init_from pretrained loads GPT-2's"),
    ("--block_size=256", "positions 64 to 255 are never trained; --sequence_length 256 trains them"),
    ("--sequence_length=32", "positions 32 to 63 are never trained; --sequence_length 64 trains them"),
    ("--model=gpt2 --max_steps=100", "--warmup_steps 715 is longer than the run"),
    ("--max_steps=19", "--warmup_steps 20 is longer than the run"),
    ("", ""), ("--model=gpt2", ""), ("--max_steps=20", ""), ("--block_size=256 --sequence_length=256", ""), ("--max_steps=0 --num_samples=0", ""),
]


@pytest.mark.parametrize("flags, warning", WARNINGS, ids=[flags for flags, _ in WARNINGS])
def test_what_is_unusual_and_allowed_gets_one_line(capsys, flags, warning):
    read_flags(flags.split())
    assert capsys.readouterr().out == (f"warning: {warning}\n" if warning else "")


def test_a_row_that_a_user_adds_to_MODELS_trains(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row, given = dict(n_layer=2, n_head=2, n_embd=16, block_size=32, grad_clip=0.5), dict(max_steps=2, num_samples=0, eval_every=0, compile=False)
    monkeypatch.setitem(MODELS, "mini", row)
    flags = ["--max_steps=2", "--num_samples=0", "--eval_every=0", "--no-compile"]
    assert exit_code("--model=mini", "--data", text, *flags) == 0
    numbers = vars(TrainConfig()) | row | given | dict(model="mini", data=str(text), sequence_length=32)
    assert load_checkpoint("log/ckpt.pt")["train_config"] == numbers
    assert exit_code("--init_from=resume", "--max_steps=3") == 0 and load_checkpoint("log/ckpt.pt")["step"] == 3
    assert read_flags(["--model=mini", "--optimizer=adamw"]).max_lr == read_flags(["--optimizer=adamw"]).max_lr == 2e-3


def test_importing_runs_nothing():
    code = "import sys, train_gpt2; assert not {'transformers', 'tiktoken', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


SHAPE_FIELDS = """    dropout: float = 0.0
    bias: bool = True # na\u00efve
    window: int | None = None
    act: str = "gelu"  # of the MLP
"""
TRAIN_FIELDS = """    decay: float = 0.1
    depth: int | None = None # na\u00efve
    name: str|None = None
    nesterov: bool = True
    debug: bool = False#on
    every: int = 3
    kind: Literal["a", "b"] = "a"  # of two
    note: str = ""
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
"""


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """train_gpt2.py with SHAPE_FIELDS in GPTConfig and TRAIN_FIELDS in TrainConfig, imported as a module."""
    source = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    for field, new in ("    n_layer: int = 12 ", SHAPE_FIELDS), ("    max_steps: int = 600 ", TRAIN_FIELDS):
        assert source.count(field) == 1
        source = source.replace(field, new + field)
    (tmp_path / "edited.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("edited")
    del sys.modules["edited"]


def test_a_new_field_is_a_flag(edited):
    """With and without a comment, with and without spaces before it, of every simple type, in both classes."""
    flags = ("--dropout=0.5 --no_bias --window=8 --act relu --decay 0 --depth 3 --name x --no-nesterov --debug --every=4 --kind=b "
             "--note=y --betas 0.8 0.9")
    given = dict(dropout=0.5, bias=False, window=8, act="relu", decay=0.0, depth=3, name="x", nesterov=False, debug=True, every=4,
                 kind="b", note="y", betas=(0.8, 0.9))
    assert edited.read_flags(flags.split()) == replace(edited.TrainConfig(), model="nano", **given)
    assert edited.read_flags(["--depth=None", "--debug"]) == replace(edited.TrainConfig(), model="nano", debug=True)


def test_a_new_field_is_explained_whatever_the_locale(edited, tmp_path):
    env = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "edited.py", "--help"], cwd=tmp_path, capture_output=True, env=env)
    out = " ".join(done.stdout.decode().replace("│", " ").split())
    assert done.returncode == 0 and "--dropout FLOAT (default: 0.0)" in out and "--act STR of the MLP (default: gelu)" in out, done.stderr
    assert "--depth {None}|INT na\u00efve (default: None)" in out and "--every INT (default: 3)" in out and "on (default: False)" in out


def test_a_new_field_of_the_model_may_be_0_and_reaches_it(edited, text, capsys):
    """As in the first thing that everybody adds, dropout; from scratch, resumed and pretrained."""
    tiny = [*TINY_RUN, "--data", str(text), "--max_steps=1", "--num_samples=0"]
    edited.main([*tiny, "--dropout=0.2", "--depth=3"])
    saved = load_checkpoint("log/ckpt.pt")["train_config"]
    assert (saved["dropout"], saved["depth"], saved["act"]) == (0.2, 3, "gelu") and "dropout=0.2" in capsys.readouterr().out
    edited.main(["--init_from=resume", "--max_steps=2"])
    assert "dropout=0.2" in capsys.readouterr().out
    for flags, dropout in ([], 0.0), (["--dropout=0.3"], 0.3):
        edited.main(["--init_from=pretrained", "--model=log/model", "--max_steps=0", "--num_samples=0", *flags])
        assert f"dropout={dropout}" in capsys.readouterr().out


def test_variables_left_over_from_other_programs(cli, text):
    left_over = dict(SLURM_PROCID="1", SLURM_NTASKS="2", RANK="1", WORLD_SIZE="2", LOCAL_RANK="3", OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="4")
    done = cli(*TINY_RUN, "--data", text, "--max_steps=1", "--num_samples=0", env=left_over)
    assert done.returncode == 0 and "processes: 1\n" in done.stdout and "1/1 | val loss" in done.stdout, done.stderr


def test_one_process_writes_the_shards(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for rank in 1, 0:
        monkeypatch.setattr(train_gpt2, "RANK", rank)
        assert exit_code("--data", text, "--write_shards=shards") == 0
        assert Path("shards").exists() == (rank == 0)


def test_an_earlier_run_without_a_checkpoint_is_not_overwritten(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*TINY_RUN, "--data", text, "--save_every=0", "--num_samples=0"]
    assert exit_code(*flags) == 0
    before = Path("log/log.txt").read_text(), Path("log/model/model.safetensors").read_bytes()
    assert exit_code(*flags, "--seed=2") == 1 and "log/log.txt exists" in capsys.readouterr().err
    Path("log/log.txt").unlink()
    assert exit_code(*flags, "--seed=2") == 1 and "log/model exists" in capsys.readouterr().err
    assert Path("log/model/model.safetensors").read_bytes() == before[1]
    assert exit_code(*flags, "--seed=2", "--overwrite") == 0 and Path("log/log.txt").read_text() != before[0]


def test_a_hellaswag_file_that_is_gone_is_missed_before_training_goes_on(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "h.jsonl", made_examples(2))
    assert exit_code(*TINY_RUN, "--data", text, "--hellaswag=h.jsonl", "--num_samples=0") == 0
    (tmp_path / "h.jsonl").unlink()
    capsys.readouterr()
    assert exit_code("--init_from=resume", "--max_steps=8") == 1
    out, err = capsys.readouterr()
    assert "cannot read --hellaswag h.jsonl: [Errno 2]" in err and "loss" not in out


def test_hellaswag_is_scored_at_the_end_also_without_evaluation(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "h.jsonl", made_examples(3))
    assert exit_code(*TINY_RUN, "--data", text, "--hellaswag=h.jsonl", "--eval_every=0", "--num_samples=0") == 0
    assert [line for line in Path("log/log.txt").read_text().splitlines() if " hella " in line][0].startswith("4 hella")


def test_stdout_without_reconfigure(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as in a notebook
    assert exit_code("--n_layer=1", "--n_head=1", "--n_embd=8", "--max_steps=0", "--num_samples=1", "--max_new_tokens=3") == 0
    assert "--- sample 1 of 1\nROMEO:" in sys.stdout.getvalue()


def test_out_of_memory_while_compiling_is_not_taken_for_a_broken_compiler(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def compile(model):
        def run(*args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return run

    monkeypatch.setattr(torch, "compile", compile)
    assert exit_code(*TINY_RUN, "--data", text, "--compile") == 1
    out, err = capsys.readouterr()
    assert "does not work" not in out and "error: halve --batch_size, or take a smaller --model: CUDA out of memory" in err


def test_an_overfitting_run_keeps_its_best_weights(tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text((ROOT / "input.txt").read_text()[:3000])
    flags = [*TINY_RUN, "--data=text.txt", "--max_steps=60", "--eval_every=10", "--eval_batches=0", "--num_samples=0", "--max_lr=0.05",
             "--dtype=float32"]
    assert exit_code(*flags) == 0
    val = {int(k): float(v) for k, s, v in map(str.split, Path("log/log.txt").read_text().splitlines()) if s == "val"}
    best = min(list(val)[1:], key=val.get)
    assert best < 60 and val[60] > val[best] + 0.05  # it overfits
    assert f"model is step {best}'s, validation loss {val[best]:.4f}" in capsys.readouterr().out
    loader = train_gpt2.DataLoaderLite(train_gpt2.load_tokens("text.txt")[1], 1, 16)
    x, y = loader.get(range(loader.n_windows))
    logits = AutoModelForCausalLM.from_pretrained("log/model")(x).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    assert loss == pytest.approx(val[best], abs=2e-3)

    before = Path("log/model/model.safetensors").read_bytes()
    assert exit_code("--init_from=resume", "--max_steps=70") == 0  # knows the best so far
    assert Path("log/model/model.safetensors").read_bytes() == before
    assert f"model is step {best}'s, validation loss {val[best]:.4f}" in capsys.readouterr().out


def test_each_record_keeps_its_tokens(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*TINY_RUN, "--data", text, "--num_samples=0", "--eval_every=0") == 0
    assert exit_code("--init_from=resume", "--total_batch_size=128", "--max_steps=6") == 0
    log = load_checkpoint(Path("log/ckpt.pt"))["log"]
    assert {step: tokens for (step, _), (_, tokens) in log.items()} == {1: 64, 2: 128, 3: 192, 4: 256, 5: 384, 6: 512}


def test_the_wiring_of_a_run(text, tmp_path, monkeypatch, capsys):
    """One run with spies: every setting arrives where it counts."""
    monkeypatch.chdir(tmp_path)
    seen, clock = {"lr": [], "autocast": [], "loaders": []}, iter(range(1000))
    monkeypatch.setattr(train_gpt2.time, "perf_counter", lambda: 2.0 * next(clock))  # a step takes 2 seconds
    step, init = train_gpt2.optimizer_step, train_gpt2.DataLoaderLite.__init__

    def spied_init(self, shards, B, T, seed=None, *args):
        seen["loaders"].append((B, T, seed))
        init(self, shards, B, T, seed, *args)

    def spied_step(model, loader, optimizers, scaler, autocast, device, lr, cfg, grad_accum_steps):
        seen["lr"].append(lr)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        seen["decay"] = [group["weight_decay"] for group in groups]
        seen["accum"] = grad_accum_steps
        with autocast:
            seen["autocast"].append(model(torch.zeros(1, 4, dtype=torch.long))[0].dtype)
        result = step(model, loader, optimizers, scaler, autocast, device, lr, cfg, grad_accum_steps)
        assert {group["lr"] for group in groups} == {lr}
        return result

    monkeypatch.setattr(train_gpt2, "optimizer_step", spied_step)
    monkeypatch.setattr(train_gpt2.DataLoaderLite, "__init__", spied_init)
    flags = [*TINY_RUN, "--data", text, "--dtype=bfloat16", "--weight_decay=0.3", "--warmup_steps=2", "--max_lr=0.01", "--num_samples=0",
             "--batch_size=2"]
    assert exit_code(*flags) == 0
    assert seen["lr"] == pytest.approx([0.005, 0.01, 0.01, 0.0055]) and seen["accum"] == 2
    assert seen["decay"] == [0.3] * 5 + [0.0] and set(seen["autocast"]) == {torch.bfloat16}
    assert seen["loaders"] == [(2, 16, 1337), (2, 16, None)]  # validation is read in order
    lines = [line for line in capsys.readouterr().out.splitlines() if "tok/s" in line]
    assert all("| 2000.0 ms | 32 tok/s |" in line for line in lines)
    assert [line.split("| ")[-1] for line in lines] == ["0m06s left", "0m04s left", "0m02s left", "0m00s left"]
    log = load_checkpoint(Path("log/ckpt.pt"))["log"]
    assert log[4, "train"][1] == log[4, "val"][1] == 256 and log[0, "val"][1] == 0

    seen["loaders"].clear()
    assert exit_code(*flags, "--no-shuffle", "--dtype=float32", "--out_dir=more", "--max_steps=1") == 0
    assert seen["loaders"] == [(2, 16, None)] * 2 and seen["autocast"][-1] == torch.float32


class StandIn(torch.nn.Module):
    """In place of a GPT: gives the tokens of a text, whatever it is asked, and keeps what it was asked."""

    def __init__(self, text):
        super().__init__()
        self.lm_head = torch.nn.Linear(1, 1)
        self.tokens = train_gpt2.get_tokenizer().encode(text, allowed_special="all")

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        self.asked = idx.tolist(), max_new_tokens, temperature, top_k, generator.initial_seed()
        return torch.cat((idx, torch.tensor([self.tokens] * len(idx))), dim=1)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_a_sample_is_asked_for_and_printed_as_the_settings_say(capsys, num_samples):
    model = StandIn("wer 🙂 你好<|endoftext|>and more")
    cfg = TrainConfig(prompt="A<|endoftext|>B\\n", temperature=0.7, top_k=9, seed=5)
    train_gpt2.sample(model, cfg, num_samples, 30)
    assert model.asked == ([[32, 50256, 33, 198]] * num_samples, 30, 0.7, 9, 5)
    heads = [f"--- sample {i} of {num_samples}" for i in range(1, num_samples + 1)]
    assert capsys.readouterr().out == "".join(f"{head}\nA<|endoftext|>B\nwer 🙂 你好\n" for head in heads) + "---\n"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_samples_alone_are_drawn_in_the_chosen_dtype(tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    dtypes = []
    monkeypatch.setattr(train_gpt2, "sample", lambda model, *rest: dtypes.append(model.lm_head.weight.dtype))
    assert exit_code("--n_layer=1", "--n_head=1", "--n_embd=8", "--max_steps=0", f"--dtype={dtype}") == 0
    assert dtypes == [getattr(torch, dtype)] and not Path("log").exists()


def test_a_float16_run_resumes_with_its_scale(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*TINY_RUN, "--data", text, "--dtype=float16", "--max_steps=6", "--save_every=3", "--eval_every=0", "--num_samples=0"]
    assert exit_code(*flags, "--out_dir=whole") == 0
    assert exit_code(*flags, "--out_dir=parts", "--max_steps=3", "--warmup_steps=20") == 0
    assert exit_code("--init_from=resume", "--out_dir=parts", "--max_steps=6") == 0
    whole, parts = (load_checkpoint(Path(name) / "ckpt.pt")["scaler"] for name in ("whole", "parts"))
    assert whole == parts and whole["_growth_tracker"] > 3


def test_threads_sleep_soon_unless_the_user_says_otherwise():
    code = "import os, train_gpt2; print(os.environ['GOMP_SPINCOUNT'])"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for given, expected in ({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**environment, **given}, capture_output=True, text=True)
        assert done.stdout.strip() == expected
    source = (ROOT / "train_gpt2.py").read_text()
    assert source.index("GOMP_SPINCOUNT") < source.index("import torch\n")  # OpenMP reads it when torch is imported


@pytest.mark.parametrize("found, hint", [
    ("log/model/config.json", " (there is one in log/model)"), ("log/adapter_config.json", ""), ("log/tf_model.h5", "")])
def test_a_folder_that_is_no_model_is_told_where_one_is(tmp_path, monkeypatch, capsys, found, hint):
    monkeypatch.chdir(tmp_path)
    Path(found).parent.mkdir(parents=True)
    Path(found).write_text("{}")
    assert exit_code("--init_from=pretrained", "--model=log", "--max_steps=0") == 1
    err = capsys.readouterr().err
    assert err.startswith("train_gpt2.py: error: cannot load log: no config.json in ") and err.endswith(hint + "\n")
    assert ("there is one in" in err) == bool(hint)


@pytest.mark.parametrize("typo, message", [
    ("--data=nope.txt", "--data nope.txt does not exist"), ("--model=gpt3", "--model gpt3 is not one of nano, "),
    ("--max_lr=-1", "--max_lr must be"), ("--hellaswag=nope.jsonl", "cannot read --hellaswag nope.jsonl")])
def test_a_typo_is_not_hidden_by_a_folder_that_holds_a_run(text, tmp_path, monkeypatch, capsys, typo, message):
    monkeypatch.chdir(tmp_path)
    Path("log").mkdir()
    Path("log/ckpt.pt").write_text("")
    assert exit_code(*TINY_RUN, "--data", text, typo) == 1
    err = capsys.readouterr().err
    assert message in err and "--overwrite" not in err
    assert exit_code(*TINY_RUN, "--data", text) == 1 and "log/ckpt.pt exists. Continue with --init_from resume" in capsys.readouterr().err


def test_a_sentence_names_the_place_only_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"text": "To be')
    assert exit_code(*TINY_RUN, "--data=a.jsonl") == 1
    err = capsys.readouterr().err
    assert err.startswith("train_gpt2.py: error: a.jsonl:1 is not a JSON object on a line of its own: ") and err.count("a.jsonl") == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have no names on Windows")
def test_a_text_may_come_through_a_pipe(text, tmp_path, monkeypatch):
    """As in --data <(zcat text.gz)."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    threading.Thread(target=lambda: Path("pipe").write_text(text.read_text()), daemon=True).start()
    flags = [*TINY_RUN, "--max_steps=1", "--num_samples=0"]
    assert exit_code(*flags, "--data=pipe", "--out_dir=a") == exit_code(*flags, "--data", text, "--out_dir=b") == 0
    assert Path("a/log.txt").read_text() == Path("b/log.txt").read_text()


@pytest.mark.parametrize("batch_size, B, micro_steps", [(1, 1, 4), (3, 2, 2), (64, 4, 1)])
def test_batch_size_is_the_most_that_a_process_takes_at_once(text, tmp_path, monkeypatch, capsys, batch_size, B, micro_steps):
    monkeypatch.chdir(tmp_path)
    evaluate, seen = train_gpt2.evaluate, []
    monkeypatch.setattr(train_gpt2, "evaluate", lambda model, loader, n, *rest: seen.append((n, loader.B)) or evaluate(model, loader, n, *rest))
    assert exit_code(*TINY_RUN, "--data", text, "--max_steps=1", "--num_samples=0", f"--batch_size={batch_size}") == 0
    assert f" = {micro_steps} micro-steps x 1 processes x B {B} x T 16\n" in capsys.readouterr().out
    assert seen == [(2 * batch_size, B)] * 2  # windows, and so the loss, do not change with B


def test_the_rate_counts_in_the_update_it_is_given_for(monkeypatch):
    bars = []
    monkeypatch.setattr(train_gpt2, "progress", lambda steps, desc: bars.append((len(steps), desc)) or steps)
    model = GPT(GPTConfig(**NANO))
    before = [p.detach().clone() for p in model.parameters()]
    loader = train_gpt2.DataLoaderLite([np.arange(1000, dtype=np.uint16)], 2, 16)
    optimizers, scaler = [torch.optim.SGD(model.parameters(), lr=0.0)], torch.amp.GradScaler("cpu", enabled=False)
    train_gpt2.optimizer_step(model, loader, optimizers, scaler, nullcontext(), torch.device("cpu"), 0.5, TrainConfig(), 3)
    for p, old in zip(model.parameters(), before):
        assert p.grad.any()
        torch.testing.assert_close(p.detach(), old - 0.5 * p.grad)
    assert bars == [(3, "micro-steps")]  # a long step is seen to go on


def test_compiling_takes_no_batch_and_leaves_no_gradients(text, tmp_path, monkeypatch):
    """The probe before the first step, here of a compiler that changes nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    for flag in "--compile", "--no-compile":
        flags = ["--optimizer=adamw", "--grad_clip=0", "--dtype=float32", "--num_samples=0", "--out_dir=" + flag.strip("-")]
        assert exit_code(*TINY_RUN, "--data", text, flag, *flags) == 0
    compiled, plain = load_checkpoint("compile/ckpt.pt"), load_checkpoint("no-compile/ckpt.pt")
    assert compiled["position"] == plain["position"] == 16 and compiled["log"] == plain["log"]
    torch.testing.assert_close(compiled["model"], plain["model"], atol=0, rtol=0)


def test_a_finished_run_has_nothing_to_compile(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*TINY_RUN, "--data", text, "--num_samples=0") == 0
    capsys.readouterr()
    monkeypatch.setattr(torch, "compile", lambda model: seen.append(model))
    seen = []
    assert exit_code("--init_from=resume", "--compile", "--num_samples=1") == 0
    out = capsys.readouterr().out
    assert "all steps are done: a larger --max_steps trains on\n" in out and "--- sample 1 of 1" in out
    assert not seen and "compiling" not in out and load_checkpoint("log/ckpt.pt")["step"] == 4


@pytest.mark.parametrize("new, flags", [("new", ["--out_dir=new"]), ("log", [])])
def test_a_folder_that_was_moved_is_resumed_where_it_is(text, tmp_path, monkeypatch, new, flags):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*TINY_RUN, "--data", text, "--num_samples=0", "--out_dir=old") == 0
    Path("old").rename(new)
    assert exit_code("--init_from=resume", "--max_steps=5", *flags) == 0
    ckpt = load_checkpoint(Path(new) / "ckpt.pt")
    assert (ckpt["step"], ckpt["train_config"]["out_dir"]) == (5, new) and not Path("old").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_numbers_given_on_resuming_count_and_others_are_the_runs(text, tmp_path, monkeypatch, optimizer):
    monkeypatch.chdir(tmp_path)
    step, seen = train_gpt2.optimizer_step, []

    def spied_step(model, loader, optimizers, *rest):
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        seen.append({group["weight_decay"] for group in groups})
        return step(model, loader, optimizers, *rest)

    monkeypatch.setattr(train_gpt2, "optimizer_step", spied_step)
    flags = ["--weight_decay=0.2", "--max_steps=1", "--num_samples=0", f"--optimizer={optimizer}"]
    assert exit_code(*TINY_RUN, "--data", text, *flags) == 0
    assert exit_code("--init_from=resume", "--max_steps=2") == 0
    assert exit_code("--init_from=resume", "--max_steps=3", "--weight_decay=0.3") == 0
    assert seen == [{0.2, 0.0}, {0.2, 0.0}, {0.3, 0.0}]


def written_before(ckpt):
    """-> ckpt as the version before this one wrote it."""
    cfg = ckpt["train_config"]
    shape = {name: cfg.pop(name) for name in vars(GPTConfig())}
    return {name: ckpt[name] for name in ("step", "position", "log", "scaler", "model", "train_config")} | dict(
        config=shape, n_windows=600, n_tokens=50257, reads_texts=True, tokenizer_files=[], optimizer={})


@pytest.mark.parametrize("change, message", [
    (written_before, "another version of this file wrote it"),
    (lambda ckpt: ckpt | dict(train_config=ckpt["train_config"] | dict(dropout=0.1)), "unexpected keyword argument 'dropout'"),
    (lambda ckpt: [1, 2], ""), (lambda ckpt: TrainConfig(), "")])
def test_a_checkpoint_of_something_else_is_refused_in_one_sentence(text, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    assert exit_code(*TINY_RUN, "--data", text, "--max_steps=1", "--eval_every=0", "--num_samples=0") == 0
    torch.save(change(load_checkpoint("log/ckpt.pt")), "log/ckpt.pt")
    for max_steps in 0, 2:
        capsys.readouterr()
        assert exit_code("--init_from=resume", f"--max_steps={max_steps}") == 1
        err = capsys.readouterr().err
        assert err.startswith("train_gpt2.py: error: cannot resume from log/ckpt.pt: ") and message in err and err.count("\n") == 1, err


def test_an_overflow_of_float16_skips_the_update_and_the_run_goes_on(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**40))
    flags = [*TINY_RUN, "--data", text, "--dtype=float16", "--max_steps=30", "--eval_every=30", "--num_samples=0"]
    assert exit_code(*flags) == 0
    ckpt = load_checkpoint("log/ckpt.pt")
    assert ckpt["step"] == 30 and ckpt["scaler"]["scale"] < 2.0**40 and ckpt["log"][30, "val"][0] < ckpt["log"][0, "val"][0]


@pytest.mark.parametrize("scale, code", [(1.0, 0), (0.5, 1)])
def test_in_float16_a_norm_that_is_not_finite_is_a_divergence_once_the_scale_is_below_1(text, tmp_path, monkeypatch, capsys, scale, code):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=scale))
    step = train_gpt2.optimizer_step
    monkeypatch.setattr(train_gpt2, "optimizer_step", lambda *args: (step(*args)[0], torch.tensor(torch.inf)))
    assert exit_code(*TINY_RUN, "--data", text, "--dtype=float16", "--num_samples=0") == code
    assert ("step 1: the loss or the gradient's norm is not finite" in capsys.readouterr().err) == (code == 1)


def test_hellaswag_alone_is_scored_in_float32(hf_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf_model(vocab_size=50257, n_positions=64).bfloat16().save_pretrained("model")
    write(tmp_path / "h.jsonl", made_examples(2))
    score, dtypes = train_gpt2.evaluate_hellaswag, []
    monkeypatch.setattr(train_gpt2, "evaluate_hellaswag",
                        lambda model, path: dtypes.append({p.dtype for p in model.parameters()}) or score(model, path))
    flags = ["--max_steps=0", "--num_samples=0", "--hellaswag=h.jsonl", "--device=cpu"]
    for dtype in "auto", "bfloat16":
        assert exit_code("--init_from=pretrained", "--model=model", f"--dtype={dtype}", *flags) == 0
    assert dtypes == [{torch.float32}] * 2
