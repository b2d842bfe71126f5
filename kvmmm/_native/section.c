/* section.c: leaving the read section, and waiting for those inside. */
#define _GNU_SOURCE
#include "section.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

void kvmmm_section_leave(struct kvmmm_section *s, unsigned phase)
{
    /* Only who leaves last, and after a flip, can be waited for: nobody else pays for a system call. */
    if (atomic_fetch_sub(&s->n_inside[phase], 1) == 1 && atomic_load(&s->phase) != phase)
        syscall(SYS_futex, &s->n_inside[phase], FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0);
}

bool kvmmm_section_flip(struct kvmmm_section *s, unsigned *phase)
{
    unsigned old = atomic_load(&s->phase);
    if (!atomic_load(&s->n_inside[old]))
        return false;
    *phase = old;
    atomic_store(&s->phase, !old);
    return true;
}

void kvmmm_section_wait(struct kvmmm_section *s, unsigned phase)
{
    uint32_t n;
    while ((n = atomic_load(&s->n_inside[phase])))
        syscall(SYS_futex, &s->n_inside[phase], FUTEX_WAIT_PRIVATE, n, NULL, NULL, 0);
}
