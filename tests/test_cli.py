"""The program as a user meets it: runs, files, bad input."""
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt2
from conftest import ROOT, TINY_RUN, exit_code, load_checkpoint
from test_hellaswag import made_examples, write
from train_gpt2 import GPT, TrainConfig, UserError, parse_flags

STEP_LINE = re.compile(
    r" +(\d+)/(\d+) \| loss \d+\.\d+ \| lr \S+ \| norm \d+\.\d+ \| \d+\.\d+ ms \| \d+ tok/s \| \d+m\d\ds left")


def test_a_run_from_start_to_samples(cli, text, tmp_path):
    done = cli(*TINY_RUN, "--data", text)
    assert done.returncode == 0, done.stderr
    first = [line.split(":")[0].split(",")[0] for line in done.stdout.splitlines()[:4]]
    assert first == ["device", "model", "the laptop recipe", "reading " + str(text)]
    assert done.stdout.startswith("device: cpu, processes: 1\n")
    assert "vocab_size=50304" in done.stdout and "max_lr 0.015" in done.stdout and "total_batch_size 64" in done.stdout
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
    last = records[-1]
    assert f"log/ holds ckpt.pt, log.txt, loss.png, model; model is step 4's, validation loss {float(last[2]):.4f}" in done.stdout

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

    changes = {"--n_layer=3": "--n_layer 3 contradicts the model, a GPTConfig.*n_layer=2",
               "--max_steps=23": "--max_steps 23 in all, but the checkpoint is at step 24",
               "--model=gpt2": "cannot change --model from nano to gpt2 when resuming: the weights",
               f"--optimizer={'muon' if optimizer == 'adamw' else 'adamw'}": "when resuming: its state",
               "--seed=2": "from 1337 to 2 when resuming: the order", "--no-shuffle": "from True to False when resuming: the order",
               "--sequence_length=8": "from 16 to 8 when resuming: the place", "--overwrite": "from False to True when resuming: it starts a new run"}
    for flag, message in changes.items():
        with pytest.raises(UserError, match=message):
            train_gpt2.run(parse_flags(["--init_from=resume", "--out_dir=parts", flag]))
    assert Path("parts/log.txt").read_text() == Path("whole/log.txt").read_text()
    with open("parts/log.txt", "a") as f:
        f.write("99 train 1.0\n")  # as if the run had got further than its checkpoint
    assert exit_code("--init_from=resume", "--out_dir=parts", "--num_samples=0") == 0  # no step is left
    assert Path("parts/log.txt").read_text() == Path("whole/log.txt").read_text()
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
    assert done.returncode == 1 and "a text needs GPT-2's tokenizer, but this model has other tokens" in done.stderr
    done = cli(*TINY_RUN, "--data=train.npy", "--num_samples=0", "--vocab_size=60000", "--out_dir=more", "--max_steps=1")
    assert done.returncode == 0  # and all of its rows are exported
    assert GPT.from_pretrained(tmp_path / "more" / "model").config.vocab_size == 60000


