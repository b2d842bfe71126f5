/* section.h: the read section: copies that others must wait for before they take frames away.
 *
 * Whoever takes something away first makes it impossible to find, then drains. Whoever enters later cannot
 * find it: he counts himself before he looks.
 */
#ifndef KVMMM_SECTION_H
#define KVMMM_SECTION_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

struct kvmmm_section {
    _Atomic uint32_t n_inside[2]; /* by phase of entry */
    _Atomic uint32_t phase;
    _Atomic uint32_t n_waiting;
};

/* What it returns goes to leave, which any thread may call. */
static inline unsigned kvmmm_section_enter(struct kvmmm_section *s)
{
    unsigned phase = atomic_load_explicit(&s->phase, memory_order_relaxed);
    atomic_fetch_add_explicit(&s->n_inside[phase], 1, memory_order_seq_cst);
    return phase;
}

void kvmmm_section_leave(struct kvmmm_section *s, unsigned phase);

/* Whether there is anybody to wait for. */
static inline bool kvmmm_section_is_busy(struct kvmmm_section *s)
{
    return atomic_load(&s->n_inside[0]) || atomic_load(&s->n_inside[1]);
}

/* Until all who are inside now have left; those who come meanwhile are not waited for. Without the GIL.
 * Several may wait at once. */
void kvmmm_section_drain(struct kvmmm_section *s);

#endif /* KVMMM_SECTION_H */
