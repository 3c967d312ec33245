#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""actpatch on other machines: other compilers, word sizes, byte orders and systems, a row each.

    make portability [ROWS="s390x gcc"]     all rows, or those whose names begin with one of these words
    python3 tests/portability.py --list     the rows' names
    python3 tests/portability.py --packages the Debian packages that they need

A row compiles patch.c, where a single word of the compiler is a failure, and runs tests of this folder
with the result, under an emulator where the machine is another one. What is not installed is skipped by
name. Standard library only; everything is built in a temporary folder."""

import argparse
import collections
import concurrent.futures
import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

TESTS = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(TESTS)
WARN = ("-Wall -Wextra -Wshadow -Wconversion -Wstrict-prototypes -Wmissing-prototypes -Wcast-qual "
        "-Wdouble-promotion").split()
TOKENIZER = ["test_tokenizer.Ranks"] + ["test_tokenizer.Encoding.test_" + name for name in (
    "texts_have_the_librarys_tokens", "random_strings_have_the_librarys_tokens",
    "invalid_utf8_has_the_librarys_tokens")] + ["test_tokenizer.Section.test_" + name for name in (
        "each_fault_is_named_with_its_place", "every_truncation_is_refused")]
QUICK = ["test_golden.Diff", "test_golden.Cache.test_odd_default", "test_golden.Sweeps.test_odd_default",
         "test_golden.Sweeps.test_untied_default", "test_cli.Models"]
# Every hook, sweep, direction and metric, but on the smaller models.
CORE = QUICK + ["test_golden.Rest", "test_golden.Cache.test_tiny_default", "test_golden.Cache.test_odd_plain",
                "test_golden.Sweeps.test_odd_no_processing", "test_golden.Sweeps.test_odd_refactored_alone",
                "test_golden.Sweeps.test_relu_default", "test_golden.Sweeps.test_gelu_default",
                "test_golden.Sweeps.test_scaled_default", "test_golden.Sweeps.test_single_default",
                "test_cli.Prompts", "test_cli.Folded.test_altered_folded_files"] + TOKENIZER
WHOLE = ["test_golden." + name for name in ("Diff", "Cache", "Sweeps", "Rest", "Identities")] + [
    "test_cli"] + TOKENIZER

Row = collections.namedtuple("Row", "name what packages run")
rows = []
work = ""


class Skip(Exception):
    """This row cannot run here, and why."""


class Bad(Exception):
    """What is wrong."""


def row(name, what, packages=""):
    """Declare a row; the function returns the figures to print behind `what`."""
    def add(function):
        rows.append(Row(name, what, packages.split(), function))
        return function
    return add


# ---- building and testing ----------------------------------------------------------------------------


def need(*programs):
    for program in programs:
        if shutil.which(program) is None:
            raise Skip("no %s here" % program)


def command(argv, timeout=300, **options):
    """(status, everything it said); a command that does not end has failed."""
    options.setdefault("stdin", subprocess.DEVNULL)
    try:
        done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, **options)
    except subprocess.TimeoutExpired:
        raise Bad("%s: not finished after %d s" % (" ".join(argv)[:200], timeout))
    return done.returncode, done.stdout.decode("utf-8", "replace")


def silent(argv):
    """It must succeed and say nothing: no warning either."""
    status, said = command(argv)
    if status or said:
        raise Bad("%s: status %d\n%s" % (" ".join(argv), status, said[-3000:]))


def must(argv, **options):
    status, said = command(argv, **options)
    if status:
        raise Bad("%s: status %d\n%s" % (" ".join(argv), status, said[-3000:]))
    return said


def links(compiler, *libraries):
    """Skip where a compiler has no C library to link with."""
    need(compiler[0])
    file = os.path.join(work, "links-%d.c" % abs(hash(tuple(compiler))))
    with open(file, "w") as f:
        f.write("#include <errno.h>\n#include <math.h>\nint main(int n, char **v) { errno = n; return sin((double)n) > 2; }\n")
    status, said = command(compiler + [file, "-o", file[:-2] + ".out", "-lm"] + list(libraries))
    if status:
        raise Skip("%s cannot link: %s" % (" ".join(compiler), (said.strip().splitlines() or ["?"])[0][:120]))


def folder(name):
    """A folder with the bundled model in it, which the program looks for beside itself."""
    path = os.path.join(work, name)
    os.makedirs(path)
    shutil.copytree(os.path.join(TESTS, "tiny"), os.path.join(path, "tests", "tiny"))
    return path


def build(name, compiler, flags, libraries=()):
    """Compile patch.c without a word; returns the program's path."""
    path = os.path.join(folder(name), "program")
    silent(compiler + flags + [os.path.join(ROOT, "patch.c"), "-o", path, "-lm"] + list(libraries))
    return path


