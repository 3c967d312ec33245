/* SPDX-License-Identifier: MIT
   What libFuzzer and AFL++ run, and `make test` replays: one input into one part of patch.c.

   FUZZ_TARGET names the part:
     model    a flat file, all checksums mended first, so that what lies behind them is reached
     text     a text for the tokenizer of the bundled model
     glob     a glob, a newline, and a name
     prompts  a letter for the command, then a prompts file (or facts)
     part     a part file with its records' checksums mended: for `merge`, and to go on from
     words    a command line, a word a line

   Built by tests/fuzz.py with -fsanitize=fuzzer, or with -DREPLAY as a program that takes files. */

#include "program.h"

/* ---- inputs ---------------------------------------------------------------------------------- */

static void write_input(const char *name, const void *bytes, size_t n) {
    FILE *f = fopen(name, "wb");

    if (f == NULL || fwrite(bytes, 1, n, f) != n || fclose(f) != 0)
        refuse("cannot write its input", n);
}

static void put_u32(unsigned char *at, uint32_t x) {
    for (int i = 0; i < 4; i++)
        at[i] = (unsigned char)(x >> (8 * i));
}

/* The checksums of tensors, tokenizer, table and head, where these lie inside the file; its length. */
static void mend_model(unsigned char *f, size_t n) {
    if (n < 128 || getenv("FUZZ_MEND") != NULL) /* FUZZ_MEND=no: to see what mending brings */
        return;
    const size_t tensors = get_u32(f + 52), tokens_at = (size_t)get_u64(f + 56), tokens_n = (size_t)get_u64(f + 64);
    const size_t table = tensors < 100000 ? 80 * tensors : 0;
    static const unsigned bytes_of[] = {4, 2, 4};

    for (size_t i = 0; i < tensors && 128 + 80 * (i + 1) <= n && table > 0; i++) {
        unsigned char *t = f + 128 + 80 * i;
        const uint64_t at = get_u64(t + 64);
        const uint64_t size = (uint64_t)get_u32(t + 56) * get_u32(t + 60) * bytes_of[get_u32(t + 48) % 3];
        if (at <= n && size <= n - at)
            put_u32(t + 72, crc32_of(0, f + at, (size_t)size));
    }
    if (tokens_at <= n && tokens_n <= n - tokens_at)
        put_u32(f + 84, crc32_of(0, f + tokens_at, tokens_n));
    if (table <= n - 128)
        put_u32(f + 80, crc32_of(0, f + 128, table));
    put_u32(f + 72, (uint32_t)n);
    put_u32(f + 76, 0);
    put_u32(f + 124, crc32_of(0, f, 124));
}

/* The records' checksums, and the head's length where there is an empty line. */
static void mend_part(unsigned char *f, size_t n) {
    unsigned char *end = NULL;
    char digits[24];

    for (size_t i = 0; i + 1 < n && end == NULL; i++)
        end = f[i] == '\n' && f[i + 1] == '\n' ? f + i + 2 : NULL;
    if (end == NULL || end - f < 40)
        return;
    snprintf(digits, sizeof digits, "%010lu", (unsigned long)(end - f));
    memcpy(f + 22, digits, 10);
    for (size_t at = (size_t)(end - f); at + 20 <= n;) { /* one or two examples a record, as it fits */
        const uint64_t count = get_u64(f + at + 8);
        if (count > (n - at) / 8)
            return;
        const size_t length = 16 + 8 * (size_t)count + 16 + 4;
        if (length > n - at)
            return;
        put_u32(f + at + length - 4, crc32_of(0, f + at, length - 4));
        at += length;
    }
}

/* ---- targets --------------------------------------------------------------------------------- */

static Model *bundled_model(void) {
    static Model *model;
    patch_error e;

    if (model == NULL && patch_model_open(getenv("FUZZ_MODEL"), NULL, &model, &e) != PATCH_OK)
        refuse(e.message, 0);
    return model;
}

static void run_model(unsigned char *bytes, size_t n) {
    static const int ids[] = {0, 1, 0};
    const patch_run run = {ids, 3, NULL, 0};
    patch_options o = patch_options_default();
    patch_read read = {PATCH_LN_FINAL_NORMALIZED, 0, 0, 2, NULL, 0};
    patch_error e = {PATCH_OK, "", ""};
    Model *m = NULL;
    int got[32];
    size_t n_got;

    mend_model(bytes, n);
    o.max_memory = 64 << 20;
    o.threads = 1;
    allowed = 80 << 20;
    if (patch_model_from_memory(bytes, n, &o, &m, &e) == PATCH_OK) {
        (void)!patch_model_verify(m, &e);
        (void)!patch_encode(m, "When John 12 \xFF<|endoftext|>", 27, 1, got, 32, &n_got, &e);
        (void)!patch_execute(m, &run, 1, &read, 1, NULL, &e);
    }
    if (e.code != PATCH_OK && (e.where[0] == '\0' || e.message[0] == '\0'))
        refuse("an error without place or message", (size_t)e.code);
    patch_model_free(m);
    allowed = 0;
}

