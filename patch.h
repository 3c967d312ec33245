/* SPDX-License-Identifier: MIT */
/* patch.h - activation patching for GPT-2: the library that patch.c implements.

   A whole program (tests/test_library.py compiles and runs it):

       #include "patch.h"
       #include <stdio.h>
       #include <string.h>

       int main(void) {
           patch_model *model = NULL;
           patch_error error;
           const char *text = "When John and Mary went to the shop, John gave the bag to";
           int ids[128];
           size_t n = 0;
           float row[4096];
           patch_read read = {PATCH_LN_FINAL_NORMALIZED, 0, 0, 0, row, 0};
           patch_run run = {ids, 0, NULL, 0};
           if (patch_model_open("tests/tiny/model.bin", NULL, &model, &error) ||
               patch_encode(model, text, strlen(text), 1, ids, 128, &n, &error))
               return fprintf(stderr, "%s: %s\n", error.where, error.message), 1;
           run.n_tokens = (int)n;
           read.pos = (int)n - 1;
           if (patch_execute(model, &run, 1, &read, 1, NULL, &error))
               return fprintf(stderr, "%s: %s\n", error.where, error.message), 1;
           printf("%d tokens, final row starts with %f\n", run.n_tokens, (double)row[0]);
           patch_model_free(model);
           return 0;
       }

   Conventions. Every function that can fail returns a patch_status (0 is success) and fills the
   patch_error that the caller passes (NULL: not wanted). Nothing prints, exits or keeps global state.
   Arrays are row-major, the last index fastest, and float unless said otherwise. Letters: B examples,
   T tokens of a prompt, L layers, H heads, C = d_model, D = C / H, M = d_mlp, V = d_vocab. A loaded
   model never changes: any number of threads may use it at once. */
#ifndef ACTPATCH_PATCH_H
#define ACTPATCH_PATCH_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PATCH_VERSION "0.1.0"

/* ---- errors and memory ----------------------------------------------------------------------- */

typedef enum patch_status {
    PATCH_OK = 0,
    PATCH_E_USAGE,  /* an argument that no model could satisfy: an unknown hook, sweep or metric */
    PATCH_E_MEMORY, /* the allocator gave nothing, or max_memory is too small for one cell */
    PATCH_E_IO,     /* the operating system refused to open, read, map or write */
    PATCH_E_FORMAT, /* a file is not what it claims to be */
    PATCH_E_INPUT,  /* prompts, ids or edits that do not fit this model or each other */
    PATCH_E_SIZE    /* the caller's buffer is too small; the needed size was returned */
} patch_status;

typedef struct patch_error {
    patch_status code;
    char where[128];   /* file, line or argument */
    char message[384]; /* what is wrong and what to do */
} patch_error;

/* Where memory comes from. alloc returns at least `bytes` bytes aligned for any type, or NULL. */
typedef struct patch_allocator {
    void *(*alloc)(size_t bytes, void *ctx);
    void (*free)(void *memory, void *ctx);
    void *ctx;
} patch_allocator;

/* ---- model ----------------------------------------------------------------------------------- */

/* How to load. patch_options_default() gives TransformerLens's from_pretrained: the first four
   weight processings on, the fifth off. */
typedef struct patch_options {
    int fold_ln;
    int center_writing_weights;
    int center_unembed;
    int fold_value_biases;
    int refactor_factored_attn_matrices;
    int threads;       /* 0: as many as OpenMP offers; never more than 256 */
    int plain;         /* scalar reference kernels: the same bits, slowly */
    size_t max_memory; /* bytes the model and one call may take together; 0: no bound asked for */
    patch_allocator allocator; /* alloc == NULL: malloc and free */
} patch_options;

typedef struct patch_model patch_model;

/* What a model is; sizes in elements. */
typedef struct patch_dims {
    int n_layers, n_heads, d_model, d_head, d_mlp, n_ctx, d_vocab;
    int act_fn; /* 0 gelu_new, 1 gelu, 2 relu */
    int bos;    /* id of <|endoftext|>, -1 where the file has no tokenizer */
    double eps;
    double parameters; /* weights of the checkpoint, tied ones counted once */
    double file_bytes;
    int folded;     /* written by `actpatch fold`: the options of then hold */
    int dtype;      /* how matrices are stored: 0 float32, 1 float16 */
    const char *kernels; /* "avx512", "avx2", "vector" or "plain" */
    int threads;    /* that a call uses; 1 where the build has no OpenMP */
} patch_dims;

