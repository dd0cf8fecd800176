"""Models of transformers in and out."""
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

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
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "shards")(idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)
    theirs.config.save_pretrained(tmp_path / "bin")
    torch.save(theirs.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "bin")(idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)
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
    ("activation_function", "relu"), ("n_inner", 50), ("layer_norm_epsilon", 1e-6), ("add_cross_attention", True),
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
    (lambda sd: sd.pop("transformer.h.1.attn.c_attn.weight"), r"missing .*h\.1\.attn\.c_attn\.weight"),
    (lambda sd: sd.update({"transformer.h.0.extra": torch.ones(2)}), r"left over .*h\.0\.extra"),
    (lambda sd: sd.update({"transformer.wpe.weight": torch.ones(5, 24)}), r"misshapen .*wpe\.weight"),
])
def test_tensors_that_do_not_fit_are_named(hf_model, tmp_path, change, message):
    hf_model().save_pretrained(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(tmp_path)


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
    broken("truncated", lambda f: (f / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:9000]))


def test_no_such_model_says_how_to_give_a_folder():
    with pytest.raises(UserError, match="no-such-model.*local folder"):
        GPT.from_pretrained("no-such-model")
