"""The model against GPT-2's known numbers and against itself."""
import math

import pytest
import torch
import torch.nn.functional as F

import train_gpt2
from conftest import NANO
from train_gpt2 import (EOT, FewRows, GPT, GPTConfig, KVCache, MODELS, N_TOKENS, faster_on_a_cpu, orthogonal,
                        plain_attention)


def meta_gpt(**shape):
    with torch.device("meta"):
        return GPT(GPTConfig(**shape))


def count(params):
    return sum(p.numel() for p in params)


@pytest.mark.parametrize("name, expected", [
    ("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_parameter_counts(name, expected):
    shape = {field: MODELS[name][field] for field in ("n_layer", "n_head", "n_embd", "block_size")}
    assert count(meta_gpt(**shape).parameters()) == expected


def test_gpt_config_defaults_are_gpt2_124m():
    assert GPTConfig() == GPTConfig(block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768)
    assert count(meta_gpt(vocab_size=50304).parameters()) == 124_475_904


def test_decay_groups_of_gpt2():
    (adamw,) = meta_gpt().configure_optimizers("adamw", 0.1, 6e-4)
    decayed, not_decayed = adamw.param_groups
    assert (len(decayed["params"]), count(decayed["params"]), decayed["weight_decay"]) == (50, 124_318_464, 0.1)
    assert (len(not_decayed["params"]), count(not_decayed["params"]), not_decayed["weight_decay"]) == (98, 121_344, 0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizers_hold_every_parameter_once(optimizer):
    model = GPT(GPTConfig(**NANO, vocab_size=101))
    optimizers = model.configure_optimizers(optimizer, 0.1, 1e-3)
    held = [[id(p) for group in each.param_groups for p in group["params"]] for each in optimizers]
    assert sorted(sum(held, [])) == sorted(id(p) for p in model.parameters())
    matrices = {id(p) for n, p in model.named_parameters() if ".h." in n and p.dim() == 2}
    assert [type(each).__name__ for each in optimizers] == (["Muon", "AdamW"] if optimizer == "muon" else ["AdamW"])
    assert optimizer == "adamw" or set(held[0]) == matrices


def test_muon_is_torchs_muon_and_adamw():
    torch.manual_seed(0)
    ours, theirs = GPT(GPTConfig(**NANO, vocab_size=101)), GPT(GPTConfig(**NANO, vocab_size=101))
    theirs.load_state_dict(ours.state_dict())
    start = {n: p.detach().clone() for n, p in ours.named_parameters()}
    optimizers = ours.configure_optimizers("muon", 0.1, 1e-2)
    matrices = [n for n, p in ours.named_parameters() if ".h." in n and p.dim() == 2]
    named = dict(theirs.named_parameters())
    references = [
        torch.optim.Muon([named[n] for n in matrices], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([dict(params=[p for n, p in named.items() if n not in matrices and p.dim() == 2]),
                           dict(params=[p for p in named.values() if p.dim() == 1], weight_decay=0.0)],
                          lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)]
    for _ in range(4):
        for n, p in ours.named_parameters():
            p.grad = torch.randn_like(p)
            named[n].grad = p.grad.clone()
        for each in optimizers + references:
            each.step()
    for n, p in ours.named_parameters():
        error = (p - named[n]).norm() / (named[n] - start[n]).norm()  # of the update
        assert error < (0.03 if n in matrices else 1e-4), n  # theirs multiplies in bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 8, 40), (2, 40, 8), (1, 16, 16)])
def test_orthogonal_makes_singular_values_near_1(shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(*shape)
    U, _, Vh = torch.linalg.svd(x, full_matrices=False)
    y = orthogonal(x, dtype)
    assert y.shape == x.shape and y.dtype == dtype
    S = U.mT @ y.float() @ Vh.mT  # diagonal, as the singular vectors are the same
    diagonal = S.diagonal(dim1=1, dim2=2)
    assert 0.6 < diagonal.min() and diagonal.max() < 1.3
    assert (S - torch.diag_embed(diagonal)).abs().max() < 0.05
    assert torch.isfinite(orthogonal(torch.zeros(1, 4, 4), dtype)).all()


@pytest.mark.parametrize("dtype, expected", [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_muon_multiplies_in_the_dtype_of_the_run(monkeypatch, dtype, expected):
    seen, model = [], GPT(GPTConfig(**NANO, vocab_size=101))
    muon, _ = model.configure_optimizers("muon", 0.1, 1e-2, dtype)
    original = train_gpt2.orthogonal
    monkeypatch.setattr(train_gpt2, "orthogonal", lambda x, dtype: seen.append(dtype) or original(x, dtype))
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    muon.step()
    assert set(seen) == {expected} and len(seen) == 4  # one call a shape


@pytest.mark.parametrize("name", ["transformer.h.0.attn.c_attn.weight", "transformer.wpe.weight"])  # Muon's, AdamW's
def test_weight_decay_shrinks_a_weight_without_gradient(name):
    model = GPT(GPTConfig(**NANO, vocab_size=101))
    optimizers = model.configure_optimizers("muon", 0.5, 0.1)
    p = model.get_parameter(name)
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(p.detach(), 0.95 * before)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_frozen_weight_stays(optimizer):
    model = GPT(GPTConfig(**NANO, vocab_size=101))
    frozen = [model.transformer.h[0].mlp.c_fc.weight, model.transformer.ln_f.bias]
    before = [p.requires_grad_(False).clone() for p in frozen]
    others = model.transformer.h[1].mlp.c_fc.weight.detach().clone()
    optimizers = model.configure_optimizers(optimizer, 0.1, 1e-2)
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    for each in optimizers:
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(before, frozen))
    assert not torch.equal(others, model.transformer.h[1].mlp.c_fc.weight)


def test_shapes_and_tying():
    model = GPT(GPTConfig(**NANO, vocab_size=101))
    idx = torch.randint(101, (3, 7))
    logits, loss = model(idx)
    assert logits.shape == (3, 7, 101) and loss is None
    expected = F.cross_entropy(logits.flatten(0, 1), idx.flatten())
    logits, loss = model(idx, idx)
    assert logits is None and torch.equal(loss, expected)
    assert model.transformer.wte.weight is model.lm_head.weight


def test_initialization():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=256, vocab_size=5000, block_size=512))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(p.mean().item()) < std / 50, name
        else:
            assert torch.all(p == float("ln_" in name and name.endswith("weight"))), name


def test_first_loss_is_that_of_guessing():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, block_size=64))  # GPT-2's width and full vocabulary
    x, y = torch.randint(N_TOKENS, (2, 2, 64))
    assert 10.7 < model(x, y)[1].item() < 11.1


def test_causality():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**NANO, vocab_size=101))
    idx = torch.randint(101, (1, 20))
    changed = idx.clone()
    changed[0, 12] = (idx[0, 12] + 1) % 101
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("T", [1, 7, 64])
def test_plain_attention_of_cpu_training_equals_flash_attention(T):
    torch.manual_seed(0)
    q, k, v, weight = torch.randn(4, 2, 3, T, 16).bfloat16()
    gradients = []
    for dtype in torch.bfloat16, torch.float32:  # the plain formula, and flash attention
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        y = plain_attention(*inputs, is_causal=True)
        assert y.dtype == dtype
        (y * weight).sum().backward()
        gradients.append([y.float()] + [x.grad.float() for x in inputs])
    for plain, flash in zip(*gradients):
        torch.testing.assert_close(plain, flash, atol=0.05, rtol=0.05)


def test_compiled_training_has_the_gradients_of_plain_training():
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(**NANO)), torch.randint(101, (2, 17))
    faster_on_a_cpu(model)
    x, y = idx[:, :-1].contiguous(), idx[:, 1:].contiguous()
    plain_loss = model(x, y)[1]
    plain = torch.autograd.grad(plain_loss, model.parameters())
    graphs = []
    loss = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph)(x, y)[1]
    assert len(graphs) == 1  # nothing breaks it
    torch.testing.assert_close(loss, plain_loss)
    for compiled, expected in zip(torch.autograd.grad(loss, model.parameters()), plain, strict=True):
        torch.testing.assert_close(compiled, expected)


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**NANO, vocab_size=101))
    x, y = torch.randint(101, (2, 4, 16))
    (optimizer,) = model.configure_optimizers("adamw", 0.0, 1e-2)
    for _ in range(60):
        loss = model(x, y)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


