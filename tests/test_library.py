# SPDX-License-Identifier: MIT
"""patch.h keeps its word: its example runs, every error is one, nothing leaks, and other languages can call it.

`make lib` builds what is tested, from a copy of the sources ($PATCH_SOURCE: another patch.c); library_driver.c
is linked with it and knows patch.h alone. A second build has no mmap and reads the model piece by piece."""

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import util  # noqa: E402

SOURCE = os.environ.get("PATCH_SOURCE", os.path.join(util.ROOT, "patch.c"))
CC = shlex.split(os.environ.get("CC", "cc"))
DRIVER = os.path.join(util.TESTS, "library_driver.c")
STRICT = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror"]

folder = None
models = {}


def setUpModule():
    global folder
    folder = util.scratch()
    unittest.addModuleCleanup(folder.cleanup)
    unittest.addModuleCleanup(models.clear)
    for name, source in (("patch.c", SOURCE), ("patch.h", os.path.join(util.ROOT, "patch.h")),
                         ("Makefile", os.path.join(util.ROOT, "Makefile"))):
        shutil.copy(source, at(name))
    run(["make", "-C", folder.name, "lib", "CC=" + " ".join(CC), "CFLAGS=" + util.LEVEL, "WARN=-w"])
    os.mkdir(at("empty"))  # the driver's own folder
    build("driver", ["-D_POSIX_C_SOURCE=200809L", "-pthread"], DRIVER)


def at(name):
    return os.path.join(folder.name, name)


def run(argv, **options):
    done = util.run(argv, **options)
    if done.returncode:
        raise AssertionError("%s: status %d\n%s%s" % (" ".join(argv), done.returncode, done.stdout, done.stderr))
    return done.stdout


def build(name, flags, *sources):
    """Compile a program against patch.h and link it with the library that `make lib` has made."""
    run(CC + ["-std=c99", "-O1", "-w", "-I", folder.name] + flags + list(sources) +
        [at("libactpatch.so"), "-Wl,-rpath," + folder.name, "-lm", "-o", at(name)])
    return at(name)


def build_unmapped():
    """The driver with a patch.c that has no mmap and no OpenMP."""
    if not os.path.exists(at("unmapped")):
        run(CC + ["-std=gnu99", "-O1", "-w", "-DPATCH_NO_MMAP", "-DPATCH_NO_MAIN", "-D_POSIX_C_SOURCE=200809L",
                  "-pthread", "-I", folder.name, DRIVER, at("patch.c"), "-lm", "-o", at("unmapped")])
    return at("unmapped")


def model(name):
    if name not in models:
        models[name] = util.TINY_MODEL if name == "tiny" else util.convert(
            os.path.join(util.GOLDEN, name), at(name + ".bin"), "--no-tokenizer")
    return models[name]


def example():
    """The program in patch.h's head comment."""
    with open(os.path.join(util.ROOT, "patch.h"), encoding="utf-8") as file:
        comment = file.read().split("*/")[1]
    start = comment.index("       #include \"patch.h\"")
    lines = comment[start:comment.index("\n       }\n", start)].split("\n") + ["       }"]
    if any(line.strip() and not line.startswith("       ") for line in lines):
        raise AssertionError("the program in patch.h is not indented by seven spaces")
    return "\n".join(line[7:] for line in lines) + "\n"


