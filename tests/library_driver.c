/* SPDX-License-Identifier: MIT */
/* A program that uses patch.h as any other would: for test_library.py.

       library_driver digests MODEL HOW FOLDER    what every function gives, a line each
       library_driver failures MODEL ONLY FOLDER  every allocation of every function fails in turn; ONLY: all,
                                                  or the functions' names
       library_driver errors MODEL TEXT_MODEL PART FOLDER   wrong arguments: status, place, remedy, no leak;
                                                  PART: core, analyses or subjects
       library_driver sizes TEXT_MODEL            buffers that are too small
       library_driver threads MODEL               two threads use one model at once

   HOW is open, memory, memory4 (aligned to 4 bytes only), folded or folded-memory; FOLDER is empty and the
   program's own. What fails is printed; the last line of the other commands is "N checks, N failed", and
   the exit status 1 if any failed or none was made. */
#include "../patch.h"

#include <dirent.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long n_checks, n_failed;
static pthread_mutex_t counting = PTHREAD_MUTEX_INITIALIZER;

static int check(int ok, const char *format, ...) {
    va_list values;

    pthread_mutex_lock(&counting);
    n_checks++;
    const int quiet = ok || n_failed++ > 20;
    pthread_mutex_unlock(&counting);
    if (quiet)
        return ok;
    va_start(values, format);
    printf("FAILED: ");
    vprintf(format, values);
    printf("\n");
    va_end(values);
    return ok;
}

static void die(const char *what, const patch_error *e) {
    printf("FAILED: library_driver: %s: %s: %s\n", what, e ? e->where : "", e ? e->message : "");
    exit(3);
}

static void *room(size_t n, size_t size) {
    void *p = calloc(n ? n : 1, size);

    if (p == NULL)
        die("out of memory", NULL);
    return p;
}

/* ---- an allocator that counts, and refuses allocation number `refuse` (and all later ones) ---- */

typedef struct Heap {
    long calls, live, refuse;
    int all_later;
} Heap;

static void *heap_alloc(size_t n, void *ctx) {
    Heap *h = ctx;
    const long call = h->calls++;
    char *p;

    if (h->refuse >= 0 && (h->all_later ? call >= h->refuse : call == h->refuse))
        return NULL;
    if ((p = malloc(n + 64)) == NULL)
        return NULL;
    memset(p, 0xA5, n + 64); /* nobody may count on zeros */
    h->live++;
    return p + 64;
}

static void heap_free(void *p, void *ctx) {
    Heap *h = ctx;

    if (p == NULL) {
        check(0, "free was called with NULL");
        return;
    }
    h->live--;
    free((char *)p - 64);
}

static patch_options counted(Heap *h) {
    patch_options o = patch_options_default();

    memset(h, 0, sizeof *h);
    h->refuse = -1;
    o.allocator.alloc = heap_alloc;
    o.allocator.free = heap_free;
    o.allocator.ctx = h;
    return o;
}

/* ---- what every function gives ---- */

enum { B = 3, T = 6 };

/* A model, and a small task for it. */
typedef struct World {
    const char *path, *folder;
    unsigned char *bytes; /* of the file, at a multiple of 64 in `memory` */
    void *memory;
    char folded[4096];    /* path of the folded file */
    size_t n;
    patch_options options;
    patch_model *model;
    int tokens[2 * B][T];
    patch_example x[B];
} World;

/* The results of one function, reduced to a number. */
typedef struct Digest {
    uint64_t hash;
} Digest;

static void feed(Digest *d, const void *bytes, size_t n) {
    const unsigned char *p = bytes;
    size_t i;

    for (i = 0; i < n; i++)
        d->hash = (d->hash ^ p[i]) * UINT64_C(1099511628211);
}

static void read_bytes(World *w) {
    FILE *f = fopen(w->path, "rb");
    long size;

    if (f == NULL || fseek(f, 0, SEEK_END) != 0 || (size = ftell(f)) < 0)
        die("cannot read the model", NULL);
    rewind(f);
    w->n = (size_t)size;
    w->memory = room(w->n + 192, 1);
    w->bytes = (unsigned char *)w->memory + (64 - (uintptr_t)w->memory % 64);
    if (fread(w->bytes, 1, w->n, f) != w->n)
        die("cannot read the model", NULL);
    fclose(f);
}

static void make_task(World *w) {
    const int V = patch_model_dims(w->model)->d_vocab;
    int b, t;

    for (b = 0; b < 2 * B; b++)
        for (t = 0; t < T; t++)
            w->tokens[b][t] = (7 * t * t + 3 * (b / 2) * (t > 2) + 5 * (b % 2) * (t == 3) + 1) % V;
    for (b = 0; b < B; b++) {
        w->x[b].clean = w->tokens[2 * b];
        w->x[b].corrupted = w->tokens[2 * b + 1];
        w->x[b].n_tokens = T;
        w->x[b].answer = (11 * b + 2) % V;
        w->x[b].wrong = (5 * b + 3) % V;
    }
}

static void feed_dims(Digest *d, const patch_dims *x) {
    feed(d, x, offsetof(patch_dims, eps)); /* the ints, which lie without gaps */
    feed(d, &x->eps, sizeof x->eps);
}

/* The functions, one by one: results go into the digest. `which`: a metric or the like. */
typedef patch_status (*Action)(World *w, int which, Digest *d, patch_error *e);

static patch_status act_open(World *w, int refactor, Digest *d, patch_error *e) {
    patch_model *m = w->model; /* anything but NULL */
    patch_options o = w->options;
    patch_status s;

    o.refactor_factored_attn_matrices = refactor;
    s = patch_model_open(w->path, &o, &m, e);
    if (s == PATCH_OK)
        feed_dims(d, patch_model_dims(m));
    else
        check(m == NULL, "open: the model is not NULL after an error");
    patch_model_free(m);
    return s;
}

static patch_status act_from_memory(World *w, int which, Digest *d, patch_error *e) {
    patch_model *m = w->model;
    const patch_status s = patch_model_from_memory(w->bytes, w->n, &w->options, &m, e);

    (void)which;
    if (s == PATCH_OK)
        feed_dims(d, patch_model_dims(m));
    else
        check(m == NULL, "from memory: the model is not NULL after an error");
    patch_model_free(m);
    return s;
}

