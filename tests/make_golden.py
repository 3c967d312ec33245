# SPDX-License-Identifier: MIT
"""Make tests/golden/: small models and what TransformerLens computes on them, in double and in single.

    python tests/make_golden.py [NAME...]      (all: odd gelu relu scaled untied single tiny)

Needs numpy, torch 2.13, transformers < 5 and transformer-lens 2.18; the tests that read the files need
none of them. Every model but tiny is made here from a seed and saved as Hugging Face would save it.

NAME.safetensors.gz holds, in double (rounded to 36 bits of mantissa, 2^-37, thousands of times below
a float's own rounding, so that gzip finds zero bytes):

    tokens, tokens-corrupted                I64 [B,T]
    VARIANT/cache/HOOK                      the clean run of the first cache_examples examples
    VARIANT/cache-corrupted/HOOK            the corrupted run of the same
    VARIANT/diff                            [B,2]: clean, corrupted logit difference
    VARIANT/DIRECTION/METRIC/SWEEP          [B, cells]: per example, raw

and as metadata, strings all:

    flags:VARIANT        the program's options for this weight processing
    cache_examples       how many examples the caches hold
    err32:KEY            the largest error of float32 TransformerLens in this tensor
    mean32:KEY           the same for the mean over examples
    rows:KEY             the positions kept (axis 1; of scores and pattern the destinations, axis 2)
    same:KEY             another key whose tensor is this one bit for bit; it is not stored twice
"""

import contextlib
import functools
import gzip
import itertools
import json
import os
import struct
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(HERE, "golden")
TINY = os.path.join(HERE, "tiny")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformer_lens import HookedTransformer, HookedTransformerConfig, patching  # noqa: E402
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights  # noqa: E402

torch.set_grad_enabled(False)
transformers.logging.set_verbosity_error()
patching.tqdm = lambda cells: cells  # no progress bars

# ---- models -------------------------------------------------------------------------------------------


def lively(seed, folder, scale=1.0, **settings):
    """Save a random GPT-2 whose every part matters: biases, LayerNorms away from 1 and 0, attention far
    from uniform, logits that spread. NumPy's RandomState is the same stream in every version."""
    config = transformers.GPT2Config(
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **settings)
    model = transformers.GPT2LMHeadModel(config)
    stream = np.random.RandomState(seed)
    width = config.n_embd
    for name, weight in model.named_parameters():
        values = stream.standard_normal(tuple(weight.shape))
        if ".ln_" in name:
            values = 1.0 + 0.5 * values if name.endswith("weight") else 0.3 * values
        elif name.endswith("bias"):
            values = 0.3 * values
        elif "wte" in name or "lm_head" in name:
            values = min(0.4, 4.0 / np.sqrt(width)) * values
        elif "wpe" in name:
            values = 0.3 * values
        elif "c_attn" in name:
            values = scale * 1.3 / np.sqrt(width) * values
        else:
            values = scale / np.sqrt(weight.shape[0]) * values
        weight.copy_(torch.from_numpy(values.astype(np.float32)))
    model.save_pretrained(folder)
    os.remove(os.path.join(folder, "generation_config.json"))
    os.chmod(os.path.join(folder, "model.safetensors"), 0o644)


MODELS = {  # name: (seed, settings); tiny is not in the list, it is trained elsewhere
    "odd": (17, dict(n_layer=3, n_head=3, n_embd=51, n_inner=77, n_positions=24, vocab_size=97,
                     activation_function="gelu_new", layer_norm_epsilon=1e-3)),
    "gelu": (21, dict(n_layer=2, n_head=4, n_embd=20, n_inner=30, n_positions=12, vocab_size=31,
                      activation_function="gelu")),
    "relu": (22, dict(n_layer=2, n_head=2, n_embd=14, n_positions=11, vocab_size=29,
                      activation_function="relu", layer_norm_epsilon=1e-6)),
    "scaled": (23, dict(n_layer=3, n_head=2, n_embd=18, n_inner=25, n_positions=13, vocab_size=33,
                        scale_attn_by_inverse_layer_idx=True)),
    "untied": (24, dict(n_layer=2, n_head=3, n_embd=15, n_inner=33, n_positions=10, vocab_size=41,
                        activation_function="gelu_pytorch_tanh", tie_word_embeddings=False)),
    "single": (25, dict(n_layer=1, n_head=1, n_embd=16, n_inner=19, n_positions=8, vocab_size=23)),
}


