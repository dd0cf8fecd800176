"""Schedule, recipes, accumulation, evaluation and the checkpoint."""
import dataclasses
import math
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt2
from conftest import NANO, ROOT, exit_code, load_checkpoint
from train_gpt2 import (ADAMW_LR, MODELS, RECIPES, DataLoaderLite, GPT, GPTConfig, TrainConfig, UserError, choose_numbers,
                        evaluate, get_lr, optimizer_step)

CPU = torch.device("cpu")


def test_schedule_at_its_corners():
    cfg = TrainConfig(max_steps=110, warmup_steps=10, max_lr=1.0, min_lr=0.1)
    assert get_lr(0, cfg) == pytest.approx(0.1)  # not 0: the first update would be lost
    assert get_lr(9, cfg) == get_lr(10, cfg) == 1.0
    assert get_lr(60, cfg) == pytest.approx(0.55)
    assert get_lr(109, cfg) == pytest.approx(0.1, abs=1e-3) and get_lr(109, cfg) > 0.1
    assert get_lr(110, cfg) == get_lr(1000, cfg) == 0.1
    assert [get_lr(s, cfg) for s in range(10, 110)] == sorted([get_lr(s, cfg) for s in range(10, 110)], reverse=True)
    short = TrainConfig(max_steps=5, warmup_steps=10, max_lr=1.0, min_lr=0.1)
    assert [get_lr(s, short) for s in (0, 4)] == [0.1, 0.5]
    assert get_lr(0, TrainConfig(max_steps=5, warmup_steps=0, max_lr=1.0)) == 1.0


@pytest.fixture
def make():
    """make(B) -> (model, its optimizer, a loader of B windows); the same weights and order each time."""

    def make(B, optimizer="adamw"):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**NANO, vocab_size=101))
        tokens = np.random.default_rng(0).integers(101, size=500).astype(np.uint16)
        return model, model.configure_optimizers(optimizer, 0.1, 1e-3), DataLoaderLite([tokens], B, 16, seed=1)

    return make


def one_step(model, optimizer, loader, grad_accum_steps=1, grad_clip=1.0, scaler=None, autocast=nullcontext()):
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    cfg = TrainConfig(grad_clip=grad_clip)
    loss, norm = optimizer_step(model, loader, optimizer, scaler, autocast, CPU, 1e-3, cfg, grad_accum_steps)
    return loss.item(), norm.item()


def steps(model, optimizer, loader, grad_accum_steps, n=3):
    return [one_step(model, optimizer, loader, grad_accum_steps) for _ in range(n)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulating_4x1_equals_1x4(make, optimizer):
    one, four = make(4, optimizer), make(1, optimizer)
    torch.testing.assert_close(steps(*one, 1), steps(*four, 4), atol=1e-5, rtol=1e-5)
    if optimizer == "adamw":  # Muon's products are in bfloat16, where rounding differs more
        for a, b in zip(one[0].parameters(), four[0].parameters()):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_step_is_that_of_plain_adamw(make):
    model, _, loader = make(4)
    reference, _, same_loader = make(4)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=False)
    for loss, norm in steps(model, model.configure_optimizers("adamw", 0.0, 1e-3), loader, 1):
        expected = reference(*same_loader.next_batch())[1]
        expected.backward()
        expected_norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm().item()
        for p in reference.parameters():
            p.grad.mul_(min(1.0, 1.0 / expected_norm))
        optimizer.step()
        optimizer.zero_grad()
        assert (loss, norm) == pytest.approx((expected.item(), expected_norm), rel=1e-5)
    for a, b in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_evaluate_is_the_mean_over_all_windows(make):
    model, _, loader = make(4)
    x, y = loader.get(range(loader.n_windows))
    assert loader.n_windows % 4  # so that the last batch is shorter
    expected = model(x, y)[1].item()
    position = loader.position
    assert evaluate(model, loader, 0, nullcontext(), CPU) == pytest.approx(expected, rel=1e-6)
    assert evaluate(model, loader, 10**6, nullcontext(), CPU) == pytest.approx(expected, rel=1e-6)
    assert evaluate(model, loader, 2, nullcontext(), CPU) == pytest.approx(model(x[:8], y[:8])[1].item(), rel=1e-6)
    assert loader.position == position  # training goes on where it was