patch_options patch_options_default(void);

/* Open a flat file made by convert_weights.py or `actpatch fold`. The file is mapped where the
   platform can and must not change while the model lives. On success *model is the caller's, to be
   given to patch_model_free. options NULL: the defaults. A folded file has had its processing:
   options must be the defaults or those it was folded with. Errors: IO, FORMAT, MEMORY, INPUT. */
patch_status patch_model_open(const char *path, const patch_options *options, patch_model **model,
                              patch_error *error);

/* The same from n bytes in memory (flash, an embedded array), which are used in place and must
   outlive the model. bytes == NULL is an INPUT error, another alignment than 4 bytes a USAGE one.
   */
patch_status patch_model_from_memory(const void *bytes, size_t n, const patch_options *options,
                                     patch_model **model, patch_error *error);

/* Free everything that belongs to the model; NULL is fine. */
void patch_model_free(patch_model *model);

const patch_dims *patch_model_dims(const patch_model *model);

/* The options that the model was opened with; of a folded file, those it was folded with. */
const patch_options *patch_model_options(const patch_model *model);

/* Check the CRC-32 of every tensor (the head, the table and the tokenizer are always checked). */
patch_status patch_model_verify(const patch_model *model, patch_error *error);

/* SHA-256 of the model file as 64 hexadecimal digits and a NUL. Reads the whole file. */
patch_status patch_model_sha256(const patch_model *model, char hex[65], patch_error *error);

/* Write the processed weights as a flat file that needs no processing at load: matrices folded and
   in the kernels' panels. The file is written beside its target and renamed when whole. */
patch_status patch_model_fold(const patch_model *model, const char *path, patch_error *error);

/* ---- tokens ---------------------------------------------------------------------------------- */

/* GPT-2's byte-level BPE of n_bytes of text, any bytes at all; <|endoftext|> in the text becomes
   its id; prepend_bos puts one in front. ids holds `capacity` (n_bytes + 1 always suffices); *n_ids
   is the number needed, also on PATCH_E_SIZE. */
patch_status patch_encode(const patch_model *model, const char *text, size_t n_bytes,
                          int prepend_bos, int *ids, size_t capacity, size_t *n_ids,
                          patch_error *error);

/* The bytes of n ids, not terminated; *n_bytes is the number needed, also on PATCH_E_SIZE. */
patch_status patch_decode(const patch_model *model, const int *ids, size_t n, char *text,
                          size_t capacity, size_t *n_bytes, patch_error *error);

/* One token's bytes (not terminated), the model's own; NULL and length 0 where there is none. */
const char *patch_token(const patch_model *model, int id, size_t *length);

/* ---- hook points, edits, runs ---------------------------------------------------------------- */

/* Every hook point: enum suffix, TransformerLens's name ("%d": the layer), and the shape of one row
   (one token position): C, M, D per head (Z), C per head (R), T per head (P: one destination's row
   of scores or pattern), one number (1). The list is the order in which a layer computes them. */
