"""Models of transformers in and out."""
import json
import os
import re
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

import train_gpt2
from conftest import exit_code
from train_gpt2 import GPT, GPTConfig, UserError


@pytest.mark.parametrize("settings", [
    dict(), dict(n_layer=1, n_head=1), dict(activation_function="gelu_pytorch_tanh"), dict(n_inner=96)])
def test_logits_equal_those_of_transformers(hf_model, tmp_path, settings):
    theirs = hf_model(**settings)
    theirs.save_pretrained(tmp_path / "model")
    ours = GPT.from_pretrained(str(tmp_path / "model"))
    idx = torch.randint(101, (2, 17))
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)
    assert ours.transformer.wte.weight is ours.lm_head.weight
    assert ours.config == GPTConfig(17, 101, theirs.config.n_layer, theirs.config.n_head, 24)


def test_bfloat16_folder_and_sharded_and_bin_folders(hf_model, tmp_path):
    theirs = hf_model()
    idx = torch.randint(101, (1, 17))
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    expected = theirs(idx).logits
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "shards")(idx)[0], expected, atol=1e-4, rtol=1e-4)
    theirs.config.save_pretrained(tmp_path / "bin")
    torch.save(theirs.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "bin")(idx)[0], expected, atol=1e-4, rtol=1e-4)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    ours = GPT.from_pretrained(tmp_path / "bf16")
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=0.1, rtol=0.02)


