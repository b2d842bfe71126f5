/* user_fault: a program's own fault is reported, with its instruction. Expected: a fault.
 *
 * Option: kind=null, code (write to text), data (jump into data), hole (read of what was unmapped),
 * kernel (read of kvmmm's own pages), guard (below the stack), opcode, divide, noncanonical, port.
 */
#include "user.h"

static volatile uint64_t data[512] = {0xc3};

static uint64_t hole(void)
{
    long addr = user_mmap(0, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    user_munmap((uint64_t)addr, 4096);
    return (uint64_t)addr;
}

static void __attribute__((noinline)) do_it(const char *kind)
{
    volatile uint64_t zero = 0;

    if (kvmmm_equal(kind, "null"))
        *(volatile uint64_t *)zero = 42;
    else if (kvmmm_equal(kind, "code"))
        *(volatile uint8_t *)((uint64_t)_start) = 0x90;
    else if (kvmmm_equal(kind, "data"))
        ((void (*)(void))(uint64_t)data)();
    else if (kvmmm_equal(kind, "hole"))
        data[1] = *(volatile uint64_t *)hole();
    else if (kvmmm_equal(kind, "kernel"))
        data[1] = *(volatile uint64_t *)0xffffff8000000000;
    else if (kvmmm_equal(kind, "guard"))
        data[1] = *((volatile uint64_t *)user_stack - (9 << 17));
    else if (kvmmm_equal(kind, "opcode"))
        asm volatile("ud2");
    else if (kvmmm_equal(kind, "divide"))
        asm volatile("divl %0" : : "m"(zero), "a"(1), "d"(0) : "cc");
    else if (kvmmm_equal(kind, "noncanonical"))
        data[1] = *(volatile uint64_t *)0x800000000000;
    else if (kvmmm_equal(kind, "port"))
        asm volatile("outb %%al, $0x80" : : "a"(0));
    else
        kvmmm_exit(KVMMM_STATUS_USAGE);
}

int main(void)
{
    kvmmm_only_options("kind");
    const char *kind = kvmmm_option("kind", "null");

    kprintf("fault: this will not come back: kind=%s\n", kind);
    do_it(kind);
    kprintf("fault: it came back\n");
    return KVMMM_STATUS_OK;
}
