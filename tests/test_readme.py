# SPDX-License-Identifier: MIT
"""README.md tells the truth: its commands print what it shows, and it names what the program knows.

In README.md a ```console block is run: lines `$ command`, each followed by what it prints, on both
outputs; a line `...` stands for any lines. Each command runs in a copy of the checkout made of symbolic
links, one for each ## section. A ```terminal block is the same in a terminal of 80 columns without
colours. ```c and ```python blocks are written to the file that their first line
names, and programs behind `python3` that import what is not installed are skipped by name. Numbers with
a fraction may differ by 2e-5, since other processors add in another order; all else is compared
character by character, but for the width of spaces. ```sh blocks are not run."""

import fcntl
import glob
import importlib.util
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import util  # noqa: E402

NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?(?![\w])")
NEEDS_MODULE = re.compile(r"^ *(?:import|from) (numpy|pandas|safetensors)\b", re.M)
TOLERANCE = 2e-5
COLOUR = re.compile(r"(?<=fill=')#[0-9a-f]{6}(?=')")
SVG_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
SHELL = ("console", "terminal")
PROMPTS = os.path.join(util.TINY, "ioi.tsv")


def readme():
    """README.md, and behind it tests/tiny/README.md, whose walk through the model is run too."""
    text = ""
    for folder in (util.ROOT, util.TINY):
        with open(os.path.join(folder, "README.md"), encoding="utf-8") as file:
            text += file.read()
    return text


class Block:
    """A fenced block: its language, section (a heading) and lines, and the number of its first line."""

    def __init__(self, language, section, line):
        self.language, self.section, self.line, self.lines = language, section, line, []

    def commands(self):
        """[(command, lines expected)] of a console or terminal block."""
        found = []
        for line in self.lines:
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif not found:
                raise AssertionError("README.md:%d: a console block begins with `$ `" % self.line)
            else:
                found[-1][1].append(line)
        return found


def blocks(text):
    found, section, open_block = [], "", None
    for number, line in enumerate(text.split("\n"), 1):
        if open_block is not None and line == "```":
            found.append(open_block)
            open_block = None
        elif open_block is not None:
            open_block.lines.append(line)
        elif line.startswith("```"):
            open_block = Block(line[3:], section, number + 1)
        elif line.startswith("## "):
            section = line[3:]
    if open_block is not None:
        raise AssertionError("README.md:%d: this block has no end" % open_block.line)
    return found


# ---- what is printed ---------------------------------------------------------------------------------


def same_line(got, want):
    """Equal but for the width of spaces and the last digits of numbers."""
    got, want = " ".join(got.split()), " ".join(want.split())
    if NUMBER.sub("#", got) != NUMBER.sub("#", want):
        return False
    for a, b in zip(NUMBER.findall(got), NUMBER.findall(want)):
        whole = not re.search("[.e]", a) and not re.search("[.e]", b)
        if a != b and (whole or not abs(float(a) - float(b)) <= TOLERANCE * (1 + abs(float(b)))):
            return False
    return True


def same(got, want):
    """Whether lines are those expected; a line `...` stands for any number of lines."""
    if not want:
        return not got
    if want[0].strip() == "...":
        return any(same(got[i:], want[1:]) for i in range(len(got) + 1))
    return bool(got) and same_line(got[0], want[0]) and same(got[1:], want[1:])


class Comparison(unittest.TestCase):
    def test_differences_are_noticed(self):
        """The comparison of this file accepts rounding and nothing else."""
        for got, want, equal in (
                ("mean 3.59969637", "mean 3.59969", True), ("mean 3.59969637", "mean 3.5998", False),
                ("0 1e-09", "0 -1e-09", True), ("1 H2", "1 H3", False), ("12 rows", "13 rows", False),
                ("1", "0.99999994", True), ("1", "0.9999", False), ("nan", "0", False),
                ("a", "a\nb", False), ("a\nb", "a", False), ("a\nb\nc", "a\n...", True),
                ("a\nb\nc", "...\nc", True), ("a\nb\nc", "...\nb", False), ("", "a", False),
                ("[3.5997 -3.5997]", "[3.59970 -3.5997]", True), ("-0.5", "0.5", False)):
            with self.subTest(got=got, want=want):
                self.assertEqual(same(got.split("\n"), want.split("\n")), equal)