#define PATCH_HOOKS(X)                                                                             \
    X(EMBED, "hook_embed", 'C')                                                                    \
    X(POS_EMBED, "hook_pos_embed", 'C')                                                            \
    X(RESID_PRE, "blocks.%d.hook_resid_pre", 'C')                                                  \
    X(LN1_SCALE, "blocks.%d.ln1.hook_scale", '1')                                                  \
    X(LN1_NORMALIZED, "blocks.%d.ln1.hook_normalized", 'C')                                        \
    X(Q, "blocks.%d.attn.hook_q", 'Z')                                                             \
    X(K, "blocks.%d.attn.hook_k", 'Z')                                                             \
    X(V, "blocks.%d.attn.hook_v", 'Z')                                                             \
    X(ATTN_SCORES, "blocks.%d.attn.hook_attn_scores", 'P')                                         \
    X(PATTERN, "blocks.%d.attn.hook_pattern", 'P')                                                 \
    X(Z, "blocks.%d.attn.hook_z", 'Z')                                                             \
    X(RESULT, "blocks.%d.attn.hook_result", 'R')                                                   \
    X(ATTN_OUT, "blocks.%d.hook_attn_out", 'C')                                                    \
    X(RESID_MID, "blocks.%d.hook_resid_mid", 'C')                                                  \
    X(LN2_SCALE, "blocks.%d.ln2.hook_scale", '1')                                                  \
    X(LN2_NORMALIZED, "blocks.%d.ln2.hook_normalized", 'C')                                        \
    X(MLP_PRE, "blocks.%d.mlp.hook_pre", 'M')                                                      \
    X(MLP_POST, "blocks.%d.mlp.hook_post", 'M')                                                    \
    X(MLP_OUT, "blocks.%d.hook_mlp_out", 'C')                                                      \
    X(RESID_POST, "blocks.%d.hook_resid_post", 'C')                                                \
    X(LN_FINAL_SCALE, "ln_final.hook_scale", '1')                                                  \
    X(LN_FINAL_NORMALIZED, "ln_final.hook_normalized", 'C')

typedef enum patch_hook {
#define X(id, name, shape) PATCH_##id,
    PATCH_HOOKS(X)
#undef X
    PATCH_N_HOOKS
} patch_hook;

/* TransformerLens's name of a hook point; returns its length, as snprintf does. */
int patch_hook_name(patch_hook hook, int layer, char *name, size_t capacity);

typedef enum patch_op {
    PATCH_COPY, /* take the slice from run `source`, at the same position */
    PATCH_SET,  /* take it from `values` */
    PATCH_ADD,  /* add `values` to it */
    PATCH_SCALE /* multiply it by `factor` */
} patch_op;

/* One change to one run: at a hook point of a layer, at one position or all, the whole vector or a
   head's slice of it or (scores and pattern) a single entry. Edits at one hook point apply in list
   order. An edit of scores, pattern or a LayerNorm scale changes that alone: the run's own values
   and residual stream meet it afterwards, as with a TransformerLens hook. Attention is causal: of
   scores and pattern only the sources src <= pos exist, and what an edit does behind them has no
   effect. Where PATCH_RESULT is edited, be it to equal numbers, attn_out at that position is the
   sum over heads of what then stands there, plus b_O; everywhere else it is one product of z, whose
   last bits may differ from that sum's. */
typedef struct patch_edit {
    patch_hook hook;
    patch_op op;
    int layer;           /* ignored for the hook points outside the blocks */
    int pos;             /* -1: every position */
    int head;            /* -1: all; otherwise only at q, k, v, z, result, scores, pattern */
    int src;             /* -1: all; a source position, only at scores and pattern */
    int source;          /* COPY: index of an earlier run with as many tokens */
    float factor;        /* SCALE */
    const float *values; /* SET, ADD: the slice's floats, used in place (scores, pattern: [T] a head) */
    size_t stride;       /* pos == -1: floats from one position's values to the next; 0: the same */
} patch_edit;

/* One pass of the model over one prompt. tokens and edits stay the caller's. */
typedef struct patch_run {
    const int *tokens; /* [T] ids */
    int n_tokens;      /* 1..n_ctx */
    const patch_edit *edits;
    int n_edits;
} patch_run;

/* One activation to hand back: a row [shape] for pos >= 0, all rows for pos == -1, which is
   [T, shape], and [H, T, T] for scores and pattern. Heads are [H, D] (result: [H, C]). */
typedef struct patch_read {
    patch_hook hook;
    int layer;
    int run;
    int pos;
    float *out; /* the caller's; NULL: nothing is copied, the activation is still computed */
    int id;     /* set by patch_execute: of reads (pos >= 0) at one hook point and layer, those with one
                   id are the same row, hence equal by construction; -1 for pos == -1 */
} patch_read;

/* What a call did. Of groups of cells that were given up for want of memory, and tried again with
   fewer, only the time is counted, in seconds_plan. */
