/* args: a guest sees its command line and its memory. Expected: both printed, status 0. */
#include "kvmmm.h"

static const char *kind_name(uint32_t kind)
{
    switch (kind) {
    case KVMMM_REGION_RAM: return "ram";
    case KVMMM_REGION_IMAGE: return "image";
    case KVMMM_REGION_SYSTEM: return "system";
    default: return "?";
    }
}

static int show(void *arg)
{
    const struct kvmmm_boot_info *boot = arg;
    const struct kvmmm_region *region = (const struct kvmmm_region *)boot->regions;
    struct kvmmm_range ram = kvmmm_ram();
    const char *const *words;
    int n = kvmmm_args(&words);

    kprintf("cmdline (%u bytes): %s\n", boot->cmdline_bytes, (const char *)boot->cmdline);
    for (int i = 0; i < n; i++)
        kprintf("  [%d] %s\n", i, words[i]);
    kprintf("memory: %lu MiB, stack top 0x%lx\n", boot->memory_bytes >> 20, boot->stack_top);
    for (uint32_t i = 0; i < boot->n_regions; i++, region++)
        kprintf("  0x%012lx..0x%012lx %8lu KiB %c%c%c %s\n", region->start, region->end,
                (region->end - region->start) >> 10, region->flags & KVMMM_REGION_R ? 'r' : '-',
                region->flags & KVMMM_REGION_W ? 'w' : '-',
                region->flags & KVMMM_REGION_X ? 'x' : '-', kind_name(region->kind));
    kprintf("largest free range: 0x%lx..0x%lx\n", ram.start, ram.end);
    kprintf("cpu: %s%s%s%s, tsc %lu Hz\n", boot->cpu_features & KVMMM_CPU_SSE ? "sse" : "",
            boot->cpu_features & KVMMM_CPU_AVX ? " avx" : "",
            boot->cpu_features & KVMMM_CPU_FSGSBASE ? " fsgsbase" : "",
            boot->cpu_features & KVMMM_CPU_1GIB ? " 1gib" : "", boot->tsc_hz);
    kprintf("console: %u bytes out, %u bytes in\n",
            ((const struct kvmmm_console *)boot->console)->out_bytes,
            ((const struct kvmmm_console *)boot->console)->in_bytes);
    return KVMMM_STATUS_OK;
}

int main(const struct kvmmm_boot_info *boot)
{
    return kvmmm_enter_ring3(show, (void *)boot);
}
