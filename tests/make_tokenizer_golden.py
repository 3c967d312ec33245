#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Makes tests/golden/tokenizer*: what the Hugging Face tokenizer makes of tokenizer_cases.py's texts.

    python3 tests/make_tokenizer_golden.py      (needs tokenizers==0.22.* and transformers; a minute)

tokenizer.json            texts with the lengths in bytes of their pre-tokens and their ids, and CRCs
                          of long texts
tokenizer-points.bin      a CRC per 256 code points, each in four contexts
tokenizer-strings.bin     a CRC per random string
tokenizer-bytes.bin       a CRC per random byte string (invalid UTF-8)

An answer to a text is the list: number of pre-tokens, their lengths, number of ids, the ids; a
CRC is that of the answers' numbers as little-endian u32. The library takes no invalid UTF-8, so for
that its two halves are used apart: the pre-tokenizer with U+F8FF, which is neither letter, number
nor space, in place of each invalid byte; then its BPE model on the bytes themselves.
"""
import json
import os
import struct
import sys
import zlib

import tokenizers
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2TokenizerFast

import tokenizer_cases as cases

PLACEHOLDER = "\uf8ff"
BYTE_TO_UNICODE = cases.byte_to_unicode()
CUT = ByteLevel(add_prefix_space=False, use_regex=True)
MODEL = BPE.from_file(cases.VOCAB, cases.MERGES)
WHOLE = Tokenizer(BPE.from_file(cases.VOCAB, cases.MERGES))
WHOLE.pre_tokenizer = CUT
WHOLE.add_special_tokens([AddedToken(cases.EOT, special=True)])
EOT_ID = WHOLE.token_to_id(cases.EOT)


def segment_pieces(chars):
    """The pre-tokens of a segment, given as a list of (character for the pattern, its bytes)."""
    pieces = []
    for _, (begin, end) in CUT.pre_tokenize_str("".join(c for c, _ in chars)):
        pieces.append(b"".join(b for _, b in chars[begin:end]))
    return pieces


def by_halves(data):
    """([pre-token lengths], [ids]) of any bytes."""
    lengths, ids = [], []
    for k, segment in enumerate(data.split(cases.EOT.encode())):
        if k > 0:
            lengths.append(len(cases.EOT))
            ids.append(EOT_ID)
        text = segment.decode("utf-8", "surrogateescape")
        chars = [(PLACEHOLDER if 0xDC80 <= ord(c) <= 0xDCFF else c,
                  c.encode("utf-8", "surrogateescape")) for c in text]
        for piece in segment_pieces(chars):
            lengths.append(len(piece))
            ids += [t.id for t in MODEL.tokenize("".join(BYTE_TO_UNICODE[b] for b in piece))]
    return lengths, ids


def answer(text):
    """The same for a string, whose ids must be those of the whole library."""
    lengths, ids = by_halves(text.encode())
    assert ids == WHOLE.encode(text, add_special_tokens=False).ids, repr(text)
    return lengths, ids


def words(lengths, ids):
    return [len(lengths)] + lengths + [len(ids)] + ids


def block(first):
    """CRC of the answers to 256 code points."""
    points = [c for c in range(first, first + 256) if not 0xD800 <= c <= 0xDFFF]
    texts = [before + chr(c) + after for c in points for before, after in cases.CONTEXTS]
    numbers = []
    for text, encoded in zip(texts, WHOLE.encode_batch(texts, add_special_tokens=False)):
        ends = [end for _, (_, end) in CUT.pre_tokenize_str(text)]
        begins = [0] + ends[:-1]
        numbers += words([len(text[b:e].encode()) for b, e in zip(begins, ends)], encoded.ids)
    return zlib.crc32(struct.pack("<%dI" % len(numbers), *numbers))


def write(name, crcs):
    with open(os.path.join(cases.GOLDEN, name), "wb") as f:
        f.write(struct.pack("<%dI" % len(crcs), *crcs))


def main():
    assert tokenizers.__version__.startswith("0.22."), tokenizers.__version__
    # transformers' own front end, built from the same two files, must agree with this set-up
    fast = GPT2TokenizerFast(vocab_file=cases.VOCAB, merges_file=cases.MERGES)
    strings = cases.random_texts()
    for text in cases.TEXTS + strings:
        assert fast(text)["input_ids"] == answer(text)[1], repr(text)

    golden = {"tokenizers": tokenizers.__version__, "texts": [], "long": {}}
    for text in cases.TEXTS:
        lengths, ids = answer(text)
        golden["texts"].append({"text": text, "pretokens": lengths, "ids": ids})
    for name, text in cases.long_texts().items():
        lengths, ids = answer(text)
        golden["long"][name] = {"ids": len(ids), "crc": cases.crc(words(lengths, ids))}
    with open(os.path.join(cases.GOLDEN, "tokenizer.json"), "w") as f:
        f.write("{\"tokenizers\": %s,\n \"long\": %s,\n \"texts\": [\n%s\n]}\n" % (
            json.dumps(golden["tokenizers"]), json.dumps(golden["long"]),
            ",\n".join("  " + json.dumps(t) for t in golden["texts"])))
    write("tokenizer-strings.bin", [cases.crc(words(*answer(s))) for s in strings])
    write("tokenizer-bytes.bin", [cases.crc(words(*by_halves(b))) for b in cases.random_bytes()])
    write("tokenizer-points.bin", [block(c) for c in range(0, 0x110000, 256)])


if __name__ == "__main__":
    sys.exit(main())