def examples_for(name, settings, n, length):
    """Random prompts as (clean, corrupted, answer, wrong): differing in one token in the middle, in two,
    in the last, in every one; those after the first share their beginnings with it."""
    stream = np.random.RandomState(settings["vocab_size"])
    pick = lambda: int(stream.randint(settings["vocab_size"]))  # noqa: E731
    base = [pick() for _ in range(length)]
    places = [(2,), (1, 4), (length - 1,), tuple(range(length))]
    examples = []
    for b in range(n):
        clean = base[:1 + length // 2] + [pick() for _ in range(length - 1 - length // 2)]
        corrupted = list(clean)
        for place in places[b % len(places)]:
            while corrupted[place] == clean[place]:
                corrupted[place] = pick()
        answer, wrong = pick(), pick()
        while wrong == answer:
            wrong = pick()
        examples.append((clean, corrupted, answer, wrong))
    return examples


def write_examples(path, examples):
    with open(path, "w", encoding="ascii", newline="") as file:
        file.write("clean_ids\tcorrupted_ids\tanswer_id\twrong_id\n")
        for clean, corrupted, answer, wrong in examples:
            file.write("%s\t%s\t%d\t%d\n" % (
                " ".join(map(str, clean)), " ".join(map(str, corrupted)), answer, wrong))


def read_examples(folder):
    """The eight prompts of the bundled model, through the Hugging Face tokenizer, BOS in front."""
    tokenizer = transformers.GPT2TokenizerFast(
        vocab_file=os.path.join(folder, "vocab.json"), merges_file=os.path.join(folder, "merges.txt"))
    with open(os.path.join(folder, "ioi.tsv"), encoding="utf-8") as file:
        lines = [line.rstrip("\n").split("\t") for line in file if line.strip()]
    examples = []
    for line in lines[1:]:
        row = dict(zip(lines[0], line))
        ids = {role: tokenizer(row[role])["input_ids"] for role in row}
        if len(ids["answer"]) != 1 or len(ids["wrong"]) != 1:
            raise SystemExit("an answer of several tokens: %r" % row)
        bos = [tokenizer.bos_token_id]
        examples.append((bos + ids["clean"], bos + ids["corrupted"], ids["answer"][0], ids["wrong"][0]))
    return examples


# ---- the reference ------------------------------------------------------------------------------------

STEPS = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases",
         "refactor_factored_attn_matrices")
DEFAULT = dict(zip(STEPS, (True, True, True, True, False)))


def options(processing):
    """The program's words for a processing that differs from the default."""
    words = []
    for step in STEPS:
        if processing[step] != DEFAULT[step]:
            words.append("--%s%s" % ("no-" if DEFAULT[step] else "", step.replace("_", "-")))
    if not any(processing.values()):
        words = ["--no-processing"]
    return words


