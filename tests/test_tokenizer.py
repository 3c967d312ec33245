# SPDX-License-Identifier: MIT
"""Any text becomes exactly the tokens that the Hugging Face tokenizer makes of it, fast, in little memory.

The C is driven through tokenizer_driver.c, which includes patch.c ($PATCH_SOURCE: another file). What is
expected stands in golden/tokenizer*, which make_tokenizer_golden.py made with the library."""
import array
import json
import os
import shlex
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import zlib

import tokenizer_cases as cases

ROOT = os.path.dirname(cases.TESTS)
SOURCE = os.environ.get("PATCH_SOURCE", os.path.join(ROOT, "patch.c"))
SLOW = 10.0          # seconds for a megabyte: it takes 0.1 to 0.5, where a slow way takes 20 minutes
DRIVER = os.path.join(cases.TESTS, "tokenizer_driver.c")
NO_TOKEN = 0xFFFFFFFF

work = None          # a temporary folder for the drivers and the sections
drivers = {}


def setUpModule():
    global work
    work = tempfile.TemporaryDirectory()
    for name, tokens, merges, eot in (("gpt2",) + vocabulary(), ("small",) + small_vocabulary()):
        with open(section_file(name), "wb") as f:
            f.write(section(tokens, merges, eot))


def tearDownModule():
    drivers.clear()
    work.cleanup()


def section_file(name):
    return os.path.join(work.name, name + ".section")


