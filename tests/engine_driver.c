/* SPDX-License-Identifier: MIT */
/* Holds the engine against itself and against a plain forward pass in double, for test_engine.py.

       engine_driver MODEL.bin WEIGHTS PROCESSING SECTION SEED CASES

   WEIGHTS is the raw checkpoint as test_engine.py writes it (ref_load); PROCESSING is default, none or
   refactor. Sections: random, strides, rows, reads, errors, edges, ranges, threads, memory. What fails is
   printed, one line each; the last line is "N checks, N failed", and the exit status 1 if any failed or
   none was made. */
#ifndef PATCH_SOURCE
#define PATCH_SOURCE "../patch.c"
#endif
#define PATCH_NO_MAIN
#include PATCH_SOURCE

/* The only place that knows static functions of patch.c: patch_execute with nothing shared. */
static patch_status execute_unshared(const patch_model *m, const patch_run *runs, size_t n_runs,
                                     patch_read *reads, size_t n_reads, patch_stats *stats,
                                     patch_error *e) {
    Pool pool = pool_begin(&m->allocator, SIZE_MAX / 2);

    return pool_end(&pool, execute(m, &pool, runs, n_runs, reads, n_reads, 0, stats, e));
}

enum { MOST_RUNS = 12, MOST_EDITS = 5, MOST_READS = 96, MOST_T = 64, POOL_FLOATS = 1 << 16 };

static const char row_shape[] = {
#define X(id, name, shape) shape,
    PATCH_HOOKS(X)
#undef X
};

static patch_model *model;
static const patch_dims *dims;
static const char *model_path;
static patch_options model_options;
static long n_checks, n_failed;

static void check(int ok, const char *format, ...) {
    va_list values;

    n_checks++;
    if (ok)
        return;
    n_failed++;
    if (n_failed > 20)
        return;
    va_start(values, format);
    printf("FAILED: ");
    vprintf(format, values);
    printf("\n");
    va_end(values);
}

static void die(const char *what, const patch_error *e) {
    printf("FAILED: engine_driver: %s: %s: %s\n", what, e ? e->where : "", e ? e->message : "");
    exit(3);
}

static void *room(size_t n, size_t size) {
    void *p = calloc(n ? n : 1, size);

    if (p == NULL)
        die("out of memory", NULL);
    return p;
}

/* ---- chance ---------------------------------------------------------------------------------------- */

static uint64_t chance_state = 1;

static uint32_t chance(void) { /* xorshift64* */
    chance_state ^= chance_state >> 12;
    chance_state ^= chance_state << 25;
    chance_state ^= chance_state >> 27;
    return (uint32_t)(chance_state * UINT64_C(0x2545F4914F6CDD1D) >> 32);
}

static int below(int n) {
    return (int)(chance() % (uint32_t)n);
}

static float uniform(float from, float to) {
    return from + (to - from) * (float)(chance() >> 8) / 16777216.0f;
}

/* ---- the plain forward pass ------------------------------------------------------------------------
   Everything in double, one run after the other, every position, every stage, straight from the
   definitions: what an edit means is written down here a second time. */

typedef struct RefLayer {
    double *ln1[2], *qkv, *qkv_b, *o, *o_b, *ln2[2], *in, *in_b, *out, *out_b;
} RefLayer;

static struct {
    int L, H, C, D, M, N, V, act, inverse;
    double eps;
    int normalized_has_weights; /* fold_ln is off */
    double *wte, *wpe, *ln_f[2];
    RefLayer *layer;
} ref;

static double *ref_array(FILE *f, int rows, int cols) {
    const size_t n = (size_t)rows * (size_t)cols;
    double *out = room(n, sizeof *out);
    size_t i;
    float x;

    for (i = 0; i < n; i++) {
        if (fread(&x, 4, 1, f) != 1)
            die("the weights are too short", NULL);
        out[i] = (double)x;
    }
    return out;
}

/* 8 ints, epsilon as a double, then the checkpoint's arrays as floats, in this order. */
static void ref_load(const char *path) {
    FILE *f = fopen(path, "rb");
    int head[8], l;

    if (f == NULL || fread(head, sizeof head, 1, f) != 1 || fread(&ref.eps, 8, 1, f) != 1)
        die("cannot read the weights", NULL);
    ref.L = head[0], ref.H = head[1], ref.C = head[2], ref.M = head[3];
    ref.N = head[4], ref.V = head[5], ref.act = head[6], ref.inverse = head[7];
    ref.D = ref.C / ref.H;
    ref.wte = ref_array(f, ref.V, ref.C);
    ref.wpe = ref_array(f, ref.N, ref.C);
    ref.layer = room((size_t)ref.L, sizeof *ref.layer);
    for (l = 0; l < ref.L; l++) {
        RefLayer *y = &ref.layer[l];

        y->ln1[0] = ref_array(f, 1, ref.C), y->ln1[1] = ref_array(f, 1, ref.C);
        y->qkv = ref_array(f, ref.C, 3 * ref.C), y->qkv_b = ref_array(f, 1, 3 * ref.C);
        y->o = ref_array(f, ref.C, ref.C), y->o_b = ref_array(f, 1, ref.C);
        y->ln2[0] = ref_array(f, 1, ref.C), y->ln2[1] = ref_array(f, 1, ref.C);
        y->in = ref_array(f, ref.C, ref.M), y->in_b = ref_array(f, 1, ref.M);
        y->out = ref_array(f, ref.M, ref.C), y->out_b = ref_array(f, 1, ref.C);
    }
    ref.ln_f[0] = ref_array(f, 1, ref.C), ref.ln_f[1] = ref_array(f, 1, ref.C);
    if (fgetc(f) != EOF)
        die("the weights are too long", NULL);
    fclose(f);
}

/* W [k,n], b [n] behind a LayerNorm with weight and bias ln: fold_ln. */
static void ref_fold(double *W, double *b, int k, int n, double *const ln[2]) {
    int i, j;

    for (j = 0; j < n; j++) {
        double mean = 0;

        for (i = 0; i < k; i++) {
            b[j] += ln[1][i] * W[i * n + j];
            W[i * n + j] *= ln[0][i];
            mean += W[i * n + j] / k;
        }
        for (i = 0; i < k; i++)
            W[i * n + j] -= mean;
    }
}

static void ref_center_rows(double *x, int rows, int n) {
    int i, j;

    for (i = 0; i < rows; i++) {
        double mean = 0;

        for (j = 0; j < n; j++)
            mean += x[i * n + j] / n;
        for (j = 0; j < n; j++)
            x[i * n + j] -= mean;
    }
}

/* from_pretrained's processing of what stands before the unembedding: steps 1, 2 and 4. */
static void ref_process(void) {
    const int C = ref.C;
    int l, i, j;

    ref_center_rows(ref.wte, ref.V, C);
    ref_center_rows(ref.wpe, ref.N, C);
    for (l = 0; l < ref.L; l++) {
        RefLayer *y = &ref.layer[l];

        ref_fold(y->qkv, y->qkv_b, C, 3 * C, y->ln1);
        ref_fold(y->in, y->in_b, C, ref.M, y->ln2);
        ref_center_rows(y->o, C, C);
        ref_center_rows(y->o_b, 1, C);
        ref_center_rows(y->out, ref.M, C);
        ref_center_rows(y->out_b, 1, C);
        for (i = 0; i < C; i++) {
            for (j = 0; j < C; j++)
                y->o_b[j] += y->qkv_b[2 * C + i] * y->o[i * C + j];
            y->qkv_b[2 * C + i] = 0;
        }
    }
}

/* Numbers of one row of a hook point; scores and pattern are [H,T] for one destination. */
static int ref_width(int hook, int T) {
    switch (row_shape[hook]) {
    case 'M': return ref.M;
    case 'R': return ref.H * ref.C;
    case 'P': return ref.H * T;
    case '1': return 1;
    default: return ref.C;
    }
}

/* Every activation of one run: act[layer * PATCH_N_HOOKS + hook] is [T, ref_width]. */
typedef struct RefRun {
    int T;
    double **act;
} RefRun;

static int ref_where(int hook, int layer) { /* the layer under which an activation is kept */
    return hook <= PATCH_POS_EMBED ? 0 : hook >= PATCH_LN_FINAL_SCALE ? ref.L - 1 : layer;
}

static double *ref_act(const RefRun *r, int hook, int layer) {
    return r->act[ref_where(hook, layer) * PATCH_N_HOOKS + hook];
}

static void ref_change(double *x, const patch_edit *e, double source, double value) {
    *x = e->op == PATCH_COPY  ? source
         : e->op == PATCH_SET ? value
         : e->op == PATCH_ADD ? *x + value
                              : *x * (double)e->factor;
}

