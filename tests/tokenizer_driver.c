/* SPDX-License-Identifier: MIT */
/* Drives the static tokenizer functions of patch.c for test_tokenizer.py: requests come on stdin,
   answers go to stdout, u32 little-endian.

       driver SECTION encode   request: length, bytes
                               answer: number of pre-tokens, their lengths, number of ids, the ids
       driver SECTION points   answers for each code point in four contexts (see there); in front of
                               each 256 code points the number of bytes that their answers take
       driver SECTION tokens   for each id: length, bytes
       driver SECTION room     request as for encode; encodes with every smaller capacity too
       driver SECTION memory   request as for encode; answer: bytes of the tables, peak of encoding
       driver SECTION fail     request as for encode; lets every allocation fail in turn
       driver - read           request: length, a section; answer: a line, "ok" or what is wrong  */
#ifndef PATCH_SOURCE
#define PATCH_SOURCE "../patch.c"
#endif
#define PATCH_NO_MAIN
#include PATCH_SOURCE

#define D_VOCAB 50257u

/* An allocator that counts, and refuses the allocation number `refuse` (and all later ones). */
typedef struct Heap {
    long calls, live, refuse;
    int all_later;
    size_t bytes, peak;
} Heap;

static void *heap_alloc(size_t n, void *ctx) {
    Heap *h = ctx;
    long call = h->calls++;
    size_t *p;

    if (h->refuse >= 0 && (h->all_later ? call >= h->refuse : call == h->refuse))
        return NULL;
    p = malloc(n + 16); /* the size in front, for the count at free */
    if (p == NULL)
        return NULL;
    *p = n;
    h->live++;
    h->bytes += n;
    if (h->bytes > h->peak)
        h->peak = h->bytes;
    return (char *)p + 16;
}

static void heap_free(void *p, void *ctx) {
    Heap *h = ctx;
    size_t *start;

    if (p == NULL)
        return;
    start = (size_t *)(void *)((char *)p - 16);
    h->live--;
    h->bytes -= *start;
    free(start);
}

static void die(const char *what) {
    fprintf(stderr, "tokenizer_driver: %s\n", what);
    exit(3);
}

/* Write n words, which are turned into little-endian bytes where they stand. */
static void put_words(uint32_t *words, size_t n) {
    size_t i;

    for (i = 0; i < n; i++)
        set_little((unsigned char *)(words + i), words[i], 4);
    if (fwrite(words, 4, n, stdout) != n)
        die("cannot write");
}

static void put(uint32_t x) {
    put_words(&x, 1);
}

/* A request, in memory of exactly its size, so that a sanitizer sees any step outside. */
static unsigned char *get(size_t *n) {
    unsigned char four[4], *p;
    uint32_t length;

    if (fread(four, 4, 1, stdin) != 1)
        return NULL;
    length = four[0] | (uint32_t)four[1] << 8 | (uint32_t)four[2] << 16 | (uint32_t)four[3] << 24;
    p = malloc(length ? length : 1);
    if (p == NULL || fread(p, 1, length, stdin) != length)
        die("short request");
    *n = length;
    return p;
}

/* Encode and append the answer to words[]; returns how many it takes. */
static size_t answer(const Tokenizer *t, const unsigned char *s, size_t n, uint32_t *words,
                     const patch_allocator *a) {
    Walk w = {.text = s, .n = n};
    size_t n_words = 1, n_ids = 0, i;
    int *ids = malloc((n + 1) * sizeof *ids);
    patch_error error;

    words[0] = 0;
    while (walk_next(t, &w)) {
        words[0]++;
        words[n_words++] = (uint32_t)(w.at - w.from);
    }
    if (ids == NULL || tokenizer_encode(t, (const char *)s, n, ids, n, &n_ids, a, &error))
        die("encode failed");
    words[n_words++] = (uint32_t)n_ids;
    for (i = 0; i < n_ids; i++)
        words[n_words++] = (uint32_t)ids[i];
    free(ids);
    return n_words;
}

static void encode(const Tokenizer *t, const patch_allocator *a) {
    unsigned char *s;
    size_t n;

    while ((s = get(&n)) != NULL) {
        uint32_t *words = malloc((2 * n + 2) * 4);
        size_t n_words;

        if (words == NULL)
            die("no memory");
        n_words = answer(t, s, n, words, a);
        put_words(words, n_words);
        free(words);
        free(s);
    }
}

