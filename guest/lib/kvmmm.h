/* kvmmm.h: the guest library. Small, freestanding, and optional: the ABI alone will do.
 *
 * Everything here works in ring 0 and in ring 3, except kvmmm_set_trap_handler (ring 0). Do real
 * work in ring 3 (kvmmm_enter_ring3): some KVMs interpret ring 0 at a microsecond an instruction,
 * and know no SSE, AVX or x87 there.
 */
#ifndef KVMMM_H
#define KVMMM_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kvmmm_abi.h"

#define KVMMM_PAGE_BYTES 4096UL
#define KVMMM_WINDOW_BYTES (2UL << 20)  /* the least that the host makes present at once */
#define KVMMM_STACK_BYTES (256UL << 10) /* what kvmmm_ram leaves alone below stack_top */

enum kvmmm_status {
    KVMMM_STATUS_OK = 0,
    KVMMM_STATUS_FAILED = 1,      /* a check failed */
    KVMMM_STATUS_USAGE = 2,       /* the command line is wrong */
    KVMMM_STATUS_WRONG_ABI = 120, /* not started by a kvmmm that this guest understands */
};

/* ---- Start and end (start.c, ring3.S) -------------------------------------------------------- */

#ifndef KVMMM_HOSTED /* a test of this library on the host brings a main, ports and a ring */
/* The guest's own. Its result is the exit status: the low 8 bits count. */
int main(const struct kvmmm_boot_info *boot);
#endif

extern const struct kvmmm_boot_info *kvmmm_boot; /* set before main */

int kvmmm_start(const struct kvmmm_boot_info *boot); /* called by start.S */

/* End the run. The host drains the console first. */
void kvmmm_exit(int status) __attribute__((noreturn));

/* Run fn(arg) in ring 3 and return its result; the caller goes on in ring 3, for good. */
int kvmmm_enter_ring3(int (*fn)(void *arg), void *arg);

/* ---- Console (console.c) --------------------------------------------------------------------- */

/* Write n bytes to the console. What is written is visible to the host at once: no flush needed
 * for correctness. Blocks only while the ring is full.
 */
void console_write(const void *bytes, size_t n);

/* Make sure that the host knows of everything written, waking it if it sleeps. */
void console_flush(void);

/* Read at least one and at most n bytes; 0 at the end of the input. Blocks until there are some. */
size_t console_read(void *bytes, size_t n);

/* ---- Text (printf.c) ------------------------------------------------------------------------- */

/* %d %i %u %x %p %s %c %%, with l, ll, z, a width, `-` and `0`. Writes at most room bytes, the last
 * of them a NUL; returns how many it would have written, without the NUL.
 */
size_t kvmmm_vformat(char *text, size_t room, const char *format, va_list args);
size_t kvmmm_format(char *text, size_t room, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* To the console; cut after KPRINTF_BYTES. */
#define KPRINTF_BYTES 512
void kprintf(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- Verdicts (report.c) --------------------------------------------------------------------- */

/* Print `PASS: name` or `FAIL: name`, and count it where the host sees it (struct kvmmm_report). */
void report(bool passed, const char *name, ...) __attribute__((format(printf, 2, 3)));

/* Print `SUMMARY: 12 checks, 0 failed` and return the exit status: 0 or KVMMM_STATUS_FAILED. */
int report_summary(void);

/* ---- Command line (args.c) ------------------------------------------------------------------- */

/* The whitespace-separated words of the command line; the count is returned. No quoting. */
int kvmmm_args(const char *const **words);

/* The value of the word `key=value`, or fallback. */
const char *kvmmm_option(const char *key, const char *fallback);

/* The same as a number: decimal or 0x…, then K, M or G. Or the run ends with status 2. */
uint64_t kvmmm_option_number(const char *key, uint64_t fallback);

/* End the run with status 2 if a word is not `key=…` of one of these space-separated keys. */
void kvmmm_only_options(const char *keys);

/* Parse a number as above; false if it is not one. */
bool kvmmm_parse_number(const char *text, uint64_t *number);

/* ---- Memory (memory.c, mem.c) ---------------------------------------------------------------- */

/* The largest range of free RAM, without the stack: page aligned, untouched, zero. */
struct kvmmm_range {
    uint64_t start, end; /* [start, end) */
};
struct kvmmm_range kvmmm_ram(void);

void *memcpy(void *restrict to, const void *restrict from, size_t n);
void *memmove(void *to, const void *from, size_t n);
void *memset(void *to, int byte, size_t n);
int memcmp(const void *a, const void *b, size_t n);
size_t strlen(const char *text);
bool kvmmm_equal(const char *a, const char *b);

/* ---- Exceptions (trap.c, trap.S) ------------------------------------------------------------- */

struct kvmmm_trap_frame {
    uint64_t cr2;
    uint64_t r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
    uint64_t vector, error;
    uint64_t rip, cs, rflags, rsp, ss;
};

/* Handle exceptions 0 to 31 in the guest. Ring 0 only. The handler runs in ring 0 and may change
 * the frame; when it returns, the interrupted code goes on as the frame says.
 */
void kvmmm_set_trap_handler(void (*handler)(struct kvmmm_trap_frame *frame));

/* ---- Instructions ---------------------------------------------------------------------------- */

#ifndef KVMMM_HOSTED

static inline void kvmmm_out8(uint16_t port, uint8_t value)
{
    asm volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline unsigned kvmmm_cpl(void)
{
    uint32_t cs;
    asm("mov %%cs, %0" : "=r"(cs));
    return cs & 3;
}

#else
void kvmmm_out8(uint16_t port, uint8_t value);
unsigned kvmmm_cpl(void);
#endif

static inline uint64_t kvmmm_rdtsc(void)
{
    uint32_t low, high;
    asm volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

#endif /* KVMMM_H */