static patch_status act_verify(World *w, int which, Digest *d, patch_error *e) {
    (void)which, (void)d;
    return patch_model_verify(w->model, e);
}

static patch_status act_sha256(World *w, int which, Digest *d, patch_error *e) {
    char hex[65] = "";
    const patch_status s = patch_model_sha256(w->model, hex, e);

    (void)which;
    if (s == PATCH_OK)
        feed(d, hex, sizeof hex);
    return s;
}

static int files_in(const char *folder) {
    DIR *all = opendir(folder);
    struct dirent *entry;
    int n = 0;

    if (all == NULL)
        die("no folder", NULL);
    while ((entry = readdir(all)) != NULL)
        n += entry->d_name[0] != '.' || strlen(entry->d_name) > 2;
    closedir(all);
    return n;
}

static patch_status act_fold(World *w, int which, Digest *d, patch_error *e) {
    char path[4096], piece[4096];
    size_t n = 1;
    patch_status s;
    FILE *f;

    (void)which;
    snprintf(path, sizeof path, "%s/folded.bin", w->folder);
    s = patch_model_fold(w->model, path, e);
    check(files_in(w->folder) == (s == PATCH_OK), "fold: status %d and %d files", (int)s, files_in(w->folder));
    if (s != PATCH_OK)
        return s;
    if ((f = fopen(path, "rb")) == NULL)
        die("the folded file cannot be read", NULL);
    while ((n = fread(piece, 1, sizeof piece, f)) > 0)
        feed(d, piece, n);
    fclose(f);
    remove(path);
    return s;
}

static patch_status act_encode(World *w, int which, Digest *d, patch_error *e) {
    static const char text[] = "When John and Mary went, it's 42 naturally<|endoftext|>  \xff.";
    int ids[64];
    size_t n = 0;
    char back[64];
    patch_status s;

    (void)which;
    if (patch_token(w->model, 0, &n) == NULL)
        return PATCH_OK; /* no tokenizer */
    s = patch_encode(w->model, text, sizeof text - 1, 1, ids, 64, &n, e);
    if (s != PATCH_OK)
        return s;
    feed(d, ids, n * sizeof *ids);
    s = patch_decode(w->model, ids + 1, n - 1, back, sizeof back, &n, e);
    if (s == PATCH_OK)
        check(n == sizeof text - 1 && memcmp(back, text, n) == 0, "decode is not what was encoded");
    return s;
}

static patch_status act_execute(World *w, int which, Digest *d, patch_error *e) {
    static const float values[3] = {0.5f, -0.25f, 0.125f};
    enum { READS = 5 };
    const patch_dims *x = patch_model_dims(w->model);
    const size_t most = (size_t)(x->n_heads * T * T + T * (x->d_mlp + x->n_heads * x->d_model));
    patch_edit edits[3];
    patch_run runs[3];
    patch_read reads[READS];
    patch_stats stats;
    patch_status s;
    int i;

    (void)which;
    memset(edits, 0, sizeof edits);
    memset(reads, 0, sizeof reads);
    memset(&stats, 0, sizeof stats);
    for (i = 0; i < 3; i++) {
        runs[i].tokens = w->tokens[i];
        runs[i].n_tokens = T;
        runs[i].edits = edits;
        runs[i].n_edits = i == 2 ? 3 : 0;
        edits[i].head = edits[i].src = -1;
        edits[i].pos = 2 + i;
    }
    edits[0].hook = PATCH_Z;
    edits[0].head = 0;
    edits[0].source = 1;
    edits[1].hook = PATCH_PATTERN;
    edits[1].op = PATCH_SET;
    edits[1].head = 0;
    edits[1].src = 1;
    edits[1].values = values;
    edits[2].hook = PATCH_LN2_SCALE;
    edits[2].op = PATCH_SCALE;
    edits[2].factor = 1.5f;
    for (i = 0; i < READS; i++) {
        static const patch_hook hooks[READS] = {PATCH_LN_FINAL_NORMALIZED, PATCH_PATTERN, PATCH_MLP_POST, PATCH_RESULT,
                                                PATCH_ATTN_SCORES};

        reads[i].hook = hooks[i];
        reads[i].run = 2;
        reads[i].pos = i == 4 ? 3 : -1;
        reads[i].out = room(most, sizeof(float));
    }
    s = patch_execute(w->model, runs, 3, reads, READS, &stats, e);
    for (i = 0; i < READS; i++) {
        if (s == PATCH_OK)
            feed(d, reads[i].out, most * sizeof(float));
        free(reads[i].out);
    }
    if (s == PATCH_OK)
        feed(d, &stats.rows, 2 * sizeof stats.rows); /* and rows_shared */
    return s;
}

static patch_status act_logits(World *w, int which, Digest *d, patch_error *e) {
    const patch_dims *x = patch_model_dims(w->model);
    const size_t n = 3, C = (size_t)x->d_model, V = (size_t)x->d_vocab;
    float *rows = room(n * C, sizeof *rows), *logits = room(n * V, sizeof *logits);
    patch_status s;
    size_t i;

    (void)which;
    for (i = 0; i < n * C; i++)
        rows[i] = (float)((i * 2654435761u >> 7) % 1000) / 500.0f - 1.0f;
    s = patch_logits(w->model, rows, n, logits, e);
    if (s == PATCH_OK)
        feed(d, logits, n * V * sizeof *logits);
    free(rows);
    free(logits);
    return s;
}

static patch_status act_cache(World *w, int which, Digest *d, patch_error *e) {
    static const char *const globs[] = {"*.hook_q", "*1.attn.hook_pattern", "*hook_result", "ln_final*"};
    patch_cache *cache = (patch_cache *)(void *)w; /* anything but NULL */
    size_t needed = 0, i, k, n;
    const patch_status s = patch_run_with_cache(w->model, w->tokens[0], 2 * B, T, globs, 4, &needed, &cache, e);

    (void)which;
    if (s != PATCH_OK) {
        check(cache == NULL, "cache: not NULL after an error");
        return s;
    }
    feed(d, &needed, sizeof needed);
    for (i = 0; i < patch_cache_count(cache); i++) {
        const patch_tensor t = patch_cache_get(cache, i);

        for (k = 0, n = 1; k < (size_t)t.rank; k++)
            n *= t.shape[k];
        feed(d, t.name, strlen(t.name));
        feed(d, t.data, n * sizeof *t.data);
    }
    patch_cache_free(cache);
    return s;
}

