/* floor_run.c: KVM_RUN and nothing else: what an exit costs before anybody looks at it. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "core.h"
#include "floor.h"

/* A kick that comes between two ioctls is lost: so it comes again, at this pace. */
enum { REKICK_NS = 1000000 };

int kvmmm_watchdog_arm(struct kvmmm_watchdog *dog, int64_t timeout_ns)
{
    int signo = kvmmm_kick_signal();
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, signo);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = signo};
    event._sigev_un._tid = (int)syscall(SYS_gettid);
    if (timer_create(CLOCK_MONOTONIC, &event, &dog->timer))
        return -errno;
    dog->deadline_ns = kvmmm_now_ns() + timeout_ns;
    struct itimerspec when = {
        .it_value = {dog->deadline_ns / 1000000000, dog->deadline_ns % 1000000000},
        .it_interval = {0, REKICK_NS},
    };
    if (timer_settime(dog->timer, TIMER_ABSTIME, &when, NULL)) {
        int err = errno;
        timer_delete(dog->timer);
        return -err;
    }
    return 0;
}

void kvmmm_watchdog_disarm(struct kvmmm_watchdog *dog) { timer_delete(dog->timer); }

int kvmmm_floor_enter(struct kvmmm_watchdog *dog, int vcpu_fd, struct kvm_run *run)
{
    while (ioctl(vcpu_fd, KVM_RUN, 0) < 0) {
        if (errno != EINTR && errno != EAGAIN)
            return -errno;
        if (kvmmm_now_ns() >= dog->deadline_ns)
            return -ETIMEDOUT;
        run->immediate_exit = 0;
    }
    return 0;
}

static bool is_out(const struct kvm_run *run)
{
    return run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_OUT;
}

/* Counts exits up to the `out` to mark_port. */
static int64_t run_to(struct kvmmm_watchdog *dog, int vcpu_fd, struct kvm_run *run, uint16_t port,
                      uint16_t mark_port)
{
    for (int64_t n_exits = 1;; n_exits++) {
        int rc = kvmmm_floor_enter(dog, vcpu_fd, run);
        if (rc)
            return rc;
        if (!is_out(run))
            return -EPROTO;
        if (run->io.port == mark_port)
            return n_exits;
        if (run->io.port != port)
            return -EPROTO;
    }
}

int64_t kvmmm_floor_exits(int vcpu_fd, struct kvm_run *run, uint16_t port, uint16_t mark_port,
                          int64_t *mark_ns, size_t n_marks, int64_t timeout_ns)
{
    struct kvmmm_watchdog dog;
    int64_t rc = kvmmm_watchdog_arm(&dog, timeout_ns), n_exits = 0;
    if (rc)
        return rc;
    uint64_t valid_regs = run->kvm_valid_regs;
    run->kvm_valid_regs = 0;
    int64_t then_ns = kvmmm_now_ns();
    for (size_t i = 0; i < n_marks && rc >= 0; i++) {
        rc = run_to(&dog, vcpu_fd, run, port, mark_port);
        int64_t now_ns = kvmmm_now_ns();
        mark_ns[i] = now_ns - then_ns;
        then_ns = now_ns;
        n_exits += rc;
    }
    run->kvm_valid_regs = valid_regs;
    kvmmm_watchdog_disarm(&dog);
    return rc < 0 ? rc : n_exits;
}

int64_t kvmmm_floor_bulk(int vcpu_fd, struct kvm_run *run, uint16_t last_port, uint8_t *dst,
                         const uint8_t *shared, size_t n_bytes, int64_t timeout_ns)
{
    struct kvmmm_watchdog dog;
    int rc = kvmmm_watchdog_arm(&dog, timeout_ns);
    if (rc)
        return rc;
    uint64_t valid_regs = run->kvm_valid_regs;
    run->kvm_valid_regs = 0;
    int64_t start_ns = kvmmm_now_ns();
    int64_t n_exits = run_to(&dog, vcpu_fd, run, last_port, last_port);
    memcpy(dst, shared, n_bytes);
    int64_t taken_ns = kvmmm_now_ns() - start_ns;
    run->kvm_valid_regs = valid_regs;
    kvmmm_watchdog_disarm(&dog);
    return n_exits < 0 ? n_exits : taken_ns;
}