/* One edit at one position. Masked scores and weights, those of later sources, stay masked. */
static void ref_edit_row(const patch_edit *e, int pos, int T, double *row, const double *source) {
    const float *values =
        e->op == PATCH_SET || e->op == PATCH_ADD ? e->values + (e->pos < 0 ? (size_t)pos * e->stride : 0) : NULL;
    const int part = row_shape[e->hook] == 'R' ? ref.C : ref.D;
    const int begin = e->head < 0 ? 0 : e->head * part;
    const int n = e->head < 0 ? ref_width((int)e->hook, T) : part;
    int h, s, i, used = 0;

    if (row_shape[e->hook] == 'P') {
        for (h = 0; h < ref.H; h++)
            for (s = 0; s < T; s++) {
                if ((e->head >= 0 && e->head != h) || (e->src >= 0 && e->src != s))
                    continue;
                if (s <= pos)
                    ref_change(&row[h * T + s], e, source ? source[h * T + s] : 0,
                               values ? (double)values[used] : 0);
                used++;
            }
        return;
    }
    for (i = 0; i < n; i++)
        ref_change(&row[begin + i], e, source ? source[begin + i] : 0, values ? (double)values[i] : 0);
}

/* The run's edits at one hook point, in list order; `all` are the runs so far. */
static void ref_edit(const patch_run *run, RefRun *r, const RefRun *all, int hook, int layer) {
    const int width = ref_width(hook, r->T);
    int i, pos;

    for (i = 0; i < run->n_edits; i++) {
        const patch_edit *e = &run->edits[i];

        if ((int)e->hook != hook || ref_where(hook, e->layer) != ref_where(hook, layer))
            continue;
        for (pos = 0; pos < r->T; pos++)
            if (e->pos < 0 || e->pos == pos)
                ref_edit_row(e, pos, r->T, ref_act(r, hook, layer) + pos * width,
                             e->op == PATCH_COPY ? ref_act(&all[e->source], hook, layer) + pos * width : NULL);
    }
}

/* y [T,n] = x [T,k] . W + b, of `stride` columns of W from `column` on. */
static void ref_linear(const double *x, const double *W, const double *b, int T, int k, int n, int stride,
                       int column, double *y) {
    int t, i, j;

    for (t = 0; t < T; t++)
        for (j = 0; j < n; j++) {
            double sum = b[column + j];

            for (i = 0; i < k; i++)
                sum += x[t * k + i] * W[i * stride + column + j];
            y[t * n + j] = sum;
        }
}

static void ref_add(const double *a, const double *b, int n, double *out) {
    int i;

    for (i = 0; i < n; i++)
        out[i] = a[i] + b[i];
}

/* Scale and what it makes of x, with the edits at both: hook `scale` and the one behind it. */
static void ref_norm(const patch_run *run, RefRun *r, const RefRun *all, const double *x, int scale,
                     int layer, double *const ln[2]) {
    double *s = ref_act(r, scale, layer), *y = ref_act(r, scale + 1, layer);
    const int C = ref.C;
    int pass, t, i;

    for (pass = 0; pass < 2; pass++) {
        for (t = 0; t < r->T; t++) {
            double mean = 0, variance = 0;

            for (i = 0; i < C; i++)
                mean += x[t * C + i] / C;
            for (i = 0; i < C; i++)
                variance += (x[t * C + i] - mean) * (x[t * C + i] - mean) / C;
            if (pass == 0)
                s[t] = sqrt(variance + ref.eps);
            for (i = 0; pass == 1 && i < C; i++) {
                y[t * C + i] = (x[t * C + i] - mean) / s[t];
                if (ref.normalized_has_weights)
                    y[t * C + i] = y[t * C + i] * ln[0][i] + ln[1][i];
            }
        }
        ref_edit(run, r, all, scale + pass, layer);
    }
}

