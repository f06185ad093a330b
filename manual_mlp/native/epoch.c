/* Steps 1 to 5 for the mini-batches of a chain of layers, in the letters of formulas.py. T is float, or double with -DDOUBLE.

   The weights lie transposed and packed for the whole call: panels of one or two vectors of outputs, Wᵀ[input][outputs of
   the panel]. Every number sums its products in one order, from the first to the last, so that its bits depend neither on
   the width of the vectors nor on where an epoch is cut into calls. FMA is written out where it is meant. The numbers
   between the real width of a layer and the end of its last vector are computed too, and nothing reads them. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef DOUBLE
typedef double T;
typedef uint64_t U;
#define FMA __builtin_fma
#define SQRT __builtin_sqrt
#define MM(f) f##_pd
#define SHORT(of_double, of_float) of_double
#else
typedef float T;
typedef uint32_t U;
#define FMA __builtin_fmaf
#define SQRT __builtin_sqrtf
#define MM(f) f##_ps
#define SHORT(of_double, of_float) of_float
#endif

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#ifdef __AVX512F__
enum { BYTES = 64 };
#define V SHORT(__m512d, __m512)
#define X86(f) MM(_mm512_##f)
#else
enum { BYTES = 32 };
#define V SHORT(__m256d, __m256)
#define X86(f) MM(_mm256_##f)
#endif
#define LOAD(p) X86(loadu)(p)
#define STORE(p, v) X86(storeu)(p, v)
#define ALL(x) X86(set1)(x)
#define VFMA(x, y, z) X86(fmadd)(x, y, z)
#elif defined(__aarch64__)
enum { BYTES = 4 * sizeof(T) };
typedef T V __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T))));
static inline V ALL(T x) { return (V){x, x, x, x}; }
static inline V VFMA(V x, V y, V z) {
    for (int i = 0; i < 4; i++) z[i] = FMA(x[i], y[i], z[i]);
    return z;
}
#define LOAD(p) (*(const V *)(p))
#define STORE(p, v) (*(V *)(p) = (v))
#else
#error "a processor without fused multiply-add"
#endif

/* of ROWS rows and WIDE columns: what stays in registers; more rows take more pointers than there are */
enum { LANES = BYTES / sizeof(T), WIDE = 2 * LANES, ROWS = 6 };
#define INLINE static inline __attribute__((always_inline))
#define EACH(i, n) for (long i = 0; i < (n); i++)

/* ------------------------------------------------------------------------------------------------------------------
   Elementary functions, without a branch, so that the compiler computes several at once; libm has them one by one
   ------------------------------------------------------------------------------------------------------------------ */

enum { MANTISSA = SHORT(52, 23), BIAS = SHORT(1023, 127) };
#define MAGIC ((T)SHORT(0x1.8p52, 0x1.8p23)) /* x + MAGIC holds the whole number next to x in its last bits */
#define LN2 ((T)SHORT(0x1.62e42fefa39efp-1, 0x1.62e430p-1))
#define LN2_REST ((T)SHORT(0x1.abc9e3b39803fp-56, -0x1.05c610p-29))
#define POLYNOMIAL(p, x, c) /* c[0] + x (c[1] + x (…)) */ \
    T p = c[sizeof c / sizeof *c - 1]; \
    _Pragma("GCC unroll 32") for (int i = sizeof c / sizeof *c - 2; i >= 0; i--) p = FMA(p, x, c[i])

INLINE U bits(T x) { U u; memcpy(&u, &x, sizeof u); return u; }
INLINE T number(U u) { T x; memcpy(&x, &u, sizeof x); return x; }
INLINE T power_of_2(T k) { return number((bits(k + MAGIC) + BIAS) << MANTISSA); }

/* e^x = 2^k (1 + result), |x − k ln 2| ≤ ½ ln 2 */
INLINE T reduced(T x, T *k) {
    static const T c[] = { 1. / 2, 1. / 6, 1. / 24, 1. / 120, 1. / 720, 1. / 5040,
#ifdef DOUBLE
        1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800,
#endif
    };
    *k = FMA(x, (T)0x1.71547652b82fep0, MAGIC) - MAGIC;
    T r = FMA(-*k, LN2_REST, FMA(-*k, LN2, x));
    POLYNOMIAL(p, r, c);
    return FMA(r * r, p, r);
}

INLINE T exp_(T x) {
    const T low = SHORT(-746, -105), high = SHORT(710, 89);
    x = x < low ? low : x > high ? high : x;
    T k, e = reduced(x, &k), half = ((T)0.5 * k + MAGIC) - MAGIC;
    return (1 + e) * power_of_2(half) * power_of_2(k - half);
}