typedef struct patch_stats {
    double cells, cells_skipped;     /* sweeps: skipped cells' final row is the baseline's */
    double rows, rows_shared;        /* rows of all layers computed, and asked for but shared */
    double flops, weight_bytes_read; /* of the matrix products */
    double seconds_plan, seconds_products, seconds_attention, seconds_rest, seconds_metric;
    double passes;     /* over the weights */
    double peak_bytes; /* of rows, plan and scratch of one pass */
} patch_stats;

/* The engine: carry all runs through the model side by side and hand back what is read. Rows that
   are equal by construction are computed once; what nothing reads is not computed; the numbers are
   the same, bit for bit, as if each run were computed alone. stats may be NULL; they are added to.
   Errors: INPUT (ids, edits or reads out of range), MEMORY. */
patch_status patch_execute(const patch_model *model, const patch_run *runs, size_t n_runs,
                           patch_read *reads, size_t n_reads, patch_stats *stats,
                           patch_error *error);

/* logits [n, V] = rows [n, C] (ln_final.hook_normalized) . W_U + b_U. */
patch_status patch_logits(const patch_model *model, const float *rows, size_t n, float *logits,
                          patch_error *error);

/* ---- cache ----------------------------------------------------------------------------------- */

typedef struct patch_cache patch_cache;

typedef struct patch_tensor {
    const char *name;   /* hook name; the cache's own */
    const float *data;  /* the cache's own */
    int rank;
    size_t shape[4];    /* as TransformerLens gives it, batch first */
} patch_tensor;

/* run_with_cache: n_prompts prompts of n_tokens ids each (tokens [B,T]), every hook point that one
   of the n_globs matches (`*` matches dots too; hook_result only where the glob itself contains
   "result"). needed, where not NULL, receives the bytes that the activations take, before anything
   is allocated; with cache == NULL nothing more is done. Errors: INPUT where a glob matches
   nothing. */
patch_status patch_run_with_cache(const patch_model *model, const int *tokens, size_t n_prompts,
                                  size_t n_tokens, const char *const *globs, size_t n_globs,
                                  size_t *needed, patch_cache **cache, patch_error *error);
size_t patch_cache_count(const patch_cache *cache);
patch_tensor patch_cache_get(const patch_cache *cache, size_t index);
void patch_cache_free(patch_cache *cache);

/* ---- metrics and sweeps ---------------------------------------------------------------------- */

typedef enum patch_metric {
    PATCH_LOGIT_DIFF, /* logit[answer] - logit[wrong] at the last position */
    PATCH_LOGIT,      /* logit[answer] */
    PATCH_PROB,       /* softmax probability of the answer */
    PATCH_LOGPROB,    /* its natural logarithm */
    PATCH_KL,         /* sum p_clean (ln p_clean - ln p), final distributions */
    PATCH_RANK        /* how many tokens have a higher logit than the answer */
} patch_metric;

/* One example of a task; arrays are the caller's. corrupted may be NULL where one prompt suffices.
   */
typedef struct patch_example {
    const int *clean;
    const int *corrupted;
    int n_tokens; /* of both */
    int answer, wrong;
} patch_example;

/* The metric of every example's clean (out[b][0]) and corrupted (out[b][1]) run; out is [B, 2]. */
patch_status patch_measure(const patch_model *model, const patch_example *examples, size_t n,
                           patch_metric metric, double *out, patch_stats *stats, patch_error *error);

/* One cell of a sweep: what is taken over from the other run. */
typedef struct patch_cell {
    patch_hook hook;
    int layer;
    int pos;  /* -1: every position; at scores and pattern this is the destination */
    int head; /* -1: the whole vector */
    int src;  /* -1: the whole row; a source position, only at scores and pattern */
} patch_cell;

typedef struct patch_cells_options {
    patch_metric metric;
    int noising; /* corrupted activations into clean runs; otherwise clean into corrupted ones */
    int brute;   /* a full pass a cell, nothing shared, nothing trimmed: the reference, slowly */
    /* Work items are numbered example * n_cells + cell; only first .. first + count - 1 are computed
       (count 0: all). */
    size_t first, count;
    double *unpatched; /* [n, 2]: receives the metric of the clean and corrupted run of every example
                          that was computed; NULL: not wanted */
    /* Called after each group with the items just finished, in order: their values. A status other
       than 0 ends the call with it. May be NULL. */
    patch_status (*done)(void *ctx, size_t first, size_t count, const double *values,
                         patch_error *error);
    void *ctx;
} patch_cells_options;