def script(path, text):
    with open(path, "w") as f:
        f.write("#!/bin/sh\n" + text + "\n")
    os.chmod(path, 0o755)
    return path


def emulated(program, runner):
    """The program as a script that runs it under an emulator."""
    return script(os.path.join(os.path.dirname(program), "actpatch"), "exec %s %s \"$@\"" % (runner, shlex.quote(program)))


def cross_compiler(path, compiler, runner):
    """A cc whose programs are such scripts; no sanitizers, since emulators and these do not go together."""
    return script(path, """case "$*" in *-fsanitize*) exit 1 ;; esac
out=a.out before=
for word; do [ "$before" = -o ] && out=$word; before=$word; done
%s "$@" || exit
mv "$out" "$out.program"
printf '#!/bin/sh\\nexec %%s "%%s" "$@"\\n' '%s' "$out.program" > "$out"
chmod +x "$out\"""" % (" ".join(compiler), runner))


def run_tests(program, names, cc="cc", timeout=420):
    """Tests with this program, file by file, since unittest sets a file up once; returns how many passed."""
    names = sorted(names, key=lambda name: name.split(".")[0])
    environment = dict(os.environ, ACTPATCH_BIN=program, CC=cc, OMP_NUM_THREADS="1")
    status, said = command([sys.executable, os.path.join(TESTS, "run.py")] + names, timeout, env=environment)
    counts = re.search(r"(\d+) passed, (\d+) failed, (\d+) skipped\s*$", said)
    if status or counts is None or counts.group(2) != "0":
        raise Bad(said[-2000:])
    return int(counts.group(1))


def figure(program):
    """The mean logit differences that it prints for the bundled prompts: they differ in their last digits."""
    status, said = command([program, "diff", os.path.join(TESTS, "tiny", "ioi.tsv")], cwd=os.path.dirname(program))
    if status or not said.splitlines()[-1].startswith("mean\t"):
        raise Bad(said)
    return "diff " + said.split("\n")[-2].split("\t")[1].strip()


def version(program):
    said = must([program, "--version"]).splitlines()[0]
    found = re.search(r"\d+\.\d+(\.\d+)?", said)
    return found.group(0) if found else said


# ---- compilers of this machine ---------------------------------------------------------------------------

M32 = ["-m32", "-idirafter", "/usr/include/x86_64-linux-gnu"]  # gcc-multilib would add the second, but it
#                                                                and the cross compilers exclude each other


def levels(compiler, std):
    def run():
        links([compiler])
        passed = 0
        for level in "0123":
            program = build("%s-%s-O%s" % (compiler, std, level), [compiler], ["-std=" + std, "-pedantic", "-O" + level] + WARN)
            passed += run_tests(program, CORE if level == "2" else QUICK[:1] + QUICK[2:3], compiler)
        return "%s, -O0 -O1 -O2 -O3, no warning, %d tests, %s" % (version(compiler), passed, figure(program))
    return run


for _cc in ("gcc", "clang"):
    for _std in ("c99", "c11"):
        row("%s-%s" % (_cc, _std), "%s -std=%s -pedantic, without OpenMP" % (_cc, _std), _cc + " libc6-dev")(levels(_cc, _std))


def variant(name, compiler, flags, packages, tests=QUICK + TOKENIZER, libraries=(), what=None):
    @row(name, what or "%s %s" % (compiler, " ".join(flags[:3] if flags[0] != "-m32" else ["-m32"])), packages)
    def run():
        links([compiler] + flags, *libraries)
        program = build(name, [compiler], flags + ["-O2"] + (WARN if compiler != "tcc" else ["-Wall"]), libraries)
        cc = " ".join([compiler] + [flag for flag in flags if flag not in ("-static", "-pedantic", "-std=c99")])
        return "%s, no warning, %d tests, %s" % (
            re.search(r"\d+\.\d+\.\d+", must([compiler, "-v" if compiler == "tcc" else "--version"])).group(0),
            run_tests(program, tests, cc), figure(program))