static double ref_activation(double x) {
    if (ref.act == 0)
        return 0.5 * x * (1 + tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
    return ref.act == 1 ? 0.5 * x * (1 + erf(x * 0.70710678118654752440)) : x > 0 ? x : 0;
}

static void ref_attention(const patch_run *run, RefRun *r, const RefRun *all, int layer) {
    const RefLayer *w = &ref.layer[layer];
    const int T = r->T, C = ref.C, D = ref.D, H = ref.H;
    const double *x = ref_act(r, PATCH_LN1_NORMALIZED, layer);
    const double divisor = sqrt((double)D) * (ref.inverse ? layer + 1 : 1);
    double *q = ref_act(r, PATCH_Q, layer), *k = ref_act(r, PATCH_K, layer), *v = ref_act(r, PATCH_V, layer);
    double *scores = ref_act(r, PATCH_ATTN_SCORES, layer), *pattern = ref_act(r, PATCH_PATTERN, layer);
    double *z = ref_act(r, PATCH_Z, layer), *result = ref_act(r, PATCH_RESULT, layer);
    double *out = ref_act(r, PATCH_ATTN_OUT, layer);
    int t, s, h, i, j;

    for (i = 0; i < 3; i++) {
        ref_linear(x, w->qkv, w->qkv_b, T, C, C, 3 * C, i * C, ref_act(r, PATCH_Q + i, layer));
        ref_edit(run, r, all, PATCH_Q + i, layer);
    }
    for (t = 0; t < T; t++)
        for (h = 0; h < H; h++)
            for (s = 0; s < T; s++) {
                double sum = 0;

                for (i = 0; i < D; i++)
                    sum += q[t * C + h * D + i] * k[s * C + h * D + i];
                scores[(t * H + h) * T + s] = s <= t ? sum / divisor : -(double)INFINITY;
            }
    ref_edit(run, r, all, PATCH_ATTN_SCORES, layer);
    for (t = 0; t < T; t++)
        for (h = 0; h < H; h++) {
            const double *from = scores + (t * H + h) * T;
            double most = from[0], sum = 0;

            for (s = 0; s <= t; s++)
                most = from[s] > most ? from[s] : most;
            for (s = 0; s <= t; s++)
                sum += exp(from[s] - most);
            for (s = 0; s < T; s++)
                pattern[(t * H + h) * T + s] = s <= t ? exp(from[s] - most) / sum : 0;
        }
    ref_edit(run, r, all, PATCH_PATTERN, layer);
    for (t = 0; t < T; t++)
        for (i = 0; i < C; i++) {
            z[t * C + i] = 0;
            for (s = 0; s <= t; s++)
                z[t * C + i] += pattern[(t * H + i / D) * T + s] * v[s * C + i];
        }
    ref_edit(run, r, all, PATCH_Z, layer);
    for (t = 0; t < T; t++)
        for (h = 0; h < H; h++)
            for (j = 0; j < C; j++) {
                double sum = 0;

                for (i = h * D; i < (h + 1) * D; i++)
                    sum += z[t * C + i] * w->o[i * C + j];
                result[(t * H + h) * C + j] = sum;
            }
    ref_edit(run, r, all, PATCH_RESULT, layer);
    for (t = 0; t < T; t++)
        for (j = 0; j < C; j++) {
            out[t * C + j] = w->o_b[j];
            for (h = 0; h < H; h++)
                out[t * C + j] += result[(t * H + h) * C + j];
        }
    ref_edit(run, r, all, PATCH_ATTN_OUT, layer);
}

/* All of one run into *r; `all` are the runs before it. */
static void ref_forward(const patch_run *run, RefRun *r, const RefRun *all) {
    const int T = run->n_tokens, C = ref.C;
    int l, hook, t, i;

    r->T = T;
    r->act = room((size_t)ref.L * PATCH_N_HOOKS, sizeof *r->act);
    for (l = 0; l < ref.L; l++)
        for (hook = 0; hook < PATCH_N_HOOKS; hook++)
            if (ref_where(hook, l) == l)
                r->act[l * PATCH_N_HOOKS + hook] = room((size_t)(T * ref_width(hook, T)), sizeof(double));
    for (t = 0; t < T; t++)
        for (i = 0; i < C; i++) {
            ref_act(r, PATCH_EMBED, 0)[t * C + i] = ref.wte[run->tokens[t] * C + i];
            ref_act(r, PATCH_POS_EMBED, 0)[t * C + i] = ref.wpe[t * C + i];
        }
    ref_edit(run, r, all, PATCH_EMBED, 0);
    ref_edit(run, r, all, PATCH_POS_EMBED, 0);
    for (l = 0; l < ref.L; l++) {
        const RefLayer *w = &ref.layer[l];
        double *pre = ref_act(r, PATCH_RESID_PRE, l), *mid = ref_act(r, PATCH_RESID_MID, l);
        double *inner = ref_act(r, PATCH_MLP_PRE, l), *post = ref_act(r, PATCH_MLP_POST, l);

        if (l == 0)
            ref_add(ref_act(r, PATCH_EMBED, 0), ref_act(r, PATCH_POS_EMBED, 0), T * C, pre);
        else
            memcpy(pre, ref_act(r, PATCH_RESID_POST, l - 1), (size_t)(T * C) * sizeof *pre);
        ref_edit(run, r, all, PATCH_RESID_PRE, l);
        ref_norm(run, r, all, pre, PATCH_LN1_SCALE, l, w->ln1);
        ref_attention(run, r, all, l);
        ref_add(pre, ref_act(r, PATCH_ATTN_OUT, l), T * C, mid);
        ref_edit(run, r, all, PATCH_RESID_MID, l);
        ref_norm(run, r, all, mid, PATCH_LN2_SCALE, l, w->ln2);
        ref_linear(ref_act(r, PATCH_LN2_NORMALIZED, l), w->in, w->in_b, T, C, ref.M, ref.M, 0, inner);
        ref_edit(run, r, all, PATCH_MLP_PRE, l);
        for (i = 0; i < T * ref.M; i++)
            post[i] = ref_activation(inner[i]);
        ref_edit(run, r, all, PATCH_MLP_POST, l);
        ref_linear(post, w->out, w->out_b, T, ref.M, C, C, 0, ref_act(r, PATCH_MLP_OUT, l));
        ref_edit(run, r, all, PATCH_MLP_OUT, l);
        ref_add(mid, ref_act(r, PATCH_MLP_OUT, l), T * C, ref_act(r, PATCH_RESID_POST, l));
        ref_edit(run, r, all, PATCH_RESID_POST, l);
    }
    ref_norm(run, r, all, ref_act(r, PATCH_RESID_POST, ref.L - 1), PATCH_LN_FINAL_SCALE, ref.L - 1, ref.ln_f);
}

static void ref_free(RefRun *r) {
    int i;

    for (i = 0; i < ref.L * PATCH_N_HOOKS; i++)
        free(r->act[i]);
    free(r->act);
}

/* ---- random cases ---------------------------------------------------------------------------------- */

typedef struct Case {
    int n_runs, n_reads;
    patch_run runs[MOST_RUNS];
    int tokens[MOST_RUNS][MOST_T];
    patch_edit edits[MOST_RUNS][MOST_EDITS];
    patch_read reads[MOST_READS];
} Case;

static float any_values[POOL_FLOATS], positive_values[POOL_FLOATS]; /* where SET and ADD point to */

static size_t read_floats(const patch_run *runs, const patch_read *r) {
    const int T = runs[r->run].n_tokens;

    return (size_t)(ref_width((int)r->hook, T) * (r->pos < 0 ? T : 1));
}

/* A run of one of two lengths, equal to the first run up to some point. */
static void random_run(Case *c, int run, const int lengths[2]) {
    patch_run *r = &c->runs[run];
    int t;

    r->tokens = c->tokens[run];
    r->n_tokens = lengths[below(2)];
    r->edits = c->edits[run];
    r->n_edits = 0;
    for (t = 0; t < MOST_T; t++)
        c->tokens[run][t] = run ? c->tokens[0][t] : below(ref.V);
    if (run > 0 && below(2))
        c->tokens[run][below(r->n_tokens)] = below(ref.V);
    if (run > 0 && below(8) == 0)
        for (t = 0; t < r->n_tokens; t++)
            c->tokens[run][t] = below(ref.V);
}

static void random_edit(Case *c, int run, patch_edit *e) {
    const int T = c->runs[run].n_tokens, hook = below(PATCH_N_HOOKS), one = row_shape[hook] == '1';
    const int width = ref_width(hook, T);
    int source, tries;

    memset(e, 0, sizeof *e);
    e->hook = (patch_hook)hook;
    e->layer = hook <= PATCH_POS_EMBED || hook >= PATCH_LN_FINAL_SCALE ? below(100) - 50 : below(ref.L);
    e->pos = below(4) ? below(T) : -1;
    e->head = strchr("ZRP", row_shape[hook]) && below(3) ? below(ref.H) : -1;
    e->src = row_shape[hook] == 'P' && below(2) ? below(T) : -1;
    e->op = (patch_op)below(4);
    for (tries = 0; e->op == PATCH_COPY; tries++) {
        source = run ? below(run) : 0;
        e->source = source;
        if (run > 0 && c->runs[source].n_tokens == T)
            break;
        if (tries == 8)
            e->op = (patch_op)(PATCH_SET + below(3));
    }
    e->factor = one ? uniform(0.5f, 2.0f) : below(5) ? uniform(-1.5f, 1.5f) : 0;
    e->stride = below(3) ? (size_t)width : below(2) ? 0 : (size_t)width + 3;
    /* few places, so that different edits often have the same values */
    e->values = (one ? positive_values : any_values) + 64 * below(4);
}

static void random_read(const Case *c, patch_read *r, int run) {
    memset(r, 0, sizeof *r);
    r->hook = (patch_hook)below(PATCH_N_HOOKS);
    r->layer = ref_where((int)r->hook, below(ref.L));
    r->run = run;
    r->pos = below(2) ? below(c->runs[run].n_tokens) : -1;
}

/* Up to 12 runs with up to 5 edits each; their last final row and some other activations are read. */
static void random_case(Case *c, int longest) {
    int lengths[2], run, i;

    memset(c, 0, sizeof *c);
    lengths[0] = 1 + below(longest);
    lengths[1] = below(3) ? lengths[0] : 1 + below(longest);
    c->n_runs = 2 + below(MOST_RUNS - 1);
    for (run = 0; run < c->n_runs; run++) {
        const int n = below(3) ? 1 + below(2) : below(MOST_EDITS + 1);

        random_run(c, run, lengths);
        for (i = 0; i < n; i++)
            random_edit(c, run, &c->edits[run][i]);
        if (n > 1 && below(3) == 0) { /* two at one hook point, in list order */
            c->edits[run][1].hook = c->edits[run][0].hook;
            c->edits[run][1] = c->edits[run][0];
            c->edits[run][1].op = (patch_op)(PATCH_SET + below(3));
        }
        c->runs[run].n_edits = n;
        for (i = 0; i < 6; i++)
            random_read(c, &c->reads[c->n_reads++], run);
        random_read(c, &c->reads[c->n_reads], run);
        c->reads[c->n_reads].hook = PATCH_LN_FINAL_NORMALIZED;
        c->reads[c->n_reads++].pos = c->runs[run].n_tokens - 1;
    }
}

static void show_case(const Case *c) {
    static const char *const ops[] = {"COPY", "SET", "ADD", "SCALE"};
    char name[64];
    int run, i;

    if (n_failed > 20)
        return;
    for (run = 0; run < c->n_runs; run++) {
        printf("  run %d: tokens", run);
        for (i = 0; i < c->runs[run].n_tokens; i++)
            printf(" %d", c->tokens[run][i]);
        for (i = 0; i < c->runs[run].n_edits; i++) {
            const patch_edit *e = &c->edits[run][i];

            patch_hook_name(e->hook, e->layer, name, sizeof name);
            printf("; %s %s pos %d head %d src %d", ops[e->op], name, e->pos, e->head, e->src);
            if (e->op == PATCH_COPY)
                printf(" source %d", e->source);
            else if (e->op == PATCH_SCALE)
                printf(" factor %g", (double)e->factor);
            else
                printf(" values +%ld stride %lu", (long)(e->values - any_values), (unsigned long)e->stride);
        }
        printf("\n");
    }
}

/* Give every read memory of its own, freed by drop_outputs. */
static void take_outputs(const patch_run *runs, patch_read *reads, int n) {
    int i;

    for (i = 0; i < n; i++)
        reads[i].out = room(read_floats(runs, &reads[i]), sizeof(float));
}

static void drop_outputs(patch_read *reads, int n) {
    int i;

    for (i = 0; i < n; i++)
        free(reads[i].out);
}

/* A run, the runs that it copies from, and theirs, without the rest: as it would be executed alone.
   Returns the run's new number. */
static int alone(const Case *c, int run, Case *out) {
    int needed[MOST_RUNS] = {0}, number[MOST_RUNS] = {0}, r, i;

    memset(out, 0, sizeof *out);
    needed[run] = 1;
    for (r = run; r >= 0; r--)
        for (i = 0; needed[r] && i < c->runs[r].n_edits; i++)
            if (c->edits[r][i].op == PATCH_COPY)
                needed[c->edits[r][i].source] = 1;
    for (r = 0; r <= run; r++) {
        if (!needed[r])
            continue;
        number[r] = out->n_runs++;
        out->runs[number[r]] = c->runs[r];
        memcpy(out->edits[number[r]], c->edits[r], sizeof c->edits[r]);
        out->runs[number[r]].edits = out->edits[number[r]];
        for (i = 0; i < c->runs[r].n_edits; i++)
            out->edits[number[r]][i].source = number[c->edits[r][i].source];
    }
    for (i = 0; i < c->n_reads; i++)
        if (c->reads[i].run == run) {
            out->reads[out->n_reads] = c->reads[i];
            out->reads[out->n_reads].out = NULL;
            out->reads[out->n_reads++].run = number[run];
        }
    return number[run];
}

static void hook_of(const patch_read *r, char name[64]) {
    patch_hook_name(r->hook, r->layer, name, 64);
}

static int same_floats(const float *a, const float *b, size_t n) {
    return memcmp(a, b, n * sizeof *a) == 0;
}

static double worst_error; /* of all reads, relative to the largest number of its read */

/* Is what was read what the plain pass has, to 2e-5 of its largest number? */
static int close_to_ref(const patch_read *r, const RefRun *run, double bound) {
    const int T = run->T, width = ref_width((int)r->hook, T), square = row_shape[r->hook] == 'P';
    const int first = r->pos < 0 ? 0 : r->pos, n = r->pos < 0 ? T : 1;
    const double *act = ref_act(run, (int)r->hook, r->layer);
    double scale = 1, error = 0;
    int i, j, ok = 1;

    for (i = 0; i < n * width; i++)
        if (fabs(act[first * width + i]) > scale && !isinf(act[first * width + i]))
            scale = fabs(act[first * width + i]);
    for (i = 0; i < n; i++)
        for (j = 0; j < width; j++) {
            const double want = act[(first + i) * width + j];
            const int at = square ? (j / T * n + i) * T + j % T : i * width + j;
            const double got = (double)r->out[at];

            if (isinf(want) && got == want)
                continue;
            ok &= fabs(got - want) <= bound * scale; /* NaN is not */
            error = fabs(got - want) > error ? fabs(got - want) : error;
        }
    worst_error = error / scale > worst_error ? error / scale : worst_error;
    return ok;
}

/* One case: together == alone == with nothing shared, and all close to the plain pass. */
static void check_case(Case *c, long number, int with_ref) {
    Case *one = room(1, sizeof *one);
    patch_read unshared[MOST_READS];
    RefRun refs[MOST_RUNS];
    patch_error e;
    char name[64];
    int run, i, k, before = (int)n_failed;

    take_outputs(c->runs, c->reads, c->n_reads);
    memcpy(unshared, c->reads, sizeof unshared);
    take_outputs(c->runs, unshared, c->n_reads);
    if (patch_execute(model, c->runs, (size_t)c->n_runs, c->reads, (size_t)c->n_reads, NULL, &e) ||
        execute_unshared(model, c->runs, (size_t)c->n_runs, unshared, (size_t)c->n_reads, NULL, &e))
        die("execute", &e);
    for (i = 0; with_ref && i < c->n_runs; i++)
        ref_forward(&c->runs[i], &refs[i], refs);
    for (i = 0; i < c->n_reads; i++) {
        patch_read *r = &c->reads[i];

        hook_of(r, name);
        check(same_floats(r->out, unshared[i].out, read_floats(c->runs, r)),
              "case %ld: run %d %s pos %d: sharing changes the bits", number, r->run, name, r->pos);
        if (with_ref) {
            check(close_to_ref(r, &refs[r->run], 2e-5), "case %ld: run %d %s pos %d: not the plain pass's",
                  number, r->run, name, r->pos);
            check(close_to_ref(&unshared[i], &refs[r->run], 2e-5),
                  "case %ld: run %d %s pos %d: unshared, not the plain pass's", number, r->run, name, r->pos);
        }
        for (k = 0; k < i; k++)
            if (r->id >= 0 && r->id == c->reads[k].id && r->hook == c->reads[k].hook &&
                r->layer == c->reads[k].layer && row_shape[r->hook] != 'P')
                check(same_floats(r->out, c->reads[k].out, read_floats(c->runs, r)),
                      "case %ld: %s: two reads have one id and differ", number, name);
    }
    for (run = 0; run < c->n_runs; run++) {
        alone(c, run, one);
        take_outputs(one->runs, one->reads, one->n_reads);
        if (patch_execute(model, one->runs, (size_t)one->n_runs, one->reads, (size_t)one->n_reads, NULL, &e))
            die("execute alone", &e);
        for (i = k = 0; i < c->n_reads; i++)
            if (c->reads[i].run == run) {
                hook_of(&c->reads[i], name);
                check(same_floats(c->reads[i].out, one->reads[k].out, read_floats(c->runs, &c->reads[i])),
                      "case %ld: run %d %s pos %d: other bits than alone", number, run, name, c->reads[i].pos);
                k++;
            }
        drop_outputs(one->reads, one->n_reads);
    }
    for (i = 0; with_ref && i < c->n_runs; i++)
        ref_free(&refs[i]);
    drop_outputs(c->reads, c->n_reads);
    drop_outputs(unshared, c->n_reads);
    free(one);
    if (n_failed > before)
        show_case(c);
}

/* cases random cases of 1..9 tokens, and two of the model's full length. */
static void section_random(long cases, int with_ref) {
    Case *c = room(1, sizeof *c);
    const int most = ref.N < MOST_T ? ref.N : MOST_T;
    long i;

    for (i = 0; i < cases + 2; i++) {
        random_case(c, most < 9 ? most : 9);
        if (i >= cases) {
            int run, t;

            for (run = 0; run < c->n_runs; run++) { /* edits stay valid: no position is beyond */
                for (t = c->runs[run].n_tokens; t < most; t++)
                    c->tokens[run][t] = below(ref.V);
                c->runs[run].n_tokens = most;
            }
        }
        check_case(c, i, with_ref);
    }
    printf("worst error %.2g\n", worst_error);
    free(c);
}

/* Two runs of different length with equal beginnings, both edited with the same values for all heads:
   the heads' values lie T apart, so they are not the same rows. */
static void section_strides(void) {
    Case *c = room(1, sizeof *c);
    int hook, op, src, t;

    for (hook = PATCH_ATTN_SCORES; hook <= PATCH_PATTERN; hook++)
        for (op = PATCH_SET; op <= PATCH_ADD; op++)
            for (src = -1; src < 2; src++) {
                int run;

                memset(c, 0, sizeof *c);
                c->n_runs = 2;
                for (run = 0; run < 2; run++) {
                    patch_edit *e = &c->edits[run][0];

                    for (t = 0; t < MOST_T; t++)
                        c->tokens[run][t] = (3 * t + 1) % ref.V;
                    e->hook = (patch_hook)hook;
                    e->op = (patch_op)op;
                    e->pos = 2;
                    e->head = -1;
                    e->src = src;
                    e->values = any_values;
                    c->runs[run].tokens = c->tokens[run];
                    c->runs[run].n_tokens = run ? 6 : 4;
                    c->runs[run].edits = e;
                    c->runs[run].n_edits = 1;
                    c->reads[run].hook = PATCH_Z;
                    c->reads[run].run = run;
                    c->reads[run].pos = 2;
                }
                c->n_reads = 2;
                check_case(c, hook * 100 + op * 10 + src, 1);
            }
    free(c);
}

/* ---- counting rows --------------------------------------------------------------------------------- */

/* Rows that these runs cost when only their last final rows are read. */
static double rows_of(const patch_run *runs, int n, int shared) {
    patch_read reads[MOST_RUNS];
    patch_stats stats;
    patch_error e;
    int i;

    memset(reads, 0, sizeof reads);
    memset(&stats, 0, sizeof stats);
    for (i = 0; i < n; i++) {
        reads[i].hook = PATCH_LN_FINAL_NORMALIZED;
        reads[i].run = i;
        reads[i].pos = runs[i].n_tokens - 1;
    }
    if (shared ? patch_execute(model, runs, (size_t)n, reads, (size_t)n, &stats, &e)
               : execute_unshared(model, runs, (size_t)n, reads, (size_t)n, &stats, &e))
        die("rows", &e);
    for (i = 0; shared && i < n; i++)
        check(reads[i].id >= 0, "run %d: the final row has no id", i);
    if (shared) {
        double asked = 0;

        for (i = 0; i < n; i++)
            asked += (double)runs[i].n_tokens * dims->n_layers;
        check(stats.rows + stats.rows_shared == asked, "%g rows and %g shared are not all %g", stats.rows,
              stats.rows_shared, asked);
        check(stats.passes == 1, "%g passes", stats.passes);
    }
    return stats.rows;
}

static long n_rows_shared; /* predictions that an engine that shares nothing would miss */

/* The predicted rows; all rows in an engine that shares nothing. */
static void expect_rows(const patch_run *runs, int n, double want, const char *what, int hook, int layer,
                        int pos) {
    const double got = rows_of(runs, n, 1);
    double all = 0;
    int i;

    check(got == want, "%s: hook %d layer %d pos %d: %g rows, not %g", what, hook, layer, pos, got, want);
    if (hook >= 0 && below(16) != 0)
        return;
    for (i = 0; i < n; i++)
        all += (double)runs[i].n_tokens * dims->n_layers;
    check(rows_of(runs, n, 0) >= all, "%s: sharing nothing costs less than %g rows", what, all);
    n_rows_shared += all > want;
}

/* Rows that a new run costs that from layer l on differs at positions from `pos` on, and in that layer at
   `own` positions: T - pos where keys or values change, 1 where they do not. Of the last layer only the
   last position is computed. */
static double rows_added(int l, int pos, int own, int T) {
    const int L = dims->n_layers;

    if (l == L - 1)
        return pos == T - 1 || own > 1 ? 1 : 0;
    return own + (double)(L - 2 - l) * (T - pos) + 1;
}

static patch_run plain_run(const int *tokens, int n) {
    patch_run r;

    r.tokens = tokens;
    r.n_tokens = n;
    r.edits = NULL;
    r.n_edits = 0;
    return r;
}

static int keys_follow(int hook) { /* does an edit here change keys or values of its own layer? */
    return hook <= PATCH_LN1_NORMALIZED || hook == PATCH_K || hook == PATCH_V;
}

/* T tokens in each of two prompts that differ at position d alone, or at all positions from d on. */
static void section_rows_of(int T, int d, int only) {
    const int L = dims->n_layers;
    const double base = (double)(L - 1) * T + 1, pair = base + (double)(L - 1) * (T - d) + 1;
    double same;
    int clean[MOST_T], other[MOST_T], hook, l, pos, t, head;
    patch_run runs[4];
    patch_edit edit;

    for (t = 0; t < T; t++) {
        clean[t] = below(ref.V);
        other[t] = t == d || (t > d && !only) ? (clean[t] + 1 + below(ref.V - 1)) % ref.V : clean[t];
    }
    memset(&edit, 0, sizeof edit);
    runs[0] = runs[1] = runs[2] = plain_run(clean, T);
    expect_rows(runs, 3, base, "equal prompts", -1, -1, -1);
    runs[1] = plain_run(other, T);
    expect_rows(runs, 2, pair, "prompts that begin alike", -1, -1, d);
    if (T > 1) {
        runs[1] = plain_run(clean, T - 1);
        expect_rows(runs, 2, base + 1, "a prompt's beginning", -1, -1, -1);
    }
    runs[1] = plain_run(other, T);
    runs[2] = runs[1]; /* the patched run: the other prompt with something of the clean one */
    runs[2].edits = &edit;
    runs[2].n_edits = 1;
    for (hook = 0; hook < PATCH_N_HOOKS; hook++)
        for (l = 0; l < L; l++) {
            const int at = ref_where(hook, l), heads = strchr("ZRP", row_shape[hook]) ? ref.H : 0;

            if (at != l)
                continue;
            for (pos = -1; pos < T; pos++)
                for (head = -1; head < heads; head++) {
                    edit.hook = (patch_hook)hook;
                    edit.op = PATCH_COPY;
                    edit.layer = l;
                    edit.pos = pos;
                    edit.head = head;
                    edit.src = row_shape[hook] == 'P' && pos >= 0 && head > 0 ? below(T) : -1;
                    edit.source = 1;
                    same = pair; /* an edited result is summed head by head, hence other rows */
                    if (hook == PATCH_RESULT)
                        same += pos < 0 ? rows_added(l, 0, T, T) : rows_added(l, pos, 1, T);
                    expect_rows(runs, 3, same, "a run patched with itself", hook, l, pos);
                    edit.source = 0;
                    if (pos >= 0 && pos < d)
                        expect_rows(runs, 3, same, "before the first token that differs", hook, l, pos);
                }
        }
    for (l = 0; l < L; l++) {
        static const int resid[] = {PATCH_RESID_PRE, PATCH_RESID_MID, PATCH_RESID_POST};
        int k;

        for (k = 0; k < 3; k++) {
            edit.hook = (patch_hook)resid[k];
            edit.layer = l;
            edit.pos = edit.head = edit.src = -1;
            edit.op = PATCH_COPY;
            edit.source = 0;
            expect_rows(runs, 3, pair, "all positions of the residual stream", resid[k], l, -1);
        }
        for (pos = d; pos < T; pos++) { /* one position of it: see rows_added */
            const double follows = T - 1 - d;
            double want = rows_added(l, pos, T - pos, T);

            if (l == 0 && pos > d && only) /* the same token: the same row */
                want = 0;
            else if (pos == d && only) /* the row itself is the clean run's */
                want = l == 0 ? 0 : l == L - 1 ? follows > 0 : follows * (L - 1 - l) + (follows > 0);
            else if (pos == d)
                want = pos == T - 1 ? 0 : l == L - 1 ? 1 : follows * (L - 1 - l) + 1;
            edit.hook = PATCH_RESID_PRE;
            edit.pos = pos;
            expect_rows(runs, 3, pair + want, "one position of resid_pre", PATCH_RESID_PRE, l, pos);
        }
    }
    runs[1] = plain_run(clean, T); /* new values in one slice of the clean run */
    runs[1].edits = &edit;
    runs[1].n_edits = 1;
    edit.op = PATCH_SET;
    for (hook = 0; hook < PATCH_LN_FINAL_SCALE; hook++)
        for (l = 0; l < L; l++)
            for (pos = 0; pos < T && ref_where(hook, l) == l; pos++) {
                const int own = keys_follow(hook) ? T - pos : 1;

                edit.hook = (patch_hook)hook;
                edit.layer = l;
                edit.pos = pos;
                edit.head = strchr("ZRP", row_shape[hook]) ? below(ref.H) : -1;
                edit.values = positive_values;
                expect_rows(runs, 2, base + rows_added(l, pos, own, T), "new values", hook, l, pos);
                runs[2] = runs[3] = runs[1]; /* three times the same edit is one */
                expect_rows(runs, 4, base + rows_added(l, pos, own, T), "equal edits", hook, l, pos);
            }
}

static void section_rows(void) {
    const int most = ref.N < 7 ? ref.N : 7;
    int T, d;

    for (T = 1; T <= most; T += T < 2 ? 1 : 5)
        for (d = 0; d < T; d += T > 4 && d == 0 ? 3 : T - 1 - d > 0 ? T - 1 - d : 1) {
            section_rows_of(T, d, 1);
            section_rows_of(T, d, 0);
        }
    check(n_rows_shared > 0, "nothing was to be shared");
}

/* ---- cells ----------------------------------------------------------------------------------------- */

typedef struct Task {
    int n, n_cells;
    patch_example x[4];
    int tokens[8][MOST_T];
    patch_cell *cells;
} Task;

/* n examples of T tokens; their prompts differ at positions first..last, not at all where first < 0. */
static void make_task(Task *t, int n, int T, int first, int last) {
    int b, i;

    memset(t, 0, sizeof *t);
    t->n = n;
    for (b = 0; b < n; b++) {
        int *clean = t->tokens[2 * b], *corrupted = t->tokens[2 * b + 1];

        for (i = 0; i < T; i++) {
            clean[i] = b > 0 && i < T / 2 && below(2) ? t->tokens[0][i] : below(ref.V);
            corrupted[i] = first >= 0 && i >= first && i <= last ? (clean[i] + 1 + below(ref.V - 1)) % ref.V
                                                                 : clean[i];
        }
        t->x[b].clean = clean;
        t->x[b].corrupted = corrupted;
        t->x[b].n_tokens = T;
        t->x[b].answer = below(ref.V);
        t->x[b].wrong = below(ref.V);
    }
}

/* The cells of all sweeps in `names` (NULL at the end). */
static void add_sweeps(Task *t, const char *const *names) {
    patch_shape shape;
    patch_error e;
    int i, pass;

    for (pass = 0; pass < 2; pass++) {
        t->n_cells = 0;
        for (i = 0; names[i] != NULL; i++) {
            if (patch_sweep_cells(model, names[i], t->x[0].n_tokens, &shape,
                                  pass ? t->cells + t->n_cells : NULL, &e))
                die(names[i], &e);
            t->n_cells += (int)shape.n_cells;
        }
        if (pass == 0)
            t->cells = room((size_t)t->n_cells, sizeof *t->cells);
    }
}

static const char *const every_sweep[] = {
    "resid_mid", "resid_post", "attn_head_pattern_dest_src_pos", "attn_head_all_pos_every",
    "attn_head_by_pos_every", "block_every", NULL};
static const char *const some_sweeps[] = {"resid_pre", "attn_head_q_all_pos", "attn_head_v_by_pos", NULL};

static double *sweep(const patch_model *m, const Task *t, const patch_cells_options *o, patch_stats *stats,
                     const char *what) {
    double *values = room((size_t)(t->n * t->n_cells), sizeof *values);
    patch_error e;

    if (patch_cells(m, t->x, (size_t)t->n, t->cells, (size_t)t->n_cells, o, values, stats, &e))
        die(what, &e);
    return values;
}

static int same_doubles(const double *a, const double *b, size_t n) {
    return memcmp(a, b, n * sizeof *a) == 0;
}

/* All cells of all sweeps, both directions: the fast way gives the plain loop's numbers. */
static void check_edge(const char *what, int n, int T, int first, int last) {
    static const patch_metric metrics[] = {PATCH_LOGIT_DIFF, PATCH_KL};
    patch_cells_options o;
    double unpatched[8];
    Task t;
    int noising, k, i;

    make_task(&t, n, T, first, last);
    add_sweeps(&t, every_sweep);
    for (noising = 0; noising < 2; noising++)
        for (k = 0; k < 2; k++) {
            double *fast, *slow;
            patch_stats stats;

            memset(&o, 0, sizeof o);
            memset(&stats, 0, sizeof stats);
            o.metric = metrics[k];
            o.noising = noising;
            o.unpatched = unpatched;
            fast = sweep(model, &t, &o, &stats, what);
            o.unpatched = NULL;
            o.brute = 1;
            slow = sweep(model, &t, &o, NULL, what);
            check(same_doubles(fast, slow, (size_t)(t.n * t.n_cells)), "%s, T %d, noising %d, metric %d: not "
                  "the plain loop's numbers", what, T, noising, (int)metrics[k]);
            check(stats.cells == t.n * t.n_cells, "%s: %g cells, not %d", what, stats.cells, t.n * t.n_cells);
            for (i = 0; first < 0 && i < t.n * t.n_cells; i++)
                check(fast[i] == unpatched[2 * (i / t.n_cells)] && fast[i] == unpatched[2 * (i / t.n_cells) + 1],
                      "%s: cell %d is not the baseline", what, i);
            check(first >= 0 ? stats.cells_skipped < stats.cells : stats.cells_skipped == stats.cells,
                  "%s: %g of %g cells skipped", what, stats.cells_skipped, stats.cells);
            free(fast);
            free(slow);
        }
    free(t.cells);
}

/* A destination whose every score is -infinity attends to nothing, as TransformerLens makes of NaN. */
static void check_masked(int T) {
    static const int tokens[5] = {0, 1, 2, 3, 4};
    float *minus = room((size_t)T, sizeof *minus), *pattern = room((size_t)model->dims.n_heads * (size_t)T, sizeof *pattern);
    const patch_edit edit = {.hook = PATCH_ATTN_SCORES, .op = PATCH_SET, .pos = T - 1, .head = 0, .src = -1, .values = minus};
    const patch_run run = {tokens, T, &edit, 1};
    patch_read read = {.hook = PATCH_PATTERN, .pos = T - 1, .out = pattern};
    patch_error e;
    int i, ok = 1;

    for (i = 0; i < T; i++)
        minus[i] = -INFINITY;
    if (patch_execute(model, &run, 1, &read, 1, NULL, &e))
        ok = 0;
    for (i = 0; i < T; i++)
        ok &= pattern[i] == 0.0f;
    check(ok, "a row of scores of -infinity is a pattern of zeros");
}

static void section_edges(int full) {
    const int T = ref.N < 5 ? ref.N : 5, most = ref.N < MOST_T ? ref.N : MOST_T;

    check_masked(T);
    check_edge("one token", 2, 1, 0, 0);
    check_edge("one token, equal", 1, 1, -1, -1);
    check_edge("one example", 1, T, 1, T - 1);
    check_edge("equal prompts", 2, T, -1, -1);
    check_edge("the first token differs", 2, T, 0, 0);
    check_edge("the last token differs", 2, T, T - 1, T - 1);
    check_edge("every token differs", 2, T, 0, T - 1);
    if (full)
        check_edge("all of n_ctx", 1, most, most / 2, most / 2);
}

typedef struct Ranges {
    size_t next, calls, stop_after;
    const double *want;
    int ok;
} Ranges;

static patch_status note_range(void *ctx, size_t first, size_t count, const double *values, patch_error *e) {
    Ranges *r = ctx;

    r->ok &= first == r->next && count > 0 && same_doubles(values, r->want + first, count);
    r->next = first + count;
    if (++r->calls == r->stop_after)
        return fail(e, PATCH_E_IO, "here", "stopped; go on");
    return PATCH_OK;
}

/* Pieces first..first+count-1 of a sweep, and what the callback sees, are the whole sweep's. */
static void section_ranges(long cases) {
    patch_cells_options o;
    double *whole, unpatched[8], all_unpatched[8];
    Task t;
    long i, items, k;
    patch_error e;

    make_task(&t, 4, ref.N < 6 ? ref.N : 6, 2, 3);
    t.x[3].n_tokens = t.x[2].n_tokens = ref.N < 5 ? ref.N : 5; /* examples may differ in length */
    add_sweeps(&t, some_sweeps);
    for (i = k = 0; i < t.n_cells; i++) /* only cells that every example has */
        if (t.cells[i].pos < t.x[3].n_tokens)
            t.cells[k++] = t.cells[i];
    t.n_cells = (int)k;
    items = (long)t.n * t.n_cells;
    memset(&o, 0, sizeof o);
    o.unpatched = all_unpatched;
    whole = sweep(model, &t, &o, NULL, "whole sweep");
    for (i = 0; i < cases; i++) {
        const long first = i == 0 ? 0 : below((int)items), left = items - first;
        const long count = i == 1 ? 0 : i == 2 ? left + 7 : 1 + below((int)left);
        const long end = count == 0 || count > left ? items : first + count;
        double *values = room((size_t)items, sizeof *values);
        Ranges r = {0, 0, 0, NULL, 1};

        memset(&o, 0, sizeof o);
        for (k = 0; k < items; k++)
            values[k] = -12345.5;
        for (k = 0; k < 8; k++)
            unpatched[k] = -12345.5;
        r.next = (size_t)first;
        r.want = whole;
        o.first = (size_t)first;
        o.count = (size_t)count;
        o.done = note_range;
        o.ctx = &r;
        o.brute = i % 5 == 4;
        o.unpatched = o.brute ? NULL : unpatched;
        if (patch_cells(model, t.x, (size_t)t.n, t.cells, (size_t)t.n_cells, &o, values, NULL, &e))
            die("range", &e);
        check(r.ok && r.calls > 0 && r.next == (size_t)end, "items %ld..%ld: the callback saw %lu calls, up to %lu",
              first, end, (unsigned long)r.calls, (unsigned long)r.next);
        for (k = 0; k < items; k++)
            check(k >= first && k < end ? values[k] == whole[k] : values[k] == -12345.5,
                  "items %ld..%ld: number %ld is %.9g, not %.9g", first, end, k, values[k], whole[k]);
        for (k = 0; !o.brute && k < 8; k++)
            check(k / 2 >= first / t.n_cells && k / 2 <= (end - 1) / t.n_cells
                      ? unpatched[k] == all_unpatched[k] : unpatched[k] == -12345.5,
                  "items %ld..%ld: unpatched number %ld is %.9g", first, end, k, unpatched[k]);
        free(values);
    }
    {
        Ranges r = {0, 0, 1, whole, 1};
        double *values = room((size_t)items, sizeof *values);
        patch_status s;

        memset(&o, 0, sizeof o);
        o.done = note_range;
        o.ctx = &r;
        s = patch_cells(model, t.x, (size_t)t.n, t.cells, (size_t)t.n_cells, &o, values, NULL, &e);
        check(s == PATCH_E_IO && strcmp(e.where, "here") == 0 && r.calls == 1,
              "a callback that stops: status %d at %s after %lu calls", (int)s, e.where, (unsigned long)r.calls);
        free(values);
    }
    o.done = NULL;
    o.first = (size_t)items;
    check(patch_cells(model, t.x, (size_t)t.n, t.cells, (size_t)t.n_cells, &o, whole, NULL, &e) == PATCH_E_INPUT,
          "a first item behind the last one is no error");
    o.first = 0;
    t.cells[0].pos = t.x[3].n_tokens; /* which example 3 does not have */
    check(patch_cells(model, t.x, (size_t)t.n, t.cells, (size_t)t.n_cells, &o, whole, NULL, &e) == PATCH_E_INPUT,
          "a position that an example does not have is no error");
    free(whole);
    free(t.cells);
}

/* ---- reads, threads, memory ------------------------------------------------------------------------- */

/* Every hook point, read at all positions, one by one and in a different order, against the cache. */
static void section_reads(void) {
    static const char *const all[] = {"*", "*hook_result"};
    enum { B = 2 };
    const int T = ref.N < 7 ? ref.N : 7;
    int tokens[B * MOST_T], b, pos, t;
    patch_cache *cache = NULL;
    patch_run runs[B];
    patch_error e;
    size_t i, needed = 0, sum = 0;
    char name[64];

    for (t = 0; t < B * T; t++)
        tokens[t] = t < T || t > T + 2 ? below(ref.V) : tokens[t - T];
    for (b = 0; b < B; b++)
        runs[b] = plain_run(tokens + b * T, T);
    if (patch_run_with_cache(model, tokens, B, (size_t)T, all, 2, &needed, &cache, &e))
        die("cache", &e);
    check(patch_cache_count(cache) == (size_t)(4 + 18 * ref.L), "%lu tensors", (unsigned long)patch_cache_count(cache));
    for (i = 0; i < patch_cache_count(cache); i++) {
        const patch_tensor x = patch_cache_get(cache, i);
        int hook, layer, found = 0;

        sum += x.shape[0] * x.shape[1] * x.shape[2] * (x.rank == 4 ? x.shape[3] : 1) * sizeof(float);
        for (layer = 0; layer < ref.L; layer++)
            for (hook = 0; hook < PATCH_N_HOOKS; hook++) {
                const int width = ref_width(hook, T), square = row_shape[hook] == 'P';
                const float *data = x.data;
                patch_read reads[B * (MOST_T + 1)];
                int ids[B * (MOST_T + 1)], n = 0, k, h;

                patch_hook_name((patch_hook)hook, layer, name, sizeof name);
                if (strcmp(name, x.name) != 0 || found)
                    continue;
                found = 1;
                memset(reads, 0, sizeof reads);
                for (pos = T - 1; pos >= -1; pos--)
                    for (b = 0; b < B; b++) {
                        reads[n].hook = (patch_hook)hook;
                        reads[n].layer = layer;
                        reads[n].run = b;
                        reads[n++].pos = pos;
                    }
                take_outputs(runs, reads, n);
                if (patch_execute(model, runs, B, reads, (size_t)n, NULL, &e))
                    die("reads", &e);
                for (k = 0; k < n; k++) {
                    const patch_read *r = &reads[k];
                    const float *want = data + (size_t)(r->run * T * width);
                    int ok = 1;

                    if (r->pos < 0)
                        ok = same_floats(r->out, want, (size_t)(T * width));
                    else if (!square)
                        ok = same_floats(r->out, want + r->pos * width, (size_t)width);
                    for (h = 0; r->pos >= 0 && square && h < ref.H; h++)
                        ok &= same_floats(r->out + h * T, want + (h * T + r->pos) * T, (size_t)T);
                    check(ok, "%s pos %d of prompt %d is not the cache's", name, r->pos, r->run);
                    check((r->id >= 0) == (r->pos >= 0), "%s pos %d: id %d", name, r->pos, r->id);
                    if (r->pos >= 0 && r->pos < 3 && k % B == 1) /* prompts agree so far */
                        check(r->id == reads[k - 1].id, "%s pos %d: equal beginnings, ids %d and %d", name, r->pos,
                              r->id, reads[k - 1].id);
                }
                drop_outputs(reads, n);
                for (k = 0; k < n; k++) { /* without room for it: the id alone */
                    ids[k] = reads[k].id;
                    reads[k].out = NULL;
                    reads[k].id = -7;
                }
                if (patch_execute(model, runs, B, reads, (size_t)n, NULL, &e))
                    die("reads without room", &e);
                for (k = 0; k < n; k++)
                    check(reads[k].id == ids[k], "%s: id %d, without room for it %d", name, ids[k], reads[k].id);
            }
        check(found, "%s is no hook point", x.name);
    }
    check(sum == needed, "the cache said %lu bytes and has %lu", (unsigned long)needed, (unsigned long)sum);
    patch_cache_free(cache);
}

/* ---- what is refused ---- */

/* What is wrong with run 1, its edit or its read: one letter and a number. */
static void make_wrong(char what, int number, patch_run *run, patch_edit *edit, patch_read *read, int *tokens) {
    int *field = what == 'h'   ? (int *)(void *)&edit->hook
                 : what == 'l' ? &edit->layer
                 : what == 'p' ? &edit->pos
                 : what == 'H' ? &edit->head
                 : what == 's' ? &edit->src
                 : what == 'S' ? &edit->source
                 : what == 'o' ? (int *)(void *)&edit->op
                 : what == 't' ? &tokens[1]
                 : what == 'n' ? &run->n_tokens
                 : what == 'e' ? &run->n_edits
                 : what == 'r' ? &read->run
                 : what == 'k' ? (int *)(void *)&read->hook
                 : what == 'y' ? &read->layer
                               : &read->pos;

    if (what == 'v') {
        edit->op = (patch_op)number;
        edit->values = NULL;
    } else
        *field = number;
}

/* Runs, edits and reads that do not fit: PATCH_E_INPUT, the place and a remedy, nothing written. */
static void section_errors(void) {
    const int V = ref.V, N = ref.N, H = ref.H, L = ref.L, big = 1 << 30;
    const struct {
        char what;
        int number, hook;
    } wrong[] = {
        {'t', -1, PATCH_Z}, {'t', V, PATCH_Z}, {'t', big, PATCH_Z}, {'n', 0, PATCH_Z}, {'n', -1, PATCH_Z},
        {'n', N + 1, PATCH_Z}, {'e', -1, PATCH_Z}, {'h', -1, 0}, {'h', PATCH_N_HOOKS, 0}, {'h', big, 0},
        {'l', -1, PATCH_Z}, {'l', L, PATCH_Z}, {'p', 3, PATCH_Z}, {'p', -2, PATCH_Z}, {'H', H, PATCH_Z},
        {'H', -2, PATCH_Q}, {'H', 0, PATCH_RESID_PRE}, {'H', 0, PATCH_MLP_POST}, {'H', 0, PATCH_LN1_SCALE},
        {'H', H, PATCH_PATTERN}, {'s', 3, PATCH_PATTERN}, {'s', -2, PATCH_PATTERN}, {'s', 0, PATCH_Z},
        {'s', 0, PATCH_RESID_PRE}, {'S', 1, PATCH_Z}, {'S', 2, PATCH_Z}, {'S', -1, PATCH_Z},
        {'o', 4, PATCH_Z}, {'o', -1, PATCH_Z}, {'v', PATCH_SET, PATCH_Z}, {'v', PATCH_ADD, PATCH_PATTERN},
        {'r', 2, PATCH_Z}, {'r', -1, PATCH_Z}, {'k', -1, PATCH_Z}, {'k', PATCH_N_HOOKS, PATCH_Z},
        {'y', L, PATCH_Z}, {'y', -1, PATCH_Z}, {'P', 3, PATCH_Z}, {'P', -2, PATCH_Z}, {0, 0, PATCH_Z},
        {0, 0, PATCH_PATTERN}, {0, 0, PATCH_RESID_PRE}};
    size_t i, j;

    for (i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        int tokens[2][3] = {{1, 2, 3}, {1, 2, 4}};
        float *out = room((size_t)(3 * ref.C), sizeof *out);
        patch_run runs[2];
        patch_read read;
        patch_edit edit;
        patch_error e;
        patch_status s;

        memset(&edit, 0, sizeof edit);
        memset(&read, 0, sizeof read);
        memset(&e, 0, sizeof e);
        runs[0] = plain_run(tokens[0], 3);
        runs[1] = plain_run(tokens[1], 3);
        runs[1].edits = &edit;
        runs[1].n_edits = 1;
        edit.hook = (patch_hook)wrong[i].hook;
        edit.head = edit.src = -1;
        edit.pos = 1;
        edit.values = any_values;
        read.hook = PATCH_RESID_POST;
        read.run = 1;
        read.pos = 2;
        read.out = out;
        if (wrong[i].what)
            make_wrong(wrong[i].what, wrong[i].number, &runs[1], &edit, &read, tokens[1]);
        s = patch_execute(model, runs, 2, &read, 1, NULL, &e);
        if (wrong[i].what == 0) {
            check(s == PATCH_OK, "what is right is refused: %s: %s", e.where, e.message);
        } else {
            check(s == PATCH_E_INPUT && e.code == s && *e.where && strstr(e.message, "; ") != NULL,
                  "%c = %d: status %d, code %d, \"%s: %s\"", wrong[i].what, wrong[i].number, (int)s, (int)e.code,
                  e.where, e.message);
            check(patch_execute(model, runs, 2, &read, 1, NULL, NULL) == PATCH_E_INPUT,
                  "%c = %d: another status without a patch_error", wrong[i].what, wrong[i].number);
            for (j = 0; j < (size_t)(3 * ref.C); j++)
                check(out[j] == 0, "%c = %d: something was written", wrong[i].what, wrong[i].number);
        }
        free(out);
    }
    { /* a source of another length */
        int tokens[3] = {1, 2, 3};
        patch_run runs[2];
        patch_edit edit;
        patch_error e;

        memset(&edit, 0, sizeof edit);
        edit.head = edit.src = -1;
        runs[0] = plain_run(tokens, 2);
        runs[1] = plain_run(tokens, 3);
        runs[1].edits = &edit;
        runs[1].n_edits = 1;
        check(patch_execute(model, runs, 2, NULL, 0, NULL, &e) == PATCH_E_INPUT, "a source of another length is "
              "no error");
    }
}

static patch_model *reopen(const patch_options *o) {
    patch_model *m = NULL;
    patch_error e;

    if (patch_model_open(model_path, o, &m, &e))
        die("open", &e);
    return m;
}

/* All metrics with 2, 3 and 7 threads as with one. */
static void section_threads(void) {
    static const int threads[] = {1, 2, 3, 7};
    patch_options o = model_options;
    double *want[6][2];
    Task t;
    int i, metric, noising;

    make_task(&t, 3, ref.N < 8 ? ref.N : 8, 2, 4);
    add_sweeps(&t, some_sweeps);
    for (i = 0; i < 4; i++) {
        patch_model *m;

        o.threads = threads[i];
        m = reopen(&o);
        check(patch_model_dims(m)->threads == threads[i] || patch_model_dims(m)->threads == 1,
              "%d threads where %d are asked for", patch_model_dims(m)->threads, threads[i]);
        for (metric = 0; metric < 6; metric++)
            for (noising = 0; noising < 2; noising++) {
                patch_cells_options cells;
                double *got;

                memset(&cells, 0, sizeof cells);
                cells.metric = (patch_metric)metric;
                cells.noising = noising;
                got = sweep(m, &t, &cells, NULL, "threads");
                if (i == 0)
                    want[metric][noising] = got;
                else
                    check(same_doubles(got, want[metric][noising], (size_t)(t.n * t.n_cells)),
                          "%d threads change metric %d, noising %d", threads[i], metric, noising);
                if (i > 0)
                    free(got);
            }
        patch_model_free(m);
    }
    for (metric = 0; metric < 12; metric++)
        free(want[metric / 2][metric % 2]);
    free(t.cells);
}

/* Counts what is allocated. The size stands in front, in as much room as keeps the alignment. */
typedef struct Heap {
    size_t bytes, peak;
    long live;
} Heap;

static void *heap_alloc(size_t n, void *ctx) {
    Heap *h = ctx;
    char *p = malloc(n + 64);

    if (p == NULL)
        return NULL;
    memcpy(p, &n, sizeof n);
    h->live++;
    h->bytes += n;
    h->peak = h->bytes > h->peak ? h->bytes : h->peak;
    return p + 64;
}

static void heap_free(void *p, void *ctx) {
    Heap *h = ctx;
    size_t n;

    memcpy(&n, (char *)p - 64, sizeof n);
    h->live--;
    h->bytes -= n;
    free((char *)p - 64);
}

/* What the groups of a sweep asked for, as they report it. */
typedef struct Asked {
    const Task *t;
    double groups, rows;
} Asked;

static patch_status note_group(void *ctx, size_t first, size_t count, const double *values, patch_error *e) {
    Asked *a = ctx;
    const size_t cells = (size_t)a->t->n_cells, examples = (first + count - 1) / cells - first / cells + 1;

    (void)values, (void)e;
    a->groups++;
    a->rows += (double)((2 * examples + count) * (size_t)a->t->x[0].n_tokens) * dims->n_layers;
    return PATCH_OK;
}

static size_t bytes_advised; /* by the last message of too little memory; 0: it named none */

/* A sweep within this many bytes: its numbers (checked), or PATCH_E_MEMORY with a message (0). */
static int sweep_within(size_t bytes, const Task *t, patch_metric metric, const double *want,
                        patch_stats *stats) {
    const size_t n = (size_t)(t->n * t->n_cells);
    Heap heap = {0, 0, 0};
    patch_options o = model_options;
    patch_cells_options cells;
    double *values = room(n, sizeof *values);
    patch_model *m = NULL;
    Asked asked = {NULL, 0, 0};
    const char *advice;
    patch_error e;
    patch_status s;

    memset(&e, 0, sizeof e);
    memset(&cells, 0, sizeof cells);
    memset(stats, 0, sizeof *stats);
    asked.t = t;
    cells.metric = metric;
    cells.done = note_group;
    cells.ctx = &asked;
    o.max_memory = bytes;
    o.allocator.alloc = heap_alloc;
    o.allocator.free = heap_free;
    o.allocator.ctx = &heap;
    s = patch_model_open(model_path, &o, &m, &e);
    if (s == PATCH_OK)
        s = patch_cells(m, t->x, (size_t)t->n, t->cells, (size_t)t->n_cells, &cells, values, stats, &e);
    patch_model_free(m);
    check(heap.live == 0, "%lu bytes: %ld allocations leaked", (unsigned long)bytes, heap.live);
    check(heap.peak <= bytes || s == PATCH_E_MEMORY, "%lu bytes allowed, %lu taken", (unsigned long)bytes,
          (unsigned long)heap.peak);
    if (s == PATCH_OK)
        check(same_doubles(values, want, n), "%lu bytes change metric %d", (unsigned long)bytes, (int)metric);
    if (s == PATCH_OK) /* nothing is counted of groups that were given up */
        check(stats->passes == asked.groups && stats->rows + stats->rows_shared == asked.rows,
              "%lu bytes: %g groups of %g rows, but %g passes and %g rows", (unsigned long)bytes, asked.groups,
              asked.rows, stats->passes, stats->rows + stats->rows_shared);
    else
        check(s == PATCH_E_MEMORY && e.code == s && *e.where && strstr(e.message, "; ") != NULL,
              "%lu bytes: status %d, code %d, \"%s: %s\"", (unsigned long)bytes, (int)s, (int)e.code, e.where,
              e.message);
    advice = s == PATCH_OK ? NULL : strstr(e.message, "; give ");
    bytes_advised = advice ? strtoul(advice + 7, NULL, 10) * 1024 : 0;
    free(values);
    return s == PATCH_OK;
}

/* From far too little to plenty: memory decides in how many passes, and nothing else. */
static void section_memory(void) {
    static const patch_metric metrics[] = {PATCH_LOGIT_DIFF, PATCH_LOGIT, PATCH_PROB, PATCH_KL};
    static const size_t few[] = {1, 4096, 1 << 20};
    int k;

    for (k = 0; k < 4; k++) {
        size_t little = 1, enough = (size_t)1 << 30, advised, i;
        double *want, items, base;
        patch_cells_options o;
        patch_stats stats;
        Task t;

        make_task(&t, 3, ref.N < 6 ? ref.N : 6, 2, 3);
        add_sweeps(&t, some_sweeps);
        items = t.n * t.n_cells;
        memset(&o, 0, sizeof o);
        memset(&stats, 0, sizeof stats);
        o.metric = metrics[k];
        want = sweep(model, &t, &o, &stats, "memory");
        check(stats.passes == 1 && stats.peak_bytes > 0, "%g passes without a limit", stats.passes);
        base = stats.peak_bytes;
        for (i = 0; i < sizeof few / sizeof few[0]; i++)
            check(!sweep_within(few[i], &t, metrics[k], want, &stats), "%lu bytes suffice", (unsigned long)few[i]);
        advised = bytes_advised;
        check(sweep_within(enough, &t, metrics[k], want, &stats) && stats.passes == 1, "a gigabyte: %g passes",
              stats.passes);
        while (enough - little > 64)
            if (sweep_within(little + (enough - little) / 2, &t, metrics[k], want, &stats))
                enough -= (enough - little) / 2;
            else
                little += (enough - little) / 2;
        check(enough <= advised && advised < enough + (size_t)base / 4 + 4096, "%lu bytes suffice, %lu are advised",
              (unsigned long)enough, (unsigned long)advised);
        check(sweep_within(enough, &t, metrics[k], want, &stats), "%lu bytes no longer suffice", (unsigned long)enough);
        printf("metric %d: %lu bytes at least, %g passes for %g items, %g bytes of a pass\n", (int)metrics[k],
               (unsigned long)enough, stats.passes, items, stats.peak_bytes);
        check(stats.passes >= items / 2, "with the least memory %g passes for %g items", stats.passes, items);
        for (i = 1; i < 24; i++) { /* and between: every limit gives the numbers */
            const size_t more = enough + (size_t)(base * 1.5 * (double)i / 24);

            check(sweep_within(more, &t, metrics[k], want, &stats), "%lu bytes suffice and %lu do not",
                  (unsigned long)enough, (unsigned long)more);
            check(stats.passes >= 1 && stats.passes <= items, "%g passes", stats.passes);
        }
        check(sweep_within(enough + (size_t)base / 8, &t, metrics[k], want, &stats) && stats.passes > 1 &&
                  stats.passes < items, "with some memory %g passes", stats.passes);
        free(want);
        free(t.cells);
    }
}

int main(int argc, char **argv) {
    const char *section = argc == 7 ? argv[4] : "";
    const long cases = argc == 7 ? atol(argv[6]) : 0;
    int i, plain;

    if (argc != 7) {
        fprintf(stderr, "usage: engine_driver MODEL WEIGHTS PROCESSING SECTION SEED CASES\n");
        return 3;
    }
    chance_state = (uint64_t)atol(argv[5]) * UINT64_C(0x9E3779B97F4A7C15) + 1;
    plain = strcmp(argv[3], "none") == 0;
    model_options = patch_options_default();
    if (plain)
        model_options.fold_ln = model_options.center_writing_weights = model_options.center_unembed =
            model_options.fold_value_biases = 0;
    model_options.refactor_factored_attn_matrices = strcmp(argv[3], "refactor") == 0;
    model_path = argv[1];
    model = reopen(&model_options);
    dims = patch_model_dims(model);
    ref_load(argv[2]);
    if (ref.L != dims->n_layers || ref.C != dims->d_model || ref.H != dims->n_heads || ref.M != dims->d_mlp ||
        ref.N != dims->n_ctx || ref.V != dims->d_vocab)
        die("model and weights differ", NULL);
    ref.normalized_has_weights = plain;
    if (!plain)
        ref_process();
    for (i = 0; i < POOL_FLOATS; i++) {
        any_values[i] = uniform(-1.0f, 1.0f);
        positive_values[i] = uniform(0.5f, 2.0f);
    }
    if (strcmp(section, "random") == 0)
        section_random(cases, !model_options.refactor_factored_attn_matrices);
    else if (strcmp(section, "strides") == 0)
        section_strides();
    else if (strcmp(section, "rows") == 0)
        section_rows();
    else if (strcmp(section, "errors") == 0)
        section_errors();
    else if (strcmp(section, "edges") == 0)
        section_edges((int)cases);
    else if (strcmp(section, "ranges") == 0)
        section_ranges(cases);
    else if (strcmp(section, "reads") == 0)
        section_reads();
    else if (strcmp(section, "threads") == 0)
        section_threads();
    else if (strcmp(section, "memory") == 0)
        section_memory();
    patch_model_free(model);
    printf("%ld checks, %ld failed\n", n_checks, n_failed);
    return n_failed || !n_checks ? 1 : 0;
}
