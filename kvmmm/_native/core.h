/* core.h: contracts of the C core. No Python here; the Python types stand in py.h.
 *
 * Division of labour: Python decides, C moves. What is here either moves bytes, loops on KVM_RUN, or
 * waits; every policy (which exit means what, which memory exists) is Python's.
 *
 * Functions return >= 0, or -errno.
 */
#ifndef KVMMM_CORE_H
#define KVMMM_CORE_H

#include <linux/kvm.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "kvmmm_abi.h"

/* ---- memory.c: the host's view of memory ------------------------------------------------------ */

/* Map @p n_bytes of @p fd shared and read-write at a multiple of @p align_bytes. */
int kvmmm_map_shared_aligned(int fd, size_t n_bytes, size_t align_bytes, uintptr_t *hva_ret);
int kvmmm_punch_hole(int fd, uint64_t offset, uint64_t n_bytes);
int kvmmm_ioctl(int fd, unsigned long request, uintptr_t argument);
int64_t kvmmm_now_ns(void);

/* ---- signal.c: ending a KVM_RUN from outside -------------------------------------------------- */

/* Install the no-op handler (no SA_RESTART) for the kick signal, once per process.
 * Returns the signal's number; it is a real-time signal that nobody had claimed. */
int kvmmm_kick_init(void);
int kvmmm_kick_signal(void);

/* ---- console.c: what the guest prints --------------------------------------------------------- */

/* One exit carries at most a page (rep outsb); coalesced bytes fill at most half of the buffer; a put
 * asks for draining from a quarter on. So a put always has room. */
enum { KVMMM_LEGACY_BYTES = 16384 };

/* Host side of the guest's console, used by the thread that runs the vCPU. `shared` and the ring live
 * in guest memory: read each index once, believe none. */
struct kvmmm_host_console {
    struct kvmmm_console *shared; /* hva, or NULL: only ports print */
    const uint8_t *ring;          /* hva of out_data */
    uint32_t ring_bytes;          /* a power of two */
    uint64_t tail;                /* our own copy: the guest may write the shared one */
    struct kvm_coalesced_mmio_ring *coalesced; /* NULL until ports are coalesced */
    uint32_t coalesced_max;
    bool divisor_latch; /* COM1's line control register, bit 7: its base port is no data port now */
    uint64_t n_legacy_total; /* bytes by ports, ever */
    uint64_t n_coalesced;    /* bytes that came without an exit */
    uint32_t n_legacy;
    uint8_t legacy[KVMMM_LEGACY_BYTES]; /* bytes from COM1 and 0xe9 */
};

/* Append what an OUT to a console port carries; returns true when it should be drained now. */
bool kvmmm_console_put(struct kvmmm_host_console *c, const uint8_t *data, uint32_t n_bytes);
/* COM1's line control register was written: what came before it is printed or not as it was then. */
void kvmmm_console_set_divisor_latch(struct kvmmm_host_console *c, bool divisor_latch);
/* Bytes that a take would give now, or -EPROTO when the guest broke the ring's rules. */
int64_t kvmmm_console_pending(struct kvmmm_host_console *c);
/* Move up to @p cap bytes to @p dst, port bytes first. */
int64_t kvmmm_console_take(struct kvmmm_host_console *c, uint8_t *dst, size_t cap);
/* Say whether the host sleeps, i.e. whether the guest must ring. Full fence after the store. */
void kvmmm_console_set_sleeping(struct kvmmm_host_console *c, bool sleeping);

/* ---- run.c: the KVM_RUN loop ------------------------------------------------------------------ */

enum kvmmm_event {
    KVMMM_EV_IO = 1,      /* kvm_run.io, for ports[v->port_index] */
    KVMMM_EV_MMIO = 2,    /* kvm_run.mmio: an EPT violation */
    KVMMM_EV_COLD = 3,    /* any other exit reason: kvm_run.exit_reason */
    KVMMM_EV_STOPPED = 4, /* a stop or the deadline; v->stop_reason says which */
    KVMMM_EV_TICK = 5,    /* a tick, or a signal of somebody else's: Python looks around */
    KVMMM_EV_CONSOLE = 6, /* the console wants draining */
};