def in_pipe(command, **options):
    """(exit status, what it prints on both outputs)."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120, **options)
    return done.returncode, done.stdout


def in_terminal(command, **options):
    """The same where both outputs are a terminal of 80 columns."""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    child, output = subprocess.Popen(command, stdout=terminal, stderr=terminal, **options), []
    os.close(terminal)
    while True:
        try:  # at the end Linux gives an error, other systems nothing
            output.append(os.read(master, 65536))
        except OSError:
            break
        if not output[-1]:
            break
    os.close(master)
    return child.wait(), b"".join(output).replace(b"\r\n", b"\n")


class Copy:
    """The checkout as symbolic links in a temporary folder, so that commands may write beside them."""

    made = {}

    @classmethod
    def of(cls, section):
        if section not in cls.made:
            cls.made[section] = cls(section)
        return cls.made[section]

    def __init__(self, section):
        self.folder, self.problems, self.skipped = util.scratch(), [], []
        for name in os.listdir(util.ROOT):
            if name not in ("actpatch", "libactpatch.so", ".git", "build", "__pycache__"):
                os.symlink(os.path.join(util.ROOT, name), os.path.join(self.folder.name, name))
        os.symlink(util.binary(), os.path.join(self.folder.name, "actpatch"))
        self.environment = {key: value for key, value in os.environ.items()
                            if key not in ("ACTPATCH_MODEL", "COLUMNS", "CLICOLOR_FORCE")}
        self.environment.update(NO_COLOR="1", LC_ALL="C.UTF-8", CC=os.environ.get("CC") or "cc",
                                PATH=os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
        if os.environ.get("ACTPATCH_BIN"):  # a program elsewhere has no bundled model beside it
            self.environment["ACTPATCH_MODEL"] = util.TINY_MODEL
        for block in blocks(readme()):
            if block.section == section:
                self.run_block(block)

    def run_block(self, block):
        if block.language in ("c", "python"):
            name = re.match(r"(?:/\*|#) (\w+\.\w+)", block.lines[0])
            if name is None:
                self.problems.append("README.md:%d: the first line names no file" % block.line)
            else:
                with open(os.path.join(self.folder.name, name.group(1)), "w", encoding="utf-8") as file:
                    file.write("\n".join(block.lines) + "\n")
        if block.language in SHELL:
            for command, want in block.commands():
                self.run_command(block, command, want)

    def run_command(self, block, command, want):
        missing = self.missing_module(command)
        if missing:
            self.skipped.append("`%s` needs %s" % (command, missing))
            return
        status, output = (in_terminal if block.language == "terminal" else in_pipe)(
            command, shell=True, cwd=self.folder.name, env=self.environment, stdin=subprocess.DEVNULL)
        got = output.decode("utf-8", "surrogateescape").split("\n")[:-1]
        if not same(got, want):
            self.problems.append("README.md:%d: `%s` (status %d) prints\n%s\nand not\n%s" % (
                block.line, command, status, "\n".join(got), "\n".join(want)))

    def missing_module(self, command):
        program = re.match(r"python3 (\w+\.py)$", command)
        if program is None or not os.path.exists(os.path.join(self.folder.name, program.group(1))):
            return None
        with open(os.path.join(self.folder.name, program.group(1)), encoding="utf-8") as file:
            for module in NEEDS_MODULE.findall(file.read()):
                if importlib.util.find_spec(module) is None:
                    return module
        return None


def tearDownModule():
    for copy in Copy.made.values():
        copy.folder.cleanup()


class Commands(unittest.TestCase):
    """A test for each section with console blocks; made below."""


def add_section(section):
    def test(self):
        copy = Copy.of(section)
        self.assertFalse(copy.problems, "\n\n".join(copy.problems))

    def test_programs(self):
        if Copy.of(section).skipped:
            self.skipTest("; ".join(Copy.of(section).skipped))

    test.__doc__ = "Every command of the README's section %r prints what stands there." % section
    name = re.sub(r"\W+", "_", section.lower()).strip("_") or "first_screen"
    setattr(Commands, "test_" + name, test)
    if any(block.language == "python" for block in blocks(readme()) if block.section == section):
        test_programs.__doc__ = "The Python programs of %r could run: what they import is installed." % section
        setattr(Commands, "test_%s_programs" % name, test_programs)


if os.path.exists(os.path.join(util.ROOT, "README.md")):
    for found in sorted({block.section for block in blocks(readme()) if block.language in SHELL}):
        add_section(found)


# ---- what is named -----------------------------------------------------------------------------------


def code(text):
    """All code of a Markdown text: its blocks and `spans`, a line each."""
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"(?ms)^```.*?^```$", "", text))
    return [line for block in blocks(text) for line in block.lines] + spans


def options_of(help_text):
    """The options in a help: the words that begin a line behind `options:`."""
    return set(re.findall(r"^ +(-[-\w]+)", help_text.split("\noptions:\n")[1], re.M)) | {"-h", "--help"}


class Names(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.text = readme()
        cls.code = code(cls.text)
        cls.words = set(re.findall(r"[\w.-]+", "\n".join(cls.code)))
        general = util.must("-h").stdout
        cls.commands = re.findall(r"^  (\w+) +\w", general.split("usage:")[1].split("To begin with")[0], re.M)
        cls.help = {command: util.must(command, "-h").stdout for command in cls.commands}
        cls.options = {command: options_of(text) for command, text in cls.help.items()}

    def test_every_command_and_option_is_mentioned(self):
        """Commands and options that the help knows stand in the README's code."""
        self.assertGreaterEqual(len(self.commands), 7)
        for command in self.commands:
            self.assertTrue(any("actpatch %s" % command in line for line in self.code), command)
            for option in sorted(self.options[command]):
                self.assertTrue(option in self.words, "%s of actpatch %s" % (option, command))

    def test_every_mentioned_command_and_option_exists(self):
        """Commands in the README's code are known, and take the options that they have there."""
        others = set()
        for path in [util.CONVERTER] + glob.glob(os.path.join(util.TESTS, "*.py")):
            with open(path, encoding="utf-8") as file:
                others |= set(re.findall(r"add_argument\(\s*[\"'](-[-\w]+)", file.read()))
        calls = 0
        for line in self.code:
            for command, rest in re.findall(r"(?:^|[ /`(|])actpatch ([a-z]\w*)((?: [^|;>#]*)?)", line):
                self.assertIn(command, self.commands, line)
                used = set(re.findall(r"(?<![\w-])(--?[a-z][-a-z]*)", re.sub(r"'[^']*'|\"[^\"]*\"", "", rest)))
                self.assertEqual(used - self.options[command], set(), line)
                calls += 1
        self.assertGreaterEqual(calls, 20)
        known = set().union(*self.options.values()) | {"--version", "-ffast-math"} | others
        spans = set(re.findall(r"(?<!`)`(--?[a-z][-a-z]*)", self.text))
        self.assertEqual(spans - known, set())

    def test_sweeps_and_metrics(self):
        """Every sweep and every metric of `actpatch patch` is in the README's code."""
        with open(os.path.join(util.ROOT, "patch.c"), encoding="utf-8") as file:
            sweeps = re.findall(r'^ *\{"(\w+)", "[lphds]+", \d, \{PATCH_', file.read(), re.M)
        self.assertEqual(len(set(sweeps)), 19, "the table sweep_rules in patch.c")
        metrics = re.search(r"--metric NAME +(.*)", self.help["patch"]).group(1)
        metrics = re.findall(r"\w+", metrics.replace("(default)", "").replace(" or ", " "))
        self.assertGreaterEqual(len(metrics), 6)
        for name in sweeps + metrics:
            self.assertTrue(name in self.words, name)

    def test_file_endings(self):
        """The endings that the README gives for -o are taken, and another is a usage error."""
        with util.scratch() as folder:
            for ending, status in ((".npy", 0), (".csv", 0), (".json", 0), (".svg", 0), (".html", 0), (".png", 2)):
                path = os.path.join(folder, "out" + ending)
                done = util.actpatch("patch", PROMPTS, "--sweep", "resid_pre", "-o", path)
                self.assertEqual(done.returncode, status, ending + done.stderr)
                self.assertEqual(os.path.exists(path), status == 0, ending)
                self.assertEqual(any(ending in line for line in self.code), status == 0, ending)

    def test_every_path_exists(self):
        """Files that README.md and tests/tiny/README.md name are there, and every `make` target."""
        with open(os.path.join(util.TINY, "README.md"), encoding="utf-8") as file:
            tiny = file.read()
        for name in re.findall(r"\b(?:tests/[\w./-]*\w|patch\.[ch]\b|convert_weights\.py)", self.text + tiny):
            self.assertTrue(os.path.exists(os.path.join(util.ROOT, name)), name)
        for name in re.findall(r"`([\w-]+\.(?:tsv|py|bin|json|txt|safetensors))`", tiny):
            self.assertTrue(os.path.exists(os.path.join(util.TINY, name)), name)
        with open(os.path.join(util.ROOT, "Makefile"), encoding="utf-8") as file:
            targets = re.findall(r"^([\w-]+):", file.read(), re.M)
        named = [re.match(r"(?:.* && )?make (?:-s )?([a-z][\w-]*)", line) for line in self.code]
        self.assertEqual({match.group(1) for match in named if match} - set(targets), set())


