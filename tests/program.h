/* SPDX-License-Identifier: MIT
   patch.c with its program inside a test: main is actpatch_main and exit jumps back to run_program,
   which gives back the memory and files that the program leaves to its end. Calls for memory and
   files go through hooks here that can fail: the Nth (fail_at), or all from the Nth on (fail_all). */

#include <errno.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { FAIL_MEMORY = 1, FAIL_FILES = 2 };
static int fail_kind, fail_all;       /* which calls count */
static long fail_at, hooked_calls;    /* fail_at 0: none fails */
static size_t allowed;                /* the largest allocation, 0: no bound */
static jmp_buf at_exit;
static int in_program;
static void *program_blocks[1 << 16];
static FILE *program_files[256], *broken; /* broken: a read of it failed */
static size_t n_program_blocks, n_program_files;

static void refuse(const char *what, size_t n) {
    fprintf(stderr, "test: %s (%lu)\n", what, (unsigned long)n);
    abort();
}

static int fails(int kind, int error) {
    if (!(fail_kind & kind) || !in_program)
        return 0;
    hooked_calls++;
    if (fail_at == 0 || (fail_all ? hooked_calls < fail_at : hooked_calls != fail_at))
        return 0;
    errno = error;
    return 1;
}

static void *hook_malloc(size_t n) {
    void *p = n > ((size_t)1 << 31) || fails(FAIL_MEMORY, ENOMEM) ? NULL : malloc(n);

    if (allowed > 0 && n > allowed && p != NULL)
        refuse("an allocation beyond the file's own needs", n);
    if (in_program && p != NULL) {
        if (n_program_blocks == sizeof program_blocks / sizeof *program_blocks)
            refuse("too many blocks", n_program_blocks);
        program_blocks[n_program_blocks++] = p;
    }
    return p;
}

static void hook_free(void *p) {
    for (size_t i = n_program_blocks; i-- > 0;)
        if (program_blocks[i] == p) {
            program_blocks[i] = program_blocks[--n_program_blocks];
            break;
        }
    free(p);
}

/* Nothing is written outside the folder that the test runs in. */
static FILE *hook_fopen(const char *path, const char *mode) {
    const int outside = strchr(path, '/') != NULL && *mode != 'r';
    FILE *f = outside || fails(FAIL_FILES, EIO) ? NULL : fopen(path, mode);

    if (f != NULL && n_program_files < sizeof program_files / sizeof *program_files)
        program_files[n_program_files++] = f;
    return f;
}

static int hook_fclose(FILE *f) {
    const int bad = fails(FAIL_FILES, ENOSPC);

    for (size_t i = 0; i < n_program_files; i++)
        if (program_files[i] == f)
            program_files[i] = program_files[--n_program_files];
    return fclose(f) != 0 || bad ? EOF : 0;
}

static size_t hook_fread(void *out, size_t size, size_t n, FILE *f) {
    if (!fails(FAIL_FILES, EIO))
        return fread(out, size, n, f);
    broken = f;
    return fread(out, size, n / 2, f);
}

static size_t hook_fwrite(const void *bytes, size_t size, size_t n, FILE *f) {
    if (!fails(FAIL_FILES, ENOSPC))
        return fwrite(bytes, size, n, f);
    broken = f;
    return fwrite(bytes, size, n / 2, f);
}

static int hook_ferror(FILE *f) {
    return broken == f || ferror(f);
}

static int hook_fflush(FILE *f) {
    return fails(FAIL_FILES, ENOSPC) ? EOF : fflush(f);
}

static int hook_rename(const char *from, const char *to) {
    return fails(FAIL_FILES, EACCES) ? -1 : rename(from, to);
}

static void *hook_mmap(void *at, size_t n, int protection, int flags, int file, off_t offset) {
    return fails(FAIL_FILES, ENOMEM) ? MAP_FAILED : mmap(at, n, protection, flags, file, offset);
}

__attribute__((noreturn)) static void hook_exit(int status) {
    longjmp(at_exit, status + 1);
}

#define malloc hook_malloc
#define free hook_free
#define fopen hook_fopen
#define fclose hook_fclose
#define fread hook_fread
#define fwrite hook_fwrite
#undef ferror
#define ferror hook_ferror
#define fflush hook_fflush
#define rename hook_rename
#define mmap hook_mmap
#define exit hook_exit
#define main actpatch_main
#include "../patch.c"
#undef main
#undef exit
#undef mmap
#undef rename
#undef fflush
#undef ferror
#undef fwrite
#undef fread
#undef fclose
#undef fopen
#undef free
#undef malloc

/* The program with these words, NULL behind them; returns its exit status. */
static int run_program(const char *const *words) {
    static char program[] = "actpatch", *argv[64];
    static int argc, status;

    argv[0] = program;
    for (argc = 1; words[argc - 1] != NULL && argc < 60; argc++)
        argv[argc] = (char *)(uintptr_t)words[argc - 1];
    argv[argc] = NULL;
    hooked_calls = 0;
    broken = NULL;
    in_program = 1;
    status = setjmp(at_exit);
    if (status == 0)
        status = actpatch_main(argc, argv) + 1;
    in_program = 0;
    while (n_program_files > 0)
        fclose(program_files[--n_program_files]);
    while (n_program_blocks > 0)
        free(program_blocks[--n_program_blocks]);
    clearerr(stdout);
    return status - 1;
}
