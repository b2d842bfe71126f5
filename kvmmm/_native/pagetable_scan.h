/* pagetable_scan.h: which frames a range of guest-virtual addresses leads to. Reads only. */
#ifndef KVMMM_PAGETABLE_SCAN_H
#define KVMMM_PAGETABLE_SCAN_H

#include "pagetable.h"

enum { KVMMM_PT_SCAN_RUNS = 64 };

/* Contiguous in both address spaces, with the same flags: effective ones, over all levels. */
struct kvmmm_pt_run {
    uint64_t gva, gpa, n_bytes, flags;
};

struct kvmmm_pt_scan {
    uint64_t n_bytes; /* mapped, in the runs together */
    uint32_t n_runs;
    struct kvmmm_pt_run runs[KVMMM_PT_SCAN_RUNS];
};

/* Fill in what [gva, gva + n_bytes) is mapped to, clipped to it. Returns where it stopped: the end; or before
 * it, when the runs are full, or hold more than @p max_bytes. */
uint64_t kvmmm_pt_scan(const struct kvmmm_pt *t, uint64_t gva, uint64_t n_bytes, uint64_t max_bytes,
                       struct kvmmm_pt_scan *scan);

#endif /* KVMMM_PAGETABLE_SCAN_H */
