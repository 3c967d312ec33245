# SPDX-License-Identifier: MIT
"""The texts that test_tokenizer.py and make_tokenizer_golden.py share; every Python makes the same."""
import os
import zlib

TESTS = os.path.dirname(os.path.abspath(__file__))
VOCAB = os.path.join(TESTS, "vocab", "vocab.json")
MERGES = os.path.join(TESTS, "vocab", "merges.txt")
GOLDEN = os.path.join(TESTS, "golden")
EOT = "<|endoftext|>"

N_STRINGS, N_BYTES = 5000, 3000
CONTEXTS = (("", ""), ("a", "b"), (" ", ""), ("1", "!"))      # around each code point


class Draw:
    """Knuth's 64-bit linear congruential generator; the random module's choices differ by version."""

    def __init__(self, seed):
        self.state = seed

    def below(self, n):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return (self.state >> 33) % n

    def pick(self, items):
        return items[self.below(len(items))]


def byte_to_unicode():
    """GPT-2's byte alphabet: printable Latin-1 bytes are themselves, the others U+0100 and up."""
    kept = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    others = [b for b in range(256) if b not in kept]
    return dict([(b, chr(b)) for b in kept] + [(b, chr(256 + i)) for i, b in enumerate(others)])


# ---- texts in full, whose tokens the golden file spells out -----------------------------------------

TEXTS = [
    "", " ", "  ", "a", " a", "  a", "\n", "\n\n", "\na", "\n\na", " \n a", "a ", "a  ",
    "a  b", "a\tb", "a \tb",
    "When John and Mary went to the shops, John gave the bag to Mary",
    "When John and Mary went to the shops,  John gave the bag to Mary",
    "gave", " gave", " activations", "aaa", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "I'd say  42 cats" + EOT, "I'm you're he's we've I'll they'd don't", "'S'T'RE'VE'M'LL'D", "I'M DON'T",
    "'", "''", "'s", " 's", "''s", "a's's", "'sa", "'re're", "'rre", "'lll", "'l", "'r", "'v",
    "1's", "!'s", "\u2019s",
    "2024-01-31, 3.14159e-10; 1,000,000", "x1y2z3", "1\u00b2\u2167\u0664\u4e94",
    "snake_case camelCase __init__(self)", "\tif (x) {\r\n\t\treturn;\r\n\t}\r\n",
    "na\u00efve caf\u00e9 cafe\u0301 \u00c5ngstr\u00f6m", "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \uc548\ub155", "\u3000\u4f60 \u3000 \u597d",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1ee",
    "\u0939\u093f\u0928\u094d\u0926\u0940",
    "a\u0085b \u0085 c\x1cd\x1d\x1e\x1f \x1f", "a\u180eb \u180e", "\ufeffa \ufeff a", "\x00\x01 \x00\x7f",
    "a\u00a0b \u00a0c",
    "\u2028\u2029\u202f\u205f \u1680x", EOT, EOT * 3, " %s " % EOT, "  %s  " % EOT, "a%sb" % EOT, "!!%s!!" % EOT,
    "<|endoftex", "<|endoftext|", "<" + EOT, "<|endoftex" + EOT, EOT[:-1] + EOT,
    "<|ENDOFTEXT|>", "< |endoftext|>",
    "\n\n" + EOT + "\n\na", "'" + EOT + "s", "\u00e9" + EOT + "\u0301", "|>" + EOT + "<|",
]


# ---- random texts, of which the golden files hold a CRC each ----------------------------------------

def ranges(*spans):
    return [chr(c) for first, last in spans for c in range(first, last + 1)]


