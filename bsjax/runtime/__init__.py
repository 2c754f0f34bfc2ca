"""From messages to an answer: inputs, compiled programs, and the stages that run them.

generation    `generate`, `stream` and `forward`
likelihood    `score`: how likely an answer is
choice        how tokens are chosen: arguments, completed by the checkpoint's generation config
session       `Session`: the turns of a conversation over one cache
session_file  a session as a file
kept_cache    the cache of a session between its calls
reuse         which tokens in a cache the next prompt can use again
inputs        a prompt as it can be known before it runs: template, positions, FLOPs, image groups
chunks        a prompt, chunk by chunk: padded arrays, schedules, rows of the cache
sizes         the few sizes of chunks, caches and groups of images
images        stage: groups of images through the vision tower
prefill       stage: the chunks of a prompt, up to the first token
decoding      stage: the tokens after the first
scoring       in place of prefill and decoding: the logits of all tokens, or the scores of some
warmup        compiling programs before the first prompt arrives
memory        the memory of each stage, and the check that a prompt fits
programs      ahead-of-time compilation of programs
sampling      choosing the next token
results       `Result`, `Stats` and `Score`
"""