class Library(unittest.TestCase):
    def drive(self, *words, program="driver"):
        done = util.run([at(program)] + list(words), env={"OMP_WAIT_POLICY": "passive"}, cwd=folder.name)
        self.assertEqual(done.returncode, 0, done.stdout[-3000:] + done.stderr[-3000:])
        self.assertEqual(os.listdir(at("empty")), [])
        return done.stdout

    def check(self, *words, program="driver"):
        self.assertRegex(self.drive(*words, program=program), "[1-9][0-9]* checks, 0 failed\n$")

    def test_the_program_in_the_head_comment(self):
        """It compiles without a warning, runs, and prints the final row that `cache` writes."""
        with open(at("example.c"), "w", encoding="utf-8") as file:
            file.write(example())
        said = util.run([build("example", STRICT[1:], at("example.c"))])
        self.assertEqual((said.returncode, said.stderr), (0, ""))
        text = re.search("text = \"(.*)\";", example()).group(1)
        util.must("cache", "--text", text, "--names", "ln_final.hook_normalized", "-o", at("c.safetensors"), "-m",
                  model("tiny"))
        rows = util.read_safetensors(at("c.safetensors"))[0]["ln_final.hook_normalized"]
        self.assertEqual(said.stdout, "%d tokens, final row starts with %f\n" % (
            rows.shape[1], rows.data[(rows.shape[1] - 1) * rows.shape[2]]))

    def test_the_example_says_what_is_wrong(self):
        """Where there is no model it prints one line and fails."""
        with open(at("example.c"), "w", encoding="utf-8") as file:
            file.write(example())
        done = util.run([build("example", [], at("example.c"))], cwd=at("empty"))
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, "^tests/tiny/model.bin: .*; .*\n$")

    def test_header_as_c99(self):
        """patch.h alone is ISO C99 without a warning, and may be included twice."""
        with open(at("twice.c"), "w", encoding="utf-8") as file:
            file.write("#include \"patch.h\"\n#include \"patch.h\"\nint twice(void);\n"
                       "int twice(void) { return PATCH_N_HOOKS; }\n")
        run(CC + STRICT + ["-Wstrict-prototypes", "-I", folder.name, "-c", at("twice.c"), "-o", at("twice.o")])

    def test_header_as_cpp(self):
        """A C++ program compiles without a warning, links with the library and runs."""
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if not compiler:
            self.skipTest("no C++ compiler")
        with open(at("user.cc"), "w", encoding="utf-8") as file:
            file.write("#include \"patch.h\"\n#include <cstdio>\n#include <cstring>\n"
                       "int main(int, char **argv) {\n"
                       "    patch_model *model = 0;\n    patch_options options = patch_options_default();\n"
                       "    patch_error error;\n    std::memset(&error, 0, sizeof error);\n"
                       "    if (patch_model_open(argv[1], &options, &model, &error) != PATCH_OK)\n"
                       "        return std::puts(error.message), 1;\n"
                       "    std::printf(\"%d\\n\", patch_model_dims(model)->d_mlp);\n"
                       "    patch_model_free(model);\n    return 0;\n}\n")
        run([compiler, "-std=c++98", "-pedantic", "-Wall", "-Wextra", "-Werror", "-I", folder.name, at("user.cc"),
             at("libactpatch.so"), "-Wl,-rpath," + folder.name, "-o", at("user")])
        self.assertEqual(run([at("user"), model("odd")]), "77\n")

    def test_models_in_memory_and_folded(self):
        """However a model is opened, every function gives the same: mapped, memory, unaligned, folded, read."""
        if not util.CORE:
            build_unmapped()
        for name in ("odd", "untied") if util.CORE else ("tiny", "odd", "untied"):
            for program in ("driver",) if util.CORE else ("driver", "unmapped"):
                want = self.drive("digests", model(name), "open", at("empty"), program=program)
                self.assertGreater(len(want.splitlines()), 15)
                self.assertEqual(len({line.split(": ")[1] for line in want.splitlines()}), len(want.splitlines()))
                for how in ("memory", "memory4", "folded", "folded-memory"):
                    with self.subTest(model=name, program=program, how=how):
                        self.assertEqual(self.drive("digests", model(name), how, at("empty"), program=program), want)

    def test_digests_tell_models_apart(self):
        """The comparison above can fail: another model gives other numbers in every line."""
        for one, other in zip(*(self.drive("digests", model(name), "open", at("empty")).splitlines()
                                for name in ("tiny", "odd"))):
            self.assertNotEqual(one, other)

    def test_allocations_that_fail(self):
        """The Nth allocation fails, once or for good, for every function: an error each time, no leak."""
        self.check("failures", model("relu"), "all", at("empty"))
        self.check("failures", model("tiny"), "open;encode", at("empty"))

    def test_allocations_that_fail_without_mmap(self):
        """The same where the weights are read piece by piece."""
        build_unmapped()
        self.check("failures", model("single"), "open;verify;sha256;fold;execute;logits;lens", at("empty"),
                   program="unmapped")

    def test_wrong_files_and_arguments(self):
        """Files, tokens, cells and examples that do not fit: status, place, remedy, nothing kept or made."""
        self.check("errors", model("odd"), model("tiny"), "core", at("empty"))
        if not util.CORE:
            build_unmapped()
            self.check("errors", model("odd"), model("tiny"), "core", at("empty"), program="unmapped")

    def test_wrong_arguments_of_the_analyses(self):
        """Subjects, samples, partners and lengths that do not fit are refused, and nothing is kept."""
        self.check("errors", model("odd"), model("tiny"), "analyses", at("empty"))

    def test_subjects_that_are_no_tokens(self):
        """Causal tracing looks up no id that the model has not."""
        self.check("errors", model("odd"), model("tiny"), "subjects", at("empty"))

    def test_buffers_that_are_too_small(self):
        """Ids, bytes and names: the size that is needed comes back, and nothing is written behind the end."""
        self.check("sizes", model("tiny"))

    def test_two_threads_and_one_model(self):
        """Two threads at once give what one gives."""
        self.check("threads", model("odd"))

    def test_the_driver_can_fail(self):
        """A command that checks nothing is a failure."""
        self.assertEqual(util.run([at("driver"), "nonsense", model("odd")]).returncode, 1)