static patch_status act_measure(World *w, int metric, Digest *d, patch_error *e) {
    double out[2 * B];
    const patch_status s = patch_measure(w->model, w->x, B, (patch_metric)metric, out, NULL, e);

    if (s == PATCH_OK)
        feed(d, out, sizeof out);
    return s;
}

/* The cells of a sweep but the first two: brute ones of one example, 2 of them. */
static patch_status sweep(World *w, const char *name, patch_metric metric, int brute, Digest *d, patch_error *e) {
    const size_t n = brute ? 1 : B;
    patch_cells_options o;
    patch_shape shape;
    patch_cell *cells;
    double *values;
    patch_status s = patch_sweep_cells(w->model, name, T, &shape, NULL, e);

    if (s != PATCH_OK)
        return s;
    cells = room(shape.n_cells, sizeof *cells);
    values = room(n * shape.n_cells, sizeof *values);
    memset(&o, 0, sizeof o);
    o.metric = metric;
    o.brute = brute;
    o.first = 2;
    o.count = brute ? 2 : 0;
    s = patch_sweep_cells(w->model, name, T, &shape, cells, e);
    if (s == PATCH_OK)
        s = patch_cells(w->model, w->x, n, cells, shape.n_cells, &o, values, NULL, e);
    if (s == PATCH_OK)
        feed(d, values, n * shape.n_cells * sizeof *values);
    free(cells);
    free(values);
    return s;
}

static patch_status act_cells(World *w, int metric, Digest *d, patch_error *e) {
    return sweep(w, "attn_head_v_by_pos", (patch_metric)metric, 0, d, e);
}

static patch_status act_brute(World *w, int metric, Digest *d, patch_error *e) {
    return sweep(w, "attn_head_pattern_by_pos", (patch_metric)metric, 1, d, e);
}

static patch_status act_sigma(World *w, int noise, Digest *d, patch_error *e) {
    double sigma = 0;
    const patch_status s = patch_trace_sigma(w->model, w->tokens[0], T, noise, &sigma, e);

    if (s == PATCH_OK)
        feed(d, &sigma, sizeof sigma);
    return s;
}

static patch_status act_trace(World *w, int kinds, Digest *d, patch_error *e) {
    const size_t n = 3 * T * (size_t)patch_model_dims(w->model)->n_layers;
    double high = 0, low = 0, *cells = room(n, sizeof *cells);
    patch_trace_options o;
    patch_fact fact;
    patch_status s;

    memset(&o, 0, sizeof o);
    o.samples = 2;
    o.window = 2;
    o.kinds = kinds;
    o.severed = kinds != 1;
    o.sigma = 0.5;
    o.metric = PATCH_PROB;
    fact.tokens = w->tokens[0];
    fact.n_tokens = T;
    fact.begin = 1;
    fact.end = 3;
    fact.answer = 1;
    s = patch_trace(w->model, &fact, &o, &high, &low, cells, NULL, e);
    if (s == PATCH_OK) {
        feed(d, cells, n * sizeof *cells);
        feed(d, &high, sizeof high);
        feed(d, &low, sizeof low);
    }
    free(cells);
    return s;
}

/* KEEP and a way: everything but a set is ablated, at positions of each example's own. */
enum { KEEP = 8 };

static patch_status act_ablate(World *w, int by, Digest *d, patch_error *e) {
    static const int partner[B] = {1, 2, 0}, positions[2 * B] = {T - 1, 2, 3, -1, 0, 4};
    enum { CELLS = 4 };
    const size_t sets[] = {0, 1, 4};
    patch_cell cells[CELLS];
    patch_ablation o;
    double values[2 * B], unpatched[B];
    patch_status s;
    int i;

    memset(&o, 0, sizeof o);
    memset(cells, 0, sizeof cells);
    for (i = 0; i < CELLS; i++) {
        cells[i].hook = PATCH_Z;
        cells[i].pos = i - 1;
        cells[i].src = -1;
    }
    o.by = (patch_by)(by % KEEP);
    o.n_groups = 1;
    o.partner = partner;
    o.noise = 1;
    o.seed = 4;
    o.keep = by >= KEEP;
    o.positions = o.keep ? positions : NULL;
    o.n_positions = o.keep ? 2 : 0;
    s = patch_ablate(w->model, w->x, B, cells, sets, 2, &o, values, unpatched, NULL, e);
    if (s == PATCH_OK) {
        feed(d, values, sizeof values);
        feed(d, unpatched, sizeof unpatched);
    }
    return s;
}

static patch_status act_paths(World *w, int receivers, Digest *d, patch_error *e) {
    const patch_dims *x = patch_model_dims(w->model);
    const size_t n = B * (size_t)(x->n_layers * x->n_heads);
    double *values = room(n, sizeof *values), unpatched[2 * B];
    patch_path_options o;
    patch_cell receiver;
    patch_status s;

    memset(&o, 0, sizeof o);
    memset(&receiver, 0, sizeof receiver);
    receiver.hook = PATCH_K;
    receiver.layer = x->n_layers - 1;
    receiver.pos = receiver.src = -1;
    o.receivers = &receiver;
    o.n_receivers = (size_t)receivers;
    o.freeze_mlps = receivers;
    s = patch_paths(w->model, w->x, B, &o, values, unpatched, NULL, e);
    if (s == PATCH_OK) {
        feed(d, values, n * sizeof *values);
        feed(d, unpatched, sizeof unpatched);
    }
    free(values);
    return s;
}

static patch_status act_lens(World *w, int which, Digest *d, patch_error *e) {
    const patch_dims *x = patch_model_dims(w->model);
    const size_t L = (size_t)x->n_layers, H = (size_t)x->n_heads, n = B * (3 * (2 * L + 2) + L * H + 1 + 2);
    double *all = room(n, sizeof *all);
    patch_lens out;
    patch_status s;

    (void)which;
    out.accumulated = all;
    out.lens = out.accumulated + B * (2 * L + 1);
    out.layers = out.lens + B * (2 * L + 1);
    out.heads = out.layers + B * (2 * L + 2);
    out.bias = out.heads + B * (L * H + 1);
    out.logit_diff = out.bias + B;
    s = patch_logit_lens(w->model, w->x, B, &out, e);
    if (s == PATCH_OK)
        feed(d, all, n * sizeof *all);
    free(all);
    return s;
}

