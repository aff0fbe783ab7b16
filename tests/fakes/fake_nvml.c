/* A libnvidia-ml.so.1 for tests, with the ABI of NVIDIA's nvml.h: the part of it that the agent calls through pynvml.
 *
 * Each call first reads the file that FAKE_NVML names. Its lines:
 *   gpus N            how many GPUs there are
 *   used MIB          memory in use on each, of 23034 MiB
 *   error FUNCTION N  the function returns this code ("error FUNCTION N GPU" for one GPU only)
 *   hang FUNCTION     the function returns only when the line is gone
 *   servers FOLDER    in use as well: for each running process the MiB that the file with its pid says
 */
#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_FOUND = 6 };
enum { MOST_GPUS = 8 };
static int handles[MOST_GPUS];

static FILE *state(void) {
    const char *path = getenv("FAKE_NVML");
    return path ? fopen(path, "r") : NULL;
}

static long value(const char *name) {
    char line[256], key[64];
    long found = 0, number;
    FILE *file = state();
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "%63s %ld", key, &number) == 2 && !strcmp(key, name)) found = number;
    if (file) fclose(file);
    return found;
}

static long used_by_servers(void) {
    char line[512], folder[256] = "", path[600];
    long sum = 0, mib;
    FILE *file = state();
    while (file && fgets(line, sizeof line, file)) sscanf(line, "servers %255s", folder);
    if (file) fclose(file);
    DIR *open = *folder ? opendir(folder) : NULL;
    for (struct dirent *entry; open && (entry = readdir(open));) {
        int pid = atoi(entry->d_name);
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        if (pid <= 0 || kill(pid, 0) || !(file = fopen(path, "r"))) continue;
        if (fscanf(file, "%ld", &mib) == 1) sum += mib;
        fclose(file);
    }
    if (open) closedir(open);
    return sum;
}

static int hangs(const char *function) {
    char line[256], name[64];
    int found = 0;
    FILE *file = state();
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "hang %63s", name) == 1 && !strcmp(name, function)) found = 1;
    if (file) fclose(file);
    return found;
}

static int called(const char *function, int gpu) {
    char line[256], name[64];
    int code, only, fields, result = SUCCESS;
    while (hangs(function)) usleep(20000);
    FILE *file = state();
    while (file && fgets(line, sizeof line, file)) {
        fields = sscanf(line, "error %63s %d %d", name, &code, &only);
        if (fields >= 2 && !strcmp(name, function) && (fields == 2 || only == gpu)) result = code;
    }
    if (file) fclose(file);
    return result;
}

static int number_of(void *handle) { return (int)((int *)handle - handles); }
#define CALLED(handle) do { int code = called(__func__, handle); if (code) return code; } while (0)
#define CALLED_ON(handle) CALLED(number_of(handle))

static void write_uuid(int gpu, char *text, unsigned size) {
    snprintf(text, size, "GPU-%08x-94ff-d352-a59b-d0ee00aeed43", 0xc7b57be0u + gpu);
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; CALLED(-1); return SUCCESS; }
int nvmlShutdown(void) { CALLED(-1); return SUCCESS; }

const char *nvmlErrorString(int code) {
    static char text[64];
    snprintf(text, sizeof text, "fake error %d", code);
    return text;
}

int nvmlDeviceGetCount_v2(unsigned *count) { CALLED(-1); *count = (unsigned)value("gpus"); return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    CALLED((int)index);
    if (index >= (unsigned)value("gpus")) return INVALID_ARGUMENT;
    *handle = &handles[index];
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    char known[96];
    for (int gpu = 0; gpu < value("gpus") && gpu < MOST_GPUS; gpu++) {
        write_uuid(gpu, known, sizeof known);
        if (strcmp(known, uuid)) continue;
        CALLED(gpu);
        *handle = &handles[gpu];
        return SUCCESS;
    }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(void *handle, char *text, unsigned size) {
    CALLED_ON(handle);
    write_uuid(number_of(handle), text, size);
    return SUCCESS;
}

int nvmlDeviceGetName(void *handle, char *text, unsigned size) {
    CALLED_ON(handle);
    snprintf(text, size, "NVIDIA L4");
    return SUCCESS;
}

struct memory { unsigned long long total, free, used; };

int nvmlDeviceGetMemoryInfo(void *handle, struct memory *memory) {
    CALLED_ON(handle);
    memory->total = 23034ULL << 20;
    memory->used = (unsigned long long)(value("used") + used_by_servers()) << 20;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

struct utilization { unsigned gpu, memory; };

int nvmlDeviceGetUtilizationRates(void *handle, struct utilization *rates) {
    CALLED_ON(handle);
    rates->gpu = 37;
    rates->memory = 12;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *celsius) {
    CALLED_ON(handle);
    if (sensor != 0) return INVALID_ARGUMENT;
    *celsius = 41;
    return SUCCESS;
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) {
    CALLED_ON(handle);
    *milliwatts = 16540;
    return SUCCESS;
}

struct pci { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; };

int nvmlDeviceGetPciInfo_v3(void *handle, struct pci *pci) {
    CALLED_ON(handle);
    memset(pci, 0, sizeof *pci);
    pci->bus = 0xd1 + (unsigned)number_of(handle);
    snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", pci->bus);
    return SUCCESS;
}
