/* A file system that refuses: of all calls of this process that write below a folder, one fails.
 *
 *     LD_PRELOAD=refuse.so REFUSE_BELOW=/runs/x REFUSE_CALL=17 REFUSE_ERRNO=28 python -m mpilm.train ...
 *
 * From that call on every one fails, as on a disk that is full. REFUSE_COUNT=FILE writes down how many there were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_long calls;

static int below(const char *path) {
    const char *folder = getenv("REFUSE_BELOW");
    return folder && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int refused(const char *path) {
    if (!below(path)) return 0;
    long number = atomic_fetch_add(&calls, 1) + 1;
    const char *call = getenv("REFUSE_CALL"), *count = getenv("REFUSE_COUNT");
    if (count) {
        int (*open_)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
        int file = open_(count, O_WRONLY | O_CREAT | O_TRUNC, 0666);
        dprintf(file, "%ld", number);
        close(file);
    }
    if (!call || number < atol(call)) return 0;
    errno = atoi(getenv("REFUSE_ERRNO"));
    return 1;
}

static int refused_fd(int fd) {
    char link[64], path[PATH_MAX + 1];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX);
    if (length < 0) return 0;
    path[length] = 0;
    return refused(path);
}

#define NEXT(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t n) { return refused_fd(fd) ? -1 : NEXT(write)(fd, data, n); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return refused_fd(fd) ? -1 : NEXT(pwrite)(fd, data, n, at); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) { return refused_fd(fd) ? -1 : NEXT(pwrite64)(fd, data, n, at); }
int fsync(int fd) { return refused_fd(fd) ? -1 : NEXT(fsync)(fd); }
int ftruncate(int fd, off_t n) { return refused_fd(fd) ? -1 : NEXT(ftruncate)(fd, n); }
int ftruncate64(int fd, off64_t n) { return refused_fd(fd) ? -1 : NEXT(ftruncate64)(fd, n); }
int posix_fallocate(int fd, off_t at, off_t n) { return refused_fd(fd) ? errno : NEXT(posix_fallocate)(fd, at, n); }
int posix_fallocate64(int fd, off64_t at, off64_t n) { return refused_fd(fd) ? errno : NEXT(posix_fallocate64)(fd, at, n); }
int rename(const char *from, const char *to) { return refused(to) ? -1 : NEXT(rename)(from, to); }
int mkdir(const char *path, mode_t mode) { return refused(path) ? -1 : NEXT(mkdir)(path, mode); }

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    if ((flags & O_CREAT) && refused(path)) return -1;
    return NEXT(open)(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    if ((flags & O_CREAT) && refused(path)) return -1;
    return NEXT(open64)(path, flags, mode);
}