@contextlib.contextmanager
def default_dtype(dtype):
    """Without this, generic_activation_patch rounds its float64 results to float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def hugging_face(folder):
    return transformers.GPT2LMHeadModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()


def hooked(source, dtype, processing):
    """HookedTransformer with these weights (a float32 GPT2LMHeadModel), all of it in dtype."""
    config = source.config
    with default_dtype(dtype):
        cfg = HookedTransformerConfig(
            n_layers=config.n_layer, d_model=config.n_embd, d_head=config.n_embd // config.n_head,
            n_heads=config.n_head, d_mlp=config.n_inner or 4 * config.n_embd,
            d_vocab=config.vocab_size, n_ctx=config.n_positions, act_fn=config.activation_function,
            eps=config.layer_norm_epsilon, normalization_type="LNPre" if processing["fold_ln"] else "LN",
            scale_attn_by_inverse_layer_idx=config.scale_attn_by_inverse_layer_idx,
            original_architecture="GPT2LMHeadModel", dtype=dtype, device="cpu", init_weights=False)
        model = HookedTransformer(cfg)
        state = {name: weight.detach().to(dtype).clone()
                 for name, weight in convert_gpt2_weights(source, cfg).items()}
        model.load_and_process_state_dict(state, **processing)
    for name, weight in model.named_parameters():
        assert weight.dtype == dtype, name
    return model.eval()


def run(model, tokens, result=True):
    """{hook: array} and logits of one batch, as run_with_cache gives them."""
    with default_dtype(model.cfg.dtype):
        logits, cache = model.run_with_cache(tokens, return_type="logits")
        hooks = {name: value.detach().numpy().copy() for name, value in cache.items()}
        if result:  # in a run of its own, because it changes the order of sums that follow
            model.set_use_attn_result(True)
            _, extra = model.run_with_cache(tokens, names_filter=lambda hook: hook.endswith("hook_result"))
            model.set_use_attn_result(False)
            hooks.update((name, value.numpy().copy()) for name, value in extra.items())
    hooks["logits"] = logits.numpy().copy()
    for name, value in hooks.items():
        assert str(value.dtype) == str(model.cfg.dtype).split(".")[1], name
    return hooks


METRICS = ("logit_diff", "logit", "prob", "logprob", "kl", "rank")

SWEEPS = {name: getattr(patching, "get_act_patch_" + name) for name in (
    "resid_pre", "resid_mid", "attn_out", "mlp_out", "attn_head_out_by_pos", "attn_head_q_by_pos",
    "attn_head_k_by_pos", "attn_head_v_by_pos", "attn_head_pattern_by_pos",
    "attn_head_pattern_dest_src_pos", "attn_head_out_all_pos", "attn_head_q_all_pos",
    "attn_head_k_all_pos", "attn_head_v_all_pos", "attn_head_pattern_all_pos")}
SWEEPS["resid_post"] = functools.partial(
    patching.generic_activation_patch, patch_setter=patching.layer_pos_patch_setter,
    activation_name="resid_post", index_axis_names=("layer", "pos"))


class Task:
    """A model in one precision and processing, with its prompts, and the metrics on them."""

    def __init__(self, model, examples):
        self.model = model
        self.clean = torch.tensor([example[0] for example in examples])
        self.corrupted = torch.tensor([example[1] for example in examples])
        self.answer = torch.tensor([example[2] for example in examples])
        self.wrong = torch.tensor([example[3] for example in examples])
        with default_dtype(model.cfg.dtype):
            clean, self.clean_cache = model.run_with_cache(self.clean)
            corrupted, self.corrupted_cache = model.run_with_cache(self.corrupted)
        self.clean_logprobs = clean[:, -1].log_softmax(-1)
        self.baseline = {"clean": self.measure(clean), "corrupted": self.measure(corrupted)}

    def measure(self, logits):
        """Every metric of every example, from logits [B,T,V]."""
        final = logits[:, -1]
        each = torch.arange(len(final))
        logprobs = final.log_softmax(-1)
        answer = final[each, self.answer]
        return {
            "logit_diff": answer - final[each, self.wrong],
            "logit": answer,
            "prob": final.softmax(-1)[each, self.answer],
            "logprob": logprobs[each, self.answer],
            "kl": (self.clean_logprobs.exp() * (self.clean_logprobs - logprobs)).sum(-1),
            "rank": (final > answer[:, None]).sum(-1).to(final.dtype),
        }

    def sweep(self, name, direction):
        """{metric: [B, cells]}: TransformerLens's own loop; its metric notes what each example gave."""
        seen = []

        def metric(logits):
            seen.append(self.measure(logits))
            return seen[-1]["logit_diff"].mean()

        into, source = ((self.corrupted, self.clean_cache) if direction == "denoising"
                        else (self.clean, self.corrupted_cache))
        with default_dtype(self.model.cfg.dtype):
            means = SWEEPS[name](self.model, into, source, metric)
        assert means.dtype == self.model.cfg.dtype, "rounded by the default dtype"
        values = {key: torch.stack([cell[key] for cell in seen], -1).reshape(
            (len(self.answer),) + tuple(means.shape)) for key in METRICS}
        assert torch.equal(values["logit_diff"].mean(0), means) or torch.allclose(
            values["logit_diff"].mean(0), means, rtol=1e-5), name
        return {key: value.numpy() for key, value in values.items()}


# ---- a second opinion ------------------------------------------------------------------------------------