variant("gcc-openmp", "gcc", ["-std=gnu99", "-fopenmp"], "gcc libc6-dev")
variant("clang-openmp", "clang", ["-std=gnu99", "-fopenmp"], "clang libomp-dev")
variant("gcc-schar", "gcc", ["-std=gnu99", "-fsigned-char"], "gcc libc6-dev")
variant("gcc-uchar", "gcc", ["-std=gnu99", "-funsigned-char"], "gcc libc6-dev")
variant("clang-schar", "clang", ["-std=gnu99", "-fsigned-char"], "clang libc6-dev")
variant("clang-uchar", "clang", ["-std=gnu99", "-funsigned-char"], "clang libc6-dev")
variant("gcc-contract", "gcc", ["-std=gnu99", "-ffp-contract=off"], "gcc libc6-dev")
variant("clang-contract", "clang", ["-std=gnu99", "-ffp-contract=off"], "clang libc6-dev")
variant("gcc-m32", "gcc", M32 + ["-std=gnu99"], "gcc libc6-dev-i386 lib32gcc-12-dev", tests=CORE, what="gcc -m32, 80-bit x87 arithmetic")
variant("gcc-m32-sse", "gcc", M32 + ["-std=c99", "-pedantic", "-msse2", "-mfpmath=sse"], "gcc libc6-dev-i386 lib32gcc-12-dev",
        what="gcc -m32 -msse2 -mfpmath=sse -std=c99")
variant("clang-m32", "clang", M32 + ["-std=c99", "-pedantic"], "clang libc6-dev-i386 lib32gcc-12-dev", what="clang -m32 -std=c99")
variant("tcc", "tcc", ["-std=c99"], "tcc libc6-dev", what="tcc")
variant("musl", "musl-gcc", ["-static", "-std=c99", "-pedantic"], "musl-tools", tests=CORE, what="musl-gcc -static")

CPP = r"""#include "patch.h"
#include <stdio.h>
int main(int, char **argv) {
    patch_options options = patch_options_default();
    patch_model *model = 0;
    patch_error error;
    if (patch_model_open(argv[1], &options, &model, &error))
        return 1;
    printf("%d layers", (int)patch_model_dims(model)->n_layers);
    patch_model_free(model);
    return 0;
}
"""


def cpp(compiler, c_compiler):
    @row(compiler, "%s -std=c++98 and c++17: a program on patch.h" % compiler, "g++" if compiler == "g++" else "clang libstdc++-12-dev")
    def run():
        need(compiler)
        links([c_compiler])
        path = folder(compiler.replace("+", "p"))
        source, library = os.path.join(path, "use.cpp"), os.path.join(path, "patch.o")
        with open(source, "w") as f:
            f.write(CPP)
        silent([c_compiler, "-std=c99", "-pedantic", "-O1"] + WARN + ["-DPATCH_NO_MAIN", "-c", os.path.join(ROOT, "patch.c"), "-o", library])
        for std in ("c++98", "c++17"):
            silent([compiler, "-std=" + std, "-pedantic", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-I", ROOT,
                    source, library, "-o", source[:-4], "-lm"])
            said = must([source[:-4], os.path.join(TESTS, "tiny", "model.bin")])
        return "%s, no warning, it reads %s" % (version(compiler), said)


cpp("g++", "gcc")
cpp("clang++", "clang")

# ---- other processors ----------------------------------------------------------------------------------


def processor(name, triple, qemu, packages, what):
    @row(name, what, packages + " qemu-user")
    def run():
        compiler = [triple + "-gcc", "-static"]
        need(compiler[0], qemu)
        links(compiler)
        # gnu99, as make has it; in ISO mode, s390x computes in double and says so at each conversion.
        program = build(name, compiler, ["-std=gnu99", "-O2"] + WARN)
        silent([triple + "-gcc", "-std=c99", "-pedantic", "-O1"] + [w for w in WARN if name != "s390x" or w != "-Wdouble-promotion"] +
               ["-c", os.path.join(ROOT, "patch.c"), "-o", program + ".o"])
        cc = cross_compiler(os.path.join(os.path.dirname(program), "cc"), compiler, qemu)
        program = emulated(program, qemu)
        return "gcc %s, qemu %s, no warning, %d tests, %s" % (
            must([compiler[0], "-dumpfullversion"]).strip(), version(qemu), run_tests(program, CORE, cc, 600), figure(program))


