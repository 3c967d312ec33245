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
    assert points[0] == (0, 0) and points[-1][1] == 0, "unicode_class relies on both"
    return points


HEAD = """\
/* ==== A. Generated Unicode tables ================================================================
   Written by tests/make_unicode.py, which asked tokenizers %s about every code point.
   An entry is class << 24 | first code point of a run of that class, which lasts up to the next
   entry: 0x1000041 reads "letters (class 1) from U+0041". The last run is `other`, so that whatever
   lies above Unicode, UTF8_INVALID included, is `other` too.
   Code points: %s. */

static const uint32_t unicode_runs[%d] = {"""

TAIL = """\
};

/* The class of a code point, of any value. A binary search: run `low` begins at or before the code
   point, run `high` after it. */
static int unicode_class(uint32_t code) {
    size_t low = 0, high = sizeof unicode_runs / sizeof unicode_runs[0];
    while (high - low > 1) {
        const size_t middle = low + (high - low) / 2;
        if ((unicode_runs[middle] & 0xFFFFFF) <= code)
            low = middle;
        else
            high = middle;
    }
    return (int)(unicode_runs[low] >> 24);
}"""


def main():
    found = classes()
    points = change_points(found)
    counts = ["%d %s" % (list(found.values()).count(k), NAMES[k]) for k in (1, 2, 3)]
    print(HEAD % (tokenizers.__version__, ", ".join(counts), len(points)))
    entries = ["0x%X," % (k << 24 | c) for c, k in points]
    line = "   "
    for entry in entries:
        if len(line) + 1 + len(entry) > 100:
            print(line)
            line = "   "
        line += " " + entry
    print(line)
    print(TAIL)


if __name__ == "__main__":
    sys.exit(main())
