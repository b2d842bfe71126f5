/* straddle, the stack and the instruction stream: push, pop, call, ret; code in untouched pages. */
#include "straddle.h"

/* rdi = at, rsi = out + 128. Each operation may point rsp anywhere: r9 brings it back, and nothing
 * lives below it (-mno-red-zone).
 */
#define STACK(name, instruction)                                                                   \
    static void name(uint8_t *at, uint8_t *out)                                                    \
    {                                                                                              \
        uint64_t a = 0x1122334455667788, d = 0;                                                    \
        asm volatile("mov %%rsp, %%r9; mov %%rbp, %%r8\n" instruction                              \
                     "\nmov %%r9, %%rsp; mov %%r8, %%rbp"                                          \
                     : "+a"(a), "+d"(d)                                                            \
                     : "D"(at), "S"(out + SIDE_BYTES)                                              \
                     : "r8", "r9", "r10", "memory", "cc");                                         \
        OUT(0) = a;                                                                                \
        OUT(1) = d;                                                                                \
    }

STACK(push8, "lea 8(%%rdi), %%rsp; push %%rax; mov %%rsp, %%rdx; sub %%rdi, %%rdx")
STACK(push2, "lea 2(%%rdi), %%rsp; pushw %%ax")
STACK(push_immediate, "lea 8(%%rdi), %%rsp; pushq $-77")
STACK(push_memory, "mov %%rsi, %%rsp; pushq (%%rdi)")
STACK(push_both, "lea 8(%%rdi), %%rsp; pushq 16(%%rdi)")
STACK(pop8, "mov %%rdi, %%rsp; pop %%rax; mov %%rsp, %%rdx; sub %%rdi, %%rdx")
STACK(pop_memory, "mov %%rsi, %%rsp; push %%rax; popq (%%rdi)")
STACK(push_pop, "lea 8(%%rdi), %%rsp; push %%rax; pop %%rdx")
STACK(call_only, "lea 8(%%rdi), %%rsp; call 1f; 1:")
STACK(call_return, "lea 8(%%rdi), %%rsp; call 1f; jmp 2f; 1: inc %%rdx; ret; 2:")
/* The low half of a pointer is written, the high half is the zeros of the untouched side. */
STACK(call_memory, "lea 1f(%%rip), %%r10; movl %%r10d, (%%rdi); call *(%%rdi); jmp 2f\n"
                   "1: inc %%rdx; ret; 2:")
STACK(return_half, "lea 1f(%%rip), %%r10; movl %%r10d, (%%rdi); mov %%rdi, %%rsp; ret; ud2\n"
                   "1: inc %%rdx")
STACK(enter_leave, "mov $0x7777, %%ebp; lea 8(%%rdi), %%rsp; enter $16, $0\n"
                   "mov %%rbp, %%rdx; sub %%rdi, %%rdx; leave")

static const struct check stack_checks[] = {
    {"push", push8, -8, NONE},
    {"push", push8, -4, EACH},
    {"push of 2 bytes", push2, -1, NONE},
    {"push of an immediate", push_immediate, -3, NONE},
    {"push from memory", push_memory, -4, EACH},
    {"push from memory to memory", push_both, -20, EACH},
    {"pop", pop8, -8, NONE},
    {"pop", pop8, -4, EACH},
    {"pop to memory", pop_memory, -4, EACH},
    {"push, then pop", push_pop, -5, NONE},
    {"call", call_only, -8, NONE},
    {"call", call_only, -4, EACH},
    {"call and ret", call_return, -4, NONE},
    {"call through memory", call_memory, -4, NONE},
    {"ret to a half-present address", return_half, -4, NONE},
    {"enter and leave", enter_leave, -4, EACH},
};

void check_stack(void)
{
    run_checks(stack_checks, COUNT(stack_checks));
}

/* ---- Code: the four windows of .rwx (link-rwx.ld). ------------------------------------------- */

extern uint8_t __rwx_start[];

enum { RET = 0xc3, RET_IMM16 = 0xc2, ZEROS_RUN = 64 };

/* Call `code` with rax pointing at a byte; zeros are `add %al, (%rax)`. */
static void call_zeros(const uint8_t *code, uint8_t *byte)
{
    asm volatile("call *%1" : : "a"(byte), "r"(code) : "memory", "cc");
}

void check_code(void)
{
    /* mov $0xdeadbeef, %eax; ret */
    static const uint8_t program[] = {0xb8, 0xef, 0xbe, 0xad, 0xde, RET};
    static uint8_t bytes[512];
    uint8_t *first = __rwx_start, *second = first + KVMMM_WINDOW_BYTES;
    uint8_t *third = second + KVMMM_WINDOW_BYTES, *fourth = third + KVMMM_WINDOW_BYTES;
    uint64_t value;

    /* al is the low byte of the address: 1 here, so that each addition shows. */
    uint8_t *byte = (uint8_t *)(((uint64_t)bytes + 255) & -256UL) + 1;

    *fourth = RET;
    call_zeros(fourth - ZEROS_RUN, byte);
    report(*byte == ZEROS_RUN / 2, "code in an untouched page, running over the edge");

    second[-1] = RET_IMM16; /* ret $0, if the two bytes that nobody has touched are zero */
    call_zeros(second - 1, byte);
    report(*byte == ZEROS_RUN / 2, "an instruction over an edge, its operand untouched");

    memcpy(first, program, sizeof program);
    asm volatile("call *%1" : "=a"(value) : "r"(first) : "memory", "cc");
    report(value == 0xdeadbeef, "code just written");
    first[1] = 0xee; /* rewritten after it ran: x86 keeps data and code coherent */
    asm volatile("call *%1" : "=a"(value) : "r"(first) : "memory", "cc");
    report(value == 0xdeadbeee, "code rewritten");

    memcpy(third - 3, program, sizeof program);
    asm volatile("call *%1" : "=a"(value) : "r"(third - 3) : "memory", "cc");
    report(value == 0xdeadbeef, "code just written over an edge");
}
