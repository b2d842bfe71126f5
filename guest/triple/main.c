/* triple: a triple fault ends the run, not the host. Expected: a shutdown, reported as such.
 *
 * With an empty IDT, #UD finds no gate, nor does the #GP about that, nor the double fault.
 */
#include "kvmmm.h"

int main(const struct kvmmm_boot_info *boot)
{
    const struct __attribute__((packed)) {
        uint16_t limit;
        uint64_t base;
    } nothing = {0, 0};

    (void)boot;
    kprintf("triple: loads an empty IDT, then executes ud2\n");
    asm volatile("lidt %0; ud2" : : "m"(nothing) : "memory");
    kprintf("FAIL: it went on\n");
    return KVMMM_STATUS_FAILED;
}
