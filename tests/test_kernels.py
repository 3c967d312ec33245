# SPDX-License-Identifier: MIT
"""The inner loops are right on every tier: tuned == scalar bit for bit, exp and GELU within stated bounds.

The checks are in kernels_driver.c, which includes patch.c ($PATCH_SOURCE: another file). Every 61st float
goes through exp and GELU here, all 2^32 with

    python3 tests/test_kernels.py --exhaustive [TIER...]     (about a minute a tier)"""

import hashlib
import math
import os
import random
import shlex
import struct
import subprocess
import sys
import unittest
import zlib

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import util  # noqa: E402

SOURCE = os.environ.get("PATCH_SOURCE", os.path.join(util.ROOT, "patch.c"))
TIERS = ("avx512", "avx2", "vector", "plain")
MISSING = 77  # the driver's exit status where there is no such tier
SECTIONS = (
    ("tile", "a product's tile is its scalar twin's bit for bit, and near the sum in double"),
    ("attention", "scores and mixtures of values are near the sums in double"),
    ("softmax", "weights are near exp in double, a row of them sums to 1, a masked one to 0"),
    ("norm", "LayerNorm's scale and rows are those of double, rounded once"),
    ("functions", "erf-GELU and ReLU are libm's, and no result depends on where a number stands"),
    ("exp", "exp's relative error is below 1e-7 where the result is normal, for every 61st float"),
    ("gelu", "gelu_new's error is below 1.5e-7 |x|, for every 61st float"),
)

folder = None
drivers = {}


def setUpModule():
    global folder
    folder = util.scratch()
    unittest.addModuleCleanup(folder.cleanup)
    unittest.addModuleCleanup(drivers.clear)


def driver(tier):
    """The driver's path: as the Makefile builds the program, or without vectors for the tier `plain`."""
    kind = "plain" if tier == "plain" else "vectors"
    if kind not in drivers:
        path = os.path.join(folder.name, "kernels-" + kind)
        done = subprocess.run(
            shlex.split(os.environ.get("CC", "cc")) +
            ["-std=gnu99", "-w", "-I", util.ROOT, "-DPATCH_SOURCE=\"%s\"" % SOURCE] +
            (["-O1", "-DPATCH_PLAIN"] if kind == "plain" else [util.LEVEL]) +
            [os.path.join(util.TESTS, "kernels_driver.c"), "-o", path, "-lm"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        if done.returncode:
            raise RuntimeError("kernels_driver.c does not compile:\n" + done.stdout)
        drivers[kind] = path
    return drivers[kind]


def drive(tier, *words, **options):
    return subprocess.run([driver(tier), tier] + [str(word) for word in words], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=dict(os.environ, ACTPATCH_KERNELS=tier), **options)


class Kernels(unittest.TestCase):
    def check(self, tier, section):
        step = 61 if tier != "plain" and not util.CORE else 1021  # plain: the same code as `vector`
        done = drive(tier, section, *([step] if section in ("exp", "gelu") else []))
        if done.returncode == MISSING:
            self.skipTest("this processor or build has no %s" % tier)
        text = done.stdout.decode()
        self.assertEqual(done.returncode, 0, text)
        self.assertRegex(text, "[1-9][0-9]* checks, 0 failed\n$")

    def test_some_tier_is_there(self):
        """Not every tier is skipped: the best one answers to its name, and an unknown one to none."""
        found = [tier for tier in TIERS if drive(tier, "norm").returncode == 0]
        self.assertIn("plain", found)
        self.assertEqual(drive("vector", "nonsense").returncode in (1, MISSING), True)
        self.assertEqual(drive("nonsense", "norm").returncode, MISSING)

    def test_halves(self):
        """All 65,536 halves become the floats that Python's struct makes of them."""
        done = drive("vector", "half")
        got = struct.unpack("=65536f", done.stdout)
        want = struct.unpack("<65536e", struct.pack("<65536H", *range(65536)))
        for half in range(65536):
            if math.isnan(want[half]):
                self.assertTrue(math.isnan(got[half]), half)
            else:
                self.assertEqual(struct.pack("<f", got[half]), struct.pack("<f", want[half]), half)

    def test_sums(self):
        """CRC-32 and SHA-256 are zlib's and hashlib's, whatever the length and the pieces."""
        chance = random.Random(3)
        lengths = list(range(200)) + [1000, 4096, 65536, 100003]
        cases = [(n, piece) for n in lengths for piece in (1, 63, 64, 65, 7919) if n < 5000 or piece > 60]
        data = [bytes(chance.getrandbits(8) for _ in range(n)) for n, _ in cases if n < 5000]
        data += [b"\0" * n if piece % 2 else b"\xff" * n for n, piece in cases if n >= 5000]
        request = b"".join(struct.pack("=II", n, piece) + text for (n, piece), text in zip(cases, data))
        lines = drive("vector", "sums", input=request).stdout.decode().splitlines()
        self.assertEqual(len(lines), len(cases))
        for text, case, line in zip(data, cases, lines):
            self.assertEqual(line, "%08x %s" % (zlib.crc32(text), hashlib.sha256(text).hexdigest()), case)

    def test_plain_gives_the_same_bits(self):
        """--plain, the scalar kernels, makes byte for byte the same activations, on every tier."""
        model = util.convert(os.path.join(util.GOLDEN, "odd"), os.path.join(folder.name, "odd.bin"), "--no-tokenizer")
        output, done = os.path.join(folder.name, "cache.safetensors"), {}
        for tier in TIERS[:-1]:
            for words in ([], ["--plain"]):
                util.must("cache", os.path.join(util.GOLDEN, "odd", "prompts.tsv"), "-m", model, "--names",
                          "*,*result", "-o", output, *words, env={"ACTPATCH_KERNELS": tier})
                with open(output, "rb") as file:
                    done[tier, bool(words)] = file.read()
            self.assertEqual(done[tier, False] == done[tier, True], True, tier)
            said = util.must("info", "-m", model, env={"ACTPATCH_KERNELS": tier}).stdout
            self.assertRegex(said, "kernels\t(%s)\n" % ("|".join(TIERS)))


def add_tests():
    """One test a tier and section, named after them."""
    for tier in TIERS:
        for section, proves in SECTIONS:
            def test(self, tier=tier, section=section):
                self.check(tier, section)

            test.__doc__ = "%s: %s" % (tier, proves)
            setattr(Kernels, "test_%s_%s" % (section, tier), test)


add_tests()


def exhaustive(tiers):
    """exp and GELU of every float; the exit status of the program."""
    setUpModule()
    bad = 0
    for tier in tiers or TIERS:
        for section in ("exp", "gelu"):
            done = drive(tier, section, 1)
            bad += done.returncode not in (0, MISSING)
            print(tier, "is not here" if done.returncode == MISSING else done.stdout.decode(), flush=True)
    folder.cleanup()
    return 1 if bad else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--exhaustive"]:
        sys.exit(exhaustive(sys.argv[2:]))
    unittest.main()
