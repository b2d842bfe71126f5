/* safecopy.c: who gets SIGSEGV and SIGBUS: a copy that faulted, or whoever had the signal before us.
 *
 * The handler does nothing that a signal handler may not do: it compares, writes registers, and for
 * faults that are not ours behaves as if we were not there.
 */
#define _GNU_SOURCE
#include "safecopy.h"

#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum {
    MAX_FOUND = 14,          /* different handlers, in the process's life, of one signal */
    MAX_RETURNS = 8,         /* to an armed copy's instruction, whose fault then comes to us */
    MAX_REPEATS = 1 << 14,   /* of one fault, none other between: some 50 ms */
    STREAM_BYTES = 16 << 20, /* half of the caches that are common: both sides must fit */
    TRAP_PAGE_FAULT = 14,
    ERROR_WRITE = 2, /* of a page fault's error code: SDM 3A, "Page-Fault Exceptions" */
};

#define HERE __attribute__((tls_model("initial-exec")))

/* copy_kernel.S; offsets from the first row. */
struct range {
    int32_t start, end, landing;
    int32_t is_exact; /* rdi and rsi say which byte, better than the signal does */
};
#pragma GCC visibility push(hidden)
extern const struct range kvmmm_copy_ranges[], kvmmm_copy_ranges_end[];
extern const char kvmmm_copy_text[], kvmmm_copy_text_end[];

/* What the kernels look at. Armed: set while this thread is in one. Initial-exec: a handler may not
 * allocate. Stream: from this size on a copy goes past the caches. */
HERE _Thread_local volatile uint8_t kvmmm_copy_armed;
uint8_t kvmmm_copy_avx2;
size_t kvmmm_copy_stream_bytes;
#pragma GCC visibility pop

/* What this thread is passing on. */
static HERE _Thread_local struct {
    uintptr_t frame;  /* of the innermost pass_on that has not come back, or 0 */
    unsigned level;   /* that it called */
    unsigned n_returns;
    unsigned n_same;  /* real faults that came with the same registers, one after the other */
    uint64_t registers;
} passing;

/* Handlers that we found, each once, never changed; and who is asked in which order: four bits each, the
 * newest lowest, index + 1. One word, so that a handler sees all of a change or nothing. */
static struct found {
    int signal;
    unsigned n_found;
    struct sigaction actions[MAX_FOUND];
    _Atomic uint64_t order;
} found[2] = {{.signal = SIGSEGV}, {.signal = SIGBUS}};

static struct found *found_of(int signo) { return &found[signo == SIGBUS]; }

/* A copy that faulted goes on at its landing. */
static bool recover(const siginfo_t *info, greg_t *regs)
{
    uintptr_t base = (uintptr_t)kvmmm_copy_ranges, rip = (uintptr_t)regs[REG_RIP];
    for (const struct range *r = kvmmm_copy_ranges; r < kvmmm_copy_ranges_end; r++) {
        if (rip < base + r->start || rip >= base + r->end)
            continue;
        uintptr_t addr = (uintptr_t)info->si_addr;
        /* A string instruction's address may be that of a page or of a whole line. */
        if (r->is_exact && regs[REG_TRAPNO] == TRAP_PAGE_FAULT &&
            !(info->si_signo == SIGBUS && info->si_code == BUS_MCEERR_AR))
            addr = (uintptr_t)(regs[REG_ERR] & ERROR_WRITE ? regs[REG_RDI] : regs[REG_RSI]);
        regs[REG_R10] = (greg_t)addr;
        regs[REG_R9] = info->si_signo;
        regs[REG_RIP] = (greg_t)(base + r->landing);
        passing.n_returns = 0;
        return true;
    }
    return false;
}

/* Anywhere in a kernel, before or after the instructions that may fault, too. */
static bool is_in_kernels(const greg_t *regs)
{
    const char *rip = (const char *)regs[REG_RIP];
    return rip >= kvmmm_copy_text && rip < kvmmm_copy_text_end;
}

