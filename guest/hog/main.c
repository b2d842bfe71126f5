/* hog: memory runs out politely. Expected: status 0; with --arena 16M "memory is exhausted".
 *
 * Touches one word in every page of free RAM, in ring 3, and says where it is on the way.
 */
#include "kvmmm.h"

static int hog(void *arg)
{
    struct kvmmm_range ram = kvmmm_ram();
    uint64_t step = (ram.end - ram.start) / 8, next = ram.start + step;

    (void)arg;
    kprintf("hog: touches every page of 0x%lx..0x%lx\n", ram.start, ram.end);
    for (uint64_t addr = ram.start; addr < ram.end; addr += KVMMM_PAGE_BYTES) {
        *(volatile uint64_t *)addr = addr;
        if (addr >= next) {
            kprintf("hog: has %lu KiB\n", (addr - ram.start) >> 10);
            next += step;
        }
    }
    for (uint64_t addr = ram.start; addr < ram.end; addr += KVMMM_PAGE_BYTES)
        if (*(volatile uint64_t *)addr != addr) {
            kprintf("FAIL: wrong bytes at 0x%lx\n", addr);
            return KVMMM_STATUS_FAILED;
        }
    kprintf("hog: has all of it, and every byte is right\n");
    return KVMMM_STATUS_OK;
}

int main(const struct kvmmm_boot_info *boot)
{
    (void)boot;
    kvmmm_only_options("");
    return kvmmm_enter_ring3(hog, NULL);
}