INLINE T expm1_(T x) {
    const T low = SHORT(-60, -30), high = (T)SHORT(709.9, 88.9);
    x = x < low ? low : x > high ? high : x;
    T k, e = reduced(x, &k), s = power_of_2(k - 1);
    return 2 * FMA(s, e, s - (T)0.5);
}

INLINE T sigmoid_(T z) { return 1 / (1 + exp_(-z)); }

INLINE T tanh_(T z) {
    const T end = SHORT(20, 10);
    z = z > end ? end : z < -end ? -end : z;
    T t = expm1_(2 * z);
    return t / (t + 2);
}

/* log(u + u·rest), u > 0: log(m) = f − s (f − R), m = 1 + f in [√½, √2), s = f/(2 + f), R = ⅔ s² + ⅖ s⁴ + … */
INLINE T log_(T u, T rest) {
    static const T c[] = { 2. / 3, 2. / 5, 2. / 7, 2. / 9, 2. / 11,
#ifdef DOUBLE
        2. / 13, 2. / 15, 2. / 17, 2. / 19, 2. / 21, 2. / 23,
#endif
    };
    const U one = (U)BIAS << MANTISSA, root = SHORT(0x3fe6a09e667f3bcdu, 0x3f3504f3u), high = (U)(BIAS + MANTISSA);
    U b = bits(u) + (one - root);
    T k = number((b >> MANTISSA) | high << MANTISSA) - (T)(SHORT(0x1p52, 0x1p23) + BIAS);
    T f = number((b & (((U)1 << MANTISSA) - 1)) + root) - 1, s = f / (2 + f), square = s * s;
    POLYNOMIAL(p, square, c);
    T r = FMA(k, LN2, FMA(-s, f - p * square, f) + FMA(k, LN2_REST, rest));
    return u < (T)INFINITY ? (u > 0 ? r : u == 0 ? -(T)INFINITY : (T)NAN) : u;
}

INLINE T log1p_(T x) { T u = 1 + x; return log_(u, (x - (u - 1)) / u); }

INLINE T softplus_(T z) { return z > 40 ? z : log1p_(exp_(z)); }

/* erfc(x) = e^(−x²) p(q) / (1 + 2x), q = (x − K)/(x + K), for x ≥ 0: a fit by Chebyshev polynomials, exact to 1e-17 and 7e-8 */
INLINE T erfc_(T x) {
    static const T c[] = {
#ifdef DOUBLE
        1.2329951186255526, -0.1396211168405623, 0.015379652102619604, 0.06809705425466908, -0.10103906603630056,
        0.0937328349990944, -0.06633036581218697, 0.03716751552655567, -0.016197734059799265, 0.005031970067657489,
        -0.0007577732613730956, -0.00019925714661091188, 0.0001506214900124047, -2.4397746422436416e-05,
        -1.1221287012353486e-05, 5.706604414895734e-06, 2.919733377963012e-07, -8.210939042560568e-07,
        7.746992727017941e-08, 1.0633855618594884e-07, -2.05606492756992e-08, -1.234686604382353e-08,
        3.1695881915648173e-09, 9.311744978232572e-10, -2.659599690242689e-10,
#else
        1.2769783913176496, -0.09276308204826599, -0.1660310956509487, 0.16403583960735882, -0.05421195849444883,
        -0.007942721699062254, 0.008689159658194386, 0.00104314458162079, -0.0013957069461305218,
        -0.00018365443731275987, 0.00016080358172579037,
#endif
    };
    const T K = SHORT(4, 2), end = SHORT(30, 12);
    T a = x < 0 ? -x : x;
    a = a > end ? end : a;
    T q = (a - K) / (a + K), square = a * a, rest = FMA(a, a, -square);
    POLYNOMIAL(p, q, c);
    T e = exp_(-square) * p / (1 + 2 * a), r = FMA(-rest, e, e);
    return x < 0 ? 2 - r : r;
}

/* ------------------------------------------------------------------------------------------------------------------
   The sheet's formulas, generated: f(n, v, x, y, out), out[i] = a formula of x[i], y[i] and its numbers v
   ------------------------------------------------------------------------------------------------------------------ */

typedef void Formula(long n, const T *v, const T *x, const T *y, T *out); /* out may be x */

