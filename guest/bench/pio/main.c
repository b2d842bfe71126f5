/* bench_pio: exits by a ring-3 `out`, one after the other. Expected: n on port 0xb0, status 0.
 *
 * Options: n=0 (how many; 0: for ever), mark=0: one `out` to port 0xb1 before the first, after every
 * so many (n is a multiple), and after the last. Each `out` shows the host how many are left until
 * the next mark, in eax. The host may change any register but rsp, rbp and r12, the counter.
 */
#include "kvmmm.h"

static void work(uint64_t count)
{
    register uint64_t n asm("r12") = count;

    asm volatile("1: mov %%r12d, %%eax\n"
                 "   outl %%eax, $0xb0\n"
                 "   dec %%r12\n"
                 "   jnz 1b\n"
                 : "+r"(n)
                 :
                 : "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r13", "r14",
                   "r15", "memory", "cc");
}

static int loop(void *arg)
{
    uint64_t n = kvmmm_option_number("n", 0);
    uint64_t mark = kvmmm_option_number("mark", 0);

    (void)arg;
    if (mark == 0) {
        work(n);
        return KVMMM_STATUS_OK;
    }
    for (; n >= mark; n -= mark) {
        asm volatile("outl %0, $0xb1" : : "a"((uint32_t)n) : "memory");
        work(mark);
    }
    asm volatile("outl %0, $0xb1" : : "a"(0) : "memory");
    return KVMMM_STATUS_OK;
}

int main(const struct kvmmm_boot_info *boot)
{
    (void)boot;
    kvmmm_only_options("n mark");
    return kvmmm_enter_ring3(loop, NULL);
}
