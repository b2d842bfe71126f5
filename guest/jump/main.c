/* jump: a wild jump is reported with its target. Expected: a fault (execute) at 0xdead000.
 *
 * Options: to=0xdead000 (the default lies beyond 64 MiB of memory, where nothing is mapped at all;
 * an address in free RAM is mapped, but not executable), ring=3 (or 0).
 */
#include "kvmmm.h"

static int jump(void *arg)
{
    uint64_t to = kvmmm_option_number("to", 0xdead000);

    (void)arg;
    kprintf("jump: jumps to 0x%lx in ring %u\n", to, kvmmm_cpl());
    asm volatile("call *%0" : : "r"(to) : "memory");
    kprintf("FAIL: there was something to come back from\n");
    return KVMMM_STATUS_FAILED;
}

int main(const struct kvmmm_boot_info *boot)
{
    (void)boot;
    kvmmm_only_options("to ring");
    return kvmmm_option_number("ring", 3) == 0 ? jump(NULL) : kvmmm_enter_ring3(jump, NULL);
}