#ifdef __clang__
#define EACH_AT_ONCE _Pragma("clang loop vectorize(assume_safety)") for (long i = 0; i < n; i++)
#else
#define EACH_AT_ONCE _Pragma("GCC ivdep") for (long i = 0; i < n; i++)
#endif

//FORMULAS//

/* ------------------------------------------------------------------------------------------------------------------
   What Python hands over
   ------------------------------------------------------------------------------------------------------------------ */

enum { PLAIN, MOMENTUM, ADAM };

/* W or b. first, second: the optimizer's averages; steps or wide_steps: its counter. `at`: where it lies packed during the call */
typedef struct {
    T *value, *gradient, *first, *second;
    float *steps;
    double *wide_steps;
    long trained, flag; /* flag: Nesterov's momentum, or weight decay apart from the gradient */
    double rate, decay, beta1, beta2, eps;
    T *at[4];
} Parameter;

/* a formula and its numbers */
typedef struct {
    Formula *f;
    const T *v;
} Call;

typedef struct {
    long in, out;
    Call G, delta; /* none for the identity */
    long saves_z;
    Parameter W, b;
    T *z, *a, *transposed; /* the slots of z and a, which are one if δ is written in a; W for step 3 */
    const T **rows;
} Layer;

/* C and delta of the cost; row_by_row: if they sum over a row; total: Σ C, undivided. The rest is room for one mini-batch */
typedef struct {
    Layer *layers;
    long count, kind, per_element, row_by_row;
    Call C, delta;
    double total;
    T *arrived[2], *target, *of_each;
    const T **input, **deltas;
    int64_t *label;
} Net;

INLINE long padded(long n) { return (n + LANES - 1) / LANES * LANES; }
INLINE long by_4(long n) { return (n + 3) / 4 * 4; }
INLINE long panel(long from, long width) { return padded(width) - from < WIDE ? padded(width) - from : WIDE; }

/* ------------------------------------------------------------------------------------------------------------------
   Products: a block of rows times a panel stays in registers
   ------------------------------------------------------------------------------------------------------------------ */

/* z[i] = start + Σ_k a[i][k] w[k], for m rows and v vectors */
INLINE void rows_times_panel(const int m, const int v, const T *const *a, long depth, const T *w, const T *start, T *z, long ld) {
    V sum[ROWS][2];
    const T *row[ROWS];
    for (int i = 0; i < m; i++) {
        row[i] = a[i];
        for (int j = 0; j < v; j++) sum[i][j] = start ? LOAD(start + j * LANES) : ALL(0);
    }
    for (long k = 0; k < depth; k++, w += v * LANES) {
        V b[2] = { LOAD(w), LOAD(w + (v - 1) * LANES) };
        for (int i = 0; i < m; i++) {
            V x = ALL(row[i][k]);
            for (int j = 0; j < v; j++) sum[i][j] = VFMA(x, b[j], sum[i][j]);
        }
    }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < v; j++) STORE(z + i * ld + j * LANES, sum[i][j]);
}

/* w[k] = beta w[k] + Σ_n a[n][k] d[n], for m inputs k and v vectors; beta = 0 forgets w */
INLINE void add_outer(const int m, const int v, const T *const *a, long k, long n, const T *d, long ld, T beta, T *w) {
    V sum[ROWS][2];
    for (int i = 0; i < m; i++)
        for (int j = 0; j < v; j++) {
            sum[i][j] = ALL(0);
            if (beta != 0) sum[i][j] += LOAD(w + (i * v + j) * LANES);
            if (beta != 0 && beta != 1) sum[i][j] *= ALL(beta);
        }
    for (long r = 0; r < n; r++, d += ld) {
        V b[2] = { LOAD(d), LOAD(d + (v - 1) * LANES) };
        const T *row = a[r] + k;
        for (int i = 0; i < m; i++) {
            V x = ALL(row[i]);
            for (int j = 0; j < v; j++) sum[i][j] = VFMA(x, b[j], sum[i][j]);
        }
    }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < v; j++) STORE(w + (i * v + j) * LANES, sum[i][j]);
}

#define SIZES(f) f(1) f(2) f(3) f(4) f(5) f(6)

/* z (n, width) = start + a W, W packed by panels of `height` rows */
static void product(const T *const *a, long n, long depth, const T *w, long height, long width, const T *start, T *z) {
    const long ld = padded(width);
    for (long j = 0; j < ld; j += WIDE) {
        const long wide = panel(j, width);
        for (long i = 0; i < n; i += ROWS) {
            const long m = n - i < ROWS ? n - i : ROWS;
#define CALL(M) case M: \
    if (wide == WIDE) rows_times_panel(M, 2, a + i, depth, w, start ? start + j : 0, z + i * ld + j, ld); \
    else rows_times_panel(M, 1, a + i, depth, w, start ? start + j : 0, z + i * ld + j, ld); \
    break;
            switch (m) { SIZES(CALL) }
#undef CALL
        }
        w += height * wide;
    }
}

