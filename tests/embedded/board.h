/* SPDX-License-Identifier: MIT */
/* board.h - what main.c needs of the board: words out, a count of time, and the stack's depth. */
#ifndef BOARD_H
#define BOARD_H

#include <stddef.h>
#include <stdint.h>

/* printf's %s %.*s %c %d %ld %lu %zu %.Nf, by semihosting. snprintf and vsnprintf are here too: the
   C library's take the digits of a double from malloc. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Ticks of 40 ns since reset, of a timer at 25 MHz. Under `qemu -icount shift=0` an instruction takes
   1 ns, so that a tick is 40 instructions. */
uint32_t ticks(void);

/* Bytes of stack that were used at any time since reset, and how many there are. */
size_t stack_used(void);
size_t stack_size(void);

#endif
