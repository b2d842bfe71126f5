/* nox: data cannot be executed. Expected: stopped by a fault (execute) at `code`.
 *
 * Option: ring=3 (or 0).
 */
#include "kvmmm.h"

static uint8_t code[16] = {0xc3}; /* ret, in the data segment */

static int jump(void *arg)
{
    void (*volatile into_data)(void) = (void (*)(void))(uint64_t)code;

    (void)arg;
    kprintf("nox: calls its data at %p in ring %u\n", (void *)code, kvmmm_cpl());
    into_data();
    kprintf("FAIL: data was executed\n");
    return KVMMM_STATUS_FAILED;
}

int main(const struct kvmmm_boot_info *boot)
{
    (void)boot;
    kvmmm_only_options("ring");
    return kvmmm_option_number("ring", 3) == 0 ? jump(NULL) : kvmmm_enter_ring3(jump, NULL);
}
