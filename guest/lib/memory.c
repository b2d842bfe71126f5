/* The memory map, for guests that just want a piece of it. */
#include "kvmmm.h"

struct kvmmm_range kvmmm_ram(void)
{
    const struct kvmmm_region *region = (const struct kvmmm_region *)kvmmm_boot->regions;
    uint64_t stack_end = kvmmm_boot->stack_top;
    uint64_t stack_start = stack_end - KVMMM_STACK_BYTES;
    struct kvmmm_range best = {0, 0};

    for (uint32_t i = 0; i < kvmmm_boot->n_regions; i++, region++) {
        if (region->kind != KVMMM_REGION_RAM)
            continue;
        /* The stack cuts a region in two; keep the larger part. */
        struct kvmmm_range part = {region->start, region->end};
        if (part.start < stack_end && stack_start < part.end) {
            uint64_t below = stack_start > part.start ? stack_start - part.start : 0;
            uint64_t above = part.end > stack_end ? part.end - stack_end : 0;
            if (below >= above)
                part.end = part.start + below;
            else
                part.start = stack_end;
        }
        if (part.end - part.start > best.end - best.start)
            best = part;
    }
    return best;
}
