/* trap.c: exceptions and system calls of a guest in ring 3, out of a stub's `out`.
 *
 * An exception's stub tells the vector by its place; what the CPU pushed lies under the top of the
 * ring-0 stack, in memory that we see (SDM Vol. 3A 6.14.2):
 *
 *     top -  8  ss     top - 16  rsp    top - 24  rflags    top - 32  cs    top - 40  rip
 *     top - 48  error code, for some vectors
 *
 * The host returns by setting registers: no iretq or sysret is executed, and it makes no difference in
 * which ring a KVM enters the SYSCALL stub.
 */
#include <string.h>

#include "core.h"

enum { STUB_BYTES = 4, N_VECTORS = 256 };

/* #DF #TS #NP #SS #GP #PF #AC #CP #VC #SX */
#define HAS_ERROR_CODE \
    (1u << 8 | 1u << 10 | 1u << 11 | 1u << 12 | 1u << 13 | 1u << 14 | 1u << 17 | 1u << 21 | 1u << 29 | 1u << 30)

/* What ring 3 may change itself: CF PF AF ZF SF TF IF DF OF NT AC ID. */
enum { USER_FLAGS = 0x244fd5, RFLAGS_FIXED = 2 };

static bool is_in_stubs(const struct kvmmm_vcpu *v, uint64_t rip)
{
    return rip - v->stubs_gva < N_VECTORS * STUB_BYTES;
}

bool kvmmm_vcpu_read_trap(const struct kvmmm_vcpu *v, struct kvmmm_trap *trap)
{
    const struct kvm_sync_regs *area = &v->run->s.regs;
    *trap = (struct kvmmm_trap){.rip = area->regs.rip, .cs = area->sregs.cs.selector};
    /* At an OUT exit rip is on the instruction on VMX and SVM, and past it elsewhere: 0 or 2. */
    if (!v->trap_stack_top || !is_in_stubs(v, area->regs.rip) || (area->regs.rip - v->stubs_gva) % 2)
        return false;
    trap->vector = (area->regs.rip - v->stubs_gva) / STUB_BYTES;
    memcpy(&trap->rip, v->trap_stack_top - 40, 40);
    if (trap->vector < 32 && (HAS_ERROR_CODE >> trap->vector & 1))
        memcpy(&trap->error_code, v->trap_stack_top - 48, 8);
    trap->cr2 = area->sregs.cr2;
    if (trap->cs == KVMMM_KERNEL_CS)
        return !is_in_stubs(v, trap->rip);
    return trap->cs == KVMMM_USER_CS || trap->cs == KVMMM_USER32_CS;
}

static void load_segment(struct kvm_segment *segment, uint16_t selector, uint8_t type, uint8_t ring,
                         bool is_64_code)
{
    *segment = (struct kvm_segment){
        .limit = UINT32_MAX, .selector = selector, .type = type, .present = 1,
        .dpl = ring, .db = !is_64_code, .s = 1, .l = is_64_code, .g = 1,
    };
}

/* The frame's five registers, as iretq loads them; the descriptors are ours (platform/kvm/boot.py). */
static int load_frame(struct kvmmm_vcpu *v, uint64_t rip, uint16_t cs, uint64_t rflags, uint64_t rsp, uint16_t ss)
{
    struct kvm_run *run = v->run;
    struct kvm_sregs *sregs = kvmmm_sync_sregs(run);
    struct kvm_regs *regs = &run->s.regs.regs;
    int rc = kvmmm_vcpu_fetch_sregs(v);
    if (rc)
        return rc;
    uint8_t ring = cs & 3;
    if (sregs->cs.selector != cs || sregs->ss.selector != ss || sregs->cs.dpl != ring) {
        load_segment(&sregs->cs, cs, 11, ring, cs != KVMMM_USER32_CS);
        load_segment(&sregs->ss, ss, 3, ring, false);
        kvmmm_vcpu_sregs_written(v);
    }
    /* Canonical, or VMX refuses the state: code that runs off the end of the lower half faults in the
     * upper one, and SYSCALL in its last bytes likewise. */
    regs->rip = (uint64_t)((int64_t)(rip << 16) >> 16);
    regs->rflags = rflags | RFLAGS_FIXED;
    regs->rsp = rsp;
    run->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
    return 0;
}

int kvmmm_vcpu_leave_trap(struct kvmmm_vcpu *v, const struct kvmmm_trap *trap)
{
    return load_frame(v, trap->rip, (uint16_t)trap->cs, trap->rflags, trap->rsp, (uint16_t)trap->ss);
}

bool kvmmm_vcpu_is_syscall(const struct kvmmm_vcpu *v)
{
    /* The port is open to ring 3, where anybody may write to it; our stub alone counts. */
    uint64_t offset = v->run->s.regs.regs.rip - v->syscall_gva;
    return !v->syscall_gva || offset == 0 || offset == 2;
}

int kvmmm_vcpu_leave_syscall(struct kvmmm_vcpu *v)
{
    const struct kvm_regs *regs = &v->run->s.regs.regs;
    return load_frame(v, regs->rcx, KVMMM_USER_CS, regs->r11 & USER_FLAGS, regs->rsp, KVMMM_USER_DS);
}