class Published(unittest.TestCase):
    """What others computed with the real GPT-2 small on the eight prompts with one space."""

    def setUp(self):
        if not os.environ.get("MODEL"):
            self.skipTest("no real weights; `make test MODEL=gpt2.bin` compares the published numbers")
        self.model = os.path.join(util.ROOT, os.environ["MODEL"])

    def near(self, got, want):
        self.assertTrue(abs(got - want) <= 2e-4, "%r, not %r" % (got, want))

    def sweep(self, name):
        with util.scratch() as folder:
            path = os.path.join(folder, "out.npy")
            util.must("patch", PROMPTS, "-m", self.model, "--sweep", name, "--normalize", "-o", path)
            tensor = util.read_npy(path)
        return lambda *index: tensor.data[index[0] * tensor.shape[1] + index[1]]

    def test_logit_differences(self):
        """The eight logit differences and both means are those published."""
        lines = [line.split("\t") for line in util.must("diff", PROMPTS, "-m", self.model).stdout.splitlines()]
        for line, want in zip(lines[1:9], (3.3367, 3.2016, 2.7094, 3.7974, 1.7204, 5.2812, 2.6008, 5.7674)):
            self.near(float(line[1]), want)
        self.near(float(lines[9][1]), 3.5519)
        self.near(float(lines[9][2]), -3.5519)

    def test_layers_and_positions(self):
        """resid_pre, attn_out and mlp_out have the published values."""
        resid, attn, mlp = (self.sweep(name) for name in ("resid_pre", "attn_out", "mlp_out"))
        for layer, want in enumerate((1.0, 1.0007, 1.0011, 1.0003, 0.9949, 0.9676, 0.9675, 0.9228, 0.6565, 0.0273,
                                      -0.0268, -0.0057)):
            self.near(resid(layer, 10), want)
        for layer, want in zip(range(7, 12), (0.0170, 0.3187, 0.9384, 1.0048, 0.9914)):
            self.near(resid(layer, 14), want)
        self.near(attn(8, 14), 0.5697)
        self.near(attn(11, 14), -0.4062)
        self.near(mlp(0, 10), 0.8508)

    def test_heads(self):
        """Heads patched at all positions have the published values."""
        for kind, heads in (("out", {(5, 5): 0.34350, (8, 6): 0.31856, (8, 10): 0.27794, (9, 9): 0.26361,
                                     (10, 7): -0.47991, (11, 10): -0.27818}),
                            ("q", {(10, 7): -0.51286}), ("v", {(8, 6): 0.31717}),
                            ("pattern", {(5, 5): 0.34351, (10, 7): -0.50510})):
            sweep = self.sweep("attn_head_%s_all_pos" % kind)
            for head, want in heads.items():
                self.near(sweep(*head), want)


