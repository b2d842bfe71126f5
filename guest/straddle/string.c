/* straddle, string instructions: rep movs, stos, lods, scas, cmps over edges, both directions. */
#include "straddle.h"

/* di, si and cx are expressions of `at` (untouched) and `out` (resident, 128 bytes of it free). */
#define STRING(name, di, si, cx, instruction)                                                      \
    static void name(uint8_t *at, uint8_t *out)                                                    \
    {                                                                                              \
        uint8_t *to = (di), *from = (si);                                                          \
        uint64_t count = (cx), a = 0x1122334455667788, flags;                                      \
        asm volatile("cmp %%eax, %%eax; " instruction "; pushfq; popq %4; cld"                     \
                     : "+D"(to), "+S"(from), "+c"(count), "+a"(a), "=r"(flags)                     \
                     :                                                                             \
                     : "memory", "cc");                                                            \
        OUT(16) = (uint64_t)(to - (di));                                                           \
        OUT(17) = (uint64_t)(from - (si));                                                         \
        OUT(18) = count;                                                                           \
        OUT(19) = a;                                                                               \
        OUT(20) = flags & 0x40; /* ZF */                                                           \
        (void)at;                                                                                  \
    }

STRING(movsb_to, at, pattern, 33, "rep movsb")
STRING(movsw_to, at, pattern, 9, "rep movsw")
STRING(movsl_to, at, pattern, 7, "rep movsl")
STRING(movsq_to, at, pattern, 5, "rep movsq")
STRING(movsb_from, out, at, 33, "rep movsb")
STRING(movsq_from, out, at, 5, "rep movsq")
STRING(movsb_down, at + 32, pattern + 32, 33, "std; rep movsb")
STRING(movsq_down, at + 32, pattern + 32, 5, "std; rep movsq")
STRING(movsb_smear, at + 1, at, 33, "rep movsb")
STRING(stosb, at, out, 33, "rep stosb")
STRING(stosl, at, out, 7, "rep stosl")
STRING(stosq, at, out, 5, "rep stosq")
STRING(stosq_down, at + 32, out, 5, "std; rep stosq")
STRING(lodsq, out, at, 1, "lodsq")
STRING(lodsl_rep, out, at, 5, "rep lodsl")
STRING(scasb, at, out, 40, "mov $0x5b, %%al; repne scasb")
STRING(scasw, at, out, 20, "xor %%eax, %%eax; repe scasw")
STRING(cmpsb, at, pattern, 40, "repe cmpsb")
STRING(cmpsq, pattern, at, 5, "repne cmpsq")

static const struct check checks[] = {
    {"rep movsb to it", movsb_to, -17, EACH},    {"rep movsw to it", movsw_to, -9, NONE},
    {"rep movsl to it", movsl_to, -14, NONE},    {"rep movsq to it", movsq_to, -20, EACH},
    {"rep movsb from it", movsb_from, -17, EACH}, {"rep movsq from it", movsq_from, -20, EACH},
    {"rep movsb down", movsb_down, -17, EACH},   {"rep movsq down", movsq_down, -20, EACH},
    {"rep movsb onto itself", movsb_smear, -3, EACH},
    {"rep stosb", stosb, -16, EACH},             {"rep stosl", stosl, -14, NONE},
    {"rep stosq", stosq, -20, EACH},             {"rep stosq down", stosq_down, -20, NONE},
    {"lodsq", lodsq, -4, EACH},                  {"rep lodsl", lodsl_rep, -10, EACH},
    {"repne scasb", scasb, -20, EACH},           {"repe scasw", scasw, -20, ABOVE},
    {"repe cmpsb", cmpsb, -20, BELOW},           {"repne cmpsq", cmpsq, -20, EACH},
};

enum { LONG_BYTES = 3 * 4096, LONG_OFFSET = 5003 };

/* Several pages on either side, from untouched to untouched memory, misaligned. */
static void check_long(void)
{
    uint8_t *from = fresh_window_edge(NONE) - LONG_OFFSET;
    uint8_t *to = fresh_window_edge(NONE) - LONG_OFFSET;
    uint8_t *di = from, *si = from;
    uint64_t n = LONG_BYTES / 8;
    bool right = true;

    if ((uint64_t)(from + LONG_OFFSET) % KVMMM_WINDOW_BYTES != 0 ||
        (uint64_t)(to + LONG_OFFSET) % KVMMM_WINDOW_BYTES != 0)
        return; /* no windows left: page edges lie too close for this one */
    asm volatile("rep stosq" : "+D"(di), "+c"(n) : "a"(0x0807060504030201) : "memory");
    for (unsigned i = 0; i < LONG_BYTES; i++)
        right &= from[i] == i % 8 + 1;
    report(right && n == 0 && di == from + LONG_BYTES, "rep stosq of 12 KiB over an edge");

    di = to + 3;
    n = LONG_BYTES;
    asm volatile("rep movsb" : "+D"(di), "+S"(si), "+c"(n) : : "memory");
    report(memcmp(to + 3, from, LONG_BYTES) == 0 && to[2] == 0 && to[3 + LONG_BYTES] == 0,
           "rep movsb of 12 KiB over an edge");

    from = fresh_window_edge(NONE) - LONG_OFFSET;
    to = fresh_window_edge(NONE) - LONG_OFFSET + 1;
    di = to;
    si = from;
    n = LONG_BYTES / 8;
    asm volatile("rep movsq" : "+D"(di), "+S"(si), "+c"(n) : : "memory");
    right = true;
    for (unsigned i = 0; i < LONG_BYTES; i++)
        right &= to[i] == 0;
    report(right && n == 0 && si == from + LONG_BYTES, "rep movsq, both sides untouched");
}

void check_strings(void)
{
    run_checks(checks, COUNT(checks));
    check_long();
}
