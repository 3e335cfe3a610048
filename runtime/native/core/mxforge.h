/*!
 * \file mxforge.h
 * \brief The C API of libmxforge: compiled models, run without TVM and without Python.
 *
 * Every function that can fail returns a status; `mxf_error` then says what is wrong and what to
 * do, in one sentence for people. Nothing throws. A model is for one thread at a time; a call from
 * a second one meanwhile is answered MXF_BUSY.
 *
 * Arguments are checked, and so is the order of calls. What C cannot tell is the caller's: that a
 * pointer leads to as many elements as are said, that nobody uses a model or a library that was
 * closed, or closes one in which another thread is in a call.
 */
#ifndef MXFORGE_H_
#define MXFORGE_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define MXF_API __declspec(dllexport)
#else
#define MXF_API __attribute__((visibility("default")))
#endif

typedef enum mxf_status {
  MXF_OK = 0,
  MXF_INVALID = 1, /* an argument that cannot be, or calls in an order that cannot be */
  MXF_CORRUPT = 2, /* a file that is not as the compiler writes it */
  MXF_TARGET = 3,  /* the code is for another machine, or its device is not here */
  MXF_MEMORY = 4,  /* the host's or the device's is too small */
  MXF_PAGES = 5,   /* more tokens than the caches have pages for: free a sequence */
  MXF_BUSY = 6,    /* another thread is in a call */
  MXF_LOST = 7,    /* the device: close the model, and open it again */
  MXF_FAILED = 8   /* a kernel, while it ran */
} mxf_status;

/*! \brief What went wrong in the last call of this thread that did not return MXF_OK. */
MXF_API const char* mxf_error(void);

/*! \brief A hash of the sources that the library was built from; empty where nobody told. */
MXF_API const char* mxf_build_id(void);

/* -- devices ------------------------------------------------------------------------------ */

/*!
 * \brief The devices of a kind, such as vulkan, as JSON: a list of objects, the best first.
 *
 * Those that cannot be used are among them, with the reason. The text holds until this thread's
 * next call of this function.
 */
MXF_API mxf_status mxf_devices(const char* kind, const char** json);
/*! \brief Bytes that may still be allocated on a device; -1 where it does not tell. */
MXF_API mxf_status mxf_device_memory(const char* kind, int32_t device, int64_t* bytes);
/*! \brief Whether (1 or 0) a device has a feature that a launch plan asks for. */
MXF_API mxf_status mxf_device_has(const char* kind, int32_t device, const char* feature,
                                  int32_t* has);

/* -- models ------------------------------------------------------------------------------- */

typedef struct mxf_model mxf_model;

/*! \brief How a model is loaded; 0 everywhere takes what suits it. */
typedef struct mxf_options {
  int32_t threads;       /* of a CPU; 0: one for each core that may be used */
  int64_t context;       /* most tokens of a sequence; 0: what it was compiled for */
  int32_t max_batch;     /* sequences in a step; 0: what it was compiled for */
  int32_t prefill_chunk; /* tokens of prompts in a step; 0: what it was compiled for */
  int32_t device;        /* a GPU, where there are several, the best first */
  const char* library;   /* the target of the library to take, such as cpu:avx2; NULL: the best */
} mxf_options;

/*! \brief Open the artifact in a folder. `options` may be NULL. */
MXF_API mxf_status mxf_model_open(const char* artifact, const mxf_options* options,
                                  mxf_model** model);
/*! \brief Free it with all of its sequences. NULL is fine. */
MXF_API void mxf_model_close(mxf_model* model);

typedef struct mxf_model_info {
  int64_t vocab_size;
  int64_t context;
  int32_t max_batch;
  int32_t prefill_chunk;
  const int32_t* stop_token_ids; /* the model's own, which live as long as it */
  int32_t stop_count;
  int32_t runs_behind; /* 1: a step runs while its submission has returned; 0: it has run then */
} mxf_model_info;

MXF_API mxf_status mxf_model_get_info(mxf_model* model, mxf_model_info* info);

/* -- sequences ---------------------------------------------------------------------------- */

/*! \brief A sequence of tokens and what is computed of it; never 0, and never used twice. */
typedef int64_t mxf_sequence;

/*!
 * \brief Begin a sequence with a prompt, as far as it is known.
 *
 * `reused` tells how many of the tokens need not be given to a step, since a kept prefix has them.
 * The last one always has to be. Without tokens nothing is reused.
 */
MXF_API mxf_status mxf_sequence_create(mxf_model* model, const int32_t* tokens, int64_t count,
                                       mxf_sequence* sequence, int64_t* reused);
/*! \brief A second sequence with the same past and its own future. */
MXF_API mxf_status mxf_sequence_fork(mxf_model* model, mxf_sequence sequence, mxf_sequence* fork);
/*! \brief Keep what is computed, for later prompts that begin alike, while memory lasts. */
MXF_API mxf_status mxf_sequence_keep(mxf_model* model, mxf_sequence sequence);
/*!
 * \brief Let tokens count as computed, with copies of what the sequence knows in their place.
 *
 * For benchmarks far into a context. What is known has to fill whole pages of 16 tokens.
 */
