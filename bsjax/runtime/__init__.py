"""From messages to an answer: inputs, compiled programs, and the stages that run them.

arguments        the arguments of public functions, checked before anything runs
generation       `generate`, `generate_iter`, `stream` and `forward`
batch            conversations that run together
shared_prefixes  prompts of a batch that begin alike
answers          an answer as it grows
answer_file      the answers of a batch as a file, which a later run goes on with
likelihood       `score`: how likely an answer is
choice           how tokens are chosen: arguments, completed by the checkpoint's generation config
session          `Session`: the turns of conversations over a cache
session_file     a session as a file
kept_cache       the caches of a session between its calls
reuse            which tokens in a cache the next prompt can use again
inputs           a prompt as it can be known before it runs: template, positions, FLOPs, images
chunks           prompts, chunk by chunk: padded arrays, schedules, rows of the cache
sizes            the few sizes of chunks, caches and groups of images
image_cache      features of images that have been encoded
images           stage: groups of images through the vision tower
prefill          stage: the chunks of prompts, up to the first tokens
decoding         stage: the tokens after the first
scoring          in place of prefill and decoding: the logits of all tokens, or the scores of some
warmup           compiling programs before the first prompt arrives
memory           the memory of each stage, and the check that a prompt fits
programs         ahead-of-time compilation of programs
processes        arguments and results of programs whose devices belong to several processes
sampling         choosing the next token
results          `Result`, `Stats` and `Score`
"""
