/* run.c: KVM_RUN until something that Python must see, and the ways to end that. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core.h"

/* How often KVM_RUN is left for a look around: Ctrl-C is answered within 100 ms. */
enum { TICK_NS = 50000000 };

/* The same while the console is busy: a line is seen within 20 ms of its flush. */
enum { POLL_NS = 10000000 };

/* After this many empty looks in a row the host sleeps again. */
enum { POLL_IDLE = 20 };

static struct kvmmm_port *find_port(struct kvmmm_vcpu *v, uint16_t port)
{
    /* Most often the one that was used last. */
    if (v->port_index < v->n_ports && v->ports[v->port_index].port == port)
        return &v->ports[v->port_index];
    for (uint32_t i = 0; i < v->n_ports; i++) {
        struct kvmmm_port *p = &v->ports[i];
        if (p->port == port || (p->kind == KVMMM_PORT_KIND_COM1 && (uint16_t)(port - p->port) < 8)) {
            v->port_index = i;
            return p;
        }
    }
    return NULL;
}

enum { COM1_LINE_CONTROL = 3, COM1_LINE_STATUS = 5 };

/* A 16550 that only transmits. Line status: transmitter empty (bits 5 and 6), so that polling ends.
 * True: the access is done; false: it is a byte for the console. */
static bool serve_com1(struct kvmmm_vcpu *v, uint16_t offset, bool out, uint8_t *data, uint32_t n_bytes)
{
    if (!out)
        memset(data, offset == COM1_LINE_STATUS ? 0x60 : 0, n_bytes);
    else if (offset == COM1_LINE_CONTROL)
        kvmmm_console_set_divisor_latch(&v->console, data[0] & 0x80);
    else if (offset == 0)
        return v->console.divisor_latch;
    return true;
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
    case KVMMM_PORT_KIND_TRAP:
        return KVMMM_EV_TRAP;
    case KVMMM_PORT_KIND_SYSCALL:
        if (out && kvmmm_vcpu_is_syscall(v))
            return KVMMM_EV_SYSCALL;
        break;
    case KVMMM_PORT_KIND_DOORBELL:
        if (!out)
            memset(data, 0xff, n_bytes);
        return KVMMM_EV_CONSOLE;
    case KVMMM_PORT_KIND_COM1:
        if (serve_com1(v, run->io.port - p->port, out, data, n_bytes))
            return 0;
        /* fall through */
    case KVMMM_PORT_KIND_CONSOLE:
        if (!out) {
            memset(data, 0xe9, n_bytes); /* which tells that a debug console is here (Bochs, QEMU) */
            return 0;
        }
        return kvmmm_console_put(&v->console, data, n_bytes) ? KVMMM_EV_CONSOLE : 0;
    default:
        break;
    }
    /* Nobody there: a PC's bus reads as ones and swallows writes. */
    v->n_ignored_ports++;
    if (!out)
        memset(data, 0xff, n_bytes);
    return 0;
}

/* Set the timer for the next tick, or for the deadline if that comes first. It repeats, since a signal
 * that arrives between two KVM_RUNs interrupts nothing. */
static int arm(struct kvmmm_vcpu *v)
{
    int64_t tick_ns = v->polling ? POLL_NS : TICK_NS;
    int64_t first_ns = tick_ns;
    if (v->deadline_ns) {
        int64_t left_ns = v->deadline_ns - kvmmm_now_ns();
        if (left_ns < first_ns)
            first_ns = left_ns > 0 ? left_ns : 1;
    }
    struct itimerspec when = {.it_value.tv_nsec = first_ns, .it_interval.tv_nsec = tick_ns};
    return timer_settime(v->timer, 0, &when, NULL) ? -errno : 0;
}

bool kvmmm_vcpu_take_stop(struct kvmmm_vcpu *v)
{
    /* Taken exactly once. One that comes after the exchange is seen by the next enter, which sets
     * immediate_exit anew. */
    uint32_t stop = atomic_exchange(&v->stop, KVMMM_STOP_NONE);
    if (!stop && v->deadline_ns && kvmmm_now_ns() >= v->deadline_ns)
        stop = KVMMM_STOP_DEADLINE;
    if (!stop)
        return false;
    v->stop_reason = stop;
    v->deadline_ns = 0;
    return true;
}

/* KVM_RUN said EINTR: a stop, the deadline, a tick, a pause (0: Python need not know), or a signal that
 * is not for us. Nothing is pending now: KVM completes the last exit before it looks at immediate_exit. */
static int serve_interrupt(struct kvmmm_vcpu *v)
{
    v->n_interrupted++;
    unsigned signals = kvmmm_signals_take();
    bool is_ours = (signals & KVMMM_SIGNAL_KICK) || v->run->immediate_exit;
    v->run->immediate_exit = 0;
    if (kvmmm_vcpu_take_stop(v))
        return KVMMM_EV_STOPPED;
    /* The second half of a stop or of a pause may come after its first half was answered. */
    if (is_ours && !(signals & KVMMM_SIGNAL_TICK))
        return 0;
    v->needs_arming = true;
    return KVMMM_EV_TICK;
}

