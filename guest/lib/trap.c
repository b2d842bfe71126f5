/* An IDT of the guest's own, for guests that handle their exceptions themselves.
 *
 * Until kvmmm_set_trap_handler is called, kvmmm's default IDT reports every exception on the host
 * and ends the run. Afterwards exceptions are the guest's business: kvmmm no longer sees them.
 */
#include "kvmmm.h"

struct gate {
    uint16_t offset_low, selector;
    uint8_t stack, type;
    uint16_t offset_middle;
    uint32_t offset_high, reserved;
};

enum { N_VECTORS = 32, STUB_BYTES = 16, INTERRUPT_GATE = 0x8e, DPL3 = 0x60 };

void (*kvmmm_trap_handler)(struct kvmmm_trap_frame *frame);
extern const char kvmmm_trap_stubs[];

/* The CPU reads it at any moment: written in full, hence resident, before lidt. */
static struct gate idt[N_VECTORS] __attribute__((aligned(16)));

void kvmmm_set_trap_handler(void (*handler)(struct kvmmm_trap_frame *frame))
{
    struct __attribute__((packed)) {
        uint16_t limit;
        uint64_t base;
    } idtr = {sizeof idt - 1, (uint64_t)idt};

    kvmmm_trap_handler = handler;
    for (int vector = 0; vector < N_VECTORS; vector++) {
        uint64_t stub = (uint64_t)kvmmm_trap_stubs + (uint64_t)vector * STUB_BYTES;
        /* int3 and into are instructions of ring 3's own, so their gates let ring 3 in. */
        bool user = vector == 3 || vector == 4;
        idt[vector] = (struct gate){
            .offset_low = (uint16_t)stub,
            .offset_middle = (uint16_t)(stub >> 16),
            .offset_high = (uint32_t)(stub >> 32),
            .selector = KVMMM_KERNEL_CS,
            .type = INTERRUPT_GATE | (user ? DPL3 : 0),
        };
    }
    asm volatile("lidt %0" : : "m"(idtr) : "memory");
}