static patch_status act_heads(World *w, int which, Digest *d, patch_error *e) {
    const patch_dims *x = patch_model_dims(w->model);
    const size_t n = 3 * (size_t)(x->n_layers * x->n_heads);
    double *scores = room(n, sizeof *scores);
    const patch_status s = patch_head_kinds(w->model, w->tokens[1], T, scores, e);

    (void)which;
    if (s == PATCH_OK)
        feed(d, scores, n * sizeof *scores);
    free(scores);
    return s;
}

static patch_status act_copying(World *w, int which, Digest *d, patch_error *e) {
    const patch_dims *x = patch_model_dims(w->model);
    const size_t n = (size_t)(x->n_layers * x->n_heads);
    double *scores = room(2 * n, sizeof *scores);
    const patch_status s = patch_copying_scores(w->model, w->tokens[0], T, scores, scores + n, e);

    (void)which;
    if (s == PATCH_OK)
        feed(d, scores, 2 * n * sizeof *scores);
    free(scores);
    return s;
}

static const struct {
    const char *name;
    Action act;
    int which;
    int retries; /* it may go on with less memory, in smaller groups: then to the same end */
    int of_file; /* it depends on more than the weights */
    int alone;   /* it writes files or takes long: not for two threads */
} actions[] = {
    {"open", act_open, 0, 0, 1, 0},
    {"open, refactored", act_open, 1, 0, 1, 1},
    {"from memory", act_from_memory, 0, 0, 1, 0},
    {"verify", act_verify, 0, 0, 1, 0},
    {"sha256", act_sha256, 0, 0, 1, 0},
    {"fold", act_fold, 0, 0, 1, 1},
    {"encode", act_encode, 0, 0, 0, 0},
    {"execute", act_execute, 0, 0, 0, 0},
    {"logits", act_logits, 0, 0, 0, 0},
    {"cache", act_cache, 0, 0, 0, 0},
    {"measure logit_diff", act_measure, PATCH_LOGIT_DIFF, 1, 0, 0},
    {"measure rank", act_measure, PATCH_RANK, 1, 0, 0},
    {"cells logit_diff", act_cells, PATCH_LOGIT_DIFF, 1, 0, 0},
    {"cells kl", act_cells, PATCH_KL, 1, 0, 0},
    {"brute logprob", act_brute, PATCH_LOGPROB, 0, 0, 0},
    {"trace sigma", act_sigma, 3, 0, 0, 0},
    {"trace resid", act_trace, 1, 1, 0, 0},
    {"trace mlp, severed", act_trace, 2, 1, 0, 0},
    {"ablate zero", act_ablate, PATCH_BY_ZERO, 1, 0, 0},
    {"ablate mean", act_ablate, PATCH_BY_MEAN, 1, 0, 0},
    {"ablate resample", act_ablate, PATCH_BY_RESAMPLE, 1, 0, 0},
    {"ablate noise", act_ablate, PATCH_BY_NOISE, 1, 0, 0},
    {"ablate all but, mean", act_ablate, KEEP + PATCH_BY_MEAN, 1, 0, 0},
    {"ablate all but, resample", act_ablate, KEEP + PATCH_BY_RESAMPLE, 1, 0, 0},
    {"paths to the end", act_paths, 0, 1, 0, 0},
    {"paths to a head", act_paths, 1, 1, 0, 0},
    {"lens", act_lens, 0, 0, 0, 0},
    {"heads", act_heads, 0, 0, 0, 0},
    {"copying", act_copying, 0, 0, 0, 0},
};

enum { ACTIONS = sizeof actions / sizeof actions[0] };

static uint64_t digest_of(World *w, int action) {
    Digest d = {UINT64_C(14695981039346656037)};
    patch_error e;

    if (actions[action].act(w, actions[action].which, &d, &e) != PATCH_OK)
        die(actions[action].name, &e);
    return d.hash;
}

static patch_model *open_as(World *w, const char *how, patch_error *e) {
    patch_model *m = NULL;
    patch_status s;
    const size_t shift = strcmp(how, "memory4") == 0 ? 4 : 0;

    if (strncmp(how, "folded", 6) == 0) {
        snprintf(w->folded, sizeof w->folded, "%s/for-%s.bin", w->folder, how);
        if (patch_model_open(w->path, &w->options, &m, e) || patch_model_fold(m, w->folded, e))
            die(how, e);
        patch_model_free(m);
        w->path = w->folded;
    }
    read_bytes(w);
    memmove(w->bytes + shift, w->bytes, w->n);
    s = strstr(how, "memory") ? patch_model_from_memory(w->bytes + shift, w->n, &w->options, &m, e)
                              : patch_model_open(w->path, &w->options, &m, e);
    if (s != PATCH_OK)
        die(how, e);
    return m;
}

/* "name digest" lines, for the other ways of opening a model to be compared with. */
static void command_digests(World *w, const char *how) {
    Heap heap;
    patch_error e;
    int i;

    w->options = counted(&heap);
    w->model = open_as(w, how, &e);
    make_task(w);
    for (i = 0; i < ACTIONS; i++)
        if (!actions[i].of_file)
            printf("%s: %016llx\n", actions[i].name, (unsigned long long)digest_of(w, i));
    patch_model_free(w->model);
    if (strncmp(how, "folded", 6) == 0)
        remove(w->path);
    if (heap.live != 0)
        die("a leak", NULL);
}

/* ---- allocations that fail ---- */

/* An error says what and where, and what to do. */
static int whole_error(const patch_error *e, patch_status s) {
    return e->code == s && e->where[0] != 0 && strstr(e->message, "; ") != NULL;
}

