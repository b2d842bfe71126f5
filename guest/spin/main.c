/* spin: what never ends can be stopped, its last line was seen. Expected: the deadline ends it. */
#include "kvmmm.h"

static int spin(void *arg)
{
    (void)arg;
    kprintf("spin: jumps in place for ever, in ring %u\n", kvmmm_cpl());
    console_flush();
    for (;;)
        asm volatile("");
    return KVMMM_STATUS_FAILED;
}

int main(const struct kvmmm_boot_info *boot)
{
    (void)boot;
    kvmmm_only_options("ring");
    return kvmmm_option_number("ring", 3) == 0 ? spin(NULL) : kvmmm_enter_ring3(spin, NULL);
}