def numpy_run(source, tokens):
    """The unprocessed model in float64, written out once more without torch: {hook: array}."""
    config = source.config
    w = {name.replace("transformer.", ""): value.detach().numpy().astype(np.float64)
         for name, value in source.state_dict().items()}
    tokens = np.asarray(tokens)
    heads, width = config.n_head, config.n_embd
    hooks = {}

    def norm(x, name, hook):
        centred = x - x.mean(-1, keepdims=True)
        hooks[hook + ".hook_scale"] = np.sqrt((centred ** 2).mean(-1, keepdims=True)
                                              + config.layer_norm_epsilon)
        out = centred / hooks[hook + ".hook_scale"] * w[name + ".weight"] + w[name + ".bias"]
        hooks[hook + ".hook_normalized"] = out
        return out

    def activation(x):
        if config.activation_function == "relu":
            return np.maximum(x, 0)
        if config.activation_function == "gelu":
            return torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x ** 3)))

    hooks["hook_embed"] = w["wte.weight"][tokens]
    hooks["hook_pos_embed"] = np.broadcast_to(w["wpe.weight"][:tokens.shape[1]],
                                              hooks["hook_embed"].shape)
    x = hooks["hook_embed"] + hooks["hook_pos_embed"]
    masked = np.triu(np.ones((tokens.shape[1],) * 2, bool), 1)
    for l in range(config.n_layer):
        ours, theirs = "blocks.%d." % l, "h.%d." % l
        hooks[ours + "hook_resid_pre"] = x
        a = norm(x, theirs + "ln_1", ours + "ln1")
        qkv = a @ w[theirs + "attn.c_attn.weight"] + w[theirs + "attn.c_attn.bias"]
        q, k, v = (part.reshape(part.shape[:2] + (heads, -1)) for part in np.split(qkv, 3, -1))
        scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(width // heads)
        if config.scale_attn_by_inverse_layer_idx:
            scores = scores / (l + 1)
        scores = np.where(masked, -np.inf, scores)
        pattern = np.exp(scores - scores.max(-1, keepdims=True))
        pattern /= pattern.sum(-1, keepdims=True)
        z = np.einsum("bhqk,bkhd->bqhd", pattern, v)
        out = w[theirs + "attn.c_proj.weight"].reshape(heads, -1, width)
        result = np.einsum("bqhd,hdc->bqhc", z, out)
        for name, value in (("q", q), ("k", k), ("v", v), ("z", z), ("attn_scores", scores),
                            ("pattern", pattern), ("result", result)):
            hooks[ours + "attn.hook_" + name] = value
        hooks[ours + "hook_attn_out"] = result.sum(2) + w[theirs + "attn.c_proj.bias"]
        x = hooks[ours + "hook_resid_mid"] = x + hooks[ours + "hook_attn_out"]
        a = norm(x, theirs + "ln_2", ours + "ln2")
        a = hooks[ours + "mlp.hook_pre"] = a @ w[theirs + "mlp.c_fc.weight"] + w[theirs + "mlp.c_fc.bias"]
        a = hooks[ours + "mlp.hook_post"] = activation(a)
        hooks[ours + "hook_mlp_out"] = a @ w[theirs + "mlp.c_proj.weight"] + w[theirs + "mlp.c_proj.bias"]
        x = hooks[ours + "hook_resid_post"] = x + hooks[ours + "hook_mlp_out"]
    hooks["logits"] = norm(x, "ln_f", "ln_final") @ w["lm_head.weight"].T
    return hooks


def gap(a, b):
    """The largest difference, equal infinities aside."""
    with np.errstate(invalid="ignore"):
        return float(np.max(np.where(a == b, 0.0, np.abs(a - b))))


def check_reference(source, tokens, runs):
    """Nothing was silently rounded, and what MATH calls invariant is: NumPy, Hugging Face in double and
    all the variants agree far below a float's precision."""
    mine = numpy_run(source, tokens)
    plain = runs["no-processing"]
    assert set(mine) == set(plain), set(mine) ^ set(plain)
    for name in mine:
        assert gap(mine[name], plain[name]) < 1e-11 * (1 + np.abs(mine[name][np.isfinite(
            mine[name])]).max()), (name, gap(mine[name], plain[name]))
    double = hugging_face_logits(source, tokens)
    assert gap(double, mine["logits"]) < 1e-11, gap(double, mine["logits"])
    logprobs = lambda x: torch.from_numpy(x).log_softmax(-1).numpy()  # noqa: E731
    for variant, hooks in runs.items():
        assert gap(logprobs(hooks["logits"]), logprobs(double)) < 1e-9, variant
        for name in hooks:
            if name.endswith("hook_pattern"):
                assert gap(hooks[name], plain[name]) < 1e-9, (variant, name)
    centred = double - double.mean(-1, keepdims=True)
    assert gap(runs["default"]["logits"], centred) < 1e-10


def hugging_face_logits(source, tokens):
    import copy
    with default_dtype(torch.float64):
        return copy.deepcopy(source).double()(tokens).logits.numpy()


def check_sweeps(task, golden):
    """MATH's identities on the reference itself; golden maps (direction, sweep) to {metric: values}."""
    clean, corrupted = (task.baseline[side]["logit_diff"].numpy() for side in ("clean", "corrupted"))
    differs = (task.clean != task.corrupted).numpy()
    first = [int(np.argmax(row)) for row in differs]
    for (direction, sweep), values in golden.items():
        values = values["logit_diff"]
        base = corrupted if direction == "denoising" else clean
        other = clean if direction == "denoising" else corrupted
        for b in range(len(first)):
            cells = values[b]
            if sweep in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"):
                cells = cells[:, :first[b]]
                if sweep == "resid_pre" and differs[b].sum() == 1:
                    assert gap(values[b][0, first[b]], other[b]) < 1e-10
            elif sweep == "attn_head_pattern_by_pos":
                cells = cells[:, :, :first[b]]
            elif sweep == "attn_head_pattern_dest_src_pos":
                cells = np.stack([cells[:, :, i, j] for i, j in itertools.combinations(
                    range(cells.shape[-1]), 2)])
            elif sweep.endswith("by_pos"):
                cells = cells[:, :first[b]]
            else:
                cells = cells[:0]
            assert cells.size == 0 or gap(cells, base[b]) < 1e-10, (direction, sweep, b)
    for direction in ("denoising", "noising"):
        if (direction, "resid_post") in golden:
            assert gap(golden[direction, "resid_pre"]["logit_diff"][:, 1:],
                       golden[direction, "resid_post"]["logit_diff"][:, :-1]) < 1e-10


def check_stacked(task, golden):
    """TransformerLens's *_every are its single sweeps stacked, the pattern by destination turned round."""
    metric = lambda logits: task.measure(logits)["logit_diff"].mean()  # noqa: E731
    part = lambda sweep: golden["denoising", sweep]["logit_diff"].mean(0)  # noqa: E731
    with default_dtype(task.model.cfg.dtype):
        arguments = (task.model, task.corrupted, task.clean_cache, metric)
        heads = [part("attn_head_%s_all_pos" % kind) for kind in ("out", "q", "k", "v", "pattern")]
        assert gap(np.stack(heads), patching.get_act_patch_attn_head_all_pos_every(*arguments).numpy()) < 1e-12
        heads = [part("attn_head_%s_by_pos" % kind) for kind in ("out", "q", "k", "v", "pattern")]
        heads[4] = heads[4].transpose(0, 2, 1)
        assert gap(np.stack(heads), patching.get_act_patch_attn_head_by_pos_every(*arguments).numpy()) < 1e-12
        blocks = [part(sweep) for sweep in ("resid_pre", "attn_out", "mlp_out")]
        assert gap(np.stack(blocks), patching.get_act_patch_block_every(*arguments).numpy()) < 1e-12


# ---- the file ----------------------------------------------------------------------------------------------


def shorten(values, bits=36):
    """Round to so many bits of mantissa; infinities and zeros stay."""
    mantissa, exponent = np.frexp(values)
    with np.errstate(invalid="ignore"):
        short = np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits)
    return np.where(np.isfinite(values), short, values) + 0.0  # + 0.0: no negative zeros


