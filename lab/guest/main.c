// A guest that proves itself. It writes a pattern over its memory, pass after
// pass, and before it overwrites a page it checks that the page holds exactly
// what the pass before left there. It reports on the serial line:
//
//   BOOT tsc_khz= memory_mib=          what it found
//   READY work_pages= idle_pages=      memory filled, passes begin
//   TICK n= pass= pages_checked= errors= tsc= us= worst_us=
//   LOST set= kind= page= offset= want= have= words= pass= age=
//   VERIFIED pages= errors=            answer to the command byte `v`
//   PAUSED pass= / RESUMED pass=       answers to `p` and `r`
//   REFUSED reason= detail=            it cannot do what was asked
//   FAULT code= rip= cr2=              a bug, or corrupt memory
#include "options.h"
#include "pattern.h"
#include "text.h"

enum { CHUNK_BYTES = 1 << 20, CHUNK_PAGES = CHUNK_BYTES / PAGE_BYTES };
enum { SLICE_PAGES = 16, MAX_LOST_LINES = 64 };

// One of the two sets of pages: those written in every pass, those written once.
struct cursor {
    u32 idle;
    u64 chunks, chunk; // of this set; the next one
    u64 slot;          // the next chosen chunk to look at, of both sets
    u64 address;       // of the chunk
    u32 page;          // the next page in it
};

static struct guest {
    struct options options;
    struct boot boot;
    struct pattern pattern;
    u64 chosen_chunks, idle_chunks, memory_chunks;
    struct cursor work, idle, verify;
    u64 pass;
    u64 tsc_hz, start, last_tick, ticks;
    u64 pages_checked, errors, lost_lines, worst;
    u64 credit_at, work_credit, idle_credit;
    u32 paused, verifying;
    u64 verified_pages, verified_errors;
} guest;

// ---- which pages -------------------------------------------------------------

static u64 chunk_address(u64 chunk)
{
    for (u32 i = 0; i < guest.boot.range_count; i++) {
        u64 chunks = (guest.boot.ranges[i].end - guest.boot.ranges[i].start) / CHUNK_BYTES;
        if (chunk < chunks)
            return guest.boot.ranges[i].start + chunk * CHUNK_BYTES;
        chunk -= chunks;
    }
    refuse("chunk_out_of_range", "");
}

// The chosen chunks alternate between the two sets in the ratio of their sizes.
static u32 slot_is_idle(u64 slot)
{
    return (slot + 1) * guest.idle_chunks / guest.chosen_chunks != slot * guest.idle_chunks / guest.chosen_chunks;
}

static void cursor_enter_chunk(struct cursor *cursor)
{
    while (slot_is_idle(cursor->slot) != cursor->idle)
        cursor->slot++;
    u64 slot = cursor->slot++;
    u64 chunk = guest.options.spread ? slot * guest.memory_chunks / guest.chosen_chunks : slot;
    cursor->address = chunk_address(chunk);
    cursor->page = 0;
}

static struct cursor cursor_at_start(u32 idle)
{
    struct cursor cursor = {.idle = idle, .chunks = guest.chosen_chunks - guest.idle_chunks};
    if (idle)
        cursor.chunks = guest.idle_chunks;
    if (cursor.chunks)
        cursor_enter_chunk(&cursor);
    return cursor;
}

static u64 cursor_address(const struct cursor *cursor)
{
    return cursor->address + (u64)cursor->page * PAGE_BYTES;
}

static u64 cursor_position(const struct cursor *cursor)
{
    return cursor->chunk * CHUNK_PAGES + cursor->page;
}

// Moves to the next page; after the last one returns 0 and begins again.
static u32 cursor_advance(struct cursor *cursor)
{
    if (++cursor->page < CHUNK_PAGES)
        return 1;
    if (++cursor->chunk < cursor->chunks) {
        cursor_enter_chunk(cursor);
        return 1;
    }
    *cursor = cursor_at_start(cursor->idle);
    return 0;
}

