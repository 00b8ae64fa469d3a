/*
 * A process whose memory is tracked. It maps a file that it inherits as QEMU maps a RAM block, shared
 * and whole, and does to it what it is told to, one command a line on standard input:
 *
 *     store FIRST COUNT STEP BYTE   one byte into each page, by the processor
 *     load FIRST COUNT STEP         read each page
 *     hammer KIND THREADS           threads that do the same thing to random pages from now on:
 *                                   add, add_slowly, copy, flip, look, punch
 *     looked                        the answer is how often a thread that looks has by now
 *     rest                          end these threads; the answer is what they added in total
 *     call NAME ARGUMENT...         a system call of the main thread; the answer is what it
 *                                   returned, or -errno
 *     pin FIRST COUNT               pin pages for writing, as a device's driver does: they become
 *                                   a registered buffer of an io_uring
 *     dma FILE_DESCRIPTOR PAGE      read the first page of a file into a pinned page, through the
 *                                   pin; the answer is what read(2) would return
 *     begin_read FILE_DESCRIPTOR FIRST COUNT OFFSET
 *                                   a thread that reads from a file into pages; answered before
 *                                   that is done
 *     end_read                      wait for that thread; the answer is what it read, or -errno
 *     fork                          a child that does one command after the other as this process
 *                                   does, but commands for it begin with "child"
 *
 * Each is answered by a line when it is done. The first line, before any command, is the address
 * of the mapping. It ends when its standard input does.
 *
 *     tracked FILE_DESCRIPTOR SIZE PAGE_SIZE
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MAX_THREADS = 16, WORD = sizeof(uint64_t) };

static int ram_fd;
static unsigned char *ram;
static size_t size, page_size, npages;

static pthread_t threads[MAX_THREADS];
static int nthreads;
static atomic_bool resting;
static atomic_ulong added, looks;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static uint64_t random_number(uint64_t *state) /* xorshift64* */
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 2685821657736338717u;
}

static unsigned char *random_page(uint64_t *state)
{
    return ram + random_number(state) % npages * page_size;
}

static void *add_every(unsigned microseconds, uint64_t state)
{
    unsigned long n = 0;
    for (; !resting; n++) {
        _Atomic uint64_t *word = (void *)(random_page(&state) +
                                          random_number(&state) % (page_size / WORD) * WORD);
        atomic_fetch_add_explicit(word, 1, memory_order_relaxed);
        if (microseconds)
            usleep(microseconds);
    }
    added += n;
    return NULL;
}

static void *add(void *seed)
{
    return add_every(0, (uintptr_t)seed);
}

static void *add_slowly(void *seed) /* so that most pages are not written again soon */
{
    return add_every(50, (uintptr_t)seed);
}

static void *flip(void *seed) /* one byte of each page, back and forth between two values */
{
    uint64_t state = (uintptr_t)seed;
    while (!resting)
        *(volatile unsigned char *)random_page(&state) = random_number(&state) & 1;
    return NULL;
}

static void *look(void *seed) /* reads, and writes nowhere in the memory */
{
    uint64_t state = (uintptr_t)seed;
    for (; !resting; looks++)
        (void)*(volatile unsigned char *)random_page(&state);
    return NULL;
}

static void *copy(void *seed) /* the kernel writes: copy_to_user */
{
    uint64_t state = (uintptr_t)seed;
    int fd = open("/proc/self/exe", O_RDONLY);
    if (fd < 0)
        die("open");
    while (!resting) {
        size_t at = random_number(&state) % page_size;
        size_t n = random_number(&state) % (page_size - at) + 1;
        if (pread(fd, random_page(&state) + at, n, random_number(&state) % 8192) < 0)
            die("pread");
    }
    close(fd);
    return NULL;
}

static void *punch(void *seed)
{
    uint64_t state = (uintptr_t)seed;
    while (!resting) {
        off_t at = random_page(&state) - ram;
        if (fallocate(ram_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, page_size))
            die("fallocate");
    }
    return NULL;
}

static const struct {
    const char *name;
    void *(*run)(void *);
} kinds[] = {
    {"add", add}, {"add_slowly", add_slowly}, {"copy", copy}, {"flip", flip}, {"look", look},
    {"punch", punch},
};

static const struct {
    const char *name;
    long number;
} calls[] = {
    {"fallocate", SYS_fallocate}, {"ftruncate", SYS_ftruncate}, {"madvise", SYS_madvise},
    {"mmap", SYS_mmap},           {"mprotect", SYS_mprotect},   {"mremap", SYS_mremap},
    {"munmap", SYS_munmap},       {"pread", SYS_pread64},
};

static long hammer(const char *kind, int n)
{
    static uintptr_t seed = 88172645463325252u;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (!strcmp(kinds[i].name, kind)) {
            resting = false;
            for (; n > 0 && nthreads < MAX_THREADS; n--, seed += 7919)
                if (pthread_create(&threads[nthreads++], NULL, kinds[i].run, (void *)seed))
                    die("pthread_create");
            return 0;
        }
    return -ENOSYS;
}

static long rest(void)
{
    resting = true;
    while (nthreads)
        pthread_join(threads[--nthreads], NULL);
    return atomic_exchange(&added, 0);
}

static long call(const char *name, const char *arguments)
{
    unsigned long a[6] = {0};
    char *rest_of_them = (char *)arguments;
    for (int i = 0; i < 6; i++)
        a[i] = strtoul(rest_of_them, &rest_of_them, 0);
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++)
        if (!strcmp(calls[i].name, name)) {
            long result = syscall(calls[i].number, a[0], a[1], a[2], a[3], a[4], a[5]);
            return result == -1 ? -errno : result;
        }
    return -ENOSYS;
}

