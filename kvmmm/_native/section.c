/* section.c: leaving the read section, and waiting for those inside. */
#define _GNU_SOURCE
#include "section.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

void kvmmm_section_leave(struct kvmmm_section *s, unsigned phase)
{
    /* Who waits says so before he looks at the count: so one of us sees the other. */
    if (atomic_fetch_sub(&s->n_inside[phase], 1) == 1 && atomic_load(&s->n_waiting))
        syscall(SYS_futex, &s->n_inside[phase], FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
}

static void wait_until_empty(struct kvmmm_section *s, unsigned phase)
{
    uint32_t n;
    atomic_fetch_add(&s->n_waiting, 1);
    while ((n = atomic_load(&s->n_inside[phase])))
        syscall(SYS_futex, &s->n_inside[phase], FUTEX_WAIT_PRIVATE, n, NULL, NULL, 0);
    atomic_fetch_sub(&s->n_waiting, 1);
}

void kvmmm_section_drain(struct kvmmm_section *s)
{
    /* Each phase is empty once after this began: whoever was inside then has left. First the one that
     * nobody enters (an earlier drain may not be through with it), then, entered no more, the other. */
    unsigned phase = atomic_load(&s->phase);
    wait_until_empty(s, !phase);
    atomic_store(&s->phase, !phase);
    wait_until_empty(s, phase);
}
