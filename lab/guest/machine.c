#include "machine.h"

// From and for boot.S.
extern u64 boot_pdpt[512];
void on_call(void);
_Noreturn void enter_program(void (*entry)(struct boot *), struct boot *boot);
_Noreturn void machine_main(u64 multiboot_address);
u64 machine_call(enum call call, u64 first, u64 second);

struct frame {
    u64 rip, cs, rflags, rsp, ss;
};
_Noreturn void machine_fault(u64 code, const struct frame *frame);

// What the compiler may call.
void *memcpy(void *to, const void *from, u64 length);
void *memset(void *to, int byte, u64 length);

static inline void out8(u16 port, u8 value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline u8 in8(u16 port)
{
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

_Noreturn static void stop(void)
{
    for (;;)
        __asm__ volatile("cli; hlt");
}

// ---- serial line -------------------------------------------------------------

enum { COM1 = 0x3f8, FIFO_BYTES = 16, DATA_READY = 0x01, TRANSMITTER_EMPTY = 0x20 };

static void com1_start(void)
{
    out8(COM1 + 1, 0x00); // no interrupts
    out8(COM1 + 3, 0x80);
    out8(COM1 + 0, 0x01); // 115200 baud
    out8(COM1 + 1, 0x00);
    out8(COM1 + 3, 0x03); // 8n1
    out8(COM1 + 2, 0x07); // FIFOs on and empty
    out8(COM1 + 4, 0x03);
}

static void com1_write(const char *text, u64 length)
{
    while (length > 0) {
        while (!(in8(COM1 + 5) & TRANSMITTER_EMPTY))
            __asm__ volatile("pause");
        for (u32 i = 0; i < FIFO_BYTES && length > 0; i++, length--)
            out8(COM1, (u8)*text++);
    }
}

static u64 com1_read(void)
{
    return in8(COM1 + 5) & DATA_READY ? in8(COM1) : ~0ull;
}

// ---- multiboot ---------------------------------------------------------------

struct multiboot_info {
    u32 flags, mem_lower, mem_upper, boot_device, command_line, modules[2], symbols[4];
    u32 memory_map_length, memory_map_address;
};

struct multiboot_region {
    u32 size;
    u64 address, length;
    u32 type;
} __attribute__((packed));

enum { HAS_COMMAND_LINE = 1 << 2, HAS_MEMORY_MAP = 1 << 6, USABLE = 1 };

static struct boot boot;

// Copies what the loader left in memory that is about to be overwritten.
static void boot_read(const struct multiboot_info *info)
{
    if (info->flags & HAS_COMMAND_LINE) {
        const char *from = (const char *)(u64)info->command_line;
        u32 length = 0;
        for (; length < MAX_COMMAND_LINE - 1 && from[length]; length++)
            boot.command_line[length] = from[length];
        if (from[length])
            boot.problem = COMMAND_LINE_TOO_LONG;
    }
    if (!(info->flags & HAS_MEMORY_MAP)) {
        boot.problem = NO_MEMORY_MAP;
        return;
    }
    u64 at = info->memory_map_address, end = at + info->memory_map_length;
    while (at < end) {
        const struct multiboot_region *region = (const struct multiboot_region *)at;
        if (region->type == USABLE && boot.range_count < MAX_RANGES)
            boot.ranges[boot.range_count++] =
                (struct range){region->address, region->address + region->length};
        at += region->size + sizeof region->size;
    }
}

// ---- page tables -------------------------------------------------------------

// One page directory a GiB, made when the first address in it is mapped.
enum { DIRECTORIES_START = 0x200000, BIG_PAGE_BYTES = 0x200000, GIBS = 512 };
enum { PRESENT = 0x01, WRITABLE = 0x02, RING_3 = 0x04, UNCACHED = 0x10, BIG_PAGE = 0x80 };

static u32 map_pages(u64 start, u64 end, u64 flags)
{
    static u64 next_directory = DIRECTORIES_START;
    for (u64 address = start & ~(u64)(BIG_PAGE_BYTES - 1); address < end; address += BIG_PAGE_BYTES) {
        u64 gib = address >> 30;
        if (gib >= GIBS)
            return 0;
        if (!boot_pdpt[gib]) {
            memset((void *)next_directory, 0, PAGE_BYTES);
            boot_pdpt[gib] = next_directory | PRESENT | WRITABLE | RING_3;
            next_directory += PAGE_BYTES;
        }
        u64 *directory = (u64 *)(boot_pdpt[gib] & ~(u64)0xfff);
        directory[address >> 21 & 511] = address | flags | PRESENT | WRITABLE | RING_3 | BIG_PAGE;
    }
    __asm__ volatile("mov %%cr3, %%rax; mov %%rax, %%cr3" : : : "rax", "memory");
    return 1;
}

_Static_assert(DIRECTORIES_START + GIBS * PAGE_BYTES <= FIRST_FREE, "every GiB may need a directory");

// ---- interrupts --------------------------------------------------------------

struct gate {
    u16 offset_low, selector;
    u8 stack, type;
    u16 offset_middle;
    u32 offset_high, reserved;
} __attribute__((packed));

enum { EXCEPTIONS = 32, VECTORS = 48, INVALID_OPCODE = 6 };
enum { CODE_SELECTOR = 0x08, INTERRUPT_GATE = 0x8e };

static struct gate gates[VECTORS];

static void write_string(const char *string)
{
    for (; *string; string++)
        com1_write(string, 1);
}

static void write_hex(const char *key, u64 value)
{
    write_string(key);
    for (int shift = 60; shift >= 0; shift -= 4)
        com1_write(&"0123456789abcdef"[value >> shift & 15], 1);
}

_Noreturn void machine_fault(u64 code, const struct frame *frame)
{
    u64 address;
    __asm__ volatile("mov %%cr2, %0" : "=r"(address));
    write_hex("FAULT code=0x", code);
    write_hex(" rip=0x", frame->rip);
    write_hex(" cr2=0x", address);
    write_string("\n");
    stop();
}

__attribute__((interrupt)) static void on_fault(struct frame *frame)
{
    machine_fault(0, frame);
}

__attribute__((interrupt)) static void on_fault_with_code(struct frame *frame, u64 code)
{
    machine_fault(code, frame);
}

__attribute__((interrupt)) static void on_interrupt(struct frame *frame)
{
    (void)frame;
    out8(0x20, 0x20);
}

static void set_gate(u32 vector, u64 handler)
{
    gates[vector] = (struct gate){.offset_low = (u16)handler,
                                  .selector = CODE_SELECTOR,
                                  .type = INTERRUPT_GATE,
                                  .offset_middle = (u16)(handler >> 16),
                                  .offset_high = (u32)(handler >> 32)};
}

static void exceptions_start(void)
{
    const u32 with_code = 1u << 8 | 1u << 10 | 1u << 11 | 1u << 12 | 1u << 13 | 1u << 14 | 1u << 17 | 1u << 21;
    for (u32 vector = 0; vector < EXCEPTIONS; vector++)
        set_gate(vector, with_code >> vector & 1 ? (u64)on_fault_with_code : (u64)on_fault);
    for (u32 vector = EXCEPTIONS; vector < VECTORS; vector++)
        set_gate(vector, (u64)on_interrupt);
    set_gate(INVALID_OPCODE, (u64)on_call);
    struct {
        u16 limit;
        u64 base;
    } __attribute__((packed)) pointer = {sizeof gates - 1, (u64)gates};
    __asm__ volatile("lidt %0" : : "m"(pointer));
}

// ---- timer -------------------------------------------------------------------

enum { TIMER_VECTOR = EXCEPTIONS, TIMER_HZ = 500, PIT_HZ = 1193182 };
enum { LOCAL_APIC = 0xfee00000, SPURIOUS_VECTOR = 0xf0, LOCAL_INTERRUPT_0 = 0x350 };

static void timer_start(void)
{
    // The interrupt controllers' vectors moved off the exceptions; only the timer is let through.
    out8(0x20, 0x11), out8(0xa0, 0x11);
    out8(0x21, TIMER_VECTOR), out8(0xa1, TIMER_VECTOR + 8);
    out8(0x21, 4), out8(0xa1, 2);
    out8(0x21, 1), out8(0xa1, 1);
    out8(0x21, 0xfe), out8(0xa1, 0xff);

    // Not every firmware lets the old controllers through the local APIC.
    map_pages(LOCAL_APIC, LOCAL_APIC + PAGE_BYTES, UNCACHED);
    *(volatile u32 *)(LOCAL_APIC + SPURIOUS_VECTOR) = 0x100 | (VECTORS - 1);
    *(volatile u32 *)(LOCAL_APIC + LOCAL_INTERRUPT_0) = 0x700;

    const u16 divisor = PIT_HZ / TIMER_HZ;
    out8(0x43, 0x34);
    out8(0x40, (u8)divisor), out8(0x40, (u8)(divisor >> 8));
}

// The time stamp counter and the PIT's channel 2, read as close together as can be had.
struct moment {
    u64 tsc, distance;
    u16 pit;
};

static struct moment moment_now(void)
{
    struct moment best = {.distance = ~0ull};
    for (u32 attempt = 0; attempt < 8; attempt++) {
        u64 before = read_tsc();
        out8(0x43, 0x80);
        u64 after = read_tsc();
        u16 pit = in8(0x42);
        pit |= (u16)(in8(0x42) << 8);
        if (after - before < best.distance)
            best = (struct moment){before + (after - before) / 2, after - before, pit};
    }
    return best;
}

static u64 tsc_hz(void)
{
    // Channel 2 counts down from 65535, for 55 ms; 15 ms of them are watched.
    enum { WATCHED = PIT_HZ / 1000 * 15 };
    out8(0x61, (u8)((in8(0x61) & ~0x02) | 0x01));
    out8(0x43, 0xb0);
    out8(0x42, 0xff), out8(0x42, 0xff);
    struct moment start = moment_now(), end;
    do
        end = moment_now();
    while ((u16)(start.pit - end.pit) < WATCHED);
    return (end.tsc - start.tsc) * PIT_HZ / (u16)(start.pit - end.pit);
}

// ---- ring 3's calls ----------------------------------------------------------

u64 machine_call(enum call call, u64 first, u64 second)
{
    switch (call) {
    case CALL_WRITE:
        com1_write((const char *)first, second);
        return 0;
    case CALL_READ:
        return com1_read();
    case CALL_WAIT:
        __asm__ volatile("sti; hlt; cli" : : : "memory");
        return 0;
    case CALL_MAP:
        return map_pages(first, second, 0);
    case CALL_MEASURE:
        return tsc_hz();
    case CALL_HALT:
        break;
    }
    stop();
}

_Noreturn void machine_main(u64 multiboot_address)
{
    com1_start();
    boot_read((const struct multiboot_info *)multiboot_address);
    exceptions_start();
    timer_start();
    enter_program(program, &boot);
}

void *memcpy(void *to, const void *from, u64 length)
{
    void *start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(length) : : "memory");
    return start;
}

void *memset(void *to, int byte, u64 length)
{
    void *start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(length) : "a"(byte) : "memory");
    return start;
}