# ---- ctypes --------------------------------------------------------------------------------------------


class Error(ctypes.Structure):
    _fields_ = [("code", ctypes.c_int), ("where", ctypes.c_char * 128), ("message", ctypes.c_char * 384)]


class Run(ctypes.Structure):
    _fields_ = [("tokens", ctypes.POINTER(ctypes.c_int)), ("n_tokens", ctypes.c_int), ("edits", ctypes.c_void_p),
                ("n_edits", ctypes.c_int)]


class Read(ctypes.Structure):
    _fields_ = [("hook", ctypes.c_int), ("layer", ctypes.c_int), ("run", ctypes.c_int), ("pos", ctypes.c_int),
                ("out", ctypes.POINTER(ctypes.c_float)), ("id", ctypes.c_int)]


def declared():
    """The functions of patch.h, without its comments."""
    with open(os.path.join(util.ROOT, "patch.h"), encoding="utf-8") as file:
        text = re.sub(r"/\*.*?\*/", " ", file.read(), flags=re.S)
    return sorted(set(re.findall(r"^[a-z][\w \*]*?\b(patch_\w+)\([^;{]*;", text, flags=re.M)))


class Ctypes(unittest.TestCase):
    def setUp(self):
        self.lib = ctypes.CDLL(at("libactpatch.so"))
        self.lib.patch_model_free.argtypes = [ctypes.c_void_p]

    def test_every_function_is_exported(self):
        """What patch.h declares can be called from outside, and no other name of patch.c leaks out."""
        names = declared()
        self.assertIn("patch_execute", names)
        self.assertGreater(len(names), 20)
        self.assertEqual([name for name in names if not hasattr(self.lib, name)], [])
        if shutil.which("nm"):
            symbols = re.findall(r" [TDBRC] (\w+)", run(["nm", "-D", "--defined-only", at("libactpatch.so")]))
            self.assertEqual(sorted(name for name in symbols if not name.startswith("_")), names)

    def test_noise(self):
        """patch_trace_noise begins as NumPy's RandomState(seed).randn, and n changes nothing but the end."""
        for seed, want in ((1, (1.62434536, -0.61175641, -0.52817175)), (0, (1.76405235, 0.40015721, 0.97873798))):
            z = (ctypes.c_double * 701)()
            for n in (0, 1, 3, 700):
                self.lib.patch_trace_noise(ctypes.c_uint(seed), z, ctypes.c_size_t(n))
                self.assertEqual(z[n], 0)
                for got, value in zip(z[:n], want):
                    self.assertTrue(abs(got - value) <= 5.1e-9, z[:3])
                z[n:] = [0.0] * (701 - n)

    def test_from_python(self):
        """Python opens a model, encodes, runs and reads the logits that `top` prints."""
        lib, error, handle = self.lib, Error(), ctypes.c_void_p()
        text = b"When John and Mary went to the shops, John gave the bag to"
        self.assertEqual(lib.patch_model_open(b"no such file", None, ctypes.byref(handle), ctypes.byref(error)), 3)
        self.assertEqual((error.code, error.where, handle.value), (3, b"no such file", None))
        self.assertEqual(lib.patch_model_open(model("tiny").encode(), None, ctypes.byref(handle), None), 0)
        ids, n = (ctypes.c_int * 64)(), ctypes.c_size_t()
        self.assertEqual(lib.patch_encode(handle, text, ctypes.c_size_t(len(text)), 1, ids, ctypes.c_size_t(64),
                                          ctypes.byref(n), None), 0)
        row, logits = (ctypes.c_float * 64)(), (ctypes.c_float * 640)()
        runs = Run(ids, n.value, None, 0)
        reads = Read(21, 0, 0, n.value - 1, row, 0)  # ln_final.hook_normalized
        self.assertEqual(lib.patch_execute(handle, ctypes.byref(runs), ctypes.c_size_t(1), ctypes.byref(reads),
                                           ctypes.c_size_t(1), None, None), 0)
        self.assertEqual(lib.patch_logits(handle, row, ctypes.c_size_t(1), logits, None), 0)
        lib.patch_model_free(handle)
        for line in util.must("top", text.decode(), "-m", model("tiny")).stdout.splitlines():
            rank, token, logit = line.split("\t")[:3]
            self.assertEqual(sorted(range(640), key=lambda i: -logits[i])[int(rank)], int(token))
            self.assertTrue(abs(logits[int(token)] - float(logit)) <= 1e-5, line)


if __name__ == "__main__":
    unittest.main()
