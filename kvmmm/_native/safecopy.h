/* safecopy.h: moving bytes that may fault: a SIGSEGV or SIGBUS becomes an exact count.
 *
 * No Python, no KVM. Each call goes upwards through memory; on a fault exactly the bytes before the first
 * one that could not be accessed have been moved, and nothing behind it was written. Source and
 * destination should not overlap: the count stays exact, but what is moved is then not promised.
 *
 * Faults of others, and signals that somebody sends, go to whoever had the signals before.
 */
#ifndef KVMMM_SAFECOPY_H
#define KVMMM_SAFECOPY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct kvmmm_fault {
    uintptr_t addr; /* host address that faulted (0 where the CPU does not say: it was not canonical) */
    int signal;     /* SIGSEGV or SIGBUS; written on a fault only: set it to 0 before */
};

/* Bytes moved: n_bytes, or fewer and *fault tells why. */
size_t kvmmm_copy(void *dst, const void *src, size_t n_bytes, struct kvmmm_fault *fault);
size_t kvmmm_zero(void *dst, size_t n_bytes, struct kvmmm_fault *fault);

/* Sequentially consistent, on an aligned word. Whether it was done; *old_ret is what was there. */
bool kvmmm_swap_u32(uint32_t *word, uint32_t new, uint32_t *old_ret, struct kvmmm_fault *fault);
bool kvmmm_cas_u32(uint32_t *word, uint32_t old, uint32_t new, uint32_t *old_ret, struct kvmmm_fault *fault);
bool kvmmm_load_u32(const uint32_t *word, uint32_t *ret, struct kvmmm_fault *fault);

/* Have the signals come to us first, chaining to whoever had them. Idempotent and cheap (three system
 * calls): called when a VM is made, and before a copy that is likely to fault, because others install
 * handlers as well. 0 or -errno.
 *
 * Also unblocks both signals for the calling thread: the kernel kills a process that faults while they
 * are blocked, whatever handler there is. */
int kvmmm_safecopy_own(void);

/* For tests and benchmarks: with AVX2 (where the CPU has it) or without, and from which size on copies go
 * past the caches; 0 for what was chosen when the module was loaded. Whether AVX2 is used now. */
bool kvmmm_safecopy_tune(bool avx2, size_t stream_bytes);

#endif /* KVMMM_SAFECOPY_H */