class Golden:
    def __init__(self):
        self.tensors, self.metadata, self.known = {}, {}, {}

    def add(self, key, f64, f32, rows=None, mean=False):
        """Store f64 (only these rows of it) and what f32 misses of it."""
        assert f64.dtype == np.float64 and f32.dtype == np.float32 and f64.shape == f32.shape, key
        assert not np.isnan(f64).any() and not np.isnan(f32).any(), key
        assert (np.isinf(f64) == np.isinf(f32)).all(), key
        self.metadata["err32:" + key] = "%.4g" % gap(f64, f32.astype(np.float64))
        if mean:  # of float32 values in float32, as TransformerLens and the notebook take it
            self.metadata["mean32:" + key] = "%.4g" % gap(
                f64.mean(0), f32.mean(0, dtype=np.float32).astype(np.float64))
        if rows is not None:
            f64 = f64.take(rows, 2 if key.endswith(("scores", "pattern")) else 1)
            self.metadata["rows:" + key] = " ".join(map(str, rows))
        values = shorten(f64)
        content = (values.shape, values.tobytes())
        if content in self.known:
            self.metadata["same:" + key] = self.known[content]
        else:
            self.known[content] = key
            self.tensors[key] = values

    def add_ids(self, key, ids):
        self.tensors[key] = ids.numpy().astype(np.int64)

    def write(self, path):
        head, body, at = {"__metadata__": self.metadata}, [], 0
        for key, values in self.tensors.items():
            raw = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()
            head[key] = {"dtype": {"float64": "F64", "int64": "I64"}[str(values.dtype)],
                         "shape": list(values.shape), "data_offsets": [at, at + len(raw)]}
            body.append(raw)
            at += len(raw)
        text = json.dumps(head, sort_keys=True, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=file, mtime=0) as packed:
                packed.write(struct.pack("<Q", len(text)) + text)
                for raw in body:
                    packed.write(raw)


