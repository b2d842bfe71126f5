/* sregs.c: special registers in kvm_run's synchronised area, and the root table among them.
 *
 * They travel with every exit only where something needs them at once (traps, root changes); elsewhere
 * an ioctl on the vCPU's thread fetches them.
 */
#include <errno.h>
#include <sys/ioctl.h>

#include "core.h"

int kvmmm_vcpu_fetch_sregs(struct kvmmm_vcpu *v)
{
    struct kvm_run *run = v->run;
    bool is_synced = run->kvm_valid_regs & KVM_SYNC_X86_SREGS && v->n_enters > v->sregs_synced;
    if ((run->kvm_dirty_regs & KVM_SYNC_X86_SREGS) || is_synced || v->sregs_asked == v->n_enters)
        return 0;
    if (ioctl(v->fd, KVM_GET_SREGS, kvmmm_sync_sregs(run)))
        return -errno;
    v->sregs_asked = v->n_enters;
    return 0;
}

void kvmmm_vcpu_sync_sregs(struct kvmmm_vcpu *v)
{
    if (v->run->kvm_valid_regs & KVM_SYNC_X86_SREGS)
        return;
    v->sregs_synced = v->n_enters;
    v->run->kvm_valid_regs |= KVM_SYNC_X86_SREGS;
}

void kvmmm_vcpu_sregs_written(struct kvmmm_vcpu *v)
{
    /* KVM tells "busy" whatever was set, and a CPU has been seen that wants what was set. */
    kvmmm_sync_sregs(v->run)->tr.type = v->tss_type;
    v->run->kvm_dirty_regs |= KVM_SYNC_X86_SREGS;
}

int kvmmm_vcpu_load_root(struct kvmmm_vcpu *v)
{
    int rc = kvmmm_vcpu_fetch_sregs(v);
    if (rc)
        return rc;
    kvmmm_vcpu_sync_sregs(v); /* the next change comes without an ioctl */
    atomic_fetch_and(&v->attention, ~KVMMM_NEW_ROOT);
    /* Read after the flag was lowered: a root that is set from now on raises it again. */
    uint64_t root_gpa = atomic_load(&v->root_gpa);
    if (kvmmm_sync_sregs(v->run)->cr3 == root_gpa)
        return 0;
    kvmmm_sync_sregs(v->run)->cr3 = root_gpa;
    kvmmm_vcpu_sregs_written(v);
    return 0;
}
