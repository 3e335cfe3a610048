/* Answers a prompt of token ids: answer FOLDER THREADS COUNT ID... prints COUNT ids. */
#include <stdio.h>
#include <stdlib.h>

#include "mxforge.h"

static int failed(void) {
  fprintf(stderr, "error: %s\n", mxf_error());
  return 1;
}

int main(int count, char** words) {
  mxf_options options = {0};
  mxf_model* model;
  mxf_sampling greedy = {0};
  mxf_part part = {0};
  mxf_result result;
  int32_t prompt[512];
  int64_t reused;
  int tokens = 0, wanted = atoi(words[3]);

  for (int i = 4; i < count; ++i) prompt[tokens++] = atoi(words[i]);
  options.threads = atoi(words[2]);
  options.context = 256;
  if (mxf_model_open(words[1], &options, &model) != MXF_OK) return failed();
  if (mxf_sequence_create(model, prompt, tokens, &part.sequence, &reused) != MXF_OK) {
    return failed();
  }
  greedy.top_p = 1;
  greedy.repetition_penalty = 1;
  greedy.logprobs = -1;
  part.sampling = &greedy;
  part.tokens = prompt + reused;
  part.count = tokens - (int)reused;
  for (int i = 0; i < wanted; ++i) {
    if (mxf_step_submit(model, &part, 1) != MXF_OK) return failed();
    if (mxf_step_wait(model, &result) != MXF_OK) return failed();
    printf("%d ", result.token);
    part.tokens = NULL;
    part.count = 1;
  }
  mxf_model_close(model);
  return 0;
}