/* Allocation number `refuse` of an action fails; 1 when it has no such allocation any more. */
static int failing_once(World *w, Heap *heap, int action, long refuse, int all_later, uint64_t want) {
    Digest d = {UINT64_C(14695981039346656037)};
    const char *name = actions[action].name;
    const long live = heap->live;
    patch_error e;
    patch_status s;
    int reached;

    memset(&e, 0, sizeof e);
    heap->calls = 0;
    heap->refuse = refuse;
    heap->all_later = all_later;
    s = actions[action].act(w, actions[action].which, &d, &e);
    reached = heap->calls > refuse;
    heap->refuse = -1;
    check(heap->live == live, "%s, allocation %ld: %ld leaked", name, refuse, heap->live - live);
    if (s == PATCH_OK) {
        check(!reached || (actions[action].retries && !all_later), "%s, allocation %ld failed: no error", name, refuse);
        check(d.hash == want, "%s, allocation %ld failed: other results", name, refuse);
    } else {
        check(reached, "%s: an error without a failed allocation: %s: %s", name, e.where, e.message);
#ifdef PATCH_NO_MMAP /* a weight that cannot be read and one for which there is no room are told alike */
        check(s == PATCH_E_MEMORY || (s == PATCH_E_IO && whole_error(&e, s)), "%s, allocation %ld: status %d", name,
              refuse, (int)s);
#else
        check(s == PATCH_E_MEMORY && whole_error(&e, s), "%s, allocation %ld: status %d, \"%s: %s\"", name, refuse,
              (int)s, e.where, e.message);
#endif
    }
    return !reached;
}

static void command_failures(World *w, const char *only) {
    Heap heap;
    patch_error e;
    int action, all_later;

    w->options = counted(&heap);
    w->model = open_as(w, "open", &e);
    make_task(w);
    for (action = 0; action < ACTIONS; action++) {
        const int wanted = strcmp(only, "all") == 0 || strstr(only, actions[action].name) != NULL;
        const uint64_t want = wanted ? digest_of(w, action) : 0;

        if (!wanted)
            continue;
        for (all_later = 0; all_later < 2; all_later++) {
            long refuse = 0;

            while (!failing_once(w, &heap, action, refuse, all_later, want) && refuse < 100000)
                refuse++;
            check(refuse < 100000, "%s never ends", actions[action].name);
            if (all_later)
                printf("%s: %ld allocations\n", actions[action].name, refuse);
        }
        check(digest_of(w, action) == want, "%s: other results afterwards", actions[action].name);
    }
    patch_model_free(w->model);
    check(heap.live == 0, "%ld allocations leaked", heap.live);
}

/* ---- wrong arguments ---- */

static Heap errors_heap;

/* A call failed as it should, told why, and kept no memory. */
static void refused(const char *what, patch_status got, patch_status want, const patch_error *e, long live) {
    check(got == want && whole_error(e, want), "%s: status %d, not %d; \"%s: %s\"", what, (int)got, (int)want, e->where,
          e->message);
    check(errors_heap.live == live, "%s: %ld allocations leaked", what, errors_heap.live - live);
}

#define REFUSED(what, call, want)                                                                  \
    do {                                                                                           \
        const long live = errors_heap.live;                                                        \
        patch_error e = {PATCH_OK, "", ""}, *error = &e;                                           \
        patch_status got = (call);                                                                 \
                                                                                                   \
        refused(what, got, want, &e, live);                                                        \
        error = NULL;                                                                              \
        got = (call);                                                                              \
        check(got == (want), "%s: status %d where no error is wanted", what, (int)got);            \
    } while (0)

static void wrong_files(World *w) {
    char path[4096];
    patch_model *m = NULL;
    FILE *f;
    size_t n;

    REFUSED("no file", patch_model_open("no/such/file.bin", &w->options, &m, error), PATCH_E_IO);
    REFUSED("a folder", patch_model_open(w->folder, &w->options, &m, error), PATCH_E_IO);
    snprintf(path, sizeof path, "%s/wrong.bin", w->folder);
    if ((f = fopen(path, "wb")) == NULL)
        die("cannot write", NULL);
    fclose(f);
    REFUSED("an empty file", patch_model_open(path, &w->options, &m, error), PATCH_E_IO);
    if ((f = fopen(path, "wb")) == NULL)
        die("cannot write", NULL);
    fwrite("ACTPATCH", 1, 8, f);
    fclose(f);
    REFUSED("eight bytes", patch_model_open(path, &w->options, &m, error), PATCH_E_FORMAT);
    remove(path);
    for (n = 1; n < w->n; n += n < 400 ? 7 : n / 3) { /* cut short, at bytes of their own */
        unsigned char *copy = malloc(n);

        if (copy == NULL)
            die("out of memory", NULL);
        memcpy(copy, w->bytes, n);
        REFUSED("cut short", patch_model_from_memory(copy, n, &w->options, &m, error), PATCH_E_FORMAT);
        free(copy);
    }
    REFUSED("no bytes", patch_model_from_memory(NULL, w->n, &w->options, &m, error), PATCH_E_INPUT);
    REFUSED("not aligned", patch_model_from_memory(w->bytes + 1, w->n - 1, &w->options, &m, error), PATCH_E_USAGE);
    for (n = 0; n < 128; n++) { /* one bit of the head */
        w->bytes[n] ^= 1;
        REFUSED("another head", patch_model_from_memory(w->bytes, w->n, &w->options, &m, error), PATCH_E_FORMAT);
        w->bytes[n] ^= 1;
    }
    check(m == NULL, "the model is not NULL after all those errors");
    w->bytes[w->n - 5] ^= 16; /* a weight: found by verify alone */
    if (patch_model_from_memory(w->bytes, w->n, &w->options, &m, NULL) != PATCH_OK)
        die("a changed weight", NULL);
    REFUSED("a changed weight", patch_model_verify(m, error), PATCH_E_FORMAT);
    w->bytes[w->n - 5] ^= 16;
    check(patch_model_verify(m, NULL) == PATCH_OK, "the file as it was does not verify");
    patch_model_free(m);
    patch_model_free(NULL);
    patch_cache_free(NULL);
}

static void wrong_tokens(const char *text_model, World *w) {
    patch_model *m = NULL;
    int ids[8] = {1, 2, -1, 4};
    char text[64];
    size_t n = 99;

    REFUSED("no tokenizer", patch_encode(w->model, "a", 1, 0, ids, 8, &n, error), PATCH_E_INPUT);
    REFUSED("no tokenizer to decode", patch_decode(w->model, ids, 1, text, 64, &n, error), PATCH_E_INPUT);
    check(patch_token(w->model, 0, &n) == NULL && n == 0, "a token without a tokenizer");
    if (patch_model_open(text_model, &w->options, &m, NULL) != PATCH_OK)
        die("the model with a tokenizer", NULL);
    REFUSED("id -1", patch_decode(m, ids, 3, text, 64, &n, error), PATCH_E_INPUT);
    ids[2] = patch_model_dims(m)->d_vocab;
    REFUSED("id d_vocab", patch_decode(m, ids, 3, text, 64, &n, error), PATCH_E_INPUT);
    check(patch_token(m, -1, &n) == NULL && n == 0 && patch_token(m, ids[2], &n) == NULL && n == 0,
          "a token of no id");
    patch_model_free(m);
}

