/* A stand-in for the few functions of the CUDA runtime with which two processes share a GPU's memory:
 * the "GPU" is a file in the folder that the variable names. It holds the calls to their C types, which
 * Python's ctypes would not check. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct { char reserved[64]; } cudaIpcMemHandle_t;

#define MANY 16
static struct { void *at; size_t size; char name[64]; int imported; } known[MANY];

static void *map(const char *name, size_t size, int flags, int imported) {
  char path[512];
  snprintf(path, sizeof path, "%s/%s", getenv("CUDA_STAND_IN"), name);
  int file = open(path, O_RDWR | flags, 0600);
  if (file < 0) return NULL;
  struct stat found;
  if (size && ftruncate(file, (off_t)size)) return NULL;
  fstat(file, &found);
  void *at = mmap(NULL, (size_t)found.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  for (int i = 0; i < MANY; i++)
    if (!known[i].at) {
      known[i].at = at, known[i].size = (size_t)found.st_size, known[i].imported = imported;
      snprintf(known[i].name, sizeof known[i].name, "%s", name);
      return at;
    }
  return NULL;
}

static int drop(void *at, int imported) {
  for (int i = 0; i < MANY; i++)
    if (known[i].at == at && known[i].imported == imported) {
      munmap(at, known[i].size);
      known[i].at = NULL;
      return 0;
    }
  return 1;
}

int cudaMalloc(void **at, size_t size) {
  char name[64];
  if (size > (1u << 20)) return 2;
  snprintf(name, sizeof name, "memory-%d", (int)getpid());
  *at = map(name, size, O_CREAT, 0);
  return *at ? 0 : 2;
}

int cudaFree(void *at) { return drop(at, 0); }

int cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *at) {
  for (int i = 0; i < MANY; i++)
    if (known[i].at == at) {
      memset(handle, 0, sizeof *handle);
      strcpy(handle->reserved, known[i].name);
      return 0;
    }
  return 1;
}

int cudaIpcOpenMemHandle(void **at, cudaIpcMemHandle_t handle, unsigned flags) {
  if (flags != 1) return 1;
  *at = map(handle.reserved, 0, 0, 1);
  return *at ? 0 : 201;
}

int cudaIpcCloseMemHandle(void *at) { return drop(at, 1); }

int cudaGetLastError(void) { return 0; }

const char *cudaGetErrorString(int status) {
  return status == 2 ? "out of memory" : status == 201 ? "invalid device context" : "invalid argument";
}
