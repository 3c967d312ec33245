# SPDX-License-Identifier: MIT
"""Make tests/golden/analyses-*: what the further analyses must give, in double and in single.

    python tests/make_golden_analyses.py [NAME...]      (all: odd random-facts tiny)

Needs what make_golden.py needs, and that tests/golden/odd is there. Written from the definitions alone
(MATH and ANALYSES), not from the C: causal tracing with transformers and NumPy, hooks on the Hugging Face
model; ablation, path patching and attribution as plain loops of TransformerLens hooks. random-facts is made
here: three random layers with the bundled model's tokenizer, because a trained model's probabilities of
almost 1 hide errors.

analyses-NAME.safetensors.gz is stored as make_golden.py stores its files (values in double; err32:KEY and
mean32:KEY what the same in float32 misses; same:KEY aliases). The keys, [B] the examples, always first:

    VARIANT/baseline                     [B,2]      the unpatched logit differences, clean and corrupted
    VARIANT/ablate/BY/SITE               [B,cells]  the clean runs' logit difference with one cell replaced:
                                                    BY zero, mean (over the file), groups (the mean of the
                                                    rows with the same label in `groups`)
    VARIANT/ablate-METRIC/BY/SITE        [B,cells]  the same by another metric
    VARIANT/ablate/donors/SITE           [B,B,cells]  cell taken from the example of the second axis
    VARIANT/ablate/BY/list/WHAT-WHERE    [B]        several heads' z at once: WHAT is `heads` (those of
                                                    `heads`), `keep` (all but those) or `every`; WHERE is
                                                    `all` positions, `end`, or `column` (each example's
                                                    own, `column`); keep-end spares the heads at the end
                                                    only, and ablates them everywhere else
    VARIANT/path/DIRECTION/TO            [B,L,H]    over senders; TO is `final` or receivers L.H.q|k|v;
    VARIANT/path-frozen/DIRECTION/TO                with every mlp_out held in the second step
    VARIANT/lens/accumulated             [B,2L+1]   0_pre 0_mid ... final_post, the run's own scale
    VARIANT/lens/recomputed              [B,2L+1]   mean and scale of each row, no bias
    VARIANT/lens/layers, .../heads       [B,2L+2], [B,LH+1]  embed pos_embed 0_attn_out ...; L0H0 ... remainder
    VARIANT/lens/bias, .../ld            [B]        accumulated's last + bias = ld
    VARIANT/attn                         [n,LH,T,T] patterns of the first n = attn_examples clean prompts
    VARIANT/heads                        [3,L,H]    previous, duplicate, induction of the first clean prompt
    VARIANT/copying/positive, negative   [L,H,names] 1 where the name is in its own top 5; `names` lists them

    trace/SETTING/LINE/high, low         [1]        of the fact on this line of the file
    trace/SETTING/LINE/KIND              [T,L]      resid mlp attn severed_mlp severed_attn
    trace/SETTING/averages/KIND/value    [6,L]      first, middle and last token of the subject, first
    trace/SETTING/averages/KIND/band                subsequent, further, last token

and in the metadata: flags:VARIANT, flags:trace/SETTING (the program's options), facts:SETTING (JSON rows of
prompt, subject, attribute), fact:SETTING/LINE (JSON: ids, tokens, subject [b,e], answer, answer_id),
skipped:SETTING, sigma:SETTING, groups, heads, column, names, attn_examples."""

import copy
import json
import os
import shutil
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import make_golden as base  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformer_lens import head_detector  # noqa: E402

default_dtype, gap = base.default_dtype, base.gap

# ---- causal tracing: transformers and NumPy ---------------------------------------------------------------

KINDS = ("resid", "mlp", "attn", "severed_mlp", "severed_attn")
FIRST_NOISE = (1.62434536, -0.61175641, -0.52817175)


def tokenizer_of(folder):
    return transformers.GPT2TokenizerFast(
        vocab_file=os.path.join(folder, "vocab.json"), merges_file=os.path.join(folder, "merges.txt"))


def decode(tokenizer, token):
    return tokenizer.decode([token], clean_up_tokenization_spaces=False)


def subject_range(texts, subject):
    """Tokens [begin, end) that hold the first match of the subject in the joined texts."""
    at = "".join(texts).index(subject)
    ends = np.cumsum([len(text) for text in texts])
    begin = int(np.argmax(ends > at))
    end = int(np.argmax(ends >= at + len(subject))) + 1
    return begin, end


