/* SPDX-License-Identifier: MIT */
/* board.c - the board's side: vectors, start, semihosting, timer, and the few C library functions that
   would otherwise want a heap or an operating system. */
#include "board.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

int main(void);
void reset(void);

extern uint32_t data_begin[], data_end[], data_source[], bss_begin[], bss_end[];
extern uint32_t stack_begin[], stack_end[];

/* ---- semihosting: a breakpoint that the debugger, here QEMU, takes for a call ---- */

static int host(int call, const void *argument) {
    register int r0 __asm__("r0") = call;
    register const void *r1 __asm__("r1") = argument;

    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static void leave(int status) {
    const uint32_t words[2] = {0x20026, (uint32_t)status}; /* ADP_Stopped_ApplicationExit */

    for (;;)
        host(0x20, words); /* SYS_EXIT_EXTENDED */
}

/* ---- start ---- */

static void fault(void) {
    host(0x04, "fault: the processor met an exception\n"); /* SYS_WRITE0 */
    leave(3);
}

/* The table that the processor reads at reset: the stack's end, then where to go. */
typedef void (*Handler)(void);
__attribute__((section(".vectors"), used)) static const struct {
    uint32_t *stack;
    Handler handlers[15];
} vectors = {stack_end, {reset, fault, fault, fault, fault, fault, 0, 0, 0, 0, fault, fault, 0, fault, fault}};

enum { PAINT = 0x5AC35AC3 };
#define TIMER ((volatile uint32_t *)0x40000000) /* control, value, reload */
#define CPACR (*(volatile uint32_t *)0xE000ED88)

void reset(void) {
    uint32_t *here, *to;
    const uint32_t *from = data_source;

    CPACR |= 0xF << 20; /* the floating-point unit on, before the first float */
    __asm__ volatile("dsb\n isb\n mov %0, sp" : "=r"(here) : : "memory");
    for (to = data_begin; to < data_end;)
        *to++ = *from++;
    for (to = bss_begin; to < bss_end;)
        *to++ = 0;
    for (to = stack_begin; to < here - 16;) /* not what this function itself stands on */
        *to++ = PAINT;
    TIMER[2] = TIMER[1] = 0xFFFFFFFF;
    TIMER[0] = 1;
    leave(main());
}

uint32_t ticks(void) {
    return 0xFFFFFFFF - TIMER[1];
}

size_t stack_used(void) {
    const uint32_t *p = stack_begin;

    while (p < stack_end && *p == PAINT)
        p++;
    return (size_t)(stack_end - p) * sizeof *p;
}

size_t stack_size(void) {
    return (size_t)(stack_end - stack_begin) * sizeof *stack_end;
}

/* ---- in the C library's place ---- */

clock_t clock(void) {
    return (clock_t)(ticks() / (25000000 / CLOCKS_PER_SEC));
}

typedef struct Out {
    char *text;
    size_t n, capacity;
} Out;

static void put(Out *out, const char *text, size_t n) {
    for (; n > 0; n--, text++, out->n++)
        if (out->n + 1 < out->capacity)
            out->text[out->n] = *text;
}

static void put_number(Out *out, uint64_t value, int least) {
    char digits[20];
    size_t n = sizeof digits;

    for (; value > 0 || least > 0; value /= 10, least--)
        digits[--n] = (char)('0' + value % 10);
    put(out, digits + n, sizeof digits - n);
}

/* At most 9 digits behind the point; what is not below 1e9 is written as "big". */
static void put_double(Out *out, double x, int digits) {
    uint64_t unit = 1, value;
    int i;

    for (i = 0; i < digits; i++)
        unit *= 10;
    if (x < 0)
        put(out, "-", 1);
    if (!(fabs(x) < 1e9)) {
        put(out, isnan(x) ? "nan" : "big", 3);
        return;
    }
    value = (uint64_t)(fabs(x) * (double)unit + 0.5);
    put_number(out, value / unit, 1);
    if (digits > 0) {
        put(out, ".", 1);
        put_number(out, value % unit, digits);
    }
}

int vsnprintf(char *text, size_t capacity, const char *f, va_list values) {
    Out out = {text, 0, capacity};

    for (; *f; f++) {
        int precision = -1;

        if (*f != '%') {
            put(&out, f, 1);
            continue;
        }
        if (*++f == '.') {
            if (*++f == '*')
                precision = va_arg(values, int), f++;
            else
                for (precision = 0; *f >= '0' && *f <= '9'; f++)
                    precision = precision * 10 + *f - '0';
        }
        for (; *f == 'l' || *f == 'z'; f++)
            continue; /* long and size_t have the size of int here */
        if (*f == 's') {
            const char *s = va_arg(values, const char *);
            const void *end = precision < 0 ? NULL : memchr(s, 0, (size_t)precision);

            put(&out, s, precision < 0 ? strlen(s) : end ? (size_t)((const char *)end - s)
                                                         : (size_t)precision);
        } else if (*f == 'd') {
            const long value = va_arg(values, long);

            if (value < 0)
                put(&out, "-", 1);
            put_number(&out, value < 0 ? 0 - (uint64_t)value : (uint64_t)value, 1);
        } else if (*f == 'u')
            put_number(&out, va_arg(values, unsigned long), 1);
        else if (*f == 'f')
            put_double(&out, va_arg(values, double), precision < 0 ? 6 : precision);
        else /* %% and whatever is not known here */
            put(&out, f, 1);
    }
    if (capacity > 0)
        text[out.n < capacity ? out.n : capacity - 1] = '\0';
    return (int)out.n;
}

int snprintf(char *text, size_t capacity, const char *format, ...) {
    va_list values;
    int n;

    va_start(values, format);
    n = vsnprintf(text, capacity, format, values);
    va_end(values);
    return n;
}

void say(const char *format, ...) {
    char line[192];
    va_list values;

    va_start(values, format);
    vsnprintf(line, sizeof line, format, values);
    va_end(values);
    host(0x04, line);
}
