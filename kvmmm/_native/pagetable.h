/* pagetable.h: walks of x86-64 page tables, for kvmmm.pagetables. No Python, no KVM, no allocation.
 *
 * Python decides about tables, C about entries. A walk goes on until it is through or needs a table:
 * then it stops, says why, and Python prepares one and resumes. Every store is one aligned 64-bit
 * store, since CPUs walk the tables meanwhile.
 */
#ifndef KVMMM_PAGETABLE_H
#define KVMMM_PAGETABLE_H

#include <stdbool.h>
#include <stdint.h>

/* What a walk returns: why it ended, or'ed with what it did since it was called or resumed. */
enum {
    KVMMM_PT_CHANGED = 1,     /* a present leaf was removed or means something else now */
    KVMMM_PT_REMOVED = 2,     /* `removed` holds tables: take them, and set n_removed to 0 */
    KVMMM_PT_ABSENT = 0x10,   /* entry absent: wants a new table */
    KVMMM_PT_SPLIT = 0x20,    /* a part of a superpage: wants a table that says the same */
    KVMMM_PT_DETACHED = 0x30, /* wants a table of its own at `level` before it goes on */
    KVMMM_PT_FULL = 0x40,     /* `removed` has no room */
    KVMMM_PT_INVALID = 0x50,  /* nothing was done: a bad range, frame or flag, or released tables */
    KVMMM_PT_STOP_MASK = 0xf0,
};

enum { KVMMM_PT_MAX_REMOVED = 128 };

/* In an item of `removed`, below the address: the table's level, and whether all that it holds still
 * stands, because a link to it was dropped. Otherwise it is empty. */
enum { KVMMM_PT_LEVEL_MASK = 7, KVMMM_PT_DROPPED = 8 };

struct kvmmm_pt {
    uint64_t root_gpa;  /* of the PML4 */
    uint64_t hva_delta; /* host address minus guest-physical address, for every table */
    uint64_t fixed[8];  /* a bit for each PML4 slot that is not ours */
    /* fresh[level]: a table on the path to `at` that no CPU knows yet. While CPUs may walk the tables
     * (live), present entries above level 1 are changed in such tables only. */
    uint64_t fresh[5];
    uint32_t top_level; /* of the largest leaves that map makes */
    bool live;
    bool used;          /* something was ever mapped */
    bool is_released;
    /* The walk. */
    uint32_t op, fit_level;
    uint64_t at, left_bytes, delta, flags;
    /* At a stop. */
    uint32_t level;      /* of the table that holds the entry, or that is wanted (DETACHED) */
    uint32_t leaf_level; /* of the leaf that fits at `at` */
    uint64_t *link;      /* the entry */
    uint64_t entry;      /* what it holds */
    uint32_t n_removed;
    uint64_t removed[KVMMM_PT_MAX_REMOVED];
    uint64_t removed_at[KVMMM_PT_MAX_REMOVED]; /* a guest-virtual address that it covered */
};

/* Change what [gva, gva + n_bytes) translates to. */
unsigned kvmmm_pt_map(struct kvmmm_pt *t, uint64_t gva, uint64_t n_bytes, uint64_t gpa, uint64_t flags);
unsigned kvmmm_pt_unmap(struct kvmmm_pt *t, uint64_t gva, uint64_t n_bytes);
unsigned kvmmm_pt_protect(struct kvmmm_pt *t, uint64_t gva, uint64_t n_bytes, uint64_t flags);
/* Go on after a stop. */
unsigned kvmmm_pt_resume(struct kvmmm_pt *t);

/* Frames that a call made stale, by guest-physical address. */
enum { KVMMM_PT_MAX_STALE = 16 };
struct kvmmm_pt_stale {
    uint32_t n_runs, n_pages;
    struct { uint64_t start, end; } runs[KVMMM_PT_MAX_STALE];
};

/* kvmmm_pt_map for leaves that lie side by side in one table that is there already: 0 when it is done.
 *
 * 1 when entries led to other frames, or permitted more: they are gone, and nothing is mapped yet. The
 * caller shoots @p stale down and calls again. For what one CPU stores through a new entry, another must
 * not look for through the old one (Linux mm/memory.c, wp_page_copy: ptep_clear_flush first).
 *
 * Otherwise -1 and nothing is done: a large leaf is there, a stale frame lies outside
 * [low_gpa, high_gpa), or those are scattered. */
int kvmmm_pt_map_leaves(struct kvmmm_pt *t, uint64_t gva, uint64_t n_bytes, uint64_t gpa, uint64_t flags,
                        uint64_t low_gpa, uint64_t high_gpa, struct kvmmm_pt_stale *stale);

/* What gva translates to: frame address and effective flags, and the leaf's level in bits 11:9;
 * 0 where nothing is mapped, in fixed slots too. */
uint64_t kvmmm_pt_lookup(const struct kvmmm_pt *t, uint64_t gva);

/* For Python's decisions. Tables by guest-physical address. */
/* Fill a table with what `leaf`, of the level above it, translates to. */
void kvmmm_pt_split(const struct kvmmm_pt *t, uint64_t gpa, uint64_t leaf, unsigned level);
/* Copy a table, with W taken from every entry if @p share. */
void kvmmm_pt_copy(const struct kvmmm_pt *t, uint64_t dst_gpa, uint64_t src_gpa, bool share);
/* Store one entry, after all that was stored before. */
void kvmmm_pt_store(uint64_t *entry, uint64_t value);
/* Tables at and below the one at @p gpa. */
uint64_t kvmmm_pt_count(const struct kvmmm_pt *t, uint64_t gpa, unsigned level);

#endif /* KVMMM_PAGETABLE_H */