def test_the_default_validation_loss_covers_input_txt_and_no_more():
    cfg = TrainConfig()
    n_windows = DataLoaderLite(train_gpt2.load_tokens(ROOT / "input.txt", "val"), 16, cfg.sequence_length).n_windows
    assert (cfg.eval_batches - 1) * cfg.batch_size < n_windows <= cfg.eval_batches * cfg.batch_size


def test_the_end_of_the_cosine_is_a_tenth_unless_given():
    assert get_lr(100, TrainConfig(max_lr=0.5, warmup_steps=10, max_steps=100)) == pytest.approx(0.05)
    assert get_lr(100, TrainConfig(max_lr=0.5, min_lr=0.0, warmup_steps=10, max_steps=100)) == 0


@pytest.mark.parametrize("given", [dict(), dict(max_lr=3e-5), dict(min_lr=2e-4), dict(max_lr=1e-3, min_lr=1e-3)])
def test_the_rate_never_rises_after_the_warm_up(given):
    for more in {}, dict(optimizer="adamw"):
        cfg, _ = choose_numbers(given | more, NANO_SHAPE, {})
        rates = [get_lr(step, cfg) for step in range(cfg.warmup_steps, cfg.max_steps + 10)]
        assert rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(cfg.max_lr)


@pytest.mark.parametrize("field, value", [
    ("batch_size", 0), ("sequence_length", -1), ("temperature", -0.1), ("temperature", math.nan), ("top_k", -1),
    ("max_steps", -1), ("max_lr", math.inf), ("seed", -1), ("num_samples", -1), ("max_new_tokens", 0)])
def test_impossible_values(field, value):
    with pytest.raises(UserError, match=f"--{field} must be a finite number of at least [01], not {value}"):
        choose_numbers({field: value}, GPTConfig(), {})


@pytest.mark.parametrize("field", ["n_layer", "n_head", "n_embd", "block_size", "vocab_size"])
def test_impossible_shapes(field):
    with pytest.raises(UserError, match=f"--{field} must be a finite number of at least 1, not 0"):
        choose_numbers({}, GPTConfig(**{field: 0}), {})


# Recipes

NANO_SHAPE, GPT2_SHAPE = GPTConfig(**MODELS["nano"]), GPTConfig()
CASES = {"laptop": (dict(), NANO_SHAPE), "laptop with adamw": (dict(optimizer="adamw"), NANO_SHAPE),
         "lecture": (dict(model="gpt2"), GPT2_SHAPE), "finetune": (dict(init_from="pretrained"), GPT2_SHAPE)}


def test_every_recipe_has_a_case():
    assert CASES.keys() == RECIPES.keys()


@pytest.mark.parametrize("recipe", CASES)
def test_every_number_of_a_recipe_counts_unless_given(recipe):
    given, shape = CASES[recipe]
    cfg, source = choose_numbers(given, shape, {})
    assert source == f"the {recipe} recipe"
    size = "nano" if shape is NANO_SHAPE else "gpt2"
    changed = {name: value[size] if isinstance(value, dict) else value for name, value in RECIPES[recipe].items()}
    assert vars(cfg) == vars(TrainConfig()) | changed | given
    for name, value in changed.items():
        if name not in ("model", "optimizer", "sequence_length", "batch_size", "total_batch_size"):
            assert getattr(choose_numbers({**given, name: 2 * value}, shape, {})[0], name) == 2 * value