# ---- what is recorded --------------------------------------------------------------------------------------

ALL = tuple(SWEEPS)
BUT_DEST_SRC = tuple(name for name in ALL if name != "attn_head_pattern_dest_src_pos")
FEW = ("hook_resid_mid", "hook_resid_post", "attn.hook_v", "attn.hook_z", "hook_attn_out",
       "ln2.hook_normalized", "ln_final.hook_normalized", "logits")
INVARIANT = ("hook_embed", "hook_pos_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post",
             "attn.hook_attn_scores", "attn.hook_pattern", "hook_attn_out", "hook_mlp_out",
             "mlp.hook_pre", "ln_final.hook_normalized", "ln_final.hook_scale", "logits")
PATTERNS = ("attn.hook_pattern", "ln_final.hook_normalized", "logits")
REFACTORED = dict(DEFAULT, refactor_factored_attn_matrices=True)
NONE = dict.fromkeys(STEPS, False)


def without(step):
    return dict(DEFAULT, **{step: False})


def plan(name):
    """Variants: name -> (processing, hooks kept: None for all, {direction: sweeps}, metrics beside the
    logit difference on these sweeps)."""
    both = lambda sweeps: {"denoising": sweeps, "noising": sweeps}  # noqa: E731
    if name == "odd":
        variants = {
            "default": (DEFAULT, None, both(ALL)),
            "no-processing": (NONE, None, both(ALL)),
            "refactored": (REFACTORED, INVARIANT, both(ALL)),
        }
        for step in STEPS[:4]:
            variants["no-" + step] = (without(step), FEW, {"denoising": ("attn_head_pattern_dest_src_pos",)}
                                      if step == "fold_value_biases" else {})
        # Refactoring folds b_V by itself, whatever fold_value_biases says.
        variants["refactored-alone"] = (dict(NONE, refactor_factored_attn_matrices=True), PATTERNS, {
            "denoising": ("resid_pre", "attn_head_out_all_pos", "attn_head_pattern_dest_src_pos")})
        return variants
    if name == "tiny":
        denoising = {"denoising": BUT_DEST_SRC, "noising": BUT_DEST_SRC}
        few = both(("resid_pre", "attn_head_out_all_pos", "attn_head_pattern_by_pos"))
        return {"default": (DEFAULT, None, denoising), "no-processing": (NONE, PATTERNS, few),
                "refactored": (REFACTORED, PATTERNS, few)}
    some = {"denoising": ("resid_pre", "attn_head_out_all_pos", "attn_head_pattern_by_pos",
                          "attn_head_k_by_pos")}
    return {"default": (DEFAULT, INVARIANT, some), "no-processing": (NONE, PATTERNS, {}),
            "refactored": (REFACTORED, PATTERNS, {})}


