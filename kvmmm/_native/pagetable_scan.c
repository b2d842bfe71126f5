/* pagetable_scan.c: see pagetable_scan.h. */
#include "pagetable_scan.h"

#include "pagetable_entry.h"

/* Add a piece that is mapped; false when there is no room for it. */
static bool add(struct kvmmm_pt_scan *scan, uint64_t gva, uint64_t gpa, uint64_t n_bytes, uint64_t flags)
{
    struct kvmmm_pt_run *run = scan->runs + scan->n_runs - 1;
    if (scan->n_runs && run->gva + run->n_bytes == gva && run->gpa + run->n_bytes == gpa && run->flags == flags) {
        run->n_bytes += n_bytes;
    } else {
        if (scan->n_runs == KVMMM_PT_SCAN_RUNS)
            return false;
        scan->runs[scan->n_runs++] = (struct kvmmm_pt_run){gva, gpa, n_bytes, flags};
    }
    scan->n_bytes += n_bytes;
    return true;
}

uint64_t kvmmm_pt_scan(const struct kvmmm_pt *t, uint64_t gva, uint64_t n_bytes, uint64_t max_bytes,
                       struct kvmmm_pt_scan *scan)
{
    uint64_t at = gva, end = gva + n_bytes;
    scan->n_bytes = scan->n_runs = 0;
    while (at < end && !t->is_released) {
        /* Down to the table whose entry decides about `at`. */
        uint64_t every = W | U, some = 0, entry;
        unsigned level = ROOT_LEVEL;
        const uint64_t *table = table_at(t, t->root_gpa);
        for (; is_link(entry = table[index_of(at, level)], level); level--) {
            every &= entry;
            some |= entry & NX;
            table = table_at(t, entry);
        }
        /* Then along it, as far as there are no links. */
        uint64_t span = span_of(level);
        for (unsigned i = index_of(at, level); i < N_ENTRIES && at < end; i++) {
            entry = table[i];
            if (is_link(entry, level))
                break;
            uint64_t offset = at & (span - 1), n = span - offset;
            n = n < end - at ? n : end - at;
            if (entry & P) {
                uint64_t flags = (entry & LEAF_FLAGS & ~(W | U | NX)) | (every & entry) | some | (entry & NX);
                if (!add(scan, at, (entry & ADDRESS & -span) + offset, n, flags))
                    return at;
            }
            at += n;
            if (scan->n_bytes > max_bytes)
                return at;
        }
    }
    return end;
}