MXF_API mxf_status mxf_sequence_pretend(mxf_model* model, mxf_sequence sequence,
                                        const int32_t* tokens, int64_t count);
MXF_API mxf_status mxf_sequence_free(mxf_model* model, mxf_sequence sequence);

/* -- steps -------------------------------------------------------------------------------- */

/*! \brief How a token is drawn from logits, in this order: penalties, biases, mask, temperature,
 * top-k, top-p, min-p. The same seed and logits give the same token. */
typedef struct mxf_sampling {
  float temperature; /* 0: the most likely token */
  float top_p;       /* 1: all */
  float min_p;       /* 0: all */
  int32_t top_k;     /* 0: all */
  float repetition_penalty; /* 1: none; of tokens in prompt or answer */
  float presence_penalty;   /* 0: none; once for tokens in the answer */
  float frequency_penalty;  /* 0: none; for each time in the answer */
  int32_t logprobs;         /* how many of the likeliest to report, up to 20; -1: nothing */
  uint64_t seed;
  const int32_t* bias_tokens; /* ascending */
  const float* biases;        /* added to their logits */
  int32_t bias_count;
  const uint32_t* mask; /* of this step: bit t % 32 of word t / 32 allows token t; NULL: all */
} mxf_sampling;

/*! \brief What one sequence contributes to a step. */
typedef struct mxf_part {
  mxf_sequence sequence;
  const int32_t* tokens; /* its next ones; NULL: the one that was drawn last */
  int32_t count;         /* of tokens; 1 where they are NULL */
  int32_t logits;        /* of so many of the last ones, logits are wanted on the host */
  const mxf_sampling* sampling; /* NULL: no token is drawn after the last one */
} mxf_part;

/*! \brief What came of a part. Pointers hold until the next step is awaited. */
typedef struct mxf_result {
  int32_t token; /* drawn; -1 where none was, or where the logits hold nothing to choose by */
  float logprob; /* its own, of the logits before penalties */
  const int32_t* top_tokens; /* 20, the likeliest first, -1 where there are no more */
  const float* top_logprobs;
  const float* logits; /* [logits, vocabulary] */
} mxf_result;

/*!
 * \brief Begin a step with these parts, each of another sequence.
 *
 * A second step may be submitted before the first is awaited; no third. MXF_PAGES where there are
 * no pages for it: then nothing has happened.
 */
MXF_API mxf_status mxf_step_submit(mxf_model* model, const mxf_part* parts, int32_t count);
/*! \brief Wait for the oldest step, and take a result for each of its parts. */
MXF_API mxf_status mxf_step_wait(mxf_model* model, mxf_result* results);

/*! \brief Wait for the device; fails where it is lost. */
MXF_API mxf_status mxf_model_wait(mxf_model* model);

/* -- functions of a library alone --------------------------------------------------------- */

/*! \brief Bytes on the host: `shape` has `ndim` extents, and the elements lie one after another. */
typedef struct mxf_array {
  void* data;
  const int64_t* shape;
  int32_t ndim;
} mxf_array;

typedef struct mxf_library mxf_library;

/*!
 * \brief Open a compiled library, the launch plan and the kernels, on a device.
 *
 * `kind` is what its target begins with, such as cpu; `device` one of these, the best first; of a
 * CPU, so many `threads` run the kernels, or as many as there are cores where it is 0.
 */
MXF_API mxf_status mxf_library_open(const char* kind, int32_t device, const char* plan,
                                    const char* kernels, int32_t threads, mxf_library** library);
MXF_API void mxf_library_close(mxf_library* library);

/*!
 * \brief Call one of its functions, whose arguments are in the plan's order; caches among them are
 * updated.
 *
 * The outputs and their shapes are the library's, and stay as they are until the next call.
 */
MXF_API mxf_status mxf_call(mxf_library* library, const char* function,
                            const mxf_array* arguments, int32_t count, mxf_array* outputs,
                            int32_t output_count);

/*!
 * \brief Run the function of the last mxf_call again, `runs` times, on the arguments that the call
 * left on the device; of a CPU those are the caller's, and have to be there still.
 *
 * Counted are nanoseconds of the wall clock: until all runs were asked for, and until all were
 * done. What the function updates goes on from run to run; outputs of the call are lost.
 */
MXF_API mxf_status mxf_repeat(mxf_library* library, int32_t runs, int64_t* issued, int64_t* done);
/*! \brief Copy so many bytes within the device's memory, `runs` times one after another: how many
 * nanoseconds it takes until all are done. */
MXF_API mxf_status mxf_time_copies(mxf_library* library, int64_t bytes, int32_t runs,
                                   int64_t* nanoseconds);

#ifdef __cplusplus
}
#endif

#endif /* MXFORGE_H_ */
