# SPDX-License-Identifier: MIT
"""Runs that share rows give each run's own numbers, bit for bit, at exactly the cost that can be predicted.

The checks are in engine_driver.c, which includes patch.c ($PATCH_SOURCE: another file) and holds the
engine against itself (alone, unshared, other threads, other memory) and against a plain forward pass in
double. Here stand the models: the small ones of the goldens and one made on the spot."""

import array
import json
import os
import random
import re
import shlex
import struct
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import util  # noqa: E402

SOURCE = os.environ.get("PATCH_SOURCE", os.path.join(util.ROOT, "patch.c"))
SMALL = ("odd", "gelu", "relu", "scaled", "untied", "single")
ACTIVATIONS = {"gelu_new": 0, "gelu_pytorch_tanh": 0, "gelu": 1, "relu": 2}
PER_LAYER = ("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
             "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias",
             "mlp.c_proj.weight", "mlp.c_proj.bias")

folder = None
driver = None
models = {}  # name: (flat file, weights)


def setUpModule():
    global folder, driver
    folder = util.scratch()
    unittest.addModuleCleanup(folder.cleanup)
    unittest.addModuleCleanup(models.clear)
    driver = compile_driver()


def at(name):
    return os.path.join(folder.name, name)


def compile_driver():
    """Build the driver as the Makefile builds the program; with OpenMP where the compiler has it."""
    path = at("engine_driver")
    for openmp in (["-fopenmp"], []):
        done = subprocess.run(
            shlex.split(os.environ.get("CC", "cc")) +
            ["-std=gnu99", util.LEVEL, "-w", "-I", util.ROOT, "-DPATCH_SOURCE=\"%s\"" % SOURCE] + openmp +
            [os.path.join(util.TESTS, "engine_driver.c"), "-o", path, "-lm"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        if done.returncode == 0:
            return path
    raise RuntimeError("engine_driver.c does not compile:\n" + done.stdout)


# ---- models --------------------------------------------------------------------------------------------


def write_weights(source, path, change=None):
    """The checkpoint as the driver reads it: 8 ints, epsilon, then the arrays as they are stored."""
    with open(os.path.join(source, "config.json"), encoding="utf-8") as file:
        c = json.load(file)
    tensors, _ = util.read_safetensors(os.path.join(source, "model.safetensors"))
    tensors = {re.sub("^transformer\\.", "", name): tensor.data for name, tensor in tensors.items()}
    names = ["wte.weight", "wpe.weight"]
    names += ["h.%d.%s" % (layer, name) for layer in range(c["n_layer"]) for name in PER_LAYER]
    with open(path, "wb") as file:
        file.write(struct.pack(
            "=8id", c["n_layer"], c["n_head"], c["n_embd"], c.get("n_inner") or 4 * c["n_embd"],
            c["n_positions"], c["vocab_size"], ACTIVATIONS[c["activation_function"]],
            int(c.get("scale_attn_by_inverse_layer_idx", False)), c["layer_norm_epsilon"]))
        for name in names + ["ln_f.weight", "ln_f.bias"]:
            data = tensors[name]
            if name == change:
                data = array.array("f", [1.001 * value for value in data])
            data.tofile(file)
    return path


def make_wide():
    """A random checkpoint with more than 48 columns, 32 and 128 rows in its matrices, so that products go in
    several blocks, panels and groups; the bundled model has no odd sizes and the others are narrower."""
    layers, heads, width, inner, context, vocabulary = 2, 5, 135, 163, 9, 150
    chance = random.Random(5)
    shapes = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width),
              "ln_f.weight": (width,), "ln_f.bias": (width,)}
    sizes = ((width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,), (width,),
             (width,), (width, inner), (inner,), (inner, width), (width,))
    for layer in range(layers):
        shapes.update(("h.%d.%s" % (layer, name), shape) for name, shape in zip(PER_LAYER, sizes))
    head, body = {}, b""
    for name, shape in shapes.items():
        middle, spread = (1.0, 0.3) if re.search("ln_.*weight", name) else (0.0, 0.15)
        data = array.array("f", (middle + spread * (chance.random() * 2 - 1) for _ in range(util.count(shape))))
        if sys.byteorder == "big":
            data.byteswap()
        head[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + 4 * len(data)]}
        body += data.tobytes()
    os.mkdir(at("wide"))
    text = json.dumps(head).encode()
    with open(os.path.join(at("wide"), "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + body)
    with open(os.path.join(at("wide"), "config.json"), "w", encoding="utf-8") as file:
        json.dump({"model_type": "gpt2", "n_layer": layers, "n_head": heads, "n_embd": width, "n_inner": inner,
                   "n_positions": context, "vocab_size": vocabulary, "activation_function": "gelu_new",
                   "layer_norm_epsilon": 1e-5}, file)
    return at("wide")


def model(name):
    """(flat file, weights) of a model, made once."""
    if name not in models:
        source = make_wide() if name == "wide" else util.TINY if name == "tiny" else os.path.join(util.GOLDEN, name)
        words = [] if name == "tiny" else ["--no-tokenizer"]
        models[name] = (util.convert(source, at(name + ".bin"), *words), write_weights(source, at(name + ".w")))
    return models[name]


# ---- tests ---------------------------------------------------------------------------------------------


class Engine(unittest.TestCase):
    def run_driver(self, name, section, processing="default", seed=1, cases=0, weights=None):
        flat, raw = model(name)
        return subprocess.run(
            [driver, flat, weights or raw, processing, section, str(seed), str(cases)], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, universal_newlines=True, timeout=300,
            env=dict(os.environ, OMP_WAIT_POLICY="passive"))

    def check(self, names, section, **options):
        for name in names:
            with self.subTest(model=name, **options):
                done = self.run_driver(name, section, **options)
                self.assertEqual(done.returncode, 0, done.stdout[-4000:])
                self.assertRegex(done.stdout, "[1-9][0-9]* checks, 0 failed\n$")

    def test_together_equals_alone_unshared_and_the_plain_pass(self):
        """Random edits at every hook point: one call == each run alone == nothing shared, and near double."""
        for processing in ("default", "none"):
            self.check(SMALL, "random", processing=processing, cases=5 if util.CORE else 60)
            self.check(("wide",), "random", processing=processing, cases=2 if util.CORE else 6)
        self.check(("tiny",), "random", cases=6)

    def test_together_equals_alone_where_attention_is_refactored(self):
        """The same with the SVD's factors, whose q, k, v and z no plain pass has."""
        self.check(SMALL, "random", processing="refactor", cases=15)

    def test_equal_values_of_runs_of_different_lengths(self):
        """Scores and patterns of all heads lie T apart: runs of other lengths read other numbers there."""
        self.check(SMALL, "strides")

    def test_rows_are_those_predicted(self):
        """What is equal by construction costs nothing, what differs its rows; no sharing fails this."""
        self.check(("scaled", "single"), "rows")

    def test_reads_equal_the_cache(self):
        """Every hook point, by position and whole, is run_with_cache's tensor, and ids tell equal rows."""
        self.check(SMALL + ("tiny",), "reads")
        self.check(("odd",), "reads", processing="none")

    def test_what_does_not_fit_is_refused(self):
        """Tokens, slices, sources and reads out of range: PATCH_E_INPUT with place and remedy."""
        self.check(("odd", "single"), "errors")

    def test_edges(self):
        """One token, one example, equal prompts, first and last token: each cell is the plain loop's."""
        self.check(("gelu",), "edges")
        self.check(("single",), "edges", cases=1)  # and all of n_ctx

    def test_ranges_of_cells(self):
        """first, count and done: pieces of a sweep are the sweep's, nothing else is touched."""
        self.check(SMALL + ("tiny",), "ranges", cases=10)

    def test_threads(self):
        """1, 2, 3 and 7 threads give the same bits, by every metric."""
        self.check(("wide", "odd", "tiny"), "threads")

    def test_memory(self):
        """Any limit down to one cell a pass gives the same bits; less is PATCH_E_MEMORY, and kept to."""
        self.check(("single", "untied"), "memory")

    def test_the_driver_can_fail(self):
        """A weight that is off by a thousandth is noticed; so is a section that checks nothing."""
        source = os.path.join(util.GOLDEN, "odd")
        for name in ("wpe.weight", "h.1.attn.c_attn.weight", "h.2.mlp.c_proj.weight", "h.1.ln_2.bias", "ln_f.weight"):
            weights = write_weights(source, at("changed.w"), change=name)
            done = self.run_driver("odd", "random", processing="none", cases=10, weights=weights)
            self.assertEqual(done.returncode, 1, name)
            self.assertIn("not the plain pass's", done.stdout)
        done = self.run_driver("odd", "nonsense")
        self.assertEqual((done.returncode, done.stdout), (1, "0 checks, 0 failed\n"))


if __name__ == "__main__":
    unittest.main()
