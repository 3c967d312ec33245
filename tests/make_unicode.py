#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Prints appendix A of patch.c: the Unicode classes of GPT-2's pre-tokenizer, as the
`tokenizers` library sees them.

    python3 tests/make_unicode.py > unicode.c        (needs tokenizers==0.22.*; some 10 s)

No copy of the Unicode database says which version of it the library's regular expression engine
was built with, so the library itself is asked: every code point goes through its pre-tokenizer,
after a letter, a digit, a punctuation mark and a line feed, and the neighbour that it stays
together with gives its class.
"""
import sys

import tokenizers
from tokenizers.pre_tokenizers import ByteLevel

NEIGHBOURS = "!a1\n"                  # one of each class, in the order of CLASS_OTHER, _LETTER, ...
MARKS = ".LNS"                        # of the same classes
NAMES = ("other", "letter", "number", "white space")


def code_points():
    """All code points that UTF-8 can hold: surrogates are not among them."""
    return (c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF)


def classes():
    """Returns {code point: class}; exactly one neighbour must take the character in."""
    cut = ByteLevel(add_prefix_space=False, use_regex=True).pre_tokenize_str
    found = {}
    for c in code_points():
        takers = [k for k, n in enumerate(NEIGHBOURS) if len(cut(n + chr(c))) == 1]
        assert len(takers) == 1, "U+%04X joins %s" % (c, takers)
        found[c] = takers[0]
    return found


def change_points(found):
    """Returns [(first code point, class)]; the surrogates carry on what stands before them."""
    points = []
    for c in code_points():
        if not points or points[-1][1] != found[c]:
            points.append((c, found[c]))
    assert points[0] == (0, 0) and points[-1][1] == 0, "char_class relies on both"
    return points


HEAD = """\
/* ==== A. Generated Unicode tables ================================================================
   Written by tests/make_unicode.py, which asked tokenizers %s about every code point.
   From U+0000 on, runs of code points of one class: the length in hexadecimal, none for 1, then the
   class, L letter, N number, S white space or . for others; "9.5S" reads U+0000 to U+0008 others,
   U+0009 to U+000D white space. Behind the last run all are others: what lies above Unicode is so
   too, UTF8_INVALID included. One literal, within the 4,095 bytes that C99 promises.
   Code points: %s. */

static const char unicode_runs[] ="""

TAIL = """\
/* See chapter 4. */
static void unicode_decode(uint32_t runs[UNICODE_RUNS]) {
    static const char marks[] = ".LNS"; /* in CLASS_OTHER's order */
    const char *p = unicode_runs;
    uint32_t first = 0;
    for (size_t i = 0; i < UNICODE_RUNS - 1; i++) {
        char *mark;
        const uint32_t length = (uint32_t)strtoul(p, &mark, 16);
        runs[i] = (uint32_t)(strchr(marks, *mark) - marks) << 24 | first;
        first += mark == p ? 1 : length;
        p = mark + 1;
    }
    runs[UNICODE_RUNS - 1] = first;
}"""


def main():
    found = classes()
    points = change_points(found)
    counts = ["%d %s" % (list(found.values()).count(k), NAMES[k]) for k in (1, 2, 3)]
    print(HEAD % (tokenizers.__version__, ", ".join(counts)))
    text = ""
    for (first, k), (end, _) in zip(points, points[1:]):
        text += ("%x" % (end - first) if end - first > 1 else "") + MARKS[k]
    assert len(text) <= 4095 and "0x" not in text
    lines = [text[i:i + 94] for i in range(0, len(text), 94)]
    print("\n".join('    "%s"' % line for line in lines) + ";\n")
    print(TAIL)
    print("UNICODE_RUNS of chapter 4: %d" % len(points), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
