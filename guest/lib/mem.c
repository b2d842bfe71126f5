/* What gcc may call though -nostdlib is given, in string instructions.
 *
 * In ring 3, and wherever KVM runs ring 0 natively, `rep movsb` is the fastest copy there is. A KVM
 * that interprets ring 0 pays by the element: eight bytes at a time are eight times faster there.
 */
#include "kvmmm.h"

void *memcpy(void *restrict to, const void *restrict from, size_t n)
{
    void *start = to;

    if (kvmmm_cpl() == 0) {
        size_t words = n / 8;
        n %= 8;
        asm volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(words) : : "memory");
    }
    asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    return start;
}

void *memmove(void *to, const void *from, size_t n)
{
    /* Forward is right unless `to` starts inside what is still to be read. */
    if ((uint64_t)to - (uint64_t)from >= n)
        return memcpy(to, from, n);

    char *last_to = (char *)to + n - 1;
    const char *last_from = (const char *)from + n - 1;
    asm volatile("std; rep movsb; cld" : "+D"(last_to), "+S"(last_from), "+c"(n) : : "memory");
    return to;
}

void *memset(void *to, int byte, size_t n)
{
    void *start = to;

    if (kvmmm_cpl() == 0) {
        size_t words = n / 8;
        n %= 8;
        asm volatile("rep stosq"
                     : "+D"(to), "+c"(words)
                     : "a"((uint8_t)byte * 0x0101010101010101UL)
                     : "memory");
    }
    asm volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(byte) : "memory");
    return start;
}

int memcmp(const void *a, const void *b, size_t n)
{
    const uint8_t *p = a, *q = b;

    for (; n > 0; n--, p++, q++)
        if (*p != *q)
            return *p < *q ? -1 : 1;
    return 0;
}

size_t strlen(const char *text)
{
    const char *end = text;

    while (*end != '\0') {
        end++;
        asm(""); /* or gcc sees a strlen in it, and calls this function */
    }
    return (size_t)(end - text);
}

bool kvmmm_equal(const char *a, const char *b)
{
    for (; *a == *b; a++, b++)
        if (*a == '\0')
            return true;
    return false;
}