/* W = beta W + aᵀ d */
static void outer_product(const T *const *a, long n, long depth, const T *d, long width, T beta, T *w) {
    const long ld = padded(width), height = by_4(depth);
    for (long k = 0; k < depth; k += ROWS) {
        const long m = depth - k < ROWS ? depth - k : ROWS;
        T *at = w;
        for (long j = 0; j < ld; j += WIDE) {
            const long wide = panel(j, width);
#define CALL(M) case M: \
    if (wide == WIDE) add_outer(M, 2, a, k, n, d + j, ld, beta, at + k * wide); \
    else add_outer(M, 1, a, k, n, d + j, ld, beta, at + k * wide); \
    break;
            switch (m) { SIZES(CALL) }
#undef CALL
            at += height * wide;
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------------
   Packing
   ------------------------------------------------------------------------------------------------------------------ */

typedef T Four __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
#if defined(__clang__) || __GNUC__ >= 12
#define MIX(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
typedef U Places __attribute__((vector_size(4 * sizeof(T))));
#define MIX(x, y, ...) __builtin_shuffle(x, y, (Places){ __VA_ARGS__ })
#endif

/* the transpose of 4 × 4 numbers */
INLINE void transpose_4(const T *from, long ld, T *to, long to_ld) {
    const Four x = *(Four *)from, y = *(Four *)(from + ld), z = *(Four *)(from + 2 * ld), w = *(Four *)(from + 3 * ld);
    const Four xy = MIX(x, y, 0, 4, 1, 5), zw = MIX(z, w, 0, 4, 1, 5), yx = MIX(x, y, 2, 6, 3, 7), wz = MIX(z, w, 2, 6, 3, 7);
    *(Four *)to = MIX(xy, zw, 0, 1, 4, 5);
    *(Four *)(to + to_ld) = MIX(xy, zw, 2, 3, 6, 7);
    *(Four *)(to + 2 * to_ld) = MIX(yx, wz, 0, 1, 4, 5);
    *(Four *)(to + 3 * to_ld) = MIX(yx, wz, 2, 3, 6, 7);
}

/* Wᵀ in panels of outputs → W in panels of inputs, for step 3 */
static void transpose(const Layer *l) {
    const T *w = l->W.at[0];
    for (long j = 0; j < l->out; j += WIDE) {
        const long wide = panel(j, l->out);
        T *to = l->transposed;
        for (long i = 0; i < l->in; i += WIDE) {
            const long high = panel(i, l->in), rows = by_4(l->in - i < high ? l->in - i : high);
            for (long r = 0; r < rows; r += 4)
                for (long c = 0; c < wide && j + c < l->out; c += 4)
                    transpose_4(w + (i + r) * wide + c, wide, to + (j + c) * high + r, high);
            to += by_4(l->out) * high;
        }
        w += by_4(l->in) * wide;
    }
}

/* W → Wᵀ in panels, or back */
static void pack(const Layer *l, T *value, T *at, int back) {
    for (long j = 0; j < l->out; j += WIDE) {
        const long wide = panel(j, l->out), end = l->out - j < wide ? l->out - j : wide;
        for (long c = 0; c < end; c += 4)
            for (long k = 0; k < l->in; k += 4) {
                T *plain = value + (j + c) * l->in + k, *packed = at + k * wide + c;
                const long rows = end - c, columns = l->in - k;
                if (rows >= 4 && columns >= 4)
                    transpose_4(back ? packed : plain, back ? wide : l->in, back ? plain : packed, back ? l->in : wide);
                else
                    EACH(x, rows < 4 ? rows : 4) EACH(y, columns < 4 ? columns : 4) {
                        T *const of_w = plain + x * l->in + y, *const in_panel = packed + y * wide + x;
                        if (back) *of_w = *in_panel; else *in_panel = *of_w;
                    }
            }
        at += by_4(l->in) * wide;
    }
}

INLINE T **tensors(Parameter *p, T *of[4]) {
    of[0] = p->value; of[1] = p->gradient; of[2] = p->first; of[3] = p->second;
    return of;
}

static void pack_all(const Net *net, int back) {
    EACH(i, net->count) {
        Layer *l = net->layers + i;
        T *W[4], *b[4];
        tensors(&l->W, W);
        tensors(&l->b, b);
        EACH(t, 4) {
            if (W[t] && (back ? l->W.trained : t != 1)) pack(l, W[t], l->W.at[t], back);
            if (b[t] && (back ? l->b.trained : t != 1))
                memcpy(back ? b[t] : l->b.at[t], back ? l->b.at[t] : b[t], l->out * sizeof(T));
        }
    }
}

/* Give everything its place in work, where there is some → how many numbers it takes, for batches of n */
long place(Net *net, long n, T *work) {
    long used = 0, widest = 0;
    const long pointers = n * 8 / (long)sizeof(T);
#define TAKE(to, size) do { if (work) (to) = (void *)(work + used); used += padded(size) + LANES; } while (0)
    EACH(i, net->count) {
        Layer *l = net->layers + i;
        const long size = by_4(l->in) * padded(l->out), slot = n * padded(l->out);
        T *W[4], *b[4];
        tensors(&l->W, W);
        tensors(&l->b, b);
        EACH(t, 4) {
            if (t == 0 || W[t]) TAKE(l->W.at[t], size);
            if (t == 0 || b[t]) TAKE(l->b.at[t], l->out);
        }
        if (i) TAKE(l->transposed, by_4(l->out) * padded(l->in));
        TAKE(l->z, slot);
        l->a = l->z;
        if (l->saves_z) TAKE(l->a, slot);
        TAKE(l->rows, pointers);
        widest = slot > widest ? slot : widest;
    }
    TAKE(net->arrived[0], widest);
    TAKE(net->arrived[1], widest);
    TAKE(net->target, widest);
    TAKE(net->of_each, widest);
    TAKE(net->input, pointers);
    TAKE(net->deltas, pointers);
    TAKE(net->label, pointers);
    return used;
}

/* ------------------------------------------------------------------------------------------------------------------
   Step 5
   ------------------------------------------------------------------------------------------------------------------ */

static void momentum(const Parameter *p, long n) {
    T *restrict w = p->at[0], *restrict g = p->at[1], *restrict v = p->at[2];
    const T rate = p->rate, decay = p->decay, beta = p->beta1;
    const long nesterov = p->flag;
    EACH(i, n) {
        const T d = g[i] + decay * w[i];
        v[i] = beta * v[i] + d;
        w[i] -= rate * (nesterov ? d + beta * v[i] : v[i]);
    }
}

static void adam(const Parameter *p, long n, double step) {
    T *restrict w = p->at[0], *restrict g = p->at[1], *restrict m = p->at[2], *restrict s = p->at[3];
    const T beta1 = 1 - p->beta1, beta2 = p->beta2, rest2 = 1 - p->beta2, eps = p->eps;
    const T shrink = p->flag ? 1 - p->rate * p->decay : 1, decay = p->flag ? 0 : p->decay;
    const T rate = p->rate / (1 - pow(p->beta1, step)), root = sqrt(1 - pow(p->beta2, step));
    EACH(i, n) {
        const T old = shrink * w[i], d = g[i] + decay * old;
        m[i] += beta1 * (d - m[i]);
        s[i] = beta2 * s[i] + rest2 * (d * d);
        w[i] = old - rate * (m[i] / (SQRT(s[i]) / root + eps));
    }
}

static void count_steps(Parameter *p, long steps) {
    if (p->trained && p->steps) *p->steps += steps;
    if (p->trained && p->wide_steps) *p->wide_steps += steps;
}

static void update(const Net *net, Parameter *p, long n, long step) {
    if (net->kind == MOMENTUM) momentum(p, n);
    if (net->kind == ADAM) adam(p, n, (p->steps ? *p->steps : *p->wide_steps) + step);
}

/* ------------------------------------------------------------------------------------------------------------------
   One mini-batch
   ------------------------------------------------------------------------------------------------------------------ */

/* Steps 4 and 5 of a layer: δ (n, out), a^l by its rows; of_each: 1/per of the cost */
static void learn(const Net *net, Layer *l, const T *const *a, long n, T *delta, double of_each, long step) {
    const long ld = padded(l->out);
    const int plain = net->kind == PLAIN;
    if (l->b.trained) {
        T *restrict b = l->b.at[!plain];
        const T beta = plain ? l->b.decay : 0, alpha = of_each * (plain ? l->b.rate : 1);
        EACH(j, ld) b[j] = beta == 0 ? 0 : beta * b[j];
        EACH(i, n) EACH(j, ld) b[j] = FMA(delta[i * ld + j], alpha, b[j]);
        update(net, &l->b, ld, step);
    }
    if (l->W.trained) {
        const T alpha = of_each * (plain ? l->W.rate : 1);
        EACH(i, n * ld) delta[i] *= alpha;
        outer_product(a, n, l->in, delta, l->out, plain ? l->W.decay : 0, l->W.at[!plain]);
        update(net, &l->W, by_4(l->in) * ld, step);
    }
}

/* C of the batch, undivided, and ∂C/∂a^L into delta; labelled: the target is a onehot of net->label */
static T cost(const Net *net, const T *a, long n, int labelled, T *delta) {
    const long m = net->layers[net->count - 1].out, ld = padded(m), rows = net->row_by_row ? n : 1;
    T total = 0;
    EACH(i, rows) {
        const long from = i * ld, numbers = net->row_by_row ? m : n * ld;
        net->C.f(numbers, net->C.v, a + from, net->target + from, net->of_each + from);
        net->delta.f(numbers, net->delta.v, a + from, net->target + from, delta + from);
    }
    EACH(i, n) {
        const T *of_row = net->of_each + i * ld;
        if (labelled) total += of_row[net->label[i]];
        else EACH(j, m) total += of_row[j];
        for (long j = m; j < ld; j++) delta[i * ld + j] = 0;
    }
    return total;
}

/* The rows of a mini-batch: pointers to x, a copy of the target */
static void gather(const Net *net, const T *x, long stride, const T *y, long y_stride, const int64_t *labels,
                   const int64_t *order, long start, long n) {
    const long m = net->layers[net->count - 1].out, ld = padded(m);
    EACH(i, n) {
        const long row = order ? order[start + i] : start + i;
        T *target = net->target + i * ld;
        net->input[i] = x + row * stride;
        if (labels) {
            memset(target, 0, ld * sizeof(T));
            target[net->label[i] = labels[row]] = 1;
        } else
            memcpy(target, y + row * y_stride, m * sizeof(T));
    }
}

/* The five steps for each mini-batch of n of the rows order[i], or i, of x and of y or labels, from <= i < to.
   prediction: where a^L of each row goes, if it is wanted. net: placed for n */
void train(Net *net, const T *x, long stride, const T *y, long y_stride, const int64_t *labels,
           const int64_t *order, T *prediction, long p_row, long p_column, long from, long to, long n) {
    Layer *const first = net->layers, *const last = first + net->count - 1, *lowest = last;
    for (Layer *l = last; l >= first; l--)
        if (l->W.trained || l->b.trained) lowest = l;
    pack_all(net, 0);
    EACH(i, net->count) EACH(r, n) first[i].rows[r] = first[i].a + r * padded(first[i].out);
    long step = 0;
    for (long start = from; start < to; start += n) {
        if (to - start < n) n = to - start;
        step++;
        gather(net, x, stride, y, y_stride, labels, order, start, n);
        /* 1. forward */
        for (Layer *l = first; l <= last; l++) {
            product(l == first ? net->input : l[-1].rows, n, l->in, l->W.at[0], by_4(l->in), l->out, l->b.at[0], l->z);
            if (l->G.f) l->G.f(n * padded(l->out), l->G.v, l->z, l->z, l->a);
        }
        if (prediction)
            EACH(r, n) EACH(j, last->out)
                prediction[(order ? order[start + r] : start + r) * p_row + j * p_column] = last->rows[r][j];
        /* 2. output error */
        T *delta = net->arrived[0], *next = net->arrived[1];
        net->total += cost(net, last->a, n, labels != 0, delta);
        for (Layer *l = last; l >= lowest; l--) {
            if (l->delta.f) l->delta.f(n * padded(l->out), l->delta.v, delta, l->z, delta);
            /* 3. right to left, with the old weights */
            if (l > lowest) {
                EACH(r, n) net->deltas[r] = delta + r * padded(l->out);
                transpose(l);
                product(net->deltas, n, l->out, l->transposed, by_4(l->out), l->in, 0, next);
            }
            /* 4. gradients, 5. update */
            learn(net, l, l == first ? net->input : l[-1].rows, n, delta, 1. / (n * net->per_element), step);
            T *const done = delta;
            delta = next;
            next = done;
        }
    }
    pack_all(net, 1);
    EACH(i, net->count) {
        count_steps(&first[i].W, step);
        count_steps(&first[i].b, step);
    }
}
