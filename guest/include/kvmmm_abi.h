/* kvmmm_abi.h: the contract between a guest and kvmmm, used by both sides.
 *
 * Guests include it as it is; the C core includes it too, and Python reads the same numbers through
 * the core. Nothing in it may be written a second time anywhere else.
 *
 * Version rule: KVMMM_ABI_VERSION grows when an old guest would misread a field or a port. Fields are
 * only ever appended; boot_info.struct_bytes tells a newer guest what an older host filled in.
 *
 * Entry: 64-bit long mode, CPL 0, paging on, guest-virtual == guest-physical below `memory_bytes`,
 * rdi = &struct kvmmm_boot_info, rsp = boot_info.stack_top (16-byte aligned, untouched memory),
 * interrupts off, SSE on, AVX on where KVM allows it, GDT with the selectors below, a TSS whose I/O
 * bitmap lets ring 3 use the ports below (and 0xb0 to 0xb7, for its own), and an IDT whose every vector leaves to the host.
 * All of guest memory is user-accessible (U=1), so a guest may drop to ring 3 and stay there.
 */
#ifndef KVMMM_ABI_H
#define KVMMM_ABI_H

#define KVMMM_ABI_MAGIC 0x006d6d6d766bULL /* "kvmmm\0" read as a little-endian number */
#define KVMMM_ABI_VERSION 1

/* ---- Ports. Write-type only (`out`), from any ring. ------------------------------------------ */
#define KVMMM_PORT_EXIT 0xb8     /* out %eax: end the run; the low 8 bits are the exit status       */
#define KVMMM_PORT_DOORBELL 0xb9 /* out %al:  drain the console ring before the guest goes on       */
#define KVMMM_PORT_INPUT 0xba    /* out %al:  put console input into the input ring; comes back when
                                  *           there is at least one byte, or in_eof is set          */
#define KVMMM_PORT_SYSCALL 0xbc  /* out %al:  the SYSCALL entry of a host that serves ring 3 itself:
                                  *           rcx and r11 as SYSCALL left them, from any ring    */
#define KVMMM_PORT_TRAP 0xbf     /* out %al:  the default IDT's stubs, ring 0 only                  */

/* What kernels written for QEMU use, served unchanged. */
#define KVMMM_PORT_COM1 0x3f8       /* 16550 transmit; the line status register always says "empty"  */
#define KVMMM_PORT_DEBUGCON 0xe9    /* one byte a write                                              */
#define KVMMM_PORT_DEBUG_EXIT 0xf4  /* isa-debug-exit: status = (value << 1) | 1                     */

/* ---- Selectors: Linux's layout, the only one that every KVM runs natively in ring 3. ---------- */
#define KVMMM_KERNEL_CS 0x10
#define KVMMM_KERNEL_DS 0x18
#define KVMMM_USER32_CS 0x23
#define KVMMM_USER_DS 0x2b
#define KVMMM_USER_CS 0x33
#define KVMMM_TSS_SELECTOR 0x40

#ifndef __ASSEMBLER__
#include <stdint.h>

typedef uint64_t kvmmm_gpa_t; /* guest-physical address: a number to the host, a pointer to the guest */

enum kvmmm_region_kind {
    KVMMM_REGION_RAM = 1,    /* free for the guest: read-write, zero-filled, demand-paged   */
    KVMMM_REGION_IMAGE = 2,  /* a loaded segment; `flags` are its permissions               */
    KVMMM_REGION_SYSTEM = 3, /* kvmmm's own: tables, IDT, GDT, TSS, stubs, rings            */
};

enum kvmmm_region_flags { KVMMM_REGION_R = 1, KVMMM_REGION_W = 2, KVMMM_REGION_X = 4 };

struct kvmmm_region {
    kvmmm_gpa_t start, end; /* [start, end), page aligned */
    uint32_t kind, flags;
};

enum kvmmm_cpu_features {
    KVMMM_CPU_SSE = 1,      /* always set                                         */
    KVMMM_CPU_AVX = 2,      /* CR4.OSXSAVE and XCR0 = x87|SSE|AVX are set          */
    KVMMM_CPU_FSGSBASE = 4, /* CR4.FSGSBASE is set                                */
    KVMMM_CPU_1GIB = 8,     /* 1 GiB page-table leaves work                       */
};

struct kvmmm_boot_info {
    uint64_t magic; /* KVMMM_ABI_MAGIC */
    uint32_t version, struct_bytes;
    uint64_t memory_bytes; /* --memory, rounded up to 2 MiB: what the boot tables map */
    kvmmm_gpa_t regions;   /* struct kvmmm_region[n_regions], ascending */
    uint32_t n_regions, cmdline_bytes; /* cmdline_bytes: without the NUL */
    kvmmm_gpa_t cmdline;               /* NUL-terminated UTF-8 */
    kvmmm_gpa_t console;               /* struct kvmmm_console */
    kvmmm_gpa_t report;                /* struct kvmmm_report */
    kvmmm_gpa_t stack_top;
    uint64_t cpu_features; /* enum kvmmm_cpu_features */
    uint64_t tsc_hz;       /* 0 when KVM does not say */
};

/* Console. Output: the guest copies to out_data[out_head % out_bytes ...], then publishes out_head
 * with release order. It rings KVMMM_PORT_DOORBELL when `host_sleeps` is set, or when the ring is full.
 * Indexes count bytes since the start and never wrap in practice (64 bits). One cache line a writer.
 */
struct kvmmm_console {
    kvmmm_gpa_t out_data, in_data;
    uint32_t out_bytes, in_bytes; /* ring sizes, powers of two */
    uint64_t out_head __attribute__((aligned(64))); /* guest writes */
    uint64_t in_tail;                               /* guest writes */
    uint64_t out_tail __attribute__((aligned(64))); /* host writes */
    uint64_t in_head;                               /* host writes */
    uint32_t host_sleeps;                           /* host writes; guest reads after publishing */
    uint32_t in_eof;                                /* host writes */
};

/* Test report: a guest that tests counts its verdicts here; the host shows and checks them. */
struct kvmmm_report {
    uint32_t passed, failed;
};

#endif /* __ASSEMBLER__ */
#endif /* KVMMM_ABI_H */