static int ring = -1;
static struct io_uring_params params;
static struct io_uring_sqe *submission;
static unsigned char *queues;

static long pin(size_t first, size_t count)
{
    struct iovec buffer = {ram + first * page_size, count * page_size};
    if (ring < 0) {
        ring = syscall(SYS_io_uring_setup, 1, &params);
        if (ring < 0)
            return -errno;
        int prot = PROT_READ | PROT_WRITE;
        submission = mmap(NULL, sizeof *submission, prot, MAP_SHARED, ring, IORING_OFF_SQES);
        size_t size_of_queues = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
        queues = mmap(NULL, size_of_queues, prot, MAP_SHARED, ring, IORING_OFF_SQ_RING);
        if (submission == MAP_FAILED || queues == MAP_FAILED)
            die("mmap of the ring");
    }
    long result = syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &buffer, 1);
    return result < 0 ? -errno : result;
}

static long dma(int fd, size_t page)
{
    uint32_t *tail = (void *)(queues + params.sq_off.tail);
    uint32_t *head = (void *)(queues + params.cq_off.head);
    uint32_t *slots = (void *)(queues + params.sq_off.array);
    struct io_uring_cqe *done = (void *)(queues + params.cq_off.cqes);
    *submission = (struct io_uring_sqe){
        .opcode = IORING_OP_READ_FIXED,
        .fd = fd,
        .addr = (uintptr_t)(ram + page * page_size),
        .len = page_size,
    };
    slots[*tail & (params.sq_entries - 1)] = 0;
    __atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
    if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) != 1)
        return -errno;
    long result = done[*head & (params.cq_entries - 1)].res;
    __atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
    return result;
}

static struct {
    pthread_t thread;
    int fd;
    void *to;
    size_t length;
    off_t offset;
    long result;
} reading;

static void *read_on(void *unused)
{
    ssize_t result = pread(reading.fd, reading.to, reading.length, reading.offset);
    reading.result = result < 0 ? -errno : result;
    return unused;
}

static long begin_read(int fd, size_t first, size_t count, off_t offset)
{
    reading.fd = fd;
    reading.to = ram + first * page_size;
    reading.length = count * page_size;
    reading.offset = offset;
    return -pthread_create(&reading.thread, NULL, read_on, NULL);
}

static long end_read(void)
{
    pthread_join(reading.thread, NULL);
    return reading.result;
}

static long do_command(char *line);

static FILE *to_child, *from_child;

static void serve(FILE *in, FILE *out)
{
    char line[512];
    while (fgets(line, sizeof line, in)) {
        fprintf(out, "%ld\n", do_command(line));
        fflush(out);
    }
}

static long fork_child(void)
{
    int down[2], up[2];
    if (pipe2(down, O_CLOEXEC) || pipe2(up, O_CLOEXEC))
        die("pipe2");
    pid_t pid = fork();
    if (pid < 0)
        die("fork");
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        close(down[1]);
        serve(fdopen(down[0], "r"), fdopen(up[1], "w"));
        _exit(0);
    }
    close(down[0]);
    close(up[1]);
    to_child = fdopen(down[1], "w");
    from_child = fdopen(up[0], "r");
    return pid;
}

static long tell_child(const char *line)
{
    long answer;
    fputs(line, to_child);
    fflush(to_child);
    if (fscanf(from_child, "%ld", &answer) != 1)
        die("the child");
    return answer;
}

static long do_command(char *line)
{
    char word[32];
    size_t first, count, step, offset;
    unsigned byte;
    int n;

    if (sscanf(line, "store %zu %zu %zu %u", &first, &count, &step, &byte) == 4) {
        for (; count; count--, first += step)
            *(volatile unsigned char *)(ram + first * page_size + first % page_size) = byte;
        return 0;
    }
    if (sscanf(line, "load %zu %zu %zu", &first, &count, &step) == 3) {
        for (; count; count--, first += step)
            (void)*(volatile unsigned char *)(ram + first * page_size);
        return 0;
    }
    if (sscanf(line, "hammer %31s %d", word, &n) == 2)
        return hammer(word, n);
    if (!strncmp(line, "looked", 6))
        return looks;
    if (!strncmp(line, "rest", 4))
        return rest();
    if (sscanf(line, "call %31s%n", word, &n) == 1)
        return call(word, line + n);
    if (sscanf(line, "pin %zu %zu", &first, &count) == 2)
        return pin(first, count);
    if (sscanf(line, "dma %d %zu", &n, &first) == 2)
        return dma(n, first);
    if (sscanf(line, "begin_read %d %zu %zu %zu", &n, &first, &count, &offset) == 4)
        return begin_read(n, first, count, offset);
    if (!strncmp(line, "end_read", 8))
        return end_read();
    if (!strncmp(line, "fork", 4))
        return fork_child();
    if (!strncmp(line, "child ", 6))
        return tell_child(line + 6);
    return -EINVAL;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    ram_fd = atoi(argv[1]);
    size = strtoul(argv[2], NULL, 0);
    page_size = strtoul(argv[3], NULL, 0);
    npages = size / page_size;
    ram = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, ram_fd, 0);
    if (ram == MAP_FAILED)
        die("mmap");
    printf("%lu\n", (unsigned long)ram);
    fflush(stdout);
    serve(stdin, stdout);
    return 0;
}