static void run_text(const char *text, size_t n) {
    patch_error e;
    size_t n_ids = 0, n_back = 0;
    int *ids = malloc((n + 1) * sizeof *ids);
    char *back = malloc(n + 1);

    if (patch_encode(bundled_model(), text, n, 0, ids, n + 1, &n_ids, &e) != PATCH_OK ||
        patch_decode(bundled_model(), ids, n_ids, back, n + 1, &n_back, &e) != PATCH_OK ||
        n_back != n || memcmp(back, text, n) != 0)
        refuse("a text does not come back", n);
    free(back);
    free(ids);
}

static void run_glob(char *text) {
    char *name = strchr(text, '\n');

    if (name == NULL || strlen(text) > 64)
        return;
    *name++ = '\0';
    (void)glob_matches(text, name);
}

static void run_prompts(const char *bytes, size_t n) {
    static const char *const commands[][12] = {
        {"diff", "in.tsv", "-o", "out.json", "-o", "out.csv", NULL},
        {"patch", "in.tsv", "--sweep", "resid_pre", "-o", "out.html", "-o", "out.svg", NULL},
        {"patch", "in.tsv", "--sweep", "attn_head_out_all_pos", "--per-prompt", "--normalize", NULL},
        {"trace", "in.tsv", "--samples", "1", "--kind", "resid", "-o", "out.json", NULL},
        {"ablate", "in.tsv", "--heads", "0.0", "--keep", "--groups", "g", "--positions", "p,end", NULL},
        {"heads", "in.tsv", NULL},
        {"cache", "in.tsv", "--names", "*hook_z", "-o", "out.safetensors", NULL},
        {"diff", "in.tsv", "--metric", "kl", "--no-bos", NULL},
    };
    const char *words[16] = {NULL};

    if (n < 1 || n > 2000)
        return;
    write_input("in.tsv", bytes + 1, n - 1);
    memcpy(words, commands[(unsigned char)bytes[0] % 8], sizeof commands[0]);
    (void)run_program(words);
    remove("out.html.part");
}

static void run_part(unsigned char *bytes, size_t n) {
    static const char *merge[] = {"merge", "in.npy.part", "-o", "out.json", "-o", "out.csv", NULL};
    static const char *again[] = {"patch", "prompts.tsv", "--sweep", "resid_pre", "-o", "in.npy", NULL};

    mend_part(bytes, n);
    write_input("in.npy.part", bytes, n);
    (void)run_program(merge);
    if (access("prompts.tsv", R_OK) == 0)
        (void)run_program(again);
    remove("in.npy.part");
}

static void run_words(char *text) {
    const char *words[50] = {NULL};
    size_t n = 0;

    for (char *word = strtok(text, "\n"); word != NULL && n < 48; word = strtok(NULL, "\n")) {
        if (strchr(word, '/') != NULL || strcmp(word, "--brute") == 0) /* elsewhere, or for long */
            return;
        words[n++] = word;
    }
    if (n > 0)
        (void)run_program(words);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    const char *target = getenv("FUZZ_TARGET");
    unsigned char *copy = malloc(n + 1);
    static int begun;

    if (!begun) { /* the program's own words are of no interest */
        begun = freopen("/dev/null", "w", stdout) != NULL;
        setenv("ACTPATCH_MODEL", getenv("FUZZ_MODEL"), 1);
    }
    if (n > 0)
        memcpy(copy, data, n);
    copy[n] = '\0';
    if (strcmp(target, "model") == 0)
        run_model(copy, n);
    else if (strcmp(target, "text") == 0)
        run_text((const char *)copy, n);
    else if (strcmp(target, "glob") == 0)
        run_glob((char *)copy);
    else if (strcmp(target, "prompts") == 0)
        run_prompts((const char *)copy, n);
    else if (strcmp(target, "part") == 0)
        run_part(copy, n);
    else
        run_words((char *)copy);
    free(copy);
    return 0;
}

#ifdef REPLAY
int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        static unsigned char bytes[1 << 22];
        if (f == NULL)
            return 2;
        const size_t n = fread(bytes, 1, sizeof bytes, f);
        fclose(f);
        fprintf(stderr, "%s\n", argv[i]);
        LLVMFuzzerTestOneInput(bytes, n);
    }
    return 0;
}
#endif
