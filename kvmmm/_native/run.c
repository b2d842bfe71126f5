/* run.c: KVM_RUN until something that Python must see, and the ways to end that. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core.h"

/* The deadline's timer goes on kicking at this pace until the thread has answered. */
enum { REKICK_NS = 1000000 };

/* While the console is busy the waiter looks this often; a line is seen well within 20 ms. */
enum { POLL_NS = 5000000 };

/* After this many empty looks in a row the host sleeps again and the guest must ring. */
enum { POLL_IDLE = 20 };

static struct kvmmm_port *find_port(struct kvmmm_vcpu *v, uint16_t port)
{
    for (uint32_t i = 0; i < v->n_ports; i++) {
        struct kvmmm_port *p = &v->ports[i];
        if (p->port == port || (p->kind == KVMMM_PORT_KIND_COM1 && (uint16_t)(port - p->port) < 8)) {
            v->port_index = i;
            return p;
        }
    }
    return NULL;
}

/* The 16550's line status register: transmitter empty (bits 5 and 6), so that polling ends. */
static void com1_in(uint16_t offset, uint8_t *data, uint32_t n_bytes)
{
    memset(data, offset == 5 ? 0x60 : 0, n_bytes);
}

/* 0: done, go on running; otherwise an event for Python. */
static int serve_io(struct kvmmm_vcpu *v)
{
    struct kvm_run *run = v->run;
    uint8_t *data = (uint8_t *)run + run->io.data_offset;
    uint32_t n_bytes = run->io.size * run->io.count;
    bool out = run->io.direction == KVM_EXIT_IO_OUT;
    struct kvmmm_port *p = find_port(v, run->io.port);

    switch (p ? p->kind : 0) {
    case KVMMM_PORT_KIND_EXIT:
    case KVMMM_PORT_KIND_VALUE:
        return KVMMM_EV_IO;
    case KVMMM_PORT_KIND_DOORBELL:
        return KVMMM_EV_CONSOLE;
    case KVMMM_PORT_KIND_COM1:
        if (run->io.port != p->port) { /* line control, divisor, status: nothing to remember */
            if (!out)
                com1_in(run->io.port - p->port, data, n_bytes);
            return 0;
        }
        /* fall through */
    case KVMMM_PORT_KIND_CONSOLE:
        if (!out) {
            /* 0xe9 reads back 0xe9 where a debug console is (Bochs, QEMU). */
            memset(data, p->kind == KVMMM_PORT_KIND_CONSOLE ? 0xe9 : 0, n_bytes);
            return 0;
        }
        return kvmmm_console_put(&v->console, data, n_bytes) ? KVMMM_EV_CONSOLE : 0;
    default:
        /* Nobody there: a PC's bus reads as ones and swallows writes. */
        v->n_ignored_ports++;
        if (!out)
            memset(data, 0xff, n_bytes);
        return 0;
    }
}

/* KVM_RUN said EINTR: a stop, the deadline, or a signal that is not for us. */
static int serve_interrupt(struct kvmmm_vcpu *v)
{
    v->n_interrupted++;
    /* Taken exactly once. One that comes after this line is seen by the next enter, which sets
     * immediate_exit anew. */
    uint32_t stop = atomic_exchange(&v->stop, KVMMM_STOP_NONE);
    if (!stop && v->deadline_ns && kvmmm_now_ns() >= v->deadline_ns)
        stop = KVMMM_STOP_DEADLINE;
    if (!stop)
        return KVMMM_EV_SIGNAL;
    /* Nothing is pending now: KVM completes the last exit before it looks at immediate_exit. */
    v->stop_reason = stop;
    v->deadline_ns = 0;
    v->run->immediate_exit = 0;
    return KVMMM_EV_STOPPED;
}

int kvmmm_vcpu_enter(struct kvmmm_vcpu *v)
{
    struct kvm_run *run = v->run;
    for (;;) {
        if (atomic_load_explicit(&v->stop, memory_order_relaxed))
            run->immediate_exit = 1;
        int64_t entered_ns = 0;
        if (v->timed) {
            entered_ns = kvmmm_now_ns();
            if (v->left_ns)
                v->handler_ns += entered_ns - v->left_ns;
        }
        atomic_store_explicit(&v->in_guest, true, memory_order_seq_cst);
        int rc = ioctl(v->fd, KVM_RUN, 0);
        int err = errno;
        atomic_store_explicit(&v->in_guest, false, memory_order_release);
        if (v->timed) {
            v->left_ns = kvmmm_now_ns();
            v->guest_ns += v->left_ns - entered_ns;
        }
        if (rc < 0) {
            if (err == EINTR)
                return serve_interrupt(v);
            if (err == EAGAIN)
                continue;
            return -err;
        }
        uint32_t reason = run->exit_reason;
        v->exits[reason < KVMMM_N_REASONS ? reason : KVMMM_N_REASONS - 1]++;
        if (reason == KVM_EXIT_MMIO)
            return KVMMM_EV_MMIO;
        if (reason != KVM_EXIT_IO)
            return KVMMM_EV_COLD;
        int event = serve_io(v);
        if (event)
            return event;
    }
}

