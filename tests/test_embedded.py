# SPDX-License-Identifier: MIT
"""The library on a microcontroller without a heap: a Cortex-M4F under QEMU gives the desktop's numbers.

    python3 tests/test_embedded.py -v      flash, RAM and instructions, too"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import util  # noqa: E402

HERE = os.path.join(util.TESTS, "embedded")
PROMPTS = os.path.join(util.TINY, "ioi.tsv")
CC, NM, SIZE, QEMU = "arm-none-eabi-gcc", "arm-none-eabi-nm", "arm-none-eabi-size", "qemu-system-arm"
FLAGS = shlex.split("-mcpu=cortex-m4 -mthumb -mfloat-abi=hard -mfpu=fpv4-sp-d16 -std=gnu99 -O2 -Wall -Werror "
                    "-ffunction-sections -fdata-sections -DPATCH_NO_MAIN -DPATCH_CORE -DPATCH_BARE")
LINK = ["-nostartfiles", "-Wl,--gc-sections", "-T", os.path.join(HERE, "board.ld"), "-lm"]
MACHINE = [QEMU, "-M", "mps2-an386", "-icount", "shift=0,align=off", "-display", "none", "-monitor", "none",
           "-serial", "none", "-semihosting-config", "enable=on,target=native", "-kernel"]
RAM = 256 << 10
TOLERANCE = 1e-5


def missing():
    """What of the toolchain and the emulator is not here; None where all is."""
    for program, package in ((CC, "gcc-arm-none-eabi"), (NM, "binutils-arm-none-eabi"), (QEMU, "qemu-system-arm")):
        if shutil.which(program) is None:
            return "%s is not installed (Debian: %s)" % (program, package)
    done = subprocess.run([CC] + FLAGS + ["-x", "c", "-", "-o", os.devnull, "-lm", "-nostartfiles"],
                          input=b"#include <math.h>\n#include <stdio.h>\nvoid _start(void) {}\n",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return None if done.returncode == 0 else "%s has no C library (Debian: libnewlib-arm-none-eabi)" % CC


def compile_with(*words):
    done = util.run([CC] + FLAGS + ["-I", util.ROOT] + list(words))
    if done.returncode:
        raise AssertionError("the image does not build:\n" + done.stderr)


def build(elf, library, model, prompts, *flags):
    """Compile and link all but the library, patch.c's object file; returns {section: bytes}."""
    sources = [os.path.join(HERE, name) for name in ("main.c", "board.c", "data.S")]
    compile_with('-DMODEL="%s"' % model, '-DPROMPTS="%s"' % prompts, library, "-o", elf, *(list(flags) + sources + LINK))
    listed = util.run([SIZE, "-A", elf]).stdout
    return {name: int(n) for name, n in re.findall(r"^(\.\S+)\s+(\d+)\s", listed, re.M)}


