/* section.h: the read section: copies that others must wait for before they take frames away.
 *
 * Whoever takes something away first makes it impossible to find, then drains. Whoever enters later
 * cannot find it. Entering and flipping happen with the GIL held, so neither sees the other half done.
 */
#ifndef KVMMM_SECTION_H
#define KVMMM_SECTION_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct kvmmm_section {
    _Atomic uint32_t n_inside[2]; /* by phase of entry */
    _Atomic uint32_t phase;
};

/* With the GIL held; what it returns goes to leave, which any thread may call in any state. */
static inline unsigned kvmmm_section_enter(struct kvmmm_section *s)
{
    unsigned phase = atomic_load_explicit(&s->phase, memory_order_relaxed);
    atomic_fetch_add_explicit(&s->n_inside[phase], 1, memory_order_seq_cst);
    return phase;
}

void kvmmm_section_leave(struct kvmmm_section *s, unsigned phase);

/* With the GIL held: from now on others enter the other phase. Whether anybody must be waited for, and
 * in @p phase which. One caller at a time, wait included (the mm's active_lock sees to it). */
bool kvmmm_section_flip(struct kvmmm_section *s, unsigned *phase);

/* Without the GIL: until all who entered before the flip have left. */
void kvmmm_section_wait(struct kvmmm_section *s, unsigned phase);

#endif /* KVMMM_SECTION_H */
