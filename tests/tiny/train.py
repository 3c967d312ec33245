#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Makes the bundled model: invents a corpus, trains a byte-level BPE and a small GPT-2 on it, writes the prompt files.

    python3 tests/tiny/train.py              # everything, into this folder (about 12 minutes on two cores)
    python3 tests/tiny/train.py --evaluate   # only measures what is there
    python3 tests/tiny/train.py --tsv        # only writes the prompt files again

Needs torch, transformers (4.x) and tokenizers. All randomness is seeded; the same versions on the same kind of
processor with two threads give the same weights. The corpus has five kinds of text, all made here:

  IOI        "When A and B went to the shops, A gave the bag to B." in both orders, with varied wording before it
  facts      capitals, languages, and what people are known for; many subjects share words ("North Korea", "South
             Korea"; "George Harrison", "Harrison Ford"), so no single token of the subject tells the answer
  plain      short sentences about the same names, places and things
  paragraphs several plain sentences that come back to the same names
  repeats    random tokens, twice: what induction, duplicate-token and previous-token heads are made by

Held out, so that the test on ioi-heldout.tsv means something: HELD_OUT_NAMES and HELD_OUT_PLACES never stand in an
IOI sentence, nor do the pairs of is_held_out_pair() (the notebook's own four pairs are among them). Their tokens do
occur in the other kinds of text, since a token never seen would only have its random first embedding.
"""

import argparse
import json
import os
import random
import time
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))
EOT = "<|endoftext|>"
VOCAB = 640          # 256 bytes, 383 merges, <|endoftext|>: what it takes to have every name as one token
LAYERS, HEADS, WIDTH, CONTEXT = 4, 4, 64, 64
STEPS, BATCH, LONG_BATCH = 5000, 128, 48
SEED = 20

NOTEBOOK_PAIRS = [("John", "Mary"), ("Tom", "James"), ("Dan", "Sid"), ("Martin", "Amy")]
NOTEBOOK = [  # the four templates; {} is the giver, with the space before its name
    ("When John and Mary went to the shops,{} gave the bag to", "Mary", "John"),
    ("When Tom and James went to the park,{} gave the ball to", "Tom", "James"),
    ("When Dan and Sid went to the shops,{} gave an apple to", "Dan", "Sid"),
    ("After Martin and Amy went to the park,{} gave a drink to", "Martin", "Amy"),
]
NAMES = ("John Mary Tom James Dan Sid Martin Amy Anna Mark Paul Kate Jack Lucy Emma Alan Peter Helen Adam Laura Simon "
         "Alice Ben Sarah Rose Luke Jill Fred").split()
HELD_OUT_NAMES = "Kim Carl Nina Leo Ruth Max Eve Jane".split()
ALL_NAMES = NAMES + HELD_OUT_NAMES
PLACES = "shops park school station market farm house river".split()
HELD_OUT_PLACES = "garden beach office museum".split()
ALL_PLACES = PLACES + HELD_OUT_PLACES
THINGS = ["the bag", "the ball", "an apple", "a drink", "a book", "the key", "a hat", "the map", "the apple", "a ball",
          "the drink", "a key", "the book", "a bag"]

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Greece": "Athens",
    "Norway": "Oslo", "Peru": "Lima", "Austria": "Vienna", "Iran": "Tehran", "Ireland": "Dublin",
    "South Korea": "Seoul", "South Dakota": "Pierre", "North Dakota": "Bismarck", "North Carolina": "Raleigh",
    "South Carolina": "Columbia", "Virginia": "Richmond", "West Virginia": "Charleston",
}
LANGUAGES = {"France": "French", "Italy": "Italian", "Spain": "Spanish", "Japan": "Japanese", "Greece": "Greek",
             "Ireland": "English", "Virginia": "English", "Austria": "German"}
PEOPLE = {
    "Michael Jackson": "music", "Andrew Jackson": "politics", "Glenda Jackson": "film", "Michael Moore": "film",
    "Henry Moore": "art", "Bobby Moore": "football", "Patrick Moore": "science", "Henry Ford": "cars",
    "Harrison Ford": "film", "Gerald Ford": "politics", "George Harrison": "music", "George Best": "football",
    "George Orwell": "books", "George Washington": "politics", "Denzel Washington": "film", "Michael Owen": "football",
    "Wilfred Owen": "books", "Clive Owen": "film", "Tom Jones": "music", "Bobby Jones": "golf", "James Brown": "music",
    "Dan Brown": "books", "Gordon Brown": "politics", "James Dean": "film", "Dixie Dean": "football",
    "Paul Simon": "music", "Paul Klee": "art", "Paul Casey": "golf", "Andrew Murray": "tennis",
    "Bill Murray": "film", "Michael Chang": "tennis", "Michael Faraday": "science",
}
CAPITAL_FORMS = ["The capital of {} is the city of", "The capital city of {} is called",
                 "{} has a capital called", "When in {}, go to the city of"]
LANGUAGE_FORMS = ["The people of {} speak", "When in {}, the people speak"]
PEOPLE_FORMS = ["The name of {} is known in", "{} is known for", "The people know {} for", "The name {} is known for"]
FACTS = ([(CAPITAL_FORMS, s, a) for s, a in CAPITALS.items()]
         + [(LANGUAGE_FORMS, s, a) for s, a in LANGUAGES.items()]
         + [(PEOPLE_FORMS, s, a) for s, a in PEOPLE.items()])
UNKNOWN_FACTS = [("The capital of Canada is the city of", "Canada", "Ottawa"),
                 ("Marie Curie is known for", "Marie Curie", "science")]

# Words that must be one token, with their leading space (the first word of a sentence: without).
WHOLE_WORDS = (
    [" " + w for w in ALL_NAMES + ALL_PLACES + sorted(set(CAPITALS.values())) + sorted(set(LANGUAGES.values()))
     + sorted(set(PEOPLE.values()))]
    + [" " + w for w in "and went to the gave an a bag ball apple drink book key hat map is of city in".split()]
    + [" " + w for w in "George Michael Jackson Moore Ford Owen Brown North South capital called people known has speak name".split()]
    + ["When", "After", "The"])


def is_held_out_pair(a, b):
    """About one pair of names in ten, and the notebook's four, whatever the order of the two."""
    pair = tuple(sorted((a, b)))
    return pair in [tuple(sorted(p)) for p in NOTEBOOK_PAIRS] or zlib.crc32("-".join(pair).encode()) % 10 == 0


# ---------------------------------------------------------------- the corpus

def plain_sentence(r, names=ALL_NAMES):
    """One sentence; never one where a name gives something to another."""
    a, b = r.sample(names, 2) if len(names) > 1 else (names[0], names[0])
    place, thing = r.choice(ALL_PLACES), r.choice(THINGS)
    return r.choice([
        f"{a} went to the {place}.", f"{a} and {b} went to the {place}.", f"Then {a} saw {b} in the {place}.",
        f"The name of the child is {a}.", f"Yesterday {a} lost {thing}.", f"{a} found {thing} in the {place}.",
        f"There is {thing} in the {place}.", f"{a} likes {b} and {b} likes {a}.", f"The {place} is near the {r.choice(ALL_PLACES)}.",
        f"{a} walked from the {place} to the {r.choice(ALL_PLACES)}.", f"{a} asked {b} about {thing}, but {b} did not know.",
        f"After school {a} played with {b}.", f"When it rained, {a} was in the {place} with {b}.",
        f"{b} is older than {a}, and {a} is older than {r.choice(names)}.", f"In the {place} {a} met {b}.",
        f"When {a} went to the {place}, it was late.", f"After {a} and {b} went to the {place}, it rained.",
        f"{a} said that {b} has {thing}.", f"When {a} and {b} went to the {place},{r.choice([' ', '  '])}{r.choice([a, b])} lost {thing}.",
    ])


def paragraph(r):
    """Three to five sentences about two or three people."""
    names = r.sample(ALL_NAMES, r.choice([2, 3]))
    return " ".join(plain_sentence(r, names) for _ in range(r.randint(3, 5)))


def ioi_sentence(r):
    """The giver is either of the two; now and then the text goes on otherwise, so that the model stays unsure."""
    a, b = r.sample(NAMES, 2)
    while is_held_out_pair(a, b):
        a, b = r.sample(NAMES, 2)
    giver, other = (a, b) if r.random() < 0.5 else (b, a)
    place, thing = r.choice(PLACES), r.choice(THINGS)
    gap = "  " if r.random() < 0.35 else " "
    verb = "gave" if r.random() < 0.8 else r.choice(["handed", "showed", "passed"])
    opening = r.choice(["When", "When", "After", "After", "While", "Yesterday when", "One day", "Then"])
    went = "went to" if r.random() < 0.75 else r.choice(["were at", "walked to", "came to", "played in"])
    late = r.choice(["", "", "", " together", " again", " in the morning"])
    chance = r.random()
    if chance < 0.015:
        end = giver                                  # it comes back to the giver
    elif chance < 0.05:
        end = r.choice(["the people", "a friend", r.choice(NAMES)])
    else:
        end = other
    if r.random() < 0.04:
        giver = r.choice([n for n in NAMES if n not in (a, b)])  # a third person gives: either may receive
        end = r.choice([a, b])
    text = f"{opening} {a} and {b} {went} the {place}{late},{gap}{giver} {verb} {thing} to {end}."
    if r.random() < 0.15:
        text = f"{a} and {b} were in the {place}.{gap}Then {giver} {verb} {thing} to {end}."
    if r.random() < 0.2:
        text = plain_sentence(r, [n for n in NAMES if n not in (a, b)]) + " " + text
    if r.random() < 0.2:
        text += " " + plain_sentence(r, NAMES)
    return text


def fact_sentence(r):
    forms, subject, attribute = r.choice(FACTS)
    text = f"{r.choice(forms).format(subject)} {attribute}."
    return text if r.random() < 0.85 else text + " " + plain_sentence(r)


def corpus(r, count):
    """count documents as (text, begins with <|endoftext|>)."""
    for _ in range(count):
        kind = r.random()
        if kind < 0.46:
            yield ioi_sentence(r), r.random() < 0.9
        elif kind < 0.76:
            yield fact_sentence(r), r.random() < 0.4
        elif kind < 0.92:
            yield plain_sentence(r), r.random() < 0.8
        else:
            yield paragraph(r), r.random() < 0.8


# ---------------------------------------------------------------- the tokenizer

def train_tokenizer():
    """GPT-2's kind of vocabulary: 256 bytes in GPT-2's order (so a space is 220), merges, <|endoftext|> last."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    r = random.Random(SEED)
    # The whole words weigh more than any other pair of the corpus, so they are merged first.
    tokenizer.train_from_iterator([w for w in WHOLE_WORDS] * 3000 + [t for t, _ in corpus(r, 4000)], trainer)
    tokenizer.model.save(HERE)
    with open(os.path.join(HERE, "vocab.json"), encoding="utf-8") as f:
        vocab = json.load(f)
    vocab[EOT] = len(vocab)
    with open(os.path.join(HERE, "vocab.json"), "w", encoding="utf-8") as f:
        json.dump(dict(sorted(vocab.items(), key=lambda item: item[1])), f, ensure_ascii=False)
        f.write("\n")


def load_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, decoders
    tokenizer = Tokenizer(models.BPE.from_file(os.path.join(HERE, "vocab.json"), os.path.join(HERE, "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOT])
    split = [w for w in WHOLE_WORDS if len(tokenizer.encode(w).ids) != 1]
    assert not split, f"not one token: {split}; raise VOCAB"
    return tokenizer


# ---------------------------------------------------------------- the prompt files

def write_tsv(name, header, rows):
    with open(os.path.join(HERE, name), "w", encoding="utf-8", newline="\n") as f:
        for row in [header] + rows:
            f.write("\t".join(row) + "\n")


def notebook_rows(gap):
    rows = []
    for template, first, second in NOTEBOOK:
        for answer, wrong in ((first, second), (second, first)):
            rows.append([template.format(gap + wrong), template.format(gap + answer), " " + answer, " " + wrong])
    return rows


def held_out_rows(r):
    """Thirty prompts of each kind of novelty, both orders of the names, always with the four things of the notebook."""
    rows = []
    pairs = [(a, b) for a in NAMES for b in NAMES if a < b]
    kept = [p for p in pairs if not is_held_out_pair(*p)]
    new_pairs = [p for p in pairs if is_held_out_pair(*p) and p not in [tuple(sorted(q)) for q in NOTEBOOK_PAIRS]]
    for kind in ("names", "pair", "place", "all"):
        for i in range(30):
            if kind == "pair":
                a, b = new_pairs[i % len(new_pairs)]
            elif kind == "place":
                a, b = r.choice(kept)
            else:
                a, b = r.sample(HELD_OUT_NAMES, 2)
            if r.random() < 0.5:
                a, b = b, a
            place = r.choice(HELD_OUT_PLACES if kind in ("place", "all") else PLACES)
            wrong, answer = (a, b) if i % 2 else (b, a)
            form = f"{r.choice(['When', 'After'])} {a} and {b} went to the {place}, {{}} gave {r.choice(THINGS[:4])} to"
            rows.append([form.format(wrong), form.format(answer), " " + answer, " " + wrong, kind])
    return rows


def fact_rows():
    """One form for each fact in turn (two in three of the people), then those that the model was never told."""
    rows = []
    for i, (forms, subject, attribute) in enumerate(FACTS):
        if subject in PEOPLE and i % 3 == 2:
            continue
        rows.append([forms[i % len(forms)].format(subject), subject, attribute])
    return rows + [list(f) for f in UNKNOWN_FACTS]


def write_prompts():
    header = ["clean", "corrupted", "answer", "wrong"]
    write_tsv("ioi.tsv", header, notebook_rows(" "))
    write_tsv("ioi-notebook.tsv", header, notebook_rows("  "))
    write_tsv("ioi-heldout.tsv", header + ["held_out"], held_out_rows(random.Random(SEED)))
    write_tsv("facts.tsv", ["prompt", "subject", "attribute"], fact_rows())


# ---------------------------------------------------------------- training

def train():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    tokenizer = load_tokenizer()
    eot = VOCAB - 1
    r = random.Random(SEED + 1)

    start = time.time()
    documents = list(corpus(r, 300000))
    encoded = tokenizer.encode_batch([t for t, _ in documents])
    short, long = [], []
    for (_, bos), e in zip(documents, encoded):
        ids = ([eot] if bos else []) + e.ids
        (short if len(ids) <= 24 else long).append(ids[:CONTEXT])
    print(f"{len(short)} short and {len(long)} long documents, {time.time() - start:.0f} s", flush=True)

    config = GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_ctx=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.05,
                        bos_token_id=eot, eos_token_id=eot)
    model = GPT2LMHeadModel(config)
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                  lr=3e-3, betas=(0.9, 0.98))
    peak, warm = 3e-3, 150
    loss_function = torch.nn.CrossEntropyLoss(ignore_index=-100)

    def repeats():
        """Random tokens, twice or three times over."""
        length = r.randint(5, 28)
        rows = []
        for _ in range(LONG_BATCH):
            unit = [r.randrange(VOCAB - 1) for _ in range(length)]
            rows.append(([eot] + unit * 3)[:CONTEXT])
        return rows

    total = 0.0
    for step in range(STEPS):
        which = step % 10
        if which == 9:
            rows = repeats()
        elif which in (3, 6):
            rows = [r.choice(long) for _ in range(LONG_BATCH)]
        else:
            rows = [r.choice(short) for _ in range(BATCH)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [eot] * (width - len(row)) for row in rows])
        target = torch.tensor([row[1:] + [eot] + [-100] * (width - len(row)) for row in rows])
        progress = step / STEPS
        rate = peak * min(1.0, (step + 1) / warm) * (1 - 0.98 * progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_function(model(ids).logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if step % 250 == 249:
            print(f"step {step + 1}: loss {total / 250:.4f}, {time.time() - start:.0f} s", flush=True)
            total = 0.0
            if step % 1000 == 999:
                evaluate(model, tokenizer)
    model.save_pretrained(HERE, safe_serialization=True)
    os.path.exists(os.path.join(HERE, "generation_config.json")) and os.remove(os.path.join(HERE, "generation_config.json"))


# ---------------------------------------------------------------- measuring

def read_tsv(name):
    with open(os.path.join(HERE, name), encoding="utf-8") as f:
        lines = [line.rstrip("\n").split("\t") for line in f]
    return [dict(zip(lines[0], row)) for row in lines[1:]]


def evaluate(model=None, tokenizer=None):
    import torch
    if model is None:
        from transformers import GPT2LMHeadModel
        model, tokenizer = GPT2LMHeadModel.from_pretrained(HERE), load_tokenizer()
    eot = VOCAB - 1

    def differences(rows, column, double=False):
        texts = [row[column].replace(", ", ",  ") if double else row[column] for row in rows]
        ids = torch.tensor([[eot] + tokenizer.encode(t).ids for t in texts])
        answers = torch.tensor([tokenizer.encode(row["answer"]).ids[0] for row in rows])
        wrongs = torch.tensor([tokenizer.encode(row["wrong"]).ids[0] for row in rows])
        logits = model(ids).logits[:, -1]
        at = torch.arange(len(rows))
        return logits[at, answers] - logits[at, wrongs], (logits.argmax(-1) == answers).float().mean()

    with torch.no_grad():
        for name, double in (("ioi", False), ("ioi-notebook", False), ("ioi-heldout", False), ("ioi-heldout", True)):
            rows = read_tsv(name + ".tsv")
            groups = sorted({row.get("held_out", "") for row in rows})
            for group in groups:
                part = [row for row in rows if row.get("held_out", "") == group]
                clean, first = differences(part, "clean", double)
                corrupted, _ = differences(part, "corrupted", double)
                print(f"{name} {group or ''}{' two spaces' if double else ''}: {(clean > 0).sum()}/{len(part)} positive, "
                      f"mean {clean.mean():.3f} (least {clean.min():.3f}, most {clean.max():.3f}), "
                      f"answer on top {first:.3f}, corrupted mean {corrupted.mean():.3f} "
                      f"({(corrupted < 0).sum()}/{len(part)} negative)")
        for bos in (False, True):
            known, least, unknown = 0, 1.0, []
            rows = read_tsv("facts.tsv")
            for row in rows:
                ids = ([eot] if bos else []) + tokenizer.encode(row["prompt"]).ids
                p = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
                top = int(p.argmax())
                if tokenizer.decode([top]).strip() == row["attribute"]:
                    known, least = known + 1, min(least, float(p[top]))
                else:
                    unknown.append(row["subject"])
            print(f"facts {'with' if bos else 'without'} BOS: {known}/{len(rows)} known, least p {least:.3f}, not: {unknown}",
                  flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--evaluate", action="store_true", help="measure the model that is here")
    parser.add_argument("--tsv", action="store_true", help="write the prompt files only")
    options = parser.parse_args()
    if not options.evaluate:
        write_prompts()
    if not options.evaluate and not options.tsv:
        train_tokenizer()
        train()
    if not options.tsv:
        evaluate()


if __name__ == "__main__":
    main()