processor("s390x", "s390x-linux-gnu", "qemu-s390x", "gcc-s390x-linux-gnu libc6-dev-s390x-cross", "big-endian, 64 bits")
processor("aarch64", "aarch64-linux-gnu", "qemu-aarch64", "gcc-aarch64-linux-gnu libc6-dev-arm64-cross", "NEON, char is unsigned")
processor("armhf", "arm-linux-gnueabihf", "qemu-arm", "gcc-arm-linux-gnueabihf libc6-dev-armhf-cross", "32 bits, char is unsigned")
processor("riscv64", "riscv64-linux-gnu", "qemu-riscv64", "gcc-riscv64-linux-gnu libc6-dev-riscv64-cross", "no vectors")
processor("ppc64le", "powerpc64le-linux-gnu", "qemu-ppc64le", "gcc-powerpc64le-linux-gnu libc6-dev-ppc64el-cross", "char is unsigned")

# ---- other systems ---------------------------------------------------------------------------------------

WINE = "/usr/lib/wine/wine64"  # the package's script of that name speaks on stderr where the 32-bit one is missing
NAME = "na\u00efve \u65e5\u672c \U0001f600"


@row("mingw", "Windows: MinGW-w64, run by Wine", "gcc-mingw-w64-x86-64 wine wine64")
def mingw():
    compiler = "x86_64-w64-mingw32-gcc"
    need(compiler)
    # Its isfinite and isnan choose by size and so convert a double in a branch that is never taken.
    flags = WARN + ["-Wno-float-conversion"]
    program = build("mingw", [compiler], ["-std=gnu99", "-O2"] + flags)
    silent([compiler, "-std=c99", "-pedantic", "-O1"] + flags + ["-c", os.path.join(ROOT, "patch.c"), "-o", program + ".o"])
    os.rename(program + ".exe" if os.path.exists(program + ".exe") else program, program + ".exe")
    if not os.path.exists(WINE):
        raise Skip("compiled without a warning, but no Wine here to run it")
    path = os.path.dirname(program)
    prefix = "export WINEPREFIX=%s WINEDEBUG=-all; " % shlex.quote(os.path.join(path, "wine"))
    # Wine's own servers keep the streams of whoever started them, so these must not be pipes.
    wrapper = script(os.path.join(path, "actpatch"), prefix + """
said=$(mktemp -d)
%s %s "$@" > "$said/out" 2> "$said/error"
status=$?
cat "$said/out"; cat "$said/error" >&2; rm -r "$said"
exit $status""" % (WINE, shlex.quote(program + ".exe")))
    try:
        status, said = command([wrapper, "--version"], 120)  # the first call makes Wine's folder and speaks
        status, said = command([wrapper, "--version"], 60)
        if status or "\r" in said or not said.startswith("actpatch "):
            raise Skip("compiled without a warning, but Wine does not start here: %s" % said.strip()[-200:])
        passed = run_tests(wrapper, ["test_golden.Diff", "test_golden.Cache.test_odd_default", "test_golden.Sweeps.test_odd_default",
                                     "test_golden.Rest", "test_cli.Models.test_truncated_files",
                                     "test_cli.Models.test_info", "test_cli.Prompts.test_columns", "test_cli.Texts.test_tokens",
                                     "test_cli.Texts.test_top"])
        prompts, table = os.path.join(path, NAME + ".tsv"), os.path.join(path, NAME + ".csv")
        shutil.copy(os.path.join(TESTS, "tiny", "ioi.tsv"), prompts)
        for _ in range(2):  # the second replaces the first
            must([wrapper, "diff", prompts, "-o", table])
        with open(table, "rb") as f:
            lines = f.read().split(b"\n")
        if len(lines) != 11 or b"\r" in b"".join(lines):
            raise Bad("%s: %r" % (table, lines))
        return "gcc %s, Wine %s, no warning, %d tests, names and text in UTF-8, %s" % (
            must([compiler, "-dumpversion"]).strip(), version(WINE), passed, figure(wrapper))
    finally:
        command(["sh", "-c", prefix + "%s -k" % os.path.join(os.path.dirname(WINE), "wineserver")], 60)


