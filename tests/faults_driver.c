/* SPDX-License-Identifier: MIT
   Faults in patch.c, one after the other, inside one process (tests/test_faults.py builds and runs it).

     faults file MODEL.bin           every truncation, header field and bit of a flat file
     faults calls memory|files once|all OUT,... WORDS...
                                     the program with its first, second, third ... call for memory, or to a
                                     file, failing

   Prints what it did in figures and ends with status 0; the first wrong thing ends it with status 1. */

#include "program.h"

#include <dirent.h>

static void wrong(const char *what, long number) {
    fprintf(stdout, "wrong: %s at %ld\n", what, number);
    fflush(stdout);
    _exit(1);
}

static unsigned char *read_bytes(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    unsigned char *bytes = malloc(1 << 24);

    *n = 0;
    if (f == NULL) {
        free(bytes);
        return NULL;
    }
    *n = fread(bytes, 1, 1 << 24, f);
    fclose(f);
    return bytes;
}

/* ---- files ----------------------------------------------------------------------------------- */

static void store(unsigned char *at, uint64_t x, int bytes) {
    for (int i = 0; i < bytes; i++)
        at[i] = (unsigned char)(x >> (8 * i));
}

/* Is the file refused, and with a place and a remedy? `thorough`: checksums of weights too. A file that is
   taken is used. */
static int refused(const unsigned char *bytes, size_t n, int thorough, long number) {
    static const int ids[] = {0, 1, 0};
    const patch_run run = {ids, 3, NULL, 0};
    patch_read read = {PATCH_LN_FINAL_NORMALIZED, 0, 0, 2, NULL, 0};
    patch_options o = patch_options_default();
    patch_error e = {PATCH_OK, "", ""};
    Model *m = NULL;
    int ids_out[16];
    size_t n_ids;

    o.threads = 1;
    o.max_memory = 256 << 20;
    patch_status s = patch_model_from_memory(bytes, n, &o, &m, &e);
    if (s == PATCH_OK && thorough)
        s = patch_model_verify(m, &e);
    if (s != PATCH_OK && (strchr(e.message, ';') == NULL || e.where[0] == '\0'))
        wrong("an error without place or remedy", number);
    if (s == PATCH_OK && !thorough) {
        (void)!patch_execute(m, &run, 1, &read, 1, NULL, &e);
        (void)!patch_encode(m, "When John", 9, 1, ids_out, 16, &n_ids, &e);
    }
    patch_model_free(m);
    return s != PATCH_OK;
}

/* Each truncation in a block of its own, so that a read behind its end is seen by the sanitizers. */
static long truncations(const unsigned char *bytes, size_t n, size_t weights) {
    long done = 0;

    for (size_t length = 0; length < n; length += length < weights ? 1 : 4096, done++) {
        unsigned char *piece = malloc(length + 1);
        memcpy(piece, bytes, length);
        if (!refused(piece, length, 0, (long)length))
            wrong("a truncated file is taken", (long)length);
        free(piece);
    }
    return done;
}

/* Every number of head and table at 0, -1, its largest value, one more, one less, with checksums mended: it
   is refused, or what it says can be used. */
static long header_fields(unsigned char *bytes, size_t n) {
    const size_t table = 80 * (size_t)get_u32(bytes + 52);
    long done = 0, taken = 0;

    for (size_t at = 8; at < 128 + table; at += 4) {
        const uint32_t was = get_u32(bytes + at);
        const uint32_t values[] = {0, UINT32_MAX, INT32_MAX, (uint32_t)INT32_MAX + 1, was + 1, was - 1, was * 2};
        for (size_t i = 0; i < sizeof values / sizeof *values; i++, done++) {
            const uint32_t crcs[] = {get_u32(bytes + 80), get_u32(bytes + 124)};
            store(bytes + at, values[i], 4);
            if (at >= 128)
                store(bytes + 80, crc32_of(0, bytes + 128, table), 4);
            if (at != 124)
                store(bytes + 124, crc32_of(0, bytes, 124), 4);
            taken += !refused(bytes, n, 0, (long)at);
            store(bytes + at, was, 4);
            store(bytes + 80, crcs[0], 4);
            store(bytes + 124, crcs[1], 4);
        }
    }
    printf("%ld changed numbers with mended checksums, %ld of them taken (of epsilon and the like)\n", done, taken);
    return done;
}

static void bits(unsigned char *bytes, size_t n, size_t weights) {
    uint32_t random = 1;
    long done = 0;

    for (size_t at = 0; at < weights; at++)
        for (int bit = 0; bit < 8; bit++, done++) {
            bytes[at] ^= (unsigned char)(1 << bit);
            if (!refused(bytes, n, 1, (long)at))
                wrong("a changed bit is not noticed", (long)at);
            bytes[at] ^= (unsigned char)(1 << bit);
        }
    printf("%ld bits of head, table and tokenizer\n", done);
    for (done = 0; done < 10000; done++) {
        random = random * 1664525u + 1013904223u;
        const size_t at = weights + random / 8 % (n - weights);
        bytes[at] ^= (unsigned char)(1 << random % 8);
        if (!refused(bytes, n, 1, (long)at))
            wrong("a changed bit of the weights is not noticed", (long)at);
        bytes[at] ^= (unsigned char)(1 << random % 8);
    }
    printf("%ld bits of weights\n", done);
}

