/* LIBLINEAR and LIBSVM called from C, without their programs' parsing of text.
 *
 * in_process linear|svm MODEL FEATURES SECONDS
 *
 * FEATURES: the number of images and of features (two 64-bit integers), then the features, row by
 * row, as doubles. Prints the least CPU time of a pass over 200 images, one call each, in
 * microseconds per image; then the answers to all. The inputs are brought into the libraries' own
 * sparse form before the clock starts. Prototypes are written out here, as the libraries' manuals
 * have them, so that no development packages are needed.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct node { int index; double value; };
struct model;
struct svm_model;
struct model *load_model(const char *file);
double predict(const struct model *model, const struct node *x);
struct svm_model *svm_load_model(const char *file);
double svm_predict(const struct svm_model *model, const struct node *x);

static double now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

int main(int argc, char **argv)
{
    if (argc != 5) return fprintf(stderr, "usage: in_process linear|svm MODEL FEATURES SECONDS\n"), 2;
    int linear = strcmp(argv[1], "linear") == 0;
    struct model *lm = linear ? load_model(argv[2]) : NULL;
    struct svm_model *sm = linear ? NULL : svm_load_model(argv[2]);
    FILE *file = fopen(argv[3], "rb");
    long long size[2];
    if (!(lm || sm) || !file || fread(size, 8, 2, file) != 2) return fprintf(stderr, "cannot read\n"), 1;
    long long count = size[0], dims = size[1];
    double *row = malloc(dims * sizeof *row);
    struct node **x = malloc(count * sizeof *x);
    for (long long i = 0; i < count; i++) {
        if (fread(row, 8, dims, file) != (size_t)dims) return fprintf(stderr, "cut short\n"), 1;
        int n = 0;
        x[i] = malloc((dims + 2) * sizeof **x);
        for (long long j = 0; j < dims; j++)
            if (row[j] != 0) x[i][n++] = (struct node){ (int)j + 1, row[j] };
        /* LIBLINEAR's intercept is the weight of one more feature, which is 1. */
        if (linear) x[i][n++] = (struct node){ (int)dims + 1, 1.0 };
        x[i][n++] = (struct node){ -1, 0 };
        x[i] = realloc(x[i], n * sizeof **x);
    }
    long long pass = count < 200 ? count : 200;
    double least = 1e9, began = now(CLOCK_MONOTONIC), sum = 0;
    for (long long p = 0; now(CLOCK_MONOTONIC) - began < atof(argv[4]); p++) {
        long long from = p * pass % (count - pass + 1);
        double start = now(CLOCK_PROCESS_CPUTIME_ID);
        for (long long i = from; i < from + pass; i++)
            sum += linear ? predict(lm, x[i]) : svm_predict(sm, x[i]);
        double time = now(CLOCK_PROCESS_CPUTIME_ID) - start;
        if (time < least) least = time;
    }
    if (sum < 0) return 1;
    printf("%.6f\n", least / pass * 1e6);
    for (long long i = 0; i < count; i++)
        printf("%d ", (int)(linear ? predict(lm, x[i]) : svm_predict(sm, x[i])));
    return 0;
}
