// The machine under the program: serial line, timer, page tables, multiboot.
//
// Only machine.c and boot.S run in ring 0. The program, which touches all the
// memory, runs in ring 3: nested hypervisors without hardware help run user
// code at full speed and emulate kernel code instruction by instruction. It
// reaches ring 0 by the calls below.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

enum { PAGE_BYTES = 4096, PAGE_WORDS = PAGE_BYTES / 8 };

// The image lies below, the page tables are made below.
enum { FIRST_FREE = 0x400000 };

struct range {
    u64 start;
    u64 end;
};

enum { MAX_RANGES = 64, MAX_COMMAND_LINE = 2048 };

// Why the machine could not be read; zero when it could.
enum boot_problem { BOOT_OK, COMMAND_LINE_TOO_LONG, NO_MEMORY_MAP };

struct boot {
    enum boot_problem problem;
    char command_line[MAX_COMMAND_LINE];
    struct range ranges[MAX_RANGES];
    u32 range_count;
};

enum call { CALL_WRITE, CALL_READ, CALL_WAIT, CALL_MAP, CALL_MEASURE, CALL_HALT };

// `ud2`, since every hypervisor delivers its exception and some fail on `int` and `syscall`.
static inline u64 call_machine(enum call call, u64 first, u64 second)
{
    u64 result;
    __asm__ volatile("ud2" : "=a"(result) : "D"(call), "S"(first), "d"(second) : "memory");
    return result;
}

// Sends to the serial line.
static inline void serial_write(const char *text, u32 length)
{
    call_machine(CALL_WRITE, (u64)text, length);
}

// The next byte received, or -1.
static inline int serial_read(void)
{
    return (int)call_machine(CALL_READ, 0, 0);
}

// Sleeps until the next timer interrupt: 2 ms at most.
static inline void wait_for_timer(void)
{
    call_machine(CALL_WAIT, 0, 0);
}

// Maps [start, end) one to one; 0 when it cannot be.
static inline u32 map_range(u64 start, u64 end)
{
    return (u32)call_machine(CALL_MAP, start, end);
}

static inline u64 measure_tsc_hz(void)
{
    return call_machine(CALL_MEASURE, 0, 0);
}

_Noreturn static inline void halt(void)
{
    for (;;)
        call_machine(CALL_HALT, 0, 0);
}

static inline u64 read_tsc(void)
{
    u32 low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high) : : "memory");
    return (u64)high << 32 | low;
}

// Where the program begins, in ring 3.
_Noreturn void program(struct boot *boot);