BAD_INPUT = [
    (["--batchsize=3"], "no flag --batchsize=3; did you mean --batch_size"),
    (["--lr=3"], "no flag --lr=3; did you mean --min_lr or --max_lr"),
    (["--compile", "False"], "did you mean --compile or --no-compile?"),
    (["stray"], "there is no flag stray"),
    (["--min_lr=1", "--max_lr=0.5"], "--min_lr 1.0 is over --max_lr 0.5"),
    (["--batch=3"], "no flag --batch=3; did you mean --batch_size"),
    (["--max_steps=many"], "invalid int value: 'many'"),
    (["--optimizer=sgd"], "invalid choice: 'sgd'"),
    (["--n_embd=100", "--n_head=3"], "--n_embd 100 is not a multiple of --n_head 3"),
    (["--n_layer=0"], "--n_layer must be a finite number of at least 1, not 0"),
    (["--n_embd=2000000", "--n_head=1"], "error: halve --batch_size, or take a smaller --model: "),
    (["--n_embd=4000000000000000000", "--n_head=1"], "error: halve --batch_size, or take a smaller --model: "),
    (["--temperature=-1"], "--temperature must be a finite number of at least 0, not -1.0"),
    (["--top_k=-1"], "--top_k must be a finite number of at least 0, not -1"),
    (["--model=gpt3"], "--model gpt3 is not one of nano, "),
    (["--device=cuda:99"], "--device cuda:99 cannot be used"),
    (["--device=abacus"], "--device abacus cannot be used"),
    (["--data=nowhere.txt"], "--data nowhere.txt does not exist"),
    (["--data=."], "a folder may hold .txt files, or .jsonl files, or token shards"),
    (["--data=allocated.txt"], "error: --data allocated.txt does not exist"),
    (["--data=empty.txt"], "its train split has 0 tokens, and a window of --sequence_length 16 takes 17"),
    (["--data=short.txt"], "its train split has "),
    (["--data=latin1.txt"], "cannot read latin1.txt as UTF-8: 'utf-8' codec can't decode byte 0xeb"),
    (["--data=char"], "meta.pkl says that these are not GPT-2's tokens"),
    (["--data=char/train.bin"], "meta.pkl says that these are not GPT-2's tokens"),
    (["--hellaswag=short.txt"], "--hellaswag short.txt:1 has no ctx, endings and label"),
    (["--total_batch_size=1000"], "1000 is not a multiple of --batch_size 4 x --sequence_length 16 x 1 processes"),
    (["--sequence_length=64", "--total_batch_size=256"], "--sequence_length 64 is over the model's block_size 32"),
    (["--vocab_size=300"], "a text needs GPT-2's tokenizer, but this model has other tokens"),
    (["--vocab_size=300", "--num_samples=0"], "a text needs GPT-2's tokenizer"),
    (["--vocab_size=60", "--num_samples=0", "--data=char"], "train.bin has token 64, but the model has only 60 tokens (--vocab_size)"),
    (["--out_dir=empty.txt"], "empty.txt"),
    (["--init_from=pretrained"], "cannot load 'gpt2' (not a local folder) as a GPT-2 model"),
    (["--init_from=pretrained", "--model=folder"], "cannot load the local folder folder as"),
    (["--init_from=pretrained", "--model=nobody/nothing"], "nobody/nothing"),
    (["--init_from=pretrained", "--model=./nofolder"], "./nofolder"),
    (["--init_from=resume"], "cannot resume from log/ckpt.pt: [Errno 2] No such file"),
    (["--write_shards=char"], "--write_shards char is not empty"),
    (["--write_shards=new", "--data=char"], "--data char holds tokens already"),
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
    (tmp_path / "edited.py").write_text(source.replace("C, self.n_head = config.n_embd, config.n_head", "C, self.n_head = config.n_embd, config.nhead"))
    done = subprocess.run([sys.executable, "edited.py", "--init_from=pretrained", "--model=model", "--max_steps=0"],
                          cwd=tmp_path, text=True, capture_output=True, timeout=120)
    assert done.returncode == 1 and "Traceback" in done.stderr and "config.nhead" in done.stderr, done.stderr


def test_a_hellaswag_file_is_looked_for_before_anything_is_lost(cli, text, tmp_path):
    assert cli(*TINY_RUN, "--data", text).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "log").iterdir() if path.is_file()}
    done = cli(*TINY_RUN, "--data", text, "--overwrite", "--hellaswag=nowhere.jsonl")
    assert done.returncode == 1 and "cannot read --hellaswag nowhere.jsonl: [Errno 2]" in done.stderr
    assert before == {path: path.read_bytes() for path in (tmp_path / "log").iterdir() if path.is_file()}


def test_a_text_that_speaks_of_memory_is_no_lack_of_it(cli, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("Zoë could not allocate the river that overflowed, out of memory".encode("latin1"))
    done = cli(*TINY_RUN, "--data=latin1.txt")
    assert done.returncode == 1 and "cannot read latin1.txt as UTF-8" in done.stderr and "halve" not in done.stderr


def test_an_overflow_before_a_sample_is_a_sentence(cli, text):
    done = cli(*TINY_RUN, "--data", text, "--max_lr=1e6", "--min_lr=1e6", "--warmup_steps=0", "--eval_every=1", "--dtype=float32")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "not finite" in done.stderr, done.stderr


def test_without_section_8_everything_works(tmp_path, text):
    source = (ROOT / "train_gpt2.py").read_text()
    start, end = source.index("# 8 Faster on a CPU"), source.rindex('if __name__ == "__main__"')
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
    assert "warning: torch.compile does not work, continuing without it: " in done.stdout


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
    assert re.search(r"device: cpu, processes: 1; an NVIDIA driver is present, but this torch cannot use it \(its CUDA is (None|[\d.]+)\)", out)


def test_several_processes_without_cuda_run_on_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("mps"))
    monkeypatch.setattr(train_gpt2, "WORLD_SIZE", 2)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend, device_id: backends.append(backend))
    backends = []
    assert train_gpt2.start_process("auto").type == "cpu" and backends == ["gloo"]
    with pytest.raises(UserError, match="--device meta cannot be used: several processes need CUDA or the CPU"):
        train_gpt2.start_process("meta")


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


