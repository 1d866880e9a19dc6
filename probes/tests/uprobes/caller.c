/* Registers and deregisters through the stand-in: a known number of times, from several threads. Says of each
 * registration how long it took, from outside and from inside. Waits for a line before it begins and before it ends. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

struct ibv_mr {
    void *context, *pd, *addr;
    size_t length;
    uint32_t handle, lkey, rkey;
};

struct ibv_mr *ibv_reg_mr(void *pd, void *addr, size_t length, int access);
struct ibv_mr *ibv_reg_mr_iova(void *pd, void *addr, size_t length, uint64_t iova, int access);
struct ibv_mr *ibv_reg_mr_iova2(void *pd, void *addr, size_t length, uint64_t iova, unsigned access);
int ibv_dereg_mr(struct ibv_mr *mr);
uint64_t standin_last_inner_ns(void);

static const size_t sizes[] = { 4096, 65536, 1 << 20, 4 << 20 };

static void require(int holds)
{
    if (!holds)
        abort();
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static void *memory(size_t bytes)
{
    void *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    require(start != MAP_FAILED);
    return start;
}

static struct ibv_mr *timed(int way, void *addr, size_t bytes, int error)
{
    uint64_t start_ns = now_ns(), outer_ns;
    struct ibv_mr *mr;

    switch (way % 3) {
    case 0:
        mr = ibv_reg_mr(NULL, addr, bytes, error);
        break;
    case 1:
        mr = ibv_reg_mr_iova(NULL, addr, bytes, 0, error);
        break;
    default:
        mr = ibv_reg_mr_iova2(NULL, addr, bytes, 0, error);
    }
    outer_ns = now_ns() - start_ns;
    printf("%zu %llu %llu\n", bytes, (unsigned long long)standin_last_inner_ns(), (unsigned long long)outer_ns);
    return mr;
}

static void *work(void *unused)
{
    void *small = memory(8192);
    struct ibv_mr *mr;

    for (unsigned size = 0; size < sizeof(sizes) / sizeof(*sizes); size++) {
        for (int turn = 0; turn < 20; turn++) {
            void *addr = memory(sizes[size]);
            mr = timed(turn, addr, sizes[size], 0);
            require(mr && !ibv_dereg_mr(mr));
            munmap(addr, sizes[size]);
        }
    }
    for (int turn = 0; turn < 5; turn++)
        require(!timed(turn, small, 8192, ENOMEM));
    for (int turn = 0; turn < 2; turn++)
        require(!timed(turn, small, 8192, EFAULT));
    /* One that is in use is not released, and then is. */
    mr = timed(0, small, 8192, 0);
    require(mr != NULL);
    mr->handle = EBUSY;
    require(ibv_dereg_mr(mr) == EBUSY);
    mr->handle = 0;
    require(!ibv_dereg_mr(mr));
    return unused;
}

int main(void)
{
    struct ibv_mr *early = ibv_reg_mr(NULL, memory(16 << 20), 16 << 20, 0);
    pthread_t threads[3];
    char line[16];

    require(early != NULL);
    puts("ready");
    fflush(stdout);
    require(fgets(line, sizeof(line), stdin) != NULL);
    for (int i = 0; i < 3; i++)
        require(!pthread_create(&threads[i], NULL, work, NULL));
    for (int i = 0; i < 3; i++)
        require(!pthread_join(threads[i], NULL));
    require(!ibv_dereg_mr(early));
    puts("done");
    fflush(stdout);
    require(fgets(line, sizeof(line), stdin) != NULL);
    return 0;
}
