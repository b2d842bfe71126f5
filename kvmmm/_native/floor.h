/* floor.h: the best known mechanism in C, for the benchmarks to divide by. Nothing else calls it.
 *
 * A floor does what the product does for its caller, and nothing besides: no policy, no Python, no
 * typed exits, no statistics, no second thread. It is not the product's own C code called in another
 * way: where a faster mechanism is known, the floor uses that.
 *
 * Every KVM_RUN here ends: a timer kicks the calling thread from the deadline on. Times are taken
 * here, in ns, without arming and disarming that timer. All return -errno on failure; -EPROTO when
 * the guest did what it should not (a fault, a port of somebody else's).
 */
#ifndef KVMMM_FLOOR_H
#define KVMMM_FLOOR_H

#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

/* ---- floor_run.c: exits ----------------------------------------------------------------------- */

struct kvmmm_watchdog {
    timer_t timer;
    int64_t deadline_ns;
};

/* Kick the calling thread from @p timeout_ns on, until disarmed. */
int kvmmm_watchdog_arm(struct kvmmm_watchdog *dog, int64_t timeout_ns);
void kvmmm_watchdog_disarm(struct kvmmm_watchdog *dog);

/* KVM_RUN, again after a signal that is not the deadline's. */
int kvmmm_floor_enter(struct kvmmm_watchdog *dog, int vcpu_fd, struct kvm_run *run);

/* Run to @p n_marks `out`s to @p mark_port, over any number to @p port; registers are not synchronised.
 * The times from start to first mark, and from mark to mark, go to @p mark_ns. Returns all exits. */
int64_t kvmmm_floor_exits(int vcpu_fd, struct kvm_run *run, uint16_t port, uint16_t mark_port,
                          int64_t *mark_ns, size_t n_marks, int64_t timeout_ns);

/* Run to an `out` to @p last_port, then copy @p n_bytes that the guest left in shared memory. */
int64_t kvmmm_floor_bulk(int vcpu_fd, struct kvm_run *run, uint16_t last_port, uint8_t *dst,
                         const uint8_t *shared, size_t n_bytes, int64_t timeout_ns);

/* ---- floor_machine.c: a VM from nothing to the guest's first `out`, and back ------------------- */

enum { KVMMM_FLOOR_SLOTS = 8, KVMMM_FLOOR_PIECES = 16 };

struct kvmmm_floor_slot {
    uint64_t gpa, n_bytes, offset; /* offset in the arena */
    uint32_t flags;
};

/* Bytes that must be in the arena before the guest runs: tables, descriptors, boot information. */
struct kvmmm_floor_piece {
    uint64_t offset, n_bytes;
    uintptr_t hva;
};

/* All that a process needs to ask or to work out only once. */
struct kvmmm_floor_recipe {
    int kvm_fd;
    bool exits_on_emulation_failure;
    uint64_t run_bytes, arena_bytes;
    uintptr_t cpuid; /* struct kvm_cpuid2 * */
    uintptr_t xcrs;  /* struct kvm_xcrs *, or 0 */
    uintptr_t sregs; /* struct kvm_sregs * */
    uintptr_t regs;  /* struct kvm_regs * */
    const char *path; /* ELF64; read anew for each VM */
    uint64_t image_offset; /* where in the arena gpa 0 would be */
    uint32_t n_slots, n_pieces;
    struct kvmmm_floor_slot slots[KVMMM_FLOOR_SLOTS];
    struct kvmmm_floor_piece pieces[KVMMM_FLOOR_PIECES];
    uint16_t last_port;
};

enum kvmmm_floor_step {
    KVMMM_FLOOR_ARENA,   /* sealed memfd, aligned mapping */
    KVMMM_FLOOR_VM,      /* KVM_CREATE_VM, KVM_SET_TSS_ADDR, KVM_ENABLE_CAP */
    KVMMM_FLOOR_IMAGE,   /* the ELF file: open, read, copy segments */
    KVMMM_FLOOR_FILL,    /* the pieces */
    KVMMM_FLOOR_MEMSLOT, /* the slots */
    KVMMM_FLOOR_VCPU,    /* KVM_CREATE_VCPU, mapping of kvm_run */
    KVMMM_FLOOR_CPUID,   /* KVM_SET_CPUID2, KVM_SET_XCRS */
    KVMMM_FLOOR_RUN,     /* registers through kvm_run, the first KVM_RUN */
    KVMMM_FLOOR_STEPS,
};

