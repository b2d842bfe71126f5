/* signal.c: the kick, a real-time signal with a handler that only notes it.
 *
 * KVM_RUN returns EINTR when a signal with a handler arrives. A signal that arrives just before the
 * ioctl is made up for by kvm_run.immediate_exit, which is always set first (Linux
 * Documentation/virt/kvm/api.rst, KVM_RUN), and by repeating the kick until the thread answers.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

#include "core.h"

static _Atomic int kick_signal;

/* KVMMM_SIGNAL_*, of the thread that got them. kvmmm_signals_take at the start of a run makes it exist
 * before a handler needs it. */
static _Thread_local unsigned signals;

static void note(int signo, siginfo_t *info, void *context)
{
    unsigned which = info->si_code == SI_TIMER ? KVMMM_SIGNAL_TICK : KVMMM_SIGNAL_KICK;
    __atomic_fetch_or(&signals, which, __ATOMIC_RELAXED);
}

unsigned kvmmm_signals_take(void) { return __atomic_exchange_n(&signals, 0, __ATOMIC_RELAXED); }

int kvmmm_kick_signal(void) { return atomic_load(&kick_signal); }

int kvmmm_kick_init(void)
{
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
    int err = -EBUSY;
    pthread_mutex_lock(&once);
    struct sigaction mine = {.sa_sigaction = note, .sa_flags = SA_SIGINFO};
    /* No SA_RESTART: KVM_RUN must return. */
    int signo = atomic_load(&kick_signal);
    struct sigaction old;
    /* Ours already, and nobody has replaced it. */
    if (signo && !sigaction(signo, NULL, &old) && (old.sa_flags & SA_SIGINFO) && old.sa_sigaction == note) {
        err = signo;
        goto out;
    }
    /* From the top: glibc, Go and Java take the lowest ones. */
    for (signo = SIGRTMAX - 1; signo >= SIGRTMIN; signo--) {
        if (sigaction(signo, NULL, &old) || old.sa_handler != SIG_DFL)
            continue;
        if (sigaction(signo, &mine, NULL))
            continue;
        atomic_store(&kick_signal, signo);
        err = signo;
        break;
    }
out:
    pthread_mutex_unlock(&once);
    return err;
}