static void wrong_cells(World *w) {
    static const char *const globs[] = {"*", "no_such_hook"};
    const patch_dims *d = patch_model_dims(w->model);
    patch_cell cells[2];
    patch_cells_options o;
    patch_example x = w->x[0];
    patch_shape shape;
    patch_cache *cache = NULL;
    double values[8], out[8];
    size_t needed;

    memset(cells, 0, sizeof cells);
    memset(&o, 0, sizeof o);
    cells[0].hook = cells[1].hook = PATCH_Q;
    cells[0].src = cells[1].src = -1;
    REFUSED("metric 6", patch_measure(w->model, &x, 1, (patch_metric)6, out, NULL, error), PATCH_E_USAGE);
    REFUSED("metric -1", patch_measure(w->model, &x, 1, (patch_metric)-1, out, NULL, error), PATCH_E_USAGE);
#define WITH(field, value, what)                                                                                      \
    do {                                                                                                              \
        const patch_example kept = x;                                                                                 \
                                                                                                                      \
        x.field = value;                                                                                              \
        REFUSED(what, patch_measure(w->model, &x, 1, PATCH_LOGIT_DIFF, out, NULL, error), PATCH_E_INPUT);             \
        REFUSED(what, patch_cells(w->model, &x, 1, cells, 2, &o, values, NULL, error), PATCH_E_INPUT);                \
        x = kept;                                                                                                     \
    } while (0)
    WITH(answer, -1, "answer -1");
    WITH(answer, d->d_vocab, "answer d_vocab");
    WITH(wrong, d->d_vocab, "wrong d_vocab");
    WITH(n_tokens, 0, "no tokens");
    WITH(n_tokens, d->n_ctx + 1, "n_ctx + 1 tokens");
    WITH(clean, NULL, "no clean prompt");
    x.corrupted = NULL;
    REFUSED("no corrupted prompt", patch_cells(w->model, &x, 1, cells, 2, &o, values, NULL, error), PATCH_E_INPUT);
    check(patch_measure(w->model, &x, 1, PATCH_LOGIT_DIFF, out, NULL, NULL) == PATCH_OK && out[0] == out[0] &&
              out[1] != out[1], "without a corrupted prompt: %g and %g", out[0], out[1]);
    x = w->x[0];
    cells[1].head = d->n_heads;
    REFUSED("head n_heads", patch_cells(w->model, &x, 1, cells, 2, &o, values, NULL, error), PATCH_E_INPUT);
    cells[1].head = 0;
    cells[1].layer = d->n_layers;
    REFUSED("layer n_layers", patch_cells(w->model, &x, 1, cells, 2, &o, values, NULL, error), PATCH_E_INPUT);
    o.brute = 1;
    REFUSED("layer n_layers, brute", patch_cells(w->model, &x, 1, cells, 2, &o, values, NULL, error), PATCH_E_INPUT);
    check(patch_measure(w->model, NULL, 0, PATCH_KL, out, NULL, NULL) == PATCH_OK, "no examples are an error");
    REFUSED("an unknown sweep", patch_sweep_cells(w->model, "resid", T, &shape, NULL, error), PATCH_E_USAGE);
    REFUSED("a sweep over no tokens", patch_sweep_cells(w->model, "resid_pre", 0, &shape, NULL, error),
            PATCH_E_INPUT);
    REFUSED("a sweep over INT_MAX tokens",
            patch_sweep_cells(w->model, "attn_head_pattern_dest_src_pos", INT_MAX, &shape, NULL, error),
            PATCH_E_INPUT);
    x.n_tokens = INT_MIN;
    REFUSED("INT_MIN tokens", patch_measure(w->model, &x, 1, PATCH_LOGIT, values, NULL, error), PATCH_E_INPUT);
    x.n_tokens = w->x[0].n_tokens;
    REFUSED("a glob that matches nothing",
            patch_run_with_cache(w->model, w->tokens[0], 1, T, globs, 2, NULL, &cache, error), PATCH_E_INPUT);
    check(cache == NULL, "a cache after an error");
    REFUSED("no prompts", patch_run_with_cache(w->model, w->tokens[0], 0, T, globs, 1, NULL, &cache, error),
            PATCH_E_INPUT);
    REFUSED("n_ctx + 1 tokens", patch_run_with_cache(w->model, w->tokens[0], 1, (size_t)d->n_ctx + 1, globs, 1, NULL,
                                                     &cache, error), PATCH_E_INPUT);
    check(patch_run_with_cache(w->model, NULL, 1, T, globs, 1, &needed, NULL, NULL) == PATCH_OK && needed > 0,
          "asking for the size alone");
}

