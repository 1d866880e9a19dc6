#include "pattern.h"

enum stream_kind { RANDOM, STAMP, ZERO };

struct stream {
    enum stream_kind kind;
    u64 state;
};

static u64 mix(u64 value)
{
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
    value = (value ^ value >> 27) * 0x94d049bb133111eb;
    return value ^ value >> 31;
}

static struct stream stream_of(const struct pattern *pattern, u64 address, u64 pass)
{
    u64 frame = address / PAGE_BYTES;
    u64 state = mix(mix(pattern->seed + frame * 0x9e3779b97f4a7c15) + pass);
    enum stream_kind kind = STAMP;
    if (pass == IDLE_PASS || pattern->fill == FILL_RANDOM)
        kind = RANDOM;
    else if (pattern->fill == FILL_ZERO && (frame + pass) % 2 == 0)
        kind = ZERO;
    // A random stream that begins at zero would stay there.
    return (struct stream){kind, state ? state : 1};
}

__attribute__((always_inline)) static inline u64 next(enum stream_kind kind, u64 *state)
{
    u64 value = *state;
    if (kind == ZERO)
        return 0;
    if (kind == STAMP) {
        *state = value + 0x9e3779b97f4a7c15;
        return value;
    }
    value ^= value << 13;
    value ^= value >> 7;
    value ^= value << 17;
    *state = value;
    return value;
}

__attribute__((always_inline)) static inline void write_words(u64 *words, enum stream_kind kind, u64 state)
{
    for (u32 i = 0; i < PAGE_WORDS; i++)
        words[i] = next(kind, &state);
}

__attribute__((always_inline)) static inline u64 compare_words(const u64 *words, enum stream_kind kind,
                                                               u64 state)
{
    u64 wrong = 0;
    for (u32 i = 0; i < PAGE_WORDS; i++)
        wrong |= words[i] ^ next(kind, &state);
    return wrong;
}

void pattern_write(const struct pattern *pattern, u64 address, u64 pass)
{
    struct stream stream = stream_of(pattern, address, pass);
    u64 *words = (u64 *)address;
    __asm__ volatile("" : : : "memory");
    if (stream.kind == RANDOM)
        write_words(words, RANDOM, stream.state);
    else if (stream.kind == STAMP)
        write_words(words, STAMP, stream.state);
    else
        write_words(words, ZERO, stream.state);
    __asm__ volatile("" : : : "memory");
}

u32 pattern_holds(const struct pattern *pattern, u64 address, u64 pass)
{
    struct stream stream = stream_of(pattern, address, pass);
    const u64 *words = (const u64 *)address;
    __asm__ volatile("" : : : "memory");
    if (stream.kind == RANDOM)
        return compare_words(words, RANDOM, stream.state) == 0;
    if (stream.kind == STAMP)
        return compare_words(words, STAMP, stream.state) == 0;
    return compare_words(words, ZERO, stream.state) == 0;
}

struct difference pattern_difference(const struct pattern *pattern, u64 address, u64 pass)
{
    enum { OLDER = 8 };
    const volatile u64 *words = (const volatile u64 *)address;
    struct stream wanted = stream_of(pattern, address, pass), older[OLDER];
    u32 ages = pass == IDLE_PASS ? 0 : pass < OLDER ? (u32)pass : (u32)OLDER;
    for (u32 age = 0; age < ages; age++)
        older[age] = stream_of(pattern, address, pass - 1 - age);

    struct difference found = {.kind = "foreign"};
    // One bit an age: the whole page is of that pass; every wrong word is of some older pass.
    u32 whole = (1u << ages) - 1, all_older = 1, all_zero = 1;
    for (u32 i = 0; i < PAGE_WORDS; i++) {
        u64 have = words[i], want = next(wanted.kind, &wanted.state);
        u32 matches = 0;
        for (u32 age = 0; age < ages; age++)
            if (next(older[age].kind, &older[age].state) == have)
                matches |= 1u << age;
        whole &= matches;
        if (have != 0)
            all_zero = 0;
        if (have == want)
            continue;
        if (!matches)
            all_older = 0;
        if (found.words++ == 0) {
            found.first = i;
            found.want = want;
            found.have = have;
        }
    }
    if (whole) {
        found.kind = "stale";
        found.age = 1 + (u64)__builtin_ctz(whole);
    } else if (all_zero) {
        found.kind = "zero";
    } else if (all_older) {
        found.kind = "torn";
    }
    return found;
}