static int check_file(const char *path) {
    size_t n, weights;
    unsigned char *bytes = read_bytes(path, &n);

    if (bytes == NULL || n < 128 || refused(bytes, n, 1, 0))
        wrong("the file to begin with is none", 0);
    weights = (size_t)get_u64(bytes + 128 + 64); /* where the first tensor begins */
    printf("%ld truncations\n", truncations(bytes, n, weights));
    header_fields(bytes, n);
    bits(bytes, n, weights);
    free(bytes);
    return 0;
}

/* ---- calls ----------------------------------------------------------------------------------- */

enum { MOST_OUTS = 8 };
static const char *outs[MOST_OUTS];
static unsigned char *whole[MOST_OUTS];
static size_t n_outs, length[MOST_OUTS];

/* 1: it is there and whole, 0: it is not there; anything else is wrong. */
static int is_whole(size_t i, long number) {
    size_t n;
    unsigned char *bytes = read_bytes(outs[i], &n);

    if (bytes == NULL)
        return 0;
    if (n != length[i] || memcmp(bytes, whole[i], n) != 0)
        wrong("half a file, or another", number);
    free(bytes);
    return 1;
}

/* Nothing is left but what was there, the outputs, and with `parts` part files. */
static void check_folder(int parts, long number) {
    DIR *folder = opendir(".");

    for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        const char *name = entry->d_name;
        int known = name[0] == '.' || strncmp(name, "in.", 3) == 0 || strcmp(name, "said") == 0 ||
                    (parts && strstr(name, ".part") != NULL);
        for (size_t i = 0; i < n_outs; i++)
            known |= strcmp(name, outs[i]) == 0;
        if (!known)
            wrong(name, number);
    }
    closedir(folder);
}

/* What went to stderr: nothing, or one line for the error, whatever warnings come before it. */
static void check_words(int status, long number) {
    static char said[1 << 16];
    FILE *f = fopen("said", "rb");
    const size_t n = fread(said, 1, sizeof said - 1, f);
    long lines = 0;

    fclose(f);
    said[n] = '\0';
    for (char *line = strtok(said, "\n"); line != NULL; line = strtok(NULL, "\n"))
        lines += strncmp(line, "actpatch: warning", 17) != 0;
    if (lines != (status != 0))
        wrong("not one line on stderr", number);
    if (ftruncate(fileno(stderr), 0) != 0 || fseek(stderr, 0, SEEK_SET) != 0)
        wrong("stderr", number);
}

static int check_calls(int kind, int all, const char **words) {
    const char *deep = getenv("FAULTS_DEEP");
    const long share = deep != NULL && *deep != '\0' ? 15 : 5;
    long number, failed = 0, step, died = 0;
    int status;

    if (freopen("said", "w", stderr) == NULL || setvbuf(stderr, NULL, _IONBF, 0) != 0 || run_program(words) != 0)
        wrong("the program fails without a fault", 0);
    for (size_t i = 0; i < n_outs; i++) {
        if ((whole[i] = read_bytes(outs[i], &length[i])) == NULL)
            wrong("no output", (long)i);
        remove(outs[i]);
    }
    check_words(0, 0);
    fail_kind = kind;
    fail_all = all;
    for (number = 1, step = 1; ; number += step) {
        fail_at = number;
        status = run_program(words);
        if (hooked_calls < number)
            break;
        failed++;
        died += status != 0;
        check_words(status, number);
        for (size_t i = 0; i < n_outs; i++)
            if (!is_whole(i, number) && status == 0)
                wrong("success without its output", number);
        check_folder(1, number);
        fail_at = 0; /* and again, without a fault: it goes on from what is there */
        if (run_program(words) != 0)
            wrong("no success after the fault is over", number);
        for (size_t i = 0; i < n_outs; i++) {
            if (!is_whole(i, number))
                wrong("no output after the fault is over", number);
            remove(outs[i]);
        }
        check_words(0, number);
        check_folder(0, number);
        step = 1 + number / share; /* the later ones are many of a kind */
    }
    printf("%ld faults among %ld calls, %ld of them errors\n", failed, hooked_calls, died);
    return 0;
}

int main(int argc, char **argv) {
    static const char *words[40];
    int i;

    if (argc == 3 && strcmp(argv[1], "file") == 0)
        return check_file(argv[2]);
    if (argc < 6)
        return 2;
    for (char *out = strtok(argv[4], ","); out != NULL && n_outs < MOST_OUTS; out = strtok(NULL, ","))
        outs[n_outs++] = out;
    for (i = 5; i < argc && i < 40; i++)
        words[i - 5] = argv[i];
    return check_calls(strcmp(argv[2], "memory") == 0 ? FAIL_MEMORY : FAIL_FILES, strcmp(argv[3], "all") == 0, words);
}