def test_the_numbers_of_the_lecture_and_of_gpt3():
    cfg, _ = choose_numbers(dict(model="gpt2"), GPT2_SHAPE, {})
    assert (cfg.sequence_length, cfg.total_batch_size, cfg.max_lr, cfg.warmup_steps, cfg.max_steps) == (
        1024, 524288, 6e-4, 715, 19073)
    assert get_lr(0, cfg) == pytest.approx(8.39e-7, rel=1e-3) and get_lr(19073, cfg) == pytest.approx(6e-5)
    rates = {name: choose_numbers(dict(model=name), GPTConfig(**MODELS[name]), {})[0].max_lr for name in list(MODELS)[1:]}
    assert rates == {"gpt2": 6e-4, "gpt2-medium": 3e-4, "gpt2-large": 2.5e-4, "gpt2-xl": 2e-4}


def test_finetuning_takes_a_tenth_of_the_rate_of_the_nearest_size():
    for n_embd, size in (32, "nano"), (96, "nano"), (768, "gpt2"), (1000, "gpt2-medium"), (1600, "gpt2-xl"):
        cfg, _ = choose_numbers(dict(init_from="pretrained", model="folder"), GPTConfig(n_embd=n_embd), {})
        assert cfg.max_lr == pytest.approx(ADAMW_LR[size] / 10) and cfg.optimizer == "adamw" and cfg.model == "folder"


def test_a_sequence_is_no_longer_than_the_model_unless_a_flag_says_so():
    for block_size, T in (64, 64), (256, 256), (1024, 256), (16, 16):
        shape = GPTConfig(block_size=block_size)
        assert choose_numbers(dict(init_from="pretrained"), shape, {})[0].sequence_length == T
    with pytest.raises(UserError, match="--sequence_length 65 is over the model's block_size 64$"):
        choose_numbers(dict(sequence_length=65, total_batch_size=65 * 16), NANO_SHAPE, {})


def test_a_given_sequence_length_leaves_the_total_alone():
    cfg, _ = choose_numbers(dict(sequence_length=32), GPTConfig(block_size=50), {})  # 50 would not divide 1024
    assert (cfg.sequence_length, cfg.total_batch_size) == (32, 1024)


def test_a_contradiction_says_what_is_from_the_recipe():
    with pytest.raises(UserError, match=r"--total_batch_size 524288 \(from the lecture recipe\) is not a multiple of "
                                        r"--batch_size 12 x --sequence_length 1024 \(from the lecture recipe\) x 1 processes"):
        choose_numbers(dict(model="gpt2", batch_size=12), GPT2_SHAPE, {})
    with pytest.raises(UserError, match=r"--min_lr 0.001 is over --max_lr 0.0006 \(from the lecture recipe\)"):
        choose_numbers(dict(model="gpt2", min_lr=1e-3), GPT2_SHAPE, {})
    with pytest.raises(UserError, match=r"--min_lr 1.0 is over --max_lr 0.5$"):
        choose_numbers(dict(max_lr=0.5, min_lr=1.0), NANO_SHAPE, {})


def test_an_edit_of_the_defaults_shows_in_the_bare_run(monkeypatch):
    monkeypatch.setattr(train_gpt2, "TrainConfig", dataclasses.make_dataclass(
        "Edited", [("max_lr", float, 0.123)], bases=(TrainConfig,)))
    assert choose_numbers({}, NANO_SHAPE, {})[0].max_lr == 0.123
    monkeypatch.setattr(train_gpt2, "TrainConfig", dataclasses.make_dataclass(
        "Edited", [("optimizer", str, "adamw"), ("max_lr", float, 0.123)], bases=(TrainConfig,)))
    assert choose_numbers({}, NANO_SHAPE, {})[0].max_lr == 0.123  # beside another edit, too
    monkeypatch.setitem(RECIPES["lecture"], "max_lr", 0.5)
    assert choose_numbers(dict(model="gpt2"), GPT2_SHAPE, {})[0].max_lr == 0.5


