/*
 * Programs to inject system calls into. Each does one thing that an injection could spoil, checks
 * it itself, and exits with 0 if all was as it should be; else it says what was wrong.
 *
 *     target MODE
 *
 * "ready" on standard output: go ahead. A byte on, or the end of, standard input: finish.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define EXPECT(condition)                                                                        \
    do {                                                                                         \
        if (!(condition)) {                                                                      \
            fprintf(stderr, "%s:%d: not so: %s (errno %d)\n", __func__, __LINE__, #condition,    \
                    errno);                                                                      \
            exit(1);                                                                             \
        }                                                                                        \
    } while (0)

static const long SLEEP_S = 3;

static void ready(void)
{
    puts("ready");
    fflush(stdout);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static int count_fds(void)
{
    int n = 0;
    DIR *dir = opendir("/proc/self/fd");
    while (readdir(dir))
        n++;
    closedir(dir);
    return n;
}

static int finishing(void)
{
    struct pollfd in = { .fd = 0, .events = POLLIN };
    return poll(&in, 1, 0) > 0;
}

/* ---- calls that block ---------------------------------------------------------------------- */

static void mode_read(void)
{
    char byte = 0;
    ready();
    EXPECT(syscall(SYS_read, 0, &byte, 1) == 1);
    EXPECT(byte == 'x');
}

/* Prints how long it slept: who attaches knows how much longer a sleep begun anew would be. */
static void report_sleep(double began)
{
    printf("%f\n", now() - began);
    EXPECT(now() - began >= SLEEP_S);
}

static void mode_nanosleep(void)
{
    struct timespec t = { .tv_sec = SLEEP_S };
    double began = now();
    ready();
    EXPECT(syscall(SYS_nanosleep, &t, NULL) == 0);
    report_sleep(began);
}

static void mode_clock_nanosleep(void)
{
    struct timespec t = { .tv_sec = SLEEP_S };
    double began = now();
    ready();
    EXPECT(syscall(SYS_clock_nanosleep, CLOCK_BOOTTIME, 0, &t, NULL) == 0);
    report_sleep(began);
}

static void mode_poll(void)
{
    double began = now();
    ready();
    EXPECT(syscall(SYS_poll, NULL, 0, SLEEP_S * 1000) == 0);
    report_sleep(began);
}

static void mode_ppoll(void)
{
    struct timespec t = { .tv_sec = SLEEP_S };
    double began = now();
    ready();
    EXPECT(syscall(SYS_ppoll, NULL, 0, &t, NULL, 8) == 0);
    report_sleep(began);
}

static void mode_futex_timeout(void)
{
    struct timespec t = { .tv_sec = SLEEP_S };
    int word = 0;
    double began = now();
    ready();
    EXPECT(syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &t, NULL, 0) == -1);
    EXPECT(errno == ETIMEDOUT);
    report_sleep(began);
}

static int futex_word;

static void *futex_waker(void *unused)
{
    char byte;
    EXPECT(read(0, &byte, 1) == 1);
    __atomic_store_n(&futex_word, 1, __ATOMIC_SEQ_CST);
    EXPECT(syscall(SYS_futex, &futex_word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0) == 1);
    return unused;
}

static void mode_futex(void)
{
    pthread_t waker;
    EXPECT(pthread_create(&waker, NULL, futex_waker, NULL) == 0);
    ready();
    EXPECT(syscall(SYS_futex, &futex_word, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0) == 0);
    EXPECT(futex_word == 1);
    pthread_join(waker, NULL);
}

/* ---- signals ------------------------------------------------------------------------------- */

static volatile sig_atomic_t handled, ticks, disorder;

static void on_signal(int signo)
{
    (void)signo;
    handled++;
}

/* The mask that ppoll sets for its own duration: SIGUSR1 can come only during the call. */
static void mode_ppoll_mask(void)
{
    sigset_t usr1, none;
    struct sigaction act = { .sa_handler = on_signal };
    sigemptyset(&none);
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    sigaction(SIGUSR1, &act, NULL);
    sigprocmask(SIG_BLOCK, &usr1, NULL);
    ready();
    EXPECT(ppoll(NULL, 0, NULL, &none) == -1 && errno == EINTR);
    EXPECT(handled == 1);
    sigprocmask(SIG_BLOCK, NULL, &none);
    EXPECT(sigismember(&none, SIGUSR1) == 1);
    sigprocmask(SIG_UNBLOCK, &usr1, NULL);
}

static void on_queued(int signo, siginfo_t *info, void *context)
{
    (void)signo, (void)context;
    if (info->si_value.sival_int != handled)
        disorder++;
    handled++;
}

static void on_tick(int signo)
{
    (void)signo;
    ticks++;
}

