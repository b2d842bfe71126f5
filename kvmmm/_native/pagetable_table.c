/* pagetable_table.c: tables as a whole, and one address looked up. */
#include "pagetable_entry.h"

void kvmmm_pt_store(uint64_t *entry, uint64_t value) { store(entry, value); }

uint64_t kvmmm_pt_lookup(const struct kvmmm_pt *t, uint64_t gva)
{
    if (t->is_released || (gva >= LOWER_HALF_END && gva < UPPER_HALF_START) ||
        is_fixed(t, index_of(gva, ROOT_LEVEL)))
        return 0;
    uint64_t every = W | U, some = 0;
    const uint64_t *table = table_at(t, t->root_gpa);
    for (unsigned l = ROOT_LEVEL;; l--) {
        uint64_t entry = table[index_of(gva, l)];
        if (!(entry & P))
            return 0;
        every &= entry;
        some |= entry & NX;
        if (!is_link(entry, l)) {
            uint64_t frame = entry & ADDRESS & -span_of(l);
            return frame | (entry & LEAF_FLAGS & ~(W | U)) | every | some | (uint64_t)l << 9;
        }
        table = table_at(t, entry);
    }
}

void kvmmm_pt_split(const struct kvmmm_pt *t, uint64_t gpa, uint64_t leaf, unsigned level)
{
    uint64_t *table = table_at(t, gpa);
    if (level == 2)
        leaf &= ~PS;
    for (unsigned i = 0; i < N_ENTRIES; i++)
        store(&table[i], leaf + ((uint64_t)i << shift_of(level - 1)));
}

void kvmmm_pt_copy(const struct kvmmm_pt *t, uint64_t dst_gpa, uint64_t src_gpa, bool share)
{
    uint64_t *dst = table_at(t, dst_gpa), keep = share ? ~W : ~UINT64_C(0);
    const uint64_t *src = table_at(t, src_gpa);
    for (unsigned i = 0; i < N_ENTRIES; i++)
        store(&dst[i], src[i] & keep);
}

uint64_t kvmmm_pt_count(const struct kvmmm_pt *t, uint64_t gpa, unsigned level)
{
    uint64_t n = 1;
    const uint64_t *table = table_at(t, gpa);
    if (level == 1)
        return 1;
    for (unsigned i = 0; i < N_ENTRIES; i++)
        if (is_link(table[i], level))
            n += level == 2 ? 1 : kvmmm_pt_count(t, table[i], level - 1);
    return n;
}
