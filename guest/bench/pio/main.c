/* bench_pio: exits by a ring-3 `out`, one after the other. Expected: n on port 0xb0, status 0.
 *
 * Options: n=0 (how many; 0: for ever), mark=1: one `out` to port 0xb1 before the first and one to
 * 0xb2 after the last. Each `out` shows the host n counted down, in eax. The host may change any
 * register but rsp and r12, the counter.
 */
#include "kvmmm.h"

static int loop(void *arg)
{
    bool mark = kvmmm_option_number("mark", 0) != 0;
    register uint64_t n asm("r12") = kvmmm_option_number("n", 0);

    (void)arg;
    if (mark)
        asm volatile("outl %0, $0xb1" : : "a"(0) : "memory");
    asm volatile("1: mov %%r12d, %%eax\n"
                 "   outl %%eax, $0xb0\n"
                 "   dec %%r12\n"
                 "   jnz 1b\n"
                 : "+r"(n)
                 :
                 : "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r13", "r14",
                   "r15", "memory", "cc");
    if (mark)
        asm volatile("outl %0, $0xb2" : : "a"(0) : "memory");
    return KVMMM_STATUS_OK;
}

int main(const struct kvmmm_boot_info *boot)
{
    (void)boot;
    kvmmm_only_options("n mark");
    return kvmmm_enter_ring3(loop, NULL);
}
