/* pause.c: keeping a vCPU outside KVM_RUN, without Python on its thread.
 *
 *     who pauses                              the vCPU's thread
 *     raise gate or attention                 where = ENTERING
 *     where not OUTSIDE? immediate_exit,      gate or attention raised? where = OUTSIDE, wait
 *               kick, wait for `left`         else where = INSIDE, KVM_RUN, where = OUTSIDE
 *
 * Both sides write first and look afterwards, in one total order, so that one of them sees the other.
 * A pause ends no run: what it leaves behind (immediate_exit, a late kick) costs one empty KVM_RUN.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core.h"

/* A kick that finds the vCPU just before KVM_RUN interrupts nothing, and it may be told of a pause a
 * moment too early to tell us: then again. */
enum { KICK_NS = 1000000 };

static _Thread_local int n_pauses_here;

void kvmmm_pauses_count(int difference) { n_pauses_here += difference; }

static void futex_wait(_Atomic uint32_t *word, uint32_t seen, const struct timespec *timeout)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, timeout, NULL, 0);
}

static void futex_advance(_Atomic uint32_t *word)
{
    atomic_fetch_add(word, 1);
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static bool is_held(struct kvmmm_vcpu *v)
{
    return atomic_load(&v->gate->n_pauses) || (atomic_load(&v->attention) & ~KVMMM_NEW_ROOT);
}

bool kvmmm_vcpu_is_free(struct kvmmm_vcpu *v)
{
    if (atomic_load(&v->attention) & KVMMM_NEW_ROOT)
        return false;
    return n_pauses_here || !is_held(v);
}

void kvmmm_vcpu_tell_left(struct kvmmm_vcpu *v) { futex_advance(&v->left); }

void kvmmm_vcpu_wake(struct kvmmm_vcpu *v)
{
    if (atomic_load(&v->tid))
        futex_advance(&v->wake);
}

void kvmmm_vcpu_push_out(struct kvmmm_vcpu *v)
{
    static const struct timespec again = {.tv_nsec = KICK_NS};
    for (;;) {
        uint32_t seen = atomic_load(&v->left);
        if (atomic_load(&v->where) == KVMMM_OUTSIDE)
            return;
        v->run->immediate_exit = 1;
        kvmmm_vcpu_kick(v);
        futex_wait(&v->left, seen, &again);
    }
}

int kvmmm_vcpu_attend(struct kvmmm_vcpu *v, bool answers)
{
    kvmmm_vcpu_tell_left(v);
    for (;;) {
        uint32_t seen = atomic_load(&v->wake);
        if (!is_held(v) || (!answers && n_pauses_here))
            break;
        /* A stop is answered at once, although the last exit's access may be incomplete: whoever
         * pauses may be the one who stops, and wait for us to end. */
        if (answers && kvmmm_vcpu_take_stop(v))
            return KVMMM_EV_STOPPED;
        if (answers && (kvmmm_signals_take() & KVMMM_SIGNAL_TICK)) {
            v->needs_arming = true;
            return KVMMM_EV_TICK;
        }
        futex_wait(&v->wake, seen, NULL);
    }
    return atomic_load(&v->attention) & KVMMM_NEW_ROOT ? kvmmm_vcpu_load_root(v) : 0;
}
