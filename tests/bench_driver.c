/* SPDX-License-Identifier: MIT */
/* The measurements that bench.py cannot take from outside, one line each:

       bench_driver peak SECONDS THREADS       GFLOP/s of multiply-adds that never leave the registers
       bench_driver gemm ROWS K N SECONDS      GFLOP/s of one product through `linear`, one thread
       bench_driver tokens FILE < TEXT         seconds that encoding the text takes  */
#define PATCH_NO_MAIN
#include "../patch.c"

#ifdef AVX512
/* 24 chains of multiply-adds: as many as the tile kernel has, enough to hide their latency. */
#define PEAK(name, target, Vec)                                                                    \
    target static double name(double seconds) {                                                    \
        Vec sum[24] = {{0}}, a = {0}, b = {0};                                                     \
        double started = now(), flops = 0;                                                         \
        float *out = (float *)&sum[0];                                                             \
        size_t i, j;                                                                               \
                                                                                                   \
        for (i = 0; i < sizeof(Vec) / 4; i++)                                                      \
            ((float *)&a)[i] = ((float *)&b)[i] = 0.5f + (float)seconds * 1e-9f;                   \
        while (now() - started < seconds) {                                                        \
            for (i = 0; i < 20000; i++)                                                            \
                _Pragma("GCC unroll 24") for (j = 0; j < 24; j++)                                  \
                    sum[j] = sum[j] * a + b;                                                       \
            flops += 20000.0 * 24 * 2 * (sizeof(Vec) / 4);                                         \
        }                                                                                          \
        seconds = now() - started;                                                                 \
        for (i = j = 0; i < 24 * sizeof(Vec) / 4; i++)                                             \
            j += out[i] > 1e30f;                                                                   \
        return flops / seconds / 1e9 + (double)j * 1e-30;                                          \
    }
PEAK(peak_avx512, AVX512, Vec16)
PEAK(peak_avx2, AVX2, Vec8)
#define HAVE_PEAK 1
#endif

static double peak(double seconds) {
#ifdef HAVE_PEAK
    return strcmp(choose_kernels()->name, "avx512") == 0 ? peak_avx512(seconds) : peak_avx2(seconds);
#else
    return 0 * seconds;
#endif
}

/* A Linear whose matrix is already in panels, as in a folded file, so that only the product counts. */
static double gemm(size_t rows, size_t k, size_t n, double seconds) {
    const patch_allocator heap = {default_alloc, default_free, NULL};
    Pool pool = pool_begin(&heap, SIZE_MAX / 2);
    Model m;
    Tensor t;
    Linear l;
    Rows r;
    Work w;
    size_t i, panels = (n + PANEL - 1) / PANEL * PANEL * k;
    float *b = pool_take(&pool, panels + 16, 4), *x = pool_take(&pool, rows * k, 4), *y = pool_take(&pool, rows * n, 4);
    double started, flops = 0;

    memset(&m, 0, sizeof m);
    memset(&t, 0, sizeof t);
    memset(&l, 0, sizeof l);
    for (i = 0; i < panels; i++)
        b[i] = (float)(i * 2654435761u % 1000) / 1000 - 0.5f;
    for (i = 0; i < rows * k; i++)
        x[i] = (float)(i * 2654435761u % 997) / 997 - 0.5f;
    m.allocator = heap;
    m.kernels = choose_kernels();
    m.tile = m.kernels->tile;
    m.threads = 1;
    m.max_k = k > n ? k : n;
    m.file.M = m.file.C = m.max_k;
    m.file.V = 1;
    m.file.map.bytes = (const unsigned char *)b;
    t.type = TYPE_PANELS;
    t.rank = 2;
    t.rows = (uint32_t)k;
    t.cols = (uint32_t)n;
    t.bytes = panels * 4;
    l.k = l.rows = k;
    l.n = n;
    l.matrix = &t;
    r.x = x;
    r.ldx = k;
    r.index = NULL;
    r.n = rows;
    r.y = y;
    r.ldy = n;
    if (work_begin(&w, &m, &pool, NULL, NULL))
        return 0;
    linear(&w, &l, &r, NULL, NULL);
    started = now();
    while (now() - started < seconds) {
        linear(&w, &l, &r, NULL, NULL);
        flops += 2.0 * (double)rows * (double)k * (double)n;
    }
    flops /= (now() - started) * 1e9;
    pool_end(&pool, PATCH_OK);
    return flops;
}

static double tokens(const char *path) {
    patch_model *m;
    patch_error e;
    static char text[1 << 20];
    static int ids[(1 << 20) + 1];
    size_t n = fread(text, 1, sizeof text, stdin), got;
    double started;

    if (patch_model_open(path, NULL, &m, &e))
        return -1;
    started = now();
    if (patch_encode(m, text, n, 0, ids, n + 1, &got, &e))
        return -1;
    started = now() - started;
    patch_model_free(m);
    return started;
}

int main(int argc, char **argv) {
    if (argc == 4 && strcmp(argv[1], "peak") == 0) {
        double sum = 0;
        const int threads = atoi(argv[3]);

        PARALLEL(threads, reduction(+ : sum))
        for (int i = 0; i < threads; i++)
            sum += peak(atof(argv[2]));
        printf("%.1f\n", sum);
    } else if (argc == 6 && strcmp(argv[1], "gemm") == 0)
        printf("%.1f\n", gemm((size_t)atoi(argv[2]), (size_t)atoi(argv[3]), (size_t)atoi(argv[4]), atof(argv[5])));
    else if (argc == 3 && strcmp(argv[1], "tokens") == 0)
        printf("%.3f\n", tokens(argv[2]));
    else
        return 2;
    return 0;
}