/* KVM_RUN said 0. 0: done, go on running; otherwise an event for Python. */
static int serve_exit(struct kvmmm_vcpu *v)
{
    uint32_t reason = v->run->exit_reason;
    v->exits[reason < KVMMM_N_REASONS ? reason : KVMMM_N_REASONS - 1]++;
    if (reason == KVM_EXIT_IO)
        return serve_io(v);
    return reason == KVM_EXIT_MMIO ? KVMMM_EV_MMIO : KVMMM_EV_COLD;
}

/* Called when entering is allowed; 0 or -errno. */
static int run_guest(struct kvmmm_vcpu *v)
{
    int64_t entered_ns = 0;
    if (v->timed) {
        entered_ns = kvmmm_now_ns();
        if (v->left_ns)
            v->handler_ns += entered_ns - v->left_ns;
    }
    v->n_enters++;
    atomic_store_explicit(&v->where, KVMMM_INSIDE, memory_order_relaxed);
    int rc = ioctl(v->fd, KVM_RUN, 0) < 0 ? -errno : 0;
    atomic_store_explicit(&v->where, KVMMM_OUTSIDE, memory_order_release);
    /* Without a fence a pause may be overlooked; who waits looks again by himself. */
    if (atomic_load_explicit(&v->gate->n_pauses, memory_order_relaxed) |
        atomic_load_explicit(&v->attention, memory_order_relaxed))
        kvmmm_vcpu_tell_left(v);
    if (v->timed) {
        v->left_ns = kvmmm_now_ns();
        v->guest_ns += v->left_ns - entered_ns;
    }
    return rc;
}

int kvmmm_vcpu_enter(struct kvmmm_vcpu *v)
{
    for (;;) {
        if (atomic_load_explicit(&v->stop, memory_order_relaxed))
            v->run->immediate_exit = 1;
        if (v->needs_arming) {
            /* Only now, behind whatever Python did: a guest gets a whole tick at a time, however
             * slow the host is. And the last stretch before the deadline may be shorter. */
            v->needs_arming = false;
            arm(v);
        }
        int event;
        atomic_store(&v->where, KVMMM_ENTERING);
        if (kvmmm_vcpu_needs_attention(v)) {
            atomic_store(&v->where, KVMMM_OUTSIDE);
            event = kvmmm_vcpu_attend(v, true);
        } else {
            int rc = run_guest(v);
            if (rc == -EAGAIN)
                continue;
            event = rc == -EINTR ? serve_interrupt(v) : rc ? rc : serve_exit(v);
        }
        if (event)
            return event;
    }
}

int kvmmm_vcpu_complete(struct kvmmm_vcpu *v)
{
    for (;;) {
        int rc = kvmmm_vcpu_attend(v, false);
        if (rc)
            return rc;
        atomic_store(&v->where, KVMMM_ENTERING);
        if (kvmmm_vcpu_needs_attention(v) && !kvmmm_vcpu_is_free(v)) {
            atomic_store(&v->where, KVMMM_OUTSIDE);
            continue;
        }
        v->run->immediate_exit = 1;
        rc = run_guest(v);
        v->run->immediate_exit = 0; /* a stop that came meanwhile sets it again at the next enter */
        if (rc == -EINTR)
            return 0;
        int event = rc == -EAGAIN ? 0 : rc ? rc : serve_exit(v);
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
    kvmmm_signals_take();
    v->left_ns = 0;
    v->deadline_ns = timeout_ns > 0 ? kvmmm_now_ns() + timeout_ns : 0;
    v->polling = v->console.coalesced != NULL;
    v->n_idle_polls = 0;
    kvmmm_console_set_sleeping(&v->console, !v->polling);
    int tid = (int)syscall(SYS_gettid);
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = signo};
    event._sigev_un._tid = tid;
    if (timer_create(CLOCK_MONOTONIC, &event, &v->timer))
        return -errno;
    v->has_timer = true;
    v->needs_arming = true;
    atomic_store(&v->tid, tid);
    return 0;
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
    if (kvmmm_vcpu_needs_attention(v))
        kvmmm_vcpu_wake(v); /* it may wait in a pause */
}

void kvmmm_vcpu_poll_console(struct kvmmm_vcpu *v)
{
    kvmmm_console_set_sleeping(&v->console, false);
    v->n_idle_polls = 0;
    if (v->polling)
        return;
    v->polling = true;
    v->needs_arming = v->has_timer;
}

bool kvmmm_vcpu_console_tick(struct kvmmm_vcpu *v)
{
    if (!v->polling)
        return false;
    if (kvmmm_console_pending(&v->console)) {
        v->n_idle_polls = 0;
        return true;
    }
    /* Coalesced ports have no way to ring: the ticks go on. */
    if (++v->n_idle_polls < POLL_IDLE || v->console.coalesced)
        return false;
    v->polling = false;
    v->needs_arming = true;
    kvmmm_console_set_sleeping(&v->console, true);
    return kvmmm_console_pending(&v->console) != 0; /* what came just before */
}