int kvmmm_vcpu_begin(struct kvmmm_vcpu *v, int64_t timeout_ns)
{
    int signo = kvmmm_kick_signal();
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, signo);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    v->left_ns = 0;
    v->deadline_ns = 0;
    atomic_store(&v->tid, (int)syscall(SYS_gettid));
    if (timeout_ns <= 0)
        return 0;

    v->deadline_ns = kvmmm_now_ns() + timeout_ns;
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = signo};
    event._sigev_un._tid = atomic_load(&v->tid);
    if (timer_create(CLOCK_MONOTONIC, &event, &v->timer))
        return -errno;
    v->has_timer = true;
    struct itimerspec when = {
        .it_value = {v->deadline_ns / 1000000000, v->deadline_ns % 1000000000},
        .it_interval = {0, REKICK_NS},
    };
    return timer_settime(v->timer, TIMER_ABSTIME, &when, NULL) ? -errno : 0;
}

void kvmmm_vcpu_end(struct kvmmm_vcpu *v)
{
    atomic_store(&v->tid, 0);
    if (v->has_timer)
        timer_delete(v->timer);
    v->has_timer = false;
    v->deadline_ns = 0;
}

void kvmmm_vcpu_kick(struct kvmmm_vcpu *v)
{
    int tid = atomic_load(&v->tid);
    if (tid)
        syscall(SYS_tgkill, getpid(), tid, kvmmm_kick_signal());
}

void kvmmm_vcpu_stop(struct kvmmm_vcpu *v)
{
    atomic_store(&v->stop, KVMMM_STOP_REQUEST);
    v->run->immediate_exit = 1;
    kvmmm_vcpu_kick(v);
}

static int futex_wait(_Atomic uint32_t *word, uint32_t value, int64_t timeout_ns)
{
    struct timespec ts = {timeout_ns / 1000000000, timeout_ns % 1000000000};
    return syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, &ts, NULL, 0) ? -errno : 0;
}

static void futex_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

void kvmmm_vcpu_start(struct kvmmm_vcpu *v)
{
    v->n_idle_polls = 0;
    kvmmm_console_set_sleeping(&v->console, true);
    atomic_store(&v->state, KVMMM_RUNNING | (v->console.coalesced ? KVMMM_POLLING : 0));
}

void kvmmm_vcpu_finish(struct kvmmm_vcpu *v)
{
    atomic_store(&v->state, KVMMM_FINISHED);
    futex_wake(&v->state);
}

void kvmmm_vcpu_poll_console(struct kvmmm_vcpu *v)
{
    kvmmm_console_set_sleeping(&v->console, false);
    if (!(atomic_fetch_or(&v->state, KVMMM_POLLING) & KVMMM_POLLING))
        futex_wake(&v->state);
}

/* Nothing was printed for a while: sleep again, and have the guest ring. The order (clear, then say
 * so, then look) leaves no moment in which output is neither polled for nor rung for. */
static bool stop_polling(struct kvmmm_vcpu *v)
{
    atomic_fetch_and(&v->state, ~(uint32_t)KVMMM_POLLING);
    kvmmm_console_set_sleeping(&v->console, true);
    return kvmmm_console_pending(&v->console) == 0;
}

int kvmmm_vcpu_wait(struct kvmmm_vcpu *v, int64_t timeout_ns)
{
    int64_t end_ns = kvmmm_now_ns() + timeout_ns;
    for (;;) {
        uint32_t state = atomic_load(&v->state);
        if (state & KVMMM_FINISHED)
            return 1;
        int64_t left_ns = end_ns - kvmmm_now_ns();
        if (left_ns <= 0)
            return 0;
        bool polling = state & KVMMM_POLLING;
        if (atomic_load(&v->stop)) { /* asked to stop, and has not answered: ask again */
            kvmmm_vcpu_kick(v);
            polling = true;
        }
        if (futex_wait(&v->state, state, polling && left_ns > POLL_NS ? POLL_NS : left_ns) == -EINTR)
            return -EINTR;
        if (!polling)
            continue;
        if (kvmmm_console_pending(&v->console)) { /* or broken: the taker says how */
            v->n_idle_polls = 0;
            return 2;
        }
        if (++v->n_idle_polls >= POLL_IDLE && !v->console.coalesced) {
            v->n_idle_polls = 0;
            if (!stop_polling(v))
                return 2;
        }
    }
}
