/* null: page 0 is never mapped. Expected: stopped by a fault (read) at address 0.
 *
 * Option: ring=3 (or 0).
 */
#include "kvmmm.h"

static int load(void *arg)
{
    uint64_t value, address = 0;

    (void)arg;
    kprintf("null: reads address 0 in ring %u\n", kvmmm_cpl());
    asm volatile("mov (%1), %0" : "=r"(value) : "r"(address)); /* gcc would make it a trap */
    kprintf("FAIL: it is 0x%lx\n", value);
    return KVMMM_STATUS_FAILED;
}

int main(const struct kvmmm_boot_info *boot)
{
    (void)boot;
    kvmmm_only_options("ring");
    return kvmmm_option_number("ring", 3) == 0 ? load(NULL) : kvmmm_enter_ring3(load, NULL);
}