static void choose_memory(void)
{
    struct range *ranges = guest.boot.ranges;
    u32 kept = 0;
    for (u32 i = 0; i < guest.boot.range_count; i++) {
        u64 start = ranges[i].start < FIRST_FREE ? FIRST_FREE : ranges[i].start;
        start = (start + CHUNK_BYTES - 1) & ~(u64)(CHUNK_BYTES - 1);
        u64 end = ranges[i].end & ~(u64)(CHUNK_BYTES - 1);
        if (start < end)
            ranges[kept++] = (struct range){start, end};
    }
    guest.boot.range_count = kept;
    for (u32 i = 0; i < kept; i++) {
        guest.memory_chunks += (ranges[i].end - ranges[i].start) / CHUNK_BYTES;
        for (u32 j = 0; j < i; j++)
            if (ranges[i].start < ranges[j].end && ranges[j].start < ranges[i].end)
                refuse("ranges_overlap", "");
    }
    guest.idle_chunks = guest.options.touch_mib;
    guest.chosen_chunks = guest.options.mib + guest.options.touch_mib;
    if (guest.chosen_chunks > guest.memory_chunks)
        refuse("not_enough_memory", "");
    for (u32 i = 0; i < kept; i++)
        if (!map_range(ranges[i].start, ranges[i].end))
            refuse("address_above_512_GiB", "");
}

// ---- checking ----------------------------------------------------------------

static void report_lost(u64 address, u64 pass)
{
    guest.errors++;
    if (guest.lost_lines++ >= MAX_LOST_LINES)
        return;
    struct difference found = pattern_difference(&guest.pattern, address, pass);
    struct text text = text_new("LOST");
    text_word(&text, "set", pass == IDLE_PASS ? "idle" : "work");
    text_word(&text, "kind", found.kind);
    text_hex(&text, "page", address / PAGE_BYTES);
    text_hex(&text, "offset", found.first * 8);
    text_hex(&text, "want", found.want);
    text_hex(&text, "have", found.have);
    text_decimal(&text, "words", found.words);
    text_decimal(&text, "pass", pass == IDLE_PASS ? 0 : pass);
    text_decimal(&text, "age", found.age);
    text_print(&text);
}

static u32 check(u64 address, u64 pass)
{
    guest.pages_checked++;
    if (pattern_holds(&guest.pattern, address, pass))
        return 1;
    report_lost(address, pass);
    return 0;
}

static void note_time(u64 since)
{
    u64 took = read_tsc() - since;
    if (took > guest.worst)
        guest.worst = took;
}

static void work_on_page(void)
{
    u64 start = read_tsc(), address = cursor_address(&guest.work);
    check(address, guest.pass - 1);
    pattern_write(&guest.pattern, address, guest.pass);
    if (!cursor_advance(&guest.work))
        guest.pass++;
    note_time(start);
}

static void check_idle_page(void)
{
    u64 start = read_tsc();
    check(cursor_address(&guest.idle), IDLE_PASS);
    cursor_advance(&guest.idle);
    note_time(start);
}

static void verify_end(void)
{
    struct text text = text_new("VERIFIED");
    text_decimal(&text, "pages", guest.verified_pages);
    text_decimal(&text, "errors", guest.verified_errors);
    text_print(&text);
    guest.verifying = 0;
}

static void verify_page(void)
{
    struct cursor *cursor = &guest.verify;
    if (cursor->chunks) {
        u64 pass = IDLE_PASS;
        if (!cursor->idle)
            pass = cursor_position(cursor) < cursor_position(&guest.work) ? guest.pass : guest.pass - 1;
        guest.verified_pages++;
        if (!check(cursor_address(cursor), pass))
            guest.verified_errors++;
        if (cursor_advance(cursor))
            return;
    }
    if (cursor->idle)
        verify_end();
    else
        *cursor = cursor_at_start(1);
}

// ---- time, ticks, commands ---------------------------------------------------

static u64 microseconds(u64 tsc)
{
    return tsc / guest.tsc_hz * 1000000 + tsc % guest.tsc_hz * 1000000 / guest.tsc_hz;
}

static void tick(u64 now)
{
    struct text text = text_new("TICK");
    text_decimal(&text, "n", guest.ticks++);
    text_decimal(&text, "pass", guest.pass);
    text_decimal(&text, "pages_checked", guest.pages_checked);
    text_decimal(&text, "errors", guest.errors);
    text_decimal(&text, "tsc", now);
    text_decimal(&text, "us", microseconds(now - guest.start));
    text_decimal(&text, "worst_us", microseconds(guest.worst));
    text_print(&text);
    guest.last_tick = now;
    guest.worst = 0;
}

static void answer(const char *word)
{
    struct text text = text_new(word);
    text_decimal(&text, "pass", guest.pass);
    text_print(&text);
}