def start(elf):
    """Run an image for at most two minutes: (exit status, the lines that it said)."""
    done = util.run(MACHINE + [elf], timeout=120)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def facts(lines):
    """{words: numbers} of the lines `words numbers`, and the tokens in a list, the cells in a dictionary."""
    tokens, cells, found = [], {}, {}
    for line in lines:
        words = line.split()
        if words[:1] == ["tokens"]:
            tokens.append([int(word) for word in words[1:]])
        elif words[:1] == ["cell"]:
            cells[int(words[1]), int(words[2])] = float(words[3])
        else:
            found[" ".join(re.findall(r"[a-z]+", line))] = [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?", line)]
    return tokens, cells, found


@unittest.skipIf(missing(), missing())
class Microcontroller(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scratch = util.scratch()
        cls.folded, cls.library = cls.at("folded.bin"), cls.at("patch.o")
        compile_with("-c", os.path.join(util.ROOT, "patch.c"), "-o", cls.library)
        util.must("fold", "-o", cls.folded)
        cls.columns, rows = util.read_tsv(PROMPTS)
        cls.row = rows[0]  # the pair that main.c takes
        cls.pair = util.write_tsv(cls.at("pair.tsv"), cls.columns, [cls.row])

    @classmethod
    def tearDownClass(cls):
        cls.scratch.cleanup()

    @classmethod
    def at(cls, name):
        return os.path.join(cls.scratch.name, name)

    def near(self, got, want, what):
        self.assertTrue(abs(got - want) <= TOLERANCE, "%s: %.9g, not %.9g" % (what, got, want))

    def holds(self, name, model):
        """An image with this model says what the program says, within the machine's memory."""
        elf = self.at(name + ".elf")
        sizes = build(elf, self.library, model, PROMPTS)
        status, lines = start(elf)
        self.assertEqual(status, 0, "\n".join(lines))
        tokens, cells, found = facts(lines)

        fields = dict(zip(self.columns, self.row))
        for got, column, bos in zip(tokens, ("clean", "corrupted", "answer", "wrong"), ([], [], ["--no-bos"], ["--no-bos"])):
            words = util.must("tokens", fields[column], "-m", model, *bos).stdout.split("\n")[0].split()
            self.assertEqual(got, [int(word) for word in words], column)
        self.assertEqual(len(tokens), 4)
        diff = util.must("diff", self.pair, "-m", model).stdout.splitlines()[1].split("\t")
        for got, want, what in zip(found["diff"], diff[1:], ("clean", "corrupted")):
            self.near(got, float(want), what)
        util.must("patch", self.pair, "--sweep", "resid_pre", "-m", model, "-o", self.at("want.json"))
        with open(self.at("want.json"), encoding="utf-8") as file:
            want = json.load(file)
        layers, places = want["shape"]
        self.assertEqual(sorted(cells), [(layer, pos) for layer in range(layers) for pos in range(places)])
        for (layer, pos), got in cells.items():
            self.near(got, want["values"][layer * places + pos], "layer %d, position %d" % (layer, pos))
        self.assertGreater(max(cells.values()) - min(cells.values()), 1)

        flash = sizes[".text"] + sizes[".data"] + sizes.get(".ARM.exidx", 0)
        ram = sizes[".data"] + sizes[".bss"] + sizes[".stack"]
        (used, room, live), (deep, stack) = found["buffer used of not freed"], found["stack used of"]
        self.assertLessEqual(ram, RAM)
        self.assertLessEqual(used, room)
        self.assertEqual(live, 0)
        self.assertLessEqual(deep, stack - 1024)  # an interrupt wants some, too
        if "-v" in sys.argv:
            print("\n%s: flash %d bytes (model %d, prompts %d, the rest code), RAM %d bytes: buffer %d of %d used, "
                  "stack %d of %d used, the rest %d" % (
                      name, flash, os.path.getsize(model), os.path.getsize(PROMPTS), ram, used, room, deep, stack,
                      ram - room - stack))
            for job in ("load", "diff", "sweep"):
                count = found["instructions " + job][0]
                print("%s: %s: %.1f million instructions, as an estimate %.2f s at 168 MHz and 1.5 cycles each" % (
                    name, job, count / 1e6, count * 1.5 / 168e6))
            print("%s: %d passes, %.1f MFLOP of products" % (name, found["passes"][0], found["flops"][0] / 1e6))

    def test_a_folded_model_in_flash(self):
        """What `actpatch fold` writes, read in place."""
        self.holds("folded", self.folded)

    def test_the_converted_model_in_flash(self):
        """model.bin itself: the weights are processed as they are read."""
        self.holds("raw", util.TINY_MODEL)

    def test_nothing_of_a_heap_is_linked(self):
        """No symbol of malloc, of files or of printf's floating point."""
        elf = self.at("symbols.elf")
        build(elf, self.library, self.folded, PROMPTS)
        names = {line.split()[-1] for line in util.run([NM, elf]).stdout.splitlines()}
        self.assertIn("patch_cells", names)
        self.assertEqual(sorted(name for name in names if re.fullmatch(
            r"_*(malloc|calloc|realloc|free|sbrk|fopen|fread|fwrite|dtoa|printf|Balloc)(_r)?", name)), [])

    def test_too_small_a_buffer_is_an_error(self):
        """64 KB do not do: the status says so and everything is given back."""
        elf = self.at("small.elf")
        build(elf, self.library, self.folded, PROMPTS, "-DBUFFER_BYTES=65536")
        status, lines = start(elf)
        self.assertEqual(status, 1)
        self.assertTrue(any(line.startswith("error: ") and "no memory" in line for line in lines), lines)
        self.assertEqual(facts(lines)[2]["buffer used of not freed"][2], 0)

    def test_the_comparison_can_fail(self):
        """Another pair of prompts in flash gives other numbers."""
        columns, rows = util.read_tsv(PROMPTS)
        elf = self.at("other.elf")
        build(elf, self.library, self.folded, util.write_tsv(self.at("other.tsv"), columns, rows[2:]))
        status, lines = start(elf)
        self.assertEqual(status, 0)
        with self.assertRaises(AssertionError):
            self.near(facts(lines)[2]["diff"][0], float(
                util.must("diff", self.pair).stdout.splitlines()[1].split("\t")[1]), "clean")


if __name__ == "__main__":
    unittest.main()