/* A child queues a numbered signal each millisecond: all must come, in order. */
static void mode_signals(void)
{
    struct sigaction queued = { .sa_sigaction = on_queued, .sa_flags = SA_SIGINFO | SA_RESTART };
    struct sigaction tick = { .sa_handler = on_tick, .sa_flags = SA_RESTART };
    struct itimerval every_ms = { { 0, 1000 }, { 0, 1000 } }, never = { 0 };
    int sent = -1, pipefd[2];
    sigaction(SIGRTMIN, &queued, NULL);
    sigaction(SIGALRM, &tick, NULL);
    EXPECT(pipe(pipefd) == 0);
    pid_t child = fork();
    if (child == 0) {
        union sigval number = { .sival_int = 0 };
        while (!finishing()) {
            if (sigqueue(getppid(), SIGRTMIN, number) == 0)
                number.sival_int++;
            usleep(1000);
        }
        _exit(write(pipefd[1], &number.sival_int, sizeof(int)) != sizeof(int));
    }
    setitimer(ITIMER_REAL, &every_ms, NULL);
    ready();
    EXPECT(read(pipefd[0], &sent, sizeof(sent)) == sizeof(sent));
    setitimer(ITIMER_REAL, &never, NULL);
    EXPECT(waitpid(child, NULL, 0) == child);
    EXPECT(sent > 100 && handled == sent && !disorder);
    EXPECT(ticks > 100);
    close(pipefd[0]);
    close(pipefd[1]);
}

/* ---- computing ----------------------------------------------------------------------------- */

typedef double vector __attribute__((vector_size(32)));

/* Integer, vector and x87 registers are all in use for the whole of it. */
static uint64_t checksum(void)
{
    vector v = { 1.0, 2.0, 3.0, 4.0 }, w = { 0.5, 0.25, 0.125, 0.0625 };
    long double x = 1.0L;
    uint64_t a = 1, b = 2, c = 3, d = 5;
    for (int i = 0; i < 300000; i++) {
        v = v * w + (vector){ 1.5, 2.5, 3.5, 4.5 };
        x = x * 1.0000001L + 0.3L;
        a = a * 6364136223846793005u + b;
        b ^= a >> 17;
        c += b * d;
        d = (d << 13 | d >> 51) ^ c;
    }
    double sum = v[0] + v[1] + v[2] + v[3] + (double)x;
    uint64_t bits;
    memcpy(&bits, &sum, sizeof(bits));
    return bits ^ a ^ b ^ c ^ d;
}

static void mode_compute(void)
{
    uint64_t expected = checksum();
    ready();
    do
        EXPECT(checksum() == expected);
    while (!finishing());
}

/*
 * A restartable sequence that ends only by being aborted. An injection has to abort it; if it
 * does not, the kernel has forgotten the sequence, nothing will ever abort it, and this hangs.
 */
static void mode_rseq(void)
{
    struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
    EXPECT(__rseq_size >= 20);
    ready();
    do {
        __asm__ goto(
            ".pushsection .data.rseq, \"aw\"\n\t"
            ".balign 32\n"
            "9:\n\t"
            ".long 0, 0\n\t"
            ".quad 1f, 2f - 1f, 4f\n\t"
            ".popsection\n\t"
            "leaq 9b(%%rip), %%rax\n\t"
            "movq %%rax, %0\n"
            "1:\n\t"
            "pause\n\t"
            "jmp 1b\n"
            "2:\n\t"
            "jmp %l[committed]\n\t"
            ".long 0x53053053\n" /* RSEQ_SIG: must stand before the abort address */
            "4:\n\t"
            "jmp %l[aborted]\n\t"
            : : "m"(area->rseq_cs) : "rax", "memory" : committed, aborted);
    committed:
        EXPECT(0);
    aborted:;
    } while (!finishing());
}

/* ---- states of a process ------------------------------------------------------------------- */

/* The parent of vfork waits in a way that only the child's end, or SIGKILL, ends. */
static void mode_vfork(void)
{
    ready();
    pid_t child = vfork();
    if (child == 0) {
        char byte;
        _exit(syscall(SYS_read, 0, &byte, 1) != 1);
    }
    int status = -1;
    EXPECT(waitpid(child, &status, 0) == child && status == 0);
}

/* A seccomp filter that kills for userfaultfd. */
static void mode_seccomp(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { sizeof(code) / sizeof(code[0]), code };
    EXPECT(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    EXPECT(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
    mode_read();
}

static const struct {
    const char *name;
    void (*run)(void);
} modes[] = {
    { "read", mode_read },
    { "nanosleep", mode_nanosleep },
    { "clock_nanosleep", mode_clock_nanosleep },
    { "poll", mode_poll },
    { "ppoll", mode_ppoll },
    { "futex_timeout", mode_futex_timeout },
    { "futex", mode_futex },
    { "ppoll_mask", mode_ppoll_mask },
    { "signals", mode_signals },
    { "compute", mode_compute },
    { "rseq", mode_rseq },
    { "vfork", mode_vfork },
    { "seccomp", mode_seccomp },
};

int main(int argc, char **argv)
{
    sigset_t before, after;
    for (size_t i = 0; argc == 2 && i < sizeof(modes) / sizeof(modes[0]); i++) {
        if (strcmp(argv[1], modes[i].name))
            continue;
        int fds = count_fds();
        sigprocmask(SIG_BLOCK, NULL, &before);
        modes[i].run();
        sigprocmask(SIG_BLOCK, NULL, &after);
        EXPECT(memcmp(&before, &after, 8) == 0);
        EXPECT(count_fds() == fds);
        return 0;
    }
    fprintf(stderr, "usage: target MODE\n");
    return 2;
}