def test_too_long_a_sequence_names_both_lengths():
    with pytest.raises(AssertionError, match="33 after 0 tokens, block_size=32"):
        GPT(GPTConfig(**NANO, vocab_size=101))(torch.zeros(1, 33, dtype=torch.long))


def test_heads_must_divide_the_channels():
    with pytest.raises(AssertionError):
        meta_gpt(n_embd=100, n_head=3)


# Sampling


@pytest.fixture
def model():
    torch.manual_seed(1)
    model = GPT(GPTConfig(**NANO, vocab_size=101))
    for name, p in model.named_parameters():  # so that the blocks, not the tied embedding, say which token is likely
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.5 if ".h." in name else 0.2)
    assert len(model.generate(torch.zeros(1, 1, dtype=torch.long), 60, temperature=0).unique()) > 10
    return model


@torch.no_grad()
def generate_without_cache(model, idx, n):
    """Greedy; when the context is full it goes on from the newest half, as generate says it does."""
    context = idx
    for _ in range(n):
        if context.size(1) > model.config.block_size:
            context = context[:, -(model.config.block_size // 2):]
        new = model(context)[0][:, -1].argmax(-1, keepdim=True)
        idx, context = torch.cat((idx, new), 1), torch.cat((context, new), 1)
    return idx


@torch.no_grad()
def test_linear_of_few_rows_is_that_of_many():
    for out_features in 5, 64, 200:  # less than a piece, one, several and a rest
        linear = torch.nn.Linear(48, out_features)
        x = torch.randn(40, 48)
        expected = linear(x)
        linear.__class__ = FewRows
        for rows in 1, 2, 3, 8, 15, 16, 40:
            y = linear(x[:rows].view(rows, 1, 48))
            assert y.shape == (rows, 1, out_features)
            torch.testing.assert_close(y[:, 0], expected[:rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_with_cache_equals_without_past_block_size(model, dtype):
    idx = torch.randint(101, (3, 5))
    out = model.to(dtype).generate(idx, 80, temperature=0)
    assert out.shape == (3, 85)
    if dtype == torch.float32:
        assert torch.equal(out, generate_without_cache(model, idx, 80))
    assert torch.equal(out[:1], model.generate(idx[:1], 80, temperature=0))  # a row does not depend on its neighbours


@torch.no_grad()
def test_cached_logits_equal_uncached_at_every_position(model):
    idx = torch.randint(101, (2, 32))
    full = model(idx)[0]
    for chunks in [1] * 32, [5] + [1] * 27:  # token by token, after a prompt
        cache, start = [KVCache(32) for _ in model.transformer.h], 0
        for n in chunks:
            logits = model(idx[:, start:start + n], cache=cache)[0]
            start += n
            torch.testing.assert_close(logits[:, 0], full[:, start - 1], atol=1e-5, rtol=1e-5)


def test_several_tokens_after_a_past_are_refused(model):
    cache = [KVCache(32) for _ in model.transformer.h]
    model(torch.zeros(1, 3, dtype=torch.long), cache=cache)
    with pytest.raises(AssertionError, match="2 after 3 tokens, block_size=32"):  # is_causal would be wrong
        model(torch.zeros(1, 2, dtype=torch.long), cache=cache)


def test_long_prompt_is_cut_to_its_newest_tokens(model):
    idx = torch.randint(101, (1, 50))
    lengths = []
    model.transformer.wte.register_forward_pre_hook(lambda module, args: lengths.append(args[0].size(1)))
    cut = model.generate(idx[:, -32:], 3, temperature=0)
    assert torch.equal(model.generate(idx, 3, temperature=0)[:, 50:], cut[:, 32:])
    assert lengths == 2 * [32, 16, 1]  # the context is full, so the second token starts over from the newest half


def test_seed_temperature_and_top_k(model):
    idx = torch.zeros(4, 1, dtype=torch.long)

    def draws(seed, **kwargs):
        return model.generate(idx, 20, generator=torch.Generator().manual_seed(seed), **kwargs)

    assert torch.equal(draws(1), draws(1)) and not torch.equal(draws(1), draws(2))
    assert torch.equal(draws(1, top_k=1), model.generate(idx, 20, temperature=0))
    assert torch.equal(draws(1, top_k=1000), draws(1))
    assert torch.equal(draws(1, temperature=1e-4), model.generate(idx, 20, temperature=0))


def test_draws_follow_the_softmax_of_the_top_k(model):
    model.forward = lambda idx, cache: (torch.tensor([2.0, -1.0, 1.0, 0.5]).expand(len(idx), 1, 4), None)
    idx = torch.zeros(40_000, 1, dtype=torch.long)
    draws = model.generate(idx, 1, temperature=2.0, top_k=3, generator=torch.Generator().manual_seed(0))[:, 1]
    kept = torch.tensor([2.0, -math.inf, 1.0, 0.5])
    torch.testing.assert_close(draws.bincount(minlength=4) / 40_000, torch.softmax(kept / 2, 0), atol=0.01, rtol=0)


def test_padding_rows_are_never_drawn():
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=50304))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[N_TOKENS:] = 100.0  # all the padding rows beat all others by far, for any positive input
        model.transformer.ln_f.bias.fill_(1.0)
    out = model.generate(torch.full((8, 1), EOT), 10, temperature=1.0)
    assert out.max() < N_TOKENS
    assert model.generate(torch.full((1, 1), EOT), 3, temperature=0).max() < N_TOKENS