def noise_scale(source, tokenizer, facts, times):
    """sigma: `times` the unbiased float32 deviation of all elements of all subjects' embeddings."""
    ids = [token for _, subject, _ in facts for token in tokenizer(subject)["input_ids"]]
    rows = source.transformer.wte.weight[ids]
    single = rows.std()
    assert single.dtype == torch.float32
    double = np.std(rows.numpy().astype(np.float64), ddof=1)
    assert np.float32(double) == np.float32(single.item()), "the deviation depends on who rounds it"
    return times * float(single.item())


class Hooked:
    """A Hugging Face GPT-2 in one precision whose activations can be seen and edited, by (kind, layer)."""

    def __init__(self, source, dtype):
        self.dtype = dtype
        self.model = copy.deepcopy(source).to(dtype).eval()
        self.edits, self.seen = {}, None
        body = self.model.transformer
        self.layers = len(body.h)
        body.wte.register_forward_hook(self.hook("embed", 0))
        for l, block in enumerate(body.h):
            block.attn.register_forward_hook(self.hook("attn", l))
            block.mlp.register_forward_hook(self.hook("mlp", l))
            block.register_forward_hook(self.hook("resid", l))

    def hook(self, *place):
        def edit(module, inputs, output):
            value = (output[0] if isinstance(output, tuple) else output).clone()
            for change in self.edits.get(place, ()):
                change(value)
            if self.seen is not None:
                self.seen[place] = value.clone()
            return (value,) + tuple(output[1:]) if isinstance(output, tuple) else value
        return edit

    def final(self, ids, edits=(), see=False):
        """Probabilities after the last token [rows,V]; edits are (place, function) in order."""
        self.edits, self.seen = {}, {} if see else None
        for place, change in edits:
            self.edits.setdefault(place, []).append(change)
        with default_dtype(self.dtype):
            probabilities = self.model(ids).logits[:, -1].softmax(-1)
        assert probabilities.dtype == self.dtype
        return probabilities