NODE = r"""
import { readFileSync } from 'node:fs';
import { WASI } from 'node:wasi';
const [, , file, ...words] = process.argv;
const open = Object.fromEntries(['.', ...process.env.PREOPEN.split(':')].map((path) => [path, path]));
const wasi = new WASI({ version: 'preview1', args: [file, ...words], env: process.env, preopens: open, returnOnExit: true });
const module = await WebAssembly.compile(readFileSync(file));
process.exitCode = wasi.start(await WebAssembly.instantiate(module, { wasi_snapshot_preview1: wasi.wasiImport }));
"""


@row("wasm", "WebAssembly: clang and wasi-libc, run by node", "clang lld wasi-libc libclang-rt-14-dev-wasm32 nodejs")
def wasm():
    emulations = ["signal", "process-clocks"]
    flags = ["-D_WASI_EMULATED_" + name.upper().replace("-", "_") for name in emulations]
    libraries = ["-lwasi-emulated-" + name for name in emulations]
    compiler = ["clang", "--target=wasm32-wasi"]
    links(compiler)
    program = build("wasm", compiler, flags + ["-std=c99", "-pedantic", "-O2"] + WARN, libraries)
    need("node")
    path = os.path.dirname(program)
    with open(os.path.join(path, "run.mjs"), "w") as f:
        f.write(NODE)
    # Folders that it may enter; the root itself is none, as node 20 resolves no path below it.
    runner = "env PREOPEN=%s node --no-warnings " % shlex.quote(tempfile.gettempdir() + ":" + ROOT) + shlex.quote(os.path.join(path, "run.mjs"))
    wrapper = emulated(program, runner)
    status, said = command([wrapper, "--version"])
    if status:
        raise Skip("compiled without a warning, but node's WASI does not run here: %s" % said.strip()[-200:])
    return "clang %s, node %s, no warning, %d tests, %d kB, %s" % (
        version("clang"), version("node"), run_tests(wrapper, ["test_golden.Diff", "test_golden.Cache.test_odd_default",
        "test_golden.Sweeps.test_odd_default", "test_golden.Rest", "test_cli.Texts.test_tokens", "test_cli.Texts.test_top"]),
        os.path.getsize(program) // 1000, figure(wrapper))


@row("chroot", "a bare Debian with gcc, make and libc6-dev, without a network", "debootstrap")
def chroot():
    need("debootstrap", "unshare", "chroot")
    if os.geteuid() != 0:
        raise Skip("only root can make one")
    root = os.path.join(work, "chroot")
    with open("/etc/os-release") as f:
        suite = re.search(r"VERSION_CODENAME=(\w+)", f.read() + "\nVERSION_CODENAME=stable").group(1)
    status, said = command(["debootstrap", "--variant=minbase", "--include=gcc,make,libc6-dev", suite, root], 400)
    if status:
        raise Skip("debootstrap %s fails here: %s" % (suite, said.strip().splitlines()[-1][:200]))
    try:
        shutil.copytree(ROOT, os.path.join(root, "actpatch"), ignore=shutil.ignore_patterns(
            ".git", "actpatch", "*.so", "build", "__pycache__"))
        inside = ["unshare", "--net", "chroot", root, "/usr/bin/env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "sh", "-c"]
        status, said = command(inside + ["true"])
        if status:
            raise Skip("no chroot without a network can be entered here: %s" % said.strip()[-200:])
        if command(inside + ["command -v python3"])[0] == 0:
            raise Bad("there is a python3 in the chroot")
        made = must(inside + ["cd /actpatch && make 2>&1"])
        if "warning" in made:
            raise Bad(made)
        shown = must(inside + ["cd /actpatch && make demo 2>&1"])
        if "no Python" not in shown or "attn_head_out_all_pos" not in shown:
            raise Bad(shown)
        packages = must(inside + ["dpkg-query -W | wc -l"]).strip()
        return "%s, %s packages, make: no warning, make demo: %d lines" % (suite, packages, len(shown.splitlines()))
    finally:
        with open("/proc/mounts") as f:  # debootstrap mounts /proc there, and normally unmounts it
            for mounted in reversed([line.split()[1] for line in f if line.split()[1].startswith(root + "/")]):
                command(["umount", mounted])


# ---- a small machine -------------------------------------------------------------------------------------


@row("pi", "one resid_pre sweep, as for a Raspberry Pi: 128-bit vectors, one thread", "valgrind gcc libc6-dev time")
def pi():
    need("valgrind", "/usr/bin/time")
    links(["gcc"])
    program = build("pi", ["gcc"], ["-std=gnu99", "-O2"])
    path = os.path.dirname(program)
    sweep = [program, "patch", os.path.join(TESTS, "tiny", "ioi.tsv"), "--sweep", "resid_pre", "--threads", "1", "-o",
             os.path.join(path, "pi.npy")]
    environment = dict(os.environ, ACTPATCH_KERNELS="vector")
    said = must(["valgrind", "--tool=callgrind", "--callgrind-out-file=" + os.path.join(path, "callgrind")] + sweep, env=environment)
    instructions = int(re.search(r"Collected : (\d+)", said).group(1))
    resident = int(must(["/usr/bin/time", "-f", "%M"] + sweep, env=environment).split()[-1])
    return "%.0f million instructions, %.1f MB resident at most, file pages included" % (instructions / 1e6, resident / 1e3)


# ---- what can never run here -------------------------------------------------------------------------


@row("macos", "macOS, Apple's clang")
def macos():
    if sys.platform != "darwin":
        raise Skip("it runs on a Mac only; `make test` there is the test")
    return "%d tests" % run_tests(build("macos", ["cc"], ["-std=gnu99", "-O2"] + WARN), WHOLE)


@row("msvc", "Microsoft's compiler")
def msvc():
    raise Skip("it runs on Windows only; the row mingw has MinGW-w64 and Wine")


# ---- running the rows ----------------------------------------------------------------------------------


def attempt(one):
    """(outcome, seconds, text)."""
    started = time.time()
    try:
        outcome, text = "ok", one.run()
    except Skip as skip:
        outcome, text = "skipped", str(skip)
    except Bad as bad:
        outcome, text = "FAILED", str(bad)
    except Exception as error:  # pylint: disable=broad-except
        outcome, text = "FAILED", "%s: %s" % (type(error).__name__, error)
    return outcome, time.time() - started, text


def chosen(words):
    found = [one for one in rows if not words or any(
        one.name == word or one.name.startswith(word + "-") or fnmatch.fnmatch(one.name, word) for word in words)]
    for word in words:
        if not any(one.name == word or one.name.startswith(word + "-") or fnmatch.fnmatch(one.name, word) for one in rows):
            raise SystemExit("portability: no row %s; the rows are %s" % (word, " ".join(one.name for one in rows)))
    return found


def main():
    global work
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", help="names, or their beginnings before a -")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="rows at a time")
    parser.add_argument("--packages", action="store_true", help="print the Debian packages that the rows need")
    parser.add_argument("--list", action="store_true", help="print the rows' names")
    arguments = parser.parse_args()
    found = chosen(arguments.rows)
    if arguments.packages:
        print("\n".join(sorted({package for one in found for package in one.packages})))
        return 0
    if arguments.list:
        print("\n".join("%-15s %s" % (one.name, one.what) for one in found))
        return 0
    started, counts = time.time(), collections.Counter()
    with tempfile.TemporaryDirectory(prefix="actpatch-portability-") as work, \
            concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for one, (outcome, seconds, text) in zip(found, pool.map(attempt, found)):
            counts[outcome] += 1
            if outcome == "FAILED":
                print(text)
                text = "see above"
            print("%-7s %4.0f s  %s: %s: %s" % (outcome, seconds, one.name, one.what, text), flush=True)
    used = os.times()
    print("%.0f s in all, %.0f s of processor time" % (time.time() - started, used.children_user + used.children_system))
    print("%d passed, %d failed, %d skipped" % (counts["ok"], counts["FAILED"], counts["skipped"]))
    return 1 if counts["FAILED"] or not sum(counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