def compile_driver(kind):
    """Builds the driver once per kind, plain or with sanitizers; None where those do not link or run."""
    if kind not in drivers:
        path = os.path.join(work.name, "driver-" + kind)
        flags = ["-O1", "-w", "-I", ROOT, "-DPATCH_SOURCE=\"%s\"" % SOURCE]
        if kind == "sanitized":
            flags += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        done = subprocess.run(
            shlex.split(os.environ.get("CC", "cc")) + flags + [DRIVER, "-o", path, "-lm"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode and kind == "plain":
            raise RuntimeError("tokenizer_driver.c does not compile:\n" + done.stdout.decode())
        runs = not done.returncode and subprocess.run(
            [path, "-", "read"], input=b"", stdout=subprocess.PIPE, stderr=subprocess.PIPE).returncode == 0
        drivers[kind] = path if runs else None
    return drivers[kind]


# ---- the section, as patch.c specifies it -----------------------------------------------------------

def vocabulary():
    """GPT-2's (tokens as bytes, merges as id triples, id of <|endoftext|>)."""
    to_byte = {u: b for b, u in cases.byte_to_unicode().items()}
    with open(cases.VOCAB, encoding="utf-8") as f:
        ids = json.load(f)
    with open(cases.MERGES, encoding="utf-8") as f:
        pairs = [line.split() for line in f if not line.startswith("#version") and line.strip()]
    tokens = [b""] * len(ids)
    for token, k in ids.items():
        tokens[k] = token.encode() if token == cases.EOT else bytes(to_byte[c] for c in token)
    return tokens, [(ids[a], ids[b], ids[a + b]) for a, b in pairs], ids[cases.EOT]


def small_vocabulary():
    """The first 255 merges, as a model for small machines has them: 512 tokens, the special one last."""
    tokens, merges, _ = vocabulary()
    return tokens[:256 + 255] + [cases.EOT.encode()], merges[:255], 511


def section(tokens, merges, eot, reserved=0):
    data = struct.pack("<4I", len(tokens), len(merges), eot, reserved)
    data += b"".join(struct.pack("<H", len(t)) + t for t in tokens)
    data += b"\0" * (-len(data) % 4)
    return data + b"".join(struct.pack("<3I", *m) for m in merges)


# ---- talking to the driver ----------------------------------------------------------------------------

def drive(mode, requests, name="gpt2", kind="plain"):
    stdin = b"".join(struct.pack("<I", len(r)) + r for r in requests)
    done = subprocess.run([compile_driver(kind), "-" if mode == "read" else section_file(name), mode],
                          input=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        raise AssertionError("driver %s: status %d: %s" % (
            mode, done.returncode, done.stderr.decode(errors="replace")[-2000:]))
    return done.stdout


def numbers(data):
    words = array.array("I", data)
    assert words.itemsize == 4
    if sys.byteorder == "big":
        words.byteswap()
    return words


def encode(texts, name="gpt2", kind="plain"):
    """[(pre-token lengths, ids)] of byte strings."""
    words, at, answers = numbers(drive("encode", texts, name, kind)), 0, []
    for _ in texts:
        lists = []
        for _ in range(2):
            lists.append(words[at + 1:at + 1 + words[at]].tolist())
            at += 1 + words[at]
        answers.append(tuple(lists))
    assert at == len(words)
    return answers


def answer_crc(answer):
    words = array.array("I", [len(answer[0])] + answer[0] + [len(answer[1])] + answer[1])
    if sys.byteorder == "big":
        words.byteswap()
    return zlib.crc32(words.tobytes())


def golden(name):
    with open(os.path.join(cases.GOLDEN, name), "rb") as f:
        data = f.read()
    if name.endswith(".json"):
        return json.loads(data.decode())
    return struct.unpack("<%dI" % (len(data) // 4), data)


class Encoding(unittest.TestCase):
    """GPT-2's vocabulary on text of every kind."""

    @classmethod
    def setUpClass(cls):
        cls.tokens = vocabulary()[0]

    def decodes(self, text, ids):
        self.assertEqual(b"".join(self.tokens[i] for i in ids), text)

    def same(self, texts, crcs):
        self.assertEqual(len(texts), len(crcs))
        for text, answer, crc in zip(texts, encode(texts), crcs):
            self.assertEqual(answer_crc(answer), crc, "%r became %r" % (text, answer))
            self.decodes(text, answer[1])

    def test_texts_have_the_librarys_tokens(self):
        """Hand-picked texts: contractions, white space, scripts, special tokens whole, cut and adjacent."""
        entries = golden("tokenizer.json")["texts"]
        self.assertEqual([e["text"] for e in entries], cases.TEXTS)
        answers = encode([e["text"].encode() for e in entries])
        for entry, (pretokens, ids) in zip(entries, answers):
            with self.subTest(text=entry["text"]):
                self.assertEqual((pretokens, ids), (entry["pretokens"], entry["ids"]))
                self.decodes(entry["text"].encode(), ids)

    def test_every_code_point_has_the_librarys_tokens(self):
        """All of Unicode: each code point alone, between letters, after a space, between digit and mark."""
        data, at, wrong = drive("points", []), 0, []
        for first, crc in zip(range(0, 0x110000, 256), golden("tokenizer-points.bin")):
            size, = struct.unpack_from("<I", data, at)
            words = numbers(data[at + 4:at + 4 + size])
            if sys.byteorder == "big":
                words.byteswap()
            if zlib.crc32(words.tobytes()) != crc:
                wrong.append("U+%04X" % first)
            at += 4 + size
        self.assertEqual(at, len(data))
        self.assertEqual(wrong, [], "blocks of 256 code points that begin here differ")

    def test_random_strings_have_the_librarys_tokens(self):
        """Strings over mixed alphabets."""
        self.same([t.encode() for t in cases.random_texts()], golden("tokenizer-strings.bin"))

    def test_invalid_utf8_has_the_librarys_tokens(self):
        """An invalid byte is a character, neither letter, number nor space, and comes back as it was."""
        self.same(cases.random_bytes(), golden("tokenizer-bytes.bin"))

    def test_any_bytes_come_back(self):
        """decode(encode(bytes)) == bytes for every pair of bytes and for long random ones."""
        draw = cases.Draw(4)
        texts = [bytes([a, b]) for a in range(256) for b in range(256)]
        texts += [bytes(draw.below(256) for _ in range(3000)) for _ in range(20)]
        for text, (pretokens, ids) in zip(texts, encode(texts)):
            self.decodes(text, ids)
            self.assertEqual(sum(pretokens), len(text))

    def test_every_token_is_reported_and_round_trips(self):
        """tokenizer_token gives the bytes of every id; encoding them gives tokens of the same bytes."""
        data, at, got = drive("tokens", []), 0, []
        while at < len(data):
            size, = struct.unpack_from("<I", data, at)
            got.append(data[at + 4:at + 4 + size])
            at += 4 + size
        self.assertEqual(got, self.tokens)
        alone = 0
        for k, (token, (_, ids)) in enumerate(zip(got, encode(got))):
            self.decodes(token, ids)
            alone += ids == [k]
        self.assertGreater(alone, 50000)        # a few, such as "\n\na", span two pre-tokens

    def test_a_megabyte_takes_a_second(self):
        """No text is slow: a megabyte of one letter, of spaces, of random letters, of special tokens."""
        expected = {name: (e["ids"], e["crc"]) for name, e in golden("tokenizer.json")["long"].items()}
        texts = cases.long_texts()
        self.assertEqual(sorted(expected), sorted(texts))
        compile_driver("plain")
        for name, text in texts.items():
            with self.subTest(text=name):
                started = time.time()
                answer, = encode([text.encode()])
                seconds = time.time() - started
                self.assertEqual((len(answer[1]), answer_crc(answer)), expected[name])
                self.assertTrue(seconds <= SLOW, "%s: %.1f s" % (name, seconds))

    def test_without_the_special_token_its_text_is_text(self):
        """A section whose eot is 0xFFFFFFFF reads <|endoftext|> as 13 characters."""
        tokens, merges, _ = small_vocabulary()
        with open(section_file("no-eot"), "wb") as f:
            f.write(section(tokens, merges, NO_TOKEN))
        (pretokens, ids), = encode([b"a" + cases.EOT.encode() + b" b"], "no-eot")
        self.assertEqual(pretokens, [1, 2, 9, 2, 2])
        self.assertNotIn(511, ids)
        self.assertEqual(b"".join(tokens[i] for i in ids), b"a<|endoftext|> b")


class Ranks(unittest.TestCase):
    """Random vocabularies whose ranks are in no sensible order, against merging spelled out."""

    @staticmethod
    def merge(ids, merges):
        """The lowest rank, and of equal ones the leftmost, is merged, again and again."""
        rank = {(a, b): (r, m) for r, (a, b, m) in enumerate(merges)}
        ids = list(ids)
        while True:
            found = [(rank[pair][0], k) for k, pair in enumerate(zip(ids, ids[1:])) if pair in rank]
            if not found:
                return ids
            r, k = min(found)
            ids[k:k + 2] = [merges[r][2]]

    def test_lowest_rank_then_leftmost(self):
        """The lowest rank merges first, the leftmost of equal ranks, whatever the vocabulary."""
        draw = cases.Draw(5)
        for turn in range(10):
            tokens, merges, seen = [bytes([b]) for b in range(256)], [], set()
            pool = [97, 98, 99][:1 + turn % 3]
            while len(merges) < 40:
                a, b = draw.pick(pool), draw.pick(pool)
                if (a, b) in seen or len(tokens[a]) + len(tokens[b]) > 12:
                    if len(seen) >= len(pool) ** 2:
                        break
                    seen.add((a, b))
                    continue
                seen.add((a, b))
                pool.append(len(tokens))
                merges.append((a, b, len(tokens)))
                tokens.append(tokens[a] + tokens[b])
            for k in range(len(merges) - 1, 0, -1):     # shuffle the ranks
                j = draw.below(k + 1)
                merges[k], merges[j] = merges[j], merges[k]
            with open(section_file("ranks"), "wb") as f:
                f.write(section(tokens, merges, NO_TOKEN))
            texts = [bytes(97 + draw.below(1 + turn % 3) for _ in range(draw.below(40)))
                     for _ in range(300)]
            for text, (_, ids) in zip(texts, encode(texts, "ranks")):
                self.assertEqual(ids, self.merge(text, merges), (text, merges))


class Section(unittest.TestCase):
    """What the reader makes of a section that is not as it should be, and what it costs in memory."""

    @classmethod
    def setUpClass(cls):
        cls.tokens, cls.merges, cls.eot = small_vocabulary()
        core = "ACTPATCH_CORE_TESTS" in os.environ  # it compiles more than it runs
        cls.kind = "sanitized" if not core and compile_driver("sanitized") else "plain"

    def read(self, sections):
        lines = drive("read", sections, kind=self.kind).decode().splitlines()
        self.assertEqual(len(lines), len(sections))
        return lines

    def with_token(self, k, token):
        return section(self.tokens[:k] + [token] + self.tokens[k + 1:], self.merges, self.eot)

    def with_merges(self, *changed):
        return section(self.tokens, list(changed) + self.merges[len(changed):], self.eot)

    def test_each_fault_is_named_with_its_place(self):
        """Every way in which a section can be wrong has a message that says which and where."""
        good = section(self.tokens, self.merges, self.eot)
        start = len(good) - 12 * len(self.merges)
        tokens_end = 16 + sum(2 + len(t) for t in self.tokens)
        odd = section(self.tokens + [b"y" * (2 if tokens_end % 4 else 3)], self.merges, self.eot)
        filled = len(odd) - 12 * len(self.merges) - 1
        a, b, m = self.merges[0]
        many = [b"%06d" % k for k in range(50258 - 256)]
        faults = [
            (b"", "byte 0: a length of 0 cannot be"),
            (good[:15], "byte 0: a length of 15 cannot be"),
            (struct.pack("<4I", NO_TOKEN, 0, NO_TOKEN, 0), "byte 0: token count 4294967295 is above"),
            (section(self.tokens[:256] + many, [], NO_TOKEN), "byte 0: token count 50258 is above d_vocab"),
            (good[:4] + struct.pack("<I", NO_TOKEN) + good[8:],
             "byte 4: merge count 4294967295 does not fit"),
            (good[:4] + struct.pack("<I", 254) + good[8:], "byte 4: merge count 254 does not fit"),
            (good + b"\0", "byte 4: merge count 255 does not fit"),
            (good[:-1], "byte 4: merge count 255 does not fit"),
            (section(self.tokens, self.merges, self.eot, 7), "byte 12: reserved word 7 is not zero"),
            (section(self.tokens, self.merges, 510), "byte 8: token 510 is not <|endoftext|>"),
            (section(self.tokens, self.merges, 512), "byte 8: token 512 is not <|endoftext|>"),
            (good[:16] + b"\xff\xff" + good[18:], "byte 16: token 0 runs past the section's end"),
            (self.with_token(0, b""), "byte value 33 has no token of its own"),
            (self.with_token(1, b"!"), "byte 19: token 1 repeats a single byte"),
            (odd[:filled] + b"\x01" + odd[filled + 1:], "byte %d: filler 1 is not zero" % filled),
            (self.with_merges((a, b, 512)), "byte %d: merge 0 does not yield its pair joined" % start),
            (self.with_merges((512, b, m)), "merge 0 does not yield its pair joined"),
            (self.with_merges((a, NO_TOKEN, m)), "merge 0 does not yield its pair joined"),
            (self.with_merges((a, 0, m)), "merge 0 does not yield its pair joined"),
            (self.with_merges((0, b, m)), "merge 0 does not yield its pair joined"),
            (self.with_merges((b, a, m)), "merge 0 does not yield its pair joined"),
            (self.with_merges((a, b, m), (a, b, m)),
             "byte %d: merge 1 has the pair of an earlier one" % (start + 12)),
            (self.with_token(m, b""), "merge 0 does not yield its pair joined"),
        ]
        self.assertEqual(self.read([good, odd]), ["ok", "ok"])
        for line, (_, expected) in zip(self.read([s for s, _ in faults]), faults):
            with self.subTest(expected=expected):
                self.assertIn("file: tokenizer byte", line)
                self.assertIn(expected, line)
                self.assertTrue(line.endswith("; convert the checkpoint again"), line)

    def test_holes_and_odd_tokens_are_accepted(self):
        """A hole in the ids, an unused added token and a token of 65,535 bytes harm nobody."""
        tokens = self.tokens[:511] + [b"", cases.EOT.encode(), "<special \u00e9>".encode(), b"y" * 65535]
        bytes_alone = section(self.tokens[:256], [], NO_TOKEN)
        self.assertEqual(self.read([section(tokens, self.merges, 512), bytes_alone]), ["ok", "ok"])

    def test_every_truncation_is_refused(self):
        """No section that ends early is taken for a shorter one."""
        bytes_alone = section(self.tokens[:256], [], NO_TOKEN)
        for good in (section(self.tokens, self.merges, self.eot), bytes_alone):
            for n, line in enumerate(self.read([good[:n] for n in range(len(good))])):
                self.assertIn("tokenizer byte", line, "%d of %d bytes were accepted" % (n, len(good)))

    def test_altered_sections_neither_crash_nor_change_a_text(self):
        """Random damage: refused with a message, or the text still decodes to itself (the driver looks)."""
        draw, good = cases.Draw(6), section(self.tokens, self.merges, self.eot)
        start, altered = len(good) - 12 * len(self.merges), []
        words = [0, 1, 255, 256, 511, 512, 0x7FFFFFFF, NO_TOKEN]
        for turn in range(4000):
            data = bytearray(good)
            for _ in range(1 + draw.below(3)):
                at = [draw.below(16), 16 + draw.below(start - 16), start + draw.below(len(good) - start),
                      draw.below(len(good))][turn % 4]
                kind = draw.below(5)
                if kind == 0:
                    data[at:at + 1] = bytes([draw.below(256)])
                elif kind == 1:
                    data[at:at + 4] = struct.pack("<I", draw.pick(words))
                elif kind == 2:
                    source = draw.below(len(good))
                    data[at:at + 12] = good[source:source + 12]
                elif kind == 3:
                    del data[at:at + 1 + draw.below(12)]
                else:                                           # two merges change ranks
                    i, j = (start + 12 * draw.below(len(self.merges)) for _ in range(2))
                    data[i:i + 12], data[j:j + 12] = data[j:j + 12], data[i:i + 12]
            altered.append(bytes(data))
        lines = self.read(altered)
        self.assertTrue(all(line == "ok" or "tokenizer byte" in line for line in lines))
        self.assertGreater(lines.count("ok"), 300)
        self.assertGreater(len(lines) - lines.count("ok"), 2000)

    def test_every_refused_allocation_is_reported_without_a_leak(self):
        """Each allocation of reading and encoding fails in turn, alone and with all later ones."""
        text = b"When John and Mary" + cases.EOT.encode() + b" went"
        self.assertEqual(drive("fail", [text], "small", self.kind).decode().split()[0], "ok")

    def test_a_small_buffer_is_reported_with_the_size_needed(self):
        """Every capacity: the ids that fit, PATCH_E_SIZE and the number needed, nothing beyond."""
        texts = [b"", b"a", b" John gave it to Mary", cases.EOT.encode() * 2, bytes(range(256))]
        self.assertEqual(drive("room", texts, "small", self.kind), b"ok\n")

    def test_sanitizers_find_nothing_in_odd_texts(self):
        """Texts of every kind under -fsanitize=address,undefined, where the compiler has it."""
        texts = [t.encode() for t in cases.TEXTS] + cases.random_bytes()[:500]
        self.assertEqual(encode(texts, "small", self.kind), encode(texts, "small"))

    def test_memory_suits_a_small_machine(self):
        """512 tokens: tables under 12 KB, 6.4 of them Unicode's; encoding: 28 bytes per byte of the longest word, not of the text."""
        prose = b"When John and Mary went to the shops, John gave the bag to Mary. "
        measured = [tuple(numbers(drive("memory", [prose * k], "small"))) for k in (1, 1000)]
        self.assertEqual(measured[0], measured[1])
        self.assertLessEqual(measured[0][0], 12 * 1024)
        self.assertEqual(measured[0][1], 28 * len(b" shops"))
        self.assertEqual(numbers(drive("memory", [b"a" * 100000], "small"))[1], 28 * 100000)


if __name__ == "__main__":
    unittest.main()
