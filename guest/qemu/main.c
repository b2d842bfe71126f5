/* qemu: a kernel written for QEMU runs unchanged. Expected: two lines, status 33 (2 * 16 + 1).
 *
 * Uses nothing of kvmmm but that it is entered in long mode with a stack: COM1 with the line status
 * register polled, the debug console at port 0xe9, and isa-debug-exit at 0xf4. All in ring 0, where
 * such kernels live.
 */
#include <stdint.h>

static inline void outb(uint16_t port, uint8_t value)
{
    asm volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint8_t inb(uint16_t port)
{
    uint8_t value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

enum { COM1 = 0x3f8, LINE_STATUS = 5, TRANSMIT_EMPTY = 0x20 };

static void serial_init(void)
{
    outb(COM1 + 1, 0x00); /* no interrupts */
    outb(COM1 + 3, 0x80); /* divisor latch */
    outb(COM1 + 0, 0x01); /* 115200 baud */
    outb(COM1 + 1, 0x00);
    outb(COM1 + 3, 0x03); /* 8n1 */
    outb(COM1 + 2, 0xc7); /* FIFO */
    outb(COM1 + 4, 0x03); /* DTR, RTS */
}

static void serial_put(const char *text)
{
    for (; *text != '\0'; text++) {
        while ((inb(COM1 + LINE_STATUS) & TRANSMIT_EMPTY) == 0)
            ;
        outb(COM1, (uint8_t)*text);
    }
}

static void debug_put(const char *text)
{
    for (; *text != '\0'; text++)
        outb(0xe9, (uint8_t)*text);
}

void _start(void)
{
    serial_init();
    serial_put("qemu: hello through COM1\n");
    debug_put("qemu: hello through port 0xe9\n");
    asm volatile("outl %0, %1" : : "a"(16), "Nd"((uint16_t)0xf4));
    for (;;)
        asm volatile("hlt");
}