static void obey(int command)
{
    if (command == 'v' && !guest.verifying) {
        guest.verifying = 1;
        guest.verified_pages = guest.verified_errors = 0;
        guest.verify = cursor_at_start(0);
    } else if (command == 'p') {
        guest.paused = 1;
        answer("PAUSED");
    } else if (command == 'r') {
        guest.paused = 0;
        answer("RESUMED");
    }
}

// Every 5 ms, since a look at the serial line costs an exit to the VMM.
static void look_at_serial_line(u64 now)
{
    static u64 last;
    if (now - last < guest.tsc_hz / 200)
        return;
    last = now;
    int command = serial_read();
    if (command >= 0)
        obey(command);
}

// Credit is counted in pages times tsc_hz, so that no rate is lost to rounding.
// A stop of the guest earns 20 ms of it at most; so does a clock that goes back.
static void earn_credit(u64 now)
{
    u64 most = guest.tsc_hz / 50, passed = now - guest.credit_at;
    guest.credit_at = now;
    if (passed > most)
        passed = most;
    u64 work_rate = guest.options.rate_mib * CHUNK_PAGES, idle_rate = guest.options.verify_rate_mib * CHUNK_PAGES;
    guest.work_credit += passed * work_rate;
    guest.idle_credit += passed * idle_rate;
    if (guest.work_credit > most * work_rate + guest.tsc_hz)
        guest.work_credit = most * work_rate + guest.tsc_hz;
    if (guest.idle_credit > most * idle_rate + guest.tsc_hz)
        guest.idle_credit = most * idle_rate + guest.tsc_hz;
}

// Up to SLICE_PAGES of each set; 0 when there was nothing to do.
static u32 work_a_slice(void)
{
    u32 worked = 0;
    for (u32 i = 0; i < SLICE_PAGES; i++) {
        if (guest.work.chunks && !guest.paused) {
            if (guest.options.rate_mib == 0) {
                work_on_page();
                worked = 1;
            } else if (guest.work_credit >= guest.tsc_hz) {
                guest.work_credit -= guest.tsc_hz;
                work_on_page();
                worked = 1;
            }
        }
        if (guest.idle.chunks && guest.idle_credit >= guest.tsc_hz) {
            guest.idle_credit -= guest.tsc_hz;
            check_idle_page();
            worked = 1;
        }
    }
    return worked;
}

_Noreturn static void run(void)
{
    const u64 tick_period = guest.options.tick_ms * (guest.tsc_hz / 1000);
    for (;;) {
        u64 now = read_tsc();
        if (now - guest.last_tick >= tick_period)
            tick(now);
        look_at_serial_line(now);
        earn_credit(now);
        if (guest.verifying) {
            for (u32 i = 0; i < SLICE_PAGES && guest.verifying; i++)
                verify_page();
        } else if (!work_a_slice()) {
            wait_for_timer();
        }
    }
}

// ---- start -------------------------------------------------------------------

static void fill(u32 idle, u64 pass)
{
    struct cursor cursor = cursor_at_start(idle);
    if (!cursor.chunks)
        return;
    do
        pattern_write(&guest.pattern, cursor_address(&cursor), pass);
    while (cursor_advance(&cursor));
}

static void boot_check(void)
{
    if (guest.boot.problem == COMMAND_LINE_TOO_LONG)
        refuse("command_line_too_long", "");
    if (guest.boot.problem == NO_MEMORY_MAP)
        refuse("no_memory_map", "");
}

_Noreturn void program(struct boot *boot)
{
    guest.boot = *boot;
    boot_check();
    guest.options = options_parse(&guest.boot);
    guest.pattern = (struct pattern){guest.options.fill, guest.options.seed};
    choose_memory();
    guest.tsc_hz = measure_tsc_hz();

    struct text text = text_new("BOOT");
    text_decimal(&text, "tsc_khz", guest.tsc_hz / 1000);
    text_decimal(&text, "memory_mib", guest.memory_chunks);
    text_print(&text);

    fill(0, 0);
    fill(1, IDLE_PASS);
    guest.pass = 1;
    guest.work = cursor_at_start(0);
    guest.idle = cursor_at_start(1);

    text = text_new("READY");
    text_decimal(&text, "work_pages", guest.work.chunks * CHUNK_PAGES);
    text_decimal(&text, "idle_pages", guest.idle.chunks * CHUNK_PAGES);
    text_print(&text);
    guest.start = guest.last_tick = guest.credit_at = read_tsc();
    run();
}
