/* walk.h: a guest-virtual address to a host address, by the guest's own page tables. */
#ifndef KVMMM_WALK_H
#define KVMMM_WALK_H

#include "pagetable.h"
#include "section.h"

enum { KVMMM_WALK_READ = 1, KVMMM_WALK_WRITE = 2, KVMMM_WALK_EXECUTE = 4 };

struct kvmmm_walk {
    const struct kvmmm_pt *tables; /* NULL once closed */
    /* The arena's window: frames and tables elsewhere are not reached so. */
    uint64_t low_gpa, high_gpa, hva_delta;
    /* Walks without the GIL, from before the find until what it found is no longer used. Whoever takes
     * an entry away drains it before he frees the frame, or the table. */
    struct kvmmm_section section;
};

/* Host address of @p addr where ring 3 may make @p access to it, and in *n_ret how many bytes from
 * there, @p n at most, lie side by side and may be accessed so. 0: not reachable; *n_ret is 0. */
uintptr_t kvmmm_walk_find(const struct kvmmm_walk *w, uint64_t addr, uint64_t n, unsigned access, uint64_t *n_ret);

#endif /* KVMMM_WALK_H */