enum kvmmm_stop { KVMMM_STOP_NONE = 0, KVMMM_STOP_REQUEST = 1, KVMMM_STOP_DEADLINE = 2 };

enum kvmmm_port_kind {
    KVMMM_PORT_KIND_EXIT = 1,     /* handler(exit) */
    KVMMM_PORT_KIND_VALUE = 2,    /* handler(port, value) */
    KVMMM_PORT_KIND_CONSOLE = 3,  /* bytes for the console */
    KVMMM_PORT_KIND_COM1 = 4,     /* base of eight 16550 registers; transmit is the console */
    KVMMM_PORT_KIND_DOORBELL = 5, /* the ring console wants draining */
};

struct kvmmm_port {
    uint16_t port;
    uint16_t kind;
    void *handler; /* PyObject *, owned by the Python type */
};

enum { KVMMM_MAX_PORTS = 32, KVMMM_N_REASONS = 64 };

struct kvmmm_vcpu {
    int fd;
    struct kvm_run *run;
    size_t run_bytes;
    struct kvmmm_host_console console;
    struct kvmmm_port ports[KVMMM_MAX_PORTS];
    uint32_t n_ports, port_index;
    uint64_t n_enters; /* which KVM_RUN kvm_run's exit record is of */
    /* Stopping. `stop` is set first, then run->immediate_exit, then the thread is kicked. A stop that
     * comes while nothing runs ends the next run. */
    _Atomic uint32_t stop;
    uint32_t stop_reason; /* enum kvmmm_stop of the last KVMMM_EV_STOPPED */
    _Atomic int tid;      /* thread inside kvmmm_vcpu_enter's caller, 0 outside */
    _Atomic bool in_guest; /* inside KVM_RUN: memslots must not be deleted */
    int64_t deadline_ns;  /* CLOCK_MONOTONIC, 0: none */
    timer_t timer;        /* kicks this thread at every tick, and at the deadline */
    bool has_timer, needs_arming;
    /* While the console is busy a tick comes more often and looks at it; the guest need not ring. */
    bool polling;
    uint32_t n_idle_polls;
    /* Statistics, written by the vCPU's thread only. */
    bool timed;
    int64_t left_ns; /* when the guest was left last */
    uint64_t exits[KVMMM_N_REASONS];
    uint64_t n_ignored_ports, n_interrupted;
    uint64_t guest_ns, handler_ns;
};

/* Run until something that C does not finish itself. Called without the GIL. Returns enum
 * kvmmm_event, or -errno of KVM_RUN. Pending I/O of the last exit is completed first, as KVM does. */
int kvmmm_vcpu_enter(struct kvmmm_vcpu *v);

/* The special registers in kvm_run's synchronised area. */
static inline struct kvm_sregs *kvmmm_sync_sregs(struct kvm_run *run) { return &run->s.regs.sregs; }

/* Bracket a series of enters on this thread: unblocks the kick signal, starts ticks and deadline.
 *
 * A tick is a timer's signal to this thread: KVM_RUN returns, Python's signal handlers get their turn
 * (Ctrl-C), the console is looked at, and a kick that went astray is made up for. */
int kvmmm_vcpu_begin(struct kvmmm_vcpu *v, int64_t timeout_ns);
void kvmmm_vcpu_end(struct kvmmm_vcpu *v);

/* Ask the vCPU to stop; any thread, async-signal-safe. */
void kvmmm_vcpu_stop(struct kvmmm_vcpu *v);
/* Send the kick signal once, if the vCPU runs. */
void kvmmm_vcpu_kick(struct kvmmm_vcpu *v);

/* The console was rung, or its ports are coalesced: look at it at every tick from now on. */
void kvmmm_vcpu_poll_console(struct kvmmm_vcpu *v);
/* At a tick: whether console output is pending (or broken: the taker says how). After some empty
 * looks the host sleeps again, and the guest must ring. */
bool kvmmm_vcpu_console_tick(struct kvmmm_vcpu *v);

#endif /* KVMMM_CORE_H */
