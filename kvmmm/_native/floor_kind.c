/* floor_kind.c: exits of one kind, each answered with the least that lets the guest go on. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "core.h"
#include "floor.h"

enum { PF_WORDS = 6 }; /* error code, rip, cs, rflags, rsp, ss */
enum { REKICK_NS = 50000000 };

static void load_segments(struct kvm_sregs *s, uint16_t cs, uint16_t ss, uint8_t tss_type)
{
    struct kvm_segment code = {
        .limit = UINT32_MAX, .selector = cs, .type = 11, .present = 1, .dpl = 3, .s = 1, .l = 1, .g = 1,
    };
    struct kvm_segment data = {
        .limit = UINT32_MAX, .selector = ss, .type = 3, .present = 1, .dpl = 3, .db = 1, .s = 1, .g = 1,
    };
    s->cs = code;
    s->ss = data;
    s->tr.type = tss_type;
}

void kvmmm_floor_return_to_frame(struct kvm_run *run, uintptr_t stack_top_hva, uint8_t tss_type, uint64_t skip_bytes)
{
    const uint64_t *frame = (const uint64_t *)stack_top_hva - PF_WORDS;
    load_segments(&run->s.regs.sregs, (uint16_t)frame[2], (uint16_t)frame[5], tss_type);
    run->s.regs.regs.rip = frame[1] + skip_bytes;
    run->s.regs.regs.rflags = frame[3];
    run->s.regs.regs.rsp = frame[4];
    run->kvm_dirty_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
}

/* What sysretq would do. Where SYSCALL does not change rings, there is no segment to be loaded. */
static void return_from_syscall(const struct kvmmm_floor_kind *f)
{
    struct kvm_regs *regs = &f->run->s.regs.regs;
    struct kvm_sregs *s = &f->run->s.regs.sregs;
    regs->rip = regs->rcx;
    regs->rflags = regs->r11;
    regs->rax = 0;
    f->run->kvm_dirty_regs = KVM_SYNC_X86_REGS;
    if (s->cs.selector == KVMMM_USER_CS)
        return;
    load_segments(s, KVMMM_USER_CS, KVMMM_USER_DS, f->tss_type);
    f->run->kvm_dirty_regs |= KVM_SYNC_X86_SREGS;
}

/* 1: the exit is one of those wanted, and answered. */
static int answer(const struct kvmmm_floor_kind *f)
{
    if (f->run->exit_reason != f->reason || (f->reason == KVM_EXIT_IO && f->run->io.port != f->port))
        return -EPROTO;
    if (f->back == KVMMM_FLOOR_BACK_FRAME)
        kvmmm_floor_return_to_frame(f->run, f->stack_top_hva, f->tss_type, f->skip_bytes);
    else if (f->back == KVMMM_FLOOR_BACK_SYSCALL)
        return_from_syscall(f);
    return 1;
}

static bool is_out_to(const struct kvm_run *run, uint16_t port)
{
    return run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_OUT && run->io.port == port;
}

int64_t kvmmm_floor_exit_kind(const struct kvmmm_floor_kind *f, int64_t timeout_ns, uint64_t *n_exits)
{
    struct kvmmm_watchdog dog;
    struct kvm_run *run = f->run;
    int rc = kvmmm_watchdog_arm(&dog, timeout_ns);
    if (rc)
        return rc;
    uint64_t valid_regs = run->kvm_valid_regs;
    run->kvm_valid_regs = f->back ? KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS : 0;
    int64_t start_ns = 0;
    *n_exits = 0;
    while (!(rc = kvmmm_floor_enter(&dog, f->vcpu_fd, run)) && !is_out_to(run, f->end_port)) {
        if (is_out_to(run, f->start_port)) {
            start_ns = kvmmm_now_ns();
            continue;
        }
        if ((rc = answer(f)) < 0)
            break;
        ++*n_exits;
    }
    int64_t taken_ns = kvmmm_now_ns() - start_ns;
    run->kvm_valid_regs = valid_regs;
    kvmmm_watchdog_disarm(&dog);
    return rc ? rc : start_ns ? taken_ns : -EPROTO;
}

int64_t kvmmm_floor_kick(int vcpu_fd, struct kvm_run *run, int64_t after_ns)
{
    struct kvmmm_watchdog dog;
    int rc = kvmmm_watchdog_arm(&dog, after_ns);
    if (rc)
        return rc;
    /* A timer that would soon come again costs 10 us to be deleted. */
    struct itimerspec when = {
        .it_value = {dog.deadline_ns / 1000000000, dog.deadline_ns % 1000000000},
        .it_interval = {0, REKICK_NS},
    };
    timer_settime(dog.timer, TIMER_ABSTIME, &when, NULL);
    uint64_t valid_regs = run->kvm_valid_regs;
    run->kvm_valid_regs = 0;
    rc = kvmmm_floor_enter(&dog, vcpu_fd, run);
    run->kvm_valid_regs = valid_regs;
    kvmmm_watchdog_disarm(&dog);
    int64_t late_ns = kvmmm_now_ns() - dog.deadline_ns;
    return rc == -ETIMEDOUT ? late_ns : rc ? rc : -EPROTO;
}