def test_a_new_knob_is_a_flag(tmp_path):
    """Without a comment, with one space before it, with None for a default, with characters that are not ASCII."""
    source = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    field = "    max_steps: int = 600 "
    assert source.count(field) == 1
    new = "    dropout: float = 0.1\n    depth: int | None = None # na\u00efve\n    name: str|None = None\n"
    (tmp_path / "edited.py").write_text(source.replace(field, new + field), encoding="utf-8")
    env = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "edited.py", "--help"], cwd=tmp_path, capture_output=True, env=env)
    out = " ".join(done.stdout.decode().split())
    assert done.returncode == 0 and "--depth DEPTH na\u00efve (default: None)" in out and "--dropout DROPOUT (default: 0.1)" in out
    code = "import edited; print(edited.parse_flags(['--depth', '3', '--dropout=0.5', '--name', 'x']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "{'depth': 3, 'dropout': 0.5, 'name': 'x'}", done.stderr


def test_a_new_field_of_the_model_may_be_0(tmp_path):
    """As in the first thing that everybody adds, dropout."""
    source, field = (ROOT / "train_gpt2.py").read_text(), "    n_layer: int = 12 "
    assert source.count(field) == 1
    (tmp_path / "edited.py").write_text(source.replace(field, "    dropout: float = 0.0\n" + field))
    tiny = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--max_steps=0", "--num_samples=1", "--max_new_tokens=3", "--device=cpu"]
    done = subprocess.run([sys.executable, "edited.py", *tiny, "--dropout=0.2"], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0 and "dropout=0.2" in done.stdout, done.stderr


def test_help_says_which_default_a_recipe_changes(capsys):
    with pytest.raises(SystemExit):
        parse_flags(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "optimizer steps in all; 0: none, only sample (default: 600; lecture: 19073; finetune: 200)" in out
    assert "the lecture's (default: 'muon'; lecture: adamw; finetune: adamw)" in out


@pytest.mark.parametrize("environment, refused", [
    (dict(SLURM_PROCID="0", SLURM_NTASKS="2"), "SLURM_NTASKS is 2"), (dict(SLURM_NTASKS="2"), ""),
    (dict(SLURM_PROCID="0", SLURM_NTASKS="1"), ""), (dict(RANK="0", WORLD_SIZE="2"), "WORLD_SIZE is 2"), (dict(RANK="1"), ""),
    (dict(OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="4"), "OMPI_COMM_WORLD_SIZE is 4"), (dict(LOCAL_RANK="3"), "")])
def test_variables_left_over_from_other_programs(cli, text, environment, refused):
    done = cli(*TINY_RUN, "--data", text, "--max_steps=1", "--num_samples=0", env=environment)
    assert done.returncode == bool(refused), done.stderr
    assert (f"{refused}: start several processes with torchrun" in done.stderr) if refused else "1/1 | val loss" in done.stdout


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


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_model_folder_of_someone_else_is_seen_before_training(hf_model, text, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    Path("log").mkdir()
    if kind == "folder":
        Path("log/model").mkdir()
        Path("log/model/novel.txt").write_text("")
    else:
        hf_model().save_pretrained("elsewhere")
        Path("log/model").symlink_to(tmp_path / "elsewhere")
    assert exit_code(*TINY_RUN, "--data", text, "--overwrite") == 1
    out, err = capsys.readouterr()
    assert "log/model exists and is not a model" in err and "loss" not in out
    assert len(list(Path("log/model").iterdir())) == (1 if kind == "folder" else 3)


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
    assert "--- sample\nROMEO:" in sys.stdout.getvalue()


def test_ctrl_c_while_torch_is_imported(tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "train_gpt2.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while True:  # until the file runs, which the handler of its own shows
        with open(f"/proc/{process.pid}/status") as f:
            caught = next(line for line in f if line.startswith("SigCgt"))
        with open(f"/proc/{process.pid}/maps") as f:
            if "libtorch" in f.read() and int(caught.split()[1], 16) & 2:
                break
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=30)[1], process.returncode) == ("", 130)


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
    loader = train_gpt2.DataLoaderLite(train_gpt2.load_tokens("text.txt", "val"), 1, 16)
    x, y = loader.get(range(loader.n_windows))
    logits = AutoModelForCausalLM.from_pretrained("log/model")(x).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    assert loss == pytest.approx(val[best], abs=2e-3)

    before = Path("log/model/model.safetensors").read_bytes()
    assert exit_code("--init_from=resume", "--max_steps=70") == 0  # knows the best so far
    assert Path("log/model/model.safetensors").read_bytes() == before
    config = json.loads(Path("log/model/config.json").read_text())
    assert (config["step"], config["val_loss"]) == (best, pytest.approx(val[best], abs=1e-5))

    config["val_loss"] = 1.0  # as if a killed run had got further than its checkpoint, and better
    Path("log/model/config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert exit_code("--init_from=resume", "--max_steps=80") == 0
    assert f"model is step {best}'s, validation loss 1.0000" in capsys.readouterr().out
    shutil.rmtree("log/model")
    assert exit_code("--init_from=resume", "--max_steps=90") == 0  # there is a model again
    out = capsys.readouterr().out
    step = json.loads(Path("log/model/config.json").read_text())["step"]
    assert 80 <= step <= 90 and f"model is step {step}'s" in out


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

    def spied_step(model, loader, optimizer, scaler, autocast, device, lr, cfg, grad_accum_steps):
        seen["lr"].append(lr)
        seen["decay"] = [group["weight_decay"] for group in optimizer.param_groups]
        seen["accum"] = grad_accum_steps
        with autocast:
            seen["autocast"].append(model(torch.zeros(1, 4, dtype=torch.long))[0].dtype)
        result = step(model, loader, optimizer, scaler, autocast, device, lr, cfg, grad_accum_steps)
        assert [group["lr"] for group in optimizer.param_groups] == [lr] * 3
        return result

    monkeypatch.setattr(train_gpt2, "optimizer_step", spied_step)
    monkeypatch.setattr(train_gpt2.DataLoaderLite, "__init__", spied_init)
    flags = [*TINY_RUN, "--data", text, "--dtype=bfloat16", "--weight_decay=0.3", "--warmup_steps=2", "--max_lr=0.01", "--num_samples=0",
             "--batch_size=2"]
    assert exit_code(*flags) == 0
    assert seen["lr"] == pytest.approx([0.005, 0.01, 0.01, 0.0055]) and seen["accum"] == 2
    assert seen["decay"] == [0.3, 0.0, 0.3] and set(seen["autocast"]) == {torch.bfloat16}
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

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None, on_token=None):
        self.asked = idx.tolist(), max_new_tokens, temperature, top_k, generator.initial_seed()
        for token in self.tokens:
            if on_token and on_token(torch.tensor([[token]])):
                break
        return torch.cat((idx, torch.tensor([self.tokens] * len(idx))), dim=1)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_a_sample_is_asked_for_and_printed_as_the_settings_say(capsys, num_samples):
    model = StandIn("wer 🙂 你好<|endoftext|>and more")
    cfg = TrainConfig(prompt="A<|endoftext|>B\\n", temperature=0.7, top_k=9, seed=5)
    train_gpt2.sample(model, cfg, num_samples, 30)
    assert model.asked == ([[32, 50256, 33, 198]] * num_samples, 30, 0.7, 9, 5)
    heads = ["--- sample"] if num_samples == 1 else ["--- sample 1 of 2", "--- sample 2 of 2"]
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
    code = "import os, sys, train_gpt2; print(os.environ['GOMP_SPINCOUNT'], os.environ['KMP_BLOCKTIME'])"
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")}
    for given, expected in ({}, "10000 1"), ({"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "9"}, "7 9"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**environment, **given}, capture_output=True, text=True)
        assert done.stdout.strip() == expected
    source = (ROOT / "train_gpt2.py").read_text()
    assert source.index("GOMP_SPINCOUNT") < source.index("import torch\n")  # OpenMP reads it when torch is imported