/* The general sweep: the metric of the run into which one cell's activation has been put, for every
   example and cell. values [n, n_cells] (the caller's; items outside first..count are left alone);
   examples may differ in length, a cell whose position an example does not have is an error.
   Errors: USAGE, INPUT, MEMORY, and what `done` returns. Method: Wang et al. 2022
   (arXiv:2211.00593), Heimersheim and Nanda 2024 (arXiv:2404.15255). */
patch_status patch_cells(const patch_model *model, const patch_example *examples, size_t n,
                         const patch_cell *cells, size_t n_cells,
                         const patch_cells_options *options, double *values, patch_stats *stats,
                         patch_error *error);

/* A named sweep's shape. `sweep` is what follows get_act_patch_ in transformer_lens.patching. */
typedef struct patch_shape {
    int rank;
    size_t size[5];
    const char *axes[5]; /* "kind", "layer", "pos", "head", "dest", "src" */
    size_t n_cells;
} patch_shape;

/* The name of sweep number i, NULL behind the last one. */
const char *patch_sweep_name(size_t i);

/* Shape of a sweep over prompts of n_tokens tokens, and where cells != NULL its cells, row-major:
   shape->n_cells of them. Errors: USAGE, an unknown name; INPUT, n_tokens not within 1..n_ctx. */
patch_status patch_sweep_cells(const patch_model *model, const char *sweep, int n_tokens,
                               patch_shape *shape, patch_cell *cells, patch_error *error);

/* ---- further analyses (definitions: chapter 11) ---------------------------------------------- */

/* Causal tracing of one fact (Meng et al. 2022, arXiv:2202.05262): the subject's token embeddings
   are noised in `samples` corrupted runs, then one thing at a time is restored from the clean run.
   */
typedef enum patch_trace_kind { PATCH_TRACE_RESID, PATCH_TRACE_MLP, PATCH_TRACE_ATTN } patch_trace_kind;

typedef struct patch_fact {
    const int *tokens; /* [T], the caller's */
    int n_tokens, begin, end; /* the subject: tokens begin..end-1 */
    int answer;        /* whose probability is traced */
} patch_fact;

typedef struct patch_trace_options {
    int samples; /* corrupted runs, 10 in the paper */
    int window;  /* layers restored at once of mlp_out and attn_out, 10 in the paper */
    int severed; /* hold mlp_out (attn_out) of the token at the corrupted run's values instead */
    int kinds;   /* bit k: patch_trace_kind k is wanted */
    double sigma; /* of the noise, from patch_trace_sigma */
    patch_metric metric; /* PATCH_PROB in the paper */
} patch_trace_options;

/* *sigma = noise times the standard deviation (unbiased) of the raw embeddings of these n tokens:
   all subjects' of a file of facts, one behind the other. */
patch_status patch_trace_sigma(const patch_model *model, const int *tokens, size_t n, double noise,
                               double *sigma, patch_error *error);

/* cells [3, T, L] (the caller's; kinds not wanted are left alone): the metric's mean over the
   samples with that layer restored at that token; *high: of the clean run, *low: mean of the
   corrupted ones. */
patch_status patch_trace(const patch_model *model, const patch_fact *fact,
                         const patch_trace_options *options, double *high, double *low,
                         double *cells, patch_stats *stats, patch_error *error);

/* z [n] = the first values of numpy's RandomState(seed).randn, bit for bit: with seed 1 the noise
   of patch_trace, in the order [samples, subject's tokens, C] and in units of sigma. z is the
   caller's. It cannot fail. */
void patch_trace_noise(unsigned seed, double *z, size_t n);

/* How an ablated slice is replaced. */
typedef enum patch_by {
    PATCH_BY_ZERO,
    PATCH_BY_MEAN,     /* over the examples of the group, by position */
    PATCH_BY_RESAMPLE, /* by the partner's clean run */
    PATCH_BY_NOISE     /* Gaussian noise is added: `noise` times the layer's standard deviation */
} patch_by;

