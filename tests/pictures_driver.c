/* SPDX-License-Identifier: MIT */
/* Draws what test_pictures.py and test_page.py ask for, through the static writers of patch.c.

   The request, on stdin, is binary, numbers in the machine's byte order: u32 is a number; a text is
   its length (0xffffffff: NULL) and its bytes; f64 is a double.

       driver svg|json|csv|screen|html|scale <REQUEST >PICTURE

   svg    a table: texts command, name, metric, direction; u32 normalized; u32 has_baseline; f64
          clean, corrupted, range; u32 rank; per axis: text name, u32 size, u32 labelled, `size`
          texts where labelled; u32 n_tokens (0xffffffff: none), the tokens; the values as f64;
          u32 has_band, the band as f64
   json, csv   a table
   screen      a table, u32 columns, u32 colours
   html   texts title, settings; u32 n, n paragraphs; u32 n, n tables; u32 n, n prompt texts, u32
          has_corrupted, n pairs of f64; u32 prompts, heads, tokens of the attention, head names,
          tokens as texts, and the patterns as f64
   scale  a table, u32 kind, u32 n, n f64: a line "rrggbb" for each value  */
#ifndef PATCH_SOURCE
#define PATCH_SOURCE "../patch.c"
#endif
#define PATCH_NO_MAIN
#define PATCH_WRITERS
#include PATCH_SOURCE

/* What was read stays until the program ends: the writers themselves allocate nothing. */
static void **kept;
static size_t n_kept;

static void *keep(size_t n, size_t size) {
    void *p = calloc(n ? n : 1, size), **more = realloc(kept, (n_kept + 1) * sizeof *kept);

    if (p == NULL || more == NULL)
        exit(3);
    kept = more;
    kept[n_kept++] = p;
    return p;
}

static void get(void *to, size_t n) {
    if (n > 0 && fread(to, 1, n, stdin) != n) {
        fprintf(stderr, "pictures_driver: short request\n");
        exit(3);
    }
}

static size_t get_number(void) {
    uint32_t n;

    get(&n, sizeof n);
    return n;
}

static double get_double(void) {
    double x;

    get(&x, sizeof x);
    return x;
}

/* A text in memory of exactly its size and a NUL, so that a sanitizer sees any step outside. */
static char *get_text(size_t *length) {
    size_t n = get_number();
    char *text;

    if (length != NULL)
        *length = n == 0xffffffffu ? 0 : n;
    if (n == 0xffffffffu)
        return NULL;
    text = keep(n + 1, 1);
    get(text, n);
    return text;
}

static char **get_texts(size_t n, size_t *lengths) {
    char **texts = keep(n, sizeof *texts);
    size_t i;

    for (i = 0; i < n; i++)
        texts[i] = get_text(lengths != NULL ? &lengths[i] : NULL);
    return texts;
}

/* Pointers to const from pointers that are not: C wants that said entry by entry. */
static const char *const *as_const(char **texts, size_t n) {
    const char **copy = keep(n, sizeof *copy);
    size_t i;

    for (i = 0; i < n; i++)
        copy[i] = texts[i];
    return copy;
}

static double *get_doubles(size_t n) {
    double *x = keep(n, sizeof *x);

    get(x, n * sizeof *x);
    return x;
}

static Table get_table(void) {
    Table t;
    int a;

    memset(&t, 0, sizeof t);
    t.command = get_text(NULL);
    t.name = get_text(NULL);
    t.metric = get_text(NULL);
    t.direction = get_text(NULL);
    t.normalized = (int)get_number();
    t.has_baseline = (int)get_number();
    t.clean = get_double();
    t.corrupted = get_double();
    t.range = get_double();
    t.rank = (int)get_number();
    for (a = 0; a < t.rank; a++) {
        t.axis[a].name = get_text(NULL);
        t.axis[a].size = get_number();
        if (get_number())
            t.axis[a].labels = get_texts(t.axis[a].size, NULL);
    }
    t.n_tokens = get_number();
    if (t.n_tokens == 0xffffffffu) {
        t.n_tokens = 0;
    } else {
        size_t *bytes = keep(t.n_tokens, sizeof *bytes);
        t.tokens = as_const(get_texts(t.n_tokens, bytes), t.n_tokens);
        t.token_bytes = bytes;
    }
    t.values = get_doubles(table_size(&t));
    if (get_number())
        t.band = get_doubles(table_size(&t));
    return t;
}

static void draw_page(void) {
    Page page;
    Table *tables;
    size_t i, *bytes, n;
    float *patterns;

    memset(&page, 0, sizeof page);
    page.title = get_text(NULL);
    page.json_settings = get_text(NULL);
    page.n_prose = get_number();
    page.prose = as_const(get_texts(page.n_prose, NULL), page.n_prose);
    page.n_tables = get_number();
    page.tables = tables = keep(page.n_tables, sizeof *tables);
    for (i = 0; i < page.n_tables; i++)
        tables[i] = get_table();
    page.n_examples = get_number();
    page.prompts = as_const(get_texts(page.n_examples, NULL), page.n_examples);
    page.has_corrupted = (int)get_number();
    page.differences = get_doubles(2 * page.n_examples);
    page.n_attention = get_number();
    page.n_heads = get_number();
    page.n_tokens = get_number();
    page.head_names = as_const(get_texts(page.n_heads, NULL), page.n_heads);
    n = page.n_attention * page.n_tokens;
    bytes = keep(n, sizeof *bytes);
    page.tokens = as_const(get_texts(n, bytes), n);
    page.token_bytes = bytes;
    n *= page.n_heads * page.n_tokens;
    patterns = keep(n, sizeof *patterns);
    for (i = 0; i < n; i++)
        patterns[i] = (float)get_double();
    page.attention = patterns;
    write_html(stdout, &page);
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";

    if (strcmp(what, "svg") == 0 || strcmp(what, "json") == 0 || strcmp(what, "csv") == 0) {
        Table t = get_table();

        (*what == 's' ? write_svg : *what == 'j' ? write_json : write_csv)(stdout, &t);
    } else if (strcmp(what, "screen") == 0) {
        Table t = get_table();
        Screen screen = {0, 0};

        screen.columns = (int)get_number();
        screen.colours = (int)get_number();
        write_screen(stdout, &t, screen);
    } else if (strcmp(what, "html") == 0) {
        draw_page();
    } else if (strcmp(what, "scale") == 0) {
        Table t = get_table();
        size_t kind = get_number(), n = get_number();
        Scale s = scale_of(&t, kind);

        for (; n > 0; n--) {
            unsigned char c[3];

            scale_colour(&s, get_double(), c);
            printf("%02x%02x%02x\n", c[0], c[1], c[2]);
        }
    } else {
        fprintf(stderr, "usage: pictures_driver svg|json|csv|screen|html|scale <request\n");
        return 2;
    }
    while (n_kept > 0)
        free(kept[--n_kept]);
    free(kept);
    return fflush(stdout) != 0 || ferror(stdout) ? 3 : 0;
}
