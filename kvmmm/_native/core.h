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
/* The same for reading only, which is all that a descriptor opened O_RDONLY allows. */
int kvmmm_map_readonly_aligned(int fd, size_t n_bytes, size_t align_bytes, uintptr_t *hva_ret);
int kvmmm_punch_hole(int fd, uint64_t offset, uint64_t n_bytes);
/* Drop every translation of a shared mapping's pages, KVM's as well; the file keeps its contents. */
int kvmmm_drop_pages(uintptr_t hva, size_t n_bytes);
int kvmmm_ioctl(int fd, unsigned long request, uintptr_t argument);
int64_t kvmmm_now_ns(void);

/* ---- signal.c: ending a KVM_RUN from outside -------------------------------------------------- */

/* Install the no-op handler (no SA_RESTART) for the kick signal, once per process.
 * Returns the signal's number; it is a real-time signal that nobody had claimed. */
int kvmmm_kick_init(void);
int kvmmm_kick_signal(void);
/* What came to this thread since the last call: a kick of ours, a timer's tick. Anything else that
 * ended a KVM_RUN was a signal of somebody else's. */
enum { KVMMM_SIGNAL_KICK = 1, KVMMM_SIGNAL_TICK = 2 };
unsigned kvmmm_signals_take(void);

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
    KVMMM_EV_TRAP = 7,    /* kvm_run.io, of an exception stub */
    KVMMM_EV_SYSCALL = 8, /* kvm_run.io, of the SYSCALL stub */
};

enum kvmmm_stop { KVMMM_STOP_NONE = 0, KVMMM_STOP_REQUEST = 1, KVMMM_STOP_DEADLINE = 2 };

enum kvmmm_port_kind {
    KVMMM_PORT_KIND_EXIT = 1,     /* handler(exit) */
    KVMMM_PORT_KIND_VALUE = 2,    /* handler(port, value) */
    KVMMM_PORT_KIND_CONSOLE = 3,  /* bytes for the console */
    KVMMM_PORT_KIND_COM1 = 4,     /* base of eight 16550 registers; transmit is the console */
    KVMMM_PORT_KIND_DOORBELL = 5, /* the ring console wants draining */
    KVMMM_PORT_KIND_TRAP = 6,     /* of the exception stubs: decoded in C (trap.c) */
    KVMMM_PORT_KIND_SYSCALL = 7,  /* of the SYSCALL stub: decoded in C (trap.c) */
};

struct kvmmm_port {
    uint16_t port;
    uint16_t kind;
    void *handler; /* PyObject *, owned by the Python type */
};

enum { KVMMM_MAX_PORTS = 32, KVMMM_N_REASONS = 64 };

/* What keeps all vCPUs of a VM outside KVM_RUN; counted, since pauses nest and overlap (pause.c). */
struct kvmmm_gate {
    _Atomic uint32_t n_pauses;
};

/* Inside KVM_RUN memslots must not be deleted. */
enum kvmmm_where { KVMMM_OUTSIDE = 0, KVMMM_ENTERING = 1, KVMMM_INSIDE = 2 };

/* kvmmm_vcpu.attention: a count of pauses of this vCPU alone, and whether it has a new root. */
#define KVMMM_NEW_ROOT 0x80000000u

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
    /* enum kvmmm_where. No more outside before the two words below are looked at, as whoever pauses
     * sets them before he looks here: one of the two sees the other. */
    _Atomic uint8_t where;
    struct kvmmm_gate *gate, own_gate; /* the VM's, or ours while there is no VM */
    _Atomic uint32_t attention;
    _Atomic uint32_t wake, left; /* futexes: the paused vCPU waits on one, who pauses on the other */
    uint32_t n_pins;             /* threads that wait for it to leave; it must not go. Needs the GIL */
    /* Special registers and the root table (sregs.c). */
    _Atomic uint64_t root_gpa;
    bool has_root;         /* root_gpa is the guest's CR3, or will be */
    uint8_t tss_type;      /* for TR, whenever special registers are loaded */
    uint64_t sregs_synced; /* KVM_RUNs after this one leave them in kvm_run, */
    uint64_t sregs_asked;  /* and after this one we asked for them */
    /* Exceptions and system calls of a guest whose stubs lead here (trap.c); 0: there are none. */
    uint64_t stubs_gva, syscall_gva;
    const uint8_t *trap_stack_top;
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

