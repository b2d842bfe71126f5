/* ro: constants cannot be written. Expected: stopped by a fault (write) at `constant`.
 *
 * Option: ring=3 (or 0).
 */
#include "kvmmm.h"

static const uint64_t constant = 0x600dc0de; /* not volatile: gcc would make it data */

static int store(void *arg)
{
    (void)arg;
    const uint64_t *address = &constant;
    asm("" : "+r"(address)); /* gcc knows no longer what stands there */
    kprintf("ro: writes to a constant at %p in ring %u\n", (const void *)address, kvmmm_cpl());
    *(volatile uint64_t *)address = 0xbadc0de;
    kprintf("FAIL: the store went through, and the constant is 0x%lx\n", *address);
    return KVMMM_STATUS_FAILED;
}

int main(const struct kvmmm_boot_info *boot)
{
    (void)boot;
    kvmmm_only_options("ring");
    return kvmmm_option_number("ring", 3) == 0 ? store(NULL) : kvmmm_enter_ring3(store, NULL);
}