def saved(path, make, step=3, scaler=None):
    model, optimizer, loader = make(4)
    steps(model, optimizer, loader, 1)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    log = {(step, "train"): (5.0, 64 * step)}
    train_gpt2.save_checkpoint(path, step, model, optimizer, scaler, loader, TrainConfig(), log)
    return model, optimizer, loader


def test_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys, make):
    path = tmp_path / "ckpt.pt"
    saved(path, make, step=1)

    def full_disk(state, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as m:
        m.setattr(torch, "save", full_disk)
        with pytest.raises(OSError):
            saved(path, make, step=2)
    assert list(tmp_path.iterdir()) == [path]
    checkpoint = load_checkpoint(path)
    assert checkpoint["step"] == 1
    torch.save({key: value for key, value in checkpoint.items() if key != "log"}, path)
    assert exit_code("--init_from=resume", "--out_dir", tmp_path) == 1 and "'log'" in capsys.readouterr().err
    checkpoint["train_config"]["dropout"] = checkpoint["train_config"].pop("seed")
    torch.save(checkpoint, path)
    assert exit_code("--init_from=resume", "--out_dir", tmp_path) == 1
    err = capsys.readouterr().err
    assert f"cannot resume from {path}" in err and "dropout" in err


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append("fsync") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").write_text("")
    (tmp_path / "folder.tmp" / "folder").mkdir(parents=True)  # left by a killed run
    (tmp_path / "folder.tmp" / "folder" / "stale").write_text("")
    with train_gpt2.atomic_write(tmp_path / "folder") as tmp:
        tmp.mkdir()
        (tmp / "a").write_text("a")
        (tmp / "b").write_text("b")
    assert calls == ["fsync", "fsync", "replace", "replace"]  # the old folder steps aside, the new one in
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["a", "b"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


class Evil:
    def __reduce__(self):
        return open, ("evil", "w")


@pytest.mark.parametrize("content", [Evil(), {"model": {}}, [1], {"format": 0}, b"", b"PK\x03\x04 and no more"])
def test_strange_checkpoints_are_refused_and_run_nothing(tmp_path, monkeypatch, capsys, content):
    monkeypatch.chdir(tmp_path)
    path = Path("ckpt.pt")
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert exit_code("--init_from=resume", "--out_dir=.") == 1
    assert "cannot resume from ckpt.pt: " in capsys.readouterr().err
    assert not (tmp_path / "evil").exists()


def test_a_norm_is_that_of_the_unscaled_gradients_and_clipping_follows(make):
    def gradients(grad_clip, scaler=None):
        model, optimizer, loader = make(4)
        norm = one_step(model, optimizer, loader, grad_clip=grad_clip, scaler=scaler)[1]
        return norm, torch.cat([p.grad.flatten() for p in model.parameters()])

    norm, clipped = gradients(0.01)
    scaled_norm, scaled = gradients(0.01, torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert norm > 0.01 and clipped.norm() == pytest.approx(0.01, rel=1e-3)
    assert scaled_norm == pytest.approx(norm, rel=1e-4)
    torch.testing.assert_close(scaled, clipped)
    torch.testing.assert_close(gradients(0.0)[1], gradients(1e9)[1])
    assert gradients(0.0)[1].norm() == pytest.approx(norm, rel=1e-4)


def test_processes_sync_in_the_last_micro_step_alone(make, monkeypatch):
    model, optimizer, loader = make(2)

    class StandIn(torch.nn.Module):
        require_backward_grad_sync, seen = True, []

        def forward(self, x, y):
            self.seen.append(self.require_backward_grad_sync)
            return model(x, y)

    monkeypatch.setattr(train_gpt2, "DDP", StandIn)
    standin = StandIn()
    standin.inner = model
    one_step(standin, optimizer, loader, 3)
    assert standin.seen == [False, False, True]


def test_float16_on_a_cpu_survives_overflowing_gradients(make):
    model, optimizer, loader = make(4)
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    for _ in range(30):  # the scale halves with each step until the gradients fit
        one_step(model, optimizer, loader, scaler=scaler, autocast=torch.autocast("cpu", torch.float16))
    assert scaler.get_scale() < 2.0**40
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("scaling", [False, True])
def test_a_step_does_not_wait_for_a_gpu(make, name, scaling):
    """On a GPU each read of a number by Python is a wait; to scale for Muon takes one, whether to skip the update."""
    reads = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            reads.extend([func] if func is torch.ops.aten._local_scalar_dense.default else [])
            return func(*args, **(kwargs or {}))

    model, optimizer, loader = make(2, name)
    scaler = torch.amp.GradScaler("cpu", enabled=scaling, init_scale=1.0)
    for _ in range(2):  # the first one makes the optimizer's state
        batches = iter([loader.next_batch() for _ in range(3)])
        ready = SimpleNamespace(next_batch=lambda: next(batches))  # the loader works on the CPU
        reads.clear()
        with Count():
            optimizer_step(model, ready, optimizer, scaler, nullcontext(), CPU, 1e-3, TrainConfig(), 3)
    assert len(reads) == (scaling and name == "muon")


@pytest.mark.parametrize("name", ["transformer.ln_f.bias", "transformer.h.0.mlp.c_fc.weight"])  # AdamW's, Muon's
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_an_overflow_anywhere_skips_the_whole_update(make, name, grad_clip):
    model, optimizer, loader = make(4, "muon")
    before = [p.detach().clone() for p in model.parameters()]
    model.get_parameter(name).register_hook(lambda grad: grad * math.inf)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    one_step(model, optimizer, loader, grad_clip=grad_clip, scaler=scaler)
    assert scaler.get_scale() == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_dtype_of_each_device():
    assert train_gpt2.pick_dtype("float16", CPU) == torch.float16
    assert train_gpt2.pick_dtype("auto", CPU) in (torch.float32, torch.bfloat16)
    for name in "auto", "bfloat16", "float16":  # without autocast neither these products nor a GradScaler
        assert train_gpt2.pick_dtype(name, torch.device("mps")) == torch.float32


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_dtype_of_gpus(monkeypatch, capability, dtype):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert train_gpt2.pick_dtype("auto", torch.device("cuda", 0)) == dtype
    assert train_gpt2.pick_dtype("float32", torch.device("cuda", 0)) == torch.float32


def test_loss_png_has_both_losses_over_tokens(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: path.touch() or drawn.extend(figure.axes))
    log = {(0, "val"): (10.8, 0), (5, "train"): (6.1, 500), (10, "train"): (5.5, 1000), (10, "val"): (5.0, 1000),
           (10, "hella"): (0.25, 1000)}
    train_gpt2.plot_losses(tmp_path / "loss.png", log)
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn[0].get_lines()}
    assert lines == {"train": ([500, 1000], [6.1, 5.5]), "val": ([0, 1000], [10.8, 5.0])}
    train_gpt2.plot_losses(tmp_path / "loss.png", {})


def test_processes_that_read_different_checkpoints_or_data_do_not_go_on(tmp_path, monkeypatch, make):
    model, _, loader = saved(tmp_path / "ckpt.pt", make)
    cfg = TrainConfig(out_dir=str(tmp_path), batch_size=4, sequence_length=16, total_batch_size=128, compile=False,
                      max_steps=3, optimizer="adamw", seed=1, eval_every=0)
    monkeypatch.setattr(train_gpt2, "load_tokens", lambda path, split: loader.shards)

    def resume():
        train_gpt2.train(cfg, model, load_checkpoint(tmp_path / "ckpt.pt"), CPU, torch.float32)

    resume()
    for step, n_windows in (1, 0), (0, 1):  # what another process has more than this one
        monkeypatch.setattr(train_gpt2, "WORLD_SIZE", 2)
        monkeypatch.setattr(train_gpt2, "sum_over_ranks", lambda a, b: (2 * a + step, 2 * b + n_windows))
        with pytest.raises(UserError, match="the processes read different " + ("checkpoints" if step else "data")):
            resume()