static size_t utf8_put(unsigned char *s, uint32_t c) {
    if (c < 0x80) {
        s[0] = (unsigned char)c;
        return 1;
    }
    if (c < 0x800) {
        s[0] = (unsigned char)(0xC0 | c >> 6);
        s[1] = (unsigned char)(0x80 | (c & 63));
        return 2;
    }
    if (c < 0x10000) {
        s[0] = (unsigned char)(0xE0 | c >> 12);
        s[1] = (unsigned char)(0x80 | (c >> 6 & 63));
        s[2] = (unsigned char)(0x80 | (c & 63));
        return 3;
    }
    s[0] = (unsigned char)(0xF0 | c >> 18);
    s[1] = (unsigned char)(0x80 | (c >> 12 & 63));
    s[2] = (unsigned char)(0x80 | (c >> 6 & 63));
    s[3] = (unsigned char)(0x80 | (c & 63));
    return 4;
}

/* Every code point c alone and as "acb", " c", "1c!": the pre-tokens of these tell its class. */
static void points(const Tokenizer *t, const patch_allocator *a) {
    static const char *const around[4][2] = {{"", ""}, {"a", "b"}, {" ", ""}, {"1", "!"}};
    static uint32_t words[256 * 4 * 16];
    uint32_t c;

    for (c = 0; c < 0x110000;) {
        size_t n_words = 0, k, n;

        do {
            for (k = 0; k < 4 && !(c >= 0xD800 && c < 0xE000); k++) {
                unsigned char s[8];

                n = strlen(around[k][0]);
                memcpy(s, around[k][0], n);
                n += utf8_put(s + n, c);
                memcpy(s + n, around[k][1], strlen(around[k][1]));
                n += strlen(around[k][1]);
                n_words += answer(t, s, n, words + n_words, a);
            }
        } while (++c % 256 != 0);
        put((uint32_t)n_words * 4);
        put_words(words, n_words);
    }
}

static void tokens(const Tokenizer *t) {
    uint32_t id;
    size_t n;

    for (id = 0; id < t->n_tokens; id++) {
        const char *p = tokenizer_token(t, (int)id, &n);

        put((uint32_t)n);
        if (p != NULL && fwrite(p, 1, n, stdout) != n)
            die("cannot write");
    }
    if (tokenizer_token(t, -1, &n) != NULL || n != 0 ||
        tokenizer_token(t, (int)t->n_tokens, &n) != NULL || n != 0)
        die("a token outside the vocabulary");
}

/* Too small a buffer: PATCH_E_SIZE, the number needed, the ids that fit and nothing beyond. */
static void room(const Tokenizer *t, const patch_allocator *a) {
    unsigned char *s;
    size_t n;

    while ((s = get(&n)) != NULL) {
        int *full = malloc((n + 1) * sizeof *full);
        size_t need = 0, got, k, i;
        patch_error error;

        if (full == NULL || tokenizer_encode(t, (const char *)s, n, full, n, &need, a, &error))
            die("encode failed");
        for (k = 0; k <= need; k++) {
            int *ids = malloc(k * sizeof *ids + 1);
            patch_status status = tokenizer_encode(t, (const char *)s, n, ids, k, &got, a, &error);

            if (status != (k < need ? PATCH_E_SIZE : PATCH_OK) || got != need)
                die("wrong status or count");
            for (i = 0; i < k; i++)
                if (ids[i] != full[i])
                    die("other ids in a smaller buffer");
            free(ids);
        }
        free(full);
        free(s);
    }
    puts("ok");
}

/* Refuse allocation 0, 1, 2 ... of reading and encoding, only that one and all from it on, until
   nothing is refused; each time the error must be MEMORY and nothing may leak. */
