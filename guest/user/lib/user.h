/* user.h: what a program in ring 3 has instead of a libc: Linux's system calls, and the text, verdicts
 * and options of kvmmm.h.
 *
 * A program of this kind is a static Linux program: entered at _start with argc, argv, envp and the
 * auxiliary vector on its stack. The same file runs on Linux itself.
 */
#ifndef USER_H
#define USER_H

#include <asm/errno.h>
#include <asm/mman.h>
#include <asm/prctl.h>
#include <asm/unistd.h>
#include <linux/auxvec.h>
#include <linux/mman.h>

#include "kvmmm.h"

/* As the program was entered; set before main. */
extern const uint64_t *user_stack; /* rsp: argc, argv[], NULL, envp[], NULL, auxv[] */
extern uint64_t user_rdx;          /* for atexit where a loader set it; 0 for a static program */

/* One entry of the auxiliary vector; false if there is none. */
bool user_auxv(uint64_t type, uint64_t *value);

/* Entry point: start.S. */
extern const char _start[];

/* ---- System calls: the kernel's answer, -errno for a failure --------------------------------- */

static inline long user_call(long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e,
                             uint64_t f)
{
    register uint64_t r10 asm("r10") = d;
    register uint64_t r8 asm("r8") = e;
    register uint64_t r9 asm("r9") = f;
    long answer;

    asm volatile("syscall"
                 : "=a"(answer)
                 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                 : "rcx", "r11", "memory");
    return answer;
}

static inline bool user_failed(long answer) { return (uint64_t)answer > -4096UL; }

static inline void user_exit_group(int status) __attribute__((noreturn));
static inline void user_exit_group(int status)
{
    for (;;)
        user_call(__NR_exit_group, (uint64_t)status, 0, 0, 0, 0, 0);
}

static inline long user_write(int fd, const void *bytes, size_t n)
{
    return user_call(__NR_write, (uint64_t)fd, (uint64_t)bytes, n, 0, 0, 0);
}

static inline long user_mmap(uint64_t addr, size_t n, int prot, int flags, int fd, uint64_t offset)
{
    return user_call(__NR_mmap, addr, n, (uint64_t)prot, (uint64_t)flags, (uint64_t)fd, offset);
}

static inline long user_munmap(uint64_t addr, size_t n)
{
    return user_call(__NR_munmap, addr, n, 0, 0, 0, 0);
}

static inline long user_mprotect(uint64_t addr, size_t n, int prot)
{
    return user_call(__NR_mprotect, addr, n, (uint64_t)prot, 0, 0, 0);
}

static inline long user_mremap(uint64_t addr, size_t n, size_t n_new, int flags, uint64_t to)
{
    return user_call(__NR_mremap, addr, n, n_new, (uint64_t)flags, to, 0);
}

static inline long user_madvise(uint64_t addr, size_t n, int advice)
{
    return user_call(__NR_madvise, addr, n, (uint64_t)advice, 0, 0, 0);
}

/* The new end of the heap, or the old one where it cannot be moved. */
static inline uint64_t user_brk(uint64_t end)
{
    return (uint64_t)user_call(__NR_brk, end, 0, 0, 0, 0, 0);
}

static inline long user_fork(void) { return user_call(__NR_fork, 0, 0, 0, 0, 0, 0); }
static inline long user_getpid(void) { return user_call(__NR_getpid, 0, 0, 0, 0, 0, 0); }
static inline long user_yield(void) { return user_call(__NR_sched_yield, 0, 0, 0, 0, 0, 0); }

#endif /* USER_H */