def kept(hook, wanted):
    return wanted is None or any(hook.endswith(ending) for ending in wanted)


def record(name, source, examples, cache_examples, rows=None):
    golden = Golden()
    golden.metadata["cache_examples"] = str(cache_examples)
    runs, worst = {}, (0.0, "")
    for variant, (processing, hooks, sweeps) in plan(name).items():
        golden.metadata["flags:" + variant] = " ".join(options(processing))
        f64 = Task(hooked(source, torch.float64, processing), examples)
        f32 = Task(hooked(source, torch.float32, processing), examples)
        if not golden.tensors:
            golden.add_ids("tokens", f64.clean)
            golden.add_ids("tokens-corrupted", f64.corrupted)
        clean = [run(task.model, task.clean[:cache_examples]) for task in (f64, f32)]
        runs[variant] = clean[0]
        for hook in clean[0]:
            if kept(hook, hooks):
                golden.add("%s/cache/%s" % (variant, hook), clean[0][hook], clean[1][hook], rows)
        corrupted = [run(task.model, task.corrupted[:cache_examples], False) for task in (f64, f32)]
        for hook in ("blocks.0.hook_resid_post", "logits"):
            golden.add("%s/cache-corrupted/%s" % (variant, hook), corrupted[0][hook],
                       corrupted[1][hook], rows)
        final = [torch.stack([task.baseline[side]["logit_diff"] for side in ("clean", "corrupted")], 1)
                 .numpy() for task in (f64, f32)]
        golden.add("%s/diff" % variant, *final, mean=True)
        if name == "tiny" and variant == "default":  # every prompt's last row of logits, for `top`
            last = [run(task.model, task.clean, False)["logits"][:, -1] for task in (f64, f32)]
            golden.add("%s/final_logits" % variant, *last)
            golden.add("%s/final_probs" % variant, *(
                torch.from_numpy(x).softmax(-1).numpy() for x in last))
        found = {}
        for direction in sweeps:
            for sweep in sweeps[direction]:
                values = found[direction, sweep] = f64.sweep(sweep, direction)
                single = f32.sweep(sweep, direction)
                for metric in METRICS:
                    if metric == "logit_diff" or (variant == "default" and sweep in (
                            "resid_pre", "attn_head_out_all_pos")):
                        golden.add("%s/%s/%s/%s" % (variant, direction, metric, sweep),
                                   values[metric], single[metric], mean=True)
                        assert metric != "rank" or (values[metric] == single[metric]).all(), \
                            "a near tie in the ranks: take another seed"
        check_sweeps(f64, found)
        if set(found) >= {("denoising", sweep) for sweep in BUT_DEST_SRC} and name == "odd":
            check_stacked(f64, found)
        print("%s/%s: TransformerLens in float32 is off by %.2g in the logits, %.2g in the metric" % (
            name, variant, float(golden.metadata["err32:%s/cache/logits" % variant]),
            float(golden.metadata["err32:%s/diff" % variant])), flush=True)
    check_reference(source, f64.clean[:cache_examples], runs)
    path = os.path.join(GOLDEN, name + ".safetensors.gz")
    golden.write(path)
    print("%s: %d tensors, %d bytes" % (path, len(golden.metadata), os.path.getsize(path)), flush=True)


def main(names):
    torch.set_num_threads(1)
    os.makedirs(GOLDEN, exist_ok=True)
    for name in names or list(MODELS) + ["tiny"]:
        if name == "tiny":
            examples = read_examples(TINY)
            length = len(examples[0][0])
            record(name, hugging_face(TINY), examples, 2, [length - 5, length - 1])
            continue
        seed, settings = MODELS[name]
        folder = os.path.join(GOLDEN, name)
        lively(seed, folder, **settings)
        examples = examples_for(name, settings, 4 if name == "odd" else 3, 7)
        write_examples(os.path.join(folder, "prompts.tsv"), examples)
        record(name, hugging_face(folder), examples, 2)


if __name__ == "__main__":
    main(sys.argv[1:])