static void wrong_analyses(World *w) {
    const patch_dims *d = patch_model_dims(w->model);
    const size_t sets[] = {0, 1};
    double a, b, cells[256], values[64];
    patch_trace_options o;
    patch_ablation by;
    patch_fact fact;
    patch_cell cell;
    int partner[B] = {1, 2, 3}, positions[2 * B] = {0, -1, T - 1, T, 2, 2}, names[2] = {1, 0};

    memset(&o, 0, sizeof o);
    memset(&by, 0, sizeof by);
    memset(&cell, 0, sizeof cell);
    o.samples = 2;
    o.window = 1;
    o.kinds = 1;
    o.metric = PATCH_PROB;
    fact.tokens = w->tokens[0];
    fact.n_tokens = T;
    fact.begin = 1;
    fact.end = 2;
    fact.answer = 1;
    REFUSED("the noise of no tokens", patch_trace_sigma(w->model, w->tokens[0], 0, 3, &a, error), PATCH_E_INPUT);
    fact.answer = d->d_vocab;
    REFUSED("answer d_vocab", patch_trace(w->model, &fact, &o, &a, &b, cells, NULL, error), PATCH_E_INPUT);
    fact.answer = 1;
    fact.end = T + 1;
    REFUSED("a subject behind the end", patch_trace(w->model, &fact, &o, &a, &b, cells, NULL, error), PATCH_E_INPUT);
    fact.end = 1;
    REFUSED("a subject of no tokens", patch_trace(w->model, &fact, &o, &a, &b, cells, NULL, error), PATCH_E_INPUT);
    fact.end = 2;
    o.samples = 0;
    REFUSED("no samples", patch_trace(w->model, &fact, &o, &a, &b, cells, NULL, error), PATCH_E_INPUT);
    cell.hook = PATCH_Z;
    cell.src = -1;
    by.n_groups = 1;
    by.by = (patch_by)(PATCH_BY_NOISE + 1);
    REFUSED("way 4", patch_ablate(w->model, w->x, B, &cell, sets, 1, &by, values, NULL, NULL, error), PATCH_E_USAGE);
    by.by = (patch_by)-1;
    REFUSED("way -1", patch_ablate(w->model, w->x, B, &cell, sets, 1, &by, values, NULL, NULL, error), PATCH_E_USAGE);
    by.by = PATCH_BY_RESAMPLE;
    by.partner = partner;
    REFUSED("a partner that is none", patch_ablate(w->model, w->x, B, &cell, sets, 1, &by, values, NULL, NULL, error),
            PATCH_E_INPUT);
    by.partner = NULL;
    REFUSED("no partners", patch_ablate(w->model, w->x, B, &cell, sets, 1, &by, values, NULL, NULL, error),
            PATCH_E_INPUT);
    by.by = PATCH_BY_ZERO;
    by.positions = positions;
    by.n_positions = 2;
    REFUSED("ablating position T", patch_ablate(w->model, w->x, B, &cell, sets, 1, &by, values, NULL, NULL, error),
            PATCH_E_INPUT);
    by.positions = NULL;
    REFUSED("no positions", patch_ablate(w->model, w->x, B, &cell, sets, 1, &by, values, NULL, NULL, error),
            PATCH_E_INPUT);
    by.n_positions = 0;
    by.keep = 1;
    cell.head = -1;
    REFUSED("keeping all heads", patch_ablate(w->model, w->x, B, &cell, sets, 1, &by, values, NULL, NULL, error),
            PATCH_E_INPUT);
    cell.head = 0;
    cell.hook = PATCH_Q;
    REFUSED("keeping q", patch_ablate(w->model, w->x, B, &cell, sets, 1, &by, values, NULL, NULL, error),
            PATCH_E_INPUT);
    by.keep = 0;
    cell.hook = PATCH_PATTERN;
    REFUSED("ablating a pattern", patch_ablate(w->model, w->x, B, &cell, sets, 1, &by, values, NULL, NULL, error),
            PATCH_E_USAGE);
    w->x[1].n_tokens = T - 1;
    by.by = PATCH_BY_ZERO;
    cell.hook = PATCH_Z;
    REFUSED("ablating prompts of two lengths",
            patch_ablate(w->model, w->x, B, &cell, sets, 1, &by, values, NULL, NULL, error), PATCH_E_INPUT);
    w->x[1].n_tokens = T;
    REFUSED("heads of no tokens", patch_head_kinds(w->model, w->tokens[0], 0, values, error), PATCH_E_INPUT);
    REFUSED("heads of many tokens", patch_head_kinds(w->model, w->tokens[0], INT_MAX, values, error), PATCH_E_INPUT);
    REFUSED("copying no names", patch_copying_scores(w->model, names, 0, values, cells, error), PATCH_E_INPUT);
    names[1] = d->d_vocab;
    REFUSED("copying d_vocab", patch_copying_scores(w->model, names, 2, values, cells, error), PATCH_E_INPUT);
}

/* Ids that are none of the model's, where they are looked up before anything is run. */
static void wrong_subjects(World *w) {
    const int ids[T] = {1, 1 << 30, -1, 1, 1, 1};
    double a, b, cells[256];
    patch_trace_options o;
    patch_fact fact;

    memset(&o, 0, sizeof o);
    o.samples = o.window = o.kinds = 1;
    fact.tokens = ids;
    fact.n_tokens = T;
    fact.begin = 1;
    fact.end = 2;
    fact.answer = 1;
    REFUSED("the noise of ids out of range", patch_trace_sigma(w->model, ids, T, 3, &a, error), PATCH_E_INPUT);
    REFUSED("a subject out of range", patch_trace(w->model, &fact, &o, &a, &b, cells, NULL, error), PATCH_E_INPUT);
}

static void command_errors(World *w, const char *text_model, const char *part) {
    patch_error e;

    w->options = counted(&errors_heap);
    w->model = open_as(w, "open", &e);
    make_task(w);
    if (strcmp(part, "subjects") == 0) {
        wrong_subjects(w);
    } else if (strcmp(part, "analyses") == 0) {
        wrong_analyses(w);
    } else {
        wrong_files(w);
        wrong_tokens(text_model, w);
        wrong_cells(w);
    }
    patch_model_free(w->model);
    check(errors_heap.live == 0, "%ld allocations leaked", errors_heap.live);
}

/* ---- buffers that are too small ---- */