def trace_fact(hooked, ids, subject, answer, sigma, window, samples):
    """{high, low, KIND: [T,L]} of one fact. Row 0 of every run is clean, the others are corrupted."""
    begin, end = subject
    layers, length = hooked.layers, len(ids)
    batch = torch.tensor([ids] * (samples + 1))
    raw = hooked.model.transformer.wte.weight[batch[0, begin:end]].detach().double().numpy()
    z = np.random.RandomState(1).randn(samples, end - begin, raw.shape[1])
    assert np.allclose(z.ravel()[:3], FIRST_NOISE, rtol=0, atol=5e-9)
    noisy = torch.from_numpy((raw + sigma * z).astype(np.float32)).to(hooked.dtype)

    def corrupt(value):
        value[1:, begin:end] = noisy

    corruption = [(("embed", 0), corrupt)]

    def restore(token):
        def change(value):
            value[1:, token] = value[0, token]
        return change

    def hold(values, token):
        def change(value):
            value[1:, token] = values[1:, token]
        return change

    def mean(edits):
        return hooked.final(batch, corruption + edits)[1:, answer].mean().item()

    low = hooked.final(batch, corruption, see=True)
    first = hooked.seen
    found = {"high": low[0, answer].item(), "low": low[1:, answer].mean().item()}
    for kind in KINDS:
        table = found[kind] = np.zeros((length, layers))
        for token in range(length):
            for l in range(layers):
                if kind == "resid":
                    edits = [(("resid", l), restore(token))]
                elif kind in ("mlp", "attn"):
                    edits = [((kind, near), restore(token)) for near in range(
                        max(0, l - window // 2), min(layers, l - (-window // 2)))]
                else:
                    cut = kind.split("_")[1]
                    edits = [((cut, every), hold(first[cut, every], token)) for every in range(layers)]
                    edits.append((("resid", l), restore(token)))
                table[token, l] = mean(edits)
    return found


def averages(traced, kind):
    """(value, band), [6,L] each, of facts traced in one precision: {subject, low, KIND}."""
    pools = [[] for _ in range(6)]
    for fact in traced:
        scores, (begin, end) = fact[kind], fact["subject"]
        last = len(scores) - 1
        pools[0].append(scores[begin])
        pools[1].extend(scores[begin + 1:end - 1])
        pools[2].append(scores[end - 1])
        if end <= last:
            pools[3].append(scores[end])
        pools[4].extend(scores[end + 1:last])
        pools[5].append(scores[last])
    low = np.mean([fact["low"] for fact in traced])
    nothing = np.full((1, traced[0][kind].shape[1]), np.nan)  # no such token in any fact
    pools = [np.stack(pool) if pool else nothing for pool in pools]
    return (np.stack([pool.mean(0) - low for pool in pools]),
            np.stack([1.96 * pool.std(0) / np.sqrt(len(traced)) for pool in pools]))


def check_trace(fact, length, subject):
    """What must hold whatever the weights are."""
    near = lambda a, b: np.size(a) == 0 or gap(np.asarray(a), np.asarray(b)) < 1e-12  # noqa: E731
    assert near(fact["resid"][length - 1, -1], fact["high"]), "the last token's last layer is the clean run"
    for kind in KINDS:
        assert near(fact[kind][:subject[0]], fact["low"]), "nothing to restore before the subject"
    for kind in ("mlp", "attn"):
        assert near(fact["severed_" + kind][:, -1], fact["resid"][:, -1]), "nothing to sever after the last"
    assert near(fact["resid"][:length - 1, -1], fact["low"]), "other tokens' last layer has no reader"


def trace(golden, source, tokenizer, settings):
    """Add the keys of causal tracing; settings: name -> (facts, options, noise, window, samples, bos)."""
    hooked = {dtype: Hooked(source, dtype) for dtype in (torch.float64, torch.float32)}
    for setting, (facts, flags, times, window, samples, bos) in settings.items():
        golden.metadata["facts:" + setting] = json.dumps(facts, ensure_ascii=True)
        sigma = noise_scale(source, tokenizer, facts, times)
        golden.metadata["flags:trace/" + setting] = " ".join(flags)
        golden.metadata["sigma:" + setting] = repr(sigma)
        skipped, traced = 0, {dtype: [] for dtype in hooked}
        for line, (prompt, subject, attribute) in enumerate(facts, 2):
            ids = [tokenizer.bos_token_id] * bos + tokenizer(prompt)["input_ids"]
            texts = [decode(tokenizer, token) for token in ids]
            place = subject_range(texts, subject)
            clean = {dtype: one.final(torch.tensor([ids]))[0] for dtype, one in hooked.items()}
            best = clean[torch.float64].topk(2)
            assert best.values[0] > 1.001 * best.values[1], "a near tie in the answer: take another fact"
            answer = best.indices[0].item()
            assert answer == clean[torch.float32].argmax().item()
            text = decode(tokenizer, answer)
            if attribute and text.strip() != attribute:
                skipped += 1
                continue
            golden.metadata["fact:%s/%d" % (setting, line)] = json.dumps(
                {"ids": ids, "tokens": texts, "subject": place, "answer": text, "answer_id": answer})
            found = {dtype: trace_fact(one, ids, place, answer, sigma, window, samples)
                     for dtype, one in hooked.items()}
            f64, f32 = found[torch.float64], found[torch.float32]
            check_trace(f64, len(ids), place)
            for name in f64:
                key = "trace/%s/%d/%s" % (setting, line, name)
                golden.add(key, np.atleast_1d(f64[name]), np.atleast_1d(f32[name]).astype(np.float32))
            for dtype in found:
                traced[dtype].append(dict(found[dtype], subject=place))
            print("%s line %d: %s -> %r, high %.3g, low %.3g, float32 off by %.2g" % (
                setting, line, texts[place[0]:place[1]], text, f64["high"], f64["low"],
                max(gap(f64[kind], f32[kind]) for kind in KINDS)), flush=True)
        golden.metadata["skipped:" + setting] = str(skipped)
        for kind in KINDS if len(traced[torch.float64]) > 1 else ():
            for name, f64, f32 in zip(("value", "band"), averages(traced[torch.float64], kind),
                                      averages(traced[torch.float32], kind)):
                golden.add("trace/%s/averages/%s/%s" % (setting, kind, name), f64, f32.astype(np.float32))


TINY_FACTS = [
    ("The capital of France is the city of", "France", "Paris"),
    ("The capital city of Italy is called", "Italy", "Rome"),       # two tokens
    ("Spain has a capital called", "Spain", "Madrid"),              # the subject begins the prompt
    ("The people know James Brown for", "James Brown", "music"),    # two tokens, two words
    ("The capital of Canada is the city of", "Canada", "Ottawa"),   # not known: skipped
    ("The name of George Harrison is known in", "George Harrison", "music"),
    ("When in Japan, go to the city of", "Japan", ""),              # no attribute: whatever it says
]
RANDOM_FACTS = [
    ("The capital of France is the city of", "France", ""),
    ("The people know Mary for", "Mary", ""),                       # one token; first subsequent = last
    ("The people know James Brown", "James Brown", ""),             # the subject ends the prompt
    ("The capital city of Iran is called", "Ira", ""),              # cut: begins and ends inside tokens
    ("The people of Paris say this is", "is", ""),                  # first match inside a longer word
    ("The caf\u00e9 of South Korea has a", "South Korea", ""),      # a character of two tokens before it
    ("The capital of Egypt is the city of", "Egypt", "Cairo"),      # an untrained model does not know
    ("The capital of France is called", "France", ""),              # a subject again: counts again
]


# ---- ablation ---------------------------------------------------------------------------------------------

BLOCK_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEAD_SITES = tuple("attn_head_%s_%s" % (kind, where) for where in ("by_pos", "all_pos")
                   for kind in ("out", "q", "k", "v"))
SITES = ("resid_pre", "attn_out", "mlp_out", "attn_head_out_by_pos", "attn_head_out_all_pos")


def hook_of(site, l):
    if site in BLOCK_SITES:
        return "blocks.%d.hook_%s" % (l, site)
    return "blocks.%d.attn.hook_%s" % (l, site.split("_")[2].replace("out", "z"))


def cells(model, site, length):
    """Every (layer, index into an activation, axes of the result) in row-major order, and the shape."""
    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    every = slice(None)
    if site in BLOCK_SITES:
        return [(l, (every, p)) for l in range(layers) for p in range(length)], (layers, length)
    if site.endswith("by_pos"):
        return ([(l, (every, p, h)) for l in range(layers) for p in range(length) for h in range(heads)],
                (layers, length, heads))
    return [(l, (every, every, h)) for l in range(layers) for h in range(heads)], (layers, heads)


def replaced(task, edits):
    """The clean run's logits with edits: (hook, index, replacement of the whole activation)."""
    hooks = []
    for name, index, values in edits:
        def put(activation, hook, index=index, values=values):
            activation = activation.clone()
            activation[index] = values[index]
            return activation
        hooks.append((name, put))
    with default_dtype(task.model.cfg.dtype):
        return task.model.run_with_hooks(task.clean, fwd_hooks=hooks)


def zero(values):
    return torch.zeros_like(values)


def mean(values):
    return values.mean(0, keepdim=True).expand_as(values)


def mean_by(groups):
    def within(values):
        out = torch.empty_like(values)
        for label in set(groups):
            rows = [b for b, other in enumerate(groups) if other == label]
            out[rows] = values[rows].mean(0, keepdim=True)
        return out
    return within


def ablate(task, site, replacement):
    """{metric: [B,cells]}; replacement turns a clean activation [B,T,...] into what is put in."""
    places, shape = cells(task.model, site, task.clean.shape[1])
    seen = []
    for l, index in places:
        name = hook_of(site, l)
        seen.append(task.measure(replaced(task, [(name, index, replacement(task.clean_cache[name]))])))
    return {metric: torch.stack([cell[metric] for cell in seen], -1).reshape((-1,) + shape).numpy()
            for metric in base.METRICS}


def ablate_list(task, chosen, positions, keep, replacement):
    """[B]: all chosen heads' z at once, (layer, head) at positions [B] (None: at all); keep: the rest."""
    edits = []
    for l in range(task.model.cfg.n_layers):
        name = hook_of("attn_head_out_by_pos", l)
        z = task.clean_cache[name]
        mask = torch.zeros(z.shape[:3], dtype=torch.bool)
        for layer, head in chosen:
            if layer == l and positions is None:
                mask[:, :, head] = True
            elif layer == l:
                mask[torch.arange(len(z)), torch.tensor(positions), head] = True
        edits.append((name, ~mask if keep else mask, replacement(z)))
    return task.measure(replaced(task, edits))["logit_diff"].numpy()


def add_ablations(golden, variant, tasks, groups, chosen, column, full):
    """full: more sites, other metrics and every donor."""
    by = {"zero": zero, "mean": mean, "groups": mean_by(groups)}
    for how, replacement in by.items():
        for site in BLOCK_SITES + HEAD_SITES if full and how != "groups" else SITES:
            values = [ablate(task, site, replacement) for task in tasks]
            metrics = base.METRICS if full and how != "groups" and site in SITES else ("logit_diff",)
            for metric in metrics:
                kind = "ablate" if metric == "logit_diff" else "ablate-" + metric
                golden.add("%s/%s/%s/%s" % (variant, kind, how, site), *(one[metric] for one in values),
                           mean=True)
    if full:
        for site in ("resid_pre", "attn_out", "attn_head_out_all_pos"):
            values = [np.stack([ablate(task, site, lambda x, d=d: x[d:d + 1].expand_as(x))["logit_diff"]
                                for d in range(len(groups))], 1) for task in tasks]
            golden.add("%s/ablate/donors/%s" % (variant, site), *values)
    end = [tasks[0].clean.shape[1] - 1] * len(groups)
    every = [(l, h) for l in range(tasks[0].model.cfg.n_layers) for h in range(tasks[0].model.cfg.n_heads)]
    for how, replacement in by.items():
        for what, where, heads, positions, keep in (
                ("heads", "all", chosen, None, False), ("heads", "end", chosen, end, False),
                ("heads", "column", chosen, column, False), ("keep", "all", chosen, None, True),
                ("keep", "end", chosen, end, True), ("every", "all", every, None, False)):
            golden.add("%s/ablate/%s/list/%s-%s" % (variant, how, what, where), *(
                ablate_list(task, heads, positions, keep, replacement) for task in tasks), mean=True)


# ---- path patching: the three steps -------------------------------------------------------------------------


def path(task, direction, to, freeze_mlps):
    """[B,L,H]: the logit difference with the path from each head (all positions) to `to` patched."""
    model = task.model
    clean, corrupted = (task.clean, task.clean_cache), (task.corrupted, task.corrupted_cache)
    (tokens, original), (_, other) = (clean, corrupted) if direction == "noising" else (corrupted, clean)
    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    receivers = [] if to == "final" else [
        (int(part.split(".")[0]), int(part.split(".")[1]), part.split(".")[2]) for part in to.split(",")]
    watched = (["blocks.%d.hook_resid_post" % (layers - 1)] if to == "final" else
               sorted({"blocks.%d.attn.hook_%s" % (l, kind) for l, _, kind in receivers}))
    values = np.zeros((len(tokens), layers, heads), str(model.cfg.dtype).split(".")[1])

    def hold(source, activation, hook):
        return source[hook.name].clone()

    for sender in range(layers):
        for head in range(heads):
            # 2: every z held at its own value, but the sender's; MLPs and LayerNorms recompute.
            def freeze(z, hook):
                z = original[hook.name].clone()
                if hook.layer() == sender:
                    z[:, :, head] = other[hook.name][:, :, head]
                return z

            seen = {}

            def keep(activation, hook):
                seen[hook.name] = activation.clone()

            hooks = [("blocks.%d.attn.hook_z" % l, freeze) for l in range(layers)]
            if freeze_mlps:
                hooks += [("blocks.%d.hook_mlp_out" % l, lambda x, hook: hold(original, x, hook))
                          for l in range(layers)]
            hooks += [(name, keep) for name in watched]
            with default_dtype(model.cfg.dtype):
                model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None)
                # 3: unembed, or a fresh run with the receivers' inputs put in.
                if to == "final":
                    logits = model.unembed(model.ln_final(seen[watched[0]]))
                else:
                    def receive(activation, hook):
                        activation = activation.clone()
                        for l, h, kind in receivers:
                            if hook.name == "blocks.%d.attn.hook_%s" % (l, kind):
                                activation[:, :, h] = seen[hook.name][:, :, h]
                        return activation
                    logits = model.run_with_hooks(tokens, fwd_hooks=[(name, receive) for name in watched])
            values[:, sender, head] = task.measure(logits)["logit_diff"].numpy()
    return values


def check_direct_path(task, direction, values):
    """With the MLPs held too, the sender's own change is all that reaches the final residual stream."""
    model = task.model
    original, other = task.clean_cache, task.corrupted_cache
    if direction == "denoising":
        original, other = other, original
    last = original["blocks.%d.hook_resid_post" % (model.cfg.n_layers - 1)]
    for l in range(model.cfg.n_layers):
        name = "blocks.%d.attn.hook_z" % l
        for h in range(model.cfg.n_heads):
            with default_dtype(torch.float64):
                change = (other[name] - original[name])[:, :, h] @ model.W_O[l, h]
                logits = model.unembed(model.ln_final(last + change))
            assert gap(task.measure(logits)["logit_diff"].numpy(), values[:, l, h]) < 1e-10, (l, h)


def add_paths(golden, variant, tasks, lists):
    for direction in ("noising", "denoising"):
        unpatched = tasks[0].baseline["clean" if direction == "noising" else "corrupted"]["logit_diff"].numpy()
        for to in ("final",) + lists:
            for frozen in (False, True):
                values = [path(task, direction, to, frozen) for task in tasks]
                golden.add("%s/path%s/%s/%s" % (variant, "-frozen" * frozen, direction, to), *values, mean=True)
                if to == "final" and frozen:
                    check_direct_path(tasks[0], direction, values[0])
                if to != "final":  # senders that cannot reach
                    last = max(int(part.split(".")[0]) for part in to.split(","))
                    assert gap(values[0][:, last:], unpatched[:, None, None]) < 1e-10


# ---- attribution ------------------------------------------------------------------------------------------


def lens(task):
    """{accumulated, recomputed, layers, heads, bias, ld} of the clean run's last position, per example."""
    model = task.model
    folded = model.cfg.normalization_type == "LNPre"
    with default_dtype(model.cfg.dtype):
        logits, cache = model.run_with_cache(task.clean)
        difference = (model.tokens_to_residual_directions(task.answer)
                      - model.tokens_to_residual_directions(task.wrong))                     # [B,C]
        bias = model.b_U[task.answer] - model.b_U[task.wrong]
        direction = difference
        if not folded:
            direction = difference * model.ln_final.w
            bias = bias + difference @ model.ln_final.b
        labels, found = {}, {}
        stacks = {}
        stacks["accumulated"], labels["accumulated"] = cache.accumulated_resid(
            layer=-1, incl_mid=True, pos_slice=-1, return_labels=True)
        stacks["layers"], labels["layers"] = cache.decompose_resid(
            layer=-1, pos_slice=-1, return_labels=True)
        cache.compute_head_results()
        stacks["heads"], labels["heads"] = cache.stack_head_results(
            layer=-1, pos_slice=-1, return_labels=True, incl_remainder=True)
        for name, stack in stacks.items():  # [parts,B,C]
            scaled = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
            found[name] = (scaled * direction).sum(-1).T.numpy().copy()
            if folded:
                theirs = cache.logit_attrs(stack, task.answer, incorrect_tokens=task.wrong, pos_slice=-1)
                assert torch.equal(theirs.T, torch.from_numpy(found[name])), name
        rows = cache.accumulated_resid(layer=-1, incl_mid=True, pos_slice=-1, apply_ln=True)
        lensed = (rows * difference).sum(-1).T
        if not folded:  # here their final LayerNorm has added its bias
            lensed = lensed - (difference @ model.ln_final.b)[:, None]
        found["recomputed"] = lensed.numpy().copy()
        found["bias"] = bias.numpy().copy()
        found["ld"] = task.measure(logits)["logit_diff"].numpy()
    return found, labels


def add_lens(golden, variant, tasks):
    (f64, labels), (f32, _) = (lens(task) for task in tasks)
    for name in f64:
        golden.add("%s/lens/%s" % (variant, name), f64[name], f32[name], mean=True)
    for name, words in labels.items():
        golden.metadata["labels:" + name] = " ".join(words)
    for total in (f64["accumulated"][:, -1], f64["recomputed"][:, -1], f64["layers"].sum(1),
                  f64["heads"].sum(1)):
        assert gap(total + f64["bias"], f64["ld"]) < 1e-10, "the parts do not sum to the logit difference"
    assert gap(f64["accumulated"][:, :-1], f64["recomputed"][:, :-1]) > 1e-3, "the two ways should differ"


# ---- attention and head kinds -----------------------------------------------------------------------------


def add_attention(golden, variant, tasks, examples):
    """Patterns [n,LH,T,T] and detect_head's three scores, by mul and without exclusions."""
    patterns, scores = [], []
    for task in tasks:
        model = task.model
        layers, heads = model.cfg.n_layers, model.cfg.n_heads
        pattern = torch.stack([task.clean_cache["blocks.%d.attn.hook_pattern" % l] for l in range(layers)], 1)
        patterns.append(pattern[:examples].flatten(1, 2).numpy())
        tokens = task.clean[:1]
        kinds = [head_detector.get_previous_token_head_detection_pattern(tokens),
                 head_detector.get_duplicate_token_head_detection_pattern(tokens),
                 head_detector.get_induction_head_detection_pattern(tokens)]
        scores.append(np.array([[[head_detector.compute_head_attention_similarity_score(
            pattern[0, l, h].clone(), detection_pattern=kind, exclude_bos=False, exclude_current_token=False,
            error_measure="mul") for h in range(heads)] for l in range(layers)] for kind in kinds],
            str(model.cfg.dtype).split(".")[1]))
    golden.add(variant + "/attn", *patterns)
    golden.add(variant + "/heads", *scores)
    # The same written out once more, in case their functions are wrong.
    ids, p = tasks[0].clean[0].tolist(), tasks[0].clean_cache
    for kind, matches in enumerate((lambda i, j: j == i - 1, lambda i, j: j < i and ids[j] == ids[i],
                                    lambda i, j: 0 < j <= i and j - 1 < i and ids[j - 1] == ids[i])):
        for l in range(scores[0].shape[1]):
            for h in range(scores[0].shape[2]):
                pattern = p["blocks.%d.attn.hook_pattern" % l][0, h].numpy()
                total = sum(pattern[i, j] for i in range(len(ids)) for j in range(i + 1) if matches(i, j))
                assert abs(total / len(ids) - scores[0][kind, l, h]) < 1e-12, (kind, l, h)


def copying(model, tokens, k=5):
    """[2,L,H,names]: is the name among its own k likeliest, through W_OV and through -W_OV; and by how
    much of a logit the nearest decision was made."""
    with default_dtype(model.cfg.dtype):
        block = model.blocks[0]
        embedding = model.embed(torch.tensor([tokens]))                                      # [1,names,C]
        resid = embedding + block.mlp(block.ln2(embedding))
        own = torch.arange(len(tokens)), torch.tensor(tokens)
        found = np.zeros((2, model.cfg.n_layers, model.cfg.n_heads, len(tokens)))
        nearest = np.inf
        for s, sign in enumerate((1, -1)):
            for l in range(model.cfg.n_layers):
                for h in range(model.cfg.n_heads):
                    W_OV = model.W_V[l, h] @ model.W_O[l, h]
                    logits = model.unembed(model.ln_final(resid @ (sign * W_OV)))[0]        # [names,V]
                    best = logits.topk(k + 1, dim=-1)
                    found[s, l, h] = (best.indices[:, :k] == torch.tensor(tokens)[:, None]).any(-1).numpy()
                    line = torch.where(torch.from_numpy(found[s, l, h] > 0), best.values[:, k],
                                       best.values[:, k - 1])
                    nearest = min(nearest, (logits[own] - line).abs().min().item())
    return found, nearest


def add_copying(golden, variant, tasks, names, tokens):
    (f64, nearest), (f32, _) = (copying(task.model, tokens) for task in tasks)
    assert (f64 == f32).all() and nearest > 1e-4, "a near tie: leave that name out"
    golden.metadata["names"] = json.dumps(names)
    for s, sign in enumerate(("positive", "negative")):
        golden.add("%s/copying/%s" % (variant, sign), f64[s], f32[s].astype(np.float32))


# ---- the files --------------------------------------------------------------------------------------------


def add_baseline(golden, variant, tasks):
    golden.add(variant + "/baseline", *(torch.stack(
        [task.baseline[side]["logit_diff"] for side in ("clean", "corrupted")], 1).numpy() for task in tasks),
        mean=True)


def check_invariants(golden):
    """What no processing changes: whole vectors swapped for other runs' or for means."""
    for key, values in golden.tensors.items():
        if key.startswith("default/") and (
                "/path" in key or "/ablate/mean/" in key or "/ablate/groups/" in key or "/ablate/donors/" in key
                or key in ("default/baseline", "default/attn", "default/heads", "default/lens/layers",
                           "default/lens/accumulated", "default/lens/recomputed", "default/lens/ld")):
            other = key.replace("default/", "no-processing/", 1)
            other = golden.metadata.get("same:" + other, other)
            if other in golden.tensors:
                assert gap(values, golden.tensors[other]) < 1e-8, key


def record(name, source, examples, variants, groups, chosen, column, lists, attn_examples, full, names=None):
    golden = base.Golden()
    golden.metadata.update(
        groups=" ".join(groups), heads=",".join("%d.%d" % head for head in chosen),
        column=" ".join(map(str, column)), attn_examples=str(attn_examples))
    for variant in variants:
        processing = {"default": base.DEFAULT, "no-processing": base.NONE}[variant]
        golden.metadata["flags:" + variant] = " ".join(base.options(processing))
        tasks = [base.Task(base.hooked(source, dtype, processing), examples)
                 for dtype in (torch.float64, torch.float32)]
        add_baseline(golden, variant, tasks)
        add_lens(golden, variant, tasks)
        add_attention(golden, variant, tasks, attn_examples)
        if names:
            add_copying(golden, variant, tasks, *names)
        if variant == "default" or full:
            add_ablations(golden, variant, tasks, groups, chosen, column, full and variant == "default")
            add_paths(golden, variant, tasks, lists)
        print("%s/%s done" % (name, variant), flush=True)
    check_invariants(golden)
    return golden


def write(golden, name):
    path = os.path.join(base.GOLDEN, "analyses-%s.safetensors.gz" % name)
    golden.write(path)
    size = os.path.getsize(path)
    print("%s: %d tensors, %d bytes" % (path, len(golden.tensors), size), flush=True)
    assert size < 400000


def make_random_facts():
    """A random model with the bundled model's tokenizer, its <|endoftext|> in the configuration too."""
    folder = os.path.join(base.GOLDEN, "random-facts")
    base.lively(31, folder, n_layer=3, n_head=2, n_embd=24, n_inner=36, n_positions=32, vocab_size=640)
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(os.path.join(base.TINY, name), os.path.join(folder, name))
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    config["bos_token_id"] = config["eos_token_id"] = tokenizer_of(folder).bos_token_id
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def known_fact(source, tokenizer):
    """A fact that even this model knows: the attribute is what it says."""
    hooked = Hooked(source, torch.float64)
    for prompt, subject in (("The capital of %s is the city of" % place, place) for place in (
            "Peru", "Spain", "Norway", "Greece", "Austria", "Japan", "Ireland", "Italy")):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        text = decode(tokenizer, hooked.final(ids)[0].argmax().item())
        if text.startswith(" ") and text.strip().isalpha() and text.isascii():
            return prompt, subject, text.strip()
    raise SystemExit("no answer that is a word: take another seed")


BY_DEFAULT = ([], 3.0, 10, 10, False)


def main(names):
    torch.set_num_threads(1)
    for name in names or ("odd", "random-facts", "tiny"):
        if name == "odd":
            folder = os.path.join(base.GOLDEN, "odd")
            examples = base.examples_for("odd", base.MODELS["odd"][1], 4, 7)
            golden = record("odd", base.hugging_face(folder), examples, ("default", "no-processing"),
                            ["a", "b", "a", "a"], [(0, 1), (2, 0)], [2, 4, 6, 3],
                            ("2.0.q,2.1.k,1.0.v", "1.2.q,1.2.k,2.2.v"), 4, True)
        elif name == "random-facts":
            folder = make_random_facts()
            source, tokenizer = base.hugging_face(folder), tokenizer_of(folder)
            golden = base.Golden()
            facts = RANDOM_FACTS + [known_fact(source, tokenizer)]
            trace(golden, source, tokenizer, {
                "default": (facts,) + BY_DEFAULT,
                "narrow": (facts, ["--window", "2"], 3.0, 2, 10, False),
                "few": (facts, ["--window", "3", "--samples", "3", "--noise", "0.7"], 0.7, 3, 3, False),
                "alone": (facts[5:6], ["--window", "1"], 3.0, 1, 10, False),
                "bos": (facts, ["--bos", "--window", "1", "--samples", "2"], 3.0, 1, 2, True)})
        else:
            source, tokenizer = base.hugging_face(base.TINY), tokenizer_of(base.TINY)
            examples = base.read_examples(base.TINY)
            # Names are one token with their space; TSV answers first, in order, then the rest of the corpus.
            words = ("Mary John James Tom Sid Dan Amy Martin Anna Mark Paul Kate Jack Lucy Emma Peter "
                     "Helen").split()
            tokens = [tokenizer(" " + word)["input_ids"] for word in words]
            keep = [n for n, ids in enumerate(tokens) if len(ids) == 1]
            length = len(examples[0][0])
            golden = record("tiny", source, examples, ("default", "no-processing"),
                            [str(b % 3) for b in range(len(examples))], [(3, 1), (2, 0), (0, 2)],
                            [length - 1 - b for b in range(len(examples))],
                            ("3.0.q,3.2.v", "2.1.k,3.1.q,3.1.k"), 4, False,
                            ([words[n] for n in keep], [tokens[n][0] for n in keep]))
            trace(golden, source, tokenizer, {
                "default": (TINY_FACTS,) + BY_DEFAULT,
                "narrow": (TINY_FACTS, ["--window", "3"], 3.0, 3, 10, False),
                "alone": (TINY_FACTS[3:4],) + BY_DEFAULT})
        write(golden, name)


if __name__ == "__main__":
    main(sys.argv[1:])
