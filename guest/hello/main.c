/* hello: a guest starts, prints through the console ring, ends. Expected: one line, status 0. */
#include "kvmmm.h"

int main(const struct kvmmm_boot_info *boot)
{
    kprintf("hello from ring %u, with %lu MiB of memory and an ABI of version %u\n", kvmmm_cpl(),
            boot->memory_bytes >> 20, boot->version);
    return KVMMM_STATUS_OK;
}