def test_old_layout_with_masks_and_without_prefix(hf_model, tmp_path):
    theirs = hf_model()
    theirs.save_pretrained(tmp_path)
    sd = {k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    for layer in range(2):
        sd[f"h.{layer}.attn.bias"] = torch.ones(17, 17).tril().view(1, 1, 17, 17)
        sd[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(sd, tmp_path / "model.safetensors", {"format": "pt"})
    idx = torch.randint(101, (2, 17))
    torch.testing.assert_close(GPT.from_pretrained(tmp_path)(idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("setting, value", [
    ("activation_function", "relu"), ("activation_function", "gelu"), ("n_inner", 50), ("layer_norm_epsilon", 1e-6), ("add_cross_attention", True),
    ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("tie_word_embeddings", False)])
def test_other_architectures_are_refused_by_setting(hf_model, tmp_path, setting, value):
    hf_model(**{setting: value}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"{setting}={value!r}")):
        GPT.from_pretrained(tmp_path)


def change_weights(folder, change):
    sd = load_file(folder / "model.safetensors")
    change(sd)
    save_file(sd, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("change, message", [
    (lambda sd: sd.pop("transformer.h.1.attn.c_attn.weight"), r"missing_keys.*h\.1\.attn\.c_attn\.weight"),
    (lambda sd: sd.update({"transformer.h.0.extra": torch.ones(2)}), r"unexpected_keys.*h\.0\.extra"),
    (lambda sd: sd.update({"transformer.wpe.weight": torch.ones(5, 24)}), r"cannot load the weights of .*mismatch"),
])
def test_tensors_that_do_not_fit_are_named(hf_model, tmp_path, change, message):
    hf_model().save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(tmp_path)


def test_a_head_of_its_own_is_refused(hf_model, tmp_path):
    hf_model().save_pretrained(tmp_path)  # its config says that the head is the embedding
    change_weights(tmp_path, lambda sd: sd.update({"lm_head.weight": torch.ones(101, 24)}))
    with pytest.raises(UserError, match="its lm_head is not its wte"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["transformer.wpe.weight", "transformer.h.0.mlp.c_fc.weight"])
def test_large_weights_in_float16_are_finite(hf_model, tmp_path, name):
    theirs = hf_model().half()
    theirs.get_parameter(name).data.fill_(200.0)  # their sum is beyond float16
    theirs.save_pretrained(tmp_path)
    assert (GPT.from_pretrained(tmp_path).state_dict()[name] == 200).all()


def test_broken_folders(hf_model, tmp_path):
    whole = tmp_path / "whole"
    hf_model().save_pretrained(whole)

    def broken(name, change):
        shutil.copytree(whole, tmp_path / name)
        change(tmp_path / name)
        with pytest.raises(UserError, match=name):
            GPT.from_pretrained(tmp_path / name)

    broken("no_config", lambda f: (f / "config.json").unlink())
    broken("no_weights", lambda f: (f / "model.safetensors").unlink())
    broken("no_json", lambda f: (f / "config.json").write_text("{"))
    broken("llama", lambda f: (f / "config.json").write_text('{"model_type": "llama"}'))
    broken("unknown", lambda f: (f / "config.json").write_text('{"model_type": "no such model"}'))
    broken("truncated", lambda f: os.truncate(f / "model.safetensors", 9000))


def test_no_such_model_says_how_to_give_a_folder():
    with pytest.raises(UserError, match="no-such-model as a GPT-2 model id or a local folder"):
        GPT.from_pretrained("no-such-model")


# Sampling


@pytest.mark.parametrize("settings", [dict(), dict(n_layer=1), dict(vocab_size=50257, n_positions=64)])
def test_greedy_samples_equal_those_of_transformers(hf_model, tmp_path, settings):
    theirs = hf_model(**settings)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    V, n = theirs.config.vocab_size, theirs.config.n_positions - 5
    idx = torch.randint(V, (3, 5))
    kwargs = dict(max_new_tokens=n, min_new_tokens=n, attention_mask=torch.ones_like(idx), pad_token_id=0)
    assert torch.equal(ours.generate(idx, n, temperature=0), theirs.generate(idx, do_sample=False, **kwargs))


# Saving


def test_saved_model_loads_in_transformers_and_here(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=50304))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    mask = os.umask(0o022)
    model.save_pretrained(tmp_path / "model")
    os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()} == {0o644}  # safetensors' own: 0600
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 32
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert theirs.config.vocab_size == 50257 and theirs.lm_head.weight is theirs.transformer.wte.weight
    idx = torch.randint(50257, (2, 32))
    torch.testing.assert_close(model(idx)[0][..., :50257], theirs(idx).logits, atol=1e-4, rtol=1e-4)
    ours = GPT.from_pretrained(tmp_path / "model").state_dict()
    for k, v in model.state_dict().items():
        assert torch.equal(ours[k], v[:50257] if k in ("lm_head.weight", "transformer.wte.weight") else v), k
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("Hello, I'm a language model,")["input_ids"] == [
        15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert pipeline("text-generation", str(tmp_path / "model"))("Hello", max_new_tokens=3)[0]["generated_text"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_what_was_loaded_gives_it_back_bit_for_bit(hf_model, tmp_path, dtype):
    hf_model().to(dtype).save_pretrained(tmp_path / "theirs")
    first = GPT.from_pretrained(tmp_path / "theirs")
    first.save_pretrained(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for k in theirs:
        assert ours[k].dtype == dtype and torch.equal(theirs[k], ours[k]), k


def test_finetuned_model_loads_in_transformers(hf_model, tmp_path, text, cli):
    from transformers import AutoModelForCausalLM
    hf_model(vocab_size=50257, n_positions=32).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    done = cli("--init_from=pretrained", f"--model={tmp_path / 'base'}", "--data", text, "--batch_size=2",
               "--sequence_length=32", "--total_batch_size=64", "--max_steps=3", "--num_samples=0", "--no-compile")
    assert done.returncode == 0, done.stderr
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "log" / "model")
    ours = GPT.from_pretrained(tmp_path / "log" / "model")
    idx = torch.randint(50257, (2, 32))
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)
    before = load_file(tmp_path / "base" / "model.safetensors")["transformer.wpe.weight"]
    after = ours.transformer.wpe.weight
    assert after.dtype == torch.float32 and 0 < (before - after).abs().max() < 0.1  # trained, in float32, from there


TEXTS = ["First Citizen:\nBefore we proceed any further, hear me speak.\n\n\n  and\ttabs   ", "def f(x):\n    return x**2  # ok\n\tif x: pass\n",
         "naïve 你好 🙂👩‍👩‍👧 éa\u0301", "one<|endoftext|>two <|endoftext|>", "I'll 12345 it's WE'VE", "", " ", "\r\n \x1c\u3000"]


@pytest.mark.parametrize("kept", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"], ["vocab.json", "merges.txt", "tokenizer_config.json"]])
def test_exported_tokenizers_give_tiktokens_ids(tmp_path, kept):
    from transformers import AutoTokenizer
    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        if path.name not in [*kept, "config.json"]:
            path.unlink()
    tokenizer, enc = AutoTokenizer.from_pretrained(tmp_path), train_gpt2.get_tokenizer()
    if "tokenizer.json" in kept:  # read by itself, as transformers.js does
        from tokenizers import Tokenizer
        assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a<|endoftext|>").ids == [64, 50256]
    for text in TEXTS:
        ids = enc.encode(text, allowed_special="all")
        assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_an_inference_engine_gives_our_greedy_tokens(tmp_path):
    """CTranslate2, which is no requirement: it knows nothing of this file."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    from transformers import AutoTokenizer
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=50304))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.5 if ".h." in name else 0.2)
    model.save_pretrained(tmp_path / "model")
    ctranslate2.converters.TransformersConverter(str(tmp_path / "model")).convert(str(tmp_path / "converted"))
    tokenizer, idx = AutoTokenizer.from_pretrained(tmp_path / "model"), train_gpt2.get_tokenizer().encode("Hello, I'm a language model,")
    result = ctranslate2.Generator(str(tmp_path / "converted"), compute_type="float32").generate_batch(
        [tokenizer.convert_ids_to_tokens(idx)], max_length=30, min_length=30, sampling_topk=1, include_prompt_in_result=False)
    ours = model.generate(torch.tensor([idx]), 30, temperature=0)[0, len(idx):].tolist()
    assert result[0].sequences_ids[0] == ours and len(set(ours)) > 5


@pytest.mark.parametrize("error", [OSError("No space left on device"), safetensors.SafetensorError("No space left"),
                                   KeyboardInterrupt("No space left")])
def test_saving_never_leaves_half_a_file(tmp_path, monkeypatch, error):
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=101))
    model.save_pretrained(tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as m, torch.no_grad():
        m.setattr("safetensors.torch.save_file", full_disk)
        model.transformer.wpe.weight.zero_()
        with pytest.raises((UserError, KeyboardInterrupt), match="No space left"):
            model.save_pretrained(tmp_path / "model")
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before
    model.save_pretrained(tmp_path / "model")
    assert (load_file(tmp_path / "model" / "model.safetensors")["transformer.wpe.weight"] == 0).all()
    assert {p.name for p in (tmp_path / "model").iterdir()} == before.keys()


def test_weights_that_are_not_numbers_are_refused(hf_model, tmp_path):
    hf_model().save_pretrained(tmp_path)
    change_weights(tmp_path, lambda sd: sd["transformer.h.0.mlp.c_fc.bias"].fill_(torch.nan))
    with pytest.raises(UserError, match="transformer.h.0.mlp.c_fc.bias is not finite"):
        GPT.from_pretrained(tmp_path)


# Tokenizers


def word_level():
    from tokenizers import Tokenizer, models
    return Tokenizer(models.WordLevel({"Hello": 0, "a": 1}, unk_token="a")).to_str()


GPT2_VOCAB, GPT2_MERGES = (path.read_text(encoding="utf-8") for path in reversed(train_gpt2.VOCABULARY))
FOREIGN = {
    "merges": {"vocab.json": GPT2_VOCAB, "merges.txt": "\n".join(GPT2_MERGES.split("\n")[:2_000])},
    "tokenizer.json": {"tokenizer.json": word_level()},
    "broken": {"tokenizer.json": "{"},
}
TINY_FINETUNE = ("--init_from=pretrained --model=base --max_steps=2 --batch_size=2 --sequence_length=16 --total_batch_size=32 "
                 "--no-compile --device=cpu --eval_every=2").split()


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_model_with_another_tokenizer_is_refused(hf_model, text, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    hf_model(vocab_size=50257).save_pretrained("base")
    for name, content in FOREIGN[kind].items():
        (tmp_path / "base" / name).write_text(content, encoding="utf-8")
    for flags in ["--data", str(text), "--num_samples=0"], ["--max_steps=0"]:
        assert exit_code(*TINY_FINETUNE, *flags) == 1
        err = capsys.readouterr().err
        assert ("cannot load the tokenizer of base: " if kind == "broken" else "base has another tokenizer than GPT-2's") in err
    assert not Path("log").exists()


@pytest.mark.parametrize("files", [{}, {"vocab.json": GPT2_VOCAB, "merges.txt": GPT2_MERGES},
                                   {"tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'}])
def test_gpt2s_tokenizer_or_none_takes_texts(hf_model, text, tmp_path, monkeypatch, files):
    monkeypatch.chdir(tmp_path)
    hf_model(vocab_size=50257).save_pretrained("base")
    for name, content in files.items():
        (tmp_path / "base" / name).write_text(content, encoding="utf-8")
    assert exit_code(*TINY_FINETUNE, "--data", text, "--num_samples=1", "--max_new_tokens=3") == 0
    assert {"merges.txt", "vocab.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "log" / "model").iterdir()}


@pytest.mark.parametrize("vocab_size, exported", [(50260, 50260), (50304, 50257)])
def test_all_rows_but_our_padding_are_tokens(hf_model, tmp_path, monkeypatch, vocab_size, exported):
    monkeypatch.chdir(tmp_path)
    hf_model(vocab_size=vocab_size).save_pretrained("base")
    token = 50258 if exported > 50258 else 50256
    np.save("tokens.npy", np.full(500, token, np.uint16))
    assert exit_code(*TINY_FINETUNE, "--data=tokens.npy", "--num_samples=1", "--max_new_tokens=3") == 0
    assert exit_code("--init_from=resume", "--max_steps=3", "--num_samples=0") == 0
    before, after = (load_file(f"{name}/model.safetensors")["transformer.wte.weight"] for name in ("base", "log/model"))
    assert len(after) == exported and not torch.equal(before[token], after[token])
    assert exit_code(*TINY_FINETUNE, "--model=log/model", "--data=tokens.npy", "--num_samples=0", "--out_dir=more") == 0


def test_our_own_padding_takes_no_other_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("tokens.npy", np.full(500, 50258, np.uint16))
    flags = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--data=tokens.npy", "--max_steps=1", "--no-compile", "--device=cpu"]
    assert exit_code(*flags) == 1 and "tokens.npy has token 50258, but the model has only 50257 tokens" in capsys.readouterr().err


def test_missing_data_is_missed_before_the_weights_are_loaded(hf_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hf_model(vocab_size=50257).save_pretrained("base")
    monkeypatch.setattr(GPT, "from_pretrained", lambda name: pytest.fail("loaded the weights"))
    assert exit_code("--init_from=pretrained", "--model=base", "--data=no.txt") == 1
    assert "--data no.txt does not exist" in capsys.readouterr().err and not (tmp_path / "log").exists()


def test_a_folder_named_like_a_model_id_is_said_to_be_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert exit_code("--init_from=pretrained", "--max_steps=0") == 1
    assert "cannot load gpt2: no config.json in this folder" in capsys.readouterr().err


def test_a_model_with_an_odd_context_samples_and_finetunes(hf_model, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hf_model(vocab_size=50257, n_positions=19).save_pretrained("base")
    flags = ["--init_from=pretrained", "--model=base", "--device=cpu", "--num_samples=1", "--max_new_tokens=30"]
    assert exit_code(*flags, "--max_steps=0") == 0
    assert exit_code(*flags, "--max_steps=2", "--data", text, "--no-compile", "--eval_batches=2") == 0
    assert "tokens per step: 1024 = 16 micro-steps x 1 processes x B 4 x T 16" in capsys.readouterr().out


def test_a_small_vocabulary_is_not_taken_for_gpt2s(hf_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hf_model(vocab_size=101).save_pretrained("base")
    assert exit_code("--init_from=pretrained", "--model=base", "--max_steps=0", "--num_samples=1", "--device=cpu") == 1
    assert "samples and HellaSwag need GPT-2's 50257 tokens, but the model has 101: add --num_samples 0" in capsys.readouterr().err


def test_a_new_field_of_the_model_reaches_a_pretrained_one(hf_model, tmp_path, monkeypatch):
    """As --dropout would: GPT.from_pretrained takes the config that the flags made."""
    hf_model().save_pretrained(tmp_path)
    config = train_gpt2.pretrained_config(tmp_path)
    config.dropout = 0.2
    assert GPT.from_pretrained(tmp_path, config).config.dropout == 0.2