typedef struct patch_ablation {
    patch_by by;
    patch_metric metric;
    const int *groups;  /* [n] 0..n_groups-1, NULL: one group */
    int n_groups;       /* at least 1 */
    const int *partner; /* [n] RESAMPLE: another example's number */
    double noise;
    unsigned seed;
    const int *positions; /* [n, n_positions] of each example, -1: none; the caller's. NULL and 0: */
    int n_positions;      /* a cell is ablated at its own pos; else at these, whatever its pos */
    int keep; /* not 0: what a set does *not* name is ablated: every head's z, of every layer, at every
                 position, but the set's heads at `positions` (n_positions 0: at all). A set without
                 cells ablates all heads. */
} patch_ablation;

/* Ablate sets of cells of one hook point in the clean runs: set i is cells[sets[i]..sets[i+1]-1]
   (sets [n_sets + 1]), and may be empty. All examples have one length. values [n, n_sets]: the
   metric after the ablation; unpatched [n]: of the clean run (may be NULL). Both are the caller's.
   With `keep`, a circuit's faithfulness, completeness and minimality are differences of such values
   (Wang et al. 2022, arXiv:2211.00593). Errors: USAGE (a hook point that cannot be ablated, a
   metric), INPUT (examples, cells, groups, partners or positions that do not fit; with `keep`, a
   cell that is not z of one head), MEMORY. */
patch_status patch_ablate(const patch_model *model, const patch_example *examples, size_t n,
                          const patch_cell *cells, const size_t *sets, size_t n_sets,
                          const patch_ablation *options, double *values, double *unpatched,
                          patch_stats *stats, patch_error *error);

typedef struct patch_path_options {
    patch_metric metric;
    int noising;
    int freeze_mlps;             /* the direct edge only */
    const patch_cell *receivers; /* hook Q, K or V, layer, head; none: the final residual stream */
    size_t n_receivers;
} patch_path_options;

/* Path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023, arXiv:2304.05969) from every head:
   values [n, L, H], unpatched [n, 2] (may be NULL). */
patch_status patch_paths(const patch_model *model, const patch_example *examples, size_t n,
                         const patch_path_options *options, double *values, double *unpatched,
                         patch_stats *stats, patch_error *error);

/* Direct logit attribution of the clean runs; all arrays are the caller's. */
typedef struct patch_lens {
    double *accumulated; /* [n, 2L+1] the residual stream after each half layer, the run's own scale */
    double *lens;        /* [n, 2L+1] the same with each row's own scale, and the bias: the logit lens */
    double *layers;      /* [n, 2L+2] embed, pos_embed, then attn_out and mlp_out of each layer */
    double *heads;       /* [n, L*H+1] each head's result, and the remainder */
    double *bias;        /* [n] what b_U (and an unfolded LayerNorm's bias) adds */
    double *logit_diff;  /* [n] accumulated's last plus bias */
} patch_lens;

patch_status patch_logit_lens(const patch_model *model, const patch_example *examples, size_t n,
                              patch_lens *out, patch_error *error);

/* TransformerLens's detect_head (mul): scores [3, L, H] for previous-token, duplicate-token and
   induction heads on one prompt. */
patch_status patch_head_kinds(const patch_model *model, const int *tokens, int n_tokens,
                              double *scores, patch_error *error);

/* Copying scores (Wang et al. 2022, arXiv:2211.00593): positive [L, H] is the share of `names`
   (n_names >= 1 token ids; one that stands twice counts twice) that a head writes when it attends
   to them. The name's embedding, extended by MLP 0 but without position and attention, goes through
   the head's W_V W_O (no LN1, b_V and b_O), the final LayerNorm, W_U and b_U; it is written where
   fewer than 5 tokens have a higher logit. negative [L, H]: the same of -W_V W_O. Both arrays are
   the caller's. Errors: INPUT (no names, an id out of range), IO, MEMORY. */
patch_status patch_copying_scores(const patch_model *model, const int *names, size_t n_names,
                                  double *positive, double *negative, patch_error *error);

#ifdef __cplusplus
}
#endif
#endif