/* Complete what the last exit left pending in KVM, without running the guest: one KVM_RUN that ends at
 * once. 0 when nothing is pending any more; an event when the instruction goes on with another access;
 * or -errno. */
int kvmmm_vcpu_complete(struct kvmmm_vcpu *v);
/* Whether the run ends here: a stop or the deadline, noted in stop_reason. */
bool kvmmm_vcpu_take_stop(struct kvmmm_vcpu *v);

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

/* ---- pause.c: keeping a vCPU outside KVM_RUN -------------------------------------------------- */

/* Whether the vCPU may not enter as it is. */
static inline bool kvmmm_vcpu_needs_attention(struct kvmmm_vcpu *v)
{
    return atomic_load(&v->gate->n_pauses) | atomic_load(&v->attention);
}

/* On the vCPU's thread, outside KVM_RUN: wait until nobody holds it, then load a new root. 0, an event
 * that came meanwhile (with `answers`), or -errno. */
int kvmmm_vcpu_attend(struct kvmmm_vcpu *v, bool answers);
/* Whether this thread may have the vCPU touch guest memory now: nobody holds it, or only ourselves. */
bool kvmmm_vcpu_is_free(struct kvmmm_vcpu *v);
/* On another thread, after gate or attention was raised: have the vCPU leave KVM_RUN, wait for it. */
void kvmmm_vcpu_push_out(struct kvmmm_vcpu *v);
/* The vCPU left KVM_RUN while somebody holds it: tell him. */
void kvmmm_vcpu_tell_left(struct kvmmm_vcpu *v);
/* After gate or attention was lowered, or a stop was set: have a waiting vCPU look again. */
void kvmmm_vcpu_wake(struct kvmmm_vcpu *v);
/* This thread's pauses, of whichever VM: what it does itself meanwhile must not wait for it. */
void kvmmm_pauses_count(int difference);

/* ---- sregs.c: special registers, the root table ----------------------------------------------- */

/* Have kvm_run's area hold the special registers as the guest has them. The vCPU's thread, or none. */
int kvmmm_vcpu_fetch_sregs(struct kvmmm_vcpu *v);
/* From the next KVM_RUN on, every exit leaves them there: 0.3 to 1 us each. */
void kvmmm_vcpu_sync_sregs(struct kvmmm_vcpu *v);
/* The area was written: KVM loads it at the next KVM_RUN. */
void kvmmm_vcpu_sregs_written(struct kvmmm_vcpu *v);
int kvmmm_vcpu_load_root(struct kvmmm_vcpu *v);

/* ---- trap.c: exceptions and SYSCALL, out of a stub's `out` ------------------------------------ */

struct kvmmm_trap {
    uint64_t vector, error_code; /* 0 for vectors without one */
    uint64_t cr2;
    uint64_t rip, cs, rflags, rsp, ss; /* as the CPU pushed them */
};

/* The exception whose stub made the last exit. False: no stub of ours, or an exception in ring 0's own
 * stub; *trap says what is known. */
bool kvmmm_vcpu_read_trap(const struct kvmmm_vcpu *v, struct kvmmm_trap *trap);
/* Set registers and segments as iretq would. */
int kvmmm_vcpu_leave_trap(struct kvmmm_vcpu *v, const struct kvmmm_trap *trap);
/* Whether the last exit is the SYSCALL stub's. */
bool kvmmm_vcpu_is_syscall(const struct kvmmm_vcpu *v);
/* Set registers and segments as SYSRET would. */
int kvmmm_vcpu_leave_syscall(struct kvmmm_vcpu *v);

/* ---- the console's part of run.c --------------------------------------------------------------- */

/* The console was rung, or its ports are coalesced: look at it at every tick from now on. */
void kvmmm_vcpu_poll_console(struct kvmmm_vcpu *v);
/* At a tick: whether console output is pending (or broken: the taker says how). After some empty
 * looks the host sleeps again, and the guest must ring. */
bool kvmmm_vcpu_console_tick(struct kvmmm_vcpu *v);

#endif /* KVMMM_CORE_H */
