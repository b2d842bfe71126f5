/* pagetable_entry.h: entries and tables as C sees them; for pagetable*.c only. */
#ifndef KVMMM_PAGETABLE_ENTRY_H
#define KVMMM_PAGETABLE_ENTRY_H

#include "pagetable.h"

enum { N_ENTRIES = 512, ROOT_LEVEL = 4 };
#define NO_TABLE UINT64_MAX

#define P UINT64_C(1)
#define W UINT64_C(2)
#define U UINT64_C(4)
#define A_D UINT64_C(0x60)
#define PS UINT64_C(0x80)
#define NX (UINT64_C(1) << 63)
#define ADDRESS UINT64_C(0x000ffffffffff000)
#define LEAF_FLAGS (P | W | U | UINT64_C(0x18) | A_D | UINT64_C(0x100) | NX)
#define LOWER_HALF_END UINT64_C(0x0000800000000000)
#define UPPER_HALF_START UINT64_C(0xffff800000000000)
#define GPA_LIMIT (UINT64_C(1) << 52)

static inline unsigned shift_of(unsigned level) { return 3 + 9 * level; }
static inline uint64_t span_of(unsigned level) { return UINT64_C(1) << shift_of(level); }
static inline unsigned index_of(uint64_t gva, unsigned level) { return (gva >> shift_of(level)) & 511; }
static inline bool is_link(uint64_t entry, unsigned level) { return level > 1 && (entry & (P | PS)) == P; }
/* A and D come and go by themselves. */
static inline bool differ(uint64_t a, uint64_t b) { return ((a ^ b) & ~A_D) != 0; }
static inline uint64_t ps_of(unsigned level) { return level > 1 ? PS : 0; }

static inline uint64_t *table_at(const struct kvmmm_pt *t, uint64_t entry)
{
    return (uint64_t *)(uintptr_t)((entry & ADDRESS) + t->hva_delta);
}

static inline void store(uint64_t *entry, uint64_t value)
{
    __atomic_store_n(entry, value, __ATOMIC_RELEASE);
}

static inline bool is_fixed(const struct kvmmm_pt *t, unsigned slot)
{
    return t->fixed[slot >> 6] >> (slot & 63) & 1;
}

#endif /* KVMMM_PAGETABLE_ENTRY_H */
