/* SPDX-License-Identifier: MIT
   patch.c - actpatch: activation patching for GPT-2 in one C file, libc and libm only.

   ==== 0. Contract ================================================================================
   A checkpoint (made flat by convert_weights.py) goes in; out come tokens, every activation by its
   TransformerLens hook name, metrics, and the sweeps of transformer_lens.patching. Every number is
   held against TransformerLens in float64 by the tests, and errs no more than twice what
   TransformerLens itself errs in float32. patch.h is the library's interface; chapter 13 the
   command line.

   It does not: train, sample, run other architectures than GPT-2, use a GPU, batch prompts of
   different lengths in one sweep, or keep anything between two calls.

   Contents. Search for "==== N." to get there; each chapter uses only what stands before it.
     1 platform            5 kernels              9 metrics
     2 errors, memory      6 weight processing   10 patching
     3 model file          7 hook points         11 further analyses
     4 tokenizer           8 the engine          12 writers   13 command line   A Unicode tables
   To understand GPT-2: 0, 6, 7. To understand the speed: 5, 8. To understand patching: 7, 8, 10.
   Chapters 0 to 10 are the core (PATCH_CORE leaves the rest out), 13 goes with PATCH_NO_MAIN.

   Dimensions, everywhere:
     B examples  T tokens of a prompt  L layers  H heads  C d_model  D = C / H d_head  M d_mlp
     V d_vocab  R rows of a stage (chapter 8).  Arrays are row-major, the last index fastest.

   The forward pass of one layer, with the hook points on its arrows (blocks.L. left out):

     tokens --hook_embed--(+)--hook_pos_embed-- positions
                           |
                     hook_resid_pre -----------------------------------------------.
                           |                                                        |
                LayerNorm: ln1.hook_scale, ln1.hook_normalized                      |
                           |                                                        |
             W_Q, W_K, W_V: attn.hook_q, hook_k, hook_v   [H,D]                     |
                           |                                                        |
             q . k / sqrt(D), masked: attn.hook_attn_scores   [H,T,T]               |
                           |  softmax                                               |
                     attn.hook_pattern   [H,T,T]                                    |
                           |  times v                                               |
                     attn.hook_z   [H,D] --W_O--> attn.hook_result   [H,C]          |
                           |  sum over heads, + b_O                                 |
                     hook_attn_out -----------------------------------------------(+)
                           .------------------------------ hook_resid_mid -----------'
                           |                                      |
                LayerNorm: ln2.hook_scale, ln2.hook_normalized    |
                           |                                      |
             W_in: mlp.hook_pre  [M] --gelu--> mlp.hook_post      |
                           |  W_out                               |
                     hook_mlp_out -------------------------------(+)
                                                                  |
                     hook_resid_post = the next layer's hook_resid_pre; after the last layer
                     ln_final.hook_scale, ln_final.hook_normalized --W_U--> logits   [V]

   Numbers. Activations are float. Every sum has one order, whatever the threads, groups or machines
   it is split over: within one build and tier (chapter 5) the same question gives the same bits.
   Means, variances, folding and metrics are taken in double. -ffast-math breaks all of this.

   What has bitten: Conv1D weights are [in,out]. gelu_new is the tanh form. Epsilon is inside the
   root. A LayerNorm's bias meets the unscaled weight. The pre-tokenizer's \s+(?!\S). BOS is
   <|endoftext|>. Merge rank is not longest match. hook_normalized is behind the weight and bias
   where ln is not folded.

   Sources. GPT-2: Radford et al. 2019. Hook names, processing, sweeps: TransformerLens 2.18.
   Patching: Vig et al. 2020 (arXiv:2004.12265), Wang et al. 2022 (IOI, arXiv:2211.00593),
   Heimersheim and Nanda 2024 (arXiv:2404.15255). Causal tracing: Meng et al. 2022
   (arXiv:2202.05262). */


/* ==== 1. Platform ================================================================================
   What is asked of the system: files, the clock, threads. (Chapter 5 asks what the processor has,
   12 and 13 what files and terminals are.) A build without any of it still works: files are then
   read instead of mapped, the clock is the processor's, and there is one thread. PATCH_BARE is for
   machines that have neither files nor a heap: a model is opened from memory, with an allocator of
   the caller's (tests/embedded). */

#if !defined(_WIN32) && !defined(PATCH_BARE) && (defined(__unix__) || defined(__APPLE__))
#define HAS_POSIX 1
#define _DEFAULT_SOURCE 1    /* madvise, readlink, stat */
#define _FILE_OFFSET_BITS 64 /* files over 2 GB where long has 32 bits */
#else
#define HAS_POSIX 0
#endif
#if HAS_POSIX && !defined(PATCH_NO_MMAP)
#define PATCH_MMAP 1
#endif
#ifdef PATCH_CORE
#define PATCH_NO_MAIN 1 /* the program stands on all chapters */
#endif

#include "patch.h"

#include <errno.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if HAS_POSIX
#include <sys/stat.h>
#include <unistd.h>
#endif
#ifdef PATCH_MMAP
#include <sys/mman.h>
#endif

#ifdef _WIN32 /* Its own functions take the ANSI code page; names are UTF-8 here, as everywhere. */
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#include <fcntl.h>
#include <io.h>
#include <shellapi.h>
#include <sys/stat.h>
#undef OUT /* an empty word there, a region of a row in chapter 8 */

enum { WIDE_ROOM = 4096 }; /* UTF-16 units of a path */

static const wchar_t *wide(const char *utf8, wchar_t out[WIDE_ROOM]) {
    if (MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, utf8, -1, out, WIDE_ROOM) == 0)
        *out = 0; /* the empty name, which no file has */
    return out;
}

/* fopen; x is C11's, which the system's old library does not know. */
static FILE *open_utf8(const char *path, const char *mode) {
    wchar_t name[WIDE_ROOM], how[WIDE_ROOM];
    const int made = strchr(mode, 'x') == NULL ? 0 :
        _wopen(wide(path, name), _O_CREAT | _O_EXCL | _O_RDWR | _O_BINARY, _S_IREAD | _S_IWRITE);

    if (made < 0)
        return NULL;
    return made > 0 ? _fdopen(made, "wb") : _wfopen(wide(path, name), wide(mode, how));
}

static int remove_utf8(const char *path) {
    wchar_t name[WIDE_ROOM];
    return _wremove(wide(path, name));
}

/* rename as POSIX has it: over a file that is there. */
static int rename_utf8(const char *from, const char *to) {
    wchar_t old[WIDE_ROOM], new[WIDE_ROOM];
    errno = EACCES;
    return MoveFileExW(wide(from, old), wide(to, new), MOVEFILE_REPLACE_EXISTING) ? 0 : -1;
}
#define fopen open_utf8
#define remove remove_utf8
#define rename rename_utf8
#endif

/* PARALLEL(threads, schedule(...)) in front of a loop: OpenMP's pragma where the compiler has it.
   now() counts seconds: of the wall clock with OpenMP, of the processor without. */
#ifdef _OPENMP
#include <omp.h>
#define OMP_TEXT(...) _Pragma(#__VA_ARGS__)
#define OMP_WORDS(...) OMP_TEXT(__VA_ARGS__)
#define PARALLEL(threads, how) OMP_WORDS(omp parallel for num_threads(threads) how)
#define now() omp_get_wtime()
#define max_threads() omp_get_max_threads()
#define thread_number() omp_get_thread_num()
enum { THREAD_CEILING = 256 };
#else
#define PARALLEL(threads, how) (void)(threads);
#define now() ((double)clock() / CLOCKS_PER_SEC)
#define max_threads() 1
#define thread_number() 0
enum { THREAD_CEILING = 1 };
#endif

#if defined(__GNUC__)
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#else
#define ALWAYS_INLINE static inline
#endif

/* A file's bytes: mapped, or the caller's memory, or (bytes == NULL) to be read piece by piece. */
typedef struct Map {
    const unsigned char *bytes;
    size_t size;
    int mapped;
} Map;

/* Is there an ordinary file of this name, or nothing? 0 with errno: to open a pipe may wait for
   ever, and to rename over a device or a folder would put a file in its place. */
static int is_ordinary(const char *path) {
#if HAS_POSIX
    struct stat facts;
    if (stat(path, &facts) == 0 && !S_ISREG(facts.st_mode)) {
        errno = S_ISDIR(facts.st_mode) ? EISDIR : EINVAL;
        return 0;
    }
#endif
    (void)path;
    return 1;
}

#ifndef PATCH_NO_MAIN
/* Do two names stand for one file? */
static int is_same_file(const char *a, const char *b) {
#ifdef PATCH_MMAP
    struct stat one, other;
    return stat(a, &one) == 0 && stat(b, &other) == 0 && one.st_dev == other.st_dev &&
           one.st_ino == other.st_ino;
#else
    return strcmp(a, b) == 0;
#endif
}
#endif

/* Map the whole of an ordinary file; 0 with errno where the system refuses. Without mmap only the
   size is found out, and map_read does the rest. */
static int map_open(const char *path, Map *map) {
    *map = (Map){NULL, 0, 0};
#ifdef PATCH_BARE
    (void)path;
    errno = ENOENT;
    return 0;
#else
    FILE *file = is_ordinary(path) ? fopen(path, "rb") : NULL;
    if (file == NULL && errno == EISDIR)
        errno = EINVAL; /* no ordinary file, whatever else it is */
    if (file == NULL)
        return 0;
#ifdef PATCH_MMAP
    struct stat facts;
    if (fstat(fileno(file), &facts) == 0 && S_ISREG(facts.st_mode) && facts.st_size > 0) {
        const size_t size = (size_t)facts.st_size;
        void *bytes = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fileno(file), 0);
        if (bytes != MAP_FAILED)
            *map = (Map){bytes, size, 1};
    } else
        errno = EINVAL;
#else
    const long size = fseek(file, 0, SEEK_END) == 0 ? ftell(file) : -1;
    if (size > 0)
        map->size = (size_t)size;
    else
        errno = EINVAL;
#endif
    const int saved = errno;
    fclose(file);
    errno = saved;
    return map->size > 0;
#endif
}

static void map_close(Map *map) {
#ifdef PATCH_MMAP
    if (map->mapped)
        munmap((void *)(uintptr_t)map->bytes, map->size);
#endif
    map->mapped = 0;
}

/* Give the pages of n bytes back to the system: they stay readable and come from the file again. */
static void map_release(const Map *map, const void *bytes, size_t n) {
#ifdef PATCH_MMAP
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t first = ((uintptr_t)bytes + page - 1) / page * page;
    const uintptr_t last = ((uintptr_t)bytes + n) / page * page;
    if (map->mapped && last > first)
        madvise((void *)first, last - first, MADV_DONTNEED);
#else
    (void)map, (void)bytes, (void)n;
#endif
}

/* Copy n bytes from byte `offset` of a file that is not mapped; 0 where that many are not there.
   The file is opened anew each time, so that threads need not share a position. */
static int map_read(const char *path, size_t offset, size_t n, void *out) {
#ifdef PATCH_BARE
    (void)path, (void)offset, (void)n, (void)out;
    return 0;
#else
    FILE *file = offset <= (size_t)LONG_MAX ? fopen(path, "rb") : NULL;
    const int ok = file != NULL && fseek(file, (long)offset, SEEK_SET) == 0 &&
                   fread(out, 1, n, file) == n;
    if (file != NULL)
        fclose(file);
    return ok;
#endif
}

/* ==== 2. Errors, checked sizes, memory ======================================================== */

/* Fill *e (NULL: not wanted) and return code. The message is "what is wrong; what to do". */
static patch_status fail(patch_error *e, patch_status code, const char *where, const char *format,
                         ...) {
    va_list values;
    va_start(values, format);
    if (e != NULL) {
        e->code = code;
        snprintf(e->where, sizeof e->where, "%s", where);
        vsnprintf(e->message, sizeof e->message, format, values);
    }
    va_end(values);
    return code;
}

static patch_status no_memory(patch_error *e, const char *where, size_t bytes) {
    return fail(e, PATCH_E_MEMORY, where,
                "no memory for %.0f %s; free some, use fewer prompts or set --max-memory",
                bytes < 10000000 ? (double)bytes : (double)bytes / 1e6,
                bytes < 10000000 ? "bytes" : "MB");
}

/* a * b and a + b into *out; 0 where they do not fit a size_t. */
static int size_times(size_t a, size_t b, size_t *out) {
    if (b != 0 && a > SIZE_MAX / b)
        return 0;
    *out = a * b;
    return 1;
}
static int size_plus(size_t a, size_t b, size_t *out) {
    if (a > SIZE_MAX - b)
        return 0;
    *out = a + b;
    return 1;
}

static void *default_alloc(size_t bytes, void *ctx) {
    (void)ctx;
#ifdef PATCH_BARE /* then malloc is not even linked */
    return (void)bytes, NULL;
#else
    return malloc(bytes);
#endif
}
static void default_free(void *memory, void *ctx) {
    (void)ctx;
#ifdef PATCH_BARE
    (void)memory;
#else
    free(memory);
#endif
}
static const patch_allocator HEAP = {default_alloc, default_free, NULL};

/* n elements of `size` bytes, not zeroed, never NULL for 0 bytes; NULL where the product overflows
   or the allocator gives nothing. give() accepts NULL. */
static void *take(const patch_allocator *a, size_t n, size_t size) {
    size_t bytes;
    return size_times(n, size, &bytes) ? a->alloc(bytes ? bytes : 1, a->ctx) : NULL;
}
static void *take_zeroed(const patch_allocator *a, size_t n, size_t size) {
    void *p = take(a, n, size);
    return p ? memset(p, 0, n * size) : NULL;
}
static void give(const patch_allocator *a, void *p) {
    if (p != NULL)
        a->free(p, a->ctx);
}

/* The memory of one call: everything taken from a pool is freed at once, so that no function needs
   a path for cleaning up. `limit` bounds what it holds; beyond, it gives nothing. */
typedef union Block {
    struct { union Block *next, *last; size_t bytes; } link;
    char aligned[64]; /* what follows a block keeps the allocator's alignment */
} Block;

typedef struct Pool {
    const patch_allocator *a;
    Block *blocks;
    size_t bytes, limit, peak; /* held, allowed, and the most that was held */
    size_t refused;            /* the request that could not be met */
} Pool;

/* n elements of `size` bytes, not zeroed, or NULL. */
static void *pool_raw(Pool *p, size_t n, size_t size) {
    size_t bytes = SIZE_MAX;
    Block *b = NULL;
    if (size_times(n, size, &bytes) && size_plus(bytes, sizeof *b, &bytes) &&
        bytes <= p->limit - p->bytes)
        b = p->a->alloc(bytes, p->a->ctx);
    if (b == NULL) {
        p->refused = bytes;
        return NULL;
    }
    *b = (Block){.link = {p->blocks, NULL, bytes}};
    if (p->blocks != NULL)
        p->blocks->link.last = b;
    p->blocks = b;
    p->bytes += bytes;
    p->peak = p->bytes > p->peak ? p->bytes : p->peak;
    return b + 1;
}

/* The same, zeroed. */
static void *pool_take(Pool *p, size_t n, size_t size) {
    void *piece = pool_raw(p, n, size);
    return piece ? memset(piece, 0, n * size) : NULL;
}

/* Give one piece back early; NULL is fine. */
static void pool_give(Pool *p, void *piece) {
    if (piece == NULL)
        return;
    Block *b = (Block *)piece - 1;
    *(b->link.last ? &b->link.last->link.next : &p->blocks) = b->link.next;
    if (b->link.next != NULL)
        b->link.next->link.last = b->link.last;
    p->bytes -= b->link.bytes;
    p->a->free(b, p->a->ctx);
}

static Pool pool_begin(const patch_allocator *a, size_t limit) {
    return (Pool){.a = a, .limit = limit};
}

/* Free everything, and pass a status on. */
static patch_status pool_end(Pool *p, patch_status s) {
    while (p->blocks != NULL)
        pool_give(p, p->blocks + 1);
    return s;
}

/* ==== 3. Model file ==============================================================================
   One flat file: head, table, tokenizer, tensors. Numbers are little-endian; the tokenizer and each
   tensor begin at multiples of 64, with zeros in the gaps; nothing follows the last tensor.

   Head, 128 bytes (CRC-32: zlib's):
      0  8 bytes "ACTPATCH"   28  u32 n_ctx, N                        64  u64 the tokenizer's length
      8  u32 version, 1       32  u32 d_vocab, V                      72  u64 length of the file
     12  u32 n_layers, L      36  u32 0 gelu_new, 1 gelu, 2 relu      80  u32 CRC-32 of the table
     16  u32 n_heads, H       40  f64 LayerNorm's epsilon             84  u32 and of the tokenizer
     20  u32 d_model, C       48  u32 1: layer l's scores / (l + 1)   88  u32 processing, 0: raw
     24  u32 d_mlp, M         52  u32 number of tensors               92  32 zero bytes
                              56  u64 the tokenizer's place, 0: none 124  u32 CRC-32 of bytes 0..123
   Table, 80 bytes a tensor:
      0  48 bytes name, zeros behind it     56  u32 rows              64  u64 byte where it begins
     48  u32 0 f32, 1 f16, 2 panels         60  u32 columns; 1 of a   72  u32 CRC-32 of its bytes
     52  u32 rank, 1 or 2                        vector               76  u32 0

   Tensors of a raw file, in this order: two of outer_rows; raw_rows for each layer, with "h.LAYER."
   in front of the name; the rest of outer_rows, lm_head.weight only where the unembedding is not
   wte.weight. Matrices are [in,out], row-major, and f32 or f16; vectors are f32.
   A processed file (`actpatch fold`) has folded_rows instead of raw_rows, and in `processing` bit 5
   and the steps that were done: bit 0 fold_ln, 1 center_writing_weights, 2 center_unembed,
   3 fold_value_biases, 4 refactor_factored_attn_matrices. Its layers' matrices are panels of 16
   columns, [ceil(out/16)][in][16], zeros beyond the last: read in place. All else stays raw. */

/* Rows and columns by their letter in the head, 3: 3 C, -: it is a vector; then the name. */
static const char *const outer_rows[] = {
    "VC wte.weight", "NC wpe.weight", "C- ln_f.weight", "C- ln_f.bias", "VC lm_head.weight"};
static const char *const raw_rows[] = {
    "C- ln_1.weight", "C- ln_1.bias", "C3 attn.c_attn.weight", "3- attn.c_attn.bias",
    "CC attn.c_proj.weight", "C- attn.c_proj.bias", "C- ln_2.weight", "C- ln_2.bias",
    "CM mlp.c_fc.weight", "M- mlp.c_fc.bias", "MC mlp.c_proj.weight", "C- mlp.c_proj.bias"};
static const char *const folded_rows[] = {
    "C- ln_1.weight", "C- ln_1.bias", "CC attn.W_Q", "C- attn.b_Q", "CC attn.W_K", "C- attn.b_K",
    "CC attn.W_V", "C- attn.b_V", "CC attn.W_O", "C- attn.b_O", "C- ln_2.weight", "C- ln_2.bias",
    "CM mlp.W_in", "M- mlp.b_in", "MC mlp.W_out", "C- mlp.b_out"};
enum { /* positions in these, ln_1's is 0; a bias stands behind its weights */
    RAW_QKV = 2, RAW_O = 4, RAW_LN2_W = 6, RAW_IN = 8, RAW_OUT = 10, RAW_PER_LAYER = 12,
    FOLD_Q = 2, FOLD_K = 4, FOLD_V = 6, FOLD_O = 8, FOLD_LN2_W = 10, FOLD_IN = 12, FOLD_OUT = 14,
    FOLD_PER_LAYER = 16};
enum { /* bits of `processing` */
    DID_FOLD_LN = 1, DID_CENTER_WRITING = 2, DID_CENTER_UNEMBED = 4, DID_FOLD_VALUES = 8,
    DID_REFACTOR = 16, DID_FOLD = 32};
enum { TYPE_F32, TYPE_F16, TYPE_PANELS }; /* of a tensor: below its rank, or panels */
enum { HEAD_BYTES = 128, TABLE_ROW = 80, ALIGNMENT = 64, PANEL = 16, MAX_HEADS = 256 };

typedef struct Tensor { /* a row of the table */
    char name[48];                        /* zeros behind it */
    uint32_t type, rank, rows, cols, crc; /* of a vector cols is 1 */
    size_t offset, bytes;                 /* in the file */
} Tensor;

/* What a file says, checked. The tensors' bytes stay where they are. */
typedef struct ModelFile {
    Map map;                    /* the bytes, or only their number where they are read in pieces */
    const char *path;           /* "memory" where the bytes are the caller's */
    const unsigned char *front; /* all before the first tensor, a copy where nothing is mapped */
    size_t L, H, C, D, M, N, V; /* layers, heads, d_model, d_head, d_mlp, n_ctx, d_vocab */
    size_t n_tensors, per_layer, untied, inverse_layer, tokenizer_at, tokenizer_bytes;
    uint32_t act_fn, processing;
    double eps;                 /* LayerNorm's epsilon */
    Tensor *tensors;            /* [n_tensors] */
} ModelFile;

static uint32_t get_u32(const unsigned char *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}
static uint64_t get_u64(const unsigned char *p) {
    return get_u32(p) | (uint64_t)get_u32(p + 4) << 32;
}
static uint64_t align_up(uint64_t byte) { /* to the next multiple of 64 */
    return (byte + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static const unsigned char GAP[64]; /* what stands between two pieces: up to 63 zeros */

/* zlib's CRC-32 of n more bytes; begin with 0. Four bits at a time: 16 words of table instead of
   1,024, at a third of the speed, for files that are checked once. */
static const uint32_t crc_table[16] = {
    0x00000000, 0x1DB71064, 0x3B6E20C8, 0x26D930AC, 0x76DC4190, 0x6B6B51F4, 0x4DB26158, 0x5005713C,
    0xEDB88320, 0xF00F9344, 0xD6D6A3E8, 0xCB61B38C, 0x9B64C2B0, 0x86D3D2D4, 0xA00AE278, 0xBDBDF21C};
static uint32_t crc32_of(uint32_t crc, const unsigned char *p, size_t n) {
    for (crc = ~crc; n > 0; n--) {
        crc ^= *p++; /* its low half goes first */
        crc = crc >> 4 ^ crc_table[crc & 15];
        crc = crc >> 4 ^ crc_table[crc & 15];
    }
    return ~crc;
}

/* IEEE half to float, exactly: every half is a float. */
static float half_to_float(uint32_t half) {
    const uint32_t exponent = half >> 10 & 31, mantissa = half & 0x3FF, sign = half >> 15 << 31;
    const uint32_t bits = sign | (exponent < 31 ? exponent + 112 : 255) << 23 | mantissa << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    return exponent > 0 ? value : (float)mantissa * (sign ? -0x1p-24f : 0x1p-24f); /* subnormal */
}

/* Tensor `which` (RAW_... or FOLD_...) of a layer. */
static const Tensor *layer_tensor(const ModelFile *f, size_t layer, size_t which) {
    return &f->tensors[2 + layer * f->per_layer + which]; /* 2: wte and wpe */
}
static const Tensor *norm_tensor(const ModelFile *f, size_t layer, int second) { /* or ln_1's */
    const size_t ln2 = f->processing ? (size_t)FOLD_LN2_W : (size_t)RAW_LN2_W;
    return layer_tensor(f, layer, second ? ln2 : 0);
}
static const Tensor *tail_tensor(const ModelFile *f, size_t which) { /* 0, 1: ln_f's */
    return layer_tensor(f, f->L, which);
}
static const Tensor *unembedding(const ModelFile *f) { /* [V,C]: one row a token */
    return f->untied ? tail_tensor(f, 2) : &f->tensors[0]; /* lm_head or wte */
}

/* Tensor number i of a file with these sizes, as far as they say: of types f16 is not thought of.
   */
static Tensor expected_tensor(const ModelFile *f, size_t i) {
    static const char letters[] = "VNMC3-";
    const size_t sizes[] = {f->V, f->N, f->M, f->C, 3 * f->C, 1}; /* by their letter */
    const size_t n = f->per_layer, layer = (i - 2) / n; /* far beyond L for wte and wpe: it wraps */
    const int inner = layer < f->L, folded = n == FOLD_PER_LAYER;
    const char *row = i < 2 ? outer_rows[i] : !inner ? outer_rows[i - f->L * n]
                      : folded ? folded_rows[(i - 2) % n] : raw_rows[(i - 2) % n];
    Tensor t = {.type = inner && folded && row[1] != '-' ? TYPE_PANELS : TYPE_F32,
                .rank = row[1] == '-' ? 1 : 2,
                .rows = (uint32_t)sizes[strchr(letters, row[0]) - letters],
                .cols = (uint32_t)sizes[strchr(letters, row[1]) - letters]};
    const int at = inner ? snprintf(t.name, sizeof t.name, "h.%lu.", (unsigned long)layer) : 0;
    snprintf(t.name + at, sizeof t.name - (size_t)at, "%s", row + 3);
    return t;
}

/* Return from the function with an error at this byte, where the file is not as it has to be: it
   comes from anywhere, and what the rest of the program relies on is checked here, once. */
#define CHECK(good, byte, wrong)                                                                   \
    if (!(good))                                                                                   \
        return fail(e, PATCH_E_FORMAT, f->path, "byte %lu: %s; copy or convert the file again",    \
                    (unsigned long)(byte), wrong)
#define CONVERT "; convert the checkpoint again"

/* The head's 128 bytes into *f. The ceilings are far above any GPT-2, and low enough that no
   product of two overflows 64 bits. */
static patch_status read_head(ModelFile *f, const unsigned char *p, patch_error *e) {
    size_t version, act;
    const struct { unsigned long at, least, most; size_t *out; const char *name; } fields[] = {
        {8, 1, 1, &version, "version"}, {12, 1, 256, &f->L, "n_layer"},
        {16, 1, MAX_HEADS, &f->H, "n_head"}, {20, 1, 65536, &f->C, "d_model"},
        {24, 1, 262144, &f->M, "d_mlp"}, {28, 1, 1048576, &f->N, "n_ctx"},
        {32, 1, 4194304, &f->V, "d_vocab"}, {36, 0, 2, &act, "activation"},
        {48, 0, 1, &f->inverse_layer, "inverse_layer"}, {52, 1, 8192, &f->n_tensors, "tensor count"}
    }, *x;
    if (memcmp(p, "ACTPATCH", 8) != 0)
        return fail(e, PATCH_E_FORMAT, f->path,
                    "byte 0: not an actpatch model; make one with convert_weights.py");
    CHECK(get_u32(p + 124) == crc32_of(0, p, 124), 124, "checksum of the head does not match");
    for (x = fields; x < fields + sizeof fields / sizeof *fields; x++)
        if ((*x->out = get_u32(p + x->at)) < x->least || *x->out > x->most)
            return fail(e, PATCH_E_FORMAT, f->path, "byte %lu: %s = %lu (want %lu..%lu)" CONVERT,
                        x->at, x->name, (unsigned long)*x->out, x->least, x->most);
    const uint64_t length = get_u64(p + 64), size = f->map.size;
    const size_t end = (size_t)align_up(HEAD_BYTES + f->n_tensors * TABLE_ROW); /* of the table */
    const uint64_t eps = get_u64(p + 40);
    memcpy(&f->eps, &eps, sizeof f->eps);
    f->act_fn = (uint32_t)act;
    f->processing = get_u32(p + 88);
    f->per_layer = f->processing ? FOLD_PER_LAYER : RAW_PER_LAYER;
    f->untied = f->n_tensors - 4 - f->L * f->per_layer; /* 1: lm_head.weight; below 0 it wraps */
    f->D = f->C / f->H;
    f->tokenizer_at = end;
    f->tokenizer_bytes = (size_t)length;
    CHECK(f->C % f->H == 0, 16, "d_model is not divisible by n_head");
    CHECK(f->eps >= 0 && f->eps <= 1, 40, "epsilon is not within 0..1"); /* nor is NaN */
    CHECK(f->processing == 0 || f->processing / DID_FOLD == 1, 88, "unknown processing");
    for (size_t i = 92; i < 124; i++)
        CHECK(p[i] == 0, i, "reserved byte is not zero");
    CHECK(f->untied <= 1, 52, "tensor count does not fit the layers");
    CHECK(get_u64(p + 72) == size, 72, "the file has another length than its head says");
    CHECK(get_u64(p + 56) == (length ? end : 0), 56, "tokenizer does not follow the table");
    CHECK(end <= size && length <= size - end, 64, "tokenizer reaches beyond the end of the file");
    return PATCH_OK;
}

/* Rows first .. first + n - 1 of a tensor as the file stores them, until weights_done; NULL where
   they cannot be read or there is no memory for them. Mapped files need no copy. */
static const unsigned char *weights(const ModelFile *f, const Tensor *t, size_t first, size_t n,
                                    const patch_allocator *a) {
    const size_t row = t->bytes / t->rows, offset = t->offset + first * row;
    if (f->map.bytes != NULL)
        return f->map.bytes + offset;
    unsigned char *copy = take(a, n, row);
    if (copy == NULL || map_read(f->path, offset, n * row, copy))
        return copy;
    give(a, copy);
    return NULL;
}

/* The same bytes are not needed for now: pages go back to the system, a copy to the allocator. */
static void weights_done(const ModelFile *f, const Tensor *t, size_t n, const unsigned char *bytes,
                         const patch_allocator *a) {
    if (f->map.bytes == NULL)
        give(a, (void *)(uintptr_t)bytes);
    else if (bytes != NULL)
        map_release(&f->map, bytes, n * (t->bytes / t->rows));
}

/* Everything but the tensors, of a file whose map and path are set: f->front are its checked first
   bytes, which are read as if they were a tensor: the head alone, then all of them. */
static patch_status read_front(ModelFile *f, const patch_allocator *a, patch_error *e) {
    Tensor all = {.rank = 1, .rows = 1, .cols = 1, .bytes = HEAD_BYTES};
    size_t at = HEAD_BYTES;
    CHECK(f->map.size >= HEAD_BYTES, f->map.size, "too short for a model");
    const unsigned char *p = weights(f, &all, 0, 1, a);
    if (p == NULL)
        return fail(e, PATCH_E_IO, f->path, "cannot be read; check the file");
    const patch_status s = read_head(f, p, e);
    weights_done(f, &all, 1, p, a); /* a copy of it is in the copy of all */
    if (s != PATCH_OK)
        return s;
    uint64_t end = all.bytes = f->tokenizer_at + f->tokenizer_bytes;
    const size_t n = f->n_tensors * TABLE_ROW;
    if ((f->front = p = weights(f, &all, 0, 1, a)) == NULL)
        return fail(e, PATCH_E_IO, f->path, "cannot be read; check the file");
    CHECK(crc32_of(0, p + at, n) == get_u32(p + 80), at, "checksum of the table does not match");
    CHECK(memcmp(p + at + n, GAP, f->tokenizer_at - at - n) == 0, at + n,
          "the gap behind the table is not zero");
    CHECK(crc32_of(0, p + f->tokenizer_at, f->tokenizer_bytes) == get_u32(p + 84), f->tokenizer_at,
          "checksum of the tokenizer does not match");
    if ((f->tensors = take_zeroed(a, f->n_tensors, sizeof *f->tensors)) == NULL)
        return no_memory(e, f->path, n);
    for (size_t i = 0; i < f->n_tensors; i++, at += TABLE_ROW) {
        Tensor *t = &f->tensors[i];
        const unsigned char *row = p + at;
        *t = expected_tensor(f, i);
        const uint32_t type = get_u32(row + 48);
        const int panels = t->type == TYPE_PANELS;
        const uint64_t cols = panels ? (t->cols + PANEL - 1) / PANEL * PANEL : t->cols; /* stored */
        const uint64_t bytes = t->rows * cols * (type == TYPE_F16 ? 2 : 4);
        const uint64_t offset = align_up(end); /* as it has to be */
        if (memcmp(row, t->name, sizeof t->name) != 0)
            return fail(e, PATCH_E_FORMAT, f->path, "byte %lu: not the tensor %s" CONVERT,
                        (unsigned long)at, t->name);
        CHECK(panels ? type == TYPE_PANELS : type < t->rank, at + 48, "tensor type does not fit");
        CHECK(get_u32(row + 52) == t->rank && get_u32(row + 56) == t->rows &&
              get_u32(row + 60) == t->cols, at + 52, "tensor shape does not fit the head");
        CHECK(get_u64(row + 64) == offset && get_u32(row + 76) == 0, at + 64,
              "tensor does not begin where the one before it ends");
        end = offset + bytes;
        CHECK(end <= f->map.size, at + 64, "tensor reaches beyond the end of the file");
        t->type = type;
        t->crc = get_u32(row + 72);
        t->offset = (size_t)offset;
        t->bytes = (size_t)bytes;
    }
    CHECK(end == f->map.size, end, "bytes follow the last tensor");
    return PATCH_OK;
}

static int big_endian(void) {
    const uint16_t one = 1;

    return *(const unsigned char *)&one == 0;
}

/* n elements from element `at` of a stored row or vector. */
ALWAYS_INLINE void load_floats(uint32_t type, const unsigned char *p, size_t at, size_t n,
                               float *out) {
    p += (type == TYPE_F16 ? 2 : 4) * at;
    if (type == TYPE_F16)
        for (size_t i = 0; i < n; i++)
            out[i] = half_to_float((uint32_t)p[2 * i] | (uint32_t)p[2 * i + 1] << 8);
    else
        memcpy(out, p, 4 * n);
    for (size_t i = 0; type != TYPE_F16 && big_endian() && i < n; i++)
        memcpy(&out[i], &(uint32_t){get_u32(p + 4 * i)}, 4);
}

/* One row of a matrix, or a whole vector (row 0), as floats; 0 where it cannot be read. */
static int weights_row(const ModelFile *f, const Tensor *t, size_t row, float *out,
                       const patch_allocator *a) {
    const size_t n_rows = t->rank == 1 ? t->rows : 1; /* stored; a vector has a row an element */
    const unsigned char *p = weights(f, t, row, n_rows, a);
    if (p != NULL)
        load_floats(t->type, p, 0, n_rows * t->cols, out);
    if (f->map.bytes == NULL) /* a copy goes; mapped pages stay, for the next row */
        weights_done(f, t, n_rows, p, a);
    return p != NULL;
}

/* Weight and bias of a LayerNorm, whose tensors are t and the next one, into out [2,C]. */
static int norm_rows(const ModelFile *f, const Tensor *t, float *out, const patch_allocator *a) {
    return weights_row(f, t, 0, out, a) && weights_row(f, t + 1, 0, out + f->C, a);
}

/* ==== 4. Tokenizer ===============================================================================
   GPT-2's byte-level BPE: any bytes become exactly the tokens that Hugging Face's tokenizers 0.22.2
   makes of them, and the tokens' bytes, one after the other, are the text again.

   The tokenizer's section of a model file, numbers little-endian:
        0  u32  number of tokens, at most d_vocab
        4  u32  number of merges
        8  u32  id of <|endoftext|>; 0xFFFFFFFF: there is no such token
       12  u32  0
       16  the tokens by id, each a u16 length and so many bytes; length 0: the id has no token
           zero bytes up to a multiple of 4
           the merges by rank, lowest first, each the ids of the left, right and joined token, u32
   Each of the 256 bytes is a token exactly once. A joined token is its left token's bytes and then
   its right token's; no two merges have the same pair. Nothing follows the last merge.

   A text becomes tokens in three steps:
   1. Every <|endoftext|> in it is that token. The parts between them are texts of their own: a
      space before an <|endoftext|> stands at the end of its part. Nothing is normalised, and tokens
      that somebody added to the vocabulary are not looked for.
   2. A part is cut into words, from left to right, as this expression matches them:
          's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
      where (?!\S) leaves the last of several spaces to the word behind it: "a  b" is |a| | b|. The
      classes are appendix A's; a byte outside of valid UTF-8 is neither letter, number nor space.
   3. A word begins as one token a byte. Of all neighbours that have a merge, the pair of the lowest
      rank is joined, the leftmost of equals, until none have one. That is not the longest match:
      " activations" is | activ|ations|, although " activation" is a token. */

#define EOT_TEXT "<|endoftext|>"
#define EOT_BYTES (sizeof EOT_TEXT - 1)
#define NO_TOKEN 0xFFFFFFFFu     /* no id, no rank or no position */
#define UTF8_INVALID 0xFFFFFFFFu /* no code point: a byte that begins no valid character */
enum { SECTION_HEAD = 16, MERGE_RECORD = 12, MAX_PROBES = 256, UNICODE_RUNS = 1610 };
enum { CLASS_OTHER, CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE }; /* appendix A's marks, in order */

/* A checked section, used in place, and what finds things in it. */
typedef struct Tokenizer {
    const unsigned char *section;
    const unsigned char *merges; /* [n_merges] records of 12 bytes, by rank */
    uint32_t n_tokens, n_merges, eot;
    uint32_t byte_ids[256]; /* the token of each byte */
    uint32_t *starts;       /* [n_tokens]: byte of the section at which the token's length stands */
    uint32_t *slots;        /* [slot_mask + 1]: hash table, from pairs to ranks; NO_TOKEN: free */
    uint32_t slot_mask;     /* of the slots, a power of two, at most half are taken */
    uint32_t runs[UNICODE_RUNS]; /* class << 24 | first code point of a run of that class */
} Tokenizer;

/* Write out appendix A's runs, in ascending order: generated tables come last. */
static void unicode_decode(uint32_t runs[UNICODE_RUNS]);

/* A token's bytes and their number; NULL and 0 where the id, which may be any, has none. */
static const char *tokenizer_token(const Tokenizer *t, int64_t id, size_t *n) {
    const unsigned char *p = id >= 0 && id < t->n_tokens ? t->section + t->starts[id] : NULL;
    *n = p != NULL ? (size_t)p[0] | (size_t)p[1] << 8 : 0;
    return *n > 0 ? (const char *)p + 2 : NULL;
}

/* The slot that holds the rank of a pair of ids, or else the free one where it belongs: the first
   of either kind from the pair's hash on. NULL after MAX_PROBES slots with other pairs. All of
   GPT-2's lie within 14; the bound is there for files made so that all pairs hash alike, which
   without it would take time in the square of their merges. */
static uint32_t *merge_slot(const Tokenizer *t, uint32_t left, uint32_t right) {
    const uint64_t odd = 0x9E3779B97F4A7C15u; /* 2^64 / the golden ratio */
    const uint64_t mixed = ((uint64_t)left << 32 | right) * odd;
    const uint64_t hash = (mixed ^ mixed >> 32) * odd >> 32; /* high bits depend on all of it */
    for (uint64_t at = hash; at < hash + MAX_PROBES; at++) {
        uint32_t *slot = &t->slots[at & t->slot_mask];
        const unsigned char *p = t->merges + (*slot == NO_TOKEN ? 0 : (size_t)*slot * MERGE_RECORD);
        if (*slot == NO_TOKEN || (get_u32(p) == left && get_u32(p + 4) == right))
            return slot;
    }
    return NULL;
}

/* As CHECK in chapter 3, at a byte of the section; the text is about a number, its %lu. */
#define CHECK_VOCAB(good, byte, text, number)                                                      \
    if (!(good))                                                                                   \
        return fail(e, PATCH_E_FORMAT, where, "tokenizer byte %lu: " text CONVERT,                 \
                    (unsigned long)(byte), (unsigned long)(number))

/* Check a section of n bytes, which stays in use, and index it: 8 KB, 4 bytes a token and 8 to 16
   a merge. After it no text can lead outside of the tables. What it takes goes with tokenizer_free,
   after an error too: FORMAT or MEMORY. */
static patch_status tokenizer_read(Tokenizer *t, const unsigned char *p, size_t n, size_t d_vocab,
                                   const char *where, const patch_allocator *a, patch_error *e) {
    size_t at = SECTION_HEAD, n_slots = 1, length = 0, n_left, n_right;
    const char *token = NULL;
    *t = (Tokenizer){.section = p};
    CHECK_VOCAB(n >= SECTION_HEAD && n < NO_TOKEN, 0, "a length of %lu cannot be", n);
    t->n_tokens = get_u32(p);
    t->n_merges = get_u32(p + 4);
    t->eot = get_u32(p + 8);
    CHECK_VOCAB(t->n_tokens <= d_vocab, 0, "token count %lu is above d_vocab", t->n_tokens);
    CHECK_VOCAB(get_u32(p + 12) == 0, 12, "reserved word %lu is not zero", get_u32(p + 12));

    /* Where each token begins. Every byte must be one, or some texts would have no ids; only once,
       or it would be open which id it gets. */
    if ((t->starts = take(a, t->n_tokens, sizeof *t->starts)) == NULL)
        return no_memory(e, where, t->n_tokens * sizeof *t->starts);
    memset(t->byte_ids, 0xFF, sizeof t->byte_ids); /* NO_TOKEN */
    for (uint32_t id = 0; id < t->n_tokens; id++, at += 2 + length) {
        t->starts[id] = (uint32_t)at;
        if (n - at >= 2) /* else there is not even a length */
            token = tokenizer_token(t, id, &length);
        CHECK_VOCAB(n - at >= 2 + length, at, "token %lu runs past the section's end", id);
        if (length == 1) {
            uint32_t *own = &t->byte_ids[(unsigned char)*token];
            CHECK_VOCAB(*own == NO_TOKEN, at, "token %lu repeats a single byte", id);
            *own = id;
        }
    }
    for (int i = 0; i < 256; i++)
        CHECK_VOCAB(t->byte_ids[i] != NO_TOKEN, 16, "byte value %lu has no token of its own", i);
    token = tokenizer_token(t, t->eot, &length);
    CHECK_VOCAB(t->eot == NO_TOKEN || (length == EOT_BYTES && !memcmp(token, EOT_TEXT, length)), 8,
                "token %lu is not " EOT_TEXT, t->eot);

    /* The merges, which must fill the rest, and the hash table of their pairs. The third token must
       be the first two in a row: it is what makes tokens decode to the text they came from. */
    for (; at % 4 != 0 && at < n; at++)
        CHECK_VOCAB(p[at] == 0, at, "filler %lu is not zero", p[at]);
    CHECK_VOCAB(at % 4 == 0 && (uint64_t)t->n_merges * MERGE_RECORD == n - at, 4,
                "merge count %lu does not fit", t->n_merges);
    while (n_slots / 2 < t->n_merges) /* 2^30 at most: the section is below 2^32 */
        n_slots *= 2;
    if ((t->slots = take(a, n_slots, sizeof *t->slots)) == NULL)
        return no_memory(e, where, n_slots * sizeof *t->slots);
    memset(t->slots, 0xFF, n_slots * sizeof *t->slots); /* NO_TOKEN */
    t->slot_mask = (uint32_t)(n_slots - 1);
    t->merges = p + at;
    for (uint32_t id = 0; id < t->n_merges; id++, at += MERGE_RECORD) {
        const char *left = tokenizer_token(t, get_u32(p + at), &n_left);
        const char *right = tokenizer_token(t, get_u32(p + at + 4), &n_right);
        uint32_t *slot = merge_slot(t, get_u32(p + at), get_u32(p + at + 4));
        token = tokenizer_token(t, get_u32(p + at + 8), &length);
        CHECK_VOCAB(left && right && length == n_left + n_right && !memcmp(token, left, n_left) &&
                    !memcmp(token + n_left, right, n_right), at,
                    "merge %lu does not yield its pair joined", id);
        CHECK_VOCAB(slot != NULL, at, "merge %lu hashes like too many others", id);
        CHECK_VOCAB(*slot == NO_TOKEN, at, "merge %lu has the pair of an earlier one", id);
        *slot = id;
    }
    unicode_decode(t->runs);
    return PATCH_OK;
}

/* Free what tokenizer_read took; the section is the caller's. A zeroed Tokenizer is fine. */
static void tokenizer_free(Tokenizer *t, const patch_allocator *a) {
    give(a, t->starts);
    give(a, t->slots);
}

/* ---- cutting a text into words -------------------------------------------------------------- */

/* The code point at s, of whose n >= 1 bytes it takes *length. What UTF-8 does not allow (overlong
   forms, surrogates, more than U+10FFFF, stray and missing bytes) is UTF8_INVALID and takes 1. */
static uint32_t utf8_next(const unsigned char *s, size_t n, size_t *length) {
    static const uint32_t least[4] = {0, 0x80, 0x800, 0x10000}; /* by number of further bytes */
    const uint32_t lead = s[0];
    const size_t more = lead < 0x80 ? 0 : lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
    uint32_t code = more == 0 ? lead : lead & 0x3Fu >> more;
    size_t i = 1;
    for (; i <= more && i < n && (s[i] & 0xC0) == 0x80; i++)
        code = code << 6 | (s[i] & 0x3Fu);
    const int bad = (lead >= 0x80 && lead < 0xC0) || lead >= 0xF8 || i <= more ||
                    code < least[more] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000);
    *length = bad ? 1 : more + 1;
    return bad ? UTF8_INVALID : code;
}

/* The class of the character at s, of *length bytes. A binary search: run `low` begins at or before
   its code point, run `high` after it; what lies above Unicode is CLASS_OTHER. */
static int char_class(const Tokenizer *t, const unsigned char *s, size_t n, size_t *length) {
    const uint32_t code = utf8_next(s, n, length);
    size_t low = 0, high = code < UNICODE_RUNS ? code + 1 : UNICODE_RUNS; /* i <= run i */
    while (high - low > 1) {
        const size_t middle = (low + high) / 2;
        if ((t->runs[middle] & 0xFFFFFF) <= code)
            low = middle;
        else
            high = middle;
    }
    return (int)(t->runs[low] >> 24);
}

/* The bytes of the word at s, where a part of a text has n >= 1 more: the expression above. Only of
   a run of spaces a character is given back, so that cutting a text takes linear time. */
static size_t word_length(const Tokenizer *t, const unsigned char *s, size_t n) {
    if (n >= 2 && s[0] == '\'' && memchr("stmd", s[1], 4) != NULL)
        return 2;
    if (n >= 3 && s[0] == '\'' &&
        (!memcmp(s + 1, "re", 2) || !memcmp(s + 1, "ve", 2) || !memcmp(s + 1, "ll", 2)))
        return 3;
    size_t length, last = 0, space = s[0] == ' ' && n >= 2; /* " ?" takes no other space */
    const int kind = char_class(t, s + space, n - space, &length);
    if (kind == CLASS_SPACE) /* it is not followed by a word: one more of a run of spaces */
        space = 0;
    for (size_t at = space; at < n; last = at, at += length)
        if (char_class(t, s + at, n - at, &length) != kind)
            return kind == CLASS_SPACE && last > 0 ? last : at; /* \s+(?!\S) */
    return n;
}

/* A walk over the words of a text. It remembers the end of the part it is in, so that the text is
   searched for <|endoftext|> only once: a million times "<" must not take a million searches. */
typedef struct Walk {
    const void *text; /* with its length all that is set before the first step; NULL if n is 0 */
    size_t n, from, at, part_end; /* part_end: where the next <|endoftext|> begins, n: nowhere */
    int is_eot;
} Walk;

/* Step over bytes w->from .. w->at - 1, a word or an <|endoftext|> (is_eot). 0: the text ends. */
static int walk_next(const Tokenizer *t, Walk *w) {
    const unsigned char *text = w->text;
    w->from = w->at;
    if (w->at == w->n)
        return 0;
    while (w->part_end < w->n && (t->eot == NO_TOKEN || w->n - w->part_end < EOT_BYTES ||
                                  memcmp(text + w->part_end, EOT_TEXT, EOT_BYTES) != 0))
        w->part_end++;
    w->is_eot = w->at == w->part_end;
    if (w->is_eot)
        w->part_end += EOT_BYTES; /* from there on the next one is looked for */
    w->at += w->is_eot ? EOT_BYTES : word_length(t, text + w->at, w->part_end - w->at);
    return 1;
}

/* ---- merging -------------------------------------------------------------------------------- */

/* What it takes to merge words of up to n bytes, 28 n bytes in one piece. A token stands where its
   first byte stands in the word; next and previous chain the tokens. In tree, place n + i is for
   the merge of token i with the one behind it: rank << 32 | i, all ones where there is none. Place
   k below n holds the lesser of places 2 k and 2 k + 1: place 1 is the merge to be done next. */
typedef struct Merger {
    uint64_t *tree;                  /* [2 n] */
    uint32_t *ids, *previous, *next; /* [n], of previous and next NO_TOKEN at the ends */
    int *out;                        /* [capacity]: the caller's, for all ids */
    size_t n_out, capacity;          /* beyond capacity they are only counted */
} Merger;

/* Enter token `at` of a word of n bytes into the tree, with the one behind it, if there is one. */
static void set_pair(const Tokenizer *t, Merger *m, size_t n, uint32_t at) {
    const uint32_t behind = m->next[at];
    const uint32_t *slot = behind == NO_TOKEN ? NULL : merge_slot(t, m->ids[at], m->ids[behind]);
    uint64_t least = slot == NULL || *slot == NO_TOKEN ? UINT64_MAX : (uint64_t)*slot << 32 | at;
    for (size_t k = n + at; k > 0 && m->tree[k] != least; k /= 2) {
        m->tree[k] = least;
        least = least < m->tree[k ^ 1] ? least : m->tree[k ^ 1]; /* tree[0] is all ones */
    }
}

static void put_id(Merger *m, uint32_t id) {
    if (m->n_out < m->capacity)
        m->out[m->n_out] = (int)id;
    m->n_out++;
}

/* Put out the ids of a word of n >= 1 bytes, in O(n log n) steps. */
static void merge_word(const Tokenizer *t, Merger *m, const unsigned char *word, size_t n) {
    uint32_t at;
    memset(m->tree, 0xFF, 2 * n * sizeof *m->tree);
    for (at = 0; at < n; at++) {
        m->ids[at] = t->byte_ids[word[at]];
        m->previous[at] = at - 1; /* 0 - 1 is NO_TOKEN */
        m->next[at] = at + 1 < n ? at + 1 : NO_TOKEN;
        if (at > 0)
            set_pair(t, m, n, at - 1);
    }
    while ((at = (uint32_t)m->tree[1]) != NO_TOKEN) {
        const uint32_t behind = m->next[at];
        m->ids[at] = get_u32(t->merges + (size_t)(m->tree[1] >> 32) * MERGE_RECORD + 8);
        m->next[at] = m->next[behind];
        m->next[behind] = NO_TOKEN; /* it is joined: no pair begins there any more */
        if (m->next[at] != NO_TOKEN)
            m->previous[m->next[at]] = at;
        set_pair(t, m, n, behind);
        set_pair(t, m, n, at);
        if (at > 0)
            set_pair(t, m, n, m->previous[at]);
    }
    for (at = 0; at != NO_TOKEN; at = m->next[at])
        put_id(m, m->ids[at]);
}

/* SIZE where n ids or bytes do not fit. */
static patch_status fit(size_t n, size_t capacity, const char *unit, patch_error *e) {
    return n <= capacity ? PATCH_OK
           : fail(e, PATCH_E_SIZE, "text", "%lu %s, room for %lu; make room for that many",
                  (unsigned long)n, unit, (unsigned long)capacity);
}

/* The ids of a text of n bytes, as many as ids has room for; *n_ids is the number of all. One walk
   measures the longest word, for which memory is taken once, and a second one merges. Errors: SIZE;
   MEMORY, also for a word of 4 GB, for which 28 times as much would be needed. */
static patch_status tokenizer_encode(const Tokenizer *t, const char *text, size_t n, int *ids,
                                     size_t capacity, size_t *n_ids, const patch_allocator *a,
                                     patch_error *e) {
    Merger m = {.out = ids, .capacity = capacity};
    size_t longest = 0, bytes = SIZE_MAX;
    *n_ids = 0;
    for (Walk w = {.text = text, .n = n}; walk_next(t, &w);)
        longest = !w.is_eot && w.at - w.from > longest ? w.at - w.from : longest;
    if (longest < NO_TOKEN && size_times(longest, 2 * sizeof *m.tree + 3 * sizeof *m.ids, &bytes))
        m.tree = take(a, bytes, 1);
    if (m.tree == NULL)
        return no_memory(e, "text", bytes);
    m.ids = (uint32_t *)(void *)(m.tree + 2 * longest); /* the widest come first: all aligned */
    m.previous = m.ids + longest;
    m.next = m.previous + longest;
    for (Walk w = {.text = text, .n = n}; walk_next(t, &w);)
        if (w.is_eot)
            put_id(&m, t->eot);
        else
            merge_word(t, &m, (const unsigned char *)text + w.from, w.at - w.from);
    give(a, m.tree);
    *n_ids = m.n_out;
    return fit(m.n_out, capacity, "ids", e);
}

/* ==== 5. Kernels =================================================================================
   The inner loops, each written once and compiled once per tier: AVX-512, AVX2 with FMA, and the
   compiler's own baseline (SSE2, NEON or plain C). The tier is chosen when a model is opened.

   Every sum is taken in one fixed order, whatever the number of rows, threads or columns at once: a
   product over k goes in blocks of K_BLOCK, each from 0 upwards, and the blocks' sums are added in
   order. A straight sum over all k would be less accurate (4 to 6 times at K = 768).

   Within a tier the compiler fuses multiply and add or it does not, in vector and scalar code alike
   (gcc outside the ISO modes: wherever the tier has FMA): the plain kernel gives the same bits. */

enum { K_BLOCK = 32, LANES = 16, MAX_TILE_ROWS = 8 };
#if defined(PATCH_BARE) && !defined(__x86_64__)
enum { STEP = 16 }; /* a third of the scratch: 33 kB less for the bundled model */
#else
enum { STEP = 48 }; /* the columns of every tier's tile divide it */
#endif

/* A tile: y [rows,cols] = a [rows,k] . b + bias [cols], with a given as row pointers, b as panels
   [.][k][16], each `panel` floats from the one before it, and y's rows `ldy` floats apart. */
#define TILE_PARAMETERS                                                                            \
    size_t k, const float *const *a, const float *b, size_t panel, const float *bias, float *y,    \
        size_t ldy
typedef void (*TileKernel)(TILE_PARAMETERS);

/* What one panel of 16 columns is made from; see Linear in chapter 6. All arrays are [k]. */
typedef struct PanelSource {
    const unsigned char *bytes; /* stored matrix: rows of `stride` elements, used from `column` */
    const float *dense;         /* or the same as floats */
    uint32_t type;              /* of bytes: TYPE_F32 or TYPE_F16 */
    size_t k, stride, column, columns; /* columns: how many of the 16 exist */
    int transposed;             /* the columns are stored rows instead (W_U is wte) */
    const double *center;       /* subtracted from row i first: center_writing_weights */
    const double *shift;        /* bias += shift . W: a LayerNorm's bias, or the value biases */
    const float *scale;         /* W *= scale, then each column minus its mean: fold_ln */
    const double *center_after; /* subtracted from row i last: center_unembed */
} PanelSource;

/* What a tier has besides its tile kernels: X(tier, target, result, give, name, parameters,
   arguments), each explained at its body, name_body; `give` passes the body's result on. */
#define KERNELS(X, T, A)                                                                           \
    X(T, A, void, , pack, (const PanelSource *s, float *panel, double *bias), (s, panel, bias))    \
    X(T, A, void, , activate, (uint32_t act_fn, float *x, size_t n), (act_fn, x, n))               \
    X(T, A, void, , exponentials, (float *x, size_t n, float subtract), (x, n, subtract))          \
    X(T, A, double, return, mean, (const float *x, size_t n), (x, n))                              \
    X(T, A, void, , norm_scale, (const float *x, size_t n, double eps, float *y), (x, n, eps, y))  \
    X(T, A, void, , normalize, (const float *x, size_t n, float scale, const float *ln, float *y), \
                               (x, n, scale, ln, y))                                               \
    X(T, A, void, , scores, (const float *q, const float *const *k, size_t at, size_t n, size_t d, \
                             float divisor, float *out), (q, k, at, n, d, divisor, out))           \
    X(T, A, void, , mix, (const float *pattern, const float *const *v, size_t at, size_t n,        \
                          size_t d, float *z), (pattern, v, at, n, d, z))
#define KERNEL_FIELD(T, A, result, give, name, parameters, arguments) result (*name) parameters;

typedef struct Kernels {
    const char *name;
    size_t rows, cols;      /* of a tile */
    TileKernel tile, plain; /* tuned, and its reference: the same bits */
    KERNELS(KERNEL_FIELD, , )
} Kernels;

/* Do `statement` for each element i + j = 0 .. n-1, j its lane: 16 at a time, then the rest. At -O2
   gcc vectorises a loop only where the length is known and leaves no rest. */
#define IN_LANES(n, statement)                                                                     \
    {                                                                                              \
        size_t i = 0;                                                                              \
        for (; i + LANES <= (n); i += LANES)                                                       \
            for (size_t j = 0; j < LANES; j++)                                                     \
                statement                                                                          \
        for (size_t j = 0; i + j < (n); j++)                                                       \
            statement                                                                              \
    }

typedef union Bits { /* a float and what it is made of */
    float f;
    uint32_t u;
} Bits;

/* The bits u of a float, but `from` where they are in from..to. No branch, and no comparison of
   floats: it may trap, so gcc would not vectorise it. NaN is in neither of the ranges below. */
ALWAYS_INLINE uint32_t clamp_bits(uint32_t u, uint32_t from, uint32_t to) {
    const uint32_t mask = 0u - (uint32_t)(u - from <= to - from); /* all ones, or 0 */
    return (u & ~mask) | (from & mask);
}

/* e^x for any float; relative error below 8.5e-8 (tests/test_kernels.py: every 61st float, all of
   them with `make test-exhaustive`), 0 and infinity where float32 has them. Cody and Waite's
   reduction x = n ln 2 + r with ln 2 in two pieces, |r| <= 0.35, then Cephes' polynomial of degree
   6. No branch, so that the compiler turns 16 of them into vectors. */
ALWAYS_INLINE float exp_float(float input) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it leaves an integer in the low bits */
    Bits x = {input};
    x.u = clamp_bits(x.u, 0x42B20000u, 0x7F800000u); /* 89 .. infinity become 89 */
    x.u = clamp_bits(x.u, 0xC2D00000u, 0xFF800000u); /* -104 .. -infinity become -104 */
    const Bits t = {x.f * 1.44269504f + magic};
    const int32_t n = (int32_t)t.u - 0x4B400000; /* less the bits of magic itself */
    const float whole = (float)n; /* t.f - magic, of which x87 would keep more digits than t has */
    const float r = x.f - whole * 0.693359375f - whole * -2.12194440e-4f;
    float p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = (p * r + 8.3334519073e-3f) * r + 4.1665795894e-2f;
    p = (p * r + 1.6666665459e-1f) * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Bits half = {.u = (uint32_t)((n >> 1) + 127) << 23};     /* 2^n in two factors, so that */
    const Bits rest = {.u = (uint32_t)(n - (n >> 1) + 127) << 23}; /* results below 2^-126 come */
    return p * half.f * rest.f;                                    /* out denormal */
}

/* gelu_new(x) = x (1 + tanh u) / 2 = x / (1 + e^-2u), u = sqrt(2/pi) (x + 0.044715 x^3): one exp
   instead of libm's tanhf, which would take as long as all the products. */
ALWAYS_INLINE float gelu_new(float x) {
    const float u = x + 0.044715f * (x * x * x);
    return x / (1.0f + exp_float(-1.5957691216f * u));
}

/* x [n] = act_fn(x): the head's field of that name in chapter 3. */
ALWAYS_INLINE void activate_body(uint32_t act_fn, float *x, size_t n) {
    if (act_fn == 0) {
        IN_LANES(n, x[i + j] = gelu_new(x[i + j]);)
    } else if (act_fn == 1) { /* the exact GELU, with libm's erf in double */
        for (size_t i = 0; i < n; i++)
            x[i] = (float)(0.5 * (double)x[i] * (1.0 + erf((double)x[i] * 0.70710678118654752440)));
    } else {
        for (size_t i = 0; i < n; i++)
            x[i] = x[i] < 0.0f ? 0.0f : x[i]; /* NaN stays NaN */
    }
}

/* x[i] = e^(x[i] - subtract) */
ALWAYS_INLINE void exponentials_body(float *x, size_t n, float subtract) {
    IN_LANES(n, x[i + j] = exp_float(x[i + j] - subtract);)
}

/* Sum of (x - mean)^power, power 1 or 2, in double and 16 lanes, which are then added as a tree. */
ALWAYS_INLINE double sum_power(const float *x, size_t n, double mean, int power) {
    double lane[LANES] = {0};
    IN_LANES(n, {
        const double d = (double)x[i + j] - mean;
        lane[j] += power == 1 ? d : d * d;
    })
    for (size_t j = 0; j < 8; j++)
        lane[j] += lane[j + 8];
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) +
           ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

ALWAYS_INLINE double mean_body(const float *x, size_t n) {
    return sum_power(x, n, 0.0, 1) / (double)n;
}

/* LayerNorm's scale: sqrt(var(x) + eps), the variance over n; eps is inside the root. */
ALWAYS_INLINE void norm_scale_body(const float *x, size_t n, double eps, float *scale) {
    *scale = (float)sqrt(sum_power(x, n, mean_body(x, n), 2) / (double)n + eps);
}

/* y [n] = (x - mean) / scale; where the LayerNorm is not folded, times its weight and plus its
   bias: ln [2,n], else NULL. */
ALWAYS_INLINE void normalize_body(const float *x, size_t n, float scale, const float *ln,
                                  float *y) {
    const double mean = mean_body(x, n), inverse = 1.0 / (double)scale;
    IN_LANES(n, y[i + j] = (float)(((double)x[i + j] - mean) * inverse);)
    for (size_t i = 0; ln != NULL && i < n; i++)
        y[i] = y[i] * ln[i] + ln[n + i];
}

/* out [n] = q . k[t] / divisor, for one head: d elements from element `at` of each key. */
ALWAYS_INLINE void scores_body(const float *q, const float *const *k, size_t at, size_t n, size_t d,
                               float divisor, float *out) {
    for (size_t t = 0; t < n; t++) {
        const float *key = k[t] + at;
        float lane[LANES] = {0}; /* sums of every 16th product, then added as a tree */
        IN_LANES(d, lane[j] += q[i + j] * key[i + j];)
        for (size_t half = LANES / 2; half > 0; half /= 2)
            for (size_t j = 0; j < half; j++)
                lane[j] += lane[j + half];
        out[t] = lane[0] / divisor;
    }
}

/* y [n] += c x [n]. A function, since gcc believes `restrict` of parameters only. */
ALWAYS_INLINE void add_times(float *restrict y, float c, const float *restrict x, size_t n) {
    IN_LANES(n, y[i + j] += c * x[i + j];)
}

/* z [d] = sum over n sources of pattern[t] v[t], for one head: d elements from element `at`. */
ALWAYS_INLINE void mix_body(const float *pattern, const float *const *v, size_t at, size_t n,
                            size_t d, float *z) {
    memset(z, 0, d * sizeof *z);
    for (size_t t = 0; t < n; t++)
        add_times(z, pattern[t], v[t] + at, d);
}

/* out [16] = row i of a panel's columns, zeros where there are none. */
ALWAYS_INLINE void panel_row(const PanelSource *s, size_t i, float *out) {
    const size_t at = i * s->stride + s->column;
    memset(out, 0, PANEL * sizeof *out);
    if (s->transposed) /* an element from each of 16 rows */
        for (size_t j = 0; j < s->columns; j++)
            load_floats(s->type, s->bytes, (s->column + j) * s->stride + i, 1, &out[j]);
    else if (s->dense != NULL)
        memcpy(out, s->dense + at, s->columns * sizeof *out);
    else if (s->columns == PANEL) /* nearly always: a length that the compiler knows */
        load_floats(s->type, s->bytes, at, PANEL, out);
    else
        load_floats(s->type, s->bytes, at, s->columns, out);
}

/* Make one processed panel [k][16] and add the bias that processing yields to bias [16]. Sums are
   taken in double, so that folding costs less accuracy than TransformerLens's in float32. */
ALWAYS_INLINE void pack_body(const PanelSource *s, float *panel, double *bias) {
    double mean[PANEL] = {0}, sum[PANEL] = {0}; /* of the columns; and shift . W */
    for (size_t i = 0; i < s->k; i++)
        panel_row(s, i, panel + i * PANEL);
    for (size_t i = 0; (s->shift != NULL || s->scale != NULL) && i < s->k; i++) {
        const double center = s->center ? s->center[i] : 0.0, shift = s->shift ? s->shift[i] : 0.0;
        const double scale = s->scale ? (double)s->scale[i] : 0.0; /* 0: the columns' means stay */
        for (size_t j = 0; j < PANEL; j++) {
            const double w = (double)panel[i * PANEL + j] - center;
            sum[j] += shift * w; /* the unscaled W: a LayerNorm's bias is added after its weight */
            mean[j] += scale * w;
        }
    }
    for (size_t j = 0; j < PANEL; j++)
        bias[j] += sum[j];
    if (s->center == NULL && s->scale == NULL && s->center_after == NULL)
        return; /* the panel is already what was stored */
    float minus[PANEL];
    for (size_t j = 0; j < PANEL; j++)
        minus[j] = (float)(mean[j] / (double)s->k);
    for (size_t i = 0; i < s->k; i++) {
        float *row = panel + i * PANEL;
        const float center = s->center ? (float)s->center[i] : 0.0f;
        const float scale = s->scale ? s->scale[i] : 1.0f;
        const float after = s->center_after ? (float)s->center_after[i] : 0.0f;
        for (size_t j = 0; j < PANEL; j++)
            row[j] = (row[j] - center) * scale - (minus[j] + after);
        for (size_t j = s->columns; j < PANEL; j++)
            row[j] = 0; /* again: the lines above made it -center and the like */
    }
}

/* The algorithmic reference of every tile kernel: rows * cols sums, each for itself. */
ALWAYS_INLINE void plain_body(TILE_PARAMETERS, size_t rows, size_t cols) {
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j++) {
            const float *column = b + j / PANEL * panel + j % PANEL; /* [k], 16 floats apart */
            float total = 0;
            for (size_t from = 0; from < k; from += K_BLOCK) {
                float sum = 0; /* of one block */
                for (size_t kk = from; kk < k && kk < from + K_BLOCK; kk++)
                    sum += a[i][kk] * column[kk * PANEL];
                total += sum;
            }
            y[i * ldy + j] = total + bias[j];
        }
}

/* The tuned kernel: the same sums, ROWS x (VECTORS * lanes of Vec) at once, all in registers. Per
   step of k it loads VECTORS vectors of b and ROWS numbers of a for ROWS * VECTORS multiply-adds.
   Vec must be as wide as the hardware's: gcc 12 splits wider ones so badly that the kernel is 20
   times slower. */
#define TILE_KERNEL(name, target, Vec, ROWS, VECTORS)                                              \
    target static void name(TILE_PARAMETERS) {                                                     \
        enum { LANE = sizeof(Vec) / sizeof(float) }; /* floats of a vector */                      \
        Vec total[ROWS][VECTORS] = {{{0}}};          /* of all blocks */                           \
        for (size_t from = 0; from < k; from += K_BLOCK) {                                         \
            const size_t end = k - from < K_BLOCK ? k : from + K_BLOCK;                            \
            Vec sum[ROWS][VECTORS] = {{{0}}}; /* of this block */                                  \
            for (size_t kk = from; kk < end; kk++) {                                               \
                Vec row[VECTORS]; /* of b, over one or more panels */                              \
                UNROLL for (int j = 0; j < VECTORS; j++)                                           \
                    row[j] = *(const Vec *)(b + (size_t)(j * LANE / PANEL) * panel +               \
                                            kk * PANEL + j * LANE % PANEL);                        \
                UNROLL for (int i = 0; i < ROWS; i++)                                              \
                    UNROLL for (int j = 0; j < VECTORS; j++)                                       \
                        sum[i][j] += a[i][kk] * row[j];                                            \
            }                                                                                      \
            UNROLL for (int i = 0; i < ROWS; i++)                                                  \
                UNROLL for (int j = 0; j < VECTORS; j++)                                           \
                    total[i][j] += sum[i][j];                                                      \
        }                                                                                          \
        for (int i = 0; i < ROWS; i++)                                                             \
            for (int j = 0; j < VECTORS; j++)                                                      \
                *(Vec *)(y + (size_t)i * ldy + j * LANE) =                                         \
                    total[i][j] + *(const Vec *)(bias + j * LANE);                                 \
    }

/* The functions of a tier: the bodies above, compiled for its instructions, and their table. */
#define KERNEL_NAME(T, A, result, give, name, parameters, arguments) name##_##T,
#define KERNEL_FUNCTION(T, A, result, give, name, parameters, arguments)                           \
    A static result name##_##T parameters { give name##_body arguments; }
#define TIER(T, A, ROWS, COLS)                                                                     \
    A static void plain_##T(TILE_PARAMETERS) {                                                     \
        plain_body(k, a, b, panel, bias, y, ldy, ROWS, COLS);                                      \
    }                                                                                              \
    KERNELS(KERNEL_FUNCTION, T, A)                                                                 \
    static const Kernels kernels_##T = {#T, ROWS, COLS, tile_##T, plain_##T,                       \
                                        KERNELS(KERNEL_NAME, T, )};

/* Where float arithmetic has more digits than float (x87; s390x in the ISO modes), gcc refuses to
   multiply a float by a vector of them. */
#if defined(__GNUC__) && !defined(__TINYC__) && !defined(PATCH_PLAIN) && FLT_EVAL_METHOD == 0
#define BASELINE kernels_vector
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif
/* Vectors that may stand wherever a float may, since rows and panels do. */
typedef float Vec4 __attribute__((vector_size(16), aligned(4), may_alias)); /* SSE2, NEON */
#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
#define AVX512 __attribute__((target("avx512f,avx512vl,avx512dq,avx2,fma")))
typedef float Vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Vec16 __attribute__((vector_size(64), aligned(4), may_alias));
TILE_KERNEL(tile_avx512, AVX512, Vec16, 8, 3) /* sum: 24 of 32 registers */
TIER(avx512, AVX512, 8, 48)
TILE_KERNEL(tile_avx2, AVX2, Vec8, 6, 2) /* 12 of 16 registers */
TIER(avx2, AVX2, 6, 16)
#endif
TILE_KERNEL(tile_vector, , Vec4, 6, 2)
TIER(vector, , 6, 8)
#else
#define BASELINE kernels_plain
#define tile_plain plain_plain /* the reference has to do */
TIER(plain, , 4, 16)
#endif

/* The best tier that this processor has; ACTPATCH_KERNELS=avx2, vector in the environment asks for
   a lesser one (for tests: each tier must be tried on one machine). */
static const Kernels *choose_kernels(void) {
#ifdef AVX512
    const char *wish = getenv("ACTPATCH_KERNELS");
    if (wish == NULL || *wish == 0)
        wish = "avx512 avx2";
    __builtin_cpu_init();
    if (strstr(wish, "avx512") && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return &kernels_avx512;
    if (strstr(wish, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &kernels_avx2;
#endif
    return &BASELINE;
}

/* ==== 6. Weight processing =======================================================================
   What HookedTransformer.from_pretrained does to the weights, in its order. Each step leaves the
   logits' differences as they were, and with them log-probabilities and ranks:

   1 fold_ln   LN(x) W + b with LN(x) = n w + c, n = (x - mean) / scale, is n (w W) + (c W + b):
               W_Q, W_K, W_V (ln1), W_in (ln2), W_U (ln_f) take the LayerNorm's weight and bias
               over. n sums to 0 over d_model, so each column may lose its mean.
   2 center_writing_weights   Every LayerNorm that reads the residual stream subtracts its mean, so
               what is written needs none: W_E, W_pos, W_O, b_O, W_out, b_out lose theirs.
   3 center_unembed   A constant on all logits of a position changes no softmax: W_U and b_U lose
               their mean over the vocabulary.
   4 fold_value_biases   A pattern's row sums to 1, so that b_V reaches z unchanged, whatever the
               attention does: b_O += sum_h b_V[h] W_O[h], b_V = 0.
   5 refactor_factored_attn_matrices   Only W_Q W_K^T and W_V W_O matter: chapter 11.1.

   Only step 5 is done ahead of time: a pass makes each panel from the stored matrix when it needs
   it, which costs about a tenth of the smallest sweep and saves a second copy of all the weights.
   What bites: matrices are [in,out] (Conv1D), c_attn holds Q, K and V side by side; the LayerNorm's
   bias meets the unscaled W; the value biases meet the centered W_O. */

struct patch_model {
    ModelFile file;        /* what the file says */
    patch_dims dims;       /* and what of it the caller may read */
    patch_options options; /* as they hold: a processed file's are its own */
    patch_allocator allocator;
    Tokenizer tokenizer;
    int has_tokenizer, threads;
    uint32_t steps; /* DID_... bits: the processing that a pass has to do, or the file has had */
    const Kernels *kernels;
    TileKernel tile; /* the tier's tuned kernel, or its plain one */
    size_t max_k;    /* the longest column of any matrix */
    float *factored; /* step 5: [L] of W_Q, W_K, W_V, W_O [C,C], b_Q, b_K, b_V, b_O [C]; or NULL */
    char path[];     /* file.path's */
};
typedef struct patch_model Model;

enum { LINEAR_Q, LINEAR_K, LINEAR_V, LINEAR_O, LINEAR_IN, LINEAR_OUT, LINEARS };
enum { VOCAB_CHUNK = 85 * STEP }; /* columns of W_U at a time */

/* y [rows,n] = x [rows,k] . W + b, and how W and b come from what is stored. */
typedef struct Linear {
    size_t k, n;
    const Tensor *matrix, *bias;     /* bias NULL: none stored */
    size_t column;                   /* where the n columns begin, in both */
    size_t first_row, rows;          /* which rows of the matrix count, of how many */
    int transposed;                  /* its rows are the columns: W_U */
    const float *dense, *dense_bias; /* instead of matrix and bias: step 5's [C,C] and [C] */
    const Tensor *norm_w, *norm_b;   /* fold_ln */
    int center;                      /* center_writing_weights */
    const double *shift;             /* fold_value_biases: b_V [k], else NULL */
    int takes_value_bias;            /* fold_value_biases: W_O wants shift */
    int drop_bias;                   /* nothing is added: W_V's goes into W_O's instead */
    const double *center_after;      /* center_unembed: mean column [k], else NULL */
    double bias_after;               /* and mean bias, to be subtracted */
} Linear;

/* What a call computes with. The scratch serves one Linear at a time: a pass allocates nothing. */
typedef struct Work {
    const Model *m;
    Pool *pool;             /* the call's memory */
    patch_stats *stats;     /* NULL: not wanted */
    float *panels, *norm;   /* [threads, 3, max_k, 16]; a LayerNorm's weight and bias: [2, max_k] */
    double *shift, *center; /* [max_k] each */
    double *bias;           /* [the most columns of a Linear] */
} Work;

static patch_status work_begin(Work *w, const Model *m, Pool *pool, patch_stats *stats,
                               patch_error *e) {
    const size_t chunk = m->file.V < VOCAB_CHUNK ? m->file.V : VOCAB_CHUNK;
    *w = (Work){.m = m, .pool = pool, .stats = stats,
                .panels = pool_take(pool, (size_t)m->threads * m->max_k * STEP, sizeof(float)),
                .norm = pool_take(pool, 2 * m->max_k, sizeof(float)),
                .shift = pool_take(pool, m->max_k, sizeof(double)),
                .center = pool_take(pool, m->max_k, sizeof(double)),
                .bias = pool_take(pool, m->max_k > chunk ? m->max_k : chunk, sizeof(double))};
    return w->panels && w->norm && w->shift && w->center && w->bias
               ? PATCH_OK : no_memory(e, "scratch", pool->refused);
}

/* Give the scratch back before its pool ends. */
static void work_end(const Work *w) {
    pool_give(w->pool, w->panels);
    pool_give(w->pool, w->norm);
    pool_give(w->pool, w->shift);
    pool_give(w->pool, w->center);
    pool_give(w->pool, w->bias);
}

/* Threads for so many multiply-adds: few are not worth waking others for. */
static int team(const Model *m, double work) {
    return work < 2e5 ? 1 : m->threads;
}

static patch_status unreadable(const Model *m, patch_error *e) {
    return fail(e, PATCH_E_IO, m->file.path,
                "weights cannot be read, or there is no memory for them; check the file");
}

/* The Linear of one matrix of one layer, as this model's processing has it. */
static Linear layer_linear(const Model *m, size_t layer, int which) {
    static const size_t folded[] = {FOLD_Q, FOLD_K, FOLD_V, FOLD_O, FOLD_IN, FOLD_OUT};
    static const size_t raw[] = {RAW_QKV, RAW_QKV, RAW_QKV, RAW_O, RAW_IN, RAW_OUT};
    const ModelFile *f = &m->file;
    const size_t C = f->C, at = (size_t)which * C; /* where Q, K, V, O begin, side by side */
    const int reads_norm = which != LINEAR_O && which != LINEAR_OUT; /* else it writes the stream */
    const size_t k = which == LINEAR_OUT ? f->M : C;
    Linear l = {.k = k, .rows = k, .n = which == LINEAR_IN ? f->M : C};
    if (m->factored != NULL && which <= LINEAR_O) {
        const float *p = m->factored + layer * 4 * (C * C + C);
        l.dense = p + at * C;
        l.dense_bias = p + 4 * C * C + at;
        return l;
    }
    l.matrix = layer_tensor(f, layer, f->processing ? folded[which] : raw[which]);
    l.bias = l.matrix + 1; /* in the file's order */
    if (f->processing) /* nothing is left to do */
        return l;
    l.column = which <= LINEAR_V ? at : 0; /* of c_attn */
    if (reads_norm && (m->steps & DID_FOLD_LN)) {
        l.norm_w = norm_tensor(f, layer, which == LINEAR_IN);
        l.norm_b = l.norm_w + 1;
    }
    l.center = !reads_norm && (m->steps & DID_CENTER_WRITING);
    l.takes_value_bias = which == LINEAR_O && (m->steps & DID_FOLD_VALUES);
    l.drop_bias = which == LINEAR_V && (m->steps & DID_FOLD_VALUES);
    return l;
}

/* The D rows of W_O that a head's z meets, [D,C], without b_O. */
static Linear head_linear(const Model *m, size_t layer, size_t head) {
    Linear l = layer_linear(m, layer, LINEAR_O);
    l.k = m->file.D;
    l.first_row = head * l.k;
    l.drop_bias = 1;
    return l;
}

/* out [n] += a stored vector from `column` on, by way of the panels' place; 0: it is unreadable. */
static int add_vector(const Work *w, const Tensor *t, size_t column, size_t n, double *out) {
    if (!weights_row(&w->m->file, t, 0, w->panels, w->pool->a))
        return 0;
    for (size_t i = 0; i < n; i++)
        out[i] += (double)w->panels[column + i];
    return 1;
}

/* Fill the scratch with what the panels of this Linear are made from and w->bias with its bias as
   far as it is stored, and describe panel 0 in *s. Returns 0 where something cannot be read. */
static int linear_begin(const Work *w, const Linear *l, const unsigned char *bytes,
                        PanelSource *s) {
    double mean = 0; /* of the bias */
    *s = (PanelSource){.bytes = bytes, .dense = l->dense ? l->dense + l->first_row * l->n : NULL,
                       .type = l->matrix ? l->matrix->type : TYPE_F32, .k = l->k,
                       .stride = l->matrix ? l->matrix->cols : l->n, .transposed = l->transposed,
                       .shift = l->shift, .center_after = l->center_after};
    for (size_t i = 0; i < l->n; i++)
        w->bias[i] = l->dense_bias ? (double)l->dense_bias[i] : 0;
    if (l->bias != NULL && !add_vector(w, l->bias, l->column, l->n, w->bias))
        return 0;
    if (l->norm_w != NULL) { /* fold_ln */
        memset(w->shift, 0, l->k * sizeof *w->shift);
        if (!weights_row(&w->m->file, l->norm_w, 0, w->norm, w->pool->a) ||
            !add_vector(w, l->norm_b, 0, l->k, w->shift))
            return 0;
        s->scale = w->norm;
        s->shift = w->shift;
    }
    if (l->center) { /* each row of W and, like one row more, the bias */
        PARALLEL(team(w->m, (double)l->k * (double)l->n), schedule(static))
        for (long k = 0; k < (long)l->k; k++) {
            float *row = w->panels + (size_t)thread_number() * w->m->max_k * STEP;
            load_floats(l->matrix->type, bytes, (size_t)k * l->n, l->n, row);
            w->center[k] = w->m->kernels->mean(row, l->n);
        }
        s->center = w->center;
        for (size_t i = 0; i < l->n; i++)
            mean += w->bias[i];
        mean /= (double)l->n;
    }
    for (size_t i = 0; i < l->n; i++) /* of the two centerings, at most one is wanted */
        w->bias[i] -= mean + l->bias_after;
    return 1;
}

/* out [k,16] = panel number `panel`, zeros behind the last; w->bias += its share of the bias. */
static void linear_panel(const Work *w, const Linear *l, const PanelSource *s, size_t panel,
                         float *out) {
    const size_t first = panel * PANEL;
    double bias[PANEL] = {0};
    if (first >= l->n)
        memset(out, 0, l->k * PANEL * sizeof *out);
    else if (s->type == TYPE_PANELS) /* a processed file's, as it stands */
        load_floats(TYPE_F32, s->bytes, first * l->rows + l->first_row * PANEL, l->k * PANEL, out);
    else {
        PanelSource mine = *s;
        mine.column = l->column + first;
        mine.columns = l->n - first < PANEL ? l->n - first : PANEL;
        w->m->kernels->pack(&mine, out, bias);
        for (size_t j = 0; j < mine.columns; j++)
            w->bias[first + j] += bias[j];
    }
}

/* A product's rows: row i of x is x + index[i] * ldx (index NULL: i), of y is y + i * ldy. */
typedef struct Rows {
    size_t n, ldx, ldy;
    const float *x;
    const int *index; /* [n] */
    float *y;
} Rows;

/* y of all rows and columns first .. first + cols - 1 (at most 48). b: the columns' panels
   [.][k][16], `panel` floats apart. */
static void linear_columns(const Work *w, const Linear *l, const Rows *r, size_t first, size_t cols,
                           const float *b, size_t panel) {
    const size_t high = w->m->kernels->rows, wide = w->m->kernels->cols; /* of a tile */
    float bias[STEP] = {0}, tile[MAX_TILE_ROWS * STEP];                  /* tile [high,wide] */
    const float *a[MAX_TILE_ROWS];                                       /* [high] rows of x */
    for (size_t j = 0; j < cols; j++)
        bias[j] = l->drop_bias ? 0.0f : (float)w->bias[first + j];
    for (size_t sub = 0; sub < cols; sub += wide)
        for (size_t top = 0; top < r->n; top += high) {
            const size_t rows = r->n - top < high ? r->n - top : high;
            const size_t n = cols - sub < wide ? cols - sub : wide; /* that exist, as `rows` */
            const int whole = rows == high && n == wide; /* else by way of `tile` */
            float *y = r->y + top * r->ldy + first + sub;
            for (size_t i = 0; i < high; i++) { /* rows that do not exist repeat the last one */
                const size_t row = top + (i < rows ? i : rows - 1);
                a[i] = r->x + (r->index ? (size_t)r->index[row] : row) * r->ldx;
            }
            w->m->tile(l->k, a, b + sub / PANEL * panel + sub % PANEL, panel, bias + sub,
                       whole ? y : tile, whole ? r->ldy : wide);
            for (size_t i = 0; i < rows && !whole; i++)
                memcpy(y + i * r->ldy, tile + i * wide, n * sizeof *y);
        }
}

/* y = x . W + b: the seam behind which all matrix products are. Tasks are groups of 48 columns;
   each makes its panels and takes all rows through them: numbers do not depend on the threads. With
   `keep` not NULL the panels, [ceil(n/16)][k][16], are stored there instead: for `fold` and step 5.
   Afterwards w->bias holds the whole bias in double. */
static patch_status linear(const Work *w, const Linear *l, const Rows *r, float *keep,
                           patch_error *e) {
    const Model *m = w->m;
    const Tensor *t = l->matrix;
    const int panels = t != NULL && t->type == TYPE_PANELS; /* whose rows do not lie together */
    const size_t n_rows = t == NULL ? 0 : panels ? t->rows : l->transposed ? l->n : l->k;
    const unsigned char *bytes =
        t ? weights(&m->file, t, panels ? 0 : l->first_row, n_rows, w->pool->a) : NULL;
    const int last = t == NULL || l->transposed || l->column + l->n == t->cols; /* of c_attn: V */
    const double size = (double)l->k * (double)l->n;
    PanelSource s;
    if ((t != NULL && bytes == NULL) || !linear_begin(w, l, bytes, &s)) {
        weights_done(&m->file, t, n_rows, bytes, w->pool->a);
        return unreadable(m, e);
    }
    PARALLEL(team(m, (double)(r ? r->n + 8 : 8) * size), schedule(dynamic))
    for (long g = 0; g < (long)((l->n + STEP - 1) / STEP); g++) {
        const size_t at = (size_t)g * STEP, cols = l->n - at < STEP ? l->n - at : STEP;
        float *scratch = keep ? keep + at * l->k
                              : w->panels + (size_t)thread_number() * m->max_k * STEP;
        const float *b = scratch; /* [panels][k][16] */
        if (panels && !keep && !big_endian() && cols % m->kernels->cols == 0) /* in place */
            b = (const float *)(const void *)bytes + at * l->rows + l->first_row * PANEL;
        else
            for (size_t p = 0; p < STEP / PANEL && (!keep || p * PANEL < cols); p++)
                linear_panel(w, l, &s, at / PANEL + p, scratch + p * l->k * PANEL);
        if (!keep && r->n > 0)
            linear_columns(w, l, r, at, cols, b, (b == scratch ? l->k : l->rows) * PANEL);
    }
    if (m->file.map.bytes == NULL || last) /* else the pages are needed again at once */
        weights_done(&m->file, t, n_rows, bytes, w->pool->a);
    if (w->stats != NULL && !keep) {
        w->stats->flops += 2.0 * (double)r->n * size;
        w->stats->weight_bytes_read += size * (t && t->type == TYPE_F16 ? 2 : 4);
    }
    return PATCH_OK;
}

/* ---- opening ---- */

patch_options patch_options_default(void) {
    return (patch_options){.fold_ln = 1, .center_writing_weights = 1, .center_unembed = 1,
                           .fold_value_biases = 1};
}

#ifdef PATCH_CORE
#define factor_model(m, e) fail(e, PATCH_E_USAGE, "refactor_factored_attn_matrices",               \
                                "PATCH_CORE has left it out of this build; leave the option out")
#else
static patch_status factor_model(Model *m, patch_error *e); /* step 5: chapter 11.1 */
#endif

/* What follows from the file and the options, step 5 included. A processed file has had its steps:
   the default options, which nobody need have asked for, give way to them; others have to agree. */
static patch_status settle_model(Model *m, patch_error *e) {
    const ModelFile *f = &m->file;
    const uint32_t defaults =
        DID_FOLD_LN | DID_CENTER_WRITING | DID_CENTER_UNEMBED | DID_FOLD_VALUES;
    patch_options *o = &m->options;
    int *const on[] = {&o->fold_ln, &o->center_writing_weights, &o->center_unembed,
                       &o->fold_value_biases, &o->refactor_factored_attn_matrices};
    for (size_t i = 0; i < sizeof on / sizeof on[0]; i++) /* bit i of `processing` */
        m->steps |= *on[i] ? 1u << i : 0u;
    if (f->processing && m->steps != defaults && m->steps != f->processing - DID_FOLD)
        return fail(e, PATCH_E_INPUT, f->path,
                    "a folded model has had its weight processing, and another one is asked for; "
                    "leave the processing options out or open the model that was folded");
    for (size_t i = 0; f->processing && i < sizeof on / sizeof on[0]; i++)
        *on[i] = (f->processing >> i & 1) != 0;
    m->steps = f->processing ? f->processing - DID_FOLD : m->steps;
    m->has_tokenizer = f->tokenizer_bytes > 0;
    m->kernels = choose_kernels();
    m->tile = o->plain ? m->kernels->plain : m->kernels->tile;
    m->threads = o->threads > 0 ? o->threads : max_threads(); /* 0: as many as there are */
    m->threads = m->threads < THREAD_CEILING ? m->threads : THREAD_CEILING;
    m->max_k = f->M > f->C ? f->M : f->C;
    m->dims = (patch_dims){
        .n_layers = (int)f->L, .n_heads = (int)f->H, .d_model = (int)f->C, .d_head = (int)f->D,
        .d_mlp = (int)f->M, .n_ctx = (int)f->N, .d_vocab = (int)f->V, .act_fn = (int)f->act_fn,
        .bos = m->has_tokenizer && m->tokenizer.eot != NO_TOKEN ? (int)m->tokenizer.eot : -1,
        .eps = f->eps, .file_bytes = (double)f->map.size, .folded = f->processing != 0,
        .threads = m->threads, .dtype = f->tensors[0].type == TYPE_F16,
        .kernels = o->plain ? "plain" : m->kernels->name};
    for (size_t i = 0; i < f->n_tensors; i++)
        m->dims.parameters += (double)f->tensors[i].rows * f->tensors[i].cols;
    return (m->steps & DID_REFACTOR) && !f->processing ? factor_model(m, e) : PATCH_OK;
}

void patch_model_free(patch_model *m) {
    if (m == NULL)
        return;
    const patch_allocator *a = &m->allocator; /* all of the model may be half built, or zero */
    tokenizer_free(&m->tokenizer, a);
    give(a, m->factored);
    if (m->file.map.bytes == NULL)
        give(a, (void *)(uintptr_t)m->file.front); /* a copy */
    map_close(&m->file.map);
    give(a, m->file.tensors);
    give(a, m); /* which has read the allocator before it goes */
}

/* The model in the file at `path` or, where that is NULL, in n bytes of memory. */
static patch_status model_load(const char *path, const void *bytes, size_t n,
                               const patch_options *options, patch_model **model, patch_error *e) {
    const patch_options o = options ? *options : patch_options_default();
    const patch_allocator a = o.allocator.alloc ? o.allocator : HEAP;
    const char *where = path ? path : "memory";
    Model *m = take_zeroed(&a, 1, sizeof *m + strlen(where) + 1);
    patch_status s;
    *model = NULL;
    if (m == NULL)
        return no_memory(e, where, sizeof *m);
    ModelFile *f = &m->file;
    m->options = o;
    m->allocator = a;
    f->path = strcpy(m->path, where);
    f->map = (Map){bytes, n, 0}; /* map_open puts its own in the place of this */
    if (path != NULL && !map_open(path, &f->map))
        s = fail(e, PATCH_E_IO, path,
                 "cannot open the model (%s); check -m or make one with convert_weights.py",
                 errno == EINVAL ? "not an ordinary file, or empty" : strerror(errno));
    else
        s = read_front(f, &a, e);
    if (s == PATCH_OK && f->tokenizer_bytes > 0) /* it is used where it lies */
        s = tokenizer_read(&m->tokenizer, f->front + f->tokenizer_at, f->tokenizer_bytes, f->V,
                           where, &a, e);
    if (s == PATCH_OK && (s = settle_model(m, e)) == PATCH_OK)
        *model = m;
    else
        patch_model_free(m);
    return s;
}

patch_status patch_model_open(const char *path, const patch_options *options, patch_model **model,
                              patch_error *e) {
    return model_load(path, NULL, 0, options, model, e);
}

patch_status patch_model_from_memory(const void *bytes, size_t n, const patch_options *options,
                                     patch_model **model, patch_error *e) {
    *model = NULL;
    if (bytes == NULL) /* which inside means a file that is not mapped */
        return fail(e, PATCH_E_INPUT, "memory", "there is no model at NULL; give its bytes");
    if ((uintptr_t)bytes % sizeof(float) != 0) /* a folded model's panels are read as floats */
        return fail(e, PATCH_E_USAGE, "memory",
                    "the model is not aligned to 4 bytes; align it to 64");
    return model_load(NULL, bytes, n, options, model, e);
}

const patch_dims *patch_model_dims(const patch_model *m) {
    return &m->dims;
}
const patch_options *patch_model_options(const patch_model *m) {
    return &m->options;
}

/* Hold every tensor's bytes against the CRC-32 in the table, and the gaps before them against zero.
   */
patch_status patch_model_verify(const patch_model *m, patch_error *e) {
    const ModelFile *f = &m->file;
    size_t end = f->tokenizer_at + f->tokenizer_bytes; /* of what is checked so far */
    for (size_t i = 0; i < f->n_tensors; i++) {
        const Tensor *t = &f->tensors[i];
        const Tensor gap = {.rows = 1, .cols = 1, .bytes = t->offset - end, .offset = end};
        if (gap.bytes > 0) {
            const unsigned char *p = weights(f, &gap, 0, 1, &m->allocator);
            if (p == NULL)
                return unreadable(m, e);
            const int bad = memcmp(p, GAP, gap.bytes) != 0;
            weights_done(f, &gap, 1, p, &m->allocator);
            if (bad)
                return fail(e, PATCH_E_FORMAT, f->path, "byte %lu: the gap before %s is not zero; "
                            "copy or convert the file again", (unsigned long)end, t->name);
        }
        end = t->offset + t->bytes;
        const size_t row = t->bytes / t->rows, some = (1 << 20) / row + 1; /* about a megabyte */
        uint32_t crc = 0; /* of the rows before `at` */
        for (size_t at = 0; at < t->rows; at += some) {
            const size_t n = t->rows - at < some ? t->rows - at : some;
            const unsigned char *p = weights(f, t, at, n, &m->allocator);
            if (p == NULL)
                return unreadable(m, e);
            crc = crc32_of(crc, p, n * row);
            weights_done(f, t, n, p, &m->allocator);
        }
        if (crc != t->crc)
            return fail(e, PATCH_E_FORMAT, f->path,
                        "byte %lu: checksum of %s does not match; copy or convert the file again",
                        (unsigned long)t->offset, t->name);
    }
    return PATCH_OK;
}

/* ---- tokens: the public functions (patch.h) ------------------------------------------------- */

/* The ids of the text, behind <|endoftext|>'s where one is asked for; that needs a tokenizer that
   has one, which a checkpoint's own need not. ids may be NULL where capacity is 0. */
patch_status patch_encode(const patch_model *model, const char *text, size_t n_bytes,
                          int prepend_bos, int *ids, size_t capacity, size_t *n_ids,
                          patch_error *error) {
    const size_t first = prepend_bos ? 1 : 0, room = capacity > first ? capacity - first : 0;
    *n_ids = 0;
    if (!model->has_tokenizer)
        return fail(error, PATCH_E_INPUT, "text", "the model file has no tokenizer; give ids "
                    "(clean_ids) or convert the checkpoint with its tokenizer");
    if (prepend_bos && model->dims.bos < 0)
        return fail(error, PATCH_E_INPUT, "text",
                    "the tokenizer has no " EOT_TEXT " to put in front; use --no-bos");
    const patch_status s = tokenizer_encode(&model->tokenizer, text, n_bytes,
                                            room > 0 ? ids + first : NULL, room, n_ids,
                                            &model->allocator, error);
    if (s != PATCH_OK && s != PATCH_E_SIZE)
        return s;
    if (prepend_bos && capacity > 0)
        ids[0] = model->dims.bos;
    *n_ids += first; /* it may be what does not fit, and belongs in SIZE's number */
    return fit(*n_ids, capacity, "ids", error);
}

/* The bytes of the ids' tokens, of which only whole tokens are copied and only while they fit. An
   id without a token is an error: to leave it out would hide that the ids are another model's. */
patch_status patch_decode(const patch_model *model, const int *ids, size_t n, char *text,
                          size_t capacity, size_t *n_bytes, patch_error *error) {
    size_t length, total = 0;
    *n_bytes = 0;
    for (size_t i = 0; i < n; i++) {
        const char *token = tokenizer_token(&model->tokenizer, ids[i], &length);
        if (token == NULL)
            return fail(error, PATCH_E_INPUT, "ids", "id %d has no token; %s", ids[i],
                        model->has_tokenizer ? "give ids that patch_encode makes"
                                             : "convert the checkpoint with its tokenizer");
        if (total <= capacity && length <= capacity - total) /* never again once too long */
            memcpy(text + total, token, length);
        if (!size_plus(total, length, &total))
            total = SIZE_MAX;
    }
    *n_bytes = total;
    return fit(total, capacity, "bytes", error);
}

/* Without a tokenizer the model's is zeroed, and no id has a token. */
const char *patch_token(const patch_model *model, int id, size_t *length) {
    return tokenizer_token(&model->tokenizer, id, length);
}

/* ==== 7. Hook points =============================================================================
   Every activation of GPT-2 is a named vector of a row, a row being one position of one run: also
   the scores and the pattern, which are rows of a destination. So to cache, patch, ablate, freeze
   and noise is one operation, on a slice of a row's vector at a named point.

   The stages below are the hook points in the order of the forward pass (drawn in chapter 0), and
   behind K and V the two prefixes that attention reads: all keys, or values, of positions 0..t. The
   table says of each stage what its rows are made of, which is all that the engine has to know in
   order to share them; where they stand in memory; and how they are computed. */

enum { K_PREFIX = PATCH_N_HOOKS, V_PREFIX, STAGES };

typedef enum MadeOf {
    LEAF,  /* a token or a position */
    SAME,  /* one row of stage a */
    PAIR,  /* a row of stage a and a row of stage b, at one position */
    PREFIX /* the rows of stage a at positions 0..t */
} MadeOf;

/* Where a layer's rows stand. By the time a stage writes to a region, nobody reads what stood
   there:

       stage          STREAM        MID          OUT             WIDE
       resid_pre      resid_pre
       ln1            |                          normalized      scale
       q k v z        |                          |               q k v z, side by side (BESIDE)
       attn_out       |                          attn_out
       resid_mid      |             resid_mid
       ln2                          |            normalized      scale
       mlp                          |            mlp_out         mlp_pre, in its place mlp_post
       resid_post     resid_post, which the next layer finds as its resid_pre

   RESULTS, [H,C] a row, is larger than all of these together, and empty unless somebody asks. */
typedef enum Region { NOWHERE, STREAM, MID, OUT, WIDE, RESULTS, BESIDE } Region;

/* LATER: scores and patterns are made when z is; prefixes are only lists. */
typedef enum How { LATER, EMBED, ADD, SCALE, NORM, LINEAR, ATTEND, SPELL_OUT, ACTIVATE } How;

typedef struct StageRule {
    int stage, a, b;
    MadeOf made_of;
    Region region;
    How how;
    int linear; /* LINEAR: which matrix */
} StageRule;

/* Read a line as: q is made of one row of ln1_normalized, beside others in WIDE, by a product
   with W_Q; z of a row of the pattern and a prefix of values. RESID_PRE of a later layer is the
   RESID_POST of the one before, and stays in its place. ATTN_OUT is made of RESULT, but computed
   from Z where no result is edited. */
static const StageRule stage_rules[] = {
    {PATCH_EMBED, 0, 0, LEAF, OUT, EMBED, 0},
    {PATCH_POS_EMBED, 0, 0, LEAF, MID, EMBED, 0},
    {PATCH_RESID_PRE, PATCH_EMBED, PATCH_POS_EMBED, PAIR, STREAM, ADD, 0},
    {PATCH_LN1_SCALE, PATCH_RESID_PRE, 0, SAME, WIDE, SCALE, 0},
    {PATCH_LN1_NORMALIZED, PATCH_RESID_PRE, PATCH_LN1_SCALE, PAIR, OUT, NORM, 0},
    {PATCH_Q, PATCH_LN1_NORMALIZED, 0, SAME, BESIDE, LINEAR, LINEAR_Q},
    {PATCH_K, PATCH_LN1_NORMALIZED, 0, SAME, BESIDE, LINEAR, LINEAR_K},
    {PATCH_V, PATCH_LN1_NORMALIZED, 0, SAME, BESIDE, LINEAR, LINEAR_V},
    {K_PREFIX, PATCH_K, 0, PREFIX, NOWHERE, LATER, 0},
    {V_PREFIX, PATCH_V, 0, PREFIX, NOWHERE, LATER, 0},
    {PATCH_ATTN_SCORES, PATCH_Q, K_PREFIX, PAIR, NOWHERE, LATER, 0},
    {PATCH_PATTERN, PATCH_ATTN_SCORES, 0, SAME, NOWHERE, LATER, 0},
    {PATCH_Z, PATCH_PATTERN, V_PREFIX, PAIR, BESIDE, ATTEND, 0},
    {PATCH_RESULT, PATCH_Z, 0, SAME, RESULTS, SPELL_OUT, 0},
    {PATCH_ATTN_OUT, PATCH_RESULT, 0, SAME, OUT, LINEAR, LINEAR_O},
    {PATCH_RESID_MID, PATCH_RESID_PRE, PATCH_ATTN_OUT, PAIR, MID, ADD, 0},
    {PATCH_LN2_SCALE, PATCH_RESID_MID, 0, SAME, WIDE, SCALE, 0},
    {PATCH_LN2_NORMALIZED, PATCH_RESID_MID, PATCH_LN2_SCALE, PAIR, OUT, NORM, 0},
    {PATCH_MLP_PRE, PATCH_LN2_NORMALIZED, 0, SAME, WIDE, LINEAR, LINEAR_IN},
    {PATCH_MLP_POST, PATCH_MLP_PRE, 0, SAME, WIDE, ACTIVATE, 0},
    {PATCH_MLP_OUT, PATCH_MLP_POST, 0, SAME, OUT, LINEAR, LINEAR_OUT},
    {PATCH_RESID_POST, PATCH_RESID_MID, PATCH_MLP_OUT, PAIR, STREAM, ADD, 0},
    {PATCH_LN_FINAL_SCALE, PATCH_RESID_POST, 0, SAME, WIDE, SCALE, 0},
    {PATCH_LN_FINAL_NORMALIZED, PATCH_RESID_POST, PATCH_LN_FINAL_SCALE, PAIR, OUT, NORM, 0},
};
enum { RULES = sizeof stage_rules / sizeof stage_rules[0] };

static const struct HookFact {
    const char *name;
    char shape; /* of a row: see PATCH_HOOKS */
} hook_facts[] = {
#define X(id, name, shape) {name, shape},
    PATCH_HOOKS(X)
#undef X
};

/* Is a stage in each layer, and not only before the first or behind the last? */
static int in_blocks(int stage) {
    return stage > PATCH_POS_EMBED && stage != PATCH_LN_FINAL_SCALE &&
           stage != PATCH_LN_FINAL_NORMALIZED;
}

/* The layer under which the engine keeps a stage: outside the blocks the first or the last. */
static int hook_layer(const Model *m, int stage, int layer) {
    return in_blocks(stage) ? layer : stage <= PATCH_POS_EMBED ? 0 : m->dims.n_layers - 1;
}

/* Floats of one row of a hook point; of scores and pattern, of a run of t tokens. */
static size_t hook_width(const Model *m, int hook, size_t t) {
    const ModelFile *f = &m->file;
    switch (hook_facts[hook].shape) {
    case 'M': return f->M;
    case 'R': return f->H * f->C;
    case 'P': return f->H * t;
    case '1': return 1;
    default: return f->C; /* C, and Z = [H,D] */
    }
}

int patch_hook_name(patch_hook hook, int layer, char *name, size_t capacity) {
    const char *text = (size_t)hook < PATCH_N_HOOKS ? hook_facts[hook].name : "";
    const char *at = strstr(text, "%d");
    return at == NULL ? snprintf(name, capacity, "%s", text)
                      : snprintf(name, capacity, "%.*s%d%s", (int)(at - text), text, layer, at + 2);
}

/* ==== 8. The engine ==============================================================================
   A sweep asks for hundreds of forward passes that differ in one slice of one activation each.
   Done one by one, nearly all of the work repeats bit for bit. The engine takes all of these
   runs at once, works out on integers alone what is different at all, and computes just that.

   RUNS ARE TABLES. A run is a table, position -> row, for each stage of each layer. A row is
   known by what it is made of (chapter 7's rules), and what is made of the same is the same row.
   Rows are *interned*, as a compiler interns strings: intern() looks up "stage, a, b" in a hash
   table and returns the number of the row that is already there, or of a new one. Here are the
   prompts "a b c" (clean) and "a x c" (corrupted), and two cells of a sweep, the corrupted run
   with resid_pre of layer 1 copied from the clean one at position 1, and at position 0:

                     layer 0                                 layer 1
                     resid_pre    prefixes     resid_post    resid_pre     prefixes     resid_post
       clean          0  1  2     p0 p1 p2      0  1  2       0  1  2      p0 p1 p2      0  1  2
       corrupted      0  3  2     p0 p3 p4      0  3  4       0  3  4      p0 p3 p4      0  3  4
       pos 1          .  .  .     .  .  .       .  .  .       0 [1] 4      p0 p1 p5      0  1  5
       pos 0          .  .  .     .  .  .       .  .  .       .  .  .      .  .  .       .  .  .

   Position 2 holds the same token in both prompts, hence begins as the same row. Attention is
   what tells it apart: it makes z of position t out of one row of q and *all* keys and values
   0..t. A walk through a trie, keyed by (node so far, next row), makes each such prefix a single
   number too, and (q, prefix) a pair like any other. The prefixes of layer 1:

       p0 --- p1 --- p2       clean
        \      \____ p5       pos 1: the clean run's keys 0 and 1, then its own
         \___ p3 --- p4       corrupted

   "pos 1" wrote its edit by setting table[1] to the clean run's row: no float is copied. It owes
   layer 1 one row, number 5, as everything at positions 0 and 1 is the clean run's. "pos 0"
   copied a row onto itself: its table is the corrupted run's, and it never costs anything. Four
   runs of three tokens and two layers, 24 rows in all, are 5 + 6 rows; and nothing was compared
   but integers.

   EDITS. An edit that does not take a whole vector over makes a row of (row before, kind of edit,
   its content), never of the run's number, so that equal edits too are one row. Then it all follows
   by itself. Patching a run with itself is the run (but for hook_result: edited_row). Patching
   every position of resid_pre makes all later tables the clean run's. A q edit makes one new row;
   a k or v edit new prefixes, hence new rows at all later positions; where z is replaced whole, q
   and prefix leave the row's making, and what they were is no longer computed.

   TRACKS. Most runs are, most of the way, the unedited run of the same tokens, their *class*. A
   run is not even walked until an edit changes one of its tables (the dots above); then it gets
   a track, tables of its own, walked only from the first position that changed.

   ONLY WHAT IS READ. From the reads, backwards through the layers, each needed row marks the
   rows that it is made of; the rest is struck out. A sweep reads the last position behind the
   last layer: so the last layer computes its queries, its MLP and its residual stream for that
   position alone, and its keys and values for all, without a line of code that says so.

   ONE PASS. Layer by layer, stage by stage, the rows that are left, of all runs, go through each
   matrix together, as one [R,C]: the weights are read once for all runs, and the product has
   hundreds of rows instead of a prompt's sixteen, which is what makes it fast.

       plan:  tables -> nodes -> needed? -> slots       no float is touched
       pass:  rows of the stage before [slots,C] --gather--> x W + b --> this stage's [slots,n]

   THE SAME BITS. A row's numbers depend on its making alone (chapter 5: one order of summation,
   whatever stands in the matrix beside it), so each run's are those that it has alone. With
   sharing off (UNSHARED) every position of every run is a row and all are computed: the same
   code, slowly, as the reference that the tests and --brute hold the rest against. */

/* A row, or a prefix. Made by its stage's rule: a and b are rows of the rule's stages (LEAF: a is
   the token or position; PREFIX: a is the prefix one shorter, b the new row). Made by an edit (edit
   >= 0): a is the row before, -1 where nothing of it is left; b the row copied from, or the
   position. */
typedef struct Node {
    int a, b, edit;
    int slot; /* where it stands in its stage's buffer; DEAD: nobody needs it */
} Node;

enum { DEAD = -1, LIVE = -2 /* needed, not numbered yet */ };

typedef struct Stage {
    Node *nodes; /* [n] of capacity */
    int n, capacity;
    int slots;  /* rows of the buffer */
    int edited; /* an edit has changed a table here */
} Stage;

/* A run's way through the layers: tables of its own, or (the first ones: classes) shared by all
   runs that follow it. */
typedef struct Track {
    const int *tokens;
    int n_tokens;
    int class; /* the track whose rows it has before position `from` */
    int from;
} Track;

/* An edit or a read of a run. Sorted by stage, then run, then the caller's order, they stand as the
   plan and the pass meet them. */
typedef struct Event {
    int at; /* layer * STAGES + stage */
    int run, index;
    int first; /* reads: where their rows begin in read_rows */
} Event;

/* SIZED: a plan as SHARED, then a pass that takes its memory and does nothing. */
typedef enum Mode { UNSHARED, SHARED, SIZED } Mode;

typedef struct Plan {
    const Model *m;
    Pool *pool;
    const patch_run *runs;
    patch_read *reads;
    int n_runs, share;
    int T; /* tokens of the longest run */
    Track *tracks;
    int *track_of; /* [n_runs] */
    int n_classes, n_tracks;
    int *store[STAGES];  /* [tracks,T]: tables of their own; made when a stage first needs them */
    int **table[STAGES]; /* [tracks]: the table that holds, own or another's */
    Stage *stages;       /* [L,STAGES] */
    Event *edits, *read_events;
    int n_edits, n_reads, next_edit, next_read;
    int *read_rows;   /* the rows that the reads mean, all positions of all reads */
    int *scratch;     /* [T] */
    int *hash;        /* node + 1 of the stage being built, open addressing; 0: free */
    size_t hash_size; /* a power of two */
} Plan;

static Stage *stage_at(const Plan *p, int layer, int stage) {
    return &p->stages[layer * STAGES + stage];
}

static const patch_edit *edit_of(const Plan *p, int event) {
    return &p->runs[p->edits[event].run].edits[p->edits[event].index];
}

/* ---- interning ----
   One hash table serves all stages, one after the other: rows of two stages are never the same. It
   holds numbers of nodes, as the nodes themselves tell what they are made of; a collision moves on
   to the next place. At most half of it is full. */

/* The first of an edit's values at a position. */
static const float *edit_values(const patch_edit *e, int pos) {
    return e->values + (e->pos < 0 ? (size_t)pos * e->stride : 0);
}

/* Are two nodes made of the same? Of edits only the contents count; of values, where they lie: to
   compare them would cost more than it could save. */
static int same_node(const Plan *p, const Node *x, const Node *y) {
    if (x->a != y->a || (x->edit < 0) != (y->edit < 0))
        return 0;
    if (x->edit < 0)
        return x->b == y->b;
    const patch_edit *e = edit_of(p, x->edit), *f = edit_of(p, y->edit);
    if (e->op != f->op || e->head != f->head || e->src != f->src || /* [H,T] depends on T */
        p->runs[p->edits[x->edit].run].n_tokens != p->runs[p->edits[y->edit].run].n_tokens)
        return 0;
    return e->op == PATCH_COPY    ? x->b == y->b
           : e->op == PATCH_SCALE ? memcmp(&e->factor, &f->factor, sizeof e->factor) == 0
                                  : edit_values(e, x->b) == edit_values(f, y->b);
}

/* Equal for nodes made of the same; otherwise any mixture of the bits will do. */
static size_t node_hash(const Plan *p, const Node *x) {
    const patch_edit *e = x->edit < 0 ? NULL : edit_of(p, x->edit);
    uint64_t h = (uint32_t)x->a * UINT64_C(0x9E3779B97F4A7C15);
    if (e == NULL || e->op == PATCH_COPY)
        h ^= (uint32_t)x->b;
    else if (e->op != PATCH_SCALE)
        h ^= (uint64_t)(uintptr_t)edit_values(e, x->b) / sizeof(float);
    h *= UINT64_C(0xC2B2AE3D27D4EB4F);
    if (e != NULL)
        h ^= (uint64_t)e->op << 20 ^ (uint64_t)(e->head + 2) << 40 ^ (uint32_t)e->src;
    return (size_t)((h ^ h >> 29) * UINT64_C(0x9E3779B97F4A7C15) >> 32);
}

/* Where a node stands in the hash table, or the free place where it belongs. */
static int *hash_find(const Plan *p, const Stage *s, const Node *node) {
    size_t at = node_hash(p, node) & (p->hash_size - 1);
    while (p->hash[at] != 0 && !same_node(p, &s->nodes[p->hash[at] - 1], node))
        at = (at + 1) & (p->hash_size - 1);
    return &p->hash[at];
}

/* Let the hash table know this stage's nodes and no other's, with room for as many more. 0: memory
   is out, here and in all that follows. */
static int hash_stage(Plan *p, const Stage *s) {
    size_t size = p->hash_size ? p->hash_size : 256;
    while (size < ((size_t)s->n + 32) * 4)
        size *= 2;
    if (size > p->hash_size) {
        pool_give(p->pool, p->hash);
        p->hash = pool_raw(p->pool, size, sizeof *p->hash);
        p->hash_size = p->hash ? size : 0;
    }
    if (p->hash == NULL)
        return 0;
    memset(p->hash, 0, size * sizeof *p->hash);
    for (int i = 0; p->share && i < s->n; i++)
        *hash_find(p, s, &s->nodes[i]) = i + 1;
    return 1;
}

/* Append a node; -1 where memory is out. */
static int add_node(Plan *p, Stage *s, Node node) {
    if (s->n == s->capacity) {
        const int capacity = s->capacity ? s->capacity * 2 : 32;
        Node *nodes = s->capacity < INT_MAX / 4
                          ? pool_take(p->pool, (size_t)capacity, sizeof *nodes) : NULL;
        if (nodes == NULL)
            return -1;
        if (s->n > 0)
            memcpy(nodes, s->nodes, (size_t)s->n * sizeof *nodes);
        pool_give(p->pool, s->nodes);
        s->nodes = nodes;
        s->capacity = capacity;
    }
    s->nodes[s->n] = node;
    return s->n++;
}

/* The node made of this, found or new; -1 where memory is out. This is all there is to sharing. */
static int intern(Plan *p, Stage *s, int a, int b, int edit) {
    const Node node = {a, b, edit, DEAD};
    if (!p->share)
        return add_node(p, s, node);
    if ((size_t)s->n * 2 >= p->hash_size && !hash_stage(p, s))
        return -1;
    int *place = hash_find(p, s, &node);
    if (*place == 0)
        *place = add_node(p, s, node) + 1;
    return *place - 1;
}

/* ---- one stage of all runs ----
   For each stage of each layer, in order: derive_stage makes the rows that its rule makes and fills
   the tables; edit_stage replaces entries of the edited runs' tables; note_reads writes down what
   the reads of this stage see. A function that returns an int returns 0 where memory is out. */

/* A track's own table at a stage. Each layer writes over the one before: what a later layer
   needs of it, nodes remember. */
static int *own_table(Plan *p, int stage, int track) {
    const size_t tracks = (size_t)(p->n_classes + p->n_runs);
    if (p->store[stage] == NULL)
        p->store[stage] = pool_take(p->pool, tracks * (size_t)p->T, sizeof(int));
    return p->store[stage] ? p->store[stage] + (size_t)track * (size_t)p->T : NULL;
}

/* The rows of a PAIR, PREFIX or LEAF stage on one track. Before `from` they are the class's. */
static int walk_track(Plan *p, Stage *s, const StageRule *rule, int track) {
    const Track *t = &p->tracks[track];
    const int *a = p->table[rule->a][track], *b = p->table[rule->b][track];
    int *own = own_table(p, rule->stage, track);
    if (own == NULL)
        return 0;
    if (t->from > 0)
        memcpy(own, p->table[rule->stage][t->class], (size_t)t->from * sizeof *own);
    p->table[rule->stage][track] = own;
    for (int pos = t->from; pos < t->n_tokens; pos++) {
        if (rule->made_of == PAIR)
            own[pos] = intern(p, s, a[pos], b[pos], -1);
        else if (rule->made_of == PREFIX) /* the trie: one node further */
            own[pos] = intern(p, s, pos ? own[pos - 1] : -1, a[pos], -1);
        else
            own[pos] = intern(p, s, rule->stage == PATCH_EMBED ? t->tokens[pos] : pos, 0, -1);
        if (own[pos] < 0)
            return 0;
    }
    return 1;
}

/* Is this stage nothing but the layer before's RESID_POST? */
static int stays(int layer, const StageRule *rule) {
    return rule->stage == PATCH_RESID_PRE && layer > 0;
}

/* The stage whose rows a derived node's a (which = 0) or b (1) is. */
static Stage *parent_stage(const Plan *p, int layer, const StageRule *rule, int which) {
    return stays(layer, rule) ? stage_at(p, layer - 1, PATCH_RESID_POST)
                              : stage_at(p, layer, which ? rule->b : rule->a);
}

/* All rows that a stage's rule makes. Where it makes exactly one of each row of its parent, they
   get the parent's numbers and no table changes hands. That is so for SAME, and for a LayerNorm as
   long as no edit has come between the residual stream and its scale. */
static int derive_stage(Plan *p, int layer, const StageRule *rule) {
    Stage *s = stage_at(p, layer, rule->stage);
    const Stage *parent = parent_stage(p, layer, rule, 0);
    int ok = 1;
    if (rule->made_of == SAME || stays(layer, rule) ||
        (rule->how == NORM && !stage_at(p, layer, rule->b)->edited)) {
        const int from = stays(layer, rule) ? PATCH_RESID_POST : rule->a;
        memcpy(p->table[rule->stage], p->table[from], (size_t)p->n_tracks * sizeof(int *));
        for (int i = 0; ok && i < parent->n; i++)
            ok = add_node(p, s, (Node){i, i, -1, DEAD}) >= 0;
        return ok;
    }
    ok = hash_stage(p, s);
    for (int track = 0; ok && track < p->n_tracks; track++)
        ok = walk_track(p, s, rule, track);
    return ok;
}

/* The row that an edit makes of row `base` at one position. -1: memory is out. A copy of a whole
   row is the row itself, and so is a copy onto itself; but an edited result always is a row of its
   own, as it is known by that: attn_out is then summed head by head, which gives other last bits
   than the one product (sum_results), and may not hang on whether a copy changed anything. */
static int edited_row(Plan *p, Stage *s, int stage, int base, int event, int pos) {
    const patch_edit *e = edit_of(p, event);
    const int whole = e->head < 0 && e->src < 0;
    int source = pos;
    if (e->op == PATCH_COPY) {
        source = p->table[stage][p->track_of[e->source]][pos];
        if (p->share && stage != PATCH_RESULT && (whole || source == base))
            return source;
    }
    return intern(p, s, whole && e->op <= PATCH_SET ? -1 : base, source, event);
}

/* Apply the next run's edits at a stage. Only if a table entry changes does a run that followed its
   class leave it. */
static int edit_run(Plan *p, Stage *s, int at) {
    const int run = p->edits[p->next_edit].run, stage = at % STAGES;
    int track = p->track_of[run], changed = 0; /* changed: the first position that is */
    const int n = p->tracks[track].n_tokens;
    const int *before = p->table[stage][track];
    const Event *event;
    memcpy(p->scratch, before, (size_t)n * sizeof *before);
    while (p->next_edit < p->n_edits && (event = &p->edits[p->next_edit])->at == at &&
           event->run == run) {
        const int pos = edit_of(p, p->next_edit)->pos, end = pos < 0 ? n : pos + 1;
        for (int i = pos < 0 ? 0 : pos; i < end; i++)
            if ((p->scratch[i] = edited_row(p, s, stage, p->scratch[i], p->next_edit, i)) < 0)
                return 0;
        p->next_edit++;
    }
    while (changed < n && p->scratch[changed] == before[changed])
        changed++;
    if (changed == n)
        return 1;
    if (p->share && track < p->n_classes) { /* born: all its tables so far are the class's */
        p->tracks[p->n_tracks] = p->tracks[track];
        p->tracks[p->n_tracks].from = changed;
        for (int k = 0; k < STAGES; k++)
            p->table[k][p->n_tracks] = p->table[k][track];
        p->track_of[run] = track = p->n_tracks++;
    }
    if (changed < p->tracks[track].from)
        p->tracks[track].from = changed;
    int *own = own_table(p, stage, track);
    if (own == NULL)
        return 0;
    memcpy(own, p->scratch, (size_t)n * sizeof *own);
    p->table[stage][track] = own;
    s->edited = 1;
    return 1;
}

/* Apply all edits at one stage, run by run: a source is always an earlier run, so its table is
   done. */
static int edit_stage(Plan *p, int at) {
    Stage *s = &p->stages[at];
    int ok = 1;
    for (int n = 0; ok && p->next_edit < p->n_edits && p->edits[p->next_edit].at == at; n++)
        ok = (n > 0 || hash_stage(p, s)) && edit_run(p, s, at);
    return ok;
}

/* How many rows a read means. */
static int rows_read(const Plan *p, const patch_read *r) {
    return r->pos < 0 ? p->runs[r->run].n_tokens : 1;
}

static void need(Stage *s, int node) {
    if (node >= 0)
        s->nodes[node].slot = LIVE;
}

/* Note which rows the reads at this stage mean, as the next layer overwrites the tables. */
static void note_reads(Plan *p, int at) {
    for (; p->next_read < p->n_reads && p->read_events[p->next_read].at == at; p->next_read++) {
        const Event *event = &p->read_events[p->next_read];
        patch_read *r = &p->reads[event->index];
        const int *rows = p->table[at % STAGES][p->track_of[r->run]] + (r->pos < 0 ? 0 : r->pos);
        r->id = r->pos < 0 ? -1 : *rows;
        for (int i = 0; i < rows_read(p, r); i++)
            need(&p->stages[at], p->read_rows[event->first + i] = rows[i]);
    }
}

/* ---- what is needed ----
   The plan so far holds every row of every run. Most sweeps read no more than a row a run, at the
   end: what these are not made of, directly or through others, is struck out. */

/* One needed node needs what it is made of: for an edit that is the row before, where anything
   of it is left, and the row copied from; both stand in the same stage. */
static void need_parents(const Plan *p, int layer, const StageRule *rule, Stage *s, const Node *n) {
    const Stage *result = stage_at(p, layer, PATCH_RESULT);
    if (n->edit >= 0) {
        need(s, n->a);
        need(s, edit_of(p, n->edit)->op == PATCH_COPY ? n->b : -1);
    } else if (rule->made_of == PREFIX) {
        need(s, n->a);
        need(stage_at(p, layer, rule->a), n->b);
    } else if (rule->stage == PATCH_ATTN_OUT && result->nodes[n->a].edit < 0) {
        need(stage_at(p, layer, PATCH_Z), result->nodes[n->a].a); /* no result is spelled out */
    } else if (rule->made_of != LEAF) {
        need(parent_stage(p, layer, rule, 0), n->a);
        if (rule->made_of == PAIR)
            need(parent_stage(p, layer, rule, 1), n->b);
    }
}

/* Backwards from what is read, which is marked already: mark what it needs. Within a stage a
   node is made of earlier ones, so that they too are met after it. */
static void mark_needed(Plan *p) {
    for (int layer = p->m->dims.n_layers - 1; layer >= 0; layer--)
        for (int k = RULES - 1; k >= 0; k--) {
            const StageRule *rule = &stage_rules[k];
            Stage *s = stage_at(p, layer, rule->stage);
            for (int i = s->n - 1; i >= 0; i--)
                if (s->nodes[i].slot == LIVE || (!p->share && rule->how != SPELL_OUT)) {
                    s->nodes[i].slot = LIVE;
                    need_parents(p, layer, rule, s, &s->nodes[i]);
                }
        }
}

/* Forwards: number the needed rows of each stage. Derived ones come first, edited ones behind them;
   where a stage is computed in its parent's place, its rows keep their slots. */
static void number_slots(Plan *p) {
    for (int at = 0; at < p->m->dims.n_layers * RULES; at++) {
        const int layer = at / RULES;
        const StageRule *rule = &stage_rules[at % RULES];
        const int in_place = rule->how == ACTIVATE || stays(layer, rule);
        const Stage *parent = parent_stage(p, layer, rule, 0);
        Stage *s = stage_at(p, layer, rule->stage);
        s->slots = in_place ? parent->slots : 0;
        for (int i = 0; i < s->n; i++) {
            Node *n = &s->nodes[i];
            if (n->slot == LIVE)
                n->slot = in_place && n->edit < 0 ? parent->nodes[n->a].slot : s->slots++;
        }
    }
}

/* ---- checking what a caller asks for ---- */

static patch_status bad_run(patch_error *e, size_t run, const char *what, long got, long least,
                            long most) {
    char where[64];
    snprintf(where, sizeof where, "run %lu", (unsigned long)run);
    return fail(e, PATCH_E_INPUT, where, "%s %ld is not within %ld..%ld; correct the run", what,
                got, least, most);
}

/* Return from the function with such an error; `e` and `run` are its own. */
#define WITHIN(what, got, least, most)                                                             \
    if ((long)(got) < (long)(least) || (long)(got) > (long)(most))                                 \
    return bad_run(e, run, what, (long)(got), (long)(least), (long)(most))

/* Is a slice (layer, position, head, source) one that this hook point has? */
static patch_status check_slice(const Model *m, size_t run, int hook, int layer, int pos, int head,
                                int src, int n_tokens, patch_error *e) {
    WITHIN("hook point", hook, 0, PATCH_N_HOOKS - 1);
    if (in_blocks(hook))
        WITHIN("layer", layer, 0, m->dims.n_layers - 1);
    WITHIN("position", pos, -1, n_tokens - 1);
    WITHIN("head", head, -1, strchr("ZRP", hook_facts[hook].shape) ? m->dims.n_heads - 1 : -1);
    WITHIN("source position", src, -1, hook_facts[hook].shape == 'P' ? n_tokens - 1 : -1);
    return PATCH_OK;
}

static patch_status check_runs(const Model *m, const patch_run *runs, size_t n_runs,
                               const patch_read *reads, size_t n_reads, patch_error *e) {
    size_t run = 0; /* which one an error names */
    patch_status s = PATCH_OK;
    WITHIN("number of runs", n_runs, 0, INT_MAX / 4);
    WITHIN("number of reads", n_reads, 0, INT_MAX / 4);
    for (; run < n_runs && s == PATCH_OK; run++) {
        const int n = runs[run].n_tokens;
        WITHIN("number of tokens", n, 1, m->dims.n_ctx);
        WITHIN("number of edits", runs[run].n_edits, 0, INT_MAX / 4);
        for (int i = 0; i < n; i++)
            WITHIN("token", runs[run].tokens[i], 0, m->dims.d_vocab - 1);
        for (int i = 0; i < runs[run].n_edits && s == PATCH_OK; i++) {
            const patch_edit *x = &runs[run].edits[i];
            WITHIN("operation", x->op, PATCH_COPY, PATCH_SCALE);
            if (x->op == PATCH_COPY) {
                WITHIN("source run", x->source, 0, (long)run - 1);
                WITHIN("length of the source run", runs[x->source].n_tokens, n, n);
            } else if (x->op != PATCH_SCALE)
                WITHIN("number of arrays of values", x->values == NULL ? 0 : 1, 1, 1);
            s = check_slice(m, run, (int)x->hook, x->layer, x->pos, x->head, x->src, n, e);
        }
    }
    for (size_t i = 0; i < n_reads && s == PATCH_OK; i++) {
        const patch_read *r = &reads[i];
        run = (size_t)r->run;
        WITHIN("run of a read", r->run, 0, (long)n_runs - 1);
        s = check_slice(m, run, (int)r->hook, r->layer, r->pos, -1, -1, runs[run].n_tokens, e);
    }
    return s;
}

/* ---- building the plan ---- */

static int by_stage(const void *x, const void *y) {
    const Event *a = x, *b = y;
    return a->at != b->at     ? (a->at > b->at) - (a->at < b->at)
           : a->run != b->run ? (a->run > b->run) - (a->run < b->run)
                              : (a->index > b->index) - (a->index < b->index);
}

static int place_of(const Plan *p, patch_hook hook, int layer) {
    return hook_layer(p->m, (int)hook, layer) * STAGES + (int)hook;
}

/* List edits and reads by layer and stage, in which order plan and pass come by: at each stage the
   next ones in the list are the ones for it, or there are none. */
static int index_events(Plan *p) {
    size_t n_edits = 0, n_rows = 0, reads = (size_t)p->n_reads;
    for (int r = 0; r < p->n_runs; r++)
        n_edits += (size_t)p->runs[r].n_edits;
    p->edits = n_edits < INT_MAX / 4 ? pool_take(p->pool, n_edits, sizeof *p->edits) : NULL;
    p->read_events = pool_take(p->pool, reads, sizeof *p->read_events);
    if (!p->edits || !p->read_events)
        return 0;
    for (int r = 0; r < p->n_runs; r++)
        for (int i = 0; i < p->runs[r].n_edits; i++) {
            const patch_edit *e = &p->runs[r].edits[i];
            p->edits[p->n_edits++] = (Event){place_of(p, e->hook, e->layer), r, i, 0};
        }
    for (int i = 0; i < p->n_reads && n_rows < INT_MAX / 4; i++) {
        const patch_read *r = &p->reads[i];
        p->read_events[i] = (Event){place_of(p, r->hook, r->layer), r->run, i, (int)n_rows};
        n_rows += (size_t)rows_read(p, r);
    }
    p->read_rows = n_rows < INT_MAX / 4 ? pool_take(p->pool, n_rows, sizeof(int)) : NULL;
    if (!p->read_rows)
        return 0;
    qsort(p->edits, n_edits, sizeof *p->edits, by_stage);
    qsort(p->read_events, reads, sizeof *p->read_events, by_stage);
    return 1;
}

/* Sort the runs into classes of equal tokens, by a trie again: equal prompts end at one node, whose
   slot keeps the class. Without sharing each run is a class of its own. */
static int make_classes(Plan *p) {
    Stage prompts = {0};
    p->tracks = pool_take(p->pool, (size_t)p->n_runs * 2, sizeof *p->tracks);
    p->track_of = pool_take(p->pool, (size_t)p->n_runs, sizeof(int));
    if (!p->tracks || !p->track_of || !hash_stage(p, &prompts))
        return 0;
    for (int r = 0; r < p->n_runs; r++) {
        const patch_run *run = &p->runs[r];
        int node = -1;
        for (int k = 0; k < run->n_tokens; k++)
            if ((node = intern(p, &prompts, node, run->tokens[k], -1)) < 0)
                return 0;
        int *class = &prompts.nodes[node].slot;
        if (*class == DEAD) {
            p->tracks[p->n_classes] = (Track){run->tokens, run->n_tokens, p->n_classes, 0};
            *class = p->n_classes++;
        }
        p->track_of[r] = *class;
        p->T = run->n_tokens > p->T ? run->n_tokens : p->T;
    }
    pool_give(p->pool, prompts.nodes);
    p->n_tracks = p->n_classes;
    return 1;
}

/* Plan all runs: forwards to make rows, backwards to mark them, forwards to number them. Fails only
   for want of memory. */
static int plan_runs(Plan *p) {
    const int n_layers = p->m->dims.n_layers;
    p->stages = pool_take(p->pool, (size_t)n_layers * STAGES, sizeof *p->stages);
    if (!p->stages || !make_classes(p) || !index_events(p) ||
        !(p->scratch = pool_take(p->pool, (size_t)p->T, sizeof(int))))
        return 0;
    for (int k = 0; k < STAGES; k++)
        if (!(p->table[k] =
                  pool_take(p->pool, (size_t)(p->n_classes + p->n_runs), sizeof(int *))))
            return 0;
    for (int layer = 0; layer < n_layers; layer++)
        for (int k = 0; k < RULES; k++) {
            const int stage = stage_rules[k].stage;
            if (hook_layer(p->m, stage, layer) != layer) /* it is in another one */
                continue;
            if (!derive_stage(p, layer, &stage_rules[k]) || !edit_stage(p, layer * STAGES + stage))
                return 0;
            note_reads(p, layer * STAGES + stage);
        }
    mark_needed(p);
    number_slots(p);
    return 1;
}

/* Give back what only planning needs: a pass looks at nodes and at read_rows, never at a table. */
static void forget_tables(Plan *p) {
    for (int k = 0; k < STAGES; k++) {
        pool_give(p->pool, p->store[k]);
        pool_give(p->pool, p->table[k]);
    }
    pool_give(p->pool, p->hash);
}

/* ---- the pass ----
   All is decided; what is left is to compute each stage's rows in slots 0..slots-1 of its buffer:
   first those of the stage's rule, in bulk, from the buffers of the stages that they are made of,
   then those of edits, one by one, from rows of the same buffer. */

/* Scratch of one thread for one row of attention. */
typedef struct Attention {
    const float **keys, **values; /* [T] rows of the prefix */
    float *pattern;               /* [T] */
    int prefix;                   /* whose keys they are; -1: none yet */
} Attention;

typedef struct Pass {
    const Plan *p;
    const Model *m;
    Work work;
    float *region[BESIDE]; /* [the most floats of any layer] */
    float *buffer[STAGES]; /* where the rows of this layer's stages stand, [slots,width] */
    int *index;            /* [most slots]: rows to gather */
    double *value_bias;    /* [C] b_V, on its way into b_O */
    Attention *attention;  /* [threads] */
    float *ln;             /* [2,C] the LayerNorm's weight and bias, NULL where they are folded */
    int next_read;         /* the first of the plan's reads that is not served yet */
    double seconds_products, seconds_attention;
} Pass;

/* Lay a layer's buffers out in the regions; raises most[] to the floats that these need. */
static void place_stages(Pass *x, int layer, size_t most[BESIDE]) {
    size_t beside = 0;
    for (int k = 0; k < RULES; k++) {
        const StageRule *rule = &stage_rules[k];
        const Region region = rule->region == BESIDE ? WIDE : rule->region;
        const size_t at = rule->region == BESIDE ? beside : 0;
        if (region == NOWHERE)
            continue;
        size_t end = (size_t)stage_at(x->p, layer, rule->stage)->slots *
                     hook_width(x->m, rule->stage, 0);
        end = at + (end + LANES - 1) / LANES * LANES;
        x->buffer[rule->stage] = x->region[region] == NULL ? NULL : x->region[region] + at;
        beside = rule->region == BESIDE ? end : beside;
        most[region] = end > most[region] ? end : most[region];
    }
}

static float *row_of(const Pass *x, int stage, int slot) {
    return x->buffer[stage] + (size_t)slot * hook_width(x->m, stage, 0);
}

/* Is this one of the rows that the stage's rule computes: needed, and not an edit's? */
static int computed(const Node *n) {
    return n->slot >= 0 && n->edit < 0;
}

/* Slots of the rows of `parent` that a stage's computed nodes are made of, in order; returns how
   many. (Of attn_out, made of z, those are left out that an edited result makes.) */
static size_t gather(Pass *x, const Stage *s, const Stage *parent) {
    size_t n = 0;
    for (int i = 0; i < s->n; i++)
        if (computed(&s->nodes[i]) && s->nodes[i].a < parent->n)
            x->index[n++] = parent->nodes[s->nodes[i].a].slot;
    return n;
}

/* Set x->ln for a stage, in the scratch. 0: it is unreadable. */
static int load_norm(Pass *x, int layer, int stage) {
    const ModelFile *f = &x->m->file;
    const Tensor *t = stage == PATCH_LN_FINAL_NORMALIZED ? tail_tensor(f, 0)
                      : norm_tensor(f, (size_t)layer, stage == PATCH_LN2_NORMALIZED);
    if (x->m->steps & DID_FOLD_LN)
        return 1;
    x->ln = x->work.norm;
    return norm_rows(f, t, x->ln, x->work.pool->a);
}

/* The rows of a prefix, position 0 first: the way up the trie. Returns how many. */
static size_t prefix_rows(const Pass *x, int layer, int prefix_stage, int node,
                          const float **rows) {
    const int of = prefix_stage == K_PREFIX ? PATCH_K : PATCH_V;
    const Stage *prefix = stage_at(x->p, layer, prefix_stage), *s = stage_at(x->p, layer, of);
    size_t n = 0;
    for (int at = node; at >= 0; at = prefix->nodes[at].a)
        n++;
    for (size_t i = n; node >= 0; node = prefix->nodes[node].a)
        rows[--i] = row_of(x, of, s->nodes[prefix->nodes[node].b].slot);
    return n;
}

/* x [n] = e^(x - most), most being the largest of them; returns their sum. */
static double exp_sum(const Kernels *k, float *x, size_t n, float *most) {
    double sum = 0;
    *most = x[0];
    for (size_t i = 1; i < n; i++)
        *most = x[i] > *most ? x[i] : *most;
    k->exponentials(x, n, *most);
    for (size_t i = 0; i < n; i++)
        sum += (double)x[i];
    return sum;
}

/* out [n] = softmax(out). A row that is masked altogether is 0, as in TransformerLens. */
static void softmax(const Kernels *k, float *out, size_t n) {
    float most;
    const double sum = exp_sum(k, out, n, &most);
    for (size_t i = 0; i < n; i++) {
        out[i] = (float)((double)out[i] / sum);
        if (!(out[i] == out[i]))
            out[i] = 0;
    }
}

/* What an edit does to a slice y [n]. from [n]: the source's slice or the values; SCALE has
   none. */
static void edit_slice(const patch_edit *e, const float *from, float *y, size_t n) {
    for (size_t j = 0; j < n; j++)
        y[j] = e->op == PATCH_SCALE ? y[j] * e->factor
               : e->op == PATCH_ADD ? y[j] + from[j] : from[j];
}

/* One head's row of scores or pattern, out [n], n sources, of a node of that stage: computed
   when it is asked for, edits included, so that neither ever needs a buffer. The calls follow
   the making: an edited pattern asks for the pattern before the edit, that for its scores, these
   for q and the prefix of keys. Sources behind the destination do not exist, so n is position +
   1. */
static void attention_row(const Pass *x, int layer, int stage, int node, size_t head, size_t n,
                          float *out, Attention *scratch) {
    const Node *nd = &stage_at(x->p, layer, stage)->nodes[node];
    const patch_edit *e = nd->edit < 0 ? NULL : edit_of(x->p, nd->edit);
    const size_t D = x->m->file.D;
    if (e == NULL && stage == PATCH_PATTERN) {
        attention_row(x, layer, PATCH_ATTN_SCORES, nd->a, head, n, out, scratch);
        softmax(x->m->kernels, out, n);
    } else if (e == NULL) {
        const Node *q = &stage_at(x->p, layer, PATCH_Q)->nodes[nd->a];
        const double root = sqrt((double)D) * (x->m->file.inverse_layer ? layer + 1 : 1);
        if (scratch->prefix != nd->b)
            prefix_rows(x, layer, K_PREFIX, nd->b, scratch->keys);
        scratch->prefix = nd->b;
        x->m->kernels->scores(row_of(x, PATCH_Q, q->slot) + head * D, scratch->keys, head * D, n, D,
                              (float)root, out);
    } else if (e->head >= 0 && (size_t)e->head != head) {
        attention_row(x, layer, stage, nd->a, head, n, out, scratch);
    } else {
        const size_t T = (size_t)x->p->runs[x->p->edits[nd->edit].run].n_tokens;
        const size_t at = e->src < 0 ? 0 : (size_t)e->src; /* entries at .. at + some - 1 change */
        const size_t some = e->src < 0 ? n : at < n;       /* none where src is masked */
        const float *from = NULL;
        float entry;
        if (e->op == PATCH_COPY) {
            attention_row(x, layer, stage, nd->b, head, n, out, scratch);
            if (e->src < 0)
                return;
            entry = some ? out[at] : 0;
            from = &entry;
        } else if (e->op != PATCH_SCALE)
            from = edit_values(e, nd->b) + (e->head >= 0 ? 0 : head * (e->src < 0 ? T : 1));
        if (nd->a >= 0)
            attention_row(x, layer, stage, nd->a, head, n, out, scratch);
        edit_slice(e, from, out + at, some);
    }
}

/* hook_result [H,C] of the rows where it is asked for: each head's z times its D rows of W_O,
   without b_O; H products, together as much work as the one for attn_out. */
static patch_status spell_out_results(Pass *x, int layer, patch_error *e) {
    const ModelFile *f = &x->m->file;
    const size_t n = gather(x, stage_at(x->p, layer, PATCH_RESULT), stage_at(x->p, layer, PATCH_Z));
    patch_status s = PATCH_OK;
    for (size_t h = 0; n > 0 && h < f->H && s == PATCH_OK; h++) {
        const Rows r = {.n = n, .index = x->index, .ldx = f->C, .ldy = f->H * f->C,
                        .x = x->buffer[PATCH_Z] + h * f->D,
                        .y = x->buffer[PATCH_RESULT] + h * f->C};
        const Linear l = head_linear(x->m, (size_t)layer, h);
        s = linear(&x->work, &l, &r, NULL, e);
    }
    return s;
}

/* attn_out of the rows whose heads' results were edited: their sum, and b_O, which the product
   before has left in the scratch. Only of those: for all others that product is attn_out, since to
   spell out their results would double its work. The last bits of the two ways differ. */
static void sum_results(Pass *x, int layer) {
    const ModelFile *f = &x->m->file;
    const Stage *s = stage_at(x->p, layer, PATCH_ATTN_OUT);
    const Stage *result = stage_at(x->p, layer, PATCH_RESULT);
    for (int i = 0; i < s->n; i++) {
        const Node *node = &s->nodes[i];
        if (!computed(node) || result->nodes[node->a].edit < 0)
            continue;
        const float *in = row_of(x, PATCH_RESULT, result->nodes[node->a].slot); /* [H,C] */
        for (size_t j = 0; j < f->C; j++) {
            float sum = 0;
            for (size_t h = 0; h < f->H; h++)
                sum += in[h * f->C + j];
            row_of(x, PATCH_ATTN_OUT, node->slot)[j] = sum + (float)x->work.bias[j];
        }
    }
}

/* A stage that is one matrix product of the stage it is made of; attn_out is made of z, and no
   result is spelled out, but where an edit asks for it. */
static patch_status product(Pass *x, int layer, const StageRule *rule, patch_error *e) {
    const int from = rule->linear == LINEAR_O ? PATCH_Z : rule->a;
    const double started = now();
    Linear l = layer_linear(x->m, (size_t)layer, rule->linear);
    const Rows r = {.n = gather(x, stage_at(x->p, layer, rule->stage), stage_at(x->p, layer, from)),
                    .index = x->index, .x = x->buffer[from], .ldx = l.k,
                    .y = x->buffer[rule->stage], .ldy = l.n};
    if (l.takes_value_bias)
        l.shift = x->value_bias;
    const patch_status s = linear(&x->work, &l, &r, NULL, e);
    if (l.drop_bias) /* v's, which the same layer's W_O adds instead: fold_value_biases */
        memcpy(x->value_bias, x->work.bias, l.n * sizeof *x->value_bias);
    x->seconds_products += now() - started;
    if (s == PATCH_OK && rule->linear == LINEAR_O)
        sum_results(x, layer);
    return s;
}

/* Compute one row of a stage that goes row by row; 0: a weight cannot be read (EMBED). Rows do not
   know of each other: threads may take them in any order. */
static int make_row(const Pass *x, int layer, const StageRule *rule, const Node *node) {
    const Kernels *k = x->m->kernels;
    const ModelFile *f = &x->m->file;
    const size_t C = f->C, D = f->D;
    float *out = row_of(x, rule->stage, node->slot);
    if (rule->how == EMBED) { /* with center_writing_weights each row loses its mean */
        if (!weights_row(f, &f->tensors[rule->stage == PATCH_POS_EMBED], (size_t)node->a, out,
                         x->work.pool->a))
            return 0;
        const double mean = x->m->steps & DID_CENTER_WRITING ? k->mean(out, C) : 0;
        for (size_t j = 0; j < C; j++)
            out[j] = (float)((double)out[j] - mean);
    } else if (rule->how == ATTEND) { /* z: each head's pattern times the values of the prefix */
        Attention *a = &x->attention[thread_number()];
        const size_t n = prefix_rows(x, layer, V_PREFIX, node->b, a->values);
        a->prefix = -1;
        for (size_t h = 0; h < f->H; h++) {
            attention_row(x, layer, PATCH_PATTERN, node->a, h, n, a->pattern, a);
            k->mix(a->pattern, a->values, h * D, n, D, out + h * D);
        }
    } else if (rule->how == ACTIVATE) { /* where mlp_pre stood, which nobody reads any more */
        k->activate(f->act_fn, out, f->M);
    } else {
        const float *p = row_of(x, rule->a, stage_at(x->p, layer, rule->a)->nodes[node->a].slot);
        const float *q = rule->how == SCALE ? NULL /* else what PAIR pairs it with */
                         : row_of(x, rule->b, stage_at(x->p, layer, rule->b)->nodes[node->b].slot);
        if (rule->how == SCALE)
            k->norm_scale(p, C, f->eps, out);
        else if (rule->how == NORM)
            k->normalize(p, C, *q, x->ln, out);
        else
            for (size_t j = 0; j < C; j++)
                out[j] = p[j] + q[j];
    }
    return 1;
}

/* Compute the derived rows of one stage of one layer. */
static patch_status compute_stage(Pass *x, int layer, const StageRule *rule, patch_error *e) {
    const Stage *s = stage_at(x->p, layer, rule->stage);
    const double each = (double)x->m->file.C * (rule->how == ATTEND ? x->p->T : 8);
    const double started = now();
    int readable = 1;
    if (rule->how == LATER || stays(layer, rule))
        return PATCH_OK;
    if (rule->how == SPELL_OUT)
        return spell_out_results(x, layer, e);
    if (rule->how == LINEAR)
        return product(x, layer, rule, e);
    if (rule->how == NORM)
        readable = load_norm(x, layer, rule->stage);
    PARALLEL(rule->how == EMBED ? 1 : team(x->m, s->n * each), schedule(dynamic, 4))
    for (int i = 0; i < s->n; i++)
        if (computed(&s->nodes[i]) && !make_row(x, layer, rule, &s->nodes[i]))
            readable = 0; /* EMBED, which reads the file, has one thread */
    x->seconds_attention += rule->how == ATTEND ? now() - started : 0;
    return readable ? PATCH_OK : unreadable(x->m, e);
}

/* Make the rows that edits make: a copy of the row before, changed in one slice. A row comes after
   the ones it is made of, since those were planned first. */
static void apply_edits(Pass *x, int layer, int stage) {
    const Stage *s = stage_at(x->p, layer, stage);
    const size_t width = hook_width(x->m, stage, 0);
    const size_t part = hook_facts[stage].shape == 'Z' ? x->m->file.D : x->m->file.C; /* a head's */
    for (int i = 0; i < s->n; i++) {
        const Node *node = &s->nodes[i];
        if (node->edit < 0 || node->slot < 0)
            continue;
        const patch_edit *e = edit_of(x->p, node->edit);
        const size_t at = e->head >= 0 ? (size_t)e->head * part : 0;
        const float *from = e->op == PATCH_SCALE  ? NULL
                            : e->op == PATCH_COPY ? row_of(x, stage, s->nodes[node->b].slot) + at
                                                  : edit_values(e, node->b);
        float *row = row_of(x, stage, node->slot);
        if (node->a >= 0)
            memcpy(row, row_of(x, stage, s->nodes[node->a].slot), width * sizeof *row);
        edit_slice(e, from, row + at, e->head >= 0 ? part : width);
    }
}

/* One read of scores or pattern: [H,T] of one destination, [H,T,T] of all. Sources after the
   destination are masked: -inf and 0. */
static void read_attention(Pass *x, int layer, const patch_read *r, const int *rows) {
    const size_t T = (size_t)x->p->runs[r->run].n_tokens, n_rows = r->pos < 0 ? T : 1;
    for (size_t i = 0; i < n_rows; i++) {
        const size_t n = (r->pos < 0 ? i : (size_t)r->pos) + 1;
        x->attention->prefix = -1;
        for (size_t h = 0; h < x->m->file.H; h++) {
            float *out = r->out + (h * n_rows + i) * T;
            attention_row(x, layer, (int)r->hook, rows[i], h, n, out, x->attention);
            for (size_t j = n; j < T; j++)
                out[j] = r->hook == PATCH_ATTN_SCORES ? -(float)INFINITY : 0;
        }
    }
}

/* Hand back what is read at a stage that is done. */
static void serve_reads(Pass *x, int layer, int stage) {
    const Plan *p = x->p;
    for (; x->next_read < p->n_reads; x->next_read++) {
        const Event *event = &p->read_events[x->next_read];
        const patch_read *r = &p->reads[event->index];
        const int *rows = p->read_rows + event->first;
        const size_t width = hook_width(x->m, (int)r->hook, 0);
        if (event->at != layer * STAGES + stage)
            return;
        if (r->out == NULL)
            continue;
        if (hook_facts[r->hook].shape == 'P')
            read_attention(x, layer, r, rows);
        else
            for (int j = 0; j < rows_read(p, r); j++)
                memcpy(r->out + (size_t)j * width,
                       row_of(x, stage, stage_at(p, layer, stage)->nodes[rows[j]].slot),
                       width * sizeof *r->out);
    }
}

/* Measure all layers' regions and take them, and scratch for attention. */
static patch_status pass_begin(Pass *x, const Plan *p, patch_stats *stats, patch_error *e) {
    const size_t T = (size_t)p->T, threads = (size_t)p->m->threads;
    size_t most[BESIDE] = {0}, slots = 1;
    *x = (Pass){.p = p, .m = p->m};
    for (int layer = 0; layer < p->m->dims.n_layers; layer++) {
        place_stages(x, layer, most);
        for (int k = 0; k < STAGES; k++)
            if ((size_t)stage_at(p, layer, k)->slots > slots)
                slots = (size_t)stage_at(p, layer, k)->slots;
    }
    const patch_status s = work_begin(&x->work, p->m, p->pool, stats, e);
    if (s != PATCH_OK)
        return s;
    x->index = pool_take(p->pool, slots, sizeof(int));
    x->value_bias = pool_take(p->pool, p->m->file.C, sizeof(double));
    x->attention = pool_take(p->pool, threads, sizeof *x->attention);
    const float **rows = pool_take(p->pool, threads * 2 * T, sizeof *rows);
    float *pattern = pool_take(p->pool, threads * T, sizeof *pattern);
    int ok = x->index && x->value_bias && x->attention && rows && pattern;
    for (int k = STREAM; ok && k < BESIDE; k++)
        ok = (x->region[k] = pool_raw(p->pool, most[k], sizeof(float))) != NULL;
    for (size_t t = 0; ok && t < threads; t++)
        x->attention[t] = (Attention){rows + 2 * t * T, rows + 2 * t * T + T, pattern + t * T, -1};
    return ok ? PATCH_OK : no_memory(e, "one pass", p->pool->refused);
}

/* Give back the largest of what the pass took, the rows and the scratch; the rest waits for the
   pool's end. */
static void pass_end(Pass *x) {
    for (int k = STREAM; k < BESIDE; k++)
        pool_give(x->p->pool, x->region[k]);
    work_end(&x->work);
}

/* One pass over the weights: every layer, every stage, every needed row. */
static patch_status run_pass(Pass *x, patch_error *e) {
    size_t most[BESIDE] = {0};
    patch_status s = PATCH_OK;
    for (int layer = 0; layer < x->m->dims.n_layers && s == PATCH_OK; layer++) {
        place_stages(x, layer, most);
        for (int k = 0; k < RULES && s == PATCH_OK; k++) {
            const StageRule *rule = &stage_rules[k];
            if (hook_layer(x->m, rule->stage, layer) != layer ||
                (s = compute_stage(x, layer, rule, e)) != PATCH_OK)
                continue;
            if (rule->region != NOWHERE)
                apply_edits(x, layer, rule->stage);
            serve_reads(x, layer, rule->stage);
        }
    }
    return s;
}

/* What a plan asks for and what of it has to be computed, in rows of a layer. */
static void count_rows(const Plan *p, patch_stats *stats) {
    double asked = 0, rows = 0;
    for (int r = 0; r < p->n_runs; r++)
        asked += (double)p->runs[r].n_tokens * p->m->dims.n_layers;
    for (int layer = 0; layer < p->m->dims.n_layers; layer++)
        rows += stage_at(p, layer, PATCH_RESID_POST)->slots;
    stats->rows += rows;
    stats->rows_shared += asked - rows;
    stats->passes += 1;
}

/* patch_execute, with sharing or without, in memory of this pool. */
static patch_status execute(const Model *m, Pool *pool, const patch_run *runs, size_t n_runs,
                            patch_read *reads, size_t n_reads, Mode mode, patch_stats *stats,
                            patch_error *e) {
    const double started = now();
    Plan p = {.m = m, .pool = pool, .runs = runs, .reads = reads, .n_runs = (int)n_runs,
              .n_reads = (int)n_reads, .share = mode != UNSHARED};
    Pass x;
    patch_status s = check_runs(m, runs, n_runs, reads, n_reads, e);
    if (s != PATCH_OK)
        return s;
    if (!plan_runs(&p))
        return no_memory(e, "plan", pool->refused);
    const double planned = now();
    forget_tables(&p);
    s = pass_begin(&x, &p, stats, e);
    if (mode != SIZED && s == PATCH_OK)
        s = run_pass(&x, e);
    if (s != PATCH_OK)
        return s;
    pass_end(&x); /* what is read has been copied; the metric takes scratch of its own */
    if (mode == SIZED || stats == NULL)
        return s;
    count_rows(&p, stats);
    stats->seconds_plan += planned - started;
    stats->seconds_products += x.seconds_products;
    stats->seconds_attention += x.seconds_attention;
    stats->seconds_rest += now() - planned - x.seconds_products - x.seconds_attention;
    if ((double)pool->peak > stats->peak_bytes)
        stats->peak_bytes = (double)pool->peak;
    return s;
}

/* ---- bounded memory ---- */

/* What max_memory has to hold beside plan and rows: the largest mapped matrix, the program, and
   what the tokenizer takes. */
static size_t fixed_memory(const Model *m) {
    const size_t C = m->file.C, M = m->file.M > 3 * C ? m->file.M : 3 * C;
    return C * M * sizeof(float) + ((size_t)6 << 20) + m->file.tokenizer_bytes * 2 +
           m->file.V * 16;
}

/* Bytes that one call may take for plan and rows; `standard` where max_memory does not say. */
static size_t memory_limit(const Model *m, size_t standard) {
    const size_t bound = m->options.max_memory, fixed = fixed_memory(m);
    return bound == 0 ? standard : bound > fixed ? bound - fixed : 0;
}

/* The error of a call for which max_memory is too small. sized: the pool of the same call, or of
   its first piece, done SIZED without the bound; s its status. It has held the most that the
   piece takes; an eighth is for other pieces, which differ a little. Where the bound would have
   done, the allocator was at fault, and the error stays as it is. */
static patch_status too_little(const Model *m, Pool *sized, patch_status s, patch_error *e) {
    const size_t limit = memory_limit(m, SIZE_MAX), enough = sized->peak + sized->peak / 8;
    if (s == PATCH_OK && sized->peak > limit)
        fail(e, PATCH_E_MEMORY, "max_memory",
             "no memory for the %.2f MB of the smallest piece of work: of %.2f MB the model and "
             "the program leave %.2f MB; give %luK or more",
             (double)sized->peak / 1e6, (double)m->options.max_memory / 1e6, (double)limit / 1e6,
             (unsigned long)((fixed_memory(m) + enough + 1023) / 1024));
    return pool_end(sized, PATCH_E_MEMORY);
}

patch_status patch_execute(const patch_model *m, const patch_run *runs, size_t n_runs,
                           patch_read *reads, size_t n_reads, patch_stats *stats, patch_error *e) {
    Pool pool = pool_begin(&m->allocator, memory_limit(m, SIZE_MAX / 2));
    patch_status s = execute(m, &pool, runs, n_runs, reads, n_reads, SHARED, stats, e);
    pool_end(&pool, s);
    if (s != PATCH_E_MEMORY || m->options.max_memory == 0)
        return s;
    pool = pool_begin(&m->allocator, SIZE_MAX / 2);
    s = execute(m, &pool, runs, n_runs, reads, n_reads, SIZED, NULL, NULL);
    return too_little(m, &pool, s, e);
}

/* ---- the cache: run_with_cache ----
   One run a prompt, and for each hook point that a glob matches a read of all its positions, into
   one array behind the other: nothing more is needed. */

struct patch_cache {
    Pool pool; /* all its memory, this struct too */
    patch_allocator allocator;
    size_t n;
    patch_tensor *tensors; /* [n] */
    char (*names)[64];     /* [n] */
    float *data;           /* all of them, one behind the other */
};

/* Does [...] at *glob (behind the bracket) hold c? Moves *glob behind the closing bracket; a
   bracket that is never closed stands for itself, as in Python's fnmatch. */
static int in_brackets(const char **glob, char c) {
    const char *g = *glob;
    const int negated = *g == '!';
    const unsigned char byte = (unsigned char)c;
    int found = 0;
    g += negated;
    do {
        if (*g == 0)
            return c == '[';
        if (g[1] == '-' && g[2] != ']' && g[2] != 0) {
            found |= (unsigned char)g[0] <= byte && byte <= (unsigned char)g[2];
            g += 3;
        } else
            found |= *g++ == c;
    } while (*g != ']');
    *glob = g + 1;
    return found != negated;
}

/* fnmatch: * matches anything, dots too, ? one character, [a-c] and [!a-c] one of a set. A * is
   tried with more and more characters, the last one only, so that the time is at most the product
   of the lengths. */
static int glob_matches(const char *glob, const char *name) {
    const char *star = NULL, *retry = NULL;
    while (*name != 0) {
        const char *rest = glob + 1;
        if (*glob == '*') {
            star = glob++;
            retry = name;
        } else if (*glob == '?' || (*glob == '[' ? in_brackets(&rest, *name) : *glob == *name)) {
            glob = rest;
            name++;
        } else if (star != NULL) {
            glob = star + 1;
            name = ++retry;
        } else
            return 0;
    }
    while (*glob == '*')
        glob++;
    return *glob == 0;
}

/* TransformerLens's shape of a hook point over B prompts of T tokens; returns its floats. */
static size_t tensor_shape(const Model *m, int hook, size_t B, size_t T, patch_tensor *t) {
    const ModelFile *f = &m->file;
    const char shape = hook_facts[hook].shape;
    const size_t last = shape == 'P' ? T : shape == 'Z' ? f->D : shape == 'R' ? f->C : 1;
    t->rank = strchr("ZRP", shape) ? 4 : 3;
    t->shape[0] = B;
    t->shape[1] = shape == 'P' ? f->H : T;
    t->shape[2] = shape == 'P' ? T : t->rank == 4 ? f->H : hook_width(m, hook, T);
    t->shape[3] = last;
    return B * t->shape[1] * t->shape[2] * last;
}

/* Go through all hook points that a glob matches, in the order of the forward pass; with c == NULL
   only count them and the floats they take. Returns how many there are. */
static size_t match_hooks(const Model *m, size_t B, size_t T, const char *const *globs,
                          size_t n_globs, patch_cache *c, patch_read *reads, size_t *floats) {
    size_t n = 0;
    *floats = 0;
    for (int at = 0; at < m->dims.n_layers * PATCH_N_HOOKS; at++) {
        const int layer = at / PATCH_N_HOOKS, hook = at % PATCH_N_HOOKS;
        patch_tensor t = {0};
        char name[64];
        size_t g = 0;
        if (hook_layer(m, hook, layer) != layer)
            continue;
        patch_hook_name((patch_hook)hook, layer, name, sizeof name);
        while (g < n_globs && (!glob_matches(globs[g], name) ||
                               (hook == PATCH_RESULT && !strstr(globs[g], "result"))))
            g++;
        if (g == n_globs)
            continue;
        const size_t size = tensor_shape(m, hook, B, T, &t);
        if (c != NULL) {
            memcpy(c->names[n], name, sizeof name);
            t.name = c->names[n];
            t.data = c->data + *floats;
            c->tensors[n] = t;
            for (size_t b = 0; b < B; b++)
                reads[n * B + b] = (patch_read){(patch_hook)hook, layer, (int)b, -1,
                                                c->data + *floats + b * (size / B), 0};
        }
        *floats += size;
        n++;
    }
    return n;
}

void patch_cache_free(patch_cache *c) {
    if (c == NULL)
        return;
    const patch_allocator a = c->allocator; /* the model's may be gone, and this goes too */
    Pool pool = c->pool;
    pool.a = &a;
    pool_end(&pool, PATCH_OK);
}

size_t patch_cache_count(const patch_cache *c) {
    return c->n;
}

patch_tensor patch_cache_get(const patch_cache *c, size_t index) {
    return c->tensors[index];
}

patch_status patch_run_with_cache(const patch_model *m, const int *tokens, size_t n_prompts,
                                  size_t n_tokens, const char *const *globs, size_t n_globs,
                                  size_t *needed, patch_cache **cache, patch_error *e) {
    size_t floats, run = 0;
    if (cache != NULL)
        *cache = NULL;
    for (size_t g = 0; g < n_globs; g++)
        if (match_hooks(m, 1, 1, &globs[g], 1, NULL, NULL, &floats) == 0)
            return fail(e, PATCH_E_INPUT, globs[g],
                        "no hook point has this name; try *hook_resid_pre or *, names are "
                        "TransformerLens's");
    WITHIN("number of prompts", n_prompts, 1, INT_MAX / 4);
    WITHIN("number of tokens", n_tokens, 1, m->dims.n_ctx);
    const size_t n = match_hooks(m, n_prompts, n_tokens, globs, n_globs, NULL, NULL, &floats);
    if (needed != NULL)
        *needed = floats * sizeof(float);
    if (cache == NULL)
        return PATCH_OK;
    Pool pool = pool_begin(&m->allocator, SIZE_MAX / 2);
    patch_cache *c = pool_take(&pool, 1, sizeof *c);
    patch_read *reads = pool_take(&pool, n * n_prompts, sizeof *reads);
    patch_run *runs = pool_take(&pool, n_prompts, sizeof *runs);
    if (!c || !reads || !runs || !(c->tensors = pool_take(&pool, n, sizeof *c->tensors)) ||
        !(c->names = pool_take(&pool, n, sizeof *c->names)) ||
        !(c->data = pool_raw(&pool, floats, sizeof *c->data)))
        return pool_end(&pool, no_memory(e, "cache", floats * sizeof(float)));
    for (; run < n_prompts; run++)
        runs[run] = (patch_run){tokens + run * n_tokens, (int)n_tokens, NULL, 0};
    c->n = match_hooks(m, n_prompts, n_tokens, globs, n_globs, c, reads, &floats);
    const patch_status s = patch_execute(m, runs, n_prompts, reads, n * n_prompts, NULL, e);
    if (s != PATCH_OK)
        return pool_end(&pool, s);
    pool_give(&pool, reads);
    pool_give(&pool, runs);
    c->pool = pool;
    c->allocator = m->allocator;
    *cache = c;
    return PATCH_OK;
}

/* ==== 9. Metrics =================================================================================
   What is asked of a run's final row x [C], that of the last position behind the final
   LayerNorm: logits = x . W_U + b_U. A logit difference needs two columns of W_U, and is taken
   in double, as x . (W_U[answer] - W_U[wrong]); the mean over the vocabulary (center_unembed)
   cancels there. Probabilities need all columns: those go through `linear`, 128 rows at a time.

       logit_diff   x . (u_answer - u_wrong)         logit   x . (u_answer - mean over v of u_v)
       logprob      logit[answer] - ln sum_v e^logit[v]      prob   its exponential
       kl           sum_v p_clean[v] (ln p_clean[v] - ln p[v])
       rank         how many v have logit[v] > logit[answer]

   u_v is column v of W_U with the final LayerNorm folded in (chapter 6, step 1), in double. Where
   fold_ln is off, u_v is the stored column; where center_unembed is off, the mean is left out. */

/* The final LayerNorm's weight and bias into ln [2,C]. */
static int final_norm(const Work *w, float *ln) {
    return norm_rows(&w->m->file, tail_tensor(&w->m->file, 0), ln, w->pool->a);
}

/* One column of W_U, processed but not centered, into column [C]; *bias is its b_U. */
static int unembed_column(const Work *w, int token, double *column, double *bias) {
    const ModelFile *f = &w->m->file;
    const float *row = w->panels, *scale = w->norm, *shift = w->norm + f->C;
    const int fold = (w->m->steps & DID_FOLD_LN) != 0;
    double mean = 0;
    *bias = 0;
    if (!weights_row(f, unembedding(f), (size_t)token, w->panels, w->pool->a) ||
        (fold && !final_norm(w, w->norm)))
        return 0;
    for (size_t k = 0; k < f->C; k++) {
        column[k] = (fold ? (double)scale[k] : 1.0) * (double)row[k];
        *bias += fold ? (double)shift[k] * (double)row[k] : 0;
        mean += column[k];
    }
    for (size_t k = 0; fold && k < f->C; k++)
        column[k] -= mean / (double)f->C;
    return 1;
}

/* sum [C]: the stored unembedding summed over the vocabulary. Tasks are blocks of 64 columns, so
   that the order of summation does not depend on the threads. */
static int sum_vocabulary(const Work *w, double *sum) {
    const ModelFile *f = &w->m->file;
    const Tensor *t = unembedding(f);
    const long blocks = (long)((f->C + 63) / 64);
    size_t n;
    memset(sum, 0, f->C * sizeof *sum);
    for (size_t first = 0; first < f->V; first += n) {
        n = f->V - first < VOCAB_CHUNK ? f->V - first : VOCAB_CHUNK;
        const unsigned char *p = weights(f, t, first, n, w->pool->a);
        if (p == NULL)
            return 0;
        PARALLEL(team(w->m, (double)n * (double)f->C), schedule(static))
        for (long block = 0; block < blocks; block++) {
            const size_t k = (size_t)block * 64, some = f->C - k < 64 ? f->C - k : 64;
            float part[64];
            for (size_t v = 0; v < n; v++) {
                load_floats(t->type, p, v * f->C + k, some, part);
                for (size_t j = 0; j < some; j++)
                    sum[k + j] += (double)part[j];
            }
        }
        weights_done(f, t, n, p, w->pool->a);
    }
    return 1;
}

/* center_unembed: the mean column of the processed W_U into mean [C], and the mean of b_U; zeros
   where it is off. With fold_ln column v is u_v[k] = scale[k] W[v][k] - (1/C) sum_k scale[k]
   W[v][k], whose mean over v follows from W's own sums over v, so that the weights are read once
   and not twice. */
static int vocabulary_mean(const Work *w, double *mean, double *bias_mean) {
    const ModelFile *f = &w->m->file;
    const float *scale = w->norm, *shift = w->norm + f->C;
    double of_columns = 0;
    *bias_mean = 0;
    memset(mean, 0, f->C * sizeof *mean);
    if (!(w->m->steps & DID_CENTER_UNEMBED))
        return 1;
    if (!sum_vocabulary(w, mean))
        return 0;
    for (size_t k = 0; k < f->C; k++)
        mean[k] /= (double)f->V;
    if (!(w->m->steps & DID_FOLD_LN))
        return 1;
    if (!final_norm(w, w->norm))
        return 0;
    for (size_t k = 0; k < f->C; k++) {
        *bias_mean += (double)shift[k] * mean[k];
        mean[k] *= (double)scale[k];
        of_columns += mean[k] / (double)f->C;
    }
    for (size_t k = 0; k < f->C; k++)
        mean[k] -= of_columns;
    return 1;
}

/* logits [n,V] of n rows; index as in Rows; mean [C] and bias_mean as vocabulary_mean makes
   them. */
static patch_status all_logits(const Work *w, const float *rows, const int *index, size_t n,
                               const double *mean, double bias_mean, float *logits,
                               patch_error *e) {
    const ModelFile *f = &w->m->file;
    Linear l = {.k = f->C, .matrix = unembedding(f), .rows = f->V, .transposed = 1};
    Rows r = {.x = rows, .ldx = f->C, .index = index, .n = n, .ldy = f->V};
    patch_status s = PATCH_OK;
    if (w->m->steps & DID_FOLD_LN) {
        l.norm_w = tail_tensor(f, 0);
        l.norm_b = tail_tensor(f, 1);
    }
    if (w->m->steps & DID_CENTER_UNEMBED) {
        l.center_after = mean;
        l.bias_after = bias_mean;
    }
    for (; l.first_row < f->V && s == PATCH_OK; l.first_row += l.n) {
        l.n = f->V - l.first_row < VOCAB_CHUNK ? f->V - l.first_row : VOCAB_CHUNK;
        r.y = logits + l.first_row;
        s = linear(w, &l, &r, NULL, e);
    }
    return s;
}

patch_status patch_logits(const patch_model *m, const float *rows, size_t n, float *logits,
                          patch_error *e) {
    Pool pool = pool_begin(&m->allocator, SIZE_MAX / 2);
    double *mean = pool_take(&pool, m->file.C, sizeof *mean), bias_mean;
    Work w;
    patch_status s = mean ? work_begin(&w, m, &pool, NULL, e)
                          : no_memory(e, "logits", pool.refused);
    if (s == PATCH_OK)
        s = vocabulary_mean(&w, mean, &bias_mean)
                ? all_logits(&w, rows, NULL, n, mean, bias_mean, logits, e) : unreadable(m, e);
    return pool_end(&pool, s);
}

/* One number wanted: the metric of a run for an example, whose clean run KL compares with. */
typedef struct Wanted {
    int run, example, clean;
    int id;   /* set: equal where the final rows are the same row */
    int same; /* set: an earlier one of the same row and example, hence the same value; -1: none */
} Wanted;

enum { LOGIT_ROWS = 128 }; /* rows whose logits are held at once: 26 MB of GPT-2's */

/* All that a metric of n rows needs. Its scratch is taken when the pass has given its own back,
   which is as large: small memories hold one of them. */
typedef struct Question {
    Work work;
    patch_metric metric;
    const patch_example *examples;
    Wanted *wanted;      /* [n] */
    size_t n, most;      /* most: rows of logits at once */
    float *rows;         /* [n,C] final rows, and for KL [n,C] of the clean runs behind them */
    double *one, *other; /* [C] */
    float *logits;       /* [most,V] */
    float *powers;       /* [V] */
} Question;

static patch_status question_begin(Question *q, const Model *m, Pool *pool, patch_error *e) {
    const size_t V = m->file.V, C = m->file.C, n_rows = q->metric == PATCH_KL ? 2 * q->n : q->n;
    const int columns = q->metric == PATCH_LOGIT_DIFF || q->metric == PATCH_LOGIT;
    q->most = columns ? 0 : q->n + 1 < LOGIT_ROWS ? q->n + 1 : LOGIT_ROWS;
    q->rows = pool_take(pool, n_rows * C, sizeof *q->rows);
    q->one = pool_take(pool, C, sizeof *q->one);
    q->other = pool_take(pool, C, sizeof *q->other);
    q->logits = pool_raw(pool, q->most * V, sizeof *q->logits);
    q->powers = pool_raw(pool, columns ? 0 : V, sizeof *q->powers);
    return q->rows && q->one && q->other && q->logits && q->powers
               ? PATCH_OK : no_memory(e, "metric", pool->refused);
}

/* The logit of the answer, or its difference from the wrong answer's: values [n]. The logit
   alone is a difference too, from the vocabulary's mean. */
static patch_status linear_metric(const Question *q, double *values, patch_error *e) {
    const Work *w = &q->work;
    const size_t C = w->m->file.C;
    double bias = 0, other_bias = 0;
    if (q->metric == PATCH_LOGIT && !vocabulary_mean(w, q->other, &other_bias))
        return unreadable(w->m, e);
    for (size_t i = 0; i < q->n; i++) {
        const patch_example *x = &q->examples[q->wanted[i].example];
        if (i == 0 || q->wanted[i].example != q->wanted[i - 1].example) {
            if (!unembed_column(w, x->answer, q->one, &bias) ||
                (q->metric == PATCH_LOGIT_DIFF &&
                 !unembed_column(w, x->wrong, q->other, &other_bias)))
                return unreadable(w->m, e);
            for (size_t k = 0; k < C; k++)
                q->one[k] -= q->other[k];
        }
        values[i] = 0;
        for (size_t k = 0; k < C; k++)
            values[i] += (double)q->rows[i * C + k] * q->one[k];
        values[i] += bias - other_bias;
    }
    return PATCH_OK;
}

/* Of a row of logits [V]: ln sum e^logit, so that logits[v] - log_sum is the log-probability. */
static double log_sum(const Question *q, const float *logits) {
    const size_t V = q->work.m->file.V;
    float most;
    memcpy(q->powers, logits, V * sizeof *logits);
    const double sum = exp_sum(q->work.m->kernels, q->powers, V, &most);
    return (double)most + log(sum);
}

/* A metric of one row of logits; clean and clean_sum (KL): the clean run's logits and log_sum. */
static double row_metric(const Question *q, const float *logits, int answer, const float *clean,
                         double clean_sum) {
    const size_t V = q->work.m->file.V;
    const double total = q->metric == PATCH_RANK ? 0 : log_sum(q, logits);
    double sum = 0;
    if (q->metric == PATCH_PROB)
        return exp((double)logits[answer] - total);
    if (q->metric == PATCH_LOGPROB)
        return (double)logits[answer] - total;
    for (size_t v = 0; v < V; v++) {
        const double log_clean = q->metric == PATCH_KL ? (double)clean[v] - clean_sum : 0;
        sum += q->metric == PATCH_RANK
                   ? (double)(logits[v] > logits[answer])
                   : exp(log_clean) * (log_clean - ((double)logits[v] - total));
    }
    return sum;
}

/* Metrics of the whole distribution: values [n]. Rows go through the unembedding in chunks; with KL
   each example's part of a chunk is led by its clean row, which stands at rows[n + i]. */
static patch_status distribution_metric(const Question *q, double *values, patch_error *e) {
    const size_t V = q->work.m->file.V;
    const Wanted *wanted = q->wanted;
    int index[LOGIT_ROWS], item[LOGIT_ROWS]; /* rows, and whose value each gives; -1: a clean row */
    double bias_mean, clean_sum = 0;
    patch_status s = PATCH_OK;
    if (!vocabulary_mean(&q->work, q->one, &bias_mean))
        return unreadable(q->work.m, e);
    for (size_t i = 0; s == PATCH_OK && i < q->n;) {
        const float *clean = q->logits;
        size_t m = 0;
        for (; i < q->n && m + 2 <= q->most; i++) {
            if (wanted[i].same >= 0)
                continue;
            if (q->metric == PATCH_KL &&
                (m == 0 || wanted[i].example != wanted[item[m - 1]].example)) {
                item[m] = -1;
                index[m++] = (int)(q->n + i);
            }
            item[m] = (int)i;
            index[m++] = (int)i;
        }
        if (m > 0)
            s = all_logits(&q->work, q->rows, index, m, q->one, bias_mean, q->logits, e);
        for (size_t k = 0; k < m && s == PATCH_OK; k++) {
            const float *row = q->logits + k * V;
            if (item[k] < 0)
                clean_sum = log_sum(q, clean = row);
            else
                values[item[k]] = row_metric(q, row, q->examples[wanted[item[k]].example].answer,
                                             clean, clean_sum);
        }
    }
    for (size_t i = 0; i < q->n && s == PATCH_OK; i++)
        if (wanted[i].same >= 0)
            values[i] = values[wanted[i].same];
    return s;
}

/* Find the wanted numbers that are equal by construction: those of one example and one row. A table
   of all rows remembers who had each last. */
static int find_same(Pool *pool, Wanted *wanted, const patch_read *reads, size_t n) {
    size_t most = 0;
    for (size_t i = 0; i < n; i++)
        most = (size_t)reads[i].id > most ? (size_t)reads[i].id : most;
    int *last = pool_take(pool, most + 1, sizeof *last); /* number of the wanted one + 1 */
    for (size_t i = 0; last != NULL && i < n; i++) {
        int *who = &last[reads[i].id];
        wanted[i].id = reads[i].id;
        wanted[i].same = *who > 0 && wanted[*who - 1].example == wanted[i].example ? *who - 1 : -1;
        if (wanted[i].same < 0)
            *who = (int)i + 1;
    }
    return last != NULL;
}

/* Carry the runs through the model and take the metric of each wanted one, values [n]: what every
   analysis comes down to. All memory that can be foreseen is taken before the pass. */
static patch_status score_runs(const Model *m, Pool *pool, const patch_run *runs, size_t n_runs,
                               Wanted *wanted, size_t n, const patch_example *examples,
                               patch_metric metric, Mode mode, double *values, patch_stats *stats,
                               patch_error *e) {
    const size_t n_reads = metric == PATCH_KL ? 2 * n : n;
    Question q = {.metric = metric, .examples = examples, .wanted = wanted, .n = n};
    patch_read *reads = pool_take(pool, n_reads, sizeof *reads);
    patch_status s = reads ? question_begin(&q, m, pool, e)
                           : no_memory(e, "results", pool->refused);
    for (size_t i = 0; s == PATCH_OK && i < n_reads; i++) {
        const int run = i < n ? wanted[i].run : wanted[i - n].clean;
        reads[i] = (patch_read){PATCH_LN_FINAL_NORMALIZED, 0, run, runs[run].n_tokens - 1,
                                q.rows + i * m->file.C, 0};
    }
    if (s == PATCH_OK)
        s = execute(m, pool, runs, n_runs, reads, n_reads, mode, stats, e);
    const double started = now();
    if (s == PATCH_OK && !find_same(pool, wanted, reads, n))
        s = no_memory(e, "results", pool->refused);
    if (s == PATCH_OK && mode != SIZED && (s = work_begin(&q.work, m, pool, stats, e)) == PATCH_OK)
        s = metric == PATCH_LOGIT || metric == PATCH_LOGIT_DIFF
                ? linear_metric(&q, values, e) : distribution_metric(&q, values, e);
    if (stats != NULL)
        stats->seconds_metric += now() - started;
    return s;
}

/* ==== 10. Patching ===============================================================================
   A sweep is a list of cells. For each example and cell there is one run more: the corrupted prompt
   with the clean run's activation put in (denoising), or the other way round (noising). All of them
   are given to the engine at once, or in groups where memory is bounded; what they share, and what
   costs nothing, it finds out by itself.

       denoising    clean run ------------ activation of the cell ---.      "does it suffice to
                    corrupted run ----------------------------------(=)---  bring the answer back?"
       noising      the same with the two runs' parts exchanged:            "is it needed for it?"

   There are two ways through this chapter. The plain one does what the TransformerLens notebook
   does, a whole pass a cell with cached values set, and is the reference: the tests hold the fast
   one's numbers equal to it bit for bit. */

enum { STANDARD_LIMIT = 192 << 20 }; /* bytes of plan and rows where max_memory does not say */

static patch_status check_examples(const Model *m, const patch_example *x, size_t n,
                                   patch_metric metric, int both, patch_error *e) {
    if ((unsigned)metric > PATCH_RANK)
        return fail(e, PATCH_E_USAGE, "metric", "unknown metric %d; see patch_metric", (int)metric);
    for (size_t run = 0; run < n; run++) {
        WITHIN("number of prompts",
               (x[run].clean != NULL) + (!both || x[run].corrupted != NULL), 2, 2);
        WITHIN("number of tokens", x[run].n_tokens, 1, m->dims.n_ctx);
        WITHIN("answer", x[run].answer, 0, m->dims.d_vocab - 1);
        if (metric == PATCH_LOGIT_DIFF)
            WITHIN("wrong answer", x[run].wrong, 0, m->dims.d_vocab - 1);
    }
    return PATCH_OK;
}

/* ---- the plain way: --brute ---- */

/* The edits that set a cell of one run to the values cached from the other run at the cell's hook
   point and layer: values [T,width], or [H,T,T] of scores and pattern. Returns how many: one, or
   one a head. */
static int set_edits(const Model *m, const patch_cell *c, const float *values, size_t T,
                     patch_edit *out) {
    const int square = hook_facts[c->hook].shape == 'P', all_heads = square && c->head < 0;
    const size_t width = square ? T : hook_width(m, (int)c->hook, T);
    const size_t part = square ? T * T : hook_facts[c->hook].shape == 'R' ? m->file.C : m->file.D;
    const size_t at = (c->pos < 0 ? 0 : (size_t)c->pos) * width + (c->src < 0 ? 0 : (size_t)c->src);
    const int n = all_heads ? m->dims.n_heads : 1;
    for (int i = 0; i < n; i++) {
        const int head = all_heads ? i : c->head;
        out[i] = (patch_edit){.hook = c->hook, .op = PATCH_SET, .layer = c->layer, .pos = c->pos,
                              .head = head, .src = c->src, .stride = width,
                              .values = values + (head < 0 ? 0 : (size_t)head) * part + at};
    }
    return n;
}

/* The notebook's loop, one item after the other: run the source prompt whole and cache the cell's
   hook point (once for neighbouring cells of one layer); run the other prompt whole with the cached
   values set. Nothing is shared, nothing left out, and nothing is taken from this chapter's fast
   way. */
static patch_status brute_items(const Model *m, const patch_example *examples,
                                const patch_cell *cells, size_t n_cells,
                                const patch_cells_options *o, size_t first, size_t end,
                                double *values, patch_stats *stats, patch_error *e) {
    const patch_cell *cached = NULL;
    Pool cache = pool_begin(&m->allocator, SIZE_MAX / 2);
    patch_edit edits[MAX_HEADS];
    patch_status s = PATCH_OK;
    float *seen = NULL; /* the cached activation */
    for (size_t item = first; item < end && s == PATCH_OK; item++) {
        const patch_example *x = &examples[item / n_cells];
        const patch_cell *c = &cells[item % n_cells];
        const size_t T = (size_t)x->n_tokens;
        Pool pool = pool_begin(&m->allocator, SIZE_MAX / 2);
        Wanted wanted = {1, 0, 0, 0, 0};
        patch_run runs[2] = {{o->noising ? x->corrupted : x->clean, x->n_tokens, NULL, 0},
                             {o->noising ? x->clean : x->corrupted, x->n_tokens, edits, 0}};
        s = check_slice(m, item, (int)c->hook, c->layer, c->pos, c->head, c->src, x->n_tokens, e);
        if (s == PATCH_OK && (item % n_cells == 0 || cached == NULL || cached->hook != c->hook ||
                              cached->layer != c->layer)) {
            patch_read read = {c->hook, c->layer, 0, -1, NULL, 0};
            pool_give(&cache, seen);
            seen = read.out = pool_take(&cache, T * hook_width(m, (int)c->hook, T), sizeof *seen);
            s = seen == NULL ? no_memory(e, "brute", cache.refused)
                             : execute(m, &pool, runs, 1, &read, 1, UNSHARED, stats, e);
            cached = c;
        }
        if (s == PATCH_OK) { /* run 0 is clean, for KL; run 1 is patched */
            runs[0].tokens = x->clean;
            runs[1].n_edits = set_edits(m, c, seen, T, edits);
            s = score_runs(m, &pool, runs, 2, &wanted, 1, x, o->metric, UNSHARED, values + item,
                           stats, e);
        }
        s = pool_end(&pool, s);
    }
    return pool_end(&cache, s);
}

/* ---- the fast way ---- */

/* A family of runs, which is what every analysis is made of: `bases` runs an example (its clean run
   first), and on them items, each one or more runs with edits, the last of which is measured. A
   group of four items, two of each of two examples, with two bases and one run an item, is

       run    0        1            2        3            4        5        6        7
              clean 0  corrupted 0  clean 1  corrupted 1  item 0   item 1   item 0   item 1
                                                          `--- example 0    `--- example 1

   The last item of one group and the first of the next may belong to one example, whose bases are
   then computed in both. */
typedef struct Family {
    const patch_example *x;
    size_t n, per_example; /* examples, items of each */
    size_t bases, base_edits, item_runs, item_edits; /* how many an example or item has, at most */
    int unpatched;         /* the base that an item without effect equals */
    patch_metric metric;
    /* Fill an example's bases: runs[0..bases-1], which so far are its clean prompt unedited. */
    void (*fill_bases)(const struct Family *f, size_t example, int base, patch_run *runs,
                       patch_edit *edits);
    /* Fill an item's runs, which are copies of the base `unpatched`; runs[0] is number `at`, the
       example's first base is number `base`. NULL: they stay so. */
    void (*fill_item)(const struct Family *f, size_t example, size_t item, int base, int at,
                      patch_run *runs, patch_edit *edits);
    const void *ctx;
} Family;

/* Items first .. first + n - 1 in one pass: values [n], and of the bases of all examples touched
   unpatched [examples,bases] (NULL: not wanted). The runs are all bases, then all items' runs, so
   that what an item copies from is an earlier run. */
static patch_status run_group(const Model *m, Pool *pool, const Family *f, size_t first, size_t n,
                              Mode mode, double *values, double *unpatched, patch_stats *stats,
                              patch_error *e) {
    const size_t from = first / f->per_example, bases = f->bases;
    const size_t examples = (first + n - 1) / f->per_example - from + 1;
    const size_t n_bases = examples * bases, n_runs = n_bases + n * f->item_runs;
    const size_t n_edits = examples * f->base_edits + n * f->item_edits;
    patch_run *runs = pool_take(pool, n_runs, sizeof *runs);
    patch_edit *edits = pool_take(pool, n_edits, sizeof *edits), *next = edits;
    Wanted *wanted = pool_take(pool, n_bases + n, sizeof *wanted);
    double *found = pool_take(pool, n_bases + n, sizeof *found); /* the bases' values, the items' */
    if (!runs || !edits || !wanted || !found)
        return no_memory(e, "group", pool->refused);
    for (size_t i = 0; i < n_bases; i++) {
        const patch_example *x = &f->x[from + i / bases];
        runs[i] = (patch_run){x->clean, x->n_tokens, NULL, 0};
        wanted[i] = (Wanted){(int)i, (int)(i / bases), (int)(i - i % bases), 0, 0};
    }
    for (size_t i = 0; i < examples; i++, next += f->base_edits)
        f->fill_bases(f, from + i, (int)(i * bases), runs + i * bases, next);
    for (size_t i = 0; i < n; i++, next += f->item_edits) {
        const size_t example = (first + i) / f->per_example, base = (example - from) * bases;
        const size_t at = n_bases + i * f->item_runs;
        for (size_t k = 0; k < f->item_runs; k++)
            runs[at + k] = runs[base + (size_t)f->unpatched];
        if (f->fill_item != NULL)
            f->fill_item(f, example, (first + i) % f->per_example, (int)base, (int)at, runs + at,
                         next);
        wanted[n_bases + i] =
            (Wanted){(int)(at + f->item_runs - 1), (int)(example - from), (int)base, 0, 0};
    }
    const patch_status s = score_runs(m, pool, runs, n_runs, wanted, n_bases + n, f->x + from,
                                      f->metric, mode, found, stats, e);
    if (s != PATCH_OK || mode == SIZED)
        return s;
    if (values != NULL)
        memcpy(values, found + n_bases, n * sizeof *values);
    if (unpatched != NULL)
        memcpy(unpatched + bases * from, found, n_bases * sizeof *unpatched);
    for (size_t i = n_bases; stats && f->fill_item && i < n_bases + n; i++) {
        stats->cells++;
        stats->cells_skipped += wanted[i].id == wanted[wanted[i].clean + f->unpatched].id;
    }
    return PATCH_OK;
}

/* How many items to try first: 16 times as many as would fit if they shared nothing (in an IOI
   sweep they share nearly all). Too many costs no more than a plan that is given up. */
static size_t first_guess(const Model *m, const Family *f, size_t limit) {
    size_t T = 1;
    for (size_t i = 0; i < f->n; i++)
        T = (size_t)f->x[i].n_tokens > T ? (size_t)f->x[i].n_tokens : T;
    T *= m->file.L * STAGES * sizeof(Node) + (6 * m->file.C + m->file.M) * sizeof(float);
    return 16 * (limit / T) + 1;
}

typedef patch_status (*Done)(void *ctx, size_t first, size_t count, const double *values,
                             patch_error *e);

/* Items first .. end - 1 in as few passes as the memory allows; values [n,per_example]. A group
   that does not fit is given up and halved. The stats count what was of use; of what was given
   up, which as a rule is a plan and no pass, the time alone, as it did pass. */
static patch_status run_family(const Model *m, const Family *f, size_t first, size_t end,
                               double *values, double *unpatched, Done done, void *ctx,
                               patch_stats *stats, patch_error *e) {
    const size_t limit = memory_limit(m, STANDARD_LIMIT);
    size_t group = first_guess(m, f, limit);
    patch_status s = PATCH_OK;
    while (first < end && s == PATCH_OK) {
        const size_t some = end - first < group ? end - first : group;
        const double started = now();
        double *into = values ? values + first : NULL;
        patch_stats tried = stats ? *stats : (patch_stats){0};
        Pool pool = pool_begin(&m->allocator, limit);
        s = run_group(m, &pool, f, first, some, SHARED, into, unpatched, &tried, e);
        pool_end(&pool, s);
        if (s == PATCH_E_MEMORY && some > 1) {
            group = (some + 1) / 2;
            s = PATCH_OK;
            if (stats != NULL)
                stats->seconds_plan += now() - started;
            continue;
        }
        if (s == PATCH_E_MEMORY && m->options.max_memory > 0) {
            pool = pool_begin(&m->allocator, SIZE_MAX / 2);
            s = run_group(m, &pool, f, first, 1, SIZED, NULL, NULL, NULL, NULL);
            s = too_little(m, &pool, s, e);
        }
        if (s == PATCH_OK && stats != NULL)
            *stats = tried;
        if (s == PATCH_OK && done != NULL)
            s = done(ctx, first, some, into, e);
        first += some;
    }
    return s;
}

typedef struct Cells { /* the family of a sweep */
    const patch_cell *cells;
    int noising;
} Cells;

static void fill_both(const Family *f, size_t example, int base, patch_run *runs,
                      patch_edit *edits) {
    (void)base, (void)edits;
    if (f->x[example].corrupted != NULL)
        runs[1].tokens = f->x[example].corrupted;
}

static void fill_cell(const Family *f, size_t example, size_t item, int base, int at,
                      patch_run *runs, patch_edit *edit) {
    const Cells *c = f->ctx;
    const patch_cell *cell = &c->cells[item];
    (void)example, (void)at;
    *edit = (patch_edit){.hook = cell->hook, .op = PATCH_COPY, .layer = cell->layer,
                         .pos = cell->pos, .head = cell->head, .src = cell->src,
                         .source = base + (c->noising ? 1 : 0)};
    runs->edits = edit;
    runs->n_edits = 1;
}

patch_status patch_cells(const patch_model *m, const patch_example *x, size_t n,
                         const patch_cell *cells, size_t n_cells, const patch_cells_options *o,
                         double *values, patch_stats *stats, patch_error *e) {
    const Cells c = {cells, o->noising};
    const Family f = {.x = x, .n = n, .per_example = n_cells, .bases = 2, .item_runs = 1,
                      .item_edits = 1, .unpatched = o->noising ? 0 : 1, .metric = o->metric,
                      .fill_bases = fill_both, .fill_item = fill_cell, .ctx = &c};
    const size_t run = 0;
    patch_status s = check_examples(m, x, n, o->metric, 1, e);
    if (s != PATCH_OK || n == 0 || n_cells == 0)
        return s;
    WITHIN("number of examples", n, 1, LONG_MAX / 64 / (long)n_cells);
    WITHIN("first item", o->first, 0, n * n_cells - 1);
    const size_t all = n * n_cells;
    const size_t end = o->count == 0 || o->count > all - o->first ? all : o->first + o->count;
    if (!o->brute)
        return run_family(m, &f, o->first, end, values, o->unpatched, o->done, o->ctx, stats, e);
    s = brute_items(m, x, cells, n_cells, o, o->first, end, values, stats, e);
    if (s == PATCH_OK && o->unpatched != NULL)
        s = patch_measure(m, x, n, o->metric, o->unpatched, NULL, e);
    return s == PATCH_OK && o->done != NULL
               ? o->done(o->ctx, o->first, end - o->first, values + o->first, e) : s;
}

/* A family without edits: one item an example, the clean run itself. */
patch_status patch_measure(const patch_model *m, const patch_example *x, size_t n,
                           patch_metric metric, double *out, patch_stats *stats, patch_error *e) {
    const Family f = {.x = x, .n = n, .per_example = 1, .bases = 2, .item_runs = 1,
                      .metric = metric, .fill_bases = fill_both};
    patch_status s = check_examples(m, x, n, metric, 0, e);
    if (s == PATCH_OK)
        s = run_family(m, &f, 0, n, NULL, out, NULL, NULL, stats, e);
    for (size_t i = 0; s == PATCH_OK && i < n; i++)
        if (x[i].corrupted == NULL)
            out[2 * i + 1] = (double)NAN;
    return s;
}

/* ---- the sweeps of transformer_lens.patching, a line each ---- */

/* Letters of the axes: l layer, p pos, h head, d dest, s src. Several hook points make a `kind`
   axis. */
static const struct SweepRule {
    const char *name, *axes;
    int n_hooks;
    patch_hook hooks[5];
} sweep_rules[] = {
    {"resid_pre", "lp", 1, {PATCH_RESID_PRE}},
    {"resid_mid", "lp", 1, {PATCH_RESID_MID}},
    {"resid_post", "lp", 1, {PATCH_RESID_POST}},
    {"attn_out", "lp", 1, {PATCH_ATTN_OUT}},
    {"mlp_out", "lp", 1, {PATCH_MLP_OUT}},
    {"attn_head_out_by_pos", "lph", 1, {PATCH_Z}},
    {"attn_head_q_by_pos", "lph", 1, {PATCH_Q}},
    {"attn_head_k_by_pos", "lph", 1, {PATCH_K}},
    {"attn_head_v_by_pos", "lph", 1, {PATCH_V}},
    {"attn_head_pattern_by_pos", "lhd", 1, {PATCH_PATTERN}},
    {"attn_head_pattern_dest_src_pos", "lhds", 1, {PATCH_PATTERN}},
    {"attn_head_out_all_pos", "lh", 1, {PATCH_Z}},
    {"attn_head_q_all_pos", "lh", 1, {PATCH_Q}},
    {"attn_head_k_all_pos", "lh", 1, {PATCH_K}},
    {"attn_head_v_all_pos", "lh", 1, {PATCH_V}},
    {"attn_head_pattern_all_pos", "lh", 1, {PATCH_PATTERN}},
    {"attn_head_all_pos_every", "lh", 5, {PATCH_Z, PATCH_Q, PATCH_K, PATCH_V, PATCH_PATTERN}},
    {"attn_head_by_pos_every", "lph", 5, {PATCH_Z, PATCH_Q, PATCH_K, PATCH_V, PATCH_PATTERN}},
    {"block_every", "lp", 3, {PATCH_RESID_PRE, PATCH_ATTN_OUT, PATCH_MLP_OUT}},
};
enum { SWEEPS = sizeof sweep_rules / sizeof sweep_rules[0] };

const char *patch_sweep_name(size_t i) {
    return i < SWEEPS ? sweep_rules[i].name : NULL;
}

patch_status patch_sweep_cells(const patch_model *m, const char *sweep, int n_tokens,
                               patch_shape *shape, patch_cell *cells, patch_error *e) {
    static const char letters[] = "lphds";
    static const char *const names[] = {"layer", "pos", "head", "dest", "src"};
    const struct SweepRule *rule = sweep_rules;
    const size_t run = 0;

    while (rule < sweep_rules + SWEEPS && strcmp(sweep, rule->name) != 0)
        rule++;
    if (rule == sweep_rules + SWEEPS)
        return fail(e, PATCH_E_USAGE, sweep, "no sweep has this name; see `actpatch patch -h`");
    WITHIN("number of tokens", n_tokens, 1, m->dims.n_ctx);
    *shape = (patch_shape){.n_cells = (size_t)rule->n_hooks};
    if (rule->n_hooks > 1) {
        shape->axes[0] = "kind";
        shape->size[shape->rank++] = (size_t)rule->n_hooks;
    }
    for (const char *axis = rule->axes; *axis != 0; axis++) {
        const size_t size = *axis == 'l' ? m->file.L : *axis == 'h' ? m->file.H : (size_t)n_tokens;
        shape->axes[shape->rank] = names[strchr(letters, *axis) - letters];
        shape->size[shape->rank++] = size;
        shape->n_cells *= size;
    }
    for (size_t i = 0; cells != NULL && i < shape->n_cells; i++) { /* row-major: last axis first */
        patch_cell *c = &cells[i];
        size_t rest = i;
        *c = (patch_cell){.pos = -1, .head = -1, .src = -1};
        for (size_t k = strlen(rule->axes); k-- > 0;) {
            const size_t size = shape->size[k + (rule->n_hooks > 1)];
            int *const field[] = {&c->layer, &c->pos, &c->head, &c->pos, &c->src}; /* of letters */
            *field[strchr(letters, rule->axes[k]) - letters] = (int)(rest % size);
            rest /= size;
        }
        c->hook = rule->hooks[rest];
    }
    return PATCH_OK;
}

/* ==== 11. Further analyses =======================================================================
   Each stands on the engine: a list of runs with edits, and what is read of them. */
#ifndef PATCH_CORE

/* ---- 11.1 refactor_factored_attn_matrices: step 5 of the weight processing ----------------------
   Scores depend on W_Q and W_K, and what a head writes on W_V and W_O, through a product A . B^T
   alone, where A and B are [rows,d]; A M and B M^-T, for any invertible M, are other factors of it.
   The singular value decomposition A . B^T = U S V^T (orthonormal columns in U and V; S diagonal,
   not negative, descending) picks a pair that does not depend on how the head was stored, but for
   signs: U sqrt(S) and V sqrt(S), or U S and V. The product, all that the model sees, is unchanged.

   The product is [rows,rows] but of rank d at most, so it is never formed:
      A = Q_a R_a,  B = Q_b R_b      thin QR by Householder reflections: Q orthonormal, R [d,d]
      G = R_a R_b^T                  so that A . B^T = Q_a G Q_b^T, with the same singular values
      G J = [u_1 s_1, u_2 s_2, ...]  J: plane rotations until the columns are orthogonal (Jacobi)
      U S = Q_a (G J),  V = Q_b J
   See Golub & Van Loan, Matrix Computations, on Householder QR and on Jacobi's SVD. Reflections,
   since Gram-Schmidt loses orthogonality where columns are nearly dependent. One-sided Jacobi
   (Hestenes 1958), since it is short and makes even the vectors of tiny singular values orthogonal.
   Nothing is scaled against overflow: elements were floats, whose fourth powers a double holds. */

/* Four sums side by side; a single one would wait for each addition before it starts the next. */
static double dot(const double *x, const double *y, size_t n) {
    double s[4] = {0};
    size_t i;
    for (i = 0; i + 4 <= n; i += 4)
        for (size_t j = 0; j < 4; j++)
            s[j] += x[i + j] * y[i + j];
    for (; i < n; i++)
        s[0] += x[i] * y[i];
    return (s[0] + s[1]) + (s[2] + s[3]);
}

/* y [n] += c x [n] */
static void add_scaled(double *restrict y, double c, const double *restrict x, size_t n) {
    for (size_t i = 0; i < n; i++)
        y[i] += c * x[i];
}

/* Apply the reflection I - tau v v^T to what is right of column j in a [rows,d]. v is 0 above row
   j, 1 in row j, and below it lies in a itself, in column j. w: scratch [d], for v^T a. */
static void reflect(double *a, size_t rows, size_t d, size_t j, double tau, double *w) {
    const size_t n = d - j - 1;
    double *top = a + j * d + j + 1; /* of the part that changes; one to the left of it is v */
    memcpy(w, top, n * sizeof *w);
    for (size_t i = 1; i < rows - j; i++)
        add_scaled(w, top[i * d - 1], top + i * d, n);
    add_scaled(top, -tau, w, n);
    for (size_t i = 1; i < rows - j; i++)
        add_scaled(top + i * d, -tau * top[i * d - 1], w, n);
}

/* a [rows,d] = Q R in place: R on and above the diagonal, below it the v of the reflections whose
   product is Q, and tau [d]. Reflection j turns column j, from row j down, into (r, 0, ..., 0). The
   sign of r is opposite to the head's, so that nothing cancels in head - r. */
static void qr(double *a, size_t rows, size_t d, double *tau, double *w) {
    for (size_t j = 0; j < d; j++) {
        const double head = a[j * d + j];
        double tail = 0;
        for (size_t i = j + 1; i < rows; i++)
            tail += a[i * d + j] * a[i * d + j];
        tau[j] = 0;
        if (tail < DBL_MIN / DBL_EPSILON) /* the last row, or zeros, or (in equal columns) */
            continue;                     /* rounding errors of rounding errors, below any float */
        const double r = head > 0 ? -sqrt(head * head + tail) : sqrt(head * head + tail);
        tau[j] = (r - head) / r;
        for (size_t i = j + 1; i < rows; i++)
            a[i * d + j] /= head - r;
        a[j * d + j] = r;
        reflect(a, rows, d, j, tau[j], w);
    }
}

/* Turn what qr left into Q [rows,d]: column j is reflections j, ..., 0 of unit vector j. From the
   last on, each makes its own column in the place of its v and changes those to the right. */
static void form_q(double *a, size_t rows, size_t d, const double *tau, double *w) {
    for (size_t j = d; j-- > 0;) {
        reflect(a, rows, d, j, tau[j], w);
        for (size_t i = 0; i < rows; i++)
            a[i * d + j] = i < j ? 0 : i == j ? 1 - tau[j] : a[i * d + j] * -tau[j];
    }
}

/* One step of Jacobi's method: x and y are two columns of G [d,d], each followed by its column of
   J. Put the longer one first, then rotate so that x . y = 0 in G. Returns 0 if nothing was to be
   done. A squared length up to `noise` is rounding error, without a direction, and left alone. */
static int settle(double *restrict x, double *restrict y, size_t d, double noise) {
    const double tolerance = DBL_EPSILON * sqrt((double)d); /* a dot product's own error */
    double xx = dot(x, x, d), yy = dot(y, y, d), xy = dot(x, y, d), t;
    const int exchange = xx < yy;
    if (exchange) {
        for (size_t i = 0; i < 2 * d; i++)
            t = x[i], x[i] = y[i], y[i] = t;
        t = xx, xx = yy, yy = t;
    }
    if (yy <= noise || !(fabs(xy) > tolerance * sqrt(xx) * sqrt(yy)))
        return exchange;
    const double half = (xx - yy) / 2; /* tan(2 angle) = xy / half */
    t = xy / (half + hypot(half, xy)); /* tan(angle), at most 1 */
    const double c = 1 / sqrt(1 + t * t), s = c * t, h = s / (1 + c);
    for (size_t i = 0; i < 2 * d; i++) { /* x, y = c x + s y, c y - s x, with c = 1 - s h: so, */
        const double xi = x[i], yi = y[i]; /* over all the rotations, lengths drift by 2e-15, */
        x[i] = xi + s * (yi - h * xi);     /* with c itself by 1e-14 */
        y[i] = yi - s * (xi + h * yi);
    }
    return 1;
}

/* a [rows,d] = a . M [d,d]. m: the columns of M, 2 d apart. row: scratch [d]. */
static void times(double *a, size_t rows, size_t d, const double *m, double *row) {
    for (size_t i = 0; i < rows; i++) {
        memcpy(row, a + i * d, d * sizeof *row);
        for (size_t j = 0; j < d; j++)
            a[i * d + j] = dot(row, m + j * 2 * d, d);
    }
}

/* Replace the factors of A . B^T = U S V^T, [rows,d] each with rows >= d, by U sqrt(S), V sqrt(S)
   (balance: W_Q and W_K are equals) or by U S, V (W_V and W_O: z gets the length of what the head
   writes). Columns of singular values 0 become zero, except V's, which stay orthonormal. ab: A, B,
   then scratch of 3 d + 2 d d. In gj [d,2 d] row j is column j of G, then column j of J. */
static void factor_product(double *ab, size_t rows, size_t d, int balance) {
    double *a = ab, *b = a + rows * d, *tau_a = b + rows * d, *tau_b = tau_a + d, *row = tau_b + d;
    double *gj = row + d, noise = 0;

    qr(a, rows, d, tau_a, row);
    qr(b, rows, d, tau_b, row);
    for (size_t p = 0; p < d; p++) {
        double *column = gj + p * 2 * d;
        for (size_t i = 0; i < d; i++) {
            const size_t q = i > p ? i : p; /* R is zero to the left of its diagonal */
            column[i] = dot(a + i * d + q, b + p * d + q, d - q);
            column[d + i] = i == p; /* J is as yet the identity */
        }
        noise += DBL_EPSILON * DBL_EPSILON * dot(column, column, d);
    }
    for (int sweep = 0, again = 1; again && sweep < 60; sweep++) { /* 9 or 10 for d = 64, 16 seen */
        again = 0;
        for (size_t p = 0; p < d; p++)
            for (size_t q = p + 1; q < d; q++)
                again |= settle(gj + p * 2 * d, gj + q * 2 * d, d, noise);
    }
    for (size_t p = 0; p < d; p++) {
        double *column = gj + p * 2 * d;
        const double ss = dot(column, column, d), s = ss <= noise ? 0 : sqrt(ss);
        const double left = s == 0 ? 0 : balance ? 1 / sqrt(s) : 1, right = balance ? sqrt(s) : 1;
        for (size_t i = 0; i < 2 * d; i++)
            column[i] *= i < d ? left : right;
    }
    form_q(a, rows, d, tau_a, row);
    form_q(b, rows, d, tau_b, row);
    times(a, rows, d, gj, row);
    times(b, rows, d, gj + d, row);
}

/* Element (i, j) of W_Q, W_K, W_V or W_O^T in w, a layer of Model's `factored`; row C: the bias. */
static float *factor_at(float *w, size_t C, size_t which, size_t i, size_t j) {
    return i == C ? w + (4 * C + which) * C + j
                  : w + which * C * C + (which == LINEAR_O ? j * C + i : i * C + j);
}

/* Step 5 for the D columns from `at` on, a head, of one layer. Scores are, with the biases as row
   C, [x,1] [W_Q;b_Q] [W_K;b_K]^T [y,1]. ab: A, B and the scratch of factor_product. */
static void factor_head(float *w, size_t C, size_t D, size_t at, double *ab) {
    for (size_t pair = LINEAR_Q; pair <= LINEAR_V; pair += 2) { /* and W_K, and W_O */
        const size_t rows = pair == LINEAR_Q ? C + 1 : C;
        for (size_t i = 0; i < 2 * rows; i++) /* of A, then of B */
            for (size_t j = 0; j < D; j++)
                ab[i * D + j] = (double)*factor_at(w, C, pair + i / rows, i % rows, at + j);
        factor_product(ab, rows, D, pair == LINEAR_Q);
        for (size_t i = 0; i < 2 * rows; i++)
            for (size_t j = 0; j < D; j++)
                *factor_at(w, C, pair + i / rows, i % rows, at + j) = (float)ab[i * D + j];
    }
}

/* Step 5, once, when a model is opened: 2 decompositions a head, of the processed matrices. b_V is
   folded into b_O whether or not step 4 is on, as in TransformerLens. */
static patch_status factor_model(Model *m, patch_error *e) {
    const size_t C = m->file.C, D = m->file.D, per_layer = 4 * C * C + 4 * C;
    const size_t n_ab = 2 * (C + 1) * D + 3 * D + 2 * D * D, n_out = m->file.L * per_layer;
    Pool pool = pool_begin(&m->allocator, SIZE_MAX / 2);
    float *panels = pool_take(&pool, (C + PANEL - 1) / PANEL * PANEL * C, sizeof *panels);
    double *value_bias = pool_take(&pool, C, sizeof *value_bias); /* [C] */
    double *ab = pool_take(&pool, n_ab * (size_t)m->threads, sizeof *ab);
    float *out = take(&m->allocator, n_out, sizeof *out); /* outlives the call */
    Work work;
    patch_status s = panels && value_bias && ab && out
                         ? work_begin(&work, m, &pool, NULL, e)
                         : no_memory(e, "refactored attention", n_out * sizeof *out);

    for (float *w = out; s == PATCH_OK && w < out + n_out; w += per_layer) {
        for (size_t which = LINEAR_Q; which <= LINEAR_O && s == PATCH_OK; which++) {
            Linear l = layer_linear(m, (size_t)(w - out) / per_layer, (int)which);
            l.shift = which == LINEAR_O ? value_bias : NULL;
            s = linear(&work, &l, NULL, panels, e);
            for (size_t i = 0; i < C; i++)
                for (size_t j = 0; j < C; j++)
                    w[(which * C + i) * C + j] = panels[(j / PANEL * C + i) * PANEL + j % PANEL];
            for (size_t j = 0; j < C; j++)
                w[(4 * C + which) * C + j] = which == LINEAR_V ? 0.0f : (float)work.bias[j];
            if (which == LINEAR_V)
                memcpy(value_bias, work.bias, C * sizeof *value_bias);
        }
        PARALLEL(m->threads, schedule(dynamic))
        for (long h = 0; h < (s == PATCH_OK ? (long)m->file.H : 0); h++)
            factor_head(w, C, D, (size_t)h * D, ab + n_ab * (size_t)thread_number());
    }
    if (s == PATCH_OK)
        m->factored = out;
    else
        give(&m->allocator, out);
    return pool_end(&pool, s);
}

/* ---- 11.2 Causal tracing: Meng et al. 2022, arXiv:2202.05262 ------------------------------------
   The noise is numpy's RandomState: MT19937 (Matsumoto and Nishimura 1998), two words of which make
   a double, two doubles by the polar method two Gaussian numbers, of which it keeps one for the
   next call. It is equal bit for bit, hence nothing here may be fused or reordered. */
typedef struct Random {
    uint32_t state[624]; /* the words of now; the next 624 are made from them */
    int at, has_spare;   /* which word comes next; is there a Gaussian number in hand? */
    double spare;
} Random;

static void random_seed(Random *r, uint32_t seed) {
    r->state[0] = seed;
    for (int i = 1; i < 624; i++)
        r->state[i] = 1812433253u * (r->state[i - 1] ^ r->state[i - 1] >> 30) + (uint32_t)i;
    r->at = 624;
    r->has_spare = 0;
}

static uint32_t random_u32(Random *r) {
    if (r->at == 624) {
        uint32_t *x = r->state;
        for (int i = 0; i < 624; i++) {
            const uint32_t y = (x[i] & 0x80000000u) | (x[(i + 1) % 624] & 0x7FFFFFFFu);
            x[i] = x[(i + 397) % 624] ^ y >> 1 ^ (y & 1 ? 0x9908B0DFu : 0);
        }
        r->at = 0;
    }
    uint32_t y = r->state[r->at++]; /* and tempered, so that its bits are evenly spread */
    y ^= y >> 11;
    y ^= y << 7 & 0x9D2C5680u;
    y ^= y << 15 & 0xEFC60000u;
    return y ^ y >> 18;
}

static double random_gauss(Random *r) {
    volatile double x[2], xx[2], square; /* volatile: no fused multiply-add, numpy has none */
    if ((r->has_spare = !r->has_spare) == 0)
        return r->spare;
    do { /* a point within the unit circle */
        for (int i = 0; i < 2; i++) {
            const double high = random_u32(r) >> 5, low = random_u32(r) >> 6; /* 53 bits in all */
            x[i] = 2.0 * ((high * 67108864.0 + low) / 9007199254740992.0) - 1.0;
            xx[i] = x[i] * x[i];
        }
        square = xx[0] + xx[1];
    } while (square >= 1.0 || square == 0.0);
    square = sqrt(-2.0 * log(square) / square);
    r->spare = square * x[0];
    return square * x[1];
}

void patch_trace_noise(unsigned seed, double *z, size_t n) {
    Random r;
    random_seed(&r, seed);
    for (size_t i = 0; i < n; i++)
        z[i] = random_gauss(&r);
}

/* The edit that takes a head's slice (head -1: the whole vector) from an earlier run. */
static patch_edit copy_from(int source, patch_hook hook, int layer, int pos, int head) {
    return (patch_edit){.hook = hook, .op = PATCH_COPY, .layer = layer, .pos = pos, .head = head,
                        .src = -1, .source = source};
}

/* A fact's traces are a family of one prompt. Bases: the clean run, then S = `samples` corrupted
   ones, whose subject's token embeddings are set to noisy ones. Items of one kind: [T, L, S]. */
typedef struct Trace {
    const Model *m;
    const patch_trace_options *o;
    const patch_fact *fact;
    float *noisy; /* [S, range, C], range being the number of the subject's tokens */
    int kind;     /* patch_trace_kind */
} Trace;

static void trace_bases(const Family *f, size_t example, int base, patch_run *runs,
                        patch_edit *edits) {
    const Trace *t = f->ctx;
    const int range = t->fact->end - t->fact->begin;
    (void)example, (void)base;
    for (int i = 0; i < t->o->samples * range; i++) /* [S, range] */
        edits[i] = (patch_edit){.hook = PATCH_EMBED, .op = PATCH_SET, .head = -1, .src = -1,
                                .pos = t->fact->begin + i % range,
                                .values = t->noisy + (size_t)i * t->m->file.C};
    for (int s = 0; s < t->o->samples; s++) { /* runs[0] stays clean */
        runs[1 + s].edits = edits + s * range;
        runs[1 + s].n_edits = range;
    }
}

/* Restore resid_post, or mlp_out or attn_out over a window of layers, at one token of one sample.
   Severed: restore resid_post while mlp_out or attn_out stay as they were in the corrupted run, in
   every layer; what of the effect is left did not go through them. */
static void trace_item(const Family *f, size_t example, size_t item, int base, int at,
                       patch_run *run, patch_edit *edits) {
    const Trace *t = f->ctx;
    const int L = t->m->dims.n_layers, severed = t->o->severed;
    const size_t S = (size_t)t->o->samples, cell = item / S; /* [T, L] */
    const int layer = (int)(cell % t->m->file.L), pos = (int)(cell / t->m->file.L);
    const int half = t->o->window / 2, rest = t->o->window - half; /* before, and from */
    const int first = severed || layer < half ? 0 : layer - half;
    const int end = severed || layer + rest > L ? L : layer + rest;
    const int corrupted = base + 1 + (int)(item % S); /* its run */
    const patch_hook hook = t->kind == PATCH_TRACE_MLP ? PATCH_MLP_OUT : PATCH_ATTN_OUT;
    int n = run[corrupted - at].n_edits;
    (void)example;
    memcpy(edits, run[corrupted - at].edits, (size_t)n * sizeof *edits); /* the noise */
    if (t->kind == PATCH_TRACE_RESID || severed)
        edits[n++] = copy_from(base, PATCH_RESID_POST, layer, pos, -1);
    for (int l = first; l < end && t->kind != PATCH_TRACE_RESID; l++)
        edits[n++] = copy_from(severed ? corrupted : base, hook, l, pos, -1);
    run->edits = edits;
    run->n_edits = n;
}

/* Of W_E as it is stored, since sigma must not depend on the processing; rounded to float, which is
   what torch's std of float32 is. */
patch_status patch_trace_sigma(const patch_model *m, const int *tokens, size_t n, double noise,
                               double *sigma, patch_error *e) {
    const size_t C = m->file.C;
    double sum = 0, square = 0;
    size_t run = 0;

    WITHIN("number of subject tokens", n, 1, INT_MAX);
    for (run = 0; run < n; run++)
        WITHIN("subject token", tokens[run], 0, m->dims.d_vocab - 1);
    Pool pool = pool_begin(&m->allocator, SIZE_MAX / 2);
    float *rows = pool_take(&pool, n * C, sizeof *rows); /* [n,C] */
    patch_status s = rows ? PATCH_OK : no_memory(e, "trace", pool.refused);
    for (size_t i = 0; s == PATCH_OK && i < n; i++)
        if (!weights_row(&m->file, &m->file.tensors[0], (size_t)tokens[i], rows + i * C, pool.a))
            s = unreadable(m, e);
    for (size_t i = 0; s == PATCH_OK && i < n * C; i++)
        sum += (double)rows[i];
    for (size_t i = 0; s == PATCH_OK && i < n * C; i++) {
        const double d = (double)rows[i] - sum / ((double)n * (double)C);
        square += d * d;
    }
    if (s == PATCH_OK) /* unbiased: one element is the mean's */
        *sigma = noise * (double)(float)sqrt(square / ((double)n * (double)C - 1));
    return pool_end(&pool, s);
}

/* The embeddings of a fact's subject, noisy [samples, range, C] = float(double(W_E row) + sigma z),
   and then what center_writing_weights does to an embedding. 0: a row is unreadable. */
static int noisy_embeddings(const Trace *t, float *noisy) {
    const size_t C = t->m->file.C;
    Random r;
    random_seed(&r, 1);
    for (int s = 0; s < t->o->samples; s++)
        for (int i = t->fact->begin; i < t->fact->end; i++, noisy += C) {
            double mean = 0;
            if (!weights_row(&t->m->file, &t->m->file.tensors[0], (size_t)t->fact->tokens[i], noisy,
                             &t->m->allocator))
                return 0;
            for (size_t k = 0; k < C; k++) {
                volatile double noise = t->o->sigma * random_gauss(&r); /* numpy rounds it */
                noisy[k] = (float)((double)noisy[k] + noise);
            }
            if (t->m->steps & DID_CENTER_WRITING)
                mean = t->m->kernels->mean(noisy, C);
            for (size_t k = 0; k < C; k++)
                noisy[k] = (float)((double)noisy[k] - mean);
        }
    return 1;
}

patch_status patch_trace(const patch_model *m, const patch_fact *fact,
                         const patch_trace_options *o, double *high, double *low, double *cells,
                         patch_stats *stats, patch_error *e) {
    const size_t T = (size_t)fact->n_tokens, S = (size_t)o->samples, n_cells = T * m->file.L;
    const patch_example x = {fact->tokens, NULL, fact->n_tokens, fact->answer, 0};
    size_t run = 0;

    WITHIN("samples", o->samples, 1, 10000);
    WITHIN("window", o->window, 1, 100000);
    WITHIN("number of tokens", fact->n_tokens, 1, m->dims.n_ctx);
    WITHIN("subject's end", fact->end, (long)fact->begin + 1, fact->n_tokens);
    WITHIN("subject's beginning", fact->begin, 0, fact->end - 1);
    for (size_t i = 0; i < T; i++)
        WITHIN("token", fact->tokens[i], 0, m->dims.d_vocab - 1);
    patch_status s = check_examples(m, &x, 1, o->metric, 0, e);
    if (s != PATCH_OK)
        return s;
    const size_t range = (size_t)(fact->end - fact->begin), n_noisy = S * range;
    Pool pool = pool_begin(&m->allocator, SIZE_MAX / 2);
    Trace t = {m, o, fact, pool_take(&pool, n_noisy * m->file.C, sizeof(float)), 0};
    double *values = pool_take(&pool, n_cells * S, sizeof *values); /* [T, L, S] */
    double *unpatched = pool_take(&pool, S + 1, sizeof *unpatched); /* of the bases */
    const Family f = {.x = &x, .n = 1, .per_example = n_cells * S, .metric = o->metric, .ctx = &t,
                      .bases = S + 1, .base_edits = n_noisy, .fill_bases = trace_bases,
                      .item_runs = 1, .item_edits = range + 1 + m->file.L, .fill_item = trace_item,
                      .unpatched = 1};

    if (!t.noisy || !values || !unpatched)
        s = no_memory(e, "trace", pool.refused);
    else if (!noisy_embeddings(&t, t.noisy))
        s = unreadable(m, e);
    for (; t.kind <= PATCH_TRACE_ATTN; t.kind++) {
        if (s == PATCH_OK && (o->kinds >> t.kind & 1))
            s = run_family(m, &f, 0, n_cells * S, values, unpatched, NULL, NULL, stats, e);
        for (size_t i = 0; s == PATCH_OK && (o->kinds >> t.kind & 1) && i < n_cells; i++) {
            double sum = 0;
            for (size_t k = 0; k < S; k++)
                sum += values[i * S + k];
            cells[(size_t)t.kind * n_cells + i] = sum / (double)S;
        }
    }
    *high = s == PATCH_OK ? unpatched[0] : 0;
    *low = 0;
    for (size_t k = 1; s == PATCH_OK && k <= S; k++)
        *low += unpatched[k] / (double)S;
    return pool_end(&pool, s);
}

/* ---- 11.3 Ablation ------------------------------------------------------------------------------
   An item is a set of cells, all replaced in one run, or (keep) what is left when everything but
   the set is. Averages of what a component says over many prompts are the gentlest replacement:
   they take away what it says about this one (Wang et al. 2022, arXiv:2211.00593). */
typedef struct Ablation {
    const Model *m;
    const patch_ablation *o;
    const patch_cell *cells;
    const size_t *sets; /* [n_sets + 1] where each item's cells begin */
    float *values;      /* [groups, L, T, width] zeros, means or noise */
    patch_hook hook;    /* of all cells */
    size_t T, width;    /* tokens of each prompt; floats of a row at the hook point */
} Ablation;

/* Is this one of an example's positions? All are where none are given. */
static int is_named(const patch_ablation *o, size_t example, int pos) {
    const size_t n = (size_t)o->n_positions;
    size_t i = 0;
    while (i < n && o->positions[example * n + i] != pos)
        i++;
    return n == 0 || i < n;
}

/* Does a set hold this head; with head -1, any head of the layer? */
static int is_kept(const Ablation *a, size_t set, int layer, int head) {
    for (size_t i = a->sets[set]; i < a->sets[set + 1]; i++)
        if (a->cells[i].layer == layer && (head < 0 || a->cells[i].head == head))
            return 1;
    return 0;
}

/* Ablate one slice: a head (-1: the whole vector) at a position (-1: all). */
static void ablate_slice(const Ablation *a, size_t example, int partner, int layer, int pos,
                         int head, patch_run *run, patch_edit *edits) {
    static const patch_op ops[] = {PATCH_SET, PATCH_SET, PATCH_COPY, PATCH_ADD}; /* as patch_by */
    const size_t group = a->o->groups ? (size_t)a->o->groups[example] : 0;
    const size_t part = hook_facts[a->hook].shape == 'R' ? a->m->file.C : a->m->file.D;
    const size_t row = (group * a->m->file.L + (size_t)layer) * a->T + (pos < 0 ? 0 : (size_t)pos);
    patch_edit *edit = &edits[run->n_edits++];
    *edit = copy_from(partner, a->hook, layer, pos, head);
    edit->op = ops[a->o->by];
    edit->values = a->values + row * a->width + (head < 0 ? 0 : (size_t)head * part);
    edit->stride = a->width; /* pos -1: each position has values of its own */
}

/* A row of which no head is kept is ablated whole: attention then is not computed for it. */
static void ablate_item(const Family *f, size_t example, size_t item, int base, int at,
                        patch_run *run, patch_edit *edits) {
    const Ablation *a = f->ctx;
    const int one_by_one = a->o->n_positions > 0; /* else one edit serves all positions */
    const int T = (int)a->T, H = a->m->dims.n_heads;
    (void)at;
    run->edits = edits;
    run->n_edits = 0;
    for (size_t i = a->sets[item]; i < a->sets[item + 1] && !a->o->keep; i++) {
        const patch_cell *c = &a->cells[i];
        for (int pos = one_by_one ? 0 : c->pos; pos < (one_by_one ? T : c->pos + 1); pos++)
            if (is_named(a->o, example, pos))
                ablate_slice(a, example, base + 1, c->layer, pos, c->head, run, edits);
    }
    for (int l = 0; l < a->m->dims.n_layers && a->o->keep; l++)
        for (int pos = one_by_one ? 0 : -1; pos < (one_by_one ? T : 0); pos++) {
            const int some = is_named(a->o, example, pos) && is_kept(a, item, l, -1); /* is kept */
            for (int h = some ? 0 : -1; h < (some ? H : 0); h++) /* -1: all heads at once */
                if (!some || !is_kept(a, item, l, h))
                    ablate_slice(a, example, base + 1, l, pos, h, run, edits);
        }
}

/* What the ablated slices are set to, or the noise that is added to them: means are by position and
   group; noise has the layer's standard deviation over all positions of all examples. */
static patch_status ablation_values(const Ablation *a, const patch_example *x, size_t n,
                                    patch_error *e) {
    const patch_ablation *o = a->o;
    const size_t L = a->m->file.L, size = a->T * a->width, all = (size_t)o->n_groups * L * size;
    const double N = (double)n * (double)size; /* numbers of a layer */
    Pool pool = pool_begin(&a->m->allocator, SIZE_MAX / 2);
    double *sum = pool_take(&pool, all, sizeof *sum);           /* [groups, L, T, width] */
    double *count = pool_take(&pool, (size_t)o->n_groups, sizeof *count); /* examples of each */
    double *moments = pool_take(&pool, 2 * L, sizeof *moments); /* [L, 2] sums of x and x^2 */
    float *rows = pool_take(&pool, L * size, sizeof *rows);     /* [L, T, width] */
    patch_read *reads = pool_take(&pool, L, sizeof *reads);
    patch_status s =
        sum && count && moments && rows && reads ? PATCH_OK : no_memory(e, "ablate", pool.refused);

    for (size_t b = 0; s == PATCH_OK && b < n; b++) {
        const size_t group = o->groups ? (size_t)o->groups[b] : 0;
        const patch_run run = {x[b].clean, x[b].n_tokens, NULL, 0};
        for (size_t l = 0; l < L; l++)
            reads[l] = (patch_read){a->hook, (int)l, 0, -1, rows + l * size, 0};
        s = patch_execute(a->m, &run, 1, reads, L, NULL, e);
        for (size_t i = 0; s == PATCH_OK && i < L * size; i++) {
            sum[group * L * size + i] += (double)rows[i];
            moments[2 * (i / size)] += (double)rows[i];
            moments[2 * (i / size) + 1] += (double)rows[i] * (double)rows[i];
        }
        count[group]++;
    }
    Random r;
    random_seed(&r, o->seed);
    for (size_t i = 0; s == PATCH_OK && i < all; i++) {
        const double *moment = moments + 2 * (i / size % L), mean = moment[0] / N;
        const double deviation = sqrt(fmax(moment[1] / N - mean * mean, 0)); /* below 0: rounding */
        a->values[i] = (float)(o->by == PATCH_BY_MEAN ? sum[i] / count[i / (L * size)]
                                                      : o->noise * deviation * random_gauss(&r));
    }
    return pool_end(&pool, s);
}

static patch_status check_ablation(const Model *m, const patch_example *x, size_t n,
                                   const patch_cell *cells, size_t n_cells,
                                   const patch_ablation *o, patch_error *e) {
    patch_status s = check_examples(m, x, n, o->metric, 0, e);
    size_t run = 0;

    for (size_t i = 0; i < n_cells && s == PATCH_OK; i++)
        if ((size_t)cells[i].hook >= PATCH_N_HOOKS || cells[i].hook != cells[0].hook ||
            hook_facts[cells[i].hook].shape == 'P' || !in_blocks((int)cells[i].hook))
            s = fail(e, PATCH_E_USAGE, "site", "cells of one hook point inside the blocks are "
                     "wanted, and no pattern; choose another site");
        else if (o->keep && (cells[i].hook != PATCH_Z || cells[i].head < 0))
            s = fail(e, PATCH_E_INPUT, "keep", "only z of single heads can be kept; name each "
                     "head's layer and number");
        else if (n > 0)
            s = check_slice(m, i, (int)cells[i].hook, cells[i].layer, cells[i].pos, cells[i].head,
                            cells[i].src, x[0].n_tokens, e);
    if (s != PATCH_OK)
        return s;
    if ((int)o->by < 0 || o->by > PATCH_BY_NOISE)
        return fail(e, PATCH_E_USAGE, "by", "unknown way %d; see patch_by", (int)o->by);
    WITHIN("number of groups", o->n_groups, 1, INT_MAX / 4);
    WITHIN("number of positions", o->n_positions, 0, o->positions ? INT_MAX / 4 : 0);
    for (run = 0; run < n; run++) {
        WITHIN("number of tokens", x[run].n_tokens, x[0].n_tokens, x[0].n_tokens);
        if (o->by == PATCH_BY_RESAMPLE)
            WITHIN("partner", o->partner ? o->partner[run] : -1, 0, n - 1);
        if (o->groups != NULL)
            WITHIN("group", o->groups[run], 0, o->n_groups - 1);
        for (size_t i = 0; i < (size_t)o->n_positions; i++)
            WITHIN("position", o->positions[run * (size_t)o->n_positions + i], -1,
                   x[0].n_tokens - 1);
    }
    return PATCH_OK;
}

patch_status patch_ablate(const patch_model *m, const patch_example *x, size_t n,
                          const patch_cell *cells, const size_t *sets, size_t n_sets,
                          const patch_ablation *o, double *values, double *unpatched,
                          patch_stats *stats, patch_error *e) {
    const size_t L = m->file.L;
    size_t most = 0; /* cells of the largest set */
    patch_status s = check_ablation(m, x, n, cells, sets[n_sets], o, e);

    if (s != PATCH_OK || n == 0 || n_sets == 0)
        return s;
    for (size_t i = 0; i < n_sets; i++)
        most = sets[i + 1] - sets[i] > most ? sets[i + 1] - sets[i] : most;
    Pool pool = pool_begin(&m->allocator, SIZE_MAX / 2);
    double *both = pool_take(&pool, 2 * n, sizeof *both);      /* [n,2] of all bases */
    patch_example *pairs = pool_take(&pool, n, sizeof *pairs); /* each with its partner's prompt */
    Ablation a = {.m = m, .o = o, .cells = cells, .sets = sets, .T = (size_t)x[0].n_tokens,
                  .hook = sets[n_sets] ? cells->hook : PATCH_Z}; /* no cells: keep nothing */
    const Family f = {.x = pairs, .n = n, .per_example = n_sets, .metric = o->metric,
                      .bases = 2, .fill_bases = fill_both, .item_runs = 1, .ctx = &a,
                      .item_edits = (o->keep ? L * m->file.H : most) * (o->n_positions ? a.T : 1),
                      .fill_item = ablate_item};
    a.width = hook_width(m, (int)a.hook, 0);
    a.values = pool_take(&pool, (size_t)o->n_groups * L * a.T * a.width, sizeof *a.values);
    for (size_t i = 0; pairs != NULL && i < n; i++) {
        pairs[i] = x[i];
        pairs[i].corrupted = o->by == PATCH_BY_RESAMPLE ? x[o->partner[i]].clean : NULL;
    }
    if (!both || !pairs || !a.values)
        s = no_memory(e, "ablate", pool.refused);
    else if (o->by == PATCH_BY_MEAN || o->by == PATCH_BY_NOISE)
        s = ablation_values(&a, x, n, e);
    if (s == PATCH_OK)
        s = run_family(m, &f, 0, n * n_sets, values, both, NULL, NULL, stats, e);
    for (size_t i = 0; s == PATCH_OK && unpatched != NULL && i < n; i++)
        unpatched[i] = both[2 * i];
    return pool_end(&pool, s);
}

/* ---- 11.4 Path patching: ARENA's three steps, Goldowsky-Dill et al. 2023, arXiv:2304.05969 ------
   An item is a sender, a head. Run 0: every head's z is held at the original's, the sender's taken
   from the other run, so that the difference travels along MLPs and the residual stream alone. To
   the final residual stream that is all; to heads, run 1 is the original with the receivers' q, k
   or v taken from run 0. With z held the prefixes leave the rows' making: only MLPs recompute. */
typedef struct Paths {
    const Model *m;
    const patch_path_options *o;
} Paths;

static void path_item(const Family *f, size_t example, size_t item, int base, int at,
                      patch_run *runs, patch_edit *edits) {
    const Paths *p = f->ctx;
    const int L = p->m->dims.n_layers, H = p->m->dims.n_heads, n_receivers = (int)p->o->n_receivers;
    const int original = base + f->unpatched, other = base + 1 - f->unpatched;
    int n = 0;
    (void)example;
    for (int l = 0; l < L; l++) {
        edits[n++] = copy_from(original, PATCH_Z, l, -1, -1); /* step 2: held */
        if (l == (int)item / H)
            edits[n++] = copy_from(other, PATCH_Z, l, -1, (int)item % H);
        if (p->o->freeze_mlps)
            edits[n++] = copy_from(original, PATCH_MLP_OUT, l, -1, -1);
    }
    runs[0].edits = edits;
    runs[0].n_edits = n;
    if (n_receivers == 0)
        return;
    runs[1].edits = edits + n; /* step 3 */
    runs[1].n_edits = n_receivers;
    for (const patch_cell *c = p->o->receivers; c < p->o->receivers + n_receivers; c++)
        edits[n++] = copy_from(at, c->hook, c->layer, -1, c->head);
}

patch_status patch_paths(const patch_model *m, const patch_example *x, size_t n,
                         const patch_path_options *o, double *values, double *unpatched,
                         patch_stats *stats, patch_error *e) {
    const size_t L = m->file.L, senders = L * m->file.H;
    const Paths p = {m, o};
    const Family f = {.x = x, .n = n, .per_example = senders, .metric = o->metric,
                      .bases = 2, .fill_bases = fill_both, .fill_item = path_item,
                      .item_runs = o->n_receivers ? 2 : 1,
                      .item_edits = 2 * L + 1 + o->n_receivers,
                      .unpatched = o->noising ? 0 : 1, .ctx = &p};
    const size_t run = 0;
    const patch_status s = check_examples(m, x, n, o->metric, 1, e);
    for (size_t i = 0; s == PATCH_OK && i < o->n_receivers; i++) {
        WITHIN("receiver's hook point", o->receivers[i].hook, PATCH_Q, PATCH_V);
        WITHIN("receiver's layer", o->receivers[i].layer, 0, m->dims.n_layers - 1);
        WITHIN("receiver's head", o->receivers[i].head, 0, m->dims.n_heads - 1);
    }
    return s != PATCH_OK || n == 0
               ? s : run_family(m, &f, 0, n * senders, values, unpatched, NULL, NULL, stats, e);
}

/* ---- 11.5 Direct logit attribution and the logit lens (nostalgebraist 2020) ---------------------
   The final residual stream is a sum of what the layers, or the heads, wrote; once its scale is
   given, LayerNorm is linear, and so each part has its share in the logit difference:
      LD = sum over parts of (part - its mean) / scale . direction + bias
   The lens puts the stream after each half layer through LayerNorm as if it were the final one. */
static double attribution(const float *row, size_t C, double scale, const double *direction) {
    double mean = 0, sum = 0;
    for (size_t k = 0; k < C; k++)
        mean += (double)row[k];
    mean /= (double)C;
    for (size_t k = 0; k < C; k++)
        sum += ((double)row[k] - mean) * direction[k];
    return sum / scale;
}

/* direction [C] = W_U[answer] - W_U[wrong], by LayerNorm's weight where that is not folded, and the
   bias, which LayerNorm's then belongs to. other: scratch [C]. 0: a weight is unreadable. */
static int lens_direction(const Work *w, const patch_example *x, double *direction, double *other,
                          double *bias) {
    const ModelFile *f = &w->m->file;
    float *ln = w->norm; /* [2,C] weight, bias */
    double minus;         /* the wrong answer's bias */
    if (!unembed_column(w, x->answer, direction, bias) ||
        !unembed_column(w, x->wrong, other, &minus))
        return 0;
    *bias -= minus;
    for (size_t k = 0; k < f->C; k++)
        direction[k] -= other[k];
    if (w->m->steps & DID_FOLD_LN)
        return 1;
    if (!final_norm(w, ln))
        return 0;
    for (size_t k = 0; k < f->C; k++) {
        *bias += (double)ln[f->C + k] * direction[k];
        direction[k] *= (double)ln[k];
    }
    return 1;
}

/* The reads of one example's last position, 5 L + 4 of them: embed, pos_embed, then of each layer
   five, the last resid_post, and the final LayerNorm's scale. rows: where they stand, in turn. */
static size_t lens_reads(const Model *m, int pos, float *rows, patch_read *reads) {
    static const patch_hook each[] = {PATCH_RESID_PRE, PATCH_ATTN_OUT, PATCH_RESID_MID,
                                      PATCH_MLP_OUT, PATCH_RESULT};
    const int n = 5 * m->dims.n_layers + 4;
    for (int i = 0; i < n; i++) {
        const patch_hook hook = i < 2        ? (i ? PATCH_POS_EMBED : PATCH_EMBED)
                                : i < n - 2  ? each[(i - 2) % 5]
                                : i == n - 2 ? PATCH_RESID_POST : PATCH_LN_FINAL_SCALE;
        const int layer = i < 2 ? 0 : i < n - 2 ? (i - 2) / 5 : m->dims.n_layers - 1;
        reads[i] = (patch_read){hook, layer, 0, pos, rows, 0};
        rows += hook_width(m, (int)hook, 0);
    }
    return (size_t)n;
}

/* Example b's parts from its reads. */
static void lens_parts(const Model *m, const patch_read *reads, const double *direction,
                       double bias, patch_lens *out, size_t b) {
    const size_t C = m->file.C, L = m->file.L, H = m->file.H;
    const double scale = (double)*reads[5 * L + 3].out;
    double *accumulated = out->accumulated + b * (2 * L + 1), *lens = out->lens + b * (2 * L + 1);
    double *layers = out->layers + b * (2 * L + 2), *heads = out->heads + b * (L * H + 1), sum = 0;
    for (size_t i = 0; i <= 2 * L; i++) { /* resid_pre and resid_mid in turn, the last resid_post */
        const float *row = reads[2 + i / 2 * 5 + i % 2 * 2].out;
        float own;
        m->kernels->norm_scale(row, C, m->file.eps, &own);
        accumulated[i] = attribution(row, C, scale, direction);
        lens[i] = attribution(row, C, (double)own, direction) + bias;
    }
    for (size_t i = 0; i < 2 * L + 2; i++) { /* the embeddings, then attn_out and mlp_out in turn */
        const size_t at = i < 2 ? i : 3 + (i - 2) / 2 * 5 + i % 2 * 2;
        layers[i] = attribution(reads[at].out, C, scale, direction);
    }
    for (size_t i = 0; i < L * H; i++)
        sum += heads[i] = attribution(reads[6 + i / H * 5].out + i % H * C, C, scale, direction);
    heads[L * H] = accumulated[2 * L] - sum; /* the remainder: everything that is no head */
    out->bias[b] = bias;
    out->logit_diff[b] = accumulated[2 * L] + bias;
}

patch_status patch_logit_lens(const patch_model *m, const patch_example *x, size_t n,
                              patch_lens *out, patch_error *e) {
    const size_t C = m->file.C, L = m->file.L, floats = (4 * L + 3 + L * m->file.H) * C + 1;
    Pool pool = pool_begin(&m->allocator, SIZE_MAX / 2);
    float *rows = pool_take(&pool, floats, sizeof *rows); /* what the reads give, one by one */
    patch_read *reads = pool_take(&pool, 5 * L + 4, sizeof *reads);
    double *direction = pool_take(&pool, 2 * C, sizeof *direction), bias;
    Work w;
    patch_status s = check_examples(m, x, n, PATCH_LOGIT_DIFF, 0, e);
    if (s == PATCH_OK)
        s = rows && reads && direction ? work_begin(&w, m, &pool, NULL, e)
                                       : no_memory(e, "lens", pool.refused);
    for (size_t b = 0; s == PATCH_OK && b < n; b++) {
        const patch_run run = {x[b].clean, x[b].n_tokens, NULL, 0};
        const size_t n_reads = lens_reads(m, run.n_tokens - 1, rows, reads);
        s = lens_direction(&w, &x[b], direction, direction + C, &bias)
                ? patch_execute(m, &run, 1, reads, n_reads, NULL, e)
                : unreadable(m, e);
        if (s == PATCH_OK)
            lens_parts(m, reads, direction, bias, out, b);
    }
    return pool_end(&pool, s);
}

/* ---- 11.6 Kinds of heads: TransformerLens's detect_head -----------------------------------------
   Of all the attention that a head pays on a prompt, how much lies where its kind would put it?
   Does destination d attending to source s count? 0: s is the previous token; 1: an earlier equal
   token; 2: the token behind an earlier equal one (induction), which may be d itself. */
static int head_kind_detects(const int *tokens, size_t d, size_t s, int kind) {
    return kind == 0 ? d == s + 1
           : kind == 1 ? s < d && tokens[s] == tokens[d]
                       : s > 0 && s - 1 < d && s <= d && tokens[s - 1] == tokens[d];
}

patch_status patch_head_kinds(const patch_model *m, const int *tokens, int n_tokens, double *scores,
                              patch_error *e) {
    const size_t T = (size_t)n_tokens, L = m->file.L, H = m->file.H, run = 0;
    WITHIN("number of tokens", n_tokens, 1, m->dims.n_ctx); /* or T * T might overflow */
    Pool pool = pool_begin(&m->allocator, SIZE_MAX / 2);
    float *patterns = pool_take(&pool, L * H * T * T, sizeof *patterns); /* [L,H,T,T] */
    patch_read *reads = pool_take(&pool, L, sizeof *reads);
    const patch_run prompt = {tokens, n_tokens, NULL, 0};

    if (!patterns || !reads)
        return pool_end(&pool, no_memory(e, "heads", pool.refused));
    for (size_t l = 0; l < L; l++)
        reads[l] = (patch_read){PATCH_PATTERN, (int)l, 0, -1, patterns + l * H * T * T, 0};
    const patch_status s = execute(m, &pool, &prompt, 1, reads, L, SHARED, NULL, e);
    for (size_t i = 0; s == PATCH_OK && i < 3 * L * H; i++) { /* [3,L,H] */
        const float *p = patterns + i % (L * H) * T * T;
        double hit = 0, all = 0;
        for (size_t d = 0; d < T; d++)
            for (size_t k = 0; k < T; k++, p++) { /* from d to k, row by row */
                all += (double)*p;
                if (k <= d && head_kind_detects(tokens, d, k, (int)(i / (L * H))))
                    hit += (double)*p;
            }
        scores[i] = hit / all;
    }
    return pool_end(&pool, s);
}

/* Copying: does a head that attends to a name write that name?  x [n,C]: each name's token as MLP 0
   extends it, W_E[name] + MLP0(LN2(W_E[name])): what the engine makes of it where the position's
   embedding and attention are set to zero. */
static patch_status extended_embeddings(const Model *m, Pool *pool, const int *names, size_t n,
                                        float *x, patch_error *e) {
    const float *zeros = pool_take(pool, m->file.C, sizeof *zeros);
    patch_run *runs = pool_take(pool, n, sizeof *runs);
    patch_read *reads = pool_take(pool, n, sizeof *reads);
    const patch_edit edits[] = {
        {.hook = PATCH_POS_EMBED, .op = PATCH_SET, .head = -1, .src = -1, .values = zeros},
        {.hook = PATCH_ATTN_OUT, .op = PATCH_SET, .head = -1, .src = -1, .values = zeros}};
    if (!zeros || !runs || !reads)
        return no_memory(e, "copying", pool->refused);
    for (size_t i = 0; i < n; i++) {
        runs[i] = (patch_run){&names[i], 1, edits, 2};
        reads[i] = (patch_read){PATCH_RESID_POST, 0, (int)i, 0, x + i * m->file.C, 0};
    }
    return execute(m, pool, runs, n, reads, n, SHARED, NULL, e);
}

/* What the heads of a layer make of x [n,C]: out [H,n,C] = LN_final(x . W_V . W_O), without LN1 and
   biases. v: scratch [n,C]; ln [2,C]: the final LayerNorm's weight and bias, NULL where folded. */
static patch_status copying_rows(const Work *w, size_t layer, const float *x, size_t n,
                                 const float *ln, float *v, float *out, patch_error *e) {
    const Model *m = w->m;
    const size_t C = m->file.C, D = m->file.D, H = m->file.H;
    Linear l = layer_linear(m, layer, LINEAR_V);
    Rows r = {.n = n, .x = x, .ldx = C, .y = v, .ldy = C};

    l.drop_bias = 1; /* no b_V; and, below, no b_O */
    patch_status s = linear(w, &l, &r, NULL, e);
    for (size_t h = 0; h < H && s == PATCH_OK; h++) {
        l = head_linear(m, layer, h);
        r.x = v + h * D;
        r.y = out + h * n * C;
        s = linear(w, &l, &r, NULL, e);
    }
    for (float *row = out; s == PATCH_OK && row < out + H * n * C; row += C) {
        float scale;
        m->kernels->norm_scale(row, C, m->file.eps, &scale);
        m->kernels->normalize(row, C, scale, ln, row);
    }
    return s;
}

/* Has the name fewer than 5 tokens above it in a row of logits [V]? With sign -1, in the row of
   -W_V W_O, which is this one mirrored at `middle`, the logits of LayerNorm's bias alone: LN turns
   -x into what it makes of x with the other sign, but for its bias. A NaN is above everything. */
static int is_written(const float *logits, const float *middle, size_t V, int name, double sign) {
    const double own = sign * (double)logits[name] + (1 - sign) * (double)middle[name];
    int above = 0;
    for (size_t v = 0; v < V; v++)
        above += !(sign * (double)logits[v] + (1 - sign) * (double)middle[v] <= own);
    return above < 5;
}

/* A layer's H n rows go through W_U together, or as many as half the standard memory has room for:
   each block of them makes the panels of W_U anew. */
patch_status patch_copying_scores(const patch_model *m, const int *names, size_t n,
                                  double *positive, double *negative, patch_error *e) {
    const size_t C = m->file.C, L = m->file.L, H = m->file.H, V = m->file.V, rows = H * n;
    const size_t room = memory_limit(m, STANDARD_LIMIT) / 2 / (V * sizeof(float)) + 1;
    const size_t most = rows < room ? rows : room;
    size_t run = 0;

    WITHIN("number of names", n, 1, 1000000);
    for (run = 0; run < n; run++)
        WITHIN("name", names[run], 0, m->dims.d_vocab - 1);
    Pool pool = pool_begin(&m->allocator, SIZE_MAX / 2);
    float *x = pool_take(&pool, n * C, sizeof *x), *v = pool_take(&pool, n * C, sizeof *v);
    float *out = pool_take(&pool, rows * C, sizeof *out);       /* [H,n,C] of one layer */
    float *logits = pool_take(&pool, most * V, sizeof *logits); /* [most,V] */
    float *middle = pool_take(&pool, V, sizeof *middle);        /* [V] */
    float *ln = pool_take(&pool, 2 * C, sizeof *ln);            /* [2,C], zeros where folded */
    double *mean = pool_take(&pool, C, sizeof *mean), bias_mean; /* what center_unembed takes off */
    int *hits = pool_take(&pool, 2 * L * rows, sizeof *hits);   /* [L,H,n,2] positive, negative */
    const int folded = (m->steps & DID_FOLD_LN) != 0;
    Work w;

    if (!x || !v || !out || !logits || !middle || !ln || !mean || !hits)
        return pool_end(&pool, no_memory(e, "copying", pool.refused));
    patch_status s = work_begin(&w, m, &pool, NULL, e);
    if (s == PATCH_OK)
        s = extended_embeddings(m, &pool, names, n, x, e);
    if (s == PATCH_OK &&
        (!vocabulary_mean(&w, mean, &bias_mean) || (!folded && !final_norm(&w, ln))))
        s = unreadable(m, e);
    if (s == PATCH_OK)
        s = all_logits(&w, ln + C, NULL, 1, mean, bias_mean, middle, e);
    for (size_t l = 0; l < L && s == PATCH_OK; l++) {
        s = copying_rows(&w, l, x, n, folded ? NULL : ln, v, out, e);
        for (size_t at = 0, some; at < rows && s == PATCH_OK; at += some) {
            some = rows - at < most ? rows - at : most;
            s = all_logits(&w, out + at * C, NULL, some, mean, bias_mean, logits, e);
            PARALLEL(team(m, (double)some * (double)V), schedule(static))
            for (long i = 0; i < (s == PATCH_OK ? 2 * (long)some : 0); i++)
                hits[2 * (l * rows + at) + (size_t)i] =
                    is_written(logits + (size_t)i / 2 * V, middle, V,
                               names[(at + (size_t)i / 2) % n], i % 2 ? -1 : 1);
        }
    }
    for (size_t i = 0; s == PATCH_OK && i < L * H; i++) {
        size_t written = 0, unwritten = 0;
        for (size_t k = i * n; k < (i + 1) * n; k++) {
            written += (size_t)hits[2 * k];
            unwritten += (size_t)hits[2 * k + 1];
        }
        positive[i] = (double)written / (double)n;
        negative[i] = (double)unwritten / (double)n;
    }
    return pool_end(&pool, s);
}
#endif /* PATCH_CORE */

/* ==== 12. Writers ================================================================================
   Files that are whole or not there, the processed model file, a file's SHA-256; then, left out of
   a library (PATCH_NO_MAIN), tables in every format: for machines .npy, .csv, .json and
   .safetensors, for people SVG, HTML and the terminal, which share labels, colours and panels. */

/* ---- 12.1 Files: written whole or not at all ------------------------------------------------- */

/* A file on its way: written beside its target under another name, so that the target is either the
   old file or the whole new one. */
typedef struct OutFile {
    FILE *f;
    const char *path; /* the caller's */
    char *temporary;  /* NULL: standard output */
} OutFile;

/* Give up: nothing stays behind. Also the end of out_close. */
static void out_drop(OutFile *o) {
    if (o->f != NULL && o->temporary != NULL) {
        fclose(o->f);
        remove(o->temporary);
    }
    give(&HEAP, o->temporary);
    memset(o, 0, sizeof *o);
}

static patch_status out_fail(OutFile *o, const char *what, patch_error *e) {
    fail(e, PATCH_E_IO, o->path, "%s: %s; name a file that can be written, or make room", what,
         errno ? strerror(errno) : "the disk may be full");
    out_drop(o);
    return PATCH_E_IO;
}

/* Begin a file ("-": standard output); after an error there is nothing to drop. */
static patch_status out_open(OutFile *o, const char *path, patch_error *e) {
    const size_t room = strlen(path) + 16;
    *o = (OutFile){.path = path};
    if (strcmp(path, "-") == 0) {
        *o = (OutFile){stdout, "standard output", NULL};
        return PATCH_OK;
    }
    errno = 0;
    if (!is_ordinary(path))
        return out_fail(o, "cannot be written", e);
    if ((o->temporary = take(&HEAP, room, 1)) == NULL)
        return no_memory(e, path, room);
    errno = EEXIST;
    for (int i = 0; i < 100 && o->f == NULL && errno == EEXIST; i++) {
        snprintf(o->temporary, room, "%s.tmp%d", path, i);
        errno = 0;
        o->f = fopen(o->temporary, "wbx"); /* x: never over a file that is there */
    }
    return o->f == NULL ? out_fail(o, "cannot be written", e) : PATCH_OK;
}

/* Finish: the file stands whole under its name, or the error says why not and nothing is left. */
static patch_status out_close(OutFile *o, patch_error *e) {
    errno = 0;
    if (fflush(o->f) != 0 || ferror(o->f))
        return out_fail(o, "could not be written whole", e);
    if (o->temporary != NULL) {
        const int bad = fclose(o->f) != 0;
        o->f = NULL;
        if (bad || rename(o->temporary, o->path) != 0) {
            remove(o->temporary);
            return out_fail(o, "could not be finished", e);
        }
    }
    out_drop(o);
    return PATCH_OK;
}

/* ---- 12.2 The processed flat file (`fold`) --------------------------------------------------- */

/* What `fold` writes needs no work at load: each matrix of the processed weights in panels
   [N/16][K][16], as the kernels read them, so that a file in memory or flash is used in place.
   Layer after layer passes through one matrix's memory.

   A flat file on its way: tensors are written one after another while their table is filled; the
   head, which holds the table's checksum, comes last, over zeros. */
typedef struct FlatFile {
    FILE *f;
    ModelFile file;       /* sizes and flags as the new file will have them */
    unsigned char *table; /* [n_tensors, TABLE_ROW] */
    size_t n, at;         /* tensors finished, bytes written */
    uint32_t crc;         /* of the tensor being written */
} FlatFile;

/* The low n bytes of a number, least significant first, whatever the machine's own order. */
static void set_little(unsigned char *p, uint64_t value, int n) {
    for (int i = 0; i < n; i++)
        p[i] = (unsigned char)(value >> 8 * i);
}

static void flat_write(FlatFile *w, const void *bytes, size_t n) {
    w->crc = crc32_of(w->crc, bytes, n);
    w->at += fwrite(bytes, 1, n, w->f);
}

static void flat_zeros(FlatFile *w, size_t until) {
    for (; w->at < until; w->at++)
        fputc(0, w->f);
}

/* The next tensor begins: zeros up to the alignment, then its row of the table. */
static void flat_begin(FlatFile *w, uint32_t type) {
    const Tensor x = expected_tensor(&w->file, w->n);
    unsigned char *row = w->table + w->n++ * TABLE_ROW;
    flat_zeros(w, (size_t)align_up(w->at));
    memcpy(row, x.name, 48);
    set_little(row + 48, type, 4);
    set_little(row + 52, x.rank, 4);
    set_little(row + 56, x.rows, 4);
    set_little(row + 60, x.cols, 4);
    set_little(row + 64, w->at, 8);
    w->crc = 0;
}

static void flat_end(FlatFile *w) {
    set_little(w->table + (w->n - 1) * TABLE_ROW + 72, w->crc, 4);
}

/* A whole tensor of n floats. */
static void flat_floats(FlatFile *w, uint32_t type, const float *values, size_t n) {
    flat_begin(w, type);
    for (size_t i = 0, some = big_endian() ? 1 : n; i < n; i += some) {
        uint32_t bits;
        unsigned char little[4];
        memcpy(&bits, &values[i], 4);
        set_little(little, bits, 4);
        flat_write(w, some == 1 ? (const void *)little : values, 4 * some);
    }
    flat_end(w);
}

/* A tensor as the model's file has it. */
static int flat_copy(FlatFile *w, const Model *m, const Tensor *t) {
    flat_begin(w, t->type);
    for (size_t at = 0, n; at < t->rows; at += n) {
        n = t->rows - at < VOCAB_CHUNK ? t->rows - at : VOCAB_CHUNK;
        const unsigned char *p = weights(&m->file, t, at, n, &m->allocator);
        if (p == NULL)
            return 0;
        flat_write(w, p, n * (t->bytes / t->rows));
        weights_done(&m->file, t, n, p, &m->allocator);
    }
    flat_end(w);
    return 1;
}

/* One processed matrix in panels, and its bias. */
static patch_status flat_linear(FlatFile *w, const Work *work, size_t layer, int which,
                                double *value_bias, float *panels, patch_error *e) {
    Linear l = layer_linear(work->m, layer, which);
    if (l.takes_value_bias)
        l.shift = value_bias;
    const patch_status s = linear(work, &l, NULL, panels, e);
    if (s != PATCH_OK)
        return s;
    if (l.drop_bias)
        memcpy(value_bias, work->bias, l.n * sizeof *value_bias);
    flat_floats(w, TYPE_PANELS, panels, (l.n + PANEL - 1) / PANEL * PANEL * l.k);
    for (size_t i = 0; i < l.n; i++) /* the panels are written: their room is free */
        panels[i] = l.drop_bias ? 0.0f : (float)work->bias[i];
    flat_floats(w, TYPE_F32, panels, l.n);
    return PATCH_OK;
}

/* All tensors of the new file, in its order. */
static patch_status flat_tensors(FlatFile *w, const Work *work, double *value_bias, float *panels,
                                 patch_error *e) {
    const Model *m = work->m;
    const ModelFile *f = &m->file;
    int ok = flat_copy(w, m, &f->tensors[0]) && flat_copy(w, m, &f->tensors[1]);
    for (size_t layer = 0; ok && layer < f->L; layer++)
        for (int which = LINEAR_Q; ok && which < LINEARS; which++) {
            const Tensor *norm = norm_tensor(f, layer, which == LINEAR_IN);
            if (which == LINEAR_Q || which == LINEAR_IN)
                ok = flat_copy(w, m, norm) && flat_copy(w, m, norm + 1);
            const patch_status s =
                ok ? flat_linear(w, work, layer, which, value_bias, panels, e) : PATCH_OK;
            if (s != PATCH_OK)
                return s;
        }
    for (size_t i = 0; ok && i < (f->untied ? 3u : 2u); i++)
        ok = flat_copy(w, m, tail_tensor(f, i));
    return ok ? PATCH_OK : unreadable(m, e);
}

/* Head and table, over the zeros at the file's beginning, which a pipe does not lead back to: 0.
   Chapter 3 has the bytes' meaning. */
static int flat_head(FlatFile *w, size_t tokenizer_at, uint32_t tokenizer_crc) {
    const ModelFile *f = &w->file;
    const uint64_t words[] = {1, f->L, f->H, f->C, f->M, f->N, f->V, f->act_fn};
    unsigned char head[HEAD_BYTES] = "ACTPATCH";
    uint64_t eps;
    for (int i = 0; i < 8; i++)
        set_little(head + 8 + 4 * i, words[i], 4);
    memcpy(&eps, &f->eps, 8);
    set_little(head + 40, eps, 8);
    set_little(head + 48, f->inverse_layer, 4);
    set_little(head + 52, f->n_tensors, 4);
    set_little(head + 56, f->tokenizer_bytes ? tokenizer_at : 0, 8);
    set_little(head + 64, f->tokenizer_bytes, 8);
    set_little(head + 72, w->at, 8);
    set_little(head + 80, crc32_of(0, w->table, (size_t)f->n_tensors * TABLE_ROW), 4);
    set_little(head + 84, tokenizer_crc, 4);
    set_little(head + 88, f->processing, 4);
    set_little(head + 124, crc32_of(0, head, 124), 4);
    if (fseek(w->f, 0, SEEK_SET) != 0)
        return 0;
    fwrite(head, 1, sizeof head, w->f);
    fwrite(w->table, TABLE_ROW, f->n_tensors, w->f);
    return 1;
}

patch_status patch_model_fold(const patch_model *m, const char *path, patch_error *e) {
    Pool pool = pool_begin(&m->allocator, SIZE_MAX / 2);
    const size_t C = m->file.C, n = 4 + m->file.L * FOLD_PER_LAYER + (m->file.untied != 0);
    const size_t start = (size_t)align_up(HEAD_BYTES + n * TABLE_ROW);
    const unsigned char *tokenizer = m->tokenizer.section;
    double *value_bias = pool_take(&pool, C, sizeof *value_bias);
    float *panels = pool_take(&pool, (C + PANEL) * (m->max_k + PANEL), sizeof *panels);
    FlatFile w = {.file = m->file, .table = pool_take(&pool, n, TABLE_ROW)};
    OutFile out;
    Work work;
    patch_status s;
    if (!value_bias || !panels || !w.table)
        return pool_end(&pool, no_memory(e, path, pool.refused));
    w.file.processing = m->steps | DID_FOLD;
    w.file.per_layer = FOLD_PER_LAYER;
    w.file.n_tensors = (uint32_t)n;
    if ((s = work_begin(&work, m, &pool, NULL, e)) != PATCH_OK ||
        (s = out_open(&out, path, e)) != PATCH_OK)
        return pool_end(&pool, s);
    w.f = out.f;
    flat_zeros(&w, start);
    if (w.file.tokenizer_bytes > 0)
        flat_write(&w, tokenizer, w.file.tokenizer_bytes);
    if ((s = flat_tensors(&w, &work, value_bias, panels, e)) != PATCH_OK)
        out_drop(&out);
    else if (flat_head(&w, start, crc32_of(0, tokenizer, w.file.tokenizer_bytes)))
        s = out_close(&out, e);
    else
        s = out_fail(&out, "could not be written whole", e);
    return pool_end(&pool, s);
}

/* ---- 12.3 SHA-256 (FIPS 180-4) --------------------------------------------------------------- */

typedef struct Sha256 {
    uint32_t state[8], k[64];
    unsigned char block[64];
    uint64_t n; /* bytes so far */
} Sha256;

ALWAYS_INLINE uint32_t rotate(uint32_t x, int n) {
    return x >> n | x << (32 - n);
}

/* One block of 64 bytes. Nothing moves: a of round i is s[-i mod 8], and the message schedule keeps
   its last 16 words. Unrolled, all that is registers: 347 MB/s with gcc 12, where a loop over 64
   words of schedule gave 165. */
static void sha256_block(Sha256 *sha, const unsigned char *p) {
    uint32_t s[8], w[16];
    memcpy(s, sha->state, sizeof s);
    for (int i = 0; i < 16; i++, p += 4)
        w[i] = (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
    for (int t = 0; t < 64; t += 16) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            const uint32_t a = s[-i & 7], b = s[(1 - i) & 7], c = s[(2 - i) & 7];
            const uint32_t e = s[(4 - i) & 7], f = s[(5 - i) & 7], g = s[(6 - i) & 7];
            const uint32_t x = w[(i + 1) & 15], y = w[(i + 14) & 15];
            uint32_t *const d = &s[(3 - i) & 7], *const h = &s[(7 - i) & 7];
            if (t > 0) /* w_t = w_t-16 + w_t-7 + sigma0(w_t-15) + sigma1(w_t-2) */
                w[i] += w[(i + 9) & 15] + (rotate(x, 7) ^ rotate(x, 18) ^ x >> 3) +
                        (rotate(y, 17) ^ rotate(y, 19) ^ y >> 10);
            *h += (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + (g ^ (e & (f ^ g))) +
                  sha->k[t + i] + w[i];
            *d += *h;
            *h += (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) | (c & (a | b)));
        }
    }
    for (int i = 0; i < 8; i++)
        sha->state[i] += s[i];
}

/* The constants are the first 32 bits of the fractions of the primes' cube roots and square roots.
   No fraction lies within 2^-40 of a number of 32 bits, so a double's error, 2^-50, is harmless. */
static void sha256_begin(Sha256 *h) {
    h->n = 0;
    for (uint32_t prime = 2, n = 0; n < 64; prime++) {
        uint32_t divisor = 2;
        while (prime % divisor != 0)
            divisor++;
        if (divisor < prime)
            continue;
        if (n < 8)
            h->state[n] = (uint32_t)(fmod(sqrt(prime), 1) * 4294967296.0);
        h->k[n++] = (uint32_t)(fmod(cbrt(prime), 1) * 4294967296.0);
    }
}

static void sha256_add(Sha256 *h, const void *bytes, size_t n) {
    const unsigned char *p = bytes;
    for (size_t some; n > 0; p += some, n -= some, h->n += some) {
        const size_t at = (size_t)(h->n % 64);
        some = n < 64 - at ? n : 64 - at;
        if (some < 64)
            memcpy(h->block + at, p, some);
        if (at + some == 64)
            sha256_block(h, some == 64 ? p : h->block);
    }
}

/* The digest as hexadecimal digits. */
static void sha256_end(Sha256 *h, char hex[65]) {
    static const unsigned char padding[64] = {0x80};
    unsigned char length[8];
    for (int i = 0; i < 8; i++)
        length[i] = (unsigned char)(h->n * 8 >> (56 - 8 * i));
    sha256_add(h, padding, (size_t)(64 - (h->n + 8) % 64));
    sha256_add(h, length, 8);
    for (int i = 0; i < 8; i++)
        snprintf(hex + 8 * i, 9, "%08lx", (unsigned long)h->state[i]);
}

patch_status patch_model_sha256(const patch_model *m, char hex[65], patch_error *e) {
    enum { PIECE = 1 << 20 };
    const ModelFile *f = &m->file;
    unsigned char *copy = f->map.bytes ? NULL : take(&m->allocator, PIECE, 1);
    int ok = f->map.bytes != NULL || copy != NULL;
    Sha256 h;
    sha256_begin(&h);
    for (size_t at = 0, n; ok && at < f->map.size; at += n) {
        n = f->map.size - at < PIECE ? f->map.size - at : PIECE;
        ok = copy == NULL || map_read(f->path, at, n, copy);
        sha256_add(&h, copy ? copy : f->map.bytes + at, n);
        if (copy == NULL)
            map_release(&f->map, f->map.bytes + at, n);
    }
    sha256_end(&h, hex);
    give(&m->allocator, copy);
    return ok ? PATCH_OK : unreadable(m, e);
}

#if !defined(PATCH_NO_MAIN) || defined(PATCH_WRITERS) /* for the tests of pictures */

/* ---- 12.4 Tables, text and numbers --------------------------------------------------------------
   Tokens are bytes: half a character, a control byte, a tab. Each format shows or escapes them in
   its own way. A writer reports trouble only through ferror(f). */

/* One axis of a table. labels[i] are text for people ("to_14", a head as "H3"), escaped by each
   writer as its format wants; NULL: the numbers 0..size-1. */
typedef struct Axis {
    const char *name; /* example, kind, layer, pos, head, dest, src, part, group */
    size_t size;
    char **labels;
} Axis;

/* One result, ready to be written: what every format is made from. */
typedef struct Table {
    const char *command;   /* "patch" */
    const char *name;      /* "resid_pre": the file's suffix where one call makes several */
    const char *metric;    /* "logit_diff", NULL: none */
    const char *direction; /* "denoising", "noising", NULL: none */
    int normalized;
    int rank;
    Axis axis[6];
    const double *values; /* row-major over the axes */
    const double *band;   /* half the width of a line plot's band around each value; NULL: none */
    double range;         /* --range: where the colours end; 0: at the largest value */
    int has_baseline;
    double clean, corrupted;   /* the unpatched means */
    const char *const *tokens; /* [n_tokens] the first clean example's, by position: the model's */
    const size_t *token_bytes; /* own bytes, which a NUL does not end */
    size_t n_tokens;
    const char *json_tokens;   /* {"clean":[[...]],"corrupted":[[...]]}, NULL: none */
    const char *json_settings; /* a JSON object, NULL: none */
    const char *model;         /* SHA-256 in hexadecimal, NULL: none */
    const char *json_more;     /* further members of the object, NULL: none */
    const char *json_stats;    /* a JSON object, NULL: none */
} Table;

/* utf8_next (chapter 4) over char. */
static uint32_t next_char(const char *text, size_t n, size_t *length) {
    return utf8_next((const unsigned char *)text, n, length);
}

/* Bytes as \xHH; 4 n + 1 characters. */
static void hex_bytes(const char *text, size_t n, char *out) {
    for (size_t i = 0; i < n; i++)
        snprintf(out + 4 * i, 5, "\\x%02X", (unsigned)(unsigned char)text[i]);
}

#define ESCAPE_ROOM 9 /* the longest piece is a control of two bytes, \xC2\x85, and a NUL */

/* The first character of text[0..n), n > 0, as one line can show it: \n \t \r \\, and \xHH for
   every other control or invalid byte. Returns how many bytes of text it stands for. */
static size_t escape_next(const char *text, size_t n, char piece[ESCAPE_ROOM]) {
    static const char plain[] = "\n\t\r\\", letters[] = "ntr\\";
    const char *found = text[0] != '\0' ? strchr(plain, text[0]) : NULL;
    size_t length;
    const uint32_t code = next_char(text, n, &length);
    if (found != NULL)
        snprintf(piece, ESCAPE_ROOM, "\\%c", letters[found - plain]);
    else if (code == UTF8_INVALID || code < 0x20 || (code >= 0x7F && code < 0xA0))
        hex_bytes(text, length, piece);
    else
        snprintf(piece, ESCAPE_ROOM, "%.*s", (int)length, text);
    return length;
}

#define NUMBER_ROOM 32

/* A number as every text shows it; NaN without the sign that it may have by chance. */
static const char *number_text(double v, char text[NUMBER_ROOM]) {
    snprintf(text, NUMBER_ROOM, "%.9g", isnan(v) ? fabs(v) : v);
    return text;
}

/* Index i of an axis as text: bytes, and what stands behind them. A position is its token and _14,
   and a star where its label ends with one (the subject of a trace). */
typedef struct Label {
    const char *text;
    size_t n;
    int token;
    char end[NUMBER_ROOM];
} Label;

static int axis_is(const Axis *axis, const char *name) {
    return strcmp(axis->name, name) == 0;
}

static Label label_of(const Table *t, const Axis *axis, size_t i) {
    const char *text = axis->labels != NULL ? axis->labels[i] : "";
    Label l = {.text = text, .n = strlen(text)};
    l.token = axis_is(axis, "pos") || axis_is(axis, "dest") || axis_is(axis, "src");
    l.token &= i < t->n_tokens;
    if (l.token) {
        const char *star = l.n > 0 && text[l.n - 1] == '*' ? "*" : "";
        l.text = t->tokens[i];
        l.n = t->token_bytes[i];
        snprintf(l.end, sizeof l.end, "_%lu%s", (unsigned long)i, star);
    } else if (axis->labels == NULL)
        snprintf(l.end, sizeof l.end, "%lu", (unsigned long)i);
    return l;
}

static size_t table_size(const Table *t) {
    size_t n = 1;
    for (int k = 0; k < t->rank; k++)
        n *= t->axis[k].size;
    return n;
}

/* The indices of value number i, row-major. */
static void table_index(const Table *t, size_t i, size_t index[6]) {
    for (int k = t->rank - 1; k >= 0; i /= t->axis[k--].size)
        index[k] = i % t->axis[k].size;
}

/* ---- 12.5 Arrays: .npy and .safetensors ------------------------------------------------------ */

static void put_little(FILE *f, uint64_t bits, int n) {
    unsigned char bytes[8];
    set_little(bytes, bits, n);
    fwrite(bytes, 1, (size_t)n, f);
}

/* n float32, as they are where the machine is little-endian: caches have gigabytes. */
static void put_floats(FILE *f, const float *values, size_t n) {
    if (!big_endian()) {
        fwrite(values, sizeof *values, n, f);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &values[i], 4);
        put_little(f, bits, 4);
    }
}

/* All values as float32. */
static void put_values(FILE *f, const Table *t) {
    for (size_t i = 0; i < table_size(t); i++) {
        const float value = isnan(t->values[i]) ? NAN : (float)t->values[i];
        put_floats(f, &value, 1);
    }
}

/* numpy's format, version 1: magic, version, the length of the head in two bytes; the head, a
   Python dictionary as {'descr': '<f4', 'fortran_order': False, 'shape': (12, 15), }, padded with
   spaces and a newline to a multiple of 64 bytes in all; then float32 in C order. */
static void write_npy(FILE *f, const Table *t) {
    char shape[6 * 24] = "";
    size_t used = 0;
    for (int k = 0; k < t->rank; k++)
        used += (size_t)snprintf(shape + used, sizeof shape - used, k ? ", %lu" : "%lu",
                                 (unsigned long)t->axis[k].size);
    used += strlen("{'descr': '<f4', 'fortran_order': False, 'shape': (), }") + (t->rank == 1);
    const int padding = 63 - (int)(used + 10) % 64; /* ten bytes before it, a newline behind it */
    fwrite("\x93NUMPY\x01\x00", 1, 8, f);
    put_little(f, used + (size_t)padding + 1, 2);
    fprintf(f, "{'descr': '<f4', 'fortran_order': False, 'shape': (%s%s), }%*s\n", shape,
            t->rank == 1 ? "," : "", padding, "");
    put_values(f, t);
}

/* The head of a .safetensors file: its length in eight bytes, then JSON that names each tensor's
   type, shape and place among the data, padded with spaces so that these are aligned. Call begin,
   entry for every tensor, end (the file must be able to seek); then write the data in the same
   order. *offset starts at 0. */
static void safetensors_begin(FILE *f) {
    put_little(f, 0, 8); /* known at the end */
    fputc('{', f);
}

static void safetensors_entry(FILE *f, const char *name, const char *type, int rank,
                              const size_t *shape, uint64_t *offset) {
    const uint64_t begin = *offset;
    uint64_t bytes = strcmp(type, "I64") == 0 ? 8 : 4;
    fprintf(f, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", begin ? "," : "", name, type);
    for (int k = 0; k < rank; bytes *= shape[k++])
        fprintf(f, k ? ",%lu" : "%lu", (unsigned long)shape[k]);
    *offset = begin + bytes;
    fprintf(f, "],\"data_offsets\":[%.0f,%.0f]}", (double)begin, (double)*offset);
}

static void safetensors_end(FILE *f) {
    long end;
    fputc('}', f);
    for (end = ftell(f); end > 0 && end % 8 != 0; end++)
        fputc(' ', f);
    fseek(f, 0, SEEK_SET);
    put_little(f, (uint64_t)end - 8, 8);
    fseek(f, 0, SEEK_END);
}

/* A table as one tensor of its name. */
static void write_safetensors(FILE *f, const Table *t) {
    size_t shape[6];
    uint64_t offset = 0;
    for (int k = 0; k < t->rank; k++)
        shape[k] = t->axis[k].size;
    safetensors_begin(f);
    safetensors_entry(f, t->name, "F32", t->rank, shape, &offset);
    safetensors_end(f);
    put_values(f, t);
}

/* ---- 12.6 Tables as text: .csv and .json ----------------------------------------------------- */

/* Text in CSV or JSON; each byte that is no UTF-8 becomes U+FFFD. */
static void put_utf8(FILE *f, const char *text, size_t n, int json) {
    for (size_t i = 0, length; i < n; i += length) {
        const uint32_t code = next_char(text + i, n - i, &length);
        if (code == UTF8_INVALID)
            fputs("\xEF\xBF\xBD", f);
        else if (json && code < 0x20)
            fprintf(f, "\\u%04x", (unsigned)code);
        else {
            if (code == '"' || (json && code == '\\'))
                fputc(json ? '\\' : '"', f);
            fwrite(text + i, 1, length, f);
        }
    }
}

/* RFC 4180: quoted where it holds a comma, a quote, a line break or a space. */
static void csv_field(FILE *f, const char *text, size_t n) {
    int quoted = 0;
    for (size_t i = 0; i < n && !quoted; i++)
        quoted = text[i] != '\0' && strchr(", \"\n\r", text[i]) != NULL;
    fputs(quoted ? "\"" : "", f);
    put_utf8(f, text, n, 0);
    fputs(quoted ? "\"" : "", f);
}

/* What a table's name is: a sweep's table has a direction. */
static const char *name_key(const Table *t) {
    return t->direction != NULL ? "sweep" : "table";
}

/* One line a value: name, an index for each axis (kinds and parts by name), the token at pos, else
   at dest, and the value. */
static void write_csv(FILE *f, const Table *t) {
    const size_t n = table_size(t);
    int words[6], token_axis = -1;
    char number[NUMBER_ROOM];
    fputs(name_key(t), f);
    for (int k = 0; k < t->rank; k++) {
        const Axis *axis = &t->axis[k];
        fprintf(f, ",%s", axis->name);
        words[k] = axis->labels != NULL && (axis_is(axis, "kind") || axis_is(axis, "part"));
        if (axis_is(axis, "pos") || axis_is(axis, "dest"))
            token_axis = k;
    }
    fputs(",token,value\n", f);
    for (size_t i = 0, index[6]; i < n; i++) {
        table_index(t, i, index);
        fputs(t->name, f);
        for (int k = 0; k < t->rank; k++) {
            fputc(',', f);
            if (words[k])
                csv_field(f, t->axis[k].labels[index[k]], strlen(t->axis[k].labels[index[k]]));
            else
                fprintf(f, "%lu", (unsigned long)index[k]);
        }
        fputc(',', f);
        const size_t at = token_axis >= 0 ? index[token_axis] : SIZE_MAX;
        if (at < t->n_tokens)
            csv_field(f, t->tokens[at], t->token_bytes[at]);
        fprintf(f, ",%s\n", number_text(t->values[i], number));
    }
}

/* JSON has neither NaN nor infinities. */
static void json_number(FILE *f, double v) {
    char text[NUMBER_ROOM];
    fputs(isfinite(v) ? number_text(v, text) : "null", f);
}

/* ,"key":value of JSON that is there already, or of text to be quoted; nothing where it is NULL. */
static void json_member(FILE *f, const char *key, const char *value, int quoted) {
    if (value == NULL)
        return;
    fprintf(f, quoted ? ",\n\"%s\":\"" : ",\n\"%s\":", key);
    if (quoted)
        put_utf8(f, value, strlen(value), 1);
    fputs(quoted ? "\"" : value, f);
}

static void json_axes(FILE *f, const Table *t) {
    fputs(",\n\"axes\":[", f);
    for (int k = 0; k < t->rank; k++)
        fprintf(f, "%s\"%s\"", k ? "," : "", t->axis[k].name);
    fputs("],\n\"shape\":[", f);
    for (int k = 0; k < t->rank; k++)
        fprintf(f, "%s%lu", k ? "," : "", (unsigned long)t->axis[k].size);
    fputs("],\n\"labels\":{", f);
    for (int k = 0; k < t->rank; k++) {
        fprintf(f, "%s\"%s\":[", k ? ",\n" : "", t->axis[k].name);
        for (size_t i = 0; i < t->axis[k].size; i++) {
            const Label l = label_of(t, &t->axis[k], i);
            fputs(i ? ",\"" : "\"", f);
            put_utf8(f, l.text, l.n, 1);
            fprintf(f, "%s\"", l.end);
        }
        fputc(']', f);
    }
    fputc('}', f);
}

static void write_json(FILE *f, const Table *t) {
    const size_t n = table_size(t);
    fprintf(f, "{\"command\":\"%s\"", t->command);
    json_member(f, name_key(t), t->name, 1);
    json_member(f, "metric", t->metric, 1);
    json_member(f, "direction", t->direction, 1);
    json_member(f, "normalized", t->normalized ? "true" : "false", 0);
    json_axes(f, t);
    json_member(f, "tokens", t->json_tokens, 0);
    json_member(f, "values", "[", 0);
    for (size_t i = 0; i < n; i++) {
        fputs(i ? "," : "", f);
        json_number(f, t->values[i]);
    }
    fputc(']', f);
    if (t->has_baseline) {
        json_member(f, "clean", "", 0);
        json_number(f, t->clean);
        json_member(f, "corrupted", "", 0);
        json_number(f, t->corrupted);
    }
    if (t->json_more != NULL)
        fprintf(f, ",\n%s", t->json_more);
    json_member(f, "settings", t->json_settings, 0);
    json_member(f, "model", t->model, 1);
    json_member(f, "stats", t->json_stats, 0);
    fputs("}\n", f);
}

/* ---- 12.7 One colour scale ----------------------------------------------------------------------
   For every picture, the terminal's too. RdBu as in the patching papers, blue positive, symmetric
   about 0 and its middle made pure white; for causal tracing Purples, Greens and Reds from a low
   value upwards, as in ROME. ColorBrewer's stops in equal steps from lo to hi, linear in between,
   rounded to 8 bits. To read a colour back, project it onto each segment between neighbouring stops
   and keep the nearest: segment i and place u in 0..1 there give lo + (hi - lo) (i + u) / (n - 1),
   wrong by less than 1/400 of hi - lo (RdBu) or 1/200 (the others, which begin pale). */

typedef struct Scale {
    double lo, hi; /* the values of the first and the last stop; lo < hi */
    int n;
    const uint32_t *stops; /* [n] 0xRRGGBB */
} Scale;

static const uint32_t RDBU[11] = {0x67001f, 0xb2182b, 0xd6604d, 0xf4a582, 0xfddbc7, 0xffffff,
                                  0xd1e5f0, 0x92c5de, 0x4393c3, 0x2166ac, 0x053061};
static const uint32_t SEQUENTIAL[3][9] = { /* Purples, Greens, Reds */
    {0xfcfbfd, 0xefedf5, 0xdadaeb, 0xbcbddc, 0x9e9ac8, 0x807dba, 0x6a51a3, 0x54278f, 0x3f007d},
    {0xf7fcf5, 0xe5f5e0, 0xc7e9c0, 0xa1d99b, 0x74c476, 0x41ab5d, 0x238b45, 0x006d2c, 0x00441b},
    {0xfff5f0, 0xfee0d2, 0xfcbba1, 0xfc9272, 0xfb6a4a, 0xef3b2c, 0xcb181d, 0xa50f15, 0x67000d}};

/* Where a value stands between lo, 0, and hi, 1. Halved first: hi - lo may overflow. */
static double scale_place(const Scale *s, double value) {
    return (value / 2 - s->lo / 2) / (s->hi / 2 - s->lo / 2);
}

/* The colour of a value; outside lo..hi that of the nearer end, for NaN grey. */
static void scale_colour(const Scale *s, double value, unsigned char rgb[3]) {
    const double x = fmin(fmax(scale_place(s, value), 0), 1) * (s->n - 1);
    const int i = (int)fmin(x, s->n - 2);
    for (int c = 0; c < 3; c++) { /* in double, then rounded: monotone within a segment */
        const double from = s->stops[i] >> (16 - 8 * c) & 255;
        const double to = s->stops[i + 1] >> (16 - 8 * c) & 255;
        rgb[c] = isnan(value) ? 0xbb : (unsigned char)(from + (to - from) * (x - i) + 0.5);
    }
}

/* The least and the largest finite value, bands included (NULL: none); where there is no such
   value, infinities the wrong way round. */
static double finite_range(const double *values, const double *band, size_t n, double *least) {
    double most = -HUGE_VAL;
    *least = HUGE_VAL;
    for (size_t i = 0; i < n; i++)
        if (isfinite(values[i])) {
            const double half = band != NULL && isfinite(band[i]) ? band[i] : 0;
            *least = fmin(*least, values[i] - half);
            most = fmax(most, values[i] + half);
        }
    return most;
}

static int own_scales(const Table *t) {
    return strcmp(t->command, "trace") == 0 && t->rank > 0 && axis_is(&t->axis[0], "kind");
}

/* A table's scale. RdBu: +-range, or where that is 0 as far as the largest finite |value| goes. Of
   one kind of a trace: from the corrupted run's mean (else the least value) up to range or the
   largest value. One unit wide where there is nothing to go by: no finite values, or all equal. */
static Scale scale_of(const Table *t, size_t kind) {
    const int own = own_scales(t);
    const char *name = own && t->axis[0].labels != NULL ? t->axis[0].labels[kind] : t->name;
    const size_t n = own ? table_size(t) / t->axis[0].size : table_size(t);
    double least, most = finite_range(t->values + (own ? kind * n : 0), NULL, n, &least);
    if (strcmp(t->command, "trace") != 0) {
        most = t->range > 0 ? t->range : fmax(most, -least);
        most = most > 1e-300 ? most : 1;
        return (Scale){-most, most, 11, RDBU};
    }
    Scale s = {.n = 9, .hi = t->range > 0 ? t->range : most};
    s.stops = SEQUENTIAL[strstr(name, "mlp") != NULL ? 1 : strstr(name, "attn") != NULL ? 2 : 0];
    s.lo = t->has_baseline && isfinite(t->corrupted) ? t->corrupted : isfinite(least) ? least : 0;
    if (!(s.hi / 2 - s.lo / 2 > 1e-12 * fabs(s.lo) + 1e-300))
        s.hi = s.lo + fmax(1, fabs(s.lo));
    return s;
}

/* ---- 12.8 Labels ----------------------------------------------------------------------------- */

/* How many columns a terminal gives a character: 2 to the East Asian and the pictures, 0 to what is
   drawn over its neighbour, 1 to the rest; -1 to what only directs or separates text, and could
   rearrange what stands beside it. The blocks of EastAsianWidth.txt that matter; of blocks that
   overlap the first counts. */
static int char_width(uint32_t code) {
    static const struct {
        uint32_t first, last;
        int width;
    } blocks[] = {
        {0x00AD, 0x00AD, -1},  {0x0000, 0x02FF, 1},   {0x0300, 0x036F, 0},   {0x0483, 0x0489, 0},
        {0x0591, 0x05BD, 0},   {0x064B, 0x065F, 0},   {0x0E34, 0x0E3A, 0},   {0x0E47, 0x0E4E, 0},
        {0x1100, 0x115F, 2},   {0x1AB0, 0x1AFF, 0},   {0x1DC0, 0x1DFF, 0},   {0x200B, 0x200F, -1},
        {0x2028, 0x202E, -1},  {0x2060, 0x206F, -1},  {0x20D0, 0x20FF, 0},   {0x302A, 0x302D, 0},
        {0x3099, 0x309A, 0},   {0x2E80, 0x303E, 2},   {0x3041, 0xA4CF, 2},   {0xAC00, 0xD7A3, 2},
        {0xF900, 0xFAFF, 2},   {0xFE00, 0xFE0F, 0},   {0xFE20, 0xFE2F, 0},   {0xFE30, 0xFE6F, 2},
        {0xFEFF, 0xFEFF, -1},  {0xFF01, 0xFF60, 2},   {0xFFE0, 0xFFE6, 2},   {0xFFF9, 0xFFFF, -1},
        {0x1F300, 0x1F64F, 2}, {0x1F680, 0x1F6FF, 2}, {0x1F900, 0x1F9FF, 2}, {0x20000, 0x3FFFD, 2},
    };
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++)
        if (code >= blocks[i].first && code <= blocks[i].last)
            return blocks[i].width;
    return 1;
}

enum { PIECE_ROOM = 4 * 4 + 1 }; /* a character of four bytes, all escaped */

/* The next piece of a text, escaped as `actpatch tokens` has it, and its columns on a terminal (-1:
   see char_width); returns the bytes it stands for. */
static size_t text_next(const char *text, size_t n, char piece[PIECE_ROOM], int *width) {
    size_t length;
    const uint32_t code = next_char(text, n, &length);
    escape_next(text, n, piece);
    *width = piece[0] == '\\' ? (int)strlen(piece) : char_width(code);
    return length;
}

/* Any bytes as text for XML and HTML: markup as numbers (double quotes stay: attributes have single
   ones), what directs text as \xHH. After `room` columns an ellipsis. Returns the columns, two for
   a character of three bytes from U+1100, an estimate; f NULL: does no more than that. */
static size_t put_text(FILE *f, const char *text, size_t n, size_t room) {
    char piece[PIECE_ROOM];
    size_t columns = 0, length;
    for (int width; n > 0 && columns < room; text += length, n -= length) {
        length = text_next(text, n, piece, &width);
        if (width < 0)
            hex_bytes(text, length, piece);
        const int ascii = (*piece & 0x80) == 0;
        columns += ascii ? strlen(piece) : strcmp(piece, "\xe1\x84\x80") < 0 ? 1 : 2;
        if (ascii && piece[1] == '\0' && strchr("<>&'", *piece) != NULL)
            snprintf(piece, sizeof piece, "&#%d;", *piece);
        if (f != NULL)
            fputs(piece, f);
    }
    if (f != NULL && n > 0)
        fputs("\xe2\x80\xa6", f);
    return columns + (n > 0);
}

static size_t put_words(FILE *f, const char *text) {
    return put_text(f, text, strlen(text), SIZE_MAX);
}

/* How papers call an axis, and begin a number of it that stands alone; how they call a kind. */
static const char *const NAMES[][3] = {
    {"layer", "Layer", "L"}, {"head", "Head", "H"}, {"example", "Example", "Example "},
    {"pos", "Position", ""}, {"dest", "Destination", ""}, {"src", "Source", ""},
    {"resid_pre", "Residual Stream"}, {"attn_out", "Attn Output"}, {"mlp_out", "MLP Output"},
    {"resid", "Residual Stream"}, {"attn", "Attn Output"}, {"mlp", "MLP Output"},
    {"out", "Output"}, {"q", "Query"}, {"k", "Key"}, {"v", "Value"}, {"pattern", "Pattern"}};

/* Column 1 or 2 of NAMES; `otherwise` for a name that is not there. */
static const char *paper_name(const char *name, int column, const char *otherwise) {
    for (size_t i = 0; i < sizeof NAMES / sizeof *NAMES; i++)
        if (strcmp(name, NAMES[i][0]) == 0)
            return NAMES[i][column];
    return otherwise;
}

/* Number i of an axis in a picture; returns its columns (f NULL: only that). In full, for tooltips
   and panels, `" to"_14` and "L9"; otherwise, beside an axis, "to_14" and "9", and long ones are
   cut. */
static size_t put_index(FILE *f, const Table *t, const Axis *axis, size_t i, int full) {
    Label l = label_of(t, axis, i);
    const int number = !l.token && strspn(l.text, "0123456789") == l.n;
    const char *around = full && l.token ? "\"" : "";
    if (axis_is(axis, "kind")) {
        l.text = paper_name(l.text, 1, l.text);
        l.n = strlen(l.text);
    }
    size_t columns = put_words(f, full && number ? paper_name(axis->name, 2, "") : around);
    columns += put_text(f, l.text, l.n, full ? SIZE_MAX : 24);
    columns += put_words(f, around);
    return columns + put_words(f, l.end);
}

/* The piece of a label from byte `at` of its text and end; what directs text is left out. */
static size_t label_next(const Label *l, size_t at, char piece[PIECE_ROOM], int *width) {
    const char *rest = at < l->n ? l->text + at : l->end + (at - l->n);
    const size_t length = text_next(rest, at < l->n ? l->n - at : strlen(rest), piece, width);
    if (*width < 0)
        *width = piece[0] = '\0';
    return length;
}

/* A label's columns on a terminal. */
static int label_width(const Label *l) {
    const size_t n = l->n + strlen(l->end);
    char piece[PIECE_ROOM];
    int total = 0, width;
    for (size_t at = 0; at < n; total += width)
        at += label_next(l, at, piece, &width);
    return total;
}

/* A label in exactly `width` columns: padded, or cut to its end, which has the position. */
static void put_label(FILE *f, const Label *l, int width, int to_the_right) {
    const size_t n = l->n + strlen(l->end);
    int excess = label_width(l) - width, cut = 0, w;
    const int pad = excess < 0 ? -excess : 0;
    char piece[PIECE_ROOM];
    fprintf(f, "%*s", to_the_right ? pad : 0, "");
    for (size_t at = 0; at < n;) {
        at += label_next(l, at, piece, &w);
        if (excess > 0 || (cut && w == 0)) { /* an accent goes with its letter */
            excess -= w;
            cut = 1;
            continue;
        }
        fprintf(f, "%*s%s", cut ? -excess : 0, "", piece); /* half of a wide character is a space */
        cut = excess = 0;
    }
    fprintf(f, "%*s", cut ? -excess : to_the_right ? 0 : pad, "");
}

/* ---- 12.9 Panels --------------------------------------------------------------------------------
   A picture is a table in panels, each a two-dimensional slice of it. Every axis of the table runs
   one way: from panel to panel (a facet), down the rows of a panel or along its columns; of several
   that run the same way the last is the fastest. Facets are the leading axes. */

enum { FACET, ROW, COL };

typedef struct Panels {
    Table t;
    int way[6], axes[3]; /* of each axis where it runs; how many run each way, */
    size_t size[3];      /* and the product of their sizes */
    int own;             /* each panel has a scale of its own: the kinds of a trace */
    Scale scale;         /* of the panel at hand */
    /* The value at hand: its number, its indices, its place each way. */
    size_t i, index[6], at[3];
} Panels;

/* The axes are shared out: count them. */
static void panels_begin(Panels *p) {
    p->size[FACET] = p->size[ROW] = p->size[COL] = 1;
    for (int k = 0; k < p->t.rank; k++) {
        p->axes[p->way[k]]++;
        p->size[p->way[k]] *= p->t.axis[k].size;
    }
    p->own = own_scales(&p->t);
    p->scale = scale_of(&p->t, 0);
}

/* Go to value number i; with the first of a panel to its scale. */
static void panels_go(Panels *p, size_t i) {
    p->i = i;
    table_index(&p->t, i, p->index);
    memset(p->at, 0, sizeof p->at);
    for (int k = 0; k < p->t.rank; k++)
        p->at[p->way[k]] = p->at[p->way[k]] * p->t.axis[k].size + p->index[k];
    if (p->own && p->at[ROW] + p->at[COL] == 0)
        p->scale = scale_of(&p->t, p->index[0]);
}

/* ---- 12.10 SVG ----------------------------------------------------------------------------------
   Each panel is a heat map, or a line plot with a line for each row. The figure is drawn in one
   pass over the values. Lengths are pixels.

       title                                                       TOP
       |          facet 0               facet 1                    HEAD
       |        +---------+---       +---------+---     colour     cells: w x h each
       |  row   |         |  gap     |         |        bar, or    of a panel: panel_w x panel_h
       |        +---------+---       +---------+---     legend
       |           column               column                     room[COL]
       |<-left->|
                   facet 2 ...                                     `across` panels side by side

   Only the first panels of a row have row labels, only the last of a column have column labels. */

enum { TOP = 32, HEAD = 22, BAR = 100 }; /* title, panel's title, least height of a colour bar */

typedef struct Figure {
    Panels p;
    double room[3];  /* what the longest label of each way takes */
    int lines;       /* line plots */
    size_t across;   /* panels side by side */
    double w, h, panel_w, panel_h, gap, left; /* cell; panel; between panels, left of the first */
    double width, height;
    char title[200];
    double x, y; /* the upper left corner of the cell at hand, or in a line plot of its column */
} Figure;

/* Examples and kinds become panels, and so do the heads of patterns [.., dest, src]. The last axis
   runs along the columns, but a head behind a position goes into the rows, "L9H6". */
static void figure_axes(Figure *g) {
    const Table *t = &g->p.t;
    const Axis *axis = t->axis;
    const int last = t->rank - 1, pattern = axis_is(&axis[last], "src");
    const int turn = last > 0 && axis_is(&axis[last], "head") && axis_is(&axis[last - 1], "pos");
    g->across = 1;
    for (int k = 0; k <= last; k++) {
        const int apart = axis_is(&axis[k], "example") || axis_is(&axis[k], "kind");
        const int way = k == last - turn ? COL : apart || (pattern && k < last - 1) ? FACET : ROW;
        g->across = way == FACET ? axis[k].size : g->across; /* as many as heads, not layers */
        g->p.way[k] = way;
        g->lines |= axis_is(&axis[k], "group"); /* a line for each group */
    }
    panels_begin(&g->p);
    g->lines |= g->p.axes[ROW] == 0;
    g->p.own &= !g->lines;
    for (int k = 0; k <= last; k++) {
        size_t longest = 0;
        for (size_t i = 0; i < axis[k].size; i++) {
            const size_t n = put_index(NULL, t, &axis[k], i, g->p.axes[g->p.way[k]] > 1);
            longest = n > longest ? n : longest;
        }
        g->room[g->p.way[k]] += 5.3 * (double)longest; /* of an average letter, generously */
    }
}

/* x within limits, in whole pixels, so that cells have sharp edges and nothing between them. */
static double within(double x, double least, double most) {
    return floor(fmin(fmax(x, least), most));
}

/* The lens's parts L0H0, L0H1, ..., remainder would show nothing as points of a line: they become
   layers by heads, and the remainder goes into the title. */
static void figure_heads(Figure *g) {
    Axis *axis = g->p.t.axis;
    const size_t n = axis[0].size - 1, used = strlen(g->title);
    unsigned long layer, head;
    if (g->p.t.rank == 1 && axis[0].labels != NULL && n > 0 &&
        sscanf(axis[0].labels[n - 1], "L%luH%lu", &layer, &head) == 2 &&
        (layer + 1) * (head + 1) == n) {
        snprintf(g->title + used, sizeof g->title - used, ", %.20s %.4g", axis[0].labels[n],
                 g->p.t.values[n]);
        g->p.t.rank = 2;
        axis[0] = (Axis){"layer", layer + 1, NULL};
        axis[1] = (Axis){"head", head + 1, NULL};
    }
}

/* Plan a picture. Cells are as large as some 1250 pixels allow, but never too small for a label;
   patterns are square. Panels that do not fit beside each other go into rows, equally long ones if
   possible. */
static void figure_plan(Figure *g) {
    const Table *t = &g->p.t;
    figure_heads(g);
    figure_axes(g);
    const int pattern = axis_is(&t->axis[t->rank - 1], "src");
    const double cols = (double)g->p.size[COL], rows = (double)g->p.size[ROW];
    if (g->lines && !(t->range > 0)) { /* one scale, from 0 a little beyond the values */
        double least, most = fmax(finite_range(t->values, t->band, table_size(t), &least), 0);
        least = fmin(least, 0);
        const double pad = most - least > 1e-300 ? most / 20 - least / 20 : 1;
        g->p.scale.lo = fmax(least - pad, -DBL_MAX);
        g->p.scale.hi = fmin(most + pad, DBL_MAX);
    }
    const double fit = within((pattern ? 180 : 88) / cols, 1, 16); /* not too narrow side by side */
    double across = (double)g->across;
    across = ceil(across / ceil(across / fit));           /* 8 where 5 fit: two rows of 4 */
    const double down = ceil((double)g->p.size[FACET] / across);
    g->across = (size_t)across;
    g->w = within(1250 / across / cols, 10, pattern ? 24 : g->lines ? 60 : 40);
    g->h = pattern ? g->w : within(400 / rows, 11, 26);
    g->panel_w = g->w * cols;
    g->panel_h = g->lines ? 240 : g->h * rows;
    g->gap = g->p.own ? 80 : 16;                            /* 80: with a colour bar in it */
    g->left = g->lines ? 60 : 32 + g->room[ROW];          /* 32: the axis's name */
    g->width = g->left + across * (g->panel_w + g->gap) - g->gap;
    g->width += g->lines ? 44 + g->room[ROW] : 74;        /* the legend or a colour bar */
    g->width = fmax(g->width, 600);                       /* the title */
    g->height = TOP + fmax(down * (HEAD + g->panel_h) + 32 + g->room[COL], HEAD + BAR + 20);
}

/* The labels of the value at hand on the axes of some ways: in full "L9 H6", else "L9H6". */
static void put_ways(FILE *f, const Panels *p, int way, int last, int full) {
    const char *between = "";
    for (; way <= last; way++)
        for (int k = 0; k < p->t.rank; k++)
            if (p->way[k] == way) {
                fputs(between, f);
                put_index(f, &p->t, &p->t.axis[k], p->index[k], full || p->axes[way] > 1);
                between = full ? " " : "";
            }
}

/* End a mark with `L9 H6 " to"_14: 0.2541`, which a browser shows above it. */
static void end_mark(FILE *f, const Panels *p, const char *tag) {
    const double v = p->t.values[p->i];
    fputs("<title>", f);
    put_ways(f, p, FACET, COL, 1);
    fprintf(f, ": %.4g</title></%s>\n", isnan(v) ? fabs(v) : v, tag); /* fabs: never "-nan" */
}

/* Round numbers (1, 2 or 5 times a power of ten apart) from lo at y + height to hi at y, each with
   a tick: to the right of x where side is 1, to the left where it is -1. */
static void draw_numbers(FILE *f, const Scale *s, double x, double y, double height, int side) {
    const double half = s->hi / 2 - s->lo / 2, ten = pow(10, floor(log10(half)));
    const double step = ten * (half / ten > 5 ? 5 : half / ten > 2 ? 2 : 0.5);
    const double end = fmin(s->hi + step * 1e-6, DBL_MAX);
    for (double value = ceil(s->lo / step - 1e-6) * step; value <= end; value += step) {
        const double at = y + height * (1 - scale_place(s, value));
        fprintf(f, "<path d='M%g %gh%d' stroke='currentColor'/><text x='%g' y='%g' "
                "text-anchor='%s'>%.4g</text>\n", x, at, 4 * side, x + 7 * side, at + 4,
                side < 0 ? "end" : "start", fabs(value) < step / 2 ? 0.0 : value);
    }
}

/* A colour bar in strips: a gradient would need a name, and a page holds many figures. */
static void draw_bar(FILE *f, const Scale *s, double x, double y, double height) {
    const Scale places = {0, 1, s->n, s->stops};
    unsigned char c[3];
    for (int i = 0; i < 80; i++) {
        scale_colour(&places, 1 - (i + 0.5) / 80, c);
        fprintf(f, "<path d='M%g %gh12v%gh-12z' fill='#%02x%02x%02x'/>\n", x, y + height * i / 80,
                height / 80, c[0], c[1], c[2]);
    }
    draw_numbers(f, s, x + 12, y, height, 1);
}

/* The label of a row, left of its first cell, or of a column, below its panel; there turned where
   the longest does not fit. With the first one the names of the axes. */
static void draw_label(FILE *f, const Figure *g, int way) {
    const int below = way == COL, turned = below && g->room[COL] + 2 > g->w;
    const double x = g->x, y = below ? g->y + g->panel_h : g->y;
    const char *comma = "";
    fprintf(f, "<text transform='translate(%g %g)%s' dy='.35em' text-anchor='%s'>",
            below ? x + g->w / 2 : x - 5, below ? y + (turned ? 5 : 10) : y + g->h / 2,
            turned ? " rotate(-90)" : "", below && !turned ? "middle" : "end");
    put_ways(f, &g->p, way, way, 0);
    fputs("</text>\n", f);
    if (g->p.at[way] > 0)
        return;
    fprintf(f, "<text transform='translate(%g %g)%s' text-anchor='middle' font-size='12'>",
            below ? x + g->panel_w / 2 : x - g->room[ROW] - 14,
            below ? y + (turned ? g->room[COL] : 12) + 20 : y + g->panel_h / 2,
            below ? "" : " rotate(-90)");
    for (int k = 0; k < g->p.t.rank; k++)
        if (g->p.way[k] == way) {
            fprintf(f, "%s%s", comma, paper_name(g->p.t.axis[k].name, 1, ""));
            comma = ", ";
        }
    fputs("</text>\n", f);
}

/* A cell, with its value where the widest fits; digits as the scale's end needs. */
static void draw_cell(FILE *f, const Figure *g) {
    const Scale *s = &g->p.scale;
    const double v = g->p.t.values[g->p.i], most = fmax(fabs(s->lo), fabs(s->hi));
    const int digits = most < 0.1 ? 3 : most < 10 ? 2 : most < 100 ? 1 : 0;
    const int width = 5 * snprintf(NULL, 0, "%.*f", digits, -most);
    unsigned char c[3];
    scale_colour(s, v, c);
    fprintf(f, "<rect x='%g' y='%g' width='%g' height='%g' fill='#%02x%02x%02x'>", g->x, g->y, g->w,
            g->h, c[0], c[1], c[2]);
    end_mark(f, &g->p, "rect");
    if (width < g->w && g->h >= 12 && fabs(v) <= most)
        fprintf(f, "<text x='%g' y='%g' fill='%s' font-size='9' text-anchor='middle' "
                "pointer-events='none'>%.*f</text>\n", g->x + g->w / 2, g->y + g->h / 2 + 3,
                3 * c[0] + 6 * c[1] + c[2] < 1400 ? "#fff" : "#222", digits,
                fabs(v) < 0.5 * pow(10, -digits) ? 0.0 : v); /* never "-0.00" */
}

static double figure_y(const Figure *g, double value) {
    return g->y + g->panel_h * (1 - scale_place(&g->p.scale, value));
}

/* The band around the line whose first point is at hand: there along its upper edge and back along
   the lower one; interrupted where the line or its band is not finite. */
static void draw_band(FILE *f, const Figure *g, const char *colour) {
    const double *v = g->p.t.values + g->p.i, *band = g->p.t.band + g->p.i;
    size_t end;
    for (size_t begin = 0; begin < g->p.size[COL]; begin = end + 1) {
        for (end = begin; end < g->p.size[COL] && isfinite(v[end]) && isfinite(band[end]);)
            end++;
        for (size_t n = end - begin, k = 0; k < 2 * n; k++) {
            const size_t at = k < n ? begin + k : end - 1 - (k - n);
            fprintf(f, "%s%g %g", k ? "L" : "<path d='M", g->x + g->w * ((double)at + 0.5),
                    figure_y(g, k < n ? v[at] + band[at] : v[at] - band[at]));
        }
        if (end > begin)
            fprintf(f, "z' fill='%s' fill-opacity='.15'/>\n", colour);
    }
}

/* A point, joined to the one before it, the last value of the table; infinities and NaN interrupt
   the line. With the first of a line its band and, where there are several lines, beside the panels
   its name. */
static void draw_point(FILE *f, const Figure *g) {
    static const char *const colours[] = {"#3579bd", "#c8443f", "#3f9b57", "#8d5fb0", "#d9822b",
                                          "#808080"}; /* a trace averages over six groups */
    const size_t *at = g->p.at;
    const double *values = g->p.t.values + g->p.i;
    const char *colour = colours[at[ROW] % 6];
    const double v = values[0], was = at[COL] ? values[-1] : (double)NAN;
    const double x = g->x + g->w / 2, key = g->x + g->panel_w + 14;
    const double line = g->y + 18 * (double)at[ROW];
    if (at[COL] == 0 && g->p.t.band != NULL)
        draw_band(f, g, colour);
    if (isfinite(v) && isfinite(was))
        fprintf(f, "<path d='M%g %gL%g %g' stroke='%s'/>\n", x - g->w, figure_y(g, was), x,
                figure_y(g, v), colour);
    if (isfinite(v)) {
        fprintf(f, "<circle cx='%g' cy='%g' r='2.5' fill='%s'>", x, figure_y(g, v), colour);
        end_mark(f, &g->p, "circle");
    }
    if (at[COL] == 0 && at[FACET] + 1 == g->across && g->p.axes[ROW] > 0) {
        fprintf(f, "<path d='M%g %gh16' stroke='%s'/><text x='%g' y='%g'>", key, line + 8, colour,
                key + 21, line + 12);
        put_ways(f, &g->p, ROW, ROW, 1);
        fputs("</text>\n", f);
    }
}

/* What a panel has before its first mark: title, frame, and numbers, zero line or colour bar. */
static void draw_panel(FILE *f, const Figure *g) {
    const Scale *s = &g->p.scale;
    const size_t column = g->p.at[FACET] % g->across;
    fprintf(f, "<text x='%g' y='%g' text-anchor='middle' font-size='12'>", g->x + g->panel_w / 2,
            g->y - 7);
    put_ways(f, &g->p, FACET, FACET, 1);
    fprintf(f, "</text>\n<path d='M%g %gh%gv%gh%gz' fill='none' stroke='currentColor' "
            "stroke-opacity='.6'/>\n", g->x - 0.5, g->y - 0.5, g->panel_w + 1, g->panel_h + 1,
            -g->panel_w - 1);
    if (g->lines && column == 0)
        draw_numbers(f, s, g->x, g->y, g->panel_h, -1);
    if (g->lines && s->lo < 0)
        fprintf(f, "<path d='M%g %gh%g' stroke='currentColor' stroke-opacity='.4'/>\n", g->x,
                figure_y(g, 0), g->panel_w);
    if (g->p.own || (!g->lines && g->p.at[FACET] + 1 == g->across))
        draw_bar(f, s, g->x + g->panel_w + 14, g->y, within(g->panel_h, BAR, 300));
}

/* Where the table has no cells, the title is all. Colours of text and paper are attributes of the
   outermost kind, so that a page's style may turn them dark. */
static void write_svg(FILE *f, const Table *t) {
    const int cells = t->rank > 0 && table_size(t) > 0;
    const char *way = t->direction == NULL ? "" : strcmp(t->direction, "noising") == 0
                      ? ", noising (corrupted into clean)" : ", denoising (clean into corrupted)";
    Figure g = {.p.t = *t, .width = 600, .height = TOP + 30};
    const size_t *at = g.p.at;
    snprintf(g.title, sizeof g.title, "%.60s%s%.30s%s%s", t->name, t->metric ? ", " : "",
             t->metric ? t->metric : "", way, t->normalized ? ", normalized" : "");
    if (cells)
        figure_plan(&g);
    fprintf(f, "<svg xmlns='http://www.w3.org/2000/svg' width='%g' height='%g' viewBox='0 0 %g %g' "
            "style='--w:%gpx' font-family='Helvetica,Arial,sans-serif' font-size='10' color='#222' "
            "fill='currentColor' shape-rendering='%s'>\n<path class='paper' d='M0 0h%gv%gH0z' "
            "fill='#fff'/>\n<text x='16' y='24' font-size='13'>", g.width, g.height, g.width,
            g.height, g.width, g.lines ? "auto" : "crispEdges", g.width, g.height);
    put_words(f, g.title);
    fputs(cells ? "</text>\n" : "</text>\n<text x='16' y='48'>no cells</text>\n", f);
    for (size_t i = 0; cells && i < table_size(&g.p.t); i++) {
        panels_go(&g.p, i);
        g.x = g.left + (double)(at[FACET] % g.across) * (g.panel_w + g.gap) +
              g.w * (double)at[COL];
        g.y = TOP + HEAD + (double)(at[FACET] / g.across) * (g.panel_h + HEAD) +
              (g.lines ? 0 : g.h * (double)at[ROW]);
        if (at[ROW] + at[COL] == 0)
            draw_panel(f, &g);
        (g.lines ? draw_point : draw_cell)(f, &g);
        if (!g.lines && at[COL] == 0 && at[FACET] % g.across == 0)
            draw_label(f, &g, ROW);
        if (at[ROW] == 0 && at[FACET] + g.across >= g.p.size[FACET])
            draw_label(f, &g, COL);
    }
    fputs("</svg>\n", f);
}

/* ---- 12.11 HTML: one page that holds all -------------------------------------------------------
   Everything can be read without script: settings, figures, each prompt's tokens, and each head's
   pattern as a thumbnail. The script adds choosing a prompt, enlarging a head, following a token.
   It takes tokens and weights from what stands in the page already, as text, so that there is no
   second copy of them and no second way of escaping. The policy in the page's head forbids every
   request. */

typedef struct Page {
    const char *title, *json_settings; /* the latter a JSON object; NULL: none */
    const char *const *prose;          /* [n_prose] paragraphs below the title */
    const Table *tables;               /* [n_tables], a figure each */
    const double *differences;         /* [n_examples, 2] logit differences: clean, corrupted */
    const char *const *prompts;        /* [n_examples] texts of the clean prompts, NULL: none */
    const float *attention;            /* [n_attention, n_heads, n_tokens, n_tokens], source last */
    const char *const *head_names;     /* [n_heads] "L9H6" */
    const char *const *tokens;         /* [n_attention, n_tokens] */
    const size_t *token_bytes;
    size_t n_prose, n_tables, n_examples, n_attention, n_heads, n_tokens;
    int has_corrupted;
} Page;

static const char PAGE_HEAD[] =
    "<!DOCTYPE html><html lang='en'><meta charset='utf-8'><link rel='icon' href='data:,'>\n"
    "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; img-src data:;\n"
    "  style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
    "<meta name='viewport' content='width=device-width'>\n"
    "<style>\n"
    ":root { color-scheme: light dark; --blue: 67 138 200; --red: 210 82 74; }\n"
    "body { font: 15px/1.5 system-ui, sans-serif; color: CanvasText; background: Canvas;\n"
    "  max-width: 1500px; margin: auto; padding: 1rem; }\n"
    "p { max-width: 50rem; } figure { margin: 2rem 0; overflow-x: auto; } .paper { fill: none; }\n"
    "figure svg { color: inherit; width: max(min(100%, var(--w)), .7 * var(--w)); height: auto; }\n"
    ".scroll { overflow: auto; max-height: 40rem; }\n"
    "pre, td { white-space: pre-wrap; overflow-wrap: anywhere; }\n"
    "table { border-collapse: collapse; font-variant-numeric: tabular-nums; }\n"
    "th, td, .tokens > *, .heads svg { border: 1px solid #8886; padding: 0 .5em; }\n"
    "td { text-align: right; } td:last-child { text-align: left; }\n"
    "button { font: inherit; color: inherit; background: none; border: 0; }\n"
    ".at, [aria-pressed=true] { outline: 2px solid; }\n"
    ".tokens { display: flex; flex-wrap: wrap; gap: 4px; padding: 0; list-style: none; }\n"
    ".tokens > *, .matrix th { white-space: pre; overflow: hidden; text-overflow: ellipsis;\n"
    "  max-width: 15rem; max-height: 11rem; }\n"
    /* Room for any number from the start: else tokens would move away below the mouse. */
    ".tokens small { display: block; min-width: 4ch; height: 1.5em; text-align: right; }\n"
    ".heads { display: grid; grid-template-columns: repeat(auto-fill, minmax(68px, 1fr));\n"
    "  gap: 4px; padding: 2px; }\n"
    ".heads button, .heads svg { padding: 0; } .heads path { stroke: rgb(var(--blue)); }\n"
    ".matrix { font-size: 12px; margin: 2px; }\n"
    ".matrix th { font-weight: normal; text-align: right; border: 0; padding: 2px; }\n"
    ".matrix td { min-width: 20px; height: 20px; padding: 0; }\n"
    ".matrix thead th { writing-mode: vertical-rl; rotate: 180deg; text-align: left; }\n"
    ".live .prompt > :not(.heads) { display: none; }\n"
    ".live .heads { max-height: 85vh; overflow: auto; }\n"
    "@media (min-width: 1100px) {\n"
    "  .live { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 2rem; } }\n"
    "</style>\n";

static const char PAGE_VIEWER[] =
    "<script type='module'>\n" /* which runs when the page has been read */
    "const find = (root, css) => [...root.querySelectorAll(css)];\n"
    "const add = (parent, tag, textContent, more) => // a token is text, never markup\n"
    "  Object.assign(parent.appendChild(document.createElement(tag)), {textContent, ...more});\n"
    "const [root, view, choose, title, line, said, matrix] = find(document,\n"
    "  '#attention, #view, #choose, #view h3, #view .tokens, #said, .matrix'); // in this order\n"
    "const prompts = find(root, '.prompt'), heads = prompts.map(p => find(p, 'button'));\n"
    "let shown = 0, pinned = -1, data, words, chips, rows;\n"
    "const weight = (d, s) => data[d * (d + 1) / 2 + s] / 1000; // what token d gives to token s\n"
    "const colour = (hue, w) => `background: rgb(var(${hue}) / ${w})`;\n"
    "const name = i => `\\u201c${words[i]}\\u201d_${i}`;\n"
    "const largest = pairs => pairs.filter(([w]) => w >= .01).sort((a, b) => b[0] - a[0])\n"
    "  .slice(0, 4).map(([w, i]) => `${name(i)} ${w.toFixed(3)}`).join(', ') || 'nothing';\n"
    "// Show what token i attends to, in blue, and what attends to it, in red.\n"
    "const follow = i => {\n"
    "  const pairs = words.map((_, j) => [j > i ? weight(j, i) : weight(i, j), j]);\n"
    "  for (const [w, j] of pairs) {\n"
    "    chips[j].style = colour(j > i ? '--red' : '--blue', .7 * w); // its text stays legible\n"
    "    chips[j].className = rows[j].className = j === i ? 'at' : '';\n"
    "    chips[j].ariaPressed = j === pinned;\n"
    "    chips[j].lastChild.textContent = w < .005 ? '' : w.toFixed(2);\n"
    "  }\n"
    "  said.textContent = `${name(i)} attends to ${largest(pairs.slice(0, i + 1))}. ` +\n"
    "    `Attending to it: ${largest(pairs.slice(i))}.`;\n"
    "};\n"
    "// Enlarge the head: its tokens, and its pattern with destinations down and sources across.\n"
    "const show = () => {\n"
    "  const chosen = choose.selectedIndex, button = heads[chosen][shown];\n"
    "  data = button.dataset.weights.split(' ');\n"
    "  words = find(prompts[chosen], 'li').map(item => item.textContent);\n"
    "  prompts.forEach((prompt, i) => { prompt.hidden = i !== chosen; });\n"
    "  heads[chosen].forEach(other => { other.ariaPressed = other === button; });\n"
    "  title.textContent = button.textContent;\n"
    "  line.textContent = matrix.textContent = '';\n"
    "  chips = words.map(word => add(line, 'button', word));\n"
    "  chips.forEach(chip => add(chip, 'small'));\n"
    "  const top = add(add(matrix, 'thead'), 'tr');\n"
    "  ['', ...words].forEach((word, i) => add(top, 'th', i ? `${word}_${i - 1}` : ''));\n"
    "  rows = words.map((word, d) => {\n"
    "    const row = add(matrix, 'tr');\n"
    "    add(row, 'th', `${word}_${d}`);\n"
    "    for (let s = 0; s <= d; s++)\n"
    "      add(row, 'td', '', {style: colour('--blue', weight(d, s)),\n"
    "        title: `${name(d)} to ${name(s)}: ${weight(d, s).toFixed(3)}`});\n"
    "    return row;\n"
    "  });\n"
    "  follow(pinned < 0 ? words.length - 1 : pinned);\n"
    "};\n"
    "// Pointing at a token or moving to it follows it; a click keeps it, another lets it go.\n"
    "const point = ({target, type}) => {\n"
    "  const at = [...chips, ...rows].indexOf(target.closest('button, tr')) % words.length;\n"
    "  if (at < 0 || pinned >= 0 && type !== 'click') return;\n"
    "  if (type === 'click') pinned = pinned === at ? -1 : at;\n"
    "  follow(at);\n"
    "};\n"
    "for (const type of ['pointerover', 'focusin', 'click']) view.addEventListener(type, point);\n"
    "heads.forEach(list => list.forEach((button, i) => Object.assign(button, {disabled: false,\n"
    "  onclick() { shown = i; show(); view.scrollIntoView({block: 'nearest'}); }})));\n"
    "prompts.forEach((_, i) => add(choose, 'option', `Example ${i}`));\n"
    "choose.onchange = () => { pinned = -1; show(); };\n"
    "root.className = 'live';\n"
    "view.hidden = false;\n"
    "show();\n"
    "</script>\n"
    "<h2>Attention</h2><div id='attention'><div id='view' hidden>\n"
    "<label>Prompt <select id='choose'></select></label><h3></h3><div class='tokens'></div>\n"
    "<p id='said' aria-live='polite'></p><div class='scroll'><table class='matrix'></table></div>\n"
    "<p>Point at a token, or move to it with Tab: blue is what it attends to, red what attends to\n"
    "it; a click keeps it. The rows of the pattern are destinations.</p></div><div>\n";

static void put_element(FILE *f, const char *tag, const char *words) {
    fprintf(f, "<%s>", tag);
    put_words(f, words);
    fprintf(f, "</%s>\n", tag);
}

/* What every prompt gave unpatched, and the means. */
static void page_differences(FILE *f, const Page *page) {
    const size_t n = page->n_examples, runs = page->has_corrupted ? 2 : 1;
    double sum[2] = {0, 0};
    fprintf(f, "<h2>Logit differences</h2><div class='scroll' tabindex='0'><table>\n"
               "<tr><th>Example</th><th>clean</th>%s%s</tr>\n",
            runs > 1 ? "<th>corrupted</th>" : "", page->prompts ? "<th>prompt</th>" : "");
    for (size_t i = 0; i <= n; i++) {
        fprintf(f, i < n ? "<tr><td>%lu</td>" : "<tr><td>mean</td>", (unsigned long)i);
        for (size_t k = 0; k < runs; k++) {
            const double value = i < n ? page->differences[2 * i + k] : sum[k] / (double)n;
            sum[k] += value;
            fprintf(f, "<td>%.4f</td>", isnan(value) ? fabs(value) : value);
        }
        if (page->prompts != NULL)
            put_element(f, "td", i < n ? page->prompts[i] : "");
        fputs("</tr>\n", f);
    }
    fputs("</table></div>\n", f);
}

/* A head: its weights in thousandths as the script reads them; above its name a thumbnail, which is
   a path for each of 8 strengths. GPT-2 is causal: sources beyond their destination have no
   weight, and are neither written nor drawn. */
static void page_head(FILE *f, const float *pattern, unsigned long n, const char *name) {
    fputs("<button disabled data-weights='", f);
    for (unsigned long d = 0; d < n; d++)
        for (unsigned long s = 0; s <= d; s++)
            fprintf(f, "%.0f ", 1000 * (double)pattern[d * n + s]);
    fprintf(f, "'><svg viewBox='0 -.5 %lu %lu'>", n, n);
    for (int level = 1; level <= 8; level++) {
        fprintf(f, "<path opacity='%g' d='", level / 8.0);
        for (unsigned long d = 0; d < n; d++)
            for (unsigned long s = 0; s <= d; s++)
                if (floor(8 * (double)pattern[d * n + s] + 0.5) == level)
                    fprintf(f, "M%lu %luh1", s, d);
        fputs("'/>", f);
    }
    fputs("</svg>", f);
    put_words(f, name);
    fputs("</button>\n", f);
}

/* The viewer, empty until the script fills it, and for each prompt what it is filled from. */
static void page_attention(FILE *f, const Page *page) {
    const size_t n = page->n_tokens;
    fputs(PAGE_VIEWER, f);
    for (size_t p = 0; p < page->n_attention; p++) {
        fprintf(f, "<section class='prompt'><h3>Example %lu</h3><ol class='tokens'>\n",
                (unsigned long)p);
        for (size_t i = p * n; i < (p + 1) * n; i++) {
            fputs("<li>", f);
            put_text(f, page->tokens[i], page->token_bytes[i], SIZE_MAX);
            fputs("</li>\n", f);
        }
        fputs("</ol><div class='heads'>\n", f);
        for (size_t i = 0; i < page->n_heads; i++)
            page_head(f, page->attention + (p * page->n_heads + i) * n * n, (unsigned long)n,
                      page->head_names[i]);
        fputs("</div></section>\n", f);
    }
    fputs("</div></div>\n", f);
}

static void write_html(FILE *f, const Page *page) {
    fputs(PAGE_HEAD, f);
    put_element(f, "title", page->title);
    put_element(f, "h1", page->title);
    for (size_t i = 0; i < page->n_prose; i++)
        put_element(f, "p", page->prose[i]);
    if (page->n_examples > 0)
        page_differences(f, page);
    for (size_t i = 0; i < page->n_tables; i++) {
        fputs("<figure>\n", f);
        write_svg(f, &page->tables[i]);
        fputs("</figure>\n", f);
    }
    if (page->n_attention > 0 && page->n_heads > 0 && page->n_tokens > 0)
        page_attention(f, page);
    if (page->json_settings != NULL) {
        put_element(f, "h2", "Settings");
        put_element(f, "pre", page->json_settings);
    }
    fputs("</html>\n", f);
}

/* The tables of one call, for FORMATS. */
static void write_html_tables(FILE *f, const Table *tables, size_t n) {
    write_html(f, &(Page){.title = "actpatch", .tables = tables, .n_tables = n,
                          .json_settings = n > 0 ? tables[0].json_settings : NULL});
}

/* ---- 12.12 The terminal: numbers in rows and columns, on colours where it has them ---------- */

/* Where a table is shown. */
typedef struct Screen {
    int columns; /* that fit; 0: no terminal, so a row is one line and numbers have all digits */
    int colours; /* 0: none, 256 (the palette) or 1 << 24 */
} Screen;

/* Panels under each other. One axis makes a column under the word "value". */
typedef struct Grid {
    Panels p;
    Screen screen;
    Axis axis[3];   /* of the rows and of the columns of a panel, by way */
    size_t step[3]; /* from row to row, from column to column, in values */
    int decimals;   /* of the cells' numbers; -1: all digits; -2: colours alone */
    int label_width, cell_width;
    char number[NUMBER_ROOM]; /* of the cell at hand */
} Grid;

/* Take the last two axes, positions as rows, where tokens can be read. */
static void grid_axes(Grid *g) {
    static char value[] = "value", *labels[] = {value};
    const Axis *last = &g->p.t.axis[g->p.t.rank - 1];
    const int turned = g->p.t.rank == 1 || axis_is(last, "pos") || axis_is(last, "dest");
    const int way = turned ? ROW : COL, other = turned ? COL : ROW;
    g->axis[way] = *last;
    g->axis[other] = g->p.t.rank > 1 ? last[-1] : (Axis){value, 1, labels};
    g->step[way] = 1;
    g->step[other] = last->size;
    for (int k = 0; k < g->p.t.rank; k++)
        g->p.way[k] = k == g->p.t.rank - 1 ? way : k == g->p.t.rank - 2 ? other : FACET;
    panels_begin(&g->p);
}

static const char *cell_text(Grid *g, double v) {
    if (g->decimals == -2)
        return "";
    if (g->decimals < 0 || !isfinite(v))
        return number_text(v, g->number);
    snprintf(g->number, NUMBER_ROOM, "%.*f", g->decimals, v);
    return g->number;
}

/* The widest number at these decimals, and a space where colours do not part the cells: a trace's
   are pale side by side, and have no signs. */
static int widest_cell(Grid *g) {
    const size_t n = table_size(&g->p.t);
    int width = 0;
    for (size_t i = 0; i < n; i++) {
        const int w = (int)strlen(cell_text(g, g->p.t.values[i]));
        width = w > width ? w : width;
    }
    return width + (g->screen.colours == 0 || g->p.own);
}

static int widest_label(const Table *t, const Axis *axis) {
    int width = 0;
    for (size_t i = 0; i < axis->size; i++) {
        const Label l = label_of(t, axis, i);
        const int w = label_width(&l);
        width = w > width ? w : width;
    }
    return width + 1;
}

/* Choose how cells look: three digits, or two, if a row then fits; else colour alone; and where
   that does not fit either, a row goes over several blocks of columns. */
static void grid_layout(Grid *g) {
    const int columns = (int)(g->p.size[COL] < 10000 ? g->p.size[COL] : 10000);
    const int most = g->p.scale.hi < 10 ? 2 : g->p.scale.hi < 100 ? 1 : 0;
    const int head = widest_label(&g->p.t, &g->axis[COL]);
    g->label_width = widest_label(&g->p.t, &g->axis[ROW]);
    g->decimals = -1;
    if (g->screen.columns == 0) {
        g->cell_width = widest_cell(g);
        g->cell_width = head > g->cell_width ? head : g->cell_width;
        return;
    }
    int room = g->screen.columns / 3 < 24 ? g->screen.columns / 3 : 24;
    g->label_width = g->label_width < room ? g->label_width : room;
    room = g->screen.columns - g->label_width;
    for (g->decimals = most; g->decimals >= (most > 0); g->decimals--)
        if ((g->cell_width = widest_cell(g)) * columns <= room)
            return;
    g->decimals = g->screen.colours && columns <= room ? -2 : most;
    g->cell_width = g->decimals == -2 ? (room / columns < 3 ? room / columns : 3) : widest_cell(g);
}

/* One cell, on its colour where there are colours, in black or white, whichever reads better. */
static void put_cell(FILE *f, Grid *g, double v) {
    unsigned char c[3];
    if (g->screen.colours == 0 || isnan(v)) {
        fprintf(f, "%*s", g->cell_width, cell_text(g, v));
        return;
    }
    scale_colour(&g->p.scale, v, c);
    if (g->screen.colours > 256)
        fprintf(f, "\033[48;2;%d;%d;%d", c[0], c[1], c[2]);
    else {
        int cube = 0;
        for (int k = 0; k < 3; k++) /* the cube's levels are 0, 95, 135, 175, 215, 255 */
            cube = 6 * cube + (c[k] < 48 ? 0 : c[k] < 115 ? 1 : (c[k] - 35) / 40);
        fprintf(f, "\033[48;5;%d", 16 + cube);
    }
    fprintf(f, ";38;5;%dm%*s\033[0m", 299 * c[0] + 587 * c[1] + 114 * c[2] < 128000 ? 231 : 16,
            g->cell_width, cell_text(g, v));
}

/* The panel at hand, in blocks of as many columns as fit. */
static void put_panel(FILE *f, Grid *g) {
    const double *values = g->p.t.values + g->p.i;
    const int room = g->screen.columns - g->label_width, space = g->cell_width > 2;
    const size_t columns = g->p.size[COL];
    size_t block = columns;
    if (g->screen.columns > 0)
        block = room < g->cell_width ? 1 : (size_t)(room / g->cell_width);
    for (size_t first = 0, end; first < columns; first = end) {
        end = columns - first < block ? columns : first + block;
        fprintf(f, "%*s", g->label_width, "");
        for (size_t c = first; c < end; c++) {
            const Label l = label_of(&g->p.t, &g->axis[COL], c);
            fputs(space ? " " : "", f);
            put_label(f, &l, g->cell_width - space, 1);
        }
        fputc('\n', f);
        for (size_t r = 0; r < g->p.size[ROW]; r++) {
            const Label l = label_of(&g->p.t, &g->axis[ROW], r);
            put_label(f, &l, g->label_width - 1, 0);
            fputc(' ', f);
            for (size_t c = first; c < end; c++)
                put_cell(f, g, values[r * g->step[ROW] + c * g->step[COL]]);
            fputc('\n', f);
        }
    }
}

/* A table on a screen; after panels of colours alone what the colours mean. */
static void write_screen(FILE *f, const Table *t, Screen screen) {
    const size_t n = t->rank > 0 ? table_size(t) : 0;
    Grid g = {.p.t = *t, .screen = screen};
    if (n == 0) {
        fprintf(f, "%s: no cells\n", t->name);
        return;
    }
    grid_axes(&g);
    grid_layout(&g);
    fprintf(f, "%s (%s by %s)%s%s%s%s%s", t->name, g.axis[ROW].name, g.axis[COL].name,
            t->metric ? ": " : "", t->metric ? t->metric : "", t->normalized ? ", normalized" : "",
            t->direction ? ", " : "", t->direction ? t->direction : "");
    if (t->has_baseline)
        fprintf(f, isnan(t->corrupted) ? "\nunpatched: clean %.4g"
                                       : "\nunpatched: clean %.4g, corrupted %.4g",
                t->clean, t->corrupted);
    fputc('\n', f);
    const size_t panel = g.p.size[ROW] * g.p.size[COL];
    for (size_t i = 0; i < n; i += panel) {
        panels_go(&g.p, i);
        for (int k = 0; k < t->rank - 2; k++) {
            const Label l = label_of(t, &t->axis[k], g.p.index[k]);
            fprintf(f, "%s%s ", k ? ", " : "", t->axis[k].name);
            put_label(f, &l, label_width(&l), 0);
            fputs(k == t->rank - 3 ? "\n" : "", f);
        }
        put_panel(f, &g);
        if (g.decimals == -2 && (g.p.own || i + panel == n))
            fprintf(f, g.p.own ? "pale %.4g, dark %.4g\n" : "red %.4g, white 0, blue %.4g\n",
                    g.p.scale.lo, g.p.scale.hi);
    }
}

/* ---- 12.13 Formats --------------------------------------------------------------------------- */

/* A format has one of the two writers; write_all takes all tables of a call at once. */
typedef struct Format {
    const char *ending;
    void (*write)(FILE *f, const Table *t);
    void (*write_all)(FILE *f, const Table *tables, size_t n);
    int names_model; /* it holds the model's SHA-256, which takes a reading of the whole file */
} Format;

/* Of every command that has none of its own. */
static const Format FORMATS[] = {
    {".npy", write_npy, NULL, 0},
    {".safetensors", write_safetensors, NULL, 0},
    {".csv", write_csv, NULL, 0},
    {".json", write_json, NULL, 1},
    {".svg", write_svg, NULL, 0},
    {".html", NULL, write_html_tables, 1},
    {NULL, NULL, NULL, 0},
};

/* The format in a list that a path's ending names ("-": CSV); NULL where there is none. */
static const Format *format_of(const char *path, const Format *list) {
    const char *dot = strrchr(path, '.');
    const char *ending = strcmp(path, "-") == 0 ? ".csv" : dot != NULL ? dot : "";
    while (list->ending != NULL && strcmp(list->ending, ending) != 0)
        list++;
    return list->ending != NULL ? list : NULL;
}

/* All tables of a call into one of its paths; where the format holds one, several go from FILE.EXT
   into FILE-NAME.EXT each. */
static patch_status write_tables(const char *path, const Format *formats, const Table *tables,
                                 size_t n, patch_error *e) {
    const Format *format = format_of(path, formats);
    const char *dot = strrchr(path, '.');
    const int together = format->write_all != NULL;
    patch_status s = PATCH_OK;
    for (size_t i = 0; i < (together ? 1 : n) && s == PATCH_OK; i++) {
        const size_t room = strlen(path) + strlen(together ? "" : tables[i].name) + 2;
        char *name = take(&HEAP, room, 1);
        OutFile o;
        if (name == NULL)
            return no_memory(e, path, room);
        if (together || n == 1 || strcmp(path, "-") == 0)
            snprintf(name, room, "%s", path);
        else
            snprintf(name, room, "%.*s-%s%s", (int)(dot - path), path, tables[i].name, dot);
        if ((s = out_open(&o, name, e)) == PATCH_OK) {
            if (together)
                format->write_all(o.f, tables, n);
            else
                format->write(o.f, &tables[i]);
            s = out_close(&o, e);
        }
        give(&HEAP, name);
    }
    return s;
}

#endif /* writers */

/* ==== 13. Command line ===========================================================================
   Left out where PATCH_NO_MAIN is defined. A new command is a function, its line in COMMANDS, and
   lines in OPTIONS for what it alone accepts. Nothing here is global: one App is one call. An error
   ends the program where it is found, so that no function below has a path for it. */

#ifndef PATCH_NO_MAIN

#if HAS_POSIX
#include <sys/ioctl.h>
#endif

#if defined(__GNUC__)
#define NORETURN __attribute__((noreturn))
#else
#define NORETURN
#endif

#ifndef ACTPATCH_PREFIX
#define ACTPATCH_PREFIX "/usr/local" /* of an installation; the Makefile knows better */
#endif

/* ---- 13.1 One call: what it was asked, memory, messages ------------------------------------- */

typedef struct App App;

/* A line of COMMANDS. */
typedef struct Command {
    const char *name, *operands, *summary;
    const char *text;      /* the rest of its help */
    const char *accepts;   /* groups of OPTIONS, a letter each */
    size_t least, most;    /* operands */
    const char *needs;     /* an option with a value that must be there; NULL: none */
    const Format *formats; /* that -o takes; NULL: a file of any name but - */
    int one_file;          /* it makes exactly one file */
    void (*run)(App *app);
} Command;

/* The values of an option that may be repeated, or the operands. */
typedef struct List {
    const char **items; /* room for every argument of the call */
    size_t n;
} List;

enum { MAX_SWEEPS = 32, PATH_ROOM = 4096, PLACE_ROOM = 128 /* as patch_error.where */ };

/* One call of the program. The fields with an option's name are what OPTIONS stores. */
struct App {
    const char *program; /* argv[0] */
    const Command *command;
    List operands, outputs, answers;
    patch_options load;
    const char *model_path, *sweeps, *names, *text, *heads, *to, *site, *groups, *positions, *kind,
        *shard;
    int metric, color, side, by; /* indices into METRICS, COLORS, SIDES, WAYS */
    int freeze_mlps, keep, window, samples, severed, bos, seed, k;
    int no_processing, no_bos, noising, normalize, per_prompt, brute, stats, verify, help;
    double noise, range;
    patch_model *model; /* opened before the command's function runs */
    size_t L, H;        /* its layers and heads */
    Pool pool;          /* lives as long as the call: no function below frees anything */
    patch_error e;      /* what every call of the library fills */
    OutFile out;        /* the file that is being written */
    struct Part *part;  /* the part file that is open */
};

/* One line on stderr: what, where, what to do; e->message has the first and the last as "what; what
   to do". Control bytes of file names and prompts are masked, so that it stays one line. */
static void print_message(const char *kind, const patch_error *e) {
    char line[sizeof e->where + sizeof e->message + 32];
    const char *remedy = NULL;
    for (const char *s = strstr(e->message, "; "); s != NULL; s = strstr(s + 1, "; "))
        remedy = s;
    const size_t length = remedy != NULL ? (size_t)(remedy - e->message) : strlen(e->message);
    snprintf(line, sizeof line, "actpatch: %s%.*s, %s%s%s", kind, (int)length, e->message, e->where,
             remedy != NULL ? ", " : "", remedy != NULL ? remedy + 2 : "");
    for (char *p = line; *p != '\0'; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7F)
            *p = '?';
    fprintf(stderr, "%s\n", line);
}

static void part_close(struct Part *p, int finished);

/* End with the error in app->e. What was finished stays, a part file included; the file that is
   being written goes. */
static NORETURN void give_up(App *app) {
    print_message("", &app->e);
    out_drop(&app->out);
    if (app->part != NULL)
        part_close(app->part, 0);
    exit(app->e.code == PATCH_E_USAGE ? 2 : 1);
}

/* For the library's calls: what fails ends the program. */
static void must(App *app, patch_status status) {
    if (status != PATCH_OK)
        give_up(app);
}

/* End with an error of the command line's own. */
static NORETURN void stop(App *app, patch_status code, const char *where, const char *format, ...) {
    va_list values;

    fail(&app->e, code, where, "");
    va_start(values, format);
    vsnprintf(app->e.message, sizeof app->e.message, format, values);
    va_end(values);
    give_up(app);
}

/* n zeroed elements. */
static void *room(App *app, size_t n, size_t size) {
    void *p = pool_take(&app->pool, n, size);

    if (p == NULL)
        must(app, no_memory(&app->e, app->command->name, app->pool.refused));
    return p;
}

#define ROOM(type, n) ((type *)room(app, n, sizeof(type)))

/* A text that grows. */
typedef struct Text {
    char *bytes; /* terminated once something was added */
    size_t length, room;
} Text;

static void add_values(App *app, Text *t, const char *format, va_list values) {
    va_list again;

    va_copy(again, values);
    const size_t n = (size_t)vsnprintf(NULL, 0, format, again);
    va_end(again);
    if (t->length + n + 1 > t->room) {
        char *larger = ROOM(char, t->room = 2 * (t->length + n + 1));
        if (t->length > 0)
            memcpy(larger, t->bytes, t->length);
        pool_give(&app->pool, t->bytes);
        t->bytes = larger;
    }
    vsnprintf(t->bytes + t->length, n + 1, format, values);
    t->length += n;
}

static void add(App *app, Text *t, const char *format, ...) {
    va_list values;

    va_start(values, format);
    add_values(app, t, format, values);
    va_end(values);
}

/* Like sprintf, into memory of the call's. */
static char *text_of(App *app, const char *format, ...) {
    Text t = {0};
    va_list values;

    va_start(values, format);
    add_values(app, &t, format, values);
    va_end(values);
    return t.bytes;
}

/* Whether file descriptor 1 or 2 is a terminal. */
static int is_terminal(int descriptor) {
#if HAS_POSIX
    return isatty(descriptor);
#else
    return descriptor < 0;
#endif
}

/* What standard output can show. --color goes before NO_COLOR (https://no-color.org), and that
   before what COLORTERM and TERM say. */
static Screen screen_of(const App *app) {
    const char *term = getenv("TERM"), *more = getenv("COLORTERM"), *no = getenv("NO_COLOR");
    const char *columns = getenv("COLUMNS");
    const int always = app->color == 1;
    Screen screen = {0, 0};

    if (!is_terminal(1) && !always)
        return screen;
    screen.columns = columns != NULL ? atoi(columns) : 0;
#if HAS_POSIX && defined(TIOCGWINSZ)
    struct winsize size;
    if (ioctl(1, TIOCGWINSZ, &size) == 0 && size.ws_col > 0)
        screen.columns = size.ws_col;
#endif
    screen.columns = screen.columns < 1 || screen.columns > 10000 ? 80 : screen.columns;
    if (!always && (app->color == 2 || (no != NULL && *no != '\0')))
        return screen;
    term = term != NULL ? term : "";
    if (more != NULL && (strcmp(more, "truecolor") == 0 || strcmp(more, "24bit") == 0))
        screen.colours = 1 << 24;
    else if (always || strstr(term, "256") != NULL || strncmp(term, "xterm", 5) == 0 ||
             strncmp(term, "screen", 6) == 0 || strncmp(term, "tmux", 4) == 0)
        screen.colours = 256;
    return screen;
}

/* ---- 13.2 Options --------------------------------------------------------------------------- */

/* What follows an option, and how its field in App holds that. */
typedef enum Kind {
    TAKES_NOTHING, /* stores `least` in an int */
    TAKES_TEXT,
    TAKES_WORDS,   /* parted by commas: repeated, they are joined */
    TAKES_LIST,    /* texts: it may be repeated */
    TAKES_COUNT,   /* least..most, into an int */
    TAKES_BYTES,   /* with K, M or G, into a size_t */
    TAKES_NUMBER,  /* above 0, into a double */
    TAKES_WORD     /* one of `words`: its index, into an int */
} Kind;

/* A command has an option if they share a letter; "": every command. M loads a model, T reads
   texts, O writes files, E measures, S patches, C shows colours, B has a value for each example, R
   is random; the small letters are of one command each. */
typedef struct Option {
    const char *name, *value;
    const char *groups;
    Kind kind;
    size_t field; /* where in App */
    int least, most;
    const char *const *words;
    const char *help;
} Option;

static const char *const METRICS[] = {"logit_diff", "logit", "prob", "logprob", "kl", "rank", NULL};
static const char *const COLORS[] = {"auto", "always", "never", NULL};
static const char *const SIDES[] = {"clean", "corrupted", NULL};
static const char *const WAYS[] = {"zero", "mean", "resample", "noise", NULL}; /* as patch_by */

#define FLAG(name, groups, field, stores, help)                                                    \
    {name, NULL, groups, TAKES_NOTHING, offsetof(App, field), stores, 0, NULL, help}
#define VALUE(name, value, groups, kind, field, help)                                              \
    {name, value, groups, kind, offsetof(App, field), 0, 0, NULL, help}
#define COUNT(name, value, groups, field, least, most, help)                                       \
    {name, value, groups, TAKES_COUNT, offsetof(App, field), least, most, NULL, help}
#define WORD(name, value, groups, field, words, help)                                              \
    {name, value, groups, TAKES_WORD, offsetof(App, field), 0, 0, words, help}

/* In the order of the help. */
static const Option OPTIONS[] = {
    VALUE("--sweep", "NAME,...", "p", TAKES_WORDS, sweeps, "what to patch, or `all`"),
    VALUE("--names", "GLOB,...", "c", TAKES_WORDS, names, "hook points; * matches dots too"),
    VALUE("--text", "TEXT", "c", TAKES_TEXT, text, "one prompt instead of a file"),
    WORD("--run", "SIDE", "c", side, SIDES, "clean (default) or corrupted prompts"),
    VALUE("--answer", "TEXT", "t", TAKES_LIST, answers, "list this token too; repeatable"),
    COUNT("-k", "N", "t", k, 0, INT_MAX, "how many tokens (default 10)"),
    FLAG("--verify", "i", verify, 1, "check every checksum in the file"),
    VALUE("--heads", "L.H,...", "h", TAKES_TEXT, heads, "heads as 9.6,10.0, or `all`"),
    VALUE("--to", "L.H.q,...", "x", TAKES_TEXT, to, "receivers' q, k or v; default: final"),
    FLAG("--freeze-mlps", "x", freeze_mlps, 1, "the direct edge only"),
    VALUE("--site", "SWEEP", "a", TAKES_TEXT, site, "what to ablate, cell by cell"),
    WORD("--by", "WAY", "a", by, WAYS, "zero (default), mean, resample or noise"),
    VALUE("--groups", "COLUMN", "a", TAKES_TEXT, groups, "mean within rows of one value"),
    VALUE("--positions", "COL,...", "a", TAKES_TEXT, positions,
          "where: columns with positions from 0, or `end`"),
    FLAG("--keep", "a", keep, 1, "ablate every head but --heads"),
    VALUE("--kind", "KIND,...", "r", TAKES_TEXT, kind, "resid, mlp, attn (default: all)"),
    COUNT("--window", "N", "r", window, 1, 10000, "layers restored at once (default 10)"),
    COUNT("--samples", "N", "r", samples, 1, 10000, "corrupted runs (default 10)"),
    FLAG("--severed", "r", severed, 1, "hold mlp or attn at their corrupted values"),
    FLAG("--bos", "r", bos, 1, "<|endoftext|> in front of prompts"),
    VALUE("--noise", "X", "ra", TAKES_NUMBER, noise, "in standard deviations (trace 3, ablate 1)"),
    COUNT("--seed", "N", "R", seed, 0, INT_MAX, "of what is random (default 1)"),
    WORD("--metric", "NAME", "E", metric, METRICS,
         "logit_diff (default), logit, prob, logprob, kl or rank"),
    FLAG("--noising", "S", noising, 1, "corrupted activations into the clean run"),
    FLAG("--normalize", "Sa", normalize, 1, "0 is the unpatched run, 1 (noising -1) the other"),
    FLAG("--per-prompt", "B", per_prompt, 1, "every example instead of the mean"),
    FLAG("--brute", "p", brute, 1, "a full pass a cell: the same bits, slowly"),
    VALUE("--shard", "I/N", "p", TAKES_TEXT, shard, "only part I of N, into FILE.part; see merge"),
    FLAG("--stats", "p", stats, 1, "what it cost, on stderr and in .json"),
    WORD("--color", "WHEN", "C", color, COLORS, "auto (default), always or never"),
    VALUE("--range", "X", "C", TAKES_NUMBER, range,
          "where colours end (default: at the largest value)"),
    VALUE("-o", "FILE", "O", TAKES_LIST, outputs, "write a file, see above"),
    FLAG("--no-bos", "T", no_bos, 1, "no <|endoftext|> in front of texts"),
    VALUE("-m", "MODEL", "M", TAKES_TEXT, model_path,
          "default: $ACTPATCH_MODEL, else the bundled model"),
    COUNT("--threads", "N", "M", load.threads, 1, 4096, "default: one a core"),
    VALUE("--max-memory", "BYTES", "M", TAKES_BYTES, load.max_memory,
          "a bound, as 500000000, 64M or 2G (of 1024s)"),
    FLAG("--plain", "M", load.plain, 1, "the scalar reference kernels"),
    FLAG("--no-processing", "M", no_processing, 1, "none of these four:"),
    FLAG("--no-fold-ln", "M", load.fold_ln, 0, ""),
    FLAG("--no-center-writing-weights", "M", load.center_writing_weights, 0, ""),
    FLAG("--no-center-unembed", "M", load.center_unembed, 0, ""),
    FLAG("--no-fold-value-biases", "M", load.fold_value_biases, 0, ""),
    FLAG("--refactor-factored-attn-matrices", "M", load.refactor_factored_attn_matrices, 1,
         "off by default"),
    FLAG("-h", "", help, 1, "this help"),
    FLAG("--help", "", help, 1, "this help"),
};

#define N_OPTIONS (sizeof OPTIONS / sizeof *OPTIONS)

static int accepts(const Command *c, const Option *o) {
    return strpbrk(c->accepts, o->groups) != NULL;
}

/* A number without sign at the start of text[0..n); returns the bytes it takes, 0: there is none or
   it is too large. */
static size_t parse_digits(const char *text, size_t n, size_t *out) {
    size_t i;

    *out = 0;
    for (i = 0; i < n && text[i] >= '0' && text[i] <= '9'; i++)
        if (!size_times(*out, 10, out) || !size_plus(*out, (size_t)(text[i] - '0'), out))
            return 0;
    return i;
}

/* Digits and nothing else, or with a unit of 1024s behind them where that is asked for. */
static int parse_size(const char *text, int with_unit, size_t *out) {
    static const char units[] = "KMG";
    const char *end = text + parse_digits(text, strlen(text), out);
    const char *unit = with_unit && end > text && *end != '\0' ? strchr(units, *end) : NULL;

    for (const char *u = units; unit != NULL && u <= unit; u++)
        if (!size_times(*out, 1024, out))
            return 0;
    return end > text && end[unit != NULL] == '\0';
}

/* Words parted by commas: the next into word[0..n), 0 behind the last. */
static int next_word(const char **list, const char **word, size_t *n) {
    if (*list == NULL)
        return 0;
    *word = *list;
    *n = strcspn(*list, ",");
    *list = (*list)[*n] == ',' ? *list + *n + 1 : NULL;
    return 1;
}

static int is_word(const char *known, const char *word, size_t n) {
    return strlen(known) == n && memcmp(known, word, n) == 0;
}

static void set_option(App *app, const Option *o, const char *value) {
    void *field = (char *)app + o->field;
    List *list = field;
    size_t n = 0;
    char *end;

    switch (o->kind) {
    case TAKES_NOTHING:
        *(int *)field = o->least;
        break;
    case TAKES_TEXT:
        *(const char **)field = value;
        break;
    case TAKES_WORDS:
        if (*(const char **)field != NULL)
            value = text_of(app, "%s,%s", *(const char **)field, value);
        *(const char **)field = value;
        break;
    case TAKES_LIST:
        list->items[list->n++] = value;
        break;
    case TAKES_COUNT:
        if (!parse_size(value, 0, &n) || n < (size_t)o->least || n > (size_t)o->most)
            stop(app, PATCH_E_USAGE, o->name, "%.60s is no number of %d..%d; give one", value,
                 o->least, o->most);
        *(int *)field = (int)n;
        break;
    case TAKES_BYTES:
        if (!parse_size(value, 1, field) || *(size_t *)field == 0)
            stop(app, PATCH_E_USAGE, o->name, "%.60s is no number of bytes; give one, as 64M",
                 value);
        break;
    case TAKES_NUMBER:
        *(double *)field = strtod(value, &end);
        if (*value == '\0' || *end != '\0' || !(*(double *)field > 0) ||
            !isfinite(*(double *)field))
            stop(app, PATCH_E_USAGE, o->name, "%.60s is no number above 0; give one", value);
        break;
    case TAKES_WORD:
        while (o->words[n] != NULL && strcmp(o->words[n], value) != 0)
            n++;
        if (o->words[n] == NULL)
            stop(app, PATCH_E_USAGE, o->name, "unknown word %.60s; choose %s", value, o->help);
        *(int *)field = (int)n;
        break;
    }
}

/* The option of that name, `length` bytes of it; NULL: unknown. */
static const Option *find_option(const char *name, size_t length) {
    for (size_t i = 0; i < N_OPTIONS; i++)
        if (is_word(OPTIONS[i].name, name, length))
            return &OPTIONS[i];
    return NULL;
}

/* The option at argv[*i]; its value follows = or is the next argument, whatever that looks like. */
static void parse_option(App *app, char **argv, int *i) {
    const char *word = argv[*i], *command = app->command->name;
    const char *equals = strncmp(word, "--", 2) == 0 ? strchr(word, '=') : NULL;
    const Option *o = find_option(word, equals ? (size_t)(equals - word) : strlen(word));

    if (o == NULL || (*o->groups != '\0' && !accepts(app->command, o)))
        stop(app, PATCH_E_USAGE, command, "%s option %.60s; see actpatch %s -h",
             o ? "this command has no" : "unknown", word, command);
    if (o->kind == TAKES_NOTHING && equals != NULL)
        stop(app, PATCH_E_USAGE, o->name, "it has no value; leave out %.60s", equals);
    if (o->kind != TAKES_NOTHING && equals == NULL && argv[++*i] == NULL)
        stop(app, PATCH_E_USAGE, o->name, "its value is missing; give %s", o->value);
    set_option(app, o, equals != NULL ? equals + 1 : argv[*i]);
}

/* What the arguments must be together. */
static void check_usage(App *app) {
    const Command *c = app->command;
    const Option *o = c->needs != NULL ? find_option(c->needs, strlen(c->needs)) : NULL;

    if (app->operands.n < c->least)
        stop(app, PATCH_E_USAGE, c->name, "%s is missing; see actpatch %s -h", c->operands,
             c->name);
    if (app->operands.n > c->most)
        stop(app, PATCH_E_USAGE, c->name, "%.60s is a word too many; put a text in quotes",
             app->operands.items[c->most]);
    if (o != NULL && *(const char *const *)(const void *)((const char *)app + o->field) == NULL)
        stop(app, PATCH_E_USAGE, c->name, "%s is missing; give %s", o->name, o->value);
    if (c->one_file && app->outputs.n != 1)
        stop(app, PATCH_E_USAGE, c->name, "it makes one file; give one -o FILE");
    for (size_t i = 0; i < app->outputs.n; i++) {
        const char *path = app->outputs.items[i];
        char endings[80] = " a file's name";
        if (c->formats ? format_of(path, c->formats) != NULL : strcmp(path, "-") != 0)
            continue;
        for (const Format *f = c->formats; f != NULL && f->ending != NULL; f++)
            snprintf(endings + (f == c->formats ? 0 : strlen(endings)), 20, " %s", f->ending);
        stop(app, PATCH_E_USAGE, path, "unknown file ending; give%s", endings);
    }
}

static void parse_arguments(App *app, int argc, char **argv) {
    int only_operands = 0;

    app->operands.items = ROOM(const char *, (size_t)argc);
    app->outputs.items = ROOM(const char *, (size_t)argc);
    app->answers.items = ROOM(const char *, (size_t)argc);
    for (int i = 2; i < argc; i++) {
        if (only_operands || argv[i][0] != '-' || argv[i][1] == '\0')
            app->operands.items[app->operands.n++] = argv[i];
        else if (strcmp(argv[i], "--") == 0)
            only_operands = 1;
        else
            parse_option(app, argv, &i);
    }
    if (!app->help)
        check_usage(app);
}

/* ---- 13.3 Prompts ---------------------------------------------------------------------------
   A TSV file: UTF-8, LF or CRLF, a BOM skipped, empty lines ignored, fields verbatim. The first
   line names the columns. Places are told by line, as an editor counts. */

typedef struct Field {
    const char *text; /* of the file, not terminated; any bytes but tab and newline */
    size_t length;
} Field;

typedef struct Tsv {
    const char *path;
    size_t n_columns, n_rows; /* without the line of names */
    Field *fields;            /* [1 + n_rows, n_columns], the names first */
    size_t *lines;            /* [1 + n_rows] */
} Tsv;

/* "ioi.tsv: line 3"; of a long path the end. Row 0 is the line of names. */
static const char *tsv_place(const Tsv *t, size_t row, char place[PLACE_ROOM]) {
    const size_t n = strlen(t->path), cut = n > 90 ? n - 90 : 0;

    snprintf(place, PLACE_ROOM, "%s: line %lu", t->path + cut, (unsigned long)t->lines[row]);
    return place;
}

/* A field of an example; rows count from 0. */
static const Field *tsv_field(const Tsv *t, size_t row, int column) {
    return &t->fields[(row + 1) * t->n_columns + (size_t)column];
}

/* All of a file ("-": standard input), a zero behind it, up to a gigabyte: a bound for what never
   ends. */
static char *read_file(App *app, const char *path, size_t *n) {
    FILE *f = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    size_t size = 1 << 16, got;
    char *bytes = f != NULL ? ROOM(char, size) : NULL;

    for (*n = 0; f != NULL && (got = fread(bytes + *n, 1, size - 1 - *n, f)) > 0;) {
        *n += got;
        if (*n < size - 1)
            continue;
        if (size >= (size_t)1 << 30)
            must(app, no_memory(&app->e, path, 2 * size));
        char *larger = ROOM(char, size *= 2);
        memcpy(larger, bytes, *n);
        pool_give(&app->pool, bytes);
        bytes = larger;
    }
    if (f == NULL || ferror(f))
        stop(app, PATCH_E_IO, path, "%s; give the path of a file", strerror(errno));
    if (f != stdin)
        fclose(f);
    return bytes;
}

static Tsv tsv_read(App *app, const char *path) {
    Tsv t = {strcmp(path, "-") == 0 ? "standard input" : path, 0, 0, NULL, NULL};
    size_t n, lines = 1, cuts = 1, row = 0, line = 0, end;
    const char *text = read_file(app, path, &n);
    char place[PLACE_ROOM];

    for (size_t at = 0; at < n; at++) {
        lines += text[at] == '\n';
        cuts += text[at] == '\n' || text[at] == '\t';
    }
    Field *field = t.fields = ROOM(Field, cuts);
    t.lines = ROOM(size_t, lines);
    for (size_t at = n >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0 ? 3 : 0; at < n; at = end + 1) {
        const char *newline = memchr(text + at, '\n', n - at);
        end = newline != NULL ? (size_t)(newline - text) : n;
        const size_t last = end - (end > at && text[end - 1] == '\r');
        size_t count = 0;

        line++;
        for (size_t i = at, start = at; at < last && i <= last; i++)
            if (i == last || text[i] == '\t') {
                field->text = text + start;
                field++->length = i - start;
                start = i + 1;
                count++;
            }
        if (count == 0)
            continue;
        t.lines[row] = line;
        t.n_columns = row == 0 ? count : t.n_columns;
        if (count != t.n_columns)
            stop(app, PATCH_E_INPUT, tsv_place(&t, row, place),
                 "%lu fields where the first line names %lu columns; part fields by one tab",
                 (unsigned long)count, (unsigned long)t.n_columns);
        row++;
    }
    if (row < 2)
        stop(app, PATCH_E_INPUT, t.path, "no examples; name columns in the first line, parted by "
             "tabs, and give an example in each further line");
    t.n_rows = row - 1;
    return t;
}

/* The column of that name[0..n), -1 where there is none; two of one name are an error. */
static int tsv_column(App *app, const Tsv *t, const char *name, size_t n) {
    char place[PLACE_ROOM];
    int column = -1;

    for (size_t i = 0; i < t->n_columns; i++) {
        if (t->fields[i].length != n || memcmp(t->fields[i].text, name, n) != 0)
            continue;
        if (column >= 0)
            stop(app, PATCH_E_INPUT, tsv_place(t, 0, place), "two columns %.*s; leave one out",
                 (int)n, name);
        column = (int)i;
    }
    return column;
}

/* The same of an option's value: it must be there. */
static int named_column(App *app, const Tsv *t, const char *option, const char *name, size_t n) {
    const int column = tsv_column(app, t, name, n);

    if (column < 0)
        stop(app, PATCH_E_INPUT, option, "no column %.*s; name one of the file's",
             n < 60 ? (int)n : 60, name);
    return column;
}

/* What an example is made of: each role has a column of text or one of ids. */
enum { CLEAN, CORRUPTED, ANSWER, WRONG, N_ROLES };
static const char *const ROLES[N_ROLES][2] = {{"clean", "clean_ids"},
                                              {"corrupted", "corrupted_ids"},
                                              {"answer", "answer_id"},
                                              {"wrong", "wrong_id"}};
#define NEEDS(role) (1u << (role))

typedef struct Prompts {
    Tsv tsv;
    size_t n, n_tokens;      /* examples; tokens of the first */
    int column[N_ROLES];     /* -1: not there, or not asked for */
    int has_ids[N_ROLES];    /* the column holds ids */
    patch_example *examples; /* [n] */
    int warned[3];           /* of what is seldom meant */
} Prompts;

/* The prompt of one side of an example; NULL where it was not asked for. */
static const int *prompt_ids(const Prompts *p, size_t row, int side) {
    return side == CLEAN ? p->examples[row].clean : p->examples[row].corrupted;
}

/* Ids of a text. Tokenizing twice costs less than room for an id a byte would. */
static int *encode(App *app, const char *text, size_t n, int bos, size_t *n_ids) {
    patch_status s = patch_encode(app->model, text, n, bos, NULL, 0, n_ids, &app->e);

    if (s != PATCH_E_SIZE)
        must(app, s);
    int *ids = ROOM(int, *n_ids);
    must(app, patch_encode(app->model, text, n, bos, ids, *n_ids, n_ids, &app->e));
    return ids;
}

/* Ids written as numbers, parted by spaces. */
static int *read_ids(App *app, const Field *field, const char *name, const char *place, size_t *n) {
    const char *text = field->text;
    int *ids = ROOM(int, field->length / 2 + 1);
    size_t used, number;

    *n = 0;
    for (size_t i = 0; i < field->length; i += used) {
        used = parse_digits(text + i, field->length - i, &number);
        if (used > 0 && number <= INT_MAX && (i == 0 || text[i - 1] == ' '))
            ids[(*n)++] = (int)number;
        else if (used == 0 && text[i] == ' ')
            used = 1;
        else
            stop(app, PATCH_E_INPUT, place, "%s: %.*s is no id; write numbers parted by spaces",
                 name, (int)(field->length - i < 20 ? field->length - i : 20), text + i);
    }
    return ids;
}

/* A token for a message: |text|, escaped and cut; its number where there is no text. */
static const char *token_shown(App *app, int id) {
    size_t n = 0;
    const char *text = patch_token(app->model, id, &n);
    char shown[48], *end = shown;

    if (text == NULL)
        return text_of(app, "id %d", id);
    for (size_t i = 0; i < n && end + ESCAPE_ROOM < shown + sizeof shown; end += strlen(end))
        i += escape_next(text + i, n - i, end);
    *end = '\0';
    return text_of(app, "|%s|", shown);
}

/* A prompt: some tokens, all of this model, no more than it takes. An answer: one token. */
static void check_ids(App *app, const int *ids, size_t n, int is_answer, const char *name,
                      const char *place) {
    const patch_dims *d = patch_model_dims(app->model);

    if (n == 0)
        stop(app, PATCH_E_INPUT, place, "%s is empty; give some text", name);
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= d->d_vocab)
            stop(app, PATCH_E_INPUT, place, "%s: the model has no id %d; give 0..%d", name, ids[i],
                 d->d_vocab - 1);
    if (is_answer && n > 1)
        stop(app, PATCH_E_INPUT, place,
             "%s is %lu tokens (%s%s%s) and must be one; choose a word of one token, with its "
             "leading space", name, (unsigned long)n, token_shown(app, ids[0]),
             token_shown(app, ids[1]), n > 2 ? "..." : "");
    if (n > (size_t)d->n_ctx)
        stop(app, PATCH_E_INPUT, place, "%s has %lu tokens, the model takes %d; shorten it", name,
             (unsigned long)n, d->n_ctx);
}

static void warn(const char *where, const char *format, const char *name) {
    patch_error w;

    fail(&w, PATCH_OK, where, format, name);
    print_message("warning: ", &w);
}

/* What is seldom meant, each told once a file: "shops,  John" has a token more than "shops, John"
   (GPT-2's 220), so has "to ", and "Mary" is another token than " Mary". The field is not empty. */
static void warn_spaces(Prompts *p, int role, const Field *field, const char *place) {
    static const char *const words[] = {
        "%s has no leading space; write it as it follows the prompt",
        "%s has a double space, which is a token more; take it out unless it is meant",
        "%s ends in a space, which is a token more; take it out unless it is meant"};
    int found = role >= ANSWER && field->text[0] != ' ' ? 0 : -1;

    if (role < ANSWER && field->text[field->length - 1] == ' ')
        found = 2;
    for (size_t i = 1; role < ANSWER && i < field->length; i++)
        if (memcmp(field->text + i - 1, "  ", 2) == 0)
            found = 1;
    if (found < 0 || p->warned[found])
        return;
    p->warned[found] = 1;
    warn(place, words[found], ROLES[role][0]);
}

/* Prompts that meet have one length: where two differ, say where they part. */
static void check_lengths(App *app, const char *place, const char *name, const int *a, size_t n_a,
                          const char *other, const int *b, size_t n_b) {
    size_t i = 0;

    if (n_a == n_b)
        return;
    while (i < n_a && i < n_b && a[i] == b[i])
        i++;
    stop(app, PATCH_E_INPUT, place,
         "%s has %lu tokens where %s has %lu, and the first that differs is number %lu, %s where "
         "that has %s; give all prompts the same length",
         name, (unsigned long)n_a, other, (unsigned long)n_b, (unsigned long)i,
         i < n_a ? token_shown(app, a[i]) : "none", i < n_b ? token_shown(app, b[i]) : "none");
}

/* One role of one example. */
static void prompts_role(App *app, Prompts *p, size_t row, int role, const char *place) {
    const Field *field = tsv_field(&p->tsv, row, p->column[role]);
    const char *name = ROLES[role][p->has_ids[role]];
    const int bos = role < ANSWER && !app->no_bos;
    patch_example *x = &p->examples[row];
    size_t n = 0;
    const int *ids = p->has_ids[role] ? read_ids(app, field, name, place, &n)
                                      : encode(app, field->text, field->length, bos, &n);

    check_ids(app, ids, n, role >= ANSWER, name, place);
    if (!p->has_ids[role])
        warn_spaces(p, role, field, place);
    if (role >= ANSWER) {
        *(role == ANSWER ? &x->answer : &x->wrong) = ids[0];
        return;
    }
    if (x->clean != NULL)
        check_lengths(app, place, name, ids, n, "clean", x->clean, (size_t)x->n_tokens);
    *(role == CLEAN ? &x->clean : &x->corrupted) = ids;
    x->n_tokens = (int)n;
}

/* Read the file that the first operand names. `need` and `may` are sets of roles, which must and
   may be there. one_length: all examples must have it. */
static Prompts prompts_read(App *app, unsigned need, unsigned may, int one_length) {
    const int side = need & NEEDS(CLEAN) ? CLEAN : CORRUPTED;
    char place[PLACE_ROOM], first[PLACE_ROOM];
    Prompts p = {tsv_read(app, app->operands.items[0]), 0, 0, {0}, {0}, NULL, {0}};

    tsv_place(&p.tsv, 0, place);
    for (int role = 0; role < N_ROLES; role++) {
        const int text = tsv_column(app, &p.tsv, ROLES[role][0], strlen(ROLES[role][0]));
        const int ids = tsv_column(app, &p.tsv, ROLES[role][1], strlen(ROLES[role][1]));
        if (text >= 0 && ids >= 0)
            stop(app, PATCH_E_INPUT, place, "both %s and %s; leave one out", ROLES[role][0],
                 ROLES[role][1]);
        p.has_ids[role] = ids >= 0;
        p.column[role] = (need | may) & NEEDS(role) ? (ids >= 0 ? ids : text) : -1;
        if ((need & NEEDS(role)) && p.column[role] < 0)
            stop(app, PATCH_E_INPUT, place,
                 "no column %s; the first line names the columns, parted "
                 "by tabs",
                 ROLES[role][0]);
    }
    p.n = p.tsv.n_rows;
    p.examples = ROOM(patch_example, p.n);
    snprintf(first, sizeof first, "line %lu", (unsigned long)p.tsv.lines[1]);
    for (size_t row = 0; row < p.n; row++) {
        tsv_place(&p.tsv, row + 1, place);
        for (int role = 0; role < N_ROLES; role++)
            if (p.column[role] >= 0)
                prompts_role(app, &p, row, role, place);
        if (one_length)
            check_lengths(app, place, "this prompt", prompt_ids(&p, row, side),
                          (size_t)p.examples[row].n_tokens, first, prompt_ids(&p, 0, side),
                          (size_t)p.examples[0].n_tokens);
    }
    p.n_tokens = (size_t)p.examples[0].n_tokens;
    return p;
}

/* Which roles a metric reads. */
static unsigned metric_needs(int metric) {
    return (metric == PATCH_KL ? 0u : NEEDS(ANSWER)) |
           (metric == PATCH_LOGIT_DIFF ? NEEDS(WRONG) : 0u);
}

/* ---- 13.4 Commands: info, tokens, top ------------------------------------------------------- */

/* A file that comes with the program: in tests/tiny beside it, or installed; 0: nowhere. */
static int bundled(const App *app, const char *name, char path[PATH_ROOM]) {
    char program[PATH_ROOM];
    FILE *f = NULL;

    snprintf(program, sizeof program, "%s", app->program);
#if HAS_POSIX
    const ssize_t n = readlink("/proc/self/exe", program, sizeof program - 1);
    if (n > 0)
        program[n] = '\0';
#endif
    const char *slash = strrchr(program, '/');
    for (int installed = 0; installed < 2 && f == NULL; installed++) {
        if (installed)
            snprintf(path, PATH_ROOM, "%s/share/actpatch/%s", ACTPATCH_PREFIX, name);
        else
            snprintf(path, PATH_ROOM, "%.*stests/tiny/%s", slash ? (int)(slash - program + 1) : 0,
                     program, name);
        if ((f = fopen(path, "rb")) != NULL)
            fclose(f);
    }
    return f != NULL;
}

static void open_model(App *app) {
    const char *environment = getenv("ACTPATCH_MODEL");
    char path[PATH_ROOM];

    if (app->no_processing)
        app->load.fold_ln = app->load.center_writing_weights = app->load.center_unembed =
            app->load.fold_value_biases = 0;
    if (app->model_path == NULL && environment != NULL && *environment != '\0')
        app->model_path = environment;
    if (app->model_path == NULL && !bundled(app, "model.bin", path))
        stop(app, PATCH_E_IO, "-m", "no model is named, and none is in tests/tiny beside the "
             "program or in " ACTPATCH_PREFIX "/share/actpatch; give -m MODEL or set "
             "ACTPATCH_MODEL");
    must(app, patch_model_open(app->model_path ? app->model_path : path, &app->load, &app->model,
                               &app->e));
    app->L = (size_t)patch_model_dims(app->model)->n_layers;
    app->H = (size_t)patch_model_dims(app->model)->n_heads;
}

/* The processings, by the names that TransformerLens gives them. */
static const struct {
    const char *name;
    size_t field;
} PROCESSING[] = {
    {"fold_ln", offsetof(patch_options, fold_ln)},
    {"center_writing_weights", offsetof(patch_options, center_writing_weights)},
    {"center_unembed", offsetof(patch_options, center_unembed)},
    {"fold_value_biases", offsetof(patch_options, fold_value_biases)},
    {"refactor_factored_attn_matrices", offsetof(patch_options, refactor_factored_attn_matrices)},
};
#define N_PROCESSING (sizeof PROCESSING / sizeof *PROCESSING)

static int processing_on(const App *app, size_t i) {
    const char *options = (const char *)patch_model_options(app->model);

    return *(const int *)(const void *)(options + PROCESSING[i].field) != 0;
}

/* Lines `name value`, parted by a tab. The least memory is that of a pass over one token, beside
   the mapped file; the cache's is that of every activation of a prompt of n_ctx tokens. */
static void cmd_info(App *app) {
    static const char *const act_fns[] = {"gelu_new", "gelu", "relu"}, *const every[] = {"*"};
    const patch_dims *d = patch_model_dims(app->model);
    static const int first = 0;
    const patch_run run = {&first, 1, NULL, 0};
    patch_read read = {PATCH_LN_FINAL_NORMALIZED, 0, 0, 0, NULL, 0};
    patch_stats stats = {0};
    char sha256[65];
    size_t length, tokens = 0, cache = 0;

    if (app->verify)
        must(app, patch_model_verify(app->model, &app->e));
    must(app, patch_model_sha256(app->model, sha256, &app->e));
    must(app, patch_execute(app->model, &run, 1, &read, 1, &stats, &app->e));
    must(app, patch_run_with_cache(app->model, NULL, 1, (size_t)d->n_ctx, every, 1, &cache, NULL,
                                   &app->e));
    for (int i = 0; i < d->d_vocab; i++)
        tokens += patch_token(app->model, i, &length) != NULL;
    printf("n_layers\t%d\nn_heads\t%d\nd_model\t%d\nd_head\t%d\nd_mlp\t%d\n", d->n_layers,
           d->n_heads, d->d_model, d->d_head, d->d_mlp);
    printf("n_ctx\t%d\nd_vocab\t%d\n", d->n_ctx, d->d_vocab);
    printf("act_fn\t%s\neps\t%.9g\nparameters\t%.0f\n", act_fns[d->act_fn], d->eps, d->parameters);
    printf("tokenizer_size\t%lu\nbos\t%d\n", (unsigned long)tokens, d->bos);
    for (size_t i = 0; i < N_PROCESSING; i++)
        printf("%s\t%s\n", PROCESSING[i].name, processing_on(app, i) ? "yes" : "no");
    printf("folded\t%s\ndtype\t%s\nfile_bytes\t%.0f\n", d->folded ? "yes" : "no",
           d->dtype ? "f16" : "f32", d->file_bytes);
    printf("memory_least\t%.0f\nmemory_cache\t%.0f\n", stats.peak_bytes, (double)cache);
    printf("kernels\t%s\nthreads\t%d\nsha256\t%s\n", d->kernels, d->threads, sha256);
    if (app->verify)
        printf("checksums\tgood\n");
}

/* |a|b| with what a line cannot show escaped; without a tokenizer nothing stands between bars. */
static void put_tokens(const App *app, const int *ids, size_t n) {
    char piece[ESCAPE_ROOM];
    size_t length;

    for (size_t i = 0; i < n; i++) {
        const char *token = patch_token(app->model, ids[i], &length);
        putchar('|');
        for (size_t at = 0; token != NULL && at < length; fputs(piece, stdout))
            at += escape_next(token + at, length - at, piece);
    }
    puts("|");
}

static void cmd_tokens(App *app) {
    for (size_t t = 0, n; t < app->operands.n; t++) {
        const char *text = app->operands.items[t];
        const int *ids = encode(app, text, strlen(text), !app->no_bos, &n);

        for (size_t i = 0; i < n; i++)
            printf(i ? " %d" : "%d", ids[i]);
        putchar('\n');
        put_tokens(app, ids, n);
    }
}

typedef struct Scored {
    float logit;
    int id;
} Scored;

/* Highest first; equal logits by id. */
static int compare_scored(const void *a, const void *b) {
    const Scored *x = a, *y = b;

    if (x->logit != y->logit)
        return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

/* All tokens [V] in the order of their logits behind a prompt. */
static const Scored *final_logits(App *app, const int *ids, size_t n) {
    const patch_dims *d = patch_model_dims(app->model);
    const patch_run run = {ids, (int)n, NULL, 0};
    float *row = ROOM(float, (size_t)d->d_model), *logits = ROOM(float, (size_t)d->d_vocab);
    patch_read read = {PATCH_LN_FINAL_NORMALIZED, 0, 0, (int)n - 1, row, 0};
    Scored *list = ROOM(Scored, (size_t)d->d_vocab);

    must(app, patch_execute(app->model, &run, 1, &read, 1, NULL, &app->e));
    must(app, patch_logits(app->model, row, 1, logits, &app->e));
    for (int i = 0; i < d->d_vocab; i++) {
        list[i].logit = isnan(logits[i]) ? -INFINITY : logits[i]; /* an order needs numbers */
        list[i].id = i;
    }
    qsort(list, (size_t)d->d_vocab, sizeof *list, compare_scored);
    pool_give(&app->pool, row);
    pool_give(&app->pool, logits);
    return list;
}

/* The ids of a text on the command line: a prompt, or an answer. */
static const int *encode_argument(App *app, const char *text, int is_answer, size_t *n) {
    const int *ids = encode(app, text, strlen(text), !is_answer && !app->no_bos, n);

    check_ids(app, ids, *n, is_answer, is_answer ? "the answer" : "the prompt",
              is_answer ? "--answer" : app->command->name);
    return ids;
}

/* The k best tokens, then the answers. */
static void cmd_top(App *app) {
    const int v = patch_model_dims(app->model)->d_vocab;
    const size_t k = (size_t)(app->k < v ? app->k : v), lines = k + app->answers.n;
    int *rank = ROOM(int, lines);
    double sum = 0;
    size_t n;
    const int *ids = encode_argument(app, app->operands.items[0], 0, &n);
    const Scored *list = final_logits(app, ids, n);

    for (size_t i = 0; i < lines; i++) {
        rank[i] = i < k ? (int)i : 0;
        if (i >= k)
            ids = encode_argument(app, app->answers.items[i - k], 1, &n);
        while (i >= k && list[rank[i]].id != ids[0])
            rank[i]++;
    }
    for (int i = v - 1; i >= 0; i--) /* the small ones first */
        sum += exp((double)list[i].logit - (double)list[0].logit);
    for (size_t i = 0; i < lines; i++) {
        const Scored *s = &list[rank[i]];

        printf("%d\t%d\t%.9g\t%.9g\t", rank[i], s->id, (double)s->logit,
               exp((double)s->logit - (double)list[0].logit) / sum);
        put_tokens(app, &s->id, 1);
    }
}

/* ---- 13.5 Tables: what they have in common, and where they go ------------------------------- */

/* The mean of n numbers that lie `step` apart, summed in order. */
static double mean_of(const double *values, size_t n, size_t step) {
    double sum = 0;

    for (size_t i = 0; i < n; i++)
        sum += values[i * step];
    return sum / (double)n;
}

/* Values [B, n] as they are, or their means over the examples. */
static const double *mean_values(App *app, const double *values, size_t B, size_t n) {
    if (app->per_prompt)
        return values;
    double *mean = ROOM(double, n);
    for (size_t i = 0; i < n; i++)
        mean[i] = mean_of(values + i, B, n);
    return mean;
}

/* What the tables of a call have in common: one that has everything but name, axes and values. */
typedef struct Common {
    Table table;
    char model[65]; /* SHA-256 */
} Common;

/* The texts of n tokens; without a tokenizer an id is its own name. */
static const char **token_texts(App *app, const int *ids, size_t n, size_t **bytes) {
    const char **tokens = ROOM(const char *, n);

    *bytes = ROOM(size_t, n);
    for (size_t i = 0; i < n; i++) {
        tokens[i] = patch_token(app->model, ids[i], &(*bytes)[i]);
        if (tokens[i] == NULL)
            (*bytes)[i] = strlen(tokens[i] = text_of(app, "%d", ids[i]));
    }
    return tokens;
}

/* {"clean":[[..]],"corrupted":[[..]]}, the ids of every example. */
static const char *json_ids(App *app, const Prompts *p) {
    Text t = {0};

    for (int side = CLEAN; side <= CORRUPTED; side++) {
        add(app, &t, "%s\"%s\":", side == CLEAN ? "{" : "],", SIDES[side]);
        for (size_t row = 0; row < p->n; row++) {
            const int *ids = prompt_ids(p, row, side);
            add(app, &t, row ? ",[" : "[[");
            for (int i = 0; ids != NULL && i < p->examples[row].n_tokens; i++)
                add(app, &t, i ? ",%d" : "%d", ids[i]);
            add(app, &t, "]");
        }
    }
    add(app, &t, "]}");
    return t.bytes;
}

/* Fill all of c but the unpatched means and the stats. In the settings stands what results depend
   on; threads, memory and kernels are none of that. */
static void common_begin(App *app, const Prompts *p, Common *c) {
    Text settings = {0};
    size_t *bytes;
    const char **tokens = token_texts(app, p->examples[0].clean, p->n_tokens, &bytes);

    memset(c, 0, sizeof *c);
    c->table.tokens = tokens;
    c->table.token_bytes = bytes;
    c->table.n_tokens = p->n_tokens;
    c->table.command = app->command->name;
    c->table.metric = METRICS[app->metric];
    c->table.direction = app->noising ? "noising" : "denoising";
    c->table.normalized = app->normalize;
    c->table.range = app->range;
    c->table.json_tokens = json_ids(app, p);
    add(app, &settings, "{\"version\":\"%s\",\"bos\":%s", PATCH_VERSION,
        app->no_bos ? "false" : "true");
    for (size_t i = 0; i < N_PROCESSING; i++)
        add(app, &settings, ",\"%s\":%s", PROCESSING[i].name,
            processing_on(app, i) ? "true" : "false");
    add(app, &settings, "}");
    c->table.json_settings = settings.bytes;
    for (size_t i = 0; i < app->outputs.n; i++)
        if (app->shard || format_of(app->outputs.items[i], app->command->formats)->names_model)
            c->table.model = c->model;
    if (c->table.model != NULL)
        must(app, patch_model_sha256(app->model, c->model, &app->e));
}

/* One more axis, with labels of its own or none. */
static Axis *add_axis(Table *t, const char *name, size_t size, char **labels) {
    Axis *axis = &t->axis[t->rank++];

    *axis = (Axis){name, size, labels};
    return axis;
}

/* Words as labels, or with words == NULL "H0", "H1", ... */
static char **labels_of(App *app, const char *const *words, size_t n) {
    char **labels = ROOM(char *, n);

    for (size_t i = 0; i < n; i++)
        labels[i] = words != NULL ? text_of(app, "%s", words[i])
                                  : text_of(app, "H%lu", (unsigned long)i);
    return labels;
}

/* "L9H6" for each of some heads. */
static char **head_names(App *app, const patch_cell *heads, size_t n) {
    char **labels = ROOM(char *, n);

    for (size_t i = 0; i < n; i++)
        labels[i] = text_of(app, "L%dH%d", heads[i].layer, heads[i].head);
    return labels;
}

/* The axes of a sweep: examples where they are asked for, then layers, positions, heads. */
static void add_axes(App *app, Table *t, size_t n_examples, const patch_shape *shape) {
    if (app->per_prompt)
        add_axis(t, "example", n_examples, NULL);
    for (int k = 0; k < shape->rank; k++) {
        const char *name = shape->axes[k];
        const size_t size = shape->size[k];
        char **labels = strcmp(name, "head") == 0 ? labels_of(app, NULL, size) : NULL;
        add_axis(t, name, size, labels);
    }
}

/* One head, as "9.6", or with a letter as "9.6.q"; 0: it is none. */
static int parse_head(const App *app, const char *text, size_t n, int letter, patch_cell *c) {
    static const char letters[] = "qkv";
    size_t layer, head, used = parse_digits(text, n, &layer), more = 0;
    patch_hook hook = PATCH_Z;

    if (used > 0 && used < n && text[used] == '.')
        more = parse_digits(text + used + 1, n - used - 1, &head);
    if (more == 0 || layer >= app->L || head >= app->H)
        return 0;
    used += 1 + more;
    if (letter) {
        const char *l = used + 2 == n && text[used] == '.' ? memchr(letters, text[n - 1], 3) : NULL;
        if (l == NULL)
            return 0;
        hook = (patch_hook)(PATCH_Q + (l - letters));
        used = n;
    }
    *c = (patch_cell){hook, (int)layer, -1, (int)head, -1};
    return used == n;
}

/* Heads parted by commas, each once, or (without letters) `all` of them. */
static patch_cell *parse_heads(App *app, const char *list, int letter, const char *option,
                               size_t *n) {
    const size_t every = app->L * app->H;
    patch_cell *cells = ROOM(patch_cell, strlen(list) + every);
    const char *word;
    size_t length;

    *n = 0;
    if (!letter && strcmp(list, "all") == 0) {
        for (; *n < every; (*n)++)
            cells[*n] = (patch_cell){PATCH_Z, (int)(*n / app->H), -1, (int)(*n % app->H), -1};
        return cells;
    }
    for (; next_word(&list, &word, &length); (*n)++) {
        const int shown = length < 60 ? (int)length : 60;
        if (!parse_head(app, word, length, letter, &cells[*n]))
            stop(app, PATCH_E_INPUT, option, "no %s %.*s in %d layers of %d heads; give them as %s",
                 letter ? "q, k or v" : "head", shown, word, (int)app->L, (int)app->H,
                 letter ? "9.6.q,10.0.k" : "9.6,10.0");
        for (size_t i = 0; i < *n; i++)
            if (memcmp(&cells[i], &cells[*n], sizeof *cells) == 0)
                stop(app, PATCH_E_INPUT, option, "%.*s stands there twice; leave one out", shown,
                     word);
    }
    return cells;
}

/* Patterns [B, n, T, T] of some heads in the first B clean prompts, in one pass. */
static float *read_patterns(App *app, const Prompts *p, size_t B, const patch_cell *heads,
                            size_t n) {
    const size_t T = p->n_tokens;
    float *patterns = ROOM(float, B * n * T * T);
    patch_read *reads = ROOM(patch_read, B * n);
    patch_run *runs = ROOM(patch_run, B);

    for (size_t b = 0; b < B; b++) {
        runs[b] = (patch_run){p->examples[b].clean, (int)T, NULL, 0};
        for (size_t i = 0; i < n; i++) { /* one read gives a layer's every head */
            const int again = i > 0 && heads[i].layer == heads[i - 1].layer;
            patch_read *r = &reads[b * n + i];
            *r = (patch_read){PATCH_PATTERN, heads[i].layer, (int)b, -1, NULL, 0};
            r->out = again ? r[-1].out : ROOM(float, app->H * T * T);
        }
    }
    must(app, patch_execute(app->model, runs, B, reads, B * n, NULL, &app->e));
    for (size_t i = 0; i < B * n; i++)
        memcpy(patterns + i * T * T, reads[i].out + (size_t)heads[i % n].head * T * T,
               T * T * sizeof *patterns);
    return patterns;
}

/* What a page's attention viewer has at most: prompts, heads, and numbers in all. */
enum { PAGE_PROMPTS = 8, PAGE_HEADS = 144, PAGE_NUMBERS = 20000000 };

/* One page: settings, every prompt's logit difference, tables, the attention of some heads. */
static void write_page(App *app, const Prompts *p, const patch_cell *heads, size_t n_heads,
                       const char *title, const Table *tables, size_t n, const char *path) {
    const size_t T = p->n_tokens;
    size_t most = PAGE_NUMBERS / (T * T) + 1, *bytes;
    Page page = {0};
    char **prompts = ROOM(char *, p->n);

    n_heads = n_heads < PAGE_HEADS ? n_heads : PAGE_HEADS;
    page.n_heads = n_heads < most ? n_heads : most;
    most = most / page.n_heads + 1;
    page.n_attention = p->n < PAGE_PROMPTS ? p->n : PAGE_PROMPTS;
    page.n_attention = page.n_attention < most ? page.n_attention : most;
    if (p->column[WRONG] >= 0 && p->column[ANSWER] >= 0) {
        double *differences = ROOM(double, 2 * p->n);
        must(app, patch_measure(app->model, p->examples, p->n, PATCH_LOGIT_DIFF, differences, NULL,
                                &app->e));
        page.n_examples = p->n;
        page.has_corrupted = p->column[CORRUPTED] >= 0;
        page.differences = differences;
    }
    for (size_t b = 0; b < p->n; b++) {
        const size_t n_ids = (size_t)p->examples[b].n_tokens;
        const char **tokens = token_texts(app, p->examples[b].clean, n_ids, &bytes);
        Text prompt = {0};
        for (size_t i = 0; i < n_ids; i++) /* a NUL would end the text */
            for (size_t at = 0; at < bytes[i]; at++)
                add(app, &prompt, "%c", tokens[i][at] ? tokens[i][at] : '?');
        prompts[b] = prompt.bytes != NULL ? prompt.bytes : text_of(app, "");
    }
    int *ids = ROOM(int, page.n_attention * T);
    for (size_t b = 0; b < page.n_attention; b++)
        memcpy(ids + b * T, p->examples[b].clean, T * sizeof *ids);
    page.tokens = token_texts(app, ids, page.n_attention * T, &bytes);
    page.token_bytes = bytes;
    page.prompts = (const char *const *)prompts;
    page.title = title;
    page.json_settings = n > 0 ? tables[0].json_settings : NULL;
    page.tables = tables;
    page.n_tables = n;
    page.n_tokens = T;
    page.attention = read_patterns(app, p, page.n_attention, heads, page.n_heads);
    page.head_names = (const char *const *)head_names(app, heads, page.n_heads);
    must(app, out_open(&app->out, path, &app->e));
    write_html(app->out.f, &page);
    must(app, out_close(&app->out, &app->e));
}

static int has_ending(const char *path, const char *ending) {
    const char *dot = strrchr(path, '.');

    return dot != NULL && strcmp(dot, ending) == 0;
}

/* Tables into all files of the call, or, where none is named, shown. Pages have attention too where
   there are prompts (p, else NULL). */
static void give_tables(App *app, const Prompts *p, const Table *tables, size_t n) {
    for (size_t i = 0; i < app->outputs.n; i++) {
        const char *path = app->outputs.items[i];
        size_t n_heads;
        if (p != NULL && has_ending(path, ".html")) {
            const patch_cell *heads = parse_heads(app, app->heads ? app->heads : "all", 0,
                                                  "--heads", &n_heads);
            write_page(app, p, heads, n_heads, app->command->summary, tables, n, path);
        } else
            must(app, write_tables(path, app->command->formats, tables, n, &app->e));
    }
    for (size_t i = 0; app->outputs.n == 0 && i < n; i++)
        write_screen(stdout, &tables[i], screen_of(app));
}

/* ---- 13.6 Commands: diff, cache, fold ------------------------------------------------------- */

/* The rows of `diff`: line, clean, corrupted where there is one; then the mean. */
static void put_diff(FILE *f, const Table *t, char parted_by) {
    const size_t n = t->axis[0].size, columns = t->axis[1].size;
    const double mean[2] = {t->clean, t->corrupted};
    char number[NUMBER_ROOM];

    fputs("line", f);
    for (size_t k = 0; k < columns; k++)
        fprintf(f, "%c%s", parted_by, SIDES[k]);
    for (size_t row = 0; row <= n; row++) {
        fprintf(f, "\n%s", row < n ? t->axis[0].labels[row] : "mean");
        for (size_t k = 0; k < columns; k++)
            fprintf(f, "%c%s", parted_by,
                    number_text(row < n ? t->values[row * columns + k] : mean[k], number));
    }
    fputc('\n', f);
}

static void write_diff_csv(FILE *f, const Table *t) {
    put_diff(f, t, ',');
}

static void write_diff_json(FILE *f, const Table *t) {
    const size_t n = t->axis[0].size, columns = t->axis[1].size;

    fprintf(f, "{\"command\":\"diff\",\"metric\":\"%s\",\"examples\":[", t->metric);
    for (size_t row = 0; row <= n; row++) { /* the means stand behind the list */
        if (row < n)
            fprintf(f, "%s\n{\"line\":%s,\"clean\":", row ? "," : "", t->axis[0].labels[row]);
        else
            fputs("],\n\"clean\":", f);
        json_number(f, row < n ? t->values[row * columns] : t->clean);
        fputs(",\"corrupted\":", f);
        json_number(f, columns < 2 ? (double)NAN
                       : row < n   ? t->values[row * columns + 1]
                                   : t->corrupted);
        fputs(row < n ? "}" : "}\n", f);
    }
}

static const Format DIFF_FORMATS[] = {{".npy", write_npy, NULL, 0},
                                      {".csv", write_diff_csv, NULL, 0},
                                      {".json", write_diff_json, NULL, 0},
                                      {NULL, NULL, NULL, 0}};

static void cmd_diff(App *app) {
    const Prompts p =
        prompts_read(app, NEEDS(CLEAN) | metric_needs(app->metric), NEEDS(CORRUPTED), 0);
    double *values = ROOM(double, 2 * p.n);
    const size_t columns = p.column[CORRUPTED] >= 0 ? 2 : 1;
    Table t = {0};
    int silent = 0;

    must(app, patch_measure(app->model, p.examples, p.n, (patch_metric)app->metric, values, NULL,
                            &app->e));
    t.command = t.name = "diff";
    t.metric = METRICS[app->metric];
    t.rank = 2;
    t.axis[0] = (Axis){"example", p.n, ROOM(char *, p.n)};
    t.axis[1] = (Axis){"run", columns, NULL};
    for (size_t i = 0; i < p.n; i++)
        t.axis[0].labels[i] = text_of(app, "%lu", (unsigned long)p.tsv.lines[i + 1]);
    t.clean = mean_of(values, p.n, 2);
    t.corrupted = mean_of(values + 1, p.n, 2);
    for (size_t i = 0; columns == 1 && i < p.n; i++) /* [B,2] becomes [B,1] */
        values[i] = values[2 * i];
    t.values = values;
    for (size_t i = 0; i < app->outputs.n; i++)
        silent |= strcmp(app->outputs.items[i], "-") == 0;
    if (!silent)
        put_diff(stdout, &t, '\t');
    for (size_t i = 0; i < app->outputs.n; i++)
        must(app, write_tables(app->outputs.items[i], DIFF_FORMATS, &t, 1, &app->e));
}

#define FINAL_ROWS "ln_final.hook_normalized" /* what logits are made from */

/* Every tensor of a cache, FINAL_ROWS only with keep_final: into the head of a file (offset !=
   NULL), or its data. */
static void cache_tensors(FILE *f, const patch_cache *cache, int keep_final, uint64_t *offset) {
    for (size_t i = 0; i < patch_cache_count(cache); i++) {
        const patch_tensor t = patch_cache_get(cache, i);
        size_t n = 1;

        if (!keep_final && strcmp(t.name, FINAL_ROWS) == 0)
            continue;
        for (int k = 0; k < t.rank; k++)
            n *= t.shape[k];
        if (offset != NULL)
            safetensors_entry(f, t.name, "F32", t.rank, t.shape, offset);
        else
            put_floats(f, t.data, n);
    }
}

/* Tokens, the activations, and the logits, which are never there as a whole. */
static void write_cache(App *app, const int *tokens, size_t B, size_t T, const patch_cache *cache,
                        int keep_final) {
    const size_t C = (size_t)patch_model_dims(app->model)->d_model, n = B * T;
    const size_t V = (size_t)patch_model_dims(app->model)->d_vocab, shape[3] = {B, T, V};
    float *logits = ROOM(float, LOGIT_ROWS * V);
    const float *final = NULL;
    uint64_t offset = 0;

    must(app, out_open(&app->out, app->outputs.items[0], &app->e));
    FILE *f = app->out.f;
    safetensors_begin(f);
    safetensors_entry(f, "tokens", "I64", 2, shape, &offset);
    cache_tensors(f, cache, keep_final, &offset);
    safetensors_entry(f, "logits", "F32", 3, shape, &offset);
    safetensors_end(f);
    for (size_t i = 0; i < n; i++)
        put_little(f, (uint64_t)tokens[i], 8);
    cache_tensors(f, cache, keep_final, NULL);
    for (size_t i = 0; i < patch_cache_count(cache); i++)
        if (strcmp(patch_cache_get(cache, i).name, FINAL_ROWS) == 0)
            final = patch_cache_get(cache, i).data;
    for (size_t i = 0, rows; i < n && !ferror(f); i += rows) {
        rows = n - i < LOGIT_ROWS ? n - i : LOGIT_ROWS;
        must(app, patch_logits(app->model, final + i * C, rows, logits, &app->e));
        put_floats(f, logits, rows * V);
    }
    must(app, out_close(&app->out, &app->e));
}

static const Format CACHE_FORMATS[] = {{".safetensors", NULL, NULL, 0}, {NULL, NULL, NULL, 0}};

/* FINAL_ROWS is cached in any case; the sizes with and without it tell whether the globs name it.
   */
static void cmd_cache(App *app) {
    const char **globs = ROOM(const char *, strlen(app->names) + 2), *list = app->names, *word;
    size_t n = 0, length, asked = 0, needed = 0, B = 1, T = 0;
    patch_cache *cache = NULL;
    int *tokens;

    if ((app->text != NULL) == (app->operands.n > 0))
        stop(app, PATCH_E_USAGE, "cache", "it runs PROMPTS or --text; give one of them");
    if (app->text != NULL) {
        const int *ids = encode_argument(app, app->text, 0, &T);
        tokens = memcpy(ROOM(int, T), ids, T * sizeof *ids);
    } else {
        const Prompts p = prompts_read(app, NEEDS(app->side), 0, 1);
        B = p.n;
        T = p.n_tokens;
        tokens = ROOM(int, B * T);
        for (size_t i = 0; i < B; i++)
            memcpy(tokens + i * T, prompt_ids(&p, i, app->side), T * sizeof *tokens);
    }
    while (next_word(&list, &word, &length))
        globs[n++] = text_of(app, "%.*s", (int)length, word);
    must(app, patch_run_with_cache(app->model, tokens, B, T, globs, n, &asked, NULL, &app->e));
    globs[n++] = FINAL_ROWS;
    must(app, patch_run_with_cache(app->model, tokens, B, T, globs, n, &needed, NULL, &app->e));
    if (needed > 1000000000 || is_terminal(2))
        fprintf(stderr, "actpatch: cache: %.1f MB of memory for activations, %.1f MB of file\n",
                (double)needed / 1e6,
                ((double)asked + 4.0 * (double)(B * T) * patch_model_dims(app->model)->d_vocab) /
                    1e6);
    must(app, patch_run_with_cache(app->model, tokens, B, T, globs, n, NULL, &cache, &app->e));
    write_cache(app, tokens, B, T, cache, asked == needed);
    patch_cache_free(cache);
}

static void cmd_fold(App *app) {
    must(app, patch_model_fold(app->model, app->outputs.items[0], &app->e));
}

/* ---- 13.7 Commands: attn, heads, lens, path, ablate ----------------------------------------- */

/* Patterns [B, heads, T, T] of the clean prompts. */
static void cmd_attn(App *app) {
    const Prompts p = prompts_read(app, NEEDS(CLEAN), 0, 1);
    const size_t T = p.n_tokens;
    size_t n;
    const patch_cell *heads = parse_heads(app, app->heads, 0, "--heads", &n);
    const float *patterns = read_patterns(app, &p, p.n, heads, n);
    double *values = ROOM(double, p.n * n * T * T);
    Common c;

    for (size_t i = 0; i < p.n * n * T * T; i++)
        values[i] = (double)patterns[i];
    common_begin(app, &p, &c);
    c.table.name = "pattern";
    c.table.metric = c.table.direction = NULL;
    c.table.values = values;
    add_axis(&c.table, "example", p.n, NULL);
    add_axis(&c.table, "head", n, head_names(app, heads, n));
    add_axis(&c.table, "dest", T, NULL);
    add_axis(&c.table, "src", T, NULL);
    give_tables(app, &p, &c.table, 1);
}

/* Scores [3, L, H] of the kinds of heads on one prompt, into a table that has no axes yet. */
static void heads_table(App *app, const int *ids, size_t n, Table *t) {
    static const char *const kinds[] = {"previous", "duplicate", "induction"};
    double *scores = ROOM(double, 3 * app->L * app->H);

    must(app, patch_head_kinds(app->model, ids, (int)n, scores, &app->e));
    t->command = t->name = "heads";
    t->metric = t->direction = NULL;
    t->values = scores;
    add_axis(t, "kind", 3, labels_of(app, kinds, 3));
    add_axis(t, "layer", app->L, NULL);
    add_axis(t, "head", app->H, labels_of(app, NULL, app->H));
}

/* A token as a JSON string; each byte that is no UTF-8 becomes U+FFFD. */
static const char *json_text(App *app, int id) {
    Text t = {0};
    size_t n = 0, length;
    const char *text = patch_token(app->model, id, &n);

    add(app, &t, "\"");
    for (size_t i = 0; i < n; i += length) {
        const uint32_t code = next_char(text + i, n - i, &length);
        if (code == UTF8_INVALID)
            add(app, &t, "\xEF\xBF\xBD");
        else if (code < 0x20)
            add(app, &t, "\\u%04x", (unsigned)code);
        else
            add(app, &t, "%s%.*s", code == '"' || code == '\\' ? "\\" : "", (int)length, text + i);
    }
    add(app, &t, "\"");
    return t.bytes;
}

/* "key":[[..],..] of values [L, H]. */
static void json_rows(App *app, Text *t, const char *key, const double *values) {
    char number[NUMBER_ROOM];

    add(app, t, ",\"%s\":", key);
    for (size_t i = 0; i < app->L * app->H; i++)
        add(app, t, "%s%s", i == 0 ? "[[" : i % app->H == 0 ? "],[" : ",",
            number_text(values[i], number));
    add(app, t, "]]");
}

/* Copying scores of the names that the file's answers are, each once: a table [2, L, H] and JSON.
   */
static void copying_table(App *app, const Prompts *p, Table *t) {
    static const char *const signs[] = {"positive", "negative"};
    const size_t n_heads = app->L * app->H;
    int *names = ROOM(int, 2 * p->n);
    double *scores = ROOM(double, 2 * n_heads);
    size_t n = 0;
    Text json = {0};

    for (size_t i = 0; i < 2 * p->n; i++) {
        const int id = i % 2 == 0 ? p->examples[i / 2].answer : p->examples[i / 2].wrong;
        size_t known = 0;
        while (known < n && names[known] != id)
            known++;
        if (known == n && (i % 2 == 0 || p->column[WRONG] >= 0))
            names[n++] = id;
    }
    must(app, patch_copying_scores(app->model, names, n, scores, scores + n_heads, &app->e));
    add(app, &json, "\"copying\":{\"names\":[");
    for (size_t i = 0; i < n; i++)
        add(app, &json, "%s%s", i ? "," : "", json_text(app, names[i]));
    add(app, &json, "]");
    json_rows(app, &json, "positive", scores);
    json_rows(app, &json, "negative", scores + n_heads);
    add(app, &json, "}");
    memset(t, 0, sizeof *t);
    t->command = "heads";
    t->name = "copying";
    t->values = scores;
    t->range = app->range;
    t->json_more = json.bytes;
    add_axis(t, "kind", 2, labels_of(app, signs, 2));
    add_axis(t, "layer", app->L, NULL);
    add_axis(t, "head", app->H, labels_of(app, NULL, app->H));
}

/* Kinds of heads on the first prompt, or on random tokens said twice. Which heads copy names costs
   many times as much; it is shown and in .json, where the prompts have answers. */
static void cmd_heads(App *app) {
    const patch_dims *d = patch_model_dims(app->model);
    const int half = d->n_ctx < 51 ? (d->n_ctx - 1) / 2 : 25, bos = !app->no_bos && d->bos >= 0;
    int n = 2 * half + bos, copying = app->outputs.n == 0;
    Table tables[2] = {{0}};
    Random *r = ROOM(Random, 1);

    for (size_t i = 0; i < app->outputs.n; i++)
        copying |= has_ending(app->outputs.items[i], ".json");
    tables[0].range = app->range;
    if (app->operands.n > 0) {
        const Prompts p = prompts_read(app, NEEDS(CLEAN), NEEDS(ANSWER) | NEEDS(WRONG), 0);
        heads_table(app, p.examples[0].clean, p.n_tokens, &tables[0]);
        copying = copying && p.column[ANSWER] >= 0;
        if (copying)
            copying_table(app, &p, &tables[1]);
    } else {
        int *ids = ROOM(int, (size_t)n + 2);
        random_seed(r, (uint32_t)app->seed);
        ids[0] = bos ? d->bos : 0;
        for (int i = 0; i < half; i++)
            ids[bos + i] = ids[bos + half + i] = (int)(random_u32(r) % (uint32_t)d->d_vocab);
        heads_table(app, ids, n > 0 ? (size_t)n : 1, &tables[0]);
        copying = 0;
    }
    tables[0].json_more = tables[1].json_more;
    give_tables(app, NULL, tables, copying && app->outputs.n == 0 ? 2 : 1);
}

/* The tables of `lens`: parts' names are "0_pre", "0_mid", ..., "final_post"; "embed", "pos_embed",
   "0_attn_out", "0_mlp_out", ...; "L0H0", ..., "remainder". */
enum { LENS_TABLES = 4 };

static char *lens_label(App *app, int which, size_t i, size_t n) {
    static const char *const firsts[] = {"embed", "pos_embed"};
    static const char *const forms[][2] = {{"%lu_pre", "%lu_mid"}, {"%lu_attn_out", "%lu_mlp_out"}};
    const unsigned long number = (unsigned long)i;

    if (which == 1 && i < 2)
        return text_of(app, "%s", firsts[i]);
    if (which != 1 && i == n - 1)
        return text_of(app, "%s", which == 2 ? "remainder" : "final_post");
    if (which == 2)
        return text_of(app, "L%luH%lu", number / app->H, number % app->H);
    return text_of(app, forms[which][i % 2], (number - (which == 1 ? 2 : 0)) / 2);
}

/* Fill all four; returns the mean logit difference and, in *bias, what of it is b_U's. */
static double lens_tables(App *app, const Prompts *p, const Common *c, Table *tables,
                          double *bias) {
    static const char *const names[LENS_TABLES] = {"accumulated", "layers", "heads", "lens"};
    const size_t L = app->L, sizes[] = {2 * L + 1, 2 * L + 2, L * app->H + 1, 2 * L + 1};
    double *values[LENS_TABLES], *logit_diff = ROOM(double, p->n), *biases = ROOM(double, p->n);

    for (int i = 0; i < LENS_TABLES; i++)
        values[i] = ROOM(double, p->n * sizes[i]);
    patch_lens lens = {0};
    lens.accumulated = values[0];
    lens.layers = values[1];
    lens.heads = values[2];
    lens.lens = values[3];
    lens.bias = biases;
    lens.logit_diff = logit_diff;
    must(app, patch_logit_lens(app->model, p->examples, p->n, &lens, &app->e));
    *bias = mean_of(biases, p->n, 1);
    const double ld = mean_of(logit_diff, p->n, 1);
    const char *more = text_of(app, "\"bias\":%.9g,\"ld\":%.9g", *bias, ld);
    for (int i = 0; i < LENS_TABLES; i++) {
        Table *t = &tables[i];
        *t = c->table;
        t->command = "lens";
        t->name = names[i];
        t->direction = NULL;
        t->json_more = more;
        t->values = mean_values(app, values[i], p->n, sizes[i]);
        if (app->per_prompt)
            add_axis(t, "example", p->n, NULL);
        char **labels = add_axis(t, "part", sizes[i], ROOM(char *, sizes[i]))->labels;
        for (size_t k = 0; k < sizes[i]; k++)
            labels[k] = lens_label(app, i % 3, k, sizes[i]);
    }
    return ld;
}

static void cmd_lens(App *app) {
    const Prompts p = prompts_read(app, NEEDS(CLEAN) | NEEDS(ANSWER) | NEEDS(WRONG), 0, 0);
    Table tables[LENS_TABLES];
    double bias;
    Common c;

    common_begin(app, &p, &c);
    const double ld = lens_tables(app, &p, &c, tables, &bias);
    if (app->outputs.n == 0)
        printf("logit difference %.9g, of which b_U %.9g\n", ld, bias);
    give_tables(app, &p, tables, LENS_TABLES);
}

/* With --normalize, that 0 / 0 is no number is told once. */
static void warn_no_difference(App *app, double clean, double corrupted) {
    if (app->normalize && clean == corrupted)
        warn("--normalize",
             "clean and corrupted mean are both %s, so values are nan or infinite; choose other "
             "prompts or another metric", text_of(app, "%.9g", clean));
}

/* n values, with --normalize between the unpatched means: 0 is the run that is patched. */
static const double *normalized(App *app, const double *values, size_t n, double clean,
                                double corrupted) {
    if (!app->normalize)
        return values;
    double *v = ROOM(double, n);
    for (size_t i = 0; i < n; i++)
        v[i] = (values[i] - (app->noising ? clean : corrupted)) / (clean - corrupted);
    return v;
}

static void cmd_path(App *app) {
    const Prompts p = prompts_read(
        app, NEEDS(CLEAN) | NEEDS(CORRUPTED) | metric_needs(app->metric), 0, 1);
    patch_path_options o = {(patch_metric)app->metric, app->noising, app->freeze_mlps, NULL, 0};
    const size_t n = app->L * app->H;
    double *values = ROOM(double, p.n * n), *unpatched = ROOM(double, 2 * p.n);
    Common c;

    if (app->to != NULL && strcmp(app->to, "final") != 0)
        o.receivers = parse_heads(app, app->to, 1, "--to", &o.n_receivers);
    must(app, patch_paths(app->model, p.examples, p.n, &o, values, unpatched, NULL, &app->e));
    common_begin(app, &p, &c);
    c.table.name = "path";
    c.table.has_baseline = 1;
    const double clean = c.table.clean = mean_of(unpatched, p.n, 2);
    const double corrupted = c.table.corrupted = mean_of(unpatched + 1, p.n, 2);
    warn_no_difference(app, clean, corrupted);
    c.table.values = normalized(app, mean_values(app, values, p.n, n),
                                app->per_prompt ? p.n * n : n, clean, corrupted);
    if (app->per_prompt)
        add_axis(&c.table, "example", p.n, NULL);
    add_axis(&c.table, "layer", app->L, NULL);
    add_axis(&c.table, "head", app->H, labels_of(app, NULL, app->H));
    give_tables(app, &p, &c.table, 1);
}

/* Number the groups that a column names. */
static void ablation_groups(App *app, const Prompts *p, patch_ablation *o) {
    const int column = named_column(app, &p->tsv, "--groups", app->groups, strlen(app->groups));
    int *groups = ROOM(int, p->n);

    o->n_groups = 0;
    for (size_t b = 0, k; b < p->n; b++) {
        const Field *mine = tsv_field(&p->tsv, b, column);
        for (k = 0; k < b; k++) {
            const Field *f = tsv_field(&p->tsv, k, column);
            if (f->length == mine->length && memcmp(f->text, mine->text, f->length) == 0)
                break;
        }
        groups[b] = k < b ? groups[k] : o->n_groups++;
    }
    o->groups = groups;
}

/* --positions: of each example the numbers in these columns (empty: none), or its end. */
static void ablation_positions(App *app, const Prompts *p, patch_ablation *o) {
    const size_t room_for = strlen(app->positions) + 1;
    int *positions = ROOM(int, p->n * room_for), *columns = ROOM(int, room_for);
    const char *list = app->positions, *word;
    char place[PLACE_ROOM];
    size_t n = 0, length, number;

    for (; next_word(&list, &word, &length); n++)
        columns[n] = is_word("end", word, length)
                         ? -1 : named_column(app, &p->tsv, "--positions", word, length);
    for (size_t b = 0; b < p->n; b++)
        for (size_t i = 0; i < n; i++) {
            const int T = p->examples[b].n_tokens;
            const Field *f = columns[i] < 0 ? NULL : tsv_field(&p->tsv, b, columns[i]);
            const size_t used = f == NULL ? 0 : parse_digits(f->text, f->length, &number);
            if (f != NULL && (used != f->length || (used > 0 && number >= (size_t)T)))
                stop(app, PATCH_E_INPUT, tsv_place(&p->tsv, b + 1, place),
                     "%.*s is no position of %d tokens; give a number from 0 or nothing",
                     f->length < 20 ? (int)f->length : 20, f->text, T);
            positions[b * n + i] = f == NULL ? T - 1 : used > 0 ? (int)number : -1;
        }
    o->positions = positions;
    o->n_positions = (int)n;
}

/* What a circuit is worth (Wang et al. 2022, section 4): sets of heads that are kept while all
   others are ablated. The first set is the circuit, the second nothing, the others the circuit
   without one of its heads; JSON of their means. F(M\K), everything but one head, is what ablating
   that head alone leaves. */
static char *judge_circuit(App *app, const Prompts *p, const patch_cell *heads, size_t n,
                           patch_ablation o, double whole) {
    const size_t n_sets = n + 2;
    patch_cell *cells = ROOM(patch_cell, n * n);
    size_t *sets = ROOM(size_t, n_sets + 1), at = n;
    double *values = ROOM(double, p->n * n_sets), *alone = ROOM(double, p->n * n);
    Text t = {0};
    char number[2][NUMBER_ROOM];

    memcpy(cells, heads, n * sizeof *cells);
    sets[1] = sets[2] = n;
    for (size_t i = 0; i < n; i++, sets[i + 2] = at)
        for (size_t k = 0; k < n; k++)
            if (k != i)
                cells[at++] = heads[k];
    must(app, patch_ablate(app->model, p->examples, p->n, cells, sets, n_sets, &o, values, NULL,
                           NULL, &app->e));
    o.keep = 0;
    for (size_t i = 0; i <= n; i++)
        sets[i] = i;
    must(app, patch_ablate(app->model, p->examples, p->n, heads, sets, n, &o, alone, NULL, NULL,
                           &app->e));
    const double kept = mean_of(values, p->n, n_sets), nothing = mean_of(values + 1, p->n, n_sets);
    const double faithfulness = (kept - nothing) / (whole - nothing);
    add(app, &t, "\"ablated\":%.9g,\n\"faithfulness\":%s,\n\"circuit\":[", nothing,
        isfinite(faithfulness) ? number_text(faithfulness, number[0]) : "null");
    for (size_t i = 0; i < n; i++) {
        const double without = mean_of(values + 2 + i, p->n, n_sets);
        add(app, &t, "%s\n{\"head\":\"L%dH%d\",\"minimality\":%s,\"completeness\":%s}",
            i ? "," : "", heads[i].layer, heads[i].head, number_text(kept - without, number[0]),
            number_text(without - mean_of(alone + i, p->n, n), number[1]));
    }
    add(app, &t, "]");
    return t.bytes;
}

/* Cells of a site one by one, or a list of heads together. */
static void cmd_ablate(App *app) {
    patch_ablation o = {0};
    patch_shape shape = {0};
    patch_cell *cells;
    size_t n_heads = 0;
    Random *r = ROOM(Random, 1);
    Text more = {0};
    Common c;

    if ((app->site != NULL) == (app->heads != NULL))
        stop(app, PATCH_E_USAGE, "ablate",
             "it wants a site or heads; give --site SWEEP or --heads 9.6,10.0");
    if (app->site != NULL && (app->keep || app->positions != NULL))
        stop(app, PATCH_E_USAGE, "ablate", "--keep and --positions are for heads; give --heads");
    const Prompts p = prompts_read(app, NEEDS(CLEAN) | metric_needs(app->metric), 0, 1);
    o.by = (patch_by)app->by;
    o.metric = (patch_metric)app->metric;
    o.n_groups = 1;
    o.noise = app->noise;
    o.seed = (unsigned)app->seed;
    o.keep = app->keep;
    if (app->groups != NULL)
        ablation_groups(app, &p, &o);
    if (app->positions != NULL)
        ablation_positions(app, &p, &o);
    int *partner = ROOM(int, p.n); /* one of the other examples at random; alone, itself */
    random_seed(r, o.seed);
    for (size_t b = 0; b < p.n; b++)
        partner[b] = p.n < 2 ? 0 : (int)((b + 1 + random_u32(r) % (p.n - 1)) % p.n);
    o.partner = partner;
    if (app->site != NULL) {
        const int T = (int)p.n_tokens;
        must(app, patch_sweep_cells(app->model, app->site, T, &shape, NULL, &app->e));
        cells = ROOM(patch_cell, shape.n_cells);
        must(app, patch_sweep_cells(app->model, app->site, T, &shape, cells, &app->e));
    } else
        cells = parse_heads(app, app->heads, 0, "--heads", &n_heads);
    const size_t n_sets = app->site != NULL ? shape.n_cells : 1;
    size_t *sets = ROOM(size_t, n_sets + 1);
    for (size_t i = 0; i <= n_sets; i++)
        sets[i] = app->site != NULL ? i : i * n_heads;
    double *values = ROOM(double, p.n * n_sets), *unpatched = ROOM(double, p.n);
    must(app, patch_ablate(app->model, p.examples, p.n, cells, sets, n_sets, &o, values, unpatched,
                           NULL, &app->e));
    common_begin(app, &p, &c);
    c.table.direction = NULL;
    c.table.name = app->site ? app->site : "heads";
    c.table.has_baseline = 1;
    c.table.clean = mean_of(unpatched, p.n, 1);
    c.table.corrupted = (double)NAN;
    add(app, &more, "\"by\":\"%s\",\n\"seed\":%d,\n\"noise\":%.9g,\n\"keep\":%s,\n\"heads\":[",
        WAYS[app->by], app->seed, app->noise, app->keep ? "true" : "false");
    for (size_t i = 0; i < n_heads; i++)
        add(app, &more, i ? ",\"%d.%d\"" : "\"%d.%d\"", cells[i].layer, cells[i].head);
    add(app, &more, "]");
    const char *judged =
        app->keep ? judge_circuit(app, &p, cells, n_heads, o, c.table.clean) : NULL;
    if (judged != NULL)
        add(app, &more, ",\n%s", judged);
    c.table.json_more = more.bytes;
    for (size_t i = 0; app->normalize && i < p.n * n_sets; i++) /* minus the baseline */
        values[i] -= app->per_prompt ? unpatched[i / n_sets] : c.table.clean;
    add_axes(app, &c.table, p.n, &shape);
    if (app->site == NULL)
        add_axis(&c.table, "part", 1, NULL);
    c.table.values = mean_values(app, values, p.n, n_sets);
    give_tables(app, &p, &c.table, 1);
    if (judged != NULL && app->outputs.n == 0)
        printf("%s\n", judged);
}

/* ---- 13.8 Command: trace -------------------------------------------------------------------- */

enum { TRACE_KINDS = 3, TRACE_GROUPS = 6, NOISE_SHOWN = 10 };
static const char *const TRACES[] = {"resid", "mlp", "attn"};
static const char *const GROUPS[] = {"first_subject", "middle_subject", "last_subject",
                                     "first_subsequent", "further", "last"};

typedef struct TracedFact {
    patch_fact fact;
    size_t line;
    int skipped;
    double high, low, *cells; /* [3, T, L] */
} TracedFact;

typedef struct Facts {
    Tsv tsv;
    TracedFact *facts; /* [n] */
    size_t n, skipped;
    int kinds; /* bits */
    double sigma;
} Facts;

/* The tokens that the subject's first match in the text lies in: where tokens begin and end in
   bytes tells it. */
static void find_subject(App *app, const Field *prompt, const Field *subject, patch_fact *f,
                         int bos, const char *place) {
    size_t at = 0, end = 0, length;

    while (at + subject->length <= prompt->length &&
           memcmp(prompt->text + at, subject->text, subject->length) != 0)
        at++;
    if (subject->length == 0 || at + subject->length > prompt->length)
        stop(app, PATCH_E_INPUT, place,
             "the subject does not stand in its prompt; correct one of them");
    f->begin = f->end = 0;
    for (int i = bos; i < f->n_tokens && end < at + subject->length; i++) {
        patch_token(app->model, f->tokens[i], &length);
        end += length;
        f->begin = f->end == 0 && end > at ? i : f->begin;
        f->end = end > at ? i + 1 : 0;
    }
}

/* The model's most likely token behind the prompt; a fact with another attribute is skipped. */
static void fact_answer(App *app, TracedFact *t, const Field *attribute) {
    const Scored *list = final_logits(app, t->fact.tokens, (size_t)t->fact.n_tokens);
    size_t n;
    const char *token = patch_token(app->model, t->fact.answer = list[0].id, &n);

    for (; n > 0 && strchr(" \n\t", *token) != NULL && *token != '\0'; n--)
        token++;
    while (n > 0 && strchr(" \n\t", token[n - 1]) != NULL && token[n - 1] != '\0')
        n--;
    t->skipped = attribute != NULL && attribute->length > 0 &&
                 (attribute->length != n || memcmp(attribute->text, token, n) != 0);
}

/* Read the file, find subjects and answers; sigma is of the embeddings of all subjects' tokens. */
static void read_facts(App *app, Facts *f) {
    const int bos = app->bos && !app->no_bos;
    char place[PLACE_ROOM];
    size_t n, n_ids = 0;

    f->tsv = tsv_read(app, app->operands.items[0]);
    const int prompt = tsv_column(app, &f->tsv, "prompt", 6);
    const int subject = tsv_column(app, &f->tsv, "subject", 7);
    const int attribute = tsv_column(app, &f->tsv, "attribute", 9);
    if (prompt < 0 || subject < 0)
        stop(app, PATCH_E_INPUT, f->tsv.path,
             "no column %s; the first line names prompt, subject and attribute",
             prompt < 0 ? "prompt" : "subject");
    f->n = f->tsv.n_rows;
    f->facts = ROOM(TracedFact, f->n);
    for (size_t row = 0; row < f->n; row++) /* a token is a byte or more */
        n_ids += tsv_field(&f->tsv, row, subject)->length;
    int *subject_ids = ROOM(int, n_ids);
    n_ids = 0;
    for (size_t row = 0; row < f->n; row++) {
        const Field *text = tsv_field(&f->tsv, row, prompt);
        const Field *name = tsv_field(&f->tsv, row, subject);
        TracedFact *t = &f->facts[row];

        tsv_place(&f->tsv, row + 1, place);
        t->line = f->tsv.lines[row + 1];
        t->fact.tokens = encode(app, text->text, text->length, bos, &n);
        t->fact.n_tokens = (int)n;
        check_ids(app, t->fact.tokens, n, 0, "prompt", place);
        find_subject(app, text, name, &t->fact, bos, place);
        must(app, patch_encode(app->model, name->text, name->length, 0, subject_ids + n_ids,
                               name->length, &n, &app->e));
        n_ids += n;
        fact_answer(app, t, attribute < 0 ? NULL : tsv_field(&f->tsv, row, attribute));
        f->skipped += (size_t)t->skipped;
    }
    must(app, patch_trace_sigma(app->model, subject_ids, n_ids, app->noise, &f->sigma, &app->e));
}

/* Is token i of a fact in a group? A token of a one-token subject is both first and last. */
static int in_group(const patch_fact *f, int i, int group) {
    switch (group) {
    case 0: return i == f->begin;
    case 1: return i > f->begin && i < f->end - 1;
    case 2: return i == f->end - 1;
    case 3: return i == f->end && i < f->n_tokens;
    case 4: return i > f->end && i < f->n_tokens - 1;
    default: return i == f->n_tokens - 1;
    }
}

/* AIE: the mean over all facts' tokens of a group, less the mean low, and 1.96 standard errors. */
static double group_average(const Facts *f, int kind, int group, size_t layer, size_t L,
                            double *band) {
    double sum = 0, square = 0, low = 0, n = 0, facts = 0;

    for (size_t k = 0; k < f->n; k++) {
        const TracedFact *t = &f->facts[k];
        if (t->skipped)
            continue;
        facts++;
        low += t->low;
        for (int i = 0; i < t->fact.n_tokens; i++) {
            const double v = t->cells[(size_t)(kind * t->fact.n_tokens + i) * L + layer];
            if (!in_group(&t->fact, i, group))
                continue;
            n++;
            sum += v;
            square += v * v;
        }
    }
    *band = n > 0 ? 1.96 * sqrt(fabs(square / n - sum / n * (sum / n))) / sqrt(facts) : (double)NAN;
    return n > 0 ? sum / n - low / facts : (double)NAN;
}

/* "key":[..], what stands before it too. */
static void json_list(FILE *f, const char *before, const char *key, const double *v, size_t n) {
    fprintf(f, "%s\"%s\":[", before, key);
    for (size_t i = 0; i < n; i++) {
        fputs(i ? "," : "", f);
        json_number(f, v[i]);
    }
    fputc(']', f);
}

static void write_fact(FILE *f, App *app, int kinds, const TracedFact *t) {
    const size_t T = (size_t)t->fact.n_tokens;
    const char *before = "";

    fprintf(f, "{\"line\":%lu,\"tokens\":[", (unsigned long)t->line);
    for (size_t i = 0; i < T; i++) {
        fputs(i ? "," : "", f);
        fputs(json_text(app, t->fact.tokens[i]), f);
    }
    fprintf(f, "],\"subject\":[%d,%d],\"answer\":", t->fact.begin, t->fact.end);
    fputs(json_text(app, t->fact.answer), f);
    fputs(",\"high\":", f);
    json_number(f, t->high);
    fputs(",\"low\":", f);
    json_number(f, t->low);
    fputs(",\"kinds\":{", f);
    for (size_t kind = 0; kind < TRACE_KINDS; kind++) {
        if (!(kinds >> kind & 1))
            continue;
        fprintf(f, "%s\"%s\":[", before, TRACES[kind]);
        for (size_t i = 0; i < T * app->L; i++) {
            fputs(i == 0 ? "[" : i % app->L == 0 ? "],[" : ",", f);
            json_number(f, t->cells[kind * T * app->L + i]);
        }
        fputs("]]", f);
        before = ",";
    }
    fputs("}}", f);
}

/* All facts and the averages; `averages` are the means [kinds, groups, L], then their bands. */
static void write_trace(App *app, const Facts *facts, const Table *averages, const char *path) {
    const size_t L = app->L;
    const char *before = "\n";
    double z[NOISE_SHOWN];

    must(app, out_open(&app->out, path, &app->e));
    FILE *f = app->out.f;
    patch_trace_noise(1, z, NOISE_SHOWN);
    fprintf(f, "{\"command\":\"trace\",\"sigma\":%.17g", facts->sigma);
    json_list(f, ",", "z", z, NOISE_SHOWN);
    fputs(",\"facts\":[", f);
    for (size_t k = 0; k < facts->n; k++)
        if (!facts->facts[k].skipped) {
            fputs(before, f);
            write_fact(f, app, facts->kinds, &facts->facts[k]);
            before = ",\n";
        }
    fprintf(f, "],\n\"skipped\":%lu,\"averages\":{", (unsigned long)facts->skipped);
    for (size_t kind = 0; kind < averages->axis[0].size; kind++) {
        fprintf(f, "%s\n\"%s\":{", kind ? "," : "", averages->axis[0].labels[kind]);
        for (size_t group = 0; group < TRACE_GROUPS; group++) {
            const size_t at = (kind * TRACE_GROUPS + group) * L;
            fprintf(f, "%s\"%s\":{", group ? "," : "", GROUPS[group]);
            json_list(f, "", "mean", averages->values + at, L);
            json_list(f, ",", "band", averages->band + at, L);
            fputc('}', f);
        }
        fputc('}', f);
    }
    fputs("}}\n", f);
    must(app, out_close(&app->out, &app->e));
}

/* A fact's table [kind, pos, layer], or (t == NULL) the averages' [kind, group, layer]. */
static Table trace_table(App *app, const Facts *f, const TracedFact *t) {
    const size_t L = app->L, rows = t ? (size_t)t->fact.n_tokens : TRACE_GROUPS;
    double *values = ROOM(double, TRACE_KINDS * rows * L),
           *band = ROOM(double, TRACE_KINDS * rows * L);
    const char *words[TRACE_KINDS];
    size_t n = 0, length;
    Table table = {0};

    table.command = "trace";
    table.name = t ? "trace" : "averages";
    table.metric = METRICS[PATCH_PROB];
    table.range = app->range;
    table.values = values;
    for (int kind = 0; kind < TRACE_KINDS; kind++) {
        if (!(f->kinds >> kind & 1))
            continue;
        for (size_t i = 0; i < rows * L; i++) {
            const size_t at = n * rows * L + i;
            values[at] = t != NULL ? t->cells[(size_t)kind * rows * L + i]
                                   : group_average(f, kind, (int)(i / L), i % L, L, &band[at]);
        }
        words[n++] = TRACES[kind];
    }
    add_axis(&table, "kind", n, labels_of(app, words, n));
    if (t == NULL) {
        add_axis(&table, "group", rows, labels_of(app, GROUPS, rows));
        table.band = band;
    } else {
        char **labels = add_axis(&table, "pos", rows, ROOM(char *, rows))->labels;
        for (int i = 0; i < t->fact.n_tokens; i++) { /* the subject has stars */
            const char *token = patch_token(app->model, t->fact.tokens[i], &length);
            labels[i] = text_of(app, "%.*s%s", (int)length, token,
                                i >= t->fact.begin && i < t->fact.end ? "*" : "");
        }
        table.has_baseline = 1;
        table.clean = t->high;
        table.corrupted = t->low;
    }
    add_axis(&table, "layer", L, NULL);
    return table;
}

/* --kind resid,mlp,attn as bits. */
static int trace_kinds(App *app) {
    const char *list = app->kind ? app->kind : "resid,mlp,attn", *word;
    int kinds = 0;

    for (size_t n; next_word(&list, &word, &n);) {
        int k = 0;
        while (k < TRACE_KINDS && !is_word(TRACES[k], word, n))
            k++;
        if (k == TRACE_KINDS)
            stop(app, PATCH_E_USAGE, "--kind", "unknown kind %.*s; choose resid, mlp or attn",
                 n < 60 ? (int)n : 60, word);
        kinds |= 1 << k;
    }
    return kinds;
}

static void cmd_trace(App *app) {
    patch_trace_options o = {app->samples, app->window, app->severed, 0, 0, PATCH_PROB};
    const TracedFact *last = NULL;
    Facts f = {0};

    f.kinds = o.kinds = trace_kinds(app);
    read_facts(app, &f);
    o.sigma = f.sigma;
    for (size_t i = 0; i < f.n; i++) {
        TracedFact *t = &f.facts[i];

        if (t->skipped)
            continue;
        t->cells = ROOM(double, TRACE_KINDS * (size_t)t->fact.n_tokens * app->L);
        must(app,
             patch_trace(app->model, &t->fact, &o, &t->high, &t->low, t->cells, NULL, &app->e));
        last = t;
        if (is_terminal(2) && f.n > 1)
            fprintf(stderr, i + 1 < f.n ? "\r%lu of %lu facts\x1b[K" : "\r\x1b[K",
                    (unsigned long)(i + 1), (unsigned long)f.n);
    }
    if (last == NULL)
        stop(app, PATCH_E_INPUT, f.tsv.path, "the model knows none of the %lu facts; leave their "
             "attribute empty or give others", (unsigned long)f.n);
    const Table averages = trace_table(app, &f, NULL);
    const Table table = f.n == 1 ? trace_table(app, &f, last) : averages;
    for (size_t i = 0; i < app->outputs.n; i++) {
        const char *path = app->outputs.items[i];

        if (has_ending(path, ".json"))
            write_trace(app, &f, &averages, path);
        else if (has_ending(path, ".npy") && f.n > 1)
            stop(app, PATCH_E_INPUT, path, ".npy holds one fact, not %lu; write .json",
                 (unsigned long)f.n);
        else
            must(app, write_tables(path, app->command->formats, &table, 1, &app->e));
    }
    if (app->outputs.n == 0)
        write_screen(stdout, &table, screen_of(app));
}

/* ---- 13.9 Sweeps: cells and tables ---------------------------------------------------------- */

/* The sweeps of one call, each a list of cells. What several of them share (*_every sweeps consist
   of others) is computed once. */
typedef struct Sweeps {
    const char *name[MAX_SWEEPS];
    size_t n;                     /* sweeps */
    patch_shape shape[MAX_SWEEPS];
    size_t start[MAX_SWEEPS + 1]; /* where a sweep's cells begin among all */
    size_t *slot;                 /* [all]: which distinct cell each of them is */
    patch_cell *cells;            /* [n_cells], the distinct ones */
    size_t n_cells;
} Sweeps;

/* Names parted by commas; `all` is every one but that whose size is quadratic in the prompt. */
static void choose_sweeps(App *app, const char *list, Sweeps *s) {
    const char *word, *known;

    for (size_t n; next_word(&list, &word, &n);) {
        const int all = is_word("all", word, n);
        int found = 0;
        for (size_t i = 0; (known = patch_sweep_name(i)) != NULL; i++) {
            size_t k = 0;
            if (all ? strcmp(known, "attn_head_pattern_dest_src_pos") == 0
                    : !is_word(known, word, n))
                continue;
            while (k < s->n && s->name[k] != known)
                k++;
            if (k == s->n && k < MAX_SWEEPS) /* named twice, made once */
                s->name[s->n++] = known;
            found = 1;
        }
        if (!found)
            stop(app, PATCH_E_USAGE, "--sweep", "unknown sweep %.*s; see actpatch patch -h",
                 n < 60 ? (int)n : 60, word);
    }
}

static int compare_cells(const void *a, const void *b) {
    return memcmp(a, b, sizeof(patch_cell)); /* ints, no padding */
}

/* All cells of the chosen sweeps over prompts of n_tokens, each distinct one once. */
static void plan_sweeps(App *app, const patch_model *model, size_t n_tokens, Sweeps *s) {
    const int T = (int)n_tokens;
    size_t n_sorted = 0;

    for (size_t i = 0; i < s->n; i++) {
        must(app, patch_sweep_cells(model, s->name[i], T, &s->shape[i], NULL, &app->e));
        s->start[i + 1] = s->start[i] + s->shape[i].n_cells;
    }
    const size_t n = s->start[s->n];
    s->cells = ROOM(patch_cell, n);
    s->slot = ROOM(size_t, n);
    for (size_t i = 0; i < s->n; i++)
        must(app, patch_sweep_cells(model, s->name[i], T, &s->shape[i], s->cells + s->start[i],
                                    &app->e));
    patch_cell *sorted = memcpy(ROOM(patch_cell, n), s->cells, n * sizeof *sorted);
    size_t *number = ROOM(size_t, n); /* of a sorted cell among the distinct, from 1 */
    qsort(sorted, n, sizeof *sorted, compare_cells);
    for (size_t i = 0; i < n; i++)
        if (i == 0 || compare_cells(&sorted[i], &sorted[n_sorted - 1]) != 0)
            sorted[n_sorted++] = sorted[i];
    for (size_t i = 0; i < n; i++) {
        const patch_cell *same = bsearch(&s->cells[i], sorted, n_sorted, sizeof *sorted,
                                         compare_cells);
        if (number[same - sorted] == 0) {
            s->cells[s->n_cells] = s->cells[i];
            number[same - sorted] = ++s->n_cells;
        }
        s->slot[i] = number[same - sorted] - 1;
    }
}

/* The tables of the sweeps, without values, for n examples. Kinds of an *_every sweep are called as
   their hook points; z is a head's output. */
static Table *sweep_tables(App *app, const Sweeps *s, const Common *c, size_t n) {
    Table *tables = ROOM(Table, s->n);
    char name[64];

    for (size_t i = 0; i < s->n; i++) {
        Table *t = &tables[i];

        *t = c->table;
        t->name = s->name[i];
        add_axes(app, t, n, &s->shape[i]);
        for (Axis *axis = t->axis; axis < t->axis + t->rank; axis++) {
            if (strcmp(axis->name, "kind") != 0)
                continue;
            axis->labels = ROOM(char *, axis->size);
            for (size_t k = 0; k < axis->size; k++) {
                const size_t cell = s->start[i] + k * (s->shape[i].n_cells / axis->size);
                const patch_hook hook = s->cells[s->slot[cell]].hook;
                patch_hook_name(hook, 0, name, sizeof name);
                axis->labels[k] = text_of(app, "%s", hook == PATCH_Z ? "out"
                                                                     : strstr(name, "hook_") + 5);
            }
        }
    }
    return tables;
}

/* ---- 13.10 Part files: resuming, shards -----------------------------------------------------
   What a sweep has finished is appended to OUT.part, and the same command goes on from there. The
   file has a head, lines "key: value" of all that the values depend on and all that the tables are
   made of, so that `merge` needs neither model nor prompts; then records, in any order, each
        u64 first item   u64 count n   f64 values [n]   f64 unpatched [examples touched, 2]
        u32 CRC-32 of all that
   little-endian. An item is one cell of one example, example * n_cells + cell. A record that is cut
   short or damaged ends the file: it is computed again. */

#define PART_MAGIC "actpatch part 2\nhead: "
enum { PART_LENGTH = 22, PART_SHARD = 33 }; /* where the head's length and the line `shard` stand */

typedef struct Part {
    const char *path;
    FILE *f;          /* NULL: nothing is kept */
    const char *head; /* n_head bytes */
    size_t n_head, n_cells, n_items;
    double *values, *unpatched; /* [n_items], [examples, 2] */
    unsigned char *have;        /* [n_items] 1: the value is there */
    long writes_left;           /* fault hook: die by SIGKILL at this write, 0: never */
    size_t done, wanted;        /* for who waits */
    double started;
} Part;

static uint64_t double_bits(double x) {
    uint64_t bits;

    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static double bits_double(uint64_t bits) {
    double x;

    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Bytes of a record of items first .. first + n - 1. */
static size_t record_bytes(const Part *p, size_t first, size_t n, size_t *examples) {
    *examples = (first + n - 1) / p->n_cells - first / p->n_cells + 1;
    return 16 + 8 * n + 16 * *examples + 4;
}

/* Take over one record's numbers; returns its length, 0 where it is damaged. */
static size_t part_record(Part *p, const unsigned char *r, size_t left) {
    const uint64_t first = left >= 16 ? get_u64(r) : 0, n = left >= 16 ? get_u64(r + 8) : 0;
    size_t examples;

    if (n == 0 || first >= p->n_items || n > p->n_items - first)
        return 0;
    const size_t length = record_bytes(p, (size_t)first, (size_t)n, &examples);
    if (length > left || crc32_of(0, r, length - 4) != get_u32(r + length - 4))
        return 0;
    for (size_t i = 0; i < n; i++)
        p->values[first + i] = bits_double(get_u64(r + 16 + 8 * i));
    memset(p->have + first, 1, (size_t)n);
    for (size_t i = 0; i < 2 * examples; i++)
        p->unpatched[first / p->n_cells * 2 + i] =
            bits_double(get_u64(r + 16 + 8 * ((size_t)n + i)));
    return length;
}

/* Refuse a head that is not the wanted one: say the first line in which they differ. */
static NORETURN void other_head(App *app, const char *path, const char *want, size_t n_want,
                                const char *got, size_t n_got) {
    size_t line = 0;

    for (size_t i = 0; i < n_want && i < n_got && want[i] == got[i]; i++)
        if (want[i] == '\n')
            line = i + 1;
    const int width = line < n_got ? (int)strcspn(got + line, "\n") : 0;
    stop(app, PATCH_E_INPUT, path,
         "holds the part of another run (%.*s); remove it or give the settings it was made with",
         width > 120 ? 120 : width, got + (line < n_got ? line : 0));
}

/* All records of a part file's bytes, behind its head; returns how many bytes are sound. */
static size_t part_records(Part *p, const char *bytes, size_t n) {
    size_t at = p->n_head, length;

    while (at < n && (length = part_record(p, (const unsigned char *)bytes + at, n - at)) > 0)
        at += length;
    return at;
}

/* Open a part file, going on with what is there. An unsound end is cut off by writing the file
   anew. */
static void part_open(App *app, Part *p) {
    const char *die = getenv("ACTPATCH_DIE_AT_WRITE"); /* for the tests */
    FILE *there = !is_ordinary(p->path) ? NULL : fopen(p->path, "rb");
    size_t n = 0, sound = 0;
    const char *bytes = there != NULL ? read_file(app, p->path, &n) : "";

    if (there != NULL)
        fclose(there);
    p->writes_left = die ? atol(die) : 0;
    if (n >= p->n_head && memcmp(bytes, p->head, p->n_head) == 0)
        sound = part_records(p, bytes, n);
    else if (n >= p->n_head || memcmp(bytes, p->head, n) != 0) { /* else killed in the head */
        const size_t skip = n > PART_SHARD ? PART_SHARD : 0;
        other_head(app, p->path, p->head + skip, p->n_head - skip, bytes + skip, n - skip);
    }
    if (sound == 0 || sound < n) {
        must(app, out_open(&app->out, p->path, &app->e));
        fwrite(sound ? bytes : p->head, 1, sound ? sound : p->n_head, app->out.f);
        must(app, out_close(&app->out, &app->e));
    }
    if ((p->f = fopen(p->path, "ab")) == NULL)
        stop(app, PATCH_E_IO, p->path, "cannot be written (%s); name another output",
             strerror(errno));
    app->part = p;
}

/* patch_cells_options.done: append what is finished to the file; after a second show cells, rate
   and time left. */
static patch_status part_append(void *ctx, size_t first, size_t n, const double *values,
                                patch_error *e) {
    Part *p = ctx;
    size_t examples, at = 16;
    const size_t length = record_bytes(p, first, n, &examples);
    const double *unpatched = p->unpatched + first / p->n_cells * 2, seconds = now() - p->started;

    p->done += n;
    if (is_terminal(2) && seconds > 1)
        fprintf(stderr,
                p->done < p->wanted ? "\r%lu of %lu cells, %.0f a second, %.0f s left\x1b[K"
                                    : "\r\x1b[K",
                (unsigned long)p->done, (unsigned long)p->wanted, (double)p->done / seconds,
                (double)(p->wanted - p->done) * seconds / (double)p->done);
    memset(p->have + first, 1, n);
    if (p->f == NULL)
        return PATCH_OK;
    unsigned char *r = take(&HEAP, length, 1);
    if (r == NULL)
        return no_memory(e, p->path, length);
    set_little(r, first, 8);
    set_little(r + 8, n, 8);
    for (size_t i = 0; i < n + 2 * examples; i++, at += 8)
        set_little(r + at, double_bits(i < n ? values[i] : unpatched[i - n]), 8);
    set_little(r + at, crc32_of(0, r, at), 4);
#ifdef SIGKILL
    if (p->writes_left > 0 && --p->writes_left == 0) { /* half a record, then death */
        fwrite(r, 1, length / 2, p->f);
        fflush(p->f);
        raise(SIGKILL);
    }
#endif
    const int ok = fwrite(r, 1, length, p->f) == length && fflush(p->f) == 0;
    give(&HEAP, r);
    return ok ? PATCH_OK
              : fail(e, PATCH_E_IO, p->path, "could not be written (%s); make room and run this "
                     "again, it goes on from here", strerror(errno));
}

/* Close. A part whose whole is written elsewhere, or that holds nothing, is not needed any more. */
static void part_close(Part *p, int finished) {
    if (p->f == NULL)
        return;
    fclose(p->f);
    p->f = NULL;
    if (finished || memchr(p->have, 1, p->n_items) == NULL)
        remove(p->path);
}

static void hash_text(Sha256 *h, char hex[65]) {
    sha256_end(h, hex);
    sha256_begin(h);
}

/* The head of a part file: see above. What a model is, its file's front tells, which holds every
   tensor's checksum; `sha256` is the whole file's, for the tables. */
static void part_head(App *app, Part *part, const Common *c, const Prompts *p) {
    const ModelFile *f = &app->model->file;
    char prompts[65], model[65], length[11];
    Text t = {0};
    Sha256 h;

    sha256_begin(&h);
    for (size_t i = 0; i < p->n; i++) {
        const patch_example *x = &p->examples[i];
        const int numbers[] = {x->n_tokens, x->answer, x->wrong};
        sha256_add(&h, numbers, sizeof numbers);
        sha256_add(&h, x->clean, (size_t)x->n_tokens * sizeof(int));
        sha256_add(&h, x->corrupted, (size_t)x->n_tokens * sizeof(int));
    }
    hash_text(&h, prompts);
    sha256_add(&h, f->front, f->tokenizer_at + f->tokenizer_bytes);
    hash_text(&h, model);
    add(app, &t,
        PART_MAGIC "0000000000\nshard: %s\nsweeps: %s\nmetric: %s\nnoising: %d\nnormalize: %d\n"
        "per-prompt: %d\nsettings: %s\nkernels: %s\nmodel: %s\nprompts: %s\nsha256: %s\n"
        "examples: %lu\nlayers: %lu\nheads: %lu\npositions: %lu\ntexts:",
        app->shard ? app->shard : "1/1", app->sweeps, c->table.metric, app->noising, app->normalize,
        app->per_prompt, c->table.json_settings, patch_model_dims(app->model)->kernels, model,
        prompts, c->model, (unsigned long)p->n, (unsigned long)app->L, (unsigned long)app->H,
        (unsigned long)p->n_tokens);
    for (size_t i = 0; i < p->n_tokens; i++) /* any bytes: in hexadecimal */
        for (size_t k = 0; k <= c->table.token_bytes[i]; k++)
            add(app, &t, k ? "%02x" : " ",
                (unsigned)(unsigned char)c->table.tokens[i][k ? k - 1 : 0]);
    add(app, &t, "\ntokens: %s\n\n", c->table.json_tokens);
    snprintf(length, sizeof length, "%010lu", (unsigned long)t.length);
    memcpy(t.bytes + PART_LENGTH, length, 10);
    part->head = t.bytes;
    part->n_head = t.length;
}

static void part_room(App *app, Part *p, size_t n, size_t n_cells) {
    p->n_cells = n_cells;
    if (!size_times(n, n_cells, &p->n_items))
        must(app, no_memory(&app->e, "--sweep", SIZE_MAX));
    p->values = ROOM(double, p->n_items);
    p->have = ROOM(unsigned char, p->n_items);
    p->unpatched = ROOM(double, 2 * n);
}

/* I/N of --shard: items first .. end - 1 of all. */
static void shard_range(App *app, size_t items, size_t *first, size_t *end) {
    size_t i = 1, n = 1;

    if (app->shard != NULL) {
        const size_t used = parse_digits(app->shard, strlen(app->shard), &i);
        if (used == 0 || app->shard[used] != '/' || !parse_size(app->shard + used + 1, 0, &n) ||
            i < 1 || i > n || n > 1000000)
            stop(app, PATCH_E_USAGE, "--shard", "%.40s is no shard; give I/N with I from 1 to N",
                 app->shard);
    }
    *first = items / n * (i - 1) + (items % n < i - 1 ? items % n : i - 1);
    *end = *first + items / n + (i <= items % n);
}

/* Compute the items first .. end - 1 that the part does not have yet. */
static void compute_items(App *app, const Sweeps *s, const Prompts *p, Part *part, size_t first,
                          size_t end, patch_stats *stats) {
    patch_cells_options o = {0};

    o.metric = (patch_metric)app->metric;
    o.noising = app->noising;
    o.brute = app->brute;
    o.unpatched = part->unpatched;
    o.done = part_append;
    o.ctx = part;
    part->started = now();
    for (size_t at = first; at < end; at++)
        part->wanted += part->have[at] == 0;
    for (size_t at = first, next; at < end; at = next) {
        for (next = at; next < end && part->have[next] == part->have[at];)
            next++;
        o.first = at;
        o.count = next - at;
        if (!part->have[at])
            must(app, patch_cells(app->model, p->examples, p->n, s->cells, s->n_cells, &o,
                                  part->values, stats, &app->e));
    }
}

/* The tables' values from those of all items. */
static void fill_tables(App *app, const Sweeps *s, const Part *p, size_t n, Table *tables) {
    const double clean = mean_of(p->unpatched, n, 2), corrupted = mean_of(p->unpatched + 1, n, 2);

    for (size_t i = 0; i < s->n; i++) {
        const size_t *slot = s->slot + s->start[i], n_cells = s->shape[i].n_cells;
        const size_t rows = app->per_prompt ? n : 1;
        double *v = ROOM(double, rows * n_cells);
        Table *t = &tables[i];

        t->has_baseline = 1;
        t->clean = clean;
        t->corrupted = corrupted;
        for (size_t k = 0; k < rows * n_cells; k++) {
            const double *at = p->values + k / n_cells * p->n_cells + slot[k % n_cells];
            v[k] = app->per_prompt ? *at : mean_of(at, n, p->n_cells);
        }
        t->values = normalized(app, v, rows * n_cells, clean, corrupted);
    }
    warn_no_difference(app, clean, corrupted);
}

/* What it cost, a JSON object. */
static const char *json_stats(App *app, const patch_stats *s) {
    const struct {
        const char *name;
        double value;
    } stats[] = {{"cells", s->cells},
                 {"cells_skipped", s->cells_skipped},
                 {"rows", s->rows},
                 {"rows_shared", s->rows_shared},
                 {"flops", s->flops},
                 {"weight_bytes_read", s->weight_bytes_read},
                 {"passes", s->passes},
                 {"seconds_plan", s->seconds_plan},
                 {"seconds_products", s->seconds_products},
                 {"seconds_attention", s->seconds_attention},
                 {"seconds_rest", s->seconds_rest},
                 {"seconds_metric", s->seconds_metric},
                 {"peak_bytes", s->peak_bytes}};
    Text t = {0};

    for (size_t i = 0; i < sizeof stats / sizeof *stats; i++)
        add(app, &t, "%s\"%s\":%.9g", i ? ",\n" : "{", stats[i].name, stats[i].value);
    add(app, &t, "}");
    return t.bytes;
}

/* ---- 13.11 Commands: patch, merge, report --------------------------------------------------- */

static void cmd_patch(App *app) {
    const char *out = app->outputs.n > 0 ? app->outputs.items[0] : "-";
    const int with_file = strcmp(out, "-") != 0 && !app->brute;
    patch_stats stats = {0};
    size_t first = 0, end = 0;
    Sweeps s = {0};
    Part part = {0};
    Common c;

    choose_sweeps(app, app->sweeps, &s);
    if (app->shard != NULL && (!with_file || app->stats))
        stop(app, PATCH_E_USAGE, "--shard",
             "a shard goes into FILE.part, without --stats or --brute; give -o FILE");
    const Prompts p = prompts_read(
        app, NEEDS(CLEAN) | NEEDS(CORRUPTED) | metric_needs(app->metric), 0, 1);
    plan_sweeps(app, app->model, p.n_tokens, &s);
    part_room(app, &part, p.n, s.n_cells);
    shard_range(app, part.n_items, &first, &end);
    common_begin(app, &p, &c);
    if (with_file) {
        part.path = text_of(app, "%s.part", out);
        part_head(app, &part, &c, &p);
        part_open(app, &part);
    }
    compute_items(app, &s, &p, &part, first, end, &stats);
    if (app->shard == NULL) {
        if (app->stats)
            c.table.json_stats = json_stats(app, &stats);
        Table *tables = sweep_tables(app, &s, &c, p.n);
        fill_tables(app, &s, &part, p.n, tables);
        give_tables(app, &p, tables, s.n);
        if (app->stats)
            fprintf(stderr, "%s\n", c.table.json_stats);
    }
    part_close(&part, app->shard == NULL);
    app->part = NULL;
}

/* The text behind "\nkey: " in a head, up to the end of its line; "" where there is none. */
static char *head_text(App *app, const char *head, const char *key) {
    const char *mark = text_of(app, "\n%s: ", key), *at = strstr(head, mark);

    at = at != NULL ? at + strlen(mark) : "";
    return text_of(app, "%.*s", (int)strcspn(at, "\n"), at);
}

static size_t head_count(App *app, const char *head, const char *key, size_t least, size_t most,
                         const char *path) {
    size_t n = 0;

    if (!parse_size(head_text(app, head, key), 0, &n) || n < least || n > most)
        stop(app, PATCH_E_FORMAT, path, "the head is damaged at `%s`; make this part again", key);
    return n;
}

/* Make of a head what `patch` made it of: settings into the App, tables' texts, and the sweeps'
   cells by a model that is nothing but its dimensions. Returns the number of examples. */
static size_t merge_begin(App *app, const char *head, const char *path, Sweeps *s, Common *c) {
    const size_t n = head_count(app, head, "examples", 1, INT_MAX, path);
    const size_t T = head_count(app, head, "positions", 1, 65536, path);
    const char *hex = head_text(app, head, "texts"), *metric = head_text(app, head, "metric");
    const char **tokens = ROOM(const char *, T);
    size_t *bytes = ROOM(size_t, T);
    Model *shape = ROOM(Model, 1);
    unsigned byte;

    app->L = head_count(app, head, "layers", 1, 4096, path);
    app->H = head_count(app, head, "heads", 1, 4096, path);
    app->noising = (int)head_count(app, head, "noising", 0, 1, path);
    app->normalize = (int)head_count(app, head, "normalize", 0, 1, path);
    app->per_prompt = (int)head_count(app, head, "per-prompt", 0, 1, path);
    app->sweeps = head_text(app, head, "sweeps");
    shape->dims.n_ctx = (int)T;
    shape->file.L = app->L;
    shape->file.H = app->H;
    for (size_t i = 0; i < T; i++) {
        const size_t digits = strcspn(hex, " ");
        char *text = ROOM(char, digits / 2 + 1);
        for (; bytes[i] < digits / 2; bytes[i]++) {
            if (sscanf(hex + 2 * bytes[i], "%2x", &byte) != 1)
                stop(app, PATCH_E_FORMAT, path, "the head is damaged; make this part again");
            text[bytes[i]] = (char)byte;
        }
        tokens[i] = text;
        hex += digits + (hex[digits] == ' ');
    }
    memset(c, 0, sizeof *c);
    c->table.tokens = tokens;
    c->table.token_bytes = bytes;
    c->table.n_tokens = T;
    c->table.command = "patch";
    for (size_t i = 0; METRICS[i] != NULL; i++)
        if (strcmp(METRICS[i], metric) == 0)
            c->table.metric = METRICS[i];
    c->table.direction = app->noising ? "noising" : "denoising";
    c->table.normalized = app->normalize;
    c->table.range = app->range;
    c->table.json_tokens = head_text(app, head, "tokens");
    c->table.json_settings = head_text(app, head, "settings");
    c->table.model = head_text(app, head, "sha256");
    choose_sweeps(app, app->sweeps, s);
    plan_sweeps(app, shape, T, s);
    return n;
}

/* Join parts: all of one sweep, and together all of it. Needs no model. */
static void cmd_merge(App *app) {
    const char *settings = NULL;
    size_t n_settings = 0, n = 0;
    Sweeps s = {0};
    Part p = {0};
    Common c;

    for (size_t i = 0; i < app->operands.n; i++) {
        size_t n_bytes, n_head = 0;
        const char *path = app->operands.items[i], *bytes = read_file(app, path, &n_bytes);

        if (n_bytes > PART_SHARD && memcmp(bytes, PART_MAGIC, PART_LENGTH) == 0)
            parse_digits(bytes + PART_LENGTH, 10, &n_head);
        if (n_head <= PART_SHARD || n_head > n_bytes || memcmp(bytes + n_head - 2, "\n\n", 2) != 0)
            stop(app, PATCH_E_FORMAT, path, "no part of a sweep; give files that --shard left");
        const char *rest = bytes + PART_SHARD + strcspn(bytes + PART_SHARD, "\n");
        const size_t n_rest = n_head - (size_t)(rest - bytes);
        if (i == 0) {
            n = merge_begin(app, text_of(app, "%.*s", (int)n_rest, rest), path, &s, &c);
            part_room(app, &p, n, s.n_cells);
            settings = rest;
            n_settings = n_rest;
        } else if (n_rest != n_settings || memcmp(rest, settings, n_rest) != 0)
            other_head(app, path, settings, n_settings, rest, n_rest);
        p.n_head = n_head;
        part_records(&p, bytes, n_bytes);
    }
    const unsigned char *missing = memchr(p.have, 0, p.n_items);
    if (missing != NULL)
        stop(app, PATCH_E_INPUT, "merge", "item %lu of %lu is in none of the parts; give all "
             "shards, and run unfinished ones again", (unsigned long)(missing - p.have),
             (unsigned long)p.n_items);
    Table *tables = sweep_tables(app, &s, &c, n);
    fill_tables(app, &s, &p, n, tables);
    give_tables(app, NULL, tables, s.n);
}

/* The standard set for a task, on one page. */
static void cmd_report(App *app) {
    static const char *const sweeps = "block_every,attn_head_out_all_pos";
    const Prompts p = prompts_read(
        app, NEEDS(CLEAN) | NEEDS(CORRUPTED) | NEEDS(ANSWER) | NEEDS(WRONG), 0, 1);
    Table tables[6 + LENS_TABLES];
    size_t n = 0, n_heads;
    double bias;
    Sweeps s = {0};
    Common c;

    choose_sweeps(app, sweeps, &s);
    plan_sweeps(app, app->model, p.n_tokens, &s);
    for (app->noising = 0, app->normalize = 1; app->noising < 2; app->noising++) {
        Part part = {0};
        part_room(app, &part, p.n, s.n_cells);
        common_begin(app, &p, &c);
        compute_items(app, &s, &p, &part, 0, part.n_items, NULL);
        Table *made = sweep_tables(app, &s, &c, p.n);
        fill_tables(app, &s, &part, p.n, made);
        for (size_t i = 0; i < s.n; i++)
            tables[n++] = made[i];
    }
    app->noising = app->normalize = 0;
    common_begin(app, &p, &c);
    lens_tables(app, &p, &c, tables + n, &bias);
    n += 3; /* accumulated, layers and heads */
    tables[n] = c.table;
    heads_table(app, p.examples[0].clean, p.n_tokens, &tables[n++]);
    copying_table(app, &p, &tables[n++]);
    const patch_cell *heads = parse_heads(app, "all", 0, "heads", &n_heads);
    write_page(app, &p, heads, n_heads, "Report", tables, n, app->outputs.items[0]);
}

/* ---- 13.12 Help and main -------------------------------------------------------------------- */

static const Format PAGE_FORMATS[] = {{".html", NULL, write_html_tables, 0}, {NULL, NULL, NULL, 0}};

static const Command COMMANDS[] = {
    {"info", "", "what a model file is",
     "Prints lines of a name, a tab and a value: dimensions, parameters, tokenizer,\n"
     "processing, sizes in bytes (memory_least: what a pass takes beside the file;\n"
     "memory_cache: every activation of a prompt of n_ctx tokens), SHA-256.\n",
     "Mi", 0, 0, NULL, FORMATS, 0, cmd_info},
    {"tokens", "TEXT...", "how texts are cut into tokens",
     "Prints two lines a text: the ids, and the tokens between bars, with \\n \\t \\r \\\\\n"
     "and \\xHH for bytes that cannot be shown.\n",
     "MT", 1, SIZE_MAX, NULL, FORMATS, 0, cmd_tokens},
    {"top", "TEXT", "which tokens the model expects after a text",
     "Prints lines `rank id logit prob |token|`, parted by tabs, the likeliest token\n"
     "(rank 0) first; then a line for each --answer, which is taken as it is: mostly\n"
     "it begins with a space.\n",
     "MTt", 1, 1, NULL, FORMATS, 0, cmd_top},
    {"diff", "PROMPTS", "the metric of every clean and corrupted prompt",
     "Prints `line clean corrupted`, parted by tabs, a row an example, and the mean.\n"
     "-o writes .csv, .json, or the numbers alone as .npy [B,2]; - is stdout as CSV.\n",
     "MTEO", 1, 1, NULL, DIFF_FORMATS, 0, cmd_diff},
    {"cache", "PROMPTS|--text TEXT", "activations, as run_with_cache gives them",
     "Writes -o FILE.safetensors: every hook point that a glob matches, under the name\n"
     "and in the shape [B,T,...] that TransformerLens has for it, also tokens [B,T]\n"
     "and logits [B,T,V]. hook_result only where the glob has `result` in it.\n",
     "MTOc", 0, 1, "--names", CACHE_FORMATS, 1, cmd_cache},
    {"patch", "PROMPTS", "activation patching: which activations make the difference",
     "For each cell of a sweep the corrupted prompt is run with one activation of the\n"
     "clean run put in (--noising: the other way round); the value is the metric's mean\n"
     "over the examples. -o FILE may be repeated, the ending chooses the format: .npy\n"
     ".safetensors .csv .json .svg .html, - is stdout as CSV. Several sweeps go into\n"
     "FILE-SWEEP.npy and so on. Without -o a table is shown.\n\n"
     "sweeps, named as in transformer_lens.patching; `all` is every one but dest_src_pos:\n"
     "  [layer,pos]            resid_pre resid_mid resid_post attn_out mlp_out\n"
     "  [layer,pos,head]       attn_head_out_by_pos and .._q_.. .._k_.. .._v_..\n"
     "  [layer,head,dest]      attn_head_pattern_by_pos\n"
     "  [layer,head,dest,src]  attn_head_pattern_dest_src_pos\n"
     "  [layer,head]           attn_head_out_all_pos and .._q_.. .._k_.. .._v_.. .._pattern_..\n"
     "  [5,layer,head] [5,layer,pos,head] [3,layer,pos]\n"
     "                         attn_head_all_pos_every attn_head_by_pos_every block_every\n",
     "MTESCBOp", 1, 1,
     "--sweep", FORMATS, 0, cmd_patch},
    {"attn", "PROMPTS", "attention patterns of the clean prompts",
     "Gives [B,heads,T,T]: what each position (dest) attends to (src). -o FILE ends in .npy\n"
     ".safetensors .csv .json .svg or .html, whose page lets one look at each head.\n",
     "MTCOh", 1, 1, "--heads", FORMATS, 0, cmd_attn},
    {"heads", "[PROMPTS]", "previous-token, duplicate-token and induction heads",
     "Gives [3,layer,head]: how much of each head's attention goes where such a head\n"
     "looks, on the first clean prompt, or on random tokens said twice. Where prompts\n"
     "have answers, how far heads copy these names is shown too, and in .json.\n",
     "MTCOR", 0, 1, NULL, FORMATS, 0, cmd_heads},
    {"lens", "PROMPTS", "direct logit attribution, logit lens",
     "Gives tables of what parts add to the logit difference of the clean prompts:\n"
     "accumulated (the residual stream after each half layer), layers, heads, and lens\n"
     "(accumulated with each row's own LayerNorm scale, b_U added).\n",
     "MTCBO", 1, 1, NULL, FORMATS, 0, cmd_lens},
    {"path", "PROMPTS", "path patching from every head",
     "Gives [layer,head]: the metric where one head's output reaches the receivers as\n"
     "in the other prompt, and every other head's output is held.\n",
     "MTESCBOx", 1, 1,
     NULL, FORMATS, 0, cmd_path},
    {"ablate", "PROMPTS", "the metric without a part of the model",
     "Runs the clean prompts with one cell of a site replaced (shaped as that sweep), or\n"
     "with all --heads replaced at once. --normalize: minus the unablated metric.\n"
     "--keep ablates all other heads instead and tells how far the kept ones do the task:\n"
     "faithfulness, and of each head minimality and completeness.\n",
     "MTECBOahR",
     1, 1, NULL, FORMATS, 0, cmd_ablate},
    {"trace", "FACTS", "causal tracing, as Meng et al. do it",
     "FACTS is a TSV file with columns prompt, subject and attribute (may be empty).\n"
     ".json holds every fact, .npy [kind,T,layer] of one fact; pictures show one fact or\n"
     "the averages.\n",
     "MTCOr", 1, 1, NULL, FORMATS, 0, cmd_trace},
    {"report", "PROMPTS", "the standard set for a task, on one page",
     "Writes -o FILE.html: logit differences, the sweeps block_every and\n"
     "attn_head_out_all_pos in both directions, lens, head kinds, attention.\n",
     "MTCO", 1, 1, NULL, PAGE_FORMATS, 1, cmd_report},
    {"merge", "PART...", "join the shards of a sweep",
     "Joins the files that `patch --shard I/N -o FILE` left as FILE.part, all N of them,\n"
     "into what one run would have written.\n",
     "CO", 1, SIZE_MAX, NULL, FORMATS, 0, cmd_merge},
    {"fold", "-o OUT.bin", "write the processed weights, which need no work at load",
     "Writes a model file whose weights are processed and laid out for the kernels,\n"
     "to be read in place.\n",
     "MO", 0, 0, NULL, NULL, 1, cmd_fold},
};

#define N_COMMANDS (sizeof COMMANDS / sizeof *COMMANDS)

static const char PROMPTS_HELP[] =
    "\nPROMPTS is a TSV file (-: stdin) whose first line names the columns: clean,\n"
    "corrupted, answer, wrong, or clean_ids, corrupted_ids, answer_id, wrong_id. Each\n"
    "further line is an example.\n";

static void command_help(const Command *c) {
    printf("usage: actpatch %s %s%s[options]\n\n%s: %s.\n\n%s", c->name, c->operands,
           *c->operands ? " " : "", c->name, c->summary, c->text);
    if (strncmp(c->operands, "PROMPTS", 7) == 0)
        fputs(PROMPTS_HELP, stdout);
    printf("\noptions:\n");
    for (const Option *o = OPTIONS; o < OPTIONS + N_OPTIONS; o++) {
        const int width = 20 - (int)strlen(o->name);
        if (accepts(c, o))
            printf("  %s %-*s %s\n", o->name, width > 0 ? width : 0, o->value ? o->value : "",
                   o->help);
    }
}

/* The three lines at the end work as typed, wherever the program was started from. */
static void program_help(const App *app) {
    char path[PATH_ROOM];

    printf("actpatch " PATCH_VERSION ": activation patching for GPT-2\n\n"
           "usage: %s COMMAND [-m MODEL] [options] [operands]\n\n", app->program);
    for (size_t i = 0; i < N_COMMANDS; i++)
        printf("  %-8s %s\n", COMMANDS[i].name, COMMANDS[i].summary);
    if (!bundled(app, "ioi.tsv", path))
        snprintf(path, sizeof path, "tests/tiny/ioi.tsv");
    printf("\n%s COMMAND -h tells more of each. To begin with:\n\n"
           "  %s top \"When John and Mary went to the shops, John gave the bag to\"\n"
           "  %s diff %s\n"
           "  %s patch %s --sweep resid_pre --normalize\n",
           app->program, app->program, app->program, path, app->program, path);
}

#if HAS_POSIX && defined(SIGBUS)
/* A mapped file that gets shorter under the reader ends in SIGBUS. */
static void on_bus_error(int number) {
    static const char line[] = "actpatch: the model file changed while it was read, -m, leave it "
                               "alone while actpatch runs\n";

    (void)number;
    if (write(2, line, sizeof line - 1) < 0)
        _exit(1);
    _exit(1);
}
#endif

/* Everything between the arguments and the end. */
static void run_command(App *app, int argc, char **argv) {
    parse_arguments(app, argc, argv);
    if (app->help) {
        command_help(app->command);
        return;
    }
    for (size_t i = 0; i < app->outputs.n; i++) { /* who refuses does so before the work */
        const char *path = app->outputs.items[i];
        for (size_t k = 0; k < app->operands.n; k++)
            if (is_same_file(app->operands.items[k], path))
                stop(app, PATCH_E_INPUT, path, "it is what is read; name another output");
        must(app, out_open(&app->out, path, &app->e));
        out_drop(&app->out);
    }
    if (strchr(app->command->accepts, 'M') != NULL)
        open_model(app);
    app->command->run(app);
}

#ifdef _WIN32
/* The arguments in UTF-8, and streams that pass on every byte, shown as UTF-8; NULL: no memory. */
static char **windows_arguments(int *argc) {
    wchar_t **words = CommandLineToArgvW(GetCommandLineW(), argc);
    char **argv = words != NULL ? calloc((size_t)*argc + 1, sizeof *argv) : NULL;

    for (int i = 0; argv != NULL && i < *argc; i++) {
        const int n = WideCharToMultiByte(CP_UTF8, 0, words[i], -1, NULL, 0, NULL, NULL);
        if ((argv[i] = malloc((size_t)n + 1)) == NULL)
            return NULL;
        WideCharToMultiByte(CP_UTF8, 0, words[i], -1, argv[i], n, NULL, NULL);
    }
    for (char *c = argv != NULL && *argc > 0 ? argv[0] : NULL; c != NULL && *c != '\0'; c++)
        *c = *c == '\\' ? '/' : *c; /* bundled() looks for the last slash */
    for (int stream = 0; stream < 3; stream++)
        _setmode(stream, _O_BINARY);
    SetConsoleOutputCP(CP_UTF8);
    return argv;
}
#endif

int main(int argc, char **argv) {
    App app = {0};

#ifdef _WIN32
    if ((argv = windows_arguments(&argc)) == NULL)
        return 1;
#endif
#if HAS_POSIX && defined(SIGBUS)
    signal(SIGBUS, on_bus_error);
#endif
#ifdef SIGXFSZ
    signal(SIGXFSZ, SIG_IGN); /* a file over the limit is then an error like a full disk */
#endif
    app.program = argc > 0 ? argv[0] : "actpatch";
    app.pool = pool_begin(&HEAP, SIZE_MAX);
    app.load = patch_options_default();
    app.k = app.window = app.samples = 10;
    app.seed = 1;
    for (size_t i = 0; argc > 1 && i < N_COMMANDS; i++)
        if (strcmp(argv[1], COMMANDS[i].name) == 0)
            app.command = &COMMANDS[i];
    app.noise = app.command != NULL && strcmp(app.command->name, "trace") == 0 ? 3 : 1;
    if (app.command != NULL)
        run_command(&app, argc, argv);
    else if (argc < 2 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "--help") == 0)
        program_help(&app);
    else if (strcmp(argv[1], "--version") == 0)
        printf("actpatch " PATCH_VERSION "\n");
    else
        stop(&app, PATCH_E_USAGE, argv[1], "unknown command; see %.60s -h", app.program);
    if (fflush(stdout) != 0 || ferror(stdout))
        stop(&app, PATCH_E_IO, "standard output", "could not be written whole: %s; make room",
             strerror(errno));
    patch_model_free(app.model);
    pool_end(&app.pool, PATCH_OK);
    return 0;
}

#endif /* PATCH_NO_MAIN */

/* ==== A. Generated Unicode tables ================================================================
   Written by tests/make_unicode.py, which asked tokenizers 0.22.2 about every code point.
   From U+0000 on, runs of code points of one class: the length in hexadecimal, none for 1, then the
   class, L letter, N number, S white space or . for others; "9.5S" reads U+0000 to U+0008 others,
   U+0009 to U+000D white space. Behind the last run all are others: what lies above Unicode is so
   too, UTF8_INVALID included. One literal, within the 4,095 bytes that C99 promises.
   Code points: 141028 letter, 1911 number, 25 white space. */

static const char unicode_runs[] =
    "9.5S12.Sf.aN7.1aL6.1aLa.S1a.S9.L7.2N.L3.NL.3N.17L.1fL.1caL4.cLe.5L7.L.L81.5L.2L2.4L.L6.L.3L.L."
    "14L.53L.8bL8.a6L.26L2.L6.29L47.1bL4.4L2d.2bL15.aN4.2L.63L.Lf.2L7.2LaN3L2.L10.L.1eL1d.59Lb.Le.a"
    "N21L9.2L4.L5.16L4.L9.L3.L17.19L7.bL5.18L.6L11.2aL3a.36L3.L12.L7.aL4.aN.10L4.8L2.2L2.16L.7L.L3."
    "4L3.L10.Ld.2L.3L4.aN2L2.6N2.L8.6L4.2L2.16L.7L.2L.2L.2L1f.4L.L7.aN2.3L10.9L.3L.16L.7L.2L.5L3.L1"
    "2.Lf.2L4.aN9.Lb.8L2.2L2.16L.7L.2L.5L3.L1e.2L.3L4.aN.L6Nb.L.6L3.3L.4L3.2L.L.2L3.2L3.3L3.cL16.L1"
    "5.dN12.8L.3L.17L.10L3.L1a.3L2.L2.2L4.aN8.7N.L4.8L.3L.17L.aL.5L3.L1f.2L.2L4.aN.2L11.9L.3L.29L2."
    "L10.L5.3L.7N3L4.13N.6L5.12L3.18L.9L.L2.7L1f.aN11.30L.2Lc.7L9.aN27.2L.L.5L.18L.L.aL.2L9.L2.5L.L"
    "9.aN2.4L20.L1f.14Nc.8L.24L1b.5L73.2bL14.LaN6.6L4.4L3.L3.2L7.3L4.dLc.L.aN6.26L.L5.L2.2bL.14dL.4"
    "L2.7L.L.4L2.29L.4L2.21L.4L2.7L.L.4L2.fL.39L.4L2.43Le.14N3.10L10.56L2.6L3.26cL2.11LS1aL5.4bL3.3"
    "N8L7.12Ld.13Le.12Le.dL.3Lf.34L23.L4.L3.aN6.aN16.aN6.59L7.5L2.22L.L5.46La.1fL27.aN1eL2.5Lb.2cL4"
    ".1aL6.bN25.17L9.35L2b.aN6.aNd.L5d.2fL11.8L3.aN29.1eLd.2LaN2cL1a.24L1c.aN3.3LaN24L2.bL5.2bL2.3L"
    "29.4L.6L.2L3.L5.c0L40.116L2.6L2.26L2.6L2.8L.L.L.L.1fL2.35L.7L.L3.3L.7L3.4L2.6L4.dL5.3L.7L3.bS1"
    "d.2S5.S2f.S10.NL2.6N5.LaN6.dL65.L4.L2.aL.L3.5L6.L.L.L.4L.bL2.4L5.5L4.L.33N2L5N2d6.3cN4e.16N276"
    ".1eN46c.e5L6.4L3.2L9.N2.26L.L5.L2.38L7.L10.17L9.7L.7L.7L.7L.7L.7L.7L.7L50.L1d0.S4.2LN19.9N7.5L"
    "2.3N2L4.56L6.3L.5aL.4L5.2bL.5eL3.4Na.20L30.10L20.aN1e.8N.fN20.aN27.fN140.19c0L40.568dL43.2eL2."
    "10dL3.10LaN2L14.2fL10.1fL2.46LaN27.9L2.67L2.43L2.2L.L.8L15.10L.3L.4L.17Ld.6Na.34Le.32L1c.aN18."
    "6L3.L.2L.aN1cLa.17L19.1dL7.2fL1c.LaN6.5L.aLaN5L.29L17.3L.8L4.aN6.17L3.L3.32L.L3.2L2.5L2.L.L18."
    "3L2.bL7.3Lc.6L2.6L2.6L9.7L.7L.2bL.eL6.73Ld.aN6.2ba4Lc.17L4.31L2104.16eL2.6aL26.7Lc.5L5.L.aL.dL"
    ".5L.L.2L.2L.6cL21.16bL12.40L2.36L28.cL74.5L.87L13.aN7.1aL6.1aLb.59L3.6L2.6L2.6L2.3L23.cL.1aL.1"
    "3L.2L.fL2.eL22.7bLc.2dNc.39N11.2Nf4.1dL3.31L10.1bN4.20L4N9.14LN8LN5.26La.1eL2.24L4.8L.5N2a.9eL"
    "2.aN6.24L4.24L4.28L8.34Lc.bL.fL.7L.2L.bL.fL.7L.2L3.34Lc.137L9.16La.8L18.6L.2aL.9L45.6L2.L.2cL."
    "2L3.L2.17L2.8N17L2.7N1fL8.9N30.13L.2L5.5N16L6N4.1aL46.38L4.2N2L10N2.2eNLf.4L.3L.1dLa.9N17.1dL2"
    "N.1dL3N20.8L.1cL6.5N10.36La.16L2.8N13L5.8N12L17.7N50.49L37.33Ld.33L7.6N24Lc.aN6.aN1cL9.17Lda.1"
    "fN.2aL6.2L10.3L3b.1dLaNL8.16Lb.4N1b.12L2e.15L7N14.17Lc.35L1a.1eN.2L2.Ld.2dL20.19L7.aN9.24Lf.aN"
    "4.L2.L8.23L3.Lc.30Le.4Lb.aNL.L4.14Nb.12L.19L13.2L3f.7L.L.4L.fL.aL7.2fL11.aNb.8L2.2L2.16L.7L.2L"
    ".5L3.L12.Lc.5L1e.aL.L2.L.26L.L19.L.L2c.35L12.4L5.aN5.3L1e.30L14.2L.L8.aNa6.2fL29.4L24.30L14.Lb"
    ".aN26.2bLd.L7.aN6.14N1c.1bL15.cN4.7Lb9.2cL74.40L13Nc.8L2.L2.8L.2L.18Lf.L.Le.aN46.8L2.27L10.L.L"
    "1c.La.28L7.L15.Lb.2eL13.L12.49Lc7.21Lf.aN6.9L.25L11.Lf.1dN5.1eL70.7L.2L.26L15.L9.aN6.6L.2L.20L"
    "e.L7.aN136.13Lf.L.dL.22L1c.aN56.Lf.15N2b.39aL66.6fN11.c4La4c.61Lf.430L11.6L19.f9bL5.247L1ab9.1"
    "eL12.aN6c6.239L7.1fL.aN6.4fL.aN6.1eL12.30L10.4Lc.aN.7N.15L5.13L1b0.2dL3.aNc6.40L17N69.4bL5.L42"
    ".dL40.2L.L1c.17f8L8.4d6L29.aL22e7.4L.7L.2L.123Lf.L1d.3L2.Le.4L8.18cL904.6bL5.dL3.9L7.aL1056.aN"
    "5c6.14Nc.14N6c.19N87.55L.47L.2L2.L2.2L2.4L.cL.L.7L.41L.4L2.8L.7L.1cL.4L.5L.L3.7L.154L2.19L.19L"
    ".1fL.19L.1fL.19L.1fL.19L.1fL.19L.8L2.32N700.1fL6.6L105.3eL92.2dLa.7L2.aN4.L141.1eL12.2cL4.aN1d"
    "6.1cL4.aNd6.1eL2.LaN1e5.7L.4L.2L.fL.c5L2.9N30.44L7.L4.aN317.3bN.3N.4N4c.2dN.fNc2.4L.1bL.2L.L2."
    "L.aL.4L.L.L6.L4.L.L.L.3L.2L.L2.L.L.L.L.L.2L.L2.4L.7L.4L.4L.L.aL.11L5.3L.5L.11L244.dNae3.aN406."
    "a6e0L20.103aL6.deL2.1682Le.1d31Lf.26eL9a2.21eL5e2.134bL5.1060L";

/* See chapter 4. */
static void unicode_decode(uint32_t runs[UNICODE_RUNS]) {
    static const char marks[] = ".LNS"; /* in CLASS_OTHER's order */
    const char *p = unicode_runs;
    uint32_t first = 0;
    for (size_t i = 0; i < UNICODE_RUNS - 1; i++) {
        char *mark;
        const uint32_t length = (uint32_t)strtoul(p, &mark, 16);
        runs[i] = (uint32_t)(strchr(marks, *mark) - marks) << 24 | first;
        first += mark == p ? 1 : length;
        p = mark + 1;
    }
    runs[UNICODE_RUNS - 1] = first;
}
