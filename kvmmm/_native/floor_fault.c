/* floor_fault.c: ring-3 page faults served with a page-table entry and nothing else. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "core.h"
#include "floor.h"

enum { ENTRIES = 512, PAGE = 4096 };

static int serve_fault(const struct kvmmm_floor_faults *f)
{
    uint64_t page = (f->run->s.regs.sregs.cr2 - f->gva) / PAGE;
    if (page >= f->n_pages)
        return -EFAULT;
    uint64_t offset = page / f->stride_pages * PAGE;
    if (f->copy_fd >= 0 && pwrite(f->copy_fd, (const void *)(f->copy_src_hva + offset), PAGE,
                                  (off_t)(f->copy_offset + offset)) != PAGE)
        return -EIO;
    uint64_t *table = (uint64_t *)f->tables_hva[page / ENTRIES];
    __atomic_store_n(&table[page % ENTRIES], f->first_pte + offset, __ATOMIC_RELEASE);
    kvmmm_floor_return_to_frame(f->run, f->stack_top_hva, f->tss_type, 0);
    return 0;
}

int64_t kvmmm_floor_serve_faults(const struct kvmmm_floor_faults *f, int64_t timeout_ns, uint64_t *n_faults)
{
    struct kvmmm_watchdog dog;
    struct kvm_run *run = f->run;
    int rc = kvmmm_watchdog_arm(&dog, timeout_ns);
    if (rc)
        return rc;
    uint64_t valid_regs = run->kvm_valid_regs;
    run->kvm_valid_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
    *n_faults = 0;
    int64_t start_ns = kvmmm_now_ns();
    while (!(rc = kvmmm_floor_enter(&dog, f->vcpu_fd, run))) {
        if (run->exit_reason != KVM_EXIT_IO || run->io.direction != KVM_EXIT_IO_OUT) {
            rc = -EPROTO;
            break;
        }
        if (run->io.port == f->mark_port)
            break;
        if (run->io.port != f->trap_port) {
            rc = -EPROTO;
            break;
        }
        if ((rc = serve_fault(f)))
            break;
        ++*n_faults;
    }
    int64_t taken_ns = kvmmm_now_ns() - start_ns;
    run->kvm_valid_regs = valid_regs;
    kvmmm_watchdog_disarm(&dog);
    return rc ? rc : taken_ns;
}

int64_t kvmmm_floor_find(const uint64_t *starts, size_t n, const uint64_t *addrs, size_t n_addrs, uint64_t *sum_ret)
{
    /* Zero, which the compiler must not know: each search waits for the one before it, as look-ups do
     * that come one at a time. Otherwise the CPU would work at several at once. */
    volatile uint64_t zero = 0;
    uint64_t sum = 0, none = zero, found = 0;
    int64_t start_ns = kvmmm_now_ns();
    for (size_t i = 0; i < n_addrs; i++) {
        uint64_t addr = addrs[i] + (found & none);
        /* The last start that is not above the address; without a branch that could be guessed wrong. */
        const uint64_t *base = starts;
        for (size_t left = n; left > 1;) {
            size_t half = left / 2;
            base = base[half] <= addr ? base + half : base;
            left -= half;
        }
        found = *base;
        sum += found;
    }
    int64_t taken_ns = kvmmm_now_ns() - start_ns;
    *sum_ret = sum;
    return taken_ns;
}