class Pictures(unittest.TestCase):
    """The pictures of tests/pictures are those that the program draws."""

    def near(self, got, want):
        """The same picture: numbers within the last digits shown, colours within two steps, all else equal."""
        colours = [COLOUR.findall(picture) for picture in (got, want)]
        got, want = (COLOUR.sub("", picture) for picture in (got, want))
        self.assertEqual(SVG_NUMBER.sub("", got), SVG_NUMBER.sub("", want))
        for a, b in zip(map(float, SVG_NUMBER.findall(got)), map(float, SVG_NUMBER.findall(want))):
            self.assertTrue(abs(a - b) <= 1e-4 * (1 + abs(b)), (a, b))
        for a, b in zip(*colours):
            for i in (1, 3, 5):
                self.assertTrue(abs(int(a[i:i + 2], 16) - int(b[i:i + 2], 16)) <= 2, (a, b))

    def test_pictures_are_those_that_make_pictures_draws(self):
        """tests/pictures.sh draws the committed files again: the same bytes, but for other processors' last digits."""
        committed = os.path.join(util.TESTS, "pictures")
        with util.scratch() as folder:
            done = util.run(["sh", os.path.join(util.TESTS, "pictures.sh"), folder], env={"ACTPATCH_BIN": util.binary()})
            self.assertEqual((done.returncode, done.stdout + done.stderr), (0, ""))
            self.assertEqual(sorted(os.listdir(folder)), sorted(os.listdir(committed)))
            for name in os.listdir(folder):
                pictures = []
                for place in (folder, committed):
                    with open(os.path.join(place, name), encoding="utf-8") as file:
                        pictures.append(file.read())
                with self.subTest(name):
                    if pictures[0] != pictures[1]:
                        self.near(*pictures)

    def test_the_readme_shows_them_all(self):
        """Every picture is shown, by a path relative to the README and with words in its place."""
        shown = re.findall(r"^!\[[^\]\n]{20,}\]\((tests/pictures/[\w.]+)\)$", readme(), re.M)
        self.assertEqual(sorted(shown), sorted("tests/pictures/" + name for name in
                                               os.listdir(os.path.join(util.TESTS, "pictures"))))


class Demo(unittest.TestCase):
    def demo(self, python):
        if not os.path.exists(os.path.join(util.ROOT, "actpatch")):
            util.build_program()
        done = util.run(["sh", os.path.join(util.TESTS, "demo.sh")], env={"PYTHON": python})
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stderr, "")
        self.assertLessEqual(max(len(line) for line in done.stdout.split("\n")), 80)
        for start, count in (("line ", 1), ("mean ", 1), ("resid_pre ", 1), ("attn_head_out_all_pos ", 1),
                             ("  answer |", 8)):
            lines = [line for line in done.stdout.split("\n") if line.startswith(start)]
            self.assertEqual(len(lines), count, start)
        return done.stdout

    def test_demo(self):
        """The demo converts, shows the eight prompts and both heat maps, in 80 columns."""
        self.assertIn("equals tests/tiny/model.bin", self.demo(sys.executable))

    def test_demo_without_python(self):
        """Without Python the demo shows the same with the committed flat file."""
        self.assertIn("no Python", self.demo("no-such-python"))


if __name__ == "__main__":
    unittest.main()
