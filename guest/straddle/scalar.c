/* straddle, integer instructions: 2, 4 and 8 bytes, loads, stores, read-modify-write, atomics. */
#include "straddle.h"

enum { DEFINED_FLAGS = 0x8c5 }; /* OF SF ZF PF CF; AF is undefined after too much */

/* rdi = at; rax, rbx, rdx have bits everywhere, rcx is a bit number beyond its operand. */
#define SCALAR(name, instruction)                                                                  \
    static void name(uint8_t *at, uint8_t *out)                                                    \
    {                                                                                              \
        uint64_t a = 0x1122334455667788, b = 0x0123456789abcdef, c = 70, d = 0x99aabbccddeeff00;   \
        uint64_t flags;                                                                            \
        asm volatile("cmp %%eax, %%eax; " instruction "; pushfq; popq %4"                          \
                     : "+a"(a), "+b"(b), "+c"(c), "+d"(d), "=r"(flags)                             \
                     : "D"(at)                                                                     \
                     : "memory", "cc");                                                            \
        OUT(0) = a;                                                                                \
        OUT(1) = b;                                                                                \
        OUT(2) = c;                                                                                \
        OUT(3) = d;                                                                                \
        OUT(4) = flags & DEFINED_FLAGS & flags_mask;                                               \
    }

SCALAR(load2, "movw (%%rdi), %%ax")
SCALAR(load4, "movl (%%rdi), %%eax")
SCALAR(load8, "movq (%%rdi), %%rax")
SCALAR(load_zero_extend, "movzwl (%%rdi), %%eax")
SCALAR(load_sign_extend, "movslq (%%rdi), %%rax")
SCALAR(store2, "movw %%ax, (%%rdi)")
SCALAR(store4, "movl %%eax, (%%rdi)")
SCALAR(store8, "movq %%rax, (%%rdi)")
SCALAR(store_immediate, "movq $-0x12345678, (%%rdi)")
SCALAR(store_non_temporal, "movnti %%rax, (%%rdi); mfence")
SCALAR(add2, "addw %%ax, (%%rdi)")
SCALAR(add4, "addl %%eax, (%%rdi)")
SCALAR(add8, "addq %%rax, (%%rdi)")
SCALAR(add_with_carry, "stc; adcq %%rax, (%%rdi)")
SCALAR(negate, "negq (%%rdi)")
SCALAR(or_bits, "orq %%rdx, (%%rdi)")
SCALAR(bit_set_far, "btsq %%rcx, (%%rdi)")
SCALAR(exchange2, "xchgw %%ax, (%%rdi)")
SCALAR(exchange8, "xchgq %%rax, (%%rdi)")
SCALAR(xadd8, "xaddq %%rax, (%%rdi)")
SCALAR(cmpxchg_zero, "xorl %%eax, %%eax; cmpxchgq %%rbx, (%%rdi)")
SCALAR(locked_add8, "lock addq %%rax, (%%rdi)")
SCALAR(locked_xadd4, "lock xaddl %%eax, (%%rdi)")
SCALAR(locked_cmpxchg8, "xorl %%eax, %%eax; lock cmpxchgq %%rbx, (%%rdi)")
SCALAR(locked_cmpxchg8b, "xorl %%eax, %%eax; xorl %%edx, %%edx; lock cmpxchg8b (%%rdi)")
SCALAR(locked_increment, "lock incl (%%rdi)")
SCALAR(compare, "cmpq %%rax, (%%rdi)")
SCALAR(test_bits, "testl %%eax, (%%rdi)")
SCALAR(load_add, "addq (%%rdi), %%rax")
SCALAR(move_if, "cmoveq (%%rdi), %%rax")
SCALAR(count_bits, "popcntq (%%rdi), %%rax")
SCALAR(set_byte, "sete (%%rdi)")

static const struct check plain[] = {
    {"load of 2 bytes", load2, -1, EACH},
    {"load of 4 bytes", load4, -1, NONE},
    {"load of 4 bytes", load4, -2, EACH},
    {"load of 4 bytes", load4, -3, BELOW},
    {"load of 8 bytes", load8, -1, ABOVE},
    {"load of 8 bytes", load8, -4, EACH},
    {"load of 8 bytes", load8, -7, BELOW},
    {"zero-extending load", load_zero_extend, -1, EACH},
    {"sign-extending load", load_sign_extend, -1, ABOVE},
    {"load into an addition", load_add, -5, EACH},
    {"conditional move", move_if, -4, BELOW},
    {"compare", compare, -3, EACH},
    {"test", test_bits, -2, ABOVE},
    {"popcnt", count_bits, -6, BELOW | ABOVE},
    {"store of 1 byte", set_byte, -1, NONE},
    {"store of 1 byte", set_byte, 0, NONE},
    {"store of 2 bytes", store2, -1, EACH},
    {"store of 4 bytes", store4, -1, NONE},
    {"store of 4 bytes", store4, -2, BELOW},
    {"store of 4 bytes", store4, -3, ABOVE},
    {"store of 8 bytes", store8, -1, NONE},
    {"store of 8 bytes", store8, -4, EACH},
    {"store of 8 bytes", store8, -7, NONE},
    {"store of 8 bytes", store8, 0, NONE},
    {"store of an immediate", store_immediate, -5, NONE},
    {"non-temporal store", store_non_temporal, -4, EACH},
    {"add to 2 bytes", add2, -1, EACH},
    {"add to 4 bytes", add4, -2, EACH},
    {"add to 8 bytes", add8, -4, EACH},
    {"add with carry", add_with_carry, -3, ABOVE},
    {"negate", negate, -6, BELOW},
    {"or", or_bits, -2, EACH},
    {"set of a far bit", bit_set_far, -12, EACH},
    {"unlocked xadd", xadd8, -5, EACH},
    {"unlocked cmpxchg", cmpxchg_zero, -4, EACH},
    /* Within a cache line, where no host minds the lock. */
    {"xchg", exchange8, 0, NONE},
    {"xchg", exchange8, -8, BELOW},
    {"lock add", locked_add8, 0, NONE},
    {"lock add", locked_add8, -8, NONE},
    {"lock xadd", locked_xadd4, 0, EACH},
    {"lock cmpxchg", locked_cmpxchg8, 0, EACH},
    {"lock cmpxchg8b", locked_cmpxchg8b, 0, NONE},
    {"lock inc", locked_increment, -4, NONE},
};

static const struct check split_locks[] = {
    {"xchg of 2 bytes", exchange2, -1, EACH},
    {"xchg of 8 bytes", exchange8, -4, EACH},
    {"lock add", locked_add8, -3, EACH},
    {"lock xadd", locked_xadd4, -2, EACH},
    {"lock cmpxchg", locked_cmpxchg8, -4, EACH},
    {"lock cmpxchg8b", locked_cmpxchg8b, -5, NONE},
    {"lock inc", locked_increment, -1, NONE},
};

void check_scalars(void)
{
    run_checks(plain, COUNT(plain));
    if (kvmmm_option_number("splitlock", 1) != 0)
        run_checks(split_locks, COUNT(split_locks));
}
