"""Schedule, accumulation, evaluation and the checkpoint."""
import math
from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import pytest
import torch

import train_gpt2
from conftest import NANO
from train_gpt2 import DataLoaderLite, GPT, GPTConfig, TrainConfig, UserError, evaluate, get_lr, optimizer_step

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
    """make(B) -> (model, its optimizers, a loader of B windows); the same weights and order each time."""

    def make(B, optimizer="adamw"):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**NANO, vocab_size=101))
        tokens = np.random.default_rng(0).integers(101, size=500).astype(np.uint16)
        return model, model.configure_optimizers(optimizer, 0.1, 1e-3, "cpu"), DataLoaderLite([tokens], B, 16, seed=1)

    return make


def steps(model, optimizers, loader, grad_accum_steps, n=3, grad_clip=1.0):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return [[t.item() for t in optimizer_step(model, loader, optimizers, scaler, nullcontext(), CPU, 1e-3, grad_clip,
                                              grad_accum_steps)] for _ in range(n)]


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
    optimizers = model.configure_optimizers("adamw", 0.0, 1e-3, "cpu")
    for loss, norm in steps(model, optimizers, loader, 1):
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


@pytest.mark.parametrize("field, value", [
    ("batch_size", 0), ("sequence_length", -1), ("temperature", -0.1), ("temperature", math.nan), ("top_k", 0),
    ("max_steps", -1), ("max_lr", math.inf), ("seed", -1), ("num_samples", -1), ("max_new_tokens", 0)])
def test_impossible_values(field, value):
    with pytest.raises(UserError, match=f"--{field} .*{value}"):
        TrainConfig(**{field: value})


def test_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    configs = dict(config=asdict(GPTConfig()), train_config=asdict(TrainConfig()))
    train_gpt2.save_checkpoint(path, step=1, **configs)

    def full_disk(state, f):
        f.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        train_gpt2.save_checkpoint(path, step=2, **configs)
    assert train_gpt2.load_checkpoint(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    configs["train_config"]["dropout"] = configs["train_config"].pop("seed")
    train_gpt2.save_checkpoint(path, step=3, **configs)
    with pytest.raises(UserError, match="another version of this program, with other flags: (seed|dropout)"):
        train_gpt2.load_checkpoint(path)


class Evil:
    def __reduce__(self):
        return open, ("evil", "w")


@pytest.mark.parametrize("content", [Evil(), {"model": {}}, [1], {"format": 0}, b"", b"PK\x03\x04 and no more"])
def test_strange_checkpoints_are_refused_and_run_nothing(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match="ckpt.pt is no checkpoint of this program"):
        train_gpt2.load_checkpoint(path)
    assert not (tmp_path / "evil").exists()


def test_float16_on_a_cpu_survives_overflowing_gradients(make):
    model, optimizers, loader = make(4)
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    for _ in range(30):  # the scale halves with each step until the gradients fit
        optimizer_step(model, loader, optimizers, scaler, torch.autocast("cpu", torch.float16), CPU, 1e-3, 1.0, 1)
    assert scaler.get_scale() < 2.0**40
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_an_overflow_in_one_optimizer_is_skipped_by_both(make):
    model, optimizers, loader = make(4, "muon")
    before = [p.detach().clone() for p in model.parameters()]
    model.transformer.ln_f.bias.register_hook(lambda grad: grad * math.inf)  # AdamW's
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer_step(model, loader, optimizers, scaler, nullcontext(), CPU, 1e-3, 0.0, 1)
    assert scaler.get_scale() == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_checkpoint_without_a_scaler_goes_on_with_one(make):
    model, optimizers, loader = make(4)
    steps(model, optimizers, loader, 1)
    cfg, off = TrainConfig(), torch.amp.GradScaler("cpu", enabled=False)
    checkpoint = train_gpt2.checkpoint_state(3, model, optimizers, off, loader, cfg)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    train_gpt2.restore(checkpoint, optimizers, scaler, loader)
    assert scaler.get_scale() == 2.0**7
    train_gpt2.restore(train_gpt2.checkpoint_state(3, model, optimizers, scaler, loader, cfg), optimizers, off, loader)


def test_dtype_of_each_device():
    assert train_gpt2.pick_dtype("float16", CPU)[0] == torch.float16
    assert train_gpt2.pick_dtype("auto", CPU)[0] in (torch.float32, torch.bfloat16)
    for name in "auto", "bfloat16", "float16":  # without autocast neither these products nor a GradScaler
        assert train_gpt2.pick_dtype(name, torch.device("mps"))[0] == torch.float32


def test_loss_png_has_both_losses_over_tokens_and_gpt2s_for_fineweb_edu(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                        lambda figure, *args, **kwargs: drawn.append(figure.axes[0]))
    train = [5.0 + (-1) ** step for step in range(1, 41)]  # 4, 6, 4, 6, ...
    (tmp_path / "log.txt").write_text("0 val 10.800000\n40 val 5.000000\n" + "".join(
        f"{step} train {loss:.6f}\n" for step, loss in enumerate(train, 1)))
    train_gpt2.plot_losses(tmp_path, 100, "data/edu_fineweb10B")
    train_gpt2.plot_losses(tmp_path, 100, "fineweb10B")
    lines = {line.get_label(): line for line in drawn[0].get_lines()}
    assert list(lines) == ["train", "val", "OpenAI's GPT-2 124M"]
    assert list(lines["val"].get_xdata()) == [0, 4000] and list(lines["val"].get_ydata()) == [10.8, 5]
    smoothed = lines["train"].get_ydata()
    assert len(smoothed) == 40 and smoothed[2] == pytest.approx(np.mean(train[:5]))
    assert max(abs(smoothed[2:-2] - 5)) < 0.3
    assert set(lines["OpenAI's GPT-2 124M"].get_ydata()) == {train_gpt2.GPT2_LOSS}
    assert [line.get_label() for line in drawn[1].get_lines()] == ["train", "val"]


def test_processes_that_read_different_checkpoints_do_not_go_on(monkeypatch):
    monkeypatch.setattr(train_gpt2, "WORLD_SIZE", 2)
    monkeypatch.setattr(train_gpt2, "sum_over_ranks", lambda step: [step + 12])  # the other process's is of step 12
    loader = DataLoaderLite([np.zeros(100, dtype=np.uint16)], 1, 8)
    checkpoint = dict(step=13, n_windows=loader.n_windows, position=3, scaler={}, rng=torch.get_rng_state(),
                      optimizers=[])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with pytest.raises(UserError, match="one process read a checkpoint of step 13"):
        train_gpt2.restore(checkpoint, [], scaler, loader)
    train_gpt2.restore({**checkpoint, "step": 12}, [], scaler, loader)
    assert loader.position == 3
