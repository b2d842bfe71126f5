/* walk.c: a guest-virtual address to a host address, by the guest's own page tables.
 *
 * What a CPU in ring 3 does, with two differences: only the lower half is looked at, and neither a
 * table nor a frame is taken from outside the arena. CPUs, and other threads without the GIL, change
 * entries meanwhile: each is loaded once. Whoever takes tables away waits (struct kvmmm_walk).
 */
#include "walk.h"

#include "pagetable_entry.h"

/* What an entry must say: (entry & mask) == want, at every level. Source: SDM Vol. 3A 4.6. */
struct rights { uint64_t mask, want; };

struct leaf {
    const uint64_t *entry;
    uint64_t gpa; /* of the byte that was looked for */
    unsigned level;
};

static inline uint64_t load(const uint64_t *entry) { return __atomic_load_n(entry, __ATOMIC_ACQUIRE); }

static inline bool is_inside(const struct kvmmm_walk *w, uint64_t gpa)
{
    return gpa - w->low_gpa < w->high_gpa - w->low_gpa;
}

static inline struct rights rights_of(unsigned access)
{
    uint64_t want = P | U | (access & KVMMM_WALK_WRITE ? W : 0);
    return (struct rights){want | (access & KVMMM_WALK_EXECUTE ? NX : 0), want};
}

static inline uint64_t rest_of(uint64_t addr, unsigned level)
{
    return span_of(level) - (addr & (span_of(level) - 1));
}

static inline __attribute__((always_inline)) bool
find_leaf(const struct kvmmm_walk *w, const struct kvmmm_pt *t, uint64_t addr, struct rights rights,
          struct leaf *leaf)
{
    const uint64_t low = w->low_gpa, length = w->high_gpa - low, delta = t->hva_delta;
    uint64_t entry = __atomic_load_n(&t->root_gpa, __ATOMIC_ACQUIRE);
    if (is_fixed(t, index_of(addr, ROOT_LEVEL)))
        return false;
#pragma GCC unroll 4
    for (unsigned level = ROOT_LEVEL; level; level--) {
        uint64_t table = entry & ADDRESS;
        if (table - low >= length)
            return false;
        const uint64_t *e = (const uint64_t *)(uintptr_t)(table + delta) + index_of(addr, level);
        entry = load(e);
        /* A link, in one comparison: it says P. */
        if (level > 1 && (entry & (rights.mask | PS)) == rights.want)
            continue;
        if ((entry & rights.mask) != rights.want)
            return false;
        uint64_t within = span_of(level) - 1;
        *leaf = (struct leaf){e, (entry & ADDRESS & ~within) | (addr & within), level};
        return level < ROOT_LEVEL; /* there PS is reserved */
    }
    return false;
}

/* Bytes of the leaves after one in its table, as long as each follows the one before it, as if there
 * were @p n at most. @p next: the frame that follows the first. */
static uint64_t follow(const struct leaf *leaf, uint64_t addr, uint64_t next, uint64_t n, struct rights rights)
{
    uint64_t span = span_of(leaf->level), got = 0, ps = ps_of(leaf->level);
    uint64_t mask = (ADDRESS & -span) | rights.mask | ps;
    const uint64_t *e = leaf->entry + 1, *end = leaf->entry + N_ENTRIES - index_of(addr, leaf->level);
    for (uint64_t want = next | rights.want | ps; e < end && got < n; e++, want += span, got += span)
        if ((load(e) & mask) != want)
            break;
    return got;
}

/* kvmmm_walk_find for more than one leaf; apart from it, where most are through sooner. */
static __attribute__((noinline)) uintptr_t
find_long(const struct kvmmm_walk *w, const struct kvmmm_pt *t, uint64_t addr, uint64_t n,
          struct rights rights, uint64_t *n_ret)
{
    struct leaf leaf;
    if (!find_leaf(w, t, addr, rights, &leaf) || !is_inside(w, leaf.gpa))
        return 0;
    uint64_t gpa = leaf.gpa, got = 0, at = addr;
    /* What follows, frame by frame, is inside as well then. */
    n = n < w->high_gpa - gpa ? n : w->high_gpa - gpa;
    n = n < LOWER_HALF_END - addr ? n : LOWER_HALF_END - addr;
    do {
        got += rest_of(at, leaf.level);
        if (got < n)
            got += follow(&leaf, at, gpa + got, n - got, rights);
        at = addr + got;
        /* A table has ended, or leaves of this size have. */
    } while (got < n && (leaf.level > 1 || !index_of(at, 1)) && find_leaf(w, t, at, rights, &leaf) &&
             leaf.gpa == gpa + got);
    *n_ret = got < n ? got : n;
    return (uintptr_t)(gpa + w->hva_delta);
}

uintptr_t kvmmm_walk_find(const struct kvmmm_walk *w, uint64_t addr, uint64_t n, unsigned access, uint64_t *n_ret)
{
    const struct kvmmm_pt *t = __atomic_load_n(&w->tables, __ATOMIC_ACQUIRE);
    struct rights rights = rights_of(access);
    struct leaf leaf;
    *n_ret = 0;
    if (!n || !t || t->is_released || addr >= LOWER_HALF_END || !find_leaf(w, t, addr, rights, &leaf) ||
        !is_inside(w, leaf.gpa))
        return 0;
    if (n > rest_of(addr, leaf.level) || n > w->high_gpa - leaf.gpa)
        return find_long(w, t, addr, n, rights, n_ret);
    *n_ret = n;
    return (uintptr_t)(leaf.gpa + w->hva_delta);
}