static void fail_each(const unsigned char *section, size_t n_section) {
    size_t n;
    unsigned char *s = get(&n);
    int *ids = malloc((n + 1) * sizeof *ids), all_later;
    long tried = 0;

    if (s == NULL || ids == NULL)
        die("no request");
    for (all_later = 0; all_later < 2; all_later++) {
        long k;

        for (k = 0;; k++, tried++) {
            Heap h = {0, 0, 0, 0, 0, 0};
            patch_allocator a = {heap_alloc, heap_free, NULL};
            patch_error error;
            patch_status status;
            Tokenizer t;
            size_t n_ids;

            h.refuse = k;
            h.all_later = all_later;
            a.ctx = &h;
            status = tokenizer_read(&t, section, n_section, D_VOCAB, "file", &a, &error);
            if (status == PATCH_OK)
                status = tokenizer_encode(&t, (const char *)s, n, ids, n, &n_ids, &a, &error);
            tokenizer_free(&t, &a); /* half built, too */
            if (h.live != 0)
                die("a leak");
            if (h.calls <= k && status == PATCH_OK)
                break;
            if (h.calls <= k || status != PATCH_E_MEMORY || error.code != PATCH_E_MEMORY)
                die("a refused allocation went unnoticed");
        }
    }
    printf("ok %ld\n", tried);
    free(ids);
    free(s);
}

/* Read each section that comes; one that is accepted must also encode a text, and decode it. */
static void read_each(const patch_allocator *a) {
    static const char text[] = "When John\xFF  and it's\n the<|endoftext|> 123 aaaa";
    unsigned char *section;
    size_t n;

    while ((section = get(&n)) != NULL) {
        Tokenizer t;
        patch_error error;
        int ids[sizeof text];
        size_t n_ids = 0, i, at = 0, length;

        if (tokenizer_read(&t, section, n, D_VOCAB, "file", a, &error)) {
            printf("%d %s: %s\n", (int)error.code, error.where, error.message);
        } else {
            if (tokenizer_encode(&t, text, sizeof text, ids, sizeof text, &n_ids, a, &error))
                die("encode failed");
            for (i = 0; i < n_ids; i++, at += length) {
                const char *p = tokenizer_token(&t, ids[i], &length);

                if (p == NULL || length > sizeof text - at || memcmp(p, text + at, length) != 0)
                    die("a text does not decode to itself");
            }
            if (at != sizeof text)
                die("a text does not decode to itself");
            puts("ok");
        }
        tokenizer_free(&t, a);
        free(section);
    }
}

int main(int argc, char **argv) {
    Heap h = {0, 0, -1, 0, 0, 0};
    patch_allocator a = {heap_alloc, heap_free, NULL};
    patch_error error;
    Tokenizer t;
    FILE *f;
    long size = 0;
    unsigned char *section = NULL;
    const char *mode = argc > 2 ? argv[2] : "";

    a.ctx = &h;
    if (strcmp(mode, "read") == 0) {
        read_each(&a);
        return h.live == 0 ? 0 : 3;
    }
    f = argc > 2 ? fopen(argv[1], "rb") : NULL;
    if (f == NULL || fseek(f, 0, SEEK_END) != 0 || (size = ftell(f)) < 0)
        die("usage: tokenizer_driver SECTION MODE");
    rewind(f);
    section = malloc((size_t)size + 1);
    if (section == NULL || fread(section, 1, (size_t)size, f) != (size_t)size)
        die("cannot read the section");
    fclose(f);
    if (strcmp(mode, "fail") == 0) {
        fail_each(section, (size_t)size);
        free(section);
        return 0;
    }
    if (tokenizer_read(&t, section, (size_t)size, D_VOCAB, argv[1], &a, &error)) {
        fprintf(stderr, "%s: %s\n", error.where, error.message);
        return 1;
    }
    if (strcmp(mode, "encode") == 0)
        encode(&t, &a);
    else if (strcmp(mode, "points") == 0)
        points(&t, &a);
    else if (strcmp(mode, "tokens") == 0)
        tokens(&t);
    else if (strcmp(mode, "room") == 0)
        room(&t, &a);
    else if (strcmp(mode, "memory") == 0) {
        size_t tables = sizeof t + h.bytes, n = 0;
        unsigned char *s = get(&n);
        int *ids = malloc((n + 1) * sizeof *ids);

        h.peak = h.bytes;
        if (s == NULL || ids == NULL ||
            tokenizer_encode(&t, (const char *)s, n, ids, n, &n, &a, &error))
            die("encode failed");
        put((uint32_t)tables);
        put((uint32_t)(h.peak - h.bytes));
        free(ids);
        free(s);
    } else
        die("unknown mode");
    tokenizer_free(&t, &a);
    free(section);
    return h.live == 0 ? 0 : 3;
}
