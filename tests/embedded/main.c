/* SPDX-License-Identifier: MIT */
/* main.c - the resid_pre sweep (denoising) of one pair of prompts on a microcontroller: the model and
   the prompts lie in flash, all memory is one buffer, and there is no malloc. */
#include "board.h"
#include "patch.h"

#include <string.h>

extern const char model_bytes[], model_end[], prompts[], prompts_end[]; /* data.S */

enum { MOST_TOKENS = 32, MOST_CELLS = 256 };

/* ---- a heap in a buffer of one's own ---- */

/* Blocks lie one behind the other, each led by its size; first fit, and free neighbours become one
   when they are passed. Where nothing fits, NULL: patch_cells then takes fewer cells at a time. */
#ifndef BUFFER_BYTES
#define BUFFER_BYTES 229376 /* 224 KB */
#endif
typedef struct Block {
    uint32_t bytes, used; /* with this head; a multiple of 8 */
} Block;

typedef struct Arena {
    Block *begin, *end, *top; /* top: the highest end of a block in use so far */
    long live;
} Arena;

static uint64_t buffer[BUFFER_BYTES / 8];

static Block *behind(Block *b) {
    return (Block *)(void *)((char *)b + b->bytes);
}

static void *arena_alloc(size_t n, void *ctx) {
    Arena *a = ctx;
    Block *b;

    if (n > BUFFER_BYTES)
        return NULL;
    n = (n + sizeof *b + 7) / 8 * 8;
    for (b = a->begin; b < a->end; b = behind(b)) {
        if (b->used)
            continue;
        while (behind(b) < a->end && !behind(b)->used)
            b->bytes += behind(b)->bytes;
        if (b->bytes < n)
            continue;
        if (b->bytes > n) { /* both are multiples of 8: what is left has room for a head */
            Block *rest = (Block *)(void *)((char *)b + n);

            rest->bytes = b->bytes - (uint32_t)n;
            rest->used = 0;
            b->bytes = (uint32_t)n;
        }
        b->used = 1;
        a->live++;
        a->top = behind(b) > a->top ? behind(b) : a->top;
        return b + 1;
    }
    return NULL;
}

static void arena_free(void *p, void *ctx) {
    Arena *a = ctx;

    ((Block *)p - 1)->used = 0;
    a->live--;
}

static Arena arena_begin(void) {
    Arena a;

    a.begin = a.top = (Block *)(void *)buffer;
    a.begin->bytes = sizeof buffer;
    a.begin->used = 0;
    a.end = behind(a.begin);
    a.live = 0;
    return a;
}

/* ---- the job ---- */

/* Field number `field` of line `line` of the prompts, a TSV file that ends with a newline. */
static const char *field_at(int line, int field, size_t *n) {
    const char *p = prompts;

    for (; p < prompts_end && line > 0; p++)
        line -= *p == '\n';
    for (; p < prompts_end && field > 0; p++)
        field -= *p == '\t';
    for (*n = 0; p + *n < prompts_end && p[*n] != '\t' && p[*n] != '\n';)
        ++*n;
    return p;
}

/* The tokens of a prompt, one line of ids. */
static patch_status tokens_of(const patch_model *model, int field, int bos, int *ids, size_t most,
                              size_t *n, patch_error *e) {
    size_t bytes, i;
    const char *text = field_at(1, field, &bytes);
    const patch_status s = patch_encode(model, text, bytes, bos, ids, most, n, e);

    if (s != PATCH_OK)
        return s;
    say("tokens");
    for (i = 0; i < *n; i++)
        say(" %d", ids[i]);
    say("\n");
    return PATCH_OK;
}

static patch_status job(const patch_options *options, patch_model **model, patch_error *e) {
    static int clean[MOST_TOKENS], corrupted[MOST_TOKENS], answer[1], wrong[1];
    static patch_cell cells[MOST_CELLS];
    static double values[MOST_CELLS];
    patch_cells_options how = {0}; /* denoising, logit difference */
    patch_stats stats = {0};
    patch_example x;
    patch_shape shape;
    double unpatched[2];
    size_t n, m, one, i;
    uint32_t started = ticks(), ended;
    patch_status s;

    if ((s = patch_model_from_memory(model_bytes, (size_t)(model_end - model_bytes), options, model, e)))
        return s;
    ended = ticks();
    say("instructions load %lu\n", (unsigned long)(ended - started) * 40);
    if ((s = tokens_of(*model, 0, 1, clean, MOST_TOKENS, &n, e)) ||
        (s = tokens_of(*model, 1, 1, corrupted, MOST_TOKENS, &m, e)) ||
        (s = tokens_of(*model, 2, 0, answer, 1, &one, e)) ||
        (s = tokens_of(*model, 3, 0, wrong, 1, &one, e)) ||
        (s = patch_sweep_cells(*model, "resid_pre", (int)n, &shape, NULL, e)))
        return s;
    if (n != m || shape.n_cells > MOST_CELLS) {
        say("error: the prompts differ in length, or there are too many cells\n");
        return PATCH_E_INPUT;
    }
    x.clean = clean;
    x.corrupted = corrupted;
    x.n_tokens = (int)n;
    x.answer = answer[0];
    x.wrong = wrong[0];
    started = ticks();
    if ((s = patch_measure(*model, &x, 1, PATCH_LOGIT_DIFF, unpatched, NULL, e)))
        return s;
    ended = ticks();
    say("diff %.9f %.9f\n", unpatched[0], unpatched[1]);
    say("instructions diff %lu\n", (unsigned long)(ended - started) * 40);
    started = ticks();
    if ((s = patch_sweep_cells(*model, "resid_pre", (int)n, &shape, cells, e)) ||
        (s = patch_cells(*model, &x, 1, cells, shape.n_cells, &how, values, &stats, e)))
        return s;
    ended = ticks();
    for (i = 0; i < shape.n_cells; i++)
        say("cell %d %d %.9f\n", cells[i].layer, cells[i].pos, values[i]);
    say("instructions sweep %lu\n", (unsigned long)(ended - started) * 40);
    say("passes %lu\nflops %lu\n", (unsigned long)stats.passes, (unsigned long)stats.flops);
    return PATCH_OK;
}

int main(void) {
    Arena arena = arena_begin();
    patch_options options = patch_options_default();
    patch_model *model = NULL;
    patch_error error;
    patch_status s;

    options.allocator.alloc = arena_alloc;
    options.allocator.free = arena_free;
    options.allocator.ctx = &arena;
    s = job(&options, &model, &error);
    if (s != PATCH_OK)
        say("error: %s: %s\n", error.where, error.message);
    patch_model_free(model);
    say("buffer used %lu of %lu, not freed %ld\n",
        (unsigned long)((char *)arena.top - (char *)arena.begin), (unsigned long)sizeof buffer, arena.live);
    say("stack used %lu of %lu\n", (unsigned long)stack_used(), (unsigned long)stack_size());
    return s == PATCH_OK && arena.live == 0 ? 0 : 1;
}