struct kvmmm_floor_machine {
    int vm_fd, vcpu_fd, memory_fd; /* -1: none */
    struct kvm_run *run;
    uint64_t run_bytes, arena_bytes;
    uintptr_t hva;
    int64_t step_ns[KVMMM_FLOOR_STEPS]; /* how long each step took */
};

/* Returns the time from nothing to the first `out`. After a failure, close it as well. */
int64_t kvmmm_floor_start(const struct kvmmm_floor_recipe *recipe, struct kvmmm_floor_machine *m,
                          int64_t timeout_ns);
/* Returns the time that releasing everything takes. */
int64_t kvmmm_floor_close(struct kvmmm_floor_machine *m);

/* ---- floor_fault.c: #PF in ring 3, a page-table entry, resume ---------------------------------- */

struct kvmmm_floor_faults {
    int vcpu_fd;
    struct kvm_run *run;
    uint16_t trap_port, mark_port; /* of the exception stubs; of the guest's end */
    uint8_t tss_type;
    uintptr_t stack_top_hva;     /* the ring-0 stack under which the CPU pushes */
    uint64_t gva, n_pages;       /* where the guest touches, a multiple of 2 MiB, and how far it goes */
    uint64_t stride_pages;       /* it touches one page in so many; frames are given without gaps */
    const uintptr_t *tables_hva; /* the level-1 tables over it, one for each 512 pages */
    uint64_t first_pte;          /* of the first page touched; the others follow it frame by frame */
    int copy_fd;                 /* >= 0: fill each page's new frame by pwrite first */
    uintptr_t copy_src_hva;
    uint64_t copy_offset;
};

/* Run to the `out` to mark_port, serving every fault; returns ns. */
int64_t kvmmm_floor_serve_faults(const struct kvmmm_floor_faults *f, int64_t timeout_ns, uint64_t *n_faults);

/* Look every address up among @p n ascending starts by binary search, each after the one before; returns
 * ns, and the sum of what was found so that nothing is optimised away. */
int64_t kvmmm_floor_find(const uint64_t *starts, size_t n, const uint64_t *addrs, size_t n_addrs, uint64_t *sum_ret);

/* ---- floor_kind.c: exits of one kind ----------------------------------------------------------- */

enum kvmmm_floor_back {
    KVMMM_FLOOR_BACK_KVM,     /* KVM goes on by itself; registers are not synchronised */
    KVMMM_FLOOR_BACK_FRAME,   /* to the frame of a #PF, past the instruction */
    KVMMM_FLOOR_BACK_SYSCALL, /* to where SYSCALL came from */
};

struct kvmmm_floor_kind {
    int vcpu_fd;
    struct kvm_run *run;
    uint32_t reason;               /* KVM_EXIT_... of those that count */
    uint16_t port;                 /* theirs, for KVM_EXIT_IO */
    uint16_t start_port, end_port; /* the guest's marks */
    uint32_t back;                 /* enum kvmmm_floor_back */
    uint32_t skip_bytes;           /* BACK_FRAME: length of the instruction that faults */
    uint8_t tss_type;
    uintptr_t stack_top_hva;
};

/* Run from one mark to the other, answering what comes; returns ns, the second mark's exit with it. */
int64_t kvmmm_floor_exit_kind(const struct kvmmm_floor_kind *f, int64_t timeout_ns, uint64_t *n_exits);

/* Run a guest that makes no exit, with a timer that kicks it after @p after_ns; returns how many ns after that
 * all is over. */
int64_t kvmmm_floor_kick(int vcpu_fd, struct kvm_run *run, int64_t after_ns);

