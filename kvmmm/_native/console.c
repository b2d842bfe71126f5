/* console.c: three ways in (shared ring, COM1 and 0xe9 by exit, the same coalesced), one way out. */
#include <errno.h>
#include <string.h>

#include "core.h"

static void put(struct kvmmm_host_console *c, const uint8_t *data, uint32_t n_bytes)
{
    uint32_t room = KVMMM_LEGACY_BYTES - c->n_legacy;
    uint32_t n = n_bytes < room ? n_bytes : room;
    memcpy(c->legacy + c->n_legacy, data, n);
    c->n_legacy += n;
    c->n_legacy_total += n;
}

/* Port writes that KVM queued instead of exiting (Linux virt/kvm/coalesced_mmio.c). The kernel
 * publishes `last` after the entry; we publish `first` after having read it. Stops at a full buffer:
 * the rest stays in the kernel's ring for the next take. */
static void drain_coalesced(struct kvmmm_host_console *c)
{
    struct kvm_coalesced_mmio_ring *ring = c->coalesced;
    if (!ring)
        return;
    uint32_t last = __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE);
    while (ring->first != last) {
        struct kvm_coalesced_mmio *entry = &ring->coalesced_mmio[ring->first];
        uint32_t n_bytes = entry->len <= 8 ? entry->len : 8;
        if (c->n_legacy + n_bytes > KVMMM_LEGACY_BYTES / 2)
            return;
        if (!c->divisor_latch || entry->phys_addr != KVMMM_PORT_COM1) {
            put(c, entry->data, n_bytes);
            c->n_coalesced += n_bytes;
        }
        __atomic_store_n(&ring->first, (ring->first + 1) % c->coalesced_max, __ATOMIC_RELEASE);
    }
}

/* Bytes in the shared ring, or -EPROTO: a head that lies outside [tail, tail + size]. */
static int64_t ring_pending(struct kvmmm_host_console *c)
{
    if (!c->shared)
        return 0;
    uint64_t head = __atomic_load_n(&c->shared->out_head, __ATOMIC_ACQUIRE);
    uint64_t pending = head - c->tail;
    return pending <= c->ring_bytes ? (int64_t)pending : -EPROTO;
}

bool kvmmm_console_put(struct kvmmm_host_console *c, const uint8_t *data, uint32_t n_bytes)
{
    drain_coalesced(c); /* older than what this exit carries */
    put(c, data, n_bytes);
    bool full = c->n_legacy > KVMMM_LEGACY_BYTES / 4;
    return full || memchr(data, '\n', n_bytes);
}

void kvmmm_console_set_divisor_latch(struct kvmmm_host_console *c, bool divisor_latch)
{
    drain_coalesced(c);
    c->divisor_latch = divisor_latch;
}

int64_t kvmmm_console_pending(struct kvmmm_host_console *c)
{
    drain_coalesced(c);
    int64_t pending = ring_pending(c);
    if (pending >= 0)
        pending += c->n_legacy;
    return pending;
}

int64_t kvmmm_console_take(struct kvmmm_host_console *c, uint8_t *dst, size_t cap)
{
    drain_coalesced(c);
    int64_t ringed = ring_pending(c);
    if (ringed < 0) {
        return ringed;
    }
    size_t done = c->n_legacy < cap ? c->n_legacy : cap;
    memcpy(dst, c->legacy, done);
    c->n_legacy -= done;
    memmove(c->legacy, c->legacy + done, c->n_legacy);

    size_t n = (size_t)ringed < cap - done ? (size_t)ringed : cap - done;
    if (n) {
        uint32_t at = c->tail & (c->ring_bytes - 1);
        size_t first = n < c->ring_bytes - at ? n : c->ring_bytes - at;
        memcpy(dst + done, c->ring + at, first);
        memcpy(dst + done + first, c->ring, n - first);
        done += n;
        c->tail += n;
        __atomic_store_n(&c->shared->out_tail, c->tail, __ATOMIC_RELEASE);
    }
    return (int64_t)done;
}

void kvmmm_console_set_sleeping(struct kvmmm_host_console *c, bool sleeping)
{
    if (!c->shared)
        return;
    /* Store, then fence, then the caller looks at the ring once more: the guest publishes, fences,
     * then reads this. One of the two sees the other. */
    __atomic_store_n(&c->shared->host_sleeps, sleeping, __ATOMIC_SEQ_CST);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
