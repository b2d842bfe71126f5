/* bench_touch: what the first write to each page costs. Expected: status 0.
 *
 * Options: bytes=64M, start=0 (0: the first 2 MiB boundary in free RAM), mark=1: one `out` to port
 * 0xb1 before the first touch and one to 0xb2 after the last. One word a 4 KiB page, ascending, in
 * ring 3, and nothing else.
 */
#include "kvmmm.h"

static int touch(void *arg)
{
    struct kvmmm_range ram = kvmmm_ram();
    uint64_t first = (ram.start + KVMMM_WINDOW_BYTES - 1) & -KVMMM_WINDOW_BYTES;
    uint64_t bytes = kvmmm_option_number("bytes", 64UL << 20);
    uint64_t start = kvmmm_option_number("start", 0);
    bool mark = kvmmm_option_number("mark", 0) != 0;

    (void)arg;
    start = (start != 0 ? start : first) & -KVMMM_PAGE_BYTES;
    bytes &= -KVMMM_PAGE_BYTES;
    if (start < ram.start || start > ram.end || bytes > ram.end - start || bytes == 0) {
        kprintf("bench_touch: 0x%lx + %lu bytes is not within RAM 0x%lx..0x%lx\n", start, bytes,
                ram.start, ram.end);
        return KVMMM_STATUS_USAGE;
    }
    if (mark)
        asm volatile("outl %0, $0xb1" : : "a"(0) : "memory");
    uint64_t addr = start;
    asm volatile("1: mov %0, (%0)\n"
                 "   add $4096, %0\n"
                 "   cmp %1, %0\n"
                 "   jb 1b\n"
                 : "+r"(addr)
                 : "r"(start + bytes)
                 : "memory", "cc");
    if (mark)
        asm volatile("outl %0, $0xb2" : : "a"(0) : "memory");
    return KVMMM_STATUS_OK;
}

int main(const struct kvmmm_boot_info *boot)
{
    (void)boot;
    kvmmm_only_options("bytes start mark");
    return kvmmm_enter_ring3(touch, NULL);
}