ALPHABETS = [
    ranges((97, 122)),
    ranges((65, 90), (97, 122)),
    ranges((48, 57)),
    ranges((33, 126)),
    ranges((0, 127)),
    list("'sStTrReEvVmMlLdD "),
    [" "], [" ", "\n"], list(" \t\n\r\x0b\x0c"),
    ["\u0085", "\u00a0", "\x1c", "\x1d", "\x1e", "\x1f", "\u180e", "\ufeff", "\u200b", "\u2028", "\u3000", " "],
    ranges((0xA0, 0x24F)),
    ranges((0x300, 0x36F), (97, 100)),                     # combining marks on letters
    ranges((0x370, 0x52F)),
    ranges((0x590, 0x6FF)),
    ranges((0x900, 0x97F), (0xE00, 0xE5B)),
    ranges((0x4E00, 0x4E80), (0x3041, 0x30FF), (0xAC00, 0xAC40), (0x3000, 0x3003)),
    ranges((0xB2, 0xB3), (0xB9, 0xB9), (0xBC, 0xBE), (0x660, 0x669), (0x2150, 0x2188), (0x1D7CE, 0x1D7FF)),
    ranges((0x1F300, 0x1F6FF)) + ["\u200d", "\ufe0f"],
    ranges((0x2000, 0x206F)),
    ranges((0xD7F0, 0xD7FF), (0xE000, 0xE010), (0xFFF0, 0xFFFF), (0x10000, 0x10010), (0x10FFF0, 0x10FFFF)),
]
WORDS = """John Mary the shops gave when activation patching Wednesday uninteresting tokenizer I'll don't
 they've he'd we're it's I'm 1984 3.14 http://example.org foo_bar(x, y); e.g. naïve Ωmega""".split()
SPECIALS = [EOT, EOT, EOT + EOT, EOT[:-1], EOT[:11], EOT[1:], "<|", "|>", "<"]


def random_text(draw):
    parts = []
    for _ in range(draw.below(9)):
        kind = draw.below(10)
        if kind < 6:
            alphabet = draw.pick(ALPHABETS)
            parts += [draw.pick(alphabet) for _ in range(1 + draw.below(8))]
        elif kind < 8:
            parts.append(draw.pick(["", " ", "  ", "\n"]) + draw.pick(WORDS))
        elif kind == 8:
            parts.append(draw.pick(SPECIALS))
        else:
            c = draw.below(0x110000 - 0x800)
            parts.append(chr(c if c < 0xD800 else c + 0x800))
    return "".join(parts)


def random_texts():
    draw = Draw(1)
    return [random_text(draw) for _ in range(N_STRINGS)]


BROKEN = [
    b"\x80", b"\xbf", b"\xc0", b"\xc0\x80", b"\xc0\xa0", b"\xc1\xbf", b"\xc3", b"\xe0\x80\x80", b"\xe0\x9f\xbf",
    b"\xe2\x82", b"\xe2", b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xed\xa0\xbd\xed\xb8\x80", b"\xf0\x80\x80\x80",
    b"\xf0\x8f\xbf\xbf", b"\xf0\x9f\x98", b"\xf0\x9f", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xf7\xbf\xbf\xbf",
    b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80", b"\xfe", b"\xff", b"\xff\xfe", b"\xc2\xc2\x85",
    b"\xe2\x80\xc2\xa0",
]


def random_bytes_text(draw):
    """Broken UTF-8 among letters, digits, spaces and whole characters, or any bytes at all."""
    parts = []
    for _ in range(1 + draw.below(10)):
        kind = draw.below(6)
        if kind < 2:
            parts.append(draw.pick(BROKEN))
        elif kind == 2:
            parts.append(bytes(draw.below(256) for _ in range(1 + draw.below(6))))
        elif kind == 3:
            parts.append(bytes(0x80 + draw.below(128) for _ in range(1 + draw.below(6))))
        else:
            parts.append(random_text(draw)[:4].encode())
    return b"".join(parts)


def random_bytes():
    draw = Draw(2)
    return list(BROKEN) + [random_bytes_text(draw) for _ in range(N_BYTES - len(BROKEN))]


def long_texts():
    """A megabyte each of what makes slow tokenizers hang: {name: text}."""
    draw, n = Draw(3), 1000000
    letters = "".join(chr(97 + draw.below(26)) for _ in range(n))
    return {
        "one letter": "a" * n,
        "spaces": " " * n,
        "spaces and a letter": " " * n + "a",
        "random letters": letters,
        "random words": "".join(" " if c in "aeiou" else c for c in letters),
        "digits": "0" * n,
        "punctuation": "-" * n,
        "line feeds": "\n" * n,
        "less-than signs": "<" * n,
        "special tokens": EOT * (n // len(EOT)),
        "one Chinese character": "\u4e00" * (n // 3),
    }


def crc(words):
    """CRC-32 of a list of numbers as little-endian u32."""
    return zlib.crc32(b"".join(w.to_bytes(4, "little") for w in words))