/* What iretq would do with the frame of a #PF that the CPU pushed under a stack's top, and @p skip_bytes on. */
void kvmmm_floor_return_to_frame(struct kvm_run *run, uintptr_t stack_top_hva, uint8_t tss_type, uint64_t skip_bytes);

/* ---- floor_copy.c: copies by hand ------------------------------------------------------------- */

/* Copy @p n_bytes between each of @p n addresses and one buffer, by the C library's memcpy: from the buffer
 * with @p is_out, else to it; returns ns. What is not mapped kills the process. */
int64_t kvmmm_floor_copy(const uint64_t *hvas, size_t n, uintptr_t buffer, size_t n_bytes, bool is_out);

/* The same with @p n places of a file, each mapped first, at an address of its own and with its page-table
 * entries, as one would who knows that all of it will be used; returns ns. */
int64_t kvmmm_floor_mirror(int fd, const uint64_t *offsets, size_t n, uintptr_t buffer, size_t n_bytes, bool is_out);

/* ---- floor_cross.c: one mechanism or another, for the crossover ---------------------------------- */

enum kvmmm_cross_operation {
    KVMMM_CROSS_IN,
    KVMMM_CROSS_OUT,
    KVMMM_CROSS_ZERO,
    KVMMM_CROSS_OUT_FROM, /* a Reader whose bytes are in memory */
    KVMMM_CROSS_IN_TO,
    KVMMM_CROSS_SWAP,
    KVMMM_CROSS_CAS,
};

enum kvmmm_cross_mechanism {
    KVMMM_CROSS_INTERNAL,
    KVMMM_CROSS_WALK,
    KVMMM_CROSS_MIRROR,
    KVMMM_CROSS_PROCESS_VM,
    KVMMM_CROSS_FILE,
};

enum kvmmm_cross_action { KVMMM_CROSS_COUNT, KVMMM_CROSS_DROP, KVMMM_CROSS_POPULATE };

struct kvmmm_cross {
    uintptr_t core; /* a CopyCore, which nobody else uses meanwhile */
    uint32_t operation, mechanism;
    uint64_t n_bytes, n;     /* of one operation; how many */
    uint64_t *addrs, *hosts; /* of each: guest address, host address of its buffer */
    /* Guest memory from start on: segments, each in one piece of the arena. */
    uint64_t start, segment_bytes, n_segments;
    const uint64_t *offsets; /* where in the arena each begins */
    int fd, pid;             /* the arena's; this process */
    uintptr_t scratch;       /* n_bytes, for what goes by way of a buffer */
    uintptr_t blocks;        /* room for n_blocks of 16 bytes */
    uint64_t n_blocks;
    bool plants;             /* look at the clock after each operation, and wait plant_ns */
    int64_t plant_ns;
    uint64_t n_faults, n_maps; /* answers: page faults of the thread, runs mapped in the mirror */
};

/* Do the operations; returns ns, or -errno: EFAULT where a mechanism finds nothing. */
int64_t kvmmm_cross_run(struct kvmmm_cross *x);

/* Where: pages at random in the whole span, or with @p hot_bytes among so many somewhere in it; offsets in
 * the page and in the buffer at random, and the same for the same shared seed. */
struct kvmmm_cross_where {
    uint64_t own_seed, shared_seed, span_bytes, hot_bytes;
    uintptr_t buffer; /* a page longer than an operation */
};
void kvmmm_cross_places(struct kvmmm_cross *x, const struct kvmmm_cross_where *w);

/* Pages of the range with a page-table entry, by /proc/self/pagemap; or -errno. */
int64_t kvmmm_cross_present(int pagemap_fd, uintptr_t hva, uint64_t n_bytes);
/* Count, drop or make entries of the arena's linear mapping for a range of guest addresses; or -errno. */
int64_t kvmmm_cross_linear(uintptr_t core, unsigned action, int pagemap_fd, uint64_t addr, uint64_t n_bytes);
/* The ns that additions take of which each needs the one before: one a cycle. */
int64_t kvmmm_cross_canary(uint64_t n_adds);

#endif /* KVMMM_FLOOR_H */
