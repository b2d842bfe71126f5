/* traps: a guest handles exceptions by an IDT of its own. Expected: no check fails, status 0.
 *
 * The handler is installed in ring 0; the exceptions come from ring 3, the way on is past them.
 */
#include "kvmmm.h"

enum { DE = 0, BP = 3, UD = 6, GP = 13, PF = 14 };

static volatile struct {
    uint64_t vector, error, cr2, cs, rip;
} seen;
static volatile uint64_t resume; /* where to go on; 0 if nothing is meant to raise */

static void handle(struct kvmmm_trap_frame *frame)
{
    if (resume == 0) {
        kprintf("FAIL: exception %lu, error code 0x%lx, at 0x%lx, cr2 0x%lx\n", frame->vector,
                frame->error, frame->rip, frame->cr2);
        kvmmm_exit(KVMMM_STATUS_FAILED);
    }
    seen.vector = frame->vector;
    seen.error = frame->error;
    seen.cr2 = frame->cr2;
    seen.cs = frame->cs;
    seen.rip = frame->rip;
    frame->rip = resume;
    resume = 0;
}

/* Run one instruction that raises, with rax = a and rcx = c; registers must survive. */
#define RAISE(instruction, a, c)                                                                   \
    ({                                                                                             \
        uint64_t witness = 0x5eed, rax_ = (a), rcx_ = (c), rdx_ = 0;                               \
        seen.vector = ~0UL;                                                                        \
        asm volatile("lea 1f(%%rip), %%r8; mov %%r8, %4; " instruction "; 1:"                      \
                     : "+a"(rax_), "+c"(rcx_), "+d"(rdx_), "+b"(witness), "=m"(resume)             \
                     :                                                                             \
                     : "r8", "memory", "cc");                                                      \
        witness == 0x5eed;                                                                         \
    })

static int raise_all(void *arg)
{
    uint64_t beyond = 0x7ffffff000; /* below 2^40, and no memory there */

    (void)arg;
    report(RAISE("ud2", 0, 0) && seen.vector == UD, "ud2 raises #UD");
    report(seen.cs == KVMMM_USER_CS, "from ring 3");
    report(RAISE("div %%rcx", 1, 0) && seen.vector == DE, "a division by zero raises #DE");
    report(RAISE("int3", 0, 0) && seen.vector == BP, "int3 raises #BP");
    report(RAISE("hlt", 0, 0) && seen.vector == GP && seen.error == 0, "hlt raises #GP(0)");
    report(RAISE("outb %%al, $0x80", 0, 0) && seen.vector == GP,
           "a port outside the bitmap raises #GP");
    report(RAISE("mov (%%rcx), %%rax", 0, 1UL << 63) && seen.vector == GP,
           "a non-canonical address raises #GP");
    report(RAISE("mov (%%rcx), %%rax", 0, beyond) && seen.vector == PF, "a wild load raises #PF");
    report(seen.cr2 == beyond && seen.error == 4, "with its address in cr2, error code user");
    report(RAISE("mov %%rax, (%%rcx)", 0, beyond + 8) && seen.vector == PF &&
               seen.cr2 == beyond + 8 && seen.error == 6,
           "a wild store raises #PF, error code user|write");
    report(RAISE("jmp *%%rcx", 0, beyond) && seen.vector == PF && seen.rip == beyond &&
               (seen.error & 4) != 0,
           "a wild jump raises #PF at its target");
    return report_summary();
}

int main(const struct kvmmm_boot_info *boot)
{
    (void)boot;
    kvmmm_set_trap_handler(handle);
    return kvmmm_enter_ring3(raise_all, NULL);
}
