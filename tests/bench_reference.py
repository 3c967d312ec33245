# SPDX-License-Identifier: MIT
"""Times TransformerLens for bench.py: python bench_reference.py HF_FOLDER PROMPTS.tsv CELLS -> one line of JSON.

Each sweep is timed on CELLS cells (after one that does not count) and multiplied by its number of cells."""

import json
import sys
import time

started = time.time()
import os  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import torch  # noqa: E402
import transformers  # noqa: E402
import make_golden as reference  # noqa: E402
import util  # noqa: E402

torch.set_num_threads(min(2, os.cpu_count() or 1))
source, prompts, cells = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = reference.hooked(reference.hugging_face(source), torch.float32, reference.DEFAULT)
load = time.time() - started
tokenizer = transformers.GPT2TokenizerFast(vocab_file=source + "/vocab.json", merges_file=source + "/merges.txt")
columns, rows = util.read_tsv(prompts)
rows = [dict(zip(columns, row)) for row in rows]
clean, corrupted = (torch.tensor([[50256] + tokenizer(row[role])["input_ids"] for row in rows])
                    for role in ("clean", "corrupted"))
answer, wrong = (torch.tensor([tokenizer(row[role])["input_ids"][0] for row in rows]) for role in ("answer", "wrong"))


def metric(logits):
    final = logits[:, -1]
    return (final.gather(1, answer[:, None]) - final.gather(1, wrong[:, None])).mean()


def seconds(run, n):
    run(0)
    begun = time.time()
    for i in range(1, n + 1):
        run(i)
    return (time.time() - begun) / n


_, cache = model.run_with_cache(clean)
T = clean.shape[1]
found = {"load": load, "forward": seconds(lambda i: model(torch.cat([clean, corrupted])), 3)}

fact = torch.tensor([tokenizer("The capital of France is the city of")["input_ids"]]).repeat(11, 1)
found["trace"] = seconds(lambda i: model(fact), 5) * 3 * 12 * fact.shape[1]  # a run of 11 prompts for each cell


def cell(name, setter):
    def run(i):
        def hook(value, hook):
            return setter(value, cache[hook.name], i)
        metric(model.run_with_hooks(corrupted, fwd_hooks=[(name % (i % 12), hook)]))
    return run


def at_position(value, source, i):
    value[:, i % T] = source[:, i % T]
    return value


def at_head(value, source, i):
    value[:, :, i % 12] = source[:, :, i % 12]
    return value


one = seconds(cell("blocks.%d.hook_resid_pre", at_position), cells)
head = seconds(cell("blocks.%d.attn.hook_z", at_head), cells)
found.update({"resid_pre": one * 12 * T, "block_every": one * 36 * T, "attn_head_out_all_pos": head * 144,
              "attn_head_by_pos_every": head * 144 * T * 5})
print(json.dumps(found))