static void command_sizes(World *w) {
    static const char text[] = "Mary gave<|endoftext|> it\xfe to John, John";
    const size_t length = sizeof text - 1;
    int whole[64], ids[65], bos, id, layer;
    size_t all = 0, n, capacity, i, bytes;
    char back[128], name[128], shorter[128];
    patch_error e;

    w->model = open_as(w, "open", &e);
    for (bos = 0; bos < 2; bos++) {
        if (patch_encode(w->model, text, length, bos, whole, 64, &all, &e) != PATCH_OK)
            die("encode", &e);
        check(all > 5 && all <= length + 1, "encode: %lu ids", (unsigned long)all);
        for (capacity = 0; capacity <= all + 1; capacity++) {
            const patch_status want = capacity < all ? PATCH_E_SIZE : PATCH_OK;
            patch_status s;

            for (i = 0; i < 65; i++)
                ids[i] = -7;
            n = 0;
            s = patch_encode(w->model, text, length, bos, capacity ? ids : NULL, capacity, &n, &e);
            check(s == want && n == all, "room for %lu of %lu ids: status %d, %lu needed", (unsigned long)capacity,
                  (unsigned long)all, (int)s, (unsigned long)n);
            check(want == PATCH_OK || whole_error(&e, want), "room for %lu ids: \"%s: %s\"", (unsigned long)capacity,
                  e.where, e.message);
            for (i = 0; i < 65; i++)
                check(i < all && i < capacity ? ids[i] == whole[i] || want == PATCH_E_SIZE : ids[i] == -7,
                      "room for %lu ids: id %lu is %d", (unsigned long)capacity, (unsigned long)i, ids[i]);
        }
    }
    bytes = all;
    check(patch_decode(w->model, whole + 1, all - 1, back, sizeof back, &bytes, &e) == PATCH_OK && bytes == length &&
              memcmp(back, text, length) == 0, "decode: %lu bytes", (unsigned long)bytes);
    for (capacity = 0; capacity <= length; capacity++) {
        const patch_status want = capacity < length ? PATCH_E_SIZE : PATCH_OK;
        patch_status s;

        memset(back, 7, sizeof back);
        s = patch_decode(w->model, whole + 1, all - 1, back, capacity, &n, &e);
        check(s == want && n == length, "room for %lu bytes: status %d, %lu needed", (unsigned long)capacity, (int)s,
              (unsigned long)n);
        for (i = capacity; i < sizeof back; i++)
            check(back[i] == 7, "room for %lu bytes: byte %lu was written", (unsigned long)capacity, (unsigned long)i);
    }
    for (id = 0; id < patch_model_dims(w->model)->d_vocab; id++) {
        const char *token = patch_token(w->model, id, &n);

        if (token == NULL)
            continue;
        check(patch_decode(w->model, &id, 1, back, sizeof back, &bytes, &e) == PATCH_OK && bytes == n &&
                  memcmp(back, token, n) == 0, "token %d is not what it decodes to", id);
    }
    for (id = -1; id <= PATCH_N_HOOKS; id++)
        for (layer = 0; layer < 130; layer += 1 + layer * 2) {
            const int whole_length = patch_hook_name((patch_hook)id, layer, name, sizeof name);

            check(whole_length == (int)strlen(name) && (whole_length > 0) == (id >= 0 && id < PATCH_N_HOOKS),
                  "hook %d: \"%s\", %d", id, name, whole_length);
            check(patch_hook_name((patch_hook)id, layer, NULL, 0) == whole_length, "hook %d: no room, another length",
                  id);
            for (n = 1; n < 12; n++) {
                memset(shorter, 7, sizeof shorter);
                check(patch_hook_name((patch_hook)id, layer, shorter, n) == whole_length,
                      "hook %d in %lu bytes: another length", id, (unsigned long)n);
                check(strlen(shorter) < n && strncmp(shorter, name, n - 1) == 0 && shorter[n] == 7,
                      "hook %d in %lu bytes: \"%s\"", id, (unsigned long)n, shorter);
            }
        }
    for (i = 0; patch_sweep_name(i) != NULL; i++) {
        patch_shape shape, again;
        size_t product = 1;
        patch_cell *cells;

        if (patch_sweep_cells(w->model, patch_sweep_name(i), 5, &shape, NULL, &e) != PATCH_OK)
            die(patch_sweep_name(i), &e);
        for (n = 0; n < (size_t)shape.rank; n++)
            product *= shape.size[n];
        check(product == shape.n_cells && product > 0, "%s: %lu cells", patch_sweep_name(i),
              (unsigned long)shape.n_cells);
        cells = room(shape.n_cells + 1, sizeof *cells);
        cells[shape.n_cells].layer = -7;
        if (patch_sweep_cells(w->model, patch_sweep_name(i), 5, &again, cells, &e) != PATCH_OK)
            die(patch_sweep_name(i), &e);
        check(again.n_cells == shape.n_cells && cells[shape.n_cells].layer == -7, "%s: written behind the end",
              patch_sweep_name(i));
        free(cells);
    }
    check(i == 19 && patch_sweep_name(i + 1) == NULL, "%lu sweeps", (unsigned long)i);
    patch_model_free(w->model);
}

/* ---- two threads ---- */

typedef struct Worker {
    World *w;
    const uint64_t *want;
    int first; /* where in the list it begins */
    long wrong;
} Worker;

static void *work(void *ctx) {
    Worker *me = ctx;
    int round, i;

    for (round = 0; round < 3; round++)
        for (i = 0; i < ACTIONS; i++) {
            const int action = (i + me->first) % ACTIONS;
            Digest d = {UINT64_C(14695981039346656037)};
            patch_error e;

            if (!actions[action].alone)
                me->wrong += actions[action].act(me->w, actions[action].which, &d, &e) != PATCH_OK ||
                             d.hash != me->want[action];
        }
    return NULL;
}

static void command_threads(World *w) {
    uint64_t want[ACTIONS];
    Worker workers[2];
    pthread_t threads[2];
    patch_error e;
    int i;

    w->options = patch_options_default();
    w->options.threads = 2;
    w->model = open_as(w, "open", &e);
    make_task(w);
    for (i = 0; i < ACTIONS; i++)
        want[i] = actions[i].alone ? 0 : digest_of(w, i);
    for (i = 0; i < 2; i++) {
        workers[i].w = w;
        workers[i].want = want;
        workers[i].first = i * 5;
        workers[i].wrong = 0;
        if (pthread_create(&threads[i], NULL, work, &workers[i]) != 0)
            die("no thread", NULL);
    }
    for (i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
        check(workers[i].wrong == 0, "thread %d: %ld results differ", i, workers[i].wrong);
    }
    patch_model_free(w->model);
}

int main(int argc, char **argv) {
    const char *command = argc > 2 ? argv[1] : "";
    World w;

    memset(&w, 0, sizeof w);
    w.options = patch_options_default();
    w.path = argc > 2 ? argv[2] : NULL;
    w.folder = argc > 3 ? argv[argc - 1] : ".";
    if (strcmp(command, "digests") == 0 && argc == 5) {
        command_digests(&w, argv[3]);
        free(w.memory);
        return 0;
    }
    if (strcmp(command, "failures") == 0 && argc == 5)
        command_failures(&w, argv[3]);
    else if (strcmp(command, "errors") == 0 && argc == 6)
        command_errors(&w, argv[3], argv[4]);
    else if (strcmp(command, "sizes") == 0)
        command_sizes(&w);
    else if (strcmp(command, "threads") == 0)
        command_threads(&w);
    free(w.memory);
    printf("%ld checks, %ld failed\n", n_checks, n_failed);
    return n_failed || !n_checks ? 1 : 0;
}