/* The process ends by this signal, as if there had never been a handler. */
static void die(int signo, const siginfo_t *info)
{
    struct sigaction usual = {.sa_handler = SIG_DFL};
    sigaction(signo, &usual, NULL);
    /* A real fault comes again when its instruction does, and the core is that of the fault. */
    if (info->si_code > 0 && !(signo == SIGBUS && info->si_code == BUS_MCEERR_AO))
        return;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, signo);
    syscall(SYS_tgkill, getpid(), (pid_t)syscall(SYS_gettid), signo);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

/* As the kernel would have called it. */
static void call(const struct sigaction *action, int signo, siginfo_t *info, void *context)
{
    sigset_t mask = action->sa_mask, before;
    if (!(action->sa_flags & SA_NODEFER))
        sigaddset(&mask, signo);
    if (action->sa_flags & SA_RESETHAND)
        atomic_store(&found_of(signo)->order, 0);
    pthread_sigmask(SIG_BLOCK, &mask, &before);
    if (action->sa_flags & SA_SIGINFO)
        action->sa_sigaction(signo, info, context);
    else
        action->sa_handler(signo);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Whether the thread stands where it stood at its last fault: then that was not cured. */
static void note_repetition(const siginfo_t *info, const greg_t *regs)
{
    uint64_t hash = (uintptr_t)info->si_addr;
    for (int i = 0; i < NGREG; i++)
        hash = (hash ^ (uint64_t)regs[i]) * 0x9e3779b97f4a7c15u;
    passing.n_same = hash == passing.registers ? passing.n_same + 1 : 0;
    passing.registers = hash;
}

/* Who had the signal before us gets it. Two things keep that from going round for ever:
 * - a handler may give the signal to the one that it replaced, by raise() (faulthandler does), and that
 *   may be us. Who is on this thread's stack already is not called again: the one found before it is.
 * - a handler may return and have changed nothing (Python's, or faulthandler's once it is disabled). What
 *   it cannot cure after very many times goes to the one found before it, and ends as it would have. */
static void pass_on(int signo, siginfo_t *info, ucontext_t *context)
{
    uintptr_t frame = (uintptr_t)__builtin_frame_address(0), outer_frame = passing.frame;
    unsigned outer_level = passing.level, level = 0;
    if (frame < outer_frame) {
        level = outer_level + 1;
    } else if (info->si_code > 0) {
        note_repetition(info, context->uc_mcontext.gregs);
        level = passing.n_same / MAX_REPEATS;
    }
    struct found *f = found_of(signo);
    uint64_t order = level < 16 ? atomic_load(&f->order) >> 4 * level : 0;
    if (!(order & 15)) {
        die(signo, info);
        return;
    }
    const struct sigaction *action = &f->actions[(order & 15) - 1];
    if (!(action->sa_flags & SA_SIGINFO) && action->sa_handler == SIG_IGN) {
        if (info->si_code > 0) /* the kernel does not let a real fault be ignored */
            die(signo, info);
        return;
    }
    passing.frame = frame;
    passing.level = level;
    call(action, signo, info, context);
    passing.frame = frame < outer_frame ? outer_frame : 0;
    passing.level = outer_level;
}

static void on_fault(int signo, siginfo_t *info, void *argument)
{
    ucontext_t *context = argument;
    greg_t *regs = context->uc_mcontext.gregs;
    if (info->si_code > 0 && is_in_kernels(regs) && recover(info, regs))
        return;
    int err = errno;
    /* Another handler got a copy's fault first and raised the signal for us: back to the copy, whose
     * instruction faults again; this time we are asked first. */
    bool is_raised = (info->si_code == SI_TKILL || info->si_code == SI_USER) && info->si_pid == getpid();
    if (!(kvmmm_copy_armed && is_raised && !is_in_kernels(regs) && passing.n_returns++ < MAX_RETURNS))
        pass_on(signo, info, context);
    errno = err;
}

/* Of a mask the kernel knows the first 64 signals; what libc returns behind them may be anything. */
enum { KERNEL_MASK_BYTES = 8 };

static bool is_same(const struct sigaction *a, const struct sigaction *b)
{
    return a->sa_sigaction == b->sa_sigaction && a->sa_flags == b->sa_flags &&
           !memcmp(&a->sa_mask, &b->sa_mask, KERNEL_MASK_BYTES);
}

/* Have it asked first when something is not ours. With the lock. */
static int remember(struct found *f, const struct sigaction *action)
{
    if (!(action->sa_flags & SA_SIGINFO) && action->sa_handler == SIG_DFL) {
        atomic_store(&f->order, 0);
        return 0;
    }
    uint64_t index = 0;
    while (index < f->n_found && !is_same(&f->actions[index], action))
        index++;
    if (index == MAX_FOUND)
        return -ENOSPC;
    if (index == f->n_found)
        f->actions[f->n_found++] = *action;
    uint64_t order = index + 1;
    if (action->sa_flags & SA_SIGINFO || action->sa_handler != SIG_IGN) {
        int shift = 4;
        for (uint64_t rest = atomic_load(&f->order); rest & 15; rest >>= 4)
            if ((rest & 15) != index + 1) {
                order |= (rest & 15) << shift;
                shift += 4;
            }
    }
    atomic_store(&f->order, order);
    return 0;
}

/* Whether the kernel gives the signal to us. 0 or 1, or -errno. */
static int is_ours(int signo, struct sigaction *now)
{
    if (sigaction(signo, NULL, now))
        return -errno;
    /* Somebody who restores a function and not its flags leaves us without the siginfo. */
    return now->sa_sigaction == on_fault && now->sa_flags & SA_SIGINFO;
}

static int own(struct found *f)
{
    struct sigaction now, mine = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    int rc = is_ours(f->signal, &now);
    if (rc)
        return rc < 0 ? rc : 0;
    if (now.sa_sigaction != on_fault && (rc = remember(f, &now)))
        return rc;
    return sigaction(f->signal, &mine, NULL) ? -errno : 0;
}

int kvmmm_safecopy_own(void)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    struct sigaction now;
    if (is_ours(SIGSEGV, &now) != 1 || is_ours(SIGBUS, &now) != 1) {
        pthread_mutex_lock(&lock);
        int rc = own(&found[0]);
        if (!rc)
            rc = own(&found[1]);
        pthread_mutex_unlock(&lock);
        if (rc)
            return rc;
    }
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGSEGV);
    sigaddset(&set, SIGBUS);
    return -pthread_sigmask(SIG_UNBLOCK, &set, NULL);
}

/* As __builtin_cpu_supports("avx2"), with a third of its CPUIDs, each of which leaves a virtual machine.
 * SDM 1, "Detection of AVX2". */
static bool has_avx2(void)
{
    enum { YMM_STATE = 6 };
    unsigned eax, ebx, ecx, edx, state, high;
    __cpuid(0, eax, ebx, ecx, edx);
    if (eax < 7)
        return false;
    __cpuid(1, eax, ebx, ecx, edx);
    if (!(ecx & bit_OSXSAVE))
        return false;
    __asm__("xgetbv" : "=a"(state), "=d"(high) : "c"(0));
    __cpuid_count(7, 0, eax, ebx, ecx, edx);
    return (state & YMM_STATE) == YMM_STATE && ebx & bit_AVX2;
}

bool kvmmm_safecopy_tune(bool avx2, size_t stream_bytes)
{
    kvmmm_copy_avx2 = avx2 && has_avx2();
    kvmmm_copy_stream_bytes = stream_bytes ? stream_bytes : STREAM_BYTES;
    return kvmmm_copy_avx2;
}

__attribute__((constructor)) static void tune_at_load(void) { kvmmm_safecopy_tune(true, 0); }
